"""What is refused, and why: models and parameters for which clipping could not keep its promise."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastclip.layout import Law


def as_written(model: nn.Module) -> nn.Module:
    """The model itself where somebody gives what torch.compile made of it."""
    inner = getattr(model, "_orig_mod", None)
    return inner if type(model).__name__ == "OptimizedModule" and isinstance(inner, nn.Module) else model


def check_model(model: nn.Module, strict: bool) -> None:
    """Raises ValueError naming each module that cannot be private, what is wrong with it, and the remedy."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"attach the model inside {type(model).__name__}, before wrapping it")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: set requires_grad_(True) on what is to be trained")
    problems = [
        f"{name or 'the model'} ({type(m).__name__}): {why}" for name, m in model.named_modules() if (why := _wrong(m))
    ]
    if strict:
        problems += [
            f"{name or 'the model'} ({type(m).__name__}): {why}"
            for name, m in model.named_modules()
            if (why := mixes(m))
        ]
    if problems:
        raise ValueError("this model cannot be trained privately:\n  " + "\n  ".join(problems))


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _wrong(module: nn.Module) -> str | None:
    """What the engine would get wrong."""
    own = [p for p in module._parameters.values() if p is not None and p.requires_grad]
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in own):
        return "run one forward first, so that lazy parameters have shapes"
    if isinstance(module, nn.RNNBase) and own:
        return "recurrent layers read their weights where no copy can stand; freeze it, or use a transformer or convolution"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and own:
        if module.max_norm is not None:
            return "max_norm rewrites rows by what the batch looks up, outside the gradient; use max_norm=None"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq divides one unit's gradient by other units' ids; use scale_grad_by_freq=False"
        if module.sparse:
            return "sparse gradients cannot carry noise; use sparse=False"
        if isinstance(module, nn.EmbeddingBag) and (module.mode == "max" or module.include_last_offset):
            return 'only mode "sum" and "mean" with ids of shape [B, L] are supported'
    if any(p.dim() == 3 for p in own) and ("Expert" in type(module).__name__ or hasattr(module, "num_experts")):
        return (
            "mixture-of-experts weights see rows routed across the batch, which no rule here follows yet; freeze them"
        )
    if any(p.is_complex() for p in own):
        return "complex parameters are not supported; freeze them"
    if any(p.dtype == torch.float16 for p in own):
        return "fp16 parameters need a loss scale, which would change the clipping; use bfloat16 or float32"
    return None


def mixes(module: nn.Module) -> str | None:
    """What lets one example influence another."""
    if isinstance(module, _BatchNorm) and (module.training or _trains(module)):
        return "batch statistics mix examples; use GroupNorm or LayerNorm, or freeze it and keep it in eval mode"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "running statistics gather private data outside the noise; use track_running_stats=False"
    return None


def check_mode(modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError for what may mix examples and can change after attach: batch statistics, backward hooks."""
    for name, module in modules.items():
        if module._backward_hooks or module._backward_pre_hooks:
            raise ValueError(f"{name or 'the model'} has a backward hook, which may mix examples' gradients: remove it")
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"{name} ({type(module).__name__}) is in training mode and mixes examples: call its eval()"
            )


def check_parameters(trainable: Mapping[nn.Parameter, str], guarded: Container[nn.Parameter]) -> None:
    """Raises ValueError for hooks on parameters: they would see no gradient, or one that is not there yet."""
    devices = sorted({str(p.device) for p in trainable})
    if len(devices) > 1:
        raise ValueError(
            f"trainable parameters are on {', '.join(devices)}: autograd would finish each alone; use one device"
        )
    for p, name in trainable.items():
        if p._post_accumulate_grad_hooks:
            raise ValueError(
                f"{name} has a post-accumulate-grad hook, which fires before the clipped sum exists: remove it (an optimizer "
                "in the backward pass cannot be private)"
            )
        if p._backward_hooks and p not in guarded:
            raise ValueError(f"{name} has a gradient hook, which would see no gradient: remove it before attach")


def warn_of_loops(laws: Mapping[str, Law], bare: Mapping[str, nn.Module]) -> None:
    """Say once which modules run example by example."""
    slow = sorted(
        {type(bare[name]).__name__ for name, law in laws.items() if name in bare and law.rank is None and not law.idle}
    )
    if slow:
        warnings.warn(
            f"fastclip runs {', '.join(slow)} example by example, because they use parameters of their own in a way that "
            "copies of them cannot follow: exact, but slow. fastclip.register_layer makes them fast",
            stacklevel=2,
        )
