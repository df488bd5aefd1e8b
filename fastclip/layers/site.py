"""One call of one layer: its units, its rows, and the way into the tape."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from fastclip import ops
from fastclip.head_rows import HeadRows
from fastclip.reference import accumulation_dtype
from fastclip.tape import EmbeddingRows, Entry, LinearRows, PerUnit
from fastclip.units import PrivacyUnits, Segments


class Recorder(Protocol):
    """Where entries go: one forward of the attached model (module.py)."""

    units: PrivacyUnits

    def record(self, param: Tensor, entry: Entry, block: slice | None) -> None: ...

    def one_row(self, row: int, rows: int) -> AbstractContextManager[None]: ...


class Site:
    """What a layer rule works with.

    name: the layer's qualified name. batch_dim: which dimension of its input and output counts examples (1 in
    time-major code). rows: the size of that dimension, B, or B times a constant where the model flattens its batch.
    """

    def __init__(self, recorder: Recorder, name: str, rows: int, batch_dim: int = 0) -> None:
        self.recorder = recorder
        self.units = recorder.units
        self.name = name
        self.rows = rows
        self.batch_dim = batch_dim

    def of(self, examples: Tensor) -> Site:
        """The same where each row is one of these examples. examples: int64 ``[b]``, any number of times each."""
        site = Site(self.recorder, self.name, examples.numel())
        site.units = self.units.select(examples)
        return site

    def batch_first(self) -> Site:
        """The same site for tensors whose dim 0 counts examples."""
        site = Site(self.recorder, self.name, self.rows)
        site.units = self.units
        return site

    def need_batch_first(self) -> None:
        """Raises ValueError in time-major code, for layers whose dim 0 has to count examples."""
        if self.batch_dim:
            raise ValueError(f"{self.name}: this layer needs inputs whose dim 0 counts examples: transpose before it")

    def _rows(self, x: Tensor, trailing: int) -> Tensor:
        """x ``[..., *trailing dims]`` as ``[N, numel]``, rows of one example together."""
        x = x.movedim(self.batch_dim, 0) if self.batch_dim else x
        return x.reshape(-1, x.shape[x.dim() - trailing :].numel()) if trailing else x.reshape(-1)

    def one_row(self, row: int) -> AbstractContextManager[None]:
        """While it lasts, layers inside see this row's example alone."""
        return self.recorder.one_row(row, self.rows)

    def segments(self, rows: int, device: torch.device) -> Segments:
        """Segments of a tensor whose leading dimensions, flattened, make ``rows`` rows."""
        return self.units.segments(rows, device)

    def enter_linear(self, param: Tensor, a: Tensor, g: Tensor, block: slice | None = None) -> None:
        """Enter gradient ``sum g_t a_t^T`` of ``param`` (or of its rows ``block``). a: ``[..., d]``, g: ``[..., p]``."""
        a, g = self._rows(a, 1), self._rows(g, 1)
        segments = self.segments(a.shape[0], a.device)
        rows = LinearRows(segments.gather(a), segments.gather(g), Segments(None, segments.offsets))
        shape = param.shape if block is None else param[block].shape
        self.recorder.record(param, rows.smaller(shape), block)

    def enter_head(self, param: Tensor, rows: HeadRows) -> None:
        """Enter the gradient of a head's weight from rows as the layer has them, whose segments are not known yet."""
        segments = self.segments(rows.a.shape[0], rows.a.device)
        own = {name: segments.gather(getattr(rows, name)) for name in ("a", "labels", "lse", "scale")}
        self.recorder.record(param, replace(rows, segments=Segments(None, segments.offsets), **own), None)

    def enter_embedding(self, param: Tensor, ids: Tensor, g: Tensor, padding_idx: int | None) -> None:
        """Enter the gradient of an embedding. ids: int ``[...]``, g: ``[..., d]``."""
        ids, g = self._rows(ids, 0), self._rows(g, 1)
        segments = self.segments(ids.shape[0], ids.device)
        rows = EmbeddingRows(segments.gather(ids), segments.gather(g), Segments(None, segments.offsets), padding_idx)
        self.recorder.record(param, rows, None)

    def enter_sum(self, param: Tensor, g: Tensor, x_hat: Tensor | None = None, block: slice | None = None) -> None:
        """Enter gradient ``sum_t g_t`` or ``sum_t g_t * x_hat_t``. g, x_hat: ``[..., *shape]`` of ``param``'s shape."""
        shape = param.shape if block is None else param[block].shape
        g = self._rows(g, len(shape)) if shape else self._rows(g, 0)[:, None]
        segments = self.segments(g.shape[0], g.device)
        x_hat = None if x_hat is None else segments.gather(self._rows(x_hat, len(shape)))
        g = segments.gather(g)
        if segments.single:
            dtype = accumulation_dtype(g.dtype)
            grads = g.to(dtype) if x_hat is None else g.to(dtype) * x_hat.to(dtype)
        else:
            grads = ops.segment_sum(g, x_hat, segments.offsets)
        self.recorder.record(param, PerUnit(grads.view(-1, *shape)), block)

    def enter_units(self, param: Tensor, grads: Tensor) -> None:
        """Enter a parameter's gradients a unit. grads: ``[U, ...]``, this call's own."""
        self.recorder.record(param, PerUnit(grads.view(-1, *param.shape)), None)

    def by_unit(self, x: Tensor, trailing: int) -> tuple[Tensor, Segments]:
        """x ``[..., *trailing dims]`` as rows ``[N, numel]`` by unit, and where each unit's are."""
        rows = self._rows(x, trailing)
        segments = self.segments(rows.shape[0], rows.device)
        return segments.gather(rows), segments

    def in_place(self, rows: Tensor, segments: Segments, like: Tensor) -> Tensor:
        """Rows of :meth:`by_unit` back where they were, in the shape of ``like``."""
        if segments.order is not None:
            rows = torch.empty_like(rows).index_copy_(0, segments.order, rows)
        if not self.batch_dim:
            return rows.view(like.shape)
        return rows.view(like.movedim(self.batch_dim, 0).shape).movedim(0, self.batch_dim)

    def per_unit(self, param: Tensor) -> Tensor:
        """[rows, *shape]: one copy of the parameter a row, so that an owner's own code can use row i's copy for row i.

        The copies share memory; their gradients are what the unit's norm and sum are taken from. Raises ValueError in
        time-major code.
        """
        self.need_batch_first()
        return _Copies.apply(param, self) if param.requires_grad else param.expand(self.rows, *param.shape)


