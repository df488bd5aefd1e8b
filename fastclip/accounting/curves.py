"""What there is to know beyond one epsilon: curves over steps, epsilons and errors of a test, and the mu they imply.

All of these are bounds from the same losses as epsilon:

- delta(epsilon), the smallest delta that holds for an epsilon. Where an accountant has no formula for it, the smallest
  delta whose epsilon is at most the wanted one is searched for.
- The trade-off curve f(alpha): nobody who sees the run and guesses whether a unit was in the data, with false alarms
  in a share alpha of the cases, misses it in less than a share f(alpha) (Dong, Roth and Su, arXiv 1905.02383). A pair
  (epsilon, delta) says f(alpha) >= 1 - delta - e^epsilon alpha and, the other way round, f(alpha) >= e^-epsilon
  (1 - delta - alpha); the largest over all epsilon >= 0 counts (their proposition 2.5).
- mu: the least noisy Gaussian mechanism, with noise 1 / mu, that these steps are no worse than. A subsampled mechanism
  has a heavier tail than every Gaussian worth comparing with, so the comparison ends at a smallest delta.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from fastclip.accounting.accountants import (
    StepEvent,
    check_count,
    check_delta,
    check_number,
    check_supported,
    evaluate,
    find,
    merge,
    warn_of,
)
from fastclip.accounting.pld import (
    ROUNDING,
    compose,
    cut_probability,
    epsilon_with_cuts,
    finest_interval,
    prepared,
    refine,
)

FloatArray = npt.NDArray[np.float64]

_CURVE_POINTS = 64
_SMALLEST_LOG_DELTA = -690.0
_LOG_DELTA = 1e-6
_FIRST_DELTA = 1e-6
# The grid of epsilons for trade-off curves is this dense, up to where delta is at its floor.
_EPSILONS = 2000
_SETTLED = 1e-3
_SETTLED_ABSOLUTELY = 1e-13


def delta_of(
    steps: Iterable[StepEvent],
    epsilon: float,
    accountant: str = "pld",
    examples_per_user: int | None = None,
    adjacency: str = "add/remove",
) -> float:
    """The smallest delta that these steps have at `epsilon` >= 0, by this accountant, in any order.

    Returns 0.0 for no steps and 1.0 when some step has no noise. An upper bound for a rigorous accountant; `pld` does
    not go below 1e-15 a step, the others not below e^-690. Warns and raises ValueError as `epsilon_of` does.
    """
    _check_epsilon(epsilon)
    steps = list(steps)
    if accountant == "pld":
        return float(deltas_of(steps, [epsilon], examples_per_user, adjacency)[0])
    evaluate(steps, 0.5, accountant, examples_per_user, adjacency)

    def excess(log_delta: float) -> float:
        """Capped, so that interpolation stays sane where epsilon is huge or infinite."""
        found = evaluate(steps, math.exp(log_delta), accountant, examples_per_user, adjacency)
        return min(found, 10 * epsilon + 10) - epsilon

    warn_of(accountant, steps, 0.0)
    if not merge(steps):
        return 0.0
    high, low = math.log1p(-1e-9), _SMALLEST_LOG_DELTA
    if excess(high) > 0:
        return 1.0
    if excess(low) <= 0:
        return math.exp(low)
    log_delta = float(optimize.brentq(excess, low, high, xtol=_LOG_DELTA))
    # Its answer is on either side; a delta on the private one is returned.
    while excess(log_delta) > 0:
        log_delta = min(high, log_delta + 2 * _LOG_DELTA)
    return math.exp(log_delta)


def deltas_of(
    steps: Iterable[StepEvent],
    epsilons: Sequence[float] | FloatArray,
    examples_per_user: int | None = None,
    adjacency: str = "add/remove",
) -> FloatArray:
    """delta at each of several epsilons >= 0, by `pld`: [n] to [n], for plots and tests. Raises ValueError as
    `delta_of` does.
    """
    for epsilon in epsilons:
        _check_epsilon(epsilon)
    merged = merge(steps)
    check_supported(find("pld"), merged, examples_per_user, adjacency)
    wanted = np.asarray(epsilons, dtype=np.float64)
    if not merged:
        return np.zeros(len(wanted))
    users = int(examples_per_user or 1)
    interval = _interval(merged, users, adjacency)
    if not interval:
        return np.ones(len(wanted))
    ready = prepared(merged, users, adjacency)

    def on_grid(interval: float) -> FloatArray:
        losses = compose(ready, users, interval, adjacency)
        return np.asarray(losses.get_delta_for_epsilon(wanted), dtype=np.float64)

    deltas = on_grid(interval)
    # The grid suits one delta; a delta moves more than an epsilon does.
    while interval / 2 >= finest_interval(ready, users, adjacency):
        interval /= 2
        finer = on_grid(interval)
        settled = np.all(deltas - finer <= np.maximum(_SETTLED * finer, _SETTLED_ABSOLUTELY))
        deltas = np.minimum(deltas, finer)
        if settled:
            break
    with np.errstate(over="ignore"):
        cut = cut_probability(ready, users) * (1 + np.exp(wanted))
    return np.minimum(deltas + cut + ROUNDING * sum(step.count for step in merged), 1.0)


def epsilon_curve(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    examples_per_user: int | None = None,
    accountant: str = "pld",
    adjacency: str = "add/remove",
    *,
    max_batch: int | None = None,
    num_units: int | None = None,
    points: int = _CURVE_POINTS,
) -> list[float]:
    """Epsilon after 1, 2, ..., `steps` steps: [steps] floats, never decreasing, made for plots.

    Up to `points` steps each is computed; beyond, so many evenly spaced ones are, and the steps between take the next
    computed one's value, which is a bound for them too. With `pld` the grid is twice as coarse as `get_epsilon`'s,
    which costs a fraction of a percent. The last entry is exactly `get_epsilon`'s. Raises ValueError for bad input.
    """
    check_count("steps", steps, least=1)
    check_count("points", points, least=1)
    whole = StepEvent(noise_multiplier, sample_rate, steps, max_batch, num_units)
    last = evaluate([whole], delta, accountant, examples_per_user, adjacency)
    if math.isinf(last) and noise_multiplier == 0:
        return [last] * steps
    ends = sorted({math.ceil(steps * (i + 1) / points) for i in range(points)})
    if accountant == "pld":
        computed = _composed(whole, delta, examples_per_user or 1, adjacency, ends)
    else:
        computed = [
            evaluate([replace(whole, count=end)], delta, accountant, examples_per_user, adjacency) for end in ends[:-1]
        ]
    computed = [*computed[: len(ends) - 1], last]
    # A later step's bound also holds for every step before it.
    bounds = np.minimum.accumulate(computed[::-1])[::-1]
    return [float(bound) for bound in np.repeat(bounds, np.diff([0, *ends]))]


def trade_off(
    steps: Iterable[StepEvent],
    false_alarms: Sequence[float] | FloatArray,
    examples_per_user: int | None = None,
    adjacency: str = "add/remove",
) -> FloatArray:
    """The least share of units missed by any test with these shares of false alarms: f(alpha), [n] in [0, 1] to [n].

    A lower bound, by `pld`, convex up to the grid of epsilons. Raises ValueError for bad input.
    """
    alphas = np.asarray(false_alarms, dtype=np.float64)
    if not np.all((alphas >= 0) & (alphas <= 1)):
        raise ValueError(f"false_alarms={false_alarms!r} are not all shares between 0 and 1")
    epsilons, deltas = _profile(list(steps), examples_per_user, adjacency)
    with np.errstate(over="ignore", invalid="ignore"):
        one_way = 1 - deltas - np.where(alphas[:, None] > 0, np.exp(epsilons) * alphas[:, None], 0.0)
        other_way = np.exp(-epsilons) * (1 - deltas - alphas[:, None])
    return np.clip(np.maximum(one_way, other_way).max(axis=1), 0.0, 1.0)


def gaussian_parameter(
    steps: Iterable[StepEvent],
    smallest_delta: float = _FIRST_DELTA,
    examples_per_user: int | None = None,
    adjacency: str = "add/remove",
) -> float:
    """mu: delta(epsilon) of these steps, wherever it is at least `smallest_delta`, is at most that of N(mu, 1) against
    N(0, 1), and no smaller mu will do on a grid of 2,000 epsilons.

    0.0 for no steps, inf without noise. Unlike `gdp_parameter` it is on the private side. Raises ValueError for bad
    input.
    """
    check_delta("smallest_delta", smallest_delta)
    epsilons, deltas = _profile(list(steps), examples_per_user, adjacency)
    if not (deltas >= smallest_delta).any():
        return 0.0
    # One more, so that the last epsilon that counts is not beyond them.
    kept = np.arange(len(deltas)) <= np.count_nonzero(deltas >= smallest_delta)
    if (deltas >= 1).all():
        return math.inf

    def excess(mu: float) -> float:
        """By how much the worst of the deltas is above the Gaussian's."""
        return float((deltas[kept] - _gaussian_deltas(epsilons[kept], mu)).max())

    high = 1.0
    while excess(high) > 0:
        high *= 2
    low, mu = 0.0, high
    while mu - low > 1e-9 * high:
        middle = (low + mu) / 2
        low, mu = (middle, mu) if excess(middle) > 0 else (low, middle)
    return mu


