"""recommend on studies that are not as they should be: wrong priors, penalties, failures, gaps."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler

from bs_optuna.errors import StudyError
from bs_optuna.sampling import CoupledSampler
from bs_optuna.sampling import recommend
from bs_optuna.sampling.recommend import recommend_each


def loss(batch_size: int, lr: float, best: float) -> float:
    """Lowest at the learning rate that is best for 64 samples, times the root of the batch size."""
    off = math.log(lr / best) - 0.5 * math.log(batch_size / 64)
    return 0.3 + 0.3 * math.log1p(off**2)


@pytest.mark.parametrize("reference", [(64, 1.0), None])
def test_data_overrule_a_prior_that_is_off_by_a_thousand(
    reference: tuple[float, float] | None,
) -> None:
    """With most of the trials, as a good sampler makes them, close to the best one, and noise."""
    noise = np.random.default_rng(0)
    best = 1e-3 if reference else 1e-5

    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_categorical("batch_size", [16, 32, 64, 128, 256])
        lr = trial.suggest_float("lr", 1e-6, 1.0, log=True)
        return loss(batch_size, lr, best) + noise.normal(0.0, 0.01)

    study = optuna.create_study(sampler=CoupledSampler(prior="sgd", reference=reference, seed=0))
    study.optimize(objective, n_trials=30)
    advice = recommend(study, batch_size=64)
    assert best / 1.3 < advice.learning_rate < best * 1.3
    low, high = advice.learning_rate_interval
    assert best / 3 < low < best < high < best * 3


@pytest.mark.parametrize("penalty", [1e3, 1e9])
def test_a_penalty_for_most_of_the_trials_hides_nothing(penalty: float) -> None:
    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_categorical("batch_size", [16, 32, 64, 128, 256])
        lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
        return loss(batch_size, lr, 1e-4) if lr < 1e-3 * (batch_size / 64) ** 0.5 else penalty

    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(objective, n_trials=30)
    values = [t.value for t in study.trials]
    assert values.count(penalty) > 15
    advice = recommend(study)
    assert advice.trial_number == study.best_trial.number
    assert advice.value == pytest.approx(study.best_value, abs=0.01)


def _pruned() -> float:
    raise optuna.TrialPruned


@pytest.mark.parametrize("lost", [_pruned, lambda: math.inf])
def test_large_batches_that_do_not_fit_are_no_divergence(lost: Callable[[], float]) -> None:
    """A third of the batch sizes ends without a word, whatever the learning rate."""

    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 8, 512, log=True)
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        return lost() if batch_size >= 128 else loss(batch_size, lr, 1e-3)

    study = optuna.create_study(sampler=CoupledSampler(seed=0))
    study.optimize(objective, n_trials=30)
    for advice in recommend_each(study, [32, 64, 100]):
        truth = 1e-3 * (advice.batch_size / 64) ** 0.5
        assert truth / 1.3 < advice.learning_rate < truth * 1.3


def test_a_trial_that_was_pruned_before_all_was_suggested() -> None:
    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 16, 512, log=True)
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        if batch_size >= 256:
            raise optuna.TrialPruned
        return lr + trial.suggest_float("dropout", 0.0, 0.5)

    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(objective, n_trials=12)
    assert any("dropout" not in t.params for t in study.trials)
    assert "dropout" in recommend(study).params


def test_choices_without_a_hash() -> None:
    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        layers = trial.suggest_categorical("layers", [[64], [64, 64]])  # type: ignore[list-item]
        return trial.suggest_categorical("batch_size", [16, 32]) * lr * len(layers)  # type: ignore

    study = optuna.create_study(sampler=CoupledSampler(seed=0))
    with pytest.warns(UserWarning, match="Choices for a categorical distribution"):
        study.optimize(objective, n_trials=6)
    assert recommend(study).params["layers"] == [64]


def test_a_trial_that_violates_a_constraint_is_no_answer() -> None:
    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_categorical("batch_size", [16, 32, 64])
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        trial.set_constraint("memory", 1.0 if trial.number >= 2 else -1.0)
        return loss(batch_size, lr, 1e-3)

    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(objective, n_trials=6)
    with pytest.raises(
        StudyError, match="2 completed trials with a finite value and no constraint"
    ):
        recommend(study)


@pytest.mark.parametrize("batch_size", [0, 64.5, math.nan, True])
def test_a_batch_size_is_a_positive_whole_number(batch_size: float) -> None:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(lambda t: loss(64, t.suggest_float("lr", 1e-5, 1.0, log=True), 1e-3), n_trials=3)
    with pytest.raises(StudyError, match=f"batch_size is {batch_size}; ask for a whole number"):
        recommend(study, batch_size=batch_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("says", [True, False])
def test_failures_above_all_others_are_divergence(says: bool) -> None:
    """Optuna stores a run that returns NaN as failed, and keeps no word of it."""

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_int("batch_size", 8, 1024, log=True)
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        if lr > 3e-3 and says:
            trial.report(math.nan, 0)
        return math.nan if lr > 3e-3 else -math.log(lr)

    study = optuna.create_study(sampler=RandomSampler(seed=2))
    study.optimize(objective, n_trials=40)
    advice = recommend(study, batch_size=256)
    assert 2e-3 < advice.learning_rate < 4e-3


def test_failures_anywhere_are_no_divergence() -> None:
    chance = np.random.default_rng(0)

    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 8, 1024, log=True)
        value = loss(batch_size, trial.suggest_float("lr", 1e-5, 1e-1, log=True), 1e-2)
        return math.nan if chance.random() < 0.3 else value

    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(objective, n_trials=40)
    assert recommend(study, batch_size=64).learning_rate == pytest.approx(1e-2, rel=0.3)


@pytest.mark.parametrize(("low", "high"), [(1e-4, 1e-2), (1e-6, 1.0)])
def test_a_study_goes_on_in_another_range(
    low: float, high: float, caplog: pytest.LogCaptureFixture
) -> None:
    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 8, 1024, log=True)
        ends = (1e-5, 1e-1) if trial.number < 8 else (low, high)
        return loss(batch_size, trial.suggest_float("lr", *ends, log=True), 3e-4)

    study = optuna.create_study(sampler=CoupledSampler(seed=0))
    study.optimize(objective, n_trials=20)
    assert min(t.value for t in study.trials[8:] if t.value is not None) < 0.31
    assert not [r for r in caplog.records if r.name.startswith("bs_optuna")]


def test_a_range_that_differs_from_trial_to_trial_is_kept_to() -> None:
    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 8, 1024, log=True)
        sgd = trial.suggest_categorical("optimizer", ["sgd", "adamw"]) == "sgd"
        lr = trial.suggest_float("lr", *((1e-3, 1.0) if sgd else (1e-5, 1e-2)), log=True)
        return loss(batch_size, lr, 3e-2 if sgd else 3e-4)

    study = optuna.create_study(sampler=CoupledSampler(seed=0))
    study.optimize(objective, n_trials=25)
    assert study.best_value < 0.31


def test_a_parameter_that_joins_later_is_not_left_to_chance() -> None:
    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 8, 1024, log=True)
        value = loss(batch_size, trial.suggest_float("lr", 1e-5, 1e-1, log=True), 3e-4)
        return value if trial.number < 5 else value + (trial.suggest_float("late", 0, 1) - 0.3) ** 2

    study = optuna.create_study(sampler=CoupledSampler(seed=0))
    study.optimize(objective, n_trials=40)
    last = np.array([t.params["late"] for t in study.trials[-12:]])
    assert np.abs(last - 0.3).mean() < 0.17  # by chance 0.29


def test_trials_that_end_at_once_are_not_taken_for_cheap_ones() -> None:
    def objective(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 8, 1024, log=True)
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        trial.set_user_attr("seconds", 0.5 if batch_size > 256 else 10.0)
        trial.set_constraint("memory", batch_size / 256 - 1.0)
        if batch_size > 256:
            raise optuna.TrialPruned
        return loss(batch_size, lr, 3e-4)

    study = optuna.create_study(sampler=CoupledSampler(cost="seconds", seed=0))
    study.optimize(objective, n_trials=24)
    assert sum(t.params["batch_size"] > 256 for t in study.trials) <= 8
