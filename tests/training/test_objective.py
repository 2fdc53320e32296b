"""Trials train within their budget, end as what they are, and store what really ran."""

from __future__ import annotations

import math
import time
from typing import Any

import optuna
import pytest
import torch
from limited_task import SAMPLES
from limited_task import Limited
from limited_task import make_objective
from limited_task import make_task
from limited_task import run_trial
from optuna.trial import TrialState
from torch import nn

from bs_optuna.errors import ConfigError
from bs_optuna.errors import TaskError
from bs_optuna.sampling import attributes
from bs_optuna.training import Budget


@pytest.mark.parametrize(
    ("budget", "steps"), [("samples=512", 16), ("steps=20", 20), ("samples=1", 1)]
)
def test_what_ran_is_stored(study: optuna.Study, budget: str, steps: int) -> None:
    objective = make_objective(make_task(), budget=Budget.parse(budget))
    trial = run_trial(objective, study, batch_size=32, lr=0.5)
    assert trial.state == TrialState.COMPLETE
    stored = trial.user_attrs
    assert stored[attributes.STEPS] == steps
    assert stored[attributes.SAMPLES] == 32 * steps
    assert stored[attributes.EFFECTIVE_BATCH_SIZE] == 32
    assert stored[attributes.MICROBATCH_SIZE] == 32
    assert stored[attributes.ACCUMULATION_STEPS] == 1
    assert stored[attributes.BACKOFFS] == 0
    assert stored[attributes.LEARNING_RATE] == 0.5
    assert stored[attributes.DEVICE] == "cpu"
    assert stored[attributes.SECONDS] > 0
    assert trial.value == stored[f"{attributes.VALID_PREFIX}loss"]
    assert 0 <= stored[f"{attributes.VALID_PREFIX}accuracy"] <= 1


def test_seconds_are_a_budget_too(study: optuna.Study) -> None:
    objective = make_objective(make_task(), budget=Budget("seconds", 0.05))
    trial = run_trial(objective, study, batch_size=32, lr=0.5)
    assert trial.user_attrs[attributes.STEPS] > 0
    # A slow machine may pass several rungs in one step; the last one is never left out.
    assert {50} <= set(trial.intermediate_values) <= {10, 20, 30, 40, 50}


def test_loading_data_counts_in_a_budget_of_seconds(study: optuna.Study) -> None:
    class Slow(torch.utils.data.Dataset[Any]):
        loaded = 0

        def __len__(self) -> int:
            return SAMPLES

        def __getitem__(self, index: int) -> Any:
            Slow.loaded += 1
            end = time.perf_counter() + 0.001
            while time.perf_counter() < end:
                pass
            return torch.zeros(4), 0

    task = make_task(train_data=Slow())
    objective = make_objective(task, budget=Budget("seconds", 0.1))
    Slow.loaded = 0
    trial = run_trial(objective, study, batch_size=32, lr=0.5)
    assert trial.user_attrs[attributes.STEPS] <= 4  # of 32 ms of loading each
    assert Slow.loaded < 300


def test_a_run_of_one_step_learns_something(study: optuna.Study) -> None:
    for budget in (Budget("seconds", 1e-6), Budget("steps", 1)):
        seen = []

        def model(seen: list[nn.Module] = seen) -> nn.Module:
            seen.append(nn.Linear(4, 3))
            return seen[-1]

        trial = run_trial(make_objective(make_task(model=model), budget=budget), study,
                          batch_size=32, lr=0.5)  # fmt: skip
        assert trial.user_attrs[attributes.STEPS] == 1
        torch.manual_seed(trial.number)
        assert not torch.equal(seen[-1].weight, nn.Linear(4, 3).weight)


