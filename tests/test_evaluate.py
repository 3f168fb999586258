"""evaluate.py against hand counts, brute force, simulations, and answers graded by eye."""

import csv
import gzip
import json
import math
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

import evaluate
import model as model_py
import tokenizer as tokenizer_py


@pytest.fixture(scope="module")
def tok():
    texts = [f"The answer of {i} and {i + 1} is {2 * i + 1}. A cat sat.\n" for i in range(60)]
    return tokenizer_py.Tokenizer(*tokenizer_py.train_bpe(iter(texts), 400, ["<|endoftext|>"]),
                                  ["<|endoftext|>"])


@pytest.fixture(scope="module")
def model(tok):
    torch.manual_seed(0)
    config = model_py.ModelConfig(vocab_size=tok.vocab_size, d_model=32, num_layers=2, num_heads=2,
                                  d_ff=64, context_length=48)
    return model_py.Transformer(config).eval()


@pytest.fixture(scope="module")
def folder(model, tok, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    model.save_pretrained(out)
    tok.save(out)
    return out


def total(score):
    """(log-probabilities, greedy) of each token -> their sum, and whether all are greedy."""
    return score[0].sum().item(), bool(score[1].all())


def slow_score(model, context, continuation):
    """One token at a time, without padding, batches or a cache."""
    ids, total, greedy = list(context), 0.0, True
    for token in continuation:
        with torch.no_grad():
            logits = model(torch.tensor([ids[-model.config.context_length:]]))[0, -1].double()
        total += logits.log_softmax(-1)[token].item()
        greedy &= logits.argmax().item() == token
        ids.append(token)
    return total, greedy


# ---- primitives ----------------------------------------------------------------------------------


def test_pairs_are_cut_where_the_harness_cuts(tok):
    left, right = evaluate.encode_pair(tok, "The answer is ", "7.")
    assert tok.decode(left) == "The answer is" and tok.decode(right) == " 7."
    assert left + right == tok.encode("The answer is 7.")
    assert evaluate.encode_pair(tok, "", "A")[0] == [tok.eot_id]


def test_special_tokens_in_a_text_are_special_as_in_the_harness(tok):
    left, right = evaluate.encode_pair(tok, "A cat<|endoftext|>A", " cat")
    assert left.count(tok.eot_id) == 1 and tok.decode(right) == " cat"
    assert evaluate.encode_pair(tok, "", "<|endoftext|>A") == ([tok.eot_id], tok.encode("A"))


@pytest.mark.parametrize("shared", [True, False])
def test_scores_equal_one_token_at_a_time(model, tok, shared):
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, model.config.vocab_size, 20).tolist() if shared else []
    V = model.config.vocab_size
    pairs = [(prefix + rng.integers(0, V, rng.integers(1, 12)).tolist(),
              rng.integers(0, V, rng.integers(1, 9)).tolist()) for _ in range(23)]
    pairs += [pairs[0], (pairs[0][0], pairs[1][1]), (pairs[0][0], [])]
    for size in (40, 200, 16384):
        for ours, (c, d) in zip(evaluate.score_tokens(model, pairs, batch_tokens=size), pairs):
            score, greedy = slow_score(model, c, d)
            assert len(ours[0]) == len(d)
            assert total(ours) == (pytest.approx(score, abs=1e-4), greedy)


def test_greedy_is_seen(model, tok):
    ids = model.generate([[5, 6, 7]], 4, temperature=0.0)[0].tokens
    (score, greedy), (_, other) = map(total, evaluate.score_tokens(
        model, [([5, 6, 7], ids), ([5, 6, 7], [*ids[:3], (ids[3] + 1) % model.config.vocab_size])]))
    assert greedy and not other and score < 0


def test_an_item_longer_than_the_context_loses_its_left(model):
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 100).tolist()
    (cut, _), (short, _) = map(total, evaluate.score_tokens(
        model, [(ids[:95], ids[95:]), (ids[51:95], ids[95:])]))
    assert cut == pytest.approx(short, abs=1e-4)  # 48 + 1 tokens are what fits


