"""bench/gpu.py without a GPU: the whole command on toy sizes, and what it does when something is wrong."""

import contextlib
import copy
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from kernel_cases import cases_of

from fastclip import dispatch, reference

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("transformers", reason="the steps are of transformers' models")
ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--dry-run"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bench_on_the_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "bench")])


def module(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """(output, results) of the whole command."""
    folder = tmp_path_factory.mktemp("dry")
    environment = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    (file,) = folder.glob("*/*.json")
    return run.stdout, json.loads(file.read_text())


@pytest.mark.slow
def test_a_dry_run_measures_everything_and_is_marked(dry_run):
    output, results = dry_run
    assert results["dry_run"] is True and results["machine"]["gpu"] == "dry run"
    sections = results["sections"]
    assert set(sections) == set(module("gpu").SECTIONS)
    for section, found in sections.items():
        for name, value in found["items"].items():
            assert "error" not in value and "not_timed" not in value, (section, name, value)
    assert sections["steps"]["items"]["GPT-2 124M, T 1024"]["ours"]["ms"] > 0
    assert sections["kernels"]["items"]["affine_norm 768, T 512 bf16"]["compile"]["ms"] > 0
    assert all(x["cases"] and not x["failures"] for x in sections["correctness"]["items"].values())
    assert "FAILED" not in output


@pytest.mark.slow
def test_results_of_a_dry_run_are_refused(dry_run, tmp_path):
    tmp_path.joinpath("dry-run.json").write_text(json.dumps(dry_run[1]))
    with pytest.raises(ValueError, match="dry run"):
        module("gpu_report").read(tmp_path)


def test_the_page_is_what_the_results_say():
    report = module("gpu_report")
    text = report.PAGE.read_text(encoding="utf-8")
    assert text == report.page(text, report.read()), "run python bench/gpu_report.py"


def test_tables_say_not_measured_and_name_every_model_and_kernel():
    report = module("gpu_report")
    rows = [row.strip("| ").split(" | ") for row in report.render([]).splitlines() if row.startswith("| ")]
    bodies = [row for row, after in zip(rows, [*rows[1:], []], strict=True) if "---" not in row and "---" not in after]
    assert len(bodies) > 30 and all(cell == "not measured" for row in bodies for cell in row[1:])
    steps = module("gpu_steps")
    lengths = {name: set(model.lengths) for name, model in steps.MODELS.items()}
    assert lengths == {name: set(x) for name, x in report.STEPS.items()}
    assert set(report.KERNELS) == {kernel.op for kernel in module("gpu_kernels").KERNELS.values()}


@pytest.mark.slow
def test_tables_show_what_was_measured(dry_run):
    report, results = module("gpu_report"), copy.deepcopy(dry_run[1])
    items = results["sections"]["steps"]["items"]["GPT-2 124M, T 1024"]
    items["plain"] |= {"ms": 100.0, "peak_bytes": 1000, "largest_batch": 40}
    items["ours"] |= {"ms": 115.0, "peak_bytes": 800, "largest_batch": 50}
    items["ghost"] = {"error": "OutOfMemoryError: a | b"}
    kernels = results["sections"]["kernels"]["items"]
    results["sections"]["rates"]["items"]["copy"]["bytes_per_second"] = 1e12
    affine = kernels["affine_norm 768, T 512 bf16"]
    affine |= {"bytes": 5e7, "ours": {"ms": 0.2, "graph_ms": 0.1}, "torch": {"ms": 0.5, "graph_ms": 0.3}}
    affine |= {"compile": {"ms": 0.4}}
    kernels["clipped_sum 32 of 768 x 3072 bf16"] = {"not_timed": "clipped_sum bf16 in correctness: failed"}
    text = report.render([results])
    refused = "OutOfMemoryError: a \\| b"
    assert f"| GPT-2 124M, T 1024 | 100 ms | 115 ms | 1.15 | 0.80 | {refused} | {refused} | 50 / 40 |" in text
    assert "| affine_norm 768, T 512 bf16 | 0.1 ms | 50% of copy | 3.00 | 2.00 | not measured |" in text
    assert "| clipped_sum 32 of 768 x 3072 bf16 | clipped_sum bf16 in correctness: failed | not measured |" in text


CASES = {"linear_norms": "ragged, gram", "clipped_gemm": "ragged", "embedding_norm": "ragged"}


@pytest.mark.parametrize("op", CASES)
def test_a_wrong_kernel_is_found(op):
    right = module("gpu_correctness")
    (case,) = [case for case in cases_of(op) if case.name == CASES[op]]

    def told(change):
        """What is said of the op in plain torch if its value is changed; factors: for the first launch and the second."""
        launches = iter(range(2))
        return right.compare(case, "fp32", CPU, lambda *args: change(getattr(reference, op)(*args), next(launches)))[1]

    def second_times(first, second):
        def change(x, launch):
            x.view(-1)[1] *= second if launch else first
            return x

        return change

    assert told(second_times(1, 1)) == ""
    assert "1 of" in told(second_times(1 + 1e-4, 1 + 1e-4))
    assert "1 of" in told(second_times(torch.nan, torch.nan))
    assert told(second_times(1, 1 + 1e-6)) == "the second launch has other bits"
    if op == "linear_norms":
        assert "below the exact" in told(lambda x, launch: x * torch.tensor([[1.0], [1 - 1e-5]]))
    if op != "clipped_gemm":  # which leaves its result in an argument
        assert "shape" in told(lambda x, launch: x[..., :-1])


def test_tf32_and_wrong_noise_are_found(monkeypatch):
    right, bench = module("gpu_correctness"), module("gpu_bench").Bench(dry=True)

    def rounded(op):
        def launch(a, *rest):
            a = a.view(torch.int32).bitwise_and(-(2**13)).view(torch.float32)  # to tf32
            return dispatch.plain(op)(a, *rest)

        return launch

    monkeypatch.setattr(right, "_triton", rounded)
    whys = [failure["why"] for failure in right.measure(bench, right.TF32)["failures"]]
    assert len(whys) == 4 and all(why.endswith("tf32") for why in whys)
    monkeypatch.setattr(right, "_triton", dispatch.plain)
    assert right.measure(bench, right.TF32)["failures"] == []
    stream = right._PLAIN_NOISE["add_noise"]
    assert right.measure(bench, "add_noise", stream)["failures"] == []
    assert right.measure(bench, "add_noise", lambda x, out, std, *rest: stream(x, out, 1.01 * std, *rest))["failures"]
    assert right.measure(bench, "add_noise", lambda x, out, *rest: out.normal_())["failures"]


def test_a_kernel_that_fails_is_not_timed_and_the_rest_is(tmp_path):
    gpu, results = module("gpu"), module("gpu_results")
    found = results.Results(tmp_path / "x.json", {"sections": {}})
    found.start("correctness", ["clipped_gemm bf16", "noise_adamw", "segment_sum fp32"], False)
    found.put("correctness", "clipped_gemm bf16", {"cases": 2, "failures": [{"case": "ragged", "why": "far off"}]})
    found.put("correctness", "segment_sum fp32", {"cases": 2, "failures": []})
    failed = found.failed()
    assert failed == {"clipped_gemm bf16": "failed", "noise_adamw": "not reached"}
    assert "clipped_gemm bf16" in gpu.not_timed("kernels", "clipped_gemm 768 x 3072, T 1024 bf16", failed)
    assert gpu.not_timed("kernels", "clipped_gemm 768 x 3072, T 1024 fp32", failed) == ""
    assert "not reached" in gpu.not_timed("noise_adamw", "1e9", failed)
    written = json.loads((tmp_path / "x.json").read_text())["sections"]["correctness"]["items"]
    assert written["noise_adamw"] == {"error": "not reached"} and len(written) == 3
    found.content["sections"]["correctness"]["source"] = "other code"
    assert found.failed() == {}


WORKER = """
import json, os, sys, time
for section, name in json.loads(sys.argv[sys.argv.index("--worker") + 1]):
    if name == "dies":
        os.abort()
    if name == "hangs":
        time.sleep(60)
    print("@gpu " + json.dumps({"ms": 1.0}), flush=True)
    if name == "loses the device":
        sys.exit(3)
"""


def test_what_ends_a_process_is_recorded_and_the_rest_measured(tmp_path, monkeypatch):
    gpu, results = module("gpu"), module("gpu_results")
    tmp_path.joinpath("worker.py").write_text(WORKER)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "worker.py"))
    monkeypatch.setattr(gpu, "HANG", 2)
    names = ["first", "dies", "second", "hangs", "loses the device", "last", "late"]
    found = results.Results(tmp_path / "x.json", {"sections": {}})
    found.start("rates", names, False)
    gpu.serve([("rates", name) for name in names[:-1]], found, [], time.monotonic() + 200)
    gpu.serve([("rates", "late")], found, [], time.monotonic() - 1)
    items = json.loads((tmp_path / "x.json").read_text())["sections"]["rates"]["items"]
    assert [items[name] for name in ("first", "second", "loses the device", "last")] == [{"ms": 1.0}] * 4
    assert "ended with code" in items["dies"]["error"] and "no answer" in items["hangs"]["error"]
    assert found.content["sections"]["rates"]["items"]["late"] == {"error": "not reached"}


