"""What stands in a module's ``forward`` while a clipper is attached.

The objects live in the instance's ``__dict__``, so class, ``state_dict`` and parameters stay as they are; a pickled or
deep-copied module finds its own class's forward again and is plain.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves

from fastclip.backward import in_backward
from fastclip.batch import batch_dim_of
from fastclip.compiled import is_operator, traced
from fastclip.layer_operators import Call, new_key
from fastclip.layers.bare import Targets, params_of, run_copies, run_loop
from fastclip.layers.calls import Catch, caught_by_function, run_caught
from fastclip.layers.registry import Rule
from fastclip.layers.site import Site
from fastclip.layout import Law, packed_rows, primary
from fastclip.recomputation import running

if TYPE_CHECKING:
    from fastclip.forward import Forward
    from fastclip.module import Clipper


CALL = "()"  # behind a module's name: the caught call inside it
_local = threading.local()


class Held(NamedTuple):
    """A layer's call that did not run: its input, and whose rows those are (None where nothing in it is trained)."""

    site: Site | None
    input: Tensor


class HeldBack:
    """What happened to a layer that is held back. calls: those of the forward itself; tried: so was it in a trial."""

    def __init__(self) -> None:
        self.calls: list[Held] = []
        self.tried = False


@contextmanager
def held_back(layer: nn.Module) -> Iterator[HeldBack]:
    """While it lasts, this thread's calls of an attached model's layer give back their input, and are noted instead.

    In a trial too, which has then tried everything but the layer itself; not where autograd is off otherwise.
    """
    outer = getattr(_local, "held", {})
    found = HeldBack()
    _local.held = {**outer, layer: found}
    try:
        yield found
    finally:
        _local.held = outer


