"""align.py against values worked out by hand, finite differences, and itself killed half-way."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import align
import model as model_py
import tokenizer as tokenizer_py


@pytest.fixture(scope="module")
def sorter(tmp_path_factory):
    """The default job's model after one step, and its tokenizer."""
    out = tmp_path_factory.mktemp("align")
    args = align.make_parser().parse_args(["--out", str(out), "--pretrain-steps", "1",
                                           "--lr", "1e-3", "--muon-lr", "0"])
    s = align.open_session(args)
    return s.model, s.tokenizer


def numeric_gradient(f, x, h=1e-6):
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x).view(-1)
        step[i] = h
        step = step.view_as(x)
        grad.view(-1)[i] = (f(x + step) - f(x - step)) / (2 * h)
    return grad


# ---- tokens and log-probabilities ----------------------------------------------------------------


def test_prompt_and_output_by_hand():
    ids, labels, mask = align.batch_of([align.joined([1, 2], [3, 4]),
                                        align.joined([5], [6, 7, 8])])
    assert ids.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert labels.tolist() == [[2, 3, 4], [6, 7, 8]]
    assert mask.tolist() == [[False, True, True], [True, True, True]]


def test_strings_are_encoded_apart(sorter):
    _, tok = sorter
    batch = align.tokenize_prompt_and_output(["sort 21\n"], ["<think> 21 </think>"], tok)
    ids = tok.encode("sort 21\n") + tok.encode("<think> 21 </think>")
    assert batch["input_ids"][0].tolist() == ids[:-1]
    assert batch["response_mask"].sum() == len(tok.encode("<think> 21 </think>"))


def test_entropy_of_known_distributions():
    logits = torch.log(torch.tensor([[0.5, 0.5, 1e-30], [0.7, 0.2, 0.1]]))
    expected = [math.log(2), -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))]
    assert align.compute_entropy(logits).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["ours", "logits", "has logits"])
def test_log_probs_are_torchs_for_any_model(sorter, kind):
    model, _ = sorter
    ids = torch.randint(0, 261, (3, 12), generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1], ids[:, 1:]
    wrapped = {"ours": model, "logits": lambda i: model(i),
               "has logits": lambda i: align.argparse.Namespace(logits=model(i))}[kind]
    out = align.get_response_log_probs(wrapped, x, y, True, chunk=5)
    logits = model(x).double()
    expected = -torch.nn.functional.cross_entropy(logits.mT, y, reduction="none")
    torch.testing.assert_close(out["log_probs"].double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(out["token_entropy"], align.compute_entropy(logits).float(),
                               atol=1e-5, rtol=0)
    mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    some = align.get_response_log_probs(wrapped, x, y, True, mask)["log_probs"]
    torch.testing.assert_close(some, out["log_probs"] * mask)


def test_masked_reductions():
    x, mask = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([[1, 0, 1], [0, 0, 0]])
    assert align.masked_mean(x, mask) == 2.0
    assert align.masked_mean(x, mask, 1)[0] == 2.0 and align.masked_mean(x, mask, 1)[1].isnan()
    assert align.masked_normalize(x, mask, 8.0) == 0.5
    assert align.masked_normalize(x, mask, 2.0, dim=0).tolist() == [0.5, 0.0, 1.5]


# ---- losses --------------------------------------------------------------------------------------

LOGP = torch.tensor([[-1.0, -2.0, -0.5], [-0.25, -3.0, -1.5], [-2.0, -2.0, -2.0]]).double()
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()  # unequal, and one all masked


def test_sft_step_by_hand():
    x = LOGP.clone().requires_grad_()
    loss, _ = align.sft_microbatch_train_step(x, MASK, 2, 4.0)
    assert loss.item() == pytest.approx((3.0 + 4.75) / 4 / 3 / 2)
    assert x.grad.tolist() == [[-1 / 24] * 2 + [0.0], [-1 / 24] * 3, [0.0] * 3]


def test_group_advantages_by_hand():
    table = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0}
    advantages, raw, meta = align.compute_group_normalized_rewards(
        lambda r, t: dict(reward=table[r], format_reward=1.0), list("abcddd"), ["x"] * 6, 3, 1e-6)
    deviation = math.sqrt(((2 / 3) ** 2 + 2 / 9) / 2) + 1e-6  # ddof 1
    assert advantages.tolist() == pytest.approx(
        [2 / 3 / deviation, -1 / 3 / deviation, -1 / 3 / deviation, 0, 0, 0])
    assert raw.tolist() == [1, 0, 0, 1, 1, 1] and meta["reward"] == pytest.approx(2 / 3)
    plain, _, _ = align.compute_group_normalized_rewards(
        lambda r, t: dict(reward=table[r]), list("abcddd"), ["x"] * 6, 3, normalize_by_std=False)
    assert plain.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])


