"""What tests of training share."""

from __future__ import annotations

import gc

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> None:
    """Every failed attempt collects garbage: leaves out what was there before these tests."""
    # The first step of an optimizer imports a good part of PyTorch.
    torch.optim.SGD([torch.ones(1)], lr=0.1).step()
    gc.collect()
    gc.freeze()
