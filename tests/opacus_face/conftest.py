"""What Opacus' suite came to, in numbers, after the tests that ran it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from opacus_face.harness import Run, regressions

SUITE = pytest.StashKey[tuple[Run, Run]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if SUITE not in config.stash:
        return
    plain, face = config.stash[SUITE]
    counts = ", ".join(f"{len(face.of(outcome))} {outcome}" for outcome in ("passed", "failed", "skipped"))
    lost = len(regressions(plain, face))
    terminalreporter.section("Opacus' own tests on fastclip.opacus")
    terminalreporter.line(
        f"{counts}; {lost} of those not passed pass with Opacus; {face.seconds:.0f} s and {plain.seconds:.0f} s"
    )


@pytest.fixture(autouse=True)
def opacus_as_it_was() -> Iterator[None]:
    """Opacus' modules are those that another test finds: warnings leave a registry in them."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        vars(sys.modules[name]).pop("__warningregistry__", None)
