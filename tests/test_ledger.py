"""The record of spent steps over crashes, budgets and processes; and what the guarantee says."""

import fcntl
import json
import math
import os
import stat
import subprocess
import sys

import pytest

from fastclip.accounting import (
    AccountingWarning,
    BudgetExhausted,
    Guarantee,
    Ledger,
    StepEvent,
    affordable_steps,
    epsilon_of,
    guarantee_of,
    shuffle_lower_bound,
)
from fastclip.accounting import ledger as ledger_module
from fastclip.accounting.guarantee import rounded_up

TERMS = {"unit": "example", "adjacency": "add/remove", "sampler": "poisson", "num_units": 1000, "delta": 1e-5}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def create(path, **terms):
    return Ledger.create(path, **(TERMS | terms))


def filled(path, steps=3, **terms):
    """A closed ledger of that many steps."""
    with create(path, **terms) as ledger:
        for _ in range(steps):
            ledger.reserve(noise_multiplier=1.1, sample_rate=0.02)
    return path.read_bytes()


def test_steps_are_numbered_kept_and_accounted(path):
    with create(path) as ledger:
        assert (ledger.steps, ledger.events(), ledger.epsilon()) == (0, [], 0.0)
        assert [ledger.reserve(1.0, 0.01) for _ in range(3)] == [1, 2, 3]
        assert ledger.reserve(noise_multiplier=2.0, sample_rate=0.01) == 4
        assert ledger.reserve(noise_multiplier=1.0, sample_rate=0.01) == 5
    with Ledger.open(path) as ledger:
        assert ledger.steps == 5
        assert ledger.events() == [StepEvent(1.0, 0.01, 3), StepEvent(2.0, 0.01), StepEvent(1.0, 0.01)]
        assert ledger.epsilon() == epsilon_of(ledger.events(), 1e-5)
        assert ledger.epsilon(delta=1e-3) == epsilon_of(ledger.events(), 1e-3) < ledger.epsilon()
        assert ledger.reserve(1.0, 0.01) == 6
        assert ledger.epsilon() == epsilon_of(ledger.events(), 1e-5)
    assert Ledger.open(path).steps == 6


def test_file_is_one_readable_line_a_step(path):
    filled(path, steps=2, epsilon_budget=5.0, examples_per_user=4)
    header, *steps = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == {"fastclip_ledger": 2} | TERMS | {"epsilon_budget": 5.0, "examples_per_user": 4}
    assert steps == [{"step": n, "noise_multiplier": 1.1, "sample_rate": 0.02} for n in (1, 2)]


