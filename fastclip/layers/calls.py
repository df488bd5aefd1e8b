"""Subclasses of Linear and Embedding with a forward of their own, which hands their weight to the function itself.

OPT's positions and Gemma's scaled embeddings do this. Their forward runs as it is; the call ``F.embedding(ids, weight)``
or ``F.linear(x, weight, bias)`` inside it is caught and goes through the tape. Any other use of the weight meets the guard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastclip.layers.embedding import embedding
from fastclip.layers.linear import linear
from fastclip.layers.site import Site


class Catch(TorchFunctionMode):
    """While it lasts, ``F.embedding`` and ``F.linear`` on one of the weights become ``run(function, input, weight, *rest)``."""

    def __init__(self, weights: Sequence[Tensor], run: Callable[..., Any]) -> None:
        super().__init__()
        self._weights, self._run = weights, run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (F.embedding, F.linear):
            values = (*args, *(kwargs.pop(key) for key in ("input", "weight") if key in kwargs))
            if len(values) > 1 and any(values[1] is w for w in self._weights):
                return self._run(func, *values, **kwargs)
        return func(*args, **kwargs)


def caught_by_function(module: nn.Module) -> bool:
    """Whether the module is such a subclass: its parameters are a plain weight and perhaps a bias."""
    own = {name for name, p in module._parameters.items() if p is not None}
    return isinstance(module, nn.Linear | nn.Embedding) and "weight" in own and own <= {"weight", "bias"}


def run_caught(site: Site, func: Any, input: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """The caught call, through the tape. Raises ValueError for options that would make it impure."""
    if func is F.linear:
        bias = rest[0] if rest else kwargs.get("bias")
        return linear(site, input, weight, bias)
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    options = dict(zip(names, rest, strict=False)) | kwargs
    if options.get("max_norm") is not None or options.get("scale_grad_by_freq") or options.get("sparse"):
        raise ValueError(f"{site.name}: max_norm, scale_grad_by_freq and sparse cannot be private; leave them off")
    return embedding(site, input, weight, options.get("padding_idx"))
