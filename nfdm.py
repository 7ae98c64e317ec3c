"""NFDM for text: embedding-space diffusion whose forward (noising) process is learned.

Paper: "Towards Latent Diffusion Suitable For Text" (Midavaine, Naesseth, Bartosh; arXiv:2601.16220), built on
"Neural Flow Diffusion Models" (arXiv:2404.12940). Diffused: x = E[tokens], a De-wide vector per token. t = 0 is data.

  forward   z_t = mu(x,t) + sigma(x,t) eps,  mu = (1-t) x + t(1-t) m(x,t),  log sigma = (1-t) ln delta + t(1-t) s(x,t).
            m and s are a transformer over the sentence: each token, dimension and sentence has its own path, with
            exact ends (mu = x, sigma = delta at 0; N(0, I) at 1, so the prior term of the bound is exactly 0).
  training  x_hat = (1-t) z_t + (t + 0.01) net(z_t, t) takes the place of x in the same process; the bound is
            sum over tokens of CE at t = 0  +  E_t || drift(x) - drift(x_hat) ||^2 / (2 g(t)^2),
            drift = mu_dot + sigma_dot eps + g^2 eps / (2 sigma).  m, s, net, E, g are trained on this one number.
  sampling  z_1 ~ N(0, I); t > s: x_hat, eps_hat = (z_t - mu(x_hat,t)) / sigma(x_hat,t), then
            z_s = mu(x_hat,s) + sigma(x_hat,s) (sqrt(1-k) eps_hat + sqrt(k) n);  tokens = argmax(z_0 E^T + b).

The time derivatives of m and s are carried as dual numbers (section 4): one pass, no double backward, and no fused
layer norm, whose saved statistics are constants to autograd: the gradients of this loss would be wrong, silently.

Differs from the paper: the predictor is the shared DiT (theirs: a BERT-base trained from scratch; `net=` takes any
module); g = 1 at the start (theirs is a lottery); times are stratified. Differs from the official code: importance
weights meet their own samples (--is_weights=as_coded restores theirs), the bound sums reconstruction over tokens
(theirs: the mean). Not here: the older NFDM-G network, MuLAN's VAE context, the `rescaled` second stage. The paper's
full text was not available: the sources are the official code, its notebooks and the base paper.

    python nfdm.py                                   # train `tiny`, end with the bound and samples
    python nfdm.py --forward=frozen                  # a fixed process instead: frozen, line, sqrt, vdm, mulan
    python nfdm.py sample --steps=64 --prompt="The " # hold a prefix; --k=0 is deterministic, --sampler=ode|sde
"""
import dataclasses
import math
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UserError, bc

# --- 1. configuration and presets ------------------------------------------------------------------

FORWARD = ("learned", "frozen", "line", "sqrt", "vdm", "mulan")
STABILIZER = 0.01                   # share of the network in x_hat at t = 0 (official code, `stabilize: true`)


@dataclasses.dataclass
class Config(common.Config):
    forward: str = "learned"        # forward process: learned, frozen (m = s = 0), line, sqrt, vdm, mulan
    d_embed: int = 128              # width De of the diffused embeddings
    delta: float = 0.1              # standard deviation of z_0 around the embedding (learned, frozen, line)
    fwd_dim: int = 256              # width H of the forward net; 2 d_embed as published
    fwd_layers: int = 5             # blocks of the forward net
    fwd_heads: int = 8              # its attention heads
    fwd_mlp: int = 1024             # hidden width of its MLPs
    fwd_dropout: float = 0.01       # its dropout
    volatility: str = "auto"        # g(t): learned, markov, static; auto = learned, markov for sqrt, vdm, mulan
    stabilize: bool = True          # x_hat = (1-t) z + (t+0.01) net(z, t); false: x_hat = net(z, t)
    objective: str = "elbo"         # diffusion term: elbo, or x0 = (x - x_hat)^2 (Diffusion-LM)
    buckets: int = 100              # equal buckets of the learned density of training times
    is_weights: str = "paired"      # importance weights: paired (unbiased) or as_coded (official broadcast)
    rec_weight: Optional[float] = None  # reconstruction's weight, 1 = the true bound; none = d_embed, as published
    muon_lr: float = 0.0            # Muon's learning rate for the predictor's matrices; 0 = Adam for all


# Published, but for the trunk (BERT-base's size here): NFDM-G-AdaLN. Theirs decays by 1 - step / total and so drops by
# 1.25% where the warm-up ends; precision was float32 with TF32.
_roc = dict(data="roc", length=64, d_embed=128, d_model=768, n_layer=12, n_head=12, cond_dim=128, dropout=0.1,
            batch=512, steps=800_000, lr=1e-4, muon_lr=2e-3, warmup=10_000, lr_schedule="linear", clip=0.3,
            clip_from=20_000, ema=0.9999, ema_warmup=False, log_every=100, val_every=5_000, save_every=5_000,
            sample_every=20_000)
_small = dict(d_embed=16, fwd_dim=32, fwd_layers=2, fwd_heads=2, fwd_mlp=64, fwd_dropout=0.0, length=64, d_model=64,
              n_layer=3, n_head=4, cond_dim=64, gate_init=0.5, batch=32, lr=2e-3, warmup=100, lr_schedule="linear",
              ema=0.998)
