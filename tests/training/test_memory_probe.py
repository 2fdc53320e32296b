"""Predicted peaks are what PyTorch's profiler counts, and cost no memory themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from collections.abc import Iterator
from functools import partial
from typing import Any
from typing import ClassVar

import pytest
import torch
from comparing import assert_equal
from torch import nn

from bs_optuna.errors import UntraceableError
from bs_optuna.training import TrainingTask
from bs_optuna.training.live_storages import PAGE_BYTES
from bs_optuna.training.live_storages import allocated_bytes
from bs_optuna.training.memory_probe import MARGIN_BYTES
from bs_optuna.training.memory_probe import MOST_OPERATIONS
from bs_optuna.training.memory_probe import MemoryProbe
from bs_optuna.training.oom import release
from bs_optuna.training.process_memory import process_memory
from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.stepping import GuardedStep


CPU = torch.device("cpu")
BATCH = 128
IMAGES = torch.randn(4, 1, 12, 12)
WORDS = torch.zeros(4, 16, dtype=torch.long)
LABELS = torch.zeros(4, dtype=torch.long)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 512), nn.ReLU(), nn.Linear(512, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    """Copies a layer, as PyTorch's encoder does, and classifies every word."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.embedding = nn.Embedding(50, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.encoder(self.embedding(words)))
        return outputs.transpose(1, 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, torch.Tensor]] = {
    "mlp": (mlp, IMAGES, LABELS),
    "cnn": (cnn, IMAGES, LABELS),
    "transformer": (Transformer, WORDS, WORDS),
}
OPTIMIZERS: dict[str, Any] = {
    "adamw": "adamw",
    "sgd": "sgd",
    "adamw with temporaries": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
}


def make_task(name: str, optimizer: Any = "adamw", **changes: Any) -> TrainingTask:
    build, inputs, targets = MODELS[name]
    arguments: dict[str, Any] = {
        "model": build,
        "train_data": (inputs, targets),
        "valid_data": (inputs, targets),
        "loss": nn.functional.cross_entropy,
        "optimizer": optimizer,
    }
    return TrainingTask(**{**arguments, **changes})


def peak_bytes(task: TrainingTask, size: int, *, batch_size: int = BATCH) -> int:
    return MemoryProbe(task, device=CPU).peak_bytes(size, batch_size=batch_size)


