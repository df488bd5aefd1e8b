"""Inputs of every op, once: for the kernels' values, for opcheck and for timing.

A case makes the arguments of its op's schema for a dtype and a device, always the same ones. Lengths stand on both sides of
what kernels cut rows into, widths likewise; units without rows stand among the others, and rows lie in memory in every way
that callers have. ``exact`` is the op in plain torch on fp64 copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastclip import reference, reference_head
from fastclip.dispatch import plain
from fastclip.random import Key

LENGTHS = {
    "ragged": [1, 7, 0, 65, 130],
    "around 64": [63, 64, 0],
    "one row each": [1, 1, 1],
    "one unit": [70],
    "no rows": [0, 0],
    "no unit": [],
}
# (name, rows, words, d, layout, soft-capping: with a bias)
HEADS = [
    ("one row", 1, 1, 1, "dense", 0.0),
    ("ragged", 7, 130, 17, "dense", 3.0),
    ("64 rows", 64, 64, 16, "dense", 0.0),
    ("65 rows", 65, 63, 64, "dense", 0.0),
    ("130 rows", 130, 77, 33, "dense", 2.0),
    ("several spans", 3, 8195, 5, "dense", 0.0),
    ("no rows", 0, 9, 5, "dense", 0.0),
    *((layout, 9, 21, 13, layout, 4.0) for layout in ("transposed", "strided", "expanded")),
]
WIDTHS = [(1, 1), (7, 130), (130, 17), (64, 65)]
LAYOUTS = ("dense", "transposed", "strided", "expanded")
Make = Callable[[torch.dtype, torch.device], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Make

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"

    def exact(self, args: tuple[Any, ...]) -> Tensor:
        """fp64: what the op returns, or leaves in the argument that it writes."""
        return joined(plain(self.op)(*(_double(x) for x in args)))


def joined(result: Any) -> Any:
    """An op's results as one tensor."""
    return torch.cat([x.flatten().double() for x in result]) if isinstance(result, tuple) else result