PRESETS = {
    "tiny": dict(_small, steps=1600),
    "roc": _roc,
    # Not published (their BPE text8 in windows of 28 was never run): the common text8 protocol, the networks of roc.
    "text8": dict(_roc, data="text8", tokenizer="char", length=256, steps=1_000_000),
    # A Markov source of known entropy, nats per token of 6: learned against frozen and line at --steps=16000.
    "toy": dict(_small, data="markov8", length=6, d_embed=4, d_model=64, n_layer=3, batch=256, steps=4000,
                rec_weight=16.0),
    "bench10-cpu": dict(_small, steps=2500),
    "bench10": dict(data="wikitext103", tokenizer="gpt2", length=256, fwd_layers=3, d_model=384, n_layer=6, n_head=6,
                    cond_dim=128, batch=64, steps=8000, lr=3e-4, muon_lr=2e-3, warmup=500, lr_schedule="linear",
                    ema=0.999),
}


# --- 2. fixed forward processes --------------------------------------------------------------------
# One interface for all six: process(x [B,L,De], t [B] or [1]) -> (mu, sigma, mu_dot, sigma_dot), broadcastable to x;
# start(x) -> (mu, sigma) at t = 0; prior(x) [B] = KL(q(z_1|x) || N(0,I)) in nats. The loss knows nothing else.


class Fixed(nn.Module):
    """z_t = alpha(t) x + sigma(t) eps; a subclass gives schedule(t [B,1,1]) -> alpha, sigma and their derivatives."""

    def forward(self, x, t, tangent=True):
        alpha, sigma, alpha_dot, sigma_dot = self.schedule(bc(t))
        return alpha * x, sigma, alpha_dot * x, sigma_dot

    def start(self, x):
        return self(x, x.new_zeros(1))[:2]

    def prior(self, x):
        mu, sigma, _, _ = self(x, x.new_ones(1))
        return 0.5 * (mu**2 + sigma**2 - 1 - 2 * sigma.log()).sum((1, 2))

    def markov_g2(self, t):
        """g^2 [B,1,1] (MuLAN [B,L,1]) of a Markov forward SDE: 2 sigma sigma_dot - 2 sigma^2 alpha_dot / alpha."""
        alpha, sigma, alpha_dot, sigma_dot = self.schedule(bc(t))
        return 2 * sigma * sigma_dot - 2 * sigma**2 * alpha_dot / alpha


class Frozen(Fixed):
    """The learned process with m = s = 0: alpha = 1 - t, sigma = delta^(1-t)."""

    def __init__(self, delta):
        super().__init__()
        self.delta = delta

    def schedule(self, t):
        sigma = self.delta ** (1 - t)
        return 1 - t, sigma, -torch.ones_like(t), -math.log(self.delta) * sigma


class Line(Frozen):
    """Flow-matching line: alpha = 1 - t, sigma = t + delta (1-t). Published with delta = 0.01 and static g."""

    def schedule(self, t):
        return 1 - t, t + self.delta * (1 - t), -torch.ones_like(t), torch.full_like(t, 1 - self.delta)


class Sqrt(Fixed):
    """Diffusion-LM's square root: alpha^2 = 1 - sqrt(u), sigma^2 = sqrt(u), u = t + 1e-4 (0.99 - t)."""

    def schedule(self, t):
        u, u_dot = t + 1e-4 * (0.99 - t), 1 - 1e-4
        alpha = torch.sqrt(1 - u.sqrt())
        return alpha, u**0.25, -u_dot / (4 * u.sqrt() * alpha), 0.25 * u_dot * u**-0.75


class VariancePreserving(Fixed):
    """alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma); a subclass gives gamma(t) -> (gamma, gamma_dot)."""

    def schedule(self, t):
        gamma, gamma_dot = self.gamma(t)
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        return alpha, sigma, -0.5 * alpha * sigma**2 * gamma_dot, 0.5 * sigma * alpha**2 * gamma_dot


class VDM(VariancePreserving):
    """One scalar monotone gamma(t) (VDM): l + W3 sigmoid(W2 l + b2), l = W1 t + b1, weights through softplus."""

    def __init__(self, gamma_0=-10.0, gamma_1=10.0, hidden=1024):
        super().__init__()
        self.ends = gamma_0, gamma_1
        self.fc1, self.fc2, self.fc3 = nn.Linear(1, 1), nn.Linear(1, hidden), nn.Linear(hidden, 1)

    def raw(self, t):
        """[n, 1] -> unscaled gamma and its derivative [n, 1]."""
        w1, w2, w3 = (F.softplus(fc.weight) for fc in (self.fc1, self.fc2, self.fc3))
        line = F.linear(t, w1, self.fc1.bias)
        s = torch.sigmoid(F.linear(line, w2, self.fc2.bias))                          # [n, hidden]
        return line + F.linear(s, w3, self.fc3.bias), w1 * (1 + F.linear(s * (1 - s) * w2.T, w3))

    def gamma(self, t):
        y, y_dot = self.raw(torch.cat([t.new_tensor([[0.0], [1.0]]), t.reshape(-1, 1)]))
        scale = (self.ends[1] - self.ends[0]) / (y[1] - y[0])
        return (self.ends[0] + (y[2:] - y[0]) * scale).view(t.shape), (y_dot[2:] * scale).view(t.shape)


