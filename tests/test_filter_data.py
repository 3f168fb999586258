"""Checks filter_data.py against brute-force twins, hand-made WARC records and theory."""

import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import filter_data as fd

SCRIPT = str(Path(fd.__file__).resolve())


# ---- building WARC files -------------------------------------------------------------------------


def record(
    body=b"<p>hello</p>",
    url="http://a.example/",
    kind="response",
    status="200 OK",
    headers=b"Content-Type: text/html\r\n",
    version="1.0",
    length=None,
):
    """One uncompressed WARC record."""
    if kind == "response":
        body = b"HTTP/1.1 " + status.encode() + b"\r\n" + headers + b"\r\n" + body
    head = (
        f"WARC/{version}\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def pages(path, data, **kwargs):
    """(bodies, counts) of a file with this content."""
    path.write_bytes(data)
    counts = Counter()
    return [page.body for page in fd.read_warc(path, counts=counts, **kwargs)], counts


@pytest.mark.parametrize("version", ["0.18", "1.0", "1.1"])
@pytest.mark.parametrize(
    "pack",
    [
        b"".join,
        lambda records: b"".join(map(gzip.compress, records)),
        lambda records: gzip.compress(b"".join(records)),
    ],
    ids=["plain", "gzip per record", "one gzip member"],
)
def test_warc_versions_and_compressions(tmp_path, version, pack):
    records = [record(b"<p>%d</p>" % i, version=version) for i in range(5)]
    records.insert(2, record(b"GET /", kind="request", version=version))
    found, counts = pages(tmp_path / "x", pack(records))
    assert found == [b"<p>%d</p>" % i for i in range(5)]
    assert counts["pages"] == 5 and counts["other_records"] == 1


def test_wet_record(tmp_path):
    path = tmp_path / "x.wet.gz"
    path.write_bytes(gzip.compress(record("Grüße".encode(), kind="conversion", url="http://b/")))
    [page] = fd.read_warc(path)
    assert page == ("http://b/", "text/plain", "utf-8", "Grüße".encode())


def test_wget_url_and_chunks(tmp_path):
    headers = b"Content-Type: text/html; charset=ISO-8859-1\r\nTransfer-Encoding: chunked\r\n"
    body = b"6;ext=1\r\nhello \r\nA\r\n0123456789\r\n0\r\n\r\n"
    path = tmp_path / "x.warc"
    path.write_bytes(record(body, url="<http://c/>", headers=headers))
    [page] = fd.read_warc(path)
    assert page == ("http://c/", "text/html", "iso-8859-1", b"hello 0123456789")


def test_common_crawl_headers_that_no_longer_hold(tmp_path):
    headers = b"Content-Type: text/html\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n"
    plain = [b"<p>abc</p>", b"abc\r\nis a word, not a chunk of 2748 bytes", b"xylophone"]
    data = b"".join(record(body, headers=headers) for body in plain)
    data += record(gzip.compress(b"<p>packed</p>"), headers=headers)
    assert pages(tmp_path / "x", data)[0] == [*plain, b"<p>packed</p>"]


def test_only_good_html_and_text_count(tmp_path):
    data = b"".join(
        [
            record(status="404 Not Found"),
            record(status="301 Moved"),
            record(headers=b"Content-Type: image/png\r\n"),
            record(headers=b""),
            record(b"kept", headers=b"content-type: TEXT/PLAIN; charset=utf-8\r\n"),
            record(b"", kind="metadata"),
        ]
    )
    found, counts = pages(tmp_path / "x", data)
    assert found == [b"kept"]
    assert counts["not_status_200"] == 2 and counts["not_html_or_text"] == 2
    assert counts["other_records"] == 1


LONG = [bytes(random.Random(i).choices(b"abcdefgh <>", k=3000)) for i in range(5)]


@pytest.mark.parametrize("cut", ["middle", "flip", "tail", "head"])
def test_damaged_gzip_costs_one_record(tmp_path, cut):
    members = [gzip.compress(record(body)) for body in LONG]
    broken = bytearray(members[2])
    if cut == "middle":  # bytes lost: inflating runs on into the neighbour
        del broken[400:700]
    elif cut == "flip":
        broken[500] ^= 0xFF
    elif cut == "tail":
        del broken[-300:]
    else:
        del broken[:5]
    members[2] = bytes(broken)
    found, counts = pages(tmp_path / "x", b"".join(members))
    assert [body for body in found if body in LONG] == [LONG[i] for i in (0, 1, 3, 4)]
    assert len(found) == 4 and counts["damaged_gzip"] >= 1


def test_truncated_file_keeps_what_came_before(tmp_path):
    data = b"".join(gzip.compress(record(body)) for body in LONG)
    found, counts = pages(tmp_path / "x", data[:-200])
    assert found == LONG[:4] and counts["truncated"] == 1
    found, counts = pages(tmp_path / "y", b"".join(map(record, LONG))[:-200])
    assert found == LONG[:4] and counts["truncated"] == 1


@pytest.mark.parametrize("pack", [lambda x: x, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("length", [10, 2900, 3500, 10**6, "x", 10**30])
def test_wrong_content_length_costs_one_record(tmp_path, length, pack):
    records = [record(body) for body in LONG]
    records[2] = record(LONG[2], length=length)
    found, counts = pages(tmp_path / "x", b"".join(map(pack, records)))
    assert found == [LONG[i] for i in (0, 1, 3, 4)]
    reasons = ("misaligned", "truncated", "bad_header", "too_large")
    assert sum(counts[reason] for reason in reasons) == 1


def test_unreadable_header_costs_one_record(tmp_path):
    records = [record(body) for body in LONG]
    records[2] = b"?" * 8 + records[2][8:]
    assert pages(tmp_path / "x", b"".join(records))[0] == [LONG[i] for i in (0, 1, 3, 4)]


def test_large_record_is_skipped_without_holding_it(tmp_path):
    path = tmp_path / "x.warc.gz"
    with open(path, "wb") as file:
        for body in (b"before", bytes(40 << 20), b"after"):
            file.write(gzip.compress(record(body), 1))
    counts = Counter()
    tracemalloc.start()
    found = [page.body for page in fd.read_warc(path, max_bytes=1 << 20, counts=counts)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [b"before", b"after"] and counts["too_large"] == 1
    assert peak < 8 << 20


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"%PDF-1.7\n" + os.urandom(50_000),
        gzip.compress(b"%PDF-1.7" + bytes(9999)),
        b"\x1f\x8b\x08\x00" * 1000,
        b"\x1f\x8b",
        b"WARC/1.0\r\n",
    ],
)
def test_not_a_warc_file(tmp_path, data):
    found, counts = pages(tmp_path / "x.warc.gz", data)
    assert found == [] and counts["not_warc"] == 1


def test_header_that_never_ends(tmp_path):
    data = record(b"1") + b"WARC/1.0\r\nA: " + b"x" * 200_000 + b"\r\n" + record(b"2")
    found, counts = pages(tmp_path / "x", data)
    assert found == [b"1", b"2"] and counts["bad_header"] == 1


# ---- HTML ----------------------------------------------------------------------------------------

META = b'<html><head><meta http-equiv="Content-Type" content="text/html; charset=%s"></head>'


@pytest.mark.parametrize(
    "body, header, want",
    [
        ("\ufeffüber".encode(), "latin-1", "über"),
        ("\ufeffüber".encode("utf-16-le"), None, "über"),
        ("über".encode(), "iso-8859-1", "über"),  # valid UTF-8 beats the header
        ("über".encode()[:-1] + "é".encode()[:1], None, "übe"),  # cut inside a character
        ("„über“".encode("cp1252"), "ISO-8859-1", "„über“"),  # a browser's Latin-1 has these quotes
        ("über".encode("cp1252"), None, "über"),
        ("über".encode("cp1252"), "no-such-charset", "über"),
        ("über".encode("cp1252"), "base64", "über"),
        (META % b"gb2312" + "镕".encode("gbk"), None, "镕"),  # a character GB2312 itself lacks
        (META % b"shift_jis" + "①".encode("cp932"), "utf-8", "①"),  # header wrong, meta right
        (META % b"windows-1251" + "привет".encode("cp1251"), None, "привет"),
        ("日本語".encode("iso2022_jp"), "iso-2022-jp", "日本語"),  # looks like ASCII
        ("über".encode("utf-16-le"), "utf-16le", "über"),
        (b"bad \xff byte \xc3\xa9", "utf-8", "bad \ufffd byte é"),
    ],
)
def test_charset(body, header, want):
    assert re.sub("<.*>", "", fd.decode_html(body, header)) == want


HTML = (
    "<!DOCTYPE html><html><head><title>T</title><style>p{}</style></head><body><!-- <p>no</p> -->"
    "<h1>Fish &amp; chips</h1><p>one<br>two <b>bold</b></p><script>if (a<b) {}</script>"
    "<SCRIPT>no</SCRIPT><ul><li>x</li></ul></body></html>"
)


def test_extract_text_with_and_without_resiliparse(monkeypatch):
    for module in (True, False):
        if not module:
            monkeypatch.setitem(sys.modules, "resiliparse.extract.html2text", None)
        text = fd.extract_text(HTML.encode())
        for want in ("Fish & chips", "one", "two bold", "x"):
            assert want in text
        for gone in ("no", "if (", "p{}", "<"):
            assert gone not in text
    assert text == "T\nFish & chips\none\ntwo bold\nx"


@pytest.mark.parametrize("body", [b"", b"%PDF-1.4 \x00\x01", b"\x89PNG\x00\x00", b"<html></html>"])
def test_nothing_to_extract(body):
    assert fd.extract_text(body) is None


@pytest.mark.parametrize("piece", ["<a ", "<!--", "<script>", "<a <b", "<", "&", "<a href='", "</"])
def test_hostile_html_takes_linear_time(piece):
    html = piece * (400_000 // len(piece))
    began = time.perf_counter()
    fd.plain_text(html)
    fd.extract_text(html.encode())
    assert time.perf_counter() - began < 3


# ---- language and classifiers --------------------------------------------------------------------

ENGLISH = "the of and to in that is was for with his they this have from one had word not what"
GERMAN = "der die und das nicht mit ein ist auch sich von dem wie auf sie aber nach wird bei"
ENGLISH, GERMAN = ENGLISH.split(), GERMAN.split()


def babble(words, length, seed):
    return " ".join(random.Random(seed).choices(words, k=length))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier of two languages whose texts differ in length too, and what `train` printed."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "en.txt").write_text("\n".join(babble(ENGLISH, 10, i) for i in range(300)))
    rows = [json.dumps({"text": babble(GERMAN, 400, i)}) for i in range(100)]
    (folder / "de.jsonl").write_text("\n".join(rows))
    path = str(folder / "lid.bin")
    done = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            "train",
            "--model",
            path,
            "--input",
            f"en={folder}/en.txt",
            f"de={folder}/de.jsonl",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return path, done.stdout


def test_train_reports_what_it_learned(model):
    assert "accuracy 1.000" in model[1] and "AUC de 1.000" in model[1]


def test_training_gives_the_same_model_whatever_was_in_memory(tmp_path):
    rows = [{"text": babble(words, 9, i), "label": label} for i in range(60)
            for label, words in (("en", ENGLISH), ("de", GERMAN))]  # fmt: skip
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in "ab":
        for size in (14, 30, 60, 14):
            np.full(size << 18, np.nan, np.float32).sum()
        args = ["train", "--input", str(tmp_path / "x.jsonl"), "--model", str(tmp_path / name)]
        assert fd.main(args) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_train_sees_as_many_crops_of_the_same_lengths(tmp_path, monkeypatch):
    rows = [{"text": babble(ENGLISH, 300, i), "label": "en"} for i in range(60)]
    rows += [{"text": babble(GERMAN, 3000, i), "label": "de"} for i in range(300)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seen = []
    monkeypatch.setattr(fd, "fit_fasttext", lambda lines, *_: seen.extend(lines))
    model = str(tmp_path / "m")
    assert fd.main(["train", "--input", str(tmp_path / "x.jsonl"), "--model", model]) == 2
    sizes = {"en": [], "de": []}
    for label, *words in map(str.split, seen):
        sizes[label.removeprefix("__label__")].append(len(words))
    assert len(sizes["en"]) == len(sizes["de"]) > 240
    assert all(8 <= size <= 256 for part in sizes.values() for size in part)
    assert 0.6 < np.median(sizes["en"]) / np.median(sizes["de"]) < 1.6


def test_train_does_not_learn_length(model):
    """Trained on 10-word English and 400-word German, it must know the converse too."""
    assert fd.identify_language(babble(ENGLISH, 400, 1), model[0])[0] == "en"
    assert fd.identify_language(babble(GERMAN, 10, 1), model[0])[0] == "de"


@pytest.mark.parametrize(
    "text", ["", " \n", "\n", "a", "\n\na\n", "\ud800", "\0", "the\ud83d of", "😀"]
)
def test_language_of_odd_texts(model, text):
    label, p = fd.identify_language(text, model[0])
    assert isinstance(label, str) and type(p) is float and 0 <= p <= 1
    if not text.strip():
        assert (label, p) == ("und", 0.0)


def test_newline_does_not_end_the_text(model):
    text = "of\n" + "der die und das nicht mit ein ist auch sich\n" * 5
    assert fd.identify_language(text, model[0])[0] == "de"


def test_predict_agrees_with_fasttext(model):
    import fasttext

    fasttext.FastText.eprint = lambda *_: None
    text = babble(ENGLISH + GERMAN, 30, 5)
    [labels], [scores] = fasttext.load_model(model[0]).predict([text], k=2)
    found = fd.predict(text, model[0], 2)
    assert [label for label, _ in found] == [label.removeprefix("__label__") for label in labels]
    np.testing.assert_allclose([p for _, p in found], scores, atol=2e-5)


def test_classifiers_give_label_and_score(model):
    for classify in (fd.classify_nsfw, fd.classify_toxic_speech, fd.classify_quality):
        label, p = classify("der die und das", model[0])
        assert label == "de" and 0.5 < p <= 1
        with pytest.raises(ValueError, match="no fastText model at .*nowhere.bin"):
            classify("x", "nowhere.bin")
    with pytest.raises(ValueError, match="--toxic .*needs one called toxic"):
        fd.bad_probability("der", "toxic", model[0])


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"hello" * 100)
    with pytest.raises(ValueError, match="no fastText model at .*m.bin .*wrong file format"):
        fd.identify_language("x", str(tmp_path / "m.bin"))


def test_download_checks_the_checksum(tmp_path):
    (tmp_path / "source").write_bytes(b"abc")
    url, target = (tmp_path / "source").as_uri(), str(tmp_path / "new" / "model")
    with pytest.raises(ValueError, match="SHA-256"):
        fd.download_language_model(target, url)
    assert not os.path.exists(target)
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert Path(fd.download_language_model(target, url, abc)).read_bytes() == b"abc"
    with pytest.raises(ValueError, match="cannot download"):
        fd.download_language_model(target + "2", url + "-missing")


def test_area_under_curve():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 20, 300) / 20, rng.random(300) < 0.3
    wins = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    assert fd.area_under_curve(scores, positive) == pytest.approx(np.mean(wins))


# ---- personal data -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, want, count",
    [
        (
            "mail ada@example.org, or bob.b+x@mail.example.co.uk!",
            "mail |||EMAIL_ADDRESS|||, or |||EMAIL_ADDRESS|||!",
            2,
        ),
        ("<a.b@c.de>", "<|||EMAIL_ADDRESS|||>", 1),
        (
            "already |||EMAIL_ADDRESS||| and x_y@z.io",
            "already |||EMAIL_ADDRESS||| and |||EMAIL_ADDRESS|||",
            1,
        ),
        ("at @twitter, a@b, x @ y.com, 3@4.5", "at @twitter, a@b, x @ y.com, 3@4.5", 0),
        ("jürgen@exämple.de.", "|||EMAIL_ADDRESS|||.", 1),
    ],
)
def test_emails(text, want, count):
    assert fd.mask_emails(text) == (want, count)


@pytest.mark.parametrize(
    "number",
    [
        "2831823829",
        "(283)-182-3829",
        "(283) 182 3829",
        "283-182-3829",
        "(283) 182-3829",
        "283.182.3829",
        "+1 283 182 3829",
        "1-283-182-3829",
        "+44 20 7946 0958",
        "+49 (30) 901820",
    ],
)
def test_phone_numbers(number):
    assert fd.mask_phone_numbers(f"call {number}, now") == ("call |||PHONE_NUMBER|||, now", 1)


@pytest.mark.parametrize(
    "text",
    [
        "2020-08-09 16:54:17",
        "12345678901234",
        "3.1415926535",
        "1,234,567,890",
        "ISBN 978-3-16-148410-0",
        "|||PHONE_NUMBER|||",
        "a 1234567 b",
        "192.168.100.200",
        "1999-2004",
        "+100 points, +1 2 3 4 and 5+10",
    ],
)
def test_not_phone_numbers(text):
    assert fd.mask_phone_numbers(text) == (text, 0)


@pytest.mark.parametrize(
    "text, want, count",
    [
        ("from 192.0.2.146.", "from |||IP_ADDRESS|||.", 1),
        ("0.0.0.0 255.255.255.255", "|||IP_ADDRESS||| |||IP_ADDRESS|||", 2),
        ("256.1.1.1 1.2.3 1.2.3.4.5 v1.2.3.4", "256.1.1.1 1.2.3 1.2.3.4.5 v1.2.3.4", 0),
        ("|||IP_ADDRESS||| 10.0.0.1:80", "|||IP_ADDRESS||| |||IP_ADDRESS|||:80", 1),
    ],
)
def test_ips(text, want, count):
    assert fd.mask_ips(text) == (want, count)


@pytest.mark.parametrize(
    "piece", ["a@b-b-b-", "a@", "a.", "b-", "a@b.", "1 ", "1", "(1", "+1 ", "1.", "+1 (1) ", "12-"]
)
def test_masks_take_linear_time(piece):
    for text in (piece * (90_000 // len(piece)), "a@" + piece * (90_000 // len(piece))):
        began = time.perf_counter()
        for mask in (fd.mask_emails, fd.mask_phone_numbers, fd.mask_ips):
            mask(text)
        assert time.perf_counter() - began < 1


# ---- words as arrays -----------------------------------------------------------------------------

ALPHABET = "abcXYZ  \n\t.,-#é\u0301ßİ12\u3000中\ud800😀‘"


def random_text(seed, size=200):
    return "".join(random.Random(seed).choices(ALPHABET, k=size))


def test_words_is_str_split():
    texts = ["", "one", "  ", *(random_text(i) for i in range(40)), "one two one"]
    words = fd.Words(texts)
    want = [word for text in texts for word in text.split()]
    assert (words.end - words.start).tolist() == [len(word) for word in want]
    assert words.doc.tolist() == [i for i, text in enumerate(texts) for _ in text.split()]
    assert np.diff(words.first).tolist() == [len(text.split()) for text in texts]
    letters = [any(c == 2 for c in words.kinds[a:b]) for a, b in zip(words.start, words.end)]
    assert letters == [any(map(str.isalpha, word)) for word in want]
    hashes = words.hashes.tolist()
    by_hash = dict(zip(hashes, want))
    assert [by_hash[value] for value in hashes] == want  # equal hash, equal word
    assert len(by_hash) == len(set(want))


@pytest.mark.parametrize(
    "text, want",
    [
        ("Crème  Brûlée,\n50% off!", "creme brulee 50 off"),
        ("ÀÉÎ ﬁ İstanbul", "aei ﬁ istanbul"),
        ("well-known it's", "wellknown its"),
        ("—!?", ""),
        ("a\u00a0b\u2003c", "a b c"),
    ],
)
def test_normalise(text, want):
    assert fd.normalise(text) == want


def test_normal_form_is_that_of_whole_strings():
    """By a table for each character: what unicodedata makes of the whole text."""
    classes, texts = fd.character_classes(), [random_text(i) for i in range(40)]
    texts += ["", "plain\nASCII", "한국어\n어", "Ελλάς ΑΣ", "𐌰𐌱 e\u0301 ǆ ﬁ", "\ud800 İ", "?!", "–"]
    lines = fd.normal_lines(texts).split(b"\n")
    assert lines[0] == lines[-1] == b"" and len(lines) == len(texts) + 2
    for text, line in zip(texts, lines[1:]):
        nfd = unicodedata.normalize("NFD", text.lower())
        want = " ".join("".join(c for c in nfd if classes[ord(c)]).split())
        assert fd.normalise(text) == want.replace("ς", "σ")
        assert line.decode("utf-8", "surrogatepass").split() == fd.normalise(text).split()


def test_word_hashes_tell_words_apart():
    """Words of every length up to 140 bytes that differ in one byte, wherever it is."""
    words = [bytes([97 + (i == j) for i in range(size)])
             for size in range(1, 141) for j in range(size + 1)]  # fmt: skip
    words += [b"b" * size for size in range(2, 141)]
    data = b" ".join(words * 2)
    end = np.cumsum([len(word) + 1 for word in words * 2]) - 1
    hashes = fd.word_hashes(data, end - [len(word) for word in words * 2], end)
    assert np.array_equal(*np.split(hashes, 2)) and len(set(hashes.tolist())) == len(words)


# ---- quality rules -------------------------------------------------------------------------------


def failures(name, texts):
    return fd.failures(name, texts, fd.Words(texts))


@pytest.mark.parametrize(
    "text, rule",
    [
        ("word " * 50, None),
        ("word " * 49, "words"),
        ("word " * 100_000, None),
        ("word " * 100_001, "words"),
        ("abc " * 60, None),
        ("ab " * 60, "word_length"),
        ("ab abcd " * 30, None),
        ("a" * 10 + " " + "b " * 0, "words"),
        (("a" * 10 + " ") * 60, None),
        (("a" * 11 + " ") * 60, "word_length"),
        ("good words end here...\n" * 3 + "good words end here\n" * 37, None),
        ("good words end here...\n" * 30 + "good words end here\n" * 70, None),
        ("good words end here…\n" * 31 + "good words end here\n" * 69, "ellipsis_lines"),
        ("word " * 80 + "1234 " * 20, None),
        ("word " * 79 + "1234 " * 21, "alphabetic"),
        ("", "words"),
    ],
)
def test_course_gopher_rules(text, rule):
    failed = failures("gopher", [text])
    assert [name for name in fd.COURSE_RULES if failed[name][0]][:1] == ([rule] if rule else [])
    assert fd.gopher_quality_filter(text) is (rule is None)


@pytest.mark.parametrize(
    "rule, good, bad",
    [
        ("symbols", "word " * 91 + "# " * 9, "word " * 90 + "# " * 10 + "#"),
        ("symbols", "word " * 91 + "... " * 9, "word " * 89 + "… " * 11),
        ("bullet_lines", "- a b\n" * 90 + "a b\n" * 10, "- a b\n" * 91 + "a b\n" * 9),
        ("stop_words", "the x of", "the x the"),
        ("stop_words", "have to", "have The"),
    ],
)
def test_other_gopher_rules(rule, good, bad):
    failed = failures("gopher", [good, bad])
    assert failed[rule].tolist() == [False, True]


def twin_of_repetition(text):
    """{rule: share of characters} by plain loops over words."""
    words = text.split()
    shares = {}
    for n in range(2, 5):
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        most = max(grams.values(), default=0)
        sizes = [len(" ".join(gram)) for gram, count in grams.items() if count == most]
        shares[f"top_{n}_gram"] = most * max(sizes) / len(text) if most > 1 else 0
    for n in range(5, 11):
        seen, covered = set(), set()
        for i in range(len(words) - n + 1):
            gram = tuple(words[i : i + n])
            if gram in seen:
                covered.update(range(i, i + n))
            seen.add(gram)
        shares[f"repeated_{n}_grams"] = sum(len(words[i]) for i in covered) / len(text)
    return shares


def test_ngram_repetition_is_its_twin():
    rng = random.Random(0)
    texts = []
    for _ in range(60):
        vocabulary = ["w" * rng.randint(1, 5) + str(j) for j in range(rng.choice([3, 10, 100]))]
        parts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 15))) for _ in range(4)]
        texts.append(" ".join(rng.choices(parts, k=rng.randint(1, 9))))
    texts += ["a", "a b"]
    words = fd.Words(texts)
    twins = [twin_of_repetition(text) for text in texts]
    measured = {rule: found for rule, found, *_ in fd.repetition_rules(texts, words, ())}
    for rule in twins[0]:
        np.testing.assert_allclose(measured[rule], [twin[rule] for twin in twins])
    failed = failures("repetition", texts)
    limits = {
        "top_2_gram": 0.2,
        "top_3_gram": 0.18,
        "top_4_gram": 0.16,
        "repeated_5_grams": 0.15,
        "repeated_7_grams": 0.13,
        "repeated_10_grams": 0.1,
    }  # Gopher, Table A1
    for rule, limit in limits.items():
        assert failed[rule].tolist() == [twin[rule] > limit for twin in twins]
        assert 0 < failed[rule].sum() < len(texts)


