"""Poisson draws of examples or users, and how a draw becomes batches.

In a Poisson draw each unit takes part independently with probability q. That, and nothing close to it, is what the
accountants count: batches of a fixed size, or a shuffled pass over the data, cost more privacy at the same noise.

Guarantees and edge cases:

- A unit is in a draw when a 64-bit word of a ChaCha20 stream is below floor(2^64 q): exact to 2^-64, and never more
  often than q. The stream is a function of a secret key and the draw's id; both the key and the words stay here.
- The key comes from the operating system. It is in no pickle, deepcopy or checkpoint, and a forked child replaces it:
  each copy draws afresh. So a resumed run cannot repeat its draws, and must not.
- A `seed` makes draws repeat, also in copies and forked children. Whoever knows it knows the batches, so no epsilon
  holds for such a run; `seeded` says so.
- Empty draws are draws. Each still has to be released, as noise alone.
- Draw ids start at 0, grow by one over the sampler's life whatever iterator they went to, and never come twice.
- A sampler hands out `steps` draws in its life, because that many are what an accountant was told of: a second loop goes
  on where the first was left, and one that finds none left is refused.
- `expected_batch_size` is q times the number of units: public, and never the size of an actual draw.
"""

import copy
import hashlib
import os
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

_CHUNK = 2**20


