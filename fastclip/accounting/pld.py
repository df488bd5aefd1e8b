"""Privacy loss distributions, by dp_accounting: the default accountant, an upper bound that is nearly exact.

One step releases a sum of clipped gradients plus N(0, sigma^2 C^2 I) over a Poisson draw. With C = 1 it is dominated,
in both directions, by the pair

    P = sum_i Binomial(K, q)(i) N(i, sigma^2)     and     Q = N(0, sigma^2)

with K = 1 when the sampled thing is the unit itself, and K = examples_per_user when examples are sampled and the unit
is a user (Charles et al., arXiv 2407.07737, ELS; Ganesh, arXiv 2401.10294). Removing a unit is (P, Q), adding one is
(Q, P); each direction is composed on its own and the larger epsilon counts. The losses are put on a grid by
connect-the-dots (Doroshenko et al., arXiv 2207.04380), which can only raise epsilon, with an error that falls with
the grid's square.

With replace-one adjacency, for K = 1 alone, both sides hold a unit, in the worst case with opposite contributions:
(1 - q) Q + q N(1, sigma^2) against (1 - q) Q + q N(-1, sigma^2). Draws that are cut to a maximum, with a public number
of units, mix that loss, or the zero-out one, with the loss of a draw in which a unit's absence lets another in (Ganesh
et al., arXiv 2508.15089). Both pairs are dp_accounting's own. For K > 1 a cut is charged to delta instead, with the
probability that there is any: next to nothing where draws have room for B + 9 sqrt(B), and infinite epsilon soon below.

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import pld_pmf, privacy_loss_distribution
from scipy import optimize, stats

from fastclip.accounting.accountants import ADJACENCIES, Accountant, StepEvent, evaluate, merge, register
from fastclip.accounting.mixture import TAIL, Direction, Mixture, meeting

_FIRST_POINTS = 2**9
_LAST_POINTS = 2**17
_FINEST_INTERVAL = 2.0**-20
_SETTLED = 1e-3
_SETTLED_ABSOLUTELY = 1e-5
SMALLEST_NOISE = 0.02
LARGEST_NOISE = 1e12  # as good as infinite; squares of more overflow
_LARGEST_EPSILON_WITH_CUTS = 700.0
ROUNDING = 1e-15


def _epsilon(steps: Sequence[StepEvent], delta: float, examples_per_user: int, adjacency: str) -> float:
    return refine(steps, delta, examples_per_user, adjacency)[0]


def refine(steps: Sequence[StepEvent], delta: float, users: int, adjacency: str) -> tuple[float, float]:
    """Epsilon, and the interval of the grid that gave it (0 when none was needed).

    steps: merged ones with noise. users: examples per user, >= 1. adjacency: as `epsilon_of` has it, checked.
    """
    steps = prepared(steps, users, adjacency)
    if sum(step.count * step.sample_rate * users for step in steps) <= delta:
        return 0.0, 0.0
    left = delta - ROUNDING * sum(step.count for step in steps)
    if left <= 0 or too_little_noise(steps, users, adjacency):
        return math.inf, 0.0
    span, cut = _span(steps, users, adjacency), cut_probability(steps, users)
    return settle(lambda interval: epsilon_with_cuts(compose(steps, users, interval, adjacency), left, cut), span)


def epsilon_by_direction(
    steps: Iterable[StepEvent], delta: float, examples_per_user: int | None = None, adjacency: str = "add/remove"
) -> tuple[float, float]:
    """Epsilon for removing a unit and for adding one, the larger of which is `epsilon_of`'s by `pld`.

    Twice the same with replace-one, where each data set is the other's neighbour in the same way. Arguments and errors
    as for `epsilon_of`.
    """
    steps, users = merge(steps), int(examples_per_user or 1)
    larger = evaluate(steps, delta, "pld", examples_per_user, adjacency)
    interval = refine(steps, delta, users, adjacency)[1] if 0 < larger < math.inf else 0.0
    if not interval:
        return larger, larger
    steps = prepared(steps, users, adjacency)
    both = compose(steps, users, interval, adjacency)
    left = delta - ROUNDING * sum(step.count for step in steps)
    cut = cut_probability(steps, users)
    removing, adding = (
        epsilon_with_cuts(privacy_loss_distribution.PrivacyLossDistribution(pmf), left, cut)
        for pmf in (both._pmf_remove, both._pmf_add)
    )
    return min(removing, larger), min(adding, larger)


def finest_interval(steps: Sequence[StepEvent], users: int, adjacency: str) -> float:
    """The smallest interval of a grid for steps from `prepared`."""
    return max(_FINEST_INTERVAL, _span(steps, users, adjacency) / _LAST_POINTS)


def prepared(steps: Sequence[StepEvent], users: int, adjacency: str) -> list[StepEvent]:
    """The same steps within the range of doubles, those without a cut that ever happens as plain ones.

    Raises ValueError for what has no loss distribution here.
    """
    if adjacency == "replace-one" and users > 1:
        raise ValueError(
            f"adjacency='replace-one' with examples_per_user={users!r} has no loss distribution; use "
            "accountant=\"group\", or adjacency='zero-out', which has"
        )
    result = []
    for step in steps:
        if step.max_batch is not None and step.num_units is not None and step.max_batch >= step.num_units:
            step = replace(step, max_batch=None, num_units=None)
        result.append(replace(step, noise_multiplier=min(step.noise_multiplier, LARGEST_NOISE)))
    return result


def cut_probability(steps: Sequence[StepEvent], users: int) -> float:
    """A bound on the probability that any draw is cut, for users with several examples; their losses leave cuts out.

    Charged to delta as (1 + e^epsilon) of it: with that probability at most, a run with cuts differs from one without,
    for either of two neighbours. For users with one example the losses know of the cuts, and 0.0 is returned.
    """
    if users == 1:
        return 0.0
    cut = (s for s in steps if s.max_batch is not None)
    return float(sum(s.count * stats.binom.sf(s.max_batch, s.num_units, s.sample_rate) for s in cut))


def too_little_noise(steps: Sequence[StepEvent], users: int, adjacency: str) -> bool:
    """Whether some step has less noise than this accountant computes with."""
    return any(_relative_noise(step, users, adjacency) < SMALLEST_NOISE for step in steps)


def settle(on_grid: Callable[[float], float], span: float) -> tuple[float, float]:
    """Halve the grid's interval until epsilon settles: epsilon, and the last interval.

    on_grid: from an interval to an upper bound on epsilon. span: the largest privacy loss of one step.
    """
    # A power of two makes grids nest and the multiples of the interval exact.
    interval = max(_FINEST_INTERVAL, 2.0 ** math.floor(math.log2(span / _FIRST_POINTS)))
    epsilon = on_grid(interval)
    finest = max(_FINEST_INTERVAL, span / _LAST_POINTS)
    while 0 < epsilon < math.inf and interval / 2 >= finest:
        interval /= 2
        finer = on_grid(interval)
        settled = epsilon - finer < max(_SETTLED * finer, _SETTLED_ABSOLUTELY)
        epsilon = min(epsilon, finer)
        if settled:
            break
    return epsilon, interval


def epsilon_at(losses: Any, delta: float) -> float:
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


def epsilon_with_cuts(losses: Any, delta: float, cut: float) -> float:
    """`epsilon_at`, with (1 + e^epsilon) * cut taken from delta."""
    epsilon = epsilon_at(losses, delta)
    while cut > 0 and epsilon < _LARGEST_EPSILON_WITH_CUTS:
        # A little more is tried, so that it may turn out to be enough.
        epsilon = epsilon * (1 + 1e-6) + 1e-9
        left = delta - cut * (1 + math.exp(epsilon))
        needed = epsilon_at(losses, left) if left > 0 else math.inf
        if needed <= epsilon:
            return epsilon
        epsilon = needed
    return epsilon if cut == 0 else math.inf


def compose(steps: Sequence[StepEvent], users: int, interval: float, adjacency: str) -> Any:
    """The library's loss distribution of all these steps, from `prepared`, on a grid of that interval."""
    total: Any = None
    for step in steps:
        if step.sample_rate == 1 and (step.max_batch is None or users > 1):
            # Without sampling the composition is itself a Gaussian mechanism, to be put on the grid once.
            part = privacy_loss_distribution.from_gaussian_mechanism(
                _relative_noise(step, users, adjacency), value_discretization_interval=interval
            )
        else:
            part = _one_step(replace(step, count=1), users, interval, adjacency == "replace-one")
            if step.count > 1:
                part = part.self_compose(step.count)
        total = part if total is None else total.compose(part)
    return total


