"""What the five papers share and nothing any one of them owns: the DiT backbone, the two vocabulary-sized heads,
draws that are functions of the global batch, Muon, and the training loop with its checkpoints, command line,
evaluation and benchmark.

    1 configuration   2 attention, blocks, DiT   3 vocabulary heads   4 global-batch draws   5 optimisers
    6 command line    7 ranks, seeds, files      8 checkpoints        9 training loop       10 sample, eval, bench

A paper file subclasses `Config`, defines one nn.Module with `loss`, `sample` and (where the paper has one) `nll`, and
ends with `common.main(Paper, Config, PRESETS)`. None of a paper's mathematics is here; no file handling is there.
"""
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import gc
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import sys
import time
import typing
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
from data import UserError, refuse


# --- 1. configuration ------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    """Keys that all papers have. `--key=value` overrides a preset, a preset overrides these defaults."""
    preset: str = "tiny"            # name of the preset in force
    data: str = "prose"             # prose, a prepared corpus, a file or folder of text, pairs.tsv, GPT-2 ids .bin
    tokenizer: str = "char"         # char, byte, bpe1024 or gpt2, for corpora made from raw text
    length: int = 64                # tokens per sequence, L
    vocab: int = 0                  # vocabulary size V; 0 = the corpus's (a larger one is allowed)
    unigram_entropy: float = 0.0    # nats per token of the training text; 0 = filled in from the corpus
    d_model: int = 64               # width of the backbone, D
    n_layer: int = 3                # transformer blocks
    n_head: int = 4                 # attention heads
    cond_dim: int = 64              # width C of the time-conditioning vector
    mlp_ratio: int = 4              # hidden width of the MLP / D
    dropout: float = 0.0            # dropout on the branch outputs
    gate_init: float = 0.0          # initial adaLN gates; 0 as published, above 0 short runs learn faster
    batch: int = 32                 # sequences per optimiser step, all ranks and micro-steps together
    accum: int = 1                  # micro-steps per optimiser step (gradient accumulation)
    steps: int = 1600               # optimiser steps
    lr: float = 3e-4                # peak learning rate
    warmup: int = 100               # steps of linear warm-up from 0
    lr_schedule: str = "constant"   # after the warm-up: constant, cosine or linear (both down to min_lr)
    min_lr: float = 0.0             # end of cosine and linear, as a fraction of lr
    beta1: float = 0.9              # AdamW beta_1
    beta2: float = 0.999            # AdamW beta_2
    adam_eps: float = 1e-8          # AdamW epsilon
    weight_decay: float = 0.0       # decoupled weight decay
    clip: float = 1.0               # global gradient-norm clip; 0 = off
    clip_from: int = 0              # first step at which clipping acts
    ema: float = 0.9999             # decay of the averaged weights used for evaluation and sampling
    ema_warmup: bool = True         # decay_n = min(ema, (1 + n) / (10 + n))
    seed: int = 0                   # seed of data order, draws and initialisation
    threads: int = 1                # CPU threads; more helps only on idle cores
    compile: str = "auto"           # torch.compile of the blocks: auto (on CUDA), true or false
    precision: str = "auto"         # bf16 or fp32 blocks; auto = bf16 on CUDA, fp32 on a CPU
    shard: bool = False             # FSDP2 over the blocks, for models that outgrow one GPU
    log_every: int = 50             # steps between training lines
    val_every: int = 400            # steps between validations; 0 = only at the end
    save_every: int = 400           # steps between checkpoints
    sample_every: int = 800         # steps between printed samples; 0 = only at the end
    out: str = ""                   # run folder; default out/<paper>-<preset>
    init: str = ""                  # start from the weights of this checkpoint, published or ours
    stage: str = "train"            # train, or distill where the paper has a second stage
    teacher: str = ""               # checkpoint of the teacher, for --stage=distill


# --- 2. attention, blocks, DiT ---------------------------------------------------------------------

def bc(x):
    """[B] -> [B, 1, 1]: a per-sequence scalar made ready to meet [B, L, D]."""
    return x[:, None, None]

