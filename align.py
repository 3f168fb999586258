"""Align a language model: SFT, preference learning, and RL with rewards that can be checked.

    python align.py                                   # learns to sort digits in about two minutes
    python align.py ei                                # the same by expert iteration
    python align.py sft --model out --data chats.jsonl --out out-sft
    python align.py dpo --model out-sft --data pairs.jsonl --out out-dpo
    python align.py grpo --model Qwen2.5-Math-1.5B --task gsm8k --data train.jsonl --dtype bf16

Names and shapes are those of CS336's assignment 5. Papers: expert iteration (Anthony et al. 2017),
GRPO (Shao et al. 2024, arXiv:2402.03300), Dr. GRPO (Liu et al. 2025, 2503.20783), DAPO (Yu et al.
2025, 2503.14476), GSPO (Zheng et al. 2025, 2507.18071), DPO (Rafailov et al. 2023, 2305.18290), PPO
(Schulman et al. 2017, 1707.06347). B sequences, T tokens, V vocabulary.
"""

import argparse
import contextlib
import copy
import gzip
import json
import math
import os
import pkgutil
import re
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import model as model_py
import tokenizer as tokenizer_py
import train as train_py
from evaluate import extract_boxed, grade
from train import RANK, WORLD_SIZE, all_reduce_sum, say

# ---- text to tokens ----------------------------------------------------------------------------


def ids_of(tokenizer, text):
    """Ids without any that the tokenizer adds by itself; ours or a Hugging Face tokenizer."""
    ours = isinstance(tokenizer, tokenizer_py.Tokenizer)
    return tokenizer.encode(text) if ours else tokenizer.encode(text, add_special_tokens=False)


@dataclass
class Row:
    """A sequence to learn from: which of its ids are learned, and for RL an entry a learned id."""

    ids: list
    learned: list  # of bool
    old: list = ()  # log-probabilities when the ids were sampled
    advantages: list = ()
    returns: list = ()  # what a value head should have said
    reward: float = 0.0
    complete: bool = True  # ended by itself, not cut off
    rejected: object = None  # the Row that this one is preferred to

    def extend(self, other):
        self.ids.extend(other.ids)
        self.learned.extend(other.learned)


def joined(prompt, response, **more):
    """A Row of two lists of ids, of which the second is learned."""
    return Row(prompt + response, [False] * len(prompt) + [True] * len(response), **more)


def batch_of(rows, device="cpu", pad=0):
    """Rows -> input_ids, labels and response_mask, (B, T) each, T = longest - 1.

    labels are the inputs one token on; response_mask is True where the label is learned.
    For prompt [1, 2] and response [3, 4]: inputs 1 2 3, labels 2 3 4, mask 0 1 1.
    """
    T = max(len(r.ids) for r in rows)
    ids = torch.tensor([r.ids + [pad] * (T - len(r.ids)) for r in rows], device=device)
    mask = torch.tensor([r.learned + [False] * (T - len(r.ids)) for r in rows], device=device)
    return ids[:, :-1], ids[:, 1:], mask[:, 1:]


def tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer):
    """Prompts and outputs, encoded apart and joined: a dict of what batch_of gives."""
    rows = [joined(ids_of(tokenizer, p), ids_of(tokenizer, o))
            for p, o in zip(prompt_strs, output_strs)]
    batch = batch_of(rows, pad=getattr(tokenizer, "pad_token_id", None) or 0)
    return dict(zip(("input_ids", "labels", "response_mask"), batch))


# ---- log-probabilities -------------------------------------------------------------------------


def compute_entropy(logits):
    """Entropy of the next token in nats: (..., V) -> (...)."""
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def get_response_log_probs(model, input_ids, labels, return_token_entropy=False, mask=None,
                           chunk=4096):
    """log p(label | what came before) of every token: {"log_probs": (B, T), "token_entropy"}.

    Our Transformer's head runs on `chunk` tokens at a time and again in the backward pass, so that
    (B, T, V) never exists in fp32; with a mask, at its tokens only (0 elsewhere). Any other model
    that gives logits, or has .logits, works too.
    """
    where = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    if isinstance(model, model_py.Transformer):
        states, head = model.hidden(input_ids)[where], model.head  # (N, D)
    else:
        out = model(input_ids)
        states, head = getattr(out, "logits", out)[where], torch.nn.Identity()  # (N, V)

    def score(states, labels):  # (n, D or V), (n,) -> log p and entropy, (n,) each
        logits = head(states).float()
        total = logits.logsumexp(-1)
        entropy = total - (logits.softmax(-1) * logits).sum(-1)
        return logits.gather(-1, labels[:, None])[:, 0] - total, entropy

    parts = [checkpoint(score, s, y, use_reentrant=False)
             for s, y in zip(states.split(chunk), labels[where].split(chunk))]
    log_probs, entropy = (
        torch.zeros(labels.shape, device=labels.device).masked_scatter(where, torch.cat(flat))
        for flat in zip(*parts))
    return dict(log_probs=log_probs, **dict(token_entropy=entropy) if return_token_entropy else {})


def masked_mean(tensor, mask, dim=None):
    """Mean over the True places of mask, along dim; not a number where there are none."""
    return (tensor * mask).sum(dim) / mask.sum(dim)


def masked_normalize(tensor, mask, normalize_constant=1.0, dim=None):
    """Sum over the True places of mask, along dim, divided by a constant."""
    return (tensor * mask).sum(dim) / normalize_constant


# ---- losses ------------------------------------------------------------------------------------


def sft_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps,
                              normalize_constant=1.0):
    """Backward of the negative log-likelihood, (loss, metadata): sums over a row's response over
    normalize_constant, averaged over the B rows and divided by the accumulation steps."""
    loss = -masked_normalize(policy_log_probs, response_mask, normalize_constant, -1).mean()
    loss = loss / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {"tokens": response_mask.sum()}


