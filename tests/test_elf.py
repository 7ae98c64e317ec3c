"""ELF: golden arrays of the official code, properties of the mathematics, bad input, a small learning run.

    python -m pytest -q tests/test_elf.py       # about twenty seconds on one thread
    python tests/test_elf.py lean 32100         # lean step against the plain three-pass step: time and memory
    python tests/test_elf.py table out/elf-tiny # judge and entropy over steps, ODE and SDE, w = 1 and 3
"""
import dataclasses
import json
import math
import pathlib
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common
import data
import elf
from conftest import golden

G = golden("elf")
META = json.loads(str(G["meta_json"]))
M = META["elf"]
EPS = META["t_eps"]


def err(a, b):
    """max |a - b| / max(1, max |b|), the measure that the tolerances of the golden arrays use."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1)).item() if b.numel() else 0.0


def weights(prefix):
    return {k[len(prefix):]: v for k, v in G.items() if k.startswith(prefix)}


def config(**keys):
    base = dict(encoder="t5", max_input_length=META["max_input_length"], d_model=M["hidden_size"],
                n_layer=M["depth"], n_head=M["num_heads"], vocab=M["vocab_size"], length=M["max_length"],
                text_encoder_dim=M["text_encoder_dim"], bottleneck_dim=M["bottleneck_dim"],
                num_time_tokens=M["num_time_tokens"], num_self_cond_cfg_tokens=M["num_self_cond_cfg_tokens"],
                num_model_mode_tokens=M["num_model_mode_tokens"], latent_mean=META["latent_mean"],
                latent_std=META["latent_std"], t_eps=EPS, self_cond_prob=META["self_cond_prob"],
                decoder_prob=META["decoder_prob"], denoiser_noise_scale=META["denoiser_noise_scale"],
                decoder_noise_scale=META["decoder_noise_scale"], denoiser_p_mean=META["denoiser_p_mean"],
                denoiser_p_std=META["denoiser_p_std"], decoder_p_mean=META["decoder_p_mean"],
                decoder_p_std=META["decoder_p_std"], self_cond_cfg_min=META["self_cond_cfg_min"],
                self_cond_cfg_max=META["self_cond_cfg_max"])
    return elf.Config(**{**base, **keys})


def model_of(scale=1.0, shift=0.0, **keys):
    """The golden network (times scale, plus shift), with the golden T5 behind it."""
    model = elf.ELF(config(**keys))
    model._t5 = elf.T5Encoder(weights("t5/"))
    given = elf.ELF.published(weights("w/"))
    model.load_state_dict({k: scale * given[k] + shift for k in model.state_dict()})
    return model


def small(**keys):
    """A small random network with a Gaussian table, nothing left at zero."""
    base = dict(vocab=11, length=8, d_model=16, n_layer=2, n_head=2, text_encoder_dim=12, bottleneck_dim=6)
    model = elf.ELF(elf.Config(**{**base, **keys}))
    with torch.no_grad():
        model.final_layer.linear.weight.normal_(std=0.2)
        if model.cfg.num_model_mode_tokens:
            model.mode_tokens.normal_()
    return model


def times(normals):
    return elf.logit_normal(normals, META["denoiser_p_mean"], META["denoiser_p_std"])


def token_times(normals):
    return elf.logit_normal(normals, META["decoder_p_mean"], META["decoder_p_std"])


def scales(u):
    return elf.guidance_scale(u, META["self_cond_cfg_min"], META["self_cond_cfg_max"])


def inputs(tag):
    """Batch, t, noise, coins and configuration keys of a golden step; x_den and x_dec share x's draws."""
    parent = tag.split("_")[0]
    d, batch_tag = weights(parent + "/"), parent if f"{parent}/batch_input_ids" in G else "trainA"
    b = weights(batch_tag + "/batch_")
    batch = dict(tokens=b["input_ids"], mask=b["attention_mask"] > 0,
                 cond_len=b["cond_seq_mask"].sum(1).long())
    B, L = batch["tokens"].shape
    coin = {"den": torch.zeros(B), "dec": torch.ones(B)}.get(tag.partition("_")[2], d["in_coin"]) > 0
    coins = dict(decode=coin, sc=d.get("in_sc_uniform", torch.ones(B)) < META["self_cond_prob"],
                 drop=d.get("label_drop", torch.zeros(B)) > 0)
    noise = dict(p=token_times(d["in_lambda_normals"]).view(B, L),
                 eps=torch.where(coin[:, None, None], d["in_dec_noise"], d["in_noise"]))
    keys = {}
    if "in_w_uniform" in d:
        noise["w"] = scales(d["in_w_uniform"])
    else:
        keys["num_self_cond_cfg_tokens"] = 0
    if "in_sc_uniform" not in d:
        keys["self_cond_prob"] = 0.0
    if parent == "trainB":
        keys.update(pad_in_loss=True, decoder_noise_scale=META["decoder_noise_scale_trainB"])
    return batch, times(d["in_t_normals"]), noise, coins, keys


TRAIN = sorted({k.split("/")[0] for k in G if k.startswith("train") and k.endswith("/loss")})


def check_grads(model, loss, prefix):
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    for name, g in weights(prefix + "/grad/").items():
        assert err(grads[name], g) < 1e-4, name
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    assert abs(norm - G[prefix + "/grad_norm"]) / G[prefix + "/grad_norm"] < 1e-4


# --- golden: encoder and pieces --------------------------------------------------------------------


def test_t5_encoder():
    t5, ids = elf.T5Encoder(weights("t5/")), G["t5_ids"]
    masked = t5(ids, (G["t5_mask2d"] > 0)[:, None].expand(-1, ids.shape[1], -1))
    assert err(masked, G["t5_out_mask2d"]) < 1e-5
    assert err(masked, G["jax/t5_out_mask2d"]) < 1e-5
    assert err(t5(ids), G["t5_out_nomask"]) < 1e-5
    assert err(t5(G["t5_ids_long"])[:, ::37], G["t5_out_long"]) < 1e-5
    assert torch.equal(elf.t5_bucket(G["t5_bucket_rel"]), G["t5_bucket"])


def write_safetensors(path, tensors):
    header, raw = {}, b""
    for name, x in tensors.items():
        span = [len(raw), len(raw) + 4 * x.numel()]
        header[name] = dict(dtype="F32", shape=list(x.shape), data_offsets=span)
        raw += x.contiguous().numpy().tobytes()
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw)


def test_t5_weights_from_files(tmp_path):
    """The same encoder from pytorch_model.bin and from model.safetensors (a decoder beside it is ignored)."""
    given = weights("t5/") | {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}
    torch.save(given, tmp_path / "t5.bin")
    write_safetensors(tmp_path / "t5.safetensors", given)
    for file in ("t5.bin", "t5.safetensors"):
        t5 = elf.make_t5(config(t5=str(tmp_path / file)))
        assert err(t5(G["t5_ids"]), G["t5_out_nomask"]) < 1e-5


