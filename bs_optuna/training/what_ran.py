"""What really ran in a training, as a trial stores it."""

from __future__ import annotations

from bs_optuna.sampling import attributes
from bs_optuna.training.loop import TrainingRun


def what_ran(run: TrainingRun) -> dict[str, object]:
    """The attributes that say what a run was; None for what is not known or did not happen.

    Args:
        run: One that has ended, well or not.
    """
    return {
        attributes.LEARNING_RATE: run.settings.learning_rate,
        attributes.EFFECTIVE_BATCH_SIZE: run.settings.batch_size,
        attributes.MICROBATCH_SIZE: run.microbatch_size,
        attributes.ACCUMULATION_STEPS: run.accumulation_steps,
        attributes.BACKOFFS: len(run.failed_sizes) - run.gave_up,
        attributes.PEAK_MEMORY_BYTES: run.peak_memory_bytes(),
        attributes.SECONDS: run.seconds,
        attributes.SAMPLES: run.samples,
        attributes.STEPS: run.steps,
        attributes.WARMUP: run.warmup,
        attributes.OOM_ATTEMPTS: run.lost.attempts or None,
        attributes.OOM_SECONDS: run.lost.seconds or None,
        **{f"{attributes.VALID_PREFIX}{name}": mean for name, mean in run.values.items()},
    }
