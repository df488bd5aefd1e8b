"""`opacus.layers.dp_multihead_attention`: attention whose projections are nn.Linear, with nn.MultiheadAttention's values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import opacus.layers.dp_multihead_attention as theirs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.opacus._mirror import delegate

_LINEAR = {"q": "qlinear", "k": "klinear", "v": "vlinear"}


class DPMultiheadAttention(theirs.DPMultiheadAttention):
    """nn.MultiheadAttention's arguments, masks and results, batched inputs only. Parameters are named as in Opacus.

    Raises ValueError for num_heads that do not divide embed_dim.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}")
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
        )
        if add_bias_kv:
            # In this module's layout: per-example gradients are taken along the batch axis of what goes in.
            self.seq_bias_k.batch_first = self.seq_bias_v.batch_first = batch_first
        self.to(device=device, dtype=dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs in the layout of ``query``; ``need_weights`` adds weights ``[N, T, S]``, or ``[N, H, T, S]`` not averaged.

        query ``[T, N, E]``, key ``[S, N, kdim]``, value ``[S, N, vdim]``; with ``batch_first`` ``[N, T, E]`` and so on.
        attn_mask ``[T, S]`` or ``[N * H, T, S]`` and key_padding_mask ``[N, S]``: bool, True where nothing may look, or of a
        float dtype, added to the scores. is_causal without attn_mask makes that mask; with one, attn_mask alone counts. The
        weights' ``S`` includes the keys that add_bias_kv and add_zero_attn append. Without weights, torch's fused attention.

        Raises ValueError for shapes and dtypes that do not fit.
        """
        batch, targets, sources = self._check(query, key, value)
        q = self._split(self.qlinear(query))  # [N, H, T, E / H]
        k, v = self.klinear(key), self.vlinear(value)
        if self.add_bias_kv:
            k, v = self.seq_bias_k(k), self.seq_bias_v(v)
        k, v = self._split(k), self._split(v)  # [N, H, S, E / H]
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))

        if is_causal and attn_mask is None:
            attn_mask = torch.ones(targets, sources, dtype=torch.bool, device=q.device).triu(1)
        masks: list[Tensor] = []
        if attn_mask is not None:
            attn_mask = _additive("attn_mask", attn_mask, q.dtype)
            if attn_mask.shape not in ((targets, sources), (batch * self.num_heads, targets, sources)):
                raise ValueError(
                    f"attn_mask must be [T, S] = [{targets}, {sources}] or [N * num_heads, T, S] = "
                    f"[{batch * self.num_heads}, {targets}, {sources}], got {list(attn_mask.shape)}"
                )
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.view(batch, self.num_heads, targets, sources))
        if key_padding_mask is not None:
            padding = _additive("key_padding_mask", key_padding_mask, q.dtype)
            if padding.shape != (batch, sources):
                raise ValueError(f"key_padding_mask must be [N, S] = [{batch}, {sources}], got {list(padding.shape)}")
            masks.append(padding[:, None, None])
        # What was appended to the keys is open to all.
        mask = F.pad(sum(masks[1:], masks[0]), (0, k.shape[2] - sources)) if masks else None

        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)
            weights = self.dropout(torch.softmax(scores if mask is None else scores + mask, -1))
            heads = weights @ v
        else:
            weights = None
            rate = self.dropout.p if self.training else 0.0
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        joined = heads.transpose(1, 2).flatten(2)  # [N, T, E]
        out = self.out_proj(joined if self.batch_first else joined.transpose(0, 1))
        return out, weights.mean(1) if weights is not None and average_attn_weights else weights

    def _split(self, x: Tensor) -> Tensor:
        """``[N, H, L, E / H]`` of ``[L, N, E]``, with ``batch_first`` of ``[N, L, E]``."""
        heads = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int]:
        """(N, T, S)."""
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.dim() != 3 or x.shape[-1] != width:
                layout = "[N, L, E]" if self.batch_first else "[L, N, E]"
                raise ValueError(f"{name} must be {layout} with E = {width}, got {list(x.shape)}")
        if key.shape[:2] != value.shape[:2]:
            raise ValueError(f"key and value differ in length or batch: {list(key.shape)}, {list(value.shape)}")
        at, along = (0, 1) if self.batch_first else (1, 0)
        if query.shape[at] != key.shape[at]:
            raise ValueError(f"query and key are of {query.shape[at]} and {key.shape[at]} examples")
        return query.shape[at], query.shape[along], key.shape[along]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's; the names of nn.MultiheadAttention are taken too, also below another module."""
        return nn.Module.load_state_dict(self, state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for part in ("weight", "bias"):
            packed = state_dict.pop(f"{prefix}in_proj_{part}", None)
            if packed is not None:
                for name, own in zip(_LINEAR.values(), packed.chunk(3), strict=True):
                    state_dict[f"{prefix}{name}.{part}"] = own
        for letter, name in _LINEAR.items():
            if f"{prefix}{letter}_proj_weight" in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{letter}_proj_weight")
            if f"{prefix}bias_{letter}" in state_dict:
                state_dict[f"{prefix}seq_bias_{letter}.bias"] = state_dict.pop(f"{prefix}bias_{letter}").flatten()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to scores of ``dtype``."""
    if mask.dtype == torch.uint8:
        warnings.warn(f"{name} as uint8 is deprecated: make it bool", stacklevel=3)
        mask = mask.bool()
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise ValueError(f"Only float, byte, and bool types are supported for {name}, not {mask.dtype}.")
    return mask.to(dtype)


__getattr__, __dir__ = delegate(__name__)
