"""SQLite made fit for several workers, and files that hold something else left alone.

Optuna's default settings lose trials when several workers share an SQLite file: waiting for a
lock gives up after 5 s, and an enqueued trial can be taken by two workers, because the reading
and the writing of its state are two transactions. With the settings made here every transaction
asks for the write lock when it begins, and waits for it.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage
from sqlalchemy import Connection
from sqlalchemy import event

from bs_optuna.errors import StudyError
from bs_optuna.study.files import check_writable
from bs_optuna.study.files import network_file_system


BUSY_TIMEOUT_S = 60  # how long a transaction waits for the one before it

_logger = logging.getLogger(__name__)


def check_sqlite_file(path: Path) -> bool:
    """Whether the file holds Optuna's tables already; it is read, never changed.

    A file that is missing or empty is free to become a study.

    Raises:
        StudyError: The file cannot be written, is no SQLite database, or is somebody else's.
    """
    check_writable(path)
    if not path.exists():
        return False
    try:
        tables = _read_tables(path)
    except sqlite3.OperationalError as error:
        raise StudyError(
            f"{path} cannot be read ({error}); "
            "end the program that holds it, or name another file with --storage"
        ) from error
    except sqlite3.DatabaseError as error:
        raise StudyError(
            f"{path} is no SQLite database ({error}); "
            "name another file with --storage sqlite:///FILE.db"
        ) from error
    # Optuna makes the table of studies first: a file that another worker is just making has it.
    if tables and not {"study_id", "study_name"} <= tables.get("studies", set()):
        raise StudyError(
            f"{path} is an SQLite database of another program, with the table "
            f"{min(tables)!r}; name another file with --storage sqlite:///FILE.db"
        )
    return "alembic_version" in tables


def _read_tables(path: Path) -> dict[str, set[str]]:
    """Names of the columns by name of the table."""
    # mode=rw, not ro: the first reader after a crash has to roll the unfinished write back.
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=BUSY_TIMEOUT_S
    )
    try:
        rows = connection.execute(
            "SELECT m.name, c.name FROM sqlite_master AS m, pragma_table_info(m.name) AS c "
            "WHERE m.type = 'table'"
        ).fetchall()
    finally:
        connection.close()
    tables: dict[str, set[str]] = {}
    for table, column in rows:
        tables.setdefault(table, set()).add(column)
    return tables


def serialize_transactions(storage: RDBStorage, path: Path) -> None:
    """Turn on write-ahead logging and let every transaction begin with the write lock.

    It has to be done after the storage is built: its constructor opens a second connection
    while the first is in a transaction, and would wait for itself.
    """
    file_system = network_file_system(path)
    if file_system is not None:
        _logger.warning(
            "%s lies on %s, where SQLite cannot use its write-ahead log and locks may fail: "
            "with workers on several machines use a PostgreSQL URL or a .journal file",
            path,
            file_system,
        )

    def set_up(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver would begin transactions by itself
        if file_system is None:
            connection.execute("PRAGMA journal_mode = WAL")
        # Safe with the log against crashes of the program; a power cut may undo the last trial.
        connection.execute("PRAGMA synchronous = NORMAL")

    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()
    event.listen(storage.engine, "connect", set_up)
    event.listen(storage.engine, "begin", begin)