def test_copied_lines_and_paragraphs():
    lines = [babble(ENGLISH, 12, i) for i in range(10)]
    few, many = "\n".join(lines + lines[:2]), "\n".join(lines + lines[:6])
    paragraphs = "\n\n".join(line + "\n" + line[::-1] for line in lines + lines[:6])
    texts = [few, many, paragraphs]
    failed = failures("repetition", texts)
    assert failed["copied_lines"].tolist() == [False, True, True]  # 2/12, 6/16, 12/32 are copies
    assert failed["copied_line_characters"].tolist() == [False, True, True]
    assert failed["copied_paragraphs"].tolist() == [False, False, True]


def test_c4():
    text = (
        "This line has five words.\nJust four words here\nPlease enable JavaScript to see this.\n\n"
        "We use cookies, see our Cookie Policy now.\nAnother line that is good enough!"
    )
    want = "This line has five words.\n\nAnother line that is good enough!"
    assert fd.c4_clean(text) == want
    failed = failures("c4", [want, "A. B. C", "A. B! C?", "A. B. C. Lorem Ipsum.", "A. B. {C}."])
    assert failed["sentences"].tolist() == [True, True, False, False, False]
    assert failed["lorem_ipsum"].tolist() == [False, False, False, True, False]
    assert failed["curly_bracket"].tolist() == [False, False, False, False, True]


