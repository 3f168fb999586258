"""Common Crawl to training tokens: read, extract, filter, deduplicate, tokenise, and account for it.

    python filter_data.py run --input 'crawl/*.warc.gz' --out data/      # everything, resumable
    torchrun --nnodes 4 filter_data.py run --input 'crawl/*.wet.gz' --out /shared/data/
    python filter_data.py minhash --input 'my/*.jsonl.gz' --out data/    # one stage alone
    python filter_data.py train --input wiki=good.txt cc=crawl.jsonl.gz --model models/quality.bin

Every stage turns shards (one per input file) into shards under <out>/<stage>/. A shard is written
beside its final name and then renamed, and its .json comes last, so "done" means "the .json is
there": that one rule gives resuming after a kill, work split over processes and over machines that
share the directory, and a barrier between stages, without a server. A *word* is whatever
str.split() yields, everywhere in this file (with spaCy's words, where punctuation counts, Gopher's
80 % rule drops 114 of 499 pages instead of 3).

Papers: Gopher rules (Rae et al. 2021, arXiv:2112.11446, A.1.1), C4 (Raffel et al. 2020, JMLR 21),
FineWeb (Penedo et al. 2024, arXiv:2406.17557), CCNet (Wenzek et al. 2019), MinHash (Broder 1997),
LSH (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", ch. 3), dedup of training data (Lee
et al. 2021), decontamination (GPT-3, Brown et al. 2020, appendix C), fastText (Joulin et al. 2016).
"""

import argparse
import codecs
import concurrent.futures
import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import string
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from html import unescape
from typing import BinaryIO, NamedTuple

import numpy as np

MAX_BYTES = 16 << 20  # a larger page or line is never a document worth keeping: skipped, counted
BATCH_CHARS = 1 << 18  # characters handled by one numpy call; its arrays (about 6 MB) stay in cache
LID_URL = "https://dl.fbaipublicfiles.com/fasttext/supervised-models/lid.176.ftz"
LID_SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"


# ---- reading WARC and WET files ------------------------------------------------------------------

RECORD_START = re.compile(rb"(?:^|\n)(WARC/\d\.\d+\r?\n(?=[A-Za-z-]+:))")


class Page(NamedTuple):
    """One downloaded page: a 200 response of a WARC file or a conversion record of a WET file."""

    url: str
    content_type: str  # "text/html", "application/xhtml+xml" or "text/plain"
    charset: str | None  # as the server declared it, which is often wrong
    body: bytes


class ByteStream:
    """The bytes of a plain or gzip file through a small buffer, able to go on behind damage.

    Common Crawl compresses every record as a gzip member of its own so that a reader can start at
    any of them. After damage we look for the next member from just behind the *start* of the broken
    one: inflating may have swallowed the start of its neighbour before it noticed.
    """

    def __init__(self, path):
        self.file = open(path, "rb")
        self.is_gzip = self.file.read(2) == b"\x1f\x8b"
        self.buffer = bytearray()
        self._begin(0)

    def _begin(self, offset: int) -> None:
        self.file.seek(offset)
        self.member, self.raw, self.damaged = offset, b"", False
        self.inflater = zlib.decompressobj(31)

    def fill(self) -> bool:
        """Append up to 1 MiB to the buffer; False at the end of the file or at damage."""
        if not self.is_gzip:
            chunk = self.file.read(1 << 16)
            self.buffer += chunk
            return bool(chunk)
        while not self.damaged:
            if self.inflater.eof:
                self.raw = self.inflater.unused_data
                self.member = self.file.tell() - len(self.raw)
                self.inflater = zlib.decompressobj(31)
            self.raw = self.raw or self.file.read(1 << 16)
            if not self.raw:  # the file ends: inside a member it was cut off
                self.damaged = self.file.tell() > self.member
                return False
            try:
                chunk = self.inflater.decompress(self.raw, 1 << 20)
            except zlib.error:
                self.damaged = True
                return False
            self.raw = self.inflater.unconsumed_tail
            if chunk:
                self.buffer += chunk
                return True
        return False

    def restart(self) -> bool:
        """After damage: continue at the next gzip member; False when there is none."""
        offset, tail = self.member + 1, b""
        self.file.seek(offset)
        while block := self.file.read(1 << 20):
            found = re.search(rb"\x1f\x8b\x08[\x00-\x1f]", tail + block)
            if found:
                self.buffer.clear()
                self._begin(offset - len(tail) + found.start())
                return True
            offset, tail = offset + len(block), block[-3:]
        return False

    def next_record(self, counts: Counter) -> bool:
        """Drop bytes up to the next `WARC/1.x` line; False at the end of the file."""
        while True:
            found = RECORD_START.search(self.buffer)
            if found and found.end() < len(self.buffer):
                del self.buffer[: found.start(1)]
                return True
            del self.buffer[:-64]
            if not self.fill():
                if not self.damaged:
                    return False
                counts["damaged_gzip"] += 1
                if not self.restart():
                    return False

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end of the file or at damage."""
        while len(self.buffer) < size and self.fill():
            pass
        block = bytes(self.buffer[:size])
        del self.buffer[:size]
        return block

    def take_headers(self) -> dict[str, str] | None:
        """Header lines up to the blank one, names in lower case; None when they never end."""
        while not (end := re.search(rb"\r?\n\r?\n", self.buffer)):
            if len(self.buffer) > 1 << 16 or not self.fill():
                del self.buffer[:5]  # so that the search for the next record moves on
                return None
        return parse_headers(self.take(end.end()))

    def at_boundary(self) -> bool:
        """Whether a record ends here: only newlines, then the next record or the end."""
        while len(self.buffer) < 16 and self.fill():
            pass
        rest = self.buffer[:16].lstrip(b"\r\n")
        return not rest or rest.startswith(b"WARC/")


def parse_headers(block: bytes) -> dict[str, str]:
    """`Name: value` lines of WARC or HTTP as {lower-case name: value}; the first line is ":"."""
    first, *lines = block.decode("utf-8", "replace").splitlines() or [""]
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {":": first} | {name.strip().lower(): value.strip() for name, value in pairs}


def dechunk(body: bytes) -> bytes:
    """Undo HTTP's chunked transfer coding; a body that is not chunked comes back as it is.

    wget stores bodies as they came over the wire, Common Crawl stores them decoded but may keep the
    header, so the body and not the header decides.

    >>> dechunk(b"5\\r\\nhello\\r\\n1\\r\\n!\\r\\n0\\r\\n\\r\\n")
    b'hello!'
    """
    parts, at = [], 0
    while size := re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n").match(body, at):
        length = int(size[1], 16)
        if length == 0:
            break
        parts.append(body[size.end() : size.end() + length])
        at = size.end() + length + 2
        if body[at - 2 : at] not in (b"\r\n", b"\r", b""):
            return body if len(parts) == 1 else b"".join(parts)
    return b"".join(parts) if parts else body


def inflate(body: bytes, max_bytes: int) -> bytes:
    """Undo gzip or deflate if the body really is compressed; at most `max_bytes` come out."""
    if body[:2] != b"\x1f\x8b" and body[:1] != b"\x78":
        return body
    try:
        return zlib.decompressobj(47).decompress(body, max_bytes)
    except zlib.error:
        return body


def page_of(headers: dict, block: bytes, max_bytes: int, counts: Counter) -> Page | None:
    """The page in a record, or None (counted by reason) when it holds no readable one."""
    url = headers.get("warc-target-uri", "").strip("<>")  # wget writes <http://...>
    kind = headers.get("warc-type")
    if kind == "conversion":
        return Page(url, "text/plain", "utf-8", block)
    if kind != "response":
        counts["other_records"] += 1
        return None
    end = re.search(rb"\r?\n\r?\n", block)
    http = parse_headers(block[: end.start()] if end else b"")
    if not re.match(r"HTTP/\S+ 200\b", http[":"]):
        counts["not_status_200"] += 1
        return None
    declared = http.get("content-type", "").lower()
    content_type = (headers.get("warc-identified-payload-type") or declared).split(";")[0].strip()
    if content_type not in ("text/html", "application/xhtml+xml", "text/plain"):
        counts["not_html_or_text"] += 1
        return None
    body = block[end.end() :]
    if "chunked" in http.get("transfer-encoding", "").lower():
        body = dechunk(body)
    if http.get("content-encoding", "").lower() in ("gzip", "x-gzip", "deflate"):
        body = inflate(body, max_bytes)
    charset = re.search(r"charset=[\"']?([\w.:-]+)", declared)
    return Page(url, content_type, charset and charset[1], body)


def read_warc(path, max_bytes: int = MAX_BYTES, counts: Counter | None = None) -> Iterator[Page]:
    """Yield the pages of a WARC (0.18, 1.0, 1.1) or WET file, compressed or not.

    A record that cannot be used is skipped and counted in `counts`: "truncated" (the file ends
    inside it), "misaligned" (its Content-Length is wrong), "too_large" (over `max_bytes`; never
    held in memory), "bad_header", "damaged_gzip", "not_warc". After each, reading resumes at the
    next thing that looks like a record, so a bad record never costs its neighbours.
    """
    counts = Counter() if counts is None else counts
    stream, records = ByteStream(path), 0
    with stream.file:
        while stream.next_record(counts):
            records += 1
            headers = stream.take_headers()
            if headers is None or not headers.get("content-length", "").isdecimal():
                counts["bad_header"] += 1
                continue
            size = int(headers["content-length"])
            if size > max_bytes:  # its own length may be the lie, so search rather than skip
                counts["too_large"] += 1
                continue
            block = stream.take(size)
            if len(block) < size or not stream.at_boundary():
                counts["truncated" if len(block) < size else "misaligned"] += 1
                stream.buffer[:0] = block  # a neighbour may be inside
                continue
            page = page_of(headers, block, max_bytes, counts)
            if page:
                counts["pages"] += 1
                yield page
    if records == 0:
        counts["not_warc"] += 1


# ---- HTML to text --------------------------------------------------------------------------------

# What browsers decode a label as (WHATWG Encoding Standard), where Python differs: Latin-1 pages
# are really Windows-1252, GB2312 pages use GBK's extra characters, and so on.
WHATWG = {
    "latin1": "cp1252", "latin-1": "cp1252", "iso-8859-1": "cp1252", "iso8859-1": "cp1252",
    "l1": "cp1252", "ascii": "cp1252", "us-ascii": "cp1252", "iso-8859-9": "cp1254",
    "latin5": "cp1254", "iso-8859-11": "cp874", "tis-620": "cp874", "gb2312": "gb18030",
    "gb_2312-80": "gb18030", "gbk": "gb18030", "x-gbk": "gb18030", "chinese": "gb18030",
    "shift_jis": "cp932", "shift-jis": "cp932", "sjis": "cp932", "x-sjis": "cp932",
    "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "ksc5601": "cp949", "korean": "cp949",
    "x-euc-jp": "euc_jp", "big5": "big5hkscs", "x-x-big5": "big5hkscs", "dos-874": "cp874",
    "windows-874": "cp874", "x-cp1251": "cp1251", "x-cp1252": "cp1252", "koi8": "koi8-r",
    "iso-8859-8-i": "iso-8859-8", "x-mac-cyrillic": "mac_cyrillic", "macintosh": "mac_roman",
    "unicode-1-1-utf-8": "utf-8", "x-user-defined": "cp1252",
}  # fmt: skip


def find_codec(label: str | None) -> str | None:
    """Python's codec for a declared charset, or None if there is no such text encoding."""
    label = WHATWG.get((label or "").strip().lower(), label or "")
    try:
        codec = codecs.lookup(label)
    except (LookupError, ValueError):
        return None
    return codec.name if codec._is_text_encoding and codec.name != "utf-7" else None