@lru_cache(maxsize=64)
def _one_step(step: StepEvent, users: int, interval: float, replacing: bool) -> Any:
    if users > 1 or (step.max_batch is None and not replacing):
        return on_grid(Mixture(step.noise_multiplier, step.sample_rate, users), interval)
    neighbours = NeighboringRelation.REPLACE_ONE if replacing else NeighboringRelation.REPLACE_SPECIAL
    if step.max_batch is None:
        losses = privacy_loss_distribution.from_gaussian_mechanism(
            step.noise_multiplier,
            value_discretization_interval=interval,
            sampling_prob=step.sample_rate,
            neighboring_relation=neighbours,
        )
    else:
        losses = privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=step.num_units,
            sampling_probability=step.sample_rate,
            truncated_batch_size=step.max_batch,
            noise_multiplier=step.noise_multiplier,
            value_discretization_interval=interval,
            neighboring_relation=neighbours,
        )
    dense = losses._pmf_remove.to_dense_pmf()
    if losses._symmetric:
        return privacy_loss_distribution.PrivacyLossDistribution(dense)
    return privacy_loss_distribution.PrivacyLossDistribution(dense, losses._pmf_add.to_dense_pmf())


def on_grid(mixture: Mixture, interval: float) -> Any:
    """The library's loss distribution of one step with that dominating pair, by connect-the-dots."""

    def one_way(direction: Direction) -> Any:
        low, high = mixture.losses(direction)
        first, last = math.floor(low / interval), math.ceil(high / interval)
        deltas = mixture.divergences(interval * np.arange(first, last + 1, dtype=np.float64), direction)
        pmf = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, deltas)
        # A sparse one would raise its size to the power of the number of steps, in whole numbers, before composing.
        return pmf.to_dense_pmf()

    return privacy_loss_distribution.PrivacyLossDistribution(one_way("remove"), one_way("add"))


