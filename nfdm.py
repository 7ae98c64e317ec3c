"""NFDM for text: embedding-space diffusion whose forward (noising) process is learned.

Paper: "Towards Latent Diffusion Suitable For Text" (Midavaine, Naesseth, Bartosh; arXiv:2601.16220), built on
"Neural Flow Diffusion Models" (arXiv:2404.12940). Diffused: x = E[tokens], De numbers a token. t = 0 is data.

  forward   z_t = mu(x,t) + sigma(x,t) eps,  mu = (1-t) x + t(1-t) m,  log sigma = (1-t) ln delta + t(1-t) s.
            m(x,t), s(x,t) are a transformer over the sentence: every token, dimension has its own path, with
            exact ends: mu = x, sigma = delta at 0; N(0, I) at 1, so the prior term of the bound is 0.
  training  x_hat = (1-t) z_t + (t + 0.01) net(z_t, t) takes the place of x in the same process; the bound is
            sum over tokens of CE at t = 0  +  E_t || drift(x) - drift(x_hat) ||^2 / (2 g(t)^2),
            drift = mu_dot + sigma_dot eps + g^2 eps / (2 sigma).  m, s, net, E, g all learn from this number.
  sampling  z_1 ~ N(0, I); t > s: x_hat, eps_hat = (z_t - mu(x_hat,t)) / sigma(x_hat,t), then
            z_s = mu(x_hat,s) + sigma(x_hat,s) (sqrt(1-k) eps_hat + sqrt(k) n); tokens = argmax(z_0 E^T + b).

Differs from the paper: the predictor is the shared DiT (theirs: a BERT-base from scratch; `net=` takes any
module); g = 1 at the start; times are stratified. Differs from the official code: importance weights meet
their own samples (--is_weights=as_coded restores theirs); the bound sums the reconstruction over tokens
(theirs: the mean). Not here, baselines and unused options of that code: the older NFDM-G net, MuLAN's VAE
context and reference schedule, autoregressive gamma, x0 and `rescaled` losses, salted times, uneven grid.
The paper's full text was not available: the sources are its official code and the base paper.

    python nfdm.py                                   # train `tiny`, end with the bound and samples
    python nfdm.py --forward=frozen                  # a fixed process: frozen, line, sqrt, vdm, mulan
    python nfdm.py sample --steps=64 --prompt="The " # --k=0 is deterministic, --sampler=ode|sde|marginal
"""
import dataclasses
import math
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UserError, bc

# --- 1. configuration and presets ----------------------------------------------------------------

CHOICES = dict(forward=("learned", "frozen", "line", "sqrt", "vdm", "mulan"),
               volatility=("auto", "learned", "markov", "static"), is_weights=("paired", "as_coded"))
STABILIZER = 0.01                   # share of the network in x_hat at t = 0 (official code, `stabilize`)


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
    volatility: str = "auto"        # g(t): learned, markov, static; auto = markov for sqrt, vdm, mulan
    stabilize: bool = True          # x_hat = (1-t) z + (t+0.01) net(z, t); false: x_hat = net(z, t)
    buckets: int = 100              # equal buckets of the learned density of training times
    is_weights: str = "paired"      # importance weights: paired (unbiased) or as_coded (official)
    rec_weight: Optional[float] = None  # reconstruction's weight, 1 = the bound; none = d_embed (published)
    muon_lr: float = 0.0            # Muon's learning rate for the predictor's matrices; 0 = Adam for all


# Published NFDM-G-AdaLN, trunk of BERT-base's size. Their decay, 1 - step / total, starts 1.25% lower; TF32.
_roc = dict(data="roc", length=64, d_embed=128, d_model=768, n_layer=12, n_head=12, cond_dim=128, dropout=0.1,
            batch=512, steps=800_000, lr=1e-4, muon_lr=2e-3, warmup=10_000, lr_schedule="linear", clip=0.3,
            clip_from=20_000, ema=0.9999, ema_warmup=False, log_every=100, val_every=5_000, save_every=5_000,
            sample_every=20_000)
_small = dict(d_embed=8, fwd_dim=32, fwd_layers=1, fwd_heads=2, fwd_mlp=64, fwd_dropout=0.0, length=64,
              d_model=64, n_layer=3, n_head=4, cond_dim=64, gate_init=0.5, batch=32, lr=5e-3, muon_lr=0.02,
              warmup=50, lr_schedule="linear", ema=0.998)
PRESETS = {
    "tiny": dict(_small, steps=1800),
    "roc": _roc,
    # Not published (their BPE text8 in windows of 28 never ran): common text8 protocol, networks of roc.
    "text8": dict(_roc, data="text8", tokenizer="char", length=256, steps=1_000_000),
    "toy": dict(_small, data="markov8", length=6, d_embed=4, batch=256, steps=16000, rec_weight=16.0),
    "bench10-cpu": dict(_small, steps=5000),
    "bench10": dict(data="wikitext103", tokenizer="gpt2", length=256, fwd_layers=3, d_model=384, n_layer=6,
                    n_head=6, cond_dim=128, batch=64, steps=8000, lr=3e-4, muon_lr=2e-3, warmup=500,
                    lr_schedule="linear", ema=0.999),
}


