"""Draws are Poisson, secret and never repeated; batches keep units whole; the loader says which draw it holds."""

import copy
import multiprocessing
import os
import pickle
import warnings
from collections import Counter, UserDict, namedtuple
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

from fastclip.sampling import PoissonLoader, PoissonSampler, UserPoissonSampler, length_bucket, physical_batches
from fastclip.sampling import _Words as Words

# Two-sided p-values below this fail; together the statistical tests here fail a right sampler once in ten thousand runs.
RARE = 1e-6


def presence(sampler):
    """[steps, num_units] of 0 and 1."""
    present = np.zeros((sampler.steps, sampler.num_units))
    for step, drawn in enumerate(sampler):
        present[step, drawn] = 1
    return present


def p_value(z):
    return 2 * stats.norm.sf(np.abs(z))


@pytest.mark.parametrize("seed", [None, 5])
def test_every_unit_is_drawn_at_the_rate_and_independently(seed):
    rate, units, steps = 0.3, 40, 5000
    present = presence(PoissonSampler(units, steps=steps, sample_rate=rate, seed=seed))
    variance = rate * (1 - rate)

    per_unit = (present.sum(0) - steps * rate) / np.sqrt(steps * variance)
    assert p_value(per_unit).min() * units > RARE
    assert RARE < stats.chi2.sf((per_unit**2).sum(), units) < 1 - RARE

    centred = (present - rate) / np.sqrt(variance)
    pairs = (centred.T @ centred)[np.triu_indices(units, 1)] / np.sqrt(steps)
    assert p_value(pairs).min() * len(pairs) > RARE
    between_draws = (centred[1:] * centred[:-1]).sum() / np.sqrt((steps - 1) * units)
    assert p_value(between_draws) > RARE


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.93])
def test_sizes_are_binomial(rate):
    units, steps = 200, 4000
    sizes = np.array([len(drawn) for drawn in PoissonSampler(units, steps=steps, sample_rate=rate)])
    # Fixed sizes, or sizes spread more than independent draws spread them, fail here.
    spread = (steps - 1) * sizes.var(ddof=1) / (units * rate * (1 - rate))
    kurtosis = (1 - 6 * rate * (1 - rate)) / (units * rate * (1 - rate))
    assert p_value((spread - steps) / np.sqrt(steps * (2 + kurtosis))) > RARE
    assert p_value((sizes.mean() - units * rate) / np.sqrt(units * rate * (1 - rate) / steps)) > RARE


def test_chunks_of_a_large_draw_are_drawn_alike_and_apart(monkeypatch):
    monkeypatch.setattr("fastclip.sampling._CHUNK", 16)
    present = presence(PoissonSampler(40, steps=4000, sample_rate=0.25))
    for chunk in (present[:, :16], present[:, 16:32], present[:, 32:]):
        mean = chunk.mean()
        assert p_value((mean - 0.25) / np.sqrt(0.1875 / chunk.size)) > RARE
    agree = present[:, :16] == present[:, 16:32]
    assert p_value((agree.mean() - 0.625) / np.sqrt(0.625 * 0.375 / agree.size)) > RARE


def test_threshold_is_exact_to_the_last_bit(monkeypatch):
    rate = 1 / 3
    threshold = int(rate * 2**64)
    words = np.array([0, threshold - 1, threshold, threshold + 1, 2**64 - 1], dtype=np.uint64)
    monkeypatch.setattr(Words, "take", lambda self, count: words[:count])
    assert next(iter(PoissonSampler(5, steps=1, sample_rate=rate))) == [0, 1]


def test_words_are_uniform_in_every_bit_and_new_in_every_draw():
    words = [Words(bytes(range(32)), draw).take(4096) for draw in range(2)]
    bits = np.unpackbits(words[0].view(np.uint8).reshape(4096, 8), axis=1).sum(0, dtype=np.int64)
    assert p_value((bits - 2048) / 32).min() * 64 > RARE
    assert not np.intersect1d(*words).size
    # RFC 8439's test vector: the keystream of an all-zero key and nonce begins so.
    assert Words(bytes(32), 0).take(1)[0] == int.from_bytes(bytes.fromhex("76b8e0ada0f13d90"), "little")


def test_everything_at_rate_one_and_almost_nothing_at_tiny_rates():
    assert list(PoissonSampler(3, steps=2, sample_rate=1.0)) == [[0, 1, 2]] * 2
    assert list(PoissonSampler(3, steps=50, sample_rate=1e-15)) == [[]] * 50
    assert list(PoissonSampler(3, steps=5, expected_batch_size=3)) == [[0, 1, 2]] * 5


def test_draws_are_sorted_lists_of_ints():
    for drawn in PoissonSampler(100, steps=20, sample_rate=0.5):
        assert isinstance(drawn, list) and all(type(index) is int for index in drawn)
        assert drawn == sorted(set(drawn)) and 0 <= drawn[0] <= drawn[-1] < 100


