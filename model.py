"""One Transformer: every layer from scratch, everybody's checkpoints, fast generation.

    python model.py generate --model out --prompt "Once upon a time"
    python model.py chat --model Qwen3-0.6B
    python model.py account --model gpt2-xl
    python model.py bench

A model is a directory of config.json, model.safetensors and tokenizer.json in the Hugging Face
layout. Shapes: B batch, T time, S time of the keys, D d_model, H heads, K key/value heads,
E d_head, V vocabulary, F d_ff.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import nn

# ---- configuration -----------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """Everything that shapes the model. Sizes left None follow d_model."""

    vocab_size: int = 32768
    context_length: int = 1024
    d_model: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int | None = None  # fewer than num_heads: grouped-query attention
    d_head: int | None = None
    d_ff: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3" | "yarn" | "linear", "factor": ...}
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qk_norm: Literal[True, False, "full"] = True  # each head alone (Qwen3) | all together (OLMo-2)
    qkv_bias: bool = False  # Qwen2
    bias: bool = False  # on every Linear and LayerNorm: GPT-2
    ffn: Literal["swiglu", "silu", "gelu", "relu2"] = "swiglu"
    norm: Literal["pre", "post", "output", "none"] = "pre"  # see Block; output is OLMo-2
    norm_type: Literal["rms", "layer"] = "rms"
    position: Literal["rope", "learned", "none"] = "rope"
    attention: Literal["sdpa", "flash", "naive"] = "sdpa"  # torch's kernel | kernels.py | the page
    sliding_window: int | None = None  # keys a query sees, itself included (Mistral)
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0  # cap * tanh(logits / cap), Gemma-2
    zero_init: bool = False  # every block starts as the identity (muP, modded-nanogpt)
    value_embeddings: int = 0  # tables, each mixed into the values of layers i and -1-i
    residual_scalars: bool = False  # each block reads a * x + b * embedding, a and b learned
    num_experts: int = 0  # of d_ff each, in place of the one feed-forward network
    experts_per_token: int = 2
    num_shared_experts: int = 0  # experts every token passes (DeepSeekMoE)
    normalize_router: bool = True  # the chosen experts' weights add up to 1
    balance: Literal["loss", "bias"] = "loss"  # see MoE
    balance_loss: float = 0.01  # weight of the auxiliary loss
    kv_rank: int = 0  # multi-head latent attention: width of the latent that is cached
    d_rope: int = 32  # multi-head latent attention: dimensions a head shares that carry position
    eos_token_id: int | list | None = None  # ends generation; travels with the checkpoint

    def __post_init__(self):
        for f in fields(self):
            value, allowed = getattr(self, f.name), get_args(f.type)
            if get_origin(f.type) is Literal and value not in allowed:
                raise ValueError(f"{f.name}={value!r} is not one of {allowed}")
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.d_head = self.d_head or self.d_model // self.num_heads
        if self.d_ff is None:  # SwiGLU has three matrices where the others have two
            third = -(-self.d_model * 8 // 3 // 64) * 64
            self.d_ff = third if self.ffn == "swiglu" else 4 * self.d_model
        for wrong, message in (
                (self.num_heads % self.num_kv_heads, "num_heads is no multiple of num_kv_heads"),
                (self.value_embeddings * 2 > self.num_layers, "value_embeddings: too few layers"),
                (self.kv_rank and (self.qk_norm or self.value_embeddings),
                 "kv_rank (latent attention) goes without qk_norm, value_embeddings"),
                (self.num_experts and self.ffn != "swiglu", "num_experts needs ffn='swiglu'")):
            if wrong:
                raise ValueError(message)


# ---- layers ------------------------------------------------------------------------------------


def softmax(x, dim=-1):
    """exp(x) / sum(exp(x)) along `dim`; the maximum is subtracted so that 1e4 does not overflow."""
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


def silu(x):
    """x * sigmoid(x)."""
    return x * torch.sigmoid(x)


def wide(x):
    """The dtype to add up x in: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def compute_dtype(x):
    """The dtype matrix products of x have here: autocast's if it is on."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def truncated_normal(std, *shape, **kind):
    """A Parameter drawn from N(0, std^2), cut at three standard deviations; kind: device, dtype."""
    weight = torch.empty(shape, **kind)
    return nn.Parameter(nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std))


class Linear(nn.Module):
    """y = x W^T (+ b), W (d_out, d_in) of variance 2 / (d_in + d_out) (Glorot & Bengio 2010)."""

    def __init__(self, d_in, d_out, bias=False, device=None, dtype=None):
        super().__init__()
        kind, std = {"device": device, "dtype": dtype}, math.sqrt(2 / (d_in + d_out))
        self.weight = truncated_normal(std, d_out, d_in, **kind)
        self.bias = nn.Parameter(torch.zeros(d_out, **kind)) if bias else None

    def forward(self, x):
        return project(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Row `id` of a (vocab_size, d_model) table."""

    def __init__(self, vocab_size, d_model, std=1.0, device=None, dtype=None):
        super().__init__()
        self.weight = truncated_normal(std, vocab_size, d_model, device=device, dtype=dtype)

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 whatever x is (Zhang & Sennrich 2019)."""

    def __init__(self, d_model, eps=1e-6, device=None, dtype=None, attention="sdpa"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))
        self.eps, self.attention = eps, attention

    def forward(self, x):
        dtype = compute_dtype(x)
        if kernels := kernels_for(x, self.attention):
            return kernels.rms_norm(x, self.weight, self.eps).to(dtype)
        if torch.is_grad_enabled():
            return ScaleByRMS.apply(x, self.weight, self.eps, dtype)  # this and its gradient
        x = x.to(wide(x))
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)  # (..., 1)
        return (x * scale * self.weight).to(dtype)


class LayerNorm(RMSNorm):
    """(x - mean) / sqrt(var + eps) * weight (+ bias), in fp32 (Ba et al. 2016)."""

    def __init__(self, d_model, eps=1e-5, bias=True):
        super().__init__(d_model, eps)
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)


def make_norm(config):
    if config.norm == "none":
        return nn.Identity()
    if config.norm_type == "rms":
        return RMSNorm(config.d_model, config.norm_eps, attention=config.attention)
    return LayerNorm(config.d_model, config.norm_eps, config.bias)


def rope_frequencies(d_head, theta, scaling=None):
    """Radians a position of each pair (E/2,), and the factor on cos and sin.

    Scaling stretches a trained context. "linear" divides every frequency by the factor, "llama3"
    only those that turn less than once or so in the original context, "yarn" (Peng et al. 2023)
    blends between by the turns made, and sharpens attention by the factor it returns.
    """
    base = 1.0 / theta ** (torch.arange(0, d_head, 2, dtype=torch.float32, device="cpu") / d_head)
    s, sharpen = scaling or {}, 1.0
    kind, factor = s.get("rope_type", s.get("type", "default")), s.get("factor", 1.0)
    if kind in ("default", "linear"):
        return base / factor, sharpen
    if kind == "llama3":
        turns = s["original_max_position_embeddings"] * base / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":  # the pairs that turn 32 times, and once, in the original context
        ends = [d_head * math.log(s["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (
            2 * math.log(theta)) for turns in (s.get("beta_fast") or 32, s.get("beta_slow") or 1)]
        low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), d_head - 1)
        pair = torch.arange(d_head // 2, device="cpu")
        keep = 1 - ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        sharpen = s.get("attention_factor") or 0.1 * math.log(factor) + 1
    else:
        raise ValueError(f"rope_type {kind!r} is not one of default, linear, llama3, yarn")
    return base * (keep + (1 - keep) / factor), sharpen


def rotate(x, cos, sin):
    """Turn pair i of x (..., E) = dimensions (i, i + E/2), as Llama does, by its angle.

    x1 cos - x2 sin and x2 cos + x1 sin: cos twice and (-sin, sin) beside each other, as `tables`
    makes them, leave three operations.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021): pair i turns by position * theta^(-2i/E)."""

    def __init__(self, d_head, theta=10000.0, max_len=None, interleaved=False, scaling=None):
        super().__init__()
        self.max_len, self.interleaved = max_len, interleaved
        # A plain attribute, not a buffer: casting the model to bf16 must not round frequencies.
        self.frequencies, self.factor = rope_frequencies(d_head, theta, scaling)

    def tables(self, positions, dtype=torch.float32):
        """What `rotate` takes: positions (..., T) -> two of (..., T, 1, E)."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None, None] * self.frequencies  # (..., T, 1, E/2)
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)

    def forward(self, x, positions):
        """x (..., T, E), positions (T,) or (..., T) -> x turned, same shape and dtype."""
        cos, sin = (t.squeeze(-2) for t in self.tables(positions, x.dtype))
        if not self.interleaved:
            return rotate(x, cos, sin)
        x = torch.cat((x[..., 0::2], x[..., 1::2]), -1)  # RoFormer and GPT-J pair neighbours
        return rotate(x, cos, sin).unflatten(-1, (2, -1)).mT.flatten(-2)


