"""Another tenant takes memory and gives it back: the microbatch shrinks and grows back."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from children import run_limited


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a CPU's memory")
def test_the_microbatch_shrinks_with_a_tenant_and_grows_back_when_it_has_gone() -> None:
    phases = run_limited(Path(__file__).with_name("real_tenant.py"))
    assert phases["alone"] == {"ran": [64] * 4, "failed": [[]] * 4}
    tenant = phases["tenant"]
    fits = tenant["ran"][0]
    assert 1 < fits < 64
    assert set(tenant["ran"]) == {fits}
    tries = [failed for failed in tenant["failed"][1:] if failed]
    assert 2 <= len(tries) <= math.log2(24 / 3 + 1)
    assert all(failed == [2 * fits] for failed in tries)
    again = phases["alone again"]
    assert again["ran"] == sorted(again["ran"])
    assert again["ran"][-1] == 64
    assert not any(again["failed"])
