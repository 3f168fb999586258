"""tokenizer.py against brute force: the plain tokenizer, the regex module, hand-worked examples."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex

import tokenizer as tk

SCRIPT = Path(tk.__file__)
# What the patterns treat differently: contractions, blanks of several bytes, digits, line ends,
# joined emoji, marks, letters of many scripts, control characters.
ALPHABET = ["a", "b", "the", "Hello", "é", "日本", "ßπж", "ا", "ก", " ", "  ", "\n", "\r\n", "\t",
            "\x85", "\u3000", "\xa0", "\u2003", "'s", "'ll", "'LL", "'ſ", "'", "''", "'ve", "'re'",
            "1", "23", "4567", "½", "٣", ".", "!", "(x", " (", "…", "👩\u200d👧", "\u0301", "\0",
            "\x1c", "_", "<|", "ǅ", "\U0001d7d8", "/", tk.EOT, "<|a|>", "<|a|><|b|>"]
SPECIAL = [tk.EOT, "<|a|>", "<|a|><|b|>"]


def random_text(rng, most=30, alphabet=ALPHABET):
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(most)))


def train_text(seed=0, length=4000):
    rng = random.Random(seed)
    text = "".join(rng.choice(ALPHABET[:-3]) for _ in range(length))
    return text * 2 + "the end of the theme " * 9


@pytest.fixture(scope="module", params=list(tk.PATTERNS))
def tok(request):
    vocab, merges = tk.train_bpe([train_text()], 500, SPECIAL, pattern=tk.PATTERNS[request.param])
    return tk.Tokenizer(vocab, merges, SPECIAL, request.param)


@pytest.fixture(scope="module")
def small():
    vocab, merges = tk.train_bpe([train_text()], 500, SPECIAL)
    return tk.Tokenizer(vocab, merges, SPECIAL)


# ---- Training -----------------------------------------------------------------------------------


def brute_force(texts, vocab_size, special, pattern):
    """A second trainer, written from the definition alone: no function of tokenizer.py in it."""
    words = Counter()
    for text in texts:
        parts = [text]
        for token in sorted(special, key=len, reverse=True):
            parts = [piece for part in parts for piece in part.split(token)]
        for part in parts:
            for word in regex.findall(pattern, part):
                words[tuple(bytes([b]) for b in word.encode())] += 1
    merges = []
    while len(merges) + 256 + len(special) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        top = max(pairs.values())
        a, b = max(pair for pair in pairs if pairs[pair] == top)
        merges.append((a, b))
        after = Counter()
        for word, count in words.items():
            new, i = [], 0
            while i < len(word):
                both = word[i : i + 2] == (a, b)
                new.append(a + b if both else word[i])
                i += 1 + both
            after[tuple(new)] += count
        words = after
    return merges


@pytest.mark.parametrize("seed", range(50))
def test_merges_equal_brute_force(seed):
    rng = random.Random(seed)
    alphabet = [["a", "b", " "], ["a", "b", "ab", "c", " ", "é"], ALPHABET[:-2]][seed % 3]
    texts = [random_text(rng, 150, alphabet) for _ in range(rng.randrange(1, 5))]
    size = 257 + rng.choice([0, 5, 40, 400])
    vocab, merges = tk.train_bpe(texts, size, [tk.EOT], num_processes=1)
    assert merges == brute_force(texts, size, [tk.EOT], tk.GPT2_PATTERN)
    assert (vocab, merges) == tk.train_plain(texts, size, [tk.EOT])
    assert vocab[0] == tk.EOT.encode() and [vocab[1 + b] for b in range(256)] == [
        bytes([b]) for b in range(256)]
    assert list(vocab) == list(range(257 + len(merges)))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_merges_do_not_depend_on_processes_or_chunks(processes, chunk, monkeypatch):
    texts = [random_text(random.Random(i), 200, ALPHABET[:-2]) for i in range(5)]
    expected = brute_force(texts, 330, [tk.EOT], tk.GPT2_PATTERN)
    monkeypatch.setattr(tk, "CHUNK", chunk)
    monkeypatch.setattr(tk, "MAX_WORDS", 20)
    monkeypatch.setattr(tk.batches, "__defaults__", (2,))
    assert tk.train_bpe(texts, 330, [tk.EOT], num_processes=processes)[1] == expected


@pytest.mark.parametrize("few", [-1, 10**9])
def test_merging_by_arrays_and_place_by_place_agree(few, monkeypatch):
    monkeypatch.setattr(tk, "FEW", few)
    for seed in range(6):
        rng = random.Random(seed)
        texts = [random_text(rng, 300, ["a", "b", "aa", " ", "é"]) for _ in range(3)]
        expected = brute_force(texts, 300, [], tk.GPT2_PATTERN)
        assert tk.train_bpe(texts, 300, num_processes=1)[1] == expected


def test_sennrich_example():
    """The words of Sennrich et al. 2016, counts as in CS336's handout: merges worked by hand."""
    text = "low low low low low lower lower widest widest widest " + "newest " * 6
    merges = tk.train_bpe([text], 256 + 6, pattern=r"\S+|\s")[1]
    assert merges == [(b"s", b"t"), (b"e", b"st"), (b"o", b"w"), (b"l", b"ow"), (b"w", b"est"),
                      (b"n", b"e")]


