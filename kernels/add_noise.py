"""``out = round((sum + std z) scale)``, z from the noise stream, formed in fp64 and rounded once.

sum: fp32 or fp64 ``[n]``, out: fp32, bf16 or fp16 ``[n]``. An element costs 8 bytes of keystream and about 130 fp64 operations
a pair; memory moves 8 bytes in fp32.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.configs import Signature, form
from fastclip.kernels.dtypes import refuse_interpreted_bf16
from fastclip.kernels.rounding import round_once
from fastclip.kernels.stream import BLOCKS, UNSPECIALIZED, draw, elements, programs, refuse_capture, stream_arguments
from torch import Tensor


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _add_noise_kernel(
    out_ptr,
    sum_ptr,
    n: tl.int64,
    skip: tl.int32,
    std: tl.float64,
    scale: tl.float64,
    key0: tl.uint32,
    key1: tl.uint32,
    key2: tl.uint32,
    key3: tl.uint32,
    key4: tl.uint32,
    key5: tl.uint32,
    key6: tl.uint32,
    key7: tl.uint32,
    nonce_low: tl.uint32,
    nonce_high: tl.uint32,
    block: tl.uint64,
    SEEDED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    at = elements(skip, BLOCKS)
    mask = (at >= 0) & (at < n)
    z = draw(key0, key1, key2, key3, key4, key5, key6, key7, nonce_low, nonce_high, block, SEEDED, BLOCKS)
    clean = tl.load(sum_ptr + at, mask=mask, other=0.0).to(tl.float64)
    tl.store(out_ptr + at, round_once((clean + z * std) * scale, out_ptr.dtype.element_ty), mask=mask)


def add_noise(
    grad_sum: Tensor, out: Tensor, std: float, scale: float, key: Tensor, nonce: int, block: int, skip: int
) -> None:
    """Writes out ``[n]``, which may be grad_sum itself. key: uint8 ``[32]`` on the CPU; nonce, block: 64 bits.

    Raises ValueError on dtypes, layouts and sizes that do not fit, RuntimeError while a CUDA graph is captured.
    """
    refuse_interpreted_bf16(_add_noise_kernel, out)
    refuse_capture(out)
    if grad_sum.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"grad_sum must be fp32 or fp64, got {grad_sum.dtype}; accumulate in fp32")
    if out.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"out must be fp32, bf16 or fp16, got {out.dtype}; rounding hides the noise's own grid")
    if not (grad_sum.is_contiguous() and out.is_contiguous() and grad_sum.numel() == out.numel()):
        raise ValueError("grad_sum and out must be contiguous and of one size")
    arguments = stream_arguments(key, nonce, block, skip)
    if out.numel():
        _add_noise_kernel[programs(out.numel(), skip)](
            out, grad_sum, out.numel(), std=std, scale=scale, enable_fp_fusion=False, **arguments
        )


def signatures() -> list[Signature]:
    return [
        form(
            _add_noise_kernel,
            f"add_noise {dtype}",
            {"out_ptr": f"*{dtype}", "sum_ptr": "*fp32"},
            {"SEEDED": 0, "BLOCKS": BLOCKS},
            sizes={"n", "skip"},
            enable_fp_fusion=False,
        )
        for dtype in ("fp32", "bf16")
    ]
