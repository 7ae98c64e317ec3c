"""RePlaid: golden arrays (official Plaid code, and its loss and samplers around the DDiT backbone), the identities its theory
rests on, and one run that must learn. `plaid*` arrays need Plaid's own transformer, which is written here."""
import math
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import replaid
from conftest import golden
from replaid import Config, RePlaid

G = {k: v.squeeze() if v.numel() == 1 else v for k, v in golden("replaid").items()}
TIGHT = dict(rtol=1e-9, atol=1e-11)


def part(prefix):
    return {k[len(prefix):]: v for k, v in G.items() if k.startswith(prefix)}


def build(**keys):
    """A small model in float64 with every weight random (nothing at its zero initialisation)."""
    model = RePlaid(Config(**{**dict(vocab=11, length=6, d_model=16, n_layer=2, n_head=2, cond_dim=8, d_embed=4, batch=8,
                                     schedule_width=32, bias_ramp=0), **keys}))
    for name, p in model.model.named_parameters():
        nn.init.normal_(p, std=0.3)
    return exact(model)


def exact(model):
    """float64 throughout, rotary tables included (as buffers they hold float32 angles)."""
    model.double()
    if isinstance(model.model, common.DiT):
        d = model.model.cos.shape[1]
        angle = torch.arange(len(model.model.cos)).double()[:, None] * 10000.0 ** (-torch.arange(d).double() / d)
        model.model.cos, model.model.sin = angle.cos(), angle.sin()
    return model


class PlaidDenoiser(nn.Module):
    """Plaid's transformer: RMSNorm, fixed residual scale 1/sqrt(n), gamma features added once, muP readout multiplier."""

    def __init__(self, weights, n_head=2, width_base=256):
        super().__init__()
        self.n_head, self.segments, self.w = n_head, {}, nn.ParameterDict()
        for k, v in weights.items():
            if not k.startswith("output_linear"):
                self.w[k.replace(".", "/")] = nn.Parameter(v.clone())
        self.output_layer = nn.Module()                     # where replaid.py looks for the vocabulary head
        V, D = weights["output_linear.weight"].shape
        self.output_layer.linear, self.mult = nn.Linear(D, V), width_base / D
        self.output_layer.linear.load_state_dict({k: weights[f"output_linear.{k}"] for k in ("weight", "bias")})

    def grads(self):
        out = {k.replace("/", "."): p.grad for k, p in self.w.items()}
        return out | {f"output_linear.{k}": p.grad for k, p in self.output_layer.linear.named_parameters()}

    def readout(self, h):
        return F.layer_norm(h, h.shape[-1:], self.w["output_norm/weight"], None, 1e-5) * self.mult

    def forward(self, z, gamma, x_sc):
        B, L, De = z.shape
        w, n = self.w, 1 + max(int(k.split("/")[1]) for k in self.w if k.startswith("blocks"))
        std = (torch.sigmoid(-gamma) / De + torch.sigmoid(gamma)).sqrt().to(z.dtype)
        K = w["gamma_linear/weight"].shape[1] // 2
        angle = gamma.double()[:, None] * torch.linspace(-5, 5, K, dtype=torch.float64).exp()
        f = torch.cat([angle.sin(), angle.cos()], -1).to(z.dtype)
        h = F.linear(z / std[:, None, None], w["input_linear/weight"]) + F.linear(De ** 0.5 * x_sc, w["selfcond_linear/weight"])
        h = h + F.linear(f, w["gamma_linear/weight"])[:, None]
        D = h.shape[-1]
        d = D // self.n_head
        angle = torch.arange(L).double()[:, None] * 10000.0 ** (-torch.arange(0, d, 2).double() / d)
        seg = self.segments.get(B)
        mask = None if seg is None else (seg[:, :, None] == seg[:, None, :])[:, None]
        for i in range(n):
            p = f"blocks/{i}/"
            q, k, v = F.linear(F.rms_norm(h, (D,), w[p + "rmsnorm1/weight"], 1e-5), w[p + "attn_qkv/weight"]) \
                .view(B, L, 3, self.n_head, d).permute(2, 0, 3, 1, 4)
            q, k = common.rope(q, angle.cos(), angle.sin()), common.rope(k, angle.cos(), angle.sin())
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, L, D)
            h = h + n ** -0.5 * F.linear(a, w[p + "attn_out/weight"])
            a = F.linear(F.rms_norm(h, (D,), w[p + "rmsnorm2/weight"], 1e-5), w[p + "mlp/fc1/weight"])
            h = h + n ** -0.5 * F.linear(F.gelu(a, approximate="tanh"), w[p + "mlp/fc2/weight"])
        return self.readout(h)


