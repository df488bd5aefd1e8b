"""What a backward entered, clipped and added to the gradients once it is over.

Guarantees. A backward adds everything that it entered, each unit at most ``max_grad_norm`` in L2 over all parameters
together, or it raises: before anything has changed, or with the logical batch gone, sums and ``p.grad`` too. What was
measured and dropped of checkpointed parts is added as replay.py says. Backwards of several threads finish one by one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from fastclip import plan, tape
from fastclip.backward import BackwardPass, BackwardPasses
from fastclip.clipping import ClippingRule, check_norm
from fastclip.replay import SLACK, check_apart, exactly, replay, settle
from fastclip.sums import GradientSums
from fastclip.units import PrivacyUnits


class Owner(Protocol):
    """What the clipper asks of the optimizer that releases its sums."""

    def accept(self, units: PrivacyUnits) -> None: ...

    def added(self, units: PrivacyUnits | None) -> None: ...


class ClippedSums:
    """The clipping rule, the sums that wait for their release, and what ends each backward.

    replays: whether checkpointed parts may run again for their clipped sums.
    """

    replays = True

    def __init__(self, model: nn.Module, rule: ClippingRule, loss_reduction: str, strict: bool) -> None:
        self.model = model
        self.rule = rule
        self.loss_reduction = loss_reduction
        self.strict = strict
        self.attached = False
        self.sums = GradientSums()
        self.passes = BackwardPasses(self._finish)
        self.owner: Owner | None = None  # the optimizer that releases the sums
        self.unit_norms = torch.zeros(0)
        self._nonfinite = torch.zeros((), dtype=torch.int64)
        self._group: dict[Tensor, int] = {}
        self._num_groups = 1
        self._spread_limit = math.inf
        self.replayable: dict[int, bool] = {}  # what was found of checkpointed parts, by their place in the forward
        self._finishing = threading.Lock()

    @property
    def num_groups(self) -> int:
        """K, into how many groups the clipping rule puts the parameters."""
        return self._num_groups

    def sum_in(self, *, fp64: bool, spread_limit: float) -> None:
        """How clipped sums are formed from now on: in fp64 whatever the parameters are, or not; and with factors that also
        keep ``factor sum_t |a_t||g_t|`` within ``spread_limit`` C, for mechanisms that prove what summation may be off by.

        Raises RuntimeError while a sum waits.
        """
        if any(self.sums.pending(p) is not None for p in self.parameters()):
            raise RuntimeError("a clipped sum waits for its release: call zero_grad() first")
        self.sums.fp64 = fp64
        self._spread_limit = spread_limit

    @property
    def max_grad_norm(self) -> float:
        """C: the rule's. Setting it changes clip and noise together, and is refused while a clipped sum waits."""
        return self.rule.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        value = check_norm("max_grad_norm", value)
        if value != self.rule.max_grad_norm and any(self.sums.pending(p) is not None for p in self.parameters()):
            raise ValueError(
                f"max_grad_norm cannot become {value} within a logical batch that was clipped to "
                f"{self.rule.max_grad_norm}: set it after step() and zero_grad()"
            )
        self.rule.max_grad_norm = value

    @property
    def nonfinite_units(self) -> int:
        return int(self._nonfinite)

    def parameters(self) -> dict[nn.Parameter, str]:
        """Every trainable parameter of the model as it is now, with its first name."""
        return plan.trainable_parameters(dict(self.model.named_modules()))

    def refuse_second_backward(self) -> None:
        """Called for an entry of a forward whose backward is done. Raises RuntimeError."""
        raise RuntimeError(
            "a second backward through one forward: a unit's gradient must be whole before it is clipped; add the "
            "losses and call backward() once"
        )

    def _finish(self, done: BackwardPass) -> None:
        if not self.attached:
            return
        settle(done)
        if not done.entries and not done.replayed:
            return
        with self._finishing:  # what one backward may add depends on what others did
            self._finish_alone(done)

    def _finish_alone(self, done: BackwardPass) -> None:
        units = done.forwards[0].units
        if any(f.finished for f in done.forwards):
            # By another thread, autograd's own for deep recursion too: each has clipped a part of the units' gradients.
            try:
                self.refuse_second_backward()
            except RuntimeError:
                self._forget(self.parameters())
                raise
        if not all(f.same_units(done.forwards[0]) for f in done.forwards):
            raise RuntimeError("one backward covers forwards with different units: call backward() once for each")
        trainable = self.parameters()
        used = {q for q, _, _ in done.slots()}.union(*(f.trained for f in done.forwards))
        for q in used:
            if q not in self._group or q not in trainable:
                raise RuntimeError(
                    "the set of trainable parameters changed between forward and backward: run the forward again"
                )
        tape.check_memory(entry for entries in done.entries.values() for entry in entries)
        check_apart(done)
        self._accept(done, units, trainable)
        try:
            with exactly(done.device):
                done.entries = tape.separate(done.entries)
                self._use(done, units, trainable)
            for f in done.forwards:
                f.finished = True
            self._replay(done)
        except BaseException:
            if done.factors is not None:
                self._forget(trainable)
            raise
        if self.owner is not None:
            self.owner.added(units)

    def _accept(self, done: BackwardPass, units: PrivacyUnits, trainable: Mapping[nn.Parameter, str]) -> None:
        """Raises RuntimeError if this backward may not enter the sum; nothing has changed then."""
        if self.strict and len(done.forwards) > 1 and units.ids is None:
            raise RuntimeError(
                "one backward covers several forwards: say by clipper.units(ids=...) around each whose examples they are, so "
                "that those of one unit are clipped together and those of two apart"
            )
        self.sums.check(trainable, trainable.__getitem__)
        if self.owner is not None:
            self.owner.accept(units)

    def _use(self, done: BackwardPass, units: PrivacyUnits, trainable: Mapping[nn.Parameter, str]) -> None:
        """Clip and add what a backward entered."""
        outcome = self._clip(done, units)
        done.factors = outcome.factors  # from here on a failure leaves half a sum
        self._add(done, done.entries)
        self.unit_norms, self._nonfinite = outcome.norms, outcome.nonfinite

    def _replay(self, done: BackwardPass) -> None:
        """Add what was measured and dropped, one part after the other."""
        replay(done, partial(self._add, done), partial(self._in_groups, done=done))
        self.sums.terms += max(done.terms.values(), default=0)

    def _forget(self, trainable: Iterable[nn.Parameter]) -> None:
        """Half a sum is no sum: the logical batch starts again from zero."""
        self.sums.clear()
        for p in trainable:
            p.grad = None
        if self.owner is not None:
            self.owner.added(None)

    def _clip(self, done: BackwardPass, units: PrivacyUnits) -> tape.Outcome:
        found = self._in_groups(tape.measures(done.entries), done)
        if done.replayed:
            done.first = self._in_groups((item for part in done.replayed for item in part.measures.items()), done)
            found = found.plus(done.first, 1 + 2 * SLACK)
        return tape.clip(found, self.weights(units).to(done.device), self.rule, self._spread_limit)

    def _in_groups(self, found: Iterable[tuple[tape.Slot, tape.Measure]], done: BackwardPass) -> tape.Measure:
        shape = self._num_groups, done.forwards[0].units.num_units
        return tape.together(found, self._group, shape, done.device)

    def weights(self, units: PrivacyUnits) -> Tensor:
        """fp64 ``[U]``: what a unit's sum of rows' gradients is to be multiplied by to be its gradient."""
        scale = torch.ones(units.num_units, dtype=torch.float64)
        if units.mean:
            scale /= units.examples_per_unit
        if self.loss_reduction == "mean":
            scale *= float(units.num_examples or 0)
        return scale

    def _add(self, done: BackwardPass, slots: dict[tape.Slot, list[tape.Entry]]) -> None:
        """Sums of these slots; entries are dropped as they are used."""
        assert done.factors is not None
        totals: dict[Tensor, Tensor] = {}
        for slot in sorted(slots, key=lambda slot: tape.turn(slot, slots[slot])):
            p, start, stop = slot
            done.terms[p] = done.terms.get(p, 0) + sum(entry.terms for entry in slots[slot])
            whole = not p.dim() or stop - start == p.shape[0]
            holds = True
            if p not in totals:
                totals[p], holds = self.sums.target(p)
                if not holds and not whole:
                    totals[p].zero_()
                    holds = True
            for entry in slots.pop(slot):
                entry.add_clipped(done.factors[self._group[p]], totals[p] if whole else totals[p][start:stop], holds)
                holds = True
        for p, total in totals.items():
            self.sums.write(p, total, released=False)
