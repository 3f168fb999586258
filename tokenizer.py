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
import collections
import glob as globbing
import gzip
import heapq
import json
import multiprocessing
import os
import sys
import unicodedata
from functools import lru_cache, partial

import numpy as np
import regex

EOT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
CL100K_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
                  r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
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
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
    ids = []
    for part in split_special(text, tokenizer.special_tokens):
        if part in tokenizer.special_tokens:
            ids.append(tokenizer.special_tokens[part])
            continue
        for word in regex.findall(tokenizer.pattern, tokenizer.normalize(part)):
            word = word.encode()
            whole = tokenizer.ignore_merges and word in tokenizer.token_ids
            ids += [tokenizer.token_ids[t] for t in ([word] if whole else merge_word(word, ranks))]
    return ids


# ---- Where words start, with array operations ---------------------------------------------------
# The patterns only ask what kind a character is, so we give every byte the class of its character
# and compare the array with itself shifted by one. EDGE surrounds the text and every special token.

LETTER, DIGIT, OTHER, SPACE, NEWLINE, EDGE = range(6)


@lru_cache
def class_table():
    """(0x110000,) uint8: the class of every code point, as the regex module sees it."""
    points = [*range(0xD800), *range(0xE000, 0x110000)]  # surrogates are not characters
    everything = "".join(map(chr, points))
    classes = np.full(0x110000, OTHER, np.uint8)
    for pattern, kind in ((r"\p{L}+", LETTER), (r"\p{N}+", DIGIT), (r"\s+", SPACE)):
        for match in regex.finditer(pattern, everything):
            classes[ord(match.group()[0]) : ord(match.group()[-1]) + 1] = kind
    classes[[10, 13]] = NEWLINE
    return classes


@lru_cache
def byte_classes():
    """(256,) uint8: classes of the ASCII characters."""
    classes = np.full(256, OTHER, np.uint8)
    for pattern, kind in ((r"\p{L}", LETTER), (r"\p{N}", DIGIT), (r"\s", SPACE)):
        classes[[i for i in range(128) if regex.match(pattern, chr(i))]] = kind
    classes[[10, 13]] = NEWLINE
    return classes


def classify(text, raw):
    """(bytes,) uint8: the class of the character each byte belongs to."""
    classes = byte_classes()[raw]
    if not text.isascii():
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        points = points[points >= 0x80]
        width = 2 + (points >= 0x800) + (points >= 0x10000)  # bytes of the character in UTF-8
        classes[raw >= 0x80] = np.repeat(class_table()[points], width)
    return classes


def gpt2_starts(raw, kind, inside):
    """(bytes,) bool: where GPT2_PATTERN starts a word.

    raw: (bytes,) uint8 UTF-8. kind: (bytes + 2,) uint8 classes with EDGE around. inside: (bytes,)
    bool, bytes that do not start a character.
    """
    kind = np.where(kind == NEWLINE, SPACE, kind)
    before, here, after = kind[:-2], kind[1:-1], kind[2:]
    start = here != before
    start[1:] &= raw[:-1] != 32  # " ?": a single blank belongs to the word it precedes, so
    start |= (here == SPACE) & (after < SPACE)  # the last of several blanks is a start: \s+(?!\S)
    move_to_first_byte(start, inside)
    split_contractions(raw, start, here)
    return start


def move_to_first_byte(start, inside):
    """A white space of several bytes was marked at its last byte: mark its first one instead."""
    wrong = np.flatnonzero(start & inside)
    while wrong.size:
        start[wrong] = False
        wrong = wrong - 1
        start[wrong] = True
        wrong = wrong[inside[wrong]]


def split_contractions(raw, start, here, any_case=False):
    """'s 't 'd 'm 'll 've 're after a word are words: undo the start behind ', make one later."""
    quote = np.flatnonzero(start & (raw == ord("'")))
    if not quote.size:
        return
    lower = np.append(raw, np.zeros(2, np.uint8))
    if any_case:
        lower = lower | 32
    one, two = lower[quote + 1], lower[quote + 2]
    single = np.isin(one, np.frombuffer(b"sdmt", np.uint8))
    double = np.isin(one * np.uint16(256) + two, [0x6C6C, 0x7665, 0x7265])  # ll ve re
    length = np.where(single, 2, 3)
    quote, length = quote[single | double], length[single | double]
    start[quote + 1] = False
    end = quote + length
    start[end[end < len(start)]] = True