@pytest.mark.parametrize("reward,size", [(0.7, 7), (0.1, 8), (1.0, 6)])
def test_equal_rewards_have_no_advantage(reward, size):
    """Though the mean of seven 0.7 is not 0.7 in fp32."""
    advantages, _, _ = align.compute_group_normalized_rewards(
        lambda r, t: dict(reward=reward), ["a"] * size, ["t"] * size, size)
    assert advantages.tolist() == [0.0] * size


def test_a_rank_without_answers_has_no_advantages():
    advantages, raw, _ = align.compute_group_normalized_rewards(None, [], [], 4)
    assert advantages.shape == raw.shape == (0,)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clipping_is_exactly_at_the_range(sign):
    ratios = torch.tensor([[0.5, 0.79999, 0.80001, 1.0, 1.19999, 1.20001, 2.0]]).double()
    logp = ratios.log().requires_grad_()
    loss, meta = align.compute_grpo_clip_loss(torch.tensor([[sign]]).double(), logp,
                                              torch.zeros_like(ratios), 0.2)
    held = ratios.clamp(0.8, 1.2)
    expected = -ratios.clamp(max=1.2) if sign > 0 else ratios.clamp(min=0.8)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    outside = (ratios != held) & (ratios > 1 if sign > 0 else ratios < 1)
    assert ((logp.grad == 0) == outside).all() and (meta["clipped"] == outside).all()


def test_clip_higher_moves_only_the_upper_end():
    logp = torch.tensor([[1.25, 0.75]]).log()
    loss, _ = align.compute_grpo_clip_loss(torch.ones(1, 1), logp, torch.zeros(1, 2), 0.2, 0.28)
    assert loss.tolist()[0] == pytest.approx([-1.25, -0.75])


@pytest.mark.parametrize("loss_type", ["no_baseline", "reinforce_with_baseline", "grpo_no_clip",
                                       "grpo_clip", "gspo"])
@pytest.mark.parametrize("norm", ["sequence", "constant", "token"])
def test_policy_steps_have_the_gradient_of_their_loss(loss_type, norm):
    old = LOGP + torch.tensor([[0.1, -0.1, 0.3], [0.05, 0.0, -0.02], [0.0, 0.0, 0.0]])
    a = torch.tensor([[1.5], [-0.5], [2.0]]).double()

    def run(x, backward=False):
        x = x.clone().requires_grad_()
        loss, _ = align.grpo_microbatch_train_step(x, MASK, 2, loss_type, a, a, old, 0.2, norm, 7.0)
        return x.grad if backward else loss.item()

    grad = run(LOGP, backward=True)
    assert grad[~MASK].abs().max() == 0 and grad[MASK].abs().max() > 0
    if loss_type != "gspo":  # GSPO's token gradient is defined with a stopped sequence ratio
        torch.testing.assert_close(grad, numeric_gradient(run, LOGP), atol=1e-6, rtol=1e-5)


def test_policy_loss_by_hand():
    x = LOGP.clone().requires_grad_()
    loss, _ = align.grpo_microbatch_train_step(x, MASK, 1, "reinforce_with_baseline",
                                               advantages=torch.tensor([[2.0], [-1.0], [5.0]]))
    assert loss.item() == pytest.approx((2.0 * 1.5 - 4.75 / 3 + 0) / 3)


def test_grpo_at_ratio_one_is_reinforce():
    grads = []
    for kind in ("reinforce_with_baseline", "grpo_clip", "grpo_no_clip", "gspo"):
        x = LOGP.clone().requires_grad_()
        align.grpo_microbatch_train_step(x, MASK, 1, kind, advantages=torch.ones(3, 1).double(),
                                         old_log_probs=LOGP, cliprange=0.2)
        grads.append(x.grad)
    for grad in grads[1:3]:
        torch.testing.assert_close(grad, grads[0])
    torch.testing.assert_close(grads[3], grads[0])