class Watched:
    """Stands for Bench on a GPU: sync_mode is remembered."""

    mode = "default"

    @contextlib.contextmanager
    def sync_mode(self, mode):
        self.mode = mode
        yield
        self.mode = "default"


def test_a_sync_is_a_finding_with_its_place():
    steps, bench = module("gpu_steps"), Watched()

    def waits():
        if bench.mode == "warn":
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        if bench.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def breaks():
        if bench.mode == "error":
            raise RuntimeError("out of memory")

    found = steps.find_syncs(bench, waits)
    assert found["syncs"] == 2 and "tests/test_bench_gpu.py" in found["first"][-1] and "waits" in found["first"][-1]
    assert steps.find_syncs(bench, lambda: None) == {"syncs": 0, "first": None}
    with pytest.raises(RuntimeError, match="out of memory"):
        steps.find_syncs(bench, breaks)


@pytest.mark.parametrize(("limit", "guess"), [(100, 100), (100, 96), (100, 112), (8, 9), (8, 40), (9, 8)])
def test_the_largest_batch_is_one_that_ran(limit, guess):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    ran, failed = module("gpu_steps").largest(fits, 8, guess)
    assert ran == max([8, *(x for x in tried if x <= limit)])
    assert failed == min((x for x in tried if x > limit), default=None)
    assert len(tried) <= 4 and len(set(tried)) == len(tried)
    if limit == 100:
        assert ran >= 93
