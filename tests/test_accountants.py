"""The accountants beside `pld`: published and independent values, and what has to hold between all of them."""

import math
import sys
from importlib.metadata import version

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from fastclip.accounting import StepEvent, epsilon_of, find, get_epsilon, get_noise_multiplier, prv
from fastclip.accounting.gdp import gdp_parameter
from fastclip.accounting.group import vadhan
from fastclip.accounting.prv import _Loss, _Truncated
from fastclip.accounting.rdp import group_divergences, renyi_divergences, renyi_epsilon
from fastclip.accounting.shuffle import shuffle_lower_bound

# Approximations are among what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::fastclip.accounting.AccountingWarning")

MNIST = 256 / 60000
SST2 = 1024 / 67349
ALL = ("rdp", "prv", "gdp", "group")


def gaussian_epsilon(noise, delta):
    """The Gaussian mechanism's epsilon, from its closed form (Balle and Wang, arXiv 1805.06530, theorem 8)."""

    def excess(epsilon):
        first = special.ndtr(1 / (2 * noise) - epsilon * noise)
        return first - math.exp(epsilon + special.log_ndtr(-1 / (2 * noise) - epsilon * noise)) - delta

    return 0.0 if excess(0) <= 0 else optimize.brentq(excess, 0, 1000, xtol=1e-12)


def pld_lower(*arguments, **more):
    """Below the truth: `pld` is above it by at most what its grid settles to, 0.1 % or 1e-5, with some to spare."""
    return get_epsilon(*arguments, **more) * 0.998 - 2e-5


# noise, rate, steps, delta; rdp by dp_accounting, the upper end of prv by opacus, a certified lower bound
VECTORS = [
    (1.0, 0.01, 1000, 1e-5, 2.10137, 1.83837, 1.82324),
    (0.8, MNIST, 14040, 1e-5, 5.00048, 4.55628, 4.47581),
    (0.6, 0.001, 10000, 1e-6, 3.99919, 3.16250, 3.10227),
    (2.0, 0.1, 500, 1e-6, 6.67929, 6.22697, 6.21420),
    (5.0, 1.0, 100, 1e-5, 10.72551, 10.00771, 9.997256146),
    (1.1, MNIST, 14062, 1e-5, 2.59656, 2.39174, 2.31129),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "rdp", "prv_upper", "lower"), VECTORS)
def test_published_epsilons(noise, rate, steps, delta, rdp, prv_upper, lower):
    assert get_epsilon(noise, rate, steps, delta, "rdp") == pytest.approx(rdp, abs=2e-3)
    assert get_epsilon(noise, rate, steps, delta, "prv") == pytest.approx(prv_upper, abs=1e-4)
    assert get_epsilon(noise, rate, steps, delta, "prv") > lower


def test_published_divergences_of_a_step():
    orders = (2.0, 4.0, 8.0, 16.0, 32.0)
    published = [1.71813422e-4, 3.63154049e-4, 8.93643908e-4, 3.08785078, 11.2462759]
    one = renyi_divergences([StepEvent(1.0, 0.01)], orders)
    np.testing.assert_allclose(one, published, rtol=1e-8)
    many = renyi_divergences([StepEvent(1.0, 0.01, 7), StepEvent(2.0, 1.0, 3)], orders)
    np.testing.assert_allclose(many, 7 * one + 3 * np.array(orders) / 8, rtol=1e-9)


def test_divergences_are_no_smaller_than_the_exact_ones():
    # (order - 1) times the divergence at order 2 is log(1 + q^2 (e^(1 / sigma^2) - 1)).
    for noise, rate in ((1.0, 0.01), (10.0, 1e-6), (1000.0, 1e-8), (0.5, 0.3)):
        exact = math.log1p(rate**2 * math.expm1(noise**-2))
        (computed,) = renyi_divergences([StepEvent(noise, rate)], [2.0])
        assert exact <= computed <= exact * (1 + 1e-9) + 2e-14


