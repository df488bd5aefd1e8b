"""Example-level against user-level sampling on a problem with a known answer: the mean of a population of users.

In the spirit of the synthetic experiments of Charles et al. (arXiv 2407.07737), with settings of our own; no figure of
theirs is reproduced. User u owns n examples

    x_uj = mu + a_u + b_uj,    a_u ~ N(0, s1^2 / d I),    b_uj ~ N(0, s2^2 / d I),    |mu| = 1,

in d dimensions, so that r = s1^2 / (s1^2 + s2^2) of the squared norm of x - mu is shared by a user's examples. Both
algorithms descend on |theta - x|^2 / 2 for T steps from theta = 0, with the same learning rate, the same expected number
B of gradients a step, the same user-level (epsilon, delta), Poisson draws, clipping, and Gaussian noise from `pld`. Their
clipping norms are the typical norms of what is clipped at theta = mu: sqrt(s1^2 + s2^2) for an example and
sqrt(s1^2 + s2^2 / G) for the mean of G. The result is |theta_T - mu|^2, averaged over trials, each with its own mu, data,
draws and noise.

Beside the noise that `userlevel` predicts it holds all that the prediction leaves out: the draws, the finite
population (s1^2 / N + s2^2 / (N n), or K in the place of n where ELS drops the rest), and what clipping does on the way.
A simulation: its random numbers are numpy's, seeded, and protect nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastclip.userlevel import Setting, compare

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Experiment:
    """N users with n examples each in d dimensions; steps T; the grid of epsilons, budgets B, spreads (s1, s2), ELS caps
    K and ULS group sizes G; trials; seed. Raises ValueError for fewer than 2 trials, and for a K or G above n."""

    users: int = 10_000
    examples_per_user: int = 16
    dimension: int = 256
    steps: int = 100
    learning_rate: float = 0.1
    delta: float = 1e-6
    epsilons: tuple[float, ...] = (1.0, 8.0)
    budgets: tuple[int, ...] = (256, 1024, 4096)
    spreads: tuple[tuple[float, float], ...] = ((1.0, 0.0), (0.7, 0.7), (0.1, 1.0))
    caps: tuple[int, ...] = (1, 16)
    groups: tuple[int, ...] = (1, 4, 16)
    trials: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trials < 2:
            raise ValueError(f"trials={self.trials!r} gives no standard error; at least 2 are needed")
        for size in (*self.caps, *self.groups):
            if not 1 <= size <= self.examples_per_user:
                raise ValueError(f"K or G = {size!r} is not between 1 and examples_per_user={self.examples_per_user!r}")


# A few seconds; with fewer users than the full one, each of whom is drawn as often.
QUICK = Experiment(users=2000, dimension=64, steps=60, budgets=(64, 1024), spreads=((1.0, 0.0), (0.1, 1.0)))


@dataclass(frozen=True)
class Outcome:
    """One algorithm at one point of the grid. share: r. error: mean of |theta_T - mu|^2 over trials, with its standard
    error. noise: the predicted noise per coordinate of the mean gradient, in units of an example's gradient norm."""

    epsilon: float
    budget: int
    share: float
    algorithm: str
    examples_per_user: int
    noise_multiplier: float
    noise: float
    error: float
    standard_error: float


@dataclass(frozen=True)
class Verdict:
    """The best K against the best G of 2 or more at one point of the grid.

    winner is "ELS", "ULS" or, within three standard errors of the difference or 10 %, "tie". single: ULS with G = 1, where
    the two algorithms meet: its steps are those of ELS with K = 1, with each drawn user's example chosen afresh. It takes no
    side; None if it was not run.
    """

    epsilon: float
    budget: int
    share: float
    els: Outcome
    uls: Outcome
    single: Outcome | None

    @property
    def ratio(self) -> float:
        """ULS' error over ELS'."""
        return self.uls.error / self.els.error

    @property
    def winner(self) -> str:
        spread = math.hypot(self.els.standard_error, self.uls.standard_error)
        difference = self.uls.error - self.els.error
        if abs(difference) <= max(3 * spread, 0.1 * self.els.error):
            return "tie"
        return "ULS" if difference < 0 else "ELS"


def run(experiment: Experiment, progress: Callable[[int, int], None] | None = None) -> list[Outcome]:
    """Every point of the grid, ELS before ULS. progress: called with runs done and runs in all.

    The same trial has the same mu and the same standard normal data everywhere on the grid. Raises ValueError where a
    setting makes no sense, see `userlevel.compare`.
    """
    e = experiment
    points = [(epsilon, budget, spread) for epsilon in e.epsilons for budget in e.budgets for spread in e.spreads]
    settings = {(epsilon, budget): _settings(e, epsilon, budget) for epsilon, budget, _ in points}
    errors: dict[tuple[Any, ...], list[float]] = {}
    total = e.trials * len(e.spreads) * sum(map(len, settings.values()))
    done = 0
    for trial in range(e.trials):
        data = np.random.default_rng([e.seed, trial])
        mu = data.standard_normal(e.dimension, dtype=np.float32)
        mu /= np.linalg.norm(mu)
        shared = data.standard_normal((e.users, 1, e.dimension), dtype=np.float32) / math.sqrt(e.dimension)
        own = data.standard_normal((e.users, e.examples_per_user, e.dimension), dtype=np.float32)
        own /= np.float32(math.sqrt(e.dimension))
        for place, spread in enumerate(e.spreads):
            x = np.float32(spread[1]) * own
            x += np.float32(spread[0]) * shared
            x += mu
            for at, ((epsilon, budget), found) in enumerate(settings.items()):
                for number, setting in enumerate(found):
                    rng = np.random.default_rng([e.seed, trial, place, at, number])
                    theta = _descend(x, setting, spread, e, rng)
                    key = (epsilon, budget, spread, setting)
                    errors.setdefault(key, []).append(float(np.square(theta - mu).sum()))
                    done += 1
                    if progress is not None:
                        progress(done, total)
    return [
        _outcome(epsilon, budget, spread, setting, errors[epsilon, budget, spread, setting])
        for epsilon, budget, spread in points
        for setting in settings[epsilon, budget]
    ]


