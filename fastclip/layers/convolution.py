"""Convolutions: per-unit gradients of the kernel, one example at a time by torch's own backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastclip.layers.registry import register_layer
from fastclip.layers.site import Site, autocast_input, wanted

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class _Convolution(Function):
    """``[B, p, ...]`` from x ``[B, d, ...]`` by ``aten.convolution``; backward materialises ``[B, *kernel]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, site: Site, module: Conv, padding: list[int]
    ) -> Tensor:
        ctx.site, ctx.module, ctx.input_dtype = site, module, x.dtype
        ctx.args = (list(module.stride), padding, list(module.dilation), False, [0] * len(padding), module.groups)
        x, weight = autocast_input(x), autocast_input(weight)
        ctx.save_for_backward(x, weight)
        return torch.convolution(x, weight, None if bias is None else autocast_input(bias), *ctx.args)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors

        def gradients(x: Tensor, g: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
            return torch.ops.aten.convolution_backward(g, x, weight, None, *ctx.args, mask)

        dx = gradients(x, g, [True, False, False])[0].to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
        if wanted(ctx, 1):
            singles = [gradients(x[i : i + 1], g[i : i + 1], [False, True, False])[1] for i in range(x.shape[0])]
            ctx.site.enter_sum(
                ctx.module.weight, torch.stack(singles) if singles else weight.new_empty(0, *weight.shape)
            )
        if ctx.module.bias is not None and wanted(ctx, 2):
            ctx.site.enter_sum(ctx.module.bias, g.flatten(2).sum(2))
        return dx, None, None, None, None, None


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d, norm="per-unit gradient")
def convolution(site: Site, module: Conv, input: Tensor) -> Tensor:
    site.need_batch_first()
    kernel, dilation = module.kernel_size, module.dilation
    padding = module.padding
    if isinstance(padding, str):
        total = (
            [0] * len(kernel) if padding == "valid" else [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        )
    else:
        total = [2 * int(p) for p in padding]
    if module.padding_mode != "zeros" or any(t % 2 for t in total):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        input = F.pad(input, [side for t in reversed(total) for side in (t // 2, t - t // 2)], mode=mode)
        total = [0] * len(total)
    return _Convolution.apply(input, module.weight, module.bias, site, module, [t // 2 for t in total])