def test_special_tokens_are_hard_boundaries():
    text = f"ab{tk.EOT}ab{tk.EOT}" * 9
    vocab, merges = tk.train_bpe([text], 400, [tk.EOT])
    assert merges == [(b"a", b"b")] and len(vocab) == 258  # and stops cleanly: no pair is left
    assert tk.train_bpe([], 300, [tk.EOT]) == tk.train_plain([], 300, [tk.EOT])
    assert tk.train_bpe(["", " ", "a"], 300)[1] == []


def test_files_train_as_their_texts_do(tmp_path):
    texts = [train_text(seed, 300) for seed in range(3)]
    texts = [t.replace("\0", "") for t in texts]
    (tmp_path / "a.txt").write_text(texts[0] + tk.EOT + texts[1], newline="")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": texts[2]}) + "\n")
    expected = brute_force(texts, 350, [tk.EOT], tk.GPT2_PATTERN)
    assert tk.train_bpe(tmp_path, 350, [tk.EOT])[1] == expected
    assert tk.train_bpe(str(tmp_path / "*"), 350, [tk.EOT], num_processes=2)[1] == expected


# ---- Encoding -----------------------------------------------------------------------------------


def test_fast_equals_plain(tok, monkeypatch):
    rng = random.Random(1)
    monkeypatch.setattr(tk, "SHORT", 0)
    for i in range(250):
        monkeypatch.setattr(tk, "CHUNK", rng.choice([1, 5, 1 << 18]))
        text = random_text(rng)
        ids = tok.encode(text)
        assert ids == tk.encode_plain(tok, text), text
        if i % 50 == 0:
            tok.reset_cache()
        assert tok.decode(ids) == text


def test_short_texts_equal_long_ones(tok, monkeypatch):
    for seed in range(100):
        text = random_text(random.Random(seed))
        short = tok.encode(text)
        monkeypatch.setattr(tk, "SHORT", -1)
        assert short == tok.encode(text)
        monkeypatch.undo()


def test_word_starts_equal_the_regex():
    """Every pair of code points in a row, one of each class, and random code points."""
    rng = random.Random(0)
    points = [chr(p) for p in (*range(0x300), 0x1680, *range(0x2000, 0x2070), 0x3000, 0xFEFF)]
    texts = ["".join(a + b + "x" for b in points) for a in points[::5]]
    texts += ["".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
                      for _ in range(2000)) for _ in range(20)]
    for text in texts:
        data, starts, lengths, _ = tk.find_words([(text.encode(), None)], tk.GPT2_PATTERN)
        words = [data[s : s + n].decode() for s, n in zip(starts, lengths)]
        assert words == regex.findall(tk.GPT2_PATTERN, text)


def test_hand_worked_example():
    vocab = tk.build_vocab([], [(b"t", b"h"), (b"th", b"e"), (b" ", b"a"), (b" ", b"the")])
    tok = tk.Tokenizer(vocab, [(b"t", b"h"), (b"th", b"e"), (b" ", b"a"), (b" ", b"the")])
    assert tok.encode("the that the") == [257, 32, 256, 97, 116, 259]
    assert tok.decode([257, 259]) == "the the"


