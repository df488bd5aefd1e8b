"""The loop over draws: batches, and with each of them whose draw it is and whose examples are in it.

Guarantees and edge cases:

- What the loader says belongs to the batch that the loop holds. Worker processes fetch ahead, so that the sampler's own
  `current_draw` runs ahead as well; draws fetched ahead when a loop is left early are lost, and their ids never come again.
- With limits, a draw comes as several physical batches: one draw id, `last_of_draw` true at the last one only. An empty
  draw is one empty batch, and its last. `step()` belongs after the last; after an earlier one it would release a draw
  that is still coming, and the optimizer refuses what comes then.
- Whether each unit fits into the limits is checked when the loader is made, for the most that the unit can bring, so that
  no run ends on a draw that is too large.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fastclip.sampling.batches import PhysicalBatch, check_buckets, length_bucket, physical_batches, too_large
from fastclip.sampling.checks import check_count
from fastclip.sampling.collate import Collate, Fetching
from fastclip.sampling.poisson import PoissonSampler

_NO_LIMIT = 2**62


@dataclass(frozen=True)
class _Held:
    """What the loader says of one batch."""

    draw: int | None
    batch: PhysicalBatch
    units: int | None
    unit_ids: Tensor
    last: bool


class PoissonLoader:
    """Iterates over the collated examples of each draw, with `current_draw` following the loop.

        for batch in loader:
            with clipper.units(ids=loader.current_unit_ids):
                loss_fn(model(batch)).backward()
            if loader.last_of_draw:
                optimizer.step()
                optimizer.zero_grad()

    dataset: maps an index to an example. collate_fn: list of examples to batch; by default torch's.
    max_examples, max_tokens: limits of a physical batch; a draw is then cut as `physical_batches` does. lengths: the
    tokens of every example of the data set, for max_tokens; collate_fn, if given, is then called with the length to pad
    to as its second argument. buckets: the public lengths to pad to, in growing order; without them the lengths have to
    be such already. allow_oversized: a unit that exceeds the limits comes alone, with `oversized` true, instead of a
    ValueError.
    options: further arguments of `torch.utils.data.DataLoader`, but none about which examples come when.

    Attributes: sampler; of the batch at hand, None before the first: current_draw; current_indices (its example indices);
    current_unit_ids, int64 [B], the unit of each; current_units, how many units were drawn, in all of the draw's batches;
    previous_draw, the draw before it in the same loop; last_of_draw; padded_length, None without lengths; oversized.
    Raises ValueError for bad input.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        sampler: PoissonSampler,
        collate_fn: Callable[..., Any] | None = None,
        num_workers: int = 0,
        *,
        max_examples: int | None = None,
        max_tokens: int | None = None,
        lengths: Sequence[int] | npt.NDArray[Any] | Tensor | None = None,
        buckets: Sequence[int] | None = None,
        allow_oversized: bool = False,
        **options: Any,
    ) -> None:
        for name in ("batch_size", "shuffle", "batch_sampler", "drop_last", "in_order"):
            if name in options:
                raise ValueError(f"{name}={options[name]!r}: the sampler alone decides on batches; leave {name} out")
        size = len(dataset)  # type: ignore[arg-type]
        if size < sampler.num_examples:
            raise ValueError(
                f"dataset has {size} examples, the sampler draws from {sampler.num_examples}; make them match"
            )
        self._cut = _Cut(sampler, max_examples, max_tokens, lengths, buckets, allow_oversized)
        padded = lengths is not None and collate_fn is not None
        self._dataset = Fetching(dataset)
        self.sampler = sampler
        self._collate = Collate(collate_fn or default_collate, dataset[0], self._cut.first_size, padded)
        self._options = {"num_workers": num_workers, **options}
        self._held: _Held | None = None
        self.previous_draw: int | None = None

    @property
    def steps(self) -> int:
        return self.sampler.steps

    @property
    def sample_rate(self) -> float:
        return self.sampler.sample_rate

    @property
    def expected_batch_size(self) -> float:
        return self.sampler.expected_batch_size

    @property
    def seeded(self) -> bool:
        return self.sampler.seeded

    def __getstate__(self) -> dict[str, Any]:
        # The batch at hand is private, and its draw the original's to release.
        return {**self.__dict__, "_held": None, "previous_draw": None}

    @property
    def current_draw(self) -> int | None:
        return None if self._held is None else self._held.draw

    @property
    def current_indices(self) -> list[int] | None:
        return None if self._held is None else list(self._held.batch)

    @property
    def current_unit_ids(self) -> Tensor | None:
        return None if self._held is None else self._held.unit_ids

    @property
    def current_units(self) -> int | None:
        return None if self._held is None else self._held.units

    @property
    def last_of_draw(self) -> bool | None:
        return None if self._held is None else self._held.last

    @property
    def padded_length(self) -> int | None:
        return None if self._held is None else self._held.batch.padded_length

    @property
    def oversized(self) -> bool | None:
        return None if self._held is None else self._held.batch.oversized

    def __len__(self) -> int:
        """The number of draws, which is the number of steps; with limits there may be more batches."""
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        ahead: deque[_Held] = deque()
        batches: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=_Noted(self.sampler, self._cut, ahead),
            collate_fn=self._collate,
            **self._options,
        )
        # Batches come back in the order in which their indices went out.
        previous, before = None, None
        for batch in batches:
            held = ahead.popleft()
            if held.draw != previous:
                before, previous = previous, held.draw
            self._held, self.previous_draw = held, before
            yield batch


