"""The model's hot loops as Triton kernels, each beside a plain torch twin that says what it does.

    python kernels.py bench              # every kernel against its peers on this machine's device
    python kernels.py bench --only norm  # the rows whose name contains a word
    python kernels.py bench --tune       # time other attention tiles on this GPU

A matrix multiply keeps a GPU busy; everything between two of them waits for memory. An H200 does
about 790 TFLOP/s in bf16 and moves 4.3 TB/s, so a loop that does fewer than 184 operations a byte
is paid for in bytes, and most of what a Transformer does outside its matmuls does about one. Every
kernel here is one idea: read once, keep what lies between on the chip, write once. Attention is
the deep case (a T x T matrix lies between, and a softmax stands in the way), so it comes first:
softmax in one pass, attention in tiles, the kernel forward, the kernel backward. Then the fusions:
norm, SwiGLU, RoPE, the loss, AdamW, experts, Muon.

Where there is no GPU the kernels run in Triton's interpreter, the very code that a GPU runs, if
slowly: `impl="triton"` asks for them, and the tests do. Otherwise CPU tensors take the twins
(`impl="torch"`). Attention's layout is (B, T, H, E), as a projection's output reshapes for free.

FlashAttention (arXiv 2205.14135), FlashAttention-2 (2307.08691), online softmax (1805.02867),
Flash-Decoding (2023), Liger Kernel (2410.10989), Cut Your Losses (2411.09009), Muon (2024).
"""

import argparse
import functools
import itertools
import math
import os
import statistics
import sys
import timeit
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

if not torch.cuda.is_available():  # Triton reads this when it is imported, so it is set before
    os.environ.setdefault("TRITON_INTERPRET", "1")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.language import constexpr  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
UPCAST = constexpr(INTERPRETED)  # the interpreter multiplies bf16 wrongly: it gets fp32
LOG2E, LN2 = constexpr(1 / math.log(2)), constexpr(math.log(2))  # exp(x) = exp2(x LOG2E): GPUs
PRECISION = constexpr("tf32x3")  # have exp2. fp32 products: 3 tensor-core ones, good to 2^-22

# (queries BM, keys BN, warps, pipeline stages) by head dimension, up to 64, 128 or 256. A
# table and not @triton.autotune: that may choose another tile tomorrow, another tile sums in
# another order, and a resumed run would not repeat its bits. `bench --tune` prints your GPU's best.
TILES = {
    "forward": {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)},
    "decode": dict.fromkeys((64, 128, 256), (16, 64, 4, 3)),
    "backward_q": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 1)},
    "backward_kv": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (64, 32, 8, 1)},
}


def _need(holds, what, *tensors):
    """Raise one line that says what a function takes and what it got."""
    if not holds:
        got = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in tensors if x is not None)
        raise ValueError(f"need {what}: got {got}")


def _use_triton(x, impl):
    """Kernels for CUDA tensors of 16 or 32 bits, twins for all else, unless `impl` says which."""
    fits = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if impl not in (None, "torch", "triton"):
        raise ValueError(f"impl={impl!r}: choose None, 'torch' or 'triton'")
    if impl == "triton" and not fits:
        raise ValueError(f"impl='triton' takes float32, bfloat16 or float16, not {x.dtype}")
    wanted = x.device.type == "cuda" if impl is None else impl == "triton"
    return wanted and fits and x.numel() > 0  # a launch of no programs is an error


def _attention_tiles(kernel, q):
    """The options BE, BM, BN, num_warps, num_stages for q's head dimension; tiny in a test."""
    BE = max(16, triton.next_power_of_2(q.shape[-1]))
    BM, BN, warps, stages = TILES[kernel][max(BE, 64)]
    if INTERPRETED:  # 33 positions are already several tiles and a ragged last one
        return dict(BE=BE, BM=16 if BM < BN else 32, BN=32 if BM < BN else 16)
    if q.dtype == torch.float32:  # twice the shared memory a number
        BM, BN, stages = max(BM // 2, 16), max(BN // 2, 32), 1
    return dict(BE=BE, BM=BM, BN=BN, num_warps=warps, num_stages=stages)


def _matmul_tiles(x):
    """Blocks of a tiled matmul: BM x BN of the result, BK deep; tiny in a test."""
    if INTERPRETED:
        return dict(BM=16, BN=16, BK=16)
    return dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=2 if x.dtype == torch.float32 else 3)


def _programs(x, per_sm):
    """How many persistent programs fill the device; few in a test, so that each loops."""
    if x.device.type != "cuda":
        return 3
    return per_sm * torch.cuda.get_device_properties(x.device).multi_processor_count


def _like(x):
    """Room for a contiguous result like x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows_whole(x):
    """x, copied only if the numbers of a row do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- softmax in one pass, then attention in tiles ------------------------------------------------
# Attention of T queries over T keys is 4 T^2 E operations a head (two matmuls; half that if causal)
# on 8 T E bytes of bf16 in and out: T/2 operations a byte. It is the T x T scores that spoil it.


def online_softmax(x):
    """Softmax of a vector seen one element at a time, keeping a running maximum and a running sum.

    When a larger maximum arrives, the sum so far is rescaled to it: sum_i exp(x_i - m) becomes
    sum_i exp(x_i - m') on multiplying by exp(m - m'). For x = [1, 3, 2] the pair (m, l) goes
    (1, 1), (3, 1 + e^-2), (3, 1 + e^-2 + e^-1). Milakov and Gimelshein 2018, algorithm 3.
    """
    m, l = torch.tensor(-math.inf, dtype=x.dtype), torch.tensor(0.0, dtype=x.dtype)
    for value in x:
        m_new = torch.maximum(m, value)
        l = l * torch.exp(m - m_new) + torch.exp(value - m_new)
        m = m_new
    return torch.exp(x - m) / l


FAR = 1 << 29  # more keys than any sequence has


def _bounds(causal, window):
    """How many keys to the (left, right) of its own position a query sees."""
    if window is not None and window < 1:
        raise ValueError(f"window={window}: give a number of keys >= 1")
    left = FAR if window is None else window - 1
    return left, 0 if causal else left


def _visible(Tq, Tk, left, right, device):
    """(Tq, Tk) bool: key j is seen by query i if i' - left <= j <= i' + right, i' = i + Tk - Tq."""
    ahead = torch.arange(Tk, device=device) - torch.arange(Tq, device=device)[:, None] - (Tk - Tq)
    return (ahead <= right) & (ahead >= -left)


def flash_attention_reference(q, k, v, *, causal=True, window=None, softcap=0.0, scale=None,
                              return_lse=False):
    """What flash_attention computes, with the whole score matrix in memory; same arguments."""
    (B, Tq, H, E), (Tk, K) = q.shape, k.shape[1:3]
    q = q.reshape(B, Tq, K, H // K, E)  # (B, Tq, H, E) -> (B, Tq, K, G, E), G heads share a kv head
    s = torch.einsum("btkge,bske->bkgts", q * (E**-0.5 if scale is None else scale), k)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s.masked_fill(~_visible(Tq, Tk, *_bounds(causal, window), q.device), -math.inf)
    lse = s.logsumexp(-1, keepdim=True)  # (B, K, G, Tq, 1)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0))  # a row that sees nothing: 0, not NaN
    o = torch.einsum("bkgts,bske->btkge", p, v).reshape(B, Tq, H, E)  # (B, Tq, K, G, E) -> ...
    lse = lse.reshape(B, H, Tq)
    return (o, lse) if return_lse else o


class FlashAttentionTorch(torch.autograd.Function):
    """Tiled attention in plain torch: FlashAttention-2, algorithms 1 (forward) and 2 (backward).

    `.apply(q, k, v, is_causal)` on (B, Tq, E), (B, Tk, E), (B, Tk, E), any float dtype; returns
    (B, Tq, E). Only q, k, v, the output and one (B, Tq) natural-log LSE are kept for the backward:
    the scores are computed again there, cheaper than reading T^2 of them back from memory.
    """

    @staticmethod
    def scores(q, k, i, is_causal, tile=32):
        """Yield ((B, M, N) scaled scores, slice of keys) for queries i .. i + tile."""
        keep = _visible(q.shape[1], k.shape[1], FAR, 0 if is_causal else FAR, q.device)
        for j in range(0, k.shape[1], tile):
            s = q[:, i : i + tile] @ k[:, j : j + tile].mT * q.shape[-1] ** -0.5
            yield s.masked_fill(~keep[i : i + tile, j : j + tile], -math.inf), slice(j, j + tile)

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False):
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        for i in range(0, q.shape[1], 32):
            m = torch.full_like(lse[:, i : i + 32], torch.finfo(q.dtype).min)  # (B, M) maximum
            l, acc = torch.zeros_like(m), torch.zeros_like(q[:, i : i + 32])  # (B, M), (B, M, E)
            for s, cols in FlashAttentionTorch.scores(q, k, i, is_causal):
                m_new = torch.maximum(m, s.amax(-1))
                p = torch.exp(s - m_new[..., None])  # (B, M, N)
                alpha = torch.exp(m - m_new)  # what the old maximum was too small by
                l = l * alpha + p.sum(-1)
                acc = acc * alpha[..., None] + p @ v[:, cols]
                m = m_new
            o[:, i : i + 32] = acc / l.masked_fill(l == 0, 1.0)[..., None]
            lse[:, i : i + 32] = m + torch.log(l)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.is_causal = is_causal
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        delta = (o * do).sum(-1)  # (B, Tq): sum_j p_j dp_j, all of the softmax's Jacobian we need
        lse = lse.masked_fill(lse == -math.inf, math.inf)  # a row that sees nothing: p = 0
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i in range(0, q.shape[1], 32):
            rows = slice(i, i + 32)
            for s, cols in FlashAttentionTorch.scores(q, k, i, ctx.is_causal):
                p = torch.exp(s - lse[:, rows, None])  # (B, M, N)
                dp = do[:, rows] @ v[:, cols].mT
                ds = p * (dp - delta[:, rows, None]) * q.shape[-1] ** -0.5
                dv[:, cols] += p.mT @ do[:, rows]
                dq[:, rows] += ds @ k[:, cols]
                dk[:, cols] += ds.mT @ q[:, rows]
        return dq, dk, dv, None


# ---- FlashAttention, forward ---------------------------------------------------------------------
# One program owns BM queries of one kv head and walks the keys: 4 BM BN E operations on the 4 BN E
# bytes of a tile of K and V, so BM = 128 queries give 128 a byte. That is L2's traffic; DRAM sees K
# and V about once, because the programs of one head run side by side.
#
# The G = H / K query heads of a kv head read the same keys, so they are rows of one tile: row r is
# query r // G of head r % G. Sequences lie one after another in (rows, heads, E) tensors, and a
# table says where each begins. That covers batches, packed documents and a decoder's cache alike.