def test_t5_weights_are_downloaded_once(tmp_path, monkeypatch):
    urls = []

    def download(url, path):
        urls.append(url)
        write_safetensors(path, weights("t5/"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "download", download)
    for _ in range(2):
        t5 = elf.make_t5(config(t5="t5-small"))
    assert err(t5(G["t5_ids"]), G["t5_out_nomask"]) < 1e-5
    assert urls == ["https://huggingface.co/google-t5/t5-small/resolve/main/model.safetensors"]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(data.UserError, match="without torchrun"):
        elf.make_t5(config(t5="t5-base"))


def test_encoder_outputs_of_a_small_corpus_are_kept():
    """t5_cache: a row is encoded once for each of its masks; a full table takes no more rows."""
    plain, model = (small(encoder="t5-random", text_encoder_dim=64, length=64, t5_cache=n) for n in (0, 1))
    ids, lengths = torch.randint(0, 11, (70, 64)), torch.randint(1, 65, (70, 1))
    valid, no = torch.arange(64) < lengths, torch.zeros(70, dtype=torch.bool)
    cond, calls, t5 = torch.arange(64) < lengths // 2, [], model.encoder()
    model._t5 = lambda *args: calls.append(1) or t5(*args)
    drop = ~no
    drop[0] = False                                 # both ways of encoding a row must stay apart
    for rows, n in ((slice(0, 3), 3), (slice(0, 3), 3), (slice(0, 5), 5), (slice(0, 70), 70)):
        x = model.encode(ids[rows], valid[rows], cond[rows], no[rows])
        assert err(x, plain.encode(ids[rows], valid[rows], cond[rows])) < 1e-5 and len(calls) == n
    x = model.encode(ids[:2], valid[:2], cond[:2], drop[:2])
    assert err(x, plain.encode(ids[:2], valid[:2], cond[:2], drop[:2])) < 1e-5 and len(calls) == 71
    assert len(model._rows) == 64                   # rows of 16 KiB in a table of 1 MiB


def test_encoder_mask_and_conditional_latents():
    for tag in ("trainA", "trainB"):
        batch, *_ = inputs(tag)
        cond = torch.arange(batch["tokens"].shape[1]) < batch["cond_len"][:, None]
        want = G[f"{tag}/batch_encoder_attention_mask"]
        assert torch.equal(elf.encoder_mask(batch["mask"], cond).float(), want)
    out = elf.T5Encoder(weights("t5/"))(batch["tokens"], elf.encoder_mask(batch["mask"], cond))
    assert err(out, G["trainB/enc_out_nodrop"]) < 1e-5


def test_elementary_pieces():
    model = model_of()
    assert err(common.sinusoid(G["temb_t"]), G["temb_sin"]) < 1e-6
    assert err(model.t_embedder(G["temb_sin"]), G["temb_t_embedder"]) < 1e-5
    if "temb_cfg_embedder" in G and M["num_self_cond_cfg_tokens"]:
        assert err(model.self_cond_cfg_embedder(G["temb_sin"]), G["temb_cfg_embedder"]) < 1e-5
    assert err(model.cos.repeat_interleave(2, -1), G["rope_cos"]) < 1e-6
    assert err(model.sin.repeat_interleave(2, -1), G["rope_sin"]) < 1e-6
    assert err(elf.rotate_pairs(G["rope_in"], model.cos, model.sin), G["rope_out"]) < 1e-6
    assert err(model.blocks[0].norm1(G["rms_in"]), G["rms_out"]) < 1e-6
    mean, std = META["denoiser_p_mean"], META["denoiser_p_std"]
    assert err(times(G["sch_normals"]), G["sch_t"]) < 1e-6
    assert err(scales(G["sch_uniforms"]), G["sch_w"]) < 1e-6
    steps = len(G["sch_normals"]) + 1
    assert err(elf.time_grid(steps, "logit_normal", mean, std, G["sch_normals"]), G["sch_grid"]) < 1e-6
    assert err(elf.time_grid(steps, "uniform", mean, std), G["sch_grid_uniform"]) < 1e-6
    assert err(elf.velocity(G["vx_net"], G["vx_z"], G["vx_t"][:, None, None], EPS), G["vx_v"]) < 1e-5


def test_collated_pairs_schedules_and_metrics():
    """Rows made from pairs, learning rates and sample metrics as the official code has them."""
    tok = SimpleNamespace(name="t5", vocab=M["vocab_size"], bos=None, eos=1, pad=0,
                          encode=lambda text: np.array(text.split(), dtype=np.int64))
    columns = (json.loads(str(G[f"trainB/{k}_ids_flat"])) for k in ("cond", "target"))
    pairs = [tuple(" ".join(map(str, ids)) for ids in pair) for pair in zip(*columns)]
    corpus = data.in_memory("pairs", tok, {"train": pairs}, M["max_length"], "pairs", META["max_input_length"])
    rows, want = corpus.rows("train", range(len(pairs))), weights("trainB/batch_")
    assert torch.equal(rows["tokens"], want["input_ids"])
    assert torch.equal(rows["mask"].float(), want["attention_mask"])
    assert torch.equal(rows["cond_len"], want["cond_seq_mask"].sum(1).long())
    peak = G["opt/lr"].max().item()
    constant, cosine = (elf.Config(steps=20, warmup=n, lr_schedule=k, min_lr=0.001 / peak)
                        for n, k in ((3, "constant"), (4, "cosine")))
    for cfg, name in ((constant, "opt/lr"), (cosine, "opt/lr_cosine")):
        lr = [peak * common.lr_factor(cfg, i) for i in range(len(G[name]))]
        assert err(torch.tensor(lr), G[name]) < 1e-7
    assert err(torch.from_numpy(data.entropies(G["entropy_ids"])), G["entropy"]) < 1e-6
    assert np.array_equal(data.scored_targets(G["ppl_ids"], eos=11), G["ppl_valid_pt"] > 0)


def logits_of(model, h):
    return model.token_features(h) @ model.unembed_kernel + model.unembed_bias


@torch.no_grad()
def test_network_forward():
    model, seen = model_of(), []
    C, t, w, gate = M["text_encoder_dim"], G["fwd_t"], G["fwd_w"], G["fwd_gate"]
    z, half = G["fwd_x2"].split(C, dim=-1)
    h = model.net(z, half, t, w, torch.zeros_like(t))
    assert err(model.final_layer(h), G["fwd_x_none"]) < 2e-5
    h = model.net(z, half, t, w, torch.ones_like(t))
    for code in ("", "jax/"):
        assert err(model.final_layer(h), G[code + "fwd_x_dec"]) < 2e-5
        assert err(logits_of(model, h), G[code + "fwd_logits_dec"]) < 2e-5
    assert torch.equal(common.greedy(model.token_features(h), model.unembed_kernel.T, model.unembed_bias),
                       G["fwd_logits_dec"].argmax(-1))
    h = model_of(self_cond_prob=0.0).net(G["fwd_x1"], None, t, w, torch.zeros_like(t))
    assert err(model.final_layer(h), G["fwd_x_nosc"]) < 2e-5
    model.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(out))
    h = model.net(z, half, t, w, gate)
    assert err(model.final_layer(h), G["fwd_x_gate"]) < 2e-5
    assert err(logits_of(model, h), G["fwd_logits_gate"]) < 2e-5
    assert err(seen[0], G["fwd_tokens_in"]) < 2e-5
    assert all(err(a, b) < 2e-5 for a, b in zip(seen[1:], G["fwd_block_out"]))


# --- golden: training ------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", TRAIN)
def test_training_step(tag):
    batch, t, noise, coins, keys = inputs(tag)
    model = model_of(**keys)
    loss, metrics = model.loss(batch, t=t, noise=noise, coins=coins)
    assert err(loss.detach(), G[f"{tag}/loss"]) < 1e-5
    assert err(metrics["l2"], G[f"{tag}/l2_loss"]) < 1e-5 and err(metrics["ce"], G[f"{tag}/ce_loss"]) < 1e-5
    if f"jax/{tag}/loss" in G:
        assert err(loss.detach(), G[f"jax/{tag}/loss"]) < 2e-5
    check_grads(model, loss, tag)


