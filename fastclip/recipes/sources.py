"""A recipe's data: from the Hugging Face hub by its name, or from files of the same columns in a folder.

The same checks for both, before anything is trained: every column there, no value missing, every label a known class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastclip.finetune.data import records_of
from fastclip.recipes.settings import Settings, Source

_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")

Rows = list[dict[str, Any]]


def load(settings: Settings, split: str) -> Rows:
    """One split, as a list of rows that have all of the source's columns. ValueError with the remedy otherwise."""
    source = settings.source
    where = f"{source.name} ({split})" if settings.data is None else f"{settings.data} ({split})"
    rows = _from_hub(source, split) if settings.data is None else _from_folder(Path(settings.data), split, source)
    if not rows:
        raise ValueError(f"{where} is empty: give at least one row")
    missing = [name for name in source.columns if name not in rows[0]]
    if missing:
        raise ValueError(
            f"{where} has no column {missing[0]!r} (columns: {', '.join(rows[0])}): give data with the columns "
            f"{', '.join(source.columns)}"
        )
    if source.owner is not None:
        rows = [row for row in rows if row[source.owner] is not None]
    for place, row in enumerate(rows):
        for name in source.columns:
            if row.get(name) is None:
                raise ValueError(
                    f"{where}, row {place + 1}, has nothing in column {name!r}: fill it in or drop the row"
                )
    return rows


def check_texts(rows: Rows, columns: Sequence[str], split: str) -> None:
    """ValueError, naming the row, where all of these columns are blank."""
    for place, row in enumerate(rows):
        if not any(str(row[name]).strip() for name in columns):
            raise ValueError(f"row {place + 1} of {split!r} has no text in {', '.join(columns)}: drop it")


def labels(rows: Rows, classes: int, split: str) -> list[int]:
    """The column "label" as class numbers. ValueError, naming the row, for one outside the set."""
    found = []
    for place, row in enumerate(rows):
        try:
            label = int(row["label"])
        except (TypeError, ValueError):
            label = -1
        if not 0 <= label < classes or label != float(row["label"]):
            raise ValueError(
                f"row {place + 1} of {split!r} has label {row['label']!r}, which is none of the {classes} classes 0 to "
                f"{classes - 1}: correct it or drop the row"
            )
        found.append(label)
    return found


def _from_hub(source: Source, split: str) -> Rows:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{source.name} is read by the package datasets: pip install datasets") from error
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(source.name, source.config, split=split, revision=source.revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the data set {source.name} cannot be had from the hub ({reason}): connect and unset HF_HUB_OFFLINE, or give "
            f"--data FOLDER with {_file(source.train)}.jsonl and {', '.join(f'{_file(s)}.jsonl' for s in source.held_out)}, "
            f"columns {', '.join(source.columns)} (.csv and .parquet are read too)"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    return list(table.select_columns([name for name in source.columns if name in table.column_names]))


def _from_folder(folder: Path, split: str, source: Source) -> Rows:
    found = [
        folder / f"{_file(split)}{ending}" for ending in _ENDINGS if (folder / f"{_file(split)}{ending}").is_file()
    ]
    if len(found) != 1:
        what = "none" if not found else " and ".join(path.name for path in found)
        raise ValueError(
            f"data {folder} must have one file {_file(split)} with the ending {', '.join(_ENDINGS)}, and has {what}: put "
            f"the split there, with the columns {', '.join(source.columns)}"
        )
    return records_of(found[0])


def _file(split: str) -> str:
    """A slice of a split, as `datasets` writes it, is in the file of the whole."""
    return split.partition("[")[0]
