"""Many processes, one model: every kind of parallelism, written out on torch.distributed.

    torchrun --nproc-per-node 2 distributed.py bench
    python distributed.py plan --model 8b --gpus 1024 --gpu h100 --tokens-per-step 4194304
    torchrun --nproc-per-node 4 train.py --parallel fsdp --tp 2       # train.py runs on this file

From averaging gradients (DDP) over sharding optimizer state (ZeRO-1, Rajbhandari et al. 2019,
arXiv:1910.02054) and weights (FSDP, Zhao et al. 2023, 2304.11277) to splitting the matrices (tensor
parallel, Shoeybi et al. 2019, 1909.08053; with sequences, Korthikanti et al. 2022, 2205.05198), the
sequence (ring attention, Liu et al. 2023, 2310.01889), the layers (pipelines: GPipe 1811.06965;
1F1B and interleaved, Narayanan et al. 2021, 2104.04473) and the experts (GShard, 2006.16668).

Runs on gloo (CPU) and NCCL (GPU). Shapes: B batch, T time, D d_model, H heads, K key/value heads,
E d_head, V vocabulary, F d_ff; N ranks of the group at hand.
"""

import argparse
import atexit
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict, namedtuple
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._utils import _flatten_dense_tensors as flatten
from torch._utils import _unflatten_dense_tensors as unflatten
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# torch 2.13 gave two collectives new names
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# ---- start-up ----------------------------------------------------------------------------------


def init_distributed(device="auto"):
    """Join torchrun's ranks, or be the only rank of a world of one; returns this rank's device.

    NCCL where the device is a GPU, gloo elsewhere. The ranks of a machine share its cores out,
    unless OMP_NUM_THREADS says how many threads to take. From torchrun a 1 counts as unset, since
    it sets that by itself; to hold ranks to fewer cores than there are, use taskset.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device, options = torch.device(device), dict(backend="gloo")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        options = dict(backend="nccl", device_id=device)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = os.environ.get("OMP_NUM_THREADS")
    if not threads or (threads == "1" and ranks_here > 1):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // ranks_here))
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            options |= dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(**options)
        atexit.register(close_distributed)
    return device


def close_distributed():
    """Leave the ranks; also done when the process ends.

    The pause is gloo's: its threads drop a finished collective's tensors a moment after wait()
    returns. If the interpreter has begun to end by then, the process aborts ("terminate called
    without an active exception", one exit in 30 on busy cores).
    """
    if dist.is_initialized():
        pause = 0.3 if dist.get_backend() == "gloo" else 0
        dist.destroy_process_group()
        time.sleep(pause)


class Mesh:
    """The ranks as a box with a side for each kind of parallelism; neighbours are tensor parallel.

    Of 8 ranks, Mesh(fsdp=4, tp=2) puts 0 and 1 in a tensor-parallel group, and 0, 2, 4, 6 in an
    FSDP one. dp copies the model, ep splits its experts (and its data), cp the sequence.
    """

    def __init__(self, pp=1, dp=1, fsdp=1, ep=1, cp=1, tp=1):
        self.sizes = dict(pp=pp, dp=dp, fsdp=fsdp, ep=ep, cp=cp, tp=tp)
        world, asked = dist.get_world_size(), self.size(*self.sizes)
        if asked != world:
            product = " x ".join(f"{a} {n}" for a, n in self.sizes.items() if n != 1) or "1"
            raise ValueError(f"Mesh: {product} = {asked} ranks, but there are {world}")
        self.ranks = np.arange(world).reshape(list(self.sizes.values()))
        self.groups = {}
        for axis in self.sizes:
            self.group(axis)

    def group(self, *axes):
        """The ranks that differ from this one along `axes` only.

        A new combination is made by all ranks together: ask for it everywhere, in the same order.
        """
        key = tuple(a for a, n in self.sizes.items() if a in axes and n > 1)
        if key not in self.groups:
            index = [list(self.sizes).index(a) for a in key]
            rows = np.moveaxis(self.ranks, index, range(-len(index), 0))
            rows = rows.reshape(-1, self.size(*key)).tolist()
            self.groups[key], _ = dist.new_subgroups_by_enumeration(rows)
        return self.groups[key]

    def size(self, *axes):
        return math.prod(self.sizes[a] for a in axes)

    def rank(self, *axes):
        return dist.get_rank(self.group(*axes))


def gather_objects(value, group=None):
    """What every rank of the group gave, on every one of them."""
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def start_alike(module, group=None):
    """Give every rank the parameters and buffers of the group's first rank. Ranks whose parameters
    differ in name, shape or type are refused: they would wait for ever."""
    tensors = [*module.parameters(), *module.buffers()]
    if not tensors or tensors[0].is_meta:
        return
    mine = [(name, tuple(p.shape), p.dtype) for name, p in module.named_parameters()]
    everyone = gather_objects(mine, group)
    if any(other != everyone[0] for other in everyone):
        raise ValueError("the ranks' models differ in the names, shapes or types of their "
                         "parameters; give every rank the same flags and checkpoint")
    for tensor in tensors:
        dist.broadcast(tensor.data, group=group, group_src=0)


# ---- collectives, with gradients ---------------------------------------------------------------


class CommCounter(TorchDispatchMode):
    """Counts what every collective makes this rank send, in bytes, by the ring algorithm.

    Of a whole tensor of S bytes: all-gather and reduce-scatter S (N-1)/N, all-reduce twice that,
    broadcast and point-to-point S, all-to-all what goes to others. `log` has (name, bytes, N).
    """

    NAMES = {"allreduce_": ("all_reduce", 2), "_allgather_base_": ("all_gather", 1),
             "_reduce_scatter_base_": ("reduce_scatter", 1), "alltoall_base_": ("all_to_all", 1),
             "broadcast_": ("broadcast", None), "send": ("send", None)}

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if function.namespace == "c10d" and name in self.NAMES:
            label, times = self.NAMES[name]
            tensors = args[0] if isinstance(args[0], (list, tuple)) else args[:2]
            size = max(t.nbytes for t in tensors if torch.is_tensor(t))
            group = next(a for a in args if isinstance(a, torch.ScriptObject))
            group = dist.ProcessGroup.unbox(group)
            n = group.size()
            sent = size if times is None else times * size * (n - 1) / n
            if label == "all_to_all" and args[4]:  # uneven: all rows but those for itself
                sent = args[1][:1].nbytes * (sum(args[4]) - args[4][group.rank()])
            self.log.append((label, sent, n))
        return function(*args, **(kwargs or {}))

    def total(self, label=None):
        return sum(size for name, size, _ in self.log if label in (None, name))


def summable(x, group):
    """x in the type its sum is made in: gloo's half-precision sums would add up their rounding."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if half and dist.get_backend(group) == "gloo" else x


def all_reduce(x, group):
    """The sum over the group, as a new tensor."""
    total = summable(x, group).clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)


