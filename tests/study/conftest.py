"""Real processes that share a study, and a real PostgreSQL server for them."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from sqlalchemy.pool import NullPool


Start = Callable[..., "subprocess.Popen[str]"]

DEADLINE_S = 120


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start Python on a piece of code; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start_process(code: str, *arguments: str, prefix: tuple[str, ...] = ()) -> object:
        preamble = "import optuna, sys\noptuna.logging.set_verbosity(optuna.logging.ERROR)\n"
        process = subprocess.Popen(
            [*prefix, sys.executable, "-W", "error", "-c", preamble + code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_process
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def plain_storage() -> Callable[[str], optuna.storages.RDBStorage]:
    """Open a database as a program with plain Optuna does; it leaves no connection open."""
    return lambda url: optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": NullPool})


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    # Debian's names in PATH are links that choose a version; the real folder has all programs.
    return debian[-1].parent if debian else Path(found).parent if found else None


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """URL of a PostgreSQL server of our own, on loopback, without the last part (database)."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's programs are not installed (Debian: apt install postgresql)")
    user = None
    if os.geteuid() == 0:  # initdb refuses to run as root
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        if user is not None:
            shutil.chown(folder, user)
        data = Path(folder, "data")

        def run(program: str, *arguments: str) -> None:
            subprocess.run(
                [binaries / program, "-D", data, *arguments],
                check=True,
                stdout=subprocess.DEVNULL,
                timeout=DEADLINE_S,
                user=user,
                cwd=folder,
            )

        run("initdb", "--username=tester", "--auth=trust", "--encoding=UTF8", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c fsync=off -k {folder}"
        run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://tester@127.0.0.1:{port}"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
