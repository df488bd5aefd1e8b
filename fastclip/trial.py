"""The trial of a model on its first batch: which dimension of which layer's input counts examples, and do they mix.

Nothing is guessed from one shape. The model runs without gradients and without dropout on two of the batch's examples,
on three, on three with one changed (the first, then the last), and on the whole batch. The dimension of a layer's input
that grows with the number of examples is its batch dimension, whatever other sizes happen to equal B; a change in one
example must reach no row of another at any layer's input or at the output; three examples must have the same rows alone
as in the whole batch; an output without a batch dimension (a loss) must be a sum of one term an example. The gradients that
go back from the output are tried in the same way (coupling.py). Modules that use parameters in code of their own are tried
with copies (copies.py).

Not seen here: what happens behind the model's output (check_units), code that runs only for content that the first batch and
its changes do not have, and what the lengths of a packed batch's segments do to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastclip.batch import batch_dim_of
from fastclip.copies import Run, choose, no_batch_dim, same
from fastclip.coupling import check_same_layers, weights
from fastclip.layers.bare import Targets
from fastclip.layout import Law, find_law, growing_dim, packed_dim, packed_rows
from fastclip.trial_runs import CannotTry, Runs
from fastclip.trial_values import (
    OTHER_SHAPE,
    SAME_SHAPE,
    adds_up,
    all_short,
    change,
    in_common,
    is_float,
    rows_same,
    shorter,
)
from fastclip.units import PrivacyUnits


class Probe(Runs):
    """What must hold between the trial runs, and what was found of each layer. Arguments as :class:`Runs`'."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._small_out: list[Any] = []
        self._plain_out: list[Any] = []  # three examples as they are: output leaves, and inputs of layers
        self._plain_seen: dict[str, list[list[Any]]] = {}
        self.laws: dict[str, Law] = {}
        self.varying: set[str] = set()  # layers whose number of calls depends on the number of examples

    def forget(self) -> None:
        """Let go of what was compared."""
        self._seen, self._plain_seen, self._small_out, self._plain_out = {}, {}, [], []

    def find_laws(self, bare: set[str]) -> None:
        """Fill ``laws``; comes before every other trial. bare: names of modules that use parameters of their own.

        Raises ValueError where two calls of one layer disagree.
        """
        self._small_out = self.run(2, record=True)
        small = self._seen
        self._plain_out = self.run(3, record=True)
        self._plain_seen = self._seen
        for name, calls in self._plain_seen.items():
            if len(small.get(name, [])) != len(calls):
                self.varying.add(name)
                continue
            found = [find_law(s, t) for s, t in zip(small[name], calls, strict=True) if len(s) == len(t)]
            kinds = {(law.dim, law.whole, len(law.sizes) if name in bare else None) for law in found}
            if len(kinds) > 1:
                raise ValueError(
                    f"{name or 'the model'} is called on inputs of different layouts in one forward (with and without a batch "
                    "dimension, or with other ranks): use two modules, or expand the input to the batch"
                )
            if found:
                self.laws[name] = found[0]

    def check_isolation(self) -> None:
        """Raises ValueError if examples mix in the model, or if rows move between examples by what they hold."""
        left = self._left
        for changed in ((0,), (1,), (2,)):
            out = self.run(3, changed=changed, record=True)
            self._compare(self._seen, out, changed[0])
            if any(not torch.equal(left[name], b) for name, b in self._left.items() if name in left):
                raise ValueError(
                    "the model writes what it sees into a buffer, which would be published without noise: do not"
                )
        self._check_lengths()
        self._check_additive()
        self._check_whole_batch()
        self._check_backward()
        if self._picks.seen:
            raise ValueError(
                f"before {self._picker or 'its output'} the model picks rows by what they hold (a mask as index, nonzero), so "
                "that whose they are differs from batch to batch: pick one row per example by its index, x[arange(B), index]"
            )

    def _compare(self, seen: dict[str, list[list[Any]]], out: list[Any], changed: int) -> None:
        others = [i for i in range(3) if i != changed]
        for name, calls in self._plain_seen.items():
            law = self.laws.get(name)
            new_calls = seen.get(name, [])
            if law is not None and len(new_calls) != len(calls):
                raise ValueError(
                    f"how often {name or 'the model'} runs depends on what an example holds: run it always"
                )
            for old, new in zip(calls, new_calls, strict=False):
                for x, y in zip(old, new, strict=False):
                    if law is None or not isinstance(x, Tensor):
                        continue
                    dim = law.dim if law.dim is not None and law.dim < x.dim() and x.shape[law.dim] % 3 == 0 else None
                    if not rows_same(x, y, dim, others):
                        raise ValueError(
                            f"examples are not independent at the input of {name or 'the model'}: changing one example "
                            "changed the rows of another (or dim 0 is not the batch). Remove what mixes examples, give "
                            "batch-first inputs, or name the units by clipper.units(...)"
                        )
        for small, x, y in zip(self._small_out, self._plain_out, out, strict=True):
            dim = growing_dim(small, x)
            if dim is not None and not rows_same(x, y, dim, others):
                raise ValueError("examples are not independent: changing one changed the output of another")

    def _check_lengths(self) -> None:
        """How long the longest example is must not reach the others, as padding to it would."""
        pad = getattr(getattr(self._model, "config", None), "pad_token_id", None)
        found = all_short(self._names, self._inputs(3, (), ()), self._batched, pad if isinstance(pad, int) else None)
        if found is not None:
            one, none, longest = found
            with suppress(CannotTry):  # lengths that have to be in order, or as a mask says
                long, short = self._call(one, None), self._call(none, None)
                for small, x, y in zip(self._small_out, long, short, strict=True):
                    self._need_same(small, x, y, [i for i in range(3) if i != longest])

    def _need_same(self, small: Any, x: Any, y: Any, others: Sequence[int]) -> None:
        dim = growing_dim(small, x)
        sides = (in_common(x, y, dim, left) for left in (True, False)) if dim is not None else ()
        if dim is not None and not any(rows_same(*side, dim, others, OTHER_SHAPE) for side in sides):
            raise ValueError(
                "examples are not independent: how long another one is changes an example's output (padding that is not "
                "masked): leave out what stands behind an example's end"
            )

    def _check_additive(self) -> None:
        """Losses that the model computes itself: changing two examples changes them by what changing each does."""
        pairs = enumerate(zip(self._small_out, self._plain_out, strict=True))
        losses = [i for i, (small, x) in pairs if is_float(x) and x.numel() and growing_dim(small, x) is None]
        if not losses:
            return
        first, last, both = (self.run(3, changed=c, strongly=(0, 2)) for c in ((0,), (2,), (0, 2)))
        for i in losses:
            if not adds_up(*(run[i] for run in (self._plain_out, first, last, both))):
                raise ValueError(
                    "examples are not independent in the loss that the model returns (a mean over the batch's tokens, "
                    "negatives from the batch): compute one loss per example from its logits, as fastclip.huggingface does"
                )

    def _check_backward(self) -> None:
        """Changing one example, and the gradient that comes back to it, changes no other's gradient at any layer.

        On the beginning of long sequences: forwards were compared in full, and a backward takes most of a trial's time.
        """
        self._seen, self._plain_seen = {}, {}  # as large as activations, and done with
        whole = self._leaves
        self._leaves = shorter(whole, self._batched, self._batch_dim)
        try:
            self._compare_gradients()
        except CannotTry:
            self._leaves = whole
            self._compare_gradients()
        finally:
            self._leaves = whole

    def _compare_gradients(self) -> None:
        small = self._tapped(self._inputs(2, (), ()))[1]
        dims = [growing_dim(s, x) for s, x in zip(self._small_out, self._plain_out, strict=True)]
        names, plain = self._gradients(self._inputs(3, (), ()), partial(_weigh_rows, dims, ()))
        check_same_layers(small.names, names)
        for changed in (0, 2):
            rest = [i for i in range(3) if i != changed]

            def alike(number: int, x: Tensor, y: Tensor, rest: Sequence[int] = rest) -> bool:
                dim = next((i for i, n in enumerate(small.shapes[number]) if n != x.shape[i]), None)
                return dim is None or rows_same(x, y, dim, rest, OTHER_SHAPE)

            inputs = self._inputs(3, (changed,), (2,))
            self._same_gradients(names, plain, inputs, partial(_weigh_rows, dims, (changed,)), alike)

    def _check_whole_batch(self) -> None:
        """Three examples have the same rows in the whole batch as alone."""
        batched = (x for x, b in zip(self._leaves, self._batched, strict=True) if b)
        examples = next((x.shape[batch_dim_of(x, self._batch_dim)] for x in batched), 0)
        if examples <= 3:
            return

        def first_three(name: str, x: Tensor) -> Tensor:
            law = self.laws.get(name)
            if law is None or law.dim is None or law.dim >= x.dim() or x.shape[law.dim] % examples:
                return x[:0] if x.dim() else x
            return x.narrow(law.dim, 0, 3 * (x.shape[law.dim] // examples))

        out = self._call(self._leaves, first_three)
        for small, x, y in zip(self._small_out, self._plain_out, out, strict=True):
            dim = growing_dim(small, x)
            if dim is None or not isinstance(y, Tensor) or y.dim() != x.dim():
                continue
            if y.shape[dim] == examples * x.shape[dim] // 3:
                self._need_same(small, x, y.narrow(dim, 0, x.shape[dim]), range(3))
        for name, calls in self._plain_seen.items():
            for old, new in zip(calls, self._seen.get(name, []), strict=False):
                for x, y in zip(old, new, strict=False):
                    if isinstance(x, Tensor) and y.numel() and x.shape == y.shape and not same(x, y, OTHER_SHAPE):
                        raise ValueError(
                            f"examples are not independent at the input of {name or 'the model'}: three examples have other "
                            "rows in the whole batch than alone"
                        )

    def check_packed(self, units: PrivacyUnits, bare: dict[str, Targets], strict: bool) -> None:
        """The same for a packed batch, whose rows cannot be fewer or more: one unit's rows change, no other's may.

        bare: modules of bare parameters by name. Raises ValueError where rows mix, or where copies would not do.
        """
        assert units.row_offsets is not None
        bounds, rows = units.row_offsets.tolist(), int(units.row_offsets[-1])
        segments = [(i, j) for i, j in pairwise(bounds) if j > i]
        self._plain_out = self._call(self._leaves, lambda _name, x: x)
        self._plain_seen = self._seen
        names, plain = self._gradients(self._leaves, partial(_weigh_packed, rows, ())) if strict else ([], {})
        for k, (start, stop) in enumerate([segments[0], segments[len(segments) // 2], segments[-1]]):
            inputs = [
                self._change_rows(name, x, rows, start, stop, k > 0) if flag else x
                for name, x, flag in zip(self._names, self._leaves, self._batched, strict=True)
            ]
            out = self._call(inputs, lambda _name, x: x)
            keep = [*range(start), *range(stop, rows)]
            pairs = [("its output", x, y) for x, y in zip(self._plain_out, out, strict=True)]
            for name, calls in self._plain_seen.items():
                for old, new in zip(calls, self._seen.get(name, []), strict=False):
                    pairs += [(name or "the model", x, y) for x, y in zip(old, new, strict=False)]
            for where, x, y in pairs:
                x, y = (packed_rows(t, rows) if isinstance(t, Tensor) else None for t in (x, y))
                if strict and x is not None and y is not None and not same(x[keep], y[keep], SAME_SHAPE):
                    raise ValueError(f"segments of the packed batch are not independent at {where}")
            if strict:

                def alike(_number: int, x: Tensor, y: Tensor, keep: Sequence[int] = keep) -> bool:
                    kept = [t if t is None else t[keep] for t in (packed_rows(x, rows), packed_rows(y, rows))]
                    return kept[0] is None or (kept[1] is not None and same(kept[0], kept[1], OTHER_SHAPE))

                self._same_gradients(names, plain, inputs, partial(_weigh_packed, rows, range(start, stop)), alike)
        self.changed = self.changed and len(segments) > 1
        for name in bare:
            if name in self._plain_seen:
                call = self._plain_seen[name][0]
                first = next(i for i, x in enumerate(call) if x is not None)
                batched = tuple(i == first for i in range(len(call)))
                self.laws[name] = Law(0, True, batched, tuple(call[first].shape))
        self._choose_packed(bare, rows)

    def _change_rows(self, name: str, x: Tensor, rows: int, start: int, stop: int, strongly: bool) -> Tensor:
        out = x.detach().clone()
        flat = packed_rows(out, rows)
        assert flat is not None
        own = flat[start:stop].movedim(0, -1)
        new = change(name, own, flat.movedim(0, -1)[None], strongly).movedim(-1, 0)
        self.changed = self.changed or not torch.equal(new, flat[start:stop])
        flat[start:stop] = new
        return out

    def _choose_packed(self, bare: dict[str, Targets], rows: int) -> None:
        def visit(name: str, forward: Run, args: Any) -> Any:
            if name in bare and self.laws[name].rank is None:
                leaves, spec = tree_flatten(args)
                flat = [packed_rows(x, rows) if b else x for x, b in zip(leaves, self.laws[name].batched, strict=True)]
                law = choose(name, self.laws[name], bare[name], forward, tree_unflatten(flat, spec))
                if law.rank is None and not law.idle:
                    raise ValueError(f"{name or 'the model'}: its own parameters cannot be followed in a packed batch")
                self.laws[name] = law
            return forward(*args[0], **args[1])

        with self._visiting(visit):
            self._call(self._leaves, None)

    def choose_copies(self, bare: dict[str, Targets]) -> None:
        """Decide how the modules of bare parameters are run. Raises ValueError for one where neither way is right."""
        chosen: dict[str, Law] = {}

        def visit(name: str, forward: Run, args: Any) -> Any:
            if name in bare and name in self.laws and name not in chosen:
                self._visit = lambda _name, inner, inner_args: inner(*inner_args[0], **inner_args[1])
                chosen[name] = choose(name, self.laws[name], bare[name], forward, args)
                self._visit = visit
            return forward(*args[0], **args[1])

        with self._visiting(visit):
            self.run(3)
        self.laws.update(chosen)

    def check_spread(self, names: set[str]) -> None:
        """Try layers whose input has no batch dimension with an output that has one. Raises ValueError if that differs.

        The output of such a layer (learned positions, say) is repeated once an example, so that its gradient arrives per
        example. That must leave the model's output as it was, and one example's copy must reach that example alone.
        """

        def spread(moved: Callable[[Tensor, Tensor], Tensor]) -> Callable[[str, Run, Any], Any]:
            def visit(seen: str, forward: Run, args: Any) -> Any:
                out = forward(*args[0], **args[1])
                if seen not in names:
                    return out
                generator = torch.Generator().manual_seed(len(seen))
                delta = torch.randn(out.shape, generator=generator).to(out) * (0.1 * out.abs().mean() + 0.01)
                return moved(out, delta)

            return visit

        def one_copy(out: Tensor, delta: Tensor) -> Tensor:
            copies = out.expand(3, *out.shape[1:]) if out.shape[0] == 1 else out.expand(3, *out.shape)
            copies = copies.clone()
            copies[0] += delta[0] if out.shape[0] == 1 else delta
            return copies

        results = []
        for moved in (lambda out, delta: out + delta, one_copy):
            try:
                with self._visiting(spread(moved)):
                    results.append(self.run(3))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ValueError(no_batch_dim(names)) from error
        everywhere, here = results
        for x, y, z in zip(self._plain_out, everywhere, here, strict=True):
            if isinstance(x, Tensor) and (not isinstance(z, Tensor) or x.shape != z.shape):
                raise ValueError(no_batch_dim(names))
            if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != 3:
                continue
            if not same(x[1:], z[1:]) or not same(y[:1], z[:1]):
                raise ValueError(no_batch_dim(names))


def _weigh_rows(dims: Sequence[int | None], changed: Sequence[int], leaf: int, x: Tensor) -> Tensor:
    return weights(x, dims[leaf], 3, changed)


def _weigh_packed(rows: int, changed: Sequence[int], _leaf: int, x: Tensor) -> Tensor:
    return weights(x, packed_dim(x, rows), rows, changed)
