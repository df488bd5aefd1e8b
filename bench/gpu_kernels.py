"""Kernels timed beside what torch and Opacus do, and the rates of the device; for bench/gpu.py.

Beside each kernel: torch's own formulation in the same dtype, torch.compile of it, and Opacus' function where opacus is
installed. The value is compared with torch's in fp32 first, and what differs is not timed. FLOPs and bytes are those of the
formula, so that their share of the rates of the same run (a large GEMM, a copy) is a kernel's efficiency.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_bench import L2_BYTES, Bench, installed, said
from gpu_formulas import ALL, Args
from gpu_noise import NOISE
from torch import Tensor

TOO_FAR = 4e-3  # of the largest value: a bf16 result is rounded to half of that
KERNELS = {str(kernel): kernel for kernel in (*ALL, *NOISE)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def names(bench: Bench) -> list[str]:
    if not bench.dry and not bench.quick:
        return list(KERNELS)
    first: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        first.setdefault(kernel.op, name)
    return list(first.values())


def measure(bench: Bench, name: str) -> dict[str, Any]:
    kernel = KERNELS[name]
    torch.manual_seed(0)
    args, flops, moved = kernel.make(bench, torch.float32 if bench.dry else DTYPES[kernel.dtype])
    found: dict[str, Any] = {"op": kernel.op, "dtype": kernel.dtype, "flops": flops, "bytes": moved}
    if kernel.captured:  # noise has no value to compare: the correctness section has its bits
        wide = kernel.plain(*_map(lambda x: x.float() if x.is_floating_point() else x, args))
        found["off"] = off = _distance(kernel.ours(*args), wide)
        del wide
        if not off <= TOO_FAR:
            return found | {"error": f"differs from torch in fp32 by {off:.3g} of the largest value: not timed"}
    size = sum(x.nbytes for x in _tensors(args))
    copies = [args] + [
        _map(torch.clone, args) for _ in range(0 if bench.dry else min(7, int(L2_BYTES // max(size, 1))))
    ]

    def time(call: Callable[..., Any], captured: bool = False) -> dict[str, Any]:
        try:
            return bench.time([partial(call, *x) for x in copies], captured)
        except Exception as error:  # beside what is measured: out of memory, not installed as expected
            bench.free()
            return {"error": said(error)}

    found["ours"] = bench.time([partial(kernel.ours, *x) for x in copies], kernel.captured)
    found["torch"] = time(kernel.plain, kernel.captured and not kernel.plain_waits)
    if kernel.compiled and not bench.quick:
        torch._dynamo.reset()
        found["compile"] = time(
            torch.compile(kernel.plain, dynamic=False, backend="eager" if bench.dry else "inductor")
        )
    if kernel.opacus is not None:
        missing = {"absent": "opacus is not installed"}
        found["opacus"] = time(kernel.opacus) if installed("opacus") else missing
    return found


def _distance(ours: Any, wide: Any) -> float:
    """Of the largest value; NaN where either has one."""
    pairs = zip(_tensors(ours), _tensors(wide), strict=True)
    return max(float((x.double() - y.double()).abs().amax() / y.double().abs().amax()) for x, y in pairs)


def _tensors(args: Any) -> list[Tensor]:
    if isinstance(args, Tensor):
        return [args]
    return [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, Tensor)]


def _map(change: Callable[[Tensor], Tensor], args: Args) -> Args:
    def of(x: Any) -> Any:
        return [of(y) for y in x] if isinstance(x, list) else change(x) if isinstance(x, Tensor) else x

    return tuple(of(x) for x in args)


def rate_names(bench: Bench) -> list[str]:
    return ["gemm bf16", "gemm fp16", "gemm fp32", "copy"]


def rate_measure(bench: Bench, name: str) -> dict[str, Any]:
    if name == "copy":
        x, y = (torch.randn(bench.size(2**29), device=bench.device) for _ in range(2))
        found = bench.time([lambda: x.copy_(y)])
        return found | {"bytes_per_second": 2e3 * x.nbytes / found["ms"]}
    dtype = DTYPES[name.split()[1]]
    n = bench.size(4096 if dtype == torch.float32 else 8192)
    a, b = (torch.randn(n, n, dtype=dtype, device=bench.device) for _ in range(2))
    found = bench.time([lambda: a @ b])
    return found | {"flops_per_second": 2e3 * n**3 / found["ms"]}
