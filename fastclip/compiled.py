"""torch.compile: in its graph a layer of an attached model is an operator, whose backward operator fills the tape.

Dynamo traces what stands between the layers; what a layer does for the tape it could not trace. So the layer's call becomes
``fastclip::layer`` and its backward ``fastclip::layer_backward``. Both run the layer's rule as eager code does, on the very
units that the forward's *tap* leads to: a tensor ``[B]`` made by each forward, an input of every layer. The backward operator
returns a gradient for the tap, or nobody would need the operator and the compiler would leave it out, without a word.

Each call in traced code has a number of its own, or a compiler would take two calls on one input for one, and leave out the
second one's gradient. What an operator is given lives in buffers that the compiled code writes again, so the tape gets copies.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fastclip.layers.attention import Projection, attend, in_one_matrix, multihead_attention
from fastclip.layers.bare import params_of, shadowed
from fastclip.layers.convolution import convolution
from fastclip.layers.embedding import embedding_bag_layer, embedding_layer
from fastclip.layers.linear import conv1d_layer, enter_product, linear_layer
from fastclip.layers.normalization import group_norm, instance_norm, layer_norm, rms_norm
from fastclip.layers.site import Site, autocast_input
from fastclip.layout import Law

if TYPE_CHECKING:
    from fastclip.forward import Forward
    from fastclip.routing import LayerRoute

_LINEAR = (linear_layer, conv1d_layer)
_OPERATORS = (
    *_LINEAR,
    convolution,
    embedding_layer,
    embedding_bag_layer,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
_ARGS = "Tensor[] params, Tensor tap, int key, int call, ScalarType? autocast"
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


class Call(NamedTuple):
    """How one call of a layer was written. places: of each argument, one of the below; names: of those given by name."""

    places: tuple[tuple[Any, ...], ...]
    names: tuple[str, ...]
    projection: Projection | None = None

    def arguments(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's args and kwargs again."""
        given, counted = iter(tensors), iter(numbers)
        values = [
            next(given) if place is _TENSOR else next(counted) if place is _NUMBER else place[0]
            for place in self.places
        ]
        by_name = len(values) - len(self.names)
        return tuple(values[:by_name]), dict(zip(self.names, values[by_name:], strict=True))


_TENSOR, _NUMBER = ("tensor", None), ("number", None)  # what else may stand there is a constant, in a tuple of one


def _place(x: Any) -> tuple[Any, ...] | None:
    if isinstance(x, Tensor):
        return _TENSOR
    if x is None or isinstance(x, bool | str):
        return (x,)
    return _NUMBER if isinstance(x, int) else None


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _new_call(
    key: int, places: tuple[tuple[Any, ...], ...], names: tuple[str, ...], projection: tuple[Any, ...] | None
) -> int:
    """Called while dynamo traces, once for each call in the traced code."""
    calls = _routes[key].calls
    same = tuple(_TENSOR if p == _TENSOR else _NUMBER if p == _NUMBER else p for p in places)
    calls.append(Call(same, names, None if projection is None else Projection(*projection)))
    return len(calls) - 1


def is_operator(route: LayerRoute, law: Law | None) -> bool:
    """Whether compiled code can have the layer as an operator. Another breaks the graph, and runs as without a compiler."""
    if law is None:
        return False
    if route.rule is multihead_attention:
        return law.dim is not None and in_one_matrix(cast(nn.MultiheadAttention, route.module))
    if next(route.module.children(), None) is not None:
        return False
    if route.rule is None:
        return law.dim == 0 and (route.caught or law.rank is not None)
    return route.rule in _OPERATORS