def test_ids_grow_by_one_over_all_loops_and_end_with_the_steps():
    sampler = PoissonSampler(10, steps=6, sample_rate=0.5)
    assert (sampler.current_draw, sampler.released, len(sampler)) == (None, 0, 6)
    seen = []
    for _ in sampler:
        seen.append((sampler.current_draw, sampler.previous_draw))
        if len(seen) == 2:
            break
    first, second = iter(sampler), iter(sampler)
    for iterator in (first, second, first, second):
        next(iterator)
        seen.append((sampler.current_draw, sampler.previous_draw))
    assert seen == [(0, None), (1, 0), (2, None), (3, None), (4, 2), (5, 3)]
    assert next(first, None) is None
    with pytest.raises(RuntimeError, match="all 6 draws were handed out"):
        next(iter(sampler))
    with pytest.raises(RuntimeError, match="all 6 draws were handed out"):
        list(PoissonLoader(Numbers(), sampler))


def test_rate_and_expected_size_are_two_sides_of_one_number():
    by_rate = PoissonSampler(200, steps=1, sample_rate=0.05)
    by_size = PoissonSampler(200, steps=1, expected_batch_size=10)
    assert by_rate.expected_batch_size == by_size.expected_batch_size == 10.0
    assert by_rate.sample_rate == by_size.sample_rate == 0.05
    assert isinstance(by_size, torch.utils.data.Sampler)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_units": 0}, "num_units=0"),
        ({"num_units": 2.0}, r"num_units=2\.0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True"),
        ({"sample_rate": 0.0}, r"sample_rate=0\.0"),
        ({"sample_rate": 1.1}, r"sample_rate=1\.1"),
        ({"sample_rate": float("nan")}, "sample_rate=nan"),
        ({"sample_rate": None}, "exactly one"),
        ({"expected_batch_size": 5}, "exactly one"),
        ({"sample_rate": None, "expected_batch_size": 11}, "expected_batch_size=11"),
        ({"sample_rate": None, "expected_batch_size": 0}, "expected_batch_size=0"),
        ({"seed": 1.5}, r"seed=1\.5"),
    ],
)
def test_bad_input_is_named(arguments, named):
    good = {"num_units": 10, "steps": 4, "sample_rate": 0.5}
    with pytest.raises(ValueError, match=named):
        PoissonSampler(**(good | arguments))


def make(kind, seed=None):
    if kind == "examples":
        return PoissonSampler(64, steps=4, sample_rate=0.5, seed=seed)
    return UserPoissonSampler(list(range(64)), steps=4, sample_rate=0.5, seed=seed)


