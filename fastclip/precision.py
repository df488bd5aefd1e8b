"""What torch may not round while norms and sums are formed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, whatever the user chose for the model's own: norms and sums count on it."""
    # The attributes that both of torch's interfaces set; its older getter raises once the newer one was used.
    kinds = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    chosen = [(kind, kind.fp32_precision) for kind in kinds if kind.fp32_precision not in ("ieee", "none")]
    for kind, _ in chosen:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, precision in chosen:
            kind.fp32_precision = precision
