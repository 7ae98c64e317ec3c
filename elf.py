"""ELF: Embedded Language Flows (Hu, Qiu, Lu, Zhao, Li, Kim, Andreas, He, arXiv:2605.10938; v2: distillation).

A flow in the embedding space of a frozen encoder. A row of tokens becomes one C-vector per token, x; a
transformer learns to take noise to x; only after the last step does a second head turn vectors into tokens.
There is no likelihood: `val` prints the two losses. Time runs from noise, t = 0, to data, t = 1.

    z_t = t x + (1 - t) sigma eps                   sigma = 2
    velocity v = (x_hat - z) / (1 - t)              x_hat is what the network predicts

One training step. A row has one of three roles: decode (20 %), self-conditioned (40 %), plain (40 %).
    1. x = (encoder(tokens) - mean) / std; decode rows: z = p x + (1 - p) sigma_d eps, one p per TOKEN, time 1
    2. self-conditioned rows, no gradient: x_u = net([z; 0], t, w), fed back as the second half of the input
    3. h = net([z; x_u or 0], time, w, mode); x_hat on the denoise rows, logits on the decode rows
    4. target x* = x + [self-conditioned] (1 - 1/w) (x_hat - x_u), detached: guidance of scale w is trained in
    5. loss = sum over counted tokens of |x_hat - x*|^2 / (C (1 - t)^2) or cross-entropy, / counted tokens
One sampling step t -> s.  SDE: first a = 1 - churn (s - t), z <- a z + (1 - a) sigma eps, t <- a t.
    x_hat = net([z; previous x_hat], t, w);  z <- z + (s - t) (x_hat - z) / (1 - t).  No churn in the last
    step; then one forward in decode mode and an argmax.

# differs from the paper: SDE step, token head, law of w and the noise on the condition of decode rows are the
official code's, behind the published figures; --paper_form=true samples with the paper's SDE step.
# differs from the official code, same numbers: the guided estimate is the main pass itself, the null pass and
each head run on the rows that use them. Same law, less variance: role counts are fixed
(--exact_bernoulli=true draws a coin per row), t and w are stratified over the global batch.

    python elf.py                                   # characters, a table of Gaussian vectors; minutes
    python elf.py sample --steps=32 --sampler=sde --churn=1.5 --w=3
    python elf.py --preset=reverse                  # a conditional toy: a word, then the word backwards
    torchrun --nproc_per_node=8 elf.py --preset=owt-b --t5=model.safetensors      # or --t5=t5-small: fetched
    python elf.py --stage=distill --teacher=out/elf-tiny/ckpt.pt        # a few-step student
"""
import dataclasses
import math
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
from common import bc
from data import UserError

# --- 1. configuration ------------------------------------------------------------------------------

@dataclasses.dataclass
class Config(common.Config):
    """Names as in the official configuration where it has one."""
    lr: float = 2e-3                        # learning rate of Muon and of Nesterov-Adam
    ema_warmup: bool = False                # ELF's EMA has none
    encoder: str = "gauss"                  # gauss (frozen random table), t5 (weights from --t5) or t5-random
    t5: str = ""                            # T5's weights: a file, or t5-small, t5-base, t5-large: downloaded
    text_encoder_dim: int = 64              # width C of the embedding space
    t5_layers: int = 2                      # layers of encoder=t5-random
    t5_cache: int = 0                       # MiB of T5's outputs to keep for rows that come again; 0 = none
    latent_mean: float = 0.0                # subtracted from the encoder's output
    latent_std: float = 0.0                 # and divided by; 0 = 0.2 for t5, 1 for gauss and t5-random
    bottleneck_dim: int = 32                # width between the embedding space and the backbone
    num_time_tokens: int = 4                # control tokens that carry t
    num_self_cond_cfg_tokens: int = 4       # control tokens that carry w; 0 = no guidance inside the network
    num_model_mode_tokens: int = 4          # control tokens of decode mode
    denoiser_p_mean: float = -1.5           # mean of logit t
    denoiser_p_std: float = 0.8             # and its standard deviation
    denoiser_noise_scale: float = 2.0       # sigma: noise is sigma * N(0, I)
    decoder_prob: float = 0.2               # share of decode rows
    decoder_p_mean: float = 0.8             # mean of logit p, the token-wise time of decode rows
    decoder_p_std: float = 0.8              # and its standard deviation
    decoder_noise_scale: float = 5.0        # sigma of decode rows
    self_cond_prob: float = 0.5             # share of self-conditioned rows among the denoise rows; 0 = never
    self_cond_cfg_min: float = 0.5          # smallest guidance scale w; 1 + w is log-uniform
    self_cond_cfg_max: float = 5.0          # largest guidance scale w
    t_eps: float = 0.05                     # floor of 1 - t in velocities and in the loss
    exact_bernoulli: bool = False           # a coin per row instead of fixed counts of each role
    max_input_length: int = 0               # longest condition (tokens); 0 = unconditional
    label_drop_prob: float = 0.0            # share of rows that lose their condition in training
    pad_in_loss: bool = False               # padding counts in the loss (teaches the target's length)
    eos: Optional[int] = None               # id after whose first occurrence a sample is cut; none = never
    pad: int = 0                            # id that fills a sample behind its end
    sampler: str = "sde"                    # default sampler: sde or ode
    churn: float = 1.5                      # re-noising of the SDE sampler (the paper's gamma)
    w: float = 3.0                          # self-conditioning guidance when sampling
    c: float = 1.0                          # guidance by the condition when sampling; 1 = off
    student_steps: int = 4                  # stage distill: sampling steps N of the student
    teacher_steps: int = 0                  # stage distill: teacher steps per student step; 0 = 64 / N


