"""After a prediction on fake tensors a task's own code finds none of them where it keeps things."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import ClassVar

import pytest
import torch
from plain_task import plain_task
from torch import nn

from bs_optuna.training.fake_leftovers import _cells
from bs_optuna.training.fake_leftovers import own_copy
from bs_optuna.training.limit import NoLimit
from bs_optuna.training.predicted_memory import PredictedMemory


CPU = torch.device("cpu")
MIB = 2**20


def made(count: int) -> torch.Tensor:
    return torch.arange(count).float()[:, None]


@functools.lru_cache
def in_cached_function(count: int) -> torch.Tensor:
    return made(count)


by_count: dict[int, torch.Tensor] = {}
by_kind: dict[str, OrderedDict[int, tuple[int, torch.Tensor]]] = {"positions": OrderedDict()}
seen: list[torch.Tensor] = []
largest: torch.Tensor | None = None


def in_dict(count: int) -> torch.Tensor:
    if count not in by_count:
        by_count[count] = made(count)
    return by_count[count]


def in_dict_of_dicts(count: int) -> torch.Tensor:
    cache = by_kind["positions"]
    if count not in cache:
        cache[count] = (count, made(count))
    return cache[count][1]


def in_list(count: int) -> torch.Tensor:
    for tensor in seen:
        if len(tensor) == count:
            return tensor
    seen.append(made(count))
    return seen[-1]


def in_global_name(count: int) -> torch.Tensor:
    global largest
    if largest is None or len(largest) < count:
        largest = made(count)
    return largest[:count]


@dataclass
class Record:
    tensor: torch.Tensor


@functools.lru_cache
def in_records(count: int) -> Record:
    return Record(made(count))


def by_closure() -> Callable[[int], torch.Tensor]:
    kept: dict[int, torch.Tensor] = {}

    def get(count: int) -> torch.Tensor:
        return kept.setdefault(count, made(count))

    return get


in_closure = by_closure()


class Cache:
    kept: ClassVar[dict[int, torch.Tensor]] = {}

    def __init__(self) -> None:
        self.own: dict[int, torch.Tensor] = {}
        self.cached = functools.lru_cache(8)(self.in_static_method)

    @staticmethod
    @functools.cache
    def in_static_method(count: int) -> torch.Tensor:
        return made(count)

    def in_class(self, count: int) -> torch.Tensor:
        return self.kept.setdefault(count, made(count))

    def in_object(self, count: int) -> torch.Tensor:
        return self.own.setdefault(count, made(count))


cache = Cache()


class Positioned(nn.Linear):
    def __init__(self, positions: Any) -> None:
        super().__init__(16, 10)
        self.positions = positions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.positions(len(x)))


def predict(**changes: Any) -> None:
    task = plain_task(**changes)
    memory = PredictedMemory(task, device=CPU, limit=NoLimit())
    found = memory.largest_fitting(8 * MIB, batch_size=256, most=256, measure=False)
    assert found.microbatch is not None


@pytest.mark.parametrize(
    "positions",
    [
        in_cached_function,
        in_dict,
        in_dict_of_dicts,
        in_list,
        in_global_name,
        Cache.in_static_method,
        cache.in_class,
        cache.in_object,
        cache.cached,
        lambda count: in_records(count).tensor,
        in_closure,
    ],
)
def test_no_fake_tensor_stays_in_a_cache(positions: Any) -> None:
    before = positions(7)
    predict(model=lambda: Positioned(positions))
    for count in (1, 2, 128, 256, 512):
        tensor = positions(count)
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, made(count))
    assert torch.equal(positions(7), before)


def test_what_is_real_stays_in_a_cache() -> None:
    before = in_dict(9)
    predict(model=lambda: Positioned(in_dict))
    assert by_count[9] is before


class KeepsAMean:
    """A loss that is no module and has a state."""

    def __init__(self) -> None:
        self.mean = torch.zeros(())

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(outputs, targets)
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss


def test_a_name_stands_for_what_it_did_before() -> None:
    global running
    predict(loss=with_running_mean)
    assert running == 3.0
    with_running_mean(torch.ones(2, 3), torch.tensor([0, 1]))
    before = running
    predict(loss=with_running_mean)
    assert running is before


running: float | torch.Tensor = 3.0


def with_running_mean(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    global running
    loss = nn.functional.cross_entropy(outputs, targets)
    running = 0.9 * running + 0.1 * loss.detach()
    return loss


features: list[torch.Tensor | None] = [None, None]
options: dict[str, torch.Tensor | None] = {"mask": None}
last: tuple[int, torch.Tensor] | None = None


class Hooked(nn.Linear):
    """Fills places that are there, as a forward hook does, and makes a mask that is missing."""

    def __init__(self) -> None:
        super().__init__(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global last
        if options["mask"] is None:
            options["mask"] = torch.ones(16)
        features[0] = x * options["mask"]
        features[1] = super().forward(features[0])
        last = (len(x), features[1])
        return features[1]


def test_places_that_were_there_are_there_again() -> None:
    predict(model=Hooked)
    assert features == [None, None]
    assert options == {"mask": None}
    assert last is None
    Hooked()(torch.zeros(3, 16))
    before = [*features, options["mask"], last]
    predict(model=Hooked)
    after = [*features, options["mask"], last]
    assert all(a is b or type(a) is torch.Tensor for a, b in zip(after, before, strict=True))
    assert options["mask"] is before[2]
    assert features[1] is before[1]
    assert last is before[3]


def test_what_the_tasks_functions_have_closed_over_is_as_before() -> None:
    mean: Any = None
    masks: dict[int, torch.Tensor] = {}

    def build() -> nn.Module:
        return Positioned(lambda count: masks.setdefault(count, made(count)))

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal mean
        mean = nn.functional.cross_entropy(outputs, targets)
        return mean

    predict(model=build, loss=loss)
    assert mean is None
    assert masks == {}
    assert unset() == []


def unset() -> list[Any]:
    """What is known of a function whose variable has no value yet."""

    def function() -> int:
        return later

    if function.__name__ == "other":
        later = 1
    return _cells(function)


def test_a_file_may_be_called_as_a_module_of_pythons_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "code" in sys.stdlib_module_names
    file = tmp_path / "code.py"
    file.write_text(
        "import torch\nkept = {}\n"
        "def positions(n):\n    return kept.setdefault(n, torch.arange(n).float()[:, None])\n"
    )
    spec = importlib.util.spec_from_file_location("code", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "code", module)
    predict(model=lambda: Positioned(module.positions))
    assert module.kept == {}


class Shy:
    """An object of a module that does not like to be looked at, as proxies do not."""

    @property
    def __dict__(self) -> dict[str, object]:  # type: ignore[override]
        raise RuntimeError("working outside of application context")


class Lazy:
    def __getattribute__(self, name: str) -> object:
        raise ImportError(f"{name} is loaded when it is needed, and cannot be")


shy, lazy = Shy(), Lazy()


def test_objects_that_do_anything_when_they_are_touched_are_not() -> None:
    predict(model=lambda: Positioned(in_dict))


class Criterion:
    """A loss by its method, which nothing in a module holds."""

    def __init__(self) -> None:
        self.mean = torch.zeros(())
        self.calls: list[torch.Tensor] = []

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(outputs, targets)
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        self.calls.append(loss.detach())
        return loss


def test_the_object_of_a_method_keeps_none() -> None:
    criterion = Criterion()
    before = criterion.mean
    predict(loss=criterion.loss)
    assert criterion.mean is before
    assert criterion.calls == []
    predict(metrics={"same": criterion.loss})
    assert criterion.mean is before


@pytest.mark.parametrize("where", ["loss", "metric"])
def test_a_loss_or_metric_that_keeps_a_tensor_is_copied(where: str) -> None:
    keeper = KeepsAMean()
    predict(**({"loss": keeper} if where == "loss" else {"metrics": {"mean": keeper}}))
    assert type(keeper.mean) is torch.Tensor
    assert keeper.mean.item() >= 0


def test_the_object_of_a_method_is_not_copied() -> None:
    class Holder:
        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs, targets)

    holder = Holder()
    assert own_copy(holder.loss, {}).__self__ is holder  # type: ignore[attr-defined]
