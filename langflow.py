"""LangFlow: Gaussian diffusion of token embeddings, trained with plain cross-entropy on a noise schedule that learns.

Chen, Liang, Sui, Guo, Cheng, You, Liu: "LangFlow: Continuous Diffusion Rivals Discrete in Language Modeling",
arXiv:2604.11748. The authors published inference and likelihood code; their training code is not public, so section 5
below is rebuilt from the paper's equations (18), (20) and algorithms 1-2.

What is diffused: rows of a normalised embedding matrix E [V, D], ||E_v|| = sqrt(D), learned with the network.
Time: gamma = ln(sigma^2 / alpha^2), the log NOISE-to-signal ratio. Large gamma = noise, small gamma = data.

    forward   z = alpha E[x] + sigma eps,   alpha^2 = sigmoid(-gamma),   sigma^2 = sigmoid(gamma)
    network   p(x_i | z) = softmax( W u(z, gamma, x_sc) + b + r (alpha / sigma^2) z E^T ),   x_hat = p E
    train     q ~ U(0, 1);  gamma = loc - scale ln(-ln q);  for a quarter of the rows x_sc = sg(x_hat(z, gamma, 0))
              loss = mean CE  +  mean_rows (sg(CE_row) - H(gamma))^2,   H(gamma) = entropy exp(-exp(-(gamma - loc) / scale))
    sample    y = z / sigma, tau = alpha / sigma:  dy/dtau = x_hat, Euler from q = 1 to q = 0, x_sc = the last x_hat

Because H is the learned information curve and gamma follows its derivative, every step of q carries the same number of
nats, in training and in sampling. One consequence must be known before reading a log: a schedule that fits pins the
training loss at entropy / 2 whatever the quality of the model. Progress shows in `loc` (it rises) and in the bound.

    python langflow.py                                       # train the built-in `tiny` run on a CPU, minutes
    python langflow.py sample --steps=64 --n=4 --watch       # noise becomes text
    python langflow.py eval --likelihood=ode                 # probability-flow likelihood beside the default SDE bound

`grep "differs from"` finds the deviations: the row-subset form of self-conditioning, own learning rate and clip group for
the schedule, a control variate in the ODE likelihood (same mean), no bf16 rounding of the Gaussian bias, q clamped not gamma.
"""
import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import bc

# --- 1. configuration ------------------------------------------------------------------------------


@dataclass
class Config(common.Config):
    self_cond_prob: float = 0.25            # share of the rows trained on a first estimate of themselves; 0 = off
    self_cond_form: str = "subset"          # subset: that share of every batch; bernoulli: one coin a step, all rows or none
    bias_ramp: int = 0                      # steps over which the Gaussian bias grows from 0 to 1; 0 = full from the start
    schedule_lr: float = 5e-3               # learning rate of loc, scale and entropy; Adam moves each by at most this a step
    gumbel_loc: Optional[float] = None      # initial loc; none = 4.723 + ln(d_model / 768)
    gumbel_scale: float = 0.852             # initial scale
    gumbel_entropy: Optional[float] = None  # initial entropy in nats; none = unigram entropy of the training text


# Published configurations (paper, official config files). Training cells that LangFlow does not state are the shared Duo
# protocol's, marked; the schedule's learning rate is then the network's, as one AdamW group would give.
_PUBLISHED = dict(
    d_model=768, n_layer=12, n_head=12, cond_dim=128, mlp_ratio=4, dropout=0.1, gate_init=0.0,
    batch=512, steps=1_000_000, lr=3e-4, warmup=2500, lr_schedule="constant", ema=0.9999, precision="auto",
    beta1=0.9, beta2=0.999, adam_eps=1e-8, weight_decay=0.0, clip=1.0,                          # not published
    schedule_lr=3e-4, self_cond_prob=0.25, bias_ramp=5000,                                      # schedule_lr not published
    gumbel_loc=4.723, gumbel_scale=0.852, gumbel_entropy=7.02,
    log_every=100, val_every=10_000, save_every=5000, sample_every=10_000)
_TRUNK_10 = dict(d_model=384, n_layer=6, n_head=6, length=256)                                  # ten minutes of one GPU

