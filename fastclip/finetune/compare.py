"""The same run without privacy, in a process of its own so that its peak memory is its own.

Same data, model, draws, schedule and loop; no clipping, no noise. Its model is never saved, and what it returns is
marked and kept out of the report: accuracy of a model trained without noise is a look at the training data.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from fastclip.finetune.loop import History, average_of, make_sampler, run
from fastclip.finetune.memory import peak_bytes
from fastclip.finetune.models import quiet
from fastclip.finetune.optim import adamw, schedule
from fastclip.finetune.presets import Recipe
from fastclip.finetune.task import build
from fastclip.finetune.terminal import Display

NOTICE = "trained without privacy: not for publication"


def without_privacy(recipe: Recipe, display: Display) -> dict[str, Any]:
    """{"notice", "after", "cost"} of the run without privacy. RuntimeError with its last words if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", "from fastclip.finetune.compare import main; main()"],
        input=json.dumps(recipe.to_json()),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if display.console.quiet else None,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the run without privacy failed: {(done.stderr or 'see above').strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def train(recipe: Recipe, display: Display) -> dict[str, Any]:
    """The run itself, in this process."""
    task = build(recipe)
    optimizer = adamw(task.model, recipe)
    scheduler = schedule(optimizer, recipe)
    average = average_of(task, recipe)
    with display.progress(recipe.steps, 0, "without privacy") as bar:

        def after_step(history: History) -> bool:
            scheduler.step()
            if average is not None:
                average.update()
            bar.step(loss=history.losses[-1], epsilon=None, examples_per_second=history.rate)
            return True

        sampler = make_sampler(task, recipe, recipe.steps)
        history = run(task, sampler, optimizer, after_step=after_step)
    if average is not None:
        average.swap()
    return {"notice": NOTICE, "after": task.evaluate(), "cost": history.cost(peak_bytes(task.device))}


def main() -> None:
    from rich.console import Console

    quiet()
    recipe = Recipe.from_json(json.load(sys.stdin))
    print(json.dumps(train(recipe, Display(Console(stderr=True)))))
