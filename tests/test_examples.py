"""Every example runs as its own first lines say, and the page about tasks tells of them all."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from children import run_python
from optuna.trial import TrialState

from bs_optuna.training import Budget
from bs_optuna.training import TrainingObjective
from bs_optuna.training import TrainingTask


ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_it_says(path: Path, tmp_path: Path) -> None:
    said = re.search(r"^    python (.*)$", path.read_text(), re.MULTILINE)
    assert said is not None, f"{path.name} does not say how it is run"
    arguments = shlex.split(said[1])
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run = run_python("-W", "error", *arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_the_tasks_of_the_page_about_tasks_are_trained() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/task.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec("\n".join(blocks), names)  # each goes on with the ones before it
    tasks = [names["task"](), names["tags"]()]
    tasks += [replace(tasks[0], optimizer=names[n]) for n in ("without_decay_of_biases", "clipped")]
    tasks += [replace(tasks[0], model=names[n]) for n in ("fine_tuned", "frozen")]
    for task in tasks:
        study = optuna.create_study()
        objective = TrainingObjective(
            task, budget=Budget("steps", 3), batch_size=(8, 16), device=torch.device("cpu")
        )
        study.optimize(objective, n_trials=1)
        assert study.trials[0].state == TrialState.COMPLETE


def test_the_page_about_tasks_names_every_field() -> None:
    page = (ROOT / "docs/task.md").read_text()
    table = " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", table)) == {field.name for field in fields(TrainingTask)}