def load(prefix, dtype=torch.float64):
    """RePlaid with the golden weights; dims are read off the arrays (heads and length are not in them)."""
    w = part(f"{prefix}/w/")
    V, De = w["embedding_matrix.matrix"].shape
    keys = dict(vocab=V, d_embed=De, schedule_width=len(w["noise_schedule.b1"]), n_head=2, batch=8,
                length=G[f"{prefix}/in/x"].shape[1], d_model=w["model.input_linear.weight"].shape[0])
    if prefix == "replaid":
        n_layer = 1 + max(int(k.split(".")[2]) for k in w if k.startswith("model.blocks."))
        model = RePlaid(Config(n_layer=n_layer, cond_dim=w["model.sigma_map.mlp.0.bias"].numel(), **keys))
        missing = model.load_state_dict(w | {k: getattr(model, k) for k in ("updates", "row_stats")})
        assert not missing.missing_keys
    else:
        model = RePlaid(Config(n_layer=0, **keys))
        model.model = PlaidDenoiser({k[6:]: v for k, v in w.items() if k.startswith("model.")})
        for name in ("noise_schedule", "gamma_bounds", "embedding_matrix"):
            getattr(model, name).load_state_dict({k[len(name) + 1:]: v for k, v in w.items() if k.startswith(name)})
    return exact(model) if dtype == torch.float64 else model


# --- golden: parts ---------------------------------------------------------------------------------


def test_schedule_and_its_gradients():
    s, g = replaid.NoiseSchedule(len(G["sched/w/b1"])), part("sched/")
    s.load_state_dict(part("sched/w/"))
    s.double()
    value, slope = s(g["t"])
    gamma_0, gamma_1 = g["bounds"]
    gamma, dot = gamma_0 + (gamma_1 - gamma_0) * value, (gamma_1 - gamma_0) * slope
    alpha, sigma = replaid.alpha_sigma(gamma)
    for ours, name in ((value, "gamma_tilde"), (slope, "dgamma_tilde_dt"), (gamma, "gamma"), (alpha ** 2, "alpha2"),
                       (sigma ** 2, "sigma2"), (-2 * replaid.diffusion_weight(gamma, dot), "snr_prime")):
        torch.testing.assert_close(ours, g[name], rtol=1e-10, atol=1e-13)
    ((g["c"] * value).sum() + (g["e"] * slope).sum()).backward()
    for name, p in s.named_parameters():
        torch.testing.assert_close(p.grad, g[f"grad/{name}"], rtol=1e-10, atol=1e-13)


def test_embedding_norm_and_gradient():
    g = part("embed/")
    E = replaid.EmbeddingMatrix(*g["w/matrix"].shape).double()
    E.matrix.data.copy_(g["w/matrix"])
    torch.testing.assert_close(E(), g["normalised"], rtol=0, atol=1e-12)
    (E() * g["upstream"]).sum().backward()
    torch.testing.assert_close(E.matrix.grad, g["grad_matrix"], rtol=0, atol=1e-12)


def test_reconstruction_row_allocation():
    g = part("rbs/")
    stats, n = torch.full((5,), replaid.STATS_INIT, dtype=torch.float64), g["reconst_loss"].shape[1]
    for recon, diff, r, after in zip(g["reconst_loss"], g["diffusion_loss"], g["reconst_bs"], g["ema_after"]):
        assert replaid.reconstruction_rows(stats, n).item() == r
        means = [x.pow(k).mean() for x in (recon[:r], diff[r:]) for k in (1, 2)]
        stats = replaid.update_stats(stats, torch.stack(means))
        torch.testing.assert_close(stats, after, rtol=1e-12, atol=1e-15)


# --- golden: training step, evaluation, samplers ---------------------------------------------------


