"""What model and loss may do to the graph of a pass: unfreeze, ask for gradients, leave it out."""

from __future__ import annotations

import copy
import traceback

import pytest
import torch
from comparing import gradients
from torch import nn

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.training import AccumulatedBackward


class Unfreezing(nn.Module):
    """Freezes and unfreezes its first layer in forward, as nets that are trained in turns do."""

    def __init__(self, loss: Full) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 1)
        self.loss = loss

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first.requires_grad_(False)
        frozen = self.second(self.first(x))
        self.loss.may_fail()
        self.first.requires_grad_(True)
        return self.second(torch.tanh(self.first(x))) + frozen


class Full:
    """Runs out of memory at the given moments."""

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.moments = 0

    def may_fail(self) -> None:
        self.moments += 1
        if self.moments in self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.may_fail()
        return nn.functional.mse_loss(outputs, targets)


@pytest.mark.parametrize("failing", [(1,), (2,), (1, 5), (1, 3), (2, 5, 8)])
def test_what_forward_unfreezes_is_undone_too(failing: tuple[int, ...]) -> None:
    x, y = torch.randn(8, 5), torch.randn(8, 1)
    model = Unfreezing(Full(*failing))
    model.first.requires_grad_(False)
    plain = copy.deepcopy(model)
    plain.loss = Full()
    nn.functional.mse_loss(plain(x), y).backward()
    AccumulatedBackward(model, model.loss)(x, y)
    assert model.loss.moments > len(failing)
    for found, expected in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_inputs_that_forward_asks_gradients_of_are_no_foreign_leaves() -> None:
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(
                self.net(x.requires_grad_(True)).tanh().sum(), x, create_graph=True
            )[0]

    x = torch.randn(8, 5)
    backward = AccumulatedBackward(Force(), nn.functional.mse_loss)
    for _ in range(3):
        backward(x, torch.zeros(8, 5))


def test_a_loss_that_is_constant_for_a_part_of_the_batch_trains_by_the_others() -> None:
    targets = torch.tensor([1.0, 2.0, 3.0, 4.0, -1.0, -1.0, -1.0, -1.0])

    def count(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (targets >= 0).sum().clamp(min=1e-3)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        labelled = targets >= 0
        if not labelled.any():
            return torch.zeros(())
        return ((outputs[:, 0] - targets)[labelled] ** 2).mean()

    model, x = nn.Linear(5, 1), torch.randn(8, 5)
    backward = AccumulatedBackward(model, loss, microbatch_size=4, count=count)
    backward(x, targets)
    found = gradients(model)
    model.zero_grad()
    loss(model(x), targets).backward()
    for part, expected in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="does not require grad"):
        backward(x, -torch.ones(8))


def test_an_error_that_was_being_handled_before_keeps_its_traceback() -> None:
    def fails() -> None:
        raise KeyError("sample 3")

    model = nn.Linear(5, 1)
    backward = AccumulatedBackward(model, Full(1))
    try:
        fails()
    except KeyError as error:
        backward(torch.randn(8, 5), torch.randn(8, 1))
        frames = traceback.extract_tb(error.__traceback__)
        assert frames[-1].name == "fails"


def test_what_forward_has_frozen_is_not_frozen_where_nothing_fits() -> None:
    class Freezing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.requires_grad_(False)
            return super().forward(x)

    model = Freezing(5, 1)
    with pytest.raises(MicrobatchDoesNotFitError):
        AccumulatedBackward(model, Full(*range(1, 9)))(torch.randn(8, 5), torch.randn(8, 1))
    assert model.weight.requires_grad
