"""Replace-one neighbours, draws that are cut, and batches of a fixed size: published values and what must hold."""

import math
import warnings

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from scipy import optimize, special, stats

from fastclip.accounting import (
    AccountingWarning,
    StepEvent,
    affordable_steps,
    epsilon_by_direction,
    epsilon_of,
    fixed_size_epsilon,
    get_epsilon,
    get_noise_multiplier,
    guarantee_of,
    safe_max_batch,
)

UNITS = 67349
RATE = 1024 / UNITS
# Noise for epsilon 3: sigma, rate, steps, delta.
SST2 = (0.76489, RATE, 198, 7.42402e-6)


def test_published_epsilons_of_the_three_adjacencies():
    assert get_epsilon(*SST2) == pytest.approx(3.000, abs=2e-3)
    assert get_epsilon(*SST2, adjacency="zero-out") == get_epsilon(*SST2)
    assert get_epsilon(*SST2, adjacency="replace-one") == pytest.approx(3.492, abs=2e-3)


def test_replaced_unit_without_sampling_moves_a_sum_twice_as_far():
    assert get_epsilon(6.0, 1.0, 9, 1e-6, adjacency="replace-one") == get_epsilon(3.0, 1.0, 9, 1e-6)
    one = get_epsilon(4.0, 1.0, 1, 1e-6, adjacency="replace-one")

    def excess(epsilon):
        return special.ndtr(1 / 4 - 2 * epsilon) - math.exp(epsilon) * special.ndtr(-1 / 4 - 2 * epsilon) - 1e-6

    exact = optimize.brentq(excess, 0, 50)
    assert exact <= one <= exact * 1.001


def test_replacing_agrees_with_quadrature_over_one_step():
    noise, rate, delta = 0.7, 0.2, 1e-4
    x = np.linspace(-1 - 12 * noise, 1 + 12 * noise, 400_001)
    plain = (1 - rate) * stats.norm.pdf(x, 0, noise)
    one, other = plain + rate * stats.norm.pdf(x, 1, noise), plain + rate * stats.norm.pdf(x, -1, noise)

    def excess(epsilon):
        return np.trapezoid(np.maximum(one - math.exp(epsilon) * other, 0), x) - delta

    exact = optimize.brentq(excess, 0, 50)
    found = get_epsilon(noise, rate, 1, delta, adjacency="replace-one")
    assert exact - 1e-6 <= found <= exact * 1.001
    assert found > get_epsilon(noise, rate, 1, delta)


def test_replacing_by_rdp_and_groups_is_above_pld():
    truth = get_epsilon(*SST2, adjacency="replace-one") * 0.998
    assert get_epsilon(*SST2, "rdp", adjacency="replace-one") > truth
    assert get_epsilon(*SST2, "group", adjacency="replace-one") == get_epsilon(*SST2, adjacency="replace-one")
    few = (2.0, 0.01, 100, 1e-6)
    # Removing and adding: the group of two is the same one.
    assert get_epsilon(*few, "rdp", adjacency="replace-one") == get_epsilon(*few, "rdp", 2)
    assert get_epsilon(*few, "rdp", 3, adjacency="replace-one") == get_epsilon(*few, "rdp", 6)
    several = get_epsilon(*few, "group", 3, adjacency="replace-one")
    assert get_epsilon(*few, "group", 3) < several < math.inf
    assert several >= 3 * get_epsilon(*few, adjacency="replace-one")


@pytest.mark.parametrize(
    ("accountant", "examples", "remedy"),
    [
        ("prv", None, 'accountant="pld"'),
        ("gdp", None, 'accountant="pld"'),
        ("edgeworth", None, 'accountant="pld"'),
        ("prv", 2, 'accountant="group"'),
        ("pld", 2, 'accountant="group"'),
    ],
)
def test_who_cannot_account_for_replacing_says_who_can(accountant, examples, remedy):
    with pytest.raises(ValueError, match=f"replace-one.*{remedy}"):
        get_epsilon(*SST2, accountant, examples, "replace-one")
    with pytest.raises(ValueError, match=f"replace-one.*{remedy}"):
        get_noise_multiplier(3.0, 1e-5, 0.01, 10, accountant, examples, "replace-one")


