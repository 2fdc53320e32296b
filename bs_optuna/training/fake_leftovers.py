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
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import is_dataclass
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
# Most modules are of these, which keep no tensors of a task.
_OTHERS = sys.stdlib_module_names | {
    *("bs_optuna", "matplotlib", "numpy", "optuna", "optuna_dashboard", "optree", "pydantic"),
    *("rich", "scipy", "sklearn", "sqlalchemy", "torch"),
}


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
    """A context for predictions: what outlives a model holds no fake tensor after it.

    Each `functools.lru_cache` that holds one is cleared, dictionaries and lists lose those that
    they hold, also in tuples and records, and a name that stands for one stands for what it did
    before: in modules, in their classes, in the objects that they hold, and in what their functions
    have closed over. The collector knows of more, but not of what it was told to leave alone
    (`gc.freeze`).

    Args:
        functions: Of the task; if they are methods their objects are looked at too.
    """
    methods = [f.__self__ for f in functions if isinstance(f, MethodType)]
    before = [(owner, dict(vars(owner))) for owner in _owners(methods)]
    try:
        yield
    finally:
        names = {id(owner): kept for owner, kept in before}
        for owner in _owners(methods):
            _forget(owner, names.get(id(owner), {}))


def _forget(owner: Any, before: dict[str, Any]) -> None:
    for name, thing in list(vars(owner).items()):
        thing = thing.__func__ if type(thing) in (staticmethod, classmethod) else thing
        kind = type(thing)  # isinstance asks the thing itself too, and some then warn
        if kind in _CONTAINERS:
            _forget_in(thing)
        elif kind is _CachedFunction and _holds_fake(gc.get_referents(thing)):
            thing.cache_clear()
        elif kind is FunctionType:
            for cell in thing.__closure__ or ():
                with suppress(ValueError):  # it is empty
                    _forget_in(cell.cell_contents)
        elif kind is FakeTensor:
            with suppress(AttributeError):  # of an object that is frozen
                if name in before:
                    setattr(owner, name, before[name])
                else:
                    delattr(owner, name)


def _forget_in(container: Any) -> None:
    if type(container) not in _CONTAINERS or not _holds_fake(container):
        return
    items = list(enumerate(container) if type(container) is list else container.items())
    for key, value in reversed(items):  # so that the places of those before it stay
        if type(value) in _CONTAINERS:
            _forget_in(value)
        elif _holds_fake(value):
            del container[key]


def _owners(more: Iterable[object]) -> Iterable[object]:
    """Modules in which a task's own code may keep something, their classes and objects."""
    found = {id(thing): thing for thing in more if _may_keep(thing)}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _OTHERS or type(module) is not ModuleType:
            continue
        found[id(module)] = module
        for thing in list(vars(module).values()):
            if id(thing) not in found and _may_keep(thing):
                found[id(thing)] = thing
    return found.values()


def _may_keep(thing: Any) -> bool:
    kind = type(thing)
    is_class = issubclass(kind, type)
    home = str(vars(thing if is_class else kind).get("__module__", ""))
    return home.partition(".")[0] not in _OTHERS and (is_class or kind.__dictoffset__ != 0)


def _holds_fake(thing: Any, *, depth: int = 3) -> bool:
    kind = type(thing)
    if kind is FakeTensor:
        return True
    if depth == 0:
        return False
    if kind is list or issubclass(kind, tuple):
        items = list(thing)
    elif kind in _CONTAINERS:
        items = list(thing.values())
    elif is_dataclass(kind) or kind is SimpleNamespace:
        items = list(getattr(thing, "__dict__", {}).values())  # none with slots
    else:
        return False
    return any(_holds_fake(item, depth=depth - 1) for item in items)
