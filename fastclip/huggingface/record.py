"""What a run writes down so that it can go on: the ledger beside the checkpoints, and the terms inside each.

Guarantees: a run goes on only with its own ledger, in its own output_dir, under the very terms that it began with, so that
epsilon goes on from what was spent and never falls; nothing else starts in a directory that holds a ledger. A checkpoint
has no key, no seed and no state of a generator. Copying an older ledger back goes unnoticed, as `Ledger` says.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastclip.accounting import Ledger, get_noise_multiplier
from fastclip.huggingface.arguments import PrivacyArguments
from fastclip.huggingface.draws import Owners
from fastclip.sampling import PoissonSampler

LEDGER = "ledger.jsonl"
TERMS = "privacy.json"


@dataclass(frozen=True)
class Terms:
    """Everything that has to stay as it is while a run is interrupted and goes on."""

    unit: str
    adjacency: str
    sampler: str
    num_units: int
    delta: float
    epsilon_budget: float | None
    examples_per_user: int | None
    noise_multiplier: float
    sample_rate: float
    max_batch: int | None
    clipping: str
    clipping_norm: float


def terms_of(privacy: PrivacyArguments, owners: Owners, sampler: PoissonSampler, steps: int) -> Terms:
    """The terms of a run of `steps` steps in all, with the noise calibrated for all of them. ValueError as the accountant."""
    event = sampler.event(1.0)
    sigma = privacy.noise_multiplier
    if sigma is None:
        assert privacy.target_epsilon is not None
        sigma = get_noise_multiplier(
            privacy.target_epsilon,
            privacy.target_delta,
            sampler.sample_rate,
            steps,
            privacy.accountant,
            sampler.examples_per_user,
            privacy.adjacency,
            max_batch=event.max_batch,
            num_units=event.num_units,
        )
    return Terms(
        unit=privacy.unit,
        adjacency=privacy.adjacency,
        sampler="poisson" if event.max_batch is None else "truncated poisson",
        num_units=owners.num_protected,
        delta=float(privacy.target_delta),
        epsilon_budget=None if privacy.target_epsilon is None else float(privacy.target_epsilon),
        examples_per_user=sampler.examples_per_user,
        noise_multiplier=float(sigma),
        sample_rate=sampler.sample_rate,
        max_batch=event.max_batch,
        clipping=privacy.clipping,
        clipping_norm=float(privacy.clipping_norm),
    )


def write_terms(checkpoint: Path, terms: Terms) -> None:
    """Last of all that is written into a checkpoint: one without it was cut short."""
    whole = checkpoint / f"{TERMS}.new"
    whole.write_text(json.dumps(asdict(terms), indent=2) + "\n", encoding="utf-8")
    os.replace(whole, checkpoint / TERMS)


def check_checkpoint(checkpoint: Path, output_dir: Path) -> int:
    """The number of steps in a checkpoint of this output_dir. ValueError if it is no whole checkpoint of it."""
    if not checkpoint.is_dir() or checkpoint.resolve().parent != output_dir.resolve():
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r} is no checkpoint in output_dir={str(output_dir)!r}, whose ledger says "
            "what was spent: use the output_dir of the run that wrote it"
        )
    if not (checkpoint / TERMS).is_file():
        raise ValueError(
            f"{checkpoint} has no {TERMS}: it was cut short or is of a run without privacy; use an earlier one, or start anew "
            "with another output_dir"
        )
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} is damaged ({error!r}): use an earlier checkpoint") from None


def check_terms(checkpoint: Path, terms: Terms) -> None:
    """Raise ValueError, naming what differs, unless the checkpoint was written under these terms."""
    try:
        saved: dict[str, Any] = json.loads((checkpoint / TERMS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{checkpoint / TERMS} is damaged ({error}): use an earlier checkpoint") from None
    for name, value in asdict(terms).items():
        if saved.get(name) != value:
            raise ValueError(
                f"{checkpoint} was written with {name}={saved.get(name)!r}, and now it is {value!r}: go on with the same "
                "privacy, batch size, number of steps and data, or start anew with another output_dir"
            )


def begin_ledger(output_dir: Path, terms: Terms) -> Ledger:
    """A new ledger. ValueError if the directory has one: what was trained there before counts."""
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        return Ledger.create(
            output_dir / LEDGER,
            unit=terms.unit,
            adjacency=terms.adjacency,
            sampler=terms.sampler,
            num_units=terms.num_units,
            delta=terms.delta,
            epsilon_budget=terms.epsilon_budget,
            examples_per_user=terms.examples_per_user,
        )
    except FileExistsError:
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds the ledger of an earlier run: go on by resume_from_checkpoint, or choose "
            "another output_dir"
        ) from None


def resume_ledger(output_dir: Path, terms: Terms, steps: int) -> Ledger:
    """The run's ledger, which has at least the checkpoint's steps. ValueError if it is missing, in use or another's."""
    path = output_dir / LEDGER
    try:
        ledger = Ledger.open(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist, so what was spent is not known: restore it, or start anew") from None
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    wanted = asdict(terms)
    header = ("unit", "adjacency", "sampler", "num_units", "delta", "epsilon_budget", "examples_per_user")
    wrong = [name for name in header if getattr(ledger, name) != wanted[name]]
    step = ("noise_multiplier", "sample_rate", "max_batch")
    wrong += [name for name in step for event in ledger.events() if getattr(event, name) != wanted[name]]
    if wrong or ledger.steps < steps:
        ledger.close()
        what = f"another {wrong[0]}" if wrong else f"{ledger.steps} steps, fewer than the checkpoint's {steps}"
        raise ValueError(f"{path} has {what}: it is not this run's; restore the run's own, or start anew")
    return ledger