def test_groups_of_parameters_keep_their_share_of_the_rate(study: optuna.Study) -> None:
    made = []

    def optimizer(parameters: Any, rate: float) -> torch.optim.Optimizer:
        first, *rest = parameters
        groups = [{"params": [first], "lr": rate}, {"params": rest, "lr": 0.1 * rate}]
        made.append(torch.optim.SGD(groups))
        return made[-1]

    run_trial(make_objective(make_task(optimizer=optimizer)), study, batch_size=32, lr=0.5)
    big, small = (group["lr"] for group in made[-1].param_groups)
    assert small == pytest.approx(0.1 * big)


@pytest.mark.parametrize("changes", [{}, {"model": nn.Identity}], ids=["", "nothing else"])
def test_a_loss_with_parameters_is_trained_too(study: optuna.Study, changes: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs * self.scale, targets)

    loss = Scaled()
    made = []

    def optimizer(parameters: Any, rate: float) -> torch.optim.Optimizer:
        made.append(list(parameters))
        return torch.optim.SGD(made[-1], lr=rate)

    run_trial(make_objective(make_task(loss=loss, optimizer=optimizer, **changes)), study,
              batch_size=32, lr=0.5)  # fmt: skip
    assert made[-1][-1].ndim == 0
    assert made[-1][-1] != 1  # its copy has learned
    assert loss.scale == 1  # the task's own is as it was, for the next trial