@triton.jit
def _load(X, at, keep):
    x = tl.load(X + at, mask=keep, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _load_rows(X, at, keep, E, BE: constexpr):
    """(BT, BE): the E numbers from each of the offsets at (BT,) that keep (BT,) wants; else 0."""
    e = tl.arange(0, BE)
    return _load(X, at[:, None] + e[None, :], keep[:, None] & (e < E)[None, :])


@triton.jit
def _store_rows(X, x, at, keep, E, BE: constexpr):
    """The reverse of _load_rows."""
    e, keep = tl.arange(0, BE), keep[:, None]
    tl.store(X + at[:, None] + e[None, :], x.to(X.dtype.element_ty), mask=keep & (e < E)[None, :])


@triton.jit
def _sequence(TABLE, b):
    """(first row of q, queries, first row of k and v, keys) of sequence b."""
    TABLE += 4 * b
    q0, k0 = tl.load(TABLE).to(tl.int64), tl.load(TABLE + 2).to(tl.int64)
    return q0, tl.load(TABLE + 1), k0, tl.load(TABLE + 3)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2 * LOG2E)))  # right at +-inf, and needs no libdevice


@triton.jit
def _keep(i, j, Tq, Tk, left, right):
    """The mask of _visible for a tile; i and j broadcast against each other."""
    own = i + (Tk - Tq)
    return (i < Tq) & (j < Tk) & (j >= own - left) & (j <= own + right)


@triton.jit
def _edges(first, last, T, left, right, G: constexpr, TILE: constexpr):
    """What positions first .. last see of T others, in rows (G a position): some in [lo, a), all in
    [a, b), some in [b, hi). The middle needs no mask: 31 of a causal row's 32 tiles at T = 4096."""
    lo = tl.maximum(first - left, 0) * G // TILE * TILE
    hi = tl.maximum(tl.minimum(last + right + 1, T), 0) * G
    a = tl.minimum(tl.cdiv(tl.maximum(last - left, 0) * G, TILE) * TILE, hi)
    b = tl.maximum(tl.minimum(first + right + 1, T), 0) * G // TILE * TILE
    return lo, a, tl.maximum(a, b), hi


@triton.jit
def _online_step(m, l, s, scale2):
    """online_softmax's step for a tile of scores s (BM, BN), masked ones -inf, in powers of two.
    Returns the new (m, l), the tile's p, and what the old maximum was too small by."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale2)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: exp2(-inf - 0) = 0
    p = tl.exp2(s * scale2 - base[:, None])  # a fused multiply-add and an exp2
    alpha = tl.exp2(m - base)
    return m_new, l * alpha + tl.sum(p, 1), p, alpha


@triton.jit
def _flash_forward(Q, K, V, O, LSE, TABLE, sq, hq, sk, hk, sv, hv, rows, splits, left, right, scale,
                   scale_in, scale2, G: constexpr, CAP: constexpr, E: constexpr, BE: constexpr,
                   BM: constexpr, BN: constexpr):
    """o, lse for BM rows of a kv head, from one of `splits` shares of the keys that they see."""
    head, H = tl.program_id(1).to(tl.int64), tl.num_programs(1) * G
    split = tl.program_id(2) % splits
    q0, Tq, k0, Tk = _sequence(TABLE, tl.program_id(2) // splits)
    # Causal rows grow longer downwards: the longest first, so that the short ones fill the tail.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if m0 >= Tq * G:
        return
    Q += q0 * sq + head * G * hq
    r = m0 + tl.arange(0, BM)
    i, g = r // G, r % G
    q = _load_rows(Q, i.to(tl.int64) * sq + g * hq, i < Tq, E, BE)  # (BM, BE)
    K += k0 * sk + head * hk
    V += k0 * sv + head * hv
    acc = tl.zeros([BM, BE], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    last = (tl.minimum(m0 + BM, Tq * G) - 1) // G + Tk - Tq
    edges = _edges(m0 // G + Tk - Tq, last, Tk, left, right, 1, BN)
    share = tl.cdiv(tl.cdiv(edges[3] - edges[0], splits), BN) * BN
    begin = edges[0] + split * share
    for phase in tl.static_range(3):  # unrolled: masked, free, masked
        start = tl.maximum(edges[phase], begin)
        for j0 in range(start, tl.minimum(edges[phase + 1], begin + share), BN):
            j = j0 + tl.arange(0, BN)
            k = _load_rows(K, j.to(tl.int64) * sk, j < Tk, E, BE)  # (BN, BE)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BM, BN)
            if CAP:
                s = _tanh(s * scale_in)
            if phase != 1:
                keep = _keep(i[:, None], j[None, :], Tq, Tk, left, right)
                s = tl.where(keep, s, float("-inf"))
            v = _load_rows(V, j.to(tl.int64) * sv, j < Tk, E, BE)  # (BN, BE)
            m, l, p, alpha = _online_step(m, l, s, scale2)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    l = tl.where(l == 0.0, 1.0, l)  # saw nothing: output 0 and an LSE of m = -inf
    O += ((split.to(tl.int64) * rows + q0) * H + head * G) * E
    LSE += (split.to(tl.int64) * H + head * G) * rows + q0
    _store_rows(O, acc / l[:, None], (i.to(tl.int64) * H + g) * E, i < Tq, E, BE)
    tl.store(LSE + g.to(tl.int64) * rows + i, (m + tl.log2(l)) * LN2, mask=i < Tq)


# ---- FlashAttention, backward --------------------------------------------------------------------
# With p = exp(s - lse), o = p v:  dv = p' do,  dp = do v',  ds = p (dp - delta),  dq = ds k,
# dk = ds' q, where delta = rowsum(do * o). dk and dv sum over queries, dq over keys: each gets a
# kernel that owns its rows, so that nothing is added atomically and the bits repeat. The price is
# that s and dp are computed in both: 7 tile matmuls where 5 are counted, at most 71 % of the rate.
# A gradient that arrives at the LSE (ring attention's merge) adds p dlse to ds: delta - dlse.


@triton.jit
def _score_gradient(s, dp, lse, delta, keep, scale_in, scale2, CAP: constexpr, MASK: constexpr):
    """(p, ds) of a tile of raw scores s, either way round; ds still lacks the scale."""
    slope = 1.0
    if CAP:
        s = _tanh(s * scale_in)
        slope = 1.0 - s * s
    p = tl.exp2(s * scale2 - lse * LOG2E)
    if MASK:
        p = tl.where(keep, p, 0.0)  # also where lse = -inf, and p = inf: such a row sees nothing
    return p, p * (dp - delta) * slope


@triton.jit
def _flash_backward_q(Q, K, V, O, LSE, DO, DLSE, DELTA, DQ, TABLE, sq, hq, sk, hk, sv, hv, rows,
                      splits, left, right, scale, scale_in, scale2, G: constexpr, CAP: constexpr,
                      E: constexpr, BE: constexpr, BM: constexpr, BN: constexpr):
    """dq and delta for BM rows of a kv head, walking the keys as the forward does."""
    head, H = tl.program_id(1).to(tl.int64), tl.num_programs(1) * G
    q0, Tq, k0, Tk = _sequence(TABLE, tl.program_id(2))
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if m0 >= Tq * G:
        return
    r = m0 + tl.arange(0, BM)
    i, g = r // G, r % G
    at = (head * G + g) * rows + q0 + i
    at_o = ((q0 + i) * H + head * G + g) * E
    q = _load_rows(Q, (q0 + i) * sq + (head * G + g) * hq, i < Tq, E, BE)  # (BM, BE)
    do = _load_rows(DO, at_o, i < Tq, E, BE)
    o = _load_rows(O, at_o, i < Tq, E, BE)
    lse = tl.load(LSE + at, mask=i < Tq, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    delta -= tl.load(DLSE + at, mask=i < Tq, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)  # merging by an LSE of -inf sends back NaN
    tl.store(DELTA + at, delta, mask=i < Tq)
    K += k0 * sk + head * hk
    V += k0 * sv + head * hv
    dq = tl.zeros([BM, BE], tl.float32)
    last = (tl.minimum(m0 + BM, Tq * G) - 1) // G + Tk - Tq
    edges = _edges(m0 // G + Tk - Tq, last, Tk, left, right, 1, BN)
    for phase in tl.static_range(3):
        for j0 in range(edges[phase], edges[phase + 1], BN):
            j = j0 + tl.arange(0, BN)
            k = _load_rows(K, j.to(tl.int64) * sk, j < Tk, E, BE)  # (BN, BE)
            v = _load_rows(V, j.to(tl.int64) * sv, j < Tk, E, BE)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BM, BN)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            keep = _keep(i[:, None], j[None, :], Tq, Tk, left, right)
            _, ds = _score_gradient(s, dp, lse[:, None], delta[:, None], keep, scale_in, scale2,
                                    CAP, phase != 1)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store_rows(DQ, dq * scale, at_o, i < Tq, E, BE)


@triton.jit
def _flash_backward_kv(Q, K, V, LSE, DO, DELTA, DK, DV, TABLE, sq, hq, sk, hk, sv, hv, rows, splits,
                       left, right, scale, scale_in, scale2, G: constexpr, CAP: constexpr,
                       E: constexpr, BE: constexpr, BM: constexpr, BN: constexpr):
    """dk and dv for BN keys of a kv head, walking its query rows, transposed (keys x queries), so
    that p' and ds' go from registers straight into the second matmuls."""
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    q0, Tq, k0, Tk = _sequence(TABLE, tl.program_id(2))
    n0 = tl.program_id(0) * BN  # causal: the first keys have the most queries, and go first
    if n0 >= Tk:
        return
    j = n0 + tl.arange(0, BN)
    k = _load_rows(K, (k0 + j) * sk + head * hk, j < Tk, E, BE)  # (BN, BE)
    v = _load_rows(V, (k0 + j) * sv + head * hv, j < Tk, E, BE)
    dk = tl.zeros([BN, BE], tl.float32)
    dv = tl.zeros([BN, BE], tl.float32)
    # What a key is seen by lies as far to its right as the query sees to the left.
    Q += q0 * sq + head * G * hq
    DO += (q0 * heads + head) * G * E
    LSE += head * G * rows + q0
    DELTA += head * G * rows + q0
    own = n0 - (Tk - Tq)
    edges = _edges(own, tl.minimum(own + BN, Tq) - 1, Tq, right, left, G, BM)
    for phase in tl.static_range(3):
        for r0 in range(edges[phase], edges[phase + 1], BM):
            r = r0 + tl.arange(0, BM)
            i, g = r // G, (r % G).to(tl.int64)
            at = g * rows + i
            q = _load_rows(Q, i.to(tl.int64) * sq + g * hq, i < Tq, E, BE)  # (BM, BE)
            do = _load_rows(DO, (i.to(tl.int64) * heads * G + g) * E, i < Tq, E, BE)
            lse = tl.load(LSE + at, mask=i < Tq, other=0.0)[None, :]
            delta = tl.load(DELTA + at, mask=i < Tq, other=0.0)[None, :]
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BN, BM)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            keep = _keep(i[None, :], j[:, None], Tq, Tk, left, right)
            p, ds = _score_gradient(s, dp, lse, delta, keep, scale_in, scale2, CAP, phase != 1)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    at = ((k0 + j) * heads + head) * E
    _store_rows(DK, dk * scale, at, j < Tk, E, BE)
    _store_rows(DV, dv, at, j < Tk, E, BE)


# ---- FlashAttention, the functions people call ---------------------------------------------------
# Besides q (rows, H, E) and k, v (rows, K, E) the kernels need a `problem`: the table of sequences,
# (n, 4): first row of q, queries, first row of k and v, keys; the most queries and the most keys of
# one; how many keys to the (left, right) of its own a query sees; the scale; the softcap.


@functools.lru_cache(maxsize=64)
def _batch_table(B, Tq, Tk, device):
    """The table of B sequences of equal lengths, int32."""
    b = torch.arange(B, device=device, dtype=torch.int32)
    return torch.stack([b * Tq, torch.full_like(b, Tq), b * Tk, torch.full_like(b, Tk)], 1)


def _launch_attention(kernel, name, q, k, v, tensors, problem, splits=1):
    """Launch a kernel: a program for each tile of rows (or keys), kv head and sequence."""
    table, Tq, Tk, (left, right), scale, softcap = problem
    tiles, (K, G) = _attention_tiles(name, q), (k.shape[1], q.shape[1] // k.shape[1])
    rows = triton.cdiv(Tk, tiles["BN"]) if "kv" in name else triton.cdiv(Tq * G, tiles["BM"])
    grid = rows, K, len(table) * splits
    before, after = (scale / softcap, softcap) if softcap else (0.0, scale)  # of tanh
    if math.prod(grid):
        kernel[grid](q, k, v, *tensors, table, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                     len(q), splits, left, right, scale, before, after / math.log(2), G=G,
                     CAP=bool(softcap), E=q.shape[2], **tiles)


class _Flash(torch.autograd.Function):
    """q (rows, H, E), k and v (rows, K, E) -> o like q, lse (H, rows) fp32."""

    @staticmethod
    def forward(ctx, q, k, v, problem):
        q, k, v = (_rows_whole(x) for x in (q, k, v))
        o, lse = _like(q), torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)
        _launch_attention(_flash_forward, "forward", q, k, v, (o, lse), problem)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv, delta = _like(q), _like(k), _like(v), torch.empty_like(lse)
        do = torch.zeros_like(o) if do is None else do.contiguous()
        dlse = torch.zeros_like(lse) if dlse is None else dlse.contiguous()
        _launch_attention(_flash_backward_q, "backward_q", q, k, v, (o, lse, do, dlse, delta, dq),
                          ctx.problem)
        _launch_attention(_flash_backward_kv, "backward_kv", q, k, v, (lse, do, delta, dk, dv),
                          ctx.problem)
        return dq, dk, dv, None


class FlashAttentionTriton(_Flash):
    """The kernels under FlashAttentionTorch's contract: `.apply(q, k, v, is_causal)`, (B, T, E).
    A batch of one-headed sequences is one sequence with B heads, whose LSE is (B, Tq)."""

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False):
        Tq, Tk, E = q.shape[1], *k.shape[1:]
        problem = (_batch_table(1, Tq, Tk, q.device), Tq, Tk, _bounds(is_causal, None), E**-0.5, 0)
        heads = (x.transpose(0, 1) for x in (q, k, v))  # (B, T, E) -> (T, B, E)
        return _Flash.forward(ctx, *heads, problem)[0].transpose(0, 1)

    @staticmethod
    def backward(ctx, do):
        dq, dk, dv, _ = _Flash.backward(ctx, do.transpose(0, 1), None)
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1), None


def _check_attention(q, k, v, dims, scale):
    _need(q.dim() == k.dim() == v.dim() == dims and q.dtype == k.dtype == v.dtype
          and k.shape == v.shape and 1 <= q.shape[-1] == k.shape[-1] <= 256
          and k.shape[-2] and q.shape[-2] % k.shape[-2] == 0 and (dims == 3 or len(q) == len(k)),
          f"q, k, v that share a dtype, {dims} dimensions, batch and d_head (1 to 256), k like v, "
          "q's heads a multiple of k's", q, k, v)
    if scale is not None and scale <= 0:
        raise ValueError(f"scale={scale}: must be above 0")


def _heads_first(function, *inputs, **options):
    """(B, T, H, E) in and out of torch's attention functions, which take (B, H, T, E)."""
    heads_first = (x.transpose(1, 2) for x in inputs)
    return function(*heads_first, enable_gqa=True, **options).transpose(1, 2)


