"""Train a language model: text or tokens in, a Hugging Face checkpoint out.

    python train.py                            # five minutes on two cores: Python's own library
    python train.py --data my.txt --out out-my        # your text: file, folder, glob, .jsonl, .gz
    torchrun --nproc-per-node 8 train.py --data 'fineweb/*.npy' --tokenizer fineweb/tokenizer.json
    python train.py --init-from out --data notes/ --out out-notes     # go on from any checkpoint

The same command continues a run that was stopped, to the bit. The recipe `speedrun` follows Muon
(Jordan et al. 2024), with a warmup-stable-decay schedule (Hu et al. 2024, MiniCPM), QK-norm
(Henry et al. 2020) and zero-initialised projections; `cs336` is AdamW (Loshchilov & Hutter 2019)
with a cosine. Shapes: B windows of a batch, T context length, D d_model, V vocabulary.
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import sysconfig
import time
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

import distributed
import model as model_py
import tokenizer as tokenizer_py
from distributed import init_distributed, sum_gradients  # noqa: F401  align.py has them from here

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these; without it there is one process
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    """Print once, not once a rank."""
    if RANK == 0:
        print(*words, flush=True)


def all_reduce_sum(values, device):
    """Sum a short list of numbers over the ranks, in float64."""
    if WORLD_SIZE == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


# ---- data: files to arrays of token ids --------------------------------------------------------

VAL_FRACTION = 0.05  # of the documents, held out
EVAL_TOKENS = 50_000  # that a validation during the run reads; the last one reads all


def stdlib_files():
    """Python's standard library source: about 700 files and 12 MB that every machine has.

    Its tests, and packages installed beside it, are left out: they differ between machines.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(str(f) for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts))
    if len(files) < 100:
        raise ValueError(f"--data is needed: this Python has no source of its library ({root} has "
                         f"{len(files)} .py files, about 700 expected)")
    return files


def is_held_out(document, fraction=VAL_FRACTION):
    """Whether a document is for validation: by a hash of its text, so the same on every machine."""
    digest = hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def split_documents(files, fraction=VAL_FRACTION):
    """Yield (document, is for validation).

    Of fewer than 200 documents the share held out whole would be left to chance, and of 20 be none
    in one case of three: there the last `fraction` of each is, cut at a line.
    """
    few = list(islice(tokenizer_py.read_documents(files), 200))
    if len(few) == 200:
        for document in tokenizer_py.read_documents(files):
            yield document, is_held_out(document, fraction)
        return
    for document in few:
        most = int(len(document) * (1 - fraction))
        cut = document.rfind("\n", 0, most + 1) + 1 or most
        yield document[:cut], False
        yield document[cut:], True


def content_hash(files, *settings):
    """Names the cache: the same bytes and settings give the same name, wherever they lie."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
        digest.update(b"\0end of file\0")
    return digest.hexdigest()


def write_tokens(path, documents, tok):
    """Write every document's ids, <|endoftext|> after each, to a .npy file; returns their count."""
    count, texts = 0, (document + tokenizer_py.EOT for document in documents)
    with open(path, "wb") as f:
        tokenizer_py.write_header(f, tok.dtype, 0)  # of fixed size: written again with the count
        while some := list(islice(texts, 256)):
            ids = tok.encode_numpy("".join(some), allowed_special=[tokenizer_py.EOT])
            f.write(ids.tobytes())
            count += len(ids)
        f.seek(0)
        tokenizer_py.write_header(f, tok.dtype, count)
    return count


def tokenize_corpus(files, folder, vocab_size, tokenizer_path):
    """Text files -> folder/{tokenizer.json, train.npy, val.npy}; the folder appears whole."""
    start, work = time.time(), Path(f"{folder}.{os.getpid()}.tmp")
    work.mkdir(parents=True)
    try:
        if tokenizer_path:
            tok = tokenizer_py.Tokenizer.load(tokenizer_path)
        else:
            texts = (d for d, held_out in split_documents(files) if not held_out)
            vocab, merges = tokenizer_py.train_bpe(texts, vocab_size, [tokenizer_py.EOT])
            tok = tokenizer_py.Tokenizer(vocab, merges, [tokenizer_py.EOT])
        if tok.eot_id is None:
            raise ValueError(f"--tokenizer {tokenizer_path}: has no {tokenizer_py.EOT} to put "
                             "between documents")
        tok.save(work / "tokenizer.json")
        for name, wanted in (("train", False), ("val", True)):
            documents = (d for d, held_out in split_documents(files) if held_out == wanted)
            write_tokens(work / f"{name}.npy", documents, tok)
        say(f"{'tokenized':<12}in {time.time() - start:.1f} s")
        if not (folder / "val.npy").exists():  # another run may have been faster, and reads it now
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


LLM_C_MAGIC = 20240520  # llm.c and modded-nanogpt shards: 256 int32 of header, then uint16 ids


def load_tokens(path):
    """Memory-map a token file: .npy, an llm.c shard (by its header) or nanoGPT's bare uint16."""
    if str(path).endswith(".npy"):
        tokens = np.load(path, mmap_mode="r")
        if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
            raise ValueError(f"{path}: {tokens.dtype} of shape {tokens.shape}, not a row of ids")
        return tokens
    if os.path.getsize(path) < 2:
        raise ValueError(f"{path}: no tokens in it")
    header = np.fromfile(path, np.int32, 1)
    has_header = len(header) and header[0] == LLM_C_MAGIC
    return np.memmap(path, np.uint16, "r", offset=1024 if has_header else 0)


@dataclass
class Data:
    """Token arrays (memory-mapped), the tokenizer (None if unknown) and the name in the cache."""

    train: list
    val: list
    tokenizer: object
    name: str


def open_token_files(files, tokenizer_path):
    """Files with "val" in their name, or their folder's, validate; without any, the last tail."""
    train, val = [], []
    for file in files:
        held_out = "val" in f"{Path(file).parent.name}/{Path(file).name}"
        (val if held_out else train).append(load_tokens(file))
    if not train:
        raise ValueError("--data: every token file is named for validation, none is left to train")
    if not val:
        cut = len(train[-1]) - min(int(len(train[-1]) * VAL_FRACTION), 10_000_000)
        train[-1], val = train[-1][:cut], [train[-1][cut:]]
    tok = tokenizer_py.Tokenizer.load(tokenizer_path) if tokenizer_path else None
    return Data(train, val, tok, ",".join(files))


def prepare_data(args):
    """--data -> Data. Text is tokenised once, by rank 0, and kept in the cache by its content."""
    files = tokenizer_py.list_files(args.data) if args.data else stdlib_files()
    token_files = [f for f in files if f.endswith((".npy", ".bin"))]
    if token_files:
        return open_token_files(token_files, args.tokenizer)
    size = sum(map(os.path.getsize, files))
    if not size:
        raise ValueError(f"--data {', '.join(files)}: empty")
    say(f"{'corpus':<12}{len(files)} files, {size / 1e6:.2f} MB, "
        + (" ".join(args.data) if args.data else "Python's own standard library"))
    tokenizer_file = [args.tokenizer] if os.path.isfile(args.tokenizer or "") else []
    folder = Path(args.cache) / content_hash(files + tokenizer_file, VAL_FRACTION,
                                             args.tokenizer or args.vocab_size)
    if RANK == 0 and not (folder / "val.npy").exists():
        tokenize_corpus(files, folder, args.vocab_size, args.tokenizer)
    if WORLD_SIZE > 1:
        dist.barrier()
    return Data([load_tokens(folder / "train.npy")], [load_tokens(folder / "val.npy")],
                tokenizer_py.Tokenizer.load(folder / "tokenizer.json"), folder.name)


# ---- batches: arrays of token ids to windows of T + 1 ------------------------------------------


