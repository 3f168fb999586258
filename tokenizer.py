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
import contextlib
import glob as globbing
import gzip
import hashlib
import heapq
import json
import multiprocessing
import os
import statistics
import sys
import time
import unicodedata
from functools import lru_cache, partial
from itertools import chain, islice

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
PATTERNS = {"gpt2": GPT2_PATTERN, "cl100k": CL100K_PATTERN, "o200k": O200K_PATTERN,
            "llama3": LLAMA3_PATTERN, "qwen2": QWEN2_PATTERN}

# ---- The plain tokenizer ------------------------------------------------------------------------


def split_special(text, special_tokens):
    """Cut text at the special tokens, longest first where they overlap; the tokens are kept.

    >>> split_special("a<|endoftext|>b", ["<|endoftext|>"])
    ['a', '<|endoftext|>', 'b']
    """
    if not special_tokens:
        return [text]
    return [part for part in special_pattern(special_tokens).split(text) if part]


def special_pattern(special_tokens):
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")


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
        for part in split_special(text, special_tokens):
            if part not in special_tokens:
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


def encode_plain(tokenizer, text):
    """What `Tokenizer.encode` computes, one word at a time."""
    ids = []
    for part in split_special(text, tokenizer.special_tokens):
        if part in tokenizer.special_tokens:
            ids.append(tokenizer.special_tokens[part])
            continue
        for word in regex.findall(tokenizer.pattern, tokenizer.normalize(part)):
            tokens = merge_word(word.encode(), tokenizer.ranks)
            if tokenizer.ignore_merges and word.encode() in tokenizer.token_ids:
                tokens = [word.encode()]
            ids += [tokenizer.token_ids[token] for token in tokens]
    return ids


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


def classify(text, raw):
    """(bytes,) uint8: the class of the character that each byte of the text belongs to."""
    classes = class_table()[:256].take(raw)
    if not text.isascii():
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        points = points[points >= 0x80]
        width = 2 + (points >= 0x800) + (points >= 0x10000)  # bytes of the character in UTF-8
        classes[raw >= 0x80] = np.repeat(class_table()[points], width)
    return classes


def gpt2_starts(raw, classes, inside):
    """(bytes,) bool: where GPT2_PATTERN starts a word.

    raw, classes: (bytes,) uint8. inside: (bytes,) bool, not the first byte of its character.
    """
    around = np.pad(classes, 1, constant_values=EDGE)
    start = classes != around[:-2]
    start[1:] &= raw[:-1] != ord(" ")  # " ?": a blank belongs to the word behind it, and so
    start |= (classes == SPACE) & (around[2:] < SPACE)  # \s+(?!\S) leaves the last space alone
    last = np.flatnonzero(start & inside)  # a space of several bytes was marked at its last one
    while last.size:
        start[last] = False
        last = last - 1
        start[last] = True
        last = last[inside[last]]
    split_contractions(raw, start)
    return start


def split_contractions(raw, start):
    """'s 't 'd 'm 'll 've 're behind a word: no word starts after the quote, one after the rest."""
    quote = np.flatnonzero(start & (raw == ord("'")))
    one, two = np.pad(raw, (0, 2))[quote + [[1], [2]]].astype(np.int64)  # bytes behind each quote
    single = np.isin(one, list(b"sdmt"))
    double = np.isin(one * 256 + two, [ord(a) * 256 + ord(b) for a, b in ("ll", "ve", "re")])
    quote, end = quote[single | double], (quote + 3 - single)[single | double]
    start[quote + 1] = False
    start[end[end < len(start)]] = True


def regex_starts(parts, pattern, inside):
    """(bytes,) bool: where any other pattern starts a word, found by the regex module."""
    lengths = []
    for text, special in parts:
        found = [len(text)] if special is not None else list(map(len, regex.findall(pattern, text)))
        if sum(found) != len(text):
            raise ValueError(r"--pattern does not match every character: append |[\s\S] to it")
        lengths += found
    start = np.zeros(len(inside), bool)
    start[np.flatnonzero(~inside)[np.cumsum(lengths) - lengths]] = True
    return start


def find_words(parts, pattern):
    """Cut a chunk into words. -> (data, starts, lengths, special)

    parts: [(text, special id or None)], as `split_text` makes them. data: bytes. starts, lengths:
    (words,) int64. special: (words,) bool.
    """
    text = "".join(part for part, _ in parts)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds {text[error.start]!r}, half a surrogate pair: no valid "
                         "Unicode; read the file with errors='replace'") from None
    raw = np.frombuffer(data, np.uint8)
    inside = (raw & 0xC0) == 0x80
    edges = []  # bytes from, to of the special tokens
    if any(i is not None for _, i in parts):
        sizes = [len(part.encode()) for part, _ in parts]
        edges = [(end - size, end) for size, end, (_, i) in
                 zip(sizes, np.cumsum(sizes).tolist(), parts) if i is not None]
    if pattern == GPT2_PATTERN:
        classes = classify(text, raw)
        raw = raw.copy() if edges else raw
        for begin, end in edges:
            classes[begin:end], raw[begin:end] = EDGE, 0
        start = gpt2_starts(raw, classes, inside)
    else:
        start = regex_starts(parts, pattern, inside)
    for begin, end in edges:
        start[begin:end] = False
        start[begin] = True
        start[end : end + 1] = True
    starts = np.flatnonzero(start)
    special = np.zeros(len(starts), bool)
    special[np.searchsorted(starts, [begin for begin, _ in edges])] = True
    return data, starts, np.diff(starts, append=len(data)), special


# ---- Numbering distinct words -------------------------------------------------------------------


