"""nfdm.py against the published numbers (float64), its identities, and a source of known entropy."""
import dataclasses
import math
import time
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import nfdm
from conftest import golden
from nfdm import NFDM, Config

G = golden("nfdm")
TOL = 1e-8                                  # float64 goldens, relative to the array's largest entry


def close(value, name, tol=TOL):
    want = G[name] if isinstance(name, str) else name
    value, want = torch.as_tensor(value).detach().double().squeeze(), want.detach().double().squeeze()
    assert value.shape == want.shape, (tuple(value.shape), tuple(want.shape))
    error = float((value - want).abs().max() / want.abs().max().clamp(min=1e-30))
    assert error < tol, f"{name if isinstance(name, str) else ''}: relative error {error:.1e}"


# --- networks that only the goldens need -------------------------------------------------------------


class ToyNet(nn.Module):
    """tanh mix over positions; with `forward_net` it returns (m, s, dm, ds) like nfdm.ForwardNet."""

    def __init__(self, w, forward_net=False):
        super().__init__()
        self.forward_net = forward_net
        for name, value in w.items():
            self.register_parameter(name, nn.Parameter(value.double()))

    def forward(self, x, t, tangent=True):
        h = torch.tanh(x @ self.Wa + t[:, None, None] * self.ba + self.ca)
        dh = (1 - h**2) * self.ba
        h, dh = h + 0.3 * h.mean(1, keepdim=True), dh + 0.3 * dh.mean(1, keepdim=True)
        out = h @ self.Wb + self.cb
        return (*out.chunk(2, -1), *(dh @ self.Wb).chunk(2, -1)) if self.forward_net else out


class BertLayer(nn.Module):
    def __init__(self, d, n_head, mlp):
        super().__init__()
        self.n_head = n_head
        lin = {"query": (d, d), "key": (d, d), "value": (d, d)}
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({k: nn.Linear(*v) for k, v in lin.items()}),
            "output": nn.ModuleDict({"dense": nn.Linear(d, d), "LayerNorm": nn.LayerNorm(d, eps=1e-12)})})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(d, mlp)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp, d), "LayerNorm": nn.LayerNorm(d, eps=1e-12)})

    def forward(self, h):
        q, k, v = (self.attention["self"][name](h).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                   for name in ("query", "key", "value"))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = self.attention["output"]["LayerNorm"](h + self.attention["output"]["dense"](a))
        return self.output["LayerNorm"](h + self.output["dense"](F.gelu(self.intermediate["dense"](h))))


class Bert(nn.Module):
    """The paper's predictor, published names: post-norm encoder, learned positions, tanh projections."""

    def __init__(self, d_embed, d, n_layer, n_head, mlp, positions, time_hidden):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(d_embed, time_hidden), nn.SiLU(), nn.Linear(time_hidden, d))
        self.input_up_proj = nn.Sequential(nn.Linear(d_embed, d), nn.Tanh(), nn.Linear(d, d))
        layers = nn.ModuleList(BertLayer(d, n_head, mlp) for _ in range(n_layer))
        self.input_transformers = nn.ModuleDict({"layer": layers})
        self.position_embeddings = nn.Embedding(positions, d)
        self.LayerNorm = nn.LayerNorm(d, eps=1e-12)
        self.output_down_proj = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d_embed))

    def forward(self, z, t):
        time = self.time_embed(nfdm.d_time_features(t, z.shape[-1], False)[0])[:, None]
        h = self.LayerNorm(self.input_up_proj(z) + self.position_embeddings.weight[:z.shape[1]] + time)
        for layer in self.input_transformers["layer"]:
            h = layer(h)
        return self.output_down_proj(h)


def part(prefix):
    return {k[len(prefix):]: v for k, v in G.items() if k.startswith(prefix)}


def layers(w, pattern):
    return 1 + max(int(k.split(pattern)[1].split(".")[0]) for k in w if pattern in k)


def ours(name):
    """Published parameter name -> ours."""
    tied = {"pred.model.word_embedding.weight": "embedding.weight", "pred.model.lm_head.bias": "bias"}
    for theirs, mine in (("affine.", "process."), ("gamma.", "process."), ("vol.model.", "volatility."),
                         ("pred.model.", "net."), ("t_proj.net.1", "t_proj")):
        name = tied.get(name, name).replace(theirs, mine)
    return name


def load(model, w):
    """Load published weights: all of the golden's must land somewhere, but the tied copy of E."""
    state = model.state_dict()
    mapped = {ours(k): v.double() for k, v in w.items() if k != "pred.model.lm_head.weight"}
    mapped["times.logits"] = state["times.logits"]
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in state.items()}
    model.load_state_dict(mapped)
    return model.eval()


def full(**keys):
    w = part("full/w/")
    V, De = w["pred.model.word_embedding.weight"].shape
    d, mlp = w["pred.model.input_transformers.layer.0.output.dense.weight"].shape
    sizes = (len(w[f"pred.model.{name}.weight"]) for name in ("position_embeddings", "time_embed.0"))
    net = Bert(De, d, layers(w, "input_transformers.layer."), 1, mlp, *sizes)
    length, H = w["affine.net.position_embeddings.weight"].shape
    cfg = Config(vocab=V, d_embed=De, length=length, fwd_dim=H, fwd_layers=layers(w, "affine.net.layers."),
                 fwd_heads=1, fwd_mlp=len(w["affine.net.layers.0.ffn.0.weight"]), **keys)
    model = load(NFDM(cfg, net=net).double(), w)
    # the weights do not tell the number of heads: the divisor that comes nearest to the golden's output
    x, z, t = (G[f"full/{name}"].double() for name in ("out/emb", "out/z", "in/t"))
    for blocks, width, output, want in (
            (model.process.net.layers, H, lambda: torch.cat(model.process.net(x, t)[:2], -1), "affine_net"),
            (net.input_transformers["layer"], d, lambda: net(z, t), "pred_net")):
        def error(n):
            for block in blocks:
                block.n_head = n
            with torch.no_grad():
                return float((output() - G[f"full/out/{want}"]).abs().max())
        error(min((n for n in (1, 2, 3, 4, 6, 8, 12, 16) if width % n == 0), key=error))
    return model