def all_gather(x, group, dim=0):
    """Every rank's x, one after the other along dim."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    all_gather_single(out.flatten(0, 1), x.contiguous(), group=group)
    return torch.cat(out.unbind(0), dim) if dim else out.flatten(0, 1)


def reduce_scatter(x, group, dim=0):
    """This rank's piece along dim of the sum over the group."""
    n = dist.get_world_size(group)
    pieces = summable(torch.cat(x.chunk(n, dim)) if dim else x.contiguous(), group)
    out = pieces.new_empty(pieces.shape[0] // n, *pieces.shape[1:])
    reduce_scatter_single(out, pieces, group=group)
    return out.to(x.dtype)


def cut(x, group, dim=0):
    """This rank's piece along dim of what every rank has, zeros filling up the last ones."""
    n, dim = dist.get_world_size(group), dim % x.ndim
    padding = [0, 0] * (x.ndim - 1 - dim) + [0, -x.shape[dim] % n]
    return F.pad(x, padding).chunk(n, dim)[dist.get_rank(group)].clone()


def all_to_all(x, group, sends=None, receives=None):
    """Rows of x to the ranks, sends[r] of them to r; as many to each where nothing is said."""
    out = x.new_empty(sum(receives), *x.shape[1:]) if receives else torch.empty_like(x)
    dist.all_to_all_single(out, x.contiguous(), receives, sends, group=group)
    return out


def finish(works):
    while works:  # once each: gloo would wait for another message the second time
        works.pop().wait()


class Exchange(torch.autograd.Function):
    """there(x, *args) forward, back(dy, *args) backward: a collective and its conjugate."""

    @staticmethod
    def forward(ctx, x, there, back, *args):
        ctx.back, ctx.args = back, args
        return there(x, *args)

    @staticmethod
    def backward(ctx, dy):
        return ctx.back(dy.contiguous(), *ctx.args), None, None, *(None for _ in ctx.args)


def sum_gradients(parameters, group=None):
    """Sum the gradients over the group in one message: 2 (N-1)/N of their bytes."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    flat = flatten(grads)
    dist.all_reduce(flat, group=group)
    torch._foreach_copy_(grads, unflatten(flat, grads))


# ---- pieces of a parameter ---------------------------------------------------------------------
# A split parameter has .splits, a list of (dim, group, size): cut along dim, of `size` before the
# cut, into the group's ranks, padded to equal pieces; cuts lie in each other in that order. .parts
# says how many ranks hold different parts of the model here, .full_name its name in the model of
# one process where that is not its own, .kind whether its gradient is "partial" (to be summed over
# the tensor-parallel ranks too), an "expert"'s (not over the expert-parallel ones) or a "tied"
# table's (over a pipeline's two ends, too).


def split_parameter(p, group, dim=0):
    """p -> a Parameter that holds this rank's piece along dim."""
    piece = nn.Parameter(cut(p.detach(), group, dim), p.requires_grad)
    piece.__dict__.update(p.__dict__)  # .full_name, .kind
    piece.splits = [*getattr(p, "splits", []), (dim, group, p.shape[dim])]
    piece.parts = getattr(p, "parts", 1) * dist.get_world_size(group)
    return piece


def whole(x, p):
    """Gather x, which is cut as the parameter p is (its gradient, its momentum, p itself)."""
    x = x.detach()
    for dim, group, size in reversed(getattr(p, "splits", [])):
        x = all_gather(x, group, dim).narrow(dim, 0, size)
    return x


def whole_shape(p):
    """The shape p has in the model of one process."""
    shape = list(p.shape)
    for dim, _, size in reversed(getattr(p, "splits", [])):
        shape[dim] = size
    return tuple(shape)


def box(p):
    """(first index, one past the last) per dimension of this rank's piece of p in the whole."""
    low, high = [0] * p.ndim, list(whole_shape(p))
    for dim, group, size in getattr(p, "splits", []):
        rows = -(-size // dist.get_world_size(group))
        low[dim] += dist.get_rank(group) * rows
        high[dim] = min(high[dim], low[dim] + rows)
    return low, high


def named(model):
    """(name in the model of one process, parameter) of all parameters."""
    return [(getattr(p, "full_name", name), p) for name, p in model.named_parameters()]


def clip_grad_norm(parameters, max_norm, group=None):
    """Scale gradients so that the norm over all parts of the model is at most max_norm; returns
    the norm. A part that several ranks hold alike counts once: each adds its share of it."""
    parameters = [p for p in parameters if p.grad is not None]
    device = parameters[0].grad.device if parameters else None
    square = torch.zeros((), dtype=torch.float64, device=device)
    for p in parameters:
        square += p.grad.double().square().sum() * getattr(p, "parts", 1)
    dist.all_reduce(square, group=group)
    norm = (square / dist.get_world_size(group)).sqrt().float()
    if max_norm:
        for p in parameters:
            p.grad.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


# ---- data parallel -----------------------------------------------------------------------------


@contextmanager
def no_sync(self):
    """Gradients of the backward passes inside only add up, on this rank."""
    self.syncing = False
    try:
        yield
    finally:
        self.syncing = True


class DDP(nn.Module):
    """Every rank has the whole model and part of the batch; gradients are averaged.

    naive    one all-reduce a parameter, after the backward pass
    flat     one all-reduce for all of them: the latency once
    overlap  one a parameter, as soon as its gradient is there, while the backward pass goes on
    bucket   the same for buckets of bucket_mb MiB: both (Li et al. 2020, arXiv:2006.15704)

    Each step sends 2 (N-1)/N times (the bytes of the gradients + 4 a parameter, which tell whether
    any rank has used it: what none has used keeps no gradient). average=False sums instead.
    """

    no_sync = no_sync

    def __init__(self, module, mode="bucket", bucket_mb=25, group=None, average=True):
        super().__init__()
        limits = {"naive": 0, "flat": math.inf, "overlap": 0, "bucket": bucket_mb * 2**20}
        if mode not in limits:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(limits)}")
        start_alike(module, group)
        self.module, self.group, self.syncing = module, group, True
        self.scale = 1 / dist.get_world_size(group) if average else 1
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.buckets, self.bucket_of, room = [], {}, 0
        for p in self.params[::-1]:  # the last layer's gradients come first
            if not self.buckets or p.nbytes > room or p.dtype != self.buckets[-1][0].dtype:
                self.buckets.append([])
                room = limits[mode]
            self.buckets[-1].append(p)
            self.bucket_of[p] = len(self.buckets) - 1
            room -= p.nbytes
            if mode in ("overlap", "bucket"):
                p.register_post_accumulate_grad_hook(self.ready)
        self.missing = [len(bucket) for bucket in self.buckets]  # gradients not there yet
        self.flying = []  # (work, flat gradients) of the buckets on their way

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def ready(self, p):
        """Hook: p has its gradient. Buckets leave in their order, so that all ranks agree on it,
        whichever parameters a rank leaves unused."""
        if not self.syncing:
            return
        if self.bucket_of[p] < len(self.flying):
            raise RuntimeError("a second backward pass before finish_gradient_synchronization(); "
                               "put the first ones under no_sync()")
        self.missing[self.bucket_of[p]] -= 1
        while len(self.flying) < len(self.buckets) and not self.missing[len(self.flying)]:
            self.send()

    def send(self):
        bucket = self.buckets[len(self.flying)]
        flat = flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in bucket])
        self.flying.append((dist.all_reduce(flat, group=self.group, async_op=True), flat))

    def finish_gradient_synchronization(self):
        """Send what has not been sent, wait for everything, put the gradients in place."""
        used = torch.tensor([float(p.grad is not None) for p in self.params],
                            device=self.params[0].device)
        while len(self.flying) < len(self.buckets):
            self.send()
        dist.all_reduce(used, group=self.group)
        used = dict(zip(self.params, used.tolist()))
        for (work, flat), bucket in zip(self.flying, self.buckets):
            work.wait()
            for p, piece in zip(bucket, unflatten(flat.mul_(self.scale), bucket)):
                p.grad = piece if used[p] else None
        self.missing, self.flying = [len(bucket) for bucket in self.buckets], []


