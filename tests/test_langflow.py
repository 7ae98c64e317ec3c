"""langflow.py: golden parity with the official code, the identities behind it, and what a bound may do.

Every array of the golden set is compared; none is left out.
"""
import dataclasses
import json
import math
import struct

import pytest
import torch
import torch.nn.functional as F

import common
import data
import langflow
from conftest import golden
from langflow import Config, Gumbel, LangFlow, alpha_sigma, bc, c_skip, flow_integral, flow_step, tau_of


@pytest.fixture(scope="module")
def g():
    return golden("langflow")


def small(**keys):
    base = dict(vocab=29, d_model=32, cond_dim=16, n_layer=2, n_head=2, length=8, unigram_entropy=3.05)
    return Config(**{**base, **keys})


def official(g):
    """The golden model, its size and switches read from the arrays: any set of this layout will do."""
    V, D, C, n, heads, L, _ = g["cfg/ints"].tolist()
    self_cond, bias, normalise = g["cfg/flags"].bool().tolist()
    model = LangFlow(small(vocab=V, d_model=D, cond_dim=C, n_layer=n, n_head=heads, length=L,
                           normalise=normalise, gaussian_bias=bias, self_cond_prob=0.25 * self_cond))
    model.load_state_dict({k[2:]: v.reshape(model.state_dict()[k[2:]].shape) for k, v in g.items()
                           if k.startswith("w/") and not k.endswith("inv_freq")})
    return model.eval()


def random_model(**keys):
    """Every zero-initialised tensor made random, so that all paths are active; float64."""
    model = LangFlow(small(**keys)).double().eval()
    with torch.no_grad():
        for p in model.backbone.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def logits_of(head):
    z = head["u"] @ head["W"].T + head["b"]
    return z if head["skip"] is None else z + head["skip"] @ head["E"].T


def noisy(m, tokens, gamma, eps):
    """E and z = alpha E[x] + sigma eps at gamma [B]."""
    E, (alpha, sigma) = m.codebook(), alpha_sigma(gamma)
    return E, bc(alpha) * F.embedding(tokens, E) + bc(sigma) * eps


def close(a, b, tol):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape or a.numel() == b.numel() == 1
    diff = (a - b).abs().max().item()
    assert diff <= tol, f"largest difference {diff:.2e}, allowed {tol:.0e}"


# --- golden parity ---------------------------------------------------------------------------------


def test_golden_embedding_forward_process_and_time_conditioning(g):
    m = official(g)
    E = m.codebook()
    close(E, g["out/emb_matrix"], 2e-6)
    x = F.embedding(g["in/tokens"], E)
    close(x, g["out/x_embed"], 2e-6)
    close(g["in/probs"] @ E, g["out/embed_of_probs"], 2e-6)
    alpha, sigma = alpha_sigma(g["in/gamma"])
    close(bc(alpha) * x + bc(sigma) * g["in/noise"], g["out/z"], 2e-6)
    close(common.sinusoid(g["in/gamma"]), g["out/t_freq"], 5e-6)
    close(m.backbone.sigma_map(g["in/gamma"]), g["out/t_emb"], 2e-6)
    close(m.backbone.cond(g["in/gamma"]), g["out/t_cond"], 2e-6)
    cos, sin = m.backbone.cos, m.backbone.sin
    close(torch.cat([cos, cos], -1), g["out/rot_cos"], 1e-6)
    close(torch.cat([sin, sin], -1), g["out/rot_sin"], 1e-6)
    q, k = g["in/qkv"].permute(2, 0, 3, 1, 4)[:2]
    close(common.rope(q, cos, sin).transpose(1, 2), g["out/q_rot"], 2e-6)
    close(common.rope(k, cos, sin).transpose(1, 2), g["out/k_rot"], 2e-6)


@pytest.mark.parametrize("tag", ["nosc", "sc"])
def test_golden_network(g, tag):
    m = official(g)
    E, z, gamma, tokens = m.codebook(), g["out/z"], g["in/gamma"], g["in/tokens"]
    x_sc = g["in/x_self_cond"] if tag == "sc" else torch.zeros_like(z)
    hidden = []
    hooks = [b.register_forward_hook(lambda mod, args, out: hidden.append(out)) for b in m.backbone.blocks]
    head = m.head(z, gamma, x_sc, E)
    for hook in hooks:
        hook.remove()
    close(z, g[f"out/hidden0_{tag}"], 1e-5)
    for i, h in enumerate(hidden):
        close(h, g[f"out/hidden{i + 1}_{tag}"], 1e-5)
    close(head["u"] @ head["W"].T + head["b"], g[f"out/backbone_logits_{tag}"], 1e-5)
    close(logits_of(head), g[f"out/logits_{tag}"], 5e-5)
    x_hat, nll = m.denoise(z, gamma, x_sc, E, tokens)
    close(nll, g[f"out/ce_{tag}"], 2e-5)
    close(x_hat, g[f"out/xhat_{tag}"], 1e-5)


def test_published_safetensors_load_by_name(g, tmp_path):
    """The file is made here byte by byte (length, JSON header, data); inv_freq is in it and is ignored."""
    raw = {k[2:]: v for k, v in g.items() if k.startswith("w/")}
    header, body = {}, b""
    for name, v in raw.items():
        shape = [] if name.startswith("proposal") else list(v.shape)
        header[name] = dict(dtype="F32", shape=shape, data_offsets=[len(body), len(body) + v.numel() * 4])
        body += v.numpy().tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    same = official(g)
    m = LangFlow(dataclasses.replace(same.cfg, gate_init=0.7, gumbel_loc=9.0))
    common.initial_weights(m, tmp_path / "model.safetensors")
    for name, v in m.state_dict().items():
        assert torch.equal(v, same.state_dict()[name]), name


def test_golden_two_pass(g):
    m = official(g)
    E, z, gamma = m.codebook(), g["out/z"], g["in/gamma"]
    first = m.denoise(z, gamma, torch.zeros_like(z), E)[0]
    close(logits_of(m.head(z, gamma, first, E)), g["out/logits_twopass"], 5e-5)
    close(m.two_pass(z, gamma, E, "chain", g["in/tokens"])[1], g["out/ce_twopass"], 5e-5)


