"""The ops below every layer against fp64 formulas written out unit by unit, over shapes, dtypes, strides and units.

An fp32 sum of products is off by roundings of the sum of their magnitudes, however small the sum itself comes out: norms
are held to 1e-5 of the value plus 1e-6 of that sum, sums of n terms to the proven bound of (n + 2) roundings.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastclip import ops

sweep = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.sampled_from([1, 2, 3, 5, 17, 33])
routes = st.sampled_from(["gram", "direct", "auto"])


@dataclass(frozen=True)
class Rows:
    """A way to make rows [N, width] for the units that `offsets` describe."""

    lengths: list[int]
    dtype: torch.dtype
    layout: str
    seed: int

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    @property
    def num_rows(self) -> int:
        return sum(self.lengths)

    def make(self, width: int, stream: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10 + stream)
        n = self.num_rows
        shape = {"transposed": (width, n), "strided": (n, 2 * width), "expanded": (1, width)}.get(
            self.layout, (n, width)
        )
        base = torch.randn(shape, generator=generator).to(self.dtype)
        view = {"transposed": base.t, "strided": lambda: base[:, ::2], "expanded": lambda: base.expand(n, width)}
        return view.get(self.layout, lambda: base)()

    def ids(self, vocabulary: int) -> Tensor:
        return torch.randint(vocabulary, (self.num_rows,), generator=torch.Generator().manual_seed(self.seed + 7))

    def factors(self) -> Tensor:
        return torch.rand(len(self.lengths), generator=torch.Generator().manual_seed(self.seed + 8))

    def units(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Each unit's rows of each tensor, floating ones in fp64."""
        wide = [x.double() if x.is_floating_point() else x for x in tensors]
        return list(zip(*[x.split(self.lengths) for x in wide], strict=True))


