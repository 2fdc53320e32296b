"""Parts keep the mode that a task has put them into, and a loss is evaluated in evaluation mode."""

from __future__ import annotations

import optuna
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


def test_a_part_in_evaluation_mode_stays_in_it(study: optuna.Study) -> None:
    made: list[nn.Sequential] = []

    def model() -> nn.Module:
        made.append(nn.Sequential(Noting(4).eval(), Noting(3)))
        return made[-1]

    run_trial(make_objective(make_task(model=model)), study, batch_size=32, lr=0.5)
    frozen, trained = made[-1]
    assert isinstance(frozen, Noting)
    assert isinstance(trained, Noting)
    assert frozen.modes == {(False, True), (False, False)}
    assert trained.modes == {(True, True), (False, False)}


def test_a_whole_model_in_evaluation_mode_is_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval()
    assert all(module.training for module in begin_training(model).modules())


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
