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
import copy
import gzip
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model as model_py
import tokenizer as tokenizer_py
import train as train_py

# ---- text to tokens ----------------------------------------------------------------------------


def ids_of(tokenizer, text):
    """Ids without any that the tokenizer adds by itself; ours or a Hugging Face tokenizer."""
    if isinstance(tokenizer, tokenizer_py.Tokenizer):
        return tokenizer.encode(text)
    return tokenizer.encode(text, add_special_tokens=False)


def batch_of(prompts, responses, pad=0):
    """Lists of ids -> input_ids, labels and response_mask, (B, T) each, T = longest - 1.

    labels are the inputs one token on; response_mask is True where the label is of the response.
    For prompt [1, 2] and response [3, 4]: inputs 1 2 3, labels 2 3 4, mask 0 1 1.
    """
    rows = [p + r for p, r in zip(prompts, responses)]
    T = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (T - len(row)) for row in rows])
    mask = torch.tensor([[len(p) <= t < len(p) + len(r) for t in range(T)]
                         for p, r in zip(prompts, responses)])
    return dict(input_ids=ids[:, :-1], labels=ids[:, 1:], response_mask=mask[:, 1:])


def tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer):
    """Prompts and outputs, encoded apart and joined: see batch_of."""
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    return batch_of([ids_of(tokenizer, s) for s in prompt_strs],
                    [ids_of(tokenizer, s) for s in output_strs], pad)


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
            parts.append(torch.utils.checkpoint.checkpoint(
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


def grpo_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps,
                               loss_type, raw_rewards=None, advantages=None, old_log_probs=None,
                               cliprange=None, length_norm="sequence", normalize_constant=None):
    """Backward of one micro-batch's policy loss: (loss, metadata).

    length_norm: "sequence", each row's mean over its response, as GRPO; "constant", its sum over
    normalize_constant, as Dr. GRPO; "token", the sum over normalize_constant, which the caller sets
    to the tokens of the whole batch on all ranks, as DAPO. The first two average over the rows and
    divide by the accumulation steps. A row without response tokens counts 0.
    """
    loss, metadata = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange,
        response_mask=response_mask)
    summed = (loss * response_mask).sum(1)  # (B,)
    if length_norm == "sequence":
        total = (summed / response_mask.sum(1).clamp(min=1)).mean() / gradient_accumulation_steps
    elif length_norm == "constant":
        total = (summed / normalize_constant).mean() / gradient_accumulation_steps
    else:
        total = summed.sum() / normalize_constant
    total.backward()
    return total.detach(), metadata


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


def r1_zero_reward_fn(response, ground_truth):
    """1 for a right answer in <think> .. </think> <answer> .. </answer>; the form alone gives 0."""
    import evaluate
    answer = answer_of(response)
    right = answer is not None and evaluate.grade(evaluate.extract_boxed(answer) or answer,
                                                  str(ground_truth))
    return dict(format_reward=float(answer is not None), answer_reward=float(right),
                reward=float(right))


def question_only_reward_fn(response, ground_truth):
    """1 for a right \\boxed answer anywhere in the response."""
    import evaluate
    answer = evaluate.extract_boxed(response)
    right = answer is not None and evaluate.grade(answer, str(ground_truth))
    return dict(format_reward=float(answer is not None), answer_reward=float(right),
                reward=float(right))


def sort_reward_fn(response, ground_truth):
    right = answer_of(response) == ground_truth
    return dict(format_reward=float(answer_of(response) is not None), answer_reward=float(right),
                reward=float(right))


def countdown_reward_fn(response, ground_truth):
    """ground_truth "3 5 7 = 26": the answer must use each number once, + - * / ( ) only."""
    import evaluate
    numbers, target = ground_truth.split(" = ")
    answer = (answer_of(response) or "").split("=")[0]
    used = sorted(re.findall(r"\d+", answer)) == sorted(numbers.split())
    right = used and re.fullmatch(r"[\d+\-*/() ]+", answer) and evaluate.grade(answer, target)
    return dict(format_reward=float(bool(answer)), answer_reward=float(bool(right)),
                reward=float(bool(right)))


