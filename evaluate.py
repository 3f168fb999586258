"""Evaluate a language model: the numbers lm-evaluation-harness gives, from one file.

    python evaluate.py                                  # scores train.py's checkpoint in ./out
    python evaluate.py --model out --task arc=ARC-Easy-Test.jsonl --task mmlu=data/mmlu
    python evaluate.py --model Qwen2.5-0.5B --task gsm8k=test.jsonl --limit 200 --results a.jsonl
    python evaluate.py --compare a.jsonl b.jsonl        # are two models different? a paired test

Definitions follow lm-evaluation-harness (Gao et al. 2021, github.com/EleutherAI): trailing blanks
of a context belong to the continuation, whose ids are encode(context + continuation) after
len(encode(context)); "<|endoftext|>" in a text is the special token; contexts lose tokens on the
left; log-probabilities are fp32. Shapes: B rows, T tokens, D model width, V vocabulary.
"""

import argparse
import csv
import gzip
import html
import itertools
import json
import math
import operator
import os
import re
import signal
import string
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch

import model as model_py
import tokenizer as tokenizer_py

# ---- the three primitives ----------------------------------------------------------------------


def prefix_id(tok):
    if tok.eot_id is None:
        raise ValueError("the tokenizer has no <|endoftext|> to begin a text with")
    return tok.eot_id


def encode_pair(tok, context, continuation):
    """Ids of a context and of what continues it, cut apart as the harness does.

    encode_pair(tok, "2 + 2 = ", "4") encodes "2 + 2 =" and " 4": tokens carry their blank in front.
    An empty context is one <|endoftext|>, so that the first token has something to follow.
    """
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    if context:
        left = tok.encode(context)
        return left, tok.encode(context + continuation)[len(left):]
    ids = tok.encode(continuation)
    return ([prefix_id(tok)], ids) if ids[:1] != [tok.eot_id] else (ids[:1], ids[1:])


def extend(model, cache, rows, starts, ids):
    """Run ids[i] after the first starts[i] tokens of row rows[i] of a KV cache.

    Returns hidden states (B, T, D), padded on the right, and a cache that holds both.
    """
    past, T = max(starts), max(map(len, ids))
    wider = model_py.KVCache(model, len(ids), past + T)
    if past:
        for new, old in zip(wider.k + wider.v, cache.k + cache.v):
            new[:, :past] = old[rows, :past]
    padded = [[*row, *[0] * (T - len(row))] for row in ids]
    return model.hidden(torch.tensor(padded, device=wider.device), wider, starts), wider


def score_batch(model, groups, cache=None, shared=0):
    """[(context ids, [continuation ids])], of which the cache holds the first `shared` tokens.

    Returns (log-probabilities (T,), is it the likeliest (T,)) of each continuation in turn. What
    the continuations of a context have in common is run once, as is the context: for A, B, C, D

        context 17 5 9, continuations 31 | 32 | 33 | 34    one row 17 5 9, nothing else
        context 17 5 9, continuations 31 8 6 | 31 8 | 40 2    row 17 5 9, then 31 8 and 31 and 40
    """
    stems, flat, branches = [], [], []
    for i, (context, continuations) in enumerate(groups):
        common = os.path.commonprefix([d[:-1] for d in continuations])
        stems.append(context[shared:] + common)
        for d in continuations:
            flat.append((i, len(context) - shared - 1, len(common), d))
            if len(d) - 1 > len(common):
                branches.append((i, shared + len(stems[i]), d[len(common):-1]))
    hidden, cache = extend(model, cache, [0] * len(stems), [shared] * len(stems), stems)
    rest = iter(extend(model, cache, *zip(*branches))[0] if branches else ())
    states = []
    for i, at, k, d in flat:
        states.append(hidden[i, at:at + min(k + 1, len(d))])
        if len(d) - 1 > k:
            states.append(next(rest)[:len(d) - 1 - k])
    targets = torch.tensor([t for *_, d in flat for t in d], device=hidden.device)
    scores, greedy = [], []
    for h, target in zip(torch.cat(states).split(1024), targets.split(1024)):
        logprobs = model.head(h).float().log_softmax(-1)  # (1024 tokens, V)
        scores.append(logprobs.gather(1, target[:, None])[:, 0].double())
        greedy.append(logprobs.argmax(-1) == target)
    lengths = [len(d) for *_, d in flat]
    return zip(torch.cat(scores).cpu().split(lengths), torch.cat(greedy).cpu().split(lengths))


def shared_runs(groups):
    """Groups (context, continuations) in runs whose contexts begin alike: (groups, shared tokens).

    Sixteen tokens that more than three contexts begin with (worked examples) are worth a cache of
    their own. All others are one run that shares nothing; within a run the shortest come first.
    """
    def beginning(group):
        return group[0][:16]

    others = []
    for begin, run in itertools.groupby(sorted(groups, key=beginning), beginning):
        run = sorted(run, key=lambda group: len(group[0]))
        if len(begin) == 16 and len(run) > 3:
            common = len(os.path.commonprefix([context for context, _ in run]))
            yield run, min(common, len(run[0][0]) - 1)
        else:
            others += run
    if others:
        yield sorted(others, key=lambda group: len(group[0])), 0


@torch.inference_mode()
def score_tokens(model, pairs, batch_tokens=512, progress=None):
    """(log-probabilities (T,), is it the likeliest (T,)) of each (context, continuation), in ids.

    Equal pairs are scored once, the beginning that several contexts share (worked examples) once,
    and each context once. What the model has no room for is cut from the context's left. The
    batch size is searched: from batch_tokens on it doubles while tokens a second grow by a tenth,
    and is halved when memory runs out.
    """
    limit, groups = model.config.context_length, {}
    pairs = [(tuple(c), tuple(d[:limit])) for c, d in pairs]
    pairs = [(c[-(limit + 1 - len(d)):], d) for c, d in pairs]
    unique, done = dict.fromkeys(pairs), {}
    for c, d in unique:  # a short context is not worth sharing
        groups.setdefault(c if len(c) > len(d) else (c, d), (c, []))[1].append(d)
    rate, growing = 0.0, True
    for run, shared in shared_runs(groups.values()):
        cache = extend(model, None, [0], [0], [run[0][0][:shared]])[1] if shared else None
        while run:
            sizes = itertools.accumulate(len(c) - shared + sum(map(len, ds)) for c, ds in run)
            fit = list(itertools.takewhile(batch_tokens.__ge__, sizes))
            batch = run[:len(fit) or 1]
            began = time.perf_counter()
            try:
                scores = score_batch(model, batch, cache, shared)
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise ValueError("one item does not fit the GPU's memory") from None
                batch_tokens, growing = fit[-1] // 2, False
                torch.cuda.empty_cache()
                continue
            done |= zip(((c, d) for c, ds in batch for d in ds), scores)
            if growing and len(batch) < len(run) and fit:  # a full batch
                now = fit[-1] / (time.perf_counter() - began)
                growing, rate = now > 1.1 * rate, now
                batch_tokens = batch_tokens * 2 if growing else batch_tokens // 2
            del run[:len(batch)]
            if progress:
                progress(len(done), len(unique))
    return [done[pair] for pair in pairs]


