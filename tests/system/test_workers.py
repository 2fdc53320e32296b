"""Trials in worker processes that really die: by signals, in the middle of a training."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from bs_optuna.sampling import attributes
from bs_optuna.study import open_study


DYING_TASK = Path(__file__).with_name("dying_task.py")
DEADLINE_S = 120
# 40 steps of 32 samples, evaluated after each 8.
SHORT = ("--budget", "samples=1280", "--batch-size", "32:32", "--final-runs", "1")


def environment(of: str, at: int, times: int) -> dict[str, str]:
    dying = {"DYING_OF": of, "DYING_AT": str(at), "DYING_TIMES": str(times)}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **dying}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "bs_optuna.tune", *arguments]


def tune(
    folder: Path, *arguments: str, of: str = "SIGKILL", at: int = 20, times: int = 0
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(of, at, times),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    name = "dying"
    return open_study(storage=f"sqlite:///{folder}/studies/{name}.db", name=name).get_trials()


def finished(found: list[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    return [t for t in found if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def passes(folder: Path) -> dict[int, list[int]]:
    """Sizes of the microbatches that each process trained on, in order."""
    found: dict[int, list[int]] = {}
    for line in (folder / "passes.log").read_text().splitlines():
        process, size = map(int, line.split())
        found.setdefault(process, []).append(size)
    return found


def nothing_is_left(folder: Path, *, but: Collection[str] = ()) -> bool:
    """Whether the database stands alone, but for the checkpoints that it may have."""
    studies = folder / "studies"
    kept = {path.name for path in studies.iterdir()}
    states = {path.name for path in studies.glob("*.checkpoints/*")}
    others = {"dying.db", "dying.db-wal", "dying.db-shm"}
    if states:
        others.add("dying.db.checkpoints")
    return "dying.db" in kept and kept <= others and states <= {*but}


def wait_for(path: Path, lines: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not (path.exists() and path.read_text().count("\n") >= lines):
        assert time.monotonic() < deadline


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM"])
def test_a_death_costs_one_attempt_which_goes_on_from_its_checkpoint(
    tmp_path: Path, name: str
) -> None:
    run = tune(tmp_path, str(DYING_TASK), "--isolate", "--trials", "3", *SHORT, of=name, times=1)
    assert run.returncode == 0, run.stderr
    assert re.search(rf"^trial 0: .*, fail after .* s \(killed by {name} with ", run.stdout, re.M)
    assert "Recommended for dying" in run.stdout
    killed, again, *others = trials(tmp_path)
    assert killed.state == TrialState.FAIL
    assert killed.user_attrs[attributes.PRUNE_REASON] == f"killed by {name} with microbatch_size=32"
    assert again.state == TrialState.COMPLETE
    assert again.params == killed.params
    assert again.user_attrs[attributes.MICROBATCH_SIZE] == 16
    assert again.user_attrs[attributes.STEPS] == 40
    assert again.user_attrs[attributes.ATTEMPT] == 2
    assert again.intermediate_values.keys() == {256, 512, 768, 1024, 1280}
    assert {k: again.intermediate_values[k] for k in (256, 512)} == killed.intermediate_values
    # What was learned is where the next ones start.
    assert [t.user_attrs[attributes.MICROBATCH_SIZE] for t in others] == [16, 16]
    assert len(finished([killed, again, *others])) == 3

    first, second, _parent = passes(tmp_path).values()
    assert first == [32] * 20
    # The death was in step 20, the last checkpoint after 16: 24 of 40 are left.
    assert second == [16] * 2 * (24 + 40 + 40)
    assert nothing_is_left(tmp_path)


@pytest.mark.slow
def test_a_killed_trial_gets_the_very_value_that_it_would_have_had(tmp_path: Path) -> None:
    alone, hurt = tmp_path / "alone", tmp_path / "hurt"
    values = []
    for folder, times, isolated in ((alone, 0, ()), (hurt, 1, ("--isolate",))):
        folder.mkdir()
        # A microbatch of one sample cannot be halved, so both train the same.
        run = tune(
            folder, str(DYING_TASK), *isolated, "--trials", "1", "--microbatch-size", "1",
            *SHORT, "--final-runs", "0", at=700, times=times,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        (trial,) = finished(trials(folder))
        values.append((trial.value, trial.intermediate_values, trial.params))
    assert (hurt / "deaths.log").exists()
    assert values[0] == values[1]


@pytest.mark.slow
def test_a_task_that_always_dies_costs_a_bounded_number_of_attempts(tmp_path: Path) -> None:
    run = tune(tmp_path, str(DYING_TASK), "--isolate", "--trials", "2", *SHORT, at=3, times=99)
    assert run.returncode == 1, run.stderr
    assert "nothing to recommend" in run.stdout
    found = trials(tmp_path)
    states = [trial.state for trial in found]
    assert states == ([TrialState.FAIL] * 3 + [TrialState.PRUNED]) * 2
    for trial in finished(found):
        assert trial.user_attrs[attributes.PRUNE_REASON].startswith(
            "memory: killed in each of 3 attempts, last by SIGKILL with microbatch_size="
        )
        assert trial.user_attrs[attributes.STEPS] == 0
    assert len((tmp_path / "deaths.log").read_text().split()) == 6
    assert nothing_is_left(tmp_path)


@pytest.mark.slow
def test_several_workers_lose_nothing_and_run_nothing_twice(tmp_path: Path) -> None:
    wide = ("--budget", "samples=1280", "--batch-size", "8:64", "--final-runs", "0")
    run = tune(tmp_path, str(DYING_TASK), "--workers", "2", "--trials", "9", *wide, times=2)
    assert run.returncode == 0, run.stderr
    found = trials(tmp_path)
    assert [trial.number for trial in found] == list(range(11))
    states = Counter(trial.state for trial in found)
    assert states[TrialState.FAIL] == 2
    assert len(finished(found)) == 9
    settings = Counter(tuple(trial.params.items()) for trial in finished(found))
    assert set(settings.values()) == {1}
    for killed in (t for t in found if t.state == TrialState.FAIL):
        assert settings[tuple(killed.params.items())] == 1
    assert run.stdout.count("killed by SIGKILL") == 2
    assert len(re.findall(r"^trial \d+: ", run.stdout, re.MULTILINE)) == 11
    workers = {line.split()[0] for line in (tmp_path / "passes.log").read_text().splitlines()}
    assert 3 <= len(workers) <= 4  # two that died, and one or two in their place
    assert nothing_is_left(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "to_all"),
    [
        pytest.param(signal.SIGINT, 130, False, id="to the command"),
        pytest.param(signal.SIGINT, 130, True, id="to all, as a terminal"),
        pytest.param(signal.SIGTERM, 143, False, id="as Kubernetes"),
        pytest.param(signal.SIGTERM, 143, True, id="to all, as systemd"),
    ],
)
def test_interrupting_workers_queues_what_they_run(
    tmp_path: Path, number: signal.Signals, status: int, to_all: bool
) -> None:
    arguments = (str(DYING_TASK), "--workers", "2", "--trials", "40", *SHORT)
    with subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        env=environment("SIGKILL", 1, 0),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("trial 2:"):
                (os.killpg if to_all else os.kill)(process.pid, number)
                break
        rest, errors = process.communicate(timeout=DEADLINE_S)
    assert errors == ""
    assert process.returncode == status
    assert "Interrupted." in rest
    cut = trials(tmp_path)
    lost = [t for t in cut if t.state == TrialState.FAIL and t.params]
    waiting = [t for t in cut if t.state == TrialState.WAITING]
    assert [t.system_attrs["fixed_params"] for t in waiting] == [t.params for t in lost]
    assert not [t for t in cut if t.state == TrialState.RUNNING]
    # A worker that hears SIGTERM before the command does has died, and goes on from its state.
    queued = [t.user_attrs.get(attributes.CHECKPOINT, "") for t in waiting]
    assert nothing_is_left(tmp_path, but=queued)


@pytest.mark.slow
def test_a_worker_does_not_outlive_its_parent_and_its_trial_is_queued(tmp_path: Path) -> None:
    arguments = (str(DYING_TASK), "--isolate", "--budget", "samples=1e7", "--batch-size", "8:8")
    with subprocess.Popen(
        command(*arguments), cwd=tmp_path, env=environment("SIGKILL", 1, 0), stderr=subprocess.PIPE
    ) as process:
        wait_for(tmp_path / "passes.log", 50)
        process.kill()
        process.communicate(timeout=DEADLINE_S)  # the worker holds the other end as long as it is
    (worker,) = passes(tmp_path)
    deadline = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
    first, again = trials(tmp_path)
    assert (first.state, again.state) == (TrialState.FAIL, TrialState.WAITING)
    assert again.system_attrs["fixed_params"] == first.params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os._exit(7)", "error: a worker ended with exit status 7 in trial 0;"),
        ("raise TaskError('mend me')", "error: mend me"),
    ],
)
def test_an_ordinary_error_ends_the_study_with_one_line(
    tmp_path: Path, code: str, message: str
) -> None:
    (tmp_path / "wrong.py").write_text(
        f"""
