"""How a name below `fastclip.opacus` is found: fastclip's own module where there is one, else Opacus' module itself."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from typing import Any

FACE = "fastclip.opacus"
THEIRS = "opacus"
WRITTEN_FOR = "1.6.0"
_DELEGATED_DUNDERS = ("__all__", "__version__")


def their_name(name: str) -> str:
    """`opacus.utils` for `fastclip.opacus.utils`."""
    return THEIRS + name[len(FACE) :]


class _SameModule(Loader):
    """Leaves Opacus' module under the face's name, untouched: its `__name__` and `__spec__` go on saying `opacus`."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        # The import system takes what stands in sys.modules afterwards. Had create_module returned Opacus' module, its
        # __spec__ would have been overwritten, and importlib.reload(opacus.utils) would look for another name.
        sys.modules[module.__name__] = importlib.import_module(their_name(module.__name__))


class Finder(MetaPathFinder):
    """Stands before the usual finders, which would load Opacus' files a second time under the face's names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(FACE + "."):
            return None
        parent = sys.modules[fullname.rpartition(".")[0]]
        # Below a module of Opacus there is nothing of ours: the import would set our module as an attribute of theirs.
        if parent.__name__.startswith(FACE):
            own = importlib.machinery.PathFinder.find_spec(fullname, parent.__path__[:1], target)
            # A directory without __init__.py has no loader: not a package of ours.
            if own is not None and own.loader is not None:
                return own
        try:
            theirs = importlib.util.find_spec(their_name(fullname))
        except ModuleNotFoundError:  # a package that only we have
            return None
        if theirs is None:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, _SameModule(), origin=theirs.origin)
        spec.submodule_search_locations = theirs.submodule_search_locations
        return spec


def install() -> None:
    """Puts the finder in place, once; without Opacus, an ImportError that says what to install."""
    try:
        # Not `import opacus`: any directory of that name on the path would do for that.
        version = importlib.import_module(f"{THEIRS}.version").__version__
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{FACE} stands on Opacus {WRITTEN_FOR}, and {error.name!r} is not installed: pip install fastclip-dp[opacus]"
        ) from error
    if version != WRITTEN_FOR:
        warnings.warn(
            f"{FACE} is written for Opacus {WRITTEN_FOR} and found {version}: pip install fastclip-dp[opacus]",
            stacklevel=3,
        )
    # By name: after a reload of this module the class is another one.
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


def _replaced(value: Any, asking: str) -> Any:
    """The class or function that stands in for Opacus' `value`: the one of that name in our module of that path."""
    home, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(home, str) or not isinstance(name, str) or not home.startswith(THEIRS + "."):
        return value
    ours = FACE + home[len(THEIRS) :]
    if ours == asking:
        return value
    module = importlib.import_module(ours)
    return getattr(module, name, value) if module.__name__ == ours else value


def delegate(name: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for our module `name`: what it does not define is Opacus', replaced where we replace it.

    A submodule is the face's submodule. `__all__` leaves out what Opacus lists and does not have. A package also lists
    Opacus' modules when pkgutil walks it.
    """
    theirs = importlib.import_module(their_name(name))
    ours = sys.modules[name]
    if hasattr(theirs, "__path__"):
        ours.__path__ = [ours.__path__[0], *theirs.__path__]

    def attribute(wanted: str) -> Any:
        if (wanted.startswith("__") and wanted not in _DELEGATED_DUNDERS) or not hasattr(theirs, wanted):
            raise AttributeError(f"module {name!r} has no attribute {wanted!r}")
        value = getattr(theirs, wanted)
        if wanted == "__all__":
            return [listed for listed in value if hasattr(theirs, listed)]
        if isinstance(value, types.ModuleType) and value.__name__ == f"{theirs.__name__}.{wanted}":
            return importlib.import_module(f"{name}.{wanted}")
        return _replaced(value, name)

    def listed() -> list[str]:
        return sorted({*vars(ours), *dir(theirs)})

    return attribute, listed


def rebound(name: str, **names: Any) -> dict[str, Any]:
    """The functions of Opacus' module for our module `name`, made to see `names` in place of the globals they imported.

    For a module of ours whose functions are Opacus' but build or look up what the face replaces:
    `globals().update(rebound(__name__, wrap_model=wrap_model))`. They call each other, not Opacus'. Classes and decorated
    functions are not rebound; those keep Opacus' globals.
    """
    theirs = vars(importlib.import_module(their_name(name)))
    if unknown := names.keys() - theirs.keys():
        raise AttributeError(f"{their_name(name)} has no {sorted(unknown)}: nothing in it would see them")
    space = {**theirs, **names}
    made = {}
    for key, function in theirs.items():
        if isinstance(function, types.FunctionType) and function.__globals__ is theirs and key not in names:
            copy = types.FunctionType(
                function.__code__, space, function.__name__, function.__defaults__, function.__closure__
            )
            copy.__kwdefaults__ = function.__kwdefaults__
            copy.__annotations__ = function.__annotations__
            copy.__doc__ = function.__doc__
            copy.__module__ = name
            made[key] = copy
    space.update(made)
    return {**names, **made}