def wanted(ctx: Any, index: int) -> bool:
    """Whether this backward is to fill the gradient of tensor input ``index``: False under ``inputs=`` or ``grad(., x)``.

    Raises RuntimeError where the caller asks autograd for a parameter's gradient itself, which nobody would clip.
    """
    if not ctx.needs_input_grad[index]:
        return False
    if torch.is_grad_enabled():
        raise RuntimeError("create_graph=True asks for gradients of clipped gradients: detach the clipper for that")
    return will_execute(ctx.next_functions[index][0])


def will_execute(node: Any) -> bool:
    """Whether this backward runs the node of a parameter's gradient. Raises as :func:`wanted`."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError as error:
        raise RuntimeError(
            "torch.autograd.grad for a parameter of an attached model would return an unclipped gradient: "
            "call backward() and read p.grad, or detach the clipper"
        ) from error


@contextmanager
def no_autocast(device_type: str) -> Iterator[None]:
    """Backward formulas choose their dtypes themselves, wherever backward() is called."""
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            yield
    else:
        yield


def _autocast_dtype(x: Tensor) -> torch.dtype:
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def autocast_input(x: Tensor) -> Tensor:
    """x as autocast hands it to a matrix product."""
    return x.to(_autocast_dtype(x))


_last = threading.local()


def shared_input(x: Tensor) -> Tensor:
    """The same in one copy for layers that read one tensor one after the other (q, k and v), and so one input on the tape.

    Nobody but those who got it keeps the copy, and no other forward gets it. An edit of x between two of them that its version
    counter does not see (through ``.data`` or numpy) goes unseen.
    """
    dtype = _autocast_dtype(x)
    if x.dtype == dtype or x.is_inference() or torch.compiler.is_compiling():
        return x.to(dtype)
    source, version, made = getattr(_last, "cast", (_nothing, 0, _nothing))
    found: Tensor | None = made()
    if source() is not x or version != x._version or found is None or found.dtype != dtype:
        found = x.to(dtype)
        _last.cast = weakref.ref(x), x._version, weakref.ref(found)
    return found


def forget_shared_input() -> None:
    """Called where a forward begins: the same tensor may hold another batch by then, unseen by its version counter."""
    _last.cast = _nothing, 0, _nothing


def _nothing() -> None:
    return None


class _Copies(Function):
    @staticmethod
    def forward(ctx: Any, param: Tensor, site: Site) -> Tensor:
        ctx.site, ctx.param = site, param
        return param.detach().expand(site.rows, *param.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        if wanted(ctx, 0):
            ctx.site.enter_sum(ctx.param, g)
        return None, None
