"""No trial keeps the model of an earlier one in memory, in a worker process neither."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from bs_optuna.config import StudyConfig
from bs_optuna.study.collecting import imports_left_out
from bs_optuna.study.tuning import Tuning
from bs_optuna.study.tuning import prepare
from bs_optuna.tasks import digits


class Models:
    """Builds models and knows which of them are alive."""

    def __init__(self, *, cyclic: bool) -> None:
        self._cyclic = cyclic
        self._made: list[weakref.ref[nn.Module]] = []

    def build(self) -> nn.Module:
        model = digits.build_model()
        if self._cyclic:
            model.related = [model]  # as a module that knows its parent
        self._made.append(weakref.ref(model))
        return model

    def alive(self) -> int:
        return sum(made() is not None for made in self._made)


def make_tuning(folder: Path, models: Models) -> Tuning:
    task = replace(digits.task(), model=models.build)
    config = StudyConfig(
        trials=3, budget="steps=2", batch_size=(64, 64), storage=f"{folder}/s.db", device="cpu"
    )
    return prepare(config, task)


@contextmanager
def no_collector() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def test_a_trial_leaves_no_model_to_the_collector(tmp_path: Path) -> None:
    models = Models(cyclic=False)
    tuning = make_tuning(tmp_path, models)
    alive: list[int] = []
    with no_collector():
        tuning.run(
            timeout=None,
            started=lambda trial: alive.append(models.alive()),
            ended=lambda study, trial: alive.append(models.alive()),
        )
    assert alive == [0] * 6


@pytest.mark.parametrize("way", ["run", "run_one"])
def test_a_model_that_holds_itself_goes_when_the_collector_comes(tmp_path: Path, way: str) -> None:
    models = Models(cyclic=True)
    tuning = make_tuning(tmp_path, models)
    alive: list[int] = []

    def started(trial: object) -> None:
        gc.collect()
        alive.append(models.alive())

    with no_collector():
        if way == "run":
            tuning.run(timeout=None, started=started, ended=lambda study, trial: None)
        else:
            run_one_by_one(tuning, started)
    assert alive == [0] * 3


def run_one_by_one(tuning: Tuning, started: Callable[[object], None]) -> None:
    """Three trials as a worker runs them."""
    with imports_left_out():
        for _ in range(3):
            tuning.run_one(
                created=lambda trial: None,
                started=started,
                ended=lambda study, trial: None,
                training=nullcontext,
            )


def test_garbage_of_before_is_not_kept_and_imports_are_left_alone() -> None:
    before = gc.get_freeze_count()
    with no_collector():
        model = digits.build_model()
        model.related = [model]  # type: ignore[assignment]
        made = weakref.ref(model)
        del model
        with imports_left_out():
            assert made() is None
            assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