def safe_rewards(reward_fn, responses, truths, seconds=10.0):
    """reward_fn of each; one that raises or takes longer counts as 0: (dicts, how many failed)."""
    zero = dict(format_reward=0.0, answer_reward=0.0, reward=0.0)
    results, failures = [], 0

    def work(box, start):
        for response, truth in zip(responses[start:], truths[start:]):
            try:
                box.append(dict(reward_fn(response, truth)))
            except Exception as error:  # a user's function: whatever it raises
                box.append(error)

    while len(results) < len(responses):
        box, seen, waited = [], 0, time.monotonic()
        thread = threading.Thread(target=work, args=(box, len(results)), daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() - waited < seconds:
            thread.join(0.02)
            if len(box) > seen:
                seen, waited = len(box), time.monotonic()
        done = list(box)[:len(responses) - len(results)]
        failures += sum(isinstance(r, Exception) for r in done)
        results += [dict(zero) if isinstance(r, Exception) else r for r in done]
        if len(results) < len(responses):  # it hangs on this one: leave the thread behind
            results.append(dict(zero))
            failures += 1
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


def load_task(args):
    task = TASKS[args.task](args)
    if args.reward:
        import importlib
        module, _, name = args.reward.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            task.reward_fn = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--reward {args.reward}: {error}; give MODULE:FUNCTION") from None
    return task


def draw_problems(task, count, seed, step):
    """The problems of a step: a function of seed and step alone, so a restarted run agrees."""
    rng = np.random.default_rng((seed, step))
    if not task.train:
        return [sort_problem(rng) for _ in range(count)]
    return [task.train[i] for i in rng.choice(len(task.train), count, len(task.train) < count)]


# ---- data sets ---------------------------------------------------------------------------------


def conversation_ids(row, tokenizer, eos):
    """A row -> [(ids, is it the assistant's)]: messages, prompt/response, or plain text.

    Every assistant turn ends in a token that is learned too: else the model never learns to stop.
    """
    if "messages" in row:
        parts, before = [], ""
        for i, message in enumerate(row["messages"]):
            text = tokenizer.apply_chat_template(row["messages"][:i + 1])
            if message["role"] == "assistant":
                opened = tokenizer.apply_chat_template(row["messages"][:i],
                                                       add_generation_prompt=True)
                parts += [(ids_of(tokenizer, opened[len(before):]), False),
                          (ids_of(tokenizer, text[len(opened):]), True)]
                before = text
        return parts
    if "response" in row and "prompt" in row:
        return [(ids_of(tokenizer, row["prompt"]), False),
                (ids_of(tokenizer, row["response"]) + [eos], True)]
    raise ValueError(f"a row has {', '.join(row)}: messages, or prompt and response, are needed")


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

say = train_py.say


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
    seconds: dict = field(default_factory=lambda: dict(rollout=0.0, train=0.0))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16")

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
    task = load_task(args) if args.task else None
    if args.model:
        model = model_py.Transformer.from_pretrained(args.model, dtype=torch.float32)
        tok = tokenizer_py.Tokenizer.load(args.model)
    else:
        model, tok = new_sorter(args)
    s = Session(args, model.to(device), tok, task, device)
    if not args.model and not (Path(args.out) / "train_state.pt").exists():
        pretrain_sorter(s)
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
                             head=s.head.state_dict() if s.head else {})


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
    """One line on the screen and in log.jsonl; the plot and the checkpoint when they are due."""
    s.step += 1
    spent = sum(s.seconds.values()) or 1.0
    record = dict(step=s.step, **record, rollout=round(s.seconds["rollout"] / spent, 3))
    s.records.append(record)
    if train_py.RANK:
        return
    with open(Path(s.args.out) / "log.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")
    if s.step == 1 or s.step % s.args.log_every == 0 or s.step == s.args.steps:
        say(f"{s.step:>5}/{s.args.steps:<5} " + "  ".join(
            f"{k} {v:.4g}" for k, v in record.items() if k != "step" and v is not None))
    if s.step % s.args.save_every == 0 or s.step == s.args.steps:
        save(s)
        draw(s)