def scaled_dot_product_attention(q, k, v, mask=None, softcap=0.0):
    """softmax(q k^T / sqrt(E)) v; q (..., T, E), k and v (..., S, E); mask (T, S) True = attend."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, S)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return softmax(scores.to(wide(scores))).to(v.dtype) @ v


def visible(queries, keys, window=None):
    """Which keys a query sees, by position: (B, T), (S,) -> (B, 1, T, S), True = attend."""
    gap = (queries[..., None] - keys)[:, None]
    return (gap >= 0) & (gap < window) if window else gap >= 0


def cross_entropy(logits, targets, reduction="mean", ignore_index=-100, z_loss=0.0):
    """-log softmax(logits)[target] in fp32; logits (..., V), targets (...) int64.

    z_loss adds z_loss * logsumexp^2, which keeps the logits from drifting (PaLM, section 5).
    """
    logits, ignored = logits.to(wide(logits)), targets == ignore_index
    lse = torch.logsumexp(logits, -1)
    picked = logits.gather(-1, targets.masked_fill(ignored, 0)[..., None]).squeeze(-1)
    loss = (lse - picked + z_loss * lse.square()).masked_fill(ignored, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / (~ignored).sum() if reduction == "mean" else loss.sum()


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (Shazeer 2020)."""

    def __init__(self, d_model, d_ff, bias=False):
        super().__init__()
        self.w1, self.w3 = Linear(d_model, d_ff, bias), Linear(d_model, d_ff, bias)
        self.w2 = Linear(d_ff, d_model, bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MLP(nn.Module):
    """w2(f(w1 x)) with f SiLU, GELU (the tanh form of GPT-2) or ReLU^2 (So et al. 2021)."""

    def __init__(self, d_model, d_ff, kind="gelu", bias=False):
        super().__init__()
        self.w1, self.w2 = Linear(d_model, d_ff, bias), Linear(d_ff, d_model, bias)
        self.kind = kind

    def forward(self, x):
        h = self.w1(x)
        if self.kind == "relu2":
            return self.w2(F.relu(h).square())
        return self.w2(F.silu(h) if self.kind == "silu" else F.gelu(h, approximate="tanh"))


# ---- the model ---------------------------------------------------------------------------------


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with the switches of ModelConfig."""

    def __init__(self, config, layer=0):
        super().__init__()
        D, H, K, E = config.d_model, config.num_heads, config.num_kv_heads, config.d_head
        self.config, self.layer = config, layer
        bias = config.bias or config.qkv_bias
        self.q = Linear(D, H * E, bias)
        self.k = Linear(D, K * E, bias)
        self.v = Linear(D, K * E, bias)
        self.o = Linear(H * E, D, config.bias)
        if config.qk_norm:
            heads = (H, K) if config.qk_norm == "full" else (1, 1)
            self.q_norm, self.k_norm = (
                RMSNorm(n * E, config.norm_eps, attention=config.attention) for n in heads)
        if min(layer, config.num_layers - 1 - layer) < config.value_embeddings:
            self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5]))

    def forward(self, x, rope=None, mask=None, cache=None, values=None):
        B, T, _ = x.shape
        E, qk_norm = self.config.d_head, self.config.qk_norm
        q, k, v = self.q(x), self.k(x), self.v(x)  # (B, T, H E), twice (B, T, K E)
        if qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(B, T, -1, E) for t in (q, k, v))  # (B, T, H or K, E)
        if qk_norm is True:
            q, k = self.q_norm(q), self.k_norm(k)
        if values is not None:  # (B, T, K E) of the token itself, whatever the context made of it
            v = self.value_mix[0] * v + self.value_mix[1] * values.view_as(v)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, S, K, E)
        y = attend(q, k, v, mask, self.config)
        return self.o(y.reshape(B, T, -1))  # (B, T, H, E) -> (B, T, H E) -> (B, T, D)


class Block(nn.Module):
    """Attention, then the feed-forward network, each added to the residual stream x."""

    def __init__(self, config, layer=0):
        super().__init__()
        c, self.norm = config, config.norm
        self.attn_norm, self.ffn_norm = make_norm(c), make_norm(c)
        self.attn = LatentAttention(c, layer) if c.kv_rank else Attention(c, layer)
        if c.num_experts:
            self.ffn = MoE(c)
        elif c.ffn == "swiglu":
            self.ffn = SwiGLU(c.d_model, c.d_ff, c.bias)
        else:
            self.ffn = MLP(c.d_model, c.d_ff, c.ffn, c.bias)
        if c.residual_scalars:
            self.residual = nn.Parameter(torch.tensor([1.0, 0.0]))
        for name, p in self.named_parameters() if c.zero_init else ():
            if name.endswith(("attn.o.weight", "w2.weight")):
                nn.init.zeros_(p)

    def forward(self, x, x0=None, **context):
        if x0 is not None:
            x = self.residual[0] * x + self.residual[1] * x0
        if self.norm == "post":
            x = self.attn_norm(x + self.attn(x, **context))
            return self.ffn_norm(x + self.ffn(x))
        if self.norm == "output":
            x = x + self.attn_norm(self.attn(x, **context))
            return x + self.ffn_norm(self.ffn(x))
        x = x + self.attn(self.attn_norm(x), **context)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """Embedding, blocks, norm, head: ids (B, T) int64 -> logits (B, T, V).

    Its other methods (stream, generate, save_pretrained, from_pretrained, num_parameters,
    flops_per_token) are functions further down, given to the class there: this fits on a page.
    """

    def __init__(self, config):
        super().__init__()
        self.config, V, D = config, config.vocab_size, config.d_model
        # A tied table is also the head: std 1 would make the first logits sqrt(D) wide.
        self.embed = Embedding(V, D, std=D**-0.5 if config.tie_embeddings else 1.0)
        if config.position == "learned":
            self.pos = Embedding(config.context_length, D, std=0.02)
        if config.position == "rope":
            self.rope = RotaryEmbedding(config.d_rope if config.kv_rank else config.d_head,
                                        config.rope_theta, config.context_length,
                                        scaling=config.rope_scaling)
        self.value_tables = nn.ModuleList(
            Embedding(V, config.num_kv_heads * config.d_head, std=0.02)
            for _ in range(config.value_embeddings))
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = make_norm(config) if config.norm != "post" else nn.Identity()
        if not config.tie_embeddings:
            self.lm_head = Linear(D, V)
            if config.zero_init:
                nn.init.zeros_(self.lm_head.weight)

    def positions(self, T, device):
        return torch.arange(T, device=device)

    def hidden(self, ids, cache=None, starts=None):
        """ids (B, T) -> the residual stream (B, T, D) after the final norm.

        With a KVCache, row b of ids continues that row of the cache at position starts[b].
        """
        c, T, mask = self.config, ids.shape[1], None
        if cache is not None:
            positions, mask = cache.begin(starts, T, c.sliding_window)  # (B, T), (B, 1, T, S)
        elif c.context_length < T:
            raise ValueError(f"{T} tokens do not fit context_length={c.context_length}")
        else:
            positions = self.positions(T, ids.device)
            if c.sliding_window and c.sliding_window < T and not kernels_for(ids, c.attention):
                mask = visible(positions[None], positions, c.sliding_window)
        x = self.embed(ids)  # (B, T, D)
        if c.position == "learned":
            x = x + self.pos(positions.clamp(max=c.context_length - 1))
        rope = self.rope.tables(positions, compute_dtype(x)) if c.position == "rope" else None
        x0 = x if c.residual_scalars else None
        values = [table(ids) for table in self.value_tables]  # of layer i, and again of layer -1-i
        values += [None] * (c.num_layers - 2 * len(values)) + values[::-1]
        for layer, value in zip(self.layers, values):
            x = layer(x, x0, rope=rope, mask=mask, cache=cache, values=value)
        return self.norm(x)

    def head(self, hidden):
        """hidden (..., D) -> logits (..., V)."""
        tied, cap = self.config.tie_embeddings, self.config.logit_softcap
        logits = project(hidden, self.embed.weight) if tied else self.lm_head(hidden)
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    def forward(self, ids, cache=None, starts=None):
        return self.head(self.hidden(ids, cache, starts))

    def loss(self, ids, targets, reduction="mean", ignore_index=-100, z_loss=0.0, chunk=512):
        """Cross-entropy of targets (B, T) in fp32: "mean" over the kept targets, "sum", or "none",
        (B, T). In training, "mean" and "sum" count an MoE's balance_loss for every kept token."""
        hidden, c = self.hidden(ids), self.config
        if reduction == "none":
            return cross_entropy(self.head(hidden), targets, "none", ignore_index, z_loss)
        weight = (self.embed if c.tie_embeddings else self.lm_head).weight
        if kernels := kernels_for(hidden, c.attention):
            total = kernels.linear_cross_entropy(
                hidden, weight, targets, ignore_index=ignore_index, z_loss=z_loss,
                softcap=c.logit_softcap, reduction="sum")
        else:
            total = FusedCrossEntropy.apply(hidden.flatten(0, 1), weight, targets.flatten(),
                                            ignore_index, c.logit_softcap, z_loss, chunk)
        tokens = (targets != ignore_index).sum()
        if self.training and c.num_experts and c.balance == "loss":
            total = total + tokens * c.balance_loss * sum(m.aux for m in self.moes())
        return total / tokens if reduction == "mean" else total

    def moes(self):
        return [m for m in self.modules() if isinstance(m, MoE)]


# ---- the same, faster --------------------------------------------------------------------------


def kernels_for(x, attention):
    """kernels.py for what attention="flash" asks for on a GPU: attention, norms and loss in Triton.
    None elsewhere: on a CPU what is here is the quicker."""
    if x.is_cuda and attention == "flash":
        import kernels
        return kernels


CPU_INFO = Path("/proc/cpuinfo")
ON_AMD = CPU_INFO.exists() and "AuthenticAMD" in CPU_INFO.read_text()


def project(x, weight, bias=None):
    """x W^T + b. Of one to four rows on AMD's processors as W x^T, there up to twice as fast."""
    rows = x.numel() // x.shape[-1]
    if (not ON_AMD or not 0 < rows < 5 or torch.is_grad_enabled() or x.device.type != "cpu"
            or compute_dtype(x) != torch.float32):
        return F.linear(x, weight, bias)
    h = x.reshape(rows, -1)
    h = h.repeat(2, 1) if rows == 1 else h  # one column alone is no product of matrices
    y = (weight @ h.T).T[:rows].view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class ScaleByRMS(torch.autograd.Function):
    """y = n * weight with n = x / sqrt(mean(x^2) + eps). By these formulas a training step of the
    model on a CPU is 8 % faster than by autograd's, which go step by step."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        scale = torch.rsqrt(x.to(wide(x)).square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        n, weight = x * scale, weight.to(scale.dtype)
        dw = dy * n
        slope = (dw @ weight / x.shape[-1])[..., None]
        dx = (dy * weight).addcmul_(n, slope, value=-1).mul_(scale)
        return dx, dw.flatten(0, -2).sum(0), None, None


def attend(q, k, v, mask, config):
    """Attention of q (B, T, H, E) over k, v (B, S, K, E) -> (B, T, H, E), by the quickest way.

    mask as from `visible`; None means causal when T > 1, everything when T == 1.
    """
    T, window, softcap = q.shape[1], config.sliding_window, config.attention_softcap
    if callable(config.attention):  # distributed.py's, over a sequence that several ranks share
        return config.attention(q, k, v)
    kernels = kernels_for(q, config.attention)
    if kernels and T > 1 and mask is None and q.shape[-1] == v.shape[-1]:
        return kernels.flash_attention(q, k, v, window=window, softcap=softcap)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, E), (B, K, S, E)
    groups = q.shape[1] // k.shape[1]
    if softcap or config.attention == "naive":
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        if mask is None:  # one query sees all S keys, T of T those up to its own
            mask = torch.ones(T, k.shape[2], device=q.device).tril(k.shape[2] - T).bool()
        y = scaled_dot_product_attention(q, k, v, mask, softcap)
    elif T == 1 and q.dtype == wide(q) and not torch.is_grad_enabled():  # bf16 scores lose digits
        # Decoding: the H / K heads that share keys are the rows of one product, which on a CPU is
        # up to 10 % quicker than torch's fused kernel.
        scores = (q.reshape(*k.shape[:2], groups, -1) * q.shape[-1]**-0.5) @ k.mT  # (B, K, H/K, S)
        if mask is not None:  # (B, 1, 1, S)
            scores = torch.where(mask, scores, -math.inf)
        y = (torch.softmax(scores, -1) @ v).view(*q.shape[:3], -1)
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1,
                                           enable_gqa=groups > 1)
    return y.transpose(1, 2)


class FusedCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy together, a chunk of tokens at a time; the sum over tokens.

    The (N, V) logits are the largest tensor of a small model. Here a chunk of them lives once, in
    place, and turns into its own gradient before the next chunk comes (as in Liger Kernel,
    Hsu et al. 2024), so the forward pass already leaves both gradients behind.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, softcap, z_loss, chunk):
        w, total = weight.to(compute_dtype(hidden)), hidden.new_zeros((), dtype=wide(hidden))
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide(weight))
        chunks = (t.split(chunk) for t in (hidden.to(w.dtype), targets[:, None], d_hidden))
        for h, target, d_h in zip(*chunks):  # (N, D), (N, 1), (N, D)
            keep = target != ignore_index
            target = target.masked_fill(~keep, 0)
            z = torch.mm(h, w.T).to(total.dtype)  # (N, V)
            if softcap:
                z = z.div_(softcap).tanh_().mul_(softcap)
                slope = 1 - (z / softcap).square()
            top, picked = z.amax(-1, keepdim=True), z.gather(-1, target)
            p = z.sub_(top).exp_()
            size = p.sum(-1, keepdim=True)
            lse = size.log() + top
            total += ((lse - picked + z_loss * lse.square()) * keep).sum()
            if any(ctx.needs_input_grad):  # dloss/dz = softmax(z) (1 + 2 z_loss lse) - [target]
                p.mul_((1 + 2 * z_loss * lse) / size * keep)
                p.scatter_add_(-1, target, -keep.to(p.dtype))
                p = (p.mul_(slope) if softcap else p).to(w.dtype)
                d_h.copy_(p @ w)
                d_weight += p.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None, None, None, None, None


# ---- larger variants ---------------------------------------------------------------------------


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, Liu et al. 2024).

    Keys and values of all heads are made from one latent of kv_rank numbers a token, and only that
    and d_rope rotated numbers are cached. R is kv_rank, P is d_rope.
    """

    def __init__(self, config, layer=0):
        super().__init__()
        c, self.config, self.layer = config, config, layer
        self.q = Linear(c.d_model, c.num_heads * (c.d_head + c.d_rope))
        self.down = Linear(c.d_model, c.kv_rank + c.d_rope)
        self.norm = RMSNorm(c.kv_rank, c.norm_eps, attention=c.attention)
        self.up = Linear(c.kv_rank, c.num_heads * 2 * c.d_head)  # every head's key, then its value
        self.o = Linear(c.num_heads * c.d_head, c.d_model)

    def forward(self, x, rope=None, mask=None, cache=None, values=None):
        B, T, _ = x.shape
        c, E = self.config, self.config.d_head
        q, q_rope = self.q(x).view(B, T, -1, E + c.d_rope).split([E, c.d_rope], -1)
        latent, k_rope = self.down(x)[:, :, None].split([c.kv_rank, c.d_rope], -1)  # (B, T, 1, .)
        latent = self.norm(latent)
        if rope is not None:
            q_rope, k_rope = rotate(q_rope, *rope), rotate(k_rope, *rope)
        if cache is not None:
            latent, k_rope = cache.update(self.layer, latent, k_rope)  # (B, S, 1, R or P)
        k, v = self.up(latent).view(B, latent.shape[1], -1, 2 * E).chunk(2, -1)  # (B, S, H, E)
        q = torch.cat((q, q_rope), -1)
        k = torch.cat((k, k_rope.expand(-1, -1, k.shape[2], -1)), -1)
        return self.o(attend(q, k, v, mask, c).reshape(B, T, -1))


class MoE(nn.Module):
    """Mixture of experts: each token passes the k experts its router likes best, weighted by it.

    balance="loss" adds num_experts * sum(share of tokens * mean probability) over the experts, 1
    when even (Switch, Fedus et al. 2021). balance="bias" has no loss: balance() raises a bias on
    the choice, not the weight, of experts that got too few tokens (Wang et al. 2024).
    """

    def __init__(self, config):
        super().__init__()
        n, D = config.num_experts, config.d_model
        self.config, self.aux = config, 0.0
        self.load = 0  # tokens each expert got since balance(), a tensor once there were any
        self.router = Linear(D, n)
        self.experts = nn.ModuleList(SwiGLU(D, config.d_ff) for _ in range(n))
        if config.num_shared_experts:
            self.shared = SwiGLU(D, config.d_ff * config.num_shared_experts)
        if config.balance == "bias":
            self.register_buffer("bias", torch.zeros(n))

    def forward(self, x):
        c, flat = self.config, x.flatten(0, -2)  # (N, D)
        scores = self.router(flat)
        p = softmax(scores.to(wide(scores)))  # (N, num_experts)
        chosen = (p + self.bias if c.balance == "bias" else p).topk(c.experts_per_token).indices
        weight = p.gather(-1, chosen)  # (N, k)
        if c.normalize_router:
            weight = weight / weight.sum(-1, keepdim=True)
        y = self.mix(flat, chosen, weight)
        if c.num_shared_experts:
            y = y + self.shared(flat)
        share = F.one_hot(chosen, c.num_experts).sum((0, 1)).to(p.dtype)
        if self.training:
            self.load = self.load + share.detach()
        self.aux = c.num_experts * (share / chosen.numel() * p.mean(0)).sum()
        return y.view_as(x)

    def mix(self, flat, chosen, weight):
        """Sum of the chosen experts' outputs: flat (N, D), chosen and weight (N, k) -> (N, D)."""
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, place = (chosen == e).nonzero(as_tuple=True)
            out = expert(flat[token]) * weight[token, place, None]
            y = y.index_add(0, token, out.to(y.dtype))
        return y

    @torch.no_grad()
    def balance(self, rate=1e-3):
        """Move the bias towards an even load; call it after each optimizer step."""
        self.bias += rate * torch.sign(self.load.mean() - self.load)
        self.load = 0


# ---- generation --------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every layer, (B, length, K, E) each, allocated once, written in place;
    in memory (B, K, length, E), as attention reads them.

    Position t of a row lies at index t, so rows of different lengths need no padding on the left:
    what lies beyond a row's end is masked now and overwritten later.
    """

    def __init__(self, model, batch, length):
        c, w = model.config, model.embed.weight
        sizes = [(1, c.kv_rank), (1, c.d_rope)] if c.kv_rank else [(c.num_kv_heads, c.d_head)] * 2
        self.k, self.v = ([w.new_zeros(batch, K, length, E).transpose(1, 2) for _ in model.layers]
                          for K, E in sizes)
        self.model, self.device, self.graphs = model, w.device, {}

    def begin(self, starts, T, window=None):
        """Positions (B, T) of T new tokens a row, and the mask (B, 1, T, S) over the cache.

        starts is a list, or a tensor when the step must not depend on its values (a CUDA graph):
        then S is the whole cache.
        """
        length, fixed, B = self.k[0].shape[1], torch.is_tensor(starts), len(starts)
        self.end = length if fixed else max(starts) + T
        if self.end > length:
            raise ValueError(f"{self.end} tokens do not fit a cache of {length}")
        row, new, keys = (torch.arange(n, device=self.device) for n in (B, T, self.end))
        positions = torch.as_tensor(starts, device=self.device)[:, None] + new
        even = not fixed and min(starts) == max(starts)  # then a slice does, 5 times as quick
        self.at = (slice(B), slice(starts[0], self.end)) if even else (row[:, None], positions)
        if even and T in (1, self.end) and not (window and window < self.end):
            return positions, None  # one query that sees every key, or plain causal
        return positions, visible(positions, keys, window)

    def update(self, layer, k, v):
        """Write k, v (B, T, K, E) at their positions; return all so far, (B, S, K, E) each."""
        for t, new in ((self.k[layer], k), (self.v[layer], v)):
            t[self.at] = new.to(t.dtype)
        return self.k[layer][:len(k), :self.end], self.v[layer][:len(v), :self.end]

    @torch.inference_mode()
    def prefill(self, prompts, first):
        """Read prompts (tuples of ids) into the rows from `first` on, each different one once."""
        T = max(map(len, prompts), default=0)
        if not T:
            return
        place = {ids: i for i, ids in enumerate(set(prompts))}
        padded = torch.tensor([ids + (0,) * (T - len(ids)) for ids in place], device=self.device)
        fresh, source = KVCache(self.model, len(place), T), [place[ids] for ids in prompts]
        self.model.hidden(padded, fresh, [0] * len(place))
        for t, new in zip(self.k + self.v, fresh.k + fresh.v):
            t[first:first + len(prompts), :T] = new[source]

    def step(self, ids, starts):
        """Logits (B, T, V) of ids (B, T) that continue each row at its start."""
        if self.device.type != "cuda" or self.model.config.num_experts:
            return self.model(ids, self, starts)
        starts = torch.tensor(starts, device=self.device)
        if ids.shape not in self.graphs:  # a CUDA graph: one launch where there were hundreds
            inputs = ids.clone(), starts.clone()
            self.model(inputs[0], self, inputs[1])  # a first run outside, to allocate
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.model(inputs[0], self, inputs[1])
            self.graphs[ids.shape] = graph, inputs, output
        graph, inputs, output = self.graphs[ids.shape]
        inputs[0].copy_(ids)
        inputs[1].copy_(starts)
        graph.replay()
        return output


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities (..., V) to draw from; temperature 0 puts everything on the largest logit."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits.float() / temperature
    if top_k and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = torch.softmax(logits, -1)
    if top_p < 1:  # the smallest set that holds top_p (Holtzman et al. 2020)
        sorted_p, order = p.sort(-1, descending=True)
        outside = sorted_p.cumsum(-1) - sorted_p >= top_p
        p = p.masked_fill(outside.scatter(-1, order, outside), 0)
    if min_p:  # relative to the likeliest (Nguyen et al. 2024)
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    return p / p.sum(-1, keepdim=True)


def draw(p, u):
    """Invert the cumulative distribution: p (..., V), u (...) uniform in [0, 1) -> ids (...)."""
    total = p.double().cumsum(-1)
    ids = torch.searchsorted(total, (u.double() * total[..., -1])[..., None], right=True)
    return ids.squeeze(-1).clamp(max=p.shape[-1] - 1)


def lookup(ids, k):
    """The k tokens that followed the last earlier occurrence of the last two; else the last one.

    >>> lookup([5, 6, 7, 8, 5, 6], 2)
    [7, 8]
    """
    for i in range(len(ids) - 3, -1, -1):
        if ids[i:i + 2] == ids[-2:]:
            return (ids[i + 2:i + 2 + k] + ids[-1:] * k)[:k]
    return ids[-1:] * k


def propose(caches, rows, k, filters, u):
    """Guesses (B, k) of the next tokens and the distributions (B, k, V) they were drawn from, by
    the draft model if there is a cache of one, else by lookup."""
    if len(caches) == 1:
        guess = torch.tensor([lookup(row.ids, k) for row in rows], device=u.device)
        return guess, F.one_hot(guess, caches[0].model.config.vocab_size).float()
    # Two tokens back, because the last pass never fed its final guess. A prompt of one token may
    # leave a gap in the draft's cache: that costs a guess, not correctness.
    back, guess, q = min(2, *(len(row.ids) for row in rows)), [], []
    ids, start = torch.tensor([row.ids[-back:] for row in rows], device=u.device), -back
    for j in range(k):
        logits = caches[1].step(ids, [len(row.ids) + start for row in rows])
        q.append(distribution(logits[:, -1], *filters))
        guess.append(draw(q[-1], u[:, j, 2]))
        ids, start = guess[-1][:, None], j
    return torch.stack(guess, 1), torch.stack(q, 1)


@torch.inference_mode()
def decode(caches, rows, uniform, k, filters):
    """One pass of the model: each row's new tokens, 1 to k + 1, and their log-probabilities.

    Of k guesses a row, guess x stays with probability min(1, p(x) / q(x)); the first that does not
    is replaced by a draw from max(0, p - q), and if all stay, or k is 0, p gives one more.
    """
    device, V = caches[0].device, caches[0].model.config.vocab_size
    sample, made, last = torch.tensor([(row.sample, len(row.logprobs), row.ids[-1])
                                       for row in rows]).T[..., None]  # (B, 1) each
    u, last = uniform[sample, made + torch.arange(k + 1)].to(device), last.to(device)
    guess, q = last[:, :0], u.new_zeros(len(rows), 0, V)  # (B, k), (B, k, V)
    if k:
        guess, q = propose(caches, rows, k, filters, u)
    starts = [len(row.ids) - 1 for row in rows]
    logits = caches[0].step(torch.cat((last, guess), 1), starts).float()  # (B, k + 1, V)
    p = distribution(logits, *filters)
    p_guess, q_guess = (t[:, :k].gather(-1, guess[..., None]).squeeze(-1) for t in (p, q))
    n = (u[:, :k, 1] * q_guess < p_guess).long().cumprod(1).sum(1)  # (B,) guesses kept
    q = F.pad(q, (0, 0, 0, 1))  # (B, k + 1, V): nothing was guessed for the last place
    tokens, row = F.pad(guess, (0, 1)), torch.arange(len(rows), device=device)
    tokens[row, n] = draw((p[row, n] - q[row, n]).clamp_(min=0), u[row, n, 0])
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    return [new[:m + 1] for new, m in zip(tokens.tolist(), n.tolist())], logprobs.tolist()


@dataclass
class Completion:
    """One sample; reason is "stop", "length" or "context" (context_length is full)."""

    sample: int
    prompt: int  # which of the prompts it continues
    ids: list  # of the prompt, then the new tokens
    logprobs: list = field(default_factory=list)  # of the model, before temperature and filters
    text: str = ""
    reason: str = ""

    @property
    def tokens(self):
        return self.ids[len(self.ids) - len(self.logprobs):]


def stream(model, prompts, max_new_tokens=128, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
           stop=(), seed=0, n=1, batch_size=64, tokenizer=None, draft=None, draft_tokens=4):
    """Continue each prompt, a list of ids, n times; yield (Completion, token) as tokens come.

    Sample i belongs to prompt i // n. Every sample owns its row of uniform random numbers, so
    what it draws does not depend on the batch it happens to run in. stop holds ids, and strings
    if a tokenizer is given. Samples over batch_size queue, and take the place of those that
    finish. draft, a smaller Transformer or "ngram" (what followed the last two tokens before),
    proposes draft_tokens tokens that one pass of this model checks (Leviathan et al. 2023); the
    distribution stays the model's own. ValueError: a prompt that is empty or leaves no room.
    """
    c, strings = model.config, [s for s in stop if isinstance(s, str)]
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < c.context_length:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, not 1 to context_length - 1 = "
                             f"{c.context_length - 1}, so that a new one fits")
        if not 0 <= min(prompt) <= max(prompt) < c.vocab_size:
            raise ValueError(f"prompt {i} has a token outside vocab_size={c.vocab_size}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if strings and tokenizer is None:
        raise ValueError("stop holds a string: generate needs the tokenizer to find it")

    queue = deque(Completion(i, i // n, list(prompts[i // n])) for i in range(len(prompts) * n))
    k, filters = draft_tokens if draft else 0, (temperature, top_k, top_p, min_p)
    uniform = torch.rand(len(queue), max_new_tokens + k + 1, 3,
                         generator=torch.Generator().manual_seed(seed))
    limit = min(max(map(len, prompts), default=0) + max_new_tokens, c.context_length)
    rows, batch_size = [], min(batch_size, len(queue))
    caches = [KVCache(m, batch_size, limit + k) for m in (model, draft)
              if isinstance(m, Transformer)]
    while queue or rows:
        new = [queue.popleft() for _ in range(min(len(queue), batch_size - len(rows)))]
        for cache in caches:  # the last token of a prompt is the first of the decoding
            cache.prefill([tuple(row.ids[:-1]) for row in new], len(rows))
        rows += new  # continuous batching: free places are refilled
        for row, tokens, logprobs in zip(rows, *decode(caches, rows, uniform, k, filters)):
            for token, logprob in zip(tokens, logprobs):
                if row.reason:
                    break
                row.ids.append(token)
                row.logprobs.append(logprob)
                # A string of n bytes has n tokens at most, and one more may begin before it.
                if token in stop or any(s in tokenizer.decode(row.tokens[-len(s.encode()) - 1:])
                                        for s in strings):
                    row.reason = "stop"
                elif len(row.logprobs) >= max_new_tokens:
                    row.reason = "length"
                elif len(row.ids) >= limit:
                    row.reason = "context"
                if row.reason and tokenizer:
                    row.text = tokenizer.decode(row.tokens)
                yield row, token
        going = [i for i, row in enumerate(rows) if not row.reason]
        if len(going) <= 0.75 * len(rows):  # moving the others costs more than a few idle rows
            rows = [rows[i] for i in going]
            for t in (t for cache in caches for t in cache.k + cache.v):
                t[:len(going)] = t[going]  # whole: a replayed CUDA graph does not set cache.end


def generate(model, prompts, *args, **options):
    """The len(prompts) * n finished Completions of `stream`, whose arguments it takes."""
    done = {row.sample: row for row, _ in stream(model, prompts, *args, **options)}
    return [done[i] for i in sorted(done)]


Transformer.stream, Transformer.generate = stream, generate


class Int8Linear(nn.Module):
    """A Linear whose weight is int8 with one scale an output: a quarter of fp32's memory traffic,
    which is what decoding one token at a time waits for. For inference only."""

    def __init__(self, linear):
        super().__init__()
        w = linear.weight.detach().float()
        scale = (w.abs().amax(1) / 127).clamp(min=1e-8).bfloat16()  # as the kernel wants it
        self.register_buffer("weight", (w / scale[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        if x.device.type == "cpu" and 0 < x[..., 0].numel() <= 4:  # torch's kernel for few rows
            y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), self.weight, self.scale)
            y = y.view(*x.shape[:-1], -1).to(x.dtype)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantize(model):
    """Turn every Linear into int8, in place, but for the routers of experts."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear) and name != "router":
                setattr(module, name, Int8Linear(child))
    return model


# ---- checkpoints -------------------------------------------------------------------------------

# Hugging Face's key in config.json -> ours.
LLAMA_KEYS = {
    "vocab_size": "vocab_size", "max_position_embeddings": "context_length",
    "hidden_size": "d_model", "num_hidden_layers": "num_layers", "intermediate_size": "d_ff",
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads",
    "head_dim": "d_head", "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tie_embeddings",
    "eos_token_id": "eos_token_id"}
MOE_KEYS = {**LLAMA_KEYS, "num_experts": "num_experts", "num_experts_per_tok": "experts_per_token",
            "moe_intermediate_size": "d_ff", "norm_topk_prob": "normalize_router"}
GPT2_KEYS = {
    "vocab_size": "vocab_size", "n_positions": "context_length", "n_embd": "d_model",
    "n_layer": "num_layers", "n_head": "num_heads", "n_inner": "d_ff",
    "layer_norm_epsilon": "norm_eps", "eos_token_id": "eos_token_id"}
OPTIONAL = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "eos_token_id", "n_inner")
SUPPORTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
             "mlp_only_layers": [], "decoder_sparse_step": 1, "activation_function": "gelu_new",
             "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}