def regex_starts(text, pattern, inside):
    """(bytes,) bool: word starts of any pattern, found by the regex module."""
    lengths = np.fromiter(map(len, regex.findall(pattern, text)), np.int64)
    if lengths.sum() != len(text):
        raise ValueError("--pattern: does not match every character of the text; "
                         r"add |\s+|. as last alternatives")
    first = np.cumsum(lengths) - lengths
    start = np.zeros(len(inside), bool)
    start[np.flatnonzero(~inside)[first]] = True
    return start


# ---- An exact hash table for arrays of words ----------------------------------------------------


class KeyTable:
    """Numbers pairs of 64-bit integers 0, 1, 2, ... as they appear; looks up whole arrays.

    Open addressing with linear probing: `slots` holds numbers, `keys` the pair of each number, and
    an entry only counts as found if both integers are equal, so the answer never rests on a hash.
    """

    def __init__(self):
        self.size = 0
        self.keys = np.zeros((2, 1 << 12), np.uint64)
        self.slots = np.full(1 << 14, -1, np.int32)

    def _slot(self, first, second):
        mixed = first * np.uint64(0x9E3779B97F4A7C15) ^ second * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        return (mixed >> np.uint64(65 - len(self.slots).bit_length())).astype(np.int64)

    def _same(self, number, first, second):
        return (number >= 0) & (self.keys[0][number] == first) & (self.keys[1][number] == second)

    def find(self, first, second, insert=False):
        """(n,) int64 numbers of n keys; -1 for an unknown one, or a new number if `insert`."""
        slot = self._slot(first, second)
        number = self.slots[slot].astype(np.int64)
        todo = np.flatnonzero(~self._same(number, first, second))
        if insert and todo.size and self.size + todo.size > self.keys.shape[1]:
            self._grow(self.size + todo.size)
            slot = self._slot(first, second)
        slot = slot[todo]
        first, second = first[todo], second[todo]
        while todo.size:
            here = self.slots[slot]
            if insert:
                self._claim(slot[here < 0], first[here < 0], second[here < 0])
                here = self.slots[slot]
            found = self._same(here, first, second)
            number[todo[found]] = here[found]
            if not insert:
                number[todo[here < 0]] = -1
            rest = ~found & (here >= 0)
            todo, first, second = todo[rest], first[rest], second[rest]
            slot = (slot[rest] + 1) & (len(self.slots) - 1)
        return number

    def _claim(self, slot, first, second):
        """Several keys may want one empty slot: all write, the last one stays and gets a number."""
        turn = np.arange(len(slot), dtype=np.int32)
        self.slots[slot] = turn
        won = self.slots[slot] == turn
        slot, end = slot[won], self.size + int(won.sum())
        self.slots[slot] = np.arange(self.size, end)
        self.keys[:, self.size : end] = first[won], second[won]
        self.size = end

    def _grow(self, needed):
        capacity = 1 << int(needed - 1).bit_length()
        keys = np.zeros((2, capacity), np.uint64)
        keys[:, : self.size] = self.keys[:, : self.size]
        self.keys, self.slots = keys, np.full(4 * capacity, -1, np.int32)
        slot, number = self._slot(*keys[:, : self.size]), np.arange(self.size, dtype=np.int32)
        while number.size:
            free = self.slots[slot] < 0
            self.slots[slot[free]] = number[free]
            lost = self.slots[slot] != number
            slot, number = (slot[lost] + 1) & (len(self.slots) - 1), number[lost]


LONG = np.uint64(255) << np.uint64(56)  # marks the key of a word of more than 15 bytes


