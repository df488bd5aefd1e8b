"""Epsilon against published and independent values, and the answers built on it."""

import math
import time
from importlib.metadata import version

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from fastclip.accounting import (
    Accountant,
    AccountingWarning,
    StepEvent,
    affordable_steps,
    epsilon_curve,
    epsilon_of,
    find,
    get_epsilon,
    get_noise_multiplier,
    guarantee_of,
    register,
)
from fastclip.accounting.mixture import Mixture
from fastclip.accounting.pld import _one_step

MNIST = 256 / 60000
SST2 = 1024 / 67349


def gaussian_epsilon(noise, delta):
    """The Gaussian mechanism's epsilon, from its closed form (Balle and Wang, arXiv 1805.06530, theorem 8)."""

    def excess(epsilon):
        first = special.ndtr(1 / (2 * noise) - epsilon * noise)
        return first - math.exp(epsilon + special.log_ndtr(-1 / (2 * noise) - epsilon * noise)) - delta

    return optimize.brentq(excess, 0, 1000, xtol=1e-12)


# noise, rate, steps, delta, a connect-the-dots upper bound on a fine grid, a certified lower bound
VECTORS = [
    (1.0, 0.01, 1000, 1e-5, 1.82824, 1.82324),
    (0.8, MNIST, 14040, 1e-5, 4.54606, 4.47581),
    (0.6, 0.001, 10000, 1e-6, 3.15223, 3.10227),
    (2.0, 0.1, 500, 1e-6, 6.21670, 6.21420),
    (5.0, 1.0, 100, 1e-5, 9.99726, 9.997256146),
    (1.1, MNIST, 14062, 1e-5, 2.38169, 2.31129),
    (4.0, 1024 / 50000, 10000, 1e-5, 2.09245, 2.087),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "upper", "lower"), VECTORS)
def test_matches_published_epsilon(noise, rate, steps, delta, upper, lower):
    epsilon = get_epsilon(noise, rate, steps, delta)
    assert epsilon == pytest.approx(upper, abs=2e-3)
    assert epsilon >= lower


# The unit is a user who owns up to K examples, each of them sampled.
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "by_examples"),
    [
        (2.0, 0.01, 2000, 1e-6, {1: 1.0350, 2: 2.2002, 4: 4.7684, 8: 10.7159, 16: 25.5982, 32: 66.834}),
        (1.0, 0.002, 1000, 1e-6, {1: 0.39095, 2: 0.82648, 4: 1.73961, 8: 3.67199, 16: 7.9106, 32: 17.791}),
        (1.0, 0.01, 500, 1e-5, {1: 1.32605, 2: 2.85493, 4: 6.24313, 8: 14.1394, 16: 33.972, 32: 88.357}),
        (4.0, 1024 / 50000, 10000, 1e-5, {2: 4.60455}),
    ],
)
def test_matches_published_user_epsilon(noise, rate, steps, delta, by_examples):
    for examples, expected in by_examples.items():
        epsilon = get_epsilon(noise, rate, steps, delta, examples_per_user=examples)
        assert epsilon == pytest.approx(expected, rel=1e-3), examples


@pytest.mark.parametrize(("noise", "steps", "delta"), [(1, 1, 1e-5), (5, 100, 1e-5), (20, 100, 1e-8), (3, 7, 1e-12)])
def test_unsampled_is_the_gaussian_mechanism(noise, steps, delta):
    exact = gaussian_epsilon(noise / math.sqrt(steps), delta)
    epsilon = get_epsilon(noise, 1.0, steps, delta)
    assert exact <= epsilon <= exact * 1.0005


def test_unsampled_user_owns_sensitivity_of_all_examples():
    assert get_epsilon(6.0, 1.0, 4, 1e-6, examples_per_user=3) == get_epsilon(2.0, 1.0, 4, 1e-6)


@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.parametrize(("noise", "rate", "examples"), [(1.0, 0.01, 1), (0.5, 0.2, 1), (1.0, 0.01, 4), (3.0, 0.3, 7)])
def test_divergences_of_a_step_match_quadrature(direction, noise, rate, examples):
    x = np.linspace(-14 * noise, examples + 14 * noise, 400_001)
    weights = stats.binom.pmf(np.arange(examples + 1), examples, rate)
    mixed = sum(w * stats.norm.pdf(x, i, noise) for i, w in enumerate(weights))
    plain = stats.norm.pdf(x, 0, noise)
    upper, lower = (mixed, plain) if direction == "remove" else (plain, mixed)
    epsilons = np.array([-1.0, -0.05, -1e-3, 0.0, 1e-3, 0.05, 0.3, 1.0, 3.0])
    expected = [np.trapezoid(np.maximum(upper - math.exp(e) * lower, 0), x) for e in epsilons]
    got = Mixture(noise, rate, examples).divergences(epsilons, direction)
    np.testing.assert_allclose(got, expected, atol=2e-9)


