"""Triton's interpreter as these kernels need it: TRITON_INTERPRET=1 when Triton is imported, and CPU tensors."""

from functools import cache
from typing import Any

from triton.runtime import interpreter


def is_interpreted(kernels: Any) -> bool:
    """Whether a module's kernels were made for the interpreter."""
    return any(isinstance(x, interpreter.InterpretedFunction) for x in vars(kernels).values())


@cache
def accept_loop_bounds() -> None:
    """Lets ``range`` take a kernel's integers: Triton 3.6 reads them by int() of an array, which numpy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_index
