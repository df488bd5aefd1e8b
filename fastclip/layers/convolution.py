"""Convolutions: per-example gradients of the kernel, as products of output gradients and windows of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastclip.layers.registry import register_layer
from fastclip.layers.site import Site, autocast_input, wanted

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


# Elements of unfolded input at a time: what stays in cache, and is small beside the activations.
_WINDOW_ELEMENTS = 1 << 20


def kernel_gradients(x: Tensor, g: Tensor, kernel: Sequence[int], conv: Sequence[Any]) -> Tensor:
    """``[B, p, d / groups, *kernel]`` from x ``[B, d, ...]``, g ``[B, p, ...]``. conv: arguments of ``torch.convolution``."""
    stride, padding, dilation, _, _, groups = conv
    x = F.pad(x, [side for p in reversed(padding) for side in (p, p)]) if any(padding) else x
    (examples, d), p, out = x.shape[:2], g.shape[1], g.shape[2:]
    size, places = d // groups * torch.Size(kernel).numel(), out.numel()
    steps = [s * n for s, n in zip(x.stride()[2:], dilation, strict=True)]
    hops = [s * n for s, n in zip(x.stride()[2:], stride, strict=True)]
    windows = x.as_strided((*x.shape[:2], *kernel, *out), (*x.stride()[:2], *steps, *hops))
    grads = x.new_empty(examples, p, size)
    chunk = max(1, _WINDOW_ELEMENTS // max(1, groups * size * places))
    for rows in (slice(i, i + chunk) for i in range(0, examples, chunk)):
        columns = windows[rows].reshape(-1, groups, size, places)
        grads[rows] = (g[rows].reshape(-1, groups, p // groups, places) @ columns.mT).reshape(-1, p, size)
    return grads.view(examples, p, d // groups, *kernel)


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

        dx = None
        if ctx.needs_input_grad[0]:
            backward = torch.ops.aten.convolution_backward(g, x, weight, None, *ctx.args, [True, False, False])
            dx = backward[0].to(ctx.input_dtype)
        if wanted(ctx, 1):
            grads = kernel_gradients(x.to(g.dtype), g, weight.shape[2:], ctx.args)
            ctx.site.enter_sum(ctx.module.weight, grads)
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
