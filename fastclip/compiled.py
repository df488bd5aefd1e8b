"""torch.compile: in its graph a layer of an attached model is one operator, whose backward operator fills the tape.

Dynamo traces what stands between the layers; what a layer does for the tape it could not trace. So the layer's call becomes
``fastclip::layer`` and its backward ``fastclip::layer_backward``. Both run the layer's rule as eager code does, on the very
units that the forward's *tap* leads to: a tensor ``[B]`` made by each forward, an input of every layer. The backward operator
returns a gradient for the tap, or nobody would need the operator and the compiler would leave it out, without a word.

What an operator is given lives in buffers that the compiled code writes again, so the tape gets copies of it.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fastclip.layers.bare import params_of, shadowed
from fastclip.layers.convolution import convolution
from fastclip.layers.embedding import embedding_layer
from fastclip.layers.linear import conv1d_layer, enter_product, linear_layer
from fastclip.layers.normalization import group_norm, instance_norm, layer_norm, rms_norm
from fastclip.layers.site import autocast_input
from fastclip.layout import Law

if TYPE_CHECKING:
    from fastclip.forward import Forward
    from fastclip.routing import LayerRoute

_LINEAR = (linear_layer, conv1d_layer)
# Called with one tensor, and return one.
_ONE_TO_ONE = (*_LINEAR, convolution, embedding_layer, group_norm, instance_norm, layer_norm, rms_norm)
_ARGS = "Tensor[] params, Tensor tap, int key, ScalarType? autocast"
_routes: weakref.WeakValueDictionary[int, LayerRoute] = weakref.WeakValueDictionary()
_keys = itertools.count()


def new_key(route: LayerRoute) -> int:
    """The number by which compiled code finds the route again, in this process alone."""
    key = next(_keys)
    _routes[key] = route
    return key


def new_tap(forward: Forward) -> Tensor:
    """What leads the layers of one forward to its units; fp32 ``[B]``."""
    packed = forward.units.unit_of is None
    tap = torch.zeros(1 if packed else forward.examples, requires_grad=True)
    tap.forward = forward  # type: ignore[attr-defined]
    return tap


class Eagerly:
    """While it lasts in any thread, nothing that somebody compiled runs compiled. torch's own switch is one for all threads."""

    def __init__(self) -> None:
        self._lock, self._open = threading.Lock(), 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._open:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._open += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._stance.__exit__(None, None, None)


eagerly = Eagerly()


def is_operator(route: LayerRoute, law: Law | None) -> bool:
    """Whether compiled code can have the layer as an operator. Another breaks the graph, and runs as without a compiler."""
    if law is None or next(route.module.children(), None) is not None:
        return False
    if route.rule is None:
        return law.dim == 0 and (route.caught or law.rank is not None)
    return route.rule in _ONE_TO_ONE