backends = st.sampled_from([None, "torch"])  # what the device gets, and plain torch
rows = st.builds(
    Rows,
    st.lists(st.sampled_from([0, 1, 2, 3, 7, 70]), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    st.integers(0, 1000),
)


def spread(a: Tensor, g: Tensor) -> float:
    """sum_t |a_t||g_t|, the magnitude of what is summed."""
    return float((a.norm(dim=1) * g.norm(dim=1)).sum())


def assert_norms(actual: Tensor, exact: list[float], magnitudes: list[float]) -> None:
    """Squared norms within 1e-5, and 1e-6 of what cancelled."""
    assert actual.shape == (len(exact),)
    for value, truth, magnitude in zip(actual.tolist(), exact, magnitudes, strict=True):
        assert abs(value - truth) <= 1e-5 * truth + 1e-6 * magnitude**2, (actual.tolist(), exact)


def assert_sums(actual: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """fp32 sums of ``terms`` products: equal rows round the same way every time, and come close to the bound."""
    assert actual.shape == exact.shape
    allowed = (terms + 2) * 2.0**-24 * magnitude + 2.0**-23 * exact.abs()
    assert bool(((actual.double() - exact).abs() <= allowed).all()), (actual, exact)


@sweep
@given(rows, sizes, sizes, routes, backends)
def test_linear_norm(rows: Rows, d: int, p: int, route: str, backend: ops.Backend | None) -> None:
    a, g = rows.make(d), rows.make(p, 1)
    units = rows.units(a, g)
    exact = [float((g_u.t() @ a_u).square().sum()) for a_u, g_u in units]
    magnitudes = [spread(*unit) for unit in units]
    squares, products = ops.linear_norm_parts(a, g, rows.offsets, route, backend=backend)
    assert_norms(squares, exact, magnitudes)
    for value, magnitude in zip(products.tolist(), magnitudes, strict=True):
        assert magnitude * (1 - 1e-12) <= value <= magnitude * 1.03


@sweep
@given(rows, sizes, st.sampled_from([1, 3, 50]), st.sampled_from([None, 0]))
def test_embedding_norm(rows: Rows, d: int, vocabulary: int, padding_idx: int | None) -> None:
    ids, g = rows.ids(vocabulary), rows.make(d)
    exact, magnitudes = [], []
    for ids_u, g_u in rows.units(ids, g):
        kept = [v for v in set(ids_u.tolist()) if v != padding_idx]
        exact.append(sum(float(g_u[ids_u == v].sum(0).square().sum()) for v in kept))
        magnitudes.append(float(g_u.norm(dim=1).sum()))
    assert_norms(ops.embedding_norm(ids, g, rows.offsets, padding_idx), exact, magnitudes)


@sweep
@given(rows, sizes, st.booleans())
def test_affine_norm_and_segment_sum(rows: Rows, p: int, gain: bool) -> None:
    g = rows.make(p)
    x_hat = rows.make(p, 1) if gain else None
    products = [g_u * x_u for g_u, x_u in rows.units(g, torch.ones_like(g) if x_hat is None else x_hat)]
    sums = torch.stack([product.sum(0) for product in products])
    magnitudes = [float(product.norm(dim=1).sum()) for product in products]
    assert_norms(ops.affine_norm(g, x_hat, rows.offsets), [float(s.square().sum()) for s in sums], magnitudes)
    assert_sums(
        ops.segment_sum(g, x_hat, rows.offsets),
        sums,
        torch.stack([x.abs().sum(0) for x in products]),
        max(rows.lengths),
    )


@sweep
@given(rows, rows, st.sampled_from([1, 3, 17]), st.sampled_from([1, 4, 50]), st.sampled_from([None, 0]))
def test_tied_cross(head: Rows, table: Rows, d: int, vocabulary: int, padding_idx: int | None) -> None:
    """The norm of embedding + head from three ops is the norm of the gradient that they share."""
    units = min(len(head.lengths), len(table.lengths))
    head = Rows(head.lengths[:units], head.dtype, head.layout, head.seed)
    table = Rows(table.lengths[:units], head.dtype, table.layout, table.seed)
    h, z, ids, e = head.make(d), head.make(vocabulary, 1), table.ids(vocabulary), table.make(d, 2)
    exact, magnitudes = [], []
    for (h_u, z_u), (ids_u, e_u) in zip(head.units(h, z), table.units(ids, e), strict=True):
        kept = e_u * (ids_u != (-1 if padding_idx is None else padding_idx))[:, None]
        weight = (z_u.t() @ h_u).index_add(0, ids_u, kept)
        exact.append(float(weight.square().sum()))
        magnitudes.append(spread(h_u, z_u) + float(e_u.norm(dim=1).sum()))
    actual = ops.linear_norm(h, z, head.offsets) + ops.embedding_norm(ids, e, table.offsets, padding_idx)
    actual = actual + 2 * ops.tied_cross(h, z, head.offsets, ids, e, table.offsets, padding_idx)
    assert_norms(actual, exact, magnitudes)


@sweep
@given(rows, sizes, sizes)
def test_clipped_gemm(rows: Rows, d: int, p: int) -> None:
    a, g, factors = rows.make(d), rows.make(p, 1), rows.factors()
    before = torch.randn(p, d, generator=torch.Generator().manual_seed(rows.seed + 9))
    exact, magnitude = before.double(), before.double().abs()
    for (a_u, g_u), factor in zip(rows.units(a, g), factors.double(), strict=True):
        exact = exact + factor * g_u.t() @ a_u
        magnitude = magnitude + factor * g_u.t().abs() @ a_u.abs()
    out = before.clone()
    assert ops.clipped_gemm(a, g, rows.offsets, factors, out) is out
    assert_sums(out, exact, magnitude, sum(rows.lengths) + 1)


@sweep
@given(rows, sizes, st.sampled_from([None, 0]))
def test_clipped_embedding(rows: Rows, d: int, padding_idx: int | None) -> None:
    ids, g, factors = rows.ids(5), rows.make(d), rows.factors()
    exact = torch.ones(5, d, dtype=torch.float64)
    magnitude = exact.clone()
    for (ids_u, g_u), factor in zip(rows.units(ids, g), factors.double(), strict=True):
        scaled = factor * g_u * (ids_u != (-1 if padding_idx is None else padding_idx))[:, None]
        exact.index_add_(0, ids_u, scaled)
        magnitude.index_add_(0, ids_u, scaled.abs())
    out = torch.ones(5, d)
    assert ops.clipped_embedding(ids, g, rows.offsets, factors, out, padding_idx) is out
    assert_sums(out, exact, magnitude, sum(rows.lengths) + 1)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("route", ["gram", "direct", "auto"])
@pytest.mark.parametrize("bits", range(0, 23, 2))
def test_a_unit_that_cancels_is_not_underestimated(backend: ops.Backend | None, route: str, bits: int) -> None:
    """Rows come in pairs (a, g), (a, -(1 - 2^-bits) g): the sum is 2^-bits of what is summed.

    An op may add a bound of its rounding to what it returns, in proportion to what is summed.
    """
    a, half = torch.randn(8, 40), torch.randn(8, 40)
    a, g = torch.cat([a, a]), torch.cat([half, -half * (1 - 2.0**-bits)])
    exact = float((g.double().t() @ a.double()).norm())
    actual = float(ops.linear_norm(a, g, torch.tensor([0, 16], dtype=torch.int32), route, backend=backend)[0]) ** 0.5
    assert exact * (1 - 1e-6) <= actual <= exact * (1 + 1e-5) + 1e-5 * spread(a, g)


Op = Callable[[Tensor, Tensor, Tensor], Tensor]
IDS = torch.tensor([2, 0, 2, 1, 1, 0, 2, 2, 1])
NORMS: dict[str, Op] = {
    "gram": lambda a, g, offsets: ops.linear_norm(a, g, offsets, "gram"),
    "direct": lambda a, g, offsets: ops.linear_norm(a, g, offsets, "direct"),
    "gram_torch": lambda a, g, offsets: ops.linear_norm(a, g, offsets, "gram", backend="torch"),
    "direct_torch": lambda a, g, offsets: ops.linear_norm(a, g, offsets, "direct", backend="torch"),
    "embedding": lambda a, g, offsets: ops.embedding_norm(IDS, g, offsets),
    "embedding_padding": lambda a, g, offsets: ops.embedding_norm(IDS, g, offsets, 2),
    "bias": lambda a, g, offsets: ops.affine_norm(g, None, offsets),
    "gain": lambda a, g, offsets: ops.affine_norm(g, a, offsets),
    "tied_cross": lambda a, g, offsets: ops.tied_cross(a, g, offsets, IDS, g, offsets),
}
OFFSETS = torch.tensor([0, 2, 2, 5, 9], dtype=torch.int32)


def pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(9, 7).to(dtype), torch.randn(9, 7).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("op", NORMS)
def test_a_nonfinite_unit_leaves_the_bits_of_the_others(op: str, value: float, dtype: torch.dtype) -> None:
    a, g = pair(dtype)
    clean = NORMS[op](a, g, OFFSETS)
    g[3, 4] = value
    poisoned = NORMS[op](a, g, OFFSETS)
    others = [0, 1, 3]
    assert torch.equal(poisoned[others], clean[others])
    assert clean.isfinite().all() and clean[1] == 0
    assert not poisoned[2].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("where", ["a", "g", "both"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_factor_zero_keeps_a_nonfinite_unit_out_of_the_sums(value: float, where: str, dtype: torch.dtype) -> None:
    a, g = pair(dtype)
    factors = torch.tensor([0.5, 1.0, 0.0, 0.25])
    gemm = ops.clipped_gemm(a, g, OFFSETS, factors, torch.zeros(7, 7))
    table = ops.clipped_embedding(IDS, g, OFFSETS, factors, torch.zeros(3, 7))
    for name, tensor in (("a", a), ("g", g)):
        if where in (name, "both"):
            tensor[3, 4] = value
    assert torch.equal(ops.clipped_gemm(a, g, OFFSETS, factors, torch.zeros(7, 7)), gemm)
    assert torch.equal(ops.clipped_embedding(IDS, g, OFFSETS, factors, torch.zeros(3, 7)), table)
    assert gemm.abs().sum() > 0 and table.abs().sum() > 0


@pytest.mark.parametrize("op", NORMS)
def test_a_unit_of_no_rows_has_norm_zero(op: str) -> None:
    empty = torch.zeros(0, 7)
    norms = NORMS[op](*pair(torch.float32), OFFSETS)
    assert norms[1] == 0 and (norms[[0, 2]] != 0).all()
    if "embedding" not in op and op != "tied_cross":
        assert NORMS[op](empty, empty, torch.zeros(3, dtype=torch.int32)).tolist() == [0.0, 0.0]


def test_offsets_changed_in_place_are_checked_again() -> None:
    a, offsets = torch.ones(4, 2), torch.tensor([0, 2, 4], dtype=torch.int32)
    for _ in range(2):
        ops.linear_norm(a, a, offsets)
    for wrong in ([0, 5, 4], [0, 2, 3], [1, 2, 4]):
        offsets.copy_(torch.tensor(wrong))
        with pytest.raises(ValueError, match="offsets must rise"):
            ops.linear_norm(a, a, offsets)
    offsets.copy_(torch.tensor([0, 2, 4]))
    ops.linear_norm(a, a, offsets)
    with pytest.raises(ValueError, match="offsets must rise"):
        ops.linear_norm(a[:3], a[:3], offsets)
    with torch.inference_mode():
        ops.linear_norm(a, a, torch.tensor([0, 2, 4], dtype=torch.int32))
