"""Noise beside torch's own, and noise_adamw on up to 1e9 parameters; for bench/gpu.py.

Nothing here is a release: key and counter are fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_bench import Bench
from gpu_formulas import Args, Kernel, triton
from torch import Tensor

from fastclip import ops
from fastclip.random import Key

STREAM = (1.0, 1.0, bytes(32), 0)  # std, scale, key, nonce
MANY = 100_000_000


def _kernel(op: str, tensors: int, moved: int, ours: Callable[..., Any], plain: Callable[..., Any]) -> Kernel:
    def make(bench: Bench, to: torch.dtype) -> tuple[Args, float, float]:
        n = 1000 if bench.dry else MANY
        return tuple(torch.rand(n, dtype=to, device=bench.device) for _ in range(tensors)), 0.0, moved * n

    return Kernel(op, "1e8", "fp32", make, ours, plain, captured=False)


def _stream() -> tuple[Any, ...]:
    std, scale, key, nonce = STREAM
    return std, scale, Key(key).tensor(), nonce


def _plain_noise(g: Tensor, out: Tensor) -> None:
    torch.add(g, torch.randn_like(g), out=out)


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
    triton("noise_adamw", [p], [g], [m], [v], *_stream(), [0], [0], 1e-4, 0.9, 0.999, 1e-8, 0.01, [1])


def plain_adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
    g.add_(torch.randn_like(g))
    step = torch.ones((), device=p.device)
    rest = {
        "amsgrad": False,
        "lr": 1e-4,
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 0.01,
        "eps": 1e-8,
        "maximize": False,
    }
    torch._fused_adamw_([p], [g], [m], [v], [], [step], **rest)


def _clip_accumulate(grads: Tensor, factors: Tensor, out: Tensor) -> None:
    triton("clip_accumulate_noise", [grads], factors, [out], *_stream(), [0], [0])


def _sgd(p: Tensor, g: Tensor, buffer: Tensor) -> None:
    triton("noise_sgd", [p], [g], [buffer], *_stream(), [0], [0], 1e-4, 0.9, 0.0, 0.0, False, False)


def _plain_sgd(p: Tensor, g: Tensor, buffer: Tensor) -> None:
    buffer.mul_(0.9).add_(g.add_(torch.randn_like(g)))
    p.add_(buffer, alpha=-1e-4)


def _add_noise(g: Tensor, out: Tensor) -> None:
    triton("add_noise", g, out, *_stream(), 0, 0)


def _clip(bench: Bench, to: torch.dtype) -> tuple[Args, float, float]:
    grads = torch.rand(bench.size(32), bench.size(768), bench.size(3072), dtype=to, device=bench.device)
    out = torch.zeros(grads.shape[1:], device=bench.device)
    return (grads, torch.rand(len(grads), device=bench.device), out), 0.0, grads.nbytes + out.nbytes


def _plain_clip(grads: Tensor, factors: Tensor, out: Tensor) -> None:
    torch.add(torch.tensordot(factors.to(grads.dtype), grads, 1), torch.randn_like(out), out=out)


NOISE = [
    _kernel("add_noise", 2, 8, _add_noise, _plain_noise),
    _kernel("noise_adamw", 4, 28, adamw, plain_adamw),
    _kernel("noise_sgd", 3, 20, _sgd, _plain_sgd),
    Kernel("clip_accumulate_noise", "32 of 768 x 3072", "bf16", _clip, _clip_accumulate, _plain_clip, captured=False),
]


def names(bench: Bench) -> list[str]:
    return ["2e3"] if bench.dry else ["1e8"] if bench.quick else ["1e8", "1e9"]


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """noise_adamw on so many parameters in one tensor, its ends compared with the CPU's."""
    n = int(float(name))
    torch.manual_seed(0)
    tensors = [torch.rand(n, device=bench.device) for _ in range(4)]
    ends = [slice(0, 1000), slice(n - 1000, n)]
    before = [[x[at].cpu() for x in tensors] for at in ends]
    adamw(*tensors)
    off = 0.0
    std, scale, key, nonce = STREAM
    for at, old in zip(ends, before, strict=True):
        draw = ops.Draw(std, scale, Key(key), nonce, at.start)
        more = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "steps": [1]}
        ops.noise_adamw(*([x] for x in old), [draw], **more, backend="torch")
        for x, wanted in zip(tensors, old, strict=True):
            off = max(off, float((x[at].cpu() - wanted).abs().amax() / wanted.abs().amax()))
    if not off <= 2.0**-21:
        return {"error": f"differs from the CPU's at an end by {off:.3g}: not timed"}
    found = {"parameters": n, "off": off, "ours": bench.time([partial(adamw, *tensors)])}
    found["torch"] = bench.time([partial(plain_adamw, *tensors)])
    found["copy"] = bench.time([lambda: tensors[0].copy_(tensors[1])])
    # Gradients and moments and parameters are read, all but the gradient written; the kernel also leaves the noisy gradient.
    byte = found["copy"]["ms"] / 8
    return found | {"floor_ms": 28 * byte, "time_to_floor": found["ours"]["ms"] / (28 * byte)}
