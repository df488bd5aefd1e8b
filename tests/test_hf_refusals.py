"""What DPTrainer refuses, before anything is spent."""

import dataclasses

import pytest
import torch
from datasets import Dataset, IterableDataset
from families import BERT, from_config
from test_hf_trainer import gpt2, make, sigma, texts
from torch import nn
from transformers import DataCollatorWithPadding, HfArgumentParser, TrainingArguments

import fastclip
from fastclip.huggingface import DPTrainer, PrivacyArguments, causal_lm_losses

# transformers 4 has a switch for it.
GROUPED: tuple[dict[str, object], str] = (
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy")
    if any(field.name == "train_sampling_strategy" for field in dataclasses.fields(TrainingArguments))
    else ({"group_by_length": True}, "group_by_length")
)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"max_grad_norm": 0.5}, "max_grad_norm"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        GROUPED,
        ({"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen"),
        ({"optim": "lomo"}, "steps inside backward"),
    ],
)
def test_arguments_that_cannot_be_private(tmp_path, settings, named):
    with pytest.raises(ValueError, match=named):
        make(tmp_path, sigma(1.0), **settings)


@pytest.mark.parametrize(
    ("name", "value"), [("fp16", True), ("deepspeed", "zero.json"), ("fsdp", "full_shard"), ("push_to_hub", True)]
)
def test_arguments_that_need_other_machines(tmp_path, name, value):
    args = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=name):
        DPTrainer(gpt2(), args, train_dataset=texts(), privacy_args=sigma(1.0))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "exactly one"),
        ({"target_epsilon": 1.0, "noise_multiplier": 1.0}, "exactly one"),
        ({"target_epsilon": -1.0}, "target_epsilon"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"target_epsilon": 1.0, "target_delta": 1.0}, "target_delta"),
        ({"target_epsilon": 1.0, "clipping_norm": 0.0}, "clipping_norm"),
        ({"target_epsilon": 1.0, "clipping": "round"}, "clipping"),
        ({"target_epsilon": 1.0, "accountant": "guess"}, "accountant"),
        ({"target_epsilon": 1.0, "adjacency": "add/remove"}, "zero-out"),
        ({"target_epsilon": 1.0, "examples_per_user": 2}, "user_column"),
        ({"target_epsilon": 1.0, "examples_per_user": 2, "user_column": "u", "max_batch": 9}, "max_batch"),
        ({"target_epsilon": 1.0, "max_batch": 0}, "max_batch"),
        ({"target_epsilon": 1.0, "privacy_seed": -1}, "privacy_seed"),
    ],
)
def test_bad_privacy_arguments(given, named):
    with pytest.raises(ValueError, match=named):
        PrivacyArguments(**{"target_delta": 1e-5} | given)


def test_privacy_arguments_share_a_command_line_with_trainers():
    parser = HfArgumentParser((TrainingArguments, PrivacyArguments))
    line = "--output_dir out --seed 3 --max_grad_norm 1.0 --target_delta 1e-5 --target_epsilon 8 --user_column who --use_cpu"
    args, privacy = parser.parse_args_into_dataclasses(line.split())
    assert args.seed == 3 and privacy == PrivacyArguments(1e-5, target_epsilon=8.0, user_column="who")


class Tokenizer:
    pad_token_id = None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"data": []}, "train_dataset is empty"),
        ({"data": IterableDataset.from_generator(lambda: iter(texts()))}, "map-style"),
        ({"data": texts(4)}, "4 examples to draw from"),
        ({"privacy": sigma(1.0, user_column="who")}, "user_column='who'"),
        ({"privacy": sigma(1.0, user_column="who"), "data": Dataset.from_list([{"input_ids": [1, 2]}] * 9)}, "'who'"),
        ({"privacy": sigma(1.0, user_column="u"), "data": [e | {"u": None} for e in texts()]}, "missing"),
        (
            {
                "privacy": sigma(1.0, user_column="u"),
                "data": Dataset.from_dict({"input_ids": [[1, 2]] * 9, "u": ["a"] * 8 + [None]}),
            },
            r"user_ids\[8\] is missing",
        ),
        ({"others": {"data_collator": DataCollatorWithPadding(Tokenizer())}}, "no pad token"),
        ({"loss_fn": lambda model, batch: model(**batch).loss}, "one loss per unit"),
        ({"loss_fn": lambda model, batch: causal_lm_losses(model, batch).mean().expand(len(batch["labels"]))}, "mixes"),
    ],
    ids=["empty", "iterable", "few", "column", "table", "null", "null in table", "pad", "mean", "mixed"],
)
def test_bad_data_is_refused_before_anything_is_spent(tmp_path, options, named):
    options = dict(options)
    trainer, _ = make(tmp_path, options.pop("privacy", sigma(1.0)), **options)
    with pytest.raises(ValueError, match=named):
        trainer.train()
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


@pytest.mark.parametrize("table", [False, True])
def test_a_label_outside_the_classes_is_refused(tmp_path, table):
    data = [{"input_ids": [3, 4, 5], "label": label} for label in (0, 1, 2, 1, 3, 0, 1)]
    model = from_config("SequenceClassification", "bert", num_labels=3, **BERT)
    trainer, _ = make(tmp_path, sigma(1.0), model=model, data=Dataset.from_list(data) if table else data)
    with pytest.raises(ValueError, match=r"train_dataset\[4\] has label 3"):
        trainer.train()


def test_a_model_without_a_known_loss_needs_one(tmp_path):
    class Own(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="pass loss_fn="):
        make(tmp_path, sigma(1.0), model=Own())


def test_models_and_trainers_that_are_taken_otherwise(tmp_path):
    model = gpt2()
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="attached already"):
        make(tmp_path, sigma(1.0), model=model)
    clipper.detach()

    class Mean(DPTrainer):
        def compute_loss(self, model, inputs, **others):
            return model(**inputs).loss

    with pytest.raises(ValueError, match="compute_loss"):
        make(tmp_path, sigma(1.0), kind=Mean)
    with pytest.raises(ValueError, match="compute_loss_func"):
        make(tmp_path, sigma(1.0), others={"compute_loss_func": lambda *a, **k: None})
    data = texts()
    trainer, _ = make(tmp_path, sigma(1.0), data=data, others={"eval_dataset": {"train": data}})
    with pytest.raises(ValueError, match="held-out"):
        trainer.train()
    with pytest.raises(ValueError, match="epsilon covers one"):
        trainer.hyperparameter_search()
    with pytest.raises(ValueError, match="logs and trainer state"):
        trainer.push_to_hub()


@pytest.mark.parametrize("short", [3, 35])  # one that is looked at beforehand, and one that shows when it is drawn
def test_padding_that_depends_on_neighbours_is_refused_in_bf16(tmp_path, short):
    data = [{"input_ids": e["input_ids"][: 3 if i == short else 5]} for i, e in enumerate(texts(36))]
    others = {"data_collator": pad}
    make(tmp_path, sigma(1.0), data=data, others=others)[0].train()
    everybody = {"per_device_train_batch_size": 36, "gradient_accumulation_steps": 1}
    trainer, seen = make(tmp_path / "narrow", sigma(1.0), data=data, bf16=True, others=others, **everybody)
    with pytest.raises(ValueError, match="pad all to one length"):
        trainer.train()
    assert not seen.grads


def pad(examples):
    longest = max(len(e["input_ids"]) for e in examples)
    ids = torch.stack([nn.functional.pad(e["input_ids"], (0, longest - len(e["input_ids"]))) for e in examples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}
