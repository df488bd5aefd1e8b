"""The compiled norms beside their plain fp32 formulation in torch, the sgemm rate and the copy bandwidth of the same run.

    python bench/norms.py [--rounds 6]

linear_norm over lengths T and layers of GPT-2, RoBERTa-large, LoRA and an output head, about 1024 rows in units of one length;
embedding_norm and affine_norm over 8192 rows; clipped sums and norms in bf16; cross-entropy of 512 rows of logits. Rounds
in turn, medians; JSON to bench/results/norms_cpu.json, beside what other machines left there.
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
from turns import in_turn

from fastclip import ops, reference

RESULTS = Path(__file__).parent / "results"
SAMPLE = 5e-3  # seconds
LAYERS = {
    "GPT-2 768x768": (768, 768),
    "GPT-2 768x2304": (768, 2304),
    "GPT-2 768x3072": (768, 3072),
    "RoBERTa-large 1024x1024": (1024, 1024),
    "RoBERTa-large 1024x4096": (1024, 4096),
    "LoRA 768x8": (768, 8),
    "LoRA 8x768": (8, 768),
    "head 768x50257": (768, 50257),
}
LENGTHS = (1, 8, 32, 128, 256, 512, 1024, 2048)
ROWS = 1024


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of one run each, in turn; a sample repeats what is short until it takes some milliseconds."""
    repeats = {}
    for name, run in runs.items():
        run()  # the first one allocates
        started = time.perf_counter()
        run()
        repeats[name] = max(1, int(SAMPLE / (time.perf_counter() - started)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in in_turn(list(runs.items()), number):
            started = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - started) / repeats[name])
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def plain(a: torch.Tensor, g: torch.Tensor, units: int) -> torch.Tensor:
    """What one would write in torch, fp32, by the cheaper route."""
    a, g = a.view(units, -1, a.shape[1]), g.view(units, -1, g.shape[1])
    if a.shape[1] * (a.shape[2] + g.shape[2]) <= 2 * a.shape[2] * g.shape[2]:
        return (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2))
    return torch.bmm(g.mT, a).square().sum((1, 2))


def linear(name: str, length: int, rounds: int) -> dict[str, object]:
    d, p = LAYERS[name]
    units = max(1, ROWS // length)
    a, g = torch.randn(units * length, d), torch.randn(units * length, p)
    offsets = torch.arange(units + 1, dtype=torch.int32) * length
    square = torch.randn(1024, 1024)
    seconds = medians(
        {
            "compiled": lambda: ops.linear_norms(a, [g], offsets),  # as a backward calls it
            "plain": lambda: plain(a, g, units),
            "sgemm": lambda: square @ square,
        },
        rounds,
    )
    flops = units * min(length**2 * (d + p), 2 * length * d * p)
    return {
        "layer": name,
        "length": length,
        "units": units,
        "seconds": seconds,
        "time_to_plain": seconds["compiled"] / seconds["plain"],
        "rate_to_sgemm": flops / seconds["compiled"] / (2 * 1024**3 / seconds["sgemm"]),
    }


def rowwise(rounds: int) -> dict[str, object]:
    n, d = 8192, 768
    g, x, out = torch.randn(n, d), torch.randn(n, d), torch.empty(n, d)
    ids, offsets = torch.randint(0, 50257, (n,)), torch.arange(33, dtype=torch.int32) * 256
    seconds = medians(
        {
            "copy": lambda: out.copy_(g),
            "affine_norm, bias": lambda: ops.affine_norm(g, None, offsets),
            "affine_norm, gain": lambda: ops.affine_norm(g, x, offsets),
            "embedding_norm": lambda: ops.embedding_norm(ids, g, offsets),
            "plain affine_norm, gain": lambda: reference.affine_norm(g, x, offsets),
            "plain embedding_norm": lambda: reference.embedding_norm(ids, g, offsets),
        },
        4 * rounds,
    )
    read = {"affine_norm, bias": 1, "affine_norm, gain": 2, "embedding_norm": 1}  # times the bytes of g; a copy moves 2
    ratio = {name: times * seconds["copy"] / 2 / seconds[name] for name, times in read.items()}
    return {"rows": n, "columns": d, "seconds": seconds, "bandwidth_to_copy": ratio}


def halves(rounds: int) -> dict[str, object]:
    """bf16 beside fp32, 4 units of 256 rows, 768 x 3072: GF/s of clipped sums and products, seconds of norms."""
    n, d, p = 1024, 768, 3072
    a, g, out, factors = torch.randn(n, d), torch.randn(n, p), torch.empty(p, d), torch.rand(4)
    offsets, (a16, g16) = torch.arange(5, dtype=torch.int32) * 256, (x.bfloat16() for x in (a, g))
    seconds = medians(
        {
            "clipped_gemm, fp32": lambda: ops.clipped_gemm(a, g, offsets, factors, out),
            "clipped_gemm, bf16": lambda: ops.clipped_gemm(a16, g16, offsets, factors, out),
            "mm, fp32": lambda: g.mT @ a,
            "mm, bf16": lambda: g16.mT @ a16,
            "linear_norm, fp32": lambda: ops.linear_norm(a, g, offsets),
            "linear_norm, bf16": lambda: ops.linear_norm(a16, g16, offsets),
        },
        rounds,
    )
    rates = {name: 2 * n * d * p / s / 1e9 for name, s in seconds.items() if "norm" not in name}
    return {"seconds": seconds, "gflops": rates}


def logits(rounds: int) -> dict[str, float]:
    """Seconds for 512 rows of 50257 logits, fp32."""
    x, y, g = torch.randn(512, 50257), torch.randint(50257, (512,)), torch.ones(512)
    lse = ops.cross_entropy(x, y)[1].clone()
    out = x.clone()
    return medians(
        {
            "cross_entropy": lambda: ops.cross_entropy(x, y),
            "cross_entropy_backward": lambda: ops.cross_entropy_backward(out, y, lse, g),
            "torch cross_entropy": lambda: torch.nn.functional.cross_entropy(x, y, reduction="none"),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    result: dict[str, object] = {"machine": machine(), "rowwise": rowwise(rounds)}
    result |= {"halves": halves(rounds), "logits": logits(rounds)}
    print(json.dumps(result, indent=1))
    sweep = []
    for name in LAYERS:
        for length in LENGTHS:
            sweep.append(linear(name, length, rounds))
            row = sweep[-1]
            print(f"{name:24} T {length:5}  {row['time_to_plain']:5.2f} of plain  {row['rate_to_sgemm']:5.2f} of sgemm")
    result["linear_norm"] = sweep
    keep(RESULTS / "norms_cpu.json", result)


if __name__ == "__main__":
    main()
