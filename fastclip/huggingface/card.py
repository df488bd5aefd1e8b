"""The model card: what is guaranteed, for whom, and what it rests on.

Privacy: what stands here is the configuration, the guarantee and results on held-out data. Nothing was computed from training
data without noise: no training loss, no norm, no time that a step took.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastclip.accounting import Guarantee
from fastclip.accounting.guarantee import rounded_up
from fastclip.huggingface.arguments import PrivacyArguments

_NOT_COVERED = (
    "Held-out data was not trained on and is not protected. Choosing hyper-parameters by several runs on the same training "
    "data is not covered by this epsilon."
)
# Of what evaluation logs, these say how fast a machine was.
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def model_card(
    guarantee: Guarantee,
    privacy: PrivacyArguments,
    model: nn.Module,
    history: Sequence[Mapping[str, Any]],
    details: Mapping[str, Any],
) -> str:
    """Markdown with a metadata block. history: Trainer's logs, of which the last held-out results are taken. details: license,
    language, tags, dataset, model_name, finetuned_from, as Trainer's create_model_card takes them; others are ignored."""
    base = details.get("finetuned_from") or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    title = details.get("model_name") or (f"{base}, fine-tuned privately" if base else "A privately fine-tuned model")
    held_out = _held_out(history)
    return "\n".join(
        [
            "---",
            *_metadata(details, base),
            "---",
            "",
            f"# {title}",
            "",
            "## Privacy",
            "",
            str(guarantee),
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in _terms(guarantee, privacy).items()),
            "",
            *(["## Held-out results", "", "| | |", "|---|---|"] if held_out else []),
            *(f"| {name} | {value:.6g} |" for name, value in held_out.items()),
            *([""] if held_out else []),
            _NOT_COVERED,
            "",
        ]
    )


def _terms(guarantee: Guarantee, privacy: PrivacyArguments) -> dict[str, Any]:
    void = guarantee.voided
    unit = f"one {guarantee.unit}" if guarantee.unit == "example" else f"one {guarantee.unit}, with all its examples"
    if guarantee.examples_per_user is not None:
        unit += f" (at most {guarantee.examples_per_user} are used)"
    public = f"the number of {guarantee.unit}s"
    if guarantee.examples_per_user is not None:
        public += " and that of the examples that are drawn from"
    terms = {
        "unit of privacy": unit,
        "epsilon": "void: a seed is known" if void else rounded_up(guarantee.epsilon),
        "delta": f"{guarantee.delta:g}",
        "adjacency": guarantee.adjacency,
        # The rate is the batch size over it, whatever max_steps is.
        "taken as public": public,
        "accountant": f"{guarantee.accountant} ({guarantee.accountant_version})",
        "noise multiplier sigma": guarantee.noise_multiplier,
        "sampling": f"{guarantee.sampler}, rate q = {guarantee.sample_rate}",
        "steps": guarantee.steps,
        "clipping norm C": f"{privacy.clipping_norm:g} ({privacy.clipping})",
    }
    if guarantee.max_batch is not None:
        terms["draws cut to"] = guarantee.max_batch
    return terms


def _metadata(details: Mapping[str, Any], base: str | None) -> list[str]:
    given = {
        "license": details.get("license"),
        "language": details.get("language"),
        "base_model": base,
        "datasets": details.get("dataset"),
    }
    tags = details.get("tags") or []
    lines = [f"{name}: {json.dumps(value)}" for name, value in given.items() if value is not None]
    tags = [tags] if isinstance(tags, str) else list(tags)
    return [*lines, "library_name: transformers", f"tags: {json.dumps(['differential-privacy', 'fastclip', *tags])}"]


def _held_out(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each held-out metric."""
    found = {
        name: float(value)
        for logs in history
        for name, value in logs.items()
        if name.startswith("eval_") and isinstance(value, int | float)
    }
    return {name: value for name, value in found.items() if not name.endswith(_TIMES)}
