"""The backward half of the trial: gradients at every layer, of a model whose forward keeps examples apart.

A forward can keep examples apart and its backward couple them: a custom autograd function that adds the gradient of a loss
over the batch, a tensor hook that rescales by the whole gradient, ``h + m - m.detach()`` with a mean m. What reaches a unit's
layers then depends on other units, and no norm bounds what one unit changes. So the trial also differentiates: with one
example changed, and the gradient that comes back to its output too, every other example's gradient at every layer's output
must stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Outputs = list[tuple[str, Tensor]]  # (layer, one tensor it answered with), in the order of the calls
Gradients = list[tuple[str, Tensor | None]]  # the same, None where no gradient arrives


def coupled(name: str) -> str:
    return (
        "examples are not independent in the backward of the model: changing one changed the gradient of another at the "
        f"output of {name or 'the model'}. Remove the tensor hook, the custom backward or the loss over the batch that couples "
        "them"
    )


def weights(x: Tensor, dim: int | None, count: int, changed: Sequence[int]) -> Tensor:
    """What to weigh an output with, of its shape: ordinary numbers, others for the examples in ``changed``.

    dim: the dimension that counts the examples, of which there are ``count``; None for a loss, which is weighed by 1.
    """
    if dim is None:
        return torch.ones_like(x)
    out = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    examples = out.movedim(dim, 0).unflatten(0, (count, -1))
    for i in changed:
        examples[i] *= -2
    return out


def gradients(out: Sequence[Any], layers: Outputs, weigh: Callable[[int, Tensor], Tensor]) -> Gradients:
    """Gradients of the weighed output at each layer's output, behind all hooks on it. Raises ValueError if there is none."""
    roots = [(i, x) for i, x in enumerate(out) if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point()]
    if not roots or not layers:
        return [(name, None) for name, _ in layers]
    try:
        # Of several devices' threads only this one is free of dropout.
        with torch.autograd.set_multithreading_enabled(False):
            found = torch.autograd.grad(
                [x for _, x in roots], [x for _, x in layers], [weigh(i, x) for i, x in roots], allow_unused=True
            )
    except RuntimeError as error:
        raise ValueError(
            f"the model's backward could not be run on a few examples of its first batch ({error}): nothing is known then of "
            "whether it keeps examples apart"
        ) from error
    return [(name, g) for (name, _), g in zip(layers, found, strict=True)]
