"""recommend on studies whose best setting is known."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler

from bs_optuna.errors import StudyError
from bs_optuna.sampling import CoupledSampler
from bs_optuna.sampling import attributes
from bs_optuna.sampling import recommend
from bs_optuna.sampling.recommend import recommend_each
from bs_optuna.science.prior import ScalingPrior


def best_learning_rate(batch_size: float) -> float:
    return 3e-3 / (1.0 + 200.0 / batch_size)


def objective(trial: optuna.Trial) -> float:
    batch_size = trial.suggest_int("batch_size", 16, 4096, log=True)
    lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    off = math.log(lr / best_learning_rate(batch_size))
    return 2.0 + 0.1 * off**2 + 0.02 * math.log(batch_size / 128) ** 2


def study_of(sampler: optuna.samplers.BaseSampler, n_trials: int) -> optuna.Study:
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=n_trials)
    return study


def test_the_best_tried_setting_is_a_trial_of_the_study() -> None:
    study = study_of(CoupledSampler(prior="adamw", seed=0), 20)
    advice = recommend(study)
    assert advice.trial_number is not None
    assert study.trials[advice.trial_number].params == advice.params
    assert study.trials[advice.trial_number].value == pytest.approx(study.best_value, abs=0.01)
    assert advice.value_interval[0] <= advice.value <= advice.value_interval[1]
    assert advice.probability_best is not None
    assert 0.0 < advice.probability_best <= 1.0


@pytest.mark.parametrize("batch_size", [64, 256, 1024])
def test_learning_rate_of_a_batch_size_from_a_random_study(batch_size: int) -> None:
    advice = recommend(study_of(RandomSampler(seed=1), 40), batch_size=batch_size)
    truth = best_learning_rate(batch_size)
    assert advice.batch_size == batch_size
    assert advice.trial_number is None
    assert truth / 1.5 < advice.learning_rate < truth * 1.5
    assert advice.learning_rate_interval[0] < truth < advice.learning_rate_interval[1]


def test_several_batch_sizes_are_answered_as_each_alone() -> None:
    study = study_of(RandomSampler(seed=1), 12)
    together = recommend_each(study, [64, 1024], prior="adamw", seed=3)
    alone = [recommend(study, batch_size=b, prior="adamw", seed=3) for b in (64, 1024)]
    assert together == alone


def test_the_seed_of_the_averages_matters_little() -> None:
    """Losses of 60 trials with a noise of 5 %, asked for where they are few and the valley flat."""
    noise = np.random.default_rng(0)
    study = optuna.create_study(sampler=CoupledSampler(prior="sgd", seed=1))

    def noisy(trial: optuna.Trial) -> float:
        return objective(trial) * math.exp(0.05 * noise.standard_normal())

    study.optimize(noisy, n_trials=60)
    found = [recommend(study, batch_size=16, seed=seed).learning_rate for seed in range(4)]
    assert np.log(found).std() < math.log(1.1)


@pytest.mark.parametrize("batch_size", [64, 256, 1024])
def test_a_best_learning_rate_just_below_divergence(batch_size: int) -> None:
    """Training gets better up to 0.6 and breaks above: no tried rate lies within a factor of 2."""

    def brink(trial: optuna.Trial) -> float:
        size = trial.suggest_int("batch_size", 16, 4096, log=True)
        lr = trial.suggest_float("lr", 1e-3, 10.0, log=True)
        if lr > 0.6:
            raise optuna.TrialPruned
        return 3.0 - 0.4 * math.log(lr) + 0.1 * abs(math.log(size / 256))

    rates = [0.003, 0.03, 0.3, 3.0]
    sizes = [b for b in (16, 64, 256, 1024, 4096) if b != batch_size]
    study = optuna.create_study(
        sampler=optuna.samplers.GridSampler({"batch_size": sizes, "lr": rates}, seed=0)
    )
    study.optimize(brink)
    advice = recommend(study, batch_size=batch_size, prior="sgd")
    assert 0.2 < advice.learning_rate < 0.6  # on the safe side, where one run in ten may break
    assert advice.learning_rate_interval[0] < 0.6 < advice.learning_rate_interval[1]
    assert advice.learning_rate_interval[1] < 10.0
    assert advice.trials == len(sizes) * len(rates)


def test_one_lucky_run_does_not_win() -> None:
    study = optuna.create_study()
    space = {
        "batch_size": optuna.distributions.IntDistribution(16, 1024, log=True),
        "lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True),
    }
    for i in range(9):
        lr = 1e-5 * 10 ** (i / 2)
        for batch_size in (32, 64, 128):
            value = (math.log(lr) - math.log(1e-3)) ** 2
            lucky = i == 7 and batch_size == 64
            params = {"batch_size": batch_size, "lr": lr}
            study.add_trial(
                optuna.create_trial(
                    params=params, distributions=space, value=-0.2 if lucky else value
                )
            )
    assert study.best_params["lr"] > 1e-2
    assert recommend(study).learning_rate == pytest.approx(1e-3)


def test_too_few_trials() -> None:
    with pytest.raises(StudyError, match=r"2 completed trials .* takes 3\. Run more"):
        recommend(study_of(RandomSampler(seed=0), 2))


def test_missing_parameter() -> None:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(lambda t: t.suggest_float("lr", 1e-5, 1e-1, log=True), n_trials=4)
    with pytest.raises(StudyError, match=r"no parameter 'batch_size'; it has lr\."):
        recommend(study)


def test_several_objectives() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    with pytest.raises(StudyError, match="2 objectives"):
        recommend(study)


@pytest.mark.parametrize("batch_size", [1024, 8192])
def test_far_beyond_the_range_the_interval_is_wider_and_holds_the_truth(batch_size: int) -> None:
    """A learning rate in proportion to the batch size, which leaves the searched range behind."""

    def linear(trial: optuna.Trial) -> float:
        size = trial.suggest_int("batch_size", 8, 64, log=True)
        lr = trial.suggest_float("lr", 2e-4, 4e-3, log=True)
        return 0.1 * math.log(lr / (1e-3 * size / 32)) ** 2

    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(linear, n_trials=30)
    # That it does not saturate is known: the data cannot tell.
    prior = ScalingPrior(
        exponent=1.0, exponent_sd=0.1, critical_batch_size=2**20, critical_batch_size_log_sd=0.5
    )
    near, far = recommend_each(study, [64, batch_size], prior=prior)
    low, high = far.learning_rate_interval
    assert low < 1e-3 * batch_size / 32 < high
    assert high / low > near.learning_rate_interval[1] / near.learning_rate_interval[0]


def test_where_all_is_alike_the_interval_holds_what_is_recommended() -> None:
    for seed in range(6):
        study = optuna.create_study(sampler=RandomSampler(seed=seed))
        study.optimize(lambda t: 0.0 * objective(t), n_trials=12)
        advice = recommend(study)
        low, high = advice.learning_rate_interval
        assert low <= advice.learning_rate * 1.0001
        assert advice.learning_rate <= high * 1.0001


def test_the_sampler_of_a_study_knows_the_names_and_the_prior() -> None:
    def named(trial: optuna.Trial) -> float:
        batch_size = trial.suggest_int("bs", 16, 4096, log=True)
        off = math.log(trial.suggest_float("eta", 1e-5, 1e-1, log=True))
        return (off - math.log(best_learning_rate(batch_size))) ** 2

    sampler = CoupledSampler(prior="adamw", batch_size="bs", learning_rate="eta", seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(named, n_trials=6)
    known = recommend(study, batch_size=64)
    study.sampler = RandomSampler()
    told = recommend(
        study, batch_size=64, prior="adamw", batch_size_name="bs", learning_rate_name="eta"
    )
    assert known == told
    with pytest.raises(StudyError, match="has no parameter 'batch_size'; it has bs, eta"):
        recommend(study)


def test_a_study_of_the_command_line_knows_its_optimizer_and_reference() -> None:
    study = study_of(RandomSampler(seed=0), 6)
    prior = ScalingPrior.for_optimizer("adamw").with_reference(64, 2e-4)
    expected = recommend(study, batch_size=1024, prior=prior)
    assert recommend(study, batch_size=1024) != expected
    study.set_user_attr(attributes.EXPERIMENT, {"optimizer": "adamw"})
    study.set_user_attr(attributes.CONFIG, {"reference": [64, 2e-4]})
    assert recommend(study, batch_size=1024) == expected
    study.set_user_attr(attributes.EXPERIMENT, "somebody else's")
    assert recommend(study, batch_size=1024) != expected


def test_with_few_noisy_trials_the_interval_of_the_value_holds_what_it_should() -> None:
    """It says 90 %, and few trials hardly tell a good setting from a lucky one."""
    held = []
    for seed in range(12):
        noise = np.random.default_rng(seed)

        def noisy(trial: optuna.Trial, noise: np.random.Generator = noise) -> float:
            return objective(trial) + noise.normal(0.0, 0.05)

        study = optuna.create_study(sampler=CoupledSampler(prior="adamw", seed=seed))
        study.optimize(noisy, n_trials=8)
        advice = recommend(study)
        off = math.log(advice.learning_rate / best_learning_rate(advice.batch_size))
        truth = 2.0 + 0.1 * off**2 + 0.02 * math.log(advice.batch_size / 128) ** 2
        held.append(advice.value_interval[0] <= truth <= advice.value_interval[1])
    assert sum(held) >= 8