PRESETS = {
    "tiny": dict(d_model=64, n_layer=3, n_head=4, cond_dim=64, length=64, batch=32, steps=1800, lr=5e-3, warmup=50,
                 lr_schedule="cosine", gate_init=0.5, ema=0.998, schedule_lr=2e-2, bias_ramp=0),
    "lm1b": dict(_PUBLISHED, data="lm1b", length=128),
    "owt": dict(_PUBLISHED, data="openwebtext", tokenizer="gpt2", length=1024),
    # text of your own on one GPU: python langflow.py --preset=text --data=FILE_OR_FOLDER
    "text": dict(_TRUNK_10, cond_dim=128, dropout=0.1, tokenizer="bpe1024", batch=128, steps=10_000, lr=6e-4, warmup=200,
                 lr_schedule="cosine", gate_init=0.5, ema=0.999, schedule_lr=5e-3, bias_ramp=200),
    # equal-budget comparison of the five papers: same trunk, batch and steps for all
    "bench10-cpu": dict(d_model=64, n_layer=3, n_head=4, cond_dim=64, length=64, batch=32, steps=2500, lr=5e-3, warmup=50,
                        lr_schedule="cosine", gate_init=0.5, ema=0.998, schedule_lr=2e-2, bias_ramp=0),
    "bench10": dict(_TRUNK_10, cond_dim=128, data="wikitext103", tokenizer="gpt2", batch=64, steps=8000, lr=6e-4, warmup=200,
                    lr_schedule="cosine", gate_init=0.5, ema=0.999, schedule_lr=5e-3, bias_ramp=200),
}

# --- 2. noise levels -------------------------------------------------------------------------------

CUTOFF = 1e-5           # q is kept in [CUTOFF, 1 - CUTOFF] (official scheduler config)


def alpha_sigma(gamma):
    """Signal and noise scale, alpha^2 = sigmoid(-gamma) and sigma^2 = sigmoid(gamma), same shape (official forward process)."""
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


def tau_of(gamma):
    """tau = alpha / sigma = exp(-gamma / 2), the time in which the probability flow is dy/dtau = x_hat."""
    return torch.exp(-gamma / 2)


def c_skip(gamma):
    """alpha / sigma^2, factor of the Gaussian bias: ln N(z; alpha e_v, sigma^2 I) = const + c_skip <z, e_v> for ||e_v||^2 = D."""
    return torch.exp((F.softplus(-gamma) - gamma) / 2)


def normalised(W):
    """E_v = sqrt(D) W_v / ||W_v||: [V, D] -> [V, D] with unit mean square per coordinate, like the noise."""
    return W.shape[1] ** 0.5 * F.normalize(W, dim=1)


class Gumbel(nn.Module):
    """The learned schedule: three scalars. The density of gamma is the derivative of the information curve H / entropy.

    loc, scale are in units of gamma; entropy in nats per token. Values are stored raw, as in the published files.
    """

    def __init__(self, loc, scale, entropy):
        super().__init__()
        self.loc, self.scale, self.entropy = (nn.Parameter(torch.tensor(float(x))) for x in (loc, scale, entropy))

    def gamma_of(self, q):
        """gamma(q) = loc - scale ln(-ln q), q clamped to [CUTOFF, 1 - CUTOFF], in q's dtype and bounded by gamma_range.

        The two roundings are those of torch's Gumbel inverse CDF, which the official code calls: float32 values agree
        bit for bit. At q = 1 - CUTOFF they cost 0.012 scale in float32, nothing in float64.
        """
        q = ((q.clamp(CUTOFF, 1 - CUTOFF) - 0.5) + 0.5) * (1 - torch.finfo(q.dtype).eps)
        low, high = self.gamma_range()
        return (self.loc - self.scale * torch.log(-torch.log(q))).clamp(low.to(q.dtype), high.to(q.dtype))

    def gamma_range(self):
        """gamma_min and gamma_max (0-d), the levels at which decoding starts and the prior holds; official formulas."""
        return self.loc - self.scale * math.log(-math.log(CUTOFF)), self.loc - self.scale * math.log(CUTOFF)

    def log_density(self, gamma):
        """ln pi(gamma) = -u - exp(-u) - ln scale, u = (gamma - loc) / scale."""
        u = (gamma - self.loc) / self.scale
        return -u - torch.exp(-u) - torch.log(self.scale)

    def information(self, gamma):
        """H(gamma) = entropy exp(-exp(-u)), nats per token still unknown at gamma; equals entropy * q at gamma(q)."""
        return self.entropy * torch.exp(-torch.exp(-(gamma - self.loc) / self.scale))