def test_a_pair_of_inputs_reaches_the_model_from_a_data_set_too(study: optuna.Study) -> None:
    class Pairs(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> Any:
            return (torch.ones(2) * index, torch.ones(2)), index % 3

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.net(torch.cat([a, b], dim=1))
            return outputs

    task = make_task(model=Two, train_data=Pairs(), valid_data=Pairs(), test_data=None)
    trial = run_trial(make_objective(task), study, batch_size=16, lr=1e-3)
    assert trial.state == TrialState.COMPLETE


class Normed(Limited):
    def __init__(self, fits: int) -> None:
        super().__init__(fits)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.norm(super().forward(x))
        return outputs


@pytest.mark.filterwarnings("ignore:BatchNorm normalizes:UserWarning")
def test_a_single_sample_that_batch_norm_refuses_says_nothing_of_memory(
    study: optuna.Study,
) -> None:
    objective = make_objective(make_task(model=lambda: Normed(2)), batch_size=(4, 64))
    refused = run_trial(objective, study, batch_size=5, lr=0.5)  # 2, 2 and 1
    assert "BatchNorm cannot take the single sample" in refused.user_attrs[attributes.PRUNE_REASON]
    assert refused.user_attrs[attributes.MICROBATCH_FAILS] == 5
    trial = run_trial(objective, study, batch_size=8, lr=0.5)
    assert trial.state == TrialState.COMPLETE
    assert trial.user_attrs[attributes.MICROBATCH_SIZE] == 2


def test_batch_norm_that_gets_a_single_sample_prunes(study: optuna.Study) -> None:
    objective = make_objective(make_task(model=lambda: Normed(1)))
    with pytest.warns(UserWarning, match="convert_batch_norm"):
        trial = run_trial(objective, study, batch_size=8, lr=0.5)
    assert trial.state == TrialState.PRUNED
    assert "BatchNorm cannot take the single sample" in trial.user_attrs[attributes.PRUNE_REASON]


def test_exact_batch_norm_reaches_a_trial(study: optuna.Study) -> None:
    made: list[nn.Module] = []

    def model() -> nn.Module:
        made.append(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
        return made[-1]

    task = make_task(model=model, batch_norm="exact")
    trained = []
    for microbatch_size in (32, 5):
        objective = make_objective(task, budget=Budget("steps", 6), microbatch_size=microbatch_size)
        objective.confirm(32, 0.1, seed=3, study=study)
        trained.append(made[-1].get_submodule("0"))
    whole, split = trained
    assert split.num_batches_tracked == 6
    torch.testing.assert_close(split.running_mean, whole.running_mean)
    torch.testing.assert_close(split.running_var, whole.running_var)


def test_an_enqueued_batch_beyond_the_data_is_refused(study: optuna.Study) -> None:
    study.enqueue_trial({"batch_size": 129, "lr": 0.1})
    with (
        pytest.warns(UserWarning, match="out of range"),
        pytest.raises(TaskError, match="batch_size=129 is more than the 128 training samples"),
    ):
        study.optimize(make_objective(make_task()), n_trials=1)


def test_a_trial_that_used_up_its_budget_is_complete() -> None:
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    objective = make_objective(make_task(), budget=Budget("samples", 64))
    run_trial(objective, study, batch_size=64, lr=1.0)
    worse = run_trial(objective, study, batch_size=64, lr=1e-3)
    assert worse.value > study.trials[0].value
    assert worse.state == TrialState.COMPLETE


def test_trials_of_every_batch_size_are_reported_at_the_same_samples(study: optuna.Study) -> None:
    objective = make_objective(make_task())
    reports = [
        list(run_trial(objective, study, batch_size=b, lr=0.1).intermediate_values)
        for b in (8, 48, 64)
    ]
    assert reports == [[102, 205, 307, 410, 512]] * 3


def test_the_same_trial_gives_the_same_value_and_leaves_the_random_state(
    study: optuna.Study,
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    objective = make_objective(make_task(), seed=5)
    first = run_trial(objective, study, batch_size=16, lr=0.1)
    assert torch.equal(torch.get_rng_state(), before)
    again = run_trial(make_objective(make_task(), seed=4), study, batch_size=16, lr=0.1)
    assert first.value == again.value  # trial 0 with seed 5, trial 1 with seed 4


def test_a_diverged_trial_prunes_with_its_reason(study: optuna.Study) -> None:
    task = make_task(loss=lambda o, t: nn.functional.cross_entropy(o, t) * math.inf)
    trial = run_trial(make_objective(task), study, batch_size=8, lr=1.0)
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs[attributes.PRUNE_REASON] == (
        "diverged: training loss inf after 8 samples"
    )


def test_a_hopeless_trial_prunes_with_its_reason() -> None:
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    objective = make_objective(make_task())
    for _ in range(2):
        run_trial(objective, study, batch_size=8, lr=1.0)
    trial = run_trial(objective, study, batch_size=64, lr=1e-3)
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs[attributes.PRUNE_REASON].startswith("hopeless: loss")
    assert trial.user_attrs[attributes.SAMPLES] < 512


def test_an_error_of_the_users_own_fails_the_trial(study: optuna.Study) -> None:
    task = make_task(loss=lambda o, t: nn.functional.cross_entropy(o.T, t))
    with pytest.raises(ValueError, match="batch_size"):
        run_trial(make_objective(task), study, batch_size=8, lr=1.0)
    assert study.get_trials()[-1].state == TrialState.FAIL


def test_a_metric_can_be_what_is_maximized() -> None:
    study = optuna.create_study(direction="maximize")
    task = make_task(objective="accuracy", direction="maximize")
    trial = run_trial(make_objective(task), study, batch_size=8, lr=1.0)
    assert trial.value == trial.user_attrs[f"{attributes.VALID_PREFIX}accuracy"] > 0.8


def test_a_final_run_is_scored_on_validation_and_test_data(study: optuna.Study) -> None:
    objective = make_objective(make_task())
    scores = objective.confirm(16, 0.5, seed=9, study=study)
    assert scores.valid.keys() == scores.test.keys() == {"loss", "accuracy"}
    assert scores.valid != scores.test
    untested = make_objective(make_task(test_data=None))
    assert untested.confirm(16, 0.5, seed=9, study=study).test == {}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": (64, 8)}, ConfigError, "batch_size=64:8; must be LOW:HIGH"),
        ({"learning_rate": (0, 1)}, ConfigError, "learning_rate=0:1; must be LOW:HIGH"),
        ({"batch_size": (8, 256)}, TaskError, "batch_size=256 is more than the 128 training"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_objective(make_task(), **changes)
    assert not Limited.seen
