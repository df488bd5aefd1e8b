"""Poisson draws of examples where users are protected: example-level sampling (ELS).

Examples are drawn and clipped, each on its own, and the accountant charges for a user's K examples together
(`examples_per_user`; Ganesh, arXiv 2401.10294; Charles et al., arXiv 2407.07737). That needs a bound on what a user owns,
and it holds before the first draw: of every user with more, K examples stay, chosen uniformly at random.

Guarantees and edge cases:

- Which of a user's examples stay is decided by the user's own number of examples and the secret key, by nothing else. A
  rule over all users ("drop until N are left", "no duplicates") would let one user's presence change which examples of
  others are trained on, and then more than K examples change with a user.
- The subset lasts for the sampler's life and is part of its copies. A new sampler chooses anew. Both are covered: what
  is charged for a step is what any K examples of a user can do, whichever they are.
- `sample_rate` is the probability of every kept example. Given itself, it is a declared number. From
  `expected_batch_size` it is that over the number of kept examples, which a user's presence changes; then only zero-out
  adjacency holds, in which that number is public.
- A draw cannot be cut to `max_batch` where K is above 1: which of a user's examples stay in a cut draw would depend on
  each other, and no accountant here covers that.
- An example has one owner. Rows that pack several users' texts into one, or texts that several users share, do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclip.sampling.checks import check_count
from fastclip.sampling.columns import Column
from fastclip.sampling.index import Ints, UserIndex
from fastclip.sampling.poisson import PoissonSampler
from fastclip.sampling.secret import Purpose
from fastclip.sampling.words import Int64s

# Users whose examples are chosen at a time: it bounds memory.
_USERS = 2**16


class ExamplePoissonSampler(PoissonSampler):
    """Yields `steps` draws of examples, of which every user owns at most K: sorted indices into the data set.

    users: a `UserIndex`, or one hashable id per example in the order of the data set. examples_per_user: K, 1 or more.
    Other arguments as for `PoissonSampler`; the units are the kept examples.

    Attributes: also examples_per_user; num_users; num_examples, all of the data set; num_units, those that were kept;
    num_dropped, how many were not (it tells how much heavy users own: private).
    Raises ValueError for bad input.
    """

    def __init__(
        self,
        users: UserIndex | Column,
        *,
        examples_per_user: int,
        steps: int,
        sample_rate: float | None = None,
        expected_batch_size: float | None = None,
        max_batch: int | None = None,
        seed: int | None = None,
        process_group: Any = None,
    ) -> None:
        check_count("examples_per_user", examples_per_user)
        if max_batch is not None and examples_per_user > 1:
            raise ValueError(
                f"max_batch={max_batch!r} with examples_per_user={examples_per_user!r}: no accountant covers users in cut "
                "draws; leave max_batch out and bound memory by physical batches"
            )
        index = users if isinstance(users, UserIndex) else UserIndex.build(users)
        self.examples_per_user = int(examples_per_user)
        self._index = index
        stay = np.minimum(np.diff(index.offsets), self.examples_per_user)
        super().__init__(
            int(stay.sum()),
            steps=steps,
            sample_rate=sample_rate,
            expected_batch_size=expected_batch_size,
            max_batch=max_batch,
            seed=seed,
            process_group=process_group,
        )
        self.num_examples, self.num_users = index.num_examples, index.num_users
        self.num_dropped = self.num_examples - self.num_units
        # Nothing dropped, nothing to list.
        self._kept: Ints | None = self._chosen(index, stay) if self.num_dropped else None

    def unit_of(self, indices: Any) -> Tensor:
        """The units, in [0, num_units), that these examples are: int64 [B]. ValueError for examples that were dropped."""
        wanted = self._checked(indices)
        if self._kept is None:
            return torch.from_numpy(wanted)
        units = np.searchsorted(self._kept, wanted)
        kept = self._kept[np.minimum(units, self.num_units - 1)] == wanted
        if not kept.all():
            raise ValueError(f"example {wanted[~kept][0]} was dropped by examples_per_user={self.examples_per_user}")
        return torch.from_numpy(units)

    def _examples_of(self, units: Int64s, draw: int) -> tuple[Int64s, Int64s]:
        return (units if self._kept is None else self._kept[units].astype(np.int64)), units

    def _chosen(self, index: UserIndex, stay: Int64s) -> Ints:
        """The kept examples, sorted."""
        words = self._secret.words(Purpose.CAP)
        kept = np.empty(self.num_units, dtype=index.by_user.dtype)
        end = 0
        for first in range(0, index.num_users, _USERS):
            offsets = index.offsets[first : first + _USERS + 1]
            places = offsets[0] + words.subsets(np.diff(offsets), stay[first : first + _USERS])
            kept[end : end + len(places)] = index.by_user[places]
            end += len(places)
        kept.sort()
        return kept

    def _terms(self) -> tuple[object, ...]:
        return *super()._terms(), self.examples_per_user, self._index.checksum()