def profiled(run: Callable[[], None]) -> int:
    """The peak of what PyTorch's allocator has handed out, in whole pages."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    now = peak = 0
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for record in sorted(records, key=lambda record: record.start_ns()):
        size = allocated_bytes(abs(record.nbytes()), "cpu")
        now += size if record.nbytes() > 0 else -size
        peak = max(peak, now)
    return peak


def train(task: TrainingTask, size: int) -> None:
    """Two steps in microbatches of a size, out of whole batches; the first one a small one."""
    inputs, targets = (
        torch.zeros(BATCH, *leaf.shape[1:], dtype=leaf.dtype) for leaf in task.train_data
    )
    model = task.model()
    kept = [buffer.clone() for buffer in model.buffers()]
    update = GuardedStep(optimizer_factory(task.optimizer)(model.parameters(), 1e-3))
    for samples in (2, size):
        for _ in range(2):
            (task.loss(model(inputs[:samples]), targets[:samples]) / 2).backward()
        update()
    del kept


@pytest.fixture
def plain_kernels() -> Iterator[None]:
    """Those that a limit on the CPU leaves: what others hold inside is not predicted."""
    onednn = torch.backends.mkldnn.set_flags(False)
    nnpack = torch.backends.nnpack.set_flags(False)
    yield
    torch.backends.mkldnn.set_flags(*onednn)
    torch.backends.nnpack.set_flags(*nnpack)


def test_the_private_imports_do_what_they_are_used_for() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(allow_non_fake_inputs=True), Calls():
        huge = torch.empty(10**15) + torch.ones(())
    assert huge.untyped_storage().nbytes() == 4 * 10**15
    assert Calls.names == ["aten.empty.memory_format", "aten.ones.default", "aten.add.Tensor"]


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("size", [2, 9, BATCH])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_prediction_is_what_the_profiler_counts(model: str, optimizer: str, size: int) -> None:
    task = make_task(model, OPTIMIZERS[optimizer])
    predicted = peak_bytes(task, size)
    measured = profiled(lambda: train(task, size))
    assert predicted == pytest.approx(measured, rel=0.01, abs=4 * PAGE_BYTES)


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.Conv2d(8, 8, 1, stride=2),
        nn.Conv2d(8, 4, 3, dilation=2),
        nn.ConvTranspose2d(8, 4, 3, stride=2),
        nn.Conv1d(8, 16, 5),
        nn.Conv3d(8, 4, 3),
    ],
    ids=str,
)
def test_every_convolution_is_predicted(convolution: nn.Module) -> None:
    dimensions = convolution.weight.ndim - 2  # type: ignore[union-attr, operator]
    inputs = torch.randn(4, 8, *(9,) * dimensions)
    task = make_task(
        "cnn",
        model=lambda: nn.Sequential(
            copy.deepcopy(convolution), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()
        ),
        train_data=(inputs, LABELS),
    )
    predicted = peak_bytes(task, BATCH)
    assert predicted == pytest.approx(profiled(lambda: train(task, BATCH)), rel=0.05)


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("model", MODELS)
def test_an_evaluation_is_predicted_too(model: str) -> None:
    task = make_task(model, metrics={"accuracy": accuracy})
    probe = MemoryProbe(task, device=CPU)

    def evaluate(size: int) -> None:
        inputs, targets = (
            torch.zeros(size, *leaf.shape[1:], dtype=leaf.dtype) for leaf in task.train_data
        )
        outputs = built(inputs)
        task.loss(outputs, targets)
        accuracy(outputs, targets)

    built = task.model().eval()
    with torch.no_grad():
        counted = profiled(lambda: evaluate(500)) - profiled(lambda: evaluate(50))
    predicted = probe.evaluation_peak_bytes(500, batch_size=1) - probe.evaluation_peak_bytes(
        50, batch_size=1
    )
    assert predicted == pytest.approx(counted, rel=0.01)


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def test_an_evaluation_that_cannot_be_traced_leaves_no_trace() -> None:
    item = lambda outputs, targets: torch.tensor(outputs.sum().item())  # noqa: E731
    probe = MemoryProbe(make_task("cnn", metrics={"item": item}), device=CPU)
    for _ in range(2):
        with pytest.raises(UntraceableError) as caught:
            probe.evaluation_peak_bytes(BATCH, batch_size=BATCH)
        release(caught.value)
    assert probe.peak_bytes(50, batch_size=BATCH) == peak_bytes(make_task("cnn"), 50)


def test_nothing_is_allocated_drawn_or_counted() -> None:
    task = make_task("mlp")
    inputs, targets = task.train_data
    before = inputs.clone()
    state = torch.get_rng_state()
    peak_bytes(task, 2)  # what is imported on the way is none of the prediction's
    resident = process_memory("VmRSS")["VmRSS"]
    predicted = peak_bytes(task, 1_000_000, batch_size=1_000_000)
    assert predicted > 2 * 10**9
    assert process_memory("VmRSS")["VmRSS"] - resident < 2**20
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inputs, before)
    assert type(inputs) is type(targets) is torch.Tensor


@pytest.mark.parametrize("model", MODELS)
def test_the_largest_that_fits_is_the_largest_below_the_margin(model: str) -> None:
    probe = MemoryProbe(make_task(model), device=CPU)
    for batch_size in (4096, 1000):  # the second time with what was learned at the first
        peak = partial(probe.peak_bytes, batch_size=batch_size)
        limit = peak(700) + MARGIN_BYTES
        found = probe.largest_fitting(limit, batch_size=batch_size)
        usable = limit - max(MARGIN_BYTES, limit // 100)
        assert peak(found) <= usable < peak(found + found // 100 + 1)
        assert probe.largest_fitting(2**50, batch_size=batch_size) == batch_size
        assert probe.largest_fitting(MARGIN_BYTES, batch_size=batch_size) == 0


@pytest.mark.usefixtures("plain_kernels")
def test_an_optimizer_that_looks_at_values_is_taken_for_one_without_state() -> None:
    task = make_task("mlp", lambda p, lr: torch.optim.Adafactor(p, lr=lr))
    for size in (9, BATCH):
        measured = profiled(lambda size=size: train(task, size))
        assert 0.6 * measured < peak_bytes(task, size) < 1.01 * measured


def test_a_single_sample_is_not_taken_for_two() -> None:
    one, two, three = (peak_bytes(make_task("transformer"), size) for size in (1, 2, 3))
    assert one < two
    assert three - two == pytest.approx(two - one, rel=0.5)


def test_a_batch_norm_that_refuses_one_sample_is_predicted_with_two() -> None:
    model = lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 10))  # noqa: E731
    task = make_task("mlp", model=model)
    assert peak_bytes(task, 1) == peak_bytes(task, 2)


def test_constants_of_the_users_own_are_taken_as_they_are() -> None:
    weight = torch.ones(10)
    task = make_task("mlp", loss=lambda o, t: nn.functional.cross_entropy(o, t, weight=weight))
    assert peak_bytes(task, 8) == pytest.approx(peak_bytes(make_task("mlp"), 8), rel=0.01)
    assert type(weight) is torch.Tensor


class Prototypes(nn.Module):
    """A loss with a weight for each class, a buffer and a constant of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2**14, 10))
        self.register_buffer("scale", torch.ones(2**14))
        self.kept = [torch.ones(2**14)]

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = outputs @ self.weight.T * self.scale * self.kept[0]
        return nn.functional.cross_entropy(logits, targets)