def test_reserve_returns_only_after_the_disk_has_the_step(path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(file):
        real(file)
        synced.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else os.fstat(file).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    with create(path) as ledger:
        assert synced == [path.stat().st_size, "folder"]
        for _ in range(2):
            ledger.reserve(1.0, 0.01)
            assert synced[-1] == path.stat().st_size
        assert len(synced) == 4


def test_step_over_the_budget_is_refused_and_not_written(path):
    most = affordable_steps(3.0, 1e-5, 1.0, 0.05)
    assert most > 2
    with create(path, epsilon_budget=3.0) as ledger:
        for _ in range(most):
            ledger.reserve(1.0, 0.05)
        assert ledger.epsilon() <= 3.0
        before = path.read_bytes()
        for _ in range(2):
            with pytest.raises(BudgetExhausted, match=f"step {most + 1} .* epsilon_budget=3.0"):
                ledger.reserve(1.0, 0.05)
        assert path.read_bytes() == before and ledger.steps == most
        # Something cheaper may still fit, and then counts.
        assert ledger.reserve(500.0, 0.001) == most + 1
        assert ledger.epsilon() <= 3.0
        with pytest.raises(BudgetExhausted):
            ledger.reserve(0.0, 0.001)
    with Ledger.open(path) as ledger, pytest.raises(BudgetExhausted):
        ledger.reserve(1.0, 0.05)


def test_budget_counts_whole_users(path):
    with create(path, epsilon_budget=1.0, unit="user", examples_per_user=4) as ledger:
        steps = 0
        with pytest.raises(BudgetExhausted):
            while True:
                steps = ledger.reserve(1.5, 0.02)
    assert steps == affordable_steps(1.0, 1e-5, 1.5, 0.02, examples_per_user=4)
    assert steps < affordable_steps(1.0, 1e-5, 1.5, 0.02)


def test_budget_is_searched_once_for_equal_steps(path, monkeypatch):
    searches = []

    def counted(*arguments, **options):
        searches.append(arguments)
        return affordable_steps(*arguments, **options)

    monkeypatch.setattr(ledger_module, "affordable_steps", counted)
    with create(path, epsilon_budget=8.0) as ledger:
        for _ in range(100):
            ledger.reserve(1.0, 0.01)
        assert len(searches) == 1
        # A schedule that changes at every step is checked step by step, without a search.
        for step in range(4):
            ledger.reserve(1.1 + step / 10, 0.01)
        assert len(searches) == 1
        assert ledger.epsilon() <= 8.0


def test_step_torn_by_a_crash_counts_as_spent_wherever_it_broke(path):
    whole = filled(path)
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start + 1, len(whole)):
        path.write_bytes(whole[:end])
        with Ledger.open(path) as ledger:
            assert ledger.events() == [StepEvent(1.1, 0.02, 3)], end
            assert ledger.reserve(1.1, 0.02) == 4
        # What was mended stays readable and keeps its count.
        with Ledger.open(path) as ledger:
            assert ledger.steps == 4, end
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_torn_step_takes_the_values_of_the_step_before_and_is_marked(path):
    with create(path) as ledger:
        ledger.reserve(2.0, 0.5, seeded=True)
    with path.open("ab") as file:
        # Longer than the line that replaces it, as after a power failure that left a block of zeros.
        file.write(b'{"step": 2, "noise_mult' + bytes(500))
    with Ledger.open(path) as ledger:
        assert ledger.events() == [StepEvent(2.0, 0.5, 2)]
        assert ledger.guarantee().voided
    last = json.loads(path.read_text().splitlines()[-1])
    assert last == {"step": 2, "noise_multiplier": 2.0, "sample_rate": 0.5, "seeded": True, "torn": True}


def test_torn_first_step_or_header_is_refused_with_a_remedy(path):
    whole = filled(path, steps=1)
    start = whole.index(b"\n") + 1
    path.write_bytes(whole[: start + 5])
    with pytest.raises(ValueError, match=r"first step.*begin anew"):
        Ledger.open(path)
    assert path.read_bytes() == whole[: start + 5]
    for end in (0, 10, start - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"header.*begin anew"):
            Ledger.open(path)


@pytest.mark.parametrize("damage", ["unreadable", "missing", "repeated"])
def test_damage_in_the_middle_is_refused(path, damage):
    header, first, second, third = filled(path).splitlines(keepends=True)
    lines = {
        "unreadable": [header, first, second[:9] + b"\n", third],
        "missing": [header, first, third],
        "repeated": [header, first, second, second, third],
    }[damage]
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match="damaged at line"):
        Ledger.open(path)
    # Refusing leaves neither a lock nor a change behind.
    assert path.read_bytes() == b"".join(lines)
    path.write_bytes(header + first)
    assert Ledger.open(path).steps == 1


def test_newer_format_is_refused(path):
    filled(path)
    path.write_text(path.read_text().replace('"fastclip_ledger": 2', '"fastclip_ledger": 3'))
    with pytest.raises(ValueError, match="format 3"):
        Ledger.open(path)


def test_short_write_closes_the_ledger_and_counts(path, monkeypatch):
    real = os.pwrite
    with create(path) as ledger:
        ledger.reserve(1.0, 0.01)
        monkeypatch.setattr(os, "pwrite", lambda file, line, end: real(file, line[:7], end))
        with pytest.raises(OSError, match="make room"):
            ledger.reserve(1.0, 0.01)
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="closed"):
            ledger.reserve(1.0, 0.01)
    with Ledger.open(path) as ledger:
        assert ledger.steps == 2


