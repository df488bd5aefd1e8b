"""fastclip.opacus is Opacus under another name wherever fastclip has nothing of its own, and says so when it cannot be."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from opacus_face.harness import point_at_the_face, shipped_tests

ROOT = Path(__file__).parents[2]
FACE = ROOT / "fastclip" / "opacus"

needs_opacus = pytest.mark.skipif(
    shipped_tests() is None, reason="opacus is not installed: pip install fastclip-dp[opacus]"
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def module_paths() -> list[str]:
    """Every module of Opacus but its tests, as a path below the package."""
    tests = shipped_tests()
    if tests is None:
        return []
    package = tests.parent
    files = (path.relative_to(package) for path in package.rglob("*.py") if tests not in path.parents)
    names = {".".join(path.with_suffix("").parts).removesuffix("__init__").rstrip(".") for path in files}
    return sorted(names - {""})


def own_paths() -> set[str]:
    files = (path.relative_to(FACE) for path in FACE.rglob("*.py"))
    return {".".join(path.with_suffix("").parts).removesuffix("__init__").rstrip(".") for path in files}


def test_importing_fastclip_leaves_opacus_alone() -> None:
    run = python("import sys, fastclip; print([m for m in sys.modules if 'opacus' in m])")
    assert run.stdout.strip() == "[]", run.stderr


def test_without_opacus_the_error_says_what_to_install() -> None:
    run = python(
        """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opacus":
            raise ModuleNotFoundError(f"No module named {name!r}", name="opacus")
sys.meta_path.insert(0, Absent())
for name in ("fastclip.opacus", "fastclip.opacus.optimizers"):
    try:
        __import__(name)
    except ImportError as error:
        print(error)
"""
    )
    assert run.stdout.count("'opacus' is not installed: pip install fastclip-dp[opacus]") == 2, run.stdout + run.stderr


def test_a_directory_called_opacus_is_not_opacus(tmp_path: Path) -> None:
    (tmp_path / "opacus").mkdir()
    # Whatever is installed is out of the way; the directory is a namespace package, and importing it works.
    run = python(
        f"""
import sys, fastclip, importlib.machinery
class OnlyHere:
    def find_spec(self, name, path=None, target=None):
        if name == "opacus":
            return importlib.machinery.PathFinder.find_spec(name, [{str(tmp_path)!r}])
sys.meta_path.insert(0, OnlyHere())
import opacus
try:
    import fastclip.opacus
except ImportError as error:
    print(error)
"""
    )
    assert "pip install fastclip-dp[opacus]" in run.stdout, run.stdout + run.stderr


def test_another_version_is_said_to_be_another() -> None:
    run = python(
        """
import sys, types, warnings, fastclip
version = types.ModuleType("opacus.version")
version.__version__ = "1.7.0"
sys.modules["opacus"], sys.modules["opacus.version"] = types.ModuleType("opacus"), version
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import fastclip.opacus
print(*[warning.message for warning in seen])
"""
    )
    assert "written for Opacus 1.6.0 and found 1.7.0" in run.stdout, run.stderr


@needs_opacus
@pytest.mark.parametrize("path", module_paths())
def test_every_module_is_opacus_own_or_fastclips(path: str) -> None:
    try:
        theirs = importlib.import_module(f"opacus.{path}")
    except ImportError as error:  # lightning is not installed
        with pytest.raises(type(error), match=str(error)):
            importlib.import_module(f"fastclip.opacus.{path}")
        return
    ours = importlib.import_module(f"fastclip.opacus.{path}")
    assert theirs.__name__ == theirs.__spec__.name == f"opacus.{path}"
    if path not in own_paths():
        assert ours is theirs
        return
    assert ours.__name__ == ours.__spec__.name == f"fastclip.opacus.{path}"
    assert Path(ours.__file__).is_relative_to(FACE)
    for name in vars(theirs):
        assert hasattr(ours, name) and name in dir(ours), name


@needs_opacus
def test_attributes_are_there_as_after_importing_opacus() -> None:
    run = python(
        """
