"""Opacus' own tests pass on fastclip.opacus wherever they pass on Opacus, on this machine, with the same seeds."""

from __future__ import annotations

import pytest
import torch

from opacus_face.conftest import SUITE
from opacus_face.harness import PACKAGE, Run, copy_suite, regressions, run_plain, run_suite, shipped_tests, suite_files

# A file whose every test wants GPUs has nothing to compare on a machine without.
_WANTS_GPUS = ("torch.cuda.device_count()", "torch.cuda.is_available()")

# Tests that give time-major batches, [T, B], to a model that they declare batch-first: Opacus clips time steps and accounts
# for examples. The trial of the first batch finds that examples mix, and refuses.
_TIME_STEPS_AS_EXAMPLES = {
    f"{PACKAGE}/privacy_engine_test.py::{case}::test_make_private_with_epsilon"
    for case in ("PrivacyEngineTextTest", "PrivacyEngineTextTestFunctorch", "PrivacyEngineTextHooksTest")
}

# The first test waits for the suite, about ten minutes on one core.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7300)]


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """With Opacus and with the face, the files that are asked for."""
    if shipped_tests() is None:
        pytest.skip("opacus is not installed: pip install fastclip-dp[opacus]")
    asked = [item for item in request.session.items if item.path == request.path]
    files = [item.callspec.params["file"] for item in asked]
    face = run_suite(copy_suite(tmp_path_factory.mktemp("face"), face=True), [f"{PACKAGE}/{file}" for file in files])
    plain = run_plain(copy_suite(tmp_path_factory.mktemp("plain"), face=False), files, face)
    request.config.stash[SUITE] = (plain, face)
    return plain, face


@pytest.mark.parametrize("file", suite_files() or ["opacus"])
def test_passes_where_opacus_passes(file: str, suite: tuple[Run, Run]) -> None:
    plain, face = (run.file(file) for run in suite)
    assert not plain.broken, plain.broken
    refused = {name for name in _TIME_STEPS_AS_EXAMPLES if name in face.tests}
    assert all("examples are not independent" in face.tests[name]["text"] for name in refused)
    found = regressions(plain, face, refused)
    assert not found, f"{len(found)} that pass with Opacus do not\n{face.broken}\n" + "\n".join(found)
    assert not face.broken, face.broken
    if not face.of("passed"):
        text = (shipped_tests() / file).read_text()
        assert torch.cuda.device_count() < 2 and any(word in text for word in _WANTS_GPUS), plain.output
        pytest.skip("every test of this file needs GPUs")
