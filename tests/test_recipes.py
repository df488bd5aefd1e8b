# ruff: noqa: F811 -- pytest passes imported fixtures by the names of arguments
"""Published recipes end to end on tiny models: what they leave, how they go on, what they refuse, what they are."""

import json
import math
from dataclasses import replace

import pytest
import torch
from families import ENCODER, GPT2, from_config, next_token_loss
from rich.console import Console
from safetensors.torch import load_file
from test_cli import fastclip, own  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from fastclip.accounting import Ledger, get_epsilon, get_noise_multiplier
from fastclip.finetune import Display, quiet
from fastclip.finetune.tuning import tune
from fastclip.recipes import CATALOG, chosen, noise_table, resume_recipe, start_recipe, users
from fastclip.recipes import fit as fits
from fastclip.recipes import run as runs
from fastclip.recipes.task import Task, padded

METRICS = {
    "sst2": {"accuracy"},
    "mnli": {"accuracy matched", "accuracy mismatched"},
    "e2e": {"BLEU", "ROUGE-L", "NIST"},
    "dart": {"BLEU", "ROUGE-L", "NIST"},
}


@pytest.fixture
def silent():
    quiet()
    return Display(Console(quiet=True))


# What they are


def test_the_settings_are_the_published_ones():
    for task, factor in (("sst2", 1), ("qnli", 2), ("qqp", 6), ("mnli", 6)):
        recipe = CATALOG[task]
        assert (recipe.batch_size, recipe.epochs) == (1000 * factor, 3 * factor)
        assert (recipe.learning_rate, recipe.decay, recipe.max_length, recipe.clipping_norm) == (5e-4, True, 256, 0.1)
        ours = CATALOG[f"ew-tune-{task}"]
        assert (ours.batch_size, ours.epochs, ours.clipping_norm, ours.tunings) == (2000, 20, 10.0, ("lora",))
        assert ours.accountant == "edgeworth" and not ours.targets
    for task, epochs, rate, delta in (("e2e", 10, 2e-3, 8e-6), ("dart", 15, 5e-4, 1e-5)):
        recipe = CATALOG[task]
        assert (recipe.batch_size, recipe.epochs, recipe.learning_rate, recipe.delta) == (1024, epochs, rate, delta)
        assert recipe.clipping_norm == 0.1 and not recipe.decay
    assert CATALOG["low-dimensional"].tunings == ("full", "lora", "prefix", "bitfit", "last")
    assert next(t.results["BLEU"] for t in CATALOG["low-dimensional"].targets if t.epsilon == 8.0) == 63.189


def test_an_epoch_of_steps_and_a_delta_follow_from_the_size():
    recipe = CATALOG["sst2"]
    assert recipe.steps_of(67349) == math.ceil(3 * 67349 / 1000)
    assert recipe.delta_of(67349) == 1 / (2 * 67349) and CATALOG["e2e"].delta_of(42061) == 8e-6


@pytest.mark.parametrize(
    ("expected", "room", "found"), [(1000, 20, (1000, 20)), (1024, 16, (1024, 16)), (97, 16, (97, 1)), (6, 16, (6, 6))]
)
def test_a_draw_is_cut_evenly_and_stays_as_large_as_it_was(expected, room, found):
    assert fits.sizes(expected, room) == found


# Whole runs


