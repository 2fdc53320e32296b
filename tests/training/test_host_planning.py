"""On a CPU without a limit a study plans with what the machine has left, if it has to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_task import plain_task
from planning import CPU
from planning import MIB
from planning import Told
from planning import looks_at_values
from planning import predicted
from planning import predicted_for
from torch import nn

from bs_optuna.training import starting_sizes
from bs_optuna.training.known_sizes import NOTHING_KNOWN
from bs_optuna.training.limit import NoLimit
from bs_optuna.training.predicted_memory import FittingSizes
from bs_optuna.training.starting_sizes import StartingSizes
from bs_optuna.training.starting_sizes import available_bytes


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
        assert found is not None
        assert found >= least


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
