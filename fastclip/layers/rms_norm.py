"""RMSNorm, as torch and the models of transformers write it.

``x_hat = x / sqrt(mean(x^2) + eps)`` in fp32, times a gain ``[d]`` (Zhang and Sennrich, NeurIPS 2019). Many classes
of transformers are this, some with the gain less one (Gemma). None is known here by name: what looks like one is run beside the
formula, forward and backward, and counts as one where both give the same (recognition.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fastclip import ops
from fastclip.dispatch import Backend
from fastclip.layers.recognition import Recognition
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
    square = torch.linalg.vector_norm(wide, dim=dims, keepdim=True).square()
    return wide, (square / size + eps).rsqrt()


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


def llama_norm(site: Site, module: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
    (x,) = (*args, *kwargs.values())  # the argument has a name of its own in every class
    return _RMSNorm.apply(x, module.weight, site, _eps(module), _LLAMA)


def gemma_norm(site: Site, module: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
    (x,) = (*args, *kwargs.values())
    return _RMSNorm.apply(x, module.weight, site, _eps(module), _GEMMA)


_FORMS: dict[Rule, _Form] = {llama_norm: _LLAMA, gemma_norm: _GEMMA}


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@register_form("transformers.RMSNorm of Llama, Gemma and others like them", norm="sums of g * x_hat")
def find_norm(module: nn.Module) -> Rule | None:
    """The rule of a module that owns one vector and computes as RMSNorm; None for any other."""
    names = [name for name, p in module._parameters.items() if p is not None]
    if names != ["weight"] or "norm" not in type(module).__name__.lower() or not isinstance(_eps(module), float):
        return None
    return _RECOGNITION.of(module)


def _rule_of(module: nn.Module) -> Rule | None:
    weight, names = module._parameters["weight"], list(inspect.signature(type(module).forward).parameters)
    plain = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
    if weight is None or weight.dim() != 1 or len(weight) == 1 or len(names) != 2 or weight.is_meta or not plain:
        return None
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for shape, scale, dtype in (
        ((2, 5), 1.0, torch.float32),
        ((2, 7), 1.0, torch.bfloat16),
        ((2, 5), 1e-3, torch.float32),
        ((3,), 30.0, torch.float32),
        ((2, 3, 4), 1e3, torch.float32),
    ):
        x, gain = torch.randn(*shape, len(weight), generator=generator), torch.randn(len(weight), generator=generator)
        inputs.append(((scale * x).to(weight.device, dtype), gain.to(weight.device)))
    return next((rule for rule in _FORMS if all(_computes(module, rule, x, gain) for x, gain in inputs)), None)


_RECOGNITION = Recognition(_rule_of)


def _computes(module: nn.Module, rule: Rule, x: Tensor, gain: Tensor) -> bool:
    """Whether the module's own forward is the rule's formula here, and its gradients are."""

    def formula() -> Tensor:
        wide, rstd = _statistics(x, 1, _eps(module))
        return _FORMS[rule].apply(wide * rstd, gain, x.dtype)

    x, gain = x.requires_grad_(), gain.requires_grad_()
    module.__dict__["weight"] = gain
    try:
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            found, expected = type(module).forward(module, x), formula()
            if not isinstance(found, Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
                return False
            g = torch.linspace(-1, 1, found.numel(), device=x.device).view(found.shape).to(found.dtype)
            pairs = [(found, expected)]
            pairs += zip(
                torch.autograd.grad(found, (x, gain), g), torch.autograd.grad(expected, (x, gain), g), strict=True
            )
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    finally:
        del module.__dict__["weight"]
    # x_hat is rounded to bf16 before the gain or after it: 0.4 % of a value.
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    scales = [float(y.detach().abs().max()) for _, y in pairs]
    return all(
        torch.allclose(y, z, rtol=tolerance, atol=tolerance * scale)
        for (y, z), scale in zip(pairs, scales, strict=True)
    ) and (x.dtype == torch.float32 or torch.allclose(found, expected, rtol=2e-3, atol=1e-6))
