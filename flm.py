"""FLM / FMLM: a flow over one-hot tokens, and its flow map for text in one to a few steps.
Lee, Yoo, Agarwal, Shah, Huang, Raghunathan, Hong, Boffi, Kim, "Flow Map Language Models: One-step Language
Modeling via Continuous Denoising", arXiv:2602.16813. "Official code" is the authors' release of April 2026.

Modelled: x = one-hot tokens [L, V]; t = 0 is noise, t = 1 is data: z_t = t x + (1 - t) eps, eps ~ N(0, I).
FLM step:     tau ~ U(0,1), t = t(tau), loss = -log D(z_t, tau)[token], D = softmax(30 tanh(net / 30)).
FLM sampler:  z <- z + (t' - t) (D - z) / (1 - t) from noise; the tokens are the argmax of the last D.
FMLM (--stage=distill) learns delta(z_s, tau_s, tau_t), the mean denoiser that jumps from s straight to t:
              z_t = (1 - t)/(1 - s) z_s + (t - s)/(1 - s) delta;  delta(s, s) = D, delta(s, 1) = clean text.
FMLM step:    rows on the diagonal copy the teacher's D, the others obey the semigroup rule of two half jumps.
tau(t) = 1 - V/(V-1) P(argmax z_t is not the token): equal steps in tau gain equally much.

Noise in d dimensions. The network sees z only through z W (W the [V, d] embedding); for one position:
  1. h = z_t W = t W[x] + (1 - t) eta with eta = eps W ~ N(0, G), G = W^T W: a d x d matrix says it all.
  2. With C upper triangular, C^T C = G, and xi ~ N(0, I_d), xi C has the law of eta; nothing is drawn in V.
  3. For every W this h has the law of 1's: the expected loss is the same function of W, and any unbiased
     gradient of it will do. With g = dloss/dh, 1's noise term is (1 - t) eps^T g [V, D], random in all of V.
  4. g depends on eps through eta only, so eps may be replaced by E[eps | eta]: same mean, less variance
     (Rao-Blackwell). What goes is pure noise in the V - d directions that the network never sees.
  5. Q = W C^-1 has orthonormal columns that span W's, so xi = eps Q is white, eta = xi (Q^T W) = xi C and
     E[eps | eta] = xi Q^T. The gradient wanted is (1 - t) Q xi^T g.
  6. Code: h = t W[x] + (1 - t) xi (Q^T W) with Q held constant: the value is C, the derivative that of 5.
  7. Q^T W = C^-T (W^T W): only [d, d] matrices are solved for (`gram_root`), no Cholesky derivative is taken.
  8. Detaching C altogether would call the scale of the noise a constant: biased, as a test shows.
  9. A teacher with another embedding sees the same eps through its own W: two roots, one xi (`joint_root`).
 10. Not the same path of Adam: its second moment of W loses the V - d silent directions, so W moves more.

Differs from the official code: noise as above (--noise=vocab for theirs), float64 times, an exact partition
of the batch into groups, losses and targets in float32 by chunks of the head, the Eulerian diagonal at tau
(not t) and no boundary rows there, no learned loss weighting, no two-model pipeline (first version of the
paper), no uniform_st, random midpoint, EMA targets, loss rescaling (off in their scripts). No likelihood.

    python flm.py                                                 # FLM on the built-in corpus, minutes
    python flm.py --stage=distill --teacher=out/flm-tiny/ckpt.pt  # its flow map, FMLM
    python flm.py sample --out=out/flm-tiny-distill --steps=2 --churn=0.8
"""
import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
from common import bc

# --- 1. configuration -----------------------------------------------------------------------------


@dataclass
class Config(common.Config):
    attn_softcap: float = 0.0       # scores become cap tanh(scores / cap): 50 as published, 0 = SDPA
    logit_cap: float = 30.0         # logits become cap tanh(logits / cap): 30 as published, 0 = none
    noise: str = "projected"        # projected: draws in D dimensions, same law; vocab: in V, as published
    objective: str = "semigroup"    # distill: semigroup, lagrangian or eulerian
    diagonal: str = "teacher"       # distill: target on the diagonal, teacher or data (self-distillation)
    diagonal_fraction: float = 0.5  # distill: share of the rows with tau_s = tau_t
    boundary_prob: int = 32         # distill: one in this many off-diagonal rows jumps from 0 to 1; 0 = none
    soft_loss: str = "ce"           # distill, semigroup: ce (on the simplex) or mse
    lagrangian_teacher: bool = False  # distill, lagrangian: D_t from the teacher instead of the student


CHOICES = dict(noise=("projected", "vocab"), objective=("semigroup", "lagrangian", "eulerian"),
               diagonal=("teacher", "data"), soft_loss=("ce", "mse"))
PUBLISHED = dict(                   # the official scripts, with the LR constant after its warm-up
    d_model=768, n_layer=12, n_head=12, cond_dim=128, dropout=0.1, attn_softcap=50.0, batch=512, lr=3e-4,
    warmup=2500, beta1=0.9, beta2=0.999, weight_decay=0.0, clip=1.0, ema=0.9999, ema_warmup=True, seed=1,
    precision="bf16", log_every=100, val_every=5000, save_every=5000, sample_every=25000)
