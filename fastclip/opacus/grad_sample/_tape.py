"""The engine under Opacus' wrappers: a clipper whose backwards are kept for an optimizer to clip, or clipped at once.

Opacus' contract is that a wrapped model answers per-example gradients and leaves clipping to the optimizer's step, where C is
known. So a :class:`SampleTape` keeps what a backward entered, factors and not gradients, until the step or `zero_grad`; a
:class:`GhostTape` knows C, clips at the end of the backward and keeps norms alone.

Guarantees: those of `fastclip.module` for what is entered (every trainable parameter's every use, no example in another's
rows); what is kept is clipped by the bits that it is summed from; what was used by a step is not used again.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastclip import tape
from fastclip.backward import BackwardPass
from fastclip.clipping import ClippingRule, make_rule
from fastclip.forward import Forward
from fastclip.layers import Rule
from fastclip.layers.registry import find_rule
from fastclip.layouts import Layouts
from fastclip.module import Clipper
from fastclip.opacus.grad_sample._layouts import DeclaredLayouts
from fastclip.opacus.grad_sample._parameter import adopt, release
from fastclip.opacus.grad_sample._samplers import sampled_rule
from fastclip.reference import accumulation_dtype
from fastclip.tape import Entry, Measure, PerUnit
from fastclip.units import PrivacyUnits
from fastclip.written import Written

Input = tuple[int, int, torch.Size]  # of a tensor given to the model: where its memory is, its version, its shape


class Batch:
    """What one backward entered, of B examples.

    weights: fp64 ``[B]``, what makes an example's gradient of its entries. inputs: which tensors the examples came in.
    """

    def __init__(self, slots: Mapping[tape.Slot, list[Entry]], weights: Tensor, inputs: frozenset[Input]) -> None:
        self.slots = dict(slots)
        self.weights = weights
        self.inputs = inputs
        self.read: dict[Tensor, Tensor] = {}  # per-example gradients that somebody looked at
        self._versions = [(x, x._version) for entries in slots.values() for e in entries for x in _tensors(e)]
        self.processed = False  # a step used it

    @property
    def num_examples(self) -> int:
        return self.weights.numel()

    def check_unchanged(self) -> None:
        """Raises RuntimeError if somebody wrote into what was kept: it belongs to other examples then."""
        if any(x._version != version for x, version in self._versions):
            raise RuntimeError(
                "a tensor that the backward used was changed in place before step() (the gradient given to backward(), or an "
                "activation): make the change after step(), or on a copy"
            )

    def join(self, other: Batch) -> bool:
        """Take in another backward of the same examples through other parameters; False where it is not that.

        The same examples are those that came in the same tensors, with nothing written into them since: other examples would
        share a clipping factor with these, and one of them could change what two contribute.
        """
        mine, theirs = ({p for p, _, _ in batch.slots} | batch.read.keys() for batch in (self, other))
        if (
            self.processed
            or mine & theirs
            or self.inputs != other.inputs
            or not torch.equal(self.weights, other.weights)
        ):
            return False
        self.slots |= other.slots
        self._versions += other._versions
        return True

    def has(self, p: Tensor) -> bool:
        return p in self.read or any(q is p for q, _, _ in self.slots)

    @torch.no_grad()
    def grad_sample(self, p: Tensor) -> Tensor:
        """``[B, *shape]`` in the parameter's dtype; from now on its norm and its sum are taken from this tensor."""
        if p not in self.read:
            self.check_unchanged()
            total = torch.zeros(self.num_examples, *p.shape, dtype=accumulation_dtype(p.dtype), device=p.device)
            for slot in [slot for slot in self.slots if slot[0] is p]:
                _, start, stop = slot
                shape = torch.Size([stop - start, *p.shape[1:]]) if p.dim() else p.shape
                part = total[:, start:stop] if p.dim() else total
                for entry in self.slots.pop(slot):
                    part += tape.held(entry).per_unit(shape)
            total *= self.weights.to(total).view(-1, *[1] * p.dim())
            self.read[p] = total.to(p.dtype)
        return self.read[p]

    def forget(self, p: Tensor) -> None:
        self.read.pop(p, None)
        for slot in [slot for slot in self.slots if slot[0] is p]:
            del self.slots[slot]

    def measures(self) -> dict[Tensor, Measure]:
        """Of every parameter, over all of its slots, in the measure of its gradient."""
        self.check_unchanged()
        found: dict[Tensor, Measure] = {}
        weights = self.weights.to(next(iter(self.slots))[0].device) if self.slots else self.weights
        for (p, _, _), of in tape.measures(self.slots):
            own = Measure(of.square * weights.square(), of.bound * weights, of.spread * weights)
            if p in found:  # blocks of a packed projection
                other = found[p]
                own = Measure(own.square + other.square, own.bound + other.bound, own.spread + other.spread)
            found[p] = own
        found |= {p: tape.measure([PerUnit(grads)], p.dtype) for p, grads in self.read.items()}
        return found

    def add_clipped(self, p: Tensor, factors: Tensor, total: Tensor, holds: bool) -> None:
        """``total [*shape] += sum_i factors_i gradient_i``; it holds nothing yet unless ``holds``. factors: fp64 ``[B]``."""
        own = [slot for slot in self.slots if slot[0] is p]
        whole = len(own) == 1 and (not p.dim() or own[0][1:] == (0, p.shape[0])) and p not in self.read
        if not holds and not whole:
            total.zero_()
        weighted = factors * self.weights.to(factors.device)
        for slot in own:
            part = total[slot[1] : slot[2]] if p.dim() else total
            for entry in self.slots[slot]:
                entry.add_clipped(weighted, part, holds or not whole)
                holds = True
        if p in self.read:
            PerUnit(self.read[p]).add_clipped(factors, total, True)


