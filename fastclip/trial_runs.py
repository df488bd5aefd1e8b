"""How a model is run on its first batch and on changes of it: what its layers read, what comes out, what goes back.

The same buffers and random state every time, and no dropout, so that two runs differ by their inputs alone. What has to hold
between them is asked in trial.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from fastclip.batch import batch_dim_of
from fastclip.copies import Run
from fastclip.coupling import Arrival, Taps, check_same_layers, coupled
from fastclip.layout import padded
from fastclip.recomputation import differentiable
from fastclip.trial_modes import NoDropout, Picks
from fastclip.trial_values import change, output_leaves


class CannotTry(ValueError):
    """The model does not run on a few examples of its batch."""


class Runs:
    """Layers report here (``see``) while the model runs under it.

    names, leaves, spec, batched: the call's arguments, and which of them carry the batch (packed rows).
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Run,
        names: Sequence[str],
        leaves: Sequence[Any],
        spec: Any,
        batched: Sequence[bool],
        batch_dim: int = 0,
    ) -> None:
        self._model, self._forward, self._spec = model, forward, spec
        self._batch_dim = batch_dim  # of the arguments
        self._names, self._leaves, self._batched = names, leaves, batched
        self._buffers = {name: b.clone() for name, b in model.named_buffers()}
        self._left: dict[str, Tensor] = {}  # buffers as the last run left them
        self._picks = Picks()
        self._picker: str | None = None  # the first layer that runs on rows picked by what they hold
        self._keep: Callable[[str, Tensor], Tensor] | None = None  # what is kept of each layer's input
        self._seen: dict[str, list[list[Any]]] = {}
        self._visit: Callable[[str, Run, Any], Any] | None = None  # another thing to do at each layer
        self._taps: Taps | None = None  # on what layers answer with, where a run is to be differentiated
        self.changed = False  # whether there were two different inputs to compare

    def see(self, name: str, forward: Run, args: Any) -> Any:
        """Called by every layer in place of its forward; args is (args, kwargs)."""
        if self._picks.seen and self._picker is None:
            self._picker = name
        if self._visit is not None:
            return self._visit(name, forward, args)
        if self._keep is not None:
            leaves = tree_leaves(padded(args))
            kept = [self._keep(name, x.detach()).clone() if isinstance(x, Tensor) else None for x in leaves]
            self._seen.setdefault(name, []).append(kept)
        out = forward(*args[0], **args[1])
        return out if self._taps is None else self._taps.tap(name, out)

    def _call(self, inputs: Sequence[Any], keep: Callable[[str, Tensor], Tensor] | None) -> list[Any]:
        """Output leaves of the model on these argument leaves, from the same buffers and random state every time."""
        # Some models write into their inputs.
        args, kwargs = tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in inputs], self._spec)
        self._seen, self._keep = {}, keep
        self.restore()
        torch.manual_seed(0)
        try:
            with NoDropout(), self._picks:
                out = self._forward(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError) as error:
            if self._visit is not None:
                raise
            raise CannotTry(
                f"the model could not run on a few examples of its first batch ({type(error).__name__}: {error}): expand "
                "inputs to one row per example, or name those that belong to all by clipper.units(..., shared=[...])"
            ) from error
        finally:
            self._keep = None
        self._left = {name: b.clone() for name, b in self._model.named_buffers()}
        return output_leaves(padded(out), set())

    def restore(self) -> None:
        for name, b in self._model.named_buffers():
            if name in self._buffers and not torch.equal(b, self._buffers[name]):
                b.copy_(self._buffers[name])

    def run(
        self, examples: int, changed: Sequence[int] = (), record: bool = False, strongly: Sequence[int] = (1, 2)
    ) -> list[Any]:
        """Output leaves for the first ``examples`` examples (repeated if there are fewer), some of them changed."""
        return self._call(self._inputs(examples, changed, strongly), (lambda _name, x: x) if record else None)

    def _inputs(self, examples: int, changed: Sequence[int], strongly: Sequence[int]) -> list[Any]:
        inputs = []
        for name, leaf, is_batched in zip(self._names, self._leaves, self._batched, strict=True):
            if is_batched:
                dim = batch_dim_of(leaf, self._batch_dim)
                others = leaf.detach().movedim(dim, 0)
                leaf = others[torch.arange(examples, device=leaf.device) % others.shape[0]]
                for i in changed:
                    other = change(name, leaf[i], others, strongly=i in strongly)
                    self.changed = self.changed or not torch.equal(other, leaf[i])
                    leaf[i] = other
                leaf = leaf.movedim(0, dim)
            inputs.append(leaf)
        return inputs

    def _tapped(self, inputs: Sequence[Any]) -> tuple[list[Any], Taps]:
        """The model's output leaves with their graph, and the taps in it."""
        self._taps = taps = Taps()
        try:
            with torch.enable_grad(), differentiable():
                return self._call(inputs, None), taps
        finally:
            self._taps = None

    def _differentiate(self, inputs: Sequence[Any], weigh: Callable[[int, Tensor], Tensor], arrive: Arrival) -> Taps:
        """Shows the gradients of the model's weighed output leaves at all layers' outputs. weigh: weights of leaf i."""
        out, taps = self._tapped(inputs)
        with NoDropout(), differentiable():
            taps.differentiate(out, weigh, arrive)
        return taps

    def _gradients(
        self, inputs: Sequence[Any], weigh: Callable[[int, Tensor], Tensor]
    ) -> tuple[list[str], dict[int, Tensor]]:
        """Names of layers by the numbers of their outputs, and the gradients that arrive there."""
        found: dict[int, Tensor] = {}
        return self._differentiate(inputs, weigh, found.__setitem__).names, found

    def _same_gradients(
        self,
        names: Sequence[str],
        plain: Mapping[int, Tensor],
        inputs: Sequence[Any],
        weigh: Callable[[int, Tensor], Tensor],
        alike: Callable[[int, Tensor, Tensor], bool],
    ) -> None:
        """Raises ValueError unless the same layers answer, and every gradient arrives again, ``alike`` to the one before."""
        missing, unlike = set(plain), set[int]()

        def compare(number: int, g: Tensor) -> None:
            if number in plain:
                missing.discard(number)
                if not alike(number, plain[number], g):
                    unlike.add(number)

        check_same_layers(names, self._differentiate(inputs, weigh, compare).names)
        if missing or unlike:
            raise ValueError(coupled(names[min(missing | unlike)]))

    def written(self) -> set[str]:
        """Buffers that the last run wrote."""
        start = self._buffers
        return {name for name, b in self._left.items() if name not in start or not torch.equal(b, start[name])}

    @contextmanager
    def _visiting(self, visit: Callable[[str, Run, Any], Any]) -> Iterator[None]:
        self._visit = visit
        try:
            yield
        finally:
            self._visit = None
