"""Opacus' recurrent layers, written in Python over linear layers: DPRNN, DPGRU, DPLSTM, packed sequences too.

The module's own forward runs; the linear layers inside its cells go through the tape, each call with the examples that are
still running at that time step. In a packed sequence rows are sorted by length: row i belongs to example
``sorted_indices[i]``, in the tape as in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastclip.layers.linear import linear
from fastclip.layers.registry import register_layer
from fastclip.layers.site import Site


def _cells(module: Any) -> list[nn.Module]:
    return [layer for cell in module.cells for layer in (cell.ih, cell.hh)]


def linear_parts(module: Any) -> tuple[list[str], list[Any]]:
    """The linear layers of its cells: names from the module on, and themselves."""
    own = _cells(module)
    found = {layer: name for name, layer in module.named_modules()}
    return [found[layer] for layer in own], own


def _sequences(input: Tensor | PackedSequence, state_init: Any = None) -> Tensor:
    if isinstance(input, PackedSequence):
        examples = int(input.batch_sizes[0])
        return torch.empty(examples, examples, device="meta")  # nothing but their number, whichever dimension is asked
    return input


@contextmanager
def _followed(site: Site, layers: list[Any], order: Tensor) -> Iterator[None]:
    sites: dict[int, Site] = {}

    def run(layer: Any, x: Tensor) -> Tensor:  # x [b, d], the first b of the sorted examples
        rows = x.shape[0]
        if rows not in sites:
            sites[rows] = site.of(order[:rows])
        return linear(sites[rows], x, layer.weight, layer.bias)

    for layer in layers:
        layer.__dict__["forward"] = partial(run, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


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
    with _followed(site, _cells(module), order):
        return type(module).forward(module, input, state_init)
