"""flm.py against the published implementation's numbers (tests/golden/flm.npz), closed forms and identities.

The long demonstrations (marked slow) run with `python -m pytest --slow tests/test_flm.py`.
"""
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, golden

import common
import data
import flm

GOLD = golden("flm")


def config(V, D=16, **keys):
    base = dict(vocab=V, d_model=D, n_layer=2, n_head=2, cond_dim=12, length=6, noise="vocab",
                attn_softcap=50.0)
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


# --- golden parity --------------------------------------------------------------------------------


@pytest.mark.parametrize("V", GOLD["sched/K"].tolist())
def test_golden_schedule(V):
    time = flm.TimeChange(V)
    close(time.t_of(GOLD["sched/tau_grid"]), GOLD[f"sched/t_of_tau_{V}"], 1e-6)
    close(time.tau_of(GOLD["sched/t_grid"]), GOLD[f"sched/tau_of_t_{V}"], 1e-6)
    slope, inside = GOLD[f"sched/dtau_dt_{V}"], GOLD[f"sched/dtau_dt_{V}"] > 1e-3
    close(time.slope(GOLD["sched/t_grid"])[inside], slope[inside], 0, 1e-3)
    close(time.tau_of(GOLD["sched/t_grid"]), GOLD[f"sched/tau_exact_{V}"], 2e-4)    # 100 nodes, the integral


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
    c = flm.capped_logits(u, model.head.weight, model.head.bias, 30.0)
    close(c.log_softmax(-1), GOLD["net/logp"], 2e-5)
    c = flm.capped_logits(25 * u, model.head.weight, 25 * model.head.bias, 30.0)
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
    if case == "esd_teacher":               # the official code conditions this group on t, not tau
        want[diag] = GOLD[f"{case}/diag_loss_tau_conditioned"]
    close(metrics["diagonal"], want[diag].mean(), 0, rtol)
    off = torch.cat([GOLD[f"{case}/idx_off"], GOLD[f"{case}/idx_bnd"]])
    close(metrics["off"], want[off].mean(), 0, rtol)
    close(loss.detach(), want.mean(), 0, rtol)


def test_golden_eulerian_gradients():
    """The stored gradients hold the official bug: diagonal rows are conditioned on (t, t), not (tau, tau)."""
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
        probs = model.probs(u)(slice(None)).view(*h.shape[:2], -1)
        inputs.append((h, tau_s[0], tau_s[0] if tau_t is None else tau_t[0], probs))
        return u
    model.trunk = trunk
    tokens = sampler()
    return tokens, *(torch.stack([x[i] for x in inputs]) for i in range(3)), inputs[-1][3]


@pytest.mark.parametrize("N", [1, 4, 8])
def test_golden_flm_sampler(N):
    model = net("net")
    z0 = GOLD["flm_samp/z0"][None]
    tokens, y, tau, _, probs = record_sampler(model, lambda: model.sample(3, 6, N, noise=z0))
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
    tokens, y, tau_s, tau_t, probs = record_sampler(
        model, lambda: model.sample(3, 6, N, churn=churn, noise=noise))
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


# --- properties -----------------------------------------------------------------------------------


def test_loss_at_start_is_log_V_and_blocks_are_the_identity():
    model = flm.FLM(config(37, dropout=0.1))
    tokens = torch.randint(37, (4, 6))
    loss, metrics = model.loss(dict(tokens=tokens))
    assert loss.item() == pytest.approx(math.log(37), abs=1e-6) and metrics["ce"] == loss
    h, net = torch.randn(4, 6, 16), model.backbone
    close(net.blocks[0](h, torch.randn(4, 12), net.cos[:6], net.sin[:6]), h, 0)


@pytest.mark.parametrize("V", [2, 4, 11, 27, 30522, 50257, 50258])
def test_schedule_is_strictly_increasing_and_inverts(V):
    time = flm.TimeChange(V)
    tau = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    t = time.t_of(tau)
    assert t[0] == 0 and t[-1] == 1 and bool((t[1:] > t[:-1]).all())
    close(time.tau_of(t), tau, 1e-6)
    assert time.tau_of(torch.ones(1)).item() == 1
    mid = torch.linspace(0.2, 0.85, 50, dtype=torch.float64)        # slope against a difference of the table
    close(time.slope(mid), (time.tau_of(mid + 2e-3) - time.tau_of(mid - 2e-3)) / 4e-3, 2e-2, 2e-2)


def test_schedule_survives_a_change_of_dtype():
    model = flm.FLM(config(11)).to(torch.bfloat16)
    assert model.time.t_knots.dtype == torch.float64 and model.W.dtype == torch.bfloat16
    assert not any("time" in k for k in model.state_dict())


def test_schedule_is_the_decoding_error():
    """1 - V/(V-1) frequency(argmax z != token) = tau(t), 3 standard errors of 2e5 draws."""
    V, n, time = 5, 200_000, flm.TimeChange(5)
    for tau in (0.1, 0.5, 0.9):
        t = time.t_of(torch.tensor([tau])).item()
        z = (1 - t) * torch.randn(n, V)
        z[:, 2] += t
        wrong = (z.argmax(-1) != 2).double().mean().item()
        error = (wrong * (1 - wrong) / n) ** 0.5
        assert 1 - V / (V - 1) * wrong == pytest.approx(tau, abs=3 * V / (V - 1) * error)