OWT = dict(data="openwebtext", tokenizer="t5", vocab=32100, encoder="t5", text_encoder_dim=512, eos=1,
           pad=0, length=1024, bottleneck_dim=128, batch=512, lr=2e-3, warmup=9508, ema=0.9999, seed=42)
COND = dict(pad_in_loss=True, eos=1, pad=1, decoder_noise_scale=1.0, label_drop_prob=0.1, w=1.0, c=2.0)
PAIRS = dict(OWT, d_model=768, n_layer=12, n_head=12, warmup=5000, sampler="ode") | COND
TINY = dict(data="prose", tokenizer="char", length=64, batch=32, d_model=64, n_layer=3, n_head=4, lr=0.02,
            warmup=100, lr_schedule="cosine", min_lr=0.1, ema=0.998, ema_warmup=True, text_encoder_dim=128,
            sampler="ode")          # a small model does not repair what full re-noising (churn 1.5) breaks
PRESETS = {
    "tiny": dict(TINY, steps=2000),
    "reverse": dict(TINY, data="reverse", length=24, max_input_length=12, lr=0.01, batch=64, steps=2500) | COND,
    # appendix B.1, table 4; 19,017 steps an epoch
    "owt-b": dict(OWT, d_model=768, n_layer=12, n_head=12, steps=5 * 19017),
    "owt-m": dict(OWT, d_model=1056, n_layer=24, n_head=16, steps=4 * 19017, churn=1.0),
    "owt-l": dict(OWT, d_model=1280, n_layer=32, n_head=16, steps=3 * 19017, churn=1.0),
    "de-en": dict(PAIRS, data="wmt14-de-en", length=128, max_input_length=64, steps=880600),
    "xsum": dict(PAIRS, data="xsum", length=1088, max_input_length=1024, steps=39800),
    "bench10-cpu": dict(TINY, steps=5000),
    "bench10": dict(TINY, data="wikitext103", tokenizer="gpt2", d_model=384, n_layer=6, n_head=6, length=256,
                    batch=64, steps=8000, text_encoder_dim=256, bottleneck_dim=128, lr=2e-3, ema=0.999),
    "tiny-distill": dict(student_steps=4, teacher_steps=8, steps=800, warmup=80, w=2.5),
}
for _n in (16, 8, 4, 2, 1):         # one epoch a round, then sampled with these settings (v2, appendix B)
    PRESETS[f"distill-{_n}"] = dict(PRESETS["owt-b"], stage="distill", student_steps=_n, steps=19017,
                                    warmup=1902, churn=2.0 if _n == 16 else 1.5, w=2.0 if _n == 16 else 2.5)

# --- 2. encoders -----------------------------------------------------------------------------------

def gauss_table(vocab, dim, seed):
    """Frozen table [V, C]: N(0, 1) entries, each row brought to mean 0 and std 1 (paper, D.3)."""
    E = torch.randn(vocab, dim, generator=torch.Generator().manual_seed(seed), device="cpu")
    return F.layer_norm(E, (dim,), eps=0.0)


def t5_bucket(rel):
    """T5's bucket of rel = key - query position: 16 for the sign, 8 exact distances, 8 logarithmic.

    The edges are those of 8 + floor(8 ln(n / 8) / ln 16), capped at 15, without doubts about rounding.
    """
    n, edges = rel.abs(), torch.tensor([8, 12, 16, 23, 32, 46, 64, 91], device=rel.device)
    return 16 * (rel > 0) + torch.where(n < 8, n, 7 + (n[..., None] >= edges).sum(-1))


