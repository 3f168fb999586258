"""Byte-level BPE tokenizer: trained and applied at the speed of compiled ones, in Python and numpy.

    python tokenizer.py train data/ --vocab-size 32000 --out tok/        # writes tok/tokenizer.json
    python tokenizer.py encode data/ --tokenizer tok/ --out train.npy    # text -> token ids
    python tokenizer.py decode train.npy --tokenizer tok/                # token ids -> text

A tokenizer turns text into a list of integers. Byte-pair encoding (BPE) starts from the 256 bytes
and repeatedly joins the most frequent pair of neighbours into a new token, inside "words" that a
regular expression cuts out first. Read "The plain tokenizer" for the whole method in a hundred
lines; everything after it does exactly the same, faster.

Papers: Gage 1994, "A new algorithm for data compression"; Sennrich et al. 2016 (arXiv:1508.07909),
BPE for words; Radford et al. 2019, "Language models are unsupervised multitask learners", BPE over
bytes and the word pattern.
"""

import argparse
import base64
import codecs
import collections
import concurrent.futures
import contextlib
import glob as globbing
import gzip
import hashlib
import heapq
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import unicodedata
import zlib
from array import array
from functools import lru_cache, partial
from itertools import chain, compress, islice

import numpy as np
import regex

EOT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
CL100K_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}"
                 rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
                 r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# GPT-2's for what lies between single digits: a blank before one is a word of its own (SmolLM 2)
SMOLLM_PATTERN = r"\p{N}|\s+(?=\p{N})|" + GPT2_PATTERN.replace(r" ?\p{N}+|", "")
PATTERNS = {"gpt2": GPT2_PATTERN, "cl100k": CL100K_PATTERN, "o200k": O200K_PATTERN,
            "llama3": LLAMA3_PATTERN, "qwen2": QWEN2_PATTERN, "smollm": SMOLLM_PATTERN}

# ---- The plain tokenizer ------------------------------------------------------------------------


