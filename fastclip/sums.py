"""Where the clipped sums of one logical batch stand, and who may touch them.

fp32 (or fp64) sums live in ``p.grad`` itself; for a narrower parameter they are kept beside it in fp32 and ``p.grad``
shows them rounded, because clipped sums accumulate in fp32 whatever the parameter's dtype. With ``fp64`` all are kept so.

Guarantee: between a backward and the release nobody else changes the sums unnoticed (identity, memory and version counter of
``p.grad`` are remembered, and on CPU a sample of its values, for edits through ``.data`` and numpy, which no counter sees), and
sums are not added to gradients that were released already. An edit through ``.data`` that spares the sample goes unseen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.reference import accumulation_dtype


@dataclass
class _Record:
    grad: Tensor  # what p.grad was when we last wrote it
    version: int
    address: int
    sample: Tensor | None
    wide: Tensor | None  # the sum of a narrower parameter; None where p.grad is the sum
    released: bool


class GradientSums:
    def __init__(self) -> None:
        self._records: dict[Tensor, _Record] = {}
        self.fp64 = False  # whatever the parameters are
        self.terms = 0  # how many an element of the sums got at most, until they are released

    def check(self, name: str, p: Tensor) -> None:
        """Raises RuntimeError unless ``p.grad`` is absent, zero, or the sum that we left there."""
        record = self._current(p)
        if p.grad is None or (record is not None and not record.released):
            return
        if record is not None:
            raise RuntimeError(
                f"gradients of {name} were released by step() and not cleared: call zero_grad() after it"
            )
        if bool(p.grad.any()):
            raise RuntimeError(
                f"the gradient of {name} was changed since it was clipped (by gradient clipping, a loss scaler, a hook, or "
                "a backward before attach): nothing may touch p.grad between backward() and step(); call zero_grad()"
            )

    def _current(self, p: Tensor) -> _Record | None:
        record = self._records.get(p)
        if record is None or p.grad is not record.grad or p.grad._version != record.version:
            return None
        if p.grad.data_ptr() != record.address or not _same(record.sample, _sample(p.grad)):
            return None
        return record

    def pending(self, p: Tensor) -> Tensor | None:
        """The clipped sum that waits for its release, fp32 or fp64 ``[*p.shape]``; None if there is none."""
        record = self._current(p)
        if record is None or record.released:
            return None
        return record.grad if record.wide is None else record.wide

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
        self._records[p] = _Record(p.grad, p.grad._version, p.grad.data_ptr(), _sample(p.grad), wide, released)
        if released:
            self.terms = 0

    def clear(self) -> None:
        """Forget everything; whoever calls this clears the gradients."""
        self._records.clear()
        self.terms = 0


def _sample(grad: Tensor) -> Tensor | None:
    """Up to 64 values from all over; None on a GPU, where comparing them would wait for it."""
    if grad.device.type != "cpu":
        return None
    flat = grad.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // 64))].clone()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    # By bits, so that NaN equals NaN.
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))
