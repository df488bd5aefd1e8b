"""One run from its recipe to its report.

Privacy: every optimizer step is reserved in the ledger, on the disk, before its result exists; the run ends when its
steps are done or its epsilon is spent, whichever comes first, so a run that crashed and goes on makes fewer useful
steps and never spends more. Nothing about the data decides when it ends. The noise's keys and the sampler's are drawn
afresh by every process.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastclip
from fastclip.accounting import Ledger, affordable_steps, epsilon_curve, get_noise_multiplier
from fastclip.finetune import checkpoint, report
from fastclip.finetune.compare import without_privacy
from fastclip.finetune.loop import Average, History, Sampler, average_of, make_sampler, run
from fastclip.finetune.memory import peak_bytes
from fastclip.finetune.optim import adamw, clipping, schedule
from fastclip.finetune.presets import Recipe
from fastclip.finetune.task import Task, build
from fastclip.finetune.terminal import Display
from fastclip.finetune.tuning import merge

CHECKPOINT_SECONDS = 300.0


class Interrupted(Exception):
    """Training was stopped by Ctrl-C; a checkpoint is written."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(f"stopped after {steps} steps; go on with: fastclip finetune --resume {folder}")
        self.folder = folder
        self.steps = steps


@dataclass
class Training:
    """The objects of a run that is under way, the steps it has done and those that its epsilon still allows."""

    recipe: Recipe
    folder: Path
    task: Task
    sampler: Sampler
    optimizer: fastclip.DPOptimizer
    scheduler: Any
    average: Average | None
    done: int
    left: int


def start_run(recipe: Recipe, folder: Path | None, display: Display, *, compare: bool = False) -> dict[str, Any]:
    """Fine-tunes as the recipe says, into `folder` (runs/PRESET-TIME if None). Returns {"run", "report", "private"}.

    ValueError if the folder holds a run already, or for anything wrong in the recipe; Interrupted on Ctrl-C.
    """
    folder = folder or Path("runs") / f"{recipe.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output {folder} is not empty: give another --output, or go on with --resume {folder}")
    display.say(f"loading model and data of {recipe.preset!r}")
    task = build(recipe)
    rate = recipe.batch_size / task.num_units
    if rate > 1:
        raise ValueError(
            f"batch_size is {recipe.batch_size}, but there are {task.num_units} {recipe.unit}s: give at most that many"
        )
    sigma = get_noise_multiplier(recipe.epsilon, recipe.delta, rate, recipe.steps)
    before = task.evaluate()
    training = _prepare(recipe, folder, task, sigma, recipe.steps)
    _check_units(task)
    report.prepare_private(folder)
    saved = {"recipe": recipe.to_json(), "noise_multiplier": sigma, "before": before, "num_units": task.num_units}
    (folder / "private" / "recipe.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    ledger = Ledger.create(
        folder / "ledger.jsonl",
        unit=recipe.unit,
        adjacency="zero-out",
        sampler="poisson",
        num_units=task.num_units,
        delta=recipe.delta,
        epsilon_budget=recipe.epsilon,
    )
    with ledger:
        return _finish(training, ledger, before, display, compare)


def resume_run(folder: Path, display: Display, *, compare: bool = False) -> dict[str, Any]:
    """Goes on with an interrupted run: parameters and optimizer from its checkpoint, fresh randomness, epsilon from
    its ledger."""
    file = folder / "private" / "recipe.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give the folder of a run that was interrupted")
    saved = json.loads(file.read_text(encoding="utf-8"))
    recipe = Recipe.from_json(saved["recipe"])
    display.say(f"going on with {folder}")
    task = build(recipe)
    if task.num_units != saved["num_units"]:
        raise ValueError(
            f"the data has {task.num_units} {recipe.unit}s now and had {saved['num_units']} when the run began: "
            "resume with the same data, or start a new run"
        )
    with _open(folder / "ledger.jsonl") as ledger:
        sigma, rate = saved["noise_multiplier"], recipe.batch_size / task.num_units
        left = affordable_steps(recipe.epsilon, recipe.delta, sigma, rate, ledger.events())
        training = _prepare(recipe, folder, task, sigma, left)
        training.done = checkpoint.load(
            folder / "private", task.model, training.average, training.optimizer.original_optimizer, training.scheduler
        )
        lost = ledger.steps - training.done
        if lost:
            display.say(f"{lost} steps after the checkpoint are lost; their epsilon stays spent")
        return _finish(training, ledger, saved["before"], display, compare)