PI = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)


def oracle(x, t):
    """D_t(x) = softmax(log pi + t x / (1-t)^2) of independent tokens with prior PI; x [..., 5]."""
    return (PI.log() + t * x / (1 - t) ** 2).softmax(-1)


def flow(x, s, t, n=200):
    """Flow of dx/dt = (D_t(x) - x)/(1-t) from s to t by RK4, in float64."""
    dt = (t - s) / n
    v = lambda x, t: (oracle(x, t) - x) / (1 - t)
    for i in range(n):
        r = s + i * dt
        k1 = v(x, r)
        k2 = v(x + dt / 2 * k1, r + dt / 2)
        k3 = v(x + dt / 2 * k2, r + dt / 2)
        x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + v(x + dt * k3, r + dt))
    return x


def mean_denoiser(x, s, t):
    """delta_{s,t}(x) = x + (1-s)/(t-s) (X_{s,t}(x) - x)."""
    return x + (1 - s) / (t - s) * (flow(x, s, t) - x)


def test_oracle_flow_map_obeys_the_three_rules():
    """Semigroup with flm's weight and jump; Lagrangian and Eulerian by central differences."""
    s, u, t, step = 0.2, 0.45, 0.8, 1e-4
    x = torch.randn(64, 5, dtype=torch.float64)
    f = [torch.tensor([v], dtype=torch.float64) for v in (s, u, t)]
    delta = mean_denoiser(x, s, t)
    close(delta.sum(-1), torch.ones(64, dtype=torch.float64), 1e-10)
    assert (delta > 0).all()
    lam = flm.semigroup_weight(*f)
    assert lam.item() == pytest.approx(0.1515, abs=1e-4)
    X_su = flm.jump(x[None], mean_denoiser(x, s, u)[None], f[0], f[1])[0]
    close(X_su, flow(x, s, u), 1e-10)
    close(lam * mean_denoiser(x, s, u) + (1 - lam) * mean_denoiser(X_su, u, t), delta, 1e-7)
    d_dt = (mean_denoiser(x, s, t + step) - mean_denoiser(x, s, t - step)) / (2 * step)
    close(oracle(flow(x, s, t), t) - (t - s) * (1 - t) / (1 - s) * d_dt, delta, 1e-5)
    along = (oracle(x, s) - x) / (1 - s)
    ahead, behind = (mean_denoiser(x + e * along, s + e, t) for e in (step, -step))
    d_ds = (ahead - behind) / (2 * step)
    close(oracle(x, s) + (1 - s) * (t - s) / (1 - t) * d_ds, delta, 1e-5)


def oracle_model(probs, stage="train"):
    """A model whose network is a closed form: W = I (h is z), u = log probs(z, s, t), identity head."""
    model = flm.FLM(config(5, 6, n_head=3, n_layer=0, logit_cap=0.0, stage=stage)).double().eval()
    with torch.no_grad():
        model.W.copy_(torch.eye(5, 6))
        model.head.weight.copy_(torch.eye(5, 6))

    def trunk(h, tau_s, tau_t):
        s, t = (model.time.t_of(x)[0].item() for x in (tau_s, tau_s if tau_t is None else tau_t))
        return F.pad(probs(h[..., :5], s, t).log(), (0, 1))
    model.trunk = trunk
    return model


def tv(tokens):
    return 0.5 * (torch.bincount(tokens.flatten(), minlength=5) / tokens.numel() - PI).abs().sum().item()


@pytest.mark.parametrize("N,want", [(1, 0.60), (2, 0.106), (4, 0.037), (8, 0.015), (16, 0.006)])
def test_oracle_euler_sampler(N, want):
    """Total variation of FLM's sampler with the exact denoiser; 1e5 tokens, sampling noise 0.002."""
    model = oracle_model(lambda z, s, t: oracle(z, s))
    assert tv(model.sample(100, 1000, N)) == pytest.approx(want, abs=0.004)


@pytest.mark.parametrize("churn", [0.0, 0.5, 1.0])
def test_oracle_flow_map_sampler_is_exact_at_any_churn(churn):
    """With the exact flow map even one step has the right law; sampling noise of 5,000 tokens is 0.01."""
    def probs(z, s, t):
        return mean_denoiser_fast(z, s, min(t, 0.995))
    model = oracle_model(probs, stage="distill")
    for N in (1, 4):
        assert tv(model.sample(5, 1000, N, churn=churn)) < 0.035


def mean_denoiser_fast(x, s, t):
    return (x + (1 - s) / (t - s) * (flow(x, s, t, 40) - x)).clamp_min(1e-30)


def test_churn_ends():
    """churn = 0 is the plain jump; churn = 1 keeps nothing of the state: z = t D + (1-t) noise."""
    model = randomise(flm.FLM(config(23, stage="distill"))).double()
    noise = torch.randn(4, 3, 6, 23, dtype=torch.float64)
    _, y, _, _, _ = record_sampler(model, lambda: model.sample(3, 6, 4, churn=1.0, noise=noise))
    t = model.time.t_of(torch.tensor([0.25]))
    D = model.project(model.trunk(y[0], torch.zeros(3), torch.ones(3)))
    close(y[1], t * D + (1 - t) * noise[1] @ model.W, 1e-12)
    plain = record_sampler(model, lambda: model.sample(3, 6, 4, noise=noise[:1]))
    almost = record_sampler(model, lambda: model.sample(3, 6, 4, churn=1e-9, noise=noise))
    close(almost[1], plain[1], 1e-6)


