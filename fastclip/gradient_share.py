"""r, the share of the squared gradient norm that the examples of one user have in common.

With g_uj the gradient of user u's example j,

    r = E <g_uj, g_uk> / E |g_uj|^2,    j != k,

so that the mean of G gradients of one user has an expected squared norm of r + (1 - r) / G times an example's. What
all users have in common counts too. For n examples, (|sum_j g_j|^2 - sum_j |g_j|^2) / (n (n - 1)), the mean inner
product of all pairs, is an unbiased estimate of the numerator, and the mean of |g_j|^2 of the denominator; |mean_j g_j|^2
would not be, it is too large by a n-th of the rest. Users count alike, as ULS draws them. The ratio of the two means
over users has a bias of order 1 / users, of which the jackknife takes the first order away; it also gives the standard
error (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 10 and 11).

Gradients of private examples are private. Nothing here adds noise: measure on a public sample.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from fastclip.module import clipper_of
from fastclip.recomputation import differentiable
from fastclip.trial_modes import NoDropout


@dataclass(frozen=True)
class GradientShare:
    """value: the estimate of r, which may lie a little outside [0, 1]. standard_error: of it, over the choice of users.
    users, examples: how many it rests on."""

    value: float
    standard_error: float
    users: int
    examples: int

    @property
    def share(self) -> float:
        """The estimate within [0, 1]."""
        return min(max(self.value, 0.0), 1.0)


def shared_gradient_share(gradients_per_user: Iterable[Any]) -> GradientShare:
    """r from per-example gradients; the module's formula.

    gradients_per_user: for each user an array or tensor `[n_u, D]` of gradients, or of random projections of them that
    keep inner products on average. Users with one example have no pair and are passed over. Raises ValueError for
    fewer than two users with pairs, for another shape, for what is not finite, and for gradients that are all 0.
    """
    moments = []
    for number, given in enumerate(gradients_per_user):
        whole = given.detach() if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given, dtype=np.float64))
        gradients = whole.to("cpu", torch.float64)
        if gradients.dim() != 2:
            raise ValueError(f"gradients_per_user[{number}] has the shape {list(gradients.shape)}; give [examples, D]")
        if len(gradients) > 1:
            moments.append((len(gradients), float(gradients.sum(0).square().sum()), float(gradients.square().sum())))
    return _estimate(moments)


def measure(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    dataset: Any,
    user_ids: Sequence[Hashable],
    *,
    users: int = 300,
    examples_per_user: int = 8,
    collate: Callable[[list[Any]], Any] = default_collate,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> GradientShare:
    """r of a model's trained parameters, on a PUBLIC sample; the module's formula, with whole gradients.

    loss_fn: `loss_fn(model, batch)` answers with one loss per example, `[B]`. dataset: `dataset[i]` is one example;
    user_ids: whose, one for each, in order. users, examples_per_user: how many to take, chosen by `seed` among users with
    two examples or more. collate: makes a batch of a list of one example, on the model's device. progress: called with
    users done and users in all.

    One backward an example. Memory beside the model's: two gradients, because one user's sum and its squared norms
    are all that the estimate needs. `p.grad` and the training mode stay as they are; dropout is off.

    r is that of the weights as they are: measure where training starts. Raises ValueError for bad input.
    """
    if len(user_ids) == 0 or (hasattr(dataset, "__len__") and len(dataset) != len(user_ids)):
        raise ValueError(f"user_ids has {len(user_ids)} entries; give one for each example of the data set")
    if users < 2 or examples_per_user < 2:
        raise ValueError(f"users={users!r}, examples_per_user={examples_per_user!r}: at least 2 of each are needed")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model has no parameter that requires a gradient; unfreeze what is to be trained")
    owned: dict[Hashable, list[int]] = {}
    for i, user in enumerate(user_ids):
        owned.setdefault(user, []).append(i)
    several = [indices for indices in owned.values() if len(indices) > 1]
    rng = np.random.default_rng(seed)
    chosen = [several[i] for i in rng.permutation(len(several))[:users]]

    moments = []
    clipper = clipper_of(model)
    with clipper.suspended() if clipper is not None else nullcontext(), NoDropout(), differentiable():
        for done, indices in enumerate(chosen, 1):
            taken = rng.permutation(len(indices))[:examples_per_user]
            batches = (collate([dataset[indices[i]]]) for i in taken)
            moments.append((len(taken), *_moments(model, loss_fn, batches, params)))
            if progress is not None:
                progress(done, len(chosen))
    return _estimate(moments)


def _moments(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any], params: list[nn.Parameter]
) -> tuple[float, float]:
    """|sum of the gradients|^2 and the sum of their |.|^2, over batches of one example."""
    total = [torch.zeros_like(p) for p in params]
    squares = 0.0
    for batch in batches:
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("loss_fn must return one loss per example: one number for a batch of one")
        gradient = torch.autograd.grad(loss.sum(), params, allow_unused=True)
        for whole, part in zip(total, gradient, strict=True):
            if part is not None:
                whole += part
        squares += _squared_norm([part for part in gradient if part is not None])
    return _squared_norm(total), squares


def _squared_norm(tensors: Iterable[Tensor]) -> float:
    # The pairs' inner products are what is left of a difference: fp64.
    return float(sum(torch.linalg.vector_norm(x, dtype=torch.float64).square() for x in tensors))


def _estimate(moments: Sequence[tuple[int, float, float]]) -> GradientShare:
    """The jackknifed ratio from, for each user, n, |sum|^2 and sum of |.|^2."""
    if len(moments) < 2:
        raise ValueError(
            f"{len(moments)} users have two examples or more; a shared part shows with at least two such users"
        )
    n, of_sum, sum_of = np.array(moments, dtype=np.float64).T
    if not np.all(np.isfinite(of_sum)) or not np.all(np.isfinite(sum_of)):
        raise ValueError("a gradient is not finite; look for losses that are inf or NaN")
    if not sum_of.any():
        raise ValueError("all gradients are 0; nothing is trained on these examples")
    shared, squared = (of_sum - sum_of) / (n * (n - 1)), sum_of / n  # [users] each
    whole = shared.sum() / squared.sum()
    count = len(n)
    rest = squared.sum() - squared
    # Where one user has all the gradient there is nothing to leave out.
    without = np.divide(shared.sum() - shared, rest, out=np.full(count, whole), where=rest > 0)
    value = count * whole - (count - 1) * without.mean()
    error = np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    return GradientShare(float(value), float(error), count, int(n.sum()))
