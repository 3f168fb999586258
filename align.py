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
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import model as model_py
import tokenizer as tokenizer_py
import train as train_py
from train import all_reduce_sum, say

# ---- text to tokens ----------------------------------------------------------------------------


def ids_of(tokenizer, text):
    """Ids without any that the tokenizer adds by itself; ours or a Hugging Face tokenizer."""
    if isinstance(tokenizer, tokenizer_py.Tokenizer):
        return tokenizer.encode(text)
    return tokenizer.encode(text, add_special_tokens=False)


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


def joined(prompt, response, **more):
    """A Row of two lists of ids, of which the second is learned."""
    return Row(prompt + response, [False] * len(prompt) + [True] * len(response), **more)


def batch_of(rows, pad=0):
    """Rows -> input_ids, labels and response_mask, (B, T) each, T = longest - 1.

    labels are the inputs one token on; response_mask is True where the label is learned.
    For prompt [1, 2] and response [3, 4]: inputs 1 2 3, labels 2 3 4, mask 0 1 1.
    """
    T = max(len(r.ids) for r in rows)
    ids = torch.tensor([r.ids + [pad] * (T - len(r.ids)) for r in rows])
    mask = torch.tensor([r.learned + [False] * (T - len(r.ids)) for r in rows])
    return dict(input_ids=ids[:, :-1], labels=ids[:, 1:], response_mask=mask[:, 1:])


def tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer):
    """Prompts and outputs, encoded apart and joined: see batch_of."""
    return batch_of([joined(ids_of(tokenizer, p), ids_of(tokenizer, o))
                     for p, o in zip(prompt_strs, output_strs)],
                    getattr(tokenizer, "pad_token_id", None) or 0)


# ---- log-probabilities -------------------------------------------------------------------------


def compute_entropy(logits):
    """Entropy of the next token in nats: (..., V) -> (...)."""
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def gather_log_probs(logits, labels):
    """log p of labels (N,) under logits (N, V), and the entropy, fp32."""
    logits = logits.float()
    total = logits.logsumexp(-1)
    entropy = total - (logits.softmax(-1) * logits).sum(-1)
    return logits.gather(-1, labels[:, None])[:, 0] - total, entropy


def get_response_log_probs(model, input_ids, labels, return_token_entropy=False, mask=None,
                           chunk=4096):
    """log p(label | what came before) of every token: {"log_probs": (B, T), "token_entropy"}.

    Our Transformer's head runs on `chunk` tokens at a time and again in the backward pass, so that
    (B, T, V) never exists in fp32; with a mask, at its tokens only (0 elsewhere). Any other model
    that gives logits, or has .logits, works too.
    """
    where = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    if isinstance(model, model_py.Transformer):
        values, head = model.hidden(input_ids)[where], model.head  # (N, D)
    else:
        out = model(input_ids)
        values, head = getattr(out, "logits", out)[where], lambda x: x  # (N, V)
    parts = []
    for v, y in zip(values.split(chunk), labels[where].split(chunk)):
        if torch.is_grad_enabled():
            parts.append(checkpoint(
                lambda v, y: gather_log_probs(head(v), y), v, y, use_reentrant=False))
        else:
            parts.append(gather_log_probs(head(v), y))
    result = {}
    for i, name in enumerate(("log_probs", "token_entropy")[:1 + return_token_entropy]):
        flat = torch.cat([p[i] for p in parts]) if parts else values.new_zeros(0).float()
        result[name] = torch.zeros(labels.shape, device=flat.device).masked_scatter(where, flat)
    return result


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
    advantages = group_advantages(raw, group_size, advantage_eps, normalize_by_std)
    metadata = {k: float(np.mean([s[k] for s in scores])) for k in scores[0]} if scores else {}
    return advantages, raw, metadata


def group_advantages(raw, group_size, eps=1e-6, normalize_by_std=True):
    groups = raw.view(-1, group_size)
    centered = groups - groups.mean(1, keepdim=True)
    if normalize_by_std and group_size > 1:
        centered = centered / (groups.std(1, keepdim=True) + eps)
    return centered.flatten()


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
    if loss_type == "no_baseline":
        return compute_naive_policy_gradient_loss(raw_rewards, policy_log_probs), {}
    if loss_type == "reinforce_with_baseline":
        return compute_naive_policy_gradient_loss(advantages, policy_log_probs), {}
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
    if kind == "simpo":
        margin = policy_chosen / chosen_lengths - policy_rejected / rejected_lengths
        return -F.logsigmoid(beta * margin - gamma), beta * margin
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    if kind == "ipo" and chosen_lengths is not None:
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    margin = chosen - rejected
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2, beta * margin
    if kind == "hinge":
        return torch.relu(1 - beta * margin), beta * margin
    smooth = label_smoothing
    return (-(1 - smooth) * F.logsigmoid(beta * margin) - smooth * F.logsigmoid(-beta * margin),
            beta * margin)


ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{}\n\n### Response:\n")


def per_instance_dpo_loss(lm, lm_ref, tokenizer, beta, prompt, response_chosen, response_rejected):
    """DPO's loss of one pair of strings in Alpaca's template, each ended by <|endoftext|>."""
    eos = getattr(tokenizer, "eos_token", None) or tokenizer_py.EOT
    batch = tokenize_prompt_and_output([ALPACA.format(prompt)] * 2,
                                       [response_chosen + eos, response_rejected + eos], tokenizer)
    policy = sequence_log_probs(lm, batch)
    with torch.no_grad():
        reference = sequence_log_probs(lm_ref, batch).to(policy.device)
    return dpo_loss(*policy, *reference, beta)[0]


def sequence_log_probs(model, batch):
    """Sum of each row's response log-probabilities: (B,)."""
    device = next(model.parameters()).device
    ids, labels, mask = (batch[k].to(device) for k in ("input_ids", "labels", "response_mask"))
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