@pytest.mark.parametrize(("epsilon", "noise"), [(1, 1.29971), (3, 0.82539), (8, 0.58048)])
def test_published_noise_by_rdp(epsilon, noise):
    assert get_noise_multiplier(epsilon, 7.42402e-6, SST2, 198, "rdp") == pytest.approx(noise, rel=1e-3)


def test_other_published_settings():
    assert get_epsilon(4.0, 1024 / 50000, 10_000, 1e-5, "rdp") == pytest.approx(2.27462, abs=1e-3)
    assert get_epsilon(4.0, 1024 / 50000, 10_000, 1e-5, "prv") == pytest.approx(2.09245 + 0.01, abs=1e-3)
    assert get_epsilon(3.0, 0.1, 512, 1e-6, "prv") == pytest.approx(3.77 + 0.01, abs=0.006)
    for delta, epsilon in ((3.056848e-2, 0.5), (2.612497e-3, 1.0), (2.665722e-6, 2.0)):
        assert get_epsilon(1.0, 0.01, 1000, delta, "prv") == pytest.approx(epsilon + 0.01, abs=1e-3)


def test_best_order_is_never_the_last_of_the_grid():
    for noise, rate, steps in ((100.0, 0.001, 1000), (20.0, 0.001, 100), (8.0, 0.0001, 10)):
        event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
        coarse = dp_accounting.rdp.RdpAccountant([2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
        coarse.compose(event, steps)
        assert coarse.get_epsilon_and_optimal_order(1e-6)[1] == 64
        epsilon, order = renyi_epsilon([StepEvent(noise, rate, steps)], 1e-6)
        assert 64 < order < 2**16
        assert epsilon < 0.9 * coarse.get_epsilon(1e-6)


# noise, rate, steps, delta, and by K: pld for users, group privacy from pld (or rdp), group privacy of rdp
USERS = [
    (
        (2.0, 0.01, 2000, 1e-6),
        {2: 2.2002, 4: 4.7684},
        {1: 1.035, 2: 2.221, 4: 4.978, 8: 12.41, 32: 403.0},
        {1: 1.12, 2: 2.97, 4: 8.13, 16: 93.9},
    ),
    (
        (1.0, 0.002, 1000, 1e-6),
        {},
        {8: 5.281},
        {},
    ),
    (
        (1.0, 0.01, 500, 1e-5),
        {4: 6.24313},
        {4: 8.19, 8: 123.0, 16: math.inf},
        {},
    ),
]


@pytest.mark.parametrize(("setting", "mixtures", "chained", "renyi"), USERS)
def test_published_group_privacy(setting, mixtures, chained, renyi):
    for examples, expected in mixtures.items():
        mixture = get_epsilon(*setting, examples_per_user=examples)
        assert mixture == pytest.approx(expected, rel=1e-3)
        # Knowing what a user's examples do together is never worse.
        assert mixture <= get_epsilon(*setting, "group", examples) * 1.001
    for examples, expected in chained.items():
        # At K = 8 pld charges delta for rounding, where the published figure has a floor of 1e-15 in all.
        assert get_epsilon(*setting, "group", examples) == pytest.approx(expected, rel=7e-3), examples
    for examples, expected in renyi.items():
        assert get_epsilon(*setting, "rdp", examples) == pytest.approx(expected, rel=1e-2), examples


def test_group_divergences_are_mironovs():
    orders, divergences = np.array([3.0, 4.0, 8.0, 16.0, 32.0]), np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    for members, of_group, rho in (
        (1, [3, 4, 8, 16, 32], [0.1, 0.2, 0.3, 0.4, 0.5]),
        (2, [2, 4, 8, 16], [0.6, 0.9, 1.2, 1.5]),
        (3, [2, 4, 8], [2.7, 3.6, 4.5]),
        (4, [2, 4, 8], [2.7, 3.6, 4.5]),
        (8, [2, 4], [10.8, 13.5]),
        (64, [], []),
    ):
        got = group_divergences(orders, divergences, members)
        np.testing.assert_allclose(got[0], of_group)
        np.testing.assert_allclose(got[1], rho)


def test_chained_group_privacy_chooses_the_best_example_epsilon():
    """Against a scan of all example-level epsilons of a Gaussian mechanism, whose delta is known in closed form."""
    epsilons = np.linspace(1e-3, 30, 400_001)
    for noise, members, delta in ((3.0, 2, 1e-6), (3.0, 7, 1e-6), (1.0, 3, 1e-5), (1.0, 2, 1e-9), (10.0, 5, 1e-4)):
        deltas = special.ndtr(1 / (2 * noise) - epsilons * noise) - np.exp(
            epsilons + special.log_ndtr(-1 / (2 * noise) - epsilons * noise)
        )
        grown = deltas * np.expm1(members * epsilons) / np.expm1(epsilons)
        best = members * epsilons[grown > delta].max()

        def of_example(small, noise=noise):
            return dp_accounting.get_epsilon_gaussian(noise, small)

        found = vadhan(of_example, members, delta)
        assert best * (1 - 1e-9) <= found <= best * (1 + 2e-4)


def test_chained_group_privacy_of_an_example_that_costs_nothing_or_is_unknown():
    for members, delta in ((2, 1e-6), (5, 1e-6), (56, 0.01)):
        assert vadhan(lambda small: 0.0, members, delta) == 0.0
    assert vadhan(lambda delta: math.inf, 5, 1e-6) == math.inf
    assert vadhan(lambda delta: delta, 1, 1e-6) == 1e-6
    # Pure privacy holds for every delta: here the smallest possible growth is above any delta but a tiny one.
    assert vadhan(lambda delta: 2.0, 3, 1e-6) == 6.0
    # What is known ends shortly below the delta that is needed.
    needed = 1e-6 / (1 + math.e**2 + math.e**4)
    assert vadhan(lambda delta: 2.0 if delta > 0.98 * needed else math.inf, 3, 1e-6) == 6.0
    assert vadhan(lambda delta: 2.0 if delta > 1.02 * needed else math.inf, 3, 1e-6) == math.inf


def test_gdp_is_the_limit_and_too_small():
    steps = [StepEvent(1.0, 0.01, 1000)]
    assert gdp_parameter(steps) == pytest.approx(0.01 * math.sqrt(1000 * (math.e - 1)))
    epsilon = epsilon_of(steps, 1e-5, "gdp")
    assert epsilon == pytest.approx(1.6177, abs=1e-4)
    assert epsilon < 0.89 * 1.8282
    assert epsilon == pytest.approx(gaussian_epsilon(1 / gdp_parameter(steps), 1e-5), rel=1e-9)
    assert not find("gdp").rigorous
    both = gdp_parameter([*steps, StepEvent(2.0, 0.05, 30), StepEvent(0.0, 0.5, 0)])
    assert both**2 == pytest.approx(gdp_parameter(steps) ** 2 + 30 * 0.05**2 * math.expm1(0.25))
    assert epsilon_of(steps, 1e-5, "gdp", 3) == pytest.approx(gaussian_epsilon(1 / (3 * gdp_parameter(steps)), 1e-5))
    assert gdp_parameter([]) == 0.0


# noise, batches, delta, the published bound, what a Poisson accountant would say
@pytest.mark.parametrize(
    ("noise", "batches", "delta", "bound", "poisson"),
    [
        (0.6, 66, 7.42e-6, 8.116, 4.57),
        (0.8, 66, 7.42e-6, 5.73, 1.97),
        (1.0, 66, 7.42e-6, 4.24, 0.99),
        (0.5, 10_000, 1e-6, 10.995, 1.95),
    ],
)
def test_published_shuffle_bounds(noise, batches, delta, bound, poisson):
    found = shuffle_lower_bound(noise, batches, delta)
    assert found == pytest.approx(bound, abs=1.5e-3)
    assert shuffle_lower_bound(noise, batches, delta, epochs=10) == found
    # The rate is that of the data set, 1024 / 67349, and not quite 1 / 66.
    assert get_epsilon(noise, SST2 if batches == 66 else 1 / batches, batches, delta) == pytest.approx(
        poisson, abs=0.01
    )


def test_shuffle_bound_of_one_batch_is_the_gaussian_mechanism():
    for noise, delta in ((0.3, 1e-6), (3.0, 1e-6), (100.0, 1e-5), (2.0, 1e-12), (2.0, 0.1)):
        assert shuffle_lower_bound(noise, 1, delta) == pytest.approx(gaussian_epsilon(noise, delta), rel=1e-6)


def test_shuffle_bound_at_the_edges():
    assert shuffle_lower_bound(0, 10, 1e-5) == math.inf
    assert shuffle_lower_bound(1.0, 10, 0.9) == 0.0
    assert 0 < shuffle_lower_bound(1.0, 10, 1e-300) < math.inf
    assert 0 < shuffle_lower_bound(1.0, 10**9, 1e-6) < 1e-3
    # Where other batches exceed c far more often than the one: they hide what it does.
    assert 0 < shuffle_lower_bound(100.0, 10**5, 1e-290) < 0.9 * shuffle_lower_bound(100.0, 2, 1e-290)
    # Where the probability of the event is below the smallest double: (1 / sigma)^2 / 2, and a little.
    assert shuffle_lower_bound(1e-3, 10, 1e-5) == pytest.approx(504_264, rel=1e-4)
    assert 1e11 < shuffle_lower_bound(1e-6, 10, 1e-5) < math.inf
    assert 1e11 < shuffle_lower_bound(1e-200, 10, 1e-5) < math.inf


@settings(max_examples=40, deadline=None)
@given(noise=st.floats(0.2, 10.0), batches=st.integers(1, 5000), log_delta=st.floats(-40.0, -3.0))
def test_shuffle_bound_lies_below_one_that_holds_and_falls_with_noise(noise, batches, log_delta):
    """Shuffling costs no more than batches in a known order, where the one example is in one batch."""
    delta = math.exp(log_delta)
    bound = shuffle_lower_bound(noise, batches, delta)
    assert 0 <= bound <= gaussian_epsilon(noise, delta) * (1 + 1e-9) + 1e-9
    assert shuffle_lower_bound(noise * 1.05, batches, delta) <= bound * (1 + 1e-6)
    assert shuffle_lower_bound(noise, batches + 1, delta) <= bound * (1 + 1e-6)
    assert shuffle_lower_bound(noise, batches, 1.5 * delta) <= bound * (1 + 1e-6)


def test_prv_losses_match_their_distribution():
    """P(loss <= l(x)) is P(output <= x), and for adding a unit the other way round."""
    for noise, rate in ((1.0, 0.01), (0.5, 0.5), (2.0, 1e-6), (0.15, 1 - 1e-12), (3.0, 1.0)):
        x = np.linspace(-6 * noise, 1 + 6 * noise, 301)
        drawn = (x - 0.5) / noise**2
        loss = drawn if rate == 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + drawn)
        loss_grows = np.diff(loss, append=np.inf) > 1e-9
        plain, shifted = special.ndtr(x / noise), special.ndtr((x - 1) / noise)
        removing = _Loss(StepEvent(noise, rate), "remove").cdf(loss)
        adding = _Loss(StepEvent(noise, rate), "add").cdf(-loss)
        expected = (1 - rate) * plain + rate * shifted
        np.testing.assert_allclose(removing[loss_grows], expected[loss_grows], atol=1e-8)
        np.testing.assert_allclose(adding[loss_grows], 1 - plain[loss_grows], atol=1e-8)


def test_prv_means_are_the_published_divergences():
    for noise, rate, removing, adding in (
        (1.0, 0.01, 8.3812207651e-5, 8.1889769141e-5),
        (1.1, MNIST, 1.1609111534e-5, 1.1522736821e-5),
        (2.0, 1.0, 0.125, 0.125),
        (0.05, 1.0, 200.0, 200.0),
    ):
        for direction, mean in (("remove", removing), ("add", adding)):
            loss = _Truncated(_Loss(StepEvent(noise, rate), direction), -500.0, 500.0)
            assert loss.mean() == pytest.approx(mean, rel=1e-10)


def test_prv_means_are_those_of_the_truncated_losses():
    for noise, rate in ((1.0, 0.01), (0.5, 0.5), (0.2, 0.9)):
        for direction in ("remove", "add"):
            loss = _Truncated(_Loss(StepEvent(noise, rate), direction), -1.5, 2.0)
            edges = np.linspace(-1.5, 2.0, 200_001)
            masses = loss.probability(edges[:-1], edges[1:])
            assert masses.sum() == pytest.approx(1, rel=1e-12)
            assert loss.mean() == pytest.approx(masses @ (edges[:-1] + edges[1:]) / 2, abs=1e-9)


def test_prv_composes_both_directions(monkeypatch):
    asked = []

    def pretend(steps, delta, direction, eps_error):
        asked.append((direction, eps_error))
        return {("remove", 0.01): 2.0, ("add", 0.1): coarse, ("add", 0.01): 2.05}[direction, eps_error]

    monkeypatch.setattr(prv, "_upper_end", pretend)
    coarse = 1.9
    assert get_epsilon(1.0, 0.1, 10, 1e-5, "prv") == 2.0
    assert asked == [("remove", 0.01), ("add", 0.1)]
    coarse = 2.1
    assert get_epsilon(1.0, 0.1, 10, 1e-5, "prv") == 2.05


def test_prv_directions_match_those_of_pld():
    """On their own: pld takes the larger of the two, dp_accounting keeps them apart."""
    noise, rate, steps, delta = 0.7, 0.1, 20, 1e-4
    both = dp_accounting.pld.privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=1e-3
    ).self_compose(steps)
    for direction, pmf in (("remove", both._pmf_remove), ("add", both._pmf_add)):
        upper = prv._upper_end([StepEvent(noise, rate, steps)], delta, direction, 0.01)
        assert upper == pytest.approx(pmf.get_epsilon_for_delta(delta) + 0.01, abs=2e-3)


