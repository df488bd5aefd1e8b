"""Poisson draws of units, where every unit is one example.

Guarantees and edge cases:

- Every unit is in a draw with probability q, independently; `words` says how exactly, and `secret` whose words decide.
- With `max_batch` a larger draw is cut to that many units, every set of them equally likely: which are kept depends on
  nothing, least of all on their lengths. That is another mechanism, with another event.
- `event` says what one step with such a draw costs, so that sampler and accountant cannot disagree.
- Empty draws are draws. Each still has to be released, as noise alone.
- Draw ids start at 0, grow by one over the sampler's life whatever iterator they went to, and never come twice.
- A sampler hands out `steps` draws in its life, because that many are what an accountant was told of: a second loop goes
  on where the first was left, and one that finds none left is refused.
- `expected_batch_size` is q times the number of units: public, and never the size of an actual draw. Whichever of the
  two is given, the other one tells the number of units, so that this number is public and the adjacency is zero-out.
- In a distributed run every process draws the same units, and takes every world_size-th of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from fastclip.sampling.checks import check_count, check_within
from fastclip.sampling.secret import Purpose, Secret
from fastclip.sampling.words import Int64s, Words

if TYPE_CHECKING:
    from fastclip.accounting.accountants import StepEvent

_CHUNK = 2**20
# They belong to the draw and are private like it, so that no copy has them.
_OF_THE_DRAW = ("current_draw", "current_units", "current_unit_ids", "previous_draw")


def safe_max_batch(expected_batch_size: float) -> int:
    """The smallest public `max_batch` that costs nothing: 6.5 standard deviations of the draw's size above its mean.

    A larger draw comes less than once in 10^9, which the event of a cut draw still counts. Raises ValueError unless
    expected_batch_size is positive and finite.
    """
    check_within("expected_batch_size", expected_batch_size, float(2**62))
    return math.ceil(expected_batch_size + 6.5 * math.sqrt(expected_batch_size))


class PoissonSampler(Sampler[list[int]]):
    """Yields `steps` draws, all loops over it together: sorted indices in [0, num_units), possibly none.

    num_units: how many units there are. steps: draws of the whole run, over all its epochs, 1 or more.
    sample_rate: q in (0, 1]; or else expected_batch_size: q * num_units. Give exactly one.
    max_batch: the most units in a draw, see `safe_max_batch`; no bound if None.
    seed: an int makes the draws repeatable and the run not private.
    process_group: of torch.distributed (`torch.distributed.group.WORLD`); its processes share each draw out among them,
    whole units, every one once. They have to make the sampler at the same point and with the same arguments.

    Attributes: num_units, num_examples (here the same), steps, sample_rate, expected_batch_size, max_batch;
    examples_per_user and adjacency, what to tell accountants beside the event (here None and "zero-out"); released, how
    many draws were handed out so far over all loops. Of the current draw, and private like it: current_units, this
    process's number of units; current_unit_ids, the unit of each example, int64 [B]; previous_draw, the draw before it in
    the same loop. They are None before the first.
    Raises ValueError for bad input, and RuntimeError from a loop that finds no draw left.
    """

    examples_per_user: int | None = None
    adjacency = "zero-out"

    def __init__(
        self,
        num_units: int,
        *,
        steps: int,
        sample_rate: float | None = None,
        expected_batch_size: float | None = None,
        max_batch: int | None = None,
        seed: int | None = None,
        process_group: Any = None,
    ) -> None:
        check_count("num_units", num_units)
        check_count("steps", steps)
        if (sample_rate is None) == (expected_batch_size is None):
            raise ValueError(
                f"sample_rate={sample_rate!r} and expected_batch_size={expected_batch_size!r}: give exactly one of them"
            )
        if sample_rate is None:
            assert expected_batch_size is not None
            check_within("expected_batch_size", expected_batch_size, num_units)
            sample_rate = expected_batch_size / num_units
        else:
            check_within("sample_rate", sample_rate, 1)
            expected_batch_size = sample_rate * num_units
        if max_batch is not None:
            check_count("max_batch", max_batch)
        self.num_units = int(num_units)
        self.num_examples = self.num_units
        self.current_draw: int | None = (
            None  # a copy has none until it hands one out: its original's is not its to release
        )
        self.current_units: int | None = None
        self.current_unit_ids: Tensor | None = None
        self.previous_draw: int | None = None
        self.steps = int(steps)
        self.sample_rate = float(sample_rate)
        self.expected_batch_size = float(expected_batch_size)
        self.max_batch = None if max_batch is None else int(max_batch)
        self.released = 0
        self.rank, self.world_size = 0, 1
        if process_group is not None:
            self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
            self._agree((*self._terms(), seed), process_group)
        self._secret = Secret(seed, process_group)

    @property
    def seeded(self) -> bool:
        """Whether a seed makes the draws repeatable, which voids every epsilon."""
        return self._secret.seeded

    def event(self, noise_multiplier: float) -> StepEvent:
        """What one step with a draw of this sampler costs; accountants get `examples_per_user` and `adjacency` with it.

        noise_multiplier: the noise's standard deviation over the clipping norm. Raises ValueError if it is not one.
        """
        # With accounting come libraries that drawing does not need.
        from fastclip.accounting.accountants import StepEvent

        if self.max_batch is None or self.max_batch >= self.num_units:
            return StepEvent(noise_multiplier, self.sample_rate)
        return StepEvent(noise_multiplier, self.sample_rate, max_batch=self.max_batch, num_units=self.num_units)

    def unit_of(self, indices: Sequence[int]) -> Tensor:
        """The units, in [0, num_units), that own these examples: int64 [B]. Raises ValueError."""
        return torch.from_numpy(self._checked(indices))

    def examples_by_unit(self) -> Iterator[tuple[Int64s, Int64s, Int64s]]:
        """(examples, how many of them each unit owns, how many of those a draw gives at most), unit by unit, in pieces."""
        for start in range(0, self.num_units, _CHUNK):
            units = np.arange(start, min(start + _CHUNK, self.num_units))
            yield self._examples_of(units, 0)[0], np.ones_like(units), np.ones_like(units)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        if self.released >= self.steps:
            raise RuntimeError(
                f"all {self.steps} draws were handed out, and more would cost more than was accounted for: make the sampler "
                "with steps= all steps of the run (epochs times steps an epoch) and loop over it once"
            )
        previous = None
        while self.released < self.steps:
            # Counted before it is drawn: whatever fails from here on, this id and its words are never used again.
            draw = self.released
            self.released += 1
            units = self._units_of(self._secret.words(Purpose.UNITS, draw))
            indices, owners = self._examples_of(units, draw)
            self.current_draw = draw
            self.current_units = len(units[self.rank :: self.world_size])
            if self.world_size > 1:
                # Units in growing order and each one's examples together: an example's place among units is its owner's.
                mine = np.searchsorted(units, owners) % self.world_size == self.rank
                indices, owners = indices[mine], owners[mine]
            self.current_unit_ids = torch.from_numpy(owners)
            self.previous_draw, previous = previous, draw
            yield indices.tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(_OF_THE_DRAW)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._secret = copy.copy(self._secret)  # copy.copy hands the state on as it is, and a key is never handed on

    def _units_of(self, words: Words) -> Int64s:
        """The draw's units, of all processes together; sorted."""
        size = words.binomial(self.num_units, self.sample_rate)
        # A uniform subset of a uniform subset is a uniform subset.
        return words.subset(self.num_units, size if self.max_batch is None else min(size, self.max_batch))

    def _examples_of(self, units: Int64s, draw: int) -> tuple[Int64s, Int64s]:
        """The examples that sorted `units` give in this draw, unit by unit, and the id of each one's unit."""
        return units, units

    def _checked(self, indices: Sequence[int]) -> Int64s:
        wanted = np.array(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.num_examples:
            raise ValueError(
                f"indices reach from {wanted.min()} to {wanted.max()}; there are {self.num_examples} examples"
            )
        return wanted

    def _terms(self) -> tuple[object, ...]:
        """What the processes of a distributed run must have in common."""
        return type(self).__name__, self.num_units, self.steps, self.sample_rate, self.max_batch

    def _agree(self, terms: tuple[object, ...], process_group: Any) -> None:
        theirs: list[Any] = [None] * self.world_size
        dist.all_gather_object(theirs, terms, group=process_group)
        if any(each != terms for each in theirs):  # so in every process
            raise ValueError(
                f"the processes' samplers differ ({theirs}): give the same arguments, and the same data in the same order"
            )
