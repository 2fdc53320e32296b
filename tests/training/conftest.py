"""What tests of training share."""

from __future__ import annotations

import optuna
import pytest
from collecting import leave_out_of_collections

from bs_optuna.training.predicted_memory import PredictedMemory


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> None:
    leave_out_of_collections()


@pytest.fixture
def ample_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is known to be ample, for tests that count what trials do: no steps look first."""
    monkeypatch.setattr(PredictedMemory, "surely_fits", lambda *_, **__: True)


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(
        storage="sqlite:///:memory:", sampler=optuna.samplers.RandomSampler(seed=0)
    )
