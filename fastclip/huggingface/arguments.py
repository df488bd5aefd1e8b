"""PrivacyArguments: what a private run needs beside TrainingArguments.

No field has the name of one in `transformers.TrainingArguments`, so that `HfArgumentParser((TrainingArguments,
PrivacyArguments))` reads both from one command line. That is more than form: Trainer's `seed` must not reach noise or
draws, and Trainer's `max_grad_norm` clips a sum that is released already.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastclip.accounting import StepEvent, find
from fastclip.accounting.accountants import check_count, check_delta, check_number, check_supported
from fastclip.accounting.calibration import check_epsilon
from fastclip.clipping import check_norm, make_rule


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class PrivacyArguments:
    """The guarantee that is asked for, and how units are clipped and drawn. ValueError for what cannot be.

    target_delta: in (0, 1), well below one over the number of units; no default, because it is a decision.
    target_epsilon: the budget, from which the noise is calibrated; or noise_multiplier: sigma >= 0, and no budget. Give
    exactly one. accountant: whose figures calibrate; the ledger reports with "pld" always.
    clipping_norm: C, the most that one unit's gradient may measure. clipping: "flat", "automatic" or "per_layer".
    user_column: the column of the training data that names each example's user. Users are the unit then, and users are
    drawn, each with all of its examples. With examples_per_user=K examples are drawn instead, of every user at most K,
    and the accountant charges for a user's K together. None: each example is a unit.
    adjacency: "zero-out" or "replace-one". The sampling rate is the batch size over the number of units in the data,
    so that this number is public.
    max_batch: the most units in a draw; a larger one is cut, which is another mechanism and costs more.
    privacy_seed: repeats noise, draws and dropout, for tests. Whoever knows it can take the noise off: epsilon is void.
    """

    target_delta: float = field(metadata=_help("delta, well below one over the number of units"))
    target_epsilon: float | None = field(default=None, metadata=_help("the budget; the noise is calibrated for it"))
    noise_multiplier: float | None = field(default=None, metadata=_help("sigma, in the place of target_epsilon"))
    clipping_norm: float = field(default=1.0, metadata=_help("C, to which each unit's gradient is clipped"))
    clipping: str = field(default="flat", metadata=_help("flat, automatic or per_layer"))
    accountant: str = field(default="pld", metadata=_help("whose figures calibrate the noise"))
    user_column: str | None = field(default=None, metadata=_help("column of the user ids; users are the unit then"))
    examples_per_user: int | None = field(
        default=None, metadata=_help("draw examples, at most so many of each user, and charge for them together")
    )
    adjacency: str = field(default="zero-out", metadata=_help("zero-out or replace-one"))
    max_batch: int | None = field(default=None, metadata=_help("the most units in a draw; larger ones are cut"))
    privacy_seed: int | None = field(default=None, metadata=_help("repeats noise and draws, which voids the epsilon"))

    def __post_init__(self) -> None:
        check_delta("target_delta", self.target_delta)
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError(
                f"target_epsilon={self.target_epsilon!r} and noise_multiplier={self.noise_multiplier!r}: give exactly one, "
                "the budget to calibrate the noise for or the noise itself"
            )
        if self.target_epsilon is not None:
            check_epsilon("target_epsilon", self.target_epsilon)
        if self.noise_multiplier is not None:
            StepEvent(self.noise_multiplier, 1.0)
        check_norm("clipping_norm", self.clipping_norm)
        if not isinstance(self.clipping, str):
            raise ValueError(f"clipping={self.clipping!r} is no name: give 'flat', 'automatic' or 'per_layer'")
        make_rule(self.clipping, self.clipping_norm)
        if self.user_column is not None and (not isinstance(self.user_column, str) or not self.user_column):
            raise ValueError(f"user_column={self.user_column!r} is no name of a column: give one, or leave it out")
        if self.examples_per_user is not None and self.user_column is None:
            raise ValueError(
                f"examples_per_user={self.examples_per_user!r} needs user_column, which says whose each example is"
            )
        for name in ("examples_per_user", "max_batch"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=1)
        if self.max_batch is not None and (self.examples_per_user or 1) > 1:
            raise ValueError(
                f"max_batch={self.max_batch!r} with examples_per_user={self.examples_per_user!r}: no accountant covers users "
                "in cut draws; leave max_batch out, memory is bounded by per_device_train_batch_size"
            )
        if self.adjacency == "add/remove":
            raise ValueError(
                "adjacency='add/remove' cannot hold: the sampling rate is computed from the number of units in the data, "
                "which is public then; use 'zero-out', for which epsilon is the same"
            )
        check_supported(find(self.accountant), [], self.examples_per_user, self.adjacency)
        if self.privacy_seed is not None:
            check_number("privacy_seed", self.privacy_seed)
            check_count("privacy_seed", self.privacy_seed, least=0)

    @property
    def unit(self) -> str:
        """What is protected: "example" or "user"."""
        return "example" if self.user_column is None else "user"
