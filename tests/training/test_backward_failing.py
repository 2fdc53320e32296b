"""A microbatch that fails leaves no trace: the step goes on with a smaller one, or not at all."""

from __future__ import annotations

import copy
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from comparing import assert_equal
from comparing import gradients
from comparing import random_states
from comparing import seed_all
from failing import FailingAt
from torch import nn

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.science.regrowth import MicrobatchLimit
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training.buffer_copies import BufferCopies
from bs_optuna.training.pass_attempt import Outcome
from bs_optuna.training.pass_attempt import PassAttempt
from bs_optuna.training.snapshot import StepSnapshot


# Splitting it is what is tested here; what it does to BatchNorm, test_normalization.py tells.
pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm normalizes:UserWarning")


def network() -> nn.Module:
    seed_all(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )  # fmt: skip


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 1, 8, 8, generator=generator), torch.randint(
        3, (12,), generator=generator
    )


def state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    grads = [p.grad for p in model.parameters()]
    optimizer_state = [] if optimizer is None else list(optimizer.state.values())
    return copy.deepcopy([
        model.state_dict(), grads, optimizer_state, random_states()
    ])  # fmt: skip


def two_steps(microbatch_size: int | None, fail_at: int | None) -> tuple[list[Any], FailingAt]:
    model, batch = network(), images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    backward = AccumulatedBackward(
        model, nn.functional.cross_entropy, microbatch_size=microbatch_size or "auto"
    )
    seed_all(2)
    device = FailingAt(fail_at)
    for _ in range(2):
        optimizer.zero_grad()
        with device:
            backward(*batch)
        device.marks.append(device.operations)
        optimizer.step()
    return state(model, optimizer), device


def test_failing_at_any_operation_of_two_steps_changes_no_bit() -> None:
    _, device = two_steps(None, None)
    first = device.marks[0]
    clean = two_steps(6, None)[0]
    mixed = None
    for position in range(device.operations):
        found, failing = two_steps(None, position)
        assert failing.failures == 1
        if position < first:
            assert_equal(found, clean)
        else:  # a whole first step and a second in halves: these are alike among themselves
            mixed = mixed or found
            assert_equal(found, mixed)


def test_the_mixed_run_equals_one_that_was_told_to_halve() -> None:
    _, device = two_steps(None, None)
    found, _ = two_steps(None, device.operations - 1)
    model, batch = network(), images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seed_all(2)
    for microbatch_size in (12, 6):
        optimizer.zero_grad()
        AccumulatedBackward(model, nn.functional.cross_entropy, microbatch_size=microbatch_size)(
            *batch
        )
        optimizer.step()
    assert_equal(found, state(model, optimizer))


