"""`opacus.optimizers.adaclipoptimizer`: C follows a quantile of the gradients' norms (Andrew et al. 2021).

Each release also counts how many examples were not clipped, with noise of standard deviation ``unclipped_num_std``. Both
together are one Gaussian mechanism of ``noise_multiplier`` (Theorem 1), because the sum's own noise is larger by that much. The
fraction is of the expected batch size, which is public, where Opacus divides by the size of the batch, which is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import opacus.optimizers.adaclipoptimizer as theirs
from torch import Tensor
from torch.optim import Optimizer

from fastclip.opacus._mirror import delegate
from fastclip.opacus.optimizers._adaptive import Quantile, noisy_count, sum_multiplier
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
        sum_multiplier(noise_multiplier, unclipped_num_std)  # refuses what does not fit
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
        return sum_multiplier(self.noise_multiplier, self.unclipped_num_std)

    def _expected(self) -> float:
        return self.expected_batch_size if self.expected_batch_size is not None else max(self.sample_size, 1)

    def _after_release(self) -> None:
        source = self._noise.of_release()
        self.unclipped_num = noisy_count(self._counted, self._expected(), self.unclipped_num_std, source)
        self.update_max_grad_norm()

    def update_max_grad_norm(self) -> None:
        """Move C towards the bound that ``target_unclipped_quantile`` of the examples stay within."""
        quantile = Quantile(
            self.target_unclipped_quantile, self.clipbound_learning_rate, self.min_clipbound, self.max_clipbound
        )
        self.max_grad_norm = quantile.moved(self.max_grad_norm, self.unclipped_num, self._expected())
        self._counted = self.sample_size = 0

    def _drop_sum(self) -> None:
        super()._drop_sum()
        self._counted = self.sample_size = 0


__getattr__, __dir__ = delegate(__name__)
