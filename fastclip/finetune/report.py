"""What a run leaves behind: a report for everybody, and a folder that is for nobody else.

`report.json` and `report.html` hold the configuration, the guarantee and results on held-out data, and nothing that
was computed from training data without noise: not the training loss, not a norm, not even how long a step took, which
depends on the draw's size.
"""

from __future__ import annotations

import html
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastclip
from fastclip.accounting import Ledger, epsilon_curve
from fastclip.accounting.guarantee import rounded_up
from fastclip.finetune import plots
from fastclip.finetune.loop import History
from fastclip.finetune.presets import Recipe, describe
from fastclip.finetune.task import Task

PRIVATE_README = """# Not for publication

The files in this folder were computed from the training data without noise: training losses, gradient norms, counts,
times, and with --compare the results of a model that was trained without privacy. The epsilon of the run does not
cover them. Showing them to somebody shows them something about the people in the data. `recipe.json` and
`checkpoint.pt` are here because --resume needs them.

The model, report.json and report.html in the folder above may be published.
"""


EVALUATION = (
    "The held-out part was never trained on. It is not protected: the results published here were measured on it."
)
NOT_COVERED = (
    "The hyper-parameters (clipping norm, learning rates, batch size, steps, what is frozen) were chosen by comparing "
    "held-out results on this very data set. Epsilon does not cover that choice; for data of your own, choose them on "
    "public data."
)


def build(recipe: Recipe, task: Task, ledger: Ledger, before: float, after: float) -> dict[str, Any]:
    """The publishable report, ready for JSON."""
    guarantee = ledger.guarantee(seeded=recipe.seed is not None, from_size=["sample_rate"])
    last = ledger.events()[-1]
    curve = epsilon_curve(last.noise_multiplier, last.sample_rate, ledger.steps, recipe.delta)
    described = describe(recipe)
    return {
        "title": f"{described['model']} on {described['data']}",
        "guarantee": {**guarantee.to_dict(), "private": not guarantee.voided, "statement": str(guarantee)},
        "held_out": {"measure": task.measure, "before": before, "after": after, "examples": len(task.held_out)},
        "data": {
            **described,
            f"training_{recipe.unit}s": task.num_units,
            "trained_parameters": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in task.model.parameters()),
        },
        "configuration": recipe.public(),
        "epsilon_by_step": curve,
        "notes": [EVALUATION, NOT_COVERED] if recipe.preset in ("movies", "mail") else [EVALUATION],
        "software": f"fastclip {fastclip.__version__}, torch {torch.__version__}, transformers {version('transformers')}",
    }


def write_public(folder: Path, report: dict[str, Any]) -> None:
    """report.json and report.html."""
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(report), encoding="utf-8")


def write_private(folder: Path, history: History, max_grad_norm: float, cost: dict[str, Any]) -> None:
    """private/: diagnostics.json, losses.png, unit_norms.png and a README that says what it is."""
    norms = torch.cat(history.unit_norms) if history.unit_norms else torch.zeros(0)
    finite = norms[torch.isfinite(norms)].numpy()
    diagnostics = {
        "notice": "computed from training data without noise: not for publication",
        "cost": cost,
        "nonfinite_units": history.nonfinite,
        "unit_norm_quantiles_10_50_90": np.quantile(finite, [0.1, 0.5, 0.9]).tolist() if len(finite) else [],
        "losses": [None if math.isnan(loss) else loss for loss in history.losses],
    }
    target = folder / "private"
    (target / "diagnostics.json").write_text(json.dumps(diagnostics, indent=2) + "\n", encoding="utf-8")
    plots.losses_png(history.losses, target / "losses.png")
    plots.norms_png(norms, max_grad_norm, target / "unit_norms.png")


def prepare_private(folder: Path) -> None:
    """Makes private/ with its README."""
    (folder / "private").mkdir(parents=True, exist_ok=True)
    (folder / "private" / "README.md").write_text(PRIVATE_README, encoding="utf-8")


def page(report: dict[str, Any]) -> str:
    """The report as one HTML page without outside resources."""
    guarantee, results = report["guarantee"], report["held_out"]
    private = guarantee["private"]
    figures = [
        (rounded_up(guarantee["epsilon"]) if private else "none", "epsilon"),
        (f"{guarantee['delta']:g}", "delta"),
        (measure(results, "before"), f"held-out {results['measure']} before"),
        (measure(results, "after"), f"held-out {results['measure']} after"),
    ]
    cards = "".join(
        f"<div class=card><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for value, name in figures
    )
    warning = "" if private else f"<p class=warning>{html.escape(guarantee['statement'])}</p>"
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report["notes"])
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>{html.escape(report["title"])}</title>
<style>{STYLE}</style>
<main>
<h1>{html.escape(report["title"])}</h1>
{warning}<div class=cards>{cards}</div>
<h2>Guarantee</h2>
<p>{html.escape(guarantee["statement"])}</p>
{_table(guarantee, skip=("statement", "private", "caveats", "rigorous", "voided"))}
<h2>Epsilon over steps</h2>
<figure>{plots.epsilon_svg(report["epsilon_by_step"], report["configuration"]["epsilon"])}</figure>
<h2>Held-out results</h2>
{_table(results)}
<h2>Data and model</h2>
{_table(report["data"])}
<h2>Configuration</h2>
{_table(report["configuration"])}
<h2>Read this with it</h2>
<ul>{notes}</ul>
<footer>{html.escape(report["software"])}</footer>
</main></html>
"""


def measure(results: dict[str, Any], when: str) -> str:
    """A held-out result as it is shown: a percentage, or nats per token."""
    return f"{results[when]:.1%}" if results["measure"] == "accuracy" else f"{results[when]:.3f}"


def _table(values: dict[str, Any], skip: tuple[str, ...] = ()) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}<td>{html.escape(_shown(value))}"
        for name, value in values.items()
        if name not in skip and value is not None and value != []
    )
    return f"<table>{rows}</table>"


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


STYLE = """
body{margin:0;background:#f4f6f8;color:#1f2933;font:16px/1.5 system-ui,sans-serif} main{max-width:46rem;margin:2rem
auto;padding:1.5rem 2rem 2rem;background:#fff;border-radius:10px;box-shadow:0 1px 4px #0002}
h1{font-size:1.5rem;margin:0 0 1rem}h2{font-size:1.05rem;margin:2rem 0 .5rem;color:#1864ab}
.cards{display:flex;flex-wrap:wrap;gap:.75rem}.card{flex:1 1 8rem;padding:.75rem 1rem;border:1px solid
#d9e2ec;border-radius:8px} .card b{display:block;font-size:1.5rem}.card span{color:#52606d;font-size:.85rem}
.warning{padding:.75rem 1rem;border-left:4px solid #c92a2a;background:#fff5f5}
table{border-collapse:collapse;width:100%;font-size:.92rem}th{width:38%;text-align:left;font-weight:500;color:#52606d}
th,td{padding:.3rem .4rem;border-bottom:1px solid #e4e7eb;vertical-align:top;overflow-wrap:anywhere}
figure{margin:0}figure svg{width:100%;height:auto}ul{padding-left:1.2rem}
footer{margin-top:2rem;color:#7b8794;font-size:.8rem}
"""