def flash_attention(q, k, v, *, causal=True, window=None, softcap=0.0, scale=None,
                    return_lse=False, impl=None):
    """Softmax attention that never holds the (Tq, Tk) scores.

    q (B, Tq, H, E), k and v (B, Tk, K, E) with H a multiple of K: query head h reads kv head
    h // (H / K), nothing is copied. fp32, bf16 or fp16; E up to 256, any T. Returns (B, Tq, H, E),
    and with return_lse also the natural log-sum-exp of the scores, fp32 (B, H, Tq), through which
    gradients flow (ring attention merges partial results by it).

    causal aligns bottom-right: the last query sees the last key. window=W: a query sees the W keys
    up to its own (and W - 1 after it unless causal). softcap c: scores become c tanh(s / c). scale
    defaults to E^-0.5. A query that sees no key gives 0 and an LSE of -inf. Deterministic to the
    bit. FlashAttention-2, algorithms 1 and 2.
    """
    _check_attention(q, k, v, 4, scale)
    (B, Tq, H, E), Tk = q.shape, k.shape[1]
    if _use_triton(q, impl):
        problem = (_batch_table(B, Tq, Tk, q.device), Tq, Tk, _bounds(causal, window),
                   scale or E**-0.5, softcap)
        o, lse = _Flash.apply(*(x.flatten(0, 1) for x in (q, k, v)), problem)  # (B T, heads, E)
        o, lse = o.view(q.shape), lse.view(H, B, Tq).transpose(0, 1)  # (H, B Tq) -> (B, H, Tq)
        return (o, lse) if return_lse else o
    if impl is None and window is None and not (softcap or return_lse or causal and Tq != Tk):
        return _heads_first(F.scaled_dot_product_attention, q, k, v, is_causal=causal, scale=scale)
    return flash_attention_reference(q, k, v, causal=causal, window=window, softcap=softcap,
                                     scale=scale, return_lse=return_lse)