# --- 2. fixed forward processes ------------------------------------------------------------------
# One interface for all six: process(x [B,L,De], t [B] or [1]) -> Path; start(x) -> mu, sigma at t = 0;
# prior(x) [B] = KL(q(z_1|x) || N(0,I)) in nats. The loss knows no more.


class Path(NamedTuple):
    """q(z_t|x) and its time derivatives: z_t = mu + sigma eps; all broadcast to x [B,L,De]."""
    mu: torch.Tensor
    sigma: torch.Tensor
    mu_dot: Optional[torch.Tensor]          # None where a sampler asked for no tangent
    sigma_dot: Optional[torch.Tensor]

    def noise(self, z):
        """eps that leads to z."""
        return (z - self.mu) / self.sigma


class Fixed(nn.Module):
    """z_t = alpha(t) x + sigma(t) eps; schedule(t [B,1,1]) gives alpha, sigma and their derivatives."""
    def forward(self, x, t, tangent=True):
        alpha, sigma, alpha_dot, sigma_dot = self.schedule(bc(t))
        return Path(alpha * x, sigma, alpha_dot * x, sigma_dot)

    def start(self, x):
        return self(x, x.new_zeros(1))[:2]

    def prior(self, x):
        mu, sigma, _, _ = self(x, x.new_ones(1))
        return 0.5 * (mu**2 + sigma**2 - 1 - 2 * sigma.log()).sum((1, 2))

    def markov_g2(self, t):
        """g^2 [B,1,1] ([B,L,1]) of a Markov forward SDE: 2 sigma sigma_dot - 2 sigma^2 alpha_dot / alpha."""
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
    """Flow-matching line: alpha = 1 - t, sigma = t + delta (1-t). Published: delta = 0.01, a static g."""
    def schedule(self, t):
        return 1 - t, t + self.delta * (1 - t), -torch.ones_like(t), torch.full_like(t, 1 - self.delta)


class Sqrt(Fixed):
    """Diffusion-LM's square root: alpha^2 = 1 - sqrt(u), sigma^2 = sqrt(u), u = t + 1e-4 (0.99 - t)."""
    def schedule(self, t):
        u, u_dot = t + 1e-4 * (0.99 - t), 1 - 1e-4
        alpha = torch.sqrt((u_dot * (1 - t) + 1e-6) / (1 + u.sqrt()))      # 1 - sqrt(u), keeping its digits
        return alpha, u**0.25, -u_dot / (4 * u.sqrt() * alpha), 0.25 * u_dot * u**-0.75


class VariancePreserving(Fixed):
    """alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma); subclasses: gamma(t) -> gamma, gamma_dot."""
    def schedule(self, t):
        gamma, gamma_dot = self.gamma(t)
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        return alpha, sigma, -0.5 * alpha * sigma**2 * gamma_dot, 0.5 * sigma * alpha**2 * gamma_dot


class VDM(VariancePreserving):
    """One scalar monotone gamma(t) = l + W3 sigmoid(W2 l + b2) + b3, l = W1 t + b1, weights through softplus,
    then moved and scaled to its ends (b3 cancels: it is here for its published name)."""
    def __init__(self, gamma_0=-10.0, gamma_1=10.0, hidden=1024):
        super().__init__()
        self.ends = gamma_0, gamma_1
        self.fc1, self.fc2, self.fc3 = nn.Linear(1, 1), nn.Linear(1, hidden), nn.Linear(hidden, 1)

    def gamma(self, t):
        w1, w2, w3 = (F.softplus(fc.weight) for fc in (self.fc1, self.fc2, self.fc3))
        ends_t = torch.cat([t.new_zeros(1), t.new_ones(1), t.flatten()])[:, None]
        line = F.linear(ends_t, w1, self.fc1.bias)                          # [n,1]
        s = torch.sigmoid(F.linear(line, w2, self.fc2.bias))                # [n,hidden]
        y, y_dot = line + F.linear(s, w3, self.fc3.bias), w1 * (1 + F.linear(s * (1 - s) * w2.T, w3))
        scale = (self.ends[1] - self.ends[0]) / (y[1] - y[0])
        return (self.ends[0] + (y[2:] - y[0]) * scale).view(t.shape), (y_dot[2:] * scale).view(t.shape)


