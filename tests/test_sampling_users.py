"""Users: draws of whole users, examples of capped users, cut draws, and that accountants hear of what is drawn."""

import copy
import pickle
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from draws import RARE, Numbers, p_value, presence
from scipy import stats

import fastclip
from fastclip.accounting import get_epsilon
from fastclip.accounting.accountants import StepEvent, epsilon_of
from fastclip.sampling import ExamplePoissonSampler, PoissonLoader, PoissonSampler, UserPoissonSampler, safe_max_batch

USERS = ["a", "b", "a", "c", "b", "a", "d", "a", "c", "a"]


def test_drawn_users_give_all_their_examples_together():
    sampler = UserPoissonSampler(USERS, steps=300, sample_rate=0.5)
    assert (sampler.num_units, sampler.num_examples, sampler.expected_batch_size) == (4, 10, 2.0)
    owned = {0: [0, 2, 5, 7, 9], 1: [1, 4], 2: [3, 8], 3: [6]}
    seen = Counter()
    for indices in sampler:
        units = list(dict.fromkeys(sampler.unit_of(indices).tolist()))
        assert indices == [index for unit in units for index in owned[unit]]
        seen[tuple(units)] += 1
    # All 16 sets of users are equally likely.
    assert stats.chisquare(list(seen.values()) + [0] * (16 - len(seen))).pvalue > RARE


def test_users_are_drawn_at_the_rate_whatever_they_own():
    ids = [user for user in range(30) for _ in range(1 + user % 5)]
    sampler = UserPoissonSampler(ids, steps=3000, expected_batch_size=6, examples_per_user=2)
    present = np.zeros(30)
    for indices in sampler:
        present[sampler.unit_of(indices).unique()] += 1
    z = (present - 600) / np.sqrt(3000 * 0.2 * 0.8)
    assert p_value(z).min() * 30 > RARE
    assert RARE < stats.chi2.sf((z**2).sum(), 30) < 1 - RARE


def test_cap_takes_a_fresh_uniform_subset():
    sampler = UserPoissonSampler([0] * 5 + [1], steps=4000, sample_rate=1.0, examples_per_user=2)
    subsets = []
    for indices in sampler:
        assert indices[2:] == [5]
        subsets.append(tuple(indices[:2]))
    counts = Counter(subsets)
    assert set(counts) == set(combinations(range(5), 2))
    assert stats.chisquare(list(counts.values())).pvalue > RARE
    repeats = sum(a == b for a, b in pairwise(subsets))
    assert stats.binomtest(repeats, 3999, 0.1).pvalue > RARE


def test_units_of_examples():
    sampler = UserPoissonSampler(USERS, steps=1, sample_rate=0.5)
    units = sampler.unit_of([6, 0, 4])
    assert units.dtype == torch.int64 and units.tolist() == [3, 0, 1]
    empty = sampler.unit_of([])
    assert empty.dtype == torch.int64 and empty.shape == (0,)
    for indices in ([10], [-1]):
        with pytest.raises(ValueError, match="10 examples"):
            sampler.unit_of(indices)


def test_ids_of_any_kind_are_compared_by_value():
    for ids in (torch.tensor([5, 9, 5]), np.array([5, 9, 5]), [(1, "x"), 0, (1, "x")]):
        sampler = UserPoissonSampler(ids, steps=1, sample_rate=0.5)
        assert sampler.num_units == 2
        assert sampler.unit_of([0, 1, 2]).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [1.0, float("nan")],
        [("a", float("nan")), ("a", float("nan"))],
        [("a", ("b", float("nan")))],
        [[1], [2]],
        [torch.tensor(1), torch.tensor(1)],
    ],
)
def test_ids_that_cannot_be_compared_are_refused(ids):
    with pytest.raises(ValueError, match="user_ids"):
        UserPoissonSampler(ids, steps=1, sample_rate=0.5)
    with pytest.raises(ValueError, match="examples_per_user=0"):
        UserPoissonSampler([1], steps=1, sample_rate=0.5, examples_per_user=0)


