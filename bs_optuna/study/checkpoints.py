"""Where the checkpoints of a study lie, and when they go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna

from bs_optuna.sampling import attributes
from bs_optuna.study.storage import storage_file
from bs_optuna.training.checkpoint import CheckpointFile


@contextmanager
def checkpoint_folder(study: optuna.Study, storage: str) -> Iterator[Path]:
    """A folder for the state of running trials: beside the study's file, or a temporary one.

    It is made when the first is written. In the end it holds at most those of trials that are
    queued, and of other studies in the same file.

    Args:
        study: The study whose trials run meanwhile.
        storage: Where it is kept: a URL or the path of a journal.

    Raises:
        ConfigError: The study is in the memory of this process.
    """
    file = storage_file(storage)
    if file is None:
        with TemporaryDirectory(prefix="bs_optuna-") as temporary:
            yield Path(temporary)
        return
    folder = file.with_name(f"{file.name}.checkpoints")
    try:
        yield folder
    finally:
        for name in _left_over(study):
            CheckpointFile(folder / name).remove()
        with suppress(OSError):  # there is none, or one with those of other studies
            folder.rmdir()


def _left_over(study: optuna.Study) -> set[str]:
    """Checkpoints of trials that ended without a word and are not queued again."""
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for trial in study.get_trials(deepcopy=False):
        if attributes.CHECKPOINT in trial.user_attrs:
            names[trial.state.is_finished()].add(trial.user_attrs[attributes.CHECKPOINT])
    return names[True] - names[False]
