"""Gated MLPs, ``down(act(gate(x)) * up(x))``, as Llama, Mistral, Qwen and Gemma write them (SwiGLU, GeGLU: Shazeer, 2020).

Autograd keeps gate, act(gate) and up beside the product that the tape keeps for ``down``: four tensors as wide as the hidden
layer, the largest that a model of this kind has outside its head. Here act(gate) is computed once more in backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fastclip.layers.recognition import Recognition

_CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Functions of one number each: no state, no random numbers.
_ACTIVATIONS = {"SiLU", "SiLUActivation", "GELU", "GELUActivation", "GELUTanh", "PytorchGELUTanh", "NewGELUActivation"}


class _Gated(Function):
    """act(gate) * up, of tensors of one shape; keeps both."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            inner = gate.detach().requires_grad_()
            active = ctx.act(inner)
        d_up = g * active.detach() if ctx.needs_input_grad[1] else None
        d_gate = torch.autograd.grad(active, inner, g * up)[0] if ctx.needs_input_grad[0] else None
        return d_gate, d_up, None


def gated_mlp(module: Any, x: Tensor) -> Tensor:
    """The module's forward; its layers are called as ever."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    if torch.compiler.is_compiling() or gate.shape != up.shape:  # a compiler chooses itself what to keep
        product = module.act_fn(gate) * up
    else:
        product = _Gated.apply(gate, up, module.act_fn)
    return cast(Tensor, module.down_proj(product))


def gated_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What computes as the module does and keeps less; None for a module that is something else."""
    children = dict(module.named_children())
    if set(children) != _CHILDREN or type(children["act_fn"]).__name__ not in _ACTIVATIONS:
        return None
    return partial(gated_mlp, module) if _RECOGNITION.of(module) else None


def _computes(module: nn.Module) -> bool:
    """Whether the module's own forward is the formula, in training and not, on numbers of its own."""
    gate: Any = module.gate_proj
    weight = next(gate.parameters(), None)
    size = getattr(gate, "in_features", None)
    own = list(module.parameters(recurse=False)) + list(module.buffers(recurse=False))
    if len(inspect.signature(type(module).forward).parameters) != 2 or own:
        return False
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point() or not isinstance(size, int):
        return False
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    before = module.training
    try:
        for mode in (True, False):
            module.training = mode
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                found, expected = type(module).forward(module, x), gated_mlp(module, x)
            if not isinstance(found, Tensor) or not torch.equal(found, expected):
                return False
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    finally:
        module.training = before
    return True


_RECOGNITION = Recognition(_computes)
