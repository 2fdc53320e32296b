"""A loss that trains what nobody looks after is refused; one that differentiates inside is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import assert_equal
from comparing import gradients
from comparing import random_states
from comparing import seed_all
from failing import FailingAt
from torch import nn
from torch.utils.checkpoint import checkpoint

from bs_optuna.training import AccumulatedBackward


def network() -> nn.Module:
    seed_all(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))


X = torch.linspace(-1, 1, 32).view(8, 4)


@pytest.mark.parametrize("microbatch_size", [4, 8])
@pytest.mark.filterwarnings("ignore:BatchNorm normalizes:UserWarning")
def test_a_parameter_of_a_closure_is_refused_and_leaves_no_trace(microbatch_size: int) -> None:
    model, head = network(), nn.Linear(1, 3)
    backward = AccumulatedBackward(
        model, lambda o, t: head(o).square().mean(), microbatch_size=microbatch_size
    )
    states, before = random_states(), {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):  # nor does the first refusal let the second call through
        with pytest.raises(ValueError, match=r"of shape \(3, 1\)|of shape \(3,\)") as info:
            backward(X)
        assert "pass loss_fn as an nn.Module that holds it" in str(info.value)
        assert_equal(random_states(), states)
        assert_equal(dict(model.state_dict()), before)
        assert gradients(model) == gradients(head) == []
    AccumulatedBackward(model, lambda o, t: head.requires_grad_(False)(o).square().mean())(X)


@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize("microbatch_size", [4, 8])
def test_a_plain_tensor_is_refused_once_it_is_seen_again(
    microbatch_size: int, zeroed: bool
) -> None:
    model, scale = nn.Linear(4, 1), torch.ones(2, requires_grad=True)
    backward = AccumulatedBackward(
        model, lambda o, t: (o * scale).square().mean(), microbatch_size=microbatch_size
    )
    if microbatch_size == 8:
        backward(X)
        if zeroed:
            scale.grad = None
    kept, grads = scale.grad, gradients(model)
    with pytest.raises(ValueError, match=r"a tensor of shape \(2,\) that neither"):
        backward(X)
    assert scale.grad is kept
    assert_equal(gradients(model), grads)


@pytest.mark.parametrize("plain", [True, False])
def test_what_joins_the_loss_later_is_refused_once_a_pass_has_failed(plain: bool) -> None:
    """Otherwise its gradient would be there twice, and nobody would know."""
    model, joined, fits = nn.Linear(4, 1), False, 8
    scale = torch.ones(1, requires_grad=True) if plain else nn.Parameter(torch.ones(1))

    def loss_fn(outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        loss = (outputs * scale if joined else outputs).square().mean()
        if len(outputs) > fits:
            loss.backward(retain_graph=True)
            raise MemoryError
        return loss

    backward = AccumulatedBackward(model, loss_fn)
    backward(X)
    joined, fits = True, 4
    kept = gradients(model)
    with pytest.raises(ValueError, match=r"a tensor of shape \(1,\) that neither"):
        backward(X)
    assert_equal(gradients(model), kept)


class Slope(nn.Module):
    """Differentiates by its inputs, which the loss finds in the model."""

    def __init__(self) -> None:
        super().__init__()
        seed_all(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x.detach().requires_grad_()
        outputs: torch.Tensor = self.net(self.x)
        return outputs

    def loss(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        (slope,) = torch.autograd.grad(outputs.sum(), self.x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()


def test_points_to_differentiate_at_are_no_parameters() -> None:
    model = Slope()
    model.loss(model(X.double()), None).backward()
    expected = gradients(model)
    for position in (None, 3, 30):
        model.zero_grad()
        backward = AccumulatedBackward(model, model.loss, microbatch_size=4)
        with FailingAt(position):
            backward(X.double())
        for _ in range(2):
            model.zero_grad()
            backward(X.double())
        torch.testing.assert_close(gradients(model), expected)


def test_leaves_of_the_batch_and_checkpoints_are_no_parameters() -> None:
    model, x = nn.Linear(4, 4), X.clone().requires_grad_()

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return checkpoint(torch.tanh, outputs, use_reentrant=True).square().mean()

    AccumulatedBackward(model, loss_fn, microbatch_size=4)(x)
    found, model.weight.grad = model.weight.grad, None
    loss_fn(model(X), X).backward()
    assert x.grad is not None
    torch.testing.assert_close(found, model.weight.grad)


@pytest.mark.slow
def test_compiled_models_show_their_parameters() -> None:
    model, head = network().eval(), nn.Linear(1, 3)
    compiled = torch.compile(model, backend="aot_eager")
    AccumulatedBackward(compiled, lambda o, t: o.square().mean())(X)
    assert len(gradients(model)) == len([*model.parameters()])
    with pytest.raises(ValueError, match="The loss trains"):
        AccumulatedBackward(compiled, lambda o, t: head(o).square().mean())(X)