DISTILL = dict(objective="semigroup", diagonal="teacher", diagonal_fraction=0.5, boundary_prob=32, beta2=0.95,
               steps=1_000_000)
PRESETS = {
    "tiny": dict(data="prose", tokenizer="char", length=64, d_model=64, n_layer=3, n_head=4, cond_dim=64,
                 gate_init=0.5, batch=32, steps=3000, lr=2e-3, warmup=100, lr_schedule="cosine", min_lr=0.1,
                 ema=0.998),
    "tiny-distill": dict(steps=2000, lr=1e-3, beta2=0.95, boundary_prob=4),
    # three rows of two tokens that depend on each other: what one step cannot do without a flow map
    "toy": dict(data="newdiego", length=2, d_model=32, n_layer=2, n_head=2, cond_dim=32, attn_softcap=50.0,
                batch=256, steps=1500, lr=2e-3, warmup=100, ema=0.999, log_every=250, val_every=0),
    "toy-distill": dict(steps=3000, lr=1e-3, beta2=0.95, boundary_prob=32, log_every=500),
    "lm1b": dict(PUBLISHED, data="lm1b", tokenizer="bert-base-uncased", vocab=30522, length=128,
                 steps=1_500_000),
    "lm1b-distill": dict(DISTILL, batch=512),                       # sampled with 32 steps and --churn=0.8
    "owt": dict(PUBLISHED, data="openwebtext", tokenizer="gpt2", vocab=50258, length=1024, steps=1_500_000),
    "owt-distill": dict(DISTILL, batch=128),                        # sampled with 32 steps and --churn=1.0
    "bench10": dict(data="wikitext103", tokenizer="gpt2", length=256, d_model=384, n_layer=6, n_head=6,
                    cond_dim=128, gate_init=0.5, batch=64, steps=8000, lr=6e-4, warmup=200,
                    lr_schedule="cosine", ema=0.999),
    "bench10-cpu": dict(data="prose", tokenizer="char", length=64, d_model=64, n_layer=3, n_head=4,
                        cond_dim=64, gate_init=0.5, batch=32, steps=5000, lr=2e-3, warmup=100,
                        lr_schedule="cosine", min_lr=0.1, ema=0.998),
}
TABLE, NODES = 10_000, 100          # time table, Gauss-Hermite nodes: released weights depend on both
FLOOR = 1e-10                       # slope added to tau(t): strictly rising in its flat parts (official)
EULER_GUARD, MAP_GUARD = 1e-5, 1e-8  # added to 1 - t in FLM's sampler, 1 - s in the distillation (official)
FLOAT32_STEPS = 2 ** 24             # with more steps i / N and (i + 1) / N are one number to the network

# --- 2. time change -------------------------------------------------------------------------------


def time_table(V):
    """(t, tau) [TABLE] float64 on a uniform grid of t: tau = V/(V-1) (q - 1/V), q = P(argmax z_t is token)
    = E_g[Phi(g + t/(1-t))^(V-1)], g ~ N(0, 1), by Gauss-Hermite (official code, build_luts)."""
    t = torch.linspace(0, 1, TABLE, dtype=torch.float64)
    g, weight = hermite()
    m = t / (1 - t).clamp_min(1e-12)
    q = (weight * ((V - 1) * torch.special.log_ndtr(g + m[:, None])).exp()).sum(-1)
    tau = (V / (V - 1) * (q - 1 / V) + (t - 1) * FLOOR).clamp(0, 1)
    tau[-1] = 1                             # the weights add up to 1 within rounding
    return t, tau


def hermite():
    """Nodes and weights [NODES] float64 with sum_i w_i f(g_i) = E f(g), g ~ N(0, 1)."""
    x, w = np.polynomial.hermite.hermgauss(NODES)
    return torch.from_numpy(x * math.sqrt(2)), torch.from_numpy(w / math.sqrt(math.pi))


def interpolate(x, xs, ys):
    """Piecewise linear y(x) clipped to [0, 1], for knots xs (increasing) and ys; no host sync."""
    i = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    return torch.lerp(ys[i - 1], ys[i], (x - xs[i - 1]) / (xs[i] - xs[i - 1])).clamp(0, 1)