class WordTable:
    """Numbers distinct words. Up to 15 bytes and the length make exactly two 64-bit integers; a
    longer word is numbered by a dict first."""

    def __init__(self):
        self.table, self.long = KeyTable(), {}
        lengths = np.arange(16)
        byte = np.arange(16)[None, :] < lengths[:, None]  # (length, byte) which bytes count
        masks = (byte * np.uint8(255)).view(np.uint64)
        self.low, self.high = masks[:, 0].copy(), masks[:, 1].copy()
        self.tag = lengths.astype(np.uint64) << np.uint64(56)

    def __len__(self):
        return self.table.size

    def add(self, data, starts, ends):
        """Numbers (n,) int64 of the words data[starts[i]:ends[i]] of a bytes object."""
        padded = np.frombuffer(data + bytes(16), np.uint8)
        eight = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,)).copy()  # at every byte
        lengths = ends - starts
        short = np.minimum(lengths, 15)
        first = eight[starts] & self.low[short]
        second = eight[starts + 8] & self.high[short] | self.tag[short]
        for i in np.flatnonzero(lengths > 15):
            word = data[starts[i] : ends[i]]
            first[i], second[i] = self.long.setdefault(word, len(self.long)), LONG
        return self.table.find(first, second, insert=True)

    def words(self, begin=0):
        """The bytes of the words numbered from `begin`, as (data, starts, ends)."""
        first, second = self.table.keys[:, begin : len(self)]
        long_words = list(self.long) if (second == LONG).any() else []
        keys = np.stack([first, second], 1)  # (n, 2)
        lengths = (second >> np.uint64(56)).astype(np.int64)
        raw = keys.view(np.uint8).reshape(-1, 16)  # (n, 16) bytes of the word, then its length
        is_long = np.flatnonzero(second == LONG)
        lengths[is_long] = 0
        data = raw[np.arange(16)[None, :] < lengths[:, None]].tobytes()
        tail = [long_words[first[i]] for i in is_long]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        if tail:
            sizes = np.fromiter(map(len, tail), np.int64)
            ends[is_long] = len(data) + np.cumsum(sizes)
            starts[is_long] = ends[is_long] - sizes
        return data + b"".join(tail), starts, ends


def find_words(text, spans, pattern, special_count):
    """Cut text into words. -> (data, starts, ends, specials)

    spans: [(begin, end, number)] in characters, the special tokens. specials: (indices of words
    that are special tokens, their numbers).
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate (half a character) at position "
                         f"{error.start}: it is not valid Unicode") from None
    raw = np.frombuffer(data, np.uint8)
    inside = (raw & 0xC0) == 0x80
    edges = np.array([span[:2] for span in spans], np.int64).reshape(-1, 2)  # (specials, 2)
    if not text.isascii():
        edges = np.append(np.flatnonzero(~inside), len(raw))[edges]
    if pattern == GPT2_PATTERN:
        kind = np.full(len(raw) + 2, EDGE, np.uint8)
        kind[1:-1] = classify(text, raw)
        for begin, end in edges:
            kind[begin + 1 : end + 1] = EDGE
        start = gpt2_starts(raw, kind, inside)
    else:
        start = np.zeros(len(raw), bool)
        begin = 0
        for (left, right, _), (first, last) in zip([*spans, (len(text), 0, 0)],
                                                   [*edges, (len(raw), 0)]):
            piece = slice(len(text[:begin].encode()) if begin else 0, first)
            start[piece] = regex_starts(text[begin:left], pattern, inside[piece])
            begin = right
    for begin, end in edges:
        start[begin:end] = False
        start[begin] = True
        start[end : end + 1] = True
    starts = np.flatnonzero(start)
    ends = np.append(starts[1:], len(raw))
    numbers = np.array([span[2] for span in spans], np.int64)
    return data, starts, ends, (np.searchsorted(starts, edges[:, 0]), numbers)


# ---- Files --------------------------------------------------------------------------------------


def list_files(spec):
    """Sorted paths of a file, a directory, a glob pattern, or a list of those."""
    if not isinstance(spec, (str, os.PathLike)):
        return sorted({path for one in spec for path in list_files(one)})
    spec = os.fspath(spec)
    pattern = os.path.join(globbing.escape(spec), "**") if os.path.isdir(spec) else spec
    found = [spec] if os.path.isfile(spec) else globbing.glob(pattern, recursive=True)
    found = sorted(path for path in found if os.path.isfile(path))
    if not found:
        raise ValueError(f"{spec}: no such file, directory or glob pattern with files in it")
    return found


def read_pieces(path):
    """Yield (text, ends a document): a file in pieces of about a million characters.

    Invalid UTF-8 is replaced by U+FFFD, line ends stay as they are.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        if str(path).removesuffix(".gz").endswith(".jsonl"):
            yield from read_jsonl(path, file)
            return
        rest = ""
        while block := file.read(1 << 20):
            if "\0" in block:
                raise ValueError(f"{path}: has a NUL byte, so it is no text file; "
                                 "leave it out of the data")
            *documents, rest = (rest + block).split(EOT)
            yield from ((document, True) for document in documents)
            keep = rest.rfind("<", len(rest) - len(EOT))  # EOT may lie across two blocks
            if keep < 0:
                keep = len(rest)
            yield rest[:keep], False
            rest = rest[keep:]
        yield rest, True