def test_golden_gradients(g):
    m = official(g)
    E, z = noisy(m, g["in/tokens"], g["in/gamma"], g["in/noise"])
    weight = torch.full(g["in/tokens"].shape, 1 / g["in/tokens"].numel())
    head = m.head(z, g["in/gamma"], g["in/x_self_cond"], E)
    loss, _ = common.token_ce(**head, targets=g["in/tokens"], weight=weight)
    loss.backward()
    close(loss, g["grad/loss"], 5e-6)
    grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
    assert not any(n.startswith("proposal") for n in grads)
    for key in [k for k in g if k.startswith("grad/backbone")]:
        close(grads[key[5:]], g[key], 5e-6)
    close(torch.stack([x.norm() for x in grads.values()]).norm(), g["grad/total_norm"], 5e-6)


def test_golden_schedule(g):
    p = official(g).proposal
    gamma = p.gamma_of(g["sched/q"])
    low, high = p.gamma_range()
    inside = (gamma > low) & (gamma < high)
    assert torch.equal(gamma[inside], g["sched/gamma_of_q"][inside])    # the float32 recipe, bit for bit
    close(gamma, g["sched/gamma_of_q"], 1e-6)
    close(p.gamma_range()[0], g["sched/gamma_min"], 1e-5)
    close(p.gamma_range()[1], g["sched/gamma_max"], 1e-5)
    close(p.log_density(g["sched/gamma_of_q"]), g["sched/log_pdf"], 5e-6)
    exact = Gumbel(0, 0, 0).double()
    for name, value in p.named_parameters():                    # the decimal numbers behind the float32
        getattr(exact, name).data.fill_(float(str(value.detach().numpy())))
    low, high = exact.gamma_range()
    close(exact.gamma_of(g["sched/q"].double()), g["sched/gamma_of_q_f64_formula"].clamp(low, high), 1e-8)
    grid = g["sched/gamma_grid"]
    for mine, key in zip((*alpha_sigma(grid), c_skip(grid)), ("alpha_f64", "sigma_f64", "c_skip_f64")):
        close(mine / g[f"sched/{key}"], torch.ones_like(grid), 1e-12)
    close(c_skip(grid.float()) / g["sched/c_skip_f32_official"], torch.ones_like(grid), 1e-6)
    close(exact.information(grid), g["sched/H_of_gamma_f64"], 1e-10)
    loss = (g["sched/ce_row"] - exact.information(g["in/gamma"].double())).square().mean()
    loss.backward()
    close(loss, g["sched/loss_f64"], 1e-7)
    close(torch.stack([exact.entropy.grad, exact.loc.grad, exact.scale.grad]),
          g["sched/grad_entropy_loc_scale_f64"], 1e-7)


