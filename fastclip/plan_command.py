"""`fastclip plan`: example-level or user-level sampling, for one's own users or on the synthetic experiment."""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastclip import mean_estimation, userlevel
from fastclip.command_line import Json, complaints
from fastclip.user_counts import read_counts

if TYPE_CHECKING:
    from fastclip.gradient_share import GradientShare

_EXPERIMENT = "mean-estimation"
_QUIET_SECONDS = 2.0
_MAX_TOKENS = 256


def plan(
    users: Annotated[
        Path | None,
        typer.Option(
            help="A .csv of counts (one number a line, or a column count), or a .csv, .jsonl or .parquet file with one "
            "row an example and a column with its user."
        ),
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Expected gradient evaluations (examples) a step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, each one release.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Epsilon that the run may spend, for a user.")] = None,
    delta: Annotated[float | None, typer.Option(help="Delta of the guarantee, below one over the users.")] = None,
    user_column: Annotated[str, typer.Option(help="Column with whom a row belongs to.")] = "user",
    shared_share: Annotated[
        float | None, typer.Option(help="r: share of the squared gradient that a user's examples have in common.")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="Measure r on this model: a folder, or a name on the Hugging Face hub.")
    ] = None,
    public_sample: Annotated[
        Path | None, typer.Option(help="Texts with users that anyone may see, for --measure.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the public sample with the texts.")] = "text",
    label_column: Annotated[
        str | None, typer.Option(help="Column of the public sample with the classes; without it, a causal model.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="mean-estimation: ELS against ULS on synthetic data.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The experiment in seconds, on a smaller grid.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture into this .png file.")] = None,
    as_json: Json = False,
) -> None:
    """Sample examples (ELS) or users (ULS)? The noise that either costs at the same user-level guarantee and compute."""
    console = Console()
    with complaints():
        if plot is not None and (plot.suffix != ".png" or not plot.absolute().parent.is_dir()):
            raise ValueError(f"plot {plot} is not a .png file in a folder that exists: give one")
        needed = {"--users": users, "--budget": budget, "--steps": steps, "--epsilon": epsilon, "--delta": delta}
        if experiment is not None:
            _refuse_beside_experiment(experiment, {**needed, "--shared-share": shared_share, "--measure": measure})
            _experiment(mean_estimation.QUICK if quick else mean_estimation.Experiment(), plot, as_json, console)
            return
        missing = [name for name, value in needed.items() if value is None]
        if missing or users is None or budget is None or steps is None or epsilon is None or delta is None:
            raise ValueError(f"{', '.join(missing)} missing: give all of {', '.join(needed)}, or --experiment")
        if quick:
            raise ValueError("--quick is for --experiment")
        counts = read_counts(users, user_column)
        share, measured = shared_share, None
        if measure is not None or public_sample is not None:
            measured = _measured(
                measure, public_sample, shared_share, (text_column, label_column, user_column), as_json
            )
            share = measured.share
        with warnings.catch_warnings(record=True) as caught, _Bar("calibrating", as_json) as bar:
            warnings.simplefilter("always", UserWarning)
            found = userlevel.compare(counts, budget, steps, epsilon, delta, share, progress=bar)
        told = [str(warning.message) for warning in caught]
        if plot is not None:
            from fastclip import plan_plots  # matplotlib takes a while, and every command imports this module

            plan_plots.comparison_png(found, plot)
    for text in told:
        typer.echo(f"fastclip: warning: {text}", err=True)
    if as_json:
        shown = None if measured is None else asdict(measured)
        print(json.dumps({**found.as_dict(), "measured": shown, "warnings": told}))
        return
    _show(found, measured, console)


def _refuse_beside_experiment(experiment: str, others: dict[str, Any]) -> None:
    if experiment != _EXPERIMENT:
        raise ValueError(f"experiment {experiment!r} does not exist: the only one is {_EXPERIMENT}")
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: --experiment has settings of its own; give only --quick, --plot, --json")


def _measured(
    model_name: str | None,
    sample: Path | None,
    share: float | None,
    columns: tuple[str, str | None, str],
    as_json: bool,
) -> GradientShare:
    if share is not None:
        raise ValueError("--shared-share and --measure both give r: choose one")
    if model_name is None or sample is None:
        missing = "--measure MODEL" if model_name is None else "--public-sample FILE"
        raise ValueError(
            f"{missing} is missing: r is measured on gradients, and those of your private examples are private themselves. "
            "Give a sample like your data that anyone may see; a private measurement, paid from the budget, does not exist"
        )
    from fastclip.finetune import data, models
    from fastclip.gradient_share import measure
    from fastclip.huggingface import causal_lm_losses, classification_losses

    models.quiet()
    rows = data.read_file(sample, *columns)
    model, tokenizer = models.own(model_name, rows.classes)
    examples = data.encode(rows, tokenizer, _MAX_TOKENS)

    def batch(chosen: list[int]) -> Any:
        return data.collate(examples, chosen, tokenizer.pad_token_id, max(len(examples.tokens[i]) for i in chosen))

    losses = classification_losses if rows.classes else causal_lm_losses
    with _Bar("measuring r", as_json) as bar:
        return measure(model.eval(), losses, range(len(examples)), rows.users or [], collate=batch, progress=bar)


def _show(found: userlevel.Comparison, measured: GradientShare | None, console: Console) -> None:
    title = f"{found.users:,} users, {found.examples:,} examples, {found.budget:g} gradients a step"
    # Nine columns of numbers, whole in the 80 characters that a pipe has.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("", "per user", "kept", "units", "rate", "sigma"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for word in ("noise", "error"):
        for share in found.shares:
            table.add_column(f"{word} r={share:.3g}", justify="right")
    advice = found.recommendation
    for row in found.rows():
        if row["algorithm"] == "ULS" and row["examples_per_user"] == found.uls[0].examples_per_user:
            table.add_section()
        letter = "K" if row["algorithm"] == "ELS" else "G"
        chosen = (row["algorithm"], row["examples_per_user"]) == (advice.algorithm, advice.examples_per_user)
        table.add_row(
            row["algorithm"],
            f"{letter}={row['examples_per_user']}",
            f"{row['kept_share']:.0%}",
            f"{row['expected_units']:.1f}",
            f"{row['sample_rate']:.3g}",
            f"{row['noise_multiplier']:.4g}",
            *(f"{value:.3g}" for value in row["noise"] + row["sampling_error"]),
            style="bold" if chosen else None,
        )
    console.print(table)
    lines = [
        f"User-level epsilon {found.epsilon:g}, delta {found.delta:g}, {found.steps} steps. Units a step, sampling rate and "
        "noise multiplier; noise: standard deviation per coordinate of the mean gradient; error: norm of what the draw adds "
        "to it; both in units of an example's gradient norm.",
        *(f"Left out: {text}." for text in found.left_out),
    ]
    if measured is not None:
        lines.append(
            f"r = {measured.value:.3f}, standard error {measured.standard_error:.3f}, on {measured.users} users of the "
            "public sample."
        )
        edge = advice.break_even
        if edge is not None and abs(measured.value - edge) < 2 * measured.standard_error:
            lines.append(
                f"That is within two standard errors of {edge:.2f}, where the choice turns: measure more users."
            )
    named = "undecided" if advice.algorithm is None else advice.algorithm
    lines.append(f"Recommended: {named}. {advice.reason}")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _experiment(settings: mean_estimation.Experiment, plot: Path | None, as_json: bool, console: Console) -> None:
    with _Bar("mean estimation", as_json) as bar:
        outcomes = mean_estimation.run(settings, bar)
    if plot is not None:
        from fastclip import plan_plots

        plan_plots.experiment_png(outcomes, plot)
    if as_json:
        print(json.dumps(mean_estimation.as_dict(settings, outcomes)))
        return
    table = Table(title=f"|theta - mu|^2 in 1e-4: {settings.users:,} users, {settings.dimension} dimensions")
    found = mean_estimation.verdicts(outcomes)
    names = list(dict.fromkeys((x.algorithm, x.examples_per_user) for x in outcomes))
    for name in ("epsilon", "B", "r"):
        table.add_column(name, justify="right")
    for algorithm, size in names:
        table.add_column(f"{algorithm} {'K' if algorithm == 'ELS' else 'G'}={size}", justify="right")
    table.add_column("ahead")
    for at, verdict in enumerate(found):
        here = outcomes[at * len(names) : (at + 1) * len(names)]
        cells = [with_error(1e4 * x.error, 1e4 * x.standard_error) for x in here]
        table.add_row(f"{verdict.epsilon:g}", f"{verdict.budget}", f"{verdict.share:.2f}", *cells, verdict.winner)
    console.print(table)
    text = (
        "Ahead: the best K against the best G of 2 or more. With G = 1 the two algorithms meet: one example of each drawn "
        "user, at the noise of ELS with K = 1."
    )
    console.print(text, highlight=False)


def with_error(value: float, error: float) -> str:
    """Both with two digits of the error."""
    digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 2
    return f"{value:.{digits}f} ± {error:.{digits}f}"


class _Bar:
    """A progress bar on standard error once the work has taken two seconds; none with --json or without a terminal."""

    def __init__(self, name: str, as_json: bool) -> None:
        console = Console(stderr=True)
        self._wanted = console.is_terminal and not as_json
        self._progress = Progress(console=console, transient=True)
        self._task = self._progress.add_task(name, total=None)
        self._started = time.monotonic()
        self._shown = False

    def __enter__(self) -> _Bar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._wanted and not self._shown and time.monotonic() - self._started > _QUIET_SECONDS:
            self._progress.start()
            self._shown = True
        self._progress.update(self._task, completed=done, total=total)

    def __exit__(self, *unused: object) -> None:
        if self._shown:
            self._progress.stop()
