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
from contextlib import suppress
from types import MethodType
from types import ModuleType
from typing import Any
from typing import TypeVar

from torch._subclasses.fake_tensor import FakeTensor  # as in `memory_probe`


_Function = TypeVar("_Function", bound=Callable[..., Any])
# Its type has no name in the library.
_CachedFunction = type(functools.lru_cache(lambda: None))
_METHODS = (staticmethod, classmethod)
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


def forget_fake_tensors() -> None:
    """Takes fake tensors out of what outlives a model, where no training could use them.

    Each `functools.lru_cache` that holds one is cleared, dictionaries and lists lose those that
    they hold, also in tuples, and a name that stands for one is None again: in modules, in their
    classes and in the objects that they hold. The collector knows of more, but not of what it was
    told to leave alone (`gc.freeze`).
    """
    for owner in _owners():
        for name, thing in list(vars(owner).items()):
            kind = type(thing)  # isinstance asks the thing itself too, and some then warn
            if kind in _CONTAINERS:
                _forget_in(thing)
            elif kind is _CachedFunction or kind in _METHODS:
                function = thing.__func__ if kind in _METHODS else thing
                if type(function) is _CachedFunction and _holds_fake(gc.get_referents(function)):
                    function.cache_clear()
            elif kind is FakeTensor:
                with suppress(AttributeError):  # of a frozen one
                    setattr(owner, name, None)


def _forget_in(container: Any) -> None:
    if not _holds_fake(container):
        return
    items = list(enumerate(container) if type(container) is list else container.items())
    for key, value in reversed(items):  # so that the places of those before it stay
        if type(value) in _CONTAINERS:
            _forget_in(value)
        elif _holds_fake(value):
            del container[key]


def _owners() -> Iterable[object]:
    """Modules in which a task's own code may keep something, their classes and objects."""
    found: dict[int, object] = {}
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
    if depth == 0 or (kind not in _CONTAINERS and kind is not tuple):
        return False
    items = list(thing) if kind in (tuple, list) else list(thing.values())
    return any(_holds_fake(item, depth=depth - 1) for item in items)
