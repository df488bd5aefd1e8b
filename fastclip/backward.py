"""One backward of autograd: the object that holds the tape and is finished by autograd's final callback.

It belongs to one graph task. Autograd keeps its callback alive and nobody else does, so that an exception in the backward ends
the pass, also where a kept traceback keeps the tape. A thread finds its own through a weak reference, so that nested backwards
(reentrant checkpointing) enter into the outermost one, which is where the callback fires, and threads do not mix.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Variable

from fastclip.tape import Entry, Measure, Slot, slot_of

if TYPE_CHECKING:
    from fastclip.replay import Part


class BackwardPass:
    """Entries of one backward by slot, and the forwards they came from.

    pending: checkpointed parts whose backward has begun and whose entries are here; replayed: those that were measured and run
    again (replay.py).
    """

    def __init__(self, finish: Callable[[BackwardPass], None]) -> None:
        self.entries: dict[Slot, list[Entry]] = {}
        self.forwards: list[Any] = []
        self.device = torch.device("cpu")  # of one of the parameters
        self.pending: list[Part] = []
        self.replayed: list[Part] = []
        self.first: Measure | None = None  # [K, U], what units had in what is replayed
        self.factors: Tensor | None = None  # [K, U], once they are known
        self.terms: dict[Tensor, int] = {}  # how many an element of a parameter's sum got at most
        self._thread = threading.current_thread()
        self.done = False
        self.callback: weakref.ref[partial[None]] | None = None
        self._finish = finish

    def add(self, param: Tensor, block: slice | None, entry: Entry, forward: Any) -> None:
        if param.device.type == "cpu" and isinstance(self._thread, threading._DummyThread):
            # A backward on a CPU stays in its thread, until it is nested so deep that autograd takes one of its own: this would
            # be another pass, and a unit in both would be clipped twice.
            raise RuntimeError(
                "a backward of an attached model runs in a thread that Python did not start, where autograd puts what is "
                "nested 60 backwards deep: use torch.utils.checkpoint with use_reentrant=False"
            )
        self.device = param.device
        self.entries.setdefault(slot_of(param, block), []).append(entry)
        if not any(forward is known for known in self.forwards):
            self.forwards.append(forward)

    def slots(self) -> Iterator[Slot]:
        """Of all that was entered, measured already or not."""
        yield from self.entries
        for part in self.replayed:
            yield from part.measures

    @property
    def over(self) -> bool:
        """Whether its backward has ended, in whatever way."""
        return self.done or self.callback is None or self.callback() is None

    def finish(self) -> None:
        self.done = True
        try:
            self._finish(self)
        finally:
            if self.forwards:
                for part in self.pending + self.replayed:
                    part.release()
            self.entries.clear()
            self.pending.clear()
            self.replayed.clear()


def _callback(of: BackwardPass) -> partial[None]:
    """What autograd holds for as long as the backward lasts. In no frame of its own, which a traceback might keep."""
    made = partial(of.finish)
    of.callback = weakref.ref(made)
    return made


class BackwardPasses:
    """The pass of the backward that this thread is in."""

    def __init__(self, finish: Callable[[BackwardPass], None]) -> None:
        self._finish = finish
        # By number of the thread: what Python keeps for a thread of autograd's own is gone whenever that leaves Python.
        self._running: dict[int, weakref.ref[BackwardPass]] = {}

    def _of_this_thread(self) -> BackwardPass | None:
        found = self._running.get(threading.get_ident(), lambda: None)()
        return None if found is None or found.over else found

    def current(self) -> BackwardPass:
        """The pass of the running backward, begun (and its callback queued) if there is none. Only inside a backward."""
        found = self._of_this_thread()
        if found is None:
            found = BackwardPass(self._finish)
            Variable._execution_engine.queue_callback(_callback(found))  # in no variable either
            self._running[threading.get_ident()] = weakref.ref(found)
        return found

    def adopt(self, outer: weakref.ref[BackwardPass]) -> None:
        """What runs in this thread is a part of that pass, if it is not one already."""
        if self._of_this_thread() is None:
            self._running[threading.get_ident()] = outer


def in_backward() -> bool:
    """Whether this thread runs inside a backward: recomputation of checkpointed layers does."""
    return torch._C._current_graph_task_id() != -1