import opacus, types
import fastclip.opacus
print([name for name in dir(opacus) if not hasattr(fastclip.opacus, name)])
print([name for name in dir(opacus) if isinstance(getattr(opacus, name), types.ModuleType)
       and getattr(fastclip.opacus, name) is not __import__("sys").modules["fastclip.opacus." + name]])
"""
    )
    assert run.stdout.split("\n")[:2] == ["[]", "[]"], run.stdout + run.stderr


@needs_opacus
def test_unknown_names_are_refused_under_the_name_that_was_asked() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"fastclip\.opacus\.nothing"):
        importlib.import_module("fastclip.opacus.nothing")
    with pytest.raises(ModuleNotFoundError, match=r"fastclip\.opacus\.validators\.errors.* is not a package"):
        importlib.import_module("fastclip.opacus.validators.errors.nothing")
    with pytest.raises(AttributeError, match=r"'fastclip\.opacus\.utils' has no attribute 'nothing'"):
        _ = importlib.import_module("fastclip.opacus.utils").nothing


@needs_opacus
def test_pickle_reload_and_inspect_find_what_they_look_for() -> None:
    schedulers = importlib.import_module("fastclip.opacus.schedulers")
    own = importlib.import_module("fastclip.opacus.utils.per_sample_gradients_utils")
    for value in (schedulers.StepNoise, own.check_per_sample_gradients_are_correct):
        assert pickle.loads(pickle.dumps(value)) is value
        assert inspect.getsource(value)
    errors = importlib.import_module("fastclip.opacus.validators.errors")
    assert importlib.util.find_spec("fastclip.opacus.validators.errors") is errors.__spec__
    # Reloading makes new classes: in a process of its own.
    run = python(
        """
import importlib, sys
import fastclip.opacus, fastclip.opacus._mirror, fastclip.opacus.validators.errors as errors, opacus.validators.errors
for module in (errors, fastclip.opacus._mirror, fastclip.opacus.utils, fastclip.opacus):
    assert importlib.reload(module) is module
assert sys.modules["fastclip.opacus.validators.errors"] is opacus.validators.errors is errors
from fastclip.opacus.validators import lstm
assert lstm.__name__ == "opacus.validators.lstm"
assert len([f for f in sys.meta_path if "fastclip" in type(f).__module__]) == 1
spec = importlib.util.find_spec("fastclip.opacus.layers.param_rename")
assert spec.origin.endswith("param_rename.py") and not spec.has_location
print("well")
"""
    )
    assert run.stdout == "well\n", run.stderr


@needs_opacus
def test_walking_the_package_finds_every_module() -> None:
    package = importlib.import_module("fastclip.opacus")
    walked = {found.name for found in pkgutil.walk_packages(package.__path__, "fastclip.opacus.")}
    assert {f"fastclip.opacus.{path}" for path in module_paths()} <= walked


@needs_opacus
def test_a_replaced_class_is_met_wherever_opacus_exports_it(tmp_path: Path) -> None:
    package, stray, extra = (tmp_path / name for name in ("optimizers", "accountants", "extra"))
    for directory in (package, stray, extra):
        directory.mkdir()
    ending = "from fastclip.opacus._mirror import delegate, rebound\n__getattr__, __dir__ = delegate(__name__)\n"
    (package / "__init__.py").write_text(ending)
    (package / "optimizer.py").write_text(
        "import opacus.optimizers.optimizer as theirs\nclass DPOptimizer(theirs.DPOptimizer): pass\n" + ending
    )
    (stray / "rdp.py").write_text("")
    (extra / "__init__.py").write_text("")
    run = python(
        f"""
