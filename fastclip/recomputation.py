"""Which forward a recomputed layer belongs to, and recomputation that autograd.grad can differentiate.

Checkpointing (``torch.utils.checkpoint``) runs layers again in backward, where nothing says whose forward it was: taken for
another's, one unit's examples would be clipped as those of many. So while attached models run, what they hand to torch's
checkpointing, of either kind, is noted together with their forwards, in this thread. Parts of one forward that are not nested
may run a third time, for their clipped sums (replay.py).
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastclip.backward import BackwardPass, BackwardPasses, in_backward
from fastclip.taps import leading

if TYPE_CHECKING:
    from fastclip.forward import Forward
    from fastclip.forwards import Forwards
    from fastclip.replay import Part

_REENTRANT, _OTHER = "CheckpointFunction", "_checkpoint_without_reentrant_generator"


class _State(threading.local):
    """Of this thread. plain: nothing is recomputed; running: forwards of attached models, the innermost last; part: the number
    of the checkpointed part that runs, 0 outside of them; again: forwards of which one runs again, in the backward with number
    ``task``: an interrupt may leave them here."""

    plain = False
    running: tuple[Forward, ...] = ()
    part = 0
    again: tuple[Forward, ...] = ()
    task = -1


_state = _State()
_lock = threading.Lock()
_uses = 0
_originals: dict[str, Any] = {}  # names of torch.utils.checkpoint, and what stood there


def _noted(function: Callable[..., Any]) -> Callable[..., Any]:
    # A backward that a running forward's code calls is none of that forward's.
    known = _again() if in_backward() else _state.running
    return partial(_run, known, function) if known else function


class _Checkpoint:
    """Stands for torch's autograd function of reentrant checkpointing while any thread is inside one of the below."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if _state.plain:
            return function(*args)
        return _originals[_REENTRANT].apply(_noted(function), preserve_rng_state, *args)


def _generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The same for the other kind, whose generator stops once: while the function runs for the first time."""
    if _state.plain:
        return (yield)
    around = _originals[_OTHER](_noted(function), *args, **kwargs)
    part = _part(function, args, kwargs)
    if part is None:
        return (yield from around)
    with _with(part=part.number):
        yield from around
    # What the function gave back is in the frame of torch's checkpoint() alone.
    given_back = sys._getframe(1).f_locals
    if "ret" in given_back:
        part.follow(given_back["ret"])


def _part(function: Callable[..., Any], args: Any, kwargs: Any) -> Part | None:
    """Of one forward that runs for the first time, outside of any other part."""
    running = [f for f in _state.running if f in f.clipper.forwards.running]  # without what an interrupt left there
    if in_backward() or not torch.is_grad_enabled() or _state.part or len(running) != 1 or len(args) < 5:
        return None
    generators, context, _, _, _, *inputs = args
    # What is saved elsewhere, or in another form, is not to be kept here as it is.
    if context is not checkpointing.noop_context_fn or torch._C._autograd._top_saved_tensors_default_hooks(False):
        return None
    return running[0].part(function, tuple(inputs), kwargs, bool(generators))


def current_part() -> int:
    """The number of the checkpointed part that runs for the first time; 0 outside of them."""
    return _state.part


def _again() -> tuple[Forward, ...]:
    return _state.again if _state.task == torch._C._current_graph_task_id() else ()


def _run(known: tuple[Forward, ...], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not in_backward():
        return function(*args, **kwargs)
    with ExitStack() as stack:
        stack.enter_context(standing_in())
        stack.enter_context(_with(again=known, task=torch._C._current_graph_task_id()))
        for forward in known:
            stack.enter_context(leading(forward.clipper.forwards.name, forward))
        out = function(*args, **kwargs)
        for forward in known:
            _keep_together(forward.clipper.passes, out)
        return out


def _keep_together(passes: BackwardPasses, out: Any) -> None:
    """Let the backward of what ran again enter into this one's pass, also where autograd moves it to a thread of its own."""
    outer = passes.current()
    for x in tree_leaves(out):
        if isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(partial(_adopt, passes, weakref.ref(outer)))


def _adopt(passes: BackwardPasses, outer: weakref.ref[BackwardPass], _grad: Tensor) -> None:
    passes.adopt(outer)


_STAND_INS: tuple[tuple[str, Any], ...] = ((_REENTRANT, _Checkpoint), (_OTHER, _generator))


@contextmanager
def _with(**values: Any) -> Iterator[None]:
    before = {name: getattr(_state, name) for name in values}
    _state.__dict__.update(values)
    try:
        yield
    finally:
        _state.__dict__.update(before)


@contextmanager
def standing_in() -> Iterator[None]:
    """Inside, torch's checkpointing notes whose it is."""
    global _uses
    with _lock:
        if _uses == 0:
            for name, stand_in in _STAND_INS:
                found = getattr(checkpointing, name)
                if found is not stand_in:  # an interrupt may have left it there
                    _originals[name] = found
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
    """Inside, what this thread runs under ``torch.utils.checkpoint`` runs once, as if it were not checkpointed.

    autograd.grad can differentiate that, and no mode of torch that is on in the forward has to be so in the backward.
    """
    with standing_in(), _with(plain=True):
        yield


@contextmanager
def running(forward: Forward) -> Iterator[None]:
    """Inside, what is checkpointed in this thread belongs to this forward."""
    around = (
        f for f in _state.running if f.clipper is not forward.clipper
    )  # of its own there is none but what was interrupted
    with standing_in(), _with(running=(*around, forward), part=0):
        yield


@contextmanager
def running_part(part: Forward) -> Iterator[None]:
    """Inside, it belongs to this part of a forward that runs, or runs again."""
    if in_backward():
        with _with(again=(*_again(), part), task=torch._C._current_graph_task_id()):
            yield
    else:
        with _with(running=(*_state.running, part)):
            yield


def known_forward(forwards: Forwards) -> Forward | None:
    """The one of these forwards whose checkpointed part runs again, in this thread; None if nobody noted it."""
    return next((f for f in reversed(_again()) if f.clipper.forwards is forwards), None)
