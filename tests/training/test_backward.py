"""The gradient and loss of the whole batch, for any split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import gradients
from comparing import seed_all
from failing import FailingAt
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from bs_optuna.training import AccumulatedBackward


# Splitting it is what is tested here; what it does to BatchNorm, test_normalization.py tells.
pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm normalizes:UserWarning")


IGNORED = -100


def mlp() -> nn.Module:
    seed_all(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


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


def test_a_model_without_parameters_may_have_a_loss_with_some() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, 3)

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(outputs), targets)

    loss_fn, scaler = Head(), torch.amp.GradScaler("cpu", init_scale=4.0)
    backward = AccumulatedBackward(
        nn.Identity(), loss_fn, microbatch_size=4, scaler=scaler, autocast_dtype=torch.bfloat16
    )
    backward(torch.randn(9, 5), torch.randint(3, (9,)))
    assert len(gradients(loss_fn)) == 2


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


@pytest.mark.parametrize("microbatch_size", [1, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_loss_of_low_precision_is_summed_in_single(
    dtype: torch.dtype, microbatch_size: int
) -> None:
    model = mlp().to(dtype)
    inputs, targets = torch.randn(1024, 5).to(dtype), torch.randint(3, (1024,))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(inputs).float(), targets).item()
    backward = AccumulatedBackward(
        model, nn.functional.cross_entropy, microbatch_size=microbatch_size
    )
    loss = backward(inputs, targets).loss
    assert loss.item() == pytest.approx(expected, rel=4e-3)  # one rounding to 8 bits
    assert loss.dtype == (dtype if microbatch_size == 1024 else torch.float32)


# --- out of memory ---------------------------------------------------------------------------


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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_may_be_a_whole_batch_but_not_cut() -> None:
    inputs = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)

    def loss_fn(outputs: torch.Tensor, targets: None) -> torch.Tensor:
        return outputs.values().square().mean()

    assert AccumulatedBackward(nn.Linear(3, 1), loss_fn)(inputs).accumulation_steps == 1
    with pytest.raises(
        TypeError, match=r"nested tensor, which cannot be cut into microbatches; pad"
    ):
        AccumulatedBackward(nn.Linear(3, 1), loss_fn, microbatch_size=1)(inputs)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_a_sparse_batch_is_cut_where_its_layout_lets_it() -> None:
    dense = torch.randn(12, 5, dtype=torch.float64) * (torch.rand(12, 5) > 0.5)
    weight = torch.randn(5, dtype=torch.float64)

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.mv(x, self.weight)

    gradients = []
    for inputs in (dense, dense.to_sparse_coo()):
        model = Sparse()
        loss = nn.functional.mse_loss
        AccumulatedBackward(model, loss, microbatch_size=5)(inputs, torch.arange(12).double())
        gradients.append(model.weight.grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(TypeError, match=r"layout torch.sparse_csr, which cannot be cut"):
        AccumulatedBackward(Sparse(), nn.functional.mse_loss, microbatch_size=5)(
            dense.to_sparse_csr(), torch.ones(12).double()
        )


def test_a_batch_that_was_computed_is_refused_before_anything_runs() -> None:
    model, source = mlp(), torch.ones(8, 5, dtype=torch.float64, requires_grad=True)
    computed, targets = source * 2, torch.randint(3, (8,))
    backward = AccumulatedBackward(model, nn.functional.cross_entropy, microbatch_size=3)
    with pytest.raises(ValueError, match=r"shape \(8, 5\) that was computed .* x = tensor.detach"):
        backward(computed, targets)
    assert source.grad is None
    assert gradients(model) == []
    x = computed.detach().requires_grad_()  # what the message says
    backward(x, targets)
    computed.backward(x.grad)
    twin = source.detach().requires_grad_()
    nn.functional.cross_entropy(model(twin * 2), targets).backward()
    assert source.grad is not None
    assert twin.grad is not None
    assert_close([source.grad], [twin.grad])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"microbatch_size": 0}, "microbatch_size=0; must be a whole number of at least 1"),
        ({"microbatch_size": "4"}, "microbatch_size=.4.; must be a whole number of at least 1"),
        ({"microbatch_size": 4.0}, "microbatch_size=4.0; must be a whole number of at least 1"),
        ({"reduction": "max"}, "reduction='max'; must be 'mean' or 'sum'"),
        ({"regrow_after": 0}, "regrow_after=0; must be at least 1, or None for never"),
        ({"reduction": "sum", "count": lambda i, t: 1}, "a sum needs no weights"),
        ({"smaller": min, "process_group": object()}, "smaller and process_group; give one"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccumulatedBackward(mlp(), nn.functional.cross_entropy, **arguments)
