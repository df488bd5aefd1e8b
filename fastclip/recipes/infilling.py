"""Text infilling: examples through a template, the loss of the label's word at the mask, and accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.huggingface import infilling_losses
from fastclip.recipes import prompts, sources
from fastclip.recipes.settings import Settings
from fastclip.recipes.task import Example, Task, batches, on_device_of, padded


def build(settings: Settings, tokenizer: Any) -> Task:
    """ValueError for missing or blank columns, labels outside the set, and a tokenizer without mask or words."""
    template = settings.template
    assert template is not None
    if tokenizer.mask_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no mask token: give a masked language model, such as RoBERTa")
    words = prompts.word_ids(template, tokenizer)

    def examples(split: str) -> list[Example]:
        rows = sources.load(settings, split)
        sources.check_texts(rows, template.columns(), split)
        labels = sources.labels(rows, len(words), split)
        return [
            {"input_ids": prompts.fill(template, row, tokenizer, settings.max_length), "labels": label}
            for row, label in zip(rows, labels, strict=True)
        ]

    held_out = {name: examples(split) for split, name in settings.source.held_out.items()}
    collate = partial(padded, pad_id=tokenizer.pad_token_id)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {
            f"accuracy {name}".strip(): 100 * accuracy(model, part, collate, tokenizer.mask_token_id, words)
            for name, part in held_out.items()
        }

    return Task(
        train=examples(settings.source.train),
        collate=collate,
        losses=partial(infilling_losses, mask_token_id=tokenizer.mask_token_id, label_words=words),
        evaluate=evaluate,
        held_out=sum(map(len, held_out.values())),
    )


@torch.no_grad()
def accuracy(model: nn.Module, examples: Sequence[Example], collate: Any, mask_id: int, words: Sequence[int]) -> float:
    """The share of examples whose own label's word is the likeliest of the words at the mask."""
    right = 0
    for part in batches(examples):
        batch: Mapping[str, Tensor] = on_device_of(model, collate(part))
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits  # [B, T, V]
        at_mask = (batch["input_ids"] == mask_id).int().argmax(1)  # [B]
        chosen = logits[torch.arange(len(labels), device=logits.device), at_mask][:, list(words)]  # [B, K]
        right += int((chosen.argmax(1) == labels).sum())
    return right / len(examples)
