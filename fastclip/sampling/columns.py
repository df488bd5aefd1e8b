"""A column of user ids from wherever it stands, piece by piece, as numbers.

Every source becomes pieces of at most `_CHUNK` ids, each numbered through one dictionary of all ids so far. What is in
memory at a time is a piece and the dictionary, which grows with the users and not with the examples. pyarrow and
datasets are asked for only where the source is theirs.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

_CHUNK = 2**20
_MOST_USERS = 2**31 - 1

Column = Sequence[Hashable] | torch.Tensor | npt.NDArray[Any] | str | os.PathLike[str] | Any
Numbers = npt.NDArray[np.int32]


def chunks_of(users: Any, column: str | None) -> tuple[int, Iterator[Numbers]]:
    """How many ids there are, and the users' numbers, in order of first appearance, piece by piece.

    Raises ValueError, some of it only when pieces are taken; see `UserIndex.build`.
    """
    named = isinstance(users, str | os.PathLike) or hasattr(users, "column_names")
    if named != (column is not None):
        what = "needs the name of its column of users" if named else "has no columns to choose from"
        raise ValueError(f"column={column!r}, but users ({type(users).__name__}) {what}; give column= for tables only")
    count: int
    pieces: Iterator[Any]
    if isinstance(users, str | os.PathLike):
        count, pieces = _file(Path(users), str(column))
    elif column is not None:
        _check_column(column, users.column_names, type(users).__name__)
        count, pieces = len(users), _table(users, column)
    elif type(users).__module__.startswith("pyarrow"):
        count, pieces = len(users), (users[at : at + _CHUNK] for at in range(0, len(users), _CHUNK))
    else:
        listed = users if hasattr(users, "__getitem__") else list(users)
        count, pieces = len(listed), _listed(listed)
    if not count:
        raise ValueError("user_ids is empty; give one id per example")
    return count, _numbered(pieces)


def _unequal_to_itself(value: Any) -> bool:
    if isinstance(value, tuple):  # which compares what it holds by identity first
        return any(_unequal_to_itself(part) for part in value)
    return isinstance(value, torch.Tensor) or bool(value != value)


_NOBODY = ": rows of nobody protect nobody; name their users or drop them"


def _numbered(pieces: Iterator[Any]) -> Iterator[Numbers]:
    numbers: dict[Hashable, int] = {}
    start = 0
    for piece in pieces:
        if isinstance(piece, list):
            values, codes, size = piece, None, len(piece)
        else:
            values, codes, size = _encoded(piece, start)
        known = len(numbers)
        try:
            dense = [numbers.setdefault(value, len(numbers)) for value in values]
        except TypeError:
            _refuse(start, next(place for place, value in enumerate(values) if not _hashable(value)), values)
        for value in islice(numbers, known, None):
            if value is None:
                raise ValueError(f"user_ids[{start + values.index(None)}] is missing{_NOBODY}")
            # Equal to nothing but themselves, each would be its own user.
            if _unequal_to_itself(value):
                _refuse(start, next(place for place, each in enumerate(values) if each is value), values)
        if len(numbers) > _MOST_USERS:
            raise ValueError(f"there are more than {_MOST_USERS} users; fewer fit into an index")
        local = np.array(dense, dtype=np.int32)
        yield local if codes is None else local[codes]
        start += size


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _refuse(start: int, place: int, values: list[Any]) -> NoReturn:
    raise ValueError(
        f"user_ids[{start + place}]={values[place]!r} cannot be compared with others; give ints or strings"
    ) from None


def _encoded(piece: Any, start: int) -> tuple[list[Any], npt.NDArray[Any], int]:
    """The different values of a pyarrow array, and for each element which of them it is."""
    import pyarrow as pa

    array = piece.combine_chunks() if isinstance(piece, pa.ChunkedArray) else piece
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if array.null_count:
        first = next(place for place, missing in enumerate(array.is_null().to_pylist()) if missing)
        raise ValueError(f"user_ids[{start + first}] is missing{_NOBODY}")
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False), len(array)


def _listed(users: Any) -> Iterator[list[Any]]:
    for start in range(0, len(users), _CHUNK):
        piece = users[start : start + _CHUNK]
        # Elements of tensors are tensors again, which are equal to nothing but themselves.
        yield piece.tolist() if isinstance(piece, torch.Tensor | np.ndarray) else list(piece)


def _table(users: Any, column: str) -> Iterator[Any]:
    if hasattr(users, "with_format"):
        # A Hugging Face data set: its rows may be a selection of the table's, which only itself knows.
        users = users.select_columns([column]).with_format("arrow")
        for start in range(0, len(users), _CHUNK):
            yield users[start : start + _CHUNK][column]
    else:
        for start in range(0, len(users), _CHUNK):
            yield users[column][start : start + _CHUNK]


def _file(path: Path, column: str) -> tuple[int, Iterator[Any]]:
    if not path.is_file():
        raise ValueError(f"users={str(path)!r} is no file; give the path of a Parquet or Arrow file")
    import pyarrow as pa
    from pyarrow import ipc, parquet

    with path.open("rb") as file:
        magic = file.read(6)
    if magic[:4] == b"PAR1":
        table = parquet.ParquetFile(path, memory_map=True)
        _check_column(column, table.schema_arrow.names, str(path))
        rows = table.iter_batches(batch_size=_CHUNK, columns=[column])
        return table.metadata.num_rows, (batch.column(0) for batch in rows)
    # A file of the random-access form says so in its first bytes; what datasets writes is a stream.
    opened = ipc.open_file if magic == b"ARROW1" else ipc.open_stream
    try:
        names = opened(pa.memory_map(str(path))).schema.names
    except pa.ArrowInvalid as error:
        raise ValueError(f"users={str(path)!r} is neither a Parquet nor an Arrow file ({error}); convert it") from None
    _check_column(column, names, str(path))
    options = ipc.IpcReadOptions(included_fields=[names.index(column)])
    table = opened(pa.memory_map(str(path)), options=options).read_all()  # mapped, not read
    return len(table), _table(table, column)


def _check_column(column: str, names: Sequence[str], where: str) -> None:
    if column not in names:
        raise ValueError(f"column={column!r} is not in {where}; its columns are {list(names)}")