def special_regex(special_tokens):
    """Any of the tokens, the longest first where they overlap."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return "(" + "|".join(map(regex.escape, longest_first)) + ")"


def split_special(text, special_tokens):
    """[text, special token, text, ...]

    >>> split_special("a<|endoftext|>b", ["<|endoftext|>"])
    ['a', '<|endoftext|>', 'b']
    """
    return regex.split(special_regex(special_tokens), text) if special_tokens else [text]


def merge_pair(tokens, pair, new):
    """Replace every occurrence of the pair, left to right.

    >>> merge_pair(["a", "a", "a", "b"], ("a", "a"), "aa")
    ['aa', 'a', 'b']
    """
    out, i = [], 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(tokens[i])
            i += 1
    return out


def train_plain(texts, vocab_size, special_tokens=(), pattern=GPT2_PATTERN):
    """What `train_bpe` computes, by recounting every pair before every merge."""
    words = collections.Counter()
    for text in texts:
        for part in split_special(text, special_tokens)[::2]:
            words.update(word.encode() for word in regex.findall(pattern, part))
    split = {word: [bytes([byte]) for byte in word] for word in words}
    merges = []
    while len(special_tokens) + 256 + len(merges) < vocab_size:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(split[word], split[word][1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties: greatest byte strings
        merges.append(best)
        split = {word: merge_pair(tokens, best, b"".join(best)) for word, tokens in split.items()}
    return build_vocab(special_tokens, merges), merges


def build_vocab(special_tokens, merges):
    """Ids in order: the special tokens, the 256 bytes, one token a merge."""
    tokens = [token.encode() for token in special_tokens]
    tokens += [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    return dict(enumerate(tokens))


def merge_word(word, ranks):
    """BPE of one word: join the neighbours whose merge was learned first, until none is left."""
    tokens = [bytes([byte]) for byte in word]
    while len(tokens) > 1:
        best = min(zip(tokens, tokens[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        tokens = merge_pair(tokens, best, b"".join(best))
    return tokens


def encode_word(tokenizer, word):
    """Ids of one word that the pattern has cut out."""
    whole = tokenizer.ignore_merges and word.encode() in tokenizer.token_ids
    tokens = [word.encode()] if whole else merge_word(word.encode(), tokenizer.ranks)
    return [tokenizer.token_ids[token] for token in tokens]


def encode_plain(tokenizer, text):
    """What `Tokenizer.encode` computes, one word at a time."""
    ids = []
    for i, part in enumerate(split_special(text, tokenizer.special_tokens)):
        if i % 2:
            ids.append(tokenizer.special_tokens[part])
        else:
            for word in regex.findall(tokenizer.pattern, tokenizer.normalize(part)):
                ids += encode_word(tokenizer, word)
    return ids


# ---- Text in, files out -------------------------------------------------------------------------

CHUNK = 1 << 17  # bytes handled by one round of array operations: they fit in the L2 cache
CUT = regex.compile(rb"(?r)(?<=[!-~]) ")  # all named patterns start a word here; the last is found


def list_files(spec):
    """Sorted paths of a file, a directory, a glob pattern, or a list of those."""
    if not isinstance(spec, (str, os.PathLike)):
        return sorted({path for one in spec for path in list_files(one)})
    spec = os.fspath(spec)
    pattern = os.path.join(globbing.escape(spec), "**") if os.path.isdir(spec) else spec
    found = [spec] if os.path.isfile(spec) else globbing.glob(pattern, recursive=True)
    found = sorted(path for path in found if os.path.isfile(path))
    if not found:
        raise ValueError(f"{spec}: no file, directory or glob pattern with files in it")
    return found


def text_blocks(file):
    """About a megabyte at a time; each ends behind a blank, so within no character or special."""
    rest = b""
    while block := file.read(1 << 20):
        cut = max(block.rfind(b" "), block.rfind(b"\n")) + 1
        rest += block[:cut] if cut else block
        if cut:
            yield rest
            rest = block[cut:]
    yield rest


def read_pieces(path):
    """Yield a file in pieces of about a megabyte of UTF-8, and None where a document ends.

    Documents end at <|endoftext|>; in .jsonl each line is one. Line ends stay as they are. What is
    not UTF-8 becomes U+FFFD; that, and lines without a "text", are counted and reported.
    """
    jsonl, bad = path.removesuffix(".gz").endswith(".jsonl"), 0
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        try:
            for block in file if jsonl else text_blocks(file):
                if jsonl:
                    try:
                        text = json.loads(block.decode(errors="replace"))["text"]
                        yield from (text.encode(), None)
                    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                        bad += bool(block.strip())
                    continue
                if b"\0" in block:
                    raise ValueError("has a NUL byte, so it is no text; leave it out")
                try:
                    block.decode()
                except UnicodeDecodeError:
                    text = block.decode(errors="replace")
                    bad += text.count("\ufffd") - block.count("\ufffd".encode())
                    block = text.encode()
                *documents, last = block.split(EOT.encode())
                for text in documents:
                    yield from (text, None)
                yield last
        except (ValueError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: {error}") from None
    yield None
    if bad:
        what = 'lines without a "text" skipped' if jsonl else "invalid characters read as U+FFFD"
        print(f"{path}: {bad} {what}", file=sys.stderr)


def read_documents(files):
    """Yield the documents of the files: split at <|endoftext|>, one a line of .jsonl."""
    for path in list_files(files):
        parts = []
        for piece in read_pieces(path):
            if piece is None and any(parts):
                yield b"".join(parts).decode()
            parts = [] if piece is None else [*parts, piece]


def split_text(pieces, special_ids, pattern, separator=None):
    """Yield chunks of about CHUNK bytes: lists of parts (bytes, None) or (b"\\0", special id).

    pieces: UTF-8, which may end anywhere, within a special token too: what could still change is
    held back; and None where a document ends, for which comes (b"\\0", separator). Chunks end where
    a word surely does.
    """
    special = regex.compile(special_regex(special_ids).encode())
    special_ids = {token.encode(): i for token, i in special_ids.items()}
    longest = max(map(len, special_ids), default=1)

    def split(data):  # the regex is slow, and most texts have no special tokens
        return special.split(data) if any(token in data for token in special_ids) else [data]

    blocks = (piece and piece[i : i + CHUNK]
              for piece in pieces for i in range(0, 1 if piece is None else len(piece), CHUNK))
    chunk, size, rest, limit = [], 0, b"", CHUNK
    for block in chain(blocks, [b""]):
        rest += block or b""
        if block and len(rest) < limit:
            continue
        *parts, tail = split(rest)
        end = len(tail)
        if block:  # not the end of a document (None) or of everything: more follows
            sure = pattern in PATTERNS.values() and CUT.search(tail, 0, max(0, end - longest))
            if not sure:
                limit = 2 * len(rest)
                continue
            end = sure.start()
        parts, rest = [*parts, tail[:end]], tail[end:]
        limit = max(CHUNK, 2 * len(rest))
        chunk += [(b"\0", special_ids[part]) if i % 2 else (part, None)
                  for i, part in enumerate(parts) if part]
        if block is None and any(parts):
            chunk.append((b"\0", separator))
        size += sum(map(len, parts))
        if chunk and (size >= CHUNK or block == b""):
            yield chunk
            chunk, size = [], 0


def batches(chunks, size=32):
    """Lists of up to `size` chunks."""
    chunks = iter(chunks)
    while batch := list(islice(chunks, size)):
        yield batch


def keep(function):
    """Done once in each worker process: the function stays there, with the words it has learned."""
    call_kept.function = function
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for them


def call_kept(item):
    return call_kept.function(item)


def parallel_map(function, items, processes):
    """Yield function(item) in order, at most two items a process ahead, so memory stays bounded."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    processes, items = processes or len(cores), iter(items)
    head = list(islice(items, 2))
    if processes == 1 or len(head) < 2:  # not worth a process
        yield from map(function, chain(head, items))
        return
    # not multiprocessing.Pool, which waits for ever for a worker that was killed
    pool = concurrent.futures.ProcessPoolExecutor(processes, None, keep, (function,))
    try:
        waiting = collections.deque()
        for item in chain(head, items):
            waiting.append(pool.submit(call_kept, item))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise OSError("a worker process was killed (out of memory?): give fewer --processes"
                      ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def write_header(file, dtype, length):
    """The first 128 bytes of a .npy file of one dimension."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)})


def write_json(path, content):
    """Write beside it, then rename: the file is never half there."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
    os.replace(f"{path}.part", path)


# ---- Where words start, with array operations ---------------------------------------------------
# The patterns only ask of what class a character is. So give every byte the class of its character
# and compare the array with itself, shifted by one. EDGE stands around the text and on the special
# tokens: no word goes across it.

LETTER, DIGIT, OTHER, SPACE, EDGE = range(5)


@lru_cache
def class_table():
    """(0x110000,) uint8: the class of every code point, as the regex module sees it."""
    everything = np.arange(0x110000, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    classes = np.full(0x110000, OTHER, np.uint8)
    for pattern, kind in ((r"\p{L}+", LETTER), (r"\p{N}+", DIGIT), (r"\s+", SPACE)):
        for match in regex.finditer(pattern, everything):
            classes[match.start() : match.end()] = kind
    return classes


def classify(data):
    """(bytes,) uint8: the class of the character that each byte of UTF-8 belongs to."""
    table = class_table()
    classes = np.frombuffer(bytearray(data.translate(table[:256].tobytes())), np.uint8)
    if not data.isascii():
        raw = np.frombuffer(data, np.uint8)
        at = np.flatnonzero(raw >= 0x80)  # the bytes of the other characters, UTF-8 by themselves
        points = np.frombuffer(raw[at].tobytes().decode().encode("utf-32-le"), np.uint32)
        width = 2 + (points >= 0x800) + (points >= 0x10000)  # bytes of the character in UTF-8
        classes[at] = np.repeat(table[points], width)
    return classes


# By the two bytes behind a quote: how many of them make 's 't 'd 'm 'll 've 're of it.
CONTRACTED = np.zeros((256, 256), np.int64)
CONTRACTED[list(b"sdmt")] = 1
CONTRACTED[list(b"lvr"), list(b"lee")] = 2


def gpt2_starts(raw, classes):
    """(bytes,) bool: where GPT2_PATTERN starts a word. raw, classes: (bytes,) uint8."""
    start = np.ones(len(raw), bool)
    start[1:] = classes[1:] != classes[:-1]
    start[1:] &= raw[:-1] != ord(" ")  # " ?": a blank belongs to the word behind it, and so
    start[:-1] |= (classes[:-1] == SPACE) & (classes[1:] < SPACE)  # \s+(?!\S) leaves the last one
    start |= classes == EDGE
    inside = (raw & 0xC0) == 0x80  # not the first byte of a character
    last = np.flatnonzero(start & inside)  # a space of several bytes was marked at its last one
    while last.size:
        start[last] = False
        last = last - 1
        start[last] = True
        last = last[inside[last]]
    # Behind a word 's and the like are a word: none starts after the quote, one after the rest.
    quote = np.flatnonzero(start & (raw == ord("'")))
    behind = np.append(raw[1:], np.zeros(2, np.uint8))
    letters = CONTRACTED[behind[quote], behind[quote + 1]]
    quote, end = quote[letters > 0], (quote + letters + 1)[letters > 0]
    start[quote + 1] = False
    start[end[end < len(start)]] = True
    return start


def whole(words, text):
    """The words that a pattern found in a text; ValueError if they leave some of it out."""
    if sum(map(len, words)) != len(text):
        raise ValueError(r"--pattern must match every character (append |[\s\S] to it) and have no "
                         "group that captures (write (?:...) for it)")
    return words


def find_words(parts, pattern):
    """Cut a chunk into words. -> (data, starts, lengths, special)

    parts: [(bytes, None) or (b"\0", special id)], as `split_text` makes them. data: their bytes.
    starts, lengths: (words,) int64. special: indices of the words that stand for special tokens.
    """
    data = b"".join([part for part, _ in parts])
    at = np.cumsum([len(part) for part, _ in parts]) - 1
    at = at[[i is not None for _, i in parts]]  # the bytes that stand for special tokens
    if pattern == GPT2_PATTERN:
        classes = classify(data)
        classes[at] = EDGE
        starts = np.flatnonzero(gpt2_starts(np.frombuffer(data, np.uint8), classes))
    else:  # any other is left to the regex module
        words = []
        for text, i in ((part.decode(), i) for part, i in parts):
            words += whole(regex.findall(pattern, text), text) if i is None else [text]
        lengths = np.array([len(word.encode()) for word in words])
        starts = np.cumsum(lengths) - lengths
    return data, starts, np.diff(starts, append=len(data)), np.searchsorted(starts, at)


# ---- Numbering distinct words -------------------------------------------------------------------
# numpy's array.take(index) does what array[index] does, in a third of the time.


class Words(dict):
    """Numbers distinct words 1, 2, 3, ..., a whole array of them at a time: {bytes: number}.

    A dict knows every word, but to ask it word by word would take most of the time there is. So a
    table stands before it. A word of up to 15 bytes and its length are exactly two 64-bit integers,
    its key; the slot that a hash of the key names holds the number of the first word that came
    there. If that word has the same key, this is the number: nothing rests on the hash. Only the
    others are looked up in the dict: words that are new, long, or lost their slot.
    """

    # What counts of the first and of the last 8 bytes by length, and the length as the last byte.
    MASK = np.where(np.arange(16) < np.arange(17)[:, None] % 16, 255, 0).astype(np.uint8)
    LOW, HIGH = MASK.view("<u8").T.copy()
    LENGTH = np.array([*range(16), 255], np.uint64) << np.uint64(56)  # of 16 bytes and more: 255
    BITS = 20  # 2^20 slots, and as many words that can have one

    def __init__(self):
        self.slots = np.zeros(1 << self.BITS, np.int64)  # 0: no word yet
        self.first, self.second = np.zeros((2, 1 << self.BITS), np.uint64)  # keys by number

    def find(self, data, starts, lengths):
        """(n,) int64 numbers of the words at `starts` of the bytes `data`."""
        raw = np.frombuffer(data + bytes(16), np.uint8)
        eight = np.ndarray(len(raw) - 7, "<u8", raw, strides=(1,)).copy()  # read at every byte
        first = eight.take(starts) & self.LOW.take(lengths, mode="clip")
        second = eight.take(starts + 8) & self.HIGH.take(lengths, mode="clip")
        second |= self.LENGTH.take(lengths, mode="clip")
        mixed = first * np.uint64(0x9E3779B97F4A7C15) ^ second * np.uint64(0xC2B2AE3D27D4EB4F)
        slot = (mixed >> np.uint64(64 - self.BITS)).astype(np.int64)  # the best mixed bits

        def differ(number, first, second):  # from the key that has this number
            return (self.first.take(number) != first) | (self.second.take(number) != second)

        def ask(some):
            ends = starts[some] + lengths[some]
            number[some] = [self.setdefault(data[i:j], len(self) + 1)
                            for i, j in zip(starts[some].tolist(), ends.tolist())]

        number = self.slots.take(slot)
        todo = np.flatnonzero(differ(number, first, second))
        new = todo[(number[todo] == 0) & (lengths[todo] < 16)]
        self.slots[slot[new]] = new
        new = new[self.slots[slot[new]] == new]  # one for each free slot; it answers for its copies
        ask(new)
        fits = number[new] >> self.BITS == 0
        self.slots[slot[new]] = np.where(fits, number[new], 0)
        new = new[fits]
        self.first[number[new]], self.second[number[new]] = first[new], second[new]
        number[todo] = self.slots[slot[todo]]
        ask(todo[differ(number[todo], first[todo], second[todo])])
        return number


# ---- Merging a pair everywhere at once ----------------------------------------------------------

FEW = 24  # places up to which a Python loop is faster than numpy's calls


class Tape:
    """Many words in one array of ids, a boundary of -1 around each.

    A token of n bytes covers n places and writes its id on the first and on the last of them. So
    the token left of a place is read at place - 1, the next token starts n further on, and nothing
    ever has to move. Pairs of neighbours are known by their key left << 32 | right. Methods that
    find pairs return [(key, places, how often it occurs there)].
    """

    def __init__(self, ids, lengths, sizes, counts=1):
        """ids: (bytes,) of the words in a row. lengths, counts: (words,) bytes of each and how
        often it occurs. sizes: (V,) bytes of each token, shared with the caller, who makes them."""
        place = np.arange(1, len(ids) + 1) + np.repeat(np.arange(len(lengths)), lengths)
        self.ids = np.full(len(ids) + len(lengths) + 1, -1)
        self.ids[place] = ids
        self.is_start = self.ids >= 0
        self.sizes = sizes
        self.weight = np.zeros(len(self.ids), np.int64)  # count of the word of a place
        self.weight[place] = np.repeat(np.broadcast_to(counts, len(lengths)), lengths)
        # The same memory again: a loop reads single numbers faster from a memoryview.
        self.views = list(map(memoryview, (self.ids, self.sizes, self.is_start, self.weight)))

    def pairs(self, most=None):
        """All pairs, or the `most` most frequent and those as frequent as the last of them."""
        at = np.flatnonzero(self.is_start)
        left = self.ids[at]
        right = self.ids[at + self.sizes[left]]
        return self._group((left << 32 | right)[right >= 0], at[right >= 0], 1, most)

    def _group(self, keys, at, least, most=None):
        """Sort places by key. Leaves out keys < 0 and what occurs less often than `least`."""
        order = keys.argsort()
        keys, at = keys[order], at[order]
        edge = np.ones(len(keys) + 1, bool)
        np.not_equal(keys[1:], keys[:-1], out=edge[1:-1])
        first = np.flatnonzero(edge)  # place of each distinct key, and the end
        keys, count = keys[first[:-1]], np.add.reduceat(self.weight[at], first[:-1])
        if most and len(count) > most:
            least = np.sort(count)[-most]
        some, at = np.flatnonzero((count >= least) & (keys >= 0)), memoryview(at)
        ranges = zip(first[some].tolist(), first[some + 1].tolist())
        return list(zip(keys[some].tolist(), [at[i:j] for i, j in ranges], count[some].tolist()))

    def places(self, left, right, at):
        """(those of the places `at` where the pair still stands, how often it occurs there)."""
        if len(at) <= FEW:
            ids, sizes, _, weight = self.views
            size = sizes[left]
            at = [i for i in at if ids[i] == left and ids[i + size] == right]
            return at, sum([weight[i] for i in at])
        at = np.asarray(at)
        at = at[(self.ids[at] == left) & (self.ids[at + self.sizes[left]] == right)]
        return at, int(self.weight[at].sum())

    def merge(self, left, right, at, new, least=1):
        """Merge a pair at its `places`. -> the pairs that the new token makes (those that occur
        less often than `least` may be missing)."""
        if len(at) <= FEW:
            return self._merge_few(left, right, at, new)
        if left == right:  # of the overlapping places in "aaaa" the first, third, ... of each row
            at = np.sort(at)
            index, size = np.arange(len(at)), self.sizes[left]
            row = np.where(np.diff(at, prepend=-size - 1) == size, 0, index)
            at = at[(index - np.maximum.accumulate(row)) % 2 == 0]
        middle, end = at + self.sizes[left], at + self.sizes[new]
        self.is_start[middle] = False
        self.ids[middle] = -2  # no token starts here now; a short one also ends here:
        self.ids[at] = self.ids[end - 1] = new
        before, after = self.ids[at - 1], self.ids[end]
        after[after == new] = -1  # counted as this one's `before`
        keys = np.concatenate((before << 32 | new, after + (new << 32)))
        keys[len(at):][after < 0] = -1
        return self._group(keys, np.concatenate((at - self.sizes[before], at)), least)

    def _merge_few(self, left, right, at, new):
        """`merge`, place by place."""
        ids, sizes, is_start, weight = self.views
        skip, size, found = sizes[left], sizes[new], collections.defaultdict(list)
        for i in sorted(at):
            if ids[i] != left or ids[i + skip] != right:
                continue  # the middle of "aaa", whose first two are merged
            end = i + size
            is_start[i + skip], ids[i + skip] = False, -2
            ids[i] = ids[end - 1] = new
            before, after = ids[i - 1], ids[end]
            if before >= 0:
                found[before << 32 | new].append(i - sizes[before])
            if after >= 0:
                found[new << 32 | after].append(i)
        return [(key, at, sum([weight[i] for i in at])) for key, at in found.items()]


# ---- Training -----------------------------------------------------------------------------------

WAITING = 1500  # pairs put into the heap when it is empty


def learn_merges(words, number):
    """The `number` most frequent merges of words {word: count}, as pairs of bytes.

    A heap holds the frequent pairs. Counts only ever fall: all pairs with a new token appear when
    the token does, later merges can but take some away. So a heap entry is an upper bound; recount
    when it comes up, and put it back if it was too high. Of all pairs only the most frequent are
    put in; those rarer than `floor` stay out until the heap is empty: most never come up.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    # A heap pops the smallest, ties go to the greatest bytes: turn byte b into character 255 - b,
    # and end with one greater than all to have "ab" before "a".
    reverse = [chr(255 - byte) + chr(256) for byte in range(256)]
    sizes = np.ones(256 + number + 2, np.int64)
    lengths, counts = list(map(len, words)), list(words.values())
    tape = Tape(np.frombuffer(b"".join(words), np.uint8), lengths, sizes, counts)
    merges, heap, floor = [], [], 0

    def push(found):
        for key, at, count in found:
            if count >= floor:
                pair = reverse[key >> 32], reverse[key & 0xFFFFFFFF]
                heapq.heappush(heap, (-count, *pair, key, at))

    while len(merges) < number:
        if not heap:
            found = tape.pairs(WAITING)
            if not found:
                break
            floor = min(count for _, _, count in found)
            push(found)
        bound, *_, key, at = heapq.heappop(heap)
        left, right, new = key >> 32, key & 0xFFFFFFFF, len(tokens)
        at, count = tape.places(left, right, at)
        if count < -bound:
            push([(key, at, count)])
            continue
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
        reverse.append(reverse[left][:-1] + reverse[right])
        sizes[new] = len(tokens[new])
        push(tape.merge(left, right, at, new, floor))
    return merges


def count_words(batch, pattern):
    """{word: how often it occurs} in a batch of chunks."""
    words, numbers = Words(), []
    for parts in batch:
        data, starts, lengths, special = find_words(parts, pattern)
        numbers.append(words.find(data, np.delete(starts, special), np.delete(lengths, special)))
    return dict(zip(words, np.bincount(np.concatenate(numbers))[1:].tolist()))


def train_bpe(input_path, vocab_size, special_tokens=(), *, pattern=GPT2_PATTERN,
              num_processes=None):
    """Learn a vocabulary: -> ({id: bytes}, [(bytes, bytes)] merges in the order learned).

    input_path: what `list_files` takes, or an iterable of texts (a list of strings is taken as
    texts if the first is no file). Merges the most frequent pair, of equals the one with the
    greatest byte strings, until there are `vocab_size` tokens or no pairs. ValueError if vocab_size
    has no room for the bytes and special tokens.
    """
    special_tokens = list(dict.fromkeys(special_tokens))
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(f"--vocab-size {vocab_size}: must be at least {256 + len(special_tokens)}"
                         f", for 256 bytes and {len(special_tokens)} special tokens")
    first = input_path[0] if isinstance(input_path, (list, tuple)) and input_path else input_path
    if isinstance(input_path, str) or isinstance(first, os.PathLike) or (
            isinstance(first, str) and os.path.exists(first[:4096])):
        pieces = chain.from_iterable(map(read_pieces, list_files(input_path)))
    else:
        pieces = (piece for text in input_path for piece in (text.encode(), None))
    chunks = split_text(pieces, dict.fromkeys(special_tokens, 0), pattern, 0)
    words = collections.Counter()
    for counts in parallel_map(partial(count_words, pattern=pattern), batches(chunks, 64),
                               num_processes):
        words.update(counts)
    merges = learn_merges(words, vocab_size - 256 - len(special_tokens))
    return build_vocab(special_tokens, merges), merges


# ---- BPE of many words at once ------------------------------------------------------------------

NO_MERGE = 1 << 24  # the rank of a pair that is never merged


class BPE:
    """The ids of words: all words that are new in a batch are worked out together, and kept.

    token_ids: {bytes: id}. merges: [(bytes, bytes)]. ignore_merges: see `Tokenizer`. KeyError for a
    byte or a merge that is no token.
    """

    def __init__(self, token_ids, merges, ignore_merges=False):
        self.token_ids, self.ignore_merges = token_ids, ignore_merges
        self.byte_ids = np.array([token_ids[bytes([byte])] for byte in range(256)], np.int32)
        merged = [(token_ids[a], token_ids[b], token_ids[a + b]) for a, b in merges]
        self.left, self.right, self.joined = np.array(merged, np.int64).reshape(-1, 3).T
        keys = self.left << 32 | self.right  # by rank
        self.rank_of = {key: rank for rank, key in enumerate(keys.tolist())}
        # the same for arrays: keys in order, and one behind them that is greater than all
        self.keys = np.append(np.sort(keys), 1 << 62)
        self.rank_at = np.append(np.argsort(keys), NO_MERGE).astype(np.int32)
        byte = np.arange(1 << 16)
        self.byte_ranks = self.ranks(self.byte_ids[byte >> 8], self.byte_ids[byte & 255])
        self.sizes = np.ones(max(token_ids.values()) + 3, np.int64)  # 1 for the marks -1 and -2
        self.sizes[list(token_ids.values())] = list(map(len, token_ids))  # bytes of each token
        self.forget()

    def ranks(self, left, right):
        """(n,) int32 ranks of pairs of ids, NO_MERGE for pairs that never merge (-1 is in none)."""
        key = left.astype(np.int64) << 32 | right
        at = np.searchsorted(self.keys, key)
        return np.where(self.keys.take(at) == key, self.rank_at.take(at), np.int32(NO_MERGE))

    def forget(self):
        """Start with no words. Word n has the ids pool[first[n] : first[n] + count[n]]."""
        self.words = Words()
        self.first, self.count, self.pool = array("q", [0]), array("q", [0]), array("i")

    def learn(self):
        """Put the ids of the words that are new into the pool."""
        size = len(self.words) + 1 - len(self.count)
        new = list(islice(reversed(self.words), size))[::-1]
        lengths = np.array(list(map(len, new)), np.int64)
        first, count = np.zeros((2, size), np.int64)
        for low, high, bpe in ((0, 15, self.merge_rounds), (15, 64, self.merge_rounds),
                               (64, 1 << 62, self.merge_long)):  # like lengths share a matrix
            if (some := (low < lengths) & (lengths <= high)).any():
                raw = np.frombuffer(b"".join(compress(new, some)), np.uint8)
                ids, count[some] = bpe(raw, lengths[some])
                first[some] = len(self.pool) + np.cumsum(count[some]) - count[some]
                self.pool.frombytes(ids.astype(np.int32).tobytes())
        for i, word in enumerate(new) if self.ignore_merges else ():
            if word in self.token_ids:
                self.pool[first[i]], count[i] = self.token_ids[word], 1
        self.first.frombytes(first.tobytes())
        self.count.frombytes(count.tobytes())

    def look_up(self, number):
        """(int32 ids of the words with these numbers in a row, int64 how many of each)."""
        first, count = (np.asarray(each).take(number) for each in (self.first, self.count))
        ends = np.cumsum(count)  # the places of a word in the pool are first, first + 1, ...
        place = np.repeat(first + count - ends, count) + np.arange(ends[-1])
        return np.asarray(self.pool).take(place), count

    def merge_rounds(self, raw, lengths):
        """BPE of W words of at most 64 bytes: raw (bytes,), lengths (W,) -> ids, counts (W,).

        A word is a column of a matrix whose places are numbered row by row. As on a Tape, a token
        of n bytes covers n places and writes its id on the first and the last. In every round each
        word merges its leftmost pair of lowest rank: rank * 64 + row is one integer, so a single
        minimum finds both.
        """
        row, width = np.arange(lengths.max() + 1)[:, None], len(lengths)
        start = row < lengths  # (L + 1, W): a token starts here
        ids = np.full(start.shape, -1, np.int32)  # row L is the boundary, and row -1 is row L
        ids.T[start.T] = self.byte_ids[raw]
        key = np.full(start.shape, NO_MERGE, np.int32)  # of the pair that starts there
        key.T[start.T] = self.byte_ranks[raw * np.uint16(256) + np.append(raw[1:], 0)]
        key[row == lengths - 1] = NO_MERGE
        key = key * 64 + row.astype(np.int32)
        flat_start, flat_ids, flat_key = start.ravel(), ids.ravel(), key.ravel()  # the same memory
        step = self.sizes * width  # from a token to the next
        while True:
            best = key.min(0)
            word = np.flatnonzero(best < NO_MERGE * 32)
            if not len(word):
                return ids.T[start.T], start.sum(0)
            row, rank = best[word] & 63, best[word] >> 6
            new, at = self.joined[rank], row * width + word
            middle, end = at + step[self.left[rank]], at + step[new]
            flat_start[middle] = False
            flat_key[middle] = NO_MERGE * 64
            flat_ids[at] = flat_ids[end - width] = new
            before, after = flat_ids[at - width], flat_ids[end]
            flat_key[at] = self.ranks(new, after) * 64 + row
            flat_key[at - step[before]] = self.ranks(before, new) * 64 + row - self.sizes[before]

    def merge_long(self, raw, lengths):
        """BPE of long words, rank by rank on a Tape: raw (bytes,), lengths (W,) -> ids, counts.

        A pair with a new token always ranks behind the merge that made the token, so every rank
        comes up once, for all words together.
        """
        tape = Tape(self.byte_ids[raw], lengths, self.sizes)
        heap, where, found = [], collections.defaultdict(list), tape.pairs()
        while True:
            for key, at, _ in found:
                if (rank := self.rank_of.get(key)) is None:
                    continue
                if rank not in where:
                    heapq.heappush(heap, rank)
                where[rank].append(at)
            if not heap:
                break
            rank = heapq.heappop(heap)
            left, right = int(self.left[rank]), int(self.right[rank])
            at, _ = tape.places(left, right, np.concatenate(where.pop(rank)))
            found = tape.merge(left, right, at, int(self.joined[rank]))
        words = np.cumsum(lengths + 1) - lengths  # first place of each
        return tape.ids[tape.is_start], np.add.reduceat(tape.is_start, words, dtype=np.int64)


# ---- The tokenizer ------------------------------------------------------------------------------

MAX_WORDS = 1 << 18  # distinct words remembered
SHORT = 1000  # characters up to which array operations do not pay


class Tokenizer:
    """Text to ids and back.

    vocab: {id: bytes}. merges: [(bytes, bytes)], first learned first. special_tokens: texts, or
    {text: id}; one that the vocabulary lacks gets the next free id. pattern: a name in PATTERNS or
    a regular expression. normalizer: None or "NFC" (Qwen). ignore_merges: a word that is a token is
    that token, whatever the merges make of it (Llama 3, tiktoken).
    """

    def __init__(self, vocab, merges, special_tokens=None, pattern=GPT2_PATTERN, *,
                 normalizer=None, ignore_merges=False):
        self.vocab, self.merges = dict(vocab), list(merges)
        self.pattern = PATTERNS.get(pattern, pattern)
        self._find = regex.compile(self.pattern).findall
        self.normalizer, self.ignore_merges = normalizer, ignore_merges
        self.special_tokens, known = {}, {token: i for i, token in self.vocab.items()}
        for token in special_tokens or ():
            i = special_tokens[token] if isinstance(special_tokens, dict) else known.get(
                token.encode(), max(self.vocab, default=-1) + 1)
            self.special_tokens[token], self.vocab[i] = i, token.encode()
        special = set(self.special_tokens.values())
        made = {bytes([byte]) for byte in range(256)} | {a + b for a, b in self.merges}
        self.token_ids = {token: i for i, token in self.vocab.items()
                          if i not in special or token in made}
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.vocab_size = max(self.vocab) + 1
        self.eot_id = self.special_tokens.get(EOT)
        self.dtype = np.uint16 if self.vocab_size <= 65536 else np.uint32
        self._bytes = np.array([self.vocab.get(i) for i in range(self.vocab_size)], object)
        self._ints = np.array(range(self.vocab_size), object)  # a list of these is soon made
        try:
            self._bpe = BPE(self.token_ids, list(self.ranks), ignore_merges)
        except KeyError as error:
            raise ValueError(f"the vocabulary lacks {error.args[0]}, which byte-level BPE with "
                             "these merges needs") from None
        self.reset_cache()

    def normalize(self, text):
        return unicodedata.normalize(self.normalizer, text) if self.normalizer else text

    def reset_cache(self):
        self._bpe.forget()
        self._short = {}  # str -> list of ids, for short texts

    # -- encode

    def encode_numpy(self, text, allowed_special="all"):
        """Ids of a text: (tokens,) uint16, or uint32 for a vocabulary of more than 65,536 ids.

        allowed_special: the special tokens that count as such. Give () for text from users, in
        which "<|endoftext|>" should be nothing but these 13 characters.
        """
        arrays = self._encode_pieces([text.encode()], allowed_special)
        return np.concatenate([np.zeros(0, self.dtype), *arrays])

    def _encode_pieces(self, pieces, allowed_special, size=32):
        """Yield the ids of text that comes in pieces of UTF-8, of `size` chunks at a time."""
        special = {token: i for token, i in self.special_tokens.items()
                   if allowed_special == "all" or token in allowed_special}
        yield from map(self._encode_batch, batches(split_text(pieces, special, self.pattern), size))

    def _encode_batch(self, batch):
        """Ids of a batch of chunks: number all words, work out the new ones, look up all ids."""
        bpe, chunks, out = self._bpe, [], []
        if len(bpe.count) > MAX_WORDS or len(bpe.pool) > 8 * MAX_WORDS:  # many, or long ones
            bpe.forget()
        for parts in batch:
            if self.normalizer:
                parts = [(self.normalize(part.decode()).encode(), i) for part, i in parts]
            data, starts, lengths, special = find_words(parts, self.pattern)
            special_ids = [i for _, i in parts if i is not None]
            chunks.append((bpe.words.find(data, starts, lengths), special, special_ids))
        bpe.learn()
        for number, special, special_ids in chunks:
            ids, count = bpe.look_up(number)
            ids[np.cumsum(count)[special] - 1] = special_ids  # for the one id of each word "\0"
            out.append(ids.astype(self.dtype))
        return np.concatenate(out)

    def encode(self, text, allowed_special="all"):
        """List of the ids of a text; see `encode_numpy`."""
        ids, known = [], self._short
        if len(text) > SHORT or self.normalizer or any(t in text for t in self.special_tokens):
            out = self.encode_numpy(text, allowed_special)
            for i in range(0, len(out), 8192):  # blocks stay in the cache
                ids += self._ints.take(out[i : i + 8192]).tolist()
            return ids
        for word in whole(self._find(text), text):
            if word not in known:  # a word of more than 40 characters would take merge_word long
                known[word] = (self.encode_numpy(word, ()).tolist() if len(word) > 40 else
                               encode_word(self, word))
            ids += known[word]
        if len(known) > MAX_WORDS:
            known.clear()
        return ids

    def encode_batch(self, texts, allowed_special="all"):
        """Lists of the ids of several texts."""
        return [self.encode(text, allowed_special) for text in texts]

    def encode_iterable(self, texts, allowed_special="all"):
        """Yield the ids of the joined texts, holding a few megabytes of them at a time."""
        for ids in self._encode_pieces(map(str.encode, texts), allowed_special, 8):
            yield from ids.tolist()

    def encode_file(self, path, out, num_processes=None):
        """Write the ids of files, EOT behind every document, to a .npy file; -> number of ids.

        Killed and called again, it goes on where it was.
        """
        files, part, note = list_files(path), f"{out}.part", f"{out}.state"
        if self.eot_id is None:
            raise ValueError(f"the tokenizer has no {EOT} to put behind documents: train it with "
                             f"--special-tokens '{EOT}'")
        job = [[file, os.path.getsize(file), os.path.getmtime(file)] for file in files]
        job = hashlib.sha256(json.dumps([job, to_json(self)]).encode()).hexdigest()
        state = {"job": job, "batches": 0, "ids": 0}
        if os.path.exists(part) and os.path.exists(note):
            with open(note) as file:
                old = json.load(file)
            state = old if old["job"] == job else state
        pieces = chain.from_iterable(map(read_pieces, files))
        chunks = split_text(pieces, {}, self.pattern, self.eot_id)
        todo = islice(batches(chunks), state["batches"], None)
        with open(part, "r+b" if state["batches"] else "w+b") as file:
            write_header(file, self.dtype, 0)
            file.seek(state["ids"] * np.dtype(self.dtype).itemsize, os.SEEK_CUR)
            file.truncate()
            for ids in parallel_map(self._encode_batch, todo, num_processes):
                file.write(ids)
                file.flush()
                state["batches"] += 1
                state["ids"] += len(ids)
                write_json(note, state)
                if sys.stderr.isatty():
                    print(f"\r{state['ids']:,} tokens ", end="", file=sys.stderr)
            file.seek(0)
            write_header(file, self.dtype, state["ids"])
        os.replace(part, out)
        os.remove(note)
        return state["ids"]

    # -- decode

    def decode_bytes(self, ids):
        """The bytes of a list or array of ids; ValueError for an unknown one."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        try:
            numbers = np.frombuffer(array("I", ids), "u4")  # three times as fast as np.array(ids)
            return b"".join([b"".join(self._bytes.take(numbers[i : i + 8192]).tolist())
                             for i in range(0, len(ids), 8192)])
        except (OverflowError, IndexError, TypeError):
            bad = next(i for i in ids if not hasattr(i, "__index__") or i not in self.vocab)
            raise ValueError(f"id {bad} is not in the vocabulary of {len(self.vocab)} tokens: "
                             "were these ids made by another tokenizer?") from None

    def decode(self, ids):
        """The text of a sequence of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self, ids):
        """Yield text as ids arrive, holding back a character until all its bytes are there."""
        pieces = (self.decode_bytes([int(i)]) for i in ids)
        return codecs.iterdecode(pieces, "utf-8", errors="replace")

    def apply_chat_template(self, messages, add_generation_prompt=False):
        """The text of a conversation [{"role", "content"}, ...], in ChatML or Llama 3's form.

        Llama 3's if the vocabulary has its <|start_header_id|>. A content that holds a special
        token would forge a turn: ValueError.
        """
        begin, end = "<|im_start|>{}\n", "<|im_end|>\n"
        if "<|start_header_id|>" in self.special_tokens:
            begin, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
        text = "<|begin_of_text|>" if "<|begin_of_text|>" in self.special_tokens else ""
        for message in messages:
            for token in self.special_tokens:
                if token in message["content"] or token in message["role"]:
                    raise ValueError(f"a message holds the special token {token}: take it out")
            text += begin.format(message["role"]) + message["content"] + end
        return text + begin.format("assistant") * add_generation_prompt

    def save(self, path):
        """Write tokenizer.json of Hugging Face tokenizers: a file, or into a directory; -> path.

        In a directory, tokenizer_config.json beside it keeps transformers from splitting words as
        the model's family does (Qwen 2's way for a model saved as Qwen 3).
        """
        if not str(path).endswith(".json"):
            os.makedirs(path, exist_ok=True)
            write_json(os.path.join(path, "tokenizer_config.json"), {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": EOT if self.eot_id is not None else None})
            path = os.path.join(path, "tokenizer.json")
        write_json(path, to_json(self))
        return path

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json (or the directory of one), a vocab.json beside its merges.txt, or
        a .tiktoken file (whose pattern is taken for cl100k's)."""
        path = os.fspath(path)
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        try:
            if path.endswith(".tiktoken"):
                return from_tiktoken(path)
            if path.endswith("vocab.json"):
                return cls.from_files(path, path.removesuffix("vocab.json") + "merges.txt")
            with open(path, encoding="utf-8") as file:
                return from_json(json.load(file))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}: no byte-level BPE tokenizer can be read from it "
                             f"({error!s:.200})") from None

    @classmethod
    def from_files(cls, vocab_path, merges_path, special_tokens=None):
        """Read GPT-2's vocab.json and merges.txt; its special token is <|endoftext|>."""
        with open(vocab_path, encoding="utf-8") as file:
            vocab = {i: text_to_bytes(token) for token, i in json.load(file).items()}
        with open(merges_path, encoding="utf-8") as file:
            lines = [line.split() for line in file if not line.startswith("#version")]
        merges = [tuple(map(text_to_bytes, line)) for line in lines if len(line) == 2]
        if special_tokens is None:
            special_tokens = [EOT] if EOT.encode() in vocab.values() else []
        return cls(vocab, merges, special_tokens)


