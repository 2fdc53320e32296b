"""One tuning: a task and its settings become a study that runs, resumes and is concluded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
from optuna.pruners import PercentilePruner
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from bs_optuna.config import StudyConfig
from bs_optuna.errors import ConfigError
from bs_optuna.sampling import attributes
from bs_optuna.sampling.feasibility import is_out_of_memory
from bs_optuna.sampling.sampler import CoupledSampler
from bs_optuna.study.agreement import check_experiment
from bs_optuna.study.collecting import imports_left_out
from bs_optuna.study.device import device_named
from bs_optuna.study.interruption import requeue_interrupted
from bs_optuna.study.opening import open_study
from bs_optuna.study.opening import refuse_missing
from bs_optuna.study.storage import open_storage
from bs_optuna.study.storage import without_password
from bs_optuna.study.task_errors import described
from bs_optuna.study.task_errors import named_errors
from bs_optuna.study.task_errors import set_up_of
from bs_optuna.training.budget import Budget
from bs_optuna.training.objective import EVALUATIONS
from bs_optuna.training.objective import TrainingObjective
from bs_optuna.training.rungs import rungs
from bs_optuna.training.task import TrainingTask


Ended = Callable[[optuna.Study, optuna.trial.FrozenTrial], None]

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
DEFAULT_PASSES = 8
DEFAULT_LEARNING_RATES = {"sgd": (1e-4, 1.0)}
DEFAULT_LEARNING_RATES_ELSE = (1e-5, 1e-1)
# So many trials in a row that fit into memory with no microbatch: no other one will.
TRIALS_WITHOUT_MEMORY = 3
# Only trials in the worst quarter of those before them are stopped: a learning rate that wins in
# the end is often behind at first, and a sampler that has found the best region sends all there.
PRUNED_ABOVE_PERCENTILE = 75.0
TRIALS_BEFORE_PRUNING = 5


@dataclass(frozen=True)
class Tuning:
    """A study and the objective that it optimizes.

    Attributes:
        task: What is trained.
        objective: Trains it with a trial's settings.
        study: Holds the trials.
        database: What the study is kept in.
        storage: Its name as the user would give it again, without the password.
        trials: Finished trials that the study shall have after ``run``.
    """

    task: TrainingTask
    objective: TrainingObjective
    study: optuna.Study
    database: BaseStorage
    storage: str
    trials: int

    @property
    def finished(self) -> int:
        """Trials that are complete or pruned."""
        return len(self.study.get_trials(deepcopy=False, states=FINISHED))

    def run(
        self,
        *,
        timeout: float | None,
        started: Callable[[optuna.Trial], None],
        ended: Ended,
    ) -> None:
        """Runs trials until the study has as many as it shall have.

        Args:
            timeout: No trial is started after so many seconds.
            started: Called when a trial has its batch size and learning rate.
            ended: Called after each trial.

        Raises:
            TrainingError: The task's own code raised an error.
            KeyboardInterrupt: A person stopped it; the trial that was running is queued again.
        """

        def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            ended(study, trial)
            others_had_the_rest = self.finished >= self.trials
            if others_had_the_rest or (is_out_of_memory(trial) and nothing_fits(study)):
                study.stop()

        left = max(0, self.trials - self.finished)
        with imports_left_out():
            self._optimize(
                partial(self._train, started), n_trials=left, timeout=timeout, ended=after
            )

    def run_one(
        self,
        *,
        created: Callable[[optuna.Trial], None],
        started: Callable[[optuna.Trial], None],
        ended: Ended,
        training: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Runs one trial, the first in the queue if there is one; for the rest see `run`.

        Call it inside `imports_left_out`.

        Args:
            created: Called when there is a trial, without any setting.
            started: Called when it has its batch size and learning rate.
            ended: Called after it.
            training: Makes the context of what is not done by Optuna: all but storing its end.
        """

        def observed(trial: optuna.Trial) -> float:
            with training():
                created(trial)
                return self._train(started, trial)

        self._optimize(observed, n_trials=1, timeout=None, ended=ended)

    def _train(self, started: Callable[[optuna.Trial], None], trial: optuna.Trial) -> float:
        self.objective.suggest(trial)
        started(trial)
        with named_errors(described(trial)):
            return self.objective(trial)

    def _optimize(
        self,
        objective: Callable[[optuna.Trial], float],
        *,
        n_trials: int,
        timeout: float | None,
        ended: Ended,
    ) -> None:
        self.study.optimize(
            requeue_interrupted(objective),
            n_trials=n_trials,
            timeout=timeout,
            callbacks=[ended],
        )


