"""Run as one of two processes: parts of a batch, ragged in all ways, and their gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import gradients
from ranks import rank_main

from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import GuardedStep
from bs_optuna.training import ranks


IGNORED = -100
PARTS = (5, 3)  # samples of each rank
BUDGETS = (9, 20)  # tokens in a microbatch


class Branches(nn.Module):
    """One layer for every sample, one that only large first features reach, one for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 7)
        self.sometimes = nn.Linear(5, 7)
        self.never = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.head = nn.Linear(7, 3)
        self.last = nn.Conv1d(9, 9, 1, bias=False)
        self.offset = nn.Parameter(torch.zeros(3))  # remains of another type
        self.head.weight = nn.Parameter(torch.randn(7, 3).t())  # lies in memory column by column
        self.register_buffer("mask", torch.rand(6) > 0.5)
        self.register_buffer("short", torch.randint(9, (4,), dtype=torch.int16))
        self.register_buffer("expanded", torch.randn(3, 1, 2).expand(3, 4, 2))
        self.register_buffer("sliced", torch.randn(6, 6)[::2, 1::2])
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(x)
        large = x[:, :1, :1] > 10
        if large.any():
            hidden = torch.where(large, hidden + self.sometimes(x), hidden)
        return self.last(self.head(torch.tanh(self.frozen(hidden)))) + self.offset


def branches(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Branches().double()
    model.offset.data = model.offset.data.float()
    return model


def sequences(reduction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight samples of up to nine tokens; the last two, on rank 1, reach another layer."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(PARTS), 9, 5, dtype=torch.float64, generator=generator)
    x[-2:, :, 0] += 20
    y = torch.randint(3, (sum(PARTS), 9), generator=generator)
    if reduction == "tokens":
        for row, length in enumerate((9, 0, 4, 1, 7, 2, 0, 3)):
            y[row, length:] = IGNORED
    return x, y


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def summed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")


def counted(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (targets != IGNORED).sum()


def settings(reduction: str) -> dict[str, Any]:
    if reduction == "sum":
        return {"loss_fn": summed, "reduction": "sum"}
    return {"loss_fn": loss_fn, "count": counted if reduction == "tokens" else None}


def part(rank: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[: PARTS[0]] if rank == 0 else tensor[PARTS[0] :]


def whole_batch(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for reduction in ("samples", "tokens", "sum"):
        for size in (1, 2, 8):
            x, y = (part(rank, tensor) for tensor in sequences(reduction))
            x = x.requires_grad_()
            ranks.BUCKET_BYTES = 100 if size == 2 else 2**20  # some gradients fill several
            model = branches(seed=rank)  # rank 1 gets the parameters and buffers of rank 0
            backward = AccumulatedBackward(
                model, microbatch_size=size, process_group=dist.group.WORLD, **settings(reduction)
            )
            result = backward(x, y)
            once = gradients(model)
            backward(x.detach(), y)
            found[f"{reduction} {size}"] = {
                "result": result, "gradients": once, "twice": gradients(model), "inputs": x.grad,
                "state": model.state_dict(),
            }  # fmt: skip
    for budget in BUDGETS:
        model = branches(seed=rank)
        backward = AccumulatedBackward(
            model, microbatch_tokens=budget, process_group=dist.group.WORLD, **settings("tokens")
        )
        result = backward(*(part(rank, tensor) for tensor in sequences("tokens")))
        found[f"budget {budget}"] = (result, gradients(model))
    found["trained"] = trained(rank)
    found["empty"] = nothing_on_rank_1(rank)
    found["bfloat16"] = loss_of_low_precision(rank)
    return found


def loss_of_low_precision(rank: int) -> torch.Tensor:
    """Rank 0 splits its part and rank 1 does not."""
    model = nn.Linear(5, 3).bfloat16()
    x = part(rank, sequences("samples")[0]).flatten(1)[:, :5].bfloat16()
    backward = AccumulatedBackward(
        model, lambda o, t: o.square().mean(), microbatch_size=4, process_group=dist.group.WORLD
    )
    return backward(x).loss


def trained(rank: int | None) -> list[torch.Tensor]:
    """Parameters after a few clipped steps with momentum; None is one process with all samples."""
    model = branches(seed=rank or 0)
    model.offset.requires_grad_(False)  # rounds as its type does
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    group = None if rank is None else dist.group.WORLD
    backward = AccumulatedBackward(
        model, microbatch_size=8 if rank is None else 2, process_group=group, **settings("tokens")
    )
    step = GuardedStep(optimizer, max_norm=0.1, process_group=group)
    x, y = sequences("tokens")
    for turn in range(5):
        optimizer.zero_grad()
        # Which samples are whose changes with every step.
        batch = [tensor.roll(turn, 0) for tensor in (x, y)]
        backward(*(batch if rank is None else [part(rank, tensor) for tensor in batch]))
        step()
    return [p.detach().clone() for p in model.parameters()]


def nothing_on_rank_1(rank: int) -> list[torch.Tensor | None]:
    """Rank 1 holds no target at all."""
    x, y = (part(rank, tensor) for tensor in sequences("samples"))
    if rank == 1:
        y = torch.full_like(y, IGNORED)
    model = branches(seed=0)
    AccumulatedBackward(model, process_group=dist.group.WORLD, **settings("tokens"))(x, y)
    return gradients(model)


if __name__ == "__main__":
    rank_main({"whole_batch": whole_batch})
