"""A model that tags the words of texts of any length, and what a budget of words needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


PADDING = 0


class Tagger(nn.Module):
    """Tags each token of a text, by that and those around it; memory for ``fits`` of them."""

    def __init__(self, fits: int = 10**9) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 6, padding_idx=PADDING)
        self.mix = nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        self.fits = fits
        self.seen: list[tuple[int, int]] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen.append((tokens.shape[0], tokens.shape[1]))
        if tokens.numel() > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        around = self.mix(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        outputs: torch.Tensor = self.head(torch.tanh(around))
        return outputs


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(
        outputs.flatten(0, 1), targets.flatten(), ignore_index=PADDING
    )


def count(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (targets != PADDING).sum()


def lengths_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (inputs != PADDING).sum(1)


def trim(inputs: torch.Tensor, targets: torch.Tensor, longest: int) -> Any:
    return inputs[:, :longest], targets[:, :longest]


def texts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), 12)
    real = torch.arange(12) < torch.tensor(lengths)[:, None]
    inputs = torch.randint(1, 20, shape, generator=generator) * real
    return inputs, torch.randint(1, 4, shape, generator=generator) * real


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
