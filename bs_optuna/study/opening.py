"""Opening a study: new or resumed, shared by workers, and only if it is the one asked for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from sqlalchemy.exc import ArgumentError

from bs_optuna.errors import StudyError
from bs_optuna.study.agreement import check_direction
from bs_optuna.study.agreement import check_search_space
from bs_optuna.study.storage import HEARTBEAT_INTERVAL_S
from bs_optuna.study.storage import open_storage
from bs_optuna.study.storage import storage_file
from bs_optuna.study.storage import without_password


def open_study(
    *,
    storage: str | BaseStorage,
    name: str,
    sampler: BaseSampler | None = None,
    pruner: BasePruner | None = None,
    direction: Literal["minimize", "maximize"] = "minimize",
    search_space: Mapping[str, BaseDistribution] | None = None,
    heartbeat_interval: int = HEARTBEAT_INTERVAL_S,
) -> optuna.Study:
    """Open a study, or make it where there is none of that name; any number of workers may.

    An SQLite file gets a write-ahead log and transactions that wait for each other, so that no
    trial is lost or run twice. A trial whose worker died is failed and queued again, at most
    twice. Every worker process opens the study itself: a pickled study loses these settings.

    Args:
        storage: A URL (`sqlite:///studies/mine.db`, `postgresql://user@host/database`), the path
            of a journal file (`studies/mine.journal`), or a storage of Optuna, taken as it is.
        name: Name of the study within the storage.
        sampler: Optuna's default where None.
        pruner: Optuna's default where None.
        direction: `minimize` or `maximize`.
        search_space: What the objective will suggest, by name; compared with the stored trials.
        heartbeat_interval: Seconds between two signs of life of a running trial; one that gave
            none for three intervals counts as dead. Only databases have it.

    Raises:
        StudyError: The storage cannot be opened or written, holds something else, or has a study
            of that name with another direction or search space. No stored study was changed.
    """
    if isinstance(storage, str):
        storage = open_storage(storage, heartbeat_interval=heartbeat_interval)
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        sampler=sampler,
        pruner=pruner,
        direction=direction,
        load_if_exists=True,
    )
    check_direction(study, direction)
    if search_space is not None:
        check_search_space(study, search_space)
    return study


def refuse_missing(storage: str, name: str) -> None:
    """Refuses a study that is not there, and makes nothing.

    Raises:
        StudyError: There is none of that name, or the storage cannot be opened.
    """
    file = None
    with suppress(ArgumentError):  # of what is no URL, as opening it will say
        file = storage_file(storage)
    if file is None or file.exists():
        names = optuna.get_all_study_names(open_storage(storage))
        if name in names:
            return
    raise StudyError(
        f"There is no study {name!r} in {without_password(storage)} to tell of; run it with "
        "trials=1 or more, or correct --study or --storage."
    )
