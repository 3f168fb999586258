"""Common Crawl to training tokens: extract, filter, deduplicate, tokenise, and account for it.

    python filter_data.py run --input 'crawl/*.warc.gz' --out data/      # everything, resumable
    torchrun --nnodes 4 filter_data.py run --input 'crawl/*.wet.gz' --out /shared/data/
    python filter_data.py minhash --input 'my/*.jsonl.gz' --out data/    # one stage alone
    python filter_data.py train --input wiki=good.txt cc=crawl.jsonl.gz --model models/quality.bin

Every stage turns shards, one for each input file, into shards under <out>/<stage>/. A shard is
written beside its final name and renamed when all of it and its books are there, so "done" means
"the file exists". That one rule gives resuming after a kill, work split over processes and over
machines that share the directory, and a barrier between stages, without a server. A *word* is what
str.split() yields, everywhere in this file: with spaCy's words, where punctuation counts, Gopher's
80 % rule drops 114 of 499 pages instead of 3.

Papers: Gopher (Rae et al. 2021, arXiv:2112.11446, A.1.1), C4 (Raffel et al. 2020, JMLR 21), FineWeb
(Penedo et al. 2024, arXiv:2406.17557), MinHash (Broder 1997), LSH (Leskovec, Rajaraman, Ullman,
"Mining of Massive Datasets", ch. 3), deduplication of training data (Lee et al. 2021,
arXiv:2107.06499), decontamination (Brown et al. 2020, appendix C), fastText (Joulin et al. 2016).
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
import io
import itertools
import json
import mmap
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.request
import zlib
from collections import Counter, namedtuple
from html import escape, unescape
from pathlib import Path

import numpy as np

MAX_BYTES = 16 << 20  # a larger page or line is no document worth keeping: skipped and counted
BATCH_CHARS = 1 << 17  # characters handled by one numpy call: its arrays stay in the cache


# ---- reading WARC and WET files ------------------------------------------------------------------

RECORD_START = re.compile(rb"(?:^|\n)(WARC/\d\.\d+\r?\n(?=[A-Za-z-]+:))")
BLANK_LINE = re.compile(rb"\r?\n\r?\n")
GZIP_MEMBER = re.compile(rb"\x1f\x8b\x08[\x00-\x1f]")


# One downloaded page: a 200 response of a WARC file or a conversion record of a WET file.
# content_type: text/html, application/xhtml+xml or text/plain; charset: as the server declared it,
# which is often wrong; body: bytes.
Page = namedtuple("Page", "url content_type charset body")


def inflate(file, counts):
    """Yield the bytes of a plain or gzip file in chunks of up to 1 MiB.

    Common Crawl compresses each record as a gzip member of its own. After a damaged one the next
    gzip header is searched for from just behind its *start*, because inflating may have swallowed
    its neighbour before it noticed; a blank line parts what it left from what follows.
    """
    if file.read(2) != b"\x1f\x8b":
        file.seek(0)
        yield from iter(functools.partial(file.read, 1 << 16), b"")
        return
    data, member = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), 0
    while member < len(data):
        inflater, at = zlib.decompressobj(31), member
        with contextlib.suppress(zlib.error):
            while not inflater.eof and (raw := data[at : at + (1 << 15)]):
                yield inflater.decompress(raw, 1 << 20)
                at += len(raw) - len(inflater.unconsumed_tail + inflater.unused_data)
        if inflater.eof:
            member = at
            continue
        counts["damaged_gzip"] += 1
        yield b"\r\n\r\n"
        following = GZIP_MEMBER.search(data, member + 1)
        member = following.start() if following else len(data)


def parse_headers(block):
    """`Name: value` lines of WARC or HTTP as {lower-case name: value}; the first line is ":"."""
    first, *lines = block.decode("utf-8", "replace").splitlines() or [""]
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {":": first} | {name.strip().lower(): value.strip() for name, value in pairs}


def split_records(chunks, max_bytes, counts):
    """Yield (headers, body) of the WARC records in a run of bytes.

    Only the header of a record that turns out unusable is taken away, because its Content-Length
    may be the lie, and its neighbours inside what it claims.
    """
    buffer = bytearray()

    def fill(size):
        """Whether the buffer could be filled up to `size` bytes."""
        while len(buffer) < size and (chunk := next(chunks, None)) is not None:
            buffer.extend(chunk)
        return len(buffer) >= size

    while True:
        while not (start := RECORD_START.search(buffer)):
            del buffer[:-64]
            if not fill(len(buffer) + 1):
                return
        counts["records"] += 1
        del buffer[: start.start(1)]
        fill(1 << 16)
        end = BLANK_LINE.search(buffer, 0, 1 << 16)
        headers = parse_headers(buffer[: end.end()]) if end else {}
        del buffer[: end.end() if end else 5]  # 5: behind this "WARC/", to find the next
        length = headers.get("content-length", "")
        if not length.isascii() or not length.isdecimal():
            counts["bad_header"] += 1
        elif (size := int(length[:20])) > max_bytes:
            counts["too_large"] += 1
        elif not fill(size + 16) and len(buffer) < size:
            counts["truncated"] += 1
        elif not re.match(rb"\r\n\r\n|[\r\n]*(WARC/|$)", buffer[size : size + 16]):
            counts["misaligned"] += 1
        else:
            body = bytes(buffer[:size])
            del buffer[:size]
            yield headers, body


def dechunk(body):
    """Undo HTTP's chunked transfer coding; a body that is not chunked comes back as it is.

    wget stores bodies as they came over the wire; Common Crawl stores them decoded and may keep the
    header all the same. So the body decides, not the header.

    >>> dechunk(b"5\\r\\nhello\\r\\n1\\r\\n!\\r\\n0\\r\\n\\r\\n")
    b'hello!'
    """
    parts, at, pattern = [], 0, re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
    while size := pattern.match(body, at):
        at = size.end() + int(size[1], 16)
        parts.append(body[size.end() : at])
        if body[at : at + 2] != b"\r\n" and (at < len(body) or len(parts) == 1):
            return body  # text that only looks like a size; a later chunk may be cut off
        at += 2
    return b"".join(parts) or body


def page_of(headers, block, max_bytes, counts):
    """The page in a record, or None (counted by reason) when it holds no readable one."""
    url = headers.get("warc-target-uri", "").strip("<>")  # wget writes <http://...>
    if headers.get("warc-type") == "conversion":
        return Page(url, "text/plain", "utf-8", block)
    end = BLANK_LINE.search(block)
    http = parse_headers(block[: end.start()] if end else block)
    declared = http.get("content-type", "").lower()
    kind = (headers.get("warc-identified-payload-type") or declared).split(";")[0].strip()
    if headers.get("warc-type") != "response":
        counts["other_records"] += 1
    elif not re.match(r"HTTP/\S+ 200\b", http[":"]):
        counts["not_status_200"] += 1
    elif kind not in ("text/html", "application/xhtml+xml", "text/plain"):
        counts["not_html_or_text"] += 1
    else:
        body = block[end.end() :] if end else b""
        if "chunked" in http.get("transfer-encoding", "").lower():
            body = dechunk(body)
        if http.get("content-encoding", "").lower() in ("gzip", "x-gzip", "deflate"):
            with contextlib.suppress(zlib.error):  # Common Crawl has undone it, wget has not
                body = zlib.decompressobj(47).decompress(body, max_bytes)
        charset = re.search(r"charset=[\"']?([\w.:-]+)", declared)
        return Page(url, kind, charset and charset[1], body)
    return None


def read_warc(path, max_bytes=MAX_BYTES, counts=None):
    """Yield the pages of a WARC (0.18, 1.0, 1.1) or WET file, compressed or not.

    A record that cannot be used is skipped and counted in `counts`, a Counter: "truncated" (the
    file ends inside it), "misaligned" (its Content-Length is wrong), "too_large" (over `max_bytes`;
    never held in memory), "bad_header", "damaged_gzip", "not_warc". Reading goes on at the next
    thing that looks like a record.
    """
    counts = Counter() if counts is None else counts
    with open(path, "rb") as file:
        for headers, block in split_records(inflate(file, counts), max_bytes, counts):
            if page := page_of(headers, block, max_bytes, counts):
                counts["pages"] += 1
                yield page
    counts["not_warc"] += counts.pop("records", 0) == 0


# ---- HTML to text --------------------------------------------------------------------------------

# Charsets that browsers decode as another, larger one (WHATWG Encoding Standard): "Latin-1" pages
# are really Windows-1252, "GB2312" pages use GBK's extra characters, and so on.
WHATWG = {
    "cp1252": "latin1 latin-1 iso-8859-1 iso8859-1 l1 ascii us-ascii x-cp1252 x-user-defined utf-7",
    "cp1254": "iso-8859-9 latin5 l5", "cp874": "iso-8859-11 tis-620 dos-874 windows-874",
    "gb18030": "gb2312 gb_2312-80 gbk x-gbk chinese iso-ir-58", "big5hkscs": "big5 x-x-big5",
    "cp932": "shift_jis shift-jis sjis x-sjis ms_kanji windows-31j", "euc_jp": "x-euc-jp",
    "cp949": "euc-kr ks_c_5601-1987 ksc5601 ksc_5601 korean", "cp1251": "x-cp1251",
    "iso-8859-8": "iso-8859-8-i logical", "mac_cyrillic": "x-mac-cyrillic", "koi8-r": "koi8",
}
WHATWG = {alias: codec for codec, aliases in WHATWG.items() for alias in aliases.split()}


def decode_html(body, charset=None):
    """Bytes of a page to text: byte order mark, valid UTF-8, header's charset, <meta>'s, cp1252.

    Valid UTF-8 beats the declarations because text in another encoding is almost never valid UTF-8
    by accident, while wrong declarations are common. The incremental decoder forgives a character
    cut in two at the end: Common Crawl truncates pages at 1 MiB.
    """
    marks = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
    for mark, codec in marks.items():
        if body.startswith(mark):
            return body[len(mark) :].decode(codec, "replace")
    meta = rb"<(?:meta|\?xml)[^>]{1,200}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)"
    meta, declared = re.search(meta, body[:4096], re.IGNORECASE), []
    for label in (charset or "", meta[1].decode("latin-1") if meta else ""):
        with contextlib.suppress(LookupError, ValueError):  # no such encoding, or not one of text
            b"a".decode(codec := WHATWG.get(label.strip().lower(), label), "replace")
            declared.append(codecs.lookup(codec).name)
    like_utf_8 = [c for c in declared if c in ("iso2022_jp", "hz") or b"\0" in body[:64]]
    for codec in (*like_utf_8, "utf-8", *declared):
        with contextlib.suppress(ValueError):
            return codecs.getincrementaldecoder(codec)("strict").decode(body)
    return body.decode(declared[0] if declared else "cp1252", "replace")


TAG = re.compile(r"<!--|<(/?)([a-zA-Z][\w:-]*)[^<>]*>|<[!?/][^<>]*>")
BLOCKS = re.compile("address|article|aside|blockquote|body|br|dd|div|dl|dt|fieldset|figure|footer|"
                    "form|h[1-6r]|head|header|html|li|main|nav|ol|option|p|pre|section|table|td|"
                    "th|title|tr|ul")


def plain_text(html):
    """HTML to text with the standard library alone: tags dropped, blocks become lines.

    One pass that never looks back, and a closing tag that is missing is searched for once, so
    60 kB of "<a <a <a" or of "<!--" costs no more than 60 kB of prose.

    >>> plain_text("<p>Fish &amp; <b>chips</b></p><script>var a</script><p>Tea</p>")
    'Fish & chips\\nTea'
    """
    parts, at, missing, lower = [], 0, set(), html.lower()
    lower = lower if len(lower) == len(html) else html  # some capitals are two letters when small
    while tag := TAG.search(html, at):
        parts.append(html[at : tag.start()])
        at, name, comment = tag.end(), (tag[2] or "").lower(), tag[0] == "<!--"
        if comment or (name in ("script", "style", "noscript", "template") and not tag[1]):
            end = "-->" if comment else f"</{name}"
            found = -1 if end in missing else lower.find(end, tag.start() + 2 if comment else at)
            if found < 0:
                missing.add(end)
            else:
                at = found + 3 * comment
        elif BLOCKS.fullmatch(name):
            parts.append("\n")
    lines = unescape("".join([*parts, html[at:]])).split("\n")
    return "\n".join(line for line in (" ".join(line.split()) for line in lines) if line)


def extract_text(html_bytes, charset=None, main_content=False):
    """The visible text of a page, or None when it is binary or holds no text.

    `charset` is what the HTTP header declared. `main_content` leaves out menus and footers
    (resiliparse's heuristic). Without resiliparse installed, `plain_text` does the work.
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


# ---- documents in and out ------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """A file to write that takes the place of `path` only once all of it is there."""
    temporary = f"{os.fspath(path)}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def save(path, value):
    """Save an array as .npy, anything else as JSON, all or nothing."""
    with replacing(path) as file:
        if isinstance(value, np.ndarray):
            np.save(file, value)
        else:
            file.write(json.dumps(value).encode() + b"\n")


def bounded_lines(file, counts):
    """Lines of a file as text; one of MAX_BYTES or more is skipped and counted as too_large."""
    while line := file.readline(MAX_BYTES):
        if len(line) < MAX_BYTES or line.endswith(b"\n"):
            yield line.decode("utf-8", "replace")
            continue
        counts["too_large"] += 1
        while (rest := file.readline(MAX_BYTES)) and not rest.endswith(b"\n"):
            pass


def read_rows(path, counts=None):
    """Rows of a .jsonl, .csv or .tsv file; of any other, {"text"} up to each <|endoftext|>.

    Each may end in .gz. What cannot be read is counted: "bad_rows", "too_large", "truncated".
    """
    counts, path = Counter() if counts is None else counts, os.fspath(path)
    kind = os.path.splitext(path.removesuffix(".gz"))[1]
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            lines = bounded_lines(file, counts)
            if kind == ".jsonl":
                for line in filter(str.strip, lines):
                    row = None
                    with contextlib.suppress(ValueError, RecursionError):
                        row = json.loads(line)
                    if isinstance(row, dict):
                        yield row
                    else:
                        counts["bad_rows"] += 1
            elif kind in (".csv", ".tsv"):
                csv.field_size_limit(MAX_BYTES)
                lines = (line.replace("\0", "") for line in lines)
                yield from csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",")
            else:
                for text in "".join(lines).split("<|endoftext|>"):
                    yield {"text": text.strip("\n")}
    except (EOFError, zlib.error, gzip.BadGzipFile, csv.Error):
        counts["truncated"] += 1