def initial_loc(d_model):
    """loc0 = 4.723 + ln(D / 768): an embedding of norm sqrt(D) is recognisable in noise up to gamma ~ ln D."""
    return 4.723 + math.log(d_model / 768)


# --- 3. probability flow ---------------------------------------------------------------------------


def flow_step(y, x_hat, tau_t, tau_s):
    """One Euler step of dy/dtau = x_hat from tau_t to tau_s, y = z / sigma [B, L, D] (paper, algorithm 2).

    Equal to the DDIM step z_s = (sigma_s / sigma_t) z_t + (alpha_s - alpha_t sigma_s / sigma_t) x_hat, and to the
    official exponential form; exact while x_hat stays the same.
    """
    return y + (tau_s - tau_t) * x_hat


def flow_integral(field, y, tau, heun=True):
    """Carry (y, A) along the grid tau [n + 1] (decreasing: towards noise), dy/dtau = x_hat and dA/dtau = rate.

    field(y, j) -> (x_hat like y, rate [B]) at grid point j. Heun is the explicit trapezoid, two evaluations an interval.
    Returns y at the last point and -A [B], the change of log density in nats (paper, eq. 20).
    """
    area = 0.0
    for j in range(len(tau) - 1):
        x_hat, rate = field(y, j)
        if heun:
            x_end, rate_end = field(flow_step(y, x_hat, tau[j], tau[j + 1]), j + 1)
            x_hat, rate = (x_hat + x_end) / 2, (rate + rate_end) / 2
        y = flow_step(y, x_hat, tau[j], tau[j + 1])
        area = area + (tau[j + 1] - tau[j]) * rate
    return y, -area


def one_of(name, value, *allowed):
    if value not in allowed:
        raise common.UserError(f"--{name}={value}: choose one of {', '.join(allowed)}")


# --- 4. model --------------------------------------------------------------------------------------


