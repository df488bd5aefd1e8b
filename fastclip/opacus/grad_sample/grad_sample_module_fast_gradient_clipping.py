"""`opacus.grad_sample.grad_sample_module_fast_gradient_clipping`: ghost clipping in one backward, on fastclip's engine.

``max_grad_norm`` is known here, so that clipping is done at the end of `backward()`: ``p.grad`` grows by the sum of clipped
gradients, ``p._norm_sample``, ``[B]``, are the norms before clipping. It does not matter whether the backward is that of a
criterion of `PrivacyEngine`, of the mean (or sum) of the losses, or of a loss that the model returns.

Where this differs from Opacus: one backward instead of two; every layer's norm is found without its per-example gradient where
fastclip knows how; tied weights and modules called several times; several backwards add up; parameters frozen or unfrozen
later; one C for the model and its optimizer.
"""

from __future__ import annotations

from typing import Any

import opacus.grad_sample.grad_sample_module_fast_gradient_clipping as theirs
import torch
from torch import Tensor, nn

from fastclip.opacus._mirror import delegate
from fastclip.opacus.grad_sample._tape import GhostTape
from fastclip.opacus.grad_sample.grad_sample_module import GradSampleHooks, Wrapper


class GradSampleHooksFastGradientClipping(GradSampleHooks, theirs.GradSampleHooksFastGradientClipping):
    """Ghost clipping of a model that is not wrapped. Arguments and errors as :class:`GradSampleHooks`, and:

    max_grad_norm: C > 0. ``use_ghost_clipping`` changes nothing here: norms are found the same way.
    """

    _tape: GhostTape

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
        max_grad_norm: float = 1,
        use_ghost_clipping: bool = True,
    ) -> None:
        self._begin(m, batch_first, loss_reduction, strict, force_functorch)
        self.use_ghost_clipping = use_ghost_clipping
        self._per_sample_gradient_norms: Tensor | None = None
        self._attach(GhostTape(m, self, 0 if batch_first else 1, max_grad_norm, strict))

    @property
    def max_grad_norm(self) -> float:
        """C. Setting it is refused while a clipped sum waits for its release."""
        return self._tape.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._tape.max_grad_norm = value

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self._module.parameters() if p.requires_grad]

    def arguments(self) -> dict[str, Any]:
        return {
            **super().arguments(),
            "max_grad_norm": self.max_grad_norm,
            "use_ghost_clipping": self.use_ghost_clipping,
        }

    @property
    def last_examples(self) -> int:
        """How many examples the model's last forward had."""
        return self._tape.last_examples

    def get_norm_sample(self) -> Tensor:
        """``[B]``: norms of the examples' gradients before clipping, of the last backward. A look at private data."""
        norms = [p.__dict__["_norm_sample"] for p in self.trainable_parameters if "_norm_sample" in p.__dict__]
        if not norms:
            raise AttributeError("no norms yet: call forward and backward on the model first")
        total = torch.stack([norm.to(norms[0].device) for norm in norms]).norm(2, dim=0)
        self.per_sample_gradient_norms = total
        return total

    def get_clipping_coef(self) -> Tensor:
        """``[B]``: by what examples' gradients were multiplied, 0 where one was not finite. A look at private data."""
        norms = self.get_norm_sample()
        return torch.where(norms.isfinite(), (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0), 0.0)


class GradSampleModuleFastGradientClipping(
    Wrapper, GradSampleHooksFastGradientClipping, theirs.GradSampleModuleFastGradientClipping
):
    """Wraps a model; arguments as :class:`GradSampleHooksFastGradientClipping`."""

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
        max_grad_norm: float = 1,
        use_ghost_clipping: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        GradSampleHooksFastGradientClipping.__init__(
            self,
            m,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            strict=strict,
            force_functorch=force_functorch,
            max_grad_norm=max_grad_norm,
            use_ghost_clipping=use_ghost_clipping,
        )
        self.grad_accumulation_hook = None


__getattr__, __dir__ = delegate(__name__)
