"""Optimizers that need no memory in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.stepping import GuardedStep


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False)),
    ],
)
def test_optimizers_step_as_plain_ones_do(name: str, reference: object) -> None:
    weights = []
    for make in (lambda p: optimizer_factory(name)(p, 0.1), reference):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(20, dtype=torch.float64))
        optimizer = make([w])  # type: ignore[operator]
        step = GuardedStep(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            (w.sin() ** 2).sum().backward()
            step()
        weights.append(w.detach())
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["bfloat16", "sliced", "late"])
def test_optimizers_take_every_parameter(name: str, kind: str) -> None:
    """PyTorch's fused kernels are wrong for some of these, or fail."""

    def trained(step: Callable[[torch.optim.Optimizer], Callable[[], Any]]) -> list[torch.Tensor]:
        values = torch.linspace(-1, 1, 64).reshape(32, 2)
        if kind == "bfloat16":
            values = values.bfloat16()
        weights = [torch.nn.Parameter(values[:, :1] if kind == "sliced" else values.clone())]
        weights.append(torch.nn.Parameter(torch.ones(40)))
        optimizer = optimizer_factory(name)(weights, 0.1)
        if step is plain:
            for group in optimizer.param_groups:
                group["fused"], group["foreach"] = None, False
        do = step(optimizer)
        for number in range(4):
            weights[0].grad = weights[0].detach() * 0.5
            weights[1].grad = None if kind == "late" and number < 2 else torch.ones(40)
            do()
        return weights

    def plain(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        return optimizer.step

    torch.testing.assert_close(trained(GuardedStep), trained(plain))