def get_batch(tokens, batch_size, context_length, device):
    """Windows at random places: two (B, T) int64 tensors, the second one token further on."""
    starts = np.random.randint(0, len(tokens) - context_length, batch_size)
    rows = np.stack([tokens[s:s + context_length + 1] for s in starts]).astype(np.int64)
    batch = torch.from_numpy(rows).to(device)  # (B, T + 1)
    return batch[:, :-1], batch[:, 1:]


def shuffled(index, n, key):
    """Element `index` of a random order of range(n), found without storing the order.

    A four-round Feistel network permutes the smallest 4^k >= n numbers; a result outside range(n)
    goes through again until it is inside (cycle walking, Black & Rogaway 2002). So an epoch over a
    100 GB file needs no memory, and the state of the shuffle is one integer: the position.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            text = f"{key} {round_number} {right}".encode()
            mixed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
            left, right = right, left ^ (mixed & mask)
        index = left << half | right
        if index < n:
            return index


def document_starts(array, eot, T):
    """Where windows begin so that each starts a document, or goes on inside one longer than T.

    A document cut by the end of a window is read again from its beginning in the next one.
    """
    begins = np.append(0, np.flatnonzero(array[:-T] == eot) + 1)
    starts, at = [], 0
    while at + T < len(array):
        starts.append(at)
        last = int(begins[np.searchsorted(begins, at + T, "right") - 1])
        at = last if last > at else at + T
    return np.array(starts, np.int64)


class Windows:
    """Windows of T + 1 tokens over a list of token arrays, each once an epoch, in random order.

    Every epoch has its own order and its own first token (0 to T - 1), so the cuts between windows
    move; packed windows (`eot` given) begin where documents do. Window number p of a run is a
    function of p and the seed alone: any number of ranks reads the same batches, and a restarted
    run needs only its step.
    """

    def __init__(self, arrays, T, seed, eot=None):
        self.arrays, self.T, self.seed = arrays, T, seed
        self.starts = None if eot is None else [document_starts(a, eot, T) for a in arrays]
        counts = [max(0, (len(a) - T) // T) for a in arrays]  # for every offset in 0 .. T - 1
        self.ends = np.cumsum([len(s) for s in self.starts] if self.starts else counts)
        self.per_epoch = int(self.ends[-1])
        if not self.per_epoch:
            raise ValueError(f"--data: {max(map(len, arrays))} tokens are too few for one window "
                             f"of --context-length {T}; give more text or a shorter context")

    def window(self, position):
        epoch, index = divmod(position, self.per_epoch)
        index = shuffled(index, self.per_epoch, f"{self.seed} {epoch}")
        shard = int(np.searchsorted(self.ends, index, "right"))
        index -= int(self.ends[shard - 1]) if shard else 0
        offset = shuffled(epoch % self.T, self.T, f"offset {self.seed}")
        start = self.starts[shard][index] if self.starts else offset + index * self.T
        return self.arrays[shard][start:start + self.T + 1]

    def batch(self, positions, device):
        """Positions -> inputs (B, T) and targets (B, T), int64."""
        rows = torch.from_numpy(np.stack([self.window(p) for p in positions]).astype(np.int64))
        if device.type == "cuda":
            rows = rows.pin_memory().to(device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]


# ---- optimizers --------------------------------------------------------------------------------


class Optimizer(torch.optim.Optimizer):
    """What the three below share: step() counts in each group and calls update()."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            if params := [p for p in group["params"] if p.grad is not None]:
                self.update(group, params)
        return loss

    def kept(self, p, name):
        """What is remembered of p from step to step, at first zeros."""
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p)
        return state[name]


class SGD(Optimizer):
    """p = p - lr b, b = momentum b + g + wd p (Sutskever et al. 2013, as torch has it)."""

    def __init__(self, params, lr=1e-3, momentum=0.0, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def update(self, group, params):
        for p in params:
            change = p.grad.add(p, alpha=group["weight_decay"])
            if group["momentum"]:
                change = self.kept(p, "buffer").mul_(group["momentum"]).add_(change)
            p.sub_(change, alpha=group["lr"])


def adamw_update(p, g, m, v, rates, beta1, beta2, eps):
    """One AdamW step of lists of tensors, in place. rates: lr / (1 - b1^t), 1 / sqrt(1 - b2^t) and
    1 - lr wd in one tensor, so that what is compiled holds for every step."""
    step_size, correction, keep = rates.unbind()
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)
    scale = torch._foreach_sqrt(v)
    torch._foreach_mul_(scale, correction)
    torch._foreach_add_(scale, eps)
    change = torch._foreach_div(m, scale)
    torch._foreach_mul_(change, step_size)
    torch._foreach_mul_(p, keep)
    torch._foreach_sub_(p, change)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
    p = p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
    Ten passes over memory, or one when compiled (`compile`): one call for all tensors of a group,
    since by themselves the small ones would cost more in calls than in arithmetic.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.kernel = adamw_update

    def compile(self):
        self.kernel = torch.compile(adamw_update, dynamic=False)
        return self

    def update(self, group, params):
        (b1, b2), t, lr = group["betas"], group["step"], group["lr"]
        rates = torch.tensor(
            [lr / (1 - b1**t), (1 - b2**t) ** -0.5, 1 - lr * group["weight_decay"]],
            dtype=torch.promote_types(params[0].dtype, torch.float32), device=params[0].device)
        self.kernel(params, [p.grad for p in params], [self.kept(p, "m") for p in params],
                    [self.kept(p, "v") for p in params], rates, b1, b2, group["eps"])


# a, b, c of each step of newton_schulz: what brings 0.004 .. 1.02 nearest to 1 in four steps, each
# the best (minimax) polynomial for the interval that the one before leaves (Amsel et al. 2025,
# Polar Express, arXiv:2505.16932); bf16 may round the largest value a little over 1. The last is
# times 0.9, the mean size that Jordan's own five steps give: learning rates keep their meaning.
POLAR = [(8.1807, -23.1910, 16.5146), (3.9111, -2.8037, 0.5126), (3.3046, -2.3876, 0.4686),
         (2.0886, -1.4763, 0.3530)]


def newton_schulz(G):
    """Near-orthogonalise matrices G (..., m, n): U S V^T -> about U V^T, in bf16.

    X <- (a I + b A + c A^2) X with A = X X^T moves every singular value s to a s + b s^3 + c s^5
    (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). Of G over its norm, values of
    0.004 to 1 end within 0.76 to 1.04, in one step less than his five.
    """
    X = G.bfloat16().view(-1, *G.shape[-2:])
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT  # X X^T is then the smaller square
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2 in one pass
        B.diagonal(dim1=-2, dim2=-1).add_(a)  # far smaller than X, to which a X would be added
        X = B @ X
    return (X.mT if tall else X).reshape(G.shape)