def test_golden_sampler_step(g):
    for k, (t, s) in enumerate(g["step/t_s"]):
        (_, sigma_t), (_, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        z = sigma_s * flow_step(g["out/z"] / sigma_t, g["step/x_pred"], tau_of(t), tau_of(s))
        close(z, g[f"step/z_next{k}"], 2e-6)


def test_golden_generation(g):
    m, steps = official(g), int(g["samp/num_steps"])
    calls, inner = [], m.head
    m.head = lambda z, gamma, *args: calls.append((z, gamma, inner(z, gamma, *args))) or calls[-1][2]
    tokens = m.sample(*g["samp/tokens"].shape, steps, noise=g["samp/z_init"])
    assert len(calls) == steps                        # NFE = N: N - 1 updates, one decode
    close(torch.stack([gamma[0] for _, gamma, _ in calls]), g["samp/gamma"], 1e-6)
    close(torch.stack([logits_of(head) for *_, head in calls]), g["samp/logits"], 2e-4)
    for (z, _, _), theirs in zip(calls[1:], g["samp/z"], strict=True):
        close(z, theirs, 1e-5)
    assert torch.equal(tokens, g["samp/tokens"])


@pytest.mark.parametrize("mode, tag", [("none", "plain"), ("detached", "detached"), ("chain", "chain")])
def test_golden_divergence(g, mode, tag):
    m, z, gamma = official(g), g["out/z"], g["div/gamma"]
    E = m.codebook().detach()
    x_hat, trace = m.divergence(z, gamma.expand(len(z)), E, g["div/u"], mode)
    close(x_hat, g[f"div/xhat_{tag}"], 1e-5)
    close(trace, g[f"div/hutch_{tag}"], 2e-4)
    basis = torch.eye(z[0].numel()).view(-1, *z[0].shape)         # probes that add up to the exact trace
    for row, exact in zip(z, g[f"div/exact_{tag}"]):
        _, part = m.divergence(row.expand(len(basis), -1, -1), gamma.expand(len(basis)), E, basis, mode)
        close(part.sum(), exact, 1e-3)


@pytest.mark.parametrize("tag, solver, divergence, masked", [
    ("heun2_sc", "heun", "detached", False), ("euler_sc", "euler", "detached", False),
    ("heun2_nosc", "heun", "none", False), ("heun2_sc_chain", "heun", "chain", False),
    ("euler_sc_mask", "euler", "detached", True)])
def test_golden_ode_likelihood(g, tag, solver, divergence, masked):
    m, steps, eps = official(g), int(g["nll/n_steps"]), g["nll/noise"][0]
    mask = g["nll/mask"].bool() if masked else None
    out = m.nll(g["in/tokens"], mask, likelihood="ode", divergence=divergence, ode_solver=solver,
                ode_steps=steps, noise=g["nll/noise"])
    close(out["reconst"], g[f"nll/{tag}/reconst_nll"], 3e-4)
    close(out["integral"], g[f"nll/{tag}/int_nll"], 3e-4)
    close(out["prior"], g[f"nll/{tag}/prior_nll"], 3e-4)
    close(out["nll"] - out["control"], g[f"nll/{tag}/nll"], 3e-4)   # the official form has no control
    kept = torch.ones_like(g["nll/mask"]) if mask is None else g["nll/mask"]
    assert torch.equal(kept.sum(1), g[f"nll/{tag}/num_valid_tokens"])
    close(out["control"], 0.5 * ((1 - eps.square()).sum(-1) * kept).sum(1), 1e-4)


def test_golden_ode_grid(g):
    """The solver's own noise levels, seen at its calls: Heun visits both ends of every interval."""
    m, seen = official(g), []
    m.divergence = lambda z, gamma, *args: seen.append(gamma[0]) or LangFlow.divergence(m, z, gamma, *args)
    m.nll(g["in/tokens"], likelihood="ode", ode_steps=int(g["nll/n_steps"]))
    close(torch.stack(seen[::2] + seen[-1:]), g["nll/gamma_grid"], 1e-5)


def test_golden_sde_likelihood(g):
    m = official(g)
    out = m.nll(g["in/tokens"], likelihood="sde", draws=len(g["sde/uniform"]), t=g["sde/uniform"],
                noise=g["sde/noise"])
    for mine, key in dict(reconst="reconst_nll", integral="int_nll", prior="prior_nll", nll="nll").items():
        close(out[mine], g[f"sde/{key}"], 2e-4)


def test_golden_training_steps(g):
    m = official(g)
    opt = torch.optim.AdamW(m.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    ema = {n: p.detach().clone() for n, p in m.named_parameters()}
    for i, log in enumerate(g["train/log_ce_sched_gnorm_gsched_lr_entropy_loc_scale"]):
        loss, metrics = m.loss(dict(tokens=g["train/tokens"][i]), t=g["train/q"][i],
                               noise=g["train/noise"][i], coins=g["train/sc_rows"][i].bool())
        opt.zero_grad()
        loss.backward()
        gnorm = torch.nn.utils.clip_grad_norm_(m.backbone.parameters(), 1.0)
        gsched = torch.stack([p.grad for p in m.proposal.parameters()]).norm()
        lr = 1e-2 * min(1.0, i / 2)
        close(loss, log[0] + log[1], 2e-5)
        close(gnorm, log[2], 1e-4)                              # of all parameters together
        for mine, theirs in zip([metrics["ce"], metrics["sched"], gsched, lr, metrics["entropy"],
                                 metrics["loc"], metrics["scale"]], log[[0, 1, 3, 4, 5, 6, 7]], strict=True):
            close(mine, theirs, 2e-5)
        opt.param_groups[0]["lr"] = lr
        opt.step()
        m.after_step(i, torch.tensor(True))
        decay = min(0.9999, (2 + i) / (11 + i))
        for n, p in m.named_parameters():
            ema[n] -= (1 - decay) * (ema[n] - p.detach())
    final = {n: p.detach() for n, p in m.named_parameters()}
    for kind, mine in (("final", final), ("ema", ema)):
        for key in [k for k in g if k.startswith(f"train/{kind}/")]:
            close(mine[key.split("/")[2]], g[key], 2e-5)


# --- identities ------------------------------------------------------------------------------------


def test_noise_levels():
    gamma = torch.linspace(-12, 20, 200)
    alpha, sigma = alpha_sigma(gamma)
    close(alpha ** 2 + sigma ** 2, torch.ones(200), 1e-6)
    close(c_skip(gamma) * sigma ** 2 / alpha, torch.ones(200), 1e-6)
    close(tau_of(gamma) * sigma / alpha, torch.ones(200), 1e-6)


def test_schedule_is_its_own_information_curve():
    p = Gumbel(1.62, 0.71, 3.05).double()
    q = torch.linspace(1e-5, 1 - 1e-5, 501, dtype=torch.float64)
    gamma = p.gamma_of(q)
    close(p.information(gamma), p.entropy * q, 1e-12)
    assert torch.equal(p.gamma_of(torch.tensor([0.0, 1.0]).double()), torch.stack(p.gamma_range()))
    h = 1e-5
    slope = (p.information(gamma + h) - p.information(gamma - h)) / (2 * h) / p.entropy
    close(slope, p.log_density(gamma).exp(), 1e-6)
    grid = torch.linspace(*p.gamma_range(), 200_001, dtype=torch.float64)
    close(torch.trapezoid(p.log_density(grid).exp(), grid), torch.tensor(1 - 2e-5), 1e-7)


def test_sampler_step_equals_ddim_and_the_official_exponential_form():
    z, x_hat = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    t, s, m = torch.tensor([5.1, 2.3, 3.7], dtype=torch.float64)

    def step(z, t, s):
        return alpha_sigma(s)[1] * flow_step(z / alpha_sigma(t)[1], x_hat, tau_of(t), tau_of(s))

    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    ddim = sigma_s / sigma_t * z + (alpha_s - sigma_s / sigma_t * alpha_t) * x_hat
    end = alpha_s * x_hat
    exponential = end + (z * ((F.softplus(t) - F.softplus(s)) / 2).exp() - end) * ((s - t) / 2).exp()
    close(step(z, t, s), ddim, 1e-14)
    close(step(z, t, s), exponential, 1e-14)
    close(step(z, t, t), z, 1e-15)
    close(step(step(z, t, m), m, s), step(z, t, s), 1e-14)


def iid_model(probs, D=16):
    """Zero trunk, output bias = ln unigram: the exact posterior of independent tokens."""
    model = LangFlow(small(vocab=len(probs), d_model=D, n_layer=1, length=4)).double().eval()
    model.backbone.output_layer.linear.bias.data = probs.log()
    return model


def ce_and_mmse(model, tokens, gamma, eps):
    level = torch.full((len(tokens),), gamma, dtype=torch.float64)
    with torch.no_grad():
        E, z = noisy(model, tokens, level, eps)
        x_hat, nll = model.two_pass(z, level, E, "none", tokens)
        return nll.mean(), (x_hat - F.embedding(tokens, E)).square().sum(-1).mean()


def test_untrained_model_is_the_exact_posterior_of_independent_tokens():
    probs = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05], dtype=torch.float64)
    m = iid_model(probs)
    E, gamma = m.codebook(), torch.tensor([0.5, 3.0], dtype=torch.float64)
    z = torch.randn(2, 4, 16, dtype=torch.float64)
    head = m.head(z, gamma, torch.randn_like(z), E)
    evidence = -0.5 * (z[:, :, None] - bc(alpha_sigma(gamma)[0])[..., None] * E).square().sum(-1)
    posterior = (evidence / bc(alpha_sigma(gamma)[1]) ** 2 + probs.log()).softmax(-1)
    close(logits_of(head).softmax(-1), posterior, 1e-12)
    tokens = torch.multinomial(probs, 20_000, replacement=True).view(-1, 4)
    eps = torch.randn(len(tokens), 4, 16, dtype=torch.float64)
    ce = [ce_and_mmse(m, tokens, gamma, eps)[0] for gamma in (-4, -1, 0, 1, 2, 3, 5, 12)]
    entropy = -probs.log()[tokens].mean()
    assert ce[0] < 1e-6 and abs(ce[-1] - entropy) < 1e-3
    assert all(a < b for a, b in zip(ce, ce[1:]))