def sinusoid(t, n=256):
    """Time features [B, n] of t [B]: cos then sin of t * 10000^(-k / (n/2)), k = 0 .. n/2 - 1, at least in float32."""
    t = t if t.dtype == torch.float64 else t.float()
    freqs = torch.exp(-math.log(10000) / (n // 2) * torch.arange(n // 2, device=t.device, dtype=t.dtype))
    angle = t[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=-1)

def rope_tables(length, head_dim):
    """cos and sin [L, head_dim / 2] of the rotary angles pos * 10000^(-2j / head_dim)."""
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * inv_freq
    return angle.cos().float(), angle.sin().float()

def rope(x, cos, sin):
    """Rotate [B, H, L, d] in the half-split layout (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)

def attention(q, k, v, softcap=0.0, causal=False, explicit=False):
    """softmax(q k^T / sqrt(d)) v for [B, H, L, d]; `softcap` s squashes the scores to s tanh(score / s) (FLM).

    `explicit` writes the scores out: torch.func.jvp needs it, SDPA's kernels having no forward-mode derivative.
    A soft-cap is FlexAttention on CUDA (fused once compiled), explicit elsewhere.
    """
    if not softcap and not explicit:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if softcap and q.is_cuda and not explicit and not causal:
        from torch.nn.attention.flex_attention import flex_attention
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: softcap * torch.tanh(s / softcap))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        L = q.shape[-2]
        scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return scores.softmax(dim=-1) @ v

def zero_linear(n_in, n_out, bias=True):
    """A linear layer that starts at zero. It draws like any other: seeds give the same weights around it."""
    linear = nn.Linear(n_in, n_out, bias)
    for p in linear.parameters():
        nn.init.zeros_(p)
    return linear

class TimestepEmbedder(nn.Module):
    """MLP(sinusoid(t)): [B] -> [B, C]. The time enters raw, without the factor 1000 of image models."""

    def __init__(self, cond_dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, t):
        return self.mlp(sinusoid(t).to(self.mlp[0].weight.dtype))

class Block(nn.Module):
    """adaLN-zero transformer block: h += gate * dropout(branch(norm(h) * (1 + scale) + shift)), twice."""
    compile_me = True               # compiled in place, one graph for all blocks of a model

    def __init__(self, d_model, n_head, cond_dim, mlp_ratio=4, dropout=0.0, softcap=0.0, causal=False, gate_init=0.0):
        super().__init__()
        self.n_head, self.dropout, self.softcap, self.causal = n_head, dropout, softcap, causal
        self.norm1 = nn.LayerNorm(d_model, bias=False)
        self.attn_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.attn_out = nn.Linear(d_model, d_model, bias=False)
        self.norm2 = nn.LayerNorm(d_model, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d_model, mlp_ratio * d_model), nn.GELU(approximate="tanh"),
                                 nn.Linear(mlp_ratio * d_model, d_model))
        self.adaLN_modulation = zero_linear(cond_dim, 6 * d_model)
        with torch.no_grad():       # order of the six: shift, scale, gate of the attention, then of the MLP
            self.adaLN_modulation.bias.view(6, d_model)[2::3] = gate_init

    def forward(self, h, c, cos, sin, explicit=False):
        B, L, D = h.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = self.norm1(h) * (1 + scale1) + shift1
        q, k, v = self.attn_qkv(x).view(B, L, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4).unbind(0)
        x = attention(rope(q, cos, sin), rope(k, cos, sin), v, self.softcap, self.causal, explicit)
        x = self.attn_out(x.transpose(1, 2).reshape(B, L, D))
        h = h + gate1 * (F.dropout(x, self.dropout, self.training) if self.dropout else x)
        x = self.mlp(self.norm2(h) * (1 + scale2) + shift2)
        return h + gate2 * (F.dropout(x, self.dropout, self.training) if self.dropout else x)

class OutputLayer(nn.Module):
    """Final norm with its modulation; `linear` (zero at the start) is applied by the caller's vocabulary head."""

    def __init__(self, d_model, cond_dim, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(d_model, bias=False)
        if out:
            self.linear = zero_linear(d_model, out)
        self.adaLN_modulation = zero_linear(cond_dim, 2 * d_model)

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.norm_final(h) * (1 + scale) + shift

class DiT(nn.Module):
    """The MDLM / Duo / LangFlow / FLM backbone between embeddings and vocabulary head, with their parameter names.

    forward(h [B, L, D], c [B, C]) -> u [B, L, D] after the final modulation; `cond(*times)` makes c. Projection to the
    vocabulary is left to the heads of section 3: nothing of size [B, L, V] is built here. Optional parts, in the
    published order: `vocab` > 0 adds vocab_embed [V, D], `n_times` = 2 a second time embedder (FLM's flow map),
    `out` > 0 output_layer.linear [out, D], `self_cond` the [D, 2D] self-conditioning projection.
    """

    def __init__(self, d_model, n_layer, n_head, cond_dim=128, mlp_ratio=4, dropout=0.0, length=1024, vocab=0, out=0,
                 n_times=1, self_cond=False, softcap=0.0, causal=False, gate_init=0.0):
        super().__init__()
        if d_model % (2 * n_head):
            raise UserError(f"d_model={d_model} must be a multiple of 2 * n_head={2 * n_head}: change one of them")
        self.d_model, self.n_layer, self.amp = d_model, n_layer, False
        if vocab:
            table = torch.empty(vocab, d_model).uniform_(-d_model ** -0.5, d_model ** -0.5)
            self.vocab_embed = nn.ParameterDict({"embedding": nn.Parameter(table)})
        self.sigma_map = TimestepEmbedder(cond_dim)
        if n_times == 2:
            self.sigma_map_prime = TimestepEmbedder(cond_dim)
        for name, table in zip(("cos", "sin"), rope_tables(length, d_model // n_head)):
            self.register_buffer(name, table, persistent=False)
        self.blocks = nn.ModuleList(Block(d_model, n_head, cond_dim, mlp_ratio, dropout, softcap, causal, gate_init)
                                    for _ in range(n_layer))
        self.output_layer = OutputLayer(d_model, cond_dim, out)
        if self_cond:
            self.self_cond_proj = zero_linear(2 * d_model, d_model, bias=False)

    def cond(self, t, s=None):
        """Conditioning vector c [B, C] = SiLU(sigma_map(t) [+ sigma_map_prime(s)]) from times [B]."""
        e = self.sigma_map(t)
        return F.silu(e if s is None else e + self.sigma_map_prime(s))

    def forward(self, h, c, explicit=False):
        L = h.shape[1]
        if L > self.cos.shape[0]:
            raise UserError(f"sequence of {L} tokens is longer than the model's length={self.cos.shape[0]}")
        cos, sin = self.cos[:L], self.sin[:L]
        with torch.autocast(h.device.type, dtype=torch.bfloat16, enabled=self.amp):
            for block in self.blocks:       # .forward by name goes past torch.compile, as torch.func.jvp needs
                h = block.forward(h, c, cos, sin, True) if explicit else block(h, c, cos, sin)
            u = self.output_layer(h, c)
        return u.to(torch.bfloat16) if self.amp else u

    def project(self, u):
        """output_layer.linear applied in u's dtype, returned in the weight's: for outputs that are not a vocabulary."""
        W, b = self.output_layer.linear.weight, self.output_layer.linear.bias
        return F.linear(u, W.to(u.dtype), b.to(u.dtype)).to(W.dtype)

def trunk_flops(d_model, n_layer, length, mlp_ratio=4):
    """Forward FLOP per token of the blocks (2 per multiply-add): QKVO + MLP, then the attention products."""
    return 2 * (4 + 2 * mlp_ratio) * d_model ** 2 * n_layer + 4 * length * d_model * n_layer


# --- 3. vocabulary heads ---------------------------------------------------------------------------
# With V = 50,257 one float32 [B, L, V] tensor of a 64 x 1,024 batch is 13 GB, and the plain expressions keep four
# alive. Both heads walk over chunks of rows instead: `token_ce` takes the gradient in the forward pass (its incoming
# gradient is one scalar), `expected_embedding` rebuilds a chunk's softmax from (u, lse).

# rows * V of a chunk. A GPU wants 2,048 rows or more; on a CPU 28 MB stay below the blocks that glibc keeps (32 MB).
CHUNK_ELEMENTS = {"cpu": 7 * 2 ** 20, "cuda": 2 ** 28}

def _logits(u, W, b, skip, E, cap):
    """Capped float32 (float64) logits [n, V] of a chunk and d capped / d raw (None without a cap)."""
    z = F.linear(u, W.to(u.dtype)).to(b.dtype).add_(b)      # in place from here: page faults cost more than products
    if skip is not None:                    # the Gaussian bias is large and exact: never rounded to bf16
        z.addmm_(skip.to(b.dtype), E.to(b.dtype).T)
    if not cap:
        return z, None
    z.div_(cap).tanh_()
    slope = z.square().neg_().add_(1)
    return z.mul_(cap), slope

def _softmax(z, targets):
    """Turns logits z [n, V] into probabilities, in place; returns the nll of targets [n] and the logsumexp [n]."""
    top, chosen = z.amax(-1, keepdim=True), z.gather(1, targets[:, None])
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    z.div_(total)
    lse = top + total.log()
    return (lse - chosen)[:, 0], lse[:, 0]

def _ce_chunk(u, W, b, skip, E, cap, targets, weight):
    """nll [n] and d(sum weight * nll) / d raw logits [n, V]."""
    z, slope = _logits(u, W, b, skip, E, cap)
    nll, lse = _softmax(z, targets)
    dz = z.mul_(weight[:, None]).scatter_add_(1, targets[:, None], -weight[:, None])
    return nll, dz if slope is None else dz.mul_(slope)

def _embed_chunk(u, W, b, values, skip, E, cap, targets):
    """x_hat [n, De], nll [n] and logsumexp [n]."""
    z, _ = _logits(u, W, b, skip, E, cap)
    nll, lse = _softmax(z, targets)
    return z @ values, nll, lse

def _embed_grad_chunk(u, W, b, values, skip, E, cap, targets, lse, x_hat, g, g_nll):
    """Probabilities [n, V] and d loss / d raw logits [n, V] from g = dL/dx_hat and g_nll = dL/dnll.

    dz = p * (g values^T - g . x_hat + g_nll) - g_nll onehot: the row term g . x_hat saves a second pass over V.
    """
    z, slope = _logits(u, W, b, skip, E, cap)
    p = z.sub_(lse[:, None]).exp_()
    dz = torch.addmm((g_nll - (g * x_hat).sum(-1))[:, None], g, values.T).mul_(p)
    dz.scatter_add_(1, targets[:, None], -g_nll[:, None])
    return p, dz if slope is None else dz.mul_(slope)

def chunk_rows(V, device):
    """How many rows of V logits are worked on at a time."""
    return max(64, CHUNK_ELEMENTS.get(device.type, 2 ** 24) // V)

def _chunks(u, W, skip):
    """(slice, its rows of u, its rows of skip) for u [N, D]."""
    size = chunk_rows(len(W), u.device)
    for i in range(0, len(u), size):
        s = slice(i, i + size)
        yield s, u[s], None if skip is None else skip[s]

def _flat(x):
    return None if x is None else x.reshape(-1, x.shape[-1])

def accumulate(total, a, b):
    """total [V, D] += a^T b; without a temporary where the dtypes agree, else in total's (float32) precision."""
    if total.dtype == a.dtype:
        total.addmm_(a.T, b)
    else:
        total += a.T @ b

def _zeros(inputs, needed):
    """A gradient for each input that needs one, in its dtype; None for the others."""
    return [torch.zeros_like(x) if need else None for x, need in zip(inputs, needed)]

def _add_grads(grads, s, dz, u, W, skip, E):
    """Add what rows s, with d loss / d raw logits dz [n, V], give to the gradients of (u, W, b, skip, E)."""
    du, dW, db, dskip, dE = grads
    low = dz.to(u.dtype)
    if du is not None:
        du[s] = low @ W.to(low.dtype)
    if dW is not None:
        accumulate(dW, low, u)
    if db is not None:
        db += dz.sum(0)
    if dskip is not None:
        dskip[s] = dz @ E.to(dz.dtype)
    if dE is not None:
        accumulate(dE, dz, skip.to(dz.dtype))

class _TokenCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, W, b, skip, E, targets, weight, cap):
        grads, nll = _zeros((u, W, b, skip, E), ctx.needs_input_grad), torch.empty_like(weight)
        for s, u_s, skip_s in _chunks(u, W, skip):
            nll[s], dz = _ce_chunk(u_s, W, b, skip_s, E, cap, targets[s], weight[s])
            if any(ctx.needs_input_grad):
                _add_grads(grads, s, dz, u_s, W, skip_s, E)
            del dz                      # free this chunk before the next one is built
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(nll)
        return (weight * nll).sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        return (*[None if x is None else x.mul_(g) for x in ctx.saved_tensors], None, None, None)

def token_ce(u, W, b, targets, weight, skip=None, E=None, cap=0.0):
    """Cross-entropy of logits = u W^T + b + skip E^T, weighted by row, without a [N, V] tensor alive beyond a chunk.

    u [..., D], W [V, D], b [V], targets [...] int64, weight [...] (known before the head), skip [..., De] and E [V, De]
    optional; cap > 0 squashes the logits to cap tanh(logits / cap). Returns (sum of weight * nll, nll [...] detached).
    The gradients are computed in the forward pass and only scaled in the backward pass, which can run once.
    """
    weight = weight.detach().expand(targets.shape).reshape(-1).to(b.dtype)
    if not torch.is_grad_enabled():         # needs_input_grad ignores no_grad: parameters would cost their gradients
        W, b, E = (x if x is None else x.detach() for x in (W, b, E))
    loss, nll = _TokenCE.apply(_flat(u), W, b, _flat(skip), E, targets.reshape(-1), weight, cap)
    return loss, nll.view(targets.shape)

class _ExpectedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, W, b, skip, E, values, targets, cap):
        x_hat = values.new_empty(len(u), values.shape[1])
        nll, lse = (b.new_empty(len(u)) for _ in range(2))
        for s, u_s, skip_s in _chunks(u, W, skip):
            x_hat[s], nll[s], lse[s] = _embed_chunk(u_s, W, b, values, skip_s, E, cap, targets[s])
        ctx.save_for_backward(u, W, b, skip, E, values, targets, lse, x_hat)
        ctx.cap = cap
        return x_hat, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_nll):
        u, W, b, skip, E, values, targets, lse, x_hat = ctx.saved_tensors
        *grads, dvalues = _zeros((u, W, b, skip, E, values), ctx.needs_input_grad)
        for s, u_s, skip_s in _chunks(u, W, skip):
            p, dz = _embed_grad_chunk(u_s, W, b, values, skip_s, E, ctx.cap, targets[s], lse[s], x_hat[s], g[s],
                                      g_nll[s])
            _add_grads(grads, s, dz, u_s, W, skip_s, E)
            if dvalues is not None:
                dvalues += p.T @ g[s]
            del p, dz
        return (*grads, dvalues, None, None)

def expected_embedding(u, W, b, values, skip=None, E=None, targets=None, cap=0.0):
    """Posterior mean x_hat = softmax(u W^T + b + skip E^T) @ values, and the nll of `targets` from the same pass.

    Shapes as in `token_ce`; values [V, De] (may be E itself). Returns (x_hat [..., De], nll [...] in nats, or None
    without targets), both differentiable in u, W, b, skip, E and values: the backward pass rebuilds the softmax.
    """
    ids = torch.zeros(u.shape[:-1], dtype=torch.int64, device=u.device) if targets is None else targets
    x_hat, nll = _ExpectedEmbedding.apply(_flat(u), W, b, _flat(skip), E, values, ids.reshape(-1), cap)
    return x_hat.view(*u.shape[:-1], values.shape[1]), None if targets is None else nll.view(targets.shape)

@torch.no_grad()
def greedy(u, W, b, skip=None, E=None, cap=0.0):
    """argmax over V of the same logits: ids [...] for u [..., D]."""
    ids = [_logits(u_s, W, b, skip_s, E, cap)[0].argmax(-1) for _, u_s, skip_s in _chunks(_flat(u), W, _flat(skip))]
    return torch.cat(ids).view(u.shape[:-1])


# --- 4. global-batch draws -------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows [first, first + n_local) of the n_global rows of optimiser step `step`.

    Every method is a pure function of (seed, step, salt) over the GLOBAL batch, sliced to the local rows: any number of
    ranks and micro-steps sees the same times, subsets and roles. Order within the batch is permuted, so a row's index
    says nothing about its time.
    """
    seed: int
    step: int
    first: int
    n_local: int
    n_global: int

    @staticmethod
    def default(n):
        """For use without a training loop: a fresh batch of n rows, seeded from torch's generator."""
        return Rows(int(torch.randint(2 ** 31, ())), 0, 0, n, n)

    def rng(self, kind, salt=0):
        return np.random.default_rng([self.seed, self.step, kind, salt])

    def local(self, values, device=None):
        """The local slice of a numpy array over the global batch, as a tensor; a GPU's copy does not wait for it."""
        x = torch.from_numpy(np.ascontiguousarray(values[self.first:self.first + self.n_local]))
        on_cpu = device is None or torch.device(device).type == "cpu"
        return x if on_cpu else x.pin_memory().to(device, non_blocking=True)

    def uniform(self, salt=0, device=None):
        """float64 [n_local] in (0, 1): one draw in each of n_global equal strata, permuted."""
        rng = self.rng(1, salt)
        return self.local((rng.permutation(self.n_global) + rng.random(self.n_global)) / self.n_global, device)

    def subset(self, every=4, salt=0, device=None):
        """bool [n_local]: exactly one row, drawn at random, in each consecutive group of `every` global rows."""
        chosen = self.rng(2, salt).integers(0, every, -(-self.n_global // every))       # one of each group
        mask = np.arange(self.n_global) % every == np.repeat(chosen, every)[:self.n_global]
        return self.local(mask, device)

    def roles(self, shares, salt=0, device=None):
        """int64 [n_local]: role of each row; global counts are shares * n_global, stochastically rounded, permuted."""
        rng = self.rng(3, salt)
        edges = np.floor(np.cumsum(shares) / np.sum(shares) * self.n_global + rng.random()).astype(int)
        edges[-1] = self.n_global
        roles = np.searchsorted(edges, np.arange(self.n_global), side="right")
        return self.local(rng.permutation(roles), device)


# --- 5. optimisers ---------------------------------------------------------------------------------

def newton_schulz(x, dtype=torch.float32, eps=1e-8):
    """Five quintic steps towards the orthogonal factor of x [n, rows, cols] (Muon's coefficients).

    For long matrices (ratio above 1.5) the steps run on the Gram matrix, Q <- (a + b A + c A^2) Q, and x is multiplied
    once at the end: two large products instead of ten, the same numbers.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    flip = x.shape[-2] > x.shape[-1]
    x = (x.mT if flip else x).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + eps)
    if x.shape[-1] > 1.5 * x.shape[-2] and dtype != torch.bfloat16:
        A, Q = x @ x.mT, None
        for _ in range(5):
            P = b * A + c * A @ A
            P.diagonal(dim1=-2, dim2=-1).add_(a)
            Q, A = P if Q is None else P @ Q, P @ A @ P
        x = Q @ x
    else:
        for _ in range(5):
            A = x @ x.mT
            x = a * x + (b * A + c * A @ A) @ x
    return x.mT if flip else x

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: W -= lr * sqrt(max(1, rows / cols)) * NS5(u), u = beta m + (1 - beta) g.

    `bias_correction` divides m by 1 - beta^(k+1) and g by 1 - beta^k (optax, ELF); without it, in bf16 and with
    eps 1e-7 it is the form NFDM used. `transposed` lists parameters stored [in, out], whose factor is cols / rows.
    Matrices of one shape are orthogonalised as one batch. `found_inf` = 1 leaves weights and state untouched.
    """

    def __init__(self, params, lr=2e-3, momentum=0.95, bias_correction=True, ns_dtype=torch.float32, eps=1e-8,
                 weight_decay=0.0, transposed=()):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eps=eps))
        self.bias_correction, self.ns_dtype, self.found_inf = bias_correction, ns_dtype, torch.zeros(())
        self.transposed = {id(p) for p in transposed}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.shape, id(p) in self.transposed, p.dtype), []).append(p)
            for (shape, transposed, _), params in alike.items():
                rows, cols = reversed(shape) if transposed else shape
                self.update(params, group, scale=max(1.0, rows / cols) ** 0.5)

    def update(self, params, group, scale):
        """One step of matrices of one shape, batched [n, rows, cols]."""
        beta, ok = group["momentum"], 1 - self.found_inf.to(params[0].device, params[0].dtype)
        for p in params:
            if not self.state[p]:
                self.state[p] = dict(step=torch.zeros((), device=p.device), m=torch.zeros_like(p))
            self.state[p]["step"] += ok.float()
        g = torch.stack([whole(p.grad) for p in params])        # a shard has no singular values
        m = torch.stack([whole(self.state[p]["m"]) for p in params])
        m = torch.where(ok > 0, m.lerp(g, 1 - beta), m)
        k = self.state[params[0]]["step"].to(g.dtype)
        m_scale, g_scale = ((1 - beta ** (k + 1), 1 - beta ** k) if self.bias_correction else (1, 1))
        u = newton_schulz(beta * m / m_scale + (1 - beta) * g / g_scale, self.ns_dtype, group["eps"]).to(g.dtype)
        u = torch.where(ok > 0, u * (group["lr"] * scale), 0)
        for p, u_p, m_p in zip(params, u, m):
            self.state[p]["m"].copy_(like(m_p, p))
            p.mul_(1 - group["lr"] * group["weight_decay"] * ok).sub_(like(u_p, p))


# --- 6. command line -------------------------------------------------------------------------------

OPTIONS = {     # verb: {name: (default, comment)}; a paper's own options are the keywords of its `sample` and `nll`
    "train": {},
    "sample": {
        "n": (4, "sequences to draw"), "steps": (64, "solver steps; nothing to do with the training key"),
        "length": (0, "tokens per sequence; 0 = the model's"), "prompt": ("", "text that every sample starts with"),
        "infill": ("", "text whose ___ the model fills in"), "watch": (False, "redraw the text while it forms"),
        "seed": (0, "seed of the draws"), "out": ("", "run folder; default the newest out/<paper>-*")},
    "eval": {
        "rows": (0, "validation sequences to score; 0 = all, or 64 with likelihood=ode"),
        "n": (64, "samples for the generation metrics; 0 = none"), "steps": (64, "solver steps of those samples"),
        "sets": ("", "further corpora to score (zero-shot), separated by commas"),
        "gen_ppl": ("", "name or folder of a GPT-2 that scores the samples (pip install transformers)"),
        "seed": (0, "seed of the draws"), "out": ("", "run folder; default the newest out/<paper>-*")},
    "bench": {
        "iters": (10, "timed training steps"), "sample_n": (4, "sequences of the timed sampling run"),
        "sample_steps": (8, "solver steps of the timed sampling run")}}

def parse_value(key, text, kind):
    """Text of `--key=text` as int, float, bool, str or Optional of these; a wrong type is one clear line."""
    kind, *optional = typing.get_args(kind) or (kind,)      # of Optional[float]: float, NoneType
    if optional and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        value = float(text) if kind is int else kind(text)      # 1e6 is a whole number, 1.5 and nan are not
        if kind is not str and value != kind(value):
            raise ValueError
        return kind(value)
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"--{key}={text}: expected {getattr(kind, '__name__', kind)}") from None

