"""`fastclip account` and `calibrate`: tables, JSON, pictures, and what is refused."""

import json
import math

import matplotlib.image
import pytest
from typer.testing import CliRunner

from fastclip.accounting import get_epsilon, get_noise_multiplier, safe_max_batch, shuffle_lower_bound
from fastclip.accounting.calibration import propose_noise
from fastclip.accounting.plots import Line, draw
from fastclip.cli import app

RUN = ["--sample-rate", 0.01, "--steps", 100, "--delta", 1e-5]
ACCOUNT = ["account", "--noise-multiplier", 1.0, *RUN]


def fastclip(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def answer(*arguments):
    return json.loads(fastclip(*arguments, "--json").stdout)


def rows(text):
    """The table's rows by their first cell."""
    cells = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  ") and line.strip()]
    return {first: rest[0].strip() if rest else "" for first, *rest in cells}


def test_says_what_the_epsilon_rests_on():
    text = fastclip(*ACCOUNT).stdout
    assert text.startswith("epsilon 0.7")
    for words in (
        "an upper bound", "to remove one", "to add one", "1e-05", "example", "add/remove", "poisson", "0.01", "100",
        "pld (dp-accounting",
    ):  # fmt: skip
        assert words in text
    found = answer(*ACCOUNT)
    assert found["directions"]["remove"] == found["epsilon"] > found["directions"]["add"] > 0
    assert found["guarantee"]["rigorous"] is True and found["guarantee"]["unit"] == "example"


def test_accountants_side_by_side():
    options = [*ACCOUNT, "--compare-accountants"]
    compared = {row["accountant"]: row for row in answer(*options)["accountants"]}
    assert compared["rdp"]["epsilon"] == get_epsilon(1.0, 0.01, 100, 1e-5, "rdp")
    assert [name for name, row in compared.items() if not row["rigorous"]] == ["edgeworth", "gdp"]
    table = rows(fastclip(*options).stdout)
    assert table["gdp"].endswith("an approximation") and table["rdp"].endswith("an upper bound")
    users = {row["accountant"]: row for row in answer(*options, "--examples-per-user", 3)["accountants"]}
    assert users["prv"]["epsilon"] is None and "several examples" in users["prv"]["problem"]
    assert users["group"]["epsilon"] == get_epsilon(1.0, 0.01, 100, 1e-5, "group", 3)


def test_neighbours_users_and_cuts():
    assert answer(*ACCOUNT, "--adjacency", "replace-one")["epsilon"] == get_epsilon(
        1.0, 0.01, 100, 1e-5, adjacency="replace-one"
    )
    assert "to replace one" in fastclip(*ACCOUNT, "--adjacency", "replace-one").stdout
    largest = safe_max_batch(10_000, 0.01)
    cut = ["--adjacency", "zero-out", "--max-batch", largest, "--num-units", 10_000]
    found = answer(*ACCOUNT, *cut)
    assert found["epsilon"] == get_epsilon(
        1.0, 0.01, 100, 1e-5, adjacency="zero-out", max_batch=largest, num_units=10_000
    )
    assert found["guarantee"]["sampler"] == "truncated poisson" and found["guarantee"]["max_batch"] == largest
    assert f"cut to {largest} of 10,000" in " ".join(fastclip(*ACCOUNT, *cut).stdout.split())
    users = answer(*ACCOUNT, "--examples-per-user", 4)
    assert users["guarantee"]["unit"] == "user"
    assert answer(*ACCOUNT, "--unit", "device")["guarantee"]["unit"] == "device"


def test_large_delta_is_noted():
    text = fastclip("account", "--noise-multiplier", 1.0, *RUN[:4], "--delta", 1e-3, "--num-units", 1000).stdout
    assert "note: Delta is not below 1 / 1000" in text


def test_shuffled_batches_are_void_and_stand_beside_their_lower_bound():
    shuffled = [*ACCOUNT, "--sampler", "shuffled"]
    refused = fastclip(*shuffled, code=2)
    assert "--as-poisson" in refused.stderr and refused.stdout == ""
    found = answer(*shuffled, "--as-poisson")
    assert found["guarantee"]["voided"] is True
    assert found["guarantee"]["epsilon_at_least"] == shuffle_lower_bound(1.0, 100, 1e-5) > 4 * found["epsilon"]
    text = fastclip(*shuffled, "--as-poisson").stdout
    assert text.startswith("epsilon") and "void" in text.splitlines()[0]
    assert "epsilon 4.06" in text and "or more" in text
    noise = ["calibrate", "--epsilon", 1, *RUN, "--sampler", "shuffled"]
    assert "--as-poisson" in fastclip(*noise, code=2).stderr
    assert answer(*noise, "--as-poisson")["guarantee"]["voided"] is True


def test_calibration_follows_its_options():
    replaced = answer("calibrate", "--epsilon", 1, *RUN, "--adjacency", "replace-one")
    assert replaced["noise_multiplier"] == get_noise_multiplier(1, 1e-5, 0.01, 100, adjacency="replace-one")
    assert replaced["epsilon"] == 1 and replaced["guarantee"]["epsilon"] <= 1
    text = fastclip("calibrate", "--epsilon", 1, *RUN).stdout
    assert text.startswith(f"noise multiplier {get_noise_multiplier(1, 1e-5, 0.01, 100)}\n")


@pytest.mark.filterwarnings("ignore::fastclip.accounting.AccountingWarning")
def test_noise_that_an_approximation_proposes_is_raised_where_it_overspends():
    found = answer("calibrate", "--epsilon", 1, *RUN, "--accountant", "gdp")
    settings = {"max_batch": None, "num_units": None, "tried": None}
    assert found["proposed"] == propose_noise(1, 1e-5, 0.01, 100, "gdp", None, "add/remove", **settings)
    assert found["noise_multiplier"] == get_noise_multiplier(1, 1e-5, 0.01, 100, "gdp")
    assert found["proposed_spends"] == get_epsilon(found["proposed"], 0.01, 100, 1e-5) > 1
    assert found["noise_multiplier"] == get_noise_multiplier(1, 1e-5, 0.01, 100) > found["proposed"]
    assert found["guarantee"]["accountant"] == "pld" and found["guarantee"]["epsilon"] <= 1
    text = fastclip("calibrate", "--epsilon", 1, *RUN, "--accountant", "gdp").stdout
    assert f"gdp proposed {found['proposed']}, for which pld finds epsilon 2." in text
    many = ["--sample-rate", 0.05, "--steps", 200, "--delta", 1e-5]
    above = answer("calibrate", "--epsilon", 2, *many, "--accountant", "edgeworth")
    assert above["noise_multiplier"] == above["proposed"] and above["proposed_spends"] <= 2


def test_infinite_epsilon_is_valid_json():
    found = answer("account", "--noise-multiplier", 0, *RUN)
    assert found["epsilon"] == "inf" and found["guarantee"]["epsilon"] == "inf"
    assert fastclip("account", "--noise-multiplier", 0, *RUN).stdout.startswith("epsilon inf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-batch", 120, "--adjacency", "zero-out"], "--max-batch needs --num-units"),
        (["--max-batch", 120, "--num-units", 10_000], "choose adjacency='zero-out'"),
        (["--adjacency", "replace"], "adjacency='replace' is not accounted for"),
        (["--adjacency", "replace-one", "--examples-per-user", 2], 'accountant="group"'),
        (["--adjacency", "replace-one", "--accountant", "prv"], 'accountant="pld"'),
        (["--sampler", "cyclic"], "sampler='cyclic' is not accounted for"),
        (["--as-poisson"], "leave it out"),
        (["--plot", "epsilon.pdf"], "is no .png file"),
        (["--plot", "no/such/folder/epsilon.png"], "folder that does not exist"),
    ],
)
def test_bad_options_are_one_line_with_the_remedy(options, words):
    for command in (ACCOUNT, ["calibrate", "--epsilon", 1, *RUN]):
        result = fastclip(*command, *options, code=2)
        assert words in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


