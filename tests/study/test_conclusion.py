"""Final runs that memory ends cost the study its scores, not its recommendation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bs_optuna.config import StudyConfig
from bs_optuna.errors import TrainingError
from bs_optuna.science.noise_scale import NoiseReading
from bs_optuna.study.conclusion import conclude
from bs_optuna.study.tuning import Tuning
from bs_optuna.study.tuning import prepare
from bs_optuna.tasks import digits
from bs_optuna.training.final_run import FinalRun


def make_tuning(folder: Path, *, oom_budget: float, failing: list[BaseException | None]) -> Tuning:
    """A study of one trial, whose optimizer raises what is in the list, the last one first."""

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            if failing and (error := failing.pop()) is not None:
                raise error
            super().step()

    config = StudyConfig(
        trials=1, budget="steps=40", batch_size=(2, 2), storage=f"{folder}/study.db",
        device="cpu", oom_budget=oom_budget,
    )  # fmt: skip
    task = replace(digits.task(), optimizer=lambda parameters, rate: Failing(parameters, lr=rate))
    tuning = prepare(config, task)
    tuning.run(timeout=None, started=lambda trial: None, ended=lambda study, trial: None)
    return tuning


FULL = MemoryError()


@pytest.mark.parametrize(
    ("failures", "oom_budget"),
    [
        ([FULL] * 3, 0.5),  # in a row: a step that does not fit
        ([FULL, FULL, None] * 3, 0.0),  # every step fits in the end: thrashing
        ([RuntimeError("std::bad_alloc")] * 3, 0.5),
    ],
)
def test_memory_costs_the_run_that_it_ends(
    tmp_path: Path, failures: list[BaseException | None], oom_budget: float
) -> None:
    failing: list[BaseException | None] = []
    tuning = make_tuning(tmp_path, oom_budget=oom_budget, failing=failing)
    failing += reversed(failures)
    conclusion = conclude(tuning, final_runs=2)
    assert len(failing) <= 2
    assert conclusion is not None
    assert conclusion.failed == 1
    assert [len(values) for values in conclusion.valid.values()] == [1, 1]


def test_a_mistake_of_the_task_is_shown(tmp_path: Path) -> None:
    failing: list[BaseException | None] = []
    tuning = make_tuning(tmp_path, oom_budget=0.5, failing=failing)
    failing.append(ValueError("mend me"))
    with pytest.raises(TrainingError, match=r"^final run 1 of .* ValueError: mend me;"):
        conclude(tuning, final_runs=1)


def test_a_continuation_that_was_interrupted_goes_on_to_where_it_was_going(tmp_path: Path) -> None:
    config = StudyConfig(
        trials=2, budget="steps=4", storage=f"{tmp_path}/study.db", device="cpu", final_runs=0
    )
    nothing: Any = lambda *_: None  # noqa: E731

    def stop(study: object, trial: object) -> None:
        raise KeyboardInterrupt

    first = prepare(config, digits.task())
    first.run(timeout=None, started=nothing, ended=nothing)
    conclude(first, final_runs=0)
    again = prepare(config, digits.task())
    assert again.trials == 4
    with pytest.raises(KeyboardInterrupt):
        again.run(timeout=None, started=nothing, ended=stop)
    assert prepare(config, digits.task()).trials == 4
    # Who asks for fewer has enough: the final runs come next.
    assert prepare(config.model_copy(update={"trials": 1}), digits.task()).trials == 3


def test_noise_is_told_by_all_runs_together_as_far_as_their_samples_reach(tmp_path: Path) -> None:
    tuning = make_tuning(tmp_path, oom_budget=0.5, failing=[])
    runs = [
        FinalRun(
            {"loss": 1.0}, {}, {20: NoiseReading(1.0, 100.0), 60: NoiseReading(1.0, 70.0)}, 64
        ),
        FinalRun({"loss": 2.0}, {}, {20: NoiseReading(3.0, 100.0), 100: NoiseReading(1, 65)}, 64),
    ]
    object.__setattr__(tuning.objective, "confirm", lambda *_, **__: runs.pop(0))
    found = conclude(tuning, final_runs=2)
    assert found is not None
    assert found.valid == {"loss": [1.0, 2.0]}
    # The ratio of the means, and none beyond the samples of those that have read something.
    assert found.noise_scales == {"20": 50.0, "60": None, "100": None}
    assert found.noise_samples == 128
