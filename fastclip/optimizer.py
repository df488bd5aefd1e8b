"""DPOptimizer: a torch optimizer that releases clipped sums with noise.

One ``step()`` is one release of one sampler draw. Guarantees: the noise on the sum has standard deviation
``noise_multiplier * max_grad_norm`` (and ``ROUNDING_SLACK`` of it more, which pays for what rounding may add to a
clipped sum) in every coordinate of every trainable parameter, whether or not it has a gradient; sum and noise meet in
fp64 and are rounded once; a sum is released once; nothing but the engine's clipped sums is released; the divisor is the
public expected batch size, never the realised one. After ``step()`` ``p.grad`` is noisy or None, never the clean sum.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastclip import fused
from fastclip.clipping import ClippingRule
from fastclip.discrete import SPREAD, DiscreteGaussian, check_summation, discrete_gaussian
from fastclip.module import Clipper, attach, clipper_of
from fastclip.noise import NoiseSource, check_noise_multiplier
from fastclip.tape import ROUNDING_SLACK
from fastclip.units import PrivacyUnits


class DrawSource(Protocol):
    """What the optimizer reads from a sampler: the id of the draw that was handed out last, and its expected size.

    Three more attributes are used where they exist. ``current_units``, the number of units in that draw: no more may enter
    the sum. ``previous_draw``, the draw before it in the same loop: it must have been released. ``sampler``: whose draws
    these are, so that a draw is released once whoever hands it out.
    """

    @property
    def current_draw(self) -> int | None: ...

    @property
    def expected_batch_size(self) -> float: ...


# The draws of each sampler that some optimizer released.
_RELEASED: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()


class DPOptimizer(Optimizer):
    """Wraps any first-order ``torch.optim`` optimizer; schedulers, Trainer and Accelerate see an Optimizer.

    optimizer: holds exactly the trainable parameters of the model. noise_multiplier: sigma >= 0. max_grad_norm: C > 0,
    the clipper's own from then on. expected_batch_size: units per logical batch, a public number; from the sampler if
    None. loss_reduction: "mean" if the loss given to backward() is a mean over examples (the noisy sum is then divided by
    expected_batch_size), "sum" if it is their sum (it is not). module: the model, attached here if it is not yet.
    sampler: ties every release to one draw. seed: reproducible noise, which is not private. secure: discrete Gaussian noise on
    a grid, with a claim that covers rounding (``mechanism``); sums in fp64, several times slower than the default.

    Raises ValueError for bad arguments, for optimizers that evaluate a closure again (LBFGS), and where optimizer and
    model do not hold the same trainable parameters; the model is then as it was.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float | None = None,
        loss_reduction: str = "mean",
        module: nn.Module,
        clipping: str | ClippingRule = "flat",
        sampler: DrawSource | None = None,
        seed: int | None = None,
        secure: bool = False,
        strict: bool = True,
    ) -> None:
        if isinstance(optimizer, torch.optim.LBFGS | DPOptimizer) or not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"optimizer must be a first-order torch.optim optimizer, got {type(optimizer).__name__}: one step must be one "
                "release"
            )
        self.original_optimizer = optimizer
        self._noise_multiplier = 0.0
        self.noise_multiplier = noise_multiplier
        self._expected_batch_size = _batch_size(expected_batch_size, sampler)
        self.sampler = sampler
        if secure and seed is not None:
            raise ValueError(f"secure=True proves what a known seed={seed!r} gives away: leave one of them out")
        self.secure = bool(secure)
        self.noise = NoiseSource(seed)
        self._release_hooks: list[Callable[[DPOptimizer], object]] = []
        self._seen: set[int] = set()
        self._pending_draw: int | None = None
        self._num_entered = 0
        self._clipped_to: float | None = None
        self._released: set[int] = set()  # of the sampler's draws, by this optimizer or another
        if sampler is not None:
            self._released = _RELEASED.setdefault(getattr(sampler, "sampler", sampler), set())
        held = list(self._parameters())
        if len(set(held)) < len(held):
            raise ValueError("the optimizer holds a parameter twice: it would get noise and a step twice")
        wanted = {p for p in module.parameters() if p.requires_grad}
        if wanted != {p for p in self._parameters() if p.requires_grad}:
            raise ValueError(_different(module, set(self._parameters())))
        existing = clipper_of(module)
        if existing is not None and (existing.max_grad_norm, existing.loss_reduction) != (
            max_grad_norm,
            loss_reduction,
        ):
            raise ValueError(
                f"module is attached with max_grad_norm={existing.max_grad_norm}, loss_reduction="
                f"{existing.loss_reduction!r}; got {max_grad_norm} and {loss_reduction!r}: pass the same, or detach it first"
            )
        if existing is not None and (clipping != "flat" or strict is not True):
            raise ValueError("module is attached already: choose clipping and strict in attach(), or detach it first")
        if existing is not None and any(existing.sums.pending(p) is not None for p in existing.parameters()):
            raise ValueError(
                "a clipped sum waits for its release, and a new optimizer cannot know whose it is: step() or zero_grad() first"
            )
        self.clipper: Clipper = existing or attach(module, max_grad_norm, clipping, loss_reduction, strict)
        try:
            if secure:
                self.mechanism  # noqa: B018  refuses what cannot be claimed
            self.clipper.sum_in(fp64=self.secure, spread_limit=SPREAD if secure else math.inf)
        except BaseException:
            if existing is None:
                self.clipper.detach()
            raise
        self.clipper.owner = self
        self._releasing = False
        optimizer.register_step_pre_hook(self._only_from_here)
        # Hooks and the profiler's step, without Optimizer.__init__, which would replace the wrapped one's state.
        super().__setstate__({})

    # Makes GradScaler leave its scale here instead of unscaling gradients, so that step() can refuse it.
    _step_supports_amp_scaling = True

    # One source for C, sigma and the batch size

    @property
    def max_grad_norm(self) -> float:
        return self.clipper.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.clipper.max_grad_norm = value

    @property
    def noise_multiplier(self) -> float:
        return self._noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self._noise_multiplier = check_noise_multiplier(value)

    @property
    def expected_batch_size(self) -> float:
        return self._expected_batch_size

    @property
    def noise_std(self) -> float:
        """Standard deviation on each coordinate of the sum."""
        if self.secure:
            return self.mechanism.std
        return self.noise_multiplier * self.max_grad_norm * (1 + ROUNDING_SLACK)

    @property
    def mechanism(self) -> DiscreteGaussian:
        """With ``secure=True``: the grid, the noise on it, the sensitivity, and in words what is claimed of each release.

        Raises RuntimeError without it, ValueError where nothing can be claimed.
        """
        if not self.secure:
            raise RuntimeError("only secure=True releases by a mechanism whose rounding is proved")
        elements = sum(p.numel() for p in self._parameters() if p.requires_grad)
        return discrete_gaussian(self.noise_multiplier, self.max_grad_norm, elements)

    def attach_release_hook(self, hook: Callable[[DPOptimizer], object]) -> None:
        """Call ``hook(self)`` at the start of every release, before anything changes; what it raises stops the release."""
        self._release_hooks.append(hook)

    # The step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and forget the clipped sum that they held."""
        self.original_optimizer.zero_grad(set_to_none)
        self.clipper.sums.clear()
        self._forget()

    def _forget(self) -> None:
        self._seen.clear()
        self._pending_draw = self._clipped_to = None
        self._num_entered = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Release the sum of one draw with noise and let the wrapped optimizer use it; noise alone if there is no sum.

        closure: evaluated once, before the release. Raises RuntimeError if gradients were changed, were released already,
        or belong to a draw that was released already; nothing has changed then and no noise was drawn. What else is raised
        here (an interrupt, memory that runs out) may come after some parameters moved: the draw then counts as released.
        """
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                "a loss scaler changes what is clipped: train in bfloat16 or float32, without GradScaler"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sums = self._check_release()
        for hook in self._release_hooks:
            hook(self)
        if self._release_hooks:
            sums = self._check_release()
        update = None if self.secure else fused.update_of(self.original_optimizer)
        try:
            self._add_noise(update, sums)
        except BaseException:
            for p in self._parameters():
                p.grad = None
            self.zero_grad()
            raise
        finally:
            self.noise.advance()
            self._forget()
            if self.sampler is not None and self.sampler.current_draw is not None:
                self._released.add(self.sampler.current_draw)
        if update is None:
            self._releasing = True
            try:
                self.original_optimizer.step()
            finally:
                self._releasing = False
        return loss

    def _check_release(self) -> dict[Tensor, Tensor]:
        """The sums to release. Raises RuntimeError if that must not be."""
        names = self.clipper.parameters()
        if set(names) != {p for p in self._parameters() if p.requires_grad}:
            raise RuntimeError(_different(self.clipper.model, set(self._parameters())))
        if not self.clipper.attached:
            raise RuntimeError("the clipper was detached: gradients are not clipped any more; wrap a new optimizer")
        if self.clipper.owner is not self:
            raise RuntimeError("another DPOptimizer was made for this model later: step() that one")
        if self._clipped_to not in (None, self.max_grad_norm):
            raise RuntimeError(
                f"the sum was clipped to {self._clipped_to}, but max_grad_norm is {self.max_grad_norm} now"
            )
        sums = self.clipper.sums.check(names, names.__getitem__)
        if self.secure:
            check_summation(
                self.mechanism, terms=self.clipper.sums.terms, units=self._num_entered, groups=self.clipper.num_groups
            )
        if self.sampler is not None:
            draw = self.sampler.current_draw
            self._check_handed_out(draw)
            if draw in self._released:
                raise RuntimeError(
                    f"draw {draw} was released already: one step() for each draw of the sampler, by one optimizer for all "
                    "that is trained"
                )
            if self._pending_draw not in (None, draw):
                raise RuntimeError(
                    f"the sum waits for draw {self._pending_draw}, but draw {draw} was handed out since: step() comes "
                    "before the next draw; call zero_grad()"
                )
            if getattr(self.sampler, "last_of_draw", None) is False:
                raise RuntimeError(
                    f"draw {draw} comes in several physical batches, and this is not its last: step() only where "
                    "loader.last_of_draw, after a backward of each; a part of a draw is not what was accounted for"
                )
            skipped = getattr(self.sampler, "previous_draw", None)
            if skipped is not None and skipped not in self._released:
                raise RuntimeError(
                    f"draw {skipped} was handed out and never released: an empty or failed draw gets its step() too, which "
                    "then is noise alone; and only PoissonLoader follows a loop whose worker processes run ahead of it"
                )
        return sums

    def _check_handed_out(self, draw: int | None) -> None:
        if draw is None:
            raise RuntimeError(
                "no draw was handed out: loop over the loader (or sampler) that was given as sampler=, and over no other"
            )

    def _add_noise(self, update: fused.Update | None, sums: dict[Tensor, Tensor]) -> None:
        """Let each ``p.grad`` be noisy; with ``update``, the parameters and the optimizer's state follow in the same pass."""
        std, offset = self.noise_std, 0
        mechanism = self.mechanism if self.secure else None
        scale = 1 / self.expected_batch_size if self.clipper.loss_reduction == "mean" else 1.0
        noisy: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            together: list[tuple[nn.Parameter, Tensor, int]] = []
            for p in group["params"]:
                if p.requires_grad:
                    total = sums.get(p)
                    if total is None:
                        total = torch.zeros_like(p, dtype=torch.float32 if p.itemsize < 4 else p.dtype)
                    if update is not None and p.numel():
                        together.append((p, total, offset))
                        noisy.append((p, total))
                    elif mechanism is not None:
                        out = torch.empty_like(total, dtype=torch.float32)
                        self.noise.add_discrete(total, mechanism, offset=offset, scale=scale, out=out)
                        noisy.append((p, out.to(p.dtype)))
                    else:
                        # An fp64 sum is rounded to fp32 too: only rounding hides the grid that fp64 noise lies on.
                        out = total if total.dtype == torch.float32 else torch.empty_like(total, dtype=torch.float32)
                        self.noise.add_(total, std, offset=offset, out=out, scale=scale)
                        noisy.append((p, out.to(total.dtype)))
                else:
                    p.grad = None
                offset += p.numel()
            if update is not None and together:
                params, totals, offsets = (list(column) for column in zip(*together, strict=True))
                ranges = [(first, p.numel()) for p, first in zip(params, offsets, strict=True)]
                update(group, params, totals, self.noise.spend_all(ranges, std, scale))
                torch.autograd.graph.increment_version(params)  # as every in-place operation does
        for p, total in noisy:
            self.clipper.sums.write(p, total, released=True)

    def _only_from_here(self, *args: Any) -> None:
        if not self._releasing and self.clipper.attached:
            raise RuntimeError(
                "the wrapped optimizer's own step() would use gradients without noise: call the wrapper's"
            )

    def accept(self, units: PrivacyUnits) -> None:
        """Called by the clipper before a backward's sum is added. Raises RuntimeError if it must not be."""
        if self._clipped_to not in (None, self.max_grad_norm):
            raise RuntimeError(
                f"the sum so far was clipped to {self._clipped_to}, but max_grad_norm is {self.max_grad_norm} now: C is one "
                "number within a logical batch; change it after step() and zero_grad()"
            )
        if self.sampler is not None:
            draw = self.sampler.current_draw
            self._check_handed_out(draw)
            if draw in self._released:
                raise RuntimeError(
                    f"draw {draw} was released already, and a backward of it came after: step() must be last"
                )
            if self._pending_draw not in (None, draw):
                raise RuntimeError(
                    f"a backward of draw {draw} before draw {self._pending_draw} was released: call step()"
                )
            # Each unit of the draw may enter the sum once, with norm C: more units than were drawn means that some unit
            # counts double (a batch run twice, pairs laid side by side) or was taken apart (a user's examples as units).
            drawn = getattr(self.sampler, "current_units", None)
            if drawn is not None and self._num_entered + units.num_units > drawn:
                raise RuntimeError(
                    f"{self._num_entered + units.num_units} units were clipped for draw {draw}, which has {drawn}: name whose "
                    "each example is by clipper.units(ids=...), and run every unit in one backward only"
                )
        again = self._seen.intersection(units.ids or ())
        if again:
            raise RuntimeError(
                f"unit {min(again)} is in two backwards of one release: it would be clipped twice and count double; put all of "
                "a unit's examples into one backward"
            )

    def added(self, units: PrivacyUnits | None) -> None:
        """Called by the clipper when a backward's sum was added; None when sums were lost instead."""
        if units is None:
            self._forget()
            return
        self._seen.update(units.ids or ())
        self._num_entered += units.num_units
        self._clipped_to = self.max_grad_norm
        self._pending_draw = self.sampler.current_draw if self.sampler is not None else None

    # torch.optim.Optimizer, on the wrapped one's state

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.original_optimizer.param_groups for p in group["params"])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.original_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.original_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.original_optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.original_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state: no key, no counter of the noise, no private count."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state. The noise takes a new key."""
        self.original_optimizer.load_state_dict(state_dict)
        self.noise.renew()

    def __repr__(self) -> str:
        return f"DPOptimizer(sigma={self.noise_multiplier}, C={self.max_grad_norm}, {self.original_optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a DPOptimizer cannot be copied or pickled, its noise key belongs to it alone: save state_dict()"
        )


def _batch_size(value: float | None, sampler: DrawSource | None) -> float:
    if value is None and sampler is None:
        raise ValueError(
            "expected_batch_size is needed where no sampler tells it: units per logical batch, a public number"
        )
    if value is None:
        assert sampler is not None
        value = sampler.expected_batch_size
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"expected_batch_size must be positive and finite, got {value!r}")
    if sampler is not None and not math.isclose(value, sampler.expected_batch_size, rel_tol=1e-9):
        raise ValueError(
            f"expected_batch_size is {value}, but the sampler's is {sampler.expected_batch_size}: leave it out"
        )
    return float(value)


def _different(module: nn.Module, held: set[nn.Parameter]) -> str:
    missing = [name for name, p in module.named_parameters() if p.requires_grad and p not in held]
    which = f"the optimizer lacks {', '.join(missing[:5])}" if missing else "the optimizer holds others"
    return (
        f"optimizer and model must hold the same trainable parameters, but {which}: freeze what is not trained with "
        "requires_grad_(False), and make the optimizer after the model is complete"
    )
