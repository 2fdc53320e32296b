"""Equality to the bit, of anything that states are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


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