# Our part of a parameter's name -> Hugging Face's.
LLAMA_NAMES = {
    "embed": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm",
    "attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
    "ffn": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "router": "gate",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
OLMO_NAMES = {**LLAMA_NAMES, "attn_norm": "post_attention_layernorm",
              "ffn_norm": "post_feedforward_layernorm"}
GPT2_NAMES = {
    "embed": "transformer.wte", "pos": "transformer.wpe", "layers": "transformer.h",
    "norm": "transformer.ln_f", "q": "c_attn", "k": "c_attn", "v": "c_attn", "o": "c_proj",
    "ffn": "mlp", "w1": "c_fc", "w2": "c_proj", "attn_norm": "ln_1", "ffn_norm": "ln_2"}
GPT2 = {"ffn": "gelu", "norm_type": "layer", "position": "learned", "bias": True,
        "tie_embeddings": True, "qk_norm": False}
# model_type: its class there, its keys, its names, and what it fixes.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", LLAMA_KEYS, LLAMA_NAMES, {"qk_norm": False}),
    "mistral": ("MistralForCausalLM", LLAMA_KEYS, LLAMA_NAMES, {"qk_norm": False}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA_KEYS, LLAMA_NAMES, {"qk_norm": False, "qkv_bias": True}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA_KEYS, LLAMA_NAMES, {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE_KEYS, LLAMA_NAMES, {}),
    "olmo2": ("Olmo2ForCausalLM", LLAMA_KEYS, OLMO_NAMES, {"qk_norm": "full", "norm": "output"}),
    "gpt2": ("GPT2LMHeadModel", GPT2_KEYS, GPT2_NAMES, GPT2),
    "scratchlm": ("Transformer", {f.name: f.name for f in fields(ModelConfig)}, {}, {})}
# Changes how, or from what start, the model computes and learns, not what it computes.
NOT_COMPUTED = ("attention", "zero_init", "rope_theta", "balance_loss", "d_rope")


def hf_name(name, kind):
    """layers.0.attn.q.weight -> model.layers.0.self_attn.q_proj.weight, and if it is transposed
    there: GPT-2 stores the matrices of its blocks as (d_in, d_out)."""
    names = ARCHITECTURES[kind][2]
    name = ".".join(names.get(part, part) for part in name.split("."))
    return name, ".c_" in name and name.endswith("weight")


def config_from_hf(h):
    """ModelConfig of a parsed config.json; ValueError for what this file does not compute."""
    kind = h.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}")
    if "num_local_experts" in h:  # transformers 5 renamed it
        h = {**h, "num_experts": h["num_local_experts"]}
    for key, value in SUPPORTED.items():
        if h.get(key) not in (None, value):
            raise ValueError(f"{key}={h[key]!r} is not supported, only {value!r}")
    _, keys, _, fixed = ARCHITECTURES[kind]
    optional = keys if kind == "scratchlm" else OPTIONAL
    c = {ours: h[key] for key, ours in keys.items() if key in h or key not in optional} | fixed
    rope = dict(h.get("rope_parameters") or h.get("rope_scaling") or {})
    c["rope_theta"] = rope.pop("rope_theta", None) or h.get("rope_theta") or 10000.0
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        c["rope_scaling"] = rope
    if kind == "mistral" or kind.startswith("qwen") and h.get("use_sliding_window"):
        c["sliding_window"] = h.get("sliding_window")
        if c["sliding_window"] and h.get("max_window_layers"):
            raise ValueError("max_window_layers over 0 (layers that differ) is not supported")
    return ModelConfig(**c)