class MuLAN(VariancePreserving):
    """A gamma per position (no VAE context): monotone fifth-degree polynomials, [B,1,1] -> [B,L,1]."""
    def __init__(self, length, gamma_0=-10.0, gamma_1=10.0):
        super().__init__()
        self.ends = gamma_0, gamma_1
        self.l1, self.l2 = nn.Linear(1, length), nn.Linear(length, length)
        self.l3_a, self.l3_b, self.l3_c = (nn.Linear(length, length) for _ in range(3))

    def gamma(self, t):
        h = F.silu(self.l2(F.silu(self.l1(t.new_ones(1)))))
        a, b, c = (layer(h)[:, None] for layer in (self.l3_a, self.l3_b, self.l3_c))        # [L,1]
        c = 1e-3 + F.softplus(c)
        def P(t):                   # integral of (a t^2 + b t + c)^2 + 1e-3
            cubic = (b * b + 2 * a * c) / 3 + t * (a * b / 2 + t * a * a / 5)
            return t * (c * c + 1e-3 + t * (b * c + t * cubic))
        scale = (self.ends[1] - self.ends[0]) / P(1)
        # differs from the official code, whose derivative leaves out the 1e-3
        return self.ends[0] + scale * P(t), scale * ((a * t**2 + b * t + c) ** 2 + 1e-3)


# --- 3. volatility and training times ------------------------------------------------------------


class Volatility(nn.Module):
    """g(t) = softplus(MLP(t)), one scalar for all positions and dimensions; returns g^2 [B,1,1].
    differs from the paper: the last layer starts at 0, with g = 1. Theirs gave g(0.5) = 0.03 or 0.9 by seed,
    and the loss goes with 1 / g^2."""
    def __init__(self, hidden=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.SELU(), nn.Linear(hidden, hidden), nn.SELU(),
                                    nn.Linear(hidden, hidden), nn.SELU(), nn.Linear(hidden, 1))
        for layer in self.layers[0:5:2]:
            nn.init.normal_(layer.weight, std=1.0 if layer.in_features == 1 else (2 / hidden) ** 0.5)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.layers[6].weight)
        nn.init.constant_(self.layers[6].bias, math.log(math.e - 1))        # softplus^-1(1)

    def forward(self, t):
        return bc(F.softplus(self.layers(t[:, None]))[:, 0]) ** 2


class TimeSampler(nn.Module):
    """Piecewise constant density of training times: pi = softmax(logits), p(t) = n pi[bucket of t].
    Trained by the estimator's second moment, mean((d/p)^2) with d held fixed: ends at p ~ sqrt(E[d^2|t])."""
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
        i = torch.searchsorted(cdf, u.contiguous(), right=True).clamp(max=len(pi) - 1)  # never an empty one
        return ((i + (u - cdf[i] + pi[i]) / pi[i]) / len(pi)).clamp(1e-6, 1 - 1e-6)


# --- 4. the forward net, in dual numbers ---------------------------------------------------------
# A dual number is a pair (h, dh): a value and its derivative in t; dh = None is an exact zero, for free.
# Operations map pairs to pairs: one pass gives m, s and their time derivatives, and ordinary backward
# differentiates both. Elementwise functions and softmax have symmetric Jacobians: their fused, differentiable
# backward kernels ARE the tangents. At the published width this costs 0.81x of the official double backward
# (0.63x without gradients) and 0.76x of its memory.
#
# The norm must be written out. A derivative taken through a fused layer norm reuses its saved mean and 1/std,
# which autograd takes for constants: values and tangents come out right, the gradients of the weights do not
# (0.06 to 0.8 relative, pytorch issue 175754). Double backward, the official route, has the same defect.


def d_linear(linear, h, dh):
    return linear(h), None if dh is None else F.linear(dh, linear.weight)


def d_silu(h, dh):
    gate = torch.sigmoid(h)         # written out: silu_backward has no derivative; [B,4H] only, never [B,L,.]
    return h * gate, None if dh is None else dh * gate * (1 + h * (1 - gate))


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
    return y[:, None].chunk(n, -1), [None] * n if dy is None else dy[:, None].chunk(n, -1)


