"""LangFlow: Gaussian diffusion of token embeddings, trained by cross-entropy on a noise schedule that learns.

Chen, Liang, Sui, Guo, Cheng, You, Liu: "LangFlow: Continuous Diffusion Rivals Discrete in Language Modeling",
arXiv:2604.11748. The authors published inference and likelihood code but no training code; section 5 is
rebuilt from the paper's equation (18) and algorithm 1.

What is diffused: rows of a normalised embedding matrix E [V, D], ||E_v|| = sqrt(D), learned with the network.
Time: gamma = ln(sigma^2 / alpha^2), the log NOISE-to-signal ratio. Large gamma = noise, small gamma = data.

    forward   z = alpha E[x] + sigma eps,   alpha^2 = sigmoid(-gamma),   sigma^2 = sigmoid(gamma)
    network   p(x_i | z) = softmax(W u(z, gamma, x_sc) + b + r (alpha / sigma^2) z E^T),   x_hat = p E
    train     q ~ U(0, 1), gamma = loc - scale ln(-ln q); x_sc = sg(x_hat(z, gamma, 0)) in 1 row of 4
              loss = mean CE + mean over rows of (sg(CE_row) - H(gamma))^2,
              H(gamma) = entropy exp(-exp(-(gamma - loc) / scale))
    sample    y = z / sigma, tau = alpha / sigma, dy/dtau = x_hat: Euler from q = 1 to 0, x_sc = last x_hat

H is the learned information curve and gamma is drawn from its derivative, so every step of q carries the
same number of nats, in training and in sampling. Know this before you read a log: a schedule that fits pins
the training loss at entropy / 2 whatever the quality of the model. Progress shows in `loc`, which rises, and
in the bound.

    python langflow.py                                      # train the built-in `tiny` run on a CPU, minutes
    python langflow.py sample --steps=64 --n=4 --watch      # noise becomes text
    python langflow.py eval --likelihood=ode                # the probability-flow likelihood

`grep "differs from"` finds the deviations: self-conditioning by a fixed share of the rows, own learning rate
and clipping of the schedule, a control variate in the ODE likelihood, no bf16 rounding of the Gaussian bias.
"""
import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import bc

# --- 1. configuration ---------------------------------------------------------------------------------------


@dataclass
class Config(common.Config):
    self_cond_prob: float = 0.25            # share of rows that see their own estimate; 0 = no projection
    self_cond_form: str = "subset"          # subset: that share of every batch; bernoulli: all rows or none
    bias_ramp: int = 0                      # steps in which the Gaussian bias grows from 0 to 1; 0 = at once
    gaussian_bias: bool = True              # add each token's own likelihood to the logits; false = ablation
    normalise: bool = True                  # rows of E on the sphere of radius sqrt(D); false = ablation
    schedule_lr: float = 5e-3               # learning rate of loc, scale and entropy: about their move a step
    gumbel_loc: Optional[float] = None      # initial loc; none = 4.723 + ln(d_model / 768)
    gumbel_scale: float = 0.852             # initial scale
    gumbel_entropy: Optional[float] = None  # initial entropy in nats; none = unigram entropy of the text


# The published configurations. Cells that LangFlow leaves open are the shared Duo protocol's, marked; there
# the three scalars of the schedule are in the network's parameter group, hence their learning rate.
_PUBLISHED = dict(
    d_model=768, n_layer=12, n_head=12, cond_dim=128, mlp_ratio=4, dropout=0.1, gate_init=0.0, batch=512,
    steps=1_000_000, lr=3e-4, warmup=2500, lr_schedule="constant", ema=0.9999, ema_warmup=True,
    beta1=0.9, beta2=0.999, adam_eps=1e-8, weight_decay=0.0, clip=1.0,      # not published
    schedule_lr=3e-4,                                                       # not published
    self_cond_prob=0.25, bias_ramp=5000, gumbel_loc=4.723, gumbel_scale=0.852, gumbel_entropy=7.02,
    log_every=100, val_every=10_000, save_every=5000, sample_every=10_000)