def test_prv_takes_a_coarser_grid_where_its_own_would_not_fit(monkeypatch):
    domain = prv._package("domain").Domain
    create, sizes = domain.create_aligned, []

    def spy(*arguments):
        made = create(*arguments)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(domain, "create_aligned", spy)
    steps = [StepEvent(0.8, MNIST, 600), StepEvent(0.9, MNIST, 400)]
    exact = epsilon_of(steps, 1e-5)
    assert exact < epsilon_of(steps, 1e-5, "prv") < exact + 0.02
    assert max(sizes) > 10_000
    for limit, most in (("_MOST_POINTS", 4096), ("_MOST_POINTS_OF_ALL", 8192)):
        sizes.clear()
        with monkeypatch.context() as patched:
            patched.setattr(prv, limit, most)
            assert exact + 0.02 < epsilon_of(steps, 1e-5, "prv") < exact + 1
        assert 4000 < max(sizes) <= 4100
    # Few points and little to lose: the error grows, and the domain with it.
    for most in (7, 8, 12):
        monkeypatch.setattr(prv, "_MOST_POINTS", most)
        sizes.clear()
        assert 1 < get_epsilon(100.0, 0.001, 1, 1e-5, "prv") < 100
        assert max(sizes) <= most + 4
    monkeypatch.setattr(prv, "_MOST_POINTS", 4)
    with pytest.raises(ValueError, match=r'cannot hold 1 kinds of steps, 1 in all; use accountant="pld"'):
        get_epsilon(100.0, 0.001, 1, 1e-5, "prv")


