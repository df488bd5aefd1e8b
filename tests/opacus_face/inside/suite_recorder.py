"""A pytest plugin for the processes that run Opacus' tests: the same run every time, and its outcomes in a file.

Hypothesis draws the same examples each time and keeps no database; the generators are seeded before every test. What
came out is written to the file named by FASTCLIP_SUITE_REPORT after each test, so that a crash leaves what was done.
"""

import json
import os
import random
from pathlib import Path

import hypothesis
import numpy
import pytest
import torch

SEED = 20260101
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)

_WORST = {"passed": 0, "skipped": 1, "failed": 2}
_found: dict[str, dict] = {}


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


def _note(nodeid: str, outcome: str, seconds: float, text: str) -> None:
    """A test is as bad as the worst of its phases and subtests."""
    entry = _found.setdefault(nodeid, {"outcome": "passed", "seconds": 0.0, "text": ""})
    entry["seconds"] = round(entry["seconds"] + seconds, 3)
    if _WORST[outcome] > _WORST[entry["outcome"]]:
        entry.update(outcome=outcome, text=text)
    Path(os.environ["FASTCLIP_SUITE_REPORT"]).write_text(json.dumps(_found))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report.nodeid, report.outcome, report.duration, str(report.longrepr or ""))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _note(report.nodeid + "::(collection)", "failed", 0.0, str(report.longrepr))
