"""Losses of a linear head and their gradients in plain torch, some of the vocabulary at a time: ``[R, V]`` never exists.

logits ``l = h W^T + b``, with soft-capping ``l = c tanh((h W^T + b) / c)`` (Gemma 2, arXiv 2408.00118, section 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.precision import full_precision
from fastclip.reference import accumulation_dtype

CHUNK = 8192  # words at a time


def head_losses(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float) -> Tensor:
    """fp32 (fp64 for fp64) ``[2, R]``: softmax cross-entropy of each row, in nats, and its log-sum-exp.

    h: ``[R, d]``, weight: ``[V, d]``, bias: ``[V]``, labels: int ``[R]`` in [0, V). softcap: c, 0 for none.
    """
    labels = labels.long()
    lse = h.new_full(labels.shape, -torch.inf, dtype=accumulation_dtype(h.dtype))
    at_label = torch.full_like(lse, torch.nan)
    for start in range(0, weight.shape[0], CHUNK):
        words = slice(start, start + CHUNK)
        logits = _capped(_raw(h, weight[words], None if bias is None else bias[words]), softcap)
        lse = torch.logaddexp(lse, torch.logsumexp(logits, 1))
        local = labels - start
        here = (local >= 0) & (local < logits.shape[1])
        picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        at_label = torch.where(here, picked, at_label)
    return torch.stack([lse - at_label, lse])


def head_gradient(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    g: Tensor,
    start: int,
    softcap: float,
) -> Tensor:
    """``[R, C]`` in h's dtype: gradient of ``sum_r g_r losses_r`` in ``h W^T + b`` of the words start to start + C.

    weight: ``[C, d]``, bias: ``[C]``, those words'; lse: of all words; lse, g: ``[R]``. Rows of g = 0 are 0 whatever they hold.
    """
    logits = _capped(_raw(h, weight, bias), softcap)
    slope = 1 - (logits / softcap).square_() if softcap else None
    g, lse, local = g.to(logits.dtype), lse.to(logits.dtype), labels.long() - start
    rows = ((local >= 0) & (local < logits.shape[1])).nonzero().squeeze(1)
    at_label = (logits[rows, local[rows]] - lse[rows]).expm1() * g[rows]  # softmax - 1 cancels otherwise
    z = logits.sub_(lse[:, None]).exp_().mul_(g[:, None])
    z[rows, local[rows]] = at_label
    if slope is not None:
        z.mul_(slope)
    z[(g == 0).nonzero().squeeze(1)] = 0.0
    return z.to(h.dtype)


def _raw(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In fp32 (fp64 for fp64), whatever autocast and torch's switches say: losses and gradients have to mean one logit."""
    dtype = accumulation_dtype(h.dtype)
    with full_precision(), torch.autocast(h.device.type, enabled=False):
        return F.linear(h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits
