"""Triton's norms of linear layers and its clipped GEMM: in the interpreter, or on a GPU where there is one.

Exact values are fp64's. A kernel may be as far from them as twice torch's own sums in the same precision.
"""

import itertools

import numpy as np
import pytest
import torch
from kernel_cases import CASES, LENGTHS, Maker, cases_of, noise_calls

from fastclip import dispatch, ops, reference

pytest.importorskip("triton", reason="no triton on this machine")
pytestmark = [  # numpy says so in the interpreter; a GPU overflows without a word
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]  # the interpreter has no bf16
ROUTES = ("gram", "direct")
raw = torch.ops.fastclip


def run(op, *args):
    """The launcher; what the op returns or writes."""
    result = dispatch.run(op, "triton", *args)
    return args[4] if result is None else result


def guarded(x):
    """x in the middle of memory that is NaN elsewhere: (x, the margins)."""
    span = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    whole = torch.full((span + 256,), torch.nan, dtype=x.dtype, device=x.device)
    inside = whole[128 : 128 + span].as_strided(x.shape, x.stride())
    inside.copy_(x)
    return inside, (whole[:128], whole[128 + span :])


def guarded_args(args):
    margins = []

    def wrap(x):
        if isinstance(x, list):
            return [wrap(y) for y in x]
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or 0 in x.stride():
            return x
        x, around = guarded(x)
        margins.extend(around)
        return x

    return tuple(wrap(x) for x in args), margins


def squares_in(dtype, a, g, offsets):
    """fp64 [U]: what torch makes of it in the precision that dtype's sums have."""
    wide = reference.accumulation_dtype(dtype)
    units = [slice(i, j) for i, j in itertools.pairwise(offsets.tolist())]
    return torch.stack([(g[u].to(wide).mT @ a[u].to(wide)).square().sum().double() for u in units] or [a.new_zeros(0)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of("linear_norms"), ids=str)
def test_norms(case, dtype):
    args = case.make(dtype, DEVICE)
    inside, margins = guarded_args(args)
    found = run("linear_norms", *inside)
    assert all(x.isnan().all() for x in margins)
    assert torch.equal(found, run("linear_norms", *inside))
    wanted = case.exact(args)
    assert found.shape == wanted.shape and found.dtype == torch.float64
    for k, g in enumerate(args[1]):
        square, spread = found[k]
        exact = squares_in(torch.float64, args[0].double(), g.double(), args[2])
        slack = 2 * (squares_in(dtype, args[0], g, args[2]) - exact).abs() + 1e-6 * exact
        assert ((square - exact).abs() <= slack).all()
        assert ((spread >= wanted[k, 1] * (1 - 1e-12)) & (spread <= wanted[k, 1] * (1 + 1e-8))).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of("clipped_gemm"), ids=str)
def test_clipped_sums(case, dtype):
    args = case.make(dtype, DEVICE)
    out = args[4].clone()
    inside, margins = guarded_args(args)
    found = run("clipped_gemm", *inside)
    assert all(x.isnan().all() for x in margins)
    again = run("clipped_gemm", *inside[:4], out.clone(), args[5])
    assert torch.equal(found, again)
    wanted = case.exact((*args[:4], out, args[5]))
    in_torch = reference.clipped_gemm(*args[:4], out.clone(), args[5])
    slack = 2 * (in_torch.double() - wanted).abs().amax() if wanted.numel() else 0
    assert ((found.double() - wanted).abs() <= slack + 1e-6 * (1 + wanted.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of("row_norm_products"), ids=str)
def test_row_norm_products(case, dtype):
    args = case.make(dtype, DEVICE)
    wanted, found = case.exact(args), run("row_norm_products", *args)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=0)
    a, g, offsets = (x.double() for x in args)
    exact = a.norm(dim=1) * g.norm(dim=1)
    exact = torch.stack([exact[int(i) : int(j)].sum() for i, j in itertools.pairwise(offsets)] or [exact.new_zeros(0)])
    assert (found >= exact * (1 - 1e-12)).all()


