"""Peak memory of a training step, predicted on fake tensors: nothing is allocated, nothing runs.

The predictions are advice on where to start. They do not see what an operation allocates inside
itself, except the unfolded input of a convolution, nor how an allocator fragments; see
`LiveStorages`.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import optree
import torch
from torch import nn

# No public way leads to it; tests/training/test_memory_probe.py says first when it goes.
from torch._subclasses.fake_tensor import FakeTensorMode

from bs_optuna.errors import TaskError
from bs_optuna.errors import UntraceableError
from bs_optuna.science.memory import largest_fitting as search
from bs_optuna.training.batches import call_model
from bs_optuna.training.batches import moved
from bs_optuna.training.data import bytes_per_sample
from bs_optuna.training.data import first_samples
from bs_optuna.training.fake_leftovers import own_copy
from bs_optuna.training.live_storages import LiveStorages
from bs_optuna.training.live_storages import TooManyOperationsError
from bs_optuna.training.modes import begin_training
from bs_optuna.training.modes import evaluating
from bs_optuna.training.oom import release
from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.snapshot import parameters_of
from bs_optuna.training.stepping import GuardedStep
from bs_optuna.training.task import TrainingTask


# It logs operations that it refuses, with a traceback; here they end in one UntraceableError.
_FAKE_TENSORS = logging.getLogger("torch._subclasses.fake_tensor")
# What a step needs beside its tensors: an arena of Python's objects (1 MiB), some small blocks, and
# in a large memory what the allocator cannot use.
MARGIN_BYTES = 3 * 2**19
MARGIN_FRACTION = 0.01
# In what is followed at once: it takes one or two seconds, and a study follows about ten sizes.
MOST_OPERATIONS = 15_000


def usable_bytes(limit_bytes: int) -> int:
    """What a step is predicted into: a limit less a margin for what cannot be predicted."""
    return limit_bytes - max(MARGIN_BYTES, int(MARGIN_FRACTION * limit_bytes))


class MemoryProbe:
    """A fake copy of a task's training, on which steps of any size can be tried out.

    Each size is followed once, whatever the batch that it is part of.

    Args:
        task: What would be trained.
        device: Where it would be trained.

    Raises:
        UntraceableError: The training cannot be followed without values: its code looks at them
            (``.item()``, shapes that depend on data), or uses what has no fake counterpart; or it
            would take minutes. The methods raise it too.
    """

    def __init__(self, task: TrainingTask, *, device: torch.device) -> None:
        # A fake accelerator needs a real one; the CPU's kernels then stand for its own.
        self._device = device if device.type in ("cpu", "cuda") else torch.device("cpu")
        self._fake = _FakeMode(allow_non_fake_inputs=True)
        self._storages = LiveStorages(self._device.type, most_operations=MOST_OPERATIONS)
        self._sample: Any = first_samples(task.train_data, 1)
        self._evaluated: Any = first_samples(task.valid_data, 1)  # it may be larger
        self._sample_bytes = bytes_per_sample(task.train_data, self._device)
        self._model = begin_training(self._made(task))
        with self._tracing():
            fake = _fake_tensors(task.loss, self._device)
        # As a trial copies it; outside, because its own tensors that are no buffers are constants.
        self._loss = own_copy(task.loss, fake)
        self._metrics = [own_copy(metric, {}) for metric in task.metrics.values()]
        with self._tracing():
            modules = [m for m in (self._model, self._loss) if isinstance(m, nn.Module)]
            # AccumulatedBackward keeps a copy of each buffer, to undo a failed attempt.
            self._copies = [buffer.clone() for m in modules for buffer in m.buffers()]
            make_optimizer = optimizer_factory(task.optimizer)
            self._update = GuardedStep(make_optimizer(parameters_of(modules), 1e-3))
        # If it is the optimizer that looks at values, as Adafactor does, one without state, whose
        # parameters are copied for each step as those are, stands for it.
        stand_in = GuardedStep(torch.optim.SGD(parameters_of(modules), foreach=False))
        self._least, self._first_bytes = self._first_step(stand_in)
        # The first one had no state that would have been copied.
        self._steps = {self._least: max(self._first_bytes, self._step(self._least))}
        self._evaluations: dict[int, int] = {}

    def peak_bytes(self, microbatch_size: int, *, batch_size: int) -> int:
        """Most bytes held at a time while a batch is trained on in microbatches of a size.

        Gradients and optimizer state are there already, as in every step but the first, and the
        optimizer's first step, which creates its state, counts too. So does the whole batch.
        """
        size = max(microbatch_size, self._least)
        if size not in self._steps:
            self._steps[size] = max(self._first_bytes, self._step(size))
        return batch_size * self._sample_bytes + self._steps[size]

    def evaluation_peak_bytes(self, size: int, *, batch_size: int) -> int:
        """Likewise while the model is evaluated in pieces of a size, beside the last batch."""
        if size not in self._evaluations:
            self._evaluations[size] = self._evaluation(size)
        return batch_size * self._sample_bytes + self._evaluations[size]

    def largest_fitting(self, limit_bytes: int, *, batch_size: int) -> int:
        """The largest microbatch size, to within 1 %, whose step stays below a limit; 0 if none.

        A margin is left for what cannot be predicted.
        """
        peak_bytes = partial(self.peak_bytes, batch_size=batch_size)
        return search(peak_bytes, usable_bytes(limit_bytes), most=batch_size, seen=self._steps)

    def largest_evaluation(self, limit_bytes: int, *, batch_size: int, most: int) -> int:
        """Likewise, the largest piece of at most ``most`` samples for an evaluation."""
        peak_bytes = partial(self.evaluation_peak_bytes, batch_size=batch_size)
        return search(peak_bytes, usable_bytes(limit_bytes), most=most, seen=self._evaluations)

    def _made(self, task: TrainingTask) -> nn.Module:
        """A fake model; where making one needs values, the likeness of a real one.

        PyTorch's `trunc_normal_` draws again what lies outside, and looks whether anything does.
        """
        try:
            with self._tracing(), self._device:  # a fake module cannot be moved once it is made
                return task.model()
        except UntraceableError as error:
            release(error)
            untraceable = error
        try:
            real = task.model()
            with self._tracing():
                fake = _fake_tensors(real, self._device)
            return copy.deepcopy(real, fake)
        except Exception as error:
            release(error)
            raise untraceable from None

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        self._storages.operations = 0
        try:
            _FAKE_TENSORS.disabled = True
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")  # the training itself will say it again
                with self._fake, self._storages:
                    yield
        except TooManyOperationsError:
            raise UntraceableError(
                f"Memory cannot be predicted: a step takes more than {MOST_OPERATIONS:,} "
                "operations, which would take long to follow; give --memory-limit, under which it "
                "is measured unless samples vary in length, or run it to see what fits."
            ) from None
        except TaskError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(". ")
            raise UntraceableError(
                f"Memory cannot be predicted: {type(error).__name__}: {reason}. The training needs "
                "values, or what has no fake counterpart; give --memory-limit, under which it is "
                "measured unless samples vary in length, or run it to see what fits."
            ) from error
        finally:
            _FAKE_TENSORS.disabled = False

    def _first_step(self, stand_in: GuardedStep) -> tuple[int, int]:
        """The fewest samples that can be traced and their peak, by the stand-in if need be.

        BatchNorm, and what squeezes its outputs, refuses a single sample.
        """
        for update in (self._update, stand_in):
            self._update = update
            for samples in (1, 2):
                try:
                    # Only a second pass finds gradients, as all after it do.
                    return samples, self._step(samples, passes=2)
                except UntraceableError as error:
                    release(error)  # what it holds would be counted
                    untraceable = error
                if self._storages.operations > MOST_OPERATIONS:
                    raise untraceable
        raise untraceable

    def _step(self, size: int, *, passes: int = 1) -> int:
        """The peak of a step on one microbatch, which itself does not count."""
        with self._tracing():
            self._storages.peak = self._storages.live
            inputs, targets = moved(_repeated(self._sample, size), self._device)
            for _ in range(passes):
                loss = self._loss(call_model(self._model, inputs), targets)
                (loss * 0.5).backward()
                del loss
            self._update()
        return self._storages.peak - size * self._sample_bytes

    def _evaluation(self, size: int) -> int:
        # The fused transformer layer is one operation, which does not tell what it needs.
        modes = evaluating(self._model, self._loss)
        with modes, self._tracing(), torch.no_grad(), _without_fused_layers():
            self._storages.peak = self._storages.live
            inputs, targets = moved(_repeated(self._evaluated, size), self._device)
            outputs = call_model(self._model, inputs)
            for function in (self._loss, *self._metrics):
                function(outputs, targets)
        return self._storages.peak


def _fake_tensors(module: object, device: torch.device) -> dict[int, Any]:
    """What stands for each parameter and buffer of a module in a copy of it, by their ids."""
    if not isinstance(module, nn.Module):
        return {}
    fake: dict[int, Any] = {id(b): torch.empty_like(b, device=device) for b in module.buffers()}
    for p in module.parameters():
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


def _repeated(batch: Any, size: int) -> Any:
    """A batch of another size."""
    return optree.tree_map(lambda leaf: leaf.new_empty((size, *leaf.shape[1:])), batch)


class _FakeMode(FakeTensorMode):
    """Stays one mode when a layer is copied, as `nn.Transformer` does: its tensors lead here."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _FakeMode:
        return self
