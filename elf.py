"""ELF: Embedded Language Flows (Hu, Qiu, Lu, Zhao, Li, Kim, Andreas, He 2026, arXiv:2605.10938; v2 adds the distillation).

A flow in the embedding space of a frozen encoder. A row of tokens becomes one C-vector per token, x; a bidirectional
transformer learns to take noise to x, and only after the last step does a second head turn vectors into tokens.
There is no likelihood: `val` prints the two losses. Time runs from noise, t = 0, to data, t = 1.

    z_t = t x + (1 - t) sigma eps                       sigma = 2
    velocity v = (x_hat - z) / (1 - t)                  x_hat is what the network predicts

One training step. Each row has one of three roles: decode (20 %), self-conditioned (40 %), plain (40 %).
    1. x = (encoder(tokens) - mean) / std; decode rows: z = p x + (1 - p) sigma_dec eps with one p per TOKEN, time 1
    2. self-conditioned rows, no gradient: x_u = net([z; 0], t, w), fed back as the second half of the input
    3. h = net([z; x_u or 0], time, w, mode); x_hat on the denoise rows, logits on the decode rows
    4. target x* = x + [self-conditioned] (1 - 1/w) (x_hat - x_u), detached: guidance of scale w is trained in
    5. loss = sum over counted tokens of |x_hat - x*|^2 / (C (1 - t)^2), or the cross-entropy / number of counted tokens
One sampling step t -> s.  SDE: first a = 1 - churn (s - t), z <- a z + (1 - a) sigma eps, t <- a t.
    x_hat = net([z; previous x_hat], t, w);  z <- z + (s - t) (x_hat - z) / (1 - t).  The last step is always plain;
    then one forward in decode mode and an argmax.

Where paper and official code differ (SDE step, token head, law of w, noised prefix on decode rows) this is the code's form,
from which the published figures come; --paper_form=true samples with the paper's step.
# differs from the official code, same numbers: the pass that makes the guided estimate is gone (it equals the main pass),
the null pass runs on the rows that use it, each head on its own rows. Same law, less variance: role counts are fixed
(--exact_bernoulli=true draws a coin per row) and t, w are stratified over the global batch.

    python elf.py                                                   # characters, a table of Gaussian vectors; minutes
    python elf.py sample --steps=32 --sampler=sde --churn=1.5 --w=3
    torchrun --nproc_per_node=8 elf.py --preset=owt-b --t5=t5-small/model.safetensors
    python elf.py --stage=distill --teacher=out/elf-tiny/ckpt.pt    # a few-step student
"""
import dataclasses
import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import bc
from data import UserError

# --- 1. configuration ------------------------------------------------------------------------------


@dataclasses.dataclass
class Config(common.Config):
    """Names as in the official configuration where it has one."""
    lr: float = 2e-3                        # learning rate of Muon and of Nesterov-Adam
    ema_warmup: bool = False                # ELF's EMA has none
    encoder: str = "gauss"                  # gauss (frozen random table), t5 (weights from --t5) or t5-random
    t5: str = ""                            # file with the encoder weights of T5: model.safetensors or pytorch_model.bin
    text_encoder_dim: int = 64              # width C of the embedding space
    t5_layers: int = 2                      # layers of encoder=t5-random
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
    exact_bernoulli: bool = False           # a coin per row instead of fixed counts of decode / self-conditioned rows
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


OWT = dict(data="openwebtext-t5", tokenizer="t5", vocab=32100, encoder="t5", text_encoder_dim=512, bottleneck_dim=128,
           length=1024, batch=512, lr=2e-3, warmup=9508, ema=0.9999, seed=42, eos=1, pad=0)
PAIRS = dict(OWT, d_model=768, n_layer=12, n_head=12, warmup=5000, decoder_noise_scale=1.0, label_drop_prob=0.1,
             pad_in_loss=True, pad=1, sampler="ode", w=1.0, c=2.0)
TINY = dict(data="prose", tokenizer="char", length=64, batch=32, d_model=64, n_layer=3, n_head=4, text_encoder_dim=64,
            bottleneck_dim=32, lr=5e-3, warmup=200, ema=0.998)
PRESETS = {
    "tiny": dict(TINY, steps=4000),
    "reverse": dict(TINY, data="reverse", tokenizer="char", length=32, max_input_length=16, label_drop_prob=0.1,
                    pad_in_loss=True, decoder_noise_scale=1.0, sampler="ode", w=1.0, c=2.0, steps=4000),
    # appendix B.1, table 4; 19,017 steps an epoch
    "owt-b": dict(OWT, d_model=768, n_layer=12, n_head=12, steps=5 * 19017),
    "owt-m": dict(OWT, d_model=1056, n_layer=24, n_head=16, steps=4 * 19017, churn=1.0),
    "owt-l": dict(OWT, d_model=1280, n_layer=32, n_head=16, steps=3 * 19017, churn=1.0),
    "de-en": dict(PAIRS, data="wmt14-de-en", length=128, max_input_length=64, steps=880600),
    "xsum": dict(PAIRS, data="xsum", length=1088, max_input_length=1024, steps=39800),
    "bench10-cpu": dict(TINY, steps=2500),
    "bench10": dict(TINY, data="wikitext103", tokenizer="gpt2", d_model=384, n_layer=6, n_head=6, length=256, batch=64,
                    steps=8000, text_encoder_dim=256, bottleneck_dim=128, lr=2e-3, warmup=400, ema=0.999),
    "tiny-distill": dict(student_steps=4, teacher_steps=8, steps=800, warmup=80, churn=1.5, w=2.5),
}
for _n in (16, 8, 4, 2, 1):         # one epoch a round, then sampled with these settings (v2, appendix B)
    PRESETS[f"distill-{_n}"] = dict(PRESETS["owt-b"], stage="distill", student_steps=_n, steps=19017, warmup=1902,
                                    churn=2.0 if _n == 16 else 1.5, w=2.0 if _n == 16 else 2.5)