def flash_attention_varlen_reference(q, k, v, cu_seqlens, **options):
    """flash_attention_reference of each document by itself; q, k, v (total, heads, E)."""
    parts = [
        flash_attention_reference(*(x[None, a:b] for x in (q, k, v)), return_lse=True, **options)
        for a, b in itertools.pairwise(cu_seqlens.tolist())]
    return torch.cat([o[0] for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)


def flash_attention_varlen(q, k, v, cu_seqlens, max_seqlen, *, causal=True, window=None,
                           softcap=0.0, scale=None, return_lse=False, impl=None):
    """flash_attention over documents packed end to end, none of which sees another.

    q (total, H, E), k and v (total, K, E). Document b is rows cu_seqlens[b] to cu_seqlens[b + 1]
    (integers (documents + 1,), from 0 to total), at most max_seqlen, perhaps none: [0, 2, 2, 5] are
    documents of 2, 0 and 3 tokens. Returns (total, H, E), and with return_lse also (H, total). The
    rest as flash_attention.
    """
    _check_attention(q, k, v, 3, scale)
    if _use_triton(q, impl):
        start, length = cu_seqlens[:-1], cu_seqlens.diff()
        table = torch.stack([start, length, start, length], 1).to(torch.int32)
        o, lse = _Flash.apply(q, k, v, (table, max_seqlen, max_seqlen, _bounds(causal, window),
                                        scale or q.shape[-1] ** -0.5, softcap))
    else:
        o, lse = flash_attention_varlen_reference(q, k, v, cu_seqlens, causal=causal, window=window,
                                                  softcap=softcap, scale=scale)
    return (o, lse) if return_lse else o


# ---- decoding: a few queries against a long cache ------------------------------------------------
# 4 E operations a cached number of 4 E bytes: the cache must be read once, at full bandwidth. One
# query row fills no GPU, so the forward's keys are split among programs, each of which returns a
# partial output and its LSE. Merged, they are the whole: ring attention within one GPU.


def flash_decode_reference(q, k_cache, v_cache, cache_seqlens=None, **options):
    """flash_attention_reference of each sequence against the filled part of its cache."""
    lengths = [k_cache.shape[1]] * len(q) if cache_seqlens is None else cache_seqlens.tolist()
    return torch.cat([
        flash_attention_reference(q[b, None], k_cache[b, None, :n], v_cache[b, None, :n], **options)
        for b, n in enumerate(lengths)])


@triton.jit
def _decode_merge(PART, LSE, O, splits, E: constexpr, BE: constexpr, BS: constexpr):
    """o = sum_s exp(lse_s - lse) part_s for one head of one row."""
    row, h, s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BS)
    rows, H = tl.num_programs(0), tl.num_programs(1)
    lse = tl.load(LSE + (s * H + h) * rows + row, mask=s < splits, other=float("-inf"))
    m = tl.max(lse, 0)
    w = tl.exp2((lse - tl.where(m == float("-inf"), 0.0, m)) * LOG2E)  # (BS,)
    part = _load_rows(PART, ((s * rows + row) * H + h) * E, s < splits, E, BE)  # (BS, BE)
    total, e = tl.sum(w, 0), tl.arange(0, BE)
    o = tl.sum(part * w[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(O + (row * H + h) * E + e, o.to(O.dtype.element_ty), mask=e < E)


def flash_decode(q, k_cache, v_cache, cache_seqlens=None, *, window=None, softcap=0.0, scale=None,
                 num_splits=None, impl=None):
    """Causal attention of the last few queries against a cache of keys; no backward.

    q (B, Tq, H, E): the last Tq tokens, whose keys are already in the cache. k_cache, v_cache
    (B, S, K, E), of the same strides or else copied; sequence b has cache_seqlens[b] keys ((B,)
    integers; None: all S). num_splits: parts to cut the keys into (default: enough to fill the
    device). The rest as flash_attention. Returns (B, Tq, H, E). Flash-Decoding (Dao et al., 2023).
    """
    _check_attention(q, k_cache, v_cache, 4, scale)
    if not _use_triton(q, impl):
        return flash_decode_reference(q, k_cache, v_cache, cache_seqlens, window=window,
                                      softcap=softcap, scale=scale)
    (B, Tq, H, E), (S, K) = q.shape, k_cache.shape[1:3]
    sb, st, _, se = k_cache.stride()
    if k_cache.stride() != v_cache.stride() or se != 1 or st == 0 or sb % st:
        k_cache, v_cache, (sb, st) = k_cache.contiguous(), v_cache.contiguous(), (S, 1)
    table = _batch_table(B, Tq, sb // st, q.device).clone()
    table[:, 3] = S if cache_seqlens is None else cache_seqlens
    problem = table, Tq, S, _bounds(True, window), scale or E**-0.5, softcap
    tiles = _attention_tiles("decode", q)
    wanted = triton.cdiv(_programs(q, 2), B * K) if num_splits is None else num_splits
    splits = max(1, min(wanted, triton.cdiv(S, tiles["BN"]), 128))
    o, rows = _like(q), q.flatten(0, 1).contiguous()  # (B Tq, H, E)
    part = o if splits == 1 else torch.empty(splits, *q.shape, device=q.device)
    lse = torch.empty(splits, H, B * Tq, device=q.device)
    _launch_attention(_flash_forward, "decode", rows, k_cache[0], v_cache[0], (part, lse), problem,
                      splits)
    if splits > 1:
        _decode_merge[B * Tq, H](part, lse, o, splits, E=E, BE=tiles["BE"],
                                 BS=triton.next_power_of_2(splits))
    return o


# ---- RMSNorm with the residual add ---------------------------------------------------------------
# About 4 operations a number, on 4 bytes of bf16 in and out (8 with a residual): pure bandwidth.


def rms_norm_reference(x, weight, eps=1e-5, residual=None):
    """y = x / sqrt(mean(x^2) + eps) * weight; with residual, of x + residual, returned too."""
    if residual is not None:
        x = x + residual
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (y if weight is None else y * weight).to(x.dtype)
    return y if residual is None else (y, x)


@triton.jit
def _rms_forward(X, RES, W, Y, SUM, RSTD, N, eps, D: constexpr, BD: constexpr, BR: constexpr,
                 HAS_RES: constexpr):
    r, c = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BD)
    x = _load_rows(X, r * D, r < N, D, BD).to(tl.float32)  # (BR, BD)
    if HAS_RES:
        x += _load_rows(RES, r * D, r < N, D, BD).to(tl.float32)
        _store_rows(SUM, x, r * D, r < N, D, BD)
        x = x.to(SUM.dtype.element_ty).to(tl.float32)  # the norm of what the next layer will read
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    w = tl.load(W + c, mask=c < D, other=0.0).to(tl.float32)
    _store_rows(Y, x * rstd[:, None] * w[None, :], r * D, r < N, D, BD)
    tl.store(RSTD + r, rstd, mask=r < N)


@triton.jit
def _rms_backward(X, W, DY, DSUM, RSTD, DX, DW, N, D: constexpr, BD: constexpr, BR: constexpr,
                  HAS_RES: constexpr):
    """A persistent grid: a program walks many rows and keeps its share of dw in registers, so the
    weight's gradient costs one row a program, and no atomics."""
    c = tl.arange(0, BD)
    dw = tl.zeros([BD], tl.float32)
    w = tl.load(W + c, mask=c < D, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, BR), tl.num_programs(0)):
        r = (tile * BR + tl.arange(0, BR)).to(tl.int64)
        rstd = tl.load(RSTD + r, mask=r < N, other=0.0)[:, None]
        x = _load_rows(X, r * D, r < N, D, BD).to(tl.float32) * rstd  # (BR, BD)
        dy = _load_rows(DY, r * D, r < N, D, BD).to(tl.float32)
        dw += tl.sum(dy * x, 0)
        dy *= w[None, :]
        dx = (dy - x * (tl.sum(dy * x, 1) / D)[:, None]) * rstd
        if HAS_RES:
            dx += _load_rows(DSUM, r * D, r < N, D, BD).to(tl.float32)
        _store_rows(DX, dx, r * D, r < N, D, BD)
    tl.store(DW + tl.program_id(0) * D + c, dw, mask=c < D)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        x, D, has_res = x.contiguous(), x.shape[-1], residual is not None
        residual, total = (residual.contiguous(), _like(x)) if has_res else (x, x)
        y, rstd = _like(x), torch.empty(x.numel() // D, dtype=torch.float32, device=x.device)
        BD = triton.next_power_of_2(D)
        BR = max(1, (64 if INTERPRETED else 4096) // BD)  # 16 to 64 numbers a thread
        ctx.tiles = dict(D=D, BD=BD, BR=BR, num_warps=max(1, min(BD * BR // 512, 32)))
        _rms_forward[(triton.cdiv(len(rstd), BR),)](x, residual, weight, y, total, rstd, len(rstd),
                                                   eps, HAS_RES=has_res, **ctx.tiles)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return y, total if has_res else None

    @staticmethod
    def backward(ctx, dy, dsum):
        x, weight, rstd = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        more = dy if dsum is None else dsum.contiguous()  # not read if None
        grid = min(_programs(x, 4), triton.cdiv(len(rstd), ctx.tiles["BR"]))
        dx, dw = _like(x), torch.empty(grid, len(weight), dtype=torch.float32, device=x.device)
        _rms_backward[(grid,)](x, weight, dy, more, rstd, dx, dw, len(rstd),
                               HAS_RES=dsum is not None, **ctx.tiles)
        return dx, dw.sum(0).to(weight.dtype), None, dx if ctx.needs_input_grad[3] else None


def rms_norm(x, weight, eps=1e-5, residual=None, *, impl=None):
    """RMSNorm over the last dimension, in fp32 whatever the dtype (arXiv 1910.07467, eq. 4).

    x (..., D), weight (D,) or None. With residual (..., D) it normalises s = x + residual and
    returns (y, s): a pre-norm block's add and next norm in one pass. D up to 32,768.
    """
    alike = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    _need(alike and (weight is None or weight.shape == x.shape[-1:]),
          "x (..., D), weight (D,) and a residual like x", x, weight, residual)
    if not _use_triton(x, impl) or x.shape[-1] > 32768:
        return rms_norm_reference(x, weight, eps, residual)
    weight = x.new_ones(x.shape[-1]) if weight is None else weight.contiguous()
    y, total = _RMSNorm.apply(x, weight, eps, residual)
    return y if residual is None else (y, total)


# ---- SwiGLU --------------------------------------------------------------------------------------
# 5 operations a number on 6 bytes of bf16 forward, 10 backward. silu(gate) is computed again there.


def swiglu_reference(gate, up):
    """silu(gate) * up, silu(x) = x / (1 + exp(-x)) (arXiv 2002.05202, eq. 6)."""
    return F.silu(gate) * up


@triton.jit
def _swiglu_kernel(GATE, UP, DY, OUT, DUP, s_gate, s_up, D, BD: constexpr, BACKWARD: constexpr):
    """OUT is y or, BACKWARD, the gradient of the gate."""
    r, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    keep = c < D
    gate = tl.load(GATE + r * s_gate + c, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(UP + r * s_up + c, mask=keep, other=0.0).to(tl.float32)
    sig = 1.0 / (1.0 + tl.exp2(-gate * LOG2E))
    out = gate * sig * up
    if BACKWARD:
        dy = tl.load(DY + r * D + c, mask=keep, other=0.0).to(tl.float32)
        out = dy * up * sig * (1.0 + gate * (1.0 - sig))
        tl.store(DUP + r * D + c, (dy * gate * sig).to(DUP.dtype.element_ty), mask=keep)
    tl.store(OUT + r * D + c, out.to(OUT.dtype.element_ty), mask=keep)


class _SwiGLU(torch.autograd.Function):
    """gate, up (N, F) with any row stride -> y or, given dy, (dgate, dup); contiguous."""

    @staticmethod
    def forward(ctx, gate, up, dy):
        out, BD = _like(gate), 32 if INTERPRETED else 2048
        dup = out if dy is None else _like(up)
        _swiglu_kernel[len(gate), triton.cdiv(gate.shape[1], BD)](
            gate, up, out if dy is None else dy, out, dup, gate.stride(0), up.stride(0),
            gate.shape[1], BD=BD, BACKWARD=dy is not None)
        ctx.save_for_backward(gate, up)
        return out if dy is None else (out, dup)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *_SwiGLU.apply(*ctx.saved_tensors, dy.contiguous()), None


def swiglu(gate, up, *, impl=None):
    """silu(gate) * up in one pass each way; gate and up (..., F), also two halves of one tensor."""
    _need(gate.shape == up.shape and gate.dtype == up.dtype,
          "gate and up of the same shape and dtype", gate, up)
    if not _use_triton(gate, impl):
        return swiglu_reference(gate, up)
    rows = (_rows_whole(x.reshape(-1, x.shape[-1])) for x in (gate, up))  # (..., F) -> (N, F)
    return _SwiGLU.apply(*rows, None).view(gate.shape)


# ---- RoPE ----------------------------------------------------------------------------------------
# 3 operations a number on 4 bytes of bf16. A token's angles are read once for all its heads.


def apply_rope_reference(q, k, cos, sin, positions=None, interleaved=False):
    """Rotate pair i of each head by the angle of row `positions`: (a, b) -> (ac - bs, bc + as)."""
    T = q.shape[1]
    rows = slice(0, T) if positions is None else positions.reshape(-1, T)  # (1 or B, T)
    cos, sin = (x[rows].reshape(-1, T, 1, x.shape[-1]) for x in (cos, sin))  # (1 or B, T, 1, E/2)

    def rotate(x):
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        pair = [(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)]
        return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)

    return rotate(q), rotate(k)


@triton.jit
def _rotate(X, Y, s_h, cos, sin, H: constexpr, BH: constexpr, HALF: constexpr, BHALF: constexpr,
            INTERLEAVED: constexpr):
    """Rotate the H heads of one token, (H, E) at X with head stride s_h, into Y, contiguous."""
    h = tl.arange(0, BH)[:, None]
    if INTERLEAVED:  # load whole rows and part them in registers: every byte of a line is used
        e = tl.arange(0, 2 * BHALF)[None, :]
        keep = (h < H) & (e < 2 * HALF)
        x = tl.load(X + h * s_h + e, mask=keep, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BH, BHALF, 2)))  # (BH, 2 BHALF) -> two of (BH, BHALF)
        y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BH, 2 * BHALF))
        tl.store(Y + h * (2 * HALF) + e, y.to(Y.dtype.element_ty), mask=keep)
    else:
        e = tl.arange(0, BHALF)[None, :]
        keep = (h < H) & (e < HALF)
        a = tl.load(X + h * s_h + e, mask=keep, other=0.0).to(tl.float32)
        b = tl.load(X + h * s_h + e + HALF, mask=keep, other=0.0).to(tl.float32)
        Y += h * (2 * HALF) + e
        tl.store(Y, (a * cos - b * sin).to(Y.dtype.element_ty), mask=keep)
        tl.store(Y + HALF, (b * cos + a * sin).to(Y.dtype.element_ty), mask=keep)


@triton.jit
def _rope_kernel(Q, K, YQ, YK, COS, SIN, POS, sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, pos_b, sign,
                 INTERLEAVED: constexpr, H: constexpr, KV: constexpr, BH: constexpr, BKV: constexpr,
                 HALF: constexpr, BHALF: constexpr):
    """One program a token (t, b), all heads of q and k."""
    t, b, e = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, BHALF)
    at = tl.load(POS + b * pos_b + t).to(tl.int64) * HALF + e
    cos = tl.load(COS + at, mask=e < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + at, mask=e < HALF, other=0.0).to(tl.float32)[None, :] * sign
    Q, K, token = Q + b * sq_b + t * sq_t, K + b * sk_b + t * sk_t, b * tl.num_programs(0) + t
    _rotate(Q, YQ + token * (H * 2 * HALF), sq_h, cos, sin, H, BH, HALF, BHALF, INTERLEAVED)
    _rotate(K, YK + token * (KV * 2 * HALF), sk_h, cos, sin, KV, BKV, HALF, BHALF, INTERLEAVED)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, interleaved, sign):
        q, k = _rows_whole(q), _rows_whole(k)
        (B, T, H, E), K, power = q.shape, k.shape[2], triton.next_power_of_2
        outs = _like(q), _like(k)
        _rope_kernel[T, B](q, k, *outs, cos, sin, positions, *q.stride()[:3], *k.stride()[:3],
                           0 if len(positions) == 1 else T, sign, INTERLEAVED=interleaved, H=H,
                           KV=K, BH=power(H), BKV=power(K), HALF=E // 2, BHALF=power(E // 2))
        ctx.save_for_backward(cos, sin, positions)
        ctx.how = interleaved, -sign
        return outs

    @staticmethod
    def backward(ctx, dq, dk):  # a rotation's transpose is the rotation back
        return *_Rope.apply(dq, dk, *ctx.saved_tensors, *ctx.how), *[None] * 5


def apply_rope(q, k, cos, sin, positions=None, interleaved=False, *, impl=None):
    """Rotary position embedding of q (B, T, H, E) and k (B, T, K, E) in one launch (2104.09864).

    cos, sin (rows, E/2), without gradients; token t of sequence b takes row positions[b, t], or
    row t. positions: integers (T,) or (B, T). Pairs are (i, i + E/2), as in Llama checkpoints of
    Hugging Face, or (2i, 2i + 1) if interleaved, as in the paper. Returns new q and k.
    """
    B, T, _, E = q.shape
    enough = len(cos) >= T if positions is None else positions.numel() in (T, B * T)
    positions = torch.arange(T, device=q.device) if positions is None else positions
    _need(enough and cos.shape == sin.shape and 2 * cos.shape[-1] == E and k.shape[:2] == (B, T),
          f"q and k ({B}, {T}, heads, even E), cos and sin (rows, {E // 2}), positions ({T},) or "
          f"({B}, {T}) or a row for each token", q, k, cos, sin, positions)
    if not _use_triton(q, impl):
        return apply_rope_reference(q, k, cos, sin, positions, interleaved)
    positions = positions.reshape(-1, T).contiguous()
    return _Rope.apply(q, k, cos.contiguous(), sin.contiguous(), positions, interleaved, 1.0)


# ---- the output layer and its loss ---------------------------------------------------------------
# Three matmuls, 6 N D V operations. The naive path also keeps N V logits (8 GB at 16k tokens and
# V = 131,072) twice. Instead a chunk of tokens at a time: its logits, then one pass that turns them
# into their own gradient where they lie, then the two matmuls of the backward, already in forward:
# the loss is a sum, so its gradient is known up to the scalar that arrives later. A token's loss
# needs three numbers of its logits: their log-sum-exp, the target's, and (to smooth) their sum.


def linear_cross_entropy_reference(x, weight, targets, *, ignore_index=-100, z_loss=0.0,
                                   softcap=0.0, label_smoothing=0.0, reduction="mean",
                                   return_logprobs=False):
    """What linear_cross_entropy computes, all logits in memory; same arguments."""
    logits, t = (x @ weight.t()).flatten(0, -2), targets.flatten()  # (N, V), (N,)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    nll = functools.partial(F.cross_entropy, logits, t, ignore_index=ignore_index, reduction="none")
    valid = t != ignore_index
    loss = nll(label_smoothing=label_smoothing) + z_loss * logits.logsumexp(-1).square() * valid
    if reduction == "none":
        loss = loss.view(targets.shape)
    else:
        loss = loss.sum() / (valid.sum().clamp_min(1) if reduction == "mean" else 1)
    return (loss, -nll().view(targets.shape).detach()) if return_logprobs else loss


def _loss_rows_reference(logits, t, scale, opts, grad):
    """_loss_rows in torch: (3, N), and logits (N, V) overwritten by scale (N,) dloss, if grad."""
    z_loss, cap, smoothing = opts
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))  # fp32: itself
    if cap:
        z = z.div_(cap).tanh_().mul_(cap)
    at = t.clamp(0, z.shape[1] - 1)[:, None]
    stats = torch.stack([z.logsumexp(-1), z.gather(1, at)[:, 0], z.sum(-1)])
    if grad:
        slope = 1 - (z / cap).square() if cap else None
        lse, scale = stats[0, :, None], scale[:, None]
        g = z.sub_(lse).exp_().mul_(scale * (1 + 2 * z_loss * lse))
        if smoothing:
            g.sub_(scale * smoothing / z.shape[1])
        g.scatter_add_(1, at, scale * (smoothing - 1))
        logits.copy_(g.mul_(slope) if cap else g)
    return stats


