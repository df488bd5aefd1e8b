"""Modules of transformers that are known by what they compute, because too many classes write the same down.

A trial on a few numbers proves nothing about code that anybody may have written. So it is asked of classes of transformers
alone, as they are there: no subclass from elsewhere, no method replaced on the instance. It is made again where the forward,
the mode or a plain attribute (eps, a size) has changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Found = TypeVar("Found")


def _state(module: nn.Module) -> tuple[Any, ...] | None:
    """What a module's code depends on beside its tensors; None for code from elsewhere."""
    cls = type(module)
    if not cls.__module__.startswith("transformers."):
        return None
    own = vars(module)
    if any(name != "forward" and inspect.isfunction(getattr(cls, name, None)) for name in own):
        return None
    plain = tuple(value for value in own.values() if value is None or isinstance(value, bool | int | float | str))
    return cls.forward, plain


class Recognition(Generic[Found]):
    """What was found of each module, for as long as its state stays. try_out: the trial, which costs a few small forwards."""

    def __init__(self, try_out: Callable[[nn.Module], Found | None]) -> None:
        self._try_out = try_out
        self._known: WeakKeyDictionary[nn.Module, tuple[Any, Found | None]] = WeakKeyDictionary()

    def of(self, module: nn.Module) -> Found | None:
        state = _state(module)
        if state is None:
            return None
        known = self._known.get(module)
        if known is None or known[0] != state:
            found = self._try_out(module)
            known = self._known[module] = _state(module), found
        return known[1]