def toy(prefix="toy", **keys):
    w = part(f"{prefix}/w/")
    V, De = w["pred.model.word_embedding.weight"].shape
    pred = {k: v for k, v in part(f"{prefix}/w/pred.model.").items() if "." not in k}
    length = G[f"{prefix}/in/tokens"].shape[1]
    cfg = Config(**{**dict(vocab=V, d_embed=De, length=length, fwd_dim=8, fwd_heads=2), **keys})
    model = NFDM(cfg, net=ToyNet(pred)).double()
    if cfg.forward == "learned":
        model.process.net = ToyNet(part(f"{prefix}/w/affine.net."), True)
    return load(model, w)


def build(prefix, **keys):
    if prefix == "full":
        return full(**keys)
    return toy(prefix, **(dict(forward="sqrt") if prefix == "static" else {}), **keys)


def inputs(prefix):
    """tokens, t, (eps, eps0)."""
    eps = G[f"{prefix}/in/eps"].double(), G[f"{prefix}/in/eps0"].double()
    return G[f"{prefix}/in/tokens"], G[f"{prefix}/in/t"].double(), eps


def velocity(model, z, t):
    """f(z, t) of the generative probability flow."""
    path = model.process(model.predict(z, t), t)
    return nfdm.drift((z - path[0]) / path[1], path)


