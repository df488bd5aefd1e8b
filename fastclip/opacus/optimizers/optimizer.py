"""`opacus.optimizers.optimizer`: DPOptimizer, which clips, sums, adds noise and steps, on what fastclip's tape kept.

Guarantees of a release: noise of standard deviation ``noise_multiplier * max_grad_norm`` (and fastclip's ROUNDING_SLACK of it
more) on the sum of clipped gradients, in every coordinate of every trainable parameter that the optimizer holds; sum and noise
meet in fp64 and are rounded once; an example that is not finite adds nothing and is nobody else's trouble; a gradient is used
once. ``max_grad_norm`` is one number for clipping and for noise, and fixed while a sum waits.

After ``step()`` ``p.summed_grad`` is ``p.grad``, the released gradient: the clean sum is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import opacus.optimizers.optimizer as theirs
import torch
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor
from torch.optim import Optimizer

from fastclip import fused, ops
from fastclip.clipping import ClippingRule, Flat, check_norm
from fastclip.layers.site import no_autocast
from fastclip.noise import NoiseSource, check_noise_multiplier
from fastclip.opacus._mirror import delegate
from fastclip.opacus.grad_sample._parameter import samples_of, tape_of
from fastclip.opacus.grad_sample._tape import Batch, SampleTape, clip_together
from fastclip.opacus.optimizers._noise import OptimizerNoise
from fastclip.precision import full_precision
from fastclip.reference import accumulation_dtype
from fastclip.tape import ROUNDING_SLACK, Measure, Outcome, PerUnit, measure

Samples = dict[Tensor, Batch | Tensor]  # what one backward left of each parameter


class DPOptimizer(theirs.DPOptimizer):
    """Wraps a first-order optimizer over the parameters of a GradSampleModule. Arguments and attributes as Opacus'.

    noise_multiplier: sigma >= 0. max_grad_norm: C > 0. expected_batch_size: examples per step, a public number; needed for
    loss_reduction="mean". generator: noise that follows it, which is not private; secure_mode: noise from the operating
    system whatever torch's seed.

    Raises ValueError for arguments that do not fit, and in ``step()`` for gradients that were not computed or are used again.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float | None,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        self._noise_multiplier = 0.0
        self._max_grad_norm = check_norm("max_grad_norm", max_grad_norm)
        theirs.DPOptimizer.__init__(  # by name: next in a subclass's order is Opacus' class of the same kind
            self,
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            generator=generator,
            secure_mode=secure_mode,
            **kwargs,
        )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer evaluates the loss several times a step (LBFGS): one step must be one release")
        if expected_batch_size is not None and not expected_batch_size > 0:
            raise ValueError(f"expected_batch_size must be positive, got {expected_batch_size!r}")
        self._noise = OptimizerNoise(generator, secure_mode)
        self._releasing = False
        self.accounting_hook: Callable[..., Any] | None = None  # a step hook that looks at no gradient
        self._guard_wrapped()
        Optimizer.__setstate__(self, {})  # hooks and the profiler's step

    # Makes GradScaler leave its scale here instead of unscaling gradients, so that step() can refuse it.
    _step_supports_amp_scaling = True

    def _guard_wrapped(self) -> None:
        """The wrapped optimizer's own step would use gradients without noise; only its last wrapper may call it."""
        old = self.original_optimizer.__dict__.pop("_dp_guard", None)
        if old is not None:
            old.remove()
        self.original_optimizer._dp_guard = self.original_optimizer.register_step_pre_hook(self._only_from_here)

    def _only_from_here(self, *args: Any) -> None:
        if not self._releasing and any(tape_of(p) is not None for p in self.params):
            raise RuntimeError(
                "the wrapped optimizer's own step() would use gradients without noise: call the wrapper's"
            )

    @property
    def noise_multiplier(self) -> float:
        return self._noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self._noise_multiplier = check_noise_multiplier(value)

    @property
    def max_grad_norm(self) -> float:
        """C, for clipping and for noise. Setting it is refused while a clipped sum waits for its release."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._set_max_grad_norm(value)

    def _set_max_grad_norm(self, value: float) -> None:
        value = check_norm("max_grad_norm", float(value))
        if value != self._max_grad_norm and self._sum_waits():
            raise ValueError(
                f"max_grad_norm cannot become {value} within a logical batch that was clipped to {self._max_grad_norm}: set it "
                "after step()"
            )
        self._max_grad_norm = value

    def _held(self) -> Iterator[Any]:
        """Parameters of all groups, frozen ones too."""
        return (p for group in self.param_groups for p in group["params"])

    def _drop_sum(self) -> None:
        """Forget what was added up of a logical batch, and what was counted beside it."""
        for p in self._held():
            p.summed_grad = None

    def _sum_waits(self) -> bool:
        sums = (sum_of(p) for p in self._held())
        return any(total is not None and not hasattr(total, "_processed") for total in sums)

    # What backwards left

    def _get_flat_grad_sample(self, p: Any) -> Tensor:
        if tape_of(p) is None and not hasattr(p, "grad_sample"):
            raise ValueError("Per sample gradient not found. Are you using GradSampleModule?")
        if p.grad_sample is None:
            raise ValueError("Per sample gradient is not initialized. Not updated in backward pass?")
        return torch.cat(p.grad_sample) if isinstance(p.grad_sample, list) else p.grad_sample

    def _samples(self) -> list[Samples]:
        """One item a backward since the last step. Raises ValueError where there is none, or parameters disagree."""
        found: dict[Tensor, list[Any] | None] = {p: samples_of(p) for p in self.params}
        if all(items is None for items in found.values()):
            followed = any(tape_of(p) is not None or hasattr(p, "grad_sample") for p in self.params)
            raise ValueError(
                "Per sample gradient is not initialized. Not updated in backward pass?"
                if followed
                else "Per sample gradient not found. Are you using GradSampleModule?"
            )
        if any(items is None and tape_of(p) is None for p, items in found.items()):
            raise ValueError("Per sample gradient is not initialized. Not updated in backward pass?")
        present = {p: items for p, items in found.items() if items is not None}
        if len({len(items) for items in present.values()}) > 1:
            raise ValueError("Number of accumulated steps is inconsistent across parameters")
        count = len(next(iter(present.values())))
        return [{p: items[k] for p, items in present.items()} for k in range(count)]

    @property
    def accumulated_iterations(self) -> int:
        return len(self._samples()) if self.params else 1

    def clip_factors(self, measures: Sequence[Measure], params: Sequence[Tensor]) -> tuple[Outcome, Sequence[int]]:
        """Factors ``[K, B]`` of the examples of one backward, and which row of them is whose parameter's."""
        return clip_together(measures, self._rule()), [0] * len(params)

    def _rule(self) -> ClippingRule:
        return Flat(self.max_grad_norm)

    @torch.no_grad()
    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients of every backward since the last step to ``p.summed_grad``."""
        with full_precision(), no_autocast("cpu"), no_autocast("cuda"):
            for samples in self._samples():
                self._clip_one(samples)

    def _clip_one(self, samples: Samples) -> None:
        for item in samples.values():
            if item.processed if isinstance(item, Batch) else hasattr(item, "_processed"):
                raise ValueError(
                    "Gradients haven't been cleared since the last optimizer step. In order to obtain privacy guarantees you "
                    "must call optimizer.zero_grad() on each step"
                )
        batches = {id(item): item for item in samples.values() if isinstance(item, Batch)}
        of_batch = {key: item.measures() for key, item in batches.items()}
        found: dict[Tensor, Measure] = {}
        for p, item in samples.items():
            if isinstance(item, Tensor):
                found[p] = measure([PerUnit(item)], p.dtype)
            elif p in of_batch[id(item)]:
                found[p] = of_batch[id(item)][p]
        if found:
            if len({of.square.numel() for of in found.values()}) > 1:
                raise ValueError("per-example gradients are of different numbers of examples: one batch for all models")
            params = list(found)
            device = found[params[0]].square.device
            measures = [
                Measure(of.square.to(device), of.bound.to(device), of.spread.to(device)) for of in found.values()
            ]
            outcome, rows = self.clip_factors(measures, params)
            for p, row in zip(params, rows, strict=True):
                self._accumulate(p, samples[p], outcome.factors[row].to(p.device))
        for item in samples.values():
            if isinstance(item, Batch):
                item.processed = True
            else:
                _mark_as_processed(item)

    def _accumulate(self, p: Any, item: Batch | Tensor, factors: Tensor) -> None:
        holds = sum_of(p) is not None
        if not holds:
            dtype = accumulation_dtype(p.dtype)
            p.summed_grad = torch.empty_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        if isinstance(item, Batch):
            item.add_clipped(p, factors, p.summed_grad, holds)
        else:
            PerUnit(item).add_clipped(factors, p.summed_grad, holds)

    # The release

    @property
    def noise_std(self) -> float:
        """Standard deviation on each coordinate of the sum."""
        return self._effective_noise_multiplier() * self.max_grad_norm * (1 + ROUNDING_SLACK)

    def _effective_noise_multiplier(self) -> float:
        return self.noise_multiplier

    @property
    def _divisor(self) -> float:
        if self.loss_reduction != "mean":
            return 1.0
        assert self.expected_batch_size is not None
        return self.expected_batch_size * self.accumulated_iterations

    def _totals(self) -> list[tuple[dict[str, Any], Any, Tensor, int]]:
        """(group, parameter, its sum, index of its first element) of all that is trained. Raises ValueError for used sums."""
        totals, offset = [], 0
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:  # frozen since its backward: the wrapped step would use what it has
                    p.grad = p.summed_grad = None
                else:
                    total = sum_of(p)
                    _check_processed_flag(total)
                    if total is None:
                        total = torch.zeros_like(p, dtype=accumulation_dtype(p.dtype))
                    totals.append((group, p, total, offset))
                offset += p.numel()
        return totals

    @torch.no_grad()
    def add_noise(self) -> None:
        """``p.grad = p.summed_grad + noise``, which is rounded once."""
        source = self._source()
        for _, p, total, offset in self._totals():
            self._noisy(p, total, source, offset)

    def _source(self) -> NoiseSource | None:
        """None where there is no noise to draw."""
        return self._noise.of_release() if self.noise_std else None

    def _noisy(self, p: Tensor, total: Tensor, source: NoiseSource | None, offset: int) -> None:
        out = total if total.dtype == torch.float32 else torch.empty_like(total, dtype=torch.float32)
        if source is None:
            out = total
        else:
            source.add_(total, self.noise_std, offset=offset, out=out)
        self._publish(p, out)

    def _publish(self, p: Any, noisy: Tensor) -> None:
        p.grad = p.summed_grad = released = noisy.to(p.dtype)
        _mark_as_processed(released)

    @torch.no_grad()
    def scale_grad(self) -> None:
        """Divide ``p.grad`` by what the mean is over."""
        divisor = self._divisor
        if divisor != 1:
            for p in self.params:
                if p.grad is not None:
                    p.grad /= divisor

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Everything but the wrapped optimizer's step. True if that is to follow, False where this step is skipped."""
        if not self._sum():
            return False
        self.add_noise()
        self.scale_grad()
        self._released()
        self._after_release()
        return True

    def _sum(self) -> bool:
        """Clip and add; False where this step is skipped."""
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                "a loss scaler changes what is clipped: train in bfloat16 or float32, without GradScaler"
            )
        if not self.params:
            return True
        try:
            self.clip_and_accumulate()
        except BaseException:
            # Half a sum is no sum: the logical batch starts again from zero.
            self._is_last_step_skipped = False
            self._drop_sum()
            raise
        self._is_last_step_skipped = self._check_skip_next_step()
        return not self._is_last_step_skipped

    def _released(self) -> None:
        if self.step_hook:
            self.step_hook(self)

    def _after_release(self) -> None:
        """For rules that learn from a release."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One release, or one more part of a logical batch where a skip was signalled.

        closure: evaluated once, before. Raises RuntimeError under a loss scaler, ValueError as the class says.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        update = self._fused_update()
        if update is None:
            if self.pre_step():
                self._step_wrapped()
        elif self._sum():
            self._released()
            self._release_and_update(update)
            self._after_release()
        return loss

    def _step_wrapped(self) -> None:
        self._releasing = True
        try:
            self.original_optimizer.step()
        finally:
            self._releasing = False

    def _fused_update(self) -> fused.Update | None:
        """Noise, division and update in one pass, where nobody overrides or watches a part of it."""
        own = all(getattr(type(self), n) is getattr(DPOptimizer, n) and n not in vars(self) for n in _PARTS)
        watched = self.step_hook is not None and self.step_hook is not self.accounting_hook
        if not own or watched or not self.noise_multiplier:
            return None
        return fused.update_of(self.original_optimizer)

    @torch.no_grad()
    def _release_and_update(self, update: fused.Update) -> None:
        source = self._noise.of_release()
        std, scale = self.noise_std, 1 / self._divisor
        totals = self._totals()
        drawn = source.spend_all([(offset, p.numel()) for _, p, _, offset in totals], std, scale)
        together: dict[int, tuple[dict[str, Any], list[Tensor], list[Tensor], list[ops.Draw]]] = {}
        for (group, p, total, _), draw in zip(totals, drawn, strict=True):
            columns = together.setdefault(id(group), (group, [], [], []))
            columns[1].append(p)
            columns[2].append(total)
            columns[3].append(draw)
        for group, params, sums, draws in together.values():
            update(group, params, sums, draws)
            torch.autograd.graph.increment_version(params)
            for p, total in zip(params, sums, strict=True):
                self._publish(p, total)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear ``p.grad`` and per-example gradients, and ``p.summed_grad`` unless it waits for more of a logical batch."""
        tapes: dict[int, SampleTape] = {id(tape): tape for p in self.params if (tape := tape_of(p)) is not None}
        for tape in tapes.values():
            tape.batches.clear()
        for p in self.params:
            if p.requires_grad or hasattr(p, "grad_sample"):
                p.grad_sample = None
        if not self._is_last_step_skipped:
            self._drop_sum()
        self.original_optimizer.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state. The noise takes a new key."""
        super().load_state_dict(state_dict)
        self._noise = OptimizerNoise(self.generator, self.secure_mode)


def sum_of(p: Tensor) -> Tensor | None:
    """The clipped sum that waits in ``p.summed_grad``, or what was released of it."""
    return p.__dict__.get("summed_grad")  # a parameter that was frozen when the optimizer was made has none


_PARTS = ("pre_step", "add_noise", "scale_grad", "_noisy")

__getattr__, __dir__ = delegate(__name__)
