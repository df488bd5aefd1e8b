"""What of a draw fits into memory together.

A draw is released as a whole, and goes through the model in physical batches. Guarantees:

- A unit is never split: clipping needs its whole gradient, which is there after one backward of all its examples.
- A physical batch holds one bucket only, so that no unit is padded to another's length (a longer padding changes bf16
  gradients, and then a unit's gradient depends on its neighbours). A unit's bucket is that of its longest example.
- The draw is covered exactly, and how it is cut changes neither what is released nor what that costs.
- A unit too large for the limits is refused, or handed out alone and marked. Nothing is ever cut off it here.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch

from fastclip.sampling.checks import check_count


class PhysicalBatch(list[int]):
    """Example indices that go through the model together.

    padded_length: the bucket of all of them; None where no sizes were given. oversized: a single unit beyond the limits.
    """

    def __init__(self, indices: Iterable[int] = (), padded_length: int | None = None, oversized: bool = False) -> None:
        super().__init__(indices)
        self.padded_length = padded_length
        self.oversized = oversized


def physical_batches(
    indices: Sequence[int],
    sizes: Sequence[int] | None = None,
    *,
    max_examples: int | None = None,
    max_tokens: int | None = None,
    units: Sequence[int] | torch.Tensor | None = None,
    allow_oversized: bool = False,
) -> list[PhysicalBatch]:
    """Split one draw into batches that fit into memory; an empty draw gives none.

    indices: the draw's example indices, [B]. sizes: for each of them the public length bucket it is padded to, [B].
    max_examples: the most examples in a batch. max_tokens: the most padded tokens, which is examples times bucket.
    units: for each of them the unit it belongs to, [B]; every unit then stays whole, and its examples are padded to the
    largest bucket among them. allow_oversized: a unit that alone exceeds a limit gets a batch of its own, marked
    `oversized`, instead of a ValueError.

    The largest bucket comes first, so that too little memory shows at once.

    Raises ValueError for bad input and when one unit alone exceeds a limit.
    """
    for name, limit in (("max_examples", max_examples), ("max_tokens", max_tokens)):
        if limit is not None:
            check_count(name, limit)
    if max_tokens is not None and sizes is None:
        raise ValueError(f"max_tokens={max_tokens!r} needs sizes, the length bucket of every example; give both")
    owners = list(range(len(indices))) if units is None else [int(unit) for unit in units]
    widths = [1] * len(indices) if sizes is None else [int(size) for size in sizes]
    for name, given in (("units", owners), ("sizes", widths)):
        if len(given) != len(indices):
            raise ValueError(f"{name} has {len(given)} entries for {len(indices)} indices; give one for each")

    whole: dict[int, list[int]] = {}
    width_of: dict[int, int] = {}
    for index, owner, width in zip(indices, owners, widths, strict=True):
        check_count("sizes", width)
        whole.setdefault(owner, []).append(index)
        width_of[owner] = max(width, width_of.get(owner, 0))

    batches: list[PhysicalBatch] = []
    open_: dict[int, PhysicalBatch] = {}
    # A stable sort: within a bucket, units come in the order of the draw.
    for owner in sorted(whole, key=lambda owner: -width_of[owner]):
        examples, width = whole[owner], width_of[owner]
        padded = None if sizes is None else width
        room = min(max_examples or len(indices), max_tokens // width if max_tokens else len(indices))
        if len(examples) > room:
            if not allow_oversized:
                raise ValueError(too_large(len(examples), width, max_examples, max_tokens))
            batches.append(PhysicalBatch(examples, padded, oversized=True))
            continue
        if width not in open_ or len(open_[width]) + len(examples) > room:
            open_[width] = PhysicalBatch((), padded)
            batches.append(open_[width])
        open_[width].extend(examples)
    return batches


def too_large(examples: int, width: int, max_examples: int | None, max_tokens: int | None) -> str:
    """What to say of a unit that exceeds the limits alone."""
    return (
        f"a unit with {examples} examples in bucket {width} exceeds max_examples={max_examples!r} or "
        f"max_tokens={max_tokens!r}, and a unit cannot be split; raise the limit, lower examples_per_user or the longest "
        "bucket, or take such units alone by allow_oversized=True"
    )


def length_bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest public bucket that holds `length` tokens.

    buckets: lengths in growing order. What fits none has to be refused or truncated to the last by the caller, by a
    rule that looks at this unit alone. Raises ValueError when none holds it.
    """
    check_buckets(buckets)
    if length < 0:
        raise ValueError(f"length={length!r} is negative; give a number of tokens")
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise ValueError(f"length={length!r} exceeds the last bucket of {buckets[-1]}; truncate it or add a bucket")


def check_buckets(buckets: Sequence[int]) -> None:
    """Raise ValueError unless these are positive lengths in growing order."""
    if not len(buckets) or any(low >= high for low, high in pairwise(buckets)) or buckets[0] < 1:
        raise ValueError(f"buckets={list(buckets)!r} are not positive lengths in growing order; sort them")
