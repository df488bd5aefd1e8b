"""The tape of one backward: what each parameter needs for its norm and for its clipped sum.

A layer's backward enters what it knows about a parameter's gradient; at the end of the backward the tape turns all
entries of a parameter together into squared norms ``[U]``, the clipping rule turns those into factors, and each entry is
added to the parameter's clipped sum. Shared layers, layers called k times and tied weights are entries under one slot.

Guarantees, given that every trainable parameter's every use is entered (module.py sees to that):

- the norm of a unit is over all entries of all slots, and never below the exact norm of the sum that is applied, up to
  ``NORM_SLACK``; where a unit's rows cancel so far that the fp32 rounding of its sum could be more than ``SUM_SLACK`` of
  its norm, that bound is added to its norm;
- what rounding may then still add, ``ROUNDING_SLACK`` for both, the optimizer charges to the noise;
- a unit whose norm is not finite, or whose sum_t |a_t||g_t| is beyond fp32, gets factor 0 in every group and is counted; its
  rows are zeroed, not multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastclip import ops
from fastclip.clipping import ClippingRule
from fastclip.head_rows import HeadRows
from fastclip.reference import (
    NORM_SLACK,
    UNIT_ROUNDOFF_FP32,
    UNIT_ROUNDOFF_FP64,
    accumulation_dtype,
    direct_error,
    gram_error,
)
from fastclip.units import Segments, merge

SUM_SLACK = 2.0**-9
ROUNDING_SLACK = NORM_SLACK + SUM_SLACK
LARGEST_SPREAD = 2.0**126


@dataclass(frozen=True)
class LinearRows:
    """Gradient ``sum_t g_t a_t^T`` by its factors. a: ``[N, d]``, g: ``[N, p]``, rows gathered by unit."""

    a: Tensor
    g: Tensor
    segments: Segments

    @property
    def terms(self) -> int:
        """How many terms an element of the clipped sum gets at most."""
        return self.a.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.g.shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        """How many of g's columns are multiplied at once."""
        return (self.vocabulary,)

    def smaller(self, shape: torch.Size) -> LinearRows | PerUnit:
        """The form that holds fewer numbers: these factors, or for long units the gradients themselves, ``[U, *shape]``.

        Those take the plain step's own products, and their norms one more look at them. On a GPU always these factors: how
        long units are is not known there without waiting.
        """
        (rows, d), p = self.a.shape, self.g.shape[1]
        if self.a.device.type != "cpu" or not rows or self.segments.num_units * d * p > rows * (d + p):
            return self
        return PerUnit(self.per_unit(shape), owned=True)

    def part(self, start: int, stop: int) -> LinearRows:
        """The gradient of rows ``start:stop`` of the parameter."""
        return LinearRows(self.a, self.g[:, start:stop], self.segments)

    def per_unit(self, shape: torch.Size) -> Tensor:
        """[U, p, d]."""
        num_units, parts = self.segments.num_units, self.segments.offsets.tolist()
        dtype = accumulation_dtype(self.g.dtype)
        wide = self.a.dtype == self.g.dtype == dtype
        if wide and len({j - i for i, j in pairwise(parts)}) == 1 and self.a.numel() and self.g.numel():
            out = self.g.view(num_units, -1, self.g.shape[1]).mT @ self.a.view(num_units, -1, self.a.shape[1])
        else:
            out = self.g.new_empty(num_units, self.g.shape[1], self.a.shape[1], dtype=dtype)
            one = torch.ones(1, dtype=dtype, device=out.device)
            for u, (i, j) in enumerate(pairwise(parts)):
                whole = self.segments.offsets.new_tensor([0, j - i])
                ops.clipped_gemm(self.a[i:j], self.g[i:j], whole, one, out[u], accumulate=False)
        return out.view(num_units, *shape)

    def parts(self, wide: bool = False) -> Tensor:
        """fp64 ``[2, U]`` of :func:`fastclip.ops.linear_norm_parts`. wide: products in fp64."""
        return ops.linear_norm_parts(self.a.double() if wide else self.a, self.g, self.segments.offsets)

    def square_again(self, unit: int) -> Tensor:
        """The squared norm of one unit by products in fp64."""
        i, j = self.segments.offsets[unit : unit + 2].tolist()
        whole = self.segments.offsets.new_tensor([0, j - i])
        return ops.linear_norm(self.a[i:j].double(), self.g[i:j].double(), whole)[0]

    def cross(self, ids: Tensor, e: Tensor, offsets: Tensor, padding_idx: int | None) -> Tensor:
        """fp64 ``[U]`` inner products with the gradient of an embedding of the same weight."""
        return ops.tied_cross(self.a, self.g, self.segments.offsets, ids, e, offsets, padding_idx)

    def add_clipped(self, factors: Tensor, out: Tensor, accumulate: bool) -> None:
        ops.clipped_gemm(self.a, self.g, self.segments.offsets, factors, out, accumulate=accumulate)


