"""Every op once: schema, fake, and the choice of a backend.

The device decides: Triton on CUDA, C++ on CPU, plain torch (:mod:`fastclip.reference`) wherever a compiled one is absent.
A backend that is asked for by name and cannot run raises. Shapes and meanings stand in :mod:`fastclip.reference`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastclip import random, reference

Backend = Literal["triton", "cpp", "torch"]

_SCHEMAS = {
    "linear_norms": '(Tensor a, Tensor[] g, Tensor offsets, str route="auto") -> Tensor',
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
_STREAM = "float std, float scale, Tensor key, int nonce"
_NOISE_SCHEMAS = {
    "add_noise": f"(Tensor grad_sum, Tensor(a!) out, {_STREAM}, int block, int skip) -> ()",
    "clip_accumulate_noise": f"(Tensor[] grad_samples, Tensor factors, Tensor(a!)[] outs, {_STREAM}, int[] blocks, "
    "int[] skips) -> ()",
    "noise_adamw": f"(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, {_STREAM}, "
    "int[] blocks, int[] skips, float lr, float beta1, float beta2, float eps, float weight_decay, int[] steps) -> ()",
    "noise_sgd": f"(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, {_STREAM}, int[] blocks, "
    "int[] skips, float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool first) -> ()",
}


def _register() -> None:
    def without_result(function: Callable[..., Tensor]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)

        return run

    def norms_fake(*args: Any) -> Tensor:
        offsets = [x for x in args if isinstance(x, Tensor)][-1]  # the last tensor of every op that returns norms
        return offsets.new_empty(offsets.shape[0] - 1, dtype=torch.float64)

    def linear_norms_fake(a: Tensor, g: list[Tensor], offsets: Tensor, route: str = "auto") -> Tensor:
        return offsets.new_empty(len(g), 2, offsets.shape[0] - 1, dtype=torch.float64)

    def segment_sum_fake(g: Tensor, x_hat: Tensor | None, offsets: Tensor) -> Tensor:
        return g.new_empty(offsets.shape[0] - 1, g.shape[1], dtype=reference.accumulation_dtype(g.dtype))

    def nothing_fake(*args: Any) -> None:
        return None

    for name, schema in _SCHEMAS.items():
        function, mutates = getattr(reference, name), schema.endswith("()")
        torch.library.define(f"fastclip::{name}", schema)
        torch.library.impl(f"fastclip::{name}", "default", without_result(function) if mutates else function)
        special: dict[str, Callable[..., Any]] = {"segment_sum": segment_sum_fake, "linear_norms": linear_norms_fake}
        fake: Callable[..., Any] = nothing_fake if mutates else special.get(name, norms_fake)
        torch.library.register_fake(f"fastclip::{name}", fake)
    # No default in Python: frames between the dispatcher and the function would hold the key.
    for name, schema in _NOISE_SCHEMAS.items():
        torch.library.define(f"fastclip::{name}", schema)
        torch.library.register_fake(f"fastclip::{name}", nothing_fake)


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
        else {
            "state": "used",
            "why": "compiled: every op on CPU",
        },
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


def _run(name: str, backend: Backend | None, *args: Any) -> Any:
    _check_backend(backend)
    if backend == "torch":
        return getattr(reference, name)(*args)
    if backend == "cpp":
        _check_cpu(name, *args)
    return getattr(_ops, name)(*args)


def _check_cpu(name: str, *args: Any) -> None:
    tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, Tensor)]
    devices = {str(x.device) for x in tensors} - {"cpu"}
    if devices:
        raise RuntimeError(f'{name}: backend="cpp" cannot run on {", ".join(sorted(devices))}; leave backend out')


def _check_rows(offsets: Tensor, **rows: Tensor | None) -> None:
    if offsets.dim() != 1 or offsets.numel() == 0 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be int32 of shape [U + 1], got {offsets.dtype} {list(offsets.shape)}")
    given = {name: x for name, x in rows.items() if x is not None}
    if len({x.shape[0] if x.dim() else None for x in given.values()}) > 1:
        shapes = {name: list(x.shape) for name, x in given.items()}
        raise ValueError(f"all of {', '.join(shapes)} must have the same number of rows, got {shapes}")
    first = next(iter(given.values()))
    if first.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_offsets(offsets, first.shape[0])


# Offsets that were found good: their version then, and the number of rows. One tensor serves every layer of a backward.
_good_offsets: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _check_offsets(offsets: Tensor, rows: int) -> None:
    known = None if offsets.is_inference() else (offsets._version, rows)
    if known is not None and _good_offsets.get(offsets) == known:
        return
    # Not through a list: thousands of units are common.
    if offsets[0] != 0 or offsets[-1] != rows or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to the number of rows, {rows}; got {offsets[:8].tolist()}...")
    if known is not None:
        _good_offsets[offsets] = known


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
    return linear_norms(a, [g], offsets, route, backend=backend)[0]


def linear_norms(
    a: Tensor, g: Sequence[Tensor], offsets: Tensor, route: str = "auto", *, backend: Backend | None = None
) -> Tensor:
    """fp64 ``[K, 2, U]``: :func:`linear_norm_parts` of K layers that read one input a. g: K times ``[N, p]``; raises as it."""
    if route not in ("auto", "gram", "direct"):
        raise ValueError(f'route must be "auto", "gram" or "direct", got {route!r}')
    if not g:
        raise ValueError("g must hold at least one tensor, got none")
    _check_rows(offsets, a=a, **{f"g[{k}]" if len(g) > 1 else "g": x for k, x in enumerate(g)})
    return _run("linear_norms", backend, a, list(g), offsets, route)


def row_norm_products(a: Tensor, g: Tensor, offsets: Tensor, *, backend: Backend | None = None) -> Tensor:
    """fp64 ``[U]`` sums of ``|a_t||g_t|``: :func:`fastclip.reference.row_norm_products`. Raises as linear_norm."""
    _check_rows(offsets, a=a, g=g)
    return _run("row_norm_products", backend, a, g, offsets)


def embedding_norm(
    ids: Tensor, g: Tensor, offsets: Tensor, padding_idx: int | None = None, *, backend: Backend | None = None
) -> Tensor:
    """fp64 ``[U]`` squared norms of embedding gradients: :func:`fastclip.reference.embedding_norm`.

    ids: int ``[N]``, g: ``[N, d]``, offsets: int32 ``[U + 1]``. Raises as linear_norm.
    """
    _check_rows(offsets, ids=ids, g=g)
    return _run("embedding_norm", backend, ids, g, offsets, padding_idx)


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
    _check_rows(head_offsets, h=h, z=z)
    _check_rows(offsets, ids=ids, e=e)
    return _run("tied_cross", backend, h, z, head_offsets, ids, e, offsets, padding_idx)


def affine_norm(g: Tensor, x_hat: Tensor | None, offsets: Tensor, *, backend: Backend | None = None) -> Tensor:
    """fp64 ``[U]`` squared norms for a bias (x_hat None) or a gain: :func:`fastclip.reference.affine_norm`.

    g, x_hat: ``[N, p]``, offsets: int32 ``[U + 1]``. Raises as linear_norm.
    """
    _check_rows(offsets, g=g, x_hat=x_hat)
    return _run("affine_norm", backend, g, x_hat, offsets)


def segment_sum(g: Tensor, x_hat: Tensor | None, offsets: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[U, p] sums of ``g_t`` or ``g_t * x_hat_t`` a unit: :func:`fastclip.reference.segment_sum`. Raises as linear_norm."""
    _check_rows(offsets, g=g, x_hat=x_hat)
    return _run("segment_sum", backend, g, x_hat, offsets)


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
    _check_rows(offsets, a=a, g=g)
    if out.shape != (g.shape[1], a.shape[1]):
        raise ValueError(f"out must have shape [{g.shape[1]}, {a.shape[1]}], got {list(out.shape)}")
    _run("clipped_gemm", backend, a, g, offsets, factors, out, accumulate)
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
    _check_rows(offsets, ids=ids, g=g)
    _run("clipped_embedding", backend, ids, g, offsets, factors, out, padding_idx)
    return out


