"""Run as one of two processes: number 1 alone runs out of memory, somewhere."""

from __future__ import annotations

import copy
import gc
import logging
import resource
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


sys.path.insert(0, str(Path(__file__).parents[1]))

from failing import FailingAt
from ranks import OPTIMIZERS
from ranks import Recording
from ranks import allocate_too_much
from ranks import gradients
from ranks import images
from ranks import network
from ranks import rank_main

from bs_optuna.errors import BsOptunaError
from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import GuardedStep
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.process_memory import process_memory
from bs_optuna.training.ranks import Ranks


def two_steps(
    rank: int, optimizer: str, size: int | None, devices: tuple[FailingAt, FailingAt]
) -> list[Any]:
    """State after two steps, of which rank 1's first meets a failing device."""
    model = network()
    made = OPTIMIZERS[optimizer](model.parameters())
    backward = AccumulatedBackward(
        model, nn.functional.cross_entropy, microbatch_size=size or "auto",
        process_group=dist.group.WORLD,
    )  # fmt: skip
    step = GuardedStep(made, max_norm=0.1, process_group=dist.group.WORLD)
    torch.default_generator.manual_seed(2 + rank)
    results = []
    for number in range(2):
        made.zero_grad()
        batch = images(rank)
        for device, action in zip(devices, (partial(backward, *batch), step), strict=True):
            if rank == 1 and number == 0:
                with device:
                    results.append(action())
            else:
                results.append(action())
    return copy.deepcopy([
        model.state_dict(), gradients(model), made.state_dict(), torch.get_rng_state(),
        [(r.microbatch_size, r.batch_size, r.accumulation_steps, r.loss) for r in results if r],
    ])  # fmt: skip


def any_operation(rank: int) -> dict[str, Any]:
    """Every operation of a step of rank 1 fails once."""
    gc.freeze()  # each failure collects garbage: leave out what was there before
    found: dict[str, Any] = {"failures": 0, "positions": 0}
    for optimizer in OPTIMIZERS:
        two_steps(rank, optimizer, None, (FailingAt(None), FailingAt(None)))  # first uses
        clean = (Recording(None), Recording(None))
        whole = two_steps(rank, optimizer, None, clean)
        halves = two_steps(rank, optimizer, 2, (FailingAt(None), FailingAt(None)))
        found[optimizer] = {"whole": whole, "halves": halves, "backward": [], "step": []}
        for where, name in enumerate(("backward", "step")):
            if name == "backward" and optimizer != "fused":  # which is the same for all
                continue
            own = torch.tensor(clean[where].own() if rank == 1 else 0)
            dist.broadcast(own, 1)
            for position in range(int(own)):
                devices = [FailingAt(None), FailingAt(None)]
                devices[where] = FailingAt(position)
                found[optimizer][name].append(
                    two_steps(rank, optimizer, None, (devices[0], devices[1]))
                )
                found["failures"] += devices[where].failures
                found["positions"] += 1
    return found


class Watch(logging.Handler):
    """Notes where each attempt of this rank ran out of memory."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.phase = ""
        self.where: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        stepping = record.name.endswith("stepping")
        self.where.append("stepping" if stepping else self.phase)


class Scale(nn.Module):
    """A product whose backward pass takes more memory than the forward pass did.

    Most of its weights are as good as unused: they make the optimizer's step large. There is no
    matrix product, which MKL rounds in another order where the last megabyte is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 32, 32))
        self.many = nn.Parameter(torch.ones(500_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).mean(dim=(2, 3)) + self.many.mean()


def limited_training(
    rank: int, sizes: list[int | None], limit: Any, watch: Watch
) -> tuple[list[torch.Tensor], list[int]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Tanh(), nn.Dropout(0.3), nn.GELU(), Scale(), nn.Linear(16, 4)
    )  # fmt: skip
    model.register_forward_pre_hook(lambda *_: setattr(watch, "phase", "forward"))

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = outputs.square().mean()
        loss.register_hook(lambda _: setattr(watch, "phase", "backward"))
        return loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    group = dist.group.WORLD
    backward = AccumulatedBackward(model, loss_fn, process_group=group)
    step = GuardedStep(optimizer, max_norm=1.0, process_group=group)
    x = torch.randn(32, 16, 32, 32, generator=torch.Generator().manual_seed(rank))
    torch.manual_seed(3 + rank)
    ran = []
    for size in sizes:
        if size is not None:
            backward = AccumulatedBackward(
                model, loss_fn, microbatch_size=size, process_group=group
            )
        optimizer.zero_grad()
        with limit.active():
            ran.append(backward(x, x[:, 0, 0, 0]).microbatch_size)
            step()
    moments = [t for entry in optimizer.state.values() for t in entry.values()]
    return [*model.state_dict().values(), *moments, torch.get_rng_state()], ran


def real_limits(rank: int) -> dict[str, Any]:
    """Rank 1 alone trains under limits of the real allocator, rank 0 without any."""
    torch.backends.mkldnn.set_flags(False)  # as under a limit, also where there is none
    watch, own = Watch(), logging.getLogger("bs_optuna.training")
    own.setLevel(logging.INFO)
    free = memory_limit(torch.device("cpu"), None)
    limits = [memory_limit(torch.device("cpu"), m * 2**20) for m in range(2, 33, 2)]
    limits[0].warm_up(lambda: limited_training(rank, [None], free, watch))
    found: dict[str, Any] = {"ends": [], "where": watch.where, "whole": 0}
    for limit in limits:
        mine = limit if rank == 1 else free
        mine.start_trial()
        own.addHandler(watch)
        try:
            state, ran = limited_training(rank, [None, None], mine, watch)
        except BsOptunaError as error:
            found["ends"].append(str(error))
            continue
        finally:
            own.removeHandler(watch)
        expected, _ = limited_training(rank, list(ran), free, watch)
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True)), limit
        parameters = torch.cat([t.flatten() for t in state[:4]])
        found["ends"].append(parameters.double().sum().item())
        found["whole"] += ran[-1] == 32
    return found


