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
    groups = raw.view(-1, group_size)
    alike = (groups == groups[:, :1]).all(1, keepdim=True)  # 0, whatever their mean is rounded to
    advantages = (groups - groups.mean(1, keepdim=True)).masked_fill(alike, 0.0)
    if normalize_by_std and group_size > 1:
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
    policy = sequence_log_probs(lm, *batch.values())
    with torch.no_grad():
        reference = sequence_log_probs(lm_ref, *batch.values()).to(policy.device)
    return dpo_loss(*policy, *reference, beta)[0]


def sequence_log_probs(model, *batch):
    """Sum of each row's response log-probabilities, (B,), of what batch_of gives."""
    ids, labels, mask = (x.to(next(model.parameters()).device) for x in batch)
    return get_response_log_probs(model, ids, labels, mask=mask)["log_probs"].sum(-1)


def reward_model_loss(chosen, rejected):
    """-log sig(r_chosen - r_rejected), (B,) (Bradley & Terry 1952; Ouyang et al. 2022)."""
    return -F.logsigmoid(chosen - rejected)


# ---- rewards -----------------------------------------------------------------------------------


def answer_of(response):
    """What stands in <answer>, if the response has the form of the r1_zero prompt; else None."""
    if "</think> <answer>" not in response or "</answer>" not in response:
        return None
    return response.split("<answer>")[-1].replace("</answer>", "").strip()


def scores(answer, right):
    """The course's three rewards: an answer that is None did not have the form asked for."""
    right = float(bool(right) and answer is not None)
    return dict(format_reward=float(answer is not None), answer_reward=right, reward=right)


def r1_zero_reward_fn(response, ground_truth):
    """1 for a right answer in <think> .. </think> <answer> .. </answer>; the form alone gives 0."""
    answer = answer_of(response)
    given = extract_boxed(answer or "") or answer or ""
    return scores(answer, grade(given, str(ground_truth)))


def question_only_reward_fn(response, ground_truth):
    """1 for a right \\boxed answer anywhere in the response."""
    answer = extract_boxed(response)
    return scores(answer, grade(answer or "", str(ground_truth)))


def sort_reward_fn(response, ground_truth):
    return scores(answer_of(response), answer_of(response) == ground_truth)


def countdown_reward_fn(response, ground_truth):
    """ground_truth "3 5 7 = 26": the answer must use each number once, + - * / ( ) only."""
    numbers, target = ground_truth.split(" = ")
    answer = (answer_of(response) or "").split("=")[0]
    used = sorted(re.findall(r"\d+", answer)) == sorted(numbers.split())
    # no ** or //, and no product or sum by writing side by side: 3(5), 2 1/3
    plain = re.fullmatch(r"[\d+\-*/() ]+", answer) and not re.search(
        r"\*\s*\*|/\s*/|[\d)]\s*\(|\)\s*\d|\d\s+\d", answer)
    return scores(answer or None, used and plain and grade(answer, target))