class Muon(Optimizer):
    """Momentum, orthogonalised: the update of an (m, n) matrix has all singular values near 1.

    p = p - lr sqrt(max(1, m / n)) newton_schulz(g + mu buffer), for hidden matrices only; tables,
    head, norms and scalars want AdamW. Momentum mu warms up from 0.85 over 300 steps. Matrices of
    one shape go through Newton-Schulz together, as one batched product; where ranks have pieces of
    them, distributed.py brings those together first.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, cautious=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      cautious=cautious))

    def update(self, group, params):
        mu = min(group["momentum"], 0.85 + (group["momentum"] - 0.85) * group["step"] / 300)
        alike = defaultdict(list)
        for p in params:
            alike[p.shape, tuple(dim for dim, *_ in getattr(p, "splits", ()))].append(p)
        for (_, cuts), params in alike.items():
            nesterov = torch.stack([self.momentum(p, mu) for p in params])  # (matrices, m, n)
            changes = (distributed.orthogonalize_sharded(newton_schulz, nesterov, params[0]) if cuts
                       else newton_schulz(nesterov))
            rows, columns = distributed.whole_shape(params[0])
            lr = group["lr"] * max(1, rows / columns) ** 0.5
            wd = group["lr"] * group["weight_decay"]
            for p, change in zip(params, changes):
                if wd:  # cautious: only where the step itself points to zero (Liang et al. 2024)
                    p.sub_(p * (p * change > 0) * wd if group["cautious"] else p * wd)
                p.sub_(change, alpha=lr)

    def momentum(self, p, mu):
        """The Nesterov mix of a matrix; one at a time stays in the cache, all at once would not."""
        buffer = self.kept(p, "buffer").lerp_(p.grad, 1 - mu)
        return p.grad.lerp(buffer, mu)


def clip_grad_norm(parameters, max_norm):
    """Scale the gradients in place so that their common L2 norm is at most max_norm; returns it."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if max_norm:
        torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def make_optimizers(model, args):
    """Muon for the blocks' matrices and AdamW for the rest, or one optimizer for everything.

    Only matrices decay; tables, norms and scalars do not.
    """
    if args.optimizer == "sgd":
        return [SGD(model.parameters(), args.lr, args.momentum, args.weight_decay)]
    inside = {id(p) for p in model.layers.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in inside]
    others = [p for p in model.parameters() if id(p) not in inside]
    adam = dict(lr=args.lr, betas=args.betas, eps=args.eps)
    groups = [dict(params=others, weight_decay=0.0)]
    if args.optimizer == "adamw":
        return [AdamW([dict(params=matrices, weight_decay=args.weight_decay), *groups], **adam)]
    muon = Muon(matrices, args.muon_lr, args.momentum, args.weight_decay, args.cautious)
    return [muon, AdamW(groups, **adam)]


# ---- schedules: the learning rate at a step, counted from 0 ------------------------------------


def cosine_schedule(step, max_lr, min_lr, warmup_steps, cosine_steps):
    """Linear warm-up from 0, half a cosine from max_lr down to min_lr at cosine_steps, min_lr."""
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    if step > cosine_steps:
        return min_lr
    done = (step - warmup_steps) / max(1, cosine_steps - warmup_steps)
    return min_lr + (max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def wsd_schedule(step, max_lr, min_lr, warmup_steps, decay_steps, total_steps):
    """Warm up, stay, and fall linearly to min_lr over the last decay_steps (Hu et al. 2024)."""
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    left = max(0, total_steps - step)
    return min_lr + (max_lr - min_lr) * min(1.0, left / max(1, decay_steps))


def schedule(step, args):
    """The factor on every learning rate at `step`: 1 is the full rate."""
    if args.schedule == "cosine":
        return cosine_schedule(step + 1, 1.0, args.min_lr, args.warmup, args.steps)
    floor = 1.0 if args.schedule == "constant" else args.min_lr
    return wsd_schedule(step + 1, 1.0, floor, args.warmup, args.steps - decay_start(args),
                        args.steps)


def decay_start(args):
    """The last step at the full rate; of a WSD run its checkpoint is kept, to branch from."""
    share = {"wsd": args.decay, "constant": 0.0}.get(args.schedule, 1.0)
    return args.steps - int(share * (args.steps - args.warmup))


# ---- evaluation and samples --------------------------------------------------------------------


@contextmanager
def uncompiled():
    """Run modules as they are written, also compiled ones: other shapes would compile anew."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it would take 1.5 s
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
@uncompiled()
def evaluate(model, val, args, device, tok, autocast, max_tokens=None):
    """(nats per token, bits per byte) of validation arrays, in windows that do not overlap.

    Bits per byte divides all nats, those of <|endoftext|> too, by the bytes of the text, so it
    compares across tokenizers: nats / ln 2 / bytes; without a tokenizer it is nan. The ranks share
    the windows, and each makes equally many calls of model.loss, since where the model is split
    they need each other; model is a Parallel, or anything with such a loss.
    """
    T, B = args.context_length, args.micro_batch
    starts = [(a, i) for a in val for i in range(0, len(a) - T, T)]
    starts = starts or [(a, 0) for a in val if len(a) > 1]  # shorter than one window: as it is
    starts = starts[:max(1, (max_tokens or 10**12) // T)]
    rank, ranks, readers = getattr(model, "data_ranks", (RANK, WORLD_SIZE, 1))
    mine = starts[rank::ranks]
    lengths = torch.zeros(args.vocab_size, dtype=torch.float64)  # in bytes
    for i, word in tok.vocab.items() if tok else ():
        lengths[i] = 0 if i in tok.special_tokens.values() else len(word)
    lengths = lengths.to(device)
    sums = np.zeros(3)  # nats, tokens, bytes of text
    model.eval()  # no balancing loss of a mixture of experts
    for i in range(0, -(-len(starts) // ranks), B):
        rows = [a[s:s + T + 1] for a, s in mine[i:i + B] or starts[:1]]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)  # (B, T + 1)
        targets = ids[:, 1:]
        with autocast():
            nats = model.loss(ids[:, :-1], targets, reduction="sum").item()
        if i < len(mine):  # or this rank has nothing left, and only keeps the others company
            sums += nats, targets.numel() / readers, lengths[targets].sum().item() / readers
    model.train()
    nats, tokens, text_bytes = all_reduce_sum(sums.tolist(), device)
    return nats / tokens, nats / math.log(2) / text_bytes if text_bytes else math.nan


@uncompiled()
def show_samples(run):
    """Print what the model writes after each of --sample-prompts."""
    tok, (model, _) = run.data.tokenizer, whole_state(run)
    if RANK or not tok:
        return
    for i, prompt in enumerate(run.args.sample_prompts):
        ids = [tok.eot_id] if tok.eot_id is not None else []
        ids += tok.encode(prompt, allowed_special=())
        done = model.generate([ids], run.args.sample_tokens, temperature=0.8, top_p=0.95, seed=i,
                              stop=[tok.eot_id], tokenizer=tok)[0]
        say(f"\n---- sample {i + 1} " + "-" * 60)
        say(prompt + done.text.replace(tokenizer_py.EOT, ""))


# ---- checkpoints -------------------------------------------------------------------------------


def save_checkpoint(model, optimizer, iteration, out, **extra):
    """Everything a restart needs in one file (a path or a file object), replaced whole.

    optimizer may be a list of them; extra entries are saved beside.
    """
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    state = {"model": model.state_dict(), "iteration": iteration,
             "optimizers": [o.state_dict() for o in optimizers], **extra}
    if not isinstance(out, (str, os.PathLike)):
        torch.save(state, out)
        return
    beside = f"{out}.{os.getpid()}.tmp"
    try:
        torch.save(state, beside)
        os.replace(beside, out)
    finally:
        Path(beside).unlink(missing_ok=True)


def load_checkpoint(src, model, optimizer):
    """Restore what save_checkpoint wrote; returns the iteration. Nothing in the file executes."""
    state = torch.load(src, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    for o, o_state in zip(optimizers, state["optimizers"]):
        o.load_state_dict(o_state)
    return state["iteration"]


# What a run is: to go on under other values would be a different run.
IDENTITY = (
    "context_length", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "ffn", "norm",
    "norm_type", "position", "qk_norm", "zero_init", "tie_embeddings", "logit_softcap",
    "value_embeddings", "residual_scalars", "recipe", "optimizer", "batch_size", "schedule",
    "warmup", "decay", "min_lr", "lr", "muon_lr", "weight_decay", "cautious", "momentum", "betas",
    "eps", "clip", "seed", "data_name", "pack", "dtype")
COUNTERS = ("loss_scale", "good_steps", "skipped")  # of a Run


def whole_state(run):
    """(model, {name: {key: optimizer state}}) as one process has them, whatever the layout: put
    together on rank 0 where ranks have parts, so a run can go on in another layout."""
    if not run.parallel.copies_only:
        weights, states = run.parallel.whole_state(run.optimizers)
        if RANK:
            return None, None
        model = model_py.Transformer(replace(run.config))
        model.load_state_dict(weights, strict=False)
        return model, states
    kept = [getattr(optimizer, "local", optimizer).state for optimizer in run.optimizers]
    return run.model, {name: next((state[p] for state in kept if p in state), {})
                       for name, p in run.model.named_parameters()}


def step_folders(out):
    """Complete checkpoints of a run, oldest first."""
    return sorted(Path(out).glob("step-[0-9]*[0-9]"), key=lambda p: int(p.name[5:]))


def save_run(run):
    """Write out/step-N whole, under another name first, and link its files into out/.

    A kill at any moment leaves the previous step-* folder intact; out/ itself always opens as a
    model. Older folders than the newest --keep go.
    """
    model, states = whole_state(run)
    if RANK:
        return
    args, out, branch = run.args, Path(run.args.out), decay_start(run.args)
    folder, work = out / f"step-{run.step:06d}", out / "saving"
    shutil.rmtree(work, ignore_errors=True)  # what a kill in the middle of a save has left
    try:
        model.save_pretrained(work)
        if run.data.tokenizer:
            run.data.tokenizer.save(work)
        torch.save({"iteration": run.step, "optimizers": states,
                    "updates": run.optimizers[0].param_groups[0].get("step", 0),
                    "steps": args.steps, "full_rate_until": branch,
                    "micro_batch": args.micro_batch,
                    "settings": {k: getattr(args, k) for k in IDENTITY},
                    **{k: getattr(run, k) for k in COUNTERS}}, work / "train_state.pt")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        raise OSError(f"--out {out}: the checkpoint of step {run.step} could not be written, the "
                      f"one before it is kept ({str(error).splitlines()[0]})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for file in folder.iterdir():
        beside = out / f"{file.name}.tmp"
        beside.unlink(missing_ok=True)
        try:
            os.link(file, beside)  # the same bytes under two names
        except OSError:  # a file system without hard links
            shutil.copyfile(file, beside)
        os.replace(beside, out / file.name)
    for old in step_folders(out)[:-args.keep]:
        if old.name != f"step-{branch:06d}":  # a longer run branches off there
            shutil.rmtree(old, ignore_errors=True)


def read_state(folder, mmap=False):
    """A checkpoint's train_state.pt."""
    try:
        return torch.load(folder / "train_state.pt", "cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}/train_state.pt: cannot be read; remove {folder} to go on from "
                         "the one before it, or --restart") from error


def as_flag(name, value):
    """A setting as it is given: "--lr 0.1", "--no-qk-norm", "--betas 0.9 0.95"."""
    name = "data" if name == "data_name" else name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} " + (" ".join(map(str, value)) if isinstance(value, list) else str(value))


