"""Checkpointed parts of a forward whose rows do not wait for the factors: they are measured, dropped, and formed again.

torch's checkpointing keeps a part's inputs instead of its activations. As rows on the tape they would be kept all the same. So
where memory is short of them (``_SHARE``) a part's entries become norms as soon as its backward is over, and once the factors
are known the part runs again, both ways from the same output gradient, for its clipped sums: a second backward of one part
after the other, at the price of one more forward and one more backward for what is replayed.

Guarantee. What is added is measured again, on the very rows that are added, and the whole sum is thrown away unless units have
together in them, in each group, the squares, bounds and spreads that the factors were made of: the bound on a unit does not
rest on the second run being like the first. Backwards may add up in another order each time (attention's does on a GPU): so the
first ones count ``1 + 2 SLACK`` times when factors are made, and the second ones have to lie within ``SLACK`` of them. The
other half of it is for units whose rounding was just small enough then to be left out of their norm. A part is replayed for
parameters that nothing but itself uses in the one forward that waits for its backward, so that the norm of their gradient's sum
is known when its own backward is over; if an entry comes later all the same, the backward is refused. The second backward ends
at these parameters: nothing else gets a gradient from it.

A signed number of each gradient is compared too (sketch.py), so that what is private is also right. The first time, a part runs
again while its rows are still there, and keeps them for good where it would be refused: for what it hands out by other ways
than its result, hooks on that, or numbers that are not drawn from torch's generators. A refusal keeps them from then on. Only
of ``torch.utils.checkpoint`` with ``use_reentrant=False``; other parts keep their rows, and all do while another forward waits.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from fastclip import tape
from fastclip.layers.site import no_autocast
from fastclip.memory import free_memory
from fastclip.precision import full_precision
from fastclip.recomputation import standing_in
from fastclip.sketch import sketch
from fastclip.tape import Entry, Measure, Slot

if TYPE_CHECKING:
    from fastclip.backward import BackwardPass
    from fastclip.forward import Forward

_SHARE = 1 / 4  # of the memory that is free beside the gradients to come: what one part's rows may take
SLACK = 2.0**-18
_TURNED = 2.0**-8  # of the squared norms: how far signed numbers may be apart
_numbers = itertools.count(1)  # of all forwards: a part of one may call layers of another


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """How norms and sums are formed: without a graph, in the precision that they name themselves."""
    with torch.no_grad(), full_precision(), no_autocast("cpu"), no_autocast(device.type):
        yield


class _Given:
    """A tensor that a part was given, without its history."""

    def __init__(self, x: Tensor) -> None:
        self._x, self._carries = x.detach(), x.requires_grad
        self._version = None if x.is_inference() else x._version

    def again(self) -> Tensor:
        if self._version is not None and self._x._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {list(self._x.shape)} that a checkpointed part of the model was given has been changed in "
                "place since the forward"
            )
        return self._x.detach().requires_grad_(self._carries)


class _Surroundings:
    """What a second run has to find as the first did: torch's generators, and autocast."""

    def __init__(self, inputs: Iterable[Any], generators: bool) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        self._device = next((x.device.type for x in tensors if x.device.type not in ("cpu", "meta")), "cpu")
        self._cpu = torch.get_rng_state() if generators else None
        self._ids, self._states = get_device_states(*tensors) if generators and self._device != "cpu" else ([], [])
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {"cpu", self._device}
        ]
        self._cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._cpu is not None:
                kind = self._device if self._ids else "cuda"  # fork_rng knows no kind without generators of its own
                stack.enter_context(torch.random.fork_rng(self._ids, device_type=kind))
                torch.set_rng_state(self._cpu)
                if self._ids:
                    set_device_states(self._ids, self._states, device_type=self._device)
            for where, enabled, dtype in self._autocast:
                stack.enter_context(torch.autocast(where, dtype, enabled, self._cache))
            yield


