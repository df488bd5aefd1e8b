"""The compiled kernels beside the plain ones: same stream on every instruction set, bad input refused, opcheck."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from fastclip import ops, reference
from fastclip.random import Key, nonce
from kernels import needs_kernels

pytestmark = needs_kernels
_host = pytest.importorskip("fastclip._host", reason="no compiler at install")
KEY = Key(bytes(range(32)))
CAPABILITIES = ["default", "avx2", "avx512"]


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_every_instruction_set_draws_the_same_bits(capability):
    script = """
import hashlib, torch
from fastclip import _host, ops, random
assert _host.cpu_capability() == "CHOSEN"
values = torch.arange(100_003, dtype=torch.float32)
words = torch.arange(-800, 800).mul(2**54 + 12345).view(-1, 8)
state = [torch.arange(10_003) % (97 + i) * 0.01 - 0.3 for i in range(4)]
for nonce in (5, 2**63 + 5):
    draw = ops.Draw(3.0, 1.0, random.Key(bytes(range(32))), nonce, 2**35 - 50_000)
    ops.add_noise(values, values, draw, backend="cpp")
    lists = [[x] for x in (*state[:3], state[3].abs(), draw)]
    ops.noise_adamw(*lists, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, steps=[3])
    ops.noise_sgd(*lists[:3], [draw], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
normals = torch.from_numpy(_host.normals(words.numpy()))
print(hashlib.sha256(b"".join(x.numpy().tobytes() for x in (values, normals, *state))).hexdigest())
"""
    if CAPABILITIES.index(_host.cpu_capability()) < CAPABILITIES.index(capability):
        pytest.skip(f"this processor has no {capability}")
    digests = {
        subprocess.run(
            [sys.executable, "-c", script.replace("CHOSEN", chosen)],
            env=dict(os.environ, ATEN_CPU_CAPABILITY=chosen),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for chosen in ("default", capability)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 3, 8 * 2**32 - 500, 2**65 - 10_000])
@pytest.mark.parametrize("seeded", [False, True])
def test_same_noise_as_numpy(in_dtype, out_dtype, offset, seeded):
    grad_sum = torch.randn(9_993, dtype=in_dtype)
    word = nonce(2**47 + 3, 1, seeded=seeded)
    drawn = [
        ops.add_noise(
            grad_sum, torch.empty(9_993, dtype=out_dtype), ops.Draw(1.5, 1 / 3, KEY, word, offset), backend=backend
        )
        for backend in ("cpp", "torch")
    ]
    # Their fp64 normals differ in the last bits, which move about one fp32 result in 10^8.
    assert (drawn[0] != drawn[1]).sum() <= 1
    torch.testing.assert_close(*drawn)


def unit_rows(lengths, d, p, dtype=torch.float32):
    rows = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.randn(rows, d).to(dtype), torch.randn(rows, p).to(dtype), offsets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("route", ["gram", "direct"])
@pytest.mark.parametrize("widths", [(67, 130), (7, 203), (450, 9), (32, 32)])
def test_norms_of_every_block_size(dtype, route, widths):
    a, g, offsets = unit_rows([1, 0, 64, 127, 129, 257, 513, 1100, 2000], *widths, dtype)
    bounds = offsets.tolist()
    for x, y in ((a, g), (a.t().contiguous().t(), g[:, ::2]), (a[:, 3:40], g[:1].expand_as(g))):
        units = [slice(i, j) for i, j in itertools.pairwise(bounds)]
        exact = torch.stack([(y[u].double().T @ x[u].double()).square().sum() for u in units])
        squares, products = ops.linear_norm_parts(x, y, offsets, route, backend="cpp")
        torch.testing.assert_close(squares, exact, rtol=1e-5, atol=0)
        plain = ops.linear_norm_parts(x, y, offsets, route, backend="torch")
        torch.testing.assert_close(plain[0], exact, rtol=1e-5, atol=0)
        spreads = torch.stack([(x[u].double().norm(dim=1) * y[u].double().norm(dim=1)).sum() for u in units])
        assert (products >= spreads).all() and (products <= spreads * (1 + 2e-5)).all()


@pytest.mark.parametrize("narrow", [1, 2, 3, 4, 5, 6, 8, 11, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_where_one_side_is_narrow(dtype, narrow):
    """As of LoRA: a unit takes one sum of up to 1024 rows, several, and blocks of 256 rows that are not full."""
    for wide in (33, 290):
        a, g, offsets = unit_rows([3, 0, 255, 700, 1025, 2100], wide, narrow, dtype)
        a[3:13], g[3:13] = a[13:23], -g[13:23]
        units = [slice(i, j) for i, j in itertools.pairwise(offsets.tolist())]
        exact = torch.stack([(g[u].double().T @ a[u].double()).square().sum() for u in units])
        spreads = torch.stack([(a[u].double().norm(dim=1) * g[u].double().norm(dim=1)).sum() for u in units])
        for x, y in ((a, g), (g, a), (a.t().contiguous().t(), g)):
            squares, products = ops.linear_norm_parts(x, y, offsets, "direct", backend="cpp")
            torch.testing.assert_close(squares, exact, rtol=1e-5, atol=0)
            assert (products >= spreads).all() and (products <= spreads * (1 + 2e-5)).all()


def test_one_row_and_one_column_may_have_any_stride(capfd):
    row = torch.randn(30).as_strided((1, 30), (1, 1))
    column = torch.randn(300).as_strided((10, 1), (30, 7))
    for a, g, n in (
        (row, row, 1),
        (row, torch.randn(1, 500), 1),
        (column, column, 10),
        (column, torch.randn(10, 400), 10),
    ):
        offsets = torch.tensor([0, n], dtype=torch.int32)
        exact = (g.double().T @ a.double()).square().sum()
        torch.testing.assert_close(ops.linear_norm(a, g, offsets, "gram", backend="cpp")[0], exact, rtol=1e-5, atol=0)
    assert "".join(capfd.readouterr()) == ""  # a BLAS that refuses its arguments says so there and nowhere else


@pytest.mark.parametrize("length", [16, 200, 400, 1000])
@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("route", ["gram", "direct"])
def test_cancelling_units_beside_others_are_not_underestimated(length, share, route):
    a, g, offsets = unit_rows([length, length, length], 300, 200)
    half = slice(length, length + length // 2), slice(length + length // 2, 2 * length)
    a[half[1]], g[half[1]] = a[half[0]], -g[half[0]] * (1 - share)
    for backend in ("cpp", "torch"):
        assert_between(
            ops.linear_norm_parts(a, g, offsets, route, backend=backend), exact_squares(a, g, length), length
        )


@pytest.mark.parametrize("route", ["gram", "direct"])
def test_rows_too_small_or_too_large_for_fp32_products(route):
    a, g, offsets = unit_rows([40, 40, 40, 40], 200, 300)
    a[:40] *= 1e-25
    a[40:80] *= 1e25
    a[80:100] *= 1e-30
    a[120:] = 0
    pairs = list(zip(a.double().split(40), g.double().split(40), strict=True))
    exact = torch.stack([(y.T @ x).square().sum() for x, y in pairs])
    torch.testing.assert_close(ops.linear_norm(a, g, offsets, route, backend="cpp"), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("route", ["gram", "direct"])
def test_norms_have_the_same_bits_for_any_number_of_threads(route):
    a, g, offsets = unit_rows([300, 5, 129, 40, 700], 200, 90)
    a[5:100] = a[100:195]
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.linear_norm_parts(a, g, offsets, route, backend="cpp"))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("a", "g", "offsets", "route", "message"),
    [
        (torch.ones(4, 2), torch.ones(3, 2), [0, 3], "gram", "same N"),
        (torch.ones(4), torch.ones(4, 2), [0, 4], "gram", r"a must be \[N, d\]"),
        (torch.ones(4, 0), torch.ones(4, 2), [0, 4], "gram", "must have columns"),
        (torch.ones(4, 2), torch.ones(4, 2), [0, 3], "gram", "offsets must rise from 0 to the number of rows, 4"),
        (torch.ones(4, 2), torch.ones(4, 2), [0, 3, 2, 4], "gram", "offsets must rise"),
        (torch.ones(4, 2), torch.ones(4, 2), [], "gram", "offsets must be"),
        (torch.ones(4, 2), torch.ones(4, 2), [0, 4], "fast", "unknown route fast"),
        (torch.ones(4, 2, dtype=torch.int64), torch.ones(4, 2, dtype=torch.int64), [0, 4], "gram", "floating point"),
    ],
)
def test_norms_refuse_bad_input(a, g, offsets, route, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastclip.linear_norms(a, [g], torch.tensor(offsets, dtype=torch.int32), route)


def test_opcheck():
    torch.library.opcheck(torch.ops.fastclip.linear_norms.default, shared_rows())
    key, out = KEY.tensor(), torch.zeros(100)
    torch.library.opcheck(torch.ops.fastclip.add_noise.default, (torch.ones(100), out, 1.0, 0.5, key, 1, 2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_sum": torch.ones(8, dtype=torch.bfloat16)}, "grad_sum must be fp32 or fp64"),
        ({"out": torch.zeros(8, dtype=torch.float64)}, "out must be fp32, bf16 or fp16"),
        ({"out": torch.zeros(7)}, "of one size"),
        ({"out": torch.zeros(16)[::2]}, "contiguous"),
        ({"key": torch.zeros(31, dtype=torch.uint8)}, "key must be 32"),
        ({"skip": 8}, r"skip must be in \[0, 8\)"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, message):
    arguments = {"grad_sum": torch.ones(8), "out": torch.zeros(8), "std": 1.0, "scale": 1.0, "key": KEY.tensor()}
    arguments |= {"nonce": 0, "block": 0, "skip": 0} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastclip.add_noise(*arguments.values())
    assert not arguments["out"].any()


def shared_rows():
    a, g, offsets = unit_rows([3, 0, 5], 4, 6)
    return a, [g, g[:, :2]], offsets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("route", ["auto", "gram", "direct"])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_layers_of_one_input_have_the_norms_they_have_alone(dtype, route, backend):
    a, g, offsets = unit_rows([1, 0, 70, 129, 600], 40, 90, dtype)
    layers = [g, g[:, 5:25], g.roll(3, 0)]
    layers[1][71:200] = 0  # a unit that one of the layers does not see
    together = ops.linear_norms(a, layers, offsets, route, backend=backend)
    alone = torch.stack([ops.linear_norm_parts(a, x, offsets, route, backend=backend) for x in layers])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    assert together.shape == (3, 2, 5)


def test_a_unit_that_cancels_in_one_layer_is_done_again_there_alone():
    a, g, offsets = unit_rows([200, 200], 30, 20)
    a[100:200] = a[:100]
    cancelling = g.clone()
    cancelling[100:200] = -g[:100] * (1 - 1e-6)
    for route in ("gram", "direct"):
        for parts, x in zip(
            ops.linear_norms(a, [g, cancelling], offsets, route, backend="cpp"), (g, cancelling), strict=True
        ):
            assert_between(parts, exact_squares(a, x, 200), 200)


def exact_squares(a, g, length):
    rows = zip(a.double().split(length), g.double().split(length), strict=True)
    return torch.stack([(y.T @ x).square().sum() for x, y in rows])


def assert_between(parts, exact, length):
    """Squares good to 1e-5; where rows cancel no more than 1e-6 below, and above by what is added then."""
    squares, products = parts
    cancel = products**2 > 1.01 * reference.CANCELLING * length * exact
    assert (squares >= exact * (1 - torch.where(cancel, 1e-6, 1e-5))).all()
    assert (squares <= exact * (1 + 1e-5) + 5e-12 * products**2).all()


@pytest.mark.parametrize("route", ["gram", "direct"])
@pytest.mark.parametrize("shape", [(48, 24, 16), (300, 8, 40), (1100, 33, 5)])
def test_searched_for_rows_are_not_underestimated(route, shape):
    """Rows are changed at random, and what brings the computed norm further below the exact one is kept."""
    length, d, p = shape
    a, g, offsets = unit_rows([length], d, p)
    half = length // 2
    generator = torch.Generator().manual_seed(length)

    def shortfall(a, g):
        parts, exact = ops.linear_norms(a, [g], offsets, route, backend="cpp")[0], exact_squares(a, g, length)
        assert_between(parts, exact, length)
        return float(1 - parts[0] / exact)

    for share in (1.0, 3e-2, 1e-3):  # what is left when the second half is taken from the first
        x, y = a.clone(), g.clone()
        x[half:], y[half:] = x[:half], -y[:half] * (1 - share)
        worst = shortfall(x, y)
        for _ in range(150):
            step = 10.0 ** -float(torch.randint(1, 7, (), generator=generator))
            rows = torch.randint(0, length, (3,), generator=generator)
            other_x, other_y = x.clone(), y.clone()
            other_x[rows] += step * torch.randn(3, d, generator=generator)
            other_y[rows] += step * torch.randn(3, p, generator=generator)
            found = shortfall(other_x, other_y)
            if found > worst:
                worst, x, y = found, other_x, other_y


@pytest.mark.parametrize("scale", [1e-24, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("route", ["gram", "direct"])
def test_bf16_rows_of_any_size_in_pairs(scale, route):
    """Where the processor multiplies pairs of bf16 it flushes what is below 2^-126: such rows are not left to it."""
    a, g, offsets = unit_rows([64, 33, 0, 100], 130, 70, torch.bfloat16)
    a, g = (a * scale).to(torch.bfloat16), (g * (1e-16 if scale < 1 else 1.0)).to(torch.bfloat16)
    exact = reference.linear_norm(a.double(), g.double(), offsets, "direct")
    found = ops.linear_norm(a, g, offsets, route)
    assert bool((found >= exact * (1 - 1e-5)).all()) and bool((found <= exact * (1 + 1e-5)).all())
    out = ops.clipped_gemm(
        a, g, offsets, torch.tensor([0.5, 0.0, 1.0, 2.0]), torch.full((70, 130), float("nan")), accumulate=False
    )
    plain = sum(f * g[i:j].double().mT @ a[i:j].double() for f, i, j in ((0.5, 0, 64), (2.0, 97, 197)))
    assert float((out - plain).norm()) <= 1e-6 * float(plain.norm()) + 1e-36


def test_a_broken_bf16_unit_stays_out_of_the_sum():
    a, g, offsets = unit_rows([64, 40], 34, 18, torch.bfloat16)
    a[3, 5], g[7, 2] = float("nan"), float("inf")
    out = ops.clipped_gemm(a, g, offsets, torch.tensor([0.0, 1.0]), torch.zeros(18, 34))
    torch.testing.assert_close(out, g[64:].float().mT @ a[64:].float(), rtol=1e-5, atol=1e-5)