def hermite(n):
    """Nodes and weights [n] of E f(eps), eps ~ N(0,1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


# --- goldens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["full", "toy", "static"])
def test_values_of_one_training_pass_match_the_official_code(prefix):
    model, (tokens, t, (eps, eps0)), o = build(prefix), inputs(prefix), f"{prefix}/out/"
    x = model.embed(tokens)
    close(x, o + "emb")
    path = model.process(x, t)
    g2 = model.g2(t)
    z = path[0] + path[1] * eps
    x_hat = model.predict(z, t)
    path_hat = model.process(x_hat, t)
    for name, value in zip(("m", "s", "dm", "ds", "rm", "rs", "rdm", "rds"), path + path_hat):
        close(value, o + name)
    close(g2.sqrt(), o + "g")
    close(z, o + "z")
    close(x_hat, o + "xhat")
    eps_hat = (z - path_hat[0]) / path_hat[1]
    close(nfdm.drift(eps, path), o + "f_ode")
    close(nfdm.drift(eps_hat, path_hat), o + "r_ode")
    close(nfdm.drift(eps_hat, path_hat), o + "ode_drift")
    close(nfdm.drift(eps, path, g2), o + "f_sde")
    close(nfdm.drift(eps_hat, path_hat, g2), o + "r_sde")
    close(nfdm.drift(eps_hat, path_hat, g2), o + "sde_drift")
    close(nfdm.diffusion_element(eps, path, z, path_hat, g2), o + "loss_elem")
    rec = model.reconstruction(x, tokens, eps0, torch.ones(tokens.shape))[1]
    close(rec, o + "rec_tok")
    close(rec.mean(1), o + "elbo_rec_as_coded")     # their mean over tokens; the bound has the sum
    close(nfdm.nearest_rows(x_hat, model.embedding.weight), o + "xhat_clamped")
    close(model.process.prior(x), o + "elbo_prior", 1e-8 if prefix == "static" else 1)
    if prefix == "full":
        m, s, dm, ds = model.process.net(x, t)
        close(torch.cat([m, s], -1), o + "affine_net")
        close(torch.cat([dm, ds], -1), o + "affine_net_dt")
        close(model.net(z, t), o + "pred_net")
        close((x + 0.1 * eps0) @ model.embedding.weight.T + model.bias, o + "logits_z0")
        close(model.diffusion(x, t, torch.full_like(x, 0.5)), o + "elbo_diff_eps_half")
        close((x - x_hat) ** 2, o + "rescaled_mse_elem")
        for end, time in (("tiny", 1e-6), ("t1", 1.0), ("t0", 0.0)):
            mu, sigma, _, _ = model.process(x, torch.full_like(t, time))
            assert (mu - G[f"{o}m_{end}"]).abs().max() < 1e-12      # mu is exactly 0 at 1
            assert (sigma - G[f"{o}s_{end}"]).abs().max() < 1e-12   # at 0 theirs is [B,1,1]


@pytest.mark.parametrize("prefix", ["full", "toy", "static"])
def test_loss_and_every_published_gradient_match(prefix):
    # times given: p = 1 at the uniform start, so the loss is the published total plus the sampler's moment
    model, (tokens, t, noise) = build(prefix), inputs(prefix)
    d = G[f"{prefix}/out/diff_meanflat"].double()
    loss, metrics = model.loss(dict(tokens=tokens), t=t, noise=noise)
    close(loss - (d**2).mean(), f"{prefix}/out/total_uniform_t", 1e-8)
    close(metrics["rec"], G[f"{prefix}/out/rec_mean"].mean())
    close(metrics["diff"], d.mean() * noise[0].shape[-1])
    loss.backward()
    named = dict(model.named_parameters())
    for key, want in part(f"{prefix}/out/grad/").items():
        close(named[ours(key)].grad, want, 1e-12)   # seen: 5e-15; a fused norm gives 0.06 and more


def test_importance_weights_as_coded_and_paired():
    tokens, t, noise = inputs("full")
    for kind, want in (("as_coded", "training_step_as_coded"), ("paired", "total_paired_is")):
        model = full(is_weights=kind)
        model.times.logits.data = G["full/in/ts_logits"].double()
        close(model.times.density(t), "full/out/ts_prob")
        loss, _ = model.loss(dict(tokens=tokens), t=t, noise=noise)
        moment = ((G["full/out/diff_meanflat"].double() / G["full/out/ts_prob"].double()) ** 2).mean()
        close(loss if kind == "as_coded" else loss - moment, f"full/out/{want}", 1e-10)
        loss.backward()
        if kind == "as_coded":
            close(model.times.logits.grad, "full/out/ts_logits_grad_as_coded", 1e-10)
            close(model.embedding.weight.grad, "full/out/grad_emb_as_coded", 1e-10)


@pytest.mark.parametrize("prefix", ["full", "toy", "static"])
@pytest.mark.parametrize("sampler", ["ode", "sde", "marginal", "marginal_clamped"])
def test_sampler_paths_match_the_official_ones(prefix, sampler):
    name = f"{prefix}/out/{sampler}_path"
    if name not in G:
        pytest.skip("no such golden")
    model, noise = build(prefix), G[f"{prefix}/in/noise"].double()
    options = dict(sampler=sampler.split("_")[0], clamp="clamped" in sampler)
    with torch.no_grad():
        path = [G[f"{prefix}/in/z1"].double()]
        path += [z for z, _ in model.trajectory(path[0], len(noise), noise, **options)]
    close(torch.stack(path), name, 1e-6)
    tokens = common.greedy(path[-1], model.embedding.weight, model.bias)
    assert torch.equal(tokens, G.get(f"{prefix}/out/{sampler}_tokens", tokens))


@pytest.mark.parametrize("prefix", ["full", "toy", "static"])
def test_star_is_a_marginal_step_whose_net_is_told_the_next_time(prefix):
    model, noise = build(prefix), G[f"{prefix}/in/noise"].double()
    path, N = [G[f"{prefix}/in/z1"].double()], len(noise)
    with torch.no_grad():
        for i in range(N - 1):
            path.append(model.step(path[-1], 1 - (i + 1) / N, 1 - (i + 1) / N, noise[i])[0])
    close(torch.stack(path), f"{prefix}/out/star_path", 1e-6)
    tokens = common.greedy(path[-1], model.embedding.weight, model.bias)
    assert torch.equal(tokens, G.get(f"{prefix}/out/star_tokens", tokens))


def test_marginal_step_with_any_share_of_fresh_noise():
    model = toy()
    z1, noise = G["toy/in/z1"].double(), G["toy/in/noise"][0].double()
    key, = (key for key in G if key.startswith("toy/formula/ddim_sig2_"))
    t, s = (float(part[1:]) for part in key.split("_")[-2:])
    for k, name in ((float(G[key][0]), "refsched"), (0.0, "sig0"), (1.0, "sig1")):
        with torch.no_grad():
            close(model.step(z1, t, s, noise, k=k)[0], f"toy/formula/ddim_step_{name}")


def test_bound_sums_over_tokens_and_averages_over_times(monkeypatch):
    model, (tokens, _, (_, eps0)) = toy(), inputs("toy")
    x = model.embed(tokens)
    ts, eps = G["toy/in/elbo_t"].double(), G["toy/in/elbo_eps"].double()
    diff = torch.stack([model.diffusion(x, t.expand(len(x)), e).sum((1, 2)) for t, e in zip(ts, eps)])
    close(diff, "toy/formula/nelbo_diff_kb")
    rec = model.reconstruction(x, tokens, eps0, torch.ones(tokens.shape))[1].sum(1)
    close(rec, "toy/formula/nelbo_rec_sum")
    # nll itself, fed the same draws: eps0 first, then for each time a uniform and an eps
    draws, uniforms = iter([eps0, *eps]), iter([t * len(ts) - k for k, t in enumerate(ts)])
    monkeypatch.setattr(torch, "randn_like", lambda x: next(draws))
    monkeypatch.setattr(torch, "rand", lambda *a, **k: next(uniforms).expand(len(x)))
    out = model.nll(tokens, n_times=len(ts))
    close(out["nll"], "toy/formula/nelbo_seq")
    close(out["nll"].mean() / tokens.shape[1], "toy/formula/nelbo_nats_per_token")


def test_probability_flow_density_matches_runge_kutta_with_the_exact_divergence():
    model, (tokens, _, (_, eps0)) = toy(), inputs("toy")
    z0 = (model.embed(tokens) + 0.1 * eps0)[:1].detach()
    drift_key, = (key for key in G if key.startswith("toy/formula/ode_drift_at_z0_t"))
    t = torch.full((1,), float(drift_key.rpartition("_t")[2]), dtype=torch.float64)

    def field(z):
        return velocity(model, z, t)

    close(field(z0), drift_key)
    jacobian = torch.autograd.functional.jacobian(field, z0).reshape(z0.numel(), -1)
    close(jacobian.trace(), drift_key.replace("drift", "div"))
    close(model.log_density(z0, 16, t_min=0.001), "toy/formula/ode_logp_z0")
    # Rademacher probes estimate the same divergence: mean over many within 5 standard errors
    exact, rough = model.log_density(z0, 4), model.log_density(z0.expand(512, -1, -1), 4, probes=1)
    assert abs(rough.mean() - exact.mean()) < 5 * rough.std() / 512**0.5 + 1e-9


def test_ode_bound_is_the_sum_of_its_terms_and_close_to_the_exact_one():
    model = toy().double()
    tokens = inputs("toy")[0]
    torch.manual_seed(1)
    out = model.nll(tokens, likelihood="ode", ode_steps=8, probes=0)
    close(out["nll"], out["rec"] + out["log_q"] - out["log_p"])
    torch.manual_seed(1)
    assert model.describe_nll(likelihood="ode").startswith("ODE") and model.describe_nll() == "SDE bound"
    fine = model.nll(tokens, likelihood="ode", ode_steps=16, probes=0)
    close(out["nll"], fine["nll"], 2e-3)            # RK4: halving the step changes little


def test_fixed_schedules_and_their_derivatives():
    t = G["misc/t"].double()
    inner = (t > 0) & (t < 1)
    for name, process in (("sqrt", nfdm.Sqrt()), ("fmot", nfdm.Line(0.01))):
        for key, value in zip(("alpha", "sigma", "dalpha", "dsigma"), process.schedule(common.bc(t))):
            value, want = value.flatten(), G[f"misc/{name}/{key}"].double()
            # alpha of sqrt loses digits towards 1
            assert torch.allclose(value[inner], want[inner], rtol=1e-6, atol=1e-12), (name, key)
    g = nfdm.Sqrt().markov_g2(t).sqrt().flatten()
    assert torch.allclose(g[inner], G["misc/g_sqrtvol"].double()[inner], rtol=1e-4)
    close(small(forward="line", volatility="static").g2(t).sqrt(), "misc/g_staticvol")
    # the square root as a gamma: theirs is clamped close to t = 1
    t = G["misc/t_gamma"].double()
    inner = t < 0.999
    alpha, sigma, alpha_dot, sigma_dot = nfdm.Sqrt().schedule(common.bc(t[inner]))
    close(2 * (sigma / alpha).log(), G["misc/gamma_sqrt/g"][inner], 1e-6)
    close(2 * (sigma_dot / sigma - alpha_dot / alpha), G["misc/gamma_sqrt/dg"][inner], 1e-6)
    # float32 keeps alpha's digits up to t = 1, where 1 - sqrt(u) loses all but two
    t = torch.linspace(0.99, 1, 101)
    close(nfdm.Sqrt().schedule(t)[0], nfdm.Sqrt().schedule(t.double())[0], 1e-6)


def test_learned_gammas():
    t = common.bc(G["misc/t_gamma"].double())
    vdm = nfdm.VDM(hidden=len(G["misc/gamma_vdm/w/fc2.bias"]))
    vdm.load_state_dict(part("misc/gamma_vdm/w/"))
    for value, key in zip(vdm.double().gamma(t), ("g", "dg")):
        close(value, f"misc/gamma_vdm/{key}", 2e-5)                         # the official one is float32
    mulan = load_mulan("misc/mulan/w/")
    gamma, dot = mulan.gamma(t)
    close(gamma, "misc/mulan/g")
    close(official_dot(mulan, gamma, dot), "misc/mulan/dg")
    inner = common.bc(torch.linspace(0.05, 0.95, 10).double())
    numeric = (mulan.gamma(inner + 1e-6)[0] - mulan.gamma(inner - 1e-6)[0]) / 2e-6
    close(mulan.gamma(inner)[1], numeric, 1e-7)     # ours is the exact derivative, theirs is not


def load_mulan(prefix):
    w = part(prefix)
    mulan = nfdm.MuLAN(len(w["l1.bias"])).double()
    mulan.load_state_dict({k: v.double() for k, v in w.items()})
    return mulan


def official_dot(mulan, _, dot):
    """Their derivative from ours: the polynomial's 1e-3 t left out above and below, clamped at 1e-3."""
    h = F.silu(mulan.l2(F.silu(mulan.l1(torch.ones(1).double()))))
    a, b, c = mulan.l3_a(h), mulan.l3_b(h), 1e-3 + F.softplus(mulan.l3_c(h))
    P1 = (a * a / 5 + a * b / 2 + (b * b + 2 * a * c) / 3 + b * c + c * c + 1e-3)[:, None]
    span = mulan.ends[1] - mulan.ends[0]
    return (span * (dot * P1 / span - 1e-3) / (P1 - 1e-3)).clamp(min=1e-3)


