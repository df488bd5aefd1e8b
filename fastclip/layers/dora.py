"""DoRA of PEFT: ``m (W + s B A) / |W + s B A|``, a magnitude m ``[p]`` beside the two factors of a low-rank update.

The norm of each row of ``W + s B A`` is a constant in PEFT and depends on parameters alone, but it is found by sending the
unit matrix through A and B, whose rows are no example's. So the layer around them gets a rule: PEFT's own forward, except for
the part that holds the magnitude. Convolutions need no rule: their norm is found otherwise. Of embeddings DoRA is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.layers.linear import linear_layer
from fastclip.layers.projection import Follow, Followed, Projection
from fastclip.layers.registry import find_rule, register_layer
from fastclip.layers.site import Site

_MAGNITUDE = ("peft.tuners.lora.dora", "DoraLinearLayer")


def magnitudes(module: Any) -> tuple[str, ...]:
    """The adapters whose magnitudes are followed."""
    found = []
    for name, layer in module.lora_magnitude_vector.items():
        factors = (module.lora_A[name], module.lora_B[name])
        own = (type(layer).__module__, type(layer).__qualname__) == _MAGNITUDE and "forward" not in layer.__dict__
        # Nobody calls the parts of what is followed, so their hooks would be lost.
        plain = not any(part._forward_hooks or part._forward_pre_hooks for part in (*factors, layer))
        if own and plain and all(find_rule(factor) is linear_layer for factor in factors):
            found.append(name)
    return tuple(found)


def _parts(module: Any) -> Iterable[nn.Module]:
    for name in magnitudes(module):
        yield from (module.lora_A[name], module.lora_B[name], module.lora_magnitude_vector[name])


class _WithParts:
    """A layer of PEFT as its own forward sees it, but for the magnitudes, which ``parts`` follows."""

    def __init__(self, parts: Follow, module: Any, names: Sequence[str]) -> None:
        self._module = module
        held = module.lora_magnitude_vector
        followed = {name: partial(_scaled, parts, name, held[name]) for name in names}
        self.lora_magnitude_vector = {**held, **followed}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@register_layer(
    "peft.tuners.lora.layer.Linear",
    norm="with DoRA: Gram for A and B, sums of g * x_hat for the magnitude",
    owns=_parts,
)
def dora_linear(site: Site, module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """peft's Linear with an adapter of DoRA; with others it owns nothing, and its parts are followed one by one."""
    return dora(Followed(site, module), module, magnitudes(module), x, *args, **kwargs)


def dora(parts: Follow, module: Any, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's forward. parts: how what is trained in it runs; names: :func:`magnitudes`."""
    return type(module).forward(_WithParts(parts, module, names), x, *args, **kwargs)


def _scaled(
    parts: Follow,
    adapter: str,
    layer: Any,
    x: Tensor,
    *,
    lora_A: Any,
    lora_B: Any,
    scaling: float,
    base_layer: Any,
    base_result: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """What DoraLinearLayer adds to the base layer's output: x ``[..., d]`` to ``[..., p]``.

    base_result: that output, or None where x went through dropout before.
    """
    weight, bias = base_layer.weight, base_layer.bias
    with torch.no_grad():
        delta = (lora_B.weight @ lora_A.weight).to(x.dtype)
        # Detached, because PEFT makes a parameter of a transposed parameter, which compilers do not trace.
        norm = layer.get_weight_norm(weight=weight.detach().to(x.dtype), lora_weight=delta, scaling=scaling)  # [p]
    middle = [1] * (x.dim() - 2)

    def copies(name: str) -> Tensor:
        found = parts.copies(name, x)
        return found.reshape(found.shape[0], *middle, -1)

    if base_result is None:
        if not weight.requires_grad:
            weight = weight.to(x.dtype)
            base_result = F.linear(x, weight.mT if layer.fan_in_fan_out else weight)
        elif layer.fan_in_fan_out and weight.dtype == x.dtype:
            # PEFT makes a parameter of the transposed weight, and so the weight gets nothing from here.
            base_result = F.linear(x, weight.detach().mT)
        else:
            base_result = parts.linear(x, Projection("base_layer.weight", transposed=layer.fan_in_fan_out))
    elif bias is not None:
        base_result = base_result - (copies("base_layer.bias") if bias.requires_grad else bias)
    update = parts.linear(x, _linear_part(f"lora_A.{adapter}", lora_A))
    update = parts.linear(update, _linear_part(f"lora_B.{adapter}", lora_B))
    scale = copies(f"lora_magnitude_vector.{adapter}.weight") / norm
    return (scale - 1) * base_result + scale * update * scaling


def _linear_part(name: str, layer: nn.Linear) -> Projection:
    return Projection(f"{name}.weight", None if layer.bias is None else f"{name}.bias")
