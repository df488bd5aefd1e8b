"""A recipe end to end in seconds: a tiny random model of the recipe's architecture, and made-up rows of its data's columns.

Nothing is fetched. What comes out shows that everything works together, and nothing about the recipe's quality.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from fastclip.recipes.settings import Settings

ROWS, HELD_OUT_ROWS, USERS = 48, 8, 20
_WORDS = ("food", "film", "river", "song", "answer", "question", "garden", "winter")
_END, _MASK, _PAD = "<|endoftext|>", "<mask>", "<pad>"


def shrink(settings: Settings, folder: Path) -> Settings:
    """The same recipe on a tiny model and rows, both written into `folder`, which is made."""
    data, model = folder / "data", folder / "model"
    data.mkdir(parents=True, exist_ok=True)
    splits = {settings.source.train: ROWS} | dict.fromkeys(settings.source.held_out, HELD_OUT_ROWS)
    written = []
    for split, count in splits.items():
        rows = list(_rows(settings, count))
        written += [json.dumps(row) for row in rows]
        (data / f"{split.partition('[')[0]}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = () if settings.template is None else settings.template.words
    _save_model(settings, [*written, *(f"{word} {word}" for word in words for _ in range(20))], model)
    return replace(
        settings,
        model=str(model),
        data=str(data),
        steps=3,
        batch_size=12,
        physical_batch=6,
        max_length=40,
        examples_per_user=None if settings.examples_per_user is None else 2,
    )


def _rows(settings: Settings, count: int) -> Iterator[dict[str, Any]]:
    """Rows of the hub's columns; a word in each text depends on the label."""
    for i in range(count):
        first, second = _WORDS[i % len(_WORDS)], _WORDS[(3 * i + 1) % len(_WORDS)]
        if settings.template is not None:
            label = i % len(settings.template.words)
            texts = {name: f"The {first} was {second}{' indeed' * label}." for name in settings.template.columns()}
            yield {**texts, "label": label}
        elif "meaning_representation" in settings.source.columns:
            yield {
                "meaning_representation": f"name[The {first}], food[{second}]",
                "human_reference": f"The {first} has {second}.",
            }
        elif "tripleset" in settings.source.columns:
            sentence = f"The {first} has {second}."
            yield {
                "tripleset": [[first, "HAS", second], [second, "IS", "good"]],
                "target": sentence,
                "references": [sentence, f"There is {second} at the {first}."],
            }
        else:
            assert settings.user_column is not None
            yield {settings.text_column: f"My {first} and my {second}.", settings.user_column: f"user{i % USERS}"}


def _save_model(settings: Settings, texts: list[str], folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_known = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=[_END, _MASK, _PAD], initial_alphabet=bytes_known, show_progress=False
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        mask_token=_MASK,
        **dict.fromkeys(("bos_token", "eos_token", "cls_token", "sep_token", "unk_token"), _END),
    )
    wrapped.save_pretrained(folder)
    ids = {
        "pad_token_id": wrapped.pad_token_id,
        "bos_token_id": wrapped.bos_token_id,
        "eos_token_id": wrapped.eos_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a resumed run begins with the same weights
        _model(settings, len(wrapped), ids).save_pretrained(folder)


def _model(settings: Settings, vocabulary: int, ids: dict[str, Any]) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    if settings.kind == "infilling":
        return RobertaForMaskedLM(RobertaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes, **ids))
    if "gpt2" in settings.model:
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids))
    llama = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=True, **sizes, **ids)
    return LlamaForCausalLM(llama)
