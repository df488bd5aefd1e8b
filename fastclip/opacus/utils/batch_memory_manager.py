"""`opacus.utils.batch_memory_manager`: logical batches in parts that fit into memory, one release for each.

Whether a step is skipped belongs to the part that the loop was given last, whatever worker processes have loaded ahead. A
sum of parts never meets another logical batch: where a loop is left, or another begins, it is dropped unreleased.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import opacus.utils.batch_memory_manager as theirs
import scipy.special
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler, UniformWithReplacementSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from fastclip.opacus._mirror import delegate


def _drop(optimizer: Any) -> None:
    """Forget what was summed for a logical batch that will not be finished, and signals for steps that will not come."""
    optimizer._step_skip_queue = []
    optimizer._is_last_step_skipped = False  # else zero_grad() would keep the sum
    optimizer.zero_grad()


class _Signals:
    """An optimizer's ``_step_skip_queue`` during one loop: it answers each step for the part that the loop holds.

    A step that cannot be that part's raises RuntimeError: it would sum one example twice, or two logical batches.
    """

    def __init__(self, owner: object, optimizer: Any) -> None:
        self.owner = owner
        self.optimizer = optimizer
        self._waiting: list[bool] = []  # a flag for each part that was given out and not yet stepped on
        self._within = False  # parts of an unfinished logical batch are summed
        self._refusal = ""
        _drop(optimizer)
        optimizer._step_skip_queue = self

    @property
    def active(self) -> bool:
        return self.optimizer._step_skip_queue is self

    def end(self) -> None:
        if not self.active:
            return
        if self._within or self._refusal:
            _drop(self.optimizer)
        else:  # gradients of a part on which the caller may still step
            self.optimizer._step_skip_queue = []

    # What the optimizer does with its queue

    def append(self, do_skip: bool) -> None:
        self._waiting.append(do_skip)

    def __bool__(self) -> bool:
        return bool(self._waiting) or self._within or bool(self._refusal)

    def __len__(self) -> int:
        return len(self._waiting)

    def __getitem__(self, index: int) -> bool:
        if not self._refusal and not self._waiting:
            self._refusal = (
                "step() once more on the same part of a logical batch: its examples would be summed twice. Make one step for "
                "each batch of the loop"
            )
        if not self._refusal and len(self._waiting) > 1:
            self._refusal = (
                f"{len(self._waiting)} batches were taken from the loop since the last step(), and which of them this step is "
                "for is not known. Make one step for each batch, for empty ones too, and put nothing around the loader that "
                "reads ahead"
            )
        if self._refusal:
            raise RuntimeError(f"{self._refusal}. What was summed is dropped; begin a new loop")
        return self._waiting[index]

    def pop(self, index: int = 0) -> bool:
        self._within = self[index]
        self._waiting.clear()
        return self._within


class BatchSplittingSampler(theirs.BatchSplittingSampler):
    """Batches of ``sampler`` in parts of at most ``max_batch_size`` indices, as equal as can be; empty batches as they are.

    :func:`wrap_data_loader`'s loader tells the optimizer about a part when it gives it out. To any other loader this tells it
    when the part's indices are drawn: that is right as long as every part is stepped on, in order, and the loop not left.
    """

    def __init__(self, *, sampler: Sampler[list[int]], max_batch_size: int, optimizer: DPOptimizer) -> None:
        if not max_batch_size >= 1:
            raise ValueError(f"the largest physical batch must hold at least 1 example, got {max_batch_size!r}")
        super().__init__(sampler=sampler, max_batch_size=max_batch_size, optimizer=optimizer)
        self._listener: Callable[[bool], None] | None = None  # of the loader that is being started

    def __iter__(self) -> Iterator[list[int]]:
        return self._parts() if self._listener is None else self._heard_parts(self._listener)

    def _parts(self) -> Iterator[list[int]]:
        _drop(self.optimizer)
        yield from self._heard_parts(lambda skip: self.optimizer.signal_skip_step(do_skip=skip))

    def _heard_parts(self, tell: Callable[[bool], None]) -> Iterator[list[int]]:
        for batch in self.sampler:
            indices = batch.tolist() if hasattr(batch, "tolist") else list(batch)
            parts = max(math.ceil(len(indices) / self.max_batch_size), 1)
            size, longer = divmod(len(indices), parts)  # as Opacus cuts: the longer parts come first
            ends = [size * k + min(k, longer) for k in range(parts + 1)]
            for k in range(parts):
                tell(k < parts - 1)
                yield indices[ends[k] : ends[k + 1]]

    def __len__(self) -> int:
        """Parts an epoch; for a Poisson sampler their expected number, rounded."""
        sampler, most = self.sampler, self.max_batch_size
        if isinstance(sampler, BatchSampler):
            batches, size = len(sampler), sampler.batch_size
            last = min(batches * size, len(sampler.sampler)) - (batches - 1) * size  # type: ignore[arg-type]
            return (batches - 1) * math.ceil(size / most) + math.ceil(last / most)
        if isinstance(sampler, UniformWithReplacementSampler | DistributedUniformWithReplacementSampler):
            # ceil(B / most) is the number of k >= 0 with B > k * most; an empty batch is one part too.
            later = np.arange(most, sampler.num_samples, most)
            parts = 1 + scipy.special.bdtrc(later, sampler.num_samples, sampler.sample_rate).sum()
            return round(len(sampler) * float(parts))
        return len(sampler)


class _PartsLoader(DataLoader[Any]):
    """Tells the optimizer about each part at the moment it is given out. Batches come in the sampler's order."""

    def __iter__(self) -> Any:
        splitting: Any = self.batch_sampler
        flags: deque[bool] = deque()  # of what was drawn and not yet given out
        splitting._listener = flags.append
        try:
            # Asks the sampler for its iterator, and with worker processes draws the first batches from it.
            batches = super().__iter__()
        finally:
            splitting._listener = None
        signals = _Signals(splitting, splitting.optimizer)
        try:
            for batch in batches:
                if not signals.active:  # another loop has been over this optimizer
                    signals = _Signals(splitting, splitting.optimizer)
                splitting.optimizer.signal_skip_step(do_skip=flags.popleft())
                yield batch
        finally:
            signals.end()


