"""Signed numbers of gradients: of every form of rows the same kind, linear, and unlike for unlike gradients."""

import pytest
import torch

from fastclip.head_rows import HeadRows
from fastclip.sketch import sketch
from fastclip.tape import EmbeddingRows, LinearRows, PerUnit
from fastclip.units import Segments

OFFSETS = torch.tensor([0, 3, 3, 40])


def rows(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(seed)
    segments = Segments(None, OFFSETS)
    a, b = torch.randn(40, 30, generator=g).to(dtype), torch.randn(40, 20, generator=g).to(dtype)
    if kind == "linear":
        return LinearRows(a, b, segments)
    if kind == "embedding":
        return EmbeddingRows(torch.randint(9, (40,), generator=g), b, segments, None)
    if kind == "head":
        labels, scale = torch.randint(20, (40,), generator=g), torch.randn(40, generator=g)
        return HeadRows(a, torch.randn(20, 30, generator=g), None, labels, torch.ones(40), scale, segments)
    shape = {"matrix": (3, 20, 30), "vector": (3, 20), "scalar": (3, 1), "kernel": (3, 4, 5, 6)}[kind]
    return PerUnit(torch.randn(*shape, generator=g).to(dtype))


KINDS = ("linear", "embedding", "head", "matrix", "vector", "scalar", "kernel")


@pytest.mark.parametrize("kind", KINDS)
def test_it_tells_gradients_apart(kind):
    one, other = sketch([rows(kind)]), sketch([rows(kind, 1)])
    assert one.shape == (3,) and one.dtype == torch.float64
    assert torch.equal(one, sketch([rows(kind)]))
    assert (one - other).abs()[[0, 2]].min() > 1e-3
    assert torch.allclose(sketch([rows(kind), rows(kind, 1)]), one + other)


def test_its_square_is_the_squared_norm_on_average():
    drawn = torch.randn(1000, 200, 300, generator=torch.Generator().manual_seed(0))
    assert float(sketch([PerUnit(drawn)]).square().mean()) == pytest.approx(60000, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_are_their_gradient(dtype):
    entry = rows("linear", dtype=dtype)
    whole = PerUnit(entry.per_unit(torch.Size([20, 30])))
    assert torch.allclose(sketch([entry]), sketch([whole]), rtol=1e-2 if dtype == torch.bfloat16 else 1e-9)


def test_a_unit_that_is_not_finite_is_alone():
    entry = rows("linear")
    entry.g[1, 2] = float("inf")
    found = sketch([entry])
    assert not found[0].isfinite() and found[1] == 0 and found[2].isfinite()
