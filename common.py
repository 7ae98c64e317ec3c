"""What the five papers share and nothing any one of them owns: the DiT backbone, the two vocabulary-sized heads, draws that are
functions of the global batch, Muon, and the training loop with its checkpoints, command line, evaluation and benchmark.

    1 configuration   2 attention, blocks, DiT   3 vocabulary heads   4 global-batch draws   5 optimisers
    6 command line    7 ranks, seeds, files      8 checkpoints        9 training loop       10 sample, eval, bench

A paper file subclasses `Config`, defines one nn.Module with `loss`, `sample` and (where the paper has one) `nll`, and ends with
`common.main(Paper, Config, PRESETS)`. None of the mathematics of a paper is in this file; no file handling is in a paper's.
"""
import ast
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import io
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import struct
import sys
import threading
import time
import typing
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
from data import UserError

# --- 1. configuration ------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """Keys that all papers have. `--key=value` overrides a preset, a preset overrides these defaults."""
    preset: str = "tiny"            # name of the preset in force
    data: str = "prose"             # corpus: prose, grammar, a prepared corpus, a text file or a folder of text
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

    SDPA where it can serve. `explicit` writes the scores out: SDPA's kernels have no forward-mode derivative, so
    torch.func.jvp needs this path. A soft-cap is FlexAttention on CUDA (fused once compiled) and explicit elsewhere.
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


class LayerNorm(nn.Module):
    """Layer norm over D with a weight and no bias, eps 1e-5; autocast runs it in float32."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class TimestepEmbedder(nn.Module):
    """MLP(sinusoid(t)): [B] -> [B, C]. The time enters raw, without the factor 1000 of image models."""

    def __init__(self, cond_dim, features=256):
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, t):
        return self.mlp(sinusoid(t, self.features).to(self.mlp[0].weight.dtype))


class Block(nn.Module):
    """adaLN-zero transformer block: h += gate * dropout(branch(norm(h) * (1 + scale) + shift)), twice."""
    compile_me = True               # compiled in place, one graph for all blocks of a model

    def __init__(self, d_model, n_head, cond_dim, mlp_ratio=4, dropout=0.0, softcap=0.0, causal=False, gate_init=0.0):
        super().__init__()
        self.n_head, self.dropout, self.softcap, self.causal = n_head, dropout, softcap, causal
        self.norm1 = LayerNorm(d_model)
        self.attn_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.attn_out = nn.Linear(d_model, d_model, bias=False)
        self.norm2 = LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, mlp_ratio * d_model), nn.GELU(approximate="tanh"),
                                 nn.Linear(mlp_ratio * d_model, d_model))
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * d_model)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)
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


class VocabEmbed(nn.Module):
    """Holds the [V, D] table under its published name, vocab_embed.embedding; init U(-1/sqrt(D), 1/sqrt(D))."""

    def __init__(self, vocab, dim):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab, dim))
        nn.init.uniform_(self.embedding, -dim ** -0.5, dim ** -0.5)


class OutputLayer(nn.Module):
    """Final norm with its modulation; `linear` (zero at the start) is applied by the caller's vocabulary head."""

    def __init__(self, d_model, cond_dim, out):
        super().__init__()
        self.norm_final = LayerNorm(d_model)
        if out:
            self.linear = nn.Linear(d_model, out)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * d_model)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.norm_final(h) * (1 + scale) + shift