def keyword_options(f):
    """{name: default} of the options of a paper's `sample` or `nll` (or None): its keywords with a plain value."""
    keywords = inspect.signature(f).parameters if f else {}
    return {k: p.default for k, p in keywords.items() if isinstance(p.default, (bool, int, float, str))}

def nearest(word, words):
    near = difflib.get_close_matches(word, words, 1)
    return f" (did you mean {near[0]}?)" if near else ""

def parse(argv, Paper, Cfg, presets):
    """argv -> (verb, explicit config overrides {key: value}, verb options {key: value})."""
    rest = list(argv)
    verb = rest.pop(0) if rest and not rest[0].startswith("-") else "train"
    if verb not in OPTIONS:
        raise UserError(f"unknown command '{verb}': use one of {', '.join(OPTIONS)}" + nearest(verb, OPTIONS))
    kinds = {f.name: f.type for f in dataclasses.fields(Cfg)} if verb in ("train", "bench") else {}
    sources = {"sample": [Paper.sample], "eval": [Paper.sample, getattr(Paper, "nll", None)]}.get(verb, ())
    options = {k: v for f in sources for k, v in keyword_options(f).items()}
    options |= {k: default for k, (default, _) in OPTIONS[verb].items()}
    known, overrides = {k: type(v) for k, v in options.items()} | kinds, {}
    for arg in rest:
        if arg in ("--help", "-h"):
            print_help(Paper, Cfg, presets, verb, options)
            raise SystemExit(0)
        key, eq, text = arg.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not arg.startswith("--") or key not in known:
            raise UserError(f"unknown key '{arg}' of '{verb}'" + (nearest(key, known) or ": see --help"))
        refuse(not eq and known[key] is not bool, f"--{key} needs a value: --{key}=...")
        (overrides if key in kinds else options)[key] = parse_value(key, text if eq else "true", known[key])
    for key, (default, _) in OPTIONS[verb].items():
        least = int(default != 0 and (verb, key) != ("eval", "n"))          # the others take 0 for a default or none
        refuse(type(default) is int and options[key] < least, f"--{key}={options[key]}: must be at least {least}")
    if (name := overrides.get("preset", "tiny")) not in presets:
        raise UserError(f"--preset={name}: no such preset; one of {', '.join(presets)}" + nearest(name, presets))
    return verb, overrides, options