# Nats that context has won after 400 steps on the built-in text (CE at gamma = 3 against independent tokens):
# 0.14 with these values, 0.11 with gates at 0.5, 0.10 with 4 heads too, 0.04 with beta2 0.999 and lr 5e-3.
_TINY = dict(d_model=64, n_layer=3, n_head=2, cond_dim=64, length=64, batch=32, lr=3e-3, beta2=0.9, warmup=50,
             lr_schedule="cosine", gate_init=1.0, ema=0.998, schedule_lr=2e-2)
_TEN_MINUTES = dict(d_model=384, n_layer=6, n_head=6, cond_dim=128, length=256, lr=6e-4, beta2=0.95,
                    warmup=200, lr_schedule="cosine", gate_init=0.5, ema=0.999, schedule_lr=5e-3,
                    bias_ramp=200)

PRESETS = {
    "tiny": dict(_TINY, steps=2600),
    "lm1b": dict(_PUBLISHED, data="lm1b", length=128),
    "owt": dict(_PUBLISHED, data="openwebtext", tokenizer="gpt2", length=1024),
    # text of your own on one GPU: python langflow.py --preset=text --data=FILE_OR_FOLDER
    "text": dict(_TEN_MINUTES, tokenizer="bpe1024", batch=128, steps=10_000, dropout=0.1),
    # the equal-budget comparison of the five papers: same trunk, batch and steps for all
    "bench10-cpu": dict(_TINY, n_head=4, steps=5000),
    "bench10": dict(_TEN_MINUTES, data="wikitext103", tokenizer="gpt2", batch=64, steps=8000),
}

# --- 2. noise levels ----------------------------------------------------------------------------------------

CUTOFF = 1e-5           # gamma stays between the quantiles CUTOFF and 1 - CUTOFF (official configuration)
MIN_SCALE = 1e-2        # the official Gumbel parameters are free; the clamp only guards their sign


def alpha_sigma(gamma):
    """Signal and noise scale, alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma); any shape."""
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


def tau_of(gamma):
    """tau = alpha / sigma = exp(-gamma / 2), the time in which the probability flow reads dy/dtau = x_hat."""
    return torch.exp(-gamma / 2)


def c_skip(gamma):
    """alpha / sigma^2, the factor of the Gaussian bias (paper, eq. 44).

    ln N(z; alpha e_v, sigma^2 I) = const + c_skip <z, e_v> - (alpha / sigma)^2 ||e_v||^2 / 2, whose last term
    is the same for all v when ||e_v||^2 = D. So the bias is the exact likelihood of each token by itself, and
    the network has to supply only what the context says.
    """
    return torch.exp((F.softplus(-gamma) - gamma) / 2)


def normalised(W):
    """E_v = sqrt(D) W_v / ||W_v||: [V, D] -> [V, D] with unit mean square per coordinate, like the noise."""
    return W.shape[1] ** 0.5 * F.normalize(W, dim=1)


