"""What a recipe shows at its end: a row for each run, and apart from it what others published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from fastclip.accounting.guarantee import rounded_up
from fastclip.finetune.terminal import Display
from fastclip.recipes.settings import Settings


def show(settings: Settings, reports: dict[str, dict[str, Any]], folder: Path, display: Display) -> None:
    """Both tables, and where everything lies."""
    display.console.print(_results(reports))
    if settings.targets:
        display.console.print(_targets(settings))
    last = next(report for report in reversed(reports.values()) if "refused" not in report)
    for text in (last["guarantee"]["statement"], *last["notes"]):
        display.say(text + "\n")
    display.say(f"may be published    model and report.json in {folder}" + (" below" if len(reports) > 1 else ""))
    display.say("not for publication private, beside them")


def _results(reports: dict[str, dict[str, Any]]) -> Table:
    done = [report for report in reports.values() if "refused" not in report]
    metrics = [name for name in done[0]["held_out"] if name != "examples"]
    table = Table(title="held-out results of this run", title_justify="left")
    table.add_column("")
    for heading in (*metrics, "trained", "epsilon", "sigma", "units a draw"):
        table.add_column(heading, justify="right")
    for name, report in reports.items():
        if "refused" in report:
            table.add_row(name, f"refused: {report['refused']}")
            continue
        guarantee, training = report["guarantee"], report["training"]
        values = [report["held_out"][metric] for metric in metrics]
        table.add_row(
            name,
            *("" if value is None else f"{value:.3f}" for value in values),
            f"{training['trained_parameters']:,}",
            rounded_up(guarantee["epsilon"]) if guarantee["private"] else "VOID: a seed was given",
            f"{guarantee['noise_multiplier']:.4g}",
            f"{training['expected_batch']}",
        )
    return table


def _targets(settings: Settings) -> Table:
    metrics = list(dict.fromkeys(name for target in settings.targets for name in target.results))
    table = Table(title="published by others: targets, not results of this run", title_justify="left", style="dim")
    for heading in ("who", "model", "trained", "epsilon"):
        table.add_column(heading)
    for metric in metrics:
        table.add_column(metric, justify="right")
    for target in settings.targets:
        epsilon = "not private" if target.epsilon is None else f"{target.epsilon:g}"
        values = [f"{target.results[m]:g}" if m in target.results else "" for m in metrics]
        table.add_row(target.who, target.model, target.tuning, epsilon, *values)
    return table
