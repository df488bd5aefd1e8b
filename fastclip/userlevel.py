"""Which sampling to train with when the guarantee is for users: the noise that either way costs, side by side.

Both do B gradient evaluations a step in expectation, for T steps, at the same user-level (epsilon, delta):

- example-level sampling (ELS): every user keeps at most K of its examples, chosen once; each kept example enters a draw
  with p = B / kept; gradients are clipped one by one. The noise multiplier is `get_noise_multiplier` with
  examples_per_user=K.
- user-level sampling (ULS): each user enters a draw with q = B / (sum over users of min(n_u, G)), which is B / (G N)
  where all have G; a drawn user gives min(G, n_u) of its examples, drawn afresh, whose mean gradient is clipped. The
  noise multiplier is that of the plain Poisson-sampled Gaussian: G is not in it.

(Charles et al., arXiv 2407.07737.) What is compared is the noise's standard deviation in each coordinate of the mean
gradient, in units of the root mean square norm of one example's gradient, with every clipping norm set to the root
mean square of what it clips:

    ELS  sigma / B                ULS  sigma C_G / (q N),    C_G^2 = r + (1 - r) mean over users of 1 / min(n_u, G)

where r is the share of the squared gradient norm that two examples of one user have in common
(`gradient_share.shared_gradient_share`); equal users with G examples or more have C_G^2 = r + (1 - r) / G. Beside it
stands the sampling error, the norm of what the draw alone adds to the mean gradient, in the same unit:

    ELS  sqrt((1 - p) / B)        ULS  sqrt((C_G^2 - q |mean of a user|^2) / (q N))

The noise's own norm is its standard deviation times the root of the number of trained parameters, so that it outweighs
the sampling error in any model that is not tiny.

The counts of examples, and with them p and q, are taken as public, which is what zero-out adjacency assumes. Not in
the numbers: what the examples that ELS drops would have taught; that ELS weighs users by the examples they keep, ULS
equally; and that r and the norms change during training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fastclip.accounting import get_noise_multiplier
from fastclip.accounting.accountants import check_count, check_delta, check_number
from fastclip.accounting.calibration import check_epsilon

# A predicted difference below this is none: r and the norms are not known that well.
TIE = 0.05

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Setting:
    """One way to sample, calibrated.

    algorithm: "ELS" or "ULS". examples_per_user: its K or G. kept_share: how many of the examples can ever be drawn.
    expected_units: examples (ELS, B) or users (ULS, q N) of a draw. sample_rate: p or q. noise_multiplier: sigma.
    mean_inverse, whole_inverse: means over users of 1 / min(n_u, G) and 1 / n_u; both 1 for ELS.
    """

    algorithm: str
    examples_per_user: int
    kept_share: float
    expected_units: float
    sample_rate: float
    noise_multiplier: float
    mean_inverse: float = 1.0
    whole_inverse: float = 1.0

    def noise(self, share: float) -> float:
        """Predicted noise per coordinate of the mean gradient at r = `share`; the module's formula."""
        return self.noise_multiplier * math.sqrt(share + (1 - share) * self.mean_inverse) / self.expected_units

    def sampling_error(self, share: float) -> float:
        """Predicted norm of what the draw adds to the mean gradient; the module's formula."""
        drawn = share + (1 - share) * self.mean_inverse
        whole = share + (1 - share) * self.whole_inverse
        return math.sqrt(max(drawn - self.sample_rate * whole, 0.0) / self.expected_units)

    def break_even(self, noise: float) -> float | None:
        """The r up to which the predicted noise is at most `noise`; None if it is more at any r in [0, 1]."""
        if self.noise(1.0) <= noise:
            return 1.0
        if self.noise(0.0) > noise:
            return None
        square = (noise * self.expected_units / self.noise_multiplier) ** 2
        return (square - self.mean_inverse) / (1 - self.mean_inverse)