def safe_rewards(reward_fn, responses, truths, seconds=10.0):
    """reward_fn of each; one that raises, takes longer or is not finite counts as 0: (dicts, how
    many failed).

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
            given, failures = scores(None, False), failures + 1
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
QUESTION_ONLY = "{}"


@dataclass
class Task:
    """Problems for RL: (prompt, truth) pairs to train on and held out, the reward, stop strings."""

    train: list
    held_out: list
    reward_fn: object
    stop: tuple = ("</answer>",)


def sort_problem(rng):
    digits = "".join(map(str, rng.integers(0, 10, rng.integers(5, 9))))
    return f"sort {digits}\n", "".join(sorted(digits))


def sort_task(args):
    """Sort 5 to 8 digits. Training problems are drawn anew at every step."""
    rng = np.random.default_rng(10**6)
    return Task([], [sort_problem(rng) for _ in range(args.held_out)], sort_reward_fn)


def countdown_task(args):
    rng, problems = np.random.default_rng(10**6), []
    for _ in range(4000 + args.held_out):
        numbers = rng.integers(1, 20, 3)
        a, b, c = rng.permutation(numbers).tolist()
        target = [a + b + c, a + b - c, a * b + c, a * b - c][rng.integers(4)]
        text = " ".join(map(str, numbers))
        problems.append((f"use {text} once each to make {target}\n<think>", f"{text} = {target}"))
    return Task(problems[args.held_out:], problems[:args.held_out], countdown_reward_fn)


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


def file_task(args):
    """gsm8k ("question", "answer" ending in #### N) or math ("problem", "solution" or "answer")."""
    template, reward = ((R1_ZERO, r1_zero_reward_fn) if args.prompt == "r1_zero" else
                        (QUESTION_ONLY, question_only_reward_fn))
    if not args.data:
        raise ValueError(f"--task {args.task}: needs --data FILE.jsonl")
    problems = []
    for row in read_rows(args.data):
        question = row.get("question") or row.get("problem")
        truth = row.get("answer") or extract_boxed(row.get("solution", ""))
        if not question or not truth:
            raise ValueError(f"--data: an item has {', '.join(row)}, not question and answer, or "
                             "problem and solution")
        problems.append((template.format(question), str(truth).split("####")[-1].strip()))
    held = min(args.held_out, len(problems) // 5)
    stop = ("</answer>",) if args.prompt == "r1_zero" else ()
    return Task(problems[held:], problems[:held], reward, stop)


TASKS = {"sort": sort_task, "countdown": countdown_task, "gsm8k": file_task, "math": file_task}


def load_task(args, tokenizer, limit):
    """The task of --task and --reward, without prompts that leave no room in `limit` tokens."""
    task = TASKS[args.task](args)
    if args.reward:
        sys.path.insert(0, os.getcwd())
        try:
            task.reward_fn = pkgutil.resolve_name(args.reward)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--reward {args.reward}: {error}; give MODULE:FUNCTION") from None
    drawn, before = not task.train, len(task.train) + len(task.held_out)
    task.train, task.held_out = (
        [p for p in part if 0 < len(tokenizer.encode(p[0])) < limit - 1]
        for part in (task.train, task.held_out))
    skipped = before - len(task.train) - len(task.held_out)
    if skipped:
        say(f"{skipped} problems skipped: empty, or no room for an answer in {limit} tokens")
    if not task.held_out or not (task.train or drawn):
        raise ValueError(f"--task {args.task}: no problem left to train on, or none held out")
    return task


def draw_problems(task, count, seed, step):
    """The problems of a step: a function of seed and step alone, so a restarted run agrees."""
    rng = np.random.default_rng((seed, step))
    if not task.train:
        return [sort_problem(rng) for _ in range(count)]
    return [task.train[i] for i in rng.choice(len(task.train), count, len(task.train) < count)]


# ---- data sets ---------------------------------------------------------------------------------


def conversation(row, tokenizer):
    """A Row of messages, or of prompt and response.

    Every assistant turn ends in a token that is learned too: else the model never learns to stop.
    An empty turn is not learned.
    """
    encode, parts, before = tokenizer.encode, [], ""
    if "messages" in row:
        turns = row["messages"]
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant" and turn["content"]:
                opened = tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True)
                text = tokenizer.apply_chat_template(turns[:i + 1])
                parts.append(joined(encode(opened[len(before):]), encode(text[len(opened):])))
                before = text
    elif "prompt" in row and "response" in row:
        parts = [joined(encode(row["prompt"]), encode(row["response"]) + [tokenizer.eot_id])]
    else:
        raise ValueError(f"--data: a row has {', '.join(row)}; messages, or prompt and response, "
                         "are needed")
    return Row([i for part in parts for i in part.ids], [x for part in parts for x in part.learned])


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


# ---- a session: model, optimizers, log ---------------------------------------------------------


def add_lora(model, rank, alpha=16.0):
    """Freeze the model; every matrix W of its blocks becomes W + (alpha / r) B A, of which A
    (r, d_in) and B (d_out, r) are learned (Hu et al. 2021). They start as peft's do, B at zero and
    A within 1 / sqrt(d_in), so that learning rates found with it carry over."""
    def adapter(linear, inputs, output):  # a forward hook
        return output + linear.scale * (inputs[0] @ linear.A.T) @ linear.B.T

    model.requires_grad_(False)
    for linear in model.layers.modules():
        if isinstance(linear, model_py.Linear):
            d_out, d_in = linear.weight.shape
            linear.A = torch.nn.Parameter((2 * torch.rand(rank, d_in) - 1) / math.sqrt(d_in))
            linear.B = torch.nn.Parameter(torch.zeros(d_out, rank))
            linear.scale = alpha / rank
            linear.register_forward_hook(adapter)


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
    task: Task = None
    optimizers: list = ()
    step: int = 0  # done so far
    updates: int = 0  # of the weights; grpo, ppo and ei make several a step
    records: list = field(default_factory=list)  # the lines of log.jsonl
    pool: set = field(default_factory=set)  # of expert iteration: (prompt ids, response ids)
    seconds: dict = field(default_factory=dict)  # spent since the last line of the log
    stopping: bool = False  # SIGTERM came

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16")

    @contextlib.contextmanager
    def timed(self, name):
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]