def _relative_noise(step: StepEvent, users: int, adjacency: str) -> float:
    """Noise over what one draw can change; over what all of them change together where every draw takes everything."""
    replacing = 2 if adjacency == "replace-one" else 1
    if step.max_batch is not None and users == 1:
        # A unit that is cut makes room for another, and the library bounds both changes by one replacement.
        return step.noise_multiplier / 4
    if step.sample_rate == 1:
        return step.noise_multiplier / (replacing * users * math.sqrt(step.count))
    return step.noise_multiplier / (replacing * meeting(step.sample_rate, users))


def _span(steps: Sequence[StepEvent], users: int, adjacency: str) -> float:
    return max(_largest_loss(step, users, adjacency) for step in steps)


def _largest_loss(step: StepEvent, users: int, adjacency: str) -> float:
    """The largest privacy loss that matters to the grid, of one step or, where q = 1, of all of them together."""
    if step.sample_rate == 1:
        noise = _relative_noise(step, users, adjacency)
        return (1 / (2 * noise) + TAIL) / noise
    loss = Mixture(step.noise_multiplier, step.sample_rate, users).losses("remove")[1]
    # The other side's density is lower, but not below its part without the unit.
    return loss - math.log1p(-step.sample_rate) if adjacency == "replace-one" else loss


register(
    Accountant(
        "pld",
        f"dp-accounting {version('dp-accounting')}",
        rigorous=True,
        epsilon=_epsilon,
        adjacencies=ADJACENCIES,
        truncated=True,
    )
)