def traced(route: LayerRoute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer's call, where dynamo traces it."""
    if not torch.is_grad_enabled() or not route.clipper.attached or not route.follows:
        return route.original(*args, **kwargs)
    if not route.operator:
        return _outside(route, args, kwargs)
    if route.rule is multihead_attention:
        return _attention(route, *args, **kwargs)
    leaves = (*args, *kwargs.values())
    places = tuple(_place(x) for x in leaves)
    if _TENSOR not in places or None in places:
        return _outside(route, args, kwargs)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    numbers = [x for x, place in zip(leaves, places, strict=True) if place == _NUMBER]
    call = _new_call(route.key, places, tuple(kwargs), None)
    return _operator(route, tensors, numbers, call, route.rule in _LINEAR)


def _operator(route: LayerRoute, tensors: list[Tensor], numbers: list[int], call: int, product: bool) -> Tensor:
    if product:
        tensors = [autocast_input(tensors[0])]  # here the compiler may fuse it, and what is kept is the smaller one
    device = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.ops.fastclip.layer(
        tensors, numbers, params_of(route.targets), route.clipper.tap, route.key, call, autocast
    )


def _attention(route: LayerRoute, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Its projections are operators, and what stands between them is the compiler's."""
    if query.dim() != 3 or len(args) > 4 or kwargs.get("is_causal"):
        return _outside(route, (query, key, value, *args), kwargs)

    def project(x: Tensor, which: Projection) -> Tensor:
        return _operator(route, [x], [], _new_call(route.key, (_TENSOR,), (), tuple(which)), True)

    module = cast(nn.MultiheadAttention, route.module)
    return attend(module, project, None, route.time_major, query, key, value, *args, **kwargs)


@_disable_dynamo
def _outside(route: LayerRoute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return route(*args, **kwargs)


def _find(key: int, tap: Tensor, params: Sequence[Tensor]) -> tuple[LayerRoute, Forward]:
    route, forward = _routes.get(key), getattr(tap, "forward", None)
    if route is None or forward is None or not route.clipper.attached or route.clipper is not forward.clipper:
        raise RuntimeError(
            "compiled code of a model that was attached runs where its clipper cannot be found: call torch._dynamo.reset() "
            "after detaching, and do not copy, export or replay what was compiled (CUDA graphs do)"
        )
    if any(p.data_ptr() != q.data_ptr() for p, q in zip(params, params_of(route.targets), strict=True)):
        raise RuntimeError(
            f"{route.name}: compiled code runs with other parameters than the layer has (torch.func.functional_call): its "
            "gradient cannot be followed"
        )
    return route, forward


def _ambient(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """The autocast under which the layer was traced: compiled code runs without."""
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


class _Product(NamedTuple):
    """A linear layer: where its rows are (None where nothing of it is trained), and its parameters."""

    site: Site | None
    weight: Tensor
    bias: Tensor | None
    transposed: bool
    block: slice | None


def _product(route: LayerRoute, forward: Forward, call: Call, x: Tensor) -> _Product | None:
    """The call as a linear layer; None if it is none."""
    module: Any = route.module
    if call.projection is not None:
        rows, examples = x.shape[0], forward.examples
        if rows % max(examples, 1):
            raise ValueError(f"{route.name}: its input has {rows} rows for {examples} examples")
        weight, bias, block = call.projection.of(module)
        return _Product(Site(forward, route.name, rows), weight, bias, False, block)
    held = route.placed_in(forward, x) if route.rule in _LINEAR else None
    return held and _Product(held.site, module.weight, module.bias, route.rule is conv1d_layer, None)


def _run(route: LayerRoute, forward: Forward, call: Call, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    if call.projection is not None:
        weight, bias, block = call.projection.of(cast(nn.MultiheadAttention, route.module))
        return _projected(tensors[0], weight, bias, block)
    return route.run(forward, *call.arguments(tensors, numbers))


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None, block: slice | None) -> Tensor:
    if block is None:
        return F.linear(x, weight, bias)
    return F.linear(x, weight[block], None if bias is None else bias[block])


def _layer(
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    params: Sequence[Tensor],
    tap: Tensor,
    key: int,
    call: int,
    autocast: torch.dtype | None,
) -> Tensor:
    route, forward = _find(key, tap, params)
    route.clipper.check_current(forward, route.name)
    with torch.no_grad(), _ambient(tensors[0].device.type, autocast):
        return _run(route, forward, route.calls[call], tensors, numbers).contiguous()


def _layer_fake(
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    params: Sequence[Tensor],
    tap: Tensor,
    key: int,
    call: int,
    autocast: torch.dtype | None,
) -> Tensor:
    route = _routes[key]
    found = route.calls[call]
    with torch.no_grad(), _ambient(tensors[0].device.type, autocast), shadowed(route.targets, params):
        if found.projection is not None:
            return _projected(tensors[0], *found.projection.of(cast(nn.MultiheadAttention, route.module))).contiguous()
        args, kwargs = found.arguments(tensors, numbers)
        if route.spread:
            args, kwargs = route.spread_out(args, kwargs, tap.shape[0])
        return route.original(*args, **kwargs).contiguous()


def _layer_backward(
    g: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    params: Sequence[Tensor],
    tap: Tensor,
    key: int,
    call: int,
    autocast: torch.dtype | None,
    input_grads: Sequence[bool],
) -> list[Tensor]:
    """The inputs' gradients, empty where there is none, and the tap's, which is zeros."""
    route, forward = _find(key, tap, params)
    # As layers/site.py asks of parameters: neither grad(loss, x) nor backward(inputs=) may fill the tape.
    filling = torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(tap).node)
    if filling:
        route.clipper.passes.current()
    lending, found = forward.lending(*tensors, g), route.calls[call]
    with _ambient(g.device.type, None):
        product = _product(route, lending, found, tensors[0])
        if product is not None:
            grads = [_through_product(product, g, tensors[0], filling, input_grads[0])]
    if product is None:
        with _ambient(g.device.type, autocast):
            grads = _again(route, lending, found, g, tensors, numbers, filling, input_grads)
    return [*(dx.contiguous() for dx in grads), torch.zeros_like(tap)]


def _through_product(of: _Product, g: Tensor, x: Tensor, filling: bool, input_grad: bool) -> Tensor:
    """Backward of a linear layer, from its input alone."""
    if filling and of.site is not None:
        if of.weight.requires_grad:
            enter_product(of.site, of.weight, x, g, of.transposed, of.block)
        if of.bias is not None and of.bias.requires_grad:
            of.site.enter_sum(of.bias, g, block=of.block)
    if not input_grad:
        return x.new_empty(0)
    weight = (of.weight if of.block is None else of.weight[of.block]).to(g.dtype)
    return torch.matmul(g, weight.mT if of.transposed else weight).to(x.dtype)


def _again(
    route: LayerRoute,
    forward: Forward,
    call: Call,
    g: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    filling: bool,
    input_grads: Sequence[bool],
) -> list[Tensor]:
    """Backward of any other layer: its rule runs once more, under autograd."""
    inputs = [x.detach().requires_grad_(b) for x, b in zip(tensors, input_grads, strict=True)]
    wanted = [x for x, b in zip(inputs, input_grads, strict=True) if b]
    with torch.enable_grad():
        out = _run(route, forward, call, inputs, numbers)
    if out.requires_grad and (filling or wanted):
        torch.autograd.backward([out], [g], inputs=None if filling else wanted)
    return [
        x.new_empty(0) if not b else torch.zeros_like(x) if x.grad is None else x.grad
        for x, b in zip(inputs, input_grads, strict=True)
    ]


def _layer_backward_fake(
    g: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    params: Sequence[Tensor],
    tap: Tensor,
    key: int,
    call: int,
    autocast: torch.dtype | None,
    input_grads: Sequence[bool],
) -> list[Tensor]:
    grads = [x.new_empty(x.shape if b else 0) for x, b in zip(tensors, input_grads, strict=True)]
    return [*grads, torch.empty_like(tap)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.numbers, params, tap, ctx.key, ctx.call, ctx.autocast = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(tap, *tensors, *params)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    tap, *saved = ctx.saved_tensors
    tensors, params = saved[: ctx.count], saved[ctx.count :]
    wanted = list(ctx.needs_input_grad[0])
    *grads, d_tap = torch.ops.fastclip.layer_backward(
        g, tensors, ctx.numbers, params, tap, ctx.key, ctx.call, ctx.autocast, wanted
    )
    own = [dx if b else None for dx, b in zip(grads, wanted, strict=True)]
    nothing: Any = None if ctx.numbers else []  # the form in which torch wants no gradient of a list of int
    return own, nothing, [None] * len(params), d_tap, None, None, None


# Replayed CUDA graphs would leave the tape empty.
torch.library.define(
    "fastclip::layer", f"(Tensor[] tensors, SymInt[] numbers, {_ARGS}) -> Tensor", tags=[torch.Tag.cudagraph_unsafe]
)
torch.library.define(
    "fastclip::layer_backward",
    f"(Tensor g, Tensor[] tensors, SymInt[] numbers, {_ARGS}, bool[] input_grads) -> Tensor[]",
    tags=[torch.Tag.cudagraph_unsafe],
)
torch.library.impl("fastclip::layer", "default", _layer)
torch.library.impl("fastclip::layer_backward", "default", _layer_backward)
torch.library.register_fake("fastclip::layer", _layer_fake)
torch.library.register_fake("fastclip::layer_backward", _layer_backward_fake)
torch.library.register_autograd("fastclip::layer", _backward, setup_context=_setup)