def test_one_process_at_a_time(path):
    with create(path) as ledger:
        ledger.reserve(1.0, 0.01)
        with pytest.raises(RuntimeError, match="open elsewhere"):
            Ledger.open(path)
        script = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
        assert "BlockingIOError" in other.stderr
        # A failed attempt does not unlock it either.
        with path.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert ledger.reserve(1.0, 0.01) == 2
    Ledger.open(path).close()


def test_losing_the_last_reference_unlocks(path):
    ledger = create(path)
    ledger.reserve(1.0, 0.01)
    del ledger
    assert Ledger.open(path).steps == 1


def test_forked_child_may_not_reserve(path, monkeypatch):
    with create(path) as ledger:
        parent = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: parent + 1)
        with pytest.raises(RuntimeError, match="fork"):
            ledger.reserve(1.0, 0.01)
        monkeypatch.undo()
        assert ledger.reserve(1.0, 0.01) == 1


def test_killed_process_leaves_its_reserved_steps(path):
    script = (
        "import os, sys\n"
        "from fastclip.accounting.ledger import Ledger\n"
        "ledger = Ledger.open(sys.argv[1])\n"
        "for _ in range(4): ledger.reserve(1.0, 0.01)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    create(path).close()
    subprocess.run([sys.executable, "-c", script, str(path)], env=os.environ | {"PYTHONPATH": os.getcwd()}, check=False)
    with Ledger.open(path) as ledger:
        assert ledger.events() == [StepEvent(1.0, 0.01, 4)]


@pytest.mark.parametrize(
    ("terms", "named"),
    [
        ({"unit": " "}, "unit=' '"),
        ({"adjacency": "replace"}, "adjacency='replace'"),
        ({"adjacency": "replace-one", "examples_per_user": 2}, "adjacency='replace-one'"),
        ({"sampler": "shuffle"}, "sampler='shuffle'"),
        ({"num_units": 0}, "num_units=0"),
        ({"delta": 0}, "delta=0"),
        ({"epsilon_budget": -1.0}, "epsilon_budget=-1.0"),
        ({"examples_per_user": 0}, "examples_per_user=0"),
    ],
)
def test_bad_terms_are_named_and_make_no_file(path, terms, named):
    with pytest.raises(ValueError, match=named):
        create(path, **terms)
    assert not path.exists()


def test_bad_steps_are_named_and_write_nothing(path):
    with create(path) as ledger:
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"sample_rate=1\.5"):
            ledger.reserve(1.0, 1.5)
        with pytest.raises(ValueError, match="noise_multiplier=None"):
            ledger.reserve(None, 0.5)
        assert path.read_bytes() == before and ledger.steps == 0


def test_existing_file_is_never_overwritten(path):
    whole = filled(path)
    with pytest.raises(FileExistsError, match=r"Ledger\.open"):
        create(path)
    assert path.read_bytes() == whole
    with pytest.raises(FileNotFoundError):
        Ledger.open(path.with_name("none"))


def test_guarantee_of_a_ledger_states_all_its_terms(path):
    with create(path, unit="user", adjacency="zero-out", examples_per_user=4) as ledger:
        for _ in range(10):
            ledger.reserve(2.0, 0.01)
        stated = ledger.guarantee(caveats=["Held-out users are not protected."])
        assert stated == Guarantee(
            epsilon=epsilon_of([StepEvent(2.0, 0.01, 10)], 1e-5, examples_per_user=4),
            delta=1e-5,
            unit="user",
            adjacency="zero-out",
            sampler="poisson",
            steps=10,
            noise_multiplier=2.0,
            sample_rate=0.01,
            accountant="pld",
            accountant_version=stated.accountant_version,
            rigorous=True,
            caveats=("Held-out users are not protected.",),
            examples_per_user=4,
        )
        assert stated.accountant_version.startswith("dp-accounting ")
        ledger.reserve(3.0, 0.01)
        later = ledger.guarantee()
        assert (later.noise_multiplier, later.sample_rate, later.steps) == (None, 0.01, 11)
        assert "noise multiplier varying" in str(later)


