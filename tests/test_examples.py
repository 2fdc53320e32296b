"""Every example runs as its own first lines say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from children import run_python


ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_it_says(path: Path, tmp_path: Path) -> None:
    said = re.search(r"^    python (.*)$", path.read_text(), re.MULTILINE)
    assert said is not None, f"{path.name} does not say how it is run"
    arguments = shlex.split(said[1])
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run = run_python("-W", "error", *arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
