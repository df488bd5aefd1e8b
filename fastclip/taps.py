"""What leads compiled code to the forward that it runs for: a tensor that every layer of it takes.

It is fp64 ``[B + 1]``, keeps the forward alive, and holds the forward's number in every place: what copies saved tensors, as
checkpointing does, drops what is only attached to them. Dynamo takes the sizes of what modules hold for constants, and batches
differ in size; so taps are found by a name, in no module. A name is a string: dynamo may take a number for a variable.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastclip.forward import Forward
    from fastclip.forwards import Forwards

TAPS: dict[str, Tensor] = {}  # by the name of an attached model's forwards: the tap of the one that runs
_numbers = itertools.count()
_forwards: weakref.WeakValueDictionary[int, Forward] = weakref.WeakValueDictionary()


def new_name(owner: Forwards) -> str:
    """The name under which compiled code finds this owner's taps, in this process alone."""
    name = f"{next(_numbers)}"
    weakref.finalize(owner, TAPS.pop, name, None)
    return name


def lead(name: str, forward: Forward, keep: bool = True) -> None:
    """From now on compiled code runs for this forward. keep: as long as its tap is there, or as long as somebody else does."""
    packed = forward.units.unit_of is None
    size = 1 if packed else forward.examples + 1
    tap = torch.full((size,), float(forward.number), dtype=torch.float64, device="cpu", requires_grad=True)
    if keep:
        tap.forward = forward  # type: ignore[attr-defined]
    _forwards[forward.number] = forward
    TAPS[name] = tap


def forward_of(tap: Tensor) -> Forward | None:
    """The forward of a tap, or of a copy of it; None if it is gone."""
    found: Forward | None = getattr(tap, "forward", None)
    return _forwards.get(int(tap.detach()[0])) if found is None else found


def was_kept(tap: Tensor, name: str) -> bool:
    """Whether a tap is the very one that its forward led by, and leads no more."""
    return hasattr(tap, "forward") and TAPS[name].data_ptr() != tap.data_ptr()