class TimeChange(nn.Module):
    """tau(t), its inverse and its slope, float64 on the device. Made from V alone: not part of a checkpoint.

    Linear between the official table's points: at most 6e-7 in t from the official cubic splines.
    """

    def __init__(self, V):
        super().__init__()
        self.V = V
        t, tau = time_table(V)
        new = torch.cat([torch.tensor([True]), tau[1:] > tau[:-1]])   # V = 30522: seven zeros, keep one
        start = torch.zeros(int(tau[0] > 0), dtype=torch.float64)     # V = 50258 starts at 9e-8: add (0, 0)
        knots = [torch.cat([start, x[new]]) for x in (t, tau)]
        buffers = dict(t=t, tau=tau, t_knots=knots[0], tau_knots=knots[1])
        for name, x in {**buffers, **dict(zip(("g", "weight"), hermite()))}.items():
            self.register_buffer(name, x, persistent=False)

    def _apply(self, fn, recurse=True):
        for name, x in self._buffers.items():       # .to(dtype) must not touch the tables, .to(device) must
            self._buffers[name] = x.to(fn(x).device)
        return self

    def t_of(self, tau):
        """t(tau): [...] -> [...] float64."""
        return interpolate(tau.double(), self.tau_knots, self.t_knots)

    def tau_of(self, t):
        """tau(t): [...] -> [...] float64."""
        return interpolate(t.double(), self.t, self.tau)

    def slope(self, t):
        """dtau/dt [B] float64 at t [B]: V / (1-t)^2 E[phi(g + m) Phi(g + m)^(V-2)], m = t / (1-t)."""
        rest = (1 - t.double()).clamp_min(1e-12)
        x = self.g + (t / rest)[:, None]
        log_phi = -x ** 2 / 2 - math.log(2 * math.pi) / 2
        density = (self.weight * (log_phi + (self.V - 2) * torch.special.log_ndtr(x)).exp()).sum(-1)
        return self.V * density / rest ** 2 + FLOOR

    def grid(self, steps):
        """Sampler times (tau_i, t_i) [steps + 1] float64, tau_i = i / steps; a sampler's only host read."""
        sane = 1 <= steps <= FLOAT32_STEPS
        tau = torch.arange(steps + 1 if sane else 1, dtype=torch.float64, device=self.t.device)
        tau = tau / max(1, steps)
        t = self.t_of(tau)
        if not sane or bool((t[1:] <= t[:-1]).any()):
            raise data.UserError(f"steps={steps}: the time grid resolves 1 to {FLOAT32_STEPS} steps")
        return tau, t


# --- 3. interpolant, noise in d dimensions --------------------------------------------------------


@contextlib.contextmanager
def without_tf32():
    """Matrix products in full float32 (TF32 keeps ten bits, too few for a Cholesky factor)."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def cholesky(gram, jitter):
    """Upper S [D, D] float64, S^T S = gram + jitter I, constant. The jitter is the rounding error of gram: a
    singular one does no harm, and no host sync has to look whether it is."""
    eye = torch.eye(len(gram), device=gram.device, dtype=torch.float64)
    return torch.linalg.cholesky_ex(gram.detach() + jitter * eye, upper=True)[0]


def rounding(gram):
    """Rounding error of a Gram matrix [D, D] computed in its own precision."""
    return 8 * torch.finfo(gram.dtype).eps * gram.detach().diagonal().mean()


def solve(S, x):
    """S^-T x in float64 for an upper triangular S."""
    return torch.linalg.solve_triangular(S.T, x.double(), upper=False)


@without_tf32()
def gram_root(A, W):
    """C [D, D], C^T C = W^T W, with the derivative of Q^T W, Q = W C^-1 constant (header, 5 to 7).

    A [V, D]: the value of W, detached. The Gram matrix in W's dtype, its factor in float64.
    """
    gram = A.T @ W
    return solve(cholesky(gram, rounding(gram)), gram).to(W.dtype)


@without_tf32()
def joint_root(W_teacher, W):
    """(M_T, M_S), each [2D, D]: one eps seen through both embeddings is xi M_T and xi M_S, xi ~ N(0, I_2D).

    With Q = W_T C^-1 the student is W = Q (Q^T W) + R: the first D of xi drive both networks, the rest only
    R. Both parts come from delta = W - W_T, so that nothing cancels while the student is near its teacher:
    Q^T W = C + Q^T delta and R^T R = delta^T delta - (Q^T delta)^T (Q^T delta).
    """
    delta, gram = W - W_teacher, W_teacher.T @ W_teacher
    C = cholesky(gram, rounding(gram))
    shared, moved = solve(C, W_teacher.T @ delta), delta.detach().T @ delta
    rest = moved.double() - shared.detach().T @ shared
    smallest = torch.finfo(W.dtype).eps * rounding(gram)        # delta of the last bit of W: R = 0 needs it
    R = solve(cholesky(rest, rounding(moved) + smallest), rest)
    pairs = torch.cat([C, torch.zeros_like(C)]), torch.cat([C + shared, R])
    return tuple(x.to(W.dtype) for x in pairs)


def corrupt(tokens, W, t, eta):
    """h = z_t W = t W[tokens] + (1 - t) eta [B, L, D] from tokens [B, L], t [B] float64, eta = eps W."""
    return bc(t).to(W.dtype) * F.embedding(tokens, W) + bc(1 - t).to(W.dtype) * eta


def jump(h, x_hat, s, t, guard=0.0):
    """Flow map in d dimensions, h at s -> h at t: ((1-t) h + (t-s) x_hat) / (1-s), x_hat = delta W."""
    keep, move = (1 - t) / (1 - s + guard), (t - s) / (1 - s + guard)
    return bc(keep).to(h.dtype) * h + bc(move).to(h.dtype) * x_hat


def semigroup_weight(s, u, t):
    """lam [B] in delta_{s,t} = lam delta_{s,u} + (1 - lam) delta_{u,t}; float64, since t - s may be tiny."""
    return (1 - t) * (u - s) / ((1 - u) * (t - s) + MAP_GUARD)


def simplex_projection(x):
    """Euclidean projection of the rows of x [n, V] on the simplex (entmax with alpha = 2)."""
    ranked = x.sort(-1, descending=True).values
    excess = (ranked.cumsum(-1) - 1) / torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    threshold = excess.gather(-1, (ranked > excess).sum(-1, keepdim=True) - 1)
    return (x - threshold).clamp_min(0)


# --- 4. losses at the vocabulary head, by chunks of tokens ----------------------------------------


def capped_logits(u, W, b, cap):
    """c [n, V] = cap tanh(z / cap), z = u W^T + b, in b's dtype; no cap: z itself."""
    z = F.linear(u, W.to(u.dtype)).to(b.dtype).add_(b)
    return z.div_(cap).tanh_().mul_(cap) if cap else z


