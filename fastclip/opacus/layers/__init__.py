"""`opacus.layers`: Opacus' own, but for the modules in this directory."""

from fastclip.opacus._mirror import delegate

__getattr__, __dir__ = delegate(__name__)
