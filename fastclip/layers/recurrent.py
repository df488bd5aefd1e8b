"""Opacus' recurrent layers, written in Python over linear layers: DPRNN, DPGRU, DPLSTM, packed sequences too.

The module's own forward runs, and so do its cells' and their parts'; what these hand to ``F.linear`` with a weight of theirs
goes through the tape, each call with the examples that are still running at that time step. In a packed sequence rows are
sorted by length: row i belongs to example ``sorted_indices[i]``, in the tape as in the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastclip.layers.calls import Catch
from fastclip.layers.projection import Followed, FollowLinear, Projection
from fastclip.layers.registry import register_layer
from fastclip.layers.site import Site


def _cells(module: Any) -> list[nn.Module]:
    return [layer for cell in module.cells for layer in (cell.ih, cell.hh)]


def _sequences(input: Tensor | PackedSequence, state_init: Any = None) -> Tensor:
    if isinstance(input, PackedSequence):
        examples = int(input.batch_sizes[0])
        return torch.empty(examples, examples, device="meta")  # nothing but their number, whichever dimension is asked
    return input


class _Running:
    """The cells' linear layers, x ``[b, d]`` being the first b of the sorted rows. order: each row's example."""

    def __init__(self, site: Site, module: nn.Module, order: Tensor) -> None:
        self._site, self._module, self._order = site, module, order
        self._parts: dict[int, Followed] = {}

    def linear(self, x: Tensor, which: Projection) -> Tensor:
        rows = x.shape[0]
        if rows not in self._parts:
            self._parts[rows] = Followed(self._site.of(self._order[:rows]), self._module)
        return self._parts[rows].linear(x, which)


@register_layer(
    "opacus.layers.dp_rnn.DPRNN",
    "opacus.layers.dp_rnn.DPGRU",
    "opacus.layers.dp_rnn.DPLSTM",
    norm="Gram, or the gradient itself where that is smaller",
    owns=_cells,
    rows_of=_sequences,
)
def recurrent_layer(site: Site, module: Any, input: Tensor | PackedSequence, state_init: Any = None) -> Any:
    """Arguments and results as the module's forward."""
    order = torch.arange(site.rows)
    if isinstance(input, PackedSequence) and input.sorted_indices is not None:
        order = input.sorted_indices
    owners = site.units.unit_of
    if owners is not None and owners.numel():  # where the model made several rows of each example
        order = order // (site.rows // owners.numel())
    return recurrent(_Running(site, module, order), module, input, state_init)


def recurrent(parts: FollowLinear, module: Any, input: Any, *args: Any) -> Any:
    """The module's forward. parts: how the linear layers of its cells run."""
    names = {layer: name for name, layer in module.named_modules()}
    layers: list[Any] = _cells(module)

    def run(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for layer in layers:
            if func is F.linear and layer.weight is weight and (bias is None or layer.bias is bias):
                return parts.linear(
                    x, Projection(f"{names[layer]}.weight", None if bias is None else f"{names[layer]}.bias")
                )
        raise NotImplementedError(
            f"{type(module).__name__}: a cell uses its weight in another way than F.linear with its own bias, which cannot be "
            "followed: let its parts be linear layers, or freeze them"
        )

    with Catch([layer.weight for layer in layers], run):
        return type(module).forward(module, input, *args)