def without_memory(beyond: int, rank: int, *, hard: bool) -> list[Any]:
    """Rank 1 may hold so much more than it does, and uses it up, when it has to tell so.

    Args:
        beyond: Bytes; less than 0 where what it holds is too much already.
        rank: Of this process.
        hard: Whether nothing can lift the limit.
    """
    ranks = Ranks(dist.group.WORLD, torch.device("cpu"), numbers=2)
    for _ in range(32):  # until each of gloo's threads has run, and has its own cache of memory
        ranks.tell([0.0, 0.0])
    _, outer = resource.getrlimit(resource.RLIMIT_DATA)
    most = process_memory("VmData")["VmData"] + beyond
    limit = (most, most if hard else outer)
    blocks = []
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_DATA, limit)
        for size in (100_000, 10_000, 5_000):
            with suppress(MemoryError):
                while True:
                    blocks.append(bytearray(size))
    told = [ranks.tell([rank + 1.0, float(bool(blocks))]) for _ in range(3)]
    if rank == 1:
        assert resource.getrlimit(resource.RLIMIT_DATA) == limit
        resource.setrlimit(resource.RLIMIT_DATA, (limit[1], limit[1]))
    return told


class Hungry(nn.Module):
    """Runs out of memory above a microbatch size, in forward or in backward."""

    def __init__(self, fits: float, where: str) -> None:
        super().__init__()
        self.net = network()
        self.fits, self.where = fits, where
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        outputs: torch.Tensor = self.net(x)
        if len(x) > self.fits and self.where == "onednn":
            self.fits = 99
            raise RuntimeError("could not create a primitive")
        if len(x) > self.fits and self.where == "forward":
            allocate_too_much()
        if len(x) > self.fits and outputs.requires_grad:
            outputs.register_hook(lambda _: allocate_too_much())
        return outputs


def one_sample(rank: int) -> str:
    """Rank 1 has a single sample, which does not fit; rank 0 has twelve, which do."""
    model = Hungry(0 if rank == 1 else 99, "forward")
    backward = AccumulatedBackward(
        model, nn.functional.cross_entropy, process_group=dist.group.WORLD
    )
    try:
        backward(*images(rank, 12 if rank == 0 else 1))
    except MicrobatchDoesNotFitError as error:
        return str(error)
    return "it fits"


def backing_off(rank: int) -> dict[str, Any]:
    """Ragged parts, 12 and 7 samples; what rank 1 cannot hold, rank 0 does not try either."""
    found = {}
    for where in ("forward", "backward", "onednn"):
        for fits in (3, 0) if where != "onednn" else (3,):
            model = Hungry(fits if rank == 1 else 99, where)
            backward = AccumulatedBackward(
                model, nn.functional.cross_entropy, process_group=dist.group.WORLD
            )
            batch = images(rank, 12 if rank == 0 else 7)
            torch.manual_seed(5)
            before = torch.get_rng_state()
            try:
                end: Any = backward(*batch)
            except MicrobatchDoesNotFitError as error:
                end = (str(error), error.sizes_tried, error.bytes_requested)
                assert torch.equal(torch.get_rng_state(), before)
            found[f"{where} {fits}"] = (
                end, list(model.seen), backward.microbatch_size, gradients(model)
            )  # fmt: skip
    return found


if __name__ == "__main__":
    rank_main(
        {
            "any_operation": any_operation,
            "real_limits": real_limits,
            "nothing_left": partial(without_memory, 2**20, hard=True),
            "over_its_limit": partial(without_memory, -(2**24), hard=False),
            "backing_off": backing_off,
            "one_sample": one_sample,
        }
    )