def read_documents(path, text_key="text", main_content=False, counts=None):
    """Documents {"id", "text", "words", ...} of a crawl file (.warc, .wet) or of rows of text."""
    counts, name = Counter() if counts is None else counts, os.path.basename(path)
    ours = os.path.exists(os.path.join(os.path.dirname(path), "settings.json"))  # a stage's output
    rows = read_rows(path, counts)
    if re.search(r"\.(warc|wet)\b", name):
        rows = ({"url": page.url, "text": extract_text(page.body, page.charset, main_content)
                 if "html" in page.content_type else decode_html(page.body, page.charset)}
                for page in read_warc(path, counts=counts))
    for number, row in enumerate(rows):
        text = row.get(text_key, row.get("text"))
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            counts["no_text"] += 1
            continue
        text = text.encode("utf-8", "replace").decode()  # lone surrogates cannot be written
        counted = ours and isinstance(row.get("words"), int)
        yield {**row, "id": str(row.get("id") or f"{name}/{number}"), "text": text,
               "words": row["words"] if counted else len(text.split())}


# ---- language and classifiers (fastText) ---------------------------------------------------------

LID_URL = "https://dl.fbaipublicfiles.com/fasttext/supervised-models/lid.176.ftz"
LID_SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
STOPS = dict.fromkeys(map(ord, '.,;:!?"'))  # for str.translate: deleted
BAD_LABEL = {"nsfw": "nsfw", "toxic": "toxic", "quality": "cc"}  # as in Dolma's and DCLM's models


@functools.lru_cache(maxsize=8)
def load_fasttext(path):
    """Load a fastText model, once per process. ValueError: no file there, or not a model."""
    import fasttext

    fasttext.FastText.eprint = lambda *_: None
    try:
        return fasttext.load_model(path)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"no fastText model at {path} ({error}): give the path of one, or train "
                         "it with `filter_data.py train`") from None


def predict(text, model, k=1):
    """[(label, probability)] of the `k` likeliest labels (-1: all); [] for a text without words.

    Goes below fastText's Python wrapper, whose np.array(copy=False) numpy 2 refuses. A newline
    would silently end the text, and probabilities come back up to 1e-5 above 1.
    """
    if not text or text.isspace():
        return []
    line = text.replace("\n", " ").encode("utf-8", "replace").decode()  # no lone surrogates
    found = load_fasttext(os.fspath(model)).f.predict(line + "\n", k, 0.0, "strict")
    return [(label.removeprefix("__label__"), min(1.0, max(0.0, float(p)))) for p, label in found]


def download_language_model(path, url=LID_URL, sha256=LID_SHA256):
    """Fetch fastText's language model to `path` unless it is there. ValueError: it was altered."""
    if os.path.exists(path):
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
    except OSError as error:
        raise ValueError(f"cannot download {url} ({error}): fetch it by other means and give its "
                         "path with --language-model") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{url} does not have the expected SHA-256 {sha256}: not used")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replacing(path) as file:
        file.write(data)
    return path


def identify_language(text, model=None):
    """(ISO 639 code, probability in [0, 1]) of a text's language; ("und", 0.0) for no text.

    `model` is lid.176.bin or .ftz; the .ftz (0.9 MB) is downloaded if not given. Reads 500
    characters, and 2,000 where those leave a doubt; 2,000 agree with the whole text on 99.7 % of
    pages. Stops and commas go, because fastText would take "word." for another word than "word".
    """
    model = model or download_language_model(os.path.expanduser("~/.cache/scratchlm/lid.176.ftz"))
    best = ("und", 0.0)
    for size in (500, 2000):
        best = (predict(text[:size].translate(STOPS), model) or [best])[0]
        if best[1] > 0.9 or len(text) <= size:
            break
    return best


def classify_nsfw(text, model="models/nsfw.bin"):
    """("nsfw" or "non-nsfw", probability) by a fastText model such as Dolma's."""
    return (predict(text, model) or [("non-nsfw", 0.0)])[0]


def classify_toxic_speech(text, model="models/toxic.bin"):
    """("toxic" or "non-toxic", probability) by a fastText model such as Dolma's."""
    return (predict(text, model) or [("non-toxic", 0.0)])[0]


def classify_quality(text, model="models/quality.bin"):
    """("wiki" or "cc", probability): like a page Wikipedia links to, or like any of the crawl."""
    return (predict(text, model) or [("cc", 0.0)])[0]


def bad_probability(text, task, model):
    """Probability that `text` is what the classifier of `task` ("nsfw", ...) is there to remove."""
    found = dict(predict(text, model, k=-1))
    if found and BAD_LABEL[task] not in found:
        raise ValueError(f"--{task} {model}: knows the labels {', '.join(sorted(found))}, but "
                         f"needs one called {BAD_LABEL[task]}")
    return found.get(BAD_LABEL[task], 0.0)


# ---- personal data -------------------------------------------------------------------------------

# Each pattern is anchored by a look-behind to where a run of its characters starts, so a long run
# that fails is walked once: 90 kB of "a@b-b-b-" takes a millisecond, not minutes.
EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}(?![\w-])")
PHONE = re.compile(  # North American, then international (E.164): a plus and at least 8 digits
    r"(?<![\w.])(?:\+?1[ .-]?)?(?:\(\d{3}\)|\d{3})[ .-]{0,2}\d{3}[ .-]?\d{4}(?!\w)"
    r"|(?<![\w.])\+(?=(?:[ .()-]{0,2}\d){8})[1-9]\d{0,2}(?:[ .-]{0,2}\(?\d{1,5}\)?){2,6}(?!\w)"
)
NO_DIGITS = bytes(set(range(128)) - set(b"0123456789"))
OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IP = re.compile(rf"(?<![\w.]){OCTET}(?:\.{OCTET}){{3}}(?!\w|\.\w)")


def mask_emails(text):
    """(text with |||EMAIL_ADDRESS||| for each e-mail address, how many were replaced).

    >>> mask_emails("write to ada@example.org!")
    ('write to |||EMAIL_ADDRESS|||!', 1)
    """
    likely = re.search(r"@[\w-]+\.", text)  # begins with a fixed character: found fast
    return EMAIL.subn("|||EMAIL_ADDRESS|||", text) if likely else (text, 0)


def mask_phone_numbers(text):
    """(text with |||PHONE_NUMBER||| for each phone number, how many were replaced)."""
    if len(text.encode("ascii", "ignore").translate(None, NO_DIGITS)) < 8:
        return text, 0  # as most pages: five times as fast as a search
    likely = re.search(r"[0-9][0-9][0-9]\)?[ .-]{0,2}[0-9]{3}[ .-]?[0-9]{4}", text)
    likely = likely or re.search(r"\+[1-9]", text)
    return PHONE.subn("|||PHONE_NUMBER|||", text) if likely else (text, 0)


def mask_ips(text):
    """(text with |||IP_ADDRESS||| for each IPv4 address, how many were replaced)."""
    likely = re.search(r"\.\d{1,3}\.\d", text)
    return IP.subn("|||IP_ADDRESS|||", text) if likely else (text, 0)


# ---- many documents as one array of words --------------------------------------------------------
#
# Python spends 50 ns and more on every word it touches. So a batch of documents becomes one array
# of code points or bytes, and all below (words, lines, hashes, n-grams) is arithmetic on arrays.

BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
LAST = 0x34000  # no letters are assigned to code points above
SEVERAL = 0xFFFFFFFF  # marks characters that become several when normalised
MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # the lowest `size` bytes


@functools.lru_cache(maxsize=1)
def character_classes():
    """Of each code point, (0x110000,) uint8: 0 punctuation, symbol, accent or control; 1 other; 2
    letter; 3 white space."""
    classes = np.zeros(0x110000, np.uint8)
    kinds = {"L": 2, "N": 1, "Z": 3, "M": 1, "P": 0, "S": 0, "C": 0}
    for c in range(LAST):
        category = unicodedata.category(chr(c))
        classes[c] = 3 if chr(c).isspace() else 0 if category == "Mn" else kinds[category[0]]
    return classes


