"""Files that cannot hold a study, or hold something else: one clear line, nothing changed."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from bs_optuna.errors import StudyError
from bs_optuna.study import files
from bs_optuna.study import open_study
from bs_optuna.study.files import network_file_system
from bs_optuna.study.storage import open_storage


Start = Callable[..., "subprocess.Popen[str]"]
PlainStorage = Callable[[str], optuna.storages.RDBStorage]


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(storage: str, folder: Path) -> str:
    """The message with which a storage is refused, after a look that nothing has changed."""
    before = contents(folder)
    with pytest.raises(StudyError) as caught:
        open_study(storage=storage, name="s")
    assert contents(folder) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_text_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("Not a database, but all of my notes.\n" * 100)
    message = refused(url(path), tmp_path)
    assert message.startswith(f"{path} is no SQLite database")
    assert "--storage" in message


def test_a_database_of_another_program_gets_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE orders (id INTEGER, price REAL)")
        database.execute("INSERT INTO orders VALUES (1, 9.5)")
    message = refused(url(path), tmp_path)
    assert message.startswith(f"{path} is an SQLite database of another program")
    assert "'orders'" in message


def test_a_table_of_studies_alone_makes_no_database_of_optuna(tmp_path: Path) -> None:
    path = tmp_path / "clinic.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE studies (patient TEXT, drug TEXT)")
    assert "of another program" in refused(url(path), tmp_path)


def test_a_database_that_another_program_holds_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bs_optuna.study.sqlite.BUSY_TIMEOUT_S", 0)
    path = tmp_path / "held.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE orders (id INTEGER)")
        database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StudyError, match=r"held\.db cannot be read \(database is locked\)"):
            open_study(storage=url(path), name="s")


def test_an_empty_file_becomes_a_study(tmp_path: Path, plain_storage: PlainStorage) -> None:
    path = tmp_path / "study.db"
    path.touch()
    open_study(storage=url(path), name="s")
    assert optuna.get_all_study_names(plain_storage(url(path))) == ["s"]


def test_a_database_of_optuna_with_default_settings_is_taken_over(
    tmp_path: Path, plain_storage: PlainStorage
) -> None:
    path = tmp_path / "study.db"
    study = optuna.create_study(storage=plain_storage(url(path)), study_name="s")
    study.add_trial(optuna.create_trial(value=1.0))
    assert [trial.value for trial in open_study(storage=url(path), name="s").trials] == [1.0]


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "study.db").mkdir()
    assert refused(url(tmp_path / "study.db"), tmp_path).startswith(f"{tmp_path}/study.db is a f")


def test_the_last_folder_is_made(tmp_path: Path) -> None:
    open_study(storage=url(tmp_path / "studies" / "study.db"), name="s")
    assert (tmp_path / "studies" / "study.db").is_file()


def test_no_more_than_the_last_folder_is_made(tmp_path: Path) -> None:
    message = refused(url(tmp_path / "mistyped" / "studies" / "study.db"), tmp_path)
    assert f"there is no folder {tmp_path}/mistyped;" in message


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "studies").touch()
    assert "cannot be made" in refused(url(tmp_path / "studies" / "study.db"), tmp_path)


def test_a_tilde_makes_no_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused("sqlite:///~/study.db", tmp_path)
    assert message.endswith(f"write {Path.home() / 'study.db'}")


@pytest.fixture
def open_tree() -> Iterator[Path]:
    """A folder that every user can enter; pytest's own are for one user."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def unprivileged() -> tuple[str, ...]:
    """What to put before a command so that permissions hold for it, even for root."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("runs as root, and there is no setpriv to give up root's privileges")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


OPEN = """
from bs_optuna.errors import StudyError
from bs_optuna.study import open_study

try:
    open_study(storage=sys.argv[1], name="s")
except StudyError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", ["db", "journal"])
@pytest.mark.parametrize("read_only", ["folder", "file"])
def test_read_only(
    start: Start, open_tree: Path, unprivileged: tuple[str, ...], read_only: str, suffix: str
) -> None:
    path = open_tree / f"study.{suffix}"
    storage = url(path) if suffix == "db" else str(path)
    if read_only == "file":
        open_study(storage=storage, name="s")
    place = path if read_only == "file" else open_tree
    before = contents(open_tree)
    place.chmod(0o555)
    try:
        printed, errors = start(OPEN, storage, prefix=unprivileged).communicate()
    finally:
        place.chmod(0o755)
    assert printed.startswith(f"{place} is read-only for this user; make it writable"), errors
    assert contents(open_tree) == before


def test_a_folder_that_may_not_be_made(
    start: Start, open_tree: Path, unprivileged: tuple[str, ...]
) -> None:
    open_tree.chmod(0o555)
    try:
        storage = url(open_tree / "studies" / "study.db")
        printed, errors = start(OPEN, storage, prefix=unprivileged).communicate()
    finally:
        open_tree.chmod(0o755)
    assert printed.startswith(f"{open_tree}/studies cannot be made (Permission denied)"), errors


def test_an_sqlite_file_gets_the_settings_for_several_workers(tmp_path: Path) -> None:
    storage = open_storage(url(tmp_path / "study.db"), heartbeat_interval=60)
    assert isinstance(storage, optuna.storages.RDBStorage)
    with storage.engine.connect() as connection:

        def setting(name: str) -> object:
            return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()

        assert setting("journal_mode") == "wal"
        assert setting("synchronous") == 1
        assert setting("busy_timeout") == 60_000
        # The open transaction holds the write lock though nothing was written.
        with closing(sqlite3.connect(tmp_path / "study.db", timeout=0)) as other:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
            assert other.execute("SELECT COUNT(*) FROM trials").fetchone() == (0,)


def mount_table(tmp_path: Path) -> Path:
    table = tmp_path / "mounts"
    table.write_text(
        "/dev/vda / ext4 rw,relatime 0 0\n"
        f"server:/export {tmp_path}/net nfs4 rw,vers=4.2 0 0\n"
        f"/dev/vdb {tmp_path}/net/local xfs rw 0 0\n"
        f"server:/space {tmp_path}/with\\040space nfs rw 0 0\n"
    )
    return table


def test_network_file_systems_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOUNTS", mount_table(tmp_path))
    assert network_file_system(tmp_path / "study.db") is None
    assert network_file_system(tmp_path / "net" / "study.db") == "nfs4"
    assert network_file_system(tmp_path / "network" / "study.db") is None
    assert network_file_system(tmp_path / "net" / "local" / "study.db") is None
    assert network_file_system(tmp_path / "with space" / "study.db") == "nfs"
    monkeypatch.setattr(files, "MOUNTS", tmp_path / "none")
    assert network_file_system(tmp_path / "net" / "study.db") is None


def test_no_write_ahead_log_on_a_network_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "MOUNTS", mount_table(tmp_path))
    (tmp_path / "net").mkdir()
    path = tmp_path / "net" / "study.db"
    study = open_study(storage=url(path), name="s")
    study.add_trial(optuna.create_trial(value=1.0))
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert f"{path} lies on nfs4" in caplog.text