def test_mulan_loss_is_the_general_loss():
    # with g^2 = sigma^2 gamma' the one loss of 4.1 gives the closed form of the official class
    tokens, t = G["mulan/in/tokens"], G["mulan/in/t"].double()
    model = toy("mulan", forward="mulan")
    exact = model.process.gamma
    model.process.gamma = lambda t: (exact(t)[0], official_dot(model.process, *exact(t)))
    x, eps = model.embed(tokens), G["mulan/in/eps"].double()
    close(model.process.gamma(common.bc(t))[1], "mulan/out/dgamma")
    close((-0.5 * model.process.gamma(common.bc(t))[0]).exp(), "mulan/out/exp_minus_half_gamma")
    close(model.diffusion(x, t, eps), "mulan/out/loss_elbo")
    path = model.process(x, t)
    x_hat = model.predict(path[0] + path[1] * eps, t)
    close(x_hat, "mulan/out/xhat")
    close((x - x_hat) ** 2, "mulan/out/loss_x_0_prediction")


def test_bucket_sampler_density_loss_and_gradient():
    times = nfdm.TimeSampler(len(G["misc/ts/logits"]))
    times.logits.data = G["misc/ts/logits"].double()
    p = times.density(G["misc/ts/t"].double())
    close(p, "misc/ts/prob")
    moment = (G["misc/ts/loss_in"].double() / p) ** 2
    close(moment, "misc/ts/sampler_loss")
    moment.mean().backward()
    close(times.logits.grad, "misc/ts/logits_grad")


def test_time_features():
    t = G["misc/temb/t"].double()
    close(nfdm.d_time_features(t, 16, False)[0], "misc/temb/dim16_f64")
    close(nfdm.d_time_features(t, 7, False)[0], "misc/temb/dim7_f64")
    value, slope = nfdm.d_time_features(t, 16, True)
    ahead, back = (nfdm.d_time_features(t + h, 16, False)[0] for h in (1e-7, -1e-7))
    numeric = (ahead - back) / 2e-7
    close(slope, numeric, 1e-5)


def test_muon_is_the_published_newton_schulz():
    ours = common.newton_schulz(G["misc/muon/grad"][None], torch.bfloat16, 1e-7)[0]
    close(ours, "misc/muon/ns5_bf16", 2e-2)


def test_float32_run_stays_within_the_published_gap():
    model, o = full().float(), "full/out32/"
    tokens, t, (eps, _) = inputs("full")
    x, t, eps = model.embed(tokens), t.float(), eps.float()
    path = model.process(x, t)
    z = path[0] + path[1] * eps
    x_hat = model.predict(z, t)
    path_hat = model.process(x_hat, t)
    reverse = nfdm.drift((z - path_hat[0]) / path_hat[1], path_hat, model.g2(t))
    for name, value, tol in (("m", path[0], 1e-6), ("s", path[1], 1e-6), ("z", z, 1e-6),
                             ("xhat", x_hat, 5e-6),
                             ("dm", path[2], 2e-5), ("ds", path[3], 2e-5), ("rdm", path_hat[2], 2e-5),
                             ("rds", path_hat[3], 2e-5), ("f_sde", nfdm.drift(eps, path, model.g2(t)), 2e-5),
                             ("r_sde", reverse, 2e-5), ("loss_elem", model.diffusion(x, t, eps), 2e-5)):
        close(value, "full/out/" + name, tol)
        close(value, o + name, 2 * tol)             # their own float32 error on top


