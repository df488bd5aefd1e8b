"""A signed number of a unit's gradient that two runs of one part of a model have in common, beside its norm.

The inner product with a fixed matrix of rank one whose elements are like random ones of mean square 1: its square is the
gradient's squared norm on average. Norms say that no unit is beyond its bound; this says that it is the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip.head_rows import HeadRows
from fastclip.reference import accumulation_dtype
from fastclip.tape import EmbeddingRows, Entry, LinearRows, PerUnit


def sketch(entries: Sequence[Entry]) -> Tensor:
    """fp64 ``[U]`` of all entries of one slot together."""
    found = [_of(entry) for entry in entries]
    return torch.stack(found).sum(0)


def _of(entry: Entry) -> Tensor:
    if isinstance(entry, PerUnit):
        units, *shape = entry.grads.shape
        columns = shape[-1] if len(shape) > 1 else 1
        grads = entry.grads.reshape(units, math.prod(shape) // columns, columns)  # of an empty batch too
        return _along(grads) @ _weights(torch.arange(grads.shape[1], device=grads.device))
    if isinstance(entry, LinearRows):
        rows = _along(entry.a) * _along(entry.g)
    elif isinstance(entry, HeadRows):
        rows = _along(entry.a) * entry.scale.double() * _weights(entry.labels)
    else:
        assert isinstance(entry, EmbeddingRows)
        rows = _along(entry.g) * _weights(entry.ids)
    out = torch.zeros(entry.segments.num_units, dtype=torch.float64, device=rows.device)
    return out.index_add_(0, entry.segments.unit_of_row(), rows)


def _along(x: Tensor) -> Tensor:
    """fp64 ``[...]``: the last dimension's inner products with weights."""
    dtype = accumulation_dtype(x.dtype)
    return (x.to(dtype) @ _weights(torch.arange(x.shape[-1], device=x.device)).to(dtype)).double()


def _weights(places: Tensor) -> Tensor:
    """fp64, as unlike as random ones, for places int ``[n]``."""
    return math.sqrt(2) * (places.double() + 1).square().mul(0.7390851332).cos()