def test_fineweb():
    long, dot = "a line of more than thirty characters", "a line of more than thirty characters."

    def number(line, count):
        return [f"{i} {line}" for i in range(count)]

    texts = [
        "\n".join(number(long, 88) + number(dot, 12)),
        "\n".join(number(long, 87) + number(dot, 13)),
        "\n".join(number("short.", 67) + number(dot, 33)),
        "\n".join(number("short.", 66) + number(dot, 34)),
        "\n".join(number(dot, 16) + [dot] * 4),
        "\n".join(number(dot, 18) + [dot] * 2),
        "",
    ]
    failed = failures("fineweb", texts)
    assert failed["line_punctuation"].tolist() == [True, False, False, False, False, False, True]
    assert failed["short_lines"].tolist() == [False, False, True, False, False, False, True]
    assert failed["duplicate_line_characters"].tolist()[4:6] == [True, False]


def test_failed_rules_names_the_first():
    good = "\n".join(
        " ".join([*random.Random(i).sample(ENGLISH + GERMAN, 14)]) + "." for i in range(9)
    )
    texts = [good, "too short", good + " {", "\n".join([good.split("\n")[0]] * 9)]
    assert fd.failed_rules(texts) == [
        None,
        "gopher: words",
        "c4: curly_bracket",
        "repetition: copied_lines",
    ]
    assert fd.failed_rules(texts, rules=["c4"]) == [
        None,
        "c4: sentences",
        "c4: curly_bracket",
        None,
    ]