class LangFlow(nn.Module):
    """Parameters carry the published names: proposal.loc / scale / entropy and backbone.* of the Duo DiT."""

    log_keys = ("loc", "scale", "entropy")

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        one_of("self_cond_form", cfg.self_cond_form, "subset", "bernoulli")
        self.every = round(1 / cfg.self_cond_prob) if cfg.self_cond_prob > 0 else 0
        if not 0 <= cfg.self_cond_prob <= 1:
            raise common.UserError(f"--self_cond_prob={cfg.self_cond_prob} is not a probability")
        if cfg.self_cond_form == "subset" and self.every and abs(self.every * cfg.self_cond_prob - 1) > 1e-6:
            raise common.UserError(f"--self_cond_prob={cfg.self_cond_prob}: the subset form takes one row in k, so 1/k; "
                                   "use --self_cond_form=bernoulli for other shares")
        loc = initial_loc(cfg.d_model) if cfg.gumbel_loc is None else cfg.gumbel_loc
        entropy = cfg.unigram_entropy or math.log(cfg.vocab) if cfg.gumbel_entropy is None else cfg.gumbel_entropy
        self.proposal = Gumbel(loc, cfg.gumbel_scale, entropy)
        self.backbone = common.DiT(cfg.d_model, cfg.n_layer, cfg.n_head, cond_dim=cfg.cond_dim, mlp_ratio=cfg.mlp_ratio,
                                   dropout=cfg.dropout, length=cfg.length, vocab=cfg.vocab, out=cfg.vocab,
                                   self_cond=True, gate_init=cfg.gate_init)

    def codebook(self):
        """E [V, D], computed once per optimiser step or sampling run."""
        return normalised(self.backbone.vocab_embed.embedding)

    def head(self, z_t, gamma, x_sc, E, ramp=1.0, temperature=1.0):
        """The network up to its vocabulary head: arguments of common's heads, in which logits = u W^T + b + skip E^T.

        z_t, x_sc [B, L, D], gamma [B]; `ramp` r scales the Gaussian bias, whose input is z itself, not the projected z.
        """
        proj, linear = self.backbone.self_cond_proj.weight, self.backbone.output_layer.linear
        h = z_t + F.linear(torch.cat([z_t, x_sc], dim=-1), proj)             # [B, L, D]
        u = self.backbone(h, self.backbone.cond(gamma))                      # [B, L, D]
        # differs from the official code: the bias product stays in float32, they round z E^T (up to 250) to bf16
        skip = ramp * bc(c_skip(gamma)) * z_t                                # [B, L, D]
        if temperature == 1.0:
            return dict(u=u, W=linear.weight, b=linear.bias, skip=skip, E=E)
        return dict(u=u / temperature, W=linear.weight, b=linear.bias / temperature, skip=skip / temperature, E=E)

    def denoise(self, z_t, gamma, x_sc, E, targets=None, ramp=1.0):
        """x_hat = E[E_x | z_t] [B, L, D] and the nll [B, L] of `targets` in nats; differentiable in z_t and x_sc only."""
        head = self.head(z_t, gamma, x_sc, E, ramp)
        head.update(W=head["W"].detach(), b=head["b"].detach())
        return common.expected_embedding(**head, values=E, targets=targets)

    def two_pass(self, z_t, gamma, E, targets=None, self_cond=True):
        """`denoise` on its own first estimate, or on zeros without self-conditioning."""
        x_sc = torch.zeros_like(z_t)
        if self_cond:
            x_sc = self.denoise(z_t, gamma, x_sc, E)[0]
        return self.denoise(z_t, gamma, x_sc, E, targets)

    # --- 5. loss (paper, eq. 18 and algorithm 1) ---------------------------------------------------

    def loss(self, batch, t=None, noise=None, coins=None):
        """(CE + schedule loss in nats per token, metrics). Draws: t = quantiles q [B], noise = eps [B, L, D],
        coins = bool [B], the rows that see their own first estimate."""
        tokens, mask = batch["tokens"], batch.get("mask")                    # [B, L] int64, bool
        rows = batch.get("rows") or common.Rows.default(len(tokens))
        step = batch["rows"].step if "rows" in batch else math.inf           # bare use: no step, full Gaussian bias
        ramp = min(1.0, step / max(1, self.cfg.bias_ramp)) if self.cfg.bias_ramp else 1.0
        E = self.codebook()                                                  # [V, D]

        # 1. noise level: stratified over the global batch; gamma is data for everything but the schedule loss's target
        q = rows.uniform(device=tokens.device) if t is None else t
        gamma = self.proposal.gamma_of(q.to(E.dtype)).detach()               # [B]
        # 2. forward process
        x = F.embedding(tokens, E)                                           # [B, L, D]
        eps = torch.randn_like(x) if noise is None else noise
        alpha, sigma = alpha_sigma(gamma)
        z_t = bc(alpha) * x + bc(sigma) * eps                                # [B, L, D]
        # 3. first pass, without gradient, on the rows that draw it
        x_sc = torch.zeros_like(z_t)
        index = (self.self_cond_rows(rows) if coins is None else coins).nonzero()[:, 0].to(tokens.device)
        if len(index):
            with torch.no_grad():
                x_sc[index] = self.denoise(z_t[index], gamma[index], x_sc[index], E, ramp=ramp)[0]
        # 4. main pass; weights sum to one over the global batch
        counts = torch.ones_like(tokens, dtype=E.dtype) if mask is None else mask.to(E.dtype)      # [B, L]
        length = batch["global_len"].to(E.dtype).mean() if "global_len" in batch else counts.sum(1).mean()
        head = self.head(z_t, gamma, x_sc, E, ramp)
        ce, nll = common.token_ce(**head, targets=tokens, weight=counts / (len(tokens) * length))
        # 5. the schedule follows the CE of each row (each has its own gamma); its gradient ends at the three scalars
        nll_row = (nll * counts).sum(1) / counts.sum(1).clamp(min=1)         # [B]
        sched = (nll_row - self.proposal.information(gamma)).square().mean()
        scalars = {name: p.detach() for name, p in self.proposal.named_parameters()}
        return ce + sched, dict(ce=ce.detach(), sched=sched.detach(), **scalars)

    def self_cond_rows(self, rows):
        """bool [B] on the CPU: which rows get a first pass, a function of (seed, step) over the global batch.

        differs from the paper: by default exactly one row in 1 / self_cond_prob instead of one coin for the whole batch;
        the same expectation at a constant cost of 1.25 forwards and constant shapes. Times are permuted, so a row's
        place says nothing about its gamma.
        """
        if not self.every:
            return torch.zeros(rows.n_local, dtype=torch.bool)
        if self.cfg.self_cond_form == "subset":
            return rows.subset(self.every, salt=1)
        return torch.full((rows.n_local,), bool(rows.rng(4).random() < self.cfg.self_cond_prob))

    def param_groups(self):
        # differs from the official baseline: a large schedule residual must not shrink the network's clipped gradient
        return [dict(params=list(self.backbone.parameters()), lr=self.cfg.lr),
                dict(params=list(self.proposal.parameters()), lr=self.cfg.schedule_lr, weight_decay=0.0,
                     clip="schedule", lr_schedule="constant")]

    @torch.no_grad()
    def after_step(self, step, ok):
        self.proposal.scale.clamp_(min=1e-2)        # positivity only; the scale may swell on its way (start far from loc)

    # --- 6. likelihood (paper, theorem 3.1 and eq. 20) ---------------------------------------------

    def nll(self, tokens, mask=None, likelihood="sde", divergence="chain", steps=32, draws=8, solver="heun",
            probe="rademacher", t=None, noise=None):
        """Bound on -ln p(tokens) in nats per sequence: dict of [B] tensors 'nll' and the terms that add up to it.

        likelihood=sde   reconst + integral + prior, `draws` noise levels stratified per sequence; a bound with any
                         self-conditioning. divergence=none leaves the self-conditioning out.
        likelihood=ode   `steps` intervals of the probability flow; divergence=chain (a bound), none (a bound, without
                         self-conditioning) or detached (the published figures; NOT a bound).
        Draws: t [draws, B] quantiles (sde); noise [1 + n, B, L, D]: eps of the first state, then one per draw (sde) or one
        probe per evaluation of the field (ode). Evaluate in eval mode.
        """
        one_of("likelihood", likelihood, "sde", "ode")
        one_of("divergence", divergence, "chain", "none", "detached")
        one_of("solver", solver, "heun", "euler")
        one_of("probe", probe, "rademacher", "gaussian")
        if min(steps, draws) < 1:
            raise common.UserError("--steps and --draws must be at least 1")
        if not self.cfg.self_cond_prob:
            divergence = "none"
        E = self.codebook().detach()
        x = F.embedding(tokens, E)
        counts = torch.ones_like(tokens, dtype=E.dtype) if mask is None else mask.to(E.dtype)      # [B, L]
        draw = iter(noise) if noise is not None else iter(lambda: torch.randn_like(x), None)
        with torch.no_grad():
            gamma_min, gamma_max = (g.expand(len(tokens)) for g in self.proposal.gamma_range())
            alpha, sigma = alpha_sigma(gamma_min)
            eps = next(draw)
            z_a = bc(alpha) * x + bc(sigma) * eps
            reconst = (self.two_pass(z_a, gamma_min, E, tokens, divergence != "none")[1] * counts).sum(1)
            if likelihood == "sde":
                terms = self._sde_terms(x, counts, E, gamma_max, divergence != "none", draws, t, draw)
            else:
                terms = self._ode_terms(z_a / bc(sigma), eps, counts, E, divergence, steps, solver, probe, noise, draw)
        return dict(nll=reconst + sum(terms.values()), reconst=reconst, **terms)

    def _sde_terms(self, x, counts, E, gamma_max, self_cond, draws, t, draw):
        """integral = mean over q of (1/2) e^-gamma ||x_hat - x||^2 / pi(gamma); prior = (1/2) e^-gamma_max ||x||^2 >= KL."""
        if t is None:
            strata = torch.arange(draws, device=x.device, dtype=x.dtype)[:, None]
            t = (strata + torch.rand(draws, len(x), device=x.device, dtype=x.dtype)) / draws
        total = torch.zeros_like(counts[:, 0])
        for q in t:
            gamma = self.proposal.gamma_of(q)                                # [B]
            alpha, sigma = alpha_sigma(gamma)
            x_hat, _ = self.two_pass(bc(alpha) * x + bc(sigma) * next(draw), gamma, E, self_cond=self_cond)
            error = ((x_hat - x).square().sum(-1) * counts).sum(1)           # [B]
            total += 0.5 * torch.exp(-gamma - self.proposal.log_density(gamma)) * error
        prior = 0.5 * torch.exp(-gamma_max) * (x.square().sum(-1) * counts).sum(1)
        return dict(integral=total / len(t), prior=prior)

    def _ode_terms(self, y, eps, counts, E, divergence, steps, solver, probe, noise, draw):
        """integral = change of log density along the flow; prior = ||y_b||^2 / 2 - N / 2; control = N / 2 - ||eps||^2 / 2.

        differs from the official code: `control` has mean zero and removes the sqrt(N / 2) nats of noise per sequence
        that eps puts into the other two terms. Leave it out to get the published estimator.
        """
        gamma = self.proposal.gamma_of(torch.linspace(0, 1, steps + 1, dtype=E.dtype, device=E.device))
        _, sigma = alpha_sigma(gamma)

        def field(y, j):
            u = next(draw)
            if probe == "rademacher" and noise is None:                      # never more variance than a Gaussian probe
                u = u.sign()
            level = gamma[j].expand(len(y))
            x_hat, trace = self.divergence((sigma[j] * y).to(E.dtype), level, E, u * counts[..., None], divergence)
            return (x_hat * counts[..., None]).double(), (sigma[j] * trace).double()

        y_b, integral = flow_integral(field, y.double(), tau_of(gamma.double()), heun=solver == "heun")
        half_n = 0.5 * E.shape[1] * counts.sum(1)
        prior = 0.5 * (y_b.square().sum(-1) * counts).sum(1) - half_n
        control = half_n - 0.5 * (eps.square().sum(-1) * counts).sum(1)
        return dict(integral=integral.to(E.dtype), prior=prior.to(E.dtype), control=control)

    def divergence(self, z_t, gamma, E, probe, mode):
        """x_hat [B, L, D] and Hutchinson's estimate [B] of the trace of d x_hat / dz, one probe u [B, L, D].

        The field that the flow integrates is x_hat(z, sc(z)), so its divergence has a second term through sc. `chain`
        keeps it, `detached` drops it (then a model that copies its input scores arbitrarily well), `none` has no sc.
        """
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_(True)
            x_sc = torch.zeros_like(z_t)
            if mode != "none":
                x_sc = self.denoise(z_t, gamma, x_sc, E)[0]
            x_hat = self.denoise(z_t, gamma, x_sc.detach() if mode == "detached" else x_sc, E)[0]
            grad, = torch.autograd.grad((x_hat * probe).sum(), z_t)
        return x_hat.detach(), (grad * probe).sum((1, 2))

    def describe_nll(self, likelihood="sde", divergence="chain", **_):
        """One line that names the estimator `nll` would use, and says when it is not a bound."""
        sc = divergence if self.cfg.self_cond_prob else "none"
        if likelihood == "sde":
            return "SDE bound, " + ("without self-conditioning" if sc == "none" else "self-conditioned (two passes)")
        return "ODE likelihood, " + {"none": "without self-conditioning: a bound", "chain": "self-conditioned, full chain "
                                     "rule: a bound", "detached": "self-conditioning detached: NOT A BOUND"}[sc]

    # --- 7. sampler (official generate_samples; paper, algorithm 2) --------------------------------

    @torch.no_grad()
    def sample(self, n, length, steps, known=None, known_mask=None, watch=None, temperature=1.0, solver="euler",
               q_start=1.0, noise=None):
        """Tokens [n, length] by `steps` network evaluations (Heun: 2 steps - 1), quantiles falling evenly from q_start.

        known [n, length] with known_mask (bool): those positions are held, the rest is filled in (prefix, infilling).
        q_start < 1 starts from `known` noised to that level (SDEdit: small q_start = light rewriting). temperature < 1
        sharpens the posterior. watch(step, tokens) sees the current guess. noise [n, length, D] replaces the first draw.
        """
        one_of("solver", solver, "euler", "heun")
        if steps < 1 or temperature <= 0 or not 0 < q_start <= 1:
            raise common.UserError("sampling needs --steps >= 1, --temperature > 0 and 0 < --q_start <= 1")
        if known is None and q_start < 1:
            raise common.UserError(f"--q_start={q_start} rewrites a text: give one with --prompt or --infill")
        E = self.codebook()
        q = torch.linspace(min(q_start, 1 - CUTOFF), CUTOFF, steps, dtype=E.dtype, device=E.device)
        gamma = self.proposal.gamma_of(q)                                    # [steps], falling
        tau, (alpha, sigma) = tau_of(gamma.double()), alpha_sigma(gamma.double())

        z = torch.randn(n, length, E.shape[1], dtype=E.dtype, device=E.device) if noise is None else noise
        held = torch.zeros(n, length, 1, dtype=torch.bool, device=E.device)
        x = torch.zeros_like(z)
        if known is not None:
            x = F.embedding(known, E)
            if known_mask is not None:
                held = known_mask[..., None]
            z = torch.where(held | (q_start < 1), (alpha[0] * x + sigma[0] * z).to(E.dtype), z)
        y = z.double() / sigma[0]                                            # solver state, float64
        x_sc = torch.zeros_like(z)

        def evaluate(y, k, x_sc):
            z_t = (sigma[k] * y).to(E.dtype)
            head = self.head(z_t, gamma[k].expand(n), x_sc, E, temperature=temperature)
            return head, torch.where(held, x, common.expected_embedding(**head, values=E)[0])

        for k in range(steps - 1):
            # a held position follows its own exact flow, y = tau E[x] + eps, because its x_hat is E[x] at every step
            head, x_hat = evaluate(y, k, x_sc)
            y_next = flow_step(y, x_hat, tau[k], tau[k + 1])
            if solver == "heun":
                _, x_end = evaluate(y_next, k + 1, x_hat if self.every else x_sc)
                y_next, x_hat = flow_step(y, (x_hat.double() + x_end) / 2, tau[k], tau[k + 1]), x_end
            y = y_next
            if self.every:
                x_sc = x_hat                                                 # no second pass: the last step's estimate
            if watch is not None:
                guess = common.greedy(**head)
                watch(k, guess if known is None else torch.where(held[..., 0], known, guess))
        z_t = (sigma[-1] * y).to(E.dtype)
        tokens = common.greedy(**self.head(z_t, gamma[-1].expand(n), x_sc, E))
        return tokens if known is None else torch.where(held[..., 0], known, tokens)

    # --- 8. what `eval` prints, cost, published weights --------------------------------------------

    @torch.no_grad()
    def diagnostics(self, corpus):
        """Lines: the schedule, CE at eight fixed noise levels (comparable between runs, unlike the loss), the codebook."""
        E, p = self.codebook(), self.proposal
        rows = corpus.rows("val", range(min(64, corpus.n_rows("val"))))
        tokens = rows["tokens"].to(E.device)
        mask = rows["mask"].to(E.device) if "mask" in rows else torch.ones_like(tokens, dtype=torch.bool)
        x = F.embedding(tokens, E)
        low, high = p.gamma_range()
        yield (f"schedule: loc {p.loc:.3f}  scale {p.scale:.3f}  entropy {p.entropy:.3f} nats  "
               f"gamma in [{low:.2f}, {high:.2f}]")
        yield "gamma, CE in one pass, CE self-conditioned, information curve (nats per token):"
        for k in range(8):
            gamma = torch.full((len(tokens),), math.log(E.shape[1] / 64) + k, device=E.device, dtype=E.dtype)
            alpha, sigma = alpha_sigma(gamma)
            z_t = bc(alpha) * x + bc(sigma) * torch.randn_like(x)
            ce = [self.two_pass(z_t, gamma, E, tokens, sc)[1][mask].mean() for sc in (False, self.every > 0)]
            yield f"  {gamma[0]:6.2f}  {ce[0]:.3f}  {ce[1]:.3f}  {p.information(gamma[0]):.3f}"
        some = E[:1000] / E.shape[1] ** 0.5
        distance = torch.cdist(some, E / E.shape[1] ** 0.5)
        distance[torch.arange(len(some)), torch.arange(len(some))] = math.inf
        yield f"codebook: mean nearest-neighbour distance of E / sqrt(D) {distance.amin(1).mean():.3f} (collapse: near 0)"

    def flops_per_token(self, train):
        """Multiply-adds times two: trunk, both products of the logits, and p E wherever an estimate is formed."""
        cfg = self.cfg
        logits = common.trunk_flops(cfg.d_model, cfg.n_layer, cfg.length, cfg.mlp_ratio) + 4 * cfg.vocab * cfg.d_model
        estimate = logits + 2 * cfg.vocab * cfg.d_model
        return 3 * logits + cfg.self_cond_prob * estimate if train else estimate

    @staticmethod
    def published(raw):
        """Published safetensors have our names; the rotary frequencies they carry are computed here."""
        return {name: value for name, value in raw.items() if not name.endswith("rotary_emb.inv_freq")}


if __name__ == "__main__":
    common.main(LangFlow, Config, PRESETS)
