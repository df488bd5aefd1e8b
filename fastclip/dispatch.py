"""Every op's schema and fake, and the choice of a backend.

The device decides: Triton on CUDA, C++ on CPU, plain torch (:mod:`fastclip.reference`, :mod:`fastclip.reference_head`) where a
compiled one is absent. Where csrc/cuda was built, it goes before Triton. Importing this module imports no Triton and touches no
device.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from fastclip import reference, reference_head

Backend = Literal["triton", "cpp", "torch"]

SCHEMAS = {
    "linear_norms": '(Tensor a, Tensor[] g, Tensor offsets, str route="auto") -> Tensor',
    "row_norm_products": "(Tensor a, Tensor g, Tensor offsets) -> Tensor",
    "embedding_norm": "(Tensor ids, Tensor g, Tensor offsets, int? padding_idx=None) -> Tensor",
    "tied_cross": "(Tensor h, Tensor z, Tensor head_offsets, Tensor ids, Tensor e, Tensor offsets, int? padding_idx=None)"
    " -> Tensor",
    "affine_norm": "(Tensor g, Tensor? x_hat, Tensor offsets) -> Tensor",
    "segment_sum": "(Tensor g, Tensor? x_hat, Tensor offsets) -> Tensor",
    "layer_norm_backward": "(Tensor g, Tensor x, Tensor? mean, Tensor rstd, Tensor? weight, Tensor offsets, bool bias)"
    " -> (Tensor, Tensor)",
    "clipped_gemm": "(Tensor a, Tensor g, Tensor offsets, Tensor factors, Tensor(a!) out, bool accumulate=True) -> ()",
    "clipped_embedding": "(Tensor ids, Tensor g, Tensor offsets, Tensor factors, Tensor(a!) out, int? padding_idx=None)"
    " -> ()",
    "clipped_sum": "(Tensor grads, Tensor factors, Tensor(a!) out) -> ()",
    "cross_entropy": "(Tensor logits, Tensor labels) -> Tensor",
    "cross_entropy_backward": "(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor g) -> ()",
    "head_losses": "(Tensor h, Tensor weight, Tensor? bias, Tensor labels, float softcap) -> Tensor",
    "head_gradient": "(Tensor h, Tensor weight, Tensor? bias, Tensor labels, Tensor lse, Tensor g, int start, float softcap)"
    " -> Tensor",
}
_STREAM = "float std, float scale, Tensor key, int nonce"
NOISE_SCHEMAS = {
    "add_noise": f"(Tensor grad_sum, Tensor(a!) out, {_STREAM}, int block, int skip) -> ()",
    "clip_accumulate_noise": f"(Tensor[] grad_samples, Tensor factors, Tensor(a!)[] outs, {_STREAM}, int[] blocks, "
    "int[] skips) -> ()",
    "noise_adamw": f"(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, {_STREAM}, "
    "int[] blocks, int[] skips, float lr, float beta1, float beta2, float eps, float weight_decay, int[] steps) -> ()",
    "noise_sgd": f"(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, {_STREAM}, int[] blocks, "
    "int[] skips, float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool first) -> ()",
}


# Where Triton's launchers stand: each takes the arguments of its op's schema, and mutates and returns what that says.
LAUNCHERS = {
    "linear_norms": ("fastclip.kernels.linear_norms", "linear_norms"),
    "row_norm_products": ("fastclip.kernels.row_norms", "row_norm_products"),
    "embedding_norm": ("fastclip.kernels.embedding_norm", "embedding_norm"),
    "tied_cross": ("fastclip.kernels.tied_cross", "tied_cross"),
    "affine_norm": ("fastclip.kernels.affine_norm", "affine_norm"),
    "segment_sum": ("fastclip.kernels.affine_norm", "segment_sum"),
    "layer_norm_backward": ("fastclip.kernels.layer_norm", "layer_norm_backward"),
    "clipped_gemm": ("fastclip.kernels.clipped_gemm", "clipped_gemm"),
    "clipped_embedding": ("fastclip.kernels.clipped_embedding", "clipped_embedding"),
    "clipped_sum": ("fastclip.kernels.clipped_sum", "clipped_sum"),
    "head_losses": ("fastclip.kernels.linear_cross_entropy", "head_losses"),
    "head_gradient": ("fastclip.kernels.linear_cross_entropy", "head_gradient"),
    "add_noise": ("fastclip.kernels.add_noise", "add_noise"),
    "clip_accumulate_noise": ("fastclip.kernels.clip_accumulate_noise", "clip_accumulate_noise"),
    "noise_adamw": ("fastclip.kernels.noise_adamw", "noise_adamw"),
    "noise_sgd": ("fastclip.kernels.noise_sgd", "noise_sgd"),
}


def plain(name: str) -> Callable[..., Any]:
    """The op in plain torch."""
    return getattr(reference_head if hasattr(reference_head, name) else reference, name)


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

    def layer_norm_fake(g: Tensor, x: Tensor, mean: Any, rstd: Any, weight: Any, offsets: Tensor, bias: bool) -> Any:
        dtype = reference.accumulation_dtype(x.dtype)
        return x.new_empty(x.shape), x.new_empty(1 + bias, offsets.shape[0] - 1, x.shape[1], dtype=dtype)

    def cross_entropy_fake(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.new_empty(2, logits.shape[0], dtype=reference.accumulation_dtype(logits.dtype))

    def head_losses_fake(h: Tensor, *args: Any) -> Tensor:
        return h.new_empty(2, h.shape[0], dtype=reference.accumulation_dtype(h.dtype))

    def head_gradient_fake(h: Tensor, weight: Tensor, *args: Any) -> Tensor:
        return h.new_empty(h.shape[0], weight.shape[0])

    def nothing_fake(*args: Any) -> None:
        return None

    for name, schema in SCHEMAS.items():
        function, mutates = plain(name), schema.endswith("()")
        torch.library.define(f"fastclip::{name}", schema)
        torch.library.impl(f"fastclip::{name}", "default", without_result(function) if mutates else function)
        special: dict[str, Callable[..., Any]] = {
            "segment_sum": segment_sum_fake,
            "linear_norms": linear_norms_fake,
            "layer_norm_backward": layer_norm_fake,
            "cross_entropy": cross_entropy_fake,
            "head_losses": head_losses_fake,
            "head_gradient": head_gradient_fake,
        }
        fake: Callable[..., Any] = nothing_fake if mutates else special.get(name, norms_fake)
        torch.library.register_fake(f"fastclip::{name}", fake)
    # No default in Python: frames between the dispatcher and the function would hold the key.
    for name, schema in NOISE_SCHEMAS.items():
        torch.library.define(f"fastclip::{name}", schema)
        torch.library.register_fake(f"fastclip::{name}", nothing_fake)


def _load_cpp() -> str | None:
    """Loads the compiled kernels; why not, if not."""
    try:
        importlib.import_module("fastclip._C")
    except ImportError as error:
        return f"not built ({error}); reinstall with a C++20 compiler and --no-build-isolation"
    return None


def _register_triton() -> str | None:
    """Registers a launcher for CUDA for every op that has one and no CUDA C++; why Triton cannot run, if so."""
    if find_spec("triton") is None:
        return "triton is not installed: CUDA tensors run in plain torch"
    for name, (module, _) in LAUNCHERS.items():
        compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastclip::{name}", "CUDA")
        if not compiled and find_spec(module) is not None:
            torch.library.impl(f"fastclip::{name}", "cuda", partial(_on_cuda, name))
    return None


@cache
def _launcher(name: str) -> Callable[..., Any]:
    module, function = LAUNCHERS[name]
    return getattr(importlib.import_module(module), function)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, Tensor)]


def _launch(name: str, *args: Any) -> Any:
    # Triton launches on the current device, whatever its tensors are on.
    with torch.cuda.device_of(next(x for x in _tensors(args) if x.is_cuda)):
        return _launcher(name)(*args)


def _on_cuda(name: str, *args: Any) -> Any:
    global _triton_missing
    if _triton_missing is None:
        try:
            return _launch(name, *args)
        except ImportError as error:
            _triton_missing = f"triton does not load ({error}): CUDA tensors run in plain torch"
    if name in NOISE_SCHEMAS:
        raise RuntimeError(f"{name} cannot run on CUDA: {_triton_missing}")
    result = plain(name)(*args)
    return None if SCHEMAS[name].endswith("()") else result


_register()
cpp_missing = _load_cpp()
_triton_missing = _register_triton()
_ops = torch.ops.fastclip


def backends() -> dict[str, dict[str, str]]:
    """What is compiled, what is used, and why: ``{"torch": {"state": ..., "why": ...}, ...}``."""
    cpp = (
        {"state": "absent", "why": cpp_missing}
        if cpp_missing
        else {"state": "used", "why": "compiled: every op on CPU"}
    )
    if _triton_missing:
        triton = {"state": "absent", "why": _triton_missing}
    elif torch.cuda.is_available():
        triton = {"state": "used", "why": "installed: CUDA tensors, where CUDA C++ is not built"}
    else:
        triton = {"state": "idle", "why": "installed, no CUDA device: on CPU only by name, with TRITON_INTERPRET=1"}
    return {"triton": triton, "cpp": cpp, "torch": {"state": "used", "why": "plain torch and numpy, every device"}}


def check_backend(backend: Backend | None) -> None:
    if backend is None:
        return
    known = backends()
    if backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)} or None, got {backend!r}")
    if known[backend]["state"] == "absent":
        raise RuntimeError(f"backend={backend!r} cannot run: {known[backend]['why']}")


def run(name: str, backend: Backend | None, *args: Any) -> Any:
    """The op by its device, or by the backend that is asked for; raises RuntimeError where that cannot run."""
    check_backend(backend)
    if backend == "torch":
        return plain(name)(*args)
    return compiled(name, backend, *args)(*args)


def compiled(name: str, backend: Backend | None, *args: Any) -> Callable[..., Any]:
    """What runs the op on args by its device (None), in C++ or in Triton."""
    if backend == "cpp":
        _check_devices(name, "cpp", {"cpu"}, args)
    elif backend == "triton":
        return _triton(name, args)
    return getattr(_ops, name)


def _check_devices(name: str, backend: str, known: set[str], args: tuple[Any, ...]) -> set[str]:
    devices = {x.device.type for x in _tensors(args)}
    if devices - known:
        others = ", ".join(sorted(devices - known))
        raise RuntimeError(f'{name}: backend="{backend}" cannot run on {others}; leave backend out')
    return devices


def _triton(name: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    if name not in LAUNCHERS:
        raise RuntimeError(f'{name}: backend="triton" cannot run, no kernel in this version; leave backend out')
    if "cuda" in _check_devices(name, "triton", {"cuda", "cpu"}, args):
        return partial(_launch, name)
    interpreter = importlib.import_module("fastclip.kernels.interpreter")
    if not interpreter.is_interpreted(importlib.import_module(LAUNCHERS[name][0])):
        raise RuntimeError(
            f'{name}: backend="triton" runs on cpu in Triton\'s interpreter alone: set TRITON_INTERPRET=1 before anything '
            "imports triton, or leave backend out"
        )
    interpreter.accept_loop_bounds()
    return _launcher(name)


def check_rows(offsets: Tensor, **rows: Tensor | None) -> None:
    if offsets.dim() != 1 or offsets.numel() == 0 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be int32 of shape [U + 1], got {offsets.dtype} {list(offsets.shape)}")
    first, *others = [x for x in rows.values() if x is not None]
    if any(x.shape[:1] != first.shape[:1] for x in others):
        shapes = {name: list(x.shape) for name, x in rows.items() if x is not None}
        raise ValueError(f"all of {', '.join(shapes)} must have the same number of rows, got {shapes}")
    if first.is_cpu and not torch.compiler.is_compiling():
        _check_offsets(offsets, first.shape[0])


# Offsets that were found good: their version then, and the number of rows. One tensor serves every layer of a backward.
_good_offsets: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # by id(): a tensor has no hash of its values


def _check_offsets(offsets: Tensor, rows: int) -> None:
    key, counted = id(offsets), not offsets.is_inference()
    known = _good_offsets.get(key)
    if counted and known is not None and known[0]() is offsets and known[1:] == (offsets._version, rows):
        return
    # Not through a list: thousands of units are common.
    if offsets[0] != 0 or offsets[-1] != rows or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to the number of rows, {rows}; got {offsets[:8].tolist()}...")
    if counted:
        _good_offsets[key] = weakref.ref(offsets, lambda _: _good_offsets.pop(key, None)), offsets._version, rows
