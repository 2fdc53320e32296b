"""Equality to the bit, of anything that states are made of."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import torch


def random_states() -> list[Any]:
    """The states of all generators of random numbers, quick to compare."""
    others = pickle.dumps((random.getstate(), np.random.get_state()))
    device = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), others, *device]


def seed_all(seed: int) -> None:
    """Seeds them all.

    Those of a GPU only where one is in use: torch.manual_seed writes the stack down for each kind
    of accelerator, which took a fifth of the tests that make hundreds of runs.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def assert_equal(found: Any, expected: Any) -> None:
    """Compares nested containers; tensors and arrays bit for bit."""
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_equal(found[key], expected[key])
    elif isinstance(found, list | tuple):
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b)
    elif isinstance(found, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]
