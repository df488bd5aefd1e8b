"""Which modules of a model get a route, and which parameters belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn
from torch.nn.utils import parametrize

from fastclip.layers import Rule
from fastclip.layers.bare import Targets

Plan = dict[nn.Module, tuple[Rule | None, Targets]]


def trainable_parameters(modules: Mapping[str, nn.Module]) -> dict[nn.Parameter, str]:
    """Each once, with its first name. modules: by qualified name, as ``named_modules`` has them."""
    found: dict[nn.Parameter, str] = {}
    for prefix, module in modules.items():
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad and p not in found:
                found[p] = f"{prefix}.{name}" if prefix else name
    return found


def plan_routes(modules: Mapping[str, nn.Module], rule_of: Callable[[nn.Module], Rule | None]) -> Plan:
    """For every module that owns parameters: its rule (None: bare parameters) and where those parameters are held.

    A parametrized module owns what its parametrizations hold, and a layer what its rule says (``register_layer``); multi-head
    attention holds its output projection, whose forward it does not call.
    """
    inside: set[nn.Module] = set()
    plan: Plan = {}
    for module in modules.values():  # parents come before children
        if module in inside:
            continue
        rule = rule_of(module)
        owned = list(getattr(rule, "owns", lambda module: ())(module))
        if parametrize.is_parametrized(module):
            owned += _parametrizations(module)
        inside.update(owned)
        holders = [module, *owned]
        if isinstance(module, nn.MultiheadAttention):
            holders.append(module.out_proj)
        targets = [(h, name) for h in holders for name, p in h._parameters.items() if p is not None]
        if targets:
            plan[module] = (rule, targets)
    return plan


def _parametrizations(module: nn.Module) -> list[nn.Module]:
    return list(module.parametrizations.modules())  # type: ignore[union-attr]


def biases_without_batch(modules: Mapping[str, nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Embedding]]:
    """T5's kind of relative position bias: (module, method, embedding), one bias ``[1, H, T, S]`` for all examples."""
    for module in modules.values():
        child = getattr(module, "relative_attention_bias", None)
        if isinstance(child, nn.Embedding) and callable(getattr(module, "compute_bias", None)):
            yield module, "compute_bias", child


def layers_of(model: nn.Module, trainable: Mapping[nn.Parameter, str]) -> list[list[nn.Parameter]]:
    """Trainable parameters by owning module, in order of appearance; modules that share a parameter are one layer."""
    layers: list[list[nn.Parameter]] = []
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None and p in trainable]
        if not own:
            continue
        shared = [layer for layer in layers if any(p is q for p in own for q in layer)]
        if not shared:
            layers.append(own)
            continue
        together = [q for layer in shared for q in layer]
        together += [p for p in own if not any(p is q for q in together)]
        at = next(i for i, layer in enumerate(layers) if layer is shared[0])
        layers = [layer for layer in layers if not any(layer is s for s in shared)]
        layers.insert(at, together)
    return layers
