"""`opacus.optimizers.ddpoptimizer_fast_gradient_clipping`: the same for ghost clipping."""

from __future__ import annotations

from typing import Any

import opacus.optimizers.ddpoptimizer_fast_gradient_clipping as theirs
import torch.distributed as dist
from torch.optim import Optimizer

from fastclip.opacus._mirror import delegate
from fastclip.opacus.optimizers._ranks import OverRanks
from fastclip.opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping


class DistributedDPOptimizerFastGradientClipping(
    OverRanks, DPOptimizerFastGradientClipping, theirs.DistributedDPOptimizerFastGradientClipping
):
    """Arguments as :class:`DPOptimizerFastGradientClipping`; needs an initialised process group."""

    def __init__(self, optimizer: Optimizer, **kwargs: Any) -> None:
        DPOptimizerFastGradientClipping.__init__(self, optimizer, **kwargs)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()


__getattr__, __dir__ = delegate(__name__)