def read_jsonl(path, lines):
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)["text"], True
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path}:{number}: not a JSON object with a "text"') from None


def read_documents(files):
    """Yield the documents of the files: split at <|endoftext|>, one a line of .jsonl."""
    for path in list_files(files):
        parts = []
        for text, last in read_pieces(path):
            parts.append(text)
            if last:
                document = "".join(parts)
                parts = []
                if document:
                    yield document


# ---- Training -----------------------------------------------------------------------------------


def count_words(texts, special_tokens, pattern):
    """Distinct words of the texts and how often each occurs: (WordTable, (n,) int64)."""
    table, counts = WordTable(), np.zeros(0, np.int64)
    for text in texts:
        for part in cut_text(text, special_tokens):
            spans = special_spans(part, special_tokens)
            data, starts, ends, (where, _) = find_words(part, spans, pattern, len(special_tokens))
            keep = np.ones(len(starts), bool)
            keep[where] = False
            number = table.add(data, starts[keep], ends[keep])
            new = np.bincount(number, minlength=len(table))
            new[: len(counts)] += counts
            counts = new
    return table, counts


def special_spans(text, special_tokens):
    """[(begin, end, index)] of the special tokens in a text, in characters."""
    if not special_tokens:
        return []
    index = {token: i for i, token in enumerate(special_tokens)}
    return [(*match.span(), index[match.group()])
            for match in special_pattern(special_tokens).finditer(text)]


def cut_pattern(special_tokens):
    """Where a text may be cut without changing its words: before a blank behind a non-blank.

    All named patterns start a word there whatever comes before or after. A special token may
    itself hold a blank: the look-behind then forbids the cuts inside it.
    """
    heads = {token[:i] for token in special_tokens for i, c in enumerate(token) if c == " "}
    inside = f"(?<!{'|'.join(map(regex.escape, heads))})" if heads else ""
    return regex.compile(rf"(?<=\S){inside} ")


def cut_text(text, special_tokens, size=1 << 18):
    """Cut a text into parts of about `size` characters whose words are those of the whole."""
    pattern = cut_pattern(special_tokens)
    begin = 0
    while begin < len(text):
        cut = pattern.search(text, begin + size)
        end = cut.start() if cut else len(text)
        yield text[begin:end]
        begin = end


def train_bpe(input_path, vocab_size, special_tokens=(), *, pattern=GPT2_PATTERN,
              num_processes=None):
    """Learn a vocabulary: -> ({id: bytes}, [(bytes, bytes)] merges in the order learned).

    input_path: what `list_files` takes, or an iterator of texts.
    """
    special_tokens = list(special_tokens)
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(f"--vocab-size {vocab_size}: must be at least {256 + len(special_tokens)}"
                         f" (256 bytes and {len(special_tokens)} special tokens)")
    if isinstance(input_path, (str, os.PathLike)) or (
            isinstance(input_path, (list, tuple)) and all(os.path.exists(p) for p in input_path)):
        input_path = read_documents(list_files(input_path))
    table, counts = count_words(input_path, special_tokens, pattern)
    merges = learn_merges(table, counts, vocab_size - 256 - len(special_tokens))
    return build_vocab(special_tokens, merges), merges