class Part:
    """One run of one checkpointed function. Autograd's graph keeps it, through a hook where the function's result was made."""

    def __init__(
        self, forward: Forward, function: Callable[..., Any], args: Any, kwargs: Any, generators: bool
    ) -> None:
        """generators: whether torch's random numbers are to be the same again."""
        forward.parts += 1
        self.forward, self.number, self.place = forward, next(_numbers), forward.parts
        while isinstance(function, partial):
            args, kwargs = function.args + tuple(args), {**function.keywords, **kwargs}
            function = function.func
        leaves, self._form = tree_flatten((args, kwargs))
        given = {id(x): _Given(x) for x in leaves if isinstance(x, Tensor)}  # one for what is given twice
        self._leaves = [given[id(x)] if isinstance(x, Tensor) else x for x in leaves]
        self._function, self._surroundings = function, _Surroundings(leaves, generators)
        self._released = False
        self.measures: dict[Slot, Measure] = {}
        self.same = torch.zeros((), dtype=torch.bool)  # whether signed numbers were alike when it ran again
        self._sketches: dict[Slot, Tensor] = {}
        self._slots: Collection[Slot] = ()

    def follow(self, out: Any) -> None:
        """Called with what the function gave back; the part is on its own from here."""
        ends = _ends(out)
        if len(ends) == 1 and ends[0].grad_fn is not None:
            # Behind all hooks on the tensor, whenever they are registered.
            ends[0].grad_fn.register_prehook(partial(self._arrived, ends[0].output_nr))

    def _arrived(self, number: int, grads: Sequence[Tensor | None]) -> None:
        """Its backward begins: that of what ran after it is over."""
        forward, grad = self.forward, grads[number]
        if self._released or grad is None or forward.finished or not forward.clipper.attached:
            return  # the layers' entries stay, or are refused
        done = forward.clipper.passes.current()
        settle(done)
        if not self.own() or forward.clipper.forwards.others_wait(forward):
            self.release()
            return
        self._grad = _Given(grad.detach())
        if self not in done.pending:
            done.pending.append(self)

    def own(self) -> set[Tensor]:
        """The trained parameters that nothing but this part uses in its forward."""
        users = self.forward.users().items()
        return {p for p, numbers in users if numbers == {self.number} and p in self.forward.trained}

    def release(self) -> None:
        """Give back what it needs to run again: the graph may live on, and know the function, which may know the graph."""
        self._released = True
        self.__dict__.pop("_grad", None)
        self._leaves, self._function = [], _gone

    def replayable(self, slots: dict[Slot, list[Entry]]) -> bool:
        """Whether it gives these entries when it runs again: tried once for its place in the forward."""
        tried = self.forward.clipper.replayable
        if self.place not in tried:
            found = self._tried(slots)
            if found is None:
                return False
            tried[self.place] = found
            if not found:
                warnings.warn(
                    "a checkpointed part of the model does not do the same when it runs again for its clipped sums: its rows "
                    "are kept until the backward ends, which takes the memory that checkpointing saves. Let it depend on its "
                    "arguments and torch's generators alone, and give back one tensor with a gradient",
                    stacklevel=2,
                )
        return tried[self.place]

    def _tried(self, slots: dict[Slot, list[Entry]]) -> bool | None:
        """None where nothing can be said: its rows are zero or not finite, or memory ended."""
        self.measure(slots)
        total = self._mass()
        if not bool(total.isfinite().all()) or not bool(total.any()):
            return None
        try:
            found = self.measure_again(self._again())
        except (MemoryError, torch.OutOfMemoryError):
            return None
        except Exception:  # whatever the model's code raises where it finds other surroundings
            return False
        first, second = (_sum(of for _, of in measures) for measures in (list(self.measures.items()), found))
        return bool(self.same) and bool(_within(first, second).all())

    def measure(self, slots: dict[Slot, list[Entry]]) -> None:
        """Keep of these entries what a unit has in them."""
        tape.check_memory(entry for entries in slots.values() for entry in entries)
        self._slots = set(slots)
        with exactly(next(iter(slots))[0].device):
            self._sketches = {slot: sketch(entries) for slot, entries in slots.items()}
            self.measures = dict(tape.measures(tape.separate(slots)))

    def again(self) -> dict[Slot, list[Entry]]:
        """The entries once more, under the slots of ``measures``."""
        found = self._again()
        self.release()
        return found

    def _again(self) -> dict[Slot, list[Entry]]:
        found = self._run_again(self._slots)
        if found.keys() != self._slots:
            raise RuntimeError(_DIFFERS)
        with exactly(next(iter(found))[0].device):
            mass = self._mass()
            away = torch.zeros_like(mass)
            for slot, entries in found.items():
                away += (sketch(entries) - self._sketches[slot]).square().to(mass.device)
            counts = mass.isfinite()  # of others nothing is added
            self.same = torch.where(counts, away, 0).sum() <= _TURNED * torch.where(counts, mass, 0).sum()
            return tape.separate(found)

    def _mass(self) -> Tensor:
        """fp64 ``[U]``: squared norms of what was measured."""
        return _sum(self.measures.values()).square

    def _run_again(self, slots: Collection[Slot]) -> dict[Slot, list[Entry]]:
        """What is entered under these slots."""
        replay = self.forward.replay()
        again: dict[int, Tensor] = {}
        leaves = [again.setdefault(id(x), x.again()) if isinstance(x, _Given) else x for x in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._form)
        inside = self.forward.clipper.forwards.inside(replay)
        with standing_in(), self._surroundings.restored(), torch.enable_grad(), inside:
            out = self._function(*args, **kwargs)
        ends, grad = _ends(out), self._grad.again()
        try:
            if len(ends) == 1 and ends[0].shape == grad.shape:
                torch.autograd.backward(ends, [grad], inputs=list({slot[0] for slot in slots}))
            return {slot: entries for slot, entries in replay.entries.items() if slot in slots}
        finally:
            replay.entries.clear()  # rows know the graph, which knows the replay: none of them would ever be freed

    def measure_again(self, slots: dict[Slot, list[Entry]]) -> list[tuple[Slot, Measure]]:
        """What units have in the entries of :meth:`again`, in the order of ``measures``."""
        found = dict(tape.measures(slots))
        return [(slot, found[slot]) for slot in self.measures]


