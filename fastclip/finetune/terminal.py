"""What a run shows while it works, and the table at its end. Everything goes to one console; with --json nothing is
shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastclip.accounting.guarantee import rounded_up
from fastclip.finetune.report import measure


class Display:
    """Messages and progress bars on the given console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False)

    def show(
        self, report: dict[str, Any], cost: dict[str, Any], comparison: dict[str, Any] | None, folder: Path
    ) -> None:
        """The closing table, the guarantee in words, and where everything lies."""
        self.console.print()
        self.console.print(report["title"], style="bold", highlight=False)
        self.console.print(summary(report, cost, comparison))
        for text in (report["guarantee"]["statement"], *report["notes"]):
            self.say(text + "\n")
        self.say(f"may be published    {folder}/model  {folder}/report.html  {folder}/report.json")
        self.say(f"not for publication {folder}/private")

    def progress(self, steps: int, done: int, name: str) -> StepBar:
        return StepBar(self.console, steps, done, name)


class StepBar:
    """A progress bar over optimizer steps, and a line now and then where the output is no terminal.

    The loss is a look at private data: it is on the bar and in no line, because lines end up in log files.
    """

    def __init__(self, console: Console, steps: int, done: int, name: str) -> None:
        self._console, self._steps, self._done = console, steps, done
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=steps, completed=done, status="")

    def __enter__(self) -> StepBar:
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()

    def skip(self, steps: int) -> None:
        """Steps that were taken before."""
        self._done += steps
        self._progress.update(self._task, advance=steps)

    def step(
        self, *, epsilon: float | None, loss: float | None = None, examples_per_second: float | None = None
    ) -> None:
        parts = [] if epsilon is None else [f"epsilon {epsilon:.2f}"]
        if examples_per_second is not None:
            parts.append(f"{examples_per_second:.0f} examples/s")
        self._done += 1
        shown = parts if loss is None else [f"loss {loss:.3f}", *parts]
        self._progress.update(self._task, advance=1, status=" · ".join(shown))
        if not self._console.is_terminal and (self._done == self._steps or self._done % -(-self._steps // 10) == 0):
            self._console.print(" · ".join([f"step {self._done} of {self._steps}", *parts]), highlight=False)


def summary(report: dict[str, Any], cost: dict[str, Any], comparison: dict[str, Any] | None) -> Table:
    """The closing table: results, guarantee and cost; beside them, with a comparison, the run without privacy."""
    guarantee, results = report["guarantee"], report["held_out"]
    what = "accuracy" if results["measure"] == "accuracy" else "loss (nats per token)"
    table = Table(show_header=comparison is not None)
    table.add_column("", style="dim")
    table.add_column("with privacy", justify="right", style="bold")
    if comparison is not None:
        table.add_column("without: NOT PRIVATE", justify="right", style="red")

    def row(name: str, value: str, other: str = "") -> None:
        table.add_row(name, value, *([] if comparison is None else [other]))

    row(f"held-out {what} before", measure(results, "before"))
    other = "" if comparison is None else measure({**results, **comparison}, "after")
    row(f"held-out {what} after", measure(results, "after"), other)
    table.add_section()
    row("epsilon", rounded_up(guarantee["epsilon"]) if guarantee["private"] else "VOID: a seed was given", "none")
    row("delta", f"{guarantee['delta']:g}")
    row("unit", f"{guarantee['unit']} ({guarantee['adjacency']})")
    row("sampler", f"{guarantee['sampler']}, rate {guarantee['sample_rate']:.4g}, {guarantee['steps']} steps")
    row("noise multiplier", f"{guarantee['noise_multiplier']:.4g}")
    row("accountant", f"{guarantee['accountant']} ({guarantee['accountant_version']})")
    table.add_section()
    for key, (name, show) in COST.items():
        row(name, show(cost[key]), "" if comparison is None else show(comparison["cost"][key]))
    return table


COST: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("training time", lambda value: f"{value:.0f} s"),
    "examples_per_second": ("examples/s", lambda value: f"{value:.1f}"),
    "peak_memory_bytes": ("peak memory", lambda value: f"{value / 2**20:,.0f} MiB"),
}