@functools.lru_cache(maxsize=1)
def normal_forms():
    """What becomes of each character, (0x110000,) uint32: the code point of its small letter
    without accents, 32 for blanks, 10 for a newline, 0 for nothing, SEVERAL for more than one. And
    the same of ASCII for bytes.translate, newlines as blanks: a table, and what to delete."""
    classes, forms = character_classes(), np.zeros(0x110000, np.uint32)
    for c in np.flatnonzero(classes).tolist():
        form = [ord(x) for x in unicodedata.normalize("NFD", chr(c).lower()) if classes[ord(x)]]
        forms[c] = form[0] if len(form) == 1 else SEVERAL if form else 0
    forms[ord("ς")] = ord("σ")  # whether a sigma ends a word depends on what follows
    forms[classes == 3] = 32
    table, deleted = forms[:256].astype(np.uint8), np.flatnonzero(forms[:128] == 0)
    forms[10] = 10
    return forms, table.tobytes(), bytes(deleted.tolist())


def utf_32(text):
    """The code points of a text: (N,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def normal_lines(texts):
    """The normal forms of texts in UTF-8, each a line between newlines, with its spaces as they
    were.

    One look into a table for each character, after Python's own lower() and NFD only where some
    become several, as Korean syllables do.
    """
    table, ascii_table, deleted = normal_forms()
    others = "\n".join(text.replace("\n", " ") for text in texts if not text.isascii())
    codes = table.take(utf_32(others))
    if (codes == SEVERAL).any():
        codes = table.take(utf_32(unicodedata.normalize("NFD", others.lower())))
    others = codes[codes > 0].tobytes().decode("utf-32-le", "surrogatepass")
    others = iter(others.encode("utf-8", "surrogatepass").split(b"\n"))
    forms = [text.encode().translate(ascii_table, deleted) if text.isascii() else next(others)
             for text in texts]  # ASCII is ten times as fast
    return b"\n".join([b"", *forms, b""])


def normalise(text):
    """Lower case, NFD, no accents, punctuation or symbols, single spaces: CS336's normal form.

    >>> normalise("Crème  Brûlée, 50% off!")
    'creme brulee 50 off'
    """
    return " ".join(normal_lines([text]).decode("utf-8", "surrogatepass").split())


def mix(x):
    """SplitMix64's finaliser: spreads every input bit over all 64 output bits."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def word_hashes(data, start, end):
    """(W,) uint64 hashes of data[start:end], bytes: equal for equal words only.

    Words are read 8 bytes at a time, as integers; length, first and last 8 make up the hash of
    most. The few of more than 128 bytes are hashed one by one.
    """
    data += bytes(8)
    loads = np.ndarray(len(data) - 7, np.uint64, data, strides=(1,)).copy()  # 8 bytes from each on
    size = end - start
    mask = MASKS.take(size, mode="clip")
    head = loads[start] & mask
    tail = loads[np.maximum(start, end - 8)] & mask
    hashes = mix(mix(head + size.astype(np.uint64) * BASE) + tail)
    longer, offset = np.flatnonzero(size > 16), 8
    while len(longer) and offset < 120:
        hashes[longer] = mix(hashes[longer] + loads[start[longer] + offset])
        offset += 8
        longer = longer[size[longer] > offset + 8]
    for i in np.flatnonzero(size > 128):
        digest = hashlib.blake2b(data[start[i] : end[i]], digest_size=8).digest()
        hashes[i] = int.from_bytes(digest, "little")
    return hashes


@functools.lru_cache(maxsize=8)
def powers(size):
    """BASE**i and BASE**-i modulo 2**64 for i < 2**size: (2, 2**size) uint64."""
    both = np.full((2, 1 << size), [[BASE], [pow(int(BASE), -1, 1 << 64)]], np.uint64)
    both[:, 0] = 1
    return np.cumprod(both, axis=1, dtype=np.uint64)


def prefix_sums(hashes):
    """S[i] = sum of hashes[j] * BASE**j over j < i, modulo 2**64: (W,) -> (W + 1,) uint64."""
    sums = np.zeros(len(hashes) + 1, np.uint64)
    np.multiply(hashes, powers(len(sums).bit_length())[0, : len(hashes)], out=sums[1:])
    return np.cumsum(sums, out=sums)


def span_hashes(sums, start, end):
    """(M,) uint64 hashes of the words start to end - 1, by what prefix_sums made of theirs.

    The polynomial over a span is (S[end] - S[start]) / BASE**start: one expression for all spans,
    n-grams or lines, and equal for equal spans wherever they stand.
    """
    return (sums[end] - sums[start]) * powers(len(sums).bit_length())[1][start]


def runs(inside):
    """Where the runs of True in an array begin and end: (W,) and (W,)."""
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    return edges[::2].copy(), edges[1::2].copy()


class Words:
    """A batch of texts cut at white space: D documents, W words, N characters."""

    def __init__(self, texts):
        joined = "\n".join(["", *texts, ""])
        self.num_documents = len(texts)
        self.codes = utf_32(joined)  # (N,)
        self.kinds = character_classes().take(self.codes, mode="clip")  # (N,)
        self.start, self.end = runs(self.kinds != 3)  # (W,) where a word starts and ends
        self.size = self.end - self.start
        bounds = np.cumsum([1] + [len(text) + 1 for text in texts])
        self.first = np.searchsorted(self.start, bounds)  # (D + 1,) each document's first word
        self.doc = np.repeat(np.arange(len(texts)), np.diff(self.first))  # (W,) which document
        data = joined.encode("utf-8", "surrogatepass")
        place = np.flatnonzero(np.frombuffer(data, np.int8) >= -64)  # (N,) not inside a character
        self.hashes = word_hashes(data, place[self.start], place[self.end])  # (W,)
        self.sums = prefix_sums(self.hashes)  # (W + 1,)
        self.lines = Lines(self)


class Lines:
    """The lines of a batch that hold a word, or with newlines=2 its paragraphs.

    datatrove also counts lines of blanks alone, and so calls them copies of each other.
    """

    def __init__(self, words, newlines=1):
        count, self.num_documents = len(words.start), words.num_documents
        behind = np.searchsorted(words.start, np.flatnonzero(words.codes == 10))
        breaks = np.bincount(behind, minlength=count + 1)  # (W + 1,) newlines before each word
        breaks[words.first[:-1]] = 2  # a document's first word begins a line and a paragraph
        begin = np.flatnonzero(breaks[:count] >= newlines)  # (L,) each one's first word
        self.start, self.doc = words.start[begin], words.doc[begin]  # (L,) as in Words
        following = np.append(begin[1:], count)[: len(begin)]
        self.end = words.end[following - 1]
        self.size = self.end - self.start
        keys = span_hashes(words.sums, begin, following) + mix(self.doc.astype(np.uint64))
        order = np.argsort(keys, kind="stable")
        self.copy = np.zeros(len(keys), bool)  # (L,) equals an earlier one of its document
        self.copy[order[1:]] = keys[order[1:]] == keys[order[:-1]]


def total(spans, values=None):
    """How many words or lines each document has, or the sum of their values: (D,)."""
    return np.bincount(spans.doc, values, minlength=spans.num_documents)


def mean(spans, values):
    """(D,) mean over the words or lines of each document, for flags their share; 0 without any."""
    return total(spans, values) / np.maximum(1, total(spans))


def distinct(values):
    """Sorted, each once; np.unique takes 50 times as long for 64-bit integers."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]


def batches(items, size_of=len):
    """Group items into lists of about BATCH_CHARS characters."""
    batch, size = [], 0
    for item in items:
        if batch and size + size_of(item) > BATCH_CHARS:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += size_of(item)
    if batch:
        yield batch


# ---- quality rules -------------------------------------------------------------------------------

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # Gopher, A.1.1
COURSE_RULES = ("words", "word_length", "ellipsis_lines", "alphabetic")
TERMINAL = ".!?…\"'”’」』。！？｡؟۔।"
POLICIES = ("javascript", "terms of use", "privacy policy", "cookie policy", "use cookies",
            "uses cookies", "use of cookies", "uses of cookies")


def repeated_ngrams(words, longest):
    """Yield (n, at, same) for n = 2 to `longest`: n-grams within documents, equal ones together.

    at: (M,) index of the first word, ascending among equal ones. same: (M,) bool, "equal to the one
    before". Only where the (n - 1)-gram is repeated can the n-gram be, so M shrinks fast. The index
    sits in the low bits of what is sorted, behind 40 or more bits of hash.
    """
    at = np.arange(len(words.doc))
    salt = mix(words.doc.astype(np.uint64))  # makes n-grams of different documents differ
    bits = np.uint64(max(20, len(at).bit_length()))
    for n in range(2, longest + 1):
        at = at[at + n <= words.first[words.doc[at] + 1]]
        keys = span_hashes(words.sums, at, at + n) + salt[at]
        keys = np.sort(keys >> bits << bits | at.astype(np.uint64))
        at = (keys & ~(~np.uint64(0) << bits)).astype(np.int64)
        same = np.append(False, (keys[1:] ^ keys[:-1]) >> bits == 0)[: len(at)]
        yield n, at, same
        at = at[same | np.append(same[1:], False)[: len(at)]]


# Each of these four yields (rule, (D,) what it measures, the least and the most that passes).


def repetition_rules(texts, words, stop_words):
    """Gopher's repetition rules (Rae et al. 2021, Table A1), all from above.

    copied_lines, copied_paragraphs: copies of an earlier one, of all. The others are shares of the
    document's characters: those in such copies, those in all copies of the most frequent n-gram
    (the longest of these, with the spaces between its words), and those of words in n-grams that
    occurred before (overlapping ones count once, as the paper asks).
    """
    size = np.array([max(1, len(text)) for text in texts])
    for name, lines in (("line", words.lines), ("paragraph", Lines(words, newlines=2))):
        yield f"copied_{name}s", mean(lines, lines.copy), 0, 0.30
        yield f"copied_{name}_characters", total(lines, lines.copy * lines.size) / size, 0, 0.20
    most = {2: 0.20, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    characters = np.append(0, np.cumsum(words.size))  # (W + 1,) before each word
    for n, at, same in repeated_ngrams(words, max(most)):
        if n < 5:
            heads = np.flatnonzero(~same)
            count = np.diff(np.append(heads, len(at)))
            heads, count = at[heads[count > 1]], count[count > 1]
            best = np.zeros(len(texts), np.int64)  # (D,) most frequent, then longest
            length = characters[heads + n] - characters[heads] + n - 1
            np.maximum.at(best, words.doc[heads], count << 32 | length)
            yield f"top_{n}_gram", (best >> 32) * (best & 0xFFFFFFFF) / size, 0, most[n]
        else:
            covered = distinct((at[same][:, None] + np.arange(n)).ravel())
            inside = np.bincount(words.doc[covered], words.size[covered], minlength=len(texts))
            yield f"repeated_{n}_grams", inside / size, 0, most[n]


def gopher_rules(texts, words, stop_words):
    """Gopher's rules of length and make-up (Rae et al. 2021, A.1.1).

    word_length: mean characters. symbols: "#" or ellipses for each word, the commoner. alphabetic:
    share of words with a letter. stop_words: how many of the eight occur.
    """
    count, lines, codes = total(words), words.lines, words.codes
    yield "words", count, 50, 100_000
    yield "word_length", mean(words, words.size), 3, 10
    symbols = [max(text.count("#"), text.count("...") + text.count("…")) for text in texts]
    yield "symbols", symbols / np.maximum(1, count), 0, 0.1
    bullets = np.isin(codes[lines.start], [ord(c) for c in "•‣●◦▪-*"])
    yield "bullet_lines", mean(lines, bullets), 0, 0.9
    last = codes[lines.end - [[1], [2], [3]]]  # (3, L) the last characters, backwards
    ellipses = (last == ord(".")).all(0) | (last[0] == ord("…"))
    yield "ellipsis_lines", mean(lines, ellipses), 0, 0.3
    with_letter = np.logical_or.reduceat(words.kinds == 2, words.start)  # (W,)
    yield "alphabetic", mean(words, with_letter), 0.8, 1
    found = np.zeros(len(texts), int)
    for stop in Words([" ".join(stop_words)]).hashes:
        found[words.doc[words.hashes == stop]] += 1  # once a document, however often it occurs
    yield "stop_words", found, min(2, len(stop_words)), 8


def c4_rules(texts, words, stop_words):
    """C4's rules for pages (Raffel et al. 2020, section 2.2); ends of sentences count up to 3."""
    ends = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]").finditer
    yield "lorem_ipsum", np.array([text.lower().count("lorem ipsum") for text in texts]), 0, 0
    yield "curly_bracket", np.array([text.count("{") for text in texts]), 0, 0
    sentences = [len(list(itertools.islice(ends(text), 3))) for text in texts]
    yield "sentences", np.array(sentences), 3, 3


