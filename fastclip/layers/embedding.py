"""Embeddings: rows of a table picked by ids."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastclip.layers.registry import register_layer
from fastclip.layers.site import Site, wanted


class _Embedding(Function):
    """``[..., d]`` from weight ``[V, d]`` and ids ``[...]``. ``weights`` ``[...]`` scales the rows (embedding bags)."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, weights: Tensor | None, padding_idx: int | None, site: Site
    ) -> Tensor:
        ctx.save_for_backward(ids, weights)
        ctx.param, ctx.padding_idx, ctx.site = weight, padding_idx, site
        rows = F.embedding(ids, weight, padding_idx)
        return rows if weights is None else rows * weights[..., None]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        ids, weights = ctx.saved_tensors
        if wanted(ctx, 0):
            g = g if weights is None else g * weights[..., None]
            ctx.site.enter_embedding(ctx.param, ids, g, ctx.padding_idx)
        return None, None, None, None, None


def embedding(site: Site, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    """Rows of ``weight`` by ids, followed by the tape. A negative padding_idx counts from the end."""
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _Embedding.apply(weight, ids, None, padding_idx, site)


@register_layer(nn.Embedding, norm="segment sums by (unit, id)")
def embedding_layer(site: Site, module: nn.Embedding, input: Tensor) -> Tensor:
    return embedding(site, input, module.weight, module.padding_idx)


def _bags(input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
    """Bags are rows: ids ``[B, L]``, or ids ``[N]`` with the start of each bag in offsets ``[B]``."""
    return input if offsets is None else offsets


@register_layer(nn.EmbeddingBag, norm="segment sums by (unit, id)", rows_of=_bags)
def embedding_bag_layer(
    site: Site,
    module: nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Modes "sum" and "mean"; padding_idx neither counts nor is summed. An id that is twice in a bag counts twice."""
    site.need_batch_first()
    if input.dim() == 1 and offsets is None:
        raise ValueError(f"{site.name}: ids of shape [N] need offsets, the start of each example's bag")
    if per_sample_weights is not None and per_sample_weights.requires_grad:
        raise ValueError(f"{site.name}: per_sample_weights must not require grad; use an Embedding and a weighted sum")
    padding_idx = module.padding_idx
    keep = torch.ones_like(input, dtype=module.weight.dtype)
    if padding_idx is not None:
        padding_idx %= module.num_embeddings
        keep = (input != padding_idx).to(keep.dtype)
    if offsets is None:
        bag_of, count = None, keep.sum(1, keepdim=True)
    else:
        lengths = torch.diff(offsets, append=offsets.new_tensor([input.numel()]))
        bag_of = torch.repeat_interleave(torch.arange(offsets.numel(), device=input.device), lengths)  # [N]
        count = keep.new_zeros(offsets.numel()).index_add_(0, bag_of, keep)[bag_of]
        site = site.of(bag_of)
    weights = keep if per_sample_weights is None else keep * per_sample_weights
    if module.mode == "mean":
        weights = keep / count.clamp_min(1)
    rows = _Embedding.apply(module.weight, input, weights, padding_idx, site)
    if bag_of is None or offsets is None:
        return rows.sum(1)
    return rows.new_zeros(offsets.numel(), rows.shape[1]).index_add(0, bag_of, rows)
