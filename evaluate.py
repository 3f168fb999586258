"""Evaluate a language model: the numbers lm-evaluation-harness gives, from one file.

    python evaluate.py                                  # scores train.py's checkpoint in ./out
    python evaluate.py --model out --task arc=ARC-Easy-Test.jsonl --task mmlu=data/mmlu
    python evaluate.py --model Qwen2.5-0.5B --task gsm8k=test.jsonl --limit 200 --results a.jsonl
    python evaluate.py --compare a.jsonl b.jsonl        # are two models different? a paired test

Definitions follow lm-evaluation-harness (Gao et al. 2021, github.com/EleutherAI): trailing blanks
of a context belong to the continuation, whose ids are encode(context + continuation) after
len(encode(context)); contexts lose tokens on the left; log-probabilities are fp32. Shapes: B rows,
T tokens, V vocabulary.
"""

import argparse
import csv
import html
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import model as model_py
import tokenizer as tokenizer_py

# ---- the three primitives ----------------------------------------------------------------------


def encode_pair(tok, context, continuation):
    """Ids of a context and of what continues it, cut apart as the harness does.

    encode_pair(tok, "2 + 2 = ", "4") encodes "2 + 2 =" and " 4": tokens carry their blank in front.
    An empty context is one <|endoftext|>, so that the first token has something to follow.
    """
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    if not context:
        return [prefix_id(tok)], tok.encode(continuation, allowed_special=())
    left = tok.encode(context, allowed_special=())
    return left, tok.encode(context + continuation, allowed_special=())[len(left):]


def prefix_id(tok):
    if tok.eot_id is None:
        raise ValueError("the tokenizer has no <|endoftext|> to begin a text with")
    return tok.eot_id


@torch.inference_mode()
def score_batch(model, contexts, continuations):
    """Log-probabilities of several continuations of each context: lists of ids, lists of lists.

    Returns [(sum of log-probabilities, all greedy?)], context by context. What contexts have in
    common at their beginning (worked examples) goes through the model once, each context once, and
    then only the continuations, all by way of a KV cache whose rows are copied.
    """
    device = model.embed.weight.device
    counts = [len(c) for c in continuations]
    owner = [i for i, n in enumerate(counts) for _ in range(n)]
    flat = [d for group in continuations for d in group]
    common = len(os.path.commonprefix(contexts)) if len(contexts) > 1 else 0
    shared = min(common, min(map(len, contexts)) - 1)  # at least one token is left of each
    T, T2 = max(map(len, contexts)) - shared, max(map(len, flat)) - 1
    cache = model_py.KVCache(model, len(contexts), shared + T)
    if shared:
        model.hidden(torch.tensor([contexts[0][:shared]], device=device), cache, [0])
        for t in cache.k + cache.v:
            t[1:, :shared] = t[:1, :shared]
    hidden = model.hidden(pad([c[shared:] for c in contexts], T, device), cache,
                          [shared] * len(contexts))  # (contexts, T, D)
    ends = torch.tensor([len(c) - shared - 1 for c in contexts], device=device)
    hidden = hidden[torch.arange(len(contexts), device=device), ends][owner][:, None]
    if T2:
        wider = model_py.KVCache(model, len(flat), shared + T + T2)
        for new, old in zip(wider.k + wider.v, cache.k + cache.v):
            new[:, :shared + T] = old[owner]
        rest = model.hidden(pad([d[:-1] for d in flat], T2, device), wider,
                            [len(contexts[i]) for i in owner])  # (continuations, T2, D)
        hidden = torch.cat((hidden, rest), 1)
    lengths = [len(d) for d in flat]
    real = torch.arange(T2 + 1, device=device) < torch.tensor(lengths, device=device)[:, None]
    scores = model.head(hidden[real]).float().log_softmax(-1)  # (all tokens, V)
    targets = torch.tensor([t for d in flat for t in d], device=device)
    logprobs = scores.gather(1, targets[:, None])[:, 0].double().cpu().split(lengths)
    greedy = (scores.argmax(-1) == targets).cpu().split(lengths)
    return [(x.sum().item(), bool(g.all())) for x, g in zip(logprobs, greedy)]


def pad(rows, T, device):
    return torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=device)  # (B, T)


def score_tokens(model, pairs, batch_tokens=8192, progress=None):
    """score_batch over any number of (context ids, continuation ids), equal ones once.

    A context too long for the model loses its left. batch_tokens bounds the padded size of a
    batch, and is halved when memory runs out.
    """
    room, done, wanted = model.config.context_length + 1, {}, {}
    pairs = [(tuple(c[-max(1, room - len(d)):]), tuple(d)) for c, d in pairs]
    for c, d in pairs:
        if d:
            wanted.setdefault(c, {})[d] = None
        done[c, d] = (0.0, True)  # an empty continuation is certain
    contexts, at = sorted(wanted), 0
    common = sum(len(os.path.commonprefix(p)) for p in zip(contexts, contexts[1:]))
    if common < 0.4 * sum(map(len, contexts)):  # then similar lengths are worth more
        contexts.sort(key=len)
    while at < len(contexts):
        size, rows, longest = 0, 0, 0
        for c in contexts[at:at + 256]:
            rows += len(wanted[c])
            longest = max(longest, len(c) + max(map(len, wanted[c])))
            if size and longest * rows > batch_tokens:
                break
            size += 1
        batch = contexts[at:at + size]
        try:
            scores = iter(score_batch(model, batch, [list(wanted[c]) for c in batch]))
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise ValueError("one item does not fit the GPU's memory") from None
            batch_tokens = longest * rows // 2
            torch.cuda.empty_cache()
            continue
        done |= {(c, d): next(scores) for c in batch for d in wanted[c]}
        at += size
        if progress:
            progress(at, len(contexts))
    return [done[pair] for pair in pairs]


def loglikelihood(model, tokenizer, pairs, **options):
    """[(context, continuation)] -> [(log-probability in nats, is it the greedy choice)]."""
    return score_tokens(model, [encode_pair(tokenizer, c, d) for c, d in pairs], **options)


def rolling_windows(ids, prefix, limit):
    """Cut ids into (context, predicted) so that each id is predicted once, with all room used.

    The first window starts from `prefix`; a last short one is preceded by as many ids as fit. For
    limit 4: [0 .. 9] -> (p, 0123), (3, 4567), (567, 89).
    """
    windows = [([prefix], ids[:limit])]
    for start in range(limit, len(ids), limit):
        end = min(start + limit, len(ids))
        windows.append((ids[end - limit - 1:start], ids[start:end]))
    return windows


def loglikelihood_rolling(model, tokenizer, texts, **options):
    """Whole texts -> [log-probability in nats of every token of each]."""
    pairs, owner = [], []
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text, allowed_special=())
        windows = rolling_windows(ids, prefix_id(tokenizer), model.config.context_length)
        pairs += windows if ids else []
        owner += [i] * (len(pairs) - len(owner))
    totals = [0.0] * len(texts)
    for i, (score, _) in zip(owner, score_tokens(model, pairs, **options)):
        totals[i] += score
    return totals


def generate_until(model, tokenizer, requests, max_new_tokens=256, **options):
    """[(context, stop strings)] -> texts, greedy by default, cut before the first stop string."""
    room = model.config.context_length - max_new_tokens
    if room < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: leaves no room for a prompt in a "
                         f"context of {model.config.context_length}")
    texts, by_stop = {}, defaultdict(list)
    for i, (context, until) in enumerate(requests):
        by_stop[tuple(until)].append((i, tokenizer.encode(context, allowed_special=())[-room:]
                                      or [prefix_id(tokenizer)]))
    for until, group in by_stop.items():
        stop = [*until, *([tokenizer.eot_id] if tokenizer.eot_id is not None else [])]
        settings = {"temperature": 0.0, "stop": stop, "tokenizer": tokenizer} | options
        done = model.generate([ids for _, ids in group], max_new_tokens, **settings)
        for (i, _), completion in zip(group, done):
            text = tokenizer.decode([t for t in completion.tokens if t != tokenizer.eot_id])
            cut = [text.find(s) for s in until if s in text]
            texts[i] = text[:min(cut)] if cut else text
    return [texts[i] for i in range(len(requests))]


