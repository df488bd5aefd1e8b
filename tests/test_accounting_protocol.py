"""Opacus' accountant protocol over the registered accountants."""

import json
from types import SimpleNamespace

import pytest

from fastclip.accounting import StepEvent, create_accountant, epsilon_of

pytestmark = pytest.mark.filterwarnings("ignore::fastclip.accounting.AccountingWarning")


@pytest.mark.parametrize("name", ["pld", "rdp", "prv", "gdp", "edgeworth", "group"])
def test_counts_steps_and_asks_the_accountant_of_its_name(name):
    accountant = create_accountant(name)
    assert (len(accountant), accountant.get_epsilon(1e-5), accountant.mechanism()) == (0, 0.0, name)
    for noise in (1.0, 1.0, 2.0, 1.0):
        accountant.step(noise_multiplier=noise, sample_rate=0.02)
    assert accountant.history == [(1.0, 0.02, 2), (2.0, 0.02, 1), (1.0, 0.02, 1)]
    assert len(accountant) == 4
    steps = [StepEvent(1.0, 0.02, 3), StepEvent(2.0, 0.02)]
    assert accountant.get_epsilon(delta=1e-5) == epsilon_of(steps, 1e-5, name)


def test_users_and_neighbours():
    users = create_accountant("pld", examples_per_user=3)
    replaced = create_accountant(adjacency="replace-one")
    for accountant in (users, replaced):
        accountant.step(noise_multiplier=2.0, sample_rate=0.05)
    assert users.get_epsilon(1e-5) == epsilon_of([StepEvent(2.0, 0.05)], 1e-5, examples_per_user=3)
    assert replaced.get_epsilon(1e-5) == epsilon_of([StepEvent(2.0, 0.05)], 1e-5, adjacency="replace-one")


def test_state_goes_through_json_and_is_a_copy():
    accountant = create_accountant("rdp")
    accountant.step(noise_multiplier=1.5, sample_rate=0.1)
    destination = {"other": 1}
    state = accountant.state_dict(destination)
    assert state is destination and state["other"] == 1
    assert (state["history"], state["mechanism"]) == ([(1.5, 0.1, 1)], "rdp")
    restored = create_accountant("rdp")
    restored.load_state_dict(json.loads(json.dumps(accountant.state_dict())))
    assert restored.history == accountant.history
    restored.step(noise_multiplier=1.5, sample_rate=0.1)
    assert restored.history == [(1.5, 0.1, 2)]
    accountant.step(noise_multiplier=1.5, sample_rate=0.1)
    assert state["history"] == [(1.5, 0.1, 1)] and len(accountant) == 2


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"history": [], "mechanism": "rdp"}, "mechanism='rdp' and this is 'pld'"),
        ({"history": []}, "lacks 'mechanism'"),
        ({}, "lacks 'history', 'mechanism'"),
        (None, "lacks 'history', 'mechanism'"),
        ({"history": [(1.0, 0.1, 2), (1.0, 7.0, 1)], "mechanism": "pld"}, r"sample_rate=7\.0"),
    ],
)
def test_other_states_are_refused_and_change_nothing(state, words):
    accountant = create_accountant("pld")
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(ValueError, match=words):
        accountant.load_state_dict(state)
    assert accountant.history == [(1.0, 0.1, 1)]


def test_hook_reads_the_optimizer():
    accountant = create_accountant("pld")
    hook = accountant.get_optimizer_hook_fn(0.25)
    hook(SimpleNamespace(noise_multiplier=1.1))
    hook(SimpleNamespace(noise_multiplier=0.9, accumulated_iterations=1))
    assert accountant.history == [(1.1, 0.25, 1), (0.9, 0.25, 1)]


def test_bad_input_is_named():
    for ask, words in (
        (lambda: create_accountant("moments"), "accountant='moments'"),
        (lambda: create_accountant(examples_per_user=0), "examples_per_user=0"),
        (lambda: create_accountant(adjacency="x"), "adjacency='x'"),
        (lambda: create_accountant().step(noise_multiplier=-1.0, sample_rate=0.1), "noise_multiplier=-1.0"),
        (lambda: create_accountant().step(noise_multiplier=1.0, sample_rate=0.0), "sample_rate=0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            ask()


def test_a_state_keeps_its_terms():
    users = create_accountant("pld", examples_per_user=8)
    users.step(noise_multiplier=1.0, sample_rate=0.01)
    again = create_accountant("pld", examples_per_user=8)
    again.load_state_dict(users.state_dict())
    assert again.get_epsilon(1e-5) == users.get_epsilon(1e-5)
    for other in (create_accountant("pld"), create_accountant("pld", examples_per_user=8, adjacency="zero-out")):
        with pytest.raises(ValueError, match=r"state_dict is for (examples_per_user|adjacency)="):
            other.load_state_dict(users.state_dict())
    with pytest.raises(ValueError, match="and nothing more"):
        create_accountant("pld").load_state_dict({"mechanism": "pld", "history": [(1.0, 0.1, 100, 10, 100)]})


def test_draws_that_were_added_up_are_not_one_step():
    class Accumulated:
        noise_multiplier, accumulated_iterations = 1.0, 4

    with pytest.raises(RuntimeError, match="4 draws were added up"):
        create_accountant("pld").get_optimizer_hook_fn(0.25)(Accumulated())
