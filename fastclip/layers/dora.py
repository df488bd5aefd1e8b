"""DoRA of PEFT: ``m (W + s B A) / |W + s B A|``, a magnitude m ``[p]`` beside the two factors of a low-rank update.

The norm of each row of ``W + s B A`` is a constant in PEFT and depends on parameters alone, but it is found by sending the
unit matrix through A and B, whose rows are no example's. So the layer around them gets a rule: PEFT's own forward, except for
the part that holds the magnitude. Convolutions need no rule: their norm is found otherwise. Of embeddings DoRA is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.layers.linear import linear, linear_layer
from fastclip.layers.registry import find_rule, register_layer
from fastclip.layers.site import Site

_MAGNITUDE = ("peft.tuners.lora.dora", "DoraLinearLayer")


def _followed(module: Any) -> dict[str, nn.Module]:
    """The layers that hold magnitudes, by name of their adapter."""
    found = {}
    for name, layer in module.lora_magnitude_vector.items():
        factors = (module.lora_A[name], module.lora_B[name])
        own = (type(layer).__module__, type(layer).__qualname__) == _MAGNITUDE and "forward" not in layer.__dict__
        if own and all(find_rule(factor) is linear_layer for factor in factors):
            found[name] = layer
    return found


def _parts(module: Any) -> Iterable[nn.Module]:
    for name, layer in _followed(module).items():
        yield from (module.lora_A[name], module.lora_B[name], layer)


class _Followed:
    """A layer of PEFT as its own forward sees it, but for the magnitudes, which are followed by the tape."""

    def __init__(self, site: Site, module: Any) -> None:
        self._module = module
        followed = {name: partial(_scaled, site, layer) for name, layer in _followed(module).items()}
        self.lora_magnitude_vector = {**module.lora_magnitude_vector, **followed}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@register_layer(
    "peft.tuners.lora.layer.Linear",
    norm="with DoRA: Gram for A and B, sums of g * x_hat for the magnitude",
    owns=_parts,
)
def dora_linear(site: Site, module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """peft's Linear with an adapter of DoRA; with others it owns nothing, and its parts are followed one by one."""
    return type(module).forward(_Followed(site, module), x, *args, **kwargs)


def _scaled(
    site: Site,
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
        norm = layer.get_weight_norm(weight=weight.to(x.dtype), lora_weight=delta, scaling=scaling)  # [p]
    middle = [1] * (x.dim() - 2)

    def copies(param: Tensor) -> Tensor:
        return site.per_unit(param).reshape(site.rows, *middle, -1)

    if base_result is None:
        if not weight.requires_grad:
            weight = weight.to(x.dtype)
            base_result = F.linear(x, weight.mT if layer.fan_in_fan_out else weight)
        elif layer.fan_in_fan_out and weight.dtype == x.dtype:
            # PEFT makes a parameter of the transposed weight, and so the weight gets nothing from here.
            base_result = F.linear(x, weight.detach().mT)
        else:
            base_result = linear(site, x, weight, None, transposed=layer.fan_in_fan_out)
    elif bias is not None:
        base_result = base_result - (copies(bias) if bias.requires_grad else bias)
    update = linear(site, linear(site, x, lora_A.weight, lora_A.bias), lora_B.weight, lora_B.bias)
    scale = copies(layer.weight) / norm
    return (scale - 1) * base_result + scale * update * scaling