class SampleTape(Clipper):
    """Keeps batches. hooks: the wrapper, which says whether hooks are enabled and whether several backwards may add up.

    plain_gradients: whether ``p.grad`` is to be the plain gradient too, as Opacus leaves it.
    """

    replays = False  # the entries are what it is for

    def __init__(self, model: nn.Module, hooks: Any, batch_dim: int, max_grad_norm: float, strict: bool) -> None:
        self.hooks = hooks
        self.batches: list[Batch] = []
        self.plain_gradients = True
        self._batch_dim = batch_dim
        self._inputs: WeakKeyDictionary[Forward, frozenset[Input]] = WeakKeyDictionary()
        super().__init__(model, make_rule("flat", max_grad_norm), hooks.loss_reduction, strict)

    def _make_layouts(self) -> Layouts:
        return DeclaredLayouts(self.model, self.strict, self._batch_dim)

    def rule_of(self, module: nn.Module) -> Rule | None:
        return sampled_rule(self.hooks, module) or find_rule(module)

    def refresh(self) -> None:
        super().refresh()
        for p in self.parameters():
            adopt(p, self)

    def detach(self) -> None:
        super().detach()
        for p in self.model.parameters():
            release(p, self)
        self.batches.clear()

    @property
    def last_examples(self) -> int:
        """Of the last forward."""
        return self.forwards.last.examples if self.forwards.last is not None else 0

    # What parameters and optimizers read

    def read(self, p: Tensor) -> Tensor | list[Tensor] | None:
        """Per-example gradients of one parameter, formed now: a tensor, or a list with one of each backward."""
        found = [batch.grad_sample(p) for batch in self.batches if batch.has(p)]
        return None if not found else found[0] if len(found) == 1 else found

    def forget(self, p: Tensor) -> None:
        for batch in self.batches:
            batch.forget(p)
        self.batches = [batch for batch in self.batches if batch.slots or batch.read]

    # What backwards do

    def begin_forward(self, original: Any, args: Any, kwargs: Any) -> tuple[Forward, Written] | None:
        for batch in self.batches:
            if batch.processed:  # only that it was used is still of interest
                batch.slots.clear()
                batch.read.clear()
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        inputs = frozenset((x.untyped_storage().data_ptr(), x._version, x.shape) for x in leaves)
        begun = super().begin_forward(original, args, kwargs)
        if begun is not None:  # a model that calls itself has come in already
            self._inputs[begun[0]] = inputs
        return begun

    def refuse_second_backward(self) -> None:
        if self._clips():
            super().refuse_second_backward()

    def _clips(self) -> bool:
        """Whether backwards count: Opacus' hooks see nothing while they are disabled or the model is in eval mode."""
        trained = (
            m for m in self.model.modules() if any(p is not None and p.requires_grad for p in m._parameters.values())
        )
        return bool(self.hooks.hooks_enabled) and any(m.training for m in trained)

    def _accept(self, done: BackwardPass, units: PrivacyUnits, trainable: Mapping[nn.Parameter, str]) -> None:
        """Several forwards in one backward: row i of each is example i, as in Opacus."""

    def _use(self, done: BackwardPass, units: PrivacyUnits, trainable: Mapping[nn.Parameter, str]) -> None:
        counts = self._clips()
        inputs = frozenset().union(*(self._inputs.get(f, frozenset()) for f in done.forwards))
        theirs = {address for address, _, _ in inputs}
        slots = {slot: [_own(entry, theirs) for entry in found] for slot, found in done.entries.items()}
        batch = Batch(slots, self.weights(units), inputs)
        joined = counts and bool(self.batches) and self.batches[-1].join(batch)
        if counts and not joined:
            self.hooks.check_accumulation(len(self.batches))
        if not counts or self.plain_gradients:
            self._add_plain(done)
        if counts and not joined:
            self.batches.append(batch)

    def reset(self) -> None:
        """Forget all that backwards left."""
        self.batches.clear()

    def _add_plain(self, done: BackwardPass) -> None:
        """``p.grad`` grows by what autograd would have added."""
        for (p, start, stop), entries in done.entries.items():
            total = torch.zeros_like(p, dtype=accumulation_dtype(p.dtype), memory_format=torch.contiguous_format)
            part = total[start:stop] if p.dim() else total
            for entry in entries:
                ones = torch.ones(_num_units(entry), dtype=torch.float64, device=p.device)
                entry.add_clipped(ones, part, True)
            p.grad = total.to(p.dtype) if p.grad is None else p.grad.add_(total)


