"""What bench/opacus.py makes of its measurements: gradients compared, spreads, ratios, a table. No torch here."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from opacus_worker import Column

Rows = dict["Column", dict[str, Any]]
FIGURES = ("seconds", "optimizer_seconds", "peak_bytes")


def distance(ours: dict[str, Any], reference: dict[str, Any]) -> float:
    """The worst relative difference of a parameter. Below a thousandth of the whole gradient rounding is not compared."""
    if ours.keys() != reference.keys():
        return float("inf")
    whole = sum(float(r[0]) ** 2 for r in reference.values()) ** 0.5
    worst = 0.0
    for name, theirs in reference.items():
        for part in (slice(0, 1), slice(1, None)):  # the norm, the elements
            off = float(np.sqrt(np.square(ours[name][part] - theirs[part]).sum()))
            size = float(np.sqrt(np.square(theirs[part]).sum()))
            off = off / (size + 1e-3 * whole)
            worst = max(worst, off) if off == off else float("inf")
    return worst


def spread(values: list[float]) -> dict[str, Any]:
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        "median": statistics.median(values),
        "min": min(values),
        "quartiles": [quarters[0], quarters[2]],
        "all": values,
    }


def figures(row: dict[str, Any]) -> dict[str, float]:
    if "error" in row:
        return {}
    return {
        "seconds": row["seconds"]["median"],
        "optimizer_seconds": row["optimizer_seconds"]["median"],
        "peak_bytes": row["peak_bytes"],
    }


def ratios(rows: Rows) -> dict[str, Any]:
    """fastclip over Opacus by figure: in each mode, and the better mode of each. Of one and the same model only."""
    found: dict[str, Any] = {}
    theirs = {c.mode: figures(row) for c, row in rows.items() if c.library == "opacus" and figures(row)}
    adapted = any(c.adapted for c in rows)
    ours = {c.mode: figures(r) for c, r in rows.items() if c.library.startswith("fastclip") and c.adapted == adapted}
    ours = {mode: values for mode, values in ours.items() if values}
    for figure in ("seconds", "optimizer_seconds", "peak_bytes"):
        by_mode = {mode: ours[mode][figure] / theirs[mode][figure] for mode in ours if mode in theirs}
        if ours and theirs:
            by_mode["best"] = min(v[figure] for v in ours.values()) / min(v[figure] for v in theirs.values())
        found[figure] = by_mode
    return found


def table(name: str, rows: Rows, found: dict[str, Any]) -> None:
    print(f"\n{name:34} {'step ms':>9} {'optimizer ms':>13} {'peak MiB':>9}  gradients off by")
    for column, row in rows.items():
        label = f"  {column.library} {column.mode}" + (" (changed)" if column.adapted else "")
        if "error" in row:
            print(f"{label:34} {row['error']}")
            continue
        values = figures(row)
        off = max(row.get("gradient_distance", {}).values(), default=None)
        print(
            f"{label:34} {1e3 * values['seconds']:9.1f} {1e3 * values['optimizer_seconds']:13.2f}"
            f" {values['peak_bytes'] / 2**20:9.1f}  {'' if off is None else f'{off:.1g}'}"
        )
    for row in rows.values():
        if "refuses_as_it_is" in row:
            print(f"  refused as it is: {row['refuses_as_it_is']}")
    best = {figure: f"{by_mode['best']:.2f}" for figure, by_mode in found.items() if "best" in by_mode}
    print(f"  fastclip / Opacus, better mode of each: {best or 'not both measured'}", flush=True)