def loglikelihood(model, tokenizer, pairs, **options):
    """[(context, continuation)] -> [(log-probability in nats, is it the greedy choice)]."""
    scores = score_tokens(model, [encode_pair(tokenizer, c, d) for c, d in pairs], **options)
    return [(x.sum().item(), bool(greedy.all())) for x, greedy in scores]


def rolling_windows(ids, prefix, limit):
    """Cut ids into (context, predicted) so that each id is predicted once, with all room used.

    The first window starts from `prefix`; a last short one is preceded by as many ids as fit. For
    limit 4: [0 .. 9] -> (p, 0123), (3, 4567), (567, 89).
    """
    windows = [([prefix], ids[:limit])] if ids else []
    for start in range(limit, len(ids), limit):
        end = min(start + limit, len(ids))
        windows.append((ids[end - limit - 1:start], ids[start:end]))
    return windows


def loglikelihood_rolling(model, tokenizer, texts, **options):
    """Whole texts -> [log-probability in nats of every token of each]."""
    windows = [rolling_windows(tokenizer.encode(text), prefix_id(tokenizer),
                               model.config.context_length) for text in texts]
    scores = iter(score_tokens(model, itertools.chain(*windows), **options))
    return [sum(x.sum().item() for x, _ in itertools.islice(scores, len(w))) for w in windows]


def generate_until(model, tokenizer, requests, max_new_tokens=256, progress=None, **options):
    """[(context, stop strings)] -> texts, greedy by default, cut before the first stop string."""
    room, texts = model.config.context_length - max_new_tokens, {}
    if room < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: leaves no room for a prompt in a "
                         f"context of {model.config.context_length}")
    for until in dict.fromkeys(tuple(until) for _, until in requests):
        numbers = [i for i, (_, strings) in enumerate(requests) if tuple(strings) == until]
        prompts = [tokenizer.encode(requests[i][0])[-room:] or [prefix_id(tokenizer)]
                   for i in numbers]
        stop = [*until, *([tokenizer.eot_id] if tokenizer.eot_id is not None else [])]
        settings = {"temperature": 0.0, "stop": stop, "tokenizer": tokenizer} | options
        for row, _ in model.stream(prompts, max_new_tokens, **settings):
            if row.reason:  # it has ended
                text = tokenizer.decode([t for t in row.tokens if t != tokenizer.eot_id])
                ends = [text.find(s) for s in until if s in text]
                texts[numbers[row.prompt]] = text[:min(ends, default=len(text))]
                if progress:
                    progress(len(texts), len(requests))
    return [texts[i] for i in range(len(requests))]


# ---- metrics -----------------------------------------------------------------------------------


def standard_error(values):
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def confidence_interval(values, samples=2000, seed=0):
    """(low, high), 95 %, of the mean.

    Of zeros and ones Wilson's (1927), right for few values and shares near 0 and 1. Others get
    bootstrap-t (Efron & Tibshirani 1993): each resample's error divided by its own standard error
    keeps the promised coverage for skewed values, where plain percentiles are too narrow.
    """
    x = np.asarray(values, float)
    if len(x) < 2:
        return math.nan, math.nan
    if np.isin(x, (0, 1)).all():
        p, width = x.mean(), 1.96 ** 2 / len(x)
        half = math.sqrt(width * p * (1 - p) + width * width / 4)
        return (p + width / 2 - half) / (1 + width), (p + width / 2 + half) / (1 + width)
    rng, t = np.random.default_rng(seed), []
    for _ in range(samples):
        s = x[rng.integers(0, len(x), len(x))]
        t.append((s.mean() - x.mean()) / (standard_error(s) or math.inf))
    low, high = np.percentile(t, [2.5, 97.5])
    return x.mean() - high * standard_error(x), x.mean() - low * standard_error(x)