import sys
import fastclip.opacus as face
import opacus, opacus.optimizers
face.__path__[0] = {str(tmp_path)!r}
from fastclip.opacus.optimizers import *
from fastclip.opacus.optimizers import perlayeroptimizer
from fastclip.opacus.optimizers.optimizer import _generate_noise, DPOptimizer as home
assert home.__module__ == "fastclip.opacus.optimizers.optimizer"
assert DPOptimizer is home is face.optimizers.DPOptimizer is not opacus.optimizers.DPOptimizer
assert opacus.optimizers.optimizer.DPOptimizer is opacus.optimizers.DPOptimizer is home.__mro__[1]
assert DPPerLayerOptimizer is opacus.optimizers.DPPerLayerOptimizer
assert perlayeroptimizer is opacus.optimizers.perlayeroptimizer
assert _generate_noise is opacus.optimizers.optimizer._generate_noise
# A directory without __init__.py does not replace, and puts nothing into Opacus.
import fastclip.opacus.accountants.rdp
assert fastclip.opacus.accountants.rdp is opacus.accountants.rdp is sys.modules["opacus.accountants.rdp"]
assert opacus.accountants.rdp.RDPAccountant is opacus.accountants.RDPAccountant
try:
    import fastclip.opacus.extra.nothing
except ModuleNotFoundError as error:
    assert error.name == "fastclip.opacus.extra.nothing"
print("well")
"""
    )
    assert run.stdout == "well\n", run.stderr


@needs_opacus
def test_rebound_functions_see_the_faces_names_and_each_other() -> None:
    from fastclip.opacus._mirror import rebound

    name = "fastclip.opacus.utils.per_sample_gradients_utils"
    theirs = importlib.import_module("opacus.utils.per_sample_gradients_utils")
    marker = object()
    made = rebound(name, wrap_model=marker)
    compute = made["compute_opacus_grad_sample"]
    assert isinstance(compute, types.FunctionType) and compute is not theirs.compute_opacus_grad_sample
    assert compute.__globals__["wrap_model"] is marker and theirs.wrap_model is not marker
    caller = made["compute_grad_samples_microbatch_and_opacus"]
    assert caller.__globals__["compute_opacus_grad_sample"] is compute
    assert inspect.signature(caller) == inspect.signature(theirs.compute_grad_samples_microbatch_and_opacus)
    with pytest.raises(AttributeError, match="no_such_name"):
        rebound(name, no_such_name=1)
    ours = importlib.import_module(name)
    wrap = importlib.import_module("fastclip.opacus.grad_sample").wrap_model
    assert ours.compute_opacus_grad_sample.__globals__["wrap_model"] is wrap
    assert ours.compute_opacus_grad_sample is not theirs.compute_opacus_grad_sample


def test_every_directory_of_the_face_is_a_package_that_is_installed() -> None:
    setup = (ROOT / "setup.py").read_text()
    for directory in {path.parent for path in FACE.rglob("*.py")}:
        assert (directory / "__init__.py").exists(), directory
        name = ".".join(directory.relative_to(ROOT).parts)
        assert f'"{name}",' in setup, f"setup.py's packages lack {name}"


@pytest.mark.parametrize(
    ("line", "pointed"),
    [
        ("from opacus import PrivacyEngine", "from fastclip.opacus import PrivacyEngine"),
        (
            "    from opacus.layers import (\n        DPLSTM)",
            "    from fastclip.opacus.layers import (\n        DPLSTM)",
        ),
        ("import opacus", "import fastclip.opacus as opacus"),
        ("import opacus as o", "import fastclip.opacus as o"),
        ("import opacus.utils  # why", "import fastclip.opacus.utils; import fastclip.opacus as opacus  # why"),
        ("import opacus.utils as u", "import fastclip.opacus.utils as u"),
        ("import opacus_lab", "import opacus_lab"),
        ('log("from opacus", "opacus.data_loader")', 'log("from opacus", "opacus.data_loader")'),
    ],
)
def test_imports_are_pointed_at_the_face(line: str, pointed: str) -> None:
    block = "if True:\n" if line.startswith(" ") else ""
    assert point_at_the_face(block + line) == block + pointed


def test_an_import_that_cannot_be_pointed_is_not_passed_over() -> None:
    for line in ("import opacus, sys", "import sys, opacus"):
        with pytest.raises(ValueError, match="import"):
            point_at_the_face(line)
