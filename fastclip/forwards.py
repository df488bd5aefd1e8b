"""The forwards of one attached model: which one a layer's call belongs to, in this thread or in a backward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from torch import Tensor
from torch._compile import _disable_dynamo

from fastclip.backward import in_backward
from fastclip.forward import UNKNOWN, Forward, Unknown
from fastclip.recomputation import current_part, known_forward, running_part
from fastclip.taps import lead, leading, new_name, was_kept


class Forwards:
    """last: the one that began last, in any thread. name: by which compiled code finds the units of the one that runs."""

    def __init__(self) -> None:
        self.name = new_name(self)
        self.last: Forward | None = None
        self._begun: WeakValueDictionary[int, Forward] = WeakValueDictionary()
        self._local = threading.local()

    @property
    def running(self) -> list[Forward]:
        """Those of this thread, the innermost last: nobody's layers but the model's own are called in between."""
        stack: list[Forward] = self._local.__dict__.setdefault("stack", [])
        return stack

    @_disable_dynamo
    def begin(self, forward: Forward) -> None:
        lead(self.name, forward)
        self.last = forward
        self._begun[id(forward)] = forward
        self.running.append(forward)

    def end(self, forward: Forward) -> None:
        """Also where an interrupt came between."""
        if forward in self.running:
            del self.running[self.running.index(forward) :]
        self._lead_on(forward)

    def _lead_on(self, forward: Forward) -> None:
        """Compiled code that runs now runs for the forward around this one; behind the outermost it runs again in backward.

        From there on nothing in this module's memory may keep the forward, and with it the model.
        """
        if self.running:
            lead(self.name, self.running[-1])
        else:
            lead(self.name, forward, keep=False)

    def current(self, layer: str) -> Forward:
        """The forward that a layer's call belongs to. Raises RuntimeError where there is none.

        Of a recomputation that nobody noted it is :class:`fastclip.forward.Unknown`: it may run, and enter nothing.
        """
        if in_backward():  # also while a forward runs, whose code may call backward() for an earlier one
            known = known_forward(self)
            if known is not None:
                return known
            if self.last is not None:
                return Unknown(self.last, layer)
        if self.running:
            return self.running[-1]
        raise RuntimeError(
            f"{layer} was called outside the attached model's forward: call the model, or attach {layer}"
        )

    def others_wait(self, forward: Forward) -> bool:
        """Whether there are others whose backward may come together with this one's."""
        begun = [reference() for reference in self._begun.valuerefs()]  # a copy: other threads may begin theirs
        return any(f is not None and f is not forward and not f.finished for f in begun)

    def note(self, params: Callable[[], Iterable[Tensor]]) -> None:
        """What gives the parameters of a layer that is called for the first time."""
        if self.running:
            self.running[-1].uses.append((params, current_part()))

    def check(self, forward: Forward, layer: str, tap: Tensor) -> None:
        """Raises RuntimeError where compiled code of this thread may have been given another forward than its own.

        In backward the tap is its own if the graph has kept it since the forward: what runs again by a call of its own gets
        the one that leads, in whatever thread.
        """
        if in_backward():
            if known_forward(self) is not forward and not was_kept(tap, self.name):
                raise RuntimeError(UNKNOWN.format(layer=layer))
        elif not self.running or self.running[-1] is not forward:
            raise RuntimeError(
                f"{layer}: compiled code runs outside its own forward, or two threads run one compiled model: let one run it"
            )

    @contextmanager
    def inside(self, part: Forward) -> Iterator[None]:
        """While it lasts, what runs in this thread belongs to a part of the forward that runs, or that runs again."""
        running = [] if in_backward() else self.running
        with leading(self.name, part), running_part(part):
            running.append(part)
            try:
                yield
            finally:
                running.pop()