# ---- metrics -----------------------------------------------------------------------------------


def wilson_interval(successes, n, z=1.96):
    """95 % interval of a share (Wilson 1927), right for small n and shares near 0 and 1."""
    p, width = successes / n, z * z / n
    center = (p + width / 2) / (1 + width)
    half = z * math.sqrt(p * (1 - p) / n + width / (4 * n)) / (1 + width)
    return center - half, center + half


def confidence_interval(values, samples=2000, seed=0):
    """(low, high), 95 %, of the mean: Wilson's for zeros and ones, else the bootstrap-t interval.

    Bootstrap-t divides each resample's error by its own standard error, which keeps the promised
    coverage for skewed values where plain percentiles are too narrow (Efron & Tibshirani 1993).
    """
    x = np.asarray(values, float)
    if len(x) < 2:
        return math.nan, math.nan
    if np.isin(x, (0, 1)).all():
        return wilson_interval(x.sum(), len(x))
    rng, mean, error = np.random.default_rng(seed), x.mean(), x.std(ddof=1) / math.sqrt(len(x))
    t = []
    for _ in range(samples):
        s = x[rng.integers(0, len(x), len(x))]
        t.append((s.mean() - mean) / (s.std(ddof=1) / math.sqrt(len(x)) or math.inf))
    low, high = np.percentile(t, [2.5, 97.5])
    return mean - high * error, mean - low * error


def standard_error(values):
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them right, hold a right one (Chen et al. 2021, eq. 1)."""
    return 1.0 if n - c < k else 1.0 - math.comb(n - c, k) / math.comb(n, k)


def calibration_error(confidences, correct, bins=10):
    """Expected calibration error: mean |accuracy - confidence| over equal bins of confidence."""
    confidences, correct = np.asarray(confidences, float), np.asarray(correct, float)
    which = np.minimum((confidences * bins).astype(int), bins - 1)
    return float(sum(abs((correct - confidences)[which == b].sum()) for b in range(bins))
                 / len(correct))


def paired_test(a, b, samples=10_000, seed=0):
    """(mean of b - a, two-sided p) by flipping the signs of the items' differences at random."""
    d = np.asarray(b, float) - np.asarray(a, float)
    d_all, d = d.mean(), d[d != 0]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (samples, len(d)))
    extreme = np.abs(signs @ d) >= abs(d.sum()) - 1e-12
    return float(d_all), float((extreme.sum() + 1) / (samples + 1))


# ---- tasks -------------------------------------------------------------------------------------


@dataclass
class Item:
    """One question. choices: multiple choice; else free text, or a whole text to score."""

    context: str
    choices: list = field(default_factory=list)  # continuations, without the blank in front
    gold: object = None  # index of the right choice, or the right answer
    contexts: list = None  # where every choice has its own (Winogrande)
    delimiter: str = " "
    group: str = ""  # subject
    until: tuple = ("\n\n",)
    extra: dict = field(default_factory=dict)


def rows_of(path, *keys):
    """Rows of a .jsonl, .json or .csv file with all the keys; ValueError names a missing one."""
    files = tokenizer_py.list_files([str(path)])
    found = 0
    for file in files:
        text = Path(file).read_text(encoding="utf-8")
        if file.endswith(".csv"):
            rows = csv.DictReader(io.StringIO(text, newline=""))
        else:
            rows = json.loads(text) if file.endswith(".json") else map(
                json.loads, filter(str.strip, text.split("\n")))  # U+2028 may stand in a string
        for i, row in enumerate(rows):
            missing = [k for k in keys if k not in row]
            if missing:
                raise ValueError(f"{file}: item {i + 1} has no {missing[0]!r}; it has "
                                 f"{', '.join(map(str, row))}")
            found += 1
            yield row
    if not found:
        raise ValueError(f"{path}: no items in it")


def read_mmlu(path):
    """A folder with test/*_test.csv (and dev/*_dev.csv): question, four choices, letter."""
    for file in sorted(Path(path).glob("test/*.csv")) or sorted(Path(path).glob("*.csv")):
        subject = re.sub(r"_(test|val|dev)$", "", file.stem).replace("_", " ")
        text = io.StringIO(file.read_text(encoding="utf-8"), newline="")
        for i, row in enumerate(csv.reader(text)):
            if len(row) != 6 or row[5] not in list("ABCD"):
                raise ValueError(f"{file}: row {i + 1} has {len(row)} columns, not a question, "
                                 "four choices and a letter")
            lines = [row[0].strip(), *(f"{c}. {t}" for c, t in zip("ABCD", row[1:5])), "Answer:"]
            yield Item("\n".join(lines), list("ABCD"), "ABCD".index(row[5]), group=subject)


def read_arc(path):
    """ARC easy and challenge, as AI2 gives them or flattened as on the hub."""
    for row in rows_of(path, "question", "answerKey"):
        question, choices = row["question"], row.get("choices")
        if isinstance(question, dict):
            choices = {k: [c[k] for c in question["choices"]] for k in ("text", "label")}
            question = question["stem"]
        yield Item(f"Question: {question}\nAnswer:", choices["text"],
                   choices["label"].index(row["answerKey"]))


def read_hellaswag(path):
    def tidy(text):
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    for row in rows_of(path, "ctx_a", "ctx_b", "endings", "label", "activity_label"):
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        yield Item(tidy(context), [tidy(e) for e in row["endings"]], int(row["label"]))


def read_piqa(path):
    for row in rows_of(path, "goal", "sol1", "sol2", "label"):
        yield Item(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]],
                   int(row["label"]))


def read_winogrande(path):
    """The blank is filled in two ways; what follows it is scored (Trinh & Le 2018)."""
    for row in rows_of(path, "sentence", "option1", "option2", "answer"):
        before, after = row["sentence"].split("_", 1)
        yield Item("", [after.strip()] * 2, int(row["answer"]) - 1,
                   contexts=[before + row["option1"], before + row["option2"]])


def read_lambada(path):
    for row in rows_of(path, "text"):
        context, last = row["text"].rsplit(" ", 1)
        yield Item(context, [last], 0)


WIKITEXT = (  # what WikiText's tokenizer did, and what undoes it, in the harness's order
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"), (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"),
    ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))


def read_wikitext(path):
    """Documents, their spaced-out punctuation put right; words and bytes count as in the file.

    "the valley ( 1 @,@ 000 m )" is scored as "the valley (1,000 m)".
    """
    for document in tokenizer_py.read_documents(tokenizer_py.list_files([str(path)])):
        text = document
        for old, new in WIKITEXT:
            text = re.sub(old, new, text) if "\\s" in old else text.replace(old, new)
        yield Item(text, extra={"file": document})


def read_gsm8k(path):
    for row in rows_of(path, "question", "answer"):
        gold = row["answer"].split("####")[-1].strip()
        yield Item(f"Question: {row['question']}\nAnswer:", gold=gold,
                   until=("Question:", "</s>", "<|im_end|>"), extra={"shot": row["answer"]})


def read_math(path):
    for row in rows_of(path, "problem", "solution"):
        yield Item(f"Problem:\n{row['problem']}\n\nSolution:", gold=extract_boxed(row["solution"]),
                   until=("Problem:",), extra={"shot": row["solution"]})


