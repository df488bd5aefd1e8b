"""Data, templates, tables and measures of the published recipes, each against what can be worked out by hand."""

import json
from dataclasses import replace

import datasets
import pytest
import torch
from oracle import plain_gradients
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from fastclip.finetune.data import read_amazon
from fastclip.recipes import CATALOG, infilling, smoke, sources, table_to_text, users
from fastclip.recipes.metrics import generation_metrics
from fastclip.recipes.prompts import MASK, Part, Template, fill, word_ids


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Tiny versions of recipes by name, made once."""
    made = {}

    def make(preset, **changes):
        if preset not in made:
            made[preset] = smoke.shrink(CATALOG[preset], tmp_path_factory.mktemp(preset))
        return replace(made[preset], **changes)

    return make


def tokenizer_of(settings):
    return AutoTokenizer.from_pretrained(settings.model)


def put(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


# Where the data comes from


def test_the_hub_is_asked_by_name_and_the_same_code_reads_a_folder(small, monkeypatch, tmp_path):
    settings, asked = small("mnli"), []
    rows = sources.load(settings, "train")

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.Dataset.from_list([{**row, "idx": 1} for row in rows])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert sources.load(replace(settings, data=None), "train") == rows
    assert asked == [(("nyu-mll/glue", "mnli"), {"split": "train", "revision": None})]


def test_rows_that_nobody_owns_are_left_out_where_the_source_says_so(monkeypatch):
    rows = [{"Body": "text", "OwnerUserId": owner} for owner in (3, None, 4)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    assert [row["OwnerUserId"] for row in sources.load(CATALOG["users-stackoverflow"], "train")] == [3, 4]


def test_a_hub_out_of_reach_is_said_with_the_remedy(monkeypatch):
    def load_dataset(*names, **options):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"offline mode.*--data FOLDER with train.jsonl and test.jsonl"):
        sources.load(CATALOG["e2e"], "train")


GOOD = {"sentence": "fine", "label": 1}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "fine", "label": 1}], "has no column 'sentence'"),
        ([GOOD, {"sentence": None, "label": 1}], "row 2, has nothing in column 'sentence'"),
        ([GOOD, {"sentence": "fine"}], "row 2, has nothing in column 'label'"),
        ([GOOD, {"sentence": "  ", "label": 1}], "row 2 of 'train' has no text"),
        ([GOOD, {"sentence": "fine", "label": 2}], "row 2 of 'train' has label 2"),
        ([GOOD, {"sentence": "fine", "label": -1}], "label -1"),
        ([GOOD, {"sentence": "fine", "label": 0.5}], "label 0.5"),
        ([GOOD, {"sentence": "fine", "label": "good"}], "label 'good'"),
    ],
)
def test_bad_rows_are_named(rows, words, small, tmp_path):
    settings = small("sst2", data=put(tmp_path / "data", train=rows, validation=[GOOD]))
    with pytest.raises(ValueError, match=words):
        infilling.build(settings, tokenizer_of(settings))


def test_a_missing_or_doubtful_split_is_named(small, tmp_path):
    settings = small("sst2", data=put(tmp_path / "data", train=[GOOD]))
    with pytest.raises(ValueError, match="one file validation"):
        infilling.build(settings, tokenizer_of(settings))
    (tmp_path / "data" / "train.csv").write_text("sentence,label\nfine,1\n")
    with pytest.raises(ValueError, match=r"has train\.jsonl and train\.csv"):
        sources.load(settings, "train")


def test_labels_of_a_csv_are_numbers_again():
    assert sources.labels([{"label": "1"}, {"label": 0}, {"label": 1.0}], 2, "train") == [1, 0, 1]


def test_a_text_without_a_user_is_refused(small, tmp_path):
    rows = [{"text": "one", "user": "a"}, {"text": "two", "user": " "}, {"text": "three", "user": "b"}]
    settings = small("users-mail", data=put(tmp_path / "data", train=rows))
    with pytest.raises(ValueError, match="row 2 of 'train' has no text in user"):
        users.build(settings, tokenizer_of(settings))


def test_held_out_users_train_nothing(small):
    settings = small("users-cc-news")
    task = users.build(settings, tokenizer_of(settings))
    assert len({example[users.USER] for example in task.train}) == 18
    assert task.held_out == 2 * 2


def test_whole_reviews_are_held_out(tmp_path):
    lines = ["id\trating\ttext"]
    lines += [f"{i // 4}_{i % 4}\t{(2.0, -2.0, 0.3, 0.0)[i % 4]}\tsentence {i} of {i // 4}" for i in range(80)]
    (tmp_path / "amazon.tsv").write_text("\n".join(lines))
    train, held_out = read_amazon(tmp_path / "amazon.tsv", held_out=5)
    reviews = [{text.split()[-1] for text in rows.texts} for rows in (train, held_out)]
    assert len(reviews[0]) == 15 and len(reviews[1]) == 5 and not reviews[0] & reviews[1]
    # Of each three have a rating; what is nearly neutral is trained on and not measured.
    assert len(train.texts) == 45 and len(held_out.texts) == 10 and train.labels[:3] == [1, 0, 1]
    with pytest.raises(ValueError, match="20 reviews cannot spare 20"):
        read_amazon(tmp_path / "amazon.tsv", held_out=20)


# Infilling


def test_a_template_is_filled_and_the_text_is_what_gets_cut(small):
    tokenizer = tokenizer_of(small("qnli"))
    template = CATALOG["qnli"].template
    row = {"question": "Where is it?", "sentence": "Here it is."}
    ids = fill(template, row, tokenizer, 100)
    assert tokenizer.decode(ids[1:-1]) == "Where is it?<mask>, here it is."
    row = {"question": "Where is it? " * 9, "sentence": "Here " * 50}
    for limit in (12, 20, 60):
        ids = fill(template, row, tokenizer, limit)
        assert len(ids) == limit and ids.count(tokenizer.mask_token_id) == 1
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    with pytest.raises(ValueError, match="too short for the template"):
        fill(template, row, tokenizer, 4)


def test_a_text_that_spells_the_mask_adds_none(small):
    tokenizer = tokenizer_of(small("sst2"))
    ids = fill(CATALOG["sst2"].template, {"sentence": f"a {MASK} b {MASK}"}, tokenizer, 60)
    assert ids.count(tokenizer.mask_token_id) == 1


def test_words_are_one_token_or_refused(small):
    tokenizer = tokenizer_of(small("mnli"))
    ids = word_ids(CATALOG["mnli"].template, tokenizer)
    assert [tokenizer.decode([i]) for i in ids] == [" Yes", " Maybe", " No"]
    with pytest.raises(ValueError, match="'incomprehensible' is"):
        word_ids(Template((Part("text"), MASK), ("incomprehensible", "Yes")), tokenizer)
    with pytest.raises(ValueError, match="once"):
        Template((Part("text"),), ("a", "b"))


def test_a_batch_is_its_examples_one_at_a_time(small):
    settings = small("mnli")
    task = infilling.build(settings, tokenizer_of(settings))
    model = AutoModelForMaskedLM.from_pretrained(settings.model).double().eval()
    examples = sorted(task.train, key=lambda example: len(example["input_ids"]))[:: len(task.train) // 5]
    assert len({len(example["input_ids"]) for example in examples}) > 1
    together = task.losses(model, task.collate(examples))
    alone = torch.cat([task.losses(model, task.collate([example])) for example in examples])
    torch.testing.assert_close(together, alone)
    for example, loss in zip(examples, alone, strict=True):
        ids = torch.tensor([example["input_ids"]])
        words = word_ids(settings.template, tokenizer_of(settings))
        place = example["input_ids"].index(tokenizer_of(settings).mask_token_id)
        at_mask = model(input_ids=ids).logits[0, place, words]
        torch.testing.assert_close(loss, -at_mask.log_softmax(0)[example["labels"]].float())


def test_accuracy_counts_the_likeliest_word(small):
    settings = small("mnli")
    tokenizer = tokenizer_of(settings)
    task = infilling.build(settings, tokenizer)
    model = AutoModelForMaskedLM.from_pretrained(settings.model).eval()
    words = word_ids(settings.template, tokenizer)
    with torch.no_grad():
        model.lm_head.bias[words[2]] += 100
    examples = task.train[:8]
    assert [example["labels"] for example in examples] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert infilling.accuracy(model, examples, task.collate, tokenizer.mask_token_id, words) == 2 / 8
    assert set(task.evaluate(model)) == {"accuracy matched", "accuracy mismatched"}


# Tables to text


def test_records_are_written_in_a_line():
    row = {"meaning_representation": "name[The Mill], food[fish, chips], area[city centre]"}
    assert table_to_text.line_of(row) == "name : The Mill | food : fish, chips | area : city centre"
    assert table_to_text.line_of({"tripleset": [["a", "IS", "b"], ["b", "HAS", "c"]]}) == "a : IS : b | b : HAS : c"
    for bad in ({"meaning_representation": "The Mill"}, {"tripleset": [["a", "b"]]}, {"tripleset": []}):
        with pytest.raises(ValueError, match="give"):
            table_to_text.line_of(bad)


def test_the_loss_counts_the_sentence_and_its_end_alone(small):
    tokenizer = tokenizer_of(small("e2e"))
    record, sentence = "name : The food", "The food has song."
    example = table_to_text.encode(tokenizer, record, sentence, 60)
    start = example["labels"].index(next(x for x in example["labels"] if x != -100))
    assert tokenizer.decode(example["input_ids"][: start - 1]) == record
    assert example["input_ids"][start - 1] == tokenizer.bos_token_id
    assert tokenizer.decode(example["labels"][start:-1]) == " " + sentence
    assert example["labels"][-1] == tokenizer.eos_token_id
    assert example["labels"][start:] == example["input_ids"][start:]
    short = table_to_text.encode(tokenizer, record * 9, sentence, 20)
    assert len(short["input_ids"]) == 20 and short["labels"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode([x for x in short["labels"][:-1] if x != -100]) == " " + sentence
    for limit in (3, 5):
        cut = table_to_text.encode(tokenizer, record, sentence * 9, limit)
        assert len(cut["input_ids"]) == len(cut["labels"]) == limit and cut["labels"][-1] != -100


def test_held_out_rows_of_one_record_are_its_references(small, tmp_path):
    row = {"meaning_representation": "name[The Mill]", "human_reference": "It is the Mill."}
    again = {**row, "human_reference": "The Mill it is."}
    other = {"meaning_representation": "name[The Inn]", "human_reference": "It is the Inn."}
    settings = small("e2e", data=put(tmp_path / "data", train=[row, again], test=[row, again, other]))
    task = table_to_text.build(settings, tokenizer_of(settings))
    assert len(task.train) == 2 and task.held_out == 2
    assert task.evaluate.keywords["references"] == {
        "name : The Mill": ["It is the Mill.", "The Mill it is."],
        "name : The Inn": ["It is the Inn."],
    }
    bad = small("e2e", data=put(tmp_path / "bad", train=[row, {**row, "human_reference": " "}], test=[row]))
    with pytest.raises(ValueError, match="row 2 of 'train' has a sentence without text"):
        table_to_text.build(bad, tokenizer_of(bad))


def test_what_is_generated_depends_on_no_neighbour(small):
    settings = small("dart")
    model = AutoModelForCausalLM.from_pretrained(settings.model).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8.0)  # at 0.02 all records read alike
    records = ["food : HAS : film", "a river : IS : here", "song : HAS : food", "x : IS : y"]
    tokenizer = tokenizer_of(settings)
    together = table_to_text.generate(model, tokenizer, records, 24)
    alone = [table_to_text.generate(model, tokenizer, [record], 24)[0] for record in records]
    assert together == alone and len(set(together)) > 1


# Measures


def test_measures_of_what_is_perfect_and_of_what_is_nothing():
    references = [
        ["The Mill serves good fish by the river."],
        ["A cheap inn.", "An inn that is cheap.", "It is cheap."],
    ]
    perfect = generation_metrics([of[-1] for of in references], references)
    assert perfect["BLEU"] == pytest.approx(100) and perfect["ROUGE-L"] == 100 and perfect["NIST"] > 1
    nothing = generation_metrics(["", ""], references)
    assert nothing == {"BLEU": 0.0, "ROUGE-L": 0.0, "NIST": 0.0}
    partial = generation_metrics(["The Mill serves fish by the river.", "It is an inn."], references)
    assert all(0 < partial[name] < perfect[name] for name in perfect)


def test_rouge_is_by_the_best_reference():
    measured = generation_metrics(["one two three four"], [["nothing here", "one two four"]])
    assert measured["ROUGE-L"] == pytest.approx(100 * 2 * 3 / (3 + 4))


def test_padding_leaves_gradients_alone(small):
    settings = small("e2e")
    task = table_to_text.build(settings, tokenizer_of(settings))
    model = AutoModelForCausalLM.from_pretrained(settings.model)
    longer = table_to_text.encode(tokenizer_of(settings), "name : The river", "There is a song at the river.", 40)
    examples = [task.train[0], longer]
    wide = {name: value[:1] for name, value in task.collate(examples).items()}
    narrow = task.collate(examples[:1])
    assert wide["input_ids"].shape != narrow["input_ids"].shape
    expected = plain_gradients(model, task.losses, narrow)
    for name, gradient in plain_gradients(model, task.losses, wide).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)
