"""A clipping norm that follows a quantile of the gradients' norms (Andrew et al. 2021, arXiv 1905.03871).

Each release also counts how many examples stayed within C. The count is released with Gaussian noise of its own, once; the
sum's noise is larger by so much that both together are one Gaussian mechanism of the optimizer's noise multiplier (Theorem 1).
The fraction is of the expected batch size, which is public.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastclip.noise import NoiseSource, Purpose


def sum_multiplier(sigma: float, count_std: float) -> float:
    """The noise multiplier of the sum, beside a count with noise of ``count_std``: both cost what ``sigma`` does.

    Raises ValueError where the count's noise would leave none for the sum: ``sigma`` must be below ``2 count_std``.
    """
    if not sigma < 2 * count_std:
        raise ValueError(
            f"noise_multiplier must be smaller than 2 * unclipped_num_std = {2 * count_std} (Andrew et al. 2021, Theorem 1), "
            f"got {sigma}"
        )
    return (sigma**-2 - (2 * count_std) ** -2) ** -0.5 if sigma else 0.0


def noisy_count(count: int, expected: float, count_std: float, source: NoiseSource) -> float:
    """The count with its noise. Half of the batch is taken off before, so that an example moves the count by one half."""
    shifted = torch.tensor([count - expected / 2], dtype=torch.float32)
    source.add_(shifted, count_std, offset=0, purpose=Purpose.QUANTILE)
    return float(shifted) + expected / 2


@dataclass
class Quantile:
    """Where C goes from a noisy fraction: towards the bound that ``target`` of the examples stay within."""

    target: float
    learning_rate: float
    lowest: float
    highest: float

    def moved(self, norm: float, noisy: float, expected: float) -> float:
        fraction = min(max(noisy / expected, 0.0), 1.0)
        return min(max(norm * math.exp(-self.learning_rate * (fraction - self.target)), self.lowest), self.highest)


@dataclass
class AdaptiveNorm:
    """For ghost clipping: who of a logical batch stayed within C, with noise of ``expected / 20`` (section 3.2)."""

    quantile: Quantile
    unclipped: int = 0

    def sum_multiplier(self, sigma: float, expected: float) -> float:
        """Raises AssertionError, as Opacus, unless the expected batch size is above ``10 sigma``."""
        assert expected > 10 * sigma, (
            "Batch size is too small. For adaptive clipping the expected batch size must be above 10 * noise_multiplier = "
            f"{10 * sigma}, got {expected}"
        )
        return sum_multiplier(sigma, expected / 20)

    def moved(self, norm: float, expected: float, source: NoiseSource) -> float:
        """C for the next logical batch; the count starts again."""
        noisy = noisy_count(self.unclipped, expected, expected / 20, source)
        self.unclipped = 0
        return self.quantile.moved(norm, noisy, expected)