@dataclass(frozen=True)
class EmbeddingRows:
    """Gradient of an embedding ``[V, d]``: ids ``[N]`` and output gradients g ``[N, d]``, rows gathered by unit."""

    ids: Tensor
    g: Tensor
    segments: Segments
    padding_idx: int | None

    @property
    def terms(self) -> int:
        """How many terms an element of the clipped sum gets at most."""
        return self.g.shape[0]

    def part(self, start: int, stop: int) -> PerUnit:
        whole = self.per_unit(torch.Size([max(stop, int(self.ids.max()) + 1), self.g.shape[1]]))
        return PerUnit(whole[:, start:stop])

    def per_unit(self, shape: torch.Size) -> Tensor:
        """[U, V, d]."""
        out = self.g.new_zeros(self.segments.num_units, *shape, dtype=accumulation_dtype(self.g.dtype))
        self.add_per_unit(out)
        return out

    def add_per_unit(self, out: Tensor) -> None:
        """out: ``[U, V, d]``, contiguous."""
        rows = self.ids.long() + self.segments.unit_of_row() * out.shape[1]
        keep = slice(None) if self.padding_idx is None else self.ids != self.padding_idx
        out.view(-1, out.shape[2]).index_add_(0, rows[keep], self.g.to(out.dtype)[keep])

    def add_clipped(self, factors: Tensor, out: Tensor, accumulate: bool) -> None:
        if not accumulate:
            out.zero_()
        ops.clipped_embedding(self.ids, self.g, self.segments.offsets, factors, out, self.padding_idx)


@dataclass(frozen=True)
class PerUnit:
    """Gradients materialised a unit: ``[U, *shape]``. Norm and sum use the very same numbers.

    owned: nobody else holds them, so that others may be added in place.
    """

    grads: Tensor
    owned: bool = False

    @property
    def terms(self) -> int:
        """How many terms an element of the clipped sum gets at most."""
        return self.grads.shape[0]

    def part(self, start: int, stop: int) -> PerUnit:
        return PerUnit(self.grads[:, start:stop])

    def per_unit(self, shape: torch.Size) -> Tensor:
        return self.grads

    def add_clipped(self, factors: Tensor, out: Tensor, accumulate: bool) -> None:
        if not accumulate:
            out.zero_()
        ops.clipped_sum(self.grads, factors, out)


Entry = LinearRows | HeadRows | EmbeddingRows | PerUnit


def check_memory(entries: Iterable[Entry]) -> None:
    """Raises RuntimeError for rows whose memory somebody gave back (`untyped_storage().resize_(0)`) before they were used."""
    for entry in entries:
        for x in vars(entry).values():
            if isinstance(x, Tensor) and x.numel() and not x.untyped_storage().nbytes():
                raise RuntimeError(
                    f"the memory of an activation or output gradient of shape {list(x.shape)} was given back during the "
                    "backward, and its parameter's gradient needs it: leave that to autograd"
                )


def copied(entry: Entry, lent: Sequence[Tensor]) -> Entry:
    """The entry with copies of what it has in common with tensors that somebody else will write to."""
    theirs = {x.untyped_storage().data_ptr() for x in lent}
    own: dict[str, Any] = {}
    for field in fields(entry):
        x = getattr(entry, field.name)
        if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in theirs:
            own[field.name] = x.clone()
    return replace(entry, **own)


def memory(entries: Iterable[Entry]) -> int:
    """Bytes that these entries hold."""
    held = {x.data_ptr(): x for e in entries for f in fields(e) if isinstance(x := getattr(e, f.name), Tensor)}
    return sum(x.numel() * x.itemsize for x in held.values())


Slot = tuple[Tensor, int, int]  # a parameter and the range of its rows that the entries belong to


def slot_of(param: Tensor, block: slice | None) -> Slot:
    """block: rows of the parameter; None for all of it."""
    start, stop, _ = (block or slice(None)).indices(param.shape[0] if param.dim() else 1)
    return param, start, stop


