"""Buffers and gradients that cannot simply be copied are put back, or added to, all the same."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_equal
from comparing import gradients
from comparing import seed_all
from failing import FailingAt
from torch import nn

from bs_optuna.training import AccumulatedBackward


class Shared(nn.Module):
    """Holds a buffer whose elements are one, one in part, and one that is sparse."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        seed_all(0)
        self.net = nn.Linear(4, 3)
        self.fits = fits
        self.register_buffer("scale", torch.ones(1).expand(3))
        self.register_buffer("rows", torch.ones(2, 1, 3).expand(2, 5, 3))
        self.register_buffer("graph", torch.eye(3).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale[0].mul_(2)  # and so all of its elements
        scale = self.scale * (1 + torch.rand(1))
        if len(x) > self.fits:
            self.scale = scale
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.")
        outputs: torch.Tensor = self.net(x) @ self.graph * scale * self.rows[0, 0]
        return outputs


@pytest.mark.parametrize("microbatch_size", [3, 6])
def test_expanded_and_sparse_buffers_are_put_back(microbatch_size: int) -> None:
    model = Shared(fits=3)
    scale, x = model.scale, torch.ones(6, 4)
    AccumulatedBackward(model, lambda o, t: o.square().mean(), microbatch_size=microbatch_size)(x)
    assert model.scale is scale
    assert model.scale.tolist() == [4.0] * 3
    told = Shared(fits=6)
    AccumulatedBackward(told, lambda o, t: o.square().mean(), microbatch_size=3)(x)
    assert_equal(gradients(model), gradients(told))


def in_one_buffer(model: nn.Module) -> torch.Tensor:
    """Ones, of which every gradient is a view."""
    parameters = [*model.parameters()]
    flat = torch.ones(sum(p.numel() for p in parameters))
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)
    return flat


def test_gradients_are_added_to_in_their_own_tensors_whatever_fails() -> None:
    x, y = torch.linspace(-1, 1, 24).view(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])

    def run(position: int | None, microbatch_size: int) -> tuple[nn.Module, FailingAt, bool]:
        seed_all(0)
        model = nn.Linear(4, 3)
        flat = in_one_buffer(model)
        views = [p.grad for p in model.parameters()]
        backward = AccumulatedBackward(
            model, nn.functional.cross_entropy, microbatch_size=microbatch_size
        )
        with FailingAt(position) as device:
            backward(x, y)
        same = all(p.grad is view for p, view in zip(model.parameters(), views, strict=True))
        assert same == torch.equal(flat, torch.cat([g.flatten() for g in gradients(model)]))
        return model, device, same

    whole, device, same = run(None, 6)
    assert same
    halved, _, same = run(None, 3)
    assert same
    replaced = 0
    for position in range(device.operations):
        model, failing, same = run(position, 6)
        assert failing.failures == 1
        replaced += not same  # the copy failed: the value is right all the same
        assert_equal(gradients(model), gradients(halved if same else whole))
    assert replaced == 2


@pytest.mark.parametrize("late", [True, False])
def test_sparse_gradients_and_dense_ones_are_added(late: bool) -> None:
    table = nn.Embedding(5, 2, sparse=True)
    words = torch.tensor([1, 3, 3, 0])

    def dense(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean() + table.weight.square().sum()

    def sparse(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean()

    losses = (dense, sparse) if late else (sparse, dense)
    for loss in losses:
        AccumulatedBackward(table, loss)(words)
    assert table.weight.grad is not None
    found, table.weight.grad = table.weight.grad, None
    for loss in losses:
        loss(table(words), words).backward()
    assert table.weight.grad is not None
    assert found.layout == torch.strided
    torch.testing.assert_close(found, table.weight.grad.to_dense())


class Rotary(nn.Module):
    """Registers a buffer in its first forward pass, as caches of positions do."""

    def __init__(self) -> None:
        super().__init__()
        seed_all(0)
        self.net = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "angles"):
            self.register_buffer("angles", torch.arange(3.0))
        outputs: torch.Tensor = self.net(x) * self.angles
        return outputs


def test_a_buffer_that_was_registered_in_a_failed_attempt_is_registered_again() -> None:
    def run(position: int | None, microbatch_size: int) -> tuple[nn.Module, FailingAt]:
        model, x = Rotary(), torch.ones(4, 4)
        backward = AccumulatedBackward(
            model, lambda o, t: o.square().mean(), microbatch_size=microbatch_size
        )
        with FailingAt(position) as device:
            backward(x)
        return model, device

    _, device = run(None, 4)
    halved, _ = run(None, 2)
    for position in range(device.operations):
        model, failing = run(position, 4)
        assert failing.failures == 1
        assert_equal(gradients(model), gradients(halved))


@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.Sequential(nn.LazyBatchNorm1d())])
def test_a_lazy_module_is_refused_with_the_remedy(lazy: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"has no shape before its first forward pass, .* first"):
        AccumulatedBackward(lazy, nn.functional.cross_entropy)
