"""Settings from flags and files: read, refused with one clear line, printed to be read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bs_optuna.config import StudyConfig
from bs_optuna.config import make_config
from bs_optuna.errors import ConfigError


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text('trials = 7\nbatch_size = "8:64"\nlr = [1e-4, 1]\nmemory_limit = "1GiB"\n')
    config = make_config(path, {"trials": "9", "reference": "32:1e-3"})
    assert (config.trials, config.batch_size, config.lr) == (9, (8, 64), (1e-4, 1.0))
    assert (config.memory_limit, config.reference, config.seed) == (2**30, (32, 1e-3), 0)


def test_a_single_number_is_the_only_value_of_its_range(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text("batch_size = 64\n")
    config = make_config(path, {"lr": "1e-3"})
    assert (config.batch_size, config.lr) == ((64, 64), (1e-3, 1e-3))


def test_what_is_shown_can_be_read(tmp_path: Path) -> None:
    config = make_config(
        None,
        {
            "batch_size": "8:1048577",
            "lr": "1e-7:0.123456789",
            "reference": "300:3e-4",
            "budget": "steps=100",
            "memory_limit": "1.5GiB",
            "microbatch_size": "4",
            "timeout": "2.5",
            "isolate": True,
            "workers": "2",
            "storage": "a.db",
            "study": 'quo"te \N{BAR CHART}',
        },
    )
    path = tmp_path / "shown.toml"
    path.write_text(config.as_toml(), encoding="utf-8")
    assert make_config(path, {}) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"trials": "many"}, "trials=many; must be a whole number."),
        ({"trials": -1}, "trials=-1; must be greater than or equal to 0."),
        ({"workers": "0"}, "workers=0; must be greater than or equal to 1."),
        ({"isolate": "maybe"}, "isolate=maybe; must be a valid boolean"),
        ({"trials": 2.5}, "trials=2.5; must be a whole number."),
        ({"batch_size": "512:16"}, "batch_size=512:16; must be LOW:HIGH with 0 < LOW <= HIGH"),
        ({"batch_size": "0:16"}, "batch_size=0:16; must be LOW:HIGH"),
        ({"batch_size": [1, 2, 3]}, "batch_size=[1, 2, 3]; must be LOW:HIGH"),
        ({"lr": "1:0.1"}, "lr=1:0.1; must be LOW:HIGH"),
        ({"lr": "1e-3:inf"}, "lr=1e-3:inf; must be LOW:HIGH"),
        ({"lr": "fast"}, "lr=fast; must be LOW:HIGH"),
        ({"reference": "256"}, "reference=256; must be BATCH_SIZE:LEARNING_RATE"),
        ({"optimizer": "adam"}, "optimizer=adam; must be 'adamw' or 'sgd'."),
        ({"budget": "epochs=3"}, "budget='epochs'; the unit must be samples, steps or seconds"),
        ({"memory_limit": "12"}, "memory_limit=12; must be at least 1MiB."),
        ({"memory_limit": "5 potatoes"}, "must be a number of bytes with a unit"),
        ({"timeout": "-1"}, "timeout=-1; must be greater than 0."),
        ({"microbatch_size": "0"}, "microbatch_size=0; must be greater than or equal to 1."),
        ({"microbatch_size": "best"}, "microbatch_size=best; must be a whole number, auto or fast"),
        ({"trials": True}, "trials=true; must be a number."),
        ({"seed": "99999999999999"}, "seed=99999999999999; must be less than or equal to"),
        ({"batch_size": [16.7, 40.9]}, "batch_size=[16.7, 40.9]; must be LOW:HIGH"),
        ({"batch_size": True}, "batch_size=true; must be LOW:HIGH"),
        ({"lr": [True, 2]}, "lr=[true, 2]; must be LOW:HIGH"),
        (
            {"reference": [256.9, 1e-3]},
            "reference=[256.9, 0.001]; must be BATCH_SIZE:LEARNING_RATE",
        ),
        ({"timeout": "inf"}, "timeout=inf; must be a finite number."),
        ({"study": ""}, "study=; must not be empty; leave it out for the default."),
        ({"storage": ""}, "storage=; must not be empty; leave it out for the default."),
        ({"study": "what?"}, "study=what?; must be without ?, % and #"),
        ({"storage": "a%20b.db"}, "storage=a%20b.db; must be without ?, % and #"),
        ({"task": 3}, "task=3; must be a valid string."),
        ({"batchsize": "3"}, "unknown setting 'batchsize'; did you mean 'batch_size'?"),
        ({"frobnicate": 1}, "unknown setting 'frobnicate'; known are task, study"),
    ],
)
def test_a_wrong_setting_is_one_line_with_value_and_remedy(
    flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as info:
        make_config(None, flags)
    assert message in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(("given", "means"), [("auto", None), ("fastest", "fastest"), ("8", 8)])
def test_a_microbatch_may_be_a_word(tmp_path: Path, given: str, means: str | int | None) -> None:
    config = make_config(None, {"microbatch_size": given})
    assert config.microbatch_size == means
    path = tmp_path / "shown.toml"
    path.write_text(config.as_toml())
    assert make_config(path, {}) == config


def test_a_wrong_setting_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text("trails = 3\n")
    with pytest.raises(ConfigError, match=r"study.toml: unknown setting 'trails'.*'trials'"):
        make_config(path, {})


@pytest.mark.parametrize(("text", "message"), [("= 3", "no valid TOML"), (None, "No such file")])
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "study.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_config(path, {})


@pytest.mark.parametrize(
    ("flags", "processes"),
    [({}, 0), ({"isolate": True}, 1), ({"workers": 1}, 1), ({"workers": 3, "isolate": True}, 3)],
)
def test_trials_run_in_workers_where_that_is_asked_for(
    flags: dict[str, Any], processes: int
) -> None:
    assert make_config(None, flags).worker_processes == processes


@pytest.mark.parametrize("name", ["digits", "text"])
def test_the_studies_that_come_along_are_valid(name: str) -> None:
    config = make_config(Path(__file__).parents[1] / "studies" / f"{name}.toml", {})
    assert config.task == name


def test_the_default_study_is_the_one_in_the_file() -> None:
    path = Path(__file__).parents[1] / "studies" / "digits.toml"
    assert make_config(path, {}).batch_size == StudyConfig().batch_size