def cap_slope(c, cap):
    """dc/dz [n, V] of capped logits c."""
    return (c / cap).square_().neg_().add_(1) if cap else torch.ones((), device=c.device, dtype=c.dtype)


class _SoftLoss(torch.autograd.Function):
    """sum_n weight_n l(delta_n, q_n), delta = softmax of u's capped logits; gradients are made going forward.

    q = target(part) [n, V] lives as long as its chunk of tokens. l = -sum q log delta, or sum (delta - q)^2.
    """
    @staticmethod
    def forward(ctx, u, W, b, weight, target, cap, mse):
        ctx.grads = [torch.empty_like(u), torch.zeros_like(W), torch.zeros_like(b)] \
            if any(ctx.needs_input_grad) else None
        loss = torch.empty_like(weight)
        size = common.chunk_rows(2 * len(W), u.device)
        for first in range(0, len(u), size):
            part = slice(first, first + size)
            q, c = target(part), capped_logits(u[part], W, b, cap)
            slope = cap_slope(c, cap)
            logp = c.sub_(c.logsumexp(-1, keepdim=True))            # in place from here: memory is time
            if mse:
                p = logp.exp_()
                gap = p - q
                loss[part] = gap.square().sum(-1)
                dc = 2 * p * (gap - (p * gap).sum(-1, keepdim=True))
            else:
                loss[part] = -(q * logp).sum(-1)
                dc = logp.exp_().mul_(q.sum(-1, keepdim=True)).sub_(q)
            if ctx.grads:
                dz = dc.mul_(slope).mul_(weight[part, None])
                low = dz.to(u.dtype)
                ctx.grads[0][part] = low @ W.to(u.dtype)
                ctx.grads[1] += (low.T @ u[part]).to(W.dtype)
                ctx.grads[2] += dz.sum(0)
        ctx.mark_non_differentiable(loss)
        return (weight * loss).sum(), loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        out, ctx.grads = ctx.grads, None                            # scaled in place: backward runs once
        return (*[x.mul_(g) for x in out], None, None, None, None)


def soft_loss(u, head, weight, target, cap, mse=False):
    """Loss of u [n, L, D] against distributions: weight [n, L], target(part of the n*L tokens) -> q [., V].

    Returns (sum of weight * loss, loss [n, L] detached); nothing of size [n, L, V] is ever whole.
    """
    W, b = head.weight, head.bias
    if not torch.is_grad_enabled():         # needs_input_grad of a parameter is true even then
        W, b = W.detach(), b.detach()
    loss, rows = _SoftLoss.apply(u.flatten(0, 1), W, b, weight.flatten(), target, cap, mse)
    return loss, rows.view(weight.shape)


def per_token(x, L):
    """A scalar per row [n] -> [n * L, 1], to meet the tokens of a chunk."""
    return x.repeat_interleave(L)[:, None]


# --- 5. model -------------------------------------------------------------------------------------

DIAGONAL, BOUNDARY, OFF = range(3)          # roles of the rows of a distillation batch


def group_counts(n, fraction, boundary_prob):
    """(diagonal, boundary) rows among n, by the official cumulative integers; 512, 0.5, 32 -> (256, 8)."""
    diagonal = int(n * fraction)
    share = (1 - fraction) / boundary_prob if boundary_prob else 0
    return diagonal, int(n * (fraction + share)) - diagonal