def test_cross_entropy_grows_by_half_the_mmse():
    """I-MMSE: d CE / d gamma = e^-gamma / 2 * E ||E_x - x_hat||^2 makes the SDE integral a likelihood."""
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    m = iid_model(probs, D=8)
    tokens = torch.multinomial(probs, 40_000, replacement=True).view(-1, 4)
    eps = torch.randn(len(tokens), 4, 8, dtype=torch.float64)
    for gamma in (0.0, 1.0, 2.0):
        high, low = (ce_and_mmse(m, tokens, gamma + step, eps)[0] for step in (0.05, -0.05))
        slope = (high - low) / 0.1
        mmse = ce_and_mmse(m, tokens, gamma, eps)[1]
        assert abs(slope / (0.5 * math.exp(-gamma) * mmse) - 1) < 0.03


def test_divergence_modes():
    m = random_model()
    E, z = m.codebook().detach(), torch.randn(2, 8, 32, dtype=torch.float64)
    gamma, u = torch.tensor([1.0, 2.5], dtype=torch.float64), torch.randn(2, 8, 32, dtype=torch.float64)
    chain, detached = (m.divergence(z, gamma, E, u, mode)[1] for mode in ("chain", "detached"))
    assert (chain - detached).abs().min() > 1e-3
    m.backbone.self_cond_proj.weight.data[:, 32:] = 0                           # the half that sees x_sc
    close(m.divergence(z, gamma, E, u, "chain")[1], m.divergence(z, gamma, E, u, "none")[1], 1e-10)


def test_hutchinson_probes_average_to_the_trace():
    m = random_model(length=2, d_model=8)
    E, z = m.codebook().detach(), torch.randn(1, 2, 8, dtype=torch.float64).expand(4000, -1, -1)
    gamma = torch.full((4000,), 1.5, dtype=torch.float64)
    basis = torch.eye(16, dtype=torch.float64).view(16, 2, 8)
    exact = m.divergence(z[:16], gamma[:16], E, basis, "chain")[1].sum()
    gauss = m.divergence(z, gamma, E, torch.randn_like(z), "chain")[1]
    signs = m.divergence(z, gamma, E, torch.randn_like(z).sign(), "chain")[1]
    for draws in (gauss, signs):
        assert abs(draws.mean() - exact) < 5 * draws.std() / 4000 ** 0.5
    assert signs.std() < gauss.std()


def test_gradients_of_network_and_schedule_do_not_mix():
    def grads(schedule_learns):
        torch.manual_seed(1)
        m = random_model()
        m.proposal.requires_grad_(schedule_learns)
        loss, metrics = m.loss(dict(tokens=torch.randint(29, (4, 8))))
        loss.backward()
        return m, metrics, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

    m, metrics, both = grads(True)
    _, _, alone = grads(False)                      # no graph at all behind the schedule: the CE's gradient
    assert set(both) - set(alone) == {"proposal.loc", "proposal.scale", "proposal.entropy"}
    for n in alone:
        assert torch.equal(alone[n], both[n]), n
    # they get exactly the gradient of L_sched at fixed gamma and CE_row
    t, tokens, noise = torch.rand(4).double(), torch.randint(29, (4, 8)), torch.randn(4, 8, 32).double()
    m.zero_grad()
    m.loss(dict(tokens=tokens), t=t, noise=noise, coins=torch.zeros(4, dtype=torch.bool))[0].backward()
    gamma = m.proposal.gamma_of(t).detach()
    E, z = noisy(m, tokens, gamma, noise)
    row = m.denoise(z, gamma, torch.zeros_like(z), E, tokens)[1].mean(1).detach()
    sched = (row - m.proposal.information(gamma)).square().mean()
    for p, grad in zip(m.proposal.parameters(), torch.autograd.grad(sched, list(m.proposal.parameters()))):
        close(p.grad, grad, 1e-10)


def test_schedule_fits_a_known_information_curve():
    for start in (-3.0, 3.0):
        truth, p = Gumbel(1.5, 0.8, 3.0).double(), Gumbel(1.5 + start, 0.85, 3.4).double()
        opt = torch.optim.Adam(p.parameters(), lr=1e-2)
        for step in range(2000):
            gamma = p.gamma_of(common.Rows(0, step, 0, 64, 64).uniform()).detach()
            seen = truth.information(gamma).detach() + 0.2 * torch.randn(64, dtype=torch.float64)
            opt.zero_grad()
            (seen - p.information(gamma)).square().mean().backward()
            opt.step()
        for x, target in zip((p.loc, p.scale, p.entropy), (1.5, 0.8, 3.0)):
            assert abs(x - target) < 0.05


def test_self_conditioning_forms():
    off = random_model(self_cond_prob=0.0)
    E, z, gamma = off.codebook(), torch.randn(4, 8, 32).double(), torch.tensor([0.5, 1, 2, 3]).double()
    assert not off.self_cond_rows(common.Rows(0, 5, 0, 8, 8)).any()
    torch.manual_seed(3)
    loss, metrics = off.loss(dict(tokens=torch.randint(29, (4, 8))), coins=torch.zeros(4, dtype=torch.bool))
    torch.manual_seed(3)
    assert torch.equal(loss, off.loss(dict(tokens=torch.randint(29, (4, 8))))[0])
    close(off.two_pass(z, gamma, E, "chain")[0], off.denoise(z, gamma, torch.zeros_like(z), E)[0], 0)
    subset = LangFlow(small())
    for step in range(20):
        rows = subset.self_cond_rows(common.Rows(0, step, 0, 16, 16))
        assert torch.equal(rows.view(4, 4).sum(1), torch.ones(4, dtype=torch.int64))
        assert torch.equal(subset.self_cond_rows(common.Rows(0, step, 8, 8, 16)), rows[8:])
    coin = LangFlow(small(self_cond_form="bernoulli", self_cond_prob=0.3))
    tosses = [coin.self_cond_rows(common.Rows(0, step, 0, 4, 8)) for step in range(400)]
    assert all(x.all() or not x.any() for x in tosses)
    assert abs(sum(bool(x[0]) for x in tosses) / 400 - 0.3) < 0.1
    other = [coin.self_cond_rows(common.Rows(0, step, 4, 4, 8)) for step in range(400)]
    assert all(torch.equal(a, b) for a, b in zip(tosses, other))                    # the ranks agree