# --- 2. encoders -----------------------------------------------------------------------------------


def gauss_table(vocab, dim, seed):
    """Frozen table [V, C]: N(0, 1) entries, every row brought to mean 0 and standard deviation 1 (paper, D.3)."""
    E = torch.randn(vocab, dim, generator=torch.Generator().manual_seed(seed), device="cpu")
    E = E - E.mean(dim=1, keepdim=True)
    return E / E.square().mean(dim=1, keepdim=True).sqrt()


def t5_bucket(rel):
    """T5's bucket of rel = key - query position: 16 for the sign, 8 exact distances, 8 logarithmic ones up to 128.

    The thresholds equal 8 + floor(8 ln(n / 8) / ln 16) capped at 15, for every distance, without rounding doubts.
    """
    edges = torch.tensor([8, 12, 16, 23, 32, 46, 64, 91], device=rel.device)
    n = rel.abs()
    far = 7 + (n[..., None] >= edges).sum(-1)
    return 16 * (rel > 0) + torch.where(n < 8, n, far)


class T5Encoder:
    """The encoder of T5 as a function of Hugging Face's weights {name: tensor}, from which it reads every size.

    It is frozen and belongs to no module: checkpoints hold neither its weights nor averages of them.
    """

    def __init__(self, weights):
        self.weights = {k: v.float() for k, v in weights.items() if k == "shared.weight" or k.startswith("encoder.")}
        self.n_layer = sum(k.endswith("SelfAttention.q.weight") for k in self.weights)
        self.vocab, self.dim = self.weights["shared.weight"].shape

    @staticmethod
    def random(vocab, dim, n_layer, seed):
        """T5's own initialisation (no scaling in the attention: q is drawn smaller by the root of the head width)."""
        g, heads = torch.Generator().manual_seed(seed), max(1, dim // 64)

        def normal(rows, cols, std):
            return torch.randn(rows, cols, generator=g, device="cpu") * std
        w = {"shared.weight": normal(vocab, dim, 1.0), "encoder.final_layer_norm.weight": torch.ones(dim)}
        w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = normal(32, heads, dim ** -0.5)
        for i in range(n_layer):
            p = f"encoder.block.{i}.layer."
            w[p + "0.SelfAttention.q.weight"] = normal(dim, dim, (dim * (dim // heads)) ** -0.5)
            for name in "kvo":
                w[p + f"0.SelfAttention.{name}.weight"] = normal(dim, dim, dim ** -0.5)
            w[p + "1.DenseReluDense.wi.weight"] = normal(4 * dim, dim, dim ** -0.5)
            w[p + "1.DenseReluDense.wo.weight"] = normal(dim, 4 * dim, (4 * dim) ** -0.5)
            w[p + "0.layer_norm.weight"], w[p + "1.layer_norm.weight"] = torch.ones(dim), torch.ones(dim)
        return T5Encoder(w)

    def to(self, device):
        if self.weights["shared.weight"].device != device:
            self.weights = {k: v.to(device) for k, v in self.weights.items()}
        return self

    @torch.no_grad()
    def __call__(self, ids, mask=None):
        """Last hidden state [B, L, C] after the final norm; mask [B, L] over keys or [B, L, L] over (query, key)."""
        w, (B, L) = self.weights, ids.shape
        x = F.embedding(ids, w["shared.weight"])                                            # not scaled, no positions
        pos = torch.arange(L, device=ids.device)
        table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        heads = table.shape[1]
        bias = F.embedding(t5_bucket(pos - pos[:, None]), table).permute(2, 0, 1)[None]     # [1, heads, L, L], all layers
        if mask is not None:
            mask = mask[:, None] if mask.dim() == 3 else mask[:, None, None]
            bias = torch.where(mask.bool(), bias, torch.finfo(bias.dtype).min)
        for i in range(self.n_layer):
            p = f"encoder.block.{i}.layer."
            y = self.norm(x, w[p + "0.layer_norm.weight"])
            q, k, v = (F.linear(y, w[p + f"0.SelfAttention.{n}.weight"]).view(B, L, heads, -1).transpose(1, 2) for n in "qkv")
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
            x = x + F.linear(y.transpose(1, 2).reshape(B, L, -1), w[p + "0.SelfAttention.o.weight"])
            y = F.linear(self.norm(x, w[p + "1.layer_norm.weight"]), w[p + "1.DenseReluDense.wi.weight"])
            x = x + F.linear(y.relu(), w[p + "1.DenseReluDense.wo.weight"])
        return self.norm(x, w["encoder.final_layer_norm.weight"])

    @staticmethod
    def norm(x, weight):
        return weight * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6))     # T5's RMSNorm, float32


def load_t5(path, dim, vocab):
    """T5Encoder from a local file, checked against the width C and the vocabulary that the model wants."""
    if not path:
        raise UserError("encoder=t5 needs the weights of a T5 encoder: --t5=FILE (model.safetensors or pytorch_model.bin of "
                        "google-t5/t5-small); --encoder=gauss needs none")
    weights = common.load_published(path)
    last = "encoder.final_layer_norm.weight"
    if "shared.weight" not in weights and "encoder.embed_tokens.weight" in weights:
        weights["shared.weight"] = weights["encoder.embed_tokens.weight"]
    if "shared.weight" not in weights or last not in weights:
        missing = last if "shared.weight" in weights else "shared.weight"
        raise UserError(f"{path} is not a T5 encoder: it holds no tensor {missing}")
    rows, width = weights["shared.weight"].shape
    if width != dim:
        raise UserError(f"the T5 encoder in {path} is {width} wide, the model wants text_encoder_dim={dim}")
    if rows < vocab:
        raise UserError(f"the T5 encoder in {path} has {rows} token vectors, the model wants vocab={vocab}")
    return T5Encoder(weights)


def encoder_mask(valid, cond, drop=None):
    """Which key each query of the encoder sees, [B, L, L]: the condition only itself, all other positions what is valid.

    valid, cond [B, L] bool. Rows of `drop` [B] also hide the condition from the target.
    """
    seen = valid[:, None] & ~cond[:, :, None] | cond[:, None] & cond[:, :, None]
    return seen if drop is None else seen & ~(drop[:, None, None] & ~cond[:, :, None] & cond[:, None])


# --- 3. times and interpolant ----------------------------------------------------------------------


def logit_normal(normals, mean, std):
    """Times sigmoid(mean + std * n) from standard normals."""
    return torch.sigmoid(mean + std * normals)


def guidance_scale(u, low, high):
    """w [B] from uniforms: 1 + w is log-uniform on [1 + low, 1 + high]; 1.5 * 4^u - 1 as published (official code)."""
    return (1 + low) * ((1 + high) / (1 + low)) ** u - 1


def interpolate(x, eps, t, sigma):
    """z = t x + (1 - t) sigma eps (paper, eq. 1, with the noise scale of B.1); all broadcast to [B, L, C]."""
    return t * x + (1 - t) * sigma * eps


def velocity(x_hat, z, t, t_eps):
    """dz/dt = (x_hat - z) / max(1 - t, t_eps)."""
    return (x_hat - z) / (1 - t).clamp_min(t_eps)


def time_grid(steps, kind, mean, std, normals=None, device=None):
    """Sorted times [steps + 1] from 0 to 1: `uniform`, or `logit_normal` with fresh random interior points (official code)."""
    if kind == "uniform":
        return torch.linspace(0, 1, steps + 1, device=device)
    if kind != "logit_normal":
        raise UserError(f"grid={kind}: logit_normal or uniform")
    if normals is None:
        normals = torch.randn(steps - 1, device=device)
    ends = torch.zeros(1, device=normals.device, dtype=normals.dtype)
    return torch.cat([ends, logit_normal(normals, mean, std).sort().values, ends + 1])


def renoise(z, t, s, churn, sigma, eps):
    """Back to an earlier time before a step t -> s: a = 1 - churn (s - t), z <- a z + (1 - a) sigma eps, t <- a t.

    The two noises add linearly, so z ends up quieter than the nominal (1 - a t) sigma: a mild temperature, kept as it is
    in the official code.
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


class Attention(nn.Module):
    """Bidirectional attention, RMSNorm on each head's q and k before the rotation. No mask: padding is noised and seen."""

    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = linear(d_model, 3 * d_model)
        self.q_norm = nn.RMSNorm(d_model // n_head, eps=1e-6)
        self.k_norm = nn.RMSNorm(d_model // n_head, eps=1e-6)
        self.proj = linear(d_model, d_model)

    def forward(self, x, cos, sin):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (rotate_pairs(norm(y.to(cos.dtype)), cos, sin).to(v.dtype)           # statistics and angles in float32
                for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        return self.proj(common.attention(q, k, v).transpose(1, 2).reshape(B, L, D))


class SwiGLU(nn.Module):
    def __init__(self, d_model, inner):
        super().__init__()
        self.w12 = linear(d_model, 2 * inner)
        self.w3 = linear(inner, d_model)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    """h += attention(RMS(h)); h += SwiGLU(RMS(h)). Conditioning comes in through control tokens, not through the norms."""
    compile_me = True

    def __init__(self, d_model, n_head, mlp_ratio):
        super().__init__()
        self.norm1 = nn.RMSNorm(d_model, eps=1e-6)
        self.attn = Attention(d_model, n_head)
        self.norm2 = nn.RMSNorm(d_model, eps=1e-6)
        self.mlp = SwiGLU(d_model, int(int(mlp_ratio * d_model) * 2 / 3))

    def forward(self, h, cos, sin):
        h = h + self.attn(self.norm1(h), cos, sin)
        return h + self.mlp(self.norm2(h))


def scalar_embedder(d_model):
    """Linear, SiLU, Linear on the 256 sinusoidal features of a scalar, all weights N(0, 0.02^2)."""
    mlp = nn.Sequential(OrderedDict(mlp_0=nn.Linear(256, d_model), act=nn.SiLU(), mlp_2=nn.Linear(d_model, d_model)))
    for layer in (mlp.mlp_0, mlp.mlp_2):
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return mlp


class NesterovAdam(torch.optim.Optimizer):
    """Adam with Nesterov momentum as optax has it, for the tensors that Muon leaves: few numbers, so one flat update.

    m-hat = b1 m / (1 - b1^(k+1)) + (1 - b1) g / (1 - b1^k). `found_inf` = 1 leaves weights and state untouched.
    """

    def __init__(self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))
        self.found_inf = None

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params, (b1, b2) = group["params"], group["betas"]
            for p in params:
                if not self.state[p]:
                    self.state[p] = dict(step=torch.zeros((), device=p.device), m=torch.zeros_like(p), n=torch.zeros_like(p))
            state = [self.state[p] for p in params]
            w, m, n, g = (torch.cat([x.reshape(-1) for x in xs]) for xs in (
                params, [s["m"] for s in state], [s["n"] for s in state],
                [torch.zeros_like(p) if p.grad is None else p.grad for p in params]))
            ok = torch.ones((), device=w.device) if self.found_inf is None else 1 - self.found_inf.to(w.device)
            k = state[0]["step"].to(w.dtype) + 1
            m_new, n_new = m.lerp(g, 1 - b1), n.lerp(g * g, 1 - b2)
            m_hat = b1 * m_new / (1 - b1 ** (k + 1)) + (1 - b1) * g / (1 - b1 ** k)
            w_new = w - group["lr"] * m_hat / ((n_new / (1 - b2 ** k)).sqrt() + group["eps"])
            for old, new, into in ((w, w_new, params), (m, m_new, [s["m"] for s in state]), (n, n_new, [s["n"] for s in state])):
                parts = torch.where(ok > 0, new, old).split([p.numel() for p in params])
                torch._foreach_copy_(into, [x.view_as(p) for x, p in zip(parts, params)])
            for s in state:
                s["step"] += ok


# --- 5. ELF ----------------------------------------------------------------------------------------


def room(share, n_local, n_global):
    """Rows to reserve for a role of this share: what a rank can meet at most (6 standard deviations of the permuted roles)."""
    most = math.ceil(share * n_global - 1e-6)
    mean = share * n_local
    return min(n_local, most, math.ceil(mean + 6 * math.sqrt(mean * (1 - share)) - 1e-6) if n_local < n_global else most)


class ELF(nn.Module):
    conditional = True                      # trains on (source, target) pairs too
    val_keys = log_keys = ("l2", "ce")      # velocity loss of the denoise rows, nats per token of the decode rows

    def __init__(self, cfg):
        super().__init__()
        D, C, head_dim = cfg.d_model, cfg.text_encoder_dim, cfg.d_model // cfg.n_head
        if cfg.d_model % (2 * cfg.n_head):
            raise UserError(f"d_model={D} is not a multiple of 2 * n_head={2 * cfg.n_head}: change --d_model or --n_head")
        if cfg.dropout:
            raise UserError("dropout must be 0: the lean step takes the guided estimate from the main pass")
        self.cfg, self.amp, self._teacher, self._t5 = cfg, False, None, None
        if cfg.encoder == "gauss":
            self.register_buffer("E", gauss_table(cfg.vocab, C, cfg.seed))
        elif cfg.encoder == "t5-random":
            self._t5 = T5Encoder.random(cfg.vocab, C, cfg.t5_layers, cfg.seed)
        elif cfg.encoder != "t5":
            raise UserError(f"encoder={cfg.encoder}: gauss, t5 or t5-random")
        elif cfg.t5:                        # without a file the model still samples; `encode` asks for it
            self._t5 = load_t5(cfg.t5, C, cfg.vocab)
        self.latent_std = cfg.latent_std or (0.2 if cfg.encoder == "t5" else 1.0)

        # Names and layouts are those of the published PyTorch checkpoints.
        def tokens(n):
            return nn.Parameter(0.02 * torch.randn(1, n, D))
        self.self_cond_proj = linear(2 * C, C)
        self.text_proj = nn.Sequential(OrderedDict(proj1=linear(C, cfg.bottleneck_dim, bias=False),
                                                   proj2=linear(cfg.bottleneck_dim, D)))
        self.t_embedder = scalar_embedder(D)
        self.t_emb_tokens = tokens(cfg.num_time_tokens)
        if cfg.num_self_cond_cfg_tokens:
            self.self_cond_cfg_embedder = scalar_embedder(D)
            self.self_cond_cfg_tokens = tokens(cfg.num_self_cond_cfg_tokens)
        self.mode_tokens = tokens(cfg.num_model_mode_tokens)
        self.blocks = nn.ModuleList(Block(D, cfg.n_head, cfg.mlp_ratio) for _ in range(cfg.n_layer))
        self.final_layer = nn.Sequential(OrderedDict(norm_final=nn.RMSNorm(D, eps=1e-6), linear=nn.Linear(D, C)))
        nn.init.zeros_(self.final_layer.linear.weight)      # x_hat = 0 at the start
        nn.init.zeros_(self.final_layer.linear.bias)
        self.proj_kernel = nn.Parameter(nn.init.xavier_uniform_(torch.empty(D, C)))             # [in, out]
        self.proj_bias = nn.Parameter(torch.zeros(C))
        self.unembed_kernel = nn.Parameter(nn.init.xavier_uniform_(torch.empty(C, cfg.vocab)))  # [in, out]
        self.unembed_bias = nn.Parameter(torch.zeros(cfg.vocab))

        self.n_control = cfg.num_time_tokens + cfg.num_self_cond_cfg_tokens + cfg.num_model_mode_tokens
        cos, sin = common.rope_tables(cfg.length, head_dim)                 # control tokens: angle 0; text starts at 0
        self.register_buffer("cos", F.pad(cos, (0, 0, self.n_control, 0), value=1.0), persistent=False)
        self.register_buffer("sin", F.pad(sin, (0, 0, self.n_control, 0)), persistent=False)

    # Network ---------------------------------------------------------------------------------------

    def encode(self, tokens, valid, cond, drop=None):
        """Normalised latents x [B, L, C] of tokens [B, L]; masks as in `encoder_mask`."""
        if self.cfg.encoder == "gauss":
            x = F.embedding(tokens, self.E)
        else:
            if self._t5 is None:
                self._t5 = load_t5(self.cfg.t5, self.cfg.text_encoder_dim, self.cfg.vocab)
            with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=self.amp):
                x = self._t5.to(tokens.device)(tokens, encoder_mask(valid, cond, drop))
        return (x.to(self.proj_bias.dtype) - self.cfg.latent_mean) / self.latent_std

    def net(self, z, half, t, w, gate):
        """Hidden states [B, L, D] of z and the self-conditioning half (both [B, L, C]; half None: without its projection).

        t, w [B]; gate [B] is 1 in decode mode and 0 in denoise mode, where the mode tokens are zero vectors.
        """
        L, cos = z.shape[1], self.cos
        if L + self.n_control > cos.shape[0]:
            raise UserError(f"sequence of {L} tokens is longer than the model's length={cos.shape[0] - self.n_control}")
        h = self.text_proj(z if half is None else self.self_cond_proj(torch.cat([z, half], dim=-1)))    # [B, L, D]
        control = [self.t_emb_tokens + self.t_embedder(common.sinusoid(t).to(h.dtype))[:, None]]
        if self.cfg.num_self_cond_cfg_tokens:
            control.append(self.self_cond_cfg_tokens + self.self_cond_cfg_embedder(common.sinusoid(w).to(h.dtype))[:, None])
        h = torch.cat([*control, self.mode_tokens * bc(gate.to(h.dtype)), h], dim=1)
        cos, sin = cos[:L + self.n_control], self.sin[:L + self.n_control]
        with torch.autocast(h.device.type, dtype=torch.bfloat16, enabled=self.amp):     # the residual stays float32
            for block in self.blocks:
                h = block(h, cos, sin)
        return h[:, self.n_control:]

    def token_features(self, h):
        """Input of the unembedding, [B, L, C]. It bypasses the final norm and x_hat (official code, not the paper)."""
        return F.gelu(h @ self.proj_kernel + self.proj_bias, approximate="tanh")

    # Training --------------------------------------------------------------------------------------

    def corrupt(self, batch, t=None, noise=None, coins=None, span=0.0):
        """Everything a step needs before its first pass, rows sorted by role: decode, plain, self-conditioned.

        Sorting makes each pass and each head a slice of fixed size: decode rows lie within the first n_dec, denoise rows
        within the last n_den, self-conditioned ones within the last n_sc; the few rows beyond have weight 0. Draws may be
        passed in the batch's order: t [B], coins dict(decode, sc, drop [B] bool), noise dict(eps [B, L, C], p [B, L], w [B]).
        """
        cfg, tokens = self.cfg, batch["tokens"]
        if "cond_len" in batch and not cfg.max_input_length:
            raise UserError("the corpus holds (source, target) pairs: give --max_input_length=N, the longest source kept "
                            "(see --preset=reverse)")
        (B, L), device = tokens.shape, tokens.device
        noise, rows = noise or {}, batch.get("rows") or common.Rows.default(B)

        def normal(salt):                                   # [B], stratified over the global batch, exact in float64
            return torch.special.ndtri(rows.uniform(salt, device)).to(self.proj_bias.dtype)

        n_dec, n_sc = cfg.decoder_prob, (1 - cfg.decoder_prob) * cfg.self_cond_prob
        if coins is None and not cfg.exact_bernoulli:
            role = rows.roles((n_dec, 1 - n_dec - n_sc, n_sc), device=device)
            n_dec, n_den, n_sc = (room(share, B, rows.n_global) for share in (n_dec, 1 - n_dec, n_sc))
        else:
            coins = coins or dict(decode=torch.rand(B, device=device) < cfg.decoder_prob,
                                  sc=torch.rand(B, device=device) < cfg.self_cond_prob)
            role = torch.where(coins["decode"], 0, 1 + coins["sc"].long())
            n_dec, n_den, n_sc = B, B, B if cfg.self_cond_prob else 0
        drop = rows.uniform(3, device) < cfg.label_drop_prob if coins is None or "drop" not in coins else coins["drop"]
        if t is None:
            t = logit_normal(normal(1), cfg.denoiser_p_mean, cfg.denoiser_p_std) * max(1 - span, 1e-6)
        w = noise.get("w")
        if w is None:
            w = guidance_scale(rows.uniform(2, device).to(t.dtype), cfg.self_cond_cfg_min, cfg.self_cond_cfg_max)
        p = noise.get("p")
        if p is None:
            p = logit_normal(torch.randn(B, L, device=device, dtype=t.dtype), cfg.decoder_p_mean, cfg.decoder_p_std)

        order = role.argsort(stable=True)
        tokens, role, drop, t, w, p = (y[order] for y in (tokens, role, drop, t, w, p))
        eps = torch.randn(B, L, cfg.text_encoder_dim, device=device, dtype=t.dtype) if "eps" not in noise else noise["eps"][order]
        valid = batch["mask"][order] if "mask" in batch else torch.ones_like(tokens, dtype=torch.bool)
        cond = torch.arange(L, device=device) < (batch["cond_len"][order, None] if "cond_len" in batch else 0)
        cond = cond.expand(B, L)
        count = ~cond if cfg.pad_in_loss else valid & ~cond
        # Number of counted tokens: the global batch's, seen from a chunk of n_local rows (the loop averages over chunks).
        total = count.sum()
        if "global_len" in batch:
            ends = torch.full_like(batch["global_len"], L) if cfg.pad_in_loss else batch["global_len"]
            total = (ends - batch.get("global_cond", 0)).sum() * (B / batch["global_len"].shape[0])

        x = self.encode(tokens, valid, cond, drop)                                                      # [B, L, C]
        x = x.masked_fill((drop[:, None] & cond)[..., None], 0)         # after the encoder: a dropped condition is zeros
        decode = role == 0
        # One interpolation for both kinds of row; p = 1 keeps the condition of denoise rows clean. Decode rows noise it too.
        p = torch.where(decode[:, None], p, torch.where(cond, 1.0, t[:, None]))[..., None]
        z = interpolate(x, eps, p, bc(torch.where(decode, cfg.decoder_noise_scale, cfg.denoiser_noise_scale)))
        pinned = x.masked_fill(~cond[..., None], 0)                     # the null half: clean condition, zeros elsewhere
        return SimpleNamespace(order=order, tokens=tokens, x=x, z=z, t=t, w=w, decode=decode, sc=role == 2, cond=cond[..., None], count=count,
                               pinned=pinned, total=total.clamp_min(1), n_dec=n_dec, n_den=n_den, n_sc=n_sc)

    def first_estimate(self, s):
        """x_u of the self-conditioned rows, on the last n_sc rows and without gradient, and the half it makes [B, L, C]."""
        if not s.n_sc:
            return None, None
        z, pinned, t, w, sc, cond = (y[-s.n_sc:] for y in (s.z, s.pinned, s.t, s.w, s.sc, s.cond))
        with torch.no_grad():
            x_u = self.final_layer(self.net(z, pinned, t, w, torch.zeros_like(t)))
        half = s.pinned.masked_fill(bc(s.decode), 0)
        estimate = torch.where(cond | ~bc(sc), half[-s.n_sc:], x_u)
        return x_u, torch.cat([half[:len(half) - s.n_sc], estimate])

    def main_pass(self, s, half):
        """Hidden states with gradient: x_hat of the last n_den rows and the token features of the first n_dec."""
        h = self.net(s.z, half, torch.where(s.decode, 1.0, s.t), s.w, s.decode)
        return self.final_layer(h[len(h) - s.n_den:]), self.token_features(h[:s.n_dec])

    def cross_entropy(self, s, features, weight):
        """Weighted sum and per-token nll of the decode rows; weight [n_dec, L]."""
        return common.token_ce(features, self.unembed_kernel.T, self.unembed_bias, s.tokens[:s.n_dec], weight)

    def loss(self, batch, t=None, noise=None, coins=None):
        """Mean over counted tokens of |v_hat - v*|^2 / C on denoise rows and nats on decode rows (official PyTorch step).

        batch: dict(tokens [B, L], optional mask, cond_len, global_len, global_cond, rows); draws as in `corrupt`.
        """
        if self._teacher is not None:
            return self.distill_loss(batch, t, noise, coins)
        cfg, s = self.cfg, self.corrupt(batch, t, noise, coins)
        x_u, half = self.first_estimate(s)
        x_hat, features = self.main_pass(s, half)

        # 1. target x*. The guided estimate of the paper is net([z; x_u]), which is this very pass: no third forward.
        target = s.x[len(s.x) - s.n_den:]
        if s.n_sc and cfg.num_self_cond_cfg_tokens:
            guide = bc(s.sc[-s.n_sc:] * (1 - 1 / s.w[-s.n_sc:])) * (x_hat[-s.n_sc:].detach() - x_u)
            target = torch.cat([target[:s.n_den - s.n_sc], target[s.n_den - s.n_sc:] + guide])
        # 2. velocity loss in x-space: z cancels, |v_hat - v*|^2 = |x_hat - x*|^2 / (1 - t)^2
        rows = slice(len(s.x) - s.n_den, None)
        count = (s.count & ~s.decode[:, None])[rows].to(s.t.dtype)
        l2 = (count * (x_hat - target).square().mean(-1) / (1 - s.t[rows, None]).clamp_min(cfg.t_eps) ** 2).sum()
        # 3. cross-entropy of the decode rows
        ce_count = (s.count & s.decode[:, None])[:s.n_dec].to(s.t.dtype)
        ce, nll = self.cross_entropy(s, features, ce_count / s.total)
        return l2 / s.total + ce, dict(l2=l2.detach() / count.sum().clamp_min(1),
                                       ce=(nll * ce_count).sum() / ce_count.sum().clamp_min(1))

    def param_groups(self):
        """Muon for every 2-D tensor (embedders, projections and unembedding too), Nesterov-Adam for the rest."""
        matrices = [p for p in self.parameters() if p.dim() == 2]
        rest = [p for p in self.parameters() if p.dim() != 2]
        return [dict(params=matrices, lr=self.cfg.lr, optimizer=common.Muon, bias_correction=True,
                     transposed=[self.proj_kernel, self.unembed_kernel]),
                dict(params=rest, lr=self.cfg.lr, betas=(self.cfg.beta1, self.cfg.beta2), eps=self.cfg.adam_eps,
                     optimizer=NesterovAdam)]

    @staticmethod
    def published(raw):
        """State dict of a published PyTorch checkpoint (`checkpoint_<step>`): its averaged weights, plain names."""
        return {k.removeprefix("_orig_mod."): v for k, v in raw.get("ema_params1", raw).items()}

    def flops_per_token(self, train):
        """FLOP per text token; training: forward + backward, the null pass on its share, each head on its share."""
        cfg, longer = self.cfg, 1 + self.n_control / self.cfg.length
        trunk = 2 * longer * (sum(p.numel() for p in self.blocks.parameters())
                              + 2 * cfg.n_layer * cfg.d_model * (cfg.length + self.n_control))
        head = 2 * (self.proj_kernel.numel() + self.unembed_kernel.numel())
        if not train:
            return trunk
        return (3 + (1 - cfg.decoder_prob) * cfg.self_cond_prob) * trunk + 3 * cfg.decoder_prob * head

    # Progressive distillation (v2, appendix B) -----------------------------------------------------

    def attach_teacher(self, teacher, fresh):
        """Keep the frozen teacher outside the module registry; a fresh student starts from its weights, or from --init."""
        self._teacher = [teacher]
        if fresh and not self.cfg.init:         # --init: the student of the round before
            common.load_weights(self, teacher.state_dict(), self.cfg.teacher)

    def distill_target(self, s, half, u=None):
        """Where K teacher steps lead from (z, t) to t + 1/N, as the x_hat of ONE student step; all on the last n_den rows.

        u [n_den, K - 1]: inner times as fractions of the span, logit-normal when absent.
        """
        cfg, teacher, span = self.cfg, self._teacher[0], 1 / self.cfg.student_steps
        K = cfg.teacher_steps or max(1, round(64 / cfg.student_steps))
        x, z, t, w, cond = (y[len(y) - s.n_den:] for y in (s.x, s.z, s.t, s.w, s.cond))
        half = None if half is None else half[len(half) - s.n_den:]
        if u is None:
            u = logit_normal(torch.randn(len(t), K - 1, device=t.device, dtype=t.dtype), cfg.denoiser_p_mean, cfg.denoiser_p_std)
        ends = torch.zeros_like(t)[:, None]
        times = t[:, None] + span * torch.cat([ends, u.sort(dim=1).values, ends + 1], dim=1)            # [n_den, K + 1]
        end = z
        for a, b in zip(times.T[:-1], times.T[1:]):
            x_hat = teacher.final_layer(teacher.net(end, half, a, w, torch.zeros_like(a)))
            end = torch.where(cond, x, end + bc(b - a) * velocity(x_hat, end, bc(a), cfg.t_eps))
            x_hat = torch.where(cond, x, x_hat)
            half = None if half is None else x_hat
        if K == 1 or span < 1e-3:
            return x_hat
        return z + bc(1 - t) / span * (end - z)

    def distill_loss(self, batch, t=None, noise=None, coins=None):
        """x-space error against the teacher's target and cross-entropy, a mean over each row's tokens, then over rows.

        # differs from `loss`: no 1 / (1 - t)^2, and rows count equally whatever their length (official code).
        """
        s = self.corrupt(batch, t, noise, coins, span=1 / self.cfg.student_steps)
        with torch.no_grad():
            _, half = self._teacher[0].first_estimate(s)
            target = self.distill_target(s, half, noise["u"][s.order][-s.n_den:] if noise and "u" in noise else None)
        x_hat, features = self.main_pass(s, half)
        weight = s.count / s.count.sum(dim=1, keepdim=True).clamp_min(1)                                # [B, L]
        den, dec = ~s.decode[len(s.decode) - s.n_den:], s.decode[:s.n_dec]
        l2 = (den[:, None] * weight[-s.n_den:] * (x_hat - target).square().mean(-1)).sum()
        ce, _ = self.cross_entropy(s, features, dec[:, None] * weight[:s.n_dec] / len(s.x))
        return l2 / len(s.x) + ce, dict(l2=l2.detach() / den.sum().clamp_min(1),
                                        ce=ce.detach() * len(s.x) / dec.sum().clamp_min(1))

    # Sampling --------------------------------------------------------------------------------------

    def estimate(self, z, half, t, w, c=1.0, known=None):
        """x_hat [B, L, C] of one solver step at time t (0-d), with guidance w (an input of the network) and c.

        c != 1: a second pass, in the same batch, sees zeros for the condition in z and in the self-conditioning half, whose
        target positions stay. known [B, L, 1] marks the condition.
        """
        if c != 1 and known is not None:
            both = [torch.cat([y, y.masked_fill(known, 0)]) for y in (z, half)]
            x_hat, x_u = self.estimate(*both, t, w).chunk(2)
            return x_u + c * (x_hat - x_u)
        B, zero = z.shape[0], torch.zeros((), device=z.device, dtype=z.dtype)

        def x_of(half):
            return self.final_layer(self.net(z, half, t.expand(B), (zero + w).expand(B), zero.expand(B)))
        if not self.cfg.self_cond_prob:
            return x_of(None)
        x_hat = x_of(half)
        if self.cfg.num_self_cond_cfg_tokens or w == 1:
            return x_hat
        x_u = x_of(torch.zeros_like(half) if known is None else half.where(known, zero))
        return x_u + w * (x_hat - x_u)          # no guidance inside the network: the same by two passes

    def trajectory(self, z, times, sampler, churn, w, c=1.0, x_known=None, known=None, drift=0.0, paper_form=False, eps=None):
        """Yields (z, x_hat) after every step along times [N + 1]; the last step is always an ODE step.

        z [B, L, C] holds sigma * noise. known [B, L, 1] positions follow x_known + (1 - t) drift: clean at all times
        with drift 0 (conditional models), or the straight path from their own noise. eps [N - 1, B, L, C]: SDE noises.
        paper_form: the network sees the re-noised state but the step starts from the old one (paper, alg. 6).
        """
        def pin(y, t=1.0):
            return y if known is None else torch.where(known, x_known + (1 - t) * drift, y)
        z, half, steps = pin(z, 0.0), pin(torch.zeros_like(z)), len(times) - 1
        for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
            at, z_at = t, z
            if sampler == "sde" and i < steps - 1:
                z_at, at = renoise(z, t, s, churn, self.cfg.denoiser_noise_scale, torch.randn_like(z) if eps is None else eps[i])
                z_at = pin(z_at, at)
            half = pin(self.estimate(z_at, half, at, w, c, known))
            if paper_form:
                z_at, at = z, t
            z = pin(z_at + (s - at) * velocity(half, z_at, at, self.cfg.t_eps), s)
            yield z, half

    def decode(self, z, w):
        """Token ids [B, L] of z: one forward in decode mode at time 1 with an empty self-conditioning half, and argmax."""
        one = torch.ones(z.shape[0], device=z.device, dtype=z.dtype)
        h = self.net(z, torch.zeros_like(z) if self.cfg.self_cond_prob else None, one, w * one, one)
        return common.greedy(self.token_features(h), self.unembed_kernel.T, self.unembed_bias)

    @torch.no_grad()
    def sample(self, n, length, steps, known=None, known_mask=None, watch=None, sampler="", churn=0.0, w=0.0, c=0.0,
               grid="logit_normal", paper_form=False):
        """Token ids [n, length] after `steps` solver steps and one decode pass.

        sampler ode | sde, churn, w, c: empty or 0 means the configuration's. known tokens [n, length] where known_mask: the
        condition of a conditional model, else text to keep, held on the straight path from its own noise.
        """
        cfg = self.cfg
        sampler, churn, w, c = sampler or cfg.sampler, churn or cfg.churn, w or cfg.w, c or cfg.c
        if sampler not in ("ode", "sde"):
            raise UserError(f"sampler={sampler}: ode or sde")
        device = self.proj_bias.device
        z = cfg.denoiser_noise_scale * torch.randn(n, length, cfg.text_encoder_dim, device=device)
        times = time_grid(steps, grid, cfg.denoiser_p_mean, cfg.denoiser_p_std, device=device)
        held = {}
        if known is not None:
            x = self.encode(known, known_mask, known_mask)
            held = dict(x_known=x, known=known_mask[..., None], drift=0.0 if cfg.max_input_length else z - x)
        for step, (z, x_hat) in enumerate(self.trajectory(z, times, sampler, churn, w, c, paper_form=paper_form, **held)):
            if watch is not None:
                watch(step + 1, self.decode(x_hat, w))
        ids = self.decode(z, w)
        if known is not None:
            ids = torch.where(known_mask, known, ids)
        return ids if cfg.eos is None else cut(ids, cfg.eos, cfg.pad, known_mask)


def cut(ids, eos, pad, keep=None):
    """Positions of ids [B, L] from the first `eos` on become `pad`; positions of `keep` are left alone and not searched."""
    end = ids == eos if keep is None else (ids == eos) & ~keep
    end = end.cumsum(dim=1) > 0
    return ids.masked_fill(end if keep is None else end & ~keep, pad)


if __name__ == "__main__":
    common.main(ELF, Config, PRESETS)