# --- section 10: identities ------------------------------------------------------------------------------


def small(net=None, dtype=torch.float64, randomise=True, **keys):
    sizes = dict(vocab=7, d_embed=4, length=6, d_model=16, n_layer=1, n_head=2, cond_dim=8, fwd_dim=8,
                 fwd_layers=2, fwd_heads=2, fwd_mlp=16, fwd_dropout=0.0, unigram_entropy=1.9)
    cfg = Config(**{**sizes, **keys})
    model = NFDM(cfg, net=net).to(dtype)
    if randomise:                               # zero-initialised modulations would hide the time derivative
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, dtype=dtype) * (0.02 if p.shape == (100,) else 0.3))
    return model


def draws(model, B=3):
    x = torch.randn(B, model.cfg.length, model.cfg.d_embed, dtype=model.bias.dtype)
    return x, torch.rand(B, dtype=x.dtype) * 0.8 + 0.1, torch.randn_like(x)


def test_boundaries_are_exact():
    model = small()
    x, t, _ = draws(model)
    mu, sigma, _, _ = model.process(x, torch.ones_like(t))
    assert torch.equal(mu, torch.zeros_like(mu)) and torch.equal(sigma, torch.ones_like(sigma))
    mu, sigma, _, _ = model.process(x, torch.zeros_like(t))
    assert torch.equal(mu, x) and torch.allclose(sigma, torch.full_like(x, 0.1), rtol=1e-15)
    assert torch.equal(model.process.start(x)[0], x) and float(model.process.prior(x).abs().max()) == 0
    mu, sigma, _, _ = model.process(x, torch.full_like(t, 1e-6))
    assert (sigma - 0.1).abs().max() < 1e-5         # continuous at 0


@pytest.mark.parametrize("forward", nfdm.CHOICES["forward"])
def test_time_derivatives_of_every_process(forward):
    model = small(forward=forward)
    x, t, eps = draws(model)
    h = 1e-5
    ahead, back = model.process(x, t + h), model.process(x, t - h)
    path = model.process(x, t)
    numeric = ((ahead[0] + ahead[1] * eps) - (back[0] + back[1] * eps)) / (2 * h)
    # features of up to 1000 rad per unit t: the difference itself is good to h^2 (1000)^2 / 6
    close(path[2] + path[3] * eps, numeric, 2e-4 if forward == "learned" else 1e-7)


def test_oracle_predictor_has_no_loss_and_its_ode_ends_at_the_data():
    class Oracle(nn.Module):
        def forward(self, z, t):
            return self.x

    model = small(net=Oracle(), stabilize=False)
    with torch.no_grad():
        model.process.net.time_embed[0].weight.mul_(0.0)     # smooth in t, so that 64 steps of RK4 are enough
    x, t, eps = draws(model)
    model.net.x = x
    assert model.diffusion(x, t, eps).abs().max() < 1e-24
    with torch.no_grad():
        z1 = torch.randn_like(x)

        def f(z, t):
            time = torch.full((1,), t, dtype=z.dtype)
            return velocity(model, z, time)

        z, h = z1, 1 / 64
        for i in range(64):
            s = 1 - i * h
            k1 = f(z, s)
            k2 = f(z - h / 2 * k1, s - h / 2)
            k3 = f(z - h / 2 * k2, s - h / 2)
            k4 = f(z - h * k3, s - h)
            z = z - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        assert (z - (x + 0.1 * z1)).abs().max() < 1e-6
        errors = []
        for n in (50, 500):
            *_, (z, _) = model.trajectory(z1, n, sampler="ode")
            errors.append(float((z - (x + 0.1 * z1)).abs().max()))
        assert 7 < errors[0] / errors[1] < 13       # first order
        *_, (z, _) = model.trajectory(z1, 5)
        assert torch.equal(z, x)


@pytest.mark.parametrize("forward", ["frozen", "line", "sqrt", "vdm", "mulan"])
def test_markov_volatility_gives_the_closed_form(forward):
    # element = -SNR'/2 (x - x_hat)^2: what Diffusion-LM and VDM optimise, from the general expression
    model = small(forward=forward, volatility="markov")
    x, t, eps = draws(model)
    path = model.process(x, t)
    z = path[0] + path[1] * eps
    x_hat = model.predict(z, t)
    alpha, sigma, alpha_dot, sigma_dot = model.process.schedule(common.bc(t))
    snr_dot = 2 * alpha * alpha_dot / sigma**2 - 2 * alpha**2 * sigma_dot / sigma**3
    close(model.diffusion(x, t, eps), -0.5 * snr_dot * (x - x_hat) ** 2, 1e-11)
    g2 = torch.full_like(alpha, 1.7)                # any other g: the linear-Gaussian form of property 4
    factor = alpha_dot - alpha * sigma_dot / sigma - g2 * alpha / (2 * sigma**2)
    element = nfdm.diffusion_element(eps, path, z, model.process(x_hat, t), g2)
    close(element, (factor * (x - x_hat)) ** 2 / (2 * g2), 1e-11)
    # property 5: 2 |difference of velocities / difference of scores|, the best g^2, is the Markovian one
    eps_hat = (z - alpha * x_hat) / sigma
    de = nfdm.drift(eps, path) - nfdm.drift(eps_hat, model.process(x_hat, t))
    close(2 * (de * sigma / (eps_hat - eps)).abs(), model.g2(t).expand_as(x), 1e-8)