def test_the_three_official_switches():
    """self_conditioning, use_bias, use_normalized_embedding of the official configuration, all off."""
    m = random_model(self_cond_prob=0.0, gaussian_bias=False, normalise=False)
    assert not any("self_cond_proj" in n for n, _ in m.named_parameters())
    E, z, gamma = m.codebook(), torch.randn(2, 8, 32).double(), torch.tensor([1.0, 3.0]).double()
    assert torch.equal(E, m.backbone.vocab_embed.embedding)
    head = m.head(z, gamma, torch.randn_like(z), E)
    assert head["skip"] is None and torch.equal(head["u"], m.backbone(z, m.backbone.cond(gamma)))
    tokens = torch.randint(29, (2, 8))
    m.loss(dict(tokens=tokens))[0].backward()
    assert all(p.grad is not None for p in m.parameters())
    for options in ({}, dict(likelihood="ode", ode_steps=2)):
        assert m.nll(tokens, **options)["nll"].isfinite().all()
    assert m.sample(2, 8, 3, temperature=0.7, solver="heun").shape == (2, 8)


def test_equivariance_and_invariance():
    m = random_model()
    E, z = m.codebook(), torch.randn(5, 8, 32, dtype=torch.float64)
    gamma, order = torch.linspace(0, 4, 5, dtype=torch.float64), torch.tensor([3, 0, 4, 1, 2])
    targets = torch.randint(29, (5, 8))
    x_hat, nll = m.two_pass(z, gamma, E, "chain", targets)
    again, nll_again = m.two_pass(z[order], gamma[order], E, "chain", targets[order])
    close(again, x_hat[order], 1e-12)
    close(nll_again, nll[order], 1e-12)
    head = m.head(z, gamma, torch.zeros_like(z), E)
    x_hat, nll = common.expected_embedding(**head, values=E, targets=targets)
    shifted = common.expected_embedding(**{**head, "b": head["b"] + 3.0}, values=E, targets=targets)
    pad = {**head, "W": F.pad(head["W"], (0, 0, 0, 3)), "b": F.pad(head["b"], (0, 3), value=-math.inf),
           "E": F.pad(E, (0, 0, 0, 3))}
    padded = common.expected_embedding(**pad, values=pad["E"], targets=targets)
    for other in (shifted, padded):
        close(other[0], x_hat, 1e-12)
        close(other[1], nll, 1e-12)


def test_masked_sde_bound_splits_over_the_positions():
    """All its terms are sums over positions: a mask and its complement add up to the whole."""
    m, tokens = random_model(), torch.randint(29, (3, 8))
    mask = torch.rand(3, 8) < 0.5
    draws = dict(t=torch.rand(2, 3).double(), noise=torch.randn(3, 3, 8, 32).double(), draws=2)
    whole, part, rest = (m.nll(tokens, x, **draws) for x in (None, mask, ~mask))
    for key in ("nll", "reconst", "integral", "prior"):
        close(part[key] + rest[key], whole[key], 1e-10)


def test_draws_of_the_likelihoods():
    """SDE: each sequence has one quantile in each of `draws` strata. ODE: signs by default, or Gaussians."""
    m, tokens, seen = random_model(), torch.randint(29, (3, 8)), []
    m.two_pass = lambda z, gamma, *args: seen.append(gamma) or LangFlow.two_pass(m, z, gamma, *args)
    m.nll(tokens, draws=5)
    q = (m.proposal.information(torch.stack(seen[1:])) / m.proposal.entropy).detach()       # [5, 3]
    assert torch.equal((5 * q).floor(), torch.arange(5.0, dtype=torch.float64)[:, None].expand(5, 3))
    assert (q.std(1) > 0).all()
    probes = []
    m.divergence = lambda z, g, E, u, mode: probes.append(u) or LangFlow.divergence(m, z, g, E, u, mode)
    for probe in ("rademacher", "gaussian"):
        m.nll(tokens, likelihood="ode", ode_steps=1, probe=probe)
    assert [bool((u.abs() == 1).all()) for u in probes] == [True, True, False, False]


def test_schedule_has_its_own_rate_and_clip_and_a_positive_scale():
    m = LangFlow(small(lr=1e-3, schedule_lr=0.7))
    network, schedule = m.param_groups()
    assert {id(p) for p in schedule["params"]} == {id(p) for p in m.proposal.parameters()}
    assert len(network["params"]) + 3 == len(list(m.parameters())) and network["lr"] == 1e-3
    assert schedule["lr"] == 0.7 and schedule["clip"] != network.get("clip", "main")
    m.proposal.scale.data.fill_(-0.5)
    m.after_step(0, torch.tensor(True))
    assert m.proposal.scale == langflow.MIN_SCALE


def test_masked_loss_is_the_mean_over_the_global_batch():
    """Two halves averaged = the whole batch, though their real lengths differ."""
    m = random_model()
    torch.manual_seed(4)
    tokens, t, noise = torch.randint(29, (8, 8)), torch.rand(8).double(), torch.randn(8, 8, 32).double()
    lens = torch.tensor([8, 3, 5, 8, 1, 2, 7, 4])
    mask, coins = torch.arange(8) < lens[:, None], torch.arange(8) % 4 == 1

    def part(s, **extra):
        batch = dict(tokens=tokens[s], mask=mask[s], **extra)
        return m.loss(batch, t=t[s], noise=noise[s], coins=coins[s])[0]

    whole = part(slice(0, 8))
    halves = [part(slice(i, i + 4), global_len=lens) for i in (0, 4)]
    close(sum(halves) / 2, whole, 1e-12)
    gamma, none = m.proposal.gamma_of(t), torch.zeros(8, dtype=torch.bool)
    E, z = noisy(m, tokens, gamma, noise)
    nll = m.denoise(z, gamma, torch.zeros_like(z), E, tokens)[1] * mask
    sched = (nll.sum(1) / lens - m.proposal.information(gamma)).square().mean()
    loss, metrics = m.loss(dict(tokens=tokens, mask=mask), t=t, noise=noise, coins=none)
    close(loss, nll.sum() / lens.sum() + sched, 1e-12)
    close(metrics["sched"], sched, 1e-12)


def test_bias_ramp_and_initial_values():
    m = LangFlow(small(bias_ramp=10, gumbel_entropy=None))
    close(m.proposal.loc.detach(), torch.tensor(4.723 + math.log(32 / 768)), 1e-6)
    close(m.proposal.entropy.detach(), torch.tensor(3.05), 1e-6)
    tokens = torch.randint(29, (4, 8))
    start = m.loss(dict(tokens=tokens, rows=common.Rows(0, 0, 0, 4, 4)))[1]["ce"]
    close(start, math.log(29), 1e-5)                            # r = 0 and a zero output layer: uniform
    later = m.loss(dict(tokens=tokens, rows=common.Rows(0, 10, 0, 4, 4)))[1]["ce"]
    assert later < start - 0.3
    ramps, inner = [], m.head
    m.head = lambda *args: ramps.append(args[-1]) or inner(*args)
    m.loss(dict(tokens=tokens, rows=common.Rows(0, 3, 0, 4, 4)))
    assert ramps == [0.3, 0.3]                                  # the first pass and the main pass alike


