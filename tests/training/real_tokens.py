"""Run in a process of its own: texts of varying length under a real limit on memory.

Prints, as JSON, the failed attempts of a whole epoch for a budget of elements and for samples.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from bs_optuna.training import AccumulatedBackward
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.memory_limit import memory_limit


# Each element takes 32 channels of 4 bytes in each of the layers: 4096 of them about 4 MiB.
LIMIT = 12 * 2**20
BUDGET = 4096
LONGEST = 2048


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 32), nn.Tanh(), nn.GELU(), nn.Linear(32, 50))


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=0)


def batches() -> list[torch.Tensor]:
    """An epoch of 32 texts each, short but for one very long one near its end."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(6):
        lengths = torch.randint(8, 65, (32,), generator=generator)
        if number == 4:
            lengths[7] = LONGEST
        longest = int(lengths.max())
        real = torch.arange(longest) < lengths[:, None]
        found.append(torch.randint(1, 50, (32, longest), generator=generator) * real)
    return found


def epoch(limit: MemoryLimit, **settings: Any) -> dict[str, Any]:
    """Sizes that failed and that ran, by batch."""
    model = build()
    backward = AccumulatedBackward(
        model, loss_fn, count=lambda inputs, targets: (targets != 0).sum(), **settings
    )
    failed, ran = [], []
    for texts in batches():
        model.zero_grad()
        with limit.active():
            result = backward(texts, texts)
        failed.append(list(result.sizes_tried[:-1]))
        ran.append(result.sizes_tried[-1])
    return {"failed": failed, "ran": ran}


def main() -> None:
    torch.set_num_threads(1)
    tokens = {
        "lengths": lambda inputs, targets: (inputs != 0).sum(1),
        "trim": lambda inputs, targets, longest: (inputs[:, :longest], targets[:, :longest]),
    }
    free = memory_limit(torch.device("cpu"), None)
    limit = memory_limit(torch.device("cpu"), LIMIT)
    limit.warm_up(lambda: epoch(free, microbatch_tokens=BUDGET, **tokens))
    found = {}
    for name, settings in (
        ("samples", {}),
        ("tokens", {"microbatch_tokens": BUDGET, **tokens}),
        ("too many tokens", {"microbatch_tokens": 2**20, **tokens}),
    ):
        limit.start_trial()
        found[name] = epoch(limit, **settings)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
