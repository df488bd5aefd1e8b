"""`opacus.optimizers` on fastclip: clipping without per-example gradients, noise and update in one pass."""

from fastclip.opacus._mirror import delegate, rebound
from fastclip.opacus.optimizers.adaclipoptimizer import AdaClipDPOptimizer
from fastclip.opacus.optimizers.ddp_perlayeroptimizer import SimpleDistributedPerLayerOptimizer
from fastclip.opacus.optimizers.ddpoptimizer import DistributedDPOptimizer
from fastclip.opacus.optimizers.ddpoptimizer_fast_gradient_clipping import DistributedDPOptimizerFastGradientClipping
from fastclip.opacus.optimizers.optimizer import DPOptimizer
from fastclip.opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from fastclip.opacus.optimizers.perlayeroptimizer import DPPerLayerOptimizer

globals().update(
    rebound(
        __name__,
        AdaClipDPOptimizer=AdaClipDPOptimizer,
        DPOptimizer=DPOptimizer,
        DPOptimizerFastGradientClipping=DPOptimizerFastGradientClipping,
        DPPerLayerOptimizer=DPPerLayerOptimizer,
        DistributedDPOptimizer=DistributedDPOptimizer,
        DistributedDPOptimizerFastGradientClipping=DistributedDPOptimizerFastGradientClipping,
        SimpleDistributedPerLayerOptimizer=SimpleDistributedPerLayerOptimizer,
    )
)

__getattr__, __dir__ = delegate(__name__)
