"""Parts keep the mode that a task has put them into, and a loss is evaluated in evaluation mode."""

from __future__ import annotations

import optuna
import pytest
import torch
from limited_task import make_objective
from limited_task import make_task
from limited_task import run_trial
from torch import nn

from bs_optuna.training.modes import begin_training
from bs_optuna.training.modes import evaluating


class Noting(nn.Module):
    """Notes the modes that it is called in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.part = nn.Linear(4, width)
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.add((self.training, torch.is_grad_enabled()))
        outputs: torch.Tensor = self.part(x)
        return outputs


def test_a_frozen_part_in_evaluation_mode_stays_in_it(study: optuna.Study) -> None:
    made: list[nn.Sequential] = []

    def model() -> nn.Module:
        made.append(nn.Sequential(Noting(4).eval().requires_grad_(False), Noting(3)))
        return made[-1]

    run_trial(make_objective(make_task(model=model)), study, batch_size=32, lr=0.5)
    frozen, trained = made[-1]
    assert isinstance(frozen, Noting)
    assert isinstance(trained, Noting)
    assert frozen.modes == {(False, True), (False, False)}
    assert trained.modes == {(True, True), (False, False)}


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_as_libraries_return_it_is_trained(whole: bool) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval(), nn.Linear(3, 2))
    if whole:
        model.eval()
    assert all(module.training for module in begin_training(model).modules())


class Merging(nn.Module):
    """Trains in training mode alone, as adapters that are merged for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def train(self, mode: bool = True) -> Merging:
        self.weight.requires_grad_(mode)
        return super().train(mode)


def test_modules_that_act_on_a_change_of_mode_are_told_of_it() -> None:
    model = nn.Sequential(Merging(), nn.Dropout().eval())
    with evaluating(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_loss_learns_nothing_from_validation_data(study: optuna.Study) -> None:
    modes: set[tuple[bool, bool]] = set()

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            modes.add((self.training, torch.is_grad_enabled()))
            return nn.functional.cross_entropy(self.norm(outputs), targets)

    run_trial(make_objective(make_task(loss=Loss())), study, batch_size=32, lr=0.5)
    assert modes == {(True, True), (False, False)}


def test_modes_come_back_one_by_one_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(1, 1).eval(), nn.Dropout())
    try:
        with evaluating(model, None):
            assert not any(module.training for module in model.modules())
            raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == [True, False, True]