def fineweb_rules(texts, words, stop_words):
    """FineWeb's rules (Penedo et al. 2024, section 3.6); its bounds themselves fail.

    line_punctuation: share of lines that end in it. short_lines: share under 30 characters, 1 where
    there are none. duplicate_line_characters: share of the lines' characters in copies of an
    earlier line.
    """
    lines, marks = words.lines, [ord(c) for c in TERMINAL]
    punctuated = mean(lines, np.isin(words.codes[lines.end - 1], marks))
    yield "line_punctuation", punctuated, np.nextafter(0.12, 1), 1
    short = mean(lines, lines.size < 30) + (total(lines) == 0)
    yield "short_lines", short, 0, np.nextafter(0.67, 0)
    copied = total(lines, lines.copy * lines.size) / np.maximum(1, total(lines, lines.size))
    yield "duplicate_line_characters", copied, 0, np.nextafter(0.1, 0)


RULES = {"repetition": repetition_rules, "gopher": gopher_rules, "c4": c4_rules,
         "fineweb": fineweb_rules}  # in FineWeb's order


def failures(name, texts, words, stop_words=STOP_WORDS):
    """{rule: (D,) bool, True where it fails} of one set of RULES, for texts split into Words."""
    return {rule: (measured < least) | (measured > most)
            for rule, measured, least, most in RULES[name](texts, words, stop_words)}


def failed_rules(texts, rules=tuple(RULES), stop_words=STOP_WORDS):
    """The first rule each text fails, such as "gopher: words", or None; in the order of RULES."""
    words = Words(texts) if set(rules) != {"c4"} else None  # which needs none
    found = [None] * len(texts)
    for name in (name for name in RULES if name in rules):
        for rule, failed in failures(name, texts, words, stop_words).items():
            for i in np.flatnonzero(failed):
                found[i] = found[i] or f"{name}: {rule}"
    return found


def gopher_quality_filter(text):
    """Whether a text passes four of the Gopher rules (Rae et al. 2021, A.1.1), those of CS336.

    50 to 100,000 words of 3 to 10 characters on average, at most 30 % of lines ending in an
    ellipsis, at least 80 % of words with a letter.
    """
    failed = failures("gopher", [text], Words([text]))
    return not any(failed[rule][0] for rule in COURSE_RULES)


def c4_clean(text):
    """A text without the lines C4 drops (section 2.2): javascript, cookies, under 5 words.

    C4 also dropped every line without terminal punctuation; not here, as FineWeb (section 3.5)
    found that this throws away 30 % of the tokens. Blank lines mark paragraphs and stay.
    """
    lower = text.lower()
    policies = [policy for policy in POLICIES if policy in lower]  # mostly none
    kept = []
    for line in text.split("\n"):
        size = len(line.split(None, 4))
        if not size or (size == 5 and not any(policy in line.lower() for policy in policies)):
            kept.append(line)
    return "\n".join(kept).strip()


# ---- exact line deduplication --------------------------------------------------------------------


def sort_lines(target, lines, source):
    """Save the hashes of lines without their line ends, ascending; returns how many there are.

    The table, (2, L) uint64, holds beside each hash its line's place, source << 40 | line number.
    Of a billion lines two have the same hash of 64 bits with a probability of 3 %.
    """
    digests = [hashlib.blake2b(line.rstrip(b"\r\n"), digest_size=8).digest() for line in lines]
    hashes = np.frombuffer(b"".join(digests), np.uint64)
    order = np.argsort(hashes, kind="stable")
    save(target, np.stack([hashes[order], order.astype(np.uint64) | np.uint64(source << 40)]))
    return len(hashes)


def repeated_lines(target, tables, keep, part=0, num_parts=1):
    """Save the places of the lines to drop, ascending: (R,) uint64.

    That is of all lines with an equal one in any of the `tables` of sort_lines, or with
    keep="first" of all but the first of these. Only the hashes in one of `num_parts` equal ranges
    are read, which bounds the memory: all copies of a line are in the same range.
    """
    low, high = (part << 64) // num_parts, ((part + 1) << 64) // num_parts - 1
    pieces = []
    for table in (np.load(path, mmap_mode="r") for path in tables):
        start = np.searchsorted(table[0], np.uint64(low))
        pieces.append(table[:, start : np.searchsorted(table[0], np.uint64(high), "right")])
    hashes, places = np.concatenate(pieces, axis=1)
    order = np.lexsort((places, hashes))
    equal = np.zeros(len(order) + 1, bool)  # to the one before
    equal[1:-1] = hashes[order[1:]] == hashes[order[:-1]]
    drop = equal[:-1] if keep == "first" else equal[:-1] | equal[1:]
    save(target, np.sort(places[order[drop]]))


def dropped(paths, begin, count):
    """(count,) bool: which of the numbers from `begin` on are in these sorted files of numbers."""
    flags = np.zeros(count, bool)
    for numbers in (np.load(path, mmap_mode="r") for path in paths):
        low, high = np.searchsorted(numbers, np.array([begin, begin + count], numbers.dtype))
        flags[(numbers[low:high] - numbers.dtype.type(begin)).astype(np.int64)] = True
    return flags


def output_names(input_files, output_directory):
    """Where each input goes in the output directory. ValueError: two have the same name."""
    names = [os.path.basename(os.fspath(path)) for path in input_files]
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{count} input files are called {name}, and so would their outputs: "
                             "rename them")
    os.makedirs(output_directory, exist_ok=True)
    return [os.path.join(output_directory, name) for name in names]


def exact_line_deduplication(input_files, output_directory, keep="none", num_parts=1):
    """Rewrite each file under its own name without the lines that occur more than once anywhere.

    keep="none" removes every copy (as in CS336: such lines are menus and footers), keep="first"
    leaves the first. Lines are compared without their line ends, in `num_parts` ranges of hashes
    one after the other, each taking 16 bytes for a line.
    """
    targets = output_names(input_files, output_directory)
    with tempfile.TemporaryDirectory(prefix=".lines-", dir=output_directory) as folder:
        tables, counts = [f"{folder}/{i}.npy" for i in range(len(targets))], []
        for i, path in enumerate(input_files):
            with open(path, "rb") as file:
                counts.append(sort_lines(tables[i], file, i))
        parts = [f"{folder}/part-{part}.npy" for part in range(num_parts)]
        for part, path in enumerate(parts):
            repeated_lines(path, tables, keep, part, num_parts)
        for i, path in enumerate(input_files):
            with open(path, "rb") as file, replacing(targets[i]) as out:
                gone = dropped(parts, i << 40, counts[i])
                out.writelines(line for line, drop in zip(file, gone) if not drop)


# ---- near-duplicates: MinHash and LSH ------------------------------------------------------------

EMPTY = np.uint32(0xFFFFFFFF)  # fills the signature of a text without words
HASH_VERSION = 2  # to be raised when hash values change: a stage begun with others cannot go on


def shingles(texts, n):
    """Hashes of all n-grams of normalised words: (S,) uint64, and (D + 1,) where documents start.

    A document of fewer than n words is one shingle, the hash of all its words, so that it equals
    only itself; one without any word has no shingle.
    """
    data = normal_lines(texts)
    characters = np.frombuffer(data, np.uint8)
    start, end = runs(characters > 32)  # (W,)
    first = np.searchsorted(start, np.flatnonzero(characters == 10))  # (D + 1,) first words
    size = np.diff(first)
    at = np.arange(len(start))
    end_at = np.minimum(at + n, np.repeat(first[1:], size))  # (W,) where the n-gram from here ends
    whole = end_at - at == n
    whole[first[:-1][size > 0]] = True  # a short document's only shingle, too
    hashes = span_hashes(prefix_sums(word_hashes(data, start, end)), at, end_at)
    count = np.maximum(size - n + 1, np.minimum(size, 1))  # (D,) shingles
    return hashes[whole], np.append(0, np.cumsum(count))


