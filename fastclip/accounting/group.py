"""Group privacy: a figure for a user with up to K examples from figures for one example alone.

For comparison with `pld`, which composes what a user's examples do together and comes out far lower: its epsilon
grows a little faster than K, this one exponentially once the needed delta becomes too small.

An (epsilon_1, delta_1) for one example holds, along a chain of K data sets that differ in one example each, as
(K epsilon_1, delta_1 (1 + e^epsilon_1 + ... + e^((K - 1) epsilon_1))) for K of them (Vadhan, The Complexity of
Differential Privacy, lemma 2.2, with the sum kept as it is). Every epsilon_1 with a delta that is small enough gives
a bound; the smallest one is taken. The conversion of Renyi divergences is `rdp.group_divergences`.

Replacing a user whole is K replacements of one example each, where an example that one of the two users lacks counts as
one that contributes nothing.

The accountant "group" starts from `pld`, and from `rdp` where `pld` cannot certify a delta_1 that small. Both are
upper bounds, and so is the result.
"""

import math
from collections.abc import Callable, Sequence
from importlib.metadata import version

from scipy import optimize

from fastclip.accounting.accountants import (
    ADJACENCIES,
    Accountant,
    StepEvent,
    check_count,
    check_delta,
    evaluate,
    register,
)
from fastclip.accounting.rdp import renyi_epsilon

_SMALLEST_LOG_DELTA = -690.0
_ACCURACY = 1e-4


def vadhan(epsilon_of_example: Callable[[float], float], examples_per_user: int, delta: float) -> float:
    """The epsilon at `delta` for adding or removing up to `examples_per_user` examples at once; the module's formula.

    epsilon_of_example: from a delta in (0, 1) to an epsilon for one example, falling with delta; inf where it knows
    none. It is called about ten times. examples_per_user: K >= 1. delta: in (0, 1).

    The result is K times a value that `epsilon_of_example` returned, for a delta that was checked to be small enough;
    inf when none was found. Raises ValueError for bad input.
    """
    check_count("examples_per_user", examples_per_user, least=1)
    check_delta("delta", delta)
    if examples_per_user == 1:
        return epsilon_of_example(delta)
    found = math.inf

    def excess(log_delta: float) -> float:
        """How far the logarithm of the group's delta is above what it may be; all that is within counts."""
        nonlocal found
        if log_delta < _SMALLEST_LOG_DELTA:
            return math.inf
        epsilon = epsilon_of_example(math.exp(log_delta))
        over = log_delta + _log_growth(epsilon, examples_per_user) - math.log(delta)
        if over <= 0:
            found = min(found, examples_per_user * epsilon)
        return over

    # Even with epsilon 0, delta grows by a factor of K.
    high = math.log(delta) - math.log(examples_per_user)
    over = excess(high)
    if over <= 0 or math.isinf(over):
        return found
    low = _within(excess, high, over)
    if low is None:
        return math.inf
    # It ends on two deltas that close together, one on either side, and the better one was counted.
    optimize.brentq(excess, low, high, xtol=_ACCURACY)
    return found


def _within(excess: Callable[[float], float], high: float, width: float) -> float | None:
    """A logarithm of delta below `high` that is small enough and yet known, or None."""
    unknown = -math.inf
    while high - unknown > 1e-3:
        low = high - width if math.isinf(unknown) else (high + unknown) / 2
        over = excess(low)
        if over <= 0:
            return low
        if math.isinf(over):
            unknown = low
        else:
            high, width = low, 2 * width
    return None


def _log_growth(epsilon: float, members: int) -> float:
    """log(1 + e^epsilon + ... + e^((members - 1) epsilon))."""
    if epsilon == 0 or math.isinf(epsilon):
        return math.log(members) if epsilon == 0 else math.inf
    return (members - 1) * epsilon + math.log(math.expm1(-members * epsilon) / math.expm1(-epsilon))


def _epsilon(steps: Sequence[StepEvent], delta: float, examples_per_user: int, adjacency: str) -> float:
    truncated = any(step.max_batch is not None for step in steps)
    if truncated and adjacency == "replace-one" and examples_per_user > 1:
        raise ValueError(
            f"examples_per_user={examples_per_user!r} with max_batch and adjacency='replace-one' is not covered: two "
            "users may own different numbers of examples, and what a cut draw costs depends on that number; choose "
            "adjacency='zero-out'"
        )
    epsilon = vadhan(lambda small: evaluate(steps, small, "pld", None, adjacency), examples_per_user, delta)
    if epsilon < math.inf or truncated:
        return epsilon
    members = 2 if adjacency == "replace-one" else 1
    return vadhan(lambda small: renyi_epsilon(steps, small, members)[0], examples_per_user, delta)


register(
    Accountant(
        "group",
        f"dp-accounting {version('dp-accounting')}",
        rigorous=True,
        epsilon=_epsilon,
        adjacencies=ADJACENCIES,
        truncated=True,
    )
)
