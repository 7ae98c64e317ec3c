"""flm.py against the published implementation's numbers (tests/golden/flm.npz), closed forms and its own identities.

The long demonstrations (marked slow) run with `python -m pytest --slow tests/test_flm.py`.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import golden

import common
import data
import flm

GOLD = golden("flm")


def config(V, D=16, **keys):
    base = dict(vocab=V, d_model=D, n_layer=2, n_head=2, cond_dim=12, length=6, noise="vocab", attn_softcap=50.0)
    return flm.Config(**{**base, **keys})


def net(weights, stage="train", dtype=torch.float32, **keys):
    """An FLM (FMLM) with the golden weights of one set; its dimensions are read off them."""
    w = {k.split("/w/")[1]: v for k, v in GOLD.items() if k.startswith(weights + "/w/")}
    V, D = w["vocab_embed.embedding"].shape
    layers = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks."))
    cfg = config(V, D, n_layer=layers, cond_dim=w["sigma_map.mlp.2.weight"].shape[0], stage=stage, **keys)
    model = flm.FLM(cfg)
    common.load_weights(model.backbone, w, weights)
    return model.to(dtype)


def randomise(model, scale=0.3):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * p.shape[-1] ** -0.5 * torch.randn_like(p))
    return model


def close(a, b, atol, rtol=0.0):
    torch.testing.assert_close(a.to(b.dtype), b, atol=atol, rtol=rtol)


# --- golden parity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", GOLD["sched/K"].tolist())
def test_golden_schedule(V):
    time = flm.TimeChange(V)
    close(time.t_of(GOLD["sched/tau_grid"]), GOLD[f"sched/t_of_tau_{V}"], 1e-6)
    close(time.tau_of(GOLD["sched/t_grid"]), GOLD[f"sched/tau_of_t_{V}"], 1e-6)
    slope, inside = GOLD[f"sched/dtau_dt_{V}"], GOLD[f"sched/dtau_dt_{V}"] > 1e-3
    close(time.slope(GOLD["sched/t_grid"])[inside], slope[inside], 0, 1e-3)
    close(time.tau_of(GOLD["sched/t_grid"]), GOLD[f"sched/tau_exact_{V}"], 2e-4)    # 100 nodes against the integral


def test_golden_network():
    model = net("net")
    seen = {}
    for name, module in model.backbone.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.detach()))
    h = GOLD["net/x"] @ model.W
    u = model.trunk(h, GOLD["net/sigma"], None)
    logits = F.linear(u, model.head.weight, model.head.bias)
    close(common.sinusoid(GOLD["net/sigma"]), GOLD["net/tfreq"], 1e-6)
    for ours, theirs in (("sigma_map", "temb"), ("blocks.0", "block0"), ("blocks.1", "block1"),
                         ("output_layer.norm_final", "normf")):
        close(seen[ours], GOLD[f"net/{theirs}"], 2e-5)
    close(h, GOLD["net/embed"], 2e-5)
    close(logits, GOLD["net/logits"], 2e-5)
    c, _ = flm.capped_logits(u, model.head.weight, model.head.bias, 30.0)
    close(c.log_softmax(-1), GOLD["net/logp"], 2e-5)
    c, _ = flm.capped_logits(25 * u, model.head.weight, 25 * model.head.bias, 30.0)
    close(c.log_softmax(-1), GOLD["net/logp_big"], 3e-4)            # 25 times the rounding of the logits
    tokens = model.trunk(F.embedding(GOLD["net/tokens"], model.W), GOLD["net/sigma"], None)
    close(F.linear(tokens, model.head.weight, model.head.bias), GOLD["net/logits_tokens"], 2e-5)


def test_golden_two_time_network():
    model = net("net2", stage="distill")
    u = model.trunk(GOLD["net/x"] @ model.W, GOLD["net/sigma"], GOLD["net2/sigma_prime"])
    close(F.linear(u, model.head.weight, model.head.bias), GOLD["net2/logits"], 2e-5)


def grads_match(model, case):
    for key in (k for k in GOLD if k.startswith(f"{case}/grad/")):
        ours, theirs = dict(model.backbone.named_parameters())[key.split("/grad/")[1]].grad, GOLD[key]
        close(ours, theirs, 1e-4 * theirs.abs().max().item())


def test_golden_flm_loss_and_gradients():
    model = net("net")
    h = model.noisy(GOLD["flm/tokens"], model.time.t_of(GOLD["flm/tau"]), GOLD["flm/noise"])[0]
    close(h, GOLD["flm/x_t"] @ model.W.detach(), 2e-5)
    loss, metrics = model.loss(dict(tokens=GOLD["flm/tokens"]), t=GOLD["flm/tau"], noise=GOLD["flm/noise"])
    loss.backward()
    close(loss.detach(), GOLD["flm/loss"].mean(), 0, 2e-5)
    grads_match(model, "flm")


CASES = dict(psd_data=dict(diagonal="data"), psd_teacher={}, psd_mse=dict(soft_loss="mse"),
             lsd_teacher=dict(objective="lagrangian", lagrangian_teacher=True),
             lsd_self=dict(objective="lagrangian", diagonal="data"), esd_teacher=dict(objective="eulerian"))


def student(case, dtype=torch.float32):
    model = net("net2", stage="distill", dtype=dtype, **CASES[case])
    if case not in ("psd_data", "lsd_self"):
        model.attach_teacher(net("net", dtype=dtype), fresh=False)
    return model


def draws(case):
    roles = torch.full((len(GOLD[f"{case}/tokens"]),), flm.OFF)
    roles[GOLD[f"{case}/idx_diag"]], roles[GOLD[f"{case}/idx_bnd"]] = flm.DIAGONAL, flm.BOUNDARY
    return dict(t=[GOLD[f"{case}/tau_{k}"] for k in "sut"], noise=GOLD[f"{case}/noise"], coins=roles)


@pytest.mark.parametrize("case", CASES)
def test_golden_distillation(case):
    model = student(case)
    loss, metrics = model.loss(dict(tokens=GOLD[f"{case}/tokens"]), **draws(case))
    if case != "esd_teacher":
        loss.backward()
        grads_match(model, case)
    rtol = 2e-5 if case.startswith("psd") else 1e-4
    want, diag = GOLD[f"{case}/loss"].clone(), GOLD[f"{case}/idx_diag"]
    if case == "esd_teacher":               # the official code conditions this group on (s, t), not (tau_s, tau_t)
        want[diag] = GOLD[f"{case}/diag_loss_tau_conditioned"]
    close(metrics["diagonal"], want[diag].mean(), 0, rtol)
    off = torch.cat([GOLD[f"{case}/idx_off"], GOLD[f"{case}/idx_bnd"]])
    close(metrics["off"], want[off].mean(), 0, rtol)
    close(loss.detach(), want.mean(), 0, rtol)


def test_golden_eulerian_gradients():
    """The stored gradients hold the official bug: the diagonal rows are conditioned on (t, t), not (tau, tau)."""
    model, case = student("esd_teacher"), "esd_teacher"
    original, n = model.trunk, len(GOLD[f"{case}/idx_diag"])

    def trunk(h, tau_s, tau_t):
        if h.requires_grad:                 # the student's call on all rows, diagonal first
            tau_s, tau_t = (torch.cat([model.time.t_of(x[:n]), x[n:]]) for x in (tau_s, tau_t))
        return original(h, tau_s, tau_t)
    model.trunk = trunk
    loss, _ = model.loss(dict(tokens=GOLD[f"{case}/tokens"]), **draws(case))
    loss.backward()
    close(loss.detach(), GOLD[f"{case}/loss"].mean(), 0, 1e-4)
    grads_match(model, case)


@pytest.mark.parametrize("case", CASES)
def test_golden_targets(case):
    model = student(case)
    rows = torch.cat([GOLD[f"{case}/idx_off"], GOLD[f"{case}/idx_bnd"]])
    taus = [GOLD[f"{case}/tau_{k}"].double() for k in "sut"]
    times = [model.time.t_of(x) for x in taus]
    teacher = model._teacher[0] if model._teacher else None
    for x, k in zip(times, "sut"):
        close(x, GOLD[f"{case}/{k}"], 1e-6)
    h, h_teacher = (None if x is None else x[rows].detach() for x in
                    model.noisy(GOLD[f"{case}/tokens"], times[0], GOLD[f"{case}/noise"], teacher))
    target = getattr(model, model.cfg.objective)(teacher, h, h_teacher, *(x[rows] for x in taus + times))
    want = GOLD[f"{case}/off_target"]
    close(target(slice(None)).view(want.shape).detach(), want, 2e-5 * max(1, want.abs().max().item()))
    if f"{case}/lam" in GOLD:
        close(flm.semigroup_weight(*(x[rows] for x in times)), GOLD[f"{case}/lam"], 2e-5)


def record_sampler(model, sampler):
    """Run `sampler` and return (tokens, network inputs, times, last probabilities)."""
    inputs, original = [], model.trunk

    def trunk(h, tau_s, tau_t):
        u = original(h, tau_s, tau_t)
        inputs.append((h, tau_s[0], tau_t[0], model.probs(u)(slice(None)).view(*h.shape[:2], -1)))
        return u
    model.trunk = trunk
    tokens = sampler()
    return tokens, *(torch.stack([x[i] for x in inputs]) for i in range(3)), inputs[-1][3]


@pytest.mark.parametrize("N", [1, 4, 8])
def test_golden_flm_sampler(N):
    model = net("net")
    tokens, y, tau, _, probs = record_sampler(model, lambda: model.sample(3, 6, N, noise=GOLD["flm_samp/z0"][None]))
    close(y, GOLD[f"flm_samp/N{N}/y"], 2e-5)
    close(tau, GOLD[f"flm_samp/N{N}/tau"], 1e-6)
    close(probs, GOLD[f"flm_samp/N{N}/probs_last"], 2e-5)
    assert torch.equal(tokens, GOLD[f"flm_samp/N{N}/tokens"])


@pytest.mark.parametrize("churn", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("N", [1, 4])
def test_golden_fmlm_sampler(churn, N):
    model, case = net("net2", stage="distill"), f"fmlm_samp/g{churn}_N{N}"
    noise = GOLD["fmlm_samp/z0"][None]
    if f"{case}/noise" in GOLD:
        noise = torch.cat([noise, GOLD[f"{case}/noise"]])
    tokens, y, tau_s, tau_t, probs = record_sampler(model, lambda: model.sample(3, 6, N, churn=churn, noise=noise))
    close(y, GOLD[f"{case}/z"] @ model.W.detach(), 5e-5)
    close(torch.stack([tau_s, tau_t], 1), GOLD[f"{case}/tau"], 2e-6)
    close(probs, GOLD[f"{case}/probs_last"], 2e-5)
    assert torch.equal(tokens, GOLD[f"{case}/tokens"])


def test_golden_projection():
    W, G, C = (GOLD[f"proj/{k}"] for k in ("W", "G", "C"))
    M = flm.gram_root(W, W)
    close(W.T @ W, G, 1e-12)
    close(M, C, 1e-12)
    close(GOLD["proj/xi"] @ M, GOLD["proj/eps"] @ W, 1e-11)
    close(GOLD["proj/epsW"] @ torch.linalg.inv(M), GOLD["proj/xi"], 1e-11)


def test_golden_stratified_times():
    """tau = ((u + i) / n mod 1)[perm]; Rows.uniform is the same law: one draw in every stratum."""
    u, n = GOLD["time/u"], 16
    close(((u / n + torch.arange(n) / n) % 1)[GOLD["time/perm"]], GOLD["time/tau"], 1e-7)
    tau = common.Rows(0, 0, 0, n, n).uniform()
    assert sorted((tau * n).long().tolist()) == list(range(n))
