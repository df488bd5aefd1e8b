"""The forwards of one attached model: which one a layer's call belongs to, in this thread or in a backward."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from fastclip.backward import in_backward
from fastclip.forward import Forward
from fastclip.recomputation import known_forward
from fastclip.taps import lead, new_number


class Forwards:
    """last: the one that began last, in any thread. number: by which compiled code finds the units of the one that runs."""

    def __init__(self) -> None:
        self.number = new_number(self)
        self.last: Forward | None = None
        self._live: weakref.WeakSet[Forward] = weakref.WeakSet()
        self._open: set[Forward] = set()  # nothing else may hold those that ran layers without gradients
        self._local = threading.local()

    @property
    def running(self) -> list[Forward]:
        """Those of this thread, the innermost last: nobody's layers but the model's own are called in between."""
        stack: list[Forward] = self._local.__dict__.setdefault("stack", [])
        return stack

    def begin(self, forward: Forward) -> None:
        lead(self.number, forward)
        self._live.add(forward)
        self._open = {f for f in self._open if not f.finished}
        self.last = forward
        self.running.append(forward)

    def end(self) -> None:
        self._lead_on(self.running.pop())

    def _lead_on(self, forward: Forward) -> None:
        """Compiled code that runs now runs for the forward around this one; behind the outermost it runs again in backward.

        From there on nothing in this module's memory may keep the forward, and with it the model.
        """
        if self.running:
            lead(self.number, self.running[-1])
        else:
            lead(self.number, forward, keep=False)

    def _unfinished(self) -> list[Forward]:
        return [f for f in self._open.union(self._live) if not f.finished]

    def current(self, layer: str) -> Forward:
        """The forward that a layer's call belongs to. Raises RuntimeError where there is none, or no telling which."""
        if self.running:
            return self.running[-1]
        if in_backward():
            known = known_forward()
            if known is not None and known.clipper.forwards is self:
                return known
            live = self._unfinished()
            if live and all(f.same_units(live[0]) for f in live):
                return self.last if self.last in live else live[0]
            raise RuntimeError(
                f"{layer}: recomputed in backward while {len(live)} forwards with different units are under way: call "
                "backward() for each before the next, or use torch.utils.checkpoint with use_reentrant=True"
            )
        raise RuntimeError(
            f"{layer} was called outside the attached model's forward: call the model, or attach {layer}"
        )

    def check(self, forward: Forward, layer: str) -> None:
        """Raises RuntimeError where compiled code of this thread was given another forward than its own."""
        if not self.running and in_backward():
            if self.current(layer) is not forward or (known_forward() is None and len(self._unfinished()) > 1):
                raise RuntimeError(
                    f"{layer}: compiled code runs again in backward while several forwards are under way: call backward() "
                    "once for each before the next"
                )
        elif not self.running or self.running[-1] is not forward:
            raise RuntimeError(
                f"{layer}: compiled code runs outside its own forward, or two threads run one compiled model: let one run it"
            )

    def keep_open(self) -> None:
        """The forward that runs stays known until its backward is done: code unknown here may run it again there."""
        if self.running:
            self._open.add(self.running[-1])

    @contextmanager
    def leading(self, forward: Forward) -> Iterator[None]:
        """While it lasts, compiled code finds this forward's units."""
        lead(self.number, forward)
        try:
            yield
        finally:
            self._lead_on(self.last or forward)
