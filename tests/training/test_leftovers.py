"""Two hundred real failures leave nothing behind, and dealing with them imports nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from children import run_limited


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a CPU's memory")
def test_failures_leave_nothing_behind() -> None:
    found = run_limited(Path(__file__).with_name("real_leftovers.py"))
    assert found["grown"] < 5 * 2**20
    assert found["imported"] == []
    for where in ("forward", "backward", "stepping", "evaluation"):
        assert found["where"][where] >= 3