class ShardedOptimizer(torch.optim.Optimizer):
    """ZeRO-1: each rank keeps the optimizer state of 1/N of the parameters and updates those.

    Whole parameters, the largest first to whoever has least, so Muon's matrices stay whole. The
    optimizer inside knows all of them, but sees the gradients of this rank's only: to others it
    does nothing, and keeps nothing for them. A step ends with each rank broadcasting what it
    updated: the bytes of the parameters, in all.
    """

    def __init__(self, params, optimizer_cls, group=None, **kwargs):
        self.group, self.owner = group, {}
        self.held = [0] * dist.get_world_size(group)  # elements a rank
        self.local = optimizer_cls(params, **kwargs)
        super().__init__(self.local.param_groups, self.local.defaults)
        self.param_groups, self.state = self.local.param_groups, self.local.state

    def add_param_group(self, param_group):
        if all(param_group is not g for g in self.local.param_groups):
            self.local.add_param_group(param_group)
        for p in sorted(param_group["params"], key=lambda p: -p.numel()):
            self.owner[p] = min(range(len(self.held)), key=self.held.__getitem__)
            self.held[self.owner[p]] += p.numel()

    def owns(self, p):
        return self.owner[p] == dist.get_rank(self.group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        others = {p: p.grad for p in self.owner if not self.owns(p)}
        for p in others:
            p.grad = None
        self.local.step()
        for p, grad in others.items():
            p.grad = grad
        for rank in range(len(self.held)):
            if params := [p for p, owner in self.owner.items() if owner == rank]:
                flat = flatten([p.detach() for p in params])
                dist.broadcast(flat, group=self.group, group_src=rank)
                torch._foreach_copy_(params, unflatten(flat, params))
        return loss

    def state_dict(self):
        """As the optimizer would give it in one process, on the CPU; every rank must ask."""
        mine = self.local.state_dict()
        state = {i: {k: v.cpu() if torch.is_tensor(v) else v for k, v in s.items()}
                 for i, s in mine["state"].items()}  # a pickled tensor keeps its sender's device
        shares = gather_objects(state, self.group)
        return mine | {"state": {i: s for share in shares for i, s in share.items()}}

    def load_state_dict(self, state_dict):
        """Take this rank's share of a whole state."""
        params = [p for g in self.param_groups for p in g["params"]]
        mine = {i: s for i, s in state_dict["state"].items() if self.owns(params[i])}
        self.local.load_state_dict(state_dict | {"state": mine})
        self.param_groups, self.state = self.local.param_groups, self.local.state


# ---- fully sharded data parallel ---------------------------------------------------------------


class ShardedLayer:
    """The 2-D weights of one layer: each rank keeps 1/N of the rows of every one.

    gather() starts an all-gather of each; wait() puts the whole weights into the modules. These are
    the same tensors all the time, since autograd remembers them: between uses only their storage
    goes (resize_(0)), which is what frees the memory. It has room for the last rank's padding.
    """

    def __init__(self, places, fsdp):  # {parameter: [(module, name), ...]}: several, if tied
        self.fsdp, self.places = fsdp, list(places.values())
        self.n = dist.get_world_size(fsdp.group)
        self.shards = [split_parameter(p, fsdp.group) for p in places]
        self.full = [nn.Parameter(torch.empty(p.shape, dtype=fsdp.compute_dtype or p.dtype,
                                              device=p.device), p.requires_grad) for p in places]
        self.gathering, self.gathered = [], True  # works; or on the way
        self.free()

    def show(self, weights):
        for weight, places in zip(weights, self.places):
            for module, name in places:
                module._parameters[name] = weight

    def gather(self):
        if self.gathered:
            return
        for full, shard in zip(self.full, self.shards):
            full.untyped_storage().resize_(self.n * shard.numel() * full.element_size())
            # .data, since autograd must not take this for a change of the weight
            room = full.data.as_strided((self.n * shard.shape[0], shard.shape[1]), full.stride())
            self.gathering.append(all_gather_single(room, shard.detach().to(full.dtype),
                                                    group=self.fsdp.group, async_op=True))
        self.gathered = True

    def wait(self):
        self.gather()
        finish(self.gathering)
        self.show(self.full)

    def free(self):
        finish(self.gathering)
        if self.gathered:
            for full in self.full:
                full.untyped_storage().resize_(0)
            self.show(self.shards)
            self.gathered = False

    def done(self, *_):
        """After its backward pass: free the layer, and start to reduce-scatter its gradients, when
        those of the layer before have arrived. Until then the sent ones stay in memory."""
        fsdp = self.fsdp
        if fsdp.syncing and any(full.grad is not None for full in self.full):
            fsdp.settle()
            for full, shard in zip(self.full, self.shards):
                if not full.requires_grad:
                    continue
                grad = torch.zeros_like(full) if full.grad is None else full.grad
                full.grad, padding = None, self.n * shard.shape[0] - len(full)
                grad = grad.to(fsdp.reduce_dtype)
                grad = F.pad(grad, (0, 0, 0, padding)) if padding else grad.contiguous()
                out = grad.new_empty(shard.shape)
                work = reduce_scatter_single(out, grad, group=fsdp.group, async_op=True)
                fsdp.reducing.append((work, out, shard))
        self.free()


class FSDP(nn.Module):
    """Weights, gradients and optimizer state sharded over the ranks (ZeRO-3).

    A layer is a member of a ModuleList, or where there is none, a module without children. It is
    gathered before it runs and freed after it, in both passes: `prefetch` layers are gathered or on
    their way at any time, layer l + prefetch only once l is done. What lies outside the layers or
    is shared by several (embedding, head) stays gathered from the forward pass to its gradient.
    Parameters of other dimensions are small: they stay whole, their gradients are all-reduced.

    Weights travel in compute_dtype (their own if None), gradients in reduce_dtype; the optimizer
    sees shards in the weights' own dtype. With W weights, w of them outside the layers, a step
    sends (N-1)/N of 2 (W - w) + w in compute_dtype and W in reduce_dtype: three halves of DDP's
    bytes. Layers must be registered in the order of their use. A rank may skip some weights of a
    layer, but not a whole one, nor a table that others use.
    """

    no_sync = no_sync

    def __init__(self, module, compute_dtype=None, reduce_dtype=torch.float32, prefetch=2,
                 group=None, average=True):
        super().__init__()
        start_alike(module, group)
        self.module, self.group, self.prefetch = module, group, max(1, prefetch)
        self.compute_dtype, self.reduce_dtype = compute_dtype, reduce_dtype
        self.scale = 1 / dist.get_world_size(group) if average else 1
        self.syncing, self.backward_runs = True, False
        self.reducing = []  # (work, result, shard) on their way
        self.small = [p for p in module.parameters() if p.ndim != 2 and p.requires_grad]
        modules, places = list(module.modules()), {}  # {parameter: [(module, name), ...]}
        for m in modules:
            for name, p in m._parameters.items():
                if p is not None and p.ndim == 2:
                    places.setdefault(p, []).append((m, name))
        blocks = [b for m in modules if isinstance(m, nn.ModuleList) for b in m]
        self.order = []
        for block in blocks or [m for m in modules if not list(m.children())]:
            inside = set(block.modules())
            inner = [p for p, uses in places.items() if all(m in inside for m, _ in uses)]
            if inner:
                layer = ShardedLayer({p: places.pop(p) for p in inner}, self)
                self.order.append(layer)
                block.register_forward_pre_hook(partial(self.before, layer))
                block.register_forward_hook(partial(self.after, layer))
        self.root = [ShardedLayer({p: uses}, self) for p, uses in places.items()]
        for layer in self.root:  # of one weight each: done when that has its gradient
            if layer.full[0].requires_grad:
                layer.full[0].register_post_accumulate_grad_hook(layer.done)

    def before(self, layer, module, inputs):
        i = self.order.index(layer)
        for ahead in () if self.backward_runs else self.order[i:i + self.prefetch]:
            ahead.gather()
        layer.wait()

    def after(self, layer, module, inputs, output):
        if self.backward_runs:  # a layer that activation checkpointing runs again
            return
        layer.free()
        for tensor in (output,) if torch.is_tensor(output) else output:
            if torch.is_tensor(tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self.before_backward, layer))
        for tensor in inputs if layer is self.order[0] else ():  # no layer before it will say so
            if torch.is_tensor(tensor) and tensor.requires_grad:
                tensor.register_hook(layer.done)

    def before_backward(self, layer, grad):
        self.backward_runs = True
        i = self.order.index(layer)
        for later in self.order[:i:-1]:  # these have the gradients of all weights that were used
            later.done()
        for ahead in self.order[max(0, i + 1 - self.prefetch):i + 1][::-1]:
            ahead.gather()
        layer.wait()

    def forward(self, *args, function=None, **kwargs):
        self.backward_runs = False
        for layer in self.root:
            layer.wait()
        output = (function or self.module)(*args, **kwargs)
        for layer in () if torch.is_grad_enabled() else self.root:
            layer.free()
        return output

    def loss(self, *args, **kwargs):
        """module.loss, for models that have it."""
        return self(*args, function=self.module.loss, **kwargs)

    def settle(self):
        """Wait for the reductions under way; their results join the shards' gradients."""
        for work, out, shard in self.reducing:
            work.wait()
            grad = out.mul_(self.scale).to(shard.dtype)
            shard.grad = grad if shard.grad is None else shard.grad + grad
        self.reducing = []

    def finish_gradient_synchronization(self):
        """Reduce what is left (the first layer, if its inputs need no gradient); wait for all."""
        for layer in (*self.root, *self.order):
            layer.done()
        self.settle()
        if self.syncing:
            for p in self.small:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.mul_(self.scale)
            sum_gradients(self.small, self.group)
        self.backward_runs = False

    def clip_grad_norm_(self, max_norm):
        return clip_grad_norm(self.module.parameters(), max_norm, self.group)

    def full_state_dict(self):
        """The whole weights on every rank, in their own dtype, under the module's own names."""
        return {name: whole(p, p) if isinstance(p, nn.Parameter) else p
                for name, p in self.module.state_dict(keep_vars=True).items()}


# ---- tensor parallel ---------------------------------------------------------------------------
# Between its matrices, the ranks of the group split the sequence: (B, T/N, D). What each does to
# the whole of it needs all of it first, and partial results add up while they are split again.


def gather_sequence(x, group):
    """(B, T/N, D) -> (B, T, D); backwards the sum of all ranks' gradients is split."""
    return Exchange.apply(x, all_gather, reduce_scatter, group, 1)


def scatter_sequence(x, group):
    """Partial sums (B, T, D) -> (B, T/N, D); backwards the gradients are gathered."""
    return Exchange.apply(x, reduce_scatter, all_gather, group, 1)


class VocabParallelEmbedding(nn.Module):
    """A table whose rows are split: each rank looks up the ids it has, and the results add up."""

    def __init__(self, embedding, group):
        super().__init__()
        self.weight, self.group = split_parameter(embedding.weight, group), group
        self.first = dist.get_rank(group) * len(self.weight)

    def forward(self, ids):
        local = ids - self.first
        here = (local >= 0) & (local < len(self.weight))
        rows = F.embedding(local.clamp(0, len(self.weight) - 1), self.weight)
        return scatter_sequence(rows * here[..., None], self.group)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(z)[target] where each rank has columns first .. first + V/N of z.

    z (tokens, V/N) fp32. Three numbers a token go round, not the logits: the largest one, the sum
    of the exponentials, the target's.
    """

    @staticmethod
    def forward(ctx, z, targets, first, group, ignore_index):
        top = z.amax(-1)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        p = (z - top[:, None]).exp_()
        local, kept = targets - first, targets != ignore_index
        here = (local >= 0) & (local < z.shape[1]) & kept
        local = local.clamp(0, z.shape[1] - 1)[:, None]
        picked = z.gather(1, local)[:, 0].masked_fill(~here, 0)
        size, picked = all_reduce(torch.stack((p.sum(-1), picked)), group)
        ctx.save_for_backward(p.div_(size[:, None]), local, here, kept)
        return ((size.log() + top - picked) * kept).sum()

    @staticmethod
    def backward(ctx, grad):
        p, local, here, kept = ctx.saved_tensors
        dz = p.scatter_add(1, local, -here[:, None].to(p.dtype)) * kept[:, None]
        return dz * grad, None, None, None, None


def row_parallel(linear, group, x):
    """What a linear layer makes of inputs x (B, T, F/N) that the ranks share: sums (B, T/N, D)."""
    bias = None if linear.bias is None else linear.bias / dist.get_world_size(group)
    return scatter_sequence(F.linear(x, linear.weight, bias), group)


def tensor_parallel_head(model, group, hidden, gather=True):
    """Transformer.head of a model that is split: logits (B, T, V) in fp32 on every rank. Or this
    rank's columns of them (B, T, V/N), -inf where the table is padding."""
    c = model.config
    weight = (model.embed if c.tie_embeddings else model.lm_head).weight
    z = F.linear(gather_sequence(hidden, group), weight).float()
    if c.logit_softcap:
        z = c.logit_softcap * torch.tanh(z / c.logit_softcap)
    first = dist.get_rank(group) * len(weight)
    if first + len(weight) > c.vocab_size:
        columns = torch.arange(first, first + len(weight), device=z.device)
        z = z.masked_fill(columns >= c.vocab_size, -math.inf)
    return Exchange.apply(z, all_gather, cut, group, -1)[..., :c.vocab_size] if gather else z


def tensor_parallel_loss(model, group, ids, targets, reduction="mean", ignore_index=-100):
    """Transformer.loss of a model that is split: the logits are never whole anywhere."""
    z = tensor_parallel_head(model, group, model.hidden(ids), gather=False)
    z = z.flatten(0, 1)  # (B T, V/N)
    first = dist.get_rank(group) * z.shape[-1]
    total = VocabParallelCrossEntropy.apply(z, targets.flatten(), first, group, ignore_index)
    return total / (targets != ignore_index).sum() if reduction == "mean" else total