class DiT(nn.Module):
    """The MDLM / Duo / LangFlow / FLM backbone between embeddings and vocabulary head, with their parameter names.

    forward(h [B, L, D], c [B, C]) -> u [B, L, D] after the final modulation; `cond(*times)` makes c. The projection to the
    vocabulary is left to the heads of section 3, so that nothing of size [B, L, V] is ever built here. Optional parts,
    in the published order: `vocab` > 0 adds vocab_embed [V, D], `n_times` = 2 a second time embedder (FLM's flow map),
    `out` > 0 output_layer.linear [out, D], `self_cond` the [D, 2D] self-conditioning projection.
    """

    def __init__(self, d_model, n_layer, n_head, cond_dim=128, mlp_ratio=4, dropout=0.0, length=1024, vocab=0, out=0,
                 n_times=1, self_cond=False, softcap=0.0, causal=False, gate_init=0.0):
        super().__init__()
        if d_model % (2 * n_head):
            raise UserError(f"d_model={d_model} is not a multiple of 2 * n_head={2 * n_head}: change --d_model or --n_head")
        self.d_model, self.n_layer, self.amp = d_model, n_layer, False
        if vocab:
            self.vocab_embed = VocabEmbed(vocab, d_model)
        self.sigma_map = TimestepEmbedder(cond_dim)
        if n_times == 2:
            self.sigma_map_prime = TimestepEmbedder(cond_dim)
        for name, table in zip(("cos", "sin"), rope_tables(length, d_model // n_head)):
            self.register_buffer(name, table, persistent=False)
        self.blocks = nn.ModuleList(Block(d_model, n_head, cond_dim, mlp_ratio, dropout, softcap, causal, gate_init)
                                    for _ in range(n_layer))
        self.output_layer = OutputLayer(d_model, cond_dim, out)
        if self_cond:
            self.self_cond_proj = nn.Linear(2 * d_model, d_model, bias=False)
            nn.init.zeros_(self.self_cond_proj.weight)

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
    """Forward FLOP per token of the blocks (2 per multiply-add): QKVO + MLP, then the bidirectional attention products."""
    return 2 * (4 + 2 * mlp_ratio) * d_model ** 2 * n_layer + 4 * length * d_model * n_layer


# --- 3. vocabulary heads ---------------------------------------------------------------------------
# With V = 50,257 one float32 [B, L, V] tensor of a 64 x 1,024 batch is 13 GB, and the plain expressions keep four alive.
# Both heads walk over chunks of rows instead and keep only what is [N, D] or [V, D]: `token_ce` takes the gradient in the
# forward pass (its incoming gradient is one scalar), `expected_embedding` rebuilds the chunk's softmax from (u, lse).

CHUNK_ELEMENTS = {"cpu": 2 ** 24, "cuda": 2 ** 28}     # rows * V of a chunk; GPU GEMMs lose speed below about 2,048 rows


def _logits(u, W, b, skip, E, cap):
    """Capped float32 (float64) logits [n, V] of a chunk and d capped / d raw (None without a cap)."""
    z = F.linear(u, W.to(u.dtype)).to(b.dtype) + b
    if skip is not None:                    # the Gaussian bias is large and exact: never rounded to bf16
        z = torch.addmm(z, skip.to(b.dtype), E.to(b.dtype).T)
    if not cap:
        return z, None
    z = cap * torch.tanh(z / cap)
    return z, 1 - (z / cap) ** 2


def _ce_chunk(u, W, b, skip, E, cap, targets, weight):
    """nll [n] and d(sum weight * nll) / d raw logits [n, V]."""
    z, slope = _logits(u, W, b, skip, E, cap)
    lse = z.logsumexp(dim=-1)
    nll = lse - z.gather(1, targets[:, None])[:, 0]
    dz = (z - lse[:, None]).exp() * weight[:, None]
    dz = dz.scatter_add(1, targets[:, None], -weight[:, None])
    return nll, dz if slope is None else dz * slope


def _embed_chunk(u, W, b, values, skip, E, cap, targets):
    """x_hat [n, De], nll [n] and logsumexp [n]."""
    z, _ = _logits(u, W, b, skip, E, cap)
    lse = z.logsumexp(dim=-1)
    nll = lse - z.gather(1, targets[:, None])[:, 0]
    return (z - lse[:, None]).exp() @ values, nll, lse


def _embed_grad_chunk(u, W, b, values, skip, E, cap, targets, lse, x_hat, g, g_nll):
    """Probabilities [n, V] and d loss / d raw logits [n, V] from g = dL/dx_hat and g_nll = dL/dnll.

    dz = p * (g values^T - g . x_hat + g_nll) - g_nll onehot: the row term g . x_hat saves a second pass over V.
    """
    z, slope = _logits(u, W, b, skip, E, cap)
    p = (z - lse[:, None]).exp()
    dz = p * (g @ values.T + (g_nll - (g * x_hat).sum(-1))[:, None])
    dz = dz.scatter_add(1, targets[:, None], -g_nll[:, None])
    return p, dz if slope is None else dz * slope


def compile_heads():
    """Compile the chunk bodies (exp, subtract and scale fuse); the loops over chunks stay outside."""
    for f in (_ce_chunk, _embed_chunk, _embed_grad_chunk):
        globals()[f.__name__] = torch.compile(f, dynamic=False)


def _chunks(n, V, device, chunk):
    size = chunk or max(64, CHUNK_ELEMENTS.get(device.type, 2 ** 24) // V)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


class _HeadGrads:
    """Accumulates the gradients of (u, W, b, skip, E) over chunks of d logits, in the dtype of the parameters."""

    def __init__(self, needs, u, W, b, skip, E):
        self.u, self.W, self.skip, self.E = u, W, skip, E
        self.du = torch.empty_like(u) if needs[0] else None
        self.dW, self.db, self.dE = (torch.zeros_like(x) if need else None
                                     for x, need in zip((W, b, E), (needs[1], needs[2], needs[4])))
        self.dskip = torch.empty_like(skip) if needs[3] else None

    def add(self, s, dz):
        low = dz.to(self.u.dtype)
        if self.du is not None:
            self.du[s] = low @ self.W.to(low.dtype)
        if self.dW is not None:
            self.dW += (low.T @ self.u[s]).to(self.dW.dtype)
        if self.db is not None:
            self.db += dz.sum(0)
        if self.dskip is not None:
            self.dskip[s] = (dz @ self.E.to(dz.dtype)).to(self.dskip.dtype)
        if self.dE is not None:
            self.dE += (dz.T @ self.skip[s].to(dz.dtype)).to(self.dE.dtype)

    def all(self):
        return self.du, self.dW, self.db, self.dskip, self.dE


class _TokenCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, W, b, skip, E, targets, weight, cap, chunk):
        grads = _HeadGrads(ctx.needs_input_grad[:5], u, W, b, skip, E)
        nll = torch.empty(u.shape[0], device=u.device, dtype=b.dtype)
        for s in _chunks(u.shape[0], W.shape[0], u.device, chunk):
            nll[s], dz = _ce_chunk(u[s], W, b, None if skip is None else skip[s], E, cap, targets[s], weight[s])
            if any(ctx.needs_input_grad):
                grads.add(s, dz)
            del dz                      # free this chunk before the next one is built
        ctx.grads = grads.all()
        ctx.mark_non_differentiable(nll)
        return (weight * nll).sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        if ctx.grads is None:
            raise RuntimeError("token_ce scales its stored gradients in place: backward can run only once")
        out, ctx.grads = ctx.grads, None
        return (*[None if x is None else x.mul_(g) for x in out], None, None, None, None)


def token_ce(u, W, b, targets, weight, skip=None, E=None, cap=0.0, chunk=0):
    """Cross-entropy of logits = u W^T + b + skip E^T, weighted by row, without a [N, V] tensor alive beyond a chunk.

    u [..., D], W [V, D], b [V], targets [...] int64, weight [...] (known before the head), skip [..., De] and E [V, De]
    optional; cap > 0 squashes the logits to cap tanh(logits / cap). Returns (sum of weight * nll, nll [...] detached) in nats.
    The gradients are computed in the forward pass and only scaled in the backward pass, which can run once.
    """
    flat = [x.reshape(-1, x.shape[-1]) if x is not None else None for x in (u, skip)]
    weight = weight.detach().expand(targets.shape).reshape(-1).to(b.dtype)
    loss, nll = _TokenCE.apply(flat[0], W, b, flat[1], E, targets.reshape(-1), weight, cap, chunk)
    return loss, nll.view(targets.shape)


class _ExpectedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, W, b, skip, E, values, targets, cap, chunk):
        n = u.shape[0]
        x_hat = torch.empty(n, values.shape[1], device=u.device, dtype=values.dtype)
        nll, lse = (torch.empty(n, device=u.device, dtype=b.dtype) for _ in range(2))
        for s in _chunks(n, W.shape[0], u.device, chunk):
            x_hat[s], nll[s], lse[s] = _embed_chunk(u[s], W, b, values, None if skip is None else skip[s], E, cap,
                                                    targets[s])
        ctx.save_for_backward(u, W, b, skip, E, values, targets, lse, x_hat)
        ctx.options = cap, chunk
        return x_hat, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_nll):
        u, W, b, skip, E, values, targets, lse, x_hat = ctx.saved_tensors
        cap, chunk = ctx.options
        grads = _HeadGrads(ctx.needs_input_grad[:5], u, W, b, skip, E)
        dvalues = torch.zeros_like(values) if ctx.needs_input_grad[5] else None
        for s in _chunks(u.shape[0], W.shape[0], u.device, chunk):
            p, dz = _embed_grad_chunk(u[s], W, b, values, None if skip is None else skip[s], E, cap, targets[s],
                                      lse[s], x_hat[s], g[s], g_nll[s])
            grads.add(s, dz)
            if dvalues is not None:
                dvalues += p.T @ g[s]
            del p, dz
        return (*grads.all(), dvalues, None, None, None)


