"""Run as one of two processes: microbatches that shrink and grow back together."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import allocate_too_much
from ranks import gradients
from ranks import images
from ranks import rank_main

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.training import AccumulatedBackward


class Short(nn.Module):
    """Holds so many samples in a microbatch; how many may change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(36, 3)
        self.fits = 99

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.fits:
            allocate_too_much()
        outputs: torch.Tensor = self.layer(x.flatten(1))
        return outputs


def trained(
    rank: int, calls: Iterable[tuple[tuple[int, int], tuple[int, int]]], **settings: Any
) -> list[Any]:
    """What each call ended with: of each are given the ranks' samples and what fits there."""
    model = Short()
    backward = AccumulatedBackward(
        model, nn.functional.cross_entropy, process_group=dist.group.WORLD, **settings
    )
    found = []
    for parts, fits in calls:
        model.zero_grad()
        model.fits = fits[rank]
        try:
            tried = backward(*images(rank, parts[rank])).sizes_tried
        except MicrobatchDoesNotFitError as error:
            tried = (*error.sizes_tried, 0)
        limit = backward.microbatch_size or backward.microbatch_tokens
        found.append((tried, limit, backward.lost.attempts, gradients(model)))
    return found


def growing(rank: int) -> dict[str, Any]:
    drawn = random.Random(1)

    def sizes(least: int) -> tuple[int, int]:
        return drawn.randint(least, 16), drawn.randint(least, 16)

    def spikes() -> list[Any]:
        return [(sizes(1), sizes(0) if i % 7 < 2 else (99, 99)) for i in range(150)]

    # Rank 0 has 12 samples and rank 1 has 7, which does not hold more than 3 for three calls.
    spike = [((12, 7), (99, 3 if i < 3 else 99)) for i in range(12)]
    # Rank 1 has too few samples to try more with, and later has the many.
    swapped = [((12, 3), (3, 99))] * 3 + [((3, 12), (99, 99))] * 9
    budget = {"microbatch_tokens": 60, "lengths": lambda x, y: [5] * len(x)}
    return {
        "spike": trained(rank, spike, regrow_after=2),
        "never": trained(rank, spike, regrow_after=None),
        "swapped": trained(rank, swapped, regrow_after=2),
        "budget": trained(rank, spike, regrow_after=2, **budget),
        "any": [trained(rank, spikes(), regrow_after=1) for _ in range(3)],
        "any budget": trained(rank, spikes(), regrow_after=1, **budget),
    }


if __name__ == "__main__":
    rank_main({"growing": growing})
