"""A study starts at a microbatch that fits: few failures, little waste, under real limits."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from children import run_limited
from plain_task import plain_task
from torch import nn
from torch.utils.data import Dataset

from bs_optuna.sampling import attributes
from bs_optuna.training import Budget
from bs_optuna.training import TrainingObjective
from bs_optuna.training import TrainingTask
from bs_optuna.training import measured_memory
from bs_optuna.training import starting_sizes
from bs_optuna.training.known_sizes import NOTHING_KNOWN
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.limit import NoLimit
from bs_optuna.training.predicted_memory import FittingSizes
from bs_optuna.training.starting_sizes import StartingSizes
from bs_optuna.training.starting_sizes import available_bytes


CPU = torch.device("cpu")
MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel enforces it on Linux only")


class Told(NoLimit):
    """A limit that is known but not enforced: predictions need no more."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes

    @property
    def limit_bytes(self) -> int:  # type: ignore[override]
        return self._limit_bytes


def predicted(task: TrainingTask, limit: MemoryLimit) -> FittingSizes:
    return predicted_for(StartingSizes(task, device=CPU, limit=limit, batch_size=256), 256)


def predicted_for(sizes: StartingSizes, batch_size: int) -> FittingSizes:
    sizes.predict(batch_size, NOTHING_KNOWN, measure=True)
    return sizes.predicted(batch_size)


class Recorded(nn.Sequential):
    """Notes how many samples are trained on, and how many have been followed at once."""

    real: list[int] = []  # noqa: RUF012
    fake: list[int] = []  # noqa: RUF012

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (self.real if type(x) is torch.Tensor else self.fake).append(len(x))
        return super().forward(x)  # type: ignore[no-any-return]


def recorded() -> nn.Module:
    return Recorded(nn.Linear(16, 4096), nn.ReLU(), nn.Linear(4096, 10))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """As if the machine had so many MiB left, of which a part is planned with."""
    left = {"mib": 10_000}
    monkeypatch.setattr(starting_sizes, "free_host_bytes", lambda: left["mib"] * MIB)
    Recorded.real.clear()
    Recorded.fake.clear()
    return left


def test_on_a_cpu_with_ample_memory_a_few_samples_tell_that_nothing_need_be_predicted(
    free: dict[str, int],
) -> None:
    sizes = StartingSizes(plain_task(model=recorded), device=CPU, limit=NoLimit(), batch_size=256)
    for batch_size in (256, 64, 16):
        assert predicted_for(sizes, batch_size) == FittingSizes(None, None)
    assert Recorded.real == [2, 2, 2, 2]  # once, two steps of two microbatches
    assert not Recorded.fake


def test_on_a_cpu_that_has_little_left_a_study_plans_with_a_part_of_it(
    free: dict[str, int],
) -> None:
    free["mib"] = 27
    found = predicted(plain_task(model=recorded), NoLimit())
    least, most = (predicted(plain_task(), Told(int(part * 27 * MIB))) for part in (0.3, 0.5))
    assert found.microbatch is not None
    assert (least.microbatch or 0) < found.microbatch < (most.microbatch or 0)
    assert 0 < found.microbatch < 256
    assert max(Recorded.real) <= 32  # an eighth of the batch
    shared = StartingSizes(
        plain_task(), device=CPU, limit=NoLimit(), batch_size=256, processes=2
    )  # fmt: skip
    assert 0 < (predicted_for(shared, 256).microbatch or 0) < found.microbatch


def test_a_model_that_takes_more_than_that_part_is_still_trained_on_batches(
    free: dict[str, int],
) -> None:
    """With its gradients and AdamW's state 20 MiB; BatchNorm refuses single samples."""
    model = lambda: nn.Sequential(nn.Linear(16, 65536), nn.BatchNorm1d(65536), nn.Linear(65536, 2))  # noqa: E731
    for left, least in ((60, 10), (20, 2)):
        free["mib"] = left
        found = predicted(plain_task(model=model), NoLimit()).microbatch
        assert found is None or found >= least


