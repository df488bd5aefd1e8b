"""From a kernel's own parameter list to the form in which it stands in the compile table."""

from collections.abc import Collection, Mapping
from typing import Any

from fastclip.kernels.configs import Signature


def form(
    kernel: Any,
    name: str,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    sizes: Collection[str] = (),
    num_warps: int = 4,
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
        enable_fp_fusion=enable_fp_fusion,
        aligned=frozenset({*pointers, *sizes}),
    )