import os, sys
sys.path.insert(0, {str(DYING_TASK.parent)!r})
from dataclasses import replace
from bs_optuna.errors import TaskError
import dying_task

def loss(outputs, targets):
    if os.path.exists("passes.log"):
        {code}
    return ((outputs - targets) ** 2).mean()

def task():
    return replace(dying_task.task(), loss=loss, name="dying")
"""
    )
    run = tune(tmp_path, "wrong.py", "--isolate", "--trials", "3", *SHORT)
    assert run.returncode == 2, run.stdout
    assert run.stderr.splitlines()[-1].startswith(message)
    (trial,) = trials(tmp_path)
    assert trial.state == TrialState.FAIL
    assert nothing_is_left(tmp_path)


@pytest.mark.slow
def test_workers_that_die_when_the_task_is_loaded_end_the_study(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(
        f"""
import multiprocessing, os, sys
sys.path.insert(0, {str(DYING_TASK.parent)!r})
from dying_task import task

if multiprocessing.parent_process() is not None:
    os.abort()
"""
    )
    run = tune(tmp_path, "deadly.py", "--isolate", "--study", "dying", *SHORT)
    assert run.returncode == 2, run.stdout
    assert "error: 3 workers in a row were killed by SIGABRT before any trial;" in run.stderr
    assert trials(tmp_path) == []


def test_a_study_in_memory_is_refused(tmp_path: Path) -> None:
    run = tune(tmp_path, str(DYING_TASK), "--isolate", "--storage", "sqlite://", *SHORT)
    assert run.returncode == 2
    assert "storage=sqlite://; is in memory, where worker processes cannot share it" in run.stderr


@pytest.mark.slow
def test_a_timeout_starts_no_trial_after_it(tmp_path: Path) -> None:
    run = tune(
        tmp_path, str(DYING_TASK), "--workers", "2", "--trials", "99", "--timeout", "0.5",
        "--quiet", *SHORT, "--final-runs", "0",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "trial 0" not in run.stdout
    assert len(trials(tmp_path)) == 2  # those that the workers were started for
