"""Words become sizes and sets: exact, uniform, never too often, and the same on every machine."""

from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from draws import RARE, p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastclip.sampling import PoissonSampler
from fastclip.sampling.secret import Purpose, Secret
from fastclip.sampling.words import Words, binomial_thresholds, ranges


def words(draw=0, key=bytes(range(32))):
    return Words(key, draw)


def test_words_are_uniform_in_every_bit_and_new_in_every_draw():
    drawn = [words(draw).take(4096) for draw in range(2)]
    bits = np.unpackbits(drawn[0].view(np.uint8).reshape(4096, 8), axis=1).sum(0, dtype=np.int64)
    assert p_value((bits - 2048) / 32).min() * 64 > RARE
    assert not np.intersect1d(*drawn).size
    # RFC 8439's test vector: the keystream of an all-zero key and nonce begins so.
    assert Words(bytes(32), 0).take(1)[0] == int.from_bytes(bytes.fromhex("76b8e0ada0f13d90"), "little")


def test_no_two_purposes_or_draws_share_words():
    secret = Secret(seed=1)
    streams = [secret.words(purpose, draw).take(64) for purpose in Purpose for draw in (0, 1, 2**40)]
    assert len(np.unique(np.concatenate(streams))) == 64 * len(streams)
    assert "hidden" in repr(secret) and secret._key.hex() not in repr(secret)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    rate=st.floats(1e-9, 1.0) | st.sampled_from([5e-324, 1e-30, 1 / 3, 0.5, 1 - 2**-53, 1.0]),
)
def test_thresholds_are_the_exact_distribution_rounded_towards_small_sizes(count, rate):
    lowest, thresholds = binomial_thresholds(count, rate)
    q = Fraction(rate)
    exact = [comb(count, k) * q**k * (1 - q) ** (count - k) for k in range(count + 1)]
    # Sizes outside the table are negligible.
    assert sum(exact[:lowest]) + sum(exact[lowest + len(thresholds) :]) < Fraction(1, 2**200)
    at_most = sum(exact[:lowest], Fraction(0))
    for k, threshold in enumerate(thresholds[:-1]):
        at_most += exact[lowest + k]
        assert threshold == 2**128 or 1 < threshold + 1 - 2**128 * at_most < 4
    assert thresholds[-1] == 2**128
    below = [0] * lowest + list(thresholds) + [2**128] * (count - lowest - len(thresholds))
    mean = sum(1 - Fraction(threshold, 2**128) for threshold in below[:count])
    assert mean <= count * q
    assert mean > count * q - Fraction(count * 4, 2**128)


@pytest.mark.parametrize(("count", "rate"), [(10**6, 1e-3), (50_000_000, 2e-5), (100_000, 0.5), (10**5, 0.999)])
def test_thresholds_of_large_populations_agree_with_scipy(count, rate):
    lowest, thresholds = binomial_thresholds(count, rate)
    sizes = lowest + np.arange(len(thresholds))
    np.testing.assert_allclose([t / 2**128 for t in thresholds], stats.binom.cdf(sizes, count, rate), atol=1e-12)
    assert stats.binom.cdf(lowest - 1, count, rate) < 1e-50
    assert stats.binom.sf(sizes[-1], count, rate) < 1e-50


def test_a_size_turns_exactly_at_its_threshold(monkeypatch):
    lowest, thresholds = binomial_thresholds(10, 1 / 3)
    taken = []
    monkeypatch.setattr(Words, "take", lambda self, count: np.array(taken, dtype=np.uint64))
    for k, threshold in enumerate(thresholds[:-1]):
        for word, size in ((threshold - 1, lowest + k), (threshold, lowest + k + 1)):
            taken[:] = [word % 2**64, word >> 64]
            assert words().binomial(10, 1 / 3) == size


