"""Triton's kernels over rows of units, in its interpreter or on a GPU, beside plain torch in fp64.

Every tensor has margins (tests/guards.py) and every fresh one is full of NaN (conftest.py).
"""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from guards import DEVICE, Guard
from kernel_cases import cases_of, joined

from fastclip import reference
from fastclip.dispatch import LAUNCHERS

pytest.importorskip("triton", reason="triton is not installed")
from fastclip.kernels.affine_norm import affine_norm, segment_sum
from fastclip.kernels.clipped_embedding import clipped_embedding
from fastclip.kernels.clipped_sum import clipped_sum
from fastclip.kernels.embedding_norm import embedding_norm
from fastclip.kernels.layer_norm import layer_norm_backward
from fastclip.kernels.tied_cross import tied_cross

LENGTHS = [0, *itertools.accumulate((1, 7, 63, 0, 64, 65, 0, 130))]
CASES = {
    "fp32": (LENGTHS, torch.float32),
    "fp16": (LENGTHS, torch.float16),
    "all empty": ([0, 0, 0], torch.float32),
    "no unit": ([0], torch.float16),
}
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter runs only where no GPU is")


@pytest.fixture
def guard():
    made = Guard()
    yield made
    made.check()


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    bounds, dtype = request.param
    return torch.tensor(bounds, dtype=torch.int32), dtype


def near(found, exact, same):
    """No further off than twice what torch is in the same dtype; exact: in fp64, same: torch's."""
    assert found.shape == exact.shape
    if not exact.numel():
        return
    scale = exact.double().abs().max()
    error = (found.cpu().double() - exact.double()).abs().max()
    assert error <= 2 * (same.double() - exact.double()).abs().max() + 1e-6 * scale


def in_fp64(found, exact):
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.cpu(), exact, rtol=1e-12, atol=1e-12)


NORMS = ("affine_norm", "embedding_norm", "tied_cross")
OPS = (
    "layer_norm_backward",
    "segment_sum",
    "affine_norm",
    "embedding_norm",
    "clipped_embedding",
    "tied_cross",
    "clipped_sum",
)


@pytest.mark.parametrize("case", cases_of(*OPS), ids=str)
def test_case(guard, case):
    module, function = LAUNCHERS[case.op]
    launcher, plain = getattr(importlib.import_module(module), function), getattr(reference, case.op)
    for dtype in (torch.float32, torch.float16) if case.name in ("ragged", "[1000]") else (torch.float32,):
        args = case.make(dtype, torch.device("cpu"))
        dense = [isinstance(x, torch.Tensor) and x.is_contiguous() for x in args]
        given = [guard(x) if whole else to_device(x) for x, whole in zip(args, dense, strict=True)]
        returned = launcher(*given)
        written = {"clipped_embedding": 4, "clipped_sum": 2}.get(case.op)
        found, exact = joined(returned) if written is None else given[written], case.exact(args)
        assert found.dtype == (torch.float64 if case.op in (*NORMS, "layer_norm_backward") else torch.float32)
        if case.op in ("embedding_norm", "tied_cross"):
            in_fp64(found, exact)
        else:
            near(found, exact, joined(plain(*(x.clone() if isinstance(x, torch.Tensor) else x for x in args))))


def to_device(x):
    """With its strides, which a copy to another device may lose."""
    if not isinstance(x, torch.Tensor) or DEVICE == "cpu":
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


def test_sums_keep_within_their_bound_and_norms_are_theirs(guard):
    offsets, g, x = torch.tensor(LENGTHS), *torch.randn(2, LENGTHS[-1], 5)
    sums = segment_sum(guard(g), guard(x), guard(offsets))
    error = sums.cpu().double() - reference.segment_sum(g.double(), x.double(), offsets)
    sizes = reference.segment_sum(g.double().abs(), x.double().abs(), offsets)
    assert bool((error.abs() <= 10 * 2.0**-24 * sizes).all())  # the file's bound and the last rounding
    in_fp64(affine_norm(guard(g), guard(x), guard(offsets)), sums.cpu().double().square().sum(1))