def learn_merges(table, counts, number):
    """The `number` most frequent merges, one after the other.

    All distinct words lie in one array, a boundary (-1) between them. A token of n bytes always
    covers n places, and writes its id on the first and the last of them. So the token left of a
    place is found at place - 1, the next one n further on, and nothing ever moves.
    """
    data, starts, ends = table.words()
    raw = np.frombuffer(data, np.uint8)
    length = ends - starts
    order = np.argsort(starts)
    ids = np.full(len(raw) + len(starts) + 1, -1, np.int32)
    place = np.arange(len(raw)) + 1 + np.repeat(np.arange(len(order)), length[order])
    ids[place] = raw
    weight = np.zeros(len(ids), np.int64)
    weight[place] = np.repeat(counts[order], length[order])
    is_start = ids >= 0

    tokens = [bytes([byte]) for byte in range(256)]
    # Ties go to the greatest byte strings, a heap pops the smallest: so turn every byte b into the
    # character 255 - b, and end with one that is greater than all, to put "ab" before "a".
    reverse = ["".join(chr(255 - b) for b in token) + chr(256) for token in tokens]
    sizes = np.ones(256 + number, np.int64)
    merges, heap, floor = [], [], None
    while len(merges) < number:
        if not heap:  # pairs rarer than `floor` were left out: look for them now
            if floor == 1:
                break
            heap, where, floor = index_pairs(ids, weight, is_start, sizes, reverse, floor)
            continue
        entry = heapq.heappop(heap)
        pair = entry[3]
        left, right = pair
        at = where.pop(pair)
        at = at[(ids[at] == left) & (ids[at + sizes[left]] == right)]
        count = int(weight[at].sum())
        if count < -entry[0]:  # other merges took some of its places: it has to queue again
            if count >= floor:
                where[pair] = at
                heapq.heappush(heap, (-count, *entry[1:]))
            continue
        new = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        reverse.append(reverse[left][:-1] + reverse[right])
        sizes[new] = len(tokens[new])
        merges.append((tokens[left], tokens[right]))
        if left == right:
            at = every_other(np.sort(at), sizes[left])
        middle = at + sizes[left]
        is_start[middle] = False
        last = at + sizes[new] - 1
        ids[middle - 1] = -2
        ids[middle] = -2
        ids[at] = new
        ids[last] = new
        before, after = ids[at - 1], ids[last + 1]
        some = before >= 0
        add_pairs(heap, where, before[some], at[some] - sizes[before[some]], weight[at[some]],
                  floor, reverse, lambda token, new=new: (token, new))
        some = (after >= 0) & (after != new)
        add_pairs(heap, where, after[some], at[some], weight[at[some]],
                  floor, reverse, lambda token, new=new: (new, token))
    return merges


def every_other(at, size):
    """Of places in a row ("aaa" holds two overlapping pairs) keep the first, third, ..."""
    follows = np.append(False, np.diff(at) == size)
    index = np.arange(len(at))
    first = np.maximum.accumulate(np.where(follows, 0, index))
    return at[(index - first) % 2 == 0]


def add_pairs(heap, where, tokens, places, weights, floor, reverse, make_pair):
    """Queue the pairs a new token makes with each kind of neighbour."""
    order = np.argsort(tokens, kind="stable")
    tokens = tokens[order]
    first = np.flatnonzero(np.append(True, tokens[1:] != tokens[:-1])[: len(tokens)])
    if not first.size:
        return
    counts = np.add.reduceat(weights[order], first)
    ends = np.append(first[1:], len(tokens))
    places = places[order]
    for i in np.flatnonzero(counts >= floor).tolist():
        pair = make_pair(int(tokens[first[i]]))
        where[pair] = places[first[i] : ends[i]]
        heapq.heappush(heap, (-int(counts[i]), reverse[pair[0]], reverse[pair[1]], pair))


