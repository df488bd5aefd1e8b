"""What the sections of bench/gpu.py share: the device and its timers, and fastclip from the checkout."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import importlib.util
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SHORT = 0.1  # ms: below, the gap between launches is part of what events measure
L2_BYTES = 1.5e8  # more than any GPU's second-level cache
QUANTILES = [0.5, 0.2, 0.8]
TOY = 16


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def use_checkout() -> None:
    """Makes fastclip importable where it is not installed, fastclip.kernels with it, and tests/kernel_cases.py."""
    here = ROOT / "bench"
    # Last: there is an opacus.py in this folder.
    sys.path[:] = [*(x for x in sys.path if Path(x).resolve() != here), str(here), str(ROOT / "tests")]
    if installed("fastclip-dp"):
        return
    sys.path.insert(0, str(ROOT))
    folder = ROOT / "kernels"
    places = [str(folder)]
    spec = importlib.util.spec_from_file_location(
        "fastclip.kernels", folder / "__init__.py", submodule_search_locations=places
    )
    assert spec is not None
    # fastclip looks for it while it is imported.
    sys.modules["fastclip.kernels"] = importlib.util.module_from_spec(spec)


@dataclass(frozen=True)
class Bench:
    """dry: CPU, toy sizes, Triton's interpreter and wall-clock timers, to see that the whole command runs."""

    dry: bool = False
    quick: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def size(self, full: int) -> int:
        return min(full, TOY) if self.dry else full

    def time(self, calls: Sequence[Callable[[], Any]], captured: bool = False) -> dict[str, Any]:
        """Milliseconds of one call: median, 20 and 80 % quantiles. calls: the same work on other memory, taken in turn.

        captured: what is short is also timed in a CUDA graph, where no gap between launches counts.
        """
        turn = itertools.cycle(calls)

        def run() -> None:
            next(turn)()

        if self.dry:
            started = time.perf_counter()
            run()
            return {"ms": 1e3 * (time.perf_counter() - started), "how": "perf_counter"}
        from triton import testing

        for _ in calls:
            run()
        rep = 40 if self.quick else 100
        found = dict(zip(("ms", "ms_20", "ms_80"), testing.do_bench(run, 25, rep, quantiles=QUANTILES), strict=True))
        found["how"] = "do_bench"
        if captured and found["ms"] < SHORT:
            try:
                values = testing.do_bench_cudagraph(run, rep=10, quantiles=QUANTILES)
                found |= dict(zip(("graph_ms", "graph_ms_20", "graph_ms_80"), values, strict=True))
            except Exception as error:
                self.wait()
                found["graph_refused"] = said(error)
        return found

    def time_steps(self, step: Callable[[], None], rounds: int) -> dict[str, Any]:
        """Wall-clock milliseconds of whole steps, the host's work in them, and the peak of memory."""
        self.wait()
        if not self.dry:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(1 if self.dry else rounds):
            started = time.perf_counter()
            step()
            self.wait()
            times.append(1e3 * (time.perf_counter() - started))
        peak = None if self.dry else torch.cuda.max_memory_allocated()
        return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times), "peak_bytes": peak}

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        if not self.dry:
            gc.collect()
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def sync_mode(self, mode: str) -> Iterator[None]:
        """torch's sync debug mode: "warn" or "error" at whatever lets the host wait for the device."""
        if self.dry:
            yield
            return
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def said(error: BaseException) -> str:
    """The error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def stack(error: BaseException) -> list[str]:
    """Where it was raised, outermost first, in files named from the checkout or the library's folder."""

    def name(file: str) -> str:
        path = Path(file)
        return (
            str(path.relative_to(ROOT))
            if ROOT in path.parents and "site-packages" not in file
            else "/".join(path.parts[-2:])
        )

    frames = traceback.extract_tb(error.__traceback__)
    return [f"{name(f.filename)}:{f.lineno} {f.name}: {f.line}" for f in frames]
