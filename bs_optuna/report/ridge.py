"""What a picture of a study shows: its trials, and the learning rates that they support."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from scipy.stats import rankdata

from bs_optuna.errors import StudyError
from bs_optuna.sampling.recommend import names_in
from bs_optuna.sampling.recommend import recommend_each


POINTS = 9  # batch sizes at which the study is asked for the best learning rate


@dataclass(frozen=True)
class Point:
    """A trial.

    Attributes:
        number: Of the trial.
        batch_size: That it had.
        learning_rate: That it had.
        value: None if it was pruned.
        rank: 0 for the worst of the complete trials to 1 for the best, the same for equal values;
            losses of 11 beside 0.1 would hide all else.
    """

    number: int
    batch_size: float
    learning_rate: float
    value: float | None = None
    rank: float = 0.0


@dataclass(frozen=True)
class Ridge:
    """Trials, and the best learning rate for some batch sizes, each with its 90 % interval.

    Attributes:
        complete: At least one, the best last.
        pruned: Those of the two parameters' trials that were.
        batch_sizes: Between the smallest and the largest that was tried, rising.
        best: Learning rate for each of them.
        low: Lower end of the interval for each.
        high: Upper end of the interval for each.
        recommended: Batch size and learning rate of the trial that is recommended.
    """

    complete: tuple[Point, ...]
    pruned: tuple[Point, ...]
    batch_sizes: tuple[int, ...]
    best: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    recommended: tuple[int, float]

    @property
    def tried(self) -> list[float]:
        """The batch sizes of all trials, rising."""
        return sorted(point.batch_size for point in (*self.complete, *self.pruned))

    @property
    def rates(self) -> list[float]:
        """The learning rates of all trials, and the best ones."""
        return [*(p.learning_rate for p in (*self.complete, *self.pruned)), *self.best]


def read_ridge(
    study: optuna.Study,
    *,
    batch_size_name: str | None = None,
    learning_rate_name: str | None = None,
) -> Ridge:
    """The ridge of a study, whichever sampler made it.

    Args:
        study: A study with the two parameters.
        batch_size_name: Name of the batch size in the study; None, here and below, is the name that
            the study's CoupledSampler was given, or else ``"batch_size"``.
        learning_rate_name: Name of the learning rate in the study; ``"lr"``.

    Raises:
        StudyError: There are too few trials to say where the best learning rate lies, or the two
            parameters are not both positive numbers.
    """
    named = names_in(study, batch_size_name, learning_rate_name)
    names = (named.batch_size, named.learning_rate)
    complete = _trials(study, TrialState.COMPLETE, names)
    if not complete:
        raise StudyError(
            f"Study {study.study_name!r} has no complete trial with the parameters {names[0]!r} "
            f"and {names[1]!r} to draw. Run some, or name them with batch_size_name and "
            "learning_rate_name."
        )
    pruned = _trials(study, TrialState.PRUNED, names)
    tried = [trial.params[names[0]] for trial in (*complete, *pruned)]
    if not all(isinstance(size, int | float) and size > 0 for size in tried):
        raise StudyError(
            f"Parameter {names[0]!r} of study {study.study_name!r} is not always a positive "
            "number; name one that is with batch_size_name."
        )
    sizes = sorted({round(size) for size in np.geomspace(min(tried), max(tried), POINTS)})
    advice, *found = recommend_each(
        study, [None, *sizes], batch_size_name=names[0], learning_rate_name=names[1]
    )
    low, high = zip(*(f.learning_rate_interval for f in found), strict=True)
    ranks = _ranks([trial.value or 0.0 for trial in complete], study)
    points = [
        Point(t.number, t.params[names[0]], t.params[names[1]], t.value, rank)
        for t, rank in zip(complete, ranks, strict=True)
    ]
    return Ridge(
        complete=tuple(sorted(points, key=lambda point: point.rank)),
        pruned=tuple(Point(t.number, t.params[names[0]], t.params[names[1]]) for t in pruned),
        batch_sizes=tuple(sizes),
        best=tuple(f.learning_rate for f in found),
        low=low,
        high=high,
        recommended=(advice.batch_size, advice.learning_rate),
    )


def _trials(study: optuna.Study, state: TrialState, names: tuple[str, str]) -> list[FrozenTrial]:
    trials = study.get_trials(deepcopy=False, states=(state,))
    return [trial for trial in trials if all(name in trial.params for name in names)]


def _ranks(values: list[float], study: optuna.Study) -> list[float]:
    order = (rankdata(values) - 1.0) / max(1, len(values) - 1)
    best_last = study.direction == optuna.study.StudyDirection.MAXIMIZE
    return [float(place if best_last else 1.0 - place) for place in order]
