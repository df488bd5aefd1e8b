"""attach: per-unit clipping for any PyTorch model, in place.

Guarantees. After ``loss.backward()`` every trainable parameter's ``p.grad`` has grown by the sum over units of clipped
gradients, each at most ``max_grad_norm`` in L2 over all parameters together; or backward has raised and ``p.grad`` holds
no unclipped gradient. A parameter that reaches the loss by a way that the engine does not follow is an error, never a
gap: each one carries a hook that refuses a gradient from autograd itself. One unit's inf or NaN reaches nobody else.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import unserializable_hook

from fastclip import plan, validation
from fastclip.backward import in_backward
from fastclip.clipped_sums import ClippedSums
from fastclip.clipping import ClippingRule, make_rule
from fastclip.forward import Forward
from fastclip.forwards import Forwards
from fastclip.large_units import accumulate_unit
from fastclip.layers import Rule, find_rule
from fastclip.layers.activation import activation_of
from fastclip.layers.bare import Targets
from fastclip.layers.site import forget_shared_input
from fastclip.layouts import Layouts
from fastclip.routing import CALL, ActivationRoute, LayerRoute, MethodRoute, RootRoute, Route, is_running
from fastclip.units import PrivacyUnits
from fastclip.written import Written

# By id of the attached model, which keeps its clipper alive through the routes that stand in it.
_CLIPPERS: weakref.WeakValueDictionary[int, Clipper] = weakref.WeakValueDictionary()


class Clipper(ClippedSums):
    """What :func:`attach` returns.

    unit_norms: fp32 ``[U]``, unclipped gradient norms of the last backward, units in order of first appearance.
    nonfinite_units: how many units of the last backward had inf or NaN and therefore contributed nothing.
    Both are looks at private data. layouts, passes and forwards are for the routes that stand in the model.
    """

    def __init__(self, model: nn.Module, rule: ClippingRule, loss_reduction: str, strict: bool) -> None:
        super().__init__(model, rule, loss_reduction, strict)
        self.layouts = self._make_layouts()
        self.forwards = Forwards()
        self._routes: dict[nn.Module, list[Route]] = {}
        self._guards: dict[nn.Parameter, torch.utils.hooks.RemovableHandle] = {}
        self._names: dict[nn.Parameter, str] = {}
        self._local = threading.local()
        self._open_units = 0

    def _make_layouts(self) -> Layouts:
        return Layouts(self.model, self.strict)

    @contextmanager
    def units(
        self,
        ids: Tensor | Sequence[int] | None = None,
        offsets: Tensor | Sequence[int] | None = None,
        *,
        reduction: str = "sum",
        num_examples: int | None = None,
        shared: Sequence[str] = (),
    ) -> Iterator[Clipper]:
        """Name the units of the forwards inside.

        ids: int ``[B]``, the unit of each example, in any order. offsets: int ``[U + 1]``, segments of the rows of a packed
        batch ``[N, ...]`` or ``[1, N, ...]``. reduction: a unit's gradient is the sum or the mean of its examples'
        gradients (ids only). num_examples: how many examples a packed batch has, where the loss is their mean. shared: names
        of the model's arguments that belong to all examples, whatever their size (an attention mask ``[T, T]``).

        Raises ValueError if both or neither of ids and offsets are given, or if they do not have these forms.
        """
        if (ids is None) == (offsets is None):
            raise ValueError("give exactly one of ids= (one per example) and offsets= (segments of packed rows)")
        if ids is not None:
            made = PrivacyUnits.from_ids(
                torch.as_tensor(ids if len(ids) else [], dtype=None if len(ids) else torch.int64), reduction
            )
        else:
            if reduction != "sum":
                raise ValueError(
                    f'reduction={reduction!r} needs ids=: packed rows do not say where examples end; use "sum"'
                )
            if self.loss_reduction == "mean" and num_examples is None:
                raise ValueError(
                    'num_examples is needed with offsets and loss_reduction="mean": the loss was divided by it'
                )
            if num_examples is not None and (isinstance(num_examples, bool) or not num_examples >= 1):
                raise ValueError(
                    f"num_examples must be the positive number of examples in the batch, got {num_examples!r}"
                )
            made = PrivacyUnits.from_offsets(torch.as_tensor(offsets), num_examples)
        outer = getattr(self._local, "units", None)
        self._open_units += 1
        try:
            self._local.units = (made, tuple(shared))
            yield self
        finally:
            self._local.units = outer
            self._open_units -= 1

    def accumulate_unit(
        self, unit_id: int, *, reduction: str = "sum", num_examples: int | None = None
    ) -> AbstractContextManager[None]:
        """One unit that is too large for one backward: :func:`fastclip.large_units.accumulate_unit`."""
        return accumulate_unit(self, unit_id, reduction, num_examples)

    def forget_layout(self) -> None:
        """Try the model again at the next forward, after a change of its code that its modules do not show."""
        self.layouts.forget()
        self.replayable.clear()

    def begin(self) -> None:
        """Put the routes into the model; :func:`attach` has checked it."""
        self.refresh()
        self.attached = True
        _CLIPPERS[id(self.model)] = self

    def detach(self) -> None:
        """Leave the model as it was before :func:`attach`. Gradients stay where they are."""
        for routes in self._routes.values():
            for route in reversed(routes):
                route.remove()
        for handle in self._guards.values():
            handle.remove()
        self._routes.clear()
        self._guards.clear()
        self.attached = False
        _CLIPPERS.pop(id(self.model), None)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the model run and differentiate as if it were not attached (check_units does)."""
        attached, self.attached = self.attached, False
        try:
            yield
        finally:
            self.attached = attached

    # What routes call

    @_disable_dynamo
    def begin_forward(
        self, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> tuple[Forward, Written] | None:
        """Find the units of one forward of the model.

        Returns it, to be begun, and what :meth:`end_forward` wants to see; None where the model calls itself: that is still the
        same one.
        """
        if self.forwards.running:
            if is_running(self):
                return None
            self.forwards.running.clear()  # an interrupt left it there
        if in_backward():
            raise RuntimeError(
                "the whole model is recomputed in backward, where nobody says whose its examples are: checkpoint parts of the "
                "model, inside its forward"
            )
        if self._open_units and getattr(self._local, "units", None) is None:
            raise RuntimeError("clipper.units() is open in another thread: open it in the thread that runs the model")
        self.refresh()
        forget_shared_input()
        given: tuple[PrivacyUnits, tuple[str, ...]] | None = getattr(self._local, "units", None)
        written, layers = Written(self.model), self._layers()
        units, laws = self.layouts.find(
            original, args, kwargs, given[0] if given else None, given[1] if given else (), layers
        )
        if self.strict:
            written.watch_buffers()  # after the trial, which may have seen some written
        forward = Forward(self, units, laws, self._names)
        for route in layers:
            route.prepare(laws.get(route.name + CALL if route.caught else route.name))
        return forward, written

    @_disable_dynamo
    def end_forward(self, forward: Forward, written: Written | None = None) -> None:
        """The other end. written: of a forward that did not fail; raises RuntimeError if it wrote what would be published."""
        self.forwards.end(forward)
        if written is not None:
            written.check(self.layouts.written)

    def rule_of(self, module: nn.Module) -> Rule | None:
        """What runs in place of the module's forward; None where its parameters are followed in its own code."""
        return find_rule(module)

    def refresh(self) -> None:
        """Follow the model as it is now: new, replaced, frozen and unfrozen parameters, new modules."""
        modules = dict(self.model.named_modules())  # one walk for all that follows, which costs as much as the rest
        trainable = plan.trainable_parameters(modules)
        validation.check_parameters(trainable, self._guards)
        if self.strict:
            validation.check_mode(modules)
        for p, name in trainable.items():
            if p not in self._guards:
                self._guards[p] = p.register_hook(_guard(weakref.ref(self), name))
        self._install(modules)
        if trainable != self._names:
            layers = plan.layers_of(self.model, trainable)
            groups = self.rule.groups([tuple(trainable[p] for p in layer) for layer in layers])
            self._group = {p: k for layer, k in zip(layers, groups, strict=True) for p in layer}
            self._num_groups = max(groups, default=0) + 1
            self._names = trainable

    def _install(self, modules: Mapping[str, nn.Module]) -> None:
        planned = plan.plan_routes(modules, self.rule_of)
        for module, routes in list(self._routes.items()):
            layer = next((r for r in routes if isinstance(r, LayerRoute)), None)
            rule, targets = planned.get(module, (None, ()))
            if layer is not None and ((layer.rule, list(layer.targets)) != (rule, list(targets))):
                for route in reversed(self._routes.pop(module)):
                    route.remove()
        names = {module: name for name, module in modules.items()}
        for module, (rule, targets) in planned.items():
            if module not in self._routes:
                self._routes[module] = [LayerRoute(self, module, names[module], rule, targets)]
                self.layouts.forget()
        for module in modules.values():
            function = None if module in self._routes else activation_of(module)
            if function is not None and "forward" not in module.__dict__:
                self._routes[module] = [ActivationRoute(self, module, function)]
        for module, method, child in plan.biases_without_batch(modules):
            routes = self._routes.setdefault(module, [])
            if not any(isinstance(r, MethodRoute) for r in routes):
                held: Targets = [(child, "weight")]
                routes.append(MethodRoute(self, module, method, f"{names[module]}.{method}", held))
                for route in self._routes.get(child, []):
                    if isinstance(route, LayerRoute):
                        route.bypass = True
        root = self._routes.setdefault(self.model, [])
        if not any(isinstance(r, RootRoute) for r in root):
            root.append(RootRoute(self, self.model))

    def _layers(self) -> list[LayerRoute]:
        routes = [r for routes in self._routes.values() for r in routes if isinstance(r, LayerRoute)]
        return [r for r in routes if r.trainable() and not r.bypass]


def _guard(clipper: weakref.ref[Clipper], name: str) -> Callable[[Tensor | None], None]:
    @unserializable_hook  # type: ignore[untyped-decorator]
    def refuse(grad: Tensor | None) -> None:
        owner = clipper()
        if grad is not None and owner is not None and owner.attached:
            raise RuntimeError(
                f"{name} is used in a way that fastclip does not follow (outside its own module's forward, or by a function "
                "that gets the parameter itself): its gradient would not be clipped. Use it inside its module's forward, "
                "register a layer with fastclip.register_layer, or freeze it with requires_grad_(False)"
            )

    return refuse


def attach(
    model: nn.Module,
    max_grad_norm: float,
    clipping: str | ClippingRule = "flat",
    loss_reduction: str = "sum",
    strict: bool = True,
) -> Clipper:
    """Clip per-unit gradients of ``model`` from now on; returns the :class:`Clipper` that undoes it.

    model: any module, or what torch.compile made of one.
    max_grad_norm: C, the most that one unit's gradient may measure in L2. clipping: "flat", "automatic", "per_layer", or
    a rule object (clipping.py). loss_reduction: whether the loss given to backward() is the sum over examples or their
    mean. strict: try on the first batch that examples do not mix in the model, and refuse what cannot be private.

    Raises ValueError for bad arguments, a model that cannot be private, or one that is attached already; the model is
    then as it was.
    """
    model = validation.as_written(model)
    rule = make_rule(clipping, max_grad_norm)
    if loss_reduction not in ("sum", "mean"):
        raise ValueError(f'loss_reduction must be "sum" or "mean", got {loss_reduction!r}')
    if any(clipper_of(m) is not None for m in model.modules()):
        raise ValueError("the model, or a part of it, is attached already: detach() that clipper first")
    validation.check_model(model, strict)
    clipper = Clipper(model, rule, loss_reduction, strict)
    try:
        clipper.begin()
    except BaseException:
        clipper.detach()
        raise
    return clipper


def clipper_of(model: nn.Module) -> Clipper | None:
    """The clipper attached to ``model``; None if there is none."""
    model = validation.as_written(model)
    found = _CLIPPERS.get(id(model))
    return found if found is not None and found.model is model else None