def test_one_seeded_step_voids_for_good(path):
    with create(path) as ledger:
        ledger.reserve(1.0, 0.01)
        assert not ledger.guarantee().voided
        assert ledger.guarantee(seeded=True).voided
        ledger.reserve(1.0, 0.01, seeded=True)
        ledger.reserve(1.0, 0.01)
    with Ledger.open(path) as ledger:
        stated = ledger.guarantee()
    assert stated.voided and stated.to_dict()["voided"] is True
    assert str(stated).startswith("No privacy guarantee") and "seed" in str(stated)
    assert "Differentially private" not in str(stated)


def test_guarantee_in_words():
    stated = guarantee_of([StepEvent(1.0, 0.01, 1000)], 1e-5, num_units=10**4)
    text = str(stated)
    assert "\n" not in text
    for words in (
        "at example level",
        f"epsilon {rounded_up(stated.epsilon)}",
        "delta 1e-05",
        "adding or removing",
        "1000 steps",
        "noise multiplier 1,",
        "rate 0.01",
        "poisson",
        "dp-accounting",
        "an upper bound",
    ):
        assert words in text
    assert stated.caveats == ()


def test_constants_from_the_data_make_the_number_of_units_public():
    stated = guarantee_of([StepEvent(1.0, 0.01, 10)], 1e-5, from_size=["sample_rate", "steps"])
    assert stated.adjacency == "zero-out"
    assert "sample_rate, steps" in str(stated) and "treated as public" in str(stated)
    assert "adding or removing" not in str(stated)
    assert not stated.voided
    with pytest.raises(ValueError, match="'noise'"):
        guarantee_of([], 1e-5, from_size=["noise"])


def test_other_sampling_voids():
    stated = guarantee_of([StepEvent(1.0, 0.01, 10)], 1e-5, sampler="cyclic")
    assert stated.voided and "'cyclic'" in str(stated)


def test_shuffled_batches_are_accounted_as_poisson_only_when_asked_for():
    steps = [StepEvent(0.8, 1 / 66, 66)]
    with pytest.raises(ValueError, match="give as_poisson=True"):
        guarantee_of(steps, 7.42e-6, sampler="shuffled")
    stated = guarantee_of(steps, 7.42e-6, sampler="shuffled", as_poisson=True)
    assert stated.voided and stated.epsilon == pytest.approx(1.97, abs=0.01)
    assert stated.epsilon_at_least == shuffle_lower_bound(0.8, 66, 7.42e-6) == pytest.approx(5.73, abs=0.01)
    assert "cost epsilon 5.731 or more" in str(stated) and "No privacy guarantee" in str(stated)
    assert stated.to_dict()["epsilon_at_least"] == stated.epsilon_at_least
    # A first epoch that is cut short, or in which the noise changes, has no such bound.
    for steps in ([StepEvent(0.8, 1 / 66, 65)], [StepEvent(0.8, 1 / 66, 30), StepEvent(0.9, 1 / 66, 60)], []):
        assert guarantee_of(steps, 7.42e-6, sampler="shuffled", as_poisson=True).epsilon_at_least is None
    endless = guarantee_of([StepEvent(0.0, 0.5, 2)], 1e-5, sampler="shuffled", as_poisson=True).to_dict()
    assert endless["epsilon_at_least"] == "inf"


@pytest.mark.parametrize("accountant", ["rdp", "prv", "group"])
def test_every_accountant_can_be_stated(accountant):
    users = 3 if accountant != "prv" else None
    stated = guarantee_of([StepEvent(2.0, 0.01, 20)], 1e-5, unit="user", accountant=accountant, examples_per_user=users)
    assert stated.epsilon == epsilon_of([StepEvent(2.0, 0.01, 20)], 1e-5, accountant, users)
    assert (stated.accountant, stated.examples_per_user, stated.rigorous) == (accountant, users, True)
    assert stated.accountant_version in str(stated)


def test_large_delta_is_remarked_upon():
    assert "outright" not in str(guarantee_of([], 1e-5, num_units=99_999))
    with pytest.warns(AccountingWarning, match="1 / 100000"):
        assert any("1 / 100000" in caveat for caveat in guarantee_of([], 1e-5, num_units=100_000).caveats)


