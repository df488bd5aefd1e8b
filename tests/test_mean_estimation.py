"""The synthetic experiment: what it is made of, and what it shows."""

import dataclasses
import math

import numpy as np
import pytest

from fastclip.mean_estimation import QUICK, Experiment, Outcome, _descend, _kept, _means, as_dict, run, verdicts
from fastclip.userlevel import Setting

TINY = Experiment(
    users=60, examples_per_user=4, dimension=8, steps=5, delta=1e-3, epsilons=(1.0,), budgets=(8,), spreads=((0.7, 0.7),),
    caps=(1, 4), groups=(1, 2, 4), trials=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def quick():
    return run(QUICK)


def error(outcomes, epsilon, budget, share, algorithm, size):
    return next(
        x
        for x in outcomes
        if (x.epsilon, x.budget, x.algorithm, x.examples_per_user) == (epsilon, budget, algorithm, size)
        and x.share == pytest.approx(share, abs=0.01)
    )


def clearly_less(one, other):
    return one.error + 3 * math.hypot(one.standard_error, other.standard_error) < other.error


def test_uls_wins_for_small_epsilon_large_budget_and_diverse_users(quick):
    for size in (4, 16):
        assert clearly_less(error(quick, 1, 1024, 0, "ULS", size), error(quick, 1, 1024, 0, "ELS", 16))
        # Take away any of the three and it does not.
        assert not clearly_less(error(quick, 1, 64, 0, "ULS", size), error(quick, 1, 64, 0, "ELS", 16))
        assert not clearly_less(error(quick, 8, 1024, 0, "ULS", size), error(quick, 8, 1024, 0, "ELS", 16))
        assert not clearly_less(error(quick, 1, 1024, 1, "ULS", size), error(quick, 1, 1024, 1, "ELS", 16))


def test_els_wins_where_the_examples_of_a_user_agree(quick):
    for epsilon in (1, 8):
        for budget in (64, 1024):
            els, uls = error(quick, epsilon, budget, 1, "ELS", 16), error(quick, epsilon, budget, 1, "ULS", 16)
            assert clearly_less(els, uls)


def test_the_two_meet_at_one_example_a_user(quick):
    for epsilon in (1, 8):
        for budget in (64, 1024):
            els, uls = error(quick, epsilon, budget, 1, "ELS", 1), error(quick, epsilon, budget, 1, "ULS", 1)
            assert els.noise_multiplier == uls.noise_multiplier and els.noise == uls.noise
            assert not clearly_less(els, uls) and not clearly_less(uls, els)


def test_dropping_examples_costs_els_when_noise_is_small(quick):
    assert clearly_less(error(quick, 8, 1024, 0, "ELS", 16), error(quick, 8, 1024, 0, "ELS", 1))


def test_verdicts_say_so(quick):
    found = {(v.epsilon, v.budget, round(v.share)): v for v in verdicts(quick)}
    assert found[1, 1024, 0].winner == "ULS" and found[1, 1024, 0].ratio < 0.6
    assert found[1, 64, 1].winner == found[8, 64, 1].winner == "ELS"
    assert all(v.single is not None and v.single.examples_per_user == 1 for v in found.values())
    assert all(v.uls.examples_per_user > 1 for v in found.values())


def test_the_same_seed_gives_the_same_numbers():
    first = run(TINY)
    assert run(TINY) == first
    assert run(dataclasses.replace(TINY, seed=1)) != first
    told = as_dict(TINY, first)
    assert told["settings"]["users"] == 60 and len(told["outcomes"]) == 5 and len(told["verdicts"]) == 1


def test_progress_counts_every_run():
    seen = []
    run(TINY, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 10) for i in range(1, 11)]


def test_the_noise_of_one_step():
    still = dataclasses.replace(TINY, dimension=20_000, steps=1)
    x = np.zeros((60, 4, 20_000), dtype=np.float32)
    for setting in (Setting("ELS", 4, 1.0, 24.0, 0.1, 3.0), Setting("ULS", 2, 1.0, 6.0, 0.1, 3.0, 0.5, 0.25)):
        theta = _descend(x, setting, (0.6, 0.8), still, np.random.default_rng(0))
        clip = 1.0 if setting.algorithm == "ELS" else math.sqrt(0.36 + 0.64 / 2)
        assert np.std(theta) == pytest.approx(0.1 * 3.0 * clip / setting.expected_units, rel=0.03)
        assert abs(np.mean(theta)) < 4 * np.std(theta) / math.sqrt(20_000)


@pytest.mark.parametrize("algorithm", ["ELS", "ULS"])
def test_no_user_moves_a_step_by_more_than_its_share(algorithm):
    quiet = dataclasses.replace(TINY, steps=1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4, 8)).astype(np.float32)
    far = x.copy()
    far[0] = 1e6
    for size in (1, 2, 4):
        setting = Setting(algorithm, size, 1.0, 60.0 * (size if algorithm == "ELS" else 1), 1.0, 0.0)
        with_it, without = (_descend(y, setting, (0.6, 0.8), quiet, np.random.default_rng(7)) for y in (far, x))
        clip = 1.0 if algorithm == "ELS" else math.sqrt(0.36 + 0.64 / size)
        moved = float(np.linalg.norm(with_it - without))
        # Both the old and the new contribution lie within the clipping norm: one for each example that is clipped alone.
        most = 2 * (size if algorithm == "ELS" else 1) * 0.1 * clip / setting.expected_units
        assert 0.2 * most < moved <= most * (1 + 1e-5)


def test_els_keeps_the_cap_and_uls_draws_afresh():
    x = np.arange(5 * 6, dtype=np.float32).reshape(5, 6, 1)
    kept = _kept(x, 2, np.random.default_rng(0)).reshape(5, 2)
    assert all(len(set(row)) == 2 and set(row) <= set(x[u, :, 0]) for u, row in enumerate(kept))
    drawn = np.array([1, 3])
    rng = np.random.default_rng(0)
    means = np.array([_means(x, drawn, 2, rng)[:, 0] for _ in range(4000)])
    assert len(set(means[:, 0])) > 5
    assert means.mean(0) == pytest.approx(x[drawn].mean((1, 2)), abs=0.1)
    # Two of six without replacement: the variance of one over two, times 4 / 5.
    assert means.var(0) == pytest.approx(np.full(2, 35 / 12 / 2 * 4 / 5), rel=0.1)


def outcome(algorithm, size, mean, standard_error):
    return Outcome(1.0, 8, 0.5, algorithm, size, 1.0, 1.0, mean, standard_error)


@pytest.mark.parametrize(
    ("els", "uls", "winner"),
    [((1.0, 0.01), (0.8, 0.01), "ULS"), ((0.8, 0.01), (1.0, 0.01), "ELS"), ((1.0, 0.01), (0.92, 0.01), "tie"),
     ((1.0, 0.1), (0.8, 0.1), "tie")],
)  # fmt: skip
def test_a_verdict_needs_a_difference(els, uls, winner):
    outcomes = [outcome("ELS", 4, *els), outcome("ULS", 1, 0.1, 0.01), outcome("ULS", 4, *uls)]
    (verdict,) = verdicts(outcomes)
    assert verdict.winner == winner


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="trials=1"):
        Experiment(trials=1)
    with pytest.raises(ValueError, match="K or G = 32"):
        Experiment(groups=(32,))
    with pytest.raises(ValueError, match="nothing to compare"):
        verdicts([outcome("ELS", 4, 1.0, 0.1), outcome("ULS", 1, 1.0, 0.1)])
    with pytest.raises(ValueError, match="more than the 240 examples"):
        run(dataclasses.replace(TINY, budgets=(1000,)))
