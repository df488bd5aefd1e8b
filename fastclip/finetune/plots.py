"""The plots of a run: epsilon over steps for the report; losses and norms for the eyes of those who may see the
data."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

INK, ACCENT, WARNING = "#1f2933", "#1864ab", "#c92a2a"


def epsilon_svg(curve: Sequence[float], budget: float) -> str:
    """An <svg> element of epsilon after each step, `curve[i]` after step i + 1, with the budget as a line. Made from
    public numbers only."""
    figure, axes = _axes("step", "epsilon spent")
    axes.plot(range(len(curve) + 1), [0.0, *curve], color=ACCENT, linewidth=2)
    axes.axhline(budget, color=WARNING, linewidth=1, linestyle="--")
    axes.annotate(f"budget {budget:g}", (0, budget), xytext=(4, -12), textcoords="offset points", color=WARNING)
    axes.set_ylim(0, max(budget, *curve) * 1.08)
    axes.set_xlim(0, len(curve))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    text = io.StringIO()
    # Without a date and with fixed ids the same run gives the same bytes.
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def losses_png(losses: Sequence[float], path: Path) -> None:
    """Mean training loss of each step. Not for publication."""
    figure, axes = _axes("step", "training loss (private)")
    axes.plot(range(1, len(losses) + 1), losses, color=ACCENT, linewidth=1.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)


def norms_png(norms: Tensor, max_grad_norm: float, path: Path) -> None:
    """Histogram of the unit norms before clipping, fp32 `[N]`, on a logarithmic axis with C marked. Not for
    publication."""
    figure, axes = _axes("norm of a unit's gradient (private)", "units")
    shown = norms[torch.isfinite(norms) & (norms > 0)]
    if shown.numel():
        low, high = math.log10(float(shown.min())), math.log10(float(shown.max()))
        edges = torch.logspace(low, max(high, low + 0.1), 61).tolist()
        axes.hist(shown.tolist(), bins=edges, color=ACCENT)
        axes.set_xscale("log")
        clipped = float((shown > max_grad_norm).float().mean())
        axes.axvline(max_grad_norm, color=WARNING, linewidth=1.5)
        axes.set_title(
            f"C = {max_grad_norm:g}, {clipped:.0%} of the norms are above it", color=WARNING, fontsize=10, loc="left"
        )
    figure.savefig(path, dpi=150)


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    # Not pyplot: it would choose a backend for the whole process and keep every figure.
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes
