"""What must hold for any steps: monotone, in any order, between the two ends of a loss distribution, and quickly."""

import time

import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclip.accounting import StepEvent, epsilon_of, fixed_size_epsilon, get_epsilon, get_noise_multiplier

NOISE, RATE = st.floats(0.5, 10.0), st.floats(1e-3, 0.9)


@settings(max_examples=4, deadline=None)
@given(noise=NOISE, rate=RATE, steps=st.integers(1, 60), room=st.integers(0, 30))
def test_less_noise_or_more_sampling_never_costs_less(noise, rate, steps, room):
    """With replaced units and with cut draws; test_accounting has add/remove."""

    def replaced(noise=noise, rate=rate, steps=steps):
        return get_epsilon(noise, rate, steps, 1e-5, adjacency="replace-one")

    def cut(noise=noise, steps=steps, room=room):
        largest = 20 + room
        return get_epsilon(noise, 0.02, steps, 1e-5, adjacency="zero-out", max_batch=largest, num_units=1000)

    def fixed(noise=noise, steps=steps, users=2):
        return fixed_size_epsilon(noise, 1000, 20, steps, 1e-5, users)

    most = replaced() * 1.001 + 1e-5
    assert replaced(noise=noise * 1.1) <= most
    assert replaced(rate=rate * 0.9) <= most
    assert replaced(steps=max(1, steps - 1)) <= most
    assert get_epsilon(noise, rate, steps, 1e-5) <= most
    for epsilon, cheaper in ((cut, {"room": room + 2}), (fixed, {"users": 1})):
        most = epsilon() * 1.001 + 1e-5
        assert epsilon(noise=noise * 1.1) <= most
        assert epsilon(steps=max(1, steps - 1)) <= most
        assert epsilon(**cheaper) <= most


@settings(max_examples=6, deadline=None)
@given(noise=NOISE, rate=RATE, steps=st.integers(1, 50), accountant=st.sampled_from(["pld", "rdp", "group"]))
def test_user_with_one_example_is_an_example(noise, rate, steps, accountant):
    for adjacency in ("add/remove", "zero-out", "replace-one"):
        one = get_epsilon(noise, rate, steps, 1e-5, accountant, 1, adjacency)
        assert one == get_epsilon(noise, rate, steps, 1e-5, accountant, None, adjacency)


@settings(max_examples=6, deadline=None)
@given(
    kinds=st.lists(st.tuples(NOISE, RATE, st.integers(1, 20)), min_size=2, max_size=3),
    data=st.data(),
    adjacency=st.sampled_from(["add/remove", "replace-one"]),
)
def test_order_and_grouping_do_not_change_a_bit(kinds, data, adjacency):
    steps = [StepEvent(*kind) for kind in kinds] + [StepEvent(kinds[0][0], kinds[0][1], 3)]
    shuffled = data.draw(st.permutations(steps))
    for accountant in ("pld", "rdp"):
        assert epsilon_of(shuffled, 1e-5, accountant, adjacency=adjacency) == epsilon_of(
            steps, 1e-5, accountant, adjacency=adjacency
        )


@settings(max_examples=10, deadline=None)
@given(noise=st.floats(0.8, 6.0), rate=RATE, steps=st.integers(1, 30), replacing=st.booleans())
def test_pld_lies_between_its_ends_and_rdp_above_the_lower_one(noise, rate, steps, replacing):
    def end(pessimistic):
        losses = privacy_loss_distribution.from_gaussian_mechanism(
            noise,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=2e-3,
            sampling_prob=rate,
            use_connect_dots=False,
            neighboring_relation=NeighboringRelation.REPLACE_ONE
            if replacing
            else NeighboringRelation.ADD_OR_REMOVE_ONE,
        )
        return losses.self_compose(steps).get_epsilon_for_delta(1e-5)

    adjacency = "replace-one" if replacing else "add/remove"
    found = get_epsilon(noise, rate, steps, 1e-5, adjacency=adjacency)
    # What the grid settles to may lie above the crude upper end, where that happens to be exact.
    assert end(False) <= found <= end(True) * 1.001 + 1e-5
    assert get_epsilon(noise, rate, steps, 1e-5, "rdp", adjacency=adjacency) >= end(False)


@settings(max_examples=2, deadline=None)
@given(epsilon=st.floats(0.2, 10.0), rate=st.floats(1e-3, 0.5))
@pytest.mark.parametrize("terms", [("pld", 3, "add/remove"), ("rdp", None, "replace-one")])
def test_calibration_returns_the_private_end_at_its_digits(terms, epsilon, rate):
    noise = get_noise_multiplier(epsilon, 1e-5, rate, 20, *terms)
    assert noise == float(f"{noise:.5g}")
    assert get_epsilon(noise, rate, 20, 1e-5, *terms) <= epsilon
    assert get_epsilon(noise * 0.99, rate, 20, 1e-5, *terms) > epsilon * 0.999


@pytest.mark.parametrize(("noise", "rate", "examples", "seconds"), [(0.8, 0.004, None, 1.0), (2.0, 0.004, 8, 10.0)])
def test_twenty_thousand_steps_are_quick(noise, rate, examples, seconds):
    started = time.process_time()
    assert 0 < get_epsilon(noise, rate, 20_000, 1e-6, examples_per_user=examples) < 100
    assert time.process_time() - started < seconds
