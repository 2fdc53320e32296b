"""What a storage URL may be, and what is said where it cannot be opened."""

from __future__ import annotations

import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from bs_optuna.errors import StudyError
from bs_optuna.study import open_study


PlainStorage = Callable[[str], optuna.storages.RDBStorage]


def refused(storage: str) -> str:
    with pytest.raises(StudyError) as caught:
        open_study(storage=storage, name="s")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_path_is_no_url() -> None:
    assert "did you mean sqlite:///studies/mine.db?" in refused("studies/mine.db")


def test_a_url_that_cannot_be_read() -> None:
    assert "'://' is no storage URL; write e.g. sqlite:///" in refused("://")


def test_a_file_uri() -> None:
    assert "write sqlite:///PATH instead" in refused("sqlite:///file:x.db?uri=true")


def test_a_database_that_nobody_knows() -> None:
    assert refused("nosuch://host/x").startswith("nosuch://host/x is of no kind that SQLAlchemy")


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("mysql+asyncmy", "run pip install PyMySQL and write mysql+pymysql://..."),
        ("mariadb+asyncmy", "run pip install PyMySQL and write mariadb+pymysql://..."),
        (
            "postgresql+psycopg2cffi",
            "install the extra 'postgresql' (psycopg) and write postgresql+psycopg://...",
        ),
        ("oracle", "install the one it names"),
    ],
)
def test_a_driver_that_is_not_installed(kind: str, remedy: str) -> None:
    message = refused(f"{kind}://u:secret@host/x")
    assert "needs a driver that is not installed (No module named" in message
    assert message.endswith(remedy)
    assert "secret" not in message
    assert "u:***@host" in message


def test_no_server_is_told_without_the_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    message = refused(f"postgresql+psycopg://u:secret@127.0.0.1:{port}/x")
    assert "cannot be reached (" in message
    assert "Connection refused" in message
    assert "secret" not in message


def test_a_postgresql_database_that_does_not_exist(postgresql: str) -> None:
    assert 'database "nosuch" does not exist' in refused(f"{postgresql}/nosuch")


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_study_in_memory(url: str) -> None:
    study = open_study(storage=url, name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=2)
    assert len(study.trials) == 2


def test_a_storage_of_optuna_is_taken_as_it_is() -> None:
    storage = optuna.storages.InMemoryStorage()
    open_study(storage=storage, name="s")
    assert optuna.get_all_study_names(storage) == ["s"]


def test_a_journal_is_made_and_resumed(tmp_path: Path) -> None:
    path = str(tmp_path / "studies" / "mine.log")
    open_study(storage=path, name="s").add_trial(optuna.create_trial(value=1.0))
    assert [trial.value for trial in open_study(storage=path, name="s").trials] == [1.0]


@pytest.mark.parametrize("text", ["2026-01-01 server started\n", "[1, 2]\n", '{"a": 1}\n', "7\n"])
def test_a_log_of_another_program_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "server.log"
    path.write_text(text)
    assert refused(str(path)).startswith(f"{path} is no journal of Optuna")
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("revision", "remedy"),
    [("v2.6.0.a", "optuna storage upgrade --storage sqlite:///"), ("v99.0.0.a", "pip install -U")],
)
def test_a_database_of_another_optuna_is_left_alone(
    tmp_path: Path, plain_storage: PlainStorage, revision: str, remedy: str
) -> None:
    path = tmp_path / "study.db"
    plain_storage(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        database.execute("DROP TABLE trial_heartbeats")  # one that Optuna 2.6 did not have
    before = path.read_bytes()
    message = refused(f"sqlite:///{path}")
    assert message.startswith(f"sqlite:///{path} cannot be opened: The runtime optuna version")
    assert remedy in message
    assert path.read_bytes() == before


def test_a_damaged_database_is_told(tmp_path: Path, plain_storage: PlainStorage) -> None:
    path = tmp_path / "study.db"
    plain_storage(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE version_info")
    assert "cannot be opened (no such table: version_info); mend it" in refused(f"sqlite:///{path}")