def print_help(Paper, Cfg, presets, verb, options):
    print(f"python {paper_name(Paper)}.py [{' | '.join(OPTIONS)}] --key=value ...     presets: {', '.join(presets)}\n")
    own = f"option of {Paper.__name__}.sample or .nll"
    keys = {k: (v, OPTIONS[verb].get(k, (v, own))[1]) for k, v in options.items()}
    if verb in ("train", "bench"):
        sources = [inspect.getsource(c) for c in reversed(Cfg.__mro__) if dataclasses.is_dataclass(c)]
        notes = dict(re.findall(r"^    (\w+): [^#\n]*?# *(.*)$", "".join(sources), re.M))     # trailing comments
        keys |= {f.name: (f.default, notes.get(f.name, "")) for f in dataclasses.fields(Cfg)}
    for k, (default, note) in keys.items():
        print(f"  --{k}={default}".ljust(34) + note)
    for name, values in presets.items() if verb == "train" else ():
        print(f"preset {name}: " + " ".join(f"{k}={v}" for k, v in values.items()))

def choose_preset(Cfg, presets, overrides, world):
    """Name of the preset in force and why: on a CPU tiny, on CUDA the paper's own if its corpus is prepared."""
    if "preset" in overrides:
        return overrides["preset"], "as asked"
    main_preset = next((p for p in ("owt", "owt-b", "roc") if p in presets), "tiny")
    if world.device.type == "cpu":
        return "tiny", f"no GPU: pass --preset={main_preset} to train at paper scale"
    corpus = presets[main_preset].get("data", Cfg.data)
    if data.is_ready(corpus):
        return main_preset, "the paper's setting"
    if world.size > 1:
        raise UserError(f"preset {main_preset} needs corpus {corpus}: python data.py {corpus} (or pass --preset=tiny)")
    return "tiny", f"the corpus of preset {main_preset} is missing: python data.py {corpus}"

def make_config(Cfg, presets, preset, overrides):
    """Dataclass default < preset < stage preset < --key=value, with the checks that every paper needs."""
    values = dict(presets[preset])
    if overrides.get("stage", values.get("stage", "train")) != "train":
        values |= presets.get(f"{preset}-distill", {})
    cfg = Cfg(**{**values, **overrides, "preset": preset})
    choices = {"lr_schedule": ("constant", "cosine", "linear"), "stage": ("train", "distill"),
               "compile": ("auto", "true", "false"), "precision": ("auto", "bf16", "fp32")}
    positive = "batch accum steps length log_every save_every d_model n_head cond_dim threads mlp_ratio".split()
    for key, value in vars(cfg).items():
        allowed, rule, least = True, "", int(key in positive)
        if key in choices:
            allowed, rule = value in choices[key], f"use one of {', '.join(choices[key])}"
        elif key in ("dropout", "ema", "beta1", "beta2"):
            allowed, rule = 0 <= value < 1, "must lie in [0, 1)"
        elif key.endswith("_prob") and isinstance(value, float):
            allowed, rule = 0 <= value <= 1, "a probability lies in [0, 1]"
        elif isinstance(value, int) or key in ("clip", "lr", "weight_decay", "adam_eps"):
            allowed, rule = least <= value < math.inf, f"must be finite and at least {least}"
        refuse(not allowed, f"--{key}={value}: {rule}")
    return cfg


# --- 7. ranks, seeds, files ------------------------------------------------------------------------

@dataclasses.dataclass
class World:
    """This process among the ranks. Rank 0 prints; on a terminal the line between two log points is a live one."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def live(self):
        return self.rank == 0 and sys.stdout.isatty()

    def say(self, text, end="\n"):
        if self.rank == 0:
            print(("\r\x1b[K" if self.live else "") + text, end=end, flush=True)

def start_world():
    """The process group under torchrun (NCCL on CUDA, gloo on a CPU), a world of one otherwise."""
    gpu, device = torch.cuda.is_available(), torch.device("cpu")
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(minutes=10))
    return World(dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else World(device=device)

def all_reduce_mean(x):
    """Mean over the ranks, in place and without gradient; itself in a world of one."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x

def barrier():
    if dist.is_initialized():
        dist.barrier()

def reseed(*key):
    """Make torch's generators a function of (seed, step, micro-step, rank): resuming needs no RNG state at all."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))

def paper_name(Paper):
    return pathlib.Path(inspect.getfile(Paper)).stem

def write_atomic(path, text):
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)

def append_metrics(out, **record):
    """One line of metrics.jsonl; non-finite numbers become strings, so that every line is valid JSON."""
    clean = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with open(out / "metrics.jsonl", "a") as f:
        f.write(json.dumps(clean) + "\n")

def read_metrics(out):
    """Records of metrics.jsonl; a line cut short by a kill is dropped."""
    records, file = [], out / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records

def open_run(cfg, name):
    """The run folder and what its config.json has to say; a folder with a run of another configuration is refused."""
    suffix = f"-distill{getattr(cfg, 'student_steps', 0) or ''}" if cfg.stage == "distill" else ""
    out = pathlib.Path(cfg.out or f"out/{name}-{cfg.preset}{suffix}")
    config = {k: v for k, v in vars(cfg).items() if k != "out"} | {"paper": name}
    if cfg.teacher:
        config["teacher_sha256"] = digest(cfg.teacher)
    file = out / "config.json"
    try:
        old = dict(json.loads(file.read_text())) if file.exists() else config
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: restore it, or choose another folder with --out=") from None
    for k in sorted({*config, *old} - {"log_every"}):
        longer = k == "steps" and cfg.lr_schedule == "constant" and old.get(k) in range(cfg.steps)
        if old.get(k) != config.get(k) and not longer:
            raise UserError(f"{out} holds another run: {k}={old.get(k)} there, {k}={config.get(k)} here; "
                            f"choose another folder with --out= or remove {out}")
    return out, config

def claim_run(out, config, world):
    """Write config.json, once the model is built and the checkpoint read: a refused command changes nothing."""
    try:
        if world.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(out / "config.json", json.dumps(config, indent=1))
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}; choose another folder with --out=") from None
    barrier()                                   # the folder is there for every rank


# --- 8. checkpoints --------------------------------------------------------------------------------

FORMAT, MAGIC = 1, b"sha256:"       # a checkpoint is a torch.save archive followed by MAGIC and its 32-byte digest

def digest(path, size=None):
    """sha256 of the first `size` bytes of a file (all of them by default), hexadecimal."""
    return hashlib.sha256(np.memmap(path, mode="r")[:size]).hexdigest()

def save_checkpoint(path, payload):
    """Write to a temporary file, hash, flush, then rename; the checkpoint before it becomes ckpt.prev.pt (between the
    two renames only that one exists). Nothing is renamed if writing fails."""
    tmp = path.with_suffix(".tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(payload, f)
        with open(tmp, "ab") as f:
            f.write(MAGIC + bytes.fromhex(digest(tmp)))
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:
        tmp.unlink(missing_ok=True)
        kept = f"; {path} of the last save is intact" if path.exists() else ""
        while e.__context__:                # the words of the system, below those of torch's writer
            e = e.__context__
        raise UserError(f"cannot write the checkpoint {path} ({e}): free some space{kept}") from None
    if path.exists():
        os.replace(path, path.with_suffix(".prev.pt"))
    os.replace(tmp, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)

def damaged(path, why):
    prev = path.with_name("ckpt.prev.pt")
    has_prev = path.name == "ckpt.pt" and prev.exists()
    return UserError(f"{path} is damaged: {why}" + f"; the save before it is {prev}: rename it to ckpt.pt" * has_prev)

def is_ours(path):
    """True when the file carries our trailer and it matches, False without one; a mismatch (a flipped byte inside a
    tensor would load silently) is refused."""
    size = path.stat().st_size - len(MAGIC) - 32
    with open(path, "rb") as f:
        f.seek(max(0, size))
        trailer = f.read()
    if size < 0 or not trailer.startswith(MAGIC):
        return False
    if digest(path, size) != trailer[len(MAGIC):].hex():
        raise damaged(path, "its checksum does not match its content")
    return True

def load_checkpoint(path, paper=None):
    """Our own checkpoint as a dict of tensors and plain values (weights_only), checked before it is read."""
    path = pathlib.Path(path)
    refuse(not path.is_file(), f"no checkpoint at {path}")
    if not is_ours(path):
        raise damaged(path, "it is truncated, or not a checkpoint of this project")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                  # a pickle with a wrong byte can raise anything
        raise damaged(path, (str(e) or type(e).__name__).splitlines()[0]) from None
    version = ckpt.get("format") if isinstance(ckpt, dict) else None
    refuse(version != FORMAT, f"{path} has checkpoint format {version}; this code reads format {FORMAT}")
    refuse(paper and ckpt["paper"] != paper, f"{path} is a checkpoint of {ckpt['paper']}.py, not of {paper}.py")
    return ckpt

def newest_checkpoint(folder):
    """ckpt.pt of a run folder, or ckpt.prev.pt where a kill fell between the two renames."""
    newest, before = folder / "ckpt.pt", folder / "ckpt.prev.pt"
    return before if before.exists() and not newest.exists() else newest

class _Inert:
    """Stands in for every class of a published pickle that is not a tensor; nothing in it runs."""

    def __init__(self, *args, **kwargs):
        pass
    __setstate__ = __setitem__ = append = extend = __init__

class _TensorsOnly(pickle.Unpickler):
    """Reads the data.pkl of a torch.save archive: rebuilds tensors, maps every other class to `_Inert`."""
    KINDS = {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
             "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}

    def __init__(self, archive):
        self.root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("/data.pkl")
        super().__init__(io.BytesIO(archive.read(f"{self.root}/data.pkl")))
        self.archive, self.storages = archive, {}

    def find_class(self, module, name):
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, self.KINDS.get(name.removesuffix("Storage"), "uint8"))
        return dict if (module, name) == ("collections", "OrderedDict") else type(name, (_Inert,), {})

    def persistent_load(self, pid):
        _, dtype, key, _, size = pid
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(raw, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        return self.storages[key]

def read_safetensors(path):
    """{name: tensor}: 8 bytes of header length, a JSON header of dtypes, shapes and byte ranges, the raw numbers."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {name: torch.frombuffer(raw, dtype=kinds[v["dtype"]], offset=start + v["data_offsets"][0],
                                   count=math.prod(v["shape"])).view(v["shape"]) for name, v in header.items()}

