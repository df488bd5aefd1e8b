"""Every case of tests/kernel_cases.py on the device, beside fastclip.reference in fp64 on the CPU; for bench/gpu.py.

A result may be as far from fp64 as twice plain torch in the same dtype is, and EPS of its size more. The second launch has to
have the first one's bits, and what bounds of errors are made of may not be below the exact value. Noise has to have the bits of
the CPU's stream, but for the last place of a tenth of its elements; what is updated with it is rounded in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_bench import Bench, said
from torch import Tensor

from fastclip import dispatch, ops
from fastclip.random import BLOCK_ELEMENTS, Key

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Tensor cores cut each addend at 2^-23 of the largest (kernels/products.py), dozens of them in a chain.
EPS = {"fp32": 2.0**-20, "fp16": 2.0**-18, "bf16": 2.0**-18}
# Each element is a unit's norm and has to be right by itself; of sums, what is small beside the largest need not be.
ELEMENTWISE = ("linear_norms", "row_norm_products", "embedding_norm", "affine_norm")
# Where each keeps sum_t |a_t||g_t|, which bounds of errors are made of: it has to be rounded up.
SPREADS: dict[str, Callable[[Tensor], Tensor]] = {"linear_norms": lambda x: x[:, 1], "row_norm_products": lambda x: x}
NOISE = tuple(dispatch.NOISE_SCHEMAS)
TF32 = "tf32 is off"
Launch = Callable[..., Any]


def names(bench: Bench) -> list[str]:
    covered = {case.op for case in _cases(bench)}
    dtypes = ["fp32"] if bench.dry else list(DTYPES)  # the interpreter refuses bf16, and fp16 shows nothing more
    return [TF32, *(f"{op} {dtype}" for dtype in dtypes for op in dispatch.LAUNCHERS if op in covered), *NOISE]


def without_cases() -> list[str]:
    """Kernels that nothing here runs."""
    from kernel_cases import CASES

    return sorted(set(dispatch.LAUNCHERS) - {case.op for case in CASES} - set(NOISE))


def measure(bench: Bench, name: str, launch: Launch | None = None) -> dict[str, Any]:
    """{"cases", "failures": [{"case", "why"}], "worst": the largest error as a share of what is allowed}."""
    if name == TF32:
        return _tf32(bench)
    if name in NOISE:
        return _noise(bench, name, launch or _triton(name))
    op, dtype = name.split()
    cases = [case for case in _cases(bench) if case.op == op]
    worst, failures = 0.0, []
    for case in cases:
        try:
            share, why = compare(case, dtype, bench.device, launch or _triton(op))
            worst = max(worst, share)
        except Exception as error:
            why = said(error)
            if _is_lost(bench):
                failures.append({"case": case.name, "why": f"{why}; later cases were not run"})
                break
        if why:
            failures.append({"case": case.name, "why": why})
    return {"cases": len(cases), "failures": failures, "worst": worst}


def compare(case: Any, dtype: str, device: torch.device, launch: Launch) -> tuple[float, str]:
    """(error as a share of what is allowed, what is wrong or "")."""
    from kernel_cases import joined

    found, again = (_launched(launch, case.op, case.make(DTYPES[dtype], device)).cpu() for _ in range(2))
    exact = case.exact(case.make(DTYPES[dtype], torch.device("cpu")))
    plain = joined(dispatch.plain(case.op)(*case.make(DTYPES[dtype], torch.device("cpu")))).double()
    if not torch.equal(_bits(found), _bits(again)):
        return 0.0, "the second launch has other bits"
    if found.shape != exact.shape:
        return 0.0, f"shape {list(found.shape)}, not {list(exact.shape)}"
    if not exact.numel():
        return 0.0, ""
    if case.op in SPREADS and bool((SPREADS[case.op](found) < SPREADS[case.op](exact) * (1 - 1e-12)).any()):
        return 0.0, "sum_t |a_t||g_t|, on which error bounds rest, is below the exact sum"
    off, theirs = (found.double() - exact).abs(), (plain - exact).abs()
    if case.op in ELEMENTWISE:
        allowed = 2 * theirs + EPS[dtype] * exact.abs()
    else:
        allowed = (2 * theirs.amax() + EPS[dtype] * exact.abs().amax()).expand_as(off)
    wrong = ~((off <= allowed) | (found.double() == exact))  # so that NaN is wrong
    share = (off / allowed.clamp(min=1e-300))[off != 0]
    worst = float(share.nan_to_num(torch.inf).amax()) if share.numel() else 0.0
    if not bool(wrong.any()):
        return worst, ""
    at = int(wrong.flatten().nonzero()[0])
    return worst, (
        f"{int(wrong.sum())} of {wrong.numel()} beyond what is allowed, first at {at}: {float(found.flatten()[at])!r}, "
        f"exact {float(exact.flatten()[at])!r}, allowed {float(allowed.flatten()[at]):.3g}"
    )


def _cases(bench: Bench) -> list[Any]:
    from kernel_cases import CASES

    return [case for case in CASES if not bench.dry or case.name.startswith(("ragged", "[5, 3]"))]


def _triton(op: str) -> Launch:
    return lambda *args: dispatch.compiled(op, "triton", *args)(*args)


def _written(op: str) -> list[int]:
    schema = getattr(torch.ops.fastclip, op).default._schema
    return [i for i, x in enumerate(schema.arguments) if x.alias_info is not None and x.alias_info.is_write]


def _launched(launch: Launch, op: str, args: tuple[Any, ...]) -> Tensor:
    """What the op returns or writes."""
    from kernel_cases import joined

    result, written = launch(*args), _written(op)
    return joined(result) if not written else args[written[0]]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)


def _is_lost(bench: Bench) -> bool:
    """Whether the device answers no more, as after an illegal address."""
    try:
        bench.wait()
    except Exception:
        return True
    return False


def _tf32(bench: Bench) -> dict[str, Any]:
    """1 + 2^-12 is 1 in tf32: by torch's own product, and by kernels that multiply fp32 rows."""
    a, g = (torch.full((64, width), 1 + 2.0**-12, device=bench.device) for width in (32, 48))
    ones, offsets = torch.ones_like(g), torch.tensor([0, 64], dtype=torch.int32, device=bench.device)
    factors, out = torch.ones(1, device=bench.device), torch.zeros(48, 32, device=bench.device)
    exact = 64 * (1 + 2.0**-12)
    found = {"torch matmul": ones.mT @ a}
    failures = []

    def attempt(name: str, call: Callable[[], Tensor]) -> None:
        try:
            found[name] = call()
        except Exception as error:
            failures.append({"case": name, "why": said(error)})

    attempt(
        "clipped_gemm",
        lambda: _launched(_triton("clipped_gemm"), "clipped_gemm", (a, ones, offsets, factors, out, True)),
    )
    for route in ("gram", "direct"):
        square = (exact * exact) * 32 * 48
        attempt(
            f"linear_norms, {route}",
            lambda route=route, square=square: (
                _triton("linear_norms")(a, [ones], offsets, route)[0, 0] * (exact / square)
            ),
        )
    # The logits are their log-sum-exp if they are exact, and 2^-12 of 32 below it in tf32.
    labels, lse = torch.zeros(64, dtype=torch.int64, device=bench.device), torch.full_like(a[:, 0], exact / 2)
    attempt(
        "head_gradient",
        lambda: _triton("head_gradient")(a, ones[:16, :32].contiguous(), None, labels, lse, lse * 2, 16, 0.0),
    )
    for name, x in found.items():
        # tf32 is off by 2^-12.
        if not bool(((x.double() - exact).abs() <= 2.0**-16 * exact).all()):
            failures.append({"case": name, "why": f"{float(x.flatten()[0])!r} instead of {exact!r}: tf32"})
    return {"cases": len(found), "failures": failures, "allow_tf32": torch.backends.cuda.matmul.allow_tf32}