@pytest.mark.parametrize("tag", [t for t in TRAIN if f"{t}/main_x" in G])
@torch.no_grad()
def test_inside_of_a_training_step(tag):
    """Latents, inputs and outputs of every pass; the official third pass equals the main one where used."""
    batch, t, noise, coins, keys = inputs(tag)
    model = model_of(**keys)
    s = model.corrupt(batch, t, noise, coins)
    x_u, half = model.first_estimate(s)
    x_hat, _, nll = model.main_pass(s, half, torch.ones_like(s.t)[:, None].expand(s.tokens.shape))
    names = ("x0", "t", "w", "main_input", "main_t", "main_x", "main_logits", "unc_input", "unc_x", "cond_x")
    gold = {k: G[f"{tag}/{k}"][s.order] for k in names if f"{tag}/{k}" in G}
    for key, value in (("x0", s.x), ("t", s.t), ("w", s.w)):
        assert key not in gold or err(value, gold[key]) < 1e-5, key
    seen = torch.cat([s.z, half], -1) if model.cfg.self_cond_prob else s.z
    assert err(seen, gold["main_input"]) < 1e-5
    assert err(torch.where(s.decode, 1.0, s.t), gold["main_t"]) < 1e-6
    assert err(x_hat, gold["main_x"]) < 2e-5
    if "unc_x" in gold:
        denoise = ~s.decode
        assert err(torch.cat([s.z, s.pinned], -1)[denoise], gold["unc_input"][denoise]) < 1e-5
        assert err(x_u[denoise], gold["unc_x"][denoise]) < 2e-5
        assert err(x_hat[s.guided], gold["cond_x"][s.guided]) < 2e-5
    if "main_logits" in gold:
        h = model.net(s.z, half, torch.where(s.decode, 1.0, s.t), s.w, s.decode)
        assert err(logits_of(model, h), gold["main_logits"]) < 2e-5
        ce = F.cross_entropy(gold["main_logits"].flatten(0, 1), s.tokens.flatten(), reduction="none")
        assert err(nll.flatten(), ce) < 2e-5


def three_pass_loss(model, batch, t, noise, coins):
    """The official PyTorch step in v-space, apart from elf.py: three passes, both heads on ALL rows."""
    cfg, tokens = model.cfg, batch["tokens"]
    B, L = tokens.shape
    valid, cond = batch["mask"], torch.arange(L, device=tokens.device) < batch["cond_len"][:, None]
    count = (torch.ones_like(valid) if cfg.pad_in_loss else valid) & ~cond
    drop, at = coins["drop"], cond[..., None]
    x0 = model.encode(tokens, valid, cond, drop).masked_fill((drop[:, None] & cond)[..., None], 0)
    tb, zero = t[:, None, None], torch.zeros_like(t)
    z = torch.where(at, x0, tb * x0 + (1 - tb) * cfg.denoiser_noise_scale * noise["eps"])
    p = noise["p"][..., None]
    z_dec = p * x0 + (1 - p) * cfg.decoder_noise_scale * noise["eps"]
    dec, sc = coins["decode"][:, None, None], (coins["sc"] & ~coins["decode"])[:, None, None]
    net = lambda z, half, t, gate: model.net(z, half, t, noise["w"], gate)
    with torch.no_grad():
        x_u = model.final_layer(net(z, torch.where(at, x0, 0.0), t, zero))
    half = torch.where(dec, 0.0, torch.where(at, x0, torch.where(sc, x_u, 0.0)))
    h = net(torch.where(dec, z_dec, z), half, torch.where(coins["decode"], 1.0, t), coins["decode"].float())
    x_hat, logits = model.final_layer(h), logits_of(model, h)
    with torch.no_grad():
        x_c = model.final_layer(net(z, torch.where(at, x0, x_u), t, zero))
    v = lambda x: (x - z) / (1 - tb).clamp_min(cfg.t_eps)
    target = v(x0) + torch.where(sc, 1 - 1 / noise["w"][:, None, None], 0.0) * (v(x_c) - v(x_u))
    l2 = (v(x_hat) - target).square().mean(-1)
    ce = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(B, L)
    return (count * torch.where(dec[..., 0], ce, l2)).sum() / count.sum().clamp_min(1)


@pytest.mark.parametrize("tag", [t for t in TRAIN if f"{t.split('_')[0]}/in_w_uniform" in G])
def test_lean_step_equals_three_passes(tag):
    """One no-grad pass on its rows, each head on its rows: the loss and every gradient of the plain step."""
    batch, t, noise, coins, keys = inputs(tag)
    lean, plain = model_of(**keys).double(), model_of(**keys).double()
    for m in (lean, plain):
        m._t5.weights = {k: v.double() for k, v in m._t5.weights.items()}
    t, noise = t.double(), {k: v.double() for k, v in noise.items()}
    a, _ = lean.loss(batch, t=t, noise=noise, coins=coins)
    b = three_pass_loss(plain, batch, t, noise, coins)
    assert abs(a - b) < 1e-9 * b
    a.backward()
    b.backward()
    for (name, p), q in zip(lean.named_parameters(), plain.parameters()):
        g, want = (torch.zeros_like(x) if x.grad is None else x.grad for x in (p, q))
        assert err(g, want) < 1e-8, name


def test_chunks_of_a_batch_average_to_the_batch():
    """Roles, times, label drops and denominators belong to the global batch, whatever its chunks."""
    torch.manual_seed(1)
    B, L = 24, 8
    model = small(label_drop_prob=0.2, decoder_noise_scale=1.0, max_input_length=4).double()
    cond, ends = torch.randint(1, 4, (B,)), torch.randint(5, L + 1, (B,))
    full = dict(tokens=torch.randint(0, 11, (B, L)), mask=torch.arange(L) < ends[:, None], cond_len=cond)
    noise = dict(eps=torch.randn(B, L, 12, dtype=torch.float64), p=torch.rand(B, L, dtype=torch.float64))
    losses = []
    for n in (B, 12, 4):
        for i in range(0, B, n):
            part = {k: v[i:i + n] for k, v in full.items()}
            part.update(global_len=ends, global_cond=cond, rows=common.Rows(3, 7, i, n, B))
            loss, _ = model.loss(part, noise={k: v[i:i + n] for k, v in noise.items()})
            (loss * n / B).backward()
            losses.append((n, loss.detach() * n / B))
        grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        if n == B:
            want = grad.clone()
        assert err(grad, want) < 1e-10
        model.zero_grad()
    sums = [sum(x for m, x in losses if m == n) for n in (B, 12, 4)]
    assert max(sums) - min(sums) < 1e-10


