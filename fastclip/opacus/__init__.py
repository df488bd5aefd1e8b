"""Opacus' names and module paths: `import fastclip.opacus as opacus`, and a script written for Opacus goes on.

Wrappers, optimizers, PrivacyEngine, criteria, loaders and what they need are fastclip's; accountants, schedulers, validators
and the modes "ew", "no_op", FSDP and TP are Opacus' own.

Every module path of Opacus 1.6.0 exists below this package. Where fastclip has a module of its own it is that one;
everywhere else it is Opacus' module itself, the same object, so that classes, registries and errors are shared with code
that says `import opacus`. `docs/from-opacus.md` says which is which.

How a module of Opacus is replaced:

- Its file goes to the same path here, `fastclip/opacus/optimizers/optimizer.py` for `opacus.optimizers.optimizer`. Each
  directory on the way has an `__init__.py` (and a line in setup.py's packages); without one, files in it are not seen.
- Each such file, and each `__init__.py`, ends with `__getattr__, __dir__ = delegate(__name__)`. What it does not define
  comes from Opacus, and what Opacus re-exports comes from the replaced module: once `optimizers/optimizer.py` defines
  DPOptimizer, `fastclip.opacus.optimizers.DPOptimizer` is that class, with no line in `optimizers/__init__.py`.
- Opacus' own modules keep meaning Opacus' classes by the names they imported. A class that replaces one must therefore be
  a subclass of it: `class DPOptimizer(opacus.optimizers.DPOptimizer)`, and in a family of both lines,
  `class DPPerLayerOptimizer(DPOptimizer, opacus.optimizers.DPPerLayerOptimizer)`. Then `isinstance` agrees on both sides.
  To accept what plain Opacus made, ask `isinstance` for Opacus' class, not for the subclass.
- A subclass does not help where Opacus builds an object or compares `type(x)`: get_gsm_class, get_hooks_class,
  prepare_module, get_optimizer_class, PrivacyEngine's methods (`type(module) is not get_gsm_class(...)`), the fixers of
  ModuleValidator. Functions among these can run with other names, see `rebound`; classes have to be replaced as well.
- A module that logs keeps Opacus' logger, `logging.getLogger("opacus.data_loader")`: users and tests configure that name.
"""

from fastclip.opacus._mirror import delegate, install

install()

__getattr__, __dir__ = delegate(__name__)