class KeyTable:
    """Numbers pairs of 64-bit integers 0, 1, 2, ... as they appear; looks up whole arrays at once.

    Open addressing with linear probing: `slots` holds numbers, `keys` the pair of each number. An
    entry is only found if both integers are equal, so no answer ever rests on a hash.
    """

    def __init__(self):
        self.size = 0
        self.keys = np.zeros((2, 1 << 12), np.uint64)
        self.slots = np.full(1 << 14, -1, np.int32)

    def find(self, first, second, insert=False):
        """(n,) int64 numbers of n keys; an unknown one is -1, or gets a new number if `insert`."""
        if insert and self.size + len(first) > self.keys.shape[1]:
            self._grow(self.size + len(first))
        slot = self._slot(first, second)
        number = self.slots[slot].astype(np.int64)
        todo = np.flatnonzero(~self._same(number, first, second))
        slot, first, second = slot[todo], first[todo], second[todo]
        while todo.size:
            if insert:
                self._claim(slot, first, second)
            here = self.slots[slot]
            found = self._same(here, first, second)
            number[todo] = here  # -1 at an empty slot
            more = np.flatnonzero(~found & (here >= 0))  # somebody else's slot: try the next one
            todo, first, second = todo[more], first[more], second[more]
            slot = (slot[more] + 1) & (len(self.slots) - 1)
        return number

    def _slot(self, first, second):
        mixed = first * np.uint64(0x9E3779B97F4A7C15) ^ second * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)  # the best mixed bits are the highest ones
        return (mixed >> np.uint64(65 - len(self.slots).bit_length())).astype(np.int64)

    def _same(self, number, first, second):
        return (number >= 0) & (self.keys[0][number] == first) & (self.keys[1][number] == second)

    def _claim(self, slot, first, second):
        """Give the empty slots to new keys. Many may want one: all write, the last one stays."""
        free = np.flatnonzero(self.slots[slot] < 0)
        self.slots[slot[free]] = free
        won = free[self.slots[slot[free]] == free]
        end = self.size + len(won)
        self.slots[slot[won]] = np.arange(self.size, end)
        self.keys[:, self.size : end] = first[won], second[won]
        self.size = end

    def _grow(self, needed):
        size, keys = self.size, self.keys
        capacity = 1 << int(needed - 1).bit_length()
        self.keys = np.zeros((2, capacity), np.uint64)
        self.slots = np.full(4 * capacity, -1, np.int32)
        self.keys[:, :size] = keys[:, :size]
        number, slot = np.arange(size, dtype=np.int32), self._slot(*keys[:, :size])
        while number.size:
            free = self.slots[slot] < 0
            self.slots[slot[free]] = number[free]
            lost = self.slots[slot] != number
            number, slot = number[lost], (slot[lost] + 1) & (len(self.slots) - 1)


class WordTable:
    """Numbers distinct words 0, 1, 2, ... and keeps their bytes.

    A word of up to 15 bytes and its length are exactly two 64-bit integers, the key of a KeyTable;
    a longer word is numbered by a dict first, and that number is its key.
    """

    def __init__(self):
        self.table, self.long = KeyTable(), {}
        self.data, self.lengths = [], []
        byte = np.arange(16) < np.arange(16)[:, None]  # (length, byte): which bytes count
        self.low, self.high = (byte * np.uint8(255)).view("<u8").T.copy()

    def __len__(self):
        return self.table.size

    def add(self, data, starts, lengths):
        """(n,) int64 numbers of the words at `starts` of the bytes `data`."""
        raw = np.frombuffer(data + bytes(16), np.uint8)
        eight = np.ndarray(len(raw) - 7, "<u8", raw, strides=(1,)).copy()  # read at every byte
        short = np.minimum(lengths, 15)
        first = eight[starts] & self.low[short]
        second = eight[starts + 8] & self.high[short] | short.astype(np.uint64) << np.uint64(56)
        for i in np.flatnonzero(lengths > 15).tolist():
            word = data[starts[i] : starts[i] + lengths[i]]
            first[i], second[i] = self.long.setdefault(word, len(self.long)), LONG
        known = len(self)
        number = self.table.find(first, second, insert=True)
        new = np.flatnonzero(number >= known)[::-1]
        where = np.empty(len(self) - known, np.int64)
        where[number[new] - known] = new  # backwards, so the first occurrence stays
        self.data.append(raw[ranges(starts[where], lengths[where])])
        self.lengths.append(lengths[where])
        return number

    def take_new(self):
        """The words added since the last call: (data (bytes,) uint8, lengths (n,) int64)."""
        data, lengths = np.concatenate(self.data), np.concatenate(self.lengths)
        self.data, self.lengths = [], []
        return data, lengths


LONG = np.uint64(255) << np.uint64(56)  # second half of the key of a word of more than 15 bytes


def ranges(starts, lengths):
    """Places starts[0], starts[0] + 1, ..., starts[1], ...: `lengths` of them from each start.

    >>> ranges(np.array([5, 9]), np.array([2, 3]))
    array([ 5,  6,  9, 10, 11])
    """
    ends = np.cumsum(lengths)
    return np.repeat(starts + lengths - ends, lengths) + np.arange(ends[-1] if len(ends) else 0)


# ---- Merging a pair everywhere at once ----------------------------------------------------------