def sign(hashes, first, num_hashes, seed=0):
    """MinHash signatures of documents given by their shingles: (D, num_hashes) uint32.

    Entry k is the minimum of a_k * x modulo 2**32 over the document's shingles x, a_k odd, so two
    signatures agree in a fraction of entries that estimates the Jaccard similarity J with standard
    error sqrt(J (1 - J) / num_hashes) (Broder 1997). As x is already well mixed, one 32-bit
    multiplication is as accurate as the textbook's (a x + b) modulo 2**61 - 1, and 20 times faster.
    """
    numbers = mix(np.arange(num_hashes, dtype=np.uint64) + mix(np.array([seed], np.uint64)))
    factors = (numbers >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    x = (hashes >> np.uint64(32)).astype(np.uint32)  # (S,)
    some = np.flatnonzero(np.diff(first))  # documents with words
    signatures = np.full((num_hashes, len(first) - 1), EMPTY, np.uint32)
    values = np.empty((8, len(x)), np.uint32)
    for k in range(0, num_hashes, 8):  # 8 at a time: fewer calls
        rows = factors[k : k + 8, None]
        products = np.multiply(x, rows, out=values[: len(rows)])  # (8, S)
        signatures[k : k + 8, some] = np.minimum.reduceat(products, first[some], axis=1)
    return signatures.T


def minhash_signatures(texts, num_hashes=112, ngrams=5, seed=0):
    """MinHash signatures of raw texts: (D, num_hashes) uint32; all EMPTY for one without words."""
    parts = [sign(*shingles(batch, ngrams), num_hashes, seed) for batch in batches(texts)]
    return np.concatenate([np.zeros((0, num_hashes), np.uint32), *parts])


def candidate_pairs(signatures, num_bands, near=8):
    """LSH: pairs equal in all rows of at least one band, sorted: (D, K) -> (P, 2) int64.

    A pair of similarity J is found with probability 1 - (1 - J**r)**num_bands, r = K / num_bands.
    Sorting the hashes of a band's rows, with the document's number in their low bits, puts equal
    ones side by side (what is left of the hash may collide; pairs are verified later). Each
    document is paired with the next `near` of its bucket: all pairs of a small bucket, and of ten
    thousand copies a chain rather than fifty million pairs.

    Signatures may come in several arrays; of memory-mapped ones a band at a time is read.
    ValueError: num_bands does not divide K.
    """
    parts = signatures if isinstance(signatures, list) else [signatures]
    rows, rest = divmod(parts[0].shape[1], num_bands)
    if rest:
        raise ValueError(f"--num-bands {num_bands} does not divide --num-hashes "
                         f"{parts[0].shape[1]}: choose for example 14 and 112, or 20 and 9000")
    codes = []  # i << 32 | j
    for start in range(0, rows * num_bands, rows):
        band = np.concatenate([part[:, start : start + rows] for part in parts])  # (D, r)
        keys = np.zeros(len(band), np.uint64)
        for column in band.T:
            keys = keys * BASE + column
        docs = np.flatnonzero(band[:, 0] != EMPTY).astype(np.uint64)  # EMPTY resembles nothing
        bits = np.uint64(len(band).bit_length())
        keys = np.sort(mix(keys[docs]) >> bits << bits | docs)
        docs = keys & ~(~np.uint64(0) << bits)
        for step in range(1, near + 1):
            left = np.flatnonzero((keys[step:] ^ keys[:-step]) >> bits == 0)
            codes.append(docs[left] << np.uint64(32) | docs[left + step])
            if not len(left):
                break
    codes = distinct(np.concatenate(codes)).astype(np.int64)
    return np.stack([codes >> 32, codes & 0xFFFFFFFF], 1)


def jaccard(left, right):
    """|A and B| / |A or B| of two sets given as arrays without repeats."""
    both = np.sort(np.concatenate([left, right]))
    common = np.count_nonzero(both[1:] == both[:-1])
    return common / max(1, len(both) - common)


def near_duplicates(signatures, shingle_set, num_bands, threshold, seed=0):
    """Numbers of the documents to drop, all but one of each cluster: (D, K) -> ascending int64.

    Signatures only propose pairs. A pair counts if the Jaccard similarity of its two sets,
    `shingle_set(number)`, reaches the threshold; pairs that count join clusters (union-find). The
    root of a cluster's tree is the one that stays: the member whose number has the smallest seeded
    hash, whatever order the pairs come in.
    """
    pairs = candidate_pairs(signatures, num_bands)
    members = distinct(pairs.ravel())
    priority = mix(members.astype(np.uint64) + mix(np.array([seed + 1], np.uint64)))
    priority = dict(zip(members.tolist(), priority.tolist()))
    parent = {i: i for i in priority}

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]  # halves the way for the next
            i = parent[i]
        return i

    for i, j in pairs.tolist():
        first, second = sorted((root(i), root(j)), key=priority.get)
        if first != second and jaccard(shingle_set(i), shingle_set(j)) >= threshold:
            parent[second] = first
    return np.array([i for i in parent if parent[i] != i], np.int64)


def minhash_deduplication(
    input_files, num_hashes, num_bands, ngrams, jaccard_threshold, output_directory, seed=0
):
    """Copy the files, one document each, that are not near-duplicates of a kept one, unchanged.

    Documents are compared as sets of n-grams of normalised words (see normalise); of each cluster
    of similar ones a single member stays. ValueError: num_bands does not divide num_hashes.
    """
    targets = output_names(input_files, output_directory)

    def text(i):
        return Path(input_files[i]).read_text("utf-8", "replace")

    @functools.lru_cache(maxsize=1024)
    def shingle_set(i):
        return distinct(shingles([text(i)], ngrams)[0])

    signatures = minhash_signatures(map(text, range(len(targets))), num_hashes, ngrams, seed)
    gone = near_duplicates(signatures, shingle_set, num_bands, jaccard_threshold, seed)
    for i in np.setdiff1d(np.arange(len(targets)), gone):
        with replacing(targets[i]) as file:
            file.write(Path(input_files[i]).read_bytes())


# ---- decontamination -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def evaluation_ngrams(paths, n=13):
    """Sorted hashes of all word n-grams of evaluation sets, and how many texts were too short.

    `paths` is a tuple. Each string value of a .jsonl or .csv row is a text, and so is any other
    file. Texts of fewer than n words are left out: a match of a few would condemn half the crawl.
    """
    values = [value for path in paths for row in read_rows(path) for value in row.values()]
    texts = [value for value in values if isinstance(value, str)]
    long = [text for text in texts if len(normalise(text).split()) >= n]
    found = [shingles(batch, n)[0] for batch in batches(long)]
    return distinct(np.concatenate([np.zeros(0, np.uint64), *found])), len(texts) - len(long)


def contaminated(texts, evaluation, n=13):
    """(D,) bool: documents that share an n-gram with the evaluation sets (GPT-3, appendix C)."""
    hashes, first = shingles(texts, n)
    if not len(evaluation):
        return np.zeros(len(texts), bool)
    at = np.searchsorted(evaluation, hashes)
    hit = np.flatnonzero(evaluation.take(at, mode="clip") == hashes)
    return np.bincount(np.searchsorted(first, hit, "right") - 1, minlength=len(texts)) > 0


# ---- filters, and the books of what each saw, dropped and cost -----------------------------------


def add_books(total, new):
    """Add the books of a batch or a shard to a total: sums of numbers, lists' five smallest."""
    for key, value in new.items():
        if isinstance(value, dict):
            add_books(total.setdefault(key, {}), value)
        elif isinstance(value, list):
            total[key] = sorted(total.get(key, []) + value)[:5]
        else:
            total[key] = total.get(key, 0) + value


def sieve(books, name, docs, check):
    """Apply one filter to a batch and enter it in the books; returns the documents that stay.

    `check(docs)` gives None or the reason to drop for each document, and may edit the text. The
    samples are those with the smallest hash of their id, so that any number of workers agrees.
    """
    began, words, reasons = time.perf_counter(), sum(doc["words"] for doc in docs), check(docs)
    kept = [doc for doc, reason in zip(docs, reasons) if reason is None]
    samples = {"kept": [], "dropped": []}
    for doc, reason in zip(docs, reasons):
        place = zlib.crc32(doc["id"].encode("utf-8", "replace"))
        sample = [place, doc["id"], reason or "", doc["text"][:200]]
        samples["kept" if reason is None else "dropped"].append(sample)
    row = {"documents": len(docs), "words": words, "kept": len(kept), "samples": samples,
           "kept_words": sum(doc["words"] for doc in kept),
           "reasons": Counter(filter(None, reasons))}
    add_books(books, {"filters": {name: row}, "seconds": {name: time.perf_counter() - began}})
    return kept


def sift(target, docs, filters, books):
    """Pass documents through filters {name: check} to a .jsonl.gz; returns how many came in.

    The books go beside it, with all that differs between runs (the seconds) in a file of its own.
    The same documents give the same bytes: the gzip header holds neither time nor name.
    """
    began, documents = time.perf_counter(), 0
    with replacing(target) as raw:
        with gzip.GzipFile("", "wb", 1, raw, mtime=0) as file:
            for batch in batches(docs, lambda doc: len(doc["text"])):
                documents += len(batch)
                for name, check in filters.items():
                    batch = sieve(books, name, batch, check)
                file.write("".join([json.dumps(doc) + "\n" for doc in batch]).encode())
        seconds, path = Counter(books.pop("seconds", {})), str(target).removesuffix(".jsonl.gz")
        first = next(iter(filters), "")  # for which reading and writing count
        seconds[first] += time.perf_counter() - began - sum(seconds.values())
        save(f"{path}.seconds", seconds)
        save(f"{path}.json", books)
    return documents


def edit(doc, text):
    """Give a document another text."""
    if text != doc["text"]:
        doc.update(text=text, words=len(text.split()))


def filters_of(o, books):
    """The filters that are switched on, {name: check}, cheap ones first; see sieve."""

    def language(docs):
        reasons = []
        for doc in docs:
            doc["language"], p = identify_language(doc["text"], o.language_model)
            sure = None if p >= o.language_threshold else "unsure"
            reasons.append(sure if doc["language"] in o.languages else doc["language"])
        add_books(books, {"languages": Counter(doc["language"] for doc in docs)})
        return reasons

    def rules(docs, names):
        if "c4" in names:
            for doc in docs:
                edit(doc, c4_clean(doc["text"]))
        stop_words = STOP_WORDS if "en" in o.languages else ()
        return failed_rules([doc["text"] for doc in docs], names, stop_words)

    def classifier(docs, task):
        bad = [bad_probability(doc["text"][:2000], task, getattr(o, task)) for doc in docs]
        return [f"{task} {p:.1f}" if p >= o.drop_above else None for p in bad]

    def evaluation(docs):
        ngrams, _ = evaluation_ngrams(tuple(o.decontaminate))
        hit = contaminated([doc["text"] for doc in docs], ngrams)
        return ["13 words of an evaluation set" if bad else None for bad in hit]

    def personal_data(docs):
        masks = {"emails": mask_emails, "phone numbers": mask_phone_numbers, "IPs": mask_ips}
        for doc, (kind, mask) in itertools.product(docs, masks.items()):
            text, count = mask(doc["text"])
            edit(doc, text)
            books["counts"][f"{kind} masked"] += count
        return [None] * len(docs)

    checks = {"language": language} if o.languages else {}
    for names in (["repetition", "gopher"], ["c4"], ["fineweb"]):
        if names := [name for name in names if name in o.rules]:
            checks[names[-1]] = functools.partial(rules, names=names)
    for task in BAD_LABEL:
        if getattr(o, task):
            checks[task] = functools.partial(classifier, task=task)
    checks |= {"decontaminate": evaluation} if o.decontaminate else {}
    return checks | ({"pii": personal_data} if o.pii else {})


# ---- many shards, processes and machines ---------------------------------------------------------


def start_worker():
    """Leave Ctrl-C to the parent, and end with it even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def in_pool(function, rows, processes):
    """Yield the results of function(*row) from worker processes, as they come."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    before = set(multiprocessing.active_children())
    # not multiprocessing.Pool, which waits for ever for a worker that was killed
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, start_worker)
    try:
        for done in concurrent.futures.as_completed([pool.submit(function, *row) for row in rows]):
            yield done.result()
        pool.shutdown()
    except concurrent.futures.process.BrokenProcessPool:
        raise ValueError("a worker process was killed (out of memory?); finished shards are kept: "
                         "run the same command with fewer --processes") from None
    finally:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()  # after Ctrl-C or a failure: what they had begun is begun again
        pool.shutdown(cancel_futures=True)


