"""The fastclip command.

Every subcommand takes --json, prints one JSON object to standard output then, and exits with 2 and one line on
standard error when an argument or a file is wrong.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fastclip.accounting_commands import account, calibrate
from fastclip.command_line import Json, answer, complaints
from fastclip.plan_command import plan
from fastclip.recipe_command import is_published, published

if TYPE_CHECKING:
    from fastclip.finetune import Recipe

# Typer's own tracebacks print local variables, which may be training data.
app = typer.Typer(
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    help="Differentially private fine-tuning of language models.",
)

Preset = Annotated[
    str | None,
    typer.Option(
        help="movies (the default), mail, amazon, or a published recipe: sst2, qnli, qqp, mnli, e2e, dart, low-dimensional, "
        "ew-tune-TASK, users-mail, users-cc-news, users-stackoverflow. Without --preset, --model and --data are your own."
    ),
]
Model = Annotated[
    str | None, typer.Option(help="A folder written by save_pretrained, or a name on the Hugging Face hub.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="A .jsonl, .csv or .parquet file; with --preset, a local copy of its data: for a published recipe a folder with a "
        "file for each split."
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column with the texts.")]
LabelColumn = Annotated[
    str | None, typer.Option(help="Column with the classes; without it a causal language model is trained.")
]
UserColumn = Annotated[
    str | None, typer.Option(help="Column with whom a text belongs to; with it the guarantee is for users.")
]


def main() -> None:
    """Entry point of the `fastclip` script."""
    app()


app.command()(account)
app.command()(calibrate)
app.command()(plan)


@app.command()
def finetune(
    preset: Preset = None,
    model: Model = None,
    data: Data = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = None,
    user_column: UserColumn = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Epsilon to spend.")] = None,
    delta: Annotated[float | None, typer.Option(help="Delta of the guarantee.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Expected units (examples or users) of a draw.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Norm to which each unit's gradient is clipped.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW.")] = None,
    tuning: Annotated[str | None, typer.Option(help="What is trained: full, lora, prefix, bitfit or last.")] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A published recipe in seconds, on a tiny model and made-up rows.")
    ] = False,
    sigmas: Annotated[
        bool, typer.Option("--sigmas", help="Show the noise by each accountant for a published recipe; train nothing.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Make the run reproducible. This VOIDS its epsilon.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME-TIME by default.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this folder.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run once more without privacy and show both.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model with differential privacy. Without arguments: a sentence encoder on movie reviews."""
    changes = {
        "steps": steps,
        "epsilon": epsilon,
        "delta": delta,
        "batch_size": batch_size,
        "max_grad_norm": max_grad_norm,
        "learning_rate": learning_rate,
        "tuning": tuning,
        "seed": seed,
    }
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    with complaints():
        if is_published(preset, resume):
            own_columns = label_column is not None or user_column is not None or text_column != "text"
            published(preset, model, data, own_columns, given, output, resume, compare, smoke, sigmas, as_json)
            return
        if smoke or sigmas:
            raise ValueError("--smoke and --sigmas are for the published recipes: name one with --preset")
        from fastclip.finetune import Display, Interrupted, quiet, resume_run, start_run

        quiet()
        console = Console(stderr=as_json, quiet=as_json)
        display = Display(console)
        try:
            if resume is not None:
                refuse_with_resume(preset, model, data, output, label_column, user_column, given)
                result = resume_run(resume, display, compare=compare)
            else:
                recipe = replace(chosen(preset, model, data, text_column, label_column, user_column), **given)
                result = start_run(recipe, output, display, compare=compare)
        except Interrupted as stopped:
            answer(as_json, {"interrupted": True, "run": str(stopped.folder), "steps": stopped.steps}, str(stopped))
            raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result))


@app.command()
def check(
    preset: Preset = None,
    model: Model = None,
    data: Data = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = None,
    user_column: UserColumn = None,
    as_json: Json = False,
) -> None:
    """Whether a model can be trained privately on this data: every parameter followed, no unit influencing another.

    Nothing is trained. What it prints depends on a few training texts: do not publish it.
    """
    with complaints():
        from fastclip.finetune import check_task, quiet

        quiet()
        found = check_task(chosen(preset, model, data, text_column, label_column, user_column))
    lines = [
        f"{found['trained']:,} of {found['parameters']:,} parameters are trained, each clipped per {found['unit']}."
    ]
    lines.append(f"{found['checked']} units checked: alone and in a batch their gradients are the same.")
    answer(as_json, found, "\n".join(lines))


def chosen(
    preset: str | None, model: str | None, data: str | None, text: str, label: str | None, user: str | None
) -> Recipe:
    """The recipe that the options name. ValueError for a combination that means nothing."""
    from fastclip.finetune import presets

    if preset is not None or (model is None and data is None):
        name = preset or "movies"
        if name not in presets.PRESETS:
            from fastclip.recipes import CATALOG

            known = ", ".join([*presets.PRESETS, *CATALOG])
            raise ValueError(
                f"preset {name!r} is a published recipe, which `finetune` runs: leave it out here"
                if name in CATALOG
                else f"preset {name!r} does not exist: choose one of {known}"
            )
        if label is not None or user is not None:
            raise ValueError(
                "--label-column and --user-column are for your own data: give --model and --data, and no --preset"
            )
        return replace(presets.PRESETS[name], model=model, data=data)
    if model is None or data is None:
        missing = "--model" if model is None else "--data"
        raise ValueError(f"{missing} is missing: give both --model and --data, or a --preset")
    return presets.own(model, data, text, label, user)


def refuse_with_resume(*options: Any) -> None:
    """A resumed run keeps its settings. ValueError if one was given."""
    if any(options):
        raise ValueError(
            "--resume goes on with the settings of the interrupted run: give only --compare and --json beside it"
        )