def compute_group_normalized_rewards(reward_fn, rollout_responses, repeated_ground_truths,
                                     group_size, advantage_eps=1e-6, normalize_by_std=True):
    """(advantages (B,), raw_rewards (B,), metadata): rewards less their group's mean.

    normalize_by_std divides by the group's standard deviation (ddof 1) + advantage_eps, as GRPO
    does; without it this is Dr. GRPO's. Rows come group by group.
    """
    scores = [reward_fn(r, t) for r, t in zip(rollout_responses, repeated_ground_truths)]
    raw = torch.tensor([s["reward"] for s in scores], dtype=torch.float32)
    groups = raw.view(len(raw) // group_size, group_size)
    alike = (groups == groups[:, :1]).all(1, keepdim=True)  # 0, whatever their mean is rounded to
    advantages = (groups - groups.mean(1, keepdim=True)).masked_fill(alike, 0.0)
    if normalize_by_std and group_size > 1 and scores:
        advantages = advantages / (groups.std(1, keepdim=True) + advantage_eps)
    metadata = {k: float(np.mean([s[k] for s in scores])) for k in scores[0]} if scores else {}
    return advantages.flatten(), raw, metadata


def compute_naive_policy_gradient_loss(raw_rewards_or_advantages, policy_log_probs):
    """-A log p: advantages (B, 1), log-probabilities (B, T) -> (B, T) (REINFORCE)."""
    return -raw_rewards_or_advantages * policy_log_probs


def compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange,
                           cliprange_high=None):
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = p / p_old: (loss (B, T), {"clipped": (B, T)}).

    advantages (B, 1). cliprange_high above cliprange is DAPO's clip-higher.
    """
    ratio = (policy_log_probs - old_log_probs).exp()
    high = cliprange if cliprange_high is None else cliprange_high
    free, held = ratio * advantages, ratio.clamp(1 - cliprange, 1 + high) * advantages
    return -torch.minimum(free, held), {"clipped": held < free}


def compute_policy_gradient_loss(policy_log_probs, loss_type, raw_rewards=None, advantages=None,
                                 old_log_probs=None, cliprange=None, cliprange_high=None,
                                 response_mask=None):
    """Per-token loss (B, T) and metadata; raw_rewards and advantages are (B, 1).

    loss_type: no_baseline (raw rewards), reinforce_with_baseline, grpo_clip, grpo_no_clip, or gspo,
    whose ratio is one a sequence, the geometric mean of its tokens' (needs response_mask). Raises
    ValueError if what a type needs is missing.
    """
    needs = dict(no_baseline=(raw_rewards,), reinforce_with_baseline=(advantages,),
                 grpo_no_clip=(advantages, old_log_probs),
                 grpo_clip=(advantages, old_log_probs, cliprange),
                 gspo=(advantages, old_log_probs, cliprange, response_mask))
    if loss_type not in needs or any(x is None for x in needs[loss_type]):
        raise ValueError(f"loss_type {loss_type!r}: unknown, or an input it needs is missing")
    if loss_type in ("no_baseline", "reinforce_with_baseline"):
        return compute_naive_policy_gradient_loss(needs[loss_type][0], policy_log_probs), {}
    if loss_type == "grpo_no_clip":
        return -(policy_log_probs - old_log_probs).exp() * advantages, {}
    if loss_type == "gspo":  # the gradient goes through each token, the value is the sequence's
        difference = (policy_log_probs - old_log_probs) * response_mask
        mean = difference.sum(1, keepdim=True) / response_mask.sum(1, keepdim=True).clamp(min=1)
        policy_log_probs = policy_log_probs - policy_log_probs.detach() + mean.detach()
        old_log_probs = torch.zeros_like(old_log_probs)
    return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange,
                                  cliprange_high)


def length_weights(mask, length_norm, rows, constant):
    """What each token's loss counts for, (B, T) of mask (B, T), in a batch of so many rows.

    "sequence": a row's mean over its response, as GRPO; "constant": its sum over the constant, as
    Dr. GRPO; both averaged over the rows. "token": the sum over the constant, the tokens of the
    whole batch, as DAPO.
    """
    if length_norm == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / rows
    return mask / (constant if length_norm == "token" else rows * constant)


def grpo_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps,
                               loss_type, raw_rewards=None, advantages=None, old_log_probs=None,
                               cliprange=None, length_norm="sequence", normalize_constant=None):
    """Backward of one micro-batch's policy loss, (loss, metadata), weighed by length_weights.

    A row without response tokens counts 0. For "token" normalize_constant is of all ranks.
    """
    loss, metadata = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange,
        response_mask=response_mask)
    rows = len(response_mask) * gradient_accumulation_steps
    loss = (loss * length_weights(response_mask, length_norm, rows, normalize_constant)).sum()
    loss.backward()
    return loss.detach(), metadata


def kl_penalty(policy_log_probs, reference_log_probs, kind="k3"):
    """Estimates of KL(policy || reference) a token (Schulman 2020): k1 = -d, k2 = d^2 / 2,
    k3 = e^d - 1 - d, with d = log p_reference - log p; k1 and k3 are unbiased, k3 positive."""
    d = reference_log_probs - policy_log_probs
    return {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[kind]


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1,
             kind="sigmoid", label_smoothing=0.0, chosen_lengths=None, rejected_lengths=None,
             gamma=0.5):
    """Preference losses of sequence log-probabilities (B,): (loss (B,), margins (B,)).

    sigmoid: -(1 - s) log sig(beta m) - s log sig(-beta m) (Rafailov et al., equation 7), with m the
    margin (log p / p_ref of chosen less that of rejected) and s the label smoothing; ipo:
    (m - 1 / (2 beta))^2, of mean log-probabilities a token if lengths are given (Azar et al. 2023);
    hinge: relu(1 - beta m) (Zhao et al. 2023); simpo: no reference, -log sig(beta (mean chosen -
    mean rejected) - gamma) (Meng et al. 2024).
    """
    chosen, rejected = policy_chosen, policy_rejected
    if kind != "simpo":
        chosen, rejected = chosen - reference_chosen, rejected - reference_rejected
    if kind == "simpo" or kind == "ipo" and chosen_lengths is not None:
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    margin, s = beta * (chosen - rejected), label_smoothing
    if kind == "simpo":
        return -F.logsigmoid(margin - gamma), margin
    if kind == "ipo":
        return (chosen - rejected - 1 / (2 * beta)) ** 2, margin
    if kind == "hinge":
        return torch.relu(1 - margin), margin
    return -(1 - s) * F.logsigmoid(margin) - s * F.logsigmoid(-margin), margin


ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{}\n\n### Response:\n")


def per_instance_dpo_loss(lm, lm_ref, tokenizer, beta, prompt, response_chosen, response_rejected):
    """DPO's loss of one pair of strings in Alpaca's template, each ended by <|endoftext|>."""
    eos = getattr(tokenizer, "eos_token", None) or tokenizer_py.EOT
    batch = tokenize_prompt_and_output([ALPACA.format(prompt)] * 2,
                                       [response_chosen + eos, response_rejected + eos], tokenizer)

    def log_probs(model):  # of the two responses, (2,)
        ids, labels, mask = (x.to(next(model.parameters()).device) for x in batch.values())
        return get_response_log_probs(model, ids, labels, mask=mask)["log_probs"].sum(-1)

    policy = log_probs(lm)
    with torch.no_grad():
        reference = log_probs(lm_ref).to(policy.device)
    return dpo_loss(*policy, *reference, beta)[0]


def reward_model_loss(chosen, rejected):
    """-log sig(r_chosen - r_rejected), (B,) (Bradley & Terry 1952; Ouyang et al. 2022)."""
    return -F.logsigmoid(chosen - rejected)


# ---- rewards -----------------------------------------------------------------------------------


def answer_of(response):
    """What stands in <answer>, if the response has the form of the r1_zero prompt; else None."""
    if "</think> <answer>" not in response or "</answer>" not in response:
        return None
    return response.split("<answer>")[-1].replace("</answer>", "").strip()


def rewards_of(answer, is_right):
    """The course's three rewards: an answer that is None did not have the form asked for."""
    right = float(answer is not None and bool(is_right(answer)))
    return dict(format_reward=float(answer is not None), answer_reward=right, reward=right)


