"""Samplers at scale: what an index of users takes to build, and how long one step's sample takes to draw,
beside a coin for every example.

    python bench/sampling.py [--users N] [--examples N] [--draws R]

Ids are text, in random order in an Arrow file; how much a user owns is skewed. The index is built and drawn from in a
process of its own, whose peak memory is the kernel's count of resident pages, mapped files included. JSON to
bench/results/sampling.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import ipc
from step import machine

from fastclip.sampling import ExamplePoissonSampler, PoissonSampler, UserIndex, UserPoissonSampler
from fastclip.sampling.words import Words

RESULTS = Path(__file__).parent / "results"
EXPECTED = 1024
PIECE = 2**20


def write(path: Path, users: int, examples: int) -> None:
    """A stream of ids. Every user owns an example; the others go to users by a log-normal law."""
    rng = np.random.default_rng(0)
    weights = np.cumsum(rng.lognormal(0.0, 1.0, users))
    schema = pa.schema([("user", pa.string())])
    with ipc.new_stream(str(path), schema) as writer:
        for start in range(0, examples, PIECE):
            size = min(PIECE, examples - start)
            owners = np.searchsorted(weights, rng.random(size) * weights[-1])
            first = np.arange(start, min(start + size, users))
            owners[: len(first)] = first
            ids = pa.array(rng.permutation(owners)).cast(pa.string())
            writer.write_batch(pa.record_batch([ids], schema=schema))


def work(folder: Path, draws: int) -> dict[str, object]:
    """In a process of its own: build, then draw."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    index = UserIndex.build(folder / "ids.arrow", folder / "index", column="user")
    building = time.perf_counter() - started
    built = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = {"steps": draws + 1, "expected_batch_size": EXPECTED}
    samplers = {
        "examples": lambda: PoissonSampler(index.num_examples, **expected),
        "users, all their examples": lambda: UserPoissonSampler(index, **expected),
        "users, 16 examples each": lambda: UserPoissonSampler(index, examples_per_user=16, **expected),
        "examples, at most 8 a user": lambda: ExamplePoissonSampler(index, examples_per_user=8, **expected),
    }
    results = {}
    for name, make in samplers.items():
        started = time.perf_counter()
        sampler = make()
        making = time.perf_counter() - started
        loop, times, sizes = iter(sampler), [], []
        for step in range(draws + 1):
            started = time.perf_counter()
            sizes.append(len(next(loop)))
            if step:  # the first one computes the sizes' distribution
                times.append(time.perf_counter() - started)
        results[name] = {
            "making_seconds": making,
            "median_draw_milliseconds": statistics.median(times) * 1e3,
            "slowest_draw_milliseconds": max(times) * 1e3,
            "mean_examples": statistics.mean(sizes),
        }
    coins = [coin_for_each(index.num_examples) for _ in range(3)]
    for drawn in results.values():
        drawn["median_draw_to_coins"] = drawn["median_draw_milliseconds"] / statistics.median(coins)
    return {
        "users": index.num_users,
        "examples": index.num_examples,
        "most_examples_of_a_user": index.most,
        "index_bytes": sum(file.stat().st_size for file in (folder / "index").iterdir()),
        "build_seconds": building,
        "imported_peak_mib": before / 1024,
        "build_peak_mib": built / 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "coin_for_each_example_milliseconds": statistics.median(coins),
        "draws": results,
    }


def coin_for_each(count: int) -> float:
    """What the samplers do without: milliseconds for a 64-bit coin an example, from the same cipher."""
    words, threshold = Words(bytes(32), 0), np.uint64(2**64 * EXPECTED // count)
    started = time.perf_counter()
    for start in range(0, count, PIECE):
        np.flatnonzero(words.take(min(PIECE, count - start)) < threshold)
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--examples", type=int, default=50_000_000)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        print(json.dumps(work(chosen.worker, chosen.draws)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "ids.arrow", chosen.users, chosen.examples)
        command = [sys.executable, __file__, "--worker", folder, "--draws", str(chosen.draws)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result = {"machine": machine(), "expected_units_a_draw": EXPECTED, **json.loads(output)}
    print(json.dumps(result, indent=2))
    RESULTS.joinpath("sampling.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