def test_rolling_windows_are_the_documented_ones():
    windows = evaluate.rolling_windows(list(range(10)), "p", 4)
    assert windows == [(["p"], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]


def test_rolling_scores_every_token_once(model, tok):
    text = "The answer of 3 and 4 is 7. " * 12
    ids, score = tok.encode(text), 0.0
    for context, predicted in evaluate.rolling_windows(ids, tok.eot_id, 48):
        score += slow_score(model, context, predicted)[0]
    assert sum(len(p) for _, p in evaluate.rolling_windows(ids, tok.eot_id, 48)) == len(ids) > 96
    scores = evaluate.loglikelihood_rolling(model, tok, [text, ""])
    assert scores == pytest.approx([score, 0.0], abs=1e-3)


def test_generate_until_stops_before_the_string(model, tok):
    plain = evaluate.generate_until(model, tok, [("A cat", ())], 20)[0]
    stop = plain[3:5]
    assert evaluate.generate_until(model, tok, [("A cat", (stop,))], 20) == [
        plain[:plain.find(stop)]]


# ---- metrics -------------------------------------------------------------------------------------


def test_pass_at_k_by_enumeration():
    from itertools import combinations
    for n, c, k in ((5, 2, 1), (6, 2, 3), (7, 0, 2), (4, 4, 4), (8, 3, 5)):
        draws = list(combinations(range(n), k))
        assert evaluate.pass_at_k(n, c, k) == pytest.approx(
            sum(min(d) < c for d in draws) / len(draws))


def test_the_interval_of_a_share_is_the_textbooks():
    interval = evaluate.confidence_interval
    assert interval([1] * 8 + [0] * 2) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert interval([0] * 20)[1] == pytest.approx(0.1611, abs=2e-4)


@pytest.mark.parametrize("kind", ["share", "skewed"])
def test_intervals_cover_what_they_promise(kind):
    """600 simulated evaluations: a coverage of 95 % shows as 93 to 97 % but for once in 40."""
    rng, hits = np.random.default_rng(0 if kind == "share" else 3), 0
    for i in range(600):
        x = rng.random(150) < 0.3 if kind == "share" else rng.exponential(2.0, 150)
        low, high = evaluate.confidence_interval(x, 300, seed=i)
        hits += low <= (0.3 if kind == "share" else 2.0) <= high
    assert 0.93 <= hits / 600 <= 0.97


def test_calibration_error_by_hand():
    assert evaluate.calibration_error([0.95, 0.95, 0.15, 0.15], [1, 0, 0, 0]) == pytest.approx(
        (2 * 0.45 + 2 * 0.15) / 4)


def test_paired_test_tells_noise_from_a_difference():
    rng = np.random.default_rng(0)
    a = (rng.random(400) < 0.5).astype(float)
    better = np.maximum(a, rng.random(400) < 0.1)
    shuffled = rng.permutation(a)
    assert evaluate.paired_test(a, better)[1] < 0.001 < 0.05 < evaluate.paired_test(a, shuffled)[1]
    # 3 of 3 differences in one direction: 2 of the 8 sign patterns are as extreme
    assert evaluate.paired_test([0, 0, 0], [1, 1, 1])[1] == pytest.approx(0.25, abs=0.02)


# ---- tasks ---------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    d = tmp_path_factory.mktemp("tasks")
    for split, n in (("test", 5), ("dev", 2)):
        (d / "mmlu" / split).mkdir(parents=True)
        with open(d / "mmlu" / split / f"odd_sums_{split}.csv", "w", newline="") as f:
            for i in range(n):
                csv.writer(f).writerow([f"What is {i} + 1?", i, i + 1, i + 2, "a, b", "B"])
    ai2 = dict(question=dict(stem="2 + 2?", choices=[dict(text="4", label="1"),
                                                     dict(text="5", label="2")]), answerKey="1")
    flat = dict(question="1 + 2?", choices=dict(text=["9", "3"], label=["A", "B"]), answerKey="B")
    write(d / "arc.jsonl", [ai2, flat])
    write(d / "hellaswag.jsonl", [dict(ctx_a="A man sits.", ctx_b="he", activity_label="Sitting",
                                       endings=["stands [step] up.", " falls [title] down."],
                                       label="1")])
    write(d / "piqa.jsonl", [dict(goal="Open a door", sol1="push", sol2="sing", label=0)])
    write(d / "winogrande.jsonl", [dict(sentence="The cup fell because _ was wet.", option1="it",
                                        option2="sun", answer="1")])
    write(d / "lambada.jsonl", [dict(text="The answer of 3 and 4 is 7.")])
    write(d / "wikitext.jsonl", [dict(text="A cat sat.\nThe cat is 9."), dict(text="A cat.")])
    write(d / "gsm8k.jsonl", [dict(question="1 + 1?", answer="It is\n#### 1,002")])
    write(d / "math.jsonl", [dict(problem="1/2 + 1/2?", solution="So \\boxed{1}.")])
    write(d / "humaneval.jsonl", [dict(prompt="def f():\n", test="def check(f): f()",
                                       entry_point="f")])
    write(d / "instructions.jsonl", [dict(instruction="Say hi", dataset="x")])
    return d


def test_prompts_are_the_harness_ones(data):
    items = {name: evaluate.read_items(name, data / f"{name.removesuffix('_zero')}.jsonl")
             for name in evaluate.TASKS if "mmlu" not in name and name != "wikitext"}
    mmlu = evaluate.read_items("mmlu", data / "mmlu")[0]
    assert evaluate.read_items("mmlu_zero", data / "mmlu")[0].gold == "B"
    assert items["gsm8k_zero"][0].context == "1 + 1?\nAnswer:"
    assert mmlu.context == "What is 0 + 1?\nA. 0\nB. 1\nC. 2\nD. a, b\nAnswer:" and mmlu.gold == 1
    assert [i.gold for i in items["arc"]] == [0, 1]
    assert items["arc"][0].context == "Question: 2 + 2?\nAnswer:"
    hellaswag = items["hellaswag"][0]
    assert hellaswag.context == "Sitting: A man sits. He"
    assert hellaswag.choices == ["stands up.", "falls. down."]
    wino = items["winogrande"][0]
    assert wino.contexts[0] == "The cup fell because it" and wino.choices == ["was wet."] * 2
    assert items["lambada"][0].choices == ["7."] and items["gsm8k"][0].gold == "1,002"


def test_line_breaks_inside_fields_and_strings_stay(tmp_path):
    with open(tmp_path / "x_test.csv", "w", newline="") as f:
        csv.writer(f).writerow(["one\ntwo", "a", "b", "c", "d", "A"])
    assert evaluate.read_items("mmlu", tmp_path)[0].context.startswith("one\ntwo\nA. a")
    (tmp_path / "t.jsonl").write_text('{"text": "a\u2028b c"}\n', encoding="utf-8")
    assert evaluate.read_items("lambada", tmp_path / "t.jsonl")[0].context == "a\u2028b"
    (tmp_path / "x_test.csv").write_text("q,a,b,c,d,\n")
    with pytest.raises(ValueError, match="row 1"):
        evaluate.read_items("mmlu", tmp_path)

def test_packed_task_files_are_read_and_torn_ones_named(tmp_path):
    packed = gzip.compress(b'{"text": "a b"}\n')
    (tmp_path / "t.jsonl.gz").write_bytes(packed)
    assert evaluate.read_items("lambada", tmp_path / "t.jsonl.gz")[0].context == "a"
    for torn in (packed[:20], b"\xff" + packed, gzip.compress(b"\xff")):
        (tmp_path / "t.jsonl.gz").write_bytes(torn)
        with pytest.raises(ValueError, match="t.jsonl.gz: "):
            evaluate.read_items("lambada", tmp_path / "t.jsonl.gz")



def test_shots_come_with_their_subjects_heading(data):
    items, shots = (evaluate.read_items("mmlu", data / "mmlu"),
                    [evaluate.Item("What is 9 + 1?\nAnswer:", 2, list("ABCD"), group="odd sums"),
                     evaluate.Item("Other?", 2, list("ABCD"), group="elsewhere")])
    evaluate.add_shots(items, shots)
    assert items[0].context.startswith(
        "The following are multiple choice questions (with answers) about odd sums.\n\n"
        "What is 9 + 1?\nAnswer: C\n\nWhat is 0 + 1?\n") and "Other" not in items[0].context


def test_examples_without_an_answer_are_refused(data):
    items = evaluate.read_items("humaneval", data / "humaneval.jsonl")
    with pytest.raises(ValueError, match="few-shot"):
        evaluate.add_shots(items, items)


def test_every_task_runs_and_is_reported(data, folder, tok, tmp_path, capsys):
    seen = evaluate.read_items("mmlu", data / "mmlu")[0].context  # one question of five
    np.save(tmp_path / "seen.npy", tok.encode(seen))
    flags = ["--model", str(folder), "--results", str(tmp_path / "r.jsonl")]
    flags += ["--train-tokens", str(tmp_path / "seen.npy")]
    flags += ["--max-new-tokens", "8"]
    for name in evaluate.TASKS:
        file = name.removesuffix("_zero")
        flags += ["--task", f"{name}={data / (file if file == 'mmlu' else f'{file}.jsonl')}"]
    table = evaluate.main([*flags, "--few-shot", "0"])
    results = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {r["task"] for r in results} == set(evaluate.TASKS) and len(results) == 23
    assert 0.2 <= table["mmlu", "overlap"] < 1 and table["arc", "overlap"] == 0
    assert 0 <= table["mmlu", "acc"] <= 1 and table["wikitext", "bits_per_byte"] > 1
    for name in ("r.jsonl.md", "r.jsonl.html"):
        assert "bits_per_byte" in (tmp_path / name).read_text()
    evaluate.main(["--compare", str(tmp_path / "r.jsonl"), str(tmp_path / "r.jsonl")])
    assert "1.0000" in capsys.readouterr().out  # the same model: no evidence of a difference


def test_choices_are_ranked_by_four_norms(model, tok):
    """Checked against the slow scores, with choices of different length."""
    item = evaluate.Item("The answer", 1, ["of 3 and 4 is", "é", "A cat sat."])
    result = evaluate.score_choices(model, tok, [item], Namespace(progress=None))[0]
    pairs = [evaluate.encode_pair(tok, item.context, " " + c) for c in item.choices]
    ll = np.array([slow_score(model, *p)[0] for p in pairs])
    for name, norm in (("acc", [1, 1, 1]), ("acc_norm", [13, 1, 10]), ("acc_bytes", [13, 2, 10]),
                       ("acc_tokens", [len(d) for _, d in pairs])):
        assert result["metrics"][name] == float((ll / norm).argmax() == 1), name
    assert result["loglikelihoods"] == pytest.approx(ll.tolist(), abs=1e-4)


def test_parsers_of_the_course():
    parse = evaluate.parse_mmlu_response
    assert parse([], "The correct answer is B.") == "B" and parse([], "(C) because") == "C"
    assert parse([], "I do not know") is None
    assert evaluate.parse_gsm8k_response("3 cats and 1,204.50 dogs") == "1204.50"
    assert evaluate.parse_gsm8k_response("none") is None


# ---- the grader ----------------------------------------------------------------------------------

RIGHT = r"""5|5 5.0|5 +5|5 1/2|0.5 \frac{1}{2}|0.5 \frac12|1/2 \dfrac{3}{4}|0.75 \tfrac{6}{8}|3/4
1,234|1234 1,234,567|1234567 \$5|5 $5.00|5 50%|50 50\%|0.5 12.5%|0.125 .5|0.5 -3|-3.0 007|7
1.2e5|120000 3E-2|0.03 2^{10}|1024 2^10|1024 \sqrt{16}|4 2\sqrt{3}|\sqrt{12} \sqrt3|3^{1/2}
\frac{\sqrt{2}}{2}|\frac{1}{\sqrt{2}} \pi/2|\frac{\pi}{2} \frac{3\pi}{4}|0.75\pi 90^\circ|90
90^{\circ}|90 x=5|5 x^2+2x+1|(x+1)^2 2x+3|3+2x y=2x+3|2x-y+3=0 y=2x|2y=4x a+b|b+a x(x-1)|x^2-x
\frac{x+1}{2}|x/2+1/2 (1,2)|(1,2.0) (1,\infty)|x>1 x>1|1<x (-\infty,3]|x\leq3
x\in[1,2]|[1,2] \{1,2,3\}|\{3,2,1\} 1,2|2,1 (A)|A A.|(A) yes|Yes 10!|3628800 \sqrt[3]{8}|2
8^{1/3}|2 8^{\frac{2}{3}}|4 2±\sqrt{3}|2\pm\sqrt{3} \boxed{7}|7 \boxed{\frac{1}{3}}|1/3
(-1,2)\cup(3,4)|(3,4)\cup(-1,2) \left(\frac{1}{2},3\right)|(0.5,3) 0.1+0.2|0.3 3:4|3:4 |x||x|
\begin{pmatrix}1&2\\3&4\end{pmatrix}|\begin{bmatrix}1.0&2\\3&4\end{bmatrix} 2\cdot3|6 6\div2|3
-\frac{1}{2}|-0.5 \frac{-1}{2}|-1/2 100\pi|314.1592653589793 e+1|1+e (x-1)(x+1)|x^2-1 -x|-1x
(0,1]|0<x\le1 x\geq2|[2,\infty) 5\text{cm}|5 5cm|5cm 2^{-1}|0.5 (2)(3)|6 1e3|1,000 3!|6"""
RIGHT_WITH_BLANKS = [
    ("$5.00", "5 dollars"), ("3 1/2", "3.5"), (r"3\frac{1}{2}", "7/2"), ("2 pi", r"2\pi"),
    (r"1.2 \times 10^5", "120000"), ("90°", "90 degrees"), (r"5\text{ cm}", "5 centimeters"),
    ("12 apples", "12"),
    ("5 cm^2", "5 square cm"), ("1 and 2", "1,2"), ("B. cat", "B"), ("Evelyn", "evelyn"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("The answer is \\boxed{12}", "12"), ("- 3", "-3"), ("100 miles per hour", "100 mi/h"),
    ("7 hours", "7 h"), ("42.", "42"), (" 8 ", "8"), ("1, 2, and 3", "3, 2, 1"), ("3 feet", "3 ft"),
    ("the red one", "The red one"), ("[2,5)", r"2 \le x < 5"), ("x = \\frac{1}{4}", "0.25"),
    ("1 000", "1 000"),
    ("f(x) = x^2 + 1", "x^2 + 1"), ("20 percent", "20%"), ("2 kilograms", "2 kg")]
WRONG = r"""5|6 0.333|1/3 12,34|1234 1,234|1235 (1,2)|[1,2] (1,2)|(2,1) x>1|x\ge1 x>1|x<1 50%|5
(1,\infty)|(1,2) 50%|0.05 \{1,2\}|\{1,3\} \{1,2\}|\{1,2,3\} 1,2|1 1|1,2 A|B (A)|(B) 2x|x x|y
x^2+1|(x+1)^2 y=2x+3|y=2x+4 31/2|3.5 1e5|10000 10^{30}+1|10^{30} \sqrt{2}|1.41421 \pi|3.14
\pi|22/7 -3|3 3/0|5 3/0|3/1 2^10|20 yes|no x=5|x=6 3:4|4:3 (1,2,3)|(1,2) 5|50 0.5|0.05 1/2|2/1
\begin{pmatrix}1&2\\3&4\end{pmatrix}|\begin{pmatrix}1&3\\2&4\end{pmatrix} [1,2]|[1,3] 5!|5 e|2.718
(-1,2)\cup(3,4)|(-1,2)\cup(3,5) 2±3|2+3 x^3|x^2 \frac12|\frac13 1.0001|1 99999999|100000000 !|5
0.9999999|1 (2,3)|2 x+1|x-1 x\ge2|(2,\infty) 1|-1 |5 5| \sqrt{-4}|2 0|0.0001 1/3|0.33333333"""
WRONG_WITH_BLANKS = [
    ("9 or 10", "9"), ("9 or 10", "10"), ("either 3 or 4", "4"), ("about 5", "5"), ("5 cm", "5 m"),
    ("5 cm^2", "5 cm"), ("3 1/2", "3/2"), ("4 5", "45"), ("4 5", "9"), ("4 5", "20"),
    ("5 dollars", "5 cents"), ("90 degrees", "80 degrees"), ("5 apples 6", "5"), ("", ""),
    ("7 hours", "7 minutes"), ("maybe 5", "5"), ("5 and 6", "5"), ("the red one", "the blue one"),
    ("__import__('os').system('true')", "5"), ("2 kg", "2 g"), ("[1, 2", "[1, 2]"),
    ("A dog", "A cat"), ("A dog", "A")]


def pairs_of(table, more):
    pairs = []
    for word in table.split():
        left, _, right = word.partition("|") if word != "|x||x|" else ("|x|", "", "|x|")
        pairs.append((left, right))
    return pairs + more


def test_the_grader_accepts_and_refuses_what_a_teacher_would():
    right, wrong = pairs_of(RIGHT, RIGHT_WITH_BLANKS), pairs_of(WRONG, WRONG_WITH_BLANKS)
    assert len(right) + len(wrong) >= 150
    assert not [p for p in right if not evaluate.grade(*p)]
    assert not [p for p in wrong if evaluate.grade(*p)]
    assert not [(b, a) for a, b in wrong if evaluate.grade(b, a) and not ("or" in a or a == "")
                and a not in ("about 5", "maybe 5")]
    assert not evaluate.grade(None, "5") and not evaluate.grade("5", None)


@pytest.mark.parametrize("text", [
    "9^{9^{9^9}}", "99999999!", "(" * 10_000, "(" * 400 + "1" + ")" * 400, "1" * 10**6,
    "\\frac{" * 300 + "1" + "}{2}" * 300, "2^" * 240 + "2", "1," * 240 + "1", "-" * 490 + "1",
    "1/" * 240 + "1", ".5" * 240, "$" * 400, "((((((2)^9)^9)^9)^9)^9)^9", "x^999", "10^1000",
    "1e999", "\\boxed{" * 70, "5 cm " * 90, "square " * 60 + "m", "!" * 400, "\\{" + "x," * 240,
    "∪" * 400, "_{" * 160 + "}" * 160, "x^{" * 120 + "1" + "}" * 120, "|x|" * 160])
def test_no_input_takes_the_grader_long(text):
    for other in ("5", text + "1"):
        times = []
        for _ in range(3):
            start = time.process_time()
            assert not evaluate.grade(text, other)
            times.append(time.process_time() - start)
        assert min(times) < 0.01


@pytest.mark.parametrize("given, gold, verdict", [
    ("5 million", "5", False), ("5 million", "5,000,000", True), ("$1.5 billion", "1.5e9", True),
    ("2 dozen eggs", "24", True), ("2 dozen", "2", False), ("3 thousandths", "3000", False),
    (r"5\text{ million}", "5000000", True), ("x=5", "y=5", False), ("y=2x", "f(x)=2x", True),
    ("x=5, y=6", "x=6, y=5", False), ("y=6, x=5", "x=5, y=6", True), ("11_2", "11_{2}", True),
    ("11_2", "11_3", False), ("x = 5", "x=5.0", True)])
def test_number_words_and_names_count(given, gold, verdict):
    assert evaluate.grade(given, gold) == evaluate.grade(gold, given) == verdict


@pytest.mark.parametrize("text, flexible", [
    ("so $18.$", 1), ("#### 18.", 1), ("$18,.", 1), ("18.0", 0), ("1.8", 0)])
def test_gsm8k_numbers_are_tidied_as_the_harness_does(text, flexible):
    """Its regexes_to_ignore one after the other: commas, dollars, then a point at the end."""
    item = evaluate.Item("", "18")
    assert evaluate.judge_gsm8k(item, text)["flexible"] == flexible


def test_boxed_is_the_last_with_balanced_braces():
    assert evaluate.extract_boxed(r"\boxed{1} so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert evaluate.extract_boxed(r"\boxed{1") is None and evaluate.extract_boxed("1") is None


# ---- running programs ----------------------------------------------------------------------------


@pytest.mark.parametrize("source,ok,word", [
    ("x = sum(range(10))\nassert x == 45", True, ""),
    ("assert False, 'no'", False, "no"),
    ("while True: pass", False, "seconds"),
    ("import os\nwhile True: os.fork()", False, "not allowed"),
    ("x = bytearray(10 * 2**30)", False, "MemoryError"),
    ("open('/tmp/escaped-by-a-test', 'w').write('x')", False, "not allowed"),
    ("import socket\nsocket.create_connection(('127.0.0.1', 80))", False, "not allowed"),
    ("import subprocess\nsubprocess.run(['true'])", False, "not allowed"),
    ("import sys\nsys.exit(0)", False, "exit code 0"),  # before any test has run
    ("import sys\nwhile True: sys.stderr.write('x' * 1000000)", False, ""),  # the disk is bounded
    ("open('here.txt', 'w').write('x')\nassert open('here.txt').read() == 'x'", True, ""),
    ("from __future__ import annotations\ndef f(x: unknown): return x\nassert f(1)", True, ""),
    ("home = os = sys = None\nopen('/tmp/escaped-by-a-test', 'w')", False, "not allowed"),
    ("import ctypes\nctypes.CDLL(None).getpid()", False, "not allowed"),
    ("import typing\nclass A: x: 'B'\nclass B: pass\n"
     "assert typing.get_type_hints(A)['x'] is B and __name__ == '__main__'", True, ""),
])
def test_programs_are_contained(source, ok, word):
    start = time.time()
    passed, why = evaluate.run_program(source, seconds=2)
    assert (passed, word in why) == (ok, True), why
    assert time.time() - start < 6


def test_humaneval_runs_the_problem_and_the_answer_without_the_chat_around_them(tmp_path):
    path = write(tmp_path / "h.jsonl", [dict(
        prompt="from __future__ import annotations\ndef double(x: number):\n", entry_point="double",
        test="def check(f): assert f(2) == 4")])
    item, judge = evaluate.read_items("humaneval", path)[0], evaluate.TASKS["humaneval"].judge
    item.reword("Complete this, please: {}".format)
    assert judge(item, "    return 2 * x\n") == {"pass@1": 1.0}
    assert judge(item, "    return 3 * x\n") == {"pass@1": 0.0}


# ---- train.py's checkpoint -----------------------------------------------------------------------


def test_ngrams_by_hand():
    """abab ab: after (a, b) comes a three times of three; P is interpolated from below."""
    ngram = evaluate.NGram([0, 1, 0, 1, 0, 1, 0], 3)
    logp, hit = ngram.score([0, 1, 0])
    uni = (4 + 2 / 3) / (7 + 2)  # 4 zeros of 7, two kinds, a third each
    bi = (3 + uni) / (3 + 1)  # after 1: three times 0
    assert math.exp(logp[0]) == pytest.approx((3 + bi) / (3 + 1)) and hit.tolist() == [True]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, 200)
    ngram = evaluate.NGram(ids, 5)
    for context in ((1, 2), (4, 4), (0, 3)):
        total = sum(math.exp(ngram.score([*context, c])[0][0]) for c in range(5))
        assert total == pytest.approx(1)


def test_overlap_counts_shared_ngrams():
    train = np.arange(100)
    assert evaluate.ngram_overlap(np.arange(20, 40), train, 5) == 1.0
    mixed = np.concatenate([np.arange(20, 30), np.arange(500, 510)])
    assert evaluate.ngram_overlap(mixed, train, 5) == pytest.approx(6 / 16)  # 16 windows, 6 whole
    assert evaluate.ngram_overlap(np.arange(3), train, 5) == 0.0


def test_the_default_job_scores_a_checkpoint_of_train(tmp_path, monkeypatch, capsys):
    import train
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text("\n".join(
            f"{a} plus {i} makes {a + i}." for a in range(40)))
    train.main(["--num-layers", "1", "--d-model", "32", "--d-ff", "64", "--num-heads", "2",
                "--context-length", "32", "--batch-size", "8", "--vocab-size", "300", "--steps",
                "60", "--compile", "off", "--dtype", "fp32", "--sample-prompts", "--data", "text"])
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    capsys.readouterr()
    scores = evaluate.main(["--items", "40"])
    assert scores["bits per byte"] == pytest.approx(log[-1]["bits_per_byte"], rel=0.02)
    assert scores["next-token accuracy"] > 0.1 and "trigrams" in capsys.readouterr().out


# ---- a user's mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize("task,content,words", [
    ("arc", '{"question": "a"}', ["answerKey", "item 1"]), ("arc", "", ["no items"]),
    ("mmlu", "q,a,b,c,B\n", ["5 columns"]), ("lambada", "{", ["Expecting"]),
    ("lambada", '{"text": "alone"}', ["item 1", "lambada"]),
])
def test_bad_task_files_end_in_one_line(task, content, words, folder, tmp_path, capsys):
    path = tmp_path / ("x_test.csv" if task == "mmlu" else "x.jsonl")
    path.write_text(content)
    target = tmp_path if task == "mmlu" else path
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--model", str(folder), "--task", f"{task}={target}"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and all(w in message for w in words)


@pytest.mark.parametrize("flags", [["--task", "nothing=x"], ["--model", "nowhere"],
                                   ["--compare", "nowhere", "nowhere"]])
def test_wrong_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(flags)
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--model", str(tmp_path), "--task", "arc=x"])
    assert stop.value.code == 2 and "tokenizer" in capsys.readouterr().err


def test_scores_are_the_harness_ones(folder, model, tok):
    """Item by item, where lm-evaluation-harness is installed."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model_py.import_transformers()
    harness = HFLM(pretrained=str(folder), tokenizer=str(folder), device="cpu", dtype="float32")
    pairs = [("The answer of 3 and 4 is ", "7."), ("A cat", " sat."), ("x " * 60, "A cat")]
    theirs = harness.loglikelihood([Instance("loglikelihood", {}, p, 0) for p in pairs])
    for ours, (score, greedy) in zip(evaluate.loglikelihood(model, tok, pairs), theirs):
        assert ours[0] == pytest.approx(score, abs=1e-4) and ours[1] == greedy


def test_wikitext_is_scored_as_prose_and_counted_as_it_stands(tmp_path):
    text = 'Robert \'s " best " film ( 1 @,@ 000 m , in colour ) : 3 @.@ 5 % . \n = = Cast = = \n'
    write(tmp_path / "w.jsonl", [dict(text=text)])
    item, = evaluate.read_items("wikitext", tmp_path / "w.jsonl")
    assert item.context == 'Robert\'s "best" film (1,000 m, in colour): 3.5 %.\n== Cast ==\n'
    assert item.extra["file"] == text


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
