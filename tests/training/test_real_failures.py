"""A real allocator fails in forward and in backward, and no bit of the outcome differs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from children import run_limited


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a CPU's memory")
def test_real_failures_in_forward_and_backward_change_no_bit() -> None:
    found = run_limited(Path(__file__).with_name("real_failures.py"))
    assert found["failures"].count("forward") >= 5
    assert found["failures"].count("backward") >= 5
    assert found["whole"] >= 1  # the largest limit holds the whole batch: the sweep met the edge