def test_no_noise_is_said_to_be_not_private():
    stated = guarantee_of([StepEvent(0.0, 0.01, 10)], 1e-5)
    assert "not private" in str(stated)
    assert json.loads(json.dumps(stated.to_dict(), allow_nan=False))["epsilon"] == "inf"


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(0.0, "0"), (3.0, "3"), (2.99991, "3"), (1.82801, "1.829"), (0.0123412, "0.01235"), (math.inf, "inf")],
)
def test_epsilon_is_never_shown_smaller_than_it_is(epsilon, text):
    assert rounded_up(epsilon) == text
    assert float(text) >= epsilon


CUT = {"max_batch": 30, "num_units": 1000}


def test_cut_draws_and_replaced_units_are_kept_and_accounted(path):
    with create(path, adjacency="replace-one", epsilon_budget=2.0) as ledger:
        assert ledger.reserve(1.5, 0.02) == 1
        # The ledger knows how many units there are.
        assert ledger.reserve(1.5, 0.02, max_batch=30) == 2
        assert ledger.reserve(1.5, 0.02, **CUT) == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["adjacency"] == "replace-one"
    assert lines[1] == {"step": 1, "noise_multiplier": 1.5, "sample_rate": 0.02}
    assert lines[2] == {"step": 2, "noise_multiplier": 1.5, "sample_rate": 0.02} | CUT
    steps = [StepEvent(1.5, 0.02), StepEvent(1.5, 0.02, 2, **CUT)]
    with Ledger.open(path) as ledger:
        assert ledger.events() == steps
        assert ledger.epsilon() == epsilon_of(steps, 1e-5, adjacency="replace-one") > epsilon_of(steps[:1], 1e-5)
        stated = ledger.guarantee()
        assert (stated.adjacency, stated.epsilon) == ("replace-one", ledger.epsilon())
        assert stated.max_batch is None and stated.sampler == "truncated poisson"
        taken = 3
        with pytest.raises(BudgetExhausted):
            while True:
                taken = ledger.reserve(1.5, 0.02, **CUT)
        more = affordable_steps(2.0, 1e-5, 1.5, 0.02, steps, adjacency="replace-one", **CUT)
        assert taken == 3 + more and more > 0


def test_torn_cut_draw_is_repeated_as_one(path):
    with create(path, adjacency="zero-out") as ledger:
        ledger.reserve(1.5, 0.02, **CUT)
        ledger.reserve(1.5, 0.02, **CUT)
    path.write_bytes(path.read_bytes()[:-9])
    assert Ledger.open(path).events() == [StepEvent(1.5, 0.02, 2, **CUT)]


def test_what_can_never_be_accounted_is_not_reserved(path):
    with create(path) as ledger:
        before = path.read_bytes()
        with pytest.raises(ValueError, match="choose adjacency='zero-out'"):
            ledger.reserve(1.5, 0.02, **CUT)
        assert path.read_bytes() == before and ledger.steps == 0


def test_users_name_the_number_of_examples_that_are_drawn_from(path):
    with create(path, adjacency="zero-out", unit="user", examples_per_user=2, num_units=500) as ledger:
        with pytest.raises(ValueError, match="belong together"):
            ledger.reserve(1.5, 0.02, max_batch=70)
        ledger.reserve(1.5, 0.02, max_batch=70, num_units=1000)
        assert ledger.events() == [StepEvent(1.5, 0.02, 1, 70, 1000)]
        assert ledger.epsilon() == epsilon_of(ledger.events(), 1e-5, "pld", 2, "zero-out")


def test_ledgers_of_format_1_still_open_and_go_on(path):
    whole = filled(path, adjacency="zero-out").replace(b'"fastclip_ledger": 2', b'"fastclip_ledger": 1')
    path.write_bytes(whole)
    with Ledger.open(path) as ledger:
        assert ledger.events() == [StepEvent(1.1, 0.02, 3)]
        with pytest.raises(ValueError, match="format 1"):
            ledger.reserve(1.1, 0.02, **CUT)
        assert ledger.reserve(1.1, 0.02) == 4
    assert path.read_bytes().startswith(whole)
    assert Ledger.open(path).steps == 4


def test_large_delta_is_warned_of_at_the_start(path):
    with pytest.warns(AccountingWarning, match="not below 1 / 1000"):
        create(path, delta=1e-3).close()
