"""Every kernel at the sizes of real layers, and the same value in torch's own words; timed by bench/gpu_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_bench import Bench
from torch import Tensor, nn

from fastclip import dispatch

ROWS = 16384
VOCAB = 50257
Args = tuple[Any, ...]


@dataclass(frozen=True)
class Kernel:
    """ours, plain: functions of what make returns; plain(*args) is the same value, written in torch as one would.

    make(bench, dtype) gives (args, FLOPs, bytes). compiled: torch.compile of plain is timed too, which takes seconds.
    """

    op: str
    sizes: str
    dtype: str
    make: Callable[[Bench, torch.dtype], tuple[Args, float, float]]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    opacus: Callable[..., Any] | None = None
    compiled: bool = False
    captured: bool = True
    plain_waits: bool = False  # torch.unique asks how many there are, which no graph can capture

    def __str__(self) -> str:
        return f"{self.op} {self.sizes} {self.dtype}"


def triton(op: str, *args: Any) -> Any:
    return dispatch.compiled(op, "triton", *args)(*args)


def _units(bench: Bench, length: int, rows: int = ROWS) -> tuple[int, int, Tensor]:
    """(units, rows a unit, offsets)."""
    length, units = bench.size(length), 2 if bench.dry else max(1, rows // length)
    return units, length, torch.arange(units + 1, dtype=torch.int32, device=bench.device) * length


# Norms and sums of linear layers. a: [N, d], g: K times [N, p].


def _linear(
    d: int, p: int, length: int, dtype: str, layers: int = 1, rows: int = ROWS, compiled: bool = False
) -> Kernel:
    def make(bench: Bench, to: torch.dtype) -> tuple[Args, float, float]:
        units, t, offsets = _units(bench, length, rows)
        d_, p_ = bench.size(d), bench.size(p)
        a = torch.randn(units * t, d_, dtype=to, device=bench.device)
        g = [torch.randn(units * t, p_, dtype=to, device=bench.device) for _ in range(layers)]
        flops = units * min(t**2 * (d_ + layers * p_), layers * 2 * t * d_ * p_)
        return (a, g, offsets), flops, units * t * (d_ + layers * p_) * a.element_size()

    what = f"{d} x {layers * [p]}" if layers > 1 else f"{d} x {p}"
    return Kernel("linear_norms", f"{what}, T {length}", dtype, make, _norms, _plain_norms, _opacus_norms, compiled)


def _norms(a: Tensor, g: list[Tensor], offsets: Tensor) -> Tensor:
    return triton("linear_norms", a, g, offsets, "auto")[:, 0]


def _plain_norms(a: Tensor, g: list[Tensor], offsets: Tensor) -> Tensor:
    """By the cheaper route."""
    a, layers = _by_unit(a, offsets), [_by_unit(x, offsets) for x in g]
    length, d, total = a.shape[1], a.shape[2], sum(x.shape[2] for x in layers)
    if length * (d + total) <= 2 * d * total:
        gram = a @ a.mT
        return torch.stack([(gram * (x @ x.mT)).sum((1, 2)) for x in layers])
    return torch.stack([(x.mT @ a).square().sum((1, 2)) for x in layers])


def _opacus_norms(a: Tensor, g: list[Tensor], offsets: Tensor) -> Any:
    from opacus.grad_sample.linear import compute_linear_norm_sample

    layer = nn.Linear(1, 1, bias=False)  # its sizes are not looked at
    return [compute_linear_norm_sample(layer, [_by_unit(a, offsets)], _by_unit(x, offsets)) for x in g]


def _clipped_gemm(d: int, p: int, length: int, dtype: str, compiled: bool = False) -> Kernel:
    def make(bench: Bench, to: torch.dtype) -> tuple[Args, float, float]:
        units, t, offsets = _units(bench, length)
        a, g = (torch.randn(units * t, bench.size(n), dtype=to, device=bench.device) for n in (d, p))
        factors, out = torch.rand(units, device=bench.device), torch.zeros(g.shape[1], a.shape[1], device=bench.device)
        return (a, g, offsets, factors, out), 2 * a.numel() * g.shape[1], a.nbytes + g.nbytes + out.nbytes

    def ours(a: Tensor, g: Tensor, offsets: Tensor, factors: Tensor, out: Tensor) -> Tensor:
        triton("clipped_gemm", a, g, offsets, factors, out, False)
        return out

    def plain(a: Tensor, g: Tensor, offsets: Tensor, factors: Tensor, out: Tensor) -> Tensor:
        scaled = g.view(factors.numel(), -1, g.shape[1]) * factors.to(g.dtype)[:, None, None]
        return scaled.flatten(0, 1).mT @ a

    return Kernel("clipped_gemm", f"{d} x {p}, T {length}", dtype, make, ours, plain, compiled=compiled)


# What reads rows once.


def _rows(
    op: str, ours: Any, plain: Any, dtype: str, d: int = 768, length: int = 512, opacus: Any = None, **more: Any
) -> Kernel:
    """Kernels of (ids, g, x, offsets, factors, table)."""

    def make(bench: Bench, to: torch.dtype) -> tuple[Args, float, float]:
        units, t, offsets = _units(bench, length)
        g, x = (torch.randn(units * t, bench.size(d), dtype=to, device=bench.device) for _ in range(2))
        ids = torch.randint(0, bench.size(VOCAB), (units * t,), device=bench.device)
        factors, table = (
            torch.rand(units, device=bench.device),
            torch.zeros(bench.size(VOCAB), g.shape[1], device=bench.device),
        )
        moved = g.nbytes if "embedding" in op else 2 * g.nbytes
        if op == "clipped_embedding":
            moved += 2 * 4 * g.numel()  # at most: rows of the table, read and written
        return (ids, g, x, offsets, factors, table), 0.0, moved

    return Kernel(op, f"{d}, T {length}", dtype, make, ours, plain, opacus, **more)


def _by_unit(x: Tensor, offsets: Tensor) -> Tensor:
    return x.view(offsets.numel() - 1, -1, x.shape[1])


def _plain_embedding(ids: Tensor, g: Tensor, x: Tensor, offsets: Tensor, *rest: Tensor) -> Tensor:
    units = offsets.numel() - 1
    unit = torch.arange(units, device=ids.device).repeat_interleave(ids.numel() // units)
    places, at = torch.unique(unit * VOCAB + ids, return_inverse=True)
    squares = g.new_zeros(len(places), g.shape[1]).index_add_(0, at, g).square().sum(1)
    return squares.new_zeros(units).index_add_(0, places // VOCAB, squares)


def _opacus_embedding(ids: Tensor, g: Tensor, x: Tensor, offsets: Tensor, *rest: Tensor) -> Any:
    from opacus.grad_sample.embedding_norm_sample import compute_embedding_norm_sample

    layer = nn.Embedding(1, 1)  # its sizes are not looked at
    return compute_embedding_norm_sample(layer, [ids.view(offsets.numel() - 1, -1)], _by_unit(g, offsets))


def _clipped_embedding(ids: Tensor, g: Tensor, x: Tensor, offsets: Tensor, factors: Tensor, table: Tensor) -> Tensor:
    triton("clipped_embedding", ids, g, offsets, factors, table)
    return table


def _plain_clipped_embedding(
    ids: Tensor, g: Tensor, x: Tensor, offsets: Tensor, factors: Tensor, table: Tensor
) -> Tensor:
    scaled = (_by_unit(g, offsets) * factors[:, None, None]).flatten(0, 1)
    return torch.zeros_like(table).index_add_(0, ids, scaled)


def _tied(length: int, dtype: str) -> Kernel:
    def make(bench: Bench, to: torch.dtype) -> tuple[Args, float, float]:
        units, t, offsets = _units(bench, length, 4096)
        h, e = (torch.randn(units * t, bench.size(768), dtype=to, device=bench.device) for _ in range(2))
        z = torch.randn(units * t, bench.size(VOCAB), dtype=to, device=bench.device)
        ids = torch.randint(0, z.shape[1], (units * t,), device=bench.device)
        moved = h.nbytes + e.nbytes + units * t * t * z.element_size()
        return (h, z, offsets, ids, e), 2 * units * t * t * h.shape[1], moved

    def ours(h: Tensor, z: Tensor, offsets: Tensor, ids: Tensor, e: Tensor) -> Tensor:
        return triton("tied_cross", h, z, offsets, ids, e, offsets)

    def plain(h: Tensor, z: Tensor, offsets: Tensor, ids: Tensor, e: Tensor) -> Tensor:
        products = _by_unit(h, offsets) @ _by_unit(e, offsets).mT  # [U, T, T]
        z = _by_unit(z, offsets)
        chosen = z.gather(2, ids.view(len(z), 1, -1).expand(-1, z.shape[1], -1))
        return (chosen * products).sum((1, 2))

    return Kernel("tied_cross", f"768 x {VOCAB}, T {length}", dtype, make, ours, plain)


def _head(op: str, dtype: str) -> Kernel:
    """Losses of GPT-2's head, or gradients in the logits of 8192 words; torch's own form both."""

    def make(bench: Bench, to: torch.dtype) -> tuple[Args, float, float]:
        rows, words = bench.size(4096), bench.size(VOCAB if op == "head_losses" else 8192)
        h, weight = (torch.randn(n, bench.size(768), dtype=to, device=bench.device) / 768**0.5 for n in (rows, words))
        labels = torch.randint(0, words, (rows,), device=bench.device)
        lse = torch.logsumexp((h @ weight.mT).float(), 1)
        flops, moved = 2 * rows * weight.numel(), h.nbytes + weight.nbytes
        if op == "head_losses":
            return (h, weight, labels), flops, moved
        return (h, weight, labels, lse, torch.rand_like(lse)), flops, moved + rows * words * h.element_size()

    def ours(h: Tensor, weight: Tensor, labels: Tensor, *rest: Tensor) -> Tensor:
        if op == "head_losses":
            return triton(op, h, weight, None, labels, 0.0)[0]
        return triton(op, h, weight, None, labels, *rest, 0, 0.0)

    def plain(h: Tensor, weight: Tensor, labels: Tensor, *rest: Tensor) -> Tensor:
        logits = (h @ weight.mT).float()
        if op == "head_losses":
            return nn.functional.cross_entropy(logits, labels, reduction="none")
        lse, g = rest
        z = (logits - lse[:, None]).exp_()
        z[torch.arange(len(z), device=z.device), labels] -= 1
        return (z * g[:, None]).to(h.dtype)

    return Kernel(
        op, f"4096 rows, 768 x {VOCAB if op == 'head_losses' else 8192}", dtype, make, ours, plain, compiled=True
    )


def _layer_norm(d: int, dtype: str) -> Kernel:
    def make(bench: Bench, to: torch.dtype) -> tuple[Args, float, float]:
        units, t, offsets = _units(bench, 512)
        g, x = (torch.randn(units * t, bench.size(d), dtype=to, device=bench.device) for _ in range(2))
        wide = x.float()
        mean, weight = wide.mean(1, keepdim=True), torch.rand(x.shape[1], device=bench.device)
        rstd = (wide - mean).square().mean(1, keepdim=True).add(1e-5).rsqrt()
        return (g, x, mean, rstd, weight, offsets), 0.0, 3 * g.nbytes

    def ours(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Any, ...]:
        return triton("layer_norm_backward", g, x, mean[:, 0], rstd[:, 0], weight, offsets, True)

    def plain(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Any, ...]:
        backward, weight = torch.ops.aten.native_layer_norm_backward, weight.to(x.dtype)
        dx = backward(g, x, weight.shape, mean, rstd, weight, weight, [True, False, False])[0]
        x_hat = (x - mean) * rstd
        return dx, torch.stack([_by_unit(y, offsets).sum(1) for y in (g * x_hat, g)])

    return Kernel("layer_norm_backward", f"{d}, T 512", dtype, make, ours, plain)


def _whole(dtype: str) -> Kernel:
    def make(bench: Bench, to: torch.dtype) -> tuple[Args, float, float]:
        grads = torch.randn(bench.size(32), bench.size(768), bench.size(3072), dtype=to, device=bench.device)
        out = torch.zeros(grads.shape[1:], device=bench.device)
        return (grads, torch.rand(len(grads), device=bench.device), out), 0.0, grads.nbytes + 2 * out.nbytes

    def ours(grads: Tensor, factors: Tensor, out: Tensor) -> Tensor:
        triton("clipped_sum", grads, factors, out)
        return out

    def plain(grads: Tensor, factors: Tensor, out: Tensor) -> Tensor:
        return torch.tensordot(factors.to(grads.dtype), grads, 1)

    return Kernel("clipped_sum", "32 of 768 x 3072", dtype, make, ours, plain, compiled=True)


def _gain_by(op: str) -> Callable[..., Tensor]:
    return lambda ids, g, x, offsets, *_: triton(op, g, x, offsets)


def _plain_sums(ids: Tensor, g: Tensor, x: Tensor, offsets: Tensor, *rest: Tensor) -> Tensor:
    return _by_unit(g * x, offsets).sum(1)


def _plain_affine(*args: Tensor) -> Tensor:
    return _plain_sums(*args).square().sum(1)


def _plain_products(ids: Tensor, g: Tensor, x: Tensor, offsets: Tensor, *rest: Tensor) -> Tensor:
    return (g.norm(dim=1) * x.norm(dim=1)).view(offsets.numel() - 1, -1).sum(1)


def _embedding(ids: Tensor, g: Tensor, x: Tensor, offsets: Tensor, *rest: Tensor) -> Tensor:
    return triton("embedding_norm", ids, g, offsets)


_BIG, _GEMMS = (2048, 8192), ((2048, 8192, 512, "bf16"), (16, 2048, 512, "bf16"), (768, 3072, 1024, "fp32"))
ALL = [
    _linear(768, 3072, 1024, "bf16", compiled=True),
    *(_linear(768, 3072, t, "bf16") for t in (128, 512, 4096)),
    _linear(768, 768, 1024, "bf16", layers=3),
    *(_linear(*_BIG, t, "bf16") for t in (512, 4096)),
    *(_linear(d, p, 512, "bf16") for d, p in ((2048, 16), (16, 2048))),
    _linear(768, VOCAB, 1024, "bf16", rows=4096),
    *(_linear(768, 3072, t, "fp32") for t in (128, 1024)),
    _clipped_gemm(768, 3072, 1024, "bf16", compiled=True),
    *(_clipped_gemm(*sizes) for sizes in _GEMMS),
    *(_layer_norm(d, "bf16") for d in (768, 2048)),
    *(_head(op, "bf16") for op in ("head_losses", "head_gradient")),
    _tied(1024, "bf16"),
    _whole("bf16"),
]
for _dtype in ("bf16", "fp32"):
    ALL += [
        _rows("affine_norm", _gain_by("affine_norm"), _plain_affine, _dtype, compiled=_dtype == "bf16"),
        _rows("segment_sum", _gain_by("segment_sum"), _plain_sums, _dtype),
        _rows("row_norm_products", _gain_by("row_norm_products"), _plain_products, _dtype),
        _rows("embedding_norm", _embedding, _plain_embedding, _dtype, opacus=_opacus_embedding, plain_waits=True),
        _rows("clipped_embedding", _clipped_embedding, _plain_clipped_embedding, _dtype),
    ]
