"""Run as one of two processes: what goes wrong on number 1 alone and is not a matter of size."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
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
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import GuardedStep


def messages(rank: int) -> dict[str, Any]:
    """What each rank raises where rank 1 alone, or both together, did something wrong."""
    group = dist.group.WORLD
    found: dict[str, Any] = {}

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            found[name] = (type(error).__name__, str(error))

    def wrong_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if rank == 1:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")
        return nn.functional.cross_entropy(outputs, targets)

    model = network()
    batch = images(rank)
    attempt("own", lambda: AccumulatedBackward(model, wrong_loss, process_group=group)(*batch))
    found["untouched"] = gradients(model)
    fine = AccumulatedBackward(model, nn.functional.cross_entropy, process_group=group)
    attempt("batch", lambda: fine(batch[0], batch[1][: 4 - rank]))
    scaled = AccumulatedBackward(
        model, nn.functional.cross_entropy, process_group=group,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0 + rank),
    )  # fmt: skip
    attempt("scale", lambda: scaled(*batch))
    nothing = {"count": lambda inputs, targets: 0}
    empty = AccumulatedBackward(model, nn.functional.cross_entropy, process_group=group, **nothing)
    attempt("nothing", lambda: empty(*batch))
    model[0].weight.requires_grad_(rank == 0)
    attempt("frozen", lambda: fine(*batch))
    model[0].weight.requires_grad_(True)
    normalized = AccumulatedBackward(  # rank 0 has three samples, and is left with one
        nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), nn.functional.cross_entropy,
        microbatch_size=2, batch_norm="exact", process_group=group,
    )  # fmt: skip
    attempt("norm", lambda: normalized(torch.randn(3 + rank, 3), torch.zeros(3 + rank).long()))
    sparse = nn.Sequential(nn.Embedding(4, 2, sparse=True))
    embedded = AccumulatedBackward(sparse, lambda o, t: o.sum(), process_group=group)
    attempt("sparse", lambda: embedded(torch.tensor([1, 2])))
    other = nn.Linear(3 + rank, 2)
    attempt("models", lambda: AccumulatedBackward(other, wrong_loss, process_group=group))
    with Recording(None) as device:
        AccumulatedBackward(model, wrong_loss, process_group=group)
    zeros = [i for i, name in enumerate(device.names) if name.startswith("aten.zeros.")]
    with FailingAt(zeros[1] if rank == 1 else None):  # the first holds what ranks tell each other
        attempt("room", lambda: AccumulatedBackward(model, wrong_loss, process_group=group))
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    attempt("wrapped", lambda: AccumulatedBackward(wrapped, wrong_loss, process_group=group))
    bare = nn.Flatten()
    attempt("parameters", lambda: AccumulatedBackward(bare, wrong_loss, process_group=group))
    synchronized = nn.Sequential(nn.SyncBatchNorm(3))
    attempt("sync", lambda: AccumulatedBackward(synchronized, wrong_loss, process_group=group))
    alone = dist.new_group([0])
    if rank == 1:
        attempt("outside", lambda: AccumulatedBackward(model, wrong_loss, process_group=alone))
    fine(*batch)  # after all of that the ranks still understand each other
    found["after"] = gradients(model)
    return found


def failing_steps(rank: int) -> dict[str, Any]:
    """Optimizers that never get through on rank 1, in the first step or in the second."""
    found: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        for scaled in (False, True):
            for good_steps in (0, 1):
                name = f"{optimizer}{' scaled' * scaled} {good_steps}"
                found[name] = failing_step(rank, optimizer, scaled, good_steps)
    return found


def failing_step(rank: int, optimizer: str, scaled: bool, good_steps: int) -> Any:
    model, group = network(), dist.group.WORLD
    made = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1, enabled=scaled)
    backward = AccumulatedBackward(
        model, nn.functional.cross_entropy, scaler=scaler, process_group=group
    )
    step = GuardedStep(made, scaler=scaler, process_group=group)
    torch.manual_seed(2 + rank)

    def state() -> list[Any]:
        return copy.deepcopy([model.state_dict(), made.state_dict(), scaler.state_dict()])

    def no_room(*_: Any) -> None:
        if rank == 1:
            allocate_too_much()

    for _ in range(good_steps):
        made.zero_grad()
        backward(*images(rank))
        step()
    made.zero_grad()
    backward(*images(rank))
    before = state()
    # A fused step cannot fail once it touched a parameter; others fail when all is done.
    register = made.register_step_pre_hook if optimizer == "fused" else made.register_step_post_hook
    hook = register(no_room)
    try:
        step()
        message = "no error"
    except BsOptunaError as error:
        message = f"{type(error).__name__}: {error}"
    after = state()
    hook.remove()
    made.zero_grad()
    backward(*images(rank))
    step()
    return {
        "before": before, "after": after, "message": message, "later": state(), "lost": step.lost,
    }  # fmt: skip


class NeverTheBiases(FailingAt):
    """Has no memory on rank 1 for the step of what has one dimension."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.position == 1 and "_fused_" in str(func) and args[0][0].ndim == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