@triton.jit
def _logit_tile(X, W, n, v, N, V, stride, cap, D: constexpr, FUSED: constexpr, CAP: constexpr,
                BK: constexpr):
    """(BM, BN) logits of tokens n and words v: x w' or, unless FUSED, the (N, V) of X. There rows
    are `stride` long, V rounded up, so that loads stay 16 bytes wide."""
    if FUSED:
        z = tl.zeros([n.shape[0], v.shape[0]], tl.float32)
        for d0 in range(0, D, BK):
            x = _load_rows(X + d0, n.to(tl.int64) * D, n < N, D - d0, BK)  # (BM, BK)
            w = _load_rows(W + d0, v.to(tl.int64) * D, v < V, D - d0, BK)  # (BN, BK)
            z = tl.dot(x, tl.trans(w), z, input_precision=PRECISION)
    else:
        at = n.to(tl.int64)[:, None] * stride + v[None, :]
        z = tl.load(X + at, mask=(n < N)[:, None] & (v < stride)[None, :], other=0.0).to(tl.float32)
    return cap * _tanh(z / cap) if CAP else z


@triton.jit
def _logit_gradient(z, v, t, lse, scale, V, z_loss, cap, smoothing, CAP: constexpr):
    """scale dloss / dlogits: (p (1 + 2 z_loss lse) - smoothed one-hot) * the cap's slope."""
    p = tl.exp2((z - lse) * LOG2E)
    hot = smoothing / V + tl.where(v == t, 1.0 - smoothing, 0.0)
    g = (p * (1.0 + 2.0 * z_loss * lse) - hot) * scale
    return g * (1.0 - (z / cap) * (z / cap)) if CAP else g


@triton.jit
def _loss_rows(X, W, TARGET, SCALE, LSE, LOGIT, TOTAL, N, V, stride, z_loss, cap, smoothing,
               D: constexpr, FUSED: constexpr, CAP: constexpr, GRAD: constexpr, BM: constexpr,
               BN: constexpr, BK: constexpr):
    """Program (i, s) of (token tiles, S): the three numbers of BM tokens over every S-th tile of
    words. GRAD: X are logits, and are read once more (from L2) and overwritten."""
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    t = tl.load(TARGET + n, mask=n < N, other=-1)[:, None]
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    total, logit = l, l
    for v0 in range(tl.program_id(1) * BN, V, tl.num_programs(1) * BN):
        v = v0 + tl.arange(0, BN)
        z = _logit_tile(X, W, n, v, N, V, stride, cap, D, FUSED, CAP, BK)
        v = v[None, :]
        total += tl.sum(tl.where(v < V, z, 0.0), 1)
        logit += tl.sum(tl.where((v < V) & (v == t), z, 0.0), 1)
        m, l, _, _ = _online_step(m, l, tl.where(v < V, z, float("-inf")), LOG2E)
    lse, at = (m + tl.log2(l)) * LN2, tl.program_id(1) * N + n
    tl.store(LSE + at, lse, mask=n < N)
    tl.store(LOGIT + at, logit, mask=n < N)
    tl.store(TOTAL + at, total, mask=n < N)
    if GRAD:
        scale = tl.load(SCALE + n, mask=n < N, other=0.0)[:, None]
        for v0 in range(0, V, BN):
            v = v0 + tl.arange(0, BN)
            z = _logit_tile(X, W, n, v, N, V, stride, cap, D, FUSED, CAP, BK)
            g = _logit_gradient(z, v[None, :], t, lse[:, None], scale, V, z_loss, cap, smoothing,
                                CAP)
            _store_rows(X + v0, g, n.to(tl.int64) * stride, n < N, stride - v0, BN)


@triton.jit
def _fused_gradient(OWN, OTHER, TARGET, SCALE, LSE, OUT, N, V, n_own, n_other, z_loss, cap,
                    smoothing, FOR_W: constexpr, D: constexpr, CAP: constexpr, BM: constexpr,
                    BN: constexpr, BK: constexpr):
    """One program owns BM rows of OUT, fp32: dx (OWN is x, OTHER w) or, FOR_W, dw (the reverse).
    It adds every tile of the others to them. D is too wide for registers, so the sum lives in L2;
    it has one writer, hence no atomics."""
    own = tl.program_id(0) * BM + tl.arange(0, BM)
    for other0 in range(0, n_other, BN):
        other = other0 + tl.arange(0, BN)
        n = other[None, :] if FOR_W else own[:, None]
        v = own[:, None] if FOR_W else other[None, :]
        t = tl.load(TARGET + n, mask=n < N, other=-1)
        lse = tl.load(LSE + n, mask=n < N, other=0.0)
        scale = tl.load(SCALE + n, mask=n < N, other=0.0)
        z = _logit_tile(OWN, OTHER, own, other, n_own, n_other, 0, cap, D, True, CAP, BK)
        g = _logit_gradient(z, v, t, lse, scale, V, z_loss, cap, smoothing, CAP)  # (BM, BN)
        for d0 in range(0, D, BK):
            x = _load_rows(OTHER + d0, other.to(tl.int64) * D, other < n_other, D - d0, BK)
            at = own.to(tl.int64) * D
            out = _load_rows(OUT + d0, at, own < n_own, D - d0, BK)
            out = tl.dot(g.to(x.dtype), x, out, input_precision=PRECISION)  # (BM, BK)
            _store_rows(OUT + d0, out, at, own < n_own, D - d0, BK)
        tl.debug_barrier()  # the next round reads what this one wrote


