"""Models, losses and metrics that no training can go on with are refused with what to mend."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
import torch
from limited_task import make_objective
from limited_task import make_task
from limited_task import run_trial
from optuna.trial import TrialState
from torch import nn

from bs_optuna.errors import TaskError
from bs_optuna.sampling import attributes
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import GuardedStep


cross_entropy = nn.functional.cross_entropy


def vector(outputs: Any, targets: Any) -> Any:
    return cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda o, t: (cross_entropy(o, t), o), "a tuple"),
        (lambda o, t: cross_entropy(o, t).item(), "a float"),
        (vector, r"a tensor of shape \[2\] for 2 samples"),
    ],
    ids=["tuple", "float", "vector"],
)
@pytest.mark.parametrize("microbatch_size", [None, 8])
def test_a_loss_that_is_no_number_is_named(
    study: optuna.Study, loss: Any, found: str, microbatch_size: int | None
) -> None:
    objective = make_objective(make_task(loss=loss), microbatch_size=microbatch_size)
    with pytest.raises(TaskError, match=rf"^loss returned {found}; must return one number"):
        run_trial(objective, study, batch_size=32, lr=0.5)


def test_an_error_inside_of_the_loss_stays_what_it_is(study: optuna.Study) -> None:
    def loss(outputs: Any, targets: Any) -> Any:
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        run_trial(make_objective(make_task(loss=loss)), study, batch_size=32, lr=0.5)


def test_one_model_for_all_trials_is_refused(study: optuna.Study) -> None:
    """The second one would go on from the weights of the first."""
    net = nn.Linear(4, 3)
    before = net.weight.clone()
    with pytest.raises(
        TaskError, match=r"model returned the same Linear as before, .* in each call"
    ):
        run_trial(make_objective(make_task(model=lambda: net)), study, batch_size=32, lr=0.5)
    assert torch.equal(net.weight, before)
    with pytest.raises(TaskError, match=r"model returned a function; must be a torch.nn.Module"):
        make_objective(make_task(model=lambda: cross_entropy))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_is_named(study: optuna.Study, broken: float) -> None:
    task = make_task(metrics={"accuracy": lambda o, t: 0.5, "f1": lambda o, t: broken})
    trial = run_trial(make_objective(task), study, batch_size=32, lr=0.5)
    assert trial.state == TrialState.PRUNED
    reason = trial.user_attrs[attributes.PRUNE_REASON]
    assert reason.startswith(f"diverged in f1: validation f1 {broken} after ")
    assert reason.endswith("; mend that metric or leave it out")


def test_a_loss_that_diverges_is_not_blamed_on_a_metric(study: optuna.Study) -> None:
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(outputs, targets) / torch.tensor(float(outputs.requires_grad))

    trial = run_trial(
        make_objective(make_task(loss=loss, metrics={"loss too": loss})), study,
        batch_size=32, lr=0.5,
    )  # fmt: skip
    assert trial.user_attrs[attributes.PRUNE_REASON].startswith("diverged: validation loss inf")


def test_in_a_loop_of_ones_own_a_loss_that_is_no_tensor_is_named() -> None:
    model = nn.Linear(4, 3)
    backward = AccumulatedBackward(model, lambda o, t: {"loss": cross_entropy(o, t)})
    with pytest.raises(TypeError, match="loss function returned a dict; must return one number"):
        backward(torch.ones(2, 4), torch.tensor([0, 1]))
    assert model.weight.grad is None


def test_an_optimizer_with_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LBFGS steps by a closure, .* such as AdamW"):
        GuardedStep(torch.optim.LBFGS(nn.Linear(4, 3).parameters()))


def test_a_model_or_an_optimizer_of_another_kind_is_named() -> None:
    with pytest.raises(TypeError, match=r"model=<built-in .*; must be an nn.Module."):
        AccumulatedBackward(torch.sum, cross_entropy)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer=.*; must be a torch.optim.Optimizer."):
        GuardedStep(nn.Linear(4, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (lambda p, lr: torch.optim.LBFGS(p, lr=lr), "optimizer returned an LBFGS, which steps by"),
        (lambda p, lr: None, "optimizer returned a NoneType; must be a torch.optim.Optimizer"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_before_any_trial(
    optimizer: Any, said: str
) -> None:
    with pytest.raises(TaskError, match=said):
        make_objective(make_task(optimizer=optimizer))


def test_a_metric_of_many_numbers_is_named(study: optuna.Study) -> None:
    task = make_task(metrics={"errors": lambda o, t: (o.argmax(1) != t).float()})
    with pytest.raises(TaskError, match=r"errors returned a Tensor of shape \(\d+,\); must return"):
        run_trial(make_objective(task), study, batch_size=32, lr=0.5)


def test_data_without_any_target_has_no_mean(study: optuna.Study) -> None:
    task = make_task()
    inputs, targets = task.valid_data
    nothing = (inputs, torch.full_like(targets, -100))
    task = make_task(valid_data=nothing, count=lambda inputs, targets: (targets != -100).sum())
    with pytest.raises(TaskError, match="count is 0 for all of the data that is evaluated"):
        run_trial(make_objective(task), study, batch_size=32, lr=0.5)


def test_a_trainable_part_of_all_models_is_refused(study: optuna.Study) -> None:
    base = nn.Linear(4, 4)
    task = make_task(model=lambda: nn.Sequential(base, nn.Linear(4, 3)))
    with pytest.raises(
        TaskError, match=r"parameter '0.weight' that an earlier model had, .*deepcopy"
    ):
        make_objective(task)
    base.requires_grad_(False)  # frozen, as with adapters, it may be shared
    trial = run_trial(make_objective(task), study, batch_size=32, lr=0.5)
    assert trial.state == TrialState.COMPLETE


def test_a_shared_batch_norm_would_remember_other_trials() -> None:
    base = nn.BatchNorm1d(4, affine=False)
    task = make_task(model=lambda: nn.Sequential(base, nn.Linear(4, 3)))
    with pytest.raises(TaskError, match=r"a BatchNorm1d that an earlier model had, .* evaluation"):
        make_objective(task)
    base.eval()
    make_objective(task)
    # All of it is put into training mode, and that norm with it.
    whole = make_task(model=lambda: nn.Sequential(base, nn.Linear(4, 3)).eval())
    with pytest.raises(TaskError, match="a BatchNorm1d that an earlier model had"):
        make_objective(whole)


def test_an_optimizer_that_ignores_the_learning_rate_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="the same settings whichever learning rate it is given"):
        make_objective(make_task(optimizer=lambda p, lr: torch.optim.AdamW(p, lr=1e-3)))


class Scaled(torch.optim.SGD):
    """As Prodigy: finds its step, of which the rate is a factor."""

    def __init__(self, parameters: Any, factor: float) -> None:
        super().__init__(parameters, lr=1.0)
        for group in self.param_groups:
            group["d_coef"] = factor


@pytest.mark.parametrize("make", [Scaled, lambda p, lr: torch.optim.SGD(p, lr=min(lr, 5e-4))])
def test_an_optimizer_may_use_the_learning_rate_in_its_own_way(make: Any) -> None:
    make_objective(make_task(optimizer=make))


def test_a_training_without_any_target_is_no_training(study: optuna.Study) -> None:
    inputs, targets = make_task().train_data
    nothing = (inputs, torch.full_like(targets, -100))
    task = make_task(train_data=nothing, count=lambda x, t: (t != -100).sum())
    with pytest.raises(TaskError, match="count was 0 for every batch up to the first evaluation"):
        run_trial(make_objective(task), study, batch_size=32, lr=0.5)


def test_a_negative_count_is_refused(study: optuna.Study) -> None:
    with pytest.raises(ValueError, match=r"counts=\[-32.0\]; none may be negative"):
        run_trial(make_objective(make_task(count=lambda x, t: -len(x))), study, batch_size=32, lr=1)


def test_an_optimizer_that_leaves_parameters_out_is_warned_of() -> None:
    task = make_task(optimizer=lambda p, lr: torch.optim.SGD([next(iter(p))], lr=lr))
    with pytest.warns(UserWarning, match="leaves out 1 of 2 parameters, which are never trained"):
        make_objective(task)


def test_a_count_of_each_sample_is_no_count(study: optuna.Study) -> None:
    task = make_task(count=lambda inputs, targets: torch.ones(len(targets)))
    with pytest.raises(TypeError, match=r"count returned a tensor of shape \(\d+,\); must return"):
        run_trial(make_objective(task), study, batch_size=32, lr=0.5)


def test_a_batch_without_any_target_is_a_step_without_an_update(study: optuna.Study) -> None:
    """As it happens by chance where batches are small."""
    inputs, targets = make_task().train_data
    rare = torch.where(torch.arange(len(targets)) % 16 == 0, targets, -100)
    task = make_task(train_data=(inputs, rare), count=lambda x, t: (t != -100).sum())
    trial = run_trial(make_objective(task, batch_size=(2, 64)), study, batch_size=2, lr=0.5)
    assert trial.state == TrialState.COMPLETE
    assert trial.user_attrs[attributes.STEPS] == 256
    assert len(set(trial.intermediate_values.values())) > 1  # the others train
