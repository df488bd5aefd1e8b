"""How a layer's input depends on the number of examples, and which forwards are alike in that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten, tree_map


@dataclass(frozen=True)
class Law:
    """How one layer's input depends on the number of examples.

    dim: the batch dimension of its first tensor; None if nothing grows, as for position ids. whole: that dimension is B
    itself, not a multiple. batched: for each leaf of the call, whether its dim 0 counts examples. sizes: of the tensor that
    was looked at. rank: for a module of bare parameters, the number of dimensions that its copies meet; None: row by row.
    idle: such a module's own code did not touch them (a head that shows its inner layer's bias as its own).
    """

    dim: int | None
    whole: bool
    batched: tuple[bool, ...]
    sizes: tuple[int, ...] = ()
    rank: int | None = None
    idle: bool = False

    def fits(self, x: Tensor) -> bool:
        """Whether an input looks like the one that the law was found on."""
        return x.dim() == len(self.sizes) and (self.dim is not None or (x.shape[0] == 1) == (self.sizes[0] == 1))


def primary(leaves: Sequence[Any]) -> Tensor | None:
    """The tensor that speaks for a call: its first one."""
    return next((x for x in leaves if isinstance(x, Tensor) and x.dim() > 0), None)


def growing_dim(small: Any, large: Any) -> int | None:
    """The dimension in which two tensors differ in size; None if there is none."""
    if not isinstance(small, Tensor) or not isinstance(large, Tensor) or small.dim() != large.dim():
        return None
    return next((i for i, (s, t) in enumerate(zip(small.shape, large.shape, strict=True)) if s != t), None)


def find_law(small: Sequence[Any], large: Sequence[Any]) -> Law:
    """The law of one call from its argument leaves at two and at three examples."""
    dims = [growing_dim(s, t) for s, t in zip(small, large, strict=True)]
    first = next((i for i, d in enumerate(dims) if d is not None), None)
    batched = tuple(d == 0 for d in dims)
    if first is None:
        shared = primary(large)
        return Law(None, False, batched, () if shared is None else tuple(shared.shape))
    return Law(dims[first], large[first].shape[dims[first]] == 3, batched, tuple(large[first].shape))


def packed_dim(x: Tensor, rows: int) -> int | None:
    """The dimension of x ``[N, ...]`` or ``[1, N, ...]`` that holds the packed rows; None if none does."""
    if x.dim() and x.shape[0] == rows:
        return 0
    return 1 if x.dim() > 1 and tuple(x.shape[:2]) == (1, rows) else None


def packed_rows(x: Tensor, rows: int) -> Tensor | None:
    """x ``[N, ...]`` or ``[1, N, ...]`` as ``[N, ...]``; None if it does not hold the packed rows."""
    dim = packed_dim(x, rows)
    return None if dim is None else x[0] if dim else x


def call_key(model: nn.Module, leaves: Sequence[Any], spec: Any, examples: int | None) -> tuple[Any, ...]:
    """Equal for forwards that run the same code: same structure, kinds of tensors, switches, training modes.

    examples: B, or None for packed rows. One example is a kind of its own: with it, every size of 1 could be the batch.
    """
    kinds = tuple((x.dim(), x.dtype) if isinstance(x, Tensor) else x if _is_switch(x) else type(x) for x in leaves)
    return str(spec), kinds, tuple(m.training for m in model.modules()), None if examples is None else examples == 1


def _is_switch(x: Any) -> bool:
    return x is None or isinstance(x, bool | str)


def padded(tree: Any) -> Any:
    """The same with every PackedSequence as a tensor ``[B, T, ...]``, whose rows can be told apart."""
    return tree_map(
        lambda x: pad_packed_sequence(x, batch_first=True)[0] if isinstance(x, PackedSequence) else x,
        tree,
        is_leaf=lambda x: isinstance(x, PackedSequence),
    )


def unpacked(tree: Any) -> Any:
    """The same without its PackedSequences."""
    return tree_map(
        lambda x: None if isinstance(x, PackedSequence) else x, tree, is_leaf=lambda x: isinstance(x, PackedSequence)
    )


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Leaves and structure of a call."""
    return tree_flatten((args, kwargs))
