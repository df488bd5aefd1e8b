"""transformers' Trainer without what looks at a sum, changes it, or repeats what must not repeat.

Privacy: a gradient norm, the size of a draw and the training loss are looks at private data; a generator's state that is kept
repeats dropout and order. Each method here is one that Trainer calls by itself, whatever its arguments are.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer


class QuietTrainer(Trainer):
    """A Trainer that neither clips nor measures gradients, counts no tokens, and keeps no generator's state."""

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Nothing: the sum is not to be changed."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Nothing: the norm of the sum before its noise is a look at private data."""

    def floating_point_ops(self, inputs: Any) -> int:
        """0: it would tell how large the draws were."""
        return 0

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: a generator's state repeats what must not repeat."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing, also where a checkpoint has one."""

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Trainer's, with the training loss under a name that says what it is."""
        for name in ("loss", "train_loss"):
            if name in logs:
                logs[f"private_{name}"] = logs.pop(name)
        super().log(logs, *args, **options)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A ValueError in the place of a warning; a checkpoint names a tied parameter once."""
        assert self.model is not None
        tensors = self.model.state_dict(keep_vars=True)
        absent = set(load_result.missing_keys)
        loaded = {id(tensor) for name, tensor in tensors.items() if name not in absent}
        absent = {name for name in absent if id(tensors[name]) not in loaded}
        absent -= set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        if absent or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint is of another model: {sorted(absent)[:3]} are missing and "
                f"{sorted(load_result.unexpected_keys)[:3]} unknown; resume with the model that the run began with"
            )

    def hyperparameter_search(self, *args: Any, **options: Any) -> Any:
        raise ValueError(
            "hyperparameter_search trains many models on the same data, and epsilon covers one: search on public data"
        )

    def push_to_hub(self, *args: Any, **options: Any) -> Any:
        raise ValueError(
            "push_to_hub would push logs and trainer state: use model.push_to_hub, tokenizer.push_to_hub and the card"
        )
