"""The settings of a process that make what fits under a limit repeatable."""

from __future__ import annotations

import sys

import pytest
from limited_process import run

from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT


linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel enforces it on Linux only")


@linux
def test_a_process_that_is_not_prepared_is_told_how_to_start() -> None:
    program = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            memory_limit(torch.device("cpu"), 64 * MIB)
        print(*[warning.message for warning in caught], sep="\\n")
    """
    lines = run(program, environment={}).splitlines()

    assert len(lines) == 1
    assert "not repeatable" in lines[0]
    assert all(f"{name}={value}" in lines[0] for name, value in LIMIT_ENVIRONMENT.items())


@linux
def test_setting_the_environment_too_late_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
        import os
        from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT, is_prepared
        os.environ.update(LIMIT_ENVIRONMENT)
        print(is_prepared())
    """
    assert run(program, environment={}) == "False"
    assert run(program) == "True"


@linux
@pytest.mark.slow
def test_the_time_steps_of_a_recurrent_network_are_given_back() -> None:
    """Some 25 KiB each, thousands of them: a heap that kept them would leave no room to others."""
    program = """
        torch.backends.mkldnn.set_flags(False)
        model = nn.LSTM(16, 64, num_layers=2, bidirectional=True, batch_first=True)

        def step(size):
            model(torch.randn(size, 50, 16))[0].mean().backward()

        step(2)
        before = process_memory("VmData")["VmData"]
        for size in (103, 102):
            step(size)
        print((process_memory("VmData")["VmData"] - before) / MIB)
    """
    higher = LIMIT_ENVIRONMENT | {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**10)}
    assert float(run(program)) < 12
    assert float(run(program, environment=higher)) > 20
