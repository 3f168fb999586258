"""model.py against torch's own layers, formulas written out here, and transformers if installed."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.func import functional_call

import model as M
from model import ModelConfig, Transformer

TINY = {"vocab_size": 96, "context_length": 128, "d_model": 32, "num_layers": 2, "num_heads": 4}


def tiny(seed=0, **flags):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**{**TINY, **flags})).eval()


def random_ids(*shape, vocab=96, seed=1):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- layers, in fp64 against torch's own --------------------------------------------------------


def check(ours, theirs, *inputs, **close):
    """Same values, same gradients, and the gradient is that of the function (gradcheck)."""
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), **close)
    for a, b in zip(*(torch.autograd.grad(f(*inputs).square().sum(), inputs)
                      for f in (ours, theirs))):
        torch.testing.assert_close(a, b, **close)
    assert torch.autograd.gradcheck(ours, inputs)


def double(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def test_elementwise_layers():
    x = double(3, 4, 5)
    check(lambda x: M.softmax(x, 1), lambda x: F.softmax(x, 1), x)
    check(M.silu, F.silu, x)
    assert M.softmax(torch.tensor([1e4, 1e4, -1e4])).tolist() == [0.5, 0.5, 0.0]
    assert M.softmax(torch.tensor([-1e4])).tolist() == [1.0]


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 6), (1, 1, 1, 6)])
def test_norms(shape):
    x = double(*shape)
    for ours, theirs in ((M.RMSNorm(6, 1e-5), torch.nn.RMSNorm(6, 1e-5)),
                         (M.LayerNorm(6, 1e-5), torch.nn.LayerNorm(6, 1e-5))):
        ours, theirs = ours.double(), theirs.double()
        weight = double(6, seed=1)
        check(lambda x, w, m=ours: functional_call(m, {"weight": w}, (x,)),
              lambda x, w, m=theirs: functional_call(m, {"weight": w}, (x,)), x, weight)


def test_rmsnorm_adds_up_in_fp32():
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # the squares alone overflow fp16
    torch.testing.assert_close(M.RMSNorm(4096).half()(x), torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rmsnorm_is_the_same_without_gradients(dtype):
    norm, x = M.RMSNorm(6, 0.3).to(dtype), double(2, 3, 6).to(dtype)
    norm.weight.data = double(6, seed=1).to(dtype)
    with_gradients = norm(x).detach()
    with torch.no_grad():
        assert torch.equal(norm(x), with_gradients)
        torch.testing.assert_close(norm(x.double()),
                                   F.rms_norm(x.double(), (6,), norm.weight.double(), 0.3))


def test_linear_embedding_swiglu_and_mlp():
    x, ids = double(2, 3, 6), torch.tensor([[0, 4], [4, 1]])
    linear = M.Linear(6, 4).double()
    check(linear, lambda x: x @ linear.weight.T, x)
    table = M.Embedding(5, 3)
    assert torch.equal(table(ids), table.weight[ids])
    ffn = M.SwiGLU(6, 8).double()
    check(ffn, lambda x: (F.silu(x @ ffn.w1.weight.T) * (x @ ffn.w3.weight.T)) @ ffn.w2.weight.T, x)
    for kind, f in {"silu": F.silu, "gelu": lambda h: F.gelu(h, approximate="tanh"),
                    "relu2": lambda h: F.relu(h) ** 2}.items():
        mlp = M.MLP(6, 8, kind).double()
        check(mlp, lambda x, m=mlp, f=f: f(x @ m.w1.weight.T) @ m.w2.weight.T, x)


def test_few_rows_take_the_same_product(monkeypatch):
    monkeypatch.setattr(M, "ON_AMD", True)
    weight = torch.randn(7, 6)
    for shape in ((1, 6), (1, 1, 6), (4, 6), (2, 2, 6), (5, 6), (0, 6)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(M.project(x, weight), x @ weight.T)


def test_initialisation_is_a_truncated_normal():
    torch.manual_seed(0)
    std = (2 / (300 + 700)) ** 0.5
    w = M.Linear(300, 700).weight
    assert w.shape == (700, 300) and w.abs().max() <= 3 * std
    assert abs(w.std() / std - 0.9866) < 0.005  # the cut at 3 sigma takes 1.3% of the deviation
    e = M.Embedding(500, 300).weight
    assert e.abs().max() <= 3 and abs(e.std() - 0.9866) < 0.01


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (2, 3, 5, 4), (1, 1, 4)])
def test_plain_attention(shape):
    q, k, v = (double(*shape, seed=i) for i in range(3))
    T = shape[-2]
    mask = torch.rand(T, T, generator=torch.Generator().manual_seed(3)) < 0.6
    mask |= torch.eye(T, dtype=torch.bool)
    for m in (None, mask):
        check(lambda q, k, v, m=m: M.scaled_dot_product_attention(q, k, v, m),
              lambda q, k, v, m=m: F.scaled_dot_product_attention(q, k, v, m), q, k, v)
    big = M.scaled_dot_product_attention(q * 1e4, k * 1e4, v)
    assert big.isfinite().all()


@pytest.mark.parametrize("K", [6, 2, 1])
def test_attention_of_one_query_is_the_plain_one(K):
    q, k, v = double(3, 1, 6, 4), double(3, 9, K, 4, seed=1), double(3, 9, K, 4, seed=2)
    mask = torch.arange(9) < torch.tensor([9, 1, 5])[:, None, None, None]  # (B, 1, 1, S)
    for m in (None, mask):
        q_, k_, v_ = (t.transpose(1, 2) for t in (q, k, v))
        want = F.scaled_dot_product_attention(q_, k_, v_, m, enable_gqa=True).transpose(1, 2)
        with torch.no_grad():
            torch.testing.assert_close(M.attend(q, k, v, m, ModelConfig()), want)


@pytest.mark.parametrize("flags", [{}, {"sliding_window": 4, "logit_softcap": 9.0},
                                   {"attention_softcap": 5.0, "num_kv_heads": 2}])
def test_kernels_of_a_gpu_compute_the_same(flags, monkeypatch):
    """attention="flash", with the twins that kernels.py runs where there is no GPU."""
    kernels = pytest.importorskip("kernels")
    ids, targets = random_ids(2, 12), random_ids(2, 12, seed=2)
    targets[0, :5] = -100
    used, results = [], []
    for attention in ("sdpa", "flash"):
        model = tiny(attention=attention, **flags)
        loss = model.loss(ids, targets, z_loss=0.01)
        loss.backward()
        results.append([loss, model(ids), *(p.grad for p in model.parameters())])
        monkeypatch.setattr(M, "kernels_for",
                            lambda x, a: used.append(a) or (kernels if a == "flash" else None))
    assert used.count("flash") == 2 * (2 * 5 + 1) + 1 + (2 if "sliding_window" in flags else 0)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_rotary_embedding_turns_pairs_by_their_angle():
    x, positions = double(2, 3, 7, 8), torch.tensor([0, 1, 2, 5, 9, 100, 4000])
    angle = positions[:, None] * 100.0 ** -(torch.arange(4) / 4)  # theta^(-2i/E)
    turn = torch.polar(torch.ones(7, 4, dtype=torch.float64), angle.double())
    half = M.RotaryEmbedding(8, 100.0, 4096)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * turn  # Llama pairs i with i + E/2
    torch.testing.assert_close(half(x, positions), torch.cat((pairs.real, pairs.imag), -1),
                               atol=2e-4, rtol=0)  # angles are fp32: 4000 radians +- 2e-4
    near = M.RotaryEmbedding(8, 100.0, 4096, interleaved=True)
    pairs = torch.view_as_complex(x.reshape(2, 3, 7, 4, 2)) * turn
    torch.testing.assert_close(near(x, positions), torch.view_as_real(pairs).reshape(x.shape),
                               atol=2e-4, rtol=0)
    q, k = double(8), double(8, seed=1)  # only the distance counts
    turn = lambda x, p: half(x[None], torch.tensor([p]))[0]  # noqa: E731
    torch.testing.assert_close(turn(q, 7) @ turn(k, 3), turn(q, 14) @ turn(k, 10))


def test_cross_entropy_matches_torch_and_survives_extremes():
    logits, targets = double(4, 3, 7), torch.randint(0, 7, (4, 3))
    targets[0, 1] = -100
    for reduction in ("mean", "sum", "none"):
        def theirs(x, r=reduction):
            return F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction=r).view(
                targets.shape if r == "none" else ())
        # cross_entropy works in fp32 at least, and must not lose fp64 either
        check(lambda x, r=reduction: M.cross_entropy(x, targets, r), theirs, logits)
    z = M.cross_entropy(logits, targets, z_loss=0.1) - M.cross_entropy(logits, targets)
    lse = logits.logsumexp(-1)[targets != -100]
    torch.testing.assert_close(z, 0.1 * lse.square().mean())
    big = torch.tensor([[1e4, -1e4, 0.0]])
    assert M.cross_entropy(big, torch.tensor([0])) == 0
    assert M.cross_entropy(big, torch.tensor([1])) == 2e4


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_fused_cross_entropy(softcap, chunk):
    hidden, weight, targets = double(11, 4), double(9, 4, seed=1), torch.arange(11) % 9
    targets[3] = -100

    def plain(h, w):
        logits = h @ w.T
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        z = 0.01 * logits.logsumexp(-1).square()[targets != -100].sum()
        return F.cross_entropy(logits, targets, reduction="sum") + z

    check(lambda h, w: M.FusedCrossEntropy.apply(h, w, targets, -100, softcap, 0.01, chunk),
          plain, hidden, weight)


# ---- mixture of experts -------------------------------------------------------------------------


def test_moe_is_the_dense_sum_over_chosen_experts():
    torch.manual_seed(0)
    moe = M.MoE(ModelConfig(**TINY, d_ff=8, num_experts=5, num_shared_experts=1)).double()

    def dense(x):
        p = F.softmax(x @ moe.router.weight.T, -1)
        top, chosen = p.topk(2)
        y = moe.shared(x)
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                y[b, t] += sum(w / top[b, t].sum() * moe.experts[e](x[b, t])
                               for w, e in zip(top[b, t], chosen[b, t]))
        return y

    check(moe, dense, double(2, 3, 32))
    x = torch.zeros(1, 6, 32, dtype=torch.float64)
    moe(x)  # equal probabilities: topk takes the same two experts for every token
    assert abs(moe.aux.item() - 1.0) < 1e-6  # n * sum(share * 1/n) = 1 whatever the share


def test_bias_balancing_evens_the_load():
    torch.manual_seed(0)
    moe = M.MoE(ModelConfig(**TINY, d_ff=8, num_experts=4, balance="bias"))
    with torch.no_grad():
        moe.router.weight[0] += 0.3  # expert 0 is everybody's favourite
    x = torch.randn(1, 256, 32) + 0.3

    def spread():
        moe.load = 0
        moe(x)
        return (moe.load.max() / moe.load.mean()).item()

    before = spread()
    for rate in [0.01] * 200 + [0.002] * 50:  # small steps last: a step of the bias moves tokens
        moe(x)
        moe.balance(rate)
    assert before > 1.5 and spread() < 1.2
    moe.eval()(x)
    assert moe.load.sum() == 512  # of spread() only: eval does not count


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_auxiliary_loss_counts_once_a_token(balance):
    model = tiny(num_experts=4, d_ff=16, balance=balance, balance_loss=0.5).train()
    ids, targets = random_ids(2, 12), random_ids(2, 12, seed=2)
    targets[0, :5] = -100
    mean, total = model.loss(ids, targets), model.loss(ids, targets, reduction="sum")
    torch.testing.assert_close(total / 19, mean)
    aux = sum(m.aux for m in model.moes())
    plain = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(mean, plain + (0.5 * aux if balance == "loss" else 0))


# ---- the model ----------------------------------------------------------------------------------

VARIANTS = {
    "default": {}, "post": {"norm": "post"}, "none": {"norm": "none"},
    "naive": {"attention": "naive"},
    "olmo": {"norm": "output", "qk_norm": "full"}, "layernorm": {"norm_type": "layer"},
    "gpt2": {"position": "learned", "norm_type": "layer", "ffn": "gelu", "bias": True,
             "qk_norm": False, "tie_embeddings": True},
    "nope": {"position": "none", "ffn": "silu"}, "zero": {"zero_init": True},
    "fast": {"value_embeddings": 1, "residual_scalars": True, "logit_softcap": 15.0,
             "ffn": "relu2", "num_kv_heads": 2, "tie_embeddings": True},
    "window": {"sliding_window": 4, "num_kv_heads": 1}, "softcap": {"attention_softcap": 5.0},
    "moe": {"num_experts": 4, "d_ff": 16},
    "moe-bias": {"num_experts": 4, "d_ff": 16, "balance": "bias", "num_shared_experts": 1},
    "mla": {"kv_rank": 16, "d_rope": 8, "qk_norm": False},
}


def random_model(name):
    """Every parameter random, so that no zero or one hides a term."""
    model = tiny(**VARIANTS[name])
    for p in model.parameters():
        if p.dim() == 1 or VARIANTS[name].get("zero_init"):
            torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, tmp_path):
    """Causal; loss = cross-entropy of the logits; every parameter learns; saves and loads."""
    model, ids = random_model(name), random_ids(2, 12)
    logits, changed = model(ids), ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 96
    torch.testing.assert_close(model(changed)[:, :7], logits[:, :7], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(model(changed)[:, 7:], logits[:, 7:])
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, F.cross_entropy(model(ids[:, :-1]).flatten(0, 1),
                                                     ids[:, 1:].flatten()))
    none = model.loss(ids[:, :-1], ids[:, 1:], reduction="none")
    torch.testing.assert_close(none.mean(), loss)
    loss.backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(".experts." in n for n in idle), idle  # an expert no token chose learns nothing
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_generation_is_the_uncached_loop(name):
    """Ragged prompts, more rows than places, n samples, drafts: the same greedy tokens."""
    model, draft = random_model(name), tiny(seed=5, d_model=16, num_layers=1, num_heads=2)
    prompts = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12], [5, 6, 5, 6, 5, 6]]
    want = [greedy(model, prompt, 16) for prompt in prompts]
    for options in ({}, {"batch_size": 3}, {"draft": "ngram"}, {"draft": draft, "batch_size": 3},
                    {"draft": model, "draft_tokens": 3}, {"n": 2, "batch_size": 5}):
        done = model.generate(prompts, 16, temperature=0, **options)
        n = options.get("n", 1)
        assert [d.tokens for d in done] == [t for t in want for _ in range(n)], options
        assert {d.reason for d in done} == {"length"}


def test_speculation_needs_fewer_passes_when_guesses_are_good():
    model, passes = tiny(), []
    run = model.hidden
    model.hidden = lambda ids, *rest: passes.append(tuple(ids.shape)) or run(ids, *rest)
    model.generate([[1, 2, 3]], 16, temperature=0, draft=tiny(), draft_tokens=3)
    assert passes == [(1, 2)] + [(1, 4)] * 4  # a twin as draft: four tokens a pass
    passes.clear()
    model.generate([[1, 2, 3]] * 2 + [[4, 5]], 3, n=5)
    assert passes == [(2, 2)] + [(15, 1)] * 3  # one prefill a prompt, however many samples


@pytest.mark.parametrize("name", ["default", "window", "mla"])
def test_a_step_whose_starts_are_a_tensor(name):
    """What a CUDA graph records: every shape fixed, the whole cache behind a mask."""
    model, ids = random_model(name), random_ids(2, 9)
    cache = M.KVCache(model, 2, 32)
    with torch.no_grad():
        model.hidden(ids[:, :6], cache, [0, 0])
        logits = model(torch.stack((ids[0, 6:8], ids[1, 5:7])), cache, torch.tensor([6, 5]))
        want = model(ids)
    torch.testing.assert_close(logits, torch.stack((want[0, 6:8], want[1, 5:7])),
                               atol=1e-5, rtol=1e-5)


def greedy(model, prompt, steps):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


def test_bf16_autocast_stays_close_and_gqa_repeats():
    model, ids = tiny(num_kv_heads=2), random_ids(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.loss(ids, ids)
    assert rough.dtype == torch.float32
    assert abs(rough - model.loss(ids, ids)) < 0.05
    naive = tiny(num_kv_heads=2, attention="naive")
    torch.testing.assert_close(naive(ids), model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_have_the_dtype_of_their_weights(dtype):
    model, plain, ids = tiny().to(dtype), tiny(), random_ids(2, 16)
    for m in (model, plain):
        m.loss(ids, ids).backward()
    for p, want in zip(model.parameters(), plain.parameters()):
        assert p.grad.dtype == dtype
        torch.testing.assert_close(p.grad.float(), want.grad, atol=0.01, rtol=0.1)


def test_counts_by_hand():
    V, D, F_, L, T = 96, 32, 40, 2, 16
    model = tiny(d_ff=F_, num_kv_heads=2)
    layer = D * 32 + 2 * D * 16 + 32 * D + 3 * D * F_ + 2 * D + 2 * 8
    assert model.num_parameters() == 2 * V * D + L * layer + D
    assert model.num_parameters(embeddings=False) == V * D + L * layer + D
    tied = tiny(d_ff=F_, num_kv_heads=2, tie_embeddings=True)  # its one table computes
    assert tied.num_parameters(embeddings=False) == tied.num_parameters() == V * D + L * layer + D
    matmul = L * (2 * D * 32 + 2 * D * 16 + 3 * D * F_) + V * D
    products = sum(2 * 2 * 32 * (t + 1) for t in range(T)) / T * L  # q k^T and p v, H E = 32
    assert model.flops_per_token(T) == pytest.approx(3 * (2 * matmul + products))
    sparse = tiny(num_experts=4, experts_per_token=2, d_ff=F_)
    dense = tiny(d_ff=2 * F_)  # two experts of F_ cost what one of 2 F_ does, and the router
    assert sparse.flops_per_token(T) == dense.flops_per_token(T) + 6 * L * 4 * D


def test_gpt2_sizes_and_cache_memory(capsys):
    for name, millions in {"gpt2": 124.4, "gpt2-xl": 1557.6}.items():
        assert M.count_only(name).num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)
    model = tiny(num_kv_heads=2)
    cache = M.KVCache(model, 3, 1024)
    assert sum(t.nbytes for t in cache.k + cache.v) == 2 * 2 * 3 * 1024 * 2 * 8 * 4  # 2 L B T K E
    assert M.main(["account", "--model", "gpt2"]) == 0
    assert "124,439,808" in capsys.readouterr().out


# ---- sampling -----------------------------------------------------------------------------------


def test_filters_by_hand():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    close = {"atol": 1e-6, "rtol": 0}
    for want, *filters in (([0.5, 0.3, 0.15, 0.05], 1.0), ([1.0, 0, 0, 0], 0),
                           ([0.625, 0.375, 0, 0], 1.0, 2), ([0.625, 0.375, 0, 0], 1.0, 0, 0.7),
                           ([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], 1.0, 0, 0.81),
                           ([0.625, 0.375, 0, 0], 1.0, 0, 1.0, 0.4),
                           ([1.0, 0, 0, 0], 1.0, 0, 1e-6)):
        torch.testing.assert_close(M.distribution(logits, *filters), torch.tensor(want), **close)
    hot = M.distribution(logits, 2.0)
    torch.testing.assert_close(hot, F.softmax(logits / 2, -1), **close)


def test_draw_follows_the_distribution_and_its_edges():
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    u = torch.tensor([0.0, 0.2499, 0.25, 0.9999999])
    assert M.draw(p.expand(4, -1), u).tolist() == [1, 1, 3, 3]


def chi_square(counts, expected):
    keep = expected > 0
    assert counts[~keep].sum() == 0
    return ((counts - expected)[keep] ** 2 / expected[keep]).sum().item(), int(keep.sum()) - 1


@pytest.mark.parametrize("draft", ["small", "ngram"])
def test_speculation_leaves_the_distribution_unchanged(draft):
    """Chi-square over 20,000 draws of the second token, whose guess depends on the first."""
    model = tiny(vocab_size=8, d_model=16, num_layers=1, num_heads=2)
    small = tiny(seed=3, vocab_size=8, d_model=8, num_layers=1, num_heads=2)
    filters, n, prompt = {"temperature": 1.5, "top_k": 6}, 20_000, [1, 2, 1, 2]
    done = model.generate([prompt], 3, n=n, batch_size=n, seed=7, draft_tokens=2,
                          draft=small if draft == "small" else draft, **filters)
    counts = torch.zeros(8, 8)
    for d in done:
        counts[d.tokens[0], d.tokens[1]] += 1
    p0 = M.distribution(model(torch.tensor([prompt]))[0, -1], 1.5, 6)
    p1 = M.distribution(model(torch.tensor([[*prompt, a] for a in range(8)]))[:, -1], 1.5, 6)
    statistic, freedom = chi_square(counts.flatten(), n * (p0[:, None] * p1).flatten().detach())
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)


def test_seeds_streams_and_log_probabilities():
    model, prompts = tiny(), [[1, 2, 3], [4]]
    done = model.generate(prompts, 12, seed=1, n=3)
    assert [d.prompt for d in done] == [0, 0, 0, 1, 1, 1]
    assert len({tuple(d.tokens) for d in done}) == 6
    again = model.generate(prompts, 12, seed=1, n=3, batch_size=2)  # another batch, same tokens
    assert [d.tokens for d in again] == [d.tokens for d in done]
    assert [d.tokens for d in model.generate(prompts, 12, seed=2, n=3)] != [
        d.tokens for d in done]
    streamed = [[] for _ in done]
    for row, token in model.stream(prompts, 12, seed=1, n=3):
        streamed[row.sample].append(token)
    assert streamed == [d.tokens for d in done]
    ids = torch.tensor([prompts[0] + done[0].tokens])
    scores = F.log_softmax(model(ids)[0, 2:-1], -1).gather(-1, ids[0, 3:, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor(done[0].logprobs), scores, atol=1e-4, rtol=1e-4)


class Letters:
    """A tokenizer of single letters, enough to stop at a string."""

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def test_rows_that_end_wait_until_moving_pays():
    """Of 8 rows one ends at its first token: it stays idle in the batch, and changes nothing."""
    model, prompts = tiny(), [[i, i + 1] for i in range(8)]
    want = [greedy(model, prompt, 6) for prompt in prompts]
    stop = want[0][0]
    for batch_size in (8, 3):
        done = model.generate(prompts, 6, temperature=0, stop=[stop], batch_size=batch_size)
        for d, tokens in zip(done, want):
            cut = tokens.index(stop) + 1 if stop in tokens else 6
            assert d.tokens == tokens[:cut] and len(d.logprobs) == cut
            assert d.reason == ("stop" if stop in tokens else "length")


def test_why_it_stops():
    model = tiny()
    tokens = greedy(model, [1, 2], 10)
    stop = model.generate([[1, 2]], 10, temperature=0, stop=[tokens[4]])[0]
    assert stop.reason == "stop" and stop.tokens == tokens[:tokens.index(tokens[4]) + 1]
    word = Letters().decode(tokens[3:6])
    done = model.generate([[1, 2]], 10, temperature=0, stop=[word], tokenizer=Letters())[0]
    assert done.reason == "stop" and done.text == Letters().decode(tokens[:6])
    full = model.generate([list(range(90)) + [1] * 30], 50, temperature=0)[0]
    assert full.reason == "context" and len(full.tokens) == 128 - 120
    for prompt, message in (([], "0 tokens"), ([1] * 128, "128 tokens"), ([96], "vocab_size")):
        with pytest.raises(ValueError, match=message):
            model.generate([prompt], 5)
    with pytest.raises(ValueError, match="context_length"):
        model(random_ids(1, 129))
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate([[1]], 5, stop=["a"])
    assert model.generate([], 5) == []


def test_int8_within_its_rounding():
    model, ids = tiny(d_model=64, num_layers=2), random_ids(2, 20)
    want, matrix = model(ids), model.layers[0].ffn.w1.weight.detach().clone()
    M.quantize(model)
    got = model.layers[0].ffn.w1
    error = (got.weight * got.scale[:, None].float() - matrix).abs()
    assert (error <= got.scale[:, None].float() * 0.5 + matrix.abs().amax(1, True) / 127).all()
    assert error.max() > 0 and got.weight.dtype == torch.int8
    assert (model(ids) - want).square().mean() < 1e-3 * want.square().mean()
    one = model(ids[:1, :1])  # one row takes torch's kernel
    assert (one - want[:1, :1]).square().mean() < 1e-3 * want.square().mean()
    assert model.generate([[1, 2, 3]], 8, temperature=0)[0].tokens


# ---- checkpoints --------------------------------------------------------------------------------


def test_names_and_default_configuration(tmp_path):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["architectures"] == ["Qwen3ForCausalLM"]
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.1.self_attn.q_norm.weight" in names and len(names) == 2 * 11 + 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_what_cannot_be_exported_says_so(tmp_path, capsys):
    tiny(ffn="relu2").save_pretrained(tmp_path)
    error = capsys.readouterr().err
    assert "scratchlm" in error and error.count("\n") == 1
    assert Transformer.from_pretrained(tmp_path).config.ffn == "relu2"


def test_gpt2_files_without_the_prefix(tmp_path):
    model = random_model("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    assert not bare.keys() & tensors.keys()
    bare["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)  # OpenAI's files hold the causal mask
    save_file(bare, tmp_path / "model.safetensors")
    again = Transformer.from_pretrained(tmp_path)
    assert torch.equal(again(random_ids(1, 9)), model(random_ids(1, 9)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_dtypes(dtype, tmp_path):
    model, ids = tiny().to(dtype), random_ids(1, 5)
    M.save_pretrained(model, tmp_path, shard_bytes=20_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    again = Transformer.from_pretrained(tmp_path)
    assert again.embed.weight.dtype == dtype and torch.equal(again(ids), model(ids))
    assert Transformer.from_pretrained(tmp_path, torch.float32).embed.weight.dtype == torch.float32
    shards[1].unlink()
    with pytest.raises(ValueError, match=shards[1].name):
        Transformer.from_pretrained(tmp_path)


def damage(directory, what):
    """Break a saved model in one way; returns what the error must name."""
    weights, config = directory / "model.safetensors", directory / "config.json"
    tensors, h = load_file(weights), json.loads(config.read_text())
    name = "model.layers.0.self_attn.k_proj.weight"
    if what == "missing":
        del tensors[name]
    elif what == "extra":
        name = "model.layers.7.surprise"
        tensors[name] = torch.zeros(1)
    elif what == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif what == "architecture":
        h["model_type"] = name = "mamba"
    elif what == "flag":
        h["hidden_act"] = name = "relu"
    elif what == "field":
        del h["hidden_size"]
        name = "hidden_size"
    save_file(tensors, weights)
    config.write_text("{" if what == "json" else json.dumps(h))
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        name = "model.safetensors"
    elif what == "pickle":
        weights.unlink()
        torch.save(tensors, directory / "pytorch_model.bin")
        name = "pickle"
    elif what == "renamed pickle":
        torch.save(tensors, weights)
        name = "model.safetensors"
    elif what in ("json", "no config"):
        name = "config.json"
    if what == "no config":
        config.unlink()
    return name


@pytest.mark.parametrize("what", ["missing", "extra", "shape", "architecture", "flag", "field",
                                  "json", "truncated", "pickle", "renamed pickle", "no config"])
def test_broken_checkpoints_end_in_one_line(what, tmp_path, capsys):
    tiny().save_pretrained(tmp_path)
    name = damage(tmp_path, what)
    with pytest.raises(ValueError, match=name):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert M.main(["generate", "--model", str(tmp_path), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1


def test_bad_configurations():
    for flags, message in (({"ffn": "tanh"}, "ffn"), ({"num_kv_heads": 3}, "num_kv_heads"),
                           ({"value_embeddings": 2}, "value_embeddings"),
                           ({"kv_rank": 8}, "kv_rank")):
        with pytest.raises(ValueError, match=message):
            ModelConfig(**TINY, **flags)


def test_command_line(tmp_path, capsys, monkeypatch):
    tokenizer = pytest.importorskip("tokenizer")
    vocab, merges = tokenizer.train_bpe(["to be or not to be"] * 5, 270, ["<|endoftext|>"])
    tok = tokenizer.Tokenizer(vocab, merges, ["<|endoftext|>"])
    model = tiny(vocab_size=tok.vocab_size)
    model.save_pretrained(tmp_path)
    tok.save(tmp_path / "tokenizer.json")
    line = ["--model", str(tmp_path), "--temperature", "0", "--max-new-tokens", "8"]
    stop = [] if tok.eot_id is None else [tok.eot_id]
    want = model.generate([stop + tok.encode("to be")], 8, temperature=0, stop=stop)[0].tokens
    text = tok.decode([t for t in want if t not in stop])
    for blanks in ("", "   "):  # the model gets the prompt without the blanks at its end
        assert M.main(["generate", "--prompt", "to be" + blanks, *line]) == 0
        assert capsys.readouterr().out == f"to be{text}\n"
    assert M.main(["generate", "--prompt", "to", "--samples", "2", "--draft", "ngram", *line]) == 0
    assert capsys.readouterr().out.count("--- sample") == 2
    lines = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert M.main(["chat", "--int8", *line]) == 0
    capsys.readouterr()
    assert M.main(["generate", "--model", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert "nowhere/config.json is missing" in error and error.count("\n") == 1


# ---- against transformers -----------------------------------------------------------------------

HF_SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
HF_MODELS = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "llama-tied-linear": ("Llama", {"tie_word_embeddings": True,
                                    "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_scaling": YARN}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16,
                               "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "olmo2": ("Olmo2", {}),
    "gpt2": ("GPT2", None),
}


def hf_model(name, directory):
    """A random tiny checkpoint of that architecture, written by transformers."""
    transformers = M.import_transformers() or pytest.skip("transformers is not installed")
    kind, extra = HF_MODELS[name]
    if kind == "GPT2":
        config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4,
                                         n_positions=128)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = getattr(transformers, kind + "Config")(**{**HF_SIZES, **extra})
        model = getattr(transformers, kind + "ForCausalLM")(config)
    torch.manual_seed(0)
    for p in model.parameters():  # their initial biases are 0 and norms 1: too forgiving
        torch.nn.init.normal_(p, std=0.1 if p.dim() == 2 else 0.3)
        if p.dim() == 1:
            p.data += 1
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    return model.eval()


def same_names(theirs, directory):
    """Every gradient of transformers' model by our name: saved in place of the weights, opened."""
    weights = [p.data for p in theirs.parameters()]
    for p in theirs.parameters():
        p.data = p.grad
    theirs.save_pretrained(directory)
    for p, weight in zip(theirs.parameters(), weights):
        p.data = weight
    return dict(Transformer.from_pretrained(directory).named_parameters())


