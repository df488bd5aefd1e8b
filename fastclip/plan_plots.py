"""The pictures of `fastclip plan`: predicted noise over examples a user, and the synthetic experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from fastclip.mean_estimation import Outcome
from fastclip.userlevel import Comparison

INK, ELS, ULS = "#1f2933", "#c92a2a", "#1864ab"
# From many shared gradients to few.
_SHADES = ("#9ec5e8", "#5c9bd5", "#1864ab", "#0b3a66")


def comparison_png(found: Comparison, path: Path) -> None:
    """Predicted noise over K and G, with what was recommended marked, and under it the share of examples that ELS keeps."""
    figure = _figure(7, 5)
    noise, kept = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _noise_lines(noise, found, found.shares)
    advice = found.recommendation
    for setting in (*found.els, *found.uls):
        if (setting.algorithm, setting.examples_per_user) == (advice.algorithm, advice.examples_per_user):
            value = setting.noise(found.shares[-1])
            noise.plot(
                setting.examples_per_user,
                value,
                "*",
                color=INK,
                markersize=15,
                zorder=5,
                label="recommended",
                linestyle="",
            )
    noise.set_ylabel("noise per coordinate\n(example's gradient norm = 1)", color=INK)
    noise.legend(frameon=False, fontsize=9)
    noise.set_title(
        f"epsilon {found.epsilon:g}, {found.budget:g} gradients a step, {found.users:,} users", fontsize=10, loc="left"
    )
    sizes = [x.examples_per_user for x in found.els]
    kept.plot(sizes, [x.kept_share for x in found.els], "o-", color=ELS, markersize=4)
    kept.set_ylim(0, 1.08)
    kept.yaxis.set_major_formatter(PercentFormatter(1.0))
    kept.set_ylabel("examples\nELS keeps", color=INK)
    kept.set_xlabel("examples per user: K for ELS, G for ULS", color=INK)
    figure.savefig(path, dpi=110)


def noise_grid_png(found: Sequence[Sequence[Comparison]], shares: Sequence[float], path: Path) -> None:
    """One panel a comparison, rows and columns as given: ELS, and ULS at each r in `shares`."""
    figure = _figure(3 * len(found[0]) + 0.8, 2.6 * len(found) + 0.4)
    grid = figure.subplots(len(found), len(found[0]), sharex=True, sharey="row", squeeze=False)
    for row, panels in zip(found, grid, strict=True):
        for comparison, axes in zip(row, panels, strict=True):
            _noise_lines(axes, comparison, shares)
            axes.set_title(f"epsilon {comparison.epsilon:g}, B = {comparison.budget:g}", fontsize=10, loc="left")
        panels[0].set_ylabel("noise per coordinate\n(example's gradient norm = 1)", color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("examples per user (K or G)", color=INK)
    _legend_below(figure, grid[0][0])
    figure.savefig(path, dpi=95)


def experiment_png(outcomes: Sequence[Outcome], path: Path) -> None:
    """Error over budget, a row an epsilon and a column an r, with standard errors."""
    epsilons = list(dict.fromkeys(x.epsilon for x in outcomes))
    shares = list(dict.fromkeys(x.share for x in outcomes))
    budgets = list(dict.fromkeys(x.budget for x in outcomes))
    caps = list(dict.fromkeys(x.examples_per_user for x in outcomes if x.algorithm == "ELS"))
    groups = list(dict.fromkeys(x.examples_per_user for x in outcomes if x.algorithm == "ULS"))
    lines = [("ELS", k, ELS, "-" if k == caps[-1] else ":") for k in caps]
    lines += [("ULS", g, _shade(i, len(groups)), "-") for i, g in enumerate(groups)]
    figure = _figure(3 * len(shares) + 0.8, 2.8 * len(epsilons) + 0.4)
    grid = figure.subplots(len(epsilons), len(shares), sharex=True, sharey="row", squeeze=False)
    for epsilon, row in zip(epsilons, grid, strict=True):
        for share, axes in zip(shares, row, strict=True):
            point = [x for x in outcomes if x.epsilon == epsilon and x.share == share]
            for algorithm, size, color, style in lines:
                here = [x for x in point if x.algorithm == algorithm and x.examples_per_user == size]
                axes.errorbar(
                    [x.budget for x in here],
                    [x.error for x in here],
                    yerr=[x.standard_error for x in here],
                    color=color,
                    linestyle=style,
                    marker="s" if algorithm == "ELS" else "o",
                    markersize=4,
                    linewidth=1.6,
                    capsize=2,
                    label=f"{algorithm}, {'K' if algorithm == 'ELS' else 'G'} = {size}",
                )
            _logarithmic(axes, budgets)
            axes.set_title(f"epsilon {epsilon:g}, r = {share:.2f}", fontsize=10, loc="left")
        row[0].set_ylabel(r"$|\theta_T - \mu|^2$", color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("budget B (gradients a step)", color=INK)
    _legend_below(figure, grid[0][0])
    figure.savefig(path, dpi=95)


def _noise_lines(axes: Any, found: Comparison, shares: Sequence[float]) -> None:
    sizes = sorted({x.examples_per_user for x in (*found.els, *found.uls)})
    axes.plot(
        [x.examples_per_user for x in found.els],
        [x.noise(0.0) for x in found.els],
        "s-",
        color=ELS,
        markersize=4,
        label="ELS",
    )
    for i, share in enumerate(shares):
        axes.plot(
            [x.examples_per_user for x in found.uls],
            [x.noise(share) for x in found.uls],
            "o-",
            color=_shade(i, len(shares)) if len(shares) > 1 else ULS,
            markersize=4,
            label=f"ULS, r = {share:.3g}",
        )
    _logarithmic(axes, [size for size in sizes if size & (size - 1) == 0] or sizes)


def _shade(place: int, count: int) -> str:
    return _SHADES[round(place * (len(_SHADES) - 1) / max(count - 1, 1))]


def _logarithmic(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _legend_below(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it would choose a backend for the whole process and keep every figure.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