def r1_zero_reward_fn(response, ground_truth):
    """1 for a right answer in <think> .. </think> <answer> .. </answer>; the form alone gives 0."""
    return rewards_of(answer_of(response),
                      lambda given: grade(extract_boxed(given) or given, str(ground_truth)))


def question_only_reward_fn(response, ground_truth):
    """1 for a right \\boxed answer anywhere in the response."""
    return rewards_of(extract_boxed(response), lambda given: grade(given, str(ground_truth)))


def sort_reward_fn(response, ground_truth):
    return rewards_of(answer_of(response), lambda given: given == ground_truth)


def countdown_reward_fn(response, ground_truth):
    """ground_truth "3 5 7 = 26": the answer must use each number once, + - * / ( ) only."""
    numbers, target = ground_truth.split(" = ")

    def is_right(given):
        given = given.split("=")[0]
        used = sorted(re.findall(r"\d+", given)) == sorted(numbers.split())
        # no ** or //, and no product or sum by writing side by side: 3(5), 2 1/3
        plain = re.fullmatch(r"[\d+\-*/() ]+", given) and not re.search(
            r"\*\s*\*|/\s*/|[\d)]\s*\(|\)\s*\d|\d\s+\d", given)
        return used and plain and grade(given, target)

    return rewards_of(answer_of(response), is_right)


def safe_rewards(reward_fn, responses, truths, seconds=10.0):
    """reward_fn of each, and how many failed: raised, took longer, were not finite. They count 0.

    The alarm stops Python code, sleeping and regular expressions alike, and leaves no thread
    behind; it needs Unix and the main thread.
    """
    def too_slow(number, frame):
        raise TimeoutError

    results, failures, before = [], 0, signal.signal(signal.SIGALRM, too_slow)
    for response, truth in zip(responses, truths):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                given = dict(reward_fn(response, truth))
                given["reward"] = float(given["reward"])
                if not math.isfinite(given["reward"]):
                    raise ValueError
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Exception:  # a user's function: whatever it raises
            given, failures = rewards_of(None, None), failures + 1
        results.append(given)
    signal.signal(signal.SIGALRM, before)
    return results, failures


# ---- tasks and their prompts -------------------------------------------------------------------

R1_ZERO = ("A conversation between User and Assistant. The User asks a question, and the Assistant "
           "solves it. The Assistant first thinks about the reasoning process in the mind and then "
           "provides the User with the answer. The reasoning process is enclosed within <think> "
           "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
           "<think> reasoning process here </think> <answer> answer here </answer>.\n"
           "User: {}\nAssistant: <think>")
PROMPTS = {"r1_zero": (R1_ZERO, r1_zero_reward_fn),
           "question_only": ("{}", question_only_reward_fn)}


def sort_problem(rng):
    digits = "".join(map(str, rng.integers(0, 10, rng.integers(5, 9))))
    return f"sort {digits}\n", "".join(sorted(digits))


def countdown_problem(rng):
    numbers = rng.integers(1, 20, 3)
    a, b, c = rng.permutation(numbers).tolist()
    target = [a + b + c, a + b - c, a * b + c, a * b - c][rng.integers(4)]
    text = " ".join(map(str, numbers))
    return f"use {text} once each to make {target}\n<think>", f"{text} = {target}"


