"""The benchmark programs, at toy sizes: they run, check before they time, and write the page."""

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def bench(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_a_row_of_whole_steps(tmp_path):
    output = tmp_path / "steps.json"
    row = "llama:2x8:fp32"
    done = bench(
        "bench/step.py",
        "--row",
        row,
        "--small",
        "--rounds",
        "2",
        "--modes",
        "plain",
        "fastclip",
        "--output",
        str(output),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())[row]
    assert set(result["seconds"]) == {"plain", "fastclip"} and not result["failed"]
    assert all(len(times) == 2 for times in result["seconds"].values())
    assert all(m["all"] >= m["last_step"] > 0 for m in result["peak_bytes"].values())


def test_a_row_of_another_form_is_refused(tmp_path):
    done = bench("bench/step.py", "--row", "gpt2:256", "--output", str(tmp_path / "steps.json"))
    assert done.returncode != 0 and "BATCHxLENGTH" in done.stderr


def test_nothing_is_timed_that_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import step_models

    import fastclip

    step_models.check("gpt2")
    attach = fastclip.attach
    monkeypatch.setattr(
        fastclip, "attach", lambda model, max_grad_norm: attach(model, max_grad_norm=1.01 * max_grad_norm)
    )
    with pytest.raises(RuntimeError, match="off by"):
        step_models.check("gpt2")


@pytest.mark.parametrize("count", range(1, 7))
def test_each_competitor_follows_each_other_equally_often(monkeypatch, count):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from turns import in_turn

    orders = [in_turn(range(count), number) for number in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert set(pairs.values()) == ({2} if count > 1 else set()) and len(pairs) == count * (count - 1)


@pytest.mark.parametrize(("base", "slope"), [(900, 10), (200, 33.3), (990, 40), (50, 1.5)])
@pytest.mark.parametrize("floor", [0, 400])
def test_the_largest_batch_fits_and_one_more_does_not(monkeypatch, base, slope, floor):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from largest_batch import largest

    asked = []

    def peak(batch):
        asked.append(batch)
        return max(floor, base + slope * batch)

    found = largest(peak, 1000)
    assert (found == 0 and peak(1) > 1000) or peak(found) <= 1000 < peak(found + 1)
    assert len(set(asked)) <= 16