def _chunked_core(kernel, x, weight, t, scale, opts, want_x, want_w):
    """(lse, target's logit, sum) (3, N) of the logits and those gradients of sum(scale * loss) that
    are wanted, else None. x (N, D), weight (V, D), t and scale (N,)."""
    N, V, stats = len(x), len(weight), scale.new_empty(3, len(x))
    dx, dw = torch.empty_like(x) if want_x else None, torch.zeros_like(weight) if want_w else None
    budget = 1 << (30 if x.is_cuda else 26 if N * V > 1 << 20 else 13)  # bytes: tests chunk as well
    rows = max(1, budget // (V * x.element_size()))
    buffer = x.new_zeros(min(rows, N), triton.cdiv(V, 16) * 16)
    tiles = dict(BM=2, BN=32) if INTERPRETED else dict(BM=1, BN=4096, num_warps=16)
    for i in range(0, N, rows):
        c = slice(i, min(i + rows, N))
        logits, n = buffer[: c.stop - i, :V], c.stop - i
        torch.mm(x[c], weight.t(), out=logits)  # (n, D) (D, V) -> (n, V)
        if kernel:
            _loss_rows[triton.cdiv(n, tiles["BM"]), 1](
                logits, logits, t[c], scale[c], *stats[:, c], n, V, buffer.shape[1], *opts,
                D=0, FUSED=False, CAP=opts[1] > 0, GRAD=want_x or want_w, BK=0, **tiles)
        else:
            stats[:, c] = _loss_rows_reference(logits, t[c], scale[c], opts, want_x or want_w)
        if want_x:
            torch.mm(logits, weight, out=dx[c])  # (n, V) (V, D) -> (n, D)
        if want_w:
            dw.addmm_(logits.t(), x[c])  # (V, n) (n, D) -> (V, D)
    return stats, dx, dw


def _fused_core(x, weight, t, scale, opts, want_x, want_w):
    """_chunked_core without logits in memory: what is kept is a few numbers a token."""
    (N, D), V, tiles = x.shape, len(weight), _matmul_tiles(x)
    tokens, words = triton.cdiv(N, tiles["BM"]), triton.cdiv(V, tiles["BN"])
    splits = min(words, triton.cdiv(_programs(x, 2), tokens))
    stats = torch.empty(3, splits, N, dtype=torch.float32, device=x.device)
    tiles.update(D=D, CAP=opts[1] > 0)
    _loss_rows[tokens, splits](x, weight, t, scale, *stats, N, V, 0, *opts, FUSED=True,
                               GRAD=False, **tiles)
    stats = torch.stack([stats[0].logsumexp(0), stats[1].sum(0), stats[2].sum(0)])

    def gradient(own, other, for_w):
        out = torch.zeros(own.shape, dtype=torch.float32, device=x.device)
        _fused_gradient[(triton.cdiv(len(own), tiles["BM"]),)](
            own, other, t, scale, stats[0], out, N, V, len(own), len(other), *opts,
            FOR_W=for_w, **tiles)
        return out.to(own.dtype)

    dx = gradient(x, weight, False) if want_x else None
    return stats, dx, gradient(weight, x, True) if want_w else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, t, valid, opts, reduction, core, training):
        scale = valid.to(torch.promote_types(x.dtype, torch.float32))
        if reduction == "mean":
            scale = scale / scale.sum().clamp_min(1)
        ctx.now = reduction != "none"  # each loss' factor is known: take the gradients at once
        want = [ctx.now and training and need for need in ctx.needs_input_grad[:2]]
        (lse, logit, total), dx, dw = core(x, weight, t, scale, opts, *want)
        (z_loss, _, smoothing), V = opts, len(weight)
        logit = logit.masked_fill((t < 0) | (t >= V), math.nan)  # shows a target that is no word
        loss = lse - (1 - smoothing) * logit - smoothing * total / V + z_loss * lse.square()
        loss, logprob = (torch.where(valid, a, 0.0) for a in (loss, logit - lse))
        ctx.opts, ctx.core = opts, core
        ctx.save_for_backward(*((dx, dw) if ctx.now else (x, weight, t, valid)))
        ctx.mark_non_differentiable(logprob)
        return (torch.dot(loss, scale) if ctx.now else loss), logprob

    @staticmethod
    def backward(ctx, dloss, _):
        if ctx.now:
            grads = [g if g is None else g * dloss.to(g.dtype) for g in ctx.saved_tensors]
        else:
            x, weight, t, valid = ctx.saved_tensors
            scale = torch.where(valid, dloss, 0.0)
            grads = ctx.core(x, weight, t, scale, ctx.opts, *ctx.needs_input_grad[:2])[1:]
        return *grads, *[None] * 6