def config_to_hf(c):
    """The config.json of the first architecture that computes what `c` says, else of our own."""
    llama = {"hidden_act": "silu", "attention_bias": False, "rope_theta": c.rope_theta,
             "rope_scaling": c.rope_scaling, "sliding_window": c.sliding_window,
             "use_sliding_window": bool(c.sliding_window), "max_window_layers": 0}
    for kind, (name, keys, _, _) in ARCHITECTURES.items():
        h = {"model_type": kind, "architectures": [name]}
        h |= {} if kind in ("gpt2", "scratchlm") else llama
        h |= {key: getattr(c, ours) for key, ours in keys.items()}
        same = asdict(config_from_hf(h)) | {key: getattr(c, key) for key in NOT_COMPUTED}
        if same == asdict(c):
            return h


def save_pretrained(model, directory, shard_bytes=5_000_000_000):
    """Write config.json and model.safetensors (in shards and an index if it is larger)."""
    from safetensors.torch import save_file
    directory, h = Path(directory), config_to_hf(model.config)
    h["torch_dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    if h["model_type"] == "scratchlm":
        print("model.py: no Hugging Face architecture has these flags together; saved as "
              "model_type scratchlm, which only this file opens", file=sys.stderr)
    tensors, shards, total = {}, {}, 0
    for name, p in model.state_dict().items():
        name, flip = hf_name(name, h["model_type"])
        p = p.detach().cpu().T if flip else p.detach().cpu()
        tensors[name] = torch.cat((tensors[name], p), -1) if name in tensors else p  # GPT-2's qkv
    for name, p in tensors.items():
        shards.setdefault(total // shard_bytes, {})[name] = p.contiguous()
        total += p.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = dict(zip(names if len(shards) > 1 else ["model.safetensors"], shards.values()))
    texts = {"config.json": h}
    if len(shards) > 1:
        texts["model.safetensors.index.json"] = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in files.items() for name in shard}}
        (directory / "model.safetensors").unlink(missing_ok=True)  # it would be read first
    directory.mkdir(parents=True, exist_ok=True)
    for file, shard in files.items():
        save_file(shard, directory / f"{file}.tmp", metadata={"format": "pt"})
    for file, text in texts.items():
        (directory / f"{file}.tmp").write_text(json.dumps(text, indent=2) + "\n")
    for file in [*files, *texts]:
        os.replace(directory / f"{file}.tmp", directory / file)