@pytest.mark.parametrize("norm", ["sequence", "constant", "token"])
def test_accumulation_changes_nothing(norm):
    torch.manual_seed(0)
    logp, mask = -torch.rand(10, 6).double(), torch.rand(10, 6) < 0.7
    a, grads = torch.randn(10, 1).double(), []
    for parts in (1, 2, 5):
        x = logp.clone().requires_grad_()
        constant = float(mask.sum()) if norm == "token" else 6.0
        for rows in torch.arange(10).chunk(parts):
            align.grpo_microbatch_train_step(x[rows], mask[rows], parts, "reinforce_with_baseline",
                                             advantages=a[rows], length_norm=norm,
                                             normalize_constant=constant)
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def test_missing_inputs_are_named():
    with pytest.raises(ValueError, match="grpo_clip"):
        align.compute_policy_gradient_loss(LOGP, "grpo_clip", advantages=LOGP[:, :1])
    with pytest.raises(ValueError, match="nonsense"):
        align.compute_policy_gradient_loss(LOGP, "nonsense")


def test_kl_estimators_agree_on_average():
    """By enumeration over a small vocabulary: the means of k1 and k3 are the divergence itself."""
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    exact = (p * (p / q).log()).sum().item()
    for kind in ("k1", "k3"):
        assert (p * align.kl_penalty(p.log(), q.log(), kind)).sum().item() == pytest.approx(exact)
    assert (align.kl_penalty(p.log(), q.log(), "k3") >= 0).all()
    assert align.kl_penalty(p.log(), q.log(), "k2").tolist() == pytest.approx(
        ((p / q).log() ** 2 / 2).tolist())


def test_dpo_by_hand():
    c, r, rc, rr = (torch.tensor([v]).double() for v in (-4.0, -6.0, -5.0, -5.5))
    loss, margin = align.dpo_loss(c, r, rc, rr, 0.5)
    assert margin.item() == pytest.approx(0.5 * 1.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.75)))
    assert align.dpo_loss(c, r, rc, rr, 0.0)[0].item() == pytest.approx(math.log(2))
    smooth = align.dpo_loss(c, r, rc, rr, 0.5, label_smoothing=0.2)[0].item()
    assert smooth == pytest.approx(0.8 * math.log(1 + math.exp(-0.75))
                                   + 0.2 * math.log(1 + math.exp(0.75)))
    assert align.dpo_loss(c, r, rc, rr, 0.5, "ipo")[0].item() == pytest.approx((1.5 - 1) ** 2)
    assert align.dpo_loss(c, r, rc, rr, 0.5, "hinge")[0].item() == pytest.approx(0.25)
    n = torch.tensor([2.0])
    simpo = align.dpo_loss(c, r, rc, rr, 2.0, "simpo", chosen_lengths=n, rejected_lengths=2 * n)
    assert simpo[0].item() == pytest.approx(math.log(1 + math.exp(-(2 * (-2.0 + 1.5) - 0.5))))


def test_per_instance_dpo_of_equal_models_is_ln_2(sorter):
    model, tok = sorter
    loss = align.per_instance_dpo_loss(_small(tok), _small(tok), tok, 0.3, "a", "b", "c")
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)


def _small(tok):
    torch.manual_seed(3)
    return model_py.Transformer(model_py.ModelConfig(vocab_size=tok.vocab_size, d_model=16,
                                                     num_layers=1, num_heads=1, d_ff=32,
                                                     context_length=256))


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge", "simpo", "smoothed"])
def test_preference_losses_have_the_gradient_of_their_value(kind):
    smoothing = 0.1 if kind == "smoothed" else 0.0
    n = torch.tensor([3.0, 5.0]).double()

    def loss(x):  # (4,): chosen, then rejected
        return align.dpo_loss(*x.chunk(2), *(x.detach() * 0 - 2).chunk(2), 0.3,
                              "sigmoid" if smoothing else kind, smoothing, n, n + 1)[0].sum()

    x = torch.tensor([-4.0, -3.0, -5.0, -2.5]).double().requires_grad_()
    loss(x).backward()
    numeric = numeric_gradient(loss, x.detach())
    torch.testing.assert_close(x.grad, numeric, atol=1e-6, rtol=1e-5)


