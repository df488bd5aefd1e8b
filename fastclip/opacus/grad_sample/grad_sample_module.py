"""`opacus.grad_sample.grad_sample_module`: GradSampleModule and GradSampleHooks, on fastclip's engine.

After `backward()` each trainable parameter answers ``p.grad_sample``, ``[B, *shape]``, which is formed when somebody reads it;
``p.grad`` is the plain gradient, as in Opacus. Under `PrivacyEngine` the plain gradient, which nobody needs, is left out.

Where this differs from Opacus: the first batch is tried for examples that influence each other, which is refused; tied weights,
modules called several times, broadcast inputs, buffers, keyword inputs and any module with parameters of its own are followed;
a parameter that reaches the loss by another way raises in `backward()`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import opacus.grad_sample.grad_sample_module as theirs
from opacus.grad_sample.functorch import prepare_layer
from opacus.utils.module_utils import trainable_modules
from torch import nn

from fastclip import validation
from fastclip.module import clipper_of
from fastclip.opacus._mirror import delegate
from fastclip.opacus.grad_sample._tape import SampleTape


def _functional(module: Any, batch_first: bool, *args: Any) -> Any:
    prepare_layer(module, batch_first=batch_first)
    return module.ft_compute_sample_grad(*args)  # which that has replaced


def _followed(module: nn.Module) -> bool:
    return getattr(module, "autograd_grad_sample_hooks", None) is not None


class _Handles(list[Any]):
    """``autograd_grad_sample_hooks`` of a followed model; a copy or a pickle of the model is followed by nobody."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(None), ()


class _Handle:
    """Stands in ``autograd_grad_sample_hooks`` for all hooks together."""

    def __init__(self, tape: SampleTape) -> None:
        self._tape = tape

    def remove(self) -> None:
        self._tape.detach()


class GradSampleHooks(theirs.GradSampleHooks):
    """Per-example gradients of a model that is not wrapped. Arguments as Opacus'; ``force_functorch`` changes nothing here.

    loss_reduction: "mean" or "sum", how the loss given to ``backward()`` is made of the examples' losses. strict: refuse
    modules that cannot be private.

    Raises NotImplementedError for trainable layers that keep statistics of the batch, ValueError for other arguments that do
    not fit, for models that cannot be followed, and for a model that is wrapped already.
    """

    _tape: SampleTape

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
    ) -> None:
        self._begin(m, batch_first, loss_reduction, strict, force_functorch)
        self._attach(SampleTape(m, self, 0 if batch_first else 1, 1.0, strict))

    def _begin(self, m: nn.Module, batch_first: bool, loss_reduction: str, strict: bool, force_functorch: bool) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction = {loss_reduction}. Only 'sum' and 'mean' losses are supported")
        if _followed(m) or any(clipper_of(part) is not None for part in m.modules()):
            raise ValueError("Trying to add hooks twice to the same model: clean up the first wrapper")
        self.validate(module=m, strict=strict)
        self._module = m
        self.batch_first, self.loss_reduction, self.force_functorch = batch_first, loss_reduction, force_functorch
        self.hooks_enabled = True
        self.grad_accumulation_allowed = True

    def _attach(self, tape: SampleTape) -> None:
        self.__dict__["_tape"] = tape
        m: Any = self._module
        if any(p.requires_grad for p in m.parameters()):
            validation.check_model(m, tape.strict)
            try:
                tape.begin()
            except BaseException:
                tape.detach()
                raise
        self.autograd_grad_sample_hooks = m.autograd_grad_sample_hooks = _Handles([_Handle(tape)])
        for _, module in trainable_modules(m):
            # Opacus' functional form of a layer that has no sampler, for who looks for it.
            if type(module) not in self.GRAD_SAMPLERS and any(p is not None for p in module._parameters.values()):
                module.ft_compute_sample_grad = partial(_functional, module, self.batch_first)

    def add_hooks(self, **kwargs: Any) -> None:
        """Follow the model again after ``remove_hooks()``. Raises ValueError if it is followed already."""
        if _followed(self._module):
            raise ValueError("Trying to add hooks twice to the same model")
        self._attach(type(self._tape)(self._module, self, 0 if self.batch_first else 1, self._bound, self._tape.strict))
        self.hooks_enabled = True

    @property
    def _bound(self) -> float:
        return self._tape.max_grad_norm

    def remove_hooks(self) -> None:
        """Leave the model as it was."""
        self.hooks_enabled = False
        self._tape.detach()
        for holder in (self, self._module):
            holder.__dict__.pop("autograd_grad_sample_hooks", None)
        for _, module in trainable_modules(self._module):
            module.__dict__.pop("ft_compute_sample_grad", None)

    def arguments(self) -> dict[str, Any]:
        """What a wrapper like this one is made with."""
        return {
            "batch_first": self.batch_first,
            "loss_reduction": self.loss_reduction,
            "strict": self._tape.strict,
            "force_functorch": self.force_functorch,
        }

    def set_grad_sample_to_none(self) -> None:
        self._tape.reset()
        parameters: Iterable[Any] = self._module.parameters()
        for p in parameters:
            if p.requires_grad:
                p.grad_sample = None

    def del_grad_sample(self) -> None:
        self.set_grad_sample_to_none()

    def check_accumulation(self, backwards: int) -> None:
        """Called by the tape before it keeps another backward. Raises ValueError where several may not add up."""
        if backwards and not self.grad_accumulation_allowed:
            raise ValueError(
                "Poisson sampling is not compatible with grad accumulation. You need to call optimizer.step() and "
                "optimizer.zero_grad() after every forward/backward pass, or consider using BatchMemoryManager"
            )

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[NotImplementedError]:
        """What cannot be followed privately: trainable layers that keep statistics of the batch in buffers.

        Other buffers, which a forward does not write, are no obstacle. Raises NotImplementedError if ``strict``.
        """
        errors = [
            NotImplementedError(f"Model contains a trainable layer with batch statistics ({name}: {m}): {why}")
            for name, m in trainable_modules(module)
            if (why := validation.mixes(m)) and any(True for _ in m.buffers())
        ]
        if strict and errors:
            raise NotImplementedError(errors)
        return errors


class Wrapper:
    """What a wrapped model can do beside hooks: be copied and pickled, with nothing kept of any batch."""

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        module = copy.deepcopy(self._module, memo)
        for part in module.modules():
            for name in ("autograd_grad_sample_hooks", "ft_compute_sample_grad"):
                part.__dict__.pop(name, None)
        copied = type(self)(module, **self.arguments())
        copied.grad_accumulation_allowed = self.grad_accumulation_allowed
        copied.hooks_enabled = self.hooks_enabled
        copied._tape.plain_gradients = self._tape.plain_gradients
        copied.train(self.training)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._module, self.arguments())


def _rebuild(cls: type, module: nn.Module, arguments: dict[str, Any]) -> Any:
    return cls(module, **arguments)


class GradSampleModule(Wrapper, GradSampleHooks, theirs.GradSampleModule):
    """Wraps a model; ``state_dict`` keys begin with ``_module.``. Arguments as :class:`GradSampleHooks`."""

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        GradSampleHooks.__init__(
            self,
            m,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            strict=strict,
            force_functorch=force_functorch,
        )
        self.grad_accumulation_hook = None


__getattr__, __dir__ = delegate(__name__)
