"""What torch does otherwise while a model is tried: no dropout, and a note of rows picked by content."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class NoDropout(TorchFunctionMode):
    """Dropout draws by position in the batch; without it an example alone and in the batch can be compared."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
            args = args[:4] + args[5:] if len(args) == 5 else args
        elif "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


class Picks(TorchDispatchMode):
    """Notices operations whose number of rows depends on what the rows hold."""

    _OPS = (torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten.unique_consecutive)

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in self._OPS:
            self.seen = True
        elif packet is torch.ops.aten.index:
            self.seen |= any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return func(*args, **(kwargs or {}))


@contextmanager
def trial(model: nn.Module, restore: Callable[[], None]) -> Iterator[None]:
    """No gradients inside; random state, and by ``restore`` buffers, are as they were behind it."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        warnings.filterwarnings("ignore", message=".*use_reentrant.*")
        try:
            yield
        finally:
            restore()
