"""Example-level or user-level sampling: predicted noise, what is recommended, and the synthetic experiment.

    python bench/user_level.py

JSON goes to bench/results/user_level.json, tables to docs/user-level.md between its two markers, pictures to docs/images.
About two minutes on one core; all but the times is the same on every machine.
"""

from __future__ import annotations

import json
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
from step import machine

from fastclip import mean_estimation, plan_plots, userlevel
from fastclip.plan_command import with_error

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- bench/user_level.py writes from here -->", "<!-- to here -->"
STEPS, DELTA = 500, 1e-6
USERS, EXAMPLES = 10_000, 16
EPSILONS, BUDGETS, SHARES = (1.0, 8.0), (256, 1024, 4096), (0.0, 0.1, 0.5, 1.0)


def main() -> None:
    equal = np.full(USERS, EXAMPLES)
    started = time.process_time()
    userlevel.compare(equal, 1024, STEPS, EPSILONS[0], DELTA)
    seconds = {"equal users": time.process_time() - started}
    grid = [[userlevel.compare(equal, budget, STEPS, epsilon, DELTA) for budget in BUDGETS] for epsilon in EPSILONS]

    counts = np.ceil(np.random.default_rng(0).lognormal(1.5, 1.5, USERS)).astype(np.int64)
    started = time.process_time()
    skewed = userlevel.compare(counts, 2048, STEPS, 3.0, DELTA, 0.2)
    seconds["unequal users"] = time.process_time() - started

    settings = mean_estimation.Experiment()
    started = time.process_time()
    outcomes = mean_estimation.run(settings)
    seconds["mean estimation"] = time.process_time() - started

    images = DOCS / "images"
    images.mkdir(exist_ok=True)
    plan_plots.noise_grid_png(grid, SHARES, images / "user-level-noise.png")
    plan_plots.comparison_png(skewed, images / "user-level-plan.png")
    plan_plots.experiment_png(outcomes, images / "user-level-mean.png")
    result = {
        "machine": machine(),
        "equal_users": [found.as_dict() | {"advice": advice(found)} for row in grid for found in row],
        "unequal_users": skewed.as_dict(),
        "mean_estimation": mean_estimation.as_dict(settings, outcomes),
        "seconds": seconds,
    }
    RESULTS.joinpath("user_level.json").write_text(json.dumps(result, indent=1) + "\n")
    text = tables(grid, skewed, settings, outcomes, result)
    page = DOCS / "user-level.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + "\n" + text + END + rest.split(END)[1])
    print(text)


def advice(found: userlevel.Comparison) -> list[str]:
    """What is recommended at each of SHARES, and the noise against the ELS that it was measured by."""
    cells = []
    for share in SHARES:
        asked = userlevel.compare([EXAMPLES] * USERS, found.budget, STEPS, found.epsilon, DELTA, share)
        chosen = asked.recommendation
        if chosen.algorithm == "ELS":
            cells.append(f"ELS, K = {chosen.examples_per_user}")
            continue
        uls = next(x for x in asked.uls if x.examples_per_user == chosen.examples_per_user)
        cells.append(f"ULS, G = {uls.examples_per_user} ({uls.noise(share) / asked.els[-1].noise(share) - 1:+.0%})")
    return cells