def test_adjacency_reaches_calibration_steps_and_words():
    noise = get_noise_multiplier(3.0, SST2[3], RATE, 198, adjacency="replace-one")
    assert noise > 1.05 * SST2[0]
    assert get_epsilon(noise, *SST2[1:], adjacency="replace-one") <= 3.0
    assert affordable_steps(3.0, SST2[3], noise, RATE, adjacency="replace-one") == 198
    stated = guarantee_of([StepEvent(*SST2[:3])], SST2[3], adjacency="replace-one")
    assert stated.epsilon == get_epsilon(*SST2, adjacency="replace-one")
    assert "replacing everything that belongs to one example" in str(stated) and "is public" in str(stated)
    # A size of the data that was used makes add/remove zero-out, and leaves replace-one as it is.
    assert guarantee_of([], 1e-5, adjacency="replace-one", from_size=["steps"]).adjacency == "replace-one"
    with pytest.raises(ValueError, match="adjacency='substitute' is not accounted for"):
        get_epsilon(*SST2, adjacency="substitute")


def test_directions():
    removing, adding = epsilon_by_direction([StepEvent(*SST2[:3])], SST2[3])
    assert removing == get_epsilon(*SST2)
    assert adding == pytest.approx(1.16537, abs=2e-3)
    same, again = epsilon_by_direction([StepEvent(*SST2[:3])], SST2[3], adjacency="replace-one")
    assert same == again == get_epsilon(*SST2, adjacency="replace-one")
    assert epsilon_by_direction([], 1e-5) == (0.0, 0.0)
    assert epsilon_by_direction([StepEvent(0.0, 0.5)], 1e-5) == (math.inf, math.inf)


# The largest draw, and epsilon with zero-out and with replace-one adjacency.
CUTS = [(1024, 18.18, 18.28), (1075, 10.51, 10.72), (1126, 5.94, 6.17), (1228, 2.999975, 3.49)]


@pytest.mark.parametrize(("largest", "zero_out", "replace_one"), CUTS)
def test_published_epsilons_of_cut_draws(largest, zero_out, replace_one):
    cut = {"max_batch": largest, "num_units": UNITS}
    assert get_epsilon(*SST2, adjacency="zero-out", **cut) == pytest.approx(zero_out, rel=1e-3)
    assert get_epsilon(*SST2, adjacency="replace-one", **cut) == pytest.approx(replace_one, rel=1e-3)
    assert get_epsilon(*SST2, "group", adjacency="zero-out", **cut) == get_epsilon(*SST2, adjacency="zero-out", **cut)


