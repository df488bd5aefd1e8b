"""A head's weight on the tape without its logits: their gradients are formed again, some words at a time.

Guarantee: norm and clipped sum are taken of the same bits, because :func:`fastclip.ops_head.head_gradient` gives the same for
the same arguments and both ask for the same words. What a chunk's norm may be under-estimated by is relative to that chunk
(:func:`fastclip.ops.linear_norm_parts`), so the sum over chunks is within the same slack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip import ops
from fastclip.ops_head import head_gradient
from fastclip.reference_head import CHUNK
from fastclip.units import Segments


@dataclass(frozen=True)
class HeadRows:
    """Gradient ``sum_t z_t a_t^T`` of a weight ``[V, d]``, z the gradient in its logits of ``sum_t scale_t loss_t``.

    a: ``[N, d]``, labels: int ``[N]``, lse, scale: ``[N]``, rows gathered by unit. weight: ``[V, d]`` and bias: ``[V]``, in a's
    dtype, as they were in the forward.
    """

    a: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    lse: Tensor
    scale: Tensor
    segments: Segments

    @property
    def terms(self) -> int:
        """How many terms an element of the clipped sum gets at most."""
        return self.a.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """How many words are multiplied at once."""
        return min(CHUNK, self.vocabulary), self.vocabulary % CHUNK or CHUNK

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Words, and z ``[N, C]`` of those."""
        for start in range(0, self.weight.shape[0], CHUNK):
            words = slice(start, min(start + CHUNK, self.weight.shape[0]))
            bias = None if self.bias is None else self.bias[words]
            yield words, head_gradient(self.a, self.weight[words], bias, self.labels, self.lse, self.scale, start)

    def whole(self) -> Tensor:
        """z ``[N, V]``, with the bits of the chunks."""
        out = self.a.new_empty(self.a.shape[0], self.weight.shape[0])
        for words, z in self.chunks():
            out[:, words] = z
        return out

    def parts(self, wide: bool = False) -> Tensor:
        """fp64 ``[2, U]``, as :func:`fastclip.ops.linear_norm_parts`. wide: products in fp64."""
        a, offsets = self.a.double() if wide else self.a, self.segments.offsets
        square = torch.zeros(self.segments.num_units, dtype=torch.float64, device=a.device)
        norms = torch.zeros(a.shape[0], 1, dtype=torch.float64, device=a.device)  # squared, of the rows of z
        for _, z in self.chunks():
            square += ops.linear_norm_parts(a, z, offsets)[0]
            norms += torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float64).square_()
        return torch.stack([square, ops.row_norm_products(self.a, norms.sqrt_(), offsets)])

    def square_again(self, unit: int) -> Tensor:
        """The squared norm of one unit by products in fp64."""
        i, j = self.segments.offsets[unit : unit + 2].tolist()
        one = self.segments.offsets.new_tensor([0, j - i])
        rows = HeadRows(
            self.a[i:j], self.weight, self.bias, self.labels[i:j], self.lse[i:j], self.scale[i:j], Segments(None, one)
        )
        return rows.parts(wide=True)[0, 0]

    def cross(self, ids: Tensor, e: Tensor, offsets: Tensor, padding_idx: int | None) -> Tensor:
        """fp64 ``[U]``, as :func:`fastclip.ops.tied_cross` with an embedding's rows."""
        total = torch.zeros(self.segments.num_units, dtype=torch.float64, device=e.device)
        counted = torch.ones_like(ids, dtype=torch.bool) if padding_idx is None else ids != padding_idx
        for words, z in self.chunks():
            here = counted & (ids >= words.start) & (ids < words.stop)
            local = (ids - words.start).clamp(0, z.shape[1] - 1)
            own = e.masked_fill(~here[:, None], 0.0)
            total += ops.tied_cross(self.a, z, self.segments.offsets, local, own, offsets)
        return total

    def add_clipped(self, factors: Tensor, out: Tensor, accumulate: bool) -> None:
        for words, z in self.chunks():
            ops.clipped_gemm(self.a, z, self.segments.offsets, factors, out[words], accumulate=accumulate)
