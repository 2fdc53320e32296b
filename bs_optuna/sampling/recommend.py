"""recommend: what the evidence of a study supports, with what is still uncertain about it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.study import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from bs_optuna.errors import ConfigError
from bs_optuna.errors import StudyError
from bs_optuna.sampling import attributes
from bs_optuna.sampling import history
from bs_optuna.sampling.answer import Answer
from bs_optuna.sampling.blas import one_thread
from bs_optuna.sampling.cliff import Cliff
from bs_optuna.sampling.cliff import failed_above
from bs_optuna.sampling.fit import THOROUGH
from bs_optuna.sampling.fit import Fit
from bs_optuna.sampling.recommendation import Recommendation
from bs_optuna.sampling.sampler import CoupledSampler
from bs_optuna.sampling.space import Names
from bs_optuna.sampling.space import Space
from bs_optuna.science.prior import ScalingPrior


Array = NDArray[np.float64]

MINIMUM_TRIALS = 3


def recommend(
    study: Study,
    *,
    batch_size: int | None = None,
    prior: str | ScalingPrior | None = None,
    batch_size_name: str | None = None,
    learning_rate_name: str | None = None,
    momentum_name: str | None = None,
    weight_decay_name: str | None = None,
    seed: int = 0,
) -> Recommendation:
    """The setting that a study supports, by posterior mean instead of the luckiest trial.

    It takes about a second of one core after 30 trials, two after 60, a dozen after 200, and hardly
    more after a thousand.

    Args:
        study: Any Optuna study with one objective and the two parameters, whoever sampled it.
        batch_size: Ask for the learning rate of this batch size, tried or not; the other
            parameters are those of the best trial. None asks for the best setting tried.
        prior: Optimizer or belief; None takes that of the study's CoupledSampler, if it has one, or
            what `bs_optuna.tune` has noted in a study of its own.
        batch_size_name: Name of the batch size in the study; None, here and below, is the name that
            the study's CoupledSampler was given, or else ``"batch_size"``.
        learning_rate_name: Name of the learning rate in the study; ``"lr"``.
        momentum_name: Name of the momentum in the study, if it has one, as in `CoupledSampler`;
            ``"momentum"``.
        weight_decay_name: Name of the weight decay, likewise; ``"weight_decay"``.
        seed: Of the random numbers behind the averages.

    Raises:
        StudyError: The study lacks the parameters, has fewer than three trials that completed with
            a finite value and without violating a constraint, or several objectives, or the batch
            size is not a positive whole number.
    """
    names = names_in(study, batch_size_name, learning_rate_name, momentum_name, weight_decay_name)
    return _answers(study, [batch_size], prior, names, seed)[0]


def recommend_each(
    study: Study,
    batch_sizes: Sequence[int | None],
    *,
    prior: str | ScalingPrior | None = None,
    batch_size_name: str | None = None,
    learning_rate_name: str | None = None,
    seed: int = 0,
) -> list[Recommendation]:
    """What `recommend` says for each of several batch sizes, for about the price of one.

    Args:
        study: As for `recommend`, like all that follow.
        batch_sizes: Those to ask for; None asks for the best setting tried.
        prior: Optimizer or belief.
        batch_size_name: Name of the batch size in the study.
        learning_rate_name: Name of the learning rate in the study.
        seed: Of the random numbers behind the averages.

    Raises:
        StudyError: As for `recommend`.
    """
    names = names_in(study, batch_size_name, learning_rate_name)
    return _answers(study, batch_sizes, prior, names, seed)


def _answers(
    study: Study,
    batch_sizes: Sequence[int | None],
    prior: str | ScalingPrior | None,
    called: Names,
    seed: int,
) -> list[Recommendation]:
    if len(study.directions) > 1:
        raise StudyError(
            f"Study {study.study_name!r} has {len(study.directions)} objectives; "
            "recommend answers for one. Choose among study.best_trials instead."
        )
    for batch_size in batch_sizes:
        whole = isinstance(batch_size, int | np.integer) and not isinstance(batch_size, bool)
        if batch_size is not None and not (whole and batch_size >= 1):
            raise StudyError(f"batch_size is {batch_size}; ask for a whole number, 1 or more.")
    names = (called.batch_size, called.learning_rate)
    trials = _usable(study, names)
    space = Space(_space(trials, names), called)
    if space.ridge is None:
        raise StudyError(
            f"Parameters {names[0]!r} and {names[1]!r} are not both positive numbers; "
            "name two that are."
        )
    belief = _prior(study, prior)
    # One that was pruned early may lack parameters that all the others have.
    trials = history.telling(trials, [axis.name for axis in space.axes])
    broke = failed_above(trials, space)
    cliff = Cliff.seen_in(trials, space, failed=broke, adds_up=belief.momentum_exponent > 0)
    trials = [t for t in trials if not history.has_diverged(t) and t.number not in broke]
    seen = history.read(trials, study.directions)
    belief = history.informed(belief, trials)
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    with one_thread():
        fit = Fit(space, belief, seen, np.random.default_rng(seed), effort=THOROUGH)
        answer = Answer(fit, seen, trials, seed, sign, cliff)
        return [answer.at(size) for size in batch_sizes]


def _usable(study: Study, names: tuple[str, str]) -> list[FrozenTrial]:
    """Trials with both parameters, enough of them completed.

    Raises:
        StudyError: There are too few, or none.
    """
    trials = study.get_trials(deepcopy=False)
    completed = [t for t in trials if t.state == TrialState.COMPLETE]
    for name in names:
        if completed and not any(name in t.params for t in completed):
            known = ", ".join(sorted({n for t in completed for n in t.params})) or "none"
            raise StudyError(
                f"Study {study.study_name!r} has no parameter {name!r}; it has {known}. "
                "Name them with batch_size_name and learning_rate_name."
            )
    usable = [t for t in trials if all(name in t.params for name in names)]
    finished = sum(map(history.is_complete, usable))
    if finished < MINIMUM_TRIALS:
        raise StudyError(
            f"Study {study.study_name!r} has {finished} completed trials with a finite value and "
            f"no constraint violated; a recommendation takes {MINIMUM_TRIALS}. Run more."
        )
    return usable


def _space(trials: Sequence[FrozenTrial], names: tuple[str, str]) -> dict[str, BaseDistribution]:
    """The shared space; a range of the two that changed is replaced by what was tried."""
    space = dict(history.shared_space(trials))
    for name in names:
        if len({repr(t.distributions[name]) for t in trials}) > 1 or name not in space:
            space.pop(name, None)
            tried = [t.params[name] for t in trials]
            if not all(isinstance(v, int | float) and v > 0 for v in tried):
                continue
            if all(isinstance(v, int) for v in tried):
                space[name] = IntDistribution(min(tried), max(tried), log=True)
            else:
                space[name] = FloatDistribution(min(tried), max(tried), log=True)
    return space


def names_in(
    study: Study,
    batch_size: str | None = None,
    learning_rate: str | None = None,
    momentum: str | None = None,
    weight_decay: str | None = None,
) -> Names:
    """The names that are given, else those of the study's sampler, else the usual ones."""
    known = study.sampler.names if isinstance(study.sampler, CoupledSampler) else Names()
    given = {
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "momentum": momentum,
        "weight_decay": weight_decay,
    }
    return replace(known, **{field: name for field, name in given.items() if name is not None})


def _prior(study: Study, prior: str | ScalingPrior | None) -> ScalingPrior:
    if isinstance(prior, ScalingPrior):
        return prior
    if prior is None and isinstance(study.sampler, CoupledSampler):
        return study.sampler.prior
    return _noted(study) if prior is None else ScalingPrior.for_optimizer(prior)


def _noted(study: Study) -> ScalingPrior:
    """What the command line has sampled a study with; others say nothing, or something else."""
    noted = study.user_attrs
    with suppress(KeyError, TypeError, ConfigError):
        belief = ScalingPrior.for_optimizer(noted[attributes.EXPERIMENT]["optimizer"])
        reference = noted[attributes.CONFIG]["reference"]
        return belief if reference is None else belief.with_reference(*reference)
    return ScalingPrior.for_optimizer("unknown")
