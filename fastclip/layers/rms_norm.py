"""RMSNorm, as torch and the models of transformers write it.

``x_hat = x / sqrt(mean(x^2) + eps)`` in fp32, times a gain ``[d]`` (Zhang and Sennrich, NeurIPS 2019). Over a hundred classes
of transformers are this, some with the gain less one (Gemma). None is known here by name: what looks like one is run beside the
formula, on numbers of its own, and counts as one where both give the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fastclip import ops
from fastclip.dispatch import Backend
from fastclip.layers.registry import Rule, register_form, register_layer
from fastclip.layers.site import Site, wanted
from fastclip.reference import accumulation_dtype


class _Form(NamedTuple):
    """Where the gain meets x_hat, which is in fp32 (fp64 for fp64). less_one: the gain is 1 + weight."""

    apply: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    less_one: bool = False


_TORCH = _Form(lambda hat, weight, dtype: (hat * weight).to(dtype))
_LLAMA = _Form(lambda hat, weight, dtype: weight * hat.to(dtype))
_GEMMA = _Form(lambda hat, weight, dtype: (hat * (1 + weight.to(hat.dtype))).to(dtype), less_one=True)


def _statistics(x: Tensor, count: int, eps: float) -> tuple[Tensor, Tensor]:
    """x in fp32 (fp64 for fp64), and 1 / sqrt(mean square + eps) ``[..., 1]`` of its last ``count`` dimensions."""
    wide = x.to(accumulation_dtype(x.dtype))
    dims = tuple(range(x.dim() - count, x.dim()))
    size = x.shape[x.dim() - count :].numel()
    square = torch.linalg.vector_norm(wide, dim=dims, keepdim=True).square_()
    return wide, square.div_(size).add_(eps).rsqrt_()


class _RMSNorm(Function):
    """RMSNorm of x ``[..., *weight's shape]``; keeps x and ``1 / rms``, where autograd would keep x_hat too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, site: Site, eps: float, form: _Form) -> Tensor:
        wide, rstd = _statistics(x, weight.dim(), eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.site, ctx.param, ctx.less_one = site, weight, form.less_one
        return form.apply(wide * rstd, weight, x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        trailing, site = weight.dim(), ctx.site
        gain = weight.detach().reshape(-1)
        gain = gain.to(rstd.dtype) + 1 if ctx.less_one else gain
        (rows, segments), (grads, _) = site.by_unit(x, trailing), site.by_unit(g, trailing)
        # Rows beyond what the GPU's kernel holds in registers.
        backend: Backend | None = "torch" if x.is_cuda and gain.numel() > 8192 else None
        dx, sums = ops.layer_norm_backward(
            grads, rows, None, site.by_unit(rstd, trailing)[0][:, 0], gain, segments.offsets, False, backend=backend
        )
        if wanted(ctx, 1):
            site.enter_units(ctx.param, sums[0])
        return site.in_place(dx, segments, x) if ctx.needs_input_grad[0] else None, None, None, None, None


@register_layer(nn.RMSNorm, norm="sums of g * x_hat")
def rms_norm(site: Site, module: nn.RMSNorm, input: Tensor) -> Tensor:
    eps = torch.finfo(accumulation_dtype(input.dtype)).eps if module.eps is None else module.eps
    return _RMSNorm.apply(input, module.weight, site, eps, _TORCH)


def llama_norm(site: Site, module: Any, hidden_states: Tensor) -> Tensor:
    return _RMSNorm.apply(hidden_states, module.weight, site, _eps(module), _LLAMA)


def gemma_norm(site: Site, module: Any, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, module.weight, site, _eps(module), _GEMMA)


_FORMS: dict[Rule, _Form] = {llama_norm: _LLAMA, gemma_norm: _GEMMA}
# What was found for a module, and for which forward.
_found: WeakKeyDictionary[nn.Module, tuple[Any, Rule | None]] = WeakKeyDictionary()


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@register_form("transformers.RMSNorm of Llama, Gemma and others like them", norm="sums of g * x_hat")
def find_norm(module: nn.Module) -> Rule | None:
    """The rule of a module that owns one vector and computes as RMSNorm; None for any other."""
    names = [name for name, p in module._parameters.items() if p is not None]
    if names != ["weight"] or "norm" not in type(module).__name__.lower() or not isinstance(_eps(module), float):
        return None
    forward = type(module).forward
    known = _found.get(module)
    if known is None or known[0] is not forward:
        known = _found[module] = forward, next((r for r in _FORMS if _computes(module, r)), None)
    return known[1]


def _computes(module: nn.Module, rule: Rule) -> bool:
    """Whether the module's own forward is the rule's formula: at several sizes of input and gain, in fp32 and in bf16."""
    weight, names = module._parameters["weight"], list(inspect.signature(type(module).forward).parameters)
    plain = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
    if weight is None or weight.dim() != 1 or len(names) != 2 or weight.device.type == "meta" or not plain:
        return False
    generator = torch.Generator().manual_seed(0)
    for scale, dtype in ((1.0, torch.float32), (1e-3, torch.float32), (30.0, torch.float32), (1.0, torch.bfloat16)):
        x = (scale * torch.randn(2, 3, weight.numel(), generator=generator)).to(weight.device, dtype)
        gain = torch.randn(weight.numel(), generator=generator).to(weight.device)
        module.__dict__["weight"] = gain
        try:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                found = type(module).forward(module, x)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return False
        finally:
            del module.__dict__["weight"]
        wide, rstd = _statistics(x, 1, _eps(module))
        expected = _FORMS[rule].apply(wide * rstd, gain, dtype)
        if not isinstance(found, Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
            return False
        # x_hat is rounded to bf16 before or after the gain: that is 0.4 % of a value, and one value in many.
        if not torch.allclose(found, expected, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-6):
            return False
    return True