class Gumbel(nn.Module):
    """The learned schedule: the density of gamma is the derivative of the information curve, H' / entropy.

    loc and scale are in units of gamma, entropy in nats per token; stored raw, as in the published files.
    """

    def __init__(self, loc, scale, entropy):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(float(loc)))
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.entropy = nn.Parameter(torch.tensor(float(entropy)))

    def gamma_of(self, q):
        """gamma(q) = loc - scale ln(-ln q), clamped to gamma_range(), for q in [0, 1] of any shape and dtype.

        The two roundings are those of torch's Gumbel inverse CDF, which the official code calls: float32
        values agree bit for bit. At q = 1 - CUTOFF they cost 0.012 scale in float32, in float64 nothing.
        """
        q = ((q - 0.5) + 0.5) * (1 - torch.finfo(q.dtype).eps)
        return (self.loc - self.scale * torch.log(-torch.log(q))).clamp(*self.gamma_range())

    def gamma_range(self):
        """(gamma_min, gamma_max): tokens are decoded at the one, the prior holds at the other.

        The quantiles CUTOFF and 1 - CUTOFF, the latter with ln(1 - c) = -c as in the official code.
        """
        return self.loc - self.scale * math.log(-math.log(CUTOFF)), self.loc - self.scale * math.log(CUTOFF)

    def log_density(self, gamma):
        """ln pi(gamma) = -u - exp(-u) - ln scale with u = (gamma - loc) / scale."""
        u = (gamma - self.loc) / self.scale
        return -u - torch.exp(-u) - torch.log(self.scale)

    def information(self, gamma):
        """H(gamma) = entropy exp(-exp(-u)), nats per token unknown at gamma; H(gamma(q)) = entropy q."""
        return self.entropy * torch.exp(-torch.exp(-(gamma - self.loc) / self.scale))


# --- 3. probability flow ------------------------------------------------------------------------------------


def flow_step(y, x_hat, tau_t, tau_s):
    """Euler step of dy/dtau = x_hat from tau_t to tau_s, y = z / sigma [B, L, D] (paper, algorithm 2).

    Equal to DDIM, z_s = (sigma_s / sigma_t) z_t + (alpha_s - alpha_t sigma_s / sigma_t) x_hat, and to the
    official exponential form; exact for as long as x_hat stays the same.
    """
    return y + (tau_s - tau_t) * x_hat


