"""Every op once: schema, fake, and the choice of a backend.

The device decides: Triton on CUDA, C++ on CPU, plain torch (:mod:`fastclip.reference`) wherever a compiled one is absent.
A backend that is asked for by name and cannot run raises. Shapes and meanings stand in :mod:`fastclip.reference`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from fastclip import random, reference

Backend = Literal["triton", "cpp", "torch"]

_SCHEMAS = {
    "linear_norm_parts": '(Tensor a, Tensor g, Tensor offsets, str route="auto") -> Tensor',
    "row_norm_products": "(Tensor a, Tensor g, Tensor offsets) -> Tensor",
    "embedding_norm": "(Tensor ids, Tensor g, Tensor offsets, int? padding_idx=None) -> Tensor",
    "tied_cross": "(Tensor h, Tensor z, Tensor head_offsets, Tensor ids, Tensor e, Tensor offsets, int? padding_idx=None)"
    " -> Tensor",
    "affine_norm": "(Tensor g, Tensor? x_hat, Tensor offsets) -> Tensor",
    "segment_sum": "(Tensor g, Tensor? x_hat, Tensor offsets) -> Tensor",
    "clipped_gemm": "(Tensor a, Tensor g, Tensor offsets, Tensor factors, Tensor(a!) out, bool accumulate=True) -> ()",
    "clipped_embedding": "(Tensor ids, Tensor g, Tensor offsets, Tensor factors, Tensor(a!) out, int? padding_idx=None)"
    " -> ()",
    "clipped_sum": "(Tensor grads, Tensor factors, Tensor(a!) out) -> ()",
}
_NOISE = "(Tensor grad_sum, Tensor(a!) out, float std, float scale, Tensor key, int nonce, int block, int skip) -> ()"


def _register() -> None:
    def without_result(function: Callable[..., Tensor]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)

        return run

    def norms_fake(*args: Any) -> Tensor:
        offsets = [x for x in args if isinstance(x, Tensor)][-1]  # the last tensor of every op that returns norms
        return offsets.new_empty(offsets.shape[0] - 1, dtype=torch.float64)

    def parts_fake(a: Tensor, g: Tensor, offsets: Tensor, route: str = "auto") -> Tensor:
        return offsets.new_empty(2, offsets.shape[0] - 1, dtype=torch.float64)

    def segment_sum_fake(g: Tensor, x_hat: Tensor | None, offsets: Tensor) -> Tensor:
        return g.new_empty(offsets.shape[0] - 1, g.shape[1], dtype=reference.accumulation_dtype(g.dtype))

    def nothing_fake(*args: Any) -> None:
        return None

    for name, schema in _SCHEMAS.items():
        function, mutates = getattr(reference, name), schema.endswith("()")
        torch.library.define(f"fastclip::{name}", schema)
        torch.library.impl(f"fastclip::{name}", "default", without_result(function) if mutates else function)
        special: dict[str, Callable[..., Any]] = {"segment_sum": segment_sum_fake, "linear_norm_parts": parts_fake}
        fake: Callable[..., Any] = nothing_fake if mutates else special.get(name, norms_fake)
        torch.library.register_fake(f"fastclip::{name}", fake)
    # No default in Python: frames between the dispatcher and the function would hold the key.
    torch.library.define("fastclip::add_noise", _NOISE)
    torch.library.register_fake("fastclip::add_noise", nothing_fake)
    # What the compiled kernels make of given words, int64 [n, 8] to fp64 [n, 8]: fastclip.random.normals.
    torch.library.define("fastclip::box_muller", "(Tensor words) -> Tensor")
    torch.library.register_fake("fastclip::box_muller", lambda words: words.new_empty(words.shape, dtype=torch.float64))


def _load() -> str | None:
    """Loads the compiled kernels; why not, if not."""
    try:
        importlib.import_module("fastclip._C")
    except ImportError as error:
        return f"not built ({error}); reinstall with a C++20 compiler and --no-build-isolation"
    return None


_register()
_cpp_missing = _load()
_ops = torch.ops.fastclip


def backends() -> dict[str, dict[str, str]]:
    """What is compiled, what is used, and why: ``{"torch": {"state": ..., "why": ...}, ...}``."""
    return {
        "triton": {"state": "absent", "why": "no Triton kernels in this version: CUDA tensors run in plain torch"},
        "cpp": {"state": "absent", "why": _cpp_missing}
        if _cpp_missing
        else {"state": "used", "why": "compiled: linear_norm and add_noise on CPU; other ops run in plain torch"},
        "torch": {"state": "used", "why": "plain torch and numpy, every device"},
    }


def _check_backend(backend: Backend | None) -> None:
    if backend is None:
        return
    known = backends()
    if backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)} or None, got {backend!r}")
    if known[backend]["state"] == "absent":
        raise RuntimeError(f"backend={backend!r} cannot run: {known[backend]['why']}")


def _check_rows(offsets: Tensor, **rows: Tensor | None) -> None:
    if offsets.dim() != 1 or offsets.numel() == 0 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be int32 of shape [U + 1], got {offsets.dtype} {list(offsets.shape)}")
    shapes = {name: list(x.shape) for name, x in rows.items() if x is not None}
    if len({shape[0] if shape else None for shape in shapes.values()}) > 1:
        raise ValueError(f"all of {', '.join(shapes)} must have the same number of rows, got {shapes}")
    first = next(x for x in rows.values() if x is not None)
    if first.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != first.shape[0] or any(x > y for x, y in pairwise(bounds)):
            raise ValueError(f"offsets must rise from 0 to the number of rows, {first.shape[0]}; got {bounds[:8]}...")


def linear_norm(
    a: Tensor, g: Tensor, offsets: Tensor, route: str = "auto", *, backend: Backend | None = None
) -> Tensor:
    """fp64 ``[U]`` squared norms of ``sum_t g_t a_t^T``: the first row of :func:`linear_norm_parts`, and raises as it."""
    return linear_norm_parts(a, g, offsets, route, backend=backend)[0]


def linear_norm_parts(
    a: Tensor, g: Tensor, offsets: Tensor, route: str = "auto", *, backend: Backend | None = None
) -> Tensor:
    """fp64 ``[2, U]``: squared norms of ``sum_t g_t a_t^T`` and ``sum_t |a_t||g_t|``.

    a: ``[N, d]``, g: ``[N, p]``, offsets: int32 ``[U + 1]``: :func:`fastclip.reference.linear_norm_parts`. Raises
    ValueError on shapes that do not fit or an unknown route, RuntimeError if ``backend`` cannot run.
    """
    _check_backend(backend)
    if route not in ("auto", "gram", "direct"):
        raise ValueError(f'route must be "auto", "gram" or "direct", got {route!r}')
    _check_rows(offsets, a=a, g=g)
    if backend == "torch":
        return reference.linear_norm_parts(a, g, offsets, route)
    return _ops.linear_norm_parts(a, g, offsets, route)


def row_norm_products(a: Tensor, g: Tensor, offsets: Tensor, *, backend: Backend | None = None) -> Tensor:
    """fp64 ``[U]`` sums of ``|a_t||g_t|``: :func:`fastclip.reference.row_norm_products`. Raises as linear_norm."""
    _check_backend(backend)
    _check_rows(offsets, a=a, g=g)
    return _ops.row_norm_products(a, g, offsets)


def embedding_norm(
    ids: Tensor, g: Tensor, offsets: Tensor, padding_idx: int | None = None, *, backend: Backend | None = None
) -> Tensor:
    """fp64 ``[U]`` squared norms of embedding gradients: :func:`fastclip.reference.embedding_norm`.

    ids: int ``[N]``, g: ``[N, d]``, offsets: int32 ``[U + 1]``. Raises as linear_norm.
    """
    _check_backend(backend)
    _check_rows(offsets, ids=ids, g=g)
    return _ops.embedding_norm(ids, g, offsets, padding_idx)


def tied_cross(
    h: Tensor,
    z: Tensor,
    head_offsets: Tensor,
    ids: Tensor,
    e: Tensor,
    offsets: Tensor,
    padding_idx: int | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """fp64 ``[U]`` inner products of head and embedding gradients: :func:`fastclip.reference.tied_cross`.

    h: ``[S, d]``, z: ``[S, V]``, ids: int ``[N]``, e: ``[N, d]``. Raises as linear_norm.
    """
    _check_backend(backend)
    _check_rows(head_offsets, h=h, z=z)
    _check_rows(offsets, ids=ids, e=e)
    return _ops.tied_cross(h, z, head_offsets, ids, e, offsets, padding_idx)


def affine_norm(g: Tensor, x_hat: Tensor | None, offsets: Tensor, *, backend: Backend | None = None) -> Tensor:
    """fp64 ``[U]`` squared norms for a bias (x_hat None) or a gain: :func:`fastclip.reference.affine_norm`.

    g, x_hat: ``[N, p]``, offsets: int32 ``[U + 1]``. Raises as linear_norm.
    """
    _check_backend(backend)
    _check_rows(offsets, g=g, x_hat=x_hat)
    return _ops.affine_norm(g, x_hat, offsets)


def segment_sum(g: Tensor, x_hat: Tensor | None, offsets: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[U, p] sums of ``g_t`` or ``g_t * x_hat_t`` a unit: :func:`fastclip.reference.segment_sum`. Raises as linear_norm."""
    _check_backend(backend)
    _check_rows(offsets, g=g, x_hat=x_hat)
    return _ops.segment_sum(g, x_hat, offsets)