class Tape:
    """Many words in one array of ids, a boundary of -1 around each.

    A token of n bytes covers n places and writes its id on the first and on the last of them. So
    the token left of a place is read at place - 1, the next token starts n further on, and nothing
    ever has to move.
    """

    def __init__(self, ids, lengths, sizes, counts=None):
        """ids: (bytes,) of the words in a row. lengths, counts: (words,). sizes: (V,) bytes of
        each token, shared with the caller, who makes the tokens."""
        place = np.arange(1, len(ids) + 1) + np.repeat(np.arange(len(lengths)), lengths)
        self.ids = np.full(len(ids) + len(lengths) + 1, -1)
        self.ids[place] = ids
        self.is_start = self.ids >= 0
        self.sizes = sizes
        self.weight = np.ones(len(self.ids), np.int64)  # how often the word of a place occurs
        if counts is not None:
            self.weight[place] = np.repeat(counts, lengths)

    def pairs(self):
        """All pairs of neighbours: (keys left << 32 | right, places)."""
        at = np.flatnonzero(self.is_start)
        left = self.ids[at]
        right = self.ids[at + self.sizes[left]]
        return (left << 32 | right)[right >= 0], at[right >= 0]

    def places(self, left, right, at):
        """Those of the places `at` where the pair still stands."""
        return at[(self.ids[at] == left) & (self.ids[at + self.sizes[left]] == right)]

    def merge(self, left, right, at, new):
        """Merge a pair. -> keys and places of the pairs the new token makes, as from `pairs`."""
        if left == right:
            at = every_other(np.sort(at), self.sizes[left])
        middle, end = at + self.sizes[left], at + self.sizes[new]
        self.is_start[middle] = False
        self.ids[middle] = -2  # no token starts here now; a short one also ends here:
        self.ids[at] = self.ids[end - 1] = new
        before, after = self.ids[at - 1], self.ids[end]
        after[after == new] = -1  # counted as this one's `before`
        keys = np.concatenate((before << 32 | new, after + (new << 32)))
        keys[len(at):][after < 0] = -1
        return keys, np.concatenate((at - self.sizes[before], at))


def every_other(at, size):
    """Of the overlapping places in "aaaa" keep the first, third, ...: merges go left to right."""
    index = np.arange(len(at))
    row = np.maximum.accumulate(np.where(np.diff(at, prepend=-size - 1) == size, 0, index))
    return at[(index - row) % 2 == 0]


def group(keys, at, weight):
    """Sort places by key. -> (distinct keys, places, first place of each key, weight of each)"""
    order = keys.argsort()
    keys, at = keys[order], at[order]
    first = np.concatenate(([0], (keys[1:] != keys[:-1]).nonzero()[0] + 1))
    return keys[first], at, first, np.add.reduceat(weight[at], first)


# ---- Training -----------------------------------------------------------------------------------