def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them right, hold a right one (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def calibration_error(confidences, correct, bins=10):
    """Expected calibration error: mean |accuracy - confidence| over equal bins of confidence."""
    confidences = np.asarray(confidences, float)
    which = np.minimum((confidences * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(which, correct - confidences)).sum() / len(confidences))


def paired_test(a, b, samples=10_000, seed=0):
    """(mean of b - a, two-sided p) by flipping the signs of the items' differences at random."""
    d = np.asarray(b, float) - np.asarray(a, float)
    rng, extreme = np.random.default_rng(seed), 0
    for _ in range(samples // 100):  # a hundred at once: all would not fit in memory
        sums = rng.choice([-1.0, 1.0], (100, len(d))) @ d
        extreme += (np.abs(sums) >= abs(d.sum()) - 1e-12).sum()
    return float(d.mean()), float((extreme + 1) / (samples // 100 * 100 + 1))


# ---- tasks: a row of a public data set's file -> an Item -----------------------------------------


@dataclass
class Item:
    """One question. choices: multiple choice; without: free text, or a whole text to score."""

    context: str
    gold: object = None  # index of the right choice, or the right answer
    choices: list = field(default_factory=list)  # continuations, without the blank in front
    contexts: list = None  # where every choice has its own (Winogrande)
    delimiter: str = " "
    group: str = ""  # subject
    until: tuple = ()
    extra: dict = field(default_factory=dict)
    shot: str = ""  # the answer that it shows as a worked example, if not the right choice

    def requests(self):
        """(context, continuation) of each choice."""
        contexts = self.contexts or [self.context] * len(self.choices)
        return [(c, self.delimiter + d) for c, d in zip(contexts, self.choices)]

    def reword(self, change):
        self.context = change(self.context)
        self.contexts = self.contexts and list(map(change, self.contexts))


def rows_of(path):
    """The rows, dicts, of a .jsonl, .json or .csv file, also .gz, or of a folder of them."""
    for file in tokenizer_py.list_files(path):
        kind, opened = file.removesuffix(".gz"), gzip.open if file.endswith(".gz") else open
        try:
            with opened(file, "rt", encoding="utf-8", newline="") as lines:
                if kind.endswith(".json"):
                    yield from json.load(lines)
                elif kind.endswith(".csv"):
                    yield from csv.DictReader(lines)
                else:
                    yield from map(json.loads, filter(str.strip, lines))
        except (ValueError, EOFError, csv.Error, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file}: {error}") from None


def mmlu_rows(path):
    """A folder with test/*_test.csv (and dev/*_dev.csv), which have no header."""
    for file in sorted(Path(path).glob("test/*.csv")) or sorted(Path(path).glob("*.csv")):
        subject = re.sub(r"_(test|val|dev)$", "", file.stem).replace("_", " ")
        for i, row in enumerate(csv.reader(open(file, encoding="utf-8", newline="")), 1):
            if len(row) != 6 or row[5] not in list("ABCD"):
                raise ValueError(f"{file}: row {i} has {len(row)} columns, not a question, "
                                 "four choices and a letter")
            question = "{}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:".format(row[0].strip(), *row[1:5])
            yield dict(question=question, answer=row[5], subject=subject)


def arc(row):
    """ARC easy and challenge, as AI2 gives them or flattened as on the hub."""
    answer, question, choices = row["answerKey"], row["question"], row.get("choices")
    if isinstance(question, dict):
        choices = {k: [c[k] for c in question["choices"]] for k in ("text", "label")}
        question = question["stem"]
    return Item(f"Question: {question}\nAnswer:", choices["label"].index(answer), choices["text"])


def hellaswag(row):
    def tidy(text):
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item(tidy(context), int(row["label"]), list(map(tidy, row["endings"])))


def winogrande(row):
    """The blank is filled in two ways; what follows it is scored (Trinh & Le 2018)."""
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return Item("", int(row["answer"]) - 1, [after.strip()] * 2, contexts)


WIKITEXT = (  # what WikiText's tokenizer did, and what undoes it, in the harness's order
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"), (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"),
    ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))


def wikitext(document):
    """"the valley ( 1 @,@ 000 m )" is scored as "the valley (1,000 m)"; words and bytes count as
    in the file."""
    text = document
    for old, new in WIKITEXT:
        text = re.sub(old, new, text) if "\\s" in old else text.replace(old, new)
    return Item(text, extra={"file": document})


def gsm8k(row):
    return Item(f"Question: {row['question']}\nAnswer:", row["answer"].split("####")[-1].strip(),
                until=("Question:", "</s>", "<|im_end|>"), shot=row["answer"])


def judge_gsm8k(item, text):
    """Strict: the number after ####; flexible: the last number; as the harness finds them."""
    strict = re.findall(r"#### (\-?[0-9\.\,]+)", text)[:1]
    flexible = ["".join(m) for m in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)][-1:]

    def tidy(number):
        return re.sub(r"[,$]", "", number).removesuffix(".")

    return {name: float(any(tidy(number) == tidy(item.gold) for number in found))
            for name, found in (("strict", strict), ("flexible", flexible))}


def parse_mmlu_response(choices, response):
    """The letter a model chose, or None: the course's "The correct answer is _" prompt."""
    m = re.search(r"correct answer is:? *\(?([A-D])\b", response) or re.search(
        r"(?:^|\s)\(?([A-D])\)?(?:[.:,\s]|$)", response)
    return m.group(1) if m else None


def parse_gsm8k_response(response):
    """The last number of a response as a string, without commas; None without one."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", response)
    return numbers[-1].replace(",", "") if numbers else None


def judge_parsed(item, answer):
    return dict(correct=float(grade(answer, item.gold)), parsed=float(answer is not None))


# ---- scoring a task: results are dicts, whose "metrics" are averaged -----------------------------


def score_choices(model, tok, items, args):
    """Log-probability of every choice; by four norms the likeliest is the answer."""
    pairs = [encode_pair(tok, *request) for i in items for request in i.requests()]
    scores = iter(zip(pairs, score_tokens(model, pairs, progress=args.progress)))
    results = []
    for item in items:
        mine = list(itertools.islice(scores, len(item.choices)))
        ll = np.array([x.sum().item() for _, (x, _) in mine])
        norms = {"acc": 1, "acc_norm": [len(c) for c in item.choices],
                 "acc_bytes": [len(c.encode()) for c in item.choices],
                 "acc_tokens": [len(d) for (_, d), _ in mine]}
        p = np.exp(ll - ll.max())
        results.append(dict(
            metrics={name: float(np.argmax(ll / np.maximum(n, 1)) == item.gold)
                     for name, n in norms.items()},
            confidence=float(p.max() / p.sum()), loglikelihoods=ll.tolist(),
            output=item.choices[int(ll.argmax())], gold=item.choices[item.gold]))
    return results


def score_last(model, tok, items, args):
    """LAMBADA: is the last word the greedy continuation, and how likely is it."""
    scores = loglikelihood(model, tok, [i.requests()[0] for i in items], progress=args.progress)
    return [dict(metrics=dict(acc=float(greedy)), loglikelihood=s, gold=i.choices[0])
            for i, (s, greedy) in zip(items, scores)]


def score_rolling(model, tok, items, args):
    totals = loglikelihood_rolling(model, tok, [i.context for i in items], progress=args.progress)
    return [dict(metrics={}, loglikelihood=s, tokens=len(tok.encode(item.context)),
                 words=len(re.split(r"\s+", item.extra["file"])),
                 bytes=len(item.extra["file"].encode())) for item, s in zip(items, totals)]


def score_written(model, tok, items, args, judge):
    """Answers written by the model: judge(item, text) -> metrics, averaged over --samples."""
    n, requests = args.samples, [(i.context, i.until) for i in items for _ in range(args.samples)]
    texts = generate_until(model, tok, requests, args.max_new_tokens, args.progress,
                           temperature=0.0 if n == 1 else 0.8)
    results = []
    for k, item in enumerate(items):
        mine = texts[k * n:k * n + n]
        each = [judge(item, text) for text in mine]
        metrics = {name: sum(m[name] for m in each) / n for name in each[0]}
        right = sum(next(iter(m.values())) == 1.0 for m in each)
        metrics |= {f"pass@{j}": pass_at_k(n, right, j) for j in (10, 100) if j <= n}
        results.append(dict(metrics=metrics, output=mine[0], outputs=mine, gold=item.gold))
    return results


@dataclass
class Task:
    item: object  # row -> Item
    metric: str  # the one to look at
    score: object = score_choices  # (model, tok, items, args) -> results
    judge: object = None  # (item, text) -> metrics of what the model wrote, instead of score
    rows: object = rows_of  # path -> rows


TASKS = {  # _zero: the course's zero-shot baselines, where the answer is written, then parsed
    "mmlu": Task(lambda row: Item(row["question"], "ABCD".index(row["answer"]), list("ABCD"),
                                  group=row["subject"]), "acc", rows=mmlu_rows),
    "mmlu_zero": Task(
        lambda row: Item("Answer the following multiple choice question about {subject}. Respond "
                         'with a single sentence of the form "The correct answer is _", filling '
                         "the blank with the letter of the correct answer (i.e., A, B, C or D).\n\n"
                         "Question: {question}".format(**row), row["answer"],
                         until=("# Query:", "\n\n")),
        "correct", rows=mmlu_rows,
        judge=lambda item, text: judge_parsed(item, parse_mmlu_response((), text))),
    "arc": Task(arc, "acc_norm"),
    "hellaswag": Task(hellaswag, "acc_norm"),
    "piqa": Task(lambda row: Item(f"Question: {row['goal']}\nAnswer:", int(row["label"]),
                                  [row["sol1"], row["sol2"]]), "acc_norm"),
    "winogrande": Task(winogrande, "acc"),
    "lambada": Task(lambda row: Item(row["text"].rsplit(" ", 1)[0], 0,
                                     [row["text"].rsplit(" ", 1)[1]]), "acc", score_last),
    "wikitext": Task(wikitext, "bits_per_byte", score_rolling, rows=tokenizer_py.read_documents),
    "gsm8k": Task(gsm8k, "strict", judge=judge_gsm8k),
    "gsm8k_zero": Task(
        lambda row: replace(gsm8k(row), context=f"{row['question']}\nAnswer:", until=("# Query:",)),
        "correct", judge=lambda item, text: judge_parsed(item, parse_gsm8k_response(text))),
    "math": Task(
        lambda row: Item(f"Problem:\n{row['problem']}\n\nSolution:", extract_boxed(row["solution"]),
                         until=("Problem:",), shot=row["solution"]), "correct",
        judge=lambda item, text: dict(
            correct=float(grade(extract_boxed(text) or text.strip(), item.gold)))),
    "humaneval": Task(
        lambda row: Item(row["prompt"], until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
                         extra=dict(before=row["prompt"],
                                    after=f"\n{row['test']}\ncheck({row['entry_point']})")),
        "pass@1", judge=lambda item, text: {"pass@1": float(
            run_program(item.extra["before"] + text + item.extra["after"])[0])}),
    "instructions": Task(  # AlpacaEval and SimpleSafetyTests, for a judge to read
        lambda row: Item(row["instruction" if "instruction" in row else "prompts_final"],
                         until=("# Query:",), extra=row),
        "length", judge=lambda item, text: dict(length=float(len(text)))),
}


def read_items(name, path, limit=None):
    """A task's items; what a row lacks, or cannot be, is a ValueError that names it."""
    items, task = [], TASKS[name]
    for i, row in enumerate(itertools.islice(task.rows(path), limit or None), 1):
        try:
            item = task.item(row)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: item {i} is none of {name}, {error!r}: {str(row)[:200]}"
                             ) from None
        if item.choices and item.gold not in range(len(item.choices)):
            raise ValueError(f"{path}: item {i} has {len(item.choices)} choices, of which number "
                             f"{item.gold + 1} should be right")
        items.append(item)
    if not items:
        raise ValueError(f"{path}: no items of {name} in it")
    return items