def test_cut_draws_agree_with_the_library_and_compose_with_others():
    cut, whole = StepEvent(1.5, 0.1, 20, max_batch=12, num_units=100), StepEvent(1.2, 0.05, 30)
    accountant = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, 1e-3)
    accountant.compose(dp_event.TruncatedSubsampledGaussianDpEvent(100, 0.1, 12, 1.5), 20)
    accountant.compose(dp_event.PoissonSampledDpEvent(0.05, dp_event.GaussianDpEvent(1.2)), 30)
    expected = accountant.get_epsilon(1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert epsilon_of([cut, whole], 1e-5, adjacency="zero-out") == pytest.approx(expected, rel=2e-3)
        assert epsilon_of([whole, cut], 1e-5, adjacency="zero-out") == epsilon_of(
            [StepEvent(1.5, 0.1, 5, 12, 100), whole, StepEvent(1.5, 0.1, 15, 12, 100)], 1e-5, adjacency="zero-out"
        )


def test_cuts_that_never_happen_cost_nothing():
    for largest in (UNITS, UNITS + 1):
        cut = {"max_batch": largest, "num_units": UNITS, "adjacency": "zero-out"}
        assert get_epsilon(*SST2, **cut) == get_epsilon(*SST2)
        assert get_epsilon(2.0, 1.0, 4, 1e-6, **cut) == get_epsilon(2.0, 1.0, 4, 1e-6)
    largest = safe_max_batch(UNITS, RATE)
    assert largest == 1232 == math.ceil(1024 + 6.5 * 32)
    for adjacency in ("zero-out", "replace-one"):
        plain = get_epsilon(*SST2, adjacency=adjacency)
        cut = get_epsilon(*SST2, adjacency=adjacency, max_batch=largest, num_units=UNITS)
        assert plain <= cut <= plain * 1.0001
    assert safe_max_batch(10, 1.0) == 10 and safe_max_batch(10, 1e-9) == 1
    for bad, named in (((0, 0.1), "num_units=0"), ((10, 2.0), r"sample_rate=2\.0"), ((10, 0.1, 0), "per_user=0")):
        with pytest.raises(ValueError, match=named):
            safe_max_batch(*bad)


def test_users_with_several_examples_pay_for_cuts_by_their_probability():
    setting = (2.0, RATE, 198, 1e-6, "pld", 4)
    plain = get_epsilon(*setting)
    largest = safe_max_batch(UNITS, RATE, examples_per_user=4)
    assert largest == 1312
    safe = get_epsilon(*setting, "zero-out", max_batch=largest, num_units=UNITS)
    assert plain <= safe <= plain * 1.001
    # By hand: delta goes to the mixture but for (1 + e^epsilon) times the chance that any of 198 draws is cut.
    tight = get_epsilon(*setting, "zero-out", max_batch=1228, num_units=UNITS)
    chance = 198 * stats.binom.sf(1228, UNITS, RATE)
    left = 1e-6 - chance * (1 + math.exp(tight))
    assert tight == pytest.approx(get_epsilon(2.0, RATE, 198, left, "pld", 4), rel=1e-4)
    assert tight > plain * 1.02
    assert get_epsilon(*setting, "zero-out", max_batch=1100, num_units=UNITS) == math.inf
    grouped = get_epsilon(2.0, RATE, 198, 1e-6, "group", 4, "zero-out", max_batch=1228, num_units=UNITS)
    assert plain < grouped < math.inf
    with pytest.raises(ValueError, match="zero-out"):
        get_epsilon(2.0, RATE, 198, 1e-6, "group", 4, "replace-one", max_batch=1228, num_units=UNITS)


def test_cut_draws_ask_for_what_they_need():
    cut = {"max_batch": 1228, "num_units": UNITS}
    with pytest.raises(ValueError, match="adjacency='add/remove' cannot hold; choose adjacency='zero-out'"):
        get_epsilon(*SST2, **cut)
    for accountant in ("rdp", "prv", "gdp", "edgeworth"):
        with pytest.raises(ValueError, match=f"accountant='{accountant}'.*use accountant=\"pld\""):
            get_epsilon(*SST2, accountant, adjacency="zero-out", **cut)
    with pytest.raises(ValueError, match="max_batch=5 and num_units=None belong together"):
        StepEvent(1.0, 0.1, max_batch=5)
    with pytest.raises(ValueError, match="max_batch=None and num_units=5 belong together"):
        StepEvent(1.0, 0.1, num_units=5)
    with pytest.raises(ValueError, match="max_batch=0"):
        StepEvent(1.0, 0.1, max_batch=0, num_units=5)
    with pytest.raises(ValueError, match=r"num_units=5\.5"):
        StepEvent(1.0, 0.1, max_batch=1, num_units=5.5)


def test_cut_draws_are_calibrated_afforded_and_stated():
    cut = {"max_batch": 1126, "num_units": UNITS}
    noise = get_noise_multiplier(3.0, SST2[3], RATE, 198, adjacency="zero-out", **cut)
    assert noise > SST2[0] * 1.1
    assert get_epsilon(noise, *SST2[1:], adjacency="zero-out", **cut) <= 3.0
    assert affordable_steps(3.0, SST2[3], noise, RATE, adjacency="zero-out", **cut) == 198
    stated = guarantee_of([StepEvent(noise, RATE, 198, **cut)], SST2[3], adjacency="zero-out")
    assert (stated.sampler, stated.max_batch, stated.voided) == ("truncated poisson", 1126, False)
    assert "cut to 1126" in str(stated)


def test_fixed_size_batches_of_users():
    setting = (4.0, 50_000, 1024, 10_000, 1e-5)
    two = fixed_size_epsilon(*setting, 2)
    assert two == pytest.approx(11.25145, rel=1e-3) and two > 11.2514
    assert get_epsilon(4.0, 1024 / 50_000, 10_000, 1e-5, examples_per_user=2) < two
    one = fixed_size_epsilon(*setting)
    # One example: a draw has it with probability B / N and then moves by 2 C.
    assert one == pytest.approx(get_epsilon(2.0, 1024 / 50_000, 10_000, 1e-5), rel=1e-9)
    assert one < two < fixed_size_epsilon(*setting, 3)


def test_fixed_size_batches_that_fill_up_agree_with_quadrature():
    """Five of a user's six examples in a batch of five of eleven: every count from none to five occurs."""
    weights = stats.hypergeom.pmf(np.arange(6), 11, 6, 5)
    x = np.linspace(-30, 45, 600_001)
    mixed = sum(w * stats.norm.pdf(x, 2 * i, 2.5) for i, w in enumerate(weights))
    plain = stats.norm.pdf(x, 0, 2.5)

    def excess(epsilon):
        one_way = np.trapezoid(np.maximum(mixed - math.exp(epsilon) * plain, 0), x)
        return max(one_way, np.trapezoid(np.maximum(plain - math.exp(epsilon) * mixed, 0), x)) - 1e-4

    exact = optimize.brentq(excess, 0, 50)
    assert exact - 1e-6 <= fixed_size_epsilon(2.5, 11, 5, 1, 1e-4, 6) <= exact * 1.001


def test_fixed_size_batches_agree_with_the_library():
    counts = np.arange(4)
    weights = stats.hypergeom.pmf(counts, 200, 3, 20)
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=4e-3)
    accountant.compose(dp_event.MixtureOfGaussiansDpEvent(3.0, list(2.0 * counts), list(weights / weights.sum())), 25)
    assert fixed_size_epsilon(3.0, 200, 20, 25, 1e-5, 3) == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-3)


