"""What launchers share about dtypes."""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction


def narrow_dtype(dtype: torch.dtype) -> tl.dtype:
    """What rows of ``dtype`` are widened to before arithmetic: fp64 for fp64, fp32 for everything narrower."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def refuse_interpreted_bf16(kernel: Any, *tensors: Tensor | None) -> None:
    """ValueError for bf16 under Triton's interpreter, which computes on bf16's bits and truncates where it rounds."""
    if isinstance(kernel, JITFunction):
        return
    if any(x is not None and x.dtype == torch.bfloat16 for x in tensors):
        raise ValueError("bf16 cannot run in Triton's interpreter; pass fp32 or fp16, or use a GPU")
