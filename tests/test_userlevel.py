"""ELS against ULS: the calibrated figures, the predictions, the advice; and r, measured."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastclip
from fastclip import userlevel
from fastclip.accounting import get_epsilon
from fastclip.gradient_share import measure, shared_gradient_share
from fastclip.userlevel import Setting, compare

EQUAL = np.full(10_000, 16)

# Calibrated noise multipliers at T = 500, B = 1024, delta = 1e-6 on a coarser grid; predicted noise by G and r.
ELS_SIGMA = {1: [9.783, 9.7905, 9.7941, 9.7959, 9.7969], 8: [1.6980, 1.7188, 1.7299, 1.7357, 1.7386]}
ULS_SIGMA = {1: [9.7833, 4.9726, 2.6025, 1.4759, 1.0025], 8: [1.6980, 1.0457, 0.7540, 0.6081, 0.5211]}
ELS_NOISE = {1: (0.00955, 0.00957), 8: (0.00166, 0.00170)}
ULS_NOISE = {
    1: {
        1: {1: 0.00955, 0: 0.00955},
        4: {1: 0.01017, 0.5: 0.00804, 0.1: 0.00580, 0: 0.00508},
        16: {1: 0.01566, 0.5: 0.01142, 0.1: 0.00619, 0: 0.00392},
    },
    8: {
        2: {1: 0.00204, 0.5: 0.00177, 0.1: 0.00151, 0: 0.00144},
        4: {1: 0.00295, 0.5: 0.00233, 0.1: 0.00168, 0: 0.00147},
        16: {1: 0.00814, 0.5: 0.00593, 0.1: 0.00322, 0: 0.00204},
    },
}
HALF_A_DIGIT = 5e-6


def at_thousand(epsilon, share=None):
    """Calibrated once: `compare` remembers."""
    return compare(EQUAL, 1024, 500, float(epsilon), 1e-6, share)


@pytest.mark.parametrize("epsilon", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_calibration_and_predictions_at_known_settings(epsilon):
    found = at_thousand(epsilon)
    assert [x.examples_per_user for x in found.els] == [x.examples_per_user for x in found.uls] == [1, 2, 4, 8, 16]
    assert [x.noise_multiplier for x in found.els] == pytest.approx(ELS_SIGMA[epsilon], rel=2e-3)
    assert [x.noise_multiplier for x in found.uls] == pytest.approx(ULS_SIGMA[epsilon], rel=2e-3)
    low, high = ELS_NOISE[epsilon]
    for x in found.els:
        assert low * (1 - 2e-3) - HALF_A_DIGIT <= x.noise(0.3) <= high * (1 + 2e-3) + HALF_A_DIGIT
        assert x.noise(0.3) == x.noise_multiplier / 1024
    for x in found.uls:
        for share, noise in ULS_NOISE[epsilon].get(x.examples_per_user, {}).items():
            assert x.noise(share) == pytest.approx(noise, rel=2e-3, abs=HALF_A_DIGIT)


def test_the_calibrated_noise_keeps_the_target():
    found = at_thousand(8)
    els, uls = found.els[3], found.uls[3]
    spent = get_epsilon(els.noise_multiplier, els.sample_rate, 500, 1e-6, examples_per_user=8)
    assert 7.98 < spent <= 8
    assert 7.98 < get_epsilon(uls.noise_multiplier, uls.sample_rate, 500, 1e-6) <= 8


@pytest.mark.parametrize(
    ("budget", "ratios"), [(256, (1.30, 2.05)), (1024, (0.87, 1.20)), (4096, (0.56, 0.49)), (16384, (0.50, 0.28))]
)
def test_uls_gains_with_the_budget(budget, ratios):
    found = compare(EQUAL, budget, 500, 8.0, 1e-6, 0.0, caps=(4, 16), groups=(4, 16))
    for els, uls, ratio in zip(found.els, found.uls, ratios, strict=True):
        assert uls.noise(0.0) / els.noise(0.0) == pytest.approx(ratio, rel=2e-3, abs=0.005)


def test_users_of_different_sizes():
    found = compare([1, 2, 9], 3, 1, 2.0, 1e-3, 0.5)
    assert [x.examples_per_user for x in found.els] == [1, 2, 4, 8]
    assert found.median == 2 and found.users == 3 and found.examples == 12
    assert [x.kept_share for x in found.els] == [3 / 12, 5 / 12, 7 / 12, 11 / 12]
    assert [x.sample_rate for x in found.uls] == [3 / 3, 3 / 5, 3 / 7, 3 / 11]
    uls = found.uls[2]
    assert uls.expected_units == pytest.approx(3 * 3 / 7)
    # What the drawn users evaluate is the budget.
    assert uls.sample_rate * (1 + 2 + 4) == pytest.approx(3)
    clip = math.sqrt(0.5 + 0.5 * (1 + 1 / 2 + 1 / 4) / 3)
    assert uls.noise(0.5) == pytest.approx(uls.noise_multiplier * clip / uls.expected_units)


def test_the_median_is_on_the_grid_and_a_full_batch_is_fine():
    found = compare([3, 3, 7], 13, 1, 1.0, 1e-3)
    assert [x.examples_per_user for x in found.uls] == [7] and found.uls[0].sample_rate == 1
    assert found.left_out and "K = 1, 2, 3, 4" in found.left_out[0]
    assert [x.examples_per_user for x in compare([3, 3, 7], 2, 1, 1.0, 1e-3).els] == [1, 2, 3, 4]


def test_sampling_error_is_that_of_draws():
    rng = np.random.default_rng(0)
    users, own, share, cap, rate, d = 30, 4, 0.3, 2, 0.25, 1500
    a, b = rng.normal(size=(users, 1, d)), rng.normal(size=(users, own, d))
    x = (math.sqrt(share) * a + math.sqrt(1 - share) * b) / math.sqrt(d)
    inverses = (1 / cap, 1 / own)
    els = Setting("ELS", cap, cap / own, rate * users * cap, rate, 1.0)
    uls = Setting("ULS", cap, 1.0, rate * users, rate, 1.0, *inverses)
    kept = x[:, :cap].reshape(-1, d)
    from_examples, from_users = [], []
    for _ in range(1500):
        drawn = rng.random(len(kept)) < rate
        from_examples.append(kept[drawn].sum(0) / els.expected_units - kept.mean(0))
        drawn = rng.random(users) < rate
        chosen = rng.permuted(np.tile(np.arange(own), (users, 1)), axis=1)[:, :cap]
        means = x[np.arange(users)[:, None], chosen].mean(1)
        from_users.append(means[drawn].sum(0) / uls.expected_units - x.mean((0, 1)))
    for errors, setting in ((from_examples, els), (from_users, uls)):
        assert math.sqrt(np.mean(np.square(errors).sum(1))) == pytest.approx(setting.sampling_error(share), rel=0.03)


@pytest.mark.parametrize(
    ("epsilon", "share", "algorithm", "size"),
    [
        pytest.param(1, 0.0, "ULS", 16, marks=pytest.mark.slow),
        pytest.param(1, 0.5, "ULS", 4, marks=pytest.mark.slow),
        pytest.param(1, 1.0, "ELS", 16, marks=pytest.mark.slow),
        (8, 0.1, "ULS", 2),
        (8, 0.5, "ELS", 16),
        (8, 1.0, "ELS", 16),
        (8, None, None, None),
    ],
)
def test_advice(epsilon, share, algorithm, size):
    advice = at_thousand(epsilon, share).recommendation
    assert (advice.algorithm, advice.examples_per_user) == (algorithm, size)
    assert "ELS with K = 16" in advice.reason and "ULS with G" in advice.reason
    assert "Measure r" in advice.reason or share is not None


def test_advice_turns_at_the_break_even():
    edge = at_thousand(8).recommendation.break_even
    assert at_thousand(8, edge - 1e-6).recommendation.algorithm == "ULS"
    assert at_thousand(8, edge + 1e-6).recommendation.algorithm == "ELS"


def test_advice_where_r_does_not_matter():
    few = compare(EQUAL, 256, 500, 8.0, 1e-6, caps=(16,), groups=(4, 16)).recommendation
    assert few.algorithm == "ELS" and few.break_even is None
    # A few users own nearly everything: any cap that keeps it costs more noise than drawing users does.
    skewed = compare([1] * 40 + [100] * 60, 20, 10, 1.0, 1e-4, caps=(100,), groups=(1, 16)).recommendation
    assert skewed.algorithm == "ULS" and skewed.break_even == 1.0 and skewed.examples_per_user == 1


@pytest.mark.parametrize(
    ("counts", "change", "words"),
    [
        ([], {}, "counts has the shape"),
        ([[1, 2]], {}, "counts has the shape"),
        ([1, 0], {}, "1 users without examples"),
        ([1.5, 2], {}, "no whole number"),
        ([1, float("nan")], {}, "no whole number"),
        (["a"], {}, "no whole number"),
        ([2, 2], {"budget": 5}, "more than the 4 examples"),
        ([2, 2], {"budget": 0}, "budget=0"),
        ([2, 2], {"budget": float("nan")}, "budget=nan"),
        ([2, 2], {"budget": 3, "caps": (1,)}, "K=1 leaves 2 examples"),
        ([2, 2], {"budget": 3, "groups": (1,)}, "G=1 leaves 2 examples"),
        ([2, 2], {"groups": (0,)}, "G=0"),
        ([2, 2], {"share": 1.5}, "share=1.5"),
        ([2, 2], {"share": float("nan")}, "share=nan"),
        ([2, 2], {"steps": 0}, "steps=0"),
        ([2, 2], {"epsilon": -1.0}, "epsilon=-1.0"),
        ([2, 2], {"delta": 2.0}, "delta=2.0"),
    ],
)
def test_what_makes_no_sense_is_refused(counts, change, words):
    settings = {"budget": 2, "steps": 1, "epsilon": 1.0, "delta": 1e-3, **change}
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        compare(counts, **settings)


def test_a_large_delta_warns():
    with pytest.warns(UserWarning, match="1 / 4"):
        compare([1, 1, 1, 1], 1, 1, 1.0, 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare([1, 1, 1, 1], 1, 1, 1.0, 0.24)


def test_rows_and_progress():
    seen = []
    found = compare([2, 2], 1, 1, 1.0, 1e-3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 4) for i in range(1, 5)]
    rows = found.rows()
    assert [row["algorithm"] for row in rows] == ["ELS", "ELS", "ULS", "ULS"]
    assert rows[3]["noise"] == [found.uls[1].noise(0.0), found.uls[1].noise(1.0)]
    assert found.as_dict()["recommendation"]["reason"] == found.recommendation.reason
    assert userlevel.TIE == 0.05


def test_r_in_cases_that_are_plain():
    g = np.arange(1.0, 5.0)
    same = shared_gradient_share([[g, g, g], [-g, -g]])
    assert same.value == pytest.approx(1) and same.standard_error == pytest.approx(0)
    apart = shared_gradient_share([np.eye(4), 2 * np.eye(4)[:2]])
    assert apart.value == pytest.approx(0, abs=1e-15)
    opposed = shared_gradient_share([[g, -g], [g, -g]])
    assert opposed.value == pytest.approx(-1) and opposed.share == 0
    # Half of either squared norm is shared; the user with one example has no say.
    half = shared_gradient_share(torch.tensor([[[1.0, 1, 0], [1, 0, 1]], [[1, 1, 0], [1, 0, 1]]]))
    assert half.value == pytest.approx(0.5) and (half.users, half.examples) == (2, 4)
    alone = shared_gradient_share([[[1, 1, 0], [1, 0, 1]], [[1, 1, 0], [1, 0, 1]], [[9, 9, 9]]])
    assert alone.value == pytest.approx(0.5) and alone.users == 2


def test_r_is_unbiased_and_its_error_honest():
    rng = np.random.default_rng(1)
    share, d, n, repeats = 0.2, 200, 3, 400
    estimates, errors, naive = [], [], []
    for _ in range(repeats):
        # Users who differ in size make the ratio's own bias visible.
        scale = rng.lognormal(0, 0.4, (12, 1, 1))
        shared, own = rng.normal(size=(12, 1, d)), rng.normal(size=(12, n, d))
        x = scale * (math.sqrt(share) * shared + math.sqrt(1 - share) * own)
        found = shared_gradient_share(x)
        estimates.append(found.value)
        errors.append(found.standard_error)
        naive.append(np.square(x.mean(1)).sum() / (np.square(x).sum() / n))
    spread = np.std(estimates)
    assert abs(np.mean(estimates) - share) < 4 * spread / math.sqrt(repeats)
    assert np.mean(naive) > share + 0.2  # the mean's squared norm has a third of the rest in it
    assert 0.8 < math.sqrt(np.mean(np.square(errors))) / spread < 1.25


def test_r_has_the_first_order_of_the_ratio_s_bias_taken_away():
    rng = np.random.default_rng(2)
    users = [scale * rng.normal(size=(n, 6)) for scale, n in ((1, 2), (3, 4), (0.5, 3), (2, 2))]

    def ratio(chosen):
        pairs = [(np.square(x.sum(0)).sum() - np.square(x).sum()) / (len(x) * (len(x) - 1)) for x in chosen]
        return sum(pairs) / sum(np.square(x).sum() / len(x) for x in chosen)

    left_out = [ratio(users[:i] + users[i + 1 :]) for i in range(4)]
    found = shared_gradient_share(users)
    assert found.value == pytest.approx(4 * ratio(users) - 3 * np.mean(left_out))
    assert found.standard_error == pytest.approx(math.sqrt(3 / 4 * 4 * np.var(left_out)))
    assert abs(found.value - ratio(users)) > 0.01


@pytest.mark.parametrize(
    ("gradients", "words"),
    [
        ([[[1.0, 2]], [[1, 2]]], "0 users"),
        ([[[1.0, 2], [1, 2]]], "1 users"),
        ([[1.0, 2], [1, 2]], "shape"),
        ([[[math.nan, 1], [1, 1]], [[1, 1], [1, 1]]], "not finite"),
        ([[[0.0, 0], [0, 0]], [[0, 0], [0, 0]]], "all gradients are 0"),
    ],
)
def test_r_is_refused(gradients, words):
    with pytest.raises(ValueError, match=words):
        shared_gradient_share(gradients)


def small_model():
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 1))


def squared_error(model, batch):
    x, y = batch
    return (model(x)[:, 0] - y).square()


def examples_of(users):
    torch.manual_seed(3)
    return [(torch.randn(4) + user, torch.randn(())) for user in users]


def explicit(model, dataset):
    model.eval()
    rows = []
    for x, y in dataset:
        gradient = torch.autograd.grad((model(x) - y).square().sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradient]))
    return rows


def test_measure_has_the_whole_gradients():
    owners = [0, 1, 0, 2, 1, 0, 1, 2, 3]
    dataset, model = examples_of(owners), small_model()
    model.train()
    found = measure(model, squared_error, dataset, owners)
    assert model.training and all(p.grad is None for p in model.parameters())
    rows = explicit(model, dataset)
    wanted = shared_gradient_share([torch.stack([rows[i] for i, o in enumerate(owners) if o == u]) for u in (0, 1, 2)])
    assert found.value == pytest.approx(wanted.value, rel=1e-5)
    assert found.standard_error == pytest.approx(wanted.standard_error, rel=1e-4)
    assert (found.users, found.examples) == (3, 8)


def test_measure_counts_only_what_is_trained_and_works_beside_a_clipper():
    owners = [0, 0, 1, 1]
    dataset, model = examples_of(owners), small_model()
    model[0].weight.requires_grad_(False)
    plain = measure(model, squared_error, dataset, owners)
    assert plain.value != pytest.approx(measure(small_model(), squared_error, dataset, owners).value, rel=1e-3)
    fastclip.attach(model, max_grad_norm=0.1)
    assert measure(model, squared_error, dataset, owners) == plain


def test_measure_takes_as_many_as_it_was_told():
    owners = [i % 6 for i in range(60)]
    seen = []
    found = measure(
        small_model(), squared_error, examples_of(owners), owners, users=4, examples_per_user=3,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (found.users, found.examples) == (4, 12) and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"user_ids": [0, 0]}, "user_ids has 2 entries"),
        ({"user_ids": [0, 1, 2, 2]}, "1 users have two examples"),
        ({"users": 1}, "at least 2"),
        ({"examples_per_user": 1}, "at least 2"),
        ({"loss_fn": lambda model, batch: model[0](batch[0])}, "batch of one"),
    ],
)
def test_measure_refuses(change, words):
    given = {"loss_fn": squared_error, "user_ids": [0, 0, 1, 1], **change}
    with pytest.raises(ValueError, match=words):
        measure(small_model(), dataset=examples_of([0, 0, 1, 1]), **given)


def test_measure_refuses_a_frozen_model():
    with pytest.raises(ValueError, match="no parameter"):
        measure(small_model().requires_grad_(False), squared_error, examples_of([0, 0, 1, 1]), [0, 0, 1, 1])
