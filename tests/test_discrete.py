"""The discrete Gaussian: exact integers, the sensitivity that is claimed, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import fastclip
from fastclip import discrete
from fastclip.noise import NoiseSource, Purpose
from fastclip.ops import Draw
from fastclip.random import Key, nonce
from fastclip.tape import NORM_SLACK, ROUNDING_SLACK, SUM_SLACK

pytest.importorskip("fastclip._host", reason="no compiler at install")
KEY = Key(bytes(range(32)))


def integers(sigma, count, offset=0, key=KEY, step=0):
    draw = Draw(1.0, 1.0, key, nonce(step, Purpose.DISCRETE, seeded=False), offset)
    return discrete.draw_integers(torch.empty(count, dtype=torch.int64), sigma, draw).numpy()


def mass(sigma):
    reach = np.arange(-40 * sigma, 40 * sigma + 1)
    weights = np.exp(-(reach.astype(np.float64) ** 2) / (2 * sigma**2))
    return reach, weights / weights.sum()


@pytest.mark.parametrize("sigma", [1, 2, 3, 10])
def test_small_ones_have_their_probabilities(sigma):
    count = 400_000
    found = integers(sigma, count)
    reach, probability = mass(sigma)
    seen = np.bincount(found + 40 * sigma, minlength=len(reach))
    common = probability * count >= 5
    observed, expected = seen[common], probability[common] * count
    rest = count - observed.sum(), count - expected.sum()
    if rest[1] >= 5:
        observed, expected = np.append(observed, rest[0]), np.append(expected, rest[1])
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-5
    # The continuous Gaussian, rounded, is another distribution: the test tells them apart where they differ.
    if sigma == 1:
        rounded = np.diff(stats.norm.cdf(np.append(reach - 0.5, reach[-1] + 0.5)))[common] * count
        assert stats.chisquare(seen[common], rounded * seen[common].sum() / rounded.sum()).pvalue < 1e-5


@pytest.mark.parametrize("sigma", [1000, 2**22 + 7, 2**31])
def test_large_ones_are_gaussian(sigma):
    z = integers(sigma, 300_000) / sigma
    assert stats.kstest(z, "norm").pvalue > 1e-5
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 5 / math.sqrt(len(z))
    # Every last digit is as likely as any other.
    last = np.bincount(integers(sigma, 300_000) % 16, minlength=16)
    assert sigma < 2**22 or stats.chisquare(last).pvalue > 1e-5


def test_an_element_depends_on_its_place_alone():
    whole = integers(50, 200_001)
    for first, count in [(0, 1), (3, 20), (65_530, 70_000), (200_000, 1)]:
        np.testing.assert_array_equal(integers(50, count, first), whole[first : first + count])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        np.testing.assert_array_equal(integers(50, 200_001), whole)
    finally:
        torch.set_num_threads(threads)
    assert not np.array_equal(integers(50, 100, step=1), whole[:100])
    np.testing.assert_array_equal(integers(50, 100, 2**48 - 100), integers(50, 100, 2**48 - 100))


def wrap(model, **arguments):
    defaults = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 4, "secure": True}
    return fastclip.DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), module=model, **(defaults | arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_release_is_on_the_grid_and_as_noisy_as_it_says(dtype):
    model = nn.Linear(400, 400).to(dtype)
    optimizer = wrap(model, noise_multiplier=2.0, max_grad_norm=3.0, loss_reduction="sum")
    model(torch.randn(4, 400, dtype=dtype)).square().sum().backward()
    optimizer.step()
    claim = optimizer.mechanism
    released = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    points = released / claim.grid
    if dtype != torch.bfloat16:
        # fp32 holds 24 bits of the integers, the grid is a power of two.
        assert bool((points == points.round()).all())
    assert float(released.std()) == pytest.approx(claim.std, rel=0.01)
    assert claim.std == optimizer.noise_std
    assert claim.grid * math.sqrt(claim.num_elements) <= 1e-3 * 3.0
    assert 6.0 * (1 + ROUNDING_SLACK) < claim.std < 6.0 * (1 + ROUNDING_SLACK + 1.1e-3)
    for word in ("sensitivity", "zCDP", "0.125", str(claim.sigma)):
        assert word in str(claim)


def test_two_releases_of_one_draw_do_not_share_noise():
    model = nn.Linear(50, 50)
    optimizer = wrap(model)
    seen = []
    for _ in range(3):
        optimizer.step()
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.zero_grad()
    assert abs(float(torch.corrcoef(torch.stack(seen))[0, 1])) < 0.1
    assert not torch.equal(seen[0], seen[1]) and optimizer.noise.step == 3


def test_a_source_draws_an_element_once():
    source, claim = NoiseSource(), discrete.discrete_gaussian(1.0, 1.0, 100)
    total = torch.zeros(100)
    source.add_discrete(total, claim, offset=0, scale=1.0, out=torch.empty(100))
    with pytest.raises(RuntimeError, match="overlap elements that already have their DISCRETE noise"):
        source.add_discrete(total, claim, offset=99, scale=1.0, out=torch.empty(100))


def test_removing_a_unit_moves_the_rounded_sum_by_no_more_than_is_claimed(monkeypatch):
    monkeypatch.setattr(discrete, "draw_integers", lambda out, sigma, draw: out.zero_())
    monkeypatch.setattr("fastclip.noise.draw_integers", lambda out, sigma, draw: out.zero_())
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20))
    x = torch.randn(6, 30) * torch.tensor([1e-3, 1.0, 30.0, 1e3, 1e4, 1.0])[:, None]
    sums = []
    for kept in (range(6), range(5), range(1, 6)):
        optimizer = wrap(model, loss_reduction="sum", max_grad_norm=0.5)
        model(x[list(kept)]).square().sum().backward()
        optimizer.step()
        sums.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
        optimizer.clipper.detach()
        optimizer.zero_grad()
    claim = discrete.discrete_gaussian(1.0, 0.5, sums[0].numel())
    for other in sums[1:]:
        assert 0 < float((sums[0] - other).norm()) <= claim.sensitivity
    assert claim.sensitivity >= 0.5 / (1 - NORM_SLACK) + 2 * discrete.ERROR * 0.5 + claim.grid * math.sqrt(
        claim.num_elements
    )


def test_sums_are_formed_in_fp64_and_cancelling_units_count_more():
    """Rows that cancel to a small gradient are rounded as if they were large: the factor keeps that within bounds."""
    model = nn.Linear(20, 20, bias=False)
    a = torch.randn(1, 20)
    rows = torch.cat([a, a * (1 + 1e-6)])
    grad = torch.tensor([1.0, -1.0])[:, None] * torch.randn(20) * 1e4

    def clipped(secure):
        optimizer = wrap(model, loss_reduction="sum", secure=secure, expected_batch_size=1)
        with optimizer.clipper.units(ids=torch.tensor([0, 0])):
            (model(rows) * grad).sum().backward()
        norm, total = float(optimizer.clipper.unit_norms), optimizer.clipper.sums.pending(model.weight).clone()
        optimizer.zero_grad()
        optimizer.clipper.detach()
        return norm, total

    norm, total = clipped(True)
    spread = float(rows.norm(dim=1) @ grad.norm(dim=1))
    assert total.dtype == torch.float64 and spread > discrete.SPREAD * max(norm, 1.0)
    exact = float((grad.double().T @ rows.double()).norm())
    assert exact <= norm and float(total.norm()) == pytest.approx(exact * discrete.SPREAD / spread, rel=1e-5)
    assert clipped(False)[1].dtype == torch.float32


def test_too_large_a_batch_is_refused_before_anything_is_drawn(monkeypatch):
    model = nn.Linear(3, 3)
    optimizer = wrap(model)
    model(torch.randn(4, 3)).square().mean(1).mean().backward()
    assert optimizer.clipper.sums.terms == 4
    model(torch.randn(2, 3)).square().mean(1).mean().backward()
    assert optimizer.clipper.sums.terms == 6
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.clipper.sums.terms = 2**40
    with pytest.raises(RuntimeError, match="a logical batch of 6 units and 1099511627776 rows is too large"):
        optimizer.step()
    assert optimizer.noise.step == 0 and all(map(torch.equal, before, (p.grad for p in model.parameters())))
    optimizer.clipper.sums.terms = 6
    optimizer.step()
    assert optimizer.clipper.sums.terms == 0
    claim = optimizer.mechanism
    discrete.check_summation(claim, terms=2**20, units=2**9, groups=1)
    with pytest.raises(RuntimeError, match="too large"):
        discrete.check_summation(claim, terms=2**20, units=2**9, groups=30)
    assert discrete.ERROR < SUM_SLACK / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, "secure=True proves what a known seed=1 gives away"),
        ({"noise_multiplier": 0.0}, "claims something only with noise above 0"),
        ({"noise_multiplier": 1e9}, "goes to 2\\^31"),
    ],
)
def test_what_cannot_be_claimed_is_refused(arguments, message):
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=message):
        wrap(model, **arguments)
    assert fastclip.module.clipper_of(model) is None
    with pytest.raises(RuntimeError, match="only secure=True"):
        wrap(model, secure=False).mechanism  # noqa: B018


def test_bad_input_to_the_sampler():
    for sigma in (0, 2**31 + 1):
        with pytest.raises((ValueError, TypeError), match="sigma must be a whole number"):
            integers(sigma, 3)
    with pytest.raises(ValueError, match=r"elements must lie in \[0, 2\^48\)"):
        integers(5, 2, 2**48 - 1)
    with pytest.raises(TypeError):
        discrete._host().discrete_gaussian(np.zeros(3, dtype=np.int32), 5, bytes(32), 0, 0)
