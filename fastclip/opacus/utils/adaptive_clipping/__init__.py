"""`opacus.utils.adaptive_clipping` on fastclip."""

from fastclip.opacus._mirror import delegate

__getattr__, __dir__ = delegate(__name__)