@dataclass(frozen=True)
class Recommendation:
    """algorithm: "ELS" or "ULS"; None when it hangs on an r that was not given. examples_per_user: its K or G.

    break_even: the largest r at which some G beats the chosen ELS by more than `TIE`; None if none does at r = 0.
    """

    algorithm: str | None
    examples_per_user: int | None
    break_even: float | None
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Everything `compare` found. share: r, or None. left_out: in words, what the grid could not offer."""

    users: int
    examples: int
    median: int
    budget: float
    steps: int
    epsilon: float
    delta: float
    share: float | None
    els: tuple[Setting, ...]
    uls: tuple[Setting, ...]
    left_out: tuple[str, ...]
    recommendation: Recommendation

    @property
    def shares(self) -> tuple[float, ...]:
        """The values of r that ULS is predicted for: the given one, or both ends."""
        return (0.0, 1.0) if self.share is None else (self.share,)

    def rows(self) -> list[dict[str, Any]]:
        """One dict a setting, ELS first; noise and sampling_error are lists, one value for each of `shares`."""
        return [
            {
                "algorithm": x.algorithm,
                "examples_per_user": x.examples_per_user,
                "kept_share": x.kept_share,
                "expected_units": x.expected_units,
                "sample_rate": x.sample_rate,
                "noise_multiplier": x.noise_multiplier,
                "noise": [x.noise(share) for share in self.shares],
                "sampling_error": [x.sampling_error(share) for share in self.shares],
            }
            for x in (*self.els, *self.uls)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        known = ("users", "examples", "median", "budget", "steps", "epsilon", "delta", "share", "shares", "left_out")
        return {
            **{name: getattr(self, name) for name in known},
            "rows": self.rows(),
            "recommendation": asdict(self.recommendation),
        }


def compare(
    counts: npt.ArrayLike,
    budget: float,
    steps: int,
    epsilon: float,
    delta: float,
    share: float | None = None,
    *,
    caps: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """ELS for every K and ULS for every G, calibrated by `pld`, and which of them to choose.

    counts: `[N]` whole numbers, the examples of each user, 1 or more. budget: B, expected gradient evaluations a step, at
    most the number of examples. steps: T. epsilon, delta: for adding or removing one user. share: r in [0, 1]; None
    predicts ULS for both ends, and recommends only what holds at either. caps, groups: the K's and G's, by default the
    powers of two up to the largest count, and the median count. progress: called with settings done and settings in all.

    The ELS that is recommended, or measured ULS against, is the one with K nearest to the median count: less noise comes
    with a smaller K, but only by dropping data. A difference of less than 5 % goes to ELS, which is the simpler of the
    two and whose prediction does not rest on r.

    Raises ValueError for bad input, among it a K or G that was asked for and leaves fewer than B examples: a rate would
    be above 1. Warns (UserWarning) where delta >= 1 / N.
    """
    n = _checked_counts(counts)
    check_count("steps", steps, least=1)
    check_epsilon("epsilon", epsilon)
    check_delta("delta", delta)
    total, median, largest = int(n.sum()), math.ceil(float(np.median(n))), int(n.max())
    check_number("budget", budget)
    if budget <= 0:
        raise ValueError(f"budget={budget!r} is not a positive number; it counts gradient evaluations a step")
    if budget > total:
        raise ValueError(
            f"budget={budget!r} is more than the {total} examples there are; give at most that many a step"
        )
    if share is not None:
        check_number("share", share)
        if not 0 <= share <= 1:
            raise ValueError(f"share={share!r} is not in [0, 1]; it is a share of the squared gradient norm")
    if delta >= 1 / len(n):
        warnings.warn(
            f"delta={delta!r} is not below 1 / {len(n)}, one over the number of users: it allows giving one of them away "
            "whole; choose a far smaller one",
            stacklevel=2,
        )
    grid = sorted({*(2**i for i in range(largest.bit_length())), median})
    left_out: list[str] = []
    ks = _usable(n, budget, "K", caps, grid, left_out)
    gs = _usable(n, budget, "G", groups, grid, left_out)

    found: list[Setting] = []
    for make, size in [*((_example_level, k) for k in ks), *((_user_level, g) for g in gs)]:
        found.append(make(n, size, budget, steps, epsilon, delta))
        if progress is not None:
            progress(len(found), len(ks) + len(gs))
    els, uls = found[: len(ks)], found[len(ks) :]
    return Comparison(
        users=len(n),
        examples=total,
        median=median,
        budget=float(budget),
        steps=int(steps),
        epsilon=float(epsilon),
        delta=float(delta),
        share=None if share is None else float(share),
        els=tuple(els),
        uls=tuple(uls),
        left_out=tuple(left_out),
        recommendation=_recommend(els, uls, median, share),
    )


def _checked_counts(counts: npt.ArrayLike) -> Counts:
    n = np.asarray(counts)
    if n.ndim != 1 or n.size == 0:
        raise ValueError(
            f"counts has the shape {list(n.shape)}; give one number of examples for each user, [N] with N > 0"
        )
    if not np.issubdtype(n.dtype, np.number) or not np.all(np.isfinite(n)) or np.any(n != np.floor(n)):
        raise ValueError("counts holds something that is no whole number; give each user's number of examples")
    if n.min() < 1:
        raise ValueError(f"counts has {int((n < 1).sum())} users without examples; leave them out, they take no part")
    return n.astype(np.int64)


def _usable(
    n: Counts, budget: float, letter: str, asked: Sequence[int] | None, grid: Sequence[int], left_out: list[str]
) -> list[int]:
    """The K's or G's under which B examples are there to be drawn. One that was asked for and is not is an error."""
    for size in asked or ():
        if isinstance(size, bool) or size != int(size) or size < 1:
            raise ValueError(f"{letter}={size!r} is not a whole number of at least 1")
        if _kept(n, size) < budget:
            raise ValueError(
                f"{letter}={size} leaves {_kept(n, size)} examples, fewer than budget={budget!r}: a sampling rate would be "
                "above 1; give a smaller budget or more examples a user"
            )
    if asked:
        return sorted({int(size) for size in asked})
    usable = [size for size in grid if _kept(n, size) >= budget]
    # The largest count may lie between two powers of two, and the budget between what these leave.
    usable = usable or [int(n.max())]
    short = [size for size in grid if size < usable[0]]
    if short:
        left_out.append(
            f"{letter} = {', '.join(map(str, short))}: fewer examples than the budget takes in one step (rate above 1)"
        )
    return usable


def _kept(n: Counts, size: int) -> int:
    return int(np.minimum(n, size).sum())


@lru_cache(maxsize=1024)
def _noise(epsilon: float, delta: float, rate: float, steps: int, examples_per_user: int) -> float:
    # K = 1 and G = 1 are the same mechanism, and are calibrated once.
    return get_noise_multiplier(epsilon, delta, rate, steps, "pld", examples_per_user)


def _example_level(n: Counts, k: int, budget: float, steps: int, epsilon: float, delta: float) -> Setting:
    kept = _kept(n, k)
    # A user who is added may own as many as the cap allows.
    sigma = _noise(epsilon, delta, budget / kept, steps, k)
    return Setting("ELS", k, kept / int(n.sum()), float(budget), budget / kept, sigma)


def _user_level(n: Counts, g: int, budget: float, steps: int, epsilon: float, delta: float) -> Setting:
    rate = budget / _kept(n, g)
    sigma = _noise(epsilon, delta, rate, steps, 1)
    inverses = float(np.mean(1 / np.minimum(n, g))), float(np.mean(1 / n))
    return Setting("ULS", g, 1.0, rate * len(n), rate, sigma, *inverses)


def _recommend(els: Sequence[Setting], uls: Sequence[Setting], median: int, share: float | None) -> Recommendation:
    chosen = min(els, key=lambda x: (abs(math.log(x.examples_per_user / median)), -x.examples_per_user))
    noise = chosen.noise(1.0)  # whatever r is
    limit = noise * (1 - TIE)
    found = [(r, g) for g in uls if (r := g.break_even(limit)) is not None]
    break_even = max((r for r, _ in found), default=None)
    here = f"ELS with K = {chosen.examples_per_user} (noise {noise:.3g}, {chosen.kept_share:.0%} of the examples kept)"

    def best(r: float) -> Setting:
        return min(uls, key=lambda x: x.noise(r))

    def wins(r: float) -> bool:
        return best(r).noise(r) <= limit

    def by_uls(r: float) -> str:
        g = best(r)
        return (
            f"ULS with G = {g.examples_per_user} (noise {g.noise(r):.3g}) at r = {r:.3g}, "
            f"{abs(1 - g.noise(r) / noise):.0%} {'less' if g.noise(r) < noise else 'more'}"
        )

    if share is not None:
        if wins(share):
            ahead = "at every r" if break_even == 1 else f"up to r = {break_even:.2f}"
            reason = f"{by_uls(share)} than {here}; ULS with a suitable G stays ahead {ahead}."
            if best(share).examples_per_user == 1:
                reason += " ELS with K = 1 has the same noise, but would train on one fixed example of each user."
            return Recommendation("ULS", best(share).examples_per_user, break_even, reason)
        reason = (
            f"{here} is not beaten by 5 % or more: the best other is {by_uls(share)}. It is the simpler of the two."
        )
        return Recommendation("ELS", chosen.examples_per_user, break_even, reason)
    if wins(1.0):
        # With r unknown, the G whose worst case is least.
        g = best(1.0)
        reason = f"Even where a user's examples agree: {by_uls(1.0)} than {here}. A measured r may point to a larger G."
        return Recommendation("ULS", g.examples_per_user, break_even, reason)
    if break_even is None:
        reason = f"{here} is not beaten by 5 % or more whatever r is: the best other is {by_uls(0.0)}."
        return Recommendation("ELS", chosen.examples_per_user, None, reason)
    reason = (
        f"It hangs on r, the share of gradient that a user's examples have in common: below {break_even:.2f} ULS is ahead "
        f"({by_uls(0.0)}), above it {here}. Measure r on a public sample."
    )
    return Recommendation(None, None, break_even, reason)
