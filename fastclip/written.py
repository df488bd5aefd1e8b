"""What a forward must not write: parameters, and buffers but those that have nothing to do with the examples."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor, nn


class Written:
    """A model's parameters and buffers as they are now, to see later what was written: it would be published without noise.

    Every write counts that torch's version counters see, and every buffer that was replaced; writes through ``.data`` or by
    code outside torch are beyond it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = [(name, p, p._version) for name, p in model.named_parameters()]
        self._buffers: dict[str, tuple[Tensor, int]] = {}

    def watch_buffers(self) -> None:
        """Buffers count too, from now on."""
        self._buffers = {name: (b, b._version) for name, b in self._model.named_buffers()}

    def check(self, allowed: Container[str] = ()) -> None:
        """Raises RuntimeError if something was written since. allowed: names of buffers that may be."""
        for name, p, version in self._parameters:
            if p._version != version:
                raise RuntimeError(
                    f"the model's forward writes into its parameter {name}, which would be published without noise: set it "
                    "before training, from data that is public"
                )
        for name, b in self._model.named_buffers() if self._buffers else ():
            before, version = self._buffers.get(name, (b, b._version))
            if name not in allowed and (b is not before or b._version != version):
                raise RuntimeError(
                    f"the model's forward writes into its buffer {name}, and did not when tried: what it writes would be "
                    "published without noise; set it before training, from data that is public"
                )