def find_run(args):
    """The checkpoint of this very run in --out to go on from, or None; refuses a different run's.

    With more --steps than before that is the last one whose learning rate had not begun to fall.
    What was found by trying, then, need not be what would be found now, so it is taken over.
    """
    folders = step_folders(args.out)
    if not folders:
        return None
    state = read_state(folders[-1], mmap=True)
    if "micro_batch" not in state or not state["settings"].keys() >= set(IDENTITY):
        raise ValueError(f"{folders[-1]} is another version's: give another --out, or --restart")
    if args.dtype == "auto":
        args.dtype = state["settings"]["dtype"]
    args.micro_batch = args.micro_batch or state["micro_batch"]
    other = [as_flag(k, state["settings"][k]) for k in IDENTITY
             if state["settings"][k] != getattr(args, k)]
    if other:
        raise ValueError(f"--out {args.out}: holds a run with {', '.join(other)}; give those, "
                         "another --out, or --restart to begin again")
    before = [f for f in folders if int(f.name[5:]) <= state["full_rate_until"]]
    return before[-1] if before and args.steps > state["steps"] else folders[-1]


def lock_run(out):
    """Refuse a second process that would write into the same folder; the lock dies with us."""
    Path(out).mkdir(parents=True, exist_ok=True)
    lock = open(Path(out) / ".lock", "w")
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no such locks
        pass
    except BlockingIOError:
        raise ValueError(f"--out {out}: another run is writing there; give another --out") from None
    return lock


# ---- the log -----------------------------------------------------------------------------------


def clock(seconds):
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


