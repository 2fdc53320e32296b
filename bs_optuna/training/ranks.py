"""Several processes that train one model: what they tell each other, and the sum of gradients.

R: ranks (processes) in the group. A rank computes on its own part of the batch without any
collective, so that one which fails leaves nobody waiting; then all tell each other how it went.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import suppress
from mmap import ACCESS_COPY
from mmap import mmap

import torch
import torch.distributed as dist
from torch import nn

from bs_optuna.errors import ConfigError
from bs_optuna.errors import RanksError
from bs_optuna.training.buffer_copies import distinct
from bs_optuna.training.linux_cpu_limit import soft_limit_lifted


# DistributedDataParallel's size: large enough that latency does not matter.
BUCKET_BYTES = 25 * 2**20
# What gloo allocates while it reduces: two of its segments of 1 MiB, and some more.
_GLOO_BYTES = 4 * 2**20
# Mapped by itself, so that the system has it again once it is given up: enough for an arena of
# Python's objects (1 MiB), and for the C library's heap to grow by its smallest step or, where
# something lies in its way, by a new mapping (1 MiB).
_SPARE_BYTES = 5 * 2**19
_BITS = 48  # of a fingerprint, which is told as a float64


class Ranks:
    """The processes of a group, and a few numbers that each tells all others.

    What the collectives need is allocated before, here or in `check_room`: where one of them ran
    out of memory on a single rank, the others would wait for it. For each telling a spare block is
    given up and a soft limit lifted, so that a rank which is over its memory can say so.

    Args:
        group: A process group of ``torch.distributed``, such as ``dist.group.WORLD``.
        device: Where the group reduces: that of the model.
        numbers: How many numbers each rank tells.
        flags: How many numbers are added up over the ranks.

    Raises:
        ConfigError: There is no process group yet, or this process is not in the given one.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, *, numbers: int, flags: int = 0
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                f"process_group={group}; call torch.distributed.init_process_group() first, "
                "or leave process_group out for one process."
            )
        self._group = group
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise ConfigError(f"process_group={group}; this process must be one of its ranks.")
        self.size = dist.get_world_size(group)
        self._numbers = numbers
        self._status = torch.zeros(self.size * numbers + flags, dtype=torch.float64, device=device)
        self._spare: mmap | None = None
        self._take_spare()

    def tell(
        self, numbers: Sequence[float], flags: Sequence[float] = ()
    ) -> tuple[list[list[float]], list[float]]:
        """Tells all ranks some numbers, and learns theirs; every rank has to call it.

        Returns:
            The numbers of each rank, and the sum over the ranks of each flag.
        """
        if self._spare is not None:
            self._spare.close()
        ends = self._numbers * self.size
        start = self._numbers * self.rank
        with soft_limit_lifted():
            self._status.zero_()
            self._status[start : start + len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
            if flags:
                self._status[ends:] = torch.tensor(flags, dtype=torch.float64)
            self.add_up(self._status)  # each fills its own place, which any backend can do
            told = self._status.tolist()
        self._take_spare()
        return [told[i : i + self._numbers] for i in range(0, ends, self._numbers)], told[ends:]

    def _take_spare(self) -> None:
        # Without it the next telling may fail, which it would certainly if this were an error.
        self._spare = None
        with suppress(MemoryError, OSError):
            self._spare = mmap(-1, _SPARE_BYTES, access=ACCESS_COPY)  # nobody else sees it

    def check_room(self) -> None:
        """Runs out of memory now, while the others can be told, if a collective would."""
        if self._status.device.type == "cpu":
            torch.empty(_GLOO_BYTES, dtype=torch.uint8)

    def add_up(self, tensor: torch.Tensor) -> None:
        """Puts the sum over the ranks into a tensor."""
        dist.all_reduce(tensor, group=self._group)

    def take_from(self, rank: int, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrites tensors by those of one rank."""
        source = dist.get_global_rank(self._group, rank)
        for tensor in (distinct(t.detach()) for t in tensors):
            flat = _in_memory_order(tensor) if _is_dense(tensor) else tensor.reshape(-1)
            if flat.numel():  # as bytes: not every backend knows every type
                dist.broadcast(flat.view(torch.uint8), source, group=self._group)
            if not _is_dense(tensor):
                tensor.copy_(flat.view(tensor.shape))


class SharedGradients:
    """The gradients of one model on all ranks, added up in place, some megabytes at a time.

    Parameters and buffers become those of rank 0, as DistributedDataParallel does it.

    Args:
        group: A process group of ``torch.distributed``.
        modules: Alike on every rank.
        numbers: How many numbers each rank tells after an attempt.

    Raises:
        ConfigError: A module runs collectives of its own, or there is no such group.
        RanksError: The ranks' models differ, or one has no memory to exchange gradients.
    """

    def __init__(
        self, group: dist.ProcessGroup, modules: Sequence[nn.Module], *, numbers: int
    ) -> None:
        for module in modules:
            _refuse_collectives(module)
        named = {id(p): p for module in modules for p in module.parameters()}
        self._parameters = list(named.values())
        if not self._parameters:
            raise ConfigError("process_group: the model has no parameters to share; leave it out.")
        device = self._parameters[0].device
        self._strides = [torch.empty_like(p, device="meta").stride() for p in self._parameters]
        self._buckets: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self.ranks = Ranks(group, device, numbers=numbers, flags=len(self._parameters))
        try:
            self._allocate()
        finally:  # also where that failed: the others must not wait
            buffers = [b for module in modules for b in module.buffers()]
            self._check_alike(Ranks(group, device, numbers=2), buffers)
        for key in sorted(self._buckets, key=str):  # a first use allocates inside the backend
            self.ranks.add_up(self._buckets[key])
        self.ranks.take_from(0, [*self._parameters, *buffers])

    def _allocate(self) -> None:
        for key in {_kind(p) for p in self._parameters}:
            total = sum(p.numel() for p in self._parameters if _kind(p) == key)
            size = max(1, min(total, BUCKET_BYTES // key[1].itemsize))
            self._buckets[key] = torch.zeros(size, device=key[0], dtype=key[1])

    def _check_alike(self, ranks: Ranks, buffers: Sequence[torch.Tensor]) -> None:
        tensors = [*self._parameters, *buffers]
        described = [(tuple(t.shape), t.stride(), str(t.dtype)) for t in tensors]
        told, _ = ranks.tell([_fingerprint(described), len(self._buckets)])
        if len({alike for alike, _ in told}) > 1:
            raise RanksError(
                f"The ranks' models differ in number, shape or type of parameters and buffers "
                f"(here {len(described)}); build the same model on every rank."
            )
        if len({buckets for _, buckets in told}) > 1:
            raise RanksError("A rank has no memory to exchange gradients; give all ranks more.")

    @property
    def parameters(self) -> int:
        """How many parameters there are."""
        return len(self._parameters)

    def trainable(self) -> int:
        """A number that says which parameters are trained."""
        return _fingerprint([p.requires_grad for p in self._parameters])

    def settle(self) -> list[float]:
        """Makes every gradient one that can be added to those of the other ranks.

        Returns:
            1 for each parameter that had one, 0 for the others, which now have zeros.

        Raises:
            ConfigError: A gradient is sparse.
        """
        had = []
        for p, strides in zip(self._parameters, self._strides, strict=True):
            had.append(float(p.requires_grad and p.grad is not None))
            if not p.requires_grad:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif p.grad.layout != torch.strided:
                raise ConfigError(
                    f"A gradient of shape {tuple(p.shape)} is sparse; use dense ones over several "
                    "ranks, such as nn.Embedding(sparse=False)."
                )
            elif p.grad.stride() != strides:
                p.grad = torch.zeros_like(p).copy_(p.grad)
        return had

    def add_up(self, had: Sequence[float], weight: float) -> None:
        """Puts the weighted sum over the ranks into every gradient; every rank has to call it.

        Args:
            had: On how many ranks each parameter had a gradient; where on none, it gets None.
            weight: What this rank's gradients are multiplied by.
        """
        grads = []
        for p, ranks in zip(self._parameters, had, strict=True):
            if not ranks and p.requires_grad:
                p.grad = None
            elif ranks and p.grad is not None:
                grads.append(p.grad)
        for key in sorted(self._buckets, key=str):
            bucket = self._buckets[key]
            same = [g for g in grads if _kind(g) == key]
            for pieces in _filled(same, bucket.numel()):
                self._add_up(pieces, bucket, weight)

    def _add_up(self, pieces: list[torch.Tensor], bucket: torch.Tensor, weight: float) -> None:
        filled = bucket[: sum(piece.numel() for piece in pieces)]
        parts = filled.split([piece.numel() for piece in pieces])
        for part, piece in zip(parts, pieces, strict=True):
            torch.mul(piece, weight, out=part)
        self.ranks.add_up(filled)
        for part, piece in zip(parts, pieces, strict=True):
            piece.copy_(part)


def refuse_wrapped(model: nn.Module) -> None:
    """Refuses what waits for other ranks in backward: one that ran out of memory never comes.

    Raises:
        ConfigError: The model is wrapped in DistributedDataParallel.
    """
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ConfigError(
            "The model is wrapped in DistributedDataParallel, whose backward waits for a rank that "
            "ran out of memory; pass the model itself and process_group=dist.group.WORLD."
        )


def _refuse_collectives(module: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule  # takes a second to import
    from torch.distributed.fsdp import FullyShardedDataParallel

    for part in module.modules():
        if isinstance(part, nn.SyncBatchNorm | FullyShardedDataParallel | FSDPModule):
            raise ConfigError(
                f"The model holds a {type(part).__name__}, whose forward waits for a rank that "
                "ran out of memory; use a plain model (convert_batch_norm replaces BatchNorm)."
            )


def _kind(tensor: torch.Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie in memory without gaps, in whatever order."""
    return tensor.stride() == torch.empty_like(tensor, device="meta").stride()


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def _fingerprint(described: object) -> int:
    digest = hashlib.sha256(repr(described).encode()).digest()
    return int.from_bytes(digest[: _BITS // 8], "big")


def _filled(grads: Sequence[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """Views of all gradients, in their order in memory, in lists of at most ``size`` elements."""
    pieces: list[torch.Tensor] = []
    free = size
    for grad in grads:
        for piece in _in_memory_order(grad).split(size):
            if piece.numel() > free:
                yield pieces
                pieces, free = [], size
            pieces.append(piece)
            free -= piece.numel()
    if pieces:
        yield pieces