def wrap_data_loader(*, data_loader: DataLoader[Any], max_batch_size: int, optimizer: DPOptimizer) -> DataLoader[Any]:
    """``data_loader`` with its batches in parts of at most ``max_batch_size`` examples, which tells ``optimizer`` of them.

    Raises ValueError for loaders without batches (``batch_size=None``) and over an IterableDataset.
    """
    if isinstance(data_loader.dataset, IterableDataset):
        raise ValueError(
            "data_loader is over an IterableDataset, whose batches cannot be drawn in parts: use a map-style one"
        )
    if data_loader.batch_sampler is None:
        raise ValueError(
            "data_loader has batch_size=None and so no batches to split: give it a batch_size or a batch_sampler"
        )
    return _PartsLoader(
        dataset=data_loader.dataset,
        batch_sampler=BatchSplittingSampler(
            sampler=data_loader.batch_sampler,  # type: ignore[arg-type]
            max_batch_size=max_batch_size,
            optimizer=optimizer,
        ),
        num_workers=data_loader.num_workers,
        collate_fn=data_loader.collate_fn,
        pin_memory=data_loader.pin_memory,
        timeout=data_loader.timeout,
        worker_init_fn=data_loader.worker_init_fn,
        multiprocessing_context=data_loader.multiprocessing_context,
        generator=data_loader.generator,
        prefetch_factor=data_loader.prefetch_factor,
        persistent_workers=data_loader.persistent_workers,
    )


class BatchMemoryManager(theirs.BatchMemoryManager):
    """``with BatchMemoryManager(...) as loader``: batches of at most ``max_physical_batch_size``, one release a logical one.

    Make one ``optimizer.step()`` for each batch of ``loader``, in order; all but the last of a logical batch only clip and
    add. A loop that is left, or interrupted by another over the same optimizer, drops what it had added up: that logical batch
    is not released. A step that is not the last batch's raises RuntimeError. Raises ValueError as :func:`wrap_data_loader`.
    """

    def __enter__(self) -> DataLoader[Any]:
        self._loader = wrap_data_loader(
            data_loader=self.data_loader, max_batch_size=self.max_physical_batch_size, optimizer=self.optimizer
        )
        return self._loader

    def __exit__(self, type: Any, value: Any, traceback: Any) -> None:
        signals: Any = self.optimizer._step_skip_queue
        # A loop that an iterator or a traceback still holds has not ended by itself.
        if isinstance(signals, _Signals) and signals.owner is self._loader.batch_sampler:
            signals.end()


__getattr__, __dir__ = delegate(__name__)
