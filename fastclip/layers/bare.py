"""Modules that own parameters and use them in code of their own: norms of other libraries, scales, class tokens, prompts.

Two ways, both exact. *Copies*: the module's own forward runs once, with a copy of each parameter a row in the parameter's
place, in the shape that broadcasts against the module's input. Whether that means the same is not guessed: layout.py
compares it with the module's own forward, and with one row's copies moved, before it is used. *Loop*: the forward runs
row by row, each with its own copies; always right where rows are independent, and as slow as it sounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastclip.layers.site import Site

Targets = Sequence[tuple[nn.Module, str]]  # (holder, attribute) of each parameter that is used bare


@contextmanager
def shadowed(targets: Targets, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let ``holder.attribute`` be the tensor instead of the parameter, for the module's own code alone."""
    for (holder, name), tensor in zip(targets, tensors, strict=True):
        holder.__dict__[name] = tensor
    try:
        yield
    finally:
        for holder, name in targets:
            holder.__dict__.pop(name, None)


def params_of(targets: Targets) -> list[nn.Parameter]:
    return [holder._parameters[name] for holder, name in targets]  # type: ignore[misc]


def as_copies(tensor: Tensor, shape: torch.Size, rank: int) -> Tensor:
    """Copies ``[rows, *shape]`` in the shape that broadcasts against a tensor ``[rows, ...]`` of ``rank`` dimensions.

    A vector or a scalar goes to the end, behind ones; a parameter that starts with 1 gives that dimension to the rows;
    anything else gets a leading dimension (a matrix: a batched product).
    """
    if len(shape) <= 1:
        return tensor.reshape(tensor.shape[0], *[1] * max(rank - 1 - len(shape), 0), *shape)
    return tensor.reshape(tensor.shape[0], *shape[1:]) if shape[0] == 1 else tensor


def run_copies(site: Site, targets: Targets, forward: Callable[..., Any], rank: int, args: Any) -> Any:
    """The module's own forward with one copy of each parameter a row. rank: dimensions of what they meet."""
    copies = [as_copies(site.per_unit(p), p.shape, rank) for p in params_of(targets)]
    with shadowed(targets, copies):
        return forward(*args[0], **args[1])


def run_loop(site: Site, targets: Targets, forward: Callable[..., Any], batched: Sequence[bool], args: Any) -> Any:
    """The module's own forward row by row. batched: which tensor leaves of the arguments have rows in dim 0.

    Raises ValueError if an output is not a tensor with one row: it would mix rows.
    """
    if site.rows == 0:
        with torch.no_grad():
            return forward(*args[0], **args[1])
    leaves, spec = tree_flatten(args)
    copies = [site.per_unit(p) for p in params_of(targets)]  # [rows, *shape]
    outputs: list[list[Any]] = []
    out_spec = None
    for i in range(site.rows):
        own = [x[i : i + 1] if b else x for x, b in zip(leaves, batched, strict=True)]
        call_args, call_kwargs = tree_unflatten(own, spec)
        with shadowed(targets, [c[i] for c in copies]), site.one_row(i):
            out, out_spec = tree_flatten(forward(*call_args, **call_kwargs))
        outputs.append(out)
    assert out_spec is not None
    return tree_unflatten([_join(site, column) for column in zip(*outputs, strict=True)], out_spec)


def _join(site: Site, column: Sequence[Any]) -> Any:
    if not isinstance(column[0], Tensor):
        return column[0]
    if any(x.dim() == 0 or x.shape[0] != 1 for x in column):
        raise ValueError(
            f"{site.name}: owns a parameter and returns {list(column[0].shape)} for one example, not one row: compute "
            "losses and other sums over examples outside it"
        )
    return torch.cat(list(column))