def read_config(directory):
    """ModelConfig and model_type of a directory."""
    file = Path(directory, "config.json")
    if not file.is_file():
        raise ValueError(f"{file} is missing: give the directory of a model")
    try:
        h = json.loads(file.read_text())
        return config_from_hf(h), h["model_type"]
    except (KeyError, ValueError) as error:
        what = "no key " if isinstance(error, KeyError) else ""
        raise ValueError(f"{file}: {what}{error}") from None


def read_tensors(directory):
    """{name: tensor}, memory-mapped, of the safetensors files of a directory; no pickles."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    names, tensors = {"model.safetensors"}, {}
    index = directory / "model.safetensors.index.json"
    if index.is_file() and not (directory / "model.safetensors").is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    for file in (directory / name for name in sorted(names)):
        if not file.is_file():
            raise ValueError(f"{file} is missing; pickles (.bin, .pt) are not opened, since "
                             "loading one can run code: convert it to safetensors")
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or no safetensors file: {error}") from None
    return tensors


def from_pretrained(directory, dtype=None, device=None):
    """Open a Hugging Face directory; ValueError names the first thing wrong with it."""
    directory = Path(directory)
    config, kind = read_config(directory)
    with torch.device("meta"):
        model = Transformer(config)
    tensors, state = read_tensors(directory), {}
    if kind == "gpt2":  # OpenAI's own files go without the prefix
        tensors = {"transformer." + name.removeprefix("transformer."): t
                   for name, t in tensors.items()}
    unused = set(tensors)
    for name, p in model.state_dict().items():
        theirs, flip = hf_name(name, kind)
        if theirs not in tensors:
            raise ValueError(f"{directory}: tensor {theirs} is missing")
        unused.discard(theirs)
        t = tensors[theirs].T if flip else tensors[theirs]
        if "c_attn" in theirs and len(t) == 3 * len(p):
            t = t.chunk(3)["qkv".index(name.split(".")[-2])]
        if t.shape != p.shape:
            raise ValueError(f"{directory}: tensor {theirs} has shape {tuple(t.shape)}, "
                             f"config.json asks for {tuple(p.shape)}")
        state[name] = t.to(device or "cpu", dtype).contiguous()
    known = ["rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"]  # of no use to us
    known += ["lm_head.weight"] if config.tie_embeddings else []
    for name in sorted(unused):
        if not name.endswith(tuple(known)):
            raise ValueError(f"{directory}: tensor {name} has no place in a {kind} model")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


Transformer.save_pretrained = save_pretrained
Transformer.from_pretrained = staticmethod(from_pretrained)

# ---- accounting --------------------------------------------------------------------------------

GPT2_SIZES = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20),
              "gpt2-xl": (1600, 48, 25)}
# What a parameter's name holds -> the line of the account it belongs to; the first that fits.
PARTS = {"norm": "norms", ".attn": "attention", ".ffn": "feed-forward", "lm_head": "head",
         "embed": "tables", "pos": "tables", "value_tables": "tables", "": "scalars"}


def account(model, T=None):
    """{part: [parameters, training FLOPs a token]} at length T (default: the context).

    A weight of a matmul costs a token 2 FLOPs forward and 4 backward. A token attends to
    (T + 1) / 2 keys on average; q k^T and the weighted sum of v cost 2 E each a head and key
    forward, twice that backward.
    """
    c, parts = model.config, {}
    T = T or c.context_length
    used = c.experts_per_token / c.num_experts if c.num_experts else 1
    for name, p in model.named_parameters():
        part = next(part for mark, part in PARTS.items() if mark in name)
        if name == "embed.weight" and c.tie_embeddings:
            part = "head"  # which computes
        row = parts.setdefault(part, [0, 0])
        row[0] += p.numel()
        if p.ndim == 2 and part != "tables":
            row[1] += 6 * p.numel() * (used if ".experts." in name else 1)
    w = min(c.sliding_window or T, T)
    keys = (w * (w + 1) / 2 + (T - w) * w) / T
    width = 2 * c.d_head + (c.d_rope if c.kv_rank else 0)  # of a key and a value
    parts["attention products"] = [0, 6 * c.num_layers * c.num_heads * width * keys]
    return parts


def num_parameters(model, embeddings=True):
    """Learned numbers; embeddings=False leaves out tables that are only looked up in."""
    return sum(n for part, (n, _) in account(model).items() if embeddings or part != "tables")


def flops_per_token(model, T=None):
    """Training FLOPs a token, forward and backward, at length T (default: the context)."""
    return float(sum(flops for _, flops in account(model, T).values()))


Transformer.num_parameters, Transformer.flops_per_token = num_parameters, flops_per_token


def count_only(source):
    """A model on the meta device, sizes without numbers, of a directory or a GPT-2's name."""
    if source in GPT2_SIZES:
        d_model, layers, heads = GPT2_SIZES[source]
        config = ModelConfig(vocab_size=50257, d_model=d_model, num_layers=layers,
                             num_heads=heads, **GPT2)
    else:
        config, _ = read_config(source)
    with torch.device("meta"):
        return Transformer(config)


