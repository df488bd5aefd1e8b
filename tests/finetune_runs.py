"""Tiny models and data, and the settings of runs on them: fixtures of the fine-tuning tests."""

import functools
import json
from dataclasses import replace

import pytest
import tiny
from rich.console import Console

from fastclip.accounting import get_noise_multiplier
from fastclip.finetune import (
    MAIL,
    MOVIES,
    Display,
    start_run,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_bert(folder / "bert")
    tiny.save_llama(folder / "llama")
    tiny.save_movies(folder / "movies.tsv")
    tiny.save_mail(folder / "mail.tgz")
    tiny.save_jsonl(folder / "own.jsonl")
    return folder


@pytest.fixture(scope="module")
def movies(files):
    return replace(
        MOVIES,
        model=str(files / "bert"),
        data=str(files / "movies.tsv"),
        steps=4,
        batch_size=20,
        held_out=10,
        physical_tokens=64,
    )


@pytest.fixture(scope="module")
def finished(movies, tmp_path_factory):
    """The folder of a run, and what the run returned."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, start_run(movies, folder, Display(Console(quiet=True)))


@pytest.fixture
def mail(files):
    return replace(
        MAIL, model=str(files / "llama"), data=str(files / "mail.tgz"), steps=3, batch_size=6, held_out=4, max_length=16
    )


@pytest.fixture
def silent():
    return Display(Console(quiet=True))


@pytest.fixture(autouse=True)
def calibrated_once(monkeypatch):
    """The same settings are calibrated once for all tests: the search takes longer than the training."""
    monkeypatch.setattr("fastclip.finetune.run.get_noise_multiplier", calibrate)


calibrate = functools.cache(get_noise_multiplier)


def tell(folder, name):
    return json.loads((folder / name).read_text())
