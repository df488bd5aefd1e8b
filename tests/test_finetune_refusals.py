# ruff: noqa: F811 -- pytest passes imported fixtures by the names of arguments
"""What fine-tuning refuses: settings, files, folders; nothing is left behind."""

import math
from dataclasses import replace

import pytest
from finetune_runs import calibrated_once, files, movies, silent  # noqa: F401

from fastclip.finetune import (
    MOVIES,
    data,
    models,
    start_run,
)
from fastclip.finetune.mail import read_mail


def test_an_output_that_holds_a_run_is_refused(movies, silent, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        start_run(movies, tmp_path, silent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1000}, "batch_size is 1000, but there are 86 examples"),
        ({"data": "missing.tsv"}, "make finetune"),
        ({"model": "missing"}, "model missing does not exist"),
        ({"held_out": 1000}, "cannot spare 1000"),
    ],
)
def test_what_cannot_be_run_is_refused_and_leaves_no_folder(movies, silent, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        start_run(replace(movies, **changes), tmp_path / "run", silent)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", 0.0),
        ("epsilon", math.inf),
        ("delta", 1.0),
        ("steps", 0),
        ("batch_size", 0),
        ("max_grad_norm", -1.0),
        ("learning_rate", math.nan),
    ],
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        replace(MOVIES, **{name: value})


def test_missing_packages_are_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"no-such-package.*make finetune-mail"):
        models.package_file("no_such_package", "file", "make finetune-mail")


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ('{"said": "a"}\n{"other": 1}\n', ("said", None, None), "empty in 1 of 2 rows"),
        ("not json\n", ("said", None, None), "line 1, is not JSON"),
        ("[1]\n", ("said", None, None), "line 1, is a list"),
        ("", ("said", None, None), "no rows"),
        ('{"said": "a", "kind": 1}\n', ("said", "kind", None), "1 different values"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, columns, message):
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        data.read_file(path, *columns)


def test_files_that_are_something_else_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"\.jsonl, \.csv or \.parquet"):
        data.read_file(files / "movies.tsv", "said", None, None)
    with pytest.raises(ValueError, match="not the rated movie sentences"):
        data.read_movies(files / "own.jsonl", held_out=3)
    with pytest.raises(ValueError, match="not the mail archive"):
        read_mail(files / "own.jsonl")
