"""The gradient of the whole batch, for any split, and without a trace of attempts that failed."""

from __future__ import annotations

import copy
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from comparing import assert_equal
from comparing import random_states
from comparing import seed_all
from failing import FailingAt
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.science.regrowth import MicrobatchLimit
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training.pass_attempt import Attempt
from bs_optuna.training.pass_attempt import Outcome
from bs_optuna.training.snapshot import StepSnapshot


# Splitting it is what is tested here; what it does to BatchNorm, test_normalization.py tells.
pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm normalizes:UserWarning")

IGNORED = -100


def mlp() -> nn.Module:
    seed_all(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@settings(deadline=None, max_examples=60)
@given(batch_size=st.integers(1, 60), microbatch_size=st.integers(1, 60))
def test_any_split_gives_the_gradient_and_loss_of_the_whole_batch(
    batch_size: int, microbatch_size: int
) -> None:
    model = mlp()
    inputs = torch.randn(batch_size, 5, dtype=torch.float64)
    targets = torch.randint(3, (batch_size,))
    loss = nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    expected = gradients(model)

    model.zero_grad()
    result = AccumulatedBackward(
        model, nn.functional.cross_entropy, microbatch_size=microbatch_size
    )(inputs, targets)

    assert_close(gradients(model), expected)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert result.batch_size == batch_size
    assert result.microbatch_size <= microbatch_size
    assert result.sizes_tried == (result.microbatch_size,)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any),
    microbatch_size=st.integers(1, 20),
)
def test_tokens_are_weighted_by_their_number(lengths: list[int], microbatch_size: int) -> None:
    model = mlp()
    inputs = torch.randn(len(lengths), 9, 5, dtype=torch.float64)
    targets = torch.full((len(lengths), 9), IGNORED)
    for row, length in enumerate(lengths):
        targets[row, :length] = torch.randint(3, (length,))

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    loss_fn(model(inputs), targets).backward()
    expected = gradients(model)
    model.zero_grad()
    backward = AccumulatedBackward(
        model,
        loss_fn,
        microbatch_size=microbatch_size,
        count=lambda inputs, targets: (targets != IGNORED).sum(),
    )
    backward(inputs, targets)
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("microbatch_size", [1, 3, 10])
def test_a_sum_needs_no_weights(microbatch_size: int) -> None:
    model = mlp()
    inputs = torch.randn(10, 5, dtype=torch.float64)
    targets = torch.randint(3, (10,))

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="sum")

    loss_fn(model(inputs), targets).backward()
    expected = gradients(model)
    model.zero_grad()
    AccumulatedBackward(model, loss_fn, microbatch_size=microbatch_size, reduction="sum")(
        inputs, targets
    )
    assert_close(gradients(model), expected)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: torch.Tensor, extra: dict[str, list[torch.Tensor]]) -> Any:
        return {"logits": self.net(x) + extra["bias"][0]}


def test_inputs_and_targets_may_be_nested() -> None:
    model = Keywords()
    inputs = {
        "x": torch.randn(7, 5, dtype=torch.float64),
        "extra": {"bias": [torch.randn(7, 3, dtype=torch.float64)]},
    }
    targets = (torch.randint(3, (7,)), torch.rand(7, dtype=torch.float64))

    def loss_fn(outputs: Any, targets: Any) -> torch.Tensor:
        losses = nn.functional.cross_entropy(outputs["logits"], targets[0], reduction="none")
        return (losses * targets[1]).mean()

    loss_fn(model(**inputs), targets).backward()
    expected = gradients(model)
    model.zero_grad()
    AccumulatedBackward(model, loss_fn, microbatch_size=2)(inputs, targets)
    assert_close(gradients(model), expected)


def test_gradients_that_were_there_are_added_to() -> None:
    model = mlp()
    inputs, targets = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
    backward = AccumulatedBackward(model, nn.functional.cross_entropy, microbatch_size=3)
    backward(inputs, targets)
    once = gradients(model)
    backward(inputs, targets)
    assert_close(gradients(model), [2 * g for g in once])


def test_a_loss_with_parameters_gets_its_gradient_too() -> None:
    model, inputs = mlp(), torch.randn(6, 5, dtype=torch.float64)

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return ((outputs - targets) ** 2 * self.weight).mean()

    loss_fn, targets = Weighted(), torch.randn(6, 3, dtype=torch.float64)
    with FailingAt(12) as device:
        AccumulatedBackward(model, loss_fn)(inputs, targets)
    assert device.failures == 1
    found = gradients(loss_fn)
    loss_fn.zero_grad()
    loss_fn(model(inputs), targets).backward()
    assert_close(found, gradients(loss_fn))


def test_scaled_gradients_unscale_to_the_plain_ones() -> None:
    model = mlp().float()
    inputs, targets = torch.randn(9, 5), torch.randint(3, (9,))
    AccumulatedBackward(model, nn.functional.cross_entropy, microbatch_size=4)(inputs, targets)
    expected = gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward = AccumulatedBackward(
        model, nn.functional.cross_entropy, microbatch_size=4, scaler=scaler
    )
    loss = backward(inputs, targets).loss
    assert loss < 10  # not scaled
    scaled = gradients(model)
    scaler.unscale_(optimizer)
    for a, b, c in zip(gradients(model), expected, scaled, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, 1024 * b)


def test_autocast_runs_model_and_loss_in_the_given_type() -> None:
    seen = []
    model = mlp().float()

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, targets)

    backward = AccumulatedBackward(model, loss_fn, autocast_dtype=torch.bfloat16)
    backward(torch.randn(4, 5), torch.randint(3, (4,)))
    assert seen == [torch.bfloat16]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


# --- out of memory ---------------------------------------------------------------------------


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
    assert len(backward._buffer_copies) == 2  # kept from step to step, not one for each


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


def test_of_several_ranks_too_one_tells_the_others_of_what_joined_late() -> None:
    model = nn.Linear(2, 3)
    before = StepSnapshot(
        [model], [*model.parameters()], images(), buffer_copies={}, device_types=(), foreign=False
    )
    model.late = nn.BatchNorm1d(3)
    attempt = Attempt(plan=AccumulationPlan(4, 4), before=before)
    attempt.judge(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB."))
    assert "module 'late' joined" in str(attempt.error)
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


@pytest.mark.parametrize(
    ("inputs", "targets", "error", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(4), ValueError, r"hold \[3, 4\] samples"),
        (torch.zeros(0, 5), torch.zeros(0), ValueError, r"at least 1"),
        (["a", "b"], None, TypeError, "'a'; every leaf must be a tensor"),
        (torch.tensor(1.0), None, TypeError, "a tensor without dimensions"),
    ],
)
def test_what_cannot_be_split_is_refused(
    inputs: Any, targets: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AccumulatedBackward(mlp(), nn.functional.cross_entropy)(inputs, targets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"microbatch_size": 0}, "microbatch_size=0; must be at least 1"),
        ({"reduction": "max"}, "reduction='max'; must be 'mean' or 'sum'"),
        ({"regrow_after": 0}, "regrow_after=0; must be at least 1, or None for never"),
        ({"reduction": "sum", "count": lambda i, t: 1}, "a sum needs no weights"),
        ({"smaller": min, "process_group": object()}, "smaller and process_group; give one"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccumulatedBackward(mlp(), nn.functional.cross_entropy, **arguments)
