"""Linear layers: ``y = x W^T + b``, and the same with the weight stored transposed (GPT-2's Conv1D)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastclip.layers.registry import register_layer
from fastclip.layers.site import Site, autocast_input, no_autocast, shared_input, wanted


class _Linear(Function):
    """y ``[..., p]`` from x ``[..., d]``; weight ``[p, d]`` (``[d, p]`` if transposed), bias ``[p]`` or None.

    Backward returns the input gradient alone and enters (x, g) for the weight and g's sums for the bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        site: Site,
        params: tuple[Tensor, Tensor | None],
        transposed: bool,
        blocks: tuple[slice | None, slice | None],
    ) -> Tensor:
        ctx.site, ctx.params, ctx.transposed, ctx.blocks, ctx.input_dtype = site, params, transposed, blocks, x.dtype
        x = shared_input(x)
        # The weight as it is: a copy in autocast's dtype, made again in backward, is not held until then.
        ctx.save_for_backward(weight, *([x] if ctx.needs_input_grad[1] else []))
        weight = autocast_input(weight)
        bias = None if bias is None else autocast_input(bias)
        out = F.linear(x, weight.mT if transposed else weight, bias)
        # What is a view here could not be changed in place by the code that follows the layer.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        w, b = ctx.params
        dx = None
        with no_autocast(g.device.type):
            if ctx.needs_input_grad[0]:
                weight = weight.to(g.dtype)
                dx = torch.matmul(g, weight.mT if ctx.transposed else weight).to(ctx.input_dtype)
            if wanted(ctx, 1):
                enter_product(ctx.site, w, saved[0], g, ctx.transposed, ctx.blocks[0])
            if b is not None and wanted(ctx, 2):
                ctx.site.enter_sum(b, g, block=ctx.blocks[1])
        return dx, None, None, None, None, None, None


def enter_product(
    site: Site, weight: Tensor, x: Tensor, g: Tensor, transposed: bool, block: slice | None = None
) -> None:
    """Enter the weight's gradient from a layer's input x ``[..., d]`` and output gradient g ``[..., p]``."""
    # W^T's gradient is sum x_t g_t^T: the same factors with their roles exchanged.
    first, second = (g, x) if transposed else (x, g)
    site.enter_linear(weight, first, second, block)


def linear(
    site: Site,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool = False,
    block: slice | None = None,
    bias_block: slice | None = None,
) -> Tensor:
    """``x W^T + b`` with W and b, or these rows of them, followed by the tape."""
    w = weight if block is None else weight[block]
    b = bias if bias_block is None or bias is None else bias[bias_block]
    return _Linear.apply(x, w, b, site, (weight, bias), transposed, (block, bias_block))


@register_layer(nn.Linear, norm="Gram, or the gradient itself where that is smaller")
def linear_layer(site: Site, module: nn.Linear, input: Tensor) -> Tensor:
    return linear(site, input, module.weight, module.bias)


@register_layer("transformers.pytorch_utils.Conv1D", norm="Gram, or the gradient itself where that is smaller")
def conv1d_layer(site: Site, module: Any, x: Tensor) -> Tensor:
    """transformers' Conv1D: weight ``[d, p]``."""
    return linear(site, x, module.weight, module.bias, transposed=True)
