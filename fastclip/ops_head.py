"""Ops of a linear head whose logits are never held; :mod:`fastclip.dispatch` chooses what runs them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastclip.dispatch import Backend, run


def head_losses(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float = 0.0,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """fp32 ``[2, R]`` (fp64 for fp64) losses and log-sum-exps: :func:`fastclip.reference_head.head_losses`.

    h: ``[R, d]``, weight: ``[V, d]``, bias: ``[V]`` or None, all of one dtype; labels: int ``[R]`` in [0, V). softcap: what
    logits are kept within, 0 for none. Raises ValueError if shapes or dtypes do not fit, or, on a CPU, for other labels,
    which lead to NaN elsewhere.
    """
    _check(h, weight, bias, labels, softcap)
    here = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if here and bool(((labels < 0) | (labels >= weight.shape[0])).any()):
        raise ValueError(f"labels must be in [0, {weight.shape[0]}), got {int(labels.min())} to {int(labels.max())}")
    return run("head_losses", backend, h, weight, bias, labels, float(softcap))


def head_gradient(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    g: Tensor,
    start: int = 0,
    softcap: float = 0.0,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``[R, C]`` gradients in the logits of words start to start + C: :func:`fastclip.reference_head.head_gradient`.

    weight: ``[C, d]``, bias: ``[C]`` or None: those words'. labels, lse, g: ``[R]``, lse over all words. The same arguments
    give the same bits. Raises as head_losses.
    """
    _check(h, weight, bias, labels, softcap)
    if lse.shape != labels.shape or g.shape != labels.shape:
        raise ValueError(f"lse and g must be {list(labels.shape)}, got {list(lse.shape)} and {list(g.shape)}")
    if start < 0:
        raise ValueError(f"start must be the first word's number, not negative, got {start}")
    return run("head_gradient", backend, h, weight, bias, labels, lse, g, int(start), float(softcap))


def _check(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float) -> None:
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"h must be [R, d] and weight [V, d], V > 0, got {list(h.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {list(weight.shape[:1])}, got {list(bias.shape)}")
    if labels.shape != h.shape[:1] or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels must be integers {list(h.shape[:1])}, got {labels.dtype} {list(labels.shape)}")
    if len({x.dtype for x in (h, weight, bias) if x is not None}) > 1 or not h.is_floating_point():
        raise ValueError(f"h, weight and bias must be of one floating dtype, got {h.dtype} and {weight.dtype}")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be what logits are kept within, or 0 for none, got {softcap!r}")
