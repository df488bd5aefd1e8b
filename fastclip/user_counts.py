"""How many examples each user has, from a table of counts or from a data set in a file."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

_COUNT_COLUMNS = ("count", "counts", "examples", "num_examples")


def read_counts(path: Path, user_column: str) -> npt.NDArray[np.int64]:
    """Each user's number of examples, `[N]`, and nothing else of the file.

    A .csv is a table of counts where it has a column `count` (or `counts`, `examples`, `num_examples`; one row a user) or
    nothing but numbers, one a line. Any other .csv, .jsonl or .parquet file is a data set: one row an example, `user_column`
    tells whose.

    Raises ValueError with the remedy for a file that is neither.
    """
    if not path.is_file():
        raise ValueError(f"users {path} does not exist: give a .csv, .jsonl or .parquet file")
    if path.suffix == ".parquet":
        return _from_parquet(path, user_column)
    if path.suffix in (".jsonl", ".json"):
        owners = Counter(_jsonl_users(path, user_column))
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines)
            header = next(rows, [])
            if len(header) == 1 and _is_number(header[0]):
                return np.array([_whole(header[0], path, 1), *_column(rows, 0, path, first=2)])
            counted = [name for name in header if name.strip().lower() in _COUNT_COLUMNS]
            if len(counted) > 1:
                raise ValueError(f"users {path} has several columns of counts ({', '.join(counted)}): keep one")
            if counted:
                return np.array(_column(rows, header.index(counted[0]), path, first=2))
            if user_column not in header:
                raise ValueError(_no_column(path, user_column, header))
            owners = Counter(_csv_users(rows, header.index(user_column), path, user_column))
    else:
        raise ValueError(f"users {path} has the ending {path.suffix!r}: give a .csv, .jsonl or .parquet file")
    if not owners:
        raise ValueError(f"users {path} has no rows: give a file with at least one")
    return np.fromiter(owners.values(), np.int64)


def _from_parquet(path: Path, user_column: str) -> npt.NDArray[np.int64]:
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"users {path} is not a Parquet file: give one, or a .csv or .jsonl file") from error
    if user_column not in names:
        raise ValueError(_no_column(path, user_column, names))
    column = pyarrow.parquet.read_table(path, columns=[user_column]).column(0)
    if column.null_count or not len(column):
        raise ValueError(f"user column {user_column!r} of {path} is empty in {column.null_count} of {len(column)} rows")
    counts: npt.NDArray[np.int64] = pyarrow.compute.value_counts(column).field("counts").to_numpy(zero_copy_only=False)
    return counts


def _jsonl_users(path: Path, user_column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"users {path}, line {number}, is not JSON: give one object a line") from error
            if not isinstance(record, dict) or record.get(user_column) is None:
                names = list(record) if isinstance(record, dict) else []
                raise ValueError(f"line {number}: {_no_column(path, user_column, names)}")
            yield str(record[user_column])


def _csv_users(rows: Iterator[list[str]], place: int, path: Path, user_column: str) -> Iterator[str]:
    for number, row in enumerate(rows, 2):
        if row and (len(row) <= place or not row[place]):
            raise ValueError(f"user column {user_column!r} of {path} is empty in line {number}: remove that row")
        if row:
            yield row[place]


def _column(rows: Iterator[list[str]], place: int, path: Path, *, first: int) -> list[int]:
    return [_whole(row[place] if place < len(row) else "", path, i) for i, row in enumerate(rows, first) if row]


def _whole(text: str, path: Path, line: int) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"users {path}, line {line}: {text!r} is no number of examples; give whole numbers") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _no_column(path: Path, user_column: str, names: list[str]) -> str:
    return (
        f"users {path} has no user in {user_column!r} (columns: {', '.join(names)}): name the column with --user-column, "
        "or give a .csv with a column count"
    )