def test_quadratic_expansion_and_the_optimal_volatility():
    model = small()
    x, t, eps = draws(model, 64)
    t = t[:1].expand(64)
    path = model.process(x, t)
    z = path[0] + path[1] * eps
    path_hat = model.process(model.predict(z, t), t)
    eps_hat = (z - path_hat[0]) / path_hat[1]
    de, ds = nfdm.drift(eps, path) - nfdm.drift(eps_hat, path_hat), -eps / path[1] + eps_hat / path_hat[1]
    for g2 in (0.3, 1.0, 5.0):
        element = nfdm.diffusion_element(eps, path, z, path_hat, g2)
        close(element, de**2 / (2 * g2) - de * ds / 2 + g2 * ds**2 / 8, 1e-9)
    a, b, c = (de**2).mean(), (ds**2).mean(), (de * ds).mean()
    best = 2 * (a / b).sqrt()
    below, at, above = (nfdm.diffusion_element(eps, path, z, path_hat, best * f).mean()
                        for f in (0.9, 1.0, 1.1))
    assert at < min(below, above)
    close(at, 0.5 * (a * b).sqrt() - c / 2, 1e-9)


def test_bound_of_the_exact_predictor_is_the_entropy():
    # property 7: two tokens at +-1, line process, its Markovian g, mean tanh(alpha z / sigma^2): ln 2.
    # Quadrature over log SNR = 2 ln r: alpha / sigma = r where t = (1 - delta r) / (1 + r (1 - delta))
    delta, process = 0.01, nfdm.Line(0.01)
    lam = torch.linspace(math.log(1e-7), 2 * math.log(1 / delta), 4001, dtype=torch.float64)
    r = (lam / 2).exp()
    t = (1 - delta * r) / (1 + r * (1 - delta))
    dt = r / 2 * (delta * (1 + r * (1 - delta)) + (1 - delta * r) * (1 - delta)) / (1 + r * (1 - delta)) ** 2
    eps, weights = hermite(160)
    x = torch.ones(len(t), 1, len(eps), dtype=torch.float64)                # by symmetry x = +1 is enough
    path = process(x, t)
    z = path[0] + path[1] * eps
    x_hat = torch.tanh(path[0] / x * z / path[1] ** 2)
    element = nfdm.diffusion_element(eps.expand_as(x), path, z, process(x_hat, t), process.markov_g2(t))
    bound = torch.trapezoid((element * weights).sum((1, 2)) * dt, lam)
    assert abs(float(bound) - math.log(2)) < 1e-5


def test_bucket_sampler_inverts_its_distribution_and_paired_weights_are_unbiased():
    times = nfdm.TimeSampler(10)
    assert torch.allclose(times.density(torch.rand(50)), torch.ones(50))
    times.logits.data = torch.randn(10).double()
    u = (torch.arange(200_000).double() + 0.5) / 200_000
    t = times.draw(u)
    p = times.density(t).detach()
    assert (t.diff() > 0).all() and abs(float((1 / p).mean()) - 1) < 1e-4   # the density integrates to 1
    d = (3 * t).sin() + 2
    exact = (1 - math.cos(3)) / 3 + 2
    assert abs(float((d / p).mean()) - exact) < 1e-4                        # what loss does with `paired`
    assert abs(float(d.mean() * (1 / p).mean()) - exact) > 1e-2             # and with `as_coded`
    empty = nfdm.TimeSampler(4)                     # buckets of no weight are never drawn, at the ends either
    empty.logits.data = torch.tensor([-800.0, 0.0, 1.0, -800.0])
    drawn = empty.draw(torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64))
    assert (drawn >= 0.25).all() and (drawn < 0.75).all() and (empty.density(drawn) > 0).all()
    # property 8: samples held fixed, the gradient of the moment is twice that of the integral of d^2 / p
    logits = times.logits.detach().clone().requires_grad_()

    def density(t):
        return 10 * logits.softmax(0)[(t * 10).long()]

    moment, = torch.autograd.grad(((d / density(t)) ** 2).mean(), logits)
    second, = torch.autograd.grad((((3 * u).sin() + 2) ** 2 / density(u)).mean(), logits)
    assert torch.allclose(moment, 2 * second, rtol=1e-3, atol=1e-4)


def test_as_coded_is_a_product_of_global_means_whatever_the_number_of_ranks():
    model = small(is_weights="as_coded")
    tokens = torch.randint(0, 7, (4, 6))
    noise = torch.randn(2, 4, 6, 4, dtype=torch.float64)
    whole, _ = model.loss(dict(tokens=tokens, rows=common.Rows(3, 5, 0, 4, 4)), noise=tuple(noise))
    half = 0
    for i in (0, 2):
        batch = dict(tokens=tokens[i:i + 2], rows=common.Rows(3, 5, i, 2, 4))
        half += model.loss(batch, noise=tuple(noise[:, i:i + 2]))[0] / 2
    close(half, whole, 1e-12)


def finite_difference_error(model):
    """Largest relative error of the diffusion term's gradient over the forward net, each along itself."""
    tokens, (_, t, eps) = torch.randint(0, 7, (3, 6)), draws(model)

    def objective():
        return model.diffusion(model.embed(tokens), t, eps).mean()

    model.zero_grad()
    objective().backward()
    worst = 0.0
    for p in model.process.net.parameters():
        direction, h, values = p.grad / p.grad.norm(), 1e-5, []
        with torch.no_grad():
            for sign in (1, -2):
                p += sign * h * direction
                values.append(objective())
            p += h * direction
        worst = max(worst, abs(float((values[0] - values[1]) / (2 * h) / p.grad.norm()) - 1))
    return worst


def fused_norm(h, dh, eps=1e-6):
    """The trap: value and 1/std from the fused kernel; autograd sees no gradient through the saved 1/std."""
    n, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], None, None, eps)
    if dh is None:
        return n, None
    return n, (dh - dh.mean(-1, keepdim=True) - n * (n * dh).mean(-1, keepdim=True)) * rstd.detach()


def test_gradients_are_right_and_a_fused_norm_would_be_wrong(monkeypatch):
    torch.manual_seed(4)
    model = small()
    assert finite_difference_error(model) < 1e-5
    monkeypatch.setattr(nfdm, "d_norm", fused_norm)
    assert finite_difference_error(model) > 1e-2