def d_time_features(t, n, tangent):
    """cos, sin of 1000 t 10000^(-2k/n) and their derivatives; [B] -> [B,n] (an odd n ends in 0)."""
    k = torch.arange(n // 2, device=t.device, dtype=torch.float64)          # angles reach 1000: float64
    omega = 1000 * torch.exp(-math.log(10000) / (n // 2) * k)
    cos, sin = (t[:, None] * omega).cos(), (t[:, None] * omega).sin()
    value, slope = torch.cat([cos, sin], -1), torch.cat([-omega * sin, omega * cos], -1)
    return F.pad(value, (0, n % 2)).to(t.dtype), F.pad(slope, (0, n % 2)).to(t.dtype) if tangent else None


class ForwardBlock(nn.Module):
    """Pre-norm block without gates; shift and scale of its norms come from silu(time), zero at the start."""
    compile_me = True

    def __init__(self, H, n_head, mlp, dropout):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.attn = nn.MultiheadAttention(H, n_head)        # its weights and init only: SDPA has no tangent
        self.ffn = nn.Sequential(nn.Linear(H, mlp), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp, H))
        self.t_proj = nn.Linear(4 * H, 4 * H)
        nn.init.zeros_(self.t_proj.weight)
        nn.init.zeros_(self.t_proj.bias)

    def attend(self, h, dh, p_drop):
        """Multi-head self-attention on (h, dh) [B,L,H]: dS = dq k^T + q dk^T, dO = dP v + P dv."""
        def heads(y):                                       # [B,L,3H] -> 3 x [B,heads,L,d]
            return y.unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind(0)

        W, root = self.attn.in_proj_weight, (h.shape[-1] // self.n_head) ** -0.5
        q, k, v = heads(F.linear(h, W, self.attn.in_proj_bias))
        P, dP, dout = (root * q @ k.mT).softmax(-1), None, None             # [B,heads,L,L]
        if dh is not None:
            dq, dk, dv = heads(F.linear(dh, W))
            dS = root * (dq @ k.mT + q @ dk.mT)
            dP = torch.ops.aten._softmax_backward_data(dS, P, -1, P.dtype)
        P, dP = d_dropout(P, dP, p_drop)
        if dh is not None:
            dout = (dP @ v + P @ dv).transpose(1, 2).flatten(2)
        return d_linear(self.attn.out_proj, (P @ v).transpose(1, 2).flatten(2), dout)

    def forward(self, h, dh, te, dte):
        """h [B,L,H] and its tangent; te = silu(time vector) [B,4H] and its tangent."""
        (s1, c1, s2, c2), (ds1, dc1, ds2, dc2) = d_chunk(*d_linear(self.t_proj, te, dte), 4)
        p_drop = self.dropout if self.training else 0.0
        y, dy = self.attend(*d_affine(*d_norm(h, dh), s1, c1, ds1, dc1), p_drop)
        h, dh = h + y, dy if dh is None else dh + dy
        y, dy = d_linear(self.ffn[0], *d_affine(*d_norm(h, dh), s2, c2, ds2, dc2))
        y, dy = F.gelu(y), None if dy is None else torch.ops.aten.gelu_backward(dy, y)
        y, dy = d_linear(self.ffn[3], *d_dropout(y, dy, p_drop))
        return h + y, None if dy is None else dh + dy


class Head(nn.Module):
    """film(lin2 relu(film(lin1 h))), film(h; beta, g) = (1 + 1.5 tanh(g / 1.5)) h + beta; 0 at the start."""
    compile_me = True

    def __init__(self, H, out):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(H, H), nn.Linear(H, out)
        self.film1, self.film2 = nn.Linear(4 * H, 2 * H), nn.Linear(4 * H, 2 * out)
        for film in (self.film1, self.film2):
            nn.init.zeros_(film.weight)
            nn.init.zeros_(film.bias)

    def film(self, linear, h, dh, te, dte):
        (beta, g), (dbeta, dg) = d_chunk(*d_linear(linear, te, dte), 2)
        squash = torch.tanh(g / 1.5)
        return d_affine(h, dh, beta, 1.5 * squash, dbeta, None if dg is None else (1 - squash**2) * dg)

    def forward(self, h, dh, te, dte):
        h, dh = self.film(self.film1, *d_linear(self.lin1, h, dh), te, dte)
        h, dh = F.relu(h), None if dh is None else dh * (h > 0)
        return self.film(self.film2, *d_linear(self.lin2, h, dh), te, dte)


class ForwardNet(nn.Module):
    """m(x,t), s(x,t) [B,L,De] and their time derivatives: the net of NFDM-G-AdaLN, parameter names theirs."""
    def __init__(self, d_embed, length, H, n_layer, n_head, mlp, dropout):
        super().__init__()
        if H % n_head:
            raise UserError(f"--fwd_dim={H} is not a multiple of --fwd_heads={n_head}: change one of them")
        self.dropout = dropout
        self.input_proj = nn.Sequential(nn.Linear(d_embed, H), nn.Tanh(), nn.Linear(H, H))
        self.time_embed = nn.Sequential(nn.Linear(d_embed, 4 * H), nn.SiLU(), nn.Linear(4 * H, 4 * H))
        self.position_embeddings = nn.Embedding(length, H)
        self.layer_norm = nn.LayerNorm(H)                   # the one fused norm: t has not entered yet
        self.layers = nn.ModuleList(ForwardBlock(H, n_head, mlp, dropout) for _ in range(n_layer))
        self.mean_head, self.logvar_head = Head(H, d_embed), Head(H, d_embed)

    def forward(self, x, t, tangent=True):
        """t [B], or [1]: the time path then runs once -> m, s, dm/dt, ds/dt (None without `tangent`)."""
        te, dte = d_time_features(t, x.shape[-1], tangent)
        te, dte = d_linear(self.time_embed[2], *d_silu(*d_linear(self.time_embed[0], te, dte)))
        gate, dgate = d_silu(te, dte)
        h = self.layer_norm(self.input_proj(x) + self.position_embeddings.weight[:x.shape[1]])
        h, dh = F.dropout(h, self.dropout, self.training), None
        for layer in self.layers:
            h, dh = layer(h, dh, gate, dgate)
        m, dm = self.mean_head(h, dh, te, dte)
        s, ds = self.logvar_head(h, dh, te, dte)            # a log standard deviation, whatever its name
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
            return Path(mu, sigma, None, None)
        return Path(mu, sigma, w_dot * m + w * dm - x, sigma * (w_dot * s + w * ds - log_delta))

    def start(self, x):
        return x, x.new_full((1, 1, 1), self.delta)

    def prior(self, x):
        return x.new_zeros(len(x))


# --- 5. the loss terms, as pure functions --------------------------------------------------------


def drift(eps, path, g2=0.0):
    """Backward drift f - g^2/2 score at noise eps: f = mu_dot + sigma_dot eps, score = -eps / sigma. Without
    g2 it is f, the velocity dz/dt along fixed noise. path = process(x, t)."""
    return path.mu_dot + path.sigma_dot * eps + 0.5 * g2 * eps / path.sigma


def diffusion_element(eps, path, z, path_hat, g2):
    """(drift(x) - drift(x_hat))^2 / (2 g^2) per element [B,L,De], nats (base paper's code; its text: g^2/2).
    path_hat = process(x_hat): the reverse drift uses the PREDICTED variance too."""
    return (drift(eps, path, g2) - drift(path_hat.noise(z), path_hat, g2)) ** 2 / (2 * g2)


def nearest_rows(x, E):
    """Row of E [V,De] nearest in L2 to each x [...,De] (Diffusion-LM's clamping): largest x.E - |E|^2 / 2."""
    return E[common.greedy(x, E, -0.5 * E.square().sum(-1))]


# --- 6. the model --------------------------------------------------------------------------------


class Predictor(nn.Module):
    """net(z [B,L,De], t) -> [B,L,De]: the published tanh projection, then the shared DiT; time x 1000."""
    def __init__(self, cfg):
        super().__init__()
        D = cfg.d_model
        self.up = nn.Sequential(nn.Linear(cfg.d_embed, D), nn.Tanh(), nn.Linear(D, D))
        self.dit = common.DiT(D, cfg.n_layer, cfg.n_head, cfg.cond_dim, cfg.mlp_ratio, cfg.dropout,
                              length=cfg.length, out=cfg.d_embed, gate_init=cfg.gate_init)

    def forward(self, z, t):
        return self.dit.project(self.dit(self.up(z), self.dit.cond(1000 * t.expand(len(z)))))


class NFDM(nn.Module):
    log_keys = ("diff", "rec", "collapse")      # nats/position, nats/token, rec / unigram entropy

    def __init__(self, cfg, net=None):
        super().__init__()
        for key, allowed in CHOICES.items():
            if getattr(cfg, key) not in allowed:
                raise UserError(f"--{key}={getattr(cfg, key)} is not one of {', '.join(allowed)}")
        sizes = cfg.d_embed, cfg.length, cfg.fwd_dim, cfg.fwd_layers, cfg.fwd_heads, cfg.fwd_mlp
        if min(*sizes, cfg.buckets, cfg.d_embed // 2) < 1 or not 0 <= cfg.fwd_dropout < 1:
            raise UserError("--fwd_* and --buckets must be at least 1, --d_embed 2, --fwd_dropout in [0, 1)")
        if not 0 < cfg.delta < 1 or (cfg.rec_weight or 0) < 0:
            raise UserError(f"--delta={cfg.delta} must lie in (0, 1), --rec_weight={cfg.rec_weight} above 0")
        self.cfg, self.rec_weight = cfg, cfg.d_embed if cfg.rec_weight is None else cfg.rec_weight
        self.embedding = nn.Embedding(cfg.vocab, cfg.d_embed)       # N(0,1), raw; the decoder's matrix too
        self.bias = nn.Parameter(torch.empty(cfg.vocab).uniform_(-1, 1) * cfg.d_embed**-0.5)
        self.process = dict(
            learned=lambda: Learned(cfg.delta, ForwardNet(*sizes, cfg.fwd_dropout)),
            frozen=lambda: Frozen(cfg.delta), line=lambda: Line(cfg.delta), sqrt=Sqrt, vdm=VDM,
            mulan=lambda: MuLAN(cfg.length))[cfg.forward]()
        auto = "markov" if cfg.forward in ("sqrt", "vdm", "mulan") else "learned"
        self.kind = auto if cfg.volatility == "auto" else cfg.volatility
        if self.kind == "markov" and cfg.forward == "learned":
            raise UserError("--volatility=markov has no closed form for a learned process: use learned")
        if self.kind == "learned":
            self.volatility = Volatility()
        self.times = TimeSampler(cfg.buckets)
        self.net = Predictor(cfg) if net is None else net

    def g2(self, t):
        """Squared volatility at t [B]: [B,1,1], for a markov MuLAN [B,L,1]."""
        if self.kind == "static":
            return 20 * torch.sigmoid(bc(20 * t - 10))                      # official code
        return self.volatility(t) if self.kind == "learned" else self.process.markov_g2(t)

    def embed(self, tokens):
        """x = E[tokens] [B,L,De]. The check would wait for a GPU; data.py makes it when it opens a file."""
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.bias):
            raise UserError(f"token id {int(tokens.max())} is outside the vocabulary of {len(self.bias)}")
        return self.embedding(tokens)

    def predict(self, z, t, hold=None, clamp=False):
        """x_hat(z, t) [B,L,De], composed in float32: near t = 0 only 1% of the network's rounding is left.
        Samplers: `clamp` rounds to the nearest embedding; hold = (x, mask [B,L,1]) puts in the clean vectors
        of known tokens, which the process sees too: mu and sigma of the others follow them."""
        x_hat = self.net(z, t)
        if self.cfg.stabilize:
            x_hat = (1 - bc(t)) * z + (bc(t) + STABILIZER) * x_hat
        if clamp:
            x_hat = nearest_rows(x_hat, self.embedding.weight)
        return x_hat if hold is None else torch.where(hold[1], hold[0], x_hat)

    def reconstruction(self, x, tokens, eps0, weight):
        """(sum of weight * CE, CE [B,L] detached), logits z_0 E^T + b at z_0 = mu(x,0) + sigma(x,0) eps0."""
        mu, sigma = self.process.start(x)
        return common.token_ce(mu + sigma * eps0, self.embedding.weight, self.bias, tokens, weight)

    def diffusion(self, x, t, eps):
        """Diffusion term [B,L,De] in nats at t [B] with noise eps like x."""
        path = self.process(x, t)
        z = path.mu + path.sigma * eps
        return diffusion_element(eps, path, z, self.process(self.predict(z, t), t), self.g2(t))

    def loss(self, batch, t=None, noise=None):
        """Objective, published scale: mean over positions AND dimensions of the diffusion term, + the mean
        reconstruction times rec_weight / De, + the sampler's moment. t [B]; noise = eps, eps0, like x each.
        The published rec_weight = De counts reconstruction De times against the bound: the embeddings do not
        shrink until the decoder knows unigrams only. PAD is diffused and scored like any token."""
        tokens = batch["tokens"]
        x = self.embed(tokens)                                              # [B,L,De]
        eps, eps0 = (torch.randn_like(x), torch.randn_like(x)) if noise is None else noise
        # 1. times from the learned density, stratified over the global batch
        rows = None if t is not None else batch.get("rows") or common.Rows.default(len(x))
        if t is None:
            t = self.times.draw(rows.uniform(device=x.device)).to(x.dtype)
        p = self.times.density(t)                                           # [B]
        # 2. diffusion and reconstruction
        d = self.diffusion(x, t, eps).mean((1, 2))                          # [B]
        rec, nll = self.reconstruction(x, tokens, eps0, x.new_full((), 1 / tokens.numel()))
        # 3. importance weights. as_coded: theirs divide [B] by [B,1,1], which makes mean(d) mean(1/p), in
        # effect t ~ p uncorrected; over the GLOBAL batch. The sampler's own term comes last
        diff = (d / p.detach()).mean()
        if self.cfg.is_weights == "as_coded":
            if rows is not None:
                rows = dataclasses.replace(rows, first=0, n_local=rows.n_global)
                t = self.times.draw(rows.uniform(device=x.device))
            diff = d.mean() * (1 / self.times.density(t)).mean().detach()
        loss = diff + self.rec_weight / x.shape[-1] * rec + ((d.detach() / p) ** 2).mean()
        return loss, dict(diff=(d / p).detach().mean() * x.shape[-1], rec=nll.mean(),
                          collapse=nll.mean() / max(self.cfg.unigram_entropy, 1e-8))

    def param_groups(self):
        """Muon on the attention and MLP matrices of the predictor's blocks, Adam on the rest (official runs).
        differs from the official code: the sampler's gradient goes with d^2 and is clipped by itself, theirs
        shrinks every step with an unlucky batch (as_coded keeps that); Q, K and V are one matrix to Muon."""
        muon = [p for name, p in self.net.named_parameters()
                if self.cfg.muon_lr and "blocks." in name and p.ndim == 2 and "adaLN" not in name]
        taken = {id(p) for p in muon} | {id(self.times.logits)}
        clip = "main" if self.cfg.is_weights == "as_coded" else "sampler"
        groups = [dict(params=[p for p in self.parameters() if id(p) not in taken]),
                  dict(params=[self.times.logits], weight_decay=0.0, clip=clip)]
        if muon:
            groups.append(dict(params=muon, lr=self.cfg.muon_lr, weight_decay=0.0, optimizer=common.Muon,
                               bias_correction=False, ns_dtype=torch.bfloat16, eps=1e-7))
        return groups

    def flops_per_token(self):
        c, H = self.cfg, self.cfg.fwd_dim       # training: two dual forward-net passes, 6.04 plain ones each
        net = common.trunk_flops(c.d_model, c.n_layer, c.length, c.mlp_ratio)
        net += 2 * c.d_model * (c.d_model + 2 * c.d_embed)
        plain = 6 * H * (c.d_embed + H) + c.fwd_layers * 4 * H * (2 * H + c.fwd_mlp + c.length)
        plain = plain if c.forward == "learned" else 0
        return 3 * (net + 2 * c.vocab * c.d_embed) + 12.08 * plain

    # --- 7. likelihood ---------------------------------------------------------------------------

    @torch.no_grad()
    def nll(self, tokens, mask=None, likelihood="sde", n_times=8, ode_steps=64, probes=1):
        """Upper bound on -log P(tokens), nats per sequence [B], over all positions (PAD is a token here).
        sde: reconstruction + prior + diffusion at `n_times` stratified times t = (k + u) / K.
        ode: -log p(tokens|z_0) + log q(z_0|x) - log p_ODE(z_0) at one z_0, Runge-Kutta 4 (on a trained `tiny`
        32 steps are off by 0.007 nats/token, 64 by 0.0006; float64 moves nothing), the divergence by `probes`
        Rademacher vectors, 0 = exact (L De backward passes)."""
        if likelihood not in ("sde", "ode") or min(n_times, ode_steps, probes + 1) < 1:
            raise UserError("--likelihood is sde or ode, --n_times and --ode_steps at least 1, --probes 0")
        x = self.embed(tokens)
        eps0 = torch.randn_like(x)
        rec = self.reconstruction(x, tokens, eps0, x.new_ones(()))[1].sum(1)
        if likelihood == "ode":
            mu, sigma = self.process.start(x)
            log_q = -(0.5 * eps0**2 + 0.5 * math.log(2 * math.pi) + sigma.log()).sum((1, 2))
            log_p = self.log_density(mu + sigma * eps0, ode_steps, probes=probes)
            return dict(nll=rec + log_q - log_p, rec=rec, log_q=log_q, log_p=log_p)
        diff = torch.zeros_like(rec)
        for k in range(n_times):
            t = (k + torch.rand(len(x), device=x.device, dtype=x.dtype)) / n_times
            self.require_finite_volatility(t)
            diff += self.diffusion(x, t, torch.randn_like(x)).sum((1, 2)) / n_times
        prior = self.process.prior(x)
        return dict(nll=rec + diff + prior, rec=rec, diff=diff, prior=prior)

    def describe_nll(self, likelihood="sde", **_):
        return "SDE bound" if likelihood == "sde" else "ODE bound (the integrator's error is not in ±)"

    def log_density(self, z, steps, t_min=0.0, probes=0):
        """log p_ODE(z) [B] of a latent at t_min: dz/dt = f and its divergence integrated to t = 1 by RK4."""
        n = z[0].numel()
        vs = torch.randint(0, 2, (probes, *z.shape), device=z.device).to(z.dtype) * 2 - 1
        if not probes:
            vs = torch.eye(n, device=z.device, dtype=z.dtype).view(n, 1, *z.shape[1:])

        def field(z, t):            # f and div f: the sum of v^T J v over unit v, its mean over Rademacher v
            with torch.enable_grad():
                z, t = z.detach().requires_grad_(), z.new_full((1,), t)
                path = self.process(self.predict(z, t), t)
                f = drift(path.noise(z), path)
                div = sum((v * torch.autograd.grad(f, z, v.expand_as(f), retain_graph=True)[0]).sum((1, 2))
                          for v in vs)
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

    # --- 8. samplers -----------------------------------------------------------------------------

    def require_finite_volatility(self, t):
        g2 = self.g2(t)
        if not bool((torch.isfinite(g2) & (g2 > 0)).all()):
            raise UserError("the volatility g(t) is not finite and positive: the run has diverged, or a "
                            "markov g meets alpha = 0 (--sampler=ode and marginal need no g)")

    def step(self, z, t, s, noise, sampler="marginal", k=1.0, hold=None, clamp=False):
        """One step from z_t to z_s, 1 >= t > s >= 0 (floats), noise like z. Returns (z_s, x_hat).
        ode: Euler on f.  sde: Euler-Maruyama on the backward drift.  marginal (DDIM family): x_hat noised to
        s with a share k of fresh noise: k = 0 deterministic, 1 (published) all fresh, which needs s only. It
        ends in the mean at s = 0; after ode and sde the decoder handles what noise is left. Diffusion-LM's
        own sampler (`star`) is marginal, k = 1, that tells the net s for t: step(z, s, s, noise)."""
        time = z.new_full((1,), t)
        x_hat = self.predict(z, time, hold, clamp)
        if sampler == "marginal":
            if s == 0:
                return self.process.start(x_hat)[0], x_hat
            if k < 1:
                eps = self.process(x_hat, time, tangent=False).noise(z)
                noise = math.sqrt(1 - k) * eps + math.sqrt(k) * noise
            path = self.process(x_hat, z.new_full((1,), s), tangent=False)
            return path.mu + path.sigma * noise, x_hat
        path = self.process(x_hat, time)
        eps = path.noise(z)
        if sampler == "ode":
            return z - (t - s) * drift(eps, path), x_hat
        g2 = self.g2(time)
        return z - (t - s) * drift(eps, path, g2) + (g2 * (t - s)).sqrt() * noise, x_hat

    def trajectory(self, z, steps, noise=None, **options):
        """Yields (z_s, x_hat) of `steps` equal steps from t = 1 to 0; noise [steps, *z.shape] or drawn."""
        for i in range(steps):
            n = torch.randn_like(z) if noise is None else noise[i]
            z, x_hat = self.step(z, 1 - i / steps, 1 - (i + 1) / steps, n, **options)
            yield z, x_hat

    @torch.no_grad()
    def sample(self, n, length, steps, known=None, known_mask=None, watch=None, sampler="marginal", k=1.0,
               clamp=False):
        """Token ids [n, length]: argmax of the decoder at z_0. Options as in `step`.
        known [n,length] with known_mask (True = given) completes or infills: given positions enter as clean
        vectors at every step, the rest is drawn around them, an approximation of the model's posterior. What
        control over the path could add (a process made for the constraint) is not shown, here or there."""
        if sampler not in ("ode", "sde", "marginal") or not 0 <= k <= 1:
            raise UserError(f"--sampler={sampler} must be ode, sde or marginal, and --k={k} lie in 0 .. 1")
        least = self.cfg.length if self.cfg.forward == "mulan" else 1       # its gammas belong to positions
        if not least <= length <= self.cfg.length or steps < 1:
            raise UserError(f"--steps={steps} must be positive, --length={length} {least}..{self.cfg.length}")
        z = self.bias.new_empty(n, length, self.cfg.d_embed).normal_()
        if sampler == "sde":
            self.require_finite_volatility(torch.linspace(1 / steps, 1, steps).to(z))
        hold = None if known is None else (self.embed(known), known_mask[..., None])
        def decode(x):
            tokens = common.greedy(x, self.embedding.weight, self.bias)
            return tokens if known is None else torch.where(known_mask, known, tokens)
        path = self.trajectory(z, steps, sampler=sampler, k=k, hold=hold, clamp=clamp)
        for i, (z, x_hat) in enumerate(path, 1):
            if watch is not None:
                watch(i, decode(x_hat))
        return decode(z)

    @torch.no_grad()
    def diagnostics(self, corpus):
        """Lines for `eval`: bound per position and per non-PAD token, collapse, embeddings, g, times."""
        batch = corpus.rows("val", range(min(64, corpus.n_rows("val"))))
        tokens, entropy = batch["tokens"].to(self.bias.device), self.cfg.unigram_entropy
        terms = {key: float(v.double().sum()) / tokens.numel() for key, v in self.nll(tokens).items()}
        padded = tokens.numel() / int(batch["mask"].sum()) if "mask" in batch else 1
        lines = [f"{len(tokens)} rows: {terms['nll'] * padded:.3f} nats per non-PAD token; per position "
                 + ", ".join(f"{key} {v:.4f}" for key, v in terms.items())]
        if terms["rec"] > 0.5 * entropy > 0:
            lines.append(f"WARNING: reconstruction {terms['rec']:.2f} nears the unigram entropy {entropy:.2f}"
                         ": collapsed, z_0 says nothing about its token. Raise --rec_weight or lower --lr")
        t = torch.linspace(0.005, 0.995, 100).to(self.bias)
        g, norm = self.g2(t).sqrt(), float(self.embedding.weight.norm(dim=-1).mean())
        tenths = " ".join(f"{v:.2f}" for v in self.times.density(t).view(10, 10).mean(1).tolist())
        lines.append(f"g(t) {float(g.min()):.3f} .. {float(g.max()):.3f}; mean embedding norm {norm:.2f}; "
                     f"density of times by tenth of t {tenths}")
        s = self.process(self.embed(tokens), t.new_full((1,), 0.5)).sigma.log()
        over = float(s.mean(-1).std(1, correction=0).mean())
        return lines + [f"log sigma(x, 0.5): mean {float(s.mean()):.3f}, std over positions {over:.3f}"]


if __name__ == "__main__":
    common.main(NFDM, Config, PRESETS)
