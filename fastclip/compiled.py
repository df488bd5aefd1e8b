"""torch.compile: what dynamo traces where an attached model's layer is called.

Dynamo traces what stands between the layers; what a layer does for the tape it could not trace. So a layer's call becomes an
operator (layer_operators.py), and so does the use of the weight in a layer whose own forward runs; or the graph breaks.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fastclip.layer_operators import LINEAR, NUMBER, TENSOR, adapters, new_call
from fastclip.layers.attention import attend, multihead_attention
from fastclip.layers.bare import params_of
from fastclip.layers.calls import Catch
from fastclip.layers.convolution import convolution
from fastclip.layers.dora import dora, dora_linear
from fastclip.layers.embedding import embedding_bag_layer, embedding_layer
from fastclip.layers.normalization import group_norm, instance_norm, layer_norm
from fastclip.layers.projection import Projection
from fastclip.layers.recurrent import recurrent, recurrent_layer
from fastclip.layers.rms_norm import gemma_norm, llama_norm, rms_norm
from fastclip.layers.site import autocast_input
from fastclip.layout import Law
from fastclip.taps import TAPS

if TYPE_CHECKING:
    from fastclip.routing import LayerRoute

_OPERATORS = (
    *LINEAR,
    convolution,
    embedding_layer,
    embedding_bag_layer,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
    llama_norm,
    gemma_norm,
)


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


def _place(x: Any) -> tuple[Any, ...] | None:
    if isinstance(x, Tensor):
        return TENSOR
    if x is None or isinstance(x, bool | str | float):
        return (x,)
    return NUMBER if isinstance(x, int) else None


def is_operator(route: LayerRoute, law: Law | None) -> bool:
    """Whether compiled code can have the layer as an operator. Another breaks the graph, and runs as without a compiler.

    An operator runs again in backward, at a time of the compiler's choice: none has code that is not known here, which could
    draw random numbers, or write.
    """
    if law is None:
        return False
    if route.rule is dora_linear:  # the base layer's parameters are not among the operator's
        return law.dim == 0 and not any(p.requires_grad for p in cast(Any, route.module).base_layer.parameters())
    if route.rule in (multihead_attention, recurrent_layer):
        return law.dim is not None
    return route.caught if route.rule is None else route.rule in _OPERATORS


def traced(route: LayerRoute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer's call, where dynamo traces it."""
    if not torch.is_grad_enabled() or not route.clipper.attached or not route.follows:
        return route.original(*args, **kwargs)
    if not route.operator:
        return _outside(route, args, kwargs)
    if route.rule is multihead_attention:
        return _attention(route, *args, **kwargs)
    if route.rule is recurrent_layer:
        return _recurrent(route, *args, **kwargs)
    if route.rule is dora_linear:
        return dora(_Parts(route), route.module, adapters(route.key), *args, **kwargs)
    if route.caught:
        with Catch([route.module.weight], partial(_caught, route)):  # type: ignore[list-item]
            return route.original(*args, **kwargs)
    if any(_place(x) is None for x in (*args, *kwargs.values())):
        return _outside(route, args, kwargs)
    return _call(route, args, kwargs, None, route.rule in LINEAR)


def _call(
    route: LayerRoute, args: tuple[Any, ...], kwargs: dict[str, Any], caught: str | None, product: bool
) -> Tensor:
    leaves = (*args, *kwargs.values())
    places = cast("tuple[tuple[Any, ...], ...]", tuple(_place(x) for x in leaves))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    numbers = [x for x, place in zip(leaves, places, strict=True) if place == NUMBER]
    return _operator(route, tensors, numbers, new_call(route.key, places, tuple(kwargs), None, caught), product)


def _caught(route: LayerRoute, func: Any, x: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """A function that got the layer's weight, in the layer's own forward."""
    if func is F.linear:
        bias = rest[0] if rest else kwargs.get("bias")
        if bias is not None and bias is not route.module.bias:
            raise NotImplementedError(
                f"{route.name}: its forward gives F.linear another bias than its own: compile without it"
            )
        return _call(route, (x, bias is not None), {}, "linear", True)
    return _call(route, (x, *rest), kwargs, "embedding", False)


def _operator(route: LayerRoute, tensors: list[Tensor], numbers: list[int], call: int, product: bool) -> Tensor:
    if product:
        tensors = [autocast_input(tensors[0])]  # here the compiler may fuse it, and what is kept is the smaller one
    device = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.ops.fastclip.layer(
        tensors, numbers, params_of(route.targets), TAPS[route.clipper.forwards.name], route.key, call, autocast
    )


class _Parts:
    """A layer's parts as operators; what stands between them is the compiler's. Their inputs count examples in dim 0."""

    def __init__(self, route: LayerRoute) -> None:
        self._route = route

    def linear(self, x: Tensor, which: Projection) -> Tensor:
        return _operator(self._route, [x], [], new_call(self._route.key, (TENSOR,), (), tuple(which), None), True)

    def copies(self, name: str, like: Tensor) -> Tensor:
        which = tuple(Projection(name, copies=True))
        rows = like.new_zeros((like.shape[0], 0))
        return _operator(self._route, [rows], [], new_call(self._route.key, (TENSOR,), (), which, None), False)


def _attention(route: LayerRoute, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    if query.dim() != 3 or len(args) > 4 or kwargs.get("is_causal"):
        return _outside(route, (query, key, value, *args), kwargs)
    module = cast(nn.MultiheadAttention, route.module)
    return attend(module, _Parts(route), route.time_major, query, key, value, *args, **kwargs)


def _recurrent(route: LayerRoute, input: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(input, Tensor):  # packed: which rows are whose is known only as it runs
        return _outside(route, (input, *args), kwargs)
    return recurrent(_Parts(route), route.module, input, *args, **kwargs)


@_disable_dynamo
def _outside(route: LayerRoute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return route(*args, **kwargs)
