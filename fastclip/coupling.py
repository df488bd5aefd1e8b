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
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

Arrival = Callable[[int, Tensor], None]  # the number of a tapped tensor, and the gradient that arrived at it


class _Tap(Function):
    """x itself; its gradient is shown to ``see`` on its way back. anchor: what makes every tap part of the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, see: Callable[[Tensor], None]) -> Tensor:
        ctx.see, ctx.anchor = see, anchor
        # Not a view: the code behind a layer may change its output in place.
        return torch.ops.aten._unsafe_view(x, x.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.see(g)
        return g, torch.zeros_like(ctx.anchor), None


class Taps:
    """Gradients at what layers answer with, shown one by one instead of kept: together they are as large as activations.

    names, shapes: of the tapped tensors, in the order of the calls.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.shapes: list[torch.Size] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._arrive: Arrival | None = None

    def tap(self, name: str, out: Any) -> Any:
        """A layer's answer, whose tensors are followed from now on; what is not differentiable stays as it is."""

        def followed(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.requires_grad:
                return x
            number = len(self.names)
            self.names.append(name)
            self.shapes.append(x.shape)
            return _Tap.apply(x, self._anchor, lambda g: self._arrive and self._arrive(number, g))

        return tree_map(followed, out, is_leaf=lambda x: isinstance(x, PackedSequence))

    def differentiate(self, out: Sequence[Any], weigh: Callable[[int, Tensor], Tensor], arrive: Arrival) -> None:
        """Run the backward of the weighed outputs, through all hooks on them. Raises ValueError if it fails.

        out: the model's output leaves; those that are not differentiable are left out. weigh: weights of leaf i, of its shape.
        """
        roots = [
            (i, x) for i, x in enumerate(out) if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point()
        ]
        if not roots or not self.names:
            return
        self._arrive = arrive
        try:
            # Of several devices' threads only this one is free of dropout.
            with torch.autograd.set_multithreading_enabled(False):
                weighed = [weigh(i, x) for i, x in roots]
                torch.autograd.grad([x for _, x in roots], [self._anchor], weighed, allow_unused=True)
        except RuntimeError as error:
            raise ValueError(
                f"the model's backward could not be run on a few examples of its first batch ({error}): nothing is known then "
                "of whether it keeps examples apart"
            ) from error
        finally:
            self._arrive = None


def check_same_layers(names: Sequence[str], others: Sequence[str]) -> None:
    """Raises ValueError unless two runs had the same layers answer in the same order: nothing else can be compared."""
    if list(names) != list(others):
        different = sorted(set(names) ^ set(others)) or ["the layers"]
        raise ValueError(
            f"{', '.join(different)}: how often or in which order they answer depends on how many examples there are or on "
            "what those hold: run them always"
        )


def coupled(name: str) -> str:
    return (
        "examples are not independent in the backward of the model: changing one changed the gradient of another at the "
        f"output of {name or 'the model'}. Remove the tensor hook, the custom backward or the loss over the batch that couples "
        "them; a transformers model's own loss is a mean over the batch's tokens: call it without labels and take one loss per "
        "example, as fastclip.huggingface.causal_lm_losses does"
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
