"""Several processes share each draw out among them: whole units, every one once, from a key that they alone know."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from fastclip.sampling import ExamplePoissonSampler, PoissonSampler, UserPoissonSampler

WORLD = 2
OWNERS = [i * i % 11 for i in range(50)]

# Each process prints its part of every draw, and what happened to samplers that do not agree.
PROCESS = """
import copy, datetime, gc, json, pickle, sys, weakref
import torch.distributed as dist
from fastclip.sampling import ExamplePoissonSampler, PoissonSampler, UserPoissonSampler

rank, world, store, owners = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
dist.init_process_group(
    "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
)
everyone = {"process_group": dist.group.WORLD}

def parts(sampler):
    return [[draw, sampler.current_units, sampler.current_unit_ids.tolist()] for draw in sampler]

result = {
    "examples": parts(PoissonSampler(40, steps=60, sample_rate=0.3, **everyone)),
    "everything": parts(PoissonSampler(41, steps=2, sample_rate=1.0, **everyone)),
    "cut": parts(PoissonSampler(40, steps=60, sample_rate=0.3, max_batch=12, **everyone)),
    "users": parts(UserPoissonSampler(owners, steps=60, sample_rate=0.5, examples_per_user=3, **everyone)),
    "capped": parts(ExamplePoissonSampler(owners, steps=60, sample_rate=0.6, examples_per_user=3, **everyone)),
    "seeded": [
        parts(PoissonSampler(40, steps=5, sample_rate=0.3, seed=8, **everyone)),
        parts(UserPoissonSampler(owners, steps=5, sample_rate=0.5, examples_per_user=3, seed=8, **everyone)),
        parts(ExamplePoissonSampler(owners, steps=5, sample_rate=0.6, examples_per_user=3, seed=8, **everyone)),
    ],
    "refused": [],
}
sampler = PoissonSampler(40, steps=60, sample_rate=0.3, **everyone)
next(iter(sampler))
result["key"] = sampler._secret._key.hex()
for copied in (copy.copy(sampler), copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
    try:
        next(iter(copied))
    except RuntimeError as error:
        result["refused"].append(str(error))
shuffled = owners if rank else owners[::-1]
for make in (
    lambda: PoissonSampler(40, steps=3 + rank, sample_rate=0.3, **everyone),
    lambda: UserPoissonSampler(shuffled, steps=3, sample_rate=0.3, **everyone),
    lambda: ExamplePoissonSampler(owners, steps=3, expected_batch_size=2, examples_per_user=1 + rank, **everyone),
):
    try:
        make()
    except ValueError as error:
        result["refused"].append(str(error))
# A group that outlives its destruction ends the process with an abort, so nothing may hold it: no name here, no sampler.
group = weakref.ref(dist.group.WORLD)
del everyone
dist.destroy_process_group()
gc.collect()
result["group_is_held"] = group() is not None
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process printed."""
    store = tmp_path_factory.mktemp("store") / "store"
    arguments = [str(WORLD), str(store), json.dumps(OWNERS)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    finished = [process.communicate(timeout=120) for process in running]
    for process, (_, errors) in zip(running, finished, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in finished]


def together(results, name):
    """[(each process's [indices, number of units, unit ids]), ...], one entry a draw."""
    return list(zip(*(result[name] for result in results), strict=True))


@pytest.mark.parametrize("name", ["examples", "everything", "cut", "users", "capped"])
def test_every_unit_of_a_draw_is_in_one_process_and_whole(results, name):
    draws = together(results, name)
    shares, sizes = Counter(), set()
    for draw in draws:
        held = [set(ids) for _, _, ids in draw]
        assert not held[0] & held[1]
        assert [len(units) for units in held] == [count for _, count, _ in draw]
        assert 0 <= len(held[0]) - len(held[1]) <= 1
        sizes.add(sum(map(len, held)))
        drawn = [index for indices, _, _ in draw for index in indices]
        assert len(set(drawn)) == len(drawn)
        for indices, _, ids in draw:
            assert len(ids) == len(indices)
            if name == "users":
                given, owned = Counter(OWNERS[i] for i in indices), Counter(OWNERS)
                assert all(count == min(3, owned[user]) for user, count in given.items())
                shares.update(given)
            else:
                shares.update(indices)
    if name == "everything":
        assert sizes == {41} and set(shares) == set(range(41))
    else:
        # Keys are new in every run: a right sampler fails one of these less than once in 10^5 runs.
        assert len(sizes) > (1 if name == "cut" else 3) and sum(shares.values()) > 100
    if name == "cut":
        assert max(sizes) == 12
    if name == "capped":
        # All processes dropped the same examples.
        assert max(Counter(OWNERS[i] for i in shares).values()) == 3


def test_seeded_parts_make_up_the_draw_of_one_process_alone(results):
    alone = [
        PoissonSampler(40, steps=5, sample_rate=0.3, seed=8),
        UserPoissonSampler(OWNERS, steps=5, sample_rate=0.5, examples_per_user=3, seed=8),
        ExamplePoissonSampler(OWNERS, steps=5, sample_rate=0.6, examples_per_user=3, seed=8),
    ]
    for place, sampler in enumerate(alone):
        for step, draw in enumerate(sampler):
            parts = [result["seeded"][place][step] for result in results]
            assert sorted(i for indices, _, _ in parts for i in indices) == sorted(draw)
            assert sum(count for _, count, _ in parts) == sampler.current_units


def test_processes_share_one_key_that_no_copy_has(results):
    assert results[0]["key"] == results[1]["key"] != "00" * 32
    for result in results:
        assert len(result["refused"]) == 6
        assert all("process_group=" in text for text in result["refused"][:3])


def test_processes_that_do_not_agree_all_refuse(results):
    for result in results:
        assert all("the processes' samplers differ" in text for text in result["refused"][3:])


def test_samplers_do_not_hold_the_process_group(results):
    assert not any(result["group_is_held"] for result in results)
