"""A stand-in for torchvision: what Opacus' own tests touch of it, with tiny networks and no images.

It is on the path only in the processes that run Opacus' tests, so that no other library takes it for the real one.
"""

from torchvision import datasets, models, transforms

__version__ = "0.0.0"

__all__ = ["datasets", "models", "transforms"]
