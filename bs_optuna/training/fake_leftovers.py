"""What a prediction on fake tensors must not leave behind in the task's own code."""

from __future__ import annotations

import copy
import functools
import gc
import sys
from collections import OrderedDict
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import CellType
from types import FunctionType
from types import MethodType
from types import ModuleType
from types import SimpleNamespace
from typing import Any
from typing import TypeVar

from torch._subclasses.fake_tensor import FakeTensor  # as in `memory_probe`


_Function = TypeVar("_Function", bound=Callable[..., Any])
# Its type has no name in the library.
_CachedFunction = type(functools.lru_cache(lambda: None))
# Not what inherits from them: it may do anything, such as import what it holds.
_CONTAINERS = (dict, OrderedDict, defaultdict, list)
_DEPTH = 3  # to which they are looked into
_LONGEST = 1_000  # of them; what is longer before a training is data, and no cache
# Most modules are of these and the standard library, which keep no tensors of a task.
_LIBRARIES = frozenset({
    *("bs_optuna", "matplotlib", "numpy", "optuna", "optuna_dashboard", "optree", "pydantic"),
    *("rich", "scipy", "sklearn", "sqlalchemy", "torch"),
})  # fmt: skip
_STANDARD = str(Path(functools.__file__).parent)


def own_copy(function: _Function, memo: dict[int, Any]) -> _Function:
    """A copy of a loss or metric that keeps tensors of its own, as a running mean; else itself.

    Args:
        function: What is called; a plain function is not copied, nor a method, whose object may
            hold anything, such as the data.
        memo: As in ``copy.deepcopy``: what stands for objects that are not to be copied.
    """
    if isinstance(function, MethodType):
        return function
    try:
        return copy.deepcopy(function, memo)
    except Exception:  # what cannot be copied is used as it is
        return function


@contextmanager
def no_fake_tensors_left(functions: Iterable[object]) -> Iterator[None]:
    """A context for predictions: what outlives a model is after it as it was before.

    Where a fake tensor has got into a dictionary or list, also in a tuple or a record, it holds
    what it held before; a name that stands for one stands for what it did before; and each
    `functools.lru_cache` that holds one is cleared: in modules, in their classes, in the objects
    that they hold, and in what their functions have closed over. The collector knows of more, but
    not of what it was told to leave alone (`gc.freeze`).

    Args:
        functions: Of the task; the objects of methods, and what others have closed over, are looked
            at too.
    """
    methods = [f.__self__ for f in functions if isinstance(f, MethodType)]
    names = {id(owner): (owner, dict(found)) for owner, found in _owners(methods)}
    containers: dict[int, tuple[Any, Any]] = {}
    cells = [found for function in functions for found in _cells(function)]
    for _, found in names.values():
        for thing in found.values():
            _keep(thing, containers)
    for function in functions:
        _keep(function, containers)
    try:
        yield
    finally:
        for container, kept in containers.values():
            if any(map(_holds_fake, _new(container, kept))):
                _put_back(container, kept)
        for cell, kept in cells:
            with suppress(ValueError):  # it is empty by now
                if cell.cell_contents is not kept and _holds_fake(cell.cell_contents):
                    cell.cell_contents = kept
        for owner, current in _owners(methods):
            before = names[id(owner)][1] if id(owner) in names else {}
            for name, thing in list(current.items()):
                _forget(owner, name, thing, before)


def _keep(thing: Any, containers: dict[int, tuple[Any, Any]], *, depth: int = _DEPTH) -> None:
    """Notes what dictionaries and lists hold, those within them too."""
    kind = type(thing)
    if kind is FunctionType:
        for _, contents in _cells(thing):
            if type(contents) in _CONTAINERS:
                _keep(contents, containers)
    elif kind in _CONTAINERS and len(thing) <= _LONGEST and id(thing) not in containers:
        containers[id(thing)] = (thing, list(thing) if kind is list else dict(thing))
        if depth:
            for value in list(thing if kind is list else thing.values()):
                _keep(value, containers, depth=depth - 1)


def _cells(function: Any) -> list[tuple[CellType, Any]]:
    """What a plain function has closed over, as far as it has a value: cells and contents."""
    cells = function.__closure__ or () if type(function) is FunctionType else ()
    found: list[tuple[CellType, Any]] = []
    for cell in cells:
        with suppress(ValueError):  # it is empty
            found.append((cell, cell.cell_contents))
    return found


def _new(container: Any, kept: Any) -> list[Any]:
    """What a container holds in other places than before."""
    if type(container) is list:
        return [v for i, v in enumerate(container) if i >= len(kept) or v is not kept[i]]
    return [v for key, v in list(container.items()) if key not in kept or v is not kept[key]]


def _put_back(container: Any, kept: Any) -> None:
    if type(container) is list:
        container[:] = kept
    else:
        container.clear()
        container.update(kept)


def _forget(owner: Any, name: str, thing: Any, before: Mapping[str, Any]) -> None:
    function = thing.__func__ if type(thing) in (staticmethod, classmethod) else thing
    if type(function) is _CachedFunction:
        if any(map(_holds_fake, gc.get_referents(function))):
            function.cache_clear()
    elif (name not in before or thing is not before[name]) and _holds_fake(thing):
        with suppress(Exception):  # other people's objects may refuse
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)


def _owners(more: Iterable[object]) -> Iterator[tuple[object, Mapping[str, Any]]]:
    """Modules in which a task's own code may keep something, their classes and objects."""
    met: set[int] = set()
    others = _others()
    for thing in more:
        yield from _owner(thing, met, others)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in others or type(module) is not ModuleType:
            continue
        yield module, vars(module)
        for thing in list(vars(module).values()):
            yield from _owner(thing, met, others)


def _others() -> frozenset[str]:
    """Names that no code of a task has; its file may be called as a module of Python's own."""
    files = {n: getattr(sys.modules.get(n), "__file__", None) for n in sys.stdlib_module_names}
    own = {n for n, file in files.items() if file is not None and not file.startswith(_STANDARD)}
    return _LIBRARIES | (sys.stdlib_module_names - own)


def _owner(
    thing: Any, met: set[int], others: frozenset[str]
) -> Iterator[tuple[object, Mapping[str, Any]]]:
    """The thing and its names if it is a class or an object of a module that may keep something."""
    kind = type(thing)
    is_class = issubclass(kind, type)
    if id(thing) in met or not (is_class or kind.__dictoffset__):
        return
    met.add(id(thing))
    # Asked in this way it is not the thing itself that answers, which may do anything.
    names = type.__dict__["__dict__"].__get__(thing if is_class else kind)
    if str(names.get("__module__", "")).partition(".")[0] in others:
        return
    if not is_class:
        try:
            names = object.__getattribute__(thing, "__dict__")
        except Exception:  # it is a property
            return
    yield thing, names


def _holds_fake(thing: Any, *, depth: int = _DEPTH) -> bool:
    kind = type(thing)
    if kind is FakeTensor:
        return True
    if depth == 0:
        return False
    if kind is list or issubclass(kind, tuple):
        items = thing if len(thing) <= _LONGEST else ()
    elif kind in _CONTAINERS:
        items = list(thing.values()) if len(thing) <= _LONGEST else ()
    elif is_dataclass(kind) or kind is SimpleNamespace:
        items = getattr(thing, "__dict__", {}).values()  # none with slots
    else:
        return False
    return any(_holds_fake(item, depth=depth - 1) for item in items)