# ---- Formats ------------------------------------------------------------------------------------


# GPT-2's way to write bytes in JSON: printable ones as themselves, others from U+0100 on.
_OTHERS = [byte for byte in range(256) if not (33 <= byte < 127 or byte >= 161 and byte != 173)]
BYTE_TO_CHAR = {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
CHAR_TO_BYTE = {256 + i: chr(byte) for i, byte in enumerate(_OTHERS)}


def bytes_to_text(token):
    return token.decode("latin-1").translate(BYTE_TO_CHAR)


def text_to_bytes(text):
    try:
        return text.translate(CHAR_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()  # a special token is written as it is


def to_json(tokenizer):
    """The tokenizer as the dict of a tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated",
             "invert": False}
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True}
             for token, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])]
    vocab = {bytes_to_text(token): i for token, i in tokenizer.token_ids.items()}
    vocab.update(tokenizer.special_tokens)
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": tokenizer.normalizer} if tokenizer.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            split, {**byte_level, "use_regex": False}]},
        "post_processor": None, "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": tokenizer.ignore_merges,
                  "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
                  "merges": [[bytes_to_text(a), bytes_to_text(b)] for a, b in tokenizer.merges]}}


def from_json(data):
    """The Tokenizer of the dict of a tokenizer.json.

    ValueError for what it may ask for, would change ids, and is not known here.
    """
    model, added = data["model"], data.get("added_tokens", [])
    before = data.get("pre_tokenizer") or {}
    *splits, byte_level = before.get("pretokenizers", [before])
    normalizer, pattern = (data.get("normalizer") or {}).get("type"), GPT2_PATTERN
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ValueError(f"a {model.get('type')} tokenizer; only byte-level BPE can be read")
    if byte_level.get("type") != "ByteLevel":
        raise ValueError("a BPE tokenizer, but not a byte-level one")
    unknown = [name for name in ("continuing_subword_prefix", "end_of_word_suffix")
               if model.get(name)]
    unknown += ["add_prefix_space"] * byte_level.get("add_prefix_space", True)
    if splits == [{"type": "Digits", "individual_digits": True}]:
        splits, pattern = [], SMOLLM_PATTERN
    for step in splits:  # unmatched text is a word too, or what is matched is all that is kept
        pattern = step.get("pattern", {}).get("Regex")
        if pattern is None or (step["behavior"], step["invert"]) not in (
                ("Isolated", False), ("Isolated", True), ("Removed", True)):
            unknown.append(f"pre_tokenizer {step['type']}")
    if len(splits) > 1 or byte_level.get("use_regex", True) != (not splits):
        unknown.append("words cut by other than one pattern")
    if normalizer not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        unknown.append(f"normalizer {normalizer}")
    unknown += [f"{flag} of {token['content']}" for token in added
                for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
    if unknown:
        raise ValueError("not known here: " + ", ".join(unknown))
    special = {token["content"]: token["id"] for token in added}
    vocab = {i: text_to_bytes(token) for token, i in model["vocab"].items() if token not in special}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [tuple(map(text_to_bytes, merge)) for merge in merges]
    return Tokenizer(vocab, merges, special, pattern, normalizer=normalizer,
                     ignore_merges=bool(model.get("ignore_merges")))


def from_tiktoken(path):
    """The Tokenizer of a .tiktoken file: a line "base64 of the token, rank" each.

    The merge of a token is what BPE with the merges before it leaves of it: two parts.
    """
    with open(path, "rb") as file:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file)}
    merges = {}
    for token in sorted(ranks, key=ranks.get):
        parts = merge_word(token, merges)
        if len(parts) == 2:
            merges[tuple(parts)] = len(merges)
    vocab = {i: token for token, i in ranks.items()}
    return Tokenizer(vocab, merges, None, CL100K_PATTERN, ignore_merges=True)


# ---- Command line -------------------------------------------------------------------------------


def run_train(args):
    vocab, merges = train_bpe(list_files(args.data), args.vocab_size, args.special_tokens,
                              pattern=PATTERNS.get(args.pattern, args.pattern),
                              num_processes=args.processes)
    path = Tokenizer(vocab, merges, args.special_tokens, args.pattern).save(args.out)
    short = " (no pair was left to merge)" if len(vocab) < args.vocab_size else ""
    print(f"{len(vocab)} tokens{short} written to {path}")


def run_encode(args):
    count = Tokenizer.load(args.tokenizer).encode_file(args.data, args.out, args.processes)
    print(f"{count} tokens written to {args.out}")


def run_decode(args):
    tokenizer = Tokenizer.load(args.tokenizer)
    try:
        ids = np.load(args.tokens, mmap_mode="r") if args.tokens.endswith(".npy") else np.array(
            args.tokens.split(","), np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"it holds {ids.dtype} of shape {ids.shape}")
    except (ValueError, EOFError, OverflowError) as error:
        raise ValueError(f"{args.tokens}: neither .npy nor ids like 5,9,12 ({error})") from None
    sys.stdout.writelines(tokenizer.decode_stream(ids))


def script_of(line):
    """The script of most of a line's letters, as Unicode's names begin: "LATIN", "CJK", ..."""
    names = collections.Counter(unicodedata.name(c, "?").split()[0] for c in line if c.isalpha())
    return names.most_common(1)[0][0] if names else "no letters"


def run_inspect(args):
    """Longest tokens, compression beside another tokenizer, by script, and tokens never used."""
    ours = Tokenizer.load(args.tokenizer)
    others = {"ours": ours, **{path: Tokenizer.load(path) for path in args.beside}}
    longest = sorted(ours.token_ids, key=len, reverse=True)[:10]
    print(f"{len(ours.vocab)} tokens, the longest:",
          *(repr(token.decode(errors="replace")) for token in longest))
    used, sizes = collections.Counter(), collections.defaultdict(collections.Counter)  # by script
    for text in read_documents(args.data):
        used.update(ours.encode(text, ()))
        for line in text.splitlines(keepends=True):
            size = {name: len(tokenizer.encode(line, ())) for name, tokenizer in others.items()}
            sizes[script_of(line)].update(size, bytes=len(line.encode()), words=len(line.split()))
    for script, size in sorted(sizes.items(), key=lambda item: -item[1]["bytes"]):
        print(f"{script:12}{size['bytes']:>12} bytes", *(
            f"| {name}: {size['bytes'] / size[name]:.2f} bytes a token, "
            f"{size[name] / max(1, size['words']):.2f} tokens a word" for name in others))
    unused = [token for token, i in ours.token_ids.items() if i not in used]
    print(f"never used: {len(unused)} tokens, as", *unused[-10:])


def run_bench(args):
    """Rows of RESULTS.md: ours beside tiktoken, tokenizers and rustbpe, whichever is installed."""
    for path in list_files(args.data):
        text, times = "".join(read_documents([path])), collections.defaultdict(list)
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "out.npy")
            jobs = bench_jobs(text, args.vocab_size, args.processes, path, out)
            for key, job in [*jobs.items()] * args.repeats:  # in turns: noise hits all alike
                begin = time.perf_counter()
                job()
                times[key].append(time.perf_counter() - begin)
        for work, who in jobs:
            size = len((text[:1_000_000] if "100" in work else text).encode()) / 1e6
            ours, median = (statistics.median(times[work, name]) for name in ("ours", who))
            print(f"| {work} | {os.path.basename(path)} | {who} | {size / median:.1f} MB/s | "
                  f"ours is {median / ours:.2f} x |", flush=True)


def bench_jobs(text, vocab_size, processes, file, out):
    """{(work, who): function} of the work both we and the installed libraries do."""
    ours = Tokenizer(*train_bpe([text[:2_000_000]], vocab_size, [EOT], num_processes=1), [EOT])
    warm = Tokenizer(ours.vocab, ours.merges, [EOT])  # its cache is never emptied
    pieces = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
    short, ids = [text[i : i + 100] for i in range(0, 1_000_000, 100)], warm.encode(text)
    warm.encode_batch(short)
    work = f"encode_file, {processes} processes"
    jobs = {
        ("train", "ours"): lambda: train_bpe([text], vocab_size, num_processes=processes),
        ("encode to numpy", "ours"): lambda: (ours.reset_cache(), ours.encode_numpy(text)),
        ("encode to list", "ours"): lambda: (ours.reset_cache(), ours.encode(text)),
        (work, "ours"): lambda: (ours.reset_cache(), ours.encode_file(file, out, processes)),
        ("encode 100 characters", "ours"): lambda: warm.encode_batch(short),
        ("decode", "ours"): lambda: ours.decode(ids)}
    with contextlib.suppress(ImportError):
        import rustbpe

        jobs["train", "rustbpe"] = lambda: rustbpe.Tokenizer().train_from_iterator(
            iter(pieces), vocab_size, pattern=GPT2_PATTERN)
    with contextlib.suppress(ImportError):
        import tiktoken

        # the form in which tiktoken writes GPT-2's pattern: same words, faster
        fast = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        tik = tiktoken.Encoding("ours", pat_str=fast, mergeable_ranks=ours.token_ids,
                                special_tokens=ours.special_tokens)
        jobs["encode to numpy", "tiktoken"] = lambda: tik.encode_to_numpy(text)
        jobs["encode to list", "tiktoken"] = lambda: tik.encode_ordinary(text)
        jobs[work, "tiktoken"] = lambda: tik.encode_ordinary_batch(pieces, num_threads=processes)
        jobs["encode 100 characters", "tiktoken"] = lambda: list(map(tik.encode_ordinary, short))
        jobs["decode", "tiktoken"] = lambda: tik.decode(ids)
    with contextlib.suppress(ImportError):
        import tokenizers

        fresh = json.dumps(to_json(ours))
        learner = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
        jobs["train", "tokenizers"] = lambda: tokenizers.Tokenizer.from_str(
            fresh).train_from_iterator(pieces, learner)
        theirs = tokenizers.Tokenizer.from_str(fresh)
        jobs["encode to list", "tokenizers"] = lambda: theirs.encode_batch_fast(pieces)
    return jobs


FLAGS = {
    "data": {"nargs": "+", "help": "files, directories, globs of text"},
    "tokens": {"help": ".npy file of ids, or ids: 5,9,12"},
    "--tokenizer": {"default": "tokenizer", "help": "tokenizer.json or its directory; .tiktoken"},
    "--processes": {"type": int, "help": "worker processes (None: one a core)"},
    "--vocab-size": {"type": int, "default": 32000, "help": "tokens in all"},
    "--special-tokens": {"nargs": "*", "default": [EOT], "help": "texts kept whole"},
    "--pattern": {"default": "gpt2", "help": f"{', '.join(PATTERNS)} or a regular expression"},
    "--out": {"default": "tokenizer", "help": "directory for tokenizer.json; file for the ids"},
    "--beside": {"action": "append", "default": [], "help": "another to compare, as GPT-2's"},
    "--repeats": {"type": int, "default": 3, "help": "runs a row; their median is printed"}}
COMMANDS = {
    run_train: ("learn a vocabulary from text",
                "data --vocab-size --special-tokens --pattern --processes --out"),
    run_encode: ("turn text into a file of token ids", "data --tokenizer --processes --out"),
    run_decode: ("turn token ids into text", "tokens --tokenizer"),
    run_inspect: ("print what a tokenizer does to texts", "data --tokenizer --beside"),
    run_bench: ("time this file beside tiktoken, tokenizers and rustbpe",
                "data --vocab-size --processes --repeats")}


def main(argv=None):
    """Run a command; 0, or 2 and one line on stderr for a user's mistake, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for run, (what, flags) in COMMANDS.items():
        command = commands.add_parser(run.__name__[4:], help=what, description=what,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        for flag in flags.split():
            command.add_argument(flag, **FLAGS[flag])
    commands.choices["encode"].set_defaults(out="tokens.npy")
    commands.choices["bench"].set_defaults(processes=1, vocab_size=10000)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, regex.error) as error:
        flag = "--pattern: " if isinstance(error, regex.error) else ""
        print(f"tokenizer.py {args.command}: {flag}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
