"""Buffers of every kind are put back when memory runs out; large ones that stay are not copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bs_optuna.training import AccumulatedBackward
from bs_optuna.training.buffer_copies import LARGE_BYTES
from bs_optuna.training.buffer_copies import BufferCopies


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
LARGE = LARGE_BYTES // 4


class Buffered(nn.Module):
    """Does something to its buffer in each forward pass."""

    def __init__(self, buffer: torch.Tensor, change: Callable[[Buffered], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("buffer", buffer)
        self.register_buffer("calls", torch.zeros(()))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.change(self)
        self.calls += 1
        return self.linear(x)


class Loss:
    """Runs out of memory in the given calls, after forward."""

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.calls = 0

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls in self.failing:
            raise FULL
        return nn.functional.mse_loss(outputs, targets)


BATCH = (torch.ones(8, 3), torch.zeros(8, 2))


def resize(model: Buffered) -> None:
    model.buffer.resize_(8).fill_(1.0)


def replace_data(model: Buffered) -> None:
    model.buffer.data = torch.ones(8)


def delete(model: Buffered) -> None:
    if hasattr(model, "buffer"):
        del model.buffer


def add(model: Buffered) -> None:
    model.buffer += 1


@pytest.mark.parametrize("change", [resize, replace_data, delete, add])
def test_whatever_forward_does_to_a_buffer_is_undone(change: Callable[[Buffered], None]) -> None:
    model = Buffered(torch.zeros(0 if change in (resize, replace_data) else 2), change)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    states: list[dict[str, torch.Tensor]] = []

    def watched(self: Buffered) -> None:
        states.append({name: buffer.clone() for name, buffer in self.named_buffers()})
        change(self)

    model.change = watched
    result = AccumulatedBackward(model, Loss(1))(*BATCH)
    assert result.sizes_tried == (8, 4)
    for state in states[:2]:  # the attempt that failed, and the one after it
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)


def test_a_table_in_a_file_that_is_mapped_for_reading_is_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.ones((1000, 3), np.float32))
    with pytest.warns(UserWarning, match="not writable"):
        table = torch.from_numpy(np.load(tmp_path / "table.npy", mmap_mode="r"))
    model = Buffered(table, lambda model: None)
    # Written to, it would end this process.
    assert AccumulatedBackward(model, Loss(1))(*BATCH).sizes_tried == (8, 4)


def test_a_buffer_made_in_inference_mode_is_put_back_in_it() -> None:
    with torch.inference_mode():
        buffer = torch.zeros(2)

    def change(model: Buffered) -> None:
        with torch.inference_mode():
            model.buffer += 1

    model = Buffered(buffer, change)
    AccumulatedBackward(model, Loss(2))(
        *BATCH,
    )
    assert buffer.tolist() == [1, 1]
    backward = AccumulatedBackward(model, Loss(1))
    backward(*BATCH)  # fails, then twice
    assert buffer.tolist() == [3, 3]


class Copied:
    """Which values of a buffer a pass has copied."""

    def __init__(self, model: Buffered, loss: Loss) -> None:
        self.model = model
        self.backward = AccumulatedBackward(model, loss)

    def buffer(self) -> bool:
        return (id(self.model), "buffer") in self.backward._buffers._copies


def test_a_large_buffer_that_a_pass_leaves_alone_is_not_copied_any_more() -> None:
    loss = Loss(1, 4)
    copied = Copied(Buffered(torch.zeros(LARGE), lambda model: None), loss)
    copied.backward(*BATCH)
    assert not copied.buffer()
    copied.backward(*BATCH)  # fails once more, with nothing to put back
    assert loss.calls == 8
    assert copied.model.calls == 6
    replaced = torch.zeros(LARGE)
    copied.model.buffer = replaced
    copied.backward(*BATCH)
    assert not copied.buffer()


@pytest.mark.parametrize("size", [2, LARGE])
def test_a_buffer_that_changes_is_copied_in_each_pass(size: int) -> None:
    loss = Loss(3)
    copied = Copied(Buffered(torch.zeros(size), add), loss)
    for _ in range(3):
        copied.backward(*BATCH)
        assert copied.buffer()
    assert copied.model.buffer.unique().tolist() == [4]  # 1, 1, and two halves


def test_a_large_buffer_that_changes_late_is_copied_from_then_on() -> None:
    loss = Loss(3)

    def change(model: Buffered) -> None:
        if loss.calls >= 1:
            add(model)

    copied = Copied(Buffered(torch.zeros(LARGE), change), loss)
    copied.backward(*BATCH)
    assert not copied.buffer()
    copied.backward(*BATCH)
    copied.backward(*BATCH)
    assert copied.buffer()
    assert copied.model.buffer.unique().tolist() == [3]


def test_a_large_buffer_that_changes_first_where_memory_runs_out_is_said_to_be_lost() -> None:
    loss = Loss(2)

    def change(model: Buffered) -> None:
        if loss.calls == 1:
            add(model)

    copied = Copied(Buffered(torch.zeros(LARGE), change), loss)
    copied.backward(*BATCH)
    calls = copied.model.calls.clone()
    with pytest.raises(RuntimeError, match="'buffer' of a Buffered changed for the first time"):
        copied.backward(*BATCH)
    assert torch.equal(copied.model.calls, calls)  # the others are back
    copied.model.linear.zero_grad()


def test_copies_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Buffered(torch.zeros(2), add)
    backward = AccumulatedBackward(model, Loss())

    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(backward._buffers, "save", full)
    with pytest.raises(MemoryError, match="for copies of the buffers"):
        backward(*BATCH)


def test_of_several_ranks_all_buffers_are_always_copied() -> None:
    model = Buffered(torch.zeros(LARGE), lambda model: None)
    for all_copied in (False, True):
        copies = BufferCopies([model], all_copied=all_copied)
        copies.settle(copies.save())
        assert [saved.copy is not None for saved in copies.save()] == [all_copied, True]


def test_a_buffer_that_changes_now_and_then_is_copied_in_each_pass() -> None:
    changes = iter([True, False])
    copied = Copied(
        Buffered(torch.zeros(LARGE), lambda model: add(model) if next(changes) else None), Loss()
    )
    for _ in range(2):
        copied.backward(*BATCH)
        assert copied.buffer()


def test_a_large_buffer_of_inference_mode_is_always_copied() -> None:
    with torch.inference_mode():
        buffer = torch.zeros(LARGE)
    copied = Copied(Buffered(buffer, lambda model: None), Loss())
    copied.backward(*BATCH)
    assert copied.buffer()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("instead", [None, nn.Parameter(torch.zeros(2)), "a word"])
def test_a_buffer_that_is_deleted_is_a_buffer_again(instead: object, persistent: bool) -> None:
    loss = Loss(1)

    def change(model: Buffered) -> None:
        if loss.calls == 0:
            del model.buffer
            if instead is not None:
                model.buffer = instead  # type: ignore[assignment]

    model = Buffered(torch.zeros(1), change)
    model.register_buffer("buffer", torch.ones(2), persistent=persistent)
    keys = set(model.state_dict())
    assert AccumulatedBackward(model, loss)(*BATCH).sizes_tried == (8, 4)
    assert model._buffers["buffer"].tolist() == [1, 1]
    assert set(model.state_dict()) == keys
    assert ("buffer" in keys) == persistent
