"""Steps of optimizers that are not PyTorch's own: all that they change is undone."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from comparing import assert_equal
from failing import FailingAt
from torch import nn

from bs_optuna.errors import StepDoesNotFitError
from bs_optuna.training import GuardedStep


class Decaying(torch.optim.Optimizer):
    """Adds the weight decay to the gradients themselves, as many published ones do."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                assert p.grad is not None
                p.grad.add_(p, alpha=0.5)
                p.add_(p.grad, alpha=-group["lr"])


class Lookahead(torch.optim.Optimizer):
    """Zhang et al. 2019 (arXiv 1907.08610), around another optimizer whose groups it shares."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.fast = torch.optim.RAdam(parameters, lr=0.1)
        super().__init__(self.fast.param_groups, {})
        self.param_groups = self.fast.param_groups
        self.state = defaultdict(dict)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.fast.step()
        self.steps += 1
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow", p.clone())
            if self.steps % 2 == 0:
                p.copy_(slow.lerp_(p, 0.5))


# As those of `torch.distributed.optim`, which keep another one too.
Inside = type("Inside", (Lookahead,), {"__module__": "torch.distributed.optim.inside"})


@pytest.mark.parametrize("make", [Decaying, Lookahead, Inside])
def test_failing_at_any_operation_changes_no_bit(
    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    def run(step: int, position: int | None) -> tuple[list[Any], FailingAt]:
        parameters = [nn.Parameter(torch.linspace(1, 2, n)) for n in (2, 3)]
        optimizer = make(parameters)
        guarded, device = GuardedStep(optimizer), FailingAt(position)
        for number in range(4):
            for p in parameters:
                p.grad = p.detach() * (number + 1)
            with device if number == step else nullcontext():
                guarded()
        states = [optimizer.state, getattr(optimizer, "fast", optimizer).state]
        values = [{**state[p]} for state in states for p in parameters]
        return copy.deepcopy([parameters, [p.grad for p in parameters], values]), device

    for step in range(2):
        expected, clean = run(step, None)
        for position in range(clean.operations):
            found, device = run(step, position)
            assert device.failures == 1
            assert_equal(found, expected)


class Several(torch.optim.Optimizer):
    """Steps others, one for each parameter, that it keeps in a list."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": 0.1})
        self.each = [torch.optim.Adam([p], lr=0.1, foreach=False) for p in parameters]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.each:
            optimizer.step()


def test_optimizers_in_a_list_are_put_back_too() -> None:
    def run(position: int | None) -> tuple[list[Any], FailingAt]:
        parameters = [nn.Parameter(torch.linspace(1, 2, n)) for n in (2, 3)]
        optimizer = Several(parameters)
        guarded, device = GuardedStep(optimizer), FailingAt(position)
        for number in range(3):
            for p in parameters:
                p.grad = p.detach() * (number + 1)
            with device if number == 1 else nullcontext():
                guarded()
        return copy.deepcopy([parameters, [o.state_dict() for o in optimizer.each]]), device

    expected, clean = run(None)
    for position in range(clean.operations):
        found, device = run(position)
        assert device.failures == 1
        assert_equal(found, expected)


def test_sparse_state_is_put_back_without_any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.EmbeddingBag(200, 4, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    guarded, words = GuardedStep(optimizer), torch.arange(60).reshape(6, 10)

    def backward(words: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(words).sum().backward()

    for _ in range(2):
        backward(words)
        guarded()
    before = copy.deepcopy([model.weight.detach(), optimizer.state_dict()])
    step, copied = torch.optim.SGD.step, torch.Tensor.copy_

    def short(self: torch.optim.SGD) -> None:
        step(self)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.")

    def no_sparse_copy(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if self.is_sparse:  # which takes memory
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.")
        return copied(self, other)

    backward(words + 50)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", short)
        patch.setattr(torch.Tensor, "copy_", no_sparse_copy)
        with pytest.raises(StepDoesNotFitError):
            guarded()
    found = copy.deepcopy([model.weight.detach(), optimizer.state_dict()])
    for state in (before, found):
        buffer = state[1]["state"][0]["momentum_buffer"]
        state[1]["state"][0]["momentum_buffer"] = buffer.to_dense()
    assert_equal(found, before)