def inject(model, prefix):
    """The recorded draws of a training step; segments of Plaid's short-sequence trick go to its attention."""
    g = part(f"{prefix}/in/")
    B, L = g["x"].shape
    coins = torch.zeros(B, dtype=torch.bool)
    coins[g["selfcond_offset"]::4] = True
    if "cu_seqlens" in g:                   # by number of rows: the whole batch, and its self-conditioned rows
        seg = torch.bucketize(torch.arange(B * L), g["cu_seqlens"].unique(), right=True).view(B, L)
        model.model.segments = {B: seg, int(coins.sum()): seg[coins]}
    model.cfg.bias_ramp = 5000
    model.updates.fill_(g["step"])
    assert abs(replaid.bias_scale(model.updates, 5000) - g["bias_scale"]) < 1e-15
    r = g["global_reconst_bs"]
    t = replaid.diffusion_times((torch.arange(B) + g["u"]) / B, r, B)     # rows 0 .. r - 1 at t = 0, as in the official code
    return dict(tokens=g["x"]), dict(t=t, noise=g["noise"], coins=coins), r


@pytest.mark.parametrize("prefix", ["plaid", "replaid"])
def test_training_step_matches_official_loss_and_gradients(prefix):
    model, g = load(prefix), part(f"{prefix}/f64/")
    batch, draws, r = inject(model, prefix)
    seen = {}
    features = model.features
    model.features = lambda *a: seen.update(zip(("z", "gamma", "x_sc"), a)) or features(*a)
    loss, m = model.loss(batch, **draws)
    for ours, name in ((draws["t"], "t"), (seen["z"], "z"), (seen["gamma"], "gamma"), (seen["x_sc"], "x_selfcond"),
                       (loss, "loss"), (m["prior"], "prior_loss")):
        torch.testing.assert_close(ours, g[name].to(ours.dtype), **TIGHT)
    torch.testing.assert_close(m["recon"], g["reconst_loss"].mean(), **TIGHT)
    torch.testing.assert_close(m["diffusion"], g["diffusion_loss"][r:].mean(), **TIGHT)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    if prefix == "plaid":
        grads |= {f"model.{k}": v for k, v in model.model.grads().items()}
    want = {k[5:]: v for k, v in g.items() if k.startswith("grad/")}
    assert len(want) > 20
    for name, v in want.items():
        torch.testing.assert_close(grads[name], v, rtol=1e-9, atol=1e-9 * v.abs().max().item(), msg=lambda s: f"{name}: {s}")


@pytest.mark.parametrize("prefix", ["plaid", "replaid"])
def test_training_step_in_float32(prefix):
    model = load(prefix, torch.float32)
    batch, draws, r = inject(model, prefix)
    loss, m = model.loss(batch, **draws)
    for ours, name in ((loss, "loss"), (m["prior"], "prior_loss")):
        torch.testing.assert_close(ours.double(), G[f"{prefix}/f32/{name}"].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m["recon"], G[f"{prefix}/f32/reconst_loss"].mean().double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m["diffusion"], G[f"{prefix}/f32/diffusion_loss"][r:].mean().double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["plaid", "replaid"])
def test_evaluation_split(prefix):
    model, a, g = load(prefix), part(f"{prefix}_eval/in/"), part(f"{prefix}_eval/f64/")
    B, L = a["x"].shape
    r, E = a["reconst_bs_local"], model.embedding_matrix()
    t = torch.cat([torch.zeros(r), (torch.arange(B - r) + a["u"]) / (B - r)])
    torch.testing.assert_close(t, g["t"], **TIGHT)
    with torch.no_grad():
        diff, recon = (v / L for v in model.score(a["x"], t, E, a["noise"]))
        prior = replaid.prior_kl(E[a["x"]], model.gamma_bounds()[1].expand(B)).mean(1)
    torch.testing.assert_close(recon[:r], g["reconst_loss"].view(-1), **TIGHT)
    torch.testing.assert_close(diff[r:], g["diffusion_loss"][r:], **TIGHT)
    torch.testing.assert_close(prior.mean(), g["prior_loss"], **TIGHT)
    nll = replaid.split_bound(recon, diff, prior, torch.arange(B) < r, a["avg_reconst_bs"])
    torch.testing.assert_close(nll, g["nll"], **TIGHT)


