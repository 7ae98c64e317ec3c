"""RePlaid: likelihood-trained Gaussian diffusion on learned embeddings (arXiv:2605.18530; Plaid: 2305.18619).

Every token v has a unit-norm embedding E_v of 16 numbers. A text is diffused as z_t = alpha_t E[x] + sigma_t
eps; t = 0 is the DATA end, t = 1 the noise end. gamma = -log SNR = 2 log(sigma / alpha) rises from gamma_0 to
gamma_1 on a learned monotone schedule; alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma). The network sees
(z_t, gamma):

    logits = W u + b + (alpha / sigma^2) z E^T     the last term, the "output prior", is log q(z | v) + const,
    x_hat  = softmax(logits) E                     so W u + b only has to model the context

Training minimises the negative evidence lower bound (nats per token) over network, embeddings and endpoints:

    prior           KL(q(z_1 | x) || N(0, I))
    reconstruction  -log softmax(logits(z_0))[x]                            rows with t = 0
    diffusion       1/2 gamma'(t) exp(-gamma(t)) |E[x] - x_hat|^2           rows with t in (0, 1)

The shape of gamma between its ends changes only the bound's variance. It descends E[l^2] of the per-row
diffusion loss l (the same gradient times 2 l), which makes l(t) flat and the cross-entropy nearly linear in
t. One row in four is self-conditioned: it also sees the network's first estimate x_sc of E[x], and teaches
only the network.

Sampling: z ~ N(0, I) at t = 1; for t -> s: x_hat = model(z, gamma_t, x_sc); z ~ q(z_s | z_t, x_hat); x_sc =
x_hat; at the end the argmax of the logits at gamma_0. Solvers: ddpm (this one), ddim, dpmpp (2M), heun.

No official code or weights exist. What the sources leave open is settled as follows:
  [R1] the timestep embedder is fed raw gamma        [R2] z and x_sc enter through two summed linear maps
  [R3] dropout 0.1 for OpenWebText, 0 for scaling    [R4] W u as precise as the blocks, the rest float32
  [R5] no short-sequence trick                       [R6] the output prior fades in over `bias_ramp` steps
  [R7] EMA 0.9999 for OpenWebText, none for scaling
# differs from the official code (of Plaid): times and reconstruction rows are permuted over the batch, and
one row of every four is self-conditioned in place of a strided set. Expectations are the same; ranks then
agree. Samplers step on t = 1 - i / T; `--grid=plaid` is the official grid.

    python replaid.py                                            # train `tiny` on a CPU, minutes
    python replaid.py sample --steps=32 --sampler=dpmpp --watch  # text out of noise
    torchrun --nproc_per_node=8 replaid.py --preset=owt          # the paper's OpenWebText model
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
from common import bc

# --- 1. configuration ------------------------------------------------------------------------------

NORM_EPS = 1e-8             # unit norm is M / (|M| + 1e-8)  (official Plaid code)
STATS_INIT = 1e-8           # start of the running sums behind the number of reconstruction rows (official)
STATS_DECAY = 0.997         # and their decay
LEAST = dict(d_embed=1, schedule_width=1, bias_ramp=0, self_cond_every=0, lr_embed=0, lr_shape=0, lr_bounds=0)


@dataclass
class Config(common.Config):
    d_embed: int = 16               # width of the diffused unit-norm embedding
    gamma_0: float = -3.0           # initial -log SNR at t = 0, the data end (learned)
    gamma_1: float = 6.0            # initial -log SNR at t = 1, the noise end (learned)
    schedule_width: int = 1024      # hidden units of the monotone schedule net
    bias_ramp: int = 5000           # steps over which the output prior is faded in; 0 = off
    self_cond_every: int = 4        # one row in this many is self-conditioned; 0 = none, 1 = all
    output_prior: bool = True       # the (alpha / sigma^2) z E^T logits; false = the paper's ablation
    lr_embed: float = 1e-2          # learning rate of the embedding matrix; 0 freezes it
    lr_shape: float = 1e-2          # learning rate of the schedule's shape; 0 freezes it
    lr_bounds: float = 1e-2         # learning rate of gamma_0 and gamma_1; 0 freezes them
    bounds_decay: float = 1e-3      # decay of gamma_0 and gamma_1 towards 0 per step at the peak rate


# label: width, blocks, heads. Labels are the scaling study's names; they are not parameter counts.
SIZES = {
    "6M": (256, 6, 4), "19M": (384, 8, 6), "34M": (512, 8, 8), "48M": (576, 9, 9), "66M": (640, 10, 10),
    "85M": (640, 13, 10), "75M": (640, 16, 8), "113M": (768, 12, 12), "142M": (768, 15, 12),
    "170M": (768, 18, 12), "180M": (896, 14, 14), "206M": (896, 16, 14), "231M": (896, 18, 14),
    "268M": (1024, 16, 16), "302M": (1024, 18, 16), "336M": (1024, 20, 16), "472M": (1280, 18, 10),
    "551M": (1280, 21, 10), "571M": (1408, 18, 11), "629M": (1280, 24, 10), "666M": (1408, 21, 11),
    "761M": (1408, 24, 11), "831M": (1536, 22, 12), "944M": (1536, 25, 12), "1233M": (1792, 24, 14),
    "1476M": (2048, 22, 16), "1678M": (2048, 25, 16), "2121M": (2176, 28, 17),
}
# steps of the study at 1e20 FLOP where known; its files count 0.05 to 0.27 % more FLOP than the formula below
STEPS = {"66M": 455_579, "113M": 289_731, "231M": 157_026, "551M": 69_985}


def forward_flops(d_model, n_layer, vocab, d_embed=0):
    """FLOP per token of a forward pass by the scaling protocol: blocks (without attention products) and head.

    d_embed = 0 is the protocol's own 2 (12 n d^2 + d V), which fixes the number of steps; d_embed > 0 adds
    RePlaid's input map and two products with E: F_RePlaid / L = 2 (12 n d^2 + d V + 2 d_e V + 2 d_e d).
    """
    return 2 * (12 * n_layer * d_model ** 2 + d_model * vocab + 2 * d_embed * (vocab + d_model))


def scaling(label, vocab=32001, length=2048, batch=256):
    """SlimPajama preset of one size for 1e20 FLOP, the study's largest budget; a step is 3 forward passes."""
    d_model, n_layer, n_head = SIZES[label]
    steps = STEPS.get(label) or int(1e20 / (length * forward_flops(d_model, n_layer, vocab)) / batch / 3)
    # differs from the official code: the warm-up starts at a rate of 0, one step behind theirs
    return dict(data="slimpajama", vocab=vocab, length=length, d_model=d_model, n_layer=n_layer,
                n_head=n_head, cond_dim=128, batch=batch, steps=steps, lr=2e-4, min_lr=0.1,
                lr_schedule="cosine", warmup=max(steps // 100, 100), beta2=0.95, weight_decay=0.1, ema=0.0)


PRESETS = {
    "tiny": dict(gate_init=0.5, lr=2e-3, ema=0.998, bias_ramp=200, steps=3200),
    "owt": dict(data="openwebtext", tokenizer="gpt2", length=1024, d_model=768, n_layer=12, n_head=12,
                cond_dim=128, dropout=0.1, lr=3e-4,                             # dropout, lr: not published
                batch=512, steps=1_000_000, warmup=2500),
    "bench10": dict(data="wikitext103", tokenizer="gpt2", length=256, d_model=384, n_layer=6, n_head=6,
                    cond_dim=128, batch=64, steps=8000, gate_init=0.5, ema=0.999, bias_ramp=500),
    "bench10-cpu": dict(gate_init=0.5, lr=2e-3, ema=0.998, bias_ramp=200, steps=5000),
    **{label: scaling(label) for label in SIZES},
}


# --- 2. noise schedule and embeddings --------------------------------------------------------------

def alpha_sigma(gamma):
    """Signal and noise scale of gamma = -log SNR: alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma)."""
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


class NoiseSchedule(nn.Module):
    """Monotone g(t), exactly 0 at t = 0 and 1 at t = 1, and its derivative in closed form; in float64.

    raw(t) = sum_k c_k tanh(a_k (t - 1/2) + b_k),  a = softplus(W1) > 0,  c = softplus(W2) / 100 > 0,
    g(t) = (raw(t) - raw(0)) / (raw(1) - raw(0)).  At init g(t) is t to within 0.02.  (official Plaid code)
    """

    def __init__(self, width=1024):
        super().__init__()
        self.W1 = nn.Parameter(torch.randn(width, 1))
        self.b1 = nn.Parameter(torch.randn(width))
        self.W2 = nn.Parameter(torch.randn(1, width))

    def forward(self, t):
        """t [B] -> g [B], dg/dt [B]; t slightly below 0 is allowed (the `plaid` sampling grid)."""
        a, b, c = F.softplus(self.W1.double())[:, 0], self.b1.double(), 0.01 * F.softplus(self.W2.double())[0]
        ends = torch.arange(2, dtype=torch.float64, device=t.device)             # t = 0 and t = 1
        th = torch.tanh((torch.cat([t.double(), ends])[:, None] - 0.5) * a + b)  # [B + 2, K]
        raw = (th * c).sum(-1)      # not th @ c, which may round equal rows differently
        rise = raw[-1] - raw[-2]
        return (raw[:-2] - raw[-2]) / rise, (1 - th[:-2] ** 2) @ (a * c) / rise


class GammaBounds(nn.Module):
    """The two learned ends of gamma."""

    def __init__(self, gamma_0, gamma_1):
        super().__init__()
        self.gamma_0, self.gamma_1 = (nn.Parameter(torch.tensor(float(g))) for g in (gamma_0, gamma_1))

    def forward(self):
        return self.gamma_0.double(), self.gamma_1.double()


class EmbeddingMatrix(nn.Module):
    """E [V, De]: the rows of `matrix` over their norms, recomputed at every use; there is no other scale."""

    def __init__(self, vocab, d_embed):
        super().__init__()
        M = torch.randn(vocab, d_embed)
        self.matrix = nn.Parameter(M / M.norm(dim=-1, keepdim=True))

    def forward(self):
        return self.matrix / (self.matrix.norm(dim=-1, keepdim=True) + NORM_EPS)


# --- 3. how the rows of a batch are used -----------------------------------------------------------

def reconstruction_rows(stats, n):
    """Neyman allocation: how many of n rows estimate the reconstruction (0-d float64, whole, in [1, n - 1]).

    stats [5] are running sums (weight, recon, recon^2, diffusion, diffusion^2): rows go where the standard
    deviation is. (official Plaid code)
    """
    m_r, q_r, m_d, q_d = stats[1:] / stats[0]
    std_r, std_d = (q_r - m_r ** 2).clamp(min=0).sqrt(), (q_d - m_d ** 2).clamp(min=0).sqrt()
    return (n * std_r / (1e-8 + std_r + std_d)).round().clamp(1, n - 1)


def update_stats(stats, means):
    """One step of the running sums; means [4] of (recon, recon^2, diffusion, diffusion^2) over their rows."""
    return torch.lerp(stats, torch.cat([torch.ones_like(stats[:1]), means]), 1 - STATS_DECAY)


def diffusion_times(u, r, n):
    """Times from stratified uniforms u of n global rows: the r lowest become t = 0, the rest fill (0, 1).

    One u lies in each stratum [k/n, (k+1)/n): exactly r have u n < r, and (u n - r) / (n - r) is stratified.
    """
    return ((u * n - r) / (n - r)).clamp(min=0)


def bias_scale(step, ramp):
    """Factor of the output prior in training: rises to 1 over `ramp` steps [R6]."""
    return ((step + 1e-8) / (ramp + 1e-8)).clamp(max=1)


# --- 4. terms of the bound -------------------------------------------------------------------------

def prior_kl(x, gamma_1):
    """KL(N(alpha_1 x, sigma_1^2 I) || N(0, I)) of x [B, L, De], gamma_1 [B]: [B, L] nats, summed over De."""
    sigma_sq, log_sigma_sq = torch.sigmoid(gamma_1)[:, None], F.logsigmoid(gamma_1)[:, None]
    energy = torch.sigmoid(-gamma_1)[:, None] * x.double().square().sum(-1)     # |alpha_1 x|^2
    return 0.5 * (energy + x.shape[-1] * (sigma_sq - 1 - log_sigma_sq))


def diffusion_weight(gamma, gamma_dot):
    """-SNR'(t) / 2 = gamma'(t) exp(-gamma(t)) / 2, the weight of |x - x_hat|^2 summed over De."""
    return 0.5 * gamma_dot * torch.exp(-gamma)


def split_bound(recon, diff, prior, is_recon, n_recon):
    """Official evaluation estimator (nats per token): a batch split into reconstruction and diffusion rows.

    recon, diff, prior [B] per-row means. n_recon is the EXPECTED number of reconstruction rows, B / 8; the
    actual one is B // 8 + Bernoulli((B mod 8) / 8), so it is unbiased. `nll` scores all rows on all terms.
    """
    n_diff = recon.shape[0] - n_recon
    return torch.where(is_recon, recon / n_recon, diff / n_diff).sum() + prior.mean()


class ElboChunk(nn.Module):
    """The body of `elbo_head` for n tokens; a module (without parameters) so that it can be compiled."""
    compile_me = True

    def forward(self, u, W, b, zb, E, x, w_mse, w_ce, targets, keep, train):
        """Squared error [n], CE [n] and, if `train`, the chunk's gradients of (u, W, b, zb, E, x)."""
        p = torch.addmm(F.linear(u, W).to(b.dtype) + b, zb, E.T)                # logits [n, V] ...
        lse = p.logsumexp(-1, keepdim=True)
        ce = (lse - p.gather(1, targets))[:, 0]
        p.sub_(lse).exp_()                                                      # ... softmax in place
        x_hat = p @ E                                                           # [n, De]
        sq = (x - x_hat).square().sum(-1)
        if not train:
            return sq, ce
        g = 2 * w_mse * (x_hat - x)                                             # d loss / d x_hat
        # d loss / d logits = p (g E^T - g . x_hat + w_ce) - w_ce onehot
        dz = torch.addmm(w_ce - (g * x_hat).sum(-1, keepdim=True), g, E.T).mul_(p)
        dz.scatter_add_(1, targets, -w_ce)
        low = dz.to(u.dtype)
        return sq, ce, low @ W, low.T @ u, dz.sum(0), dz @ E, dz.T @ (zb * keep) + p.T @ (g * keep), -g


class _ElboHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, W, b, zb, E, x, w_mse, w_ce, targets, keep, chunk):
        N, V, train = u.shape[0], W.shape[0], any(ctx.needs_input_grad)
        sq, ce = x.new_empty(N), x.new_empty(N)
        du, dzb, dx = (torch.empty_like(v) if train else None for v in (u, zb, x))
        dW, db, dE = (torch.zeros_like(v) if train else None for v in (W, b, E))
        W_low, size = W.to(u.dtype), common.chunk_rows(V, u.device)                 # [R4]
        columns = [v[:, None].to(b.dtype) for v in (w_mse, w_ce, keep)]
        for i in range(0, N, size):
            s = slice(i, min(i + size, N))
            wm, wc, k = (v[s] for v in columns)
            sq[s], ce[s], *grads = chunk(u[s], W_low, b, zb[s], E, x[s], wm, wc, targets[s, None], k, train)
            if train:
                du[s], dzb[s], dx[s] = grads[0], grads[3], grads[5]
                dW += grads[1]
                db += grads[2]
                dE += grads[4]
            del grads                       # free this chunk's [V, D] product before the next one
        ctx.mark_non_differentiable(sq, ce)
        ctx.grads = (du, dW, db, dzb, dE, dx) if train else None
        ctx.save_for_backward(sq, ce)
        return (w_mse * sq).sum() + (w_ce * ce).sum(), sq, ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_):
        if ctx.grads is None:
            raise RuntimeError("elbo_head scales its stored gradients in place: backward can run only once")
        (sq, ce), grads, ctx.grads = ctx.saved_tensors, ctx.grads, None
        return *(d.mul_(g) for d in grads), sq * g, ce * g, None, None, None