def tensor_parallel(model, group):
    """Split our Transformer's matrices over the group; returns the parameters that are not cut:
    these see only some positions or heads, so call sum_gradients(them, group) after backward().

    Attention has H/N heads on a rank, the feed-forward network F/N columns: the first matrix of
    each is cut by rows of W (its outputs), the second by columns (its inputs). What lies between
    the parts is split along T, which must be a multiple of N: 4 all-gathers and 4 reduce-scatters
    a layer, of B T D numbers each, and 1/N of the activations.
    """
    n, c = dist.get_world_size(group), model.config
    for name in ("num_heads", "num_kv_heads", "d_ff"):
        if getattr(c, name) % n:
            raise ValueError(f"tensor parallel: {name}={getattr(c, name)} is not a multiple of {n}")
    if c.num_experts or c.kv_rank or c.value_embeddings or c.qk_norm == "full":
        raise ValueError(f"tensor parallel: num_experts={c.num_experts}, kv_rank={c.kv_rank}, "
                         f"value_embeddings={c.value_embeddings} must be 0, qk_norm not 'full'")
    for name, m in list(model.named_modules()):
        part = name.rpartition(".")[2]
        if part in ("attn", "ffn"):
            m.register_forward_pre_hook(
                lambda m, args: (gather_sequence(args[0], group), *args[1:]))
        elif part in ("q", "k", "v", "w1", "w3", "lm_head"):  # W (F, D) -> (F/N, D)
            for p_name, p in list(m.named_parameters()):
                m.register_parameter(p_name, split_parameter(p, group))
        elif part in ("o", "w2"):  # W (D, F) -> (D, F/N)
            m.weight = split_parameter(m.weight, group, 1)
            m.forward = partial(row_parallel, m, group)
        elif part == "pos":  # (T, D) -> (T/N, D)
            m.register_forward_hook(lambda m, x, y: cut(y, group, -2))
    model.embed = table = VocabParallelEmbedding(model.embed, group)
    partials = [p for p in model.parameters() if not hasattr(p, "splits")]
    for p in partials:
        p.kind = "partial"
    model.loss = partial(tensor_parallel_loss, model, group)
    model.head = partial(tensor_parallel_head, model, group)
    positions, length = model.positions, c.context_length
    c.context_length += -length % n  # room for padding, which has the last position
    model.positions = lambda T, device: positions(  # a pipeline's later stages see T/N positions
        T if model.embed is table else T * n, device).clamp(max=length - 1)
    return partials


# ---- context parallel --------------------------------------------------------------------------


def zigzag(x, group, dim=1):
    """This rank's share of a sequence: chunks r and 2N-1-r of 2N, so that causal work is even.

    Of 8 tokens, rank 0 of 2 has 0 1 6 7 and rank 1 has 2 3 4 5: each 18 of the 36 pairs.
    """
    n, r = dist.get_world_size(group), dist.get_rank(group)
    if x.shape[dim] % (2 * n):
        raise ValueError(f"context parallel over {n}: {x.shape[dim]} tokens are not a multiple of "
                         f"{2 * n}")
    chunks = x.chunk(2 * n, dim)
    return torch.cat((chunks[r], chunks[2 * n - 1 - r]), dim)


def attention_with_lse(q, k, v, causal):
    """Attention of q (B, T, H, E) over k, v (B, S, K, E) -> (B, T, H, E), and the log-sum-exp of
    each row's scores (B, H, T). kernels.py's on a GPU, plain elsewhere."""
    if q.device.type == "cuda":
        from kernels import flash_attention
        return flash_attention(q, k, v, causal=causal, return_lse=True)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, E)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp().to(v.dtype) @ v).transpose(1, 2), lse


def shift(x, group, by, works=None):
    """Pass x on to the rank `by` further in the ring, and return what comes from the other side:
    as soon as `works` are finished, if given, or now."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    came, x = torch.empty_like(x), x.contiguous()
    started = dist.batch_isend_irecv([
        dist.P2POp(dist.isend, x, group=group, group_peer=(rank + by) % n),
        dist.P2POp(dist.irecv, came, group=group, group_peer=(rank - by) % n)])
    if works is None:
        finish(started)
    else:
        works += started
    return came


def merge(out, lse, new_out, new_lse):
    """Attention to two sets of keys, from attention to each and its log-sum-exp:
    out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i)."""
    both = torch.logaddexp(lse, new_lse)  # (B, H, T)
    old, new = ((part - both).exp().mT[..., None].to(out.dtype) for part in (lse, new_lse))
    return old * out + new * new_out, both


def ring(q, k, v, group):
    """What ring_attention does, with a graph that keeps all keys and values that came by."""
    n, rank, half = dist.get_world_size(group), dist.get_rank(group), q.shape[1] // 2
    coming, works = torch.stack((k, v)), []
    for step in range(n):
        finish(works)
        kv = coming  # of the rank `step` before this one
        if step < n - 1:  # the next ones travel while these are attended to
            coming = Exchange.apply(kv, partial(shift, group=group, by=1, works=works),
                                    partial(shift, group=group, by=-1))
        if step == 0:
            out, lse = attention_with_lse(q, *kv, causal=True)
        elif step <= rank:  # an earlier rank's: their first half is in the past of all queries
            out, lse = merge(out, lse, *attention_with_lse(q, *kv[:, :, :half], causal=False))
        else:  # a later rank's: all are in the past of the second half
            late = merge(out[:, half:], lse[..., half:],
                         *attention_with_lse(q[:, half:], *kv, causal=False))
            out = torch.cat((out[:, :half], late[0]), 1)
            lse = torch.cat((lse[..., :half], late[1]), -1)
    return out


def ring_attention(q, k, v, group=None):
    """Causal attention where each rank has zigzag()'s share: q (B, T/N, H, E), k, v (.., K, E).

    Keys and values travel round a ring; at each of N steps a rank attends to those of the rank
    `step` before it, half a block for every rank. The backward pass goes round once more, since
    the forward one keeps q, k and v only, and sends the keys' gradients home the other way. Sent:
    (N-1) times k and v in the forward pass, twice that in the backward one.
    """
    return checkpoint(ring, q, k, v, group, use_reentrant=False)


def context_parallel(model, group):
    """Let our Transformer run on zigzag()'s shares of its sequences. Every gradient is partial."""
    c, n = model.config, dist.get_world_size(group)
    if c.sliding_window or c.attention_softcap or c.kv_rank:
        raise ValueError("context parallel: no sliding_window, attention_softcap or kv_rank here")
    c.attention = partial(ring_attention, group=group)
    model.positions = lambda T, device: zigzag(torch.arange(T * n, device=device), group, dim=0)


# ---- pipeline parallel -------------------------------------------------------------------------


