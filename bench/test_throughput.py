"""Throughput of every op over a sweep of shapes, beside the GEMM and copy rates of the same run.

    pytest bench/test_throughput.py --benchmark-json=bench/results/throughput_cpu.json [-k clipped_gemm]

Each case says what it does: FLOPs as a plain formula needs them, and the bytes it must read and write. `bench/render.py` turns
them into shares of the rates. Before it is timed a case is compared with `fastclip.reference` on its own inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastclip import ops, reference
from fastclip.random import Key

ROWS = 1024
LENGTHS = (1, 8, 128, 512)
WIDTHS = {"768x768": (768, 768), "768x3072": (768, 3072), "1024x4096": (1024, 4096), "lora 768x8": (768, 8)}
HALF = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """run: once; check: what it returns beside what it should, compared first; flops, bytes: of one run."""

    name: str
    run: Callable[[], object]
    check: Callable[[], tuple[Tensor, Tensor]] | None
    flops: float
    bytes: float
    dtype: str = "float32"


def _size(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def _rows(width: int, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, width).to(dtype)


def linear(name: str, length: int, dtype: torch.dtype) -> list[Case]:
    d, p = WIDTHS[name]
    a, g, offsets = _rows(d, dtype), _rows(p, dtype), torch.arange(0, ROWS + 1, length)
    units = len(offsets) - 1
    out, factors = torch.zeros(p, d), torch.rand(units)
    kind = str(dtype).removeprefix("torch.")
    title = f"{name}, {units} units of {length}"
    cheaper = min(2.0 * ROWS * d * p, float(ROWS) * length * (d + p))

    def summed() -> tuple[Tensor, Tensor]:
        found = ops.clipped_gemm(a, g, offsets, factors, torch.zeros(p, d))
        return found, reference.clipped_gemm(
            a.double(), g.double(), offsets, factors, torch.zeros(p, d, dtype=torch.float64)
        )

    def norms() -> tuple[Tensor, Tensor]:
        return ops.linear_norm(a, g, offsets), reference.linear_norm(a.double(), g.double(), offsets)

    return [
        Case(f"linear_norm {title}", lambda: ops.linear_norm(a, g, offsets), norms, cheaper, _size(a, g), kind),
        Case(
            f"clipped_gemm {title}",
            lambda: ops.clipped_gemm(a, g, offsets, factors, out),
            summed,
            2.0 * ROWS * d * p,
            _size(a, g) + 2 * _size(out),
            kind,
        ),
    ]


def rowwise() -> list[Case]:
    """What reads its rows once."""
    cases = []
    for rows, width, length in ((8192, 768, 128), (8192, 1024, 1), (8191, 257, 63)):
        g, x = _rows(width, rows=rows), _rows(width, rows=rows)
        offsets = torch.tensor([*range(0, rows, length), rows])
        weight, mean, rstd = torch.rand(width), x.mean(1), 1 / x.std(1)
        ids = torch.randint(0, 1000, (rows,))
        factors, table = torch.rand(len(offsets) - 1), torch.zeros(1000, width)
        title = f"{rows} x {width}, units of {length}"
        cases += [
            Case(
                f"affine_norm, gain {title}",
                lambda g=g, x=x, o=offsets: ops.affine_norm(g, x, o),
                lambda g=g, x=x, o=offsets: (
                    ops.affine_norm(g, x, o),
                    reference.affine_norm(g.double(), x.double(), o),
                ),
                2.0 * g.numel(),
                _size(g, x),
            ),
            Case(
                f"affine_norm, bias {title}",
                lambda g=g, o=offsets: ops.affine_norm(g, None, o),
                lambda g=g, o=offsets: (ops.affine_norm(g, None, o), reference.affine_norm(g.double(), None, o)),
                1.0 * g.numel(),
                _size(g),
            ),
            Case(
                f"embedding_norm {title}",
                lambda g=g, o=offsets, i=ids: ops.embedding_norm(i, g, o),
                lambda g=g, o=offsets, i=ids: (ops.embedding_norm(i, g, o), reference.embedding_norm(i, g.double(), o)),
                2.0 * g.numel(),
                _size(g, ids),
            ),
            Case(
                f"clipped_embedding {title}",
                lambda g=g, o=offsets, i=ids, f=factors, t=table: ops.clipped_embedding(i, g, o, f, t),
                None,
                2.0 * g.numel(),
                3 * _size(g),
            ),
            Case(
                f"layer_norm_backward {title}",
                lambda g=g, x=x, m=mean, r=rstd, w=weight, o=offsets: ops.layer_norm_backward(g, x, m, r, w, o, True),
                None,
                8.0 * g.numel(),
                3 * _size(g),
            ),
        ]
    return cases


def head() -> list[Case]:
    logits, labels = torch.randn(512, 50257), torch.randint(0, 50257, (512,))
    lse, g = logits.logsumexp(1), torch.full((512,), 1e-6)
    return [
        Case(
            "cross_entropy 512 x 50257",
            lambda: ops.cross_entropy(logits, labels),
            lambda: (
                ops.cross_entropy(logits, labels)[0],
                torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none"),
            ),
            3.0 * logits.numel(),
            _size(logits),
        ),
        Case(
            "cross_entropy_backward 512 x 50257",
            lambda: ops.cross_entropy_backward(logits.copy_(logits), labels, lse, g),
            None,
            3.0 * logits.numel(),
            4 * _size(logits),
        ),
    ]


def noise() -> list[Case]:
    n, key = 1 << 23, Key(bytes(32))
    grads, out, samples, factors = torch.zeros(n), torch.zeros(n), torch.randn(8, n >> 3), torch.rand(8)
    p, m, v = (torch.zeros(n) for _ in range(3))
    draw = ops.Draw(1.0, 1.0, key, 0, 0)
    adamw = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "steps": [1]}
    return [
        Case("add_noise 8 Mi", lambda: ops.add_noise(grads, out, draw), None, 0.0, _size(grads, out)),
        Case(
            "clip_accumulate_noise 8 x 1 Mi",
            lambda: ops.clip_accumulate_noise(samples, factors, out[: n >> 3], 1.0, key, (0, 0)),
            None,
            2.0 * n,
            _size(samples) + 4.0 * (n >> 3),
        ),
        Case(
            "noise_adamw 8 Mi",
            lambda: ops.noise_adamw([p], [grads], [m], [v], [draw], **adamw),
            None,
            0.0,
            8 * _size(p),
        ),
    ]


def rates() -> list[Case]:
    """What the machine does at best, by torch."""
    a, b, x, y = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.randn(1 << 24), torch.empty(1 << 24)
    half = a.to(HALF), b.to(HALF)
    return [
        Case("rate: GEMM", lambda: a @ b, None, 2.0 * 1024**3, 0.0),
        Case("rate: GEMM", lambda: half[0] @ half[1], None, 2.0 * 1024**3, 0.0, "bfloat16"),
        Case("rate: copy", lambda: y.copy_(x), None, 0.0, 2 * _size(x)),
    ]


SWEEP = {
    **{
        f"{d}-{w}-{n}": (lambda w=w, n=n, d=d: linear(w, n, d))
        for d in (torch.float32, HALF)
        for w in WIDTHS
        for n in LENGTHS
    },
    "rows": rowwise,
    "head": head,
    "noise": noise,
    "rates": rates,
}
COUNTS = {"rows": 15, "head": 2, "noise": 3, "rates": 3}
CASES = [(name, i) for name in SWEEP for i in range(COUNTS.get(name, 2))]


@pytest.mark.parametrize(("name", "index"), CASES)
def test_throughput(benchmark, name: str, index: int) -> None:
    torch.manual_seed(0)
    case = SWEEP[name]()[index]
    if case.check is not None:
        found, expected = case.check()
        assert (found.double() - expected.double()).norm() <= 2e-2 * expected.double().norm(), case.name
    benchmark.extra_info.update(case=case.name, dtype=case.dtype, flops=case.flops, bytes=case.bytes)
    benchmark.pedantic(case.run, rounds=7, iterations=1, warmup_rounds=2)