def test_divergences_of_a_step_match_published_values():
    # noise 1, rate 0.01, epsilon 0.5
    for examples, expected in {1: 2.21451901e-7, 2: 7.89977051e-6, 4: 1.42117128e-4, 8: 1.48253831e-3}.items():
        mixture = Mixture(1.0, 0.01, examples)
        assert mixture.divergences(np.array([0.5]), "remove")[0] == pytest.approx(expected, rel=1e-6)
        assert mixture.divergences(np.array([0.5]), "add")[0] == 0


@pytest.mark.parametrize("examples", [None, 2])
def test_agrees_with_the_library_on_mixed_steps(examples):
    steps = [StepEvent(1.2, 0.01, 150), StepEvent(1.4, 0.05, 60), StepEvent(3.0, 1.0, 2)]
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=2e-3)
    for step in steps:
        if examples is None:
            event = dp_event.PoissonSampledDpEvent(step.sample_rate, dp_event.GaussianDpEvent(step.noise_multiplier))
        else:
            weights = stats.binom.pmf(range(examples + 1), examples, step.sample_rate)
            event = dp_event.MixtureOfGaussiansDpEvent(step.noise_multiplier, list(range(examples + 1)), list(weights))
        accountant.compose(event, step.count)
    expected = accountant.get_epsilon(1e-6)
    assert epsilon_of(steps, 1e-6, examples_per_user=examples) == pytest.approx(expected, rel=1e-3)


def test_both_directions_are_composed():
    """The pair for adding is not the pair for removing, and the library takes the larger of the two epsilons."""
    both = _one_step(StepEvent(0.7, 0.3), 1, 2.0**-9, False)
    assert both._pmf_add is not both._pmf_remove
    mixture = Mixture(0.7, 0.3, 1)
    grid = np.array([-0.5, 0.0, 0.2])
    for direction, pmf in (("remove", both._pmf_remove), ("add", both._pmf_add)):
        np.testing.assert_allclose(pmf.get_delta_for_epsilon(grid), mixture.divergences(grid, direction), atol=1e-6)


def test_huge_epsilon_is_computed_without_overflow():
    """Where exp(-loss) leaves the range of doubles, a little of the precision may go; a Gaussian tells what is right."""
    exact = gaussian_epsilon(0.0285, 1e-5)
    assert exact > 700
    for noise, rate, steps in ((0.0285, 1.0, 1), (0.285, 1.0, 100), (0.285, 1 - 1e-12, 100)):
        assert exact <= get_epsilon(noise, rate, steps, 1e-5) <= exact * 1.002


def test_almost_certain_sampling_comes_close_to_none():
    """Here the loss of adding a user reaches -log P(no example drawn) = 1381."""
    for examples in (1, 40):
        certain = get_epsilon(20.0, 1.0, 3, 1e-5, examples_per_user=examples)
        assert get_epsilon(20.0, 1 - 1e-15, 3, 1e-5, examples_per_user=examples) == pytest.approx(certain, rel=1e-3)


def test_epsilon_near_700_falls_with_noise():
    below, at, above = (
        get_epsilon(noise, 0.25, 142, 1e-5, examples_per_user=2) for noise in (0.297, 0.30078125, 0.304)
    )
    assert 650 < above < at < below < 750


def test_order_and_grouping_of_steps_do_not_matter():
    first, second = StepEvent(1.0, 0.01, 100), StepEvent(2.0, 0.05, 30)
    whole = epsilon_of([first, second], 1e-5)
    assert epsilon_of([second, first], 1e-5) == whole
    assert (
        epsilon_of([StepEvent(1.0, 0.01, 40), second, StepEvent(1.0, 0.01, 60), StepEvent(9.0, 0.5, 0)], 1e-5) == whole
    )


def test_limits():
    assert get_epsilon(1.0, 0.01, 0, 1e-5) == 0.0
    assert get_epsilon(0.0, 0.01, 0, 1e-5) == 0.0
    assert get_epsilon(0.0, 0.01, 1, 1e-5) == math.inf
    assert get_epsilon(0.0, 1e-9, 1, 1e-5) == math.inf
    assert get_epsilon(0.001, 0.5, 1, 1e-5) == math.inf
    assert epsilon_of([], 1e-5) == 0.0
    assert get_epsilon(0.5, 1.0, 10**4, 1e-5) == math.inf
    # The unit is drawn at all with less probability than delta.
    assert get_epsilon(0.1, 1e-9, 100, 1e-6) == 0.0
    # A delta that double precision cannot certify.
    assert get_epsilon(1.0, 0.01, 10**5, 1e-11) == math.inf
    assert 0 < get_epsilon(1.0, 0.01, 100, 1e-11) < math.inf


