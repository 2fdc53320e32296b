"""A budget of elements: the gradient of the whole batch, the worst microbatch first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from tagger import PADDING
from tagger import Tagger
from tagger import count
from tagger import gradient
from tagger import lengths_of
from tagger import loss_fn
from tagger import texts
from tagger import trim
from torch import nn

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.training import AccumulatedBackward


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=20)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, tokens=st.integers(1, 200), told=st.booleans(), trims=st.booleans())
def test_any_budget_gives_the_gradient_of_the_whole_batch(
    lengths: list[int], tokens: int, told: bool, trims: bool
) -> None:
    batch = texts(lengths)
    model = Tagger().double()
    loss = loss_fn(model(batch[0]), batch[1])
    loss.backward()
    expected = gradient(model)
    model.zero_grad()
    model.seen.clear()
    backward = AccumulatedBackward(
        model,
        loss_fn,
        count=count,
        microbatch_tokens=tokens,
        lengths=lengths_of if told else None,
        trim=trim if trims else None,
    )
    result = backward(*batch)
    assert (gradient(model) - expected).norm() <= 1e-12 * expected.norm()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert result.accumulation_steps == len(model.seen)
    assert result.microbatch_size == max(samples for samples, _ in model.seen)
    if trims:
        elements = [samples * longest for samples, longest in model.seen]
        assert elements[0] == max(elements) == result.sizes_tried[-1]
        assert all(
            n <= tokens or seen[0] == 1 for n, seen in zip(elements, model.seen, strict=True)
        )


def test_a_sum_needs_lengths_and_no_count() -> None:
    batch, model = texts([3, 1, 7]), Tagger().double()
    sum_loss = lambda outputs, targets: (outputs.sum(-1) * (targets != PADDING)).sum()  # noqa: E731
    sum_loss(model(batch[0]), batch[1]).backward()
    expected = gradient(model)
    model.zero_grad()
    AccumulatedBackward(
        model, sum_loss, reduction="sum", microbatch_tokens=7, lengths=lengths_of, trim=trim
    )(*batch)
    assert (gradient(model) - expected).norm() <= 1e-12 * expected.norm()


def make_backward(model: nn.Module, **changes: Any) -> AccumulatedBackward:
    arguments: dict[str, Any] = {
        "count": count, "microbatch_tokens": 64, "lengths": lengths_of, "trim": trim,
    }  # fmt: skip
    return AccumulatedBackward(model, loss_fn, **{**arguments, **changes})


def test_the_worst_microbatch_fails_first_and_the_budget_is_halved_and_grows_back() -> None:
    batch = texts([2, 12, 3, 2, 11, 1, 2])
    model = Tagger(fits=20)
    backward = make_backward(model, regrow_after=2)
    result = backward(*batch)
    assert model.seen == [(5, 12), (2, 12), (1, 12), (4, 3), (1, 11), (1, 1)]
    assert result.sizes_tried == (60, 24, 12)
    assert (backward.microbatch_tokens, backward.microbatch_size) == (12, None)
    expected = gradient(model)
    model.zero_grad()
    make_backward(model, microbatch_tokens=12)(*batch)
    assert torch.equal(gradient(model), expected)
    model.fits = 100  # 24 elements make two microbatches, and so would the budget of 64
    assert [backward(*batch).sizes_tried for _ in range(4)] == [(12,)] + [(24,)] * 3


def test_a_sample_that_does_not_fit_alone_is_an_error_that_names_the_budget() -> None:
    model = Tagger(fits=11)
    with pytest.raises(MicrobatchDoesNotFitError, match="with microbatch_tokens=12,"):
        make_backward(model)(*texts([2, 12, 3]))
    assert all(p.grad is None for p in model.parameters())


def test_what_fails_alone_is_not_tried_again_with_smaller_microbatches_of_the_others() -> None:
    model = Tagger(fits=11)
    with pytest.raises(MicrobatchDoesNotFitError) as caught:
        make_backward(model)(*texts([12, *[1] * 64]))
    assert model.seen == [(5, 12), (30, 1), (15, 1), (1, 12)]
    assert list(caught.value.sizes_tried) == [60, 30, 15, 12]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"microbatch_tokens": 0}, "microbatch_tokens=0; must be at least 1"),
        ({"microbatch_size": 4}, "microbatch_size=4 and microbatch_tokens=64; give one of them"),
        ({"microbatch_tokens": None}, "lengths and trim are for a budget only"),
        ({"lengths": None, "count": None}, "microbatch_tokens=64; needs lengths, or count"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_backward(Tagger(), **changes)


def test_lengths_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths gave 2 numbers for 3 samples; must be one of"):
        make_backward(Tagger(), lengths=lambda inputs, targets: [1, 2])(*texts([2, 12, 3]))


def test_inputs_that_require_grad_get_it_from_each_microbatch() -> None:
    torch.manual_seed(0)
    model, targets = nn.Linear(3, 2).double(), torch.tensor([0, 1, 1, 0])
    found = []
    for budget in (64, 8):
        inputs = torch.ones(4, 3, dtype=torch.double, requires_grad=True)
        backward = AccumulatedBackward(
            model,
            nn.functional.cross_entropy,
            microbatch_tokens=budget,
            lengths=lambda inputs, targets: [4, 2, 3, 1],
        )
        assert backward(inputs, targets).accumulation_steps == (1 if budget == 64 else 2)
        found.append(inputs.grad)
    assert found[0] is not None
    torch.testing.assert_close(found[0], found[1])


def test_trim_may_add_what_has_no_samples() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (mask @ self.embed(x)).mean((1, 2))

    backward = AccumulatedBackward(
        Masked(),
        nn.functional.mse_loss,
        microbatch_tokens=16,
        lengths=lambda inputs, targets: [8, 3, 2, 5, 4, 6],
        trim=lambda inputs, targets, n: ((inputs[0][:, :n], torch.ones(n, n).tril()), targets),
    )
    result = backward((torch.randint(1, 10, (6, 8)),), torch.randn(6))
    assert result.accumulation_steps > 1
