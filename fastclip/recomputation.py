"""Which forward a recomputed layer belongs to, and recomputation that autograd.grad can differentiate.

Reentrant checkpointing (``torch.utils.checkpoint`` with ``use_reentrant=True``) runs layers without gradients and again in
backward, where nothing says whose forward it was: taken for another's, one unit's examples would be clipped as those of many.
So while an attached model runs, what it hands to torch's checkpointing is noted together with its forward, in this thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.utils.checkpoint as checkpointing

from fastclip.backward import in_backward

if TYPE_CHECKING:
    from fastclip.forward import Forward


class _State(threading.local):
    """Of this thread. plain: nothing is recomputed; forward: the one that runs; inside: within what is checkpointed."""

    plain = False
    inside = False
    forward: Forward | None = None


_state = _State()


class _Checkpoint:
    """Stands for torch's autograd function of reentrant checkpointing while any thread is inside one of the below."""

    original = checkpointing.CheckpointFunction
    lock = threading.Lock()
    uses = 0

    @classmethod
    def apply(cls, function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if _state.plain:
            return function(*args)
        if _state.forward is not None:
            function = partial(_run, _state.forward, function)
        return cls.original.apply(function, preserve_rng_state, *args)


def _run(forward: Forward, function: Callable[..., Any], *args: Any) -> Any:
    with recomputing(forward) if in_backward() else _with(inside=True):
        return function(*args)


@contextmanager
def _with(**values: Any) -> Iterator[None]:
    before = {name: getattr(_state, name) for name in values}
    _state.__dict__.update(values)
    try:
        yield
    finally:
        _state.__dict__.update(before)


@contextmanager
def _standing_in() -> Iterator[None]:
    with _Checkpoint.lock:
        if _Checkpoint.uses == 0:
            _Checkpoint.original = checkpointing.CheckpointFunction
            setattr(checkpointing, "CheckpointFunction", _Checkpoint)  # noqa: B010 (a type, to mypy)
        _Checkpoint.uses += 1
    try:
        yield
    finally:
        with _Checkpoint.lock:
            _Checkpoint.uses -= 1
            if _Checkpoint.uses == 0:
                setattr(checkpointing, "CheckpointFunction", _Checkpoint.original)  # noqa: B010


@contextmanager
def differentiable() -> Iterator[None]:
    """Inside, what this thread runs under ``torch.utils.checkpoint`` can be differentiated by autograd.grad."""
    with _standing_in(), _with(plain=True):
        yield


@contextmanager
def running(forward: Forward) -> Iterator[None]:
    """Inside, what is checkpointed in this thread belongs to this forward."""
    with _standing_in(), _with(forward=forward):
        yield


@contextmanager
def recomputing(forward: Forward) -> Iterator[None]:
    """The same where it runs again: layers find the forward, and compiled code its units."""
    with running(forward), forward.clipper.forwards.leading(forward):
        yield


def known_forward() -> Forward | None:
    """In a backward: the forward whose checkpointed part runs again. None if nobody noted it."""
    return _state.forward if in_backward() else None


def is_noted() -> bool:
    """Whether what runs will be known when it runs again."""
    return _state.inside