def turn(slot: Slot, entries: Sequence[Entry]) -> tuple[bool, int]:
    """When the slot's clipped sum should take the place of its entries, so that both together need little memory at any time.

    First those that leave less than there was, small sums before large ones; then the others, by what they free.
    """
    p = slot[0]
    freed = memory(entries)
    taken = p.numel() * p.itemsize if p.grad is None else 0
    return taken > freed, -freed if taken > freed else taken


def separate(slots: dict[Slot, list[Entry]]) -> dict[Slot, list[Entry]]:
    """The same entries under slots that do not overlap, so that squared norms of slots add.

    A packed projection may be used whole in one call and in blocks in another: then each entry is cut at all borders.
    """
    ranges: dict[Tensor, set[tuple[int, int]]] = {}
    for p, start, stop in slots:
        ranges.setdefault(p, set()).add((start, stop))
    out: dict[Slot, list[Entry]] = {}
    for (p, start, stop), entries in slots.items():
        borders = sorted({edge for pair in ranges[p] for edge in pair if start <= edge <= stop})
        for i, j in pairwise(borders):
            parts = entries if (i, j) == (start, stop) else [held(e).part(i - start, j - start) for e in entries]
            out.setdefault((p, i, j), []).extend(parts)
    return {slot: _one_form(slot, entries) for slot, entries in out.items()}


def held(entry: Entry) -> LinearRows | EmbeddingRows | PerUnit:
    """With a head's logits' gradients, where it stands beside what it cannot be measured with otherwise."""
    return LinearRows(entry.a, entry.whole(), entry.segments) if isinstance(entry, HeadRows) else entry


def _one_form(slot: Slot, entries: list[Entry]) -> list[Entry]:
    """Entries whose norm and sum are taken from the same numbers: one materialised gradient where any is.

    That is where per-unit gradients stand beside others, or where two embeddings of one weight leave out different rows.
    """
    paddings = {e.padding_idx for e in entries if isinstance(e, EmbeddingRows)}
    if len(entries) == 1 or (len(paddings) <= 1 and not any(isinstance(e, PerUnit) for e in entries)):
        return entries
    p, start, stop = slot
    shape = torch.Size([stop - start, *p.shape[1:]]) if p.dim() else p.shape
    forms = sorted(map(held, entries), key=lambda e: not (isinstance(e, PerUnit) and e.owned))
    total, ours = forms[0].per_unit(shape), isinstance(forms[0], PerUnit) and forms[0].owned
    for e in forms[1:]:
        if ours and isinstance(e, EmbeddingRows) and accumulation_dtype(e.g.dtype) == total.dtype:
            e.add_per_unit(total)
        else:
            total, ours = total + e.per_unit(shape), True
    return [PerUnit(total)]


def _square(grads: Tensor) -> Tensor:
    """fp64 ``[U]`` from ``[U, ...]``; not through a fp64 copy of the whole."""
    flat = grads.reshape(grads.shape[0], grads.shape[1:].numel())
    return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square_()


def _merge_linear(heads: Sequence[LinearRows | HeadRows]) -> LinearRows | HeadRows:
    if len(heads) == 1:
        return heads[0]
    entries = [e for e in map(held, heads) if isinstance(e, LinearRows)]
    dtype = accumulation_dtype(torch.promote_types(entries[0].a.dtype, entries[0].g.dtype))
    together = merge([e.segments for e in entries])
    a = together.gather(torch.cat([e.a.to(dtype) for e in entries]))
    g = together.gather(torch.cat([e.g.to(dtype) for e in entries]))
    return LinearRows(a, g, Segments(None, together.offsets))


def _merge_embedding(entries: Sequence[EmbeddingRows]) -> EmbeddingRows:
    if len(entries) == 1:
        return entries[0]
    together = merge([e.segments for e in entries])
    ids = together.gather(torch.cat([e.ids for e in entries]))
    g = together.gather(torch.cat([e.g.float() if e.g.dtype != torch.float64 else e.g for e in entries]))
    return EmbeddingRows(ids, g, Segments(None, together.offsets), entries[0].padding_idx)


