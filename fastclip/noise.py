"""The noise of a private step: whose key it is, which step it belongs to, and that no draw is made twice.

`fastclip.random` defines the numbers; this file adds them to gradients. A source has state and moves from step to step,
so that a source of correlated noise can take its place behind the same interface.
"""

import bisect
import enum
import math
import operator
import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastclip import ops
from fastclip.discrete import DiscreteGaussian, draw_integers
from fastclip.random import MAX_ELEMENTS, Key, nonce

# Counts the forks between this process and the one that imported this module.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class Purpose(enum.IntEnum):
    """What a draw is for. Each purpose has a stream of its own; the values are part of the stream's definition."""

    GRADIENT = 0
    QUANTILE = 1
    DISCRETE = 2


class NoiseSource:
    """Independent Gaussian noise for one optimizer, from ChaCha20 keyed by the operating system.

    Guarantees:
    - Without a seed the key is 256 bits of `os.urandom`; what is drawn cannot be told from independent fp64 normals
      without breaking ChaCha20.
    - No number is drawn twice. Within a step a source refuses to draw again for an element and purpose; `advance`
      goes to new numbers; a copy (`copy`, `deepcopy`, `pickle`) and a forked child take a new key from the operating
      system, and so must an optimizer that loads a state (`renew`).
    - The key is in no repr, pickle, state dict or message.
    - The normal of global element i depends on (key, step, purpose, i) alone: not on how calls split the vector, on
      layout, threads or device.
    - `out = round((grad_sum + std * z) * scale)`: z, products and sum in fp64, rounded once to fp32, bf16 or fp16. Adding
      numbers already rounded to the result's precision shows bits of the clean sum (Mironov, CCS 2012; Jin et al., S&P
      2022).

    What is not guaranteed: fp64 is still a grid. Where a result comes out below about 2^-29 of `grad_sum` and of `std`
    (about one element in 10^9), its last bits are finer than the noise's. Only a discrete Gaussian has a proof.

    With a seed the noise is reproducible and **not private**: whoever knows or guesses the seed can subtract it. It comes from
    Philox, which is no cipher, under a hash of the seed. Two sources
    with the same seed draw the same noise, so each optimizer of a run needs its own. A copied or forked seeded source
    goes on with a key from the operating system: it repeats nothing, is no longer reproducible, and still counts as not
    private. `renew` derives the next key from the last, so that a resumed seeded run can be reproduced. The same words
    come out everywhere; the logarithm and tangent of another processor may differ in the last bit of fp64, which fp32
    results seldom show.

    A source is to be used from one thread at a time.
    """

    def __init__(self, seed: int | None = None) -> None:
        """`seed`: any integer; None (the default) for private noise. ValueError if it is something else."""
        self._seeded = seed is not None
        if seed is not None:
            try:
                seed = operator.index(seed)
            except TypeError:
                raise ValueError(f"seed must be an integer or None, got {seed!r}; leave it out for privacy") from None
        self._step = 0
        self._take(_urandom_key() if seed is None else Key.from_seed(seed))

    @property
    def private(self) -> bool:
        """False if a seed was ever given, to this source or to the one it was copied from."""
        return not self._seeded

    @property
    def step(self) -> int:
        """The step that draws belong to; starts at 0."""
        return self._step

    def __repr__(self) -> str:
        return f"NoiseSource(private={self.private}, step={self._step})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_source, (self._seeded, self._step)

    def advance(self) -> None:
        """Goes to the next step: every element can be drawn once more."""
        self._step += 1
        self._used.clear()

    def renew(self, step: int | None = None) -> None:
        """Takes a new key, as whoever loads a saved state must, and goes to `step` (default: stays).

        Unseeded, the key comes from the operating system. Seeded, it is a hash of the last key and `step`, so that runs
        resumed at different steps, and the run they were resumed from, share no noise.
        ValueError if `step` is negative.
        """
        if step is not None and step < 0:
            raise ValueError(f"step must not be negative, got {step}; pass the number of steps already made")
        self._leave_parent()
        self._step = self._step if step is None else step
        self._take(self._key.derive(self._step) if self._seeded else _urandom_key())

    def add_(
        self,
        grad_sum: Tensor,
        std: float,
        *,
        offset: int,
        out: Tensor | None = None,
        scale: float = 1.0,
        purpose: Purpose = Purpose.GRADIENT,
    ) -> Tensor:
        """Writes `round((grad_sum + std * z) * scale)` into `out` and returns it.

        Args:
            grad_sum: any shape and layout, fp32 or fp64; not changed if `out` is given.
            std: the noise's standard deviation, in the unit of `grad_sum`; finite, at least 0.
            offset: global index of the first element; element i in row-major order of the shape is `offset + i`.
            out: same shape, fp32, bf16 or fp16; may share memory with `grad_sum`. Default: `grad_sum` itself.
            scale: a public factor, finite: one over the expected batch size.
            purpose: which stream to draw from.

        Raises:
            ValueError: an argument does not fit; nothing was written or drawn.
            RuntimeError: some of these elements were drawn in this step already; nothing was written or drawn.

        Edge cases: an empty tensor draws nothing. NaN and infinities of `grad_sum` go through. A value beyond `out`'s
        range becomes infinite. `std=0` rounds without noise but counts as a draw. A call that fails half way (out of
        memory) has spent its numbers. CUDA tensors go through the host, with a sync.
        """
        out = grad_sum if out is None else out
        std, scale, purpose = float(std), float(scale), Purpose(purpose)
        _check(grad_sum, out)
        draw = self.spend(offset, grad_sum.numel(), std, scale, purpose)
        if not grad_sum.numel():
            return out

        clean = grad_sum.detach().cpu().contiguous().view(-1)
        in_place = out.device.type == "cpu" and out.is_contiguous()
        noisy = out.detach().view(-1) if in_place else torch.empty(clean.shape, dtype=out.dtype)
        if _overlap(clean, noisy):
            clean = clean.clone()
        ops.add_noise(clean, noisy, draw)
        if not in_place:
            out.detach().copy_(noisy.view(out.shape))
        return out

    def add_discrete(
        self, grad_sum: Tensor, mechanism: DiscreteGaussian, *, offset: int, scale: float, out: Tensor
    ) -> Tensor:
        """Writes ``(round(grad_sum / grid) + Z) * grid * scale`` into `out` and returns it, Z ~ N_Z(0, sigma^2) exactly.

        Arguments, refusals and edge cases as for `add_`; grad_sum on CPU. What follows the integers is post-processing. Values
        beyond 2^61 grid points are cut off there, which brings no two sums further apart.
        """
        _check(grad_sum, out)
        draw = self.spend(offset, grad_sum.numel(), mechanism.std, scale, Purpose.DISCRETE)
        points = grad_sum.detach().double().div(mechanism.grid).round_().clamp_(-(2.0**61), 2.0**61).long()
        noise = torch.empty(points.numel(), dtype=torch.int64)
        draw_integers(noise, mechanism.sigma, draw)
        points += noise.view(points.shape)
        return out.copy_(points.double().mul_(mechanism.grid).mul_(scale))

    def spend(self, offset: int, count: int, std: float, scale: float, purpose: Purpose = Purpose.GRADIENT) -> ops.Draw:
        """Takes elements [offset, offset + count) of this step: what is answered is to be drawn from once, at once.

        For passes that do more than add noise; otherwise `add_`. Raises as `add_`, before anything is taken.
        """
        return self.spend_all([(offset, count)], std, scale, purpose)[0]

    def spend_all(
        self, ranges: Sequence[tuple[int, int]], std: float, scale: float, purpose: Purpose = Purpose.GRADIENT
    ) -> list[ops.Draw]:
        """:meth:`spend` of many vectors, each ``(offset, count)``; raises before any is taken."""
        _check_draw(std, scale, ranges)
        self._leave_parent()
        word = nonce(self._step, purpose, self._seeded)
        draws = [ops.Draw(std, scale, self._key, word, offset) for offset, _ in ranges]
        self._reserve(purpose, ranges)
        return draws

    def _take(self, key: Key) -> None:
        self._key = key
        self._home = _forks
        # Per purpose, the ranges drawn in this step: sorted, disjoint, not touching.
        self._used: dict[Purpose, list[tuple[int, int]]] = {}

    def _leave_parent(self) -> None:
        """After a fork the parent goes on with the old key, so the child needs another."""
        if self._home != _forks:
            self._take(_urandom_key())

    def _reserve(self, purpose: Purpose, ranges: Sequence[tuple[int, int]]) -> None:
        """Marks elements as drawn: one range per purpose while calls go through the vector in order."""
        used = list(self._used.get(purpose, ()))
        for start, stop in _runs(ranges):
            after = bisect.bisect_right(used, (start, stop))
            before = after - 1
            if (before >= 0 and used[before][1] > start) or (after < len(used) and used[after][0] < stop):
                raise RuntimeError(
                    f"elements [{start}, {stop}) overlap elements that already have their {purpose.name} noise of step "
                    f"{self._step}; call advance() once per step, and give each parameter its own offset"
                )
            if after < len(used) and used[after][0] == stop:
                stop = used.pop(after)[1]
            if before >= 0 and used[before][1] == start:
                used[before] = (used[before][0], stop)
            else:
                used.insert(after, (start, stop))
        self._used[purpose] = used