def test_fixed_size_batches_at_the_edges():
    assert fixed_size_epsilon(1.0, 50, 5, 0, 1e-6) == 0.0
    assert fixed_size_epsilon(0.0, 50, 5, 1, 1e-6) == math.inf
    assert fixed_size_epsilon(1e-3, 50, 5, 1, 1e-6) == math.inf
    assert fixed_size_epsilon(1.0, 10**9, 1, 1, 1e-6) == 0.0
    for bad, named in (
        ((1.0, 50, 50, 1, 1e-6), "batch_size=50 does not fit"),
        ((1.0, 50, 46, 1, 1e-6, 5), "batch_size=46 does not fit without a user with examples_per_user=5"),
        ((1.0, 50, 5, -1, 1e-6), "count=-1"),
        ((-1.0, 50, 5, 1, 1e-6), "noise_multiplier"),
        ((1.0, 50, 5, 1, 0.0), "delta=0"),
    ):
        with pytest.raises(ValueError, match=named):
            fixed_size_epsilon(*bad)


def test_delta_above_one_over_the_number_of_units_is_warned_of():
    cut = {"max_batch": 200, "num_units": 1000, "adjacency": "zero-out"}
    with pytest.warns(AccountingWarning, match="not below 1 / 1000, the number of units") as found:
        get_epsilon(2.0, 0.1, 10, 1e-3, **cut)
    assert found[0].filename == __file__
    get_epsilon(2.0, 0.1, 10, 9e-4, **cut)
    with pytest.warns(AccountingWarning, match="not below 1 / 500, the number of users") as found:
        guarantee_of([StepEvent(2.0, 0.1, 10)], 2e-3, unit="user", num_units=500)
    assert found[0].filename == __file__


@pytest.mark.parametrize("accountant", ["gdp", "edgeworth"])
def test_approximations_are_warned_of(accountant):
    for ask in (
        lambda: get_epsilon(2.0, 0.1, 10, 1e-5, accountant),
        lambda: epsilon_of([StepEvent(2.0, 0.1, 10)], 1e-5, accountant),
        lambda: get_noise_multiplier(1.0, 1e-5, 0.1, 10, accountant),
        lambda: affordable_steps(1.0, 1e-5, 4.0, 0.1, accountant=accountant),
        lambda: guarantee_of([StepEvent(2.0, 0.1, 10)], 1e-5, accountant=accountant),
    ):
        with pytest.warns(AccountingWarning, match=f"{accountant}.*may be below the truth") as found:
            ask()
        assert len(found) == 1 and found[0].filename == __file__
