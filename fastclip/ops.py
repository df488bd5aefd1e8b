"""Every op once, with what it refuses; :mod:`fastclip.dispatch` chooses what runs it.

Shapes and meanings stand in :mod:`fastclip.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip import random, reference
from fastclip.dispatch import Backend, check_backend, check_rows, compiled, run
from fastclip.dispatch import backends as backends
from fastclip.dispatch import cpp_missing as _cpp_missing


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
    check_rows(offsets, a=a, **{f"g[{k}]" if len(g) > 1 else "g": x for k, x in enumerate(g)})
    return run("linear_norms", backend, a, list(g), offsets, route)


def row_norm_products(a: Tensor, g: Tensor, offsets: Tensor, *, backend: Backend | None = None) -> Tensor:
    """fp64 ``[U]`` sums of ``|a_t||g_t|``: :func:`fastclip.reference.row_norm_products`. Raises as linear_norm."""
    check_rows(offsets, a=a, g=g)
    return run("row_norm_products", backend, a, g, offsets)


def embedding_norm(
    ids: Tensor, g: Tensor, offsets: Tensor, padding_idx: int | None = None, *, backend: Backend | None = None
) -> Tensor:
    """fp64 ``[U]`` squared norms of embedding gradients: :func:`fastclip.reference.embedding_norm`.

    ids: int ``[N]``, g: ``[N, d]``, offsets: int32 ``[U + 1]``. Raises as linear_norm.
    """
    check_rows(offsets, ids=ids, g=g)
    return run("embedding_norm", backend, ids, g, offsets, padding_idx)


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
    check_rows(head_offsets, h=h, z=z)
    check_rows(offsets, ids=ids, e=e)
    return run("tied_cross", backend, h, z, head_offsets, ids, e, offsets, padding_idx)


def affine_norm(g: Tensor, x_hat: Tensor | None, offsets: Tensor, *, backend: Backend | None = None) -> Tensor:
    """fp64 ``[U]`` squared norms for a bias (x_hat None) or a gain: :func:`fastclip.reference.affine_norm`.

    g, x_hat: ``[N, p]``, offsets: int32 ``[U + 1]``. Raises as linear_norm.
    """
    check_rows(offsets, g=g, x_hat=x_hat)
    return run("affine_norm", backend, g, x_hat, offsets)


def segment_sum(g: Tensor, x_hat: Tensor | None, offsets: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[U, p] sums of ``g_t`` or ``g_t * x_hat_t`` a unit: :func:`fastclip.reference.segment_sum`. Raises as linear_norm."""
    check_rows(offsets, g=g, x_hat=x_hat)
    return run("segment_sum", backend, g, x_hat, offsets)


def layer_norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    offsets: Tensor,
    bias: bool,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """dx ``[N, p]`` and gradients of gain and bias ``[1 or 2, U, p]``: :func:`fastclip.reference.layer_norm_backward`.

    Raises as linear_norm, and ValueError where mean, rstd or weight do not fit.
    """
    check_rows(offsets, g=g, x=x, mean=mean, rstd=rstd)
    if g.shape != x.shape or (weight is not None and weight.shape != x.shape[1:]):
        raise ValueError(f"g must be x's {list(x.shape)} and weight {list(x.shape[1:])}, got {list(g.shape)}")
    return run("layer_norm_backward", backend, g, x, mean, rstd, weight, offsets, bias)


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
    check_rows(offsets, a=a, g=g)
    if out.shape != (g.shape[1], a.shape[1]):
        raise ValueError(f"out must have shape [{g.shape[1]}, {a.shape[1]}], got {list(out.shape)}")
    run("clipped_gemm", backend, a, g, offsets, factors, out, accumulate)
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
    check_rows(offsets, ids=ids, g=g)
    run("clipped_embedding", backend, ids, g, offsets, factors, out, padding_idx)
    return out


