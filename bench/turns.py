"""Who is measured when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turn(competitors: Sequence[T], number: int) -> list[T]:
    """Their order in this round: each follows each other one equally often over as many rounds as there are, or twice as many.

    What a step leaves behind, a processor that may run faster or has to run slower, would else always meet the same one.
    Source: Williams, Experimental designs balanced for the estimation of residual effects of treatments, 1949.
    """
    count = len(competitors)
    zigzag = [(k + 1) // 2 if k % 2 else -(k // 2) for k in range(count)]  # 0, 1, -1, 2, -2, ...
    order = [competitors[(place + number) % count] for place in zigzag]
    return order[::-1] if number // max(count, 1) % 2 else order
