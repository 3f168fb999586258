"""The very kernels that a GPU runs, in Triton's interpreter, against fp64 twins and torch's own."""

import functools
import inspect
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import kernels

TRITON = "cuda" if torch.cuda.is_available() else "cpu"


def relative(a, b, floor=0.1):
    """Largest error over the largest magnitude of the fp64 b, or over floor if that is larger."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    return ((a - b).abs().max() / b.abs().max().clamp_min(floor)).item() if b.numel() else 0.0


def guarded(x):
    """x between NaNs, so that a read outside its bounds shows in the result."""
    around = torch.full((x.numel() + 4096,), math.nan, dtype=x.dtype, device=TRITON)
    inside = around[2048 : 2048 + x.numel()].view(x.shape)
    return inside.copy_(x.detach()).requires_grad_()


def agree(ours, twin, inputs, tolerance=1e-5):
    """ours(*inputs) in their dtype against twin(*inputs) in fp64: outputs and all gradients."""
    low = [guarded(x) for x in inputs]
    high = [x.detach().double().requires_grad_() for x in inputs]
    outs, refs = ours(*low), twin(*high)
    outs, refs = (x if isinstance(x, tuple) else (x,) for x in (outs, refs))
    for o, r in zip(outs, refs):
        assert relative(o, r) < tolerance
    gen = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, generator=gen, dtype=torch.float64) for r in refs]
    sum((o * w.to(o)).sum() for o, w in zip(outs, weights)).backward()
    sum((r * w).sum() for r, w in zip(refs, weights)).backward()
    top = max(b.grad.abs().max().item() for b in high)  # a zero gradient is a difference of these
    for a, b in zip(low, high):
        assert relative(a.grad, b.grad, top / 4) < tolerance


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- attention ----


def test_online_softmax_is_softmax():
    x = torch.tensor([1.0, 3.0, 2.0, -50.0, 80.0], dtype=torch.float64)
    assert torch.allclose(kernels.online_softmax(x), torch.softmax(x, 0), atol=1e-15)


@pytest.mark.parametrize(
    "Tq, Tk, H, K, E, options",
    [
        (1, 1, 1, 1, 16, {}),
        (16, 16, 2, 1, 16, {}),
        (33, 33, 2, 2, 24, {"causal": False}),
        (33, 33, 8, 1, 16, {}),
        (96, 96, 1, 1, 16, {}),
        (160, 160, 1, 1, 80, {}),
        (33, 96, 2, 1, 32, {}),
        (96, 33, 2, 2, 16, {}),  # 63 queries see nothing
        (1, 160, 8, 1, 16, {}),
        (96, 96, 1, 1, 96, {"window": 20}),
        (96, 96, 2, 1, 16, {"window": 1}),
        (33, 160, 1, 1, 16, {"causal": False, "window": 30}),
        (96, 33, 1, 1, 16, {"causal": False, "window": 12}),
        (160, 96, 1, 1, 16, {"softcap": 2.0, "scale": 0.7}),
        (17, 17, 1, 1, 256, {"causal": False, "softcap": 5.0}),
    ],
)
def test_flash_attention_kernels(Tq, Tk, H, K, E, options):
    inputs = randn(2, Tq, H, E), randn(2, Tk, K, E, seed=1), randn(2, Tk, K, E, seed=2)
    agree(
        lambda *x: kernels.flash_attention(*x, impl="triton", **options),
        lambda *x: kernels.flash_attention_reference(*x, **options),
        inputs,
    )


def test_flash_attention_twin_is_torchs():
    q, k, v = randn(2, 33, 4, 16), randn(2, 33, 2, 16, seed=1), randn(2, 33, 2, 16, seed=2)
    agree(
        lambda *x: kernels.flash_attention_reference(*x),
        lambda *x: F.scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in x), is_causal=True, enable_gqa=True
        ).transpose(1, 2),
        (q, k, v),
    )


def test_lse_carries_gradients_as_ring_attention_needs():
    """Two halves of the keys, merged by their LSEs, are attention over all of them."""
    inputs = randn(1, 33, 2, 16), randn(1, 48, 2, 16, seed=1), randn(1, 48, 2, 16, seed=2)

    def ring(q, k, v):
        halves = [kernels.flash_attention(q, k[:, s], v[:, s], causal=False, return_lse=True,
                                          impl="triton") for s in (slice(0, 20), slice(20, 48))]
        w = torch.softmax(torch.stack([lse for _, lse in halves]), 0).transpose(2, 3)[..., None]
        return sum(o * x for (o, _), x in zip(halves, w))

    agree(ring, lambda *x: kernels.flash_attention_reference(*x, causal=False), inputs)


def test_rows_that_see_nothing_are_zero_with_finite_gradients():
    q, k, v = guarded(randn(1, 40, 1, 16)), guarded(randn(1, 7, 1, 16)), guarded(randn(1, 7, 1, 16))
    o, lse = kernels.flash_attention(q, k, v, return_lse=True, impl="triton")
    assert (o[:, :33] == 0).all() and (lse[..., :33] == -math.inf).all()
    dlse = torch.where(lse.isinf(), math.nan, 1.0)  # what merging by -inf LSEs sends back
    grads = torch.autograd.grad([o, lse], [q, k, v], [torch.ones_like(o), dlse])
    assert all(torch.isfinite(g).all() for g in grads) and (grads[0][:, :33] == 0).all()


def test_attention_gradients_repeat_to_the_bit_and_take_strided_inputs():
    qkv = randn(2, 3, 50, 2, 16).to(TRITON)
    heads_first = (x.transpose(1, 2).contiguous() for x in qkv.unbind(1))
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in heads_first)
    runs = [torch.autograd.grad(kernels.flash_attention(q, k, v, impl="triton").square().sum(),
                                [q, k, v]) for _ in range(2)]
    assert all((a == b).all() for a, b in zip(*runs))
    packed = [torch.autograd.grad(kernels.flash_attention(q.contiguous(), k.contiguous(),
                                                          v.contiguous(), impl="triton")
                                  .square().sum(), [q, k, v])]
    assert all((a == b).all() for a, b in zip(runs[0], packed[0]))


def test_bf16_attention_and_norm_are_within_their_rounding():
    inputs = [randn(1, 70, 2, 32, seed=s, dtype=torch.bfloat16) for s in range(3)]
    agree(lambda *x: kernels.flash_attention(*x, impl="triton"), kernels.flash_attention_reference,
          inputs, 2e-2)
    agree(lambda x, w: kernels.rms_norm(x, w, impl="triton"), kernels.rms_norm_reference,
          (randn(9, 64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16)), 2e-2)


@pytest.mark.parametrize("flash", [kernels.FlashAttentionTorch, kernels.FlashAttentionTriton])
@pytest.mark.parametrize("is_causal", [False, True])
def test_course_functions(flash, is_causal):
    inputs = [randn(2, 80, 16, seed=s) for s in range(3)]

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    agree(lambda *x: flash.apply(*x, is_causal), plain, inputs)
    q, k, v = (x.to(TRITON).requires_grad_() for x in inputs)
    o = flash.apply(q, k, v, is_causal)
    saved = [x for x in o.grad_fn.saved_tensors if x.shape == (2, 80)]
    assert len(saved) == 1
    s = q.detach().double() @ k.detach().double().mT / 4
    if is_causal:
        s = s.masked_fill(torch.ones(80, 80, device=s.device).triu(1).bool(), -math.inf)
    assert relative(saved[0], torch.logsumexp(s, -1)) < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"scale": 0.3}, {"window": 5}, {"softcap": 2.0}]
)
def test_flash_attention_by_default(options):
    """Whatever path a device takes by itself."""
    inputs = randn(2, 33, 4, 16), randn(2, 33, 2, 16, seed=1), randn(2, 33, 2, 16, seed=2)
    agree(
        lambda *x: kernels.flash_attention(*x, **options),
        lambda *x: kernels.flash_attention_reference(*x, **options),
        inputs,
    )


@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 3.0}, {"causal": False}])
def test_varlen_with_an_empty_document(options):
    cu = torch.tensor([0, 33, 33, 34, 74], dtype=torch.int32)
    inputs = randn(74, 4, 16), randn(74, 2, 16, seed=1), randn(74, 2, 16, seed=2)
    same = torch.repeat_interleave(torch.arange(4), cu.diff())  # the document of each row

    def twin(q, k, v):  # one dense attention under a block-diagonal mask
        own = torch.arange(74)
        keep = same[:, None] == same[None, :]
        if options.get("causal", True):
            keep = keep & (own[None, :] <= own[:, None])
        keep = keep & ((own[:, None] - own[None, :]).abs() < options.get("window", 99))
        s = torch.einsum("the,she->hts", q, k.repeat_interleave(2, 1)) / 4
        s = 3 * torch.tanh(s / 3) if "softcap" in options else s
        s = s.masked_fill(~keep, -math.inf)
        v = v.repeat_interleave(2, 1)
        return torch.einsum("hts,she->the", s.softmax(-1), v), s.logsumexp(-1)

    for impl in ("torch", "triton"):
        agree(
            lambda *x, i=impl: kernels.flash_attention_varlen(
                *x, cu.to(TRITON), 40, return_lse=True, impl=i, **options
            ),
            twin,
            inputs,
        )


@pytest.mark.parametrize("splits", [1, 3, 64])
@pytest.mark.parametrize("Tq, options", [(1, {}), (3, {"window": 20, "softcap": 4.0})])
def test_decode_is_the_last_rows_of_attention(splits, Tq, options):
    lengths = torch.tensor([70, 3, 33], dtype=torch.int32)
    cache = randn(3, 2, 80, 2, 24, seed=1)[:, :, :70]  # a slice of a longer cache
    q, k, v = randn(3, Tq, 8, 24), cache[:, 0], cache[:, 1]
    ours = kernels.flash_decode(*(x.to(TRITON) for x in (q, k, v, lengths)), num_splits=splits,
                                impl="triton", **options)
    for b, n in enumerate(lengths.tolist()):
        whole = torch.cat([randn(n - Tq, 8, 24), q[b]]).double()[None]
        ref = kernels.flash_attention_reference(
            whole, k[b : b + 1, :n].double(), v[b : b + 1, :n].double(), **options
        )
        assert relative(ours[b], ref[0, n - Tq :]) < 1e-5
    twin = kernels.flash_decode(q, k, v, lengths, impl="torch", **options)
    assert relative(ours, twin) < 1e-5


def test_decode_takes_any_number_of_rows_and_heads_first_caches():
    lengths = torch.tensor([70, 40], dtype=torch.int32)
    q, k, v = randn(2, 5, 8, 16), randn(2, 2, 80, 16, seed=1), randn(2, 2, 80, 16, seed=2)
    k, v = k.to(TRITON).transpose(1, 2), v.to(TRITON).transpose(1, 2)  # (B, K, S, E) in memory
    for caches in ((k, v), (k, v.contiguous())):  # 4 heads of 5 queries are two tiles of rows
        ours = kernels.flash_decode(q.to(TRITON), *caches, lengths.to(TRITON), impl="triton")
        twin = kernels.flash_decode_reference(q.double(), *(x.double().cpu() for x in caches),
                                              lengths)
        assert relative(ours, twin) < 1e-5


def test_decode_with_an_empty_cache_gives_zero():
    q, cache = guarded(randn(1, 1, 2, 16)), guarded(randn(1, 9, 1, 16))
    o = kernels.flash_decode(q, cache, cache, torch.tensor([0], device=TRITON), impl="triton")
    assert (o == 0).all()


# ---- norm, SwiGLU, RoPE ----


@pytest.mark.parametrize("shape", [(1, 7), (2, 5, 64), (33, 96)])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(shape, residual):
    inputs = [randn(*shape), randn(shape[-1], seed=1)] + [randn(*shape, seed=2)] * residual

    def twin(x, w, r=None):
        s = x if r is None else x + r
        y = F.rms_norm(s, s.shape[-1:], w, 1e-5)
        return y if r is None else (y, s)

    def ours(impl):
        return lambda x, w, r=None: kernels.rms_norm(x, w, 1e-5, r, impl=impl)

    agree(ours("triton"), twin, inputs)
    agree(ours("torch"), twin, inputs)


def test_rms_norm_without_weight():
    agree(
        lambda x: kernels.rms_norm(x, None, impl="triton"),
        lambda x: F.rms_norm(x, x.shape[-1:], None, 1e-5),
        [randn(9, 40)],
    )


@pytest.mark.parametrize("used", [0, 1])
def test_rms_norm_of_which_one_output_is_used(used):
    agree(
        lambda x, r: kernels.rms_norm(x, None, 1e-5, r, impl="triton")[used],
        lambda x, r: kernels.rms_norm_reference(x, None, 1e-5, r)[used],
        [randn(9, 40), randn(9, 40, seed=1)],
    )


def test_the_norms_backward_fills_no_zeros(monkeypatch):
    """Without a residual there is nothing to add: a tensor of zeros would be a third more bytes."""
    y = kernels.rms_norm(guarded(randn(9, 40)), None, impl="triton")
    monkeypatch.setattr(torch, "zeros_like", None)
    y.backward(torch.ones_like(y))


def test_small_inputs_may_be_strided():
    """What is read by address alone: a norm's weight, a mixture's offsets."""
    x, weight = randn(5, 24), randn(48, seed=1)[::2]
    assert relative(kernels.rms_norm(x, weight, impl="triton"),
                    F.rms_norm(x.double(), (24,), weight.double(), 1e-5)) < 1e-5
    offsets = torch.tensor([1, 0, 3, 0, 7, 0, 8, 0], dtype=torch.int32)[::2]
    x, w = randn(8, 6), randn(4, 6, 5, seed=2)
    group = torch.tensor([0, 1, 1, 2, 2, 2, 2, 3])  # of each row
    assert relative(kernels.grouped_mm(x, w, offsets, impl="triton"),
                    torch.einsum("nd,ndf->nf", x.double(), w.double()[group])) < 1e-5


@pytest.mark.parametrize("F_", [1, 32, 75])
def test_swiglu(F_):
    inputs = [randn(3, 2, 2 * F_)]
    agree(
        lambda x: kernels.swiglu(*x.chunk(2, -1), impl="triton"),
        lambda x: x[..., :F_] / (1 + torch.exp(-x[..., :F_])) * x[..., F_:],
        inputs,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", [None, "T", "BT"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rope_is_a_complex_rotation(interleaved, positions, impl):
    B, T, H, K, E = 2, 5, 3, 1, 20
    angle = torch.rand(11, E // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    shape = {"T": (T,), "BT": (B, T)}.get(positions)
    pos = None if shape is None else torch.randint(0, 11, shape)
    rows = angle[torch.arange(T) if pos is None else pos]  # ([B,] T, E/2)
    turn = torch.polar(torch.ones_like(rows), rows)[..., None, :]

    def rotate(x):
        pair = x.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        dim = -1 if interleaved else -2
        z = torch.complex(*pair.unbind(dim)) * turn
        return torch.stack((z.real, z.imag), dim).flatten(-2)

    cos, sin = angle.cos().float().to(TRITON), angle.sin().float().to(TRITON)
    pos = None if pos is None else pos.to(TRITON)
    agree(
        lambda q, k: kernels.apply_rope(q, k, cos, sin, pos, interleaved, impl=impl),
        lambda q, k: (rotate(q), rotate(k)),
        (randn(B, T, H, E), randn(B, T, K, E, seed=1)),
    )


# ---- the loss ----


@pytest.mark.parametrize("impl", ["torch", "chunked", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "z_loss": 0.01},
        {"reduction": "none", "softcap": 3.0, "ignore_index": 7},
        {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0},
    ],
)
def test_linear_cross_entropy(impl, options):
    N, D, V = 37, 24, 83
    t = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(4))
    t[::5] = options.get("ignore_index", -100)

    def twin(x, w):
        z = x @ w.t()
        z = options["softcap"] * torch.tanh(z / options["softcap"]) if "softcap" in options else z
        reduction = options.get("reduction", "mean")
        keep = {k: options[k] for k in ("label_smoothing", "ignore_index") if k in options}
        loss = F.cross_entropy(z, t, reduction="none", **keep)
        valid = t != options.get("ignore_index", -100)
        loss = loss + options.get("z_loss", 0.0) * torch.logsumexp(z, -1) ** 2 * valid
        return {"mean": loss.sum() / valid.sum(), "sum": loss.sum(), "none": loss}[reduction]

    def ours(x, w):
        return kernels.linear_cross_entropy(x, w, t.to(TRITON), impl=impl, **options)

    agree(ours, twin, (randn(N, D), randn(V, D, seed=1)))


@pytest.mark.parametrize("impl", ["torch", "chunked", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_gives_zero_loss_and_gradients(impl, reduction):
    x, w = guarded(randn(30, 16)), guarded(randn(50, 16))
    t = torch.full((30,), -100, device=TRITON)
    loss = kernels.linear_cross_entropy(x, w, t, impl=impl, reduction=reduction, z_loss=0.1)
    loss.sum().backward()
    assert (loss == 0).all() and (x.grad == 0).all() and (w.grad == 0).all()


@pytest.mark.parametrize("impl", ["torch", "chunked", "triton"])
def test_log_probabilities(impl):
    x, w, t = randn(4, 9, 16), randn(50, 16, seed=1), torch.arange(36).view(4, 9)
    t[0, 0] = -100
    logp = torch.log_softmax(x.double() @ w.double().t(), -1)
    want = logp.gather(-1, t.clamp_min(0)[..., None])[..., 0]
    want[0, 0] = 0
    x, w, t = x.to(TRITON), w.to(TRITON), t.to(TRITON)
    loss, got = kernels.linear_cross_entropy(x, w, t, impl=impl, return_logprobs=True)
    assert relative(got, want) < 1e-5 and relative(loss, -want.sum() / 35) < 1e-5
    none = kernels.linear_cross_entropy(x, w, t, impl=impl, reduction="none")
    assert relative(-none, want) < 1e-5


def test_loss_with_a_frozen_weight_and_under_autocast():
    x, w, t = guarded(randn(40, 16)), randn(60, 16, seed=1).to(TRITON), torch.arange(40).to(TRITON)
    kernels.linear_cross_entropy(x, w, t, impl="chunked").backward()
    want = torch.autograd.grad(F.cross_entropy(x @ w.t(), t), x)[0]
    assert relative(x.grad, want) < 1e-5
    w.requires_grad_()
    with torch.autocast(TRITON, dtype=torch.bfloat16):
        loss = kernels.linear_cross_entropy(x, w, t)
    loss.backward()
    assert loss.dtype == torch.float32 and w.grad.dtype == torch.float32
    assert relative(loss, F.cross_entropy(x @ w.t(), t)) < 0.02


def test_loss_computes_no_gradients_where_none_are_wanted(monkeypatch):
    wanted, core = [], kernels._chunked_core
    monkeypatch.setattr(kernels, "_chunked_core", lambda *a: wanted.append(a[-2:]) or core(*a))
    x, w, t = guarded(randn(8, 16)), guarded(randn(9, 16)), torch.arange(8, device=TRITON)
    with torch.no_grad():
        kernels.linear_cross_entropy(x, w, t, impl="torch")
    kernels.linear_cross_entropy(x, w, t, impl="torch")
    assert wanted == [(False, False), (True, True)]


def test_loss_memory_is_under_a_quarter_of_the_naive_path():
    script = """