class GhostTape(SampleTape):
    """Clips at the end of the backward: ``p.grad`` grows by clipped gradients, ``p._norm_sample`` are their norms ``[B]``."""

    backwards = 0  # since the optimizer took the sum

    def reset(self) -> None:
        super().reset()
        self.sums.clear()
        self.backwards = 0

    def _accept(self, done: BackwardPass, units: PrivacyUnits, trainable: Mapping[nn.Parameter, str]) -> None:
        if self._clips():
            self.hooks.check_accumulation(self.backwards)
            self.sums.check(trainable, trainable.__getitem__)

    def _use(self, done: BackwardPass, units: PrivacyUnits, trainable: Mapping[nn.Parameter, str]) -> None:
        if not self._clips():
            self._add_plain(done)
            return
        for p in trainable:
            p.__dict__["_norm_sample"] = torch.zeros(units.num_units, dtype=p.dtype, device=p.device)
        Clipper._use(self, done, units, trainable)
        self.backwards += 1

    def _clip(self, done: BackwardPass, units: PrivacyUnits) -> tape.Outcome:
        device = next(iter(done.entries))[0].device
        weights = self.weights(units).to(device)
        measures = Batch(done.entries, weights, frozenset()).measures()
        for p, of in measures.items():
            p.__dict__["_norm_sample"] = of.square.sqrt().to(p.dtype)
        outcome = clip_together(list(measures.values()), self.rule)
        return replace(outcome, factors=outcome.factors * weights)


def clip_together(measures: Sequence[Measure], rule: ClippingRule, groups: Sequence[int] | None = None) -> tape.Outcome:
    """Norms and factors ``[K, B]`` of examples from what they have in each parameter. groups: of each; one group if None."""
    given = [0] * len(measures) if groups is None else list(groups)
    found = tape.in_groups(measures, given, max(given) + 1)
    return tape.clip(found, torch.ones_like(found.square[0]), rule, math.inf)


def _own(entry: Entry, theirs: Container[int]) -> Entry:
    """The entry without memory of the model's inputs, which may hold other examples at the step. theirs: where they are."""
    named: list[tuple[str, Any]] = [(f.name, getattr(entry, f.name)) for f in fields(entry)]
    shared = [(n, x) for n, x in named if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in theirs]
    copies: dict[str, Any] = {name: x.clone() for name, x in shared}
    return replace(entry, **copies) if copies else entry


def _tensors(entry: Entry) -> list[Tensor]:
    return [x for f in fields(entry) if isinstance(x := getattr(entry, f.name), Tensor)]


def _num_units(entry: Entry) -> int:
    return entry.grads.shape[0] if isinstance(entry, PerUnit) else entry.segments.num_units