def scores(formatted, right):
    return dict(format_reward=float(formatted), answer_reward=float(right), reward=float(right))


def r1_zero_reward_fn(response, ground_truth):
    """1 for a right answer in <think> .. </think> <answer> .. </answer>; the form alone gives 0."""
    from evaluate import extract_boxed, grade
    answer = answer_of(response)
    return scores(answer is not None, answer is not None and grade(
        extract_boxed(answer) or answer, str(ground_truth)))


def question_only_reward_fn(response, ground_truth):
    """1 for a right \\boxed answer anywhere in the response."""
    from evaluate import extract_boxed, grade
    answer = extract_boxed(response)
    return scores(answer is not None, answer is not None and grade(answer, str(ground_truth)))


def sort_reward_fn(response, ground_truth):
    return scores(answer_of(response) is not None, answer_of(response) == ground_truth)


def countdown_reward_fn(response, ground_truth):
    """ground_truth "3 5 7 = 26": the answer must use each number once, + - * / ( ) only."""
    from evaluate import grade
    numbers, target = ground_truth.split(" = ")
    answer = (answer_of(response) or "").split("=")[0]
    used = sorted(re.findall(r"\d+", answer)) == sorted(numbers.split())
    allowed = re.fullmatch(r"[\d+\-*/() ]+", answer)
    return scores(bool(answer), bool(used and allowed and grade(answer, target)))


def too_slow(number, frame):
    raise TimeoutError


def safe_rewards(reward_fn, responses, truths, seconds=10.0):
    """reward_fn of each; one that raises or takes longer counts as 0: (dicts, how many failed).

    The alarm stops Python code, sleeping and regular expressions alike, and leaves no thread
    behind; it needs Unix and the main thread.
    """
    results, failures, before = [], 0, signal.signal(signal.SIGALRM, too_slow)
    for response, truth in zip(responses, truths):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                given = dict(reward_fn(response, truth))
                given["reward"] = float(given["reward"])
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Exception:  # a user's function: whatever it raises
            given, failures = scores(0, 0), failures + 1
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


def sort_demonstration(prompt, truth):
    """The response that the demonstrations teach: the digits once more, then in order."""
    return f"<think> {prompt[5:-1]} </think> <answer> {truth} </answer>"


def countdown_task(args):
    rng, problems = np.random.default_rng(10**6), []
    for _ in range(4000 + args.held_out):
        numbers = rng.integers(1, 20, 3)
        a, b, c = (int(n) for n in rng.permutation(numbers))
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
                        yield json.loads(line)
                    except json.JSONDecodeError:
                        raise ValueError(f"{file}: line {number} is not JSON") from None


def file_task(args):
    """gsm8k ("question", "answer" ending in #### N) or math ("problem", "solution" or "answer")."""
    import evaluate
    template, reward = ((R1_ZERO, r1_zero_reward_fn) if args.prompt == "r1_zero" else
                        (QUESTION_ONLY, question_only_reward_fn))
    if not args.data:
        raise ValueError(f"--task {args.task}: needs --data FILE.jsonl")
    problems = []
    for row in read_rows(args.data):
        question = row.get("question") or row.get("problem")
        truth = row.get("answer") or evaluate.extract_boxed(row.get("solution", ""))
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
        import importlib
        module, _, name = args.reward.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            task.reward_fn = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--reward {args.reward}: {error}; give MODULE:FUNCTION") from None
    before = len(task.train) + len(task.held_out)
    fits = [[p for p in part if 0 < len(ids_of(tokenizer, p[0])) < limit - 1]
            for part in (task.train, task.held_out)]
    skipped, drawn = before - sum(map(len, fits)), not task.train
    task.train, task.held_out = fits
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


def conversation_ids(row, tokenizer, eos):
    """A row -> [(ids, is it the assistant's)]: messages, or prompt and response.

    Every assistant turn ends in a token that is learned too: else the model never learns to stop.
    A conversation with an empty answer, or none, gives an empty list.
    """
    if "messages" in row:
        parts, before, turns = [], "", row["messages"]
        answers = [m["content"] for m in turns if m["role"] == "assistant"]
        for i, message in enumerate(turns if answers and all(answers) else ()):
            if message["role"] == "assistant":
                opened = tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True)
                text = tokenizer.apply_chat_template(turns[:i + 1])
                parts += [(ids_of(tokenizer, opened[len(before):]), False),
                          (ids_of(tokenizer, text[len(opened):]), True)]
                before = text
        return parts
    if "response" in row and "prompt" in row:
        return [(ids_of(tokenizer, row["prompt"]), False),
                (ids_of(tokenizer, row["response"]) + [eos], True)] if row["response"] else []
    raise ValueError(f"--data: a row has {', '.join(row)}; messages, or prompt and response, are "
                     "needed")


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
        self.count = (len(ids) - 1) // seq_length
        used = torch.tensor(ids[:self.count * seq_length + 1])
        self.inputs, self.labels = (x.view(-1, seq_length) for x in (used[:-1], used[1:]))

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
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


# ---- a session: model, optimizer, log ----------------------------------------------------------

