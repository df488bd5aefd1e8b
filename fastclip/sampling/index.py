"""Who owns which examples, in three arrays that may lie on disk.

Guarantees and edge cases:

- Two examples belong to one user exactly when their ids are equal. Users are numbered through a dictionary of the ids
  themselves, so that hashes that coincide merge nobody. Users are numbered in order of first appearance.
- Every user owns an example: users without any cannot be expressed.
- An index on disk comes into being under its name when it is complete. It holds numbers and no ids, and is as private as
  the data: it tells how much everybody owns.
- Indices are immutable. One on disk is pickled and copied as its path, so it must not be replaced while in use.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastclip.sampling.columns import Column, chunks_of
from fastclip.sampling.words import Int64s

_FORMAT = 1
_CHUNK = 2**20
_HEADER = "index.json"
_ARRAYS = ("user_of", "by_user", "offsets")

Ints = npt.NDArray[np.integer[Any]]


class UserIndex:
    """The examples of each user; made by `build` or `open`.

    num_users, num_examples: how many there are. user_of: int32 [num_examples], the user of each example. by_user: int32
    (int64 from 2^31 examples on) [num_examples], examples grouped by user, in growing order in each group. offsets:
    int64 [num_users + 1]; user u owns by_user[offsets[u]:offsets[u + 1]]. path: where it lies; None in memory.
    """

    def __init__(self, user_of: Ints, by_user: Ints, offsets: Int64s, path: Path | None = None) -> None:
        self.user_of, self.by_user, self.offsets, self.path = user_of, by_user, offsets, path
        self.num_examples, self.num_users = len(user_of), len(offsets) - 1
        for array in (user_of, by_user, offsets):
            array.flags.writeable = False

    @classmethod
    def build(
        cls, users: Column, path: str | os.PathLike[str] | None = None, *, column: str | None = None
    ) -> UserIndex:
        """Number the users and group their examples.

        users: the user of every example, in the order of the data set. A sequence of ids (list, tensor, numpy or pyarrow
        array); or a table and the name of its `column`: the path of a Parquet or Arrow file, a pyarrow Table, or a
        Hugging Face data set. Files are read piece by piece. path: a directory to make, for an index that need not fit
        into memory; in memory if None.

        Raises ValueError for ids that cannot be compared, a table without that column, missing ids in a table, no example
        at all, more than 2^31 - 1 users, and a path that exists.
        """
        if path is None:
            return cls._built(users, column, lambda name, dtype, size: np.empty(size, dtype), None)
        final = Path(path)
        if final.exists():
            raise ValueError(f"path={str(path)!r} exists; give a new one, or use UserIndex.open")
        final.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))

        def on_disk(name: str, dtype: npt.DTypeLike, size: int) -> npt.NDArray[Any]:
            return np.lib.format.open_memmap(part / f"{name}.npy", mode="w+", dtype=dtype, shape=(size,))

        try:
            made = cls._built(users, column, on_disk, part)
            for name in _ARRAYS:
                getattr(made, name).flush()
            header = {"fastclip_user_index": _FORMAT, "num_users": made.num_users, "num_examples": made.num_examples}
            (part / _HEADER).write_text(json.dumps(header) + "\n", encoding="utf-8")
            part.rename(final)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return cls.open(final)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> UserIndex:
        """The index that `build` made there, mapped and not read. ValueError if there is none, or none of this form."""
        found = Path(path)
        try:
            header = json.loads((found / _HEADER).read_text(encoding="utf-8"))
            user_of, by_user, offsets = (np.load(found / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"path={str(path)!r} holds no user index ({error}); make it with UserIndex.build"
            ) from None
        counted = {"num_users": len(offsets) - 1, "num_examples": len(user_of)}
        if header != {"fastclip_user_index": _FORMAT, **counted} or len(by_user) != len(user_of):
            raise ValueError(f"path={str(path)!r} is of another version or damaged ({header}); make it again")
        return cls(user_of, by_user, offsets, found.resolve())

    @classmethod
    def _built(
        cls,
        users: Column,
        column: str | None,
        new: Callable[[str, npt.DTypeLike, int], npt.NDArray[Any]],
        path: Path | None,
    ) -> UserIndex:
        count, chunks = chunks_of(users, column)
        user_of = new("user_of", np.int32, count)
        owned = np.zeros(0, dtype=np.int64)
        end = 0
        for chunk in chunks:
            user_of[end : end + len(chunk)] = chunk
            counts = np.bincount(chunk, minlength=len(owned))
            counts[: len(owned)] += owned
            owned, end = counts, end + len(chunk)
        offsets = new("offsets", np.int64, len(owned) + 1)
        offsets[0] = 0
        np.cumsum(owned, out=offsets[1:])
        by_user = new("by_user", np.int32 if count < 2**31 else np.int64, count)
        # Where the next example of each user goes.
        following = offsets[:-1].copy()
        for start in range(0, count, _CHUNK):
            chunk = np.asarray(user_of[start : start + _CHUNK])
            order = np.argsort(chunk, kind="stable")
            owners, first, repeats = np.unique(chunk[order], return_index=True, return_counts=True)
            place = np.arange(len(chunk)) - np.repeat(first, repeats)
            by_user[np.repeat(following[owners], repeats) + place] = start + order
            following[owners] += repeats
        return cls(user_of, by_user, offsets, path)

    @property
    def most(self) -> int:
        """The most examples that a user owns; private."""
        return int(np.diff(self.offsets).max())

    def checksum(self) -> int:
        """Tells indices apart by what they hold."""
        return zlib.crc32(self.user_of.data)

    def __repr__(self) -> str:
        return f"UserIndex({self.num_users} users, {self.num_examples} examples, {self.path or 'in memory'})"

    def __copy__(self) -> UserIndex:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> UserIndex:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return UserIndex.open, (self.path,)
        return UserIndex, (self.user_of, self.by_user, self.offsets)