def clipped_sum(grads: Tensor, factors: Tensor, out: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``out += sum_u factors[u] grads[u]``, returned: :func:`fastclip.reference.clipped_sum`.

    grads: ``[U, ...]``, factors: ``[U]``, out: fp32 or fp64 ``[...]``. Raises ValueError if the shapes differ.
    """
    if grads.shape[1:] != out.shape:
        raise ValueError(f"out must have shape {list(grads.shape[1:])}, got {list(out.shape)}")
    run("clipped_sum", backend, grads, factors, out)
    return out


def cross_entropy(logits: Tensor, labels: Tensor, *, backend: Backend | None = None) -> Tensor:
    """fp32 ``[2, R]`` (fp64 for fp64) losses and log-sum-exps of rows: :func:`fastclip.reference.cross_entropy`.

    logits: ``[R, V]``, labels: int ``[R]`` in [0, V). Raises ValueError if the shapes do not fit.
    """
    _check_labels(logits, labels)
    return run("cross_entropy", backend, logits, labels)


def cross_entropy_backward(
    logits: Tensor, labels: Tensor, lse: Tensor, g: Tensor, *, backend: Backend | None = None
) -> Tensor:
    """``logits = g_r (softmax(logits) - onehot(labels))``, returned: :func:`fastclip.reference.cross_entropy_backward`.

    logits: ``[R, V]``, written; lse, g: ``[R]``. Raises as cross_entropy.
    """
    _check_labels(logits, labels)
    if lse.shape != labels.shape or g.shape != labels.shape:
        raise ValueError(f"lse and g must be {list(labels.shape)}, got {list(lse.shape)} and {list(g.shape)}")
    run("cross_entropy_backward", backend, logits, labels, lse, g)
    return logits


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"logits must be [R, V] and labels integers [R], got {list(logits.shape)} and {labels.dtype} {list(labels.shape)}"
        )


class Draw(NamedTuple):
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
    stream = draws[0][:-1]
    if any(d[:-1] != stream for d in draws):
        raise ValueError("draws must differ in nothing but their offset: one release has one std, scale, key and step")
    places = [d.place() for d in draws]
    return [block for block, _ in places], [skip for _, skip in places]


def add_noise(grad_sum: Tensor, out: Tensor, draw: Draw, *, backend: Backend | None = None) -> Tensor:
    """``out = round((grad_sum + std * z) * scale)``, returned: :func:`fastclip.random.add_noise`.

    grad_sum: ``[n]`` fp32 or fp64, out: ``[n]`` fp32, bf16 or fp16, contiguous, on CPU. Raises RuntimeError if ``backend``
    cannot run.
    """
    kernel = _noise_kernel("add_noise", backend, grad_sum)
    if kernel:
        kernel(grad_sum, out, *draw.stream(), *draw.place())
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
    kernel = _noise_kernel("clip_accumulate_noise", backend, outs[0])
    if kernel:
        kernel(samples, factors, outs, *draws[0].stream(), *_places(draws))
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
    kernel = _noise_kernel("noise_adamw", backend, params[0])
    if kernel:
        tensors = [list(x) for x in (params, grads, exp_avgs, exp_avg_sqs)]
        kernel(*tensors, *draws[0].stream(), *_places(draws), lr, *betas, eps, weight_decay, list(steps))
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
    kernel = _noise_kernel("noise_sgd", backend, params[0])
    if kernel:
        tensors = [list(x) for x in (params, grads, momentum_buffers)]
        kernel(*tensors, *draws[0].stream(), *_places(draws), *rest)
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


def _noise_kernel(name: str, backend: Backend | None, first: Tensor) -> Callable[..., Any] | None:
    """What runs a noise op on tensors of first's device; None for numpy."""
    check_backend(backend)
    if backend == "torch" or (backend is None and _cpp_missing is not None and not first.is_cuda):
        return None
    return compiled(name, backend, first)


def _signed(word: int) -> int:
    """The two's complement number with these 64 bits: schemas know no other."""
    return word - 2**64 if word >= 2**63 else word