def run_account(args):
    model = count_only(args.model)
    T, N, GB = model.config.context_length, model.num_parameters(), 1e9
    parts, total, cache = account(model), model.flops_per_token(), KVCache(model, 1, T)
    print(f"{'part':<22}{'parameters':>16}{'training FLOPs/token':>24}{'share':>8}")
    for part, (numbers, flops) in [*parts.items(), ("total", (N, total))]:
        print(f"{part:<22}{numbers:>16,}{flops:>24,.0f}{flops / total:>8.1%}")
    print(f"without token and position tables: {model.num_parameters(embeddings=False):,} "
          f"parameters; by 6N: {6 * N:,} FLOPs/token, {6 * N / total:.3f} of the exact count\n"
          f"fp32 memory: weights {4 * N / GB:.2f} GB, gradients {4 * N / GB:.2f}, "
          f"AdamW {8 * N / GB:.2f}; KV cache "
          f"{sum(t.nbytes for t in cache.k + cache.v) / 1e6:.1f} MB a sequence")
    if model.config.num_experts:  # which expert gets how many tokens depends on the numbers
        return
    kept = {}  # what autograd keeps for the backward pass: each storage once, weights not counted
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    ids = torch.zeros(1, T, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update({t.untyped_storage()._cdata: t}) or t, lambda t: t):
        model.loss(ids, ids)
    kept = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    print(f"activations kept for backward: {kept / GB:.2f} GB a sequence of {T} tokens")


