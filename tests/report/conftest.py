"""A small real study, made once for each file of tests."""

from __future__ import annotations

import pytest

from bs_optuna.config import StudyConfig
from bs_optuna.study.tuning import Tuning
from bs_optuna.study.tuning import prepare
from bs_optuna.tasks import digits


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    folder = tmp_path_factory.mktemp("report")
    config = StudyConfig(
        trials=5, budget="samples=400", storage=f"{folder}/study.db", device="cpu", final_runs=0
    )
    tuning = prepare(config, digits.task())
    tuning.run(timeout=None, started=lambda trial: None, ended=lambda study, trial: None)
    return tuning
