"""`opacus.validators.module_validator`: Opacus' ModuleValidator and its registries, with the face's fixers."""

from __future__ import annotations

import logging
from typing import Any

import opacus.validators.module_validator as theirs
import opacus.validators.multihead_attention
from opacus.utils.module_utils import clone_module, trainable_modules
from torch import nn

from fastclip.opacus._mirror import delegate
from fastclip.opacus.validators.multihead_attention import fix as fix_attention

logger = logging.getLogger(theirs.__name__)


class ModuleValidator(theirs.ModuleValidator):
    """With Opacus' registries, shared with it. Where its own fixer builds what the face replaces, the face's fixer runs."""

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
            # Whoever registered another one gets that.
            if fixer is opacus.validators.multihead_attention.fix:
                fixer = fix_attention
            replaced.append(old)
            new = fixer(old, **kwargs).to(next(old.parameters()).device)
            fixed = cls._replace_sub_module(root=fixed, sub_module_name=name, new_sub_module=new)
            logger.info(f"Replaced sub_module {name} : {old} with {new}")
        return fixed


__getattr__, __dir__ = delegate(__name__)
