"""User-level epsilon where batches have a fixed size instead of being Poisson draws.

A step takes B of the N examples, uniformly and without replacement. Of a user who owns K of them, Hypergeometric(N, K,
B) many are drawn; without the user, others take their places, so that each drawn one moves the sum by up to 2 C. With
C = 1 a step is dominated, in both directions, by the pair

    P = sum_i Hypergeometric(N, K, B)(i) N(2 i, sigma^2)     and     Q = N(0, sigma^2),

the mixture of Choquette-Choo, Ganesh, Steinke and Thakurta, arXiv 2310.15526, corollary 4.7, composed like the ones of
`fastclip.accounting.pld` and with the same accuracy. N and B are public, and N counts the user's examples.

Batches of a fixed size from a shuffled epoch are another mechanism, for which this is no bound.
"""

import math

import numpy as np

from fastclip.accounting.accountants import StepEvent, check_count, check_delta
from fastclip.accounting.mixture import TAIL_MASS, Mixture
from fastclip.accounting.pld import LARGEST_NOISE, ROUNDING, SMALLEST_NOISE, epsilon_at, on_grid, settle


class _Hypergeometric(Mixture):
    """In units of two clipping norms, so that shifts are whole numbers again."""

    def __init__(self, noise_multiplier: float, num_examples: int, batch_size: int, examples: int) -> None:
        # From ratios of neighbouring weights: differences of logarithms of factorials would lose a part in 1e11, which
        # many steps multiply.
        drawn = np.arange(examples, dtype=np.float64)
        log_never = float(np.log1p(-batch_size / (num_examples - drawn)).sum())
        left = np.maximum(batch_size - drawn, 0.0)
        with np.errstate(divide="ignore"):
            ratios = np.log((examples - drawn) * left / ((drawn + 1) * (num_examples - examples - left + 1)))
        log_weights = log_never + np.cumsum(ratios)
        beyond = np.cumsum(np.exp(log_weights)[::-1])[::-1]
        self._set(noise_multiplier / 2, log_never, log_weights[: max(1, int(np.count_nonzero(beyond > TAIL_MASS)))])


def fixed_size_epsilon(
    noise_multiplier: float,
    num_examples: int,
    batch_size: int,
    steps: int,
    delta: float,
    examples_per_user: int = 1,
) -> float:
    """Epsilon at `delta` for removing or adding a user, after `steps` steps on batches of exactly `batch_size` examples.

    noise_multiplier: sigma >= 0, the noise over the clipping norm C of one example. num_examples: N, public, with the
    user's. batch_size: B, at most N. steps: >= 0. examples_per_user: K >= 1, at most N.

    An upper bound; the module has the formula. inf without noise, or with so little that one step may cost e^1000.
    Raises ValueError for bad input.
    """
    # The checks of a step: its rate is the chance of an example to be drawn.
    check_count("num_examples", num_examples, least=1)
    check_count("batch_size", batch_size, least=1)
    check_count("examples_per_user", examples_per_user, least=1)
    if batch_size + examples_per_user > num_examples:
        raise ValueError(
            f"batch_size={batch_size!r} does not fit without a user with examples_per_user={examples_per_user!r} of "
            f"num_examples={num_examples!r}; give fewer, or take all examples at every step, which is Poisson sampling "
            "at rate 1"
        )
    event = StepEvent(noise_multiplier, batch_size / num_examples, steps)
    check_delta("delta", delta)
    if not steps:
        return 0.0
    if not event.noise_multiplier:
        return math.inf
    users = int(examples_per_user)
    if steps * users * event.sample_rate <= delta:
        return 0.0
    left = delta - ROUNDING * steps
    mixture = _Hypergeometric(min(event.noise_multiplier, LARGEST_NOISE), int(num_examples), int(batch_size), users)
    if left <= 0 or mixture.sigma < SMALLEST_NOISE * mixture.meeting:
        return math.inf

    def epsilon(interval: float) -> float:
        one = on_grid(mixture, interval)
        return epsilon_at(one.self_compose(int(steps)) if steps > 1 else one, left)

    return settle(epsilon, mixture.losses("remove")[1])[0]
