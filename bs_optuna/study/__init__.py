"""Opening, sharing and resuming a study."""

from __future__ import annotations

from bs_optuna.study.interruption import requeue_interrupted as requeue_interrupted
from bs_optuna.study.opening import open_study as open_study
