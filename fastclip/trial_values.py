"""What a trial gives to a model, and how it compares what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastclip.copies import same

# Runs of one shape go through the same kernels: what remains is another path through attention for another mask.
SAME_SHAPE = 1e-5
OTHER_SHAPE = 1e-4
LONGEST = 128


def change(name: str, x: Tensor, others: Tensor, strongly: bool) -> Tensor:
    """Another value of the same kind for one example x ``[...]``: valid ids stay valid, masks stay masks.

    name: the argument's. others: ``[n, ...]``, the batch's own rows. strongly: grow values instead of shrinking them, end a
    mask of ones earlier, ignore half of the labels.
    """
    if "length" in name:
        return x  # must fit the rest of the example, and may have to be in order
    if x.is_floating_point():
        flipped = x.flip(-1) if x.dim() else x
        return flipped * -3 + 0.5 if strongly else flipped * 0.9 + 0.05
    half = x.shape[-1] // 2 if x.dim() else 0
    if strongly and half and ("mask" in name or "label" in name):
        x = x.clone()
        x[..., half:] = 0 if "mask" in name else -100
        return x
    candidates = [x.flip(-1)] if x.dim() else []
    candidates += [row for row in others if row.shape == x.shape]
    if others.dtype != torch.bool and "mask" not in name:
        # Other values, not only another order: what only adds rows up would not notice that.
        # Ignored labels stay ignored: half way between them and the rest nothing is valid.
        valid = others[others != -100]
        low, high = (int(valid.min()), int(valid.max())) if valid.numel() else (0, 0)
        candidates = [torch.where(x == -100, x, low + high - x), *candidates]
        candidates += [torch.full_like(x, low), torch.full_like(x, high)]
    return next((c for c in candidates if not torch.equal(c, x)), x)


def shorter(leaves: Sequence[Any], batched: Sequence[bool], batch_dim: int) -> list[Any]:
    """The same call with sequences cut to their first LONGEST tokens, where there are token ids ``[B, T]`` longer than that.

    Every dimension of that size is cut, but the batch's: whoever calls this runs the whole call if the model refuses this one.
    """
    ids = (x for x, b in zip(leaves, batched, strict=True) if b and x.dim() == 2 and not x.is_floating_point())
    length = next((x.shape[1 - batch_dim] for x in ids), 0)
    if length <= LONGEST:
        return list(leaves)
    out = []
    for x, is_batched in zip(leaves, batched, strict=True):
        for dim in range(x.dim()) if isinstance(x, Tensor) else ():
            if x.shape[dim] == length and not (is_batched and dim == batch_dim):
                x = x.narrow(dim, 0, LONGEST)
        out.append(x)
    return out


def all_short(
    names: Sequence[str], leaves: Sequence[Any], batched: Sequence[bool], pad: int | None
) -> tuple[list[Any], list[Any], int] | None:
    """Two calls of three examples, and the one of these that is cut in the second call alone; in both the others are cut.

    What is cut: lengths ``[3]``, masks ``[3, T]``, and, with a ``pad``, token ids. None where no example could be.
    """
    one, none = list(leaves), list(leaves)
    sizes: list[tuple[int, Tensor, Tensor]] = []  # argument, each example's length, as it is cut
    for i, (name, x, is_batched) in enumerate(zip(names, leaves, batched, strict=True)):
        if not is_batched or not isinstance(x, Tensor) or x.is_floating_point():
            continue
        if x.dim() == 1 and "len" in name and x.dtype != torch.bool:
            sizes.append((i, x, x.min().clamp(min=2).div(2, rounding_mode="floor").expand(3).to(x)))
        elif x.dim() == 2 and x.shape[1] > 1 and ("mask" in name or (pad is not None and name == "input_ids")):
            short = x.clone()
            short[:, x.shape[1] // 2 :] = 0 if "mask" in name or pad is None else pad
            sizes.append((i, x, short))
    longest = next((int(x.reshape(3, -1).long().sum(1).argmax()) for _, x, _ in sizes), 0)
    changed = False
    for i, x, short in sizes:
        none[i], one[i] = short, short.clone()
        one[i][longest] = x[longest]
        changed = changed or not torch.equal(none[i], one[i])
    return (one, none, longest) if changed else None


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def adds_up(plain: Tensor, first: Any, last: Any, both: Any) -> bool:
    """Whether changing both examples changes every element by what changing each of them does."""
    if any(not is_float(x) or x.shape != plain.shape for x in (first, last, both)):
        return False
    p, f, b, t = values = [x.double() for x in (plain, first, last, both)]
    return not bool(((p + t - f - b).abs() > 1e-3 * torch.stack(values).abs().amax(0)).any())


def output_leaves(out: Any, inside: set[int]) -> list[Any]:
    """Everything in a model's output, also in containers that torch does not know (a loss in a namespace is a loss).

    inside: ids of the objects around this one, so that a cycle ends.
    """
    leaves = tree_leaves(out)
    if len(leaves) != 1 or leaves[0] is not out:
        return [leaf for part in leaves for leaf in output_leaves(part, inside)]
    if out is None or isinstance(out, Tensor | nn.Module | type | str) or callable(out) or id(out) in inside:
        return [out]
    parts = list(out.values()) if isinstance(out, Mapping) else []
    parts += vars(out).values() if hasattr(out, "__dict__") else []
    if is_dataclass(out):
        parts += [getattr(out, f.name) for f in fields(out) if not hasattr(out, "__dict__")]
    if not parts and isinstance(out, list | tuple | set | frozenset):
        parts = list(out)
    return [leaf for part in parts for leaf in output_leaves(part, inside | {id(out)})] if parts else [out]


def in_common(x: Tensor, y: Any, batch_dim: int, left: bool) -> tuple[Tensor, Any]:
    """Both as far as both go, from the left or the right, in every dimension but the batch's.

    What pads its output, on either side, pads it for the longest example.
    """
    if not isinstance(y, Tensor) or x.dim() != y.dim():
        return x, y
    for dim in range(x.dim()):
        if dim != batch_dim:
            size = min(x.shape[dim], y.shape[dim])
            x, y = (t.narrow(dim, 0 if left else t.shape[dim] - size, size) for t in (x, y))
    return x, y


def rows_same(x: Tensor, y: Any, dim: int | None, examples: Sequence[int], tolerance: float = SAME_SHAPE) -> bool:
    """Whether the rows of these of three examples are the same; without a batch dimension, whether all is."""
    if not isinstance(y, Tensor) or x.shape != y.shape:
        return False
    if dim is None:
        return same(x, y, tolerance)
    if x.shape[dim] % 3:
        return False  # nobody can say whose its rows are
    x, y = (t.movedim(dim, 0).unflatten(0, (3, -1)) for t in (x, y))
    return all(same(x[i], y[i], tolerance) for i in examples)