def test_pictures(tmp_path):
    one, two, three = (tmp_path / f"{name}.png" for name in ("account", "users", "calibrate"))
    quick = ["--sample-rate", 0.01, "--steps", 3, "--delta", 1e-5]
    assert f"drawn into {one}" in " ".join(
        fastclip("account", "--noise-multiplier", 1, *quick, "--plot", one).stdout.split("\n")
    )
    answer("account", "--noise-multiplier", 2, *quick, "--examples-per-user", 2, "--plot", two)
    answer("calibrate", "--epsilon", 1, *quick, "--adjacency", "replace-one", "--plot", three)
    shapes = [matplotlib.image.imread(path).shape for path in (one, two, three)]
    assert shapes[0] == shapes[2] and shapes[1][1] > shapes[0][1]
    assert all(matplotlib.image.imread(path).std() > 0.05 for path in (one, two, three))


def test_picture_of_nothing_finite(tmp_path):
    path = tmp_path / "empty.png"
    draw(path, [Line("pld", [1, 2], [math.inf, math.inf], True)], title="no noise", budget=1.0, at_least=math.inf)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("number", [0, -5])
def test_an_impossible_number_of_units_is_one_line(number):
    refused = fastclip(*ACCOUNT, "--num-units", number, code=2)
    assert f"num_units={number}" in refused.stderr and refused.stderr.count("\n") == 1
