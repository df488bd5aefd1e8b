"""Noise, and noise with the optimizer's update: nanoseconds an element, beside what torch does alone and a copy.

    python bench/noise.py [--elements N] [--rounds R]

Interleaved rounds, medians, two threads unless OMP_NUM_THREADS says otherwise; JSON to bench/results/noise_cpu.json, beside
what other machines left there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from step import keep, machine

from fastclip import ops
from fastclip.discrete import draw_integers
from fastclip.random import Key, nonce

RESULTS = Path(__file__).parent / "results"
FEWER = 40  # times, of what takes long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    n = chosen.elements
    param, grad, exp_avg, exp_avg_sq, out = (torch.randn(n) for _ in range(5))
    exp_avg_sq.abs_()
    draw = ops.Draw(1.0, 1.0, Key(bytes(32)), 0, 0)
    seeded = ops.Draw(1.0, 1.0, Key(bytes(32)), nonce(0, 0, seeded=True), 0)
    integers = torch.empty(n // FEWER, dtype=torch.int64)
    adam = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    theirs = torch.nn.Parameter(torch.randn(n))
    theirs.grad = torch.randn(n)
    fused = torch.optim.AdamW([theirs], fused=True, **adam)
    sgd = torch.optim.SGD([theirs], lr=1e-4, fused=True)

    runs: dict[str, Callable[[], object]] = {
        "copy": lambda: out.copy_(param),
        "torch.normal": lambda: torch.normal(0.0, 1.0, (n,)),
        "Tensor.normal_": lambda: out.normal_(),
        "add_noise": lambda: ops.add_noise(grad, out, draw),
        "add_noise, seeded": lambda: ops.add_noise(grad, out, seeded),
        "discrete Gaussian": lambda: draw_integers(integers, 2**23, draw),
        "torch AdamW, fused": fused.step,
        "noise_adamw": lambda: ops.noise_adamw([param], [grad], [exp_avg], [exp_avg_sq], [draw], steps=[1], **adam),
        "torch SGD, fused": sgd.step,
        "noise_sgd": lambda: ops.noise_sgd([param], [grad], [], [draw], lr=1e-4),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(chosen.rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if round_:  # the first one allocates
                times[name].append(time.perf_counter() - started)
    ns = {name: statistics.median(seconds) / n * 1e9 for name, seconds in times.items()}
    ns["discrete Gaussian"] *= FEWER
    result = {
        "machine": machine(),
        "elements": n,
        "nanoseconds_per_element": ns,
        "noise_rate_to_torch_normal": ns["torch.normal"] / ns["add_noise"],
        "noise_adamw_time_to_fused_adamw": ns["noise_adamw"] / ns["torch AdamW, fused"],
        # A copy moves 8 bytes an element, noise_adamw 32.
        "noise_adamw_bandwidth_to_copy": 4 * ns["copy"] / ns["noise_adamw"],
    }
    print(json.dumps(result, indent=2))
    keep(RESULTS / "noise_cpu.json", result)


if __name__ == "__main__":
    main()