@settings(max_examples=10, deadline=None)
@given(
    noise=st.floats(0.3, 20.0),
    rate=st.floats(1e-4, 1.0),
    steps=st.integers(1, 300),
    examples=st.sampled_from([1, 2, 5]),
)
def test_less_noise_or_more_sampling_never_costs_less(noise, rate, steps, examples):
    def epsilon(noise=noise, rate=rate, steps=steps, delta=1e-5, examples=examples):
        return get_epsilon(noise, rate, steps, delta, examples_per_user=examples)

    # The grid settles to 0.1 % or 1e-5.
    most = epsilon() * 1.001 + 1e-5
    assert epsilon(noise=noise * 1.1) <= most
    assert epsilon(rate=rate * 0.9) <= most
    assert epsilon(steps=max(1, steps - 1)) <= most
    assert epsilon(delta=2e-5) <= most
    assert epsilon(examples=max(1, examples - 1)) <= most


def test_curve_is_an_upper_bound_that_ends_exactly():
    curve = epsilon_curve(0.8, MNIST, 60, 1e-5)
    assert len(curve) == 60 and curve == sorted(curve)
    assert curve[-1] == get_epsilon(0.8, MNIST, 60, 1e-5)
    for step in (1, 2, 7, 30, 59):
        exact = get_epsilon(0.8, MNIST, step, 1e-5)
        assert exact * 0.999 <= curve[step - 1] <= exact * 1.01


def test_curve_of_many_steps_is_a_staircase_above_the_truth():
    curve = epsilon_curve(1.0, 0.01, 1000, 1e-5)
    assert len(curve) == 1000 and curve == sorted(curve)
    assert len(set(curve)) == 64
    for step in (1, 15, 400, 401, 999):
        assert curve[step - 1] >= get_epsilon(1.0, 0.01, step, 1e-5) * 0.999
    assert curve[499] == pytest.approx(get_epsilon(1.0, 0.01, 500, 1e-5), rel=0.01)


def test_curve_limits():
    assert epsilon_curve(0.0, 0.1, 3, 1e-5) == [math.inf] * 3
    assert epsilon_curve(1.0, 1e-9, 3, 1e-5) == [0.0] * 3
    unsampled = epsilon_curve(4.0, 1.0, 3, 1e-5)
    for step, epsilon in enumerate(unsampled, start=1):
        assert epsilon == pytest.approx(gaussian_epsilon(4 / math.sqrt(step), 1e-5), rel=2e-3)
    with pytest.raises(ValueError, match="steps=0"):
        epsilon_curve(1.0, 0.1, 0, 1e-5)
    with pytest.raises(ValueError, match="delta=2"):
        epsilon_curve(1.0, 0.1, 1, 2)


def test_queries_are_quick():
    _one_step.cache_clear()
    started = time.perf_counter()
    get_epsilon(0.8, 0.02, 60, 1e-5)
    get_epsilon(1.0, 0.01, 1000, 1e-5)
    get_epsilon(2.0, 0.01, 2000, 1e-6, examples_per_user=8)
    get_epsilon(1e6, 1e-6, 10**7, 1e-5)
    epsilon_curve(0.8, 0.02, 60, 1e-5)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps", "examples", "expected"),
    [
        (1.0, 7.42402e-6, SST2, 198, None, 1.17564),
        (3.0, 7.42402e-6, SST2, 198, None, 0.76489),
        (8.0, 7.42402e-6, SST2, 198, None, 0.54559),
        (8.0, 1e-6, 0.01, 2000, 2, 0.9031),
        (8.0, 1e-6, 0.01, 2000, 4, 1.3939),
        (8.0, 1e-6, 0.01, 2000, 16, 4.7731),
    ],
)
def test_calibrated_noise_is_published_tight_and_private(epsilon, delta, rate, steps, examples, expected):
    noise = get_noise_multiplier(epsilon, delta, rate, steps, examples_per_user=examples)
    assert noise == pytest.approx(expected, rel=5e-4)
    assert noise == float(f"{noise:.5g}")
    assert get_epsilon(noise, rate, steps, delta, examples_per_user=examples) <= epsilon
    assert get_epsilon(noise * (1 - 2e-4), rate, steps, delta, examples_per_user=examples) > epsilon


@settings(max_examples=5, deadline=None)
@given(epsilon=st.floats(0.05, 30.0), rate=st.floats(1e-3, 1.0), steps=st.integers(1, 200))
def test_calibration_returns_the_private_end(epsilon, rate, steps):
    noise = get_noise_multiplier(epsilon, 1e-5, rate, steps)
    assert get_epsilon(noise, rate, steps, 1e-5) <= epsilon
    assert get_epsilon(noise * 0.99, rate, steps, 1e-5) > epsilon * 0.999


