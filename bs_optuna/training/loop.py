"""One training run within a budget; memory may shrink its microbatches, nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from weakref import WeakMethod

import torch

from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.errors import NoTargetError
from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.science.noise_scale import NoiseReading
from bs_optuna.training.backward import AccumulatedBackward
from bs_optuna.training.checkpoint import CheckpointFile
from bs_optuna.training.data import Data
from bs_optuna.training.data import length
from bs_optuna.training.data import training_batches
from bs_optuna.training.evaluation import Evaluation
from bs_optuna.training.evaluation import largest_piece
from bs_optuna.training.learner import Learner
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.lost import Lost
from bs_optuna.training.lost import check_thrashing
from bs_optuna.training.microbatch_unit import MicrobatchUnit
from bs_optuna.training.noise_probe import NoiseProbe
from bs_optuna.training.peak_memory import PeakMemory
from bs_optuna.training.random_states import restore_random_states
from bs_optuna.training.run_settings import RunSettings
from bs_optuna.training.rungs import Evaluated
from bs_optuna.training.rungs import rungs
from bs_optuna.training.search import Search
from bs_optuna.training.stepping import GuardedStep
from bs_optuna.training.task import TrainingTask
from bs_optuna.training.unusable import check_had_targets
from bs_optuna.training.unusable import check_kind_of_loss
from bs_optuna.training.unusable import check_training_loss
from bs_optuna.training.unusable import check_values


# On accelerators reading a loss waits for the device; every so many steps is soon enough.
STEPS_BETWEEN_CHECKS = 16
# Attributes of a run that say how far it is; the rest follows from the settings.
_PROGRESS = (
    "samples", "steps", "failed_sizes", "_evaluated", "_training_seconds", "_step_progress",
    "_had_targets",
)  # fmt: skip


class TrainingRun:
    """Trains a new model of a task, from one evaluation to the next.

    What really ran can be read at any time, also after the run was left or has failed.

    Args:
        task: What to train.
        settings: With what.
        device: Where.
        limit: In force during the work on batches.
        search: Shares what is found out about memory, see `SizeSearch`; None keeps it here.
        file: Where the state of the run is kept for another process; None keeps none.
        evaluating: Called with the samples in a piece at the begin of each evaluation of a
            checkpoint, and with 0 at its end.

    Attributes:
        settings: With what it trains.
        samples: Training samples seen.
        steps: Optimizer steps done.
        warmup: Part of the run in which the learning rate rises, 0 before the first step.
        microbatch_size: Samples in the largest microbatch of the last step that was tried; where
            they vary in length this and all sizes here are in samples of the longest.
        accumulation_steps: Microbatches of the last step that was tried.
        fits: Largest microbatch that a full step was done with since the last one ran out of
            memory; 0 before the first, and while microbatches held less than the longest sample.
        ran: Largest microbatch that a full step was ever done with.
        failed_sizes: Microbatch sizes that ran out of memory.
        gave_up: Whether nothing smaller was tried after the last of them.
        evaluation_fits: Samples in a piece of an evaluation, if a larger piece did not fit.
        warned: Whether it was said that microbatches change BatchNorm, by now or before.
        values: Validation loss and metrics of the last checkpoint.
        noise_probe: Reads the gradient's noise.
    """

    def __init__(
        self,
        task: TrainingTask,
        settings: RunSettings,
        *,
        device: torch.device,
        limit: MemoryLimit,
        search: Search | None = None,
        file: CheckpointFile | None = None,
        evaluating: Callable[[int], None] = lambda piece: None,
    ) -> None:
        self._task = task
        self.settings = settings
        self._device = device
        self._limit = limit
        self._search = search
        self._file = file
        self._evaluating = evaluating
        self._evaluated: dict[int, dict[str, float]] = {}  # by number of the rung
        self._peak = PeakMemory(device)
        self._total = settings.budget.steps(settings.batch_size)  # None: the clock decides
        self._begin: float | None = None
        self._training_seconds = 0.0
        self._losses: list[Lost] = []
        self.warmup = 0.0
        self.samples = 0
        self.steps = 0
        self.noise_probe = NoiseProbe(
            task.train_data, batch_size=settings.batch_size, device=device, limit=limit
        )
        self._had_targets = False
        self._unit = MicrobatchUnit.of(task)
        self._tried(settings.microbatch_size or settings.batch_size)
        self._held = 0  # in full by the largest microbatch of this step
        self.fits = self.ran = 0
        self.failed_sizes: list[int] = []
        self.gave_up = False
        self.warned = settings.warned
        self.evaluation_fits: int | None = None
        self.values: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Time since the run began."""
        return 0.0 if self._begin is None else time.perf_counter() - self._begin

    @property
    def progress(self) -> float:
        """Part of the budget that is used up, about 1 at the end."""
        if self._total is None:
            return self._training_seconds / self.settings.budget.amount
        return self.steps / self._total

    @property
    def lost(self) -> Lost:
        """What running out of memory has cost so far."""
        return sum(self._losses, Lost())

    def peak_memory_bytes(self) -> int | None:
        """Most memory that the run has held at a time, None if the device does not tell."""
        return self._peak.bytes()

    def evaluations(self) -> Iterator[Evaluated]:
        """Trains and yields an evaluation at each rung, the last one at the end of the budget.

        With a file the state of the run is written there after each evaluation but the last. A run
        that finds its file goes on from there, and yields what was evaluated before once more.

        Raises:
            DivergedError: The loss is not finite.
            MicrobatchDoesNotFitError: A single sample does not fit.
            TaskError: Not one batch has held a target by the first evaluation.
            StepDoesNotFitError: The optimizer's step does not fit.
            ThrashingError: Running out of memory has cost too much.
        """
        self._limit.start_trial()
        self._peak.start()
        self._begin = time.perf_counter()
        settings = self.settings
        self._build()
        random = self._resume()
        batches = training_batches(
            self._task.train_data,
            batch_size=settings.batch_size,
            seed=settings.seed,
            skip=self.steps,
        )
        if random is not None:
            restore_random_states(random, self._device)
        points = rungs(settings.budget, batch_size=settings.batch_size, count=settings.evaluations)
        for k, rung in enumerate(points):
            last = k + 1 == len(points)
            if k not in self._evaluated:
                while self.progress < rung.progress:
                    self._step(batches)
                if not last and self.progress >= points[k + 1].progress:
                    continue  # one large step has passed several rungs: the last of them counts
                data = self._task.valid_data
                check_had_targets(self._had_targets)
                self._evaluating(min(self._evaluation.batch_size, length(data)))
                values = self.evaluate(data)
                self._evaluating(0)
                check_values(values, self.samples)
                self._evaluated[k] = values
                if not last:
                    self._save()
            self.values = self._evaluated[k]
            yield Evaluated(rung.progress, rung.resource, self.values, last=last)

    def evaluate(self, data: Data) -> dict[str, float]:
        """Mean loss and metrics of the model as it is now.

        Raises:
            MicrobatchDoesNotFitError: One sample does not fit.
        """
        values = self._evaluation(self._learner.model, data, within=self._limit.active())
        if self._evaluation.lost.attempts or self.settings.evaluation_killed:
            self.evaluation_fits = self._evaluation.batch_size
        return values

    def gradient_noise(self) -> NoiseReading | None:
        """What a few training samples say of the gradient's noise now; see `NoiseProbe.read`."""
        return self.noise_probe.read(
            self._learner,
            run_samples=self.samples / self.progress,
            seed=self.settings.seed + self.steps,
            microbatch_size=self.fits or self.microbatch_size,
        )

    def _save(self) -> None:
        if self._file is not None:
            progress = {name: getattr(self, name) for name in _PROGRESS}
            state = {**self._learner.state(), "progress": progress, "seconds": self.seconds}
            self._file.write(state)

    def _resume(self) -> dict[str, Any] | None:
        """Loads what the file holds; returns the random states, to be restored last."""
        state = None if self._file is None else self._file.read()
        if state is None:
            return None
        if not self._learner.load(state):
            self._build()
            return None
        for name in _PROGRESS:
            setattr(self, name, state["progress"].get(name, getattr(self, name)))
        self._begin = time.perf_counter() - state["seconds"]
        return dict(state["random"])

    def _build(self) -> None:
        self._learner = Learner(
            self._task, self.settings, self._device, within=self._limit.active()
        )
        self._guarded_step = GuardedStep(self._learner.optimizer)
        self.warmup = self._learner.schedule.warmup
        # Of a budget in seconds the first step is not known; it is taken for the whole warmup.
        self._step_progress = 1.0 / self._total if self._total else self.warmup
        self._backward = self._make_backward()
        pieces = largest_piece(self.microbatch_size, self.settings.evaluation_batch_size)
        self._evaluation = Evaluation(self._learner.task, batch_size=pieces)
        self._losses = [self._backward.lost, self._guarded_step.lost, self._evaluation.lost]

    def _make_backward(self) -> AccumulatedBackward:
        # A cycle would keep the model in memory until the garbage collector comes.
        smaller = WeakMethod(self._smaller)
        backward = AccumulatedBackward(
            self._learner.model,
            self._learner.task.loss,
            count=self._task.count,
            batch_norm=self._task.batch_norm,
            smaller=lambda failed, size: call(failed, size) if (call := smaller()) else size,
            **self._unit.settings(self._task, self.microbatch_size),
        )
        backward.warned |= self.warned
        return backward

    def _smaller(self, failed: int, size: int) -> int:
        unit = self._unit
        wanted = unit.full_size(size)
        # What has run here meets a spike, which passes; less than a sample is nobody's concern.
        if self._search is None or self.fits or not wanted:
            return size
        with self._limit.lifted():
            return unit.limit(self._search.smaller(unit.size(failed), wanted))

    def _step(self, batches: Iterator[tuple[Any, Any]]) -> None:
        begin, settings = time.perf_counter(), self.settings
        inputs, targets = next(batches)
        # The middle of the step, so that neither the first nor the last one is lost to a rate of 0.
        self._learner.schedule.set(self.progress + 0.5 * self._step_progress)
        self._learner.forget_gradients()
        fitted, failures = self.fits, len(self.failed_sizes)
        with self._limit.active():
            loss = self._gradient(inputs, targets)
            if loss is not None:
                self._had_targets = True
                self._guarded_step()
        failed = len(self.failed_sizes) > failures
        self.fits = self._held if failed else max(self.fits, self._held)
        self.ran = max(self.ran, self._held)
        short = not fitted and (failed or settings.short_of_memory)
        if short and settings.evaluation_batch_size is None:
            # Without gradients that fits as a rule.
            self._evaluation.batch_size = 2 * max(1, self.fits)
        if self._search is not None and (failed or self.fits > fitted):
            self._search.learned(self)
        self.samples += settings.batch_size
        self.steps += 1
        if self._device.type == "cpu" or not self._total or self.steps % STEPS_BETWEEN_CHECKS == 0:
            check_training_loss(0.0 if loss is None else float(loss), self.samples)
        if any(lost.attempts for lost in self._losses):
            check_thrashing(self.lost, settings.batch_size, self.seconds, settings.oom_budget)
        taken = time.perf_counter() - begin
        self._training_seconds += taken
        if settings.budget.unit == "seconds":
            self._step_progress = taken / settings.budget.amount

    def _gradient(self, inputs: object, targets: object) -> torch.Tensor | None:
        """The loss, whose gradients there are then; None for a batch without any target."""
        try:
            result = self._backward(inputs, targets)
        except NoTargetError:
            return None
        except MicrobatchDoesNotFitError as error:
            self.failed_sizes += map(self._unit.size, error.sizes_failed)
            self.gave_up = error.sizes_failed[-1:] == error.sizes_tried[-1:]
            self._tried(self._unit.size(error.sizes_tried[-1]))
            raise
        except Exception:
            if self.steps == 0:
                check_kind_of_loss(self._learner.model, self._learner.task.loss, (inputs, targets))
            raise
        self.warned = self._backward.warned
        *failed, ran = result.sizes_tried
        self.failed_sizes += map(self._unit.size, failed)
        # Of samples that vary one batch may hold little: what counts is what the next one may hold.
        limit = ran if self._unit.elements is None else self._backward.microbatch_tokens or ran
        self._tried(self._unit.size(limit), steps=result.accumulation_steps)
        self._held = self._unit.full_size(ran)
        if self.steps == 0 and result.backoffs:
            # What has never run here does not fit; only what has run may grow back to that.
            self._backward = self._make_backward()
            self._losses.append(self._backward.lost)
        return result.loss

    def _tried(self, size: int, *, steps: int | None = None) -> None:
        self.microbatch_size = size
        plan = AccumulationPlan(self.settings.batch_size, size)
        self.accumulation_steps = plan.accumulation_steps if steps is None else steps
