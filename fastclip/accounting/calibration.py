"""The two inverse questions: how much noise reaches a target epsilon, and how many steps a budget still pays for.

Both answers are on the private side: epsilon, computed again at exactly the value that is returned, is at most the
target. Both rely on epsilon falling with noise and growing with steps, which accountants that work on a grid keep up
to their accuracy; the final check is what counts.
"""

import math
from collections.abc import Callable, Sequence

from scipy import optimize

from fastclip.accounting.accountants import (
    StepEvent,
    check_count,
    check_delta,
    check_number,
    evaluate,
    find,
    warn_of,
)

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
    adjacency: str = "add/remove",
    *,
    max_batch: int | None = None,
    num_units: int | None = None,
    tried: Callable[[float, float], None] | None = None,
) -> float:
    """The smallest noise multiplier, rounded up to five significant digits, whose epsilon is at most the target.

    `get_epsilon(returned, sample_rate, steps, target_delta, ...) <= target_epsilon` holds, with the same further
    arguments. What an accountant proposes that is not rigorous is checked by `pld`, and raised to what `pld` asks for
    where it would overspend: then the inequality holds for `pld`.

    target_epsilon: > 0. target_delta: in (0, 1). steps: >= 1. max_batch, num_units: as in `StepEvent`. tried: called
    with every noise multiplier that is tried and its epsilon, some ten to twenty of them, to show progress.

    Warns as `epsilon_of` does. Raises ValueError for bad input, and when no noise is enough.
    """

    def least(chosen: str) -> float:
        return propose_noise(
            target_epsilon,
            target_delta,
            sample_rate,
            steps,
            chosen,
            examples_per_user,
            adjacency,
            max_batch=max_batch,
            num_units=num_units,
            tried=tried,
        )

    noise = least(accountant)
    event = StepEvent(noise, sample_rate, steps, max_batch, num_units)
    if not find(accountant).rigorous:
        spent = evaluate([event], target_delta, "pld", examples_per_user, adjacency)
        noise = noise if spent <= target_epsilon else least("pld")
    warn_of(accountant, [event], target_delta, examples_per_user)
    return noise


def propose_noise(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: str,
    examples_per_user: int | None,
    adjacency: str,
    *,
    max_batch: int | None,
    num_units: int | None,
    tried: Callable[[float, float], None] | None,
) -> float:
    """What the accountant itself finds, rigorous or not; arguments and errors as for `get_noise_multiplier`."""
    check_epsilon("target_epsilon", target_epsilon)
    check_delta("target_delta", target_delta)
    check_count("steps", steps, least=1)

    def epsilon(noise: float) -> float:
        event = StepEvent(noise, sample_rate, steps, max_batch, num_units)
        found = evaluate([event], target_delta, accountant, examples_per_user, adjacency)
        if tried is not None:
            tried(noise, found)
        return found

    return _least_noise(epsilon, target_epsilon, f"target_delta={target_delta!r} after steps={steps!r}")


def _least_noise(epsilon: Callable[[float], float], target: float, setting: str) -> float:
    high = 1.0
    while epsilon(high) > target:
        high *= 2
        if high > _LARGEST_NOISE:
            raise ValueError(
                f"target_epsilon={target!r} is out of reach at {setting}; raise one of the targets or take fewer steps"
            )
    low = high / 2
    while low > 1 / _LARGEST_NOISE and epsilon(low) <= target:
        high, low = low, low / 2
    if epsilon(low) <= target:
        return _rounded(low)  # any noise is enough: a unit is hardly ever drawn

    # The cap keeps the interpolation sane where epsilon is huge or infinite.
    noise: float = optimize.brentq(
        lambda x: min(epsilon(x), 10 * target) - target, low, high, xtol=1e-7 * high, rtol=1e-7
    )
    digit = 10.0 ** (math.floor(math.log10(noise)) - _DIGITS + 1)
    units = math.ceil(noise / digit)
    while epsilon(_rounded(units * digit)) > target:
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
    adjacency: str = "add/remove",
    *,
    max_batch: int | None = None,
    num_units: int | None = None,
) -> int:
    """How many more steps of this noise and rate keep the epsilon of `spent` and them together within the budget.

    max_batch, num_units: of these further steps, as in `StepEvent`. Returns 0 when not even one does, and at most ten
    million. Warns as `epsilon_of` does. Raises ValueError for bad input.
    """
    check_epsilon("epsilon_budget", epsilon_budget)

    def fits(steps: int) -> bool:
        more = StepEvent(noise_multiplier, sample_rate, steps, max_batch, num_units)
        return evaluate([*spent, more], delta, accountant, examples_per_user, adjacency) <= epsilon_budget

    enough = _most_steps(fits)
    warn_of(accountant, [StepEvent(noise_multiplier, sample_rate, 1, max_batch, num_units)], delta, examples_per_user)
    return enough


def _most_steps(fits: Callable[[int], bool]) -> int:
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
