"""Which layer types are known, and what runs in place of their forward.

A rule is ``rule(site, module, *args, **kwargs)``: it computes the layer's output as the layer's own forward would and
enters, in backward, each trainable parameter's gradient into the tape. :class:`fastclip.layers.site.Site` has what it
needs. A subclass counts as its parent only if it does not override ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Rule = Callable[..., Any]

# By type, or by qualified name for types of libraries that fastclip does not import.
_RULES: dict[type[nn.Module] | str, Rule] = {}
_DOC: dict[type[nn.Module] | str, str] = {}


def register_layer(*types: type[nn.Module] | str, norm: str = "per-unit gradient") -> Callable[[Rule], Rule]:
    """Register a rule for layer types, given as classes or as qualified names ("package.module.Class").

    norm: how the norm is found, for the table of supported layers. Raises ValueError if a type is registered already.
    """

    def register(rule: Rule) -> Rule:
        for cls in types:
            if cls in _RULES:
                raise ValueError(f"{cls} is registered already, with {_RULES[cls].__qualname__}")
            _RULES[cls], _DOC[cls] = rule, norm
        return rule

    return register


def find_rule(module: nn.Module) -> Rule | None:
    """The rule for the nearest ancestor type whose forward the module still has; None if there is none.

    A parameter that is not a plain attribute (a parametrization, say) is beyond every rule: None.
    """
    if any(name not in module._parameters for name in ("weight", "bias") if hasattr(module, name)):
        return None
    for cls in type(module).__mro__:
        rule = _RULES.get(cls) or _RULES.get(_qualified_name(cls))
        if rule is not None:
            return rule if type(module).forward is getattr(cls, "forward", None) else None
    return None


def supported_layers() -> list[tuple[str, str]]:
    """(package and type name, how its norm is found) of every registered layer, for the README's table."""
    names = {cls if isinstance(cls, str) else _qualified_name(cls): doc for cls, doc in _DOC.items()}
    return sorted((f"{name.split('.')[0]}: {name.split('.')[-1]}", doc) for name, doc in names.items())


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