def test_an_evaluation_in_larger_pieces_is_looked_at_too(free: dict[str, int]) -> None:
    """A batch of 4 fits; 256 images of 1 MiB each do not."""
    data = (torch.randn(4, 1, 64, 64).repeat(64, 1, 1, 1), torch.zeros(256, dtype=torch.long))
    model = lambda: nn.Sequential(nn.Conv2d(1, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # noqa: E731
    free["mib"] = 200
    task = plain_task(model=model, train_data=data, valid_data=data)
    sizes = StartingSizes(task, device=CPU, limit=NoLimit(), batch_size=4)
    found = predicted_for(sizes, 4)
    assert found.evaluation is not None
    assert 4 <= found.evaluation < 256


def test_where_nothing_can_be_traced_there_tensors_are_counted(free: dict[str, int]) -> None:
    free["mib"] = 27
    traced = predicted(plain_task(), NoLimit()).microbatch
    found = predicted(plain_task(model=recorded, loss=looks_at_values), NoLimit())
    assert traced is not None
    assert found.microbatch == pytest.approx(traced, rel=0.1)
    assert max(Recorded.real) <= traced


def test_after_a_death_no_step_is_taken_to_look(free: dict[str, int]) -> None:
    free["mib"] = 27
    sizes = StartingSizes(plain_task(model=recorded), device=CPU, limit=NoLimit(), batch_size=256)
    sizes.predict(256, replace(NOTHING_KNOWN, deaths=True), measure=True)
    assert not Recorded.real
    assert 0 < (sizes.predicted(256).microbatch or 0) < 256
    untraceable = plain_task(model=recorded, loss=looks_at_values)
    sizes = StartingSizes(untraceable, device=CPU, limit=NoLimit(), batch_size=256)
    predicted_for(sizes, 16)
    Recorded.real.clear()
    sizes.predict(256, replace(NOTHING_KNOWN, deaths=True), measure=True)
    assert not Recorded.real


def test_a_limit_beyond_what_is_left_would_not_be_refused_but_kill(free: dict[str, int]) -> None:
    free["mib"] = 8
    assert available_bytes(CPU, 64 * MIB) == 8 * MIB
    assert available_bytes(CPU, 64 * MIB, processes=2) == 4 * MIB
    assert available_bytes(CPU, 6 * MIB) == 6 * MIB


def test_of_samples_that_vary_the_longest_tell(free: dict[str, int]) -> None:
    seen = []

    class Cut(Recorded):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(int(x[:, 0].max()))
            return super().forward(x)

    inputs = torch.ones(256, 16)
    inputs[200, 0] = 7
    task = plain_task(
        model=lambda: Cut(nn.Linear(16, 10)),
        train_data=(inputs, torch.zeros(256, dtype=torch.long)),
        lengths=lambda inputs, targets: inputs[:, 0].int().tolist(),
    )
    assert predicted(task, NoLimit()) == FittingSizes(None, None)
    assert set(seen) == {7}


class Samples(Dataset[Any]):
    """Read by a loader, which draws a random number when it begins."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(16), torch.tensor(0)


def test_nothing_is_drawn_before_something_is_predicted() -> None:
    task = plain_task(train_data=Samples(), valid_data=Samples())
    state = torch.get_rng_state()
    StartingSizes(task, device=CPU, limit=Told(8 * MIB), batch_size=256)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_larger_limit_holds_more() -> None:
    small, large = (predicted(plain_task(), Told(mib * MIB)) for mib in (5, 8))
    assert small.microbatch is not None
    assert large.microbatch is not None
    assert 0 < small.microbatch < large.microbatch <= 256
    assert small.evaluation is not None
    assert small.evaluation > small.microbatch
    assert predicted(plain_task(), Told(MIB)) == FittingSizes(0, 0)
    assert predicted(plain_task(), Told(1024 * MIB)) == FittingSizes(256, 512)


def test_a_batch_that_is_too_large_itself_says_nothing_of_smaller_ones() -> None:
    """Samples of 256 KiB: of 256 the batch alone is more than the limit."""
    data = (torch.randn(1, 65536).expand(256, -1), torch.zeros(256, dtype=torch.long))
    task = plain_task(train_data=data, valid_data=data, model=lambda: nn.Linear(65536, 2))
    sizes = StartingSizes(task, device=CPU, limit=Told(40 * MIB), batch_size=256)
    assert predicted_for(sizes, 256).microbatch == 0
    assert predicted_for(sizes, 33).microbatch == 64
    assert sizes.predicted(33) == sizes.predicted(64)
    assert not sizes.predict(64, NOTHING_KNOWN, measure=True)  # known already
    assert sizes.predict(32, NOTHING_KNOWN, measure=True)


def test_a_prediction_uses_the_kernels_of_the_limit_and_turns_the_others_on_again() -> None:
    seen = []

    def model() -> nn.Module:
        seen.append(torch.backends.mkldnn.enabled)
        return nn.Linear(16, 10)

    predicted(plain_task(model=model), Told(8 * MIB))
    assert seen == [False]
    assert torch.backends.mkldnn.enabled


def test_a_size_that_alone_cannot_be_traced_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = (predicted(plain_task(), Told(8 * MIB)).microbatch or 0) // 2
    monkeypatch.setattr(measured_memory, "is_prepared", lambda: True)  # about, not exactly

    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if len(x) != half or x.sum().item() > -1e9 else -x)

    model = lambda: nn.Sequential(Looks(16, 4096), nn.ReLU(), nn.Linear(4096, 10))  # noqa: E731
    found = predicted(plain_task(model=model), Told(8 * MIB))
    assert found.microbatch is not None
    assert 1 <= found.microbatch < 256


def test_what_is_measured_asks_no_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that needs more samples than that is the user's own business."""
    monkeypatch.setattr(measured_memory, "is_prepared", lambda: True)

    def needs_many(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(outputs) < 100:
            raise ValueError("too few")
        return outputs.mean()

    task = plain_task(loss=looks_at_values, metrics={"many": needs_many}, objective="many")
    assert predicted(task, Told(8 * MIB)).microbatch is not None


def looks_at_values(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(outputs, targets)
    return loss if loss.item() > 0 else -loss


def test_what_cannot_be_traced_is_logged_and_left_to_back_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="bs_optuna"):
        sizes = predicted(plain_task(loss=looks_at_values), Told(8 * MIB))
    assert sizes == FittingSizes(None, None)
    assert "Memory cannot be predicted: DataDependentOutputException" in caplog.text


def test_an_evaluation_that_cannot_be_traced_leaves_the_microbatch() -> None:
    item = lambda outputs, targets: torch.tensor(outputs.sum().item())  # noqa: E731
    sizes = predicted(plain_task(metrics={"item": item}), Told(8 * MIB))
    assert sizes == FittingSizes(predicted(plain_task(), Told(8 * MIB)).microbatch, None)


def test_what_was_seen_comes_before_what_was_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StartingSizes, "predicted", lambda self, batch_size: FittingSizes(40, 100))
    objective = TrainingObjective(
        plain_task(), budget=Budget("steps", 1), batch_size=(8, 256), device=CPU
    )
    study = optuna.create_study()

    def microbatch() -> int:
        study.enqueue_trial({"batch_size": 256, "lr": 1e-3})
        study.optimize(objective, n_trials=1)
        return int(study.get_trials()[-1].user_attrs[attributes.MICROBATCH_SIZE])

    def learn(**seen: int) -> None:
        key = study.get_trials()[0].user_attrs[attributes.MEMORY_KEY]
        study.add_trial(
            optuna.create_trial(value=0.0, user_attrs={attributes.MEMORY_KEY: key, **seen})
        )

    assert microbatch() == 37  # 256 in 7 parts of at most 40
    learn(**{attributes.MICROBATCH_FITS: 64})
    assert microbatch() == 64
    learn(**{attributes.MICROBATCH_FITS: 20, attributes.MICROBATCH_FAILS: 38})
    assert microbatch() == 32  # at most 36, what is left of 40 when it has failed
    learn(**{attributes.MICROBATCH_FAILS: 30})
    assert microbatch() == 15  # half; memory that differs makes a 20 that has fitted no proof


def study_under(
    model: str, optimizer: str, mib: int, samples: int, device: str = "cpu"
) -> dict[str, Any]:
    """What a study of three trials met in a fresh process with a real limit."""
    script = Path(__file__).with_name("real_starting_sizes.py")
    found: dict[str, Any] = run_limited(script, model, optimizer, str(mib), str(samples), device)
    return found


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "optimizer", "mib", "samples"),  # more than twice what fits
    [
        ("wide", "adamw", 50, 256),
        ("wide", "sgd", 90, 512),
        ("wide", "adamw", 102, 512),
        ("wide", "sgd", 200, 1024),
        ("cnn", "adamw", 50, 1024),
        ("transformer", "sgd", 90, 1024),
    ],
)
def test_at_most_one_attempt_fails_and_at_most_a_tenth_is_wasted(
    model: str, optimizer: str, mib: int, samples: int
) -> None:
    check_study(study_under(model, optimizer, mib, samples), samples)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mib", "samples"),
    [("wide", 250, 1024), ("wide", 700, 4096), ("cnn", 250, 4096), ("transformer", 250, 4096)],
)
def test_a_gpu_meets_and_wastes_no_more(model: str, mib: int, samples: int) -> None:
    check_study(study_under(model, "adamw", mib, samples, "cuda"), samples)


def check_study(found: dict[str, Any], samples: int) -> None:
    assert found["failures"] + found["failed evaluations"] <= 1, found
    assert found["a ninth more fails"], found
    assert found["fits"] <= samples / 2, found
    assert found["batches"][:2] == [samples, samples // 3], found


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "optimizer", "mib"), [("untraceable", "sgd", 50), ("upsampled", "adamw", 20)]
)
def test_what_fake_tensors_do_not_tell_is_measured(model: str, optimizer: str, mib: int) -> None:
    """Code that depends on data, and an operation that takes as much again inside itself."""
    found = study_under(model, optimizer, mib, 512)
    check_study(found, 512)
    assert found["failed evaluations"] == 0, found


@linux
@pytest.mark.slow
def test_what_can_neither_be_traced_nor_measured_is_halved() -> None:
    found = study_under("immeasurable", "sgd", 50, 512)
    assert found["predicted"] is None
    assert 1 <= found["failures"] <= 9  # log2(512)
    assert found["fits"] >= 16
