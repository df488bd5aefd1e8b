"""The operators that stand for layers in compiled code: ``fastclip::layer``, and its backward, which fills the tape.

Both run the layer's rule as eager code does, for the forward that the tap leads to (taps.py), an input of every layer. The
backward operator returns a gradient for the tap, or nobody would need the operator and the compiler would leave it out, without
a word. Each call in traced code has a number of its own, or a compiler would take two calls on one input for one, and leave out
the second one's gradient. What an operator is given lives in buffers that compiled code writes again, so the tape gets copies.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.backward import in_backward
from fastclip.layers.bare import params_of, shadowed
from fastclip.layers.dora import magnitudes
from fastclip.layers.linear import conv1d_layer, enter_product, linear_layer
from fastclip.layers.projection import Projection
from fastclip.layers.site import Site, will_execute
from fastclip.taps import forward_of

if TYPE_CHECKING:
    from fastclip.forward import Forward
    from fastclip.routing import LayerRoute

LINEAR = (linear_layer, conv1d_layer)
_ARGS = "Tensor[] params, Tensor tap, str key, int call, ScalarType? autocast"
_routes: weakref.WeakValueDictionary[str, LayerRoute] = weakref.WeakValueDictionary()
_keys = itertools.count()


def new_key(route: LayerRoute) -> str:
    """The name by which compiled code finds the route again, in this process alone. Dynamo takes no string for a variable."""
    key = f"{next(_keys)}"
    _routes[key] = route
    return key


class Call(NamedTuple):
    """How one call of a layer was written. places: of each argument, one of the below; names: of those given by name.

    Of a layer whose forward runs as it is, the call is that of a function inside it: a projection, or what was caught.
    """

    places: tuple[tuple[Any, ...], ...]
    names: tuple[str, ...]
    projection: Projection | None = None
    caught: Callable[..., Any] | None = None  # the function that got the layer's weight

    def arguments(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's args and kwargs again."""
        given, counted = iter(tensors), iter(numbers)
        values = [
            next(given) if place is TENSOR else next(counted) if place is NUMBER else place[0] for place in self.places
        ]
        by_name = len(values) - len(self.names)
        return tuple(values[:by_name]), dict(zip(self.names, values[by_name:], strict=True))


TENSOR, NUMBER = ("tensor", None), ("number", None)  # what else may stand there is a constant, in a tuple of one


def _tracer() -> Any:
    """Of dynamo, which traces the code that calls; None where the graph broke before the call, and it runs."""
    from torch._dynamo.symbolic_convert import InstructionTranslator  # imports Triton

    try:
        return InstructionTranslator.current_tx().output.current_tracer
    except AttributeError:
        return None


def _in_shared_region(tracer: Any) -> bool:
    while tracer is not None:
        if tracer.source_target is torch.ops.higher_order.invoke_subgraph:
            return True
        tracer = tracer.parent
    return False


def new_call(
    key: str,
    places: tuple[tuple[Any, ...], ...],
    names: tuple[str, ...],
    projection: tuple[Any, ...] | None = None,
    caught: str | None = None,
) -> int:
    """Called while dynamo traces, once for each call in the traced code.

    Raises RuntimeError in a region that several places of the graph share, where calls cannot be told apart.
    """
    tracer = _tracer()
    if _in_shared_region(tracer):
        raise RuntimeError(
            f"{_routes[key].name}: layers of an attached model cannot run in torch.compiler.nested_compile_region: leave it out"
        )
    calls = _routes[key].calls
    same = tuple(TENSOR if p == TENSOR else NUMBER if p == NUMBER else p for p in places)
    found = None if projection is None else Projection(*projection)
    call = Call(same, names, found, None if caught is None else getattr(F, caught))
    # Nothing is joined that runs as it is called. By repr: True is 1.0 otherwise.
    known = [i for i, other in enumerate(calls) if repr(other) == repr(call)] if tracer is None else []
    if known:
        return known[0]
    calls.append(call)
    return len(calls) - 1


def adapters(key: str) -> tuple[str, ...]:
    """Called while dynamo traces: which adapters the route's layer follows."""
    return magnitudes(_routes[key].module)


# As torch._dynamo.assume_constant_result, which would import all of dynamo here.
new_call._dynamo_marked_constant = adapters._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find(key: str, tap: Tensor, params: Sequence[Tensor]) -> tuple[LayerRoute, Forward]:
    route, forward = _routes.get(key), forward_of(tap)
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
    """A linear layer: where its rows are (None where nothing of it is trained), its parameters, and which rows of them."""

    site: Site | None
    weight: Tensor
    bias: Tensor | None
    transposed: bool
    blocks: tuple[slice | None, slice | None] = (None, None)
    copies: bool = False


