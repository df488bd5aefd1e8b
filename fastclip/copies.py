"""Whether a module of bare parameters can run once with a copy of each parameter a row, found out by running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastclip.layers.bare import Targets, as_copies, params_of, shadowed
from fastclip.layout import Law

Run = Callable[..., Any]
_PIECE = 1 << 22


def same(x: Tensor, y: Tensor, tolerance: float = 1e-4) -> bool:
    """Equal up to what another order of summation may change: ``tolerance`` of the largest value, more in 16 bit."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if torch.equal(x, y):  # mostly so, and known in one pass
        return True
    if not x.is_floating_point():
        return False
    if x.dtype not in (torch.float32, torch.float64):
        tolerance = max(3e-2, tolerance)
    scale = max((float(piece.abs().nan_to_num_(0.0, 0.0).max()) for (piece,) in _pieces(x)), default=0.0)
    atol = tolerance * scale + 1e-30
    return all(torch.allclose(p, q, rtol=0.0, atol=atol, equal_nan=True) for p, q in _pieces(x, y))


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in pieces: logits are large, and comparing them takes several copies."""
    if tensors[0].numel() <= _PIECE or tensors[0].shape[0] == 0:
        yield from [tensors] if tensors[0].numel() else []
        return
    for parts in zip(*(x.unbind(0) for x in tensors), strict=True):
        yield from _pieces(*parts)


def no_batch_dim(names: set[str]) -> str:
    return (
        f"{', '.join(sorted(names))}: the input has no batch dimension, and a copy of the output for each example does not "
        "fit what the model does with it. Expand its input to the batch, [B, ...], before the layer"
    )


class _Watched(dict[str, nn.Parameter | None]):
    """A module's parameters, with a note of whether anybody asked for one."""

    read = False

    def __getitem__(self, name: str) -> nn.Parameter | None:
        self.read = True
        return super().__getitem__(name)

    def items(self) -> Any:
        self.read = True
        return super().items()


@contextmanager
def _watching(targets: Targets) -> Iterator[list[_Watched]]:
    plain = {holder: holder._parameters for holder, _ in targets}
    watched = {holder: _Watched(own) for holder, own in plain.items()}
    for holder, own in watched.items():
        holder.__dict__["_parameters"] = own
    try:
        yield list(watched.values())
    finally:
        for holder in plain:
            holder.__dict__["_parameters"] = plain[holder]


def _idle(targets: Targets, forward: Run, args: Any) -> bool:
    """Whether the module's code asks for none of its parameters. One that it has from elsewhere meets the guard."""
    with _watching(targets) as watched:
        forward(*args[0], **args[1])
    return not any(own.read for own in watched)


def choose(name: str, law: Law, targets: Targets, forward: Run, args: Any) -> Law:
    """The law with the rank that the module's copies meet, or with None: row by row. Or idle."""
    if _idle(targets, forward, args):
        return replace(law, idle=True)
    leaves = tree_leaves(args)
    batch = next((x for x, b in zip(leaves, law.batched, strict=True) if b), None)
    params = [p.detach() for p in params_of(targets)]
    rows = 3 if batch is None else batch.shape[0]
    moved = [p + torch.randn_like(p) * (0.1 * p.abs().mean() + 0.01) for p in params]

    def run(tensors: Sequence[Tensor]) -> list[Any]:
        torch.manual_seed(1)
        with shadowed(targets, tensors):
            return tree_leaves(forward(*args[0], **args[1]))

    plain, elsewhere = run(params), run(moved)
    base = max((p.dim() for p in params), default=0) if batch is None else batch.dim()
    for rank in (base, base + 1):
        copies = [p.expand(rows, *p.shape).clone() for p in params]
        try:
            equal = run([as_copies(c, p.shape, rank) for c, p in zip(copies, params, strict=True)])
            for c, m in zip(copies, moved, strict=True):
                c[0] = m
            one = run([as_copies(c, p.shape, rank) for c, p in zip(copies, params, strict=True)])
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            continue
        if _copies_hold(plain, elsewhere, equal, one, rows, spread=batch is None):
            return replace(law, rank=rank)
    if batch is None:
        raise ValueError(no_batch_dim({name}))
    return law


def _copies_hold(
    plain: list[Any], elsewhere: list[Any], equal: list[Any], one: list[Any], rows: int, spread: bool
) -> bool:
    checked = False
    for p, e, q, o in zip(plain, elsewhere, equal, one, strict=True):
        if not isinstance(p, Tensor) or p.dim() == 0 or not p.is_floating_point():
            continue
        if spread:  # the module's output had no batch dimension and has one now
            p, e = (t.expand(rows, *(t.shape[1:] if t.shape[0] == 1 else t.shape)) for t in (p, e))
        if p.shape[0] != rows:
            continue
        if not same(p, q) or not same(p[1:], o[1:]) or not same(e[:1], o[:1]):
            return False
        checked = True
    return checked