def learn_merges(data, lengths, counts, number):
    """The `number` most frequent merges of words that occur `counts` times, as pairs of bytes.

    A heap holds the frequent pairs. Counts only ever fall: all pairs with a new token appear when
    the token does, later merges can but take some away. So a heap entry is an upper bound; recount
    when it comes up, and put it back if it was too high. Pairs rarer than `floor` are left out
    until no others remain: most never come up.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    # A heap pops the smallest, ties go to the greatest bytes: turn byte b into character 255 - b,
    # and end with one greater than all to have "ab" before "a".
    reverse = [chr(255 - byte) + chr(256) for byte in range(256)]
    sizes = np.ones(256 + number + 2, np.int64)
    tape, merges, heap, floor = Tape(data, lengths, sizes, counts), [], [], 1 << 62

    def push(keys, at, first, count):
        ends = np.append(first[1:], len(at))
        often = (count >= floor).nonzero()[0]
        for key, n, begin, end in zip(keys[often].tolist(), count[often].tolist(),
                                      first[often].tolist(), ends[often].tolist()):
            if key >= 0:
                where[key] = at[begin:end]
                heapq.heappush(heap, (-n, reverse[key >> 32], reverse[key & 0xFFFFFFFF], key))

    while len(merges) < number:
        if not heap:
            keys, at = tape.pairs()
            if floor == 1 or not len(keys):
                break
            where, grouped = {}, group(keys, at, tape.weight)
            floor = max(1, min(floor, int(grouped[3].max())) // 6)
            push(*grouped)
            continue
        bound, *tie, key = heapq.heappop(heap)
        left, right, new = key >> 32, key & 0xFFFFFFFF, len(tokens)
        at = tape.places(left, right, where.pop(key))
        count = int(tape.weight[at].sum())
        if count < -bound:
            if count >= floor:
                where[key] = at
                heapq.heappush(heap, (-count, *tie, key))
            continue
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
        reverse.append(reverse[left][:-1] + reverse[right])
        sizes[new] = len(tokens[new])
        push(*group(*tape.merge(left, right, at, new), tape.weight))
    return merges


def count_words(batch, pattern):
    """Distinct words of a batch of chunks: (data (bytes,) uint8, lengths (n,), counts (n,))."""
    table, counts = WordTable(), np.zeros(0, np.int64)
    for parts in batch:
        data, starts, lengths, special = find_words(parts, pattern)
        number = table.add(data, starts[~special], lengths[~special])
        new = np.bincount(number, minlength=len(table))
        new[: len(counts)] += counts
        counts = new
    return *table.take_new(), counts


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
    table, counts = WordTable(), np.zeros(0, np.int64)
    stream = split_documents(read_input(input_path), dict.fromkeys(special_tokens, 0), pattern, 0)
    for data, lengths, count in parallel_map(partial(count_words, pattern=pattern),
                                             batches(stream), num_processes):
        number = table.add(data.tobytes(), np.cumsum(lengths) - lengths, lengths)
        counts = np.append(counts, np.zeros(len(table) - len(counts), np.int64))
        counts[number] += count
    if not len(table):
        return build_vocab(special_tokens, []), []
    merges = learn_merges(*table.take_new(), counts, vocab_size - 256 - len(special_tokens))
    return build_vocab(special_tokens, merges), merges


def parallel_map(function, items, processes):
    """Yield function(item) in order, at most two items a process ahead, so memory stays bounded."""
    items = iter(items)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    processes = processes or len(cores)
    head = list(islice(items, 2))
    if processes == 1 or len(head) < 2:  # not worth a process
        yield from map(function, head)
        yield from map(function, items)
        return
    with multiprocessing.Pool(processes) as pool:
        waiting = collections.deque(pool.apply_async(function, (item,)) for item in head)
        for item in items:
            waiting.append(pool.apply_async(function, (item,)))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


# ---- Text in ------------------------------------------------------------------------------------

CHUNK = 1 << 18  # characters handled by one round of array operations: they fit in the L2 cache
CUT = regex.compile(r"(?<=\S) ")  # all named patterns start a word here, whatever is around
LAST_CUT = regex.compile(r"(?r)(?<=\S) ")  # the same, searched from the end


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


def read_pieces(path):
    """Yield a file in pieces of about a million characters, and None where a document ends.

    Invalid UTF-8 is replaced by U+FFFD and counted, line ends stay as they are.
    """
    opener = gzip.open if path.endswith(".gz") else open
    broken, rest = 0, ""
    with opener(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        if path.removesuffix(".gz").endswith(".jsonl"):
            yield from read_jsonl(path, file)
            return
        while block := file.read(1 << 20):
            if "\0" in block:
                raise ValueError(f"{path}: has a NUL byte, so it is no text; leave it out")
            broken += block.count("\ufffd")
            *documents, rest = (rest + block).split(EOT)
            for document in documents:
                yield from (document, None)
            keep = max(0, len(rest) - len(EOT))  # EOT may lie across two blocks
            yield rest[:keep]
            rest = rest[keep:]
        yield from (rest, None)
    if broken:
        print(f"{path}: {broken} invalid characters read as U+FFFD", file=sys.stderr)


def read_jsonl(path, lines):
    """Yield the "text" of every line, and None behind it; count the lines without."""
    bad = 0
    for line in lines:
        try:
            yield from (json.loads(line)["text"] + "", None)
        except (ValueError, KeyError, TypeError):
            bad += bool(line.strip())
    if bad:
        print(f'{path}: skipped {bad} lines without a "text"', file=sys.stderr)


def read_documents(files):
    """Yield the documents of the files: split at <|endoftext|>, one a line of .jsonl."""
    parts = []
    for path in list_files(files):
        for text in read_pieces(path):
            if text is not None:
                parts.append(text)
                continue
            if document := "".join(parts):
                yield document
            parts = []


def read_input(source):
    """Pieces as of `read_pieces`, of files or of an iterable of texts."""
    paths = isinstance(source, (str, os.PathLike))
    if not paths and isinstance(source, (list, tuple)) and source:
        paths = isinstance(source[0], os.PathLike) or os.path.exists(source[0][:4096])
    if not paths:
        return (piece for text in source for piece in (text, None))
    return (piece for path in list_files(source) for piece in read_pieces(path))


def split_text(texts, special_ids, pattern):
    """Cut joined texts at special tokens and, for length, where a word surely starts.

    Yields (part, id of the special token or None). Texts may end anywhere, within a special token
    too: what could still change is held back.
    """
    longest = max(map(len, special_ids), default=1)
    size = CHUNK if pattern in PATTERNS.values() else 1 << 62  # unknown patterns: no cut is sure
    splitter = special_pattern(special_ids) if special_ids else None
    rest, limit = "", size
    for text in texts:
        rest += text
        if len(rest) < limit + longest:
            continue
        *parts, tail = splitter.split(rest) if splitter else [rest]
        cut = LAST_CUT.search(tail, 0, max(0, len(tail) - longest))
        if not cut:
            limit = 2 * len(rest)
            continue
        yield from split_parts([*parts, tail[: cut.start()]], special_ids, size)
        rest, limit = tail[cut.start() :], size
    yield from split_parts(splitter.split(rest) if splitter else [rest], special_ids, size)


def split_parts(parts, special_ids, size):
    """parts: text, special token, text, special token, ..., text."""
    for i, part in enumerate(parts):
        begin = 0
        while i % 2 == 0 and len(part) - begin > size and (cut := CUT.search(part, begin + size)):
            yield part[begin : cut.start()], None
            begin = cut.start()
        if begin < len(part):
            yield part[begin:], special_ids[part] if i % 2 else None


def split_documents(pieces, special_ids, pattern, separator_id):
    """`split_text` of every document of `read_pieces`, and (EOT, separator_id) behind it."""
    pieces = iter(pieces)
    for first in pieces:
        if first:
            document = chain([first], iter(partial(next, pieces), None))
            yield from split_text(document, special_ids, pattern)
            yield EOT, separator_id


def batches(parts, chunks=64):
    """Lists of up to `chunks` chunks, lists of parts that hold about CHUNK characters."""
    batch, chunk, size = [], [], 0
    for part in parts:
        chunk.append(part)
        size += len(part[0])
        if size >= CHUNK:
            batch.append(chunk)
            chunk, size = [], 0
            if len(batch) == chunks:
                yield batch
                batch = []
    if chunk:
        batch.append(chunk)
    if batch:
        yield batch


def write_header(file, dtype, length):
    """The first 128 bytes of a .npy file of one dimension."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)})


# ---- The tokenizer ------------------------------------------------------------------------------


