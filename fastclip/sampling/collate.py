"""From requested examples to a batch, also from none.

A worker process gets a request: indices, and the length to pad to where there are buckets. It hands back the collated
batch. An empty request gives a batch like that of one example with every tensor cut to length 0 in its first dimension,
so that types and trailing shapes are right; one example is collated once to learn them. Tensors without dimensions stay;
lists and tuples of tensors are taken for fields, other ones for the batch and come empty.
"""

import copy
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from fastclip.sampling.batches import PhysicalBatch


class Fetching(Dataset[Any]):
    """The data set, asked for a whole physical batch at a time, which keeps the padded length with the examples."""

    def __init__(self, dataset: Dataset[Any] | Sequence[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, batch: PhysicalBatch) -> tuple[list[Any], int | None]:
        if batch and hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(list(batch)), batch.padded_length
        return [self.dataset[index] for index in batch], batch.padded_length


class Collate:
    """A collate function that also takes no examples.

    collate: examples to batch; with `padded`, (examples, padded length) to batch. example: any one, and the length it is
    padded to.
    """

    def __init__(self, collate: Callable[..., Any], example: Any, padded_length: int | None, padded: bool) -> None:
        self._collate = collate
        self._padded = padded
        self._empty = emptied(self._run([example], padded_length))

    def __call__(self, request: Any) -> Any:
        # The empty batch is built anew each time, because loops take fields out of what they get.
        return self._run(*request) if request[0] else emptied(self._empty)

    def _run(self, examples: list[Any], padded_length: int | None) -> Any:
        return self._collate(examples, padded_length) if self._padded else self._collate(examples)


def emptied(batch: Any) -> Any:
    """The same form with nothing in it."""
    if isinstance(batch, torch.Tensor):
        return batch[:0] if batch.dim() else batch
    if isinstance(batch, MutableMapping):
        empty = copy.copy(batch)
        for name in batch:
            empty[name] = emptied(batch[name])
        return empty
    if isinstance(batch, list | tuple):
        if not all(isinstance(field, torch.Tensor | MutableMapping | list | tuple) for field in batch):
            return type(batch)()
        fields = [emptied(field) for field in batch]
        return type(batch)(*fields) if hasattr(batch, "_fields") else type(batch)(fields)
    return batch