def test_oracle_cross_entropy_falls_with_tau():
    """CE of the exact denoiser: H(pi) at tau = 0, and the page's values after it (2e5 draws)."""
    time, n = flm.TimeChange(5), 200_000
    tokens = torch.multinomial(PI, n, replacement=True)
    want = {0.0: 1.392, 0.1: 1.361, 0.25: 1.226, 0.5: 0.879, 0.75: 0.467, 0.9: 0.190, 0.99: 0.020}
    for tau, ce in want.items():
        t = time.t_of(torch.tensor([tau])).item()
        z = (1 - t) * torch.randn(n, 5, dtype=torch.float64) + t * F.one_hot(tokens, 5)
        assert F.nll_loss(oracle(z, t).log(), tokens).item() == pytest.approx(ce, abs=0.006)


def test_semigroup_weight_limits():
    f = lambda *sut: flm.semigroup_weight(*torch.tensor(sut, dtype=torch.float64)).item()
    assert f(0.2, 0.5, 1.0) == 0 and f(0.2, 0.2, 0.7) == 0
    assert f(0.2, 0.7 - 1e-9, 0.7) == pytest.approx(1, abs=1e-6)
    x = torch.rand(3, 1000, dtype=torch.float64).sort(0).values
    assert bool(((flm.semigroup_weight(*x) >= 0) & (flm.semigroup_weight(*x) <= 1)).all())
    h, d = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    s = torch.tensor([0.1, 0.5, 0.7], dtype=torch.float64)
    close(flm.jump(h, d, s, s), h, 1e-15)
    close(flm.jump(h, d, s, torch.ones(3)), d, 1e-15)


def test_simplex_projection_equals_bisection():
    x = 2 * torch.randn(50, 30, dtype=torch.float64)
    low, high = x.min() - 1.0, x.max()
    low, high = low.expand(50, 1), high.expand(50, 1)
    for _ in range(80):
        mid = (low + high) / 2
        over = (x - mid).clamp_min(0).sum(-1, keepdim=True) > 1
        low, high = torch.where(over, mid, low), torch.where(over, high, mid)
    close(flm.simplex_projection(x), (x - low).clamp_min(0), 1e-12)
    inside = torch.rand(5, 7, dtype=torch.float64).softmax(-1)
    close(flm.simplex_projection(inside), inside, 1e-15)


def test_student_starts_as_its_teacher_for_every_jump():
    teacher = randomise(flm.FLM(config(23)))
    pupil = flm.FLM(config(23, stage="distill"))
    pupil.attach_teacher(teacher, fresh=True)
    h, s = torch.randn(4, 6, 16), torch.rand(4)
    for t in (s, torch.ones(4), torch.rand(4)):
        assert torch.equal(pupil.trunk(h, s, t), teacher.trunk(h, s, None))
    assert not any("teacher" in k for k in pupil.state_dict()) and not teacher.W.requires_grad
    started = flm.FLM(config(23, stage="distill", init="ckpt.pt"))          # --init: the weights it came with
    started.attach_teacher(teacher, fresh=True)
    assert not torch.equal(started.W, teacher.W)


@pytest.mark.parametrize("n,fraction,prob,want", [
    (512, 0.5, 32, (256, 8)), (128, 0.5, 32, (64, 2)), (32, 0.5, 4, (16, 4)), (512, 0.75, 32, (384, 4)),
    (100, 0.3, 0, (30, 0))])
