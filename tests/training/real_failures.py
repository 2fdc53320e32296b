"""Run in a process of its own: real allocator failures, compared with runs that never failed.

Prints where the failures happened, as JSON. A wrong bit ends it with an AssertionError.
"""

from __future__ import annotations

import gc
import json
import logging
from typing import Any

import torch
from torch import nn

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training.memory_limit import memory_limit


BATCH = 64
STEPS = 3


class Watch(logging.Handler):
    """Notes in which phase of the step each attempt ran out of memory."""

    phase = "none"

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.failures: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.failures.append(self.phase)


WATCH = Watch()


def forward_begins(module: nn.Module, inputs: object) -> None:
    WATCH.phase = "forward"


def backward_begins(grad: torch.Tensor) -> None:
    WATCH.phase = "backward"


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(outputs, targets)
    loss.register_hook(backward_begins)
    return loss


class Scale(nn.Module):
    """A product whose backward pass takes more memory than the forward pass did."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).mean(dim=(2, 3))


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    # No large matrix product: where the last megabyte is missing, those of MKL do without their
    # buffers and round in another order, with or without a failure before.
    model = nn.Sequential(
        nn.BatchNorm2d(8), nn.Tanh(), nn.Dropout(0.3),
        nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.3), Scale(), nn.Linear(8, 4),
    )  # fmt: skip
    model.register_forward_pre_hook(forward_begins)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [t for entry in optimizer.state.values() for t in entry.values()]
    grads = [p.grad for p in model.parameters()]
    return [*model.state_dict().values(), *moments, *grads, torch.get_rng_state()]


def train(
    sizes: list[int | None], limit: Any
) -> tuple[list[torch.Tensor], list[int], torch.Tensor]:
    """State after a few steps, the microbatch size of each, and the sum of the losses."""
    model, optimizer = build()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 8, 32, 32, generator=generator)
    y = torch.randint(4, (BATCH,), generator=generator)
    ran, losses = [], torch.zeros(())
    backward = AccumulatedBackward(model, loss_fn)
    for size in sizes:
        if size is not None:
            backward = AccumulatedBackward(model, loss_fn, microbatch_size=size)
        optimizer.zero_grad()
        with limit.active():
            result = backward(x, y)
        optimizer.step()
        ran.append(result.microbatch_size)
        losses = losses + result.loss
    return state(model, optimizer), ran, losses


def main() -> None:
    torch.set_num_threads(1)
    # Off as it is under a limit: the runs that never fail must use the same convolutions.
    torch.backends.mkldnn.set_flags(False)
    logger = logging.getLogger("bs_optuna.training.backward")
    logger.setLevel(logging.INFO)
    logger.addHandler(WATCH)
    free = memory_limit(torch.device("cpu"), None)
    whole = 0
    train([None], free)
    gc.freeze()  # each failure collects garbage: leave out what was there before
    for half in range(1, 61, 2):
        limit = memory_limit(torch.device("cpu"), half * 2**19)
        limit.warm_up(lambda: train([None], free))
        limit.start_trial()
        try:
            found, ran, losses = train([None] * STEPS, limit)
        except MicrobatchDoesNotFitError:
            continue
        expected, _, expected_losses = train(list(ran), free)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), half
        assert torch.equal(losses, expected_losses)
        whole += ran[-1] == BATCH
    print(json.dumps({"failures": WATCH.failures, "whole": whole}))


if __name__ == "__main__":
    main()