import resource, sys, torch, torch.nn.functional as F, kernels
x, w = torch.randn(2048, 64, requires_grad=True), torch.randn(50257, 64, requires_grad=True)
t = torch.arange(2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "ours":
    kernels.linear_cross_entropy(x, w, t).backward()
else:
    F.cross_entropy(x @ w.t(), t).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ours, naive = (int(subprocess.run([sys.executable, "-c", script, which], capture_output=True,
                                      text=True, check=True, cwd=os.path.dirname(kernels.__file__))
                       .stdout) for which in ("ours", "naive"))
    assert ours < naive / 4, (ours, naive)


# ---- AdamW, experts, Muon ----


@pytest.mark.parametrize("offsets", [[0, 20, 20, 53, 60], [7, 7, 7, 7, 7], [0, 0, 0, 0, 64]])
def test_grouped_mm(offsets):
    ends = torch.tensor(offsets)

    def twin(x, w):
        group = torch.searchsorted(ends, torch.arange(64), right=True)
        rows = w[group.clamp_max(4)] * (group < 5)[:, None, None]  # one matrix a row
        return torch.einsum("nd,ndf->nf", x, rows)

    for impl in ("torch", "triton"):
        agree(lambda x, w, i=impl: kernels.grouped_mm(x, w, ends.to(x.device), impl=i), twin,
              (randn(64, 20), randn(5, 20, 37, seed=1)))


@pytest.mark.parametrize("shape", [(1, 5), (70, 33), (2, 3, 17, 16)])
def test_symmetric_mm(shape):
    for impl in ("torch", "triton"):
        agree(lambda x, i=impl: kernels.symmetric_mm(x, impl=i), lambda x: x @ x.mT,
              [randn(*shape)])
    x = randn(*shape).to(TRITON)
    y = kernels.symmetric_mm(x.mT, impl="triton")
    assert relative(y, x.double().mT @ x.double()) < 1e-5 and (y == y.mT).all()


def adamw_state(*params):
    """(params, gradients, exp_avgs, exp_avg_sqs) before the first step; gradients are 1."""
    params = [p.to(TRITON) for p in params]
    moments = ([torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2))
    return params, [torch.ones_like(p) for p in params], *moments


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("lengths", [(7, 165, 1, 130), (16, 160)])
def test_fused_adamw_is_torchs(impl, lengths):
    ours, grads, m, v = adamw_state(*(randn(n, seed=i) for i, n in enumerate(lengths)))
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    options = dict(lr=0.03, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    b = torch.optim.AdamW(theirs, **options)
    for step in range(3):
        for i, (g, q) in enumerate(zip(grads, theirs)):
            g.copy_(randn(*g.shape, seed=100 * step + i))
            q.grad = g * 0.25
        kernels.fused_adamw(ours, grads, m, v, step=step + 1, impl=impl, **options,
                            grad_scale=torch.tensor(0.25, device=TRITON))
        b.step()
    for p, q, second in zip(ours, theirs, v):
        assert relative(p, q) < 1e-6
        assert relative(second, b.state[q]["exp_avg_sq"]) < 1e-6


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_adamw_master_weights_keep_small_steps(impl):
    state = adamw_state(torch.full((100,), 256.0, dtype=torch.bfloat16))
    master = state[0][0].float()
    for step in range(200):  # 0.01 is far below bf16's step of 2 at 256: 200 of them are one
        kernels.fused_adamw(*state, [master], lr=0.01, weight_decay=0.0, step=step + 1, impl=impl)
    assert master.sub(254.0).abs().max() < 0.01
    assert (state[0][0] == 254.0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_adamw_stochastic_rounding_is_right_on_average(impl):
    state = adamw_state(torch.full((4096,), 256.0, dtype=torch.bfloat16))
    kernels.fused_adamw(*state, lr=0.5, weight_decay=0.0, step=1, impl=impl)
    p = state[0][0].float()
    # 255.5 lies between bf16's 255 and 256: half of 4096 coins each, standard deviation 0.0078
    assert set(p.unique().tolist()) == {255.0, 256.0}
    assert abs(p.mean().item() - 255.5) < 5 * 0.0078


# ---- all of them ----


def every_function(impl):
    """(name, call, inputs) for each public function."""
    q, k, v = randn(1, 33, 2, 24), randn(1, 40, 1, 24, seed=1), randn(1, 40, 1, 24, seed=2)
    angle = torch.rand(33, 12, device=TRITON)
    t, ends = torch.arange(33, device=TRITON), torch.tensor([0, 20, 33], device=TRITON)
    cu = torch.tensor([0, 10, 10, 33], device=TRITON)
    yield "flash", lambda *x: kernels.flash_attention(*x, window=9, impl=impl), (q, k, v)
    yield "varlen", lambda *x: kernels.flash_attention_varlen(*x, cu, 23, impl=impl), (q[0],) * 3
    yield "decode", lambda *x: kernels.flash_decode(*x, impl=impl), (q[:, :3], k, v)
    yield "split decode", lambda *x: kernels.flash_decode(*x, num_splits=3, impl=impl), (
        q[:, :1], k.repeat(1, 5, 1, 1), v.repeat(1, 5, 1, 1))
    yield "norm", lambda x: kernels.rms_norm(x, None, 1e-5, impl=impl), (q,)
    yield "norm of a sum", lambda x: kernels.rms_norm(x, None, 1e-5, x, impl=impl), (q,)
    yield "swiglu", lambda x: kernels.swiglu(x, x, impl=impl), (q,)
    yield "rope", lambda x: kernels.apply_rope(x, x, angle, angle, impl=impl), (q,)
    x, w = q[0, :, 0], k[0, :, 0]
    yield "loss", lambda x, w: kernels.linear_cross_entropy(x, w, t, impl=impl), (x, w)
    yield "experts", lambda x, w: kernels.grouped_mm(x, w, ends, impl=impl), (x, randn(3, 24, 5))
    yield "symmetric", lambda x: kernels.symmetric_mm(x, impl=impl), (q[0, :, 0],)


def test_gradients_of_the_twins():
    for name, call, inputs in every_function("torch"):
        inputs = [(x[:, :6] if x.dim() == 4 else x).double().to(TRITON) for x in inputs]
        inputs = [x.requires_grad_() for x in inputs]
        if name in ("flash", "norm", "norm of a sum", "swiglu", "symmetric", "experts", "loss"):
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True), name


def test_nothing_is_written_outside_or_left_unwritten(monkeypatch):
    """Outputs are laid out full of NaN between NaNs: none may stay inside, none change outside."""
    made = []

    def empty(*shape, like=None, dtype=None, device=None, **_):
        shape = like.shape if like is not None else shape[0] if len(shape) == 1 else shape
        dtype = dtype or (like.dtype if like is not None else torch.float32)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        made.append(torch.full((math.prod(shape) + 4096,), math.nan, dtype=dtype))
        return made[-1][2048 : 2048 + math.prod(shape)].view(shape)

    cases = [(name, call, [guarded(x) for x in inputs])
             for name, call, inputs in every_function("triton")]
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: empty(like=x, **options))
    if TRITON == "cuda":
        pytest.skip("the guard regions are laid in host memory")
    for name, call, inputs in cases:
        outs = call(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        grads = []
        if "decode" not in name:
            grads = torch.autograd.grad(outs, inputs, [o.detach() for o in outs])
        assert all(torch.isfinite(x).all() for x in (*outs, *grads)), name
    assert len(made) > 15
    assert all(torch.isnan(x[:2048]).all() and torch.isnan(x[-2048:]).all() for x in made)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: kernels.flash_attention(x, x[:, :, :0], x[:, :, :0]), "heads a multiple"),
        (lambda x: kernels.flash_attention(x, x, x, window=0), "window=0"),
        (lambda x: kernels.flash_attention(x, x, x, scale=-1.0), "scale=-1.0"),
        (lambda x: kernels.flash_attention(x, x, x, impl="cuda"), "impl='cuda'"),
        (lambda x: kernels.flash_attention(x, x.half(), x.half()), "share a dtype"),
        (lambda x: kernels.rms_norm(x, x), "weight (D,)"),
        (lambda x: kernels.rms_norm(x.double(), None, impl="triton"), "float64"),
        (lambda x: kernels.swiglu(x, x[0]), "same shape"),
        (lambda x: kernels.apply_rope(x, x, x, x), "cos and sin (rows"),
        (lambda x: kernels.linear_cross_entropy(x, x[0, :, 0], torch.full((2, 5, 3), 5)), "0 .. 4"),
        (lambda x: kernels.grouped_mm(x, x, x), "need x (N, D)"),
        (lambda x: kernels.symmetric_mm(x[0, 0, 0]), "(..., M, K)"),
        (lambda x: kernels.fused_adamw([x.bfloat16()], [x], [x], [x], lr=1.0, step=1,
                                       impl="triton"), "in one dtype"),
    ],
)
def test_mistakes_end_in_one_line(call, message):
    with pytest.raises(ValueError) as problem:
        call(randn(2, 5, 3, 16))
    assert message in str(problem.value) and "\n" not in str(problem.value)


