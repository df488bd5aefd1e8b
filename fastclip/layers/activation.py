"""Code without parameters that a library writes out operation by operation, by one function that computes the same.

Autograd keeps what every single operation needs: five tensors for GPT-2's GELU, where its input is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.layers.gated import gated_of

_BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    # 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), both of them
    "transformers.activations.NewGELUActivation": partial(F.gelu, approximate="tanh"),
    "transformers.activations.FastGELUActivation": partial(F.gelu, approximate="tanh"),
}


def activation_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The function that computes what the module's class does; None where the module itself is as good."""
    cls = type(module)
    return _BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}") or gated_of(module)
