"""What the process holds of memory that nobody uses."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone


def give_back() -> None:
    """Give freed blocks back to the system, where the C library would keep them for later."""
    trim = _trim()
    if trim is not None:
        trim(0)