def test_reserved_rows_suffice():
    """No row may fall outside its slice, whatever the chunk of the global batch; counts are the paper's."""
    for n_global, n_local in ((32, 32), (40, 40), (512, 64), (64, 8), (32, 1)):
        for step in range(200):
            first = n_local * (step % (n_global // n_local))
            role = common.Rows(0, step, first, n_local, n_global).roles((0.2, 0.4, 0.4))
            for share, rows in ((0.2, role == 0), (0.8, role > 0), (0.4, role == 2)):
                assert rows.sum() <= elf.room(share, n_local, n_global)
    assert [elf.room(s, 40, 40) for s in (0.2, 0.8, 0.4)] == [8, 32, 16]


@pytest.mark.parametrize("dec, sc", [(0.2, 0.5), (0.0, 0.5), (1.0, 0.5), (0.5, 0.0), (0.3, 1.0)])
def test_slices_by_role_change_nothing(dec, sc):
    """Passes and heads on reserved slices give the loss and gradients of passes over all rows."""
    model = small(decoder_prob=dec, self_cond_prob=sc, label_drop_prob=0.3, max_input_length=4).double()
    cond, rows = torch.arange(12) % 4, common.Rows(0, 5, 0, 12, 12)
    batch = dict(tokens=torch.randint(0, 11, (12, 8)), cond_len=cond, rows=rows)
    noise = dict(eps=torch.randn(12, 8, 12).double(), p=torch.rand(12, 8).double())
    role = rows.roles((dec, (1 - dec) * (1 - sc), (1 - dec) * sc))
    out = []
    for coins in (None, dict(decode=role == 0, sc=role == 2)):
        loss, _ = model.loss(batch, noise=noise, coins=coins)
        loss.backward()
        out.append(torch.cat([loss.detach()[None]] + [p.grad.flatten() for p in model.parameters()
                                                      if p.grad is not None]))
        if dec == 1:        # decode rows too go through the projection of [z; 0]
            assert model.self_cond_proj.bias.grad.abs().sum() > 0
        model.zero_grad()
    assert err(out[0], out[1]) < 1e-12


# --- golden: samplers, optimisers, distillation ----------------------------------------------------


@torch.no_grad()
def test_single_steps():
    model, xp = model_of(), G["samp_xprev"]
    for name, t, s, churn in (("ode_step", 0.31, 0.44, 0.0), ("sde_step", 0.31, 0.44, 1.5),
                              ("sde_step_clip", 0.2, 0.95, 2.0)):
        t, s = torch.tensor([t, s])
        z = G["samp_z"]
        if churn:
            z, t = elf.renoise(z, t, s, churn, META["denoiser_noise_scale"], G["sde_eps"])
        x_hat = model.estimate(z, xp, t, 3.0)
        assert err(x_hat, G[f"{name}_x"]) < 1e-5
        assert err(z + (s - t) * elf.velocity(x_hat, z, t, EPS), G[f"{name}_z"]) < 1e-5


TRAJ = {"ode_traj": ("ode", 0.0, 1.0, 1.0), "sde_traj": ("sde", 1.5, 3.0, 1.0),      # sampler, churn, w, c
        "cfg_traj": ("ode", 0.0, 1.0, 2.0), "cfgsde_traj": ("sde", 1.0, 2.0, 1.7)}


@pytest.mark.parametrize("name", TRAJ)
@torch.no_grad()
def test_trajectories(name):
    sampler, churn, w, c = TRAJ[name]
    model, held = model_of(), {}
    normals, mean, std = G["grid_normals"], META["denoiser_p_mean"], META["denoiser_p_std"]
    grid = elf.time_grid(len(normals) + 1, "logit_normal", mean, std, normals)
    assert err(grid, G["grid"]) < 1e-6
    if name.startswith("cfg"):
        held = dict(x_known=G["cond_seq"], known=G["trainB/batch_cond_seq_mask"][..., None] > 0)
    path = model.trajectory(G["samp_z"], grid, sampler, churn, w, c, eps=G.get(f"{name}/eps"), **held)
    for i, (z, x_hat) in enumerate(path):
        assert err(z, G[f"{name}/z"][i]) < 1e-4 and err(x_hat, G[f"{name}/x"][i]) < 1e-4, i
    if f"jax/{name}/z_final" in G:
        assert err(z, G[f"jax/{name}/z_final"]) < 1e-4
    ids = model.decode(z, w)
    assert torch.equal(ids, G[f"{name}/ids"])
    assert torch.equal(elf.cut(ids, eos=1, pad=0), G[f"{name}/ids_masked"])
    one = torch.ones(len(z))
    h = model.net(z, torch.zeros_like(z), one, w * one, one)
    assert err(logits_of(model, h), G[f"{name}/logits"]) < 5e-4
    if f"{name}/ids_shifted" in G:
        width = M["max_length"] - META["max_input_length"]
        at = held["known"].sum((1, 2))[:, None] + torch.arange(width)
        shifted = F.pad(ids, (0, width)).gather(1, at)
        assert torch.equal(shifted, G[f"{name}/ids_shifted"])
        assert torch.equal(elf.cut(shifted, eos=1, pad=0), G[f"{name}/ids_final"])


@torch.no_grad()
def test_guidance_by_two_passes_without_scale_tokens():
    model, t = model_of(num_self_cond_cfg_tokens=0), torch.tensor(0.31)
    for w in sorted({float(k.split("_")[1]) for k in G if k.startswith("scinf_")}):
        x_hat = model.estimate(G["samp_z"], G["samp_xprev"], t, w)
        assert err(x_hat, G[f"scinf_{w}_x"]) < 1e-5
        assert err(elf.velocity(x_hat, G["samp_z"], t, EPS), G[f"scinf_{w}_v"]) < 1e-5


@torch.no_grad()
def test_both_guidances_without_scale_tokens():
    """Four passes: with and without the estimate, with and without the condition; the null half keeps x."""
    model, z, half = small(num_self_cond_cfg_tokens=0), torch.randn(2, 8, 12), torch.randn(2, 8, 12)
    known = (torch.arange(8) < 3)[None, :, None].expand(2, 8, 1)
    t, zero = torch.full((2,), 0.4), torch.zeros(2)

    def x_hat(z, half, null):
        x, x_u = (model.final_layer(model.net(z, y, t, zero, zero)) for y in (half, null))
        return x_u + 2.5 * (x - x_u)
    free = [y.masked_fill(known, 0) for y in (z, half)]
    x, x_u = x_hat(z, half, half.masked_fill(~known, 0)), x_hat(*free, torch.zeros_like(half))
    assert err(model.estimate(z, half, torch.tensor(0.4), 2.5, 1.7, known), x_u + 1.7 * (x - x_u)) < 1e-5


def optimisers(params):
    matrices = [p for p in params.values() if p.dim() == 2]
    rest = [p for p in params.values() if p.dim() != 2]
    flax = [params[k] for k in ("flax", "flax_tall")]
    return common.Muon(matrices, bias_correction=True, transposed=flax), elf.NesterovAdam(rest)


def test_optimiser_steps():
    params = {k: torch.nn.Parameter(v.clone()) for k, v in weights("opt/w0/").items()}
    opts, ema = optimisers(params), {k: p.detach().clone() for k, p in params.items()}
    for i in range(5):
        for k, g in weights(f"opt/g{i}/").items():
            params[k].grad = g.clone()
        for o in opts:
            o.param_groups[0]["lr"] = G["opt/lr"][i].item()
            o.step()
        for k, p in params.items():
            assert err(p.detach(), G[f"opt/w{i + 1}/{k}"]) < 1e-6, (i, k)
            ema[k].lerp_(p.detach(), 0.1)
    assert all(err(v, G[f"opt/ema5/{k}"]) < 1e-6 for k, v in ema.items())


def test_skipped_update_leaves_everything_untouched():
    """found_inf = 1 with gradients of nan, at the first step and later: weights and state keep their bits."""
    params, clean = ({k: torch.nn.Parameter(v.clone()) for k, v in weights("opt/w0/").items()}
                     for _ in range(2))
    opts, ref = optimisers(params), optimisers(clean)
    for i, bad in enumerate((True, False, True, False)):
        for k, g in weights(f"opt/g{i}/").items():
            params[k].grad = g * math.nan if bad else g.clone()
            clean[k].grad = g.clone()
        for o, r in zip(opts, ref):
            o.found_inf = torch.tensor(float(bad))
            o.step()
            if not bad:
                r.step()
        assert all(torch.equal(params[k], clean[k]) for k in params)
    for o, r, k in zip(opts, ref, ("flax", "tok")):
        assert all(torch.equal(a, b) for a, b in zip(o.state[params[k]].values(), r.state[clean[k]].values()))


@pytest.mark.parametrize("tag", ["pd", "pd1"])
def test_distillation_step(tag):
    d = weights(tag + "/")
    D, K = META[tag]["step"], META[tag]["K"]
    batch, *_ = inputs("trainA")
    B, L = batch["tokens"].shape
    model = model_of(student_steps=1 / D, teacher_steps=K)
    model.attach_teacher(model_of(scale=0.8, shift=0.02), fresh=False)
    coin = d["in_coin"] > 0
    u = d["in_sub_uniform"] if "in_sub_uniform" in d else times(d["in_sub_normals"])
    t = times(d["in_t_normals"]) * max(1 - D, 1e-6)
    noise = dict(p=token_times(d["in_lambda_normals"]).view(B, L), w=scales(d["in_w_uniform"]),
                 u=u.view(B, K - 1), eps=torch.where(coin[:, None, None], d["in_dec_noise"], d["in_noise"]))
    coins = dict(decode=coin, sc=d["in_sc_coin"] > 0)
    loss, metrics = model.loss(batch, t=t, noise=noise, coins=coins)
    assert err(loss.detach(), d["loss"]) < 1e-5
    assert err(metrics["l2"], d["l2_loss"]) < 1e-5 and err(metrics["ce"], d["ce_loss"]) < 1e-5
    s = model.corrupt(batch, t, noise, coins)
    with torch.no_grad():
        half = model._teacher[0].first_estimate(s)[1]
        target = model.distill_target(s, half, noise["u"][s.order])
        x_hat = model.final_layer(model.net(s.z, half, s.t, s.w, torch.zeros_like(s.t)))
    den = ~s.decode
    assert err(target[den], d["target"][s.order][den]) < 1e-5
    for key, value in (("z_t_s", s.z[den]), ("sc_half", half[den]), ("main_x", x_hat[den])):
        if key in d:
            assert err(value, d[key][s.order][den]) < 2e-5, key
    check_grads(model, loss, tag)


def test_distillation_keeps_the_condition_in_every_half():
    """Here the half of decode rows holds the condition too; in `loss` it is empty (official code)."""
    model, seen = small(student_steps=4, teacher_steps=2, max_input_length=4), []
    net = model.net
    model.net = lambda z, half, t, w, gate: seen.append((half, gate > 0)) or net(z, half, t, w, gate)
    cond_len, coins = torch.tensor([3, 2, 1, 4]), dict(decode=torch.arange(4) < 2, sc=torch.arange(4) == 3)
    batch = dict(tokens=torch.randint(0, 11, (4, 8)), cond_len=cond_len)
    x = model.encode(batch["tokens"], None, None)
    cond = torch.arange(8) < cond_len[:, None]
    model.loss(batch, coins=coins)
    half, decode = seen[-1]
    assert decode.tolist() == [True, True, False, False] and (half[:2] == 0).all()
    assert torch.equal(half[2:][cond[2:]], x[2:][cond[2:]])
    model.attach_teacher(small(), fresh=True)
    model.loss(batch, coins=coins)
    half = seen[-1][0]
    assert torch.equal(half[cond], x[cond]) and (half[:2][~cond[:2]] == 0).all()


# --- properties (section 10 of the specification) --------------------------------------------------


@torch.no_grad()
def test_mode_switch_and_heads_are_separate():
    model, z = small(), torch.randn(2, 8, 12)
    t, w, one = torch.rand(2), torch.ones(2), torch.ones(2)
    off, on = model.net(z, z, t, w, 0 * one), model.net(z, z, t, w, one)
    assert torch.equal(off, model.net(z, z, t, w, torch.zeros(2, dtype=torch.bool)))
    assert not torch.allclose(off, on)
    logits, x_hat = logits_of(model, on), model.final_layer(on)
    model.final_layer.linear.weight.zero_()
    assert torch.equal(logits, logits_of(model, on))
    bare = small(num_model_mode_tokens=0)       # time 1 is the only mark of decode mode then
    assert torch.equal(bare.net(z, z, t, w, 0 * one), bare.net(z, z, t, w, one))
    assert not any("mode" in name for name in bare.state_dict())
    model.proj_kernel.zero_()
    assert not torch.equal(x_hat, model.final_layer(on)) and torch.equal(on, model.net(z, z, t, w, one))


@torch.no_grad()
def test_losses_at_the_start():
    """x_hat = 0, so L2 is E[1 / (1 - t)^2] = 1.79 for unit-variance latents, and CE is close to ln V."""
    model = elf.ELF(elf.Config(vocab=300, length=16, d_model=64, n_layer=2, n_head=2, text_encoder_dim=32))
    B = 256
    batch = dict(tokens=torch.randint(0, 300, (B, 16)))
    t = elf.logit_normal(torch.randn(B), -1.5, 0.8)
    no = torch.zeros(B, dtype=torch.bool)
    _, m = model.loss(batch, t=t, coins=dict(decode=no, sc=~no))
    assert abs(m["l2"] - (1 - t).pow(-2).mean()) < 1e-3
    _, m = model.loss(batch)
    assert abs(m["l2"] - 1.79) < 0.1 and -0.05 < m["ce"] - math.log(300) < 0.2


def test_blocks_compile_without_graph_breaks():
    """fullgraph=True, training and sampling: the loss of the plain module; bf16 autocast comes close."""
    plain, fast = small(), small()
    batch = dict(tokens=torch.randint(0, 11, (10, 8)), rows=common.Rows(0, 1, 0, 10, 10))
    fast.load_state_dict(plain.state_dict())
    for block in fast.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="eager")
    losses = []
    for model in (plain, fast, plain):
        torch.manual_seed(3)
        loss, _ = model.loss(batch)
        loss.backward()
        losses.append(loss.item())
        plain.amp = True
    assert losses[0] == losses[1] and 0 < abs(losses[2] / losses[0] - 1) < 0.03
    assert fast.sample(2, 8, 2).shape == (2, 8)


def oracle(model, f):
    """Replace the network by x_hat = f(z, t)."""
    model.estimate = lambda z, half, t, w, c=1.0, known=None: f(z, t)
    return model


def test_oracle_sampling_and_the_last_step():
    model, x = oracle(small(), lambda z, t: x), torch.randn(2, 8, 12)
    z0 = 2 * torch.randn(2, 8, 12)
    grid = torch.tensor([0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
    for i, (z, x_hat) in enumerate(model.trajectory(z0, grid, "ode", 0.0, 1.0)):
        assert err(z, x + (1 - grid[i + 1]) * (z0 - x)) < 1e-6
    for form in (False, True):
        for z, x_hat in model.trajectory(z0, grid, "sde", 1.5, 1.0, paper_form=form):
            pass
        assert err(z, x) < 1e-6
    model = oracle(small(), lambda z, t: torch.tanh(z) + t)      # any network: z ends at the last x_hat
    for z, x_hat in model.trajectory(z0, grid, "ode", 0.0, 1.0):
        pass
    assert err(z, x_hat) < 1e-6


@torch.no_grad()
def test_sde_step_limits():
    model, z0, grid = small(), 2 * torch.randn(2, 8, 12), torch.tensor([0.0, 0.2, 0.5, 1.0])
    ends = [list(model.trajectory(z0, grid, s, 0.0, 2.0))[-1][0] for s in ("ode", "sde")]
    assert torch.equal(*ends)                                           # churn 0 is the ODE step
    eps = torch.randn(2, 8, 12)
    z, t = elf.renoise(z0, grid[1], grid[2], 4.0, 2.0, eps)             # churn * h >= 1
    assert torch.equal(z, 2 * eps) and t == 0
    eps = torch.stack([eps, eps])
    code, paper = (list(model.trajectory(z0, grid, "sde", 1.0, 2.0, eps=eps, paper_form=f))[-1][0]
                   for f in (False, True))
    assert not torch.allclose(code, paper)


def test_gaussian_data_first_order_convergence():
    """E[x | z] of N(m, s^2) is known and so is the ODE map m + (s / sigma) z: Euler errors as specified."""
    m, s, sigma = 0.7, 0.5, 2.0
    z0 = torch.linspace(-4, 4, 41, dtype=torch.float64)
    for steps, want in ((8, 0.0607), (32, 0.0164), (128, 0.0042), (512, 0.0011)):
        z, grid = z0, torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        for t, u in zip(grid[:-1], grid[1:]):
            k = t * s ** 2 / (t ** 2 * s ** 2 + (1 - t) ** 2 * sigma ** 2)
            z = z + (u - t) * elf.velocity(m + k * (z - t * m), z, t, 1e-9)
        error = ((z - m - s / sigma * z0).abs().max() / z0.abs().max()).item()
        assert abs(error - want) < 0.06 * want + 5e-5, (steps, error)


def test_guidance_fixed_point():
    """Regression on x* = x + (1 - 1/w)(x_c - x_u), x_c the prediction itself, ends at w x + (1 - w) x_u."""
    for w in (0.7, 1.0, 3.0):
        x, x_u, y = 0.3, -1.1, 0.0
        for _ in range(4000):
            y += 0.01 * (x + (1 - 1 / w) * (y - x_u) - y)
        assert abs(y - (w * x + (1 - w) * x_u)) < 1e-4


@torch.no_grad()
def test_conditional_invariances():
    """Condition latents ignore the target, a dropped row's latents and loss the source, all the pads."""
    model = model_of(pad_in_loss=True)
    batch, t, noise, coins, _ = inputs("trainB")
    tokens, L = batch["tokens"], batch["tokens"].shape[1]
    cond = torch.arange(L) < batch["cond_len"][:, None]
    other = torch.where(cond, tokens, (tokens + 5) % M["vocab_size"])
    a, b = (model.encode(x, batch["mask"], cond)[cond] for x in (tokens, other))
    assert torch.equal(a, b)
    source = torch.where(cond, (tokens + 5) % M["vocab_size"], tokens)
    drop = torch.ones(len(tokens), dtype=torch.bool)
    a, b = (model.encode(x, batch["mask"], cond, drop)[~cond] for x in (tokens, source))
    assert torch.equal(a, b)

    def loss(tokens, drop):
        return model.loss(dict(batch, tokens=tokens), t=t, noise=noise, coins=dict(coins, drop=drop))[0]
    assert loss(tokens, drop) == loss(source, drop) and loss(tokens, ~drop) != loss(source, ~drop)
    batch = inputs("trainA")[0]
    padded = torch.where(batch["mask"], batch["tokens"], 3)
    none = torch.zeros_like(batch["mask"])
    a, b = (model.encode(x, batch["mask"], none)[batch["mask"]] for x in (batch["tokens"], padded))
    assert torch.equal(a, b)


def test_masked_positions_of_a_decode_row():
    """With the latents held fixed, ids at uncounted positions do not touch the cross-entropy (10.20)."""
    model = small()
    B, L = 4, 8
    tokens, mask = torch.randint(0, 11, (B, L)), torch.arange(L).expand(B, L) < 5
    x, yes = torch.randn(B, L, 12), torch.ones(B, dtype=torch.bool)
    model.encode = lambda *a: x
    noise, t = dict(eps=torch.randn(B, L, 12), p=torch.rand(B, L), w=torch.ones(B)), torch.rand(B)

    def loss(tokens):
        batch, coins = dict(tokens=tokens, mask=mask), dict(decode=yes, sc=~yes)
        return model.loss(batch, t=t, noise=noise, coins=coins)[0]
    a = loss(tokens)
    assert a == loss(torch.where(mask, tokens, 0))
    x = torch.where(mask[..., None], x, 0)      # but the input at those positions is seen: no attention mask
    assert a != loss(tokens)


@torch.no_grad()
def test_rotary_positions():
    """Scores between text positions depend on the distance only; control tokens are not rotated (10.14)."""
    model = small(length=16)
    P, q, k = model.n_control, torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    q, k = (elf.rotate_pairs(y.expand(1, 1, P + 16, 8), model.cos, model.sin)[0, 0] for y in (q, k))
    score = q @ k.T
    text = score[P:, P:]
    assert torch.allclose(text[3, 1], text[12, 10], atol=1e-5) and not torch.allclose(text[3, 1], text[3, 2])
    assert (score[:P, :P] - score[0, 0]).abs().max() < 1e-6
    assert not torch.allclose(score[0, P + 3], score[0, P + 4])


def test_laws_of_the_draws():
    u = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000
    w = elf.guidance_scale(u, 0.5, 5.0)
    assert 0.5 <= w.min() and w.max() <= 5 and abs(w.median() - 2) < 1e-3
    assert abs((w < 1).double().mean() - math.log(4 / 3) / math.log(4)) < 1e-4
    t = elf.logit_normal(torch.special.ndtri(u), -1.5, 0.8)
    assert abs(t.median() - torch.sigmoid(torch.tensor(-1.5))) < 1e-4
    assert abs((1 - t).pow(-2).mean() - 1.79) < 0.01
    for steps, last in ((8, 0.40), (16, 0.47), (32, 0.53), (64, 0.59)):
        grids = torch.stack([elf.time_grid(steps, "logit_normal", -1.5, 0.8) for _ in range(400)])
        assert grids.shape[1] == steps + 1 and (grids.diff() >= 0).all()
        assert (grids[:, 0] == 0).all() and (grids[:, -1] == 1).all()
        assert abs(grids[:, -2].mean() - last) < 0.03


def test_newton_schulz_and_transposed_storage():
    s = torch.logspace(-2.5, 0, 16)
    s = s / s.norm()
    assert 0.002 < s.min() < 0.0025                     # of the Frobenius norm: the range of property 10.17
    q, _ = torch.linalg.qr(torch.randn(16, 16))
    for cols in (16, 40):                               # plain and Gram form
        r, _ = torch.linalg.qr(torch.randn(cols, 16))
        out = torch.linalg.svdvals(common.newton_schulz((q * s @ r.T)[None])[0])
        assert 0.68 < out.min() and out.max() < 1.21
    a = torch.nn.Parameter(torch.randn(9, 5))
    b = torch.nn.Parameter(a.detach().T.clone())
    opts = common.Muon([a], lr=0.1), common.Muon([b], lr=0.1, transposed=[b])
    for g in (torch.randn(9, 5), torch.zeros(9, 5)):    # the second moves by momentum alone, at full size
        before = a.detach().clone()
        a.grad, b.grad = g, g.T.clone()
        for o in opts:
            o.step()
        assert err(a.detach(), b.detach().T) < 1e-6 and (a - before).norm() > 0.1 * 0.7 * math.sqrt(9 / 5 * 5)


@torch.no_grad()
def test_distillation_targets():
    """An oracle teacher is given back for any N and K; one teacher step gives its x_hat."""
    torch.manual_seed(2)
    batch = dict(tokens=torch.randint(0, 11, (6, 8)))
    x_of = lambda model, s, half: model.final_layer(model.net(s.z, half, s.t, s.w, torch.zeros_like(s.t)))
    for steps, K in ((4, 5), (2, 1), (500, 3), (2000, 3)):
        model, teacher = small(student_steps=steps, teacher_steps=K), small()
        teacher.self_cond_proj.weight[:, 12:] = 0       # x_hat does not feed on the x_hat before it
        model.attach_teacher(teacher, fresh=True)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), teacher.parameters()))
        coins = dict(decode=torch.zeros(6, dtype=torch.bool), sc=torch.arange(6) < 3)
        s = model.corrupt(batch, coins=coins, span=1 / steps)
        half = teacher.first_estimate(s)[1]
        target = model.distill_target(s, half)
        for p in model.parameters():
            p.mul_(0.5)
        model.final_layer.linear.weight.zero_()
        if K == 1 or steps >= 500:
            assert err(target, x_of(teacher, s, half)) < (1e-6 if K == 1 else 0.02)
        teacher.final_layer = torch.nn.Identity()
        teacher.net = lambda *a: s.x
        assert err(model.distill_target(s, half), s.x) < 2e-4