def expected_embedding(u, W, b, values, skip=None, E=None, targets=None, cap=0.0, chunk=0):
    """Posterior mean x_hat = softmax(u W^T + b + skip E^T) @ values, and the nll of `targets` from the same pass.

    Shapes as in `token_ce`; values [V, De] (may be E itself). Returns (x_hat [..., De], nll [...] in nats or None without
    targets), both differentiable in u, W, b, skip, E and values: the backward pass rebuilds each chunk's softmax.
    """
    flat = [x.reshape(-1, x.shape[-1]) if x is not None else None for x in (u, skip)]
    ids = torch.zeros(u.shape[:-1], dtype=torch.int64, device=u.device) if targets is None else targets
    x_hat, nll = _ExpectedEmbedding.apply(flat[0], W, b, flat[1], E, values, ids.reshape(-1), cap, chunk)
    return x_hat.view(*u.shape[:-1], -1), None if targets is None else nll.view(targets.shape)


@torch.no_grad()
def greedy(u, W, b, skip=None, E=None, cap=0.0, chunk=0):
    """argmax over V of the same logits: ids [...] for u [..., D]."""
    flat = [x.reshape(-1, x.shape[-1]) if x is not None else None for x in (u, skip)]
    ids = [_logits(flat[0][s], W, b, None if skip is None else flat[1][s], E, cap)[0].argmax(-1)
           for s in _chunks(flat[0].shape[0], W.shape[0], u.device, chunk)]
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
        """The local slice of a numpy array over the global batch, as a tensor."""
        return torch.from_numpy(np.ascontiguousarray(values[self.first:self.first + self.n_local])).to(device)

    def uniform(self, salt=0, device=None):
        """float64 [n_local] in (0, 1): one draw in each of n_global equal strata, permuted."""
        rng = self.rng(1, salt)
        return self.local((rng.permutation(self.n_global) + rng.random(self.n_global)) / self.n_global, device)

    def subset(self, every=4, salt=0, device=None):
        """bool [n_local]: exactly one row, drawn at random, in each consecutive group of `every` global rows."""
        groups = -(-self.n_global // every)
        mask = np.zeros(groups * every, dtype=bool)
        mask[np.arange(groups) * every + self.rng(2, salt).integers(0, every, groups)] = True
        return self.local(mask[:self.n_global], device)

    def roles(self, shares, salt=0, device=None):
        """int64 [n_local]: role of each row; global counts are shares * n_global, stochastically rounded, permuted."""
        rng = self.rng(3, salt)
        edges = np.floor(np.cumsum(shares) / np.sum(shares) * self.n_global + rng.random()).astype(int)
        edges[-1] = self.n_global
        roles = np.searchsorted(edges, np.arange(self.n_global), side="right")
        return self.local(rng.permutation(roles), device)


def take(mask, capacity):
    """The rows where mask [n] holds, at a fixed count: (index [capacity], weight [capacity] of 1 or 0 for fillers)."""
    index = torch.argsort(~mask, stable=True)[:capacity]
    return index, mask[index].to(torch.get_default_dtype())


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
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.bias_correction, self.ns_dtype, self.eps, self.found_inf = bias_correction, ns_dtype, eps, None
        self.transposed = {id(p) for p in transposed}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, beta, shapes = group["lr"], group["momentum"], {}
            for p in group["params"]:
                shapes.setdefault((p.shape, id(p) in self.transposed, p.device, p.dtype), []).append(p)
            for (shape, transposed, device, dtype), params in shapes.items():
                ok = torch.ones((), device=device, dtype=dtype)
                if self.found_inf is not None:
                    ok = 1 - self.found_inf.to(device, dtype)
                for p in params:
                    if not self.state[p]:
                        self.state[p] = dict(step=torch.zeros((), device=device), m=torch.zeros_like(p))
                    self.state[p]["step"] += ok.to(torch.float32)
                g = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
                m = torch.stack([self.state[p]["m"] for p in params])
                m = torch.where(ok > 0, m.lerp(g, 1 - beta), m)
                k = self.state[params[0]]["step"].to(dtype)
                mc, gc = ((1 - beta ** (k + 1), 1 - beta ** k) if self.bias_correction else (1, 1))
                update = newton_schulz(beta * m / mc + (1 - beta) * g / gc, self.ns_dtype, self.eps).to(dtype)
                rows, cols = (shape[1], shape[0]) if transposed else shape
                update = torch.where(ok > 0, update * (lr * max(1.0, rows / cols) ** 0.5), 0)
                for p, u, mom in zip(params, update, m):
                    self.state[p]["m"].copy_(mom)
                    p.mul_(1 - lr * group["weight_decay"] * ok).sub_(u)