def map_shards(o, label, function, rows, *common):
    """Run function(target, ..., *common) for each row (target, ...); returns the targets.

    A target that exists is done. Of the others rank r of w makes every w-th, then waits for those
    of the rest: the shared directory is the barrier. What the functions return, if anything, is the
    number of documents they handled. A single row stays in this process.
    """
    rows = [(*row, *common) for row in rows]
    todo = [row for row in rows[o.rank :: o.world_size] if not os.path.exists(row[0])]
    character_classes()  # before forking: a quarter of a second
    processes, documents = min(o.processes, len(todo)), 0
    began = shown = time.monotonic()
    results = (itertools.starmap(function, todo) if processes < 2
               else in_pool(function, todo, processes))
    for done, count in enumerate(results, 1):
        documents += count or 0
        if (now := time.monotonic()) - shown > 2 or done == len(todo):
            shown, each = now, (now - began) / done
            rate = f"{documents / (now - began):,.0f} documents/s, " if documents else ""
            print(f"{label}: {done}/{len(todo)} shards, {rate}"
                  f"{each * (len(todo) - done):.0f} s left", file=sys.stderr)
    while missing := [row[0] for row in rows if not os.path.exists(row[0])]:
        time.sleep(0.2)
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            print(f"{label}: waiting for {len(missing)} shards of other machines, such as "
                  f"{missing[0]}", file=sys.stderr)
    return [row[0] for row in rows]


def begin_stage(o, stage, inputs, *keys, **more):
    """Names for a stage's shards, <out>/<stage>/*.jsonl.gz, and for tables, work/*.npy.

    ValueError if the stage was begun with other settings: half of each would be neither.
    """
    folder = f"{o.out}/{stage}"
    os.makedirs(f"{folder}/work", exist_ok=True)
    settings = {key: getattr(o, key) for key in keys} | more
    settings["input"] = [[os.path.basename(path), os.path.getsize(path)] for path in inputs]
    path = Path(folder, "settings.json")
    old = json.loads(path.read_bytes()) if path.exists() else settings
    for key, value in settings.items():
        if old.get(key) != value:
            flag = f"--{key.replace('_', '-')} {old.get(key)}, not {value}"
            change = {"input": "other files as --input", "hash_version": "an older filter_data.py"}
            raise ValueError(f"{folder} was begun with {change.get(key, flag)}: use the same, "
                             f"another --out, or delete {folder} and the stages behind")
    if o.rank == 0:
        save(path, settings)
    pattern = r"^\d{5}-|\.(gz|jsonl|warc|wet|txt|csv|tsv)\b"  # numbered, so that no two are equal
    names = [re.sub(pattern, "", os.path.basename(path)) for path in inputs]
    names = [f"{i:05d}-{name}" for i, name in enumerate(names)]
    return [f"{folder}/{x}.jsonl.gz" for x in names], [f"{folder}/work/{x}.npy" for x in names]


# ---- stages: what is done to one shard, and then to all ------------------------------------------


def sift_shard(target, source, o):
    """One file through extraction, and but for the command `extract` through the filters."""
    books = {"counts": Counter()}
    docs = read_documents(source, o.text_key, o.main_content, books["counts"])
    filters = {} if o.command == "filter" else {"extract": lambda docs: [None] * len(docs)}
    if o.command != "extract":
        filters |= filters_of(o, books)
    return sift(target, docs, filters, books)


def stage_extract(o, inputs):
    """Crawl files to documents and no further; `run` and `filter` read crawl files, too."""
    targets, _ = begin_stage(o, "extract", inputs, "text_key", "main_content")
    return map_shards(o, "extract", sift_shard, zip(targets, inputs), o)


def stage_filter(o, inputs):
    """Language, quality rules, classifiers, decontamination, personal data."""
    o.decontaminate = find_inputs(o.decontaminate, "--decontaminate")
    keys = ("text_key", "main_content", "languages", "language_model", "language_threshold",
            "rules", "drop_above", "decontaminate", "pii", *BAD_LABEL)
    targets, _ = begin_stage(o, "filter", inputs, *keys)
    for task in BAD_LABEL:
        if getattr(o, task):
            bad_probability("a", task, getattr(o, task))  # a missing model is found before the work
    if o.languages:
        identify_language("a", o.language_model)
    if o.decontaminate:
        found, short = evaluation_ngrams(tuple(o.decontaminate))
        print(f"filter: {len(found):,} 13-grams of evaluation sets; {short} of their texts are "
              "shorter and not looked for", file=sys.stderr)
    return map_shards(o, "filter", sift_shard, zip(targets, inputs), o)


def sort_lines_shard(target, source, index):
    """Lines 1: one shard's lines, by hash."""
    texts = (doc["text"].encode() for doc in read_documents(source))
    sort_lines(target, (line for text in texts for line in text.split(b"\n")), index)


def drop_lines_shard(target, source, index, table, parts, o):
    """Lines 3: one shard without its repeated lines. Blank lines stay: they mark paragraphs."""
    num_lines = np.load(table, mmap_mode="r").shape[1]
    gone = iter(dropped(parts, index << 40, num_lines).tolist())

    def drop(docs):
        for doc in docs:
            lines = zip(doc["text"].split("\n"), gone)
            edit(doc, "\n".join(x for x, bad in lines if not bad or not x.strip()).strip())
        return ["too few words left" if doc["words"] < o.min_words else None for doc in docs]

    return sift(target, read_documents(source), {"lines": drop}, {})


def stage_lines(o, inputs):
    """Lines that occur more than once in the whole crawl."""
    targets, tables = begin_stage(o, "lines", inputs, "keep", "min_words")
    map_shards(o, "lines 1/3", sort_lines_shard, zip(tables, inputs, itertools.count()))
    num_parts = 1 + sum(map(os.path.getsize, tables)) // (1 << 28)  # 256 MiB at a time
    parts = [f"{o.out}/lines/work/part-{part:03d}.npy" for part in range(num_parts)]
    map_shards(o, "lines 2/3", repeated_lines,
               [(path, tables, o.keep, part, num_parts) for part, path in enumerate(parts)])
    rows = zip(targets, inputs, itertools.count(), tables)
    return map_shards(o, "lines 3/3", drop_lines_shard, rows, parts, o)


def sign_shard(target, source, o):
    """MinHash 1: signatures (D, K) and shingle sets of one shard; 32 bits of a shingle suffice."""
    signatures, sets = [np.zeros((0, o.num_hashes), np.uint32)], []
    for texts in batches(doc["text"] for doc in read_documents(source)):
        hashes, first = shingles(texts, o.ngrams)
        signatures.append(sign(hashes, first, o.num_hashes, o.seed))
        values = (hashes >> np.uint64(32)).astype(np.uint32)
        sets += map(distinct, np.split(values, first[1:-1]))
    save(f"{target}.sets.npy", np.concatenate([np.zeros(0, np.uint32), *sets]))
    save(f"{target}.first.npy", np.cumsum([0] + [len(part) for part in sets]))
    save(target, np.concatenate(signatures))
    return len(sets)


def drop_duplicates_shard(target, source, begin, count, numbers):
    """MinHash 3: one shard, `count` documents from `begin` on of all, without near-duplicates."""
    gone = iter(dropped([numbers], begin, count))

    def drop(docs):
        return ["near-duplicate of another" if next(gone) else None for _ in docs]

    return sift(target, read_documents(source), {"minhash": drop}, {})


def stage_minhash(o, inputs):
    """Near-duplicate documents of the whole crawl."""
    candidate_pairs(np.zeros((0, o.num_hashes), np.uint32), o.num_bands)  # refuses odd bands
    keys = ("num_hashes", "num_bands", "ngrams", "jaccard", "seed")
    targets, tables = begin_stage(o, "minhash", inputs, *keys, hash_version=HASH_VERSION)
    map_shards(o, "minhash 1/3", sign_shard, zip(tables, inputs), o)
    signatures = [np.load(table, mmap_mode="r") for table in tables]
    counts = [len(part) for part in signatures]
    begins = np.cumsum([0] + counts)  # the documents of all shards are numbered through

    def decide(target):
        """MinHash 2: the numbers of the documents to drop."""
        sets = [np.load(f"{table}.sets.npy", mmap_mode="r") for table in tables]
        firsts = [np.load(f"{table}.first.npy") for table in tables]

        def shingle_set(doc):
            shard = np.searchsorted(begins, doc, "right") - 1
            start, end = firsts[shard][doc - begins[shard] :][:2]
            return sets[shard][start:end]

        save(target, near_duplicates(signatures, shingle_set, o.num_bands, o.jaccard, o.seed))

    numbers = f"{o.out}/minhash/work/dropped.npy"
    map_shards(o, "minhash 2/3", decide, [(numbers,)])
    rows = zip(targets, inputs, begins.tolist(), counts)
    return map_shards(o, "minhash 3/3", drop_duplicates_shard, rows, numbers)


def tokenize_shard(target, source, tokenizer, o):
    """Ids of one shard's documents, <|endoftext|> after each, in train/ and val/ beside its books.

    A document is validation if the hash of its text falls below --val-fraction: on every machine
    and in every run the same text lands on the same side.
    """
    from tokenizer import Tokenizer

    coder, ids, (folder, name) = Tokenizer.load(tokenizer), {}, os.path.split(target)
    for doc in read_documents(source):
        digest = hashlib.blake2b(doc["text"].encode(), digest_size=8).digest()
        side = "val" if int.from_bytes(digest, "big") < o.val_fraction * 2**64 else "train"
        new = coder.encode_numpy(doc["text"], allowed_special=())
        ids.setdefault(side, []).extend([new, np.array([coder.eot_id], new.dtype)])
    for side, parts in ids.items():
        os.makedirs(f"{folder}/{side}", exist_ok=True)
        save(f"{folder}/{side}/{name.removesuffix('.json')}.npy", np.concatenate(parts))
    save(target, {"counts": {f"{side} tokens": sum(map(len, ids[side])) for side in sorted(ids)}})


def stage_tokenize(o, inputs):
    """Token files for train.py, by a tokenizer that is given or trained on this text."""

    def train_tokenizer(target):
        """On the first shards, about a gigabyte of text."""
        from tokenizer import EOT, Tokenizer, train_bpe

        sizes = itertools.accumulate(map(os.path.getsize, inputs))
        few = [path for path, size in zip(inputs, sizes) if size < 1 << 28] or inputs[:1]
        texts = (doc["text"] for path in few for doc in read_documents(path))
        vocab, merges = train_bpe(texts, o.vocab_size, [EOT], num_processes=o.processes)
        Tokenizer(vocab, merges, [EOT]).save(target)

    targets, _ = begin_stage(o, "tokenize", inputs, "tokenizer", "vocab_size", "val_fraction")
    tokenizer = o.tokenizer or f"{o.out}/tokenize/tokenizer.json"
    if not o.tokenizer:
        map_shards(o, "tokenizer", train_tokenizer, [(tokenizer,)])
    books = [target.replace(".jsonl.gz", ".json") for target in targets]
    return map_shards(o, "tokenize", tokenize_shard, zip(books, inputs), tokenizer, o)


STAGES = {"extract": stage_extract, "filter": stage_filter, "lines": stage_lines,
          "minhash": stage_minhash, "tokenize": stage_tokenize}


