"""docs/results.md and its pictures, from bench/results/finetune_*.json; called by bench/results_runs.py."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- bench/results_runs.py writes from here -->", "<!-- to here -->"
INK, BLUE, RED = "#1f2933", "#1864ab", "#c92a2a"
NAMES = {"movies": "movie-review sentences", "amazon": "sentences of Amazon reviews"}
Runs = list[dict[str, Any]]


def write() -> None:
    """Tables between the two markers of docs/results.md, and docs/images/finetune-*.png."""
    text = []
    for group in ("movies", "amazon"):
        if found := read(group):
            text.append(accuracies(group, found))
            accuracy_png(group, found, DOCS / "images" / f"finetune-{group}.png")
        else:
            text.append(f"MiniLM on {NAMES[group]}: not measured yet.\n")
    found = read("users")
    text.append(users(found) if found else "SmolLM2 on mailing-list posts, ELS against ULS: not measured yet.\n")
    page = DOCS / "results.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    body = "\n".join(text)
    page.write_text(before + BEGIN + "\n" + body + END + rest.split(END)[1], encoding="utf-8")
    print(body)


def read(group: str) -> Runs:
    """The runs of full length, in the order in which they ended."""
    file = RESULTS / f"finetune_{group}.json"
    if not file.is_file():
        return []
    return [run for run in json.loads(file.read_text(encoding="utf-8"))["runs"].values() if run["steps"] is None]


def by_setting(found: Runs) -> dict[tuple[str, float | None], Runs]:
    """Runs by what is trained and epsilon: full before LoRA, and without privacy last."""
    cells: dict[tuple[str, float | None], Runs] = defaultdict(list)
    for run in found:
        cells[run["tuning"], run["epsilon"]].append(run)
    return dict(sorted(cells.items(), key=lambda cell: (cell[0][0], cell[0][1] is None, cell[0][1] or 0.0)))


def accuracies(group: str, found: Runs) -> str:
    first = next((run["held_out"] for run in found if "before" in run["held_out"]), None)
    title = f"**MiniLM on {NAMES[group]}**: accuracy on held-out sentences"
    if first is not None:
        share, count = first["after"], first["examples"]
        title += (
            f", {count} of them; before training {first['before']:.1%}. One accuracy's standard error from so few\n"
        )
        title += f"sentences is {math.sqrt(share * (1 - share) / count):.1%}: smaller differences say nothing"
    lines = [
        f"{title}.",
        "",
        "| trained | epsilon | runs | accuracy, mean | each run | noise multiplier | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for (tuning, epsilon), runs in by_setting(found).items():
        values = [run["held_out"]["after"] for run in runs]
        guarantee = runs[0].get("guarantee")
        lines.append(
            f"| {tuning} | {'not private' if epsilon is None else f'{epsilon:g}'} | {len(runs)} | "
            f"{statistics.mean(values):.1%} | {', '.join(f'{value:.1%}' for value in values)} | "
            + (f"{guarantee['noise_multiplier']:.4g} | {guarantee['steps']} |" if guarantee else "| |")
        )
    return "\n".join([*lines, "", f"![Accuracy over epsilon](images/finetune-{group}.png)", ""])


def users(found: Runs) -> str:
    lines = [
        "**SmolLM2-135M on mailing-list posts, user level**: nats per token on held-out senders' posts, lower is better.",
        "",
        "| sampling | epsilon | runs | loss, mean | each run | noise multiplier | units a draw | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sampling in ("els", "uls"):
        reports = [run["reports"][sampling] for run in found]
        values = [report["held_out"]["loss (nats per token)"] for report in reports]
        guarantee, training = reports[0]["guarantee"], reports[0]["training"]
        unit = "examples" if sampling == "els" else "users"
        lines.append(
            f"| {sampling.upper()} | {found[0]['epsilon']:g} | {len(values)} | {statistics.mean(values):.4f} | "
            f"{', '.join(f'{value:.4f}' for value in values)} | {guarantee['noise_multiplier']:.4g} | "
            f"{training['expected_batch']} {unit} | {guarantee['steps']} |"
        )
    return "\n".join([*lines, ""])


def accuracy_png(group: str, found: Runs, path: Path) -> None:
    """Every run as a point over epsilon, the means joined; without privacy as a line across."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    cells = by_setting(found)
    for tuning, color, marker in (("full", BLUE, "o"), ("lora", RED, "s")):
        private = {e: [run["held_out"]["after"] for run in runs] for (t, e), runs in cells.items() if t == tuning and e}
        points = [(epsilon, value) for epsilon, values in private.items() for value in values]
        if points:
            axes.plot(
                *zip(*points, strict=True), marker, color=color, alpha=0.5, linestyle="", label=f"{tuning}, each run"
            )
            axes.plot(list(private), [statistics.mean(v) for v in private.values()], color=color, linewidth=1.5)
    plain = [run["held_out"]["after"] for (tuning, epsilon), runs in cells.items() if epsilon is None for run in runs]
    if plain:
        axes.axhline(statistics.mean(plain), color=INK, linestyle="--", linewidth=1, label="not private, mean")
    axes.set_xscale("log")
    axes.set_xticks([1, 3, 8], ["1", "3", "8"])
    axes.minorticks_off()
    axes.set_xlabel("epsilon", color=INK)
    axes.set_ylabel("held-out accuracy", color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(f"MiniLM on {NAMES[group]}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
