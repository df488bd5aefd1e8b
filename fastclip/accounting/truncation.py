"""How large a physical batch has to be for cut draws to cost no privacy.

Where memory limits a draw to max_batch units, the ones beyond are left out, chosen uniformly at random. A cut shows
something of everybody else in the draw, and costs dearly where it is likely: on a data set of 67,349 with expected
draws of 1,024 and noise for epsilon 3, `get_epsilon` with `max_batch` gives 18.2 for 1,024, 5.9 for 1,127 and 3.0
again for 1,228. Draws that are never cut, in one piece or split over several physical batches, need none of this.
"""

import math

from fastclip.accounting.accountants import StepEvent, check_count

# Standard deviations of a Poisson draw above its mean: beyond lies a probability of about 1e-10.
_DEVIATIONS = 6.5
# Where the probability of a cut is charged to delta, it has to be far below delta e^-epsilon: here it is about 1e-18.
_DEVIATIONS_OF_USERS = 9.0


def safe_max_batch(num_units: int, sample_rate: float, examples_per_user: int | None = None) -> int:
    """A max_batch that costs no epsilon to speak of: B + 6.5 sqrt(B), rounded up, with B = N q; at most N.

    num_units: N >= 1. sample_rate: q in (0, 1]. examples_per_user: K where users have several examples, which are
    sampled, and num_units counts examples; then it is B + 9 sqrt(B), because the cuts of several examples at once are
    accounted for more crudely. Raises ValueError for bad input.
    """
    check_count("num_units", num_units, least=1)
    expected = int(num_units) * StepEvent(1.0, sample_rate).sample_rate
    deviations = _DEVIATIONS
    if examples_per_user is not None:
        check_count("examples_per_user", examples_per_user, least=1)
        deviations = _DEVIATIONS_OF_USERS if examples_per_user > 1 else _DEVIATIONS
    return min(int(num_units), max(1, math.ceil(expected + deviations * math.sqrt(expected))))