class Hungry(nn.Module):
    """Runs out of memory above a microbatch size, after it has moved every state it can."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.net = network()
        self.fits = fits
        self.seen: list[int] = []
        self.register_buffer("calls", torch.zeros(()))
        self.alive: list[weakref.ref[torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        assert all(reference() is None for reference in self.alive), "a failed attempt is alive"
        outputs: torch.Tensor = self.net(x)
        self.calls = self.calls + 1  # another tensor, as a careless module does it
        random.random()
        np.random.rand()
        if len(x) > self.fits:
            self.alive.append(weakref.ref(outputs))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return outputs


def test_buffers_that_are_replaced_or_made_leave_nothing_behind() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1)
            self.register_buffer("average", torch.zeros(()))
            self.register_buffer("scale", None)
            self.fail = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.net(x)
            self.average = 0.9 * self.average + 0.1 * y.detach().mean()
            if self.scale is None:
                self.scale = y.detach().abs().mean()
            if self.fail:
                self.fail = False
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.")
            return y / self.scale

    model, x = Moving(), torch.randn(6, 4)
    backward = AccumulatedBackward(model, lambda outputs, targets: (outputs**2).mean())
    backward(x)
    with torch.no_grad():
        assert torch.equal(model.scale, model.net(x[:3]).abs().mean())
    kept = [backward(x).loss for _ in range(20)]
    assert len(kept) == 20
    assert len(backward._buffers._copies) == 2  # kept from step to step, not one for each


def test_parameters_that_join_later_are_named_when_a_step_is_undone() -> None:
    model = Hungry(fits=3)
    backward = AccumulatedBackward(model, nn.functional.cross_entropy)
    model.late = nn.Parameter(torch.ones(3))
    model.late.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="parameter 'late' joined the model after"):
        backward(*images())
    AccumulatedBackward(model, nn.functional.cross_entropy)(*images())
    assert torch.equal(model.late.grad, torch.ones(3))


def test_modules_that_join_later_are_named_when_a_step_is_undone() -> None:
    model = Hungry(fits=3)
    backward = AccumulatedBackward(model, nn.functional.cross_entropy)
    model.late = nn.Identity()
    backward(*(t[:3] for t in images()))  # nothing to undo, and then nothing that was missed
    backward(*images())
    backward = AccumulatedBackward(model, nn.functional.cross_entropy)
    model.later = nn.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match="module 'later' joined the model after"):
        backward(*images())


def snapshot_of(model: nn.Module) -> StepSnapshot:
    return StepSnapshot(
        [model],
        [*model.parameters()],
        images(),
        buffers=BufferCopies([model]),
        device_types=(),
        foreign=False,
    )


def test_of_several_ranks_too_one_tells_the_others_of_what_joined_late() -> None:
    model = nn.Linear(2, 3)
    before = snapshot_of(model)
    model.late = nn.BatchNorm1d(3)
    attempt = PassAttempt(plan=AccumulationPlan(4, 4), before=before)
    attempt.judge(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB."))
    assert "module 'late' joined" in str(attempt.error)
    assert attempt.report(MicrobatchLimit(4, regrow_after=None)).outcome == Outcome.ERROR


def test_of_several_ranks_one_tells_the_others_of_what_cannot_be_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(2, 3)
    before = snapshot_of(model)

    def lost() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(before, "restore", lost)
    attempt = PassAttempt(plan=AccumulationPlan(4, 4), before=before)
    attempt.judge(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB."))
    assert "device-side assert" in str(attempt.error)
    attempt = PassAttempt(plan=AccumulationPlan(4, 4), before=before)
    attempt.judge(IndexError("mine"))
    assert isinstance(attempt.error, IndexError)
    assert attempt.report(MicrobatchLimit(4, regrow_after=None)).outcome == Outcome.ERROR


def test_backing_off_halves_until_it_fits_and_stays_there() -> None:
    model = Hungry(fits=3)
    backward = AccumulatedBackward(model, nn.functional.cross_entropy)
    result = backward(*images())
    assert model.seen == [12, 6, 3, 3, 3, 3]
    assert (result.sizes_tried, result.backoffs) == ((12, 6, 3), 2)
    assert result.accumulation_steps == 4
    assert model.calls == 4
    backward(*images())
    assert model.seen[6:] == [3, 3, 3, 3]
    assert backward.microbatch_size == 3


def test_it_grows_back_to_where_it_started_when_the_spike_has_passed() -> None:
    model = Hungry(fits=3)
    backward = AccumulatedBackward(
        model, nn.functional.cross_entropy, microbatch_size=8, regrow_after=2
    )
    assert backward(*images()).sizes_tried == (6, 3)
    assert [backward(*images()).sizes_tried for _ in range(3)] == [(3,), (6, 3), (3,)]
    model.fits = 100
    assert [backward(*images()).sizes_tried for _ in range(9)] == [(3,)] * 2 + [(6,)] * 7


def test_it_stays_small_where_it_was_told_to() -> None:
    model = Hungry(fits=3)
    backward = AccumulatedBackward(model, nn.functional.cross_entropy, regrow_after=None)
    backward(*images())
    model.fits = 100
    assert {backward(*images()).microbatch_size for _ in range(100)} == {3}


def test_the_next_size_can_be_chosen_and_is_less_than_what_failed() -> None:
    asked: list[tuple[int, int]] = []

    def smaller(failed: int, half: int) -> int:
        asked.append((failed, half))
        return {6: 2, 1: 100}.get(half, half)

    chosen, told = Hungry(fits=3), Hungry(fits=3)
    told.load_state_dict(chosen.state_dict())
    backward = AccumulatedBackward(chosen, nn.functional.cross_entropy, smaller=smaller)
    torch.manual_seed(0)
    assert backward(*images()).sizes_tried == (12, 2)
    assert backward(*images()).sizes_tried == (2,)
    assert asked == [(12, 6)]
    torch.manual_seed(0)
    small = AccumulatedBackward(told, nn.functional.cross_entropy, microbatch_size=2)
    small(*images())
    small(*images())
    assert_equal(gradients(chosen), gradients(told))
    chosen.fits = 1
    assert backward(*images()).sizes_tried == (2, 1)  # more than half is not listened to
    assert asked[1:] == [(2, 1)]


def test_an_error_while_the_next_size_is_chosen_leaves_no_trace() -> None:
    def smaller(failed: int, half: int) -> int:
        raise ConnectionError

    model = Hungry(fits=3)
    before = state(model)
    with pytest.raises(ConnectionError):
        AccumulatedBackward(model, nn.functional.cross_entropy, smaller=smaller)(*images())
    assert_equal(state(model), before)


def test_one_sample_that_does_not_fit_is_an_error_that_leaves_no_trace() -> None:
    model = Hungry(fits=0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = state(model)
    with pytest.raises(
        MicrobatchDoesNotFitError, match=r"microbatch_size=1, .*12, 6, 3, 1"
    ) as info:
        AccumulatedBackward(model, nn.functional.cross_entropy)(*images())
    assert_equal(state(model), before)
    assert info.value.sizes_tried == (12, 6, 3, 1)
    assert info.value.bytes_requested == 20 * 2**20


def test_an_error_of_the_users_own_passes_and_leaves_no_trace() -> None:
    model = network()
    before = state(model)

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        AccumulatedBackward(model, loss_fn)(*images())
    assert_equal(state(model), before)


def test_an_error_of_the_users_own_passes_where_a_lost_device_cannot_be_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(self: StepSnapshot) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise IndexError("target 10 of 10 classes")

    monkeypatch.setattr(StepSnapshot, "restore", lost)
    with pytest.raises(IndexError, match="target 10") as raised:
        AccumulatedBackward(network(), loss)(*images())
    assert "not all put back: CUDA error: device-side assert" in raised.value.__notes__[0]


def test_a_last_single_sample_that_meets_a_passing_spike_is_tried_again() -> None:
    calls = 0

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return nn.functional.cross_entropy(outputs, targets)

    inputs, targets = images()
    backward = AccumulatedBackward(network(), loss_fn, microbatch_size=2)
    assert backward(inputs[:3], targets[:3]).sizes_tried == (2, 1)
