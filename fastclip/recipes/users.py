"""User-level fine-tuning of a causal model: the same text and the same compute, by examples (ELS) and by users (ULS)."""

from __future__ import annotations

import random
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastclip.finetune import data
from fastclip.finetune.data import Rows
from fastclip.finetune.mail import read_mail
from fastclip.finetune.task import DATA, MAIL_ARCHIVE
from fastclip.huggingface import causal_lm_losses
from fastclip.recipes import sources
from fastclip.recipes.settings import Settings
from fastclip.recipes.task import Example, Task, batches, on_device_of, padded

USER = "fastclip_user"
SAMPLINGS = ("els", "uls")
HELD_OUT_SHARE = 10


def build(settings: Settings, tokenizer: Any) -> Task:
    """Held out is one user in ten, chosen by a hash of the name. ValueError for missing columns, users and texts."""
    train, held_out = data.split(rows := _rows(settings), max(1, len(set(rows.users or [])) // HELD_OUT_SHARE))
    held_out = data.at_most(held_out, settings.examples_per_user or len(held_out.texts))
    collate = partial(padded, pad_id=tokenizer.pad_token_id)
    measured = _examples(held_out, tokenizer, settings.max_length)
    return Task(
        train=_examples(train, tokenizer, settings.max_length),
        collate=collate,
        losses=causal_lm_losses,
        evaluate=partial(_evaluate, examples=measured, collate=collate),
        held_out=len(measured),
    )


def at_most_of_each(examples: list[Example], count: int, seed: int | None) -> list[Example]:
    """At most `count` examples of each user, chosen at random: what stays of a user depends on nobody else."""
    generator = random.SystemRandom() if seed is None else random.Random(seed)
    owned: dict[Any, list[Example]] = defaultdict(list)
    for example in examples:
        owned[example[USER]].append(example)
    return [each for own in owned.values() for each in generator.sample(own, min(count, len(own)))]


def _rows(settings: Settings) -> Rows:
    if settings.preset == "users-mail" and settings.data is None:
        path = DATA / MAIL_ARCHIVE
        if not path.is_file():
            raise ValueError(
                f"data {path} does not exist: run `make finetune-mail` in the repository, which fetches it, or give --data "
                "FOLDER with train.jsonl, columns text and user"
            )
        texts, users = read_mail(Path(path))
        return Rows(texts, None, users)
    found = sources.load(settings, settings.source.train)
    assert settings.user_column is not None
    text = settings.text_column
    sources.check_texts(found, [text], settings.source.train)
    sources.check_texts(found, [settings.user_column], settings.source.train)
    return Rows([str(row[text]) for row in found], None, [str(row[settings.user_column]) for row in found])


def _examples(rows: Rows, tokenizer: Any, max_length: int) -> list[Example]:
    encoded = data.encode(rows, tokenizer, max_length)
    return [
        {"input_ids": ids, "labels": ids, USER: user}
        for ids, user in zip(encoded.tokens, encoded.users or [], strict=True)
    ]


@torch.no_grad()
def _evaluate(model: nn.Module, examples: list[Example], collate: Any) -> dict[str, float]:
    """Nats per predicted token over all held-out users, each with at most as many examples as in training."""
    total, count = 0.0, 0
    for part in batches(examples):
        batch = on_device_of(model, collate([{k: v for k, v in e.items() if k != USER} for e in part]))
        total += float(causal_lm_losses(model, batch, reduction="sum").sum())
        count += sum(len(example["input_ids"]) - 1 for example in part)
    return {"loss (nats per token)": total / max(count, 1)}
