"""A storage that fails while a study runs: one line for the user, not an error of the task."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from bs_optuna.errors import BsOptunaError
from bs_optuna.errors import StudyError
from bs_optuna.study.storage import reason
from bs_optuna.study.storage import without_password


def is_storage_error(error: BaseException) -> bool:
    """Whether one of Optuna's storages raised it; a task may have a database of its own."""
    if isinstance(error, StorageInternalError):
        return True
    return isinstance(error, SQLAlchemyError | OSError) and any(
        frame.f_globals.get("__name__", "").startswith("optuna.storages.")
        for frame, _ in walk_tb(error.__traceback__)
    )


@contextmanager
def named_storage_errors(storage: str) -> Iterator[None]:
    """A context in which what a storage raises, a full disk as a rule, becomes a StudyError.

    Optuna's thread that stores signs of life says nothing there: the trial meets the error, too.

    Args:
        storage: Its URL, or the path of a journal.

    Raises:
        StudyError: The storage failed.
    """
    before = threading.excepthook

    def hook(thread: threading.ExceptHookArgs) -> None:
        if thread.exc_value is None or not is_storage_error(thread.exc_value):
            before(thread)

    threading.excepthook = hook
    try:
        yield
    except BsOptunaError:
        raise
    except Exception as error:
        failure = _storage_error_below(error)
        if failure is None:
            raise
        raise StudyError(
            f"{without_password(storage)} failed ({reason(failure)}); make room on its disk, or "
            "check that its server runs. Finished trials are kept; the same command goes on."
        ) from error
    finally:
        threading.excepthook = before


def _storage_error_below(error: BaseException | None) -> BaseException | None:
    """The storage's error among this one and those before it: Optuna stumbles over some."""
    while error is not None and not is_storage_error(error):
        error = error.__cause__ or error.__context__
    return error
