"""Layers with a per-example gradient function of their own, as `register_grad_sampler` takes them.

``f(module, activations, backprops) -> {parameter: [B, *shape]}``. The layer's forward runs as it is, on parameters that
autograd does not follow; what comes back to its output goes to the function, whose answer enters the tape. As in Opacus a
function belongs to one class exactly, and comes before every rule of fastclip's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fastclip.layers import Rule
from fastclip.layers.bare import shadowed
from fastclip.layers.site import Site, no_autocast, wanted

Sampler = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]


def sampled_rule(hooks: Any, module: nn.Module) -> Rule | None:
    """The rule for a module whose class has a function that fastclip has no better rule for; None for all others."""
    sampler = hooks.GRAD_SAMPLERS.get(type(module))
    if sampler is None or _shipped(sampler, type(module)):
        return None
    return _rule(sampler)


@cache
def _rule(sampler: Sampler) -> Rule:
    return partial(_run, sampler)


def _shipped(sampler: Sampler, cls: type) -> bool:
    """Whether it is Opacus' own for that class, which a rule of fastclip's replaces (but for SequenceBias)."""
    theirs = importlib.import_module("opacus.grad_sample")
    return (
        sampler.__module__.startswith(theirs.__name__ + ".")
        and cls.__name__ != "SequenceBias"
        and cls.__module__.startswith(("torch.", "opacus."))
    )


class _Tap(Function):
    """The output itself; in backward its gradient goes to the sampler. Parameters are inputs, so that autograd comes by."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *rest: Any) -> Tensor:
        *ctx.params, ctx.site, ctx.run = rest
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        asked = [p for i, p in enumerate(ctx.params, 1) if wanted(ctx, i)]
        if asked:
            with torch.no_grad(), no_autocast(g.device.type):
                found = ctx.run(g)
            for p in asked:
                if p not in found or found[p].shape != (ctx.site.rows, *p.shape):
                    shape = list(found[p].shape) if p in found else "nothing"
                    raise ValueError(
                        f"{ctx.site.name}: its grad sampler returned {shape} for a parameter of shape {list(p.shape)} and "
                        f"{ctx.site.rows} examples: return [examples, *shape]"
                    )
                ctx.site.enter_sum(p, found[p])
        return (g, *[None] * (len(ctx.params) + 2))


def _run(sampler: Sampler, site: Site, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    holders = [(module, name) for name, p in module._parameters.items() if p is not None]
    params = [holder._parameters[name] for holder, name in holders]
    with shadowed(holders, [p.detach() for p in params if p is not None]):
        out = type(module).forward(module, *args, **kwargs)
    activations = [x.detach() for x in args if isinstance(x, Tensor)]
    if site.batch_dim:  # Opacus' functions see the batch first
        activations = [x.movedim(site.batch_dim, 0) for x in activations]

    def run(g: Tensor) -> dict[nn.Parameter, Tensor]:
        return sampler(module, activations, g.movedim(site.batch_dim, 0) if site.batch_dim else g)

    if isinstance(out, tuple):  # as in Opacus, the first output is the one that counts
        return (_Tap.apply(out[0], *params, site.batch_first(), run), *out[1:])
    return _Tap.apply(out, *params, site.batch_first(), run)
