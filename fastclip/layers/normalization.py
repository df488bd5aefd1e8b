"""Normalisation layers with gains and biases: LayerNorm by its own formula, the rest by what they share. RMSNorm: rms_norm.py.

All compute ``x_hat * weight + bias`` with an x_hat that has no parameters, so their per-unit gradients are sums of
``g * x_hat`` and of ``g`` over a unit's rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastclip import dispatch, ops
from fastclip.layers.registry import register_layer
from fastclip.layers.site import Site, wanted


class _LayerNorm(Function):
    """LayerNorm over the trailing dimensions ``shape`` of x ``[..., *shape]``; keeps x, mean and 1/std like torch's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        site: Site,
        shape: tuple[int, ...],
        eps: float,
    ) -> Tensor:
        ctx.input_dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)  # autocast runs layer_norm in the parameters' precision
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.site, ctx.shape, ctx.params = site, shape, (weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx = None
        if _is_fused(x, ctx.shape) and ctx.needs_input_grad[0] and wanted(ctx, 1) and (bias is None or wanted(ctx, 2)):
            return _fused(ctx.site, ctx.params, g, x, mean, rstd).to(ctx.input_dtype), None, None, None, None, None
        if ctx.needs_input_grad[0]:
            args = (g, x, ctx.shape, mean, rstd, weight, bias, [True, False, False])
            dx = torch.ops.aten.native_layer_norm_backward(*args)[0].to(ctx.input_dtype)
        if wanted(ctx, 1):
            x_hat = (x.float() - mean) * rstd if x.dtype != torch.float64 else (x - mean) * rstd
            ctx.site.enter_sum(ctx.params[0], g, x_hat)
        if bias is not None and wanted(ctx, 2):
            ctx.site.enter_sum(ctx.params[1], g)
        return dx, None, None, None, None, None


def _is_fused(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Where one kernel reads x and g once for all gradients; on a GPU rows have to fit a program (kernels/layer_norm.py)."""
    return dispatch.cpp_missing is None if x.device.type == "cpu" else x.is_cuda and torch.Size(shape).numel() <= 8192


def _fused(
    site: Site, params: tuple[Tensor, Tensor | None], g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """dx, like x; gains' and biases' gradients are entered."""
    weight, bias = params
    trailing = weight.dim()
    (rows, segments), (grads, _) = site.by_unit(x, trailing), site.by_unit(g, trailing)
    mean, rstd = (site.by_unit(y, trailing)[0][:, 0] for y in (mean, rstd))
    dx, sums = ops.layer_norm_backward(
        grads, rows, mean, rstd, weight.detach().reshape(-1), segments.offsets, bias is not None
    )
    site.enter_units(weight, sums[0])
    if bias is not None:
        site.enter_units(bias, sums[1])
    return site.in_place(dx, segments, x)


@register_layer(nn.LayerNorm, norm="sums of g and g * x_hat")
def layer_norm(site: Site, module: nn.LayerNorm, input: Tensor) -> Tensor:
    return _LayerNorm.apply(input, module.weight, module.bias, site, module.normalized_shape, module.eps)


class _GroupNorm(Function):
    """GroupNorm of x ``[B, C, ...]``. Gains' gradients need sums over places of g and of g x alone: x_hat is never formed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, site: Site, groups: int, eps: float
    ) -> Tensor:
        ctx.input_dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)  # autocast runs group_norm in the parameters' precision
        x = x.contiguous()
        size = x.shape[0], x.shape[1], x.shape[2:].numel()
        out, mean, rstd = torch.native_group_norm(x, weight, bias, *size, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.site, ctx.groups, ctx.size, ctx.params = site, groups, size, (weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        g, (weight_param, bias) = g.contiguous(), ctx.params
        dx = None
        if ctx.needs_input_grad[0]:
            args = (g, x, mean, rstd, weight, *ctx.size, ctx.groups, [True, False, False])
            dx = torch.ops.aten.native_group_norm_backward(*args)[0].to(ctx.input_dtype)
        gain, shift = wanted(ctx, 1), bias is not None and wanted(ctx, 2)
        if gain or shift:
            sums = g.reshape(*ctx.size).sum(2)  # [B, C]
        if gain:
            products = torch.linalg.vecdot(g.view(ctx.size), x.view(ctx.size))
            mean, rstd = (s.repeat_interleave(ctx.size[1] // ctx.groups, 1) for s in (mean, rstd))  # [B, C]
            ctx.site.enter_sum(weight_param, (products - sums * mean) * rstd)
        if shift:
            ctx.site.enter_sum(bias, sums)
        return dx, None, None, None, None, None


def _per_channel(site: Site, weight: Tensor, bias: Tensor | None, x_hat: Tensor) -> Tensor:
    """Gain and bias ``[C]`` by a copy a row, applied to x_hat ``[rows, C, ...]``."""
    shape = (x_hat.shape[0], x_hat.shape[1], *[1] * (x_hat.dim() - 2))
    out = x_hat * site.per_unit(weight).reshape(shape)
    return out if bias is None else out + site.per_unit(bias).reshape(shape)


@register_layer(nn.GroupNorm, norm="sums of g and g * x_hat")
def group_norm(site: Site, module: nn.GroupNorm, input: Tensor) -> Tensor:
    site.need_batch_first()
    return _GroupNorm.apply(input, module.weight, module.bias, site, module.num_groups, module.eps)


@register_layer(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, norm="sums of g and g * x_hat")
def instance_norm(site: Site, module: nn.InstanceNorm1d, input: Tensor) -> Tensor:
    return _per_channel(site, module.weight, module.bias, F.instance_norm(input, eps=module.eps))
