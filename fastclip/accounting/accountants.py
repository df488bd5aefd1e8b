"""What an accountant is, which ones there are, and the question every one of them answers.

An accountant turns the steps that were released into one (epsilon, delta). Each lives in a file of its own and enters
itself here by name, with `register`; nothing else needs to change for a new one to reach every function of this
package.
"""

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

ADJACENCIES = ("add/remove", "zero-out", "replace-one")


class AccountingWarning(UserWarning):
    """An epsilon that is computed as asked for, and that is likely to be misread."""


@dataclass(frozen=True)
class StepEvent:
    """`count` releases of a sum of clipped gradients with the same noise and the same Poisson sampling.

    noise_multiplier: sigma, the noise's standard deviation over the sensitivity C; 0 means no noise.
    sample_rate: q in (0, 1], the probability with which each unit enters a draw.
    count: how many such releases, 0 or more.
    max_batch: of a draw with more units, so many stay, chosen uniformly at random ("truncated Poisson"); None where
        nothing is ever cut, which is the default.
    num_units: how many units are drawn from; public. Given with max_batch and only with it.

    Composition assumes that the values were fixed in advance: a sigma or q chosen from earlier noisy outputs is not
    covered by the accountants here.

    Raises ValueError for a value outside these ranges.
    """

    noise_multiplier: float
    sample_rate: float
    count: int = 1
    max_batch: int | None = None
    num_units: int | None = None

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
        if (self.max_batch is None) != (self.num_units is None):
            raise ValueError(
                f"max_batch={self.max_batch!r} and num_units={self.num_units!r} belong together: what a cut draw costs "
                "depends on how many units there are to draw from; give both or neither"
            )
        if self.max_batch is not None and self.num_units is not None:
            check_count("max_batch", self.max_batch, least=1)
            check_count("num_units", self.num_units, least=1)
            object.__setattr__(self, "max_batch", int(self.max_batch))
            object.__setattr__(self, "num_units", int(self.num_units))
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
    epsilon: (steps, delta, examples_per_user, adjacency) -> float. It is called with valid, merged steps, at least one
        of them, each with count >= 1 and noise_multiplier > 0; examples_per_user >= 1. It raises ValueError for what
        it cannot do.
    adjacencies: those it is ever called with. truncated: whether it is called with steps that have a max_batch.
    """

    name: str
    library: str
    rigorous: bool
    epsilon: Callable[[Sequence[StepEvent], float, int, str], float]
    adjacencies: tuple[str, ...] = ("add/remove", "zero-out")
    truncated: bool = False


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
    adjacency: str = "add/remove",
    *,
    max_batch: int | None = None,
    num_units: int | None = None,
) -> float:
    """The epsilon of `steps` equal steps of the Poisson-sampled Gaussian mechanism; see `epsilon_of`.

    steps: int >= 0. max_batch, num_units: of truncated draws, as in `StepEvent`. Raises ValueError for bad input.
    """
    check_count("steps", steps, least=0)
    event = StepEvent(noise_multiplier, sample_rate, steps, max_batch, num_units)
    epsilon = evaluate([event], delta, accountant, examples_per_user, adjacency)
    warn_of(accountant, [event], delta, examples_per_user)
    return epsilon


def epsilon_of(
    steps: Iterable[StepEvent],
    delta: float,
    accountant: str = "pld",
    examples_per_user: int | None = None,
    adjacency: str = "add/remove",
) -> float:
    """The epsilon at `delta` of all these steps together, in any order.

    The unit of privacy is whatever is sampled with `sample_rate`; with `examples_per_user=K`, examples are sampled,
    each user owns at most K of them, and epsilon is for one user.

    adjacency: what neighbouring data sets differ in. "add/remove": one has a unit that the other lacks. "zero-out":
    one unit contributes nothing in one of them, while the number of units is public; the same number as for
    add/remove. "replace-one": a unit has another content, so that a sum moves by up to 2 C; more by up to a factor of
    two. delta: in (0, 1).

    Returns 0.0 for no steps and inf when some step has no noise. Warns (AccountingWarning) where the accountant only
    approximates, and of a delta that is not below 1 / num_units. Raises ValueError for bad input and for what the
    accountant cannot do.
    """
    steps = list(steps)
    epsilon = evaluate(steps, delta, accountant, examples_per_user, adjacency)
    warn_of(accountant, steps, delta, examples_per_user)
    return epsilon


def evaluate(
    steps: Iterable[StepEvent],
    delta: float,
    accountant: str = "pld",
    examples_per_user: int | None = None,
    adjacency: str = "add/remove",
) -> float:
    """`epsilon_of` without its warnings, for whoever asks many times or says the same in other words."""
    chosen = find(accountant)
    check_delta("delta", delta)
    merged = merge(steps)
    check_supported(chosen, merged, examples_per_user, adjacency)
    if not merged:
        return 0.0
    if merged[0].noise_multiplier == 0:
        return math.inf
    return chosen.epsilon(merged, float(delta), int(examples_per_user or 1), adjacency)


def check_supported(
    accountant: Accountant, steps: Sequence[StepEvent], examples_per_user: int | None, adjacency: str
) -> None:
    """Raise ValueError, naming the remedy, unless the accountant can be asked about such steps and neighbours."""
    check_adjacency(adjacency)
    if examples_per_user is not None:
        check_count("examples_per_user", examples_per_user, least=1)
    if any(step.max_batch is not None for step in steps):
        if adjacency == "add/remove":
            raise ValueError(
                "max_batch cuts draws in a way that shows how many units there are, so adjacency='add/remove' cannot "
                "hold; choose adjacency='zero-out' or 'replace-one', for which num_units is public"
            )
        if not accountant.truncated:
            raise ValueError(
                f"accountant={accountant.name!r} cannot account for draws that are cut to max_batch; use "
                'accountant="pld"'
            )
    if adjacency not in accountant.adjacencies:
        several = examples_per_user is not None and examples_per_user > 1
        raise ValueError(
            f"adjacency={adjacency!r} is beyond accountant={accountant.name!r}; use "
            + ('accountant="group"' if several else 'accountant="pld"')
        )


def warn_of(accountant: str, steps: Iterable[StepEvent], delta: float, examples_per_user: int | None = None) -> None:
    """Warn of what makes an answer easy to misread; to be called by a public function, whose caller is shown."""
    if not find(accountant).rigorous:
        warnings.warn(
            f"accountant={accountant!r} approximates: its epsilon may be below the truth. For a guarantee use "
            'accountant="pld"',
            AccountingWarning,
            stacklevel=3,
        )
    # With several examples to a user, num_units counts examples, and there are fewer users still.
    largest = max((step.num_units or 0 for step in steps), default=0)
    if largest:
        warn_of_delta(delta, largest, "unit" if examples_per_user is None else "example", stacklevel=4)


def warn_of_delta(delta: float, num_units: int, unit: str, stacklevel: int = 3) -> None:
    """Warn unless delta is below 1 / num_units: publishing one unit whole, chosen at random, has delta 1 / num_units."""
    if delta >= 1 / num_units:
        warnings.warn(
            f"delta={delta!r} is not below 1 / {num_units}, the number of {unit}s, and would allow publishing one of "
            "them whole; choose a smaller one",
            AccountingWarning,
            stacklevel=stacklevel,
        )


def merge(steps: Iterable[StepEvent]) -> list[StepEvent]:
    """The steps with equal ones counted together, sorted, so that the same steps in another order give the same bits."""
    counts: dict[StepEvent, int] = {}
    for step in steps:
        if step.count:
            kind = replace(step, count=1)
            counts[kind] = counts.get(kind, 0) + step.count
    merged = [replace(kind, count=count) for kind, count in counts.items()]
    return sorted(merged, key=lambda s: (s.noise_multiplier, s.sample_rate, s.max_batch or 0, s.num_units or 0))


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


def check_adjacency(adjacency: str) -> None:
    """Raise ValueError unless `adjacency` is one of ADJACENCIES."""
    if adjacency not in ADJACENCIES:
        raise ValueError(
            f"adjacency={adjacency!r} is not accounted for; choose one of {', '.join(map(repr, ADJACENCIES))}"
        )
