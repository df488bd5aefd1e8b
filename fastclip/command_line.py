"""What the subcommands share: how they answer, and how they complain."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def answer(as_json: bool, values: dict[str, Any], text: str) -> None:
    """Print one or the other."""
    print(json.dumps(values) if as_json else text)


@contextmanager
def complaints() -> Iterator[None]:
    """Turns a ValueError into one line on standard error and exit code 2."""
    try:
        yield
    except ValueError as error:
        print(f"fastclip: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