def record(model):
    """Wrap predict: every network call of a sampler leaves (z, gamma, x_sc, x_hat)."""
    calls, predict = [], model.predict

    def wrapped(z, gamma, x_sc, E, scale=1.0):
        calls.append((z, gamma[:1], x_sc, predict(z, gamma, x_sc, E, scale)))
        return calls[-1][3]
    model.predict = wrapped
    return calls


@pytest.mark.parametrize("name", [f"{p}_{s}" for p in ("plaid", "replaid") for s in ("ddpm", "ddim", "guided")])
def test_official_sampler_trajectories(name):
    if f"{name}/in/T" not in G:
        pytest.skip("no such golden trajectory")
    model, a, g = load(name.split("_")[0]), part(f"{name}/in/"), part(f"{name}/out/")
    T, z = int(a["T"]), a["z_init"]
    noise = torch.zeros(T + 1, *z.shape, dtype=torch.float64)
    noise[0] = z
    if "step_noise" in a:
        noise[1:T] = a["step_noise"]
    where = {-1: "any", -2: "all"}
    guides = [(int(v), w, where.get(int(p), int(p)), bool(c)) for v, w, p, c in a.get("guidance", torch.zeros(0, 4)).tolist()]
    calls = record(model)
    tokens = model.sample(*z.shape[:2], T, sampler="ddim" if a["ddim"] else "ddpm", tau=a["score_temp"].item(), grid="plaid",
                          guide=guides, noise=noise)
    for k, key in enumerate(("z", "gamma", "x_selfcond", "x_reconst")):
        torch.testing.assert_close(torch.stack([c[k] for c in calls]), g[key][:T], **TIGHT)
    assert torch.equal(tokens, g["tokens"])


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "heun"])
def test_solver_trajectories_on_the_composed_model(sampler):
    model, g = load("replaid"), part("replaid_solvers/" + {"dpmpp": "dpmpp2m"}.get(sampler, sampler) + "/")
    z = G["replaid_solvers/z_init"]
    T = len(g["z"]) - 1
    calls = record(model)
    features, last = model.features, {}
    model.features = lambda z, *args: last.update(z=z) or features(z, *args)
    tokens = model.sample(*z.shape[:2], T, sampler=sampler, noise=[z] + [torch.zeros_like(z)] * T)
    per = 2 if sampler == "heun" else 1
    torch.testing.assert_close(torch.stack([c[0] for c in calls[::per]] + [last["z"]]), g["z"], **TIGHT)
    torch.testing.assert_close(torch.stack([c[1][0] for c in calls[::per]]), G["replaid_solvers/gamma"][:T], **TIGHT)
    assert torch.equal(tokens, g["tokens"])
    E, head = model.embedding_matrix(), model.model.output_layer.linear
    u, zb = features(last["z"], model.gamma_bounds()[0].expand(len(z)), calls[-1][3])
    torch.testing.assert_close(F.linear(u, head.weight, head.bias) + zb @ E.T, g["logits_last"], **TIGHT)


def test_solver_steps_on_the_one_token_oracle():
    E, log_pi, gamma = G["theory/E"], G["theory/pi"].log(), G["solver/gamma"]

    def x_hat(z, g):
        coeff = torch.exp(0.5 * F.logsigmoid(-g) - F.logsigmoid(g))
        return (log_pi + coeff * z @ E.T).softmax(-1) @ E
    z = {k: G["solver/z_init"] for k in ("ddpm", "ddim", "dpmpp2m", "heun")}
    last = None
    for i, (g_t, g_s) in enumerate(zip(gamma, gamma[1:])):
        x = {k: x_hat(v, g_t) for k, v in z.items()}
        x2 = x_hat(replaid.ddim_step(z["heun"], x["heun"], g_t, g_s), g_s)
        z = dict(ddpm=replaid.ddpm_step(z["ddpm"], x["ddpm"], g_t, g_s, G["solver/noise"][i]),
                 ddim=replaid.ddim_step(z["ddim"], x["ddim"], g_t, g_s),
                 dpmpp2m=replaid.dpmpp_step(z["dpmpp2m"], x["dpmpp2m"], g_t, g_s, last),
                 heun=replaid.heun_step(z["heun"], x["heun"], x2, g_t, g_s))
        last = x["dpmpp2m"], g_t
        for k, v in z.items():
            torch.testing.assert_close(v, G[f"solver/{k}"][i + 1], **TIGHT)