def test_reward_model_loss_by_hand():
    loss = align.reward_model_loss(torch.tensor([2.0]), torch.tensor([0.5]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_gae_against_its_sum():
    r, v = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.2, 0.5, 0.4])
    d = [0.5 * 0.9 - 0.2, 0.4 * 0.9 - 0.5, 1.0 - 0.4]
    k = 0.9 * 0.8
    assert align.gae(r, v, 0.9, 0.8).tolist() == pytest.approx(
        [d[0] + k * d[1] + k * k * d[2], d[1] + k * d[2], d[2]])


# ---- rewards and data ----------------------------------------------------------------------------


def test_rewards():
    good = "so 1/2. </think> <answer> 0.5 </answer>"
    assert align.r1_zero_reward_fn(good, "\\frac{1}{2}")["reward"] == 1
    assert align.r1_zero_reward_fn("0.5", "0.5") == dict(format_reward=0, answer_reward=0, reward=0)
    wrong = align.r1_zero_reward_fn(good, "3")
    assert (wrong["format_reward"], wrong["reward"]) == (1, 0)
    assert align.question_only_reward_fn("thus \\boxed{7}", "7")["reward"] == 1
    assert align.sort_reward_fn("<think> 21 </think> <answer> 12 </answer>", "12")["reward"] == 1
    assert align.sort_reward_fn("<think> 21 </think> <answer> 012 </answer>", "12")["reward"] == 0
    for answer, reward in (("3 * 7 + 5", 1), ("3 + 5 + 7", 0), ("26", 0), ("5 + 7 * 3 = 26", 1),
                           ("3 x 7 + 5", 0), ("5 + 3(7)", 0), ("5 + (3)(7)", 0)):
        text = f"</think> <answer> {answer} </answer>"
        assert align.countdown_reward_fn(text, "3 5 7 = 26")["reward"] == reward


@pytest.mark.parametrize("answer,truth", [
    ("2 ** 3 + 1", "1 2 3 = 9"), ("7 // 3 + 5", "3 5 7 = 7"), ("2 6/3", "2 3 6 = 4")])
def test_countdown_has_four_operations(answer, truth):
    text = f"</think> <answer> {answer} </answer>"
    assert align.countdown_reward_fn(text, truth)["reward"] == 0


def test_a_reward_that_raises_or_hangs_counts_0():
    def reward(response, truth):
        if response == "raise":
            raise RuntimeError
        if response == "hang":
            time.sleep(30)
        while response == "spin":
            pass
        if response == "nan":
            return dict(reward=math.nan)
        return dict(reward=1.0, format_reward=1.0, answer_reward=1.0)

    start = time.time()
    answers = ["a", "raise", "hang", "spin", "nan", "b"]
    results, failures = align.safe_rewards(reward, answers, [""] * 6, 0.3)
    assert [r["reward"] for r in results] == [1, 0, 0, 0, 0, 1] and failures == 4
    assert time.time() - start < 5


def test_packed_dataset_joins_documents_and_shifts_labels(tmp_path, sorter):
    _, tok = sorter
    rows = [dict(prompt=f"p{i}", response=f"r{i}") for i in range(7)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    joined = [t for r in rows for t in tok.encode(
        align.ALPACA.format(r["prompt"]) + r["response"] + tokenizer_py.EOT)]
    data = align.PackedSFTDataset(tok, str(tmp_path / "d.jsonl"), 50, shuffle=False)
    assert len(data) == (len(joined) - 1) // 50
    assert [t for d in data for t in d["input_ids"].tolist()] == joined[:50 * len(data)]
    assert [t for d in data for t in d["labels"].tolist()] == joined[1:50 * len(data) + 1]
    mixed = align.PackedSFTDataset(tok, str(tmp_path / "d.jsonl"), 50, shuffle=True, seed=1)
    assert [t for d in mixed for t in d["input_ids"].tolist()] != joined[:50 * len(data)]
    assert sum(len(b["labels"]) for b in align.iterate_batches(data, 3, False)) == len(data)


def test_hh_keeps_single_turns_only(tmp_path):
    one = {k: f"\n\nHuman: q\n\nAssistant: {k}" for k in ("chosen", "rejected")}
    two = {k: one[k] + "\n\nHuman: more\n\nAssistant: x" for k in one}
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (one, two)))
    assert align.load_hh(str(tmp_path / "hh.jsonl")) == [
        dict(prompt="q", chosen="chosen", rejected="rejected")]


