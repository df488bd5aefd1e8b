"""The one command for a GPU: are the kernels right, how fast are they, how fast is a step, does the host ever wait.

    python bench/gpu.py [--quick | --correctness | --only SECTION ...] [--dry-run]

Stops before 8 minutes (--quick: 2). bench/results/<gpu>.json is written after every measurement: a time limit loses what is
left. bench/gpu_report.py renders docs/gpu.md from it. All work is done by processes of its own, because an illegal address ends
whatever a process has: what ran then is recorded as failed, and another process goes on with the rest. A kernel that failed is
not timed. --dry-run needs no GPU: toy sizes on the CPU, Triton's interpreter, results to a temporary folder, marked so that no
table shows them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_bench
from gpu_bench import ROOT, Bench, said
from gpu_results import Results, machine

LIMIT, QUICK_LIMIT = 460, 115  # seconds
HANG = 180  # seconds of one measurement
LOST = 3  # the exit code of a process whose device answers no more, all that it began being reported
MARK = "@gpu "
SECTIONS = ("correctness", "rates", "kernels", "noise_adamw", "syncs", "steps")
Item = tuple[str, str]  # section, name


def sections() -> dict[str, tuple[Callable[[Bench], list[str]], Callable[[Bench, str], dict[str, Any]]]]:
    """Names, and the measurement of one, by section. Imported late: in a dry run Triton has to find its variable set."""
    import gpu_correctness as right
    import gpu_kernels as kernels
    import gpu_noise as noise
    import gpu_steps as steps

    found = (
        (right.names, right.measure),
        (kernels.rate_names, kernels.rate_measure),
        (kernels.names, kernels.measure),
        (noise.names, noise.measure),
        (steps.sync_names, steps.sync_measure),
        (steps.names, steps.measure),
    )
    return dict(zip(SECTIONS, found, strict=True))


def serve(items: list[Item], results: Results, flags: list[str], deadline: float) -> None:
    """Has items measured by one process, and by another one from where that ended."""
    left = list(items)
    while left and time.monotonic() < deadline:
        done = _one_process(left, results, flags, deadline)
        left = left[done:]


def _one_process(items: list[Item], results: Results, flags: list[str], deadline: float) -> int:
    """How many items are settled."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(items), *flags]
    done, why = 0, ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None

        def stop(reason: str) -> None:
            nonlocal why
            why = reason
            process.kill()

        def watch() -> threading.Timer:
            left = max(0.0, deadline - time.monotonic())
            reason = f"no answer in {HANG} s" if left > HANG else "the time limit came first"
            timer = threading.Timer(min(HANG, left), stop, [reason])
            timer.daemon = True
            timer.start()
            return timer

        timer = watch()
        for text in process.stdout:
            if not text.startswith(MARK):
                print(text if text.strip() else "", end="", flush=True)
                continue
            timer.cancel()
            results.put(*items[done], json.loads(text[len(MARK) :]))
            done += 1
            timer = watch()
        timer.cancel()
        code = process.wait()
    if done < len(items) and code != LOST:
        results.put(*items[done], {"error": why or f"its process ended with code {code}"})
        done += 1
    return done


def work(items: list[Item], bench: Bench) -> None:
    """In a process of its own: one line an item."""
    import torch

    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    known = sections()
    for section, name in items:
        try:
            value = known[section][1](bench, name)
        except Exception as error:
            value = {"error": said(error), "stack": gpu_bench.stack(error)[-6:]}
        print(f"\n{MARK}{json.dumps(value)}", flush=True)
        try:
            bench.free()
            bench.wait()
        except Exception:
            sys.exit(LOST)


def run(options: argparse.Namespace, bench: Bench, folder: Path) -> int:
    started = time.monotonic()
    deadline = started + (QUICK_LIMIT if bench.quick else LIMIT)
    here = machine(bench)
    path = folder / f"{re.sub('[^a-z0-9]+', '-', here['gpu'].lower()).strip('-')}.json"
    kept = json.loads(path.read_text()) if path.is_file() and not bench.dry else {}
    head = {
        "bench": "gpu",
        "dry_run": bench.dry,
        "command": " ".join(["python bench/gpu.py", *sys.argv[1:]]),
        "machine": here,
    }
    results = Results(path, {**head, "sections": kept.get("sections", {})})
    known = sections()
    plan = {x: known[x][0](bench) for x in SECTIONS if x in options.only}
    flags = ["--quick"] * bench.quick + ["--dry-run"] * bench.dry
    for section, names in plan.items():
        results.start(section, names, bench.quick)
    right = [("correctness", name) for name in plan.pop("correctness", [])]
    # Most of it is compiling and plain torch on the CPU.
    count = 1 if bench.dry else max(1, min(4, (os.cpu_count() or 2) // 2, len(right)))
    most = started + 0.6 * (deadline - started)
    threads = [threading.Thread(target=serve, args=(right[i::count], results, flags, most)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rest, failed = [], results.failed()
    for section, names in plan.items():
        for name in names:
            if why := not_timed(section, name, failed):
                results.put(section, name, {"not_timed": why})
            else:
                rest.append((section, name))
    serve(rest, results, flags, deadline)
    return report(results, started)


def not_timed(section: str, name: str, failed: dict[str, str]) -> str:
    import gpu_kernels

    if section == "noise_adamw":
        of = ["noise_adamw"]
    elif section == "kernels":
        kernel = gpu_kernels.KERNELS[name]
        of = [f"{kernel.op} {kernel.dtype}", kernel.op]
    else:
        return ""
    return ", ".join(f"{x} in correctness: {failed[x]}" for x in of if x in failed)


def report(results: Results, started: float) -> int:
    import gpu_correctness

    failed, reached = results.failed(), [x for s in results.content["sections"].values() for x in s["items"].values()]
    left = sum(x.get("error") == "not reached" for x in reached)
    print(
        f"\n{time.monotonic() - started:.0f} s; {len(reached) - left} of {len(reached)} measurements, in {results.path}"
    )
    if uncovered := gpu_correctness.without_cases():
        print(f"Kernels without cases in tests/kernel_cases.py: {', '.join(uncovered)}")
    if failed:
        print(f"NOT RIGHT, or not known to be: {', '.join(sorted(failed))}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections, others as they are"
    )
    parser.add_argument("--correctness", action="store_const", dest="only", const=["correctness"], help="only that")
    parser.add_argument("--quick", action="store_true", help="2 minutes: fewer sizes")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, to see that everything runs")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Inductor's own processes would keep the pipe of one that is killed open.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    gpu_bench.use_checkout()
    import torch

    bench = Bench(options.dry_run, options.quick)
    if not bench.dry and not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a CUDA device, and torch sees none; --dry-run runs all of it on the CPU")
    if options.worker is not None:
        work(options.worker, bench)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="gpu-dry-run-")) if bench.dry else ROOT / "bench" / "results"
    return run(options, bench, folder)


if __name__ == "__main__":
    sys.exit(main())