@pytest.mark.parametrize("sizes", [[1], [2, 3], [50], [7, 1, 300]])
def test_encode_iterable_equals_the_joined_text(tok, sizes, monkeypatch):
    monkeypatch.setattr(tk, "CHUNK", 40)
    rng = random.Random(3)
    text = random_text(rng, 2000)
    cuts, pieces = 0, []
    while cuts < len(text):
        size = rng.choice(sizes)
        pieces.append(text[cuts : cuts + size])
        cuts += size
    expected = tk.encode_plain(tok, text)
    assert list(tok.encode_iterable(pieces)) == expected


def test_encode_iterable_is_lazy(small):
    seen = []

    def texts():
        for i in range(200):
            seen.append(i)
            yield "hello world " * 2000

    assert next(small.encode_iterable(texts())) == small.encode("hello")[0]
    assert len(seen) < 100


def test_special_tokens(small):
    assert small.encode("a<|a|><|b|>" + tk.EOT) == [
        *small.encode("a"), small.special_tokens["<|a|><|b|>"], small.eot_id]
    forged = small.encode("x" + tk.EOT, allowed_special=())
    assert small.eot_id not in forged and small.decode(forged) == "x" + tk.EOT
    only_a = small.encode("<|a|>" + tk.EOT, allowed_special={"<|a|>"})
    assert only_a[0] == small.special_tokens["<|a|>"] and small.eot_id not in only_a
    assert small.encode(tk.EOT * 1000) == [small.eot_id] * 1000 and small.encode("") == []


def test_special_token_that_a_merge_also_makes():
    """Its id serves both; "the" within a word is still cut out first, as Hugging Face does."""
    merges = [(b"t", b"h"), (b"th", b"e"), (b"the", b"m")]
    tok = tk.Tokenizer(tk.build_vocab([], merges), merges, ["the", "x"])
    assert tok.special_tokens == {"the": 257, "x": 120}
    assert tok.encode("themx th") == [257, 109, 120, 32, 256]
    assert tok.encode("themx", allowed_special=()) == [258, 120]


def test_one_endless_line_is_read_in_pieces(tmp_path):
    """text8 is 100 MB without a line end. Characters and specials lie across the megabytes."""
    text = "é" * 1000 + " <|endoftext|>" + "wörd " * 600_000
    (tmp_path / "line.txt").write_text(text)
    pieces = list(tk.read_pieces(str(tmp_path / "line.txt")))
    assert max(len(p) for p in pieces if p) < 2.1e6
    joined = b"".join(b"|" if p is None else p for p in pieces).decode()
    assert joined == text.replace("<|endoftext|>", "|") + "|"


def test_special_token_with_blanks_across_pieces(monkeypatch):
    monkeypatch.setattr(tk, "CHUNK", 4)
    tok = tk.Tokenizer(tk.build_vocab([], []), [], ["ab cd ef", "ab"])
    text = "x ab cd ef y ab cd eg"
    expected = tk.encode_plain(tok, text)
    assert 256 in expected and 257 in expected
    for size in range(1, 8):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(tok.encode_iterable(pieces)) == expected


def test_long_words_equal_short_ones_and_plain(small):
    rng = random.Random(5)
    for length in (1, 8, 9, 15, 16, 17, 63, 64, 65, 66, 200, 500):
        for letters in ("a", "th", "thean", "日é"):
            word = "".join(rng.choice(letters) for _ in range(length))
            small.reset_cache()
            assert small.encode_numpy(word).tolist() == tk.encode_plain(small, word), word


def test_words_whose_slot_is_taken(small, monkeypatch):
    monkeypatch.setattr(tk.Words, "BITS", 3)
    tok = tk.Tokenizer(small.vocab, small.merges, SPECIAL)
    for seed in range(20):
        text = random_text(random.Random(seed), 300)
        assert tok.encode_numpy(text).tolist() == tk.encode_plain(tok, text)


@pytest.mark.parametrize("make", [
    lambda: "a" * 1_000_000, lambda: " " * 1_000_000, lambda: "the" * 300_000,
    lambda: "".join(random.Random(0).choices("abcdefgh", k=1_000_000)),
    lambda: random.Random(0).randbytes(1_000_000).decode(errors="replace")])
def test_pathological_texts_take_linear_time(small, make):
    text = make()
    small.reset_cache()
    begin = time.perf_counter()
    ids = small.encode_numpy(text)
    assert time.perf_counter() - begin < 10
    assert small.decode(ids) == text