@pytest.mark.parametrize("kind", ["examples", "users"])
def test_seed_repeats_draws_and_is_said(kind):
    first, second, other = make(kind, 7), make(kind, 7), make(kind, 8)
    assert first.seeded and not make(kind).seeded
    drawn = [next(iter(s)) for s in (first, second, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    copies = pickle.loads(pickle.dumps(first)), copy.deepcopy(first)
    rest = list(first)
    assert rest == list(second) != list(other)
    assert all(list(copied) == rest for copied in copies)
    assert drawn[0] not in rest


def test_seeded_draws_stay_what_they_were():
    assert list(PoissonSampler(12, steps=2, sample_rate=0.5, seed=0)) == [
        [0, 1, 2, 3, 4, 6, 8, 9, 10, 11],
        [0, 1, 4, 7, 8],
    ]


@pytest.mark.parametrize("kind", ["examples", "users"])
def test_copies_take_a_key_of_their_own(kind):
    sampler = make(kind)
    next(iter(sampler))
    copies = [pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler), copy.copy(sampler)]
    assert len({sampler._key, *(copied._key for copied in copies), make(kind)._key}) == 5
    assert sampler._key not in pickle.dumps(sampler)
    assert [copied.current_draw for copied in copies] == [0, 0, 0]
    draws = {str(next(iter(each))) for each in [sampler, *copies]}
    assert len(draws) == 4


def test_forked_child_draws_otherwise():
    sampler, seeded = make("examples"), make("examples", 3)
    running = iter(sampler)
    next(running)
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        # Newer Pythons warn about forks of processes with threads; the child here only draws and leaves.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os.write(sending, pickle.dumps((next(running), next(iter(sampler)), next(iter(seeded)))))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = pickle.loads(os.read(receiving, 2**16))
    os.close(receiving)
    os.close(sending)
    ours = (next(running), next(iter(sampler)), next(iter(seeded)))
    assert theirs[0] != ours[0] and theirs[1] != ours[1]
    assert theirs[2] == ours[2]


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
    for ids in (torch.tensor([5, 9, 5]), np.array([5, 9, 5]), [(1, "x"), None, (1, "x")]):
        sampler = UserPoissonSampler(ids, steps=1, sample_rate=0.5)
        assert sampler.num_units == 2
        assert sampler.unit_of([0, 1, 2]).tolist() == [0, 1, 0]


@pytest.mark.parametrize("ids", [[], [1.0, float("nan")], [[1], [2]], [torch.tensor(1), torch.tensor(1)]])
def test_ids_that_cannot_be_compared_are_refused(ids):
    with pytest.raises(ValueError, match="user_ids"):
        UserPoissonSampler(ids, steps=1, sample_rate=0.5)
    with pytest.raises(ValueError, match="examples_per_user=0"):
        UserPoissonSampler([1], steps=1, sample_rate=0.5, examples_per_user=0)


def test_batches_of_one_bucket_each_within_the_limits():
    indices = [10, 11, 12, 13, 14, 15]
    sizes = [64, 128, 64, 64, 128, 64]
    assert physical_batches(indices, sizes, max_examples=3) == [[11, 14], [10, 12, 13], [15]]
    assert physical_batches(indices, sizes, max_tokens=128) == [[11], [14], [10, 12], [13, 15]]
    assert physical_batches(indices) == [indices]
    assert physical_batches([], sizes=[], max_examples=3, max_tokens=5, units=[]) == []


def test_units_stay_whole_in_the_bucket_of_their_longest_example():
    indices, units, sizes = [0, 1, 2, 3, 4], [7, 8, 7, 9, 8], [64, 64, 128, 64, 64]
    assert physical_batches(indices, sizes, max_examples=3, units=units) == [[0, 2], [1, 4, 3]]
    assert physical_batches(indices, sizes, max_tokens=256, units=torch.tensor(units)) == [[0, 2], [1, 4, 3]]
    assert physical_batches(indices, sizes, max_tokens=256, max_examples=2, units=units) == [[0, 2], [1, 4], [3]]
    with pytest.raises(ValueError, match=r"2 examples in bucket 128 .* examples_per_user"):
        physical_batches(indices, sizes, max_tokens=255, units=units)
    with pytest.raises(ValueError, match="max_examples=1"):
        physical_batches(indices, sizes, max_examples=1, units=units)


@given(data=st.data(), count=st.integers(0, 40))
def test_batches_partition_the_draw(data, count):
    indices = data.draw(st.lists(st.integers(0, 10**6), min_size=count, max_size=count, unique=True))
    sizes = data.draw(st.lists(st.sampled_from([16, 32, 64]), min_size=count, max_size=count))
    units = data.draw(st.none() | st.lists(st.integers(0, 12), min_size=count, max_size=count))
    largest = max(Counter(units).values(), default=1) if units else 1
    most = data.draw(st.integers(largest, 60))
    tokens = data.draw(st.none() | st.integers(64 * largest, 64 * 60))
    batches = physical_batches(indices, sizes, max_examples=most, max_tokens=tokens, units=units)
    assert sorted(index for batch in batches for index in batch) == sorted(indices)
    own = dict(zip(indices, units if units else indices, strict=True))
    longest = {}
    for index, size in zip(indices, sizes, strict=True):
        longest[own[index]] = max(size, longest.get(own[index], 0))
    holders = [{own[index] for index in batch} for batch in batches]
    assert all(not a & b for a, b in combinations(holders, 2))
    for batch, holding in zip(batches, holders, strict=True):
        (bucket,) = {longest[unit] for unit in holding}
        assert 0 < len(batch) <= most
        assert tokens is None or len(batch) * bucket <= tokens


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_examples": 0}, "max_examples=0"),
        ({"max_tokens": 1.5, "sizes": [1, 1]}, "max_tokens=1.5"),
        ({"max_tokens": 64}, "needs sizes"),
        ({"sizes": [64]}, "sizes has 1 entries for 2"),
        ({"units": [1, 2, 3]}, "units has 3 entries for 2"),
        ({"sizes": [64, 0]}, "sizes=0"),
        ({"sizes": [64, 64], "max_tokens": 63}, "longest bucket"),
    ],
)
def test_bad_batch_input_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        physical_batches([3, 4], **arguments)


def test_length_bucket_is_the_smallest_that_holds():
    buckets = [32, 64, 128]
    assert [length_bucket(length, buckets) for length in (0, 1, 32, 33, 64, 128)] == [32, 32, 32, 64, 64, 128]
    with pytest.raises(ValueError, match=r"length=129 .* truncate"):
        length_bucket(129, buckets)
    for wrong in ([], [64, 32], [32, 32], [0, 32]):
        with pytest.raises(ValueError, match="growing order"):
            length_bucket(1, wrong)
    with pytest.raises(ValueError, match="length=-1"):
        length_bucket(-1, buckets)