# --- configurations, checkpoints, bad input --------------------------------------------------------


@pytest.mark.parametrize("preset, count", [("owt-b", 104_579_940), ("owt-m", 342_540_036),
                                           ("owt-l", 652_103_332)])
def test_parameter_counts(preset, count):
    with torch.device("meta"):
        model = elf.ELF(elf.Config(**elf.PRESETS[preset]))
    model._t5 = elf.T5Encoder({})           # `param_groups` asks for it
    assert sum(p.numel() for p in model.parameters()) == count
    if preset == "owt-b":
        matrices, rest = model.param_groups()
        assert len(matrices["params"]) == 58 and sum(p.numel() for p in matrices["params"]) == 104_417_280
        assert len(rest["params"]) == 109


def test_presets_are_configurations():
    for name, keys in elf.PRESETS.items():
        cfg = elf.Config(**keys)
        assert all(type(getattr(cfg, k)) is type(v) or getattr(cfg, k) is None for k, v in keys.items()), name
    assert {elf.PRESETS[f"distill-{n}"]["student_steps"] for n in (1, 2, 4, 8, 16)} == {1, 2, 4, 8, 16}


def test_published_checkpoint_loads_by_name():
    raw = dict(params={}, ema_params1={"_orig_mod." + k: v for k, v in weights("w/").items()}, step=3)
    model = elf.ELF(config())
    model.load_state_dict(elf.ELF.published(raw))
    assert torch.equal(model.unembed_kernel, G["w/unembed_kernel"])


