"""From secret words to draws: how many units a Poisson draw has, and which.

Independent coins with probability q give a set whose size is Binomial(N, q) and which, given its size, is uniform
among all sets of that size; and the other way round (Lemma 1 of Chua et al., arXiv 2406.17298). Drawing the size and
then the set costs time in the size of the draw, where coins would cost time in the number of units.

Guarantees:

- A size is where a 128-bit word falls among the thresholds of `binomial_thresholds`. These come from integer
  arithmetic in which q is the exact value of the float. Each lies 1 to 2 above the exact 2^128 P(X <= k), so that the mean
  size is below N q and no unit is drawn more often than q. The law of a draw is within 2^-127 times the number of
  possible sizes of the Poisson draw's, in total variation (for a million units: 2^-112 or less). In delta that is at
  most 1 + e^epsilon times as much a step.
- A set is exactly uniform: words that would favour some places are thrown away, and so are places drawn twice.
- A draw's words are ChaCha20's keystream (RFC 8439) for one nonce, which holds the draw's id and what the words are for,
  and which comes once under one key.
"""

from bisect import bisect_right
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

Int64s = npt.NDArray[np.int64]

_BITS = 128
# The relative precision of the probabilities behind the thresholds: what they lose in adding up stays below a threshold.
_GUARDED = 256
# From a sixteenth of the places on, marking them all is quicker than searching those that were chosen.
_DENSE = 16


@lru_cache(maxsize=16)
def binomial_thresholds(count: int, probability: float) -> tuple[int, tuple[int, ...]]:
    """(lowest, thresholds): the size lowest + k or less comes up when a 128-bit word is below thresholds[k].

    Sizes below `lowest` and above the last have probabilities below 2^-200 together. The last threshold is 2^128.
    """
    exact = Fraction(probability)
    won, lost = exact.numerator, exact.denominator - exact.numerator
    if not lost:
        return count, (2**_BITS,)
    mode = min(int((count + 1) * exact), count)
    # Probabilities relative to the most likely size's, both ways until they round to nothing. Every division loses
    # less than 1, and the ratios are at most 1, so that after w sizes the sum is less than w^2 short of 2^256 or more.
    above = [2**_GUARDED]
    for size in range(mode, count):
        above.append(above[-1] * (count - size) * won // ((size + 1) * lost))
        if not above[-1]:
            break
    below = [2**_GUARDED]
    for size in range(mode, 0, -1):
        below.append(below[-1] * size * lost // ((count - size + 1) * won))
        if not below[-1]:
            break
    relative = below[:0:-1] + above
    total, sum_, thresholds = sum(relative), 0, []
    for share in relative:
        sum_ += share
        # Rounded up and one more, for what was lost: small sizes come up a little more often than they should.
        thresholds.append(min((sum_ << _BITS) // total + 2, 2**_BITS))
    thresholds[-1] = 2**_BITS
    return mode - len(below) + 1, tuple(thresholds)


def ranges(starts: Int64s, lengths: Int64s) -> Int64s:
    """start, start + 1, ..., start + length - 1 of every range, one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


class Words:
    """The 64-bit words of one nonce, each of them taken once."""

    def __init__(self, key: bytes, nonce: int) -> None:
        # The first half is ChaCha20's block counter, which must start at 0; the second half is the nonce.
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(8) + nonce.to_bytes(8, "little")), mode=None).encryptor()

    def take(self, count: int) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")

    def binomial(self, count: int, probability: float) -> int:
        """How many of `count` independent coins come up, each with `probability` in (0, 1]."""
        lowest, thresholds = binomial_thresholds(count, probability)
        low, high = self.take(2).tolist()
        return lowest + bisect_right(thresholds, low + (high << 64))

    def subset(self, count: int, size: int) -> Int64s:
        """`size` different places in [0, count), every such set as likely as any other; sorted."""
        return self.subsets(np.array([count]), np.array([size]))

    def subsets(self, counts: Int64s, sizes: Int64s) -> Int64s:
        """Of each of several rows a uniform subset, independent of the other rows'.

        counts: int64 [R], places in each row, 1 or more. sizes: int64 [R], how many to choose, at most as many.
        Returns places as if the rows stood one after the other, sorted: row r's lie in counts[:r].sum() + [0, counts[r]).
        """
        starts = np.cumsum(counts) - counts
        dense = _DENSE * sizes > counts
        parts = [
            chosen(counts[rows], sizes[rows], starts[rows])
            for rows, chosen in ((dense, self._dense), (~dense, self._sparse))
        ]
        return np.sort(np.concatenate(parts), kind="stable")

    # Both do the same in each row: take places until so many different ones have come. No round takes more words than
    # places are missing, so that none that comes is left out for being too many.

    def _sparse(self, counts: Int64s, sizes: Int64s, starts: Int64s) -> Int64s:
        """Time in the number chosen; what was chosen before is searched."""
        chosen = np.empty(0, dtype=np.int64)
        rows = np.flatnonzero(sizes)
        missing = sizes[rows]
        while len(rows):
            owner = np.repeat(rows, missing)
            places, even = self._places(counts[owner])
            fresh = np.unique((starts[owner] + places)[even])
            if len(chosen):
                at = np.minimum(np.searchsorted(chosen, fresh), len(chosen) - 1)
                fresh = fresh[chosen[at] != fresh]
            # Two sorted runs, which this kind of sort merges.
            chosen = np.sort(np.concatenate([chosen, fresh]), kind="stable")
            first = np.searchsorted(chosen, starts[rows])
            missing = sizes[rows] - (np.searchsorted(chosen, starts[rows] + counts[rows]) - first)
            rows, missing = rows[missing > 0], missing[missing > 0]
        return chosen

    def _dense(self, counts: Int64s, sizes: Int64s, starts: Int64s) -> Int64s:
        """Time in the number of places; what was chosen before is marked."""
        if not len(counts):
            return np.empty(0, dtype=np.int64)
        # More than half are chosen by what stays out, so that at least every other word finds a new place.
        inverted = 2 * sizes > counts
        wanted = np.where(inverted, counts - sizes, sizes)
        ends = np.cumsum(counts)
        marked = np.zeros(ends[-1], dtype=bool)
        missing = wanted
        while missing.any():
            owner = np.repeat(np.arange(len(counts)), missing)
            places, even = self._places(counts[owner])
            marked[((ends - counts)[owner] + places)[even]] = True
            missing = wanted - np.add.reduceat(marked, ends - counts, dtype=np.int64)
        marked ^= np.repeat(inverted, counts)
        return np.flatnonzero(marked) + np.repeat(starts - (ends - counts), sizes)

    def _places(self, counts: Int64s) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """A place in [0, count) for each count, and which of them to use: those are uniform."""
        words, span = self.take(len(counts)), counts.view(np.uint64)
        places = words % span
        # The last, incomplete run of `span` words would favour small places.
        return places.view(np.int64), words - places <= np.uint64(0) - span