def _product(route: LayerRoute, forward: Forward, call: Call, x: Tensor) -> _Product | None:
    """The call as a linear layer; None if it is none."""
    module: Any = route.module
    if call.projection is not None:
        rows, examples = x.shape[0], forward.examples
        if rows % max(examples, 1):
            raise ValueError(f"{route.name}: its input has {rows} rows for {examples} examples")
        which = call.projection
        return _Product(
            Site(forward, route.name, rows), *which.parameters(module), which.transposed, which.blocks(), which.copies
        )
    held = route.placed_in(forward, x) if route.rule in LINEAR else None
    return held and _Product(held.site, module.weight, module.bias, route.rule is conv1d_layer)


def _run(route: LayerRoute, forward: Forward, call: Call, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    if call.projection is not None:
        return _projected(route.module, call.projection, tensors[0])
    args, kwargs = call.arguments(tensors, numbers)
    if call.caught is not None:
        return route.run_caught(forward, call.caught, *_with_weight(route, call.caught, args), **kwargs)
    return route.run(forward, args, kwargs)


def _with_weight(route: LayerRoute, caught: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    module: Any = route.module
    if caught is F.linear:
        x, with_bias = args
        return x, module.weight, module.bias if with_bias else None
    return args[0], module.weight, *args[1:]


def _projected(module: nn.Module, which: Projection, x: Tensor) -> Tensor:
    (weight, bias), (block, bias_block) = which.parameters(module), which.blocks()
    if which.copies:
        return weight.expand(x.shape[0], *weight.shape)
    weight = weight if block is None else weight[block]
    bias = bias if bias is None or bias_block is None else bias[bias_block]
    return F.linear(x, weight.mT if which.transposed else weight, bias)


def _layer(
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    params: Sequence[Tensor],
    tap: Tensor,
    key: str,
    call: int,
    autocast: torch.dtype | None,
) -> Tensor:
    route, forward = _find(key, tap, params)
    if in_backward():
        route.clipper.passes.current()  # as in LayerRoute.__call__
    else:
        forward.uses.append((route.params, 0))
    route.clipper.forwards.check(forward, route.name, tap)
    with torch.no_grad(), _ambient(tensors[0].device.type, autocast):
        return _run(route, forward, route.calls[call], tensors, numbers).contiguous()


def _layer_fake(
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    params: Sequence[Tensor],
    tap: Tensor,
    key: str,
    call: int,
    autocast: torch.dtype | None,
) -> Tensor:
    route = _routes[key]
    found = route.calls[call]
    with torch.no_grad(), _ambient(tensors[0].device.type, autocast), shadowed(route.targets, params):
        if found.projection is not None:
            return _projected(route.module, found.projection, tensors[0]).contiguous()
        args, kwargs = found.arguments(tensors, numbers)
        if route.spread:
            args, kwargs = route.spread_out(args, kwargs, tap.shape[0] - 1)
        if found.caught is not None:
            return found.caught(*_with_weight(route, found.caught, args), **kwargs).contiguous()
        return route.original(*args, **kwargs).contiguous()


def _layer_backward(
    g: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    params: Sequence[Tensor],
    tap: Tensor,
    key: str,
    call: int,
    autocast: torch.dtype | None,
    input_grads: Sequence[bool],
) -> list[Tensor]:
    """The inputs' gradients, empty where there is none, and the tap's, which is zeros."""
    route, forward = _find(key, tap, params)
    filling = [p for p in params_of(route.targets) if _is_filled(p)]
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


def _is_filled(param: Tensor) -> bool:
    """Whether this backward is to fill the parameter's gradient: see layers/site.py."""
    return param.requires_grad and will_execute(torch.autograd.graph.get_gradient_edge(param).node)


def _through_product(of: _Product, g: Tensor, x: Tensor, filling: list[nn.Parameter], input_grad: bool) -> Tensor:
    """Backward of a linear layer, from its input alone."""
    block, bias_block = of.blocks
    if of.site is not None:
        if any(of.weight is p for p in filling):
            if of.copies:
                of.site.enter_sum(of.weight, g)
            else:
                enter_product(of.site, of.weight, x, g, of.transposed, block)
        if any(of.bias is p for p in filling):
            of.site.enter_sum(cast(Tensor, of.bias), g, block=bias_block)
    if not input_grad:
        return x.new_empty(0)
    weight = (of.weight if block is None else of.weight[block]).to(g.dtype)
    return torch.matmul(g, weight.mT if of.transposed else weight).to(x.dtype)


def _again(
    route: LayerRoute,
    forward: Forward,
    call: Call,
    g: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    filling: list[nn.Parameter],
    input_grads: Sequence[bool],
) -> list[Tensor]:
    """Backward of any other layer: its rule runs once more, under autograd."""
    inputs = [x.detach().requires_grad_(b) for x, b in zip(tensors, input_grads, strict=True)]
    wanted = [x for x, b in zip(inputs, input_grads, strict=True) if b]
    with torch.enable_grad():
        out = _run(route, forward, call, inputs, numbers)
    if out.requires_grad and (filling or wanted):
        torch.autograd.backward([out], [g], inputs=[*wanted, *filling])
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
    key: str,
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
