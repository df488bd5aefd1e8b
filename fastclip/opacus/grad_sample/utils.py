"""`opacus.grad_sample.utils`: which wrapper stands for which mode, and the registries of per-example gradient functions."""

from fastclip.opacus._mirror import delegate, rebound
from fastclip.opacus.grad_sample.grad_sample_module import GradSampleHooks, GradSampleModule
from fastclip.opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)

# Opacus' functions as they stand, on fastclip's classes. The registries are Opacus' own dictionaries.
globals().update(
    rebound(
        __name__,
        GradSampleHooks=GradSampleHooks,
        GradSampleModule=GradSampleModule,
        GradSampleHooksFastGradientClipping=GradSampleHooksFastGradientClipping,
        GradSampleModuleFastGradientClipping=GradSampleModuleFastGradientClipping,
    )
)

__getattr__, __dir__ = delegate(__name__)
