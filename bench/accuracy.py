"""Time to an accuracy: MiniLM on sentences of Amazon reviews, by one loop, without privacy, with fastclip and with Opacus.

    python bench/accuracy.py [--epsilon 8] [--modes plain fastclip opacus]

The settings of `fastclip finetune --preset amazon`, but for one norm over all parameters, which both libraries have. Each mode
is a process of its own, all see the same draws, and they take turns, one optimizer step at a time and another one first each
time; after every other step the held-out sentences are scored, which is in nobody's time. Opacus: GradSampleModule with hooks
and its DPOptimizer, over the same physical batches. Draws and noise are seeded, so that nobody is luckier: no epsilon holds
for what is trained here. JSON to bench/results/accuracy_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]  # opacus.py of this folder is not Opacus

MODES = ("plain", "fastclip", "opacus")
RESULTS = HERE / "results" / "accuracy_cpu.json"
SEED, EVERY = 0, 2


def answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def worker(mode: str, epsilon: float, steps: int) -> None:
    """A step for each line on stdin: its seconds, and every other time the accuracy behind it."""
    import torch

    import fastclip
    from fastclip.accounting import get_noise_multiplier
    from fastclip.finetune import PRESETS, quiet
    from fastclip.finetune.loop import average_of, cut, make_sampler
    from fastclip.finetune.optim import adamw, schedule
    from fastclip.finetune.task import build

    quiet()
    torch.manual_seed(SEED)
    recipe = replace(PRESETS["amazon"], steps=steps, clip_head_apart=False, seed=SEED)
    task = build(recipe)
    for module in task.model.modules():  # Opacus' hooks need a model that trains
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    sampler = make_sampler(task, recipe, steps)
    sigma = get_noise_multiplier(epsilon, recipe.delta, recipe.batch_size / task.num_units, steps)
    base = adamw(task.model, recipe)
    scheduler, average = schedule(base, recipe), average_of(task, recipe)
    optimizer, model = base, task.model
    if mode == "fastclip":
        optimizer = fastclip.DPOptimizer(
            base,
            noise_multiplier=sigma,
            max_grad_norm=recipe.max_grad_norm,
            loss_reduction="mean",
            module=task.model,
            sampler=sampler,
            seed=SEED,
        )
    elif mode == "opacus":
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        model = GradSampleModule(task.model)
        generator = torch.Generator().manual_seed(SEED)
        optimizer = DPOptimizer(
            base,
            noise_multiplier=sigma,
            max_grad_norm=recipe.max_grad_norm,
            expected_batch_size=recipe.batch_size,
            generator=generator,
        )

    def step(draw: list[int]) -> None:
        parts = cut(task, draw, draw)
        for i, part in enumerate(parts):
            batch = task.batch(task.train, part)
            losses = task.losses(model, batch)
            if mode == "plain":
                (losses.sum() / recipe.batch_size).backward()
            else:
                losses.mean().backward()
            if mode == "opacus":
                optimizer.signal_skip_step(do_skip=i + 1 < len(parts))
                optimizer.step()
                optimizer.zero_grad()
        if mode != "opacus":
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        if average is not None:
            average.update()

    answer(sigma=sigma, before=task.evaluate())
    for number, draw in enumerate(sampler, 1):
        sys.stdin.readline()
        task.model.train(mode == "opacus")
        started = time.perf_counter()
        step(draw)
        seconds, accuracy = time.perf_counter() - started, None
        if number % EVERY == 0:
            task.model.eval()
            if average is not None:
                average.swap()
            accuracy = task.evaluate()
            if average is not None:
                average.swap()
        answer(seconds=seconds, accuracy=accuracy)


class Worker:
    def __init__(self, mode: str, epsilon: float, steps: int) -> None:
        command = [sys.executable, __file__, "--worker", mode, "--epsilon", str(epsilon), "--steps", str(steps)]
        # Idle processes must not spin while another one works.
        more = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "PYTHONWARNINGS": "ignore", "PYTHONPATH": ""}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | more
        )
        self.began = self.read()

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended before its answer; its error is above")
        found: dict[str, Any] = json.loads(line)
        return found

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.epsilon, options.steps)
        return
    from step import machine
    from turns import in_turn

    workers = {mode: Worker(mode, options.epsilon, options.steps) for mode in options.modes}
    curves: dict[str, list[list[float]]] = {mode: [] for mode in workers}
    spent = dict.fromkeys(workers, 0.0)
    for number in range(1, options.steps + 1):
        for mode in in_turn(list(workers), number):
            found = workers[mode].step()
            spent[mode] += found["seconds"]
            if found["accuracy"] is not None:
                curves[mode].append([number, spent[mode], found["accuracy"]])
        print(number, {m: [round(x, 3) for x in c[-1]] for m, c in curves.items() if c}, flush=True)
    result = {
        "command": f"python bench/accuracy.py --epsilon {options.epsilon:g} --steps {options.steps}",
        "machine": machine(),
        "epsilon": options.epsilon,
        "noise_multiplier": workers[options.modes[0]].began["sigma"],
        "before": workers[options.modes[0]].began["before"],
        "curves": curves,  # step, seconds so far, held-out accuracy
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.append(str(HERE))  # step.py
    main()