def test_a_bias_is_summed_without_x_hat(guard):
    offsets, g = torch.tensor([0, 3, 3, 70]), torch.randn(70, 3).half()
    found = segment_sum(guard(g), None, guard(offsets))
    near(found, reference.segment_sum(g.double(), None, offsets), reference.segment_sum(g, None, offsets))
    in_fp64(affine_norm(guard(g), None, guard(offsets)), found.cpu().double().square().sum(1))


def test_a_unit_longer_than_what_a_program_adds_at_once(guard):
    offsets, g, ids = torch.tensor([0, 600]), torch.randn(600, 1), torch.randint(0, 300, (600,))
    near(segment_sum(guard(g), None, guard(offsets)), g.double().sum(0)[None], g.sum(0)[None])
    in_fp64(embedding_norm(guard(ids), guard(g), guard(offsets)), reference.embedding_norm(ids, g.double(), offsets))


def test_affine_in_fp64(guard):
    offsets, g = torch.tensor([0, 3, 9]), torch.randn(9, 5, dtype=torch.float64)
    in_fp64(segment_sum(guard(g), None, guard(offsets)), reference.segment_sum(g, None, offsets))


def test_ids_at_the_ends_of_their_range(guard):
    ids, g = torch.tensor([0, 2**31 - 1, 0, 2**31 - 1, 2**31 - 1]), torch.randn(5, 300)  # more columns than a program's
    offsets = torch.tensor([0, 2, 5])
    in_fp64(embedding_norm(guard(ids), guard(g), guard(offsets)), reference.embedding_norm(ids, g.double(), offsets))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
def test_rows_of_a_wider_table(guard, out_dtype):
    ids, g, offsets = torch.randint(0, 7, (40,)), torch.randn(40, 9), torch.tensor([0, 15, 40])
    factors, table = torch.rand(2, dtype=torch.float64), torch.randn(9, 11, dtype=out_dtype)
    out, before = guard(table), table[:, 1:10].contiguous()
    clipped_embedding(guard(ids.int()), guard(g), guard(offsets), guard(factors), out[:, 1:10])
    exact = reference.clipped_embedding(ids, g.double(), offsets, factors, before.double())
    near(out[:, 1:10], exact, reference.clipped_embedding(ids, g, offsets, factors, before.clone()))
    assert torch.equal(out[:, [0, 10]].cpu(), table[:, [0, 10]])


def test_an_id_outside_the_table_is_written_nowhere(guard):
    ids, out = torch.tensor([-1, 1, 3, 2**40]), guard(torch.zeros(3, 5))
    clipped_embedding(guard(ids), guard(torch.ones(4, 5)), guard(torch.tensor([0, 4])), guard(torch.ones(1)), out)
    assert torch.equal(out.cpu(), torch.tensor([[0.0], [1], [0]]).expand(3, 5))


def test_an_id_that_no_logit_has_makes_its_unit_nan(guard):
    head, tail = torch.tensor([0, 2, 4]), torch.tensor([0, 1, 2])
    rows = torch.ones(4, 3)
    found = tied_cross(guard(rows), guard(rows), guard(head), guard(torch.tensor([1, 3])), guard(rows[:2]), guard(tail))
    assert found.isfinite().tolist() == [True, False]


def norm_layer(x, weight, bias, kind, p):
    if kind == "layer":
        return F.layer_norm(x, (p,), weight, bias, 1e-5)
    return F.rms_norm(x, (p,), weight, 1e-5)


