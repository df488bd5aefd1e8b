"""The answers of `fastclip account` and `calibrate`: what an epsilon rests on, the accountants side by side, a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fastclip.accounting import Guarantee, StepEvent, epsilon_by_direction, find, guarantee_of
from fastclip.accounting.accountants import evaluate
from fastclip.accounting.guarantee import rounded_down, rounded_up

ACCOUNTANTS = ("pld", "prv", "rdp", "edgeworth", "gdp")
_CURVE_POINTS = 16
_MOST_USERS_PLOTTED = 64
_WORDS = {"remove": "to remove one", "add": "to add one", "replace": "to replace one"}


@dataclass(frozen=True)
class Question:
    """The options that both commands have in common, checked where they are used."""

    sample_rate: float
    steps: int
    delta: float
    accountant: str
    examples_per_user: int | None
    adjacency: str
    sampler: str
    as_poisson: bool
    max_batch: int | None
    num_units: int | None
    unit: str | None

    def event(self, noise_multiplier: float, steps: int | None = None) -> StepEvent:
        # A number of units alone is for the check of delta.
        num_units = None if self.max_batch is None else self.num_units
        count = self.steps if steps is None else steps
        return StepEvent(noise_multiplier, self.sample_rate, count, self.max_batch, num_units)

    def terms(self) -> tuple[int | None, str]:
        return self.examples_per_user, self.adjacency

    def guarantee(self, noise_multiplier: float) -> Guarantee:
        unit = self.unit or ("example" if self.examples_per_user is None else "user")
        return guarantee_of(
            [self.event(noise_multiplier)],
            self.delta,
            unit=unit,
            adjacency=self.adjacency,
            sampler=self.sampler,
            as_poisson=self.as_poisson,
            accountant=self.accountant,
            examples_per_user=self.examples_per_user,
            # With several examples to a user, it counts examples.
            num_units=self.num_units if self.examples_per_user is None else None,
        )


def report(
    asked: Question,
    stated: Guarantee,
    noise: float,
    headline: dict[str, float],
    further: dict[str, Any],
    compare: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """The answer, in one of its two forms, and the picture."""
    both = _directions(asked, noise)
    rows = _compared(asked, noise, as_json) if compare else []
    if plot is not None:
        # `account` has no budget, and the epsilon that it was asked for is where the curve ends.
        budget = headline["epsilon"] if "noise_multiplier" in headline else None
        _draw(asked, stated, noise, budget, plot, as_json)
    if as_json:
        values = {
            **headline,
            "noise_multiplier": noise,
            **{name: getattr(asked, name) for name in ("sample_rate", "steps", "delta", "accountant")},
            "examples_per_user": asked.examples_per_user,
            **further,
            "guarantee": stated.to_dict(),
            "directions": both,
        }
        if compare:
            values["accountants"] = rows
        print(json.dumps(_plain(values), allow_nan=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    if "noise_multiplier" in headline:
        console.print(f"noise multiplier {noise:.5g}")
        if further:
            console.print(
                f"{asked.accountant} proposed {further['proposed']:.5g}, for which pld finds epsilon "
                f"{rounded_up(further['proposed_spends'])}"
            )
    else:
        console.print(f"epsilon {rounded_up(stated.epsilon)}" + (", void" if stated.voided else ""))
    console.print(_basis(asked, stated, both))
    if rows:
        console.print(_comparison(rows))
    for caveat in stated.caveats:
        console.print(f"note: {caveat}", style="yellow", markup=False)
    if plot is not None:
        console.print(f"drawn into {plot}", markup=False)


def _basis(asked: Question, stated: Guarantee, both: dict[str, float] | None) -> Table:
    """All that the epsilon rests on."""
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    kind = "an upper bound" if stated.rigorous else "an approximation, which may be below the truth"
    table.add_row("epsilon", f"{rounded_up(stated.epsilon)}, {'void' if stated.voided else kind}")
    if both is not None:
        each = ", ".join(f"{rounded_up(epsilon)} {_WORDS[name]}" for name, epsilon in both.items())
        table.add_row("by direction", f"{each} (pld)")
    if stated.epsilon_at_least is not None:
        table.add_row("shuffled batches", f"epsilon {rounded_down(stated.epsilon_at_least)} or more, first epoch alone")
    elif stated.sampler == "shuffled":
        table.add_row("shuffled batches", "no lower bound is known for less than a whole epoch")
    table.add_row("delta", f"{stated.delta:g}")
    table.add_row("unit", stated.unit)
    table.add_row("adjacency", stated.adjacency)
    sampled = stated.unit if asked.examples_per_user is None else "example"
    cut = "" if stated.max_batch is None else f", cut to {stated.max_batch:,} of {asked.num_units:,}"
    table.add_row("sampler", f"{stated.sampler}, each {sampled} at rate {asked.sample_rate:g}{cut}")
    if asked.examples_per_user is not None:
        table.add_row("examples per user", f"at most {asked.examples_per_user}")
    table.add_row("steps", f"{stated.steps:,}")
    table.add_row("noise multiplier", "none" if stated.noise_multiplier is None else f"{stated.noise_multiplier:g}")
    table.add_row("accountant", f"{stated.accountant} ({stated.accountant_version})")
    return table


def _comparison(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1))
    table.add_column("accountant")
    table.add_column("epsilon", justify="right")
    table.add_column("is", overflow="fold")
    for row in rows:
        if row["epsilon"] is None:
            table.add_row(row["accountant"], "-", row["problem"])
        else:
            kind = "an upper bound" if row["rigorous"] else "an approximation"
            table.add_row(row["accountant"], rounded_up(row["epsilon"]), kind)
    return table


def _directions(asked: Question, noise: float) -> dict[str, float] | None:
    """None where pld has no figure."""
    try:
        removing, adding = epsilon_by_direction([asked.event(noise)], asked.delta, *asked.terms())
    except ValueError:
        return None
    if asked.adjacency == "replace-one":
        return {"replace": removing}
    return {"remove": removing, "add": adding}


def _names(asked: Question) -> list[str]:
    names = [*ACCOUNTANTS, "group"] if (asked.examples_per_user or 1) > 1 else [*ACCOUNTANTS]
    return names if asked.accountant in names else [asked.accountant, *names]


def _compared(asked: Question, noise: float, as_json: bool) -> list[dict[str, Any]]:
    """One row an accountant: its epsilon, or why it has none."""
    rows: list[dict[str, Any]] = []
    names = _names(asked)
    with progress_bar("accountants", len(names), as_json) as progress:
        for name in names:
            row: dict[str, Any] = {"accountant": name, "epsilon": None, "rigorous": find(name).rigorous}
            try:
                row["epsilon"] = evaluate([asked.event(noise)], asked.delta, name, *asked.terms())
            except (ValueError, ImportError) as problem:
                row["problem"] = str(problem)
            rows.append(row)
            progress()
    return rows


def _draw(asked: Question, stated: Guarantee, noise: float, budget: float | None, plot: Path, as_json: bool) -> None:
    from fastclip.accounting.plots import Line, draw

    def over_steps(name: str, steps: int) -> float:
        return evaluate([asked.event(noise, steps)], asked.delta, name, *asked.terms())

    def over_users(name: str, users: int) -> float:
        return evaluate([asked.event(noise)], asked.delta, name, users, asked.adjacency)

    # Dense at the start, where epsilon grows like a root.
    ends = sorted({1, *(math.ceil(asked.steps * ((i + 1) / _CURVE_POINTS) ** 2) for i in range(_CURVE_POINTS))})
    panels: list[tuple[Callable[[str, int], float], list[str], list[int]]] = [(over_steps, _names(asked), ends)]
    if asked.examples_per_user is not None:
        most = min(_MOST_USERS_PLOTTED, max(8, 2 * asked.examples_per_user))
        counts: list[int] = sorted({asked.examples_per_user, *(2**i for i in range(most.bit_length()) if 2**i <= most)})
        panels.append((over_users, ["pld", "group", "rdp"], counts))
    drawn: list[list[Line]] = []
    with progress_bar("points", sum(len(names) * len(xs) for _, names, xs in panels), as_json) as progress:
        for epsilon, names, xs in panels:
            lines = []
            for name in names:
                ys = []
                for x in xs:
                    progress()
                    try:
                        ys.append(epsilon(name, x))
                    except (ValueError, ImportError):
                        ys.append(math.nan)
                lines.append(Line(name, xs, ys, find(name).rigorous))
            drawn.append(lines)
    level = "" if asked.examples_per_user is None else f", at most {asked.examples_per_user} examples per user"
    draw(
        plot,
        *drawn,
        title=f"sigma {noise:g}, rate {asked.sample_rate:.4g}, delta {asked.delta:g}, {asked.adjacency}{level}",
        budget=budget,
        at_least=stated.epsilon_at_least,
    )


def _plain(value: Any) -> Any:
    """The same without infinities, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


@contextmanager
def progress_bar(name: str, total: int | None, as_json: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal's standard error, gone afterwards, and nothing elsewhere."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=as_json or not console.is_terminal,
    )
    with progress:
        task = progress.add_task(name, total=total)
        yield lambda: progress.update(task, advance=1)
