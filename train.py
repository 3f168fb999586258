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
from collections import defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import count, islice, product
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


def split_documents(files):
    """Yield (document, is for validation): by a hash of its text, so the same on every machine.

    Of fewer than 200 documents the share held out whole would be left to chance, and of 20 be none
    in one case of three: there the end of each one is, from a line on.
    """
    few = list(islice(tokenizer_py.read_documents(files), 200))
    if len(few) == 200:
        for document in tokenizer_py.read_documents(files):
            digest = hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=8).digest()
            yield document, int.from_bytes(digest, "big") < VAL_FRACTION * 2**64
        return
    for document in few:
        most = int(len(document) * (1 - VAL_FRACTION))
        cut = document.rfind("\n", 0, most + 1) + 1 or most
        yield document[:cut], False
        yield document[cut:], True


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
            raise ValueError(f"--tokenizer {tokenizer_path}: no {tokenizer_py.EOT} to end texts")
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
    has_header = np.fromfile(path, np.int32, 1).tolist() == [LLM_C_MAGIC]
    return np.memmap(path, np.uint16, "r", offset=1024 if has_header else 0)


# Lists of token arrays (memory-mapped), the tokenizer (None if unknown), the name in the cache.
Data = namedtuple("Data", "train val tokenizer name")


def prepare_data(args):
    """--data -> Data. Token files are taken as they lie: those with "val" in their name, or their
    folder's, validate; without any, the last one's tail. Text is tokenised once, by rank 0."""
    if args.data:
        files = tokenizer_py.list_files(args.data)
    else:  # the library's source, 12 MB on every machine, without what differs between machines
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        files = sorted(str(f) for f in root.rglob("*.py")
                       if not skip & set(f.relative_to(root).parts))
    token_files = [f for f in files if f.endswith((".npy", ".bin"))]
    if token_files:
        train, val = [], []
        for file in token_files:
            held_out = "val" in f"{Path(file).parent.name}/{Path(file).name}"
            (val if held_out else train).append(load_tokens(file))
        if not train:
            raise ValueError("--data: every token file is named for validation")
        if not val:
            cut = len(train[-1]) - min(int(len(train[-1]) * VAL_FRACTION), 10_000_000)
            train[-1], val = train[-1][:cut], [train[-1][cut:]]
        tok = tokenizer_py.Tokenizer.load(args.tokenizer) if args.tokenizer else None
        return Data(train, val, tok, ",".join(token_files))

    size = sum(map(os.path.getsize, files))
    what = " ".join(args.data) if args.data else "Python's own standard library"
    if not size:
        raise ValueError(f"--data: no text in {what}")
    say(f"{'corpus':<12}{len(files)} files, {size / 1e6:.2f} MB, {what}")
    # the cache goes by content: the same bytes and settings have one name, wherever they lie
    settings = VAL_FRACTION, args.tokenizer or args.vocab_size
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    tokenizer = [f for f in (args.tokenizer, f"{args.tokenizer}/tokenizer.json")
                 if args.tokenizer and os.path.isfile(f)]
    for file in files + tokenizer:
        with open(file, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
        digest.update(b"\0end of file\0")
    folder = Path(args.cache) / digest.hexdigest()
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
        m, v = ([self.kept(p, name) for p in params] for name in "mv")
        self.kernel(params, [p.grad for p in params], m, v, rates, b1, b2, group["eps"])


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
            mixes = []  # one matrix at a time stays in the cache, all at once would not
            for p in params:
                buffer = self.kept(p, "buffer").lerp_(p.grad, 1 - mu)
                mixes.append(p.grad.lerp(buffer, mu))
            nesterov = torch.stack(mixes)  # (matrices, m, n)
            changes = (distributed.orthogonalize_sharded(newton_schulz, nesterov, params[0]) if cuts
                       else newton_schulz(nesterov))
            rows, columns = distributed.whole_shape(params[0])
            lr = group["lr"] * max(1, rows / columns) ** 0.5
            wd = group["lr"] * group["weight_decay"]
            for p, change in zip(params, changes):
                if wd:  # cautious: only where the step itself points to zero (Liang et al. 2024)
                    p.sub_(p * (p * change > 0) * wd if group["cautious"] else p * wd)
                p.sub_(change, alpha=lr)


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


def decay_start(args):
    """The last step at the full rate; of a WSD run its checkpoint is kept, to branch from."""
    share = {"wsd": args.decay, "constant": 0.0}.get(args.schedule, 1.0)
    return args.steps - int(share * (args.steps - args.warmup))


def schedule(step, args):
    """The factor on every learning rate at `step`: 1 is the full rate."""
    if args.schedule == "cosine":
        return cosine_schedule(step + 1, 1.0, args.min_lr, args.warmup, args.steps)
    floor = 1.0 if args.schedule == "constant" else args.min_lr
    decay_steps = args.steps - decay_start(args)
    return wsd_schedule(step + 1, 1.0, floor, args.warmup, decay_steps, args.steps)


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


@contextmanager
def uncompiled():
    """Run modules as they are written, also compiled ones: other shapes would compile anew."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it would take 1.5 s
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def checkpoint_blocks(model):
    """Keep only each block's input for the backward pass and compute the block again there."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def memory_gb(device):
    """Peak memory: the allocator's on a GPU, the process's (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- a run: model, data, optimizers ------------------------------------------------------------


@dataclass
class Run:
    """What the loop carries from step to step."""

    args: argparse.Namespace
    parallel: distributed.Parallel  # the model, spread over the ranks
    whole: model_py.Transformer  # without numbers (on "meta"), to count by
    optimizers: list
    data: Data
    windows: Windows
    device: torch.device
    dtype: torch.dtype  # of matrix products; weights are fp32
    peak: float  # FLOP/s, what MFU is measured against
    compiled: str = ""  # whether the blocks are compiled, in words
    step: int = 0  # steps done
    loss_scale: float = 1.0  # of fp16, whose gradients would vanish below 6e-8
    good_steps: int = 0  # since loss_scale last changed
    skipped: int = 0  # steps whose gradients were not finite

    @property
    def model(self):  # this rank's part of it
        return self.parallel.model

    @property
    def tokens_per_step(self):
        return self.args.batch_size * self.args.context_length

    @property
    def flops_per_token(self):
        return self.whole.flops_per_token(self.args.context_length)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


COUNTERS = ("loss_scale", "good_steps", "skipped")  # of a Run, kept in its checkpoints


def make_mesh(args):
    """--tp, --cp, --pp and --ep ranks for those; all others share the data. A --micro-batch of 0
    becomes a rank's whole share."""
    split = {axis: getattr(args, axis) for axis in ("tp", "cp", "pp", "ep")}
    data, rest = divmod(WORLD_SIZE, math.prod(split.values()))
    if rest:
        raise ValueError(f"--tp x --cp x --pp x --ep: {WORLD_SIZE} ranks are not a multiple of "
                         f"{math.prod(split.values())}; see torchrun's --nproc-per-node")
    readers, fsdp = data * args.ep, args.parallel == "fsdp"
    if args.batch_size < readers or fsdp and args.batch_size % readers:
        raise ValueError(f"--batch-size {args.batch_size}: {readers} ranks cannot share it")
    args.micro_batch = max(args.micro_batch, 0) or -(-args.batch_size // readers)
    return distributed.Mesh(**{"fsdp" if fsdp else "dp": data}, **split)


def build_run(args, device, data, folder=None, state=None):
    """All that the loop needs, from the flags, or from the checkpoint `folder` and its `state`.

    What only shows here goes into args: the vocabulary's size, the dtype, the micro-batch.
    """
    torch.manual_seed(args.seed)
    tok, source = data.tokenizer, folder or args.init_from
    if source:
        model = model_py.Transformer.from_pretrained(source, dtype=torch.float32)
        args.vocab_size = model.config.vocab_size
    else:
        args.vocab_size = tok.vocab_size if tok else args.vocab_size
        names = {f.name for f in fields(model_py.ModelConfig)} & set(vars(args))
        model = model_py.Transformer(model_py.ModelConfig(**{n: getattr(args, n) for n in names}))
    if tok and tok.vocab_size > args.vocab_size:
        raise ValueError(f"--init-from {source}: {args.vocab_size} ids, but the data's tokenizer "
                         f"has {tok.vocab_size}")
    model.to(device)
    with torch.device("meta"):
        whole = model_py.Transformer(replace(model.config))
    if args.pack and not (tok and tok.eot_id is not None):
        raise ValueError("--pack: needs a tokenizer with <|endoftext|> to find the documents by")
    windows = Windows(data.train, args.context_length, args.seed, tok.eot_id if args.pack else None)
    dtype, peak = choose_dtype(args, device)
    if args.checkpoint_activations:
        checkpoint_blocks(model)
    mesh = make_mesh(args)
    parallel = distributed.Parallel(model, mesh, args.parallel,
                                    None if dtype == torch.float32 else dtype)
    optimizers = make_optimizers(parallel.model, args)
    if args.parallel == "zero1":
        optimizers = [distributed.ShardedOptimizer(o.param_groups, type(o), mesh.group("dp", "cp"))
                      for o in optimizers]

    run = Run(args, parallel, whole, optimizers, data, windows, device, dtype, peak)
    run.loss_scale = 2.0**16 if dtype == torch.float16 else 1.0
    parallel.autocast = run.autocast
    if state:
        run.step = state["iteration"]
        for name in COUNTERS:
            setattr(run, name, state[name])
        parallel.take_state(state["optimizers"], optimizers)  # of which each rank takes its part
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["step"] = state["updates"]
    run.compiled = compile_blocks(run.model, optimizers, args, device)
    return run


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


def batches(run):
    """read_batch of step after step; for a GPU a thread reads one ahead, into pinned memory."""
    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for step in count(run.step):
            with record_function("data"):
                batch = ahead.result() if ahead else read_batch(run, step)
            if run.device.type == "cuda":
                ahead = reader.submit(read_batch, run, step + 1)
            yield batch


# ---- evaluation and samples --------------------------------------------------------------------


@torch.no_grad()
@uncompiled()
def evaluate(run, max_tokens=10**12):
    """(nats per token, bits per byte) of the validation arrays, in windows that do not overlap.

    Bits per byte divides all nats, those of <|endoftext|> too, by the bytes of the text, so it
    compares across tokenizers: nats / ln 2 / bytes; without a tokenizer it is nan. The ranks share
    the windows, and all call parallel.loss equally often: with parts of a model they need others.
    """
    args, val, tok, device = run.args, run.data.val, run.data.tokenizer, run.device
    T, B = args.context_length, args.micro_batch
    starts = [(a, i) for a in val for i in range(0, len(a) - T, T)]
    starts = starts or [(max(val, key=len), 0)]  # shorter than one window: as it is
    starts = starts[:max(1, max_tokens // T)]
    rank, ranks, readers = run.parallel.data_ranks
    mine = starts[rank::ranks]
    lengths = np.zeros(args.vocab_size)  # in bytes
    for i, word in tok.vocab.items() if tok else ():
        lengths[i] = 0 if i in tok.special_tokens.values() else len(word)
    lengths = torch.from_numpy(lengths).to(device)
    sums = np.zeros(3)  # nats, tokens, bytes of text
    run.parallel.eval()  # no balancing loss of a mixture of experts
    for i in range(0, -(-len(starts) // ranks), B):
        rows = [a[s:s + T + 1] for a, s in mine[i:i + B] or starts[:1]]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)  # (B, T + 1)
        targets = ids[:, 1:]
        nats = run.parallel.loss(ids[:, :-1], targets).item()
        if i < len(mine):  # or this rank has nothing left, and only keeps the others company
            sums += nats, targets.numel() / readers, lengths[targets].sum().item() / readers
    run.parallel.train()
    nats, tokens, text_bytes = all_reduce_sum(sums.tolist(), device)
    return nats / tokens, nats / math.log(2) / text_bytes if text_bytes else math.nan


@uncompiled()
def show_samples(run):
    """Print what the model writes after each of --sample-prompts."""
    tok, (model, _) = run.data.tokenizer, whole_state(run, [])
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
    torch.save(state, f"{out}.tmp")
    os.replace(f"{out}.tmp", out)


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


def whole_state(run, optimizers):
    """(model, {name: {key: optimizer state}}) as one process has them, whatever the layout: put
    together on rank 0 where ranks have parts, so a run can go on in another layout."""
    if run.parallel.copies_only:
        kept = [getattr(optimizer, "local", optimizer).state for optimizer in optimizers]
        return run.model, {name: next((state[p] for state in kept if p in state), {})
                           for name, p in run.model.named_parameters()}
    weights, states = run.parallel.whole_state(optimizers)
    if RANK:
        return None, None
    model = model_py.Transformer(replace(run.whole.config))
    model.load_state_dict(weights, strict=False)
    return model, states


def step_folders(out):
    """Complete checkpoints of a run, oldest first."""
    return sorted(Path(out).glob("step-[0-9]*[0-9]"), key=lambda p: int(p.name[5:]))


def save_run(run):
    """Write out/step-N whole, under another name first, and link its files into out/.

    A kill at any moment leaves the previous step-* folder intact; out/ itself always opens as a
    model. Older folders than the newest --keep go.
    """
    model, states = whole_state(run, run.optimizers)
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
        shutil.rmtree(work, ignore_errors=True)
        raise OSError(f"--out {out}: the checkpoint of step {run.step} could not be written, the "
                      f"one before it is kept ({str(error).splitlines()[0]})") from error
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


def read_state(folder):
    try:
        return torch.load(folder / "train_state.pt", "cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}/train_state.pt: cannot be read; remove {folder} to go on from "
                         "the one before it, or --restart") from error


def as_flag(name, value):
    """A setting as it is given: "--lr 0.1", "--no-qk-norm", "--betas 0.9 0.95"."""
    name = "data" if name == "data_name" else name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return " ".join(map(str, [f"--{name}", *(value if isinstance(value, list) else [value])]))


def find_run(args):
    """The checkpoint in --out to go on from, (folder, its state), or (None, None).

    Refuses a different run's. With more --steps than before it is the last one whose learning rate
    had not begun to fall. What was found by trying, and need not be found again, is taken over.
    """
    folders = step_folders(args.out)
    if not folders:
        return None, None
    folder, state = folders[-1], read_state(folders[-1])
    settings = state["settings"]
    if args.dtype == "auto":
        args.dtype = settings["dtype"]
    args.micro_batch = args.micro_batch or state.get("micro_batch", 0)
    other = [as_flag(k, settings.get(k)) for k in IDENTITY if settings.get(k) != getattr(args, k)]
    if other:
        raise ValueError(f"--out {args.out}: holds a run with {', '.join(other)}; give those, "
                         "another --out, or --restart to begin again")
    before = [f for f in folders if int(f.name[5:]) <= state["full_rate_until"]]
    if before and args.steps > state["steps"]:
        folder, state = before[-1], read_state(before[-1])
    return folder, state


def lock_run(out):
    """Refuse a second process that would write into the same folder; the lock dies with us."""
    import fcntl
    Path(out).mkdir(parents=True, exist_ok=True)
    lock = open(Path(out) / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: another run is writing there; give another --out") from None
    return lock


# ---- the log -----------------------------------------------------------------------------------


def clock(seconds):
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


class Log:
    """Rank 0's records: a line each in log.jsonl and what else was asked for, and a plot of all."""

    def __init__(self, args, resumed_at):
        self.path, self.records, self.sinks = Path(args.out) / "log.jsonl", [], []
        if RANK:
            return
        if resumed_at and self.path.exists():  # without what was logged beyond the checkpoint
            lines = self.path.read_text().splitlines()
            records = [json.loads(x) for x in lines if x.endswith("}")]  # a kill cuts lines short
            self.records = [r for r in records if r["step"] <= resumed_at]
        beside = self.path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        os.replace(beside, self.path)
        file = open(self.path, "a", buffering=1)
        self.sinks.append(lambda record: file.write(json.dumps(record) + "\n"))
        if args.wandb:
            import wandb
            run = wandb.init(project=args.wandb, dir=args.out, config=vars(args))
            self.sinks.append(lambda record: run.log(record, step=record["step"]))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(Path(args.out) / "tensorboard")
            self.sinks.append(lambda record: [board.add_scalar(k, v, record["step"])
                                              for k, v in record.items() if v is not None])

    def write(self, **record):
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}
        self.records.append(record)
        for sink in self.sinks:
            sink(record)

    def draw(self):
        """loss.png: the training loss, its running mean, and validation, against tokens."""
        if RANK:
            return
        from matplotlib.figure import Figure
        figure = Figure(figsize=(8, 4.5), dpi=110)
        axes = figure.subplots()
        (x, y), val = (np.array([(r["tokens"], r[name]) for r in self.records
                                 if r.get(name) is not None]).reshape(-1, 2).T
                       for name in ("loss", "val_loss"))
        width, total = max(1, len(y) // 50), np.append(0, y.cumsum())
        mean = (total[width:] - total[:-width]) / width
        axes.plot(x, y, color="#9ecae1", linewidth=0.8, label="training, each step")
        axes.plot(x[width - 1:], mean, color="#08519c", label=f"training, mean of {width}")
        axes.plot(*val, "o-", color="#d94801", label="validation")
        axes.set(xlabel="tokens", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        beside = self.path.with_name("loss.tmp.png")
        figure.savefig(beside, bbox_inches="tight")
        os.replace(beside, self.path.with_name("loss.png"))


# ---- the loop ----------------------------------------------------------------------------------

PARTS = ("data", "forward", "backward", "ranks", "clip", "optimizer")  # of a step, for --profile


def train_step(run, batch, stopping=False):
    """One update. Returns (mean loss, gradient norm, learning-rate factor, must stop).

    The summed loss is divided by the tokens of all micro-batches on all ranks, so neither
    accumulation nor the number of ranks changes the gradient.
    """
    args, parallel, tokens = run.args, run.parallel, run.tokens_per_step
    factor, parameters = schedule(run.step, args), list(run.model.parameters())
    total = torch.zeros((), device=run.device)
    for i, (inputs, targets) in enumerate(batch):  # gradients travel with the last micro-batch
        with parallel.no_sync() if i < len(batch) - 1 else nullcontext():
            total += parallel.loss(inputs, targets, backward_scale=run.loss_scale / tokens)
    with record_function("ranks"):
        parallel.finish()
    with record_function("clip"):
        if run.loss_scale != 1:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], run.loss_scale)
        clip = clip_grad_norm if parallel.copies_only else distributed.clip_grad_norm
        norm = clip(parameters, args.clip).item()
    loss, stop = all_reduce_sum([total.item() / tokens, float(stopping)], run.device)

    finite, fp16 = math.isfinite(loss + norm), run.dtype == torch.float16
    if fp16:  # halve the scale when gradients overflow, double it after 1,000 steps that did not
        run.good_steps = run.good_steps + 1 if finite else 0
        if not finite or run.good_steps % 1000 == 0:
            run.loss_scale *= 2.0 if finite else 0.5
    with record_function("optimizer"):
        if finite:
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group.setdefault("full_lr", group["lr"]) * factor
                optimizer.step()
            for experts in run.model.moes() if run.whole.config.balance == "bias" else ():
                if WORLD_SIZE > 1:
                    dist.all_reduce(experts.load)
                experts.balance()  # without a loss
        elif args.nonfinite == "stop" and (not fp16 or run.loss_scale < 1):
            kept = step_folders(args.out)
            raise ValueError(f"step {run.step + 1}: loss {loss}, gradient norm {norm}: stopped; "
                             f"the last good checkpoint is {kept[-1] if kept else 'none'}; try a "
                             "lower --lr, or --nonfinite skip")
        run.model.zero_grad(set_to_none=True)
    run.step += 1
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
    args, parallel, full = run.args, run.parallel, True
    parts = parallel.mesh.size("fsdp", "tp", "cp", "pp", "ep") > 1
    count = sum(p.numel() for p in run.model.parameters())
    state = torch.empty(0 if run.step else 2 * count, device=run.device)
    while full:
        try:
            for _ in range(2):  # the first call compiles
                start = time.perf_counter()
                for inputs, targets in read_batch(run, 0):
                    with parallel.no_sync():
                        loss = parallel.loss(inputs, targets, backward_scale=run.loss_scale)
                if parts:
                    parallel.finish()
                loss.item()  # waits for a GPU
                seconds = time.perf_counter() - start
            full = False
        except torch.cuda.OutOfMemoryError:
            pass
        run.model.zero_grad(set_to_none=True)
        if full and (parts or args.micro_batch == 1):
            raise ValueError(f"--micro-batch {args.micro_batch}: does not fit the GPU's memory; "
                             "lower it or --context-length, or shrink the model")
        full = all_reduce_sum([float(full)], run.device)[0]
        if full:
            torch.cuda.empty_cache()
            args.micro_batch = (args.micro_batch + 1) // 2
            say(f"{'memory':<12}full: micro-batches of {args.micro_batch} windows")
    del state
    return seconds


def describe(run, seconds_per_step):
    """What is ahead, in aligned lines."""
    args, whole, tokens = run.args, run.whole, run.tokens_per_step
    c = whole.config
    train, val = (sum(map(len, arrays)) for arrays in (run.data.train, run.data.val))
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
              f"{args.schedule}" + (f"; going on from step {run.step}" if run.step else ""),
        expected=f"{(args.steps - run.step) * seconds_per_step * 1.1 / 60:.1f} minutes\n")
    for name, text in rows.items():
        say(f"{name:<12}{text}")


def loop(run, seconds):
    """Train, log, evaluate, sample and save until --steps or a signal; a step takes `seconds`."""
    args, log, ahead = run.args, Log(run.args, run.step), batches(run)
    first, stopping, side_work = run.step, False, 0.0
    times = deque(2 * [seconds], maxlen=50)  # the first step compiles the optimizer
    losses = deque(maxlen=50)
    say(f"{'step':>13} {'loss':>7} {'lr':>6} {'gnorm':>6} {'tok/s':>8} {'MFU':>5} {'GB':>5} left")
    with noting_signals() as caught:
        while run.step < args.steps and not stopping:
            start = time.perf_counter()
            loss, norm, factor, stopping = train_step(run, next(ahead), bool(caught))
            times.append(time.perf_counter() - start)
            step, tokens, last = run.step, run.step * run.tokens_per_step, run.step == args.steps
            log.write(step=step, tokens=tokens, loss=loss, gnorm=norm, lr=factor,
                      seconds=round(times[-1], 4))
            if len(losses) == 50 and loss > np.mean(losses) + 6 * np.std(losses):
                far = (loss - np.mean(losses)) / np.std(losses)
                say(f"{step:>6}        loss spike: {loss:.4f} is {far:.0f} standard deviations "
                    "above the 50 steps before")
            if math.isfinite(loss):
                losses.append(loss)
            if step % args.log_every == 0 or step == 1 or last:
                seconds = float(np.median(times))
                left = (args.steps - step) * (seconds + side_work / max(1, step - 1 - first))
                speed = run.tokens_per_step / seconds
                mfu = speed * run.flops_per_token / run.peak / WORLD_SIZE
                say(f"{step:>6}/{args.steps:<6} {loss:7.4f} {factor:6.3f} {norm:6.2f} "
                    f"{speed:8,.0f} {mfu:5.1%} {memory_gb(run.device):5.2f} {clock(left)}"
                    + (f"  {run.skipped} skipped" if run.skipped else ""))

            start = time.perf_counter()
            if last or args.eval_every and step % args.eval_every == 0:
                nats, bits = evaluate(run) if last else evaluate(run, EVAL_TOKENS)
                log.write(step=step, tokens=tokens, val_loss=nats, bits_per_byte=bits)
                log.draw()
                say(f"{step:>6}/{args.steps:<6} validation loss {nats:.4f} nats/token, perplexity "
                    f"{math.exp(min(nats, 700)):.2f}, {bits:.4f} bits/byte")
            if args.sample_every and step % args.sample_every == 0 and not last:
                show_samples(run)
            due = args.save_every and step % args.save_every == 0
            if due or last or stopping or step == decay_start(args):
                save_run(run)  # after the evaluation: a finished run's log is complete
            side_work += time.perf_counter() - start


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
    folder, state = (None, None) if args.restart else find_run(args)
    run = build_run(args, device, data, folder, state)
    if run.step >= args.steps and not (args.profile or args.memory):
        say(f"--out {args.out}: finished, {run.step} steps; --steps {2 * run.step} goes on, "
            "--restart begins again")
        return
    for old in step_folders(args.out) if args.restart and not RANK else []:
        shutil.rmtree(old)
    seconds = warm_up(run)  # a step
    describe(run, seconds)
    if args.profile or args.memory:
        return profile_steps(run) if args.profile else report_memory(run)
    loop(run, seconds)
    if run.step < args.steps:
        say(f"stopped at step {run.step}, saved in {args.out}; the same command goes on")
        return
    show_samples(run)
    say(f"\ndone in {clock(time.time() - began)}: {args.out}/model.safetensors, loss.png, log.jsonl"
        f"\npython model.py generate --model {args.out} --prompt \"def \"")
    del lock  # held until here


# ---- where time and memory go ------------------------------------------------------------------


def profile_steps(run):
    """--profile: where ten steps' time goes, part by part, and a trace that shows every operator.

    The parts are record_function ranges. The two steps before are for Nsight: emit_nvtx makes them
    NVTX ranges on CUDA, and does not go together with the profiler.
    """
    ahead = batches(run)
    with torch.autograd.profiler.emit_nvtx(run.device.type == "cuda"):
        for _ in range(2):  # the first one compiles the optimizer
            train_step(run, next(ahead))
    with torch.profiler.profile() as profiler:
        start = time.perf_counter()
        for _ in range(10):
            train_step(run, next(ahead))
        whole = (time.perf_counter() - start) * 100  # ms a step
    events = {e.key: e for e in profiler.key_averages()}
    say(f"\n{'a step':<9} {whole:>9.2f} ms")
    say(f"{'part':<9} {'host ms':>9} {'device ms':>9} {'share':>6}")
    for name in (part for part in PARTS if part in events):
        host, device = events[name].cpu_time_total / 1e4, events[name].device_time_total / 1e4
        say(f"{name:<9} {host:>9.2f} {device:>9.2f} {max(host, device) / whole:>6.1%}")
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
    for sizes, args.optimizer in product(BENCHES[device.type], ("adamw", "muon")):
        vars(args).update(zip(BENCH_FLAGS, sizes), micro_batch=sizes[-1], compile="on")
        torch.compiler.reset()  # or sizes that differ from the ones before become dynamic
        bench_row(args, device)


def bench_row(args, device):
    ids = np.random.default_rng(0).integers(0, args.vocab_size, 2_000_000, np.uint16)
    run = build_run(args, device, Data([ids], [ids], None, "random"))
    tokens, ahead = run.tokens_per_step, batches(run)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train_step(run, next(ahead))
    memory = memory_gb(device)  # before the other model comes
    plain = model_py.Transformer(run.whole.config).to(device)
    compiled, fused = torch.compile(plain), torch.optim.AdamW(plain.parameters(), fused=True)

    def plain_step():
        (inputs, targets), = next(ahead)
        with run.autocast():
            logits = compiled(inputs).flatten(0, 1)  # (B T, V)
            loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
        loss.backward()
        fused.step()
        fused.zero_grad(set_to_none=True)
        loss.item()

    ours, theirs = median_seconds(lambda: train_step(run, next(ahead)), plain_step)
    for mine, twin in zip(run.model.parameters(), plain.parameters()):
        mine.grad = torch.randn_like(mine)
        twin.grad = mine.grad.clone()
    *update, torchs = median_seconds(*(o.step for o in [*run.optimizers, fused]))
    say(f"{plain.num_parameters() / 1e6:.1f}M".ljust(8) + f"{args.optimizer:<9} "
        f"{tokens / ours:>8,.0f} {tokens / theirs:>8,.0f} {theirs / ours:>6.2f} "
        f"{run.flops_per_token * tokens / ours / run.peak:>7.1%} {memory:>7.2f} "
        f"{sum(update) * 1e3:>10.2f} {torchs * 1e3:>12.2f}")


def median_seconds(*calls):
    """Of each call, in turns: what else the machine does holds up all of them."""
    times = np.zeros((12, len(calls)))
    for i, j in np.ndindex(*times.shape):
        start = time.perf_counter()
        calls[j]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times[i, j] = time.perf_counter() - start
    return np.median(times[4:], 0)  # the first ones compile


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
    add("data", None, "text or token (.npy, .bin) files, folders, globs; Python's library without",
        nargs="*")
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
    add("parallel", "ddp", "ranks that share the data keep a copy each, a part of the optimizer's "
        "state, or of the weights too", choices=["ddp", "zero1", "fsdp"])
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