def decode_html(body: bytes, charset: str | None = None) -> str:
    """Bytes of a page to text: byte order mark, valid UTF-8, the header's charset, <meta>'s, cp1252.

    Valid UTF-8 beats the declarations because text of another encoding is almost never valid UTF-8
    by accident, while wrong declarations are common. The incremental decoder forgives a character
    cut in two at the end: Common Crawl truncates pages at 1 MiB.
    """
    for mark, codec in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if body.startswith(mark):
            return body[len(mark) :].decode(codec, "replace")
    meta = re.search(rb"<(?:meta|\?xml)[^>]{1,200}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", body[:4096], re.I)
    declared = [find_codec(charset), find_codec(meta[1].decode("latin-1")) if meta else None]
    seven_bit = [c for c in declared if c in ("iso2022_jp", "hz")]  # these look like valid UTF-8
    tries = [*seven_bit, "utf-8", *filter(None, declared)]
    for codec in tries:
        try:
            return codecs.getincrementaldecoder(codec)("strict").decode(body)
        except (UnicodeDecodeError, ValueError):
            continue
    return body.decode(next(filter(None, declared), "cp1252"), "replace")


TAG = re.compile(r"<(/?)([a-zA-Z][\w:-]*)[^<>]*>|<[!?/][^<>]*>")
BLOCKS = frozenset(
    "address article aside blockquote body br dd div dl dt fieldset figure footer form h1 h2 h3 h4 h5 h6 head header "
    "hr html li main nav ol option p pre section table td th title tr ul".split()
)


def plain_text(html: str) -> str:
    """HTML to text with the standard library alone: tags dropped, blocks become lines.

    One pass that never looks back: a closing tag that is missing is searched for once, so
    60 kB of "<a <a <a" or of "<!--" costs no more than 60 kB of prose.

    >>> plain_text("<p>Fish &amp; <b>chips</b></p><script>var a</script><p>Tea</p>")
    'Fish & chips\\nTea'
    """
    parts, at, missing = [], 0, set()
    lower = html.lower()
    while tag := TAG.search(html, at):
        parts.append(html[at : tag.start()])
        at, name = tag.end(), (tag[2] or "").lower()
        end = "-->" if html.startswith("<!--", tag.start()) else f"</{name}"
        if (end == "-->" or name in ("script", "style", "noscript", "template")) and not tag[1]:
            close = -1 if end in missing else lower.find(end, tag.start() + 2 if end == "-->" else at)
            if close >= 0:
                at = close + 3 if end == "-->" else close
            else:
                missing.add(end)
        elif name in BLOCKS:
            parts.append("\n")
    parts.append(html[at:])
    lines = (" ".join(line.split()) for line in unescape("".join(parts)).split("\n"))
    return "\n".join(line for line in lines if line)


def extract_text(html_bytes: bytes, charset: str | None = None, main_content: bool = False) -> str | None:
    """The visible text of a page, or None when it is binary or holds no text.

    `charset` is what the HTTP header declared. `main_content` leaves out menus and footers
    (resiliparse's heuristic). Without resiliparse installed the plain extraction above is used.
    """
    html = decode_html(html_bytes, charset)
    if "\0" in html or html.startswith("%PDF-"):
        return None
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        return plain_text(html) or None
    html = html.encode("utf-8", "replace").decode()  # resiliparse cannot take lone surrogates
    return extract_plain_text(html, main_content=main_content) or None


# ---- language and classifiers (fastText) ---------------------------------------------------------

# The label that means "drop" in the published models (Dolma's Jigsaw classifiers, DCLM's) and ours.
BAD_LABEL = {"nsfw": "nsfw", "toxic": "toxic", "quality": "cc"}


@functools.lru_cache(maxsize=8)
def load_fasttext(path: str):
    """Load a fastText model once per process. ValueError: no file there, or not a model."""
    import fasttext

    if not os.path.isfile(path):
        raise ValueError(f"no fastText model at {path}: give the path of one, or train it with "
                         f"`filter_data.py train --model {path} --input LABEL=FILE ...`")
    fasttext.FastText.eprint = lambda *_: None
    try:
        return fasttext.load_model(str(path))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is not a fastText model ({error})") from None


def predict(text: str, model: str, k: int = 1) -> list[tuple[str, float]]:
    """The `k` likeliest labels of one text with their probabilities, likeliest first.

    Goes below fastText's Python wrapper, whose np.array(copy=False) numpy 2 refuses. A newline
    would silently end the text, and probabilities come back up to 1e-5 above 1.
    """
    line = text.replace("\n", " ").encode("utf-8", "replace").decode()  # no lone surrogates
    found = load_fasttext(str(model)).f.predict(line + "\n", k, 0.0, "strict")
    return [(label.removeprefix("__label__"), min(1.0, max(0.0, float(p)))) for p, label in found]


def download_lid(path: str, url: str = LID_URL) -> str:
    """Fetch fastText's 0.9 MB language model to `path` unless it is there; ValueError if altered."""
    if os.path.exists(path):
        return path
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=60) as response:
            data = response.read()
    except OSError as error:
        raise ValueError(f"cannot download {url} ({error}): fetch it by other means and pass its "
                         f"path with --language-model") from None
    if hashlib.sha256(data).hexdigest() != LID_SHA256:
        raise ValueError(f"{url} does not have the expected SHA-256 {LID_SHA256}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replacing(path) as file:
        file.write(data)
    return path


def identify_language(text: str, model: str | None = None) -> tuple[str, float]:
    """Language of a text (ISO 639 code) and its probability in [0, 1]; ("und", 0.0) for no text.

    `model` is lid.176.bin or .ftz, downloaded to ~/.cache/scratchlm if not given. Reads 2,000
    characters: that agrees with the whole text on 99.7 % of pages and is five times faster.
    """
    if model is None:
        model = download_lid(os.path.expanduser("~/.cache/scratchlm/lid.176.ftz"))
    found = predict(text[:2000], model) if text.strip() else []
    return found[0] if found else ("und", 0.0)


def classify_nsfw(text: str, model: str = "models/nsfw.bin") -> tuple[str, float]:
    """("nsfw" or "non-nsfw", probability) by a fastText model, such as Dolma's Jigsaw classifier."""
    return predict(text, model)[0] if text.strip() else ("non-nsfw", 0.0)


def classify_toxic_speech(text: str, model: str = "models/toxic.bin") -> tuple[str, float]:
    """("toxic" or "non-toxic", probability) by a fastText model."""
    return predict(text, model)[0] if text.strip() else ("non-toxic", 0.0)


def classify_quality(text: str, model: str = "models/quality.bin") -> tuple[str, float]:
    """("wiki" or "cc", probability): like what Wikipedia links to, or like the rest of a crawl."""
    return predict(text, model)[0] if text.strip() else ("cc", 0.0)


def bad_probability(text: str, task: str, model: str) -> float:
    """Probability that `text` is what the classifier of `task` ("nsfw", ...) is there to remove."""
    found = dict(predict(text, model, k=-1)) if text.strip() else {}
    if found and BAD_LABEL[task] not in found:
        raise ValueError(f"--{task} {model}: has the labels {', '.join(sorted(found))}, but needs "
                         f"one called {BAD_LABEL[task]}")
    return found.get(BAD_LABEL[task], 0.0)


# ---- personal data -------------------------------------------------------------------------------

# Each pattern is anchored by a look-behind to where a run of its characters starts, so a long run
# that fails is walked once: 90 kB of "a@b-b-b-" takes a millisecond, not minutes.
EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}(?![\w-])")
PHONE = re.compile(
    r"(?<![\w.])(?:\+?1[ .-]?)?(?:\(\d{3}\)|\d{3})[ .-]{0,2}\d{3}[ .-]?\d{4}(?![\w])"  # North America
    r"|(?<![\w.])\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,5}\)?){2,6}(?![\w])"  # E.164, with its plus sign
)
OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IP = re.compile(rf"(?<![\w.]){OCTET}(?:\.{OCTET}){{3}}(?!\w|\.\w)")


def mask_emails(text: str) -> tuple[str, int]:
    """Replace e-mail addresses by |||EMAIL_ADDRESS|||; returns (text, number replaced).

    >>> mask_emails("write to ada@example.org!")
    ('write to |||EMAIL_ADDRESS|||!', 1)
    """
    return EMAIL.subn("|||EMAIL_ADDRESS|||", text) if "@" in text else (text, 0)


def mask_phone_numbers(text: str) -> tuple[str, int]:
    """Replace phone numbers (North American, or international with +) by |||PHONE_NUMBER|||."""
    return PHONE.subn("|||PHONE_NUMBER|||", text)


def mask_ips(text: str) -> tuple[str, int]:
    """Replace IPv4 addresses by |||IP_ADDRESS|||; returns (text, number replaced)."""
    return IP.subn("|||IP_ADDRESS|||", text)


# ---- many documents as one array of words --------------------------------------------------------
#
# Python spends 50 ns and more on every word it touches. So a batch of documents becomes one array
# of code points, and everything below (words, hashes, n-grams) is arithmetic on whole arrays.

BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
INVERSE = pow(BASE, -1, 1 << 64)


class Words(NamedTuple):
    """The words of a batch: D documents, W words in all."""

    starts: np.ndarray  # (W,) where each word starts in the joined text
    lengths: np.ndarray  # (W,) characters
    hashes: np.ndarray  # (W,) uint64
    alphabetic: np.ndarray  # (W,) bool: contains a letter
    first: np.ndarray  # (D + 1,) index of each document's first word
    doc: np.ndarray  # (W,) which document