def test_bench_prints_a_checked_row(capsys):
    assert kernels.main(["bench", "--only", "swiglu"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| swiglu")]
    assert len(rows) >= 2 and all(row.count("|") == 10 for row in rows)
    assert kernels.main(["bench", "--only", "nope"]) == 2
    assert "--only nope: no such kernel; there are flash_attention," in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert kernels.main(["bench", "--tune"]) == 2
        assert "need a GPU" in capsys.readouterr().err


def compile_for_hopper():
    """Compile the kernels for compute capability 9.0 (H100, H200) without a GPU, and print how much
    shared memory each wants. Settles Triton for the whole process: the test below runs it."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Elsewhere:  # what Triton asks of a driver until it launches
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = get_current_stream = staticmethod(lambda *_: 0)

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = f"{self.fn.__name__} {kernel.metadata.shared}"

    triton.runtime.driver.set_active(Elsewhere())
    run, compiled, triton.JITFunction.run = triton.JITFunction.run, {}, compile_only
    again = "varlen", "loss", "experts", "symmetric"  # the kernel of flash, or larger below
    calls = [case for case in every_function("triton") if case[0] not in again]
    # Sizes of a model: 16-byte loads and several steps of a matmul, which take the most memory.
    x, w, t, ends = randn(64, 512), randn(256, 512), torch.arange(64), torch.tensor([9, 64])
    angle = torch.zeros(64, 32)
    for impl in ("triton", "chunked"):
        loss = functools.partial(kernels.linear_cross_entropy, targets=t, impl=impl)
        calls.append(("loss", loss, (x, w)))
    calls += [
        ("experts", functools.partial(kernels.grouped_mm, offsets=ends, impl="triton"),
         (x, randn(2, 512, 128))),
        ("symmetric", functools.partial(kernels.symmetric_mm, impl="triton"), (x,)),
        ("rope", lambda q: kernels.apply_rope(q, q, angle, angle, interleaved=True, impl="triton"),
         (randn(1, 64, 2, 64),)),
    ]
    for E in (64, 128, 256):  # the tiles differ
        capped = functools.partial(kernels.flash_attention, softcap=30.0 * (E == 64), impl="triton")
        calls.append(("flash", capped, [randn(1, 96, 2, E)] * 3))
    for dtype in (torch.bfloat16, torch.float32):
        for name, call, inputs in calls:
            inputs = [x.to(dtype).requires_grad_() for x in inputs]
            outs = call(*inputs)
            outs = outs if isinstance(outs, tuple) else (outs,)
            if "decode" not in name:
                torch.autograd.grad(outs, inputs, outs)
        p, m = torch.zeros(4096, dtype=dtype), torch.zeros(4096)
        for masters in (None, [m]):
            kernels.fused_adamw([p], [p], [m], [m], masters, lr=1e-3, step=1, impl="triton")
    print(*compiled.values(), sep="\n")


def test_every_kernel_compiles_for_hopper():
    """The interpreter accepts programs that the compiler refuses."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": os.path.dirname(kernels.__file__)}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    names, shared = zip(*(line.split() for line in run.stdout.splitlines()))
    assert max(map(int, shared)) <= 227 * 1024  # what a block may have
    jitted = [getattr(f, "fn", None) for f in vars(kernels).values()]
    jitted = [f for f in jitted if inspect.isfunction(f)]
    launched = [f.__name__ for f in jitted if "tl.program_id(0)" in inspect.getsource(f)]
    assert len(launched) > 12 and set(names) == set(launched)
    # the tiles of every head dimension, forward and backward, in both types, and one with a cap
    assert names.count("_flash_backward_kv") >= 7


if __name__ == "__main__":
    compile_for_hopper()