@dataclass(frozen=True)
class Measure:
    """What a unit has in a slot, each fp64 ``[U]``.

    square: squared norm. bound: on the rounding of the clipped sum over the unit's own rows in fp32,
    ``(L + 2) 2^-24 sum_t |a_t||g_t|`` for L rows (Higham, section 3.1, one more for the factor); 0 where norm and sum are taken
    from the same materialised numbers. spread: ``sum_t |a_t||g_t|``, the norm itself for those.
    """

    square: Tensor
    bound: Tensor
    spread: Tensor

    def to(self, device: torch.device) -> Measure:
        return Measure(self.square.to(device), self.bound.to(device), self.spread.to(device))

    def plus(self, other: Measure, times: float) -> Measure:
        """Of what has both, the other one so many times."""
        return Measure(
            self.square + times * other.square, self.bound + times * other.bound, self.spread + times * other.spread
        )


def in_groups(found: Sequence[Measure], groups: Sequence[int], num_groups: int) -> Measure:
    """Each ``[K, U]``: sums over what belongs to one group. groups: of each of found; all on one device."""
    columns = [torch.stack([getattr(of, name) for of in found]) for name in ("square", "bound", "spread")]  # [P, U]
    index = torch.tensor(groups, device=columns[0].device)
    shape = num_groups, columns[0].shape[1]
    return Measure(*(column.new_zeros(shape).index_add_(0, index, column) for column in columns))


def together(
    found: Iterable[tuple[Slot, Measure]], group_of: Mapping[Tensor, int], shape: tuple[int, int], device: torch.device
) -> Measure:
    """The same of slots, whose parameters are in these groups, on whatever devices. shape: (K, U)."""
    groups, moved = [0], [Measure(*torch.zeros(3, shape[1], dtype=torch.float64, device=device))]
    for (p, _, _), of in found:
        groups.append(group_of[p])
        moved.append(of.to(device))
    return in_groups(moved, groups, shape[0])


def measures(slots: dict[Slot, list[Entry]]) -> Iterator[tuple[Slot, Measure]]:
    """Of every slot of ``separate``. Layers that read one input (q, k and v; gate and up) share the products of its rows."""
    readers: dict[object, list[Slot]] = {}
    for slot, entries in slots.items():
        only = entries[0]
        if len(entries) == 1 and isinstance(only, LinearRows):
            # Entries hold their tensors, so that one address is one input.
            at = (only.a.data_ptr(), only.a.shape, only.a.stride(), only.a.dtype, only.a.device)
            readers.setdefault((at, only.segments.offsets.data_ptr()), []).append(slot)
        else:
            yield slot, measure(entries, slot[0].dtype)
    for together in readers.values():
        heads = [entry for slot in together for entry in slots[slot] if isinstance(entry, LinearRows)]
        parts = ops.linear_norms(heads[0].a, [head.g for head in heads], heads[0].segments.offsets)
        for slot, head, part in zip(together, heads, parts, strict=True):
            yield slot, Measure(part[0], _rounding(part[1], slot[0].dtype, head.segments), part[1])


def measure(entries: Sequence[Entry], dtype: torch.dtype) -> Measure:
    """Of the entries of one slot of ``separate``. dtype: the parameter's, whose sum is formed accordingly."""
    linear = [e for e in entries if isinstance(e, LinearRows | HeadRows)]
    embedding = [e for e in entries if isinstance(e, EmbeddingRows)]
    if isinstance(entries[0], PerUnit):
        square = _square(entries[0].grads)
        return Measure(square, torch.zeros_like(square), square.sqrt())
    if not embedding:
        head = _merge_linear(linear)
        parts = head.parts()
        return Measure(parts[0], _rounding(parts[1], dtype, head.segments), parts[1])
    tail = _merge_embedding(embedding)
    square = ops.embedding_norm(tail.ids, tail.g, tail.segments.offsets, tail.padding_idx)
    ones = tail.g.new_ones(tail.g.shape[0], 1)
    spread = ops.row_norm_products(ones, tail.g, tail.segments.offsets)
    bound = _rounding(spread, dtype, tail.segments)
    if not linear:
        return Measure(square, bound, spread)
    head = _merge_linear(linear)
    cross = 2 * head.cross(tail.ids, tail.g, tail.segments.offsets, tail.padding_idx)
    # Elsewhere than on CPU in fp64 at once: what suffices for the head alone may not for the sum of both.
    parts = head.parts(wide=head.a.device.type != "cpu")
    return Measure(
        _tied_square(head, parts, square + cross, square) + _tied_error(head, tail, spread + parts[1]),
        bound + _rounding(parts[1], dtype, head.segments),
        spread + parts[1],
    )


