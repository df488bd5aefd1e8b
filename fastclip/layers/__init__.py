"""Layer families: what each keeps, its norm, its clipped gradient. Importing this package registers all of them."""

from fastclip.layers import attention, convolution, dora, embedding, linear, normalization, recurrent, rms_norm
from fastclip.layers.registry import Rule, find_rule, register_layer, supported_layers
from fastclip.layers.site import Site

__all__ = [
    "Rule",
    "Site",
    "attention",
    "convolution",
    "dora",
    "embedding",
    "find_rule",
    "linear",
    "normalization",
    "recurrent",
    "register_layer",
    "rms_norm",
    "supported_layers",
]