def tables(
    grid: list[list[userlevel.Comparison]],
    skewed: userlevel.Comparison,
    settings: mean_estimation.Experiment,
    outcomes: list[mean_estimation.Outcome],
    result: dict[str, Any],
) -> str:
    lines = [
        f"**Predicted noise** of {USERS:,} users with {EXAMPLES} examples each, B = 1024, T = {STEPS}, delta = {DELTA:g}, in",
        "thousandths of an example's gradient norm. Sigma is the noise multiplier.",
        "",
        "| epsilon | K or G | ELS sigma | ELS noise | ULS sigma | ULS noise, r = 1 | r = 0.5 | r = 0.1 | r = 0 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in grid:
        found = row[BUDGETS.index(1024)]
        for els, uls in zip(found.els, found.uls, strict=True):
            noise = " | ".join(f"{1e3 * uls.noise(share):.2f}" for share in SHARES[::-1])
            lines.append(
                f"| {found.epsilon:g} | {els.examples_per_user} | {els.noise_multiplier:.4f} | {1e3 * els.noise(0):.2f} "
                f"| {uls.noise_multiplier:.4f} | {noise} |"
            )
    lines += [
        "",
        "![Predicted noise over examples per user](images/user-level-noise.png)",
        "",
        "**What `fastclip plan` recommends** there, and in brackets ULS' noise against ELS' with K = 16.",
        "",
        "| epsilon | B | " + " | ".join(f"r = {share:g}" for share in SHARES) + " | ULS up to r = |",
        "|---|---|" + "---|" * len(SHARES) + "---|",
    ]
    for found in (found for row in grid for found in row):
        edge = found.recommendation.break_even
        cells = " | ".join(advice(found))
        lines.append(
            f"| {found.epsilon:g} | {found.budget:g} | {cells} | {'never' if edge is None else f'{edge:.2f}'} |"
        )
    kept = next(x for x in skewed.els if x.examples_per_user == skewed.median)
    lines += [
        "",
        f"**Users of different sizes**: {skewed.users:,} users with {skewed.examples:,} examples, most of them few and some of "
        f"them many (median {skewed.median}),",
        f"B = {skewed.budget:g}, epsilon = {skewed.epsilon:g}, r = {skewed.share:g}. A cap at the median keeps "
        f"{kept.kept_share:.0%} of the examples. What the command says:",
        "",
        *(f"> {line}" for line in textwrap.wrap(skewed.recommendation.reason, 120)),
        "",
        "![Predicted noise for users of different sizes](images/user-level-plan.png)",
        "",
        f"**Mean estimation**: {settings.users:,} users with {settings.examples_per_user} examples in {settings.dimension} "
        f"dimensions, T = {settings.steps}, delta = {settings.delta:g}, {settings.trials} trials; 10^-4 times the",
        "squared error, with its standard error. *Ahead* is the best K against the best G of 2 or more, by 10 % and three "
        "standard errors.",
        "",
    ]
    names = list(dict.fromkeys((x.algorithm, x.examples_per_user) for x in outcomes))
    heads = " | ".join(f"{algorithm} {size}" for algorithm, size in names)
    lines += [f"| epsilon | B | r | {heads} | ahead |", "|---|---|---|" + "---|" * (len(names) + 1)]
    found = mean_estimation.verdicts(outcomes)
    for at, verdict in enumerate(found):
        here = outcomes[at * len(names) : (at + 1) * len(names)]
        cells = " | ".join(with_error(1e4 * x.error, 1e4 * x.standard_error) for x in here)
        lines.append(f"| {verdict.epsilon:g} | {verdict.budget} | {verdict.share:.2f} | {cells} | {verdict.winner} |")
    single = [v.single.error / v.els.error for v in found if v.single is not None]
    last = found[-1]  # the largest epsilon and budget, the smallest r
    noise = (last.uls.noise / last.els.noise) ** 2
    took, cpu = result["seconds"], result["machine"]["cpu"]
    lines += [
        "",
        "![Error over budget](images/user-level-mean.png)",
        "",
        f"ULS with G = 1 has {min(single):.2f} to {max(single):.2f} times the error of the best ELS. In the last row",
        f"the best ULS has {last.ratio:.2f} times ELS' error, where the predicted noise alone, squared, says {noise:.2f}.",
        "",
        f"Processor time on one thread of {cpu}: {took['equal users']:.0f} s for a plan of {len(grid[0][0].els)} K's and "
        f"{len(grid[0][0].uls)} G's, {took['unequal users']:.0f} s for the",
        f"{len(skewed.els)} and {len(skewed.uls)} of the users of different sizes, {took['mean estimation']:.0f} s for mean "
        "estimation.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
