"""A fused step of several groups that fails between two of them goes on, or says what was done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import optuna
import pytest
import torch
from comparing import assert_equal
from failing import FailingAt
from torch import nn

from bs_optuna.errors import StepDoesNotFitError
from bs_optuna.training import Budget
from bs_optuna.training import GuardedStep
from bs_optuna.training import TrainingObjective
from bs_optuna.training import TrainingTask
from bs_optuna.training.step_parts import steps_in_place


SECOND = 3  # elements of the second group's parameter, by which it is known

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "bare sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),  # never has any state
    "sgd fused": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True),
    "adagrad fused": lambda groups: torch.optim.Adagrad(groups, lr=0.1, fused=True),
}


class NeverTheSecond(FailingAt):
    """Has no memory for the second group, ever."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "_fused_" in str(func) and args[0][0].numel() == SECOND and self.armed:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))

    armed = True


class Run:
    def __init__(self, make: Make, *, groups: int = 3) -> None:
        self.parameters = [nn.Parameter(torch.linspace(1, 2, n)) for n in (2, SECOND, 4)]
        first, second, third = self.parameters
        self.optimizer = make([
            {"params": [first]}, {"params": [second], "lr": 0.01}, {"params": [third]}
        ] if groups == 3 else [{"params": self.parameters}])  # fmt: skip
        self.step = GuardedStep(self.optimizer, max_norm=0.5)

        self.number = 0

    def train(self, steps: int, device: AbstractContextManager[object] | None = None) -> None:
        for _ in range(steps):
            self.number += 1
            for p in self.parameters:
                p.grad = p.detach() * self.number
            with device or nullcontext():
                self.step()

    def state(self) -> list[Any]:
        grads = [p.grad for p in self.parameters]
        return copy.deepcopy([self.parameters, grads, self.optimizer.state_dict()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_failing_at_any_operation_of_a_later_step_changes_no_bit(name: str) -> None:
    def run(position: int | None) -> tuple[list[Any], FailingAt]:
        run = Run(OPTIMIZERS[name])
        run.train(2)
        device = FailingAt(position)
        run.train(1, device)
        run.train(1)  # nothing is left that was for the one before
        return run.state(), device

    expected, clean = run(None)
    for position in range(clean.operations):
        found, device = run(position)
        assert device.failures == 1
        assert_equal(found, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_never_fits_says_what_has_been_stepped(name: str) -> None:
    stepped, untouched, run = (Run(OPTIMIZERS[name]) for _ in range(3))
    stepped.train(3)
    for other in (untouched, run):
        other.train(2)
    device = NeverTheSecond(None)
    with pytest.raises(StepDoesNotFitError, match=r"; 1 of 3 groups .* checkpoint; use") as info:
        run.train(1, device)
    assert info.value.partly
    assert device.failures == 3
    found = run.state()
    for i, expected in enumerate((stepped, untouched, untouched)):
        assert_equal(found[0][i], expected.state()[0][i])
        states = (state[2]["state"].get(i) for state in (found, expected.state()))
        assert_equal(*states)
    assert_equal(found[1], stepped.state()[1])  # gradients are all there, clipped


@pytest.mark.parametrize("name", ["adamw", "adamw fused"])
def test_a_group_without_gradients_does_not_count_as_stepped(name: str) -> None:
    run = Run(OPTIMIZERS[name])
    run.parameters[1].grad = torch.ones(SECOND)  # the other groups are frozen
    before = run.state()
    with NeverTheSecond(None), pytest.raises(StepDoesNotFitError) as info:
        run.step()
    assert not info.value.partly
    assert_equal(run.state()[::2], before[::2])


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_that_is_short_after_the_whole_step_does_not_repeat_it(
    name: str, groups: int, before: int
) -> None:
    expected, run = (Run(OPTIMIZERS[name], groups=groups) for _ in range(2))
    expected.train(before + 1)
    run.train(before)
    failures = iter([torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB."), None])

    def hook(*_: Any) -> None:
        if error := next(failures):
            raise error

    run.optimizer.register_step_post_hook(hook)
    run.train(1)
    assert_equal(run.state(), expected.state())


def test_hooks_that_go_through_the_groups_are_not_taken_for_the_step() -> None:
    expected, run = (Run(OPTIMIZERS["sgd"]) for _ in range(2))
    expected.train(3)
    run.train(2)
    failures = iter([torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB."), None])

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert all(group["lr"] for group in optimizer.param_groups)
        if error := next(failures):
            raise error

    run.optimizer.register_step_pre_hook(hook)
    run.train(1)
    assert_equal(run.state(), expected.state())


def test_an_error_of_the_users_own_leaves_the_optimizer_whole() -> None:
    run = Run(OPTIMIZERS["sgd"])
    run.train(2)
    calls = iter([None, KeyError("mine")])

    def hook(*_: Any) -> None:
        if error := next(calls):
            raise error

    hooked = run.optimizer.register_step_pre_hook(hook)
    groups = run.optimizer.param_groups
    with pytest.raises(KeyError, match="mine"):
        run.train(1, NeverTheSecond(None))
    hooked.remove()
    assert run.optimizer.param_groups is groups
    assert len(run.optimizer._optimizer_step_pre_hooks) == 0


@pytest.mark.usefixtures("ample_memory")
def test_a_trial_whose_step_was_done_in_part_is_pruned(study: optuna.Study) -> None:
    device = NeverTheSecond(None)
    device.armed = False

    def groups(parameters: Any, lr: float) -> torch.optim.Optimizer:
        weight, bias = parameters
        return torch.optim.AdamW([{"params": [weight]}, {"params": [bias]}], lr=lr)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        device.armed = outputs.requires_grad  # in training
        return nn.functional.cross_entropy(outputs, targets)

    data = (torch.randn(16, 4), torch.randint(SECOND, (16,)))
    task = TrainingTask(
        model=lambda: nn.Linear(4, SECOND), train_data=data, valid_data=data, loss=loss,
        optimizer=groups,
    )  # fmt: skip
    objective = TrainingObjective(task, budget=Budget("steps", 3), batch_size=(4, 8))
    with device:
        study.optimize(objective, n_trials=1)
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED
    assert device.failures == 3


SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hook_that_is_called_again_sees_all_groups(name: str) -> None:
    run = Run(OPTIMIZERS[name])
    run.train(2)
    failures = iter([SHORT, None])
    seen: list[list[Any]] = []

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.append([(group["lr"], group["fused"]) for group in optimizer.param_groups])
        assert optimizer.state_dict()["param_groups"][2]["lr"] == 0.1
        if error := next(failures):
            raise error

    chosen = [(group["lr"], group["fused"]) for group in run.optimizer.param_groups]
    run.optimizer.register_step_post_hook(hook)
    run.train(1)
    assert seen == [chosen] * 2


def test_a_hook_before_the_step_reaches_the_group_that_it_means_in_each_attempt() -> None:
    expected, run = (Run(OPTIMIZERS["adamw"]) for _ in range(2))

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, (0.1, 0.2, 0.3), strict=True):
            group["lr"] = lr

    for other in (expected, run):
        other.train(2)
        other.optimizer.register_step_pre_hook(hook)
    expected.train(1)
    device = NeverTheSecond(None)
    handle = run.optimizer.register_step_pre_hook(
        lambda *_: setattr(device, "armed", device.failures == 0)
    )
    run.train(1, device)
    handle.remove()
    assert device.failures == 1
    assert_equal(run.state(), expected.state())


def test_groups_that_are_only_looked_at_before_the_step_are_not_taken_for_stepped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What PyTorch does before a step where there is an accelerator, if the optimizer is a copy.
    check = lambda self: all(group["capturable"] for group in self.param_groups)  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "_accelerator_graph_capture_health_check", check)
    expected, run = (Run(OPTIMIZERS["adamw"]) for _ in range(2))
    expected.train(3)
    run.train(2)
    device = NeverTheSecond(None)
    run.optimizer.register_step_pre_hook(lambda *_: setattr(device, "armed", device.failures == 0))
    run.train(1, device)
    assert device.failures == 1
    assert_equal(run.state(), expected.state())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch compiles its own
@pytest.mark.parametrize("name", ["adamw", "adamw fused", "sgd"])
def test_a_compiled_step_is_undone(name: str) -> None:
    expected, run = (Run(OPTIMIZERS[name]) for _ in range(2))
    for other in (expected, run):
        optimizer = other.optimizer
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        other.train(2)
    failures = iter([SHORT, None])

    def hook(*_: Any) -> None:
        if error := next(failures):
            raise error

    expected.train(1)
    run.optimizer.register_step_post_hook(torch.compiler.disable(hook))
    run.train(1)
    assert_equal(run.state()[0], expected.state()[0])


def test_groups_that_can_be_captured_are_copied() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], fused=True)
    assert steps_in_place(optimizer)
    optimizer.param_groups[0]["capturable"] = True
    assert not steps_in_place(optimizer)


def test_what_cannot_be_gone_on_with_steps_fused_all_the_same() -> None:
    parameters = [nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float64)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    step = GuardedStep(optimizer)
    seen: list[Any] = []

    class Watching(FailingAt):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return super().__torch_dispatch__(func, types, args, kwargs)

    for number in range(2):
        for p in parameters:
            p.grad = torch.ones_like(p)
        seen.clear()
        with Watching(None):
            step()
        assert sum("_fused_adamw_" in name for name in seen) == 2, number