@pytest.mark.parametrize("pattern", [r"\p{L}+", r"(\w)+|[\s\S]", r"('s)|(\p{L}+)|[\s\S]"])
@pytest.mark.parametrize("times", [1, 2000])
def test_a_pattern_that_loses_text_is_an_error(pattern, times):
    with pytest.raises(ValueError, match="--pattern"):
        tk.Tokenizer(tk.build_vocab([], []), [], None, pattern).encode("ab cd" * times)


def test_lone_surrogate_is_a_clear_error(small):
    for text in ("a\ud800", "a\ud800" * 2000):
        with pytest.raises(ValueError, match="surrogate"):
            small.encode(text)


def test_cache_is_bounded(small, monkeypatch):
    monkeypatch.setattr(tk, "MAX_WORDS", 100)
    small.reset_cache()
    letters = str.maketrans("0123456789", "abcdefghij")
    for i in range(30):
        text = " ".join(f"{i}0{j}".translate(letters) for j in range(300))
        small.encode(text[:900])
        assert small.encode(text) == tk.encode_plain(small, text)
        assert len(small._bpe.count) <= 600
    for i in range(30):  # few words, but long ones
        text = " ".join(random.Random(i * 9 + j).randbytes(300).hex() for j in range(9))
        assert small.decode(small.encode(text)) == text
        assert len(small._bpe.pool) <= 800 + len(text)
    for i in range(30):  # short texts alone, which have a cache of their own
        small.encode(" ".join(f"{i}1{j}".translate(letters) for j in range(150)))
        assert len(small._short) <= 400


def test_dtype_follows_the_vocabulary():
    merges = []
    vocab = tk.build_vocab([], merges)
    assert tk.Tokenizer(vocab, merges).encode_numpy("ab").dtype == np.uint16
    assert tk.Tokenizer(vocab, merges, {tk.EOT: 65535}).encode_numpy("ab").dtype == np.uint16
    big = tk.Tokenizer(vocab, merges, {tk.EOT: 65536})
    assert big.encode_numpy("a" + tk.EOT).tolist() == [97, 65536]
    assert big.encode_numpy("ab").dtype == np.uint32 and big.vocab_size == 65537


# ---- Decoding -----------------------------------------------------------------------------------


def test_decode_stream_never_gives_half_a_character(small):
    text = "né日本👩‍👩‍👧x" * 3
    ids = small.encode(text)
    pieces = list(small.decode_stream(iter(ids)))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    byte = {token: i for i, token in small.vocab.items()}
    assert list(small.decode_stream([byte[b"\xe6"]])) == ["\ufffd"]
    assert small.decode([byte[b"\xe6"]]) == "\ufffd"
    with pytest.raises(ValueError, match="99999"):
        small.decode([1, 99999])
    with pytest.raises(ValueError, match="-1"):
        small.decode(np.array([-1]))


@pytest.mark.parametrize("ids", [np.array([97.0]), [97.5], np.array([[97]]), [2**40], ["a"]])
def test_decode_of_what_is_no_id(small, ids):
    with pytest.raises(ValueError, match="is not in the vocabulary"):
        small.decode(ids)


# ---- Files --------------------------------------------------------------------------------------


def test_encode_file(small, tmp_path, monkeypatch):
    rng = random.Random(2)
    documents = [random_text(rng, 200, ALPHABET[:-3]).replace("\0", "") + "." for _ in range(40)]
    (tmp_path / "a.txt").write_text(tk.EOT.join(documents[:20]), newline="")
    lines = [json.dumps({"text": text}) for text in documents[20:]]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines, "broken", "", '{"text": 5}']))
    expected = [i for text in documents for i in [*tk.encode_plain(small, text), small.eot_id]]
    assert list(tk.read_documents(tmp_path)) == documents
    monkeypatch.setattr(tk, "CHUNK", 100)
    for processes in (1, 2):
        out = tmp_path / "out" / f"{processes}.npy"
        out.parent.mkdir(exist_ok=True)
        files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
        assert small.encode_file(files, out, processes) == len(expected)
        ids = np.load(out, mmap_mode="r")
        assert ids.dtype == np.uint16 and ids.tolist() == expected
        assert len(os.listdir(out.parent)) == processes  # nothing is left beside the result


