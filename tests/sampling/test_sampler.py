"""CoupledSampler against the traps of Optuna's sampler contract, each seen in the wild."""

from __future__ import annotations

import logging
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.samplers import PartialFixedSampler
from optuna.samplers import TPESampler
from optuna.trial import TrialState
from ridge_study import best_learning_rate
from ridge_study import loss
from ridge_study import objective
from ridge_study import params
from ridge_study import run

from bs_optuna.errors import ConfigError
from bs_optuna.sampling import CoupledSampler
from bs_optuna.sampling import attributes
from bs_optuna.sampling import recommend
from bs_optuna.science.prior import ScalingPrior


def test_finds_the_optimum_in_few_trials() -> None:
    assert run(n_trials=15).best_value < 2.01


def test_first_trials_are_the_reference_and_a_walk_along_the_ridge() -> None:
    study = run(n_trials=3, sampler=CoupledSampler(prior="adamw", reference=(256, 1e-3), seed=0))
    first, up, down = params(study)
    assert first == {"batch_size": 256, "lr": pytest.approx(1e-3)}
    assert up["batch_size"] > 256 > down["batch_size"]  # type: ignore[operator]
    assert 3e-4 < up["lr"] < 3e-3  # type: ignore[operator]
    assert 3e-4 < down["lr"] < 3e-3  # type: ignore[operator]


def test_other_parameters_stay_in_the_middle_during_the_walk() -> None:
    def with_others(trial: optuna.Trial) -> float:
        trial.suggest_float("weight_decay", 1e-4, 1e-2, log=True)
        trial.suggest_int("layers", 2, 6)
        return objective(trial)

    found = params(run(with_others, n_trials=4))
    assert [p["layers"] for p in found[:3]] == [4, 4, 4]
    assert [p["weight_decay"] for p in found[:3]] == pytest.approx([1e-3] * 3)
    assert found[3]["weight_decay"] != pytest.approx(1e-3)  # from here on the model decides


def test_maximising_is_minimising_the_negative() -> None:
    up = run(lambda t: -objective(t), direction="maximize")
    assert params(up) == params(run())


def test_same_seed_same_suggestions_and_another_seed_others() -> None:
    assert params(run()) == params(run())
    assert params(run(sampler=CoupledSampler(prior="adamw", seed=1))) != params(run())


def test_pickled_midway_it_goes_on_the_same() -> None:
    study = run(n_trials=6)
    twin = run(n_trials=6)
    twin.sampler = pickle.loads(pickle.dumps(twin.sampler))
    for s in (study, twin):
        s.optimize(objective, n_trials=3)
    assert params(study) == params(twin)


def test_plain_python_numbers() -> None:
    """Storages refuse NumPy scalars."""
    for trial in run().trials:
        assert type(trial.params["batch_size"]) is int
        assert type(trial.params["lr"]) is float


