"""Privacy units: which rows of a batch belong to whom.

A privacy unit (an example, a packed sequence, a user with several examples) is a set of rows. Every layer sees its input
as rows; :class:`PrivacyUnits` turns the number of rows into :class:`Segments`, and nothing else in the library asks what
a unit is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Rows of one layer call, brought together by unit.

    order: int64 ``[N]``, the permutation of rows that makes units contiguous; None if they are already.
    offsets: int32 ``[U + 1]``; after ``order``, unit u owns rows ``offsets[u]:offsets[u + 1]``. Units may be empty.
    """

    order: Tensor | None
    offsets: Tensor
    single: bool = False  # every unit is known to own exactly one row

    @property
    def num_units(self) -> int:
        return self.offsets.numel() - 1

    def gather(self, rows: Tensor) -> Tensor:
        """Rows ``[N, ...]`` in unit order: the same tensor where they already are."""
        return rows if self.order is None else rows.index_select(0, self.order)

    def unit_of_row(self) -> Tensor:
        """int64 ``[N]``: the unit of each gathered row."""
        lengths = self.offsets.diff().long()
        return torch.repeat_interleave(torch.arange(self.num_units, device=lengths.device), lengths)


def merge(segments: list[Segments]) -> Segments:
    """Segments of the concatenation of several calls' gathered rows: all rows of a unit count as rows of that unit."""
    units = torch.cat([s.unit_of_row() for s in segments])
    order = torch.argsort(units, stable=True)
    counts = torch.bincount(units, minlength=segments[0].num_units)
    return Segments(order, _offsets(counts))


@dataclass(frozen=True)
class PrivacyUnits:
    """The units of one batch.

    num_units: U. num_examples: number of examples B, or for packed rows as the caller declared (None if not).
    unit_of: int64 ``[B]`` on the CPU, the unit of each example; None for packed rows.
    row_offsets: int32 ``[U + 1]`` for packed rows; None otherwise.
    mean: a unit's gradient is the mean of its examples' gradients instead of their sum.
    ids: the caller's ids, one per unit in order of first appearance; None where a unit has no name.
    """

    num_units: int
    num_examples: int | None
    unit_of: Tensor | None = None
    row_offsets: Tensor | None = None
    mean: bool = False
    ids: tuple[int, ...] | None = None
    _cache: dict[tuple[int, torch.device], Segments] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def examples(cls, count: int) -> PrivacyUnits:
        """Each index of dim 0 is a unit."""
        return cls(count, count, torch.arange(count))

    @classmethod
    def from_ids(cls, ids: Tensor, reduction: str) -> PrivacyUnits:
        """One unit per distinct id. ids: int ``[B]``, any order; kept on the CPU, so that CUDA training need not sync.

        Raises ValueError if ids is not a one-dimensional integer tensor or reduction is unknown.
        """
        ids = torch.as_tensor(ids)
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(
                f"ids must be integers of shape [B], one unit per example; got {ids.dtype} {list(ids.shape)}"
            )
        if reduction not in ("sum", "mean"):
            raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}')
        index: dict[int, int] = {}
        unit_of = torch.tensor([index.setdefault(i, len(index)) for i in ids.tolist()], dtype=torch.int64)
        return cls(len(index), unit_of.numel(), unit_of, mean=reduction == "mean", ids=tuple(index))

    @classmethod
    def from_offsets(cls, offsets: Tensor, num_examples: int | None) -> PrivacyUnits:
        """Units as segments of the rows of a packed batch. offsets: int ``[U + 1]``, from 0, not decreasing.

        Raises ValueError if offsets are not of that form.
        """
        offsets = torch.as_tensor(offsets)
        if offsets.dim() != 1 or offsets.numel() == 0 or offsets.is_floating_point() or offsets.dtype == torch.bool:
            raise ValueError(f"offsets must be integers of shape [U + 1]; got {offsets.dtype} {list(offsets.shape)}")
        host = offsets.to("cpu", torch.int64)
        if host[0] != 0 or bool((host.diff() < 0).any()):
            raise ValueError(f"offsets must start at 0 and never decrease; got {host.tolist()[:8]}...")
        return cls(offsets.numel() - 1, num_examples, row_offsets=host.to(torch.int32))

    @property
    def num_rows(self) -> int | None:
        """Number of packed rows; None where units are made of examples."""
        return None if self.row_offsets is None else int(self.row_offsets[-1])

    @cached_property
    def examples_per_unit(self) -> Tensor:
        """int64 ``[U]`` on the CPU. Only where units are made of examples."""
        assert self.unit_of is not None
        return torch.bincount(self.unit_of, minlength=self.num_units)

    def select(self, examples: Tensor) -> PrivacyUnits:
        """The same units, seen by a computation that runs these examples alone. examples: int64 ``[b]``, any order."""
        assert self.unit_of is not None
        return PrivacyUnits(self.num_units, examples.numel(), self.unit_of[examples.to("cpu")], mean=self.mean)

    def segments(self, rows: int, device: torch.device) -> Segments:
        """Segments of a tensor with ``rows`` rows: ``rows / B`` consecutive rows an example, or the packed rows.

        Raises ValueError if the rows cannot be shared out evenly among the examples.
        """
        key = (rows, device)
        if key not in self._cache:
            self._cache[key] = self._make_segments(rows, device)
        return self._cache[key]

    def _make_segments(self, rows: int, device: torch.device) -> Segments:
        if self.row_offsets is not None:
            if rows != self.num_rows:
                raise ValueError(f"offsets cover {self.num_rows} rows, but a layer sees {rows}")
            return Segments(None, self.row_offsets.to(device))
        assert self.unit_of is not None
        examples = self.unit_of.numel()
        if rows % max(examples, 1) or (examples == 0 and rows):
            raise ValueError(f"{rows} rows cannot be shared out among {examples} examples")
        per_example = rows // max(examples, 1)
        order = None
        if bool((self.unit_of.diff() < 0).any()):
            by_unit = torch.argsort(self.unit_of, stable=True)
            order = (by_unit[:, None] * per_example + torch.arange(per_example)).flatten().to(device)
        single = per_example == 1 and examples == self.num_units and bool((self.examples_per_unit == 1).all())
        return Segments(order, _offsets(self.examples_per_unit * per_example).to(device), single)


def _offsets(counts: Tensor) -> Tensor:
    """int32 ``[U + 1]`` from the number of rows of each unit."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
