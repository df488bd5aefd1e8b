"""The same training script with Opacus and with fastclip.opacus: seconds a step, seconds of optimizer.step(), peak memory.

    python bench/opacus.py [--quick] [--only cnn,lstm] [--threads 2] [--device cuda] [--output FILE]

What is trained stands in bench/opacus_models.py: make_private(poisson_sampling=False), then forward, loss, backward,
optimizer.step(), zero_grad() on one batch of random data, in the modes "hooks" and "ghost"; beside it the same model and
torch optimizer without privacy. Each (workload, library, mode) runs in processes of its own, forked from one that has
imported everything but fastclip and computed nothing.

Gradients and memory come first, in a process of their own: with noise_multiplier=0 the p.grad that the first step leaves must
agree with Opacus' and with clipping one example after another in plain torch, parameter by parameter (of large ones 2^16
elements and the norm). Memory is the peak resident size of two steps above what the process held before them, with an
allocator that gives back what is freed; on CUDA that of torch's allocator. The times follow, with noise. Processes take turns,
another one first in each round, so that all see the same machine; of models too large for several processes at a time each
process does its steps and ends, the first of them the one that measured, with glibc's usual allocation again. What an
optimizer.step() does differs by library and mode: clipping is part of it in "hooks", and of backward() in Opacus' "ghost".

A model that Opacus refuses is changed for it until it does not. The refusal and the change are in the JSON, and fastclip is
measured with both models. What fails is written in its row, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opacus_models import Workload
    from opacus_worker import Column

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3
ANSWER_SECONDS = 300
Rows = dict["Column", dict[str, Any]]


def preload() -> None:
    """Imports that the processes share. Once this directory is off the path, `opacus` is the package and not this file."""
    import opacus_models  # noqa: F401
    import opacus_report  # noqa: F401
    import opacus_worker  # noqa: F401
    import turns  # noqa: F401

    sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE]
    import opacus

    if not hasattr(opacus, "PrivacyEngine"):
        raise ImportError(f"`import opacus` found {opacus.__file__}, not the package")
    import opacus.layers
    import peft  # noqa: F401
    from transformers import GPT2LMHeadModel, RobertaForSequenceClassification  # noqa: F401


class Worker:
    """A process for one column."""

    def __init__(self, options: argparse.Namespace, name: str, column: Column, task: str, keep: str = "") -> None:
        from opacus_worker import serve

        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, name, column, task, options.quick, options.threads, options.device, keep)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> dict[str, Any]:
        try:
            if self.pipe.poll(ANSWER_SECONDS):
                return self.pipe.recv()
            self.process.kill()
            return {"error": f"no answer within {ANSWER_SECONDS} s"}
        except EOFError:
            self.process.join()
            return {"error": f"the process ended with status {self.process.exitcode}"}

    def steps(self, count: int) -> dict[str, Any]:
        self.pipe.send(count)
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may have ended
            self.pipe.send(None)
        self.process.join()


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name()


def machine(options: argparse.Namespace) -> dict[str, Any]:
    with open("/proc/cpuinfo") as lines:
        names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    found: dict[str, Any] = {
        "cpu": ", ".join(sorted(names)),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": options.threads,
    }
    if options.device == "cuda":
        # Not in this process: a fork cannot use CUDA that its parent has touched.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found["gpu"] = pool.apply(_gpu)
    return found


def is_alone(options: argparse.Namespace, workload: Workload) -> bool:
    return workload.alone and not options.quick


def measured(options: argparse.Namespace, name: str) -> Rows:
    """The rows to be timed, with memory, gradients compared, and what was refused or failed."""
    import numpy as np
    from opacus_models import WORKLOADS
    from opacus_report import distance
    from opacus_worker import Column

    workload = WORKLOADS[name]
    gradients: dict[Column, dict[str, Any]] = {}

    def ask(column: Column, steps: int = workload.steps if is_alone(options, workload) else 0) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as directory:
            keep = str(Path(directory) / "gradients.npz")
            worker = Worker(options, name, column, "measure", keep)
            row = worker.answer()
            if steps and "error" not in row:
                row |= worker.steps(steps)
            worker.close()
            if "error" not in row:
                with np.load(keep) as kept:
                    gradients[column] = dict(kept)
        return row

    rows: Rows = {Column("plain"): ask(Column("plain"))}
    variants = {False}
    for mode in ("hooks", "ghost"):
        column = Column("opacus", mode)
        row = ask(column)
        if workload.adapted and "error" in row:
            column, refusal = Column("opacus", mode, adapted=True), row["error"]
            row = ask(column) | {"refuses_as_it_is": refusal}
            variants.add(True)
        rows[column] = row
    for adapted in sorted(variants, reverse=True):
        for mode in ("hooks", "ghost"):
            column = Column("fastclip.opacus", mode, adapted)
            rows[column] = ask(column)
    if not workload.plain_differs:
        ask(Column("plain", "one by one"), steps=0)
    for column, row in rows.items():
        row["changed"] = workload.adapted if column.adapted else ""
        if column.library == "plain" or "error" in row:
            continue
        row["gradient_distance"] = {}
        for other in (Column("opacus", "hooks", column.adapted), Column("plain", "one by one")):
            if other in gradients and other != column and other.adapted == column.adapted:
                off = distance(gradients[column], gradients[other])
                row["gradient_distance"][f"{other.library} {other.mode}"] = off
                if off > TOLERANCE:
                    row["error"] = f"the gradients differ from {other.library} {other.mode} by {off:.2g}"
    return rows


def timed(options: argparse.Namespace, name: str, rows: Rows) -> None:
    """Adds the times to the rows that have no error."""
    from opacus_models import WORKLOADS
    from opacus_report import spread
    from turns import in_turn

    workload = WORKLOADS[name]
    alone = is_alone(options, workload)
    found: dict[Column, list[tuple[float, float]]] = {column: row.pop("seconds", []) for column, row in rows.items()}
    columns = [column for column, row in rows.items() if "error" not in row]
    live: dict[Column, Worker] = {}
    if not alone:
        live = {column: Worker(options, name, column, "time") for column in columns}
        # All at rest before the first is timed.
        ready = {column: live[column].answer() for column in columns}
    # The processes that measured memory were the first round of those that are alone.
    for number in range(1 if options.quick else workload.rounds - alone):
        for column in in_turn(columns, number):
            if "error" in rows[column]:
                continue
            worker = live[column] if not alone else Worker(options, name, column, "time")
            answer = worker.answer() if alone else ready[column]
            if "error" not in answer:
                answer = worker.steps(workload.steps)
            if "error" in answer:
                rows[column]["error"] = answer["error"]
            else:
                found[column] += answer["seconds"]
            if alone:
                worker.close()
    for worker in live.values():
        worker.close()
    for column, seconds in found.items():
        if "error" not in rows[column]:
            rows[column]["seconds"] = spread([whole for whole, _ in seconds])
            rows[column]["optimizer_seconds"] = spread([step for _, step in seconds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and one round, to see that everything runs")
    parser.add_argument("--only", help="names of workloads, with commas between them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    # Read when the libraries are loaded. Idle processes must not spin while another one works.
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    preload()

    from opacus_models import WORKLOADS
    from opacus_report import ratios, table

    chosen = options.only.split(",") if options.only else list(WORKLOADS)
    if unknown := set(chosen) - set(WORKLOADS):
        parser.error(f"--only: no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    output = options.output
    # A part is not to take the place of a whole run's results.
    if output is None and not options.quick and not options.only:
        output = HERE / "results" / f"opacus_{options.device}.json"
    packages = ("fastclip-dp", "opacus", "torch", "transformers", "peft")
    result: dict[str, Any] = {
        "what": "one training script with Opacus and with fastclip.opacus; fp32",
        "command": "python bench/opacus.py " + " ".join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(options),
        "versions": {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()},
        "workloads": {},
    }
    failed = False
    for name in chosen:
        start = time.perf_counter()
        rows = measured(options, name)
        timed(options, name, rows)
        found = ratios(rows)
        failed |= any("error" in row for row in rows.values())
        result["workloads"][name] = {
            "what": WORKLOADS[name].what,
            "plain": WORKLOADS[name].plain_differs or "the same model",
            "rows": [dataclasses.asdict(column) | row for column, row in rows.items()],
            "fastclip_over_opacus": found,
            "took_seconds": time.perf_counter() - start,
        }
        table(name, rows, found)
        if output is not None:  # after each: what is measured stays if the run is cut short
            output.parent.mkdir(exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    if failed:
        sys.exit("bench/opacus.py: something failed, see the rows above")


if __name__ == "__main__":
    main()
