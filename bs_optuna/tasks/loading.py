"""Finding a task: built-in by name, in a file, or in a module."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from bs_optuna.errors import TaskError
from bs_optuna.tasks import digits
from bs_optuna.tasks import text
from bs_optuna.training.random_states import kept_random_states
from bs_optuna.training.task import UNNAMED
from bs_optuna.training.task import TrainingTask


BUILT_IN: dict[str, Callable[[], TrainingTask]] = {"digits": digits.task, "text": text.task}
DEFAULT_FUNCTION = "task"
_FILE_PREFIX = "bs_optuna_task_"


def load_task(spec: str) -> TrainingTask:
    """The task that a name, ``FILE.py``, ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION`` stands for.

    Its code finds the generators of Python, NumPy and PyTorch seeded; after it all are as before.

    Raises:
        TaskError: There is no such task, file, module or function, or what it gives is no task.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec]()
    with kept_random_states(torch.device("cpu")):
        # Another process, or another day, must split its data alike.
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return _loaded(spec)


def _loaded(spec: str) -> TrainingTask:
    source, _, function = spec.partition(":")
    if source.endswith(".py"):
        module = _module_from_file(spec, Path(source))
    elif function:
        module = _module_by_name(spec, source)
    else:
        raise TaskError(
            f"task={spec!r}; must be built-in ({', '.join(BUILT_IN)}), a file (my_task.py) or a "
            "function in a module (package.module:function)."
        )
    return _call(spec, module, function or DEFAULT_FUNCTION)


def _module_from_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise TaskError(f"task={spec!r}; there is no file {path}. Check the path.")
    # Like a script: it may import its neighbours.
    sys.path.insert(0, str(path.parent.resolve()))
    name = _module_name(path)
    try:
        return _executed(spec, path, name)
    except ImportError as error:
        # A neighbour imports it in turn, and as a script it would get a copy of its own.
        if name != path.stem or error.name != name:
            raise
        del sys.modules[name]
        return _executed(spec, path, f"{_FILE_PREFIX}{path.stem}")


def _executed(spec: str, path: Path, name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None  # a .py file has a loader
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # so that its classes can be pickled
    try:
        found.loader.exec_module(module)
    except ImportError as error:
        if "relative import with no known parent package" not in str(error):
            raise
        folder, name = path.parent.resolve(), path.stem
        while (folder / "__init__.py").exists():  # a package within others
            folder, name = folder.parent, f"{folder.name}.{name}"
        if name == path.stem:  # a package need not have that file
            folder, name = folder.parent, f"{folder.name}.{name}"
        function = spec.partition(":")[2] or DEFAULT_FUNCTION
        raise TaskError(
            f"task={spec!r}; it imports from its package, which a file named by its path has not. "
            f"Run from {folder} and name {name}:{function}."
        ) from None
    return module


def _module_name(path: Path) -> str:
    """The one by which other processes that it starts can import it too, if that is free."""
    if path.stem.isidentifier() and path.stem not in sys.modules:
        found = importlib.util.find_spec(path.stem)
        if found is not None and found.origin == str(path.resolve()):
            return path.stem
    return f"{_FILE_PREFIX}{path.stem}"


def _module_by_name(spec: str, name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses something itself
        raise TaskError(
            f"task={spec!r}; there is no module {error.name!r}. Run from the folder that holds "
            "it, or name a file (my_task.py)."
        ) from None


def _call(spec: str, module: ModuleType, name: str) -> TrainingTask:
    function: Any = getattr(module, name, None)
    if function is None:
        raise TaskError(
            f"task={spec!r}; {module.__name__.removeprefix(_FILE_PREFIX)} has no {name!r}. "
            f"Define 'def {name}() -> TrainingTask' there."
        )
    task = function() if callable(function) else function
    if not isinstance(task, TrainingTask):
        raise TaskError(
            f"task={spec!r}; {name} gave an object of type {type(task).__name__}; must give a "
            "TrainingTask."
        )
    if task.name == UNNAMED:
        return replace(task, name=module.__name__.removeprefix(_FILE_PREFIX).rpartition(".")[2])
    return task
