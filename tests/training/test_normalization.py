"""BatchNorm in microbatches: said, with the whole batch's running statistics, or replaced."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from comparing import assert_equal
from failing import FailingAt
from torch import nn

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.training import AccumulatedBackward
from bs_optuna.training import convert_batch_norm


LOSS = nn.functional.cross_entropy


def images(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    x = 3 * torch.randn(samples, 2, 5, 5, generator=generator) + 7
    return x, torch.randint(3, (samples,), generator=generator)


def first_is_batch_norm(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(),
        nn.Linear(36, 3),
    )  # fmt: skip


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("microbatch_size", [1, 4, 9, 20])
def test_exact_running_statistics_are_those_of_the_whole_batch(
    microbatch_size: int, momentum: float | None
) -> None:
    model = first_is_batch_norm(momentum)
    whole = copy.deepcopy(model)
    backward = AccumulatedBackward(model, LOSS, microbatch_size=microbatch_size, batch_norm="exact")
    for samples in (20, 11):
        backward(*images(samples))
        LOSS(whole(images(samples)[0]), images(samples)[1]).backward()
    assert model[1].num_batches_tracked == 2
    assert model[1].momentum == momentum
    torch.testing.assert_close(model[1].running_mean, whole[1].running_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(model[1].running_var, whole[1].running_var, rtol=1e-5, atol=0)


def test_exact_statistics_of_synchronized_layers_are_those_of_the_whole_batch_too() -> None:
    """One process alone trains with them as with any other."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(first_is_batch_norm())
    whole = copy.deepcopy(model)
    AccumulatedBackward(model, LOSS, microbatch_size=4, batch_norm="exact")(*images(20))
    LOSS(whole(images(20)[0]), images(20)[1]).backward()
    assert isinstance(model[1], nn.SyncBatchNorm)
    torch.testing.assert_close(model[1].running_mean, whole[1].running_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(model[1].running_var, whole[1].running_var, rtol=1e-5, atol=0)


def test_without_exact_they_are_not() -> None:
    model = first_is_batch_norm()
    with pytest.warns(UserWarning, match="BatchNorm"):
        AccumulatedBackward(model, LOSS, microbatch_size=4)(*images(20))
    assert model[1].num_batches_tracked == 5


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("microbatch_size", [1, 4, 20])
def test_exact_statistics_by_sample_are_those_of_the_whole_batch_too(
    microbatch_size: int, momentum: float | None
) -> None:
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(2, momentum=momentum, track_running_stats=True)  # type: ignore[arg-type]
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(50, 3)).double()
    whole = copy.deepcopy(model)
    backward = AccumulatedBackward(model, LOSS, microbatch_size=microbatch_size, batch_norm="exact")
    for samples in (20, 11):
        x, y = images(samples)
        for tried in (model, whole):
            tried.zero_grad()
        backward(x.double(), y)
        LOSS(whole(x.double()), y).backward()
    torch.testing.assert_close(model.state_dict(), whole.state_dict())
    torch.testing.assert_close(model[2].weight.grad, whole[2].weight.grad)
    assert norm.momentum == momentum


def test_statistics_by_sample_are_warned_of() -> None:
    norm = nn.InstanceNorm2d(2, track_running_stats=True)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(50, 3))
    with pytest.warns(UserWarning, match="InstanceNorm updates .* of 4 samples; pass batch_norm="):
        AccumulatedBackward(model, LOSS, microbatch_size=4)(*images(20))
    norm.eval()
    AccumulatedBackward(model, LOSS, microbatch_size=4)(*images(20))


