"""Fine-tuning on real text, run after run: accuracy over epsilon, full against LoRA, examples against users.

    python bench/results_runs.py [--only movies] [--repeats 1] [--steps 5] [--minutes 30] [--tables]

Each run that ends is written to bench/results/finetune_GROUP.json, and is not run again; one that was interrupted goes on.
--steps makes every run short, for a look at whether everything works, and such runs are kept apart. --minutes starts no
run after so long. --tables writes docs/results.md and its pictures from what is there, which every call does at its end.
Needs what `make finetune` and `make finetune-mail` fetch. OMP_NUM_THREADS=1 where others work on the machine.

What repeats: the model's first weights are the same in every run, but for LoRA's, which follow the number of the repeat.
Draws and noise come from the operating system and are never repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import results_tables
import torch
from rich.console import Console
from step import machine

from fastclip.finetune import PRESETS, Display, compare, quiet, resume_run, start_run
from fastclip.recipes import is_recipe, resume_recipe, start_recipe

RUNS = Path("runs") / "results"


@dataclass(frozen=True)
class Run:
    """One row: a preset at an epsilon (None: without privacy), what is trained, and which repeat it is."""

    group: str
    preset: str
    epsilon: float | None
    tuning: str
    repeat: int
    steps: int | None

    @property
    def name(self) -> str:
        privacy = "without-privacy" if self.epsilon is None else f"epsilon-{self.epsilon:g}"
        short = "" if self.steps is None else f"-steps-{self.steps}"
        return f"{self.preset}-{self.tuning}-{privacy}-{self.repeat}{short}"


def runs(repeats: int, steps: int | None) -> Iterator[Run]:
    """Repeat by repeat, the short ones first, so that an early end has one of each."""
    for repeat in range(repeats):
        for preset in ("amazon", "movies"):
            for epsilon in (8.0, None, 1.0, 3.0):
                yield Run(preset, preset, epsilon, "full", repeat, steps)
            yield Run(preset, preset, 8.0, "lora", repeat, steps)
        yield Run("users", "users-mail", 8.0, "full", repeat, steps)


def carry_out(run: Run) -> dict[str, Any]:
    """Held-out results, guarantee and cost of the run; goes on where it was interrupted."""
    torch.manual_seed(run.repeat)
    display = Display(Console())
    folder = RUNS / run.name
    began = time.perf_counter()
    if run.group == "users":
        if is_recipe(folder):
            reports = resume_recipe(folder, display)["reports"]
        else:
            changes = {"epsilon": run.epsilon} | ({} if run.steps is None else {"steps": run.steps})
            reports = start_recipe(run.preset, changes, folder, display)["reports"]
        return {"reports": reports, "seconds": time.perf_counter() - began}
    recipe = replace(PRESETS[run.preset], tuning=run.tuning)
    if run.steps is not None:
        recipe = replace(recipe, steps=run.steps)
    if run.epsilon is None:
        found = compare.train(recipe, display)
        return {"held_out": {"measure": "accuracy", "after": found["after"]}, "cost": found["cost"]}
    if (folder / "private" / "recipe.json").is_file():
        found = resume_run(folder, display)
    else:
        found = start_run(replace(recipe, epsilon=run.epsilon), folder, display)
    report = found["report"]
    return {"held_out": report["held_out"], "guarantee": report["guarantee"], "cost": found["private"]["cost"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimizer steps, fewer than the presets have")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    quiet()
    began = time.monotonic()
    for run in [] if chosen.tables else runs(chosen.repeats, chosen.steps):
        file = results_tables.RESULTS / f"finetune_{run.group}.json"
        done = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"runs": {}}
        if chosen.only not in run.name or run.name in done["runs"]:
            continue
        if time.monotonic() - began > 60 * chosen.minutes:
            print("the time is up")
            break
        print(f"--- {run.name}", flush=True)
        settings = {"preset": run.preset, "epsilon": run.epsilon, "tuning": run.tuning, "steps": run.steps}
        done["runs"][run.name] = settings | carry_out(run) | {"machine": machine()}
        whole = file.with_suffix(".new")
        whole.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        os.replace(whole, file)
    results_tables.write()


if __name__ == "__main__":
    main()