def clipped_sum(grads: Tensor, factors: Tensor, out: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``out += sum_u factors[u] grads[u]``, returned: :func:`fastclip.reference.clipped_sum`.

    grads: ``[U, ...]``, factors: ``[U]``, out: fp32 or fp64 ``[...]``. Raises ValueError if the shapes differ.
    """
    if grads.shape[1:] != out.shape:
        raise ValueError(f"out must have shape {list(grads.shape[1:])}, got {list(out.shape)}")
    _run("clipped_sum", backend, grads, factors, out)
    return out


@dataclass(frozen=True)
class Draw:
    """Where in the stream a vector's noise stands, and how large it is.

    ``round((grad + std * z) * scale)`` with z from element ``offset`` of the stream of (key, nonce). Whoever makes one
    answers for drawing each element once (:class:`fastclip.noise.NoiseSource` does).
    """

    std: float
    scale: float
    key: random.Key
    nonce: int
    offset: int

    def stream(self) -> tuple[float, float, Tensor, int]:
        """As the schemas want it."""
        return self.std, self.scale, self.key.tensor(), _signed(self.nonce)

    def place(self) -> tuple[int, int]:
        """The block, as the schemas want it, and the elements of it that come before."""
        block, skip = divmod(self.offset, random.BLOCK_ELEMENTS)
        return _signed(block), skip


def _places(draws: Sequence[Draw]) -> tuple[list[int], list[int]]:
    """Blocks and skips of draws that differ in their offset alone."""
    if any((d.std, d.scale, d.nonce) != (draws[0].std, draws[0].scale, draws[0].nonce) for d in draws):
        raise ValueError("draws must differ in nothing but their offset: one release has one std, scale and step")
    if any(d.key is not draws[0].key for d in draws):
        raise ValueError("draws must differ in nothing but their offset, but their keys differ")
    places = [d.place() for d in draws]
    return [block for block, _ in places], [skip for _, skip in places]


def add_noise(grad_sum: Tensor, out: Tensor, draw: Draw, *, backend: Backend | None = None) -> Tensor:
    """``out = round((grad_sum + std * z) * scale)``, returned: :func:`fastclip.random.add_noise`.

    grad_sum: ``[n]`` fp32 or fp64, out: ``[n]`` fp32, bf16 or fp16, contiguous, on CPU. Raises RuntimeError if ``backend``
    cannot run.
    """
    if _compiled(backend):
        _ops.add_noise(grad_sum, out, *draw.stream(), *draw.place())
    else:
        random.add_noise(grad_sum, out, draw.std, draw.scale, draw.key, draw.nonce, draw.offset)
    return out


def clip_accumulate_noise(
    grad_samples: Tensor | Sequence[Tensor],
    factors: Tensor,
    out: Tensor | Sequence[Tensor],
    std: float,
    key: random.Key,
    counter: tuple[int, int],
    *,
    backend: Backend | None = None,
) -> Tensor | Sequence[Tensor]:
    """``out = round(sum_u factors[u] grad_samples[u] + std * z)``, returned; formed in fp64 and rounded once.

    grad_samples: ``[U, ...]``, factors: ``[U]``, out: fp32, bf16 or fp16 ``[...]``, contiguous, on CPU; or lists of both, one
    after another in the stream. counter: (nonce of the step, :func:`fastclip.random.nonce`; element of its stream that out
    starts at): whoever calls this answers for never using one twice under a key. Units of factor 0 are left out, inf and NaN
    with them. Raises ValueError if shapes differ, RuntimeError if ``backend`` cannot run.
    """
    samples = [grad_samples] if isinstance(grad_samples, Tensor) else list(grad_samples)
    outs = [out] if isinstance(out, Tensor) else list(out)
    if len(samples) != len(outs):
        raise ValueError(f"grad_samples and out must be as many, got {len(samples)} and {len(outs)}")
    for x, to in zip(samples, outs, strict=True):
        if x.shape[1:] != to.shape or factors.shape != x.shape[:1]:
            raise ValueError(
                f"grad_samples must be [U, *out.shape] and factors [U], got {list(x.shape)}, {list(factors.shape)} and "
                f"out {list(to.shape)}"
            )
    nonce, start = counter
    starts = accumulate((x.numel() for x in outs), initial=start)
    draws = [Draw(std, 1.0, key, nonce, first) for first, _ in zip(starts, outs, strict=False)]
    if not outs:
        return out
    if _compiled(backend):
        _ops.clip_accumulate_noise(samples, factors, outs, *draws[0].stream(), *_places(draws))
    else:
        for x, to, draw in zip(samples, outs, draws, strict=True):
            total = reference.clipped_sum(x, factors, to.new_zeros(to.shape, dtype=torch.float64))
            add_noise(total.view(-1), to.view(-1), draw, backend=backend)
    return out


def noise_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    draws: Sequence[Draw],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    steps: Sequence[int],
    backend: Backend | None = None,
) -> None:
    """:func:`add_noise` on each of ``grads`` in place, and torch's AdamW with the result: :func:`reference.adamw_`.

    One pass over memory. All contiguous fp32 on CPU, each parameter's ``[n]`` of one size, without common memory. draws: one a
    parameter, of one release. steps: count from 1. Raises ValueError if the lists do not fit, RuntimeError if tensors are not
    so or ``backend`` cannot run.
    """
    _check_lists(params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, draws=draws, steps=steps)
    if not params:
        return
    if _compiled(backend):
        tensors = [list(x) for x in (params, grads, exp_avgs, exp_avg_sqs)]
        _ops.noise_adamw(*tensors, *draws[0].stream(), *_places(draws), lr, *betas, eps, weight_decay, list(steps))
        return
    _places(draws)
    for p, g, m, v, draw, step in zip(params, grads, exp_avgs, exp_avg_sqs, draws, steps, strict=True):
        add_noise(g, g, draw, backend=backend)
        reference.adamw_(p, g, m, v, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step)


def noise_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    draws: Sequence[Draw],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    backend: Backend | None = None,
) -> None:
    """The same with torch's SGD: :func:`reference.sgd_`. momentum_buffers: one a parameter if there is momentum, else empty.

    first: the buffers hold nothing yet.
    """
    _check_lists(params=params, grads=grads, draws=draws)
    if not params:
        return
    rest = (lr, momentum, dampening, weight_decay, nesterov, first)
    if _compiled(backend):
        tensors = [list(x) for x in (params, grads, momentum_buffers)]
        _ops.noise_sgd(*tensors, *draws[0].stream(), *_places(draws), *rest)
        return
    _places(draws)
    buffers: Sequence[Tensor | None] = momentum_buffers or [None] * len(params)
    for p, g, buffer, draw in zip(params, grads, buffers, draws, strict=True):
        add_noise(g, g, draw, backend=backend)
        reference.sgd_(
            p,
            g,
            buffer,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            first=first,
        )


def _check_lists(**lists: Sequence[Any]) -> None:
    sizes = {name: len(x) for name, x in lists.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{', '.join(sizes)} must be as many, got {sizes}")


def _compiled(backend: Backend | None) -> bool:
    _check_backend(backend)
    return backend == "cpp" or (backend is None and _cpp_missing is None)


def _signed(word: int) -> int:
    """The two's complement number with these 64 bits: schemas know no other."""
    return word - 2**64 if word >= 2**63 else word
