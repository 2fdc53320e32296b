"""The examples on the page about scaling print what the page says."""

from __future__ import annotations

import doctest
from pathlib import Path


def test_examples_of_the_page() -> None:
    page = Path(__file__).parents[2] / "docs" / "scaling.md"

    result = doctest.testfile(str(page), module_relative=False)

    assert result.attempted >= 6
    assert result.failed == 0
