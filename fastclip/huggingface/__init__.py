"""Hugging Face: losses with one value per example, and transformers' Trainer with private steps.

One concept a file: `losses` per-example losses and which model takes which, `arguments` PrivacyArguments, `trainer` DPTrainer,
`draws` its loader, `refusals` what it does not take, `record` ledger and checkpoints, `card` the model card, `callback`
PrivacyCallback for a Trainer of your own. The losses need torch alone; transformers is imported with DPTrainer.
"""

from typing import TYPE_CHECKING, Any

from fastclip.huggingface.losses import (
    LossFn,
    Reduction,
    causal_lm_losses,
    classification_losses,
    default_losses,
    infilling_losses,
    masked_lm_losses,
    seq2seq_losses,
)

if TYPE_CHECKING:
    from fastclip.huggingface.arguments import PrivacyArguments
    from fastclip.huggingface.callback import PrivacyCallback
    from fastclip.huggingface.trainer import DPTrainer

_LATER = {"DPTrainer": "trainer", "PrivacyArguments": "arguments", "PrivacyCallback": "callback"}

__all__ = [
    "DPTrainer",
    "LossFn",
    "PrivacyArguments",
    "PrivacyCallback",
    "Reduction",
    "causal_lm_losses",
    "classification_losses",
    "default_losses",
    "infilling_losses",
    "masked_lm_losses",
    "seq2seq_losses",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