@pytest.mark.parametrize("preset, count", [("lm1b", 140_472_637), ("owt", 170_805_332)])
def test_published_parameter_counts(preset, count):
    cfg = Config(**{**langflow.PRESETS[preset], "vocab": 30522 if preset == "lm1b" else 50257})
    with torch.device("meta"):
        model = LangFlow(cfg)
    assert sum(p.numel() for p in model.parameters()) == count
    assert "backbone.self_cond_proj.weight" in model.state_dict() and "proposal.loc" in model.state_dict()


@pytest.mark.parametrize("key, value", [
    ("self_cond_form", "always"), ("self_cond_prob", 0.3), ("self_cond_prob", 1.5), ("bias_ramp", -1),
    ("gumbel_scale", 0.0), ("gumbel_entropy", 0.0), ("vocab", 0)])
def test_bad_configuration_is_refused(key, value):
    with pytest.raises(common.UserError, match=f"--{key}={value}: .+"):
        LangFlow(small(**{key: value}))


@pytest.mark.parametrize("call, text", [
    (lambda m, x: m.nll(x, likelihood="elbo"), "--likelihood=elbo: choose one of sde, ode"),
    (lambda m, x: m.nll(x, divergence="full"), "--divergence=full: choose one of chain, none, detached"),
    (lambda m, x: m.nll(x, ode_solver="rk4"), "--ode_solver=rk4: choose one of heun, euler"),
    (lambda m, x: m.nll(x, probe="uniform"), "--probe=uniform: choose one of rademacher, gaussian"),
    (lambda m, x: m.nll(x, draws=0), "--draws=0: must be at least 1"),
    (lambda m, x: m.nll(x, ode_steps=0), "--ode_steps=0: must be at least 1"),
    (lambda m, x: m.sample(2, 8, 0), "--steps=0: must be at least 1"),
    (lambda m, x: m.sample(2, 8, 4, temperature=0.0), "--temperature=0.0: must be above 0"),
    (lambda m, x: m.sample(2, 8, 4, solver="dpm"), "--solver=dpm: choose one of euler, heun"),
    (lambda m, x: m.sample(2, 8, 4, known=x, rewrite=2.0), "--rewrite=2.0: a quantile lies in"),
    (lambda m, x: m.sample(2, 8, 4, rewrite=0.5), "--rewrite=0.5: no text to rewrite"),
    (lambda m, x: m.sample(2, 9, 4), "sequence of 9 tokens is longer than the model's length=8")])
def test_bad_options_are_refused(call, text):
    with pytest.raises(common.UserError, match=text):
        call(random_model(), torch.zeros(2, 8, dtype=torch.int64))


# --- with an exact denoiser ------------------------------------------------------------------------


class Oracle(LangFlow):
    """LangFlow around the exact posterior of the Markov chain (pi, P); the solvers are the shipped ones.

    `copy` = lambda mixes the self-conditioning input in, x_hat = (1 - lambda) x_hat* + lambda x_sc. That
    leaves the trajectory as it is (x_sc = x_hat*) but moves divergence into the term that `detached` drops.
    """

    def __init__(self, E, pi, P, loc=0.2, scale=1.0, copy=0.0):
        super().__init__(small(n_layer=1))
        self.double().eval()
        self.proposal.loc.data.fill_(loc)                       # exactly, not its float32
        self.proposal.scale.data.fill_(scale)
        self.E, self.pi, self.P, self.copy = E, pi, P, copy

    def codebook(self):
        return self.E

    def posterior(self, z_t, gamma):
        evidence = bc(c_skip(gamma)) * (z_t @ self.E.T)                         # [B, L, V]
        forward, backward = [self.pi.log() + evidence[:, 0]], [torch.zeros_like(evidence[:, 0])]
        for i in range(1, z_t.shape[1]):
            forward.append(evidence[:, i] + (forward[-1][:, :, None] + self.P.log()).logsumexp(1))
        for i in range(z_t.shape[1] - 1, 0, -1):
            backward.insert(0, (self.P.log() + (evidence[:, i] + backward[0])[:, None]).logsumexp(2))
        return (torch.stack(forward, 1) + torch.stack(backward, 1)).log_softmax(-1)

    def head(self, z_t, gamma, x_sc, E, ramp=1.0):
        V = len(E)
        eye, zeros = torch.eye(V, dtype=E.dtype), torch.zeros(V, dtype=E.dtype)
        return dict(u=self.posterior(z_t, gamma), W=eye, b=zeros, skip=torch.zeros_like(z_t), E=E)

    def denoise(self, z_t, gamma, x_sc, E, targets=None, ramp=1.0):
        x_hat, nll = super().denoise(z_t, gamma, x_sc, E, targets, ramp)
        return (x_hat if not x_sc.any() else (1 - self.copy) * x_hat + self.copy * x_sc), nll


def markov(V, L, seed, concentration=0.3):
    """A chain of known entropy: (pi, P as tensors, nats per sequence)."""
    pi, P = data.markov_chain(V, seed, concentration)
    return torch.from_numpy(pi), torch.from_numpy(P), data.markov_entropy(pi, P, L)


def chain_samples(pi, P, n, L):
    tokens = [torch.multinomial(pi, n, replacement=True)]
    for _ in range(L - 1):
        tokens.append(torch.multinomial(P[tokens[-1]], 1)[:, 0])
    return torch.stack(tokens, 1)


def chain_logp(pi, P, tokens):
    return pi.log()[tokens[:, 0]] + P.log()[tokens[:, :-1], tokens[:, 1:]].sum(1)


def golden_oracle(g):
    return Oracle(g["toy/E"], g["toy/pi"], g["toy/P"], *g["toy/loc_scale"].tolist())


def test_oracle_posterior_matches_the_golden_one(g):
    m = golden_oracle(g)
    for gamma, z, logp in zip(g["toy/post_gamma"], g["toy/post_z"], g["toy/post_logprob"]):
        close(m.posterior(z, gamma.expand(len(z))), logp, 1e-8)