@functools.lru_cache(maxsize=1)
def character_classes() -> np.ndarray:
    """(0x110000,) uint8: 0 punctuation, symbol, accent, control; 1 other; 2 letter; 3 white space."""
    kinds = {"L": 2, "P": 0, "S": 0, "C": 0}
    category = unicodedata.category
    chars = map(chr, range(0x110000))
    return np.array(
        [3 if c.isspace() else 0 if category(c) == "Mn" else kinds.get(category(c)[0], 1) for c in chars], np.uint8
    )


@functools.lru_cache(maxsize=4)
def powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE**i and BASE**-i modulo 2**64 for i < size, each (size,) uint64."""
    both = np.full((2, size), [[BASE], [INVERSE]], np.uint64)
    both[:, 0] = 1
    return tuple(np.cumprod(both, axis=1, dtype=np.uint64))


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: spreads every input bit over all 64 output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def split_words(texts: list[str], normalised: bool = False) -> Words:
    """Cut a batch of texts into words at white space and hash each word.

    A word's hash is the polynomial sum(c_i * BASE**i) modulo 2**64 over its characters. With prefix
    sums S over the whole batch it is (S[end] - S[start]) / BASE**start, one expression for all
    words, equal for equal words wherever they stand. With `normalised`, characters of class 0
    (punctuation, accents) are left out first.
    """
    joined = "\n" + "\n".join(texts) + "\n"
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = character_classes()[codes]  # (N,)
    bounds = np.cumsum([1] + [len(t) + 1 for t in texts])  # where each document starts
    if normalised:
        keep = kinds > 0
        bounds = np.concatenate(([0], np.cumsum(keep)))[bounds]
        codes, kinds = codes[keep], kinds[keep]
    inside = kinds != 3
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    up, down = powers(1 << (len(codes) - 1).bit_length())
    sums = np.cumsum(codes * up[: len(codes)], dtype=np.uint64)
    letters = np.cumsum(kinds == 2)
    hashes = mix((sums[ends - 1] - sums[starts - 1]) * down[starts])
    first = np.searchsorted(starts, bounds)
    doc = np.repeat(np.arange(len(texts)), np.diff(first))
    return Words(starts, ends - starts, hashes, letters[ends - 1] > letters[starts - 1], first, doc)


def combine(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hash of every n consecutive word hashes: (W,) -> (W - n + 1,) uint64, order matters."""
    size = len(hashes) - n + 1
    total = hashes[:size].copy()
    for j in range(1, n):
        total *= np.uint64(BASE)
        total += hashes[j : j + size]
    return mix(total)


def per_document(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Sum of the words' values in each document: (W,) -> (D,)."""
    sums = np.concatenate(([0], np.cumsum(values)))
    return sums[first[1:]] - sums[first[:-1]]


def batches(items: Iterable, size_of=len, limit: int = BATCH_CHARS) -> Iterator[list]:
    """Group items into lists of about `limit` characters."""
    batch, size = [], 0
    for item in items:
        if batch and size + size_of(item) > limit:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += size_of(item)
    if batch:
        yield batch


# ---- quality rules -------------------------------------------------------------------------------

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # Gopher, A.1.1
COURSE_RULES = ("words", "word_length", "ellipsis_lines", "alphabetic")
RULE_SETS = ("gopher", "repetition", "c4", "fineweb")
TERMINAL = tuple(".!?…\"'”’」』。！？｡؟۔।")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros(len(whole)), where=np.asarray(whole) > 0)


def gopher_quality(texts: list[str], words: Words, stop_words=STOP_WORDS) -> dict[str, np.ndarray]:
    """{rule: (D,) bool, True where it fails}; rules and thresholds of Gopher, A.1.1.

    words: 50 to 100,000. word_length: mean of 3 to 10 characters. symbols: at most 0.1 "#" or
    ellipses a word. bullet_lines: at most 90 % of lines. ellipsis_lines: at most 30 % end in one.
    alphabetic: at least 80 % of words contain a letter. stop_words: at least two of eight.
    """
    count = np.diff(words.first)
    length = ratio(per_document(words.lengths, words.first), count)
    lines = [[line.strip() for line in text.split("\n") if line.strip()] for text in texts]
    num_lines = np.array([len(part) for part in lines])
    bullets = np.array([sum(line[0] in "•‣●◦▪-*" for line in part) for part in lines])
    ellipses = np.array([sum(line.endswith(("...", "…")) for line in part) for part in lines])
    dots = np.array([text.count("...") + text.count("…") for text in texts])
    hashes = np.array([text.count("#") for text in texts])
    stops = np.zeros((len(texts), len(stop_words)), bool)
    for j, hash_ in enumerate(split_words([" ".join(stop_words)]).hashes):
        stops[words.doc[words.hashes == hash_], j] = True
    return {
        "words": (count < 50) | (count > 100_000),
        "word_length": (length < 3) | (length > 10),
        "symbols": (ratio(hashes, count) > 0.1) | (ratio(dots, count) > 0.1),
        "bullet_lines": ratio(bullets, num_lines) > 0.9,
        "ellipsis_lines": ratio(ellipses, num_lines) > 0.3,
        "alphabetic": ratio(per_document(words.alphabetic, words.first), count) < 0.8,
        "stop_words": stops.sum(1) < min(2, len(stop_words)),
    }


def later_copies(parts: list[str]) -> list[str]:
    """The parts that repeat an earlier one."""
    seen, copies = set(), []
    for part in parts if len(set(parts)) < len(parts) else ():
        copies += [part] if part in seen else []
        seen.add(part)
    return copies


def sorted_ngrams(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """N-grams inside documents, equal ones side by side, in text order within a group.

    Returns (M,) index of the first word and (M,) bool "same as the one before". The index sits in
    the low bits of the hash, so one sort does for both; 40 or more bits of hash remain.
    """
    if len(words.hashes) < n:
        return np.zeros(0, np.int64), np.zeros(0, bool)
    at = np.flatnonzero(words.doc[n - 1 :] == words.doc[: len(words.doc) - n + 1])
    bits = max(20, len(words.hashes).bit_length())
    keys = mix(combine(words.hashes, n)[at] + words.doc[at].astype(np.uint64))
    keys = np.sort(keys >> np.uint64(bits) << np.uint64(bits) | at.astype(np.uint64))
    same = np.zeros(len(keys), bool)
    same[1:] = (keys[1:] ^ keys[:-1]) >> np.uint64(bits) == 0
    return (keys & np.uint64((1 << bits) - 1)).astype(np.int64), same


def top_ngram_characters(words: Words, n: int) -> np.ndarray:
    """(D,) characters in all copies of each document's most frequent n-gram; 0 if none repeats."""
    at, same = sorted_ngrams(words, n)
    heads = np.flatnonzero(~same)
    count = np.diff(np.append(heads, len(at)))
    heads, count = heads[count > 1], count[count > 1]
    total = np.concatenate(([0], np.cumsum(words.lengths)))
    size = total[at[heads] + n] - total[at[heads]] + n - 1  # with the spaces between
    best = np.zeros(len(words.first) - 1, np.int64)
    np.maximum.at(best, words.doc[at[heads]], count << 32 | size)  # most frequent, then longest
    return (best >> 32) * (best & 0xFFFFFFFF)


def repeated_ngram_characters(words: Words, n: int) -> np.ndarray | None:
    """(D,) characters of words inside an n-gram seen earlier in the document; None if there are none.

    Overlapping n-grams count once, as the paper asks: +1 where one starts, -1 behind its end, and a
    word is covered where the running sum is positive.
    """
    at, same = sorted_ngrams(words, n)
    later, size = at[same], len(words.hashes) + 1
    if len(later) == 0:
        return None
    cover = np.cumsum(np.bincount(later, minlength=size) - np.bincount(later + n, minlength=size))
    return per_document(words.lengths * (cover[:-1] > 0), words.first)


def gopher_repetition(texts: list[str], words: Words) -> dict[str, np.ndarray]:
    """{rule: (D,) bool}: the repetition rules of Gopher, Table A1.

    Of lines and of paragraphs at most 30 % may be copies of an earlier one, holding at most 20 % of
    characters; the top 2-, 3-, 4-gram at most 20, 18, 16 % of characters; repeated 5- to 10-grams
    at most 15, 14, 13, 12, 11, 10 %.
    """
    size = np.array([max(1, len(text)) for text in texts])
    failed = {}
    for name, split in (("line", re.compile("\n+").split), ("paragraph", re.compile("\n{2,}").split)):
        parts = [split(text.strip()) for text in texts]
        copies = [later_copies(part) for part in parts]
        failed[f"copied_{name}s"] = np.array([len(c) > 0.3 * len(p) for c, p in zip(copies, parts)])
        failed[f"copied_{name}_characters"] = np.array([sum(map(len, c)) for c in copies]) > 0.2 * size
    for n, most in ((2, 0.20), (3, 0.18), (4, 0.16)):
        failed[f"top_{n}_gram"] = top_ngram_characters(words, n) > most * size
    for n, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)):
        characters = repeated_ngram_characters(words, n)
        if characters is None:  # then no longer one repeats either
            break
        failed[f"repeated_{n}_grams"] = characters > most * size
    return failed


def c4_clean(text: str, min_words: int = 5, terminal_punctuation: bool = False) -> str:
    """C4's line rules (Raffel et al. 2020, 2.2): drop lines about javascript or cookies, short ones.

    C4 also dropped every line without terminal punctuation; FineWeb found that this throws away
    30 % of the tokens for a small gain (section 3.5), so it is off unless asked for. A blank line
    stays: it marks a paragraph.
    """
    suspicious = "javascript" in (low := text.lower()) or any(phrase in low for phrase in POLICY)

    def good(line: str) -> bool:
        low = line.lower() if suspicious else ""
        return len(line.split(None, min_words)) >= min_words and not (
            "javascript" in low
            or any(phrase in low for phrase in POLICY)
            or (terminal_punctuation and not line.rstrip().endswith(TERMINAL))
        )

    return "\n".join(line for line in text.split("\n") if not line.strip() or good(line)).strip()


def c4_quality(texts: list[str]) -> dict[str, np.ndarray]:
    """{rule: (D,) bool}: C4's page rules: "lorem ipsum", a curly bracket, fewer than 3 sentences."""
    sentence = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?=\s|$)|[。！？]")
    return {
        "lorem_ipsum": np.array(["lorem ipsum" in text.lower() for text in texts]),
        "curly_bracket": np.array(["{" in text for text in texts]),
        "sentences": np.array([len(sentence.findall(text)) < 3 for text in texts]),
    }


