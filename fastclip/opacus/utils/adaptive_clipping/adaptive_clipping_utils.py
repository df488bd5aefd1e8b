"""`opacus.utils.adaptive_clipping.adaptive_clipping_utils`: ghost clipping whose C follows a quantile of the norms.

As :class:`AdaClipDPOptimizer` does for per-example gradients (Andrew et al. 2021). A logical batch is clipped to the C that it
began with; what its backwards counted, with noise, moves C at its release.
"""

from __future__ import annotations

from typing import Any

import opacus.utils.adaptive_clipping.adaptive_clipping_utils as theirs
from torch import Tensor, nn

from fastclip.opacus._mirror import delegate
from fastclip.opacus.optimizers._adaptive import AdaptiveNorm, Quantile
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
        optimizer = self.optimizer
        if optimizer.adaptive is None:
            quantile = Quantile(
                self.target_unclipped_quantile, self.clipbound_learning_rate, self.min_clipbound, self.max_clipbound
            )
            optimizer.adaptive = AdaptiveNorm(quantile)
        optimizer.adaptive.sum_multiplier(
            optimizer.noise_multiplier, optimizer.expected_batch_size
        )  # refuses what does not fit
        DPTensorFastGradientClipping.backward(self)
        optimizer.adaptive.unclipped += int((self.module.get_norm_sample() <= self.module.max_grad_norm).sum())


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
