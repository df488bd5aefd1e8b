"""Noise that a quick estimate proposes, and that is used only once an upper bound has confirmed it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

from scipy import optimize

_LARGEST_NOISE = 2.0**40


@dataclass(frozen=True)
class VerifiedNoise:
    """Made by `calibrate_verified`; every epsilon is at its target delta.

    proposed: the noise multiplier whose estimate meets the target. estimated: that estimate.
    spent: what "pld" finds for the proposal. Above the target, the estimate would have overspent.
    These three are nan where no noise has an estimate near the target.
    noise_multiplier: what to train with: the proposal, or more where that overspends, or "pld"'s own for want of one.
    epsilon: the upper bound by "pld" at exactly `noise_multiplier`; at most the target.
    """

    proposed: float
    estimated: float
    spent: float
    noise_multiplier: float
    epsilon: float


def verified_noise(
    estimate: Callable[[float], float],
    spends: Callable[[float], float],
    least: Callable[[], float],
    target: float,
) -> VerifiedNoise:
    """The noise that `estimate` proposes for the epsilon `target`, raised where `spends` finds more than that.

    estimate: from a noise multiplier to an estimate of epsilon. spends: to an upper bound on it. least: the noise to
    use where the estimate proposes none. Raises ValueError when no noise is enough.
    """
    proposed = _propose(estimate, target)
    if math.isnan(proposed):
        noise = least()
        return VerifiedNoise(math.nan, math.nan, math.nan, noise, spends(noise))
    estimated, spent = estimate(proposed), spends(proposed)
    # On logarithmic scales epsilon is convex in the noise: secants from below overspend less each time and never
    # overshoot. The first slope is the estimate's, made steeper to start below too, and never so flat as to mislead.
    change = max(estimate(proposed * 1.01) / estimated, 0.5)
    slope = min(1.5 * math.log(change) / math.log(1.01), -0.5)
    noise, epsilon = proposed, spent
    while epsilon > target and noise < _LARGEST_NOISE:
        further = math.inf if math.isinf(epsilon) else math.log((1 - 2e-4) * target / epsilon) / slope
        raised = _rounded_up(noise * math.exp(min(further, math.log(2))))
        now = spends(raised)
        if now < epsilon < math.inf:
            slope = math.log(now / epsilon) / math.log(raised / noise)
        noise, epsilon = raised, now
    if epsilon > target:
        raise ValueError(
            f"target_epsilon={target!r} is out of reach with any noise; raise it or the delta, or take fewer steps"
        )
    return VerifiedNoise(proposed, estimated, spent, noise, epsilon)


def _propose(estimate: Callable[[float], float], target: float) -> float:
    """The noise, rounded up, whose estimate is the target; nan where the estimate jumps from infinity to far below."""
    high = 1.0
    while estimate(high) > target and high < _LARGEST_NOISE:
        high *= 2
    low = high / 2
    while estimate(low) <= target and low > 1 / _LARGEST_NOISE:
        high, low = low, low / 2
    if not estimate(low) > target >= estimate(high):
        return math.nan
    # The cap keeps the interpolation sane where the estimate is infinite.
    root = optimize.brentq(lambda x: min(estimate(x), 10 * target) - target, low, high, xtol=1e-9 * high)
    noise = _rounded_up(root)
    return noise if estimate(noise) > 0.99 * target else math.nan


def _rounded_up(noise: float) -> float:
    """Up to five significant digits."""
    return float(Context(prec=5, rounding=ROUND_CEILING).create_decimal_from_float(noise))