class T5Encoder:
    """The encoder of T5 v1.0 as a function of Hugging Face's weights {name: tensor}; shapes give every size.

    It is frozen and belongs to no module: checkpoints hold neither its weights nor averages of them.
    """
    BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"       # shared by all layers

    def __init__(self, weights):
        self.weights = {k: v.float() for k, v in weights.items() if k.startswith(("shared.", "encoder."))}
        self.n_layer = sum(k.endswith("SelfAttention.q.weight") for k in self.weights)

    @staticmethod
    def random(vocab, dim, n_layer, seed):
        """T5's own initialisation: variance 1 / fan-in, for q over 64 more (scores are not scaled)."""
        g, inner = torch.Generator().manual_seed(seed), 64 * max(1, dim // 64)          # heads are 64 wide

        def normal(rows, cols, precision):
            return torch.randn(rows, cols, generator=g, device="cpu") / precision ** 0.5
        w = {"shared.weight": normal(vocab, dim, 1), T5Encoder.BIAS: normal(32, inner // 64, dim),
             "encoder.final_layer_norm.weight": torch.ones(dim)}
        layer = {"0.SelfAttention.q": (inner, dim, 64 * dim), "0.SelfAttention.k": (inner, dim, dim),
                 "0.SelfAttention.v": (inner, dim, dim), "0.SelfAttention.o": (dim, inner, inner),
                 "1.DenseReluDense.wi": (4 * dim, dim, dim), "1.DenseReluDense.wo": (dim, 4 * dim, 4 * dim)}
        for p in (f"encoder.block.{i}.layer." for i in range(n_layer)):
            w |= {f"{p}{name}.weight": normal(*how) for name, how in layer.items()}
            w |= {f"{p}{j}.layer_norm.weight": torch.ones(dim) for j in (0, 1)}
        return T5Encoder(w)

    @torch.no_grad()
    def __call__(self, ids, mask=None):
        """Last hidden state [B, L, C] after the final norm; mask [B, L, L]: which key each query sees."""
        if self.weights["shared.weight"].device != ids.device:
            self.weights = {k: v.to(ids.device) for k, v in self.weights.items()}
        w, (B, L), heads = self.weights, ids.shape, self.weights[self.BIAS].shape[1]
        x = F.embedding(ids, w["shared.weight"])                            # not scaled, no positions
        pos = torch.arange(L, device=ids.device)
        bias = F.embedding(t5_bucket(pos - pos[:, None]), w[self.BIAS]).permute(2, 0, 1)[None]
        if mask is not None:
            bias = torch.where(mask[:, None], bias, torch.finfo(bias.dtype).min)
        for i in range(self.n_layer):
            p = f"encoder.block.{i}.layer."
            y = F.rms_norm(x, x.shape[-1:], w[p + "0.layer_norm.weight"], 1e-6)
            q, k, v = (F.linear(y, w[p + f"0.SelfAttention.{n}.weight"]).view(B, L, heads, -1).transpose(1, 2)
                       for n in "qkv")
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
            x = x + F.linear(y.transpose(1, 2).reshape(B, L, -1), w[p + "0.SelfAttention.o.weight"])
            y = F.rms_norm(x, x.shape[-1:], w[p + "1.layer_norm.weight"], 1e-6)
            y = F.linear(y, w[p + "1.DenseReluDense.wi.weight"]).relu()
            x = x + F.linear(y, w[p + "1.DenseReluDense.wo.weight"])
        return F.rms_norm(x, x.shape[-1:], w["encoder.final_layer_norm.weight"], 1e-6)


def make_t5(cfg):
    """The encoder of cfg: random, from a file, or (t5-small, t5-base, t5-large) fetched once to corpora/."""
    path, dim, vocab = cfg.t5, cfg.text_encoder_dim, cfg.vocab
    if cfg.encoder == "t5-random":
        return T5Encoder.random(vocab, dim, cfg.t5_layers, cfg.seed)
    if not path:
        raise UserError("encoder=t5 needs the weights of a T5 encoder: --t5=FILE (model.safetensors or "
                        "pytorch_model.bin), or --t5=t5-small to download them; --encoder=gauss needs none")
    if path in ("t5-small", "t5-base", "t5-large"):
        path = Path("corpora", f"{cfg.t5}.safetensors")
        if not path.exists():
            if torch.distributed.is_initialized():
                raise UserError(f"{path} is not there: start once without torchrun to download it")
            path.parent.mkdir(exist_ok=True)
            data.download(data.HUB_FILES.format(f"google-t5/{cfg.t5}", "model.safetensors"), path)
    t5 = T5Encoder(common.load_published(path))
    try:
        width = t5(torch.zeros(1, 1, dtype=torch.int64)).shape[1:].numel()      # one token through all layers
    except (KeyError, RuntimeError) as e:
        raise UserError(f"{path} is not an encoder of T5 v1.0: {e!r}") from None
    rows = len(t5.weights["shared.weight"])
    if width != dim or rows < vocab:
        raise UserError(f"the T5 encoder in {path} is {width} wide and has {rows} token vectors; the model "
                        f"wants text_encoder_dim={dim}, vocab={vocab}")
    return t5


def encoder_mask(valid, cond, drop=None):
    """Which key each query of the encoder sees, [B, L, L]: a condition only itself, all others what is valid.

    valid, cond [B, L] bool. Rows of `drop` [B] also hide the condition from the target.
    """
    keys = valid if drop is None else valid & ~(cond & drop[:, None])
    return torch.where(cond[:, :, None], cond[:, None], keys[:, None])


# --- 3. times and interpolant ----------------------------------------------------------------------

def logit_normal(normals, mean, std):
    """Times sigmoid(mean + std * n) from standard normals."""
    return torch.sigmoid(mean + std * normals)


def guidance_scale(u, low, high):
    """w [B] from uniforms: 1 + w is log-uniform; 1.5 * 4^u - 1 as published (official code)."""
    return (1 + low) * ((1 + high) / (1 + low)) ** u - 1


def interpolate(x, eps, t, sigma):
    """z = t x + (1 - t) sigma eps (paper, eq. 1, with the noise scale of B.1); all broadcast to [B, L, C]."""
    return t * x + (1 - t) * sigma * eps


def velocity(x_hat, z, t, t_eps):
    """dz/dt = (x_hat - z) / max(1 - t, t_eps)."""
    return (x_hat - z) / (1 - t).clamp_min(t_eps)


def time_grid(steps, kind, mean, std, normals=None, device=None):
    """Sorted times [steps + 1] from 0 to 1: uniform, or logit_normal with fresh random interior points."""
    if kind == "uniform":
        return torch.linspace(0, 1, steps + 1, device=device)
    if kind != "logit_normal":
        raise UserError(f"grid={kind}: logit_normal or uniform")
    normals = torch.randn(steps - 1, device=device) if normals is None else normals
    return F.pad(F.pad(logit_normal(normals, mean, std).sort().values, (1, 0)), (0, 1), value=1.0)


def renoise(z, t, s, churn, sigma, eps):
    """Back in time before a step t -> s: a = 1 - churn (s - t), z <- a z + (1 - a) sigma eps, t <- a t.

    The noises add linearly: z is quieter than (1 - a t) sigma, as if cooled. Published figures rest on it.
    """
    a = (1 - churn * (s - t)).clamp(0, 1)
    return a * z + (1 - a) * sigma * eps, a * t


# --- 4. network ------------------------------------------------------------------------------------

def rotate_pairs(x, cos, sin):
    """Rotary embedding of x [B, heads, L, d] on interleaved pairs (2i, 2i + 1); cos and sin [L, d / 2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def linear(d_in, d_out, bias=True):
    """nn.Linear with Xavier-uniform weight and zero bias, the official initialisation."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """h += attention(RMS(h)); h += SwiGLU(RMS(h)). No adaLN: conditions come in through control tokens.

    Bidirectional, q and k RMS-normalised per head before the rotation. No mask: padding is noised and seen.
    """
    compile_me = True

    def __init__(self, d_model, n_head, mlp_ratio):
        super().__init__()
        inner, self.n_head = int(int(mlp_ratio * d_model) * 2 / 3), n_head
        q_norm, k_norm = (nn.RMSNorm(d_model // n_head, eps=1e-6) for _ in range(2))
        self.norm1 = nn.RMSNorm(d_model, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=linear(d_model, 3 * d_model), q_norm=q_norm, k_norm=k_norm,
                                       proj=linear(d_model, d_model)))
        self.norm2 = nn.RMSNorm(d_model, eps=1e-6)
        self.mlp = nn.ModuleDict(dict(w12=linear(d_model, 2 * inner), w3=linear(inner, d_model)))

    def forward(self, h, cos, sin):
        B, L, D = h.shape
        qkv = self.attn.qkv(self.norm1(h)).view(B, L, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                          # [B, heads, L, d]
        q = rotate_pairs(self.attn.q_norm(q.to(cos.dtype)), cos, sin).to(v.dtype)   # in float32 up to here
        k = rotate_pairs(self.attn.k_norm(k.to(cos.dtype)), cos, sin).to(v.dtype)
        h = h + self.attn.proj(common.attention(q, k, v).transpose(1, 2).reshape(B, L, D))
        a, b = self.mlp.w12(self.norm2(h)).chunk(2, dim=-1)
        return h + self.mlp.w3(F.silu(a) * b)


def scalar_embedder(d_model):
    """Linear, SiLU, Linear on the 256 sinusoidal features of a scalar, all weights N(0, 0.02^2)."""
    layers = OrderedDict(mlp_0=linear(256, d_model), act=nn.SiLU(), mlp_2=linear(d_model, d_model))
    for name in ("mlp_0", "mlp_2"):
        nn.init.normal_(layers[name].weight, std=0.02)
    return nn.Sequential(layers)


class NesterovAdam(torch.optim.Optimizer):
    """Adam with Nesterov momentum as optax has it, for what Muon leaves: few numbers, so one flat update.
    m_hat = b1 m / (1 - b1^(k+1)) + (1 - b1) g / (1 - b1^k). `found_inf` = 1: weights and state stay.
    """

    def __init__(self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))
        self.found_inf = None

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params, (b1, b2) = group["params"], group["betas"]
            for p in (p for p in params if not self.state[p]):
                zero = torch.zeros_like(p)
                self.state[p] = dict(step=common.local(zero).new_zeros(()), m=zero, n=zero.clone())
            ms, ns, steps = ([self.state[p][k] for p in params] for k in ("m", "n", "step"))
            gs = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            params, ms, ns, gs = ([common.local(x) for x in xs] for xs in (params, ms, ns, gs))     # of FSDP2
            w, m, n, g = (torch.cat([x.reshape(-1) for x in xs]) for xs in (params, ms, ns, gs))
            ok = w.new_ones(()) if self.found_inf is None else 1 - self.found_inf.to(w)
            k = steps[0] + 1
            m_new, n_new = m.lerp(g, 1 - b1), n.lerp(g * g, 1 - b2)
            m_hat = b1 * m_new / (1 - b1 ** (k + 1)) + (1 - b1) * g / (1 - b1 ** k)
            w_new = w - group["lr"] * m_hat / ((n_new / (1 - b2 ** k)).sqrt() + group["eps"])
            for into, old, new in ((params, w, w_new), (ms, m, m_new), (ns, n, n_new)):
                parts = torch.where(ok > 0, new, old).split([p.numel() for p in params])
                torch._foreach_copy_(into, [x.view_as(p) for x, p in zip(parts, params)])
            torch._foreach_add_(steps, ok)


# --- 5. ELF ----------------------------------------------------------------------------------------

def room(share, n_local, n_global):
    """Rows to reserve for a role of this share: as many as a rank can meet (up to 6 standard deviations)."""
    mean = share * n_local
    most = min(share * n_global, mean + 6 * math.sqrt(mean * (1 - share)))
    return min(n_local, math.ceil(most - 1e-6))


def cut(ids, eos, pad, keep=None):
    """Positions of ids [B, L] from the first `eos` on become `pad`; those of `keep` are left alone."""
    free = torch.ones_like(ids, dtype=torch.bool) if keep is None else ~keep
    return ids.masked_fill((((ids == eos) & free).cumsum(dim=1) > 0) & free, pad)


class ELF(nn.Module):
    conditional = True                      # trains on (source, target) pairs too
    val_keys = log_keys = ("l2", "ce")      # velocity loss of denoise rows, nats per token of decode rows

    def __init__(self, cfg):
        super().__init__()
        D, C, head_dim = cfg.d_model, cfg.text_encoder_dim, cfg.d_model // cfg.n_head
        if cfg.d_model % (2 * cfg.n_head):
            raise UserError(f"d_model={D} is not a multiple of 2 * n_head={2 * cfg.n_head}")
        if cfg.dropout or not 0 < cfg.self_cond_cfg_min <= cfg.self_cond_cfg_max or not cfg.num_time_tokens:
            raise UserError("needs dropout=0, num_time_tokens>0, 0 < self_cond_cfg_min <= self_cond_cfg_max")
        self.cfg, self.amp, self._teacher, self._t5, self._rows = cfg, False, None, None, {}
        if cfg.encoder == "gauss":
            self.register_buffer("E", gauss_table(cfg.vocab, C, cfg.seed))
        elif cfg.encoder not in ("t5", "t5-random"):
            raise UserError(f"encoder={cfg.encoder}: gauss, t5 or t5-random")
        self.latent_std = cfg.latent_std or (0.2 if cfg.encoder == "t5" else 1.0)

        # Names and layouts are those of the published PyTorch checkpoints; the two kernels are [in, out].
        self.self_cond_proj = linear(2 * C, C)
        self.text_proj = nn.Sequential(OrderedDict(proj1=linear(C, cfg.bottleneck_dim, bias=False),
                                                   proj2=linear(cfg.bottleneck_dim, D)))
        self.t_embedder = scalar_embedder(D)
        self.t_emb_tokens = nn.Parameter(0.02 * torch.randn(1, cfg.num_time_tokens, D))
        if cfg.num_self_cond_cfg_tokens:
            self.self_cond_cfg_embedder = scalar_embedder(D)
            self.self_cond_cfg_tokens = nn.Parameter(0.02 * torch.randn(1, cfg.num_self_cond_cfg_tokens, D))
        if cfg.num_model_mode_tokens:
            self.mode_tokens = nn.Parameter(0.02 * torch.randn(1, cfg.num_model_mode_tokens, D))
        self.blocks = nn.ModuleList(Block(D, cfg.n_head, cfg.mlp_ratio) for _ in range(cfg.n_layer))
        self.final_layer = nn.Sequential(OrderedDict(norm_final=nn.RMSNorm(D, eps=1e-6), linear=linear(D, C)))
        nn.init.zeros_(self.final_layer.linear.weight)      # x_hat = 0 at the start
        self.proj_kernel = nn.Parameter(nn.init.xavier_uniform_(torch.empty(D, C)))
        self.proj_bias = nn.Parameter(torch.zeros(C))
        self.unembed_kernel = nn.Parameter(nn.init.xavier_uniform_(torch.empty(C, cfg.vocab)))
        self.unembed_bias = nn.Parameter(torch.zeros(cfg.vocab))

        self.n_control = cfg.num_time_tokens + cfg.num_self_cond_cfg_tokens + cfg.num_model_mode_tokens
        cos, sin = common.rope_tables(cfg.length, head_dim)     # angle 0 for control tokens; text from 0
        self.register_buffer("cos", F.pad(cos, (0, 0, self.n_control, 0), value=1.0), persistent=False)
        self.register_buffer("sin", F.pad(sin, (0, 0, self.n_control, 0)), persistent=False)

    def encoder(self):
        """The frozen T5, loaded when first needed: sampling without a condition does without its file."""
        self._t5 = self._t5 or make_t5(self.cfg)
        return self._t5

    def t5(self, tokens, valid, cond, drop):
        """T5's output for `encode`; with --t5_cache the rows of a small corpus are encoded once, then kept.

        One by one: a row's last bits must not depend on its neighbours, or resuming would not be exact.
        """
        mask, out = encoder_mask(valid, cond, drop), []
        if not self.cfg.t5_cache:
            return self.encoder()(tokens, mask)
        keys = tokens * 8 + valid * 4 + cond * 2 + (0 if drop is None else drop[:, None])       # one for one
        for key, row, seen in zip(map(bytes, keys.cpu().numpy()), tokens, mask):
            out.append(self._rows[key] if key in self._rows else self.encoder()(row[None], seen[None])[0])
            if len(self._rows) * out[-1].nbytes < self.cfg.t5_cache * 2 ** 20:
                self._rows[key] = out[-1]
        return torch.stack(out)

    def encode(self, ids, valid, cond, drop=None):
        """Normalised latents x [B, L, C] of ids [B, L]; masks as in `encoder_mask`."""
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.amp):
            x = F.embedding(ids, self.E) if self.cfg.encoder == "gauss" else self.t5(ids, valid, cond, drop)
        return (x.to(self.proj_bias.dtype) - self.cfg.latent_mean) / self.latent_std

    def net(self, z, half, t, w, gate):
        """Hidden states [B, L, D] of z and the self-conditioning half, both [B, L, C].

        t, w [B]; gate [B] is 1 in decode mode and 0 in denoise mode, where the mode tokens are zero vectors.
        """
        n = z.shape[1] + self.n_control
        if n > len(self.cos):
            raise UserError(f"{z.shape[1]} tokens are more than the model's length={self.cfg.length}")
        x = self.self_cond_proj(torch.cat([z, half], dim=-1)) if self.cfg.self_cond_prob else z
        parts = [self.t_emb_tokens + self.t_embedder(common.sinusoid(t).to(x.dtype))[:, None]]
        if self.cfg.num_self_cond_cfg_tokens:
            scale = self.self_cond_cfg_embedder(common.sinusoid(w).to(x.dtype))
            parts.append(self.self_cond_cfg_tokens + scale[:, None])
        if self.cfg.num_model_mode_tokens:
            parts.append(self.mode_tokens * bc(gate.to(x.dtype)))
        h = torch.cat(parts + [self.text_proj(x)], dim=1)                               # [B, n, D]
        with torch.autocast(h.device.type, dtype=torch.bfloat16, enabled=self.amp):     # residual in float32
            for block in self.blocks:
                h = block(h, self.cos[:n], self.sin[:n])
        return h[:, self.n_control:]

    def token_features(self, h):
        """Input of the unembedding [B, L, C]; past the final norm and x_hat (code, not the paper)."""
        return F.gelu(h @ self.proj_kernel + self.proj_bias, approximate="tanh")

    # Training --------------------------------------------------------------------------------------
    def corrupt(self, batch, t=None, noise=None, coins=None, span=0.0):
        """What a step needs before its first pass, rows sorted by role: decode, plain, self-conditioned.

        Each pass and each head then runs on a slice of fixed size: `dec` holds all decode rows, `den` all
        denoise rows, `sc` all self-conditioned ones; what else is in a slice has weight 0. Draws that may be
        given: t [B], coins dict(decode, sc[, drop] [B]), noise dict(eps [B, L, C], p [B, L], w [B]).
        """
        cfg, tokens = self.cfg, batch["tokens"]
        if "cond_len" in batch and not cfg.max_input_length:
            raise UserError("a corpus of pairs needs --max_input_length=N, the longest source to keep")
        (B, L), device, like = tokens.shape, tokens.device, self.proj_bias
        rows = batch.get("rows") or common.Rows.default(B)
        dec, sc = cfg.decoder_prob, (1 - cfg.decoder_prob) * cfg.self_cond_prob
        drop = rows.uniform(3, device) < cfg.label_drop_prob
        if coins is None and not cfg.exact_bernoulli:
            role = rows.roles((dec, 1 - dec - sc, sc), device=device)
            sizes = [room(share, B, rows.n_global) for share in (dec, 1 - dec, sc)]
        else:
            u = torch.rand(2, B, device=device)
            coins = coins or dict(decode=u[0] < cfg.decoder_prob, sc=u[1] < cfg.self_cond_prob)
            role, drop = torch.where(coins["decode"], 0, 1 + coins["sc"].long()), coins.get("drop", drop)
            sizes = [B, B, B if cfg.self_cond_prob else 0]
        drawn = dict(                   # t and w are stratified; the normal quantile is taken in float64
            t=logit_normal(torch.special.ndtri(rows.uniform(1, device)).to(like),
                           cfg.denoiser_p_mean, cfg.denoiser_p_std) * max(1 - span, 1e-6),
            w=guidance_scale(rows.uniform(2, device).to(like), cfg.self_cond_cfg_min, cfg.self_cond_cfg_max),
            p=logit_normal(like.new_empty(B, L).normal_(), cfg.decoder_p_mean, cfg.decoder_p_std),
            eps=like.new_empty(B, L, cfg.text_encoder_dim).normal_()) | (noise or {})
        t, w, p, eps = drawn["t"] if t is None else t, drawn["w"], drawn["p"], drawn["eps"]

        valid = batch.get("mask", torch.ones_like(tokens, dtype=torch.bool))
        cond_len, order = batch.get("cond_len", torch.zeros_like(role)), role.argsort(stable=True)
        tokens, valid, cond_len, role, drop, t, w, p, eps = (
            y[order] for y in (tokens, valid, cond_len, role, drop, t, w, p, eps))
        cond = torch.arange(L, device=device) < cond_len[:, None]                               # [B, L]
        count = ~cond if cfg.pad_in_loss else valid & ~cond
        total = count.sum()             # the global batch's, scaled to this chunk: the loop averages chunks
        if "global_len" in batch:
            ends = torch.full_like(batch["global_len"], L) if cfg.pad_in_loss else batch["global_len"]
            total = (ends - batch.get("global_cond", 0)).sum().double() * B / len(ends)

        x = self.encode(tokens, valid, cond, drop)                                              # [B, L, C]
        x = x.masked_fill((drop[:, None] & cond)[..., None], 0)     # a dropped condition is zeros from here
        decode = role == 0
        # One interpolation for both kinds of row; p = 1 keeps the condition clean, except on decode rows.
        p = torch.where(decode[:, None], p, torch.where(cond, 1.0, t[:, None]))[..., None]
        sigma = torch.full_like(t, cfg.decoder_noise_scale).where(decode, cfg.denoiser_noise_scale)
        z, cond = interpolate(x, eps, p, bc(sigma)), cond[..., None]
        pinned = x.masked_fill(~cond, 0)                                            # the null half
        dec, den, sc = slice(0, sizes[0]), slice(B - sizes[1], B), slice(B - sizes[2], B)
        return SimpleNamespace(
            order=order, tokens=tokens, x=x, z=z, t=t, w=w, decode=decode, guided=role == 2, cond=cond,
            pinned=pinned, count=count, total=total.clamp_min(1), dec=dec, den=den, sc=sc)

    def first_estimate(self, s):
        """x_u [n, L, C] of the rows s.sc, without gradient, and the half that it makes [B, L, C]."""
        half, x_u = s.pinned.masked_fill(bc(s.decode), 0), s.x[s.sc]
        if len(x_u):
            with torch.no_grad():
                off = torch.zeros_like(s.t[s.sc])
                x_u = self.final_layer(self.net(s.z[s.sc], s.pinned[s.sc], s.t[s.sc], s.w[s.sc], off))
            estimate = torch.where(s.cond[s.sc] | ~bc(s.guided[s.sc]), half[s.sc], x_u)
            half = torch.cat([half[:s.sc.start], estimate])
        return x_u, half

    def main_pass(self, s, half, weight):
        """The pass with gradient: x_hat of the rows s.den; of s.dec the sum of weight * nll, and nll."""
        h = self.net(s.z, half, torch.where(s.decode, 1.0, s.t), s.w, s.decode)
        ce, nll = common.token_ce(self.token_features(h[s.dec]), self.unembed_kernel.T, self.unembed_bias,
                                  s.tokens[s.dec], weight[s.dec])
        return self.final_layer(h[s.den]), ce, nll

    def loss(self, batch, t=None, noise=None, coins=None):
        """Mean over counted tokens of |v_hat - v*|^2 / C on denoise rows, nats on decode rows (PyTorch code).

        batch: dict(tokens [B, L][, mask, cond_len, global_len, global_cond, rows]); draws as in `corrupt`.
        """
        if self._teacher is not None:
            return self.distill_loss(batch, t, noise, coins)
        cfg, s = self.cfg, self.corrupt(batch, t, noise, coins)
        x_u, half = self.first_estimate(s)
        ce_count = (s.count & s.decode[:, None]).to(s.t.dtype)                                  # [B, L]
        x_hat, ce, nll = self.main_pass(s, half, ce_count / s.total)

        # Target x*. The guided estimate is net([z; x_u]), which is this very pass: no third forward.
        target = s.x[s.den]
        if cfg.num_self_cond_cfg_tokens:
            n = len(target) - len(x_u)
            guide = bc(s.guided[s.sc] * (1 - 1 / s.w[s.sc])) * (x_hat[n:].detach() - x_u)
            target = torch.cat([target[:n], target[n:] + guide])
        # Velocity loss in x-space: z cancels, |v_hat - v*|^2 = |x_hat - x*|^2 / (1 - t)^2.
        count = (s.count & ~s.decode[:, None])[s.den].to(s.t.dtype)
        weight = count / (1 - s.t[s.den, None]).clamp_min(cfg.t_eps) ** 2
        l2 = (weight * (x_hat - target).square().mean(-1)).sum()
        return l2 / s.total + ce, dict(l2=l2.detach() / count.sum().clamp_min(1),
                                       ce=(nll * ce_count[s.dec]).sum() / ce_count.sum().clamp_min(1))

    def param_groups(self):
        """Muon for every 2-D tensor (embedders, projections, unembedding too), Nesterov-Adam for the rest."""
        cfg, params = self.cfg, list(self.parameters())
        if cfg.encoder != "gauss":
            self.encoder()                  # training will need it: tell of a bad file before anything else
        return [dict(params=[p for p in params if p.dim() == 2], lr=cfg.lr, optimizer=common.Muon,
                     bias_correction=True, transposed=[self.proj_kernel, self.unembed_kernel]),
                dict(params=[p for p in params if p.dim() != 2], lr=cfg.lr, optimizer=NesterovAdam,
                     betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps)]

    @staticmethod
    def published(raw):
        """State dict of a published PyTorch checkpoint `checkpoint_<step>`: averaged weights, plain names."""
        return {k.removeprefix("_orig_mod."): v for k, v in raw.get("ema_params1", raw).items()}

    def flops_per_token(self):
        """FLOP per text token of a training step; null pass and token head run on their share of the rows."""
        cfg, n = self.cfg, self.cfg.length + self.n_control         # positions that the blocks see
        trunk = 2 * n / cfg.length * (sum(p.numel() for p in self.blocks.parameters())
                                      + 2 * cfg.n_layer * cfg.d_model * n)
        head = 2 * (self.proj_kernel.numel() + self.unembed_kernel.numel())
        null = (1 - cfg.decoder_prob) * cfg.self_cond_prob
        return (3 + null) * trunk + 3 * cfg.decoder_prob * head

    # Progressive distillation (v2, appendix B) -----------------------------------------------------
    def attach_teacher(self, teacher, fresh):
        """Keep the teacher outside the module registry; a fresh student starts from it, or from --init."""
        self._teacher = [teacher]
        if fresh and not self.cfg.init:     # --init: the student of the round before
            common.load_weights(self, teacher.state_dict(), self.cfg.teacher)

    def distill_target(self, s, half, u=None):
        """Where K teacher steps lead from (z, t) to t + 1/N, as the x_hat of ONE step; on the rows s.den.

        u [n, K - 1]: inner times as fractions of the span, logit-normal when absent.
        """
        cfg, teacher, span = self.cfg, self._teacher[0], 1 / self.cfg.student_steps
        K = cfg.teacher_steps or max(1, round(64 / cfg.student_steps))
        x, z, t, w, cond, half = (y[s.den] for y in (s.x, s.z, s.t, s.w, s.cond, half))
        if u is None:
            normals = torch.randn(len(t), K - 1, device=t.device, dtype=t.dtype)
            u = logit_normal(normals, cfg.denoiser_p_mean, cfg.denoiser_p_std)
        u = F.pad(F.pad(u.sort(1).values, (1, 0)), (0, 1), value=1.0)       # with both ends
        times = t[:, None] + span * u                                       # [n, K + 1]
        end = z
        for a, b in zip(times.T[:-1], times.T[1:]):
            x_hat = teacher.final_layer(teacher.net(end, half, a, w, torch.zeros_like(a)))
            end = torch.where(cond, x, end + bc(b - a) * velocity(x_hat, end, bc(a), cfg.t_eps))
            half = x_hat = torch.where(cond, x, x_hat)
        if K == 1 or span < 1e-3:
            return x_hat
        return z + bc(1 - t) / span * (end - z)

    def distill_loss(self, batch, t=None, noise=None, coins=None):
        """x-space error against the teacher's target, or cross-entropy: mean over tokens, then rows.

        Unlike `loss`, without 1 / (1 - t)^2, and rows count equally whatever their length (official code).
        """
        s, u = self.corrupt(batch, t, noise, coins, span=1 / self.cfg.student_steps), (noise or {}).get("u")
        with torch.no_grad():
            _, half = self._teacher[0].first_estimate(s)
            half = torch.where(s.cond, s.x, half)       # decode rows see the condition here, unlike in `loss`
            target = self.distill_target(s, half, None if u is None else u[s.order][s.den])
        weight = s.count / s.count.sum(dim=1, keepdim=True).clamp_min(1) / len(s.x)             # [B, L]
        x_hat, ce, _ = self.main_pass(s, half, weight * s.decode[:, None])
        l2 = ((weight * ~s.decode[:, None])[s.den] * (x_hat - target).square().mean(-1)).sum()
        share = s.decode.to(l2.dtype).mean().clamp(1e-9, 1 - 1e-9)    # metrics: means over rows of a kind
        return l2 + ce, dict(l2=l2.detach() / (1 - share), ce=ce.detach() / share)

    # Sampling --------------------------------------------------------------------------------------
    def estimate(self, z, half, t, w, c=1.0, known=None):
        """x_hat [B, L, C] of one solver step at time t (0-d), with guidance w (the network's input) and c.

        c != 1: a second pass, in the same batch, sees zeros for the condition in z and in the half, whose
        target positions stay (official code, not the paper). known [B, L, 1] marks the condition.
        """
        null = torch.zeros_like(half) if known is None else half.masked_fill(~known, 0)
        two = c != 1 and known is not None
        if two:
            z, half, null = (torch.cat([y, y.masked_fill(known, 0)]) for y in (z, half, null))
        zero = z.new_zeros(len(z))
        x_hat = self.final_layer(self.net(z, half, zero + t, zero + w, zero))
        if self.cfg.self_cond_prob and not self.cfg.num_self_cond_cfg_tokens and w != 1:
            x_u = self.final_layer(self.net(z, null, zero + t, zero, zero))     # w is not inside this network
            x_hat = x_u + w * (x_hat - x_u)
        if two:
            x_hat, x_u = x_hat.chunk(2)
            x_hat = x_u + c * (x_hat - x_u)
        return x_hat

    def trajectory(self, z, times, sampler, churn, w, c=1.0, x_known=None, known=None, drift=0.0,
                   paper_form=False, eps=None):
        """Yields (z, x_hat) after every step along times [N + 1]; the last step is always an ODE step.

        z [B, L, C] holds sigma * noise; eps [N - 1, B, L, C] the SDE's noises, if given. Positions of known
        [B, L, 1] follow x_known + (1 - t) drift: clean with drift 0 (a condition), or straight out of noise.
        paper_form: the network sees the re-noised state but the step starts from the old one (paper, alg. 6).
        """
        def pin(y, t=1.0):
            return y if known is None else torch.where(known, x_known + (1 - t) * drift, y)
        z, half, last = pin(z, 0.0), pin(torch.zeros_like(z)), len(times) - 2
        for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
            z_at, at = z, t
            if sampler == "sde" and i < last:
                e = torch.randn_like(z) if eps is None else eps[i]
                z_at, at = renoise(z, t, s, churn, self.cfg.denoiser_noise_scale, e)
                z_at = pin(z_at, at)
            half = pin(self.estimate(z_at, half, at, w, c, known))
            if paper_form:
                z_at, at = z, t
            z = pin(z_at + (s - at) * velocity(half, z_at, at, self.cfg.t_eps), s)
            yield z, half

    def decode(self, z, w):
        """Token ids [B, L] of z: one forward in decode mode, time 1, self-conditioning half empty; argmax."""
        one = torch.ones(z.shape[0], device=z.device, dtype=z.dtype)
        h = self.net(z, torch.zeros_like(z), one, w * one, one)
        return common.greedy(self.token_features(h), self.unembed_kernel.T, self.unembed_bias)

    @torch.no_grad()
    def sample(self, n, length, steps, known=None, known_mask=None, watch=None, sampler="", churn=0.0, w=0.0,
               c=0.0, grid="logit_normal", paper_form=False):
        """Token ids [n, length] after `steps` solver steps and one decode pass.

        sampler ode | sde, churn, w, c: empty or 0 is the configuration's. known [n, length] where known_mask:
        the condition of a conditional model, else text to keep, held on the straight path from its noise.
        """
        cfg = self.cfg
        sampler, churn, w, c = sampler or cfg.sampler, churn or cfg.churn, w or cfg.w, c or cfg.c
        if sampler not in ("ode", "sde"):
            raise UserError(f"sampler={sampler}: ode or sde")
        z = self.proj_bias.new_empty(n, length, cfg.text_encoder_dim).normal_(std=cfg.denoiser_noise_scale)
        times = time_grid(steps, grid, cfg.denoiser_p_mean, cfg.denoiser_p_std, device=z.device)
        held = {}
        if known is not None:
            x = self.encode(known, known_mask, known_mask)
            held = dict(x_known=x, known=known_mask[..., None], drift=0.0 if cfg.max_input_length else z - x)
        path = self.trajectory(z, times, sampler, churn, w, c, paper_form=paper_form, **held)
        for step, (z, x_hat) in enumerate(path, 1):
            if watch is not None:
                watch(step, self.decode(x_hat, w))
        ids = self.decode(z, w)
        if known is not None:
            ids = torch.where(known_mask, known, ids)
        return ids if cfg.eos is None else cut(ids, cfg.eos, cfg.pad, known_mask)


if __name__ == "__main__":
    common.main(ELF, Config, PRESETS)
