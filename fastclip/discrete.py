"""The discrete Gaussian mechanism: noise on a grid, with a proof that covers the arithmetic.

Continuous Gaussian noise lies on the grid of the floating-point numbers, which depends on the sum it is added to: good
approximations leak little, but no proof speaks of them. Here the clipped sum is rounded to a grid that depends on nothing
private, and integers are added that are distributed exactly as N_Z(0, sigma^2).

Claim. Let S be the sum of a logical batch as computed from each unit's rows (a, g), and D the number of trainable elements.
That these rows have the same bits whatever other units run beside them is assumed (docs/sensitivity.md); given that, adding
or removing one unit changes the rounded sum, in L2, by at most

    sensitivity = C (1 + ROUNDING_SLACK) + grid sqrt(D)

- C (1 + NORM_SLACK) is what a unit contributes in exact arithmetic (docs/sensitivity.md);
- SUM_SLACK C pays for the summation of both neighbours: sums are formed in fp64, each off by at most
  ``(terms + 3) 2^-53 sqrt(K) SPREAD units C`` for K clipping groups, because a unit's factor also keeps
  ``c_u sum_t |a_t||g_t|`` within SPREAD times its bound; a batch for which that exceeds `ERROR` C is refused;
- grid sqrt(D): each coordinate of either neighbour moves by at most half the grid.

So one release without subsampling is ``1 / (2 noise_multiplier^2)``-zCDP (Canonne, Kamath and Steinke, "The discrete Gaussian
for differential privacy", NeurIPS 2020, theorem 14 for vectors). What follows from it, by accountants for the continuous
Gaussian under Poisson sampling, is not part of the claim: on a grid as fine as this one the two differ by less than any
accountant resolves.
"""

from __future__ import annotations

import importlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastclip.ops import Draw
from fastclip.tape import ROUNDING_SLACK, SUM_SLACK

SPREAD = 2.0**12
ERROR = SUM_SLACK / 2 - 2.0**-15  # of C; the rest pays for 1 / (1 - NORM_SLACK) - 1 - NORM_SLACK
_INFLATION = 1e-3
_MOST_SIGMA = 2**31
_CHUNK = 2**16  # elements a thread takes at a time


@dataclass(frozen=True)
class DiscreteGaussian:
    """What is claimed of one release. grid: a power of two; sigma: in grid points; sensitivity: what it is scaled to.

    inflation: how much more noise there is, relatively, than the continuous Gaussian would have for ``max_grad_norm`` alone.
    """

    noise_multiplier: float
    max_grad_norm: float
    num_elements: int
    grid: float
    sensitivity: float
    sigma: int

    @property
    def std(self) -> float:
        """Standard deviation on each coordinate of the sum."""
        return self.sigma * self.grid

    @property
    def inflation(self) -> float:
        return self.std / (self.noise_multiplier * self.max_grad_norm) - 1

    def __str__(self) -> str:
        return (
            f"discrete Gaussian of {self.sigma} grid points of {self.grid:.3g} on the clipped sum of {self.num_elements} "
            f"elements: sensitivity {self.sensitivity:.6g} for max_grad_norm {self.max_grad_norm:g}, "
            f"{100 * self.inflation:.3g} % more noise than C alone would ask for; without sampling each release is "
            f"{1 / (2 * self.noise_multiplier**2):.4g}-zCDP, rounding and summation of the clipped gradients included, "
            "given that a unit's own forward and backward do not depend on the units beside it"
        )


def discrete_gaussian(noise_multiplier: float, max_grad_norm: float, num_elements: int) -> DiscreteGaussian:
    """The mechanism for these.

    Raises ValueError where there is no noise, or more than 2^31 grid points of it; RuntimeError where it is not compiled.
    """
    _host()
    if not noise_multiplier > 0:
        raise ValueError(f"noise_multiplier={noise_multiplier!r}: secure=True claims something only with noise above 0")
    root = math.sqrt(max(num_elements, 1))
    grid = 2.0 ** math.floor(math.log2(_INFLATION * max_grad_norm / root))
    sensitivity = max_grad_norm * (1 + ROUNDING_SLACK) + grid * root
    sigma = math.ceil(noise_multiplier * sensitivity / grid)
    if sigma > _MOST_SIGMA:
        raise ValueError(
            f"noise_multiplier={noise_multiplier!r} on {num_elements} elements takes {sigma} grid points, and secure=True "
            f"goes to 2^31: train fewer parameters or use less noise"
        )
    return DiscreteGaussian(noise_multiplier, max_grad_norm, num_elements, grid, sensitivity, sigma)


def check_summation(claim: DiscreteGaussian, *, terms: int, units: int, groups: int) -> None:
    """Raises RuntimeError if the sum of so many terms and units may be off by more than the claim allows."""
    error = (terms + 3) * 2.0**-53 * math.sqrt(groups) * SPREAD * units
    if error > ERROR:
        raise RuntimeError(
            f"secure=True: a logical batch of {units} units and {terms} rows is too large for its claim, which pays for "
            f"{ERROR:.2g} C of rounding where up to {error:.2g} C is possible: use a smaller expected_batch_size or shorter "
            "sequences"
        )


def draw_integers(out: Tensor, sigma: int, draw: Draw) -> Tensor:
    """Fills ``out``, int64 ``[n]`` on CPU, with N_Z(0, sigma^2) from element ``draw.offset`` of its stream on; returns it.

    Exact: the sampler works in integers. What an element gets depends on its place alone. draw's std and scale are not used.
    Raises RuntimeError where the host module is not compiled, ValueError for sigma outside [1, 2^31] or elements beyond 2^48.
    """
    host = _host()
    values, threads = out.numpy(), torch.get_num_threads()
    firsts = range(0, len(values), _CHUNK)

    def fill(first: int) -> None:
        secret = draw.key.tensor().numpy().tobytes()
        host.discrete_gaussian(values[first : first + _CHUNK], sigma, secret, draw.nonce, draw.offset + first)

    if threads == 1 or len(firsts) < 2:
        for first in firsts:
            fill(first)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, firsts))  # waits, and raises what a thread raised
    return out


def _host() -> Any:
    try:
        return importlib.import_module("fastclip._host")
    except ImportError as error:
        raise RuntimeError(
            f"the discrete Gaussian is compiled code that is not there ({error}): reinstall with a C++20 compiler and "
            "--no-build-isolation"
        ) from None
