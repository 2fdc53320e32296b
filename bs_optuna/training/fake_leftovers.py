"""What a prediction on fake tensors must not leave behind in the task's own code."""

from __future__ import annotations

import copy
import functools
import gc
import sys
from collections.abc import Callable
from collections.abc import Iterator
from types import MethodType
from typing import Any
from typing import TypeVar

import optree
from torch._subclasses.fake_tensor import FakeTensor  # as in `memory_probe`


_Function = TypeVar("_Function", bound=Callable[..., Any])
# Its type has no name in the library.
_CachedFunction = type(functools.lru_cache(lambda: None))


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


def clear_caches() -> None:
    """Clears each `functools.lru_cache` that holds a fake tensor, which no training could use.

    It finds those of functions and methods in modules. The collector knows of more, but not of what
    it was told to leave alone (`gc.freeze`).
    """
    for function in _cached_functions():
        if any(map(_is_fake, gc.get_referents(function))):
            function.cache_clear()


def _cached_functions() -> Iterator[Any]:
    for module in list(sys.modules.values()):
        for thing in list(getattr(module, "__dict__", {}).values()):
            # isinstance asks the thing itself too, and some then warn that they are deprecated.
            if type(thing) is _CachedFunction:
                yield thing
            elif issubclass(type(thing), type) and thing.__module__ == module.__name__:
                methods = (getattr(member, "__func__", member) for member in vars(thing).values())
                yield from (method for method in methods if type(method) is _CachedFunction)


def _is_fake(tree: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) for leaf in optree.tree_leaves(tree))