class PoissonSampler(Sampler[list[int]]):
    """Yields `steps` draws, all loops over it together: sorted indices in [0, num_units), possibly none.

    num_units: how many units there are. steps: draws of the whole run, over all its epochs, 1 or more.
    sample_rate: q in (0, 1]; or else expected_batch_size: q * num_units. Give exactly one.
    seed: an int makes the draws repeatable and the run not private.

    Attributes: num_units, num_examples (here the same), steps, sample_rate, expected_batch_size; released, how many
    draws were handed out so far over all loops; current_units and previous_draw, the current draw's number of units and
    the draw before it in the same loop, None before the first.
    Raises ValueError for bad input, and RuntimeError from a loop that finds no draw left.
    """

    def __init__(
        self,
        num_units: int,
        *,
        steps: int,
        sample_rate: float | None = None,
        expected_batch_size: float | None = None,
        seed: int | None = None,
    ) -> None:
        _check_count("num_units", num_units)
        _check_count("steps", steps)
        if (sample_rate is None) == (expected_batch_size is None):
            raise ValueError(
                f"sample_rate={sample_rate!r} and expected_batch_size={expected_batch_size!r}: give exactly one of them"
            )
        if sample_rate is None:
            assert expected_batch_size is not None
            _check_within("expected_batch_size", expected_batch_size, num_units)
            sample_rate = expected_batch_size / num_units
        else:
            _check_within("sample_rate", sample_rate, 1)
            expected_batch_size = sample_rate * num_units
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
            raise ValueError(f"seed={seed!r} is not an int; leave it out for a private run")
        self.num_units = int(num_units)
        self.num_examples = self.num_units
        self.current_units: int | None = None  # private, like the draw
        self.previous_draw: int | None = None
        self.steps = int(steps)
        self.sample_rate = float(sample_rate)
        self.expected_batch_size = float(expected_batch_size)
        self.released = 0
        self._seed = None if seed is None else int(seed)
        self._take_key()

    @property
    def seeded(self) -> bool:
        """Whether a seed makes the draws repeatable, which voids every epsilon."""
        return self._seed is not None

    @property
    def current_draw(self) -> int | None:
        """The id of the draw most recently handed out; None before the first."""
        return self.released - 1 if self.released else None

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
            indices, self.current_units = self._drawn(_Words(self._key, draw))
            self.previous_draw, previous = previous, draw
            yield indices

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_key"}
        return {**kept, "current_units": None, "previous_draw": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_key()

    def _drawn(self, words: "_Words") -> tuple[list[int], int]:
        indices: list[int] = words.bernoulli(self.num_units, self.sample_rate).tolist()
        return indices, len(indices)

    def _take_key(self) -> None:
        if self._seed is None:
            self._key = os.urandom(32)
        else:
            self._key = hashlib.sha256(b"fastclip: Poisson draws, not private\0%d" % self._seed).digest()
        _LIVE.add(self)


class UserPoissonSampler(PoissonSampler):
    """Yields `steps` draws of users: the example indices of the drawn users, grouped by user.

    A drawn user gives all of its examples; or, with `examples_per_user=K`, at most K of them, chosen uniformly at
    random and afresh in every draw. The cap bounds work and is no sampling that the accountant counts: the unit is
    the user, sampled at `sample_rate`, whatever K is.

    user_ids: one hashable id per example, in the order of the data set. Ids that are equal are one user.
    Other arguments as for `PoissonSampler`, in users. Attributes: also num_examples and examples_per_user.
    Raises ValueError for bad input.
    """

    def __init__(
        self,
        user_ids: Sequence[Hashable],
        *,
        steps: int,
        sample_rate: float | None = None,
        expected_batch_size: float | None = None,
        examples_per_user: int | None = None,
        seed: int | None = None,
    ) -> None:
        if examples_per_user is not None:
            _check_count("examples_per_user", examples_per_user)
        unit = _dense(user_ids)
        super().__init__(
            int(unit.max()) + 1,
            steps=steps,
            sample_rate=sample_rate,
            expected_batch_size=expected_batch_size,
            seed=seed,
        )
        self.num_examples = len(unit)
        self.examples_per_user = None if examples_per_user is None else int(examples_per_user)
        self._unit = unit
        self._by_user = np.argsort(unit, kind="stable")
        self._offsets = np.concatenate([[0], np.cumsum(np.bincount(unit))])

    def unit_of(self, indices: Sequence[int]) -> torch.Tensor:
        """The dense ids, in [0, num_units), of the users who own these examples: int64 [B]. Raises ValueError."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.num_examples:
            raise ValueError(
                f"indices reach from {wanted.min()} to {wanted.max()}; there are {self.num_examples} examples"
            )
        return torch.from_numpy(self._unit[wanted])

    def _drawn(self, words: "_Words") -> tuple[list[int], int]:
        indices: list[int] = []
        users = words.bernoulli(self.num_units, self.sample_rate)
        for user in users:
            owned = self._by_user[self._offsets[user] : self._offsets[user + 1]]
            if self.examples_per_user is not None and len(owned) > self.examples_per_user:
                owned = np.sort(owned[np.argsort(words.take(len(owned)), kind="stable")[: self.examples_per_user]])
            indices.extend(owned.tolist())
        return indices, len(users)


class _Words:
    """The 64-bit words of one draw."""

    def __init__(self, key: bytes, draw: int) -> None:
        # The first half of the nonce is the block counter, which must start at 0; the second half is unique to the draw.
        nonce = bytes(8) + draw.to_bytes(8, "little")
        self._cipher = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()

    def take(self, count: int) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")

    def bernoulli(self, count: int, probability: float) -> npt.NDArray[np.int64]:
        """The places in [0, count) that come up, each independently with `probability`."""
        # Scaling by a power of two is exact in floating point, and int() rounds down.
        threshold = int(probability * 2.0**64)
        if threshold == 2**64:
            return np.arange(count)
        chunks = [
            start + np.flatnonzero(self.take(min(_CHUNK, count - start)) < np.uint64(threshold))
            for start in range(0, count, _CHUNK)
        ]
        return np.concatenate(chunks)


class PoissonLoader:
    """Iterates over the collated examples of each draw, with `current_draw` following the loop.

    Worker processes fetch draws ahead, so that the sampler's own `current_draw` runs ahead as well; the loader's is the
    id of the batch that the loop holds. Draws that were fetched ahead when a loop is left early are lost: their ids
    never come again.

    An empty draw gives a batch like that of one example with every tensor cut to length 0 in its first dimension, so
    that types and trailing shapes are right; the first example is collated once to learn them. Tensors without
    dimensions stay; lists and tuples of tensors are taken for fields, other ones for the batch and come empty.

    dataset: maps an index to an example. collate_fn: list of examples to batch; by default torch's.
    options: further arguments of `torch.utils.data.DataLoader`, but none about which examples come when.
    Attributes: sampler; current_draw, current_indices (the draw's example indices), current_units (how many units were
    drawn) and previous_draw (the draw before it in the same loop), None before the first batch.
    Raises ValueError for bad input.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        sampler: PoissonSampler,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
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
        self._dataset = dataset
        self.sampler = sampler
        self._collate = _Collate(default_collate if collate_fn is None else collate_fn, dataset[0])
        self._options = {"num_workers": num_workers, **options}
        self.current_draw: int | None = None
        self.current_indices: list[int] | None = None
        self.current_units: int | None = None
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

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        ahead: deque[tuple[int | None, list[int], int | None]] = deque()
        batches: DataLoader[Any] = DataLoader(
            self._dataset,  # type: ignore[arg-type]
            batch_sampler=_Noted(self.sampler, ahead),
            collate_fn=self._collate,
            **self._options,
        )
        # Batches come back in the order in which their indices went out.
        previous = None
        for batch in batches:
            self.current_draw, self.current_indices, self.current_units = ahead.popleft()
            self.previous_draw, previous = previous, self.current_draw
            yield batch


class _Noted(Sampler[list[int]]):
    """The sampler's draws, each noted down as it is made."""

    def __init__(self, sampler: PoissonSampler, ahead: deque[tuple[int | None, list[int], int | None]]) -> None:
        self._sampler = sampler
        self._ahead = ahead

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self._sampler:
            self._ahead.append((self._sampler.current_draw, indices, self._sampler.current_units))
            yield indices


class _Collate:
    """A collate function that also takes no examples."""

    def __init__(self, collate: Callable[[list[Any]], Any], example: Any) -> None:
        self._collate = collate
        self._empty = _emptied(collate([example]))

    def __call__(self, examples: list[Any]) -> Any:
        # The empty batch is built anew each time, because loops take fields out of what they get.
        return self._collate(examples) if examples else _emptied(self._empty)


def _emptied(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[:0] if batch.dim() else batch
    if isinstance(batch, MutableMapping):
        empty = copy.copy(batch)
        for name in batch:
            empty[name] = _emptied(batch[name])
        return empty
    if isinstance(batch, list | tuple):
        if not all(isinstance(field, torch.Tensor | MutableMapping | list | tuple) for field in batch):
            return type(batch)()
        fields = [_emptied(field) for field in batch]
        return type(batch)(*fields) if hasattr(batch, "_fields") else type(batch)(fields)
    return batch


def physical_batches(
    indices: Sequence[int],
    sizes: Sequence[int] | None = None,
    *,
    max_examples: int | None = None,
    max_tokens: int | None = None,
    units: Sequence[int] | torch.Tensor | None = None,
) -> list[list[int]]:
    """Split one draw into batches that fit into memory; an empty draw gives none.

    indices: the draw's example indices, [B]. sizes: for each of them the public length bucket it is padded to, [B].
    max_examples: the most examples in a batch. max_tokens: the most padded tokens, which is examples times bucket.
    units: for each of them the unit it belongs to, [B]; every unit then stays whole, because clipping needs all of it
    at once, and its examples are padded to the largest bucket among them.

    Every batch holds one bucket only, so that no unit is padded to another's length (a longer padding changes bf16
    gradients). The largest bucket comes first, so that too little memory shows at once.

    Raises ValueError for bad input and when one unit alone exceeds a limit.
    """
    for name, limit in (("max_examples", max_examples), ("max_tokens", max_tokens)):
        if limit is not None:
            _check_count(name, limit)
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
        whole.setdefault(owner, []).append(index)
        width_of[owner] = max(width, width_of.get(owner, 0))

    batches: list[list[int]] = []
    for width in sorted(set(width_of.values()), reverse=True):
        _check_count("sizes", width)
        room = min(max_examples or len(indices), max_tokens // width if max_tokens else len(indices))
        batches.append([])
        for owner, examples in whole.items():
            if width_of[owner] != width:
                continue
            if len(examples) > room:
                raise ValueError(
                    f"a unit with {len(examples)} examples in bucket {width} exceeds max_examples={max_examples!r} or "
                    f"max_tokens={max_tokens!r}, and a unit cannot be split; raise the limit, or lower examples_per_user "
                    "or the longest bucket"
                )
            if len(batches[-1]) + len(examples) > room:
                batches.append([])
            batches[-1].extend(examples)
    return batches


def length_bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest public bucket that holds `length` tokens.

    buckets: lengths in growing order. What fits none has to be refused or truncated to the last by the caller, by a
    rule that looks at this unit alone. Raises ValueError when none holds it.
    """
    if not buckets or any(low >= high for low, high in pairwise(buckets)) or buckets[0] < 1:
        raise ValueError(f"buckets={list(buckets)!r} are not positive lengths in growing order; sort them")
    if length < 0:
        raise ValueError(f"length={length!r} is negative; give a number of tokens")
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise ValueError(f"length={length!r} exceeds the last bucket of {buckets[-1]}; truncate it or add a bucket")


def _dense(user_ids: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Users numbered from 0 in order of first appearance, one number per example."""
    # Elements of tensors are tensors again, which are equal to nothing but themselves: every example its own user.
    listed = user_ids.tolist() if isinstance(user_ids, torch.Tensor | np.ndarray) else list(user_ids)
    if not listed:
        raise ValueError("user_ids is empty; give one id per example")
    numbers: dict[Hashable, int] = {}
    for place, user in enumerate(listed):
        if isinstance(user, torch.Tensor) or not isinstance(user, Hashable) or user != user:
            raise ValueError(f"user_ids[{place}]={user!r} cannot be compared with others; give ints or strings")
        numbers.setdefault(user, len(numbers))
    return np.array([numbers[user] for user in listed], dtype=np.int64)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r} is not a whole number of at least 1; give an int")


def _check_within(name: str, value: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= most:
        raise ValueError(f"{name}={value!r} is not above 0 and at most {most}")


_LIVE: "weakref.WeakSet[PoissonSampler]" = weakref.WeakSet()


def _rekey_all() -> None:
    for sampler in list(_LIVE):
        sampler._take_key()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_rekey_all)
