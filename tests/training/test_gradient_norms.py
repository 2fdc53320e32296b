"""What a pass says of the gradient's noise, against gradients of single microbatches in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from bs_optuna import NoiseScale
from bs_optuna.science.noise_scale import NoiseReading
from bs_optuna.science.noise_scale import read_noise
from bs_optuna.training import AccumulatedBackward


PADDING = -100


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(samples: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (samples,), generator=generator)


def count(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (targets != PADDING).sum()


def gradient(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = cross_entropy(model(inputs), targets)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def read(
    model: nn.Module, loss_fn: Callable[[Any, Any], torch.Tensor] = cross_entropy, **options: Any
) -> tuple[AccumulatedBackward, NoiseScale]:
    scale = NoiseScale(decay=0.0)
    return AccumulatedBackward(model, loss_fn, noise_scale=scale, **options), scale


def close(reading: NoiseReading | None, expected: NoiseReading, rel: float = 1e-9) -> bool:
    assert reading is not None
    return (reading.squared_gradient, reading.variance) == pytest.approx(
        (expected.squared_gradient, expected.variance), rel=rel, abs=1e-12
    )


@given(st.integers(2, 40), st.integers(1, 20), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_reading_is_that_of_the_microbatches_own_gradients(
    samples: int, size: int, padded: bool
) -> None:
    model, (inputs, targets) = mlp(), batch(samples)
    if padded:
        targets[1::2] = PADDING
    backward, scale = read(model, count=count if padded else None, microbatch_size=size)
    result = backward(inputs, targets)
    if result.accumulation_steps == 1:
        assert scale.averages is None
        return
    small, larger = divmod(samples, result.accumulation_steps)
    sizes = [small + 1] * larger + [small] * (result.accumulation_steps - larger)
    parts = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    parts = [part for part in parts if count(*part) > 0]
    held = [float(count(*part)) * samples / float(count(inputs, targets)) for part in parts]
    if len(parts) < 2:
        assert scale.averages is None
        return
    whole = gradient(model, inputs, targets)
    expected = read_noise(
        sizes=held,
        squared_norms=[float(gradient(model, *part).square().sum()) for part in parts],
        batch_squared_norm=float(whole.square().sum()),
    )
    assert close(scale.averages, expected)


def test_gradients_are_the_same_and_those_of_before_do_not_count() -> None:
    readings, gradients = [], []
    for noisy in (None, NoiseScale(decay=0.0)):
        model = mlp()
        backward = AccumulatedBackward(model, cross_entropy, microbatch_size=8, noise_scale=noisy)
        for seed in (1, 2):  # the second one on top of the first
            backward(*batch(30, seed))
        readings.append(None if noisy is None else noisy.averages)
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    alone, scale = read(mlp(), microbatch_size=8)
    alone(*batch(30, seed=2))
    assert scale.averages == readings[1]


def test_no_hook_stays_behind() -> None:
    model = mlp()
    backward, _ = read(model, microbatch_size=8)
    backward(*batch(30))
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_scaler_and_half_precision_change_nothing_but_the_rounding() -> None:
    backward, scale = read(mlp().float(), microbatch_size=8)
    inputs, targets = batch(64)
    backward(inputs.float(), targets)
    expected = scale.averages
    assert expected is not None
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward, scale = read(mlp().float(), microbatch_size=8, scaler=scaler)
    backward(inputs.float(), targets)
    assert close(scale.averages, expected, rel=1e-5)
    backward, scale = read(mlp().bfloat16(), microbatch_size=8)
    backward(inputs.bfloat16(), targets)
    assert close(scale.averages, expected, rel=0.1)


def test_sparse_gradients_count_as_dense_ones() -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 3))
        backward, scale = read(model, microbatch_size=4)
        backward(torch.arange(24).reshape(12, 2) % 7, torch.arange(12) % 3)
        found.append(scale.averages)
    assert found[0] is not None
    assert found[1] is not None
    assert close(found[0], found[1], rel=1e-5)


def test_a_failed_attempt_says_nothing() -> None:
    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(outputs) > 5:
            torch.empty(2**50)
        return cross_entropy(outputs, targets)

    once, expected = read(mlp(), microbatch_size=5)
    once(*batch(20))
    backward, scale = read(mlp(), loss_fn, microbatch_size=10)
    assert backward(*batch(20)).backoffs == 1
    assert scale.averages == expected.averages


@pytest.mark.parametrize(
    ("training", "tracks", "mixes"),
    [(True, True, True), (False, True, False), (False, False, True)],
)
def test_batch_norm_leaves_nothing_to_read_while_it_mixes_samples(
    training: bool, tracks: bool, mixes: bool
) -> None:
    norm = nn.BatchNorm1d(4, track_running_stats=tracks)
    model = nn.Sequential(nn.Linear(5, 4), norm, nn.Linear(4, 3)).double()
    model.train(training)
    backward, scale = read(model, microbatch_size=8, batch_norm="exact")
    backward(*batch(32))
    assert (scale.averages is None) == mixes


def test_gradients_that_arrive_in_pieces_are_not_read() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone().requires_grad_()
            for _ in range(2):
                x = checkpoint(self.shared, x, use_reentrant=True)
            return x

    backward, scale = read(Twice().double(), microbatch_size=8)
    backward(*batch(32))
    assert scale.averages is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"noise_scale": 0.9}, TypeError, r"noise_scale=0.9; must be a bs_optuna.NoiseScale\(\)"),
        ({"reduction": "sum"}, ValueError, "noise_scale and reduction='sum'; needs a loss that is"),
        ({"process_group": object()}, ValueError, "noise_scale and process_group; measure it on"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AccumulatedBackward(mlp(), cross_entropy, **{"noise_scale": NoiseScale(), **options})


def test_the_loop_of_the_page_about_scaling_measures_something() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    loop = next(block for block in blocks if "noise_scale=noise" in block)
    model = mlp()
    names = {
        "NoiseScale": NoiseScale,
        "AccumulatedBackward": AccumulatedBackward,
        "model": model,
        "loss_fn": cross_entropy,
        "loader": [batch(48, seed) for seed in range(30)],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(loop, names)
    assert names["noise"].averages is not None  # type: ignore[attr-defined]