def open_session(args):
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
        s.task = load_task(args, s.tokenizer, model.config.context_length)
    signal.signal(signal.SIGTERM, lambda *_: setattr(s, "stopping", True))
    torch.manual_seed(args.seed)
    if args.lora:
        add_lora(model, args.lora)
    model.to(device)
    if args.checkpoint_activations:
        train_py.checkpoint_blocks(model)
    if args.algorithm in ("ppo", "rm"):
        model.value_head = torch.nn.Linear(model.config.d_model, 1).to(device)
        torch.nn.init.zeros_(model.value_head.weight)
    s.optimizers = make_optimizers(s)
    restore(s)
    return s


def make_optimizers(s):
    """AdamW, and Muon for the blocks' matrices if --muon-lr has a rate for it."""
    use_muon = s.args.muon_lr and not s.args.lora
    matrices = [p for p in s.model.layers.parameters() if p.ndim == 2 and use_muon]
    inside = set(map(id, matrices))
    adam = train_py.AdamW([p for p in s.parameters() if id(p) not in inside], lr=s.args.lr,
                          betas=(0.9, 0.95), weight_decay=0.0)
    return [adam, train_py.Muon(matrices, lr=s.args.muon_lr)] if matrices else [adam]


def reference_model(s):
    """The model the run began with, frozen."""
    model = model_py.Transformer.from_pretrained(s.start, dtype=torch.float32)
    return model.to(s.device).requires_grad_(False)


IDENTITY = ("algorithm", "model", "task", "data", "seed", "lr", "lora")


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


def save(s):
    """The model for users, and train_state.pt, from which a run goes on; each file whole."""
    out = Path(s.args.out)
    merged(s.model).save_pretrained(out)
    s.tokenizer.save(out)
    if s.args.algorithm == "rm":
        from safetensors.torch import save_file
        save_file(s.model.value_head.state_dict(), out / "reward_head.safetensors")
    train_py.save_checkpoint(s.model, s.optimizers, s.step, out / "train_state.pt",
                             settings={k: getattr(s.args, k) for k in IDENTITY},
                             updates=s.updates, records=s.records, pool=sorted(s.pool))


def log_step(s, **record):
    """One line on the screen and in log.jsonl; held-out accuracy, plot and checkpoint when due.

    rollout, scoring, train, wait: shares of the step's time; wait is for the other ranks.
    """
    s.step += 1
    a, last, spent = s.args, s.step == s.args.steps, sum(s.seconds.values()) or 1.0
    shares = {k: round(v / spent, 3) for k, v in s.seconds.items()}
    evaluated = s.task and a.algorithm != "rm" and (s.step % a.eval_every == 0 or last)
    record["accuracy"] = held_out_accuracy(s) if evaluated else None
    s.records.append(dict(step=s.step, **record, **shares))
    s.seconds.clear()
    stopping, = all_reduce_sum([float(s.stopping)], s.device)
    if RANK == 0:
        with open(Path(a.out) / "log.jsonl", "a") as f:
            f.write(json.dumps(s.records[-1]) + "\n")
        if s.step == 1 or s.step % a.log_every == 0 or last:
            say(f"{s.step:>5}/{a.steps:<5} " + "  ".join(
                f"{k} {v:.4g}" for k, v in (record | shares).items() if v is not None))
        if s.step % a.save_every == 0 or last or stopping:
            save(s)
            draw(s.records, list(record), Path(a.out) / "progress.png")
    if stopping:
        raise KeyboardInterrupt


