"""``out = round(sum_u c_u G_u + std z)`` of per-unit gradients that stand there whole: scale, sum and noise in one read.

G: ``[U, P]``, factors c: ``[U]``, out: fp32, bf16 or fp16 ``[P]``. 2 U P FLOPs and P normals; reads U P elements and writes P.
Units are added in their order, in fp64, and the noisy sum is rounded once. Units of factor 0 are left out: their inf and NaN
stay with them.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.clipped_sum import check_whole, clipped_columns
from fastclip.kernels.configs import Signature, form
from fastclip.kernels.dtypes import refuse_interpreted_bf16
from fastclip.kernels.rounding import round_once
from fastclip.kernels.stream import (
    BLOCKS,
    UNSPECIALIZED,
    check_apart,
    draw,
    elements,
    programs,
    refuse_capture,
    stream_arguments,
)
from torch import Tensor

_TOGETHER = 4


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "num_units"])
def _clip_accumulate_noise_kernel(
    out_ptr,
    grads_ptr,
    factors_ptr,
    num_units,
    n: tl.int64,
    skip: tl.int32,
    std: tl.float64,
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
    TOGETHER: tl.constexpr,
):
    at = elements(skip, BLOCKS)
    mask = (at >= 0) & (at < n)
    total = clipped_columns(grads_ptr, factors_ptr, num_units, n, at, mask, 8 * BLOCKS, TOGETHER)
    z = draw(key0, key1, key2, key3, key4, key5, key6, key7, nonce_low, nonce_high, block, SEEDED, BLOCKS)
    tl.store(out_ptr + at, round_once(total + z * std, out_ptr.dtype.element_ty), mask=mask)


def clip_accumulate_noise(
    grad_samples: list[Tensor],
    factors: Tensor,
    outs: list[Tensor],
    std: float,
    scale: float,
    key: Tensor,
    nonce: int,
    blocks: list[int],
    skips: list[int],
) -> None:
    """Writes each of outs from grad_samples ``[U, *out.shape]``; tensor k starts at element skips[k] of block blocks[k].

    scale: 1. Raises ValueError, before anything is written, on what does not fit, RuntimeError while a CUDA graph is captured.
    """
    if scale != 1:
        raise ValueError(f"scale must be 1, got {scale}")
    if not len(grad_samples) == len(outs) == len(blocks) == len(skips):
        raise ValueError("grad_samples, outs, blocks and skips must be as many")
    refuse_interpreted_bf16(_clip_accumulate_noise_kernel, *grad_samples, *outs)
    samples = [x.contiguous() for x in grad_samples]
    factors = factors.double().contiguous()
    for x, out in zip(samples, outs, strict=True):
        refuse_capture(out)
        check_whole(x, factors, out)
        if out.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"outs must be fp32, bf16 or fp16, got {out.dtype}; rounding hides the noise's own grid")
    check_apart(outs, [*samples, factors])
    arguments = [stream_arguments(key, nonce, block, skip) for block, skip in zip(blocks, skips, strict=True)]
    for x, out, more in zip(samples, outs, arguments, strict=True):
        if out.numel():
            _clip_accumulate_noise_kernel[programs(out.numel(), more["skip"])](
                out,
                x,
                factors,
                factors.numel(),
                out.numel(),
                std=std,
                TOGETHER=_TOGETHER,
                enable_fp_fusion=False,
                **more,
            )


def signatures() -> list[Signature]:
    return [
        form(
            _clip_accumulate_noise_kernel,
            "clip_accumulate_noise bf16",
            {"out_ptr": "*fp32", "grads_ptr": "*bf16", "factors_ptr": "*fp64"},
            {"SEEDED": 0, "BLOCKS": BLOCKS, "TOGETHER": _TOGETHER},
            sizes={"n", "skip"},
            enable_fp_fusion=False,
        )
    ]