def draw(s):
    """progress.png: every logged number against the step."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    names = [k for k in s.records[-1] if k not in ("step", "rollout")]
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


def micro_batches(rows, tokens):
    """Indices of rows (prompt ids, response ids), by length, in batches of about `tokens`."""
    lengths, batch = [len(r[0]) + len(r[1]) for r in rows], []
    for i in sorted(range(len(rows)), key=lengths.__getitem__):
        longest = lengths[i]
        if batch and longest * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def on_device(s, rows):
    batch = batch_of([r[0] for r in rows], [r[1] for r in rows])
    return (batch[k].to(s.device) for k in ("input_ids", "labels", "response_mask"))


# ---- supervised fine-tuning, expert iteration ---------------------------------------------------


def sft_update(s, rows, factor=1.0):
    """One step on rows [(prompt ids, response ids)]: mean loss a response token, over all ranks."""
    start, total = time.perf_counter(), 0.0
    tokens, = train_py.all_reduce_sum([float(sum(len(r[1]) for r in rows))], s.device)
    for part in micro_batches(rows, s.args.micro_tokens):
        ids, labels, mask = on_device(s, [rows[i] for i in part])
        with s.autocast():
            logp = get_response_log_probs(s.model, ids, labels, mask=mask)["log_probs"]
        loss = -(logp * mask).sum() / max(tokens, 1.0)
        loss.backward()
        total += loss.item()
    norm = optimizer_step(s, factor)
    s.seconds["train"] += time.perf_counter() - start
    return train_py.all_reduce_sum([total], s.device)[0], norm


def pretrain_sorter(s):
    """Teach the new model the form of an answer, and some sorting, from 300 demonstrations."""
    rng, args = np.random.default_rng(s.args.seed + 10**7), copy.copy(s.args)
    problems = [sort_problem(rng) for _ in range(s.args.demonstrations)]
    rows = [(s.tokenizer.encode(p), s.tokenizer.encode(sort_demonstration(p, t)) + [0])
            for p, t in problems]
    args.lr, args.muon_lr, args.warmup, args.optimizer = 3e-3, 0.02, 20, "muon"
    own = Session(args, s.model, s.tokenizer, s.task, s.device)
    own.optimizers = make_optimizers(own)
    start, steps = time.time(), args.pretrain_steps
    for step in range(steps):
        mine = [rows[i] for i in rng.choice(len(rows), 64)]
        loss, _ = sft_update(own, mine[train_py.RANK::train_py.WORLD_SIZE],
                             min(1.0, 2 * (1 - step / steps)))
    say(f"pre-trained on {len(rows)} demonstrations: loss {loss:.4f}, held-out accuracy "
        f"{held_out_accuracy(s):.3f}, {time.time() - start:.0f} s")


def sft_rows(s):
    """--data -> [(prompt ids, response ids)]; several assistant turns give several rows."""
    rows, skipped = [], 0
    limit, eos = s.model.config.context_length, s.tokenizer.eot_id
    for row in read_rows(s.args.data):
        before = []
        for ids, learned in conversation_ids(row, s.tokenizer, eos):
            if learned and before and len(ids) > 1 and len(before) + len(ids) <= limit:
                rows.append((before, ids))
            skipped += learned and not (before and len(ids) > 1 and len(before) + len(ids) <= limit)
            before = before + ids
    if skipped:
        say(f"{skipped} responses skipped: empty, without a prompt, or over {limit} tokens with it")
    if not rows:
        raise ValueError("--data: no response left to learn from")
    return pack(rows, limit) if s.args.pack else rows


def pack(rows, limit):
    """Join rows end to end while they fit one context: [([], ids, mask)] without padding."""
    packed, at = [], None
    for prompt, response in rows:
        if at is None or len(at[1]) + len(prompt) + len(response) > limit:
            at = ([], [], [])
            packed.append(at)
        at[1].extend(prompt + response)
        at[2].extend([False] * len(prompt) + [True] * len(response))
    return packed


def sft(args):
    s = open_session(args)
    if not args.data:
        raise ValueError("sft: needs --data FILE.jsonl of messages, or prompt and response")
    rows = sft_rows(s)
    per_step = args.batch_size
    args.steps = args.steps or math.ceil(len(rows) * args.epochs / per_step)
    while s.step < args.steps:
        rng = np.random.default_rng((args.seed, s.step * per_step // len(rows)))
        order = rng.permutation(len(rows))
        first = s.step * per_step % len(rows)
        chosen = [rows[i] for i in order[first:first + per_step]]
        mine = chosen[train_py.RANK::train_py.WORLD_SIZE]
        loss, norm = packed_update(s, mine) if args.pack else sft_update(s, mine)
        accuracy = held_out_accuracy(s) if s.task and due(s) else None
        log_step(s, loss=loss, gnorm=norm, accuracy=accuracy)


def packed_update(s, rows):
    """sft_update for packed rows: the mask is theirs."""
    total, limit = 0.0, max(len(r[1]) for r in rows) if rows else 0
    tokens, = train_py.all_reduce_sum([float(sum(sum(r[2]) for r in rows))], s.device)
    for _, ids, mask in rows:
        x = torch.tensor([ids[:limit]], device=s.device)
        keep = torch.tensor([mask[:limit]], device=s.device)[:, 1:]
        with s.autocast():
            logp = get_response_log_probs(s.model, x[:, :-1], x[:, 1:], mask=keep)["log_probs"]
        loss = -logp.sum() / max(tokens, 1.0)
        loss.backward()
        total += loss.item()
    norm = optimizer_step(s)
    return train_py.all_reduce_sum([total], s.device)[0], norm


def due(s):
    return (s.step + 1) % s.args.eval_every == 0 or s.step + 1 == s.args.steps


# ---- rollouts -----------------------------------------------------------------------------------


def rollout(s, prompts, n=1, temperature=1.0, seed=0):
    """n samples of each prompt (strings): Completions, prompt by prompt; too long ones dropped.

    Temperature 1 without top-k or top-p, as the losses assume; the tokens that were sampled are
    the ones trained on, never text encoded again. Returns (completions, which prompts were kept).
    """
    start, room = time.perf_counter(), s.model.config.context_length - 1
    ids = [ids_of(s.tokenizer, p) for p in prompts]
    kept = [i for i, row in enumerate(ids) if 0 < len(row) < room]
    limit = min(s.args.max_new_tokens, room)
    stop = [*s.task.stop, s.tokenizer.eot_id]
    with s.autocast():
        done = s.model.generate([ids[i] for i in kept], limit, temperature=temperature, n=n,
                                stop=stop, tokenizer=s.tokenizer, seed=seed,
                                batch_size=s.args.rollout_batch) if kept else []
    s.seconds["rollout"] += time.perf_counter() - start
    return done, kept


def held_out_accuracy(s):
    """Mean reward of greedy answers to the held-out problems, shared by the ranks."""
    mine = s.task.held_out[train_py.RANK::train_py.WORLD_SIZE]
    seconds = dict(s.seconds)
    done, kept = rollout(s, [p for p, _ in mine], temperature=0.0)
    s.seconds = seconds
    rewards, _ = safe_rewards(s.task.reward_fn, [d.text for d in done], [mine[i][1] for i in kept])
    total, count = train_py.all_reduce_sum([sum(r["reward"] for r in rewards), float(len(mine))],
                                           s.device)
    return total / max(count, 1)


def log_generations(path, step, prompts, completions, truths, rewards, count=8):
    """Append sampled transcripts to a .jsonl: prompt, response, truth, rewards, length, entropy."""
    with open(path, "a", encoding="utf-8") as f:
        for p, c, t, r in list(zip(prompts, completions, truths, rewards))[:count]:
            f.write(json.dumps(dict(step=step, prompt=p, response=c.text, truth=t, **r,
                                    tokens=len(c.tokens), reason=c.reason,
                                    mean_logprob=float(np.mean(c.logprobs)))) + "\n")


@dataclass
class Experience:
    """Rollouts of a step, group by group."""

    rows: list  # (prompt ids, response ids)
    old: list  # log-probabilities of the response tokens when they were sampled
    raw: torch.Tensor  # rewards (N,)
    complete: list  # whether each ended by itself
    failures: int  # of the reward function


def collect(s):
    """Sample this rank's share of the step's problems and reward every answer."""
    args = s.args
    problems = draw_problems(s.task, args.prompts, args.seed, s.step)
    problems = problems[train_py.RANK::train_py.WORLD_SIZE]
    done, kept = rollout(s, [p for p, _ in problems], args.group_size,
                         seed=hash_seed(args.seed, s.step, train_py.RANK))
    truths = [problems[i][1] for i in kept for _ in range(args.group_size)]
    rewards, failures = safe_rewards(s.task.reward_fn, [d.text for d in done], truths)
    if failures:
        say(f"the reward function failed on {failures} of {len(done)} answers; they count 0")
    if (s.step + 1) % args.log_every == 0 and train_py.RANK == 0:
        prompts = [problems[i][0] for i in kept for _ in range(args.group_size)]
        log_generations(Path(args.out) / "transcripts.jsonl", s.step + 1, prompts, done, truths,
                        rewards)
    rows = [(d.ids[:len(d.ids) - len(d.tokens)], d.tokens) for d in done]
    return Experience(rows, [d.logprobs for d in done],
                      torch.tensor([r["reward"] for r in rewards], dtype=torch.float32),
                      [d.reason == "stop" for d in done], failures)


def hash_seed(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def ei(args):
    """Expert iteration: fine-tune on all of one's own right answers so far, again and again."""
    s = open_session(args)
    path = Path(args.out) / f"pool-{train_py.RANK}.json"
    pool = {tuple(map(tuple, row)) for row in json.loads(path.read_text())} if s.step else set()
    while s.step < args.steps:
        x = collect(s)
        pool |= {(tuple(p), tuple(r)) for (p, r), v in zip(x.rows, x.raw.tolist()) if v == 1.0}
        rows = [(list(p), list(r)) for p, r in sorted(pool)]
        rng = np.random.default_rng((args.seed, s.step, train_py.RANK))
        for _ in range(args.epochs * args.minibatches):
            size = min(len(rows), args.batch_size // train_py.WORLD_SIZE)
            chosen = rng.choice(len(rows), size, replace=False) if rows else []
            loss, norm = sft_update(s, [rows[i] for i in chosen])
        path.write_text(json.dumps(sorted(pool)))
        accuracy = held_out_accuracy(s) if due(s) else None
        reward, count, right = train_py.all_reduce_sum(
            [x.raw.sum().item(), float(len(x.raw)), float(len(pool))], s.device)
        log_step(s, reward=reward / max(count, 1), pool=right, loss=loss, gnorm=norm,
                 accuracy=accuracy)


# ---- policy gradients ---------------------------------------------------------------------------


def token_weights(s, mask, rows, tokens):
    """What each token's loss counts for (B, T), from the batch's rows and tokens on all ranks."""
    if s.args.length_norm == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / rows
    return mask / (tokens if s.args.length_norm == "token" else rows * s.args.max_new_tokens)


def check_first_ratio(s, policy, old, mask):
    """Before the first update sampler and trainer are one model: their ratios must be 1."""
    off = ((policy - old).exp() - 1).abs()[mask]
    worst = (off.mean() if s.args.dtype == "bf16" else off.max()).item() if off.numel() else 0.0
    allowed = 0.05 if s.args.dtype == "bf16" else 1e-3
    if worst > allowed:
        raise ValueError(f"log-probabilities of sampling and training differ by {worst:.2g} in "
                         f"ratio, {allowed} is allowed: generation and training disagree")
    return worst


def policy_update(s, x, advantages, reference=None, first=True):
    """One optimizer step on Experience rows; returns this rank's sums of what to log."""
    a, sums = s.args, dict(entropy=0.0, kl=0.0, clipped=0.0, tokens=0.0, ratio=0.0)
    kept = [c or not a.mask_overlong for c in x.complete]
    rows, tokens = train_py.all_reduce_sum(
        [float(sum(kept)), float(sum(len(r[1]) for r, k in zip(x.rows, kept) if k))], s.device)
    for part in micro_batches(x.rows, a.micro_tokens):
        ids, labels, mask = on_device(s, [x.rows[i] for i in part])
        mask = mask & torch.tensor([kept[i] for i in part], device=s.device)[:, None]
        old = torch.zeros(mask.shape, device=s.device)
        for b, i in enumerate(part):
            at = len(x.rows[i][0]) - 1
            old[b, at:at + len(x.old[i])] = torch.tensor(x.old[i], device=s.device)
        with s.autocast():
            out = get_response_log_probs(s.model, ids, labels, True, mask)
        policy, entropy = out["log_probs"], out["token_entropy"]
        if first:
            sums["ratio"] = max(sums["ratio"], check_first_ratio(s, policy.detach(), old, mask))
        adv, raw = advantages[part, None].to(s.device), x.raw[part, None].to(s.device)
        loss, extra = compute_policy_gradient_loss(policy, a.loss, raw, adv, old, a.cliprange,
                                                   a.cliprange_high, mask)
        if reference is not None:
            with torch.no_grad(), s.autocast():
                ref = get_response_log_probs(reference, ids, labels, mask=mask)["log_probs"]
            kl = kl_penalty(policy, ref, a.kl_kind)
            loss, sums["kl"] = loss + a.kl * kl, sums["kl"] + (kl * mask).sum().item()
        loss = loss - a.entropy_bonus * entropy
        (loss * token_weights(s, mask, max(rows, 1.0), max(tokens, 1.0))).sum().backward()
        sums["entropy"] += (entropy * mask).sum().item()
        sums["tokens"] += mask.sum().item()
        sums["clipped"] += (extra["clipped"] & mask).sum().item() if extra else 0.0
    sums["gnorm"] = optimizer_step(s)
    return sums


def subset(x, chosen):
    return Experience([x.rows[i] for i in chosen], [x.old[i] for i in chosen], x.raw[chosen],
                      [x.complete[i] for i in chosen], x.failures)


def grpo(args):
    """Group-relative policy optimization: sample groups, compare within them, step; repeat."""
    s = open_session(args)
    reference = reference_model(s) if args.kl else None
    while s.step < args.steps:
        x = collect(s)
        advantages = group_advantages(x.raw, args.group_size, normalize_by_std=not args.no_std)
        reward, count, length = train_py.all_reduce_sum(
            [x.raw.sum().item(), float(len(x.raw)), float(sum(len(r[1]) for r in x.rows))],
            s.device)
        useful = list(range(len(x.rows)))
        if args.drop_equal:  # groups that are all right or all wrong have nothing to say
            useful = [i for i in useful if advantages[i] != 0]
        start = time.perf_counter()
        for epoch in range(args.epochs):
            rng = np.random.default_rng((args.seed, s.step, epoch))
            order = rng.permutation(useful).astype(int).tolist()
            size = math.ceil(max(1, len(order)) / args.minibatches)
            for i in range(args.minibatches):
                chosen = order[i * size:(i + 1) * size]
                sums = policy_update(s, subset(x, chosen), advantages[chosen], reference,
                                     first=epoch == 0 and i == 0)
        s.seconds["train"] += time.perf_counter() - start
        accuracy = held_out_accuracy(s) if due(s) else None
        tokens = max(sums["tokens"], 1.0)
        log_step(s, reward=reward / max(count, 1), length=length / max(count, 1),
                 entropy=sums["entropy"] / tokens, kl=sums["kl"] / tokens if args.kl else None,
                 clipped=sums["clipped"] / tokens, gnorm=sums["gnorm"], accuracy=accuracy)


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
    while s.step < args.steps:
        x = collect(s)
        start, advantages, returns = time.perf_counter(), {}, {}
        for part in micro_batches(x.rows, args.micro_tokens):
            ids, _, mask = on_device(s, [x.rows[i] for i in part])
            with torch.no_grad(), s.autocast():
                values = token_values(s, ids)
            for b, i in enumerate(part):
                v = values[b][mask[b]].cpu()
                rewards = torch.zeros_like(v)
                rewards[-1] = x.raw[i]
                advantages[i] = gae(rewards, v, lam=args.gae_lambda)
                returns[i] = advantages[i] + v
        flat = torch.cat([advantages[i] for i in range(len(x.rows))])
        flat_mean, flat_std = flat.mean(), flat.std() + 1e-6
        for epoch in range(args.epochs):
            order = np.random.default_rng((args.seed, s.step, epoch)).permutation(len(x.rows))
            for chosen in np.array_split(order, args.minibatches):
                tokens, = train_py.all_reduce_sum(
                    [float(sum(len(x.rows[i][1]) for i in chosen))], s.device)
                rows = [x.rows[i] for i in chosen]
                for part in micro_batches(rows, args.micro_tokens):
                    ids, labels, mask = on_device(s, [rows[i] for i in part])
                    mine = [chosen[i] for i in part]

                    def spread(lists, mask=mask):  # lists of response tokens -> (B, T)
                        return torch.zeros(mask.shape).masked_scatter(
                            mask.cpu(), torch.cat([torch.as_tensor(v) for v in lists]).float()
                        ).to(s.device)

                    adv = spread([(advantages[i] - flat_mean) / flat_std for i in mine])
                    old = spread([x.old[i] for i in mine])
                    target = spread([returns[i] for i in mine])
                    with s.autocast():
                        out = get_response_log_probs(s.model, ids, labels, mask=mask)
                        value, policy = token_values(s, ids), out["log_probs"]
                    loss, _ = compute_grpo_clip_loss(adv, policy, old, args.cliprange,
                                                     args.cliprange_high)
                    loss = loss + args.value_weight * (value - target).square()
                    ((loss * mask).sum() / max(tokens, 1.0)).backward()
                norm = optimizer_step(s)
        s.seconds["train"] += time.perf_counter() - start
        reward, count = train_py.all_reduce_sum([x.raw.sum().item(), float(len(x.raw))], s.device)
        log_step(s, reward=reward / max(count, 1), gnorm=norm,
                 accuracy=held_out_accuracy(s) if due(s) else None)


# ---- preferences --------------------------------------------------------------------------------


def preference_rows(s):
    """[(prompt ids, chosen ids, rejected ids)] of --data, or of own answers to --task."""
    eos = s.tokenizer.eot_id
    if s.args.data:
        raw = list(read_rows(s.args.data))
        pairs = raw if raw and "prompt" in raw[0] else load_hh(s.args.data)
        missing = [k for k in ("prompt", "chosen", "rejected") if not pairs or k not in pairs[0]]
        if missing:
            raise ValueError(f"--data: rows without {', '.join(missing)}; prompt, chosen, rejected "
                             "or HH transcripts are needed")
        rows = [(ids_of(s.tokenizer, p["prompt"]), ids_of(s.tokenizer, p["chosen"]) + [eos],
                 ids_of(s.tokenizer, p["rejected"]) + [eos]) for p in pairs]
    else:
        rows = own_pairs(s)
    limit = s.model.config.context_length
    fitting = [r for r in rows if r[0] and len(r[0]) + max(len(r[1]), len(r[2])) <= limit]
    if len(fitting) < len(rows):
        say(f"{len(rows) - len(fitting)} pairs skipped: no prompt, or over {limit} tokens")
    if not fitting:
        raise ValueError("no pair left to learn from")
    return fitting


def own_pairs(s):
    """A right and a wrong answer of the model itself to each problem that got both."""
    problems = draw_problems(s.task, s.args.pairs, s.args.seed, 0)
    done, kept = rollout(s, [p for p, _ in problems], s.args.group_size, seed=s.args.seed)
    truths = [problems[i][1] for i in kept for _ in range(s.args.group_size)]
    rewards, _ = safe_rewards(s.task.reward_fn, [d.text for d in done], truths)
    rows = []
    for g in range(0, len(done), s.args.group_size):
        group = list(zip(done[g:g + s.args.group_size], rewards[g:g + s.args.group_size]))
        right = [d for d, r in group if r["reward"] == 1.0]
        wrong = [d for d, r in group if r["reward"] < 1.0]
        rows += [(a.ids[:len(a.ids) - len(a.tokens)], a.tokens, b.tokens)
                 for a, b in list(zip(right, wrong))[:2]]
    say(f"{len(rows)} pairs of own answers to {len(problems)} problems")
    return rows


def preference_step(s, rows, loss_fn):
    """One step on pairs; loss_fn(rows of 2B sequences, chosen first) -> (losses (B,), margins)."""
    total = right = 0.0
    count, = train_py.all_reduce_sum([float(len(rows))], s.device)
    size = max(1, s.args.micro_tokens // (2 * max([len(r[0]) + len(r[1]) for r in rows] or [1])))
    for i in range(0, len(rows), size):
        part = rows[i:i + size]
        losses, margins = loss_fn([(p, c) for p, c, _ in part] + [(p, r) for p, _, r in part])
        (losses.sum() / max(count, 1.0)).backward()
        total, right = total + losses.sum().item(), right + (margins > 0).sum().item()
    norm = optimizer_step(s)
    total, right = train_py.all_reduce_sum([total, right], s.device)
    return total / max(count, 1), right / max(count, 1), norm


def preference_loop(s, rows, loss_fn, evaluate_task=True):
    a = s.args
    a.steps = a.steps or math.ceil(len(rows) * a.epochs / a.batch_size)
    while s.step < a.steps:
        start = time.perf_counter()
        chosen = np.random.default_rng((a.seed, s.step)).choice(
            len(rows), min(a.batch_size, len(rows)), replace=False)
        mine = [rows[i] for i in chosen][train_py.RANK::train_py.WORLD_SIZE]
        loss, margin_accuracy, norm = preference_step(s, mine, loss_fn)
        s.seconds["train"] += time.perf_counter() - start
        accuracy = held_out_accuracy(s) if evaluate_task and s.task and due(s) else None
        log_step(s, loss=loss, margin_accuracy=margin_accuracy, gnorm=norm, accuracy=accuracy)


def dpo(args):
    """Direct preference optimization against a frozen copy of the starting model.

    --nll adds the chosen response's mean -log p: where right and wrong answers share most tokens,
    DPO alone lowers both (Pang et al. 2024, Iterative Reasoning Preference Optimization).
    """
    s = open_session(args)
    reference = reference_model(s)
    s.model, policy_model = reference, s.model  # own answers are the starting model's
    rows, s.model = preference_rows(s), policy_model
    nll = float(not args.data) if args.nll is None else args.nll
    if s.task:
        say(f"held-out accuracy before: {held_out_accuracy(s):.3f}")

    def loss_fn(both):
        ids, labels, mask = on_device(s, both)
        with s.autocast():
            policy = get_response_log_probs(s.model, ids, labels, mask=mask)["log_probs"].sum(1)
            with torch.no_grad():
                ref = get_response_log_probs(reference, ids, labels, mask=mask)["log_probs"].sum(1)
        lengths = mask.sum(1).float().chunk(2)
        losses, margins = dpo_loss(*policy.chunk(2), *ref.chunk(2), args.beta, args.preference,
                                   args.label_smoothing, *lengths)
        return losses - nll * policy.chunk(2)[0] / lengths[0], margins

    preference_loop(s, rows, loss_fn)


def rm(args):
    """A reward model: a linear head on the last token, saved as reward_head.safetensors."""
    s = open_session(args, head=True)
    rows = preference_rows(s)

    def loss_fn(both):
        ids, _, mask = on_device(s, [(p, r + [0]) for p, r in both])  # inputs reach the last token
        with s.autocast():
            values = token_values(s, ids)
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        chosen, rejected = values.gather(1, last[:, None])[:, 0].chunk(2)
        return reward_model_loss(chosen, rejected), chosen - rejected

    preference_loop(s, rows, loss_fn, evaluate_task=False)
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
        train_py.distributed.close_distributed()


if __name__ == "__main__":
    main()
