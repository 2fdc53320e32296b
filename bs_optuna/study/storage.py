"""From a storage URL to an Optuna storage that several workers can share."""

from __future__ import annotations

import json
import random
import time
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path

import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.storages import InMemoryStorage
from optuna.storages import JournalStorage
from optuna.storages import RDBStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import ArgumentError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from bs_optuna.errors import ConfigError
from bs_optuna.errors import StudyError
from bs_optuna.study.files import check_writable
from bs_optuna.study.sqlite import BUSY_TIMEOUT_S
from bs_optuna.study.sqlite import check_sqlite_file
from bs_optuna.study.sqlite import serialize_transactions


JOURNAL_SUFFIXES = (".journal", ".log")
HEARTBEAT_INTERVAL_S = 60
MAX_RETRY = 2  # how often a trial whose worker died is run again
_ATTEMPTS = 8  # of workers that make the same tables at the same time; two are enough as a rule
# What to install for a kind of database, and how its URLs then begin.
_DRIVERS = {
    "postgresql": "install the extra 'postgresql' (psycopg) and write postgresql+psycopg://...",
    "mysql": "run pip install PyMySQL and write mysql+pymysql://...",
    "mariadb": "run pip install PyMySQL and write mariadb+pymysql://...",
}
_EXAMPLES = "sqlite:///studies/mine.db, postgresql://user@host/database or studies/mine.journal"


def open_storage(url: str, *, heartbeat_interval: int = HEARTBEAT_INTERVAL_S) -> BaseStorage:
    """Open what a storage URL names; make it where it is new.

    Args:
        url: An SQLAlchemy URL, or the path of a journal file (`.journal` or `.log`).
        heartbeat_interval: Seconds between two signs of life of a running trial. One that gave
            none for three intervals is failed and queued again. Journals have no heartbeat.

    Raises:
        StudyError: It cannot be opened, or holds something else than studies of this Optuna.
    """
    if "://" not in url:
        return _open_journal(url)
    try:
        parsed = sqlalchemy.make_url(url)
    except ArgumentError as error:
        raise StudyError(f"{url!r} is no storage URL; write e.g. {_EXAMPLES}") from error
    if parsed.get_backend_name() != "sqlite":
        _check_connection(parsed)
        return _open_database(parsed, heartbeat_interval=heartbeat_interval)
    if parsed.database in (None, "", ":memory:"):
        return InMemoryStorage()
    if parsed.database.startswith("file:"):
        raise StudyError(f"{url!r} is a file URI; write sqlite:///PATH instead")
    path = Path(parsed.database)
    storage = _open_database(
        parsed,
        heartbeat_interval=heartbeat_interval,
        has_tables=check_sqlite_file(path),
        engine_settings={"connect_args": {"timeout": BUSY_TIMEOUT_S}},
    )
    serialize_transactions(storage, path)
    return storage


def _open_journal(location: str) -> JournalStorage:
    path = Path(location)
    if path.suffix not in JOURNAL_SUFFIXES:
        raise StudyError(
            f"{location!r} is no storage URL; did you mean sqlite:///{location}? "
            f"A journal's name ends in {' or '.join(JOURNAL_SUFFIXES)}"
        )
    check_writable(path)
    if path.exists() and not _is_journal(path):
        raise StudyError(f"{path} is no journal of Optuna; name another file with --storage")
    return JournalStorage(JournalFileBackend(location))


def _is_journal(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(1_000_000)
    try:
        return not line or "op_code" in json.loads(line)
    except (ValueError, TypeError):
        return False


def _check_connection(url: sqlalchemy.URL) -> None:
    """Connect once, so that a missing driver or server is told at once and not retried."""
    try:
        sqlalchemy.create_engine(url, poolclass=NullPool).connect().close()
    except ImportError as error:
        raise StudyError(
            f"{_hide_password(url)} needs a driver that is not installed ({error}); "
            + _DRIVERS.get(url.get_backend_name(), "install the one it names")
        ) from error
    except ArgumentError as error:
        raise StudyError(
            f"{_hide_password(url)} is of no kind that SQLAlchemy knows; write e.g. {_EXAMPLES}"
        ) from error
    except SQLAlchemyError as error:
        raise StudyError(
            f"{_hide_password(url)} cannot be reached ({reason(error)}); "
            "check that the server runs, and the user, password and database in --storage"
        ) from error


def _open_database(
    url: sqlalchemy.URL,
    *,
    heartbeat_interval: int,
    has_tables: bool = False,
    engine_settings: Mapping[str, object] | None = None,
) -> RDBStorage:
    engine_settings = engine_settings or {}
    _make_tables(url, has_tables=has_tables, engine_settings=engine_settings)
    with warnings.catch_warnings():
        # Heartbeats have been experimental in Optuna since 2.9.
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs=dict(engine_settings),
            heartbeat_interval=heartbeat_interval,
            # A sign of life may wait BUSY_TIMEOUT_S for a lock: two intervals would be too few.
            grace_period=3 * heartbeat_interval,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRY),
            skip_table_creation=True,
        )
    # A study cannot be closed: its connections are, when it is let go of.
    weakref.finalize(storage, storage.engine.dispose)
    return storage


def _make_tables(
    url: sqlalchemy.URL, *, has_tables: bool, engine_settings: Mapping[str, object]
) -> None:
    """Make what lacks and check what is there; again, if another worker makes it just now."""
    attempt = 0
    while True:
        attempt += 1
        try:
            RDBStorage(
                url.render_as_string(hide_password=False),
                # Without a pool no connection stays open where the constructor fails.
                engine_kwargs={**engine_settings, "poolclass": NullPool},
                # A database of another Optuna is not to get tables of this one.
                skip_table_creation=has_tables,
            )
            return
        except RuntimeError as error:
            message = str(error).replace("$STORAGE_URL", _hide_password(url))
            raise StudyError(f"{_hide_password(url)} cannot be opened: {message}") from error
        except (SQLAlchemyError, StorageInternalError) as error:
            if attempt == _ATTEMPTS:
                raise StudyError(
                    f"{_hide_password(url)} cannot be opened ({reason(error)}); "
                    "mend it, or name another with --storage"
                ) from error
        time.sleep(random.uniform(0.0, 0.2 * attempt))


def storage_file(url: str) -> Path | None:
    """The file that holds a storage; None for one on a server.

    Raises:
        ConfigError: It is in the memory of this process, where no other one can reach it.
    """
    if "://" not in url:
        return Path(url)
    parsed = sqlalchemy.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    if parsed.database in (None, "", ":memory:"):
        raise ConfigError(
            f"storage={url}; is in memory, where worker processes cannot share it. "
            "Name a file, as in sqlite:///studies/mine.db."
        )
    return Path(parsed.database)


def without_password(storage: str) -> str:
    """The storage as it may be shown and stored: what stands for a password is starred out."""
    if "://" not in storage or sqlalchemy.make_url(storage).password is None:
        return storage
    return _hide_password(sqlalchemy.make_url(storage))


def _hide_password(url: sqlalchemy.URL) -> str:
    return url.render_as_string(hide_password=True)


def reason(error: BaseException) -> str:
    """The first line of the driver's own message, which lies under SQLAlchemy's and Optuna's."""
    if isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    return str(error).strip().partition("\n")[0]
