"""A clipping norm that follows a quantile of the gradients' norms (Andrew et al. 2021), for ghost clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastclip.noise import NoiseSource, Purpose


@dataclass
class AdaptiveNorm:
    """How many examples of the logical batch stayed within C, and where C goes from there.

    The count is released with noise of standard deviation ``expected / 20`` (section 3.2), once a release; the sum's own noise
    is larger by so much that both together are one Gaussian mechanism of the optimizer's noise multiplier (Theorem 1).
    Fraction and noise are of the expected batch size, which is public.
    """

    target_unclipped_quantile: float
    min_clipbound: float
    max_clipbound: float
    clipbound_learning_rate: float
    unclipped: int = 0

    def sum_noise(self, sigma: float, expected: float) -> float:
        """The noise multiplier of the sum. Raises AssertionError where the count's noise would leave none for it."""
        assert expected > 10 * sigma, (
            "Batch size is too small. For adaptive clipping the expected batch size must be above 10 * noise_multiplier = "
            f"{10 * sigma}, got {expected}"
        )
        return (sigma**-2 - (expected / 10) ** -2) ** -0.5 if sigma else 0.0

    def moved(self, norm: float, expected: float, source: NoiseSource) -> float:
        """C for the next logical batch; the count starts again."""
        # Half of the batch is taken off before and added after, so that an example moves the count by one half.
        count = torch.tensor([self.unclipped - expected / 2], dtype=torch.float32)
        source.add_(count, expected / 20, offset=0, purpose=Purpose.QUANTILE)
        self.unclipped = 0
        fraction = min(max(float(count) / expected + 0.5, 0.0), 1.0)
        step = math.exp(-self.clipbound_learning_rate * (fraction - self.target_unclipped_quantile))
        return min(max(norm * step, self.min_clipbound), self.max_clipbound)
