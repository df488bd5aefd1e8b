"""`opacus.optimizers.perlayeroptimizer`: a clipping norm for every parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import opacus.optimizers.perlayeroptimizer as theirs
from torch import Tensor
from torch.optim import Optimizer

from fastclip.clipping import Layer, check_norm
from fastclip.opacus._mirror import delegate
from fastclip.opacus.grad_sample._tape import clip_together
from fastclip.opacus.optimizers.optimizer import DPOptimizer
from fastclip.tape import Measure, Outcome


class PerParameter:
    """``min(1, C_k / |g_k|)`` for each parameter k; the whole stays within the root of the sum of squares."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = list(bounds)
        self.max_grad_norm = math.hypot(*self.bounds)

    def groups(self, layers: Sequence[Layer]) -> list[int]:
        return list(range(len(layers)))

    def factors(self, norms: Tensor) -> Tensor:
        return (norms.new_tensor(self.bounds)[:, None] / norms).clamp_(max=1.0)  # [K, B]


class DPPerLayerOptimizer(DPOptimizer, theirs.DPPerLayerOptimizer):
    """Arguments as :class:`DPOptimizer`, but ``max_grad_norm`` is a list with one C for each trainable parameter.

    ``max_grad_norms`` is that list; ``max_grad_norm`` the root of the sum of their squares, to which noise belongs. Setting it
    scales the list. Raises ValueError if the list does not fit.
    """

    def __init__(self, optimizer: Optimizer, *, max_grad_norm: Sequence[float], **kwargs: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not isinstance(max_grad_norm, Sequence) or len(max_grad_norm) != len(trained):
            raise ValueError(
                f"max_grad_norm must be a list with one bound for each of the {len(trained)} trainable parameters, got "
                f"{max_grad_norm!r}"
            )
        self._bounds = tuple(check_norm(f"max_grad_norm[{i}]", c) for i, c in enumerate(max_grad_norm))
        DPOptimizer.__init__(self, optimizer, max_grad_norm=math.hypot(*self._bounds), **kwargs)

    @property
    def max_grad_norms(self) -> tuple[float, ...]:
        """C of each trainable parameter. Setting them sets the noise too."""
        return self._bounds

    @max_grad_norms.setter
    def max_grad_norms(self, values: Sequence[float]) -> None:
        bounds = tuple(check_norm(f"max_grad_norms[{i}]", c) for i, c in enumerate(values))
        if len(bounds) != len(self._bounds):
            raise ValueError(f"max_grad_norms must have {len(self._bounds)} bounds, got {len(bounds)}")
        super()._set_max_grad_norm(math.hypot(*bounds))
        self._bounds = bounds

    def _set_max_grad_norm(self, value: float) -> None:
        before = self._max_grad_norm
        super()._set_max_grad_norm(value)
        self._bounds = tuple(c * self._max_grad_norm / before for c in self._bounds)

    def clip_factors(self, measures: Sequence[Measure], params: Sequence[Tensor]) -> tuple[Outcome, Sequence[int]]:
        bounds = dict(zip(self.params, self.max_grad_norms, strict=True))
        rows = list(range(len(params)))
        return clip_together(measures, PerParameter([bounds[p] for p in params]), rows), rows


__getattr__, __dir__ = delegate(__name__)