class MuLAN(VariancePreserving):
    """A gamma per position (MuLAN without its VAE context): monotone fifth-degree polynomials, [B,1,1] -> [B,L,1].

    The official derivative leaves out the ridge of the polynomial; `as_coded` gives theirs, for comparison.
    """

    def __init__(self, length, gamma_0=-10.0, gamma_1=10.0, as_coded=False):
        super().__init__()
        self.ends, self.as_coded = (gamma_0, gamma_1), as_coded
        self.l1, self.l2 = nn.Linear(1, length), nn.Linear(length, length)
        self.l3_a, self.l3_b, self.l3_c = (nn.Linear(length, length) for _ in range(3))

    def gamma(self, t):
        h = F.silu(self.l2(F.silu(self.l1(t.new_ones(1)))))
        a, b, c = self.l3_a(h), self.l3_b(h), 1e-3 + F.softplus(self.l3_c(h))         # [L] each
        a, b, c, t = a[:, None], b[:, None], c[:, None], t.expand(-1, len(a), 1)      # [L,1], t [B,L,1]
        span, ridge = self.ends[1] - self.ends[0], 1e-3

        def P(t):                   # integral of (a t^2 + b t + c)^2 + ridge
            return (a * a * t**5 / 5 + a * b * t**4 / 2 + (b * b + 2 * a * c) * t**3 / 3 + b * c * t**2
                    + (c * c + ridge) * t)

        slope, total = (a * t**2 + b * t + c) ** 2, P(torch.ones_like(a))
        dot = span * (slope + ridge) / total
        if self.as_coded:
            dot = (span * slope / (total - ridge)).clamp(min=1e-3)
        return self.ends[0] + span * P(t) / total, dot


# --- 3. volatility and training times --------------------------------------------------------------


class Volatility(nn.Module):
    """g(t) = softplus(MLP(t)), one scalar for all positions and dimensions; returns g^2 [B,1,1].

    differs from the paper: the last layer starts at 0, with g = 1. Its init gave g(0.5) = 0.03 or 0.9 by seed, and
    the loss goes with 1 / g^2.
    """

    def __init__(self, hidden=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.SELU(), nn.Linear(hidden, hidden), nn.SELU(),
                                    nn.Linear(hidden, hidden), nn.SELU(), nn.Linear(hidden, 1))
        for layer in self.layers[0:5:2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer.in_features == 1 else "relu")
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.layers[6].weight)
        nn.init.constant_(self.layers[6].bias, math.log(math.e - 1))                  # softplus^-1(1)

    def forward(self, t):
        return bc(F.softplus(self.layers(t[:, None]))[:, 0]) ** 2


def static_g2(t):
    """Fixed alternative g^2 = 20 sigmoid(20 t - 10), [B,1,1] (official code, StaticVolatility)."""
    return bc(20 * torch.sigmoid(20 * t - 10))


class TimeSampler(nn.Module):
    """Piecewise constant density of training times: pi = softmax(logits), p(t) = n pi[bucket of t].

    Trained by the second moment of the estimator, mean((d/p)^2) with d held fixed: at rest p(t) ~ sqrt(E[d^2 | t]).
    """

    def __init__(self, buckets=100):
        super().__init__()
        self.logits = nn.Parameter(torch.ones(buckets))

    def density(self, t):
        n = len(self.logits)
        return n * self.logits.softmax(0)[(t.double() * n).long().clamp(0, n - 1)]

    @torch.no_grad()
    def draw(self, u):
        """Inverse distribution function: stratified u [B] in (0,1), float64 -> stratified t [B] in (0,1)."""
        pi = self.logits.double().softmax(0)
        cdf = pi.cumsum(0)
        i = torch.searchsorted(cdf, u.contiguous()).clamp(max=len(pi) - 1)
        return ((i + (u - cdf[i] + pi[i]) / pi[i]) / len(pi)).clamp(1e-6, 1 - 1e-6)


# --- 4. the forward net, in dual numbers -----------------------------------------------------------
# A dual number is a pair (h, dh): a value and its derivative in t; dh = None is an exact zero that costs nothing. Each
# operation maps pair to pair: one pass gives m, s and their time derivatives, and ordinary backward differentiates both.
# Elementwise functions and softmax have symmetric Jacobians, so their fused, differentiable backward kernels ARE the
# tangents. At the published width forward + backward costs 0.81x of the official double backward, 0.63x without grad.
#
# The norm must be written out. A derivative taken through a fused layer norm reuses its saved mean and 1/std, which
# autograd treats as constants: values and tangents come out right, the gradients of the weights do not (0.06 to 0.8
# relative, pytorch issue 175754). Double backward, the official route, has the same defect.

_aten = torch.ops.aten


def d_linear(linear, h, dh):
    if dh is None:
        return linear(h), None
    return linear(h), F.linear(dh, linear.weight)


def d_gelu(h, dh):
    return F.gelu(h), None if dh is None else _aten.gelu_backward(dh, h)


def d_silu(h, dh):
    gate = torch.sigmoid(h)         # written out: silu_backward has no derivative; [B, 4H], never [B, L, 4H]
    return h * gate, None if dh is None else dh * gate * (1 + h * (1 - gate))


def d_relu(h, dh):
    return F.relu(h), None if dh is None else dh * (h > 0)


def d_softmax(h, dh):
    p = h.softmax(-1)
    return p, None if dh is None else _aten._softmax_backward_data(dh, p, -1, p.dtype)


def d_norm(h, dh, eps=1e-6):
    """(h - mean) / sqrt(var + eps) over the last axis, elementary operations only."""
    h = h - h.mean(-1, keepdim=True)
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    n = h * rstd
    if dh is None:
        return n, None
    return n, (dh - dh.mean(-1, keepdim=True) - n * (n * dh).mean(-1, keepdim=True)) * rstd


def d_affine(h, dh, shift, scale, dshift, dscale):
    """h (1 + scale) + shift with shift, scale [B,1,.] functions of t."""
    if dshift is None:
        return h * (1 + scale) + shift, None
    dy = h * dscale + dshift
    return h * (1 + scale) + shift, dy if dh is None else dy + dh * (1 + scale)


