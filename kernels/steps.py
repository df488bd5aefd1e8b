"""What the passes share that draw noise and make an optimizer's step: their checks, all before anything is launched."""

import torch
from fastclip.kernels.stream import check_apart, refuse_capture, stream_arguments
from torch import Tensor

# Rates of all steps, which change from step to step: what is compiled does not depend on them.
RATES = [
    "keep",
    "beta1_rest",
    "beta2",
    "beta2_rest",
    "root_correction",
    "eps",
    "rate",
    "decay",
    "momentum",
    "momentum_rest",
]


def launches(
    lists: list[list[Tensor]], key: Tensor, nonce: int, blocks: list[int], skips: list[int]
) -> list[tuple[list[Tensor], dict[str, int]]]:
    """A parameter's tensors, in the order of lists, and its stream's arguments, parameter by parameter.

    Raises ValueError unless lists are as long, and a parameter's tensors contiguous fp32 of one size without common memory.
    """
    if len({*map(len, lists), len(blocks), len(skips)}) > 1:
        raise ValueError("params, grads, state, blocks and skips must be as many")
    together = [list(x) for x in zip(*lists, strict=True)]
    for tensors in together:
        for x in tensors:
            refuse_capture(x)
            if x.dtype != torch.float32 or not x.is_contiguous() or x.numel() != tensors[0].numel():
                raise ValueError(
                    f"a parameter, its grad and state must be contiguous fp32 of one size, got {x.dtype} {list(x.shape)}"
                )
    check_apart([x for tensors in together for x in tensors], [])
    arguments = [stream_arguments(key, nonce, block, skip) for block, skip in zip(blocks, skips, strict=True)]
    return list(zip(together, arguments, strict=True))
