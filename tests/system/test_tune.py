"""The command line as a person runs it: real processes, real files, real signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from optuna_dashboard import get_note

from bs_optuna.sampling import attributes
from bs_optuna.science.throughput import smallest_fast
from bs_optuna.study import open_study


SHORT = ("--budget", "samples=600", "--final-runs", "1")
WIDE_TASK = Path(__file__).with_name("wide_task.py")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bs_optuna.tune", *arguments]


def environment() -> dict[str, str]:
    # As a user has it, not as pytest runs this file: one thread, because tests share the cores.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def tune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def trials(folder: Path, name: str) -> list[optuna.trial.FrozenTrial]:
    study = open_study(storage=f"sqlite:///{folder}/studies/{name}.db", name=name)
    return study.get_trials()


@pytest.mark.slow
def test_a_study_runs_is_summed_up_and_goes_on(tmp_path: Path) -> None:
    first = tune(tmp_path, "--trials", "6")
    assert first.returncode == 0, first.stderr
    for words in (
        "every trial gets samples=10056 on ",
        "trial 3: batch ",
        "Recommended for digits",
        "learning rate",
        "warmup",
        "microbatch size",
        "accumulation steps",
        "validation accuracy",
        "test accuracy",
        "compared at",
        "best of those tried",
        "0 failed",
        "optuna-dashboard sqlite:///studies/digits.db",
    ):
        assert words in first.stdout
    study = open_study(storage=f"sqlite:///{tmp_path}/studies/digits.db", name="digits")
    assert len(study.trials) == 6
    scores = study.user_attrs[attributes.RECOMMENDATION]["test"]["accuracy"]
    assert len(scores) == 3
    assert sum(scores) / 3 >= 0.98  # what it recommends reads digits

    again = tune(tmp_path, "--trials", "1", "--quiet", "--final-runs", "1")
    assert again.returncode == 0, again.stderr
    assert "trial 6:" not in again.stdout
    assert "Recommended for digits" in again.stdout
    assert len(study.trials) == 7

    config = study.user_attrs[attributes.CONFIG]
    found = tune(tmp_path, "--trials", "0", "--seed", "7")
    assert found.returncode == 0, found.stderr
    assert study.user_attrs[attributes.CONFIG] == config
    assert found.stdout == again.stdout  # scores and all, without a trial or a training
    assert len(study.trials) == 7
    assert "## Recommended for digits" in get_note(study)

    other = tune(tmp_path, "--trials", "4", "--budget", "samples=700")
    assert other.returncode == 2
    assert "was made with budget=samples=10056, now samples=700" in other.stderr
    narrower = tune(tmp_path, "--batch-size", "16:64")
    assert narrower.returncode == 2
    assert "'batch_size'" in narrower.stderr
    assert len(study.trials) == 7


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_keeps_finished_trials_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    arguments = ("--trials", "40", "--study", "cut", *SHORT)
    with subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("trial 1:"):
                process.send_signal(number)
                break
        rest = process.stdout.read()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == status
    assert re.search(
        r"Interrupted\. Finished trials are kept in sqlite:///studies/cut.db: \d+;", rest
    )
    assert f"python -m bs_optuna.tune {' '.join(arguments)}" in rest
    kept = [t for t in trials(tmp_path, "cut") if t.state.is_finished()]
    finished = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in kept)
    assert finished >= 2

    target = str(finished + 2)
    again = tune(tmp_path, "--trials", target, "--study", "cut", *SHORT)
    assert again.returncode == 0, again.stderr
    assert f"{finished} of {target} trials are done" in again.stdout
    after = trials(tmp_path, "cut")
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    assert sum(t.state in states for t in after) == int(target)
    for lost in (t for t in after if t.state == TrialState.FAIL and t.params):
        assert any(t.params == lost.params and t.state in states for t in after)


@pytest.mark.parametrize(
    ("number", "status", "shell"),
    [
        (signal.SIGINT, 130, ()),
        # As in the background of a script, where Ctrl-C is ignored.
        (signal.SIGTERM, 143, ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")),
    ],
)
def test_interrupting_before_the_first_trial_is_one_line(
    tmp_path: Path, number: signal.Signals, status: int, shell: tuple[str, ...]
) -> None:
    (tmp_path / "waiting.py").write_text(
        "import multiprocessing, time\nwith multiprocessing.Pool(1): pass  # SIGTERM ends it\n"
        "print('here', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen(
        [*shell, *command("waiting.py")],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert said == "Interrupted before the first trial.\n"


@pytest.mark.slow
def test_final_runs_that_were_missed_come_before_more_trials(tmp_path: Path) -> None:
    first = tune(tmp_path, "--trials", "3", *SHORT)
    assert first.returncode == 0, first.stderr
    study = open_study(storage=f"sqlite:///{tmp_path}/studies/digits.db", name="digits")
    study.set_user_attr(attributes.RECOMMENDATION, {})  # as after Ctrl-C during the final runs
    again = tune(tmp_path, "--trials", "3", *SHORT)
    assert again.returncode == 0, again.stderr
    assert "Recommended for digits" in again.stdout
    assert len(trials(tmp_path, "digits")) == 3


def test_there_is_nothing_to_tell_of_a_study_that_is_not_there(tmp_path: Path) -> None:
    run = tune(tmp_path, "--trials", "0", "--study", "typo")
    assert run.returncode == 2
    assert run.stderr.startswith("error: There is no study 'typo' in sqlite:///studies/typo.db")
    assert list(tmp_path.iterdir()) == []


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    study = open_study(storage=f"sqlite:///{tmp_path}/studies/digits.db", name="digits")
    study.add_trial(
        optuna.trial.create_trial(
            value=0.1,
            params={"batch_size": 32, "lr": 1e-3},
            distributions={
                "batch_size": optuna.distributions.IntDistribution(16, 512, log=True),
                "lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True),
            },
        )
    )
    run = tune(tmp_path, *SHORT)
    assert run.returncode == 2
    assert "has trials of something else than this command" in run.stderr
    assert len(trials(tmp_path, "digits")) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a CPU's memory")
def test_a_real_limit_on_memory_fails_no_trial_and_keeps_every_batch(tmp_path: Path) -> None:
    run = tune(
        tmp_path, str(WIDE_TASK), "--memory-limit", "12MiB", "--trials", "8", "--batch-size",
        "16:512", "--budget", "samples=600", "--final-runs", "0",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = trials(tmp_path, "wide")
    assert len(found) == 8
    assert {t.state for t in found} <= {TrialState.COMPLETE, TrialState.PRUNED}
    backoffs = 0
    for trial in found:
        stored = trial.user_attrs
        assert not stored.get(attributes.PRUNE_REASON, "").startswith("memory")
        assert stored[attributes.EFFECTIVE_BATCH_SIZE] == trial.params["batch_size"]
        steps, size = stored[attributes.ACCUMULATION_STEPS], stored[attributes.MICROBATCH_SIZE]
        assert steps * size >= trial.params["batch_size"] > (steps - 1) * size
        assert stored[attributes.SAMPLES] == trial.params["batch_size"] * stored[attributes.STEPS]
        assert 4 <= size <= 12  # what 12 MiB hold of samples of about 1 MB
        backoffs += stored[attributes.BACKOFFS]
    assert backoffs <= 1  # in the whole study, because the first size is predicted


@pytest.mark.slow
def test_the_fastest_microbatch_is_measured_and_used(tmp_path: Path) -> None:
    arguments = ("--trials", "2", "--batch-size", "64:128", "--microbatch-size", "fastest")
    done = tune(tmp_path, *arguments, *SHORT)
    assert done.returncode == 0, done.stderr
    for trial in trials(tmp_path, "digits"):
        rates = dict(trial.user_attrs[attributes.THROUGHPUT])
        assert list(rates) == [2, 4, 8, 16, 32, 64, 128]
        most = smallest_fast(rates)
        assert most / 2 < trial.user_attrs[attributes.MICROBATCH_SIZE] <= most
        assert trial.user_attrs[attributes.BACKOFFS] == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a CPU's memory")
def test_a_limit_too_small_for_one_sample_ends_the_study_early(tmp_path: Path) -> None:
    larger = tmp_path / "larger_task.py"  # whose samples take about 4 MB
    larger.write_text(WIDE_TASK.read_text().replace("32, 32", "64, 64"))
    run = tune(tmp_path, str(larger), "--memory-limit", "1MiB", *SHORT)
    assert run.returncode == 1, run.stderr
    assert "nothing to recommend" in run.stdout
    assert "did not fit into memory; raise --memory-limit, now 1MiB" in run.stdout
    found = trials(tmp_path, "wide")
    assert [t.state for t in found] == [TrialState.PRUNED] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "none"], "error: trials=none; must be a whole number."),
        (["--batch-size", "64:16"], "error: batch_size=64:16; must be LOW:HIGH"),
        (["--frobnicate"], "error: unrecognized arguments: --frobnicate; see "),
        (
            ["a.py", "--batchsize=64"],
            "error: unrecognized arguments: --batchsize=64; did you mean ",
        ),
        (
            ["--batchsize", "64"],
            "error: unrecognized arguments: --batchsize; did you mean --batch-",
        ),
        (["my_task.py", "--task", "text"], "error: task=text and my_task.py; name one of them."),
        (["nowhere.toml"], "error: nowhere.toml: No such file or directory"),
    ],
)
def test_mistakes_in_settings_end_before_anything_is_loaded(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    run = tune(tmp_path, *arguments)
    assert run.returncode == 2
    assert run.stderr.startswith(message)
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "error: task='nowhere.py'; there is no file nowhere.py."),
        (["mnist"], "error: task='mnist'; must be built-in (digits, text)"),
        (["--batch-size", "16:4096"], "error: batch_size=4096 is more than the 1257 training"),
        (
            ["--device", "gpu"],
            "error: device=gpu; there is no such kind of device. Try cuda, mps, cpu or auto.",
        ),
        (["--device", "cuda:99"], "error: device=cuda:99; it cannot be used"),
        (["--device", "meta"], "error: device=meta; it cannot be used: Tensor.item() cannot be"),
        (
            ["--reference", "32:5"],
            "error: reference=32:5; its learning rate must lie in lr=1e-05:0.1. Widen that with",
        ),
        (["--storage", "broken.db"], "error: "),
    ],
)
def test_mistakes_beyond_settings_end_before_anything_is_trained(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "broken.db").write_text("not a database")
    run = tune(tmp_path, *arguments)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in run.stderr
    assert (tmp_path / "broken.db").read_text() == "not a database"
    assert [path.name for path in tmp_path.iterdir()] == ["broken.db"]