def fineweb_quality(texts: list[str]) -> dict[str, np.ndarray]:
    """{rule: (D,) bool}: FineWeb's own rules (section 3.6).

    Fails with at most 12 % of lines ending in punctuation, at least 10 % of characters in copied
    lines, or at least 67 % of lines shorter than 30 characters.
    """
    lines = [[line.strip() for line in text.split("\n") if line.strip()] or [""] for text in texts]
    return {
        "line_punctuation": np.array([sum(x.endswith(TERMINAL) for x in p) <= 0.12 * len(p) for p in lines]),
        "duplicate_line_characters": np.array(
            [sum(map(len, later_copies(p))) >= max(1, 0.1 * sum(map(len, p))) for p in lines]
        ),
        "short_lines": np.array([sum(len(x) < 30 for x in p) >= 0.67 * len(p) for p in lines]),
    }


def failed_rules(texts: list[str], rules=RULE_SETS, stop_words=STOP_WORDS) -> list[str | None]:
    """The first rule each text fails, such as "gopher: words", or None. Order as in FineWeb."""
    words = split_words(texts) if {"gopher", "repetition"} & set(rules) else None
    checks = {
        "repetition": lambda: gopher_repetition(texts, words),
        "gopher": lambda: gopher_quality(texts, words, stop_words),
        "c4": lambda: c4_quality(texts),
        "fineweb": lambda: fineweb_quality(texts),
    }
    found = [None] * len(texts)
    for name in (name for name in checks if name in rules):
        for rule, failed in checks[name]().items():
            for i in np.flatnonzero(failed):
                found[i] = found[i] or f"{name}: {rule}"
    return found


def gopher_quality_filter(text: str) -> bool:
    """Whether a text passes the four Gopher rules of the course (see gopher_quality)."""
    failed = gopher_quality([text], split_words([text]))
    return not any(failed[rule][0] for rule in COURSE_RULES)


# ---- exact line deduplication --------------------------------------------------------------------


def hash_lines(lines: Iterable[bytes]) -> np.ndarray:
    """(L,) uint64 of each line without its line end. A billion lines: 3 % risk of one collision."""
    digests = [hashlib.blake2b(line.rstrip(b"\r\n"), digest_size=8).digest() for line in lines]
    return np.frombuffer(b"".join(digests), np.uint64)


def sorted_line_hashes(hashes: np.ndarray, source: int) -> np.ndarray:
    """(2, L) uint64: hashes ascending, and where each came from (source << 40 | line number)."""
    order = np.argsort(hashes, kind="stable")
    return np.stack([hashes[order], order.astype(np.uint64) | np.uint64(source << 40)])


def repeated_lines(paths: list[str], part: int, num_parts: int) -> np.ndarray:
    """(2, R) uint64: hashes that occur more than once, and the place of the first.

    `paths` are .npy files of sorted_line_hashes, memory-mapped. Only hashes in the part-th of
    `num_parts` equal ranges are looked at, which bounds the memory: a line's copies share a range.
    """
    low, high = (part << 64) // num_parts, ((part + 1) << 64) // num_parts - 1
    pieces = []
    for path in paths:
        table = np.load(path, mmap_mode="r")
        start, stop = np.searchsorted(table[0], np.uint64(low)), np.searchsorted(table[0], np.uint64(high), "right")
        pieces.append(table[:, start:stop])
    table = np.concatenate(pieces, axis=1)
    table = table[:, np.lexsort((table[1], table[0]))]
    same = table[0, 1:] == table[0, :-1]
    first = same.copy()
    first[1:] &= ~same[:-1]
    return table[:, np.flatnonzero(first)]


def lines_to_drop(hashes: np.ndarray, place: int, repeated: list[np.ndarray], keep: str) -> np.ndarray:
    """(L,) bool: lines that have a copy; with keep="first", only those that are not the first.

    `place` is that of the first of these lines, source << 40 | line number.
    """
    drop = np.zeros(len(hashes), bool)
    for table in repeated:
        if table.shape[1] and len(hashes):
            at = np.minimum(np.searchsorted(table[0], hashes), table.shape[1] - 1)
            hit = table[0, at] == hashes
            if keep == "first":
                hit &= table[1, at] != np.arange(len(hashes), dtype=np.uint64) + np.uint64(place)
            drop |= hit
    return drop


def output_names(input_files: list, output_directory) -> list[str]:
    """Where each input goes in the output directory; ValueError if two have the same name."""
    names = [os.path.basename(os.fspath(path)) for path in input_files]
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{count} input files are called {name}: rename them, their outputs would collide")
    os.makedirs(output_directory, exist_ok=True)
    return [os.path.join(output_directory, name) for name in names]


def exact_line_deduplication(input_files: list, output_directory, keep: str = "none", num_parts: int = 1) -> None:
    """Rewrite each file under its own name without the lines that occur more than once anywhere.

    keep="none" removes every copy (the course's choice: such lines are menus and footers),
    keep="first" leaves the first. `num_parts` hash ranges are compared one after the other, each
    taking 16 bytes for every line in it. A line is compared without its line end.
    """
    targets = output_names(input_files, output_directory)
    with tempfile.TemporaryDirectory(prefix=".lines-", dir=output_directory) as folder:
        tables = [os.path.join(folder, f"{i}.npy") for i in range(len(input_files))]
        for i, path in enumerate(input_files):
            with open(path, "rb") as file:
                np.save(tables[i], sorted_line_hashes(hash_lines(file), i))
        repeated = [repeated_lines(tables, part, num_parts) for part in range(num_parts if tables else 0)]
        for i, path in enumerate(input_files):
            with open(path, "rb") as file:
                drop = lines_to_drop(hash_lines(file), i << 40, repeated, keep)
            with open(path, "rb") as file, replacing(targets[i]) as out:
                out.writelines(line for line, gone in zip(file, drop) if not gone)


# ---- near-duplicates: MinHash and LSH ------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, NFD, no accents, punctuation or symbols, single spaces: the course's normal form.

    The plain twin of split_words(..., normalised=True).

    >>> normalise("Crème  Brûlée, 50% off!")
    'creme brulee 50 off'
    """
    text = unicodedata.normalize("NFD", text.lower())
    kinds = character_classes()
    return " ".join("".join(c for c in text if kinds[ord(c)]).split())


def shingles(texts: list[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all n-grams of normalised words: (S,) uint64, and (D + 1,) where documents start.

    A document of fewer than n words is one shingle, the hash of all its words, so that it equals
    only itself; one without any word has no shingle.
    """
    lowered = [text.lower() for text in texts]
    words = split_words([t if t.isascii() else unicodedata.normalize("NFD", t) for t in lowered], normalised=True)
    size, num_docs = len(words.hashes), len(texts)
    # n - 1 zeros behind each document keep its n-grams from reaching into the next one
    place = np.arange(size) + words.doc * (n - 1)
    padded = np.zeros(size + (num_docs + 1) * (n - 1) + n, np.uint64)
    padded[place] = words.hashes
    hashes = combine(padded, n)[place]
    begin, end = words.first[:-1], words.first[1:]
    full = np.arange(size) + n <= end[words.doc]
    full[begin[(end > begin) & (end - begin < n)]] = True
    return hashes[full], np.concatenate(([0], np.cumsum(full)))[words.first]


def minhash_signatures(texts: Iterable[str], num_hashes: int = 112, ngrams: int = 5, seed: int = 0) -> np.ndarray:
    """MinHash signatures of raw texts: (D, num_hashes) uint32; a text without words gets all ones.

    Entry k is the minimum of a_k * x + b_k modulo 2**32 over the document's shingles x, so two
    signatures agree in a fraction of entries that estimates the Jaccard similarity with standard
    error sqrt(J (1 - J) / num_hashes) (Broder 1997). As x is already well mixed, 32-bit
    multiply-add is as accurate as the textbook's modulo 2**61 - 1 and 14 times faster.
    """
    numbers = mix(np.arange(2 * num_hashes, dtype=np.uint64) + mix(np.array([seed], np.uint64)))
    a, b = (numbers >> np.uint64(32)).astype(np.uint32).reshape(2, num_hashes)
    parts = []
    for batch in batches(texts):
        hashes, first = shingles(batch, ngrams)
        x = (hashes >> np.uint64(32)).astype(np.uint32)  # (S,)
        some = np.flatnonzero(np.diff(first))  # documents with words
        signature = np.full((num_hashes, len(batch)), 0xFFFFFFFF, np.uint32)
        value = np.empty_like(x)
        for k in range(num_hashes if len(some) else 0):
            np.multiply(x, a[k] | np.uint32(1), out=value)
            np.add(value, b[k], out=value)
            signature[k, some] = np.minimum.reduceat(value, first[some])
        parts.append(signature.T)
    return np.concatenate(parts) if parts else np.zeros((0, num_hashes), np.uint32)


def band_pairs(rows: np.ndarray, near: int = 8) -> np.ndarray:
    """Pairs of documents that agree in one band: (D, R) uint32 -> (P, 2) int64, i < j.

    Sorting the bands' hashes puts equal ones side by side. In a bucket of B documents each is paired
    with the next `near` and with the first: all pairs while B <= near + 1, and a few times B instead
    of B**2 when ten thousand pages share a band.
    """
    keys = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        keys = keys * np.uint64(BASE) + column
    real = np.flatnonzero((rows != 0xFFFFFFFF).any(1))  # texts without words resemble nothing
    order = real[np.argsort(mix(keys)[real], kind="stable")]
    keys = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = keys[1:] != keys[:-1]
    head = np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0))
    far = np.flatnonzero(np.arange(len(keys)) - head > near)
    pairs = [np.stack([order[head[far]], order[far]], 1)]
    for step in range(1, near + 1):
        left = np.flatnonzero(keys[step:] == keys[:-step])
        pairs.append(np.stack([order[left], order[left + step]], 1))
    return np.concatenate(pairs)


def unique_pairs(pairs: np.ndarray) -> np.ndarray:
    """(P, 2) int64 sorted, each once."""
    codes = np.sort(pairs[:, 0] << 32 | pairs[:, 1])  # np.unique(axis=0) is 50 times slower
    codes = codes[np.append(True, codes[1:] != codes[:-1])] if len(codes) else codes
    return np.stack([codes >> 32, codes & 0xFFFFFFFF], 1)


