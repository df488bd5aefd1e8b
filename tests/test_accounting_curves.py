"""Deltas, curves over steps, trade-off curves and the mu that they imply."""

import math

import numpy as np
import pytest
from scipy import special, stats

from fastclip.accounting import (
    StepEvent,
    delta_of,
    deltas_of,
    edgeworth,
    epsilon_curve,
    epsilon_of,
    gaussian_parameter,
    gdp_parameter,
    get_epsilon,
    trade_off,
)

MNIST = 256 / 60000
STEPS = [StepEvent(1.0, 0.01, 1000)]


@pytest.mark.parametrize(
    ("steps", "published"),
    [
        (STEPS, [3.056848e-2, 2.612497e-3, 2.665722e-6]),
        ([StepEvent(1.1, MNIST, 14062)], [7.596316e-2, 1.552988e-2, 1.190987e-4]),
    ],
)
def test_published_deltas(steps, published):
    found = deltas_of(steps, [0.5, 1.0, 2.0])
    # The published ones come from a grid of 1e-4, which is above the truth by some 1e-4 of them.
    np.testing.assert_allclose(found, published, rtol=4e-4)
    assert delta_of(steps, 1.0) == pytest.approx(published[1], rel=4e-4)


def test_deltas_of_a_gaussian_are_exact():
    epsilons = np.array([0.0, 0.5, 2.0, 8.0])
    exact = special.ndtr(1 / 2 - epsilons) - np.exp(epsilons) * special.ndtr(-1 / 2 - epsilons)
    found = deltas_of([StepEvent(3.0, 1.0, 9)], epsilons)
    assert np.all(found >= exact)
    np.testing.assert_allclose(found, exact, rtol=2e-3, atol=1e-12)


@pytest.mark.parametrize(("accountant", "wanted"), [("rdp", (1.0, 1.2, 1.5, 1.7, 2.0)), ("prv", (1.2,))])
def test_delta_is_the_inverse_of_epsilon(accountant, wanted):
    for epsilon in wanted:
        delta = delta_of([StepEvent(1.0, 0.02, 50)], epsilon, accountant)
        found = epsilon_of([StepEvent(1.0, 0.02, 50)], delta, accountant)
        assert found <= epsilon
        assert found == pytest.approx(epsilon, abs=1e-4)


def test_delta_follows_the_users_and_the_neighbours():
    steps = [StepEvent(1.5, 0.02, 25)]
    assert delta_of(steps, 2.0, examples_per_user=3) > 10 * delta_of(steps, 2.0)
    assert delta_of(steps, 1.0, adjacency="replace-one") > delta_of(steps, 1.0, adjacency="zero-out")
    assert delta_of(steps, 1.0, adjacency="zero-out") == delta_of(steps, 1.0)
    for epsilon, terms in ((2.0, (3, "add/remove")), (0.7, (None, "replace-one"))):
        delta = delta_of(steps, epsilon, "pld", *terms)
        assert epsilon_of(steps, delta, "pld", *terms) == pytest.approx(epsilon, rel=2e-3)
    cut = [StepEvent(1.5, 0.02, 25, max_batch=24, num_units=1000)]
    assert delta_of(cut, 1.0, adjacency="zero-out") > 1.1 * delta_of(steps, 1.0)
    with_cuts = delta_of(
        [StepEvent(1.5, 0.02, 25, max_batch=60, num_units=1000)], 1.0, examples_per_user=2, adjacency="zero-out"
    )
    chance = 25 * stats.binom.sf(60, 1000, 0.02)
    assert with_cuts == pytest.approx(delta_of(steps, 1.0, examples_per_user=2) + chance * (1 + math.e), rel=1e-9)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_deltas_at_the_edges(accountant):
    assert delta_of([], 1.0, accountant) == 0.0
    assert delta_of([StepEvent(1.0, 0.1, 0)], 1.0, accountant) == 0.0
    assert delta_of([StepEvent(0.0, 0.1)], 1.0, accountant) == 1.0
    assert delta_of([StepEvent(1.0, 0.1)], 300.0, accountant) < 1e-13
    assert accountant == "rdp" or 0 < delta_of([StepEvent(1.0, 1e-7)], 0.0) <= 1e-7
    for epsilon in (-0.1, math.nan):
        with pytest.raises(ValueError, match="epsilon="):
            delta_of(STEPS, epsilon, accountant)
    with pytest.raises(ValueError, match="adjacency='other'"):
        delta_of(STEPS, 1.0, accountant, adjacency="other")


@pytest.mark.filterwarnings("ignore::fastclip.accounting.AccountingWarning")
def test_delta_of_the_estimate_is_its_own():
    assert delta_of(STEPS, 1.0, "edgeworth") == pytest.approx(edgeworth.delta_of(STEPS, 1.0), rel=1e-4)


