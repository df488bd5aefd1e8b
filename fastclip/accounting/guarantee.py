"""A differential privacy guarantee, whole: an epsilon means nothing without the rest of what stands here.

What it states: let M be the training run and D, D' two data sets that differ in one unit, in the sense of
`adjacency`. For every set S of outcomes, P(M(D) in S) <= e^epsilon P(M(D') in S) + delta, where the outcome is
everything that the `steps` released: all intermediate weights, not only the last.

- "add/remove": D' has one unit more or less. It needs sample_rate, steps and delta that do not depend on the data.
- "zero-out": one unit's contribution is taken out while the number of units stays as it is and is public. This is
  what holds when any of the three was computed from the number of units, and when draws were cut to a maximum.
- "replace-one": one unit has another content in D', while the number of units stays as it is and is public.

`voided` says that no guarantee holds, whatever epsilon is: a seed is known, or batches were not Poisson draws.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context

from fastclip.accounting.accountants import (
    StepEvent,
    check_adjacency,
    check_count,
    evaluate,
    find,
    warn_of,
    warn_of_delta,
)
from fastclip.accounting.shuffle import shuffle_lower_bound

SAMPLERS = ("poisson", "truncated poisson")
_FROM_SIZE = ("sample_rate", "steps", "delta")


@dataclass(frozen=True)
class Guarantee:
    """One guarantee and all it rests on; made by `guarantee_of`.

    epsilon, delta: see the module's docstring. unit: what is protected, such as "example" or "user".
    steps: how many releases. noise_multiplier, sample_rate: None when they varied between steps.
    accountant, accountant_version: who computed epsilon. rigorous: whether epsilon is an upper bound.
    caveats: sentences that have to be shown with the epsilon. voided: no guarantee holds.
    examples_per_user: at most so many examples of one user are used, and they are sampled one by one; None otherwise.
    max_batch: the most that a draw could hold ("truncated poisson"), None otherwise or when it varied.
    epsilon_at_least: what no figure for these steps can be below with the batches that there were, though `epsilon` may
    be; None where that is not known.
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
    max_batch: int | None = None
    epsilon_at_least: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON. An infinite epsilon becomes the string "inf", which JSON can hold."""
        plain = asdict(self)
        plain["caveats"] = list(self.caveats)
        for name in ("epsilon", "epsilon_at_least"):
            if plain[name] == math.inf:
                plain[name] = "inf"
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
                "replace-one": f"replacing everything that belongs to one {self.unit}, while the number of {self.unit}s "
                "is public,",
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
        cap += "" if self.max_batch is None else f", cut to {self.max_batch} where it holds more"
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
    as_poisson: bool = False,
    accountant: str = "pld",
    examples_per_user: int | None = None,
    num_units: int | None = None,
    from_size: Sequence[str] = (),
    seeded: bool = False,
    caveats: Sequence[str] = (),
) -> Guarantee:
    """The guarantee of these steps, with every caveat that follows from the arguments.

    from_size: which of "sample_rate", "steps", "delta" were computed from the number of units in the data; any of
        them makes add/remove adjacency zero-out.
    sampler: "poisson"; steps with a max_batch make it "truncated poisson". "shuffled" batches have no accountant: they
        are refused unless `as_poisson` asks for the figure that Poisson draws would have, which is marked void and comes
        with `shuffle_lower_bound` of the first epoch. Any other word voids the guarantee as well.
    seeded: a seed was given somewhere; that voids it too.
    num_units: when given, a delta of 1 / num_units or more is remarked upon, and warned of. caveats: further sentences,
        shown last.

    Warns (AccountingWarning) as `epsilon_of` does. Raises ValueError for bad input.
    """
    steps = list(steps)
    if num_units is not None:
        check_count("num_units", num_units, least=1)
    check_terms(unit, adjacency)
    if sampler == "shuffled" and not as_poisson:
        raise ValueError(
            "sampler='shuffled' has no accountant: the figure for Poisson draws can be far below the truth. Draw by "
            "'poisson', or give as_poisson=True to see that figure, marked void, beside a lower bound on the truth"
        )
    unknown = [name for name in from_size if name not in _FROM_SIZE]
    if unknown:
        raise ValueError(f"from_size={list(from_size)!r} names {unknown[0]!r}; choose among {', '.join(_FROM_SIZE)}")
    if from_size and adjacency == "add/remove":
        adjacency = "zero-out"
    epsilon = evaluate(steps, delta, accountant, examples_per_user, adjacency)
    warn_of(accountant, steps if num_units is None else (), delta, examples_per_user)
    chosen = find(accountant)
    taken = [step for step in steps if step.count]
    cuts = {step.max_batch for step in taken}
    if sampler == "poisson" and cuts - {None}:
        sampler = "truncated poisson"
    at_least = _shuffled_at_least(taken, delta) if sampler == "shuffled" else None
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
    if at_least is not None:
        found.append(
            f"Shuffled batches cost epsilon {rounded_down(at_least)} or more at this delta, from the first epoch alone "
            "and with zero-out adjacency."
        )
    if from_size:
        numbers, they_are = f"the number of {unit}s", "That number is"
        if examples_per_user is not None:
            # Examples are what is drawn: the rate says how many of them all users together have, up to each user's cap.
            numbers += f" and that of the examples that are drawn from, at most {examples_per_user} per {unit}"
            they_are = "Both numbers are"
        found.append(
            f"Computed from {numbers}: {', '.join(from_size)}. {they_are} therefore treated as public; "
            "declare constants instead for add/remove adjacency."
        )
    if num_units is not None and delta >= 1 / num_units:
        found.append(
            f"Delta is not below 1 / {num_units}, the number of {unit}s: that would allow publishing one of them whole."
        )
        warn_of_delta(delta, num_units, unit)
    if not chosen.rigorous:
        found.append(f"The {accountant} accountant approximates; the true epsilon can be larger.")

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
        max_batch=cuts.pop() if len(cuts) == 1 else None,
        epsilon_at_least=at_least,
    )


def _shuffled_at_least(steps: Sequence[StepEvent], delta: float) -> float | None:
    """`shuffle_lower_bound` of the first epoch; None where noise or rate changed in its course."""
    if not steps:
        return None
    per_epoch = max(1, round(1 / steps[0].sample_rate))
    equal = 0
    for step in steps:
        if (step.noise_multiplier, step.sample_rate) != (steps[0].noise_multiplier, steps[0].sample_rate):
            break
        equal += step.count
    if equal < per_epoch:
        return None
    return shuffle_lower_bound(steps[0].noise_multiplier, per_epoch, delta)


def check_terms(unit: str, adjacency: str) -> None:
    """Raise ValueError unless these can stand in a guarantee."""
    if not isinstance(unit, str) or not unit.strip():
        raise ValueError(f"unit={unit!r} says nothing; give a word such as 'example' or 'user'")
    check_adjacency(adjacency)


def rounded_up(epsilon: float) -> str:
    """Epsilon for reading, in at most four digits, never less than it is."""
    return _rounded(epsilon, ROUND_CEILING)


def rounded_down(epsilon: float) -> str:
    """A lower bound on epsilon for reading, in at most four digits, never more than it is."""
    return _rounded(epsilon, ROUND_FLOOR)


def _rounded(epsilon: float, rounding: str) -> str:
    if not math.isfinite(epsilon):
        return str(epsilon)
    return f"{float(Context(prec=4, rounding=rounding).create_decimal(repr(epsilon))):.4g}"
