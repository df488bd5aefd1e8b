"""Draws for a Trainer: whose examples there are, the sampler of their units, and a loader with one item a draw.

Guarantees:

- One item is one draw, also an empty one, and holds its physical batches of at most per_device_train_batch_size examples.
  They are taken from the loader while the item is looped over, so that `loader.current_draw` is the draw at hand.
- The loop over the loader goes on from epoch to epoch; Trainer's epochs are stretches of it and decide nothing.
- A user's examples are never split over two batches. One with more than fit comes alone, marked oversized.
- The number of units decides the sampling rate and is therefore public; who owns what is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastclip.huggingface.arguments import PrivacyArguments
from fastclip.sampling import (
    ExamplePoissonSampler,
    PoissonLoader,
    PoissonSampler,
    UserIndex,
    UserPoissonSampler,
)

_CHUNK = 2**16


class Owners:
    """Whose the examples of a training set are: how many units there are, and a sampler of them.

    ValueError for a missing or null user column.
    """

    def __init__(self, dataset: Any, privacy: PrivacyArguments) -> None:
        self._privacy = privacy
        self._size = len(dataset)
        self._index = None if privacy.user_column is None else _users(dataset, privacy.user_column)

    @property
    def num_examples(self) -> int:
        return self._size

    @property
    def num_protected(self) -> int:
        """How many examples, or users, are protected."""
        return self._size if self._index is None else self._index.num_users

    @property
    def num_drawn_from(self) -> int:
        """How many units a draw is of: the protected ones, or with examples_per_user the examples that are kept."""
        if self._index is None or self._privacy.examples_per_user is None:
            return self.num_protected
        return int(np.minimum(np.diff(self._index.offsets), self._privacy.examples_per_user).sum())

    def sampler(self, steps: int, batch_size: int) -> PoissonSampler:
        """`steps` draws of `batch_size` units expected. ValueError if there are fewer units."""
        if batch_size > self.num_drawn_from:
            what = "users" if self._index is not None and self._privacy.examples_per_user is None else "examples"
            raise ValueError(
                f"per_device_train_batch_size * gradient_accumulation_steps is {batch_size}, and there are "
                f"{self.num_drawn_from} {what} to draw from: lower one of them"
            )
        common: dict[str, Any] = {"steps": steps, "expected_batch_size": batch_size}
        common |= {"max_batch": self._privacy.max_batch, "seed": self._privacy.privacy_seed}
        if self._index is None:
            return PoissonSampler(self._size, **common)
        if self._privacy.examples_per_user is None:
            return UserPoissonSampler(self._index, **common)
        return ExamplePoissonSampler(self._index, examples_per_user=self._privacy.examples_per_user, **common)


def _users(dataset: Any, column: str) -> UserIndex:
    if hasattr(dataset, "column_names"):
        return UserIndex.build(dataset, column=column)
    ids = []
    for place in range(len(dataset)):
        example = dataset[place]
        if not isinstance(example, Mapping) or column not in example:
            raise ValueError(
                f"user_column={column!r} is not in train_dataset[{place}]: name the column that says whose each example is"
            )
        ids.append(example[column])
    return UserIndex.build(ids)


def without_column(dataset: Any, collate: Callable[..., Any], column: str | None) -> tuple[Any, Callable[..., Any]]:
    """Data set and collate function without the column of users, which no model takes."""
    if column is None:
        return dataset, collate
    if hasattr(dataset, "column_names"):
        return (dataset.remove_columns([column]) if column in dataset.column_names else dataset), collate

    def collate_rest(examples: Sequence[Mapping[str, Any]]) -> Any:
        return collate([{name: value for name, value in e.items() if name != column} for e in examples])

    return dataset, collate_rest


class Draw:
    """One draw: (batch, the unit of each example int64 [B], whether it is one unit beyond the limit), batch by batch.

    A draw is looped over once and to its end: the optimizer refuses what ends before `last_of_draw`.
    """

    def __init__(self, batches: Iterator[Any], loader: PoissonLoader) -> None:
        self._batches, self._loader = batches, loader

    def __iter__(self) -> Iterator[tuple[Any, Tensor, bool]]:
        last = False
        while not last:
            batch = next(self._batches)
            ids = self._loader.current_unit_ids
            assert ids is not None
            last = bool(self._loader.last_of_draw)
            yield batch, ids, bool(self._loader.oversized)


class DrawLoader:
    """What Trainer loops over: `draws_per_epoch` draws at a time, all out of one loop over the loader."""

    def __init__(self, loader: PoissonLoader, dataset: Any, draws_per_epoch: int) -> None:
        self.loader, self.dataset = loader, dataset
        self._length = draws_per_epoch
        self._batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Draw]:
        if self._batches is None:
            self._batches = iter(self.loader)
        for _ in range(self._length):
            yield Draw(self._batches, self.loader)


def parts_of(batch: Mapping[str, Any], size: int, room: int) -> Iterator[tuple[dict[str, Any], int]]:
    """A batch of `size` examples in parts of at most `room`, each with its number of examples."""
    for start in range(0, size, room):
        rows = slice(start, min(start + room, size))
        part = {
            name: value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
            for name, value in batch.items()
        }
        yield part, rows.stop - rows.start


def column_of(dataset: Any, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """(place of the first, values) of the first of these columns that there is, piece by piece; nothing if there is none.

    Read from tables and lists; other data sets may compute each example, and are left alone.
    """
    if hasattr(dataset, "column_names") and hasattr(dataset, "select_columns"):
        for name in names:
            if name in dataset.column_names:
                column = dataset.select_columns([name]).with_format(None)
                for start in range(0, len(dataset), _CHUNK):
                    yield start, column[start : start + _CHUNK][name]
                return
    elif isinstance(dataset, list | tuple) and dataset and isinstance(dataset[0], Mapping):
        found = next((name for name in names if name in dataset[0]), None)
        if found is not None:
            yield 0, [example.get(found) for example in dataset]