def prepare(config: StudyConfig, task: TrainingTask, *, checkpoints: Path | None = None) -> Tuning:
    """Checks everything that can be wrong and opens the study; trains nothing.

    Args:
        config: The settings.
        task: What is trained.
        checkpoints: Folder for the state of running trials; None writes none.

    Raises:
        ConfigError: A device that is not there, a limit that cannot be enforced, or a reference
            whose learning rate is out of range.
        TaskError: The training data holds fewer samples than the largest batch size.
        StudyError: The storage cannot be used, the study holds another experiment, or there is none
            and no trials are asked for.
        TrainingError: The task's own code raised an error.
    """
    config = config.for_samples(task.train_samples)
    if config.optimizer is not None:
        task = replace(task, optimizer=config.optimizer)
    optimizer = task.optimizer if isinstance(task.optimizer, str) else "unknown"
    rates = config.lr or DEFAULT_LEARNING_RATES.get(optimizer, DEFAULT_LEARNING_RATES_ELSE)
    _check_reference(config, rates)
    budget = Budget.parse(config.budget or f"samples={DEFAULT_PASSES * task.train_samples}")
    with named_errors(set_up_of(config.task)):
        objective = TrainingObjective(
            task,
            budget=budget,
            batch_size=config.batch_size,
            learning_rate=rates,
            microbatch_size=config.microbatch_size,
            memory_limit=config.memory_limit,
            oom_budget=config.oom_budget,
            device=device_named(config.device),
            seed=config.seed,
            checkpoints=checkpoints,
            processes=max(1, config.worker_processes),
        )
    name = config.study or task.name
    storage = storage_of(config, task)
    low = rungs(budget, batch_size=config.batch_size[0], count=EVALUATIONS)
    if not config.trials:
        refuse_missing(storage, name)
    database = open_storage(storage)
    study = open_study(
        storage=database,
        name=name,
        direction=task.direction,
        search_space=objective.search_space,
        sampler=CoupledSampler(prior=optimizer, reference=config.reference, seed=config.seed),
        pruner=PercentilePruner(
            PRUNED_ABOVE_PERCENTILE,
            TRIALS_BEFORE_PRUNING,
            n_warmup_steps=low[min(1, len(low) - 1)].resource or 0,
        ),
    )
    experiment = {
        "task": Path(config.task).name,
        "objective": task.objective,
        "optimizer": optimizer,
        "budget": str(budget),
    }
    check_experiment(study, experiment)
    _name_value(study, f"validation {task.objective}")
    shown = without_password(storage)
    target = _target(study, config.trials)
    if config.trials:
        study.set_user_attr(attributes.TARGET, target)
        stored = {**config.model_dump(mode="json"), "storage": shown, "study": name}
        study.set_user_attr(attributes.CONFIG, stored)
    return Tuning(task, objective, study, database, shown, target)


def storage_of(config: StudyConfig, task: TrainingTask) -> str:
    """The storage that the settings name, or the file of the study."""
    return config.storage or f"sqlite:///studies/{config.study or task.name}.db"


def _check_reference(config: StudyConfig, rates: tuple[float, float]) -> None:
    """Refuses a known setting that the ranges exclude; from another batch size the law carries it.

    Raises:
        ConfigError: Its batch size can be searched, its learning rate cannot.
    """
    if config.reference is None:
        return
    batch_size, learning_rate = config.reference
    low, high = config.batch_size
    if low <= batch_size <= high and not rates[0] <= learning_rate <= rates[1]:
        raise ConfigError(
            f"reference={batch_size}:{learning_rate:g}; its learning rate must lie in "
            f"lr={rates[0]:g}:{rates[1]:g}. Widen that with --lr, or correct it."
        )


def _target(study: optuna.Study, trials: int) -> int:
    """Finished trials to have in the end: those asked for, or if they are there, as many more.

    What was interrupted on the way to some goes on to that; a study that has all, but was
    interrupted before its final runs, gets these first.
    """
    finished = len(study.get_trials(deepcopy=False, states=FINISHED))
    concluded = study.user_attrs.get(attributes.RECOMMENDATION, {}).get("trials") == finished
    if finished < trials:
        return trials
    asked_before = study.user_attrs.get(attributes.CONFIG, {}).get("trials")
    target = study.user_attrs.get(attributes.TARGET, 0)
    if asked_before == trials and finished < target:
        return int(target)
    return finished + trials if concluded else finished


def _name_value(study: optuna.Study, name: str) -> None:
    """So that the dashboard does not call it "Objective 0"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([name])


def nothing_fits(study: optuna.Study) -> bool:
    """Whether so many trials in a row did not fit that no other one will."""
    last = study.get_trials(deepcopy=False, states=FINISHED)[-TRIALS_WITHOUT_MEMORY:]
    return len(last) == TRIALS_WITHOUT_MEMORY and all(map(is_out_of_memory, last))
