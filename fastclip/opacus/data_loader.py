"""`opacus.data_loader`: Poisson batches of any data set and collate function, empty ones shaped like all others."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import opacus.data_loader as theirs
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from fastclip.opacus._mirror import delegate
from fastclip.opacus.utils.uniform_sampler import (
    DistributedUniformWithReplacementSampler,
    UniformWithReplacementSampler,
)

logger = logging.getLogger(theirs.__name__)

Collate = Callable[[list[Any]], Any]


class _Unknown:
    """Stands for a part of a batch of which no empty one can be made."""

    def __init__(self, part: Any) -> None:
        self.name = f"{type(part).__name__} without dimensions" if isinstance(part, Tensor) else type(part).__name__


class CollateFnWithEmpty(theirs.CollateFnWithEmpty):
    """``collator_fn``, and for ``[]`` a batch like the others with no examples in it.

    What it is like is learnt from the first batch with examples, or from the data set's first example where a DPDataLoader's
    first batch is empty. Tensors, mappings (of the same class), lists, tuples and named tuples are followed; a list of plain
    values, one for each example, becomes empty; None stays. Only the shapes are kept, not the batch.

    ``rand_on_empty=True`` makes up one example instead, for models that cannot take none. It is clipped and added like any
    other, which the privacy accountants do not count: see the warning.

    Raises TypeError for ``[]`` where a batch holds anything else.
    """

    def __init__(
        self,
        collator_fn: Collate | None,
        batch_first: bool = True,
        rand_on_empty: bool = False,
        sample_empty_shapes: Sequence[tuple[int, ...]] | None = None,
        dtypes: Sequence[torch.dtype | type] | None = None,
    ) -> None:
        super().__init__(collator_fn, batch_first, rand_on_empty, sample_empty_shapes, dtypes)
        self.dataset: Any = None  # a DPDataLoader's
        self.first_batch: Any = None  # without its examples
        if rand_on_empty:
            warnings.warn(
                "rand_on_empty=True: where a batch is empty, the clipped gradient of a made-up example is released. Data "
                "sets that differ in one example then differ by up to 2 * max_grad_norm in such a step, twice what the "
                "reported epsilon is for. Let the model take batches of length 0 instead",
                stacklevel=2,
            )

    def __call__(self, batch: list[Any]) -> Any:
        if not self.wrapped_collator_fn and (len(batch) or self.dataset is not None):
            return batch
        if len(batch):
            output = self.wrapped_collator_fn(batch)
            if self.first_batch is None:
                self.first_batch = self._emptied(output, len(batch))
            return output
        if self.first_batch is None:
            if self.dataset is None:
                return super().__call__(batch)  # from sample_empty_shapes, if given
            logger.warning(
                "First batch is empty. It is shaped like a batch of the data set's first example alone; with more data, or "
                "larger batches, fewer would be empty."
            )
            self.first_batch = self._emptied(self.wrapped_collator_fn([self.dataset[0]]), 1)
        return self._make_empty_batch(self.first_batch)

    def _emptied(self, part: Any, examples: int) -> Any:
        """``part`` of a batch of ``examples``, without examples; :class:`_Unknown` in the place of what has no such thing."""
        if isinstance(part, Tensor) and part.dim():
            return part.detach().narrow(self._axis(part), 0, 0).clone()
        if part is None:
            return None
        if isinstance(part, list | tuple) and not hasattr(part, "_fields") and _one_for_each(part, examples):
            return type(part)()
        if isinstance(part, Mapping | list | tuple):
            return _followed(part, lambda inner: self._emptied(inner, examples))
        return _Unknown(part)

    def _axis(self, part: Tensor) -> int:
        # Labels [B] stand beside inputs [K, B, ...].
        return 0 if self.batch_first or part.dim() == 1 else 1

    def _make_empty_batch(self, sample: Any) -> Any:
        if isinstance(sample, _Unknown):
            raise TypeError(
                f"Unsupported batch type: {sample.name}. An empty batch can be made of tensors, mappings, lists and tuples: "
                "let collate_fn return these alone"
            )
        if isinstance(sample, Mapping | list | tuple):
            return _followed(sample, self._make_empty_batch)
        if not isinstance(sample, Tensor) or not self.rand_on_empty:
            return copy.copy(sample)
        shape = list(sample.shape)
        shape[self._axis(sample)] = 1
        return torch.randint(0, 2, shape, dtype=sample.dtype, device=sample.device)


def _one_for_each(part: Sequence[Any], examples: int) -> bool:
    return len(part) == examples and all(isinstance(one, str | bytes | int | float | complex) for one in part)


def _followed(part: Any, each: Callable[[Any], Any]) -> Any:
    """A mapping, list or tuple of the same class with ``each`` of its values."""
    if isinstance(part, MutableMapping):
        made = copy.copy(part)  # with whatever else the class holds
        made.update({key: each(value) for key, value in part.items()})
        return made
    if isinstance(part, Mapping):
        return {key: each(value) for key, value in part.items()}
    if hasattr(part, "_fields"):
        return type(part)(*map(each, part))
    return type(part)(map(each, part))


def wrap_collate_with_empty(
    *,
    collate_fn: Collate | None,
    batch_first: bool = True,
    rand_on_empty: bool = False,
    sample_empty_shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[torch.dtype | type] | None = None,
) -> CollateFnWithEmpty:
    """:class:`CollateFnWithEmpty` of ``collate_fn``."""
    return CollateFnWithEmpty(collate_fn, batch_first, rand_on_empty, sample_empty_shapes, dtypes)


class DPDataLoader(theirs.DPDataLoader):
    """A DataLoader whose batches are Poisson draws: each example is in with probability ``sample_rate``; empty ones come too.

    dataset: map-style, of at least 1 example. sample_rate: in (0, 1]; an epoch has 1 / sample_rate steps, for ``1 / n`` exactly
    n. generator: draws the batches, by default torch's own, which torch.manual_seed makes known. distributed: each rank's part
    (DistributedUniformWithReplacementSampler). batch_first=False: examples are on the tensors' axis 1. rand_on_empty: see
    :class:`CollateFnWithEmpty`. Other arguments as DataLoader's; drop_last has no effect.

    Raises ValueError for an IterableDataset, an empty data set or a rate outside (0, 1].
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        sample_rate: float,
        collate_fn: Collate | None = None,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        distributed: bool = False,
        batch_first: bool = True,
        rand_on_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise ValueError("Uniform sampling is not supported for IterableDataset: use a map-style dataset")
        size = len(dataset)  # type: ignore[arg-type]
        sampler = (
            DistributedUniformWithReplacementSampler(total_size=size, sample_rate=sample_rate, generator=generator)
            if distributed
            else UniformWithReplacementSampler(num_samples=size, sample_rate=sample_rate, generator=generator)
        )
        if drop_last:
            logger.warning("Ignoring drop_last as it is not compatible with DPDataLoader.")
        while isinstance(collate_fn, theirs.CollateFnWithEmpty):  # of a DPDataLoader
            collate_fn = collate_fn.wrapped_collator_fn
        collate = wrap_collate_with_empty(
            collate_fn=default_collate if collate_fn is None else collate_fn,
            batch_first=batch_first,
            rand_on_empty=rand_on_empty,
        )
        collate.dataset = dataset
        self.sample_rate = sample_rate
        self.distributed = distributed
        # Past Opacus' class, which would make its own sampler.
        DataLoader.__init__(self, dataset, batch_sampler=sampler, collate_fn=collate, generator=generator, **kwargs)

    @classmethod
    def from_data_loader(
        cls,
        data_loader: DataLoader[Any],
        *,
        distributed: bool = False,
        generator: torch.Generator | None = None,
        batch_first: bool = True,
        rand_on_empty: bool = False,
    ) -> DPDataLoader:
        """The same loader, of as many steps an epoch, with Poisson draws in the place of its batches.

        generator: by default ``data_loader``'s. Raises ValueError for loaders over an IterableDataset, with
        ``batch_size=None``, or without a single batch.
        """
        if isinstance(data_loader.dataset, IterableDataset):
            raise ValueError("Uniform sampling is not supported for IterableDataset: use a map-style dataset")
        if data_loader.batch_sampler is None:
            raise ValueError("data_loader has batch_size=None: the size of its batches is needed for the sampling rate")
        if len(data_loader) == 0:
            raise ValueError("data_loader has no batch: its data set is empty, or drop_last drops all of it")
        own = getattr(data_loader.batch_sampler, "sampler", None)
        if isinstance(own, SubsetRandomSampler | WeightedRandomSampler):
            warnings.warn(
                f"{type(own).__name__} has no effect: Poisson sampling draws each example of the data set with the same "
                "probability. To train on a part of it, pass torch.utils.data.Subset",
                stacklevel=2,
            )
        return super().from_data_loader(
            data_loader,
            distributed=distributed,
            generator=generator,
            batch_first=batch_first,
            rand_on_empty=rand_on_empty,
        )


