"""A PostgreSQL server that ends all connections during a study, and takes no new ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy


# Its third model is that of the second trial; the first is made to look at the task.
TASK = """
import os
import sqlalchemy
import torch
from bs_optuna.training import TrainingTask

models = 0

def model():
    global models
    models += 1
    if models == 3:
        engine = sqlalchemy.create_engine(os.environ["SERVER"], isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for end in (
                "ALTER DATABASE failing ALLOW_CONNECTIONS false",
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'failing'",
            ):
                connection.execute(sqlalchemy.text(end))
        engine.dispose()
    return torch.nn.Linear(1, 1)

def task():
    x = torch.linspace(-1, 1, 128)[:, None]
    data = (x, 2 * x)
    return TrainingTask(
        name="failing", model=model, loss=torch.nn.MSELoss(), train_data=data, valid_data=data
    )
"""


@pytest.fixture
def database(postgresql: str) -> Iterator[str]:
    engine = sqlalchemy.create_engine(f"{postgresql}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE DATABASE failing"))
        yield f"{postgresql}/failing"
        connection.execute(sqlalchemy.text("DROP DATABASE failing"))
    engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("where", [(), ("--isolate",)], ids=["alone", "in a worker"])
def test_it_is_one_line_that_names_the_storage_without_password(
    postgresql: str, database: str, tmp_path: Path, where: tuple[str, ...]
) -> None:
    (tmp_path / "failing.py").write_text(TASK)
    run = subprocess.run(
        [
            sys.executable, "-W", "error", "-m", "bs_optuna.tune", "failing.py", "--batch-size",
            "8:16", "--storage", database.replace("tester@", "tester:secret@"), "--budget",
            "steps=20", "--final-runs", "0", *where,
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SERVER": f"{postgresql}/postgres"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"error: {database.replace('tester@', 'tester:***@')} failed (")
    assert line.endswith("server runs. Finished trials are kept; the same command goes on.")