def _tied_square(head: LinearRows | HeadRows, parts: Tensor, others: Tensor, embedding: Tensor) -> Tensor:
    """fp64 ``[U]``: squared norm of head + embedding, from the embedding's square and that plus twice the inner product.

    parts: fp64 ``[2, U]``, the head's of ``linear_norm_parts``.

    Where head and embedding cancel, what the head's own square may be off by is no longer small beside the sum: those
    units' heads are done in fp64. The sum cancels at worst down to fp64 rounding of its parts; 1e-12 of them is above it.
    """
    square = parts[0].clone()
    if square.device.type == "cpu" and head.a.dtype != torch.float64:
        lengths = head.segments.offsets.diff().tolist()
        d = head.a.shape[1]
        # Of parts of the columns: spreads of the parts, squared, sum up to no more than the whole one's (Minkowski).
        worst = torch.tensor([max(gram_error(d, p, n) for p in head.widths) for n in lengths], dtype=torch.float64)
        rows = torch.tensor([direct_error(n) for n in lengths], dtype=torch.float64) * parts[1]
        # Whichever route was taken.
        error = torch.maximum(worst * parts[1].square(), 2 * rows * parts[0].sqrt() + rows.square())
        for u in (~(error <= 2 * NORM_SLACK * (square + others))).nonzero().flatten().tolist():
            square[u] = head.square_again(u)
    return (square + others).clamp_min(0) + 1e-12 * (square + embedding)


def _tied_error(head: LinearRows | HeadRows, tail: EmbeddingRows, spread: Tensor) -> Tensor:
    """fp64 ``[U]``: what fp64 sums over pairs of rows may be off by where head and embedding cancel (Higham, section 3.1)."""
    d, vocabulary = head.a.shape[1], head.vocabulary
    rows = head.segments.offsets.diff() + tail.segments.offsets.diff()
    return 4 * (d + vocabulary + 2 * rows + 4).double() * UNIT_ROUNDOFF_FP64 * spread.square()


def _rounding(products: Tensor, dtype: torch.dtype, segments: Segments) -> Tensor:
    """fp64 ``[U]``: bound on the rounding of ``sum_t g_t a_t^T`` in the sum's own precision, from ``sum_t |a_t||g_t|``.

    Tensor cores cut where a CPU rounds: a term counts for three there (kernels/clipped_gemm.py, kernels/products.py).
    """
    wide = accumulation_dtype(dtype) == torch.float64
    roundoff = UNIT_ROUNDOFF_FP64 if wide else UNIT_ROUNDOFF_FP32
    each = 1 if wide or products.device.type == "cpu" else 3
    return each * (segments.offsets.diff().double() + 2) * roundoff * products


@dataclass(frozen=True)
class Outcome:
    """What one backward found. norms: fp32 ``[U]``, unclipped; factors: fp64 ``[K, U]``; nonfinite: int64 scalar."""

    norms: Tensor
    factors: Tensor
    nonfinite: Tensor


def clip(found: Measure, scale: Tensor, rule: ClippingRule, spread_limit: float) -> Outcome:
    """Norms and factors from what units have in each group, ``[K, U]``, and each unit's weight ``[U]``.

    A unit's gradient is ``scale`` times the sum of its rows' gradients, and the factors returned multiply that sum. They also
    keep ``factor * spread`` within ``spread_limit`` times what bounds the norm.
    """
    norms = found.square.sqrt() * scale
    bounds = found.bound * scale
    guarded = torch.where(bounds > SUM_SLACK * norms, norms + bounds, norms)
    guarded = torch.maximum(guarded, found.spread * scale / spread_limit)
    factors = rule.factors(guarded.clone())  # a rule may write into what it is given
    # No rule gets beyond its own bound, and no factor is so small that fp32 would lose its digits.
    clipped = (factors * guarded).square().sum(0).sqrt()  # [U]
    factors = factors * (rule.max_grad_norm / clipped).clamp(max=1.0) * scale
    # A sum within `spread` overflows nowhere on its way, whatever the factor then does to it.
    finite = (found.square.isfinite() & factors.isfinite() & (found.spread < LARGEST_SPREAD)).all(0)  # [U]
    factors = factors.masked_fill(~finite | (factors < 1e-30), 0.0)
    total = norms.square().sum(0).sqrt()
    return Outcome(total.float(), factors, (~finite).sum())