class LoRALinear(torch.nn.Module):
    """base(x) + (alpha / r) B A x with A (r, d_in), B (d_out, r) learned (Hu et al. 2021)."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.A = torch.nn.Parameter(torch.randn(rank, base.weight.shape[1]) / math.sqrt(rank))
        self.B = torch.nn.Parameter(torch.zeros(base.weight.shape[0], rank))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T) @ self.B.T


def add_lora(model, rank, alpha):
    """Freeze the model and put a LoRALinear around every matrix of its blocks."""
    model.requires_grad_(False)
    for layer in model.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, model_py.Linear):
                    setattr(module, name, LoRALinear(child, rank, alpha))


def merged(model):
    """A copy of the model with every LoRALinear folded into the matrix it stands around."""
    model = copy.deepcopy(model)
    for layer in model.layers:  # checkpoint_blocks' forward would run the original's block
        layer.__dict__.pop("forward", None)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                with torch.no_grad():
                    child.base.weight += child.scale * child.B @ child.A
                setattr(module, name, child.base)
    return model


@dataclass
class Session:
    """What every algorithm carries along."""

    args: argparse.Namespace
    model: torch.nn.Module
    tokenizer: object
    task: Task
    device: torch.device
    optimizers: list = field(default_factory=list)
    head: object = None  # the linear head of rewards or values, where there is one
    step: int = 0  # done so far
    records: list = field(default_factory=list)
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
        modules = [self.model, self.head] if self.head else [self.model]
        return [p for m in modules for p in m.parameters() if p.requires_grad]


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


def open_session(args, head=False):
    device = train_py.init_distributed(args.device)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.model:
        model = model_py.Transformer.from_pretrained(args.model, dtype=torch.float32)
        tok = tokenizer_py.Tokenizer.load(args.model)
    else:
        model, tok = new_sorter(args)
    task = load_task(args, tok, model.config.context_length) if args.task else None
    s = Session(args, model.to(device), tok, task, device)
    signal.signal(signal.SIGTERM, lambda *_: setattr(s, "stopping", True))
    if not args.model and not (Path(args.out) / "train_state.pt").exists():
        pretrain_sorter(s)
    torch.manual_seed(args.seed)
    if args.lora:
        add_lora(s.model, args.lora, args.lora_alpha)
        s.model.to(device)
    if args.checkpoint_activations:
        train_py.checkpoint_blocks(s.model)
    if head:
        s.head = torch.nn.Linear(model.config.d_model, 1).to(device)
        torch.nn.init.zeros_(s.head.weight)
    s.optimizers = make_optimizers(s)
    restore(s)
    return s


def make_optimizers(s):
    """AdamW for everything, or --optimizer muon: Muon for the blocks' matrices."""
    a, muon = s.args, s.args.optimizer == "muon" and not s.args.lora
    inside = {id(p) for p in s.model.layers.parameters() if p.ndim == 2 and muon}
    rest = [p for p in s.parameters() if id(p) not in inside]
    adam = train_py.AdamW(rest, lr=a.lr, betas=(0.9, 0.95), weight_decay=a.weight_decay)
    matrices = [p for p in s.parameters() if id(p) in inside]
    return [adam, train_py.Muon(matrices, lr=a.muon_lr)] if muon else [adam]


IDENTITY = ("algorithm", "model", "task", "data", "seed", "lr", "lora")


def restore(s):
    """Go on from OUT/train_state.pt, or begin; another run's is refused."""
    path, log = (Path(s.args.out) / name for name in ("train_state.pt", "log.jsonl"))
    if not path.exists():
        if train_py.RANK == 0:
            log.unlink(missing_ok=True)
        return
    state = torch.load(path, weights_only=True, map_location="cpu")
    other = [f"--{k} {v}" for k, v in state["settings"].items() if v != getattr(s.args, k)]
    if other:
        raise ValueError(f"--out {s.args.out}: holds a run with {', '.join(other)}; give those, or "
                         "another --out")
    s.step = state["iteration"]
    s.model.load_state_dict(state["model"])
    for optimizer, own in zip(s.optimizers, state["optimizers"]):
        optimizer.load_state_dict(own)
    s.pool = set(state["pool"])
    if s.head:
        s.head.load_state_dict(state["head"])
    lines = log.read_text().splitlines() if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]  # a kill cuts lines short
    s.records = [r for r in records if r["step"] <= s.step]
    if train_py.RANK == 0:  # what was done after the last save will be done again
        beside = log.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(r) + "\n" for r in s.records))
        os.replace(beside, log)
    say(f"going on from step {s.step}")


def save(s):
    """The model for users, and train_state.pt, from which alone a run goes on; each whole."""
    if train_py.RANK:
        return
    out, work = Path(s.args.out), Path(s.args.out) / f"saving-{os.getpid()}"
    merged(s.model).save_pretrained(work)
    s.tokenizer.save(work)
    for file in work.iterdir():
        os.replace(file, out / file.name)
    work.rmdir()
    train_py.save_checkpoint(s.model, s.optimizers, s.step, out / "train_state.pt",
                             settings={k: getattr(s.args, k) for k in IDENTITY},
                             pool=sorted(s.pool), head=s.head.state_dict() if s.head else {})