def linear_cross_entropy(x, weight, targets, *, ignore_index=-100, z_loss=0.0, softcap=0.0,
                         label_smoothing=0.0, reduction="mean", return_logprobs=False, impl=None):
    """Cross-entropy of x @ weight.T against targets, never holding the (tokens, vocabulary) logits.

    x (..., D), weight (V, D) of one floating dtype, targets (...) integers below V. Adds
    z_loss * lse^2 a token (arXiv 2204.02311), caps logits to softcap * tanh(z / softcap), smooths
    labels as F.cross_entropy does. reduction "mean" (over targets that are not ignore_index),
    "sum" or "none" (shape of targets); fp32. If all are ignored: 0, and zero gradients. With
    return_logprobs also log p(target) a token, detached; for log-probabilities with gradients
    take minus the loss of reduction="none", which computes the logits again in its backward.

    impl: "chunked" matmuls of a few thousand tokens and one Triton pass (default on CUDA);
    "torch" the same with the pass in torch (default on CPU); "triton" logits in registers only,
    5 tile matmuls instead of 3: slower, for when even a chunk of logits is too much.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: choose 'mean', 'sum' or 'none'")
    _need(x.shape[:-1] == targets.shape and weight.dim() == 2 and x.shape[-1] == weight.shape[1],
          "x (..., D), weight (V, D), targets (...)", x, weight, targets)
    if torch.is_autocast_enabled(x.device.type):
        x, weight = (a.to(torch.get_autocast_dtype(x.device.type)) for a in (x, weight))
    V, t = len(weight), targets.flatten()
    valid = t != ignore_index
    if t.device.type == "cpu" and bool((valid & ((t < 0) | (t >= V))).any()):
        raise ValueError(f"targets must be in 0 .. {V - 1} or ignore_index={ignore_index}")
    kernel = _use_triton(x, "triton" if impl == "chunked" else impl)
    core = _fused_core if kernel and impl == "triton" else functools.partial(_chunked_core, kernel)
    opts = float(z_loss), float(softcap), float(label_smoothing)
    with torch.autocast(x.device.type, enabled=False):
        loss, logprob = _LinearCrossEntropy.apply(
            x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), t.contiguous(), valid,
            opts, reduction, core, torch.is_grad_enabled())
    loss = loss.view(targets.shape) if reduction == "none" else loss
    return (loss, logprob.view(targets.shape)) if return_logprobs else loss


# ---- AdamW ---------------------------------------------------------------------------------------
# 15 operations a parameter on 28 bytes of fp32 (read p, g, m, v; write p, m, v). Torch launches a
# kernel a list of tensors; here a table of pointers makes a whole parameter group one launch.


def fused_adamw_reference(params, grads, exp_avgs, exp_avg_sqs, masters=None, *, lr, betas, eps,
                          weight_decay, step, grad_scale=None):
    """What fused_adamw does, one tensor at a time; same arguments."""
    unbias = math.sqrt(1 - betas[1] ** step)  # sqrt(v / unbias^2) + eps, times unbias, is root
    for p, g, m, v, w in zip(params, grads, exp_avgs, exp_avg_sqs, masters or params):
        w, g = w.to(m.dtype), g.to(m.dtype) if grad_scale is None else g.to(m.dtype) * grad_scale
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        root = v.sqrt().add_(eps * unbias)
        w.mul_(1 - lr * weight_decay).addcdiv_(m, root, value=-lr * unbias / (1 - betas[0] ** step))
        if p.dtype == torch.bfloat16 and not masters:  # up or down with the odds of its nearness
            noise = torch.randint_like(w, 1 << 16, dtype=torch.int32)  # below bf16's 16 bits
            w = (w.view(torch.int32) + noise).bitwise_and_(-65536).view(torch.float32)
        if w is not p:  # fp32 parameters were updated in place
            p.copy_(w)


@triton.jit
def _address(ROW, i: constexpr, LIKE, ALIGN: constexpr):
    return tl.multiple_of(tl.load(ROW + i).to(LIKE.dtype), ALIGN)


@triton.jit
def _adamw_kernel(TABLE, P, W, GRAD_SCALE, decay, lr, beta1, beta2, eps, unbias1, unbias2, seed,
                  MASTER: constexpr, STOCHASTIC: constexpr, ALIGN: constexpr, BLOCK: constexpr):
    """Program (i, t) updates every S-th block of tensor t, from the i-th on, of S programs. TABLE
    (tensors, 6): addresses of p, grad, exp_avg, exp_avg_sq, master or p, and the length."""
    row = TABLE + 6 * tl.program_id(1)
    p_at, g_at = _address(row, 0, P, ALIGN), _address(row, 1, P, ALIGN)
    m_at, v_at = _address(row, 2, GRAD_SCALE, ALIGN), _address(row, 3, GRAD_SCALE, ALIGN)
    w_at, n = _address(row, 4, W, ALIGN), tl.multiple_of(tl.load(row + 5), ALIGN)
    for start in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        c = (start * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        keep = c < n
        g = tl.load(g_at + c, mask=keep, other=0.0).to(tl.float32) * tl.load(GRAD_SCALE)
        m = tl.load(m_at + c, mask=keep, other=0.0)
        v = tl.load(v_at + c, mask=keep, other=0.0)
        w = tl.load(w_at + c, mask=keep, other=0.0).to(tl.float32)
        m += (g - m) * (1.0 - beta1)
        v += (g * g - v) * (1.0 - beta2)
        w = w * decay - lr * (m * unbias1) / (tl.sqrt(v * unbias2) + eps)
        tl.store(m_at + c, m, mask=keep)
        tl.store(v_at + c, v, mask=keep)
        if MASTER:
            tl.store(w_at + c, w, mask=keep)
        if STOCHASTIC:  # add 16 random bits below bf16's, and cut
            noise = tl.randint(seed + tl.program_id(1), c.to(tl.int32)) & 0xFFFF
            bits = w.to(tl.int32, bitcast=True) + noise.to(tl.int32)
            w = (bits & -65536).to(tl.float32, bitcast=True)
        tl.store(p_at + c, w.to(P.dtype.element_ty), mask=keep)


@torch.no_grad()
def fused_adamw(params, grads, exp_avgs, exp_avg_sqs, masters=None, *, lr, betas=(0.9, 0.95),
                eps=1e-8, weight_decay=0.1, step, grad_scale=None, impl=None):
    """An AdamW step (arXiv 1711.05101, algorithm 2), in place, one launch for many tensors.

    Lists of contiguous tensors: params and grads of one dtype (fp32, bf16, fp16); exp_avgs and
    exp_avg_sqs fp32, zeros before step 1; masters, fp32 copies that keep what a 16-bit parameter
    cannot. bf16 without masters, 4 bytes less each, is rounded up or down at random. grad_scale, a
    scalar tensor (the clip factor: nothing waits for the GPU), multiplies the gradients. Reads are
    16 bytes wide where all lengths are multiples of 16. Raises ValueError for strided tensors.
    """
    hyper = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step)
    rows = list(zip(params, grads, exp_avgs, exp_avg_sqs, masters or params))
    if not all(x.is_contiguous() for row in rows for x in row):
        raise ValueError("fused_adamw takes contiguous tensors")
    if not rows or not _use_triton(p := params[0], impl):
        return fused_adamw_reference(params, grads, exp_avgs, exp_avg_sqs, masters,
                                     grad_scale=grad_scale, **hyper)
    types = [p.dtype] * 2 + [torch.float32] * 2 + [torch.float32 if masters else p.dtype]
    _need(all([x.dtype for x in row] == types and all(x.shape == row[0].shape for x in row)
              for row in rows), "tensors alike, moments and masters in float32, all others in one "
          "dtype", *rows[0])  # addresses carry no types
    table = [[x.data_ptr() for x in row] + [row[0].numel()] for row in rows]
    grad_scale = torch.ones((), device=p.device) if grad_scale is None else grad_scale.float()
    block = 64 if INTERPRETED else 2048
    programs = min(triton.cdiv(max(row[-1] for row in table), block), _programs(p, 8))
    unbias = [1 / (1 - beta**step) for beta in betas]
    _adamw_kernel[programs, len(rows)](
        torch.tensor(table).to(p.device, non_blocking=True), p, rows[0][4], grad_scale,
        1 - lr * weight_decay, lr, *betas, eps, *unbias, step * len(rows),
        MASTER=bool(masters), STOCHASTIC=p.dtype == torch.bfloat16 and not masters,
        ALIGN=16 if all(n % 16 == 0 for row in table for n in row) else 1, BLOCK=block)


# ---- mixture of experts: a matmul for each group of rows -----------------------------------------
# 2 N D F operations however the rows are shared out. How many rows each expert got is known only on
# the GPU, so the grid covers the worst case and every program finds its group from the offsets.


def grouped_mm_reference(x, w, offsets):
    """Rows offsets[g - 1] to offsets[g] of x times w[g]; rows past the last offset give 0."""
    ends = offsets.tolist()
    parts = [x[a:b] @ w[g] for g, (a, b) in enumerate(zip([0, *ends], ends))]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], w.shape[-1])])


@triton.jit
def _grouped_kernel(X, W, Y, ENDS, G, sw_g, sw_d, sw_f, D, FF, BG: constexpr, BM: constexpr,
                    BN: constexpr, BK: constexpr):
    """y (N, F) = x (N, D) w[group] (D, F): program (i, f) takes the i-th tile of rows of all."""
    pid, gs = tl.program_id(0), tl.arange(0, BG)
    ends = tl.load(ENDS + gs, mask=gs < G, other=0)
    starts = tl.load(ENDS + gs - 1, mask=(gs > 0) & (gs < G), other=0)
    tiles = tl.where(gs < G, tl.cdiv(ends - starts, BM), 0)
    upto = tl.cumsum(tiles, 0)
    g = tl.sum((upto <= pid).to(tl.int32), 0)  # how many groups end before this tile
    if g >= G:
        return
    first = tl.sum(tl.where(gs == g, starts, 0), 0)
    end = tl.sum(tl.where(gs == g, ends, 0), 0)
    tile = pid - tl.sum(tl.where(gs == g, upto - tiles, 0), 0)
    n = (first + tile * BM + tl.arange(0, BM)).to(tl.int64)
    f0 = tl.program_id(1) * BN
    f = f0 + tl.arange(0, BN)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    W += g.to(tl.int64) * sw_g
    for d0 in range(0, D, BK):
        d = d0 + tl.arange(0, BK)[:, None]
        x = _load_rows(X + d0, n * D, n < end, D - d0, BK)  # (BM, BK)
        w = _load(W, d * sw_d + f * sw_f, (d < D) & (f < FF))  # (BK, BN)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    _store_rows(Y + f0, acc, n * FF, n < end, FF - f0, BN)


@triton.jit
def _grouped_weight_kernel(X, DY, DW, ENDS, D, FF, BM: constexpr, BN: constexpr, BK: constexpr):
    """dw[g] (D, F) = x[rows of g]' dy[rows of g]; an empty group's is 0."""
    g = tl.program_id(2)
    first, end = tl.load(ENDS + g - 1, mask=g > 0, other=0), tl.load(ENDS + g)
    d0, f0 = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for n0 in range(first, end, BK):
        n = (n0 + tl.arange(0, BK)).to(tl.int64)
        x = _load_rows(X + d0, n * D, n < end, D - d0, BM)  # (BK, BM)
        dy = _load_rows(DY + f0, n * FF, n < end, FF - f0, BN)  # (BK, BN)
        acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)
    d = d0 + tl.arange(0, BM)
    _store_rows(DW + f0, acc, (g.to(tl.int64) * D + d) * FF, d < D, FF - f0, BN)


class _GroupedMM(torch.autograd.Function):
    """x (N, D), w (G, D, F) of any strides, ends (G,) -> (N, F)."""

    @staticmethod
    def forward(ctx, x, w, ends):
        (N, D), (G, _, FF), tiles = x.shape, w.shape, _matmul_tiles(x)
        y = x.new_zeros(N, FF)
        _grouped_kernel[triton.cdiv(N, tiles["BM"]) + G, triton.cdiv(FF, tiles["BN"])](
            x, w, y, ends, G, *w.stride(), D, FF, BG=triton.next_power_of_2(G), **tiles)
        ctx.save_for_backward(x, w, ends)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, w, ends), dy, dw = ctx.saved_tensors, dy.contiguous(), None
        dx = _GroupedMM.apply(dy, w.mT, ends) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            (G, D, FF), tiles, dw = w.shape, _matmul_tiles(x), _like(w)
            _grouped_weight_kernel[triton.cdiv(D, tiles["BM"]), triton.cdiv(FF, tiles["BN"]), G](
                x, dy, dw, ends, D, FF, **tiles)
        return dx, dw, None


def grouped_mm(x, w, offsets, *, impl=None):
    """Each group of rows times its own matrix: the experts' matmul of a sorted mixture of experts.

    x (N, D), w (G, D, F), offsets (G,) integers, non-decreasing: group g is rows offsets[g - 1] (0
    for the first) to offsets[g], perhaps none. Returns (N, F); rows past the last offset give 0.
    """
    _need(x.dim() == 2 and w.dim() == 3 and x.shape[1:] == w.shape[1:2]
          and offsets.shape == w.shape[:1], "x (N, D), w (G, D, F), offsets (G,)", x, w, offsets)
    if not _use_triton(x, impl):
        return grouped_mm_reference(x, w, offsets)
    return _GroupedMM.apply(x.contiguous(), w, offsets.to(torch.int32).contiguous())


# ---- X X' at half the work -----------------------------------------------------------------------
# Muon's Newton-Schulz needs A = X X' and A A', both symmetric: tiles on and below the diagonal are
# computed and stored twice, M^2 K operations in place of 2 M^2 K.


def symmetric_mm_reference(x):
    """x @ x' over the last two dimensions."""
    return x @ x.mT