def _noise(bench: Bench, op: str, launch: Launch) -> dict[str, Any]:
    from kernel_cases import noise_calls

    def run(place: torch.device, call: Launch) -> list[Tensor]:
        torch.manual_seed(0)
        key = _written(op)
        # The key stays on the CPU.
        args = [x if isinstance(x, Tensor) and x.dtype == torch.uint8 else _to(x, place) for x in noise_calls()[op]]
        call(*args)
        return [x.cpu() for i in key for x in (args[i] if isinstance(args[i], list) else [args[i]])]

    failures, worst = [], 0.0
    try:
        found, again = (run(bench.device, launch) for _ in range(2))
        wanted = run(torch.device("cpu"), _PLAIN_NOISE[op])
        if not all(torch.equal(_bits(x), _bits(y)) for x, y in zip(found, again, strict=True)):
            failures.append({"case": "noise_calls", "why": "the second launch has other bits"})
        for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
            off = float(((x - y).abs() / (y.abs().amax() * 2.0**-22)).nan_to_num(torch.inf).amax())
            worst = max(worst, off)
            others = float((x != y).double().mean())
            noisy = len(found) == 1 or i == 1  # the only tensor, or the gradients
            if off > 1 or (noisy and others > 0.1):
                why = f"{others:.0%} of the elements have other bits, by {off:.3g} x 2^-22 at most"
                failures.append({"case": f"noise_calls, tensor {i}", "why": why})
    except Exception as error:
        failures.append({"case": "noise_calls", "why": said(error)})
    return {"cases": 1, "failures": failures, "worst": worst}


def _to(x: Any, device: torch.device) -> Any:
    if isinstance(x, list):
        return [_to(y, device) for y in x]
    return x.to(device) if isinstance(x, Tensor) else x


def _draw(std: float, scale: float, key: Tensor, nonce: int, block: int, skip: int) -> ops.Draw:
    return ops.Draw(std, scale, Key(bytes(key.tolist())), nonce, block * BLOCK_ELEMENTS + skip)


def _add_noise(total: Tensor, out: Tensor, *stream: Any) -> None:
    ops.add_noise(total, out, _draw(*stream), backend="torch")


def _clip_accumulate_noise(grads: list[Tensor], factors: Tensor, outs: list[Tensor], *stream: Any) -> None:
    *rest, blocks, skips = stream
    draw = _draw(*rest, blocks[0], skips[0])
    ops.clip_accumulate_noise(grads, factors, outs, draw.std, draw.key, (draw.nonce, draw.offset), backend="torch")


def _noise_adamw(p: Any, g: Any, m: Any, v: Any, *rest: Any) -> None:
    *stream, blocks, skips, lr, beta1, beta2, eps, decay, steps = rest
    draws = [_draw(*stream, blocks[0], skips[0])]
    more = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay, "steps": steps}
    ops.noise_adamw(p, g, m, v, draws, **more, backend="torch")


def _noise_sgd(p: Any, g: Any, buffers: Any, *rest: Any) -> None:
    *stream, blocks, skips, lr, momentum, dampening, decay, nesterov, first = rest
    draws = [_draw(*stream, blocks[0], skips[0])]
    more = {"momentum": momentum, "dampening": dampening, "weight_decay": decay, "nesterov": nesterov, "first": first}
    ops.noise_sgd(p, g, buffers, draws, lr=lr, **more, backend="torch")


_PLAIN_NOISE: dict[str, Launch] = {
    "add_noise": _add_noise,
    "clip_accumulate_noise": _clip_accumulate_noise,
    "noise_adamw": _noise_adamw,
    "noise_sgd": _noise_sgd,
}
