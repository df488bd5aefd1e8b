"""Privacy loss distributions, by dp_accounting: the default accountant, an upper bound that is nearly exact.

One step releases a sum of clipped gradients plus N(0, sigma^2 C^2 I) over a Poisson draw. With C = 1 it is dominated,
in both directions, by the pair

    P = sum_i Binomial(K, q)(i) N(i, sigma^2)     and     Q = N(0, sigma^2)

with K = 1 when the sampled thing is the unit itself, and K = examples_per_user when examples are sampled and the unit
is a user (Charles et al., arXiv 2407.07737, ELS; Ganesh, arXiv 2401.10294). Removing a unit is (P, Q), adding one is
(Q, P); each direction is composed on its own and the larger epsilon counts. The losses are put on a grid by
connect-the-dots (Doroshenko et al., arXiv 2207.04380), which can only raise epsilon, with an error that falls with
the grid's square.

Guarantees and edge cases:

- The result is an upper bound. Rounding in dp_accounting's Fourier transforms is charged to delta at 1e-15 a step:
  the error of a tail sum after T steps, measured against extended precision in six settings with T up to 1e5, stays
  below 2e-16 T.
- The grid is halved until epsilon moves by less than 0.1 % or 1e-5, starting with 2^9 points for one step's losses and
  ending with at most 2^17 points, 2^-20 apart. So epsilon is monotone in its arguments up to 0.1 % or 1e-5.
- A delta below about 1e-15 * steps cannot be certified in double precision: epsilon is inf.
- Where one draw can cost more than about e^1000 (sigma < 0.02, or 0.02 times the examples of a user that can meet in
  one draw; without sampling, sigma < 0.02 times the root of the steps) epsilon is inf, which saves computing a number
  that protects nobody.
- When a unit is drawn at all with probability at most delta, epsilon is 0.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
from dp_accounting.pld import pld_pmf, privacy_loss_distribution
from scipy import optimize

from fastclip.accounting.accountants import Accountant, StepEvent, check_count, check_delta, register
from fastclip.accounting.mixture import TAIL, Direction, Mixture, meeting

_FIRST_POINTS = 2**9
_LAST_POINTS = 2**17
_FINEST_INTERVAL = 2.0**-20
_SETTLED = 1e-3
_SETTLED_ABSOLUTELY = 1e-5
_SMALLEST_NOISE = 0.02
_LARGEST_NOISE = 1e12  # as good as infinite; squares of more overflow
_CURVE_POINTS = 64
_ROUNDING = 1e-15


def epsilon_curve(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    examples_per_user: int | None = None,
) -> list[float]:
    """Epsilon after 1, 2, ..., `steps` steps: [steps] floats, never decreasing, made for plots.

    Every entry is an upper bound. The grid is twice as coarse as `get_epsilon`'s, which costs a fraction of a
    percent. Up to 64 steps each is computed; beyond, 64 evenly spaced ones are, and the steps between take the next
    computed one's value. The last entry is exactly `get_epsilon`'s. Raises ValueError for bad input.
    """
    check_count("steps", steps, least=1)
    check_delta("delta", delta)
    users = 1 if examples_per_user is None else examples_per_user
    check_count("examples_per_user", users, least=1)
    whole = StepEvent(noise_multiplier, sample_rate, steps)
    last, interval = (math.inf, 0.0) if noise_multiplier == 0 else _refine([whole], delta, users)
    if not interval:
        return [last] * steps

    computed = sorted({math.ceil(steps * (i + 1) / _CURVE_POINTS) for i in range(_CURVE_POINTS)})
    gaps = {gap: _compose([replace(whole, count=gap)], users, 2 * interval) for gap in set(np.diff([0, *computed]))}
    curve: list[float] = []
    spent: Any = None
    for end in computed:
        gap = gaps[end - len(curve)]
        spent = gap if spent is None else spent.compose(gap)
        curve += [_epsilon_at(spent, delta - end * _ROUNDING)] * (end - len(curve))
    curve[-1] = last
    # A later step's bound also holds for every step before it.
    return [float(bound) for bound in np.minimum.accumulate(curve[::-1])[::-1]]


def _epsilon(steps: Sequence[StepEvent], delta: float, examples_per_user: int) -> float:
    return _refine(steps, delta, examples_per_user)[0]


def _refine(steps: Sequence[StepEvent], delta: float, users: int) -> tuple[float, float]:
    """Epsilon, and the interval of the grid that gave it (0 when none was needed)."""
    if sum(step.count * step.sample_rate * users for step in steps) <= delta:
        return 0.0, 0.0
    steps = [replace(step, noise_multiplier=min(step.noise_multiplier, _LARGEST_NOISE)) for step in steps]
    left = delta - _ROUNDING * sum(step.count for step in steps)
    if left <= 0 or any(_relative_noise(step, users) < _SMALLEST_NOISE for step in steps):
        return math.inf, 0.0

    span = max(_largest_loss(step, users) for step in steps)
    # A power of two makes grids nest and the multiples of the interval exact.
    interval = max(_FINEST_INTERVAL, 2.0 ** math.floor(math.log2(span / _FIRST_POINTS)))
    epsilon = _epsilon_at(_compose(steps, users, interval), left)
    finest = max(_FINEST_INTERVAL, span / _LAST_POINTS)
    while 0 < epsilon < math.inf and interval / 2 >= finest:
        interval /= 2
        finer = _epsilon_at(_compose(steps, users, interval), left)
        settled = epsilon - finer < max(_SETTLED * finer, _SETTLED_ABSOLUTELY)
        epsilon = min(epsilon, finer)
        if settled:
            break
    return epsilon, interval


def _epsilon_at(losses: Any, delta: float) -> float:
    """The smallest epsilon with at most `delta`, or a little more."""
    with np.errstate(over="ignore"):
        epsilon = float(losses.get_epsilon_for_delta(delta))
    if epsilon < math.inf or losses.get_delta_for_epsilon(math.inf) > delta:
        return epsilon
    # The library's search overflows to infinity for epsilons near 700, where exp(-loss) leaves the range of doubles.
    high = 1024.0
    while losses.get_delta_for_epsilon(high) > delta:
        high *= 2
    root: float = optimize.brentq(lambda x: losses.get_delta_for_epsilon(x) - delta, 0.0, high, xtol=1e-6)
    return root + 2e-6


def _compose(steps: Sequence[StepEvent], users: int, interval: float) -> Any:
    total: Any = None
    for step in steps:
        if step.sample_rate == 1:
            # Without sampling the composition is itself a Gaussian mechanism, to be put on the grid once.
            part = privacy_loss_distribution.from_gaussian_mechanism(
                _relative_noise(step, users), value_discretization_interval=interval
            )
        else:
            part = _one_step(step.noise_multiplier, step.sample_rate, users, interval)
            if step.count > 1:
                part = part.self_compose(step.count)
        total = part if total is None else total.compose(part)
    return total


@lru_cache(maxsize=64)
def _one_step(noise_multiplier: float, sample_rate: float, users: int, interval: float) -> Any:
    mixture = Mixture(noise_multiplier, sample_rate, users)

    def on_grid(direction: Direction) -> Any:
        low, high = mixture.losses(direction)
        first, last = math.floor(low / interval), math.ceil(high / interval)
        deltas = mixture.divergences(interval * np.arange(first, last + 1, dtype=np.float64), direction)
        pmf = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, deltas)
        # A sparse one would raise its size to the power of the number of steps, in whole numbers, before composing.
        return pmf.to_dense_pmf()

    return privacy_loss_distribution.PrivacyLossDistribution(on_grid("remove"), on_grid("add"))


def _relative_noise(step: StepEvent, users: int) -> float:
    """Noise over what one draw can change; over what all of them change together where every draw takes everything."""
    if step.sample_rate == 1:
        return step.noise_multiplier / (users * math.sqrt(step.count))
    return step.noise_multiplier / meeting(step.sample_rate, users)


def _largest_loss(step: StepEvent, users: int) -> float:
    """The largest privacy loss that the grid must reach, of one step or, where q = 1, of all of them together."""
    if step.sample_rate == 1:
        noise = _relative_noise(step, users)
        return (1 / (2 * noise) + TAIL) / noise
    return Mixture(step.noise_multiplier, step.sample_rate, users).losses("remove")[1]


register(Accountant("pld", f"dp-accounting {version('dp-accounting')}", rigorous=True, epsilon=_epsilon))
