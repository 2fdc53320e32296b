"""What is asked for little does not load what is slow."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("flag", ["--help", "--show-config"])
def test_help_and_settings_are_shown_without_loading_what_is_slow(flag: str) -> None:
    code = (
        "import sys; from bs_optuna.tune import main\n"
        f"try: main([{flag!r}])\n"
        "except SystemExit: pass\n"
        "print('loaded', {'torch', 'optuna', 'sklearn', 'rich'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "batch" in run.stdout
    assert run.stdout.splitlines()[-1] == "loaded set()"


def test_importing_the_package_loads_neither_torch_nor_optuna() -> None:
    code = (
        "import sys, bs_optuna, bs_optuna.training; print({'torch', 'optuna'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout == "set()\n"


def test_the_environment_can_be_asked_for_without_loading_torch() -> None:
    program = (
        "import sys, bs_optuna.training.limit_environment; "
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout

    assert output.split() == ["False", "False"]


def test_the_first_trial_is_not_timed_while_torch_loads_its_compiler() -> None:
    program = """
import sys, optuna, torch
from bs_optuna.tasks import digits
from bs_optuna.training import Budget, TrainingObjective
objective = TrainingObjective(
    digits.task(), budget=Budget("steps", 1), batch_size=(8, 8), device=torch.device("cpu")
)
before = set(sys.modules)
optuna.create_study().optimize(objective, n_trials=1)
late = [name for name in set(sys.modules) - before if name.startswith("torch.")]
print("torch._dynamo" in sys.modules, len(late) > 20)
"""
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["True", "False"]