def flow_integral(field, y, tau, heun=True):
    """Carry (y, A) along the grid tau [n + 1], falling towards noise: dy/dtau = x_hat, dA/dtau = rate.

    field(y, j) -> (x_hat like y, rate [B]) at grid point j. Heun is the explicit trapezoid, two evaluations
    an interval. Returns y at the last point and -A [B], the integral of the paper's eq. (20) in nats.
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


# --- 4. model -----------------------------------------------------------------------------------------------


def check(ok, key, value, rule):
    """One line for the user, the key, its value and what to do, unless `ok`."""
    if not ok:
        raise common.UserError(f"--{key}={value}: {rule}")


def one_of(key, value, *allowed):
    check(value in allowed, key, value, f"choose one of {', '.join(allowed)}")


class LangFlow(nn.Module):
    """Parameters carry the published names: proposal.loc, scale, entropy and backbone.* of the shared DiT."""

    log_keys = ("loc", "scale", "entropy")

    def __init__(self, cfg):
        super().__init__()
        share = cfg.self_cond_prob
        check(cfg.vocab > 1, "vocab", cfg.vocab, "give the number of token ids, 2 or more")
        check(0 <= share <= 1, "self_cond_prob", share, "a share lies in [0, 1]")
        one_of("self_cond_form", cfg.self_cond_form, "subset", "bernoulli")
        self.cfg, self.self_cond = cfg, share > 0
        self.every = round(1 / share) if share else 0                       # subset form: one row in `every`
        check(cfg.self_cond_form == "bernoulli" or not share or abs(self.every * share - 1) < 1e-6,
              "self_cond_prob", share,
              "the subset form takes one row in k, so 1/k; --self_cond_form=bernoulli takes any share")
        # the published loc, moved with the width: the noise that hides a token grows with its norm sqrt(D)
        loc = 4.723 + math.log(cfg.d_model / 768) if cfg.gumbel_loc is None else cfg.gumbel_loc
        text = cfg.unigram_entropy or math.log(cfg.vocab)
        entropy = text if cfg.gumbel_entropy is None else cfg.gumbel_entropy
        check(cfg.bias_ramp >= 0, "bias_ramp", cfg.bias_ramp, "a number of steps, 0 or more")
        check(cfg.gumbel_scale > 0, "gumbel_scale", cfg.gumbel_scale, "must be above 0")
        check(entropy > 0, "gumbel_entropy", entropy, "must be above 0")
        self.proposal = Gumbel(loc, cfg.gumbel_scale, entropy)
        self.backbone = common.DiT(
            cfg.d_model, cfg.n_layer, cfg.n_head, cond_dim=cfg.cond_dim, mlp_ratio=cfg.mlp_ratio,
            dropout=cfg.dropout, length=cfg.length, vocab=cfg.vocab, out=cfg.vocab,
            self_cond=self.self_cond, gate_init=cfg.gate_init)

    def codebook(self):
        """E [V, D]; computed once per optimiser step or sampling run."""
        W = self.backbone.vocab_embed.embedding
        return normalised(W) if self.cfg.normalise else W

    def head(self, z_t, gamma, x_sc, E, ramp=1.0):
        """The network up to the vocabulary: keywords for common's heads, logits = u W^T + b + skip E^T.

        z_t, x_sc [B, L, D], gamma [B]; `ramp` scales the Gaussian bias, whose input is z_t itself, not h.
        """
        net, linear = self.backbone, self.backbone.output_layer.linear
        h = z_t + net.self_cond_proj(torch.cat([z_t, x_sc], -1)) if self.self_cond else z_t    # [B, L, D]
        u = net(h, net.cond(gamma))                                         # [B, L, D]
        # differs from the official code: z E^T (up to 250) stays in float32, there it is rounded to bf16
        skip = ramp * bc(c_skip(gamma)) * z_t if self.cfg.gaussian_bias else None
        return dict(u=u, W=linear.weight, b=linear.bias, skip=skip, E=None if skip is None else E)

    def denoise(self, z_t, gamma, x_sc, E, targets=None, ramp=1.0):
        """The estimate x_hat = p E of E[x | z_t], [B, L, D], and the nll [B, L] of `targets` or None."""
        head = self.head(z_t, gamma, x_sc, E, ramp)
        # nothing trains through x_hat; attached, the head would also form dW [V, D] for every divergence
        head.update(W=head["W"].detach(), b=head["b"].detach())
        return common.expected_embedding(**head, values=E, targets=targets)

    def two_pass(self, z_t, gamma, E, mode, targets=None):
        """`denoise` given its own first estimate, to the gradient a function of z_t (mode chain) or
        a constant (detached). Mode none and a model without self-conditioning take one pass."""
        x_sc = torch.zeros_like(z_t)
        if self.self_cond and mode != "none":
            x_sc = self.denoise(z_t, gamma, x_sc, E)[0]
        return self.denoise(z_t, gamma, x_sc.detach() if mode == "detached" else x_sc, E, targets)

    # --- 5. loss (paper, eq. 18 and algorithm 1) ------------------------------------------------------------

    def loss(self, batch, t=None, noise=None, coins=None):
        """(CE + schedule loss, metrics) in nats per token (paper, eq. 18); their mean over equal chunks of a
        batch, ranks or micro-steps, is the value of the whole.

        batch: tokens [B, L] int64; where there is padding mask [B, L] bool (True counts) and global_len, the
        real lengths of all rows of the whole batch; `rows` from the training loop. Draws: t = quantiles q
        [B], noise = eps [B, L, D], coins = bool [B], the rows with a first pass.
        """
        tokens, mask = batch["tokens"], batch.get("mask")                   # [B, L] int64, [B, L] bool
        rows = batch.get("rows") or common.Rows.default(len(tokens))
        E = self.codebook()                                                 # [V, D]

        # 1. noise level, stratified over the global batch; no gradient reaches the schedule through it
        q = rows.uniform(device=tokens.device) if t is None else t
        gamma = self.proposal.gamma_of(q.to(E.dtype)).detach()              # [B]

        # 2. forward process
        x = F.embedding(tokens, E)                                          # [B, L, D]
        eps = torch.randn_like(x) if noise is None else noise
        alpha, sigma = alpha_sigma(gamma)
        z_t = bc(alpha) * x + bc(sigma) * eps                               # [B, L, D]

        # 3. share r of the Gaussian bias: grows with the step, and is 1 in bare use, which has no step
        ramp = min(1.0, rows.step / self.cfg.bias_ramp) if self.cfg.bias_ramp and "rows" in batch else 1.0

        # 4. first pass, without gradient, on the rows that drew it (in train mode, dropout included)
        x_sc = torch.zeros_like(z_t)
        coins = self.self_cond_rows(rows) if coins is None else coins
        index = coins.nonzero()[:, 0].to(tokens.device, non_blocking=True)
        if len(index):
            with torch.no_grad():
                x_sc[index] = self.denoise(z_t[index], gamma[index], x_sc[index], E, ramp=ramp)[0]

        # 5. main pass; the weights sum to one over the global batch
        counts = torch.ones_like(tokens, dtype=E.dtype) if mask is None else mask.to(E.dtype)       # [B, L]
        length = batch["global_len"].to(E.dtype).mean() if "global_len" in batch else counts.sum(1).mean()
        head = self.head(z_t, gamma, x_sc, E, ramp)
        ce, nll = common.token_ce(**head, targets=tokens, weight=counts / (len(tokens) * length))

        # 6. the schedule follows the CE of each row at its own gamma; a gradient for the three scalars only
        nll_row = (nll * counts).sum(1) / counts.sum(1).clamp(min=1)        # [B]
        sched = (nll_row - self.proposal.information(gamma)).square().mean()
        scalars = {name: p.detach().clone() for name, p in self.proposal.named_parameters()}
        return ce + sched, dict(ce=ce.detach(), sched=sched.detach(), **scalars)

    def self_cond_rows(self, rows):
        """bool [B] on the CPU: rows with a first pass, a function of (seed, step) over the global batch.

        differs from the paper: by default exactly one row in 1 / self_cond_prob, not one coin for the batch.
        Same expectation, constant cost (1.25 forwards) and shapes; a row's place says nothing of its gamma.
        """
        if not self.self_cond:
            return torch.zeros(rows.n_local, dtype=torch.bool)
        if self.cfg.self_cond_form == "subset":
            return rows.subset(self.every)
        return torch.full((rows.n_local,), bool(rows.rng(4).random() < self.cfg.self_cond_prob))

    def param_groups(self):
        # differs from the Duo protocol: a large schedule residual must not shrink the network's clipped
        # gradient, and scalars that Adam moves by one lr a step need a large one in a run of some 1,000 steps
        return [dict(params=list(self.backbone.parameters()), lr=self.cfg.lr),
                dict(params=list(self.proposal.parameters()), lr=self.cfg.schedule_lr, weight_decay=0.0,
                     clip="schedule", lr_schedule="constant")]

    @torch.no_grad()
    def after_step(self, step, ok):
        self.proposal.scale.clamp_(min=MIN_SCALE)

    # --- 6. likelihood (paper, theorem 3.1 and eq. 20) ------------------------------------------------------

    def nll(self, tokens, mask=None, likelihood="sde", divergence="chain", draws=8, ode_steps=32,
            ode_solver="heun", probe="rademacher", t=None, noise=None):
        """-ln p(tokens), bounded from above, in nats per sequence: 'nll' [B] and the terms that add up to it.

        likelihood=sde  reconst + integral + prior at `draws` noise levels, stratified for each sequence; a
                        bound with any self-conditioning. divergence=none leaves self-conditioning out.
        likelihood=ode  the probability flow in `ode_steps` intervals. divergence=chain is a bound, none is
                        one without self-conditioning, detached gives published figures: NOT a bound.
        Draws: t = quantiles [draws, B] (sde); noise [1 + n, B, L, D] = eps of the state at gamma_min, then
        one per draw (sde) or one probe per evaluation of the field (ode). The model must be in eval mode.
        """
        one_of("likelihood", likelihood, "sde", "ode")
        one_of("divergence", divergence, "chain", "none", "detached")
        one_of("ode_solver", ode_solver, "heun", "euler")
        one_of("probe", probe, "rademacher", "gaussian")
        check(draws >= 1, "draws", draws, "must be at least 1")
        check(ode_steps >= 1, "ode_steps", ode_steps, "must be at least 1")
        with torch.no_grad():
            E = self.codebook()
            x = F.embedding(tokens, E)
            counts = torch.ones_like(x[..., 0]) if mask is None else mask.to(E.dtype)               # [B, L]
            gamma_min, gamma_max = (gamma.expand(len(x)) for gamma in self.proposal.gamma_range())
            alpha, sigma = alpha_sigma(gamma_min)
            eps = torch.randn_like(x) if noise is None else noise[0]
            z_a = bc(alpha) * x + bc(sigma) * eps
            reconst = (self.two_pass(z_a, gamma_min, E, divergence, tokens)[1] * counts).sum(1)
            later = None if noise is None else noise[1:]
            if likelihood == "sde":
                terms = self._sde_terms(x, counts, E, gamma_max, divergence, draws, t, later)
            else:
                y_a = z_a / bc(sigma)
                terms = self._ode_terms(y_a, eps, counts, E, divergence, ode_steps, ode_solver, probe, later)
        return dict(nll=reconst + sum(terms.values()), reconst=reconst, **terms)

    def _sde_terms(self, x, counts, E, gamma_max, mode, draws, t, noise):
        """integral: mean of e^-gamma ||x_hat - x||^2 / 2 pi(gamma); prior: e^-gamma_max ||x||^2 / 2 >= KL."""
        if t is None:
            strata = torch.arange(draws, device=x.device, dtype=x.dtype)[:, None]
            t = (strata + torch.rand(draws, len(x), device=x.device, dtype=x.dtype)) / draws
        total = torch.zeros_like(gamma_max)
        for j, q in enumerate(t):
            gamma = self.proposal.gamma_of(q)                               # [B]
            alpha, sigma = alpha_sigma(gamma)
            z_t = bc(alpha) * x + bc(sigma) * (torch.randn_like(x) if noise is None else noise[j])
            x_hat, _ = self.two_pass(z_t, gamma, E, mode)
            error = ((x_hat - x).square().sum(-1) * counts).sum(1)          # [B]
            total += 0.5 * torch.exp(-gamma - self.proposal.log_density(gamma)) * error
        prior = 0.5 * torch.exp(-gamma_max) * (x.square().sum(-1) * counts).sum(1)
        return dict(integral=total / len(t), prior=prior)

    def _ode_terms(self, y, eps, counts, E, mode, steps, solver, probe, noise):
        """integral = change of log density along the flow, prior = (||y_b||^2 - N) / 2.

        differs from the official code: control = (N - ||eps||^2) / 2 has mean zero and cancels the noise, of
        standard deviation sqrt(N / 2) nats a sequence, that eps brings into the other terms.
        """
        q = torch.linspace(0, 1, steps + 1, dtype=E.dtype, device=E.device).clamp(CUTOFF, 1 - CUTOFF)
        gamma = self.proposal.gamma_of(q)                                   # [steps + 1], rising
        sigma = alpha_sigma(gamma)[1]
        needed = 2 * steps if solver == "heun" else steps
        assert noise is None or len(noise) >= needed, f"{len(noise)} probes, one per evaluation is {needed}"
        given = None if noise is None else iter(noise)

        def field(y, j):
            u = torch.randn_like(eps) if given is None else next(given)
            if given is None and probe == "rademacher":                     # never noisier than a Gaussian
                u = u.sign()
            z_t, level = (sigma[j] * y).to(E.dtype), gamma[j].expand(len(y))
            x_hat, trace = self.divergence(z_t, level, E, u * counts[..., None], mode)
            return (x_hat * counts[..., None]).double(), (sigma[j] * trace).double()

        y_b, integral = flow_integral(field, y.double(), tau_of(gamma.double()), heun=solver == "heun")
        n = E.shape[1] * counts.sum(1)
        prior = 0.5 * ((y_b.square().sum(-1) * counts).sum(1) - n)
        control = 0.5 * (n - (eps.square().sum(-1) * counts).sum(1))
        return dict(integral=integral.to(E.dtype), prior=prior.to(E.dtype), control=control)

    def divergence(self, z_t, gamma, E, probe, mode):
        """x_hat [B, L, D] and Hutchinson's estimate [B] of the trace of d x_hat / dz from a probe [B, L, D].

        The flow integrates x_hat(z, sc(z)), so the trace has a part that runs through sc. `chain` keeps it,
        `detached` drops it (a model that copies its input then scores as well as it likes), `none` has no sc.
        """
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_(True)
            x_hat, _ = self.two_pass(z_t, gamma, E, mode)
            grad, = torch.autograd.grad((x_hat * probe).sum(), z_t)
        return x_hat.detach(), (grad * probe).sum((1, 2))

    def describe_nll(self, likelihood="sde", divergence="chain", **_):
        """One line that names the estimator of `nll` and says so when it is not a bound."""
        mode = divergence if self.self_cond else "none"
        if likelihood == "sde":
            return "SDE bound, " + ("no self-conditioning" if mode == "none" else "self-conditioned")
        return "ODE likelihood, " + {"none": "no self-conditioning (a bound)",
                                     "chain": "self-conditioned, full chain rule (a bound)",
                                     "detached": "self-conditioning detached: NOT A BOUND"}[mode]

    # --- 7. sampler (official generate_samples; paper, algorithm 2) -----------------------------------------

    @torch.no_grad()
    def sample(self, n, length, steps, known=None, known_mask=None, watch=None, temperature=1.0,
               solver="euler", rewrite=0.0, noise=None):
        """Tokens [n, length] from `steps` network evaluations (Heun: 2 steps - 1), q falling evenly to 0.

        known [n, length] at the positions of known_mask (None: everywhere) is held: prefixes, infilling. With
        rewrite > 0 it is let go at that quantile and may change (SDEdit; 0.2 rewrites lightly, 0.8 freely).
        temperature < 1 sharpens the posterior. watch(step, tokens) sees the current guess. noise [n, length,
        D] replaces the first draw. The model must be in eval mode.
        """
        one_of("solver", solver, "euler", "heun")
        check(steps >= 1, "steps", steps, "must be at least 1")
        check(temperature > 0, "temperature", temperature, "must be above 0")
        check(0 <= rewrite <= 1, "rewrite", rewrite, "a quantile lies in [0, 1]")
        check(not rewrite or known is not None, "rewrite", rewrite, "no text to rewrite; give --prompt=")
        assert known is not None or known_mask is None, "known_mask says where, known must say what"
        E = self.codebook()
        fixed = torch.zeros(n, length, 1, dtype=torch.bool, device=E.device)
        if known is not None:
            fixed = torch.ones_like(fixed) if known_mask is None else known_mask[..., None]
        start = rewrite if rewrite and fixed.all() else 1.0                 # above, nothing is decided
        q = torch.linspace(min(start, 1 - CUTOFF), CUTOFF, steps, dtype=E.dtype, device=E.device)
        gamma = self.proposal.gamma_of(q)                                   # [steps], falling
        tau, sigma = tau_of(gamma.double()), alpha_sigma(gamma.double())[1]
        held = (q > rewrite).tolist()

        eps = torch.randn(n, length, E.shape[1], dtype=E.dtype, device=E.device) if noise is None else noise
        x = torch.zeros_like(eps) if known is None else F.embedding(known, E)
        # solver state y = z / sigma in float64: z = alpha x + sigma eps where x is known, else z = eps
        y = torch.where(fixed, tau[0] * x.double() + eps, eps.double() / sigma[0])
        x_sc = torch.zeros_like(eps)

        def evaluate(y, k, x_sc):
            head = self.head((sigma[k] * y).to(E.dtype), gamma[k].expand(n), x_sc, E)
            if temperature != 1:
                for key in ("u", "b", "skip"):
                    head[key] = None if head[key] is None else head[key] / temperature
            x_hat = common.expected_embedding(**head, values=E)[0]
            # with x_hat = E[x] a held position follows its own exact flow, y = tau E[x] + eps
            return head, torch.where(fixed, x, x_hat) if held[k] else x_hat

        for k in range(steps - 1):
            head, x_hat = evaluate(y, k, x_sc)
            y_next = flow_step(y, x_hat, tau[k], tau[k + 1])
            if solver == "heun":
                _, x_end = evaluate(y_next, k + 1, x_hat if self.self_cond else x_sc)
                y_next, x_hat = flow_step(y, (x_hat.double() + x_end) / 2, tau[k], tau[k + 1]), x_end
            y = y_next
            if self.self_cond:
                x_sc = x_hat                                                # of this step: no second pass
            if watch is not None:
                guess = common.greedy(**head)
                watch(k, torch.where(fixed[..., 0], known, guess) if known is not None and held[k] else guess)
        head = self.head((sigma[-1] * y).to(E.dtype), gamma[-1].expand(n), x_sc, E)
        tokens = common.greedy(**head)
        return tokens if known is None or rewrite else torch.where(fixed[..., 0], known, tokens)

    # --- 8. what `eval` prints, cost ------------------------------------------------------------------------

    @torch.no_grad()
    def diagnostics(self, corpus):
        """Lines: the schedule, CE at eight fixed noise levels (these compare between runs), the codebook."""
        E, p = self.codebook(), self.proposal
        rows = corpus.rows("val", range(min(64, corpus.n_rows("val"))))
        tokens = rows["tokens"].to(E.device)
        mask = rows["mask"].to(E.device) if "mask" in rows else torch.ones_like(tokens, dtype=torch.bool)
        x, (low, high) = F.embedding(tokens, E), p.gamma_range()
        loc, scale, entropy = (x.item() for x in (p.loc, p.scale, p.entropy))
        lines = [f"schedule: loc {loc:.3f}  scale {scale:.3f}  entropy {entropy:.3f} nats  gamma in "
                 f"[{low:.2f}, {high:.2f}]",
                 "  gamma: CE in one pass, in two passes, information curve, nats per token"]
        for k in range(8):
            gamma = torch.full((len(x),), math.log(E.shape[1] / 64) + k, device=E.device, dtype=E.dtype)
            alpha, sigma = alpha_sigma(gamma)
            z_t = bc(alpha) * x + bc(sigma) * torch.randn_like(x)
            one, two = (self.two_pass(z_t, gamma, E, mode, tokens)[1][mask].mean()
                        for mode in ("none", "chain"))
            lines.append(f"  {gamma[0]:5.2f}: {one:.3f}  {two:.3f}  {p.information(gamma[0]):.3f}")
        unit = F.normalize(E, dim=1)
        nearest = torch.cdist(unit[:1000], unit).topk(2, dim=1, largest=False).values[:, 1]   # [:, 0]: itself
        return lines + [f"codebook: mean nearest-neighbour distance {nearest.mean():.3f} (0: collapsed)"]

    def flops_per_token(self):
        """Trunk, both products of the logits, and p E wherever an estimate is formed (2 per multiply-add)."""
        cfg = self.cfg
        trunk = common.trunk_flops(cfg.d_model, cfg.n_layer, cfg.length, cfg.mlp_ratio)
        logits = trunk + 4 * cfg.vocab * cfg.d_model
        estimate = logits + 2 * cfg.vocab * cfg.d_model
        return 3 * logits + cfg.self_cond_prob * estimate


if __name__ == "__main__":
    common.main(LangFlow, Config, PRESETS)