def check_noise_multiplier(value: float) -> float:
    """``value`` as a float. Raises ValueError unless it is finite and at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"noise_multiplier must be finite and at least 0, got {value!r}")
    return float(value)


def _urandom_key() -> Key:
    return Key(os.urandom(32))


def _new_source(seeded: bool, step: int) -> NoiseSource:
    """What a copy or an unpickled source is: the same step and the same standing, under a key of its own."""
    source = NoiseSource()
    source._seeded, source._step = seeded, step
    return source


def _check(grad_sum: Tensor, out: Tensor) -> None:
    if grad_sum.dtype not in (torch.float32, torch.float64) or grad_sum.layout != torch.strided:
        raise ValueError(
            f"grad_sum must be dense fp32 or fp64, got {grad_sum.dtype}, {grad_sum.layout}; accumulate in fp32"
        )
    if out.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"out must be fp32, bf16 or fp16, got {out.dtype}; pass out=: only rounding hides the fp64 noise's own grid"
        )
    if out.shape != grad_sum.shape or out.layout != torch.strided:
        raise ValueError(
            f"out must be dense and of grad_sum's shape {tuple(grad_sum.shape)}, got {tuple(out.shape)}, {out.layout}; "
            "pass torch.empty_like(grad_sum)"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(f"out must not be expanded, got strides {out.stride()}; pass a tensor with memory of its own")


def _check_draw(std: float, scale: float, ranges: Sequence[tuple[int, int]]) -> None:
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"std must be finite and at least 0, got {std}; it is noise_multiplier * max_grad_norm")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}; it is 1 / expected_batch_size")
    for offset, count in ranges:
        if not isinstance(offset, int) or offset < 0 or offset + count > MAX_ELEMENTS:
            raise ValueError(
                f"offset must be an integer in [0, 2^65 - numel], got {offset!r}; count the elements of all earlier tensors"
            )


def _runs(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """[start, stop) of what is not empty, ranges that follow one another as one."""
    runs: list[tuple[int, int]] = []
    for start, count in ranges:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + count)
        elif count:
            runs.append((start, start + count))
    return runs


def _overlap(source: Tensor, target: Tensor) -> bool:
    """Whether writing elements of `target` can destroy other, unread elements of `source`; both contiguous."""
    if source.data_ptr() == target.data_ptr() and source.dtype == target.dtype:
        return False
    return (
        source.data_ptr() < target.data_ptr() + target.nbytes and target.data_ptr() < source.data_ptr() + source.nbytes
    )