def read_humaneval(path):
    for row in rows_of(path, "prompt", "test", "entry_point"):
        yield Item(row["prompt"], until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
                   extra={"test": f"{row['test']}\ncheck({row['entry_point']})"})


def read_instructions(path):
    """AlpacaEval ("instruction") and SimpleSafetyTests ("prompts_final") prompts."""
    for row in rows_of(path):
        if not {"instruction", "prompts_final"} & set(row):
            raise ValueError(f"{path}: rows need 'instruction' or 'prompts_final'")
        yield Item(row.get("instruction") or row["prompts_final"], until=("# Query:",), extra=row)


# name -> (reader of a file or folder, how it is scored, the metric to look at)
TASKS = {
    "mmlu": (read_mmlu, "choice", "acc"), "arc": (read_arc, "choice", "acc_norm"),
    "hellaswag": (read_hellaswag, "choice", "acc_norm"), "piqa": (read_piqa, "choice", "acc_norm"),
    "winogrande": (read_winogrande, "choice", "acc"), "lambada": (read_lambada, "last", "acc"),
    "wikitext": (read_wikitext, "rolling", "bits_per_byte"),
    "gsm8k": (read_gsm8k, "gsm8k", "strict"), "math": (read_math, "math", "correct"),
    "humaneval": (read_humaneval, "code", "pass@1"),
    "instructions": (read_instructions, "outputs", "length"),
}


def parse_mmlu_response(choices, response):
    """The letter a model chose, or None: the course's "The correct answer is _" prompt."""
    m = re.search(r"correct answer is:? *\(?([A-D])\b", response) or re.search(
        r"(?:^|\s)\(?([A-D])\)?(?:[.:,\s]|$)", response)
    return m.group(1) if m else None


def parse_gsm8k_response(response):
    """The last number of a response as a string, without commas; None without one."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", response)
    return numbers[-1].replace(",", "") if numbers else None


def add_shots(items, shots, tok=None):
    """Put worked examples, and a subject's heading for MMLU, before every context."""
    def worked(item):
        answer = item.extra.get("shot") or item.choices[item.gold]
        context = item.contexts[item.gold] if item.contexts else item.context
        return context + item.delimiter + answer

    for item in items:
        same = [s for s in shots if s.group == item.group]
        heading = ("The following are multiple choice questions (with answers) about "
                   f"{item.group}.\n\n" if item.group else "")
        before = heading + "".join(worked(s) + "\n\n" for s in same)
        item.contexts = item.contexts and [before + c for c in item.contexts]
        item.context = before + item.context
        if tok:  # a chat model reads it all as the user's turn
            item.context, *rest = (
                tok.apply_chat_template([dict(role="user", content=c)], add_generation_prompt=True)
                for c in (item.context, *(item.contexts or ())))
            item.contexts, item.delimiter = rest or None, ""


# ---- scoring a task ----------------------------------------------------------------------------


def score_choices(model, tok, items, options):
    """Log-probability of every choice; by four norms the likeliest is the answer."""
    pairs = [((i.contexts or [i.context] * len(i.choices))[k], i.delimiter + c)
             for i in items for k, c in enumerate(i.choices)]
    encoded = [encode_pair(tok, *p) for p in pairs]
    scores = iter(zip(encoded, score_tokens(model, encoded, **options)))
    results = []
    for item in items:
        mine = [next(scores) for _ in item.choices]
        ll = np.array([s for _, (s, _) in mine])
        norms = {"acc": 1, "acc_norm": [len(c) for c in item.choices],
                 "acc_bytes": [len(c.encode()) for c in item.choices],
                 "acc_tokens": [len(d) for (_, d), _ in mine]}
        result = {name: float(np.argmax(ll / np.maximum(n, 1)) == item.gold)
                  for name, n in norms.items()}
        p = np.exp(ll - ll.max())
        results.append(result | dict(
            confidence=float(p.max() / p.sum()), loglikelihoods=ll.tolist(),
            output=item.choices[int(ll.argmax())], gold=item.choices[item.gold]))
    return results


def score_last(model, tok, items, options):
    """LAMBADA: is the last word the greedy continuation, and how likely is it."""
    scores = loglikelihood(model, tok, [(i.context, i.delimiter + i.choices[0]) for i in items],
                           **options)
    return [dict(acc=float(greedy), loglikelihood=s, gold=i.choices[0])
            for i, (s, greedy) in zip(items, scores)]


def score_rolling(model, tok, items, options):
    totals = loglikelihood_rolling(model, tok, [i.context for i in items], **options)
    return [dict(loglikelihood=s, words=len(re.split(r"\s+", i.extra["file"])),
                 bytes=len(i.extra["file"].encode()),
                 tokens=len(tok.encode(i.context, allowed_special=())))
            for i, s in zip(items, totals)]


def score_gsm8k(model, tok, items, options):
    """Strict: the number after ####; flexible: the last number; as the harness finds them."""
    texts = generate_until(model, tok, [(i.context, i.until) for i in items], **options)
    results = []
    for item, text in zip(items, texts):
        strict = re.search(r"#### (\-?[0-9\.\,]+)", text)
        numbers = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
        found = [strict.group(1) if strict else "[invalid]",
                 (numbers[-1][0] or numbers[-1][1]) if numbers else "[invalid]"]
        tidy = [re.sub(r",|\$|\.$", "", s).lower() for s in (*found, item.gold)]
        results.append(dict(strict=float(tidy[0] == tidy[2]), flexible=float(tidy[1] == tidy[2]),
                            output=text, gold=item.gold))
    return results


def score_math(model, tok, items, options):
    texts = generate_until(model, tok, [(i.context, i.until) for i in items], **options)
    return [dict(correct=float(grade(extract_boxed(t) or t.strip(), i.gold)), output=t, gold=i.gold)
            for i, t in zip(items, texts)]


def score_code(model, tok, items, options):
    texts = generate_until(model, tok, [(i.context, i.until) for i in items], **options)
    results = []
    for item, text in zip(items, texts):
        passed, why = run_program(item.context + text + "\n" + item.extra["test"])
        results.append({"pass@1": float(passed), "output": text, "why": why})
    return results


def score_outputs(model, tok, items, options):
    """No score: outputs for a judge, with the fields that AlpacaEval and the safety judge read."""
    texts = generate_until(model, tok, [(i.context, i.until) for i in items], **options)
    return [dict(i.extra, output=t, length=float(len(t))) for i, t in zip(items, texts)]


SCORERS = {"choice": score_choices, "last": score_last, "rolling": score_rolling,
           "gsm8k": score_gsm8k, "math": score_math, "code": score_code, "outputs": score_outputs}


def summarise(results):
    """{metric: (value, low, high)} of a task's results."""
    first, table = results[0], {}
    for name in first:
        values = [r[name] for r in results]
        if name in ("acc", "acc_norm", "acc_bytes", "acc_tokens", "strict", "flexible", "correct",
                    "pass@1", "length"):
            table[name] = (float(np.mean(values)), *confidence_interval(values))
    if "confidence" in first:
        ece = calibration_error([r["confidence"] for r in results], [r["acc"] for r in results])
        table["ece"] = (ece, math.nan, math.nan)
    if "loglikelihood" in first:
        ll = np.array([r["loglikelihood"] for r in results])
        if "bytes" not in first:
            low, high = confidence_interval(-ll)
            table["perplexity"] = tuple(math.exp(min(v, 700)) for v in (-ll.mean(), low, high))
        for unit, name in (("tokens", "token"), ("words", "word"), ("bytes", "byte")):
            if unit in first:
                n = sum(r[unit] for r in results)
                value = math.exp(min(-ll.sum() / n, 700))
                table[f"{name}_perplexity"] = (value, math.nan, math.nan)
        if "bytes" in first:
            n = np.array([r["bytes"] for r in results])
            rate = -ll.sum() / n.sum() / math.log(2)
            low, high = confidence_interval((-ll / math.log(2) - rate * n) / n.mean())
            table["bits_per_byte"] = (float(rate), rate + low, rate + high)
    return table