def half_steps(rank: int) -> Any:
    """A third step whose second group never fits on rank 1."""
    model, group = network(), dist.group.WORLD
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim == 1) == last]} for last in (0, 1)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
    backward = AccumulatedBackward(model, nn.functional.cross_entropy, process_group=group)
    step = GuardedStep(optimizer, process_group=group)
    message, states = "no error", []
    for number in range(4):
        optimizer.zero_grad()
        backward(*images(rank))
        states.append(copy.deepcopy([model.state_dict(), optimizer.state_dict()]))
        try:
            with NeverTheBiases(rank if number == 2 else None):
                step()
        except BsOptunaError as error:
            message = f"{type(error).__name__}: {error}"
    states.append(copy.deepcopy([model.state_dict(), optimizer.state_dict()]))
    return {"message": message, "states": states}


def hooked_steps(rank: int) -> list[Any]:
    """The first step of a single group, or the second, after which a hook fails on rank 1."""
    found = []
    for good_steps in (0, 1):
        model, group = network(), dist.group.WORLD
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        backward = AccumulatedBackward(model, nn.functional.cross_entropy, process_group=group)
        step = GuardedStep(optimizer, process_group=group)
        message = "no error"
        for number in range(good_steps + 2):
            if number == good_steps and rank == 1:
                hook = optimizer.register_step_post_hook(lambda *_: allocate_too_much())
            optimizer.zero_grad()
            backward(*images(rank))
            try:
                step()
            except BsOptunaError as error:
                message = f"{type(error).__name__}: {error}"
            if number == good_steps and rank == 1:
                hook.remove()
        state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        found.append({"message": message, "state": state})
    return found


def scaled_steps(rank: int) -> dict[str, Any]:
    """An overflow on rank 1 alone, and an error of its own in an optimizer's step."""
    found: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        model, group = network(), dist.group.WORLD
        made = OPTIMIZERS[optimizer](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        backward = AccumulatedBackward(
            model, nn.functional.cross_entropy, scaler=scaler, process_group=group
        )
        step = GuardedStep(made, max_norm=1.0, scaler=scaler, process_group=group)
        before = copy.deepcopy(model.state_dict())
        x, y = images(rank)
        backward(torch.full_like(x, float("inf")) if rank == 1 else x, y)
        step()
        found[optimizer] = {
            "before": before, "after": copy.deepcopy(model.state_dict()),
            "scale": scaler.get_scale(),
        }  # fmt: skip

    def mistaken(*_: Any) -> None:
        if rank == 1:
            raise KeyError("weight")

    made.zero_grad()
    backward(*images(rank))
    made.register_step_pre_hook(mistaken)
    try:
        step()
    except (KeyError, BsOptunaError) as error:
        found["own"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    rank_main(
        {
            "messages": messages,
            "failing_steps": failing_steps,
            "half_steps": half_steps,
            "hooked_steps": hooked_steps,
            "scaled_steps": scaled_steps,
        }
    )
