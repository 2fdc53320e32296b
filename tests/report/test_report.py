"""What a person reads: progress and summary, each made from a real study."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from rich.console import Console

from bs_optuna.config import StudyConfig
from bs_optuna.report.progress import TrialProgress
from bs_optuna.report.summary import percent
from bs_optuna.report.summary import summary
from bs_optuna.sampling import attributes
from bs_optuna.sampling.feasibility import mark_memory
from bs_optuna.study.conclusion import as_found
from bs_optuna.study.conclusion import conclude
from bs_optuna.study.tuning import Tuning
from bs_optuna.study.tuning import prepare
from bs_optuna.tasks import digits
from bs_optuna.training.budget import Budget
from bs_optuna.training.objective import TrainingObjective


def shown(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(study: optuna.Study) -> str:
    console = Console(file=io.StringIO(), width=160)
    TrialProgress(console, total=9, finished=0, verbosity="normal").ended(study, study.trials[0])
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_summary_says_what_to_use_and_how_sure_that_is(tuning: Tuning) -> None:
    conclusion = conclude(tuning, final_runs=2)
    assert conclusion is not None
    text = " ".join(shown(summary(tuning, conclusion)).split())
    for words in (
        "batch size",
        f"{conclusion.learning_rate:.3g}",
        "microbatch size",
        "(2 runs with new seeds)",
        "samples=400: equal samples favour small batches",
        "best of those tried",
        f"optuna-dashboard {tuning.storage}",
    ):
        assert words in text
    assert [len(values) for values in conclusion.test.values()] == [2, 2]
    stored = tuning.study.user_attrs["recommendation"]
    assert stored["batch_size"] == conclusion.batch_size
    assert as_found(tuning) == conclusion


def test_a_noise_scale_is_told_as_far_as_it_is_known(tuning: Tuning) -> None:
    conclusion = conclude(tuning, final_runs=0)
    assert conclusion is not None
    assert conclusion.noise_scales == {}
    assert "gradient noise" not in shown(summary(tuning, conclusion))
    for scales, words in (
        (
            {"25": 128.4, "50": 1234.5, "100": None},
            "its scale is 130 at 25 %, 1,200 at 50 %, more than 3,000 samples tell at 100 % of the "
            "training; a batch of 16 is far below it: larger ones",
        ),
        ({"50": 32.0}, "its scale is 32 at 50 % of the training; a batch of 16 is near it"),
        ({"50": 5.0}, "a batch of 16 is far above it: smaller ones"),
        ({"50": None}, "a batch of 16 is far below it"),
    ):
        found = replace(conclusion, batch_size=16, noise_scales=scales, noise_samples=3000)
        assert words in " ".join(shown(summary(tuning, found)).split())


def test_long_names_keep_their_distance(tuning: Tuning) -> None:
    conclusion = conclude(tuning, final_runs=0)
    assert conclusion is not None
    found = replace(conclusion, valid={"whole_sentences_right": [0.04402]})
    text = shown(summary(tuning, found))
    assert "  validation whole_sentences_right  0.04402 " in text


def test_the_summary_counts_samples_that_vary_by_the_longest(tmp_path: Path) -> None:
    config = StudyConfig(
        trials=2, budget="samples=64", storage=f"{tmp_path}/study.db", device="cpu", final_runs=0,
        microbatch_size=8, batch_size="16:32",
    )  # fmt: skip
    task = replace(digits.task(), lengths=lambda inputs, targets: [64] * len(inputs))
    tuning = prepare(config, task)
    tuning.run(timeout=None, started=lambda trial: None, ended=lambda study, trial: None)
    text = shown(summary(tuning, conclude(tuning, final_runs=0)))
    assert "8 of the longest samples, or shorter ones with 512 elements in all" in text


def test_an_empty_study_recommends_nothing(tuning: Tuning) -> None:
    empty = replace(tuning, study=optuna.create_study())
    assert conclude(empty, final_runs=1) is None
    text = shown(summary(empty, None))
    assert "nothing to recommend" in text
    assert "0 complete, 0 pruned, 0 failed" in text


@pytest.mark.parametrize(
    ("verbosity", "terminal", "lines"),
    [("normal", False, 1), ("quiet", False, 0), ("verbose", True, 1), ("quiet", True, 0)],
)
def test_progress_is_as_loud_as_asked(
    tuning: Tuning, verbosity: str, terminal: bool, lines: int
) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    progress = TrialProgress(console, total=5, finished=0, verbosity=verbosity)  # type: ignore[arg-type]
    with progress:
        progress.ended(tuning.study, tuning.study.trials[0])
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert written.count("trial 0: batch") == lines
    assert len(re.findall(r"; about \d:\d\d:\d\d of trials left", written)) == lines
    assert ("best" in written) == bool(lines)


def test_a_terminal_shows_the_trial_that_runs_and_the_best(tuning: Tuning) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    asked = optuna.create_study().ask(tuning.objective.search_space)
    with TrialProgress(console, total=9, finished=4, verbosity="normal") as progress:
        progress.started(asked)
        progress.ended(tuning.study, tuning.study.trials[0])
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    for words in (
        f"trial {asked.number}: batch",
        "5/9",
        f"(trial {tuning.study.best_trial.number})",
    ):
        assert words in written


def test_a_setting_at_the_edge_of_its_range_is_pointed_out(tuning: Tuning) -> None:
    conclusion = conclude(tuning, final_runs=0)
    assert conclusion is not None
    at_edge = replace(conclusion, batch_size=512, learning_rate=1e-5)
    text = shown(summary(tuning, at_edge))
    assert "batch_size is the highest that was searched" in text
    assert "lr is the lowest that was searched" in text
    inside = replace(conclusion, batch_size=64, learning_rate=1e-3)
    assert "was searched" not in shown(summary(tuning, inside))


def test_the_chance_to_be_the_best_is_told_when_trials_nearby_have_shown_the_noise(
    tuning: Tuning,
) -> None:
    study = optuna.create_study()
    space = tuning.objective.search_space
    near = [(32, 1e-3), (40, 1.5e-3), (24, 8e-4), (64, 1e-3)]
    for k, (batch_size, lr) in enumerate([*near, (512, 1e-5), (16, 1e-1)]):
        params = {"batch_size": batch_size, "lr": lr}
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=1 + 0.01 * k))
    few = replace(tuning, study=study)
    conclusion = conclude(few, final_runs=0)
    assert conclusion is not None
    text = " ".join(shown(summary(few, conclusion)).split())
    assert "it takes 5 complete trials within a factor of 3 of this setting, and has 4; run" in text
    study.add_trial(
        optuna.create_trial(params={"batch_size": 48, "lr": 1e-3}, distributions=space, value=1.02)
    )
    conclusion = conclude(few, final_runs=0)
    assert conclusion is not None
    assert "% likely that no other setting tried is better" in shown(summary(few, conclusion))


@pytest.mark.parametrize(
    ("chance", "said"),
    [
        (0.0, "less than 1%"), (0.0099, "less than 1%"), (0.01, "1%"), (0.5, "50%"),
        (0.99, "99%"), (0.996, "more than 99%"), (1.0, "more than 99%"),
    ],
)  # fmt: skip
def test_no_chance_is_called_none_or_sure(chance: float, said: str) -> None:
    assert percent(chance) == said


def test_a_best_trial_that_is_not_recommended_is_explained(tuning: Tuning) -> None:
    best = tuning.study.best_trial
    conclusion = conclude(tuning, final_runs=0)
    assert conclusion is not None
    other = replace(conclusion, learning_rate=best.params["lr"] * 2)
    text = " ".join(shown(summary(tuning, other)).split())
    named = f"trial {best.number} (batch {best.params['batch_size']}, lr {best.params['lr']:.2e})"
    assert f"{named} had the best value, {best.value:.4g}; the recommendation goes by" in text
    same = replace(
        conclusion,
        batch_size=best.params["batch_size"],
        learning_rate=best.params["lr"] * 1.01,
    )
    assert "had the best value" not in shown(summary(tuning, same))


@pytest.mark.parametrize(
    ("direction", "worse", "ordinary"),
    [
        ("maximize", [0.88, -1.4], [0.88, 0.92]),
        ("minimize", [1.42, 9.0], [1.42, 1.3]),
        ("minimize", [1.42, 9.0], [9.0]),
    ],
)
def test_new_seeds_that_end_worse_than_the_trials_promise_are_pointed_out(
    tuning: Tuning, direction: str, worse: list[float], ordinary: list[float]
) -> None:
    conclusion = conclude(tuning, final_runs=0)
    assert conclusion is not None
    assert conclusion.evidence is not None
    middle, interval = (0.98, (0.94, 0.99)) if direction == "maximize" else (1.1, (1.0, 1.2))
    evidence = replace(conclusion.evidence, value=middle, value_interval=interval)
    other = replace(
        tuning,
        study=optuna.create_study(direction=direction),
        task=replace(tuning.task, objective="accuracy", direction=direction),
    )
    other.study.add_trials(tuning.study.trials)

    def notes(found: list[float]) -> str:
        valid = {"loss": [5.0, 5.0], "accuracy": found}
        text = shown(summary(other, replace(conclusion, evidence=evidence, valid=valid)))
        return " ".join(text.split())

    mean = sum(worse) / 2
    assert (
        f"note new seeds end with accuracy {mean:.4g}, worse than the {middle:.4g} that the"
        in notes(worse)
    )
    assert "run more trials, or take a smaller learning rate" in notes(worse)
    assert "new seeds end" not in notes(ordinary)


def test_a_trial_that_accumulated_shows_its_microbatches(tuning: Tuning) -> None:
    study = optuna.create_study()
    objective = TrainingObjective(
        tuning.task, budget=Budget("steps", 2), batch_size=(64, 64), microbatch_size=24
    )
    study.optimize(objective, n_trials=1)
    assert re.match(r"trial 0: batch 64, lr [\d.e+-]+, microbatch 22 x 3, ", line(study))
    assert "microbatch" not in line(tuning.study)


@pytest.mark.parametrize(
    ("limit", "remedy"),
    [
        (2**21, "raise --memory-limit, now 2MiB, or take a smaller model"),
        (None, "take a smaller model or shorter samples"),
    ],
)
def test_trials_that_do_not_fit_come_with_the_remedy(
    tuning: Tuning, limit: int | None, remedy: str
) -> None:
    study = optuna.create_study()
    study.set_user_attr(attributes.CONFIG, {"memory_limit": limit})

    def too_large(trial: optuna.Trial) -> float:
        mark_memory(trial, fits=False)
        raise optuna.TrialPruned

    study.optimize(too_large, n_trials=2)
    text = " ".join(shown(summary(replace(tuning, study=study), None)).split())
    assert f"note 2 trials did not fit into memory; {remedy}" in text
    assert "did not fit" not in shown(summary(tuning, None))


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>", "found no shared memory"),
        ("BatchNorm cannot take the single sample that", "left a single sample by itself"),
    ],
)
def test_what_a_smaller_model_would_not_help_has_its_own_remedy(
    tuning: Tuning, reason: str, remedy: str
) -> None:
    study = optuna.create_study()

    def refused(trial: optuna.Trial) -> float:
        trial.set_user_attr(attributes.PRUNE_REASON, f"memory: {reason}")
        mark_memory(trial, fits=False)
        raise optuna.TrialPruned

    study.optimize(refused, n_trials=2)
    text = " ".join(shown(summary(replace(tuning, study=study), None)).split())
    assert f"note 2 trials {remedy}" in text
    assert "smaller model" not in text
    reason = "Out of memory (cpu)"
    study.optimize(refused, n_trials=1)
    text = " ".join(shown(summary(replace(tuning, study=study), None)).split())
    assert f"2 trials {remedy}" in text
    assert "1 trial did not fit into memory; take a smaller model" in text