@triton.jit
def _symmetric_kernel(X, Y, M, K, sx_b, sx_m, sx_k, BM: constexpr, BN: constexpr, BK: constexpr):
    """One program a tile, BM = BN; those above the diagonal have nothing to do."""
    row, column, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if column > row:
        return
    i = (row * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    j = (column * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    X += b * sx_b
    for k0 in range(0, K, BK):
        k = (k0 + tl.arange(0, BK))[None, :]
        left = _load(X, i * sx_m + k * sx_k, (i < M) & (k < K))  # (BM, BK)
        right = _load(X, j * sx_m + k * sx_k, (j < M) & (k < K))  # (BN, BK)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    Y += b * M * M
    j, y = tl.trans(j), acc.to(Y.dtype.element_ty)
    keep = (i < M) & (j <= i)
    tl.store(Y + i * M + j, y, mask=keep)
    tl.store(Y + j * M + i, y, mask=keep & (j < i))


class _SymmetricMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        (B, M, K), tiles = x.shape, _matmul_tiles(x)
        y, side = torch.empty(B, M, M, dtype=x.dtype, device=x.device), triton.cdiv(M, tiles["BM"])
        _symmetric_kernel[side, side, B](x, y, M, K, *x.stride(), **tiles)
        return y

    @staticmethod
    def backward(ctx, dy):
        return (dy + dy.mT) @ ctx.saved_tensors[0]


def symmetric_mm(x, *, impl=None):
    """x @ x.mT for x (..., M, K) -> (..., M, M), only one triangle of tiles computed."""
    _need(x.dim() >= 2, "x (..., M, K)", x)
    if not _use_triton(x, impl):
        return symmetric_mm_reference(x)
    y = _SymmetricMM.apply(x.reshape(-1, *x.shape[-2:]))  # (..., M, K) -> (B, M, K)
    return y.view(*x.shape[:-1], x.shape[-2])


# ---- bench: every kernel against its peers -------------------------------------------------------

CHECKED = 512  # no dimension is larger where a case is checked: the fp64 twin holds all T^2 scores


class _Case(NamedTuple):
    """A kernel at one size, and what it is compared with."""

    name: str
    shapes: list  # of the inputs
    ours: Callable
    twin: Callable
    peers: dict
    unit: str  # what the work counts: "FLOP" or "B"
    forward: int = 0  # work; 0: not timed
    both: int = 0  # of forward and backward


def _sdpa(backend, *inputs):
    with sdpa_kernel(backend):
        return _heads_first(F.scaled_dot_product_attention, *inputs, is_causal=True)


def _cases(cuda):
    """What bench times, at a GPU's or a CPU's sizes."""
    partial, (device, size) = functools.partial, ("cuda", 2) if cuda else ("cpu", 4)
    attention = [(4, 4096, 16, 16, 128), (2, 8192, 16, 16, 128), (1, 16384, 16, 16, 128),
                 (4, 4096, 32, 8, 128), (4, 4096, 16, 16, 64)] if cuda else [(1, 1024, 8, 2, 64)]
    B, S, N, D, M, G, V = (16, 16384, 16384, 4096, 2048, 64, 131072) if cuda else (
        4, 4096, 4096, 512, 256, 8, 50257)
    for b, T, H, K, E in attention:
        peers = {"sdpa flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION)}
        if cuda:
            mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T)
            peers |= {"sdpa cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
                      "sdpa efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
                      "flex": partial(_heads_first, torch.compile(flex.flex_attention),
                                      block_mask=mask)}
        flop = 2 * b * H * T * T * E  # 4 B H T^2 E, of which causal needs half
        yield _Case("flash_attention", [(b, T, H, E), (b, T, K, E), (b, T, K, E)], flash_attention,
                    flash_attention_reference, peers, "FLOP", flop, flop * 7 // 2)
    sdpa = partial(_heads_first, F.scaled_dot_product_attention)
    yield _Case("flash_decode", [(B, 1, H, E), (B, S, K, E), (B, S, K, E)], flash_decode,
                flash_decode_reference, {"sdpa": sdpa}, "B", 2 * B * S * K * E * size)

    def torchs(function, twin):  # a peer by itself and, on a GPU, the twin compiled
        return {"torch": function, **({"compile": torch.compile(twin)} if cuda else {})}

    norm, x = lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), N * D * size  # bytes
    yield _Case("rms_norm", [(N, D), (D,)], rms_norm, rms_norm_reference,
                torchs(norm, rms_norm_reference), "B", 2 * x, 5 * x)
    yield _Case("swiglu", [(N, D)] * 2, swiglu, swiglu_reference,
                torchs(swiglu_reference, swiglu_reference), "B", 3 * x, 8 * x)
    angle = dict(zip(("cos", "sin"), torch.randn(2, N, 64, device=device)))
    rope, twin = (partial(f, **angle) for f in (apply_rope, apply_rope_reference))
    yield _Case("apply_rope", [(1, N, D // 128, 128), (1, N, D // 512, 128)],  # k is D / 4
                rope, twin, torchs(twin, twin), "B", 5 * x // 2, 5 * x)

    targets = torch.randint(CHECKED, (N,), device=device)

    def loss(function):  # divided, so that logits are of a model's size
        return lambda x, w: function(x / 16, w, targets[: len(x)])

    naive = loss(lambda x, w, t: F.cross_entropy((x @ w.t()).float(), t))
    yield _Case("linear_cross_entropy", [(N, D), (V, D)], loss(linear_cross_entropy),
                loss(linear_cross_entropy_reference), {"F.cross_entropy": naive}, "FLOP",
                both=6 * N * D * V)
    shares = torch.linspace(0, 1, G + 1, device=device)[1:] ** 2  # the last groups get most
    ends = {n: (shares * n).int() for n in (N, CHECKED)}

    def experts(function):
        return lambda x, w: function(x, w, ends[len(x)])

    yield _Case("grouped_mm", [(N, M), (G, M, M)], experts(grouped_mm),
                experts(grouped_mm_reference), {"loop": experts(grouped_mm_reference)}, "FLOP",
                2 * N * M * M, 6 * N * M * M)
    yield _Case("symmetric_mm", [(2 * M, 2 * M)], symmetric_mm, symmetric_mm_reference,
                {"x @ x.mT": symmetric_mm_reference}, "FLOP", 8 * M**3)


def _inputs(shapes, device, dtype, seed=0):
    """Random tensors: never zeros, which a GPU multiplies faster."""
    torch.manual_seed(seed)
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def _run(function, *inputs, backward):
    """The outputs and, if backward, the inputs' gradients; an output is its own: it is not 0."""
    with torch.set_grad_enabled(backward):
        outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return (*outs, *torch.autograd.grad(outs, inputs, outs)) if backward else outs


def _seconds(call, sets):
    """Median seconds of call(*inputs), over the input sets in turn."""
    turn = itertools.cycle(sets)
    for _ in range(3):
        call(*next(turn))
    if not sets[0][0].is_cuda:
        return statistics.median(timeit.repeat(lambda: call(*next(turn)), number=1, repeat=3))
    torch.cuda._sleep(40_000_000)  # 20 ms in which all launches queue up: no gaps between them
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    for mark in marks:
        mark.record()
        call(*next(turn))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))


def _peak_mib(call, cuda):
    """The most memory that call() holds beyond what there is; on a CPU as Linux counts it."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # start the high-water mark again
    call()
    with open("/proc/self/status") as f:
        high, now = (int(line.split()[1]) for line in f if line.startswith(("VmHWM", "VmRSS")))
    return (high - now) / 1024


def _print_row(name, shape, ours, peer, theirs, rate=0.0, unit="", limits=None, error=""):
    rates = f"{rate / 1e12:.3g} T{unit}/s | {rate / limits[unit]:.0%}" if limits else "|"
    print(f"| {name} | {shape} | {ours:.3g} | {peer} | {theirs:.3g} | {ours / theirs:.2f} "
          f"| {rates} | {error} |", flush=True)


def _bench_case(case, device, dtype, limits):
    """Check a case against its twin in fp64, then print a row for each peer and pass."""
    low = _inputs([[min(n, CHECKED) for n in s] for s in case.shapes], device, dtype)
    high = [x.detach().double().requires_grad_() for x in low]
    pairs = zip(*(_run(f, *x, backward=case.both > 0)
                  for f, x in ((case.ours, low), (case.twin, high))))
    error = torch.stack([(a.double() - b).abs().max() / b.abs().max() for a, b in pairs]).max()
    if not error < (0.03 if device == "cuda" else 1e-5):
        raise ValueError(f"{case.name}: error {error:.1e} against the fp64 twin, not timed")
    size = sum(math.prod(s) for s in case.shapes) * dtype.itemsize
    sets = [_inputs(case.shapes, device, dtype, i)  # together larger than a 50 MB L2
            for i in range(max(2, min(8, 200_000_000 // size)))]
    shape = " ".join("x".join(map(str, s)) for s in case.shapes)
    passes = ("forward", case.forward), ("forward+backward", case.both)
    for (peer, other), (name, work) in itertools.product(case.peers.items(), passes):
        if not work:
            continue
        runs = [functools.partial(_run, f, backward="backward" in name) for f in (case.ours, other)]
        try:
            ours, theirs = (_seconds(run, sets) for run in runs)
        except RuntimeError as problem:  # a backend refuses the shape, or memory runs out
            print(f"{case.name} beside {peer}: {str(problem).splitlines()[0]}", file=sys.stderr)
            continue
        _print_row(f"{case.name} {name}", shape, ours * 1e3, peer, theirs * 1e3,
                   work / ours, case.unit, limits, f"{error:.0e}")
        if case.name == "linear_cross_entropy":  # which is about memory
            ours, theirs = (_peak_mib(functools.partial(run, *sets[0]), device == "cuda")
                            for run in runs)
            _print_row(f"{case.name} peak MiB", shape, ours, peer, theirs)


def bench(only=""):
    """Print the table: each kernel and pass, ours and each peer, and the share of the limit."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    cases = list(_cases(cuda))
    names = [*dict.fromkeys(case.name for case in cases), "adamw"]
    if not any(only in name for name in names):
        raise ValueError(f"--only {only}: no such kernel; there are {', '.join(names)}")
    n, numbers = (8192, 1 << 29) if cuda else (2048, 1 << 25)
    a, x = (torch.randn(s, device=device, dtype=dtype) for s in ((n, n), (numbers,)))
    limits = {"FLOP": 2 * n**3 / _seconds(torch.mm, [(a, a)]),
              "B": 2 * x.nbytes / _seconds(torch.empty_like(x).copy_, [(x,)])}
    del a, x
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {dtype}, torch {torch.__version__}, triton {triton.__version__}; measured: "
          f"{limits['FLOP'] / 1e12:.3g} TFLOP/s, copy {limits['B'] / 1e12:.3g} TB/s\n\n"
          "| kernel | shape | ours ms | peer | ms | ratio | rate | of limit | error |\n"
          + "|---" * 9 + "|")
    for case in cases:
        if only in case.name:
            _bench_case(case, device, dtype, limits)
    if only in "adamw":  # a step over 64 matrices, in place: no inputs, no backward
        side = 4096 if cuda else 256
        params, grads = (_inputs([(side, side)] * 64, device, torch.float32, i) for i in range(2))
        for p, g in zip(params, grads):
            p.grad = g.detach()
        moments = ([torch.zeros_like(p) for p in params] for _ in range(2))
        step = functools.partial(fused_adamw, params, grads, *moments, lr=1e-4, step=1)
        torchs = torch.optim.AdamW(params, lr=1e-4, fused=True).step
        ours, theirs = (_seconds(lambda *_, f=f: f(), [params]) for f in (step, torchs))
        _print_row("adamw fp32 step", f"64x{side}x{side}", ours * 1e3, "torch fused", theirs * 1e3,
                   28 * 64 * side**2 / ours, "B", limits)


def tune():
    """Time candidate attention tiles on this GPU; print the fastest entries for TILES."""
    for E, kernel in itertools.product((64, 128, 256), ("forward", "backward_q", "backward_kv")):
        tiles, timed = TILES[kernel], {}
        before, sets = tiles[E], [_inputs([(4, 4096, 16, E)] * 3, "cuda", torch.bfloat16)]
        call = functools.partial(_run, flash_attention, backward=kernel != "forward")
        for tiles[E] in (before, *itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))):
            try:
                timed[tiles[E]] = _seconds(call, sets)
            except (triton.runtime.errors.OutOfResources, RuntimeError):
                continue  # too much shared memory or too many registers
        tiles[E] = min(timed, key=timed.get)
        print(f'"{kernel}" {E}: {tiles[E]}  # {timed[tiles[E]] * 1e3:.3g} ms, with {before} '
              f"{timed.get(before, math.nan) * 1e3:.3g} ms", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["bench"], help="time every kernel against its peers")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--tune", action="store_true", help="time other attention tiles instead")
    args = parser.parse_args(argv)
    try:
        if args.tune and not torch.cuda.is_available():
            raise ValueError("--tune: timings need a GPU, and torch sees none")
        tune() if args.tune else bench(args.only)
    except (ValueError, OSError) as problem:
        print(f"kernels.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
