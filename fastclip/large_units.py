"""Units too large for one backward: plain gradients of several backwards, clipped once as one unit's.

Clipping is not linear, so that a unit has to be whole when it is clipped. Where its rows do not fit into memory together, its
plain gradient is accumulated first, one unit at a time, at the cost of one more gradient's memory.

Guarantees: the norm is that of the very numbers that are added; the unit counts once, under its id, like any other of the
draw; sums of other units that wait in ``p.grad`` are untouched, also when the code inside fails, and then the unit is not
added. What runs inside must be this unit's examples alone: nothing here can see whose they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastclip.backward import BackwardPass
from fastclip.forward import Forward
from fastclip.tape import PerUnit
from fastclip.units import PrivacyUnits
from fastclip.written import Written

if TYPE_CHECKING:
    from fastclip.module import Clipper


@contextmanager
def accumulate_unit(clipper: Clipper, unit_id: int, reduction: str, num_examples: int | None) -> Iterator[None]:
    """All backwards inside are of one unit: their plain gradients add up and are clipped together at the end.

    unit_id: the unit's id, as ``units(ids=...)`` would name it. Losses inside are sums over examples, whatever the clipper's
    loss_reduction. reduction: "sum", or "mean" of the unit's ``num_examples`` examples. Parameters narrower than fp32 add up in
    their own precision.

    Raises ValueError for bad arguments, RuntimeError for gradients that were changed or released, for a unit that is in the
    sum already, and inside another such context; nothing has changed then.
    """
    if isinstance(unit_id, bool) or not isinstance(unit_id, int):
        raise ValueError(f"unit_id must be an int, the unit's id, got {unit_id!r}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}')
    counted = isinstance(num_examples, int) and not isinstance(num_examples, bool) and num_examples >= 1
    if (reduction == "mean" or num_examples is not None) and not counted:
        raise ValueError(
            f'num_examples must be how many examples the unit has, for reduction="mean"; got {num_examples!r}'
        )
    if not clipper.attached:
        raise RuntimeError("the clipper is detached, or one unit is being accumulated already: end that one first")
    clipper.refresh()
    trainable = clipper.parameters()
    clipper.sums.check(trainable, trainable.__getitem__)
    # Losses are sums here, so that a clipper of means has nothing to undo: one example, as far as that goes.
    owners = torch.zeros(num_examples or 1, dtype=torch.int64)
    units = PrivacyUnits(1, 1, owners, mean=reduction == "mean", ids=(unit_id,))
    if clipper.owner is not None:
        clipper.owner.accept(units)

    written = Written(clipper.model)
    waiting = {p: p.grad for p in trainable}
    found: dict[Tensor, Tensor] = {}
    try:
        for p in waiting:
            p.grad = None
        with clipper.suspended():
            yield
        found = {p: p.grad for p in waiting if p.grad is not None}
    finally:
        for p, grad in waiting.items():
            p.grad = grad
    written.check()
    if found:
        done = BackwardPass(clipper._finish)
        done.forwards.append(Forward(clipper, units, {}, trainable))
        for param, grad in found.items():
            done.device = param.device
            done.entries[param, 0, param.shape[0] if param.dim() else 1] = [PerUnit(grad[None])]
        done.finish()