class Log:
    """One line a step into log.jsonl, and into what else was asked for; a plot of it all."""

    def __init__(self, args, resumed_at):
        if RANK:
            return
        self.path, self.records = Path(args.out) / "log.jsonl", []
        if resumed_at and self.path.exists():  # without what was logged beyond the checkpoint
            lines = self.path.read_text().splitlines()
            records = [json.loads(x) for x in lines if x.endswith("}")]  # a kill cuts lines short
            self.records = [r for r in records if r["step"] <= resumed_at]
        beside = self.path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        os.replace(beside, self.path)
        self.file = open(self.path, "a", buffering=1)
        self.wandb = self.tensorboard = None
        if args.wandb:
            import wandb
            self.wandb = wandb.init(project=args.wandb, dir=args.out, config=vars(args))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(Path(args.out) / "tensorboard")

    def write(self, **record):
        if RANK:
            return
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record, step=record["step"])
        for name, value in record.items() if self.tensorboard else ():
            if value is not None:
                self.tensorboard.add_scalar(name, value, record["step"])

    def draw(self):
        """loss.png: the training loss, its running mean, and validation, against tokens."""
        if RANK:
            return
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        figure, axes = plt.subplots(figsize=(8, 4.5), dpi=110)
        x, y = np.array([(r["tokens"], r["loss"]) for r in self.records
                         if r.get("loss") is not None]).reshape(-1, 2).T
        if len(y):
            width = max(1, len(y) // 50)
            mean = np.convolve(y, np.ones(width) / width, "valid")
            axes.plot(x, y, color="#9ecae1", linewidth=0.8, label="training, each step")
            axes.plot(x[width - 1:], mean, color="#08519c", label=f"training, mean of {width}")
        val = [(r["tokens"], r["val_loss"]) for r in self.records if r.get("val_loss")]
        axes.plot(*np.reshape(val, (-1, 2)).T, "o-", color="#d94801", label="validation")
        axes.set(xlabel="tokens", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        beside = self.path.with_name("loss.tmp.png")
        figure.savefig(beside, bbox_inches="tight")
        plt.close(figure)
        os.replace(beside, self.path.with_name("loss.png"))


# ---- what the machine can do -------------------------------------------------------------------

# Dense bf16 peak of the data sheets, in TFLOP/s: what MFU is measured against by convention.
GPU_PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "B200": 2250}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def choose_dtype(args, device):
    """(dtype of matrix products, peak FLOP/s). auto: bf16 where it is clearly faster than fp32.

    Some CPUs multiply bf16 four times as fast (AVX512-BF16, AMX), others emulate it at a tenth.
    """
    best = dict(bf16=math.inf, fp32=math.inf)  # seconds of an (n, n) product
    n = 4096 if device.type == "cuda" else 1024  # long enough for a GPU to hide its start
    for name in ["bf16", "fp32"] * 12:  # in turns: on a busy machine either may be held up once
        a = torch.randn(n, n, device=device).to(DTYPES[name])
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        best[name] = min(best[name], time.perf_counter() - start)
    if args.dtype == "auto":  # rank 0 decides for all
        better = float(1.5 * best["bf16"] < best["fp32"] and RANK == 0)
        args.dtype = "bf16" if all_reduce_sum([better], device)[0] else "fp32"
    peak = 2 * n**3 / best["fp32" if args.dtype == "fp32" else "bf16"]
    if device.type == "cuda" and args.dtype != "fp32":
        gpu = torch.cuda.get_device_name(device)
        peak = next((p * 1e12 for k, p in GPU_PEAKS.items() if k in gpu), peak)
    return DTYPES[args.dtype], peak


def compile_blocks(model, optimizers, args, device):
    """torch.compile one block, which all layers share, and AdamW; returns "compiled" or why not.

    Compiling the whole model is no faster here and takes 40 s instead of 15 on two cores.
    """
    if args.compile == "off":
        return "eager"
    if args.tp * args.cp * args.ep > 1:
        return "eager (torch.compile and the collectives inside a block do not go together)"
    if args.compile == "auto" and device.type == "cpu":
        if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
            return "eager (torch.compile finds no C++ compiler)"
        if args.steps < 100:
            return "eager (too few steps to pay for compiling)"
    for layer in model.layers:
        if args.parallel == "fsdp":  # weights come and go outside of what is compiled
            layer.forward = torch.compile(layer.forward)
        else:
            layer.compile()
    for optimizer in (getattr(o, "local", o) for o in optimizers):
        if isinstance(optimizer, AdamW):
            optimizer.compile()
    return "compiled blocks"


def checkpoint_blocks(model):
    """Keep only each block's input for the backward pass and compute the block again there."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def memory_gb(device):
    """Peak memory: the allocator's on a GPU, the process's (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- putting a run together --------------------------------------------------------------------


@dataclass
class Run:
    """What the loop carries from step to step."""

    args: argparse.Namespace
    parallel: distributed.Parallel  # the model, spread over the ranks
    config: model_py.ModelConfig  # of the whole model
    optimizers: list
    data: Data
    windows: Windows
    device: torch.device
    dtype: torch.dtype  # of matrix products; weights are fp32
    peak: float  # FLOP/s, what MFU is measured against
    flops_per_token: float  # of the whole model
    compiled: str = ""  # whether the blocks are compiled, in words
    step: int = 0  # steps done
    loss_scale: float = 1.0  # of fp16, whose gradients would vanish below 6e-8
    good_steps: int = 0  # since loss_scale last changed
    skipped: int = 0  # steps whose gradients were not finite
    reader: object = None  # the thread that reads ahead for a GPU
    ahead: dict = field(default_factory=dict)  # {step: what the thread is reading}

    @property
    def model(self):  # this rank's part of it
        return self.parallel.model

    @property
    def tokens_per_step(self):
        return self.args.batch_size * self.args.context_length

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def build_model(args, data, source):
    """A new model from the flags, or the weights in the folder `source`; sets args.vocab_size."""
    if source:
        model = model_py.Transformer.from_pretrained(source, dtype=torch.float32)
        args.vocab_size = model.config.vocab_size
    else:
        args.vocab_size = data.tokenizer.vocab_size if data.tokenizer else args.vocab_size
        names = {f.name for f in fields(model_py.ModelConfig)} & set(vars(args))
        model = model_py.Transformer(model_py.ModelConfig(**{n: getattr(args, n) for n in names}))
    if data.tokenizer and data.tokenizer.vocab_size > args.vocab_size:
        raise ValueError(f"--init-from {source}: {args.vocab_size} ids, but the data's tokenizer "
                         f"has {data.tokenizer.vocab_size}")
    return model


def make_mesh(args):
    """--tp, --cp, --pp and --ep ranks for those; all others share the data. A --micro-batch of 0
    becomes a rank's whole share."""
    split = {axis: getattr(args, axis) for axis in ("tp", "cp", "pp", "ep")}
    count = math.prod(split.values())
    if WORLD_SIZE % count:
        raise ValueError(f"--tp x --cp x --pp x --ep: {WORLD_SIZE} ranks are not a multiple of "
                         f"{count}; see torchrun's --nproc-per-node")
    data = WORLD_SIZE // count
    readers, fsdp = data * args.ep, args.parallel == "fsdp"
    if args.batch_size < readers or fsdp and args.batch_size % readers:
        raise ValueError(f"--batch-size {args.batch_size}: {readers} ranks cannot share it")
    args.micro_batch = max(args.micro_batch, 0) or -(-args.batch_size // readers)
    return distributed.Mesh(**{"fsdp" if fsdp else "dp": data}, **split)


def build_run(args, device, data, resume_from=None):
    """The model on the mesh of all ranks, this rank's optimizers, and where a stopped run was."""
    torch.manual_seed(args.seed)
    model = build_model(args, data, resume_from or args.init_from).to(device)
    eot = data.tokenizer.eot_id if data.tokenizer and args.pack else None
    if args.pack and eot is None:
        raise ValueError("--pack: needs a tokenizer with <|endoftext|> to find the documents by")
    windows = Windows(data.train, args.context_length, args.seed, eot)
    dtype, peak = choose_dtype(args, device)
    config, flops = replace(model.config), model.flops_per_token(args.context_length)
    if args.checkpoint_activations:
        checkpoint_blocks(model)
    mesh = make_mesh(args)
    parallel = distributed.Parallel(model, mesh, args.parallel,
                                    None if dtype == torch.float32 else dtype)
    optimizers = make_optimizers(parallel.model, args)
    if args.parallel == "zero1":
        optimizers = [distributed.ShardedOptimizer(o.param_groups, type(o), mesh.group("dp", "cp"))
                      for o in optimizers]
    run = Run(args, parallel, config, optimizers, data, windows, device, dtype, peak, flops)
    run.loss_scale = 2.0**16 if dtype == torch.float16 else 1.0
    parallel.autocast = run.autocast
    if resume_from:
        state = read_state(resume_from)
        run.step = state["iteration"]
        for name in COUNTERS:
            setattr(run, name, state[name])
        parallel.take_state(state["optimizers"], optimizers)  # of which each rank takes its part
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["step"] = state["updates"]
    run.compiled = compile_blocks(run.model, optimizers, args, device)
    return run


# ---- the loop ----------------------------------------------------------------------------------


def read_batch(run, step):
    """This rank's share of a step's windows: [(inputs, targets)], --micro-batch windows each."""
    size, micro = run.args.batch_size, run.args.micro_batch
    mine = run.parallel.share(list(range(step * size, (step + 1) * size)))
    batch = [run.windows.batch(mine[i:i + micro], run.device) for i in range(0, len(mine), micro)]
    largest = max((targets.max().item() for _, targets in batch), default=0)
    if largest >= run.args.vocab_size:
        raise ValueError(f"--data: token id {largest} is outside the vocabulary of "
                         f"{run.args.vocab_size}; give the --tokenizer it was made with")
    return batch


def next_batch(run, step):
    """read_batch; on a GPU a thread reads the next step's meanwhile, into pinned memory."""
    if run.device.type != "cuda":
        return read_batch(run, step)
    run.reader = run.reader or ThreadPoolExecutor(1)
    now = run.ahead.pop(step, None) or run.reader.submit(read_batch, run, step)
    run.ahead = {step + 1: run.reader.submit(read_batch, run, step + 1)}
    return now.result()


PARTS = ("data", "forward", "backward", "ranks", "clip", "optimizer")  # of a step, for --profile


def forward_backward(run, step, together=True):
    """Gradients of the mean loss over the whole batch, all ranks; returns this rank's part of it.

    The divisor is the token count of all micro-batches on all ranks, so neither accumulation nor
    the number of ranks changes the gradient. Without `together` a rank keeps its own gradients.
    """
    tokens, total = run.tokens_per_step, torch.zeros((), device=run.device)
    with record_function("data"):
        batch = next_batch(run, step)
    for i, (inputs, targets) in enumerate(batch):
        with nullcontext() if together and i == len(batch) - 1 else run.parallel.no_sync():
            total += run.parallel.loss(inputs, targets, backward_scale=run.loss_scale / tokens)
    with record_function("ranks"):
        if together:
            run.parallel.finish()
    return total.item() / tokens


def rescale(run, finite):
    """fp16: halve the loss scale when gradients overflow, double it after 1,000 that did not."""
    run.good_steps = run.good_steps + 1 if finite else 0
    if not finite or run.good_steps % 1000 == 0:
        run.loss_scale *= 2.0 if finite else 0.5


def update(run, factor):
    """Every optimizer's step at `factor` of its full learning rate."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("full_lr", group["lr"]) * factor
        optimizer.step()
    if run.config.balance == "bias":  # experts balanced without a loss
        for experts in run.model.moes():
            if WORLD_SIZE > 1:
                dist.all_reduce(experts.load)
            experts.balance()


def train_step(run, step, stopping=False):
    """One update. Returns (mean loss, gradient norm, learning-rate factor, must stop)."""
    factor, parameters = schedule(step, run.args), list(run.model.parameters())
    loss = forward_backward(run, step)
    with record_function("clip"):
        if run.loss_scale != 1:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], run.loss_scale)
        clip = clip_grad_norm if run.parallel.copies_only else distributed.clip_grad_norm
        norm = clip(parameters, run.args.clip).item()
    loss, stop = all_reduce_sum([loss, float(stopping)], run.device)
    finite, fp16 = math.isfinite(loss + norm), run.dtype == torch.float16
    if fp16:
        rescale(run, finite)
    with record_function("optimizer"):
        if finite:
            update(run, factor)
        elif run.args.nonfinite == "stop" and (not fp16 or run.loss_scale < 1):
            kept = step_folders(run.args.out)
            raise ValueError(f"step {step + 1}: loss {loss}, gradient norm {norm}: stopped; the "
                             f"last good checkpoint is {kept[-1] if kept else 'none'}; try a lower"
                             " --lr, or --nonfinite skip")
        run.model.zero_grad(set_to_none=True)
    run.skipped += not finite
    return loss, norm, factor, stop > 0


@contextmanager
def noting_signals():
    """Yields a list into which SIGTERM or Ctrl-C puts its number; a second Ctrl-C acts at once.

    The handlers are given back: who calls main() may go on, and fork processes that inherit them.
    """
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def warm_up(run):
    """Compile, find a micro-batch that fits the GPU, and time one batch: seconds a step, about.

    The space of the optimizers' state is held meanwhile. Ranks with a copy of the model each try
    by themselves and then agree; where they have parts of one, none can go back alone.
    """
    parts = run.parallel.mesh.size("fsdp", "tp", "cp", "pp", "ep") > 1
    count = sum(p.numel() for p in run.model.parameters())
    state = torch.empty(0 if run.step else 2 * count, device=run.device)
    while True:
        try:
            for _ in range(2):  # the first call compiles
                start = time.perf_counter()
                forward_backward(run, 0, together=parts)
                seconds = time.perf_counter() - start
            full = False
        except torch.cuda.OutOfMemoryError:
            full = True
        run.model.zero_grad(set_to_none=True)
        if full and (parts or run.args.micro_batch == 1):
            raise ValueError(f"--micro-batch {run.args.micro_batch}: does not fit the GPU's "
                             "memory; lower it or --context-length, or shrink the model")
        if not all_reduce_sum([float(full)], run.device)[0]:
            del state
            return seconds
        torch.cuda.empty_cache()
        run.args.micro_batch, run.ahead = (run.args.micro_batch + 1) // 2, {}
        say(f"{'memory':<12}full: micro-batches of {run.args.micro_batch} windows")


def evaluate_and_log(run, log, max_tokens=None):
    loss, bits = evaluate(run.parallel, run.data.val, run.args, run.device, run.data.tokenizer,
                          run.autocast, max_tokens)
    log.write(step=run.step, tokens=run.step * run.tokens_per_step, val_loss=loss,
              bits_per_byte=bits)
    log.draw()
    say(f"{run.step:>6}/{run.args.steps:<6} validation loss {loss:.4f} nats/token, perplexity "
        f"{math.exp(min(loss, 700)):.2f}, {bits:.4f} bits/byte")


def report_spike(losses, loss, step):
    """Say when a loss is more than six deviations above the 50 before it."""
    mean, deviation = (np.mean(losses), np.std(losses)) if len(losses) == 50 else (loss, 0)
    if loss > mean + 6 * deviation:
        say(f"{step:>6}        loss spike: {loss:.4f} is {(loss - mean) / deviation:.0f} standard "
            "deviations above the 50 steps before")


def log_line(run, loss, norm, factor, seconds, left):
    """One line on the screen; seconds a step, and seconds that are left."""
    speed = run.tokens_per_step / seconds
    say(f"{run.step:>6}/{run.args.steps:<6} {loss:7.4f} {factor:6.3f} {norm:6.2f} {speed:8,.0f} "
        f"{speed * run.flops_per_token / run.peak / WORLD_SIZE:5.1%} {memory_gb(run.device):5.2f} "
        f"{clock(left)}" + (f"  {run.skipped} skipped" if run.skipped else ""))


def describe(run, seconds_per_step):
    """What is ahead, in aligned lines."""
    args, c, tokens = run.args, run.config, run.tokens_per_step
    train, val = (sum(map(len, arrays)) for arrays in (run.data.train, run.data.val))
    with torch.device("meta"):  # the whole model, in sizes without numbers
        whole = model_py.Transformer(replace(c))
    going_on = f"; going on from step {run.step}" if run.step else ""
    rows = dict(
        tokens=f"{train:,} to train on, {val:,} to validate, {c.vocab_size:,} ids",
        model=f"{c.num_layers} layers, d_model {c.d_model}, {c.num_heads} heads, d_ff {c.d_ff}, "
              f"{c.ffn}; {whole.num_parameters() / 1e6:.2f}M parameters, "
              f"{whole.num_parameters(embeddings=False) / 1e6:.2f}M without tables",
        device=f"{run.device.type} x {WORLD_SIZE}, {torch.get_num_threads()} threads each, "
               f"{args.dtype} products, {run.peak / 1e12:.2f} TFLOP/s peak, {run.compiled}",
        batch=f"{args.batch_size} windows of {args.context_length} = {tokens:,} tokens",
        steps=f"{args.steps:,}, {args.steps * tokens / 1e6:.2f}M tokens, "
              f"{args.steps * tokens / train:.2f} epochs, {args.recipe}: {args.optimizer}, "
              f"{args.schedule}{going_on}",
        expected=f"{(args.steps - run.step) * seconds_per_step * 1.1 / 60:.1f} minutes\n")
    for name, text in rows.items():
        say(f"{name:<12}{text}")


def train(args):
    """Begin the run that the flags describe, or go on with it: all that happens, in order."""
    began, device = time.time(), init_distributed(args.device)
    fill_defaults(args, device)
    if args.bench:
        return bench(args, device)
    lock = None if RANK else lock_run(args.out)
    data = prepare_data(args)
    args.data_name = data.name
    if not any(len(array) > 1 for array in data.val):
        raise ValueError("--data: too little to validate on; give more of it, or a file named val")
    resume_from = None if args.restart else find_run(args)
    run = build_run(args, device, data, resume_from)
    if run.step >= args.steps and not (args.profile or args.memory):
        say(f"--out {args.out}: finished, {run.step} steps; --steps {2 * run.step} goes on, "
            "--restart begins again")
        return
    for folder in [] if resume_from or RANK else step_folders(args.out):
        shutil.rmtree(folder)
    seconds = warm_up(run)  # a step
    describe(run, seconds)
    if args.profile or args.memory:
        return profile_steps(run) if args.profile else report_memory(run)

    log, first, stopping, side_work = Log(args, run.step), run.step, False, 0.0
    times = deque(2 * [seconds], maxlen=50)  # the first step compiles the optimizer
    losses = deque(maxlen=50)
    say(f"{'step':>13} {'loss':>7} {'lr':>6} {'gnorm':>6} {'tok/s':>8} {'MFU':>5} {'GB':>5} left")
    with noting_signals() as caught:
        while run.step < args.steps and not stopping:
            start = time.perf_counter()
            loss, norm, factor, stopping = train_step(run, run.step, bool(caught))
            times.append(time.perf_counter() - start)
            run.step = step = run.step + 1
            last = step == args.steps
            log.write(step=step, tokens=step * run.tokens_per_step, loss=loss, gnorm=norm,
                      lr=factor, seconds=round(times[-1], 4))
            if math.isfinite(loss):
                report_spike(losses, loss, step)
                losses.append(loss)
            if step % args.log_every == 0 or step == 1 or last:
                seconds = float(np.median(times))
                left = (args.steps - step) * (seconds + side_work / max(1, step - 1 - first))
                log_line(run, loss, norm, factor, seconds, left)

            start = time.perf_counter()
            if last or args.eval_every and step % args.eval_every == 0:
                evaluate_and_log(run, log, None if last else EVAL_TOKENS)
            if args.sample_every and step % args.sample_every == 0 and not last:
                show_samples(run)
            due = args.save_every and step % args.save_every == 0
            if due or last or stopping or step == decay_start(args):
                save_run(run)  # after the evaluation: a finished run's log is complete
            side_work += time.perf_counter() - start

    if run.step < args.steps:
        say(f"stopped at step {run.step}, saved in {args.out}; the same command goes on")
        return
    show_samples(run)
    say(f"\ndone in {clock(time.time() - began)}: {args.out}/model.safetensors, loss.png, log.jsonl"
        f"\npython model.py generate --model {args.out} --prompt \"def \"")
    del lock  # held until here


# ---- where time and memory go ------------------------------------------------------------------


def profile_steps(run, steps=10):
    """--profile: where a step's time goes, part by part and operator by operator, and a trace.

    The parts are record_function ranges. The two steps before are for Nsight: emit_nvtx makes them
    NVTX ranges on CUDA, and does not go together with the profiler.
    """
    with torch.autograd.profiler.emit_nvtx(run.device.type == "cuda"):
        for i in range(2):  # the first one compiles the optimizer
            train_step(run, run.step + i)
    with torch.profiler.profile() as profiler:
        start = time.perf_counter()
        for i in range(steps):
            train_step(run, run.step + 1 + i)
        whole = (time.perf_counter() - start) / steps * 1e3
    events = {e.key: e for e in profiler.key_averages()}
    parts = [events.pop(p) for p in PARTS if p in events]
    rows = [(e.key, e.cpu_time_total, e.device_time_total) for e in parts]
    rows += sorted([(e.key[:40], e.self_cpu_time_total, e.self_device_time_total)
                    for e in events.values()], key=lambda row: -max(row[1:]))[:12]
    say(f"\n{'a step':<40} {whole:>9.2f} ms\n{'part, then operator by itself':<40} {'host ms':>9} "
        f"{'device ms':>9} {'share':>6}")
    for name, *times in rows:
        host, device = (t / steps / 1e3 for t in times)
        say(f"{name:<40} {host:>9.2f} {device:>9.2f} {max(host, device) / whole:>6.1%}")
    trace = Path(run.args.out) / f"trace-{RANK}.json"
    profiler.export_chrome_trace(str(trace))
    say(f"\n{trace}: open it in https://ui.perfetto.dev")


@uncompiled()
def report_memory(run):
    """--memory: the bytes that one micro-batch keeps for its backward pass, by part of the model.

    Every storage counts once, where it is kept first; parameters do not count.
    """
    kept, where, cuda = defaultdict(int), ["head and loss"], run.device.type == "cuda"
    seen = {p.untyped_storage().data_ptr() for p in run.model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept[where[-1]] += storage.nbytes()
        return tensor

    for i, layer in enumerate(run.model.layers):
        for name, module in layer.named_children():
            module.register_forward_pre_hook(lambda *_, n=f"layer {i} {name}": where.append(n))
            module.register_forward_hook(lambda *_: where.pop() and None)
    if cuda:
        torch.cuda.memory._record_memory_history()
    inputs, targets = read_batch(run, run.step)[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), run.autocast():
        run.model.loss(inputs, targets).backward()
    for name, size in kept.items():
        say(f"{name:<24} {size / 2**20:>9.2f} MiB")
    say(f"{'in all':<24} {sum(kept.values()) / 2**20:>9.2f} MiB for {inputs.numel():,} tokens")
    if cuda:
        torch.cuda.memory._dump_snapshot(f"{run.args.out}/memory.pickle")
        say(f"{run.args.out}/memory.pickle: open it in https://pytorch.org/memory_viz")


BENCH_FLAGS = ("d_model", "num_layers", "num_heads", "d_ff", "vocab_size", "context_length",
               "batch_size")
BENCHES = {  # by device
    "cuda": [(768, 12, 6, 2048, 50304, 1024, 32), (2048, 16, 16, 5632, 50304, 2048, 8)],
    "cpu": [(192, 4, 2, 512, 4096, 256, 16)],
}


def bench(args, device):
    """--bench: whole steps on random tokens, and the optimizer's part of them, beside the same
    model with torch's own: compiled as a whole, F.cross_entropy, fused torch.optim.AdamW."""
    say("model   optimizer  tokens/s  torch's  ratio     MFU      GB  update ms  fused AdamW")
    for sizes in BENCHES[device.type]:
        vars(args).update(zip(BENCH_FLAGS, sizes), micro_batch=sizes[-1], compile="on")
        for args.optimizer in ("adamw", "muon"):
            torch.compiler.reset()  # or sizes that differ from the ones before become dynamic
            bench_row(args, device)


def bench_row(args, device):
    tokens = args.batch_size * args.context_length
    ids = np.random.default_rng(0).integers(0, args.vocab_size, 2_000_000, np.uint16)
    run = build_run(args, device, Data([ids], [ids], None, "random"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train_step(run, 0)
    memory = memory_gb(device)  # before the other model comes
    plain = model_py.Transformer(run.config).to(device)
    fused = torch.optim.AdamW(plain.parameters(), fused=True)
    ours, theirs = median_seconds(
        partial(train_step, run, 0), partial(plain_step, run, torch.compile(plain), fused))
    forward_backward(run, 0)
    for mine, twin in zip(run.model.parameters(), plain.parameters()):
        twin.grad = mine.grad.clone()
    own, torchs = median_seconds(partial(update, run, 1.0), fused.step)
    mfu = run.flops_per_token * tokens / ours / run.peak
    say(f"{plain.num_parameters() / 1e6:.1f}M".ljust(8) + f"{args.optimizer:<9} "
        f"{tokens / ours:>8,.0f} {tokens / theirs:>8,.0f} {theirs / ours:>6.2f} {mfu:>7.1%} "
        f"{memory:>7.2f} {own * 1e3:>10.2f} {torchs * 1e3:>12.2f}")


def plain_step(run, forward, optimizer):
    (inputs, targets), = read_batch(run, 0)
    with run.autocast():
        logits = forward(inputs).flatten(0, 1)  # (B T, V)
        loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()


def median_seconds(*calls, count=12, warmup=4):
    """Of each call, in turns: what else the machine does holds up all of them."""
    times = np.zeros((count, len(calls)))
    for i, j in np.ndindex(*times.shape):
        start = time.perf_counter()
        calls[j]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times[i, j] = time.perf_counter() - start
    return np.median(times[warmup:], 0)


# ---- command line ------------------------------------------------------------------------------

# Flags whose default depends on the recipe or the device. Every one can be given by hand.
RECIPES = {
    "speedrun": dict(optimizer="muon", schedule="wsd", decay=0.5, min_lr=0.0, warmup=20, lr=0.024,
                     weight_decay=0.0, eps=1e-10, clip=0.0, qk_norm=True, zero_init=True,
                     tie_embeddings=True),
    "cs336": dict(optimizer="adamw", schedule="cosine", decay=0.0, min_lr=0.1, warmup=40, lr=0.002,
                  weight_decay=0.1, eps=1e-8, clip=1.0, qk_norm=False, zero_init=False,
                  tie_embeddings=False),
}
SIZES = {
    "cpu": dict(context_length=256, d_model=192, num_layers=4, num_heads=2, d_ff=512,
                batch_size=16, steps=1400, eval_every=350),
    "cuda": dict(context_length=512, d_model=512, num_layers=8, num_heads=4, d_ff=1408,
                 batch_size=64, steps=1000, eval_every=250),
}


def fill_defaults(args, device):
    """Give every flag left at None its value from the recipe or the device's size."""
    defaults = RECIPES[args.recipe] | SIZES["cuda" if device.type == "cuda" else "cpu"]
    if args.init_from:
        config = json.loads((Path(args.init_from) / "config.json").read_text())
        defaults["context_length"] = min(defaults["context_length"],
                                         config.get("max_position_embeddings", 10**9))
        args.tokenizer = args.tokenizer or args.init_from
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("steps", "batch_size", "context_length", "keep", "log_every", "tp", "cp", "pp",
                 "ep"):
        if getattr(args, name) < 1:
            raise ValueError(f"{as_flag(name, getattr(args, name))}: must be at least 1")
    args.warmup = min(args.warmup, args.steps // 4)
    if args.sample_prompts is None:
        args.sample_prompts = [""] if args.data else [
            "def read_file(path):", 'class Stack:\n    """', "    def close(self):"]


class Parser(argparse.ArgumentParser):
    """argparse, with one-line errors that name the nearest right flag."""

    def error(self, message):
        for word in message.replace(":", " ").split():
            near = difflib.get_close_matches(word, self._option_string_actions, 1, 0.6)
            if word.startswith("--") and word not in self._option_string_actions and near:
                message += f"; did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: {message}\n")


def make_parser():
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    group = None

    def add(name, default, help, **options):
        tables = [(n, t[name]) for n, t in (RECIPES | SIZES).items() if name in t]
        shown = ", ".join(f"{n} {v}" for n, v in tables) or default
        if options.get("action") is None and "choices" not in options:
            sample = default if default is not None else tables[0][1] if tables else ""
            options.setdefault("type", type(sample))
            options["metavar"] = "N" if options["type"] in (int, float) else "X"
        help += f" (default: {'none' if shown is None else shown})".replace("%", "%%")
        group.add_argument("--" + name.replace("_", "-"), default=default, help=help, **options)

    yes_no, flag = dict(action=argparse.BooleanOptionalAction), dict(action="store_true")
    group = parser.add_argument_group("data")
    add("data", None, "text (.txt, .jsonl, .gz, a folder, a glob) or token files (.npy, .bin); "
        "Python's own library without it", nargs="*")
    add("tokenizer", None, "tokenizer.json to use instead of training one")
    add("vocab_size", 4096, "ids of the tokenizer to train")
    add("cache", "data", "folder for tokenizers and tokens, by content")
    add("pack", False, "begin windows where documents begin", **yes_no)
    group = parser.add_argument_group("model")
    add("init_from", None, "folder of a checkpoint to start from")
    add("context_length", None, "tokens a window")
    add("d_model", None, "width of the residual stream")
    add("num_layers", None, "blocks")
    add("num_heads", None, "query heads")
    add("num_kv_heads", 0, "key/value heads, 0 for as many as query heads")
    add("d_ff", None, "width of the feed-forward layer")
    add("ffn", "swiglu", "feed-forward layer", choices=["swiglu", "silu", "gelu", "relu2"])
    add("norm", "pre", "place of the norms", choices=["pre", "post", "output", "none"])
    add("norm_type", "rms", "kind of norm", choices=["rms", "layer"])
    add("position", "rope", "position information", choices=["rope", "learned", "none"])
    add("attention", "sdpa", "attention kernel", choices=["sdpa", "flash", "naive"])
    add("qk_norm", None, "normalise queries and keys", **yes_no)
    add("zero_init", None, "start output projections at zero", **yes_no)
    add("tie_embeddings", None, "one table for embedding and head", **yes_no)
    add("logit_softcap", 0.0, "cap * tanh(logits / cap), 0 for none")
    add("value_embeddings", 0, "token tables mixed into the values of layers i and -1-i")
    add("residual_scalars", False, "learned shortcut from the embedding to each block", **yes_no)
    group = parser.add_argument_group("optimization")
    add("recipe", "speedrun", "set of defaults", choices=list(RECIPES))
    add("steps", None, "updates")
    add("batch_size", None, "windows an update, over all ranks")
    add("micro_batch", 0, "windows at a time on a rank, 0 for all that fit")
    add("optimizer", None, "optimizer", choices=["muon", "adamw", "sgd"])
    add("lr", None, "learning rate of AdamW or SGD")
    add("muon_lr", 0.03, "learning rate of Muon (the blocks' matrices)")
    add("weight_decay", None, "decay of matrices, per unit of learning rate")
    add("cautious", False, "Muon: decay only where the update shrinks the weight too", **yes_no)
    add("momentum", 0.95, "of Muon and SGD")
    add("betas", [0.9, 0.95], "AdamW's means: of gradients, of squares", nargs=2, type=float)
    add("eps", None, "what AdamW adds to the root of its mean of squares")
    add("clip", None, "largest gradient norm, 0 for no clipping")
    add("schedule", None, "learning rate", choices=["wsd", "cosine", "linear", "constant"])
    add("warmup", None, "steps of linear warm-up")
    add("decay", None, "share of the steps in which WSD falls")
    add("min_lr", None, "last learning rate, as a share of the full one")
    add("nonfinite", "stop", "when loss or gradient is not finite", choices=["stop", "skip"])
    add("seed", 0, "of the weights and the order of the data")
    group = parser.add_argument_group("ranks, under torchrun")
    add("parallel", "ddp", "what ranks that share the data keep: everything, the optimizer's state "
        "in parts, or the weights too", choices=["ddp", "zero1", "fsdp"])
    add("tp", 1, "ranks that split the matrices")
    add("cp", 1, "ranks that split the sequence")
    add("pp", 1, "ranks that split the layers")
    add("ep", 1, "ranks that split the experts")
    group = parser.add_argument_group("run")
    add("out", "out", "folder of the checkpoint, log.jsonl and loss.png")
    add("restart", False, "begin again, dropping the run in --out", **flag)
    add("device", "auto", "cpu, cuda, cuda:1, ...")
    add("dtype", "auto", "of matrix products", choices=["auto", "bf16", "fp16", "fp32"])
    add("compile", "auto", "torch.compile", choices=["auto", "on", "off"])
    add("checkpoint_activations", False, "compute blocks again in the backward pass", **yes_no)
    add("log_every", 50, "steps between lines")
    add("eval_every", None, "steps between validations, 0 for only the last")
    add("save_every", 100, "steps between checkpoints, 0 for only the last")
    add("keep", 1, "checkpoints to keep")
    add("sample_every", 0, "steps between samples, 0 for only at the end")
    add("sample_prompts", None, "what to continue at the end", nargs="*")
    add("sample_tokens", 160, "tokens a sample")
    add("tensorboard", False, "log to OUT/tensorboard too", **flag)
    add("wandb", None, "Weights & Biases project to log to as well")
    add("profile", False, "show where ten steps' time goes, and stop", **flag)
    add("memory", False, "show what a batch keeps for the backward pass, and stop", **flag)
    add("bench", False, "time a step beside torch's own parts, and stop", **flag)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    try:
        train(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        distributed.close_distributed()


if __name__ == "__main__":
    main()