def candidate_pairs(signatures: np.ndarray, num_bands: int) -> np.ndarray:
    """LSH: pairs of documents equal in all rows of at least one band: (D, K) -> (P, 2) int64.

    A pair of similarity J becomes a candidate with probability 1 - (1 - J**r)**num_bands with
    r = K // num_bands rows a band. ValueError unless num_bands divides K.
    """
    rows, rest = divmod(signatures.shape[1], num_bands)
    if rest:
        raise ValueError(f"{signatures.shape[1]} hashes do not divide into {num_bands} bands")
    return unique_pairs(np.concatenate([band_pairs(signatures[:, b * rows : (b + 1) * rows]) for b in range(num_bands)]))


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|A and B| / |A or B| of two sets given as sorted arrays without repeats."""
    both = np.sort(np.concatenate([left, right]))
    common = np.count_nonzero(both[1:] == both[:-1])
    return common / max(1, len(both) - common)


def distinct(values: np.ndarray) -> np.ndarray:
    """Sorted, each once; np.unique hashes 64-bit integers, 50 times slower than this."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])] if len(values) else values


def duplicates_to_drop(edges: np.ndarray, seed: int = 0) -> np.ndarray:
    """All but one document of each cluster that the edges (P, 2) connect, ascending.

    Labels spread along edges until each document holds its cluster's smallest. The survivor is the
    member with the smallest seeded hash of its number, whatever order the edges come in.
    """
    members, ends = np.unique(edges, return_inverse=True)
    ends = ends.reshape(edges.shape)
    label = np.arange(len(members))
    while True:
        lowest = label[ends].min(1)
        spread = label.copy()
        np.minimum.at(spread, ends.ravel(), np.repeat(lowest, 2))
        spread = spread[spread]  # jump: halves the longest chain
        if np.array_equal(spread, label):
            break
        label = spread
    priority = mix(members.astype(np.uint64) + mix(np.array([seed + 1], np.uint64)))
    order = np.lexsort((priority, label))
    lost = label[order][1:] == label[order][:-1]  # all but the first of each cluster
    return np.sort(members[order[1:]][lost])


def minhash_deduplication(
    input_files: list,
    num_hashes: int,
    num_bands: int,
    ngrams: int,
    jaccard_threshold: float,
    output_directory,
    seed: int = 0,
) -> None:
    """Copy the files (one document each) that are not near-duplicates of a kept one, unchanged.

    Documents are compared as sets of word n-grams after `normalise`. MinHash and LSH only propose
    pairs; a pair counts if its true Jaccard similarity reaches the threshold, pairs that count
    form clusters, and of each cluster one member stays.
    """
    targets = output_names(input_files, output_directory)

    def read(path) -> str:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            return file.read()

    @functools.lru_cache(maxsize=1024)
    def shingle_set(i: int) -> np.ndarray:
        return distinct(shingles([read(input_files[i])], ngrams)[0])

    signatures = minhash_signatures(map(read, input_files), num_hashes, ngrams, seed)
    pairs = candidate_pairs(signatures, num_bands)
    true = [jaccard(shingle_set(i), shingle_set(j)) >= jaccard_threshold for i, j in pairs.tolist()]
    drop = set(duplicates_to_drop(pairs[np.array(true, bool)], seed).tolist())
    for i, (path, target) in enumerate(zip(input_files, targets)):
        if i not in drop:
            with open(path, "rb") as file, replacing(target) as out:
                shutil.copyfileobj(file, out)


# ---- decontamination -----------------------------------------------------------------------------


def evaluation_ngrams(paths: list[str], n: int = 13) -> tuple[np.ndarray, int]:
    """Hashes of all word n-grams of evaluation sets, sorted, and how many texts were too short.

    Each string value of a .jsonl line is a text, as is any other file. Texts shorter than n words
    are left out: a match of a few words would condemn half the crawl.
    """
    found, short = [np.zeros(0, np.uint64)], 0
    for path in paths:
        texts = [value for row in read_rows(path) for value in row.values() if isinstance(value, str)]
        for batch in batches(texts):
            hashes, first = shingles(batch, n)
            lengths = np.array([len(normalise(text).split()) for text in batch])
            short += int((lengths < n).sum())
            found.append(hashes[np.repeat(lengths >= n, np.diff(first))])
    return distinct(np.concatenate(found)), short


def contaminated(texts: list[str], evaluation: np.ndarray, n: int = 13) -> np.ndarray:
    """(D,) bool: documents that share an n-gram with the evaluation sets (GPT-3, appendix C)."""
    hashes, first = shingles(texts, n)
    if not len(evaluation):
        return np.zeros(len(texts), bool)
    at = np.minimum(np.searchsorted(evaluation, hashes), len(evaluation) - 1)
    return per_document(evaluation[at] == hashes, first) > 0


# ---- documents in and out ------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` only when all of it is there."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_json(path: str, value) -> None:
    """Save a value as JSON, all or nothing."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


@contextlib.contextmanager
def writing_documents(path: str):
    """Yield a function that appends one document to a .jsonl.gz file. Same documents, same bytes."""
    with replacing(path) as raw, gzip.GzipFile("", "wb", 3, raw, mtime=0) as file:
        yield lambda doc: file.write((json.dumps(doc) + "\n").encode())


def bounded_lines(file: BinaryIO, counts: Counter, limit: int = MAX_BYTES) -> Iterator[str]:
    """Lines of a file as text; one longer than `limit` bytes is skipped and counted as too_large."""
    while line := file.readline(limit):
        if len(line) < limit or line.endswith(b"\n"):
            yield line.decode("utf-8", "replace")
            continue
        counts["too_large"] += 1
        while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
            pass


def read_rows(path: str, counts: Counter | None = None, separator: str = "<|endoftext|>") -> Iterator[dict]:
    """Rows of a .jsonl, .csv or .tsv file; any other file is split at <|endoftext|> into {"text"}.

    Each may end in .gz. What cannot be read is counted: "bad_rows", "too_large", "truncated".
    """
    counts = Counter() if counts is None else counts
    kind = os.path.splitext(path.removesuffix(".gz"))[1]
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            if kind == ".jsonl":
                for line in bounded_lines(file, counts):
                    try:
                        row = json.loads(line)
                    except ValueError:
                        row = None
                    if isinstance(row, dict):
                        yield row
                    elif line.strip():
                        counts["bad_rows"] += 1
            elif kind in (".csv", ".tsv"):
                csv.field_size_limit(MAX_BYTES)
                lines = (line.replace("\0", "") for line in bounded_lines(file, counts))
                yield from csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",")
            else:
                for text in file.read().decode("utf-8", "replace").split(separator):
                    yield {"text": text.strip("\n")}
    except (EOFError, zlib.error, gzip.BadGzipFile, csv.Error):
        counts["truncated"] += 1


def read_documents(path: str, text_key: str = "text", main_content: bool = False, counts: Counter | None = None) -> Iterator[dict]:
    """Documents {"id", "url", "text", "words"} of a crawl file (.warc, .wet) or of rows of text."""
    counts = Counter() if counts is None else counts
    name = os.path.basename(path)
    if re.search(r"\.(warc|wet)\b", name):
        pages = read_warc(path, counts=counts)
        rows = (
            {"url": p.url, "text": p.body.decode("utf-8", "replace") if p.content_type == "text/plain" and p.charset == "utf-8"
             else extract_text(p.body, p.charset, main_content) if p.content_type != "text/plain" else decode_html(p.body, p.charset)}
            for p in pages
        )  # fmt: skip
    else:
        rows = read_rows(path, counts)
    for number, row in enumerate(rows):
        text = row.get(text_key if text_key in row else "text")
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            counts["no_text"] += 1
            continue
        yield {"id": row.get("id") or f"{name}/{number}", "url": row.get("url", ""), "text": text, "words": len(text.split())}


# ---- the books: what each filter saw, dropped and cost -------------------------------------------


def sieve(stats: dict, name: str, docs: list[dict], check) -> list[dict]:
    """Apply one filter to a batch and enter it in the books; returns the documents that stay.

    `check(docs)` gives for each document None or the reason to drop it, and may edit the text. Five
    kept and five dropped samples are those with the smallest hash of their id, so that any number
    of workers agrees on them.
    """
    began = time.perf_counter()
    row = stats["filters"].setdefault(
        name, {"documents": 0, "words": 0, "kept": 0, "kept_words": 0, "reasons": {}, "samples": [[], []]}
    )
    row["documents"] += len(docs)
    row["words"] += sum(doc["words"] for doc in docs)
    reasons = check(docs)
    kept = [doc for doc, reason in zip(docs, reasons) if reason is None]
    row["kept"] += len(kept)
    row["kept_words"] += sum(doc["words"] for doc in kept)
    for doc, reason in zip(docs, reasons):
        if reason:
            row["reasons"][reason] = row["reasons"].get(reason, 0) + 1
        samples, key = row["samples"][reason is not None], zlib.crc32(doc["id"].encode())
        if len(samples) < 5 or key < samples[-1][0]:
            samples.append([key, doc["id"], reason or "", doc["text"][:200]])
            samples.sort()
            del samples[5:]
    stats["seconds"][name] = stats["seconds"].get(name, 0) + time.perf_counter() - began
    return kept


def new_stats() -> dict:
    """Empty books of one shard."""
    return {"filters": {}, "counts": {}, "languages": {}, "seconds": {}}


# ---- the work on one shard -----------------------------------------------------------------------


def extract_shard(source: str, target: str, o: dict) -> dict:
    """Pages of one crawl file to documents."""
    stats, counts, began = new_stats(), Counter(), time.perf_counter()
    with writing_documents(target) as write:
        for doc in read_documents(source, o["text_key"], o["main_content"], counts):
            sieve(stats, "extract", [doc], lambda docs: [None])
            write(doc)
    stats["seconds"]["extract"] = time.perf_counter() - began
    return stats | {"counts": counts}


def filter_checks(o: dict, stats: dict) -> dict:
    """{name: check} of the filters that are switched on, in the order they run."""

    def language(docs):
        found = [identify_language(doc["text"], o["language_model"]) for doc in docs]
        for doc, (label, _) in zip(docs, found):
            doc["language"] = label
            stats["languages"][label] = stats["languages"].get(label, 0) + 1
        good = [label in o["languages"] and p >= o["language_threshold"] for label, p in found]
        return [None if ok else "unsure" if label in o["languages"] else label for ok, (label, _) in zip(good, found)]

    def rules(names):
        stop_words = STOP_WORDS if "en" in o["languages"] else ()
        return lambda docs: failed_rules([doc["text"] for doc in docs], names, stop_words)

    def c4(docs):
        for doc in docs:
            doc["text"] = c4_clean(doc["text"])
            doc["words"] = len(doc["text"].split())
        return rules(["c4"])(docs)

    def classifier(task):
        def check(docs):
            bad = [bad_probability(doc["text"][: o["classify_characters"]], task, o[task]) for doc in docs]
            return [f"{task} {p:.1f}" if p >= o["drop_above"] else None for p in bad]

        return check

    evaluation = evaluation_ngrams(o["decontaminate"])[0] if o["decontaminate"] else None

    def decontaminate(docs):
        hit = contaminated([doc["text"] for doc in docs], evaluation)
        return ["shares 13 words with an evaluation" if bad else None for bad in hit]

    def pii(docs):
        for doc in docs:
            for name, mask in (("emails", mask_emails), ("phone_numbers", mask_phone_numbers), ("ips", mask_ips)):
                doc["text"], found = mask(doc["text"])
                stats["counts"][name] = stats["counts"].get(name, 0) + found
        return [None] * len(docs)

    gopher = [name for name in ("repetition", "gopher") if name in o["rules"]]
    checks = {
        "language": language if o["languages"] else None,
        "gopher": rules(gopher) if gopher else None,
        "c4": c4 if "c4" in o["rules"] else None,
        "fineweb": rules(["fineweb"]) if "fineweb" in o["rules"] else None,
        **{task: classifier(task) if o[task] else None for task in BAD_LABEL},
        "decontaminate": decontaminate if o["decontaminate"] else None,
        "pii": pii if o["pii"] else None,
    }
    return {name: check for name, check in checks.items() if check}


def filter_shard(source: str, target: str, o: dict) -> dict:
    """Documents of one shard through language, rules, classifiers, decontamination and masking."""
    stats, counts = new_stats(), Counter()
    checks = filter_checks(o, stats)
    with writing_documents(target) as write:
        for docs in batches(read_documents(source, counts=counts), lambda doc: len(doc["text"])):
            for name, check in checks.items():
                docs = sieve(stats, name, docs, check)
            for doc in docs:
                write(doc)
    stats["counts"].update(counts)
    return stats


def hash_lines_shard(source: str, target: str, index: int) -> dict:
    """First pass of line deduplication: the sorted hashes of one shard's lines."""
    hashes = [hash_lines(doc["text"].encode("utf-8", "replace").split(b"\n")) for doc in read_documents(source)]
    with replacing(target) as file:
        np.save(file, sorted_line_hashes(np.concatenate([np.zeros(0, np.uint64), *hashes]), index))
    return {}


