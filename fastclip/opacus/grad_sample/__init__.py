"""`opacus.grad_sample` on fastclip's engine: nothing per example is materialised unless someone reads it."""

from fastclip.opacus._mirror import delegate

__getattr__, __dir__ = delegate(__name__)
