"""What a kernel is compiled with: block sizes by (kernel, dtype, size class), and the form in which modules list it.

``signatures()`` of a module lists every form of its kernels that its launchers ask for, so that all can be compiled without
a GPU. One row serves every capability from 8.0 on: no GPU has measured any of them yet, nor the routes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Signature:
    """One form of one kernel. arguments: parameter -> type ("*fp16", "i32"), in the kernel's order, constexprs left out.

    aligned: parameters that Triton may take for multiples of 16; None: every pointer.
    """

    kernel: Any
    name: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True
    aligned: frozenset[str] | None = None


def form(
    kernel: Any,
    name: str,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    sizes: Collection[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    enable_fp_fusion: bool = True,
) -> Signature:
    """pointers: parameter -> type; others' types are as declared, or i32. sizes: integers that usually are multiples of 16."""
    arguments = {
        p.name: pointers.get(p.name) or p.annotation_type or "i32" for p in kernel.params if not p.is_constexpr
    }
    return Signature(
        kernel,
        name,
        arguments,
        constants,
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=enable_fp_fusion,
        aligned=frozenset({*pointers, *sizes}),
    )


@dataclass(frozen=True)
class Config:
    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int

    def form(self, kernel: Any, name: str, pointers: Mapping[str, str], constants: Mapping[str, Any]) -> Signature:
        """How the kernel stands in the compile table: strides and widths of rows are multiples of 16 there."""
        sizes = [p.name for p in kernel.params if not p.is_constexpr and p.name.startswith(("stride", "d", "p"))]
        return form(
            kernel,
            name,
            pointers,
            {**constants, **self.blocks},
            sizes=sizes,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )

    def options(self) -> dict[str, int]:
        """What a launch takes."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


# "half" is bf16 and fp16; of tensors of several dtypes the widest decides.
GRAM_BLOCK = 64  # rows; one for all, because partial sums of both passes have the same places
GRAM = {
    "half": Config({"BLOCK": GRAM_BLOCK, "BLOCK_K": 64}, 8, 3),
    "fp32": Config({"BLOCK": GRAM_BLOCK, "BLOCK_K": 16}, 8, 2),
}
GRAM_AGAIN = Config({"BLOCK": GRAM_BLOCK, "BLOCK_K": 16}, 8, 1)
# "narrow": one of d and p is at most 16, as in LoRA.
DIRECT = {
    ("half", "wide"): Config({"BLOCK_P": 64, "BLOCK_D": 64, "BLOCK_T": 64}, 4, 3),
    ("half", "narrow"): Config({"BLOCK_P": 16, "BLOCK_D": 128, "BLOCK_T": 64}, 4, 3),
    ("fp32", "wide"): Config({"BLOCK_P": 64, "BLOCK_D": 64, "BLOCK_T": 16}, 8, 2),
    ("fp32", "narrow"): Config({"BLOCK_P": 16, "BLOCK_D": 128, "BLOCK_T": 16}, 8, 2),
}
DIRECT_AGAIN = Config({"BLOCK_P": 64, "BLOCK_D": 64, "BLOCK_T": 16}, 8, 1)
# "short": units of fewer than 48 rows on average.
GEMM = {
    ("half", "long"): Config({"BLOCK_P": 128, "BLOCK_D": 64, "BLOCK_T": 64}, 8, 3),
    ("half", "short"): Config({"BLOCK_P": 128, "BLOCK_D": 64, "BLOCK_T": 16}, 8, 3),
    ("fp32", "long"): Config({"BLOCK_P": 64, "BLOCK_D": 64, "BLOCK_T": 16}, 8, 2),
    ("fp32", "short"): Config({"BLOCK_P": 64, "BLOCK_D": 64, "BLOCK_T": 16}, 8, 2),
    ("fp64", "long"): Config({"BLOCK_P": 32, "BLOCK_D": 32, "BLOCK_T": 16}, 4, 2),
    ("fp64", "short"): Config({"BLOCK_P": 32, "BLOCK_D": 32, "BLOCK_T": 16}, 4, 2),
}

# Logits of a head: rows by words by width.
HEAD = {
    "half": Config({"BLOCK_R": 128, "BLOCK_V": 64, "BLOCK_K": 64}, 8, 3),
    "fp32": Config({"BLOCK_R": 64, "BLOCK_V": 64, "BLOCK_K": 16}, 8, 2),
    "fp64": Config({"BLOCK_R": 32, "BLOCK_V": 32, "BLOCK_K": 16}, 4, 2),
}
HEAD_SPAN = 2048  # words a program: few enough that some hundred rows occupy a GPU


def dtype_class(*tensors: Tensor) -> str:
    """ "half", "fp32" or "fp64": the widest. Raises ValueError for anything else."""
    for x in tensors:
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"rows must be floating point, fp16 to fp64, got {x.dtype}")
    widest = max(x.element_size() for x in tensors)
    return {2: "half", 4: "fp32", 8: "fp64"}[widest]


def longest_gram(route: str, rows: int, d: int, p: int) -> int:
    """The longest unit that takes the Gram route: L (d + p) <= 2 d p by the count of FLOPs, p of all layers together."""
    return {"gram": rows, "direct": 0, "auto": 2 * d * p // (d + p)}[route]


def programs(device: torch.device) -> int:
    """How many programs of a kernel run at once, about, where each goes on to further work by itself."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
