"""The hockey-stick divergences of one step, in closed form up to one well-conditioned root.

With sensitivity 1 and noise sigma, let w_i be the probability that i examples of the unit are in the draw. The step
is dominated by P = sum_i w_i N(i, sigma^2) against Q = N(0, sigma^2) (removing the unit), and by (Q, P) (adding it).
The log likelihood ratio at output x,

    l(x) = log( w_0 + exp(m(x)) ),     m(x) = log sum_{i >= 1} w_i exp((i x - i^2 / 2) / sigma^2),

grows with x, so that both divergences are differences of tail masses at the x where l(x) is the wanted loss. m is
convex with slope between 1 / sigma^2 and K / sigma^2, so Newton's method from the right finds that x to full
precision, for all losses at once; dp_accounting finds them one by one, and for K > 1 only to 1e-6.
"""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special, stats

FloatArray = npt.NDArray[np.float64]
Direction = Literal["remove", "add"]

# Tails are cut where they hold less than this mass, which lies TAIL standard deviations out in a Gaussian.
TAIL_MASS = 1e-23
TAIL = 10.0


class Mixture:
    """The dominating pair of one step; `sample_rate` below 1.

    noise_multiplier: sigma > 0. sample_rate: q in (0, 1). examples: K >= 1, of which Binomial(K, q) meet in a draw.
    A subclass with another distribution of how many meet calls `_set` itself.
    """

    def __init__(self, noise_multiplier: float, sample_rate: float, examples: int) -> None:
        # What lies beyond `meeting` has mass below TAIL_MASS, far less than the rounding that is charged.
        most = meeting(sample_rate, examples)
        drawn = np.arange(1, most + 1, dtype=np.float64)
        log_weights: FloatArray = stats.binom.logpmf(drawn, examples, sample_rate)
        self._set(noise_multiplier, examples * math.log1p(-sample_rate), log_weights)

    def _set(self, sigma: float, log_never: float, log_weights: FloatArray) -> None:
        """log_never: log w_0. log_weights: of 1, 2, ..., [meeting]."""
        self.sigma = sigma
        self.meeting = len(log_weights)
        self.drawn = np.arange(1, self.meeting + 1, dtype=np.float64)
        self.log_never = log_never
        self.log_weights = log_weights

    def losses(self, direction: Direction) -> tuple[float, float]:
        """The smallest and the largest privacy loss that a grid has to reach in that direction."""
        left = -TAIL * self.sigma
        if direction == "add":
            low, high = -self._loss(np.array([-left, left]))
        else:
            low, high = self._loss(np.array([left, self._right_end()]))
        return float(low), float(high)

    def _right_end(self) -> float:
        """An output beyond which P has at most 2 * TAIL_MASS."""
        low, high = 0.0, self.meeting + TAIL * self.sigma
        while high - low > 0.01 * self.sigma:
            middle = (low + high) / 2
            if self._mass_above(np.array([middle]))[0] > 2 * TAIL_MASS:
                low = middle
            else:
                high = middle
        return high

    def divergences(self, epsilons: FloatArray, direction: Direction) -> FloatArray:
        """delta(epsilon) = sup over events of P - e^epsilon Q ("remove") or Q - e^epsilon P ("add"); [n] to [n]."""
        if direction == "remove":
            deltas = -np.expm1(np.minimum(epsilons, 0.0))
            inside = epsilons > self.log_never
            x = self._output_at(epsilons[inside])
            deltas[inside] = self._mass_above(x) - np.exp(epsilons[inside] + special.log_ndtr(-x / self.sigma))
        else:
            deltas = np.zeros_like(epsilons)
            inside = -epsilons > self.log_never
            x = self._output_at(-epsilons[inside])
            deltas[inside] = special.ndtr(x / self.sigma) - np.exp(epsilons[inside] + self._log_mass_below(x))
        return np.clip(deltas, 0.0, 1.0)

    def _loss(self, x: FloatArray) -> FloatArray:
        return np.logaddexp(self.log_never, self._drawn_loss(x)[0])

    def _drawn_loss(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """m(x) and its slope."""
        terms = self.log_weights + (x[:, None] - self.drawn / 2) * self.drawn / self.sigma**2
        largest = terms.max(axis=1)
        shares = np.exp(terms - largest[:, None])
        total = shares.sum(axis=1)
        return largest + np.log(total), shares @ self.drawn / (total * self.sigma**2)

    def _mass_above(self, x: FloatArray) -> FloatArray:
        """P(output > x)."""
        never = math.exp(self.log_never) * special.ndtr(-x / self.sigma)
        mass: FloatArray = never + special.ndtr((self.drawn - x[:, None]) / self.sigma) @ np.exp(self.log_weights)
        return mass

    def _log_mass_below(self, x: FloatArray) -> FloatArray:
        """log P(output < x): it gets multiplied by e^epsilon, which alone may overflow."""
        drawn = special.logsumexp(self.log_weights + special.log_ndtr((x[:, None] - self.drawn) / self.sigma), axis=1)
        mass: FloatArray = np.logaddexp(self.log_never + special.log_ndtr(x / self.sigma), drawn)
        return mass

    def _output_at(self, losses: FloatArray) -> FloatArray:
        """The x where l(x) is the loss; every loss above log w_0. [n] to [n]."""
        above = losses - self.log_never
        wanted = losses + np.log(-np.expm1(-above))
        # Each term of m alone crosses `wanted` to the right of the root.
        crossings = self.sigma**2 * (wanted[:, None] - self.log_weights) / self.drawn + self.drawn / 2
        x: FloatArray = crossings.min(axis=1)
        for _ in range(100):
            value, slope = self._drawn_loss(x)
            step = (value - wanted) / slope
            x = x - step
            if np.all(np.abs(step) <= 1e-13 * (self.sigma + np.abs(x))):
                break
        return x


def meeting(sample_rate: float, examples: int) -> int:
    """How many of a unit's examples can meet in one draw, with all but TAIL_MASS of the probability; at least 1."""
    beyond = stats.binom.sf(np.arange(1, examples + 1), examples, sample_rate)
    return int(1 + np.count_nonzero(beyond > TAIL_MASS))
