"""Which layer types are known, and what runs in place of their forward.

A rule is ``rule(site, module, *args, **kwargs)``: it computes the layer's output as the layer's own forward would and
enters, in backward, each trainable parameter's gradient into the tape. :class:`fastclip.layers.site.Site` has what it
needs. A subclass counts as its parent only if no method is overridden that ``forward`` could call, in the class or on the
instance (a library that patches ``layer.forward``): the rule would compute something else than the layer does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn

Rule = Callable[..., Any]

# By type, or by qualified name for types of libraries that fastclip does not import.
_RULES: dict[type[nn.Module] | str, Rule] = {}
_DOC: dict[type[nn.Module] | str, str] = {}
# For layers that many classes write down alike: the rule, once the module itself has shown that it computes that.
_FINDERS: list[Callable[[nn.Module], Rule | None]] = []
_OUTSIDE_FORWARD = {"reset_parameters", "extra_repr", "_reset_parameters"}


def register_layer(
    *types: type[nn.Module] | str,
    norm: str = "per-unit gradient",
    owns: Callable[[Any], Iterable[nn.Module]] | None = None,
    rows_of: Callable[..., Tensor | None] | None = None,
) -> Callable[[Rule], Rule]:
    """Register a rule for layer types, given as classes or as qualified names ("package.module.Class").

    norm: how the norm is found, for the table of supported layers. owns: modules inside it whose parameters the rule takes care
    of. rows_of: from the call's arguments, the tensor whose batch dimension counts the examples; the first one by default.
    Raises ValueError if a type is registered already.
    """

    def register(rule: Rule) -> Rule:
        for cls in types:
            if cls in _RULES:
                raise ValueError(f"{cls} is registered already, with {_RULES[cls].__qualname__}")
            _RULES[cls], _DOC[cls] = rule, norm
        for name, value in (("owns", owns), ("rows_of", rows_of)):
            if value is not None:
                setattr(rule, name, value)
        return rule

    return register


def register_form(
    name: str, norm: str
) -> Callable[[Callable[[nn.Module], Rule | None]], Callable[[nn.Module], Rule | None]]:
    """Register a function that finds the rule of modules whose classes nobody lists. name, norm: for the table."""

    def register(find: Callable[[nn.Module], Rule | None]) -> Callable[[nn.Module], Rule | None]:
        _FINDERS.append(find)
        _DOC[name] = norm
        return find

    return register


def find_rule(module: nn.Module) -> Rule | None:
    """The rule for the nearest ancestor type whose forward the module still has; None if there is none.

    A parameter that is not a plain attribute (a parametrization, say) is beyond every rule: None.
    """
    for cls in type(module).__mro__:
        rule = _RULES.get(cls) or _RULES.get(_qualified_name(cls))
        if rule is not None:
            return rule if _plain_attributes(module, cls) and _computes_as(module, cls) else None
    if _patch(module, "forward") is None:
        return next((rule for find in _FINDERS if (rule := find(module)) is not None), None)
    return None


def _plain_attributes(module: nn.Module, cls: type) -> bool:
    # A registered class may show its inner layer's weight as its own; its rule was written for that.
    shown = [name for name in ("weight", "bias") if isinstance(getattr(cls, name, None), property)]
    names = [name for name in ("weight", "bias") if name not in module._parameters and name not in shown]
    return not any(isinstance(getattr(module, name, None), Tensor) for name in names)


def _computes_as(module: nn.Module, cls: type) -> bool:
    """Whether the methods that make up the forward are the registered class's own."""
    return all(
        getattr(type(module), name) is getattr(cls, name) and _patch(module, name) is None for name in _methods(cls)
    )


@cache
def _methods(cls: type) -> list[str]:
    own = (vars(base).items() for base in cls.__mro__ if base not in nn.Module.__mro__)
    methods = {name for items in own for name, value in items if callable(value) and not name.startswith("__")}
    return sorted(methods - _OUTSIDE_FORWARD)


def _patch(module: nn.Module, name: str) -> Any:
    """What stands in a method's place on the instance, below the routes of a clipper; None if nothing does."""
    found: Any = module.__dict__.get(name)
    while hasattr(found, "replaced"):
        found = found.replaced
    return found


def supported_layers() -> list[tuple[str, str]]:
    """(package and type name, how its norm is found) of every registered layer, for the README's table."""
    names = {cls if isinstance(cls, str) else _qualified_name(cls): doc for cls, doc in _DOC.items()}
    return sorted((f"{name.split('.')[0]}: {name.split('.')[-1]}", doc) for name, doc in names.items())


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