class Route:
    """A callable in place of one method of one module."""

    def __init__(self, clipper: Clipper, module: nn.Module, method: str = "forward") -> None:
        self.clipper = clipper
        self.module = module
        self.method = method
        self.original = getattr(module, method)
        self.replaced = module.__dict__.get(method)
        module.__dict__[method] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, self.method)

    def remove(self) -> None:
        """Put back what was there; where somebody wrapped this object meanwhile, it only passes calls on from now."""
        if self.module.__dict__.get(self.method) is self:
            if self.replaced is None:
                del self.module.__dict__[self.method]
            else:
                self.module.__dict__[self.method] = self.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class RootRoute(Route):
    """The attached model's forward: finds the units of the batch, then runs the model."""

    @partial(_disable_dynamo, recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        clipper = self.clipper
        if not clipper.attached or not torch.is_grad_enabled() or clipper.layouts.probe is not None:
            return self.original(*args, **kwargs)
        begun = clipper.begin_forward(self.original, args, kwargs)
        if begun is None:
            return self.original(*args, **kwargs)
        forward, written = begun
        try:
            clipper.forwards.begin(forward)
            with running(forward):
                out = self.original(*args, **kwargs)
        except BaseException as error:
            clipper.end_forward(forward)
            if isinstance(error, RuntimeError) and forward.units.num_units == 0:
                raise RuntimeError(
                    "this model cannot run on an empty batch: leave out its forward and backward, and call the optimizer's "
                    "step() all the same, for an empty draw gets its noise too"
                ) from error
            raise
        clipper.end_forward(forward, written)
        return out


def is_running(clipper: Clipper) -> bool:
    """Whether this thread is inside a forward of the clipper's model, other than the call that asks."""
    frame, calls = sys._getframe().f_back, 0
    while frame is not None and calls < 2:
        route = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        calls += isinstance(route, RootRoute) and route.clipper is clipper
        frame = frame.f_back
    return calls == 2


class LayerRoute(Route):
    """One layer's forward: through its rule, or with per-row copies of its bare parameters."""

    def __init__(self, clipper: Clipper, module: nn.Module, name: str, rule: Rule | None, targets: Targets) -> None:
        super().__init__(clipper, module)
        self.name, self.rule, self.targets = name, rule, targets
        self.caught = rule is None and caught_by_function(module)
        self.bypass = False  # somebody above takes care of its parameters
        # What compiled code is made for, and has to be made again when it changes; of the forward that begins.
        self.key = new_key(self)
        self.calls: list[Call] = []
        self.follows = self.operator = self.spread = self.time_major = False

    def prepare(self, law: Law | None) -> None:
        """What a compiler finds when it traces a forward in which the layer has this law."""
        self.follows = not self.bypass and self.trainable() and not (law is not None and law.idle)
        self.operator = self.follows and is_operator(self, law)
        self.spread = law is not None and law.dim is None
        self.time_major = law is not None and law.dim == 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return traced(self, args, kwargs)
        clipper = self.clipper
        if not clipper.attached or self.bypass:
            return self.original(*args, **kwargs)
        held: HeldBack | None = getattr(_local, "held", {}).get(self.module)
        if clipper.layouts.probe is not None:
            if held is not None:
                held.tried = True
            forward = self._watched if held is None else _first
            return clipper.layouts.probe.see(self.name, forward, (args, kwargs))
        if in_backward():
            clipper.passes.current()  # recomputation: arms the callback on the outermost backward
        else:
            clipper.forwards.note(self.params)
        if not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        if held is not None and (call := self.placed(*args, **kwargs)) is not None:
            held.calls.append(call)
            return call.input
        if not self.trainable():
            return self.original(*args, **kwargs)
        return self.run(clipper.forwards.current(self.name), args, kwargs)

    def followed(self) -> bool:
        """Whether calls go through the rule now: attached, and no trial under way."""
        return self.clipper.attached and not self.bypass and self.clipper.layouts.probe is None

    def placed(self, input: Tensor) -> Held | None:
        """A call with this input, without running it. None where one input serves all examples."""
        if in_backward():
            self.clipper.passes.current()  # as in __call__
        else:
            self.clipper.forwards.note(self.params)
        return (
            self.placed_in(self.clipper.forwards.current(self.name), input) if self.trainable() else Held(None, input)
        )

    def placed_in(self, forward: Forward, input: Tensor) -> Held | None:
        """The same for a layer that is trained, in this forward."""
        packed = forward.units.num_rows
        if packed is not None:
            if input.shape[:-1].numel() != packed:
                raise ValueError(
                    f"{self.name}: offsets cover {packed} rows, but its input has shape {list(input.shape)}"
                )
            return Held(Site(forward, self.name, packed), input)
        site, spread = self._place(self.name, forward, input)
        return Held(site, input) if spread is input else None

    def params(self) -> Iterable[nn.Parameter]:
        return params_of(self.targets)

    def trainable(self) -> bool:
        return any(p.requires_grad for p in self.params())

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward under a trial, which sees caught calls too."""
        probe = self.clipper.layouts.probe
        if not self.caught or probe is None:
            return self.original(*args, **kwargs)
        with Catch([self.module.weight], lambda func, *a, **k: probe.see(self.name + CALL, func, (a, k))):  # type: ignore[list-item]
            return self.original(*args, **kwargs)

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (law := forward.laws.get(self.name)) is not None and law.idle:
            return self.original(*args, **kwargs)
        if self.caught:
            with Catch([self.module.weight], partial(self.run_caught, forward)):  # type: ignore[list-item]
                return self.original(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        first = self._speaking(leaves, args, kwargs)
        packed = forward.units.num_rows
        if packed is not None:
            return self._run_packed(forward, first, packed, args, kwargs)
        if self.rule is None:
            return self._run_bare(forward, leaves, args, kwargs)
        if first is None:
            raise ValueError(f"{self.name}: called without a tensor, so its rows cannot belong to anybody")
        site, spread = self._place(self.name, forward, first)
        args, kwargs = _replace(first, spread, args, kwargs)
        return self.rule(site, self.module, *args, **kwargs)

    def _speaking(self, leaves: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The argument whose batch dimension counts the examples."""
        rows_of = getattr(self.rule, "rows_of", None)
        return primary(leaves) if rows_of is None else rows_of(*args, **kwargs)

    def spread_out(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], examples: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call with one input for all examples, with one for each."""
        first = self._speaking(tree_leaves((args, kwargs)), args, kwargs)
        return (args, kwargs) if first is None else _replace(first, _spread(first, examples), args, kwargs)

    def run_caught(self, forward: Forward, func: Any, x: Tensor, *rest: Any, **kwargs: Any) -> Any:
        """A function that got the layer's weight, through the tape."""
        rows = forward.units.num_rows
        if rows is not None:
            flat = packed_rows(x, rows)
            if flat is None:
                raise ValueError(f"{self.name}: offsets cover {rows} rows, but its input has shape {list(x.shape)}")
            out = run_caught(Site(forward, self.name, rows), func, flat, *rest, **kwargs)
            return out if flat is x else out[None]
        site, x = self._place(self.name + CALL, forward, x)
        return run_caught(site, func, x, *rest, **kwargs)

    def _place(self, name: str, forward: Forward, x: Tensor) -> tuple[Site, Tensor]:
        """Where the rows of an input x are, and x with a row for each example where it had one for all."""
        examples = forward.examples
        law = self._law(name, forward, x)
        if law.dim is None:  # position ids and the like: one input for all examples
            return Site(forward, self.name, examples), _spread(x, examples)
        rows = x.shape[law.dim] if law.dim < x.dim() else -1
        if (rows != examples) if law.whole else (rows < 0 or (examples == 0) != (rows == 0) or rows % max(examples, 1)):
            raise ValueError(
                f"{self.name}: its input has {rows} rows in dim {law.dim} for {examples} examples; on the first batch that "
                "dimension counted examples. What depends on other things than the batch cannot be followed"
            )
        return Site(forward, self.name, rows, law.dim), x

    def _law(self, name: str, forward: Forward, x: Tensor | None) -> Law:
        """The law found on the first forward of this kind. Refuses what it does not cover; guesses nothing."""
        law = forward.laws.get(name)
        if law is None and forward.examples == 0 and x is not None:
            # No example, so no rows to tell apart.
            dim = batch_dim_of(x, self.clipper.layouts.batch_dim)
            return Law(None if x.shape[dim] == 1 else dim, False, ())
        if law is None:
            raise ValueError(
                f"{self.name or 'the model'} did not run when the model was tried on its first batch, so nothing is known of "
                "its rows: let every forward use the same layers, or switch by an argument that is a bool or None"
            )
        if x is not None and (self.rule is None or law.dim is None) and not law.fits(x):
            raise ValueError(
                f"{self.name or 'the model'}: its input has shape {list(x.shape)} and had {list(law.sizes)} when the model was "
                "tried: its rows cannot be told from that; give inputs of one form"
            )
        return law

    def _run_bare(self, forward: Forward, leaves: list[Any], args: Any, kwargs: Any) -> Any:
        if forward.examples == 0:
            with torch.no_grad():
                return self.original(*args, **kwargs)
        found = forward.laws.get(self.name)
        flags = found.batched if found is not None and len(found.batched) == len(leaves) else ()
        spoken = next((x for x, is_batched in zip(leaves, flags, strict=False) if is_batched), primary(leaves))
        law = self._law(self.name, forward, spoken)
        if len(leaves) != len(law.batched):
            raise ValueError(
                f"{self.name}: called with other arguments than on the first batch; cannot follow its rows"
            )
        batch = next((x for x, is_batched in zip(leaves, law.batched, strict=True) if is_batched), None)
        rows = forward.examples if batch is None else batch.shape[0]
        if (rows != forward.examples) if law.whole else rows % max(forward.examples, 1):
            raise ValueError(f"{self.name}: its input has {rows} rows for {forward.examples} examples")
        site = Site(forward, self.name, rows)
        if law.rank is not None:
            return run_copies(site, self.targets, self.original, law.rank, (args, kwargs))
        return run_loop(site, self.targets, self.original, law.batched, (args, kwargs))

    def _run_packed(self, forward: Forward, first: Tensor | None, rows: int, args: Any, kwargs: Any) -> Any:
        """Rows of a packed batch stand in dim 0, or in dim 1 behind a dim of 1."""
        if first is None or (first.shape[: first.dim() - 1 or 1].numel() != rows and first.numel() != rows):
            shape = None if first is None else list(first.shape)
            raise ValueError(f"{self.name}: offsets cover {rows} rows, but its input has shape {shape}")
        flat = first.reshape(rows, *first.shape[2:]) if first.shape[0] == 1 and rows != 1 else first
        args, kwargs = _replace(first, flat, args, kwargs)
        site = Site(forward, self.name, rows)
        if self.rule is None:
            rank = forward.laws[self.name].rank
            assert rank is not None  # the trial refuses a packed batch otherwise
            out = run_copies(site, self.targets, self.original, rank, (args, kwargs))
        else:
            out = self.rule(site, self.module, *args, **kwargs)
        return out if flat is first else out[None]


class ActivationRoute(Route):
    """An activation by one function instead of many operations: nothing of it is trained."""

    def __init__(self, clipper: Clipper, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(clipper, module)
        self.function = function

    def __call__(self, input: Tensor) -> Tensor:
        return self.function(input) if self.clipper.attached else self.original(input)


class MethodRoute(Route):
    """A method that uses a child's parameters without a batch dimension (relative position bias): row by row."""

    def __init__(self, clipper: Clipper, module: nn.Module, method: str, name: str, targets: Targets) -> None:
        super().__init__(clipper, module, method)
        self.name, self.targets = name, targets

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        clipper = self.clipper
        trainable = any(p.requires_grad for p in params_of(self.targets))
        if not clipper.attached or not torch.is_grad_enabled() or clipper.layouts.probe is not None or not trainable:
            return self.original(*args, **kwargs)
        if not in_backward():
            clipper.forwards.note(partial(params_of, self.targets))
        forward = clipper.forwards.current(self.name)
        batched = [False] * len(tree_leaves((args, kwargs)))
        return run_loop(
            Site(forward, self.name, forward.examples), self.targets, self.original, batched, (args, kwargs)
        )


def _first(input: Any) -> Any:
    return input


def _spread(x: Tensor, examples: int) -> Tensor:
    """x ``[1, ...]`` or ``[...]`` as ``[B, ...]``."""
    x = x if x.shape[0] == 1 else x[None]
    return x.expand(examples, *x.shape[1:])


def _replace(old: Tensor, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The call with one tensor in place of another."""
    if new is old:
        return args, kwargs
    return (
        tuple(new if x is old else x for x in args),
        {k: new if x is old else x for k, x in kwargs.items()},
    )