def add_shots(items, shots, count=None):
    """Put `count` worked examples of its subject, and for MMLU a heading, before every context."""
    for item in items:
        before = ("The following are multiple choice questions (with answers) about "
                  f"{item.group}.\n\n" if item.group else "")
        for s in [s for s in shots if s.group == item.group][:count]:
            if not s.shot and not s.choices:
                raise ValueError("--few-shot: worked examples of this task have no answers to show")
            context = s.contexts[s.gold] if s.contexts else s.context
            before += context + s.delimiter + (s.shot or s.choices[s.gold]) + "\n\n"
        item.reword(before.__add__)


def summarise(results):
    """{metric: (value, standard error, low, high)} of a task's results."""
    table = {}
    for name in results[0]["metrics"]:
        values = [r["metrics"][name] for r in results]
        table[name] = np.mean(values), standard_error(values), *confidence_interval(values)
    if "confidence" in results[0]:
        ece = calibration_error([r["confidence"] for r in results],
                                [r["metrics"]["acc"] for r in results])
        table["ece"] = ece, math.nan, math.nan, math.nan
    units = [u for u in ("tokens", "words", "bytes") if u in results[0]] or ["items"]
    for unit in units if "loglikelihood" in results[0] else ():
        nats = -np.array([r["loglikelihood"] for r in results])
        n = np.array([r.get(unit, 1) for r in results])
        rate = nats.sum() / n.sum()  # a ratio of sums: its error is that of nats - rate n
        errors = (nats - rate * n) / n.mean()
        nats_each, se = rate + np.array([0, *confidence_interval(errors)]), standard_error(errors)
        value, low, high = np.exp(np.minimum(nats_each, 700)).tolist()
        table[f"{unit[:-1]}_perplexity"] = value, value * se, low, high
        if unit == "bytes":
            bits, low, high = nats_each / math.log(2)
            table["bits_per_byte"] = bits, se / math.log(2), low, high
    return table


# ---- the grader --------------------------------------------------------------------------------

MAX_CHARS, MAX_TOKENS, MAX_BITS = 500, 120, 4000  # they bound the time of every answer
PLAIN = {spelling: plain for plain, spellings in (  # one spelling of every sign
    (" ", r"\left \right \big \Big \bigg \displaystyle \quad \qquad \ldots \! \, \: \; ~"),
    ("*", r"\cdot \times × ·"), ("/", r"\div ÷"), ("-", "− – —"), ("±", r"\pm"), ("^", "**"),
    ("^2", "²"), ("^3", "³"), ("\\sqrt", "√"), ("\\frac", r"\dfrac \tfrac \cfrac"), (",", "{,}"),
    ("<", r"\lt"), (">", r"\gt"), ("≤", r"\le \leq \leqslant <="), ("≥", r"\ge \geq \geqslant >="),
    (" in ", r"\in \colon ∈"), ("∪", r"\cup"), ("inf", r"\infty ∞"), (" pi ", r"\pi π"),
    ("⟨", r"\{"), ("⟩", r"\}"), ("%", r"\%"), ("$", r"\$"), (" degree ", r"\degree °"))
    for spelling in spellings.split()} | {"\\ ": " "}
