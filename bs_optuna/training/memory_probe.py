"""Peak memory of a training step, predicted on fake tensors: nothing is allocated, nothing runs.

The predictions are advice on where to start. They do not see what an operation allocates inside
itself, except the unfolded input of a convolution (see `_unfolded_bytes`), nor how an allocator
rounds and fragments.
"""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch

# No public way leads to these two; tests/training/test_memory_probe.py says first when they go.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bs_optuna.science.memory import largest_fitting as search
from bs_optuna.training.backward import call_model
from bs_optuna.training.backward import moved
from bs_optuna.training.backward import take
from bs_optuna.training.data import first_samples
from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.task import TrainingTask


_logger = logging.getLogger(__name__)

# A single sample is counted as two, because BatchNorm refuses it.
FEWEST_SAMPLES = 2
# What a step needs beside its tensors: small blocks, Python's objects.
MARGIN_BYTES = 2**19
MARGIN_FRACTION = 0.01
# CUDA's allocator hands out whole blocks of this size.
CUDA_BLOCK_BYTES = 512
# Most samples that a convolution without oneDNN unfolds at once.
UNFOLDED_TOGETHER = 15


class MemoryProbe:
    """A fake copy of a task's training, on which steps of any size can be tried out.

    Args:
        task: What would be trained.
        device: Where it would be trained.
        batch_size: Samples of a whole batch, which lies in memory while its microbatches run.

    Raises:
        Exception: Whatever the task's own code raises where it cannot run without values.
    """

    def __init__(self, task: TrainingTask, *, device: torch.device, batch_size: int) -> None:
        # A fake accelerator needs a real one; the CPU's kernels then stand for its own.
        self._device = device if device.type in ("cpu", "cuda") else torch.device("cpu")
        self._task = task
        self._fake = _FakeMode(allow_non_fake_inputs=True)
        self._storages = _LiveStorages(self._device.type)
        sample: Any = first_samples(task.train_data, 1)
        with self._tracing():
            self._batch = optree.tree_map(lambda leaf: _repeated(leaf, batch_size), sample)
            with self._device:  # a fake module cannot be moved once it is made
                self._model = task.model().train()
            # AccumulatedBackward keeps a copy of each buffer, to undo a failed attempt.
            self._copies = [buffer.clone() for buffer in self._model.buffers()]
            make_optimizer = optimizer_factory(task.optimizer)
            self._optimizer = make_optimizer(self._model.parameters(), 1e-3)
        self._batch_size = batch_size
        self._least = min(FEWEST_SAMPLES, batch_size)
        self._first_bytes = self._step(self._least)

    def peak_bytes(self, microbatch_size: int) -> int:
        """Most bytes held at a time while a batch is trained on in microbatches of this size.

        Gradients and optimizer state are there already, as in every step but the first, and the
        optimizer's first step, which creates its state, counts too.
        """
        return max(self._first_bytes, self._step(max(microbatch_size, self._least)))

    def largest_fitting(self, limit_bytes: int) -> int:
        """The largest microbatch size, to within 1 %, whose step stays below a limit; 0 if none.

        A margin is left for what cannot be predicted.
        """
        usable = limit_bytes - MARGIN_BYTES - int(MARGIN_FRACTION * limit_bytes)
        return search(self.peak_bytes, usable, most=self._batch_size)

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # the training itself will say it again
            with self._fake, self._storages:
                yield

    def _step(self, size: int) -> int:
        with self._tracing():
            self._storages.peak = self._storages.live
            part = take(self._batch, slice(0, size))
            for _ in range(2):  # only the second one finds gradients, as all after it do
                self._backward(part)
            self._optimizer.step()
        return self._storages.peak

    def _backward(self, part: Any) -> None:
        inputs, targets = moved(part, self._device)
        loss = self._task.loss(call_model(self._model, inputs), targets)
        (loss * 0.5).backward()


def predict_peak_bytes(
    task: TrainingTask, microbatch_size: int, *, device: torch.device, batch_size: int
) -> int | None:
    """Most bytes that training a task in microbatches of a size would hold at a time.

    Model, gradients, optimizer state and one batch are counted, other data is not.

    Args:
        task: What would be trained.
        microbatch_size: Samples in a microbatch.
        device: Where it would be trained.
        batch_size: Samples of a whole batch.

    Returns:
        None where the training cannot be followed without values: its code looks at them
        (``.item()``, shapes that depend on data) or uses what has no fake counterpart.
    """
    return _advice(
        lambda: MemoryProbe(task, device=device, batch_size=batch_size).peak_bytes(microbatch_size)
    )


def largest_fitting(
    task: TrainingTask, limit_bytes: int, *, device: torch.device, batch_size: int
) -> int | None:
    """The largest microbatch size that is predicted to fit, 0 if a single sample is not.

    Args:
        task: What would be trained.
        limit_bytes: What it may hold.
        device: Where it would be trained.
        batch_size: Samples of a whole batch.

    Returns:
        None where nothing can be predicted; see `predict_peak_bytes`.
    """
    return _advice(
        lambda: MemoryProbe(task, device=device, batch_size=batch_size).largest_fitting(limit_bytes)
    )


def _advice(predict: Callable[[], int]) -> int | None:
    try:
        return predict()
    except Exception as error:
        # Whatever goes wrong here is no fault of the training, which can do without advice.
        reason = (str(error).splitlines() or [""])[0]
        _logger.info("no prediction of memory: %s: %s", type(error).__name__, reason)
        return None


def _repeated(leaf: torch.Tensor, size: int) -> torch.Tensor:
    return torch.empty((size, *leaf.shape[1:]), dtype=leaf.dtype, device=leaf.device)


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
    """What a convolution on the CPU holds beside its output when oneDNN is off; else 0.

    It unfolds each sample into a matrix of channels times kernel size by output positions, unless
    the kernel is a single point: all samples at once if they are less than 16, one at a time from
    there on (use_nnpack in aten/src/ATen/native/Convolution.cpp). Counted as if more samples
    needed what 15 do, because a batch may also be cut into microbatches that small.
    """
    if func is torch.ops.aten.convolution.default:
        result, inputs, weight, groups = outputs, args[0], args[1], args[8]
    elif func is torch.ops.aten.convolution_backward.default:
        result, inputs, weight, groups = args[0], args[1], args[2], args[9]
    else:
        return 0
    kernel, positions = math.prod(weight.shape[2:]), math.prod(result.shape[2:])
    if kernel == 1:
        return 0
    matrix = inputs.shape[1] // groups * kernel * positions * inputs.element_size()
    return int(matrix * min(len(inputs), UNFOLDED_TOGETHER))
