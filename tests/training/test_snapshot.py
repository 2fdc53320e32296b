"""Buffers and gradients that cannot simply be copied are put back, or added to, all the same."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_equal
from comparing import gradients
from comparing import seed_all
from torch import nn

from bs_optuna.training import AccumulatedBackward


class Shared(nn.Module):
    """Holds a buffer whose elements are one, one in part, and one that is sparse."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        seed_all(0)
        self.net = nn.Linear(4, 3)
        self.fits = fits
        self.register_buffer("scale", torch.ones(1).expand(3))
        self.register_buffer("rows", torch.ones(2, 1, 3).expand(2, 5, 3))
        self.register_buffer("graph", torch.eye(3).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale[0].mul_(2)  # and so all of its elements
        scale = self.scale * (1 + torch.rand(1))
        if len(x) > self.fits:
            self.scale = scale
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.")
        outputs: torch.Tensor = self.net(x) @ self.graph * scale * self.rows[0, 0]
        return outputs


@pytest.mark.parametrize("microbatch_size", [3, 6])
def test_expanded_and_sparse_buffers_are_put_back(microbatch_size: int) -> None:
    model = Shared(fits=3)
    scale, x = model.scale, torch.ones(6, 4)
    AccumulatedBackward(model, lambda o, t: o.square().mean(), microbatch_size=microbatch_size)(x)
    assert model.scale is scale
    assert model.scale.tolist() == [4.0] * 3
    told = Shared(fits=6)
    AccumulatedBackward(told, lambda o, t: o.square().mean(), microbatch_size=3)(x)
    assert_equal(gradients(model), gradients(told))