@pytest.mark.parametrize(
    ("kind", "p", "affine"), [("layer", 1, True), ("layer", 130, True), ("rms", 65, True), ("layer", 7, False)]
)
def test_layer_norm_backward(guard, case, kind, p, affine):
    offsets, dtype = case
    n, units = int(offsets[-1]), offsets.numel() - 1
    g, x = torch.randn(2, n, p).to(dtype)
    weight = torch.randn(p) if affine else torch.ones(p)
    wide = x.double()
    mean = wide.mean(1) if kind == "layer" else None
    rstd = (wide if mean is None else wide - mean[:, None]).square().mean(1).add(1e-5).rsqrt()
    found = layer_norm_backward(
        guard(g),
        guard(x),
        None if mean is None else guard(mean.float()),
        guard(rstd.float()),
        guard(weight) if affine else None,
        guard(offsets),
        kind == "layer",
    )

    def one_by_one(to):
        dx, gains, biases = (
            torch.zeros(n, p, dtype=to),
            torch.zeros(units, p, dtype=to),
            torch.zeros(units, p, dtype=to),
        )
        for u, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
            if start == stop:
                continue
            leaf = x[start:stop].to(to, copy=True).requires_grad_()
            parameters = weight.to(to).requires_grad_(), torch.zeros(p, dtype=to, requires_grad=True)
            out = norm_layer(leaf, *parameters, kind, p)
            grads = torch.autograd.grad(out, (leaf, *parameters), g[start:stop].to(to), allow_unused=True)
            dx[start:stop], gains[u] = grads[:2]
            biases[u] = 0 if grads[2] is None else grads[2]
        return dx, gains, biases

    exact, same = one_by_one(torch.float64), one_by_one(torch.float32)
    assert found[0].dtype == dtype
    near(found[0], exact[0], same[0].to(dtype))
    near(found[1][0], exact[1], same[1])
    assert len(found[1]) == 1 + (kind == "layer")
    if kind == "layer":
        near(found[1][1], exact[2], same[2])


