"""A recipe from its name to its report: model and data, one run for each variant, one table.

Variants: what is trained (`tunings`), or how users are sampled. Each is a private run of its own, with its own ledger and its
own guarantee, in a folder of its own; a command that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from fastclip.finetune.models import small_llama
from fastclip.finetune.terminal import Display
from fastclip.finetune.tuning import tune
from fastclip.huggingface import PrivacyArguments
from fastclip.recipes import infilling, smoke, table_to_text, users
from fastclip.recipes.catalog import CATALOG
from fastclip.recipes.fit import LostRun, fit, sizes
from fastclip.recipes.settings import Settings
from fastclip.recipes.tables import show
from fastclip.recipes.task import Example, Task

FILE = "recipe.json"
_BUILD = {"infilling": infilling.build, "table-to-text": table_to_text.build, "users": users.build}


def chosen(preset: str, changes: dict[str, Any]) -> Settings:
    """The named recipe with some settings replaced. ValueError for an unknown name or a bad value."""
    if preset not in CATALOG:
        raise ValueError(f"recipe {preset!r} does not exist: choose one of {', '.join(CATALOG)}")
    return replace(CATALOG[preset], **changes)


def start_recipe(
    preset: str, changes: dict[str, Any], folder: Path | None, display: Display, *, small: bool = False
) -> dict[str, Any]:
    """Runs a recipe into `folder` (runs/PRESET-TIME if None). small: on a tiny model and made-up rows (`smoke`).

    Returns {"run", "reports"}. ValueError before the first step for bad settings, data and models, and if the folder is not
    empty.
    """
    settings = chosen(preset, changes)
    folder = folder or Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output {folder} is not empty: give another --output, or go on with --resume {folder}")
    return _run(settings, {"preset": preset, "changes": changes, "small": small}, folder, display)


def resume_recipe(folder: Path, display: Display) -> dict[str, Any]:
    """Goes on with a recipe's run: what is finished stays, what began goes on from its checkpoint and its ledger."""
    saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in saved["changes"].items()}
    return _run(chosen(saved["preset"], changes), saved, folder, display)


def is_recipe(folder: Path) -> bool:
    """Whether a recipe ran here."""
    return (folder / FILE).is_file()


def _run(settings: Settings, saved: dict[str, Any], folder: Path, display: Display) -> dict[str, Any]:
    if saved["small"]:
        settings = smoke.shrink(settings, folder / "smoke")
    display.say(f"loading model and data of {settings.preset!r}")
    _, tokenizer = load(settings, tokenizer_only=True)
    task = _BUILD[settings.kind](settings, tokenizer)
    _check_size(settings, task)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    variants: Sequence[str] = users.SAMPLINGS if settings.kind == "users" else settings.tunings
    reports: dict[str, dict[str, Any]] = {}
    for variant in variants:
        place = folder / variant if len(variants) > 1 else folder
        try:
            reports[variant] = _variant(settings, task, variant, place, display)
        except ValueError as error:
            if len(variants) == 1 or isinstance(error, LostRun):
                raise
            reports[variant] = {"refused": str(error)}
    if all("refused" in report for report in reports.values()):
        raise ValueError(next(iter(reports.values()))["refused"])
    if len(variants) > 1:
        (folder / "report.json").write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    show(settings, reports, folder, display)
    return {"run": str(folder), "reports": reports}


def _variant(settings: Settings, task: Task, variant: str, folder: Path, display: Display) -> dict[str, Any]:
    """One private run: a new model, what is trained of it, and how the units are drawn."""
    model, tokenizer = load(settings)
    if settings.kind != "users":
        model = tune(model, variant)
        units = len(task.train)
        batch_size, physical = sizes(settings.batch_size, settings.physical_batch)
        steps = settings.steps_of(units)
        privacy = _privacy(settings, units)
    else:
        most = settings.examples_per_user or 1
        model = tune(model, settings.tunings[0])
        kept = users.at_most_of_each(task.train, most, settings.seed)
        units = len({example[users.USER] for example in kept})
        steps = settings.steps_of(len(kept))
        if variant == "els":
            batch_size, physical = sizes(settings.batch_size, settings.physical_batch)
            privacy = _privacy(settings, units, user_column=users.USER, examples_per_user=most)
        else:
            # So many users that as many examples are expected of a draw.
            task = replace(task, train=kept)
            drawn = _round_to(settings.batch_size * units / len(kept), settings.physical_batch)
            batch_size, physical = sizes(drawn, settings.physical_batch)
            privacy = _privacy(settings, units, user_column=users.USER)
    return fit(
        settings, task, model, tokenizer, privacy,
        batch_size=batch_size, physical=physical, steps=steps, folder=folder, display=display, name=variant,
    )  # fmt: skip


def load(settings: Settings, *, tokenizer_only: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer. Dropout is off: the noise is regularisation enough. ValueError where they cannot be had."""
    if settings.preset == "users-mail" and settings.model == CATALOG["users-mail"].model:
        return small_llama(None)
    kind = AutoModelForMaskedLM if settings.kind == "infilling" else AutoModelForCausalLM
    model = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        if not tokenizer_only:
            config = AutoConfig.from_pretrained(settings.model)
            for name, value in config.to_dict().items():
                if "drop" in name and isinstance(value, float):
                    setattr(config, name, 0.0)
            model = kind.from_pretrained(settings.model, config=config)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {settings.model!r} cannot be loaded ({reason}): give --model FOLDER written by save_pretrained, or a name "
            "on the hub and a connection to it (HF_HUB_OFFLINE unset)"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _privacy(settings: Settings, units: int, **sampling: Any) -> PrivacyArguments:
    return PrivacyArguments(
        target_delta=settings.delta_of(units),
        target_epsilon=settings.epsilon,
        clipping_norm=settings.clipping_norm,
        accountant=settings.accountant,
        privacy_seed=settings.seed,
        **sampling,
    )


def _check_size(settings: Settings, task: Task) -> None:
    examples: list[Example] = task.train
    if settings.batch_size > len(examples):
        raise ValueError(
            f"batch_size is {settings.batch_size}, but there are {len(examples)} examples: give at most that many"
        )


def _round_to(number: float, step: int) -> float:
    """The nearest multiple of `step`, or below one of it the number itself."""
    return number if number < step else step * round(number / step)
