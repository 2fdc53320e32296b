"""TrainingObjective: an Optuna objective that trains a task."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import optuna
import torch
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from bs_optuna.errors import DivergedError
from bs_optuna.errors import MicrobatchDoesNotFitError
from bs_optuna.errors import ThrashingError
from bs_optuna.sampling import attributes
from bs_optuna.sampling.feasibility import mark_memory
from bs_optuna.training.attempt import Attempt
from bs_optuna.training.budget import Budget
from bs_optuna.training.final_run import FinalRun
from bs_optuna.training.final_run import train_final
from bs_optuna.training.known_sizes import KnownSizes
from bs_optuna.training.known_sizes import learned
from bs_optuna.training.loop import TrainingRun
from bs_optuna.training.memory_key import memory_key
from bs_optuna.training.memory_limit import memory_limit as limit_memory
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import empty_caches
from bs_optuna.training.oom import release
from bs_optuna.training.random_states import private_random_state
from bs_optuna.training.rehearsal import load_optimizers
from bs_optuna.training.rehearsal import rehearse
from bs_optuna.training.run_settings import OOM_BUDGET
from bs_optuna.training.run_settings import RunSettings
from bs_optuna.training.run_settings import check_enough
from bs_optuna.training.run_settings import check_range
from bs_optuna.training.size_search import SizeSearch
from bs_optuna.training.starting_sizes import StartingSizes
from bs_optuna.training.study_memory import StudyMemory
from bs_optuna.training.task import TrainingTask
from bs_optuna.training.throughput import Throughput
from bs_optuna.training.what_ran import what_ran


# Evaluations of a trial, its end included: often enough to prune, seldom enough not to cost.
EVALUATIONS = 5


class TrainingObjective:
    """Trains a task with a trial's batch size and learning rate and returns its validation value.

    Every trial gets the same budget, is reported to the pruner on samples seen (milliseconds for a
    budget in seconds), and ends in one of four ways: with a value, or pruned as hopeless, diverged,
    or too large for memory with a single sample. Running out of memory otherwise costs a step's
    repetition and changes nothing else. What really ran is stored with the trial, and what it
    learned about memory is where the next one starts, in every worker.

    Args:
        task: What to train.
        budget: What every trial gets.
        batch_size: Smallest and largest batch size to search.
        learning_rate: Smallest and largest peak learning rate to search.
        microbatch_size: Largest microbatch to use; None is the largest that fits, and ``"fastest"``
            the smallest within 3 % of the best throughput, measured before the first trial.
        memory_limit: Bytes that training may hold, None for what the device has.
        oom_budget: Largest part of a trial's time that may be lost to running out of memory, beyond
            the search for a size; a trial that loses more is pruned.
        device: Where to train; None is the accelerator if there is one.
        seed: Of weights and data order; trial number n gets seed + n.
        checkpoints: Folder for the state of running trials, from which another process goes on if
            this one dies; None writes none.
        processes: How many processes train on the device at a time, each with an objective; they
            share what is free there, which is what a trial plans for where there is no limit.

    Raises:
        TaskError: The training data holds fewer samples than the largest batch size.
        ConfigError: A range is inverted or not positive, or the memory limit cannot be enforced.
    """

    def __init__(
        self,
        task: TrainingTask,
        *,
        budget: Budget,
        batch_size: tuple[int, int] = (16, 512),
        learning_rate: tuple[float, float] = (1e-5, 1e-1),
        microbatch_size: int | Literal["fastest"] | None = None,
        memory_limit: int | None = None,
        oom_budget: float = OOM_BUDGET,
        device: torch.device | None = None,
        seed: int = 0,
        checkpoints: Path | None = None,
        processes: int = 1,
    ) -> None:
        check_range("batch_size", *batch_size)
        check_range("learning_rate", *learning_rate)
        check_enough(task, batch_size[1])
        self.task = task
        self.budget = budget
        self.device = device or default_device()
        self._batch_size = batch_size
        self._learning_rate = learning_rate
        self._microbatch_size = microbatch_size
        self._oom_budget = oom_budget
        self.seed = seed
        self._checkpoints = checkpoints
        self._limit = limit_memory(self.device, memory_limit)
        load_optimizers()
        self._limit.warm_up(
            lambda: rehearse(task, device=self.device, learning_rate=learning_rate[0], seed=seed)
        )
        self._warned = False  # that microbatches change BatchNorm
        self._starting_sizes = StartingSizes(
            task,
            device=self.device,
            limit=self._limit,
            batch_size=batch_size[1],
            most=microbatch_size if isinstance(microbatch_size, int) else None,
            processes=processes,
        )
        with private_random_state(self.device):
            key = memory_key(
                task, device=self.device, limit_bytes=self._limit.limit_bytes, processes=processes
            )
        self._memory = StudyMemory(key, self._starting_sizes)

    @property
    def search_space(self) -> dict[str, IntDistribution | FloatDistribution]:
        """The distributions that a trial is asked for."""
        return {
            "batch_size": IntDistribution(*self._batch_size, log=True),
            "lr": FloatDistribution(*self._learning_rate, log=True),
        }

    def suggest(self, trial: optuna.Trial) -> tuple[int, float]:
        """The trial's batch size and learning rate; asking again gives the same."""
        return (
            trial.suggest_int("batch_size", *self._batch_size, log=True),
            trial.suggest_float("lr", *self._learning_rate, log=True),
        )

    def __call__(self, trial: optuna.Trial) -> float:
        """Trains with the trial's settings.

        Returns:
            The task's objective on the validation data at the end of the budget.

        Raises:
            optuna.TrialPruned: The trial is hopeless, diverged, or does not fit with one sample.
        """
        batch_size, learning_rate = self.suggest(trial)
        check_enough(self.task, batch_size)  # an enqueued one may lie outside the range
        tell = partial(_set, trial)
        attempt = Attempt.read(trial.number, trial.user_attrs, folder=self._checkpoints)
        if attempt.killed_by is not None:  # known of others under this key from now on
            tell({attributes.MEMORY_KEY: self._memory.key})
        known = self._memory.known(trial.study, batch_size, measure=True)
        search = self._memory.search(trial, batch_size, tell=tell)
        seed = self.seed + attempt.first
        run = self._run(batch_size, learning_rate, seed, known, attempt, search, tell)
        tell(attempt.started(microbatch_size=run.microbatch_size))
        reason, value = attempt.given_up, None
        if known.microbatch.sample_fails:
            reason = "memory: a single sample is known not to fit"
        with private_random_state(self.device):
            try:
                if reason is None:
                    value, reason = self._train(trial, run)
            except DivergedError as error:
                place = "" if error.metric is None else f" in {error.metric}"
                reason = f"{attributes.DIVERGED}{place}: {error}"
            except (MicrobatchDoesNotFitError, ThrashingError) as error:
                reason = f"memory: {error}"
            except Exception as error:
                verdict = classify(error)
                if verdict is None:
                    raise
                reason = f"memory: {verdict.message}"
                release(error)
            finally:
                self._store(trial, run, reason, attempt)
                self._memory.ended(search)
                attempt.remove_checkpoint()
        if reason is not None:
            if reason.startswith("memory"):
                empty_caches()
            raise optuna.TrialPruned(reason)
        assert value is not None
        return value

    def confirm(
        self, batch_size: int, learning_rate: float, *, seed: int, study: optuna.Study
    ) -> FinalRun:
        """Trains once more with given settings and evaluates on test data too.

        Args:
            batch_size: Samples per optimizer step.
            learning_rate: Peak learning rate.
            seed: One that no trial had.
            study: Knows which microbatch sizes fit.

        Raises:
            DivergedError: The loss is not finite.
            MicrobatchDoesNotFitError: A single sample does not fit.
        """
        run = self._run(batch_size, learning_rate, seed, self._memory.known(study, batch_size))
        with private_random_state(self.device):
            return train_final(run, self.task)

    def _run(
        self,
        batch_size: int,
        learning_rate: float,
        seed: int,
        known: KnownSizes,
        attempt: Attempt | None = None,
        search: SizeSearch | None = None,
        tell: Callable[[Mapping[str, object]], None] = lambda found: None,
    ) -> TrainingRun:
        attempt = attempt or Attempt.read(0, {}, folder=None)
        predicted = self._starting_sizes.predicted(batch_size)
        largest = self._microbatch_size
        if largest == "fastest":
            largest = self._fastest(known)
        most = attempt.most(min(batch_size, largest or batch_size))
        size = known.start(most, predicted=predicted.microbatch)
        # What was measured here has run here.
        unseen = self._microbatch_size != "fastest" and self._starting_sizes.searched(batch_size)
        if search is not None and unseen and not known.microbatch.sample_fails:
            size = search.begin(size, known)
        pieces = known.evaluation or predicted.evaluation
        settings = RunSettings(
            batch_size=batch_size,
            learning_rate=learning_rate,
            budget=self.budget,
            seed=seed,
            microbatch_size=size,
            evaluation_batch_size=attempt.most_evaluated(pieces),
            evaluation_killed=attempt.killed_evaluation is not None,
            short_of_memory=known.microbatch.fails is not None,
            evaluations=EVALUATIONS,
            warned=self._warned,
            oom_budget=self._oom_budget,
        )
        return TrainingRun(
            self.task,
            settings,
            device=self.device,
            limit=self._limit,
            search=search,
            file=attempt.file,
            evaluating=lambda piece: tell(attempt.evaluating(piece)),
        )

    def _fastest(self, known: KnownSizes) -> int | None:
        return None if known.early_deaths else self._starting_sizes.measure(known).smallest_fast

    def _train(self, trial: optuna.Trial, run: TrainingRun) -> tuple[float, str | None]:
        value = float("nan")
        for checkpoint in run.evaluations():
            value = checkpoint.values[self.task.objective]
            if self._checkpoints is not None:  # backed off or not, it is what a death would be of
                trial.set_user_attr(attributes.MICROBATCH_SIZE, run.microbatch_size)
            if checkpoint.resource is not None:
                trial.report(value, checkpoint.resource)
                if not checkpoint.last and trial.should_prune():
                    return value, f"hopeless: {self.task.objective} {value:.4g}"
        return value, None

    def _store(
        self, trial: optuna.Trial, run: TrainingRun, reason: str | None, attempt: Attempt
    ) -> None:
        self._warned = run.warned
        measured = self._starting_sizes.measured or Throughput()
        elsewhere = attempt.failed_sizes(fits=run.fits)
        if measured.fails is not None:
            elsewhere.append(measured.fails)
        stored = what_ran(run) | {
            attributes.DEVICE: str(self.device),
            attributes.THROUGHPUT: list(measured.rates.items()) or None,
            attributes.PRUNE_REASON: reason,
        }
        _set(trial, stored | learned(run, self._memory.key, elsewhere=elsewhere))
        mark_memory(trial, fits=not (reason or "").startswith("memory"))


def _set(trial: optuna.Trial, stored: Mapping[str, object]) -> None:
    for key, value in stored.items():
        if value is not None:
            trial.set_user_attr(key, value)


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
