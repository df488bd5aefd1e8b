"""Whose rows are whose where Opacus' users have said so: `batch_first` declares the batch dimension of every layer.

The engine's trial comes first and finds what it can. Some models cannot be tried on a few examples of their batch (packed
sequences and hidden states as inputs, bags with offsets): there the declaration holds, as it does in Opacus, and each layer's
input must have B rows in that dimension or the forward is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from fastclip import batch
from fastclip.layout import Law
from fastclip.layouts import Laws, Layouts
from fastclip.routing import LayerRoute
from fastclip.trial_runs import CannotTry
from fastclip.units import PrivacyUnits


class _Declared(Mapping[str, Law]):
    """The same law for every layer: B rows in the declared dimension."""

    def __init__(self, dim: int) -> None:
        self._law = Law(dim, True, ())

    def __getitem__(self, name: str) -> Law:
        return self._law

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class DeclaredLayouts(Layouts):
    """By trial, or as declared where the model cannot be tried, which is said once."""

    _warned = False

    def find(
        self,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        units: PrivacyUnits | None,
        shared: Sequence[str],
        layers: Sequence[LayerRoute],
    ) -> tuple[PrivacyUnits, Laws]:
        declared = _declared_units(original, args, kwargs)
        if declared is None:
            try:
                return super().find(original, args, kwargs, units, shared, layers)
            except (CannotTry, batch.UnclearBatch) as error:
                if units is not None:
                    raise
                first = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()), None)
                if first is None:
                    raise
                declared = PrivacyUnits.examples(first.shape[batch.batch_dim_of(first, self.batch_dim)])
                self._warn(str(error))
        else:
            self._warn("packed sequences and bags cannot be tried on a few examples")
        return declared if units is None else units, _Declared(self.batch_dim)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            warnings.warn(
                f"whether examples are independent in this model was not tried ({reason}); every layer's batch dimension is "
                f"taken to be {self.batch_dim}, as batch_first says",
                stacklevel=3,
            )
            self._warned = True


def _declared_units(original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> PrivacyUnits | None:
    """The examples, where the arguments are of a kind that says them itself; None for tensors with a batch dimension.

    Of a packed sequence they are numbered as it holds them, sorted by length.
    """
    packed = [
        x
        for x in tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, PackedSequence))
        if isinstance(x, PackedSequence)
    ]
    if packed:
        count, place = int(packed[0].batch_sizes[0]), packed[0].unsorted_indices
        return PrivacyUnits.examples(count) if place is None else PrivacyUnits(count, count, place.to("cpu"))
    leaves = tree_leaves((args, kwargs))
    named = zip(batch.leaf_names(original, args, kwargs), leaves, strict=True)
    bags = [x for name, x in named if name == "offsets" and isinstance(x, Tensor) and x.dim() == 1]
    return PrivacyUnits.examples(bags[0].numel()) if bags and not bags[0].is_floating_point() else None