def repeated_lines_part(tables: list[str], target: str, part: int, num_parts: int) -> dict:
    """Second pass: the repeated lines in one range of hashes."""
    with replacing(target) as file:
        np.save(file, repeated_lines(tables, part, num_parts))
    return {}


def drop_lines_shard(source: str, target: str, index: int, parts: list[str], o: dict) -> dict:
    """Third pass: one shard without its repeated lines. Blank lines stay, they mark paragraphs."""
    repeated, at, stats = [np.load(part, mmap_mode="r") for part in parts], 0, new_stats()

    def drop(docs):
        nonlocal at
        for doc in docs:
            lines = doc["text"].split("\n")
            hashes = hash_lines(line.encode("utf-8", "replace") for line in lines)
            gone = lines_to_drop(hashes, index << 40 | at, repeated, o["keep"])
            at += len(lines)
            doc["text"] = "\n".join(x for x, bad in zip(lines, gone) if not bad or not x.strip()).strip()
            doc["words"] = len(doc["text"].split())
        return ["too few words left" if doc["words"] < o["min_words"] else None for doc in docs]

    with writing_documents(target) as write:
        for docs in batches(read_documents(source), lambda doc: len(doc["text"])):
            for doc in sieve(stats, "lines", docs, drop):
                write(doc)
    return stats


def signature_shard(source: str, target: str, o: dict) -> dict:
    """MinHash 1: signatures of one shard, (D, K)."""
    texts = (doc["text"] for doc in read_documents(source))
    signatures = minhash_signatures(texts, o["num_hashes"], o["ngrams"], o["seed"])
    with replacing(target) as file:
        np.save(file, signatures)
    return {"documents": len(signatures)}


def band_part(tables: list[str], target: str, band: int, o: dict) -> dict:
    """MinHash 2: candidate pairs that agree in one band, over all shards."""
    size = o["num_hashes"] // o["num_bands"]
    rows = [np.load(table, mmap_mode="r")[:, band * size : (band + 1) * size] for table in tables]
    with replacing(target) as file:
        np.save(file, unique_pairs(band_pairs(np.concatenate(rows))))
    return {}


def shingle_shard(source: str, target: str, bands: list[str], begin: int, o: dict) -> dict:
    """MinHash 3: shingle sets of those documents of a shard that are in some candidate pair."""
    texts = [doc["text"] for doc in read_documents(source)]
    wanted = np.zeros(len(texts), bool)
    for band in bands:
        ids = np.load(band).ravel() - begin
        wanted[ids[(ids >= 0) & (ids < len(texts))]] = True
    sets = [distinct(shingles([text], o["ngrams"])[0]) if use else np.zeros(0, np.uint64) for text, use in zip(texts, wanted)]
    with replacing(target) as file:
        np.save(file, np.concatenate([np.zeros(0, np.uint64), *sets]))
    with replacing(target.replace(".npy", ".first.npy")) as file:
        np.save(file, np.cumsum([0] + [len(part) for part in sets]))
    return {}


def verify_shard(sets: list[str], target: str, bands: list[str], begins: list[int], index: int, o: dict) -> dict:
    """MinHash 4: of the pairs whose first document is in this shard, those that are similar."""
    begins = np.array(begins)
    low, high = begins[index], begins[index + 1]
    pairs = [p[(p[:, 0] >= low) & (p[:, 0] < high)] for p in map(np.load, bands)]
    pairs = unique_pairs(np.concatenate(pairs))
    tables = [(np.load(path, mmap_mode="r"), np.load(path.replace(".npy", ".first.npy"))) for path in sets]

    def shingle_set(doc: int) -> np.ndarray:
        shard = np.searchsorted(begins, doc, "right") - 1
        values, first = tables[shard]
        return values[first[doc - begins[shard]] : first[doc - begins[shard] + 1]]

    true = [jaccard(shingle_set(i), shingle_set(j)) >= o["jaccard"] for i, j in pairs.tolist()]
    with replacing(target) as file:
        np.save(file, pairs[np.array(true, bool)])
    return {}


def cluster_part(edges: list[str], target: str, o: dict) -> dict:
    """MinHash 5: numbers of the documents to drop."""
    pairs = np.concatenate([np.load(path) for path in edges])
    with replacing(target) as file:
        np.save(file, duplicates_to_drop(pairs, o["seed"]))
    return {}


def drop_duplicates_shard(source: str, target: str, dropped: str, begin: int) -> dict:
    """MinHash 6: one shard without its near-duplicates."""
    gone, at, stats = np.load(dropped, mmap_mode="r"), begin, new_stats()

    def drop(docs):
        nonlocal at
        at += len(docs)
        hit = np.isin(np.arange(at - len(docs), at), gone)
        return ["near-duplicate of another" if bad else None for bad in hit]

    with writing_documents(target) as write:
        for docs in batches(read_documents(source), lambda doc: len(doc["text"])):
            for doc in sieve(stats, "minhash", docs, drop):
                write(doc)
    return stats


def train_tokenizer_part(sources: list[str], target: str, o: dict) -> dict:
    """A tokenizer trained on the kept text, the first gigabyte of it."""
    from tokenizer import EOT, Tokenizer, train_bpe

    def texts():
        left = 1 << 30
        for source in sources:
            for doc in read_documents(source):
                yield doc["text"]
                left -= len(doc["text"])
                if left < 0:
                    return

    vocab, merges = train_bpe(texts(), o["vocab_size"], [EOT], num_processes=1)
    Tokenizer(vocab, merges, [EOT]).save(target)
    return {}


def tokenize_shard(source: str, target: str, tokenizer: str, o: dict) -> dict:
    """Token ids of one shard, <|endoftext|> after each document, in train/ and val/ .npy files.

    A document goes to validation if the hash of its text falls below val_fraction: the same text
    lands on the same side in every run and on every machine.
    """
    from tokenizer import Tokenizer

    coder = Tokenizer.load(tokenizer)
    sides = {"train": [], "val": []}
    stats = new_stats()
    for doc in read_documents(source):
        sieve(stats, "tokenize", [doc], lambda docs: [None])
        digest = hashlib.blake2b(doc["text"].encode("utf-8", "replace"), digest_size=8).digest()
        side = "val" if int.from_bytes(digest, "big") < o["val_fraction"] * 2**64 else "train"
        ids = coder.encode_numpy(doc["text"], allowed_special=())
        sides[side] += [ids, np.array([coder.eot_id], ids.dtype)]
    for side, parts in sides.items():
        if parts:
            folder, name = os.path.split(target)
            os.makedirs(os.path.join(folder, side), exist_ok=True)
            with replacing(os.path.join(folder, side, name)) as file:
                np.save(file, np.concatenate(parts))
        stats["counts"][f"{side}_tokens"] = sum(map(len, parts))
    return stats


# ---- many shards, processes and machines ---------------------------------------------------------


def do_unit(marker: str, function, args: tuple, seconds: str) -> dict:
    """Do one unit of work; its marker, which holds its books, comes last and means "done"."""
    began = time.perf_counter()
    stats = function(*args)
    times = stats.pop("seconds", {})
    write_json(seconds, times | {"total": time.perf_counter() - began})
    write_json(marker, stats)
    return stats


def start_worker(parent: int) -> None:
    """Let a worker end with its parent, even if that was killed, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_pool(units: list[tuple], processes: int) -> Iterator[dict]:
    """Results of do_unit(*unit), as they come, from worker processes. A killed one is an error."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    before = set(multiprocessing.active_children())
    # not multiprocessing.Pool: that one waits for ever for a worker that was killed
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, start_worker, (os.getpid(),))
    try:
        for future in concurrent.futures.as_completed([pool.submit(do_unit, *unit) for unit in units]):
            yield future.result()
        pool.shutdown()
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        if isinstance(error, concurrent.futures.process.BrokenProcessPool):
            raise ValueError("a worker process was killed (out of memory?): finished shards are kept, run the same "
                             "command again, with a smaller --processes if memory is short") from None
        raise