NO_MERGE = 1 << 24  # the rank of a pair that is never merged
MAX_WORDS = 1 << 19  # distinct words remembered
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
        self.special_tokens = self._number_special(special_tokens or ())
        special = set(self.special_tokens.values())
        self.token_ids = {token: i for i, token in self.vocab.items() if i not in special}
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.vocab_size = max(self.vocab) + 1
        self.eot_id = self.special_tokens.get(EOT)
        self.dtype = np.uint16 if self.vocab_size <= 65536 else np.uint32
        try:
            self._byte_ids = np.array([self.token_ids[bytes([b])] for b in range(256)], np.int32)
            merged = np.array([(self.token_ids[left], self.token_ids[right],
                                self.token_ids[left + right]) for left, right in self.ranks])
        except KeyError as error:
            raise ValueError(f"the vocabulary lacks {error.args[0]}, which byte-level BPE with "
                             "these merges needs") from None
        self._index_merges(merged.reshape(-1, 3).T)
        self._reset_cache()

    def _number_special(self, special_tokens):
        known = {token: i for i, token in self.vocab.items()}
        numbers = {}
        for token in special_tokens:
            i = special_tokens[token] if isinstance(special_tokens, dict) else known.get(
                token.encode(), max(self.vocab, default=-1) + 1)
            numbers[token], self.vocab[i] = i, token.encode()
        return numbers

    def normalize(self, text):
        return unicodedata.normalize(self.normalizer, text) if self.normalizer else text

    # -- BPE of all words that are new in a batch

    def _index_merges(self, merged):
        """merged: (3, merges) ids of left, right and joined token, by rank."""
        self._left, self._right, self._joined = merged.astype(np.int64)
        self._pairs = KeyTable()
        number = self._pairs.find(*merged[:2].astype(np.uint64), insert=True)
        self._rank = np.full(len(self._left) + 1, NO_MERGE, np.int32)  # the last one is for -1
        self._rank[number] = np.arange(len(number))
        self._sizes = np.ones(self.vocab_size + 2, np.int64)  # bytes; 1 for the marks -1 and -2
        ids = np.fromiter(self.vocab, np.int64)
        self._sizes[ids] = lengths = np.array([len(token) for token in self.vocab.values()])
        self._begin = np.full(self.vocab_size, -1)  # where the bytes of an id are; -1: no such id
        self._begin[ids] = np.cumsum(lengths) - lengths
        self._bytes = np.frombuffer(b"".join(self.vocab.values()), np.uint8)

    def _ranks(self, left, right):
        """int32 ranks of pairs of ids, NO_MERGE for pairs that never merge (a -1 is in none)."""
        keys = left.ravel().astype(np.uint64), right.ravel().astype(np.uint64)
        return self._rank[self._pairs.find(*keys)].reshape(left.shape)

    def _reset_cache(self):
        """Word n has the ids pool[offset[n] : offset[n] + count[n]]."""
        self._words = WordTable()
        self._offset, self._count = np.zeros((2, 0), np.int64)
        self._pool = np.zeros(0, self.dtype)
        self._short = {}  # str -> list of ids, for short texts

    def _learn_words(self):
        """Put the ids of words that are new in the word table into the pool."""
        data, lengths = self._words.take_new()
        if not len(lengths):
            return
        offset, count = np.zeros((2, len(lengths)), np.int64)
        starts, pools, size = np.cumsum(lengths) - lengths, [self._pool], len(self._pool)
        for low, high in ((0, 8), (8, 16), (16, 32), (32, 64), (64, len(data))):
            words = np.flatnonzero((lengths > low) & (lengths <= high))
            if len(words):
                bpe = self._merge_rounds if high <= 64 else self._merge_long
                raw = data[ranges(starts[words], lengths[words])]
                ids, count[words] = bpe(self._byte_ids[raw], lengths[words])
                offset[words] = size + np.cumsum(count[words]) - count[words]
                size += len(ids)
                pools.append(ids.astype(self.dtype))
        self._pool = np.concatenate(pools)
        for n in np.flatnonzero(count > 1) if self.ignore_merges else ():
            whole = self.token_ids.get(data[starts[n] : starts[n] + lengths[n]].tobytes())
            if whole is not None:
                self._pool[offset[n]], count[n] = whole, 1
        self._offset = np.append(self._offset, offset)
        self._count = np.append(self._count, count)

    def _merge_rounds(self, ids, lengths):
        """BPE of W words of at most 64 bytes: ids (bytes,), lengths (W,) -> ids, counts (W,).

        In every round each word merges its leftmost pair of lowest rank. rank * 64 + position is
        one integer, so a single minimum finds both.
        """
        rows = np.full((lengths.max() + 1, len(lengths)), -1, np.int32)  # (L + 1, W), -1 behind
        rows.T[np.arange(len(rows)) < lengths[:, None]] = ids
        row = np.arange(len(rows), dtype=np.int32)[:, None]  # (L + 1, 1)
        done, column = np.full_like(rows, -1), np.arange(len(lengths))
        key = np.full_like(rows, NO_MERGE * 64)  # (L + 1, W) of the pair that starts there
        key[:-1] = self._ranks(rows[:-1], rows[1:]) * 64 + row[:-1]
        while True:
            best = key.min(0)
            alive = best < NO_MERGE * 32
            if not alive.all():
                done[:, column[~alive]] = rows[:, ~alive]
                rows, key, best, column = rows[:, alive], key[:, alive], best[alive], column[alive]
            if not len(column):
                return done.T[done.T >= 0], (done >= 0).sum(0)
            at, new, word = best & 63, self._joined[best >> 6], np.arange(len(best))
            behind = row[:-1] > at
            rows[:-1] = np.where(behind, rows[1:], rows[:-1])  # close the gap
            key[:-1] = np.where(behind, key[1:] - 1, key[:-1])
            rows[at, word] = new
            key[at, word] = self._ranks(new, rows[at + 1, word]) * 64 + at
            at, word, new = at[at > 0] - 1, word[at > 0], new[at > 0]
            key[at, word] = self._ranks(rows[at, word], new) * 64 + at

    def _merge_long(self, ids, lengths):
        """BPE of long words, rank by rank on a Tape: ids (bytes,), lengths (W,) -> ids, counts.

        A pair with a new token always ranks behind the merge that made the token, so every rank
        comes up once, for all words together.
        """
        tape = Tape(ids, lengths, self._sizes)
        where, heap = {}, []

        def push(keys, at):
            rank = self._ranks(keys >> 32, keys & 0xFFFFFFFF)
            rank, at = rank[rank < NO_MERGE], at[rank < NO_MERGE]
            if len(rank):
                rank, at, first, _ = group(rank, at, tape.weight)
                for r, places in zip(rank.tolist(), np.split(at, first[1:])):
                    if r not in where:
                        heapq.heappush(heap, r)
                    where.setdefault(r, []).append(places)

        push(*tape.pairs())
        while heap:
            rank = heapq.heappop(heap)
            left, right = int(self._left[rank]), int(self._right[rank])
            at = tape.places(left, right, np.concatenate(where.pop(rank)))
            if len(at):
                push(*tape.merge(left, right, at, int(self._joined[rank])))
        words = np.cumsum(lengths + 1) - lengths  # first place of each
        return tape.ids[tape.is_start], np.add.reduceat(tape.is_start, words, dtype=np.int64)

    # -- encode

    def _allowed(self, allowed_special):
        every = allowed_special == "all"
        return {t: i for t, i in self.special_tokens.items() if every or t in allowed_special}

    def encode_numpy(self, text, allowed_special="all"):
        """Ids of a text: (tokens,) uint16, or uint32 for a vocabulary of more than 65,536 ids.

        allowed_special: the special tokens that count as such. Give () for text from users, in
        which "<|endoftext|>" should be nothing but these 13 characters.
        """
        parts = split_text([text], self._allowed(allowed_special), self.pattern)
        return self._join(map(self._encode_batch, batches(parts)))

    def _join(self, arrays):
        return np.concatenate([np.zeros(0, self.dtype), *arrays])

    def _encode_batch(self, batch):
        """Ids of a batch of chunks: number all words, learn the new ones, look up all ids."""
        if len(self._words) > MAX_WORDS:
            self._reset_cache()
        numbers = []
        for parts in batch:
            if self.normalizer:
                parts = [(t if i is not None else self.normalize(t), i) for t, i in parts]
            data, starts, lengths, special = find_words(parts, self.pattern)
            ids = np.array([i for _, i in parts if i is not None], self.dtype)
            numbers.append((self._words.add(data, starts, lengths), np.flatnonzero(special), ids))
        self._learn_words()
        return self._join([self._look_up(*chunk) for chunk in numbers])

    def _look_up(self, number, special, special_ids):
        """Ids of a chunk: word numbers (words,), which of them are special tokens, their ids."""
        count = self._count[number]
        count[special] = 1
        ids = self._pool[ranges(self._offset[number], count)]
        ids[np.cumsum(count)[special] - 1] = special_ids
        return ids

    def encode(self, text, allowed_special="all"):
        """List of the ids of a text; see `encode_numpy`."""
        if len(text) > SHORT or self.normalizer or any(t in text for t in self.special_tokens):
            return self.encode_numpy(text, allowed_special).tolist()
        ids, known = [], self._short
        for word in self._find(text):
            if word not in known:
                known[word] = self._encode_word(word)
            ids += known[word]
        if len(known) > MAX_WORDS:
            known.clear()
        return ids

    def _encode_word(self, word):
        if len(word) > 40:
            return self.encode_numpy(word, ()).tolist()
        word = word.encode()
        whole = self.ignore_merges and word in self.token_ids
        tokens = [word] if whole else merge_word(word, self.ranks)
        return [self.token_ids[token] for token in tokens]

    def encode_batch(self, texts, allowed_special="all"):
        """Lists of the ids of several texts."""
        return [self.encode(text, allowed_special) for text in texts]

    def encode_iterable(self, texts, allowed_special="all"):
        """Yield the ids of the joined texts, holding a few megabytes of them at a time."""
        parts = split_text(texts, self._allowed(allowed_special), self.pattern)
        for batch in batches(parts, chunks=4):
            yield from self._encode_batch(batch).tolist()

    def encode_file(self, path, out, num_processes=None):
        """Write the ids of files, EOT behind every document, to a .npy file; -> number of ids.

        Killed and called again, it goes on where it was.
        """
        files = list_files(path)
        if self.eot_id is None:
            raise ValueError(f"the tokenizer has no {EOT} to put behind documents: train it with "
                             f"--special-tokens '{EOT}'")
        job = [[file, os.path.getsize(file), os.path.getmtime(file)] for file in files]
        job = hashlib.sha256(json.dumps([job, to_json(self)]).encode()).hexdigest()
        part, note = f"{out}.part", f"{out}.state"
        state = {"job": job, "batches": 0, "ids": 0}
        if os.path.exists(part) and os.path.exists(note):
            with open(note) as file:
                old = json.load(file)
            state = old if old["job"] == job else state
        pieces = (piece for file in files for piece in read_pieces(file))
        todo = islice(batches(split_documents(pieces, {}, self.pattern, self.eot_id), 16),
                      state["batches"], None)
        with open(part, "r+b" if state["batches"] else "w+b") as file:
            write_header(file, self.dtype, 0)
            file.seek(state["ids"] * np.dtype(self.dtype).itemsize, os.SEEK_CUR)
            file.truncate()
            for ids in parallel_map(self._encode_batch, todo, num_processes):
                file.write(ids)
                file.flush()
                state["batches"] += 1
                state["ids"] += len(ids)
                with open(f"{note}.part", "w") as text:
                    json.dump(state, text)
                os.replace(f"{note}.part", note)
            file.seek(0)
            write_header(file, self.dtype, state["ids"])
        os.replace(part, out)
        os.remove(note)
        return state["ids"]

    def decode_bytes(self, ids):
        """The bytes of a list or array of ids; ValueError for an unknown one."""
        ids = np.asarray(ids) if isinstance(ids, np.ndarray) else np.fromiter(ids, np.int64)
        bad = ids[(ids < 0) | (ids >= self.vocab_size)]
        bad = bad if bad.size else ids[self._begin[ids] < 0]
        if bad.size:
            raise ValueError(f"id {bad[0]} is not in the vocabulary of {len(self.vocab)} tokens: "
                             "were these ids made by another tokenizer?")
        return self._bytes[ranges(self._begin[ids], self._sizes[ids])].tobytes()

    def decode(self, ids):
        """The text of a sequence of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self, ids):
        """Yield text as ids arrive, holding back a character until all its bytes are there."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            if text := decoder.decode(self.decode_bytes([int(i)])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def apply_chat_template(self, messages, add_generation_prompt=False):
        """The text of a conversation [{"role", "content"}, ...], in ChatML or Llama 3's form.

        Llama 3's if the vocabulary has its <|start_header_id|>. A content that holds a special
        token would forge a turn: ValueError.
        """
        if "<|start_header_id|>" in self.special_tokens:
            form = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
        else:
            form = "<|im_start|>{}\n{}<|im_end|>\n"
        text = ""
        for message in messages:
            for token in self.special_tokens:
                if token in message["content"] or token in message["role"]:
                    raise ValueError(f"a message holds the special token {token}: take it out")
            text += form.format(message["role"], message["content"])
        return text + form.partition("{}<|eot_id|>")[0].partition("{}<|im_end|>")[0].format(
            "assistant") if add_generation_prompt else text

    def save(self, path):
        """Write tokenizer.json of Hugging Face tokenizers: a file, or into a directory; -> path."""
        if not str(path).endswith(".json"):
            os.makedirs(path, exist_ok=True)
            path = os.path.join(path, "tokenizer.json")
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(to_json(self), file, ensure_ascii=False, indent=1)
        os.replace(f"{path}.part", path)
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