def test_affordable_steps_spend_the_budget_and_no_more():
    assert affordable_steps(2.0, 1e-5, 1.0, 0.02) > 1
    spent = [StepEvent(1.5, 0.05, 20)]
    more = affordable_steps(2.0, 1e-5, 1.0, 0.02, spent=spent)
    assert epsilon_of([*spent, StepEvent(1.0, 0.02, more)], 1e-5) <= 2.0
    assert epsilon_of([*spent, StepEvent(1.0, 0.02, more + 1)], 1e-5) > 2.0
    assert more < affordable_steps(2.0, 1e-5, 1.0, 0.02)
    assert affordable_steps(0.1, 1e-5, 0.5, 0.5) == 0
    assert affordable_steps(2.0, 1e-5, 0.0, 0.02) == 0
    assert affordable_steps(1.0, 1e-5, 1e6, 1e-6) == 10**7


def test_calibrated_noise_pays_for_exactly_its_steps():
    noise = get_noise_multiplier(3.0, 7.42402e-6, SST2, 198)
    assert affordable_steps(3.0, 7.42402e-6, noise, SST2) == 198


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"noise_multiplier": math.inf}, "noise_multiplier=inf"),
        ({"noise_multiplier": "1"}, "noise_multiplier='1'"),
        ({"sample_rate": 0.0}, "sample_rate=0.0"),
        ({"sample_rate": 1.5}, "sample_rate=1.5"),
        ({"sample_rate": True}, "sample_rate=True"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"examples_per_user": 0}, "examples_per_user=0"),
        ({"accountant": "moments"}, "accountant='moments'"),
    ],
)
def test_bad_input_is_named(arguments, named):
    good = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5}
    with pytest.raises(ValueError, match=named):
        get_epsilon(**(good | arguments))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"target_epsilon": 0.0}, "target_epsilon=0.0"),
        ({"target_epsilon": math.inf}, "target_epsilon=inf"),
        ({"target_delta": 1.0}, "target_delta=1.0"),
        ({"sample_rate": 2.0}, "sample_rate=2.0"),
        ({"steps": 0}, "steps=0"),
        ({"target_delta": 1e-15, "steps": 10}, "out of reach"),
        ({"accountant": "moments"}, "accountant='moments'"),
    ],
)
def test_bad_calibration_input_is_named(arguments, named):
    good = {"target_epsilon": 1.0, "target_delta": 1e-5, "sample_rate": 0.1, "steps": 10}
    with pytest.raises(ValueError, match=named):
        get_noise_multiplier(**(good | arguments))


def test_accountants_are_found_by_name(monkeypatch):
    registry = "fastclip.accounting.accountants._REGISTRY"
    monkeypatch.setattr(registry, {"pld": find("pld")})
    assert find("pld").rigorous
    assert find("pld").library == f"dp-accounting {version('dp-accounting')}"
    with pytest.raises(ValueError, match="choose one of 'pld'"):
        find("rdp")
    rough = Accountant("rough", "nothing 1.0", False, lambda steps, *terms: 0.5 * sum(s.count for s in steps))
    register(rough)
    with pytest.warns(AccountingWarning, match="'rough' approximates"):
        assert get_epsilon(1.0, 0.1, 6, 1e-5, accountant="rough") == 3.0
    with pytest.raises(ValueError, match="registered already"):
        register(rough)
    with pytest.raises(ValueError, match="adjacency='replace-one' is beyond accountant='rough'"):
        get_epsilon(1.0, 0.1, 6, 1e-5, "rough", adjacency="replace-one")
    with pytest.warns(AccountingWarning):
        stated = guarantee_of([StepEvent(1.0, 0.1, 6)], 1e-5, accountant="rough")
    assert not stated.rigorous and "approximates" in str(stated)


def test_events_hold_plain_numbers():
    event = StepEvent(np.float32(0.5), np.float64(0.25), np.int64(3))
    assert event == StepEvent(0.5, 0.25, 3)
    assert [type(value) for value in (event.noise_multiplier, event.sample_rate, event.count)] == [float, float, int]
    with pytest.raises(ValueError, match="count=-1"):
        StepEvent(1.0, 0.1, -1)


def test_noise_beyond_all_measure_costs_nothing():
    for noise in (1e15, 1e100, 1e300):
        assert get_epsilon(noise, 0.5, 10, 1e-5) == pytest.approx(0.0, abs=1e-9)


def test_where_no_noise_is_needed_calibration_says_so():
    noise = get_noise_multiplier(1.0, 1e-2, 1e-9, 10)
    assert 0 < noise < 1e-9 and get_epsilon(noise, 1e-9, 10, 1e-2) <= 1.0
