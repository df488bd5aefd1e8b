"""The noise that each accountant finds for a recipe, side by side, and what pld says of it. Nothing is trained.

EW-Tune calibrates with an estimate that no proof covers. What it saves in noise counts only as far as pld agrees: a proposal
for which pld finds more than the budget is marked, and a run takes pld's noise in its place.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fastclip.accounting.accountants import StepEvent, evaluate
from fastclip.accounting.calibration import propose_noise
from fastclip.accounting.guarantee import rounded_up
from fastclip.recipes.settings import Settings

ACCOUNTANTS = ("rdp", "pld", "prv", "gdp", "edgeworth")
ADJACENCY = "zero-out"


def noise_table(settings: Settings) -> dict[str, Any]:
    """{"terms": ..., "accountants": [...]}, each with "noise_multiplier", "pld_epsilon", "within_budget", "against_rdp"
    (a share), or with "missing" where its package is not installed. ValueError where the recipe's size is not known."""
    if settings.size is None or settings.user_column is not None:
        raise ValueError(
            f"the number of units of {settings.preset!r} is not known without its data: use `fastclip plan`, which counts users"
        )
    size, delta = settings.size, settings.delta_of(settings.size)
    if settings.batch_size > size:
        raise ValueError(f"batch_size is {settings.batch_size}, but there are {size} examples: give at most that many")
    rate, steps = settings.batch_size / size, settings.steps_of(size)
    rows: list[dict[str, Any]] = []
    for name in ACCOUNTANTS:
        try:
            noise = propose_noise(
                settings.epsilon, delta, rate, steps, name, None, ADJACENCY, max_batch=None, num_units=None, tried=None
            )
        except ImportError as error:
            rows.append({"accountant": name, "missing": str(error)})
            continue
        spent = evaluate([StepEvent(noise, rate, steps)], delta, "pld", None, ADJACENCY)
        rows.append(
            {
                "accountant": name,
                "noise_multiplier": noise,
                "pld_epsilon": spent,
                "within_budget": spent <= settings.epsilon,
                "against_rdp": noise / rows[0]["noise_multiplier"] - 1 if rows else 0.0,
            }
        )
    terms = {
        "preset": settings.preset,
        "epsilon": settings.epsilon,
        "delta": delta,
        "sample_rate": rate,
        "steps": steps,
        "units": size,
    }
    return {"terms": terms, "accountants": rows}


def shown(found: dict[str, Any]) -> Table:
    """The same for a terminal."""
    terms = found["terms"]
    table = Table(
        title=f"{terms['preset']}: epsilon {terms['epsilon']:g}, delta {terms['delta']:.3g}, rate {terms['sample_rate']:.4g}, "
        f"{terms['steps']} steps",
        title_justify="left",
    )
    for heading in ("accountant", "noise multiplier", "against rdp", "epsilon by pld", "pld's verdict"):
        table.add_column(heading, justify="left" if heading in ("accountant", "pld's verdict") else "right")
    for row in found["accountants"]:
        if "missing" in row:
            table.add_row(row["accountant"], "", "", "", row["missing"])
            continue
        table.add_row(
            row["accountant"],
            f"{row['noise_multiplier']:.5g}",
            f"{row['against_rdp']:+.1%}",
            rounded_up(row["pld_epsilon"]),
            "within budget" if row["within_budget"] else "OVER budget",
        )
    return table
