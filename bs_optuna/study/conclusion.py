"""What a study comes to: the recommended setting, and how it does when trained anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import TrialState

from bs_optuna.errors import DivergedError
from bs_optuna.errors import StudyError
from bs_optuna.errors import TrainingError
from bs_optuna.sampling import attributes
from bs_optuna.sampling.recommend import recommend
from bs_optuna.sampling.recommendation import Recommendation
from bs_optuna.science.noise_scale import NoiseReading
from bs_optuna.science.noise_scale import pooled
from bs_optuna.study.task_errors import named_errors
from bs_optuna.study.tuning import Tuning
from bs_optuna.training.final_run import FinalRun
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import empty_caches
from bs_optuna.training.oom import release
from bs_optuna.training.schedule import LONGEST_WARMUP


# Added to the study's seed for the final runs, so that no trial has had theirs.
FINAL_SEEDS = 1_000_000


@dataclass(frozen=True)
class Conclusion:
    """The recommended setting and its scores.

    Attributes:
        batch_size: Samples per optimizer step.
        learning_rate: Peak of the schedule.
        warmup: Part of the run in which the learning rate rises.
        microbatch_size: The one that the recommended trial ran with.
        accumulation_steps: Microbatches per step at that size.
        evidence: The posterior behind it; None if there were too few trials for one.
        valid: Validation loss and metrics, by name, one value per final run that succeeded.
        test: Likewise on the test data.
        failed: Final runs that diverged or ran out of memory.
        noise_scales: Gradient noise scale in samples, over all final runs, by the part of the run,
            in hundredths, after which it was read; None where it is more than can be told.
        noise_samples: Samples that each of them was read from, in all runs together.
    """

    batch_size: int
    learning_rate: float
    warmup: float
    microbatch_size: int
    accumulation_steps: int
    evidence: Recommendation | None
    valid: dict[str, list[float]]
    test: dict[str, list[float]]
    failed: int
    noise_scales: dict[str, float | None]  # JSON has no other keys
    noise_samples: int


def conclude(tuning: Tuning, *, final_runs: int) -> Conclusion | None:
    """Recommends a setting of the study and trains it anew.

    The test data is looked at here for the first time, and the scores are those of new seeds: the
    value of the best trial is the luckiest of many, these are not.

    Args:
        tuning: A study with its objective.
        final_runs: How often to train the recommended setting.

    Returns:
        None if no trial was completed.

    Raises:
        TrainingError: The task's own code raised an error.
    """
    trial, evidence = _recommended(tuning.study)
    if trial is None:
        tuning.study.set_user_attr(attributes.RECOMMENDATION, {"trials": tuning.finished})
        return None
    runs: list[FinalRun] = []
    for k in range(final_runs):
        try:
            with named_errors(f"final run {k + 1} of trial {trial.number}'s setting"):
                run = tuning.objective.confirm(
                    trial.params["batch_size"],
                    trial.params["lr"],
                    seed=tuning.objective.seed + FINAL_SEEDS + k,
                    study=tuning.study,
                )
        except (DivergedError, MemoryError, TrainingError) as error:
            if not isinstance(error, DivergedError) and classify(error) is None:
                raise
            release(error)
            empty_caches()
            continue
        runs.append(run)
    conclusion = replace(
        _untested(trial, evidence),
        valid=_by_name([run.valid for run in runs]),
        test=_by_name([run.test for run in runs]),
        failed=final_runs - len(runs),
        **_noise(runs),
    )
    stored = {**_plain(asdict(conclusion)), "trials": tuning.finished}
    tuning.study.set_user_attr(attributes.RECOMMENDATION, stored)
    return conclusion


def _by_name(scores: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for values in scores for name in values)
    return {name: [values[name] for values in scores if name in values] for name in names}


def _noise(runs: Sequence[FinalRun]) -> dict[str, Any]:
    readings: dict[int, list[NoiseReading]] = {}
    for run in runs:
        for part, reading in run.noise.items():
            readings.setdefault(part, []).append(reading)
    samples = {
        part: sum(run.noise_samples for run in runs if part in run.noise) for part in readings
    }
    scales = {part: pooled(found).noise_scale for part, found in sorted(readings.items())}
    # A signal that is less than the noise of all samples together may be nothing but that.
    told = {str(p): None if s is None or s > samples[p] else s for p, s in scales.items()}
    return {"noise_scales": told, "noise_samples": max(samples.values(), default=0)}


def as_found(tuning: Tuning) -> Conclusion | None:
    """What `conclude` would recommend now; nothing is trained or stored.

    Returns:
        None if no trial was completed. Its scores are those of earlier final runs of the setting.
    """
    trial, evidence = _recommended(tuning.study)
    if trial is None:
        return None
    found = _untested(trial, evidence)
    stored = tuning.study.user_attrs.get(attributes.RECOMMENDATION, {})
    if any(stored.get(name) != getattr(found, name) for name in ("batch_size", "learning_rate")):
        return found
    tested = ("valid", "test", "failed", "noise_scales", "noise_samples")
    return replace(found, **{name: stored[name] for name in tested if name in stored})


def _untested(trial: optuna.trial.FrozenTrial, evidence: Recommendation | None) -> Conclusion:
    batch_size = trial.params["batch_size"]
    return Conclusion(
        batch_size=batch_size,
        learning_rate=trial.params["lr"],
        warmup=trial.user_attrs.get(attributes.WARMUP, LONGEST_WARMUP),
        microbatch_size=trial.user_attrs.get(attributes.MICROBATCH_SIZE, batch_size),
        accumulation_steps=trial.user_attrs.get(attributes.ACCUMULATION_STEPS, 1),
        evidence=evidence,
        valid={},
        test={},
        failed=0,
        noise_scales={},
        noise_samples=0,
    )


def _recommended(
    study: optuna.Study,
) -> tuple[optuna.trial.FrozenTrial | None, Recommendation | None]:
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        return None, None
    try:
        evidence = recommend(study)
    except StudyError:  # too few trials for a posterior: the best one is all there is
        return study.best_trial, None
    assert evidence.trial_number is not None  # asked for one that was tried
    return study.trials[evidence.trial_number], evidence


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
