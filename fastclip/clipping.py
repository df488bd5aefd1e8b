"""Clipping rules: norms of units to factors.

A rule puts parameters into K groups, sees the norms ``[K, U]`` of all units and answers with factors ``[K, U]``, so that
the clipped gradient of unit u is ``factors[k, u]`` times its gradient in each group k.

Guarantee of every rule: the L2 norm of a unit's clipped gradient over all groups is at most ``max_grad_norm``, its
``sensitivity``; factors of one unit depend on that unit's norms alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Layer = tuple[str, ...]  # the parameter names of one layer


@runtime_checkable
class ClippingRule(Protocol):
    """What a rule object offers.

    ``max_grad_norm`` is its sensitivity C, in the units of the gradient norm; ``groups`` answers with one group index
    per layer and is asked again whenever the set of trainable parameters changes.
    """

    max_grad_norm: float

    def groups(self, layers: Sequence[Layer]) -> list[int]: ...

    def factors(self, norms: Tensor) -> Tensor: ...


def check_norm(name: str, value: float) -> float:
    """``value`` as a float. Raises ValueError unless it is positive and finite."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}: it bounds what one unit can contribute")
    return number


def _flat(norms: Tensor, bound: float) -> Tensor:
    return torch.full_like(norms, bound).div_(norms).clamp_(max=1.0)


class Flat:
    """``min(1, C / |g|)`` over all parameters together (Abadi et al. 2016, section 3.1)."""

    def __init__(self, max_grad_norm: float) -> None:
        self.max_grad_norm = check_norm("max_grad_norm", max_grad_norm)

    def groups(self, layers: Sequence[Layer]) -> list[int]:
        return [0] * len(layers)

    def factors(self, norms: Tensor) -> Tensor:
        return _flat(norms, self.max_grad_norm)


class Automatic(Flat):
    """AUTO-S, ``C / (|g| + gamma)``: every unit is normalised, small ones a little less (Bu et al. 2023, section 4)."""

    gamma = 0.01

    def factors(self, norms: Tensor) -> Tensor:
        return self.max_grad_norm / (norms + self.gamma)


class PerLayer(Flat):
    """Each of K layers clipped to ``C / sqrt(K)`` (McMahan et al. 2018): the whole stays within C."""

    def groups(self, layers: Sequence[Layer]) -> list[int]:
        return list(range(len(layers)))

    def factors(self, norms: Tensor) -> Tensor:
        return _flat(norms, self.max_grad_norm / math.sqrt(max(norms.shape[0], 1)))


class PerGroup:
    """Named groups with a bound each; the sensitivity is the square root of the sum of their squares.

    bounds: prefix of parameter names -> C of that group. A layer belongs to the longest prefix that starts any of its
    names. Raises ValueError from ``groups`` if a layer has none or straddles two.
    """

    def __init__(self, bounds: Mapping[str, float]) -> None:
        if not bounds:
            raise ValueError("bounds must name at least one group, got {}")
        self.bounds = {prefix: check_norm(f"bounds[{prefix!r}]", c) for prefix, c in bounds.items()}

    @property
    def max_grad_norm(self) -> float:
        return math.sqrt(sum(c * c for c in self.bounds.values()))

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        scale = check_norm("max_grad_norm", value) / self.max_grad_norm
        self.bounds = {prefix: c * scale for prefix, c in self.bounds.items()}

    def groups(self, layers: Sequence[Layer]) -> list[int]:
        prefixes = list(self.bounds)
        chosen = []
        for layer in layers:
            found = {max((p for p in prefixes if name.startswith(p)), key=len, default=None) for name in layer}
            if len(found) != 1 or None in found:
                raise ValueError(
                    f"bounds must put each layer into one group; {layer} falls into {sorted(map(str, found))}"
                )
            chosen.append(prefixes.index(str(found.pop())))
        return chosen

    def factors(self, norms: Tensor) -> Tensor:
        bounds = norms.new_tensor(list(self.bounds.values()))[: norms.shape[0], None]  # [K, 1]
        return (bounds / norms).clamp_(max=1.0)


RULES = {"flat": Flat, "automatic": Automatic, "per_layer": PerLayer}


def make_rule(clipping: str | ClippingRule, max_grad_norm: float) -> ClippingRule:
    """The rule of that name with bound ``max_grad_norm``, or the rule object itself.

    Raises ValueError for an unknown name, for a bound that is not positive, and for a rule object whose own bound is
    another than ``max_grad_norm``: there is one source for C.
    """
    check_norm("max_grad_norm", max_grad_norm)
    if isinstance(clipping, str):
        if clipping not in RULES:
            raise ValueError(f"clipping must be one of {', '.join(RULES)} or a rule object, got {clipping!r}")
        return RULES[clipping](max_grad_norm)
    if not isinstance(clipping, ClippingRule):
        raise ValueError(f"clipping must have max_grad_norm, groups() and factors(), got {clipping!r}")
    if not math.isclose(clipping.max_grad_norm, max_grad_norm, rel_tol=1e-9):
        raise ValueError(
            f"max_grad_norm is {max_grad_norm}, but the rule's own is {clipping.max_grad_norm}: pass the rule's"
        )
    return clipping
