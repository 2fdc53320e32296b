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
def test_the_time_steps_of_a_recurrent_network_leave_nothing_in_the_heap() -> None:
    program = """
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.LSTM(16, 64, 2, batch_first=True, bidirectional=True)
                self.head = nn.Linear(128, 3)

            def forward(self, x):
                return self.head(self.layers(x)[0].mean(1))

        torch.backends.mkldnn.set_flags(False)  # as under a limit

        def step(model, size):
            outputs = model(torch.randn(size, 50, 16))
            nn.functional.cross_entropy(outputs, torch.zeros(size, dtype=torch.long)).backward()
            model.zero_grad()
            gc.collect()
            return process_memory("VmData")["VmData"]

        model = Recurrent()
        before = step(model, 2)
        print(max(step(model, size) - before for size in (103, 102)) // MIB)
    """
    assert int(run(program)) < 10
    coarse = {**LIMIT_ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": "65536"}
    assert int(run(program, environment=coarse)) > 20  # or the setting is not needed any more