def load_published(path):
    """Raw dict of a published file: .safetensors, or a torch archive read without running anything it contains."""
    path = pathlib.Path(path)
    refuse(not path.is_file(), f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        with zipfile.ZipFile(path) as archive:
            return dict(_TensorsOnly(archive).load())
    except Exception as e:                  # a pickle with a wrong byte can raise anything
        raise UserError(f"{path} cannot be read as .safetensors or a torch archive ({e!r})") from None

def load_weights(model, state, source):
    """Strict load by name; the first missing, unexpected and wrong-shaped names are printed with both shapes."""
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, torch.Tensor)}
    problems = [f"missing {k} {own[k]}" for k in own if k not in given][:1]
    problems += [f"unexpected {k} {given[k]}" for k in given if k not in own][:1]
    problems += [f"{k} is {given[k]} there, {own[k]} here" for k in own if given.get(k, own[k]) != own[k]][:1]
    refuse(problems, f"{source} does not fit this model: " + "; ".join(problems))
    model.load_state_dict({k: state[k] for k in own})

def initial_weights(model, path):
    """--init: the EMA weights of a checkpoint of ours, or a published file by way of the paper's `published`."""
    path = pathlib.Path(path)
    if path.is_file() and path.suffix != ".safetensors" and is_ours(path):
        ckpt = load_checkpoint(path)
        for key in getattr(model, "init_keys", ()):         # keys that change what the same weights compute
            if (theirs := ckpt["config"].get(key)) != getattr(model.cfg, key):
                raise UserError(f"{path} was trained with --{key}={theirs}, not {getattr(model.cfg, key)}")
        state = ckpt["model"] | ckpt["ema"]
    else:
        raw = load_published(path)
        state = model.published(raw) if hasattr(model, "published") else raw
    load_weights(model, {k: v for k, v in state.items() if not k.endswith("inv_freq")}, path)

def whole(x):
    """A sharded (FSDP2) tensor made whole, a plain one as it is; all ranks call it together."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x

def gather(x):
    return whole(x).cpu()

def local(x):
    return x.to_local() if hasattr(x, "to_local") else x

def like(value, x):
    """The whole tensor cut the way `x` is sharded, on its device; plain if x is plain or of another shape."""
    if not hasattr(x, "full_tensor") or value.shape != x.shape:
        return value.to(x.device)
    from torch.distributed.tensor import DTensor        # (distribute_tensor without a message needs torch 2.7)
    value, rank = value.to(x.device).contiguous(), x.device_mesh.get_local_rank()
    shards = [*value.chunk(x.device_mesh.size()), value[:0]]        # as FSDP2 cuts rows: the last ranks may get none
    return DTensor.from_local(shards[min(rank, len(shards) - 1)], x.device_mesh, x.placements, run_check=False,
                              shape=value.shape, stride=value.stride())


# --- 9. training loop ------------------------------------------------------------------------------

PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}     # dense bf16

class NonFinite(Exception):
    """Ten updates in a row were skipped."""

def lr_factor(cfg, step, schedule=None):
    """Fraction of the peak learning rate at `step`; with a warm-up the first step has 0, as published."""
    if step < cfg.warmup:
        return step / cfg.warmup
    done = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    decay = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
    return cfg.min_lr + (1 - cfg.min_lr) * decay[schedule or cfg.lr_schedule]

def load_corpus(Paper, cfg):
    """The corpus of cfg; fills cfg.vocab and cfg.unigram_entropy from it."""
    corpus = data.load(cfg.data, tokenizer=cfg.tokenizer, length=cfg.length,
                       max_source=getattr(cfg, "max_input_length", 0))      # of a corpus of (source, target) pairs
    if corpus.conditional and not getattr(Paper, "conditional", False):
        raise UserError(f"--data={cfg.data} holds (source, target) pairs: only elf.py trains on pairs")
    if 0 < cfg.vocab < corpus.vocab:
        raise UserError(f"--vocab={cfg.vocab} is smaller than the corpus's vocabulary of {corpus.vocab}")
    cfg.vocab = cfg.vocab or corpus.vocab
    cfg.unigram_entropy = cfg.unigram_entropy or round(float(corpus.unigram_entropy), 6)
    return corpus

def build(Paper, cfg, world, weights=None, source=None):
    """Model on its device, fresh (the same on every rank), with `weights` read from `source`, or as --init says."""
    if world.device.type == "cpu":
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    model = Paper(cfg).to(world.device)
    if weights:
        load_weights(model, weights, source)
    elif cfg.init:
        initial_weights(model, cfg.init)
    for m in model.modules():
        if hasattr(m, "amp"):               # bf16 blocks on CUDA unless the configuration says otherwise
            m.amp = cfg.precision == "bf16" or cfg.precision == "auto" and world.device.type == "cuda"
    return model

def compile_and_shard(model, cfg, world):
    """In-place compilation of every block (one graph serves all) and of the heads, then FSDP2 over the blocks."""
    blocks = [m for m in model.modules() if getattr(m, "compile_me", False)]
    if cfg.compile == "true" or cfg.compile == "auto" and world.device.type == "cuda":
        torch._dynamo.config.cache_size_limit = 32      # train, self-conditioning, sampling shapes of a block
        for f in (_ce_chunk, _embed_chunk, _embed_grad_chunk):      # the heads' loops over chunks stay outside
            globals()[f.__name__] = torch.compile(f, dynamic=False)
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)
    if cfg.shard:
        refuse(world.size == 1, "--shard=true needs several ranks: start it with torchrun")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)

def make_optimizers(model, cfg):
    """An optimiser for each of the paper's groups: fused AdamW unless the group names another class."""
    groups = model.param_groups() if hasattr(model, "param_groups") else [dict(params=model.parameters())]
    adamw = dict(betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, weight_decay=cfg.weight_decay, fused=True)
    optimizers, seen = [], set()
    for g in groups:
        g = {"lr": cfg.lr, "clip": "main", "lr_schedule": cfg.lr_schedule, "optimizer": torch.optim.AdamW, **g}
        params, cls = [p for p in g.pop("params") if p.requires_grad], g.pop("optimizer")
        seen.update(map(id, params))
        loop = {"clip": g.pop("clip"), "lr_schedule": g.pop("lr_schedule"), "peak_lr": g["lr"]}     # for train_step
        for part in plain_and_sharded(params):              # a fused step takes plain or sharded tensors, not both
            optimizers.append(cls(part, **{**(adamw if cls is torch.optim.AdamW else {}), **g}))
            optimizers[-1].param_groups[0].update(loop)
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in seen]
    assert not missing, f"param_groups leaves out {missing}"
    return optimizers

def plain_and_sharded(tensors):
    """The plain and the FSDP2-sharded ones of a list of tensors, as up to two lists."""
    split = [[x for x in tensors if hasattr(x, "full_tensor") == sharded] for sharded in (False, True)]
    return [part for part in split if part]

def reduce_gradients(params, world):
    """Mean of the gradients over the ranks, one flat message per dtype (zeros for a missing one: all ranks agree).

    differs from DDP: no overlap with the backward pass (about 3 ms of 100 at 0.5 GB over NVLink), and in return no
    unused-parameter failures, no name prefixes, no hooks inside compiled code. FSDP2 reduces its own shards.
    """
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    plain = [p.grad for p in params if world.size > 1 and not hasattr(p, "full_tensor")]
    for dtype in dict.fromkeys(g.dtype for g in plain):
        grads = [g for g in plain if g.dtype == dtype]
        flat = all_reduce_mean(torch.cat([g.flatten() for g in grads]))
        parts = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])

def clip_gradients(optimizers, limit):
    """Clip each named set of groups to the global norm `limit` (0 = measure only); returns the total norm."""
    sets, norms = {}, []
    for group in (g for opt in optimizers for g in opt.param_groups):
        sets.setdefault(group["clip"], []).extend(p.grad for p in group["params"])
    for grads in sets.values():
        parts = [whole(nn.utils.get_total_norm(part)).double() for part in plain_and_sharded(grads)]
        norms.append(torch.stack(parts).norm())
        if limit:
            scale = (limit / (norms[-1] + 1e-6)).clamp(max=1.0).to(grads[0].dtype)
            torch._foreach_mul_([local(g) for g in grads], scale)
    return torch.stack(norms).norm()

def training_batches(corpus, cfg, world, start):
    """Yields the micro-batches of the run from step `start` on; for a GPU a thread makes and pins two ahead.
    Rows are a function of (seed, step), so the data position of a checkpoint is its step."""
    n_local, gpu = micro_batch(cfg, world), world.device.type == "cuda"
    order, ahead = itertools.product(range(start, cfg.steps), range(cfg.accum)), collections.deque()

    def make(step, micro):
        first = (world.rank * cfg.accum + micro) * n_local
        batch = corpus.train_batch(cfg.seed, step, first, n_local, cfg.batch)
        if gpu:
            batch = {k: v.pin_memory() for k, v in batch.items()}
        return batch | {"rows": Rows(cfg.seed, step, first, n_local, cfg.batch)}

    if not gpu:                             # there is nothing to overlap
        yield from itertools.starmap(make, order)
        return
    pool = concurrent.futures.ThreadPoolExecutor(1)
    for at in order:
        ahead.append(pool.submit(make, *at))
        if len(ahead) == 3:
            yield to_device(ahead.popleft().result(), world.device)
    for batch in ahead:
        yield to_device(batch.result(), world.device)