# ---- bench -------------------------------------------------------------------------------------


def import_transformers():
    """transformers if installed. It would take our kernels.py for a package of that name."""
    ours, sys.modules["kernels"] = sys.modules.get("kernels"), None  # None: no such module
    try:
        import transformers
        import transformers.integrations.hub_kernels  # noqa: F401  the one that looks
        return transformers
    except ImportError:
        return None
    finally:
        del sys.modules["kernels"]
        if ours:
            sys.modules["kernels"] = ours


def run_bench(args):
    """Ours against transformers: the same random weights, in turns, so that a busy machine hurts
    both alike; medians."""
    if not (transformers := import_transformers()):
        raise ValueError("bench compares with transformers: pip install transformers")

    def pair(**config):
        torch.manual_seed(0)
        ours = Transformer(ModelConfig(**config)).eval()
        with tempfile.TemporaryDirectory() as directory:
            ours.save_pretrained(directory)
            return ours, transformers.AutoModelForCausalLM.from_pretrained(directory).eval()

    def row(name, tokens, *runs):
        times = [], []
        for _ in range(6):
            for run, taken in zip(runs, times):
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
        a, b = (tokens / statistics.median(t[1:]) for t in times)  # the first round warms up
        print(f"| {name} | {a:.0f} | {b:.0f} | {a / b:.2f} |", flush=True)

    def generation(name, ours, theirs, prompts, tokens, n=1, temperature=0.0):
        many = prompts.repeat_interleave(n, 0)
        row(f"generate, {name}", len(many) * tokens, lambda: ours.generate(
            prompts.tolist(), tokens, temperature, n=n, batch_size=len(many)
        ), lambda: theirs.generate(
            many, attention_mask=torch.ones_like(many), do_sample=temperature > 0, top_k=0,
            max_new_tokens=tokens, eos_token_id=ours.config.vocab_size, pad_token_id=0))

    ours, theirs = pair(vocab_size=8192, num_layers=6, qk_norm=False)
    print(f"{ours.num_parameters() / 1e6:.1f}M parameters, {torch.get_num_threads()} threads; "
          f"peer: transformers {transformers.__version__}")
    print("| what | ours, tokens/s | peer, tokens/s | times as fast |\n|---|---|---|---|")
    ids = torch.randint(8192, (16, 256))
    for dtype in (torch.float32, torch.bfloat16):
        cast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        row(f"forward + backward, 8 x 256, {str(dtype)[6:]}", 8 * 255,
            lambda cast=cast: cast(ours.loss)(ids[:8, :-1], ids[:8, 1:]).backward(),
            lambda cast=cast: cast(theirs)(ids[:8], labels=ids[:8]).loss.backward())
    generation("16 x 128 tokens", ours, theirs, ids[:, :32], 128)
    generation("1 x 128 tokens", ours, theirs, ids[:1, :32], 128)
    generation("1 x 128 tokens, ours int8", quantize(ours), theirs, ids[:1, :32], 128)
    small = pair(vocab_size=260, d_model=96, num_layers=3, num_heads=3, d_ff=256)
    generation("rollouts of 0.4M parameters, 64 x 8 x 64 tokens", *small,
               torch.randint(260, (64, 24)), 64, 8, 1.0)