@pytest.mark.parametrize("name", HF_MODELS)
def test_transformers_agree_both_ways(name, tmp_path):
    theirs = hf_model(name, tmp_path / "theirs")
    ours, ids = Transformer.from_pretrained(tmp_path / "theirs").eval(), random_ids(2, 40)
    want = theirs(ids)
    want_loss = torch.nn.functional.cross_entropy(want.logits[:, :-1].flatten(0, 1),
                                                  ids[:, 1:].flatten())
    torch.testing.assert_close(ours(ids), want.logits, atol=1e-5, rtol=1e-5)
    want_loss.backward()
    ours.loss(ids[:, :-1], ids[:, 1:]).backward()
    grads = same_names(theirs, tmp_path / "grads")
    for key, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, grads[key], atol=1e-5, rtol=1e-5, msg=lambda m, k=key:
                                   f"gradient of {k}: {m}")
    prompt = ids[:1, :20]
    greedy = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64,
                             do_sample=False, pad_token_id=0)
    assert ours.generate(prompt.tolist(), 64, temperature=0)[0].tokens == greedy[0, 20:].tolist()

    transformers = M.import_transformers()
    ours.save_pretrained(tmp_path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(again) is type(theirs)
    torch.testing.assert_close(again.eval()(ids).logits, want.logits, atol=1e-5, rtol=1e-5)


def test_layers_take_a_device_and_a_dtype():
    kind = {"device": "meta", "dtype": torch.bfloat16}
    for layer in (M.Linear(3, 5, bias=True, **kind), M.Embedding(7, 3, **kind),
                  M.RMSNorm(3, **kind)):
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
