"""Table-to-text: a record written in a line, the sentence that follows it, and what beam search makes of new records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fastclip.huggingface import causal_lm_losses
from fastclip.recipes import sources
from fastclip.recipes.metrics import generation_metrics
from fastclip.recipes.settings import Settings
from fastclip.recipes.task import EVALUATED_TOGETHER, Example, Task, padded

BEAMS = 5
_FIELD = re.compile(r"\s*([^,\[\]]+)\[([^\]]*)\]\s*,?")


def build(settings: Settings, tokenizer: Any) -> Task:
    """ValueError for missing or blank columns, records of another form, and a tokenizer without begin and end."""
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no begin or end token: give a causal model that has, such as GPT-2"
        )
    train = _rows(settings, settings.source.train)
    held_out = [row for split in settings.source.held_out for row in _rows(settings, split)]
    references: dict[str, list[str]] = {}
    for record, sentences in held_out:
        references.setdefault(record, []).extend(sentences)
    examples = [
        encode(tokenizer, record, sentence, settings.max_length)
        for record, sentences in train
        for sentence in sentences
    ]
    return Task(
        train=examples,
        collate=partial(padded, pad_id=tokenizer.pad_token_id),
        losses=causal_lm_losses,
        evaluate=partial(_evaluate, tokenizer=tokenizer, references=references, max_length=settings.max_length),
        held_out=len(references),
    )


def encode(tokenizer: Any, record: str, sentence: str, max_length: int) -> Example:
    """Record, separator, sentence, end; the loss counts the sentence and its end. What is too long loses the record's end,
    and a sentence that alone is longer its own."""
    after = tokenizer.encode(" " + sentence, add_special_tokens=False)[: max_length - 1]
    before = tokenizer.encode(record, add_special_tokens=False)[: max(0, max_length - 2 - len(after))]
    prompt = [*before, tokenizer.bos_token_id]
    after = [*after, tokenizer.eos_token_id][: max_length - len(prompt)]
    return {"input_ids": [*prompt, *after], "labels": [*[-100] * len(prompt), *after]}


def line_of(row: Mapping[str, Any]) -> str:
    """A record in one line: E2E's `name[The Mill], food[Italian]`, or DART's triples."""
    if "tripleset" in row:
        triples = row["tripleset"]
        if not triples or any(len(triple) != 3 for triple in triples):
            raise ValueError(f"tripleset is {triples!r}: give a list of [subject, relation, object]")
        return " | ".join(" : ".join(str(part).strip() for part in triple) for triple in triples)
    fields = _FIELD.findall(row["meaning_representation"])
    if not fields:
        raise ValueError(
            f"meaning_representation is {row['meaning_representation']!r}: give it as 'name[The Mill], food[Italian]'"
        )
    return " | ".join(f"{name.strip()} : {value.strip()}" for name, value in fields)


def _rows(settings: Settings, split: str) -> list[tuple[str, list[str]]]:
    """Each row's record and its sentences: in training the one that it came with, held out all that are known of it."""
    training = split == settings.source.train
    found = []
    for place, row in enumerate(sources.load(settings, split)):
        try:
            record = line_of(row)
        except ValueError as error:
            raise ValueError(f"row {place + 1} of {split!r}: {error}") from None
        sentences = [row["human_reference"]] if "human_reference" in row else [row["target"]]
        if not training and row.get("references"):
            sentences = list(row["references"])
        if not all(str(sentence).strip() for sentence in sentences):
            raise ValueError(f"row {place + 1} of {split!r} has a sentence without text: drop it")
        found.append((record, sentences))
    return found


@torch.no_grad()
def generate(model: Any, tokenizer: Any, records: Sequence[str], max_length: int) -> list[str]:
    """A sentence for each record by beam search, without sampling."""
    device = next(model.parameters()).device
    prompts = [
        [*tokenizer.encode(record, add_special_tokens=False)[: max_length // 2], tokenizer.bos_token_id]
        for record in records
    ]
    # Prompts of one length go together: nothing is padded, so that neighbours cannot matter.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    sentences = [""] * len(prompts)
    while order:
        length = len(prompts[order[0]])
        together = [i for i in order[:EVALUATED_TOGETHER] if len(prompts[i]) == length]
        order = order[len(together) :]
        ids = torch.tensor([prompts[i] for i in together], device=device)
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_length - length,
            num_beams=BEAMS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for i, tokens in zip(together, made[:, length:], strict=True):
            sentences[i] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return sentences


def _evaluate(
    model: nn.Module, tokenizer: Any, references: Mapping[str, Sequence[str]], max_length: int
) -> dict[str, float]:
    sentences = generate(model, tokenizer, list(references), max_length)
    return generation_metrics(sentences, list(references.values()))
