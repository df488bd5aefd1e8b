"""How far a sum of losses can be from its first-order Edgeworth expansion: the bounds behind the interval.

Two hold without conditions on characteristic functions: the one by Derumigny, Girard and Guyonvarch for equal summands,
and the Berry-Esseen inequality with the expansion's first term added. Both shrink with the root of the number of steps
and are far above the deltas of fine-tuning at every number that occurs there.
"""

import math

from scipy import special

from fastclip.accounting.moments import Law

# Berry-Esseen constants for equal summands (Shevtsova, arXiv 1111.6554) and for any (Shevtsova, Dokl. Math. 82, 2010).
_EQUAL, _UNEQUAL = 0.4748, 0.5600


def expansion_error(count: int, kurtosis: float, third: float, skewness: float, split: float = 0.1) -> float:
    """How far the distribution function of a sum of equal independent terms is from its first-order expansion, at most.

    Theorem A.3 of Derumigny, Girard and Guyonvarch, arXiv 2101.05780, without conditions on characteristic functions.
    count: terms, >= 1. Of one of them, centred and scaled to variance 1: kurtosis, E X^4; third, E |X|^3; skewness,
    E X^3. split: any number in (0, 1/3), where their proof divides an integral.
    """
    n, e, skew = float(count), split, abs(skewness)
    room = (1 - 3 * e) ** 2
    sum_of_both = third + 1  # E |X|^3 + E |X|, the latter at most 1
    p = 48 * e * math.sqrt(kurtosis / n) + 4 * e**2 * kurtosis / n + 32 * e * skew**2 / math.sqrt(kurtosis * n)
    p += 96 * math.sqrt(2 * e) * skew / (kurtosis * n) ** 0.25
    p += 16 * math.sqrt(2) * kurtosis**0.25 * skew * (e / math.sqrt(n)) ** 1.5
    e3 = math.exp(e**2 * (1 / 6 + 1 / (2 * room)))
    e2 = e3 * math.exp(e**2 * p / (288 * room))

    def moment(k: int) -> float:
        """The integral of t^k exp(-t^2 / 2) over t > 0."""
        return 2 ** ((k - 1) / 2) * math.gamma((k + 1) / 2)

    def above(x: float) -> float:
        """The incomplete gamma function: the integral of sqrt(u) exp(-u) over u > x."""
        return float(special.gamma(1.5) * special.gammaincc(1.5, x))

    bound = 0.1995 * sum_of_both / math.sqrt(n)
    bound += (0.031 * sum_of_both**2 + 0.327 * kurtosis * (1 / 12 + 1 / (4 * room)) + 0.054 * skew * sum_of_both) / n
    bound += (0.037 * e3 + 1.306 / 36 * (e2 - e3)) * skew**2 / n
    # What is left is of smaller order in n, and yet most of the bound at every n that occurs in training.
    bound += (14.1961 + 67.0415) * sum_of_both**4 / (16 * math.pi**4 * n**2)
    bound += 4.3394 * skew * sum_of_both**3 / (8 * math.pi**3 * n**2)
    small = skew / (6 * n**1.5) * moment(2) + (kurtosis / 24 + skew**2 / 36) / n**2 * moment(7)
    small += kurtosis * skew / (72 * n**2.5) * moment(8) + kurtosis**2 / (576 * n**3) * moment(9)
    product = e2 * (kurtosis / 12 + 1 / (4 * room) + p / (576 * room))
    small += 2 * room * product * (moment(9) / (8 * n**2) + skew * moment(8) / (12 * n**1.5))
    bound += 1.0253 / (2 * math.pi * room) * small
    end = 2 * math.sqrt(n) / sum_of_both
    start = min(math.sqrt(2 * e) * (n / kurtosis) ** 0.25, end)
    bound += skew / math.sqrt(n) * (above(start) - above(end))
    bound += 1.0253 * 2**2.5 * third / (3 * math.pi * math.sqrt(n)) * (above(start**2 / 8) - above(end**2 / 8))
    return bound


def law_error(law: Law, equal: bool) -> float:
    """D with |F - F_1| <= D for the distribution function of the sum and its first-order expansion."""
    if not law.cumulants[2:].any():
        return 0.0  # a Gaussian
    root = math.sqrt(law.terms)
    third, skewness = law.third / law.cumulants[1] ** 1.5, law.standardized(3)
    # The first term is largest at the mean.
    error = (_EQUAL if equal else _UNEQUAL) * third + abs(skewness) / (6 * math.sqrt(2 * math.pi))
    if equal:
        kurtosis = law.standardized(4) * law.terms + 3
        error = min(error, expansion_error(law.terms, kurtosis, third * root, skewness * root))
    return error
