"""What a recipe is once model and data are there: examples to train on, a loss, and a measure of held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.huggingface import LossFn

Example = dict[str, Any]
EVALUATED_TOGETHER = 16


@dataclass(frozen=True)
class Task:
    """train: one dict an example, with token ids as lists and, where users are the unit, whose it is. collate: examples to
    a batch. losses: (model, batch) -> [B]. evaluate: a model to its results by name. held_out: examples of that."""

    train: list[Example]
    collate: Callable[[Sequence[Example]], dict[str, Tensor]]
    losses: LossFn
    evaluate: Callable[[nn.Module], dict[str, float]]
    held_out: int


def padded(examples: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask int64 [B, T], right-padded to the longest; labels as [B], or [B, T] padded by -100.

    The recipes train in float32, where padding to a longer neighbour changes an example's gradient by rounding alone.
    """
    length = max(len(example["input_ids"]) for example in examples)
    batch = {
        "input_ids": _rectangle([example["input_ids"] for example in examples], length, pad_id),
        "attention_mask": _rectangle([[1] * len(example["input_ids"]) for example in examples], length, 0),
    }
    labels = [example["labels"] for example in examples]
    batch["labels"] = torch.tensor(labels) if isinstance(labels[0], int) else _rectangle(labels, length, -100)
    return batch


def _rectangle(rows: Sequence[Sequence[int]], length: int, filler: int) -> Tensor:
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])


def batches(examples: Sequence[Example], size: int = EVALUATED_TOGETHER) -> list[list[Example]]:
    """For evaluation: by length, so that little is padded."""
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def on_device_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}