def _open(path: Path) -> Ledger:
    try:
        return Ledger.open(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist, so no step was taken: start a new run") from None
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def check_task(recipe: Recipe) -> dict[str, Any]:
    """Attaches to the recipe's model and compares a few units alone and in a batch. ValueError if it cannot be
    private."""
    task = build(recipe)
    clipper = fastclip.attach(task.model, max_grad_norm=recipe.max_grad_norm)
    try:
        checked = _check_units(task)
    finally:
        clipper.detach()
    parameters = list(task.model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "unit": recipe.unit,
        "checked": checked,
    }


def _check_units(task: Task) -> int:
    """check_units on the first few training texts, one unit each; returns how many."""
    first = range(min(4, len(task.train)))
    fastclip.check_units(task.model, task.losses, task.batch(task.train, first))
    return len(first)


def _prepare(recipe: Recipe, folder: Path, task: Task, sigma: float, steps: int) -> Training:
    sampler = make_sampler(task, recipe, max(steps, 1))
    base = adamw(task.model, recipe)
    optimizer = fastclip.DPOptimizer(
        base,
        noise_multiplier=sigma,
        max_grad_norm=recipe.max_grad_norm,
        loss_reduction="mean",
        clipping=clipping(recipe),
        module=task.model,
        sampler=sampler,
        seed=recipe.seed,
    )
    return Training(
        recipe, folder, task, sampler, optimizer, schedule(base, recipe), average_of(task, recipe), 0, steps
    )


def _train(training: Training, ledger: Ledger, display: Display) -> History:
    recipe, task = training.recipe, training.task
    sampler, optimizer, average = training.sampler, training.optimizer, training.average
    optimizer.attach_release_hook(
        lambda released: ledger.reserve(released.noise_multiplier, sampler.sample_rate, seeded=sampler.seeded)
    )
    spent = epsilon_curve(optimizer.noise_multiplier, sampler.sample_rate, recipe.steps, recipe.delta)
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        checkpoint.save(
            training.folder / "private",
            task.model,
            average,
            optimizer.original_optimizer,
            training.scheduler,
            training.done,
        )
        saved = time.monotonic()

    with checkpoint.interruptible() as asked, display.progress(recipe.steps, training.done, "training") as bar:

        def after_step(history: History) -> bool:
            training.done += 1
            training.scheduler.step()
            if average is not None:
                average.update()
            epsilon = spent[ledger.steps - 1]
            bar.step(loss=history.losses[-1], epsilon=epsilon, examples_per_second=history.rate)
            last = training.done == recipe.steps
            if last or asked.is_set() or time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
            if asked.is_set() and not last:
                raise Interrupted(training.folder, training.done)
            return not last

        return run(task, sampler, optimizer, clipper=optimizer.clipper, after_step=after_step)


def _finish(training: Training, ledger: Ledger, before: float, display: Display, compare: bool) -> dict[str, Any]:
    recipe, task, folder = training.recipe, training.task, training.folder
    try:
        history = _train(training, ledger, display) if training.left else History()
    finally:
        training.optimizer.clipper.detach()
    if training.average is not None:
        training.average.swap()
    after = task.evaluate()
    document = report.build(recipe, task, ledger, before, after)
    merge(task.model).save_pretrained(folder / "model")
    task.tokenizer.save_pretrained(folder / "model")
    cost = history.cost(peak_bytes(task.device))
    comparison = without_privacy(recipe, display) if compare else None
    report.write_public(folder, document)
    report.write_private(folder, history, recipe.max_grad_norm, {"with_privacy": cost, "without_privacy": comparison})
    (folder / "private" / checkpoint.FILE).unlink(missing_ok=True)
    display.show(document, cost, comparison, folder)
    return {"run": str(folder), "report": document, "private": {"cost": cost, "comparison": comparison}}
