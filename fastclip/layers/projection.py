"""Parts of a layer that are no layers of their own: projections of attention, of recurrent cells, of a low-rank update.

A rule of such a layer says by name which part it means; what that becomes depends on who runs the rule: the tape follows it
(:class:`Followed`), or a compiler gets an operator for it (compiled.py).
"""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from fastclip.layers.linear import linear
from fastclip.layers.site import Site


class Projection(NamedTuple):
    """Where a linear layer inside a module stands.

    weight, bias: their names from the module on, dotted. rows, bias_rows: which of their rows are meant, first and last; None:
    all. transposed: the weight is ``[d, p]``. copies: no product, but a copy of the weight for each row of the input.
    """

    weight: str
    bias: str | None = None
    rows: tuple[int, int] | None = None
    bias_rows: tuple[int, int] | None = None
    transposed: bool = False
    copies: bool = False

    def parameters(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, whole. A bias that is not there is None."""
        return attrgetter(self.weight)(module), None if self.bias is None else attrgetter(self.bias)(module)

    def blocks(self) -> tuple[slice | None, slice | None]:
        """The rows of weight and bias."""
        return _slice(self.rows), _slice(self.bias_rows)


def _slice(rows: tuple[int, int] | None) -> slice | None:
    return None if rows is None else slice(*rows)


class FollowLinear(Protocol):
    """How a rule runs the linear layers of its layer."""

    def linear(self, x: Tensor, which: Projection) -> Tensor:
        """x ``[rows, ..., d]`` to ``[rows, ..., p]``."""
        ...


class Follow(FollowLinear, Protocol):
    """And parameters that meet each row by themselves."""

    def copies(self, name: str, like: Tensor) -> Tensor:
        """A copy of the parameter for each row of ``like``, ``[rows, *shape]``."""
        ...


class Followed:
    """By the tape. site: that of the layer's call."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        self._site, self._module = site, module

    def linear(self, x: Tensor, which: Projection) -> Tensor:
        weight, bias = which.parameters(self._module)
        return linear(self._site, x, weight, bias, which.transposed, *which.blocks())

    def copies(self, name: str, like: Tensor) -> Tensor:
        param = attrgetter(name)(self._module)
        return self._site.per_unit(param)