def d_dropout(h, dh, p):
    """One mask for value and tangent."""
    if not p:
        return h, dh
    mask = F.dropout(torch.ones_like(h), p)
    return h * mask, None if dh is None else dh * mask


def d_chunk(y, dy, n):
    """Split [B, n H] into n values and n tangents [B,1,H]."""
    values = y[:, None].chunk(n, dim=-1)
    return values, [None] * n if dy is None else dy[:, None].chunk(n, dim=-1)


def d_time_features(t, n, tangent):
    """cos, sin of 1000 t f_k with f_k = 10000^(-2k/n), and their derivatives; [B] -> [B, n], an odd n ends in 0."""
    k = torch.arange(n // 2, device=t.device, dtype=torch.float64)
    omega = 1000 * torch.exp(-math.log(10000) / (n // 2) * k)
    cos, sin = (t[:, None] * omega).cos(), (t[:, None] * omega).sin()       # float64: angles reach 1000
    value, slope = torch.cat([cos, sin], -1), torch.cat([-omega * sin, omega * cos], -1)
    return F.pad(value, (0, n % 2)).to(t.dtype), F.pad(slope, (0, n % 2)).to(t.dtype) if tangent else None


class ForwardBlock(nn.Module):
    """Pre-norm block without gates; shift and scale of its norms come from silu(time) and are zero at the start."""
    compile_me = True

    def __init__(self, H, n_head, mlp, dropout):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.attn = nn.MultiheadAttention(H, n_head, batch_first=True)      # its weights and init; SDPA has no tangent
        self.ffn = nn.Sequential(nn.Linear(H, mlp), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp, H))
        self.t_proj = nn.Linear(4 * H, 4 * H)
        nn.init.zeros_(self.t_proj.weight)
        nn.init.zeros_(self.t_proj.bias)

    def attend(self, h, dh, p_drop):
        """Multi-head self-attention (h, dh) [B,L,H]; dS = dq k^T + q dk^T, dO = dP v + P dv."""
        def heads(y):                                                       # [B,L,3H] -> 3 x [B,heads,L,d]
            return y.unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind(0)

        def merge(y):
            return y.transpose(1, 2).flatten(2)

        W, root = self.attn.in_proj_weight, (h.shape[-1] // self.n_head) ** -0.5
        q, k, v = heads(F.linear(h, W, self.attn.in_proj_bias))
        q = q * root
        scores, dscores = q @ k.mT, None
        if dh is not None:
            dq, dk, dv = heads(F.linear(dh, W))
            dscores = (dq * root) @ k.mT + q @ dk.mT
        P, dP = d_dropout(*d_softmax(scores, dscores), p_drop)              # [B,heads,L,L]
        out, dout = merge(P @ v), None if dh is None else merge(dP @ v + P @ dv)
        return d_linear(self.attn.out_proj, out, dout)

    def forward(self, h, dh, te, dte):
        """h [B,L,H] and tangent; te = silu(time vector) [B,4H] and tangent."""
        (s1, c1, s2, c2), (ds1, dc1, ds2, dc2) = d_chunk(*d_linear(self.t_proj, te, dte), 4)
        p_drop = self.dropout if self.training else 0.0
        y, dy = self.attend(*d_affine(*d_norm(h, dh), s1, c1, ds1, dc1), p_drop)
        h, dh = h + y, dy if dh is None else dh + dy
        y, dy = d_linear(self.ffn[0], *d_affine(*d_norm(h, dh), s2, c2, ds2, dc2))
        y, dy = d_linear(self.ffn[3], *d_dropout(*d_gelu(y, dy), p_drop))
        return h + y, None if dy is None else dh + dy


class Head(nn.Module):
    """film(lin2 relu(film(lin1 h))): film(h; beta, g) = (1 + 1.5 tanh(g / 1.5)) h + beta, zero at the start."""
    compile_me = True

    def __init__(self, H, out):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(H, H), nn.Linear(H, out)
        self.film1, self.film2 = nn.Linear(4 * H, 2 * H), nn.Linear(4 * H, 2 * out)
        for film in (self.film1, self.film2):
            nn.init.zeros_(film.weight)
            nn.init.zeros_(film.bias)

    def forward(self, h, dh, te, dte):
        for linear, film in ((self.lin1, self.film1), (self.lin2, self.film2)):
            h, dh = d_linear(linear, *(d_relu(h, dh) if linear is self.lin2 else (h, dh)))
            (beta, g), (dbeta, dg) = d_chunk(*d_linear(film, te, dte), 2)
            squash = torch.tanh(g / 1.5)
            h, dh = d_affine(h, dh, beta, 1.5 * squash, dbeta, None if dg is None else (1 - squash**2) * dg)
        return h, dh


class ForwardNet(nn.Module):
    """m(x, t) and s(x, t) [B,L,De] with their time derivatives: the network of NFDM-G-AdaLN, parameter names theirs."""

    def __init__(self, d_embed, length, H, n_layer, n_head, mlp, dropout):
        super().__init__()
        if H % n_head:
            raise UserError(f"--fwd_dim={H} is not a multiple of --fwd_heads={n_head}: change one of them")
        self.dropout = dropout
        self.input_proj = nn.Sequential(nn.Linear(d_embed, H), nn.Tanh(), nn.Linear(H, H))
        self.time_embed = nn.Sequential(nn.Linear(d_embed, 4 * H), nn.SiLU(), nn.Linear(4 * H, 4 * H))
        self.position_embeddings = nn.Embedding(length, H)
        self.layer_norm = nn.LayerNorm(H)           # the one fused norm: t has not entered yet
        self.layers = nn.ModuleList(ForwardBlock(H, n_head, mlp, dropout) for _ in range(n_layer))
        self.mean_head, self.logvar_head = Head(H, d_embed), Head(H, d_embed)

    def forward(self, x, t, tangent=True):
        """x [B,L,De], t [B] (or [1]: the time path runs once) -> m, s, dm/dt, ds/dt; None, None without `tangent`."""
        te, dte = d_time_features(t, x.shape[-1], tangent)
        te, dte = d_linear(self.time_embed[2], *d_silu(*d_linear(self.time_embed[0], te, dte)))
        ae, dae = d_silu(te, dte)
        h = self.layer_norm(self.input_proj(x) + self.position_embeddings.weight[:x.shape[1]])
        h, dh = F.dropout(h, self.dropout, self.training), None
        for layer in self.layers:
            h, dh = layer(h, dh, ae, dae)
        m, dm = self.mean_head(h, dh, te, dte)
        s, ds = self.logvar_head(h, dh, te, dte)        # a log standard deviation, whatever its published name
        return m, s, dm, ds


class Learned(nn.Module):
    """mu = (1-t) x + t(1-t) m(x,t), log sigma = (1-t) ln delta + t(1-t) s(x,t) (NFDM, Gaussian form)."""

    def __init__(self, delta, net):
        super().__init__()
        self.delta, self.net = delta, net

    def forward(self, x, t, tangent=True):
        m, s, dm, ds = self.net(x, t, tangent)
        t, log_delta = bc(t), math.log(self.delta)
        w, w_dot = t * (1 - t), 1 - 2 * t
        mu, sigma = (1 - t) * x + w * m, torch.exp((1 - t) * log_delta + w * s)
        if not tangent:
            return mu, sigma, None, None
        return mu, sigma, w_dot * m + w * dm - x, sigma * (w_dot * s + w * ds - log_delta)

    def start(self, x):
        return x, x.new_full((1, 1, 1), self.delta)

    def prior(self, x):
        return x.new_zeros(len(x))


# --- 5. the loss terms, as pure functions ----------------------------------------------------------


def velocity(z, path):
    """d z/dt along fixed noise, and that noise: eps = (z - mu) / sigma, f = mu_dot + sigma_dot eps."""
    mu, sigma, mu_dot, sigma_dot = path
    eps = (z - mu) / sigma
    return mu_dot + sigma_dot * eps, eps


def backward_drift(f, eps, sigma, g2):
    """Drift of the reverse-time SDE with the same marginals: f - g^2/2 score, score = -eps / sigma."""
    return f + 0.5 * g2 * eps / sigma


def diffusion_element(eps, path, z, path_hat, g2):
    """(drift(x) - drift(x_hat))^2 / (2 g^2) per element [B,L,De] in nats (base paper's code; its text prints g^2/2).

    path = process(x), path_hat = process(x_hat): the reverse drift uses the PREDICTED variance too.
    """
    _, sigma, mu_dot, sigma_dot = path
    f_hat, eps_hat = velocity(z, path_hat)
    q = (mu_dot + sigma_dot * eps) - f_hat + 0.5 * g2 * (eps / sigma - eps_hat / path_hat[1])
    return q * q / (2 * g2)


def importance_weighted(d, p, is_weights, mean_inverse_p):
    """Mean of d [B] over t ~ p, without gradient to p. paired: mean(d / p), unbiased. as_coded: the official code divides
    [B] by [B,1,1], which broadcasts to mean(d) * mean(1/p): in effect it trains on t ~ p without correction."""
    return (d / p.detach()).mean() if is_weights == "paired" else d.mean() * mean_inverse_p.detach()


def nearest_rows(x, E):
    """Row of E [V,De] nearest to each x [...,De] in L2 (Diffusion-LM's rounding, "clamping")."""
    d2 = E.square().sum(-1) - 2 * x @ E.T           # + |x|^2, the same for every row
    return E[d2.argmin(-1)]


# --- 6. the model ----------------------------------------------------------------------------------


class Predictor(nn.Module):
    """net(z [B,L,De], t [B]) -> [B,L,De]: the published tanh input projection, then the shared DiT; time times 1000."""

    def __init__(self, cfg):
        super().__init__()
        self.up = nn.Sequential(nn.Linear(cfg.d_embed, cfg.d_model), nn.Tanh(), nn.Linear(cfg.d_model, cfg.d_model))
        self.dit = common.DiT(cfg.d_model, cfg.n_layer, cfg.n_head, cfg.cond_dim, cfg.mlp_ratio, cfg.dropout,
                              length=cfg.length, out=cfg.d_embed, gate_init=cfg.gate_init)

    def forward(self, z, t):
        return self.dit.project(self.dit(self.up(z), self.dit.cond(1000 * t.expand(len(z)))))


class NFDM(nn.Module):
    log_keys = ("diff", "rec")

    def __init__(self, cfg, net=None):
        super().__init__()
        for key, allowed in (("forward", FORWARD), ("volatility", ("auto", "learned", "markov", "static")),
                             ("is_weights", ("paired", "as_coded")), ("objective", ("elbo", "x0"))):
            if getattr(cfg, key) not in allowed:
                raise UserError(f"--{key}={getattr(cfg, key)} is not one of {', '.join(allowed)}")
        if not 0 < cfg.delta < 1 or (cfg.rec_weight or 0) < 0:
            raise UserError(f"--delta={cfg.delta} --rec_weight={cfg.rec_weight}: delta in (0, 1), the weight not negative")
        self.cfg, length = cfg, cfg.length
        self.rec_weight = cfg.d_embed if cfg.rec_weight is None else cfg.rec_weight
        self.embedding = nn.Embedding(cfg.vocab, cfg.d_embed)       # N(0,1), used raw; also the decoder's matrix
        self.bias = nn.Parameter(torch.empty(cfg.vocab).uniform_(-1, 1) * cfg.d_embed**-0.5)
        if cfg.forward == "learned":
            net_f = ForwardNet(cfg.d_embed, length, cfg.fwd_dim, cfg.fwd_layers, cfg.fwd_heads, cfg.fwd_mlp, cfg.fwd_dropout)
            self.process = Learned(cfg.delta, net_f)
        else:
            self.process = {"frozen": lambda: Frozen(cfg.delta), "line": lambda: Line(cfg.delta), "sqrt": Sqrt,
                            "vdm": VDM, "mulan": lambda: MuLAN(length)}[cfg.forward]()
        self.kind = cfg.volatility
        if self.kind == "auto":
            self.kind = "markov" if cfg.forward in ("sqrt", "vdm", "mulan") else "learned"
        if self.kind == "markov" and cfg.forward == "learned":
            raise UserError("--volatility=markov has no closed form for a learned process: use learned or static")
        if self.kind == "learned":
            self.volatility = Volatility()
        self.times = TimeSampler(cfg.buckets)
        self.net = Predictor(cfg) if net is None else net

    def g2(self, t):
        """Squared volatility at t [B], [B,1,1] (markov MuLAN: [B,L,1])."""
        if self.kind == "learned":
            return self.volatility(t)
        return static_g2(t) if self.kind == "static" else self.process.markov_g2(t)

    def embed(self, tokens):
        """x = E[tokens] [B,L,De]. The check would wait for a GPU; there data.py has made it when opening the file."""
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.bias):
            raise UserError(f"token id {int(tokens.max())} is outside the model's vocabulary of {len(self.bias)}: "
                            "the corpus has more symbols than its file says, or another tokenizer")
        return self.embedding(tokens)

    def predict(self, z, t):
        """x_hat(z, t) [B,L,De] in float32 (or better): near t = 0 only 1% of the network's rounding error is left."""
        u = self.net(z, t)
        return (1 - bc(t)) * z + (bc(t) + STABILIZER) * u if self.cfg.stabilize else u

    def reconstruction(self, x, tokens, eps0, weight):
        """(sum of weight * CE, CE [B,L] detached) of the decoder softmax(z_0 E^T + b) at z_0 = mu(x,0) + sigma(x,0) eps0."""
        mu, sigma = self.process.start(x)
        return common.token_ce(mu + sigma * eps0, self.embedding.weight, self.bias, tokens, weight)

    def diffusion(self, x, t, eps, objective="elbo"):
        """Diffusion term per element [B,L,De] at t [B] with noise eps like x: nats, or for x0 the squared distance."""
        path = self.process(x, t)
        z = path[0] + path[1] * eps
        x_hat = self.predict(z, t)
        if objective == "x0":
            return (x - x_hat) ** 2
        return diffusion_element(eps, path, z, self.process(x_hat, t), self.g2(t))

    def loss(self, batch, t=None, noise=None):
        """Objective on the published scale: mean over positions AND dimensions of the diffusion term, + rec_weight / De
        times the mean reconstruction, + the sampler's second moment. t [B]; noise = (eps, eps0), both [B,L,De].

        The published rec_weight = De counts reconstruction De times against the bound: that keeps the embeddings from
        shrinking until the decoder knows unigrams only. PAD is diffused and scored like any token.
        """
        tokens = batch["tokens"]
        B, L = tokens.shape
        x = self.embed(tokens)                                                        # [B,L,De]
        eps, eps0 = (torch.randn_like(x), torch.randn_like(x)) if noise is None else noise
        # 1. times from the learned density, stratified over the global batch
        rows = None if t is not None else batch.get("rows") or common.Rows.default(B)
        if t is None:
            t = self.times.draw(rows.uniform(device=x.device)).to(x.dtype)
        p = self.times.density(t)                                                     # [B]
        # 2. diffusion and reconstruction
        d = self.diffusion(x, t, eps, self.cfg.objective).mean((1, 2))                # [B]
        rec, nll = self.reconstruction(x, tokens, eps0, x.new_full((B, L), 1 / (B * L)))
        # 3. importance weights; the last term trains only the sampler
        mean_inverse_p = (1 / p).mean()
        if self.cfg.is_weights == "as_coded" and rows is not None:      # a product of means: of the GLOBAL batch
            u = dataclasses.replace(rows, first=0, n_local=rows.n_global).uniform(device=x.device)
            mean_inverse_p = (1 / self.times.density(self.times.draw(u))).mean()
        diff = importance_weighted(d, p, self.cfg.is_weights, mean_inverse_p)
        loss = diff + self.rec_weight / x.shape[-1] * rec + ((d.detach() / p) ** 2).mean()
        rec = nll.mean()                # collapse near 1: the decoder knows no more than unigrams
        return loss, dict(diff=(d / p).detach().mean() * x.shape[-1], rec=rec,
                          collapse=rec / max(self.cfg.unigram_entropy, 1e-8))

    def param_groups(self):
        """Muon on the attention and MLP matrices of the predictor's blocks, Adam on the rest (official NFDM runs).

        differs from the official code: the sampler's gradient goes with d^2 and is clipped by itself, where theirs
        shrinks everyone's step when a batch is unlucky (as_coded keeps that); Q, K and V are one matrix to Muon.
        """
        clip = "main" if self.cfg.is_weights == "as_coded" else "sampler"
        muon = [p for name, p in self.net.named_parameters()
                if self.cfg.muon_lr and "blocks." in name and p.ndim == 2 and "adaLN" not in name]
        taken = {id(p) for p in muon} | {id(self.times.logits)}
        groups = [dict(params=[p for p in self.parameters() if id(p) not in taken], lr=self.cfg.lr),
                  dict(params=[self.times.logits], lr=self.cfg.lr, weight_decay=0.0, clip=clip)]
        if muon:
            groups.append(dict(params=muon, lr=self.cfg.muon_lr, optimizer=common.Muon, bias_correction=False,
                               ns_dtype=torch.bfloat16, eps=1e-7, weight_decay=0.0))
        return groups

    def flops_per_token(self, train):
        """Predictor and decoder (3x in training), and the forward net's passes with their counted cost: two dual ones in
        training (6.04x a plain forward each), one plain a `marginal` step."""
        c, H = self.cfg, self.cfg.fwd_dim
        net = common.trunk_flops(c.d_model, c.n_layer, c.length, c.mlp_ratio) + 2 * c.d_model * (c.d_model + 2 * c.d_embed)
        forward = 2 * (3 * c.d_embed * H + 3 * H * H) + c.fwd_layers * (8 * H * H + 4 * H * c.fwd_mlp + 4 * c.length * H)
        if c.forward != "learned":
            forward = 0
        return 3 * (net + 2 * c.vocab * c.d_embed) + 2 * 6.04 * forward if train else net + forward

    # --- 7. likelihood -----------------------------------------------------------------------------

    @torch.no_grad()
    def nll(self, tokens, mask=None, likelihood="sde", n_times=8, ode_steps=32, probes=1):
        """Upper bound on -log P(tokens), nats per sequence [B], over all positions (PAD is a token of this model).

        sde: reconstruction + prior + diffusion at `n_times` stratified times t = (k + u) / K.
        ode: -log p(tokens|z_0) + log q(z_0|x) - log p_ODE(z_0) at one z_0, Runge-Kutta 4 in `ode_steps` steps; the
        divergence by `probes` Rademacher vectors, 0 = exact (L De backward passes).
        """
        if likelihood not in ("sde", "ode"):
            raise UserError(f"--likelihood={likelihood} is not one of sde, ode")
        x = self.embed(tokens)
        B, L, De = x.shape
        eps0 = torch.randn_like(x)
        rec = self.reconstruction(x, tokens, eps0, x.new_ones(B, L))[1].sum(1)
        if likelihood == "ode":
            mu, sigma = self.process.start(x)
            log_q = -(0.5 * eps0**2 + 0.5 * math.log(2 * math.pi) + sigma.log()).sum((1, 2))
            log_p = self.log_density(mu + sigma * eps0, ode_steps, probes=probes)
            return dict(nll=rec + log_q - log_p, rec=rec, log_q=log_q, log_p=log_p)
        diff = torch.zeros_like(rec)
        for k in range(n_times):
            t = (k + torch.rand(B, device=x.device, dtype=x.dtype)) / n_times
            self.require_finite_volatility(t)
            diff += self.diffusion(x, t, torch.randn_like(x)).sum((1, 2)) / n_times
        prior = self.process.prior(x)
        return dict(nll=rec + diff + prior, rec=rec, diff=diff, prior=prior)

    def clean(self, z, t, hold=None, clamp=False):
        """The samplers' x_hat(z, t), rounded to its nearest embedding if `clamp`; hold = (x, mask [B,L,1]) puts in the
        clean vectors of known tokens, which the process sees too: mu and sigma of the other positions follow them."""
        x_hat = self.predict(z, t)
        if clamp:
            x_hat = nearest_rows(x_hat, self.embedding.weight)
        return x_hat if hold is None else torch.where(hold[1], hold[0], x_hat)

    def log_density(self, z, steps, t_min=0.0, probes=0):
        """log p_ODE(z) [B] of a latent at t_min: integrate dz/dt = f with its divergence to t = 1, classical RK4."""
        n = z[0].numel()
        vs = [torch.randint(0, 2, z.shape, device=z.device).to(z.dtype) * 2 - 1 for _ in range(probes)]
        if not probes:
            vs = torch.eye(n, device=z.device, dtype=z.dtype).view(n, 1, *z.shape[1:])

        def field(z, t):            # f and div f: the sum of v^T J v over unit vectors v, its mean over Rademacher v
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                time = z.new_full((1,), t)
                f, _ = velocity(z, self.process(self.clean(z, time), time))
                div = sum((v * torch.autograd.grad(f, z, v.expand_as(f), retain_graph=True)[0]).sum((1, 2)) for v in vs)
            return f.detach(), div / max(1, probes)

        log_det, h = z.new_zeros(len(z)), (1 - t_min) / steps
        for i in range(steps):
            t = t_min + i * h
            k1, d1 = field(z, t)
            k2, d2 = field(z + h / 2 * k1, t + h / 2)
            k3, d3 = field(z + h / 2 * k2, t + h / 2)
            k4, d4 = field(z + h * k3, t + h)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            log_det = log_det + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        return log_det - 0.5 * (z**2).sum((1, 2)) - 0.5 * n * math.log(2 * math.pi)

    # --- 8. samplers -------------------------------------------------------------------------------

    def require_finite_volatility(self, t):
        g2 = self.g2(t)
        if not bool((torch.isfinite(g2) & (g2 > 0)).all()):
            raise UserError(f"volatility g(t) not finite and positive in t = {float(t.min()):.3g} .. {float(t.max()):.3g}: the "
                            "run has diverged, or a markov g ends at alpha = 0 (--sampler=ode|marginal need no g)")

    def step(self, z, t, s, noise, sampler="marginal", k=1.0, hold=None, clamp=False):
        """One step from z_t to z_s, 1 >= t > s >= 0 (floats), noise like z. Returns (z_s, x_hat).

        ode: Euler on f.  sde: Euler-Maruyama on the backward drift.  marginal (DDIM family): x_hat noised to time s with
        a share k of fresh noise; k = 0 is deterministic, k = 1 (published) all fresh and needs the process at s only.
        It ends in the mean at s = 0; after ode and sde the decoder handles what is left of the noise.
        """
        time = z.new_full((1,), t)
        x_hat = self.clean(z, time, hold, clamp)
        if sampler == "marginal":
            if s == 0:
                return self.process.start(x_hat)[0], x_hat
            mu, sigma, _, _ = self.process(x_hat, z.new_full((1,), s), tangent=False)
            if k < 1:
                mu_t, sigma_t, _, _ = self.process(x_hat, time, tangent=False)
                noise = math.sqrt(1 - k) * (z - mu_t) / sigma_t + math.sqrt(k) * noise
            return mu + sigma * noise, x_hat
        path = self.process(x_hat, time)
        f, eps = velocity(z, path)
        if sampler == "ode":
            return z - (t - s) * f, x_hat
        g2 = self.g2(time)
        return z - (t - s) * backward_drift(f, eps, path[1], g2) + (g2 * (t - s)).sqrt() * noise, x_hat

    def trajectory(self, z, steps, noise=None, **options):
        """Yields (z_s, x_hat) for the `steps` equal steps from t = 1 to 0; noise [steps, *z.shape], drawn if absent."""
        for i in range(steps):
            draw = torch.randn_like(z) if noise is None else noise[i]
            z, x_hat = self.step(z, 1 - i / steps, 1 - (i + 1) / steps, draw, **options)
            yield z, x_hat

    @torch.no_grad()
    def sample(self, n, length, steps, known=None, known_mask=None, watch=None, sampler="marginal", k=1.0, clamp=False):
        """Token ids [n, length]: argmax of the decoder at z_0. Options as in `step`.

        known [n,length] with known_mask (True = given) completes or infills: given positions enter as clean vectors at
        every step and the rest is drawn around them, an approximation of the model's posterior. What control over the
        path could add (a process trained or adjusted for the constraint) is not shown here, nor in the paper's code.
        """
        if sampler not in ("ode", "sde", "marginal"):
            raise UserError(f"--sampler={sampler} is not one of ode, sde, marginal")
        if not 0 <= k <= 1 or steps < 1:
            raise UserError(f"--k={k} must lie in 0 .. 1 and --steps={steps} be at least 1")
        if length > self.cfg.length:
            raise UserError(f"{length} tokens asked for, the model knows positions up to --length={self.cfg.length}")
        z = torch.randn(n, length, self.cfg.d_embed, device=self.bias.device, dtype=self.bias.dtype)
        if sampler == "sde":
            self.require_finite_volatility(torch.arange(1, steps + 1, device=z.device, dtype=z.dtype) / steps)
        hold = None if known is None else (self.embed(known), known_mask[..., None])

        def decode(x):
            tokens = common.greedy(x, self.embedding.weight, self.bias)
            return tokens if known is None else torch.where(known_mask, known, tokens)

        for i, (z, x_hat) in enumerate(self.trajectory(z, steps, sampler=sampler, k=k, hold=hold, clamp=clamp)):
            if watch is not None:
                watch(i + 1, decode(x_hat))
        return decode(z)

    # --- 9. what to look at --------------------------------------------------------------------------

    @torch.no_grad()
    def diagnostics(self, corpus):
        """Lines for `eval`: the bound per position and per non-PAD token, collapse, embeddings, g, times, sigma."""
        n = min(64, corpus.n_rows("val"))
        batch = corpus.rows("val", list(range(n)))
        tokens = batch["tokens"].to(self.bias.device)
        terms = {key: float(value.double().sum()) / tokens.numel() for key, value in self.nll(tokens).items()}
        real = int(batch["mask"].sum()) if "mask" in batch else tokens.numel()
        lines = [f"{n} rows: {terms['nll']:.3f} nats/position, {terms['nll'] * tokens.numel() / real:.3f} nats/non-PAD token"
                 " | per position: " + ", ".join(f"{k} {terms[k]:.4f}" for k in ("diff", "rec", "prior"))]
        if terms["rec"] > 0.5 * self.cfg.unigram_entropy > 0:
            lines.append(f"WARNING: reconstruction {terms['rec']:.2f} is near the unigram entropy {self.cfg.unigram_entropy:.2f}: "
                         "the run has collapsed, z_0 says nothing about its token. Raise --rec_weight or lower --lr")
        grid = torch.linspace(0.005, 0.995, 100, device=tokens.device, dtype=self.bias.dtype)
        g = self.g2(grid).sqrt()
        deciles = self.times.density(grid).view(10, 10).mean(1)
        norm = float(self.embedding.weight.norm(dim=-1).mean())
        lines.append(f"g(t) {float(g.min()):.3f} .. {float(g.max()):.3f} | mean embedding norm {norm:.2f} | density of times "
                     "by tenth of t " + " ".join(f"{v:.2f}" for v in deciles.tolist()))
        sigma = self.process(self.embed(tokens), grid.new_full((1,), 0.5))[1]
        if sigma.shape[1] > 1:
            spread = float(sigma.log().mean(-1).std(1).mean())
            lines.append(f"log sigma(x, 0.5): mean {float(sigma.log().mean()):.3f}, std over positions {spread:.3f}")
        return lines


if __name__ == "__main__":
    common.main(NFDM, Config, PRESETS)
