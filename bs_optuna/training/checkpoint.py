"""The state of a run in a file, for another process to go on with if this one dies."""

from __future__ import annotations

import logging
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


_logger = logging.getLogger(__name__)


class CheckpointFile:
    """A file that holds the last state that was written, whole or not at all.

    Args:
        path: Where it is, or will be; its folder is made when needed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.part")

    def write(self, state: dict[str, Any]) -> None:
        """Puts the state in the place of what the file holds.

        A state that cannot be written, because the disk is full or it holds what cannot be stored,
        is warned of and nothing else: it would cost work only if the process died.
        """
        try:
            self._path.parent.mkdir(exist_ok=True)
            with self._part.open("wb") as file:  # by name it would not say that the disk is full
                torch.save(state, file)
            os.replace(self._part, self._path)
        except (OSError, RuntimeError, TypeError, AttributeError, pickle.PicklingError) as error:
            _remove(self._part)
            _warn("written", self._path, error)

    def read(self) -> dict[str, Any] | None:
        """The state on the CPU; None, with a warning unless there is no file, if it is unreadable.

        Tensors and plain containers are read and nothing else: a file cannot run code.
        """
        if not self._path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may lead to any
            _warn("read", self._path, error)
            return None
        return state

    def remove(self) -> None:
        """Removes the file, and what a process that was killed left of one."""
        _remove(self._part)
        _remove(self._path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # it is not there, or no one could have written it
        path.unlink()


def _warn(what: str, path: Path, error: Exception) -> None:
    if isinstance(error.__context__, OSError):
        error = error.__context__
    reason = str(error).partition("\n")[0]
    _logger.warning(
        "checkpoint %s cannot be %s (%s); a trial whose worker dies begins anew", path, what, reason
    )
