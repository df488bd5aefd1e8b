"""`fastclip finetune --preset NAME` for the published recipes: its options become a recipe's settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

_RENAMED = {"max_grad_norm": "clipping_norm"}


def is_published(preset: str | None, resume: Path | None) -> bool:
    """Whether a published recipe is asked for, by its name or by the folder of its run."""
    from fastclip.recipes import CATALOG, is_recipe

    return preset in CATALOG if resume is None else is_recipe(resume)


def published(
    preset: str | None,
    model: str | None,
    data: str | None,
    own_columns: bool,
    given: dict[str, Any],
    output: Path | None,
    resume: Path | None,
    compare: bool,
    smoke: bool,
    sigmas: bool,
    as_json: bool,
) -> None:
    """Runs it, goes on with it, or shows its table of noise. ValueError for options that it does not have."""
    from fastclip.finetune import Display, quiet
    from fastclip.recipes import chosen, noise_table, resume_recipe, start_recipe
    from fastclip.recipes.noise_table import shown

    quiet()
    display = Display(Console(stderr=as_json, quiet=as_json))
    if own_columns or compare:
        raise ValueError(
            "--text-column, --label-column, --user-column and --compare are not for published recipes: leave them out"
        )
    if resume is not None:
        if any((preset, model, data, given, output, smoke, sigmas)):
            raise ValueError("--resume goes on with the settings of the interrupted run: give only --json beside it")
        result = resume_recipe(resume, display)
    else:
        assert preset is not None
        changes = {_RENAMED.get(name, name): value for name, value in given.items()}
        if "tuning" in changes:
            changes["tunings"] = (changes.pop("tuning"),)
        changes |= {name: value for name, value in (("model", model), ("data", data)) if value is not None}
        if sigmas:
            result = noise_table(chosen(preset, changes))
            display.console.print(shown(result))
        else:
            result = start_recipe(preset, changes, output, display, small=smoke)
    if as_json:
        print(json.dumps(result))
