"""nn.MultiheadAttention: its projections as linear layers on rows, the rest by torch's attention.

The module itself runs time-major and calls its output projection's weight without its forward, so it gets a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.layers.linear import linear
from fastclip.layers.registry import register_layer
from fastclip.layers.site import Site


class Projection(NamedTuple):
    """One linear layer of the module: out_proj, or the rows first..last of in_proj_weight (all of them: None)."""

    output: bool
    first: int = 0
    last: int | None = None

    def of(self, module: nn.MultiheadAttention) -> tuple[Tensor, Tensor | None, slice | None]:
        """Weight, bias, and their rows that are meant."""
        if self.output:
            return module.out_proj.weight, module.out_proj.bias, None
        return module.in_proj_weight, module.in_proj_bias, None if self.last is None else slice(self.first, self.last)


Project = Callable[[Tensor, Projection], Tensor]


def in_one_matrix(module: nn.MultiheadAttention) -> bool:
    """Whether all that is trained in the module is in its projections, each a linear layer of its own."""
    return module.in_proj_weight is not None and module.bias_k is None and module.bias_v is None


@register_layer(nn.MultiheadAttention, norm="Gram, or the gradient itself where that is smaller")
def multihead_attention(
    site: Site,
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results as nn.MultiheadAttention's forward, batched inputs only."""
    if query.dim() != 3:
        raise ValueError(f"{site.name}: MultiheadAttention needs batched inputs of 3 dimensions, got {query.dim()}")
    if is_causal and attn_mask is None:
        raise RuntimeError(f"{site.name}: is_causal is a hint about attn_mask: pass attn_mask too")
    rows = site.batch_first()

    def project(x: Tensor, which: Projection) -> Tensor:
        weight, bias, block = which.of(module)
        return linear(rows, x, weight, bias, block=block)

    return attend(
        module,
        project,
        rows,
        bool(site.batch_dim),
        query,
        key,
        value,
        key_padding_mask,
        need_weights,
        attn_mask,
        average_attn_weights,
    )


def attend(
    module: nn.MultiheadAttention,
    project: Project,
    site: Site | None,
    time_major: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The module's forward. project: a projection of a tensor ``[B, T, E]``; site: None only if :func:`in_one_matrix`."""
    self_attention = query is key and key is value
    shared_memory = key is value
    if time_major:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # [B, T, E]
    q, k, v = _project(project, site, module, query, key, value, self_attention, shared_memory)
    heads, size = module.num_heads, module.head_dim
    if site is not None and module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, site.per_unit(module.bias_k).reshape(-1, 1, module.embed_dim)], 1)
        v = torch.cat([v, site.per_unit(module.bias_v).reshape(-1, 1, module.embed_dim)], 1)
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    q, k, v = (x.unflatten(2, (heads, size)).transpose(1, 2) for x in (q, k, v))  # [B, H, T, E / H]
    mask = _mask(attn_mask, key_padding_mask, q, k.shape[2])
    dropout = module.dropout if module.training else 0.0
    weights: Tensor | None = None
    if need_weights:
        scores = q @ k.mT / math.sqrt(size)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, dropout) if dropout else weights
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = project(out.transpose(1, 2).flatten(2), Projection(True))  # [B, T, E]
    return out if module.batch_first else out.transpose(0, 1), weights


def _project(
    project: Project,
    site: Site | None,
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    same: bool,
    memory: bool,
) -> list[Tensor]:
    """q, k, v ``[B, T, E]``. Where one input serves several projections they are one linear layer."""
    size, bias = module.embed_dim, module.in_proj_bias
    if site is not None and module.in_proj_weight is None:
        parts = zip(
            (query, key, value), (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight), strict=True
        )
        projected = [linear(site, x, w, None) for x, w in parts]
        if bias is None:
            return projected
        copies = site.per_unit(bias).view(site.rows, 3, 1, size)
        return [x + copies[:, i] for i, x in enumerate(projected)]
    if same:
        return list(project(query, Projection(False)).chunk(3, -1))
    q = project(query, Projection(False, 0, size))
    if memory:
        return [q, *project(key, Projection(False, size, 3 * size)).chunk(2, -1)]
    k = project(key, Projection(False, size, 2 * size))
    return [q, k, project(value, Projection(False, 2 * size, 3 * size))]


def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    """The additive mask ``[B or 1, H or 1, T, S]`` of an attn_mask ``[T, S]`` or ``[B H, T, S]`` and padding ``[B, S]``."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
        return F.pad(mask.to(q.dtype), (0, keys - mask.shape[-1]))  # bias_k and add_zero_attn append keys

    total: Tensor | None = None
    if attn_mask is not None:
        total = additive(attn_mask)
        total = total[None, None] if total.dim() == 2 else total.unflatten(0, (q.shape[0], q.shape[1]))
    if padding is not None:
        columns = additive(padding)[:, None, None]
        total = columns if total is None else total + columns
    return total