def spread(k, n):
    """n booleans of which k are True, as evenly as integers allow."""
    return [(i + 1) * k // n > i * k // n for i in range(n)]


class FLM(nn.Module):
    """FLM (stage train: one time) and FMLM (stage distill: two times, with an FLM as its teacher)."""
    log_keys = ("diagonal", "off")              # FMLM: the two groups of a training batch
    init_keys = ("attn_softcap", "logit_cap")   # --init refuses a checkpoint with other caps

    def __init__(self, cfg):
        super().__init__()
        for key, allowed in CHOICES.items():
            if getattr(cfg, key) not in allowed:
                raise data.UserError(f"--{key}={getattr(cfg, key)}: one of {', '.join(allowed)}")
        if not 0 <= cfg.diagonal_fraction < 1:
            raise data.UserError(f"--diagonal_fraction={cfg.diagonal_fraction}: at least 0 and below 1")
        self.cfg, self.two_times = cfg, cfg.stage == "distill"
        if self.two_times and cfg.boundary_prob < 1 and cfg.objective != "eulerian":
            raise data.UserError(f"--boundary_prob={cfg.boundary_prob}: the {cfg.objective} objective needs "
                                 "rows that jump from 0 to 1; take 4 (small batches) to 32")
        self.backbone = common.DiT(
            cfg.d_model, cfg.n_layer, cfg.n_head, cfg.cond_dim, cfg.mlp_ratio, cfg.dropout, cfg.length,
            vocab=cfg.vocab, out=cfg.vocab, n_times=1 + self.two_times, softcap=cfg.attn_softcap,
            gate_init=cfg.gate_init)
        self.time = TimeChange(cfg.vocab)
        self.val_keys = ("ce", "off") if self.two_times else ("ce",)    # averages over tau, not bounds
        self.default_steps = 4 if self.two_times else 64
        self._teacher = []                  # a list keeps the teacher out of parameters() and state_dict()

    @staticmethod
    def distils_alone(cfg):
        """True where --stage=distill needs no teacher."""
        return cfg.diagonal == "data" and not cfg.lagrangian_teacher

    # Small names for the parts of the shared backbone.
    @property
    def W(self):
        return self.backbone.vocab_embed.embedding

    @property
    def head(self):
        return self.backbone.output_layer.linear

    def trunk(self, h, tau_s, tau_t):
        """u [B, L, D] before the vocabulary head from h [B, L, D] and times [B] (FLM ignores tau_t)."""
        times = [x.to(self.W.dtype) for x in (tau_s, tau_t)[:1 + self.two_times]]
        return self.backbone(h, self.backbone.cond(*times))

    def project(self, u, values=None):
        """x_hat = softmax(capped logits of u) @ values [B, L, D]; values default to the embedding W."""
        values = self.W if values is None else values
        head, cap = self.head, self.cfg.logit_cap
        return common.expected_embedding(u, head.weight, head.bias, values, cap=cap)[0]

    def probs(self, u):
        """u [n, L, D] -> function: part of the n*L tokens -> distributions [., V]."""
        return lambda part: capped_logits(u.flatten(0, 1)[part], self.head.weight, self.head.bias,
                                          self.cfg.logit_cap).softmax(-1)

    def noise_width(self, networks):
        """Normals per position: D for each network that looks on, at most the V that serve any number."""
        cfg = self.cfg
        return cfg.vocab if cfg.noise == "vocab" else min(cfg.vocab, networks * cfg.d_model)

    def token_weight(self, batch, rows):
        """Weight of every token [B, L]: one over the global number of counted tokens, times n_global / B."""
        tokens, mask = batch["tokens"], batch.get("mask")
        if mask is None:
            return torch.full(tokens.shape, 1 / tokens.numel(), device=tokens.device, dtype=self.W.dtype)
        if "global_len" not in batch:
            return mask / mask.sum()
        return mask.to(self.W.dtype) * (rows.n_global / len(tokens)) / batch["global_len"].sum()

    # --- 6. losses ------------------------------------------------------------------------------

    def loss(self, batch, t=None, noise=None, coins=None):
        """Mean loss over the counted tokens of batch["tokens"] [B, L], nats (squared probabilities for mse).

        Draws: t = tau [B] for FLM, (tau_s, tau_u, tau_t) for FMLM; noise = eps [B, L, V], or xi [B, L, D] (2D
        when a teacher sees it too); coins = FMLM's role of every row (0 diagonal, 1 boundary, 2 off).
        """
        rows = batch.get("rows") or common.Rows.default(len(batch["tokens"]))
        return (self.distillation if self.two_times else self.flow)(batch, rows, t, noise, coins)

    def flow(self, batch, rows, tau, noise, coins):
        """FLM: tau uniform, h from the interpolant, cross-entropy of the capped logits; no weight in time."""
        tokens, cfg = batch["tokens"], self.cfg
        tau = rows.uniform(device=tokens.device) if tau is None else tau                # [B]
        h = self.noisy(tokens, self.time.t_of(tau), noise)[0]                           # [B, L, D]
        u = self.trunk(h, tau, None)                                                    # [B, L, D]
        loss, _ = common.token_ce(u, self.head.weight, self.head.bias, tokens, self.token_weight(batch, rows),
                                  cap=cfg.logit_cap)
        return loss, dict(ce=loss.detach())

    def noisy(self, tokens, t, noise, teacher=None):
        """(h, h_teacher): one draw of noise seen through this embedding and the teacher's (or None)."""
        W, W_teacher = self.W, teacher.W if teacher else None
        if noise is None:
            width = self.noise_width(2 if teacher else 1)
            noise = torch.randn(*tokens.shape, width, device=W.device, dtype=W.dtype)
        if noise.shape[-1] == len(W):
            M_teacher, M = W_teacher, W                         # vocabulary noise: eps itself
        elif teacher:
            M_teacher, M = joint_root(W_teacher, W)
        else:
            M_teacher, M = None, gram_root(W.detach(), W)
        h = corrupt(tokens, W, t, noise @ M)
        return h, corrupt(tokens, W_teacher, t, noise @ M_teacher) if teacher else None

    def roles(self, rows):
        """Role of each local row, as integers: an exact partition of the global batch, spread evenly."""
        # differs from the official code: no random assignment. Rows come in random order with permuted times,
        # so a fixed pattern has the same law, and every rank and micro-step has static shapes.
        n = rows.n_global
        prob = 0 if self.cfg.objective == "eulerian" else self.cfg.boundary_prob    # 1/(1-t) explodes there
        n_diagonal, n_boundary = group_counts(n, self.cfg.diagonal_fraction, prob)
        if prob and not n_boundary and self.training:
            raise data.UserError(f"--boundary_prob={prob} leaves no boundary row in a batch of {n}: lower "
                                 "it, or raise --batch")
        boundary = iter(spread(n_boundary, n - n_diagonal))
        roles = [DIAGONAL if d else BOUNDARY if next(boundary) else OFF for d in spread(n_diagonal, n)]
        return roles[rows.first:rows.first + rows.n_local]

    def draw_times(self, rows, roles, device):
        """(tau_s, tau_u, tau_t) [B] float64: equal on the diagonal, 0 and 1 on the boundary, else a random
        interval of uniform length ("uniform_diff"); u is the midpoint in tau, not in t."""
        role = torch.tensor(roles).to(device, non_blocking=True)
        tau, length, start = (rows.uniform(salt, device) for salt in range(3))
        tau_s = torch.where(role == DIAGONAL, tau, torch.where(role == BOUNDARY, 0.0, start * (1 - length)))
        tau_t = torch.where(role == DIAGONAL, tau, torch.where(role == BOUNDARY, 1.0, tau_s + length))
        return tau_s, (tau_s + tau_t) / 2, tau_t

    def distillation(self, batch, rows, taus, noise, coins):
        """FMLM: diagonal rows learn D, the others the flow map; one draw of noise serves every network call.

        In eval mode the tokens stand in for a missing teacher, and the metric ce compares with FLM's.
        """
        tokens, cfg = batch["tokens"], self.cfg
        teacher = self._teacher[0] if self._teacher else None
        if teacher is None and self.training and not self.distils_alone(cfg):
            raise data.UserError("--stage=distill needs --teacher=CKPT of an FLM (or --diagonal=data)")
        # 1. roles and times, rows sorted into diagonal rows first
        roles = self.roles(rows) if coins is None else [int(c) for c in coins]
        taus = self.draw_times(rows, roles, tokens.device) if taus is None else taus
        order = sorted(range(len(roles)), key=lambda i: roles[i] != DIAGONAL)
        order = torch.tensor(order).to(tokens.device, non_blocking=True)
        n = roles.count(DIAGONAL)
        tokens, weight = tokens[order], self.token_weight(batch, rows)[order]
        taus = [x.double()[order] for x in taus]
        times = [self.time.t_of(x) for x in taus]                                       # s, u, t float64 [B]
        # 2. the student on all rows, with gradient
        h, h_teacher = self.noisy(tokens, times[0], None if noise is None else noise[order], teacher)
        u_st = self.trunk(h, taus[0], taus[2])
        # 3. targets, without: functions that build the distributions of one chunk of tokens
        with torch.no_grad():
            if teacher is None or cfg.diagonal == "data":
                ids = tokens[:n].flatten()
                target = lambda part: F.one_hot(ids[part], cfg.vocab).to(self.W.dtype)
            else:
                target = teacher.probs(teacher.trunk(h_teacher[:n], taus[0][:n], taus[0][:n]))
            off = [x[n:] for x in (h.detach(), h if h_teacher is None else h_teacher, *taus, *times)]
            off_target = dict(semigroup=self.semigroup, lagrangian=self.lagrangian,
                              eulerian=self.eulerian)[cfg.objective](teacher, *off)
        # 4. losses of both groups; the weights already hold the mean over all tokens
        mse = cfg.objective == "semigroup" and cfg.soft_loss == "mse"
        on_loss, _ = soft_loss(u_st[:n], self.head, weight[:n], target, cfg.logit_cap, mse)
        off_loss, _ = soft_loss(u_st[n:], self.head, weight[n:], off_target, cfg.logit_cap,
                                mse or cfg.objective == "eulerian")
        shares = [x.sum().clamp_min(1e-30) for x in (weight[:n], weight[n:])]       # a group may be empty
        metrics = dict(diagonal=on_loss.detach() / shares[0], off=off_loss.detach() / shares[1])
        if not self.training:
            metrics["ce"] = common.token_ce(u_st[:n], self.head.weight, self.head.bias, tokens[:n],
                                            weight[:n], cap=cfg.logit_cap)[0] / shares[0]
        return on_loss + off_loss, metrics

    def semigroup(self, teacher, h, h_teacher, tau_s, tau_u, tau_t, s, u, t):
        """q = lam delta_{s,u}(z_s) + (1 - lam) delta_{u,t}(X_{s,u}): two half jumps, the student's own."""
        u_su = self.trunk(h, tau_s, tau_u)
        u_ut = self.trunk(jump(h, self.project(u_su), s, u, MAP_GUARD), tau_u, tau_t)
        lam = per_token(semigroup_weight(s, u, t).to(h.dtype), h.shape[1])
        first, second = self.probs(u_su), self.probs(u_ut)
        return lambda part: torch.lerp(second(part), first(part), lam[part])

    def lagrangian(self, teacher, h, h_teacher, tau_s, tau_u, tau_t, s, u, t):
        """q = D_t(X_{s,t}) - (t-s)(1-t)/(1-s) d delta_{s,t}/dt, projected on the simplex it may leave."""
        delta, u_st = self.tangent(h, tau_s, tau_t, torch.zeros_like(h), 0.0, torch.ones_like(tau_t))
        if teacher and self.cfg.lagrangian_teacher:
            X = jump(h_teacher, self.project(u_st, teacher.W), s, t, MAP_GUARD)
            D = teacher.probs(teacher.trunk(X, tau_t, tau_t))
        else:
            D = self.probs(self.trunk(jump(h, self.project(u_st), s, t, MAP_GUARD), tau_t, tau_t))
        scale = (t - s) * (1 - t) / (1 - s + MAP_GUARD) * self.time.slope(t)    # the tangent is d/dtau
        scale = per_token(scale.to(h.dtype), h.shape[1])
        return lambda part: simplex_projection(D(part) - scale[part] * delta(part)[1])

    def eulerian(self, teacher, h, h_teacher, tau_s, tau_u, tau_t, s, u, t):
        """q = D_s + (1-s)(t-s)/(1-t) d delta_{s,t}(z_s)/ds, dz/ds = (D_s - z_s)/(1-s); loss: mse."""
        if teacher:
            u_s, network = teacher.trunk(h_teacher, tau_s, tau_s), teacher
        else:
            u_s, network = self.trunk(h, tau_s, tau_t), self    # official code; the identity has (s, s) here
        flow = (network.project(u_s, self.W) - h) * bc(1 / (1 - s + MAP_GUARD)).to(h.dtype)
        delta, _ = self.tangent(h, tau_s, tau_t, flow, self.time.slope(s), 0.0)
        D, scale = network.probs(u_s), (1 - s) * (t - s) / (1 - t + MAP_GUARD)
        scale = per_token(scale.to(h.dtype), h.shape[1])
        return lambda part: D(part) + scale[part] * delta(part)[1]

    def tangent(self, h, tau_s, tau_t, dh, dtau_s, dtau_t):
        """Forward-mode derivative of delta(h, tau_s, tau_t) along (dh [n, L, D], dtau_s, dtau_t).

        Returns (function: part -> (delta, d delta) [., V], u [n, L, D]). Only the trunk runs under func.jvp;
        the head's part, dc = slope (du W^T) and d delta = delta (dc - sum delta dc), is made by chunks.
        """
        args = tuple(x.to(h.dtype) for x in (h, tau_s, tau_t))
        along = tuple((torch.zeros_like(a) + d).to(h.dtype) for a, d in zip(args, (dh, dtau_s, dtau_t)))
        net, head = self.backbone, self.head
        u, du = torch.func.jvp(lambda h, a, b: net(h, net.cond(a, b), explicit=True), args, along)
        u, du = u.detach(), du.detach()

        def delta(part):
            c = capped_logits(u.flatten(0, 1)[part], head.weight, head.bias, self.cfg.logit_cap)
            dz = F.linear(du.flatten(0, 1)[part].to(c.dtype), head.weight)
            dc = cap_slope(c, self.cfg.logit_cap) * dz
            p = c.softmax(-1)
            return p, p * (dc - (p * dc).sum(-1, keepdim=True))
        return delta, u

    def attach_teacher(self, teacher, fresh):
        """Keep `teacher` (an FLM, EMA weights); a fresh student without --init starts as its copy."""
        ours, theirs = ({k: v for k, v in m.backbone.named_parameters()} for m in (self, teacher))
        if teacher.two_times:
            raise data.UserError("the teacher is a flow map itself: --teacher takes the checkpoint of an FLM")
        for name in [k for k in ours if "sigma_map_prime" not in k] + list(theirs):
            shapes = [tuple(x[name].shape) if name in x else "none" for x in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise data.UserError(f"teacher of another shape: {name} is {shapes[1]}, here {shapes[0]}")
        if (teacher.cfg.attn_softcap, teacher.cfg.logit_cap) != (self.cfg.attn_softcap, self.cfg.logit_cap):
            caps = f"--attn_softcap={teacher.cfg.attn_softcap:g} --logit_cap={teacher.cfg.logit_cap:g}"
            raise data.UserError(f"the teacher has other caps: set {caps}")
        self._teacher = [teacher.eval().requires_grad_(False)]
        if fresh and not self.cfg.init:
            with torch.no_grad():
                for name, value in theirs.items():
                    ours[name].copy_(value)
                for x in self.backbone.sigma_map_prime.mlp[2].parameters():
                    x.zero_()               # delta(s, t) = D_s for every t at the start

    # No nll(): FLM and FMLM have no likelihood bound; the cross-entropy averaged over tau is not one.

    # --- 7. samplers ----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, n, length, steps, known=None, known_mask=None, watch=None, churn=0.0, guidance=1.0,
               noise=None):
        """Tokens [n, length] after `steps` network calls at tau = i / steps; state y = z W [n, length, D].

        FLM: Euler. FMLM: flow-map jumps; churn in [0, 1] jumps too far and adds fresh noise to come back to t
        (the paper's gamma-sampler: 0 deterministic, 1 full re-noising; published: 0.8 LM1B, 1 OpenWebText).
        guidance (FLM): autoguidance by the same network with its dropout on, p_weak + guidance (p - p_weak);
        taken from a summary of the paper, not in the official code.
        known, known_mask: text held fixed, clean tokens with their own noise at every t (not in the paper).
        noise: all draws, [1 + re-noisings, n, length, V or D].
        """
        if not 0 <= churn <= 1 or churn and not self.two_times:
            raise data.UserError(f"churn={churn}: between 0 and 1, for a distilled model only")
        if guidance != 1 and (self.two_times or not self.cfg.dropout):
            raise data.UserError(f"guidance={guidance} needs an FLM (not distilled) trained with dropout")
        taus, times = self.time.grid(steps)
        over = 1 - (1 - times[1:]) * math.sqrt(1 - churn ** 2)          # where a jump lands before its noise
        landing = self.time.tau_of(over) if churn else taus[1:]
        W, shape = self.W, (n, length, self.noise_width(1))
        M = W if (shape if noise is None else noise.shape)[-1] == len(W) else gram_root(W, W)

        def eta(i):
            return (torch.randn(shape, device=W.device, dtype=W.dtype) if noise is None else noise[i]) @ M
        y = start = eta(0)                                              # [n, L, D]
        for i in range(steps):
            s, t, t_over = (x.expand(n) for x in (times[i], times[i + 1], over[i]))
            u = self.trunk(y, taus[i].expand(n), landing[i].expand(n))
            last = i == steps - 1
            if watch or last:
                tokens = common.greedy(u, self.head.weight, self.head.bias, cap=self.cfg.logit_cap)
                tokens = tokens if known is None else torch.where(known_mask, known, tokens)
                if watch:
                    watch(i, tokens)
                if last:
                    return tokens
            x_hat = self.project(u)
            if guidance != 1:
                mode = self.backbone.training
                self.backbone.train()                                   # dropout on: the weak network
                weak = self.project(self.trunk(y, taus[i].expand(n), None))
                self.backbone.train(mode)
                x_hat = weak + guidance * (x_hat - weak)
            if not self.two_times:
                y = y + bc((t - s) / (1 - s + EULER_GUARD)).to(y.dtype) * (x_hat - y)
            else:
                y = jump(y, x_hat, s, t_over)
                if churn:                                           # mean, variance of the marginal at t
                    y = y + bc(t - t_over).to(y.dtype) * x_hat + churn * bc(1 - t).to(y.dtype) * eta(i + 1)
            if known is not None:
                y = torch.where(known_mask[..., None], corrupt(known, W, t, start), y)

    # --- 8. diagnostics and published weights ---------------------------------------------------

    def flops_per_token(self):
        """Forward and backward: 3 passes; FMLM's targets add one on the diagonal, two off it (jvp: 3)."""
        cfg, f, passes = self.cfg, self.cfg.diagonal_fraction, 3
        if self.two_times:
            passes += (cfg.diagonal == "teacher") * f + (2 if cfg.objective == "semigroup" else 3) * (1 - f)
        trunk = common.trunk_flops(cfg.d_model, cfg.n_layer, cfg.length, cfg.mlp_ratio)
        return passes * (trunk + 2 * cfg.vocab * cfg.d_model)

    @torch.no_grad()
    def diagnostics(self, corpus, n=64):
        """Lines for `eval`: cross-entropy at fixed tau; at tau = 0 a good model has the unigram entropy."""
        tokens = corpus.rows("val", np.arange(min(n, corpus.n_rows("val"))))["tokens"].to(self.W.device)
        torch.manual_seed(0)
        out = []
        for value in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9):
            tau = torch.full((len(tokens),), value, device=tokens.device, dtype=torch.float64)
            u = self.trunk(self.noisy(tokens, self.time.t_of(tau), None)[0], tau, tau)
            weight = torch.full(tokens.shape, 1 / tokens.numel(), device=tokens.device)
            ce, _ = common.token_ce(u, self.head.weight, self.head.bias, tokens, weight,
                                    cap=self.cfg.logit_cap)
            out.append(f"tau {value:g}: {float(ce):.3f}")
        return ["cross-entropy in nats/token at " + "  ".join(out)]

    def published(self, raw):
        """{name: tensor} of a published Lightning checkpoint: its EMA list in named_parameters() order.

        state_dict has those names in the same (registration) order, with a rotary buffer among them and, in a
        distilled model's file, the teacher. OpenWebText: V = 50258 (GPT-2's 50257 and an unused id).
        """
        if not isinstance(raw.get("state_dict"), dict) or "shadow_params" not in (raw.get("ema") or ()):
            raise data.UserError("not a published FLM checkpoint: it needs state_dict and ema.shadow_params")
        if not (self.cfg.attn_softcap == 50 and self.cfg.logit_cap == 30):
            raise data.UserError("published weights need their caps: --attn_softcap=50 --logit_cap=30")
        state = {k.replace("._orig_mod.", "."): v for k, v in raw["state_dict"].items()}
        names = [k for k in state if k.startswith("backbone.") and not k.endswith("inv_freq")]
        shadow = raw["ema"]["shadow_params"]
        if len(shadow) < len(names):
            raise data.UserError(f"the EMA list holds {len(shadow)} tensors for {len(names)} parameters")
        for name, x in zip(names, shadow):
            if x.shape != state[name].shape:
                raise data.UserError(f"the EMA list does not follow the parameters: {name} is "
                                     f"{tuple(state[name].shape)}, its average {tuple(x.shape)}")
        return {k: x for k, x in zip(names, shadow) if "learnable_loss_weighting" not in k}


if __name__ == "__main__":
    common.main(FLM, Config, PRESETS)
