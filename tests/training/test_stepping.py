"""Whatever operation of a training step fails, the run ends as if it had not."""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import assert_equal
from comparing import random_states
from comparing import seed_all
from failing import FailingAt
from torch import nn

from bs_optuna.errors import BsOptunaError
from bs_optuna.errors import StepDoesNotFitError
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import GuardedStep
from bs_optuna.training.limit_environment import LIMIT_ENVIRONMENT
from bs_optuna.training.oom import classify


# Splitting it is what is tested here; what it does to BatchNorm, test_normalization.py tells.
pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm normalizes:UserWarning")

BATCH = 8
OPTIMIZERS = {
    f"{name} {way}": (make, {"fused": way == "fused", "foreach": way == "foreach"})
    for name, make in (
        ("adamw", lambda p, **how: torch.optim.AdamW(p, lr=0.01, **how)),
        ("sgd", lambda p, **how: torch.optim.SGD(p, lr=0.01, momentum=0.9, **how)),
    )
    for way in ("fused", "foreach", "plain")
}
OPTIMIZERS["adamw"] = (OPTIMIZERS["adamw fused"][0], {})  # its way is left to PyTorch


def network() -> nn.Module:
    seed_all(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(2 * 16, 3),
    )  # fmt: skip


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 1, 6, 6, generator=generator), torch.randint(
        3, (BATCH,), generator=generator
    )


class Run:
    """Two training steps, with all that can be in one, on a device that may fail."""

    def __init__(self, optimizer: str, *, scaled: bool, device: FailingAt, where: str) -> None:
        make, how = OPTIMIZERS[optimizer]
        self.model = network().to(where)
        self.batch = tuple(tensor.to(where) for tensor in images())
        self.optimizer = make(self.model.parameters(), **how)
        self.scaler = torch.amp.GradScaler(where, init_scale=8.0, growth_interval=1, enabled=scaled)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.5)
        self.device = device
        self.sizes: list[int] = []  # of the microbatches of each step

    def train(self, microbatch_sizes: tuple[int, int] | None = None) -> list[Any]:
        seed_all(2)
        step = GuardedStep(self.optimizer, max_norm=0.1, scaler=self.scaler)
        backward = None
        for number in range(2):
            if backward is None or microbatch_sizes:
                backward = AccumulatedBackward(
                    self.model,
                    nn.functional.cross_entropy,
                    microbatch_size=microbatch_sizes[number] if microbatch_sizes else "auto",
                    scaler=self.scaler,
                )
            self.optimizer.zero_grad()
            with self.device:
                result = backward(*self.batch)
                step()
                self.scheduler.step()
            self.sizes.append(result.microbatch_size)
        return copy.deepcopy([
            self.model.state_dict(), [p.grad for p in self.model.parameters()],
            self.optimizer.state_dict(), self.scaler.state_dict(), self.scheduler.state_dict(),
            random_states(),
        ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_failing_at_any_operation_of_two_whole_steps_changes_no_bit(
    optimizer: str, scaled: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    make = functools.partial(Run, optimizer, scaled=scaled, where=where)
    clean = make(device=FailingAt(None))
    whole = clean.train()
    expected = {(BATCH, BATCH): whole}
    in_step = 0
    for position in range(clean.device.operations):
        run = make(device=FailingAt(position))
        found = run.train()
        assert run.device.failures == 1
        sizes = (run.sizes[0], run.sizes[1])
        if sizes not in expected:  # in forward or backward: the same as having halved unasked
            again = make(device=FailingAt(None))
            expected[sizes] = again.train(sizes)
        in_step += sizes == (BATCH, BATCH)
        assert_equal(found, expected[sizes])
    assert set(expected) == {(BATCH, BATCH), (BATCH, BATCH // 2), (BATCH // 2, BATCH // 2)}
    assert in_step >= 10  # in clipping and in the optimizer


def test_a_fused_first_step_of_several_groups_fails_as_a_whole() -> None:
    def step(position: int | None) -> tuple[list[torch.Tensor], FailingAt]:
        model = network()
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
        model(images()[0]).sum().backward()
        with FailingAt(position) as device:
            GuardedStep(optimizer)()
        return [*model.state_dict().values(), *optimizer.state_dict()["state"].values()], device

    expected, device = step(None)
    for position in range(device.operations):
        found, failing = step(position)
        assert failing.failures == 1
        assert_equal(found, expected)


class Half(torch.optim.AdamW):
    """Gets no further than its first parameter, which then has been stepped."""

    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        random.random()
        torch.rand(1)
        self.param_groups[0]["seen"] = self.calls
        others = self.param_groups[0]["params"][1:]
        grads = [p.grad for p in others]
        for p in others:
            p.grad = None
        super().step()
        for p, grad in zip(others, grads, strict=True):
            p.grad = grad
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_step_that_never_fits_is_an_error_that_leaves_no_trace() -> None:
    model = network()
    optimizer = Half(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step = GuardedStep(optimizer, scaler=scaler)
    scaler.scale(model(images()[0]).sum()).backward()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scaler.state_dict()])
    randoms = random_states()
    for _ in range(2):  # nothing that the first call left makes the second one fail otherwise
        with pytest.raises(
            StepDoesNotFitError, match=r"\(cuda\) in optimizer\.step, 2,147,483,648 bytes more; use"
        ) as info:
            step()
        assert_equal([model.state_dict(), optimizer.state_dict(), scaler.state_dict()], before)
        assert_equal(random_states(), randoms)
        assert info.value.bytes_requested == 2 * 2**30
    assert isinstance(info.value, BsOptunaError)
    verdict = classify(info.value)
    assert verdict is not None
    assert not verdict.retryable


class Recovering(torch.optim.SGD):
    """Does not fit twice."""

    attempts = 0

    def step(self, closure: Any = None) -> None:
        super().step()
        Recovering.attempts += 1
        if Recovering.attempts < 3:
            raise MemoryError


def test_the_step_is_tried_three_times() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    GuardedStep(Recovering([parameter], lr=0.25))()
    assert Recovering.attempts == 3
    assert torch.equal(parameter, torch.full((2,), 0.75))


def test_an_error_of_the_users_own_passes() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="fused"):
        GuardedStep(torch.optim.AdamW([parameter], fused=True))()


def test_clipping_is_that_of_pytorch() -> None:
    model, twin = network(), network()
    for network_ in (model, twin):
        network_.eval()(images()[0]).square().sum().backward()
    GuardedStep(torch.optim.SGD(model.parameters(), lr=0.1, fused=True), max_norm=0.5)()
    nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    torch.optim.SGD(twin.parameters(), lr=0.1, fused=True).step()
    assert_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_wrong_norm_is_refused(max_norm: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="must be above 0, or None"):
        GuardedStep(optimizer, max_norm=max_norm)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit a CPU's memory")
def test_optimizer_state_that_really_does_not_fit() -> None:
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("real_steps.py"))],
        env={**os.environ, **LIMIT_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["state"] == "PRUNED"
    assert "in optimizer.step, " in found["reason"]
    assert found["untouched"]
    assert found["collected"] == {"adamw fused": 1, "adamw plain": 1}
