"""What installing and importing do: nothing that a user has not asked for."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastclip
from fastclip import ops

ROOT = Path(__file__).parents[1]


def python(code: str, *flags: str) -> str:
    run = subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_kernels_is_ours_alone():
    assert importlib.util.find_spec("fastclip.kernels") is not None
    # Isolated mode: the current directory is not on the path, installed packages are.
    found = python("import importlib.util as u; print(u.find_spec('kernels'))", "-I").strip()
    assert "main" not in found and str(ROOT) not in found


def test_transformers_and_fastclip_import_from_the_repository_root_in_both_orders():
    for code in ("import transformers, fastclip", "import fastclip, transformers"):
        python(code + "; import fastclip.kernels; transformers.GPT2Config()")


def test_importing_is_light():
    heavy = ("transformers", "matplotlib", "typer", "datasets", "dp_accounting")
    assert python(f"import sys, fastclip; print(*[m for m in {heavy} if m in sys.modules])").strip() == ""


def test_backends_say_what_is_used_and_why():
    for name, backend in fastclip.backends().items():
        assert set(backend) == {"state", "why"}, name
    assert fastclip.backends()["torch"]["state"] == "used"


def test_the_readme_lists_the_registered_layers():
    text = (ROOT / "README.md").read_text()
    for layer, how in fastclip.supported_layers():
        assert re.search(rf"\| `{re.escape(layer)}` \| {re.escape(how)} \|", text), layer


def test_kernels_are_there_where_they_can_be_built():
    """A build that fails leaves them out, and the tests that need them would say no word."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no compiler on this machine")
    assert ops.backends()["cpp"]["state"] == "used", ops.backends()["cpp"]["why"]