class Stop:
    """SIGTERM and SIGINT set a flag (a second signal exits at once); the ranks agree on it and on the count of
    consecutive skips, copied asynchronously and read one step late, so that no step waits for the host."""

    def __init__(self, world):
        self.world, self.signum, gpu = world, 0, world.device.type == "cuda"
        self.seen, self.next = (torch.zeros(2, pin_memory=gpu) for _ in range(2))
        self.event = torch.cuda.Event() if gpu else None
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, self.catch)

    def catch(self, signum, frame):
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum

    def exchange(self, bad):
        """(signal number, consecutive skips) as all ranks knew them one step ago."""
        if self.event:
            self.event.synchronize()
        self.seen, self.next = self.next, self.seen
        flags = torch.stack([torch.full((), float(self.signum), device=bad.device), bad])
        if self.world.size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.next.copy_(flags, non_blocking=True)
        if self.event:
            self.event.record()
        return int(self.seen[0]), int(self.seen[1])

def duration(seconds):
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}h{m % 60:02d}m" if m >= 60 else f"{m}m{s:02d}s"

def count(n):
    """1,234 -> '1,234', 61,000 -> '61k', 3,100,000 -> '3.1M'."""
    scaled = ((1e9, f"{n / 1e9:.2f}B"), (1e6, f"{n / 1e6:.1f}M"), (1e4, f"{n / 1e3:.0f}k"))
    return next((text for least, text in scaled if n >= least), f"{n:,.0f}")

def flops_per_token(model, cfg):
    """FLOP per token of a training step: the paper's own count, or three forward passes of trunk and head."""
    if hasattr(model, "flops_per_token"):
        return model.flops_per_token()
    return 3 * trunk_flops(cfg.d_model, cfg.n_layer, cfg.length, cfg.mlp_ratio) + 6 * cfg.vocab * cfg.d_model

def mfu(flops_per_second, world):
    """'  mfu 41%' on a GPU whose bf16 peak is known, '' elsewhere."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    peak = next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
    return f"  mfu {flops_per_second / (peak * 1e10 * world.size):.0f}%" if peak else ""

def peak_memory(world):
    """Peak memory in GB: of the allocator on CUDA, of the process on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

class Run:
    """Everything a checkpoint holds: model, EMA, optimisers, step, and the sums behind the next training line."""

    def __init__(self, Paper, cfg, world, corpus, out):
        self.cfg, self.world, self.corpus, self.out, self.name = cfg, world, corpus, out, paper_name(Paper)
        self.step, self.skipped, self.elapsed, self.sums, self.path = 0, 0, 0.0, {}, out / "ckpt.pt"
        source = newest_checkpoint(out)
        ckpt = load_checkpoint(source, self.name) if source.exists() else None
        self.model = build(Paper, cfg, world, ckpt and ckpt["model"], source)
        if cfg.stage == "distill" and cfg.teacher:      # by its own configuration, with its EMA weights
            theirs = load_checkpoint(cfg.teacher, self.name)
            own = type(cfg)(**theirs["config"] | dict(init="", precision=cfg.precision, threads=cfg.threads))
            teacher = build(Paper, own, world, theirs["model"] | theirs["ema"], cfg.teacher)
            self.model.attach_teacher(teacher.eval().requires_grad_(False), fresh=ckpt is None)
        compile_and_shard(self.model, cfg, world)
        self.names, self.params = zip(*((n, p) for n, p in self.model.named_parameters() if p.requires_grad))
        self.ema = [p.detach().clone() for p in self.params]
        self.optimizers = make_optimizers(self.model, cfg)
        self.optimizer_of = {p: opt for opt in self.optimizers for p in opt.param_groups[0]["params"]}
        self.bad = torch.zeros((), device=world.device)         # consecutive skipped steps
        if ckpt:
            self.step, self.elapsed, self.skipped = ckpt["step"], ckpt["stats"]["elapsed"], ckpt["stats"]["skipped"]
            self.sums = to_device(ckpt["sums"], world.device)
            for name, p, e in zip(self.names, self.params, self.ema):
                e.copy_(like(ckpt["ema"][name], e))
                self.optimizer_of[p].state[p] = {k: like(v, p) for k, v in ckpt["optimizer"][name].items()}

    def save(self):
        state = dict(
            format=FORMAT, paper=self.name, config=dataclasses.asdict(self.cfg), step=self.step,
            model={k: gather(v) for k, v in self.model.state_dict().items()},
            ema={n: gather(e) for n, e in zip(self.names, self.ema)},
            optimizer={n: {k: gather(v) for k, v in self.optimizer_of[p].state[p].items()}
                       for n, p in zip(self.names, self.params)},
            sums={k: gather(v) for k, v in self.sums.items()}, stats=dict(elapsed=self.elapsed, skipped=self.skipped))
        if self.world.rank == 0:
            save_checkpoint(self.path, state)
        barrier()

    def record(self, kind, **values):
        if self.world.rank == 0:
            append_metrics(self.out, kind=kind, step=self.step, **values)

    @contextlib.contextmanager
    def averaged(self):
        """The model in eval mode with its EMA weights swapped in; the live weights come back afterwards."""
        weights, averages = [local(p.detach()) for p in self.params], [local(e) for e in self.ema]
        live = [w.clone() for w in weights]
        torch._foreach_copy_(weights, averages)
        self.model.eval()
        try:
            yield self.model
        finally:
            torch._foreach_copy_(weights, live)
            self.model.train()

    def train_step(self, batches):
        """One optimiser step: forward and backward per micro-step, reduce, clip, update, average. No host sync."""
        cfg, step, seen = self.cfg, self.step, collections.defaultdict(float)
        for micro in range(cfg.accum):
            batch = next(batches)
            reseed(cfg.seed, step, micro, self.world.rank)
            loss, metrics = self.model.loss(batch)
            (loss / cfg.accum).backward()
            for k, v in {**metrics, "loss": loss.detach()}.items():
                seen[k] += v.double() / cfg.accum
        reduce_gradients(self.params, self.world)
        seen["gnorm"] = norm = clip_gradients(self.optimizers, cfg.clip if step >= cfg.clip_from else 0)
        ok = torch.isfinite(norm + all_reduce_mean(seen["loss"].clone()))   # equal on all ranks, as the gradients are
        for opt in self.optimizers:
            for g in opt.param_groups:
                g["lr"] = g["peak_lr"] * lr_factor(cfg, step, g["lr_schedule"])
            opt.found_inf, opt.grad_scale = (~ok).float(), None     # the GradScaler protocol: 1 leaves all untouched
            opt.step()
            opt.zero_grad(set_to_none=True)
        decay = min(cfg.ema, (2 + step) / (11 + step)) if cfg.ema_warmup else cfg.ema       # n counts from 1
        with torch.no_grad():
            torch._foreach_lerp_([local(e) for e in self.ema], [local(p.detach()) for p in self.params], 1 - decay)
            if hasattr(self.model, "after_step"):
                self.model.after_step(step, ok)
        for k, v in {**seen, "good": torch.ones_like(norm), "skipped": (~ok).double()}.items():
            self.sums[k] = self.sums.get(k, 0) + (v if k == "skipped" else torch.where(ok, v, 0))
        self.bad = (self.bad + 1) * ~ok
        self.step += 1

    def flush(self):
        """Means since the last training line over the good steps, micro-steps and ranks; resets the sums."""
        names = sorted(self.sums)
        means = dict(zip(names, all_reduce_mean(torch.stack([self.sums[k] for k in names])).tolist()))
        self.sums, good = {}, means.pop("good")
        self.skipped += round(means.pop("skipped"))
        return {k: v / good if good else math.nan for k, v in means.items()} | {"skipped": self.skipped}

    def show_samples(self, n, width):
        """Print and keep n samples of the model as it is (inside `averaged`); the same seed every time."""
        ids = draw(self.model, self.corpus, n, getattr(self.model, "default_steps", 64))
        say_samples(self.world, self.out, self.step, self.corpus, ids, width=width)

