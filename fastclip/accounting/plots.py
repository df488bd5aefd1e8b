"""The picture of `fastclip account` and `calibrate`: epsilon over the steps, and over the examples per user."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COLOURS = {
    "pld": "#1864ab",
    "prv": "#2b8a3e",
    "rdp": "#e8590c",
    "group": "#862e9c",
    "edgeworth": "#c2255c",
    "gdp": "#868e96",
}
_INK, _WARNING = "#1f2933", "#c92a2a"
_LABELS = {"pld": "pld (mixture)", "group": "group (Vadhan over pld)", "rdp": "rdp (Mironov's groups)"}
# Group privacy explodes: above so many times the largest of the others, a line leaves the picture.
_HEADROOM = 3.0


@dataclass(frozen=True)
class Line:
    """One accountant's epsilons. xs, ys: [n]. rigorous: drawn solid, else dashed."""

    name: str
    xs: Sequence[int]
    ys: Sequence[float]
    rigorous: bool


def draw(
    path: Path,
    over_steps: Sequence[Line],
    over_users: Sequence[Line] = (),
    *,
    title: str,
    budget: float | None = None,
    at_least: float | None = None,
) -> None:
    """Write the picture to `path`, a .png file; a second panel where there is something `over_users`.

    budget: an epsilon that must not be exceeded. at_least: an epsilon that shuffled batches cost at the least. Raises
    ImportError, naming the extra to install, without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('--plot needs a package: pip install "fastclip-dp[finetune]"') from None
    # Not pyplot: it would choose a backend for the whole process and keep every figure.
    figure = Figure(figsize=(12 if over_users else 7.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if over_users else 1, squeeze=False)[0]
    figure.suptitle(title, fontsize=11, color=_INK)
    _panel(panels[0], over_steps, "steps", {})
    panels[0].set_ylim(0, 1.06 * _top([*over_steps], [budget, at_least]))
    if budget is not None:
        _mark(panels[0], budget, f"budget {budget:g}")
    if at_least is not None:
        _mark(panels[0], at_least, "shuffled batches cost this or more")
    panels[0].set_xlim(0, max(line.xs[-1] for line in over_steps))
    if over_users:
        _panel(panels[1], over_users, "examples per user", _LABELS)
        panels[1].set_ylim(0, 1.06 * _top(over_users, []))
        panels[1].set_xlim(0, over_users[0].xs[-1])
        panels[1].set_xticks(over_users[0].xs)
    figure.savefig(path, dpi=150)


def _top(lines: Sequence[Line], others: Sequence[float | None]) -> float:
    """The largest epsilon to be shown."""
    steady = [y for line in lines if line.name not in ("rdp", "group") for y in line.ys if math.isfinite(y)]
    largest = max([*steady, 1e-3])
    seen = [y for line in lines for y in line.ys if math.isfinite(y) and y <= _HEADROOM * largest]
    marks = [y for y in others if y is not None and math.isfinite(y)]
    return max([largest, *seen, *marks])


def _panel(axes: Any, lines: Sequence[Line], x: str, labels: dict[str, str]) -> None:
    drawn = [line for line in lines if any(map(math.isfinite, line.ys))]
    for line in drawn:
        axes.plot(
            line.xs,
            [y if math.isfinite(y) else math.nan for y in line.ys],
            label=labels.get(line.name, line.name) + ("" if line.rigorous else " (approximation)"),
            color=_COLOURS.get(line.name, _INK),
            # The two most precise ones lie on each other: dots show both.
            linestyle=":" if line.name == "prv" else "-" if line.rigorous else "--",
            linewidth=2.5 if line.name in ("pld", "prv") else 1.5,
            # A few points, not to be mistaken for a curve between them.
            marker="o" if labels else None,
            markersize=4,
            zorder={"pld": 3, "prv": 4}.get(line.name, 2),
        )
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel("epsilon", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if drawn:
        axes.legend(frameon=False, fontsize=9)


def _mark(axes: Any, epsilon: float, words: str) -> None:
    if not math.isfinite(epsilon):
        return
    axes.axhline(epsilon, color=_WARNING, linewidth=1, linestyle=":")
    axes.annotate(
        words,
        (0, epsilon),
        xycoords=("axes fraction", "data"),
        xytext=(6, -4),
        textcoords="offset points",
        ha="left",
        va="top",
        color=_WARNING,
        fontsize=9,
    )