def test_encode_file_needs_a_separator(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="endoftext"):
        tk.Tokenizer(tk.build_vocab([], []), []).encode_file(tmp_path / "a.txt", tmp_path / "o")


def test_encode_file_resumes(small, tmp_path, monkeypatch):
    text = "the quick brown fox " * 5000
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(tk, "CHUNK", 500)
    work, calls = small._encode_batch, []

    def die(batch):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(batch))
        return work(batch)

    monkeypatch.setattr(small, "_encode_batch", die)
    with pytest.raises(KeyboardInterrupt):
        small.encode_file(tmp_path / "a.txt", tmp_path / "o.npy", 1)
    assert not (tmp_path / "o.npy").exists()
    with open(tmp_path / "o.npy.part", "ab") as file:
        file.write(b"half a batch")
    calls.clear()
    monkeypatch.setattr(small, "_encode_batch", lambda batch: calls.append(1) or work(batch))
    small.encode_file(tmp_path / "a.txt", tmp_path / "o.npy", 1)
    assert len(calls) == 5  # 100,000 characters are 7 batches of 32 * 500, two were done
    assert np.load(tmp_path / "o.npy").tolist() == [*small.encode(text), small.eot_id]
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "o.npy"]


def test_read_documents(tmp_path, capsys, monkeypatch):
    eot = tk.EOT.encode()
    (tmp_path / "a.md").write_bytes(b"one\r\n\xff two" + eot + b"three" + eot)
    assert list(tk.read_documents(tmp_path / "a.md")) == ["one\r\n\ufffd two", "three"]
    assert "1 invalid" in capsys.readouterr().err
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("x" * (1 << 20) + tk.EOT + "y" * 30)
    for shift in range(len(tk.EOT) + 1):  # the separator across two blocks
        text = "x" * ((1 << 20) - shift) + tk.EOT + "y" * 30
        (tmp_path / "c.txt").write_text(text)
        assert list(tk.read_documents([tmp_path / "c.txt"])) == text.split(tk.EOT)
        raw = "<é".encode() * (1 << 18) + b"\xf0\x9f" + "日".encode() * 9 + b"x" * shift
        raw = (raw + b"<|" + "日😀".encode() * (1 << 17))[shift:] + b"\xe6"
        (tmp_path / "c.txt").write_bytes(raw)
        text = raw.decode(errors="replace")
        assert list(tk.read_documents(tmp_path / "c.txt")) == [text]
        assert f" {text.count(chr(0xFFFD))} invalid" in capsys.readouterr().err
    assert list(tk.read_documents(str(tmp_path / "*.gz"))) == ["x" * (1 << 20), "y" * 30]
    (tmp_path / "d.txt").write_bytes(b"a\0b")
    with pytest.raises(ValueError, match="d.txt"):
        list(tk.read_documents(tmp_path / "d.txt"))
    with pytest.raises(ValueError, match="nowhere"):
        tk.list_files(tmp_path / "nowhere")
    assert tk.list_files([tmp_path, tmp_path / "a.md"]) == sorted(map(str, tmp_path.iterdir()))


def kill_worker(item):
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_worker_is_an_error_and_no_hang():
    assert list(tk.parallel_map(abs, range(-9, 0), 2)) == list(range(9, 0, -1))
    with pytest.raises(OSError, match="--processes"):
        list(tk.parallel_map(kill_worker, range(20), 2))


def test_records_that_are_no_text_are_skipped(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "half \\ud83d"}\n{"text": "\\ud83d\\ude00"}\n' + "[" * 100_000)
    assert list(tk.read_documents(tmp_path / "a.jsonl")) == ["\U0001f600"]
    assert "2 lines" in capsys.readouterr().err


@pytest.mark.parametrize("harm", [lambda data: data[:300], lambda data: data[:20] + b"\xff" * 300])
def test_damaged_gz_is_one_line(tmp_path, harm, capsys):
    packed = gzip.compress(random.Random(0).randbytes(2000).hex().encode())
    (tmp_path / "a.txt.gz").write_bytes(harm(packed))
    assert tk.main(["train", str(tmp_path / "a.txt.gz"), "--out", str(tmp_path)]) == 2
    assert "a.txt.gz" in (error := capsys.readouterr().err) and error.count("\n") == 1


