"""A step that nobody asked to be fused is what PyTorch's own step is, fused or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import assert_equal
from torch import nn

from bs_optuna.training import GuardedStep
from bs_optuna.training.fusing import steps_fused


Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, maximize=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "bare sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


def parameters(make: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 6, 2, 2), (40, 33), (7,))
    return [nn.Parameter(make(torch.randn(shape, generator=generator))) for shape in shapes]


def trained(
    optimizer: torch.optim.Optimizer, step: Callable[[], Any], which: Callable[[int, int], bool]
) -> list[bool]:
    """Four steps with gradients about half as large as the parameters; which could be fused."""
    fused = []
    for number in range(4):
        for i, p in enumerate(q for group in optimizer.param_groups for q in group["params"]):
            p.grad = (p.detach() * 0.5 + 0.1) if which(number, i) else None
        fused.append(steps_fused(optimizer))
        step()
    return fused


def compare(
    make: Make,
    kind: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    which: Callable[[int, int], bool] = lambda number, i: True,
) -> list[bool]:
    """Holds four guarded steps against four of PyTorch; returns which of them were fused."""
    ours, theirs = parameters(kind), parameters(kind)
    optimizer = make(ours)
    fused = trained(optimizer, GuardedStep(optimizer), which)
    plain = make(theirs)
    trained(plain, plain.step, which)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert [group["fused"] for group in optimizer.param_groups] == [None]  # nothing is stored
    if not any(fused):
        assert_equal(ours, theirs)
        assert_equal(optimizer.state_dict(), plain.state_dict())
    return fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_nobody_chose_is_fused_and_right(name: str, dtype: torch.dtype) -> None:
    assert compare(OPTIMIZERS[name], lambda t: t.to(dtype)) == [True] * 4


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "kind",
    [
        lambda t: t.to(torch.bfloat16),  # whose SGD kernel leaves blocks as they were
        lambda t: t.to(torch.complex64),
        lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t,
        lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    ],
    ids=["bfloat16", "complex", "channels_last", "sliced"],
)
def test_what_the_kernels_do_not_take_is_stepped_as_ever(
    name: str, kind: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    assert not any(compare(OPTIMIZERS[name], kind))


def test_a_gradient_that_comes_late_is_stepped_as_ever_once() -> None:
    """PyTorch's fused SGD raises there."""
    late = compare(OPTIMIZERS["sgd"], which=lambda number, i: i < 2 or number > 1)
    assert late == [True, True, False, True]


@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_in_another_layout_is_stepped_as_ever(first: bool) -> None:
    def layout(p: torch.Tensor) -> torch.Tensor:
        return p.t().contiguous().t()

    weights = [nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))]
    twins = copy.deepcopy(weights)
    optimizer, plain = torch.optim.AdamW(weights, lr=0.1), torch.optim.AdamW(twins, lr=0.1)
    step = GuardedStep(optimizer)
    for number in range(3):
        for p in (*weights, *twins):
            p.grad = layout(p.detach()) if (number == 0) == first else p.detach().clone()
        step()
        plain.step()
    torch.testing.assert_close(weights, twins)


def test_sparse_gradients_that_come_late_are_stepped_as_ever() -> None:
    tables = [nn.Embedding(4, 2, sparse=True) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    layers = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    made = [
        torch.optim.SGD([*table.parameters(), layer], lr=0.5)
        for table, layer in zip(tables, layers, strict=True)
    ]
    for number in range(3):
        for table, layer, optimizer in zip(tables, layers, made, strict=True):
            optimizer.zero_grad()
            loss = layer.square().sum()
            if number:
                loss = loss + table(torch.tensor([1])).sum()
            loss.backward()
        GuardedStep(made[0])()
        made[1].step()
    assert_equal(tables[0].state_dict(), tables[1].state_dict())


@pytest.mark.parametrize("how", [{"foreach": True}, {"foreach": False}, {"fused": False}], ids=str)
def test_a_way_that_was_chosen_is_kept(how: dict[str, bool]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, plain = torch.optim.AdamW(ours, **how), torch.optim.AdamW(theirs, **how)
    trained(optimizer, GuardedStep(optimizer), lambda number, i: True)
    trained(plain, plain.step, lambda number, i: True)
    assert_equal(ours, theirs)
    assert_equal(optimizer.state_dict(), plain.state_dict())


def test_state_that_was_stored_by_either_goes_on_with_the_other() -> None:
    for steps in (GuardedStep, lambda optimizer: optimizer.step):
        first, second, whole = parameters(), parameters(), parameters()
        start = torch.optim.AdamW(first, lr=0.1)
        trained(start, steps(start), lambda number, i: True)
        go_on = torch.optim.AdamW(second, lr=0.1)
        go_on.load_state_dict(start.state_dict())
        with torch.no_grad():
            for p, q in zip(second, first, strict=True):
                p.copy_(q)
        other = go_on.step if steps is GuardedStep else GuardedStep(go_on)
        trained(go_on, other, lambda number, i: True)
        reference = torch.optim.AdamW(whole, lr=0.1)
        for _ in range(2):
            trained(reference, reference.step, lambda number, i: True)
        torch.testing.assert_close(second, whole)


def test_a_gradient_of_another_type_is_left_to_pytorchs_own_way() -> None:
    parameter = nn.Parameter(torch.ones(40, 33))
    parameter.grad_dtype = torch.bfloat16
    parameter.grad = torch.ones(40, 33, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    assert not steps_fused(optimizer)
    GuardedStep(optimizer)()
    assert_equal(parameter.detach(), torch.full((40, 33), 0.9))
