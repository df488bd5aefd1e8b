"""Where rounding and underflow could let more through than C: found by search, kept."""

import pytest
import torch
from torch import nn

import fastclip
from fastclip import ops, reference, tape
from fastclip.units import Segments

COMPILED = pytest.mark.skipif(ops.backends()["cpp"]["state"] == "absent", reason="no compiled kernels on this machine")
BACKENDS = ["torch", pytest.param("cpp", marks=COMPILED)]
whole = torch.tensor


def exact(a, g):
    return float((g.double().T @ a.double()).norm())


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_rows_beside_large_ones(backend):
    """Squares of 1e-23 are nothing in fp32, and their partners may be 1e17."""
    a, g = torch.full((200, 512), 2.6e-23), torch.full((200, 128), 3e17)
    a[0], g[0] = torch.randn(512) * 1e-3, torch.randn(128) * 1e-3
    squares, spreads = ops.linear_norm_parts(a, g, whole([0, 200], dtype=torch.int32), backend=backend)
    assert float(squares[0].sqrt()) >= exact(a, g) * (1 - 2**-8)
    assert float(spreads[0]) >= float(a.double().norm(dim=1) @ g.double().norm(dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("length", [1, 3, 70])
def test_units_with_rows_beyond_measure_take_no_part(backend, dtype, length):
    large = 2.0**410 if dtype == torch.float64 else 2.0**110
    for big in (0, 1):
        pair = [torch.ones(2 * length, 5, dtype=dtype), torch.ones(2 * length, 4, dtype=dtype)]
        pair[big][length - 1] *= large
        pair[1 - big][length - 1] /= large
        offsets = whole([0, length, 2 * length], dtype=torch.int32)
        for route in ("gram", "direct"):
            squares = ops.linear_norm(*pair, offsets, route, backend=backend)
            assert torch.isinf(squares[0])
            assert float(squares[1]) == pytest.approx(20 * length**2, rel=1e-5)


def test_denormal_gradients_of_huge_inputs_stay_within_c():
    """factor * g is rounded up to the smallest number there is, and 3e38 makes that matter."""
    model = nn.Linear(64, 64)
    # Outputs that overflow in one order of addition and not in another are refused by the trial.
    model.weight.data *= 1e-3
    clipper = fastclip.attach(model, max_grad_norm=8.8e-4)
    with clipper.units(ids=torch.zeros(64, dtype=torch.int64)):
        (model(torch.full((64, 64), 3e38)) * 1.4e-45).nan_to_num(0, 0, 0).sum().backward()
    assert float(model.weight.grad.norm()) <= 8.8e-4 * (1 + tape.ROUNDING_SLACK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("route", ["gram", "direct", "auto"])
def test_what_cancels_below_fp64_is_bounded_from_above(backend, dtype, route):
    g = torch.tensor([[2.0**70], [1.0], [-(2.0**70)]], dtype=dtype)
    a = torch.ones(3, 4, dtype=dtype)
    square = ops.linear_norm(a, g, whole([0, 3], dtype=torch.int32), route, backend=backend)
    assert float(square) >= 4.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_products_that_underflow_are_not_taken_for_nothing(backend):
    a, g = torch.full((3, 40), 1.5e-162, dtype=torch.float64), torch.full((3, 50), 1e152, dtype=torch.float64)
    square = ops.linear_norm(a, g, whole([0, 3], dtype=torch.int32), "gram", backend=backend)
    assert float(square) >= float((g.T @ a).square().sum()) > 0


def test_a_head_that_cancels_its_embedding_in_fp64():
    torch.manual_seed(3)
    d, vocabulary = 6, 5
    x, delta = torch.randn(d).double() * 1e9, torch.randn(d).double()
    segments = Segments(None, whole([0, 2], dtype=torch.int32))
    ids, e = torch.tensor([2, 2]), torch.stack([x + delta, -x])
    z = torch.zeros(1, vocabulary).double()
    z[0, 2] = -1.0
    h = (delta + 1e-3 * torch.randn(d).double())[None]
    head = tape.LinearRows(h, z, Segments(None, whole([0, 1], dtype=torch.int32)))
    table = tape.EmbeddingRows(ids, e, segments, None)
    found = tape.measure([table, head], torch.float64)
    gradient = torch.zeros(vocabulary, d).double()
    gradient.index_add_(0, ids, e).add_(z.T @ h)
    assert float(found.square.sqrt()) >= float(gradient.norm()) * (1 - 2**-8)


def test_the_sums_precision_decides_about_its_rounding():
    rows = tape.LinearRows(torch.randn(9, 3).double(), torch.randn(9, 2).double(), Segments(None, whole([0, 9]).int()))
    narrow, wide = (tape.measure([rows], dtype).bound for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(narrow, wide * 2.0**29)


def test_the_norms_of_rows_are_never_below_the_exact_ones():
    x = torch.tensor([[1e-30, 0.0], [3e-23, 4e-23], [1e19, 1e19], [0.1, 0.2]])
    assert (reference._row_norms(x) >= x.double().norm(dim=1)).all()


def test_subnormal_rows_are_in_the_clipped_sum() -> None:
    """bf16 products take subnormal numbers for zeros: beside a row that one cancels, the sum would be larger than its norm."""
    a = torch.zeros(64, 32, dtype=torch.bfloat16)
    g = torch.zeros(64, 32, dtype=torch.bfloat16)
    tiny = 2.0**-127
    a[0, 0], g[0, 0] = tiny * 2, 2.0**99
    a[1, 0], g[1, 0] = tiny, -(2.0**100)  # the first one's opposite, and subnormal
    offsets = torch.tensor([0, 64])
    exact = g.double().T @ a.double()
    found = ops.clipped_gemm(a, g, offsets, torch.ones(1), torch.zeros(32, 32))
    assert found.double().norm() <= exact.norm() + 1e-20


@COMPILED
def test_a_long_head_that_cancels_its_embedding_is_measured_again():
    """By the direct route, whose fp32 sums of equal rows drift; what is left of the sum is 3 % of either."""
    torch.manual_seed(0)
    for _ in range(30):
        a, z = (torch.randn(1, n).expand(1000, n).contiguous() for n in (8, 40))
        gradient = z.double().T @ a.double()
        ids, e = torch.arange(40), (-0.97 * gradient).float()
        head = tape.LinearRows(a, z, Segments(None, whole([0, 1000], dtype=torch.int32)))
        tail = tape.EmbeddingRows(ids, e, Segments(None, whole([0, 40], dtype=torch.int32)), None)
        found = float(tape.measure([head, tail], torch.float32).square.sqrt())
        assert found >= float((gradient + e.double()).norm()) * (1 - 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_that_processors_flush(backend, dtype, flushed):
    """Each row is one element and many whose products with another row's are below 2^-126 each, and not together."""
    length, d = 1024, 2048
    a = torch.full((length, d), 1.05e-19)
    a[torch.arange(length), torch.arange(length)] = 1.03e-15
    a, g = a.to(dtype), torch.zeros(length, 2048, dtype=dtype)
    g[:, 0] = 1e4
    wanted = exact(a, g)
    torch.set_flush_denormal(flushed)
    try:
        found = float(ops.linear_norm(a, g, whole([0, length], dtype=torch.int32), "gram", backend=backend).sqrt())
    finally:
        torch.set_flush_denormal(False)
    assert found >= wanted * (1 - 1e-5)


def test_a_unit_whose_sum_overflows_takes_no_part():
    """Its norm is finite, and with a C beyond measure so is its factor; the sum in fp32 is not."""
    model = nn.Linear(256, 256, bias=False).to(torch.bfloat16)
    clipper = fastclip.attach(model, max_grad_norm=2.0**60, strict=False)
    x = torch.ones(2, 40, 256, dtype=torch.bfloat16)
    x[1] *= 2.0**70
    weights = torch.tensor([1.0, 2.0**70], dtype=torch.bfloat16)
    (model(x) * weights[:, None, None]).sum().backward()
    assert clipper.nonfinite_units == 1
    assert float(model.weight.grad.double().norm()) == pytest.approx(40 * 256, rel=1e-2)