# ---- Formats ------------------------------------------------------------------------------------


def test_save_and_load(tok, tmp_path):
    tok.save(tmp_path)
    again = tk.Tokenizer.load(tmp_path / "tokenizer.json")
    for name in ("vocab", "merges", "special_tokens", "pattern", "vocab_size", "eot_id", "dtype"):
        assert getattr(again, name) == getattr(tok, name)
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]
    tok.save(tmp_path / "alone.json")
    assert len(os.listdir(tmp_path)) == 3


def test_gpt2_files(small, tmp_path):
    """vocab.json and merges.txt, written here the way OpenAI's encoder.py names the bytes."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in keep]
    name = {b: chr(b) for b in keep} | {b: chr(256 + i) for i, b in enumerate(rest)}
    spell = lambda token: "".join(name[b] for b in token)  # noqa: E731
    vocab = {t if (t := token.decode(errors="ignore")) in SPECIAL else spell(token): i
             for i, token in small.vocab.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(f"{spell(a)} {spell(b)}" for a, b in small.merges)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    loaded = tk.Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", SPECIAL)
    text = train_text(7, 500)
    assert loaded.encode(text) == small.encode(text) and loaded.eot_id == small.eot_id
    assert tk.Tokenizer.load(tmp_path / "vocab.json").encode(text) == small.encode(text)


def test_tiktoken_files(tok, tmp_path):
    import base64

    plain = tk.Tokenizer(tk.build_vocab([], tok.merges), tok.merges, None, "cl100k")
    lines = [base64.b64encode(token) + b" %d" % i for i, token in plain.vocab.items()]
    (tmp_path / "x.tiktoken").write_bytes(b"\n".join(lines))
    loaded = tk.Tokenizer.load(tmp_path / "x.tiktoken")
    assert loaded.merges == plain.merges
    text = train_text(8, 500)
    assert loaded.encode(text, ()) == plain.encode(text, ())


def test_ignore_merges_and_nfc():
    """Llama 3 takes a word that is a token whole; Qwen composes accents first."""
    vocab = {**tk.build_vocab([], []), 256: b"zq"}
    assert tk.Tokenizer(vocab, []).encode("zq") == [122, 113]
    whole = tk.Tokenizer(vocab, [], [tk.EOT], ignore_merges=True, normalizer="NFC")
    assert whole.encode("zq") == [256] and whole.encode("zqz" * 500)[:3] == [122, 113, 122]
    assert whole.decode(whole.encode("e\u0301" + tk.EOT)) == "é" + tk.EOT
    assert whole.encode("e\u0301 zq") == tk.encode_plain(whole, "e\u0301 zq")


@pytest.mark.parametrize("text", [
    "junk", "[]", "{}", '{"model": {"type": "WordPiece", "vocab": {}}}',
    '{"model": {"type": "Unigram", "vocab": []}}',
    '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'])
def test_other_json_is_a_clear_error(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json"):
        tk.Tokenizer.load(tmp_path)


def test_single_digits_are_cut_out_first(small):
    """SmolLM 2's tokenizer.json: every digit a word, GPT-2's pattern on each piece between."""
    data = tk.to_json(small)
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]}
    pattern, draw = tk.from_json(data).pattern, random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("abc é½²٣  \n\t0123's.,-", k=30))
        pieces = tk.regex.split(r"(\p{N})", text)
        want = [word for piece in pieces for word in tk.regex.findall(tk.GPT2_PATTERN, piece)]
        assert tk.regex.findall(pattern, text) == want


CUT_DIGITS = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated",
              "invert": False}
ADDED = {"id": 500, "content": "<m>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}


@pytest.mark.parametrize("named, change", [
    ("add_prefix_space", lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(
        add_prefix_space=True)),
    ("one pattern", lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True)),
    ("one pattern", lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, CUT_DIGITS)),
    ("Digits", lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, {
        "type": "Digits", "individual_digits": True})),
    ("Split", lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(
        behavior="MergedWithNext")),
    ("Lowercase", lambda d: d.update(normalizer={"type": "Lowercase"})),
    ("end_of_word_suffix", lambda d: d["model"].update(end_of_word_suffix="</w>")),
    ("lstrip of <m>", lambda d: d["added_tokens"].append({**ADDED, "lstrip": True})),
    ("single_word of <m>", lambda d: d["added_tokens"].append({**ADDED, "single_word": True})),
])
def test_tokenizer_json_that_would_give_other_ids_is_refused(small, tmp_path, named, change):
    """Each asks Hugging Face's library for something that we do not do."""
    data = tk.to_json(small)
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=named):
        tk.Tokenizer.load(tmp_path)


