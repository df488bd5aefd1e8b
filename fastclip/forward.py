"""One forward of an attached model: whose its examples are, and where its layers report in backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastclip import tape
from fastclip.layout import Law
from fastclip.replay import Part
from fastclip.units import PrivacyUnits

if TYPE_CHECKING:
    from fastclip.module import Clipper


UNKNOWN = (
    "{layer}: run again in backward by code that does not say whose forward it was, so its units are not known: checkpoint "
    "with torch.utils.checkpoint"
)
_numbers = itertools.count()


class Forward:
    """One forward of the attached model: its units, and whether its one backward is done.

    uses: of each layer that was called, what gives its parameters, and the number of the checkpointed part it was called in, 0
    outside of them and in compiled code.
    """

    def __init__(
        self, clipper: Clipper, units: PrivacyUnits, laws: Mapping[str, Law], trained: Mapping[nn.Parameter, str]
    ) -> None:
        self.clipper = clipper
        self.units = units
        self.laws = laws
        self.trained = trained  # what was trainable then
        self.finished = False
        self.uses: list[tuple[Callable[[], Iterable[Tensor]], int]] = []
        self._users: dict[Tensor, set[int]] = {}
        self._counted = 0  # of uses
        self.parts = 0  # that were checkpointed
        self.number = next(_numbers)

    @property
    def examples(self) -> int:
        assert self.units.unit_of is not None
        return self.units.unit_of.numel()

    def record(self, param: Tensor, entry: tape.Entry, block: slice | None) -> None:
        if not self.clipper.attached:
            raise RuntimeError("the clipper was detached between forward and backward: run the forward again")
        if not param.is_leaf:
            raise RuntimeError(
                "a layer ran with a weight that is computed, not a parameter: its gradient cannot be followed"
            )
        if self.finished:
            self.clipper.refuse_second_backward()
        self.clipper.passes.current().add(param, block, entry, self)

    def lending(self, *lent: Tensor) -> Forward:
        """The same forward for layers whose tensors these are, which somebody else writes to after their backward."""
        return _Lending(self, lent)

    @contextmanager
    def one_row(self, row: int, rows: int) -> Iterator[None]:
        """While it lasts, layers run for this row's example alone, also where they run again."""
        example = torch.tensor([row * self.examples // rows])
        with self.clipper.forwards.inside(_Row(self, self.units.select(example))):
            yield

    def users(self) -> dict[Tensor, set[int]]:
        """The numbers in ``uses`` of each parameter."""
        for params, number in self.uses[self._counted :]:
            for p in params():
                self._users.setdefault(p, set()).add(number)
        self._counted = len(self.uses)
        return self._users

    def part(self, function: Callable[..., Any], args: Any, kwargs: Any, generators: bool) -> Part | None:
        """A function of this forward that is checkpointed; None where its rows have to be kept."""
        return Part(self, function, args, kwargs, generators) if self.clipper.replays else None

    def replay(self) -> Replay:
        return Replay(self)

    def same_units(self, other: Forward) -> bool:
        mine, theirs = self.units, other.units
        if mine.num_units != theirs.num_units or mine.ids != theirs.ids or mine.mean != theirs.mean:
            return False
        if mine.unit_of is None or theirs.unit_of is None:
            return mine.unit_of is theirs.unit_of
        return torch.equal(mine.unit_of, theirs.unit_of)


class Unknown(Forward):
    """Stands for the forward of a layer that is run again in backward by code that nobody knows.

    Where the forward itself followed the layer, as under checkpointing that saves no more than it must, what is entered comes
    from there. Where it did not, this would be entered, and nothing says whose it is.
    """

    def __init__(self, forward: Forward, layer: str) -> None:
        super().__init__(forward.clipper, forward.units, forward.laws, forward.trained)
        self._layer = layer

    def record(self, param: Tensor, entry: tape.Entry, block: slice | None) -> None:
        raise RuntimeError(UNKNOWN.format(layer=self._layer))


class _Row(Forward):
    """A part of a forward, whose examples are some of its."""

    def __init__(self, whole: Forward, units: PrivacyUnits) -> None:
        super().__init__(whole.clipper, units, whole.laws, whole.trained)
        self._whole, self.uses = whole, whole.uses

    def part(self, function: Callable[..., Any], args: Any, kwargs: Any, generators: bool) -> None:
        return None

    def record(self, param: Tensor, entry: tape.Entry, block: slice | None) -> None:
        self._whole.record(param, entry, block)


class Replay(Forward):
    """A forward of which a checkpointed part runs again for its clipped sums. entries: what came of that."""

    def __init__(self, whole: Forward) -> None:
        super().__init__(whole.clipper, whole.units, whole.laws, whole.trained)
        self.entries: dict[tape.Slot, list[tape.Entry]] = {}

    def record(self, param: Tensor, entry: tape.Entry, block: slice | None) -> None:
        self.entries.setdefault(tape.slot_of(param, block), []).append(entry)

    def part(self, function: Callable[..., Any], args: Any, kwargs: Any, generators: bool) -> None:
        return None


class _Lending(Forward):
    def __init__(self, forward: Forward, lent: Sequence[Tensor]) -> None:
        super().__init__(forward.clipper, forward.units, forward.laws, forward.trained)
        self._of, self._lent = forward, lent

    def record(self, param: Tensor, entry: tape.Entry, block: slice | None) -> None:
        self._of.record(param, tape.copied(entry, self._lent), block)
