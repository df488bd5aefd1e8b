"""Which forward a recomputed layer belongs to, and recomputation that autograd.grad can differentiate.

Checkpointing (``torch.utils.checkpoint``) runs layers again in backward, where nothing says whose forward it was: taken for
another's, one unit's examples would be clipped as those of many. So while attached models run, what they hand to torch's
checkpointing, of either kind, is noted together with their forwards, in this thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.utils.checkpoint as checkpointing

from fastclip.backward import in_backward

if TYPE_CHECKING:
    from fastclip.forward import Forward
    from fastclip.forwards import Forwards

_REENTRANT, _OTHER = "CheckpointFunction", "_checkpoint_without_reentrant_generator"


class _State(threading.local):
    """Of this thread. plain: nothing is recomputed; running: forwards of attached models, the innermost last; again: those
    whose checkpointed part runs again."""

    plain = False
    running: tuple[Forward, ...] = ()
    again: tuple[Forward, ...] = ()


_state = _State()
_lock = threading.Lock()
_uses = 0
_originals: dict[str, Any] = {}  # names of torch.utils.checkpoint, and what stood there


def _noted(function: Callable[..., Any]) -> Callable[..., Any]:
    known = _state.running + _state.again
    return partial(_run, known, function) if known else function


class _Checkpoint:
    """Stands for torch's autograd function of reentrant checkpointing while any thread is inside one of the below."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if _state.plain:
            return function(*args)
        return _originals[_REENTRANT].apply(_noted(function), preserve_rng_state, *args)


def _generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The same for the other kind, whose generator gets the function for the second run."""
    return _originals[_OTHER](_noted(function), *args, **kwargs)


def _run(known: tuple[Forward, ...], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not in_backward():
        return function(*args, **kwargs)
    with ExitStack() as stack:
        stack.enter_context(_standing_in())
        stack.enter_context(_with(again=known))
        for forward in known:
            stack.enter_context(forward.clipper.forwards.leading(forward))
        return function(*args, **kwargs)


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
    global _uses
    with _lock:
        if _uses == 0:
            for name, stand_in in ((_REENTRANT, _Checkpoint), (_OTHER, _generator)):
                _originals[name] = getattr(checkpointing, name)
                setattr(checkpointing, name, stand_in)
        _uses += 1
    try:
        yield
    finally:
        with _lock:
            _uses -= 1
            if _uses == 0:
                for name, original in _originals.items():
                    setattr(checkpointing, name, original)


@contextmanager
def differentiable() -> Iterator[None]:
    """Inside, what this thread runs under ``torch.utils.checkpoint`` can be differentiated by autograd.grad."""
    with _standing_in(), _with(plain=True):
        yield


@contextmanager
def running(forward: Forward) -> Iterator[None]:
    """Inside, what is checkpointed in this thread belongs to this forward."""
    with _standing_in(), _with(running=(*_state.running, forward)):
        yield


def known_forward(forwards: Forwards) -> Forward | None:
    """The one of these forwards whose checkpointed part runs again, in this thread; None if nobody noted it."""
    return next((f for f in reversed(_state.again) if f.clipper.forwards is forwards), None)