@pytest.mark.parametrize("choices", [(16, 64, 256, 1024), (1024, 16, 256, 64)])
def test_categorical_batch_sizes_are_numbers(choices: tuple[int, ...]) -> None:
    def categorical(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_categorical("batch_size", choices)
        return loss(batch_size, trial.suggest_float("lr", 1e-5, 1e-1, log=True))

    study = run(categorical, 15)
    assert study.best_value < 2.02
    assert {type(t.params["batch_size"]) for t in study.trials} == {int}


def test_wide_ranges_get_round_batch_sizes() -> None:
    for trial in run(n_trials=10).trials:
        batch_size = trial.params["batch_size"]
        while batch_size % 2 == 0:
            batch_size //= 2
        assert batch_size in (1, 3)


def test_enqueued_batch_size_gets_its_own_learning_rate() -> None:
    """Optuna silently discards our value for a fixed name, so lr must follow the fixed one."""
    study = run(n_trials=25)
    for batch_size in (16, 4096):
        study.enqueue_trial({"batch_size": batch_size})
        study.optimize(objective, n_trials=1)
        lr = study.trials[-1].params["lr"]
        assert study.trials[-1].params["batch_size"] == batch_size
        assert best_learning_rate(batch_size) / 1.5 < lr < best_learning_rate(batch_size) * 1.5


def test_partially_fixed() -> None:
    study = run(n_trials=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = PartialFixedSampler({"batch_size": 512}, study.sampler)
    study.optimize(objective, n_trials=5)
    assert {t.params["batch_size"] for t in study.trials[5:]} == {512}


def test_reference_out_of_range_is_clipped() -> None:
    """Optuna stores what sample_independent returns, in range or not."""
    study = run(n_trials=1, sampler=CoupledSampler(prior="sgd", reference=(1e6, 10.0), seed=0))
    assert study.trials[0].params == {"lr": 1e-1, "batch_size": 4096}


def test_small_finite_spaces_are_not_repeated_before_they_are_used_up() -> None:
    def finite(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_categorical("batch_size", [32, 64, 128])
        return loss(batch_size, trial.suggest_categorical("lr", [1e-4, 3e-4, 1e-3, 3e-3]))

    study = run(finite, 12)
    assert len({tuple(p.items()) for p in params(study)}) == 12
    study.optimize(finite, n_trials=1)


def test_diverged_failed_and_pruned_trials_are_left_behind() -> None:
    def fragile(trial: optuna.Trial) -> float:
        value = objective(trial)
        lr = trial.params["lr"]
        if lr > 2e-2:
            return math.inf
        if lr > 1e-2:
            return math.nan
        if lr > 5e-3:
            trial.report(value + 5.0, 1)
            raise optuna.TrialPruned
        trial.report(value + 1.0, 1)
        return value

    study = run(fragile, 20, sampler=CoupledSampler(prior="adamw", reference=(1024, 2e-2), seed=0))
    assert study.best_value < 2.05
    assert {t.state for t in study.trials} >= {TrialState.COMPLETE, TrialState.FAIL}


def test_nothing_but_failures_is_no_dead_end() -> None:
    def failing(trial: optuna.Trial) -> float:
        objective(trial)
        return math.nan

    study = run(failing, 8)
    # The first one is tried twice: one failure may have any reason.
    assert len({tuple(p.items()) for p in params(study)}) == 7


def test_constraints_are_kept() -> None:
    def constrained(trial: optuna.Trial) -> float:
        value = objective(trial)
        trial.set_constraint("memory", trial.params["batch_size"] - 100)
        return value

    study = run(constrained, 25)
    assert sum(t.params["batch_size"] <= 100 for t in study.trials[10:]) >= 8
    assert study.best_value < 2.03


def test_several_objectives() -> None:
    def quality_and_seconds(trial: optuna.Trial) -> tuple[float, float]:
        value = objective(trial)
        return value, 100.0 / trial.params["batch_size"]

    study = optuna.create_study(
        sampler=CoupledSampler(prior="adamw", seed=0), directions=["minimize", "minimize"]
    )
    study.optimize(quality_and_seconds, n_trials=25)
    front = {t.params["batch_size"] for t in study.best_trials}
    assert len(front) >= 4
    assert max(front) >= 2048


def test_other_parameters_are_in_the_same_model() -> None:
    def wide(trial: optuna.Trial) -> float:
        dropout = trial.suggest_float("dropout", 0.0, 0.5, step=0.05)
        decay = trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True)
        layers = trial.suggest_int("layers", 1, 6)
        activation = trial.suggest_categorical("activation", ["relu", "gelu", "tanh"])
        penalty = (dropout - 0.1) ** 2 + 0.01 * math.log(decay / 1e-3) ** 2
        return objective(trial) + penalty + 0.02 * (layers - 4) ** 2 + 0.1 * (activation == "tanh")

    study = run(wide, 40)
    assert study.best_value < 2.12
    assert study.best_params["activation"] != "tanh"


def test_conditional_parameters_fall_back_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def conditional(trial: optuna.Trial) -> float:
        value = objective(trial)
        if trial.number % 2:
            value += trial.suggest_float("momentum", 0.0, 0.99)
        return value

    with caplog.at_level(logging.WARNING, logger="bs_optuna"):
        run(conditional, 10)
    assert [r.getMessage().split(" is ")[0] for r in caplog.records] == ["Parameter 'momentum'"]


def test_ranges_that_move_do_not_crash() -> None:
    def moving(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("batch_size", 16, 256 + trial.number)
        return loss(batch_size, trial.suggest_float("lr", 1e-5, 1e-1, log=True))

    assert len(run(moving, 8).trials) == 8


def test_cost_prefers_cheap_trials_at_first() -> None:
    def flat(trial: optuna.Trial) -> float:
        objective(trial)
        trial.set_user_attr("joules", float(trial.params["batch_size"]) ** 2)
        return math.log(trial.params["lr"] / 1e-3) ** 2

    def mean_log_batch_size(cost: str | None) -> float:
        study = run(flat, 12, sampler=CoupledSampler(prior="adamw", cost=cost, seed=0))
        return float(np.mean([math.log(t.params["batch_size"]) for t in study.trials[4:]]))

    assert mean_log_batch_size("joules") < mean_log_batch_size(None) - 0.5
    assert mean_log_batch_size("no such attribute") == mean_log_batch_size(None)


def test_measured_noise_scale_moves_the_critical_batch_size() -> None:
    def measured(trial: optuna.Trial) -> float:
        trial.set_user_attr(attributes.NOISE_SCALE, 20000.0)
        return objective(trial)

    plain, informed = recommend(run(n_trials=6)), recommend(run(measured, 6))
    assert informed.critical_batch_size > 2 * plain.critical_batch_size


def test_a_new_study_starts_from_what_an_old_one_learned() -> None:
    """The range of the new one is a hundred times too wide."""
    old = run(n_trials=25)
    prior = ScalingPrior.from_study(old)
    assert prior == ScalingPrior.from_evidence(recommend(old))
    low, high = recommend(old).learning_rate_interval
    assert prior.learning_rate_log_sd > math.log(high / low) / 3.29

    def wide(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-6, 10.0, log=True)
        return loss(trial.suggest_int("batch_size", 16, 4096, log=True), lr)

    def early(prior: str | ScalingPrior) -> float:
        study = run(wide, 5, sampler=CoupledSampler(prior=prior, seed=0))
        return float(np.mean([t.value for t in study.trials]))

    assert early(prior) < early("unknown") - 0.1


def test_linear_learning_rate_from_zero() -> None:
    def linear(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 0.0, 0.1)
        batch_size = trial.suggest_int("batch_size", 16, 1024, step=16)
        return loss(batch_size, max(lr, 1e-9))

    study = run(linear, 15)
    assert study.best_value < 2.1
    assert all(t.params["batch_size"] % 16 == 0 for t in study.trials)


def test_goes_on_in_an_sqlite_study_with_tpe_history(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    before = optuna.create_study(study_name="s", storage=storage, sampler=TPESampler(seed=0))
    before.optimize(objective, n_trials=12)
    after = optuna.load_study(
        study_name="s", storage=storage, sampler=CoupledSampler(prior="adamw", seed=0)
    )
    after.optimize(objective, n_trials=8)
    new = [t.value for t in after.trials[12:]]
    assert min(new) < 2.02
    assert float(np.median(new)) < float(np.median([t.value for t in after.trials[:12]]))


def test_two_parameters_need_two_names() -> None:
    with pytest.raises(ConfigError, match="'lr' stands for two"):
        CoupledSampler(batch_size="lr", learning_rate="lr")