def test_huggingface_reads_ours(tok, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tok.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for seed in range(300):
        text = random_text(random.Random(seed), alphabet=[a for a in ALPHABET if a != "'ſ"])
        assert theirs.encode(text).ids == tok.encode(text), text


def test_tiktoken_gives_the_same_ids(tok):
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding("x", pat_str=tok.pattern, mergeable_ranks=tok.token_ids,
                               special_tokens=tok.special_tokens)
    for seed in range(300):
        text = random_text(random.Random(seed), alphabet=ALPHABET[:-2])
        assert theirs.encode(text, allowed_special="all") == tok.encode(text), text


def test_chat_template():
    base = tk.build_vocab([], [])
    chatml = tk.Tokenizer(base, [], ["<|im_start|>", "<|im_end|>"])
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert chatml.apply_chat_template(messages) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n")
    assert chatml.apply_chat_template(messages[:1], True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    llama = tk.Tokenizer(base, [], ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                                    "<|begin_of_text|>"])
    assert llama.apply_chat_template(messages[:1], True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    with pytest.raises(ValueError, match="im_end"):
        chatml.apply_chat_template([{"role": "user", "content": "a<|im_end|>b"}])


# ---- Command line -------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the cat and the hat " * 50)
    tok_dir, out = str(tmp_path / "tok"), str(tmp_path / "a.npy")
    data = str(tmp_path / "a.txt")
    assert tk.main(["train", data, "--vocab-size", "262", "--out", tok_dir]) == 0
    assert tk.main(["encode", data, "--tokenizer", tok_dir, "--out", out]) == 0
    capsys.readouterr()
    assert tk.main(["decode", out, "--tokenizer", tok_dir]) == 0
    assert capsys.readouterr().out == "the cat and the hat " * 50 + tk.EOT
    assert tk.main(["inspect", data, "--tokenizer", tok_dir, "--beside", tok_dir]) == 0
    report = capsys.readouterr().out
    assert "LATIN" in report and "1000 bytes" in report and "never used" in report
    assert tk.main(["bench", data, "--vocab-size", "260", "--repeats", "1"]) == 0
    assert "| encode to numpy | a.txt | ours |" in capsys.readouterr().out


@pytest.mark.parametrize("words, named", [
    (["train", "DATA", "--vocab-size", "256"], "--vocab-size"),
    (["train", "no-such-file"], "no-such-file"),
    (["train", "DATA", "--pattern", "("], "--pattern"),
    (["train", "DATA", "--pattern", "c"], "--pattern"),
    (["encode", "DATA", "--tokenizer", "no-such-dir"], "no-such-dir"),
    (["encode", "no-such-file", "--tokenizer", "TOK"], "no-such-file"),
    (["decode", "5,70000", "--tokenizer", "TOK"], "70000"),
    (["decode", "5,x", "--tokenizer", "TOK"], "5,x"),
    (["decode", "9" * 30, "--tokenizer", "TOK"], "999"),
    (["decode", "FLOATS", "--tokenizer", "TOK"], "float64 of shape (1, 2)"),
    (["decode", "EMPTY", "--tokenizer", "TOK"], "empty.npy"),
])
def test_mistakes_end_in_one_line(tmp_path, capsys, words, named):
    (tmp_path / "a.txt").write_text("the cat")
    tk.Tokenizer(tk.build_vocab([], []), []).save(tmp_path)
    np.save(tmp_path / "floats.npy", np.ones((1, 2)))
    (tmp_path / "empty.npy").touch()
    files = {"DATA": "a.txt", "TOK": "", "FLOATS": "floats.npy", "EMPTY": "empty.npy"}
    words = [str(tmp_path / files[w]) if w in files else w for w in words]
    words += ["--out", str(tmp_path / "o")] if words[0] != "decode" else []
    assert tk.main(words) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_starts_without_torch():
    code = "import sys, tokenizer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=True)