def reference_model(s):
    """The frozen model a run began with: kept in OUT/reference, for when the run is continued."""
    folder, dtype = Path(s.args.out) / "reference", next(s.model.parameters()).dtype
    if s.step and folder.exists():
        model = model_py.Transformer.from_pretrained(folder, dtype=dtype).to(s.device)
        return model.requires_grad_(False)
    reference = merged(s.model).requires_grad_(False)
    if train_py.RANK == 0:
        beside = folder.with_name(f"saving-{os.getpid()}")
        reference.save_pretrained(beside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    return reference


def log_step(s, **record):
    """One line on the screen and in log.jsonl; the plot and the checkpoint when they are due.

    rollout, scoring, train, wait: shares of the step's time; wait is for the other ranks.
    """
    s.step += 1
    spent = sum(s.seconds.values()) or 1.0
    shares = {k: round(v / spent, 3) for k, v in s.seconds.items()}
    record, s.seconds = dict(step=s.step, **record, **shares), {}
    s.records.append(record)
    stopping, = all_reduce_sum([float(s.stopping)], s.device)
    if train_py.RANK == 0:
        with open(Path(s.args.out) / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")
        if s.step == 1 or s.step % s.args.log_every == 0 or s.step == s.args.steps:
            say(f"{s.step:>5}/{s.args.steps:<5} " + "  ".join(
                f"{k} {v:.4g}" for k, v in record.items() if k != "step" and v is not None))
        if s.step % s.args.save_every == 0 or s.step == s.args.steps or stopping:
            save(s)
            draw(s, [k for k in record if k != "step" and k not in shares])
    if stopping:
        raise KeyboardInterrupt


def draw(s, names):
    """progress.png: every logged number against the step."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, panels = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3), dpi=100)
    for panel, name in zip(np.atleast_1d(panels), names):
        points = [(r["step"], r[name]) for r in s.records if r.get(name) is not None]
        panel.plot(*zip(*points) if points else ([], []))
        panel.set(title=name, xlabel="step")
    figure.tight_layout()
    beside = Path(s.args.out) / "progress.tmp.png"
    figure.savefig(beside)
    plt.close(figure)
    os.replace(beside, Path(s.args.out) / "progress.png")


def optimizer_step(s, factor=1.0):
    """Sum gradients over the ranks, clip, warm up, step; returns the norm before clipping.

    factor is of the full learning rate.
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
    for optimizer in s.optimizers:
        group = optimizer.param_groups[0]
        group["updates"] = group.get("updates", 0) + 1
        full = group.setdefault("full_lr", group["lr"])
        group["lr"] = full * factor * min(1.0, group["updates"] / max(1, s.args.warmup))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def micro_batches(units, tokens):
    """Units (lists of rows that stay together), by length, in batches of about so many tokens."""
    length = {id(u): max(len(r.ids) for r in u) * len(u) for u in units}
    batch = []
    for unit in sorted(units, key=lambda u: length[id(u)]):
        if batch and length[id(unit)] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def on_device(s, rows):
    batch = batch_of(rows)
    return (batch[k].to(s.device) for k in ("input_ids", "labels", "response_mask"))


def update(s, units, loss_fn, names, factor=1.0):
    """One optimizer step, of every algorithm: sums over all ranks of `names`, and the norm.

    loss_fn(units of a micro-batch) -> (its share of the loss, what to sum under each name).
    """
    totals = [0.0] * len(names)
    with s.timed("train"):
        for part in micro_batches(units, s.args.micro_tokens):
            loss, values = loss_fn(part)
            loss.backward()
            totals = [t + float(v) for t, v in zip(totals, values)]
    with s.timed("wait"):
        totals = all_reduce_sum(totals, s.device)
    with s.timed("train"):
        return dict(zip(names, totals), gnorm=optimizer_step(s, factor))


# ---- supervised fine-tuning ---------------------------------------------------------------------


def sft_update(s, rows, factor=1.0):
    """One step on rows: mean loss a learned token, over all ranks."""
    tokens, = all_reduce_sum([float(sum(sum(r.learned) for r in rows))], s.device)

    def loss_fn(part):
        ids, labels, mask = on_device(s, [r for r, in part])
        with s.autocast():
            logp = get_response_log_probs(s.model, ids, labels, mask=mask)["log_probs"]
        loss = -(logp * mask).sum() / max(tokens, 1.0)
        return loss, [loss.item()]

    return update(s, [[r] for r in rows], loss_fn, ["loss"], factor)


def pretrain_sorter(s):
    """Teach the new model the form of an answer, and some sorting, from 300 demonstrations."""
    rng, args = np.random.default_rng(s.args.seed + 10**7), copy.copy(s.args)
    problems = [sort_problem(rng) for _ in range(s.args.demonstrations)]
    rows = [joined(s.tokenizer.encode(p), s.tokenizer.encode(sort_demonstration(p, t)) + [0])
            for p, t in problems]
    args.lr, args.muon_lr, args.warmup, args.optimizer, args.lora = 3e-3, 0.02, 20, "muon", 0
    own = Session(args, s.model, s.tokenizer, s.task, s.device)
    own.optimizers = make_optimizers(own)
    start, steps = time.time(), args.pretrain_steps
    for step in range(steps):
        mine = [rows[i] for i in rng.choice(len(rows), 64)]
        loss = sft_update(own, mine[train_py.RANK::train_py.WORLD_SIZE],
                          min(1.0, 2 * (1 - step / steps)))["loss"]
    say(f"pre-trained on {len(rows)} demonstrations: loss {loss:.4f}, held-out accuracy "
        f"{held_out_accuracy(s):.3f}, {time.time() - start:.0f} s")


def sft_rows(s):
    """The conversations of --data as Rows; one that does not fit the context is skipped."""
    rows, skipped = [], 0
    limit = s.model.config.context_length
    for raw in read_rows(s.args.data):
        parts = conversation_ids(raw, s.tokenizer, s.tokenizer.eot_id)
        row = Row([i for ids, _ in parts for i in ids],
                  [learned for ids, learned in parts for _ in ids])
        if parts and parts[0][0] and len(row.ids) <= limit:
            rows.append(row)
        else:
            skipped += 1
    if skipped:
        say(f"{skipped} rows skipped: an empty prompt or response, or over {limit} tokens")
    if not rows:
        raise ValueError("--data: no response left to learn from")
    return pack(rows, limit) if s.args.pack else rows


def pack(rows, limit):
    """Join rows end to end while they fit one context, so that little is padding."""
    packed = []
    for row in rows:
        if not packed or len(packed[-1].ids) + len(row.ids) > limit:
            packed.append(Row([], []))
        packed[-1].ids.extend(row.ids)
        packed[-1].learned.extend(row.learned)
    return packed


def sft(args):
    """Supervised fine-tuning on the assistant's tokens."""
    s = open_session(args)
    if not args.data:
        raise ValueError("sft: needs --data FILE.jsonl of messages, or prompt and response")
    rows = sft_rows(s)
    args.steps = args.steps or math.ceil(len(rows) * args.epochs / args.batch_size)
    while s.step < args.steps:
        epoch, first = divmod(s.step * args.batch_size, len(rows))
        order = np.random.default_rng((args.seed, epoch)).permutation(len(rows))
        chosen = [rows[i] for i in order[first:first + args.batch_size]]
        result = sft_update(s, chosen[train_py.RANK::train_py.WORLD_SIZE])
        log_step(s, **result, accuracy=held_out_accuracy(s) if s.task and due(s) else None)


def due(s):
    return (s.step + 1) % s.args.eval_every == 0 or s.step + 1 == s.args.steps


# ---- rollouts -----------------------------------------------------------------------------------


def rollout(s, prompts, n=1, temperature=1.0, seed=0):
    """n Completions of each prompt (a string), prompt by prompt.

    Temperature 1 without top-k or top-p, as the losses assume; the tokens that were sampled are
    the ones trained on, never text encoded again.
    """
    limit = min(s.args.max_new_tokens, s.model.config.context_length - 1)
    with s.autocast():
        return s.model.generate(
            [ids_of(s.tokenizer, p) for p in prompts], limit, temperature=temperature, n=n,
            stop=[*s.task.stop, s.tokenizer.eot_id], tokenizer=s.tokenizer, seed=seed,
            batch_size=s.args.rollout_batch) if prompts else []


def held_out_accuracy(s):
    """Mean reward of greedy answers to the held-out problems, shared by the ranks."""
    mine = s.task.held_out[train_py.RANK::train_py.WORLD_SIZE]
    done = rollout(s, [p for p, _ in mine], temperature=0.0)
    rewards, _ = safe_rewards(s.task.reward_fn, [d.text for d in done], [t for _, t in mine])
    total, count = all_reduce_sum([sum(r["reward"] for r in rewards), float(len(mine))], s.device)
    return total / max(count, 1)


def log_generations(path, step, prompts, completions, truths, rewards, count=8):
    """Append a step's transcripts to a .jsonl: prompt, response, truth, rewards, length, reason."""
    with open(path, "a", encoding="utf-8") as f:
        for p, c, t, r in list(zip(prompts, completions, truths, rewards))[:count]:
            f.write(json.dumps(dict(step=step, prompt=p, response=c.text, truth=t, **r,
                                    tokens=len(c.tokens), reason=c.reason,
                                    mean_logprob=float(np.mean(c.logprobs)))) + "\n")


def collect(s):
    """Sample this rank's share of the step's problems and reward every answer.

    Returns Rows, group by group, and what to log of all ranks: mean reward and length.
    """
    args, n = s.args, s.args.group_size
    problems = draw_problems(s.task, args.prompts, args.seed, s.step)
    problems = problems[train_py.RANK::train_py.WORLD_SIZE]
    with s.timed("rollout"):
        done = rollout(s, [p for p, _ in problems], n,
                       seed=hash_seed(args.seed, s.step, train_py.RANK))
    prompts, truths = ([p[i] for p in problems for _ in range(n)] for i in (0, 1))
    with s.timed("scoring"):
        rewards, failures = safe_rewards(s.task.reward_fn, [d.text for d in done], truths)
    if (s.step + 1) % args.log_every == 0 and train_py.RANK == 0:
        log_generations(Path(args.out) / "transcripts.jsonl", s.step + 1, prompts, done, truths,
                        rewards)
    rows = [joined(d.ids[:len(d.ids) - len(d.tokens)], d.tokens, old=d.logprobs,
                   reward=r["reward"], complete=d.reason == "stop")
            for d, r in zip(done, rewards)]
    with s.timed("wait"):
        reward, length, count, failures = all_reduce_sum(
            [sum(r.reward for r in rows), float(sum(len(r.old) for r in rows)),
             float(len(rows)), float(failures)], s.device)
    if failures:
        say(f"the reward function failed on {failures:.0f} of {count:.0f} answers; they count 0")
    return rows, dict(reward=reward / max(count, 1), length=length / max(count, 1))


def hash_seed(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def ei(args):
    """Expert iteration: fine-tune on all of one's own right answers so far, again and again."""
    s = open_session(args)
    while s.step < args.steps:
        rows, record = collect(s)
        right = [(tuple(r.ids[:-len(r.old)]), tuple(r.ids[-len(r.old):]))
                 for r in rows if r.reward == 1.0]
        everybodys = [None] * train_py.WORLD_SIZE
        dist.all_gather_object(everybodys, right)
        s.pool.update(*everybodys)
        pool = [joined(list(p), list(r)) for p, r in sorted(s.pool)]
        rng = np.random.default_rng((args.seed, s.step, 0))
        for _ in range(args.epochs * args.minibatches):
            chosen = rng.choice(len(pool), min(len(pool), args.batch_size), False) if pool else []
            result = sft_update(s, [pool[i] for i in chosen][train_py.RANK::train_py.WORLD_SIZE])
        log_step(s, **record, pool=len(pool), **result,
                 accuracy=held_out_accuracy(s) if due(s) else None)


# ---- policy gradients ---------------------------------------------------------------------------


def check_first_ratio(s, policy, old, mask):
    """Before the first update sampler and trainer are one model: their ratios must be 1."""
    off = ((policy - old).exp() - 1).abs()[mask]
    worst = (off.mean() if s.args.dtype == "bf16" else off.max()).item() if off.numel() else 0.0
    allowed = 0.05 if s.args.dtype == "bf16" else 1e-3
    if not worst <= allowed:
        raise ValueError(f"log-probabilities of sampling and training differ by {worst:.2g} in "
                         f"ratio, {allowed} is allowed: generation and training disagree")


def spread(mask, lists):
    """Lists with an entry a learned token -> (B, T), 0 elsewhere."""
    flat = torch.tensor([v for values in lists for v in values], device=mask.device)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat.float())


def policy_update(s, rows, reference=None, first=True):
    """One optimizer step on sampled rows, with PPO's value loss where there is a head."""
    a = s.args
    kept = [r for r in rows if r.complete or not a.mask_overlong]
    count, tokens = all_reduce_sum([float(len(kept)), float(sum(len(r.old) for r in kept))],
                                   s.device)
    constant = max(tokens, 1.0) if a.length_norm == "token" else a.max_new_tokens

    def loss_fn(part):
        part = [r for r, in part]
        ids, labels, mask = on_device(s, part)
        old, advantages, returns, raw = (spread(mask, values) for values in (
            [r.old for r in part], [r.advantages for r in part],
            [r.returns or [0.0] * len(r.old) for r in part],
            [[r.reward] * len(r.old) for r in part]))
        with s.autocast():
            out = get_response_log_probs(s.model, ids, labels, True, mask)
            values = token_values(s, ids) if s.head else 0.0
        policy, entropy, kl = out["log_probs"], out["token_entropy"], torch.zeros_like(old)
        if first:
            check_first_ratio(s, policy.detach(), old, mask)
        loss, extra = compute_policy_gradient_loss(policy, a.loss, raw, advantages, old,
                                                   a.cliprange, a.cliprange_high, mask)
        if reference is not None:
            with torch.no_grad(), s.autocast():
                ref = get_response_log_probs(reference, ids, labels, mask=mask)["log_probs"]
            kl = kl_penalty(policy, ref, a.kl_kind)
            loss = loss + a.kl * kl
        if s.head:
            loss = loss + a.value_weight * (values - returns).square()
        loss = loss - a.entropy_bonus * entropy
        loss = (loss * length_weights(mask, a.length_norm, max(count, 1.0), constant)).sum()
        clipped = extra.get("clipped", torch.zeros_like(mask)) & mask
        return loss, [(x * mask).sum().item() for x in (entropy, kl, clipped)] + [mask.sum().item()]

    return update(s, [[r] for r in kept], loss_fn, ["entropy", "kl", "clipped", "tokens"])


def policy_loop(s, advantages_fn):
    """Sample, compare, step, repeat; advantages_fn(rows) fills in rows' advantages."""
    args = s.args
    reference = reference_model(s) if args.kl else None
    while s.step < args.steps:
        rows, record = collect(s)
        with s.timed("train"):
            advantages_fn(rows)
        useful = list(range(len(rows)))
        if args.drop_equal:  # groups that are all right or all wrong have nothing to say
            useful = [i for i in useful if any(rows[i].advantages)]
        for epoch in range(args.epochs):
            order = np.random.default_rng((args.seed, s.step, epoch)).permutation(useful)
            for i, chosen in enumerate(np.array_split(order.astype(int), args.minibatches)):
                sums = policy_update(s, [rows[j] for j in chosen], reference, epoch + i == 0)
        tokens = max(sums.pop("tokens"), 1.0)
        gnorm = sums.pop("gnorm")
        log_step(s, **record, **{k: v / tokens for k, v in sums.items()}, gnorm=gnorm,
                 accuracy=held_out_accuracy(s) if due(s) else None)


def grpo(args):
    """Group-relative policy optimization: an answer's advantage is over others to its problem."""
    def advantages_fn(rows):
        raw = torch.tensor([r.reward for r in rows])
        for row, a in zip(rows, group_advantages(raw, args.group_size,
                                                 normalize_by_std=not args.no_std).tolist()):
            row.advantages = [a] * len(row.old)

    policy_loop(open_session(args), advantages_fn)


def gae(rewards, values, gamma=1.0, lam=0.95):
    """Advantages of one sequence (T,) (Schulman et al. 2015): d_t = r_t + g v_{t+1} - v_t,
    A_t = d_t + g lam A_{t+1}; what comes after the end is worth 0."""
    advantages, running = torch.zeros_like(values), 0.0
    for t in reversed(range(len(values))):
        after = values[t + 1] if t + 1 < len(values) else 0.0
        running = rewards[t] + gamma * after - values[t] + gamma * lam * running
        advantages[t] = running
    return advantages


def token_values(s, ids):
    """The value head on the residual stream: (B, T)."""
    return s.head(s.model.hidden(ids).float())[..., 0]


def ppo(args):
    """PPO: a value head on the policy's residual stream, the reward at the last token."""
    s = open_session(args, head=True)

    def advantages_fn(rows):
        for part in micro_batches([[r] for r in rows], args.micro_tokens):
            ids, _, mask = on_device(s, [r for r, in part])
            with torch.no_grad(), s.autocast():
                values = token_values(s, ids).cpu()
            for (row,), v, m in zip(part, values, mask.cpu()):
                rewards = F.pad(torch.tensor([row.reward]), (len(row.old) - 1, 0))
                advantages = gae(rewards, v[m], lam=args.gae_lambda)
                row.returns, row.advantages = (advantages + v[m]).tolist(), advantages.tolist()
        flat = [a for r in rows for a in r.advantages]
        n, total, square = all_reduce_sum([float(len(flat)), sum(flat), sum(a * a for a in flat)],
                                          s.device)
        mean = total / max(n, 1)
        deviation = math.sqrt(max(square / max(n, 1) - mean**2, 0.0)) + 1e-6
        for row in rows:
            row.advantages = [(a - mean) / deviation for a in row.advantages]

    policy_loop(s, advantages_fn)


# ---- preferences --------------------------------------------------------------------------------


def preference_rows(s):
    """[[chosen Row, rejected Row]] of --data, or of own answers to --task."""
    eos, limit = s.tokenizer.eot_id, s.model.config.context_length
    if s.args.data:
        raw = list(read_rows(s.args.data))
        pairs = raw if raw and "prompt" in raw[0] else load_hh(s.args.data)
        for number, pair in enumerate(pairs or [{}], 1):
            missing = [k for k in ("prompt", "chosen", "rejected") if k not in pair]
            if missing:
                raise ValueError(f"--data: row {number} is without {', '.join(missing)}; prompt, "
                                 "chosen, rejected or HH transcripts are needed")
        rows = [[joined(ids_of(s.tokenizer, p["prompt"]), ids_of(s.tokenizer, p[k]) + [eos])
                 for k in ("chosen", "rejected")] for p in pairs]
    else:
        rows = own_pairs(s)
    fitting = [u for u in rows if all(not r.learned[0] and sum(r.learned) > 1
                                      and len(r.ids) <= limit for r in u)]
    if len(fitting) < len(rows):
        say(f"{len(rows) - len(fitting)} pairs skipped: an empty prompt or answer, or over "
            f"{limit} tokens")
    if not fitting:
        raise ValueError("no pair left to learn from")
    return fitting


def own_pairs(s):
    """A right and a wrong answer of the model itself to each problem that got both."""
    n, pairs = s.args.group_size, []
    problems = draw_problems(s.task, s.args.pairs, s.args.seed, 0)
    done = rollout(s, [p for p, _ in problems], n, seed=s.args.seed)
    truths = [t for _, t in problems for _ in range(n)]
    rewards, _ = safe_rewards(s.task.reward_fn, [d.text for d in done], truths)
    rows = [joined(d.ids[:len(d.ids) - len(d.tokens)], d.tokens, reward=r["reward"])
            for d, r in zip(done, rewards)]
    for g in range(0, len(rows), n):
        right = [r for r in rows[g:g + n] if r.reward == 1.0]
        wrong = [r for r in rows[g:g + n] if r.reward < 1.0]
        pairs += list(map(list, zip(right, wrong)))[:2]
    say(f"{len(pairs)} pairs of own answers to {len(problems)} problems")
    return pairs


def preference_loop(s, pairs, loss_fn, evaluate_task=True):
    """Steps on pairs; loss_fn(rows of 2B sequences, chosen first) -> (losses (B,), margins)."""
    a = s.args
    a.steps = a.steps or math.ceil(len(pairs) * a.epochs / a.batch_size)
    while s.step < a.steps:
        size = min(a.batch_size, len(pairs))
        chosen = np.random.default_rng((a.seed, s.step)).choice(len(pairs), size, replace=False)
        mine = [pairs[i] for i in chosen][train_py.RANK::train_py.WORLD_SIZE]

        def share(part, size=size):
            losses, margins = loss_fn([u[0] for u in part] + [u[1] for u in part])
            return losses.sum() / size, [losses.sum().item() / size,
                                         (margins > 0).sum().item() / size]

        result = update(s, mine, share, ["loss", "margin_accuracy"])
        log_step(s, **result,
                 accuracy=held_out_accuracy(s) if evaluate_task and s.task and due(s) else None)


def dpo(args):
    """Direct preference optimization against a frozen copy of the starting model.

    --nll adds the chosen response's mean -log p: where right and wrong answers share most tokens,
    DPO alone lowers both (Pang et al. 2024, Iterative Reasoning Preference Optimization).
    """
    s = open_session(args)
    reference = reference_model(s)
    s.model, policy_model = reference, s.model  # own answers are the starting model's
    pairs, s.model = preference_rows(s), policy_model
    nll = float(not args.data) if args.nll is None else args.nll
    if s.task:
        say(f"held-out accuracy before: {held_out_accuracy(s):.3f}")

    def loss_fn(rows):
        ids, labels, mask = on_device(s, rows)
        with s.autocast():
            policy = get_response_log_probs(s.model, ids, labels, mask=mask)["log_probs"].sum(1)
            with torch.no_grad():
                ref = get_response_log_probs(reference, ids, labels, mask=mask)["log_probs"].sum(1)
        lengths = mask.sum(1).float().chunk(2)
        losses, margins = dpo_loss(*policy.chunk(2), *ref.chunk(2), args.beta, args.preference,
                                   args.label_smoothing, *lengths)
        return losses - nll * policy.chunk(2)[0] / lengths[0], margins

    preference_loop(s, pairs, loss_fn)


def rm(args):
    """A reward model: a linear head on the last token, saved as reward_head.safetensors."""
    s = open_session(args, head=True)

    def loss_fn(rows):
        # one id more, so that the inputs reach the last token
        ids, _, mask = on_device(s, [Row(r.ids + [0], r.learned + [True]) for r in rows])
        with s.autocast():
            values = token_values(s, ids)
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        chosen, rejected = values.gather(1, last[:, None])[:, 0].chunk(2)
        return reward_model_loss(chosen, rejected), chosen - rejected

    preference_loop(s, preference_rows(s), loss_fn, evaluate_task=False)
    if train_py.RANK == 0:
        from safetensors.torch import save_file
        save_file(s.head.state_dict(), Path(args.out) / "reward_head.safetensors")


# ---- command line -------------------------------------------------------------------------------

ALGORITHMS = {"grpo": grpo, "ei": ei, "sft": sft, "dpo": dpo, "rm": rm, "ppo": ppo}
# defaults that depend on the algorithm
DEFAULTS = {
    "grpo": dict(lr=2e-4, muon_lr=0.001, steps=70, epochs=1, minibatches=2, eval_every=5),
    "ppo": dict(lr=2e-4, muon_lr=0.001, steps=70, epochs=1, minibatches=2, eval_every=5),
    "ei": dict(lr=1e-3, muon_lr=0.005, steps=12, epochs=1, minibatches=20, eval_every=1),
    "sft": dict(lr=1e-3, muon_lr=0.005, steps=0, epochs=2, minibatches=1, eval_every=50),
    "dpo": dict(lr=2e-4, muon_lr=0.001, steps=0, epochs=3, minibatches=1, eval_every=20),
    "rm": dict(lr=1e-4, muon_lr=0.0005, steps=0, epochs=2, minibatches=1, eval_every=20)}
# with a pre-trained model the full rates above would undo what it knows
PRETRAINED_LR = {"grpo": 1e-6, "ppo": 1e-6, "ei": 1e-5, "sft": 2e-5, "dpo": 1e-6, "rm": 1e-5}


def make_parser():
    parser = train_py.Parser(description=__doc__, allow_abbrev=False,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", nargs="?", default="grpo", choices=list(ALGORITHMS),
                        help="(default: grpo)")

    def add(flag, default, help, **options):
        if "choices" not in options and "action" not in options and "nargs" not in options:
            options.setdefault("type", str if default is None else type(default))
            options["metavar"] = "N" if options["type"] in (int, float) else "X"
        names = {k: v[flag.replace("-", "_")] for k, v in DEFAULTS.items()
                 if flag.replace("-", "_") in v}
        shown = ", ".join(f"{k} {v}" for k, v in names.items()) or (
            "none" if default is None else default)
        parser.add_argument(f"--{flag}", default=default, help=f"{help} (default: {shown})",
                            **options)

    yes = dict(action="store_true")
    add("model", None, "folder of a checkpoint; without it a small one is pre-trained to sort")
    add("task", None, "problems with a checkable answer; sort without --data",
        choices=list(TASKS))
    add("data", None, "a .jsonl: problems, conversations, or preferences", nargs="*")
    add("prompt", "r1_zero", "template of gsm8k and math", choices=["r1_zero", "question_only"])
    add("reward", None, "MODULE:FUNCTION (response, truth) -> dict with reward, instead")
    add("out", "out-align", "folder of the checkpoint, log.jsonl, transcripts and plot")
    add("steps", None, "rollout steps, or updates; 0 for what --epochs need", type=int)
    add("prompts", 64, "problems a rollout step, over all ranks")
    add("group-size", 8, "samples of each problem")
    add("max-new-tokens", 40, "tokens an answer")
    add("epochs", None, "passes over a step's rollouts, or over the data", type=int)
    add("minibatches", None, "updates a pass over rollouts", type=int)
    add("batch-size", 64, "rows an update of sft, dpo and rm, over all ranks")
    add("lr", None, "learning rate", type=float)
    add("optimizer", None, "adamw, or muon for the blocks' matrices", choices=["adamw", "muon"])
    add("muon-lr", None, "learning rate of muon", type=float)
    add("warmup", 10, "updates of linear warm-up")
    add("weight-decay", 0.0, "decay, per unit of learning rate")
    add("clip", 1.0, "largest gradient norm")
    add("loss", "grpo_clip", "policy loss", choices=[
        "grpo_clip", "no_baseline", "reinforce_with_baseline", "grpo_no_clip", "gspo"])
    add("cliprange", 0.2, "how far a ratio may fall, and rise")
    add("cliprange-high", None, "how far a ratio may rise; DAPO has 0.28", type=float)
    add("length-norm", "sequence", "a token's weight: GRPO, Dr. GRPO, DAPO",
        choices=["sequence", "constant", "token"])
    add("no-std", False, "advantages without division by the deviation (Dr. GRPO)", **yes)
    add("drop-equal", False, "leave out groups of equal rewards (DAPO)", **yes)
    add("mask-overlong", False, "answers cut off by --max-new-tokens teach nothing (DAPO)", **yes)
    add("kl", 0.0, "weight of the divergence from the starting model")
    add("kl-kind", "k3", "its estimate", choices=["k1", "k2", "k3"])
    add("entropy-bonus", 0.0, "weight of the entropy")
    add("gae-lambda", 0.95, "of PPO's advantages")
    add("value-weight", 0.5, "of PPO's value loss")
    add("beta", 0.1, "of DPO")
    add("preference", "sigmoid", "loss of dpo", choices=["sigmoid", "ipo", "hinge", "simpo"])
    add("label-smoothing", 0.0, "share of preferences that may be wrong")
    add("nll", None, "of DPO: weight of the chosen response's own likelihood; 1 without --data",
        type=float)
    add("pairs", 2048, "problems to make own pairs from, without --data")
    add("pack", False, "sft: join conversations to fill the context", **yes)
    add("lora", 0, "rank of low-rank adapters, 0 for training everything")
    add("lora-alpha", 16.0, "their scale, times rank")
    add("demonstrations", 300, "that the small model is pre-trained on")
    add("pretrain-steps", 120, "of pre-training it")
    add("held-out", 300, "problems to measure accuracy on")
    add("micro-tokens", 16384, "padded tokens of a micro-batch")
    add("rollout-batch", 512, "samples generated at a time")
    add("checkpoint-activations", False, "recompute blocks in the backward pass", **yes)
    add("dtype", "fp32", "of matrix products", choices=["fp32", "bf16"])
    add("device", "auto", "cpu, cuda, ...")
    add("seed", 0, "of everything")
    add("log-every", 1, "steps between lines and transcripts")
    add("eval-every", None, "steps between held-out accuracies", type=int)
    add("save-every", 20, "steps between checkpoints")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    for name, value in DEFAULTS[args.algorithm].items():
        if getattr(args, name) is None:
            setattr(args, name, PRETRAINED_LR[args.algorithm] if name == "lr" and args.model
                    else value)
    args.optimizer = args.optimizer or ("adamw" if args.model else "muon")
    if not args.task and (not args.model or args.algorithm in ("grpo", "ei", "ppo")):
        args.task = "sort"
    try:
        start = time.time()
        ALGORITHMS[args.algorithm](args)
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
