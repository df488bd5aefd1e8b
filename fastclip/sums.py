"""Where the clipped sums of one logical batch stand, and who may touch them.

fp32 (or fp64) sums live in ``p.grad`` itself; for a narrower parameter they are kept beside it in fp32 and ``p.grad``
shows them rounded, because clipped sums accumulate in fp32 whatever the parameter's dtype. With ``fp64`` all are kept so.

Guarantee: between a backward and the release nobody else changes the sums unnoticed (identity, memory and version counter of
``p.grad`` are remembered, and on CPU a sample of its values, for edits through ``.data`` and numpy, which no counter sees), and
sums are not added to gradients that were released already. An edit through ``.data`` that spares the sample goes unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastclip.reference import accumulation_dtype


@dataclass
class _Record:
    grad: Tensor  # what p.grad was when we last wrote it
    version: int
    alias: Tensor  # its memory and shape then
    places: Tensor | None  # up to 64 values from all over its memory; None on a GPU, where comparing would wait for it
    sample: Tensor | None  # what they were
    wide: Tensor | None  # the sum of a narrower parameter; None where p.grad is the sum
    released: bool


class GradientSums:
    def __init__(self) -> None:
        self._records: dict[Tensor, _Record] = {}
        self.fp64 = False  # whatever the parameters are
        self.terms = 0  # how many an element of the sums got at most, until they are released

    def check(self, params: Iterable[Tensor], name_of: Callable[[Any], str]) -> dict[Tensor, Tensor]:
        """The clipped sums that wait for their release, fp32 or fp64 ``[*p.shape]``, of those parameters that have one.

        name_of: for messages. Raises RuntimeError unless every ``p.grad`` is absent, zero, or the sum that we left there.
        """
        params = list(params)
        current = self._current(params)
        for p in params:
            grad = p.grad
            if grad is None:
                continue
            record = current.get(p)
            if record is not None and record.released:
                raise RuntimeError(
                    f"gradients of {name_of(p)} were released by step() and not cleared: call zero_grad() after it"
                )
            if record is None and bool(grad.any()):
                raise RuntimeError(
                    f"the gradient of {name_of(p)} was changed since it was clipped (by gradient clipping, a loss scaler, a "
                    "hook, or a backward before attach): nothing may touch p.grad between backward() and step(); call "
                    "zero_grad()"
                )
        return _waiting(current)

    def _current(self, params: Iterable[Tensor]) -> dict[Tensor, _Record]:
        """Of those whose ``p.grad`` is as we wrote it."""
        found = {p: r for p in params if (r := self._records.get(p)) is not None and _is_written(p.grad, r)}
        if not _same(list(found.values())):
            found = {p: record for p, record in found.items() if _same([record])}
        return found

    def pending(self, p: Tensor) -> Tensor | None:
        """The clipped sum of p that waits for its release; None if there is none."""
        return _waiting(self._current([p])).get(p)

    def target(self, p: Tensor) -> tuple[Tensor, bool]:
        """(the sum to add to, whether it holds anything yet)."""
        pending = self.pending(p)
        if pending is not None:
            return pending, True
        dtype = torch.float64 if self.fp64 else accumulation_dtype(p.dtype)
        return torch.empty_like(p, dtype=dtype, memory_format=torch.contiguous_format), False

    def write(self, p: Tensor, total: Tensor, *, released: bool) -> None:
        """Let ``p.grad`` be ``total`` (in p's dtype) and remember it."""
        wide = None if total.dtype == p.dtype else total
        p.grad = total if wide is None else total.to(p.dtype)
        wide = None if released else wide
        alias = p.grad.detach()
        places = _places(alias)
        sample = None if places is None else places.clone()
        self._records[p] = _Record(p.grad, p.grad._version, alias, places, sample, wide, released)
        if released:
            self.terms = 0

    def clear(self) -> None:
        """Forget everything; whoever calls this clears the gradients."""
        self._records.clear()
        self.terms = 0


def _waiting(records: Mapping[Tensor, _Record]) -> dict[Tensor, Tensor]:
    return {p: r.grad if r.wide is None else r.wide for p, r in records.items() if not r.released}


def _is_written(grad: Tensor | None, record: _Record) -> bool:
    """Whether this is the tensor that was written, in the same memory, as far as counters see."""
    return grad is record.grad and grad._version == record.version and grad.is_set_to(record.alias)


def _places(grad: Tensor) -> Tensor | None:
    if grad.device.type != "cpu":
        return None
    distance = max(1, -(-grad.numel() // 64))
    return grad.as_strided((-(-grad.numel() // distance),), (distance,))  # what is written is dense, in whatever order


def _same(records: Sequence[_Record]) -> bool:
    """Whether the samples' values are what they were: all in one comparison."""
    now = [r.places for r in records if r.places is not None]
    then = [r.sample for r in records if r.sample is not None]
    # By bits, so that NaN equals NaN.
    return not now or torch.equal(torch.cat(now).view(torch.uint8), torch.cat(then).view(torch.uint8))
