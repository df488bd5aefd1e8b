"""`opacus.validators.multihead_attention`: nn.MultiheadAttention is replaced by fastclip's DPMultiheadAttention."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastclip.opacus._mirror import delegate
from fastclip.opacus.layers.dp_multihead_attention import DPMultiheadAttention


# Not registered: the registry is Opacus' too. The ModuleValidator here finds this one where Opacus' own is registered.
def fix(module: nn.MultiheadAttention, **kwargs: Any) -> DPMultiheadAttention:
    """The same attention, with the values, dtype, device, mode and frozen parameters of ``module``."""
    weight = module.out_proj.weight
    fixed = DPMultiheadAttention(
        module.embed_dim,
        module.num_heads,
        dropout=module.dropout,
        bias=module.in_proj_bias is not None,
        add_bias_kv=module.bias_k is not None,
        add_zero_attn=module.add_zero_attn,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=module.batch_first,
        device=weight.device,
        dtype=weight.dtype,
    )
    fixed.load_state_dict(module.state_dict())
    fixed.train(module.training)
    trained = {name: p.requires_grad for name, p in module.named_parameters()}
    for letter, linear in (("q", fixed.qlinear), ("k", fixed.klinear), ("v", fixed.vlinear)):
        linear.weight.requires_grad_(trained.get("in_proj_weight", trained.get(f"{letter}_proj_weight", True)))
        if linear.bias is not None:
            linear.bias.requires_grad_(trained["in_proj_bias"])
        if f"bias_{letter}" in trained:
            getattr(fixed, f"seq_bias_{letter}").bias.requires_grad_(trained[f"bias_{letter}"])
    for name, p in fixed.out_proj.named_parameters():
        p.requires_grad_(trained[f"out_proj.{name}"])
    return fixed


__getattr__, __dir__ = delegate(__name__)