def run_units(o: dict, name: str, units: list[tuple]) -> list[dict]:
    """Do the units (marker, function, args) that are not done, this machine's share of them.

    Rank r of w takes every w-th unit, then waits until the markers of all the others exist: the
    shared directory is the barrier. Returns the books of all units.
    """
    folder = os.path.join(o["out"], "seconds")
    os.makedirs(folder, exist_ok=True)
    units = [(*u, os.path.join(folder, os.path.relpath(u[0], o["out"]).replace(os.sep, "-"))) for u in units]
    todo = [unit for unit in units[o["rank"] :: o["world_size"]] if not os.path.exists(unit[0])]
    for marker, *_ in todo:
        for stale in glob.glob(glob.escape(marker.removesuffix(".json")) + ".*.tmp"):
            os.remove(stale)
    processes = min(o["processes"], len(todo))
    began = shown = time.monotonic()
    documents = 0
    for done, stats in enumerate(in_pool(todo, processes) if processes > 1 else (do_unit(*u) for u in todo), 1):
        documents += max([f["documents"] for f in stats.get("filters", {}).values()], default=stats.get("documents", 0))
        now = time.monotonic()
        if now - shown > 2 or done == len(todo):
            left = (now - began) / done * (len(todo) - done)
            print(f"{name}: {done}/{len(todo)} shards, {documents / (now - began):,.0f} documents/s, {left:.0f} s left",
                  file=sys.stderr)
            shown = now
    while missing := [unit[0] for unit in units if not os.path.exists(unit[0])]:
        if time.monotonic() - shown > 60:
            print(f"{name}: waiting for {len(missing)} shards of other machines, such as {missing[0]}", file=sys.stderr)
            shown = time.monotonic()
        time.sleep(0.2)
    results = []
    for marker, *_ in units:
        with open(marker, encoding="utf-8") as file:
            results.append(json.load(file))
    return results


def begin_stage(o: dict, stage: str, inputs: list[str], keys: tuple) -> tuple[str, list[str]]:
    """Make <out>/<stage>, refuse settings other than those it was begun with, name the shards."""
    folder = os.path.join(o["out"], stage)
    os.makedirs(os.path.join(folder, "work"), exist_ok=True)
    files = [[os.path.basename(path), os.path.getsize(path)] for path in inputs]
    settings = {"stage": stage, **{key: o[key] for key in keys}, "input": files}
    path = os.path.join(folder, "settings.json")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            old = json.load(file)
        for key, value in settings.items():
            if old.get(key) != value:
                raise ValueError(
                    f"--{key.replace('_', '-')}: {folder} was begun with "
                    + ("other input files" if key == "input" else f"{old.get(key)!r}, not {value!r}")
                    + f": use the same, or another --out, or delete {folder} and the stages behind it"
                )
    write_json(path, settings)
    stems = [re.sub(r"\.(gz|jsonl|warc|wet|txt|csv|tsv)\b", "", os.path.basename(path)) for path in inputs]
    unique = len(set(stems)) == len(stems)
    return folder, [stem if unique else f"{i:05d}-{stem}" for i, stem in enumerate(stems)]


# ---- stages --------------------------------------------------------------------------------------


def map_shards(o: dict, label: str, folder: str, names: list[str], kind: str, function, *columns) -> list[str]:
    """Run function(source, target, ...) for every shard; returns the targets, <folder>/<name><kind>.

    Each further argument is a list with a value for each shard, or one value for all of them.
    """
    targets = [os.path.join(folder, name + kind) for name in names]
    columns = [column if isinstance(column, list) else [column] * len(names) for column in columns]
    units = [
        (os.path.join(folder, name + ".json"), function, (source, target, *rest))
        for name, target, source, *rest in zip(names, targets, *columns)
    ]
    run_units(o, label, units)
    return targets


def stage_extract(o: dict, inputs: list[str]) -> list[str]:
    """Crawl files to documents."""
    folder, names = begin_stage(o, "extract", inputs, ("text_key", "main_content"))
    return map_shards(o, "extract", folder, names, ".jsonl.gz", extract_shard, inputs, o)


def stage_filter(o: dict, inputs: list[str]) -> list[str]:
    """Language, quality rules, classifiers, decontamination, personal data."""
    keys = ("languages", "language_threshold", "rules", "drop_above", "classify_characters", "pii")
    folder, names = begin_stage(o, "filter", inputs, (*keys, "decontaminate", *BAD_LABEL))
    for task in BAD_LABEL:  # find a missing or wrong model before the work starts
        if o[task]:
            bad_probability("a", task, o[task])
    if o["languages"]:
        identify_language("a", o["language_model"])
    return map_shards(o, "filter", folder, names, ".jsonl.gz", filter_shard, inputs, o)


def stage_lines(o: dict, inputs: list[str]) -> list[str]:
    """Lines that occur more than once in the whole crawl."""
    folder, names = begin_stage(o, "lines", inputs, ("keep", "min_words"))
    work, index = os.path.join(folder, "work"), list(range(len(names)))
    tables = map_shards(o, "lines 1/3", work, names, ".npy", hash_lines_shard, inputs, index)
    num_parts = 1 + sum(map(os.path.getsize, tables)) // (1 << 30)  # a gigabyte of hashes at a time
    parts = list(range(num_parts))
    repeated = map_shards(o, "lines 2/3", work, [f"part-{p:03d}" for p in parts], ".npy",
                          repeated_lines_part, [tables] * num_parts, parts, num_parts)
    return map_shards(o, "lines 3/3", folder, names, ".jsonl.gz", drop_lines_shard, inputs, index,
                      [repeated] * len(names), o)


def stage_minhash(o: dict, inputs: list[str]) -> list[str]:
    """Near-duplicate documents of the whole crawl."""
    keys = ("num_hashes", "num_bands", "ngrams", "jaccard", "seed")
    folder, names = begin_stage(o, "minhash", inputs, keys)
    work, size, index = os.path.join(folder, "work"), len(names), list(range(len(names)))
    if o["num_hashes"] % o["num_bands"]:
        raise ValueError(f"--num-hashes {o['num_hashes']} does not divide into --num-bands {o['num_bands']}")
    tables = map_shards(o, "minhash 1/6", work, names, ".npy", signature_shard, inputs, o)
    begins = np.cumsum([0] + [len(np.load(table, mmap_mode="r")) for table in tables]).tolist()
    bands = [f"band-{band:03d}" for band in range(o["num_bands"])]
    bands = map_shards(o, "minhash 2/6", work, bands, ".npy", band_part, [tables] * len(bands),
                       list(range(len(bands))), o)
    sets = map_shards(o, "minhash 3/6", work, [f"{n}-sets" for n in names], ".npy", shingle_shard,
                      inputs, [bands] * size, begins[:-1], o)
    edges = map_shards(o, "minhash 4/6", work, [f"{n}-edges" for n in names], ".npy", verify_shard,
                       [sets] * size, [bands] * size, [begins] * size, index, o)
    dropped = map_shards(o, "minhash 5/6", work, ["dropped"], ".npy", cluster_part, [edges], o)
    return map_shards(o, "minhash 6/6", folder, names, ".jsonl.gz", drop_duplicates_shard, inputs,
                      dropped * size, begins[:-1])


def stage_tokenize(o: dict, inputs: list[str]) -> list[str]:
    """Token files for train.py, with a tokenizer given or trained on the text itself."""
    folder, names = begin_stage(o, "tokens", inputs, ("tokenizer", "vocab_size", "val_fraction"))
    tokenizer = o["tokenizer"]
    if not tokenizer:
        tokenizer = os.path.join(folder, "tokenizer.json")
        run_units(o, "tokenizer", [(os.path.join(folder, "work", "tokenizer.json"), train_tokenizer_part, (inputs, tokenizer, o))])
    return map_shards(o, "tokenize", folder, names, ".npy", tokenize_shard, inputs, tokenizer, o)


STAGES = {"extract": stage_extract, "filter": stage_filter, "lines": stage_lines, "minhash": stage_minhash,
          "tokenize": stage_tokenize}


def run(o: dict, stages: list[str]) -> None:
    """Run stages one after the other, each on what the one before it left."""
    inputs = find_inputs(o)
    for stage in stages:
        inputs = STAGES[stage](o, inputs)


def find_inputs(o: dict) -> list[str]:
    """Files of --input (files, directories, globs), sorted. ValueError if one matches nothing."""
    found = []
    for spec in o["input"]:
        files = glob.glob(os.path.join(spec, "*.*")) if os.path.isdir(spec) else glob.glob(spec)
        files = [path for path in files if os.path.isfile(path) and not path.endswith((".json", ".tmp"))]
        if not files:
            raise ValueError(f"--input {spec}: no such file; give files, a directory or a quoted pattern")
        found += files
    return sorted(set(found))


# ---- report --------------------------------------------------------------------------------------


def collect(out: str) -> dict:
    """Add up the books of all shards: {"filters", "counts", "languages", "seconds"}."""
    total = new_stats()
    for stage in ("extract", "filter", "lines", "minhash", "tokens"):
        for path in sorted(glob.glob(os.path.join(glob.escape(out), stage, "*.json"))):
            with open(path, encoding="utf-8") as file:
                stats = json.load(file)
            seconds = os.path.join(out, "seconds", f"{stage}-{os.path.basename(path)}")
            if "filters" not in stats or not os.path.exists(seconds):
                continue
            with open(seconds, encoding="utf-8") as file:
                stats["seconds"] = json.load(file)
            for key in ("counts", "languages", "seconds"):
                total[key] = dict(Counter(total[key]) + Counter(stats[key]))
            for name, row in stats["filters"].items():
                merge_row(total["filters"].setdefault(name, {}), row)
    return total


def merge_row(into: dict, row: dict) -> None:
    """Add the books of one filter on one shard to those of all shards."""
    for key in ("documents", "words", "kept", "kept_words"):
        into[key] = into.get(key, 0) + row[key]
    into["reasons"] = dict(Counter(into.get("reasons", {})) + Counter(row["reasons"]))
    pairs = zip(into.get("samples", [[], []]), row["samples"])
    into["samples"] = [sorted(a + b)[:5] for a, b in pairs]


def funnel_table(total: dict) -> list[str]:
    """The funnel as lines of text."""
    removed = max(1, sum(row["documents"] - row["kept"] for row in total["filters"].values()))
    lines = [f"{'filter':<16}{'documents in':>14}{'kept':>12}{'words in':>14}{'kept':>14}{'removals':>10}{'seconds':>10}"]
    for name, row in total["filters"].items():
        share = (row["documents"] - row["kept"]) / removed
        lines.append(f"{name:<16}{row['documents']:>14,}{row['kept']:>12,}{row['words']:>14,}{row['kept_words']:>14,}"
                     f"{share:>10.1%}{total['seconds'].get(name, 0):>10.2f}")
        for reason, count in sorted(row["reasons"].items(), key=lambda item: -item[1])[:12]:
            lines.append(f"    {count:>8,}  {reason}")
    lines.append("a word is whatever white space separates")
    for key in ("counts", "languages"):
        items = sorted(total[key].items(), key=lambda item: -item[1])
        lines.append(f"{key}: " + ", ".join(f"{name} {count:,}" for name, count in items[:30]))
    return lines


