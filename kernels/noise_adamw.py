"""Noise and torch's AdamW in one pass over memory, for lists of fp32 parameters.

    g = round((grad + std z) scale)        formed in fp64, rounded to fp32 once; grad holds it afterwards
    m += (1 - beta1) (g - m)               v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr wd) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)        t: the step, from 1

Reads param, grad, m and v and writes them, 32 bytes an element. The order of operations is that of csrc/cpu/noise_step.cpp and
nothing is contracted: the same bits. Rates are arguments and no constants, so that a schedule compiles nothing.
"""

import math

import triton
import triton.language as tl
from fastclip.kernels.configs import Signature, form
from fastclip.kernels.steps import RATES, launches
from fastclip.kernels.stream import BLOCKS, UNSPECIALIZED, draw, elements, programs
from torch import Tensor


@triton.jit(do_not_specialize=[*UNSPECIALIZED, *RATES])
def _noise_adamw_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    n: tl.int64,
    skip: tl.int32,
    std: tl.float64,
    scale: tl.float64,
    keep: tl.float32,
    beta1_rest: tl.float32,
    beta2: tl.float32,
    beta2_rest: tl.float32,
    root_correction: tl.float32,
    eps: tl.float32,
    rate: tl.float32,
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
    g = ((tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float64) + z * std) * scale).to(tl.float32)
    m = tl.load(exp_avg_ptr + at, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0)
    p = tl.load(param_ptr + at, mask=mask, other=0.0) * keep
    m += (g - m) * beta1_rest
    v = v * beta2 + g * beta2_rest * g
    # Triton's own fp32 division and root are approximate.
    root = tl.div_rn(tl.sqrt_rn(v), tl.full([8 * BLOCKS], root_correction, tl.float32))
    p -= tl.div_rn(m * rate, root + eps)
    tl.store(grad_ptr + at, g, mask=mask)
    tl.store(exp_avg_ptr + at, m, mask=mask)
    tl.store(exp_avg_sq_ptr + at, v, mask=mask)
    tl.store(param_ptr + at, p, mask=mask)


def noise_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    std: float,
    scale: float,
    key: Tensor,
    nonce: int,
    blocks: list[int],
    skips: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    steps: list[int],
) -> None:
    """Updates all lists in place; parameter k's noise starts at element skips[k] of block blocks[k].

    Raises ValueError, before anything is written, unless all are contiguous fp32, a parameter's of one size, without common
    memory, and steps count from 1; RuntimeError while a CUDA graph is captured.
    """
    if len(steps) != len(params) or any(step < 1 for step in steps):
        raise ValueError(f"steps must be one a parameter and count from 1, got {steps}")
    work = launches([params, grads, exp_avgs, exp_avg_sqs], key, nonce, blocks, skips)
    for (tensors, arguments), step in zip(work, steps, strict=True):
        if tensors[0].numel():
            _noise_adamw_kernel[programs(tensors[0].numel(), arguments["skip"])](
                *tensors,
                tensors[0].numel(),
                std=std,
                scale=scale,
                keep=1 - lr * weight_decay,
                beta1_rest=1 - beta1,
                beta2=beta2,
                beta2_rest=1 - beta2,
                root_correction=math.sqrt(1 - beta2**step),
                eps=eps,
                rate=lr / (1 - beta1**step),
                enable_fp_fusion=False,
                **arguments,
            )


def signatures() -> list[Signature]:
    pointers = {f"{name}_ptr": "*fp32" for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    return [
        form(
            _noise_adamw_kernel,
            f"noise_adamw{' seeded' if seeded else ''}",
            pointers,
            {"SEEDED": seeded, "BLOCKS": BLOCKS},
            sizes={"n", "skip"},
            enable_fp_fusion=False,
        )
        for seeded in (0, 1)
    ]
