"""What shuffled batches cost at the least: a lower bound that shows how wrong Poisson accounting of them can be.

Chua, Ghazi, Kamath, Kumar, Manurangsi, Sinha and Zhang, arXiv 2403.17673: cut a shuffled data set into T batches and
release T noisy sums, with zero-out adjacency. Let every example but one contribute -1, and the one either 1 or
nothing. Up to a shift that is known, the output is N(2 e_t, sigma^2 I) or N(e_t, sigma^2 I) with t uniform among the T
batches. For the event that some coordinate exceeds c,

    out(c; m) = 1 - Phi((c - m) / sigma) Phi(c / sigma)^(T - 1),

(epsilon, delta) can hold only if out(c; 2) <= e^epsilon out(c; 1) + delta. Every c gives a lower bound, and the
largest counts:

    epsilon >= max_c log( (out(c; 2) - delta) / out(c; 1) ).

This is no accountant and is not registered as one: it says what cannot hold, never what does.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from fastclip.accounting.accountants import check_count, check_delta, check_number

_POINTS = 2000
_SMALLEST_NOISE = 1e-9


def shuffle_lower_bound(noise_multiplier: float, steps_per_epoch: int, delta: float, epochs: int = 1) -> float:
    """No epsilon below the returned one holds at `delta` for steps over shuffled, fixed batches (zero-out adjacency).

    For comparison: what `get_epsilon` returns for the same steps, as though their batches were Poisson draws.

    noise_multiplier: sigma, at least 0; inf is returned for 0. steps_per_epoch: the number of batches that the data
    are cut into. delta: in (0, 1). epochs: at least 1. The bound is that of one epoch: whoever sees several sees the
    first, so that it holds for more as well, without growing with them.

    The formula is the module's. Raises ValueError for bad input.
    """
    check_number("noise_multiplier", noise_multiplier)
    if noise_multiplier < 0:
        raise ValueError(f"noise_multiplier={noise_multiplier!r} is negative; give 0 (no noise) or more")
    check_count("steps_per_epoch", steps_per_epoch, least=1)
    check_delta("delta", delta)
    check_count("epochs", epochs, least=1)
    # More noise costs less, so that this stays a lower bound; squares of its inverse stay in range.
    sigma, others = max(float(noise_multiplier), _SMALLEST_NOISE), int(steps_per_epoch) - 1
    if noise_multiplier == 0:
        return math.inf

    def bound(c: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """[n] to [n]; -inf where even all of the event's probability is within delta."""
        log_ratio = _log_out(c, 2.0, sigma, others) - _log_out(c, 1.0, sigma, others)
        log_spared = math.log(delta) - _log_out(c, 2.0, sigma, others)
        kept = -np.expm1(np.minimum(log_spared, 0.0))
        with np.errstate(divide="ignore"):
            return log_ratio + np.log(kept)

    # Beyond `high` no event is likelier than delta; below `low` all coordinates exceed c anyway.
    high = max(2 - sigma * stats.norm.ppf(delta / 2), -sigma * stats.norm.ppf(delta / 2 / max(others, 1)))
    low = min(1 - 10 * sigma, high)
    grid = np.linspace(low, high, _POINTS)
    values = bound(grid)
    best = int(np.argmax(values))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, _POINTS - 1)])
    finer = optimize.minimize_scalar(lambda c: -bound(np.array([c]))[0], bounds=around, method="bounded")
    return max(0.0, float(values[best]), -float(finer.fun))


def _log_out(c: npt.NDArray[np.float64], mean: float, sigma: float, others: int) -> npt.NDArray[np.float64]:
    """log P(some coordinate exceeds c), without the rounding that 1 - Phi Phi^(T - 1) has close to 0 or 1."""
    alone, other = special.log_ndtr(-(c - mean) / sigma), special.log_ndtr(-c / sigma)
    log_inside = special.log_ndtr((c - mean) / sigma) + others * special.log_ndtr(c / sigma)
    # Where a probability nears the smallest double, the sum over coordinates is exact, and never too small.
    log_sum = np.logaddexp(alone, math.log(others) + other) if others else alone
    out = -np.expm1(log_inside)
    log_out: npt.NDArray[np.float64] = np.where(out > 1e-200, np.log(np.maximum(out, 1e-200)), log_sum)
    return log_out