def draw_funnel(total: dict, path: str) -> None:
    """Documents left after each filter, and the languages, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    names = list(total["filters"])
    for key, shade in (("documents", "0.8"), ("kept", "tab:blue")):
        left.barh(names, [total["filters"][name][key] for name in names], color=shade, label=key)
    left.invert_yaxis()
    left.set(title="documents before and after each filter")
    left.legend()
    languages = sorted(total["languages"].items(), key=lambda item: -item[1])[:20]
    right.bar([name for name, _ in languages], [count for _, count in languages])
    right.set(title="documents by language", yscale="log" if languages else "linear")
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def report(o: dict) -> None:
    """Print the funnel; write it with the samples to report.txt and draw it in report.png."""
    total = collect(o["out"])
    if not total["filters"]:
        raise ValueError(f"--out {o['out']}: nothing to report there yet; run the stages first")
    lines = funnel_table(total)
    print("\n".join(lines))
    for name, row in total["filters"].items():
        for title, samples in zip(("kept", "dropped"), row["samples"]):
            lines += ["", f"{name}: {title}"]
            lines += [f"  {doc} [{reason}] {' '.join(text.split())}" for _, doc, reason, text in samples]
    with replacing(os.path.join(o["out"], "report.txt")) as file:
        file.write("\n".join([*lines, ""]).encode("utf-8", "replace"))
    draw_funnel(total, os.path.join(o["out"], "report.png"))


# ---- training and applying classifiers -----------------------------------------------------------


def labelled_texts(o: dict) -> list[tuple[str, str]]:
    """(label, text) of LABEL=FILE inputs, or of rows with a label column."""
    names = dict(pair.split("=", 1) for pair in o["labels"])
    found = []
    for spec in o["input"]:
        label, path = spec.split("=", 1) if "=" in spec else (None, spec)
        if not os.path.isfile(path):
            raise ValueError(f"--input {spec}: no such file; give LABEL=FILE, or a file with a --label-key column")
        for row in read_rows(path, separator="\n"):
            given = label or str(row.get(o["label_key"]))
            text = row.get(o["text_key"])
            if text and text.strip() and names.get(given, given):
                found.append((names.get(given, given), text))
    return found


def random_crop(text: str, random: np.random.Generator) -> str:
    """8 to 256 consecutive words of a text, each power of two as likely."""
    words = text.split()
    size = int(2 ** random.uniform(3, 8))
    start = int(random.integers(0, max(1, len(words) - size + 1)))
    return " ".join(words[start : start + size])


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive outscores a negative (ties count half): the area under the ROC curve."""
    _, rank, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(count) - (count - 1) / 2)[rank]
    num = positive.sum()
    return float((mean_rank[positive].sum() - num * (num + 1) / 2) / max(1, num * (len(scores) - num)))


def train(o: dict) -> None:
    """Train a fastText classifier and print its accuracy and AUC on a tenth held out.

    Classes often differ in length (tweets against articles) and fastText would learn just that, so
    both sides are cut to random crops of the same lengths, as many crops of each.
    """
    import fasttext

    texts = labelled_texts(o)
    labels = sorted({label for label, _ in texts})
    if len(labels) < 2:
        raise ValueError(f"--input: needs texts of at least two labels, found {', '.join(labels) or 'none'}")
    random = np.random.default_rng(o["seed"])
    held = [zlib.crc32(text.encode("utf-8", "replace")) % 10 == 0 for _, text in texts]
    kept = {lab: [t for (name, t), out in zip(texts, held) if name == lab and not out] for lab in labels}
    most = max(map(len, kept.values()))
    lines = [f"__label__{label} {random_crop(part[i % len(part)], random)}"
             for label, part in kept.items() for i in range(most)]
    random.shuffle(lines)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8", errors="replace") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        model = fasttext.train_supervised(file.name, epoch=o["epochs"], lr=0.2, wordNgrams=2, dim=64, bucket=200_000,
                                          thread=1, seed=o["seed"], verbose=0)
    os.makedirs(os.path.dirname(os.path.abspath(o["model"])), exist_ok=True)
    model.save_model(o["model"] + ".tmp")
    os.replace(o["model"] + ".tmp", o["model"])
    load_fasttext.cache_clear()
    tests = [(label, random_crop(text, random)) for (label, text), out in zip(texts, held) if out]
    found = [dict(predict(text, o["model"], -1)) for _, text in tests]
    correct = np.mean([max(p, key=p.get) == label for p, (label, _) in zip(found, tests)])
    print(f"{o['model']}: {len(lines):,} crops, {len(tests):,} held out, accuracy {correct:.3f}", end="")
    for label in labels:
        scores = np.array([p.get(label, 0) for p in found])
        auc = area_under_curve(scores, np.array([name == label for name, _ in tests]))
        print(f", AUC {label} {auc:.3f}", end="")
    print()


def score(o: dict) -> None:
    """Print label, probability and start of every document, one JSON line each."""
    for path in find_inputs(o):
        for doc in read_documents(path, o["text_key"]):
            label, p = (predict(doc["text"], o["model"]) or [("und", 0.0)])[0]
            print(json.dumps({"id": doc["id"], "label": label, "probability": round(p, 4), "text": doc["text"][:80]}))


# ---- command line --------------------------------------------------------------------------------


def whole(low: int):
    """An argparse type: a whole number of at least `low`."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return parse


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")


def add_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """The flags of one command."""
    every = command == "run"
    add = parser.add_argument
    add("--out", default="data", help="directory of all stages' output")
    if command == "report":
        return
    add("--input", nargs="+", help="files, directories or patterns; default for a stage alone: the output of the one before it")
    add("--processes", type=whole(1), default=None, help="worker processes (default: all cores of this machine)")
    if every or command == "extract":
        add("--text-key", default="text", help="column that holds the text, in .jsonl, .csv and .tsv input")
        add("--main-content", action="store_true", help="leave out menus and footers (needs resiliparse)")
    if every or command == "filter":
        add("--languages", nargs="*", default=["en"], help="languages to keep (ISO 639 codes); none: all, unidentified")
        add("--language-threshold", type=fraction, default=0.65, help="least probability of the language (FineWeb: 0.65)")
        add("--language-model", help="path of lid.176.bin or .ftz (default: downloads the .ftz)")
        add("--rules", nargs="*", default=list(RULE_SETS), choices=RULE_SETS, help="rule sets to apply")
        for task, bad in BAD_LABEL.items():
            add(f"--{task}", metavar="MODEL", help=f"fastText model; drops what it calls {bad!r} (default: not applied)")
        add("--drop-above", type=fraction, default=0.5, help="least probability at which a classifier drops")
        add("--classify-characters", type=whole(1), default=4000, help="classifiers read this much of a document, characters")
        add("--decontaminate", nargs="*", default=[], metavar="FILE", help="evaluation sets; 13 equal words drop a document")
        add("--no-pii", dest="pii", action="store_false", help="leave e-mail addresses, phone numbers and IPs as they are")
    if every or command == "lines":
        add("--keep", choices=("none", "first"), default="none", help="copies of a repeated line to keep")
        add("--min-words", type=whole(0), default=50, help="shortest document to keep after lines went, words")
    if every or command == "minhash":
        add("--num-hashes", type=whole(1), default=112, help="hash functions of a signature")
        add("--num-bands", type=whole(1), default=14, help="bands of the LSH; must divide --num-hashes")
        add("--ngrams", type=whole(1), default=5, help="words of a shingle")
        add("--jaccard", type=fraction, default=0.8, help="least similarity of a duplicate")
        add("--seed", type=whole(0), default=0, help="of the hash functions and of which duplicate stays")
    if every or command == "tokenize":
        add("--tokenizer", help="tokenizer.json, or the directory of it (default: train one on the text)")
        add("--vocab-size", type=whole(257), default=32_000, help="of the tokenizer trained here, tokens")
        add("--val-fraction", type=fraction, default=0.005, help="share of documents held out for validation")


def make_parser() -> argparse.ArgumentParser:
    """The command line: one sub-command a stage, `run` with the flags of all of them."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    titles = {"run": "all stages and the report", **{name: f.__doc__.splitlines()[0] for name, f in STAGES.items()},
              "report": "print and draw the funnel"}
    for name, title in titles.items():
        add_flags(commands.add_parser(name, help=title, description=title, formatter_class=formatter), name)
    one = commands.add_parser("train", help="train a fastText classifier", formatter_class=formatter)
    one.add_argument("--input", nargs="+", required=True, help="LABEL=FILE (a line, row or document is a text), or files with a label column")
    one.add_argument("--model", required=True, help="where to save it")
    one.add_argument("--text-key", default="text", help="column of the text")
    one.add_argument("--label-key", default="label", help="column of the label")
    one.add_argument("--labels", nargs="*", default=[], metavar="OLD=NEW", help="rename labels, for example 0=toxic 2=non-toxic")
    one.add_argument("--epochs", type=whole(1), default=5, help="passes over the data")
    one.add_argument("--seed", type=whole(0), default=0, help="of crops and training")
    one = commands.add_parser("score", help="apply a fastText classifier", formatter_class=formatter)
    one.add_argument("--input", nargs="+", required=True, help="files, directories or patterns")
    one.add_argument("--model", required=True, help="a fastText model")
    one.add_argument("--text-key", default="text", help="column of the text")
    return parser


def run_command(o: dict) -> None:
    """Do what the command line asks for."""
    command = o["command"]
    if command in ("train", "score", "report"):
        return {"train": train, "score": score, "report": report}[command](o)
    o["rank"], o["world_size"] = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    o["processes"] = o["processes"] or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    names = list(STAGES)
    if not o["input"]:
        if command in ("run", "extract"):
            raise ValueError("--input: give the crawl files, for example --input 'crawl/*.warc.gz'")
        o["input"] = [os.path.join(o["out"], names[names.index(command) - 1], "*.jsonl.gz")]
    run(o, names if command == "run" else [command])
    if command == "run" and o["rank"] == 0:
        report(o)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    o = vars(make_parser().parse_args(argv))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up; every finished shard is safe
    try:
        run_command(o)
    except (ValueError, OSError) as error:
        print(f"filter_data.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