# ---- line deduplication --------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["none", "first"])
@pytest.mark.parametrize("num_parts", [1, 5])
def test_line_deduplication_is_its_twin(tmp_path, keep, num_parts):
    rng = random.Random(1)
    files, lines = [], {}
    for i in range(6):
        lines[f"{i}.txt"] = [f"line {rng.randint(0, 60)}\n" for _ in range(12)] + ["\n", "  é\n"]
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text("".join(lines[f"{i}.txt"])[:-1])  # the last without line end
    (tmp_path / "empty.txt").write_text("")
    fd.exact_line_deduplication([*files, tmp_path / "empty.txt"], tmp_path / "out", keep, num_parts)
    count, seen = Counter(line for part in lines.values() for line in part), set()
    for name, part in lines.items():
        want = []
        for line in part:
            want += [line] if count[line] == 1 or (keep == "first" and line not in seen) else []
            seen.add(line)
        assert (tmp_path / "out" / name).read_text() in ("".join(want), "".join(want)[:-1])
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*lines, "empty.txt"])


@pytest.mark.parametrize("keep, want", [("none", [[0, 1, 2], [0, 1]]), ("first", [[2], [0, 1]])])
def test_repeated_lines_are_the_places_to_drop(tmp_path, keep, want):
    tables = [str(tmp_path / "0.npy"), str(tmp_path / "1.npy")]
    for source, lines in enumerate(([b"7", b"5\n", b"7\r\n", b"9"], [b"5", b"7", b"1"])):
        assert fd.sort_lines(tables[source], lines, source) == len(lines)
    fd.repeated_lines(str(tmp_path / "out.npy"), tables, keep)
    gone = [fd.dropped([tmp_path / "out.npy"], i << 40, count) for i, count in ((0, 4), (1, 3))]
    assert [np.flatnonzero(flags).tolist() for flags in gone] == want