def find_inputs(specs, flag="--input"):
    """Files, patterns, directories (but for the books in them) to a sorted list.

    ValueError: one matches nothing.
    """
    found = set()
    for spec in specs:
        files = glob.glob(os.path.join(spec, "*") if os.path.isdir(spec) else spec)
        books = (".json", ".seconds") if os.path.isdir(spec) else ()
        files = [path for path in files if os.path.isfile(path) and not path.endswith(books)]
        if not files:
            raise ValueError(f"{flag} {spec}: no such file; give files, directories or patterns")
        found.update(files)
    return sorted(found)


# ---- report --------------------------------------------------------------------------------------


def collect_books(out):
    """The books of all shards added up: {"filters", "counts", "languages", "seconds"}."""
    total = {"filters": {}, "counts": {}, "languages": {}, "seconds": {}}
    for stage in STAGES:
        for path in sorted(Path(out, stage).glob("[0-9]*.json")):
            add_books(total, json.loads(path.read_bytes()))
            if (seconds := path.with_suffix(".seconds")).exists():
                add_books(total, {"seconds": json.loads(seconds.read_bytes())})
    return total


def report(o):
    """Print the funnel; write it with samples to report.txt and draw it in report.png."""
    books = collect_books(o.out)
    filters = books["filters"].items()
    if not filters:
        raise ValueError(f"--out {o.out}: nothing to report there; run some stages first")
    removed = sum(row["documents"] - row["kept"] for _, row in filters) or 1
    heads = ("documents", "kept", "words", "kept", "of removals", "seconds")
    lines = [f"{'filter':<14}" + "".join(f"{head:>13}" for head in heads)]
    for name, row in filters:
        cells = [f"{row[key]:,}" for key in ("documents", "kept", "words", "kept_words")]
        cells += [f"{(row['documents'] - row['kept']) / removed:.1%}",
                  f"{books['seconds'][name]:.2f}"]
        lines.append(f"{name:<14}" + "".join(f"{cell:>13}" for cell in cells))
        for reason, count in Counter(row["reasons"]).most_common(12):
            lines.append(f"{'':<14}{count:>13,} {reason}")
    for key in ("counts", "languages"):
        found = Counter(books[key]).most_common(30)
        lines.append(f"{key}: {', '.join(f'{name} {count:,}' for name, count in found if count)}")
    lines.append("a word is what white space separates")
    print("\n".join(lines))
    for name, row in filters:
        for title, samples in row["samples"].items():
            lines += ["", f"{name}, {title}:"]
            lines += [f"  {doc} {why}: {' '.join(text.split())}" for _, doc, why, text in samples]
    with replacing(os.path.join(o.out, "report.txt")) as file:
        file.write("\n".join([*lines, ""]).encode("utf-8", "replace"))

    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="tight")
    left, right = figure.subplots(1, 2)
    for key, shade in (("documents", "0.8"), ("kept", "tab:blue")):
        left.barh([name for name, _ in filters], [row[key] for _, row in filters], color=shade,
                  label=key)
    left.invert_yaxis()
    left.legend()
    left.set(title="documents before and after each filter")
    right.bar(*zip(*Counter(books["languages"]).most_common(20) or [("none", 0)]))
    right.set(title="documents by language", yscale="symlog")
    with replacing(os.path.join(o.out, "report.png")) as file:
        figure.savefig(file, format="png")


# ---- training and applying classifiers -----------------------------------------------------------


def labelled_texts(o):
    """Yield (label, text) of LABEL=FILE inputs (plain text: each line) or rows with a label."""
    for pair in o.labels:
        if "=" not in pair:
            raise ValueError(f"--labels {pair}: write OLD=NEW, for example 0=toxic")
    names = dict(pair.split("=", 1) for pair in o.labels)
    for spec in o.input:
        label, _, path = spec.rpartition("=")
        if not os.path.isfile(path):
            raise ValueError(f"--input {spec}: no such file; give LABEL=FILE, or FILE with a "
                             f"column {o.label_key} (--label-key)")
        for row in read_rows(path):
            given, text = label or row.get(o.label_key), row.get(o.text_key)
            if not given or text is None:
                raise ValueError(f"--input {path}: a row without {o.text_key!r} or a label; name "
                                 "the columns with --text-key and --label-key")
            parts = [str(text)] if len(row) > 1 else str(text).split("\n")
            yield from ((names.get(str(given), str(given)), x) for x in parts if x.strip())


def random_crop(text, random):
    """8 to 256 consecutive words of a text, each power of two as likely."""
    words, size = text.split(), int(2 ** random.uniform(3, 8))
    start = int(random.integers(0, max(1, len(words) - size + 1)))
    return " ".join(words[start : start + size])


def area_under_curve(scores, positive):
    """Chance that a positive outscores a negative, ties half: the area under the ROC curve."""
    others = np.sort(scores[~positive])
    below, up_to = (np.searchsorted(others, scores[positive], side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(others)))


def fit_fasttext(lines, model, epochs=5, seed=0):
    """Train on lines `__label__x text` and put the model at a path, all or nothing.

    One thread, to get the same model every time. But then fastText 0.9.3 initialises a tenth of its
    matrix and leaves the rest as malloc gave it, now and then NaN. A matrix of over 32 MB in a
    process of its own is fresh from the kernel, zeros: hence the many buckets and the subprocess.
    """
    target = os.path.abspath(model)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(target)) as folder:
        path = os.path.join(folder, "train.txt")
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(lines)
        flags = {"input": path, "epoch": epochs, "lr": 0.2, "wordNgrams": 2, "dim": 16,
                 "bucket": 600_000, "thread": 1, "seed": seed, "verbose": 0}
        code = f"import fasttext; fasttext.train_supervised(**{flags}).save_model({path!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"--model {model}: training failed: {done.stderr[-300:].strip()}")
        os.replace(path, target)
    load_fasttext.cache_clear()


def train(o):
    """Train a fastText classifier; print its accuracy and AUC on a tenth held out.

    Classes often differ in length (tweets against articles), and fastText would learn just that. So
    it sees random crops of the same lengths, as many of each class.
    """
    random, kept, tests = np.random.default_rng(o.seed), {}, []
    for label, text in labelled_texts(o):
        if zlib.crc32(text.encode("utf-8", "replace")) % 10:
            kept.setdefault(label, []).append(text)
        else:
            tests.append((label, random_crop(text, random)))
    if len(kept) < 2 or {label for label, _ in tests} != set(kept):
        raise ValueError("--input: needs a few dozen texts of each of two or more labels, found "
                         + (", ".join(f"{k} {len(v)}" for k, v in kept.items()) or "none"))
    most = max(map(len, kept.values()))
    lines = [f"__label__{label} {random_crop(texts[i % len(texts)], random)}\n"
             for label, texts in kept.items() for i in range(most)]
    random.shuffle(lines)
    fit_fasttext(lines, o.model, o.epochs, o.seed)
    true = np.array([label for label, _ in tests])
    found = [dict(predict(text, o.model, -1)) for _, text in tests]
    right = np.mean([max(p, key=p.get) == label for p, label in zip(found, true)])
    curves = [area_under_curve(np.array([p.get(label, 0.0) for p in found]), true == label)
              for label in sorted(kept)]
    print(f"{o.model}: {len(lines):,} crops; held out {len(tests):,}, accuracy {right:.3f}, "
          + ", ".join(f"AUC {label} {area:.3f}" for label, area in zip(sorted(kept), curves)))


def score(o):
    """Print label, probability and start of every document, one JSON object a line."""
    for path in find_inputs(o.input):
        for doc in read_documents(path, o.text_key):
            label, p = (predict(doc["text"], o.model) or [("und", 0.0)])[0]
            print(json.dumps({"id": doc["id"], "label": label, "probability": round(p, 4),
                              "text": doc["text"][:80]}))


# ---- a demonstration crawl -----------------------------------------------------------------------

ELSEWHERE = {  # Universal Declaration of Human Rights, article 1
    "de": ["Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
           "Sie sollen einander im Geist der Brüderlichkeit begegnen."],
    "fr": ["Tous les êtres humains naissent libres et égaux en dignité et en droits.",
           "Ils doivent agir les uns envers les autres dans un esprit de fraternité."],
    "es": ["Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
           "Deben comportarse fraternalmente los unos con los otros."],
}


def machine_texts():
    """(name, text) of the English that Python brings along: its language reference and the
    documentation strings of its library."""
    import ast
    import sysconfig
    from pydoc_data.topics import topics

    yield from topics.items()
    library = sysconfig.get_paths()["stdlib"]
    for path in sorted(glob.glob(os.path.join(library, "**", "*.py"), recursive=True)):
        if not re.search(r"site-packages|dist-packages|/test", path):
            with contextlib.suppress(SyntaxError, UnicodeDecodeError):
                kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
                nodes = ast.walk(ast.parse(Path(path).read_bytes()))
                found = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
                yield os.path.relpath(path, library), "\n\n".join(filter(None, found))


def demo_pages(texts, random):
    """(host, status, content type, page): the machine's English, and what a crawl has beside it."""
    for i, (name, text) in enumerate(texts):
        paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
        if i % 6 == 1:  # personal data
            paragraphs.append(f"Questions go to user{i}@example.org or (555) 010-{i % 10000:04d}, "
                              f"and reports of outages to the machine at 192.0.2.{i % 250}.")
        body = "".join(f"<p>{escape(part)}</p>" for part in paragraphs)
        page = (f"<html><head><title>{escape(name)}</title></head><body><nav>Home | Docs | About"
                f"</nav><h1>{escape(name)}</h1>{body}<footer>All pages of this site may be read by "
                "everybody, at any time of the day, without asking.</footer></body></html>")
        coding = "latin-1" if i % 5 == 2 and not re.search("[^\0-\xff]", page) else "utf-8"
        kind = f"text/html; charset={coding}"
        yield "docs", 200, kind, page.encode(coding)
        if i % 8 == 3:  # a mirror that runs the lines together: alike, without one equal line
            yield "mirror", 200, kind, page.replace("</p><p>", " ").encode(coding)
        if i % 9 == 4:
            language = random.choice(sorted(ELSEWHERE))
            text = " ".join(random.choices(ELSEWHERE[language], k=40))
            yield language, 200, "text/html", f"<p>{text}</p>".encode()
        if i % 9 == 5:  # what the quality rules are for
            yield "spam", 200, "text/html", b"<p>" + b"buy now " * 300 + b"</p>"
        if i % 9 == 6:
            yield "gone", 404, "text/html", b"<p>not found</p>"


