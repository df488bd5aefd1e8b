"""The two inverse questions: how much noise reaches a target epsilon, and how many steps a budget still pays for.

Both answers are on the private side: epsilon, computed again at exactly the value that is returned, is at most the
target. Both rely on epsilon falling with noise and growing with steps, which accountants that work on a grid keep up
to their accuracy; the final check is what counts.
"""

import math
from collections.abc import Sequence

from scipy import optimize

from fastclip.accounting.accountants import StepEvent, check_count, check_delta, check_number, epsilon_of, get_epsilon

_DIGITS = 5
_LARGEST_NOISE = 2.0**40
_MOST_STEPS = 10**7


def get_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "pld",
    examples_per_user: int | None = None,
) -> float:
    """The smallest noise multiplier, rounded up to five significant digits, whose epsilon is at most the target.

    `get_epsilon(returned, sample_rate, steps, target_delta, accountant, examples_per_user) <= target_epsilon` holds.

    target_epsilon: > 0. target_delta: in (0, 1). steps: >= 1. Raises ValueError for bad input, and when no noise is
    enough.
    """
    check_epsilon("target_epsilon", target_epsilon)
    check_delta("target_delta", target_delta)
    check_count("steps", steps, least=1)

    def epsilon(noise: float) -> float:
        return get_epsilon(noise, sample_rate, steps, target_delta, accountant, examples_per_user)

    high = 1.0
    while epsilon(high) > target_epsilon:
        high *= 2
        if high > _LARGEST_NOISE:
            raise ValueError(
                f"target_epsilon={target_epsilon!r} is out of reach at target_delta={target_delta!r} after "
                f"steps={steps!r}; raise one of the targets or take fewer steps"
            )
    low = high / 2
    while low > 1 / _LARGEST_NOISE and epsilon(low) <= target_epsilon:
        high, low = low, low / 2
    if epsilon(low) <= target_epsilon:
        return _rounded(low)  # any noise is enough: a unit is hardly ever drawn

    # The cap keeps the interpolation sane where epsilon is huge or infinite.
    noise: float = optimize.brentq(
        lambda x: min(epsilon(x), 10 * target_epsilon) - target_epsilon, low, high, xtol=1e-7 * high, rtol=1e-7
    )
    digit = 10.0 ** (math.floor(math.log10(noise)) - _DIGITS + 1)
    units = math.ceil(noise / digit)
    while epsilon(_rounded(units * digit)) > target_epsilon:
        units += 1
    return _rounded(units * digit)


def affordable_steps(
    epsilon_budget: float,
    delta: float,
    noise_multiplier: float,
    sample_rate: float,
    spent: Sequence[StepEvent] = (),
    accountant: str = "pld",
    examples_per_user: int | None = None,
) -> int:
    """How many more steps of this noise and rate keep the epsilon of `spent` and them together within the budget.

    Returns 0 when not even one does, and at most ten million. Raises ValueError for bad input.
    """
    check_epsilon("epsilon_budget", epsilon_budget)

    def fits(steps: int) -> bool:
        more = StepEvent(noise_multiplier, sample_rate, steps)
        return epsilon_of([*spent, more], delta, accountant, examples_per_user) <= epsilon_budget

    if not fits(1):
        return 0
    enough, too_many = 1, 4
    while fits(too_many):
        enough, too_many = too_many, 4 * too_many
        if enough >= _MOST_STEPS:
            return _MOST_STEPS
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        if fits(middle):
            enough = middle
        else:
            too_many = middle
    return enough


def check_epsilon(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name}={value!r} is not positive; a finite epsilon above 0 is needed")


def _rounded(noise: float) -> float:
    """The float that prints in five significant digits; the last bit of a product may not."""
    return float(f"{noise:.{_DIGITS}g}")
