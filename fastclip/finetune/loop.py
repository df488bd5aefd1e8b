"""The training loop: with privacy it is the loop without it, and a few lines more.

One sampler draw is cut into physical batches of equal padded length, each goes forward and backward once, their
gradients add up, and one optimizer step releases the sum. The same function runs both kinds, so that `--compare`
compares nothing but the privacy.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip import Clipper
from fastclip.finetune.presets import Recipe
from fastclip.finetune.task import Task
from fastclip.sampling import PoissonSampler, UserPoissonSampler, physical_batches

Sampler = PoissonSampler | UserPoissonSampler


@dataclass
class History:
    """What the loop saw. All but the number of steps depends on the training data and is not for publication.

    losses: mean training loss of each step (nan for an empty draw). unit_norms: fp32 `[U]` of each backward, before
    clipping. nonfinite: units whose gradient was inf or NaN and counted as 0. examples: forward and backward passes
    over one example.
    """

    steps: int = 0
    examples: int = 0
    seconds: float = 0.0
    nonfinite: int = 0
    losses: list[float] = field(default_factory=list)
    unit_norms: list[Tensor] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Examples a second."""
        return self.examples / max(self.seconds, 1e-9)

    def cost(self, peak_memory: int) -> dict[str, float]:
        return {"seconds": self.seconds, "examples_per_second": self.rate, "peak_memory_bytes": peak_memory}


def cut(task: Task, draw: Sequence[int], units: Sequence[int]) -> Sequence[list[int]]:
    """The physical batches of one draw, given each example's unit. Units stay whole, and a batch has one padded
    length."""
    sizes = [task.padded(len(task.train.tokens[i])) for i in draw]
    return physical_batches(draw, sizes, max_tokens=task.physical_tokens, units=units)


def make_sampler(task: Task, recipe: Recipe, steps: int) -> Sampler:
    """Poisson draws of examples, or of users where the recipe protects users."""
    if recipe.unit == "example":
        return PoissonSampler(task.num_units, steps=steps, expected_batch_size=recipe.batch_size, seed=recipe.seed)
    return UserPoissonSampler(
        task.train.users or [],
        steps=steps,
        expected_batch_size=recipe.batch_size,
        examples_per_user=recipe.examples_per_user,
        seed=recipe.seed,
    )


def average_of(task: Task, recipe: Recipe) -> Average | None:
    trained = [p for p in task.model.parameters() if p.requires_grad]
    return Average(trained, recipe.averaging) if recipe.averaging else None


def run(
    task: Task,
    sampler: Sampler,
    optimizer: Optimizer,
    *,
    clipper: Clipper | None = None,
    after_step: Callable[[History], bool],
) -> History:
    """Takes one step for each of the sampler's draws until they end or `after_step` returns False.

    With a `clipper` the mean of a physical batch's losses goes to backward, and the optimizer divides the noisy sum
    by the expected batch size; without one the draw's sum is divided by it here. A user with several examples counts by
    their mean in both.
    """
    history = History()
    started = time.perf_counter()
    for draw in sampler:
        owners = sampler.unit_of(draw).tolist() if isinstance(sampler, UserPoissonSampler) else draw
        unit_of, share = dict(zip(draw, owners, strict=True)), Counter(owners)
        total = 0.0
        for part in cut(task, draw, owners):
            batch = task.batch(task.train, part)
            if clipper is None:
                losses = task.losses(task.model, batch)
                weights = losses.new_tensor([1 / share[unit_of[i]] for i in part])
                (losses @ weights / sampler.expected_batch_size).backward()
            else:
                with clipper.units(ids=[unit_of[i] for i in part], reduction="mean"):
                    losses = task.losses(task.model, batch)
                    losses.mean().backward()
                history.unit_norms.append(clipper.unit_norms.detach().float().cpu())
                history.nonfinite += clipper.nonfinite_units
            total += float(losses.detach().sum())
        optimizer.step()
        optimizer.zero_grad()
        history.steps += 1
        history.examples += len(draw)
        history.losses.append(total / len(draw) if draw else math.nan)
        history.seconds = time.perf_counter() - started
        if not after_step(history):
            break
    return history


class Average:
    """An exponential average of the trained parameters: it follows what was released, so it costs no privacy, and it
    is less noisy.

    Early on the past has little weight: with n steps seen, at most n / (n + 9).
    """

    def __init__(self, parameters: Sequence[Tensor], weight: float) -> None:
        self.parameters = list(parameters)
        self.weight = weight
        self.steps = 0
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        past = min(self.weight, self.steps / (self.steps + 9))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - past)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the average and the parameters."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            parameter_before = parameter.clone()
            parameter.copy_(value)
            value.copy_(parameter_before)