def test_loader_follows_users():
    sampler = UserPoissonSampler(USERS, steps=20, sample_rate=0.4)
    loader = PoissonLoader(Numbers(10), sampler)
    for batch in loader:
        units = sampler.unit_of(loader.current_indices)
        assert units.shape == batch["input_ids"].shape[:1]
        assert torch.equal(loader.current_unit_ids, units)
        assert loader.current_units == len(units.unique())


def test_few_of_many_examples_are_given_without_looking_at_all():
    ids = np.repeat(np.arange(3), [200_000, 3, 2])
    sampler = UserPoissonSampler(ids, steps=50, sample_rate=1.0, examples_per_user=3, seed=0)
    low = 0
    for indices in sampler:
        assert sampler.unit_of(indices).tolist() == [0] * 3 + [1] * 3 + [2] * 2
        assert indices[3:] == [200_000, 200_001, 200_002, 200_003, 200_004]
        low += sum(index < 100_000 for index in indices[:3])
    assert stats.binomtest(low, 150, 0.5).pvalue > RARE


# Example-level sampling


OWNED = [0] * 5 + [1] * 3 + [2] + [3] * 2 + [0, 1]  # user 0: 6 examples, user 1: 4, user 2: 1, user 3: 2


def capped(seed=None, **options):
    options = {"examples_per_user": 2, "steps": 40, "sample_rate": 0.5} | options
    return ExamplePoissonSampler(OWNED, seed=seed, **options)


def kept(sampler):
    return sampler._kept.tolist()


def test_no_user_keeps_more_than_the_cap_in_all_draws_together():
    for seed in (None, 3):
        sampler = capped(seed)
        assert (sampler.num_users, sampler.num_examples, sampler.num_units, sampler.num_dropped) == (4, 13, 7, 6)
        assert (sampler.examples_per_user, sampler.expected_batch_size) == (2, 3.5)
        seen = set()
        for indices in sampler:
            assert indices == sorted(set(indices))
            assert sampler.current_units == len(indices) == len(sampler.current_unit_ids)
            assert torch.equal(sampler.current_unit_ids, sampler.unit_of(indices))
            seen.update(indices)
        assert seen == set(kept(sampler))
        assert Counter(OWNED[i] for i in seen) == {0: 2, 1: 2, 2: 1, 3: 2}


def test_which_examples_stay_is_uniform_and_independent_between_users():
    counts = Counter()
    for seed in range(3000):
        stay = kept(capped(seed, steps=1))
        counts[tuple(i for i in stay if OWNED[i] == 0), tuple(i for i in stay if OWNED[i] == 1)] += 1
    first = list(combinations([i for i, user in enumerate(OWNED) if user == 0], 2))
    second = list(combinations([i for i, user in enumerate(OWNED) if user == 1], 2))
    assert set(counts) == {(a, b) for a in first for b in second}
    assert stats.chisquare(list(counts.values())).pvalue > RARE