def test_inputs_of_one_name_are_refused(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("1")
    with pytest.raises(ValueError, match="2 input files are called x.txt"):
        fd.exact_line_deduplication([tmp_path / "a/x.txt", tmp_path / "b/x.txt"], tmp_path / "out")


# ---- MinHash -------------------------------------------------------------------------------------


def word_sets(texts, n):
    """The plain twin of shingles()."""
    sets = []
    for words in (fd.normalise(text).split() for text in texts):
        grams = [tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]
        sets.append(set(grams) if words else set())
    return sets


def test_shingles_are_their_twin():
    texts = [
        "",
        "!!",
        "one",
        "One two",
        "one two three",
        "one two three four five six",
        *(babble(ENGLISH[:4], k, k) for k in range(1, 30)),
        "Ünï cödé, wörds hére too yes",
    ]
    for n in (1, 3, 5):
        hashes, first = fd.shingles(texts, n)
        want = word_sets(texts, n)
        found = [set(hashes[a:b].tolist()) for a, b in zip(first, first[1:])]
        assert [len(s) for s in found] == [len(s) for s in want]
        for i, j in combinations(range(len(texts)), 2):
            assert len(found[i] & found[j]) == len(want[i] & want[j])
            both = [fd.distinct(hashes[first[k] : first[k + 1]]) for k in (i, j)]
            assert fd.jaccard(*both) == len(want[i] & want[j]) / max(1, len(want[i] | want[j]))


def pairs_of_similarity(similarity, count, size, seed):
    """Texts, two and two, that share this fraction of their words (one word is one shingle)."""
    rng, texts, common = (
        np.random.default_rng(seed),
        [],
        round(size * 2 * similarity / (1 + similarity)),
    )
    for _ in range(count):
        words = [f"w{number}" for number in rng.integers(0, 2**40, 2 * size - common)]
        texts += [" ".join(words[:size]), " ".join(words[size - common :])]
    return texts, common / (2 * size - common)


@pytest.mark.parametrize(
    "similarity, size", [(0.5, 200), (0.8, 200), (0.9, 1000), (0.5, 12), (0.8, 9)]
)
def test_minhash_error_is_that_of_theory(similarity, size):
    texts, true = pairs_of_similarity(similarity, 600, size, seed=size)
    signatures = fd.minhash_signatures(texts, 112, ngrams=1)
    found = (signatures[::2] == signatures[1::2]).mean(1)
    deviation = np.sqrt(true * (1 - true) / 112)
    assert np.sqrt(np.mean((found - true) ** 2)) < 1.1 * deviation
    assert abs(found.mean() - true) < 4 * deviation / np.sqrt(600)  # no bias


@pytest.mark.parametrize("bands, rows", [(14, 8), (20, 45)])
@pytest.mark.parametrize("similarity, size", [(0.7, 150), (0.85, 150), (0.95, 400)])
def test_lsh_recall_follows_the_s_curve(bands, rows, similarity, size):
    texts, true = pairs_of_similarity(similarity, 500, size, seed=7)
    signatures = fd.minhash_signatures(texts, bands * rows, ngrams=1)
    pairs = fd.candidate_pairs(signatures, bands)
    found = np.count_nonzero((pairs[:, 0] % 2 == 0) & (pairs[:, 1] == pairs[:, 0] + 1))
    want = 1 - (1 - true**rows) ** bands
    assert abs(found / 500 - want) < 4 * np.sqrt(want * (1 - want) / 500) + 0.004
    assert len(pairs) == found  # unrelated pairs never meet


def test_recall_with_nine_thousand_hashes():
    texts, true = pairs_of_similarity(0.9934, 150, 300, seed=7)
    pairs = fd.candidate_pairs(fd.minhash_signatures(texts, 9000, ngrams=1), 20)
    want = 1 - (1 - true**450) ** 20
    assert 0.1 < want < 0.9
    assert abs(len(pairs) / 150 - want) < 4 * np.sqrt(want * (1 - want) / 150)


def test_candidates_are_all_pairs_that_share_a_band():
    signatures = np.random.default_rng(0).integers(0, 3, (40, 6)).astype(np.uint32)
    signatures[5] = signatures[9] = fd.EMPTY
    want = [
        (i, j)
        for i, j in combinations(range(40), 2)
        if i not in (5, 9)
        and j not in (5, 9)
        and any((signatures[i, b : b + 2] == signatures[j, b : b + 2]).all() for b in (0, 2, 4))
    ]
    found = {tuple(pair) for pair in fd.candidate_pairs(signatures, 3).tolist()}
    assert found <= set(want)
    near = fd.candidate_pairs(signatures, 3, near=40)
    assert [tuple(pair) for pair in near.tolist()] == want


def test_many_copies_make_few_candidates_and_one_survivor():
    signatures = np.ones((5000, 112), np.uint32)
    assert len(fd.candidate_pairs(signatures, 14)) < 10 * 5000
    dropped = fd.near_duplicates(signatures, lambda i: np.array([1, 2]), 14, 0.8)
    assert len(dropped) == 4999


def clusters_but_one(edges, seed=0):
    """What near_duplicates drops where one band a pair makes these pairs, and no others, alike."""
    signatures = np.arange(101 * len(edges), dtype=np.uint32).reshape(101, -1)
    for band, (i, j) in enumerate(edges):
        signatures[i, band] = signatures[j, band]
    same = np.array([1, 2])
    return fd.near_duplicates(signatures, lambda i: same, len(edges), 0.8, seed).tolist()


def test_clusters_are_their_twin():
    rng = np.random.default_rng(3)
    for edges in (rng.integers(0, 60, (45, 2)), np.array([[i, i + 1] for i in range(100)])[::-1]):
        groups = {int(i): {int(i)} for i in edges.ravel()}
        for i, j in edges.tolist():
            merged = groups[i] | groups[j]
            groups.update(dict.fromkeys(merged, merged))
        dropped = clusters_but_one(edges)
        assert dropped == sorted(set(dropped)) == clusters_but_one(edges[::-1])
        for group in groups.values():
            assert len(group - set(dropped)) == 1
    dropped = {tuple(clusters_but_one(np.array([[0, 1]]), seed)) for seed in range(20)}
    assert dropped == {(0,), (1,)}  # the seed decides


def write_files(folder, texts):
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    return sorted(folder.iterdir())


def test_minhash_deduplication_of_files(tmp_path):
    a, b = babble(ENGLISH * 3 + GERMAN, 300, 1), babble(ENGLISH * 3 + GERMAN, 300, 2)
    texts = [
        a,
        b,
        a.upper() + "!!\r\n",
        a.replace(" ", "  ") + " tail end",
        "short",
        "Short.",
        "other",
        "",
        "!!",
        b[: len(b) // 2],
        "short text",
    ]
    files = write_files(tmp_path / "in", texts)
    fd.minhash_deduplication(files, 112, 14, 5, 0.8, tmp_path / "out")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert all((tmp_path / "in" / name).read_bytes() == data for name, data in kept.items())
    kept = {int(name[:3]) for name in kept}
    assert len(kept & {0, 2, 3}) == 1 and len(kept & {4, 5}) == 1
    assert {1, 6, 7, 8, 9, 10} <= kept
    with pytest.raises(ValueError, match="does not divide"):
        fd.minhash_deduplication(files, 100, 14, 5, 0.8, tmp_path / "out")


def test_candidates_below_the_threshold_are_kept(tmp_path):
    words = [f"w{i}" for i in range(100)]
    files = write_files(tmp_path / "in", [" ".join(words), " ".join(words[:75])])  # J = 0.75
    for threshold, kept in ((0.74, 1), (0.76, 2)):
        fd.minhash_deduplication(files, 200, 100, 1, threshold, tmp_path / f"out{kept}")
        assert len(list((tmp_path / f"out{kept}").iterdir())) == kept


def test_similar_to_datasketch():
    datasketch = pytest.importorskip("datasketch")
    texts, true = pairs_of_similarity(0.8, 200, 100, seed=1)
    theirs = [datasketch.MinHash(112) for _ in texts]
    for minhash, text in zip(theirs, texts):
        minhash.update_batch([word.encode() for word in text.split()])
    estimate = np.mean([a.jaccard(b) for a, b in zip(theirs[::2], theirs[1::2])])
    signatures = fd.minhash_signatures(texts, 112, 1)
    assert (signatures[::2] == signatures[1::2]).mean() == pytest.approx(
        estimate, abs=0.015
    )  # four deviations: with 20 pairs and 0.03 they were two and a half


def test_decontamination(tmp_path):
    question = babble(ENGLISH, 20, 1)
    rows = [{"question": question, "answer": "too short", "number": 3}]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluation, short = fd.evaluation_ngrams((str(tmp_path / "eval.jsonl"),))
    assert len(evaluation) == 8 and short == 1
    words = question.split()
    texts = [
        f"intro {' '.join(words[3:16]).upper()}! outro",
        f"x {' '.join(words[3:15])} y",
        "too short",
        "",
    ]
    assert fd.contaminated(texts, evaluation).tolist() == [True, False, False, False]


# ---- the whole pipeline --------------------------------------------------------------------------


def good_text(seed, lines=8):
    """A page that passes every rule: English function words among invented ones."""
    rng, text = random.Random(seed), []
    for _ in range(lines):
        invented = ["".join(rng.choices("abcdefghiklmnoprstu", k=6)) for _ in range(6)]
        text.append(" ".join(rng.sample(ENGLISH + invented, 17)).capitalize() + ".")
    return "\n".join(text)


MENU = "Subscribe to the newsletter of this site and to that of our friends."
TWIN = good_text(100, 20)


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    """A directory of small crawl files with something for every filter to do."""
    folder = tmp_path_factory.mktemp("crawl")
    html = [good_text(i) for i in range(6)]
    html[0] += f"\n{MENU}"
    html[1] += "\nWrite to ada@example.org or call 283-182-3829 that is at 192.0.2.1 not here."
    html += [babble(GERMAN, 90, 1), "too short to be of use", TWIN, "{ " + good_text(50)]
    pages = [record(f"<p>{text}</p>".replace("\n", "<br>").encode()) for text in html]
    (folder / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, pages))[:-40] + b"damage")
    wet = [good_text(20) + f"\n{MENU}", good_text(21), TWIN.replace(".", "!") + " Tail."]
    wet = [record(text.encode(), kind="conversion") for text in wet]
    (folder / "b.wet.gz").write_bytes(b"".join(map(gzip.compress, wet)))
    forged = good_text(98) + "\nThe text <|endoftext|> is only a text of some characters."
    rows = [{"text": good_text(30 + i)} for i in range(40)] + [{"text": forged}] + [{"text": 3}]
    (folder / "c.jsonl").write_text(
        "\n".join(map(json.dumps, rows))
        + "\nnot json\n"
        + "x" * 17_000_000
        + "\n"
        + json.dumps({"text": good_text(99)})
    )
    (folder / "d.warc.gz").write_bytes(b"%PDF-1.7 nothing of a crawl")
    return folder