def test_gauss_table():
    E = elf.gauss_table(50, 64, seed=3)
    assert E.mean(1).abs().max() < 1e-6 and (E.square().mean(1) - 1).abs().max() < 1e-5
    assert torch.equal(E, elf.gauss_table(50, 64, 3)) and not torch.equal(E, elf.gauss_table(50, 64, 4))
    model = small(encoder="t5-random", text_encoder_dim=64)
    no = torch.zeros(4, 8, dtype=torch.bool)
    x = model.encode(torch.randint(0, 11, (4, 8)), ~no, no)
    assert 0.5 < x.std() < 2 and "shared.weight" not in model.state_dict()


def test_bad_input(tmp_path):
    def message(**keys):
        with pytest.raises(data.UserError) as e:
            model = small(**keys)
            no = torch.zeros(1, 8, dtype=torch.bool)
            model.encode(no.long(), ~no, no)
        assert "\n" not in str(e.value)
        return str(e.value)
    assert "--t5=FILE" in message(encoder="t5")
    with pytest.raises(data.UserError, match="--t5=FILE"):      # before a run folder is made
        small(encoder="t5").param_groups()
    assert "nowhere.bin" in message(encoder="t5", t5=str(tmp_path / "nowhere.bin"))
    path, t5 = str(tmp_path / "t5.bin"), weights("t5/")
    torch.save(t5, path)
    rows, C = t5["shared.weight"].shape
    assert f"{C} wide" in message(encoder="t5", t5=path, text_encoder_dim=C + 2)
    assert f"vocab={rows + 1}" in message(encoder="t5", t5=path, vocab=rows + 1, text_encoder_dim=C)
    for part in ("final_layer_norm", "shared", "relative_attention_bias", "wi.weight"):     # v1.1 has no wi
        torch.save({k: v for k, v in t5.items() if part not in k}, path)
        text = message(encoder="t5", t5=path)
        assert part in text and path in text
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json")
    assert "broken.safetensors" in message(encoder="t5", t5=str(tmp_path / "broken.safetensors"))
    assert "n_head" in message(n_head=3) and "dropout" in message(dropout=0.1)
    assert "num_time_tokens" in message(num_time_tokens=0) and "cfg_min" in message(self_cond_cfg_min=0.0)
    with pytest.raises(data.UserError, match="max_input_length"):
        small().loss(dict(tokens=torch.zeros(2, 8, dtype=torch.int64), cond_len=torch.ones(2)))
    assert "encoder=bert" in message(encoder="bert")
    for keys in (dict(sampler="heun"), dict(grid="cosine")):
        with pytest.raises(data.UserError):
            small().sample(1, 8, 2, **keys)
    with pytest.raises(data.UserError, match="length"):
        small().sample(1, 9, 2)