def test_a_loss_with_parameters_is_counted_and_left_as_it_is() -> None:
    loss = Prototypes()
    before = copy.deepcopy(loss.state_dict())
    weight = loss.weight.nbytes
    for _ in range(2):  # the first leaves nothing that the second would find
        probe = MemoryProbe(make_task("mlp", loss=loss), device=CPU)
        plain = peak_bytes(make_task("mlp"), 2)
        # The parameter, its gradient, Adam's two averages and, passing, a microbatch's gradient.
        assert 4 * weight < probe.peak_bytes(2, batch_size=BATCH) - plain < 6 * weight
        assert probe.evaluation_peak_bytes(2, batch_size=BATCH) > 4 * weight
        assert loss.weight.grad is None
        assert_equal(dict(loss.state_dict()), dict(before))
        assert {type(t) for t in (loss.weight.data, loss.scale, *loss.kept)} == {torch.Tensor}


def looks_at_values(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(outputs, targets)
    return loss if loss.item() > 0 else -loss


class Repeated(nn.Module):
    """A loop, as in a recurrent network."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.layer = nn.Linear(144, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(x.flatten(1))
        for _ in range(self.times):
            outputs = outputs + 1
        return outputs


def test_what_would_take_minutes_to_follow_is_given_up_at_once() -> None:
    probe = MemoryProbe(make_task("mlp", model=lambda: Repeated(1000)), device=CPU)
    assert probe.peak_bytes(8, batch_size=8) > 0
    seen = []

    def model() -> nn.Module:
        seen.append(1)
        return Repeated(MOST_OPERATIONS)

    with pytest.raises(UntraceableError, match=r"more than 15,000 operations, .* long"):
        MemoryProbe(make_task("mlp", model=model), device=CPU)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": looks_at_values}, "DataDependentOutputException"),
        ({"loss": lambda o, t: o[o > 0].sum()}, "DynamicOutputShapeException"),
        ({"loss": lambda o, t: torch.as_tensor(o.detach().numpy()).sum()}, "Error"),
        ({"model": lambda: nn.Linear(7, 7)}, "RuntimeError"),
    ],
)
def test_what_needs_values_is_said_to_be_untraceable(changes: Any, reason: str) -> None:
    with pytest.raises(UntraceableError, match=rf"cannot be predicted: \w*{reason}: .*run it"):
        MemoryProbe(make_task("mlp", **changes), device=CPU)
