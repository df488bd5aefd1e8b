"""One private run of a recipe: a task through DPTrainer, its results, and what is left in its folder.

Privacy: sampling, noise, accounting, ledger and refusals are DPTrainer's. Held-out data is looked at once, after the last
step, and decides nothing. The folder `private` has the ledger, and while the run is under way its checkpoints; the model,
its card and report.json hold nothing that was computed from training data without noise.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import fastclip
from fastclip.accounting import AccountingWarning
from fastclip.finetune import report
from fastclip.finetune.terminal import Display, StepBar
from fastclip.finetune.tuning import merge
from fastclip.huggingface import DPTrainer, PrivacyArguments
from fastclip.recipes.settings import Settings
from fastclip.recipes.task import Task

CHECKPOINTS = 20  # over a run
_SHOWN = 20  # times that epsilon is computed for the eyes
NOT_COVERED = "Several runs on the same data, such as those of a comparison, spend more together than each by itself."


class LostRun(ValueError):
    """A run that was interrupted before its first checkpoint: what it spent stays spent, and there is nothing to go on from."""


def fit(
    settings: Settings,
    task: Task,
    model: Any,
    tokenizer: Any,
    privacy: PrivacyArguments,
    *,
    batch_size: int,
    physical: int,
    steps: int,
    folder: Path,
    display: Display,
    name: str,
) -> dict[str, Any]:
    """Trains, evaluates, saves, and returns the report. Goes on from the last checkpoint where `folder` has one, and
    returns the report of a run that is finished already.

    batch_size: units expected of a draw; physical: at most so many examples through the model together. Both as
    `sizes` gives them. ValueError before the first step for what DPTrainer refuses; LostRun as it says.
    """
    finished = folder / "report.json"
    if finished.is_file():
        read: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        return read
    _check_lengths(task, model)
    private = folder / "private"
    report.prepare_private(folder)
    checkpoint = get_last_checkpoint(str(private))
    if checkpoint is None and (private / "ledger.jsonl").is_file():
        raise LostRun(
            f"{folder} was interrupted before its first checkpoint: its steps are lost, and what they spent counts; start anew "
            "with another --output"
        )
    arguments = TrainingArguments(
        str(private),
        per_device_train_batch_size=physical,
        gradient_accumulation_steps=batch_size // physical,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear" if settings.decay else "constant",
        weight_decay=0.0,
        adam_epsilon=1e-8,
        optim="adamw_torch",
        # What Trainer would log is the training loss.
        logging_strategy="no",
        save_strategy="steps",
        save_steps=max(1, steps // CHECKPOINTS),
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    with display.progress(steps, 0, name) as bar, warnings.catch_warnings():
        # What it warns of stands among the caveats of the guarantee.
        warnings.simplefilter("ignore", AccountingWarning)
        trainer = DPTrainer(
            model,
            arguments,
            train_dataset=task.train,
            data_collator=task.collate,
            privacy_args=privacy,
            loss_fn=task.losses,
            callbacks=[progress := _Progress(bar, steps)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        progress.trainer = trainer
        trainer.train(resume_from_checkpoint=checkpoint)
    results = task.evaluate(model.eval())
    written = _report(settings, task, model, trainer, results, name)
    _save(settings, merge(model), tokenizer, trainer, folder)
    finished.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return written


def sizes(expected: float, room: int) -> tuple[int, int]:
    """Units of a draw and of a physical batch: the expected number itself, in its largest divisor that there is room for."""
    units = max(1, round(expected))
    return units, max(size for size in range(1, min(room, units) + 1) if units % size == 0)


def _check_lengths(task: Task, model: Any) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= model.config.pad_token_id + 1  # they count from there
    positions -= getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    longest = max(len(example["input_ids"]) for example in task.train)
    if longest > positions:
        raise ValueError(f"an example has {longest} tokens, and the model takes {positions}: give one that takes more")


class _Progress(TrainerCallback):
    """The bar, a step for each release."""

    def __init__(self, bar: StepBar, steps: int) -> None:
        self._bar, self._every = bar, max(1, steps // _SHOWN)
        self._epsilon: float | None = None
        self.trainer: DPTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._bar.skip(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.trainer is not None and self.trainer.ledger is not None and state.global_step % self._every == 0:
            self._epsilon = self.trainer.ledger.epsilon()
        self._bar.step(epsilon=self._epsilon)


def _report(
    settings: Settings, task: Task, model: Any, trainer: DPTrainer, results: dict[str, float], name: str
) -> dict[str, Any]:
    assert trainer.ledger is not None
    chosen = {"steps": settings.steps, "delta": settings.delta}
    guarantee = trainer.ledger.guarantee(
        seeded=settings.seed is not None,
        from_size=["sample_rate", *(name for name, value in chosen.items() if value is None)],
    )
    parameters = list(model.parameters())
    return {
        "title": f"{settings.preset}: {name}",
        "guarantee": {**guarantee.to_dict(), "private": not guarantee.voided, "statement": str(guarantee)},
        "held_out": {
            "examples": task.held_out,
            **{metric: value if math.isfinite(value) else None for metric, value in results.items()},
        },
        "training": {
            "protected_units": trainer.ledger.num_units,
            "expected_batch": trainer.logical_batch_size,
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "parameters": sum(p.numel() for p in parameters),
        },
        "configuration": {**settings.configuration(), "privacy": _terms(trainer.privacy_args)},
        "targets_published_by_others": [target.to_json() for target in settings.targets],
        "notes": [report.EVALUATION, NOT_COVERED],
        "software": f"fastclip {fastclip.__version__}, torch {torch.__version__}, transformers {version('transformers')}",
    }


def _terms(privacy: PrivacyArguments) -> dict[str, Any]:
    return {key: value for key, value in asdict(privacy).items() if key != "privacy_seed" and value is not None}


def _save(settings: Settings, model: Any, tokenizer: Any, trainer: DPTrainer, folder: Path) -> None:
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    trainer.create_model_card(finetuned_from=settings.model_name(), model_name=f"{settings.preset}, trained privately")
    shutil.move(folder / "private" / "README.md", folder / "model" / "README.md")
    report.prepare_private(folder)
    for checkpoint in (folder / "private").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
