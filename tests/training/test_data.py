"""The stream of batches leaves nothing out, and tasks refuse what they cannot use."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset
from torch.utils.data import IterableDataset
from torch.utils.data import TensorDataset

from bs_optuna.errors import TaskError
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import TrainingTask
from bs_optuna.training.batches import moved
from bs_optuna.training.data import evaluation_batches
from bs_optuna.training.data import training_batches


class Squares(Dataset[Any]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), index


class Stream(IterableDataset[Any]):
    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Any]:
        return iter(Squares(8))


def pair(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(samples).float().unsqueeze(1), torch.arange(samples)


@settings(deadline=None, max_examples=50)
@given(samples=st.integers(1, 50), batch_size=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_pass_holds_every_sample_once(samples: int, batch_size: int, seed: int) -> None:
    batches = training_batches(pair(samples), batch_size=batch_size, seed=seed)
    count = -(-3 * samples // batch_size)
    stream = torch.cat([targets for _, targets in islice(batches, count)])
    for k in range(3):
        one_pass = stream[k * samples : (k + 1) * samples]
        assert sorted(one_pass.tolist()) == list(range(samples))


@settings(deadline=None, max_examples=20)
@given(samples=st.integers(1, 30), batch_size=st.integers(1, 30))
def test_a_data_set_gives_the_same_batches_as_its_tensors(samples: int, batch_size: int) -> None:
    for a, b in zip(
        islice(training_batches(pair(samples), batch_size=batch_size, seed=0), 4),
        islice(training_batches(Squares(samples), batch_size=batch_size, seed=0), 4),
        strict=True,
    ):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    found = [targets for _, targets in evaluation_batches(Squares(samples), batch_size=batch_size)]
    assert torch.cat(found).tolist() == list(range(samples))


def make_task(**changes: Any) -> TrainingTask:
    arguments: dict[str, Any] = {
        "model": lambda: nn.Linear(1, 1),
        "train_data": pair(8),
        "valid_data": TensorDataset(*pair(4)),
        "loss": nn.functional.mse_loss,
    }
    return TrainingTask(**{**arguments, **changes})


def test_a_tensor_data_set_is_taken_as_its_tensors() -> None:
    assert isinstance(make_task().valid_data, tuple)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": [1, 2, 3]}, "train_data is a list; must be a pair"),
        ({"valid_data": (torch.zeros(2), torch.zeros(3))}, r"valid_data: .*\[2, 3\] samples"),
        ({"test_data": iter(())}, "test_data is a tuple_iterator"),
        ({"valid_data": Squares(0)}, "valid_data holds no samples"),
        ({"train_data": Stream()}, "train_data is an IterableDataset, Stream; must give sample i"),
        ({"model": nn.Linear(1, 1)}, r"model is a Linear; must be .* model=lambda: Net\(\)\."),
        ({"model": None}, "model is a NoneType; must be a function"),
        ({"optimizer": "adam"}, "optimizer='adam'; must be one of adamw, sgd"),
        ({"objective": "accuracy"}, "objective='accuracy'; must be one of loss"),
        ({"metrics": {"loss": nn.functional.l1_loss}}, "metrics holds 'loss', which stands for"),
        ({"batch_norm": "whole"}, "batch_norm='whole'; must be 'microbatch' or 'exact'"),
        ({"direction": "up"}, "direction='up'; must be 'minimize' or 'maximize'"),
    ],
)
def test_a_task_refuses_what_it_cannot_use(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make_task(**changes)


class Ragged(Squares):
    """Samples of different shapes."""

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(index + 1), index


def test_samples_of_different_shapes_are_refused_by_their_shapes() -> None:
    with pytest.raises(TaskError, match=r"shapes \(1,\) and \(4,\) in the same place, .* pad them"):
        next(evaluation_batches(Ragged(4), batch_size=4))


def test_a_data_set_of_something_else_than_pairs_is_refused() -> None:
    with pytest.raises(TaskError, match="must yield pairs"):
        next(evaluation_batches(TensorDataset(torch.zeros(4, 1)), batch_size=2))


class Encoding(UserDict[str, torch.Tensor]):
    """What a tokenizer returns: a mapping that is no dict."""


class Encoded(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Encoding, int]:
        return Encoding(ids=torch.tensor([index, 2 * index])), index


@pytest.mark.parametrize("whole", [False, True])
def test_mappings_of_other_kinds_are_taken_for_dicts(whole: bool) -> None:
    data: Any = Encoded()
    if whole:
        data = (Encoding(ids=torch.arange(6)[:, None] * torch.tensor([1, 2])), torch.arange(6))
    task = TrainingTask(
        model=lambda: nn.Linear(1, 1), train_data=data, valid_data=data, loss=lambda o, t: o.mean()
    )
    (inputs, targets), _ = evaluation_batches(task.valid_data, batch_size=4)
    assert inputs["ids"].tolist() == [[0, 0], [1, 2], [2, 4], [3, 6]]
    assert targets.tolist() == [0, 1, 2, 3]


def test_a_mapping_of_another_kind_is_a_batch() -> None:
    class Net(nn.Linear):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(ids)

    inputs = Encoding(ids=torch.ones(4, 1))
    backward = AccumulatedBackward(Net(1, 1), nn.functional.mse_loss, microbatch_size=3)
    assert backward(inputs, torch.ones(4, 1)).accumulation_steps == 2


def test_what_somebody_has_placed_stays_where_it_is() -> None:
    here, there = torch.device("cpu"), torch.device("meta")  # a device that every machine has
    lengths, words = torch.ones(2), torch.ones(2, device=there)
    inputs, targets = moved(((words, lengths), lengths), there)
    assert [t.device for t in inputs] == [there, here]
    assert targets.device == there
    inputs, targets = moved(((lengths, lengths), words), there)
    assert [t.device for t in (*inputs, targets)] == [there] * 3
