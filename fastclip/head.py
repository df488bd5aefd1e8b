"""Cross-entropy of a linear head without the copies that autograd keeps of its logits: for language models.

``linear_cross_entropy`` stands in a model's own code in place of head and loss. ``output_losses`` does the same for a model
whose forward ends with its head, without touching that code: the head is held back, and what comes out is its input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.layers.head import head_losses
from fastclip.layers.linear import linear, linear_layer
from fastclip.layers.registry import find_rule
from fastclip.layers.site import Site
from fastclip.routing import Held, LayerRoute, held_back

# Models whose output is not their head's: found out once.
_ENDING_OTHERWISE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def linear_cross_entropy(h: Tensor, head: nn.Module, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Softmax cross-entropy in nats of ``head(h)``, one a position, fp32 (fp64 for fp64); 0 where nothing is to be predicted.

    h: ``[..., d]``, labels: int ``[...]``, ignore_index where there is no label. head: an nn.Linear to the V classes; its
    gradient is clipped as ever where it belongs to an attached model, inside whose forward this has to be called. Memory:
    V numbers a labelled position, once, in the dtype that the head computes in; on CPU rows without a label cost nothing.
    Any other module, and a linear layer with hooks or a forward of its own, runs as it is, with the logits that it returns.

    Raises ValueError if labels do not have h's leading shape or lie outside [0, V).
    """
    check_labels(h, labels)
    if is_plain(head) and torch.is_grad_enabled():
        route = head.__dict__.get("forward")
        if not isinstance(route, LayerRoute):
            if not any(p.requires_grad for p in head.parameters(recurse=False)):
                return _losses(None, h, head, labels, ignore_index)
        elif route.followed() and (call := route.placed(h)) is not None:
            return _losses(call.site, h, head, labels, ignore_index)
    logits = head(h)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide.flatten(0, -2), labels.flatten().long(), ignore_index=ignore_index, reduction="none")
    return losses.view(labels.shape)


def check_labels(rows: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless labels are integers, one a row of ``[..., d]``."""
    if rows.shape[:-1] != labels.shape or labels.is_floating_point():
        raise ValueError(
            f"labels {labels.dtype} {list(labels.shape)} do not fit logits of {list(rows.shape[:-1])} tokens: give one "
            "integer for each"
        )


def output_losses(
    model: nn.Module,
    head: nn.Module | None,
    inputs: Mapping[str, Any],
    labels: Tensor,
    ignore_index: int,
    of_output: Callable[[Any], Tensor],
) -> Tensor:
    """``linear_cross_entropy`` of a model's logits, of the shape of labels ``[B, T]``.

    head: the model's output layer, if it has one. of_output: the same losses from what the model returns, for where its logits
    are not the head's alone: a model that does anything to them afterwards (soft-capping, scaling) is run again as it is the
    first time, with another trial, and only as it is from then on. So is one with forward hooks. Raises ValueError if labels do
    not fit.
    """
    found = _before_head(model, head, inputs)
    if not isinstance(found, Held):
        return of_output(found)
    check_labels(found.input, labels)
    return _losses(found.site, found.input, head, labels, ignore_index)


def output_rows(
    model: nn.Module,
    head: nn.Module | None,
    inputs: Mapping[str, Any],
    places: Tensor,
    of_output: Callable[[Any], Tensor],
) -> Tensor:
    """``[B, V]``: a model's logits at one position of each example, places: int64 ``[B]``; other positions' are not computed.

    of_output: the model's logits ``[B, T, V]`` from what it returns; head and the rest as in :func:`output_losses`.
    """
    found = _before_head(model, head, inputs)
    rows = torch.arange(len(places), device=places.device)
    if not isinstance(found, Held):
        return of_output(found)[rows, places]
    site, h, layer = found.site, found.input, cast("nn.Linear", head)
    if site is None:
        return F.linear(h[rows, places], layer.weight, layer.bias)
    if site.batch_dim:
        site, h = site.batch_first(), h.transpose(0, site.batch_dim)
    return linear(site.of(rows), h[rows, places], layer.weight, layer.bias)


def _before_head(model: nn.Module, head: nn.Module | None, inputs: Mapping[str, Any]) -> Any:
    """The call of the model's head that would end its forward, held back; else what the model returns."""
    watched = model._forward_hooks or _compiled(model)  # somebody looks at what comes out
    if head is None or not is_plain(head) or watched or model in _ENDING_OTHERWISE:
        return model(**inputs)
    failed = False
    with held_back(head) as held:
        try:
            output = model(**inputs)
        except Exception:
            if not held.calls and not held.tried:
                raise
            failed = True  # by code that expects logits, or for another reason: then once more below
    calls = held.calls
    if not failed and not calls and not held.tried:
        return output
    if failed or len(calls) != 1 or not _same(getattr(output, "logits", output), calls[0].input):
        _ENDING_OTHERWISE.add(model)
        route = head.__dict__["forward"]
        route.clipper.forget_layout()  # what follows the head has not been tried on logits
        return model(**inputs)
    return calls[0]


def is_plain(head: nn.Module) -> bool:
    """Whether nothing but ``h W^T + b`` happens in the head's call."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return find_rule(head) is linear_layer and not any(hooks)


def _same(logits: Any, input: Tensor) -> bool:
    """Whether a model's output is the held-back head's input, or that in another floating dtype."""
    if logits is input:
        return True
    if not isinstance(logits, Tensor) or logits.shape != input.shape or logits.grad_fn is None:
        return False
    copy: Any = logits.grad_fn
    return copy.name() == "ToCopyBackward0" and copy.next_functions[0][0] is input.grad_fn


def _compiled(model: nn.Module) -> bool:
    return isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None


def _losses(site: Site | None, h: Tensor, head: Any, labels: Tensor, ignore_index: int) -> Tensor:
    """Of the shape of labels ``[...]``; h: ``[..., d]``."""
    if site is not None and site.batch_dim:
        first = _losses(
            site.batch_first(), h.transpose(0, site.batch_dim), head, labels.transpose(0, site.batch_dim), ignore_index
        )
        return first.transpose(0, site.batch_dim)
    flat, rows = labels.flatten(), h.reshape(-1, h.shape[-1])  # [N], [N, d]
    counted = flat != ignore_index
    if rows.device.type != "cpu" or (site is not None and site.units.unit_of is None):
        # Packed rows keep their places, and a GPU is not asked how many there are; a row without a label gets no gradient.
        losses = head_losses(site, rows, head.weight, head.bias, flat.masked_fill(~counted, 0))
        return losses.masked_fill(~counted, 0.0).view(labels.shape)
    kept = counted.nonzero().squeeze(1)  # [R]
    if kept.numel() < flat.numel():
        rows, flat = rows.index_select(0, kept), flat.index_select(0, kept)
        if site is not None and site.units.unit_of is not None:
            site = site.of(kept // max(counted.numel() // max(site.units.unit_of.numel(), 1), 1))
    losses = head_losses(site, rows, head.weight, head.bias, flat)
    if kept.numel() == counted.numel():
        return losses.view(labels.shape)
    return losses.new_zeros(counted.numel()).index_copy(0, kept, losses).view(labels.shape)
