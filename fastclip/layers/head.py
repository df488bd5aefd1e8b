"""A linear head and the softmax cross-entropy of its logits, as one layer: ``[R, V]`` numbers are held once.

Autograd would keep the logits, their log-softmax and that one's gradient. Here the logits become their gradient where they
stand, and that is what the tape gets: norm and clipped sum are a linear layer's (layers/linear.py), on the very numbers that
the input gradient was formed from.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastclip import ops
from fastclip.layers.site import Site, autocast_input, no_autocast, wanted


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
        h, weight = autocast_input(h), autocast_input(weight)
        logits = F.linear(h, weight, None if bias is None else autocast_input(bias))  # [R, V]
        losses, lse = ops.cross_entropy(logits, labels)
        losses = losses.clone()  # no view of what is kept for the backward: the losses may be changed in place
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, weight, logits, labels, lse)
        return losses

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, logits, labels, lse = ctx.saved_tensors
        w, b = ctx.params
        with no_autocast(g.device.type):
            # A second backward finds them changed, and autograd refuses.
            z = ops.cross_entropy_backward(logits, labels, lse, g)
            dh = (z @ weight).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
            if ctx.site is not None:
                if wanted(ctx, 1):
                    ctx.site.enter_linear(w, h, z)
                if b is not None and wanted(ctx, 2):
                    ctx.site.enter_sum(b, z)
        return dh, None, None, None, None


def head_losses(site: Site | None, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """[R]: cross-entropy in nats of h ``[R, d]`` under ``softmax(h W^T + b)`` for labels int ``[R]`` in [0, V).

    site: where the rows belong; None where neither weight nor bias is trained.
    """
    if site is None:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return _HeadLosses.apply(h, weight, bias, labels, site)
