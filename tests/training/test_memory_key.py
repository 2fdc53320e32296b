"""What the knowledge about fitting microbatches is kept under."""

from __future__ import annotations

import itertools
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from bs_optuna.training import TrainingTask
from bs_optuna.training.memory_key import memory_key
from bs_optuna.training.recipes import OptimizerFactory
from bs_optuna.training.weighted_pass import LossFunction


class Classes(nn.Module):
    """A loss with a weight for each class."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.head = nn.Linear(4, count)

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(outputs), targets)


class Repeated(nn.Module):
    """One layer, run so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(3, 3), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.layer(x)
        return x


class Twice(Repeated):
    """The same parameters, and other code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x))


def key(
    loss: LossFunction = nn.functional.cross_entropy,
    *,
    model: Callable[[], nn.Module] = lambda: nn.Linear(3, 4),
    optimizer: str | OptimizerFactory = "adamw",
) -> str:
    data = (torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))
    task = TrainingTask(
        model=model, train_data=data, valid_data=data, loss=loss, optimizer=optimizer
    )
    return memory_key(task, device=torch.device("cpu"), limit_bytes=None)


def test_a_loss_with_more_weights_inherits_nothing_from_one_with_fewer() -> None:
    assert key(Classes(10)) == key(Classes(10))
    assert key(Classes(10)) != key(Classes(65536))


def test_a_layer_that_runs_a_hundred_times_inherits_nothing_from_one_that_runs_once() -> None:
    assert key(model=lambda: Repeated(1)) == key(model=lambda: Repeated(1))
    assert key(model=lambda: Repeated(1)) != key(model=lambda: Repeated(100))
    assert key(model=lambda: Repeated(1)) != key(model=lambda: Twice(1))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(torch.optim.SGD, momentum=0.9), partial(torch.optim.AdamW, amsgrad=True)),
        (lambda p, lr: torch.optim.SGD(p, lr), lambda p, lr: torch.optim.Adam(p, lr)),
        (lambda p, lr: torch.optim.SGD(p, lr), lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)),
        ("sgd", "adamw"),
    ],
)
def test_optimizers_without_a_name_of_their_own_are_told_apart(
    one: str | OptimizerFactory, other: str | OptimizerFactory
) -> None:
    assert key(optimizer=one) == key(optimizer=one)
    assert key(optimizer=one) != key(optimizer=other)


class Odd(nn.Module):
    """Holds what differs from model to model, and from device to device."""

    made = itertools.count()

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.layer, self.number, self.name = nn.Linear(3, 4), next(self.made), uuid.uuid4().hex
        self.device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(x)
        return outputs


@pytest.mark.parametrize(
    "model",
    [
        Odd,
        lambda: torch.compile(nn.Linear(3, 4)),
        lambda: torch.jit.script(nn.Linear(3, 4)),
        lambda: nn.Sequential(torch.jit.trace(nn.Linear(3, 4), torch.ones(1, 3))),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_new_in_each_model_makes_no_new_key(model: Callable[[], nn.Module]) -> None:
    assert key(model=model) == key(model=model)


def test_equal_devices_have_the_same_key() -> None:
    assert key(model=lambda: Odd("cuda:0")) == key(model=lambda: Odd("cuda:1"))


@dataclass
class Config:
    """Settings of a model in a record."""

    depth: int


def holding(setting: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Linear(3, 4)
        model.setting = setting  # type: ignore[assignment]
        return model

    return make


@pytest.mark.parametrize(
    ("one", "other"), [((1, 1), (4, 4)), (2.0, 16.0), ([2, 6], [2, 7]), (Config(1), Config(9))]
)
def test_settings_of_every_plain_kind_count(one: object, other: object) -> None:
    assert key(model=holding(one)) == key(model=holding(one))
    assert key(model=holding(one)) != key(model=holding(other))


def test_what_a_loss_function_closes_over_counts() -> None:
    def loss(times: int) -> LossFunction:
        return lambda outputs, targets: (outputs * times).mean()

    assert key(loss(1)) == key(loss(1))
    assert key(loss(1)) != key(loss(2))


def test_what_a_setting_of_the_optimizer_is_does_not_matter_if_its_states_are_as_many() -> None:
    one, other = (partial(torch.optim.SGD, momentum=m) for m in (0.9, 0.99))
    assert key(optimizer=one) == key(optimizer=other)


def test_workers_in_other_processes_have_the_same_key(tmp_path: Path) -> None:
    """Python's own hashes and the addresses of objects differ from process to process."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from bs_optuna.tasks import digits\n"
        "from bs_optuna.training.memory_key import memory_key\n"
        "print(memory_key(digits.task(), device=torch.device('cpu'), limit_bytes=None))\n",
        encoding="utf-8",
    )
    found = {subprocess.check_output([sys.executable, script], text=True) for _ in range(2)}
    assert len(found) == 1


DEPTH = 1
calls = 0


class Deep(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global calls
        calls += 1
        for _ in range(DEPTH):
            x = super().forward(x)
        return x


def test_a_constant_of_the_module_counts_and_a_counter_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = key(model=lambda: Deep(3, 3))
    monkeypatch.setitem(globals(), "calls", 7)
    assert key(model=lambda: Deep(3, 3)) == before
    monkeypatch.setitem(globals(), "DEPTH", 20)
    assert key(model=lambda: Deep(3, 3)) != before
