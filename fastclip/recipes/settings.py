"""What a published recipe is made of: one frozen record of everything that a run needs, and where its data lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastclip.finetune.tuning import TUNINGS
from fastclip.recipes.prompts import Template


@dataclass(frozen=True)
class Source:
    """A data set by its name on the Hugging Face hub, and what is read of it.

    train, held_out: its splits; held_out maps each split that is evaluated to the name that its results carry. columns:
    those that must be there. revision: where the hub keeps tables for a data set that was published as a script. owner:
    rows that have nothing in this column belong to nobody who could be protected, and are left out.
    """

    name: str
    columns: tuple[str, ...]
    held_out: Mapping[str, str] = field(default_factory=lambda: {"validation": ""})
    train: str = "train"
    config: str | None = None
    revision: str | None = None
    owner: str | None = None


@dataclass(frozen=True)
class Target:
    """A result that others published: who, with which model and tuning, at which epsilon (None: without privacy)."""

    who: str
    model: str
    epsilon: float | None
    results: Mapping[str, float]
    tuning: str = "full"

    def to_json(self) -> dict[str, Any]:
        return {
            "who": self.who,
            "model": self.model,
            "tuning": self.tuning,
            "epsilon": self.epsilon,
            "results": dict(self.results),
        }


@dataclass(frozen=True)
class Settings:
    """One recipe. Every number that is printed with the publication stands as it is published; see docs/recipes.md.

    kind: which task; "users" compares example-level and user-level sampling. model: a name on the hub or a folder. data:
    a folder with the splits as .jsonl, .csv or .parquet files in the place of `source`. batch_size: expected examples of a
    draw. physical_batch: at most so many go through the model together. delta: None for 1 / (2 n), n the number of
    protected units. tunings: what is trained, several to compare them. decay: whether the learning rate falls linearly to 0;
    constant otherwise. accountant: whose noise is used, with pld as the judge of what is not rigorous. size: training
    examples of the published data set, for a table of noise without the data. steps: in the place of epochs.
    examples_per_user: the most of a user's examples that are used. seed: repeats draws and noise, and voids epsilon.
    """

    preset: str
    kind: Literal["infilling", "table-to-text", "users"]
    model: str
    source: Source
    epochs: float
    batch_size: int
    learning_rate: float
    max_length: int
    size: int | None = None
    clipping_norm: float = 0.1
    epsilon: float = 8.0
    delta: float | None = None
    decay: bool = True
    physical_batch: int = 20
    accountant: str = "pld"
    tunings: tuple[str, ...] = ("full",)
    template: Template | None = None
    text_column: str = "text"
    user_column: str | None = None
    examples_per_user: int | None = None
    targets: tuple[Target, ...] = ()
    data: str | None = None
    steps: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("epsilon", "clipping_norm", "learning_rate", "epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}: give a finite number above 0")
        for name in ("batch_size", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give an integer of at least 1")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(
                f"delta is {self.delta}: give a number between 0 and 1, well below 1 over the number of units"
            )
        for tuning in self.tunings:
            if tuning not in TUNINGS:
                raise ValueError(f"tuning {tuning!r} does not exist: choose one of {', '.join(TUNINGS)}")

    def delta_of(self, units: int) -> float:
        return 1 / (2 * units) if self.delta is None else self.delta

    def steps_of(self, drawn_from: int) -> int:
        """Optimizer steps, of so many examples that are drawn from."""
        return self.steps or max(1, math.ceil(self.epochs * drawn_from / self.batch_size))

    def model_name(self) -> str:
        """The name on the hub, or the last part of a path: the whole may name people."""
        return Path(self.model).name if Path(self.model).exists() else self.model

    def configuration(self) -> dict[str, Any]:
        """The settings for a report, without paths: they may name people."""
        names = ("epochs", "batch_size", "learning_rate", "max_length", "clipping_norm", "decay", "accountant")
        return {
            "preset": self.preset,
            "model": self.model_name(),
            **{name: getattr(self, name) for name in names},
            "steps": self.steps,
        }
