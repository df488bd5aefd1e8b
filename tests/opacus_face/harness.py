"""Runs the tests that Opacus ships inside its wheel, as they are and with their imports pointed at fastclip.opacus.

The files are copied from the installed package into a directory of the session and run by pytest in a process of their
own. `inside/` is on the path there: the stand-in for torchvision, and the plugin that makes a run repeatable and writes
down what came out.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "opacus_tests"
INSIDE = Path(__file__).parent / "inside"
# In their names neither, but tests all the same.
_ODD_NAMES = ("prv_accountant.py", "ddp_hook_check.py", "multigpu_fsdpcheck.py")
_SECONDS = 3600
_IMPORT = re.compile(r"^([ \t]*)(from|import)[ \t]+opacus(?P<path>(\.\w+)*)(?=[ \t]|$)(?P<rest>.*)$", re.MULTILINE)


def shipped_tests() -> Path | None:
    """Where the installed Opacus has its tests; Opacus itself is not imported."""
    spec = importlib.util.find_spec("opacus")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "tests"


def suite_files() -> list[str]:
    tests = shipped_tests()
    if tests is None:
        return []
    names = (path.relative_to(tests).as_posix() for path in tests.rglob("*.py"))
    return sorted(name for name in names if name.endswith("_test.py") or name in _ODD_NAMES)


def point_at_the_face(source: str) -> str:
    """The same test with every import of Opacus taken from fastclip.opacus; strings, such as logger names, stay."""

    def pointed(found: re.Match[str]) -> str:
        indent, kind, path, rest = found[1], found[2], found["path"], found["rest"]
        target = f"fastclip.opacus{path}"
        if kind == "from" or rest.split()[:1] == ["as"]:
            return f"{indent}{kind} {target}{rest}"
        if rest.split("#")[0].strip():
            raise ValueError(f"an import of several modules: {found[0]}")
        # `import opacus.utils` binds the name opacus.
        also = f"import {target}; " if path else ""
        return f"{indent}{also}import fastclip.opacus as opacus{rest}"

    pointed_source = _IMPORT.sub(pointed, source)
    if left := sorted(_roots(pointed_source) & {"opacus"}):
        raise ValueError(f"still imported: {left}")
    return pointed_source


def _roots(source: str) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots.add(str(node.module).partition(".")[0])
    return roots


def copy_suite(root: Path, *, face: bool) -> Path:
    """The suite as a package in `root`, with the face's imports or Opacus' own."""
    tests = shipped_tests()
    assert tests is not None
    shutil.copytree(tests, root / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pytest.ini").write_text("[pytest]\n")
    if face:
        for path in (root / PACKAGE).rglob("*.py"):
            path.write_text(point_at_the_face(path.read_text()))
    return root


@dataclass
class Run:
    """What one process made of the suite: by test, and how the process ended."""

    tests: dict[str, dict]
    exit_status: int = 0
    output: str = ""
    seconds: float = 0.0

    def of(self, outcome: str) -> list[str]:
        return [name for name, test in self.tests.items() if test["outcome"] == outcome]

    def file(self, file: str) -> Run:
        tests = {name: test for name, test in self.tests.items() if name.startswith(f"{PACKAGE}/{file}::")}
        return Run(tests, self.exit_status, self.output, self.seconds)

    @property
    def broken(self) -> str:
        """Why nothing may be concluded from this run, or nothing."""
        if self.exit_status not in (0, 1):
            return f"pytest ended with {self.exit_status}:\n{self.output}"
        return "\n".join(test["text"] for name, test in self.tests.items() if name.endswith("::(collection)"))


def run_suite(root: Path, tests: list[str]) -> Run:
    """Those tests, or whole files, by pytest's names and in one process, as Opacus' own CI does it."""
    report = root / "report.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "suite_recorder", "-p", "no:cacheprovider"]
    # Otherwise a file that does not load would keep all others from running.
    command += ["--continue-on-collection-errors", "-c", "pytest.ini", "--rootdir", ".", *tests]
    path = os.pathsep.join([str(INSIDE), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "FASTCLIP_SUITE_REPORT": str(report), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False, timeout=_SECONDS)
    found = json.loads(report.read_text()) if report.exists() else {}
    return Run(found, run.returncode, (run.stdout + run.stderr)[-4000:], time.monotonic() - start)


def run_plain(root: Path, files: list[str], face: Run) -> Run:
    """With Opacus itself what did not pass with the face; the rest needs no comparison. All of it, if that run broke."""
    if face.broken:
        return run_suite(root, [f"{PACKAGE}/{file}" for file in files])
    doubtful = [name for name, test in face.tests.items() if test["outcome"] != "passed"]
    return run_suite(root, doubtful) if doubtful else Run({})


def regressions(plain: Run, face: Run, refused: Collection[str] = ()) -> list[str]:
    """A line, and what was raised, for each test that passes with Opacus and does not pass with the face, but for these."""
    found = []
    for name in set(plain.of("passed")) - set(refused):
        test = face.tests.get(name)
        if test is None:
            found.append(f"{name}: did not run")
        elif test["outcome"] != "passed":
            found.append(f"{name}: {test['outcome']}\n{test['text'][-2000:]}")
    return found