def pipeline_order(rank, p, m, schedule, chunks=1):
    """What a rank does, one after the other: ("F" or "B", micro-batch, stage).

    gpipe: all forward passes, then all backward. 1f1b: as soon as it can, one of each in turns, so
    rank r keeps p - r micro-batches in memory, not m. interleaved: 1f1b with `chunks` thin stages
    a rank, p micro-batches through one and then the next, which divides the bubble by their number.

    pipeline_order(0, 2, 3, "1f1b") is F0 F1 B0 F2 B1 B2, on rank 1 it is F0 B0 F1 B1 F2 B2.
    """
    n = m * chunks
    early = min(n, {"gpipe": n, "1f1b": p - rank - 1,  # forward passes before the first backward
                    "interleaved": (p - rank - 1) * 2 + (chunks - 1) * p}[schedule])
    turns = [(k // (p * chunks) * p + k % p, k // p % chunks) for k in range(n)]
    forward = [("F", micro, chunk * p + rank) for micro, chunk in turns]
    backward = [("B", micro, (chunks - 1 - chunk) * p + rank) for micro, chunk in turns]
    both = itertools.chain.from_iterable(zip(forward[early:], backward))
    return [*forward[:early], *both, *backward[n - early:]]


def pipeline_table(p, m, schedule="1f1b", chunks=1):
    """Rows are ticks, columns ranks; an entry is what the rank does, or None: the bubble.

    One entry takes one tick. Of gpipe's and 1f1b's 2 (m + p - 1) ticks a rank idles 2 (p - 1): a
    share of (p - 1) / (m + p - 1); interleaved (p - 1) / (m chunks + p - 1).
    """
    if schedule not in ("gpipe", "1f1b", "interleaved"):
        raise ValueError(f"schedule {schedule!r} is not one of gpipe, 1f1b, interleaved")
    if schedule == "interleaved" and m % p:
        raise ValueError(f"interleaved: {m} micro-batches are not a multiple of {p} ranks")
    left = [pipeline_order(r, p, m, schedule, chunks)[::-1] for r in range(p)]
    done, table = set(), []

    def ready(kind, micro, stage):
        source = stage - 1 if kind == "F" else stage + 1
        return source in (-1, p * chunks) or (kind, micro, source) in done

    while any(left):
        row = [order[-1] if order and ready(*order[-1]) else None for order in left]
        for order, entry in zip(left, row):
            if entry:
                done.add(order.pop())
        table.append(row)
    return table


class Pipeline:
    """The layers spread over the ranks; micro-batches follow each other through them.

    stage: this rank's module, or a list of them (interleaved: stages rank, rank + N, ...). All but
    the last map activations to activations of one shape; the last is called with (activations,
    targets) and returns a loss. step(x, y) leaves the gradients of the sum of the micro-batches'
    losses and returns that sum on every rank. Each boundary carries the activations forwards and
    their gradients backwards, once: 2 B T D numbers a step.
    """

    def __init__(self, stage, group=None, microbatches=4, schedule="1f1b"):
        self.chunks = list(stage) if isinstance(stage, (list, tuple)) else [stage]
        if len(self.chunks) > 1 and schedule != "interleaved":
            raise ValueError(f"{schedule}: one stage a rank; several need schedule='interleaved'")
        self.group, self.m = group, microbatches
        self.p, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.table = pipeline_table(self.p, microbatches, schedule, len(self.chunks))
        self.last = self.p * len(self.chunks) - 1
        self.most_kept = 0  # micro-batches between their two passes, at the most

    def step(self, x, y, backward=True):
        if len(x) % self.m:
            raise ValueError(f"a batch of {len(x)} does not make {self.m} equal micro-batches")
        xs, ys = x.chunk(self.m), y.chunk(self.m)
        self.inbox, kept = {}, {}  # (kind, micro, stage): (works, tensor); (micro, stage): ends
        self.message = None  # like what is sent: an empty tensor without storage
        flying, total = [], torch.zeros((), device=x.device)
        for row in self.table:
            row = [e if e and (backward or e[0] == "F") else None for e in row]
            kind, micro, stage = row[self.rank] or (None, None, None)
            works, came = self.inbox.pop((kind, micro, stage), ([], None))
            finish(works)
            made = given = out = None
            if kind == "F":
                given = xs[micro] if stage == 0 else came.requires_grad_(backward)
                targets = (ys[micro],) if stage == self.last else ()
                out = self.chunks[stage // self.p](given, *targets)
                made = out.detach().contiguous()
                total += made if stage == self.last else 0
                if backward:
                    kept[micro, stage] = given, out
                self.most_kept = max(self.most_kept, len(kept))
            elif kind == "B":
                given, out = kept.pop((micro, stage))
                out.backward(came)  # None for a loss
                made = given.grad.contiguous() if stage else None
            flying.append((self.exchange(row, made, x.device), made))  # made must live on
            if len(flying) > 2 * self.p:  # but not longer than its micro-batch is here
                finish(flying.pop(0)[0])
        for works, _ in flying:
            finish(works)
        dist.all_reduce(total, group=self.group)
        return total

    def exchange(self, row, made, device):
        """Pass on what this tick made: one batch of sends and receives for all neighbours, so the
        ranks meet in the same order. Nobody waits until it needs what comes."""
        if self.message is None:  # the first tick: the first stage tells what its output is like
            told = [(tuple(made.shape), made.dtype) if made is not None else None]
            dist.broadcast_object_list(told, group=self.group, group_src=0)
            self.message = torch.empty(told[0][0], dtype=told[0][1], device="meta")
        ops, works = [], []
        for source, (kind, micro, stage) in [(r, entry) for r, entry in enumerate(row) if entry]:
            stage += 1 if kind == "F" else -1  # that needs what is made
            target = stage % self.p
            if not 0 <= stage <= self.last or self.rank not in (source, target):
                continue
            if source == target:
                self.inbox[kind, micro, stage] = [], made
            elif self.rank == source:
                ops.append(dist.P2POp(dist.isend, made, group=self.group, group_peer=target))
            else:
                came = torch.empty_like(self.message, device=device)
                self.inbox[kind, micro, stage] = works, came
                ops.append(dist.P2POp(dist.irecv, came, group=self.group, group_peer=source))
        works += dist.batch_isend_irecv(ops) if ops else []
        return works


class Stage(nn.Module):
    """Layers a .. b of our Transformer; the first stage has its embedding, the last its head.

    The module keeps its parts' names; what a stage does not have becomes the identity.
    """

    def __init__(self, model, index, count):
        super().__init__()
        c, n = model.config, len(model.layers)
        if n < count or c.residual_scalars or c.value_embeddings:
            raise ValueError(f"pipeline of {count} stages: needs at least as many layers, and no "
                             "residual_scalars or value_embeddings")
        for name, p in named(model):
            p.full_name, p.parts = name, getattr(p, "parts", 1) * count
        self.model, self.last = model, index == count - 1
        model.layers = model.layers[n * index // count:n * (index + 1) // count]
        if c.tie_embeddings and count > 1:
            model.embed.weight.kind = "tied"
            if self.last:  # it has a copy, that counts for nothing in gradients' norm
                model.lm_head, c.tie_embeddings = model.embed, False
                model.embed.weight.parts = 0
        if index:
            model.embed, model.pos = nn.Identity(), None
            c.position = "none" if c.position == "learned" else c.position
        if not self.last:
            model.norm, model.lm_head = nn.Identity(), None

    def forward(self, x, y=None):
        return self.model.loss(x, y, reduction="sum") if self.last else self.model.hidden(x)


# ---- expert parallel ---------------------------------------------------------------------------


def expert_parallel(model, group):
    """Give each rank num_experts / N of the experts of every mixture; tokens travel to them.

    The experts' gradients come from all ranks' tokens already; all others must be summed.
    """
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    for name, moe in model.named_modules():
        if not hasattr(moe, "experts"):
            continue
        count = len(moe.experts)
        if count % n:
            raise ValueError(f"expert parallel over {n}: {count} experts are not a multiple of it")
        for p_name, p in moe.experts.named_parameters():
            p.full_name, p.parts = f"{name}.experts.{p_name}", getattr(p, "parts", 1) * n
            p.kind = "expert"
        moe.experts = moe.experts[rank * count // n:(rank + 1) * count // n]
        moe.mix = partial(dispatch, moe, group)


def dispatch(moe, group, flat, chosen, weight):
    """Send tokens flat (tokens, D) to the ranks of their experts chosen (tokens, k), run those,
    send the results home and add them up by weight (tokens, k) -> (tokens, D).

    Each way carries k rows of D a token, as many to a rank as its experts were chosen.
    """
    n, k, here = dist.get_world_size(group), chosen.shape[1], len(moe.experts)
    expert, order = chosen.flatten().sort(stable=True)
    token = order // k
    counts = torch.bincount(expert, minlength=n * here)
    coming = all_to_all(counts, group)  # [rank, expert here] of what comes
    sends, receives = (c.view(n, here).sum(1).tolist() for c in (counts, coming))
    there = partial(all_to_all, group=group, sends=sends, receives=receives)
    back = partial(all_to_all, group=group, sends=receives, receives=sends)
    x = Exchange.apply(flat[token], there, back)  # by rank, then by expert
    local = torch.arange(here, device=x.device).repeat(n).repeat_interleave(coming)
    by_expert = local.argsort(stable=True)
    rows = x[by_expert].split(torch.bincount(local, minlength=here).tolist())
    y = torch.cat([e(r) for e, r in zip(moe.experts, rows)])
    y = torch.zeros_like(y).index_copy(0, by_expert, y)
    y = Exchange.apply(y, back, there) * weight.flatten()[order, None]
    return torch.zeros_like(flat).index_add(0, token, y.to(flat.dtype))


# ---- activation checkpointing ------------------------------------------------------------------


def checkpointed(functions, x, scheme="block"):
    """functions[-1](... functions[0](x)), keeping fewer activations for the backward pass.

    Of n functions, in inputs kept (and beside them the inside of one function):
    none    all inside of every function is kept
    block   n inputs; each function runs twice
    sqrt    about 2 sqrt(n): segments of sqrt(n), each function twice (Chen et al. 2016, 1604.06174)
    nested  about log2(n): halves of halves, each function up to log2(n) + 1 times
    """
    n = len(functions)
    sizes = {"none": 0, "block": 1, "sqrt": max(1, round(math.sqrt(n))), "nested": -(-n // 2)}
    if scheme not in sizes:
        raise ValueError(f"scheme {scheme!r} is not one of {', '.join(sizes)}")
    if scheme == "none":
        for f in functions:
            x = f(x)
        return x
    size = sizes[scheme]
    inside = "nested" if scheme == "nested" and size > 1 else "none"
    for i in range(0, n, size):
        x = checkpoint(checkpointed, functions[i:i + size], x, inside, use_reentrant=False)
    return x


def kept_bytes(call):
    """Bytes of the tensors that a forward pass keeps for its backward pass, each storage once."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


# ---- Muon across ranks -------------------------------------------------------------------------


def orthogonalize_sharded(orthogonalize, stack, p):
    """Orthogonalise matrices that are cut as the parameter p is: stack (n, rows, columns) of
    this rank's pieces -> the same pieces of the results. The last cut is undone first.

    An all-to-all gives each rank whole matrices, ceil(n / N) of them, and another one brings their
    pieces back: so the products are shared out instead of repeated N times.
    """
    def undo(stack, splits):
        if not splits:
            return orthogonalize(stack)
        *earlier, (dim, group, size) = splits
        stack = stack.transpose(1, 1 + dim)  # cut by rows, now
        n, rows, columns = stack.shape
        N, rank = dist.get_world_size(group), dist.get_rank(group)
        each = -(-n // N)
        padded = torch.cat((stack, stack.new_zeros(each * N - n, rows, columns)))
        mine = all_to_all(padded, group).view(N, each, rows, columns)  # my matrices' rows, by rank
        mine = mine.transpose(0, 1).reshape(each, N * rows, columns)
        if real := max(0, min(each, n - rank * each)):
            whole = mine[:real, :size].transpose(1, 1 + dim)
            whole.copy_(undo(whole, earlier))
        mine = mine.view(each, N, rows, columns).transpose(0, 1).flatten(0, 1)
        return all_to_all(mine, group)[:n].transpose(1, 1 + dim)

    return undo(stack, getattr(p, "splits", []))


# ---- checkpoints in pieces ---------------------------------------------------------------------


def pieces_here(model, optimizers):
    """{(name, what): (shape of the whole, low, high, piece)} on the CPU, of what no rank before
    this one has; what is "" for a weight, or a key of the optimizers' state of it. All must call.
    """
    held = {}  # {(name, what): (tensor, what it is cut like)}
    for name, p in named(model):
        held[name, ""] = p.detach(), p
        for optimizer in optimizers:
            held |= {(name, what): (v, p if v.shape == p.shape else v)
                     for what, v in optimizer.state.get(p, {}).items() if torch.is_tensor(v)}
    everyone = gather_objects({(key, *box(p)[0]) for key, (_, p) in held.items()})
    before, pieces = set().union(*everyone[:dist.get_rank()]), {}
    for key, (tensor, p) in held.items():
        low, high = box(p)
        if (key, *low) not in before and all(a < b for a, b in zip(low, high)):
            inside = tuple(map(slice, np.subtract(high, low)))  # without padding
            pieces[key] = whole_shape(p), low, high, tensor[inside].cpu().clone()
    return pieces


def joined(pieces, p=None):
    """Put together what p holds of a tensor, or all of it where that is not cut like p."""
    shape = tuple(pieces[0][0])
    if p is not None and shape == whole_shape(p):
        out, (low, high) = torch.zeros_like(p), box(p)
    else:
        out, low, high = pieces[0][3].new_zeros(shape), [0] * len(shape), shape
    for _, a, b, piece in pieces:
        start, end = np.maximum(low, a), np.minimum(high, b)  # of what both boxes have
        if (start < end).all():
            here, there = (tuple(map(slice, start - edge, end - edge)) for edge in (low, a))
            out[here] = piece[there].to(out)
    return out


def take_pieces(found, model, optimizers):
    """Give the optimizers what this rank keeps of the state in {(name, what): [pieces]}."""
    parameters = dict(named(model))
    for optimizer in optimizers:
        kept = {p for g in optimizer.param_groups for p in g["params"]}
        if isinstance(optimizer, ShardedOptimizer):
            kept = {p for p in kept if optimizer.owns(p)}
        for (name, what), pieces in found.items():
            p = parameters.get(name)
            if what and p in kept:
                optimizer.state[p][what] = joined(pieces, p)


def save_sharded(folder, model, optimizers=(), step=0):
    """Write folder/step-N: a file a rank of pieces_here, so any number of ranks, or one process,
    can read it, and last an index. It has that name only when it is whole."""
    rank, work, place = dist.get_rank(), Path(folder, "saving"), Path(folder, f"step-{step:06d}")
    pieces = pieces_here(model, optimizers)
    if rank == 0:
        shutil.rmtree(work, ignore_errors=True)  # what a kill in the middle of a save has left
        work.mkdir(parents=True)
    dist.barrier()
    torch.save(pieces, work / f"rank-{rank:05d}.pt")
    dist.barrier()
    if rank == 0:
        groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups]
                  for o in optimizers]
        index = {"step": step, "ranks": dist.get_world_size(), "groups": groups}
        (work / "index.json").write_text(json.dumps(index))
        shutil.rmtree(place, ignore_errors=True)
        os.replace(work, place)
    dist.barrier()


@torch.no_grad()
def load_sharded(folder, model, optimizers=()):
    """Read the newest complete checkpoint of save_sharded in whatever layout the model has now;
    returns its step."""
    newest = max((path.parent for path in Path(folder).glob("step-*/index.json")),
                 key=lambda place: int(place.name.removeprefix("step-")), default=None)
    if newest is None:
        raise ValueError(f"{folder}: no complete checkpoint in it")
    index, found = json.loads((newest / "index.json").read_text()), defaultdict(list)
    for rank in range(index["ranks"]):
        file = torch.load(newest / f"rank-{rank:05d}.pt", mmap=True, weights_only=True)
        for key, piece in file.items():
            found[key].append(piece)
    for name, p in named(model):
        shape = tuple(found[name, ""][0][0]) if (name, "") in found else "missing"
        if shape != whole_shape(p):
            raise ValueError(f"{newest}: {name} is {shape}, the model's {whole_shape(p)}")
        p.copy_(joined(found[name, ""], p))
    take_pieces(found, model, optimizers)
    for optimizer, groups in zip(optimizers, index["groups"]):
        for group, saved in zip(optimizer.param_groups, groups):
            group.update(saved)
    return index["step"]


# ---- all of it together ------------------------------------------------------------------------


class Parallel:
    """Our Transformer on a mesh: what a training loop needs of it, whatever the layout.

    kind: ddp, zero1 (for the loop to wrap its optimizers with) or fsdp. Every rank builds the same
    whole model and keeps its part. The loop divides the summed loss by the tokens of the whole
    batch, so gradients are summed and never averaged: no rank needs an equal share. `model` holds
    this rank's parameters; the loop may set `autocast`.
    """

    def __init__(self, model, mesh, kind="ddp", compute_dtype=None):
        self.mesh, self.autocast, size = mesh, nullcontext, mesh.size
        if model.config.num_experts and size("tp", "pp") > 1:
            raise ValueError("--tp, --pp: not with experts; split those with --ep")
        if size("ep") > 1 and not model.config.num_experts:
            raise ValueError("--ep: the model has no experts")
        start_alike(model)
        self.model, self.runner, self.synced = model, model, None  # by DDP or FSDP
        self.train, self.eval = model.train, model.eval
        copies = size("tp", "cp", "pp", "ep", "fsdp") == 1
        self.copies_only = copies and (kind != "zero1" or dist.get_world_size() == 1)
        # which of the ranks that share the data this is, how many, and how many read the same
        self.data_ranks = (mesh.rank("dp", "fsdp", "ep"), size("dp", "fsdp", "ep"),
                           size("tp", "cp", "pp"))
        splits = {"ep": expert_parallel, "cp": context_parallel, "tp": tensor_parallel}
        for axis in (a for a in splits if size(a) > 1):
            splits[axis](model, mesh.group(axis))
        if size("pp") > 1:
            self.runner = Stage(model, mesh.rank("pp"), size("pp"))
        later = {"dp", "ep", "cp"}  # to sum over after the backward pass
        if size("fsdp") > 1:
            self.runner = self.synced = FSDP(self.runner, compute_dtype,
                                             group=mesh.group("fsdp"), average=False)
        elif size("ep", "pp") == 1 and size("dp", "cp") > 1:
            self.synced = DDP(model, group=mesh.group("dp", "cp"), average=False)
            later = set()
        self.sums = [(("", "tied"), mesh.group(*later)),  # .kind of parameters, the ranks
                     (("expert",), mesh.group(*later - {"ep"})),
                     (("partial",), mesh.group(*later | {"tp"}))]
        if size("pp") > 1:
            pairs = mesh.ranks[[0, -1]].reshape(2, -1).T.tolist()  # the pipelines' ends
            self.sums.append((("tied",), dist.new_subgroups_by_enumeration(pairs)[0]))

    def share(self, items):
        """This data rank's part of a list, about equal."""
        r, n, _ = self.data_ranks
        return items[len(items) * r // n:len(items) * (r + 1) // n]

    def loss(self, inputs, targets, reduction="sum", backward_scale=None):
        """This rank's share of the summed loss of (B, T) tokens: over all ranks they add up to it.
        With backward_scale, leaves gradients of it times that number."""
        cp, tp, pp = (self.mesh.size(axis) for axis in ("cp", "tp", "pp"))
        extra = -inputs.shape[1] % (tp * (2 * cp if cp > 1 else 1))
        if extra:  # later tokens change no earlier ones
            inputs, targets = F.pad(inputs, (0, extra)), F.pad(targets, (0, extra), value=-100)
        if cp > 1:
            inputs, targets = (zigzag(t, self.mesh.group("cp")) for t in (inputs, targets))
        scale = backward_scale or 1
        if pp == 1:
            with record_function("forward"), self.autocast():
                loss = self.runner.loss(inputs, targets, reduction="sum")
            if backward_scale is not None:
                with record_function("backward"):
                    (loss * scale).backward()
            return loss.detach() / tp

        def stage(x, *y):
            with self.autocast():
                out = self.runner(x, *y)
            return out * scale if y else out

        m = next(m for m in range(2 * pp, 0, -1) if len(inputs) % m == 0)  # up to two a stage
        pipeline = Pipeline(stage, self.mesh.group("pp"), m)
        total = pipeline.step(inputs, targets, backward=backward_scale is not None)
        return total / scale / (tp * pp)

    def no_sync(self):
        """For all micro-batches but the last, where gradients need not travel with each."""
        return self.synced.no_sync() if isinstance(self.synced, DDP) else nullcontext()

    def finish(self):
        """Sum every gradient over the ranks that have part of it."""
        if self.synced:
            self.synced.finish_gradient_synchronization()
        for kinds, group in self.sums:
            sum_gradients([p for p in self.model.parameters() if getattr(p, "kind", "") in kinds],
                          group)

    def whole_state(self, optimizers=()):
        """On rank 0 {name: weight}, {name: {key: optimizer state}}, whole and on the CPU, as one
        process would have them; (None, None) elsewhere. All ranks must call."""
        mine, states = defaultdict(dict), {}
        for (name, what), piece in pieces_here(self.model, optimizers).items():
            mine[name][what] = piece
        for name in sorted(set().union(*gather_objects(set(mine)))):
            parts = None if dist.get_rank() else [None] * dist.get_world_size()
            dist.gather_object(mine[name], parts)  # one at a time: NCCL's go through the GPU
            if parts:
                states[name] = {what: joined([part[what] for part in parts if what in part])
                                for what in set().union(*parts)}
        if dist.get_rank():
            return None, None
        return {name: state.pop("") for name, state in states.items()}, states

    def take_state(self, states, optimizers):
        """Give the optimizers this rank's pieces of whole states {name: {key: tensor}}."""
        found = {(name, what): [(t.shape, [0] * t.ndim, t.shape, t)]
                 for name, state in states.items() for what, t in state.items()}
        take_pieces(found, self.model, optimizers)


# ---- plan: what a split costs before anybody has run it ----------------------------------------


class Sizes(namedtuple("Sizes", "layers d_model heads kv_heads d_head d_ff vocab experts "
                                "experts_per_token", defaults=(1, 1))):
    """What the cost of a Transformer depends on."""

    def layer(self, experts=None):
        """Weights of a layer with so many experts, by default all of them."""
        attention = self.d_model * self.d_head * 2 * (self.heads + self.kv_heads)
        router = self.d_model * self.experts if self.experts > 1 else 0
        return attention + router + 3 * self.d_model * self.d_ff * (experts or self.experts)

    def tables(self):
        return 2 * self.vocab * self.d_model

    def total(self):
        return self.layers * self.layer() + self.tables()

    def flops(self, T):
        """Of training, a token: 6 a weight it meets, and causal attention's 6 T H E a layer."""
        weights = self.layers * self.layer(self.experts_per_token) + self.tables() / 2
        return 6 * (weights + self.layers * T * self.heads * self.d_head)


MODELS = {  # Llama 3.2 1B, Llama 3.1 (arXiv:2407.21783, table 3), Qwen3-30B-A3B
    "1b": Sizes(16, 2048, 32, 8, 64, 8192, 128256),
    "8b": Sizes(32, 4096, 32, 8, 128, 14336, 128256),
    "70b": Sizes(80, 8192, 64, 8, 128, 28672, 128256),
    "405b": Sizes(126, 16384, 128, 8, 128, 53248, 128256),
    "30b-a3b": Sizes(48, 2048, 32, 4, 128, 768, 151936, 128, 8),
}


# A GPU and its node. efficiency is the share of the dense bf16 peak that a step's arithmetic
# reaches: one figure a GPU, from one published run (RESULTS.md). It and FP8 are fitted.
UNITS = {"tflops": "dense bf16 TFLOP/s", "memory": "GB", "nvlink": "GB/s one way in a node",
         "network": "GB/s one way between nodes, a GPU", "node": "GPUs a node",
         "efficiency": "share of the peak that computing reaches"}
Hardware = namedtuple("Hardware", UNITS)
HARDWARE = {
    "a100": Hardware(312, 80, 300, 25, 8, 0.57),
    "h100": Hardware(989, 80, 450, 50, 8, 0.41),
    "h200": Hardware(989, 141, 450, 50, 8, 0.41),
    "b200": Hardware(2250, 180, 900, 50, 8, 0.41),
}
RECOMPUTE = {"none": 0.0, "selective": 0.5, "full": 1.0}  # of a forward pass, done again
FP8 = 2048  # d_model at which casting to float8 takes as long as the product saves: fitted to the
# same run with float8, it predicts the larger models' gain


# One way to split a run: ranks an axis, sequences a micro-batch, what is recomputed, and stages a
# rank (of interleaved pipelines). Tensor parallel ranks split the sequence, too.
Layout = namedtuple("Layout", "dp fsdp tp pp cp ep micro recompute chunks",
                    defaults=(1, 1, 1, 1, 1, 1, 1, "none", 1))


def plan_bytes(s, a, T, m):
    """Bytes a GPU sends in a step of m micro-batches, by axis; in a pipeline, one at its ends.

    fsdp   a micro-batch: weights twice in bf16 (tables once), gradients once in fp32
    dp     a step: the fp32 gradients, reduced and gathered
    tp     4 all-gathers and 4 reduce-scatters a layer, of bf16 activations; 3 more where it is
           recomputed (which ends before the last one); 4 at the embedding and the head
    pp     activations and their gradients over each boundary, bf16
    cp     keys and values, N-1 hops: forwards, when recomputed, and their gradients back
    ep     dispatch and combine, each way and pass: 4 times k rows a token
    """
    tokens = a.micro * T / a.cp  # of a micro-batch on this rank, before tensor parallelism
    L, tables = s.layers / a.pp, s.tables() / min(a.pp, 2) / a.tp
    weights = L * s.layer(s.experts / a.ep) / a.tp
    activations = tokens * s.d_model * 2
    kv = 2 * tokens * s.kv_heads / a.tp * s.d_head * 2
    full = a.recompute == "full"
    return {
        "fsdp": m * (1 - 1 / a.fsdp) * (weights * (2 * 2 + 4) + tables * (2 + 4)),
        "dp": 2 * (1 - 1 / a.dp) * 4 * (weights + tables) / a.fsdp,
        "tp": m * (1 - 1 / a.tp) * activations * ((8 + 3 * full) * L + 4 / a.pp),
        "pp": m * 2 * activations / a.tp * a.chunks * (a.pp > 1),
        "cp": m * L * kv * (a.cp - 1) * (3 + full),
        "ep": m * L * 4 * s.experts_per_token * activations * (1 - 1 / a.ep),
    }


def plan_memory(s, a, T, m):
    """Bytes on the fullest GPU, at the fuller of two moments of the backward pass.

    state        weights, gradients and AdamW's two moments in fp32: 16 a weight
    tables       FSDP's whole embedding and head, bf16
    activations  a token and layer, bf16: 4 D + (2 H + 2 K) E + 3 F, or its input alone where all
                 is recomputed, 1/tp of it; but tensor parallel ranks keep the 2 D that their
                 matrices read whole; a pipeline's first rank keeps min(m, p) micro-batches
    layer        at a layer: its inside, if recomputed, FSDP's two layers in bf16, and one's
                 gradient in bf16 and, on its way, in fp32
    head         at the head: logits and their gradient, 12 bytes in all, of 512 tokens at a time
                 (of all, with the whole hidden states, where they are split by vocabulary), then 10
                 a weight for its gradient
    """
    layer, L = s.layer(s.experts / a.ep) / a.tp, s.layers / a.pp
    tables = s.tables() / min(a.pp, 2) / a.tp
    tokens, sharded = a.micro * T / a.cp, a.fsdp > 1
    whole = 2 * s.d_model * (1 - 1 / a.tp)
    inside = 2 * tokens * (whole + (4 * s.d_model + 2 * (s.heads + s.kv_heads) * s.d_head
                                    + 3 * s.d_ff * s.experts_per_token) / a.tp)
    kept = {"none": inside, "selective": inside / 2, "full": 2 * tokens * s.d_model / a.tp}
    in_flight = min(m, a.pp) * (1 + (a.pp - 1) / (a.pp * a.chunks) if a.chunks > 1 else 1)
    at_layer = (a.recompute != "none") * inside + sharded * (4 + 6) * layer
    logits = 12 * s.vocab * min(tokens, 512)
    if a.tp > 1:
        logits = tokens * (12 * s.vocab / a.tp + 2 * s.d_model)
    at_head = max(logits, 10 * s.tables() / 2 / a.tp)
    return {
        "state": 16 * (L * layer + tables) / a.fsdp,
        "tables": sharded * 2 * tables,
        "activations": kept[a.recompute] * ((L + 1) * in_flight + 1),
        "layer" if at_layer > at_head else "head": max(at_layer, at_head),
    }


def plan_layout(s, hw, a, T, tokens_per_step, fp8=False):
    """The cost of one layout: a dict of seconds by cause, memory, tokens/s a GPU, MFU, what binds.

    Compute: FLOPs / (peak x efficiency), again for what is recomputed. float8 halves the time of
    all but attention, but casting, which is 1/D of a product's work, adds to it: 2 / (1 + FP8/D)
    times as fast. FSDP's and DP's messages hide behind it, ring attention's behind
    attention; only what is longer counts. Tensor and expert parallel messages are waited for. A
    pipeline's step is (1 + bubble) as long, bubble (p-1) / (m chunks) (Narayanan et al. 2021).
    """
    data = a.dp * a.fsdp * a.ep
    gpus = data * a.tp * a.pp * a.cp
    m = max(1, round(tokens_per_step / T / data / a.micro))
    flops = s.flops(T) * tokens_per_step / gpus
    bf16 = flops * (1 + RECOMPUTE[a.recompute] / 3) / (hw.tflops * 1e12 * hw.efficiency)
    products = bf16 * s.flops(0) / s.flops(T)
    attention = bf16 - products
    compute = attention + products * ((1 + FP8 / s.d_model) / 2 if fp8 else 1)
    sent, travel = plan_bytes(s, a, T, m), {}
    reach = 1  # ranks between neighbours of an axis, the innermost first
    for axis in ("tp", "cp", "ep", "fsdp", "dp", "pp"):
        reach *= getattr(a, axis)
        travel[axis] = sent[axis] / 1e9 / (hw.nvlink if reach <= hw.node else hw.network)
    exposed = {"tensor parallel": travel["tp"], "expert parallel": travel["ep"],
               "FSDP": max(0.0, travel["fsdp"] - 0.9 * compute),
               "DDP": max(0.0, travel["dp"] - 0.6 * compute / m),
               "ring attention": max(0.0, travel["cp"] - attention)}
    exposed["bubble"] = (compute + sum(exposed.values())) * (a.pp - 1) / (m * a.chunks)
    step, memory = compute + sum(exposed.values()), plan_memory(s, a, T, m)
    binds = max(exposed, key=exposed.get) if max(exposed.values()) > 0.05 * step else "compute"
    return dict(layout=a, micro_batches=m, step=step, seconds={"compute": compute} | exposed,
                sent=sent, memory=memory, gigabytes=sum(memory.values()) / 1e9, binds=binds,
                tokens_per_second=tokens_per_step / step / gpus,
                mfu=flops / step / (hw.tflops * 1e12))


def layouts(s, gpus, T, tokens_per_step, node):
    """Every layout of that many GPUs that divides the model, the sequence and the batch."""
    counts = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tp, pp, cp, ep, dp in itertools.product(
            [n for n in counts if n <= node and s.kv_heads % n == 0],
            [n for n in counts if n <= min(s.layers, 32)],
            [n for n in counts if n == 1 or n <= 16 and T // n >= 1024 and T % (2 * n) == 0],
            [n for n in counts if n <= 64 and s.experts % n == 0], counts):
        fsdp, no_layout = divmod(gpus, tp * pp * cp * ep * dp)
        if no_layout or tokens_per_step // T % (dp * fsdp * ep):
            continue
        sequences = tokens_per_step // T // (dp * fsdp * ep)
        for micro, again, chunks in itertools.product((1, 2, 4), RECOMPUTE, (1, 2)):
            interleaves = pp > 1 and sequences // micro % pp == 0
            if sequences % micro == 0 and (chunks == 1 or interleaves):
                yield Layout(dp, fsdp, tp, pp, cp, ep, micro, again, chunks)


def run_plan(args):
    """Print the ten best layouts; returns the costs of all that fit, best first."""
    given = {name: getattr(args, name) for name in UNITS if getattr(args, name) is not None}
    hw, s, T = HARDWARE[args.gpu]._replace(**given), MODELS.get(args.model), args.context_length
    if s is None:
        raise ValueError(f"--model {args.model}: not one of {', '.join(MODELS)}")
    if args.tokens_per_step % T:
        raise ValueError(f"--tokens-per-step {args.tokens_per_step}: not a multiple of "
                         f"--context-length {T}")
    costs = [plan_layout(s, hw, a, T, args.tokens_per_step, args.fp8)
             for a in layouts(s, args.gpus, T, args.tokens_per_step, hw.node)]
    if not costs:
        raise ValueError(f"--gpus {args.gpus}: no layout divides {args.tokens_per_step // T} "
                         "sequences a step and the model; try powers of two, or more tokens")
    least = min(c["gigabytes"] for c in costs)
    if least > 0.9 * hw.memory:
        raise ValueError(f"--gpus {args.gpus}: nothing fits 90 % of {hw.memory} GB, the least is "
                         f"{least:.0f} GB; take more GPUs, or fewer tokens at a time")
    best = {}  # of each split, the fastest micro-batch and recomputation
    for c in sorted(costs, key=lambda c: c["step"]):
        if c["gigabytes"] <= 0.9 * hw.memory:
            best.setdefault(c["layout"]._replace(micro=1, recompute="none", chunks=1), c)
    best = list(best.values())
    print(f"{args.model}: {s.total() / 1e9:.2f}B parameters, {s.flops(T) / 1e9:.1f} GFLOP a token "
          f"at T {T}; {args.gpus} x {args.gpu}")
    print("  dp  fsdp  tp  pp  cp  ep     micro again        GB tok/s/GPU   MFU binds")
    for c in best[:10]:
        a = c["layout"]
        pp = f"{a.pp}" + "i" * (a.chunks > 1)  # interleaved
        print(f"{a.dp:>4} {a.fsdp:>5} {a.tp:>3} {pp:>3} {a.cp:>3} {a.ep:>3} "
              f"{c['micro_batches']:>5} x {a.micro} {a.recompute:<9} {c['gigabytes']:>5.1f} "
              f"{c['tokens_per_second']:>9,.0f} {c['mfu']:>5.1%} {c['binds']}")
    print(f"\nthe first: {best[0]['step']:.2f} s a step")
    for title, key, unit in (("seconds", "seconds", 1), ("GB sent by a GPU", "sent", 1e9),
                             ("GB of memory", "memory", 1e9)):
        parts = [f"{k} {v / unit:.2f}" for k, v in best[0][key].items() if v / unit > 0.005]
        print(f"{title}: {', '.join(parts)}")
    return best


# ---- bench -------------------------------------------------------------------------------------


def say(text):
    if dist.get_rank() == 0:
        print(text, flush=True)


def median_seconds(call):
    times = []
    for _ in range(11):
        dist.barrier()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def bench_collectives(device):
    n = dist.get_world_size()
    say(f"{'collective':<16} {'ranks':>5} {'MiB':>7} {'ms':>8} {'GB/s a rank':>12}")
    for size in (2**10, 2**16, 2**20, 2**24):
        x, big = torch.ones(size // 4, device=device), torch.ones(n * size // 4, device=device)
        out = torch.empty_like(big)
        for name, call, sent in (
                ("all-reduce", partial(dist.all_reduce, x), 2 * size * (n - 1) / n),
                ("all-gather", partial(all_gather_single, big, x), size * (n - 1)),
                ("reduce-scatter", partial(reduce_scatter_single, x, big), size * (n - 1)),
                ("all-to-all", partial(dist.all_to_all_single, out, big), size * (n - 1))):
            seconds = median_seconds(call)
            say(f"{name:<16} {n:>5} {size / 2**20:>7.3f} {seconds * 1e3:>8.3f} "
                f"{sent / seconds / 1e9:>12.2f}")


def bench_wrappers(device):
    """One training step under each wrapper: seconds, bytes sent, bytes of state on a rank; the
    ratio is to the time of the torch wrapper above."""
    from torch.distributed.fsdp import fully_shard

    import model as model_py

    def torch_fsdp(model):
        for layer in model.layers:
            fully_shard(layer)
        return fully_shard(model)

    config = model_py.ModelConfig(vocab_size=4096, context_length=256, d_model=256, num_layers=6,
                                  num_heads=4)
    ids = torch.randint(0, 4096, (4, 257), device=device)
    first, adamw = 0.0, torch.optim.AdamW
    rows = [("torch DDP", nn.parallel.DistributedDataParallel, adamw),
            *((f"ours, {mode}", partial(DDP, mode=mode), adamw)
              for mode in ("naive", "flat", "overlap", "bucket")),
            ("ours, bucket, ZeRO-1", DDP, partial(ShardedOptimizer, optimizer_cls=adamw)),
            ("torch fully_shard", torch_fsdp, adamw), ("ours, FSDP", FSDP, adamw)]
    say(f"\n{'one step':<22} {'ms':>8} {'MB sent':>9} {'MB of state':>12} ratio to torch's")
    for name, wrap, make in rows:
        torch.manual_seed(0)
        wrapped = wrap(model_py.Transformer(config).to(device))
        step = partial(training_step, wrapped, make(wrapped.parameters(), lr=1e-3), ids)
        seconds = median_seconds(step)
        with CommCounter() as counter:
            state = step()
        first = seconds if "torch" in name else first
        sent = f"{counter.total() / 1e6:.2f}" if "ours" in name else ""  # torch's go other ways
        say(f"{name:<22} {seconds * 1e3:>8.1f} {sent:>9} {state / 1e6:>12.2f} "
            f"{seconds / first:>5.2f}")


def training_step(wrapped, optimizer, ids):
    """Returns the bytes of parameters, gradients and optimizer state that this rank has then."""
    logits = wrapped(ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    if isinstance(wrapped, (DDP, FSDP)):
        wrapped.finish_gradient_synchronization()
    optimizer.step()
    tensors = [t for p in wrapped.parameters() for t in (p, p.grad)]
    tensors += [v for state in optimizer.state.values() for v in state.values()]
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors if torch.is_tensor(t))
    size = sum(t.nbytes for t in local)
    optimizer.zero_grad(set_to_none=True)
    return size


def run_bench(args):
    device = init_distributed(args.device)
    say(f"{dist.get_world_size()} ranks, {dist.get_backend()}, {torch.get_num_threads()} threads "
        f"each, torch {torch.__version__}\n")
    bench_collectives(device)
    say("\nkept for the backward pass of 16 blocks, d_model 256, 4 x 256 tokens, checkpointed")
    blocks = [nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
              for _ in range(16)]
    x = torch.randn(4, 256, 256, requires_grad=True)
    for scheme in ("none", "block", "sqrt", "nested"):
        kept = kept_bytes(partial(checkpointed, blocks, x, scheme))
        say(f"{scheme:<8} {kept / 2**20:>9.1f} MiB")
    bench_wrappers(device)


# ---- command line ------------------------------------------------------------------------------


def main(argv=None):
    shape = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", allow_abbrev=False, formatter_class=shape,
                               help="the cost of every way to split a training run, best first")
    plan.set_defaults(run=run_plan)
    plan.add_argument("--model", default="8b", help=", ".join(MODELS))
    plan.add_argument("--gpus", type=int, default=1024, help="how many")
    plan.add_argument("--gpu", default="h100", choices=list(HARDWARE), help="kind of GPU")
    plan.add_argument("--tokens-per-step", type=int, default=4194304, help="tokens an update")
    plan.add_argument("--context-length", type=int, default=8192, help="tokens a sequence")
    plan.add_argument("--fp8", action="store_true", help="float8 matrix products")
    for name, unit in UNITS.items():
        plan.add_argument(f"--{name}", type=int if name == "node" else float,
                          help=f"{unit}, instead of the table's")
    bench = commands.add_parser("bench", allow_abbrev=False, formatter_class=shape,
                                help="collectives and wrappers, timed (under torchrun)")
    bench.set_defaults(run=run_bench)
    bench.add_argument("--device", default="auto", help="cpu or cuda")
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"distributed.py: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        close_distributed()


if __name__ == "__main__":
    main()
