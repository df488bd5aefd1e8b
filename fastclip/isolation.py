"""check_units: does any unit of a batch influence another's loss or gradient?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastclip.module import clipper_of
from fastclip.recomputation import differentiable
from fastclip.trial_modes import NoDropout

LossFunction = Callable[[nn.Module, Any], Tensor]


def check_units(model: nn.Module, loss_fn: LossFunction, batch: Any, *, max_units: int = 3) -> None:
    """Run a few units of ``batch`` alone and in the batch, and with one of them broken.

    loss_fn: ``loss_fn(model, batch)`` answers with one loss per unit, ``[B]``. batch: tensors whose dim 0 counts units, in
    any nesting of dicts, lists and tuples. Gradients, ``p.grad`` and the training mode stay as they are; dropout is off.

    Raises ValueError, naming what was seen, if the losses are not one per unit; if a unit's loss or gradient in the batch
    differs from the same unit's alone (losses averaged over the batch's tokens, BatchNorm, in-batch negatives), or the gradient
    of several from the sum of theirs (hooks that rescale by the whole gradient); if inf or NaN in one unit reaches another.
    """
    leaves, spec = tree_flatten(batch)
    sizes = {x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim() > 0} - {1}
    if len(sizes) > 1:
        raise ValueError(f"batch has tensors with {sorted(sizes)} rows; dim 0 of each must count units")
    count = sizes.pop() if sizes else 1
    params = [p for p in model.parameters() if p.requires_grad]
    clipper = clipper_of(model)

    def pick(index: Sequence[int]) -> Any:
        return tree_unflatten([_rows(x, count, index) for x in leaves], spec)

    def losses(inputs: Any, expected: int) -> Tensor:
        out = loss_fn(model, inputs)
        if not isinstance(out, Tensor) or tuple(out.shape) != (expected,):
            shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"loss_fn must return one loss per unit, shape [{expected}], got {shape}")
        return out

    with clipper.suspended() if clipper is not None else nullcontext(), NoDropout(), differentiable():
        together = losses(batch, count)
        chosen = list(range(min(count, max_units)))
        summed: list[Tensor | None] = [None] * len(params)
        for i in chosen:
            last = i == chosen[-1]
            in_batch = torch.autograd.grad(together[i], params, retain_graph=not last, allow_unused=True)
            single = losses(pick([i]), 1)
            alone = torch.autograd.grad(single[0], params, allow_unused=True)
            _compare(i, together[i].detach(), single[0].detach(), in_batch, alone)
            summed = [x if y is None else y if x is None else x + y for x, y in zip(summed, alone, strict=True)]
        if count > 1:
            # A hook that rescales by the whole gradient shows only where several units' losses go back together.
            few = losses(pick(chosen), len(chosen))
            _same_gradient(
                f"the gradient of {len(chosen)} units together differs from the sum of each one's alone",
                few.dtype,
                torch.autograd.grad(few.sum(), params, allow_unused=True),
                summed,
            )
            with torch.no_grad():
                _check_poison(model, losses, batch, leaves, spec, count, together.detach())


def _rows(x: Any, count: int, index: Sequence[int]) -> Any:
    return x[list(index)] if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == count else x


def _compare(unit: int, loss: Tensor, single: Tensor, in_batch: Sequence[Any], alone: Sequence[Any]) -> None:
    if not torch.allclose(loss, single, rtol=_tolerance(loss.dtype), atol=1e-6):
        raise ValueError(
            f"unit {unit}'s loss is {float(loss):.6g} in the batch and {float(single):.6g} alone: the loss or the model mixes "
            "units (a mean over the batch's tokens, batch statistics, in-batch negatives); make each unit's loss its own"
        )
    _same_gradient(f"unit {unit}'s gradient in the batch differs from its gradient alone", loss.dtype, in_batch, alone)


def _same_gradient(what: str, dtype: torch.dtype, found: Sequence[Any], wanted: Sequence[Any]) -> None:
    difference = scale = 0.0
    for x, y in zip(found, wanted, strict=True):
        x, y = (None if t is None else t.double() for t in (x, y))
        if x is not None:
            difference += float((x if y is None else x - y).square().sum())
            scale += float(x.square().sum())
        elif y is not None:
            difference += float(y.square().sum())
    if difference**0.5 > _tolerance(dtype) * scale**0.5 + 1e-9:
        raise ValueError(
            f"{what} by {difference**0.5:.3g} of {scale**0.5:.3g}: the model or the loss mixes units; remove what lets one see "
            "another"
        )


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


def _check_poison(
    model: nn.Module,
    losses: Callable[[Any, int], Tensor],
    batch: Any,
    leaves: Sequence[Any],
    spec: Any,
    count: int,
    clean: Tensor,
) -> None:
    """NaN and inf in unit 0, in its floating inputs or in what its ids look up, must leave the others' losses alone."""
    has_float = any(isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 for x in leaves)
    for value in (float("nan"), float("inf")):

        def poison(x: Any, value: float = value) -> Any:
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 and x.shape[0] == count:
                x = x.clone()
                x[0] = value
            return x

        handles = []
        if not has_float:
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    handles.append(module.register_forward_hook(lambda m, args, out, poison=poison: poison(out)))
        try:
            broken = losses(tree_map(poison, batch) if has_float else batch, count)
        finally:
            for handle in handles:
                handle.remove()
        if not torch.allclose(broken[1:], clean[1:], rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"{value} in unit 0 reached other units' losses ({tree_leaves(broken.tolist())[1:4]}...): masks that multiply "
                "by zero let NaN through; give each unit rows of its own"
            )