def exact_ode(m, tokens, eps, n):
    """The terms of the ODE likelihood with the exact trace, one probe per coordinate, and the last state."""
    B, N = len(tokens), eps[0].numel()
    gamma_min = m.proposal.gamma_range()[0].expand(B)
    E, z_a = noisy(m, tokens, gamma_min, eps)
    reconst = m.two_pass(z_a, gamma_min, E, "none", tokens)[1].sum(1)
    q = torch.linspace(0, 1, n + 1, dtype=torch.float64).clamp(1e-5, 1 - 1e-5)
    gamma = m.proposal.gamma_of(q).detach()
    basis = torch.eye(N, dtype=torch.float64).view(N, *eps[0].shape).repeat(B, 1, 1)

    def field(y, j):
        z = (alpha_sigma(gamma[j])[1] * y).repeat_interleave(N, 0)
        x_hat, part = m.divergence(z, gamma[j].expand(len(z)), E, basis, "none")
        return x_hat[::N], alpha_sigma(gamma[j])[1] * part.view(B, N).sum(1)

    y_b, integral = flow_integral(field, z_a / bc(alpha_sigma(gamma_min)[1]), tau_of(gamma))
    prior = 0.5 * (y_b.square().sum((1, 2)) - N)
    control = 0.5 * (N - eps.square().sum((1, 2)))
    return reconst, integral, prior, control, y_b


@pytest.mark.parametrize("n", [32, 64])
def test_oracle_likelihood_matches_the_golden_one(g, n):
    reconst, integral, prior, control, y_b = exact_ode(golden_oracle(g), g["toy/tokens"], g["toy/noise"], n)
    for mine, key in ((reconst, "reconst_nll"), (integral, "int_nll"), (prior, "prior_nll"),
                      (prior + control, "prior_nll_cv"), (y_b, "y_final")):
        close(mine, g[f"toy/n{n}/{key}"], 1e-8)


@pytest.fixture
def source():
    """(E, pi, P) of a chain over 5 tokens, with five orthogonal embeddings [5, 8]."""
    pi, P, _ = markov(5, 4, seed=1, concentration=0.5)
    return 8 ** 0.5 * torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][:5], pi, P


def test_oracle_likelihood_is_exact_for_every_draw(source):
    """Not only in the mean: the control variate leaves the error of Heun's 32 steps and of the prior."""
    tokens = chain_samples(*source[1:], 6, 4)
    *terms, _ = exact_ode(Oracle(*source), tokens, torch.randn(6, 4, 8, dtype=torch.float64), 32)
    close(sum(terms), -chain_logp(*source[1:], tokens), 0.1)          # without the control: 5 nats


def test_control_variate_keeps_the_mean_and_removes_the_noise(source):
    tokens = chain_samples(*source[1:], 4, 4)
    many = tokens.repeat_interleave(150, 0)
    out = Oracle(*source).nll(many, likelihood="ode", divergence="none", ode_steps=24)
    lean, plain = out["nll"].view(4, -1), (out["nll"] - out["control"]).view(4, -1)
    assert (lean.mean(1) - plain.mean(1)).abs().max() < 5 * 4 / 150 ** 0.5
    assert lean.std(1).mean() < plain.std(1).mean() / 2                         # the rest is Hutchinson noise
    error = (lean.mean(1) + chain_logp(*source[1:], tokens)).abs().max()
    assert error < 5 * (lean.std(1).max() / 150 ** 0.5).item() + 0.05


def test_sde_bound_is_tight_for_the_exact_denoiser(source):
    tokens = chain_samples(*source[1:], 4, 4)
    nll = Oracle(*source).nll(tokens.repeat_interleave(400, 0))["nll"].view(4, -1)
    assert ((nll.mean(1) + chain_logp(*source[1:], tokens)).abs() < 5 * nll.std(1) / 20 + 0.02).all()


def test_detached_likelihood_is_not_a_bound(source):
    """Same denoiser, same trajectory: the figure falls as the network copies its own estimate."""
    tokens = chain_samples(*source[1:], 300, 4)
    true = -chain_logp(*source[1:], tokens).mean()
    results = {}
    for copy in (0.0, 0.25, 0.5, 1.0):
        for mode in ("chain", "detached"):
            torch.manual_seed(5)
            out = Oracle(*source, copy=copy).nll(tokens, likelihood="ode", divergence=mode, ode_steps=24)
            results[copy, mode] = out["nll"].mean()
    for copy in (0.0, 0.25, 0.5, 1.0):
        assert abs(results[copy, "chain"] - true) < 0.3                     # a bound, and here a tight one
        expected = results[0.0, "detached"] - copy * (results[0.0, "detached"] - results[1.0, "detached"])
        assert abs(results[copy, "detached"] - expected) < 0.1                  # linear in lambda
    assert results[0.25, "detached"] < true - 0.8 and abs(results[1.0, "detached"]) < 0.3


def bigram_table(tokens, V):
    pairs = tokens[:, :-1] * V + tokens[:, 1:]
    return torch.bincount(pairs.flatten(), minlength=V * V) / pairs.numel()


def test_oracle_sampling(source):
    _, pi, P = source
    m, V = Oracle(*source), len(pi)
    exact, marginal = torch.zeros(V, V, dtype=torch.float64), pi
    for _ in range(3):
        exact += marginal[:, None] * P / 3
        marginal = marginal @ P
    true = -chain_logp(pi, P, chain_samples(pi, P, 20_000, 4))
    tv, surprise = {}, {}
    for steps, solver in ((4, "euler"), (16, "euler"), (8, "heun")):
        torch.manual_seed(6)
        tokens = m.sample(2000, 4, steps, solver=solver)
        tv[steps, solver] = 0.5 * (bigram_table(tokens, V) - exact.flatten()).abs().sum()
        surprise[steps, solver] = -chain_logp(pi, P, tokens).mean()
    assert tv[16, "euler"] < 0.06 < tv[4, "euler"]
    assert tv[8, "heun"] < 0.06
    assert abs(surprise[16, "euler"] - true.mean()) < 5 * true.std() / 2000 ** 0.5


