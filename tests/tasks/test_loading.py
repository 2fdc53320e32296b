"""Tasks are found by name, in files and in modules; what is none is refused in one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from bs_optuna.errors import TaskError
from bs_optuna.tasks.loading import load_task


EXAMPLE = Path(__file__).parents[2] / "examples" / "my_task.py"
MODULE = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("example", {str(EXAMPLE)!r})
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
build = example.task
ready = example.task()
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    path = tmp_path / f"tasks_{tmp_path.name}.py"
    path.write_text(MODULE)
    return path


@pytest.mark.parametrize("name", ["digits", "text"])
def test_built_in_tasks_are_found_by_name(name: str) -> None:
    assert load_task(name).name == name


def test_a_file_is_enough() -> None:
    assert load_task(str(EXAMPLE)).name == "wine"


def test_a_function_or_a_task_in_a_file_or_module(module: Path) -> None:
    for spec in (f"{module}:build", f"{module}:ready", f"{module.stem}:build"):
        assert load_task(spec).name == "wine"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist", "task='mnist'; must be built-in (digits, text), a file"),
        ("nowhere.py", "there is no file nowhere.py"),
        ("no_such_module:task", "there is no module 'no_such_module'"),
        ("os.no_such:task", "there is no module 'os.no_such'"),
        ("MODULE", "has no 'task'. Define 'def task() -> TrainingTask' there."),
        ("MODULE:other", "has no 'other'"),
        ("MODULE:number", "number gave an object of type int; must give a TrainingTask."),
    ],
)
def test_what_is_no_task_is_refused(module: Path, spec: str, message: str) -> None:
    with pytest.raises(TaskError, match=re.escape(message)):
        load_task(spec.replace("MODULE", str(module)))


def test_a_module_that_misses_one_itself_says_which(module: Path) -> None:
    module.write_text("import no_such_dependency")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_task(f"{module.stem}:task")


def test_a_file_that_imports_from_its_package_is_refused_with_the_name_that_works(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.with_name("nets.py").touch()
    module.write_text(f"from . import nets\n{MODULE}")
    name = f"{module.parent.name}.{module.stem}:build"
    with pytest.raises(TaskError) as refused:
        load_task(f"{module}:build")
    assert str(refused.value).endswith(f"Run from {module.parents[1]} and name {name}.")
    monkeypatch.chdir(module.parents[1])
    assert load_task(name).name == "wine"


def test_a_file_of_a_package_within_others_is_named_from_the_outermost(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = module.parent
    inner = outer / "inner"
    inner.mkdir()
    for folder in (outer, inner):
        (folder / "__init__.py").touch()
    (outer / "helper.py").touch()
    file = inner / module.name
    file.write_text(f"from ..helper import __name__ as outer\n{MODULE}")
    name = f"{outer.name}.inner.{module.stem}:build"
    with pytest.raises(TaskError) as refused:
        load_task(f"{file}:build")
    assert str(refused.value).endswith(f"Run from {outer.parent} and name {name}.")
    monkeypatch.chdir(outer.parent)
    assert load_task(name).name == "wine"


def test_a_task_without_a_name_takes_that_of_its_file(module: Path) -> None:
    module.write_text(
        f"{MODULE}\nfrom dataclasses import replace\ntask = replace(ready, name='task')"
    )
    assert load_task(str(module)).name == module.stem
    assert load_task(f"{module.stem}:task").name == module.stem


def test_a_neighbour_may_import_the_file_in_turn(module: Path) -> None:
    neighbour = module.with_name(f"neighbour_{module.stem}.py")
    neighbour.write_text(f"from {module.stem} import number\n")
    module.write_text(f"import {neighbour.stem}\n{MODULE}")
    assert load_task(f"{module}:build").name == "wine"


def test_a_file_has_its_own_name_so_that_other_processes_find_it(module: Path) -> None:
    module.write_text(f"{MODULE}\nclass Own: pass\n")
    load_task(f"{module}:build")
    assert sys.modules[module.stem].Own.__module__ == module.stem


def test_data_is_split_alike_in_every_process(tmp_path: Path) -> None:
    path = tmp_path / "drawn.py"
    path.write_text(
        "import random, numpy, torch\n"
        "from bs_optuna.tasks import digits\n"
        "drawn = (random.random(), numpy.random.rand(), torch.rand(()).item())\n"
        "task = digits.task\n"
    )
    found = []
    for _ in range(2):
        load_task(str(path))
        name = next(name for name in sys.modules if name.endswith("drawn"))
        found.append(sys.modules.pop(name).drawn)
    assert found[0] == found[1]
