"""Who is measured when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turn(competitors: Sequence[T], number: int) -> list[T]:
    """Their order in this round: nobody always follows the same one, which may leave the machine slow or fast."""
    first = number % len(competitors) if competitors else 0
    return [*competitors[first:], *competitors[:first]]