def every_op(guard=lambda x: x.to(DEVICE), spoil=None, layout=None):
    """All results on one batch of 4 units; spoil: what stands in unit 1's rows, whose factor is 0; layout: of the inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        x = torch.randn(shape, generator=generator)
        if spoil is not None:
            x[16:19] = spoil
        x = guard(x)
        return x if layout is None else layout(x)

    offsets = guard(torch.tensor([0, 16, 19, 19, 60], dtype=torch.int32))
    factors = guard(torch.tensor([0.3, 0.0, 1.0, 0.7]))
    ids = guard(torch.randint(0, 20, (60,), generator=generator))
    a, g, z = normal(60, 33), normal(60, 33), normal(60, 20)
    grads = torch.randn(4, 65, generator=generator)
    if spoil is not None:
        grads[1] = spoil
    grads = guard(grads)
    table, whole = guard(torch.zeros(20, 33)), guard(torch.zeros(65))
    clipped_embedding(ids, g, offsets, factors, table)
    clipped_sum(grads, factors, whole)
    statistics = guard(torch.zeros(60)), guard(torch.ones(60))
    dx, (gain, bias) = layer_norm_backward(g, a, *statistics, None, offsets, True)
    return {
        "units": {
            "segment_sum": segment_sum(g, a, offsets),
            "affine_norm": affine_norm(g, None, offsets),
            "embedding_norm": embedding_norm(ids, g, offsets),
            "tied_cross": tied_cross(a, z, offsets, ids, g, offsets),
            "gain": gain,
            "bias": bias,
        },
        "sums": {"clipped_embedding": table, "clipped_sum": whole},
        "rows": {"dx": dx},
    }


@pytest.fixture(scope="module")
def clean():
    return every_op()


def test_a_second_launch_has_the_same_bits(guard, clean):
    for kind, results in every_op(guard).items():
        for name, found in results.items():
            assert torch.equal(found, clean[kind][name]), name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_broken_unit_reaches_nobody(value, clean):
    broken = every_op(spoil=value)
    for name, found in broken["units"].items():
        assert not found[1].isfinite().all(), name
        assert torch.equal(found[[0, 2, 3]], clean["units"][name][[0, 2, 3]]), name
    for name, found in broken["sums"].items():
        assert torch.equal(found, clean["sums"][name]), name
    others = [*range(16), *range(19, 60)]
    assert torch.equal(broken["rows"]["dx"][others], clean["rows"]["dx"][others])


def test_layout_changes_no_bit(clean):
    for kind, results in every_op(layout=lambda x: x.t().contiguous().t()).items():
        for name, x in results.items():
            assert torch.equal(x, clean[kind][name]), name


def test_what_stands_before_a_unit_changes_no_bit_of_it():
    g, ids, rows = torch.randn(200, 5, device=DEVICE), torch.randint(0, 9, (200,), device=DEVICE), slice(37, 187)
    amid, alone = torch.tensor([0, 37, 187, 200], device=DEVICE), torch.tensor([0, 150], device=DEVICE)
    found = segment_sum(g, g, amid), embedding_norm(ids, g, amid), tied_cross(g, g, amid, ids % 5, g, amid)
    own = (
        segment_sum(g[rows], g[rows], alone),
        embedding_norm(ids[rows], g[rows], alone),
        tied_cross(g[rows], g[rows], alone, ids[rows] % 5, g[rows], alone),
    )
    for many, one in zip(found, own, strict=True):
        assert torch.equal(many[1], one[0])


@interpreted
def test_addresses_beyond_2_to_the_31(tmp_path):
    memory = torch.from_file(str(tmp_path / "hole"), shared=True, size=2**32, dtype=torch.float32)  # 16 GiB, sparse
    one, offsets, row = torch.ones(1), torch.tensor([0, 1]), torch.tensor([[1.0, 2, 3, 4]])
    table = memory.view(2**30, 4)
    clipped_embedding(torch.tensor([2**29 + 3]), row, offsets, one, table)
    assert torch.equal(table[2**29 + 3], row[0])
    z = memory.view(2, 2**31)
    z[1, 2**31 - 2] = 5.0
    found = tied_cross(row.expand(2, 4), z, torch.tensor([0, 2]), torch.tensor([2**31 - 2]), row, offsets)
    assert found.item() == 5 * 30


@interpreted
def test_bf16_is_refused_in_the_interpreter():
    x, offsets, ids = torch.ones(4, 3).bfloat16(), torch.tensor([0, 4]), torch.zeros(4, dtype=torch.int64)
    factors, rows, out = torch.ones(1), torch.ones(4), torch.zeros(3, 3)
    for call in (
        lambda: segment_sum(x, None, offsets),
        lambda: affine_norm(x.float(), x, offsets),
        lambda: embedding_norm(ids, x, offsets),
        lambda: clipped_embedding(ids, x, offsets, factors, out),
        lambda: clipped_sum(x[:1], factors, out[0]),
        lambda: tied_cross(x.float(), x, offsets, ids, x.float(), offsets),
        lambda: layer_norm_backward(x, x, rows, rows, None, offsets, True),
    ):
        with pytest.raises(ValueError, match="bf16 cannot run"):
            call()
    assert not out.any()


ONE, END = torch.ones(1), torch.tensor([0, 1])
BAD = {
    "half out": (lambda: clipped_sum(torch.ones(1, 3), ONE, torch.zeros(3).half()), "fp32 or fp64"),
    "other out": (lambda: clipped_sum(torch.ones(1, 4), ONE, torch.zeros(3)), r"\[U, \*out.shape\]"),
    "other factors": (lambda: clipped_sum(torch.ones(2, 3), ONE, torch.zeros(3)), r"factors \[U\]"),
    "strided out": (lambda: clipped_sum(torch.ones(1, 3), ONE, torch.zeros(6)[::2]), "contiguous"),
    "strided table": (
        lambda: clipped_embedding(torch.zeros(1).long(), torch.ones(1, 3), END, ONE, torch.zeros(3, 3).t()),
        "dense rows",
    ),
    "half table": (
        lambda: clipped_embedding(torch.zeros(1).long(), torch.ones(1, 3), END, ONE, torch.zeros(3, 3).half()),
        "fp32 or fp64",
    ),
    "x_hat": (lambda: segment_sum(torch.ones(1, 3), torch.ones(1, 4), END), "g's shape"),
    "columns": (
        lambda: tied_cross(torch.ones(1, 3), torch.ones(1, 9), END, torch.zeros(1).long(), torch.ones(1, 4), END),
        "same columns",
    ),
    "wide norm": (
        lambda: layer_norm_backward(*torch.ones(2, 1, 8193), None, ONE, None, END, False),
        "at most 8192",
    ),
}


@pytest.mark.parametrize(("call", "word"), BAD.values(), ids=BAD)
def test_bad_input(call, word):
    with pytest.raises(ValueError, match=word):
        call()
