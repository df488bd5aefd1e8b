"""What an accountant is, which ones there are, and the question every one of them answers.

An accountant turns the steps that were released into one (epsilon, delta). Each lives in a file of its own and enters
itself here by name, with `register`; nothing else needs to change for a new one to reach every function of this
package.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepEvent:
    """`count` releases of a sum of clipped gradients with the same noise and the same Poisson sampling.

    noise_multiplier: sigma, the noise's standard deviation over the sensitivity C; 0 means no noise.
    sample_rate: q in (0, 1], the probability with which each unit enters a draw.
    count: how many such releases, 0 or more.

    Composition assumes that the values were fixed in advance: a sigma or q chosen from earlier noisy outputs is not
    covered by the accountants here.

    Raises ValueError for a value outside these ranges.
    """

    noise_multiplier: float
    sample_rate: float
    count: int = 1

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier)
        if self.noise_multiplier < 0:
            raise ValueError(f"noise_multiplier={self.noise_multiplier!r} is negative; give 0 (no noise) or more")
        check_number("sample_rate", self.sample_rate)
        if not 0 < self.sample_rate <= 1:
            raise ValueError(
                f"sample_rate={self.sample_rate!r} is not a probability in (0, 1]; "
                "it is the expected batch size over the number of units"
            )
        check_count("count", self.count, least=0)
        # Plain numbers, whatever kind came in: they are compared, summed and written to files.
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", float(self.sample_rate))
        object.__setattr__(self, "count", int(self.count))


@dataclass(frozen=True)
class Accountant:
    """One way to compute epsilon.

    name: what users ask for, such as "pld".
    library: package and version whose arithmetic gives the number; printed with every guarantee.
    rigorous: whether `epsilon` is an upper bound, rather than an approximation that may fall below the truth.
    epsilon: (steps, delta, examples_per_user) -> float. It is called with valid, merged steps, at least one of them,
        each with count >= 1 and noise_multiplier > 0; examples_per_user >= 1. It raises ValueError for what it cannot
        do.
    """

    name: str
    library: str
    rigorous: bool
    epsilon: Callable[[Sequence[StepEvent], float, int], float]


_REGISTRY: dict[str, Accountant] = {}


def register(accountant: Accountant) -> None:
    """Make `accountant` known by its name. Raises ValueError if the name is taken."""
    if accountant.name in _REGISTRY:
        raise ValueError(f"accountant={accountant.name!r} is registered already; choose another name")
    _REGISTRY[accountant.name] = accountant


def find(name: str) -> Accountant:
    """The accountant of that name. Raises ValueError that lists the names there are."""
    if name not in _REGISTRY:
        known = ", ".join(repr(known) for known in sorted(_REGISTRY))
        raise ValueError(f"accountant={name!r} does not exist; choose one of {known}")
    return _REGISTRY[name]


def get_epsilon(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
    examples_per_user: int | None = None,
) -> float:
    """The epsilon of `steps` equal steps of the Poisson-sampled Gaussian mechanism; see `epsilon_of`.

    steps: int >= 0. Raises ValueError for bad input.
    """
    check_count("steps", steps, least=0)
    return epsilon_of([StepEvent(noise_multiplier, sample_rate, steps)], delta, accountant, examples_per_user)


def epsilon_of(
    steps: Iterable[StepEvent],
    delta: float,
    accountant: str = "pld",
    examples_per_user: int | None = None,
) -> float:
    """The epsilon at `delta` of all these steps together, in any order.

    The unit of privacy is whatever is sampled with `sample_rate`; with `examples_per_user=K`, examples are sampled,
    each user owns at most K of them, and epsilon is for adding or removing one user. Adjacency is add-or-remove-one;
    the same number holds for zero-out, where the number of units is public.

    delta: in (0, 1). Returns 0.0 for no steps and inf when some step has no noise. Raises ValueError for bad input.
    """
    chosen = find(accountant)
    check_delta("delta", delta)
    if examples_per_user is not None:
        check_count("examples_per_user", examples_per_user, least=1)
    counts: dict[tuple[float, float], int] = {}
    for step in steps:
        if step.count:
            key = (step.noise_multiplier, step.sample_rate)
            counts[key] = counts.get(key, 0) + step.count
    # Sorted, so that the same steps in another order give the same bits.
    merged = [StepEvent(noise, rate, count) for (noise, rate), count in sorted(counts.items())]
    if not merged:
        return 0.0
    if merged[0].noise_multiplier == 0:
        return math.inf
    return chosen.epsilon(merged, float(delta), int(examples_per_user or 1))


def check_number(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not a finite number; give a float")


def check_count(name: str, value: int, *, least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {least}; give an int")


def check_delta(name: str, value: float) -> None:
    """Raise ValueError unless `value` lies strictly between 0 and 1."""
    check_number(name, value)
    if not 0 < value < 1:
        raise ValueError(
            f"{name}={value!r} is not strictly between 0 and 1; it should be well below 1 / number of units"
        )
