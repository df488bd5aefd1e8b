"""fastclip: differentially private fine-tuning of PyTorch language models at the cost of ordinary training."""

import importlib
from typing import Any

from fastclip import ops, reference
from fastclip.head import linear_cross_entropy
from fastclip.isolation import check_units
from fastclip.layers import Site, register_layer, supported_layers
from fastclip.module import Clipper, attach
from fastclip.ops import backends
from fastclip.optimizer import DPOptimizer
from fastclip.sampling import ExamplePoissonSampler, PoissonLoader, PoissonSampler, UserIndex, UserPoissonSampler

__version__ = "0.1.0"

__all__ = [
    "Clipper",
    "DPOptimizer",
    "ExamplePoissonSampler",
    "PoissonLoader",
    "PoissonSampler",
    "Site",
    "UserIndex",
    "UserPoissonSampler",
    "attach",
    "backends",
    "check_units",
    "linear_cross_entropy",
    "ops",
    "reference",
    "register_layer",
    "supported_layers",
]

_LATER = ("accounting", "huggingface")  # they import libraries that training alone does not need
_OPACUS = ("GradSampleModule", "PrivacyEngine")  # Opacus' names, the same objects as in fastclip.opacus


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"fastclip.{name}")
    if name in _OPACUS:
        return getattr(importlib.import_module("fastclip.opacus"), name)
    raise AttributeError(f"module 'fastclip' has no attribute {name!r}")