def elbo_head(u, W, b, zb, E, x, w_mse, w_ce, targets, live, chunk=ElboChunk()):
    """Sum of w_mse |x - x_hat|^2 + w_ce CE; logits = u W^T + b + zb E^T, x_hat = softmax(logits) E.

    u [B, L, D], W [V, D], b [V], zb and x [B, L, De], E [V, De], targets [B, L]; weights and live [B] (rows
    that teach E) hold for all tokens of a row. Returns (loss, squared error [B, L], CE [B, L]), the last two
    detached. x_hat is attention of queries [u | zb] over keys [W | E] with values E, and the weights are
    known before the head: a chunk's gradients (the weights' too, the schedule's path) come from the same
    pass, and `backward` only scales them. Three products with W in all; nothing [B, L, V] outlives a chunk.
    """
    w_mse, w_ce, live = (r[:, None].expand(targets.shape).reshape(-1) for r in (w_mse, w_ce, live))
    u, zb, x = (r.flatten(0, 1) for r in (u, zb, x))
    if not torch.is_grad_enabled():         # needs_input_grad alone ignores no_grad
        W, b, E = W.detach(), b.detach(), E.detach()
    loss, sq, ce = _ElboHead.apply(u, W, b, zb, E, x, w_mse, w_ce, targets.reshape(-1), live, chunk)
    return loss, sq.view(targets.shape), ce.view(targets.shape)