def _gaussian_deltas(epsilons: FloatArray, mu: float) -> FloatArray:
    """Balle and Wang, arXiv 1805.06530, theorem 8, with sensitivity mu and noise 1: [n] to [n]."""
    if mu == 0:
        return np.zeros_like(epsilons)
    lost = np.exp(epsilons + special.log_ndtr(-mu / 2 - epsilons / mu))
    deltas: FloatArray = special.ndtr(mu / 2 - epsilons / mu) - lost
    return deltas


def _profile(
    steps: Sequence[StepEvent], examples_per_user: int | None, adjacency: str
) -> tuple[FloatArray, FloatArray]:
    """Epsilons from 0 to where delta is hardly left, and delta at each."""
    last = evaluate(steps, 1e-9, "pld", examples_per_user, adjacency)
    # Without noise every delta is 1 and the epsilons do not matter.
    reach = last if 0 < last < math.inf else 1.0
    epsilons = np.linspace(0.0, reach, _EPSILONS + 1)
    return epsilons, deltas_of(steps, epsilons, examples_per_user, adjacency)


def _interval(steps: Sequence[StepEvent], users: int, adjacency: str) -> float:
    """Of the grid that is fine enough for one delta; 0.0 for steps with too little noise, whose delta is taken as 1."""
    if steps[0].noise_multiplier == 0:
        return 0.0
    # Where a unit is hardly ever drawn, epsilon at a larger delta is 0 on any grid.
    drawn = sum(step.count * step.sample_rate * users for step in steps)
    return refine(steps, min(0.5, drawn / 2, _FIRST_DELTA), users, adjacency)[1]


def _composed(whole: StepEvent, delta: float, users: int, adjacency: str, ends: Sequence[int]) -> list[float]:
    """Epsilon after each of the `ends`, composing only what lies between them."""
    last, interval = refine([whole], delta, users, adjacency)
    if not interval:
        return [last] * len(ends)
    whole = prepared([whole], users, adjacency)[0]
    sizes = {int(gap) for gap in np.diff([0, *ends])}
    gaps = {gap: compose([replace(whole, count=gap)], users, 2 * interval, adjacency) for gap in sizes}
    found: list[float] = []
    spent: Any = None
    for start, end in zip([0, *ends], ends, strict=False):
        gap = gaps[end - start]
        spent = gap if spent is None else spent.compose(gap)
        cut = cut_probability([replace(whole, count=end)], users)
        found.append(epsilon_with_cuts(spent, delta - end * ROUNDING, cut))
    return found


def _check_epsilon(epsilon: float) -> None:
    check_number("epsilon", epsilon)
    if epsilon < 0:
        raise ValueError(f"epsilon={epsilon!r} is negative; give 0 or more")