def train(Paper, Cfg, presets, overrides, world):
    """Set up or resume a run, take its steps (log, validate, sample and save between them), and close it."""
    name, (preset, why) = paper_name(Paper), choose_preset(Cfg, presets, overrides, world)
    cfg = make_config(Cfg, presets, preset, overrides)
    if cfg.batch % (world.size * cfg.accum):
        raise UserError(f"--batch={cfg.batch} is not divisible by {world.size} ranks x {cfg.accum} micro-steps")
    if cfg.stage == "distill" and not hasattr(Paper, "attach_teacher"):
        raise UserError(f"--stage=distill: {name}.py has one stage only")
    if cfg.teacher:
        load_checkpoint(cfg.teacher, name)
    elif cfg.stage == "distill" and not getattr(Paper, "distils_alone", lambda cfg: False)(cfg):
        raise UserError("--stage=distill needs --teacher=CKPT, the ckpt.pt of the run to distil")
    corpus = load_corpus(Paper, cfg)
    out, config = open_run(cfg, name)
    world.say(f"{name}  preset {preset} ({why})          {out}")
    run = Run(Paper, cfg, world, corpus, out)
    claim_run(out, config, world)
    n_params, flops = sum(p.numel() for p in run.model.parameters()), flops_per_token(run.model, cfg)
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"cpu, {cfg.threads} threads"
    world.say(f"{device} x {world.size} | torch {torch.__version__} | {count(n_params)} parameters | "
              f"{flops / 1e6:.1f} MFLOP/token | {count(cfg.batch * cfg.length)} tokens/step\n{corpus.describe()} | "
              f"{f'resumed at step {run.step}' if run.step else 'fresh start'}, seed {cfg.seed}")
    if shutil.disk_usage(out).free < 48 * n_params:
        raise UserError(f"{out}: less than {48e-6 * n_params:,.0f} MB free for three checkpoints; free some space")
    finished = run.step >= cfg.steps
    kept = [r for r in read_metrics(out) if r.get("step", 0) <= run.step and (finished or r.get("kind") != "final")]
    if world.rank == 0:                     # lines past the checkpoint are cut: no step appears twice
        write_atomic(out / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
    if final := [r["text"] for r in kept if r["kind"] == "final"]:
        return world.say(f"finished at step {run.step}: {final[-1]}")
    return take_steps(run, flops) or finish(run)

def take_steps(run, flops):
    """The loop. Returns 128 + signal when one ended it, None at the last step."""
    cfg, world, tokens, start = run.cfg, run.world, run.cfg.batch * run.cfg.length, run.step
    batches, stop, micro = training_batches(run.corpus, cfg, world, start), Stop(world), micro_batch(cfg, world)
    since, busy = start, 0.0                # the rate: steps since `since` and the seconds they took
    run.model.train()
    while run.step < cfg.steps:
        began = time.perf_counter()
        run.train_step(batches)
        signum, bad = stop.exchange(run.bad)
        if bad >= 10:
            raise NonFinite(f"{bad} updates in a row were not finite: stopped at step {run.step}; the last good "
                            f"checkpoint is {run.path if run.path.exists() else 'none yet'}")
        step, due = run.step, lambda every: every and run.step % every == 0
        means = run.flush() if due(cfg.log_every) or step == cfg.steps else None    # waits for the GPU
        seconds = time.perf_counter() - began
        run.elapsed, busy = run.elapsed + seconds, busy + seconds
        if means:
            rate, val = (step - since) * tokens / busy, {}
            if due(cfg.val_every) and step < cfg.steps:
                with run.averaged():
                    val = score(run.model, run.corpus, world, 128, micro)
            lr = cfg.lr * lr_factor(cfg, step - 1)
            parts = [f"step {step}/{cfg.steps}", f"loss {means['loss']:.3f}", val_text(val)]
            parts += [f"{k} {means[k]:.3f}" for k in getattr(run.model, "log_keys", ()) if k in means]
            parts += [f"lr {lr:.1e}", f"gnorm {means['gnorm']:.2f}", f"skipped {run.skipped}" if run.skipped else ""]
            parts += [f"{count(rate)} tok/s{mfu(rate * flops, world)}"]
            world.say("  ".join(filter(None, (*parts, f"eta {duration((cfg.steps - step) * tokens / rate)}"))))
            run.record("train", tokens=step * tokens, time=round(run.elapsed, 3), lr=lr, tok_s=round(rate), **means)
            if val:
                run.record("val", **val)
        elif world.live and step % 10 == 0:
            world.say(f"step {step}/{cfg.steps}  {1e3 * seconds:.0f} ms/step", end="")
        if means or step in (start + 1, start + 5):     # the rate leaves out compilation and the first five steps
            since, busy = step, 0.0
        if step == start + 1:
            gc.collect()
            gc.freeze()                     # the model's objects stay: the collector's rounds would stall ranks
        if due(cfg.sample_every) and step < cfg.steps:
            with run.averaged():
                run.show_samples(2, 150)
        if due(cfg.save_every) or step == cfg.steps or signum:
            run.save()
        if signum:
            world.say(f"{signal.Signals(signum).name}: saved at step {step}; the same command goes on from there")
            run.record("event", event="stop", signal=signum)
            return 128 + signum

def plot_curves(out, val_keys=()):
    """curves.png: training loss and validation against steps; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure, records = Figure(figsize=(7, 4), layout="constrained"), read_metrics(out)
    axes = figure.subplots()
    for kind, key in (("train", "loss"), ("val", "value"), *(("val", k) for k in val_keys)):
        points = [(r["step"], float(r[key])) for r in records if r["kind"] in (kind, "final") and key in r]
        if points:
            axes.plot(*zip(*points), label=f"{kind} {key}".removesuffix(" value"))
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(out / "curves.png", dpi=120)

def finish(run):
    """The end of a run: the bound beside the references, diagnostics, four samples, curves.png, the next command."""
    world = run.world
    with run.averaged() as model:
        val = score(model, run.corpus, world, 256, micro_batch(run.cfg, world))
        text = bound_text(val, run.corpus, model)
        world.say(f"done in {duration(run.elapsed)}, {count(run.step * run.cfg.batch * run.cfg.length)} tokens, "
                  f"peak {peak_memory(world):.1f} GB\n{text}")
        for line in model.diagnostics(run.corpus) if hasattr(model, "diagnostics") else ():
            world.say("  " + line)
        run.show_samples(4, 200)
    run.record("final", text=text, **val)
    if world.rank == 0:
        plot_curves(run.out, getattr(run.model, "val_keys", ()))
    world.say(f"next: python {run.name}.py sample --watch   python {run.name}.py eval   (run folder {run.out})")


# --- 10. sample, eval, bench -----------------------------------------------------------------------

def micro_batch(cfg, world):
    return max(1, cfg.batch // (world.size * cfg.accum))

def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

@torch.no_grad()
def score(model, corpus, world, rows, micro, seed=0, **options):
    """Bound over `rows` validation sequences, evenly spread (0 = all), rank-sharded, at the micro-batch shape.

    Returns dict(value, se, tokens, rows, <terms>): nats per counted token, standard error over sequences. A paper
    without `nll` gets the means of its `val_keys` instead. Draws depend on (seed, batch, rank): the same at every call.
    """
    total = corpus.n_rows("val")
    n = min(rows or total, total)
    index = np.linspace(0, total - 1, n).round().astype(np.int64)
    sums = 0
    for b in range(-(-n // (micro * world.size))):      # every rank runs as many batches: collectives stay in step
        at = (b * world.size + world.rank) * micro + np.arange(micro)
        batch = to_device(corpus.rows("val", index[at % n]), world.device)
        live, mask = torch.from_numpy(at < n).to(world.device).double(), batch.get("mask")
        reseed(seed, 2 ** 31, b, world.rank)
        if hasattr(model, "nll"):
            out = model.nll(batch["tokens"], mask, **options)
            tokens = torch.full_like(live, corpus.length) if mask is None else mask.sum(1)
        else:
            metrics = model.loss(batch | {"rows": Rows(seed, b, world.rank * micro, micro, micro * world.size)})[1]
            out, tokens = {k: metrics[k].expand(micro) for k in model.val_keys if k in metrics}, torch.ones_like(live)
        nll = out.get("nll", tokens)
        parts = [tokens, live, tokens * tokens, tokens * nll, nll * nll, *out.values()]
        sums = sums + torch.stack([(p.double() * live).sum() for p in parts])
    if world.size > 1:
        dist.all_reduce(sums)
    tokens, rows, tt, tn, nn_, *totals = sums.tolist()
    means = {k: v / tokens for k, v in zip(out, totals)}
    if "nll" not in means:
        return means | dict(rows=int(rows))
    value = means.pop("nll")
    variance = max(0.0, nn_ - 2 * value * tn + value ** 2 * tt)         # of the sum of nll_i - value * tokens_i
    return dict(value=value, se=variance ** 0.5 / tokens, tokens=int(tokens), rows=int(rows)) | means

@torch.no_grad()
def draw(model, corpus, n, steps, seed=0, micro=32, length=0, known=None, known_mask=None, watch=None, **options):
    """n samples as ids [n, L] on the CPU, at most `micro` at a time; the same seed gives the same text."""
    model.eval()
    length, parts = length or corpus.length, []
    if known is None and corpus.conditional:        # pairs: conditions are the first sources of the validation split
        known, known_mask = corpus.known(n, length, device=next(model.parameters()).device)
    for i in range(0, n, micro):
        reseed(seed, 2 ** 31 + 1, i)
        k, m = (x if x is None else x[i:i + micro] for x in (known, known_mask))
        ids = model.sample(min(micro, n - i), length, steps, known=k, known_mask=m, watch=watch, **options)
        parts.append(ids.cpu())
    return torch.cat(parts)

def show(corpus, ids, n_source=0):
    """Text of one sample on one line (source → target where the first n_source ids are a source)."""
    parts = [ids[:n_source], ids[n_source:]] if n_source else [ids]
    text = " → ".join(corpus.decode(part.tolist()) for part in parts).replace("\n", "⏎")
    return "".join(c if c.isprintable() else "·" for c in text)

def say_samples(world, out, step, corpus, ids, note="", width=None):
    """Print and keep samples [n, L]; those of a corpus of pairs answer its first validation sources, as in `draw`."""
    sources = [0] * len(ids)
    if corpus.conditional:
        sources = corpus.rows("val", np.arange(len(ids)) % corpus.n_rows("val"))["cond_len"].tolist()
    for i, (row, n_source) in enumerate(zip(ids, sources)):
        world.say(f"  sample {i + 1}| {show(corpus, row, n_source)[:width]}")
    save_samples(world, out, step, corpus, ids, note)

def save_samples(world, out, step, corpus, ids, note):
    if world.rank == 0:
        with open(out / "samples.txt", "a") as f:
            f.writelines(f"--- step {step} {note}\n{corpus.decode(row.tolist())}\n" for row in ids)

def val_text(val):
    if "value" in val:
        return f"val {val['value']:.3f}"
    return "  ".join(f"val_{k} {v:.3f}" for k, v in val.items() if k != "rows")

def bound_text(val, corpus, model, **options):
    """The bound in nats per token and bits per byte, its estimator by name, beside the corpus's references."""
    refs = corpus.references()
    tail = f"unigram {refs['unigram']:.3f}, bigram {refs['bigram']:.3f} nats/token"
    if "value" not in val:
        return f"{val_text(val)} (this paper has no likelihood bound) | {tail}"
    name = model.describe_nll(**options) if hasattr(model, "describe_nll") else "bound"
    bits, below = val["value"] / math.log(2) / corpus.bytes_per_token("val"), refs["unigram"] - val["value"]
    return (f"{name} {val['value']:.3f} ± {val['se']:.3f} nats/token, {bits:.2f} bits/byte, {val['rows']} sequences | "
            f"{tail} | {abs(below):.3f} {'below' if below > 0 else 'ABOVE'} unigram")

def load_run(Paper, Cfg, world, out=""):
    """(model with EMA weights, cfg, corpus, folder, step) of a run folder; without one, of the newest out/<paper>-*."""
    name = paper_name(Paper)
    if not out:
        runs = sorted(pathlib.Path("out").glob(f"{name}-*/ckpt.pt"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise UserError(f"no run of {name}.py under out/: train one (python {name}.py) or name it with --out=")
        out = runs[-1].parent
        world.say(f"run folder {out} (the newest; another with --out=)")
    out = pathlib.Path(out)
    file = newest_checkpoint(out)
    ckpt = load_checkpoint(file, name)
    cfg = dataclasses.replace(Cfg(**ckpt["config"]), init="", shard=False)
    corpus = load_corpus(Paper, cfg)
    model = build(Paper, cfg, world, ckpt["model"] | ckpt["ema"], file)
    compile_and_shard(model, cfg, world)
    return model.eval(), cfg, corpus, out, ckpt["step"]

def sample(Paper, Cfg, world, n, steps, length, prompt, infill, watch, seed, out, **own):
    """The `sample` verb: n texts, or with --watch the text while noise turns into words."""
    model, cfg, corpus, out, step = load_run(Paper, Cfg, world, out)
    refuse(not 0 <= length <= cfg.length, f"--length={length}: the model was trained at length {cfg.length}")
    length = length or cfg.length
    known, mask = corpus.known(n, length, prompt, infill, world.device)

    def show_step(k, tokens):
        lines = [show(corpus, row)[:110] for row in tokens[:4].cpu()]
        if not world.live:
            return world.say(f"step {k}/{steps}| {lines[0]}")
        up = f"\x1b[{len(lines) + 1}A" if k else ""
        print(f"{up}\x1b[Kstep {k}/{steps}\n" + "".join(f"\x1b[K  {t}\n" for t in lines), end="", flush=True)
        time.sleep(0.05)                    # slow enough to see

    began, watch = time.perf_counter(), show_step if watch else None
    ids = draw(model, corpus, n, steps, seed, micro_batch(cfg, world), length, known, mask, watch, **own)
    seconds = time.perf_counter() - began
    note = " ".join(f"{k}={v}" for k, v in dict(steps=steps, seed=seed, **own).items())
    say_samples(world, out, step, corpus, ids, note)
    world.say(f"{n} x {length} tokens, {steps} steps, {seconds:.1f} s: {n * length / seconds:,.0f} tok/s, "
              f"{1e3 * seconds / steps:.0f} ms/step; full text in {out / 'samples.txt'}")

def evaluate(Paper, Cfg, world, rows, n, steps, sets, gen_ppl, seed, out, **own):
    """The `eval` verb: bound on the split and on zero-shot sets, diagnostics, generation metrics; one JSON line."""
    model, cfg, corpus, out, step = load_run(Paper, Cfg, world, out)
    of_nll, of_sample = ({k: v for k, v in own.items() if k in keyword_options(f)}
                         for f in (getattr(Paper, "nll", None), Paper.sample))
    rows, micro = rows or (64 if of_nll.get("likelihood") == "ode" else 0), micro_batch(cfg, world)
    record, no_terms = dict(kind="eval", step=step, **own), {"value", "se", "rows", "tokens"}
    for name in (cfg.data, *filter(None, sets.split(","))):
        began = time.perf_counter()
        text = corpus if name == cfg.data else data.load(name, tokenizer=cfg.tokenizer, length=cfg.length)
        if text.tokenizer != corpus.tokenizer or text.vocab > cfg.vocab:
            raise UserError(f"--sets={name}: its tokenizer is {text.tokenizer} (V {text.vocab}), the model's "
                            f"{corpus.tokenizer} (V {cfg.vocab})")
        record[f"val/{name}"] = val = score(model, text, world, rows, micro, seed=seed, **of_nll)
        world.say(f"{name}: {bound_text(val, text, model, **of_nll)} | {time.perf_counter() - began:.0f} s\n  "
                  + "  ".join(f"{k} {v:.4f}" for k, v in val.items() if k not in no_terms))
    for line in model.diagnostics(corpus) if hasattr(model, "diagnostics") else ():
        world.say("  " + line)
    if n:
        n = min(n, corpus.n_rows("val")) if corpus.conditional else n
        ids = draw(model, corpus, n, steps, seed, micro, **of_sample)
        what, measure = ("pairs", corpus.pair_metrics) if corpus.conditional else ("samples", corpus.sample_metrics)
        record[what], lines = measure(ids)
        if gen_ppl and not corpus.conditional:
            texts = [corpus.decode(row.tolist()) for row in ids]
            record["gen_ppl"] = data.generative_perplexity(texts, gen_ppl, world.device)
            lines.append(f"generative perplexity under {gen_ppl}: {record['gen_ppl']:.2f} (read it with the entropy)")
            try:
                real = corpus.rows("val", np.arange(min(n, corpus.n_rows("val"))))["tokens"]
                record["mauve"] = data.mauve(texts, [corpus.decode(row.tolist()) for row in real], gen_ppl)
                lines.append(f"MAUVE against held-out text under {gen_ppl}: {record['mauve']:.3f}")
            except UserError as e:              # an optional package is missing
                lines.append(f"mauve: {e}")
        world.say(f"{n} samples, {steps} steps\n  " + "\n  ".join(lines))
        save_samples(world, out, step, corpus, ids, f"eval steps={steps}")
    if world.rank == 0:
        append_metrics(out, **record)

def bench(Paper, Cfg, presets, overrides, world, iters, sample_n, sample_steps):
    """The `bench` verb: step time, tokens/s, MFU and peak memory of training and sampling on random tokens."""
    cfg, on_gpu = make_config(Cfg, presets, overrides.get("preset", "tiny"), overrides), world.device.type == "cuda"
    cfg.vocab = cfg.vocab or data.load(cfg.data, tokenizer=cfg.tokenizer, length=cfg.length).vocab
    cfg.unigram_entropy = cfg.unigram_entropy or math.log(cfg.vocab)
    run, n = Run(Paper, cfg, world, None, pathlib.Path(os.devnull)), micro_batch(cfg, world)
    tokens = torch.randint(cfg.vocab, (n, cfg.length), device=world.device)
    batches = itertools.repeat(dict(tokens=tokens, rows=Rows(0, 0, world.rank * n, n, n * world.size)))
    world.say(f"{run.name} preset {cfg.preset}: batch {cfg.batch} x {cfg.length}, D {cfg.d_model}, "
              f"{cfg.n_layer} blocks, V {cfg.vocab}, {count(sum(p.numel() for p in run.params))} parameters, "
              f"torch {torch.__version__}")

    def timed(f, repeat=1):
        began = time.perf_counter()
        for _ in range(repeat):
            f()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / repeat

    # three steps to warm up; on a GPU groups of five between synchronisations
    times = [timed(lambda: run.train_step(batches), 5 if on_gpu else 1) for _ in range(3 + iters)][3:]
    median, flops = float(np.median(times)), flops_per_token(run.model, cfg)
    rate = cfg.batch * cfg.length / median
    world.say(f"train   {1e3 * median:.1f} ms/step (min {1e3 * min(times):.1f})  {count(rate)} tok/s  "
              f"{flops / 1e6:.1f} MFLOP/token  {rate * flops / 1e12:.3f} TFLOP/s{mfu(rate * flops, world)}  "
              f"peak {peak_memory(world):.2f} GB")
    run.model.eval()
    with torch.no_grad():                   # the first of the two runs compiles
        seconds = [timed(lambda: run.model.sample(sample_n, cfg.length, sample_steps)) for _ in range(2)][1]
    drawn = sample_n * cfg.length
    world.say(f"sample  {1e3 * seconds / sample_steps:.1f} ms/step  {count(drawn / seconds)} tok/s at {sample_n} x "
              f"{cfg.length}, {sample_steps} steps  {1e3 * seconds / drawn:.2f} s per 1,000 tokens  "
              f"peak {peak_memory(world):.2f} GB")

def main(Paper, Cfg, presets, argv=None):
    """Entry point of every paper file. Exit codes: 2 user error, 3 non-finite, 128 + signal, 1 a lost rank."""
    from torch.distributed.elastic.multiprocessing.errors import record
    code = record(run_verb)(Paper, Cfg, presets, sys.argv[1:] if argv is None else argv)
    if code:
        sys.exit(code)

def run_verb(Paper, Cfg, presets, argv):
    """Run one command line; every foreseeable failure is one line on stderr and an exit code."""
    try:
        verb, overrides, options = parse(argv, Paper, Cfg, presets)
        world = start_world()
        if verb in ("sample", "eval"):
            return (sample if verb == "sample" else evaluate)(Paper, Cfg, world, **options)
        return (train if verb == "train" else bench)(Paper, Cfg, presets, overrides, world, **options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:                 # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, NonFinite, RuntimeError, OSError) as e:
        text, code = str(e), 3 if isinstance(e, NonFinite) else 2
        if isinstance(e, RuntimeError):
            if not (dist.is_initialized() and re.search("onnection|NCCL|imed out|Broken pipe|closed by peer", text)):
                raise
            text, code = f"lost another rank ({text.splitlines()[0]}); the same command goes on from the last save", 1
        rank = int(os.environ.get("RANK", 0))
        print(f"[rank {rank}] " * (rank > 0) + f"{paper_name(Paper)}: {text}", file=sys.stderr, flush=True)
        return code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
