"""nn.MultiheadAttention: its projections as linear layers on rows, the rest by torch's attention.

The module itself runs time-major and calls its output projection's weight without its forward, so it gets a rule.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.layers.projection import Follow, Followed, Projection
from fastclip.layers.registry import register_layer
from fastclip.layers.site import Site


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
    if is_causal and (module.bias_k is not None or module.add_zero_attn):
        raise ValueError(
            f"{site.name}: with is_causal torch may hide the keys that add_bias_kv and add_zero_attn append: pass attn_mask "
            "alone"
        )
    return attend(
        module,
        Followed(site.batch_first(), module),
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
    parts: Follow,
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
    """The module's forward. parts: how its projections of tensors ``[B, T, E]`` run."""
    self_attention = query is key and key is value
    shared_memory = key is value
    if time_major:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # [B, T, E]
    q, k, v = _project(parts, module, query, key, value, self_attention, shared_memory)
    heads, size = module.num_heads, module.head_dim
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, parts.copies("bias_k", k).reshape(-1, 1, module.embed_dim)], 1)
        v = torch.cat([v, parts.copies("bias_v", v).reshape(-1, 1, module.embed_dim)], 1)
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
    out = parts.linear(out.transpose(1, 2).flatten(2), Projection("out_proj.weight", "out_proj.bias"))  # [B, T, E]
    return out if module.batch_first else out.transpose(0, 1), weights


def _project(
    parts: Follow, module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, same: bool, memory: bool
) -> list[Tensor]:
    """q, k, v ``[B, T, E]``. Where one input serves several projections they are one linear layer."""
    size = module.embed_dim
    thirds = [(i * size, (i + 1) * size) for i in range(3)]
    if module.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        own = [Projection(name, "in_proj_bias", None, third) for name, third in zip(names, thirds, strict=True)]
        return [parts.linear(x, which) for x, which in zip((query, key, value), own, strict=True)]

    def project(x: Tensor, rows: tuple[int, int] | None) -> Tensor:
        return parts.linear(x, Projection("in_proj_weight", "in_proj_bias", rows, rows))

    if same:
        return list(project(query, None).chunk(3, -1))
    q = project(query, thirds[0])
    if memory:
        return [q, *project(key, (size, 3 * size)).chunk(2, -1)]
    return [q, project(key, thirds[1]), project(value, thirds[2])]


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
