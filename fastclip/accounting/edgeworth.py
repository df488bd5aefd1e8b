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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from functools import lru_cache
from typing import NamedTuple

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
from fastclip.accounting.mixture import FloatArray, Mixture, meeting

# The third order comes closer only at small kurtosis; elsewhere it blows up the direction of adding a unit.
_ORDER = 2
_LARGEST_KURTOSIS = 1.0
_SMALLEST_NOISE = 0.02
_LARGEST_NOISE = 2.0**40
_GRID = 2048
# Standard deviations that quadrature and search reach: the Gaussian's tail there is 1e-44.
_REACH = 14.0
# Berry-Esseen constants for equal summands (Shevtsova, arXiv 1111.6554) and for any (Shevtsova, Dokl. Math. 82, 2010).
_EQUAL, _UNEQUAL = 0.4748, 0.5600
_FLIP = np.array([-1.0, 1.0, -1.0, 1.0, -1.0])


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


class _Law(NamedTuple):
    """What is known of the distribution of a loss, or of a sum of `terms` independent ones."""

    cumulants: FloatArray  # [5]: mean, variance, third to fifth
    third: float  # E |loss - mean|^3, added up
    terms: int = 1

    def standardized(self, order: int) -> float:
        """Skewness for order 3, excess kurtosis for 4."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return float(self.cumulants[order - 1] / self.cumulants[1] ** (order / 2))

    def flipped(self) -> "_Law":
        return self._replace(cumulants=_FLIP * self.cumulants)


_Pair = tuple[_Law, _Law]


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
    merged = _merged(steps, examples_per_user)
    if sum(step.count * step.sample_rate * examples_per_user for step in merged) <= delta:
        return EdgeworthEstimate(0.0, 0.0, 0.0, order, 0.0, 0.0, 0.0, vacuous=False)
    pairs = _pairs(merged, examples_per_user)
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
    merged = _merged(steps, examples_per_user)
    pairs = _pairs(merged, examples_per_user)
    if not merged:
        return 0.0
    if pairs is None or not max(abs(law.standardized(4)) for law in pairs[0]) <= _LARGEST_KURTOSIS:
        return math.nan
    deltas = [_delta(pair, np.array([float(epsilon)]), order) for pair in pairs]
    return float(np.clip(np.max(deltas), 0.0, 1.0))


def cumulants(noise_multiplier: float, sample_rate: float, examples_per_user: int = 1) -> tuple[FloatArray, FloatArray]:
    """Mean, variance and third to fifth cumulant of one step's loss l, with output from Q and from P: [5], [5].

    Adding a unit has those of -l, with output from P and from Q. Raises ValueError for bad input.
    """
    pairs = _pairs(_merged([StepEvent(noise_multiplier, sample_rate)], examples_per_user), examples_per_user)
    if pairs is None:
        raise ValueError(f"noise_multiplier={noise_multiplier!r} is too small for a quadrature; give more noise")
    return pairs[0][0].cumulants.copy(), pairs[0][1].cumulants.copy()


def expansion_error(count: int, kurtosis: float, third: float, skewness: float, split: float = 0.1) -> float:
    """How far the distribution function of a sum of equal independent terms is from its first-order expansion, at most.

    Theorem A.3 of Derumigny, Girard and Guyonvarch, arXiv 2101.05780, without conditions on characteristic functions.
    count: terms, >= 1. Of one of them, centred and scaled to variance 1: kurtosis, E X^4; third, E |X|^3; skewness,
    E X^3. split: any number in (0, 1/3), where their proof divides an integral.
    """
    n, e, skew = float(count), split, abs(skewness)
    room = (1 - 3 * e) ** 2
    sum_of_both = third + 1  # E |X|^3 + E |X|, the latter at most 1
    p = 48 * e * math.sqrt(kurtosis / n) + 4 * e**2 * kurtosis / n + 32 * e * skew**2 / math.sqrt(kurtosis * n)
    p += 96 * math.sqrt(2 * e) * skew / (kurtosis * n) ** 0.25
    p += 16 * math.sqrt(2) * kurtosis**0.25 * skew * (e / math.sqrt(n)) ** 1.5
    e3 = math.exp(e**2 * (1 / 6 + 1 / (2 * room)))
    e2 = e3 * math.exp(e**2 * p / (288 * room))

    def moment(k: int) -> float:
        """The integral of t^k exp(-t^2 / 2) over t > 0."""
        return 2 ** ((k - 1) / 2) * math.gamma((k + 1) / 2)

    def above(x: float) -> float:
        """The incomplete gamma function: the integral of sqrt(u) exp(-u) over u > x."""
        return float(special.gamma(1.5) * special.gammaincc(1.5, x))

    bound = 0.1995 * sum_of_both / math.sqrt(n)
    bound += (0.031 * sum_of_both**2 + 0.327 * kurtosis * (1 / 12 + 1 / (4 * room)) + 0.054 * skew * sum_of_both) / n
    bound += (0.037 * e3 + 1.306 / 36 * (e2 - e3)) * skew**2 / n
    # What is left is of smaller order in n, and yet most of the bound at every n that occurs in training.
    bound += (14.1961 + 67.0415) * sum_of_both**4 / (16 * math.pi**4 * n**2)
    bound += 4.3394 * skew * sum_of_both**3 / (8 * math.pi**3 * n**2)
    small = skew / (6 * n**1.5) * moment(2) + (kurtosis / 24 + skew**2 / 36) / n**2 * moment(7)
    small += kurtosis * skew / (72 * n**2.5) * moment(8) + kurtosis**2 / (576 * n**3) * moment(9)
    product = e2 * (kurtosis / 12 + 1 / (4 * room) + p / (576 * room))
    small += 2 * room * product * (moment(9) / (8 * n**2) + skew * moment(8) / (12 * n**1.5))
    bound += 1.0253 / (2 * math.pi * room) * small
    end = 2 * math.sqrt(n) / sum_of_both
    start = min(math.sqrt(2 * e) * (n / kurtosis) ** 0.25, end)
    bound += skew / math.sqrt(n) * (above(start) - above(end))
    bound += 1.0253 * 2**2.5 * third / (3 * math.pi * math.sqrt(n)) * (above(start**2 / 8) - above(end**2 / 8))
    return bound


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

    proposed = _propose(estimate, target_epsilon)
    if math.isnan(proposed):
        noise = get_noise_multiplier(target_epsilon, target_delta, sample_rate, steps, "pld", examples_per_user)
        return VerifiedNoise(math.nan, math.nan, math.nan, noise, spends(noise))
    estimated, spent = estimate(proposed), spends(proposed)
    # On logarithmic scales epsilon is convex in the noise: secants from below overspend less each time and never
    # overshoot. The first slope is the estimate's, made steeper to start below too, and never so flat as to mislead.
    change = max(estimate(proposed * 1.01) / estimated, 0.5)
    slope = min(1.5 * math.log(change) / math.log(1.01), -0.5)
    noise, epsilon = proposed, spent
    while epsilon > target_epsilon and noise < _LARGEST_NOISE:
        further = math.inf if math.isinf(epsilon) else math.log((1 - 2e-4) * target_epsilon / epsilon) / slope
        raised = _rounded_up(noise * math.exp(min(further, math.log(2))))
        now = spends(raised)
        if now < epsilon < math.inf:
            slope = math.log(now / epsilon) / math.log(raised / noise)
        noise, epsilon = raised, now
    if epsilon > target_epsilon:
        raise ValueError(
            f"target_epsilon={target_epsilon!r} is out of reach at target_delta={target_delta!r} after "
            f"steps={steps!r}; raise one of the targets or take fewer steps"
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


def _merged(steps: Iterable[StepEvent], users: int) -> list[StepEvent]:
    """The steps sorted and equal ones put together, so that their order does not change a bit of the result."""
    check_count("examples_per_user", users, least=1)
    counts: dict[tuple[float, float], int] = {}
    for step in steps:
        if step.count:
            key = (step.noise_multiplier, step.sample_rate)
            counts[key] = counts.get(key, 0) + step.count
    return [StepEvent(noise, rate, count) for (noise, rate), count in sorted(counts.items())]


def _check_order(order: int) -> None:
    if isinstance(order, bool) or not isinstance(order, int) or order not in (1, 2, 3):
        raise ValueError(f"order={order!r} is not an order that is implemented; give 1, 2 or 3")


def _pairs(steps: Sequence[StepEvent], users: int) -> tuple[_Pair, _Pair] | None:
    """(X, Y) of all steps together for removing and for adding; None where a step has too little noise."""
    sums = [_Law(np.zeros(5), 0.0, 0), _Law(np.zeros(5), 0.0, 0)]
    for step in steps:
        floor = 0.0 if step.sample_rate == 1 else _SMALLEST_NOISE * meeting(step.sample_rate, users)
        if step.noise_multiplier <= floor:
            return None
        for i, law in enumerate(_laws(step.noise_multiplier, step.sample_rate, int(users))):
            cumulants = sums[i].cumulants + step.count * law.cumulants
            sums[i] = _Law(cumulants, sums[i].third + step.count * law.third, sums[i].terms + step.count)
    x, y = sums
    return (x, y), (y.flipped(), x.flipped())


@lru_cache(maxsize=1024)
def _laws(noise: float, rate: float, users: int) -> _Pair:
    """X and Y of one step."""
    if rate == 1:
        shift = users / noise
        third = math.sqrt(8 / math.pi) * shift**3
        return (
            _Law(np.array([-(shift**2) / 2, shift**2, 0, 0, 0]), third),
            _Law(np.array([shift**2 / 2, shift**2, 0, 0, 0]), third),
        )
    mixture = Mixture(noise, rate, users)
    # In units of the noise, l is analytic but for points pi * noise beside the real line: there P's density vanishes.
    # The trapezoid rule's error is exp(-2 pi distance / spacing), here exp(-390).
    spacing = min(1.0, noise) / 20
    x = np.arange(-_REACH, _REACH + mixture.meeting / noise, spacing)
    terms = mixture.log_weights + (x[:, None] - mixture.drawn / (2 * noise)) * mixture.drawn / noise
    loss = np.logaddexp(mixture.log_never, special.logsumexp(terms, axis=1))
    scale = spacing / math.sqrt(2 * math.pi)
    return _law(loss, scale * np.exp(-(x**2) / 2)), _law(loss, scale * np.exp(loss - x**2 / 2))


def _law(loss: FloatArray, weights: FloatArray) -> _Law:
    mean = weights @ loss
    second, third, fourth, fifth = (weights @ (loss - mean) ** k for k in (2, 3, 4, 5))
    cumulants = np.array([mean, second, third, fourth - 3 * second**2, fifth - 10 * second * third])
    return _Law(cumulants, float(weights @ np.abs(loss - mean) ** 3))


def _tail(law: _Law, t: FloatArray, order: int, tilt: FloatArray | float = 0.0) -> FloatArray:
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


def _delta(pair: _Pair, epsilon: FloatArray, order: int) -> FloatArray:
    return _tail(pair[1], epsilon, order) - _tail(pair[0], epsilon, order, epsilon)


def _grid(pair: _Pair) -> FloatArray:
    """From 0 to where both tails are gone, the one times e^epsilon as well."""
    mean, variance = (max(law.cumulants[i] for law in pair) for i in (0, 1))
    return np.linspace(0.0, variance + max(mean, 0.0) + (_REACH + 2) * math.sqrt(variance), _GRID + 1)


def _root(pair: _Pair, delta: float, order: int) -> float:
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


def _interval(pairs: tuple[_Pair, _Pair], delta: float, equal: bool) -> tuple[float, float]:
    """An epsilon that the truth is not below and one that it is not above, both points of a grid refined once."""

    def bound(epsilon: FloatArray, sign: int) -> FloatArray:
        sides = []
        for x, y in pairs:
            gone = _tail(x, epsilon, 1, epsilon) - sign * np.exp(np.minimum(epsilon, 700.0)) * _error(x, equal)
            sides.append(_tail(y, epsilon, 1) + sign * _error(y, equal) - np.maximum(gone, 0.0))
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


def _error(law: _Law, equal: bool) -> float:
    """D with |F - F_1| <= D for the distribution function of the sum and its first-order expansion."""
    if not law.cumulants[2:].any():
        return 0.0  # a Gaussian
    root = math.sqrt(law.terms)
    third, skewness = law.third / law.cumulants[1] ** 1.5, law.standardized(3)
    # The first term is largest at the mean.
    error = (_EQUAL if equal else _UNEQUAL) * third + abs(skewness) / (6 * math.sqrt(2 * math.pi))
    if equal:
        kurtosis = law.standardized(4) * law.terms + 3
        error = min(error, expansion_error(law.terms, kurtosis, third * root, skewness * root))
    return error


def _epsilon(steps: Sequence[StepEvent], delta: float, examples_per_user: int) -> float:
    return edgeworth(steps, delta, examples_per_user=examples_per_user).epsilon


register(Accountant("edgeworth", "fastclip edgeworth", rigorous=False, epsilon=_epsilon))