def draw(records, names, path):
    """A panel for each name: its numbers against the step."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, panels = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3), dpi=100)
    for panel, name in zip(np.atleast_1d(panels), names):
        points = [(r["step"], r[name]) for r in records if r[name] is not None]
        panel.plot(*np.reshape(points, (-1, 2)).T)
        panel.set(title=name, xlabel="step")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".tmp.png"))
    plt.close(figure)
    os.replace(path.with_suffix(".tmp.png"), path)


# ---- one update, of every algorithm ------------------------------------------------------------


def micro_batches(rows, tokens):
    """Rows by length, in batches of about so many padded tokens."""
    def size(row):
        pair = [row, row.rejected] if row.rejected else [row]
        return len(pair) * max(len(r.ids) for r in pair)

    batch = []
    for row in sorted(rows, key=size):
        if batch and size(row) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def optimizer_step(s):
    """Sum gradients over the ranks, clip, warm up, step; returns the norm before clipping.

    The warm-up matters: Adam's first steps have the full size whatever the gradient is, which can
    undo a pre-trained model in one of them.
    """
    parameters = s.parameters()
    for p in parameters:
        if p.grad is None:  # a rank without rows still takes part in the sum
            p.grad = torch.zeros_like(p)
    train_py.sum_gradients(parameters)
    norm = train_py.clip_grad_norm(parameters, s.args.clip).item()
    if not math.isfinite(norm):
        raise ValueError(f"step {s.step + 1}: the gradient is not finite; the checkpoint of the "
                         "last save is kept, try a lower --lr")
    s.updates += 1
    for optimizer, lr in zip(s.optimizers, (s.args.lr, s.args.muon_lr)):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, s.updates / max(1, s.args.warmup))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def update(s, rows, loss_fn, names):
    """One optimizer step: sums over all ranks of `names`, and the gradient's norm.

    loss_fn(rows of a micro-batch) -> (its share of the loss, what to sum under each name).
    """
    totals = [0.0] * len(names)
    with s.timed("train"):
        for part in micro_batches(rows, s.args.micro_tokens):
            loss, values = loss_fn(part)
            loss.backward()
            totals = [total + v.item() for total, v in zip(totals, values)]
    with s.timed("wait"):
        totals = all_reduce_sum(totals, s.device)
    with s.timed("train"):
        return dict(zip(names, totals), gnorm=optimizer_step(s))


# ---- supervised fine-tuning --------------------------------------------------------------------


def sft_update(s, rows):
    """One step on rows: mean loss a learned token, over all ranks."""
    tokens, = all_reduce_sum([float(sum(sum(r.learned) for r in rows))], s.device)

    def loss_fn(rows):
        ids, labels, mask = batch_of(rows, s.device)
        with s.autocast():
            logp = get_response_log_probs(s.model, ids, labels, mask=mask)["log_probs"]
        loss = -masked_normalize(logp, mask, max(tokens, 1.0))
        return loss, [loss]

    return update(s, rows, loss_fn, ["loss"])


def new_sorter(args):
    """A model of 0.3M parameters and a tokenizer of bytes and the five tags, for --task sort."""
    tags = ["<|endoftext|>", "<think>", "</think>", "<answer>", "</answer>"]
    vocab = {i: t.encode() for i, t in enumerate(tags)} | {i + 5: bytes([i]) for i in range(256)}
    tok = tokenizer_py.Tokenizer(vocab, [], tags)
    torch.manual_seed(args.seed)
    model = model_py.Transformer(model_py.ModelConfig(
        vocab_size=tok.vocab_size, d_model=96, num_layers=3, num_heads=3, d_ff=256,
        context_length=64, qk_norm=True, zero_init=True, tie_embeddings=False))
    return model, tok


def pretrain_sorter(args, device, folder, demonstrations=300):
    """Teach a new model the form of an answer, and some sorting: <think> as given </think> ..."""
    rng, a, start = np.random.default_rng(args.seed + 10**7), copy.copy(args), time.time()
    a.warmup, a.lora, a.lr, a.muon_lr = 20, 0, 3e-3, 0.02
    model, tok = new_sorter(args)
    texts = [(p, f"<think> {p[5:-1]} </think> <answer> {t} </answer>")
             for p, t in (sort_problem(rng) for _ in range(demonstrations))]
    rows = [joined(tok.encode(p), tok.encode(r) + [tok.eot_id]) for p, r in texts]
    s = Session(a, model.to(device), tok, device)
    s.optimizers = make_optimizers(s)
    for step in range(a.pretrain_steps):
        decay = min(1.0, 2 * (1 - step / a.pretrain_steps))
        a.lr, a.muon_lr = 3e-3 * decay, 0.02 * decay
        mine = [rows[i] for i in rng.choice(len(rows), 64)][RANK::WORLD_SIZE]
        loss = sft_update(s, mine)["loss"]
    if RANK == 0:
        model.save_pretrained(folder)
        tok.save(folder)
    dist.barrier()
    say(f"pre-trained on {len(rows)} demonstrations: loss {loss:.4f}, {time.time() - start:.0f} s")


def fitting(rows, limit):
    """The rows with a prompt and an answer that fit the context, also where there are pairs."""
    good = [row for row in rows if all(
        r.ids and not r.learned[0] and sum(r.learned) > 1 and len(r.ids) <= limit
        for r in (row, row.rejected or row))]
    if len(good) < len(rows):
        say(f"{len(rows) - len(good)} rows skipped: an empty prompt or response, or over {limit} "
            "tokens")
    if not good:
        raise ValueError("no response left to learn from")
    return good


def pack(rows, limit):
    """Join rows end to end while they fit one context, so that little is padding."""
    packed = []
    for row in rows:
        if not packed or len(packed[-1].ids) + len(row.ids) > limit:
            packed.append(Row([], []))
        packed[-1].ids.extend(row.ids)
        packed[-1].learned.extend(row.learned)
    return packed


def batches(s, rows):
    """Each step's rows: every one once an epoch, in an order that seed and epoch give."""
    a, n, size = s.args, len(rows), min(s.args.batch_size, len(rows))
    a.steps = a.steps or math.ceil(n * a.epochs / size)
    while s.step < a.steps:
        places = range(s.step * size, (s.step + 1) * size)
        orders = {epoch: np.random.default_rng((a.seed, epoch)).permutation(n)
                  for epoch in {place // n for place in places}}
        yield [rows[orders[place // n][place % n]] for place in places]


# Each algorithm is a generator: it makes a step, yields what to log of it, and goes on.


def sft(s):
    """Supervised fine-tuning on the assistant's tokens."""
    limit = s.model.config.context_length
    if not s.args.data:
        raise ValueError("sft: needs --data FILE.jsonl of messages, or prompt and response")
    try:
        rows = fitting([conversation(row, s.tokenizer) for row in read_rows(s.args.data)], limit)
    except KeyError as error:
        raise ValueError(f"--data: a message is without {error}") from None
    for chosen in batches(s, pack(rows, limit) if s.args.pack else rows):
        yield sft_update(s, chosen[RANK::WORLD_SIZE])


# ---- rollouts ----------------------------------------------------------------------------------


def answer(s, problems, n=1, temperature=1.0, seed=0, transcripts=None):
    """n answers to each (prompt, truth) of this rank: Rows, problem by problem, and the mean reward
    and length over all ranks.

    Temperature 1 without top-k or top-p, as the losses assume; the tokens that were sampled are
    the ones trained on, never text encoded again.
    """
    limit = min(s.args.max_new_tokens, s.model.config.context_length - 1)
    prompts, truths = ([p[i] for p in problems for _ in range(n)] for i in (0, 1))
    with s.timed("rollout"), s.autocast():
        done = s.model.generate(
            [s.tokenizer.encode(p) for p, _ in problems], limit, temperature=temperature, n=n,
            stop=[*s.task.stop, s.tokenizer.eot_id], tokenizer=s.tokenizer, seed=seed,
            batch_size=s.args.rollout_batch) if problems else []
    with s.timed("scoring"):
        rewards, failures = safe_rewards(s.task.reward_fn, [d.text for d in done], truths)
    if transcripts:
        log_generations(transcripts, s.step + 1, prompts, done, truths, rewards)
    rows = [joined(d.ids[:-len(d.tokens)], d.tokens, old=d.logprobs, reward=r["reward"],
                   complete=d.reason == "stop") for d, r in zip(done, rewards)]
    with s.timed("wait"):
        count, failures, reward, length = all_reduce_sum(
            [float(len(rows)), float(failures), sum(r.reward for r in rows),
             float(sum(len(r.old) for r in rows))], s.device)
    if failures:
        say(f"the reward function failed on {failures:.0f} of {count:.0f} answers; they count 0")
    return rows, dict(reward=reward / max(count, 1), length=length / max(count, 1))


def held_out_accuracy(s):
    """Mean reward of greedy answers to the held-out problems, shared by the ranks."""
    return answer(s, s.task.held_out[RANK::WORLD_SIZE], temperature=0.0)[1]["reward"]


def log_generations(path, step, prompts, completions, truths, rewards, count=8):
    """Append a step's transcripts to a .jsonl: prompt, response, truth, rewards, length, reason."""
    with open(path, "a", encoding="utf-8") as f:
        for p, c, t, r in list(zip(prompts, completions, truths, rewards))[:count]:
            f.write(json.dumps(dict(step=step, prompt=p, response=c.text, truth=t, **r,
                                    tokens=len(c.tokens), reason=c.reason,
                                    mean_logprob=float(np.mean(c.logprobs))),
                               default=str) + "\n")  # a user's reward may hold anything


def collect(s):
    """Answers to this rank's share of the step's problems: see answer."""
    a, shown = s.args, RANK == 0 and (s.step + 1) % s.args.log_every == 0
    problems = draw_problems(s.task, a.prompts, a.seed, s.step)[RANK::WORLD_SIZE]
    seed = int(np.random.SeedSequence((a.seed, s.step, RANK)).generate_state(1)[0])
    return answer(s, problems, a.group_size, seed=seed,
                  transcripts=Path(a.out) / "transcripts.jsonl" if shown else None)


def ei(s):
    """Expert iteration: fine-tune on all of one's own right answers so far, again and again."""
    a = s.args
    while s.step < a.steps:
        rows, record = collect(s)
        right = [(tuple(r.ids[:-len(r.old)]), tuple(r.ids[-len(r.old):]))
                 for r in rows if r.reward == 1.0]
        everybodys = [None] * WORLD_SIZE
        dist.all_gather_object(everybodys, right)
        s.pool.update(*everybodys)
        pool = [joined(list(p), list(r)) for p, r in sorted(s.pool)]
        rng = np.random.default_rng((a.seed, s.step, 0))
        for _ in range(a.epochs * a.minibatches):
            chosen = rng.choice(len(pool), min(len(pool), a.batch_size), False) if pool else []
            result = sft_update(s, [pool[i] for i in chosen][RANK::WORLD_SIZE])
        yield dict(record, pool=len(pool), **result)


# ---- policy gradients --------------------------------------------------------------------------


def check_first_ratio(s, policy, old, mask):
    """Before the first update sampler and trainer are one model: their ratios must be 1."""
    allowed, worst = (0.05, torch.mean) if s.args.dtype == "bf16" else (1e-3, torch.max)
    off = ((policy - old).exp() - 1).abs()[mask]
    off = worst(off).item() if len(off) else 0.0
    if not off <= allowed:
        raise ValueError(f"log-probabilities of sampling and training differ by {off:.2g} in "
                         f"ratio, {allowed} is allowed: generation and training disagree")


def spread(mask, lists):
    """Lists with an entry a learned token -> (B, T), 0 elsewhere."""
    flat = torch.tensor([v for values in lists for v in values], device=mask.device)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat.float())


def policy_update(s, rows, reference=None, first=True):
    """One optimizer step on sampled rows, with PPO's value loss if that is the algorithm."""
    a = s.args
    kept = [r for r in rows if r.complete or not a.mask_overlong]
    count, tokens = (max(1.0, x) for x in all_reduce_sum(
        [float(len(kept)), float(sum(len(r.old) for r in kept))], s.device))
    constant = tokens if a.length_norm == "token" else a.max_new_tokens

    def loss_fn(rows):
        ids, labels, mask = batch_of(rows, s.device)
        old = spread(mask, [r.old for r in rows])
        advantages = spread(mask, [r.advantages for r in rows])
        raw = torch.tensor([[r.reward] for r in rows], device=s.device)
        with s.autocast():
            out = get_response_log_probs(s.model, ids, labels, True, mask)
        policy, entropy, kl = out["log_probs"], out["token_entropy"], torch.zeros_like(old)
        if first:
            check_first_ratio(s, policy.detach(), old, mask)
        loss, extra = compute_policy_gradient_loss(policy, a.loss, raw, advantages, old,
                                                   a.cliprange, a.cliprange_high, mask)
        if reference is not None:
            with torch.no_grad(), s.autocast():
                ref = get_response_log_probs(reference, ids, labels, mask=mask)["log_probs"]
            kl = kl_penalty(policy, ref)
            loss = loss + a.kl * kl
        if a.algorithm == "ppo":
            returns = spread(mask, [r.returns for r in rows])
            loss = loss + 0.5 * (token_values(s, ids) - returns).square()
        loss = loss - a.entropy_bonus * entropy
        loss = (loss * length_weights(mask, a.length_norm, count, constant)).sum()
        clipped = extra.get("clipped", torch.zeros_like(mask))
        return loss, [(x * mask).sum() / tokens for x in (entropy, kl, clipped)]

    return update(s, kept, loss_fn, ["entropy", "kl", "clipped"])


def policy_gradient(s):
    """grpo and ppo: sample, compare, update, repeat; they differ in what an advantage is."""
    a, reference = s.args, reference_model(s) if s.args.kl else None
    while s.step < a.steps:
        rows, record = collect(s)
        with s.timed("train"):
            (ppo_advantages if a.algorithm == "ppo" else grpo_advantages)(s, rows)
        # with --drop-equal, groups that are all right or all wrong have nothing to say
        useful = [r for r in rows if any(r.advantages) or not a.drop_equal]
        for epoch in range(a.epochs):
            order = np.random.default_rng((a.seed, s.step, epoch)).permutation(len(useful))
            for i, chosen in enumerate(np.array_split(order, a.minibatches)):
                means = policy_update(s, [useful[j] for j in chosen], reference, epoch + i == 0)
        yield dict(record, **means)


def grpo_advantages(s, rows):
    """An answer's advantage is over the others to its problem."""
    advantages, _, _ = compute_group_normalized_rewards(
        lambda row, _: dict(reward=row.reward), rows, rows, s.args.group_size,
        normalize_by_std=not s.args.no_std)
    for row, advantage in zip(rows, advantages.tolist()):
        row.advantages = [advantage] * len(row.old)


def gae(rewards, values, gamma=1.0, lam=0.95):
    """Advantages of one sequence (T,) (Schulman et al. 2015): d_t = r_t + g v_{t+1} - v_t,
    A_t = d_t + g lam A_{t+1}; what comes after the end is worth 0."""
    advantages, running, after = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(len(values))):
        running = rewards[t] + gamma * after - values[t] + gamma * lam * running
        advantages[t], after = running, values[t]
    return advantages


def token_values(s, ids):
    """The value head on the residual stream: (B, T)."""
    with s.autocast():
        return s.model.value_head(s.model.hidden(ids).float())[..., 0]


def ppo_advantages(s, rows):
    """GAE on the value head's numbers, the reward at the last token; mean 0, deviation 1."""
    for part in micro_batches(rows, s.args.micro_tokens):
        ids, _, mask = batch_of(part, s.device)
        with torch.no_grad():
            values = token_values(s, ids).cpu()
        for row, v, m in zip(part, values, mask.cpu()):
            rewards = F.pad(torch.tensor([row.reward]), (len(row.old) - 1, 0))
            advantages = gae(rewards, v[m])
            row.returns, row.advantages = (advantages + v[m]).tolist(), advantages.tolist()
    flat = [a for r in rows for a in r.advantages]
    n, total, square = all_reduce_sum([float(len(flat)), sum(flat), sum(a * a for a in flat)],
                                      s.device)
    mean = total / max(n, 1)
    deviation = math.sqrt(max(square / max(n, 1) - mean**2, 0.0)) + 1e-6
    for row in rows:
        row.advantages = [(a - mean) / deviation for a in row.advantages]


# ---- preferences -------------------------------------------------------------------------------


def read_pairs(s):
    """The pairs of --data: chosen Rows, each with the rejected one."""
    encode, eot = s.tokenizer.encode, [s.tokenizer.eot_id]
    try:
        pairs = list(read_rows(s.args.data))
        if pairs and "prompt" not in pairs[0]:
            pairs = load_hh(s.args.data)
        return [joined(encode(p["prompt"]), encode(p["chosen"]) + eot,
                       rejected=joined(encode(p["prompt"]), encode(p["rejected"]) + eot))
                for p in pairs]
    except KeyError as error:
        raise ValueError(f"--data: a row is without {error}; prompt, chosen, rejected or HH "
                         "transcripts are needed") from None


def own_pairs(s):
    """Right answers of the starting model, each with a wrong one to the same problem."""
    n, pairs = s.args.group_size, []
    problems = draw_problems(s.task, s.args.pairs, s.args.seed, 0)
    rows, _ = answer(replace(s, model=reference_model(s)), problems, n, seed=s.args.seed)
    for g in range(0, len(rows), n):
        right = [r for r in rows[g:g + n] if r.reward == 1.0]
        wrong = [r for r in rows[g:g + n] if r.reward < 1.0]
        pairs += [replace(r, rejected=w) for r, w in zip(right[:2], wrong[:2])]
    say(f"{len(pairs)} pairs of own answers to {len(problems)} problems")
    return pairs


def preferences(s, loss_fn):
    """The steps of dpo and rm; loss_fn(chosen rows, then rejected) -> losses and margins (B,)."""
    pairs = fitting(read_pairs(s) if s.args.data else own_pairs(s), s.model.config.context_length)
    size = min(s.args.batch_size, len(pairs))

    def share(rows):
        losses, margins = loss_fn(rows + [r.rejected for r in rows])
        loss = losses.sum() / size
        return loss, [loss, (margins > 0).sum() / size]

    for chosen in batches(s, pairs):
        yield update(s, chosen[RANK::WORLD_SIZE], share, ["loss", "margin_accuracy"])


def dpo(s):
    """Direct preference optimization against a frozen copy of the starting model.

    --nll adds the chosen response's mean -log p: where right and wrong answers share most tokens,
    DPO alone lowers both (Pang et al. 2024, Iterative Reasoning Preference Optimization).
    """
    a, reference = s.args, reference_model(s)
    nll = float(not a.data) if a.nll is None else a.nll

    def loss_fn(rows):
        batch = batch_of(rows, s.device)
        with s.autocast():
            policy = sequence_log_probs(s.model, *batch).chunk(2)
            with torch.no_grad():
                ref = sequence_log_probs(reference, *batch).chunk(2)
        lengths = batch[2].sum(1).float().chunk(2)
        losses, margins = dpo_loss(*policy, *ref, a.beta, a.preference, a.label_smoothing, *lengths)
        return losses - nll * policy[0] / lengths[0], margins

    return preferences(s, loss_fn)


def rm(s):
    """A reward model: a linear head on the last token, saved as reward_head.safetensors."""
    def loss_fn(rows):
        # one id more, so that the inputs reach the last token
        ids, _, mask = batch_of([Row(r.ids + [0], r.learned + [True]) for r in rows], s.device)
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        chosen, rejected = token_values(s, ids).gather(1, last[:, None])[:, 0].chunk(2)
        return reward_model_loss(chosen, rejected), chosen - rejected

    return preferences(s, loss_fn)


# ---- command line ------------------------------------------------------------------------------

ALGORITHMS = {"grpo": policy_gradient, "ei": ei, "sft": sft, "dpo": dpo, "rm": rm,
              "ppo": policy_gradient}
RL = dict(prompts=64, group_size=8, lr=2e-4, muon_lr=0.001, steps=70, epochs=1, minibatches=2,
          eval_every=5)
DEFAULTS = {  # that depend on the algorithm
    "grpo": RL, "ppo": RL,
    "ei": dict(prompts=256, group_size=2, lr=1e-3, muon_lr=0.005, steps=12, epochs=1,
               minibatches=20, eval_every=1),
    "sft": dict(lr=1e-3, muon_lr=0.005, steps=0, epochs=2, eval_every=50),
    "dpo": dict(group_size=8, lr=2e-4, muon_lr=0.001, steps=0, epochs=3, eval_every=20),
    "rm": dict(group_size=8, lr=1e-4, muon_lr=0.0005, steps=0, epochs=2, eval_every=20)}
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
    add("task", None, "problems with a checkable answer; gsm8k with --data", choices=list(TASKS))
    add("data", None, "a .jsonl: problems, conversations, or preferences", nargs="*")
    add("prompt", "r1_zero", "template of gsm8k and math", choices=["r1_zero", "question_only"])
    add("reward", None, "MODULE:FUNCTION (response, truth) -> dict with reward, instead")
    add("out", "out-align", "folder of the checkpoint, log.jsonl, transcripts and plot")
    add("steps", None, "rollout steps, or updates; 0 for what --epochs need")
    add("prompts", None, "problems a rollout step, over all ranks")
    add("group_size", None, "samples of each problem")
    add("max_new_tokens", 40, "tokens an answer")
    add("epochs", None, "passes over a step's rollouts, or over the data")
    add("minibatches", None, "updates a pass over rollouts")
    add("batch_size", 64, "rows an update of sft, dpo and rm, over all ranks")
    add("lr", None, "learning rate")
    add("muon_lr", None, "of the blocks' matrices by Muon, 0 for AdamW as with --model")
    add("warmup", 10, "updates of linear warm-up")
    add("clip", 1.0, "largest gradient norm")
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
    add("pairs", 2048, "problems to make own pairs from, without --data")
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
    add("log_every", 1, "steps between lines and transcripts")
    add("eval_every", None, "steps between held-out accuracies")
    add("save_every", 20, "steps between checkpoints")
    return parser


def main(argv=None):
    args, start = make_parser().parse_args(argv), time.time()
    rates = dict(lr=MODEL_LR[args.algorithm], muon_lr=0.0) if args.model else {}
    for name, value in (DEFAULTS[args.algorithm] | rates).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    rl = args.algorithm in ("grpo", "ei", "ppo")
    if not args.task and (rl or not (args.model and args.data)):
        args.task = "gsm8k" if rl and args.data else "sort"
    try:
        s = open_session(args)
        if s.task and args.algorithm != "rm" and not s.step:
            say(f"held-out accuracy before: {held_out_accuracy(s):.3f}")
        for record in ALGORITHMS[args.algorithm](s):
            log_step(s, **record)
        say(f"done in {train_py.clock(time.time() - start)}: {args.out}/model.safetensors, "
            "log.jsonl, progress.png")
    except (ValueError, OSError) as error:
        print(f"align.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("align.py: interrupted; the same command goes on from the last save",
              file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        train_py.distributed.close_distributed()


if __name__ == "__main__":
    main()
