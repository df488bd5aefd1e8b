"""The Edgeworth estimate of epsilon: a million steps cost what one does, and it is no bound.

One step's privacy loss l = log dP/dQ of the pair (P, Q) in `fastclip.accounting.pld` is a random variable: X when the
output comes from Q, Y when it comes from P. Losses of independent steps add up, and with F_X and F_Y the distribution
functions of the two sums, removing a unit costs exactly

    delta(epsilon) = 1 - F_Y(epsilon) - e^epsilon (1 - F_X(epsilon));

adding one is the same with -Y in the place of X and -X in the place of Y. Each F is replaced by its Edgeworth expansion
(Hall, The Bootstrap and Edgeworth Expansion, 1992, section 2.3), which needs no more than the first five cumulants of
the sum, and those are the sums of the steps' cumulants. As an accountant it is due to Wang et al., arXiv 2206.04236.

Guarantees and edge cases:

- The estimate is NOT an upper bound: where a few rare draws carry the loss, as in fine-tuning, it can fall far below
  the truth. `kurtosis` says when; docs/edgeworth.md has measurements. Noise proposed by this file is for training only
  after the "pld" accountant has confirmed it, which is what `calibrate_verified` does.
- `lower` and `upper` are bounds, up to the rounding of a quadrature in double precision. They are far apart, and at the
  deltas of fine-tuning `upper` is infinite.
- The estimate is infinite where the expansion means nothing: a kurtosis above 1, less noise than "pld" takes with
  sampling, or a value that is not a number. It is 0 when a unit is drawn at all with probability at most delta.
- Without sampling (q = 1) all beyond the second cumulant vanishes, and estimate and bounds are the exact Gaussian value.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from fastclip.accounting.accountants import (
    Accountant,
    StepEvent,
    check_count,
    check_delta,
    check_number,
    get_epsilon,
    register,
)
from fastclip.accounting.calibration import check_epsilon, get_noise_multiplier
from fastclip.accounting.finite_sample import expansion_error, law_error
from fastclip.accounting.mixture import FloatArray
from fastclip.accounting.moments import REACH, Law, Pair, cumulants, merged_steps, pairs_of
from fastclip.accounting.verified import VerifiedNoise, verified_noise

__all__ = [
    "EdgeworthEstimate",
    "VerifiedNoise",
    "calibrate_verified",
    "cumulants",
    "delta_of",
    "edgeworth",
    "expansion_error",
]

# The third order comes closer only at small kurtosis; elsewhere it blows up the direction of adding a unit.
_ORDER = 2
_LARGEST_KURTOSIS = 1.0
_GRID = 2048


@dataclass(frozen=True)
class EdgeworthEstimate:
    """Made by `edgeworth`.

    epsilon: the point estimate, the larger of `remove` and `add`. It can lie on either side of the truth.
    lower, upper: bounds on the true epsilon; 0 and inf when no interval was asked for.
    order: of the expansion behind `epsilon`. The interval is of order 1, for which alone the bounds are known.
    remove, add: the estimates for removing and for adding a unit.
    kurtosis: the largest excess kurtosis of the four sums of losses; the smaller, the better the estimate.
    rigorous: always False, for `epsilon` bounds nothing. vacuous: `upper` is infinite.
    """

    epsilon: float
    lower: float
    upper: float
    order: int
    remove: float
    add: float
    kurtosis: float
    rigorous: bool = False
    vacuous: bool = True


def edgeworth(
    steps: Iterable[StepEvent],
    delta: float,
    order: int = _ORDER,
    interval: bool = False,
    examples_per_user: int = 1,
) -> EdgeworthEstimate:
    """The estimate of these steps' epsilon at `delta`, in any order; with `interval`, bounds on the true one as well.

    The unit is what is sampled, or a user who owns up to `examples_per_user` of the sampled examples. The interval comes
    from |F - F_1| <= D, D the smaller of the bound by Derumigny et al. (see `expansion_error`; equal steps only) and
    the Berry-Esseen inequality with the expansion's first term added; a tail that a bound would make negative is zero.

    delta: in (0, 1). order: 1, 2 or 3. Raises ValueError for bad input.
    """
    check_delta("delta", delta)
    _check_order(order)
    merged = merged_steps(steps, examples_per_user)
    if sum(step.count * step.sample_rate * examples_per_user for step in merged) <= delta:
        return EdgeworthEstimate(0.0, 0.0, 0.0, order, 0.0, 0.0, 0.0, vacuous=False)
    pairs = pairs_of(merged, examples_per_user)
    if pairs is None:
        return EdgeworthEstimate(math.inf, 0.0, math.inf, order, math.inf, math.inf, math.inf)
    kurtosis = max(abs(law.standardized(4)) for law in pairs[0])
    remove, add = (_root(pair, delta, order) if kurtosis <= _LARGEST_KURTOSIS else math.inf for pair in pairs)
    lower, upper = _interval(pairs, delta, equal=len(merged) == 1) if interval else (0.0, math.inf)
    vacuous = math.isinf(upper)
    return EdgeworthEstimate(max(remove, add), lower, upper, order, remove, add, kurtosis, vacuous=vacuous)


def delta_of(steps: Iterable[StepEvent], epsilon: float, order: int = _ORDER, examples_per_user: int = 1) -> float:
    """The estimate of these steps' delta at `epsilon` >= 0, the larger of removing and adding, cut to [0, 1].

    Returns nan where the expansion means nothing (see the module's docstring). Raises ValueError for bad input.
    """
    check_number("epsilon", epsilon)
    if epsilon < 0:
        raise ValueError(f"epsilon={epsilon!r} is negative; give 0 or more")
    _check_order(order)
    merged = merged_steps(steps, examples_per_user)
    pairs = pairs_of(merged, examples_per_user)
    if not merged:
        return 0.0
    if pairs is None or not max(abs(law.standardized(4)) for law in pairs[0]) <= _LARGEST_KURTOSIS:
        return math.nan
    deltas = [_delta(pair, np.array([float(epsilon)]), order) for pair in pairs]
    return float(np.clip(np.max(deltas), 0.0, 1.0))


def calibrate_verified(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    order: int = _ORDER,
    examples_per_user: int = 1,
) -> VerifiedNoise:
    """Noise for `steps` equal steps: proposed by the estimate, verified with "pld", raised where that would overspend.

    One evaluation of "pld" where the proposal holds, about four where it does not. The noise is never lowered: an
    estimate above the truth leaves it a few percent above the least, which `get_noise_multiplier` finds.

    target_epsilon: > 0. target_delta: in (0, 1). steps: >= 1. order: 1, 2 or 3. Raises ValueError for bad input, and
    when no noise is enough.
    """
    check_epsilon("target_epsilon", target_epsilon)
    check_delta("target_delta", target_delta)
    check_count("steps", steps, least=1)

    def estimate(noise: float) -> float:
        return edgeworth([StepEvent(noise, sample_rate, steps)], target_delta, order, False, examples_per_user).epsilon

    def spends(noise: float) -> float:
        return get_epsilon(noise, sample_rate, steps, target_delta, "pld", examples_per_user)

    def least() -> float:
        return get_noise_multiplier(target_epsilon, target_delta, sample_rate, steps, "pld", examples_per_user)

    return verified_noise(estimate, spends, least, target_epsilon)


def _check_order(order: int) -> None:
    if isinstance(order, bool) or not isinstance(order, int) or order not in (1, 2, 3):
        raise ValueError(f"order={order!r} is not an order that is implemented; give 1, 2 or 3")


def _tail(law: Law, t: FloatArray, order: int, tilt: FloatArray | float = 0.0) -> FloatArray:
    """e^tilt (1 - F(t)), F expanded: [n] to [n]. Multiplied here, because e^tilt alone may overflow."""
    with np.errstate(all="ignore"):
        z = (t - law.cumulants[0]) / math.sqrt(law.cumulants[1])
        third, fourth, fifth = (law.standardized(k) for k in (3, 4, 5))
        # Coefficients of the Hermite polynomials He_0 to He_8 whose sum times the density is added to the tail.
        series = np.zeros(9)
        series[2] = third / 6
        if order >= 2:
            series[[3, 5]] = fourth / 24, third**2 / 72
        if order >= 3:
            series[[4, 6, 8]] = fifth / 120, third * fourth / 144, third**3 / 1296
        density = np.exp(tilt - z**2 / 2) / math.sqrt(2 * math.pi)
        tail: FloatArray = np.exp(tilt + special.log_ndtr(-z)) + density * np.polynomial.hermite_e.hermeval(z, series)
    return tail


def _delta(pair: Pair, epsilon: FloatArray, order: int) -> FloatArray:
    return _tail(pair[1], epsilon, order) - _tail(pair[0], epsilon, order, epsilon)


def _grid(pair: Pair) -> FloatArray:
    """From 0 to where both tails are gone, the one times e^epsilon as well."""
    mean, variance = (max(law.cumulants[i] for law in pair) for i in (0, 1))
    return np.linspace(0.0, variance + max(mean, 0.0) + (REACH + 2) * math.sqrt(variance), _GRID + 1)


def _root(pair: Pair, delta: float, order: int) -> float:
    """The largest epsilon whose estimate is `delta`; an expansion's tails may turn negative and rise again."""
    grid = _grid(pair)
    deltas = _delta(pair, grid, order)
    above = np.nonzero(deltas > delta)[0]
    if not np.isfinite(deltas).all() or (len(above) and above[-1] == _GRID):
        return math.inf
    if not len(above):
        return 0.0
    left, right = grid[above[-1]], grid[above[-1] + 1]
    root: float = optimize.brentq(lambda t: float(_delta(pair, np.array([t]), order)[0]) - delta, left, right)
    return root


def _interval(pairs: tuple[Pair, Pair], delta: float, equal: bool) -> tuple[float, float]:
    """An epsilon that the truth is not below and one that it is not above, both points of a grid refined once."""

    def bound(epsilon: FloatArray, sign: int) -> FloatArray:
        sides = []
        for x, y in pairs:
            gone = _tail(x, epsilon, 1, epsilon) - sign * np.exp(np.minimum(epsilon, 700.0)) * law_error(x, equal)
            sides.append(_tail(y, epsilon, 1) + sign * law_error(y, equal) - np.maximum(gone, 0.0))
        return np.max(sides, axis=0)

    ends = []
    for sign in (-1, 1):
        grid = max((_grid(pair) for pair in pairs), key=lambda grid: float(grid[-1]))
        # True delta falls with epsilon: one point above `delta` bounds from below, one point under it from above.
        for _ in range(2):
            values = bound(grid, sign)
            found = np.nonzero(values > delta if sign < 0 else values <= delta)[0]
            if not len(found):
                break
            best = found[-1] if sign < 0 else found[0]
            end = float(grid[best])
            grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, _GRID)], _GRID + 1)
        ends.append(end if len(found) else (0.0 if sign < 0 else math.inf))
    return ends[0], ends[1]


def _epsilon(steps: Sequence[StepEvent], delta: float, examples_per_user: int, adjacency: str) -> float:
    return edgeworth(steps, delta, examples_per_user=examples_per_user).epsilon


register(Accountant("edgeworth", "fastclip edgeworth", rigorous=False, epsilon=_epsilon))