def index_pairs(ids, weight, is_start, sizes, reverse, floor):
    """Find the places of all pairs that are frequent enough. -> (heap, where, floor)"""
    at = np.flatnonzero(is_start)
    right = ids[at + sizes[ids[at]]]
    at = at[right >= 0]
    key = ids[at].astype(np.int64) << 32 | right[right >= 0]
    order = np.argsort(key, kind="stable")
    key, at = key[order], at[order]
    first = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
    if not first.size:
        return [], {}, 1
    counts = np.add.reduceat(weight[at], first)
    ends = np.append(first[1:], len(key))
    floor = max(1, int(min(counts.max(), floor or counts.max())) // 16)
    heap, where = [], {}
    for i in np.flatnonzero(counts >= floor).tolist():
        pair = (int(key[first[i]]) >> 32, int(key[first[i]]) & 0xFFFFFFFF)
        where[pair] = at[first[i] : ends[i]]
        heap.append((-int(counts[i]), reverse[pair[0]], reverse[pair[1]], pair))
    heapq.heapify(heap)
    return heap, where, floor


# ---- BPE of many words at once ------------------------------------------------------------------


class MergeTable:
    """The merges as a table from a pair of ids to its rank, for whole arrays."""

    def __init__(self, left, right, merged):
        """left, right, merged: (merges,) ids, in order of rank."""
        self.merged = np.asarray(merged, np.int32)
        self.table = KeyTable()
        number = self.table.find(np.asarray(left, np.uint64), np.asarray(right, np.uint64), True)
        self.rank = np.full(self.table.size + 1, 1 << 24, np.int32)  # the last: no such pair
        np.minimum.at(self.rank, number, np.arange(len(self.merged), dtype=np.int32))

    def ranks(self, left, right):
        """int32 rank of each pair, 2**24 where there is no merge (a boundary is -1)."""
        number = self.table.find(left.ravel().astype(np.uint64), right.ravel().astype(np.uint64))
        return self.rank[number].reshape(left.shape)

    def merge_rounds(self, ids):
        """BPE of W words of at most L <= 64 bytes. ids: (L, W) int32, -1 behind the end of a word.

        In each round every word merges its leftmost pair of lowest rank. rank * 64 + position in
        one integer lets one minimum find both.
        """
        out = np.full_like(ids, -1)
        column = np.arange(ids.shape[1])
        row = np.arange(ids.shape[0], dtype=np.int32)[:, None]
        key = self.ranks(ids[:-1], ids[1:]) * 64 + row[:-1]
        none = 1 << 30
        key = np.concatenate([key, np.full_like(key[:1], none)])
        while True:
            best = key.min(0)
            alive = best < (1 << 29)
            if not alive.all():
                out[:, column[~alive]] = ids[:, ~alive]
                ids, key, best = ids[:, alive], key[:, alive], best[alive]
                column = column[alive]
            if not column.size:
                return out
            at, new = best & 63, self.merged[best >> 6]
            word = np.arange(len(at))
            ids = np.where(row > at, shift_up(ids, -1), ids)
            ids[at, word] = new
            key = np.where(row > at, shift_up(key, none) - 1, key)
            after = ids[at + 1, word]
            key[at, word] = self.ranks(new, after) * 64 + at
            left = np.flatnonzero(at > 0)
            key[at[left] - 1, left] = (self.ranks(ids[at[left] - 1, left], new[left]) * 64
                                       + at[left] - 1)


def shift_up(rows, fill):
    """Rows 1, 2, ... of a matrix, and a last one of `fill`."""
    return np.concatenate([rows[1:], np.full_like(rows[:1], fill)])


# ---- The tokenizer ------------------------------------------------------------------------------


class Tokenizer:
    """Text to ids and back.

    vocab: {id: bytes}. merges: [(bytes, bytes)] by rank. special_tokens: texts, or {text: id}; one
    that is not in the vocabulary gets the next free id. pattern: a name of PATTERNS or a regular
    expression.
    """

    def __init__(self, vocab, merges, special_tokens=None, pattern=GPT2_PATTERN, *,
                 normalizer=None, ignore_merges=False):
        self.vocab, self.merges = dict(vocab), list(merges)
        self.pattern = PATTERNS.get(pattern, pattern)
        self.normalizer, self.ignore_merges = normalizer, ignore_merges
        named = special_tokens if isinstance(special_tokens, dict) else {}
        by_text = {token: i for i, token in self.vocab.items()}
        self.special_tokens = {}
        for token in special_tokens or ():
            i = named.get(token, by_text.get(token.encode(), max(self.vocab, default=-1) + 1))
            self.vocab[i] = token.encode()
            self.special_tokens[token] = i
        special_ids = set(self.special_tokens.values())
        self.token_ids = {t: i for i, t in self.vocab.items() if i not in special_ids}
        missing = [byte for byte in range(256) if bytes([byte]) not in self.token_ids]
        if missing:
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes: this is not "
                             "a byte-level BPE tokenizer")
        try:
            self._merge_ids = [(self.token_ids[a], self.token_ids[b], self.token_ids[a + b])
                               for a, b in self.merges]
        except KeyError as error:
            raise ValueError(f"the merges need {error.args[0]!r}, which the vocabulary lacks"
                             ) from None
        self.vocab_size = max(self.vocab) + 1
        self.eot_id = self.special_tokens.get(EOT)
        self.dtype = np.uint16 if self.vocab_size <= 65536 else np.uint32
        self._table = MergeTable(*np.array(self._merge_ids, np.int64).reshape(-1, 3).T)
        self._byte_ids = np.array([self.token_ids[bytes([b])] for b in range(256)], np.int32)
        self._bytes = [self.vocab.get(i) for i in range(self.vocab_size)]
        self._reset_cache()

    def _reset_cache(self):
        """Words seen so far: word n has the ids pool[offset[n] : offset[n] + count[n]]."""
        self._words = WordTable()
        self._offset = np.zeros(0, np.int64)
        self._count = np.zeros(0, np.int64)
        self._pool = np.zeros(0, self.dtype)

    def normalize(self, text):
        return unicodedata.normalize(self.normalizer, text) if self.normalizer else text

    def _allowed(self, allowed_special):
        if allowed_special == "all":
            return list(self.special_tokens)
        return [token for token in self.special_tokens if token in allowed_special]

    def encode_numpy(self, text, allowed_special="all"):
        """Ids of a text, uint16 if they all fit, else uint32.

        allowed_special: the special tokens that count as such in this text; give () for text from
        users, where "<|endoftext|>" should be nothing but these 13 characters.
        """
        allowed = self._allowed(allowed_special)
        if self.normalizer:
            parts = split_special(text, allowed)
            text = "".join(p if p in allowed else self.normalize(p) for p in parts)
        parts = [self._encode_part(part, special_spans(part, allowed), allowed)
                 for part in cut_text(text, allowed)]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def _encode_part(self, text, spans, allowed):
        data, starts, ends, (where, which) = find_words(text, spans, self.pattern, len(allowed))
        number = self._words.add(data, starts, ends)
        self._encode_new_words()
        count, offset = self._count[number], self._offset[number]
        count[where] = 1
        last = np.cumsum(count)
        ids = self._pool[np.repeat(offset - last + count, count) + np.arange(last[-1])]
        special = np.array([self.special_tokens[token] for token in allowed], self.dtype)
        ids[last[where] - 1] = special[which]
        if len(self._words) > 1 << 20:
            self._reset_cache()
        return ids

    def _encode_new_words(self):
        known = len(self._offset)
        if known == len(self._words):
            return
        data, starts, ends = self._words.words(known)
        raw = np.frombuffer(data, np.uint8)
        count = np.zeros(len(starts), np.int64)
        length = ends - starts
        rows = [None] * 0
        flat = np.empty(len(raw), self.dtype)  # the ids of a word, where its bytes were
        for low, high in ((0, 8), (8, 16), (16, 32), (32, 64)):
            group = np.flatnonzero((length > low) & (length <= high))
            if not group.size:
                continue
            place = starts[group] + np.arange(high)[:, None]  # (L, W)
            valid = place < ends[group]
            ids = np.where(valid, self._byte_ids[raw[np.where(valid, place, 0)]], -1)
            ids = self._table.merge_rounds(ids.astype(np.int32))
            count[group] = (ids >= 0).sum(0)
            flat[place[ids >= 0]] = ids[ids >= 0]
        for i in np.flatnonzero(length > 64):
            ids = self._encode_long(data[starts[i] : ends[i]])
            count[i] = len(ids)
            flat[starts[i] : starts[i] + len(ids)] = ids
        del rows
        if self.ignore_merges:
            for i in np.flatnonzero(count > 1):
                whole = self.token_ids.get(data[starts[i] : ends[i]])
                if whole is not None:
                    flat[starts[i]], count[i] = whole, 1
        self._offset = np.append(self._offset, starts + len(self._pool))
        self._count = np.append(self._count, count)
        self._pool = np.append(self._pool, flat)

    def _encode_long(self, word):
        """BPE of one long word with a heap of (rank, place)."""
        ranks = {(a, b): (rank, new) for rank, (a, b, new) in enumerate(self._merge_ids)}
        ids = self._byte_ids[np.frombuffer(word, np.uint8)].tolist()
        after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        heap = [(ranks[pair][0], i, pair) for i, pair in enumerate(zip(ids, ids[1:]))
                if pair in ranks]
        heapq.heapify(heap)
        while heap:
            _, i, pair = heapq.heappop(heap)
            j = after[i]
            if ids[i] != pair[0] or j >= len(ids) or ids[j] != pair[1]:
                continue
            ids[i], ids[j] = ranks[pair][1], -1
            after[i] = k = after[j]
            if k < len(ids):
                before[k] = i
                if (ids[i], ids[k]) in ranks:
                    heapq.heappush(heap, (ranks[ids[i], ids[k]][0], i, (ids[i], ids[k])))
            h = before[i]
            if h >= 0 and (ids[h], ids[i]) in ranks:
                heapq.heappush(heap, (ranks[ids[h], ids[i]][0], h, (ids[h], ids[i])))
        return [i for i in ids if i >= 0]

    def encode(self, text, allowed_special="all"):
        """List of the ids of a text; see `encode_numpy`."""
        return self.encode_numpy(text, allowed_special).tolist()

    def encode_batch(self, texts, allowed_special="all"):
        """Lists of the ids of several texts."""
        return [self.encode(text, allowed_special) for text in texts]

    def encode_iterable(self, texts, allowed_special="all"):
        """Yield the ids of the joined texts, holding about a megabyte of them at a time."""
        pattern, rest = cut_pattern(self._allowed(allowed_special)), ""
        for text in texts:
            rest += text
            if len(rest) > 1 << 20:
                cut = None
                for cut in pattern.finditer(rest, max(1, len(rest) - 4096)):
                    pass
                if cut:
                    yield from self.encode(rest[: cut.start()], allowed_special)
                    rest = rest[cut.start() :]
        yield from self.encode(rest, allowed_special)

    def decode_bytes(self, ids):
        """The bytes of a sequence of ids; ValueError for an unknown one."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        try:
            return b"".join([self.vocab[i] for i in ids])
        except KeyError as error:
            raise ValueError(f"id {error.args[0]} is not in the vocabulary of {len(self.vocab)} "
                             "tokens: were these ids made by another tokenizer?") from None

    def decode(self, ids):
        """The text of a sequence of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self, ids):
        """Yield text as ids arrive, holding back a character until all its bytes are there."""
        import codecs

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
        """Write tokenizer.json of Hugging Face tokenizers: a file, or into a directory."""
        if not str(path).endswith(".json"):
            os.makedirs(path, exist_ok=True)
            path = os.path.join(path, "tokenizer.json")
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(to_json(self), file, ensure_ascii=False, indent=1)
        os.replace(f"{path}.part", path)

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json, or the directory that holds one."""
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        with open(path, encoding="utf-8") as file:
            try:
                return from_json(json.load(file))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_files(cls, vocab_path, merges_path, special_tokens=None):
        """Read GPT-2's vocab.json and merges.txt."""
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


