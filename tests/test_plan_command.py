"""`fastclip plan`: what it reads, what it prints, what it draws, what it refuses."""

import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import typer
from typer.testing import CliRunner

from fastclip import mean_estimation, userlevel
from fastclip.plan_command import plan
from fastclip.user_counts import read_counts

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(plan)

SETTINGS = ["--budget", 8, "--steps", 2, "--epsilon", 2, "--delta", 1e-3]
TINY = mean_estimation.Experiment(
    users=60, examples_per_user=4, dimension=8, steps=5, delta=1e-3, epsilons=(1.0,), budgets=(8, 16),
    spreads=((0.7, 0.7),), caps=(1, 4), groups=(1, 2, 4), trials=2,
)  # fmt: skip


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def counts(tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("\n".join(["4"] * 30) + "\n")
    return path


def test_json_is_what_compare_finds(counts):
    told = json.loads(run("--users", counts, *SETTINGS, "--shared-share", 0.25, "--json").stdout)
    found = userlevel.compare([4] * 30, 8, 2, 2.0, 1e-3, 0.25)
    assert told == {**json.loads(json.dumps(found.as_dict())), "measured": None, "warnings": []}
    assert {"users", "budget", "epsilon", "share", "rows", "recommendation"} <= set(told)
    assert told["recommendation"]["algorithm"] in ("ELS", "ULS")


def test_the_table_and_the_advice(counts):
    shown = run("--users", counts, *SETTINGS).stdout
    for words in ("30 users, 120 examples", "K=4", "G=2", "r=0", "r=1", "Recommended: "):
        assert words in shown
    assert userlevel.compare([4] * 30, 8, 2, 2.0, 1e-3).recommendation.reason[:30] in shown


def test_the_picture_is_a_png(counts, tmp_path):
    for share in ([], ["--shared-share", 0.5]):
        picture = tmp_path / "plan.png"
        run("--users", counts, *SETTINGS, *share, "--plot", picture, "--json")
        assert picture.read_bytes().startswith(b"\x89PNG") and 5_000 < picture.stat().st_size < 150_000
        picture.unlink()


def test_a_large_delta_warns_on_standard_error(counts):
    result = run("--users", counts, "--budget", 8, "--steps", 2, "--epsilon", 2, "--delta", 0.1, "--json")
    assert result.stderr.startswith("fastclip: warning: delta=0.1") and result.stderr.count("\n") == 1
    assert "1 / 30" in json.loads(result.stdout)["warnings"][0]


def test_every_kind_of_file_gives_the_counts(tmp_path):
    records = tiny.records(33)
    wanted = sorted(Counter(record["who"] for record in records).values())
    tiny.save_jsonl(tmp_path / "d.jsonl", 33)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    (tmp_path / "d.csv").write_text("said,who\n" + "".join(f"x,{record['who']}\n" for record in records))
    (tmp_path / "named.csv").write_text("who,count\n" + "".join(f"u{i},{n}\n" for i, n in enumerate(wanted)))
    (tmp_path / "other.csv").write_text("who,Examples\n" + "".join(f"u{i},{n}\n" for i, n in enumerate(wanted)))
    (tmp_path / "bare.csv").write_text("".join(f"{n}\n" for n in wanted))
    for name in ("d.jsonl", "d.parquet", "d.csv", "named.csv", "other.csv", "bare.csv"):
        counts = read_counts(tmp_path / name, "who")
        assert sorted(counts) == wanted and np.issubdtype(counts.dtype, np.integer), name


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("d.csv", "said,who\na,b\n", "no user in 'user' (columns: said, who)"),
        ("d.csv", "user,text\nb,a\n,c\n", "empty in line 3"),
        ("d.csv", "user,count\nb,2.5\n", "line 2: '2.5'"),
        ("d.csv", "user,count,examples\nb,2,3\n", "several columns of counts (count, examples)"),
        ("d.csv", "3\nfour\n", "line 2: 'four'"),
        ("d.csv", "3\n0\n", "1 users without examples"),
        ("d.csv", "user\n", "no rows"),
        ("d.csv", "", "no user in 'user'"),
        ("d.jsonl", '{"user": 1}\n{"who": 2}\n', "line 2: "),
        ("d.jsonl", '{"user": 1}\n{nonsense\n', "line 2, is not JSON"),
        ("d.jsonl", "[1]\n", "line 1: "),
        ("d.jsonl", "", "no rows"),
        ("d.parquet", "nonsense", "is not a Parquet file"),
        ("d.txt", "3\n", "ending '.txt'"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    result = run("--users", tmp_path / name, *SETTINGS, "--json", code=2)
    assert words in result.stderr and result.stdout == ""
    assert result.stderr.startswith("fastclip: ") and result.stderr.count("\n") == 1


def test_a_parquet_column_with_gaps_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"user": ["a", None]}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match="1 of 2 rows"):
        read_counts(tmp_path / "d.parquet", "user")
    with pytest.raises(ValueError, match=r"columns: user"):
        read_counts(tmp_path / "d.parquet", "who")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--users, --budget, --steps, --epsilon, --delta missing"),
        (["--users", "missing.csv", *SETTINGS], "missing.csv does not exist"),
        (["--users", "COUNTS", *SETTINGS[2:]], "--budget missing"),
        (["--users", "COUNTS", *SETTINGS[2:], "--budget", 1000], "more than the 120 examples"),
        (["--users", "COUNTS", *SETTINGS, "--shared-share", 2], "share=2.0"),
        (["--users", "COUNTS", *SETTINGS, "--plot", "x.jpg"], "not a .png file"),
        (["--users", "COUNTS", *SETTINGS, "--plot", "nowhere/x.png"], "folder that exists"),
        (["--users", "COUNTS", *SETTINGS, "--quick"], "--quick is for --experiment"),
        (["--users", "COUNTS", *SETTINGS, "--measure", "model"], "--public-sample FILE is missing"),
        (["--users", "COUNTS", *SETTINGS, "--public-sample", "x.csv"], "--measure MODEL is missing"),
        (
            ["--users", "COUNTS", *SETTINGS, "--measure", "m", "--public-sample", "x.csv", "--shared-share", 0.1],
            "choose one",
        ),
        (["--users", "COUNTS", *SETTINGS, "--measure", "m", "--public-sample", "x.csv"], "data x.csv does not exist"),
        (["--experiment", "medians"], "the only one is mean-estimation"),
        (["--experiment", "mean-estimation", "--budget", 8], "--budget: --experiment has settings of its own"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(counts, arguments, words):
    result = run(*(counts if x == "COUNTS" else x for x in arguments), "--json", code=2)
    assert words in result.stderr and result.stdout == ""
    assert result.stderr.startswith("fastclip: ") and result.stderr.count("\n") == 1


def test_a_private_measurement_is_refused_with_the_reason(counts):
    result = run("--users", counts, *SETTINGS, "--measure", "model", code=2)
    assert "private themselves" in result.stderr and "does not exist" in result.stderr


def test_the_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(mean_estimation, "QUICK", TINY)
    picture = tmp_path / "experiment.png"
    told = json.loads(run("--experiment", "mean-estimation", "--quick", "--json", "--plot", picture).stdout)
    assert told == json.loads(json.dumps(mean_estimation.as_dict(TINY, mean_estimation.run(TINY))))
    assert [v["budget"] for v in told["verdicts"]] == [8, 16]
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = run("--experiment", "mean-estimation", "--quick").stdout
    for words in ("60 users", "ELS K=4", "ULS G=2", "ahead", "±"):
        assert words in shown


def test_r_is_measured_on_a_public_sample(counts, tmp_path):
    tiny.save_llama(tmp_path / "llama")
    tiny.save_jsonl(tmp_path / "public.jsonl")
    options = ["--measure", tmp_path / "llama", "--public-sample", tmp_path / "public.jsonl", "--text-column", "said"]
    result = run("--users", counts, *SETTINGS, *options, "--user-column", "who", "--json")
    told = json.loads(result.stdout)
    assert told["measured"]["users"] == 15 and told["measured"]["examples"] == 60
    assert told["share"] == min(max(told["measured"]["value"], 0), 1) and 0 < told["measured"]["standard_error"] < 0.5
    shown = run("--users", counts, *SETTINGS, *options, "--user-column", "who").stdout
    assert "standard error" in shown and "on 15 users of the public sample" in shown


def test_a_classifier_is_measured_too(counts, tmp_path):
    tiny.save_bert(tmp_path / "bert")
    tiny.save_jsonl(tmp_path / "public.jsonl")
    options = ["--measure", tmp_path / "bert", "--public-sample", tmp_path / "public.jsonl", "--text-column", "said"]
    result = run(
        "--users", counts, *SETTINGS, *options, "--label-column", "kind", "--user-column", "who", "--json"
    )  # fmt: skip
    assert json.loads(result.stdout)["measured"]["users"] == 15
