"""The layouts that are known of a model, one for each kind of forward, and how an unknown one is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastclip import batch, validation
from fastclip.compiled import eagerly
from fastclip.heap import give_back
from fastclip.layers.site import no_autocast
from fastclip.layout import Law, call_key, flatten_call
from fastclip.routing import CALL, LayerRoute
from fastclip.trial import Probe
from fastclip.trial_modes import trial
from fastclip.units import PrivacyUnits

Laws = Mapping[str, Law]


@contextmanager
def _precise(leaves: Sequence[Any]) -> Iterator[None]:
    """Without autocast, unless an input may need it because it is narrower than the parameters.

    Autocast rounds so coarsely that another kernel (attention leaves out a mask that hides nothing) looks like the influence
    of another example.
    """
    narrow = any(isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) for x in leaves)
    with nullcontext() if narrow else no_autocast("cpu"), nullcontext() if narrow else no_autocast("cuda"):
        yield


class Layouts:
    """Laws by kind of forward: another structure of arguments, switch or training mode is tried again.

    probe: the trial that is running, where layers report; None outside one.
    """

    def __init__(self, model: nn.Module, strict: bool, batch_dim: int = 0) -> None:
        self._model, self._strict = model, strict
        self.batch_dim = batch_dim  # of the model's inputs
        self._known: dict[tuple[Any, ...], Laws] = {}
        self.probe: Probe | None = None
        self.written: set[str] = set()  # buffers that forwards write, the same whatever the examples are

    def forget(self) -> None:
        self._known.clear()

    def find(
        self,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        units: PrivacyUnits | None,
        shared: Sequence[str],
        layers: Sequence[LayerRoute],
    ) -> tuple[PrivacyUnits, Laws]:
        """The units of a forward (each example one, where none are given) and the laws of its layers.

        shared: names of arguments that belong to all examples. Raises ValueError where the batch cannot be told, and for
        what the trial refuses.
        """
        leaves, spec = flatten_call(args, kwargs)
        names = batch.leaf_names(original, args, kwargs)
        main_input = getattr(self._model, "main_input_name", None)
        packed = units is not None and units.row_offsets is not None
        if units is not None and packed:
            flags = batch.packed_leaves(names, leaves, units, main_input)
            key = call_key(self._model, leaves, spec, None)
            anything = bool(units.num_rows)
        else:
            own = [x for name, x in zip(names, leaves, strict=True) if name not in shared]
            own_names = [name for name in names if name not in shared]
            examples = (
                batch.count_examples(own_names, own, main_input, self.batch_dim)
                if units is None
                else int(units.num_examples or 0)
            )
            flags = batch.batched_leaves(names, leaves, examples, shared, self.batch_dim, units is not None)
            key = call_key(self._model, leaves, spec, examples)
            units = PrivacyUnits.examples(examples) if units is None else units
            anything = examples > 0
        if key in self._known or not anything:
            return units, self._known.get(key, {})
        probe = Probe(self._model, original, names, leaves, spec, flags, self.batch_dim)
        with _precise(leaves):
            self._try(probe, units if packed else None, layers)
        if (
            probe.changed or not self._strict
        ):  # examples that are all the same prove nothing: the next batch tries again
            self._known[key] = probe.laws
        return units, probe.laws

    def _try(self, probe: Probe, packed: PrivacyUnits | None, layers: Sequence[LayerRoute]) -> None:
        bare = {r.name: r for r in layers if r.rule is None and not r.caught}
        ruled = {r.name for r in layers if r.rule is not None} | {r.name + CALL for r in layers if r.caught}
        targets = {name: r.targets for name, r in bare.items()}
        self.probe = probe
        try:
            # What somebody compiled would not tell the trial what its layers get.
            with eagerly, trial(self._model, probe.restore):
                if packed is not None:
                    probe.check_packed(packed, targets, self._strict)
                    return
                probe.find_laws(set(bare))
                varying = sorted(name for name in probe.varying if name in ruled or name in bare)
                if varying:
                    raise ValueError(
                        f"{', '.join(varying)}: called more or less often when there are more examples; call it once on the "
                        "whole batch"
                    )
                if self._strict:
                    probe.check_isolation()
                if bare:
                    probe.choose_copies(targets)
                spread = {n for n, law in probe.laws.items() if law.dim is None and n in ruled}
                if spread:
                    probe.check_spread(spread)
        finally:
            self.probe = None
            probe.forget()
            give_back()  # a trial leaves blocks of sizes that steps do not ask for
        self.written |= probe.written()
        validation.warn_of_loops(probe.laws, {name: r.module for name, r in bare.items()})
