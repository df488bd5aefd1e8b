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
    """``VALIDATORS`` and ``FIXERS`` are Opacus', shared with it; where Opacus' fixer builds what the face replaces, the face's runs."""

    @classmethod
    def fix(cls, module: nn.Module, **kwargs: Any) -> nn.Module:
        """A copy of ``module`` with each trainable submodule that has a fixer replaced by what that makes of it."""
        fixed = clone_module(module)
        for name in [name for name, _ in trainable_modules(fixed)]:
            old = fixed.get_submodule(name)
            fixer = cls.FIXERS.get(type(old))
            if fixer is None:
                continue
            # Whoever registered another one gets that.
            if fixer is opacus.validators.multihead_attention.fix:
                fixer = fix_attention
            new = fixer(old, **kwargs).to(next(old.parameters()).device)
            fixed = cls._replace_sub_module(root=fixed, sub_module_name=name, new_sub_module=new)
            logger.info(f"Replaced sub_module {name} : {old} with {new}")
        return fixed


__getattr__, __dir__ = delegate(__name__)
