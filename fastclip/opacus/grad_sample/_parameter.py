"""`p.grad_sample` on demand: a parameter whose per-example gradient is formed when someone reads it.

The class of a trainable parameter is swapped, which keeps its identity: optimizers, `.to`, `state_dict` and compilation see the
same object. Copies and pickles of it are plain parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastclip.opacus.grad_sample._tape import SampleTape

GradSample = Tensor | list[Tensor] | None


class GradSampleParameter(nn.Parameter):
    """A parameter with ``grad_sample``, ``[B, *shape]``: what a tape kept of it, or what somebody assigned.

    A list, one tensor a backward, where several backwards were made without a step. What was read is kept, so that changes in
    place reach the step. None frees it.
    """

    _sample_tape: SampleTape

    @property
    def grad_sample(self) -> GradSample:
        if "_assigned_grad_sample" in self.__dict__:
            return self.__dict__["_assigned_grad_sample"]
        return self._sample_tape.read(self)

    @grad_sample.setter
    def grad_sample(self, value: GradSample) -> None:
        self._sample_tape.forget(self)
        if value is None:
            self.__dict__.pop("_assigned_grad_sample", None)
        else:
            self.__dict__["_assigned_grad_sample"] = value

    @grad_sample.deleter
    def grad_sample(self) -> None:
        self.grad_sample = None

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copied = nn.Parameter(self.data.clone(memory_format=torch.preserve_format), self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return torch._utils._rebuild_parameter, (self.data, self.requires_grad, OrderedDict())


def adopt(p: nn.Parameter, tape: SampleTape) -> None:
    """Let a trainable parameter answer ``grad_sample`` from this tape."""
    if type(p) is nn.Parameter:
        p.__dict__.pop("grad_sample", None)  # another wrapper's
        p.__class__ = GradSampleParameter
    p.__dict__["_sample_tape"] = tape
    p.__dict__.setdefault("_forward_counter", 0)


def release(p: nn.Parameter, tape: SampleTape) -> None:
    """Make it a plain parameter again, if it was this tape's."""
    if p.__dict__.get("_sample_tape") is not tape:
        return
    if type(p) is GradSampleParameter:
        p.__class__ = nn.Parameter  # type: ignore[assignment]
    for name in ("_sample_tape", "_assigned_grad_sample", "_forward_counter", "_norm_sample"):
        p.__dict__.pop(name, None)


def tape_of(p: Tensor) -> SampleTape | None:
    """The tape that follows a parameter; None for one that nobody, or Opacus itself, follows."""
    return p.__dict__.get("_sample_tape")


def samples_of(p: Tensor) -> list[Any] | None:
    """What is there of a parameter's per-example gradients, one item a backward: a batch of a tape, or a tensor.

    None where nothing was computed. Raises ValueError for an assigned value that is no tensor and no list.
    """
    tape = tape_of(p)
    assigned = p.__dict__.get("_assigned_grad_sample")
    if tape is None or type(p) is not GradSampleParameter:
        assigned = getattr(p, "grad_sample", None)
    if assigned is None:
        return list(tape.batches) or None if tape is not None else None
    if isinstance(assigned, Tensor):
        return [assigned]
    if isinstance(assigned, list):
        return list(assigned)
    raise ValueError(f"Unexpected grad_sample type: {type(assigned)}")
