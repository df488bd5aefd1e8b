"""Draws in parts that fit into memory: whole units, one bucket a part, the draw covered once, and said which part it is."""

from collections import Counter
from itertools import combinations, groupby

import numpy as np
import pytest
import torch
from draws import Numbers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastclip
from fastclip.sampling import (
    ExamplePoissonSampler,
    PoissonLoader,
    PoissonSampler,
    UserPoissonSampler,
    length_bucket,
    physical_batches,
)


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


def test_units_beyond_the_limits_come_alone_where_that_is_asked_for():
    indices, units, sizes = [0, 1, 2, 3, 4, 5], [7, 8, 7, 9, 8, 7], [64] * 6
    batches = physical_batches(indices, sizes, max_tokens=128, units=units, allow_oversized=True)
    assert batches == [[0, 2, 5], [1, 4], [3]]
    assert [(batch.oversized, batch.padded_length) for batch in batches] == [(True, 64), (False, 64), (False, 64)]
    assert [batch.padded_length for batch in physical_batches(indices)] == [None]
    assert physical_batches([4], [64], max_tokens=8, allow_oversized=True)[0].oversized


class Tokens:
    """Example i has as many tokens as `lengths` says, each of them i."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return [index] * self.lengths[index]


def pad(examples, length):
    return {"ids": torch.tensor([tokens + [-1] * (length - len(tokens)) for tokens in examples]).reshape(-1, length)}


LENGTHS = [1 + 7 * i % 30 for i in range(60)]
OWNERS = [i * i % 13 for i in range(60)]
BUCKETS = [8, 16, 32]


def make_sampler(kind, **options):
    if kind == "examples":
        return PoissonSampler(60, steps=12, sample_rate=0.2, seed=1, **options)
    if kind == "capped":
        return ExamplePoissonSampler(OWNERS, examples_per_user=3, steps=12, sample_rate=0.4, seed=1)
    return UserPoissonSampler(OWNERS, examples_per_user=6, steps=12, sample_rate=0.3, seed=1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["examples", "capped", "users"])
def test_a_loop_gets_each_draw_in_whole_units_and_padded_by_themselves(kind, workers):
    whole = [(draw, sampler.unit_of(draw).tolist()) for sampler in [make_sampler(kind)] for draw in sampler]
    loader = PoissonLoader(
        Tokens(LENGTHS), make_sampler(kind), pad, workers, max_tokens=200, lengths=LENGTHS, buckets=BUCKETS
    )
    assert (loader.last_of_draw, loader.padded_length, loader.current_unit_ids, loader.oversized) == (None,) * 4
    seen = []
    for batch in loader:
        length = loader.padded_length
        rows = [[i] * LENGTHS[i] + [-1] * (length - LENGTHS[i]) for i in loader.current_indices]
        assert batch["ids"].tolist() == rows and batch["ids"].shape[1] == length
        assert batch["ids"].numel() <= 200 and not loader.oversized
        assert loader.current_unit_ids.dtype == torch.int64
        assert loader.current_units == len(set(whole[loader.current_draw][1]))
        assert loader.previous_draw == (loader.current_draw - 1 if loader.current_draw else None)
        ids = loader.current_unit_ids.tolist()
        seen.append(
            (loader.current_draw, list(zip(loader.current_indices, ids, strict=True)), length, loader.last_of_draw)
        )
    assert len(seen) > 14
    for draw, parts in groupby(seen, key=lambda part: part[0]):
        parts = list(parts)
        assert [last for *_, last in parts] == [False] * (len(parts) - 1) + [True]
        pairs = [pair for _, pairs, _, _ in parts for pair in pairs]
        assert sorted(pairs) == sorted(zip(*whole[draw], strict=True))
        holders = [{unit for _, unit in pairs} for _, pairs, _, _ in parts]
        assert not any(a & b for a, b in combinations(holders, 2))
        for _, pairs, length, _ in parts:
            longest = {}
            for index, unit in pairs:
                longest[unit] = max(LENGTHS[index], longest.get(unit, 0))
            assert {length_bucket(most, BUCKETS) for most in longest.values()} <= {length}
    assert [draw for draw, _ in groupby(part[0] for part in seen)] == list(range(12))


def test_empty_draws_are_one_empty_last_part():
    sampler = PoissonSampler(60, steps=2, sample_rate=1e-12)
    loader = PoissonLoader(Tokens(LENGTHS), sampler, pad, max_tokens=64, lengths=LENGTHS, buckets=BUCKETS)
    for step, batch in enumerate(loader):
        assert (loader.current_draw, loader.current_indices, loader.last_of_draw) == (step, [], True)
        assert batch["ids"].shape == (0, 8)
        assert loader.current_unit_ids.tolist() == [] and loader.current_unit_ids.dtype == torch.int64
    assert step == 1


def test_limits_on_examples_need_no_lengths():
    loader = PoissonLoader(Numbers(60), PoissonSampler(60, steps=1, sample_rate=1.0), max_examples=25)
    assert [(batch["input_ids"].shape[0], loader.last_of_draw) for batch in loader] == [
        (25, False),
        (25, False),
        (10, True),
    ]


@pytest.mark.parametrize("kind", ["users", "examples"])
def test_units_that_cannot_fit_are_found_before_the_run(kind):
    lengths = [8] * 60
    if kind == "users":
        sampler = UserPoissonSampler([0] * 20 + list(range(1, 41)), steps=4, sample_rate=1.0, examples_per_user=9)
        needed, message = 9 * 8, "9 examples in bucket 8"
    else:
        sampler, needed, message = PoissonSampler(60, steps=4, sample_rate=1.0), 8, "1 examples in bucket 8"
    options = {"lengths": torch.tensor(lengths), "buckets": np.array([4, 8])}
    PoissonLoader(Tokens(lengths), sampler, pad, max_tokens=needed, **options)
    with pytest.raises(ValueError, match=f"{message} .*examples_per_user.*allow_oversized"):
        PoissonLoader(Tokens(lengths), sampler, pad, max_tokens=needed - 1, **options)
    if kind == "users":
        PoissonLoader(Tokens(lengths), sampler, max_examples=9)
        with pytest.raises(ValueError, match="max_examples=8"):
            PoissonLoader(Tokens(lengths), sampler, max_examples=8)
    assert sampler.released == 0


def test_a_longest_example_decides_what_its_user_needs():
    # User 0 owns a long and two short examples, spread out.
    lengths, owners = [4, 8, 32, 4, 4, 4], [1, 2, 0, 0, 1, 0]
    sampler = UserPoissonSampler(owners, steps=1, sample_rate=1.0)
    PoissonLoader(Tokens(lengths), sampler, pad, max_tokens=96, lengths=lengths)
    with pytest.raises(ValueError, match="3 examples in bucket 32"):
        PoissonLoader(Tokens(lengths), sampler, pad, max_tokens=95, lengths=lengths)
    # Of dropped examples nothing is needed.
    capped = ExamplePoissonSampler(owners, steps=1, sample_rate=1.0, examples_per_user=1, seed=0)
    assert 2 not in capped._kept
    PoissonLoader(Tokens(lengths), capped, pad, max_tokens=8, lengths=lengths)


def test_a_user_larger_than_memory_comes_alone():
    sampler = UserPoissonSampler([0] * 5 + [1, 2, 2], steps=1, sample_rate=1.0)
    lengths = [4] * 8
    loader = PoissonLoader(Tokens(lengths), sampler, pad, max_tokens=8, lengths=lengths, allow_oversized=True)
    seen = [(loader.current_unit_ids.tolist(), loader.oversized, loader.last_of_draw) for _ in loader]
    assert seen == [([0] * 5, True, False), ([1], False, False), ([2, 2], False, True)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 0, "lengths": LENGTHS}, "max_tokens=0"),
        ({"max_examples": 2.5}, r"max_examples=2\.5"),
        ({"max_tokens": 64}, "needs lengths"),
        ({"buckets": BUCKETS}, "needs lengths"),
        ({"lengths": LENGTHS[:-1]}, r"60 examples, got int64 \[59\]"),
        ({"lengths": [1.5] * 60}, "whole numbers"),
        ({"lengths": [0, *LENGTHS[1:]]}, "lengths=0"),
        ({"lengths": LENGTHS, "buckets": [8, 16]}, "exceeds the last bucket of 16"),
        ({"lengths": [-1, *LENGTHS[1:]], "buckets": BUCKETS}, "length=-1"),
        ({"lengths": LENGTHS, "buckets": [16, 8]}, "growing order"),
    ],
)
def test_bad_limits_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        PoissonLoader(Tokens(LENGTHS), PoissonSampler(60, steps=1, sample_rate=0.5), pad, **options)


# With the optimizer


DATA = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))


def trained(**limits):
    """Parameters after 6 steps of user-level training without noise, by the loop that the loader's docstring shows."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    sampler = UserPoissonSampler(OWNERS, examples_per_user=4, steps=6, sample_rate=0.6, seed=2)
    loader = PoissonLoader(DATA, sampler, **limits)
    optimizer = fastclip.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        module=model,
        sampler=loader,
        loss_reduction="sum",
    )
    parts = 0
    for batch in loader:
        with optimizer.clipper.units(ids=loader.current_unit_ids, reduction="mean"):
            model(batch).square().sum().backward()
        parts += 1
        if loader.last_of_draw:
            optimizer.step()
            optimizer.zero_grad()
    return parts, [p.detach().clone() for p in model.parameters()]


def test_how_a_draw_is_cut_changes_nothing_that_is_released():
    whole, cut = trained(), trained(max_examples=9)
    assert whole[0] == 6 < cut[0]
    for a, b in zip(whole[1], cut[1], strict=True):
        torch.testing.assert_close(a, b)


def test_a_draw_is_not_released_before_its_last_part():
    model = nn.Linear(3, 2)
    loader = PoissonLoader(DATA, PoissonSampler(60, steps=2, sample_rate=1.0), max_examples=30)
    optimizer = fastclip.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        module=model,
        sampler=loader,
    )
    batches = iter(loader)
    model(next(batches)).mean().backward()
    assert loader.last_of_draw is False
    with pytest.raises(RuntimeError, match="is not its last"):
        optimizer.step()
    x = next(batches)
    assert loader.last_of_draw is True
    model(x).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="draw 0 was released already"):
        model(x).mean().backward()
