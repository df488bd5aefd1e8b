"""`opacus.optimizers.adaclipoptimizer`: C follows a quantile of the gradients' norms (Andrew et al. 2021).

Each release also counts how many examples were not clipped, with noise of standard deviation ``unclipped_num_std``. Both
together are one Gaussian mechanism of ``noise_multiplier`` (Theorem 1), because the sum's own noise is larger by that much. The
fraction is of the expected batch size, which is public, where Opacus divides by the size of the batch, which is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import opacus.optimizers.adaclipoptimizer as theirs
import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip.noise import NoiseSource, Purpose
from fastclip.opacus._mirror import delegate
from fastclip.opacus.optimizers.optimizer import DPOptimizer
from fastclip.tape import Measure, Outcome


class AdaClipDPOptimizer(DPOptimizer, theirs.AdaClipDPOptimizer):
    """Arguments as :class:`DPOptimizer` and as Opacus' class of this name; ValueError where they do not fit."""

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        target_unclipped_quantile: float,
        clipbound_learning_rate: float,
        max_clipbound: float,
        min_clipbound: float,
        unclipped_num_std: float,
        **kwargs: Any,
    ) -> None:
        if max_clipbound <= min_clipbound:
            raise ValueError("max_clipbound must be larger than min_clipbound.")
        if not noise_multiplier < 2 * unclipped_num_std:
            raise ValueError(
                "noise_multiplier must be smaller than 2 * unclipped_num_std (Andrew et al. 2021, Theorem 1), got "
                f"{noise_multiplier} and {unclipped_num_std}"
            )
        self.target_unclipped_quantile = target_unclipped_quantile
        self.clipbound_learning_rate = clipbound_learning_rate
        self.max_clipbound, self.min_clipbound = max_clipbound, min_clipbound
        self.unclipped_num_std = unclipped_num_std
        self.sample_size, self.unclipped_num = 0, 0.0
        self._counted = 0
        DPOptimizer.__init__(self, optimizer, noise_multiplier=noise_multiplier, **kwargs)

    def clip_factors(self, measures: Sequence[Measure], params: Sequence[Tensor]) -> tuple[Outcome, Sequence[int]]:
        outcome, rows = super().clip_factors(measures, params)
        self.sample_size += outcome.norms.numel()
        self._counted += int((outcome.factors[0] >= 1).sum())
        return outcome, rows

    def _effective_noise_multiplier(self) -> float:
        sigma = self.noise_multiplier
        if not sigma < 2 * self.unclipped_num_std:
            raise ValueError(
                f"noise_multiplier must stay below 2 * unclipped_num_std = {2 * self.unclipped_num_std}, is {sigma}"
            )
        return (sigma**-2 - (2 * self.unclipped_num_std) ** -2) ** -0.5 if sigma else 0.0

    def add_noise(self) -> None:
        source = self._source() or self._noise.of_release()
        for _, p, total, offset in self._totals():
            self._noisy(p, total, source if self.noise_std else None, offset)
        self.unclipped_num = self._noisy_count(source)

    def _noisy_count(self, source: NoiseSource) -> float:
        # Half of the batch is taken off before and added after, so that an example moves the count by one half.
        half = self._expected() / 2
        count = torch.tensor([self._counted - half], dtype=torch.float32)
        source.add_(count, self.unclipped_num_std, offset=0, purpose=Purpose.QUANTILE)
        return float(count) + half

    def _expected(self) -> float:
        return self.expected_batch_size if self.expected_batch_size is not None else max(self.sample_size, 1)

    def update_max_grad_norm(self) -> None:
        """Move C towards the bound that ``target_unclipped_quantile`` of the examples stay within."""
        fraction = min(max(self.unclipped_num / self._expected(), 0.0), 1.0)
        step = math.exp(-self.clipbound_learning_rate * (fraction - self.target_unclipped_quantile))
        self.max_grad_norm = min(max(self.max_grad_norm * step, self.min_clipbound), self.max_clipbound)
        self._counted = self.sample_size = 0

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        done = DPOptimizer.pre_step(self)
        if done:
            self.update_max_grad_norm()
        return done

    def zero_grad(self, set_to_none: bool = False) -> None:
        DPOptimizer.zero_grad(self, set_to_none)
        if not self._is_last_step_skipped:
            self._counted = self.sample_size = 0


__getattr__, __dir__ = delegate(__name__)
