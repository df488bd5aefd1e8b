"""What leads compiled code to the forward that it runs for: a tensor that every layer of it takes.

It is fp64 ``[B + 1]``, keeps the forward alive, and holds the forward's mark in every place: what copies saved tensors, as
checkpointing does, drops what is only attached to them. A mark is the forward's number and a check, odd, so that rounding to
any narrower format spoils it: what compresses saved tensors may not turn one forward into another. Dynamo takes the sizes of
what modules hold for constants, and batches differ in size; so taps are found by a name, in no module. A name is a string:
dynamo may take a number for a variable.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from fastclip.forward import Forward
    from fastclip.forwards import Forwards

TAPS: dict[str, Tensor] = {}  # by the name of an attached model's forwards: the tap of the one that runs
_CHECK = 1 << 20
_gone: list[str] = []  # names whose owners are no more
_numbers = itertools.count()
_forwards: weakref.WeakValueDictionary[int, Forward] = weakref.WeakValueDictionary()


def new_name(owner: Forwards) -> str:
    """The name under which compiled code finds this owner's taps, in this process alone."""
    while _gone:
        TAPS.pop(_gone.pop(), None)
    name = f"{next(_numbers)}"
    # Not out of TAPS at once: dynamo may be iterating over it when garbage is collected.
    weakref.finalize(owner, _gone.append, name)
    return name


def _mark(number: int) -> int:
    check = (number * 0x9E3779B1 >> 12) % _CHECK | 1
    return number * _CHECK + check  # below 2^53 for 2^33 forwards


def lead(name: str, forward: Forward, keep: bool = True) -> None:
    """From now on compiled code runs for this forward. keep: as long as its tap is there, or as long as somebody else does."""
    packed = forward.units.unit_of is None
    size = 1 if packed else forward.examples + 1
    mark = float(_mark(forward.number))
    with _disable_current_modes():  # selective checkpointing counts operations
        tap = torch.full((size,), mark, dtype=torch.float64, device="cpu", requires_grad=True)
    if keep:
        tap.forward = forward  # type: ignore[attr-defined]
    _forwards[forward.number] = forward
    TAPS[name] = tap


@contextmanager
def leading(name: str, forward: Forward) -> Iterator[None]:
    """While it lasts, compiled code runs for this forward; behind it, for the one before."""
    before = TAPS[name]
    lead(name, forward)
    try:
        yield
    finally:
        TAPS[name] = before


def forward_of(tap: Tensor) -> Forward | None:
    """The forward of a tap, or of a copy of it; None if it is gone.

    Raises RuntimeError for a copy that was rounded.
    """
    found: Forward | None = getattr(tap, "forward", None)
    if found is not None:
        return found
    mark = float(tap.detach()[0])
    number = int(mark // _CHECK) if math.isfinite(mark) else -1
    if number < 0 or mark != _mark(number):
        raise RuntimeError(
            "something changed the tensors that compiled code keeps for backward (saved_tensors_hooks that compress them): "
            "leave those of dtype float64 as they are"
        )
    return _forwards.get(number)


def was_kept(tap: Tensor, name: str) -> bool:
    """Whether a tap is the very one that its forward led by, and leads no more."""
    return hasattr(tap, "forward") and TAPS[name].data_ptr() != tap.data_ptr()
