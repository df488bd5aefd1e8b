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


@register_layer(nn.EmbeddingBag, norm="segment sums by (unit, id)")
def embedding_bag_layer(
    site: Site,
    module: nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Bags of one length, ids ``[B, L]``, mode "sum" or "mean"; padding_idx neither counts nor is summed."""
    site.need_batch_first()
    if input.dim() != 2 or offsets is not None:
        raise ValueError(f"{site.name}: EmbeddingBag needs ids of shape [B, L] without offsets: pad bags to one length")
    if per_sample_weights is not None and per_sample_weights.requires_grad:
        raise ValueError(f"{site.name}: per_sample_weights must not require grad; use an Embedding and a weighted sum")
    keep = torch.ones_like(input, dtype=module.weight.dtype)
    if module.padding_idx is not None:
        keep = (input != module.padding_idx).to(keep.dtype)
    weights = keep if per_sample_weights is None else keep * per_sample_weights
    if module.mode == "mean":
        weights = keep / keep.sum(1, keepdim=True).clamp_min(1)
    return _Embedding.apply(module.weight, input, weights, module.padding_idx, site).sum(1)