def test_groups_partition_the_global_batch(n, fraction, prob, want):
    """Official integer counts, exact over any split into ranks and micro-steps, and even over the ranks."""
    assert flm.group_counts(n, fraction, prob) == want
    model = flm.FLM(config(7, stage="distill", diagonal_fraction=fraction, boundary_prob=prob,
                           objective="semigroup" if prob else "eulerian"))
    whole = model.roles(common.Rows(0, 0, 0, n, n))
    assert (whole.count(flm.DIAGONAL), whole.count(flm.BOUNDARY), len(whole)) == (*want, n)
    parts = [model.roles(common.Rows(0, 0, i * (n // 4), n // 4, n)) for i in range(4)]
    assert sum(parts, []) == whole
    share = [p.count(flm.DIAGONAL) for p in parts]
    assert max(share) - min(share) <= 1
    taus = model.draw_times(common.Rows(3, 5, 0, n, n), whole, "cpu")
    role = torch.tensor(whole)
    assert bool((taus[0] <= taus[1]).all() and (taus[1] <= taus[2]).all() and (taus[2] <= 1).all())
    assert torch.equal(taus[0][role == flm.DIAGONAL], taus[2][role == flm.DIAGONAL])
    assert bool((taus[2] - taus[0] == 1).eq(role == flm.BOUNDARY).all())


def test_soft_loss_equals_autograd():
    """Values and gradients of the chunked loss against the dense formula, for both kinds."""
    torch.set_default_dtype(torch.float64)
    head, u = torch.nn.Linear(5, 301), torch.randn(7, 40, 5, requires_grad=True)
    q, weight = torch.rand(280, 301).softmax(-1), torch.rand(7, 40)
    torch.set_default_dtype(torch.float32)
    for mse in (False, True):
        logp = (3.0 * torch.tanh(head(u).flatten(0, 1) / 3.0)).log_softmax(-1)
        dense = (logp.exp() - q).square().sum(-1) if mse else -(q * logp).sum(-1)
        want = torch.autograd.grad((weight.flatten() * dense).sum(), [u, head.weight, head.bias])
        chunk, common.CHUNK_ELEMENTS["cpu"] = common.CHUNK_ELEMENTS["cpu"], 1          # 64 tokens a chunk
        loss, rows = flm.soft_loss(u, head, weight, lambda part: q[part], 3.0, mse)
        common.CHUNK_ELEMENTS["cpu"] = chunk
        close(rows.flatten(), dense.detach(), 1e-12)
        for a, b in zip(torch.autograd.grad(loss, [u, head.weight, head.bias]), want):
            close(a, b, 1e-12)


def forward_difference(model, case, step=1e-5):
    """d delta along the tangent of test_tangent, by central differences of the whole network."""
    h, ts, tt, dh, ds, dt = case
    p = lambda e: model.probs(model.trunk(h + e * dh, ts + e * ds, tt + e * dt))(slice(None))
    return (p(step) - p(-step)) / (2 * step)


@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_tangent_equals_central_differences(softcap):
    model = randomise(flm.FLM(config(23, stage="distill", attn_softcap=softcap))).double()
    draw = lambda *shape: torch.rand(*shape, dtype=torch.float64)
    case = (draw(3, 6, 16), draw(3), draw(3), draw(3, 6, 16), draw(3), draw(3))
    delta, u = model.tangent(*case)
    p, dp = delta(slice(None))
    close(u, model.trunk(*case[:3]).detach(), 1e-12)                # SDPA equals the explicit path
    close(dp.detach(), forward_difference(model, case).detach(), 1e-8)


# --- noise in d dimensions ------------------------------------------------------------------------


def detached_root(A, W):
    """The tempting mistake: the Cholesky factor as a constant."""
    return torch.linalg.cholesky((A.T @ W).detach(), upper=True)


def test_projected_gradient_is_unbiased_and_a_detached_factor_is_not(monkeypatch):
    """150 batches, the same h for all: mean squared z of paired gradient differences is 1 for equal means."""
    model = randomise(flm.FLM(config(200, 8, n_layer=1, length=8)), 1.0).double()
    differences, variance = {"projected": [], "detached": []}, {"vocab": [], "projected": []}
    roots = {"projected": flm.gram_root, "detached": detached_root}
    for _ in range(150):
        tokens, tau = torch.randint(100, (64, 8)), 0.3 * torch.rand(64)     # ids from 100 on never occur
        eps = torch.randn(64, 8, 200, dtype=torch.float64)
        xi = eps @ model.W.detach() @ torch.linalg.inv(flm.gram_root(model.W, model.W).detach())
        losses, grads = [], {}
        for name, noise in (("vocab", eps), ("projected", xi), ("detached", xi)):
            monkeypatch.setattr(flm, "gram_root", roots.get(name))
            loss, _ = model.loss(dict(tokens=tokens), t=tau, noise=noise)
            grads[name], = torch.autograd.grad(loss, model.W)
            losses.append(loss.item())
        assert losses == pytest.approx([losses[0]] * 3, abs=1e-10)          # the same h, hence the same loss
        for name in differences:
            differences[name].append(grads[name] - grads["vocab"])
        for name in variance:
            variance[name].append(grads[name][100:])
        monkeypatch.setattr(flm, "gram_root", roots["projected"])
    z2 = {}
    for name, d in differences.items():
        d = torch.stack(d)
        z2[name] = (d.mean(0) ** 2 / (d.var(0) / len(d))).mean().item()
    ratio = torch.stack(variance["vocab"]).var(0).sum() / torch.stack(variance["projected"]).var(0).sum()
    print(f"mean squared z {z2}, variance on absent rows {ratio:.1f} times smaller")
    assert 0.8 < z2["projected"] < 1.25 and z2["detached"] > 5
    assert ratio > 8                                                        # about V / d = 25


def basis_of(M, W):
    """Rows b_i [V] with dM[i] = b_i dW: the white directions that xi stands for."""
    return torch.stack([torch.autograd.grad(row[0], W, retain_graph=True)[0][:, 0] for row in M])


@pytest.mark.parametrize("case", ["apart", "equal", "close", "tilted"])
def test_joint_root_is_the_joint_law_with_the_conditional_gradient(case):
    """Covariances of (eps W_T, eps W_S), singular if W_S = W_T A; derivatives along an orthonormal basis."""
    W_T = torch.randn(60, 7, dtype=torch.float64)
    W = W_T + {"apart": 1.0, "close": 1e-5}.get(case, 0.0) * torch.randn(60, 7, dtype=torch.float64)
    W = W @ (torch.eye(7) + (case == "tilted") * torch.randn(7, 7) / 7).double()
    W.requires_grad_()
    M_T, M_S = flm.joint_root(W_T, W)
    for a, A in ((M_T, W_T), (M_S, W)):
        for b, B in ((M_T, W_T), (M_S, W)):
            close((a.T @ b).detach(), (A.T @ B).detach(), 1e-10)
    basis = basis_of(M_S, W)
    close(basis[:7] @ basis[:7].T, torch.eye(7, dtype=torch.float64), 1e-10)
    if case in ("apart", "close"):
        close(basis @ basis.T, torch.eye(14, dtype=torch.float64), 1e-6)
    single = W.detach().float().requires_grad_()                # what a student starts with: equal, float32
    M_S = flm.joint_root(W_T.float(), single)[1]
    close((M_S.T @ M_S).detach().double(), (W.T @ W).detach(), 2e-3)
    grad, = torch.autograd.grad(M_S.sum(), single)
    assert bool(grad.isfinite().all()) and grad.norm() < 2 * 14              # |basis| |ones| = sqrt(14 * 7)


def test_distillation_law_is_the_same_for_both_forms_of_noise():
    """One eps as vocabulary noise, and its image xi = eps [Q, B] through the projected form: equal losses."""
    teacher = randomise(flm.FLM(config(60, 8, noise="projected"))).double()
    pupil = flm.FLM(config(60, 8, stage="distill", boundary_prob=2, noise="projected")).double()
    pupil.attach_teacher(teacher, fresh=True)
    randomise(pupil, 0.1)
    tokens, eps = torch.randint(60, (8, 6)), torch.randn(8, 6, 60, dtype=torch.float64)
    basis = basis_of(flm.joint_root(teacher.W, pupil.W)[1], pupil.W)
    rows = common.Rows(0, 0, 0, 8, 8)
    values = [pupil.loss(dict(tokens=tokens, rows=rows), noise=x)[0].item() for x in (eps, eps @ basis.T)]
    assert values[0] == pytest.approx(values[1], abs=1e-9)
    assert pupil.noise_width(2) == 16 and pupil.noise_width(1) == 8


# --- contract -------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective,width", [("flm", 16), ("semigroup", 23), ("semigroup", 32),
                                             ("lagrangian", 23), ("eulerian", 32)])
def test_chunks_of_a_batch_average_to_the_whole(objective, width):
    """Two or four ranks (or micro-steps) with their slices of Rows give loss and gradient of one, float64.

    Noise in V = 23, in D = 16 (FLM) or in 2D = 32 dimensions (two networks)."""
    stage = "train" if objective == "flm" else "distill"
    keys = {} if objective == "flm" else dict(objective=objective, boundary_prob=2)
    model = randomise(flm.FLM(config(23, stage=stage, **keys))).double()
    if stage == "distill":
        model.attach_teacher(randomise(flm.FLM(config(23))).double(), fresh=False)
    tokens, eps = torch.randint(23, (8, 6)), torch.randn(8, 6, width, dtype=torch.float64)
    results = []
    for n in (8, 4, 2):
        model.zero_grad()
        total = 0
        for first in range(0, 8, n):
            part = slice(first, first + n)
            batch = dict(tokens=tokens[part], rows=common.Rows(1, 2, first, n, 8))
            loss = model.loss(batch, noise=eps[part])[0] * n / 8
            loss.backward()
            total += loss.item()
        grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        results.append(dict(grads, total=torch.tensor(total)))
    for other in results[1:]:
        for k, want in results[0].items():
            torch.testing.assert_close(other[k], want, atol=1e-10, rtol=1e-8, msg=k)


def test_padding_counts_for_nothing():
    model = randomise(flm.FLM(config(23))).double()
    tokens, mask = torch.randint(23, (4, 6)), torch.arange(6) < torch.tensor([6, 3, 2, 5])[:, None]
    tau, eps = torch.rand(4), torch.randn(4, 6, 23, dtype=torch.float64)
    loss = model.loss(dict(tokens=tokens, mask=mask), t=tau, noise=eps)[0]
    u = model.trunk(model.noisy(tokens, model.time.t_of(tau), eps)[0], tau, None)
    logits = flm.capped_logits(u, model.head.weight, model.head.bias, 30.0)
    want = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")[mask].mean()
    assert loss.item() == pytest.approx(want.item(), abs=1e-12)
    total = 0
    for i, half in ((0, slice(0, 2)), (2, slice(2, 4))):
        batch = dict(tokens=tokens[half], mask=mask[half], global_len=mask.sum(1),
                     rows=common.Rows(0, 0, i, 2, 4))
        total += model.loss(batch, t=tau[half], noise=eps[half])[0].item() / 2
    assert total == pytest.approx(loss.item(), abs=1e-12)


def test_validation_of_a_flow_map_needs_no_teacher():
    model = randomise(flm.FLM(config(23, stage="distill"))).eval()
    _, metrics = model.loss(dict(tokens=torch.randint(23, (4, 6))))
    assert all(metrics[k].isfinite() for k in model.val_keys)
    assert metrics["ce"].item() == pytest.approx(metrics["diagonal"].item(), rel=1e-5)


def test_known_tokens_are_kept_and_watched():
    model, seen = randomise(flm.FLM(config(23, stage="distill"))), []
    known, mask = torch.randint(23, (3, 6)), torch.rand(3, 6) < 0.5
    tokens = model.sample(3, 6, 5, known, mask, watch=lambda i, x: seen.append((i, x.clone())), churn=0.5)
    assert torch.equal(tokens[mask], known[mask]) and [i for i, _ in seen] == list(range(5))
    assert torch.equal(seen[-1][1], tokens)


def test_autoguidance_extrapolates_from_the_dropout_network():
    model = randomise(flm.FLM(config(23, dropout=0.5)), 1.0).eval()
    noise = torch.randn(1, 8, 6, 23)
    first = {}
    for g in (1.0, 3.0, 5.0):               # state after one step, the same dropout each time
        torch.manual_seed(3)
        y = record_sampler(model, lambda: model.sample(8, 6, 4, guidance=g, noise=noise))[1]
        first[g] = y[1 if g == 1 else 2]
        assert not model.backbone.training
    close(first[3.0], (first[1.0] + first[5.0]) / 2, 1e-4)
    model.backbone.train()                  # against the formula: p_weak + 5 (p - p_weak) at the first step
    torch.manual_seed(3)
    y0, times = noise[0] @ model.W, model.time.grid(4)[1]
    weak = model.project(model.trunk(y0, torch.zeros(8), None))
    model.backbone.eval()
    plain = model.project(model.trunk(y0, torch.zeros(8), None))
    step = times[1].item() / (1 + flm.EULER_GUARD)
    close(first[5.0], (y0 + step * (weak + 5 * (plain - weak) - y0)).detach(), 1e-4)
    with pytest.raises(data.UserError, match="dropout"):
        flm.FLM(config(23)).sample(1, 6, 2, guidance=2.0)


@pytest.mark.parametrize("V,stage,want", [(30522, "train", 139_292_986), (30522, "distill", 139_342_394),
                                          (50258, "train", 169_627_218), (50258, "distill", 169_676_626)])
def test_parameter_counts_of_the_published_models(V, stage, want, monkeypatch):
    monkeypatch.setattr(flm, "TimeChange", lambda V: None)
    preset = next(p for p in ("lm1b", "owt") if flm.PRESETS[p]["vocab"] == V)
    with torch.device("meta"):
        model = flm.FLM(flm.Config(**flm.PRESETS[preset], stage=stage))
    assert sum(p.numel() for p in model.parameters()) == want


class Hydra:
    """Stands for the configuration object in a published pickle."""


@pytest.mark.parametrize("stage", ["train", "distill"])
def test_published_checkpoint_is_read_by_name_from_its_ema_list(stage, tmp_path):
    source = randomise(flm.FLM(config(23, stage=stage)))
    state, shadow = {}, []
    for name, p in source.named_parameters():
        if name == "backbone.blocks.0.norm1.weight":                # what the file has and this model has not
            state["backbone.learnable_loss_weighting.mlp.0.weight"] = torch.ones(3, 4)
            shadow.append(torch.ones(3, 4))
            state["backbone.rotary_emb.inv_freq"] = torch.ones(4)
        state[name.replace("blocks.0.", "blocks.0._orig_mod.")] = torch.zeros_like(p)
        shadow.append(p.detach().clone())
    state["teacher.W"] = torch.ones(2)
    ema = dict(decay=0.9999, num_updates=7, shadow_params=shadow)
    raw = dict(state_dict=state, ema=ema, hyper_parameters=Hydra())
    torch.save(raw, tmp_path / "published.ckpt")
    model = flm.FLM(config(23, stage=stage))
    common.initial_weights(model, tmp_path / "published.ckpt")
    for (name, a), b in zip(model.named_parameters(), source.parameters()):
        assert torch.equal(a, b), name
    with pytest.raises(data.UserError, match="attn_softcap=50"):
        common.initial_weights(flm.FLM(config(23, stage=stage, attn_softcap=0.)), tmp_path / "published.ckpt")
    with pytest.raises(data.UserError, match="vocab_embed"):
        common.initial_weights(flm.FLM(config(24, stage=stage)), tmp_path / "published.ckpt")
    raw["ema"]["shadow_params"] = shadow[1:] + shadow[:1]
    torch.save(raw, tmp_path / "shifted.ckpt")
    with pytest.raises(data.UserError, match="does not follow"):
        common.initial_weights(model, tmp_path / "shifted.ckpt")


def test_mistakes_are_told_in_one_line():
    tokens = dict(tokens=torch.randint(11, (32, 6)))
    teacher = lambda **keys: flm.FLM(config(**{"V": 11, **keys}))
    pupil = lambda **keys: teacher(stage="distill", **keys)
    attempts = {
        "needs --teacher": lambda: pupil().loss(tokens),
        "another shape: vocab_embed": lambda: pupil().attach_teacher(teacher(V=12), True),
        "another shape: blocks.2": lambda: pupil().attach_teacher(teacher(n_layer=3), True),
        "flow map itself": lambda: pupil().attach_teacher(pupil(), True),
        "other caps": lambda: pupil().attach_teacher(teacher(attn_softcap=0.0), True),
        "rows that jump": lambda: pupil(boundary_prob=0),
        "lagrangian objective needs": lambda: pupil(boundary_prob=0, objective="lagrangian"),
        "no boundary row in a batch of 32": lambda: pupil(diagonal="data").loss(tokens),
        "resolves": lambda: teacher().sample(1, 6, 10 ** 9),
        "resolves 1 to": lambda: teacher().sample(1, 6, 0),
        "churn": lambda: teacher().sample(1, 6, 2, churn=0.5),
        "between 0 and 1": lambda: pupil().sample(1, 6, 2, churn=1.5),
        "one of projected": lambda: teacher(noise="gauss"),
        "one of semigroup": lambda: teacher(objective="psd"),
        "below 1": lambda: teacher(diagonal_fraction=1.0),
        "not a published": lambda: teacher().published({"model": {}}),
    }
    for words, attempt in attempts.items():
        with pytest.raises(data.UserError, match=words) as e:
            attempt()
        assert "\n" not in str(e.value) and len(str(e.value)) < 200


# --- learning -------------------------------------------------------------------------------------


def sequence_oracle(z, t, sequences, prior):
    """Exact D_t(z) [B, L, V] under a prior over sequences: posterior ~ pi exp(sum_l t z_{l,k} / (1-t)^2)."""
    B, L, V = z.shape
    scores = t[:, None, None] / (1 - t[:, None, None]) ** 2 * z                              # [B, L, V]
    onehot = F.one_hot(sequences, V).double()                                                # [M, L, V]
    posterior = (prior.log() + torch.einsum("blv,mlv->bm", scores, onehot)).softmax(-1)
    return torch.einsum("bm,mlv->blv", posterior, onehot)


def test_training_approaches_the_exact_denoiser_and_never_beats_it():
    """Markov source, V = 4, L = 4: on the same draws the learned cross-entropy starts at ln 4 and ends at
    most 0.03 nats above the exact one; pairs of neighbours in 16-step samples follow the source."""
    V, L = 4, 4
    start, P = data.markov_chain(V, seed=1)
    sequences = torch.cartesian_prod(*[torch.arange(V)] * L)
    prior = torch.from_numpy(start)[sequences[:, 0]]
    for k in range(1, L):
        prior = prior * torch.from_numpy(P)[sequences[:, k - 1], sequences[:, k]]
    model = flm.FLM(config(V, 32, length=L, cond_dim=32, attn_softcap=0.0, noise="projected", gate_init=0.5))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(450):
        for g in opt.param_groups:
            g["lr"] = 3e-3 * min(1, step / 30, (450 - step) / 200)
        tokens = sequences[torch.multinomial(prior, 128, replacement=True)]
        loss, _ = model.loss(dict(tokens=tokens))
        loss.backward()
        opt.step()
        opt.zero_grad()
    model.eval()
    n = 8192
    tokens = sequences[torch.multinomial(prior, n, replacement=True)]
    tau, eps = (torch.arange(n) + 0.5) / n, torch.randn(n, L, V)
    t = model.time.t_of(tau)
    z = t[:, None, None] * F.one_hot(tokens, V) + (1 - t[:, None, None]) * eps
    exact = -sequence_oracle(z, t, sequences, prior).gather(-1, tokens[..., None]).log().mean().item()
    with torch.no_grad():
        learned = model.loss(dict(tokens=tokens), t=tau, noise=eps)[0].item()
    print(f"cross-entropy {learned:.4f}, exact denoiser {exact:.4f}, start {math.log(V):.4f} nats/token")
    assert exact - 0.002 < learned < exact + 0.03
    ids = model.sample(4000, L, 16)
    pairs = torch.bincount((ids[:, :-1] * V + ids[:, 1:]).flatten(), minlength=16) / (3 * len(ids))
    assert 0.5 * (pairs - torch.from_numpy(start[:, None] * P).flatten()).abs().sum() < 0.1


def test_distillation_cut_short_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """A student of 64 < V = 80 noise dimensions dies in its sixth step; the same command ends as if it had
    not: weights, averages, optimiser. Nothing is skipped, not even while student and teacher are equal."""
    monkeypatch.chdir(tmp_path)
    run = lambda *argv: common.main(flm.FLM, flm.Config, flm.PRESETS, ["--preset=toy", "--vocab=80", *argv])
    run("--steps=2", "--batch=16", "--out=teacher")
    argv = ["--stage=distill", "--teacher=teacher/ckpt.pt", "--steps=8", "--batch=16", "--boundary_prob=4",
            "--save_every=2", "--dropout=0.1", "--warmup=0"]
    run(*argv, "--out=whole")
    loss, calls = flm.FLM.loss, []

    def dies(self, batch):
        calls.append(batch)
        if len(calls) == 6:
            raise RuntimeError("power cut")
        return loss(self, batch)
    monkeypatch.setattr(flm.FLM, "loss", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        run(*argv, "--out=cut")
    monkeypatch.setattr(flm.FLM, "loss", loss)
    assert common.load_checkpoint("cut/ckpt.pt")["step"] == 4
    run(*argv, "--out=cut")
    whole, cut = (common.load_checkpoint(f"{folder}/ckpt.pt") for folder in ("whole", "cut"))
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(cut[part], whole[part], atol=0, rtol=0)
    assert whole["step"] == cut["step"] == 8 and whole["stats"]["skipped"] == 0


def test_both_stages_through_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = lambda *argv: common.main(flm.FLM, flm.Config, flm.PRESETS, list(argv))
    run("--preset=toy", "--steps=12", "--batch=64")
    run("--preset=toy", "--stage=distill", "--teacher=out/flm-toy/ckpt.pt", "--steps=8", "--batch=64")
    run("--preset=toy", "--stage=distill", "--diagonal=data", "--steps=2", "--batch=64", "--out=out/alone")
    run("sample", "--out=out/flm-toy-distill", "--steps=2", "--churn=0.8", "--n=2", "--watch=true")
    run("eval", "--steps=2", "--n=16", "--rows=64", "--out=out/flm-toy")
    text = capsys.readouterr().out
    assert "val_ce" in text and "tau 0.5" in text and "no likelihood bound" in text and "sample 2|" in text
    distill = ["--stage=distill", "--teacher=out/flm-toy/ckpt.pt"]
    for words, argv in {"needs --teacher": distill[:1], "another shape": [*distill, "--d_model=64"],
                        "jump from 0 to 1": [*distill, "--boundary_prob=0"],
                        "--attn_softcap=50": ["--init=out/flm-toy/ckpt.pt", "--attn_softcap=0"]}.items():
        with pytest.raises(SystemExit) as e:
            run("--preset=toy", f"--out=out/{len(words)}", *argv)
        assert e.value.code == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


# --- long demonstrations: python -m pytest --slow -s tests/test_flm.py ----------------------------

DIEGO = torch.tensor([0.45, 0.45, 0.10])            # New York, San Diego, New Diego


def diego_figures(model, steps, n=4000, **options):
    """(share of valid rows, total variation to the source)."""
    torch.manual_seed(0)
    ids = model.sample(n, 2, steps, **options)
    hits = torch.stack([(ids == torch.tensor(row)).all(1).float().mean() for row in ((0, 1), (2, 3), (0, 3))])
    return hits.sum().item(), 0.5 * ((hits - DIEGO).abs().sum() + 1 - hits.sum()).item()


@pytest.mark.slow
def test_toy_one_step_needs_the_flow_map(tmp_path, monkeypatch):
    """`python flm.py --preset=toy`, then its distill stage: about three minutes on one idle thread."""
    monkeypatch.chdir(tmp_path)
    run = lambda *argv: common.main(flm.FLM, flm.Config, flm.PRESETS, list(argv))
    run("--preset=toy")
    run("--preset=toy", "--stage=distill", "--teacher=out/flm-toy/ckpt.pt")
    table = {}
    for name in ("flm-toy", "flm-toy-distill"):
        model = common.load_run(flm.FLM, flm.Config, common.World(), f"out/{name}")[0]
        for steps in (1, 2, 4, 8, 16):
            valid, distance = table[name, steps] = diego_figures(model, steps)
            print(f"{name:16} {steps:3} steps: valid {valid:.3f}  TV {distance:.3f}")
    assert table["flm-toy", 1][1] > 0.5
    assert table["flm-toy-distill", 1][0] > 0.98 and table["flm-toy-distill", 1][1] < 0.06


BENCH = """
import resource, sys, time
import torch, torch.nn.functional as F
import flm
torch.set_num_threads(1)
V, L, B, kinds = 50257, 128, 16, sys.argv[1].split(",")

def literal(model, batch):              # the published step: dense z, log-probabilities, one-hot product
    tau = torch.rand(B)
    t = model.time.t_of(tau).float()[:, None, None]
    x = F.one_hot(batch["tokens"], V)
    u = model.trunk(((1 - t) * torch.randn(B, L, V) + t * x) @ model.W, tau, None)
    logits = 30 * torch.tanh(F.linear(u, model.head.weight, model.head.bias) / 30)
    return -(logits.log_softmax(-1) * x).sum(-1).mean()

def step(kind, model, opt):
    batch = dict(tokens=torch.randint(V, (B, L)))
    (literal(model, batch) if kind == "literal" else model.loss(batch)[0]).backward()
    opt.step()
    opt.zero_grad(set_to_none=True)

def build(kind):
    cfg = flm.Config(vocab=V, d_model=256, n_layer=4, n_head=4, cond_dim=128, length=L,
                     noise="projected" if kind == "projected" else "vocab")
    model = flm.FLM(cfg)
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    opt.zero_grad(set_to_none=True)
    return model, opt

runs = {k: build(k) for k in kinds}
resident = int(open("/proc/self/statm").read().split()[1]) * 4096 / 2 ** 20
times = {k: [] for k in kinds}
for i in range(6 if len(kinds) > 1 else 2):
    for k in kinds:
        start = time.process_time()
        step(k, *runs[k])
        times[k].append(time.process_time() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - resident
print(*[sorted(t[1:])[(len(t) - 1) // 2] for t in times.values()], peak)
"""


@pytest.mark.slow
def test_projected_noise_is_faster_and_leaner():
    """V = 50,257, d = 256, L = 128, 2,048 tokens: process seconds a step (median of five alternations), peak
    memory above model and optimiser (each in a process of its own)."""
    def child(kinds):
        out = subprocess.run([sys.executable, "-c", BENCH, ",".join(kinds)], cwd=ROOT,
                             capture_output=True, text=True, check=True)
        return [float(x) for x in out.stdout.split()]
    kinds = ["projected", "vocab", "literal"]
    seconds, memory = child(kinds)[:3], [child([k])[-1] for k in kinds]
    for k, s, m in zip(kinds, seconds, memory):
        print(f"{k:10} {s:.2f} s/step ({s / seconds[0]:.2f}x)   {m:.0f} MiB above model and optimiser")
    assert seconds[2] > 2 * seconds[0] and memory[0] < 0.25 * memory[2]
    assert seconds[1] > 1.2 * seconds[0] and memory[0] < 0.8 * memory[1]
