"""A differential privacy guarantee, whole: an epsilon means nothing without the rest of what stands here.

What it states: let M be the training run and D, D' two data sets that differ in one unit, in the sense of
`adjacency`. For every set S of outcomes, P(M(D) in S) <= e^epsilon P(M(D') in S) + delta, where the outcome is
everything that the `steps` released: all intermediate weights, not only the last.

- "add/remove": D' has one unit more or less. It needs sample_rate, steps and delta that do not depend on the data.
- "zero-out": one unit's contribution is taken out while the number of units stays as it is and is public. This is
  what holds when any of the three was computed from the number of units.

`voided` says that no guarantee holds, whatever epsilon is: a seed is known, or batches were not Poisson draws.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Context

from fastclip.accounting.accountants import StepEvent, epsilon_of, find

ADJACENCIES = ("add/remove", "zero-out")
SAMPLERS = ("poisson",)
_FROM_SIZE = ("sample_rate", "steps", "delta")


@dataclass(frozen=True)
class Guarantee:
    """One guarantee and all it rests on; made by `guarantee_of`.

    epsilon, delta: see the module's docstring. unit: what is protected, such as "example" or "user".
    steps: how many releases. noise_multiplier, sample_rate: None when they varied between steps.
    accountant, accountant_version: who computed epsilon. rigorous: whether epsilon is an upper bound.
    caveats: sentences that have to be shown with the epsilon. voided: no guarantee holds.
    examples_per_user: at most so many examples of one user are used, and they are sampled one by one; None otherwise.
    """

    epsilon: float
    delta: float
    unit: str
    adjacency: str
    sampler: str
    steps: int
    noise_multiplier: float | None
    sample_rate: float | None
    accountant: str
    accountant_version: str
    rigorous: bool
    caveats: tuple[str, ...] = ()
    voided: bool = False
    examples_per_user: int | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON. An infinite epsilon becomes the string "inf", which JSON can hold."""
        plain = asdict(self)
        plain["caveats"] = list(self.caveats)
        if math.isinf(self.epsilon):
            plain["epsilon"] = "inf"
        return plain

    def __str__(self) -> str:
        epsilon = rounded_up(self.epsilon)
        if self.voided:
            claim = (
                f"No privacy guarantee holds for this run. The accountant's figure would have been epsilon {epsilon} "
                f"at delta {self.delta:g} ({self.unit} level, {self.adjacency}), but it is void."
            )
        elif math.isinf(self.epsilon):
            claim = f"This run is not private: no finite epsilon holds at delta {self.delta:g} ({self.unit} level)."
        else:
            change = {
                "add/remove": f"adding or removing everything that belongs to one {self.unit}",
                "zero-out": f"taking out what one {self.unit} contributes, while the number of {self.unit}s is public,",
            }[self.adjacency]
            claim = (
                f"Differentially private at {self.unit} level with epsilon {epsilon} and delta {self.delta:g} "
                f"({self.adjacency} adjacency): {change} changes the probability of any outcome of this training run "
                f"by at most a factor of e^{epsilon}, but for a probability of {self.delta:g}."
            )
        return " ".join([claim, self._basis(), *self.caveats])

    def _basis(self) -> str:
        noise = "varying" if self.noise_multiplier is None else f"{self.noise_multiplier:g}"
        rate = "varying" if self.sample_rate is None else f"{self.sample_rate:g}"
        kind = "an upper bound" if self.rigorous else "an approximation"
        sampled = self.unit if self.examples_per_user is None else "example"
        cap = "" if self.examples_per_user is None else f", at most {self.examples_per_user} per {self.unit}"
        return (
            f"It counts {self.steps} steps with noise multiplier {noise}, each on a draw of {sampled}s by "
            f"{self.sampler} sampling at rate {rate}{cap}; computed by the {self.accountant} accountant "
            f"({self.accountant_version}), {kind}."
        )


def guarantee_of(
    steps: Iterable[StepEvent],
    delta: float,
    *,
    unit: str = "example",
    adjacency: str = "add/remove",
    sampler: str = "poisson",
    accountant: str = "pld",
    examples_per_user: int | None = None,
    num_units: int | None = None,
    from_size: Sequence[str] = (),
    seeded: bool = False,
    caveats: Sequence[str] = (),
) -> Guarantee:
    """The guarantee of these steps, with every caveat that follows from the arguments.

    from_size: which of "sample_rate", "steps", "delta" were computed from the number of units in the data; any of
        them makes the adjacency zero-out, whatever `adjacency` says.
    sampler: anything other than "poisson" voids the guarantee. seeded: a seed was given somewhere; that voids it too.
    num_units: when given, a delta of 1 / num_units or more is remarked upon. caveats: further sentences, shown last.

    Raises ValueError for bad input.
    """
    steps = list(steps)
    check_terms(unit, adjacency)
    unknown = [name for name in from_size if name not in _FROM_SIZE]
    if unknown:
        raise ValueError(f"from_size={list(from_size)!r} names {unknown[0]!r}; choose among {', '.join(_FROM_SIZE)}")
    epsilon = epsilon_of(steps, delta, accountant, examples_per_user)
    chosen = find(accountant)
    found = []
    if seeded:
        found.append(
            "A seed was given: whoever knows or guesses it can repeat the noise and the draws, so the epsilon is void. "
            "Leave every seed out for a run that is to be private."
        )
    if sampler not in SAMPLERS:
        found.append(
            f"Batches came from {sampler!r} sampling and not from Poisson draws, for which alone this epsilon is "
            "computed, so it is void."
        )
    if from_size:
        adjacency = "zero-out"
        found.append(
            f"Computed from the number of {unit}s: {', '.join(from_size)}. That number is therefore treated as public; "
            "declare constants instead for add/remove adjacency."
        )
    if num_units is not None and delta >= 1 / num_units:
        found.append(
            f"Delta is not below 1 / {num_units}, the number of {unit}s: that would allow publishing one of them whole."
        )
    if not chosen.rigorous:
        found.append(f"The {accountant} accountant approximates; the true epsilon can be larger.")

    taken = [step for step in steps if step.count]
    noises = {step.noise_multiplier for step in taken}
    rates = {step.sample_rate for step in taken}
    return Guarantee(
        epsilon=epsilon,
        delta=delta,
        unit=unit,
        adjacency=adjacency,
        sampler=sampler,
        steps=sum(step.count for step in taken),
        noise_multiplier=noises.pop() if len(noises) == 1 else None,
        sample_rate=rates.pop() if len(rates) == 1 else None,
        accountant=accountant,
        accountant_version=chosen.library,
        rigorous=chosen.rigorous,
        caveats=(*found, *caveats),
        voided=seeded or sampler not in SAMPLERS,
        examples_per_user=examples_per_user,
    )


def check_terms(unit: str, adjacency: str) -> None:
    """Raise ValueError unless these can stand in a guarantee."""
    if not isinstance(unit, str) or not unit.strip():
        raise ValueError(f"unit={unit!r} says nothing; give a word such as 'example' or 'user'")
    if adjacency not in ADJACENCIES:
        raise ValueError(
            f"adjacency={adjacency!r} is not accounted for; choose one of {', '.join(map(repr, ADJACENCIES))}"
        )


def rounded_up(epsilon: float) -> str:
    """Epsilon for reading, in at most four digits, never less than it is."""
    if not math.isfinite(epsilon):
        return str(epsilon)
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal(repr(epsilon))):.4g}"