class Numbers:
    """Example i is a dict of what text models take."""

    def __init__(self, size=20):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {
            "input_ids": torch.full((6,), index),
            "mask": torch.ones(6, dtype=torch.bool),
            "weight": index / 2,
            "name": f"example {index}",
        }


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_says_which_draw_the_loop_holds(workers):
    sampler = PoissonSampler(20, steps=12, sample_rate=0.05, seed=1)
    expected = list(PoissonSampler(20, steps=12, sample_rate=0.05, seed=1))
    assert expected.count([]) > 1
    loader = PoissonLoader(Numbers(), sampler, num_workers=workers)
    assert (loader.current_draw, loader.current_indices, len(loader)) == (None, None, 12)
    assert (loader.steps, loader.sample_rate, loader.expected_batch_size, loader.seeded) == (12, 0.05, 1.0, True)
    for step, batch in enumerate(loader):
        assert loader.current_draw == step
        assert loader.current_indices == expected[step] == batch["input_ids"][:, 0].tolist()
        assert loader.current_units == len(expected[step])
        assert len(batch["name"]) == len(expected[step])
        assert (batch["input_ids"].dtype, batch["input_ids"].shape[1:]) == (torch.int64, (6,))
        assert (batch["mask"].dtype, batch["mask"].shape[1:]) == (torch.bool, (6,))
        assert (batch["weight"].dtype, batch["weight"].dim()) == (torch.float64, 1)
        # What a loop takes out of one batch is there in the next.
        batch.pop("name")
    assert step == 11


def test_leaving_a_loop_early_never_repeats_a_draw():
    sampler = PoissonSampler(20, steps=9, sample_rate=0.5)
    loader = PoissonLoader(Numbers(), sampler, num_workers=1)
    for _ in loader:
        break
    assert loader.current_draw == 0
    fetched = sampler.released
    assert fetched > 1
    held = []
    for batch in loader:
        held.append(loader.current_draw)
        assert batch["input_ids"][:, 0].tolist() == loader.current_indices
    assert held == list(range(fetched, 9))


def test_loader_follows_users():
    sampler = UserPoissonSampler(USERS, steps=20, sample_rate=0.4)
    loader = PoissonLoader(Numbers(10), sampler)
    for batch in loader:
        units = sampler.unit_of(loader.current_indices)
        assert units.shape == batch["input_ids"].shape[:1]


Pair = namedtuple("Pair", ["x", "y"])


class Encoding(UserDict):
    """Stands for the mappings of tokenizers, which are no dicts."""


@pytest.mark.parametrize(
    "collate",
    [
        lambda examples: torch.stack([e["input_ids"] for e in examples]),
        lambda examples: (torch.stack([e["input_ids"] for e in examples]), [e["name"] for e in examples]),
        lambda examples: Pair(torch.stack([e["input_ids"] for e in examples]), torch.tensor(3)),
        lambda examples: Encoding(ids=torch.stack([e["input_ids"] for e in examples]), names=("a",) * len(examples)),
    ],
    ids=["tensor", "tuple", "namedtuple", "mapping"],
)
def test_empty_draws_keep_the_form_of_any_batch(collate):
    loader = PoissonLoader(Numbers(), PoissonSampler(20, steps=1, sample_rate=1e-12), collate)
    (batch,) = loader
    whole = collate([Numbers()[0]])
    assert type(batch) is type(whole)
    ids = batch if isinstance(batch, torch.Tensor) else batch["ids"] if isinstance(batch, Encoding) else batch[0]
    assert (ids.shape, ids.dtype) == ((0, 6), torch.int64)
    if isinstance(batch, Pair):
        assert batch.y == 3
    elif isinstance(batch, Encoding):
        assert batch["names"] == ()
    elif isinstance(batch, tuple):
        assert batch[1] == []


def test_options_go_to_torch_but_not_those_that_choose_examples(monkeypatch):
    seen = {}

    class Noting(DataLoader):
        def __init__(self, *arguments, **options):
            seen.update(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr("fastclip.sampling.DataLoader", Noting)
    context = multiprocessing.get_context("fork")
    sampler = PoissonSampler(20, steps=1, sample_rate=0.5)
    list(PoissonLoader(Numbers(), sampler, num_workers=1, prefetch_factor=3, multiprocessing_context=context))
    assert (seen["num_workers"], seen["prefetch_factor"]) == (1, 3)
    for name in ("batch_size", "shuffle", "batch_sampler", "drop_last", "in_order"):
        with pytest.raises(ValueError, match=f"{name}=True"):
            PoissonLoader(Numbers(), sampler, **{name: True})
    with pytest.raises(ValueError, match="dataset has 19 examples"):
        PoissonLoader(Numbers(19), sampler)