# ---- the grader --------------------------------------------------------------------------------

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_BITS = 500, 120, 40, 4000  # they bound every answer's time
UNITS = {  # short units, which could be variables; longer words count as units by themselves
    "m", "s", "g", "h", "l", "cm", "mm", "km", "kg", "mg", "ml", "ft", "in", "lb", "oz", "hr", "mi",
    "cal", "am", "pm", "c", "f", "k", "w", "j", "n", "v", "a"}
SAME_UNIT = {
    "meter": "m", "metre": "m", "second": "s", "sec": "s", "gram": "g", "hour": "h", "hr": "h",
    "liter": "l", "litre": "l", "centimeter": "cm", "millimeter": "mm", "kilometer": "km",
    "kilogram": "kg", "foot": "ft", "feet": "ft", "inch": "in", "inche": "in", "pound": "lb",
    "lb": "lb", "ounce": "oz", "mile": "mi", "minute": "min", "dollar": "$", "usd": "$",
    "percent": "%", "degree": "deg", "milliliter": "ml"}
LATEX = [(re.compile(p), r) for p, r in (
    (r"\\(?:left|right|big|Big|bigg|displaystyle|quad|qquad|ldots)(?![A-Za-z])", " "),
    (r"(?<!\\)\\[!,;: ]|~", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree", " degrees "), (r"\\\$|\$", " $ "), (r"\\%", "%"),
    (r"\\(?:cdot|times)|×|·", "*"), (r"\\div|÷", "/"), (r"\\pi|π", " pi "),
    (r"\\infty|∞", " inf "), (r"\\cup|∪", "∪"), (r"\\(?:leqslant|leq|le)(?![A-Za-z])|≤|<=", "≤"),
    (r"\\(?:geqslant|geq|ge)(?![A-Za-z])|≥|>=", "≥"), (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\pm(?![A-Za-z])|±", "±"), (r"−|–|—", "-"), (r"√", r"\\sqrt"), (r"²", "^2"), (r"³", "^3"),
    (r"\\(?:in|colon)(?![A-Za-z])|∈", " in "))]
NUMBER = re.compile(r"\d+(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+\.?\d*|\.\d+")
TOKEN = re.compile(rf"\s*(?:({NUMBER.pattern})(?:[eE]([+-]?\d{{1,4}})(?![A-Za-z\d]))?|"
                   r"(\\?[A-Za-z]+)|(.))", re.S)


class Unreadable(ValueError):
    """What was given is no expression that this grader reads."""


class Parser:
    """Recursive descent over one expression; calls evaluate as it goes: value(text, variables).

    Values are Fractions, exact, and floats where a root or pi comes in. Variables stand for fixed
    fractions given in a dict, so that two polynomials are the same if they agree at some points.
    """

    def __init__(self, text, point):
        self.tokens = [m for m in TOKEN.finditer(text) if m.group().strip()]
        if len(self.tokens) > MAX_TOKENS:
            raise Unreadable("too long")
        self.at, self.depth, self.point = 0, 0, point

    def peek(self):
        return self.tokens[self.at].group().strip() if self.at < len(self.tokens) else ""

    def take(self, expected=None):
        token = self.peek()
        if not token or expected and token != expected:
            raise Unreadable(f"{expected} expected, {token or 'the end'} found")
        self.at += 1
        return token

    def whole(self):
        value = self.sum()
        if self.peek():
            raise Unreadable(self.peek())
        return value

    def sum(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        self.depth -= 1
        return bounded(value)

    def product(self):
        value = self.signed()
        while True:
            token = self.peek()
            if token == "*":
                self.take()
                value = bounded(value * self.signed())
            elif token == "/":
                self.take()
                value = divide(value, self.signed())
            elif token and (token[0].isalnum() or token in "(\\" or token[0] in "\\."):
                mixed = self.mixed_part(value)
                value = mixed if mixed is not None else bounded(value * self.power())
            else:
                return value

    def mixed_part(self, value):
        """3 1/2 and 3\\frac{1}{2} mean 3.5: a whole number, then a proper fraction of digits."""
        left = self.tokens[self.at - 1].group().strip()
        rest = " ".join(t.group().strip() for t in self.tokens[self.at:self.at + 7])
        m = re.match(r"\\frac \{ (\d+) \} \{ (\d+) \}|(\d+) / (\d+)(?! [\d(^])", rest)
        if not left.isdigit() or not m:
            if left[-1:].isdigit() and self.peek()[0].isdigit():
                raise Unreadable("two numbers side by side")
            return None
        top, bottom = (int(g) for g in m.groups() if g)
        if top >= bottom:
            raise Unreadable("not a mixed number")
        self.at += 7 if m.group(1) else 3
        return value + Fraction(top, bottom)

    def signed(self):
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        return sign * self.power()

    def power(self):
        base = self.atom()
        while self.peek() == "!":
            self.take()
            if not isinstance(base, Fraction) or base.denominator > 1 or not 0 <= base <= 20:
                raise Unreadable("factorial")
            base = Fraction(math.factorial(int(base)))
        if self.peek() == "%":
            self.take()
            base = base / 100
        if self.peek() == "^":
            self.take()
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Unreadable("too deep")
            exponent = self.group() if self.peek() == "{" else self.signed()
            self.depth -= 1
            return raise_to(base, exponent)
        return base

    def group(self):
        self.take("{")
        value = self.sum()
        self.take("}")
        return value

    def atom(self):
        match = self.tokens[self.at] if self.at < len(self.tokens) else None
        token = self.take()
        if match.group(1):
            exponent = int(match.group(2) or 0)
            if abs(exponent) > 400:
                raise Unreadable("exponent")
            return Fraction(match.group(1).replace(",", "")) * Fraction(10) ** exponent
        if token in ("(", "{", "["):
            value = self.sum()
            self.take({"(": ")", "{": "}", "[": "]"}[token])
            return value
        if token == "|":
            value = self.sum()
            self.take("|")
            return abs(value)
        if token == "\\frac":
            top = self.group() if self.peek() == "{" else Fraction(self.digit())
            bottom = self.group() if self.peek() == "{" else Fraction(self.digit())
            return divide(top, bottom)
        if token in ("\\sqrt", "sqrt"):
            return self.root()
        if token in ("pi", "\\pi"):
            return math.pi
        if len(token) == 1 and token.isalpha():
            if token not in self.point:
                raise Unreadable(token)
            return self.point[token]
        raise Unreadable(token)

    def digit(self):
        """\\frac12: one digit at a time."""
        match = self.tokens[self.at] if self.at < len(self.tokens) else None
        text = self.peek()
        if not match or not text.isdigit():
            raise Unreadable(text)
        if len(text) == 1:
            self.at += 1
        else:
            self.tokens[self.at] = re.match(TOKEN, text[1:])
        return int(text[0])

    def root(self):
        degree = Fraction(2)
        if self.peek() == "[":
            self.take()
            degree = self.sum()
            self.take("]")
        value = self.group() if self.peek() == "{" else self.atom()
        return raise_to(value, divide(Fraction(1), degree))


def bounded(value):
    if isinstance(value, Fraction) and (value.numerator.bit_length() > MAX_BITS
                                        or value.denominator.bit_length() > MAX_BITS):
        raise Unreadable("too large")
    if isinstance(value, (float, complex)) and not abs(value) < 1e300:
        raise Unreadable("too large")
    return value


def divide(a, b):
    if b == 0:
        raise Unreadable("division by zero")
    return bounded(a / b)


def raise_to(base, exponent):
    """base ^ exponent, exact where both are rational and the root comes out even."""
    if isinstance(base, complex) or isinstance(exponent, complex):
        raise Unreadable("complex")
    if isinstance(exponent, Fraction) and exponent.denominator <= 8 and abs(exponent) <= 1000 \
            and isinstance(base, Fraction):
        if base == 0:
            return divide(Fraction(1), base) if exponent < 0 else Fraction(exponent == 0)
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if size * abs(exponent) > MAX_BITS:
            raise Unreadable("too large")
        n = exponent.denominator
        roots = [round(abs(x) ** (1 / n)) if x.bit_length() < 1000 else 0
                 for x in (base.numerator, base.denominator)]
        if (base > 0 or n % 2) and [r**n for r in roots] == [abs(base.numerator), base.denominator]:
            value = Fraction(roots[0], roots[1]) ** exponent.numerator
            return value if base > 0 or exponent.numerator % 2 == 0 else -value
    if base < 0:
        raise Unreadable("root of a negative number")
    if base == 0 or abs(math.log(abs(base)) * float(exponent)) > 600:
        raise Unreadable("too large")
    return float(base) ** float(exponent)


def same(a, b):
    """Whether two values are one number: exactly if both are exact, else to 1e-9 of their size."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return abs(a - b) <= 1e-9 * max(1e-9, abs(a), abs(b))


POINTS = [{c: Fraction(hash_ % 89 + 7, 13) for c, hash_ in
           ((chr(o), (o * k) % 1009) for o in (*range(65, 91), *range(97, 123)))}
          for k in (131, 457, 769)]


def evaluate_at(text):
    """The values of an expression at the three POINTS: [Fraction or float]."""
    return [Parser(text, point).whole() for point in POINTS]


def same_expression(a, b):
    return all(same(x, y) for x, y in zip(evaluate_at(a), evaluate_at(b)))


def clean(text):
    """LaTeX and typography to plain characters; a final full stop, \\boxed and blanks go."""
    boxed = extract_boxed(text)
    text = text if boxed is None else boxed
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def split_unit(text):
    """"12.5 cm^2" -> ("12.5", "cm^2"); "x + 2" -> ("x + 2", ""). Money and percent are units."""
    text = text.strip()
    money = re.fullmatch(r"(-?) ?\$ ?(.*)|(.*\d) ?\$", text)
    if money:
        amount = (money.group(1) or "") + (money.group(2) if money.group(3) is None
                                           else money.group(3))
        return re.sub(r" (?:dollars?|usd)$", "", amount, flags=re.I), "$"
    m = re.fullmatch(r"(.*[\d)}!]|.*\bpi) ?((?:(?:square|cubic|sq) )?[A-Za-z]+(?: ?\^ ?\{?\d\}?)?"
                     r"(?: ?(?:/|per) ?[A-Za-z]+(?:\^\d)?| [A-Za-z]{3,})*)", text)
    if not m or not NUMBER.search(m.group(1)) and "pi" not in m.group(1):
        return (text[:-1].strip(), "%") if text.endswith("%") else (text, "")
    words = m.group(2).lower()
    first = re.match(r"[a-z]+", words).group()
    if first not in UNITS and len(first) < 3 or first in ("sqrt", "frac", "pi", "inf", "and", "or"):
        return text, ""
    words = re.sub(r"\b(?:square|sq) ([a-z]+)", r"\1^2", words)
    words = re.sub(r"\bcubic ([a-z]+)", r"\1^3", words)
    words = re.sub(r"[{} ]", "", words.replace(" per ", "/"))

    def name(match):
        word = match.group()
        word = word[:-1] if len(word) > 2 and word.endswith("s") and word != "gas" else word
        return SAME_UNIT.get(word, word)

    return m.group(1), re.sub(r"[a-z]+", name, words)


def split_top(text, separators):
    """Split at separators that are outside every bracket; a comma inside 1,234 does not count."""
    parts, depth, start = [], 0, 0
    thousands = {i for m in re.finditer(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])", text)
                 for i in range(*m.span())}
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c in separators and depth <= 0 and i not in thousands:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in [*parts, text[start:]]]


def same_lists(a, b, ordered):
    if len(a) != len(b) or len(a) > 30:
        return False
    if ordered:
        return all(same_answer(x, y) for x, y in zip(a, b))
    left = list(b)
    for x in a:
        match = next((y for y in left if same_answer(x, y)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def interval(text):
    """"(2, 5]" -> ("(", "2", "5", "]"), also from 2 < x <= 5 and x > 3; None if it is neither."""
    text = re.sub(r"^[a-z] in ", "", text)
    m = re.fullmatch(r"([(\[])(.*)([)\]])", text)
    if m and len(ends := split_top(m.group(2), ",")) == 2:
        return m.group(1), *ends, m.group(3)
    parts = re.split(r"([<>≤≥])", text)
    if len(parts) == 3 and re.fullmatch(r"[a-z]", parts[2].strip()):  # 3 < x
        parts = [parts[2], {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}[parts[1]], parts[0]]
    if len(parts) == 3 and re.fullmatch(r"[a-z]", parts[0].strip()):
        end, open_ = parts[2].strip(), parts[1] in "<>"
        return (("(", "- inf", end, ")" if open_ else "]") if parts[1] in "<≤" else
                ("(" if open_ else "[", end, "inf", ")"))
    if len(parts) == 5 and re.fullmatch(r"[a-z]", parts[2].strip()):
        if parts[1] in ">≥":
            parts = [parts[4], parts[3].translate(str.maketrans(">≥", "<≤")), parts[2],
                     parts[1].translate(str.maketrans(">≥", "<≤")), parts[0]]
        return ("(" if parts[1] == "<" else "[", parts[0].strip(), parts[4].strip(),
                ")" if parts[3] == "<" else "]")
    return None


def same_equation(a, b):
    """left = right on both sides: the differences are multiples of one another at every point."""
    def differences(text):
        left, right = text.split("=")
        return [x - y for x, y in zip(evaluate_at(left), evaluate_at(right))]

    x, y = differences(a), differences(b)
    return all(x) and all(y) and all(same(x[0] * d, y[0] * c) for c, d in zip(x, y))


def matrix(text):
    """The rows of a LaTeX matrix: [[entry, ...], ...], or None."""
    m = re.fullmatch(r"\\begin ?\{[bpvB]?(?:matrix|array)\}(?:\{[clr|]*\})?(.*)"
                     r"\\end ?\{[bpvB]?(?:matrix|array)\}", text)
    return m and [[e.strip() for e in row.split("&")] for row in m.group(1).strip().strip("\\")
                  .split("\\\\")]


def same_answer(a, b):
    """Two cleaned answers, by the first reading that fits both."""
    a, b = a.strip(), b.strip()
    if a.lower() == b.lower():
        return a != ""
    if "\\begin" in a or "\\begin" in b:
        x, y = matrix(a), matrix(b)
        return bool(x and y) and len(x) == len(y) and all(same_lists(r, s, True)
                                                          for r, s in zip(x, y))
    if "∪" in a or "∪" in b:
        return same_lists(split_top(a, "∪"), split_top(b, "∪"), False)
    if re.fullmatch(r"\\\{.*\\\}", a) or re.fullmatch(r"\\\{.*\\\}", b):
        x, y = (split_top(s[2:-2], ",") if s.startswith("\\{") else None for s in (a, b))
        return bool(x and y) and same_lists(x, y, False)
    x, y = interval(a), interval(b)
    if x and y:
        return x[0] == y[0] and x[3] == y[3] and same_end(x[1], y[1]) and same_end(x[2], y[2])
    pairs = [re.fullmatch(r"\((.*)\)", s) for s in (a, b)]
    if all(pairs) and any(len(split_top(p.group(1), ",")) > 1 for p in pairs):
        return same_lists(*(split_top(p.group(1), ",") for p in pairs), True)
    choice = [re.fullmatch(r"\(?([A-Z])(?:[.:)]+(?: .*)?)?", s) for s in (a, b)]
    if all(choice):
        return choice[0].group(1) == choice[1].group(1)
    lists = [split_top(re.sub(r",? and ", ", ", s), ",") for s in (a, b)]
    if max(map(len, lists)) > 1:
        return same_lists(*lists, False)
    for s in (a, b):
        if "±" in s:
            other = b if s is a else a
            return "±" in other and same_answer(a.replace("±", "+"), b.replace("±", "+"))
    if "=" in a and "=" in b and a.count("=") == b.count("=") == 1:
        return same_equation(a, b)
    a, b = (re.sub(r"^\\?[A-Za-z]\w* ?(?:\([a-z]\))? ?= ?", "", s) for s in (a, b))
    (a, unit_a), (b, unit_b) = split_unit(a), split_unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    if "%" in (unit_a, unit_b) and unit_a != unit_b and same_expression(a, b) is False:
        percent, plain = (a, b) if unit_a == "%" else (b, a)
        return same_expression(f"({percent})/100", plain)
    return same_expression(a, b)


def same_end(a, b):
    """Ends of intervals, which may be infinite."""
    infinite = [re.fullmatch(r"([+-]?) ?inf", s.strip()) for s in (a, b)]
    if any(infinite):
        return all(infinite) and (infinite[0].group(1) == "-") == (infinite[1].group(1) == "-")
    return same_answer(a, b)


def extract_boxed(text):
    """What the last \\boxed{...} of a text holds, braces balanced; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, at = 0, start + len("\\boxed")
    for brace in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[at + 1:brace.start()]
    return None


def grade(given, gold):
    """Whether an answer means the same as the gold one; never raises, never evaluates code.

    Exact fractions, decimals, percent, money, units, degrees, mixed and scientific numbers, pi and
    roots, sets, tuples, intervals and inequalities, matrices, polynomials, equations, text choices.
    Hedged answers ("9 or 10") are wrong. Both are strings (or None, which is wrong).

        grade("0.50", "\\\\frac{1}{2}") -> True     grade("x > 3", "(3, \\\\infty)") -> True
    """
    if given is None or gold is None:
        return False
    if len(given) > MAX_CHARS or len(gold) > MAX_CHARS:
        return given.strip() == gold.strip()
    if any(re.search(r"\b(?:or|either|maybe|approximately|about|roughly)\b", s, re.I)
           for s in (given,)) and given.strip().lower() != gold.strip().lower():
        return False
    try:
        return same_answer(clean(given), clean(gold))
    except (ValueError, ArithmeticError, RecursionError, AttributeError, IndexError):
        return False


# ---- running what a model wrote ----------------------------------------------------------------

GUARD = '''
import os, sys
home = os.path.realpath(os.getcwd()) + os.sep
def guard(event, args):
    if event.startswith(("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn",
                         "os.system", "os.kill", "ctypes.", "pty.")):
        raise PermissionError("not allowed here: " + event)
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0])) + os.sep
        writing = isinstance(args[1], str) and set(args[1]) & set("wax+") or \\
            isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writing and not path.startswith(home):
            raise PermissionError("not allowed here: writing " + path)
    if event in ("os.remove", "os.rmdir", "os.rename", "os.mkdir", "os.chmod", "os.chown",
                 "os.link", "os.symlink", "os.truncate", "shutil.rmtree"):
        if not (os.path.realpath(os.fsdecode(args[0])) + os.sep).startswith(home):
            raise PermissionError("not allowed here: " + event)
sys.addaudithook(guard)
'''


def limit_process(seconds, megabytes):
    """In the child, before it runs: own session, bounded time, memory, files, processes."""
    import resource
    os.setsid()
    for name, value in (("CPU", seconds + 1), ("AS", megabytes << 20), ("FSIZE", 16 << 20),
                        ("NOFILE", 64), ("CORE", 0), ("NPROC", 64)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    try:
        import ctypes
        ctypes.CDLL(None).unshare(0x40000000 | 0x10000000)  # no network, where the kernel allows
    except OSError:
        pass


def run_program(source, seconds=5, megabytes=1024):
    """Run a Python program that nobody has read: (whether it ended well, why not).

    A process of its own in an empty folder, with limits on CPU time, memory, file size and open
    files, without the network where the kernel lets us, and with an audit hook (PEP 578) that
    refuses sockets, other processes, and writing elsewhere. That stops accidents and lazy attacks.
    It is no jail: run models you distrust in a container or a virtual machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(GUARD + source, encoding="utf-8")
        child = subprocess.Popen([sys.executable, "-I", "-S", "program.py"], cwd=folder, text=True,
                                 env={"PATH": "/usr/bin:/bin", "HOME": folder},
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE,
                                 preexec_fn=lambda: limit_process(seconds, megabytes))
        try:
            errors = child.communicate(timeout=seconds)[1]
            why = errors.strip().splitlines()[-1][:200] if errors.strip() else ""
            return child.returncode == 0, why or ("" if child.returncode == 0 else
                                                  f"ended with {child.returncode}")
        except subprocess.TimeoutExpired:
            return False, f"more than {seconds} seconds"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


# ---- train.py's own checkpoint: against chance and an n-gram model -----------------------------


class NGram:
    """Trigram model of token ids, interpolated down to uniform (Witten & Bell 1991).

    P(c | h) = (count(h c) + kinds(h) P(c | shorter h)) / (count(h) + kinds(h)), where kinds(h) is
    how many different tokens followed h. Counts are sorted arrays of packed keys.
    """

    def __init__(self, ids, vocab_size, order=3):
        self.V, self.order, self.tables = vocab_size, order, []
        ids = np.asarray(ids, np.int64)
        for n in range(1, order + 1):
            keys, counts = np.unique(self.pack(ids, n), return_counts=True)
            context, first = np.unique(keys // vocab_size, return_index=True)
            kinds = np.diff(np.append(first, len(keys)))
            totals = np.add.reduceat(counts, first)
            best = np.array([keys[a + counts[a:b].argmax()] % vocab_size for a, b in
                             zip(first, np.append(first[1:], len(keys)))])
            self.tables.append((keys, counts, context, totals, kinds, best))

    def pack(self, ids, n):
        """Keys of the n-grams that end at places n - 1 ..: (len - n + 1,)."""
        key = np.zeros(len(ids) - n + 1, np.int64)
        for j in range(n):
            key = key * self.V + ids[j:len(ids) - n + 1 + j]
        return key

    def score(self, ids):
        """(log-probability, is it the likeliest) of every id but the first `order` - 1."""
        ids, skip = np.asarray(ids, np.int64), self.order - 1
        p = np.full(len(ids) - skip, 1 / self.V)
        guess = np.full(len(p), -1)
        for n, (keys, counts, context, totals, kinds, best) in enumerate(self.tables, 1):
            key = self.pack(ids, n)[skip - n + 1:]
            at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            count = np.where(keys[at] == key, counts[at], 0)
            at = np.minimum(np.searchsorted(context, key // self.V), len(context) - 1)
            known = context[at] == key // self.V
            t, k = np.where(known, totals[at], 0), np.where(known, kinds[at], 1)
            p = (count + k * p) / (t + k)
            guess = np.where(known, best[at], guess)
        return np.log(p), guess == ids[skip:]


def next_tokens(model, ids, batch=16):
    """(log-probability, is it the likeliest) of ids from full windows that do not overlap."""
    T, scores, hits, targets = model.config.context_length, [], [], []
    starts = list(range(0, len(ids) - T, T))
    for i in range(0, len(starts), batch):
        rows = np.stack([ids[s:s + T + 1] for s in starts[i:i + batch]]).astype(np.int64)
        rows = torch.from_numpy(rows)
        with torch.inference_mode():
            logits = model(rows[:, :-1].to(model.embed.weight.device)).float()  # (B, T, V)
        target = rows[:, 1:].to(logits.device)
        scores.append(-torch.nn.functional.cross_entropy(logits.mT, target, reduction="none").cpu())
        hits.append((logits.argmax(-1) == target).cpu())
        targets.append(target.cpu())
    return tuple(torch.cat(x).flatten().numpy() for x in (scores, hits, targets))


def continuation_items(ids, T, count, seed=0):
    """[(context, four continuations)]: first the true next 64 ids, then three from elsewhere."""
    rng, n = np.random.default_rng(seed), min(64, T // 4)
    starts = rng.integers(0, len(ids) - T, (count, 4))
    return [(ids[s[0]:s[0] + T - n].tolist(),
             [ids[s[0] + T - n:s[0] + T].tolist(), *(ids[o:o + n].tolist() for o in s[1:])])
            for s in starts]


def data_name(folder):
    """What train.py called the data of a checkpoint, or of the one that align.py started from."""
    state = Path(folder or "") / "train_state.pt"
    if not folder or not state.exists():
        raise ValueError(f"{folder or 'the checkpoint'}: has no train_state.pt of train.py to find "
                         "its validation text by; give --task NAME=FILE")
    settings = torch.load(state, weights_only=True, mmap=True)["settings"]
    return settings.get("data_name") or data_name(settings.get("model"))


def evaluate_checkpoint(args):
    """Bits per byte, next-token accuracy and choosing the true continuation, on held-out text."""
    model, tok = load_model(args)
    folder = Path(args.cache) / data_name(args.model)
    if not (folder / "val.npy").exists():
        raise ValueError(f"{folder}/val.npy: not there; --cache is the folder that train.py wrote")
    train, val = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("train", "val"))
    val = val[:args.limit * model.config.context_length + 1] if args.limit else val
    lengths = np.zeros(tok.vocab_size)
    for i, word in tok.vocab.items():
        lengths[i] = 0 if i in tok.special_tokens.values() else len(word)
    say(f"model       {args.model}: {model.num_parameters() / 1e6:.2f}M parameters\n"
        f"text        {len(val):,} validation tokens, {lengths[np.asarray(val)].sum():,.0f} bytes")
    ngram = NGram(train[:20_000_000], tok.vocab_size)
    ours, theirs = next_tokens(model, val), ngram.score(val)
    items = continuation_items(val, model.config.context_length, args.items)
    pairs = [(c, d) for c, choices in items for d in choices]
    likely = np.array([s for s, _ in score_tokens(model, pairs)]).reshape(-1, 4)
    likely_ngram = np.array([ngram.score(c[-2:] + d)[0].sum() for c, d in pairs]).reshape(-1, 4)
    nats_per_byte = lengths[ours[2]].sum() / len(ours[2])
    rows = [("bits per byte", -ours[0].mean() / nats_per_byte / math.log(2),
             -theirs[0].mean() / (lengths[np.asarray(val)[2:]].mean()) / math.log(2),
             math.log2(tok.vocab_size) / nats_per_byte),
            ("next-token accuracy", ours[1].mean(), theirs[1].mean(), 1 / tok.vocab_size),
            ("continuation choice", (likely.argmax(1) == 0).mean(),
             (likely_ngram.argmax(1) == 0).mean(), 0.25)]
    say(f"\n{'':<22}{'model':>10}{'95 %':>18}{'trigrams':>10}{'chance':>10}")
    per_window = ours[0].reshape(-1, model.config.context_length).mean(1)
    rate = 1 / nats_per_byte / math.log(2)
    spans = [tuple(v * rate for v in confidence_interval(-per_window)),
             confidence_interval(ours[1].reshape(-1, model.config.context_length).mean(1)),
             confidence_interval(likely.argmax(1) == 0)]
    for (label, *values), (low, high) in zip(rows, spans):
        say(f"{label:<22}{values[0]:>10.4f}{f'{low:.4f} - {high:.4f}':>18}{values[1]:>10.4f}"
            f"{values[2]:>10.4f}")
    overlap = ngram_overlap(val, train, 13)
    verbatim = verbatim_rate(model, train, args.items)
    say(f"\n{overlap:.1%} of the validation text's 13-grams of tokens also occur in training; of "
        f"{args.items} training windows\n{verbatim:.1%} are continued verbatim for 32 tokens after "
        "a prompt of 32")
    return {label: values[0] for label, *values in rows}


def ngram_overlap(ids, train, n=13):
    """Share of the n-grams of ids that also occur in train: contamination, or common phrases."""
    def keys(a):
        a, key = np.asarray(a).astype(np.uint64), np.zeros(max(0, len(a) - n + 1), np.uint64)
        for j in range(n):  # a polynomial hash mod 2^64
            key = key * np.uint64(0x9E3779B97F4A7C15) + a[j:len(key) + j] + np.uint64(1)
        return key

    wanted, seen = keys(ids), np.zeros(0, np.uint64)
    if not len(wanted):
        return 0.0
    found = np.zeros(len(wanted), bool)
    for i in range(0, len(train), 1 << 22):
        seen = np.sort(keys(train[i:i + (1 << 22) + n - 1]))
        if len(seen):
            found |= seen[np.minimum(np.searchsorted(seen, wanted), len(seen) - 1)] == wanted
    return float(found.mean())


def verbatim_rate(model, train, count, seed=0):
    """Share of training windows whose next 32 tokens the model writes greedily, exactly."""
    length = min(32, model.config.context_length // 2 - 1)
    starts = np.random.default_rng(seed).integers(0, len(train) - 2 * length, count)
    prompts = [train[s:s + length].tolist() for s in starts]
    done = model.generate(prompts, length, temperature=0.0)
    return float(np.mean([c.tokens == train[s + length:s + 2 * length].tolist()
                          for c, s in zip(done, starts)]))


# ---- running tasks and reporting ---------------------------------------------------------------

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def load_model(args):
    device = args.device if args.device != "auto" else (
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    model = model_py.Transformer.from_pretrained(args.model, dtype=dtype).to(device).eval()
    return model, tokenizer_py.Tokenizer.load(args.model)


class Progress:
    """One line that counts, with the time left; nothing where the output is a file."""

    def __init__(self, label):
        self.label, self.start = label, time.time()

    def __call__(self, done, total):
        if RANK == 0 and sys.stderr.isatty():
            left = (time.time() - self.start) * (total - done) / done
            end = "\n" if done == total else ""
            print(f"\r{self.label}: {done}/{total}, {left:.0f} s left ", end=end, file=sys.stderr)


def run_task(name, path, model, tok, args):
    """Score one task; returns its results, one dict an item, the same on every rank."""
    reader, kind, _ = TASKS[name]
    items = list(reader(path))[:args.limit or None]
    if not items:
        raise ValueError(f"{path}: no items of {name} in it")
    shots = []
    if args.few_shot:
        folder = Path(path) / "dev"
        source = args.shots or (folder if folder.is_dir() else None)
        if not source:
            raise ValueError(f"--few-shot {args.few_shot}: give --shots, a file of worked examples")
        per_group = Counter()
        for shot in reader(source):
            per_group[shot.group] += 1
            shots += [shot] if per_group[shot.group] <= args.few_shot else []
    add_shots(items, shots, tok=tok if args.chat else None)
    limit = model.config.context_length
    longest = [len(tok.encode((i.contexts or [i.context])[0], allowed_special=())) for i in items]
    cut = sum(n > limit for n in longest) if kind != "rolling" else 0
    mine = items[RANK::WORLD_SIZE]
    generating = kind in ("gsm8k", "math", "code", "outputs")
    options = (dict(max_new_tokens=min(args.max_new_tokens, limit // 2)) if generating else
               dict(progress=Progress(name)))
    results = SCORERS[kind](model, tok, mine, options) if mine else []
    if WORLD_SIZE > 1:
        parts = [None] * WORLD_SIZE
        torch.distributed.all_gather_object(parts, results)
        results = [parts[i % WORLD_SIZE][i // WORLD_SIZE] for i in range(len(items))]
    for i, (item, result) in enumerate(zip(items, results)):
        result |= dict(task=name, index=i, group=item.group,
                       prompt=(item.contexts or [item.context])[0])
    if cut:
        say(f"{name}: {cut} of {len(items)} items are longer than the context of {limit}; their "
            "left was cut off")
    return results


def report(results, path=None):
    """Print every task's metrics with 95 % intervals; returns {(task, metric): value}."""
    say(f"\n{'task':<14}{'metric':<18}{'value':>10}{'95 %':>23}{'items':>8}")
    table, lines = {}, []
    for task in dict.fromkeys(r["task"] for r in results):
        mine = [r for r in results if r["task"] == task]
        for metric, (value, low, high) in summarise(mine).items():
            shown = [f"{v:.4f}" if v < 1e4 else f"{v:.4g}" for v in (value, low, high)]
            span = "" if math.isnan(low) else f"{shown[1]} - {shown[2]}"
            say(f"{task:<14}{metric:<18}{shown[0]:>10}{span:>23}{len(mine):>8}")
            lines.append((task, metric, shown[0], span, str(len(mine))))
            table[task, metric] = value
    if path:
        write_card(path, lines, results)
    return table


def write_card(path, lines, results, samples=3):
    """A report card beside the results: tables and a few failures, as PATH.md and PATH.html."""
    failures = []
    for task in dict.fromkeys(r["task"] for r in results):
        metric = TASKS[task][2]
        wrong = [r for r in results if r["task"] == task and r.get(metric) == 0.0][:samples]
        failures += [(task, r["prompt"][-600:], str(r.get("output", ""))[:400],
                      str(r.get("gold", ""))) for r in wrong]
    head = ("task", "metric", "value", "95 %", "items")
    md = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * 5, *lines)]
    for task, prompt, output, gold in failures:
        md += [f"\n**{task}, wrong**\n", "```", prompt, "```",
               f"said `{output!r}`, right: `{gold}`"]
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
                    for row in (head, *lines))
    blocks = "".join(f"<h3>{t}, wrong</h3><pre>{html.escape(p)}</pre><p>said <code>"
                     f"{html.escape(o)}</code>, right: <code>{html.escape(g)}</code></p>"
                     for t, p, o, g in failures)
    page = (f"<!doctype html><meta charset=utf-8><title>evaluation</title><style>body{{font:15px "
            "sans-serif;max-width:60em;margin:2em auto}td{padding:2px 12px}pre{background:#eee;"
            f"padding:8px;white-space:pre-wrap}}</style><table>{cells}</table>{blocks}\n")
    write_whole(f"{path}.md", "\n".join(md) + "\n")
    write_whole(f"{path}.html", page)


def write_whole(path, text):
    beside = Path(f"{path}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def compare(paths):
    """Two results files over the same items: difference, and how likely chance alone makes it."""
    first, second = ({(r["task"], r["index"]): r for r in rows_of(p, "task", "index")}
                     for p in paths)
    common = sorted(set(first) & set(second))
    if not common:
        raise ValueError(f"--compare: {paths[0]} and {paths[1]} have no items in common")
    say(f"{'task':<14}{'metric':<12}{'A':>9}{'B':>9}{'B - A':>9}{'p':>9}{'items':>8}")
    for task in dict.fromkeys(t for t, _ in common):
        keys = [k for k in common if k[0] == task]
        metric = TASKS[task][2] if TASKS[task][2] in first[keys[0]] else "loglikelihood"
        a, b = ([side[k][metric] for k in keys] for side in (first, second))
        difference, p = paired_test(a, b)
        say(f"{task:<14}{metric[:11]:<12}{np.mean(a):>9.4f}{np.mean(b):>9.4f}{difference:>+9.4f}"
            f"{p:>9.4f}{len(keys):>8}")


def contamination(args):
    """--train-tokens: how much of the tasks' questions is in the training tokens, by 13-grams."""
    _, tok = load_model(args)
    train = np.load(args.train_tokens, mmap_mode="r")
    for name, path in args.task:
        shares = [ngram_overlap(tok.encode_numpy(i.context), train) for i in TASKS[name][0](path)]
        say(f"{name:<14}{np.mean(shares):.2%} of the questions' 13-grams are in training; "
            f"{sum(s > 0.5 for s in shares)} of {len(shares)} questions more than half")


# ---- command line ------------------------------------------------------------------------------


def task_flag(text):
    name, _, path = text.partition("=")
    if name not in TASKS or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with NAME one of "
                                         f"{', '.join(TASKS)}")
    return name, path


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="out", help="folder of a checkpoint (default: %(default)s)")
    add("--task", action="append", default=[], type=task_flag, metavar="NAME=PATH",
        help=f"a task and its file or folder, any number of times: {', '.join(TASKS)}")
    add("--few-shot", type=int, default=0, help="worked examples before each (default: 0)")
    add("--shots", help="file of the worked examples (default: the task's dev folder)")
    add("--chat", action="store_true", help="put each prompt into the chat template")
    add("--limit", type=int, default=0, help="items a task, 0 for all (default: 0)")
    add("--max-new-tokens", type=int, default=256, help="tokens an answer (default: %(default)s)")
    add("--results", help="file for one line of JSON an item; PATH.md and PATH.html beside it")
    add("--compare", nargs=2, metavar=("A", "B"), help="paired test of two results files")
    add("--train-tokens", help="a .npy of training tokens: look for the tasks' questions in it")
    add("--cache", default="data", help="train.py's cache, for its checkpoint (default: data)")
    add("--items", type=int, default=200, help="continuations to choose (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    add("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="(default: fp32)")
    return parser


def evaluate(args):
    if args.compare:
        return compare(args.compare)
    if args.train_tokens:
        return contamination(args)
    if not args.task:
        return evaluate_checkpoint(args)
    model, tok = load_model(args)
    results = []
    for name, path in args.task:
        results += run_task(name, path, model, tok, args)
    if args.results and RANK == 0:
        write_whole(args.results, "".join(json.dumps(r) + "\n" for r in results))
    return report(results, args.results if RANK == 0 else None)


def main(argv=None):
    args = make_parser().parse_args(argv)
    if WORLD_SIZE > 1:
        torch.distributed.init_process_group("gloo")
    try:
        return evaluate(args)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("evaluate.py: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if WORLD_SIZE > 1:
            torch.distributed.destroy_process_group()
            time.sleep(0.3)  # gloo's threads need Python once more (distributed.close_distributed)


if __name__ == "__main__":
    main()