# ---- command line ------------------------------------------------------------------------------


def run_text(args):
    """`generate` and `chat`: load what --model names, print what it writes as it comes."""
    from tokenizer import Tokenizer
    dtype, draft = getattr(torch, args.dtype) if args.dtype else None, args.draft
    model = from_pretrained(args.model, dtype, args.device).eval()
    if draft and draft != "ngram":
        draft = from_pretrained(draft, dtype, args.device).eval()
    if args.int8:
        quantize(model)
    tokenizer, eos = Tokenizer.load(args.model), model.config.eos_token_id
    stop = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eot_id} - {None}

    def write(ids, seed=args.seed):
        """Print a continuation of ids; returns its text."""
        text, tokens = "", (token for _, token in model.stream(
            [ids], args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p,
            stop, seed, tokenizer=tokenizer, draft=draft))
        for piece in tokenizer.decode_stream(t for t in tokens if t not in stop):
            print(piece, end="", flush=True)
            text += piece
        print()
        return text

    if args.command == "generate":
        # A word's token begins with the blank before it: a blank that ends the prompt would be a
        # token that text never has there. In training a document begins after another's end.
        prompt = args.prompt.rstrip(" ")
        ids = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
        ids += tokenizer.encode(prompt)
        for i in range(args.samples):
            if args.samples > 1:
                print(f"--- sample {i + 1}")
            print(prompt, end="", flush=True)
            write(ids, args.seed + i)
        return
    messages = []
    print("Empty line or Ctrl-D ends the conversation.")
    while line := input("> "):
        messages.append({"role": "user", "content": line})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": write(tokenizer.encode(text))})


def main(argv=None):
    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **style)
    commands = p.add_subparsers(dest="command", required=True)
    for name, text in (("generate", "continue a prompt"),
                       ("chat", "talk to a model in the terminal")):
        g = commands.add_parser(name, help=text, **style)
        g.set_defaults(run=run_text)
        g.add_argument("--model", required=True, help="directory of config.json and weights")
        g.add_argument("--max-new-tokens", type=int, default=256, help="tokens to write at most")
        g.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest")
        g.add_argument("--top-k", type=int, default=0, help="draw from that many tokens; 0: all")
        g.add_argument("--top-p", type=float, default=0.95, help="draw from that much probability")
        g.add_argument("--min-p", type=float, default=0.0, help="of the likeliest's, at least")
        g.add_argument("--seed", type=int, default=0, help="of the random numbers")
        g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                       help="cpu or cuda")
        g.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                       help="of the weights; default: as saved")
        g.add_argument("--int8", action="store_true", help="weights as int8")
        g.add_argument("--draft", help="directory of a smaller model that guesses ahead, or ngram")
        if name == "generate":
            g.add_argument("--prompt", default="", help="text to continue")
            g.add_argument("--samples", type=int, default=1, help="number of continuations")
    a = commands.add_parser("account", help="parameters, FLOPs and memory by part", **style)
    a.set_defaults(run=run_account)
    a.add_argument("--model", required=True, help=f"directory, or one of {', '.join(GPT2_SIZES)}")
    b = commands.add_parser("bench", help="speed against transformers", **style)
    b.set_defaults(run=run_bench)
    args = p.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        return 2
    except EOFError:  # Ctrl-D
        print()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
