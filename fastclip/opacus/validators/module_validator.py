"""`opacus.validators.module_validator`: Opacus' ModuleValidator and its registries, with the face's fixers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import opacus.validators.module_validator as theirs
import opacus.validators.multihead_attention
from opacus.utils.module_utils import clone_module, trainable_modules
from torch import nn

from fastclip.opacus._mirror import delegate
from fastclip.opacus.validators.multihead_attention import fix as fix_attention

logger = logging.getLogger(theirs.__name__)

Fixer = Callable[..., nn.Module]


class _Fixers(MutableMapping[type, Fixer]):
    """Opacus' registry, which stays as it is; where its own fixer builds what the face replaces, the face's is found."""

    def __getitem__(self, kind: type) -> Fixer:
        fixer = theirs.ModuleValidator.FIXERS[kind]
        # Whoever registered another one gets that.
        return fix_attention if fixer is opacus.validators.multihead_attention.fix else fixer

    def __setitem__(self, kind: type, fixer: Fixer) -> None:
        theirs.ModuleValidator.FIXERS[kind] = fixer

    def __delitem__(self, kind: type) -> None:
        del theirs.ModuleValidator.FIXERS[kind]

    def __iter__(self) -> Iterator[type]:
        return iter(theirs.ModuleValidator.FIXERS)

    def __len__(self) -> int:
        return len(theirs.ModuleValidator.FIXERS)


class ModuleValidator(theirs.ModuleValidator):
    """With Opacus' registries ``VALIDATORS`` and ``FIXERS``: what is registered there is found here, and the other way."""

    FIXERS: MutableMapping[type, Fixer] = _Fixers()

    @classmethod
    def fix(cls, module: nn.Module, **kwargs: Any) -> nn.Module:
        """A copy of ``module`` with each trainable submodule that has a fixer replaced by what that makes of it."""
        fixed = clone_module(module)
        replaced: list[nn.Module] = []
        for name, old in list(trainable_modules(fixed)):
            fixer = cls.FIXERS.get(type(old))
            # A fixer replaces all that is below, which need not be there any more.
            if fixer is None or any(old is below for gone in replaced for below in gone.modules()):
                continue
            replaced.append(old)
            new = fixer(old, **kwargs).to(next(old.parameters()).device)
            fixed = cls._replace_sub_module(root=fixed, sub_module_name=name, new_sub_module=new)
            logger.info(f"Replaced sub_module {name} : {old} with {new}")
        return fixed


__getattr__, __dir__ = delegate(__name__)
