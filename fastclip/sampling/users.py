"""Poisson draws of users: user-level sampling (ULS).

A user is in a draw with probability q, whatever it owns, and is one unit: its examples' gradients are summed or averaged,
then clipped together. So the accountant is told of q and of nothing else; how many examples a drawn user gives bounds
work and noise, and is no sampling that anyone counts (Charles et al., arXiv 2407.07737).

Guarantees: a user's examples stand together in a draw and never in two processes; those that are given are chosen
uniformly at random, afresh in every draw, from words of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclip.sampling.checks import check_count
from fastclip.sampling.columns import Column
from fastclip.sampling.index import UserIndex
from fastclip.sampling.poisson import PoissonSampler
from fastclip.sampling.secret import Purpose
from fastclip.sampling.words import Int64s, ranges

# Users looked at together: it bounds memory.
_USERS = 2**16


class UserPoissonSampler(PoissonSampler):
    """Yields `steps` draws of users: the example indices of the drawn users, grouped by user.

    A drawn user gives all of its examples; or, with `examples_per_user=G`, at most G of them, chosen uniformly at
    random and afresh in every draw. The unit is the user, sampled at `sample_rate`, whatever G is.

    user_ids: a `UserIndex`, or one hashable id per example in the order of the data set. Ids that are equal are one user.
    Other arguments as for `PoissonSampler`, in users. Attributes: also num_examples and examples_per_draw, which is G.
    `examples_per_user`, for accountants, is None: they charge for users directly.
    Raises ValueError for bad input.
    """

    def __init__(
        self,
        user_ids: UserIndex | Column,
        *,
        steps: int,
        sample_rate: float | None = None,
        expected_batch_size: float | None = None,
        examples_per_user: int | None = None,
        max_batch: int | None = None,
        seed: int | None = None,
        process_group: Any = None,
    ) -> None:
        if examples_per_user is not None:
            check_count("examples_per_user", examples_per_user)
        self.examples_per_draw = None if examples_per_user is None else int(examples_per_user)
        self._index = user_ids if isinstance(user_ids, UserIndex) else UserIndex.build(user_ids)
        super().__init__(
            self._index.num_users,
            steps=steps,
            sample_rate=sample_rate,
            expected_batch_size=expected_batch_size,
            max_batch=max_batch,
            seed=seed,
            process_group=process_group,
        )
        self.num_examples = self._index.num_examples

    def unit_of(self, indices: Sequence[int]) -> Tensor:
        """The users, in [0, num_units), who own these examples: int64 [B]. Raises ValueError."""
        return torch.from_numpy(self._index.user_of[self._checked(indices)].astype(np.int64))

    def examples_by_unit(self) -> Iterator[tuple[Int64s, Int64s, Int64s]]:
        """(examples, how many of them each unit owns, how many of those a draw gives at most), unit by unit, in pieces."""
        for first in range(0, self.num_units, _USERS):
            offsets = self._index.offsets[first : first + _USERS + 1]
            owned = np.diff(offsets)
            given = owned if self.examples_per_draw is None else np.minimum(owned, self.examples_per_draw)
            yield self._index.by_user[offsets[0] : offsets[-1]].astype(np.int64), owned, given

    def _examples_of(self, units: Int64s, draw: int) -> tuple[Int64s, Int64s]:
        starts = self._index.offsets[units]
        counts = self._index.offsets[units + 1] - starts
        if self.examples_per_draw is None:
            return self._index.by_user[ranges(starts, counts)].astype(np.int64), np.repeat(units, counts)
        given = np.minimum(counts, self.examples_per_draw)
        places = self._secret.words(Purpose.EXAMPLES, draw).subsets(counts, given)
        # From places in the drawn users' examples to places in all users'.
        places += np.repeat(starts - (np.cumsum(counts) - counts), given)
        return self._index.by_user[places].astype(np.int64), np.repeat(units, given)

    def _terms(self) -> tuple[object, ...]:
        return *super()._terms(), self.examples_per_draw, self._index.checksum()