@lru_cache
def byte_to_char():
    """GPT-2's way to write bytes in JSON: printable ones as themselves, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable},
            **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def bytes_to_text(token):
    return "".join(map(byte_to_char().__getitem__, token))


@lru_cache
def char_to_byte():
    return {char: byte for byte, char in byte_to_char().items()}


def text_to_bytes(text):
    try:
        return bytes(map(char_to_byte().__getitem__, text))
    except KeyError:
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
    """The Tokenizer of the dict of a tokenizer.json."""
    model, before = data["model"], data.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ValueError(f"a {model.get('type')} tokenizer; only byte-level BPE can be read")
    steps = before.get("pretokenizers", [before])
    if not any(step.get("type") == "ByteLevel" for step in steps):
        raise ValueError("a BPE tokenizer, but not a byte-level one")
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    special = {token["content"]: token["id"] for token in data.get("added_tokens", [])}
    vocab = {i: text_to_bytes(token) for token, i in model["vocab"].items() if token not in special}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    normalizer = (data.get("normalizer") or {}).get("type")
    return Tokenizer(vocab, [tuple(map(text_to_bytes, merge)) for merge in merges], special,
                     patterns[0] if patterns else GPT2_PATTERN, normalizer=normalizer,
                     ignore_merges=bool(model.get("ignore_merges")))


def from_tiktoken(path, pattern=CL100K_PATTERN):
    """The Tokenizer of a .tiktoken file: a line "base64 of the token, rank" each.

    The merge of a token is what BPE with the tokens before it leaves of it: two parts.
    """
    with open(path, "rb") as file:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file)}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            rank = [ranks.get(a + b, 1 << 62) for a, b in zip(parts, parts[1:])]
            i = rank.index(min(rank))
            if rank[i] >= ranks[token]:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return Tokenizer({i: token for token, i in ranks.items()}, merges, None, pattern,
                     ignore_merges=True)


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
    except ValueError as error:
        raise ValueError(f"{args.tokens}: neither .npy nor ids like 5,9,12 ({error})") from None
    for text in tokenizer.decode_stream(ids):
        sys.stdout.write(text)


def run_inspect(args):
    """Longest tokens, compression beside another tokenizer, by script, and tokens never used."""
    ours = Tokenizer.load(args.tokenizer)
    others = {"ours": ours, **({args.beside: Tokenizer.load(args.beside)} if args.beside else {})}
    longest = sorted(ours.token_ids, key=len, reverse=True)[:10]
    print(f"{len(ours.vocab)} tokens, the longest:",
          *(repr(token.decode(errors="replace")) for token in longest))
    if not args.data:
        return
    used = np.zeros(ours.vocab_size, np.int64)
    sizes = collections.Counter()  # (tokenizer, script) -> tokens, ("bytes" or "words", script)
    for document in read_documents(args.data):
        used += np.bincount(ours.encode_numpy(document, ()), minlength=ours.vocab_size)
        for script, text in by_script(document):
            sizes["bytes", script] += len(text.encode())
            sizes["words", script] += len(text.split())
            for name, tokenizer in others.items():
                sizes[name, script] += len(tokenizer.encode_numpy(text, ()))
    for script in sorted({script for _, script in sizes}, key=lambda s: -sizes["bytes", s]):
        print(f"{script:12}{sizes['bytes', script]:>12} bytes", *(
            f"| {name}: {sizes['bytes', script] / max(1, sizes[name, script]):.2f} bytes a token, "
            f"{sizes[name, script] / max(1, sizes['words', script]):.2f} tokens a word"
            for name in others))
    unused = [i for i in ours.token_ids.values() if not used[i]]
    print(f"never used: {len(unused)} tokens, as", *(repr(ours.decode([i])) for i in unused[-10:]))


def by_script(text):
    """(script, lines of it) of a text: the script of a line is that of most of its letters."""
    lines = collections.defaultdict(list)
    for line in text.splitlines(keepends=True):
        names = collections.Counter(unicodedata.name(c, "?").split()[0].lower()
                                    for c in line if c.isalpha())
        lines[names.most_common(1)[0][0] if names else "no letters"].append(line)
    return [(script, "".join(some)) for script, some in lines.items()]


def run_bench(args):
    """Rows of RESULTS.md: ours beside tiktoken, tokenizers and rustbpe, whichever is installed."""
    for path in list_files(args.data):
        text = "".join(read_documents([path]))
        sizes = {"encode 100 characters": len(text[:1_000_000].encode()) / 1e6}
        times = collections.defaultdict(list)
        jobs = bench_jobs(text, args.vocab_size, args.processes)
        for job, function in list(jobs.items()) * args.repeats:
            begin = time.perf_counter()
            function()
            times[job].append(time.perf_counter() - begin)
        for (work, who), seconds in times.items():
            size, median = sizes.get(work, len(text.encode()) / 1e6), statistics.median(seconds)
            ratio = median / statistics.median(times[work, "ours"])
            print(f"| {work} | {os.path.basename(path)} | {who} | {size / median:.1f} MB/s | "
                  f"ours is {ratio:.2f} x |", flush=True)


def bench_jobs(text, vocab_size, processes):
    """{(work, who): function} of the work both we and the installed libraries do."""
    ours = Tokenizer(*train_bpe([text[:2_000_000]], vocab_size, [EOT], num_processes=1), [EOT])
    pieces = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
    short, ids = [text[i : i + 100] for i in range(0, 1_000_000, 100)], ours.encode(text)
    warm = Tokenizer(ours.vocab, ours.merges, [EOT])  # its cache is never emptied
    warm.encode_batch(short)
    jobs = {
        ("train", "ours"): lambda: train_bpe([text], vocab_size, num_processes=processes),
        ("encode to numpy", "ours"): lambda: (ours._reset_cache(), ours.encode_numpy(text)),
        ("encode to list", "ours"): lambda: (ours._reset_cache(), ours.encode(text)),
        ("encode 100 characters", "ours"): lambda: [warm.encode(s) for s in short],
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
        jobs["encode 100 characters", "tiktoken"] = lambda: [tik.encode_ordinary(s) for s in short]
        jobs["decode", "tiktoken"] = lambda: tik.decode(ids)
    with contextlib.suppress(ImportError):
        import tokenizers

        def train():
            tok = tokenizers.Tokenizer(tokenizers.models.BPE())
            tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            tok.train_from_iterator(pieces, tokenizers.trainers.BpeTrainer(
                vocab_size=vocab_size, show_progress=False))

        fresh = tokenizers.Tokenizer.from_str(json.dumps(to_json(ours)))
        jobs["train", "tokenizers"] = train
        jobs["encode to list", "tokenizers"] = lambda: fresh.encode_batch_fast(pieces)
    return jobs


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, help, data=None, tokenizer=True):
        sub = commands.add_parser(name, help=help, description=help,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if data:
            sub.add_argument("data", nargs=data, help="files, directories, globs of text")
        if tokenizer:
            sub.add_argument("--tokenizer", default="tokenizer",
                             help="tokenizer.json or its directory; vocab.json; .tiktoken")
        sub.set_defaults(run=run)
        return sub

    train = command("train", run_train, "learn a vocabulary from text", "+", tokenizer=False)
    train.add_argument("--vocab-size", type=int, default=32000, help="tokens in all")
    train.add_argument("--special-tokens", nargs="*", default=[EOT], help="texts kept whole")
    train.add_argument("--pattern", default="gpt2", help=f"{', '.join(PATTERNS)} or a regex")
    train.add_argument("--out", default="tokenizer", help="directory for tokenizer.json")
    encode = command("encode", run_encode, "turn text into a file of token ids", "+")
    encode.add_argument("--out", default="tokens.npy", help="file for the ids, uint16 or uint32")
    for sub in (train, encode):
        sub.add_argument("--processes", type=int, help="worker processes (None: one a core)")
    decode = command("decode", run_decode, "turn token ids into text")
    decode.add_argument("tokens", help=".npy file of ids, or ids: 5,9,12")
    inspect = command("inspect", run_inspect, "print what a tokenizer does to texts", "*")
    inspect.add_argument("--beside", help="another tokenizer to compare with, such as GPT-2's")
    bench = command("bench", run_bench, "time this file beside tiktoken, tokenizers and rustbpe",
                    "+", tokenizer=False)
    bench.add_argument("--vocab-size", type=int, default=10000, help="tokens to train")
    bench.add_argument("--repeats", type=int, default=3, help="runs a row; their median is printed")
    bench.add_argument("--processes", type=int, default=1, help="worker processes to train with")
    return parser


def main(argv=None):
    """Run a command; 0, or 2 and one line on stderr for a user's mistake, 130 for Ctrl-C."""
    args = build_parser().parse_args(argv)
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