@pytest.mark.parametrize("preset", METRICS)
def test_a_recipe_runs_end_to_end(preset, silent, tmp_path):
    result = start_recipe(preset, {}, tmp_path / "run", silent, small=True)
    (report,) = result["reports"].values()
    folder = tmp_path / "run"
    assert report == json.loads((folder / "report.json").read_text())
    guarantee = report["guarantee"]
    assert guarantee["private"] and guarantee["steps"] == 3 and guarantee["epsilon"] <= 8
    spent = get_epsilon(guarantee["noise_multiplier"], 12 / 48, 3, guarantee["delta"], adjacency="zero-out")
    assert guarantee["epsilon"] == spent
    assert set(report["held_out"]) == METRICS[preset] | {"examples"}
    assert all(0 <= report["held_out"][name] <= 100 for name in METRICS[preset])
    assert len(report["targets_published_by_others"]) == len(CATALOG[preset].targets) > 0
    kind = AutoModelForMaskedLM if preset in ("sst2", "mnli") else AutoModelForCausalLM
    kind.from_pretrained(folder / "model")
    for public in (folder / "report.json", folder / "model" / "README.md"):
        assert "private_loss" not in public.read_text() and str(tmp_path) not in public.read_text()
    with Ledger.open(folder / "private" / "ledger.jsonl") as ledger:
        assert ledger.steps == 3
    assert not list((folder / "private").glob("checkpoint-*"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "run"
    quiet()
    return folder, start_recipe("low-dimensional", {}, folder, Display(Console(quiet=True)), small=True)["reports"]


def test_the_comparison_has_a_private_run_for_each_tuning(compared):
    folder, reports = compared
    assert list(reports) == ["full", "lora", "prefix", "bitfit", "last"]
    assert not any("refused" in report for report in reports.values())
    trained = {name: report["training"]["trained_parameters"] for name, report in reports.items()}
    assert all(trained[name] < trained["full"] for name in ("lora", "prefix", "bitfit", "last"))
    assert len({report["guarantee"]["noise_multiplier"] for report in reports.values()}) == 1
    for name in reports:
        with Ledger.open(folder / name / "private" / "ledger.jsonl") as ledger:
            assert ledger.steps == 3
    # LoRA is folded in: the folder holds a plain GPT-2.
    assert set(load_file(folder / "lora" / "model" / "model.safetensors")) == set(
        load_file(folder / "full" / "model" / "model.safetensors")
    )


def test_what_one_tuning_refuses_leaves_the_others_alone(silent, tmp_path, monkeypatch):
    def refuse(model, tuning):
        if tuning == "prefix":
            raise ValueError("no prefix today")
        return tune(model, tuning)

    monkeypatch.setattr(runs, "tune", refuse)
    reports = start_recipe("e2e", {"tunings": ("prefix", "bitfit")}, tmp_path / "run", silent, small=True)["reports"]
    assert reports["prefix"] == {"refused": "no prefix today"} and "guarantee" in reports["bitfit"]
    with pytest.raises(ValueError, match="no prefix today"):
        start_recipe("e2e", {"tunings": ("prefix",)}, tmp_path / "alone", silent, small=True)


@pytest.mark.parametrize("preset", ["users-mail", "users-stackoverflow"])
def test_both_samplings_see_as_many_examples(preset, silent, tmp_path):
    reports = start_recipe(preset, {}, tmp_path / "run", silent, small=True)["reports"]
    els, uls = reports["els"], reports["uls"]
    assert els["guarantee"]["unit"] == uls["guarantee"]["unit"] == "user"
    assert els["guarantee"]["examples_per_user"] == 2 and uls["guarantee"]["examples_per_user"] is None
    assert els["guarantee"]["steps"] == uls["guarantee"]["steps"] == 3
    # 18 users have two examples each or more: 12 examples, or 6 users with two.
    assert els["training"]["expected_batch"] == 12 and uls["training"]["expected_batch"] == 6
    assert els["training"]["protected_units"] == uls["training"]["protected_units"] == 18
    assert els["guarantee"]["noise_multiplier"] > uls["guarantee"]["noise_multiplier"]
    for report in (els, uls):
        assert report["guarantee"]["epsilon"] <= 8 and report["held_out"]["loss (nats per token)"] > 0


def test_what_stays_of_a_user_is_a_part_of_its_own():
    examples = [{users.USER: f"u{i % 5}", "place": i} for i in range(23)]
    kept = users.at_most_of_each(examples, 3, None)
    assert len(kept) == 15 and all(example in examples for example in kept)
    assert {sum(example[users.USER] == f"u{i}" for example in kept) for i in range(5)} == {3}
    chosen_places = {tuple(e["place"] for e in users.at_most_of_each(examples, 3, None)) for _ in range(20)}
    assert len(chosen_places) > 1


def test_a_seed_voids_the_epsilon(silent, tmp_path):
    (report,) = start_recipe("sst2", {"seed": 1}, tmp_path / "run", silent, small=True)["reports"].values()
    assert not report["guarantee"]["private"] and "void" in report["guarantee"]["statement"].lower()


# Going on


@pytest.mark.parametrize("tunings", [("lora", "prefix"), ("prefix", "lora")])
def test_an_interrupted_comparison_goes_on(tunings, silent, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def crash(self, args, state, control, **others):
        if first.exists() and state.global_step == 2:
            raise Crash
        return on_step_end(self, args, state, control, **others)

    folder = tmp_path / "run"
    first = folder / tunings[0] / "report.json"
    on_step_end = fits._Progress.on_step_end
    with monkeypatch.context() as patch:
        patch.setattr(fits._Progress, "on_step_end", crash)
        with pytest.raises(Crash):
            start_recipe("low-dimensional", {"tunings": tunings}, folder, silent, small=True)
    before = first.read_bytes()
    assert not (folder / tunings[1] / "report.json").exists()
    reports = resume_recipe(folder, silent)["reports"]
    assert first.read_bytes() == before and list(reports) == list(tunings)
    # Step 2 was spent and lost: the run ends with a step less, within its budget.
    assert reports[tunings[1]]["guarantee"]["steps"] == 3 and reports[tunings[1]]["guarantee"]["epsilon"] <= 8
    assert resume_recipe(folder, silent)["reports"] == reports


def test_a_run_without_a_checkpoint_is_lost_and_not_begun_again(silent, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def crash(self, args, state, control, **others):
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(fits._Progress, "on_step_end", crash)
        start_recipe("users-mail", {}, tmp_path / "run", silent, small=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="before its first checkpoint"):
            resume_recipe(tmp_path / "run", silent)
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(
    ("task", "kind", "tuning", "most"),
    [
        ("MaskedLM", "roberta", "full", 14),  # 16 positions, of which RoBERTa's padding takes two
        ("CausalLM", "gpt2", "full", 16),
        ("CausalLM", "gpt2", "prefix", 6),
    ],
)
def test_an_example_longer_than_the_model_takes_is_refused(task, kind, tuning, most):
    model = tune(from_config(task, kind, **(GPT2 if kind == "gpt2" else ENCODER | {"pad_token_id": 1})), tuning)
    for length in (most, most + 1):
        model(torch.zeros(1, most, dtype=torch.long))  # so many it does take
        example = {"input_ids": [5] * length, "labels": [5] * length}
        examples = Task([example], padded, next_token_loss, lambda model: {}, 0)
        if length > most:
            with pytest.raises(ValueError, match=f"has {length} tokens, and the model takes {most}"):
                fits._check_lengths(examples, model)
        else:
            fits._check_lengths(examples, model)


def test_ones_own_model_is_tuned_too(own, tmp_path):
    options = ["--steps", 2, "--batch-size", 8, "--tuning", "lora", "--output", tmp_path / "run"]
    report = json.loads(fastclip("finetune", *own, *options, "--json").stdout)["report"]
    assert report["data"]["trained_parameters"] < report["data"]["parameters"]
    assert report["configuration"]["tuning"] == "lora"
    names = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert set(names) == set(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").state_dict()
    )


def test_an_output_that_holds_a_run_is_refused(silent, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        start_recipe("sst2", {}, tmp_path, silent, small=True)


# The noise of each accountant


def test_the_noise_of_each_accountant_and_plds_verdict():
    recipe = replace(chosen("ew-tune-mnli", {}), steps=400, size=40_000)
    found = noise_table(recipe)
    rows = {row["accountant"]: row for row in found["accountants"]}
    assert list(rows) == ["rdp", "pld", "prv", "gdp", "edgeworth"]
    delta = 1 / 80_000
    assert found["terms"]["delta"] == delta and found["terms"]["sample_rate"] == 0.05
    assert rows["pld"]["noise_multiplier"] == get_noise_multiplier(8.0, delta, 0.05, 400, adjacency="zero-out")
    for name, row in rows.items():
        epsilon = get_epsilon(row["noise_multiplier"], 0.05, 400, delta, adjacency="zero-out")
        assert row["pld_epsilon"] == epsilon and row["within_budget"] == (epsilon <= 8.0), name
    assert rows["rdp"]["within_budget"] and rows["rdp"]["noise_multiplier"] > rows["pld"]["noise_multiplier"]
    assert not rows["gdp"]["within_budget"]


def test_noise_without_a_known_size_is_refused():
    with pytest.raises(ValueError, match="fastclip plan"):
        noise_table(CATALOG["users-mail"])


# The command


def test_the_command_runs_a_recipe_and_prints_one_object(tmp_path):
    options = ["--preset", "sst2", "--smoke", "--tuning", "bitfit", "--epsilon", 3, "--output", tmp_path / "run"]
    answer = json.loads(fastclip("finetune", *options, "--json").stdout)
    report = answer["reports"]["bitfit"]
    assert report["guarantee"]["epsilon"] <= 3 and report["configuration"]["preset"] == "sst2"
    again = json.loads(fastclip("finetune", "--resume", tmp_path / "run", "--json").stdout)
    assert again == answer


def test_the_command_shows_both_tables(tmp_path):
    shown = fastclip("finetune", "--preset", "e2e", "--smoke", "--output", tmp_path / "run").stdout
    for words in ("held-out results of this run", "published by others: targets", "69.463", "NIST", "zero-out"):
        assert words in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "sst2", "--compare"], "--compare are not for published recipes"),
        (["--preset", "sst2", "--label-column", "x"], "leave them out"),
        (["--preset", "sst2", "--smoke", "--tuning", "magic"], "tuning 'magic' does not exist"),
        (["--preset", "sst2", "--epsilon", -1], "epsilon is -1"),
        (["--preset", "movies", "--smoke"], "published recipes"),
        (["--preset", "sst3"], "ew-tune-sst2"),
        (["--preset", "users-mail", "--sigmas"], "fastclip plan"),
        (["--preset", "sst2", "--batch-size", 10**6, "--sigmas"], "there are 67349 examples"),
        (["--preset", "sst2", "--model", "nowhere"], "--model FOLDER"),
    ],
)
def test_bad_options_are_one_line_with_the_remedy(options, words):
    result = fastclip("finetune", *options, "--json", code=2)
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_check_says_that_recipes_are_finetunes():
    assert "published recipe" in fastclip("check", "--preset", "sst2", code=2).stderr
