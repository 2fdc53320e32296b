"""Whether a study that exists is the one that was asked for, so that results do not mix."""

from __future__ import annotations

from collections.abc import Mapping

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from bs_optuna.errors import StudyError
from bs_optuna.sampling import attributes


def check_direction(study: Study, direction: str) -> None:
    """Raise StudyError if the study has another direction, or more than one."""
    if study.directions != [StudyDirection[direction.upper()]]:
        found = ", ".join(d.name.lower() for d in study.directions)
        raise StudyError(
            f"Study {study.study_name!r} has the direction {found}, not {direction}; "
            "use another study name (--study)"
        )


def check_search_space(study: Study, search_space: Mapping[str, BaseDistribution]) -> None:
    """Raise StudyError if stored trials were drawn from another search space.

    Optuna lets a range change within a study. Here it is an error too: the trials before and
    after would be compared, and the importance and the recommendation taken over both.
    """
    remedy = "use another study name (--study), or the search space it has"
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        for name, stored in trial.distributions.items():
            asked = search_space.get(name)
            if asked != stored:
                wanted = f"not in {describe(asked)}" if asked else "which was not asked for"
                raise StudyError(
                    f"Study {study.study_name!r} has {name!r} in {describe(stored)}, "
                    f"{wanted}; {remedy}"
                )
    # A trial that was cut short may not have drawn all of its parameters; these have.
    finished = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    drawn = {name for trial in finished for name in trial.distributions}
    for name, asked in search_space.items():
        if finished and name not in drawn:
            raise StudyError(
                f"Study {study.study_name!r} has no parameter {name!r} "
                f"(asked for in {describe(asked)}); {remedy}"
            )


def describe(distribution: BaseDistribution) -> str:
    """A search space in a few words: `1e-05:0.1 (float, log)`."""
    if isinstance(distribution, CategoricalDistribution):
        return str(list(distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    words = ["float" if isinstance(distribution, FloatDistribution) else "int"]
    if distribution.log:
        words.append("log")
    if distribution.step not in (None, 1):
        words.append(f"step {distribution.step}")
    return f"{distribution.low}:{distribution.high} ({', '.join(words)})"


def check_experiment(study: Study, experiment: dict[str, str]) -> None:
    """Refuses to mix trials whose values cannot be compared; a new study takes the experiment.

    Raises:
        StudyError: The study has trials of another one, or of none.
    """
    stored = study.user_attrs.get(attributes.EXPERIMENT)
    if stored is None and study.get_trials(
        deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)
    ):
        raise StudyError(
            f"Study {study.study_name!r} has trials of something else than this command, whose "
            "values would not compare. Use another study name (--study)."
        )
    if stored is None:
        study.set_user_attr(attributes.EXPERIMENT, experiment)
        return
    for key, value in experiment.items():
        if stored.get(key, value) != value:
            raise StudyError(
                f"Study {study.study_name!r} was made with {key}={stored[key]}, now {value}; "
                "values would not compare. Use another study name (--study)."
            )
