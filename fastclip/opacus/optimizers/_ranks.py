"""What optimizers of several processes do beside one: noise on one rank, sums over all."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from fastclip.opacus.optimizers.optimizer import DPOptimizer


class OverRanks(DPOptimizer):
    """Rank 0 adds the noise; ``p.grad`` is then summed over ranks. ``expected_batch_size`` is a rank's."""

    rank: int
    world_size: int

    def add_noise(self) -> None:
        if self.rank == 0:
            super().add_noise()
            return
        for _, p, total, _ in self._totals():
            self._publish(p, total)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum ``p.grad`` over ranks; the mean is over all ranks' examples."""
        for p in self.params:
            if p.requires_grad:
                dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                if self.loss_reduction == "mean":
                    p.grad /= self.world_size

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.pre_step():
            self.reduce_gradients()
            self._step_wrapped()
        return loss