def three_units(length, share):
    """The middle one's second half takes all but `share` from its first. a, g, offsets."""
    m = Maker(torch.float32, DEVICE)
    a, g = m.rows(3 * length, 24), m.rows(3 * length, 30)
    first, second = slice(length, length + length // 2), slice(length + length // 2, 2 * length)
    a[second], g[second] = a[first], -g[first] * (1 - share)
    return a, g, m.offsets([length] * 3)


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("route", ROUTES)
def test_rows_that_cancel_are_not_underestimated(share, route):
    for dtype in DTYPES:
        a, g, offsets = three_units(66, share)
        a, g = a.to(dtype), g.to(dtype)
        exact = squares_in(torch.float64, a.double(), g.double(), offsets)
        square, spread = run("linear_norms", a, [g], offsets, route)[0]
        cancel = spread**2 > 1.01 * reference.CANCELLING * 66 * exact
        assert bool(cancel[1]) == (share < 1)
        assert (square >= exact * (1 - torch.where(cancel, 1e-9, 1e-5))).all()
        assert (square <= exact * (1 + 1e-5) + 5e-12 * spread**2).all()


@pytest.mark.parametrize("route", ROUTES)
def test_one_layer_of_several_is_done_again_alone(route):
    a, g, offsets = three_units(66, 1e-6)
    plain = Maker(torch.float32, DEVICE).rows(198, 50)[:, 10:]
    together = run("linear_norms", a, [plain, g], offsets, route)
    for parts, x in zip(together, (plain, g), strict=True):
        exact = squares_in(torch.float64, a.double(), x.double(), offsets)
        assert ((parts[0] - exact).abs() <= 1e-5 * exact + 5e-12 * parts[1] ** 2).all()
        if route == "direct":  # the gram sum's bound is far more
            assert ((parts[0] - exact).abs() <= 1e-6 * exact).all()


@pytest.mark.parametrize("route", ROUTES)
def test_rows_too_small_or_too_large_for_fp32_products(route):
    m = Maker(torch.float32, DEVICE)
    a, g, offsets = m.rows(60, 20), m.rows(60, 33), m.offsets([10] * 6)
    a[:10] *= 1e-25
    a[10:20] *= 1e25
    a[20:25] *= 1e-30
    g[20:25] *= 1e28
    a[40:50] = 0
    a[55] *= 2.0**101
    exact = squares_in(torch.float64, a.double(), g.double(), offsets)
    square, spread = run("linear_norms", a, [g], offsets, route)[0]
    torch.testing.assert_close(square[:5], exact[:5], rtol=1e-5, atol=0)
    assert square[4] == spread[4] == 0
    assert square[5] == torch.inf


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_unit_reaches_nobody(value, dtype):
    m = Maker(dtype, DEVICE)
    a, g, offsets = m.rows(90, 20), m.rows(90, 33), m.offsets([20, 30, 40])
    clean = a.clone(), g.clone()
    a[22, 3], g[49, 7] = value, value
    for route in ROUTES:
        found, wanted = (run("linear_norms", x, [y], offsets, route)[0, 0] for x, y in ((a, g), clean))
        assert torch.equal(found[[0, 2]], wanted[[0, 2]]) and not found[1].isfinite()
    factors = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    sums = [
        run("clipped_gemm", x, y, offsets, factors, torch.zeros(33, 20, device=DEVICE), True)
        for x, y in ((a, g), clean)
    ]
    assert torch.equal(*sums)


@pytest.mark.parametrize("route", ROUTES)
def test_a_unit_has_the_same_bits_beside_others(route):
    m = Maker(torch.float32, DEVICE)
    a, g = m.rows(200, 20), m.rows(200, 33)
    together = run("linear_norms", a, [g], m.offsets([3, 70, 0, 127]), route)
    alone = run("linear_norms", a[3:73], [g[3:73]], m.offsets([70]), route)
    assert torch.equal(together[:, :, 1:2], alone)


def test_fp64_rows():
    m = Maker(torch.float64, DEVICE)
    a, g, offsets, factors = m.rows(73, 20), m.rows(73, 33), m.offsets([3, 70]), m.factors(2)
    for route in ROUTES:
        found = run("linear_norms", a, [g], offsets, route)
        torch.testing.assert_close(found, reference.linear_norms(a, [g], offsets, route), rtol=1e-11, atol=0)
        found, narrow = run("linear_norms", a, [g.half()], offsets, route), g.half().double()
        torch.testing.assert_close(found, reference.linear_norms(a, [narrow], offsets, route), rtol=1e-11, atol=0)
    for x, y in ((a, g), (a.half(), g.half())):
        out = m.out(33, 20)
        wanted = reference.clipped_gemm(x, y, offsets, factors, out.clone())
        torch.testing.assert_close(
            run("clipped_gemm", x, y, offsets, factors, out, True), wanted, rtol=1e-12, atol=1e-12
        )


def test_rows_of_two_dtypes():
    m = Maker(torch.float32, DEVICE)
    a, g, offsets = m.rows(73, 20).half(), m.rows(73, 33), m.offsets([3, 70])
    found = run("linear_norms", a, [g], offsets, "auto")
    torch.testing.assert_close(found, reference.linear_norms(a, [g], offsets), rtol=1e-6, atol=0)
    wanted = reference.clipped_gemm(a, g, offsets, m.factors(2), torch.zeros(33, 20, device=DEVICE))
    m = Maker(torch.float32, DEVICE)
    m.rows(73, 20), m.rows(73, 33)
    found = run("clipped_gemm", a, g, offsets, m.factors(2), torch.zeros(33, 20, device=DEVICE), True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("linear_norms", {"a": torch.ones(4, 2, dtype=torch.int32)}, "floating point"),
        ("linear_norms", {"a": torch.ones(3, 2)}, "same N"),
        ("clipped_gemm", {"out": torch.zeros(3, 2).half()}, "out must be fp32 or fp64"),
        ("clipped_gemm", {"out": torch.zeros(2, 3).T}, "dense rows"),
        ("clipped_gemm", {"factors": torch.ones(1)}, r"factors must be \[U\]"),
        ("clipped_gemm", {"g": torch.ones(3, 3)}, r"g \[N, p\]"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(op, change, message):
    x = {"a": torch.ones(4, 2), "g": torch.ones(4, 3), "factors": torch.ones(2), "out": torch.zeros(3, 2)} | change
    x = {name: value.to(DEVICE) for name, value in x.items()}
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32, device=DEVICE)
    rest = (x["factors"], x["out"], True)
    with pytest.raises(ValueError, match=message):
        run(op, x["a"], *([x["g"]], offsets) if op == "linear_norms" else (x["g"], offsets, *rest))
    assert not x["out"].any()


@pytest.mark.skipif(ON_GPU, reason="bf16 is refused in the interpreter alone")
def test_bf16_is_refused_in_the_interpreter():
    offsets = torch.tensor([0, 4])
    a = torch.ones(4, 2, dtype=torch.bfloat16)
    for op, args in (
        ("linear_norms", ([a], offsets, "auto")),
        ("row_norm_products", (a, offsets)),
        ("clipped_gemm", (a, offsets, torch.ones(1), torch.zeros(2, 2), True)),
    ):
        with pytest.raises(ValueError, match="bf16 cannot run in Triton's interpreter"):
            run(op, a, *args)


def test_constants_are_those_of_the_reference():
    from fastclip.kernels import linear_norms as ours

    for name in ("NORM_SLACK", "CANCELLING", "LARGEST_ROW", "LARGEST_ROW_FP64"):
        assert getattr(ours, name) == getattr(reference, name)


def first_of_each_op():
    calls = {case.op: case for case in reversed(CASES)}
    return [(op, case.make(torch.float32, DEVICE)) for op, case in calls.items()] + list(noise_calls().items())


@pytest.mark.parametrize(("op", "args"), first_of_each_op(), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(op, args):
    if op in noise_calls() and ops.backends()["cpp"]["state"] == "absent":
        pytest.skip("noise ops have no default in Python, and nothing is compiled here")
    torch.library.opcheck(getattr(raw, op).default, args, test_utils=("test_schema", "test_faketensor"))


def test_every_length_is_there():
    """The registry is what these tests rest on."""
    assert {0, 1, 7, 63, 64, 65, 130} <= {n for lengths in LENGTHS.values() for n in lengths}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_of_the_gram_sum_bounds_it(dtype):
    from fastclip.kernels import configs, gram_norm, tiles
    from fastclip.kernels.row_norms import row_norms

    m = Maker(dtype, DEVICE)
    a, g, offsets = m.rows(70, 130), m.rows(70, 200), m.offsets([70])
    a[35:], g[35:] = a[:35], -g[:35] * 0.99
    norms = torch.empty(2, 70, dtype=torch.float64, device=DEVICE)
    row_norms(a, norms[0]), row_norms(g, norms[1])
    parts = torch.empty(1, 3, 2, dtype=torch.float64, device=DEVICE)
    kind = configs.dtype_class(a)
    starts = tiles.tile_starts(offsets, 70, configs.GRAM_BLOCK)
    gram_norm.gram_parts(parts, starts, a, [g], offsets, norms, kind)
    exact = squares_in(torch.float64, a.double(), g.double(), offsets)[0]
    total, bound = parts[0].sum(0)
    spread = (norms[0] * norms[1]).sum()
    assert 0 < (total - exact).abs() <= bound
    # Far below what Cauchy-Schwarz over both factors gives.
    assert bound < 0.2 * 2 * gram_norm.gamma(dtype, 200, configs.GRAM[kind].blocks["BLOCK_K"]) * spread**2


def test_rows_may_stand_further_apart_than_32_bits_count():
    step, rows = 2**30, 4
    try:
        memory = torch.from_numpy(
            np.empty(step * (rows - 1) + 8, dtype=np.float16)
        )  # pages nobody touches take no room
    except MemoryError:
        pytest.skip("this machine does not promise 6 GB")
    if ON_GPU:
        pytest.skip("6 GB of pages that nobody touches are the host's alone")
    a = memory.as_strided((rows, 8), (step, 1))
    g = Maker(torch.float16, DEVICE).rows(rows, 5)
    a.copy_(Maker(torch.float16, DEVICE).rows(rows, 8))
    offsets = torch.tensor([0, rows], dtype=torch.int32)
    for route in ROUTES:
        found = run("linear_norms", a, [g], offsets, route)
        assert torch.equal(found, run("linear_norms", a.contiguous(), [g], offsets, route))
    out = [run("clipped_gemm", x, g, offsets, torch.ones(1), torch.zeros(5, 8), True) for x in (a, a.contiguous())]
    assert torch.equal(*out)


@pytest.mark.parametrize("route", ROUTES)
def test_searched_for_rows_are_not_underestimated(route):
    """Rows are changed at random, and what brings the computed norm further below the exact one is kept."""
    length, m = 12, Maker(torch.float32, DEVICE)
    offsets, generator = m.offsets([length]), m.generator
    a, g = m.rows(length, 8), m.rows(length, 16)
    a[6:], g[6:] = a[:6], -g[:6] * 0.5
    worst = -1.0
    for _ in range(25):
        x, y = a.clone(), g.clone()
        step = 10.0 ** -float(torch.randint(0, 6, (), generator=generator))
        x += step * torch.randn(x.shape, generator=generator).to(DEVICE)
        y += step * torch.randn(y.shape, generator=generator).to(DEVICE)
        found = run("linear_norms", x, [y], offsets, route)[0, 0, 0]
        exact = squares_in(torch.float64, x.double(), y.double(), offsets)[0]
        shortfall = float(1 - found / exact)
        assert shortfall <= 1e-5
        if shortfall > worst:
            worst, a, g = shortfall, x, y


def test_more_tiles_than_programs_of_a_unit():
    from fastclip.kernels.direct_norm import SLICES

    m = Maker(torch.float32, DEVICE)
    a, g, offsets = m.rows(4, 16 * SLICES + 64 * 20), m.rows(4, 300), m.offsets([1, 3])
    assert -(-a.shape[1] // 64) * 5 > SLICES
    found = run("linear_norms", a, [g], offsets, "direct")[0, 0]
    exact = squares_in(torch.float64, a.double(), g.double(), offsets)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
