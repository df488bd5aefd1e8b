"""Cumulants of the privacy loss, of one step and of many together, by quadrature.

One step's loss l = log dP/dQ of the pair (P, Q) in `fastclip.accounting.pld` is a random variable: X when the output
comes from Q, Y when it comes from P. Losses of independent steps add up, and so do their cumulants.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import special

from fastclip.accounting.accountants import StepEvent, check_count, merge
from fastclip.accounting.mixture import FloatArray, Mixture, meeting

SMALLEST_NOISE = 0.02
# Standard deviations that quadrature reaches: the Gaussian's tail there is 1e-44.
REACH = 14.0
_FLIP = np.array([-1.0, 1.0, -1.0, 1.0, -1.0])


class Law(NamedTuple):
    """What is known of the distribution of a loss, or of a sum of `terms` independent ones."""

    cumulants: FloatArray  # [5]: mean, variance, third to fifth
    third: float  # E |loss - mean|^3, added up
    terms: int = 1

    def standardized(self, order: int) -> float:
        """Skewness for order 3, excess kurtosis for 4."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return float(self.cumulants[order - 1] / self.cumulants[1] ** (order / 2))

    def flipped(self) -> "Law":
        return self._replace(cumulants=_FLIP * self.cumulants)


Pair = tuple[Law, Law]


def cumulants(noise_multiplier: float, sample_rate: float, examples_per_user: int = 1) -> tuple[FloatArray, FloatArray]:
    """Mean, variance and third to fifth cumulant of one step's loss l, with output from Q and from P: [5], [5].

    Adding a unit has those of -l, with output from P and from Q. Raises ValueError for bad input.
    """
    pairs = pairs_of(merged_steps([StepEvent(noise_multiplier, sample_rate)], examples_per_user), examples_per_user)
    if pairs is None:
        raise ValueError(f"noise_multiplier={noise_multiplier!r} is too small for a quadrature; give more noise")
    return pairs[0][0].cumulants.copy(), pairs[0][1].cumulants.copy()


def merged_steps(steps: Iterable[StepEvent], users: int) -> list[StepEvent]:
    """The steps sorted and equal ones put together, so that their order does not change a bit of the result."""
    check_count("examples_per_user", users, least=1)
    steps = list(steps)
    if any(step.max_batch is not None for step in steps):
        raise ValueError('max_batch is beyond cumulants, which know no draws that are cut; use accountant="pld"')
    return merge(steps)


def pairs_of(steps: Sequence[StepEvent], users: int) -> tuple[Pair, Pair] | None:
    """(X, Y) of all steps together for removing and for adding; None where a step has too little noise."""
    sums = [Law(np.zeros(5), 0.0, 0), Law(np.zeros(5), 0.0, 0)]
    for step in steps:
        floor = 0.0 if step.sample_rate == 1 else SMALLEST_NOISE * meeting(step.sample_rate, users)
        if step.noise_multiplier <= floor:
            return None
        for i, law in enumerate(_laws(step.noise_multiplier, step.sample_rate, int(users))):
            cumulants = sums[i].cumulants + step.count * law.cumulants
            sums[i] = Law(cumulants, sums[i].third + step.count * law.third, sums[i].terms + step.count)
    x, y = sums
    return (x, y), (y.flipped(), x.flipped())


@lru_cache(maxsize=1024)
def _laws(noise: float, rate: float, users: int) -> Pair:
    """X and Y of one step."""
    if rate == 1:
        shift = users / noise
        third = math.sqrt(8 / math.pi) * shift**3
        return (
            Law(np.array([-(shift**2) / 2, shift**2, 0, 0, 0]), third),
            Law(np.array([shift**2 / 2, shift**2, 0, 0, 0]), third),
        )
    mixture = Mixture(noise, rate, users)
    # In units of the noise, l is analytic but for points pi * noise beside the real line: there P's density vanishes.
    # The trapezoid rule's error is exp(-2 pi distance / spacing), here exp(-390).
    spacing = min(1.0, noise) / 20
    x = np.arange(-REACH, REACH + mixture.meeting / noise, spacing)
    terms = mixture.log_weights + (x[:, None] - mixture.drawn / (2 * noise)) * mixture.drawn / noise
    loss = np.logaddexp(mixture.log_never, special.logsumexp(terms, axis=1))
    scale = spacing / math.sqrt(2 * math.pi)
    return _law(loss, scale * np.exp(-(x**2) / 2)), _law(loss, scale * np.exp(loss - x**2 / 2))


def _law(loss: FloatArray, weights: FloatArray) -> Law:
    mean = weights @ loss
    second, third, fourth, fifth = (weights @ (loss - mean) ** k for k in (2, 3, 4, 5))
    cumulants = np.array([mean, second, third, fourth - 3 * second**2, fifth - 10 * second * third])
    return Law(cumulants, float(weights @ np.abs(loss - mean) ** 3))