def test_the_end_is_learned_and_the_user_is_not(sorter):
    _, tok = sorter
    row = align.conversation(dict(prompt="hi", response="you"), tok)
    assert row == align.joined(tok.encode("hi"), [*tok.encode("you"), tok.eot_id])
    chat = [dict(role="user", content="a"), dict(role="assistant", content="b"),
            dict(role="user", content="c"), dict(role="assistant", content="d")]
    row = align.conversation(dict(messages=chat), tok)
    assert tok.decode(row.ids) == tok.apply_chat_template(chat)
    learned = tok.decode([t for t, learned in zip(row.ids, row.learned) if learned])
    assert learned == "b<|im_end|>\nd<|im_end|>\n"


# ---- rollouts and runs ---------------------------------------------------------------------------

QUICK = ["--pretrain-steps", "3", "--prompts", "6", "--group-size", "3", "--held-out", "8",
         "--max-new-tokens", "12", "--save-every", "2"]


@pytest.fixture
def session(tmp_path):
    args = align.make_parser().parse_args([*QUICK, "--out", str(tmp_path), "--task", "sort"])
    for name, value in align.DEFAULTS["grpo"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.muon_lr = 0.0
    return align.open_session(args)


def collected(session):
    problems = session.draw_problems(0, session.args.prompts)
    rows, _ = align.answer(session, problems, session.args.group_size)
    for i, row in enumerate(rows):
        row.advantages = [i / 8 - 1] * len(row.old)
    return rows


def test_training_sees_the_very_tokens_that_were_sampled(session):
    rows = collected(session)
    assert len(rows) == 18
    ids, labels, mask = align.batch_of(rows)
    logp = align.get_response_log_probs(session.model, ids, labels, mask=mask)["log_probs"]
    for b, row in enumerate(rows):
        assert labels[b][mask[b]].tolist() == row.ids[-len(row.old):]
        assert logp[b][mask[b]].tolist() == pytest.approx(row.old, abs=1e-4)


def test_a_sampler_that_disagrees_stops_the_run(session):
    rows = collected(session)
    rows[3].old[0] += 0.02
    with pytest.raises(ValueError, match="differ by 0.02 in ratio"):
        align.policy_update(session, rows)


def test_update_is_the_same_in_any_micro_batches(session, monkeypatch):
    rows, grads = collected(session), []

    def keep_gradient(parameters, max_norm):
        grads.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        torch._foreach_zero_([p.grad for p in parameters])  # an update of nothing
        return torch.tensor(0.0)

    monkeypatch.setattr(align.train_py, "clip_grad_norm", keep_gradient)
    for tokens in (40, 200, 16384):
        session.args.micro_tokens = tokens
        align.policy_update(session, rows)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(grads[2], grads[0], atol=1e-6, rtol=1e-4)


def test_an_empty_update_gives_numbers(session):
    sums = align.policy_update(session, [])
    assert sums["gnorm"] == 0 and all(p.isfinite().all() for p in session.model.parameters())


@pytest.mark.parametrize("algorithm,flags", [
    ("grpo", []), ("grpo", ["--loss", "gspo", "--drop-equal", "--mask-overlong", "--kl", "0.01",
                            "--length-norm", "token", "--no-std", "--cliprange-high", "0.28",
                            "--entropy-bonus", "0.01"]),
    ("ei", []), ("ppo", []), ("dpo", []), ("rm", []), ("sft", []),
    ("sft", ["--pack", "--pretrain-steps", "0"]),
    ("grpo", ["--lora", "4"]), ("grpo", ["--task", "countdown", "--checkpoint-activations"]),
])
def test_every_algorithm_runs(algorithm, flags, tmp_path, capsys):
    rows = [dict(prompt=f"sort {i}1\n", response="<think> x </think> <answer> 1 </answer>",
                 chosen="<answer> 1 </answer>", rejected="no") for i in range(10)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = ["--data", str(tmp_path / "d.jsonl")] if algorithm in ("sft", "rm", "dpo") else []
    align.main([algorithm, *QUICK, "--out", str(tmp_path / "o"), "--steps", "2", *flags, *data])
    log = [json.loads(line) for line in (tmp_path / "o" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == [1, 2] and math.isfinite(log[-1]["gnorm"])
    model = model_py.Transformer.from_pretrained(tmp_path / "o")
    assert all(p.isfinite().all() for p in model.parameters())
    assert (tmp_path / "o" / "progress.png").exists()
    assert (tmp_path / "o" / "reward_head.safetensors").exists() == (algorithm == "rm")


@pytest.mark.parametrize("algorithm", ["grpo", "grpo --kl 0.1", "ei", "dpo", "ppo", "rm", "sft"])
def test_a_run_stopped_and_continued_is_the_same_run(algorithm, tmp_path, monkeypatch):
    flags = [*algorithm.split(), *QUICK, "--steps", "4"]
    if algorithm in ("dpo", "rm", "sft"):
        rows = [dict(prompt=f"sort {i} 1:", chosen=f" 1 {i}", rejected=f" {i}", response=f"1 {i}")
                for i in range(9)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        flags += ["--data", str(tmp_path / "pairs.jsonl")]
    align.main([*flags, "--out", str(tmp_path / "a")])
    logged, log_step = [], align.log_step

    def stop_after_three(s, **record):
        log_step(s, **record)
        logged.append(1)
        if len(logged) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(align, "log_step", stop_after_three)
    with pytest.raises(SystemExit):
        align.main([*flags, "--out", str(tmp_path / "b")])
    align.main([*flags, "--out", str(tmp_path / "b")])
    bytes_of = [(tmp_path / d / "model.safetensors").read_bytes() for d in "ab"]
    assert bytes_of[0] == bytes_of[1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "log.jsonl").open()]
    assert steps == [1, 2, 3, 4]


def test_simpo_needs_no_reference(tmp_path, monkeypatch):
    def refuse(s):
        raise AssertionError("a reference model was made")

    monkeypatch.setattr(align, "reference_model", refuse)
    row = dict(prompt="sort 21\n", chosen="12", rejected="21")
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    flags = [*QUICK, "--steps", "1", "--data", str(tmp_path / "d.jsonl"), "--out"]
    align.main(["dpo", "--preference", "simpo", *flags, str(tmp_path / "simpo")])
    with pytest.raises(AssertionError):
        align.main(["dpo", "--preference", "ipo", *flags, str(tmp_path / "ipo")])


def test_lora_merges_into_the_same_function(sorter):
    model, tok = sorter
    base = _small(tok)
    align.add_lora(base, 4, 8.0)
    with torch.no_grad():
        for p in base.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    ids = torch.randint(0, 261, (2, 9))
    torch.testing.assert_close(align.merged(base)(ids), base(ids), atol=1e-5, rtol=1e-4)
    assert not any("base" in n for n, _ in align.merged(base).named_parameters())
    trained = [n for n, p in base.named_parameters() if p.requires_grad]
    assert trained and all(n.endswith((".A", ".B")) for n in trained)


def test_a_reference_stays_where_it_was_with_checkpointed_blocks(session):
    align.train_py.checkpoint_blocks(session.model)
    ids = torch.arange(8)[None]
    reference, before = align.reference_model(session), session.model(ids).detach()
    with torch.no_grad():
        for p in session.model.layers.parameters():
            p.add_(0.1)
    torch.testing.assert_close(reference(ids), before)
    assert (session.model(ids) - before).abs().max() > 1e-3


RANKS = """
import sys, torch, align
args = align.make_parser().parse_args(["grpo", "--out", sys.argv[1], "--pretrain-steps", "1",
    "--held-out", "2", "--lr", "1e-3", "--muon-lr", "0",
    "--max-new-tokens", "20", "--task", "sort"])
s, rank, ranks = align.open_session(args), align.train_py.RANK, align.train_py.WORLD_SIZE
rows = [align.joined([5 + i], list(range(9, 10 + 2 * i)), old=[-1.0] * (2 * i + 1),
                     advantages=[i - 2.5] * (2 * i + 1)) for i in range(6)]
for args.length_norm in ("sequence", "constant", "token"):
    align.policy_update(s, rows[rank::ranks], first=False)
align.sft_update(s, rows[:5])

generate, asked = align.model_py.Transformer.generate, []
def counted(model, prompts, *rest, **options):
    asked.extend(prompts)
    return generate(model, prompts, *rest, **options)
align.model_py.Transformer.generate = counted
s.reward_fn = lambda response, truth: dict(reward=len(response) % 2)
args.prompts, args.group_size, args.eval_every = 6, 4, 9
pairs = align.own_pairs(s)
assert len(asked) == 6 // ranks and len(set(map(str, align.from_all_ranks(asked)))) == 6
assert pairs and all(pairs == others for others in align.from_all_ranks([pairs]))
if rank == 0:
    torch.save(s.model.state_dict(), sys.argv[1] + ".pt")
"""


def test_two_ranks_count_tokens_together(tmp_path):
    """Rows of unequal length, an odd number of them: the weights must be those of one rank."""
    weights = []
    for n in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = str(tmp_path / f"ranks{n}")
        runs = [subprocess.Popen(
            [sys.executable, "-c", RANKS, out], cwd=Path(align.__file__).parent,
            env=os.environ | dict(RANK=str(r), WORLD_SIZE=str(n), LOCAL_RANK=str(r),
                                  LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT=str(port))) for r in range(n)]
        assert [run.wait(timeout=240) for run in runs] == [0] * n
        weights.append(torch.load(out + ".pt", weights_only=True))
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows,flags,words", [
    ([], ["sft"], ["--data"]),
    ([dict(prompt="a")], ["sft", "--data", "D"], ["prompt"]),
    ([dict(messages=[dict(content="a")])], ["sft", "--data", "D"], ["a message", "'role'"]),
    (["a"], ["sft", "--data", "D"], ["line 1 is not a JSON object"]),
    ([dict(prompt="a", response="")], ["sft", "--data", "D"], ["no response left"]),
    ([dict(question="a")], ["grpo", "--task", "gsm8k", "--data", "D"], ["question"]),
    ([], ["grpo", "--task", "gsm8k"], ["needs --data"]),
    ([], ["grpo", "--task", "cooking"], ["cooking"]),
    ([], ["grpo", "--reward", "nowhere:f"], ["--reward nowhere:f"]),
    ([dict(prompt="a", chosen="b")], ["dpo", "--data", "D"], ["rejected"]),
    ([], ["grpo", "--model", "nowhere"], ["nowhere"]),
    ([], ["grpo", "--steps", "0"], ["--steps", "nothing was saved"]),
    ([], ["grpo", "--eval-every", "0"], ["--eval-every: must be at least 1"]),
    ([], ["sft", "--batch-size", "-1"], ["--batch-size: must be at least 1"]),
    ([dict(prompt="a", response="b")], ["sft", "--data", "D", "--epochs", "0"], ["--epochs"]),
])
def test_mistakes_end_in_one_line(rows, flags, words, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = [str(tmp_path / "d.jsonl") if f == "D" else f for f in flags]
    with pytest.raises(SystemExit) as stop:
        align.main([*flags, "--out", str(tmp_path / "o"), *QUICK])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1, message
    assert all(w in message for w in words), message


def test_another_runs_folder_is_refused(tmp_path, capsys):
    flags = [*QUICK, "--steps", "1", "--out", str(tmp_path / "o")]
    align.main(["grpo", *flags])
    with pytest.raises(SystemExit):
        align.main(["grpo", *flags, "--seed", "1"])
    assert "--seed 0" in capsys.readouterr().err


def test_sorting_improves_by_expert_iteration(tmp_path):
    """A short form of the default job: accuracy rises from a weak start (by 0.3 with 3 seeds)."""
    align.main(["ei", "--pretrain-steps", "90", "--steps", "4", "--prompts", "256", "--group-size",
                "2", "--held-out", "100", "--out", str(tmp_path), "--eval-every", "4"])
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["accuracy"] > log[0]["reward"] + 0.1 and log[-1]["pool"] > log[0]["pool"] > 0
    assert np.isfinite(log[-1]["loss"])