# --- the fused head --------------------------------------------------------------------------------


def plain_head(u, W, b, zb, E, x, w_mse, w_ce, targets, live):
    """The same loss with [B, L, V] logits and autograd; rows that do not teach E see a detached copy of it."""
    def rows(E, keep):
        logits = u @ W.T + b + zb @ E.T
        sq = (x - logits.softmax(-1) @ E).square().sum(-1)
        ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return (torch.where(keep, w_mse, 0)[:, None] * sq).sum() + (torch.where(keep, w_ce, 0)[:, None] * ce).sum()
    return rows(E, live) + rows(E.detach(), ~live)


def test_fused_head_gradients_equal_the_plain_form(monkeypatch):
    B, L, D, V, De = 6, 5, 8, 19, 4
    make = lambda *s: torch.randn(*s, dtype=torch.float64, requires_grad=True)      # noqa: E731
    leaves = [make(B, L, D), make(V, D), make(V), make(B, L, De), make(V, De), make(B, L, De), make(B), make(B)]
    targets, live = torch.randint(V, (B, L)), torch.arange(B) % 3 > 0
    want = torch.autograd.grad(3 * plain_head(*leaves, targets, live), leaves)
    for elements in (2 ** 22, 64 * V):          # one chunk; the chunk never goes below 64 rows, B L = 30: use a longer batch too
        monkeypatch.setitem(replaid.CHUNK_ELEMENTS, "cpu", elements)
        loss, sq, ce = replaid.elbo_head(*leaves, targets, live)
        torch.testing.assert_close(loss, plain_head(*leaves, targets, live), rtol=1e-12, atol=0)
        for ours, plain in zip(torch.autograd.grad(3 * loss, leaves), want):
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_fused_head_chunks_agree(monkeypatch):
    """More tokens than one chunk: a wrong slice or a lost accumulation shows."""
    B, L, D, V, De = 4, 50, 6, 9, 3
    make = lambda *s: torch.randn(*s, dtype=torch.float64, requires_grad=True)      # noqa: E731
    leaves = [make(B, L, D), make(V, D), make(V), make(B, L, De), make(V, De), make(B, L, De), make(B), make(B)]
    targets, live = torch.randint(V, (B, L)), torch.arange(B) > 0
    monkeypatch.setitem(replaid.CHUNK_ELEMENTS, "cpu", 1)                           # 64 tokens a chunk, the last one of 8
    loss, sq, ce = replaid.elbo_head(*leaves, targets, live)
    want = plain_head(*leaves, targets, live)
    for ours, plain in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves)):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_head_matches_official_arrays():
    """Official head: logits, x_hat, gradients of (x_hat . G + logits . K); E is a leaf, masked rows see it detached."""
    g, a = part("head/out/"), part("head/in/")
    w = {k: v.double() for k, v in part("plaid/w/model.").items()}
    u = F.layer_norm(a["h_before_norm"], a["h_before_norm"].shape[-1:], w["output_norm.weight"], None, 1e-5) * a["readout_mult"]
    E, W, b = (x.clone().requires_grad_() for x in (g["E"], w["output_linear.weight"], w["output_linear.bias"]))
    alpha, sigma = replaid.alpha_sigma(a["gamma"])
    zb = (a["bias_scale"] * alpha / sigma ** 2)[:, None, None] * a["z"]
    live = (1 - a["selfcond_mask"])[:, None, None]
    x_hat, total = 0, 0
    for keep, table in ((live, E), (1 - live, E.detach())):
        x, _ = common.expected_embedding(u, W, b, table, skip=zb, E=table)
        logits = u @ W.T + b + zb @ table.T
        total = total + (keep * a["upstream_xhat"] * x).sum() + (keep * a["upstream_logits"] * logits).sum()
        x_hat = x_hat + (keep * x).detach()
    torch.testing.assert_close(x_hat, g["x_reconst"], rtol=0, atol=1e-10)
    torch.testing.assert_close(logits, g["logits"], rtol=0, atol=1e-10)
    total.backward()
    for ours, name in ((E, "E"), (W, "output_linear.weight"), (b, "output_linear.bias")):
        torch.testing.assert_close(ours.grad, g[f"grad/{name}"], rtol=1e-10, atol=1e-10)