def _double(x: Any) -> Any:
    if isinstance(x, list):
        return [_double(y) for y in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


class Maker:
    """Arguments from one seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device, layout: str = "dense") -> None:
        self.generator = torch.Generator().manual_seed(20260101)
        self.dtype, self.device, self.layout = dtype, device, layout

    def offsets(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(self.device)

    def rows(self, count: int, columns: int) -> Tensor:
        """[count, columns] in the layout."""
        if self.layout == "expanded":
            x = torch.randn(1, columns, generator=self.generator).expand(count, columns)
        else:
            x = torch.randn(count, 2 * columns, generator=self.generator)
        x = x.to(self.dtype).to(self.device)
        if self.layout == "transposed":
            return x[:, :columns].t().contiguous().t()
        if self.layout == "strided":
            return x[:, ::2]
        return x if self.layout == "expanded" else x[:, :columns].contiguous()

    def ids(self, count: int, most: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, most, (count,), generator=self.generator, dtype=dtype).to(self.device)

    def factors(self, count: int) -> Tensor:
        """In (0, 1], every fifth 0."""
        x = torch.rand(count, generator=self.generator) + 0.01
        x[3::5] = 0
        return x.to(self.device)

    def out(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(reference.accumulation_dtype(self.dtype)).to(self.device)


def _case(op: str, name: str, make: Callable[[Maker], tuple[Any, ...]], layout: str = "dense") -> Case:
    return Case(op, name, lambda dtype, device: make(Maker(dtype, device, layout)))


def _shapes() -> list[tuple[str, list[int], int, int, str]]:
    """(name, lengths, d, p, layout): every length, every width and every layout, not every combination."""
    found = [(name, lengths, 17, 33, "dense") for name, lengths in LENGTHS.items()]
    found += [(f"{d} x {p}", LENGTHS["ragged"], d, p, "dense") for d, p in WIDTHS]
    return found + [(layout, LENGTHS["ragged"], 20, 40, layout) for layout in LAYOUTS[1:]]


def _linear_norms(lengths: list[int], d: int, widths: list[int], route: str) -> Callable[[Maker], tuple[Any, ...]]:
    n = sum(lengths)
    return lambda m: (m.rows(n, d), [m.rows(n, p) for p in widths], m.offsets(lengths), route)


def _cases() -> list[Case]:
    found = []
    for route in ("gram", "direct"):
        for name, lengths, d, p, layout in _shapes():
            found.append(_case("linear_norms", f"{name}, {route}", _linear_norms(lengths, d, [p], route), layout))
        shared = _linear_norms([3, 0, 66], 20, [9, 70, 9, 33], route)
        found.append(_case("linear_norms", f"one a for four, {route}", shared))
    mixed = _linear_norms([5, 20, 40, 0, 64], 20, [33], "auto")
    found.append(_case("linear_norms", "both routes", mixed))
    for name, lengths, d, p, layout in _shapes():
        n, units = sum(lengths), len(lengths)

        def rows(m: Maker, n: int = n, d: int = d, p: int = p, lengths: list[int] = lengths) -> tuple[Any, ...]:
            return m.rows(n, d), m.rows(n, p), m.offsets(lengths)

        def sums(m: Maker, units: int = units, d: int = d, p: int = p, rows: Any = rows) -> tuple[Any, ...]:
            return *rows(m), m.factors(units), m.out(p, d)

        def embedding(m: Maker, n: int = n, d: int = d, lengths: list[int] = lengths) -> tuple[Any, ...]:
            return m.ids(n, 11), m.rows(n, d), m.offsets(lengths)

        def into_table(m: Maker, units: int = units, d: int = d, embedding: Any = embedding) -> tuple[Any, ...]:
            return *embedding(m), m.factors(units), m.out(13, d)

        def tied(m: Maker, n: int = n, d: int = d, lengths: list[int] = lengths, rows: Any = rows) -> tuple[Any, ...]:
            h, z = m.rows(n, d), m.rows(n, 11)
            return h, z, m.offsets(lengths), m.ids(n, 11), m.rows(n, d), m.offsets(lengths)

        def gain(m: Maker, n: int = n, p: int = p, lengths: list[int] = lengths) -> tuple[Any, ...]:
            return m.rows(n, p), m.rows(n, p), m.offsets(lengths)

        def norm(m: Maker, p: int = p, gain: Any = gain, rms: bool = "3" in name) -> tuple[Any, ...]:
            g, x, offsets = gain(m)
            wide = x.to(reference.accumulation_dtype(x.dtype))
            mean = torch.zeros_like(wide[:, 0]) if rms else wide.mean(1)
            rstd = (wide - mean[:, None]).square().mean(1).add(1e-5).rsqrt()
            return g, x, None if rms else mean, rstd, None if rms else m.rows(1, p)[0].contiguous(), offsets, not rms

        found += [
            _case("layer_norm_backward", name, norm, layout),
            _case("row_norm_products", name, rows, layout),
            _case("clipped_gemm", name, lambda m, sums=sums: (*sums(m), True), layout),
            _case("embedding_norm", name, lambda m, embedding=embedding: (*embedding(m), 2), layout),
            _case("clipped_embedding", name, lambda m, into_table=into_table: (*into_table(m), 2), layout),
            _case("tied_cross", name, lambda m, tied=tied: (*tied(m), 2), layout),
            _case("affine_norm", name, gain, layout),
            _case("segment_sum", name, gain, layout),
        ]
    for name, rows, words, d, layout, softcap in HEADS:

        def head(m: Maker, rows: int = rows, words: int = words, d: int = d, bias: bool = softcap > 0) -> list[Any]:
            return [m.rows(rows, d), m.rows(words, d), m.rows(1, words)[0] if bias else None, m.ids(rows, words)]

        def words_of(m: Maker, head: Any = head, words: int = words, softcap: float = softcap) -> tuple[Any, ...]:
            h, weight, bias, labels = head(m)
            lse = reference_head.head_losses(
                h.cpu(), weight.cpu(), None if bias is None else bias.cpu(), labels.cpu(), softcap
            )
            g = m.factors(len(labels)).to(lse.dtype)
            first, stop = words // 3, max(words // 3 + 1, words - 5)
            bias = None if bias is None else bias[first:stop]
            return h, weight[first:stop], bias, labels, lse[1].to(m.device), g, first, softcap

        found.append(_case("head_losses", name, lambda m, head=head, softcap=softcap: (*head(m), softcap), layout))
        found.append(_case("head_gradient", name, words_of, layout))
    found.append(_case("clipped_gemm", "written over", lambda m: (*_written_over(m), False)))
    for shape in ((), (5, 3), (1000,)):

        def whole(m: Maker, shape: tuple[int, ...] = shape) -> tuple[Any, ...]:
            return m.rows(4, max(1, torch.Size(shape).numel())).view(4, *shape), m.factors(4), m.out(*shape)

        found.append(_case("clipped_sum", f"{list(shape)}", whole))
    return found


def _written_over(m: Maker) -> tuple[Any, ...]:
    return m.rows(70, 20), m.rows(70, 33), m.offsets([30, 40]), m.factors(2), m.out(33, 20).fill_(torch.nan)


def noise_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of the noise ops' schemas, on CPU."""
    stream = (1.5, 1.0, Key(bytes(range(32))).tensor(), 5)
    draws = (*stream, [7], [3])
    adam = [[torch.rand(70)] for _ in range(4)]
    return {
        "add_noise": (torch.randn(70), torch.zeros(70), *stream, 7, 3),
        "clip_accumulate_noise": ([torch.randn(3, 70)], torch.rand(3), [torch.zeros(70)], *draws),
        "noise_adamw": (*adam, *draws, 0.1, 0.9, 0.99, 1e-8, 0.1, [2]),
        "noise_sgd": (*adam[:3], *draws, 0.1, 0.9, 0.0, 0.1, False, False),
    }


CASES = _cases()


def cases_of(*ops: str) -> list[Case]:
    return [case for case in CASES if case.op in ops]