@torch.no_grad()
def test_sampling_interface():
    """Shapes, the watch callback, text kept in place, answers cut at the end of sequence."""
    model, seen = small(eos=1, pad=0), []
    known, mask = torch.full((3, 8), 7), torch.arange(8).expand(3, 8) % 3 == 0
    ids = model.sample(3, 8, 4, known, mask, watch=lambda i, x: seen.append((i, x.shape)), sampler="ode")
    assert ids.shape == (3, 8) and (ids[mask] == 7).all() and seen == [(i, (3, 8)) for i in (1, 2, 3, 4)]
    assert model.sample(2, 5, 1).shape == (2, 5)
    ids = torch.tensor([[5, 1, 6, 1, 7], [1, 2, 3, 4, 5]])
    assert elf.cut(ids, 1, 0).tolist() == [[5, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert elf.cut(ids, 1, 0, keep=torch.arange(5) < 2).tolist() == [[5, 1, 6, 0, 0], [1, 2, 3, 4, 5]]
    model = small(max_input_length=4)
    x = model.encode(known, mask, mask)
    z, grid = torch.randn(3, 8, 12), torch.linspace(0, 1, 4)
    for z, x_hat in model.trajectory(z, grid, "sde", 1.5, 1.0, 2.0, x, mask[..., None]):
        assert torch.equal(z[mask], x[mask]) and torch.equal(x_hat[mask], x[mask])


def test_command_line_conditional_and_distilled(tmp_path, capsys, monkeypatch):
    """Train on pairs, sample answers, evaluate them; then a student, and a student that starts from it."""
    def run(*argv):
        common.main(elf.ELF, elf.Config, elf.PRESETS, list(argv))
        return capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    size = "--d_model=16 --n_layer=1 --n_head=2 --text_encoder_dim=16 --batch=10 --val_every=0".split()
    out = run("--preset=reverse", "--steps=3", "--out=a", *size)
    assert "val_l2" in out and "val_ce" in out
    assert "exact" in run("eval", "--out=a", "--n=4", "--steps=2", "--rows=20", "--c=1")
    assert "sample 1" in run("sample", "--out=a", "--n=2", "--steps=2", "--sampler=sde", "--churn=1")
    student = ["--preset=reverse", "--stage=distill", "--teacher=a/ckpt.pt", "--steps=2", "--warmup=0", *size]
    run(*student, "--student_steps=8", "--out=b")
    run(*student, "--student_steps=4", "--init=b/ckpt.pt", "--out=c")
    assert "sample 1" in run("sample", "--out=c", "--n=1", "--steps=4")
    weights = [torch.load(f"{x}/ckpt.pt", weights_only=True)["model"]["unembed_kernel"] for x in "abc"]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_learning_on_a_source_of_four_letters():
    """Each letter is followed by itself + 1 (0.7) or + 2 (0.3): in seconds the losses fall, samples obey.

    ELF has no bound to hold against the entropy; the share of allowed pairs is the check (chance: 0.5).
    """
    cfg = elf.Config(vocab=4, length=4, d_model=32, n_layer=2, n_head=2, text_encoder_dim=32,
                     bottleneck_dim=16, num_time_tokens=2, num_self_cond_cfg_tokens=2,
                     num_model_mode_tokens=2, decoder_noise_scale=2.0)
    model, losses = elf.ELF(cfg), []
    optimisers = [g.pop("optimizer")(**g) for g in model.param_groups()]
    params, ema = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    for step in range(280):
        start, jumps = torch.randint(0, 4, (64, 1)), 1 + (torch.rand(64, 3) < 0.3).long()
        loss, m = model.loss(dict(tokens=torch.cat([start, start + jumps.cumsum(1)], dim=1) % 4))
        loss.backward()
        for o in optimisers:
            o.param_groups[0]["lr"] = 0.02 * min(1, step / 30)
            o.step()
            o.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 0.02)
        losses.append(torch.stack([m["l2"], m["ce"]]))
    first, last = torch.stack(losses[:10]).mean(0), torch.stack(losses[-30:]).mean(0)
    assert last[0] < 0.65 * first[0] and last[1] < 0.25 * first[1]
    with torch.no_grad():
        torch._foreach_copy_(params, ema)
    jumps = torch.cat([model.sample(128, 4, 16, sampler="sde", w=1.0) for _ in range(4)]).diff(dim=1) % 4
    one, two = (jumps == 1).float().mean(), (jumps == 2).float().mean()
    assert one + two > 0.75 and one > two > 0.1


# --- lean step against the plain step, as a command ------------------------------------------------


def measure(form, vocab, repeats=2):
    """Process seconds of a step (the best) and peak MiB above the model, of one form, in its own process."""
    cfg = elf.Config(vocab=vocab, length=128, d_model=256, n_layer=6, n_head=4, text_encoder_dim=128,
                     bottleneck_dim=64, batch=32, max_input_length=1)
    torch.manual_seed(0)
    model, B, L = elf.ELF(cfg), cfg.batch, cfg.length
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rows = common.Rows(0, 0, 0, B, B)
    role = rows.roles((0.2, 0.4, 0.4))
    coins = dict(decode=role == 0, sc=role == 2, drop=torch.zeros(B, dtype=torch.bool))
    noise = dict(eps=torch.randn(B, L, 128), p=torch.rand(B, L), w=scales(torch.rand(B)))
    t = times(torch.randn(B))
    batch = dict(tokens=torch.randint(0, vocab, (B, L)), mask=torch.ones(B, L, dtype=torch.bool),
                 cond_len=torch.zeros(B, dtype=torch.int64), rows=rows)
    base, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(repeats):
        model.zero_grad(set_to_none=False)
        start = time.process_time()
        if form == "lean":
            loss, _ = model.loss(batch, t=t, noise=noise)
        else:
            loss = three_pass_loss(model, batch, t, noise, coins)
        loss.backward()
        seconds.append(time.process_time() - start)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    grad = sum(p.grad.abs().sum().item() for p in model.parameters())
    return dict(seconds=min(seconds), mib=peak, loss=loss.item(), grad=grad)


def lean_against_plain(vocab, alternations=5):
    """Child processes in alternation; prints medians, returns them with the ratios of time and memory."""
    runs = {"lean": [], "plain": []}
    for _ in range(alternations):
        for form in runs:
            command = [sys.executable, __file__, "measure", form, str(vocab)]
            child = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[form].append(json.loads(child.stdout))
    best = {f: {k: float(np.median([r[k] for r in rs])) for k in rs[0]} for f, rs in runs.items()}
    for f, r in best.items():
        print(f"{f:6s}{r['seconds']:7.2f} s/step   peak {r['mib']:.0f} MiB   loss {r['loss']:.6f}   "
              f"sum of |gradients| {r['grad']:.4f}")
    ratios = best["plain"]["seconds"] / best["lean"]["seconds"], best["lean"]["mib"] / best["plain"]["mib"]
    print(f"V={vocab}: the lean step is {ratios[0]:.2f}x faster with {ratios[1]:.2f} of the memory")
    return best, ratios


@pytest.mark.slow
def test_lean_step_is_faster_and_smaller():
    best, (speed, memory) = lean_against_plain(32100)
    assert abs(best["lean"]["loss"] / best["plain"]["loss"] - 1) < 1e-5
    assert speed > 1.4 and memory < 0.5


def table(folder, n=64, seeds=3):
    """Judge nll / entropy (nats) of samples of the run in `folder`, over several time grids."""
    world = common.World()
    model, cfg, corpus, *_ = common.load_run(elf.ELF, elf.Config, world, folder)
    judge, held = corpus.judge(), corpus.rows("val", np.arange(n))["tokens"]
    print(f"held-out text {judge.token_nll(held).mean():.2f}/{data.entropy(held):.2f}, judge nll / entropy in nats")
    for sampler, w in (("ode", 1.0), ("ode", 3.0), ("sde", 1.0), ("sde", 3.0)):
        cells = []
        for steps in (8, 16, 32, 64):
            churn = {8: 2.0, 16: 2.0, 32: 1.5, 64: 1.0}[steps]         # as published
            how = dict(sampler=sampler, w=w, churn=churn)
            ids = [common.draw(model, corpus, n, steps, s, 32, **how) for s in range(seeds)]
            nll, entropy = (np.mean([f(x) for x in ids]) for f in (judge.token_nll, data.entropy))
            cells.append(f"{steps:2d} steps {nll:.2f}/{entropy:.2f}")
        print(f"{sampler} w={w:.0f}  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "measure":
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    elif sys.argv[1] == "lean":
        lean_against_plain(int(sys.argv[2]))
    elif sys.argv[1] == "table":
        table(sys.argv[2])