# --- 5. solver steps and guidance ------------------------------------------------------------------

def time_grid(steps, grid="uniform"):
    """Times t_i of the network calls and s_i of the updates' targets, float64 [T] each.

    uniform: t_i = 1 - i / T, s_i = t_{i+1}. plaid: the official t = linspace(1, 0, T) with s = t - 1 / T, so
    that z is one notch, 1 / (T (T - 1)), off the next t; the last step, from t = 0, moves nothing.
    """
    if grid == "uniform":
        t = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
        return t[:-1], t[1:]
    t = torch.linspace(1, 0, steps, dtype=torch.float64)
    return t, torch.where(t > 0, t - 1 / steps, t)


def ddpm_step(z, x, gamma_t, gamma_s, eps):
    """Draw from q(z_s | z_t, x), s < t (VDM, eq. 33): c = -expm1(gamma_s - gamma_t)."""
    (alpha_t, _), (alpha_s, sigma_s) = alpha_sigma(gamma_t), alpha_sigma(gamma_s)
    c = -torch.expm1(gamma_s - gamma_t)
    return (1 - c) * (alpha_s / alpha_t) * z + c * alpha_s * x + c.sqrt() * sigma_s * eps


def ddim_step(z, x, gamma_t, gamma_s):
    """First order in the probability flow: keep the implied noise, move to gamma_s."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(gamma_t), alpha_sigma(gamma_s)
    return alpha_s * x + sigma_s * (z - alpha_t * x) / sigma_t


def dpmpp_step(z, x, gamma_t, gamma_s, last=None):
    """DPM-Solver++(2M) in lambda = -gamma / 2 (eqs. 16-17); last = (x, gamma) of the last call or None."""
    (_, sigma_t), (alpha_s, sigma_s) = alpha_sigma(gamma_t), alpha_sigma(gamma_s)
    h = (gamma_t - gamma_s) / 2
    if last is not None:
        x = x + h / (last[1] - gamma_t) * (x - last[0])                         # h / (2 h_last)
    return sigma_s / sigma_t * z - alpha_s * torch.expm1(-h) * x


def heun_step(z, x, x2, gamma_t, gamma_s):
    """Second order in y = z / alpha over k = exp(gamma / 2); x2: the estimate at ddim_step(z, x)."""
    (alpha_t, _), (alpha_s, _) = alpha_sigma(gamma_t), alpha_sigma(gamma_s)
    y, k_t, k_s = z / alpha_t, torch.exp(gamma_t / 2), torch.exp(gamma_s / 2)
    d1 = (y - x) / k_t
    d2 = (y + (k_s - k_t) * d1 - x2) / k_s
    return alpha_s * (y + (k_s - k_t) * (d1 + d2) / 2)


def temper(x_hat, z, gamma, tau):
    """x_hat after its implied noise is divided by tau: x_hat / tau + (1 - 1 / tau) z / alpha."""
    return x_hat / tau + (1 - 1 / tau) * z / alpha_sigma(gamma)[0]


def parse_guide(guide, vocab, length):
    """Rows (token, weight, where, complement) of a comma-separated guide.

    Each item is token:weight:where[:not] with where = a position, any or all: "7:3:any,9:10:all:not" asks for
    token 7 somewhere and token 9 nowhere.
    """
    rows = []
    for item in guide.split(",") if guide else ():
        try:
            token, weight, where, *flag = item.split(":")
            where = where if where in ("any", "all") else range(length)[int(where)]     # IndexError outside
            complement = {"": False, "not": True}[":".join(flag)]
            rows.append((range(vocab)[int(token)], float(weight), where, complement))
        except (ValueError, IndexError, KeyError):
            raise data.UserError(f"guide={item}: not token:weight:where[:not] with a token below {vocab} and "
                                 f"where = any, all or a position below {length}")
    return rows


def guide_score(logits, guides):
    """Sum over batch and guides of weight * log-probability; logits [n, L, V] (official Plaid code).

    `any` is logsumexp over positions minus L, where log L was meant; only its complement can tell.
    """
    lse, total = logits.logsumexp(-1), 0
    for token, weight, where, complement in guides:
        wanted = logits[:, :, token]
        if complement and where != "any":       # log(1 - p) from the other tokens: finite where p rounds to 1
            wanted = torch.cat([logits[:, :, :token], logits[:, :, token + 1:]], -1).logsumexp(-1)
        v = wanted - lse                                                        # [n, L]
        if where == "any":
            v = v.logsumexp(-1) - v.shape[1]
            v = torch.log1p(-v.exp()) if complement else v
        elif where != "all":
            v = v[:, where]
        total = total + weight * v.sum()
    return total


# --- 6. diagnostics --------------------------------------------------------------------------------

def variation(values):
    """Coefficient of variation: standard deviation / mean."""
    return (values.std(correction=0) / values.mean()).item()


def r_squared(values):
    """R^2 of equally spaced values [n] against the best straight line."""
    x = torch.linspace(-1, 1, len(values), dtype=values.dtype, device=values.device)
    y = values - values.mean()
    return ((x @ y) ** 2 / ((x @ x) * (y @ y))).item()


def components(E, share=0.9):
    """How many principal components of E [V, De] hold `share` of its variance."""
    power = torch.linalg.svdvals((E - E.mean(0)).double()) ** 2
    return int((power.cumsum(0) / power.sum() < share).sum()) + 1


# --- 7. model --------------------------------------------------------------------------------------

class Denoiser(common.DiT):
    """The MDLM / Duo backbone behind two [De -> D] input maps [R2]; there is no [V, D] input table."""

    def __init__(self, c):
        super().__init__(c.d_model, c.n_layer, c.n_head, c.cond_dim, c.mlp_ratio, c.dropout, c.length,
                         out=c.vocab, gate_init=c.gate_init)
        self.input_linear = nn.Linear(c.d_embed, c.d_model, bias=False)
        self.selfcond_linear = nn.Linear(c.d_embed, c.d_model, bias=False)
        nn.init.zeros_(self.selfcond_linear.weight)

    def forward(self, z, gamma, x_sc):
        """z, x_sc [B, L, De], gamma [B] float64 -> u [B, L, D]; x_sc is zero where nothing is fed back."""
        De = z.shape[-1]
        std = (torch.sigmoid(-gamma) / De + torch.sigmoid(gamma)).sqrt()        # of one coordinate of z
        h = self.input_linear(z / bc(std).to(z.dtype)) + self.selfcond_linear(De ** 0.5 * x_sc)
        return super().forward(h, self.cond(gamma))                             # [R1]


class RePlaid(nn.Module):
    """The paper's four learned parts: network, embedding, schedule shape and its two ends."""
    log_keys = ("recon", "diffusion", "gamma_0", "gamma_1")

    def __init__(self, cfg):
        super().__init__()
        for key, least in LEAST.items():
            if getattr(cfg, key) < least:
                raise data.UserError(f"--{key}={getattr(cfg, key)}: must be at least {least}")
        if cfg.gamma_0 >= cfg.gamma_1:
            raise data.UserError(f"--gamma_0={cfg.gamma_0} is not below --gamma_1={cfg.gamma_1}")
        if cfg.batch < 2 or cfg.batch % max(cfg.self_cond_every, 1):
            raise data.UserError(f"--batch={cfg.batch} is not divisible by {max(cfg.self_cond_every, 2)}: "
                                 f"one row in self_cond_every={cfg.self_cond_every} is self-conditioned")
        self.cfg = cfg
        self.model = Denoiser(cfg)
        self.embedding_matrix = EmbeddingMatrix(cfg.vocab, cfg.d_embed)
        self.noise_schedule = NoiseSchedule(cfg.schedule_width)
        self.gamma_bounds, self.chunk = GammaBounds(cfg.gamma_0, cfg.gamma_1), ElboChunk()
        for group in self.param_groups():       # rate 0: frozen, and out of the clipped norm
            for p in group["params"]:
                p.requires_grad_(group["lr"] > 0)
        zeros = torch.zeros(5, dtype=torch.float64)
        self.register_buffer("updates", zeros[0].clone())                       # steps taken, for the ramp
        self.register_buffer("row_stats", zeros + STATS_INIT)                   # see reconstruction_rows
        self.register_buffer("pending", zeros, persistent=False)              # this step's means, and a count

    def param_groups(self):
        """Network; shape and embedding, never decayed; endpoints, whose lr * decay is bounds_decay."""
        c = self.cfg
        decay = c.bounds_decay / c.lr_bounds if c.lr_bounds else 0.0
        groups = ((self.model, c.lr, c.weight_decay), (self.noise_schedule, c.lr_shape, 0.0),
                  (self.gamma_bounds, c.lr_bounds, decay), (self.embedding_matrix, c.lr_embed, 0.0))
        return [dict(params=list(m.parameters()), lr=lr, weight_decay=wd) for m, lr, wd in groups]

    def flops_per_token(self):
        """F_RePlaid of the scaling protocol, times 3 and the self-conditioned share."""
        c = self.cfg
        share = 1 / c.self_cond_every if c.self_cond_every else 0
        return forward_flops(c.d_model, c.n_layer, c.vocab, c.d_embed) * (3 + share)

    def schedule(self, t):
        """t [B] -> gamma, gamma' [B], float64."""
        gamma_0, gamma_1 = self.gamma_bounds()
        g, g_dot = self.noise_schedule(t)
        return gamma_0 + (gamma_1 - gamma_0) * g, (gamma_1 - gamma_0) * g_dot

    def features(self, z, gamma, x_sc, scale=1.0):
        """What the head takes: u [B, L, D], W [V, D], b [V], zb = scale (alpha / sigma^2) z [B, L, De]."""
        alpha, sigma = alpha_sigma(gamma)
        coeff = self.cfg.output_prior * scale * alpha / sigma ** 2
        head = self.model.output_layer.linear
        return self.model(z, gamma, x_sc), head.weight, head.bias, bc(coeff).to(z.dtype) * z

    def predict(self, z, gamma, x_sc, E, scale=1.0):
        """x_hat [B, L, De]."""
        u, W, b, zb = self.features(z, gamma, x_sc, scale)
        return common.expected_embedding(u, W, b, E, skip=zb, E=E)[0]

    # --- 8. loss -----------------------------------------------------------------------------------

    def sc_rows(self, rows, B, device):
        """Mask [B] of the self-conditioned rows and their indices, whose number is fixed."""
        every = self.cfg.self_cond_every
        if not every:
            return torch.zeros(B, dtype=torch.bool, device=device), ()
        if B % every:
            raise data.UserError(f"{B} rows per rank and micro-step: not a multiple of self_cond_every")
        sc = rows.subset(every, device=device)
        return sc, sc.view(-1, every).int().argmax(1) + every * torch.arange(B // every, device=device)

    def loss(self, batch, t=None, noise=None, coins=None):
        """Negative evidence lower bound in nats per token; equal chunks average to the global batch's.

        t [B]: times, of which zeros mark reconstruction rows; noise [B, L, De]: eps; coins [B] bool:
        self-conditioned rows. Padding is modelled like any token, and the bound on all of it divided by the
        number of real tokens.
        """
        tokens = batch["tokens"]
        (B, L), device, per_row = tokens.shape, tokens.device, tokens.shape[1]
        if "mask" in batch:
            per_row = batch.get("global_len", batch["mask"].sum(1)).double().mean()
        rows = batch.get("rows") or common.Rows.default(B)
        E = self.embedding_matrix()                                             # [V, De]
        eps = torch.randn(B, L, E.shape[1], device=device) if noise is None else noise

        # 1. rows: r of the n global ones estimate the reconstruction, an exact share is self-conditioned
        n = rows.n_global
        if t is None:
            r = reconstruction_rows(self.row_stats, n)
            t = diffusion_times(rows.uniform(device=device), r, n)
        else:
            r = (t == 0).sum() * (n / B)
        is_recon = t == 0
        n_recon, n_diff = (k.clamp(min=1) * (B / n) for k in (r, n - r))        # normalisers of a chunk
        sc, index = self.sc_rows(rows, B, device) if coins is None else (coins, coins.nonzero()[:, 0])

        # 2. schedule: self-conditioned rows teach neither its shape nor its ends
        gamma_0, gamma_1 = self.gamma_bounds()
        g, g_dot = self.noise_schedule(t)
        gamma, gamma_dot = gamma_0 + (gamma_1 - gamma_0) * g, (gamma_1 - gamma_0) * g_dot
        end = gamma_1.expand(B)
        gamma, gamma_dot, end = (torch.where(sc, v.detach(), v) for v in (gamma, gamma_dot, end))

        # 3. diffuse: z in the parameters' dtype, the schedule in float64
        x = E[tokens]
        x = torch.where(bc(sc), x.detach(), x)                                  # [B, L, De]
        alpha, sigma = (bc(v).to(E.dtype) for v in alpha_sigma(gamma))
        z = alpha * x + sigma * eps.to(E.dtype)

        # 4. the estimate fed back: a first pass over the self-conditioned rows only
        scale, x_sc = bias_scale(self.updates, self.cfg.bias_ramp), torch.zeros_like(z)
        if len(index):
            with torch.no_grad():
                x_sc[index] = self.predict(z[index], gamma[index], x_sc[index], E, scale)

        # 5. every row carries both weights, so that r changes numbers and never shapes
        w_mse = torch.where(is_recon, 0, diffusion_weight(gamma, gamma_dot)) / per_row      # [B]
        w_ce = is_recon.double() / per_row
        terms, sq, ce = elbo_head(*self.features(z, gamma, x_sc, scale), E, x, w_mse / n_diff, w_ce / n_recon,
                                  tokens, ~sc, self.chunk)
        prior = prior_kl(x, end).sum() / (B * per_row)
        diff, recon = w_mse.detach() * sq.double().sum(1), w_ce * ce.double().sum(1)    # [B], 0 on other rows

        # 6. the shape descends E[l^2]: 2 l times the gradient, before the affine map, on diffusion rows only
        for path in (g, g_dot):
            if path.requires_grad:
                path.register_hook(lambda grad: grad * 2 * diff)

        means = torch.stack([recon.sum() / n_recon, recon.square().sum() / n_recon,
                             diff.sum() / n_diff, diff.square().sum() / n_diff])
        if self.training:
            self.pending += torch.cat([means, torch.ones_like(means[:1])])
        return terms + prior, dict(recon=means[0], diffusion=means[2], prior=prior.detach(), rows=r,
                                   gamma_0=gamma_0.detach(), gamma_1=gamma_1.detach())

    @torch.no_grad()
    def after_step(self, step, ok):
        """Commit this step's statistics, averaged over micro-steps and ranks; none if skipped."""
        means = common.all_reduce_mean(self.pending[:4] / self.pending[4])
        self.row_stats.copy_(torch.where(ok, update_stats(self.row_stats, means), self.row_stats))
        self.updates += ok
        self.pending.zero_()

    # --- 9. likelihood -----------------------------------------------------------------------------

    def losses_at(self, tokens, t, E, eps=None):
        """Diffusion loss and cross-entropy at times t [B], each [B] in nats per sequence, float64.

        Two passes: every row is self-conditioned, as in the published bound. x_sc is a function of (z_t,
        gamma), so this is a bound; the sampler's x_sc, carried over from the previous step, belongs to a
        slightly different model.
        """
        x, (gamma, gamma_dot) = E[tokens], self.schedule(t)
        alpha, sigma = (bc(v).to(E.dtype) for v in alpha_sigma(gamma))
        z = alpha * x + sigma * (torch.randn_like(x) if eps is None else eps.to(E.dtype))
        x_sc = torch.zeros_like(z)
        if self.cfg.self_cond_every:
            x_sc = self.predict(z, gamma, x_sc, E)
        query, zeros = self.features(z, gamma, x_sc), torch.zeros_like(t)
        _, sq, ce = elbo_head(*query, E, x, zeros, zeros, tokens, zeros, self.chunk)
        return diffusion_weight(gamma, gamma_dot) * sq.double().sum(1), ce.double().sum(1)

    @torch.no_grad()
    def nll(self, tokens, mask=None, times=8, t=None, noise=None):
        """The bound and its terms, [B] in nats per SEQUENCE (padding scored as text); `times` draws a row.

        t [K, B] and noise [K + 1, B, L, De] (the reconstruction's first) may be given.
        """
        if times < 1:
            raise data.UserError(f"times={times}: must be at least 1")
        B, E = tokens.shape[0], self.embedding_matrix()
        if t is None:               # stratified within a row and over the rows
            u = common.Rows.default(B).uniform(device=tokens.device)
            t = torch.stack([(k + u) / times for k in range(times)])
        eps = [None] * (len(t) + 1) if noise is None else noise
        recon = self.losses_at(tokens, torch.zeros_like(t[0]), E, eps[0])[1]
        diff = sum(self.losses_at(tokens, t_k, E, eps_k)[0] for t_k, eps_k in zip(t, eps[1:])) / len(t)
        prior = prior_kl(E[tokens], self.gamma_bounds()[1].expand(B)).sum(1)
        return dict(nll=recon + diff + prior, recon=recon, diffusion=diff, prior=prior)

    @torch.no_grad()
    def time_table(self, tokens, rounds=4):
        """Diffusion loss and CE by decile of t, [2, 10] in nats per token; `rounds` noise draws of tokens."""
        E, total = self.embedding_matrix(), torch.zeros(3, 10, dtype=torch.float64, device=tokens.device)
        for chunk in tokens.split(self.cfg.batch // self.cfg.accum) * rounds:
            t = common.Rows.default(len(chunk)).uniform(device=tokens.device)
            diff, ce = self.losses_at(chunk, t, E)
            count = torch.full_like(ce, tokens.shape[1])
            total.index_add_(1, (10 * t).long(), torch.stack([diff, ce, count]))
        return total[:2] / total[2]

    def diagnostics(self, corpus):
        """Lines for `eval`: is l(t) flat, is CE(t) a line, how many directions does the embedding use."""
        device, De = self.embedding_matrix.matrix.device, self.cfg.d_embed
        val, train = (corpus.rows(split, np.arange(min(n, corpus.n_rows(split))))["tokens"].to(device)
                      for split, n in (("val", 512), ("train", 4096)))
        loss, ce = self.time_table(val)
        E = self.embedding_matrix().detach()[train.unique()]                    # the others drift freely
        ends = self.schedule(torch.linspace(0, 1, 5, device=device))[0].tolist()
        return ["decile of t       " + " ".join(f"{i / 10:5.1f}" for i in range(10)),
                "diffusion loss    " + " ".join(f"{v:5.2f}" for v in loss.tolist()) + "  nats/token",
                "cross-entropy     " + " ".join(f"{v:5.2f}" for v in ce.tolist()) + "  nats/token",
                f"loss over t       coefficient of variation {variation(loss):.1%}, first seven deciles "
                f"{variation(loss[:7]):.1%}; R^2 of CE(t) against a line {r_squared(ce):.4f}",
                "gamma at quarters " + " ".join(f"{v:5.2f}" for v in ends),
                f"embedding         {components(E)} of {De} principal components hold 90 % of the variance "
                f"of the {len(E)} tokens seen"]

    # --- 10. sampling ------------------------------------------------------------------------------

    def estimate(self, z, gamma, x_sc, E, tau, held, guides):
        """One network call: (what the solver uses, x_hat to feed back), [n, L, De] float64.

        The first is tempered, then moved by the guides' gradient, and exact where tokens are held.
        """
        gammas = gamma.expand(len(z))
        x_hat = self.predict(z.to(E.dtype), gammas, x_sc.to(E.dtype), E).double()
        x = temper(x_hat, z, gamma, tau)
        if guides:
            alpha, sigma = alpha_sigma(gamma)
            with torch.enable_grad():
                z_in = z.detach().requires_grad_()
                u, W, b, zb = self.features(z_in.to(E.dtype), gammas, x_sc.to(E.dtype))
                logits = F.linear(u.to(E.dtype), W, b) + zb @ E.T                       # [n, L, V]
                x = x + torch.autograd.grad(guide_score(logits, guides), z_in)[0] * sigma ** 2 / alpha
        if held is not None:
            x, x_hat = (torch.where(held[1], held[0], v) for v in (x, x_hat))
        return x, x_hat

    @torch.no_grad()
    def sample(self, n, length, steps, known=None, known_mask=None, watch=None, sampler="ddpm", tau=1.0,
               grid="uniform", guide="", noise=None):
        """Tokens [n, length]: `steps` updates of one network call each (heun: two), then one for the argmax.

        Held positions (known [n, L] where known_mask: a prefix, an infilling) take their own embedding as the
        estimate and so follow the forward process. noise [steps + 1, n, L, De]: the start, then the updates'.
        """
        if sampler not in ("ddpm", "ddim", "dpmpp", "heun") or grid not in ("uniform", "plaid"):
            raise data.UserError(f"sampler={sampler} grid={grid}: ddpm, ddim, dpmpp, heun; uniform, plaid")
        if tau <= 0:
            raise data.UserError(f"tau={tau}: the score temperature must be above 0")
        E, guides = self.embedding_matrix(), parse_guide(guide, self.cfg.vocab, length)
        device, size, held, last = E.device, (n, length, E.shape[1]), None, None
        gamma_t, gamma_s = (self.schedule(t.to(device))[0] for t in time_grid(steps, grid))
        fresh = (torch.randn(size, device=device) for _ in range(steps + 1))
        eps = (v.double() for v in (fresh if noise is None else noise))         # the state is float64
        z, x_sc = next(eps), torch.zeros(size, dtype=torch.float64, device=device)
        if known is not None:
            held = E[known].double(), known_mask[..., None]
            alpha, sigma = alpha_sigma(gamma_t[0])
            z = torch.where(held[1], alpha * held[0] + sigma * z, z)
        for i, (g_t, g_s) in enumerate(zip(gamma_t, gamma_s), 1):
            x, x_sc = self.estimate(z, g_t, x_sc, E, tau, held, guides)
            if sampler == "ddpm":
                z = ddpm_step(z, x, g_t, g_s, next(eps))
            elif sampler == "ddim":
                z = ddim_step(z, x, g_t, g_s)
            elif sampler == "dpmpp":
                z, last = dpmpp_step(z, x, g_t, g_s, last), (x, g_t)
            else:
                x2, x_sc = self.estimate(ddim_step(z, x, g_t, g_s), g_s, x_sc, E, tau, held, guides)
                z = heun_step(z, x, x2, g_t, g_s)
            if watch is not None:
                watch(i, (x_sc.to(E.dtype) @ E.T).argmax(-1))               # nearest to the estimate
        u, W, b, zb = self.features(z.to(E.dtype), self.gamma_bounds()[0].expand(n), x_sc.to(E.dtype))
        tokens = common.greedy(u, W, b, skip=zb, E=E)
        return tokens if known is None else torch.where(known_mask, known, tokens)


if __name__ == "__main__":
    common.main(RePlaid, Config, PRESETS)
