"""Every compiled op beside its plain formulation in fp64: shapes, dtypes, ragged units, what must not spread, bad input."""

import itertools

import pytest
import torch

from fastclip import ops, reference
from fastclip.random import Key, nonce
from kernels import needs_kernels

pytestmark = needs_kernels
BOUNDS = {
    "ragged": [0, 3, 3, 20, 21, 52],
    "one row each": list(range(8)),
    "one unit": [0, 130],
    "all empty": [0, 0, 0],
    "no unit": [0],
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.fixture(params=BOUNDS.values(), ids=BOUNDS)
def offsets(request):
    return torch.tensor(request.param, dtype=torch.int32)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def rows(offsets, columns, dtype=torch.float32, strided=False):
    x = torch.randn(int(offsets[-1]), 2 * columns if strided else columns)
    return (x[:, ::2] if strided else x).to(dtype)


def close(found, wanted, dtype):
    assert found.dtype == wanted.dtype or wanted.dtype == torch.float64
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(found.double(), wanted.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def wide(*tensors):
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]


@pytest.mark.parametrize("columns", [1, 7, 600])
@pytest.mark.parametrize("gain", [False, True])
def test_affine(offsets, dtype, columns, gain):
    g, x = rows(offsets, columns, dtype), rows(offsets, columns, dtype, strided=True) if gain else None
    sums = ops.segment_sum(g, x, offsets, backend="cpp")
    assert sums.dtype == reference.accumulation_dtype(dtype)
    close(sums, reference.segment_sum(*wide(g, x), offsets), dtype)
    squares = ops.affine_norm(g, x, offsets, backend="cpp")
    close(squares, sums.double().square().sum(1), torch.float64)  # of the very same numbers


def test_a_norm_is_of_the_sums_own_numbers_also_beside_wider_factors():
    g, x, offsets = torch.full((2, 1), 1e-30), torch.full((2, 1), 2e-15, dtype=torch.float64), torch.tensor([0, 1, 2])
    sums = ops.segment_sum(g, x, offsets, backend="cpp")  # a subnormal, to which rounding does most
    assert sums.dtype == torch.float32 and 0 < float(sums[0, 0]) < 1.5e-45
    assert torch.equal(ops.affine_norm(g, x, offsets, backend="cpp"), sums.double().square().sum(1))


def statistics(x, rms=False):
    wide = x.to(reference.accumulation_dtype(x.dtype))
    mean = None if rms else wide.mean(1)
    return mean, (wide if rms else wide - mean[:, None]).square().mean(1).add(1e-2).rsqrt()


@pytest.mark.parametrize("columns", [1, 7, 600])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm_backward(offsets, dtype, columns, rms, affine):
    g, x = rows(offsets, columns, dtype), rows(offsets, columns, dtype, strided=True)
    mean, rstd = statistics(x, rms)
    args = mean, rstd, torch.randn(columns, dtype=dtype) if affine else None
    dx, sums = ops.layer_norm_backward(g, x, *args, offsets, not rms, backend="cpp")
    wanted = reference.layer_norm_backward(*wide(g, x, *args), offsets, not rms)
    assert dx.dtype == dtype
    assert sums.dtype == reference.accumulation_dtype(dtype)
    close(sums, wanted[1], dtype)
    rounding = max(TOLERANCE[dtype], torch.finfo(dtype).eps)
    atol = TOLERANCE[dtype] * float(torch.cat([wanted[0].abs().flatten(), rstd.double(), torch.zeros(1)]).max())
    torch.testing.assert_close(dx.double(), wanted[0], rtol=rounding, atol=atol)


def test_a_long_unit_of_a_layer_norm_is_split_at_the_same_places():
    offsets = torch.tensor([0, 3, 600, 600, 1400])
    g, x = rows(offsets, 40), rows(offsets, 40)
    args = (g, x, *statistics(x), torch.randn(40), offsets, True)
    for found, wanted in zip(
        ops.layer_norm_backward(*args), reference.layer_norm_backward(*wide(*args[:5]), *args[5:]), strict=True
    ):
        close(found, wanted, torch.float32)


@pytest.mark.parametrize("columns", [1, 9, 64])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_embedding(offsets, dtype, columns, padding, ids_dtype):
    ids, g = torch.randint(0, 11, (int(offsets[-1]),), dtype=ids_dtype), rows(offsets, columns, dtype)
    found = ops.embedding_norm(ids, g, offsets, padding, backend="cpp")
    close(found, reference.embedding_norm(ids, g.double(), offsets, padding), dtype)
    factors = torch.rand(offsets.numel() - 1, dtype=torch.float64)
    out_dtype = reference.accumulation_dtype(dtype)
    out = torch.randn(13, columns, dtype=out_dtype)
    wanted = reference.clipped_embedding(ids, g.double(), offsets, factors, out.double(), padding)
    close(ops.clipped_embedding(ids, g, offsets, factors, out, padding, backend="cpp"), wanted, dtype)


@pytest.mark.parametrize("padding", [None, 2])
def test_tied_cross(dtype, padding):
    head, tail = torch.tensor([0, 70, 70, 75, 80]), torch.tensor([0, 9, 12, 12, 30])
    h, z, e = rows(head, 6, dtype), rows(head, 11, dtype), rows(tail, 6, dtype)
    ids = torch.randint(0, 11, (30,))
    found = ops.tied_cross(h, z, head, ids, e, tail, padding, backend="cpp")
    close(found, reference.tied_cross(*wide(h, z), head, ids, e.double(), tail, padding), dtype)


@pytest.mark.parametrize(("d", "p"), [(1, 1), (5, 700), (700, 5), (128, 128), (96, 97)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_clipped_gemm(offsets, dtype, d, p, accumulate):
    a, g = rows(offsets, d, dtype), rows(offsets, p, dtype, strided=True)
    factors = torch.rand(offsets.numel() - 1)
    out = torch.randn(p + 1, d, dtype=reference.accumulation_dtype(dtype))[1:]
    if not accumulate:
        out.fill_(torch.nan)
    base = out.double() if accumulate else torch.zeros(p, d, dtype=torch.float64)
    wanted = reference.clipped_gemm(*wide(a, g), offsets, factors.double(), base)
    close(ops.clipped_gemm(a, g, offsets, factors, out, accumulate=accumulate, backend="cpp"), wanted, dtype)


# More rows, columns and packed operands than are multiplied at a time; 1, 33 and 600 rows beside each other.
@pytest.mark.parametrize(("d", "p"), [(1100, 1211), (1211, 1100)])
@pytest.mark.parametrize("route", ["gram", "direct"])
def test_more_than_a_block_of_halves(d, p, route):
    offsets = torch.tensor([0, 600, 633, 634, 4200])
    a, g, factors = (
        rows(offsets, d, torch.bfloat16),
        rows(offsets, p, torch.bfloat16),
        torch.tensor([0.5, 1.0, 0.3, 0.7]),
    )
    wanted = reference.clipped_gemm(*wide(a, g), offsets, factors.double(), torch.zeros(p, d).double())
    close(ops.clipped_gemm(a, g, offsets, factors, torch.zeros(p, d), backend="cpp"), wanted, torch.bfloat16)
    squares = [(g[i:j].double().T @ a[i:j].double()).square().sum() for i, j in itertools.pairwise(offsets.tolist())]
    close(ops.linear_norm(a, g, offsets, route=route, backend="cpp"), torch.stack(squares), torch.bfloat16)


@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (1000,)])
@pytest.mark.parametrize("units", [0, 1, 6])
def test_sums_of_whole_gradients(dtype, shape, units):
    grads, factors = torch.randn(units, *shape).to(dtype), torch.rand(units)
    out = torch.randn(shape, dtype=reference.accumulation_dtype(dtype))
    wanted = reference.clipped_sum(grads.double(), factors.double(), out.double())
    close(ops.clipped_sum(grads, factors, out, backend="cpp"), wanted, dtype)
    if out.dtype == torch.float32:
        counter, key = (nonce(3, 0, False), 5), Key(bytes(range(32)))
        noisy = [
            ops.clip_accumulate_noise(grads.double(), factors, torch.empty(shape), 2.0, key, counter, backend=backend)
            for backend in ("cpp", "torch")
        ]
        torch.testing.assert_close(*noisy, rtol=1e-6, atol=1e-6)
        lists = ops.clip_accumulate_noise(
            [grads.double(), grads.double()],
            factors,
            [torch.empty(shape), torch.empty(shape)],
            2.0,
            key,
            counter,
            backend="cpp",
        )
        second = counter[0], counter[1] + noisy[0].numel()
        alone = ops.clip_accumulate_noise(grads.double(), factors, torch.empty(shape), 2.0, key, second, backend="cpp")
        assert torch.equal(lists[0], noisy[0]) and torch.equal(lists[1], alone)
        if not units:
            assert torch.equal(*noisy)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_broken_unit_reaches_nobody(value):
    offsets, factors = torch.tensor([0, 2, 5, 9]), torch.tensor([0.5, 0.0, 2.0])
    a, g, ids = torch.randn(9, 8), torch.randn(9, 6), torch.tensor([0, 1, 0, 1, 2, 2, 0, 1, 3])
    clean = [x.clone() for x in (a, g)]
    a[3], g[2] = value, value
    finite = torch.tensor([True, False, True])
    for found in (
        ops.affine_norm(g, None, offsets, backend="cpp"),
        ops.embedding_norm(ids, g, offsets, backend="cpp"),
        ops.linear_norm(a, g, offsets, backend="cpp"),
        ops.tied_cross(a, torch.ones(9, 4), offsets, ids, a, offsets, backend="cpp"),
    ):
        assert torch.equal(found.isfinite(), finite)
    dx, sums = ops.layer_norm_backward(g, g, *statistics(g), None, offsets, True, backend="cpp")
    assert torch.equal(dx.isfinite().all(1), torch.arange(9) != 2)
    assert torch.equal(sums.isfinite().all(2), finite.expand(2, 3))
    keep = factors.clone()
    wanted = reference.clipped_gemm(*clean, offsets, keep, torch.zeros(6, 8))
    torch.testing.assert_close(ops.clipped_gemm(a, g, offsets, factors, torch.zeros(6, 8), backend="cpp"), wanted)
    wanted = reference.clipped_embedding(ids, clean[1], offsets, keep, torch.zeros(4, 6))
    found = ops.clipped_embedding(ids, g, offsets, factors, torch.zeros(4, 6), backend="cpp")
    torch.testing.assert_close(found, wanted)
    grads = torch.randn(3, 7)
    wanted = reference.clipped_sum(grads, factors, torch.zeros(7))
    grads[1] = value
    torch.testing.assert_close(ops.clipped_sum(grads, factors, torch.zeros(7), backend="cpp"), wanted)
    ones = torch.ones(3)
    assert not ops.clipped_sum(grads, ones, torch.zeros(7), backend="cpp").isfinite().any()


def every_op():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    offsets = torch.tensor([0, 40, 41, 41, 300])
    a, g, ids = normal(300, 130), normal(300, 260), torch.randint(0, 50, (300,), generator=generator)
    factors = torch.tensor([0.3, 0.0, 1.0, 0.7])
    key, counter = Key(bytes(32)), (nonce(0, 0, False), 3)
    return {
        "linear_norm": ops.linear_norm_parts(a, g, offsets, backend="cpp"),
        "segment_sum": ops.segment_sum(g, g, offsets, backend="cpp"),
        "affine_norm": ops.affine_norm(g, None, offsets, backend="cpp"),
        "layer_norm_backward": ops.layer_norm_backward(g, g, *statistics(g), None, offsets, True, backend="cpp")[1],
        "embedding_norm": ops.embedding_norm(ids, a, offsets, backend="cpp"),
        "tied_cross": ops.tied_cross(a, g, offsets, ids, a, offsets, backend="cpp"),
        "clipped_gemm": ops.clipped_gemm(a, g, offsets, factors, torch.zeros(260, 130), backend="cpp"),
        "clipped_embedding": ops.clipped_embedding(ids, a, offsets, factors, torch.zeros(50, 130), backend="cpp"),
        "clipped_sum": ops.clipped_sum(normal(4, 9000), factors, torch.zeros(9000), backend="cpp"),
        "clip_accumulate_noise": ops.clip_accumulate_noise(
            normal(4, 9000), factors, torch.zeros(9000), 1.0, key, counter, backend="cpp"
        ),
    }


@pytest.mark.parametrize("d, p", [(1024, 1040), (1040, 1024)])
def test_clipped_gemm_takes_many_rows_in_several_parts(d, p):
    """The BLAS gets a scaled copy of at most 2^22 elements at a time."""
    torch.manual_seed(0)
    offsets, factors = torch.tensor([0, 4000, 4000, 4300]), torch.tensor([0.5, 3.0, 2.0])
    a, g, before = torch.randn(4300, d), torch.randn(4300, p), torch.randn(p, d)
    for accumulate in (True, False):
        out = before.clone()
        ops.clipped_gemm(a, g, offsets, factors, out, accumulate=accumulate, backend="cpp")
        base = before.double()[-7:] if accumulate else torch.zeros(7, d).double()
        wanted = reference.clipped_gemm(*wide(a, g[:, -7:]), offsets, factors.double(), base)
        close(out[-7:], wanted, torch.float32)


def test_the_number_of_threads_shows_nowhere():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(every_op())
    finally:
        torch.set_num_threads(threads)
    for first, second in itertools.pairwise(results):
        for name in first:
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("d", "p", "lengths"),
    [(511, 63, [1024]), (512, 64, [1024, 1024]), (32, 257, [300, 5]), (768, 8, [1100, 300]), (768, 768, [128] * 4)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_threads_shows_in_no_product(d, p, lengths, dtype):
    """A BLAS chooses by the number of threads that it could have."""
    a, g = torch.randn(sum(lengths), d, dtype=dtype), torch.randn(sum(lengths), p, dtype=dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = ops.clipped_gemm(a, g, offsets, torch.full((len(lengths),), 0.3), torch.zeros(p, d, dtype=dtype))
            norms = [ops.linear_norm(a, g, offsets, route, backend="cpp") for route in ("auto", "gram", "direct")]
            results.append([out, *norms])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def bad(**changes):
    offsets = torch.tensor([0, 2, 5])
    good = {
        "a": torch.ones(5, 4),
        "g": torch.ones(5, 3),
        "ids": torch.tensor([0, 1, 0, 1, 2]),
        "offsets": offsets,
        "factors": torch.ones(2),
        "gemm_out": torch.zeros(3, 4),
        "table": torch.zeros(3, 3),
    }
    return good | changes


SUMS = {"clipped_gemm", "clipped_embedding"}
ALL = {*SUMS, "affine_norm", "layer_norm_backward", "embedding_norm", "linear_norms", "row_norm_products"}
# what is wrong, who must refuse it, and in what words
BAD = {
    "offsets fall": ({"offsets": torch.tensor([0, 4, 2, 5])}, ALL, "offsets must rise"),
    "offsets end early": ({"offsets": torch.tensor([0, 2, 4])}, ALL, "offsets must rise"),
    "offsets start late": ({"offsets": torch.tensor([1, 2, 5])}, ALL, "offsets must rise"),
    "float offsets": ({"offsets": torch.tensor([0.0, 2, 5])}, ALL, "offsets must be int32"),
    "rows differ": ({"a": torch.ones(4, 4), "ids": torch.tensor([0, 1, 0, 1])}, ALL, r"\[N|shape"),
    "integer rows": (
        {"a": torch.ones(5, 4, dtype=torch.int32), "g": torch.ones(5, 3, dtype=torch.int32)},
        ALL,
        "floating",
    ),
    "factors short": ({"factors": torch.ones(1)}, SUMS, "factors"),
    "narrow out": ({"gemm_out": torch.zeros(3, 4).half(), "table": torch.zeros(3, 3).half()}, SUMS, "fp32 or fp64"),
    "another out": ({"gemm_out": torch.zeros(4, 3), "table": torch.zeros(3, 4)}, SUMS, "out must"),
    "strided out": ({"gemm_out": torch.zeros(4, 3).T, "table": torch.zeros(3, 3).T}, SUMS, "dense rows"),
    "id too large": ({"ids": torch.tensor([0, 1, 0, 1, 3])}, {"clipped_embedding"}, "id 3"),
    "id below 0": ({"ids": torch.tensor([0, 1, 0, 1, -1])}, {"clipped_embedding"}, "id -1"),
}


@pytest.mark.parametrize(("changes", "refusing", "word"), BAD.values(), ids=BAD)
def test_bad_input_writes_nothing(changes, refusing, word):
    x = bad(**changes)
    raw = torch.ops.fastclip  # below the checks in Python
    calls = {
        "clipped_gemm": (x["a"], x["g"], x["offsets"], x["factors"], x["gemm_out"], True),
        "clipped_embedding": (x["ids"], x["g"], x["offsets"], x["factors"], x["table"], None),
        "affine_norm": (x["g"], x["a"][:, :3], x["offsets"]),
        "layer_norm_backward": (x["g"], x["a"][:, :3], None, torch.ones(5), None, x["offsets"], True),
        "embedding_norm": (x["ids"], x["g"], x["offsets"], None),
        "linear_norms": (x["a"], [x["g"]], x["offsets"]),
        "row_norm_products": (x["a"], x["g"], x["offsets"]),
    }
    for name in refusing:
        with pytest.raises(RuntimeError, match=word):
            getattr(raw, name)(*calls[name])
    for name in calls.keys() - refusing:
        getattr(raw, name)(*calls[name])
    for name, out in (("clipped_gemm", x["gemm_out"]), ("clipped_embedding", x["table"])):
        assert bool(out.any()) == (name not in refusing)


@pytest.mark.parametrize("columns", [1, 40])
def test_row_norm_products(offsets, dtype, columns):
    a, g = rows(offsets, columns, dtype), rows(offsets, 7, dtype, strided=True)
    exact = a.double().norm(dim=1) * g.double().norm(dim=1)
    wanted = reference.segment_sum(exact[:, None], None, offsets)[:, 0]
    found = ops.row_norm_products(a, g, offsets, backend="cpp")
    close(found, wanted, torch.float32)
    assert bool((found >= wanted).all())  # a bound


def test_opcheck():
    offsets = torch.tensor([0, 2, 2, 5])
    a, g, ids, factors = torch.randn(5, 4), torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 2]), torch.rand(3)
    raw, tests = torch.ops.fastclip, ("test_schema", "test_faketensor")
    stream = (1.0, 1.0, Key(bytes(32)).tensor(), 0)
    draw, draws = (*stream, 0, 0), (*stream, [0], [0])
    calls = {
        raw.linear_norms: (a, [g, g], offsets),
        raw.row_norm_products: (a, g, offsets),
        raw.embedding_norm: (ids, g, offsets, 1),
        raw.tied_cross: (a, g, offsets, ids, a, offsets),
        raw.affine_norm: (g, g, offsets),
        raw.segment_sum: (g, None, offsets),
        raw.layer_norm_backward: (g, g, torch.ones(5), torch.ones(5), torch.ones(3), offsets, True),
        raw.clipped_gemm: (a, g, offsets, factors, torch.zeros(3, 4)),
        raw.clipped_embedding: (ids, g, offsets, factors, torch.zeros(3, 3)),
        raw.clipped_sum: (torch.randn(3, 7), factors, torch.zeros(7)),
        raw.clip_accumulate_noise: ([torch.randn(3, 7)], factors, [torch.zeros(7)], *draws),
        raw.add_noise: (torch.randn(7), torch.zeros(7), *draw),
        raw.noise_adamw: (*([torch.rand(7)] for _ in range(4)), *draws, 0.1, 0.9, 0.9, 1e-8, 0.0, [1]),
        raw.noise_sgd: (*([torch.rand(7)] for _ in range(3)), *draws, 0.1, 0.9, 0.0, 0.0, False, False),
    }
    for op, args in calls.items():
        torch.library.opcheck(op.default, args, test_utils=tests)


def test_a_backend_asked_for_by_name_runs_or_raises():
    meta = torch.ones(5, 3, device="meta")
    with pytest.raises(RuntimeError, match="cannot run on meta"):
        ops.affine_norm(meta, None, torch.tensor([0, 5]), backend="cpp")
