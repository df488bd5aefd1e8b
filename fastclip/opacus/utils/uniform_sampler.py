"""`opacus.utils.uniform_sampler`: Poisson sampling with as many steps an epoch as the rate says, and at that rate exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator

import opacus.utils.uniform_sampler as theirs
import torch
from torch import Tensor

from fastclip.opacus._mirror import delegate

_CELLS = 2**24  # torch.rand in float32 gives multiples of 1 / _CELLS


def _steps(sample_rate: float) -> int:
    """Steps of an epoch: 1 / sample_rate, where the rounding of ``1 / n`` must not cost a step. ValueError outside (0, 1]."""
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate is the probability of each example and must be in (0, 1], got {sample_rate!r}")
    exact = 1 / sample_rate
    nearest = round(exact)
    return nearest if abs(exact - nearest) <= 1e-9 * nearest else math.floor(exact)


def _draw(count: int, sample_rate: float, generator: torch.Generator | None) -> Tensor:
    """Indices ``[k]`` int64, ascending, of a Poisson draw from ``count`` examples.

    The numbers are those that Opacus draws. It compares them with the rate, and so takes ceil(rate * 2^24) / 2^24 instead:
    5 % too often at a rate of 1e-6. Here the one value on the edge is in with the probability that makes up the difference.
    """
    device = "cpu" if generator is None else generator.device
    cells = torch.rand(count, generator=generator, dtype=torch.float32, device=device) * _CELLS
    edge = math.floor(sample_rate * _CELLS)
    chosen = cells < edge
    on_edge = (cells == edge).nonzero().flatten()
    if len(on_edge):
        finer = torch.rand(len(on_edge), generator=generator, dtype=torch.float64, device=device)
        chosen[on_edge] = finer < sample_rate * _CELLS - edge
    return chosen.nonzero().flatten().cpu()


class UniformWithReplacementSampler(theirs.UniformWithReplacementSampler):
    """Batches (lists of indices) into which each of ``num_samples`` examples comes with probability ``sample_rate``.

    steps: batches an epoch, by default 1 / sample_rate. generator: by default torch's own. Batches may be empty.
    Raises ValueError for num_samples < 1 or a rate outside (0, 1].
    """

    def __init__(
        self,
        *,
        num_samples: int,
        sample_rate: float,
        generator: torch.Generator | None = None,
        steps: int | None = None,
    ) -> None:
        whole = _steps(sample_rate)
        super().__init__(
            num_samples=num_samples,
            sample_rate=sample_rate,
            generator=generator,
            steps=whole if steps is None else steps,
        )

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield _draw(self.num_samples, self.sample_rate, self.generator).tolist()


class DistributedUniformWithReplacementSampler(theirs.DistributedUniformWithReplacementSampler):
    """This rank's part of each Poisson draw: indices ``[k]`` int64, ``k`` may be 0. Every rank makes as many steps.

    The examples are dealt out to the ranks, shuffled by ``shuffle_seed`` and the epoch (:meth:`set_epoch`) if ``shuffle``.
    Ranks whose generators have the same seed do not draw independently of each other.
    Raises ValueError for total_size < 1 or a rate outside (0, 1].
    """

    def __init__(
        self,
        *,
        total_size: int,
        sample_rate: float,
        shuffle: bool = True,
        shuffle_seed: int = 0,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        whole = _steps(sample_rate)
        super().__init__(
            total_size=total_size,
            sample_rate=sample_rate,
            shuffle=shuffle,
            shuffle_seed=shuffle_seed,
            steps=whole if steps is None else steps,
            generator=generator,
        )

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.arange(self.total_size)
        if self.shuffle:
            dealer = torch.Generator().manual_seed(self.shuffle_seed + self.epoch)
            order = torch.randperm(self.total_size, generator=dealer)
        own = order[self.rank :: self.num_replicas]
        for _ in range(self.num_batches):
            # Empty ones too: a rank that skipped its step would leave the others waiting, and its noise out.
            yield own[_draw(len(own), self.sample_rate, self.generator)]


__getattr__, __dir__ = delegate(__name__)