_DIFFERS = (
    "a checkpointed part of the model did not do the same when it ran again, so that its rows were not those that had been "
    "measured; nothing was added, and its rows are kept from now on. Let it depend on its arguments and torch's own generators "
    "alone, and do not set preserve_rng_state=False for a model that draws"
)


def _gone(*_: Any, **__: Any) -> None:
    raise RuntimeError("this part of the model was released")


def _ends(out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]


def _sum(found: Iterable[Measure]) -> Measure:
    """Of slots, on the first one's device."""
    first, *others = found
    for of in others:
        first = first.plus(of.to(first.square.device), 1)
    return first


def _within(first: Measure, second: Measure) -> Tensor:
    """bool: where the second lies within ``SLACK`` of the first."""
    near = torch.ones_like(first.square, dtype=torch.bool)
    for then, now in ((first.square, second.square), (first.bound, second.bound), (first.spread, second.spread)):
        near &= (now <= then * (1 + SLACK)) & (now >= then * (1 - SLACK))
    return near


def replay(
    done: BackwardPass,
    add: Callable[[dict[Slot, list[Entry]]], None],
    in_groups: Callable[[list[tuple[Slot, Measure]]], Measure],
) -> None:
    """Form what was measured and dropped again, one part after the other.

    add: to the sum. in_groups: ``[K, U]`` from measures of slots. Raises RuntimeError unless all of it is what was measured;
    then half a sum stands, and these parts keep their rows from now on.
    """
    parts, done.replayed = done.replayed, []
    again: list[tuple[Slot, Measure]] = []
    try:
        for part in parts:
            entries = part.again()
            with exactly(done.device):
                again += part.measure_again(entries)
                add(entries)
        if parts:
            assert done.first is not None and done.factors is not None
            counts = done.factors != 0  # of the others nothing was added
            within = _within(done.first, in_groups(again)) | ~counts
            if not bool(within.all()) or not all(bool(part.same) for part in parts):
                raise RuntimeError(_DIFFERS)
    except Exception as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError):
            for part in parts:
                part.forward.clipper.replayable[part.place] = False
        raise
    finally:
        for part in parts:
            part.release()


def settle(done: BackwardPass) -> None:
    """Of parts whose backward is over: the entries stay where memory is plenty, and are measured and dropped otherwise."""
    for part in list(done.pending):
        own = part.own()
        slots = {slot: entries for slot, entries in done.entries.items() if slot[0] in own}
        if not slots:
            continue  # none has come yet
        done.pending.remove(part)
        if _fit(slots, part.forward.trained) or not part.replayable(slots):
            part.release()
            continue
        if not part.measures:
            part.measure(slots)
        for slot in slots:
            del done.entries[slot]
        done.replayed.append(part)


def _fit(slots: dict[Slot, list[Entry]], trained: Iterable[Tensor]) -> bool:
    rows = tape.memory(entry for entries in slots.values() for entry in entries)
    to_come = sum(p.numel() * p.element_size() for p in trained if p.grad is None)
    return rows <= _SHARE * (free_memory(next(iter(slots))[0].device) - to_come)


def check_apart(done: BackwardPass) -> None:
    """Raises RuntimeError where an entry came for what a part had been measured for."""
    waiting: dict[Tensor, list[tuple[int, int]]] = {}
    for p, start, stop in done.entries:
        waiting.setdefault(p, []).append((start, stop))
    for part in done.replayed:
        for p, start, stop in part.measures:
            if any(i < stop and start < j for i, j in waiting.get(p, [])):
                raise RuntimeError(
                    "a parameter of a checkpointed part of the model was used outside of that part, by a way that the forward "
                    "did not show, after the part had been measured: do not checkpoint that part"
                )
            waiting.setdefault(p, []).append((start, stop))