def test_infilling_prefix_and_rewriting(source):
    m, (_, pi, P) = Oracle(*source), source
    known = chain_samples(pi, P, 200, 4)
    held = torch.tensor([True, True, False, True]).expand(200, -1)
    seen = []
    out = m.sample(200, 4, 16, known=known, known_mask=held, watch=lambda step, tokens: seen.append(tokens))
    assert torch.equal(out[held], known[held]) and len(seen) == 15
    assert all(torch.equal(x[held], known[held]) for x in seen)
    # the filled token must be likelier in its context than a blind draw
    fit = P.log()[known[:, 1], out[:, 2]] + P.log()[out[:, 2], known[:, 3]]
    blind = torch.randint(len(P), (200,))
    assert fit.mean() > (P.log()[known[:, 1], blind] + P.log()[blind, known[:, 3]]).mean() + 0.3
    assert torch.equal(m.sample(200, 4, 3, known=known), known)                 # no mask: everything is held
    same = [(m.sample(200, 4, 8, known=known, rewrite=q) == known).float().mean() for q in (0.02, 0.5, 0.99)]
    assert same[0] > 0.95 and same[0] > same[1] > same[2]                       # the higher, the deeper
    calls, inner = [], m.head
    m.head = lambda z, gamma, *args: calls.append(gamma[0]) or inner(z, gamma, *args)
    m.sample(200, 4, 8, known=known, rewrite=0.3)
    close(m.proposal.information(calls[0]) / m.proposal.entropy, 0.3, 1e-6)     # no step is spent above it
    half = m.sample(200, 4, 16, known=known, known_mask=held, rewrite=0.5)      # let go half way down
    assert 0.3 < (half == known)[held].float().mean() < 1


def test_temperature_and_steps(source):
    oracle = Oracle(*source)
    modes = [bigram_table(oracle.sample(500, 4, 16, temperature=T), 5) for T in (1.0, 0.5)]
    assert modes[1].max() > modes[0].max() + 0.03          # colder: fewer, likelier pairs
    m = random_model()
    known, held = torch.randint(29, (2, 8)), torch.arange(8) % 3 == 0
    for steps in (1, 2, 5):
        out = m.sample(2, 8, steps, known=known, known_mask=held.expand(2, 8))  # whatever the network says
        assert torch.equal(out[:, held], known[:, held]) and not torch.equal(out, known)
    calls, inner = [], m.head
    m.head = lambda *args, **kw: calls.append(0) or inner(*args, **kw)
    m.sample(2, 8, 5, solver="heun")
    assert len(calls) == 2 * 5 - 1


# --- learning --------------------------------------------------------------------------------------


def train(model, draw, steps, batch, lr, schedule_lr):
    """The bare loop: the training loop in common.py is not needed. Returns the mean of late metrics."""
    network, schedule = (group["params"] for group in model.param_groups())
    opt = torch.optim.Adam([dict(params=network, lr=lr), dict(params=schedule, lr=schedule_lr)])
    model.train()
    history = []
    for step in range(steps):
        loss, metrics = model.loss(dict(tokens=draw(batch), rows=common.Rows(0, step, 0, batch, batch)))
        opt.zero_grad()
        loss.backward()
        for params in (network, schedule):
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        model.after_step(step, torch.tensor(True))
        history.append(metrics)
    model.eval()
    return {k: torch.stack([m[k] for m in history[-200:]]).mean().item() for k in metrics}


def test_learning_a_source_of_known_entropy():
    """The bound falls towards the entropy of the source and stays above it."""
    L = 4
    pi, P, entropy = markov(4, L, seed=0)
    unigram = L * -(pi * pi.log()).sum().item()
    model = LangFlow(small(vocab=4, d_model=32, length=L, unigram_entropy=math.log(4), gate_init=0.5))
    tokens = chain_samples(pi, P, 2000, L)

    def bound():
        nll = model.eval().nll(tokens)["nll"]
        return nll.mean().item(), nll.std().item() / len(nll) ** 0.5

    before = bound()[0]
    train(model, lambda n: chain_samples(pi, P, n, L), 400, 64, 5e-3, 2e-2)
    after, error = bound()
    print(f"entropy {entropy:.3f} unigram {unigram:.3f} bound {before:.3f} -> {after:.3f} +- {error:.3f}")
    assert after < before - 0.5 and after < unigram - (unigram - entropy) / 3
    source = -chain_logp(pi, P, tokens).mean().item()                           # this sample's own entropy
    assert after > source - 4 * error


@pytest.mark.slow
def test_section_12_a_markov_source_and_the_three_ode_estimators():
    """Minutes: pytest -s --slow -k section_12. The bounds (chain, none, SDE) stay above the entropy, detached
    falls below chain; mean CE ends at entropy / 2 and the CE is a straight line in q."""
    L, V = 16, 16
    pi, P, entropy = markov(V, L, seed=0)
    model = LangFlow(small(vocab=V, cond_dim=32, length=L, gumbel_loc=2.0, unigram_entropy=math.log(V)))
    last = train(model, lambda n: chain_samples(pi, P, n, L), 1500, 64, 2e-3, 5e-3)
    print("\n", {k: round(v, 3) for k, v in last.items()}, "2 CE / entropy", 2 * last["ce"] / last["entropy"])
    tokens = chain_samples(pi, P, 512, L)
    figures = dict(true=-chain_logp(pi, P, tokens) / L)
    for name, options in (("sde", {}), *((mode, dict(likelihood="ode", divergence=mode))
                                         for mode in ("none", "chain", "detached"))):
        torch.manual_seed(1)                                    # the same eps and probes for all estimators
        figures[name] = model.nll(tokens, **options)["nll"].double() / L
    error = {k: ((v - figures["true"]).std() / len(tokens) ** 0.5).item() for k, v in figures.items()}
    print(f"  source {entropy / L:.3f} nats/token;", ", ".join(
        f"{k} {v.mean():.3f} +- {error[k]:.3f}" for k, v in figures.items()))
    E, q = model.codebook().detach(), (torch.arange(8) + 0.5) / 8
    x, curve = F.embedding(tokens, E), []
    for gamma in model.proposal.gamma_of(q).detach():
        level = gamma.expand(len(x))
        z = bc(alpha_sigma(level)[0]) * x + bc(alpha_sigma(level)[1]) * torch.randn_like(x)
        with torch.no_grad():
            curve.append([model.two_pass(z, level, E, mode, tokens)[1].mean().item()
                          for mode in ("none", "chain")])
    for a, (one, two) in zip(q.tolist(), curve):
        print(f"  q {a:.3f}  entropy q {a * last['entropy']:.3f}  CE in one pass {one:.3f}, in two {two:.3f}")
    for name in ("sde", "none", "chain"):
        assert (figures[name] - figures["true"]).mean() > -3 * error[name]
    gap = figures["chain"] - figures["detached"]
    assert gap.mean() > 3 * gap.std() / len(tokens) ** 0.5
    assert abs(last["ce"] / last["entropy"] * 2 - 1) < 0.05
    unit = F.normalize(E, dim=1)
    assert torch.cdist(unit, unit).topk(2, largest=False).values[:, 1].mean() > 0.5     # no collapse
