"""`opacus.optimizers.optimizer_fast_gradient_clipping`: the release of sums that a ghost-clipping model has clipped already."""

from __future__ import annotations

from typing import Any

import opacus.optimizers.optimizer_fast_gradient_clipping as theirs
import torch
from torch.optim import Optimizer

from fastclip.opacus._mirror import delegate
from fastclip.opacus.grad_sample._parameter import tape_of
from fastclip.opacus.grad_sample._tape import GhostTape
from fastclip.opacus.optimizers._adaptive import AdaptiveNorm
from fastclip.opacus.optimizers.optimizer import DPOptimizer, sum_of


class DPOptimizerFastGradientClipping(DPOptimizer, theirs.DPOptimizerFastGradientClipping):
    """Arguments as :class:`DPOptimizer`. ``max_grad_norm`` is the model's: setting it here sets it there.

    Raises ValueError if the model clips to another C, RuntimeError in ``step()`` for a ``p.grad`` that the model did not clip.
    """

    def __init__(self, optimizer: Optimizer, *, max_grad_norm: float, **kwargs: Any) -> None:
        self.original_optimizer = optimizer
        for tape in self._ghosts():
            if tape.max_grad_norm != max_grad_norm:
                raise ValueError(
                    f"max_grad_norm is {max_grad_norm}, but the model clips to {tape.max_grad_norm}: noise must fit the "
                    "clipping, give both the same"
                )
        self._backwards = 0
        self.adaptive: AdaptiveNorm | None = None  # where C follows a quantile
        super().__init__(optimizer, max_grad_norm=max_grad_norm, **kwargs)

    def _ghosts(self) -> list[GhostTape]:
        found = {id(tape): tape for p in self.params if isinstance(tape := tape_of(p), GhostTape)}
        return list(found.values())

    def _set_max_grad_norm(self, value: float) -> None:
        super()._set_max_grad_norm(value)
        for tape in self._ghosts():
            tape.max_grad_norm = self._max_grad_norm

    @property
    def accumulated_iterations(self) -> int:
        return max(self._backwards, 1)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the sums that the model left into ``p.summed_grad``; ``p.grad`` is free for the next backward."""
        ghosts = self._ghosts()
        for tape in ghosts:
            if tape.max_grad_norm != self.max_grad_norm:
                raise ValueError(
                    f"the model clips to {tape.max_grad_norm}, but noise is for {self.max_grad_norm}: set it on the optimizer"
                )
        if len(ghosts) > 1:
            raise ValueError("two ghost-clipping models under one optimizer clip apart: wrap them as one module")
        params = [(p, isinstance(tape_of(p), GhostTape)) for p in self.params]
        # Names are looked up where one is needed only: that goes through the whole model.
        followed = [p for p, ghost in params if ghost]
        sums = ghosts[0].sums.check(followed, lambda p: ghosts[0].parameters().get(p, "?")) if ghosts else {}
        totals = []
        for p, ghost in params:
            if ghost:
                total = sums.get(p)
            elif ghosts:
                raise ValueError(
                    f"the optimizer trains a parameter of shape {list(p.shape)} that the model does not have: its "
                    "gradient would not be clipped"
                )
            elif not hasattr(p, "_forward_counter"):  # which Opacus' own wrappers leave
                raise ValueError("Per sample gradient not found. Are you using GradSampleModule?")
            else:
                total = p.grad
            if hasattr(sum_of(p), "_processed"):
                raise ValueError(
                    "Gradients haven't been cleared since the last optimizer step. In order to obtain privacy guarantees you "
                    "must call optimizer.zero_grad() on each step"
                )
            totals.append((p, total))
        for p, total in totals:
            if total is not None:
                waiting = sum_of(p)
                p.summed_grad = total.detach() if waiting is None else waiting.add_(total)
                p.grad = None
        self._backwards = sum(tape.backwards for tape in ghosts)
        for tape in ghosts:
            tape.sums.clear()
            tape.backwards = 0

    def clip_and_accumulate(self) -> None:
        """The model has clipped; this is where its sums are taken."""
        self.accumulate()

    def _effective_noise_multiplier(self) -> float:
        sigma = self.noise_multiplier
        return sigma if self.adaptive is None else self.adaptive.sum_multiplier(sigma, self._public_batch())

    def _public_batch(self) -> float:
        assert self.expected_batch_size is not None
        return self.expected_batch_size

    def _after_release(self) -> None:
        if self.adaptive is not None:
            self.max_grad_norm = self.adaptive.moved(self.max_grad_norm, self._public_batch(), self._noise.of_release())

    def _drop_sum(self) -> None:
        super()._drop_sum()
        if self.adaptive is not None:
            self.adaptive.unclipped = 0

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear ``p.grad``, and ``p.summed_grad`` unless it waits for more of a logical batch."""
        for tape in self._ghosts():
            tape.sums.clear()
            tape.backwards = 0
        if not self._is_last_step_skipped:
            self._drop_sum()
        for p in self._held():
            p.grad = None if p.grad is not None and tape_of(p) is not None else p.grad
        self.original_optimizer.zero_grad(set_to_none)


__getattr__, __dir__ = delegate(__name__)
