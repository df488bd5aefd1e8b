"""`opacus.utils.adaptive_clipping.adaptive_clipping_utils`: ghost clipping whose C follows a quantile of the norms.

As :class:`AdaClipDPOptimizer` does for per-example gradients (Andrew et al. 2021). A logical batch is clipped to the C that it
began with; what its backwards counted, with noise, moves C at the first backward of the next. The count's noise and the
fraction are of the expected batch size, which is public.
"""

from __future__ import annotations

import math
from typing import Any

import opacus.utils.adaptive_clipping.adaptive_clipping_utils as theirs
import torch
from torch import Tensor, nn

from fastclip.noise import Purpose
from fastclip.opacus._mirror import delegate
from fastclip.opacus.privacy_engine import PrivacyEngine
from fastclip.opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping, DPTensorFastGradientClipping


class DPTensorFastGradientAdaptiveClipping(DPTensorFastGradientClipping, theirs.DPTensorFastGradientAdaptiveClipping):
    """Losses of a batch whose backward also counts who stayed within C. Arguments as Opacus'.

    Raises AssertionError where the noise of the count would leave none for the sum: the expected batch size must be above
    10 * noise_multiplier.
    """

    def _like(self, losses: Tensor) -> DPTensorFastGradientAdaptiveClipping:
        return type(self)(
            self.module,
            self.optimizer,
            losses,
            self.loss_reduction,
            self.target_unclipped_quantile,
            self.min_clipbound,
            self.max_clipbound,
            self.clipbound_learning_rate,
            self.initial_noise_multiplier,
        )

    def backward(self) -> None:
        optimizer, expected = self.optimizer, self.optimizer.expected_batch_size
        sigma = self.initial_noise_multiplier
        assert expected is not None and expected > 10 * sigma, (
            f"Batch size is too small. For adaptive clipping the expected batch size must be above 10 * noise_multiplier = "
            f"{10 * sigma}, got {expected}"
        )
        std = expected / 20  # as Andrew et al. 2021, section 3.2
        optimizer._adjusted_noise_multiplier = (sigma**-2 - (2 * std) ** -2) ** -0.5 if sigma else 0.0
        state = optimizer.__dict__.setdefault("_adaptive", {"unclipped": 0, "counted": False})
        if state["counted"] and not optimizer._sum_waits():
            self._move(state["unclipped"], std, expected)
            state.update(unclipped=0, counted=False)
        DPTensorFastGradientClipping.backward(self)
        state["unclipped"] += int((self.module.get_norm_sample() <= self.module.max_grad_norm).sum())
        state["counted"] = True

    def _move(self, unclipped: int, std: float, expected: float) -> None:
        count = torch.tensor([unclipped - expected / 2], dtype=torch.float32)
        self.optimizer._noise.of_release().add_(count, std, offset=0, purpose=Purpose.QUANTILE)
        fraction = min(max(float(count) / expected + 0.5, 0.0), 1.0)
        step = math.exp(-self.clipbound_learning_rate * (fraction - self.target_unclipped_quantile))
        self.optimizer.max_grad_norm = min(
            max(self.optimizer.max_grad_norm * step, self.min_clipbound), self.max_clipbound
        )


class DPLossFastGradientAdaptiveClipping(DPLossFastGradientClipping, theirs.DPLossFastGradientAdaptiveClipping):
    """A criterion that answers with :class:`DPTensorFastGradientAdaptiveClipping`. Arguments as Opacus'."""

    def __call__(self, *args: Any, **kwargs: Any) -> DPTensorFastGradientAdaptiveClipping:
        losses = DPLossFastGradientClipping.__call__(self, *args, **kwargs).loss_per_sample
        return DPTensorFastGradientAdaptiveClipping(
            self.module,
            self.optimizer,
            losses,
            self.loss_reduction,
            self.target_unclipped_quantile,
            self.min_clipbound,
            self.max_clipbound,
            self.clipbound_learning_rate,
            self.initial_noise_multiplier,
        )


class PrivacyEngineAdaptiveClipping(PrivacyEngine, theirs.PrivacyEngineAdaptiveClipping):
    """:class:`PrivacyEngine` for ``grad_sample_mode="ghost"`` with a C that adapts. Arguments as Opacus'."""

    def _prepare_criterion(
        self,
        *,
        module: Any,
        optimizer: Any,
        criterion: Any = None,
        loss_reduction: str = "mean",
        target_unclipped_quantile: float = 0.5,
        min_clipbound: float = 1,
        max_clipbound: float = 1e8,
        clipbound_learning_rate: float = 0.2,
        **kwargs: Any,
    ) -> DPLossFastGradientAdaptiveClipping:
        return DPLossFastGradientAdaptiveClipping(
            module,
            optimizer,
            nn.CrossEntropyLoss() if criterion is None else criterion,
            loss_reduction=loss_reduction,
            target_unclipped_quantile=target_unclipped_quantile,
            min_clipbound=min_clipbound,
            max_clipbound=max_clipbound,
            clipbound_learning_rate=clipbound_learning_rate,
            initial_noise_multiplier=optimizer.noise_multiplier,
        )


__getattr__, __dir__ = delegate(__name__)
