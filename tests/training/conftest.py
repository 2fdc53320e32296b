"""What tests of training share."""

from __future__ import annotations

import pytest
from collecting import leave_out_of_collections


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> None:
    leave_out_of_collections()
