"""The noise of consecutive blocks of 8 elements, as fastclip/random.py defines it: words, then normals.

Element i of a tensor is element ``skip + i`` from the start of block ``block``. A program takes BLOCKS blocks and whatever of
the tensor they hold, so that an element's noise depends on (key, nonce, its place in the stream) alone.

The key travels as 8 integers of a declared type that are not specialised on: no compiled variant and no file of Triton's cache
depends on a bit of it. Neither do they depend on the nonce, of which only `seeded` is compiled in.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.chacha20 import chacha20
from fastclip.kernels.normals import normal_pair
from fastclip.kernels.philox import philox4x32
from torch import Tensor

BLOCK_ELEMENTS = 8
BLOCKS = 128  # a program's
KEY = [f"key{i}" for i in range(8)]
UNSPECIALIZED = [*KEY, "nonce_low", "nonce_high", "block", "std", "scale"]


class _Hidden(int):
    """A word of a key. Tracebacks that print local variables show nothing of it."""

    def __repr__(self) -> str:
        return "hidden"


def stream_arguments(key: Tensor, nonce: int, block: int, skip: int) -> dict[str, int]:
    """What a kernel gets of the schemas' key, nonce, block and skip. Raises ValueError on what is no key or skip."""
    if key.device.type != "cpu" or key.dtype != torch.uint8 or key.shape != (32,):
        raise ValueError(f"key must be 32 bytes on the CPU, got {key.dtype} {list(key.shape)} on {key.device}")
    if not 0 <= skip < BLOCK_ELEMENTS:
        raise ValueError(f"skip must be in [0, 8), got {skip}; pass the elements before the first, within its block")
    nonce %= 2**64
    words = {
        name: _Hidden(int.from_bytes(bytes(part), "little"))
        for name, part in zip(KEY, key.view(8, 4).tolist(), strict=True)
    }
    return words | {
        "nonce_low": nonce % 2**32,
        "nonce_high": nonce >> 32,
        "block": block % 2**64,
        "skip": skip,
        "SEEDED": nonce >> 63,
        "BLOCKS": BLOCKS,
    }


def programs(n: int, skip: int) -> tuple[int]:
    """The grid over n elements."""
    return (triton.cdiv(skip + n, BLOCK_ELEMENTS * BLOCKS),)


def refuse_capture(tensor: Tensor) -> None:
    """RuntimeError while a CUDA graph is captured: key and nonce are arguments, which every replay would use again."""
    if tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("noise cannot be captured in a CUDA graph, which would draw the same noise again")


def check_apart(written: list[Tensor], read: list[Tensor]) -> None:
    """ValueError if a tensor that is written shares memory with another one. All contiguous."""
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes, True) for x in written if x.numel()]
    spans += [(x.data_ptr(), x.data_ptr() + x.nbytes, False) for x in read if x.numel()]
    any_end = written_end = 0
    for start, end, is_written in sorted(spans):
        if start < (any_end if is_written else written_end):
            raise ValueError("tensors share memory with one that is written; pass buffers of their own")
        any_end = max(any_end, end)
        written_end = max(written_end, end) if is_written else written_end


@triton.jit
def words(k0, k1, k2, k3, k4, k5, k6, k7, nonce_low, nonce_high, low, high, SEEDED: tl.constexpr):
    """16 words ``[n]`` of the blocks whose numbers have the halves low and high: of pair j, 4 j to 4 j + 3."""
    if SEEDED:
        n0, n1 = (low ^ low) | nonce_low, (low ^ low) | nonce_high
        first, second = low << 2, (high << 2) | (low >> 30)
        w0, w1, w2, w3 = philox4x32(first, second, n0, n1, k0, k1)
        w4, w5, w6, w7 = philox4x32(first | 1, second, n0, n1, k0, k1)
        w8, w9, w10, w11 = philox4x32(first | 2, second, n0, n1, k0, k1)
        w12, w13, w14, w15 = philox4x32(first | 3, second, n0, n1, k0, k1)
    else:
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = chacha20(
            k0, k1, k2, k3, k4, k5, k6, k7, nonce_low, nonce_high, low, high
        )
    return w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15


@triton.jit
def elements(skip, BLOCKS: tl.constexpr):
    """int64 ``[8 BLOCKS]``: which elements of the tensor this program's blocks hold; some are negative or beyond its end."""
    return tl.program_id(0).to(tl.int64) * (8 * BLOCKS) - skip + tl.arange(0, 8 * BLOCKS)


@triton.jit
def draw(k0, k1, k2, k3, k4, k5, k6, k7, nonce_low, nonce_high, block, SEEDED: tl.constexpr, BLOCKS: tl.constexpr):
    """fp64 ``[8 BLOCKS]``: the standard normals of this program's `elements`."""
    number = block.to(tl.uint64) + tl.program_id(0).to(tl.uint64) * BLOCKS + tl.arange(0, BLOCKS).to(tl.uint64)
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = words(
        k0.to(tl.uint32),
        k1.to(tl.uint32),
        k2.to(tl.uint32),
        k3.to(tl.uint32),
        k4.to(tl.uint32),
        k5.to(tl.uint32),
        k6.to(tl.uint32),
        k7.to(tl.uint32),
        nonce_low.to(tl.uint32),
        nonce_high.to(tl.uint32),
        low,
        high,
        SEEDED,
    )
    z0, z1 = normal_pair(w0, w1, w2, w3)
    z2, z3 = normal_pair(w4, w5, w6, w7)
    z4, z5 = normal_pair(w8, w9, w10, w11)
    z6, z7 = normal_pair(w12, w13, w14, w15)
    # Element by element within a block: the last axis of the last join is the fastest.
    even = tl.join(tl.join(z0, z4), tl.join(z2, z6))  # [BLOCKS, 2, 2]
    odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
    return tl.reshape(tl.join(even, odd), [8 * BLOCKS])