class Twice(nn.Module):
    """Calls one BatchNorm twice in a pass, on values that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(50)
        self.head = nn.Linear(50, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.norm(x.flatten(1)) + self.norm(x.flatten(1) ** 2))
        return outputs


def test_a_layer_that_is_called_twice_is_updated_twice() -> None:
    torch.manual_seed(0)
    model = Twice()
    whole = copy.deepcopy(model)
    AccumulatedBackward(model, LOSS, microbatch_size=5, batch_norm="exact")(*images(13))
    whole(images(13)[0])
    assert model.norm.num_batches_tracked == 2
    torch.testing.assert_close(model.norm.running_var, whole.norm.running_var, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.norm.running_mean, whole.norm.running_mean, rtol=1e-5, atol=0)


def test_frozen_and_untracked_layers_are_left_alone() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(),
        nn.Linear(50, 3),
    )  # fmt: skip
    model[0].eval()
    before = copy.deepcopy(model[0].state_dict())
    AccumulatedBackward(model, LOSS, microbatch_size=5, batch_norm="exact")(*images(13))
    assert_equal(model[0].state_dict(), before)


def test_failing_at_any_operation_leaves_exact_statistics() -> None:
    def run(position: int | None, microbatch_size: int) -> tuple[nn.Module, FailingAt]:
        model, batch = first_is_batch_norm(), images(12)
        backward = AccumulatedBackward(
            model, LOSS, microbatch_size=microbatch_size, batch_norm="exact"
        )
        with FailingAt(position) as device:
            backward(*batch)
        assert len(model[1]._forward_hooks) == 0
        return model, device

    expected, _ = run(None, 3)
    _, device = run(None, 6)
    for position in range(device.operations):
        model, failing = run(position, 6)
        assert failing.failures == 1
        assert_equal(model.state_dict(), expected.state_dict())
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert_equal(p.grad, q.grad)


def test_the_warning_names_the_sizes_and_the_remedy_and_comes_once() -> None:
    backward = AccumulatedBackward(first_is_batch_norm(), LOSS, microbatch_size=8)
    with pytest.warns(UserWarning, match=r"of 7 samples .* batch of 20.*convert_batch") as found:
        backward(*images(20))
    assert found[0].filename == __file__
    backward(*images(20))  # an error if it came again


def test_nothing_is_said_where_nothing_changes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AccumulatedBackward(first_is_batch_norm(), LOSS)(*images(20))
        AccumulatedBackward(first_is_batch_norm().eval(), LOSS, microbatch_size=4)(*images(20))
        converted = convert_batch_norm(first_is_batch_norm())
        AccumulatedBackward(converted, LOSS, microbatch_size=4)(*images(20))


def test_converted_microbatches_give_the_gradient_of_the_whole_batch() -> None:
    model = convert_batch_norm(first_is_batch_norm()).double()
    x, y = images(20)
    LOSS(model(x.double()), y).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    AccumulatedBackward(model, LOSS, microbatch_size=3)(x.double(), y)
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert (p.grad - grad).norm() <= 1e-12 * expected[-1].norm()


@pytest.mark.parametrize(
    ("norm", "groups"),
    [
        (nn.BatchNorm2d(256), 32),
        (nn.BatchNorm2d(64), 32),
        (nn.BatchNorm2d(48), 24),
        (nn.BatchNorm2d(16), 8),
        (nn.BatchNorm3d(10), 5),
        (nn.BatchNorm2d(37), 1),
        (nn.BatchNorm2d(1), 1),
        (nn.BatchNorm1d(64), 1),
        (nn.SyncBatchNorm(64), 32),
    ],
)
def test_groups_divide_the_channels(norm: nn.Module, groups: int) -> None:
    converted = convert_batch_norm(norm)
    assert isinstance(converted, nn.GroupNorm)
    assert (converted.num_groups, converted.num_channels) == (groups, norm.num_features)


def test_converting_keeps_parameters_types_modes_and_shared_layers() -> None:
    model = nn.Module()
    model.a = nn.ModuleDict({"n": nn.BatchNorm2d(4, eps=0.25, dtype=torch.float64)}).eval()
    model.b = model.a["n"]
    model.plain = nn.BatchNorm1d(6, affine=False)
    weight = model.a["n"].weight
    assert convert_batch_norm(model) is model
    assert model.b is model.a["n"]
    assert model.b.weight is weight
    assert (model.b.eps, model.b.training, model.plain.weight) == (0.25, False, None)
    outputs = model.b(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    assert outputs.dtype == torch.float64
    assert not list(model.buffers())


def test_a_split_that_leaves_a_single_sample_says_so_and_not_that_memory_ran_out() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    backward = AccumulatedBackward(model, LOSS, microbatch_size=2, batch_norm="exact")
    with pytest.raises(MicrobatchDoesNotFitError) as refused:
        backward(torch.randn(9, 4), torch.zeros(9, dtype=torch.long))
    assert str(refused.value) == (
        "BatchNorm cannot take the single sample that microbatch_size=2 leaves by itself; use "
        "convert_batch_norm(model), a larger microbatch_size, or more memory."
    )
    assert refused.value.sizes_failed == ()


def test_a_lazy_layer_that_has_seen_nothing_is_not_converted() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"'1\.weight' of the Sequential has no shape"):
        convert_batch_norm(model)


def test_another_word_than_exact_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_norm='whole'; must be 'microbatch' or 'exact'"):
        AccumulatedBackward(nn.Linear(1, 1), LOSS, batch_norm="whole")  # type: ignore[arg-type]


class WithActivation(nn.BatchNorm2d):
    """As in timm, where an activation follows in the same module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class Named(nn.BatchNorm2d):
    """Does nothing else."""


def test_a_norm_that_does_more_is_not_converted() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), WithActivation(4))
    with pytest.raises(ValueError, match="WithActivation inherits from BatchNorm"):
        convert_batch_norm(model)
    assert isinstance(model[0], nn.BatchNorm2d)  # nothing is half done
    assert isinstance(convert_batch_norm(Named(4)), nn.GroupNorm)


def test_exact_statistics_need_no_count_of_updates() -> None:
    model = first_is_batch_norm()
    model[1].num_batches_tracked = None
    whole = copy.deepcopy(model)
    AccumulatedBackward(model, LOSS, microbatch_size=7, batch_norm="exact")(*images(20))
    LOSS(whole(images(20)[0]), images(20)[1]).backward()
    torch.testing.assert_close(model[1].running_mean, whole[1].running_mean)
    torch.testing.assert_close(model[1].running_var, whole[1].running_var)