def verdicts(outcomes: Sequence[Outcome]) -> list[Verdict]:
    """One for each point of the grid, in its order. Raises ValueError unless a K and a G of 2 or more were run."""
    found = []
    for point in dict.fromkeys((x.epsilon, x.budget, x.share) for x in outcomes):
        here = [x for x in outcomes if (x.epsilon, x.budget, x.share) == point]
        els = [x for x in here if x.algorithm == "ELS"]
        uls = [x for x in here if x.algorithm == "ULS" and x.examples_per_user > 1]
        if not els or not uls:
            raise ValueError("outcomes has nothing to compare; run at least one K, and one G of 2 or more")
        single = next((x for x in here if x.algorithm == "ULS" and x.examples_per_user == 1), None)
        found.append(Verdict(*point, min(els, key=_error), min(uls, key=_error), single))
    return found


def as_dict(experiment: Experiment, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Settings, outcomes and verdicts as plain numbers and lists, for JSON."""
    return {
        "experiment": "mean-estimation",
        "settings": asdict(experiment),
        "outcomes": [asdict(x) for x in outcomes],
        "verdicts": [
            {
                "epsilon": v.epsilon,
                "budget": v.budget,
                "share": v.share,
                "best_els_examples_per_user": v.els.examples_per_user,
                "best_uls_examples_per_user": v.uls.examples_per_user,
                "uls_over_els": v.ratio,
                "winner": v.winner,
                "single_over_els": None if v.single is None else v.single.error / v.els.error,
            }
            for v in verdicts(outcomes)
        ],
    }


def _error(outcome: Outcome) -> float:
    return outcome.error


def _settings(e: Experiment, epsilon: float, budget: int) -> tuple[Setting, ...]:
    found = compare([e.examples_per_user] * e.users, budget, e.steps, epsilon, e.delta, caps=e.caps, groups=e.groups)
    return (*found.els, *found.uls)


def _outcome(
    epsilon: float, budget: int, spread: tuple[float, float], setting: Setting, errors: Sequence[float]
) -> Outcome:
    share = spread[0] ** 2 / (spread[0] ** 2 + spread[1] ** 2)
    return Outcome(
        epsilon=epsilon,
        budget=budget,
        share=share,
        algorithm=setting.algorithm,
        examples_per_user=setting.examples_per_user,
        noise_multiplier=setting.noise_multiplier,
        noise=setting.noise(share),
        error=float(np.mean(errors)),
        standard_error=float(np.std(errors, ddof=1) / math.sqrt(len(errors))),
    )


def _descend(x: Array, setting: Setting, spread: tuple[float, float], e: Experiment, rng: np.random.Generator) -> Array:
    """theta after all steps, `[d]`; x `[N, n, d]`."""
    size = setting.examples_per_user
    if setting.algorithm == "ELS":
        units, clip = _kept(x, size, rng), math.hypot(*spread)
    else:
        units, clip = x, math.sqrt(spread[0] ** 2 + spread[1] ** 2 / size)
        if size == e.examples_per_user:
            units = x.mean(axis=1)  # always all of them, hence always the same mean
    theta = np.zeros(e.dimension, dtype=np.float32)
    scale = setting.noise_multiplier * clip
    for _ in range(e.steps):
        # As many as independent coins would give, and each set of that size equally likely: the same as the coins.
        count = rng.binomial(len(units), setting.sample_rate)
        drawn = rng.choice(len(units), count, replace=False, shuffle=False)
        gradients = theta - (units[drawn] if units.ndim == 2 else _means(units, drawn, size, rng))  # [count, d]
        norms = np.sqrt(np.einsum("ij,ij->i", gradients, gradients))
        factors = np.minimum(1.0, clip / np.maximum(norms, 1e-12)).astype(np.float32)
        noisy = factors @ gradients + scale * rng.standard_normal(e.dimension, dtype=np.float32)
        # By the expected number, which is public; the drawn one is not.
        theta -= np.float32(e.learning_rate / setting.expected_units) * noisy.astype(np.float32)
    return theta


def _kept(x: Array, cap: int, rng: np.random.Generator) -> Array:
    """`cap` examples of every user, chosen once: `[N * cap, d]`."""
    users, owned, dimension = x.shape
    if cap == owned:
        return x.reshape(-1, dimension)
    order = rng.random((users, owned)).argpartition(cap - 1, axis=1)[:, :cap]
    return x[np.arange(users)[:, None], order].reshape(-1, dimension)


def _means(x: Array, drawn: npt.NDArray[np.int64], size: int, rng: np.random.Generator) -> Array:
    """The mean of `size` examples of every drawn user, chosen afresh: `[count, d]`."""
    owned = x.shape[1]
    order = rng.random((len(drawn), owned)).argpartition(min(size, owned - 1), axis=1)[:, :size]
    mean: Array = x[drawn[:, None], order].mean(axis=1)
    return mean
