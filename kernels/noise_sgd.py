"""Noise and torch's SGD in one pass over memory, for lists of fp32 parameters.

    g = round((grad + std z) scale)        formed in fp64, rounded to fp32 once; grad holds it afterwards
    g' = g + wd p                          b = momentum b + (1 - dampening) g', or g' at the first step
    p -= lr (g' + momentum b if nesterov, else b; g' without momentum)

Moves 16 bytes an element, with momentum 24. The order of operations is that of csrc/cpu/noise_step.cpp, nothing is contracted:
the same bits. Rates are arguments and no constants.
"""

import triton
import triton.language as tl
from fastclip.kernels.configs import Signature, form
from fastclip.kernels.steps import RATES, launches
from fastclip.kernels.stream import BLOCKS, UNSPECIALIZED, draw, elements, programs
from torch import Tensor


@triton.jit(do_not_specialize=[*UNSPECIALIZED, *RATES])
def _noise_sgd_kernel(
    param_ptr,
    grad_ptr,
    buffer_ptr,
    n: tl.int64,
    skip: tl.int32,
    std: tl.float64,
    scale: tl.float64,
    rate: tl.float32,
    decay: tl.float32,
    momentum: tl.float32,
    momentum_rest: tl.float32,
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
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    SEEDED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    at = elements(skip, BLOCKS)
    mask = (at >= 0) & (at < n)
    z = draw(key0, key1, key2, key3, key4, key5, key6, key7, nonce_low, nonce_high, block, SEEDED, BLOCKS)
    g = ((tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float64) + z * std) * scale).to(tl.float32)
    tl.store(grad_ptr + at, g, mask=mask)
    p = tl.load(param_ptr + at, mask=mask, other=0.0)
    g += p * decay
    if HAS_MOMENTUM:
        b = g
        if not FIRST:
            b = tl.load(buffer_ptr + at, mask=mask, other=0.0) * momentum + g * momentum_rest
        tl.store(buffer_ptr + at, b, mask=mask)
        if NESTEROV:
            g += b * momentum
        else:
            g = b
    tl.store(param_ptr + at, p - g * rate, mask=mask)


def noise_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    std: float,
    scale: float,
    key: Tensor,
    nonce: int,
    blocks: list[int],
    skips: list[int],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
) -> None:
    """Updates all lists in place; parameter k's noise starts at element skips[k] of block blocks[k].

    first: the buffers hold nothing yet. momentum_buffers: empty without momentum. Raises as noise_adamw.
    """
    if len(momentum_buffers) != (len(params) if momentum != 0 else 0):
        raise ValueError("momentum needs a buffer for each parameter, and only momentum does")
    lists = [params, grads, momentum_buffers] if momentum != 0 else [params, grads]
    for tensors, arguments in launches(lists, key, nonce, blocks, skips):
        param, grad = tensors[:2]
        if param.numel():
            _noise_sgd_kernel[programs(param.numel(), arguments["skip"])](
                param,
                grad,
                tensors[2] if momentum != 0 else None,
                param.numel(),
                std=std,
                scale=scale,
                rate=lr,
                decay=weight_decay,
                momentum=momentum,
                momentum_rest=1 - dampening,
                HAS_MOMENTUM=momentum != 0,
                NESTEROV=nesterov,
                FIRST=first,
                enable_fp_fusion=False,
                **arguments,
            )


def signatures() -> list[Signature]:
    pointers = {f"{name}_ptr": "*fp32" for name in ("param", "grad", "buffer")}
    constants = {"HAS_MOMENTUM": True, "NESTEROV": True, "FIRST": False, "SEEDED": 0, "BLOCKS": BLOCKS}
    return [form(_noise_sgd_kernel, "noise_sgd", pointers, constants, sizes={"n", "skip"}, enable_fp_fusion=False)]
