"""`opacus.optimizers.ddp_perlayeroptimizer`: a clipping norm for every parameter, over several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import opacus.optimizers.ddp_perlayeroptimizer as theirs
from torch.optim import Optimizer

from fastclip.opacus._mirror import delegate
from fastclip.opacus.optimizers.ddpoptimizer import DistributedDPOptimizer
from fastclip.opacus.optimizers.perlayeroptimizer import DPPerLayerOptimizer


class SimpleDistributedPerLayerOptimizer(
    DPPerLayerOptimizer, DistributedDPOptimizer, theirs.SimpleDistributedPerLayerOptimizer
):
    """Arguments as :class:`DPPerLayerOptimizer`; needs an initialised process group."""

    def __init__(self, optimizer: Optimizer, *, max_grad_norm: Sequence[float], **kwargs: Any) -> None:
        import torch.distributed as dist

        DPPerLayerOptimizer.__init__(self, optimizer, max_grad_norm=max_grad_norm, **kwargs)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()


__getattr__, __dir__ = delegate(__name__)