LATEX = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\^\s*\{?\s*\\circ\s*\}?", " degree "), (r"^\s*(-?)\s*\$\s*(.*)$", r"\1\2 dollar"),
    (r"\$", " dollar "), (r"\+\s*inf\b", "inf"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\?\bsqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"\\?\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\d.^/)}])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", r"\1 \2/\3"),  # mixed numbers
    (r"(?<![\d.^/)}])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"(\1+\2/\3)"))]
BRACES = [(re.compile(pattern), plain) for pattern, plain in (  # inner ones first, repeatedly
    (r"\\(?:text|mathrm|mathbf|textbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\sqrt\s*\[([^][{}]*)\]\s*\{([^{}]*)\}", r"((\2)^(1/(\1)))"),
    (r"\\sqrt\s*\{([^{}]*)\}", r"((\1)^(1/2))"), (r"\^\s*\{([^{}]*)\}", r"^(\1)"),
    (r"_\s*\{([^{}]*)\}", r"_\1"))]
WORDS = [(re.compile(pattern, re.I), plain) for pattern, plain in (
    (r"(?<![a-z])(?:square|sq) ([a-z]+)", r"\1^2"), (r"(?<![a-z])cubic ([a-z]+)", r"\1^3"),
    *((rf"(?<=\d)\s*{word}s?\b", f"*{times}") for word, times in (
        ("dozen", 12), ("hundred", 100), ("thousand", 10**3), ("million", 10**6),
        ("billion", 10**9), ("trillion", 10**12))))]


def extract_boxed(text):
    """What the last \\boxed{...} of a text holds, braces balanced; None without one."""
    start, depth = text.rfind("\\boxed{"), 0
    for brace in re.finditer(r"[{}]", text[start:]) if start >= 0 else ():
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{"):start + brace.start()]
    return None


def clean(text):
    """LaTeX and typography to plain characters: "\\frac{1}{2}^\\circ" -> "((1)/(2)) degree"."""
    def matrix(match):  # 1 & 2 \\ 3 & 4 -> [(1,2),(3,4)]
        rows = match.group(1).replace("&", ",").strip(" \\").split("\\\\")
        return "[" + ",".join(f"({row})" for row in rows) + "]"

    text, before = extract_boxed(text) or text, ""
    text = re.sub(r"\\begin ?\{.?(?:matrix|array)\}(?:\{[clr|]*\})?(.*?)"
                  r"\\end ?\{.?(?:matrix|array)\}", matrix, text, flags=re.S)
    text = re.sub(r"\\[A-Za-z]+|\\.|\{,\}|\*\*|[<>]=|.",
                  lambda m: PLAIN.get(m.group(), m.group()), text)
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    while text != before and len(text) < 4 * MAX_CHARS:
        before = text
        for pattern, plain in BRACES:
            text = pattern.sub(plain, text)
    text = " ".join(text.split()).rstrip(".").strip()
    for pattern, plain in WORDS:
        text = pattern.sub(plain, text)
    return text


def bits(value):
    return max(part.bit_length() for part in value.as_integer_ratio())


def power(base, exponent):
    """base ^ exponent; odd roots of negative numbers are real: (-8)^(1/3) = -2."""
    if isinstance(base, Fraction) and bits(base) * abs(exponent) > MAX_BITS:
        raise OverflowError("too large")
    if base < 0 and exponent.denominator % 2:
        return (-1) ** (exponent.numerator % 2) * (-base) ** exponent
    return base ** exponent


# sign: how tightly it binds, what its right side may hold (2^3^2 = 2^9), what it does
OPERATORS = {")": (0, 0, None), "+": (1, 1, operator.add), "-": (1, 1, operator.sub),
             "*": (2, 2, operator.mul), "/": (2, 2, operator.truediv), "^": (4, 3, power)}
POINTS = [{c: Fraction(ord(c) * k % 1009 % 89 + 7, 13) for c in string.ascii_letters} |
          {"pi": math.pi} for k in (131, 457, 769)]


def value_of(tokens, letters, level=0):
    """The value of the expression that a list of tokens (the next one last) begins with.

    It ends before a sign that binds no tighter than level. Exact, a Fraction, until a root or pi.
    """
    token = tokens.pop()
    if token in ("+", "-"):  # -x^2 is -(x^2)
        value = value_of(tokens, letters, 3)
        value = -value if token == "-" else value
    elif token in ("(", "~("):
        value = value_of(tokens, letters)
        if tokens.pop() != ")":
            raise ValueError("a bracket is not closed")
        value = abs(value) if token == "~(" else value
    else:
        value = letters[token] if token in letters else Fraction(token)
    while tokens and OPERATORS[tokens[-1]][0] > level:
        _, right, apply = OPERATORS[tokens.pop()]
        value = apply(value, value_of(tokens, letters, right))
        if bits(value) > MAX_BITS:
            raise OverflowError("too large")
    return value


def evaluate_at(text):
    """The values of an expression at three points, where its letters stand for fixed fractions.

    So two polynomials are the same if their values are. 2x|y| is 2 * x * |y|, but neither 4 5 nor
    x 5 is a product. ValueError if it is no expression.
    """
    text = re.sub(r"(?<![\d.])\d\d?!", lambda m: str(math.factorial(int(m.group()[:-1]))), text)
    text = text.translate(str.maketrans("{}[]", "()()"))
    found = re.findall(r"\d+\.?\d*(?:[eE][+-]?\d{1,3}(?![A-Za-z\d]))?|\.\d+|"  # numbers
                       r"[abcxyz](?=[abcxyz]{0,2}(?![A-Za-z]))|[A-Za-z]+|"  # names
                       r"~\(|\S", re.sub(r"\|([^|]*)\|", r"~(\1)", text))  # signs; |x| is ~(x)
    if len(found) > MAX_TOKENS:
        raise ValueError("too long")
    tokens = []
    for token in found:
        if tokens and tokens[-1] not in "+-*/^~(" and token not in "+-*/^)":
            if tokens[-1] != ")" and re.match(r"[\d.]", token):
                raise ValueError(f"no expression: {text}")
            tokens.append("*")
        tokens.append(token)
    values = []
    try:
        for point in POINTS:
            rest = tokens[::-1]
            values.append(value_of(rest, point))
            if rest:
                raise ValueError("a bracket too many")
    except (ArithmeticError, LookupError, AttributeError):
        raise ValueError(f"no expression: {text}") from None
    return values


UNITS = {name: names.split()[0] for names in (
    "m meter metre", "cm centimeter", "mm millimeter", "km kilometer", "ft foot feet", "mi mile",
    "in inch inche", "s second sec", "min minute", "h hour hr", "am", "pm", "g gram",
    "mg milligram", "kg kilogram", "lb pound", "oz ounce", "l liter litre", "ml milliliter",
    "degree deg", "dollar usd buck", "% percent") for name in names.split()}


def split_unit(text):
    """"12.5 square cm" -> ("12.5", "cm^2"); "x + 2" -> ("x + 2", "")."""
    def name(match):
        word = match.group()
        word = word[:-1] if len(word) > 2 and word[-1] == "s" else word
        return UNITS.get(word, word)

    m = re.fullmatch(r"(.*(?:[\d)!.]|\bpi)) ?(%|[A-Za-z]+"
                     r"(?: ?(?:/|per\b|\^) ?\(?[A-Za-z\d]+\)?| [A-Za-z]{2,})*)", text)
    unit = m.group(2).lower() if m else ""
    first = re.match("%|[a-z]*", unit).group()
    if first in ("", "sqrt", "inf", "and") or len(first) < 3 and first not in UNITS:
        return text, ""
    return m.group(1), re.sub(r"[a-z]+", name, re.sub(r"[() ]", "", unit.replace(" per ", "/")))


def split_top(text):
    """Split at the commas that are outside every bracket."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{⟨") - (c in ")]}⟩")
        if c == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += c
    if len(parts) > 30:
        raise ValueError("too long")
    return parts


def structure(text, depth=0):
    """A cleaned answer as (kind, parts): what two ways of writing the same thing share.

    "(1, 0.5]" -> ("(]", [number 1, number 1/2]); "{2, 1}" -> ("set", [...]); what has no parts
    is an "equation", a "number" with its unit, or else a "text".
    """
    if depth > 4:
        raise ValueError("too deep")
    text = re.sub(r"^[a-z] in ", "", text.strip())
    if re.search("[>≥]", text):  # x > 3 is 3 < x
        text = "".join(reversed(re.split("([>≥])", text))).translate(str.maketrans(">≥", "<≤"))
    inequality = re.fullmatch(r"(?:([^<≤]+)([<≤]))? ?[a-z] ?(?:([<≤])([^<≤]+))?", text)
    inner = split_top(text[1:-1])
    plain = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])",  # 1,000 is 1000
                   lambda m: m.group().replace(",", ""), text)
    listed = split_top(re.sub(r",? and ", ",", plain))
    if inequality and len(text) > 1:  # 2 < x ≤ 5 is (2, 5]
        low, opening, closing, high = inequality.groups()
        kind = ("[" if opening == "≤" else "(") + ("]" if closing == "≤" else ")")
        parts = [low or "-inf", high or "inf"]
    elif "∪" in text:
        kind, parts = "union", split_top(text.replace("∪", ","))
    elif len(inner) > 1 and re.fullmatch(r"[(\[].*[)\]]", text):
        kind, parts = text[0] + text[-1], inner
    elif re.fullmatch(r"⟨.*⟩|\{.*,.*\}", text):
        kind, parts = "set", inner
    elif choice := re.fullmatch(r"\(?([A-Z])(?:[.:)]+(?: .*)?)?", text):
        return "text", choice.group(1).casefold()
    elif len(listed) > 1:
        kind, parts = "list", listed
    elif "±" in text:
        kind, parts = "list", [text.replace("±", sign, 1) for sign in "+-"]
    elif plain.count("=") == 1:
        named = re.fullmatch(r"\\?[A-Za-z]\w* ?(?:\([a-z]\))? ?=(.*)", plain)
        right = structure(named.group(1), depth + 1) if named else ("text", plain)
        return "equation", (plain, right)
    else:
        try:
            value, unit = split_unit(plain)
            return "number", (evaluate_at(value), unit)
        except ValueError:
            return "text", text.casefold()
    return kind, [structure(p, depth + 1) for p in parts]


def same_values(v, w):
    """Exactly if both are exact, else to 1e-9 of their size."""
    return all(x == y if isinstance(x, Fraction) and isinstance(y, Fraction) else
               math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-18) for x, y in zip(v, w))


def same(a, b):
    """Whether two structures mean the same; x = 5 is also 5, but not y = 5."""
    (kind, x), (other, y) = a, b
    if kind == other == "equation":
        (name, value), (named, _) = (text.split("=") for text in (x[0], y[0]))
        alike = name.strip() == named.strip() or re.search("[a-z]", value)  # f(x) = 2x is y = 2x
        if alike and same(x[1], y[1]):
            return True
        # left minus right of one is a multiple of that of the other, the same at every point
        v, w = ([p - q for p, q in zip(*map(evaluate_at, text.split("=")))] for text, _ in (x, y))
        return all(v) and all(w) and same_values([v[0] * q for q in w], [w[0] * p for p in v])
    if "equation" in (kind, other):
        return same(x[1], b) if kind == "equation" else same(a, y[1])
    if kind != other or kind == "text":
        return a == b
    if kind == "number":  # a unit may lack on one side; 50% is 50, and 0.5 too
        if x[1] and y[1] and x[1] != y[1]:
            return False
        shares = ([v / 100 for v in values] if unit == "%" else values for values, unit in (x, y))
        return same_values(x[0], y[0]) or same_values(*shares)
    if len(x) != len(y) or kind not in ("set", "list", "union"):  # the others have an order
        return len(x) == len(y) and all(map(same, x, y))
    left = list(y)
    for part in x:
        match = next((q for q in left if same(part, q)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def grade(given, gold):
    """Whether an answer means the same as the gold one; never raises, never evaluates code.

    Exact fractions, decimals, percent, money, units, degrees, mixed and scientific numbers, pi and
    roots, sets, tuples, intervals and inequalities, matrices, polynomials, equations, text choices.
    Two different units are wrong and hedged answers ("9 or 10") too. A unit on one side only is
    right, since the question often gives it: 12 apples is 12, $5 is 5. So 50% is 50 (of "what
    percent?") and, because that is what it means, 0.5. Both are strings (or None, which is wrong).

        grade("0.50", "\\\\frac{1}{2}") -> True     grade("x > 3", "(3, \\\\infty)") -> True
    """
    if not (given or "").strip() or gold is None:
        return False
    if given.strip().casefold() == gold.strip().casefold():
        return True
    if max(len(given), len(gold)) > MAX_CHARS or re.search(
            r"\b(?:or|either|maybe|approximately|about|roughly)\b", given, re.I):
        return False
    try:
        a, b = clean(given), clean(gold)
        return a != "" and (a.casefold() == b.casefold() or same(structure(a), structure(b)))
    except (ValueError, ArithmeticError, RecursionError):
        return False


# ---- running what a model wrote ----------------------------------------------------------------

GUARD = '''
import ctypes, os, resource, sys
seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
for name, value in (("CPU", seconds + 1), ("AS", megabytes << 20), ("FSIZE", 16 << 20),
                    ("NOFILE", 64), ("CORE", 0), ("NPROC", 64)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
try:  # no network, where the kernel allows it
    ctypes.CDLL(None).unshare(0x40000000 | 0x10000000)
except (OSError, AttributeError):
    pass
home = os.path.realpath(os.getcwd()) + os.sep
def guard(event, args):
    if event.startswith(("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn",
                         "os.system", "os.kill", "ctypes.", "pty.")):
        raise PermissionError("not allowed here: " + event)
    if event in ("os.remove", "os.rmdir", "os.rename", "os.mkdir", "os.chmod", "os.chown",
                 "os.link", "os.symlink", "os.truncate", "shutil.rmtree") or (
            event == "open" and isinstance(args[0], (str, bytes)) and
            args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        if not (os.path.realpath(os.fsdecode(args[0])) + os.sep).startswith(home):
            raise PermissionError("not allowed here: changing " + os.fsdecode(args[0]))
program = compile(open("program.py", encoding="utf-8").read(), "program.py", "exec")
kept, sys.modules["__main__"] = sys.modules["__main__"], type(sys)("__main__")
sys.addaudithook(guard)
exec(program, sys.modules["__main__"].__dict__)  # whose names are not the guard's
raise SystemExit(77)  # it ran to its end: an exit(0) before the tests is no success
'''


def run_program(source, seconds=5, megabytes=1024):
    """Run a Python program that nobody has read: (whether it ended well, its last words).

    A process of its own in an empty folder, with limits on CPU time, memory, file size and open
    files, without the network where the kernel lets us, and with an audit hook (PEP 578) that
    refuses sockets, other processes, and writing elsewhere. That stops accidents and lazy attacks.
    It is no jail: run models you distrust in a container or a virtual machine.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        (Path(folder) / "program.py").write_text(source, encoding="utf-8")
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GUARD, str(seconds), str(megabytes)], cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=errors)  # a file, whose size is limited, unlike a pipe's
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False, f"more than {seconds} seconds"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        errors.seek(0)
        words = errors.read().decode(errors="replace").strip().splitlines()
        return code == 77, (words or [f"exit code {code}"])[-1][:200]


# ---- train.py's own checkpoint: against chance and an n-gram model -----------------------------


def ngrams(ids, n, base):
    """Every n-gram of ids as one integer, its ids the digits to a base, modulo 2^64."""
    ids = np.asarray(ids, np.int64)
    grams = np.zeros(max(0, len(ids) - n + 1), np.int64)
    for j in range(n):
        grams = grams * base + ids[j:len(grams) + j]
    return grams


class NGram:
    """Trigram model of token ids, interpolated down to uniform (Witten & Bell 1991).

    P(c | h) = (count(h c) + kinds(h) P(c | shorter h)) / (count(h) + kinds(h)), where kinds(h) is
    how many different tokens followed h. To base V the n-grams that begin with h are neighbours
    in a sorted array.
    """

    def __init__(self, ids, vocab_size):
        self.V, self.tables = vocab_size, []
        for n in (1, 2, 3):
            grams, counts = np.unique(ngrams(ids, n, vocab_size), return_counts=True)
            by_count = grams[np.lexsort((counts, grams // vocab_size))]  # within each history
            self.tables.append((grams, np.append(0, counts.cumsum()), by_count % vocab_size))

    def score(self, ids):
        """(log-probability, is it the likeliest) of every id but the first two."""
        p, guess = np.full(len(ids) - 2, 1 / self.V), np.full(len(ids) - 2, -1)
        for n, (grams, before, by_count) in enumerate(self.tables, 1):
            gram = ngrams(ids, n, self.V)[3 - n:]
            history = gram // self.V * self.V
            first, end, at, after = (np.searchsorted(grams, g) for g in (
                history, history + self.V, gram, gram + 1))
            kinds, total = end - first, before[end] - before[first]
            count = before[after] - before[at]
            p = np.where(kinds, (count + kinds * p) / np.maximum(total + kinds, 1), p)
            guess = np.where(kinds, by_count[end - 1], guess)
        return np.log(p), guess == np.asarray(ids)[2:]


def ngram_overlap(ids, train, n=13):
    """Share of the n-grams of ids that also occur in train: contamination, or common phrases."""
    base = 0x5851F42D4C957F2D  # odd and large: grams modulo 2^64 are as good as different
    wanted = ngrams(ids, n, base)
    found = np.zeros(len(wanted), bool)
    for i in range(0, len(train), 1 << 22):
        found |= np.isin(wanted, ngrams(train[i:i + (1 << 22) + n - 1], n, base))
    return float(found.mean()) if len(found) else 0.0


def verbatim_rate(model, train, count, seed=0):
    """Share of training windows whose next 32 tokens the model writes greedily, exactly."""
    length = min(32, model.config.context_length // 2 - 1)
    starts = np.random.default_rng(seed).integers(0, len(train) - 2 * length, count)
    prompts = [train[s:s + length].tolist() for s in starts]
    done = model.generate(prompts, length, temperature=0.0)
    return float(np.mean([c.tokens == train[s + length:s + 2 * length].tolist()
                          for c, s in zip(done, starts)]))


def data_name(folder):
    """What train.py called the data of a checkpoint, or of the one that align.py started from."""
    state = Path(folder) / "train_state.pt"
    if not state.exists():
        raise ValueError(f"{state}: not there, and it names the validation text; give --task "
                         "NAME=FILE")
    settings = torch.load(state, weights_only=True, mmap=True)["settings"]
    return settings.get("data_name") or data_name(settings.get("model") or "")


def evaluate_checkpoint(model, tok, args):
    """Bits per byte, next-token accuracy and choosing the true continuation, on held-out text."""
    T, V, folder = model.config.context_length, tok.vocab_size, Path(args.cache)
    train, val = (np.load(folder / data_name(args.model) / f"{split}.npy", mmap_mode="r")
                  for split in ("train", "val"))
    val = np.asarray(val[:args.limit * T + 1] if args.limit else val)
    special = tok.special_tokens.values()
    lengths = np.array([0 if i in special else len(tok.vocab.get(i, b"")) for i in range(V)])
    say(f"model       {args.model}: {model.num_parameters() / 1e6:.2f}M parameters\n"
        f"text        {len(val):,} validation tokens, {lengths[val].sum():,} bytes")
    ngram = NGram(train[:20_000_000], V)

    def score(pairs):
        progress = partial(show_progress, "scoring", time.time())
        return spread(partial(score_tokens, model, progress=progress), pairs)

    windows = score([(val[s:s + 1].tolist(), val[s + 1:s + T + 1].tolist())
                     for s in range(0, len(val) - T, T)])
    logprobs, hits = (torch.stack(x).double().numpy() for x in zip(*windows))  # (windows, T)
    ngram_logprobs, ngram_hits = ngram.score(val)
    per_byte = 1 / math.log(2) / lengths[val[1:hits.size + 1]].mean()  # bits, of one nat a token

    # four continuations of a context: the true next n ids, then three from elsewhere
    n = min(64, T // 4)
    starts = np.random.default_rng(0).integers(0, len(val) - T, (args.items, 4))
    starts[:, 0] += T - n  # where the context ends
    pairs = [(val[row[0] - T + n:row[0]].tolist(), val[s:s + n].tolist())
             for row in starts for s in row]
    right = torch.stack([x.sum() for x, _ in score(pairs)]).view(-1, 4).argmax(1) == 0
    ngram_choice = np.array([ngram.score(c[-2:] + d)[0].sum() for c, d in pairs]).reshape(-1, 4)

    rows = [("bits per byte", -per_byte * logprobs.mean(1), -ngram_logprobs.mean() * per_byte,
             math.log(V) * per_byte),
            ("next-token accuracy", hits.mean(1), ngram_hits.mean(), 1 / V),
            ("continuation choice", right.double().numpy(), (ngram_choice.argmax(1) == 0).mean(),
             0.25)]
    say(f"\n{'':<22}{'model':>10}{'95 %':>18}{'trigrams':>10}{'chance':>10}")
    for label, values, trigrams, chance in rows:
        low, high = confidence_interval(values)
        say(f"{label:<22}{values.mean():>10.4f}{f'{low:.4f} - {high:.4f}':>18}{trigrams:>10.4f}"
            f"{chance:>10.4f}")
    say(f"\n{ngram_overlap(val, train):.1%} of the validation text's 13-grams of tokens also occur "
        f"in training; of {args.items} training windows\n"
        f"{verbatim_rate(model, train, args.items):.1%} are continued verbatim for 32 tokens after "
        "a prompt of 32")
    return {label: float(values.mean()) for label, values, *_ in rows}


# ---- running tasks and reporting ---------------------------------------------------------------

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def write_whole(path, text):
    if RANK == 0:
        Path(f"{path}.tmp").write_text(text, encoding="utf-8")
        os.replace(f"{path}.tmp", path)


def show_progress(label, start, done, total):
    """Count on one line of a terminal, with the time left."""
    if RANK == 0 and sys.stderr.isatty():
        left = (time.time() - start) * (total - done) / done
        end = "\n" if done == total else ""
        print(f"\r{label}: {done}/{total}, {left:.0f} s left ", end=end, file=sys.stderr)


def spread(function, items):
    """function(items), a list as long as items; under torchrun every rank does a share of it."""
    mine = function(items[RANK::WORLD_SIZE])
    if WORLD_SIZE == 1:
        return mine
    parts = [None] * WORLD_SIZE
    torch.distributed.all_gather_object(parts, mine)
    return [parts[i % WORLD_SIZE][i // WORLD_SIZE] for i in range(len(items))]


def run_task(name, path, model, tok, args):
    """Score one task; returns its results, one dict an item, the same on every rank."""
    task, items = TASKS[name], read_items(name, path, args.limit)
    if args.train_tokens:
        train = np.load(args.train_tokens, mmap_mode="r")
        overlaps = [ngram_overlap(tok.encode_numpy(i.context), train) for i in items]
    shots = Path(args.shots or Path(path) / "dev")
    if args.few_shot and not shots.exists():
        raise ValueError(f"--few-shot {args.few_shot}: give --shots, a file of worked examples")
    add_shots(items, read_items(name, shots) if args.few_shot else [], args.few_shot)
    if args.chat is not None:  # each context becomes a user's turn
        template = args.chat and Path(args.chat).read_text(encoding="utf-8")
        for item in items:
            item.delimiter = "" if item.choices else item.delimiter
            item.reword(lambda text: template.replace("{instruction}", text) if template else
                        tok.apply_chat_template([dict(role="user", content=text)], True))

    limit = model.config.context_length
    args.progress = partial(show_progress, name, time.time())
    args.max_new_tokens = min(args.max_new_tokens, limit // 2)
    score = partial(score_written, judge=task.judge) if task.judge else task.score
    results = spread(lambda mine: score(model, tok, mine, args), items)
    room, cut = limit + 1 if items[0].choices else limit - args.max_new_tokens, 0
    for i, (item, result) in enumerate(zip(items, results)):
        texts = ["".join(r) for r in item.requests()] or [item.context]
        cut += "tokens" not in result and max(len(tok.encode(t)) for t in texts) > room
        result |= dict(task=name, index=i, group=item.group, prompt=texts[0])
        if args.train_tokens:
            result["metrics"]["overlap"] = overlaps[i]
    if cut:
        say(f"{name}: {cut} of {len(items)} items are longer than the context of {limit}; their "
            "left was cut off")
    if name == "instructions" and args.results:  # what a judge reads
        rows = [i.extra | dict(output=r["output"]) for i, r in zip(items, results)]
        if "instruction" in rows[0]:  # AlpacaEval: a list that names the generator
            rows = [row | dict(generator=Path(args.model).name) for row in rows]
            write_whole(f"{args.results}.outputs.json", json.dumps(rows, indent=1))
        else:  # SimpleSafetyTests: a line for each prompt
            write_whole(f"{args.results}.outputs.jsonl",
                        "".join(json.dumps(row) + "\n" for row in rows))
    return results


def report(results, path=None):
    """Print every task's metrics; returns {(task, metric): value}.

    At path.md and path.html a report card: the same table, and a few failures to look at.
    """
    rows, table = [("task", "metric", "value", "std. error", "95 %", "items")], {}
    samples = []
    for task in dict.fromkeys(r["task"] for r in results):
        mine = [r for r in results if r["task"] == task]
        for metric, values in summarise(mine).items():
            value, error, low, high = ("" if math.isnan(v) else f"{v:.4f}" if abs(v) < 1e4 else
                                       f"{v:.4g}" for v in values)
            rows.append((task, metric, value, error, low and f"{low} - {high}", str(len(mine))))
            table[task, metric] = values[0]
        samples += [(f"{task}, wrong", r["prompt"][-600:],
                     f"said {str(r.get('output'))[:400]!r}, right: {r['gold']}")
                    for r in mine if r["metrics"].get(TASKS[task].metric) == 0.0][:3]
    for row in rows:
        say("{:<14}{:<18}{:>10}{:>12}{:>23}{:>8}".format(*row))
    if path:
        md = ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * 6, *rows[1:])]
        md += ["\n**{}**\n\n```\n{}\n```\n{}".format(*sample) for sample in samples]
        page = ["<!doctype html><meta charset=utf-8><title>evaluation</title><style>td{padding:2px "
                "12px}pre{background:#eee;padding:8px;white-space:pre-wrap}</style><table>"]
        page += ["<tr><td>" + "<td>".join(map(html.escape, row)) for row in rows] + ["</table>"]
        page += ["<h3>{}</h3><pre>{}</pre><p>{}".format(*map(html.escape, s)) for s in samples]
        write_whole(f"{path}.md", "\n".join(md) + "\n")
        write_whole(f"{path}.html", "\n".join(page) + "\n")
    return table


def compare(paths):
    """Two results files over the same items: difference, and how likely chance alone makes it."""
    first, second = ({(r["task"], r["index"]): r for r in rows_of(p) if "metrics" in r}
                     for p in paths)
    common = sorted(set(first) & set(second))
    if not common:
        raise ValueError(f"--compare: {paths[0]} and {paths[1]} have no items in common")
    say(f"{'task':<14}{'metric':<15}{'A':>9}{'B':>9}{'B - A':>9}{'p':>9}{'items':>8}")
    for task in dict.fromkeys(t for t, _ in common):
        keys, metric = [k for k in common if k[0] == task], TASKS[task].metric
        if metric not in first[keys[0]]["metrics"]:
            metric = "loglikelihood"
        a, b = ([(side[k]["metrics"] | side[k])[metric] for k in keys] for side in (first, second))
        difference, p = paired_test(a, b)
        say(f"{task:<14}{metric:<15}{np.mean(a):>9.4f}{np.mean(b):>9.4f}{difference:>+9.4f}"
            f"{p:>9.4f}{len(keys):>8}")


# ---- command line ------------------------------------------------------------------------------


def evaluate(args):
    if args.compare:
        return compare(args.compare)
    tasks = [task.partition("=") for task in args.task]
    for name, _, path in tasks:
        if name not in TASKS or not path:
            raise ValueError(f"--task {name}: not NAME=PATH with NAME one of {', '.join(TASKS)}")
    device = args.device if args.device != "auto" else (
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    model = model_py.Transformer.from_pretrained(args.model, dtype=dtype).to(device).eval()
    tok = tokenizer_py.Tokenizer.load(args.model)
    if not tasks:
        return evaluate_checkpoint(model, tok, args)
    results = [r for name, _, path in tasks for r in run_task(name, path, model, tok, args)]
    if args.results:
        write_whole(args.results, "".join(json.dumps(r) + "\n" for r in results))
    return report(results, args.results)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="out", help="folder of a checkpoint (default: %(default)s)")
    add("--task", action="append", default=[], metavar="NAME=PATH",
        help=f"a task and its file or folder, any number of times: {', '.join(TASKS)}")
    add("--few-shot", type=int, default=0, help="worked examples before each (default: 0)")
    add("--shots", help="file of the worked examples (default: the task's dev folder)")
    add("--chat", nargs="?", const="", metavar="FILE",
        help="put each prompt into the chat template, or into FILE's text, at {instruction}")
    add("--limit", type=int, default=0, help="items a task, 0 for all (default: 0)")
    add("--max-new-tokens", type=int, default=256, help="tokens an answer (default: %(default)s)")
    add("--samples", type=int, default=1, help="answers an item, for pass@k (default: 1, greedy)")
    add("--results", help="file for one line of JSON an item; PATH.md and PATH.html beside it")
    add("--compare", nargs=2, metavar=("A", "B"), help="paired test of two results files")
    add("--train-tokens", help="a .npy of training tokens: the share of 13-grams in it")
    add("--cache", default="data", help="train.py's cache, for its checkpoint (default: data)")
    add("--items", type=int, default=200, help="continuations to choose (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    add("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="(default: fp32)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if WORLD_SIZE > 1:
        torch.distributed.init_process_group("gloo")
    try:
        return evaluate(args)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        print(f"evaluate.py: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
    finally:
        if WORLD_SIZE > 1:
            torch.distributed.destroy_process_group()
            time.sleep(0.3)  # gloo's threads need Python once more (distributed.close_distributed)


if __name__ == "__main__":
    main()