def demo(o):
    """Write a small crawl to --out from text found on this machine, and a language model for it.

    Four .warc.gz files with HTML in two encodings, near-duplicates, other languages, spam, errors
    and personal data, so that every filter has something to do; language.bin, a fastText model
    that tells this English from that German, French and Spanish, for this crawl only; and
    chats.jsonl, a question and an answer from every page, for align.py.
    """
    import random

    source, texts, records, hosts = random.Random(0), list(machine_texts()), [], Counter()
    for i, (host, status, kind, page) in enumerate(demo_pages(texts, source)):
        http = f"HTTP/1.1 {status} -\r\nContent-Type: {kind}\r\n\r\n".encode() + page
        head = (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: https://{host}.example/{i}"
                f"\r\nContent-Length: {len(http)}\r\n\r\n")
        records.append(gzip.compress(head.encode() + http + b"\r\n\r\n", 6, mtime=0))
        hosts[host] += 1
    chats = []
    for name, text in texts:
        if long := [" ".join(part.split()) for part in text.split("\n\n") if len(part) > 60]:
            turns = [{"role": "user", "content": f"What is {name}?"},
                     {"role": "assistant", "content": long[0]}]
            chats.append(json.dumps({"messages": turns}).encode() + b"\n")
    os.makedirs(o.out, exist_ok=True)
    files = {f"demo-{i}.warc.gz": records[i::4] for i in range(4)} | {"chats.jsonl": chats}
    for name, parts in files.items():
        with replacing(os.path.join(o.out, name)) as file:
            file.writelines(parts)
    lines = [f"__label__{label} {' '.join(source.choices(sentences, k=5))}\n"
             for label, sentences in ELSEWHERE.items() for _ in range(200)]
    lines += [f"__label__en {' '.join(text.split())[:400]}\n" for _, text in texts if text]
    fit_fasttext(lines, os.path.join(o.out, "language.bin"))
    told = ", ".join(f"{count} of {host}.example" for host, count in hosts.items())
    print(f"{o.out}: 4 .warc.gz files of {len(records)} pages ({told}), language.bin, chats.jsonl")


# ---- measuring against the peers -----------------------------------------------------------------


def show(what, ours, mb=None, **peers):
    """Print a row of the table: medians of three runs in turns, and each peer's time over ours."""
    times = {name: [] for name in ("ours", *peers)}
    for _ in range(4):  # the first warms caches and models, as they are in a long run
        for name, function in {"ours": ours, **peers}.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    clock = {name: sorted(runs[1:])[1] for name, runs in times.items()}
    rate = f", {mb / clock['ours']:.1f} MB/s" if mb else ""
    print(f"{what:<36} ours {clock['ours']:.3f} s{rate}", end="")
    for name in peers:
        print(f"; {name} {clock[name]:.3f} s, {clock[name] / clock['ours']:.1f}x", end="")
    print(flush=True)


def bench(o):
    """Time signatures, LSH, rules and the pipeline beside datasketch and datatrove."""
    import datasketch
    import xxhash
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Whitespace(WordTokenizer):
        word_tokenize = sent_tokenize = span_tokenize = staticmethod(str.split)

    docs = (doc for path in find_inputs(o.input) for doc in read_documents(path, o.text_key))
    texts = [doc["text"][at : at + 4000] for doc in docs for at in range(0, len(doc["text"]), 4000)]
    texts = [text for text in texts if len(text.split()) >= 50]  # datatrove fails on tiny ones
    mb = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {mb:.1f} MB")

    def grams(text):  # as cheap a normal form as Python has
        words = text.lower().translate(dict.fromkeys(map(ord, "!\"#$%&'()*+,-./:;?@[]_"))).split()
        return [" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))]

    trove = MinhashDedupSignature(tempfile.gettempdir(), MinhashConfig(n_grams=5), Whitespace())
    trove._hash_func = lambda gram: xxhash.xxh64_intdigest(gram.encode())  # xxhash 4 takes no str
    show("signatures of raw text, 14 x 8", lambda: minhash_signatures(texts), mb,
         datasketch=lambda: datasketch.MinHash.bulk(map(grams, texts), num_perm=112),
         datatrove=lambda: [trove.get_signature(trove.get_shingles(text)) for text in texts])

    signatures = np.random.default_rng(0).integers(0, 2**32, (20_000, 112), dtype=np.uint32)
    signatures[:2000] = signatures[2000:4000]  # a tenth of the documents has a copy
    minhashes = [datasketch.MinHash(hashvalues=row, scheme="affine32") for row in signatures]

    def their_lsh():
        lsh = datasketch.MinHashLSH(num_perm=112, params=(14, 8))
        for i, minhash in enumerate(minhashes):
            lsh.insert(i, minhash)
        return [lsh.query(minhash) for minhash in minhashes]

    show("LSH of 20,000 documents", lambda: candidate_pairs(signatures, 14), datasketch=their_lsh)

    docs = [Document(text, str(i)) for i, text in enumerate(texts)]
    theirs = [kind(language=Whitespace()) for kind in (GopherQualityFilter, GopherRepetitionFilter)]

    def our_rules():
        return [r for part in batches(texts) for r in failed_rules(part, ("gopher", "repetition"))]

    def their_rules():
        return [[filter_.filter(doc) is True for filter_ in theirs] for doc in docs]

    show("Gopher quality and repetition", our_rules, mb, datatrove=their_rules)
    same = [(rule is None) == all(passed) for rule, passed in zip(our_rules(), their_rules())]
    print(f"same verdict on {np.mean(same):.1%} of documents")
    with tempfile.TemporaryDirectory() as folder:
        bench_pipeline(o, texts, folder)


def bench_pipeline(o, texts, folder):
    """Time WET files through all filters and three classifiers to signatures, 1 and 2 processes.

    Starting workers costs a tenth of a second, nothing in a crawl but half of what 2.7 MB take. So
    for each document come three more of as many lines, drawn from all of them.
    """
    random, lines = np.random.default_rng(0), [text.split("\n") for text in texts]
    pool = np.array([line for part in lines for line in part], object)
    texts = texts + ["\n".join(random.choice(pool, len(part))) for part in lines * 3]
    bodies = [text.encode() for text in texts]
    record = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
    for shard in range(8):
        with open(f"{folder}/{shard}.wet.gz", "wb") as file:
            file.writelines(gzip.compress(record % (len(b), b)) for b in bodies[shard::8])
    labels = itertools.cycle(BAD_LABEL.values())  # what is learned does not matter here
    lines = [f"__label__{next(labels)} {' '.join(text.split())}\n" for text in texts]
    flags = ["--drop-above", "1"]  # every document meets every classifier
    flags += ["--language-model", o.language_model] if o.language_model else []
    for task in BAD_LABEL:
        fit_fasttext(lines, f"{folder}/{task}.bin", epochs=1)
        flags += [f"--{task}", f"{folder}/{task}.bin"]

    def pipeline(processes):
        out = tempfile.mkdtemp(dir=folder)
        more = ["--out", out, "--processes", str(processes)]
        with contextlib.redirect_stderr(io.StringIO()):
            main(["filter", "--input", f"{folder}/*.wet.gz", *flags, *more])
            main(["minhash", "--input", f"{out}/filter/*.gz", *more])

    show("WET to deduplicated, 2 processes", lambda: pipeline(2), sum(map(len, bodies)) / 1e6,
         one=lambda: pipeline(1))


# ---- command line --------------------------------------------------------------------------------


def number(kind, least, most=np.inf):
    """An argparse type: a number of a kind, int or float, between two bounds."""

    def parse(text):
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return value

    parse.__name__ = kind.__name__  # in argparse's message when kind(text) fails
    return parse


STAGE = "run extract filter lines minhash tokenize"
LIST, FILES, TRUE = dict(nargs="*"), dict(nargs="+", required=True), dict(action="store_true")
POSITIVE, SHARE = dict(type=number(int, 1)), dict(type=number(float, 0, 1))
FLAGS = [  # the commands that have it, the flag, its default, other settings, help
    (STAGE + " report", "--out", "data", {}, "directory of everything that is written"),
    ("demo", "--out", "crawl", {}, "directory of the crawl"),
    (STAGE, "--input", None, LIST, "files, directories, patterns (or the stage before's in --out)"),
    ("score bench", "--input", None, FILES, "files, directories, patterns"),
    ("train", "--input", None, FILES, "LABEL=FILE, or files with a column of labels"),
    (STAGE, "--processes", os.cpu_count() or 1, POSITIVE, "workers of this machine"),
    ("run extract filter train score bench", "--text-key", "text", {}, "column of the text"),
    ("run extract filter", "--main-content", False, TRUE, "leave out menus and footers"),
    ("run filter bench", "--language-model", None, {}, "lid.176.bin or .ftz (or downloads .ftz)"),
    ("run filter", "--languages", ["en"], LIST, "ISO 639 codes to keep; none: all"),
    ("run filter", "--language-threshold", 0.65, SHARE, "least probability of it"),
    ("run filter", "--rules", list(RULES), dict(nargs="*", choices=list(RULES)), "rule sets"),
    *(("run filter", f"--{task}", None, dict(metavar="MODEL"), f"fastText model; drops its {label}")
      for task, label in BAD_LABEL.items()),
    ("run filter", "--drop-above", 0.5, SHARE, "probability from which these drop"),
    ("run filter", "--decontaminate", [], LIST, "evaluation sets whose 13-grams condemn"),
    ("run filter", "--no-pii", True, dict(dest="pii", action="store_false"), "leave personal data"),
    ("run lines", "--keep", "none", dict(choices=("none", "first")), "copies of a line to keep"),
    ("run lines", "--min-words", 50, dict(type=number(int, 0)), "shortest document left, words"),
    ("run minhash", "--num-hashes", 112, POSITIVE, "hashes of a signature"),
    ("run minhash", "--num-bands", 14, POSITIVE, "LSH bands, a divisor of these"),
    ("run minhash", "--ngrams", 5, POSITIVE, "words of a shingle"),
    ("run minhash", "--jaccard", 0.8, SHARE, "similarity from which on two are one"),
    ("run tokenize", "--tokenizer", None, {}, "tokenizer.json or its directory (or trains one)"),
    ("run tokenize", "--vocab-size", 32_000, POSITIVE, "tokens of the one trained"),
    ("run tokenize", "--val-fraction", 0.005, SHARE, "share held out for validation"),
    ("train score", "--model", None, dict(required=True), "the fastText model"),
    ("train", "--label-key", "label", {}, "column of the label"),
    ("train", "--labels", [], dict(nargs="*", metavar="OLD=NEW"), "labels to rename"),
    ("train", "--epochs", 5, POSITIVE, "passes over the data"),
    ("run minhash train", "--seed", 0, dict(type=number(int, 0)), "of all that is random"),
]


def run(o):
    """All stages and the report: one or all, each on what the one before it left."""
    o.rank, o.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    o.processes = max(1, o.processes // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    names = list(STAGES)
    if not o.input and o.command in ("run", "extract"):
        raise ValueError("--input: name the crawl files, for example --input 'crawl/*.warc.gz'")
    before = names[names.index(o.command) - 1] if o.command in names else ""
    files = find_inputs(o.input or [os.path.join(o.out, before, "*.jsonl.gz")])
    for stage in names[1:] if o.command == "run" else [o.command]:  # filter extracts, too
        files = STAGES[stage](o, files)
    if o.command == "run" and o.rank == 0:
        report(o)


COMMANDS = {"run": run, **STAGES, "report": report, "train": train, "score": score, "demo": demo,
            "bench": bench}


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, function in COMMANDS.items():
        what = function.__doc__.split("\n")[0]
        sub = commands.add_parser(command, help=what, description=what,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for users, flag, default, settings, text in FLAGS:
            if command in users.split():
                sub.add_argument(flag, default=default, help=text, **settings)
    o = parser.parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # every finished shard is safe
    try:
        (run if o.command in STAGES else COMMANDS[o.command])(o)
    except (ValueError, OSError, ImportError) as error:
        hint = ": pip install it (see requirements.txt)" if isinstance(error, ImportError) else ""
        print(f"filter_data.py: {error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