def test_trade_off_of_a_gaussian_is_the_gaussian_one():
    alphas = np.array([0.0, 1e-6, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
    exact = special.ndtr(special.ndtri(1 - alphas) - 1.0)
    found = trade_off([StepEvent(2.0, 1.0, 4)], alphas)
    assert np.all(found <= exact + 1e-12)
    np.testing.assert_allclose(found, exact, atol=2e-5)


def test_trade_off_is_a_bound_on_every_test():
    """Thresholds on the output of one step, the best tests there are, lie on the curve or above, never below."""
    noise, rate = 0.8, 0.2
    cuts = np.linspace(-2, 4, 60)
    alarms = stats.norm.sf(cuts, 0, noise)
    missed = (1 - rate) * stats.norm.cdf(cuts, 0, noise) + rate * stats.norm.cdf(cuts, 1, noise)
    curve = trade_off([StepEvent(noise, rate)], alarms)
    assert np.all(curve <= missed + 1e-12)
    # Where false alarms are few, that is the best that can be done.
    few = (alarms < 0.2) & (alarms > 1e-6)
    np.testing.assert_allclose(curve[few], missed[few], atol=1e-4)
    # The curve is its own inverse, for it covers both directions.
    grid = np.linspace(0.01, 0.9, 25)
    there = trade_off([StepEvent(noise, rate)], grid)
    np.testing.assert_allclose(trade_off([StepEvent(noise, rate)], there), grid, atol=2e-3)


def test_trade_off_at_the_edges():
    assert trade_off([], [0.0, 0.25, 1.0]).tolist() == [1.0, 0.75, 0.0]
    assert trade_off([StepEvent(0.0, 0.5)], [0.0, 0.5]).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="false_alarms"):
        trade_off(STEPS, [1.1])


def test_mu_of_a_gaussian_is_its_own():
    assert gaussian_parameter([StepEvent(2.0, 1.0, 4)]) == pytest.approx(1.0, abs=1e-4)
    assert gaussian_parameter([StepEvent(2.0, 1.0, 4)], adjacency="replace-one") == pytest.approx(2.0, abs=1e-3)


def test_mu_is_on_the_private_side_where_the_limit_is_not():
    steps = [StepEvent(1.0, 0.02, 100)]
    mu = gaussian_parameter(steps, smallest_delta=1e-5)
    assert mu > gdp_parameter(steps)

    def gaussian(epsilon):
        return special.ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * special.ndtr(-mu / 2 - epsilon / mu)

    at_floor = get_epsilon(1.0, 0.02, 100, 1e-5)
    for epsilon, delta in zip((0.1, 0.7, at_floor), deltas_of(steps, [0.1, 0.7, at_floor]), strict=True):
        assert delta <= gaussian(epsilon) * (1 + 1e-3)
    # The heavy tail decides: at the smallest delta the two meet.
    assert gaussian(at_floor) == pytest.approx(1e-5, rel=0.02)
    assert mu < gaussian_parameter(steps, smallest_delta=1e-7)
    assert gaussian_parameter([]) == 0.0
    assert gaussian_parameter([StepEvent(0.0, 0.5)]) == math.inf
    with pytest.raises(ValueError, match="smallest_delta=1"):
        gaussian_parameter(steps, smallest_delta=1)


@pytest.mark.parametrize(
    ("accountant", "examples", "adjacency"),
    [("rdp", None, "add/remove"), ("rdp", 2, "replace-one"), ("pld", 3, "zero-out")],
)
def test_curves_of_the_other_accountants_end_exactly(accountant, examples, adjacency):
    terms = (examples, accountant, adjacency)
    curve = epsilon_curve(1.5, 0.02, 40, 1e-5, *terms, points=8)
    assert len(curve) == 40 and curve == sorted(curve) and len(set(curve)) == 8
    assert curve[-1] == get_epsilon(1.5, 0.02, 40, 1e-5, accountant, examples, adjacency)
    for step in (1, 5, 18):
        assert curve[step - 1] >= get_epsilon(1.5, 0.02, step, 1e-5, accountant, examples, adjacency) * 0.999


def test_curve_of_cut_draws():
    cut = {"adjacency": "zero-out", "max_batch": 24, "num_units": 1000}
    curve = epsilon_curve(1.5, 0.02, 20, 1e-5, **cut)
    assert curve[-1] == get_epsilon(1.5, 0.02, 20, 1e-5, **cut) > epsilon_curve(1.5, 0.02, 20, 1e-5)[-1]
    with pytest.raises(ValueError, match="points=0"):
        epsilon_curve(1.5, 0.02, 20, 1e-5, points=0)


def test_the_curve_counts_cuts_of_users_too():
    settings = {"examples_per_user": 4, "adjacency": "zero-out", "max_batch": 30, "num_units": 1000}
    curve = epsilon_curve(1.0, 0.01, 100, 1e-5, **settings)
    for step in (50, 100):
        assert curve[step - 1] >= get_epsilon(1.0, 0.01, step, 1e-5, **settings) * (1 - 1e-3)
