"""Draws are Poisson, secret and never repeated; batches keep units whole; the loader says which draw it holds."""

import copy
import multiprocessing
import os
import pickle
import warnings
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from draws import RARE, Numbers, p_value, presence
from scipy import stats
from torch.utils.data import DataLoader

from fastclip.sampling import ExamplePoissonSampler, PoissonLoader, PoissonSampler, UserPoissonSampler


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
    if kind == "capped":
        return ExamplePoissonSampler(
            [i // 2 for i in range(128)], examples_per_user=1, steps=4, sample_rate=0.5, seed=seed
        )
    return UserPoissonSampler(list(range(64)), steps=4, sample_rate=0.5, seed=seed)


@pytest.mark.parametrize("kind", ["examples", "capped", "users"])
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


@pytest.mark.parametrize("kind", ["examples", "capped", "users"])
def test_copies_take_a_key_of_their_own(kind):
    sampler = make(kind)
    next(iter(sampler))
    copies = [pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler), copy.copy(sampler)]
    assert len({sampler._secret._key, *(copied._secret._key for copied in copies), make(kind)._secret._key}) == 5
    assert sampler._secret._key not in pickle.dumps(sampler)
    # The original's draw is not a copy's to release, and its id is not handed out again.
    assert [copied.current_draw for copied in copies] == [None] * 3
    assert [copied.released for copied in copies] == [1, 1, 1]
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

    monkeypatch.setattr("fastclip.sampling.loader.DataLoader", Noting)
    context = multiprocessing.get_context("fork")
    sampler = PoissonSampler(20, steps=1, sample_rate=0.5)
    list(PoissonLoader(Numbers(), sampler, num_workers=1, prefetch_factor=3, multiprocessing_context=context))
    assert (seen["num_workers"], seen["prefetch_factor"]) == (1, 3)
    for name in ("batch_size", "shuffle", "batch_sampler", "drop_last", "in_order"):
        with pytest.raises(ValueError, match=f"{name}=True"):
            PoissonLoader(Numbers(), sampler, **{name: True})
    with pytest.raises(ValueError, match="dataset has 19 examples"):
        PoissonLoader(Numbers(19), sampler)
