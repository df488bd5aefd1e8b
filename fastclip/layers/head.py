"""A linear head and the softmax cross-entropy of its logits, as one layer: ``[R, V]`` numbers are held once, or never.

Autograd would keep the logits, their log-softmax and that one's gradient. Here the logits become their gradient where they
stand, and that is what the tape gets: norm and clipped sum are a linear layer's (layers/linear.py), on the very numbers that
the input gradient was formed from. Where memory is short of even that, logits are formed some words at a time, in the forward
and three times more: for the input gradient, the norm and the clipped sum, the same numbers each time (head_rows.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastclip import ops, ops_head
from fastclip.head_rows import HeadRows
from fastclip.layers.site import Site, autocast_input, no_autocast, wanted
from fastclip.memory import free_memory
from fastclip.reference import accumulation_dtype
from fastclip.units import Segments

_SHARE = 1 / 8  # of the memory that is free: what logits may take


class _HeadLosses(Function):
    """Losses ``[R]`` in fp32 (fp64 for fp64) from h ``[R, d]``, weight ``[V, d]``, bias ``[V]`` or None, labels ``[R]``."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        site: Site | None,
    ) -> Tensor:
        ctx.site, ctx.params, ctx.input_dtype = site, (weight, bias), h.dtype
        h = autocast_input(h)
        logits = F.linear(h, autocast_input(weight), None if bias is None else autocast_input(bias))  # [R, V]
        losses, lse = ops.cross_entropy(logits, labels)
        losses = losses.clone()  # no view of what is kept for the backward: the losses may be changed in place
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, weight, logits, labels, lse)
        return losses

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, logits, labels, lse = ctx.saved_tensors
        w, b = ctx.params
        with no_autocast(g.device.type):
            z = ops.cross_entropy_backward(logits, labels, lse, g)
            torch.autograd.graph.increment_version(logits)  # a second backward finds them changed, and autograd refuses
            dh = (z @ weight.to(z.dtype)).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
            if ctx.site is not None:
                if wanted(ctx, 1):
                    ctx.site.enter_linear(w, h, z)
                if b is not None and wanted(ctx, 2):
                    ctx.site.enter_sum(b, z)
        return dh, None, None, None, None


class _LeanHeadLosses(Function):
    """The same with logits of some words at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        site: Site | None,
    ) -> Tensor:
        ctx.site, ctx.params, ctx.input_dtype = site, (weight, bias), h.dtype
        h, weight, bias = autocast_input(h), autocast_input(weight), None if bias is None else autocast_input(bias)
        losses, lse = ops_head.head_losses(h, weight, bias, labels)
        ctx.save_for_backward(h, weight, bias, labels, lse)
        return losses.clone()  # as above

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, labels, lse = ctx.saved_tensors
        w, b = ctx.params
        rows = HeadRows(h, weight, bias, labels, lse, g.contiguous(), Segments(None, labels.new_zeros(1)))
        shift = ctx.site is not None and b is not None and wanted(ctx, 2)
        dh = torch.zeros_like(h, dtype=accumulation_dtype(h.dtype)) if ctx.needs_input_grad[0] else None
        with no_autocast(g.device.type):
            for words, z in rows.chunks() if shift or dh is not None else ():
                if dh is not None:
                    dh += z @ weight[words]
                if shift:
                    ctx.site.enter_sum(b, z, block=words)
            if ctx.site is not None and wanted(ctx, 1):
                ctx.site.enter_head(w, rows)
        return None if dh is None else dh.to(ctx.input_dtype), None, None, None, None


def head_losses(site: Site | None, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """[R]: cross-entropy in nats of h ``[R, d]`` under ``softmax(h W^T + b)`` for labels int ``[R]`` in [0, V).

    site: where the rows belong; None where neither weight nor bias is trained.
    """
    if site is None:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    held = h.shape[0] * weight.shape[0] * autocast_input(weight[:0]).element_size()
    function = _LeanHeadLosses if held > _SHARE * free_memory(h.device) else _HeadLosses
    return function.apply(h, weight, bias, labels, site)