# ---- Command line -------------------------------------------------------------------------------


def run_train(args):
    vocab, merges = train_bpe(args.data, args.vocab_size, args.special_tokens,
                              pattern=PATTERNS.get(args.pattern, args.pattern))
    Tokenizer(vocab, merges, args.special_tokens, args.pattern).save(args.out)
    print(f"{len(vocab)} tokens written to {args.out}")


def run_encode(args):
    tokenizer = Tokenizer.load(args.tokenizer)
    parts = []
    for document in read_documents(list_files(args.data)):
        parts.append(tokenizer.encode_numpy(document, ()))
        if tokenizer.eot_id is not None:
            parts.append(np.array([tokenizer.eot_id], tokenizer.dtype))
    ids = np.concatenate(parts)
    with open(args.out + ".part", "wb") as file:
        np.save(file, ids)
    os.replace(args.out + ".part", args.out)
    print(f"{len(ids)} tokens written to {args.out}")


def run_decode(args):
    tokenizer = Tokenizer.load(args.tokenizer)
    sys.stdout.write(tokenizer.decode(np.load(args.tokens, mmap_mode="r")))


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = partial(commands.add_parser, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    train = add("train", help="learn a vocabulary from text")
    train.add_argument("data", nargs="+", help="files, directories or globs of text")
    train.add_argument("--vocab-size", type=int, default=32000, help="tokens, special ones included")
    train.add_argument("--special-tokens", nargs="*", default=[EOT], help="never split or merged")
    train.add_argument("--pattern", default="gpt2", help=f"{', '.join(PATTERNS)} or a regex")
    train.add_argument("--out", default="tokenizer", help="directory for tokenizer.json")
    train.set_defaults(run=run_train)

    encode = add("encode", help="turn text into a file of token ids")
    encode.add_argument("data", nargs="+", help="files, directories or globs of text")
    encode.add_argument("--tokenizer", default="tokenizer", help="directory of tokenizer.json")
    encode.add_argument("--out", default="tokens.npy", help="file for the ids")
    encode.set_defaults(run=run_encode)

    decode = add("decode", help="turn a file of token ids into text")
    decode.add_argument("tokens", help=".npy file of ids")
    decode.add_argument("--tokenizer", default="tokenizer", help="directory of tokenizer.json")
    decode.set_defaults(run=run_decode)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"tokenizer.py {args.command}: {error}") if False else None
        print(f"tokenizer.py {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
