"""`fastclip account` and `fastclip calibrate`: what a run spends, and the noise that keeps it within a budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fastclip.accounting import AccountingWarning, find
from fastclip.accounting.accountants import evaluate
from fastclip.accounting.calibration import propose_noise
from fastclip.accounting_report import Question, progress_bar, report
from fastclip.command_line import Json, complaints

Delta = Annotated[float, typer.Option(help="Delta of the guarantee.")]
SampleRate = Annotated[float, typer.Option(help="Probability with which a unit enters a draw.")]
Steps = Annotated[int, typer.Option(help="Optimizer steps, each one release.")]
Accountant = Annotated[str, typer.Option(help="pld, rdp, prv, gdp, edgeworth or group.")]
PerUser = Annotated[
    int | None,
    typer.Option(help="User-level figures under example-level sampling, for at most so many examples a user."),
]
Adjacency = Annotated[
    str, typer.Option(help="What neighbouring data sets differ in: add/remove, zero-out or replace-one.")
]
Sampler = Annotated[str, typer.Option(help="How batches are drawn: poisson or shuffled.")]
AsPoisson = Annotated[
    bool,
    typer.Option(
        "--as-poisson", help="With --sampler shuffled: show the void figure of Poisson draws and a lower bound."
    ),
]
MaxBatch = Annotated[int | None, typer.Option(help="Draws are cut to so many units; with --num-units.")]
NumUnits = Annotated[int | None, typer.Option(help="The number of what is sampled, if it is public.")]
Unit = Annotated[
    str | None, typer.Option(help="What is protected; example, or user with --examples-per-user, unless given.")
]
Compare = Annotated[bool, typer.Option("--compare-accountants", help="Show every accountant's figure.")]
Plot = Annotated[
    Path | None,
    typer.Option(help="Draw epsilon over the steps, and over the examples per user, into this .png file."),
]


def account(
    noise_multiplier: Annotated[
        float, typer.Option(help="Sigma: the noise's standard deviation over the clipping norm.")
    ],
    sample_rate: SampleRate,
    steps: Steps,
    delta: Delta,
    accountant: Accountant = "pld",
    examples_per_user: PerUser = None,
    adjacency: Adjacency = "add/remove",
    sampler: Sampler = "poisson",
    as_poisson: AsPoisson = False,
    max_batch: MaxBatch = None,
    num_units: NumUnits = None,
    unit: Unit = None,
    compare_accountants: Compare = False,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """The epsilon that a run spends."""
    with _quietly(), complaints():
        asked = Question(
            sample_rate, steps, delta, accountant, examples_per_user, adjacency, sampler, as_poisson, max_batch,
            num_units, unit,
        )  # fmt: skip
        _check(asked, plot)
        stated = asked.guarantee(noise_multiplier)
        report(asked, stated, noise_multiplier, {"epsilon": stated.epsilon}, {}, compare_accountants, plot, as_json)


def calibrate(
    epsilon: Annotated[float, typer.Option(help="Epsilon that the run may spend.")],
    delta: Delta,
    sample_rate: SampleRate,
    steps: Steps,
    accountant: Accountant = "pld",
    examples_per_user: PerUser = None,
    adjacency: Adjacency = "add/remove",
    sampler: Sampler = "poisson",
    as_poisson: AsPoisson = False,
    max_batch: MaxBatch = None,
    num_units: NumUnits = None,
    unit: Unit = None,
    compare_accountants: Compare = False,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """The noise multiplier that keeps a run within an epsilon.

    What an accountant that only approximates proposes is checked with pld, and raised where that finds more.
    """
    with _quietly(), complaints():
        asked = Question(
            sample_rate, steps, delta, accountant, examples_per_user, adjacency, sampler, as_poisson, max_batch,
            num_units, unit,
        )  # fmt: skip
        _check(asked, plot)
        noise, further = _calibrated(asked, epsilon, as_json)
        stands_on = replace(asked, accountant="pld") if further else asked
        report(
            asked,
            stands_on.guarantee(noise),
            noise,
            {"noise_multiplier": noise, "epsilon": epsilon},
            further,
            compare_accountants,
            plot,
            as_json,
        )


def _calibrated(asked: Question, epsilon: float, as_json: bool) -> tuple[float, dict[str, Any]]:
    """The noise, and where it was not what the accountant proposed, that as well."""
    event = asked.event(1.0)

    def least(accountant: str, progress: Callable[[], None]) -> float:
        return propose_noise(
            epsilon, asked.delta, asked.sample_rate, asked.steps, accountant, *asked.terms(),
            max_batch=event.max_batch, num_units=event.num_units, tried=lambda *tried: progress(),
        )  # fmt: skip

    # Bracketing, the root and the last digit: some twenty evaluations.
    with progress_bar("noise tried", None, as_json) as progress:
        if asked.sampler == "shuffled" and not asked.as_poisson:
            asked.guarantee(1.0)  # which refuses
        proposed = least(asked.accountant, progress)
        if find(asked.accountant).rigorous:
            return proposed, {}
        spent = evaluate([asked.event(proposed)], asked.delta, "pld", *asked.terms())
        noise = proposed if spent <= epsilon else least("pld", progress)
    return noise, {"proposed": proposed, "proposed_spends": spent}


def _check(asked: Question, plot: Path | None) -> None:
    if asked.max_batch is not None and asked.num_units is None:
        raise ValueError("--max-batch needs --num-units: what a cut draw costs depends on the number of units")
    if asked.as_poisson and asked.sampler != "shuffled":
        raise ValueError("--as-poisson is for --sampler shuffled alone: leave it out")
    if asked.sampler not in ("poisson", "shuffled"):
        raise ValueError(f"sampler={asked.sampler!r} is not accounted for: give poisson or shuffled")
    if asked.sampler == "shuffled" and not asked.as_poisson:
        raise ValueError(
            "shuffled batches have no accountant, and the figure for Poisson draws can be far below the truth: draw "
            "by poisson, or add --as-poisson to see that figure, marked void, beside a lower bound on the truth"
        )
    if plot is not None and plot.suffix.lower() != ".png":
        raise ValueError(f"--plot {plot} is no .png file: give a name that ends in .png")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise ValueError(f"--plot {plot} lies in a folder that does not exist: make it first")


@contextmanager
def _quietly() -> Iterator[None]:
    """What the warnings say stands among the caveats of the guarantee."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccountingWarning)
        yield
