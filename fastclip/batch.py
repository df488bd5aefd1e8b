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


class UnclearBatch(ValueError):
    """The sizes of the inputs do not say how many examples there are."""


def batch_dim_of(x: Tensor, dim: int) -> int:
    """Where a model whose inputs are ``[*, B, ...]`` with B in ``dim`` has B in this one: a shorter one ends with it."""
    return min(dim, x.dim() - 1)


def leaf_names(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The parameter name of each leaf of the call, in the order of ``tree_flatten((args, kwargs))``."""
    while hasattr(forward, "original"):  # what stands in a method's place
        forward = forward.original
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


def count_examples(names: Sequence[str], leaves: Sequence[Any], main_input: str | None, dim: int = 0) -> int:
    """B, from the main input or from the one size that the inputs have in ``dim``. Raises UnclearBatch where there is none."""
    tensors = _tensors(names, leaves)
    for wanted in (main_input, "inputs_embeds"):
        for name, x in tensors:
            if name == wanted:
                return x.shape[batch_dim_of(x, dim)]
    every = {x.shape[batch_dim_of(x, dim)] for _, x in tensors}
    # One row first and K behind it: a batch of one beside K prototypes, or positions beside a batch of K.
    # By their name positions speak for nobody.
    first = next((x for name, x in tensors if name not in _POSITIONS), None)
    one_first = first is not None and first.shape[batch_dim_of(first, dim)] == 1
    sizes = every if one_first else every - {1} or every
    if len(sizes) != 1:
        shapes = {name: list(x.shape) for name, x in tensors}
        raise UnclearBatch(f"cannot tell the batch from inputs of shapes {shapes}: {_REMEDY}")
    return sizes.pop()


def batched_leaves(
    names: Sequence[str],
    leaves: Sequence[Any],
    examples: int,
    shared: Sequence[str],
    dim: int = 0,
    named: bool = False,
) -> list[bool]:
    """For each leaf, whether its batch dimension counts examples. shared: names of arguments that belong to all examples.
    named: whether somebody gave an id for each.

    Raises UnclearBatch for an argument whose size is neither B nor 1 and that is not named as shared.
    """
    flags = []
    for name, x in zip(names, leaves, strict=True):
        has_rows = isinstance(x, Tensor) and x.dim() > 0 and name not in shared
        rows = x.shape[batch_dim_of(x, dim)] if has_rows else 0
        flags.append(has_rows and rows == examples)
        if has_rows and rows not in (examples, 1):
            counted = (
                f"{examples} ids: give one per example; shared=[...] names what belongs to all"
                if named
                else f"{examples} examples: {_REMEDY}"
            )
            raise UnclearBatch(f"{name} has {rows} rows for {counted}")
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