def test_dual_numbers_equal_double_backward_and_forward_mode():
    model = small()
    x, t, eps = draws(model)
    net = model.process.net

    def value(t):
        m, s, _, _ = net(x, t, tangent=False)
        return torch.cat([m, s], -1)

    m, s, dm, ds = net(x, t)
    close(torch.cat([m, s], -1), value(t), 1e-14)
    double = torch.autograd.functional.jvp(value, t, torch.ones_like(t), create_graph=True)[1]
    forward = torch.func.jvp(value, (t,), (torch.ones_like(t),))[1]
    for other in (double, forward):
        close(torch.cat([dm, ds], -1), other, 1e-12)
    v = torch.randn_like(double)
    ours = torch.autograd.grad((torch.cat([dm, ds], -1) * v).sum(), list(net.parameters()), allow_unused=True)
    theirs = torch.autograd.grad((double * v).sum(), list(net.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs):
        close(a if a is not None else torch.zeros(1), b if b is not None else torch.zeros(1), 1e-11)


def test_at_the_start_the_network_does_not_know_the_time():
    model = small(randomise=False)
    x, t, _ = draws(model)
    m, s, dm, ds = model.process.net(x, t)
    assert not dm.any() and not ds.any()
    assert torch.equal(m, model.process.net(x, (t + 0.1) % 1)[0])
    assert torch.allclose(model.g2(t), torch.ones(3, 1, 1, dtype=torch.float64))        # g = 1


def test_sde_sampler_with_the_oracle_has_the_marginals_of_the_process():
    class Oracle(nn.Module):
        def forward(self, z, t):
            return self.x

    model = small(net=Oracle(), stabilize=False, randomise=False, length=2, d_embed=2, fwd_layers=1)
    n, steps = 2000, 120
    x = torch.tensor([[[1.0, -0.5], [0.3, 2.0]]], dtype=torch.float64).expand(n, 2, 2)
    model.net.x = x
    with torch.no_grad():
        start = torch.randn(n, 2, 2, dtype=torch.float64)
        for i, (z, _) in enumerate(model.trajectory(start, steps, sampler="sde"), 1):
            if i in (60, 96):
                mu, sigma, _, _ = model.process(x[:1], torch.tensor([1 - i / steps], dtype=torch.float64))
                error = (z.mean(0) - mu[0]).abs() / (sigma[0] / n**0.5)
                assert error.max() < 6, error       # 5 sigma and the Euler bias
                assert (z.std(0) / sigma[0] - 1).abs().max() < 0.08


def test_every_parameter_learns_and_padding_or_rows_do_not_mix():
    model = small(muon_lr=1e-3).train()
    tokens = torch.randint(0, 7, (3, 6))
    loss, metrics = model.loss(dict(tokens=tokens))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(not v.requires_grad and v.ndim == 0 for v in metrics.values())
    groups = model.param_groups()
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    assert len(groups) == 3 and len(groups[2]["params"]) == 4
    x, t, eps = draws(model)
    a, b = model.diffusion(x, t, eps), model.diffusion(x[:1], t[:1], eps[:1])
    close(a[:1], b, 1e-12)                          # jvp over t is per row only because rows do not mix


@pytest.mark.parametrize("forward", nfdm.CHOICES["forward"])
def test_one_loss_bound_and_sampler_serve_every_process(forward):
    model = small(dtype=torch.float32, forward=forward, randomise=False).train()
    tokens = torch.randint(0, 7, (4, 6))
    loss, _ = model.loss(dict(tokens=tokens))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    out = model.eval().nll(tokens)
    assert out["nll"].isfinite().all() and (out["prior"] >= 0).all()
    for sampler in ("ode", "marginal"):
        assert model.sample(2, 6, 4, sampler=sampler).shape == (2, 6)


def test_dropout_uses_one_mask_for_value_and_tangent():
    h = torch.randn(4, 5, 6)
    a, b = nfdm.d_dropout(h, 2 * h, 0.5)
    assert torch.equal(2 * a, b) and (a == 0).any()


def test_known_positions_are_kept_and_the_rest_is_sampled():
    model = small(dtype=torch.float32)
    known = torch.randint(0, 7, (5, 6))
    mask = torch.tensor([True, True, False, False, True, False]).expand(5, 6)
    seen = []
    for sampler in ("marginal", "ode", "sde"):
        out = model.sample(5, 6, 4, known=known, known_mask=mask, sampler=sampler, k=0.5,
                           watch=lambda i, tokens: seen.append((i, tokens)))
        assert torch.equal(out[mask], known[mask]) and out.shape == (5, 6)
    x, hold = model.embedding(known).detach(), mask[..., None]
    with torch.no_grad():       # the latent itself goes to the known vectors, and the others' paths see them
        ends = [list(model.trajectory(x.roll(1, 0), 3, torch.zeros(3, *x.shape), hold=(h, hold)))[-1][0]
                for h in (x, x + 1)]
    assert torch.equal(ends[0][mask], x[mask]) and not torch.allclose(ends[0][~mask], ends[1][~mask])
    assert [i for i, _ in seen] == [1, 2, 3, 4] * 3
    assert all(torch.equal(tokens[mask], known[mask]) for _, tokens in seen)


def test_compiles_without_graph_breaks():
    model = small(dtype=torch.float32)
    x, t, _ = draws(model)
    net = model.process.net
    want = net(x, t)
    for layer in [*net.layers, net.mean_head, net.logvar_head]:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    got = net(x, t)
    got[2].sum().backward()
    for a, b in zip(got, want):
        close(a, b, 1e-5)


# --- learning, bad input ---------------------------------------------------------------------------------


def markov(V=4, L=4):
    """Sticky chain over V symbols: exact entropy of a row in nats and a sampler of rows."""
    P = torch.full((V, V), 0.3 / (V - 1)) + torch.eye(V) * (0.7 - 0.3 / (V - 1))
    rate = -(P[0] * P[0].log()).sum()

    def rows(n):
        out = [torch.randint(0, V, (n,))]
        for _ in range(L - 1):
            out.append(torch.multinomial(P[out[-1]], 1)[:, 0])
        return torch.stack(out, 1)

    return float(math.log(V) + (L - 1) * rate), rows


def fit(model, rows, steps, batch, lr):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        loss, _ = model.loss(dict(tokens=rows(batch)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p is not model.times.logits], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 30) * (1 - step / steps)
        optimizer.step()


def test_bound_falls_and_stays_above_the_entropy():
    entropy, rows = markov()
    torch.manual_seed(1)
    model = small(dtype=torch.float32, randomise=False, vocab=4, length=4, d_model=32, gate_init=0.5,
                  cond_dim=32, fwd_layers=1)
    test = rows(512)
    before = float(model.nll(test)["nll"].mean())
    fit(model, rows, 160, 64, 6e-3)
    nll = model.eval().nll(test, n_times=16)["nll"]
    after, error = float(nll.mean()), float(nll.std()) / 512**0.5
    assert entropy - 4 * error < after < 0.5 * before, (before, after, error, entropy)


@pytest.mark.parametrize("keys", [
    dict(forward="circle"), dict(is_weights="both"), dict(volatility="markov"), dict(delta=0.0),
    dict(rec_weight=-1.0), dict(fwd_heads=3), dict(fwd_heads=0), dict(volatility="none")])
def test_bad_configuration_is_refused_in_one_line(keys):
    with pytest.raises(common.UserError) as error:
        small(**keys)
    assert "\n" not in str(error.value)


def test_bad_input_is_refused_in_one_line():
    model = small(dtype=torch.float32)
    bad = torch.full((2, 6), 7)
    for call in (lambda: model.loss(dict(tokens=bad)), lambda: model.nll(bad), lambda: model.sample(2, 9, 4),
                 lambda: model.sample(2, 6, 4, sampler="heun"), lambda: model.sample(2, 6, 4, k=1.5),
                 lambda: model.sample(2, 6, 0), lambda: model.nll(bad % 7, likelihood="exact"),
                 lambda: model.nll(bad % 7, n_times=0)):
        with pytest.raises(common.UserError) as error:
            call()
        assert "\n" not in str(error.value)
    model.volatility.layers[6].bias.data.fill_(math.nan)
    for call in (lambda: model.sample(2, 6, 4, sampler="sde"), lambda: model.nll(bad % 7)):
        with pytest.raises(common.UserError, match="volatility"):
            call()
    assert model.sample(2, 6, 4).shape == (2, 6)    # marginal does without g
    with pytest.raises(common.UserError, match="length"):
        small(dtype=torch.float32, forward="mulan").sample(2, 5, 4)     # a gamma for each position, no fewer
    line = small(dtype=torch.float32, forward="line", volatility="markov")
    with pytest.raises(common.UserError, match="markov"):
        line.sample(2, 6, 4, sampler="sde")         # g is infinite where alpha = 0


def test_presets_use_known_keys():
    keys = {f.name for f in dataclasses.fields(Config)}
    for name, preset in nfdm.PRESETS.items():
        assert set(preset) <= keys, (name, set(preset) - keys)


def test_diagnostics_warn_of_a_collapse_and_count_padding():
    model = small(dtype=torch.float32, d_embed=7)
    tokens, mask = torch.randint(0, 7, (8, 6)), torch.ones(8, 6, dtype=torch.bool)
    mask[:, 3:] = False
    batch = dict(tokens=tokens, mask=mask)
    corpus = types.SimpleNamespace(n_rows=lambda split: 8, rows=lambda split, at: batch)
    with torch.no_grad():
        model.embedding.weight.copy_(10 * torch.eye(7))     # far apart: z_0 tells its token
    torch.manual_seed(3)
    lines = model.diagnostics(corpus)
    assert not any("WARNING" in line for line in lines)
    torch.manual_seed(3)
    per_token, per_position = float(lines[0].split()[2]), float(model.nll(tokens)["nll"].mean() / 6)
    assert abs(per_token / per_position - 2) < 1e-3     # half of the positions are PAD
    with torch.no_grad():
        model.embedding.weight.zero_()                      # every token has the same vector: unigrams
    assert any("WARNING" in line for line in model.diagnostics(corpus))
    assert float(model.loss(dict(tokens=tokens))[1]["collapse"]) > 0.9


@pytest.mark.slow
def test_dual_numbers_cost_less_than_double_backward():
    # published width; the official route is autograd's double-backward jvp over the same operations
    net = nfdm.ForwardNet(128, 64, 256, 5, 8, 1024, 0.0)
    x, t, v = torch.randn(8, 64, 128, requires_grad=True), torch.rand(8), torch.randn(8, 64, 512)

    def value(t):
        return torch.cat(net(x, t, tangent=False)[:2], -1)

    def double(create_graph=True):
        return torch.cat(torch.autograd.functional.jvp(value, t, torch.ones_like(t), create_graph), -1)

    def dual():
        return torch.cat(net(x, t), -1)

    def saved(f):
        seen = {}

        def pack(y):
            seen[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes() / 1e6
            return y

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            keep = f()                                      # alive while counting: no storage is used twice
        return sum(seen.values()) if keep.requires_grad else 0

    def seconds(f):
        start = time.process_time()
        f()
        return time.process_time() - start

    runs = {"dual": lambda: (dual() * v).sum().backward(), "double": lambda: (double() * v).sum().backward(),
            "dual, no grad": torch.no_grad()(dual), "double, no grad": lambda: double(False)}
    times = {name: [] for name in runs}
    for _ in range(8):
        for name, f in runs.items():
            times[name].append(seconds(f))
    ms = {name: 1e3 * float(np.median(all[1:])) for name, all in times.items()}
    print("\n", {k: round(v, 1) for k, v in ms.items()}, "ms; saved MB", saved(dual), saved(double))
    assert ms["dual"] < 0.95 * ms["double"] and ms["dual, no grad"] < 0.95 * ms["double, no grad"]
    assert saved(dual) < saved(double)
