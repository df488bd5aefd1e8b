"""Opacus' comparison of per-sample gradients with one-by-one backward passes, run on what the face wraps models with."""

from fastclip.opacus import grad_sample
from fastclip.opacus._mirror import delegate, rebound

# Opacus' functions, as they stand, would wrap every model in Opacus' classes and never see the face's.
globals().update(rebound(__name__, wrap_model=grad_sample.wrap_model))

__getattr__, __dir__ = delegate(__name__)
