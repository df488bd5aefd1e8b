"""AdamW and its learning rates, the same with privacy and without."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fastclip.clipping import PerGroup
from fastclip.finetune.presets import Recipe

HEAD = "classifier"


def adamw(model: nn.Module, recipe: Recipe) -> AdamW:
    """AdamW over what is trained, without weight decay; the head's learning rate is `head_rate` times the rest's."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if name.startswith(HEAD)]
    rest = [p for name, p in trained if not name.startswith(HEAD)]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": head, "lr": recipe.learning_rate * recipe.head_rate}]
    return AdamW([group for group in groups if group["params"]], lr=recipe.learning_rate, weight_decay=0.0)


def clipping(recipe: Recipe) -> str | PerGroup:
    """Flat clipping, or head and rest apart; all of it together stays within `max_grad_norm` either way.

    The gradient of a head on a good encoder is small and worth most; under one norm the encoder's would shrink it.
    """
    if not recipe.clip_head_apart:
        return "flat"
    share = recipe.max_grad_norm / math.sqrt(2)
    return PerGroup({"": share, HEAD: share})


def schedule(optimizer: AdamW, recipe: Recipe) -> LambdaLR:
    """Linear increase over `warmup` steps, then linear decrease to 0 at the last step."""

    def factor(step: int) -> float:
        return min((step + 1) / max(1, recipe.warmup), 1 - step / recipe.steps)

    return LambdaLR(optimizer, factor)