def test_prv_says_where_its_package_fails():
    with pytest.raises(ValueError, match=r'accountant="prv" fails on delta=.* use accountant="pld"'):
        get_epsilon(1.0, 0.1, 10, 1.01e-14, "prv")


def test_prv_without_its_package(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("prv_accountant.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prv_accountant", None)
    with pytest.raises(ImportError, match=r'pip install "prv_accountant>=0.2"'):
        get_epsilon(1.0, 0.1, 10, 1e-5, "prv")


# Where some accountants refuse: what they cannot do has to name the argument, its value and the remedy.
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: get_epsilon(1.0, 0.1, 10, 1e-5, "prv", 2), 'examples_per_user=2 .* use accountant="pld"'),
        (lambda: get_epsilon(1.0, 0.1, 10, 1e-5, "rdp", 513), 'examples_per_user=513 .* use accountant="pld"'),
        (lambda: group_divergences(np.array([2.0]), np.array([0.1]), 0), "members=0"),
        (lambda: renyi_divergences([StepEvent(1.0, 0.1)], [2.0, 1.0]), "orders=.* 1.0; give orders above 1"),
        (lambda: vadhan(lambda delta: 1.0, 0, 1e-5), "examples_per_user=0"),
        (lambda: vadhan(lambda delta: 1.0, 2, 1.0), "delta=1.0"),
        (lambda: shuffle_lower_bound(-1.0, 10, 1e-5), "noise_multiplier=-1.0 is negative; give 0"),
        (lambda: shuffle_lower_bound(math.nan, 10, 1e-5), "noise_multiplier=nan"),
        (lambda: shuffle_lower_bound(1.0, 0, 1e-5), "steps_per_epoch=0"),
        (lambda: shuffle_lower_bound(1.0, 2.5, 1e-5), "steps_per_epoch=2.5"),
        (lambda: shuffle_lower_bound(1.0, 10, 0.0), "delta=0.0"),
        (lambda: shuffle_lower_bound(1.0, 10, 1e-5, epochs=0), "epochs=0"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize("accountant", ALL)
def test_extremes(accountant):
    def epsilon(*arguments):
        return get_epsilon(*arguments, accountant)

    assert epsilon(1.0, 0.01, 0, 1e-5) == 0.0
    assert epsilon(0.0, 0.01, 1, 1e-5) == math.inf
    assert epsilon(1e-9, 0.5, 10, 1e-5) == math.inf
    assert epsilon(1e-300, 0.5, 10, 1e-5) == math.inf
    # prv's interval ends 0.01 above the truth, whatever that is.
    assert epsilon(1e9, 1e-9, 10, 1e-5) <= 0.01
    assert epsilon(1e12, 0.5, 10, 1e-5) <= 0.01
    if accountant != "group":
        assert epsilon(1e300, 0.5, 10, 1e-5) <= 0.01
    assert epsilon(1.0, 1e-310, 10, 1e-5) <= 0.01
    assert epsilon(1.0, 0.01, 10, 0.99) == 0.0
    assert epsilon(3.0, 1 - 2**-53, 10, 1e-5) == pytest.approx(epsilon(3.0, 1.0, 10, 1e-5), rel=0.05)


def test_a_delta_that_cannot_be_certified():
    assert get_epsilon(1.0, 0.01, 10**5, 1e-11, "prv") == math.inf
    assert get_epsilon(1.0, 0.01, 10**5, 1e-11, "rdp") < math.inf
    assert get_epsilon(1.0, 0.01, 100, 1e-300, "rdp") < math.inf


@pytest.mark.parametrize("accountant", ALL)
def test_unsampled_steps_are_a_gaussian_mechanism(accountant):
    exact = gaussian_epsilon(0.4 * 5, 1e-6)
    epsilon = get_epsilon(10.0, 1.0, 25, 1e-6, accountant)
    slack = {"rdp": 0.12, "prv": 0.011 / exact, "gdp": 0.01, "group": 1e-3}[accountant]
    assert exact <= epsilon <= exact * (1 + slack)
    assert epsilon == pytest.approx(epsilon_of([StepEvent(10.0, 1.0)] * 25, 1e-6, accountant))


@pytest.mark.parametrize("accountant", ALL)
def test_steps_that_differ_are_composed(accountant):
    first, second, third = StepEvent(1.0, 0.02, 60), StepEvent(2.0, 0.1, 20), StepEvent(9.0, 1.0, 3)
    whole = epsilon_of([first, second, third], 1e-5, accountant)
    assert epsilon_of([third, second, StepEvent(1.0, 0.02, 25), StepEvent(1.0, 0.02, 35)], 1e-5, accountant) == whole
    assert whole > epsilon_of([first, second], 1e-5, accountant) > epsilon_of([first], 1e-5, accountant)
    assert whole == pytest.approx(
        epsilon_of([first, second, third], 1e-5), rel={"gdp": 0.2, "rdp": 0.25}.get(accountant, 0.02)
    )
    # Steps that differ by next to nothing cost what equal ones do.
    alike = [StepEvent(1.0, 0.02, 60), StepEvent(1.0 + 1e-9, 0.02, 40)]
    assert epsilon_of(alike, 1e-5, accountant) == pytest.approx(get_epsilon(1.0, 0.02, 100, 1e-5, accountant), rel=1e-3)


@settings(max_examples=10, deadline=None)
@given(
    accountant=st.sampled_from(ALL),
    noise=st.floats(0.5, 20.0),
    rate=st.floats(1e-4, 0.5),
    steps=st.integers(1, 100),
)
def test_less_noise_or_more_sampling_never_costs_less(accountant, noise, rate, steps):
    def epsilon(noise=noise, rate=rate, steps=steps, delta=1e-5):
        return get_epsilon(noise, rate, steps, delta, accountant)

    # Grids of losses and of orders move the result by so much.
    most = epsilon() * 1.001 + 1e-5
    assert epsilon(noise=noise * 1.1) <= most
    assert epsilon(rate=rate * 0.9) <= most
    assert epsilon(steps=max(1, steps - 1)) <= most
    assert epsilon(delta=2e-5) <= most


@settings(max_examples=10, deadline=None)
@given(
    noise=st.floats(0.5, 20.0),
    rate=st.floats(1e-4, 1.0),
    steps=st.integers(1, 100),
    log_delta=st.floats(-20.0, -5.0),
)
def test_upper_bounds_are_above_the_lower_end_of_pld(noise, rate, steps, log_delta):
    delta = math.exp(log_delta)
    lower = pld_lower(noise, rate, steps, delta)
    assert get_epsilon(noise, rate, steps, delta, "rdp") >= lower
    closest = get_epsilon(noise, rate, steps, delta, "prv")
    assert closest >= lower
    # Its proven error is 0.01 on both sides.
    assert closest <= get_epsilon(noise, rate, steps, delta) + 0.021


@settings(max_examples=8, deadline=None)
@given(noise=st.floats(0.8, 10.0), rate=st.floats(1e-3, 0.1), steps=st.integers(1, 100), examples=st.integers(2, 5))
def test_group_privacy_is_above_what_users_cost(noise, rate, steps, examples):
    arguments = (noise, rate, steps, 1e-5)
    lower = pld_lower(*arguments, examples_per_user=examples)
    for accountant in ("group", "rdp"):
        one = get_epsilon(*arguments, accountant)
        group = get_epsilon(*arguments, accountant, examples)
        assert group >= lower
        assert group >= one
        # A user with one example is an example.
        assert get_epsilon(*arguments, accountant, 1) == one


def test_they_are_registered_with_what_computes_them():
    for name, rigorous in (("rdp", True), ("prv", True), ("gdp", False), ("group", True)):
        accountant = find(name)
        package = "prv-accountant" if name == "prv" else "dp-accounting"
        assert accountant.library == f"{package} {version(package)}"
        assert accountant.rigorous is rigorous


def test_rdp_leaves_the_log_alone(caplog):
    """Its library logs each order without a value, dozens of lines that call for nothing."""
    assert math.isinf(renyi_divergences([StepEvent(50.0, 0.5)], [1.1])[0])
    assert get_epsilon(50.0, 0.5, 10, 1e-5, "rdp") < 1
    assert not caplog.records