def read_rows(path):
    """The rows of a .jsonl (.gz) file or files."""
    for file in tokenizer_py.list_files(path):
        opener = gzip.open if file.endswith(".gz") else open
        with opener(file, "rt", encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    try:
                        yield dict(json.loads(line))
                    except (ValueError, TypeError):
                        raise ValueError(f"{file}: line {number} is not a JSON object") from None


def read_problems(args, template):
    """gsm8k ("question", "answer" ending in #### N) or math ("problem", "solution" or "answer")."""
    if not args.data:
        raise ValueError(f"--task {args.task}: needs --data FILE.jsonl")
    for row in read_rows(args.data):
        question = row.get("question") or row.get("problem")
        truth = row.get("answer") or extract_boxed(row.get("solution", ""))
        if not question or not truth:
            raise ValueError(f"--data: an item has {', '.join(row)}, not question and answer, or "
                             "problem and solution")
        yield template.format(question), str(truth).split("####")[-1].strip()


def load_task(args, tokenizer, limit):
    """--task and --reward: (seed, count) -> problems to train on, those held out, the reward.

    A problem is a prompt and its truth. Prompts that leave no room in `limit` tokens are left out.
    """
    if args.task in ("sort", "countdown"):
        problem, reward_fn = ((sort_problem, sort_reward_fn) if args.task == "sort" else
                              (countdown_problem, countdown_reward_fn))

        def draw(seed, count):  # new ones for every seed
            rng = np.random.default_rng(seed)
            return [problem(rng) for _ in range(count)]

        held_out = draw(10**6, args.held_out)
    else:
        template, reward_fn = PROMPTS[args.prompt]
        problems = list(read_problems(args, template))
        fit = [p for p in problems if len(tokenizer.encode(p[0])) < limit - 1]
        if len(fit) < len(problems):
            say(f"{len(problems) - len(fit)} problems skipped: no room for an answer in {limit} "
                "tokens")
        held = min(args.held_out, len(fit) // 5)
        held_out, train = fit[:held], fit[held:]

        def draw(seed, count):
            rng = np.random.default_rng(seed)
            return [train[i] for i in rng.choice(len(train), count, len(train) < count)]

    if not held_out:
        raise ValueError(f"--task {args.task}: no problem to hold out of --data or --held-out")
    if args.reward:
        sys.path.insert(0, os.getcwd())
        try:
            reward_fn = pkgutil.resolve_name(args.reward)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--reward {args.reward}: {error}; give MODULE:FUNCTION") from None
    return draw, held_out, reward_fn


# ---- data sets ---------------------------------------------------------------------------------


def conversation(row, tokenizer):
    """A Row of messages, of which only what the assistant says is learned, or of prompt and
    response. The token that ends a turn is learned too: else the model never learns to stop."""
    encode = tokenizer.encode
    if "prompt" in row and "response" in row:
        return joined(encode(row["prompt"]), encode(row["response"]) + [tokenizer.eot_id])
    if "messages" not in row:
        raise ValueError(f"--data: a row has {', '.join(row)}; messages, or prompt and response, "
                         "are needed")
    whole, before, turns = Row([], []), "", row["messages"]
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" and turn["content"]:
            opened = tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True)
            text = tokenizer.apply_chat_template(turns[:i + 1])
            whole.extend(joined(encode(opened[len(before):]), encode(text[len(opened):])))
            before = text
    return whole


class PackedSFTDataset(torch.utils.data.Dataset):
    """Documents (a .jsonl of prompt and response), shuffled once, joined, cut into seq_length.

    Items are {"input_ids": (seq_length,), "labels": (seq_length,)} int64; a label is the next token
    of the joined text, also across the cut. Documents are in Alpaca's template and end in
    <|endoftext|>. Incomplete last chunks are dropped.
    """

    def __init__(self, tokenizer, dataset_path, seq_length, shuffle, seed=0):
        rows = list(read_rows(dataset_path))
        order = np.random.default_rng(seed).permutation(len(rows)) if shuffle else range(len(rows))
        begin = getattr(tokenizer, "bos_token", None) or ""
        end = getattr(tokenizer, "eos_token", None) or tokenizer_py.EOT
        ids = [t for i in order for t in ids_of(
            tokenizer, begin + ALPACA.format(rows[i]["prompt"]) + rows[i]["response"] + end)]
        used = torch.tensor(ids[:(len(ids) - 1) // seq_length * seq_length + 1])
        self.inputs, self.labels = (x.view(-1, seq_length) for x in (used[:-1], used[1:]))

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        return {"input_ids": self.inputs[i], "labels": self.labels[i]}


def iterate_batches(dataset, batch_size, shuffle):
    """A torch DataLoader over a data set, one epoch."""
    return torch.utils.data.DataLoader(dataset, batch_size, shuffle)


def load_hh(path):
    """Anthropic's HH files, {"chosen", "rejected"} transcripts -> [{prompt, chosen, rejected}].

    Only conversations of one turn: one "Human:", one "Assistant:", the same question in both.
    """
    pairs = []
    for row in read_rows(path):
        turns = [re.split(r"\n\n(?:Human|Assistant): ", row[k]) for k in ("chosen", "rejected")]
        if all(len(t) == 3 for t in turns) and turns[0][1] == turns[1][1]:
            pairs.append(dict(prompt=turns[0][1].strip(), chosen=turns[0][2].strip(),
                              rejected=turns[1][2].strip()))
    return pairs


# ---- a session: the model and what trains it ---------------------------------------------------


def add_lora(model, rank, alpha=16.0):
    """Freeze the model; every matrix W of its blocks becomes W + (alpha / r) B A, of which A
    (r, d_in) and B (d_out, r) are learned (Hu et al. 2021). They start as peft's do, B at zero and
    A within 1 / sqrt(d_in), so that learning rates found with it carry over."""
    model.requires_grad_(False)
    for linear in model.layers.modules():
        if isinstance(linear, model_py.Linear):
            d_out, d_in = linear.weight.shape
            linear.A = torch.nn.Parameter((2 * torch.rand(rank, d_in) - 1) / math.sqrt(d_in))
            linear.B = torch.nn.Parameter(torch.zeros(d_out, rank))
            linear.scale = alpha / rank
            linear.register_forward_hook(lambda m, x, y: y + m.scale * (x[0] @ m.A.T) @ m.B.T)


@torch.no_grad()
def merged(model):
    """A copy to save: every adapter folded into the matrix it belongs to, and no value head."""
    model = copy.deepcopy(model)
    model.value_head = None
    for linear in model.layers.modules():
        if hasattr(linear, "A"):
            linear.weight += linear.scale * linear.B @ linear.A
            del linear.A, linear.B
            linear._forward_hooks.clear()
    return model


@dataclass
class Session:
    """What every algorithm carries along."""

    args: argparse.Namespace
    model: torch.nn.Module
    tokenizer: object
    device: torch.device
    start: Path = None  # the checkpoint it began with
    draw_problems: object = None  # (seed, count) -> (prompt, truth) pairs to train on
    held_out: list = ()
    reward_fn: object = None
    optimizers: list = ()
    step: int = 0  # done so far
    updates: int = 0  # of the weights; grpo, ppo and ei make several a step
    records: list = field(default_factory=list)  # the lines of log.jsonl
    pool: set = field(default_factory=set)  # of expert iteration: (prompt ids, response ids)
    seconds: dict = field(default_factory=lambda: defaultdict(float))  # since the last log line
    stopping: bool = False  # SIGTERM came

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16")

    def log_probs(self, model, ids, labels, mask):
        """log p of the learned labels, and the entropy there: (B, T) each, 0 elsewhere."""
        with self.autocast():
            out = get_response_log_probs(model, ids, labels, True, mask)
        return out["log_probs"], out["token_entropy"]

    def token_values(self, ids):
        """The value head of ppo and rm on the residual stream: (B, T)."""
        with self.autocast():
            return self.model.value_head(self.model.hidden(ids).float())[..., 0]

    @contextlib.contextmanager
    def timed(self, name):
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def sum(self, *values):
        """Each value's sum over the ranks; what that takes is the wait for the slowest."""
        with self.timed("wait"):
            return all_reduce_sum([float(v) for v in values], self.device)


def make_optimizers(model, args):
    """AdamW, and Muon for the blocks' matrices if --muon-lr has a rate for it."""
    muon = args.muon_lr and not args.lora
    matrices = [p for p in model.layers.parameters() if p.ndim == 2 and muon]
    others = [p for p in model.parameters() if p.requires_grad and p not in set(matrices)]
    adam = train_py.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [adam, train_py.Muon(matrices, lr=args.muon_lr)] if matrices else [adam]


def reference_model(s):
    """The model the run began with, frozen."""
    model = model_py.Transformer.from_pretrained(s.start, dtype=torch.float32)
    return model.to(s.device).requires_grad_(False)


# ---- one update, of every algorithm ------------------------------------------------------------


def micro_batches(rows, tokens):
    """Rows by length, in batches of about so many padded tokens."""
    def size(row):
        pair = [row, row.rejected] if row.rejected else [row]
        return len(pair) * max(len(r.ids) for r in pair)

    rows = sorted(rows, key=size)
    while rows:  # the longest first: too little memory for them shows at once
        count = max(1, tokens // size(rows[-1]))
        yield rows[-count:]
        rows = rows[:-count]


def update(s, rows, loss_fn, names):
    """One optimizer step: sums over all ranks of `names`, and the gradient's norm before clipping.

    loss_fn(rows of a micro-batch, input ids, labels, mask) -> (its share of the loss, what to sum
    under each name); of pairs the chosen rows come first, then the rejected.

    The warm-up matters: Adam's first steps have the full size whatever the gradient is, which can
    undo a pre-trained model in one of them.
    """
    a, totals = s.args, [0.0] * len(names)
    parameters = [p for p in s.model.parameters() if p.requires_grad]
    with s.timed("train"):
        for part in micro_batches(rows, a.micro_tokens):
            part = part + [r.rejected for r in part if r.rejected]
            loss, values = loss_fn(part, *batch_of(part, s.device))
            loss.backward()
            totals = [total + v.item() for total, v in zip(totals, values)]
    totals = s.sum(*totals)
    with s.timed("train"):
        for p in parameters:
            if p.grad is None:  # a rank without rows still takes part in the sum
                p.grad = torch.zeros_like(p)
        train_py.sum_gradients(parameters)
        norm = train_py.clip_grad_norm(parameters, 1.0).item()
        if not math.isfinite(norm):
            raise ValueError(f"step {s.step + 1}: the gradient is not finite; the checkpoint of "
                             "the last save is kept, try a lower --lr")
        s.updates += 1
        for optimizer, lr in zip(s.optimizers, (a.lr, a.muon_lr)):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, s.updates / max(1, a.warmup))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return dict(zip(names, totals), gnorm=norm)


# ---- supervised fine-tuning --------------------------------------------------------------------


def sft_update(s, rows):
    """One step on rows, of which each rank takes its share: mean loss a learned token."""
    tokens = max(1, sum(sum(r.learned) for r in rows))

    def loss_fn(rows, ids, labels, mask):
        logp, _ = s.log_probs(s.model, ids, labels, mask)
        loss = -masked_normalize(logp, mask, tokens)
        return loss, [loss]

    return update(s, rows[RANK::WORLD_SIZE], loss_fn, ["loss"])


def pretrain_sorter(args, device, folder, demonstrations=300):
    """Teach a new model of 0.38M parameters the form of an answer, and some sorting.

    Its tokens are bytes and five tags; it copies the digits in <think> before it sorts them.
    """
    tags = ["<|endoftext|>", "<think>", "</think>", "<answer>", "</answer>"]
    vocab = {i: t.encode() for i, t in enumerate(tags)} | {i + 5: bytes([i]) for i in range(256)}
    tok = tokenizer_py.Tokenizer(vocab, [], tags)
    torch.manual_seed(args.seed)
    model = model_py.Transformer(model_py.ModelConfig(
        vocab_size=tok.vocab_size, d_model=96, num_layers=3, num_heads=3, d_ff=256,
        context_length=64, qk_norm=True, zero_init=True, tie_embeddings=False)).to(device)

    rng, start, loss = np.random.default_rng(args.seed + 10**7), time.time(), math.nan
    problems = [sort_problem(rng) for _ in range(demonstrations)]
    rows = [conversation(dict(prompt=prompt, response=f"<think> {prompt[5:-1]} </think> <answer> "
                              f"{truth} </answer>"), tok) for prompt, truth in problems]
    a = argparse.Namespace(**vars(args) | dict(warmup=20, lora=0, lr=3e-3, muon_lr=0.02))
    s = Session(a, model, tok, device, optimizers=make_optimizers(model, a))
    for step in range(a.pretrain_steps):
        decay = min(1.0, 2 * (1 - step / a.pretrain_steps))
        a.lr, a.muon_lr = 3e-3 * decay, 0.02 * decay
        loss = sft_update(s, [rows[i] for i in rng.choice(len(rows), 64)])["loss"]
    if RANK == 0:
        model.save_pretrained(folder)
        tok.save(folder)
    dist.barrier()
    say(f"pre-trained on {len(rows)} demonstrations: loss {loss:.4f}, {time.time() - start:.0f} s")


def batches(s, rows):
    """Each step's rows: every one once an epoch, in an order that seed and epoch give.

    Left out are rows, or pairs of them, without a prompt or an answer or longer than the context.
    """
    a, limit = s.args, s.model.config.context_length
    try:
        rows = list(rows)
    except KeyError as error:
        raise ValueError(f"--data: a row, or a message in it, is without {error}") from None
    good = [row for row in rows if all(
        r.ids and not r.learned[0] and sum(r.learned) > 1 and len(r.ids) <= limit
        for r in (row, row.rejected or row))]
    if len(good) < len(rows):
        say(f"{len(rows) - len(good)} rows skipped: an empty prompt or response, or over {limit} "
            "tokens")
    if not good:
        raise ValueError("no response left to learn from")
    if a.pack and a.algorithm == "sft":  # end to end while they fit, so that little is padding
        rows, good = good, [Row([], [])]
        for row in rows:
            if len(good[-1].ids) + len(row.ids) > limit:
                good.append(Row([], []))
            good[-1].extend(row)
    n, size = len(good), min(a.batch_size, len(good))
    a.steps = a.steps or math.ceil(n * a.epochs / size)
    order = np.concatenate([np.random.default_rng((a.seed, epoch)).permutation(n)
                            for epoch in range(1 + a.steps * size // n)])
    while s.step < a.steps:
        yield [good[i] for i in order[s.step * size:(s.step + 1) * size]]


# Each algorithm is a generator: it makes a step, yields what to log of it, and goes on.


def sft(s):
    """Supervised fine-tuning on the assistant's tokens."""
    if not s.args.data:
        raise ValueError("sft: needs --data FILE.jsonl of messages, or prompt and response")
    rows = (conversation(row, s.tokenizer) for row in read_rows(s.args.data))
    for batch in batches(s, rows):
        yield sft_update(s, batch)


# ---- rollouts ----------------------------------------------------------------------------------


def log_generations(path, step, prompts, completions, truths, rewards, count=8):
    """Append a step's transcripts to a .jsonl: prompt, response, truth, rewards, length, reason."""
    with open(path, "a", encoding="utf-8") as f:
        for p, c, t, r in list(zip(prompts, completions, truths, rewards))[:count]:
            f.write(json.dumps(dict(step=step, prompt=p, response=c.text, truth=t, **r,
                                    tokens=len(c.tokens), reason=c.reason,
                                    mean_logprob=float(np.mean(c.logprobs))),
                               default=str) + "\n")  # a user's reward may hold anything


def answer(s, problems, n=1, temperature=1.0):
    """n answers to each (prompt, truth) of this rank's share of problems: Rows, problem by
    problem, and the mean reward and length over all ranks.

    Temperature 1 without top-k or top-p, as the losses assume; the tokens that were sampled are
    the ones trained on, never text encoded again.
    """
    a, problems = s.args, problems[RANK::WORLD_SIZE]
    with s.timed("rollout"), s.autocast():
        done = s.model.generate(
            [s.tokenizer.encode(p) for p, _ in problems],
            min(a.max_new_tokens, s.model.config.context_length - 1), temperature=temperature, n=n,
            stop=["</answer>", s.tokenizer.eot_id], tokenizer=s.tokenizer,
            seed=int(np.random.SeedSequence((a.seed, s.step, RANK)).generate_state(1)[0]),
            batch_size=a.rollout_batch) if problems else []
    prompts, truths = ([p[i] for p in problems for _ in range(n)] for i in (0, 1))
    with s.timed("scoring"):
        rewards, failures = safe_rewards(s.reward_fn, [d.text for d in done], truths)
    if RANK == 0 and temperature and (s.step + 1) % a.eval_every == 0:
        path = Path(a.out) / "transcripts.jsonl"
        log_generations(path, s.step + 1, prompts, done, truths, rewards)
    rows = [joined(d.ids[:-len(d.tokens)], d.tokens, old=d.logprobs, reward=r["reward"],
                   complete=d.reason == "stop") for d, r in zip(done, rewards)]
    count, failures, reward, length = s.sum(
        len(rows), failures, sum(r.reward for r in rows), sum(len(r.old) for r in rows))
    if failures:
        say(f"the reward function failed on {failures:.0f} of {count:.0f} answers; they count 0")
    return rows, dict(reward=reward / max(count, 1), length=length / max(count, 1))


def held_out_accuracy(s):
    """Mean reward of greedy answers to the held-out problems, shared by the ranks."""
    return answer(s, s.held_out, temperature=0.0)[1]["reward"]


def from_all_ranks(items):
    """The lists of all ranks, one after the other."""
    lists = [None] * WORLD_SIZE
    dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def ei(s):
    """Expert iteration: fine-tune on all of one's own right answers so far, again and again."""
    a = s.args
    while s.step < a.steps:
        rows, record = answer(s, s.draw_problems((a.seed, s.step), a.prompts), a.group_size)
        s.pool.update(from_all_ranks(
            [(tuple(r.ids[:-len(r.old)]), tuple(r.ids[-len(r.old):]))
             for r in rows if r.reward == 1.0]))
        pool = [joined(list(p), list(r)) for p, r in sorted(s.pool)]
        rng = np.random.default_rng((a.seed, s.step, 0))
        for _ in range(a.epochs * a.minibatches):
            chosen = rng.choice(len(pool), min(len(pool), a.batch_size), False) if pool else []
            result = sft_update(s, [pool[i] for i in chosen])
        yield dict(record, pool=len(pool), **result)


# ---- policy gradients --------------------------------------------------------------------------


def spread(mask, rows, name):
    """A field of the rows with an entry a learned token -> (B, T), 0 elsewhere."""
    flat = torch.tensor([v for row in rows for v in getattr(row, name)], device=mask.device)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat.float())


def policy_update(s, rows, reference=None, first=True):
    """One optimizer step on sampled rows, with PPO's value loss if that is the algorithm."""
    a = s.args
    kept = [r for r in rows if r.complete or not a.mask_overlong]
    count, tokens = (max(1.0, x) for x in s.sum(len(kept), sum(len(r.old) for r in kept)))
    constant = tokens if a.length_norm == "token" else a.max_new_tokens

    def loss_fn(rows, ids, labels, mask):
        policy, entropy = s.log_probs(s.model, ids, labels, mask)
        old, advantages = spread(mask, rows, "old"), spread(mask, rows, "advantages")
        raw, kl = torch.tensor([[r.reward] for r in rows], device=s.device), torch.zeros_like(old)
        if first and mask.any():  # sampler and trainer are one model still: ratios must be 1
            off = ((policy.detach() - old).exp() - 1).abs()[mask]
            off, allowed = (off.mean(), 0.05) if a.dtype == "bf16" else (off.max(), 1e-3)
            if not off <= allowed:
                raise ValueError(f"log-probabilities of sampling and training differ by {off:.2g} "
                                 f"in ratio, {allowed} is allowed")
        loss, extra = compute_policy_gradient_loss(policy, a.loss, raw, advantages, old,
                                                   a.cliprange, a.cliprange_high, mask)
        if reference is not None:
            kl = kl_penalty(policy, s.log_probs(reference, ids, labels, mask)[0])
            loss = loss + a.kl * kl
        if a.algorithm == "ppo":
            loss = loss + 0.5 * (s.token_values(ids) - spread(mask, rows, "returns")).square()
        loss = loss - a.entropy_bonus * entropy
        loss = (loss * length_weights(mask, a.length_norm, count, constant)).sum()
        clipped = extra.get("clipped", torch.zeros_like(mask))
        return loss, [(x * mask).sum() / tokens for x in (entropy, kl, clipped)]

    return update(s, kept, loss_fn, ["entropy", "kl", "clipped"])


def gae(rewards, values, gamma=1.0, lam=0.95):
    """Advantages of one sequence (T,) (Schulman et al. 2015): d_t = r_t + g v_{t+1} - v_t,
    A_t = d_t + g lam A_{t+1}; what comes after the end is worth 0."""
    advantages, running, after = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(len(values))):
        running = rewards[t] + gamma * after - values[t] + gamma * lam * running
        advantages[t], after = running, values[t]
    return advantages


def ppo_advantages(s, rows):
    """GAE on the value head's numbers, the reward at the last token; mean 0, deviation 1."""
    for part in micro_batches(rows, s.args.micro_tokens):
        ids, _, mask = batch_of(part, s.device)
        with s.timed("train"), torch.no_grad():
            values = s.token_values(ids).cpu()
        for row, v, m in zip(part, values, mask.cpu()):
            rewards = F.pad(torch.tensor([row.reward]), (len(row.old) - 1, 0))
            advantages = gae(rewards, v[m])
            row.returns, row.advantages = (advantages + v[m]).tolist(), advantages.tolist()
    flat = [a for r in rows for a in r.advantages]
    n, total, square = s.sum(len(flat), sum(flat), sum(a * a for a in flat))
    mean = total / max(n, 1)
    deviation = math.sqrt(max(square / max(n, 1) - mean**2, 0.0)) + 1e-6
    for row in rows:
        row.advantages = [(a - mean) / deviation for a in row.advantages]


def policy_gradient(s):
    """grpo and ppo: sample, compare, update, repeat; they differ in what an advantage is."""
    a, reference = s.args, reference_model(s) if s.args.kl else None
    while s.step < a.steps:
        rows, record = answer(s, s.draw_problems((a.seed, s.step), a.prompts), a.group_size)
        if a.algorithm == "ppo":
            ppo_advantages(s, rows)
        else:  # over the other answers to the same problem
            advantages, _, _ = compute_group_normalized_rewards(
                lambda row, _: dict(reward=row.reward), rows, rows, a.group_size,
                normalize_by_std=not a.no_std)
            for row, advantage in zip(rows, advantages.tolist()):
                row.advantages = [advantage] * len(row.old)
        # with --drop-equal, groups that are all right or all wrong have nothing to say
        useful = [r for r in rows if any(r.advantages) or not a.drop_equal]
        for epoch in range(a.epochs):
            order = np.random.default_rng((a.seed, s.step, epoch)).permutation(len(useful))
            for i, chosen in enumerate(np.array_split(order, a.minibatches)):
                means = policy_update(s, [useful[j] for j in chosen], reference, epoch + i == 0)
        yield dict(record, **means)


# ---- preferences -------------------------------------------------------------------------------


def read_pairs(s):
    """The pairs of --data: chosen Rows, each with the rejected one."""
    rows = list(read_rows(s.args.data))
    for row in rows if rows and "prompt" in rows[0] else load_hh(s.args.data):
        chosen, rejected = (conversation(dict(prompt=row["prompt"], response=row[key]), s.tokenizer)
                            for key in ("chosen", "rejected"))
        yield replace(chosen, rejected=rejected)


def own_pairs(s):
    """Right answers of the starting model, each with a wrong one to the same problem."""
    a, n, pairs = s.args, s.args.group_size, []
    start = replace(s, model=reference_model(s), step=0)
    rows, _ = answer(start, s.draw_problems((a.seed, 0), a.prompts), n)
    for g in range(0, len(rows), n):
        right = [r for r in rows[g:g + n] if r.reward == 1.0]
        wrong = [r for r in rows[g:g + n] if r.reward < 1.0]
        pairs += [replace(r, rejected=w) for r, w in zip(right[:2], wrong[:2])]
    pairs = from_all_ranks(pairs)
    say(f"{len(pairs)} pairs of own answers to {a.prompts} problems")
    return pairs


def preferences(s, loss_fn):
    """The steps of dpo and rm; loss_fn(input ids, labels, mask) -> losses and margins (B,)."""
    def share(rows, *batch):
        losses, margins = loss_fn(*batch)
        loss = losses.sum() / len(pairs)
        return loss, [loss, (margins > 0).sum() / len(pairs)]

    for pairs in batches(s, read_pairs(s) if s.args.data else own_pairs(s)):
        yield update(s, pairs[RANK::WORLD_SIZE], share, ["loss", "margin_accuracy"])


def dpo(s):
    """Direct preference optimization against a frozen copy of the starting model; SimPO has none.

    --nll adds the chosen response's mean -log p: where right and wrong answers share most tokens,
    DPO alone lowers both (Pang et al. 2024, Iterative Reasoning Preference Optimization).
    """
    a, reference = s.args, reference_model(s) if s.args.preference != "simpo" else None
    nll = float(not a.data) if a.nll is None else a.nll

    def loss_fn(*batch):
        policy, ref = s.log_probs(s.model, *batch)[0].sum(1).chunk(2), (None, None)
        if reference is not None:
            ref = s.log_probs(reference, *batch)[0].sum(1).chunk(2)
        lengths = batch[2].sum(1).float().chunk(2)
        losses, margins = dpo_loss(*policy, *ref, a.beta, a.preference, a.label_smoothing, *lengths)
        return losses - nll * policy[0] / lengths[0], margins

    return preferences(s, loss_fn)


def rm(s):
    """A reward model: a linear head on the last token, saved as reward_head.safetensors."""
    def loss_fn(ids, labels, mask):
        ids = torch.cat((ids, labels[:, -1:]), 1)  # (2 B, T + 1), with the last token
        last = mask.shape[1] - mask.flip(1).int().argmax(1)
        chosen, rejected = s.token_values(ids).gather(1, last[:, None])[:, 0].chunk(2)
        return reward_model_loss(chosen, rejected), chosen - rejected

    return preferences(s, loss_fn)


# ---- a run: begun, logged, saved, gone on with -------------------------------------------------

IDENTITY = ("algorithm", "model", "task", "data", "seed", "lr", "lora")


def save(s, names):
    """The model for users; train_state.pt, from which a run goes on; a plot of `names` against the
    step. Each file is whole at any moment."""
    out = Path(s.args.out)
    merged(s.model).save_pretrained(out)
    s.tokenizer.save(out)
    if s.args.algorithm == "rm":
        from safetensors.torch import save_file
        save_file(s.model.value_head.state_dict(), out / "reward_head.safetensors")
    train_py.save_checkpoint(s.model, s.optimizers, s.step, out / "train_state.pt",
                             settings={k: getattr(s.args, k) for k in IDENTITY},
                             updates=s.updates, records=s.records, pool=sorted(s.pool))

    from matplotlib.figure import Figure
    figure = Figure((3.2 * len(names), 3), dpi=100, layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        panel.plot(*zip(*((r["step"], r[name]) for r in s.records if r[name] is not None)))
        panel.set(title=name, xlabel="step")
    figure.savefig(out / "progress.tmp.png")
    os.replace(out / "progress.tmp.png", out / "progress.png")


def restore(s):
    """Go on from OUT/train_state.pt, or begin; another run's is refused."""
    path = Path(s.args.out) / "train_state.pt"
    if path.exists():
        state = torch.load(path, weights_only=True, mmap=True)
        other = [f"--{k} {v}" for k, v in state["settings"].items() if v != vars(s.args).get(k)]
        if other:
            raise ValueError(f"--out {s.args.out}: holds a run with {', '.join(other)}; give "
                             "those, or another --out")
        s.step = train_py.load_checkpoint(path, s.model, s.optimizers)
        s.updates, s.records, s.pool = state["updates"], state["records"], set(state["pool"])
        say(f"going on from step {s.step}")
    if RANK == 0:  # what was done after the last save will be done again
        path.with_name("log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in s.records))


def log_step(s, **record):
    """One line on the screen and in log.jsonl; held-out accuracy, plot and checkpoint when due.

    rollout, scoring, train, wait: shares of the step's time; wait is for the other ranks.
    """
    s.step += 1
    a, last, spent = s.args, s.step == s.args.steps, sum(s.seconds.values()) or 1.0
    shares = {k: round(v / spent, 3) for k, v in s.seconds.items()}
    evaluated = s.held_out and a.algorithm != "rm" and (s.step % a.eval_every == 0 or last)
    record["accuracy"] = held_out_accuracy(s) if evaluated else None
    s.records.append(dict(step=s.step, **record, **shares))
    stopping, = s.sum(s.stopping)
    s.seconds.clear()
    if RANK == 0:
        with open(Path(a.out) / "log.jsonl", "a") as f:
            f.write(json.dumps(s.records[-1]) + "\n")
        say(f"{s.step:>5}/{a.steps:<5} " + "  ".join(
            f"{k} {v:.4g}" for k, v in (record | shares).items() if v is not None))
        if s.step % a.save_every == 0 or last or stopping:
            save(s, list(record))
    if stopping:
        raise KeyboardInterrupt


def open_session(args):
    """The model of --model, or one that was just taught to sort, ready for its next step."""
    device, out = train_py.init_distributed(args.device), Path(args.out)
    start = Path(args.model or out / "start")
    if out.resolve() == start.resolve():
        raise ValueError(f"--out {out}: is --model's folder too; a run keeps what it began with")
    out.mkdir(parents=True, exist_ok=True)
    if not args.model and not (out / "train_state.pt").exists():
        pretrain_sorter(args, device, start)
    model = model_py.Transformer.from_pretrained(start, dtype=torch.float32)
    s = Session(args, model, tokenizer_py.Tokenizer.load(start), device, start)
    if args.task:
        s.draw_problems, s.held_out, s.reward_fn = load_task(
            args, s.tokenizer, model.config.context_length)
    signal.signal(signal.SIGTERM, lambda *_: setattr(s, "stopping", True))
    torch.manual_seed(args.seed)
    if args.lora:
        add_lora(model, args.lora)
    if args.algorithm in ("ppo", "rm"):
        model.value_head = torch.nn.Linear(model.config.d_model, 1)
        torch.nn.init.zeros_(model.value_head.weight)
    model.to(device)
    if args.checkpoint_activations:
        train_py.checkpoint_blocks(model)
    s.optimizers = make_optimizers(model, args)
    restore(s)
    return s


# ---- command line ------------------------------------------------------------------------------

ALGORITHMS = {"grpo": policy_gradient, "ei": ei, "sft": sft, "dpo": dpo, "rm": rm,
              "ppo": policy_gradient}
DEFAULTS = {  # that depend on the algorithm
    "grpo": dict(steps=70, prompts=64, group_size=8, epochs=1, minibatches=2, lr=2e-4,
                 eval_every=5),
    "ei": dict(steps=12, prompts=256, group_size=2, epochs=1, minibatches=20, lr=1e-3,
               eval_every=1),
    "sft": dict(steps=0, epochs=2, lr=1e-3, eval_every=50),
    "dpo": dict(steps=0, prompts=2048, group_size=8, epochs=3, lr=2e-4, eval_every=20),
    "rm": dict(steps=0, prompts=2048, group_size=8, epochs=2, lr=1e-4, eval_every=20)}
DEFAULTS["ppo"] = DEFAULTS["grpo"]
# for --model: the rates above would undo what a pre-trained one knows
MODEL_LR = {"grpo": 1e-6, "ppo": 1e-6, "ei": 1e-5, "sft": 2e-5, "dpo": 1e-6, "rm": 1e-5}


def make_parser():
    parser = train_py.Parser(description=__doc__, allow_abbrev=False,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", nargs="?", default="grpo", choices=list(ALGORITHMS),
                        help="(default: grpo)")

    def add(name, default, help, **options):
        each = {k: v[name] for k, v in DEFAULTS.items() if name in v}
        sample = next(iter(each.values()), default)
        if default is False:
            options["action"] = "store_true"
        elif "choices" not in options:
            options.setdefault("type", str if sample is None else type(sample))
            options["metavar"] = "N" if options["type"] in (int, float) else "X"
        shown = ", ".join(f"{k} {v}" for k, v in each.items()) or default
        help += f" (default: {'none' if shown is None else shown})"
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=help, **options)

    add("model", None, "folder of a checkpoint; without it a small one is pre-trained to sort")
    add("task", None, "problems with a checkable answer; gsm8k with --data",
        choices=["sort", "countdown", "gsm8k", "math"])
    add("data", None, "a .jsonl: problems, conversations, or preferences", nargs="*")
    add("prompt", "r1_zero", "template of gsm8k and math", choices=["r1_zero", "question_only"])
    add("reward", None, "MODULE:FUNCTION (response, truth) -> dict with reward, instead")
    add("out", "out-align", "folder of the checkpoint, log.jsonl, transcripts and plot")
    add("steps", None, "rollout steps, or updates; 0 for what --epochs need")
    add("prompts", None, "problems a step of RL, or to make the pairs of dpo and rm from")
    add("group_size", None, "samples of each problem")
    add("max_new_tokens", 40, "tokens an answer")
    add("epochs", None, "passes over a step's rollouts, or over the data")
    add("minibatches", None, "updates a pass over rollouts")
    add("batch_size", 64, "rows an update of sft, dpo and rm, over all ranks")
    add("lr", None, "learning rate; with --model 1e-6, for ei and rm 1e-5, for sft 2e-5")
    add("muon_lr", None, "of Muon for the matrices, 0 for AdamW; else 5 x --lr, 0 with --model",
        type=float)
    add("warmup", 10, "updates of linear warm-up")
    add("loss", "grpo_clip", "policy loss", choices=[
        "grpo_clip", "no_baseline", "reinforce_with_baseline", "grpo_no_clip", "gspo"])
    add("cliprange", 0.2, "how far a ratio may fall, and rise")
    add("cliprange_high", None, "how far a ratio may rise; DAPO has 0.28", type=float)
    add("length_norm", "sequence", "a token's weight: GRPO, Dr. GRPO, DAPO",
        choices=["sequence", "constant", "token"])
    add("no_std", False, "advantages without division by the deviation (Dr. GRPO)")
    add("drop_equal", False, "leave out groups of equal rewards (DAPO)")
    add("mask_overlong", False, "answers cut off by --max-new-tokens teach nothing (DAPO)")
    add("kl", 0.0, "weight of the divergence from the starting model")
    add("entropy_bonus", 0.0, "weight of the entropy")
    add("beta", 0.1, "of DPO")
    add("preference", "sigmoid", "loss of dpo", choices=["sigmoid", "ipo", "hinge", "simpo"])
    add("label_smoothing", 0.0, "share of preferences that may be wrong (sigmoid)")
    add("nll", None, "of DPO: weight of the chosen response's own likelihood; 1 without --data",
        type=float)
    add("pack", False, "sft: join conversations to fill the context")
    add("lora", 0, "rank of low-rank adapters, 0 for training everything")
    add("pretrain_steps", 120, "of pre-training the small model")
    add("held_out", 300, "problems to measure accuracy on")
    add("micro_tokens", 16384, "padded tokens of a micro-batch")
    add("rollout_batch", 512, "samples generated at a time")
    add("checkpoint_activations", False, "recompute blocks in the backward pass")
    add("dtype", "fp32", "of matrix products", choices=["fp32", "bf16"])
    add("device", "auto", "cpu, cuda, ...")
    add("seed", 0, "of everything")
    add("eval_every", None, "steps between held-out accuracies, and between transcripts")
    add("save_every", 20, "steps between checkpoints")
    return parser


def main(argv=None):
    args, start = make_parser().parse_args(argv), time.time()
    with_model = dict(lr=MODEL_LR[args.algorithm], muon_lr=0.0) if args.model else {}
    for name, value in (DEFAULTS[args.algorithm] | with_model).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.muon_lr is None:
        args.muon_lr = 5 * args.lr
    rl = args.algorithm in ("grpo", "ei", "ppo")
    if not args.task and (rl or not (args.model and args.data)):
        args.task = "gsm8k" if rl and args.data else "sort"
    try:
        for name in ("eval_every", "save_every", "prompts", "group_size", "batch_size"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: must be at least 1")
        s = open_session(args)
        if s.held_out and args.algorithm != "rm" and not s.step:
            say(f"held-out accuracy before: {held_out_accuracy(s):.3f}")
        for record in ALGORITHMS[args.algorithm](s):
            log_step(s, **record)
        if not s.step:
            raise ValueError("--steps, --epochs: there is no step to make, so nothing was saved")
        say(f"done in {train_py.clock(time.time() - start)}: {args.out}/model.safetensors, "
            "log.jsonl, progress.png")
    except (ValueError, OSError) as error:
        print(f"align.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("align.py: stopped; the same command goes on from the last save", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        train_py.distributed.close_distributed()


if __name__ == "__main__":
    main()