def clipped_gemm(
    a: Tensor,
    g: Tensor,
    offsets: Tensor,
    factors: Tensor,
    out: Tensor,
    *,
    accumulate: bool = True,
    backend: Backend | None = None,
) -> Tensor:
    """``out += sum_u factors[u] g_u^T a_u``, returned: :func:`fastclip.reference.clipped_gemm`.

    a: ``[N, d]``, g: ``[N, p]``, factors: ``[U]``, out: fp32 or fp64 ``[p, d]``. Raises as linear_norm.
    """
    _check_backend(backend)
    _check_rows(offsets, a=a, g=g)
    if out.shape != (g.shape[1], a.shape[1]):
        raise ValueError(f"out must have shape [{g.shape[1]}, {a.shape[1]}], got {list(out.shape)}")
    _ops.clipped_gemm(a, g, offsets, factors, out, accumulate)
    return out


def clipped_embedding(
    ids: Tensor,
    g: Tensor,
    offsets: Tensor,
    factors: Tensor,
    out: Tensor,
    padding_idx: int | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``out[id_t] += factors[u] g_t``, returned: :func:`fastclip.reference.clipped_embedding`. Raises as linear_norm.

    ids: int ``[N]``, g: ``[N, d]``, factors: ``[U]``, out: fp32 or fp64 ``[V, d]``.
    """
    _check_backend(backend)
    _check_rows(offsets, ids=ids, g=g)
    _ops.clipped_embedding(ids, g, offsets, factors, out, padding_idx)
    return out


def clipped_sum(grads: Tensor, factors: Tensor, out: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``out += sum_u factors[u] grads[u]``, returned: :func:`fastclip.reference.clipped_sum`.

    grads: ``[U, ...]``, factors: ``[U]``, out: fp32 or fp64 ``[...]``. Raises ValueError if the shapes differ.
    """
    _check_backend(backend)
    if grads.shape[1:] != out.shape:
        raise ValueError(f"out must have shape {list(grads.shape[1:])}, got {list(out.shape)}")
    _ops.clipped_sum(grads, factors, out)
    return out


def add_noise(
    grad_sum: Tensor,
    out: Tensor,
    std: float,
    key: random.Key,
    nonce: int,
    offset: int,
    scale: float = 1.0,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``out = round((grad_sum + std * z) * scale)``, returned: :func:`fastclip.random.add_noise`.

    grad_sum: ``[n]`` fp32 or fp64, out: ``[n]`` fp32, bf16 or fp16, contiguous, on CPU; nonce: of
    :func:`fastclip.random.nonce`; offset: element of the stream that z starts at. Whoever calls this answers for drawing
    each element once (:class:`fastclip.noise.NoiseSource` does). Raises RuntimeError if ``backend`` cannot run.
    """
    _check_backend(backend)
    if backend == "cpp" or (backend is None and _cpp_missing is None):
        block, skip = divmod(offset, random.BLOCK_ELEMENTS)
        _ops.add_noise(grad_sum, out, std, scale, key.tensor(), _signed(nonce), _signed(block), skip)
    else:
        random.add_noise(grad_sum, out, std, scale, key, nonce, offset)
    return out


def _signed(word: int) -> int:
    """The two's complement number with these 64 bits: schemas know no other."""
    return word - 2**64 if word >= 2**63 else word
