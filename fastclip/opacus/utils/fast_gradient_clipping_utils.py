"""`opacus.utils.fast_gradient_clipping_utils`: losses of examples, and the one backward that clips their gradients."""

from __future__ import annotations

from typing import Any

import opacus.utils.fast_gradient_clipping_utils as theirs
from torch import Tensor

from fastclip.opacus._mirror import delegate


class DPTensorFastGradientClipping(theirs.DPTensorFastGradientClipping):
    """Losses ``[B]`` of a batch, with arithmetic; ``backward()`` leaves the sum of clipped gradients in ``p.grad``."""

    def _like(self, losses: Tensor) -> DPTensorFastGradientClipping:
        return type(self)(self.module, self.optimizer, losses, self.loss_reduction)

    def __truediv__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._like(self.loss_per_sample / other)

    def __mul__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._like(self.loss_per_sample * other)

    def __add__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._like(self.loss_per_sample + self._losses_of(other))

    def __sub__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._like(self.loss_per_sample - self._losses_of(other))

    def __rsub__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._like(other - self.loss_per_sample)

    def __neg__(self) -> DPTensorFastGradientClipping:
        return self._like(-self.loss_per_sample)

    def _losses_of(self, other: Any) -> Any:
        if not isinstance(other, theirs.DPTensorFastGradientClipping):
            return other
        if other.loss_reduction != self.loss_reduction:
            raise ValueError(
                f"Cannot add or subtract losses with different reductions: {self.loss_reduction} vs {other.loss_reduction}"
            )
        return other.loss_per_sample

    def backward(self) -> None:
        """One backward, at whose end the model clips.

        Losses ``[B, ...]`` count as their mean over the rest, or their sum, as loss_reduction says. Raises ValueError if there
        are not as many losses as examples in the model's last forward: a loss a token, say, needs ``shape=``.
        """
        losses = self.loss_per_sample
        examples = self.module.last_examples
        if losses.dim() == 0 or losses.shape[0] != examples:
            raise ValueError(
                f"the losses have shape {list(losses.shape)} for {examples} examples: give one loss for each example, or "
                "shape=logits.shape [B, T, V] for losses of flattened tokens"
            )
        if self.loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction = {self.loss_reduction}. Only 'sum' and 'mean' losses are supported")
        if losses.dim() > 1:
            losses = losses.flatten(1).mean(1) if self.loss_reduction == "mean" else losses.flatten(1).sum(1)
        total = losses.sum()
        (total / max(examples, 1) if self.loss_reduction == "mean" else total).backward()


class DPLossFastGradientClipping(theirs.DPLossFastGradientClipping):
    """A criterion that answers with the losses of examples. Arguments as Opacus'.

    Raises AssertionError if module, optimizer and criterion do not reduce losses in the same way.
    """

    def __call__(self, *args: Any, shape: Any = None, **kwargs: Any) -> DPTensorFastGradientClipping:
        """``shape``: the logits' ``[B, T, V]`` where losses are of flattened tokens; ignored tokens do not count in a mean."""
        # By name: next in a subclass's order is Opacus' class of the same kind.
        losses = theirs.DPLossFastGradientClipping.__call__(self, *args, shape=shape, **kwargs).loss_per_sample
        return DPTensorFastGradientClipping(self.module, self.optimizer, losses, self.loss_reduction)


__getattr__, __dir__ = delegate(__name__)
