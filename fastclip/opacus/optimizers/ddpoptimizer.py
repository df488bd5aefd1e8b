"""`opacus.optimizers.ddpoptimizer`: noise on rank 0, gradients summed over ranks."""

from __future__ import annotations

from typing import Any

import opacus.optimizers.ddpoptimizer as theirs
import torch.distributed as dist
from torch.optim import Optimizer

from fastclip.opacus._mirror import delegate
from fastclip.opacus.optimizers._ranks import OverRanks
from fastclip.opacus.optimizers.optimizer import DPOptimizer


class DistributedDPOptimizer(OverRanks, DPOptimizer, theirs.DistributedDPOptimizer):
    """Arguments as :class:`DPOptimizer`; needs an initialised process group."""

    def __init__(self, optimizer: Optimizer, **kwargs: Any) -> None:
        DPOptimizer.__init__(self, optimizer, **kwargs)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()


__getattr__, __dir__ = delegate(__name__)
