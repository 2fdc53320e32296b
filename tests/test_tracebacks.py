"""A traceback begins where the task's own code does, if that is known."""

from __future__ import annotations

import json

import pytest

from bs_optuna.science.accumulation import weights
from bs_optuna.tracebacks import print_traceback


def test_it_begins_in_the_tasks_code_and_goes_on_from_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def own() -> None:
        json.loads("{")

    with pytest.raises(ValueError, match="Expecting property name") as info:
        # Through other code, as a task is called through PyTorch.
        json.dumps(object(), default=lambda _: own())
    error = info.value
    assert error.__traceback__ is not None
    error.__traceback__ = error.__traceback__.tb_next  # this test is a task's code too
    print_traceback(error)
    frames = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  File")]
    assert "test_tracebacks.py" in frames[0]
    assert "json/decoder.py" in frames[-1]


def test_without_the_tasks_code_it_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="counts=") as info:
        weights([])
    assert info.value.__traceback__ is not None
    info.value.__traceback__ = info.value.__traceback__.tb_next
    print_traceback(info.value)
    assert "science/accumulation.py" in capsys.readouterr().err
