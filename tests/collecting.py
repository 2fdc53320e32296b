"""Garbage is collected after each failed attempt: quickly, without what was there before."""

from __future__ import annotations

import gc

import torch


def leave_out_of_collections() -> None:
    """Leaves all objects of this process so far out of collections, which they would slow."""
    # The first step of an optimizer imports a good part of PyTorch.
    torch.optim.SGD([torch.ones(1)], lr=0.1).step()
    gc.collect()
    gc.freeze()
