"""What tests of training share."""

from __future__ import annotations

import optuna
import pytest
from collecting import leave_out_of_collections


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> None:
    leave_out_of_collections()


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(
        storage="sqlite:///:memory:", sampler=optuna.samplers.RandomSampler(seed=0)
    )
