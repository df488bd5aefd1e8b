"""Which arguments of a forward carry the batch, and how many examples there are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastclip.units import PrivacyUnits

_REMEDY = "say whose each example is, and which arguments belong to all: clipper.units(ids=..., shared=[names])"
# Changing these for one example may change which rows attend to which, by the model's own rules.
_POSITIONS = ("position_ids", "cu_seqlens", "cache_position")


def leaf_names(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The parameter name of each leaf of the call, in the order of ``tree_flatten((args, kwargs))``."""
    try:
        parameters = [p.name for p in inspect.signature(forward).parameters.values()]
    except (TypeError, ValueError):
        parameters = []
    names = []
    for i, value in enumerate(args):
        names += [parameters[i] if i < len(parameters) else f"argument {i}"] * len(tree_leaves(value))
    for key, value in kwargs.items():
        names += [key] * len(tree_leaves(value))
    return names


def _tensors(names: Sequence[str], leaves: Sequence[Any]) -> list[tuple[str, Tensor]]:
    return [(n, x) for n, x in zip(names, leaves, strict=True) if isinstance(x, Tensor) and x.dim() > 0]


def count_examples(names: Sequence[str], leaves: Sequence[Any], main_input: str | None) -> int:
    """B, from the main input or from the one size that dim 0 of the inputs has. Raises ValueError where that is unclear."""
    tensors = _tensors(names, leaves)
    for wanted in (main_input, "inputs_embeds"):
        for name, x in tensors:
            if name == wanted:
                return x.shape[0]
    sizes = {x.shape[0] for _, x in tensors} - {1} or {x.shape[0] for _, x in tensors}
    if len(sizes) != 1:
        shapes = {name: list(x.shape) for name, x in tensors}
        raise ValueError(f"cannot tell the batch from inputs of shapes {shapes}: {_REMEDY}")
    return sizes.pop()


def batched_leaves(names: Sequence[str], leaves: Sequence[Any], examples: int, shared: Sequence[str]) -> list[bool]:
    """For each leaf, whether dim 0 counts examples. shared: names of arguments that belong to all examples.

    Raises ValueError for an argument whose size is neither B nor 1 and that is not named as shared.
    """
    flags = []
    for name, x in zip(names, leaves, strict=True):
        has_rows = isinstance(x, Tensor) and x.dim() > 0 and name not in shared
        flags.append(has_rows and x.shape[0] == examples)
        if has_rows and x.shape[0] not in (examples, 1):
            raise ValueError(f"{name} has {x.shape[0]} rows for {examples} examples: {_REMEDY}")
    if examples and not any(flags):
        shapes = {name: list(x.shape) for name, x in _tensors(names, leaves)}
        raise ValueError(f"there are {examples} examples, but the inputs have shapes {shapes}: one id per example")
    return flags


def packed_leaves(
    names: Sequence[str], leaves: Sequence[Any], units: PrivacyUnits, main_input: str | None
) -> list[bool]:
    """For each leaf, whether it holds the packed rows, ``[N, ...]`` or ``[1, N, ...]``, positions left out.

    Raises ValueError if none does: offsets do not cover the rows.
    """
    rows = units.num_rows
    flags = [
        isinstance(x, Tensor) and x.dim() > 0 and (x.shape[0] == rows or tuple(x.shape[:2]) == (1, rows))
        for x in leaves
    ]
    if not any(flags):
        shapes = {name: list(x.shape) for name, x in _tensors(names, leaves)}
        raise ValueError(f"offsets end at {rows}, but no input has so many rows: {shapes}")
    main = [f and name in (main_input, "inputs_embeds") for name, f in zip(names, flags, strict=True)]
    return main if any(main) else [f and n not in _POSITIONS for n, f in zip(names, flags, strict=True)]