def test_sizes_follow_the_binomial_law():
    sampler = PoissonSampler(20, steps=20_000, sample_rate=0.3, seed=4)
    sizes = np.bincount([len(drawn) for drawn in sampler], minlength=21)
    expected = 20_000 * stats.binom.pmf(np.arange(21), 20, 0.3)
    likely = expected > 5
    merged = [np.append(x[likely], x[~likely].sum()) for x in (sizes, expected)]
    assert stats.chisquare(*merged).pvalue > RARE


def test_all_sets_of_units_are_as_likely_as_independent_coins_make_them():
    sampler = PoissonSampler(5, steps=20_000, sample_rate=0.4, seed=9)
    seen = Counter(tuple(drawn) for drawn in sampler)
    sets = [subset for size in range(6) for subset in combinations(range(5), size)]
    expected = [20_000 * 0.4 ** len(subset) * 0.6 ** (5 - len(subset)) for subset in sets]
    assert stats.chisquare([seen[subset] for subset in sets], expected).pvalue > RARE


def test_places_leave_out_the_words_that_would_favour_some(monkeypatch):
    top = 2**64 - 1
    taken = np.array([top, top - 1, 3, top, top, top], dtype=np.uint64)
    monkeypatch.setattr(Words, "take", lambda self, count: taken[:count])
    counts = np.array([3, 3, 3, 4, 1, 2**62 + 1])
    places, even = words()._places(counts)
    # 2^64 = 1 mod 3, = 0 mod 4 and 1, and holds 2^62 + 1 three times.
    assert even.tolist() == [False, True, True, True, True, False]
    assert places[even].tolist() == [2, 0, 3, 0]


# 0 sends every row through the search, a large one through the marks.
BOTH = pytest.mark.parametrize("dense", [0, 10**9])


@BOTH
@pytest.mark.parametrize("size", [1, 2, 4])
def test_subsets_are_uniform(monkeypatch, dense, size):
    monkeypatch.setattr("fastclip.sampling.words._DENSE", dense)
    stream = words(7)
    rows = 6000
    places = stream.subsets(np.full(rows, 5), np.full(rows, size)).reshape(rows, size) - 5 * np.arange(rows)[:, None]
    seen = Counter(map(tuple, places.tolist()))
    assert set(seen) == set(combinations(range(5), size))
    assert stats.chisquare(list(seen.values())).pvalue > RARE
    after = Counter(zip(places[:-1, 0].tolist(), places[1:, 0].tolist(), strict=True))
    first = np.bincount(places[:, 0], minlength=5) / rows
    table = np.array([[after[a, b] for b in range(5) if first[b]] for a in range(5) if first[a]])
    assert stats.chi2_contingency(table).pvalue > RARE


@settings(deadline=None)
@given(data=st.data(), dense=st.sampled_from([0, 1, 16, 10**9]))
def test_subsets_stay_in_their_rows_and_are_whole(data, dense):
    counts = data.draw(st.lists(st.integers(1, 60), max_size=12))
    sizes = [data.draw(st.integers(0, count)) for count in counts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastclip.sampling.words._DENSE", dense)
        places = words(1).subsets(np.array(counts, dtype=np.int64), np.array(sizes, dtype=np.int64))
    assert places.tolist() == sorted(set(places.tolist()))
    edges = np.concatenate([[0], np.cumsum(counts)])
    assert np.histogram(places, edges)[0].tolist() == sizes if counts else not len(places)


def test_large_subsets_of_few_and_many():
    stream = words(3)
    for count, size in ((50_000_000, 1000), (100_000, 60_000), (2**40, 50)):
        chosen = stream.subset(count, size)
        assert len(np.unique(chosen)) == size and chosen[0] >= 0 and chosen[-1] < count
        z = (chosen.mean() / count - 0.5) * np.sqrt(12 * size)
        assert p_value(z) > RARE


def test_ranges_follow_each_other():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.array([], dtype=np.int64), np.array([], dtype=np.int64)).tolist() == []


def test_seeded_draws_stay_what_they_were():
    assert list(PoissonSampler(12, steps=2, sample_rate=0.5, seed=0)) == [[2, 4, 6], [4, 7]]
