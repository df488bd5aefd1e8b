"""One backward of autograd: the object that holds the tape and is itself the final callback.

It belongs to one graph task. Autograd keeps it alive as a queued callback and nobody else does, so that an exception in
the backward takes the tape along; a thread finds its own through a weak reference, so that nested backwards (reentrant
checkpointing) enter into the outermost one, which is where the callback fires, and threads do not mix.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from fastclip.tape import Entry, Slot


class BackwardPass:
    """Entries of one backward by slot, and the forwards they came from."""

    def __init__(self, finish: Callable[[BackwardPass], None]) -> None:
        self.entries: dict[Slot, list[Entry]] = {}
        self.forwards: list[Any] = []
        self.done = False  # a traceback that somebody keeps may keep this object beyond its backward
        self._finish = finish

    def add(self, param: Tensor, block: slice | None, entry: Entry, forward: Any) -> None:
        size = param.shape[0] if param.dim() else 1
        start, stop, _ = (block or slice(None)).indices(size)
        self.entries.setdefault((param, start, stop), []).append(entry)
        if not any(forward is known for known in self.forwards):
            self.forwards.append(forward)

    def __call__(self) -> None:
        self.done = True
        try:
            self._finish(self)
        finally:
            self.entries.clear()


class BackwardPasses:
    """The pass of the backward that this thread is in."""

    def __init__(self, finish: Callable[[BackwardPass], None]) -> None:
        self._finish = finish
        self._local = threading.local()

    def current(self) -> BackwardPass:
        """The pass of the running backward, begun (and its callback queued) if there is none. Only inside a backward."""
        found: BackwardPass | None = getattr(self._local, "running", lambda: None)()
        if found is None or found.done:
            found = BackwardPass(self._finish)
            Variable._execution_engine.queue_callback(found)
            self._local.running = weakref.ref(found)
        return found


def in_backward() -> bool:
    """Whether this thread runs inside a backward: recomputation of checkpointed layers does."""
    return torch._C._current_graph_task_id() != -1
