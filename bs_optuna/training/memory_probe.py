"""Peak memory of a training step, predicted on fake tensors: nothing is allocated, nothing runs.

The predictions are advice on where to start. They do not see what an operation allocates inside
itself, except the unfolded input of a convolution (see `_unfolded_bytes`), nor how an allocator
rounds and fragments.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import nn

# No public way leads to these two; tests/training/test_memory_probe.py says first when they go.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bs_optuna.errors import UntraceableError
from bs_optuna.science.memory import largest_fitting as search
from bs_optuna.training.batches import call_model
from bs_optuna.training.batches import moved
from bs_optuna.training.batches import take
from bs_optuna.training.data import first_samples
from bs_optuna.training.oom import release
from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.snapshot import parameters_of
from bs_optuna.training.stepping import GuardedStep
from bs_optuna.training.task import TrainingTask
from bs_optuna.training.weighted_pass import LossFunction


# What a step needs beside its tensors: an arena of Python's objects (1 MiB), some small blocks, and
# in a large memory what the allocator cannot use.
MARGIN_BYTES = 3 * 2**19
MARGIN_FRACTION = 0.01
# CUDA's allocator hands out whole blocks of this size.
CUDA_BLOCK_BYTES = 512


class MemoryProbe:
    """A fake copy of a task's training, on which steps of any size can be tried out.

    Args:
        task: What would be trained.
        device: Where it would be trained.
        batch_size: Samples of a whole batch, which lies in memory while its microbatches run.

    Raises:
        UntraceableError: The training cannot be followed without values: its code looks at them
            (``.item()``, shapes that depend on data), or uses what has no fake counterpart. The
            methods raise it too.
    """

    def __init__(self, task: TrainingTask, *, device: torch.device, batch_size: int) -> None:
        # A fake accelerator needs a real one; the CPU's kernels then stand for its own.
        self._device = device if device.type in ("cpu", "cuda") else torch.device("cpu")
        self._task = task
        self._fake = _FakeMode(allow_non_fake_inputs=True)
        self._storages = _LiveStorages(self._device.type)
        sample: Any = first_samples(task.train_data, 1)
        with self._tracing():
            self._batch = _repeated(sample, batch_size)
            with self._device:  # a fake module cannot be moved once it is made
                self._model = task.model().train()
            fake = _fake_tensors(task.loss, self._device)
        # As a trial copies it; outside, because its own tensors that are no buffers are constants.
        self._loss = copy.deepcopy(task.loss, fake) if fake else task.loss
        with self._tracing():
            modules = [m for m in (self._model, self._loss) if isinstance(m, nn.Module)]
            # AccumulatedBackward keeps a copy of each buffer, to undo a failed attempt.
            self._copies = [buffer.clone() for m in modules for buffer in m.buffers()]
            make_optimizer = optimizer_factory(task.optimizer)
            self._update = GuardedStep(make_optimizer(parameters_of(modules), 1e-3))
        self._batch_size = batch_size
        # If it is the optimizer that looks at values, as Adafactor does, one without state, whose
        # parameters are copied for each step as those are, stands for it.
        stand_in = GuardedStep(torch.optim.SGD(parameters_of(modules), foreach=False))
        self._least, self._first_bytes = self._first_step(stand_in)

    def peak_bytes(self, microbatch_size: int) -> int:
        """Most bytes held at a time while a batch is trained on in microbatches of this size.

        Gradients and optimizer state are there already, as in every step but the first, and the
        optimizer's first step, which creates its state, counts too.
        """
        return max(self._first_bytes, self._step(max(microbatch_size, self._least)))

    def evaluation_peak_bytes(self, size: int) -> int:
        """Most bytes held at a time while the model is evaluated in pieces of this size."""
        # The fused transformer layer is one operation, which does not tell what it needs inside.
        with self._tracing(), torch.no_grad(), _without_fused_layers():
            self._storages.peak = self._storages.live
            inputs, targets = moved(_repeated(self._batch, size), self._device)
            outputs = call_model(self._model.eval(), inputs)
            for function in (self._loss, *self._task.metrics.values()):
                function(outputs, targets)
            self._model.train()
        return self._storages.peak

    def largest_fitting(self, limit_bytes: int) -> int:
        """The largest microbatch size, to within 1 %, whose step stays below a limit; 0 if none.

        A margin is left for what cannot be predicted.
        """
        return search(self.peak_bytes, _usable(limit_bytes), most=self._batch_size)

    def largest_evaluation(self, limit_bytes: int, *, most: int) -> int:
        """Likewise, the largest piece of at most ``most`` samples for an evaluation."""
        return search(self.evaluation_peak_bytes, _usable(limit_bytes), most=most)

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")  # the training itself will say it again
                with self._fake, self._storages:
                    yield
        except Exception as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise UntraceableError(
                f"Memory cannot be predicted: {type(error).__name__}: {reason} The training needs "
                "values, or what has no fake counterpart; run it to see what fits."
            ) from error

    def _first_step(self, stand_in: GuardedStep) -> tuple[int, int]:
        """The fewest samples that can be traced and their peak, by the stand-in if need be.

        BatchNorm, and what squeezes its outputs, refuses a single sample.
        """
        for update in (self._update, stand_in):
            self._update = update
            for samples in (1, 2)[: self._batch_size]:
                try:
                    return samples, self._step(samples)
                except UntraceableError as error:
                    release(error)  # what it holds would be counted
                    untraceable = error
        raise untraceable

    def _step(self, size: int) -> int:
        with self._tracing():
            self._storages.peak = self._storages.live
            part = take(self._batch, slice(0, size))
            for _ in range(2):  # only the second one finds gradients, as all after it do
                self._backward(part)
            self._update()
        return self._storages.peak

    def _backward(self, part: Any) -> None:
        inputs, targets = moved(part, self._device)
        loss = self._loss(call_model(self._model, inputs), targets)
        (loss * 0.5).backward()


def _fake_tensors(loss: LossFunction, device: torch.device) -> dict[int, Any]:
    """What stands for each parameter and buffer of a loss in a copy of it, by their ids."""
    if not isinstance(loss, nn.Module):
        return {}
    fake: dict[int, Any] = {id(b): torch.empty_like(b, device=device) for b in loss.buffers()}
    for p in loss.parameters():
        fake[id(p)] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
    return fake


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _usable(limit_bytes: int) -> int:
    return limit_bytes - max(MARGIN_BYTES, int(MARGIN_FRACTION * limit_bytes))


def _repeated(batch: Any, size: int) -> Any:
    """A batch of another size."""
    return optree.tree_map(lambda leaf: leaf.new_empty((size, *leaf.shape[1:])), batch)


class _FakeMode(FakeTensorMode):
    """Stays one mode when a layer is copied, as `nn.Transformer` does: its tensors lead here."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _FakeMode:
        return self


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, for as long as they live."""

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device_type
        self._sizes: dict[int, int] = {}
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for leaf in optree.tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device_type:
                self._hold(leaf.untyped_storage())
        if self._device_type == "cpu" and not torch.backends.mkldnn.enabled:
            self.peak = max(self.peak, self.live + _unfolded_bytes(func, args, outputs))
        return outputs

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        before = self._sizes.get(key)
        size = storage.nbytes()
        if self._device_type == "cuda":
            size = -(-size // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES
        if before is None:
            weakref.finalize(storage, self._release, key).atexit = False
        self._sizes[key] = size
        self.live += size - (before or 0)
        self.peak = max(self.peak, self.live)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _unfolded_bytes(func: Any, args: Any, outputs: Any) -> int:
    """What a convolution on the CPU holds beside its output without oneDNN and NNPACK; else 0.

    It unfolds every sample into a matrix of channels times kernel size by positions, unless it
    only mixes channels, and copies the channels of a group (aten/src/ATen/native/Convolution.cpp,
    ConvolutionMM2d.cpp and NaiveConvolutionTranspose2d.cpp).
    """
    if func is torch.ops.aten.convolution.default:
        result, (inputs, weight, _, stride, padding, dilation, transposed, _, groups) = (
            outputs,
            args,
        )
    elif func is torch.ops.aten.convolution_backward.default:
        result, inputs, weight, _, stride, padding, dilation, transposed, _, groups = args[:10]
    else:
        return 0
    copied = (inputs.numel() + result.numel()) // groups if groups > 1 else 0
    kernel = weight.shape[2:]
    wide, narrow = (result, inputs) if transposed else (inputs, result)
    unfolded = wide.shape[1] // groups * math.prod(kernel) * math.prod(narrow.shape[2:])
    if {*kernel, *stride} == {1} and not any(padding):
        unfolded = 0
    elif max(dilation) == 1:  # otherwise one sample at a time
        unfolded *= len(inputs)
    return int((copied + unfolded) * inputs.element_size())