def test_the_cap_is_drawn_from_the_key_and_lasts():
    sampler = capped()
    assert len({tuple(kept(capped())) for _ in range(40)}) > 10
    for copied in (copy.copy(sampler), copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert kept(copied) == kept(sampler)
        assert list(copied) != list(capped(5))
    assert kept(capped(5)) == kept(capped(5)) != kept(capped(6))


def test_kept_examples_are_drawn_at_the_rate_and_independently():
    sampler = capped(1, steps=4000, sample_rate=0.3)
    where = {index: place for place, index in enumerate(kept(sampler))}
    present = np.zeros((4000, 7))
    for step, indices in enumerate(sampler):
        present[step, [where[i] for i in indices]] = 1
    centred = (present - 0.3) / np.sqrt(0.21)
    assert p_value(centred.sum(0) / np.sqrt(4000)).min() * 7 > RARE
    pairs = (centred.T @ centred)[np.triu_indices(7, 1)] / np.sqrt(4000)
    assert p_value(pairs).min() * 21 > RARE


def test_users_across_chunks_are_capped_alike(monkeypatch):
    monkeypatch.setattr("fastclip.sampling.capped._USERS", 3)
    ids = np.repeat(np.arange(10), np.arange(1, 11))
    sampler = ExamplePoissonSampler(
        np.random.default_rng(0).permutation(ids), examples_per_user=4, steps=1, sample_rate=1.0
    )
    (drawn,) = sampler
    assert sampler.num_units == sum(min(n, 4) for n in range(1, 11)) == len(drawn)
    assert drawn == sorted(set(drawn))


def test_nothing_is_dropped_under_a_wide_cap():
    sampler = capped(examples_per_user=6, sample_rate=1.0, steps=1)
    assert sampler.num_dropped == 0 and next(iter(sampler)) == list(range(13))
    assert sampler.unit_of([12, 3]).tolist() == [12, 3]


def test_dropped_examples_have_no_unit_and_never_reach_a_loop():
    sampler = capped()
    dropped = sorted(set(range(13)) - set(kept(sampler)))
    with pytest.raises(ValueError, match=f"example {dropped[0]} was dropped"):
        sampler.unit_of([kept(sampler)[0], dropped[0]])
    with pytest.raises(ValueError, match="dataset has 12 examples"):
        PoissonLoader(Numbers(12), sampler)
    for batch in PoissonLoader(Numbers(13), sampler):
        assert not set(batch["input_ids"][:, 0].tolist()) & set(dropped)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"examples_per_user": 0}, "examples_per_user=0"),
        ({"examples_per_user": 2.0}, r"examples_per_user=2\.0"),
        ({"max_batch": 5}, r"max_batch=5 with examples_per_user=2.*physical batches"),
        ({"sample_rate": None, "expected_batch_size": 8}, "expected_batch_size=8"),
        ({"sample_rate": None}, "exactly one"),
    ],
)
def test_bad_caps_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        capped(**options)


# Cut draws


def test_cut_draws_have_cut_sizes_and_every_unit_stays_alike():
    units, rate, most, steps = 30, 0.4, 12, 6000
    present = presence(PoissonSampler(units, steps=steps, sample_rate=rate, max_batch=most, seed=2))
    sizes = np.bincount(present.sum(1).astype(int), minlength=most + 1)
    expected = stats.binom.pmf(np.arange(most + 1), units, rate)
    expected[most] = stats.binom.sf(most - 1, units, rate)
    likely = expected > 2e-3
    merged = [np.append(x[likely], x[~likely].sum()) for x in (sizes, steps * expected)]
    assert len(sizes) == most + 1
    assert stats.chisquare(*merged).pvalue > RARE

    inclusion = (np.arange(most + 1) @ expected) / units
    z = (present.sum(0) - steps * inclusion) / np.sqrt(steps * inclusion * (1 - inclusion))
    assert p_value(z).min() * units > RARE
    # Among cut draws alone, too: the first ones are not preferred.
    full = present[present.sum(1) == most]
    assert len(full) > 1000
    assert stats.chisquare(full.sum(0)).pvalue > RARE


def test_users_of_a_cut_draw_stay_whole_and_whatever_they_own():
    ids = [user for user in range(12) for _ in range(1 + 5 * (user % 3))]
    sampler = UserPoissonSampler(ids, steps=3000, sample_rate=0.8, max_batch=4, seed=0)
    owned, counts = Counter(ids), np.zeros(12)
    for indices in sampler:
        given = Counter(ids[i] for i in indices)
        assert len(given) == sampler.current_units <= 4
        assert all(owned[user] == count for user, count in given.items())
        counts[list(given)] += 1
    assert stats.chisquare(counts).pvalue > RARE