class _Noted(Sampler[list[int]]):
    """The sampler's draws, cut, and each batch noted down as it is made."""

    def __init__(self, sampler: PoissonSampler, cut: "_Cut", ahead: deque[_Held]) -> None:
        self._sampler, self._cut, self._ahead = sampler, cut, ahead

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[int]]:
        sampler = self._sampler
        for indices in sampler:
            ids = sampler.current_unit_ids
            assert ids is not None
            draw, units, owner = (
                sampler.current_draw,
                sampler.current_units,
                dict(zip(indices, ids.tolist(), strict=True)),
            )
            batches = self._cut(indices, ids)
            for batch in batches:
                own = torch.tensor([owner[index] for index in batch], dtype=torch.int64)
                self._ahead.append(_Held(draw, batch, units, own, last=batch is batches[-1]))
                yield batch


class _Cut:
    """How draws become physical batches, with every unit's worst case checked beforehand."""

    def __init__(
        self,
        sampler: PoissonSampler,
        max_examples: int | None,
        max_tokens: int | None,
        lengths: Sequence[int] | npt.NDArray[Any] | Tensor | None,
        buckets: Sequence[int] | None,
        allow_oversized: bool,
    ) -> None:
        for name, limit in (("max_examples", max_examples), ("max_tokens", max_tokens)):
            if limit is not None:
                check_count(name, limit)
        if max_tokens is not None and lengths is None:
            raise ValueError(f"max_tokens={max_tokens!r} needs lengths, the tokens of every example; give both")
        if buckets is not None:
            check_buckets(buckets)
            if lengths is None:
                raise ValueError(f"buckets={list(buckets)!r} needs lengths, the tokens of every example; give both")
        self._limits = {"max_examples": max_examples, "max_tokens": max_tokens}
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._buckets = None if buckets is None else np.asarray(buckets)
        self._allow_oversized = allow_oversized
        if self._lengths is not None:
            self._check_lengths(self._lengths, sampler.num_examples)
        if not allow_oversized and (max_examples or max_tokens):
            self._check_units(sampler)
        self.first_size = None if self._lengths is None else int(self._sizes(np.zeros(1, dtype=np.int64))[0])

    def __call__(self, indices: list[int], units: Tensor) -> list[PhysicalBatch]:
        if not indices:
            return [PhysicalBatch((), self.first_size)]
        if self._lengths is None and self._limits["max_examples"] is None:
            return [PhysicalBatch(indices)]
        sizes = None if self._lengths is None else self._sizes(np.array(indices)).tolist()
        return physical_batches(indices, sizes, units=units, allow_oversized=self._allow_oversized, **self._limits)

    def _sizes(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        assert self._lengths is not None
        own = self._lengths[indices]
        return own if self._buckets is None else self._buckets[np.searchsorted(self._buckets, own)]

    def _check_lengths(self, lengths: npt.NDArray[Any], num_examples: int) -> None:
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or len(lengths) < num_examples:
            raise ValueError(
                f"lengths must be whole numbers, one for each of {num_examples} examples, got {lengths.dtype} "
                f"{list(lengths.shape)}"
            )
        if self._buckets is None:
            check_count("lengths", int(lengths.min()))
        else:
            for end in (lengths.min(), lengths.max()):
                length_bucket(int(end), self._buckets.tolist())

    def _check_units(self, sampler: PoissonSampler) -> None:
        max_examples, max_tokens = self._limits["max_examples"], self._limits["max_tokens"]
        for indices, owned, given in sampler.examples_by_unit():
            widths = np.ones_like(indices) if self._lengths is None else self._sizes(indices)
            # Each unit at its longest example's bucket, with as many examples as a draw can give.
            width = np.maximum.reduceat(widths, np.cumsum(owned) - owned)
            room = np.minimum(max_examples or _NO_LIMIT, (max_tokens or _NO_LIMIT) // width)
            if (given > room).any():
                at = int(np.argmax(given > room))
                raise ValueError(too_large(int(given[at]), int(width[at]), max_examples, max_tokens))
