"""The fastclip command: one JSON object where asked, plain words otherwise, exit code 2 with the remedy for bad input."""

import json
import subprocess
import sys

import pytest
import tiny
from typer.testing import CliRunner

from fastclip.accounting import get_epsilon, get_noise_multiplier
from fastclip.cli import app


def fastclip(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Options for a tiny classifier on data of one's own."""
    folder = tmp_path_factory.mktemp("own")
    tiny.save_bert(folder / "bert")
    tiny.save_jsonl(folder / "own.jsonl")
    return [
        "--model", folder / "bert", "--data", folder / "own.jsonl", "--text-column", "said", "--label-column", "kind"
    ]  # fmt: skip


ACCOUNT = ["--sample-rate", 0.01, "--steps", 100, "--delta", 1e-5]


def test_account_gives_the_accountants_epsilon():
    result = fastclip("account", "--noise-multiplier", 1.0, *ACCOUNT, "--json")
    answer = json.loads(result.stdout)
    assert answer["epsilon"] == get_epsilon(1.0, 0.01, 100, 1e-5)
    assert answer["accountant"] == "pld" and answer["examples_per_user"] is None
    assert fastclip("account", "--noise-multiplier", 1.0, *ACCOUNT).stdout.startswith("epsilon 0.")


def test_account_takes_the_other_options():
    options = ["--examples-per-user", 4, "--accountant", "pld"]
    answer = json.loads(fastclip("account", "--noise-multiplier", 2.0, *ACCOUNT, *options, "--json").stdout)
    assert answer["epsilon"] == get_epsilon(2.0, 0.01, 100, 1e-5, examples_per_user=4)


def test_calibrate_is_the_inverse_of_account():
    answer = json.loads(fastclip("calibrate", "--epsilon", 2, *ACCOUNT, "--json").stdout)
    assert answer["noise_multiplier"] == get_noise_multiplier(2, 1e-5, 0.01, 100)
    back = json.loads(fastclip("account", "--noise-multiplier", answer["noise_multiplier"], *ACCOUNT, "--json").stdout)
    assert 1.99 < back["epsilon"] <= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["account", "--noise-multiplier", -1, *ACCOUNT], "noise_multiplier=-1.0 is negative"),
        (["account", "--noise-multiplier", 1, *ACCOUNT, "--accountant", "magic"], "accountant='magic' does not exist"),
        (["calibrate", "--epsilon", 0, *ACCOUNT], "target_epsilon=0.0 is not positive"),
        (["finetune", "--preset", "poems"], "preset 'poems' does not exist: choose one of movies, mail"),
        (["finetune", "--model", "bert"], "--data is missing"),
        (["finetune", "--label-column", "kind"], "give --model and --data"),
        (["finetune", "--data", "missing.tsv", "--preset", "movies"], "make finetune"),
        (["finetune", "--steps", 0], "steps is 0"),
        (["finetune", "--epsilon", "nan"], "epsilon is nan"),
        (["finetune", "--resume", "nowhere"], "nowhere"),
        (["finetune", "--resume", "nowhere", "--steps", 3], "settings of the interrupted run"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(arguments, words):
    result = fastclip(*arguments, "--json", code=2)
    assert words in result.stderr
    assert result.stderr.startswith("fastclip: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_every_command_has_help():
    commands = ("finetune", "account", "calibrate", "check", "plan")
    assert all(command in fastclip("--help").stdout for command in commands)
    for command in commands:
        assert "--json" in fastclip(command, "--help").stdout


def test_finetune_prints_one_object_and_nothing_else(own, tmp_path):
    options = ["--steps", 2, "--batch-size", 8, "--epsilon", 4, "--learning-rate", 1e-3, "--max-grad-norm", 0.5]
    result = fastclip("finetune", *own, *options, "--output", tmp_path / "run", "--json")
    answer = json.loads(result.stdout)
    assert answer["run"] == str(tmp_path / "run")
    assert answer["report"] == json.loads((tmp_path / "run" / "report.json").read_text())
    configuration = answer["report"]["configuration"]
    assert configuration["steps"] == 2 and configuration["batch_size"] == 8 and configuration["max_grad_norm"] == 0.5
    assert 3.9 < answer["report"]["guarantee"]["epsilon"] <= 4


def test_finetune_ends_with_a_table(own, tmp_path):
    result = fastclip("finetune", *own, "--steps", 2, "--batch-size", 8, "--output", tmp_path / "run")
    shown = result.stdout.replace("\n", "")  # a long path is wrapped, anywhere
    for words in ("held-out accuracy before", "epsilon", "accountant", "examples/s", "peak memory", "report.html"):
        assert words in shown


def test_check_finds_nothing_wrong_and_trains_nothing(own):
    answer = json.loads(fastclip("check", *own, "--json").stdout)
    assert answer["trained"] == answer["parameters"]
    assert answer["checked"] == 4
    assert "the same" in fastclip("check", *own).stdout


def test_python_dash_m_is_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "fastclip", "account", "--help"], capture_output=True, text=True, check=True
    )
    assert "--noise-multiplier" in run.stdout
