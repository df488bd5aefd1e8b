"""Privacy random variables, by the package prv_accountant: a second opinion on `pld` with a proven error.

The privacy loss of one step is a random variable; losses of steps add up. It is put on a grid with its mean kept, and
sums are made by Fourier transforms (Gopi, Lee and Wutschitz, arXiv 2106.02848). Their theorem 5.5 bounds the error of
epsilon and of delta by what is asked for, here

    eps_error = 0.01   and   delta_error = delta / 1000,

and the upper end of the interval, about 0.01 above the truth, is returned. The grid and the domain of losses follow
from the two errors. Where they would need more than 2^21 points, or 2^23 for all kinds of steps together, eps_error
is raised to what those points allow.

What the package leaves out is added here:

- It knows the loss of removing a unit alone. Adding one is composed as well, and the larger epsilon counts.
- It finds the mean of each loss by an adaptive integral whose error nothing checks, which steps multiply, and which
  fails outright where losses are large. The mean comes from Gaussian quadrature here, to about 1e-15.
- Rounding is charged to delta at 1e-15 a step; sums of tails were off by up to 7e-16 a step in four settings with up
  to 1e5 steps. A delta below that is not certified: epsilon is inf.

Where one step or all of them can cost more than about e^600, epsilon is inf.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import special

from fastclip.accounting.accountants import Accountant, StepEvent, register
from fastclip.accounting.rdp import renyi_epsilon

FloatArray = npt.NDArray[np.float64]
Direction = Literal["remove", "add"]

_EPS_ERROR = 0.01
_DELTA_SHARE = 1e-3
_MOST_POINTS = 2**21
_MOST_POINTS_OF_ALL = 2**23
_LARGEST_LOSS = 600.0
_ROUNDING = 1e-15
_LARGEST_NOISE = 1e100
_SMALLEST_RATE = 1e-100
# The package's search for epsilon fails where delta is nearly 1.
_LARGEST_DELTA = 0.5


@dataclass(frozen=True)
class _Loss:
    """The privacy loss of one step with sensitivity 1: log(1 - q + q e^((x - 1/2) / sigma^2)) of its output x.

    Removing a unit, x comes from (1 - q) N(0, sigma^2) + q N(1, sigma^2). Adding one, the loss has the other sign and x
    comes from N(0, sigma^2).
    """

    step: StepEvent
    direction: Direction

    def output_at(self, losses: FloatArray) -> FloatArray:
        """The x with that loss, -inf or inf where there is none; any shape to the same."""
        rate = self.step.sample_rate
        signed = -losses if self.direction == "add" else losses
        if rate == 1:
            inner = signed
        else:
            # Each form of (e^loss - (1 - q)) / q is precise where the other cancels.
            far = (np.exp(np.minimum(signed, 0.0)) - (1 - rate)) / rate
            with np.errstate(divide="ignore", over="ignore"):
                near = np.expm1(signed) / rate + 1
                inner = np.log(np.maximum(np.where(signed < -1, far, near), 0.0))
        return self.step.noise_multiplier**2 * inner + 0.5

    def cdf(self, losses: npt.ArrayLike) -> FloatArray:
        """P(loss <= each); any shape to the same."""
        sigma, rate = self.step.noise_multiplier, self.step.sample_rate
        x = self.output_at(np.asarray(losses, dtype=np.float64))
        if self.direction == "add":
            return np.asarray(special.ndtr(-x / sigma))
        return np.asarray((1 - rate) * special.ndtr(x / sigma) + rate * special.ndtr((x - 1) / sigma))


@dataclass(frozen=True)
class _Truncated:
    """A loss given that it lies in [low, high], in the form that the package puts on its grid."""

    loss: _Loss
    low: float
    high: float
    # The mass of an infinite loss.
    pm_inf = 0.0

    def probability(self, a: npt.ArrayLike, b: npt.ArrayLike) -> FloatArray:
        """P(a < loss <= b)."""
        inside = self._mass(np.array(self.low), np.array(self.high))
        return self._mass(np.clip(a, self.low, self.high), np.clip(b, self.low, self.high)) / inside

    def _mass(self, a: FloatArray, b: FloatArray) -> FloatArray:
        return self.loss.cdf(b) - self.loss.cdf(a)

    def mean(self) -> float:
        """By Gaussian quadrature on pieces of a twentieth of a standard deviation, up to 13 of them out."""
        sigma, rate = self.loss.step.noise_multiplier, self.loss.step.sample_rate
        ends = np.sort(self.loss.output_at(np.array([self.low, self.high])))
        edges = np.linspace(max(ends[0], -13 * sigma), min(ends[1], 1 + 13 * sigma), math.ceil(20 * (26 + 1 / sigma)))
        half = (edges[1] - edges[0]) / 2
        nodes, weights = np.polynomial.legendre.leggauss(16)
        x = (edges[:-1, None] + half * (1 + nodes)).ravel()
        drawn = (x - 0.5) / sigma**2
        plain = np.exp(-((x / sigma) ** 2) / 2)
        if self.loss.direction == "remove":
            plain = (1 - rate) * plain + rate * np.exp(-(((x - 1) / sigma) ** 2) / 2)
        density = np.tile(half * weights, len(edges) - 1) * plain
        # A logarithm close to 0 is taken of what differs from 1.
        near = np.log1p(rate * np.expm1(np.clip(drawn, -1, 1)))
        far = drawn if rate == 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + drawn)
        mean = float(density @ np.where(np.abs(drawn) < 1, near, far) / density.sum())
        return -mean if self.loss.direction == "add" else mean


def _epsilon(steps: Sequence[StepEvent], delta: float, examples_per_user: int, adjacency: str) -> float:
    if examples_per_user > 1:
        raise ValueError(
            f"examples_per_user={examples_per_user!r} is beyond this accountant, which has no loss for users with "
            'several examples; use accountant="pld"'
        )
    certified = min(delta, _LARGEST_DELTA) - _ROUNDING * sum(step.count for step in steps)
    if certified <= 0:
        return math.inf
    merged = [_in_range(step) for step in steps]
    removing = _upper_end(merged, certified, "remove", _EPS_ERROR)
    # Adding mostly costs less by far: then a coarse bound is enough to see it.
    adding = _upper_end(merged, certified, "add", 10 * _EPS_ERROR)
    if adding > removing:
        adding = _upper_end(merged, certified, "add", _EPS_ERROR)
    return max(0.0, removing, adding)


def _in_range(step: StepEvent) -> StepEvent:
    """The same cost, or where squares would leave the range of doubles, a little more."""
    noise, rate = min(step.noise_multiplier, _LARGEST_NOISE), max(step.sample_rate, _SMALLEST_RATE)
    if rate == 1:
        # Without sampling, the composition is itself a Gaussian mechanism with less noise.
        return StepEvent(noise / math.sqrt(step.count), rate)
    return StepEvent(noise, rate, step.count)


def _upper_end(steps: Sequence[StepEvent], delta: float, direction: Direction, eps_error: float) -> float:
    composers, discretisers, domains = map(_package, ("composers", "discretisers", "domain"))
    counts = [step.count for step in steps]
    delta_error = _DELTA_SHARE * delta
    # Remark 5.6: what lies beyond, of one step and of all together, has to be within these deltas.
    largest, _ = renyi_epsilon(steps, delta_error / 4)
    alone = [renyi_epsilon([replace(step, count=1)], delta_error / 8 / sum(counts))[0] for step in steps]
    largest = max(largest, *alone)
    # Theorem 5.5: points no further apart than eps_error times this, up to losses of max(largest, eps_error) + 3.
    closeness = 1 / math.sqrt(sum(counts) / 2 * math.log(12 / delta_error))
    points = min(_MOST_POINTS, _MOST_POINTS_OF_ALL / len(steps))
    if closeness * points <= 2:
        many = f"{len(steps)} kinds of steps, {sum(counts)} in all"
        raise ValueError(f'accountant="prv" cannot hold {many}; use accountant="pld"')
    if largest + 3 > _LARGEST_LOSS:
        return math.inf
    eps_error = max(eps_error, 2 * (largest + 3) / (closeness * points))
    if eps_error > largest:
        eps_error = max(eps_error, 6 / (closeness * points - 2))
    reach = max(largest, eps_error) + 3
    domain = domains.Domain.create_aligned(-reach, reach, closeness * eps_error)
    ends = float(domain.t_min()), float(domain.t_max())
    losses = [_Truncated(_Loss(step, direction), *ends) for step in steps]
    try:
        on_grid = [discretisers.CellCentred().discretise(loss, domain) for loss in losses]
        together = composers.Heterogeneous(on_grid).compute_composition(counts)
        return float(together.compute_epsilon(delta, delta_error, eps_error)[2])
    except (RuntimeError, ValueError) as failure:
        raise ValueError(
            f'accountant="prv" fails on delta={delta!r} and {len(steps)} kinds of steps (prv_accountant: {failure}); '
            'use accountant="pld"'
        ) from failure


def _package(part: str) -> Any:
    try:
        return importlib.import_module(f"prv_accountant.{part}")
    except ImportError:
        raise ImportError('accountant="prv" needs a package: pip install "prv_accountant>=0.2"') from None


def _library() -> str:
    try:
        return f"prv-accountant {version('prv-accountant')}"
    except PackageNotFoundError:
        return "prv-accountant (not installed)"


register(Accountant("prv", _library(), rigorous=True, epsilon=_epsilon))