def test_the_safe_size_is_far_out_and_costs_nothing():
    assert safe_max_batch(1024) == 1024 + 208 and safe_max_batch(0.25) == 4
    sampler = PoissonSampler(67349, steps=198, expected_batch_size=1024, max_batch=safe_max_batch(1024))
    assert stats.binom.sf(sampler.max_batch, 67349, sampler.sample_rate) < 1e-9
    plain = epsilon_of([StepEvent(0.8, sampler.sample_rate, 198)], 1e-6)
    cut = epsilon(sampler, 0.8, 198, 1e-6)
    assert cut == pytest.approx(plain, rel=1e-3)
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected_batch_size"):
            safe_max_batch(wrong)


@pytest.mark.parametrize("wrong", [0, 1.5, True])
def test_bad_max_batch_is_named(wrong):
    with pytest.raises(ValueError, match=f"max_batch={wrong}"):
        PoissonSampler(10, steps=1, sample_rate=0.5, max_batch=wrong)


# Accountants


def epsilon(sampler, noise, steps, delta):
    events = [replace(sampler.event(noise), count=steps)]
    return epsilon_of(events, delta, examples_per_user=sampler.examples_per_user, adjacency=sampler.adjacency)


def test_accountants_hear_of_what_is_drawn():
    ids = np.arange(4000) % 1000
    examples = PoissonSampler(4000, steps=1, expected_batch_size=40)
    users = UserPoissonSampler(ids, steps=1, expected_batch_size=10, examples_per_user=3)
    capped_users = ExamplePoissonSampler(ids, examples_per_user=2, steps=1, expected_batch_size=20)
    for sampler in (examples, users, capped_users):
        assert sampler.event(1.5) == StepEvent(1.5, 0.01)
    assert (users.examples_per_user, users.examples_per_draw, examples.examples_per_user) == (None, 3, None)
    assert epsilon(examples, 1.5, 100, 1e-5) == epsilon(users, 1.5, 100, 1e-5) == get_epsilon(1.5, 0.01, 100, 1e-5)
    assert epsilon(capped_users, 1.5, 100, 1e-5) == get_epsilon(1.5, 0.01, 100, 1e-5, examples_per_user=2)
    with pytest.raises(ValueError, match="noise_multiplier=-1"):
        examples.event(-1)


@pytest.mark.parametrize("kind", ["examples", "users", "capped"])
def test_accountants_hear_of_cut_draws(kind):
    if kind == "examples":
        sampler = PoissonSampler(500, steps=300, sample_rate=0.1, max_batch=52)
    elif kind == "users":
        sampler = UserPoissonSampler(np.arange(1500) // 3, steps=300, sample_rate=0.1, max_batch=52)
    else:
        sampler = ExamplePoissonSampler(
            np.arange(1500) // 3, examples_per_user=1, steps=300, sample_rate=0.1, max_batch=52
        )
    event = sampler.event(2.0)
    assert event == StepEvent(2.0, 0.1, max_batch=52, num_units=500)
    sizes = {sampler.current_units for _ in sampler}
    assert max(sizes) == event.max_batch
    theirs = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    theirs.compose(dp_accounting.TruncatedSubsampledGaussianDpEvent(500, 0.1, 52, 2.0), 20)
    assert epsilon(sampler, 2.0, 20, 1e-5) == pytest.approx(theirs.get_epsilon(1e-5), rel=2e-3)
    assert epsilon(sampler, 2.0, 20, 1e-5) > 1.1 * get_epsilon(2.0, 0.1, 20, 1e-5)


def test_a_bound_that_never_cuts_is_no_cut():
    assert PoissonSampler(50, steps=1, sample_rate=0.1, max_batch=50).event(1.0) == StepEvent(1.0, 0.1)


@pytest.mark.parametrize("make", [fastclip.UserPoissonSampler, lambda users, **_: fastclip.UserIndex.build(users)])
def test_rows_of_nobody_are_refused(make):
    with pytest.raises(ValueError, match=r"user_ids\[2\] is missing: rows of nobody"):
        make(["a", "b", None, "a"], steps=1, sample_rate=0.5)