def switch_generator(*, data_loader: DataLoader[Any], generator: torch.Generator | None) -> DataLoader[Any]:
    """A DataLoader like this one that draws from ``generator``, which its sampler is given too.

    Raises ValueError for loaders without batches, and for samplers that draw from nothing.
    """
    batches: Any = data_loader.batch_sampler
    if batches is None:
        raise ValueError(
            "Non-batch processing is not supported: one of the input dimensions must be the batch's. Give the "
            "loader a batch_size"
        )
    draws = batches.sampler if isinstance(batches, BatchSampler) else batches
    if not hasattr(draws, "generator"):
        raise ValueError(
            f"{type(draws).__name__} doesn't have generator attribute: nothing to switch. Load with shuffle=True, or "
            "with Poisson sampling"
        )
    draws.generator = generator
    return DataLoader(
        data_loader.dataset,
        batch_sampler=batches,  # drop_last is its own
        num_workers=data_loader.num_workers,
        collate_fn=data_loader.collate_fn,
        pin_memory=data_loader.pin_memory,
        timeout=data_loader.timeout,
        worker_init_fn=data_loader.worker_init_fn,
        multiprocessing_context=data_loader.multiprocessing_context,
        generator=generator,
        prefetch_factor=data_loader.prefetch_factor,
        persistent_workers=data_loader.persistent_workers,
    )


__getattr__, __dir__ = delegate(__name__)