def traced(route: LayerRoute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer's call, where dynamo traces it."""
    if not torch.is_grad_enabled() or not route.clipper.attached or not route.follows:
        return route.original(*args, **kwargs)
    if not route.operator or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        return _outside(route, args, kwargs)
    x = args[0]
    if route.rule in _LINEAR:
        x = autocast_input(x)  # here the compiler may fuse it, and what is kept is the smaller one
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.ops.fastclip.layer(x, params_of(route.targets), route.clipper.tap, route.key, autocast)


@_disable_dynamo
def _outside(route: LayerRoute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return route(*args, **kwargs)


def _find(key: int, tap: Tensor) -> tuple[LayerRoute, Forward]:
    route, forward = _routes.get(key), getattr(tap, "forward", None)
    if route is None or forward is None or not route.clipper.attached or route.clipper is not forward.clipper:
        raise RuntimeError(
            "compiled code of a model that was attached runs where its clipper cannot be found: call torch._dynamo.reset() "
            "after detaching, and do not copy, export or replay what was compiled (CUDA graphs do)"
        )
    return route, forward


def _ambient(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """The autocast under which the layer was traced: compiled code runs without."""
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def _layer(x: Tensor, params: Sequence[Tensor], tap: Tensor, key: int, autocast: torch.dtype | None) -> Tensor:
    route, forward = _find(key, tap)
    route.clipper.check_current(forward, route.name)
    with torch.no_grad(), _ambient(x.device.type, autocast):
        return route.run(forward, (x,), {})


def _layer_fake(x: Tensor, params: Sequence[Tensor], tap: Tensor, key: int, autocast: torch.dtype | None) -> Tensor:
    route = _routes[key]
    if route.spread:
        x = x if x.shape[0] == 1 else x[None]
        x = x.expand(tap.shape[0], *x.shape[1:])
    with torch.no_grad(), _ambient(x.device.type, autocast), shadowed(route.targets, params):
        return route.original(x)


def _layer_backward(
    g: Tensor,
    x: Tensor,
    params: Sequence[Tensor],
    tap: Tensor,
    key: int,
    autocast: torch.dtype | None,
    input_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The input gradient, empty where there is none, and the tap's, which is zeros."""
    route, forward = _find(key, tap)
    # As layers/site.py asks of parameters: neither grad(loss, x) nor backward(inputs=) may fill the tape.
    filling = torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(tap).node)
    if filling:
        route.clipper.passes.current()
    lending = forward.lending(x, g)
    with _ambient(x.device.type, None):
        dx = _linear(route, lending, g, x, filling, input_grad)
    if dx is None:
        with _ambient(x.device.type, autocast):
            dx = _again(route, lending, g, x, filling, input_grad)
    return dx, torch.zeros_like(tap)


def _linear(
    route: LayerRoute, forward: Forward, g: Tensor, x: Tensor, filling: bool, input_grad: bool
) -> Tensor | None:
    """Backward of a linear layer, from its input alone. None if it is none."""
    held = route.placed_in(forward, x) if route.rule in _LINEAR else None
    if held is None:
        return None
    module: Any = route.module
    weight, bias, transposed = module.weight, module.bias, route.rule is conv1d_layer
    if filling and held.site is not None:
        if weight.requires_grad:
            enter_product(held.site, weight, x, g, transposed)
        if bias is not None and bias.requires_grad:
            held.site.enter_sum(bias, g)
    if not input_grad:
        return x.new_empty(0)
    weight = weight.to(g.dtype)
    return torch.matmul(g, weight.mT if transposed else weight).to(x.dtype)


def _again(route: LayerRoute, forward: Forward, g: Tensor, x: Tensor, filling: bool, input_grad: bool) -> Tensor:
    """Backward of any other layer: its rule runs once more, under autograd."""
    x = x.detach().requires_grad_(input_grad)
    with torch.enable_grad():
        out = route.run(forward, (x,), {})
    if out.requires_grad and (filling or input_grad):
        torch.autograd.backward([out], [g], inputs=None if filling else [x])
    return x.new_empty(0) if not input_grad else torch.zeros_like(x) if x.grad is None else x.grad


def _layer_backward_fake(
    g: Tensor,
    x: Tensor,
    params: Sequence[Tensor],
    tap: Tensor,
    key: int,
    autocast: torch.dtype | None,
    input_grad: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if input_grad else x.new_empty(0), torch.empty_like(tap)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, params, tap, ctx.key, ctx.autocast = inputs
    ctx.save_for_backward(x, tap, *params)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, tap, *params = ctx.saved_tensors
    input_grad = ctx.needs_input_grad[0]
    dx, d_tap = torch.ops.fastclip.layer_backward(g, x, params, tap, ctx.key, ctx.autocast, input_grad)
    return dx if input_grad else None, [None] * len(params), d_tap, None, None


# Replayed CUDA graphs would leave the tape empty.
torch.library.define("fastclip::layer", f"(Tensor x, {_ARGS}) -> Tensor", tags=[torch.Tag.cudagraph_unsafe])
torch.library.define(
    "fastclip::layer_backward",
    f"(Tensor g, Tensor x, {_ARGS}, bool input_grad) -> (Tensor, Tensor)",
    tags=[torch.Tag.cudagraph_unsafe],
)
torch.library.impl("fastclip::layer", "default", _layer)
torch.library.impl("fastclip::layer_backward", "default", _layer_backward)
torch.library.register_fake("fastclip::layer", _layer_fake)
torch.library.register_fake("fastclip::layer_backward", _layer_backward_fake)
torch.library.register_autograd("fastclip::layer", _backward, setup_context=_setup)
