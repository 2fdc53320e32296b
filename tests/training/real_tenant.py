"""Run in a process of its own: memory that another tenant takes and gives back, really allocated.

Prints what ran and what failed in each phase, as JSON. A wrong bit ends it with an AssertionError.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from real_failures import BATCH
from real_failures import build
from real_failures import loss_fn
from real_failures import state

from bs_optuna.training import AccumulatedBackward
from bs_optuna.training.memory_limit import memory_limit


LIMIT = 50 * 2**20
TENANT = 40 * 2**20
WAIT = 3
PHASES = [("alone", 4), ("tenant", 24), ("alone again", 50)]


def train(
    sizes: list[int] | None, limit: Any, phases: list[tuple[str, int]] = PHASES
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """State in the end, and by phase the microbatch sizes that ran and those that failed."""
    model, optimizer = build()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 8, 32, 32, generator=generator)
    y = torch.randint(4, (BATCH,), generator=generator)
    backward = AccumulatedBackward(model, loss_fn, regrow_after=WAIT)
    told = iter(sizes or [])
    found: dict[str, Any] = {}
    for phase, steps in phases:
        ran, failed = [], []
        with limit.active():
            tenant = torch.zeros(TENANT if phase == "tenant" else 0, dtype=torch.uint8)
            for _ in range(steps):
                if sizes is not None:
                    backward = AccumulatedBackward(model, loss_fn, microbatch_size=next(told))
                optimizer.zero_grad()
                result = backward(x, y)
                optimizer.step()
                ran.append(result.microbatch_size)
                failed.append(list(result.sizes_tried[:-1]))
            del tenant
        found[phase] = {"ran": ran, "failed": failed}
    return state(model, optimizer), found


def main() -> None:
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # as it is under a limit
    free = memory_limit(torch.device("cpu"), None)
    limit = memory_limit(torch.device("cpu"), LIMIT)
    limit.warm_up(lambda: train([BATCH], free, [("alone", 1)]))
    limit.start_trial()
    found, phases = train(None, limit)
    expected, _ = train([size for phase in phases.values() for size in phase["ran"]], free)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    print(json.dumps(phases))


if __name__ == "__main__":
    main()