def arguments(crawl, model, out, *more):
    return [
        "run",
        "--input",
        str(crawl),
        "--out",
        str(out),
        "--language-model",
        model[0],
        "--vocab-size",
        "300",
        "--val-fraction",
        "0.2",
        "--processes",
        "1",
        *more,
    ]


def start(args, **env):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *args],
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def all_files(out):
    """{path: bytes} of what must be the same in every run: all but times and the report."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix != ".seconds" and path.parent != out
    }


@pytest.fixture(scope="module")
def finished(crawl, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    assert fd.main(arguments(crawl, model, out)) == 0
    return out


def documents(folder):
    return [
        json.loads(line) for path in sorted(folder.glob("*.jsonl.gz")) for line in gzip.open(path)
    ]


def test_run_keeps_the_good_and_accounts_for_the_rest(finished):
    texts = [doc["text"] for doc in documents(finished / "minhash")]
    kept = {good_text(seed) for seed in [0, *range(2, 6), 20, 21, *range(30, 70), 99]}
    assert all(doc["language"] == "en" for doc in documents(finished / "minhash"))
    assert kept < set(texts) and len(texts) == len(kept) + 3  # masked, forged, a twin
    assert (TWIN in texts) + (TWIN.replace(".", "!") + " Tail." in texts) == 1
    assert not any(MENU in text for text in texts)
    [masked] = [text for text in texts if "|||" in text]
    for mask in ("|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||"):
        assert mask in masked
    total = fd.collect_books(str(finished))
    reasons = {name: dict(row["reasons"]) for name, row in total["filters"].items()}
    assert reasons == {
        "extract": {},
        "language": {"de": 1},
        "gopher": {"gopher: words": 1},
        "c4": {},
        "fineweb": {},
        "pii": {},
        "lines": {},
        "minhash": {"near-duplicate of another": 1},
    }
    assert total["filters"]["extract"]["documents"] == 9 + 3 + 42
    counts = total["counts"]
    assert counts["bad_rows"] == 1 and counts["too_large"] == 1 and counts["not_warc"] == 1
    assert counts["truncated"] == 1 and counts["emails masked"] == 1 and counts["no_text"] == 1
    assert total["languages"] == {"en": 53, "de": 1}
    row = total["filters"]["minhash"]
    assert row["documents"] == row["kept"] + 1 == len(texts) + 1
    assert row["kept_words"] == sum(len(text.split()) for text in texts)
    assert len(row["samples"]["kept"]) == 5 and len(row["samples"]["dropped"]) == 1


def test_report_shows_the_funnel(finished, capsys):
    assert fd.main(["report", "--out", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"minhash +52 +51 .* 33\.3%", printed) and "languages: en 53, de 1" in printed
    text = (finished / "report.txt").read_text()
    assert printed.strip() in text and "minhash, dropped:" in text
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_are_the_documents(finished):
    import tokenizer

    coder = tokenizer.Tokenizer.load(str(finished / "tokenize" / "tokenizer.json"))
    found = {}
    for side in ("train", "val"):
        ids = np.concatenate(
            [np.load(path) for path in (finished / "tokenize" / side).glob("*.npy")]
        )
        assert ids.dtype == np.uint16 and ids[-1] == coder.eot_id
        parts = np.split(ids, np.flatnonzero(ids == coder.eot_id) + 1)[:-1]
        found[side] = [coder.decode(part[:-1].tolist()) for part in parts]
    texts = [doc["text"] for doc in documents(finished / "minhash")]
    assert sorted(found["train"] + found["val"]) == sorted(texts)
    assert 0 < len(found["val"]) < len(texts) / 2


def test_any_number_of_workers_and_hash_seed_give_the_same_bytes(crawl, model, finished, tmp_path):
    run = start(arguments(crawl, model, tmp_path / "out", "--processes", "3"), PYTHONHASHSEED="7")
    assert run.communicate(timeout=60)[1] is not None and run.returncode == 0
    assert all_files(tmp_path / "out") == all_files(finished)


def test_two_machines_share_the_work(crawl, model, finished, tmp_path):
    out = tmp_path / "out"
    runs = [start(arguments(crawl, model, out), RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    printed = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert "of removals" in printed[0][0] and not printed[1][0]  # one report
    assert all("filter: 2/2 shards" in errors for _, errors in printed)
    assert all_files(out) == all_files(finished)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_anywhere_it_continues_to_the_same_bytes(crawl, model, finished, tmp_path, how):
    out, kills = tmp_path / "out", 0
    for wait in (0.5, 0.6, 0.7, 0.9, 60):
        run = start(arguments(crawl, model, out, "--processes", "2"))
        try:
            run.communicate(timeout=wait)
            break
        except subprocess.TimeoutExpired:
            run.send_signal(how)
            kills += 1
            run.communicate(timeout=10)
    assert run.returncode == 0 and kills >= 1
    assert all_files(out) == all_files(finished)
    assert not list(out.rglob("*.tmp"))


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_not_a_hang():
    began = time.perf_counter()
    with pytest.raises(ValueError, match="worker process was killed"):
        list(fd.in_pool(kill_self, [()] * 4, 2))
    assert time.perf_counter() - began < 10


def test_other_settings_or_files_are_refused(crawl, model, finished, capsys):
    before = all_files(finished)
    for more, flag in (
        (["--languages", "de"], "--languages"),
        (["--jaccard", "0.7"], "--jaccard"),
        (["--input", str(crawl / "c.jsonl")], "--input"),
    ):
        assert fd.main(arguments(crawl, model, finished, *more)) == 2
        [line] = capsys.readouterr().err.strip().split("\n")[-1:]
        assert flag in line and "was begun with" in line
    assert all_files(finished) == before


def test_signatures_of_an_older_version_are_refused(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": TWIN}))
    args = ["minhash", "--input", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "out")]
    assert fd.main(args) == fd.main(args) == 0
    path = tmp_path / "out" / "minhash" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["hash_version"]
    path.write_text(json.dumps(settings))
    assert fd.main(args) == 2
    assert "was begun with an older filter_data.py" in capsys.readouterr().err


def test_full_disk_is_one_line_and_the_run_can_go_on(crawl, model, finished, tmp_path):
    args = arguments(crawl, model, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, SCRIPT, *args],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot write" in done.stderr.strip().split("\n")[-1]
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert fd.main(args) == 0
    assert all_files(tmp_path / "out") == all_files(finished)


def test_one_stage_alone(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": TWIN + t}) for t in ("", "", " x"))
    )
    out = str(tmp_path / "out")
    spaced = TWIN.replace("\n", "\n\n") + "\n\nNot to be found elsewhere."
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": spaced}))
    args = ["lines", "--input", str(tmp_path / "y.jsonl"), "--out", out + "2", "--min-words", "0"]
    assert fd.main(args) == 0
    assert [doc["text"] for doc in documents(tmp_path / "out2" / "lines")] == [spaced]
    assert fd.main(["minhash", "--input", str(tmp_path / "x.jsonl"), "--out", out]) == 0
    assert len(documents(tmp_path / "out" / "minhash")) == 1
    assert (
        fd.main(["lines", "--input", str(tmp_path / "x.jsonl"), "--out", out, "--keep", "first"])
        == 0
    )
    assert [doc["text"] for doc in documents(tmp_path / "out" / "lines")] == [TWIN]
    folder = str(tmp_path / "out" / "lines")
    assert fd.main(["extract", "--input", folder, "--out", out + "3"]) == 0
    assert [doc["text"] for doc in documents(tmp_path / "out3" / "extract")] == [TWIN]
    assert fd.main(["filter", "--out", out]) == 2
    assert "extract" in capsys.readouterr().err


def test_file_names_that_the_stages_use_themselves(tmp_path):
    for i, name in enumerate(("settings", "tokenizer", "dropped", "part-000", "a/x", "b/x")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": good_text(i)}))
    args = ["--input", str(tmp_path / "*.jsonl"), str(tmp_path / "*" / "x.jsonl"), "--out"]
    for stage in ("extract", "lines", "minhash"):
        assert fd.main([stage, *args, str(tmp_path / "out")]) == 0
        assert len(documents(tmp_path / "out" / stage)) == 6


def test_filter_with_classifier_and_decontamination(model, tmp_path):
    texts = [good_text(1), good_text(2), babble(GERMAN, 90, 1)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "eval.txt").write_text(" ".join(texts[1].split()[20:40]))
    renamed = str(tmp_path / "toxic.bin")
    (tmp_path / "en.txt").write_text("\n".join(babble(ENGLISH, 10, i) for i in range(200)))
    (tmp_path / "de.csv").write_text(
        "tweet,class\n" + "\n".join(f"{babble(GERMAN, 9, i)},0" for i in range(200))
    )
    assert (
        fd.main(
            [
                "train",
                "--model",
                renamed,
                "--input",
                f"fine={tmp_path}/en.txt",
                f"{tmp_path}/de.csv",
                "--text-key",
                "tweet",
                "--label-key",
                "class",
                "--labels",
                "0=toxic",
            ]
        )
        == 2
    )
    assert (
        fd.main(
            [
                "train",
                "--model",
                renamed,
                "--input",
                f"fine={tmp_path}/en.txt",
                f"toxic={tmp_path}/en.txt",
                f"{tmp_path}/de.csv",
            ]
        )
        == 2
    )  # neither column is there
    (tmp_path / "both.csv").write_text(
        "tweet,class\n"
        + "\n".join(
            f"{babble(words, 9, i)},{label}"
            for i in range(200)
            for label, words in enumerate((GERMAN, ENGLISH))
        )
    )
    assert (
        fd.main(
            [
                "train",
                "--model",
                renamed,
                "--input",
                f"{tmp_path}/both.csv",
                "--text-key",
                "tweet",
                "--label-key",
                "class",
                "--labels",
                "0=toxic",
                "1=fine",
            ]
        )
        == 0
    )
    assert (
        fd.main(
            [
                "filter",
                "--input",
                str(tmp_path / "x.jsonl"),
                "--out",
                str(tmp_path / "out"),
                "--rules",
                "--languages",
                "--toxic",
                renamed,
                "--decontaminate",
                str(tmp_path / "eval.txt"),
            ]
        )
        == 0
    )
    assert [doc["text"] for doc in documents(tmp_path / "out" / "filter")] == texts[:1]
    reasons = {
        k: sum(v["reasons"].values())
        for k, v in fd.collect_books(str(tmp_path / "out"))["filters"].items()
    }
    assert reasons == {"toxic": 1, "decontaminate": 1, "pii": 0}


def test_score_prints_one_object_a_document(model, tmp_path, capsys):
    (tmp_path / "x.txt").write_text("der die und das<|endoftext|>the of and to")
    assert fd.main(["score", "--model", model[0], "--input", str(tmp_path / "x.txt")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == ["de", "en"]


@pytest.mark.parametrize(
    "args, words",
    [
        (["run"], "--input"),
        (["run", "--input", "/nowhere/*.gz"], "--input /nowhere"),
        (["minhash", "--num-bands", "13", "--input", SCRIPT], "--num-bands 13"),
        (["report", "--out", "/nowhere"], "--out /nowhere"),
        (["score", "--model", "/nowhere/m.bin", "--input", SCRIPT], "/nowhere/m.bin"),
        (["train", "--model", "m.bin", "--input", "a=/nowhere"], "a=/nowhere"),
        (["train", "--model", "m.bin", "--input", f"a={SCRIPT}"], "labels"),
        (["filter", "--input", SCRIPT, "--language-model", "/nowhere/lid"], "/nowhere/lid"),
        (["filter", "--input", SCRIPT, "--toxic", "/nowhere/t"], "/nowhere/t"),
        (
            ["filter", "--input", SCRIPT, "--languages", "--decontaminate", "/nowhere/e"],
            "--decontaminate /nowhere/e",
        ),
        (["tokenize", "--input", SCRIPT, "--tokenizer", "/nowhere/t"], "/nowhere/t"),
    ],
)
def test_mistakes_end_in_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fd.main(args) == 2
    assert words in capsys.readouterr().err.strip().split("\n")[-1]


@pytest.mark.parametrize("args", [["--jaccard", "2"], ["--ngrams", "0"], ["--processes", "x"]])
def test_bad_numbers_are_refused_by_the_flag(args, capsys):
    with pytest.raises(SystemExit) as error:
        fd.main(["run", *args])
    assert error.value.code == 2 and args[0] in capsys.readouterr().err


def test_a_missing_package_is_one_line(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert fd.main(["report", "--out", str(finished)]) == 2
    assert "matplotlib" in capsys.readouterr().err.strip().split("\n")[-1]


def test_cut_off_jsonl_and_odd_rows(tmp_path):
    data = gzip.compress(
        "\n".join(json.dumps({"text": f"{i} é\ud800"}) for i in range(2000)).encode()
    )
    (tmp_path / "x.jsonl.gz").write_bytes(data[:-30])
    counts = Counter()
    found = list(fd.read_rows(str(tmp_path / "x.jsonl.gz"), counts))
    assert len(found) > 1500 and counts["truncated"] == 1
    (tmp_path / "y.tsv").write_text("id\ttext\n7\tone\ttwo\n8\n")
    rows = list(fd.read_documents(str(tmp_path / "y.tsv"), counts=counts))
    assert [(row["id"], row["text"]) for row in rows] == [("7", "one")] and counts["no_text"] == 1
    (tmp_path / "s.jsonl").write_text('{"text": "a\\ud800b"}')
    assert [row["text"] for row in fd.read_documents(tmp_path / "s.jsonl")] == ["a?b"]
    (tmp_path / "z.jsonl").write_text("[" * 100_000 + '\n[1]\n{"text": "ok"}\n')
    assert list(fd.read_rows(str(tmp_path / "z.jsonl"), counts)) == [{"text": "ok"}]
    assert counts["bad_rows"] == 2


def test_memory_stays_flat_over_many_documents(tmp_path):
    peaks = []
    for count in (1000, 5000):
        path = tmp_path / f"{count}.jsonl.gz"
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(json.dumps({"text": good_text(i % 50)}) + "\n" for i in range(count))
        check = {"rules": lambda docs: fd.failed_rules([doc["text"] for doc in docs])}
        tracemalloc.start()
        stats = {}
        fd.sift(tmp_path / "out", fd.read_documents(str(path)), check, stats)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert stats["filters"]["rules"]["documents"] == count
    assert peaks[1] < 1.2 * peaks[0] + (1 << 20)


def test_the_doctests():
    import doctest

    assert doctest.testmod(fd).failed == 0
