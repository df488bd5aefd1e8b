"""What one process of bench/opacus.py does: one workload with one library in one mode, stepped, timed or measured."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from opacus_models import WORKLOADS, Job, Workload, build
from torch import Tensor, nn

MAX_GRAD_NORM = 1.0
KEPT = 1 << 16  # elements of each parameter's gradient that are compared one by one
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h


@dataclass(frozen=True)
class Column:
    """`library` is "opacus", "fastclip.opacus" or "plain"; `adapted`: the model as changed for Opacus."""

    library: str
    mode: str = ""
    adapted: bool = False


class Training:
    """The training script: what a user of either library writes, and its clock."""

    def __init__(self, column: Column, workload: Workload, quick: bool, device: str, noise: float) -> None:
        self.cuda = device == "cuda"
        private = column.library != "plain"
        library = importlib.import_module(column.library) if private else None
        lstm = importlib.import_module(f"{column.library}.layers").DPLSTM if private else nn.LSTM
        self.job: Job = build(workload, quick, column.adapted, lstm, device)
        self.names = {n: p for n, p in self.job.model.named_parameters() if p.requires_grad}
        self.run, self.optimizer, self.criterion = self.job.model, self.job.optimizer, nn.CrossEntropyLoss()
        self.ghost = column.mode == "ghost"
        if library is not None:
            engine = library.PrivacyEngine()
            dataset = torch.utils.data.TensorDataset(self.job.inputs, self.job.labels)
            made = engine.make_private(
                module=self.job.model,
                optimizer=self.job.optimizer,
                criterion=self.criterion,
                # Only asked for its length: the steps all take this one batch.
                data_loader=torch.utils.data.DataLoader(dataset, batch_size=len(self.job.labels)),
                noise_multiplier=noise,
                max_grad_norm=MAX_GRAD_NORM,
                poisson_sampling=False,
                grad_sample_mode=column.mode,
            )
            self.run, self.optimizer = made[0], made[1]
            if self.ghost:
                self.criterion = made[2]

    def clock(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, look: bool = False) -> tuple[float, float, dict[str, np.ndarray]]:
        """Seconds of the whole step and of optimizer.step(), and the digest of p.grad after it if `look`."""
        start = self.clock()
        logits = self.job.forward(self.run, self.job.inputs)
        labels = self.job.labels
        if self.ghost and logits.dim() == 3:
            loss = self.criterion(logits.flatten(0, 1), labels.flatten(), shape=logits.shape)
        else:
            loss = self.criterion(logits.flatten(0, -2), labels.flatten())
        loss.backward()
        before = self.clock()
        self.optimizer.step()
        after = self.clock()
        seen = digest({n: p.grad for n, p in self.names.items()}) if look else {}
        again = self.clock()
        self.optimizer.zero_grad()
        return self.clock() - again + after - start, after - before, seen


def digest(gradients: dict[str, Tensor | None]) -> dict[str, np.ndarray]:
    """Of each gradient its norm and up to KEPT elements at even distances; whole ones would be half a GB a process."""
    seen = {}
    for name, gradient in gradients.items():
        if gradient is None:
            raise RuntimeError(f"{name} has no p.grad after optimizer.step()")
        flat = gradient.detach().reshape(-1)
        # An odd distance walks through the columns of matrices whose width is even.
        distance = -(-flat.numel() // KEPT) | 1
        norm = torch.linalg.vector_norm(flat, dtype=torch.float64)
        seen[name] = np.concatenate([[norm.item()], flat[::distance].double().cpu().numpy()])
    return seen


def one_by_one(training: Training) -> dict[str, np.ndarray]:
    """Digest of the clipped mean gradient by its definition: one backward an example, plain torch."""
    job, parameters = training.job, training.names
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for i in range(len(job.labels)):
        logits = job.forward(job.model, job.inputs[i : i + 1])
        loss = training.criterion(logits.flatten(0, -2), job.labels[i : i + 1].flatten())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        factor = (MAX_GRAD_NORM / norm).clamp(max=1.0) / len(job.labels)
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += factor * gradient
    return digest(total)


def _resident(name: str) -> int:
    with open("/proc/self/status") as status:
        match = re.search(rf"{name}:\s+(\d+) kB", status.read())
    assert match is not None
    return int(match.group(1)) * 1024


def mallopt(threshold: int) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, threshold)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * threshold)


def restart_peak() -> str:
    """Lets the kernel's peak of the resident size start anew; how the peak will be taken."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return "ru_maxrss"
    return "VmHWM"


def peak_of(training: Training) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Peak bytes of two steps above what the process held before them, and the first step's gradients and seconds."""
    # The second step is the one with optimizer state.
    first: dict[str, np.ndarray] = {}
    if training.cuda:
        held, peak, how = torch.cuda.memory_allocated(), 0, "max_memory_allocated"
        torch.cuda.reset_peak_memory_stats()
    else:
        how = restart_peak()
        held, peak = _resident("VmRSS"), 0
    seconds = 0.0
    for index in range(2):
        whole, _, seen = training.step(look=index == 0)
        seconds, first = seconds or whole, first or seen
        training.optimizer.noise_multiplier = 1.0  # as schedulers set it
    if training.cuda:
        peak = torch.cuda.max_memory_allocated()
    elif how == "VmHWM":
        peak = _resident("VmHWM")
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "peak_bytes": peak - held,
        "bytes_before": held,
        "peak_taken_from": how,
        "first_step_seconds": seconds,
    }, first


def serve(
    pipe: Connection, name: str, column: Column, task: str, quick: bool, threads: int, device: str, keep: str
) -> None:
    """Entry of a process. `task` "measure": memory and gradients first; "time": ready. Then steps as asked, until None.

    Whatever is raised is the answer, as {"error": text}.
    """
    try:
        warnings.simplefilter("ignore")
        torch.set_num_threads(threads)
        workload = WORKLOADS[name]
        # Code that is touched for the first time, and thread pools, are no step's memory. A refusal is asked for below.
        with contextlib.suppress(Exception):
            Training(column, workload, True, device, noise=1.0).step()
        if task == "measure":
            # Freed blocks go back at once, also those of three examples that fastclip tries a model on: otherwise glibc keeps
            # holes, and what is measured is where they lie.
            mallopt(1 << 16)
            training = Training(column, workload, quick, device, noise=0.0)
            if column.mode == "one by one":
                figures, gradients = {}, one_by_one(training)
            else:
                figures, gradients = peak_of(training)
            np.savez(keep, **gradients)
            mallopt(32 << 20)  # where glibc gets by itself once blocks of that size have been freed
        else:
            figures = {"ready": True}
            training = Training(column, workload, quick, device, noise=1.0)
        pipe.send(figures)
        if (steps := pipe.recv()) is None:
            return
        training.step()  # allocators, optimizer state, whatever a library settles at its first batch
        pipe.send({"seconds": [training.step()[:2] for _ in range(steps)]})
        while (steps := pipe.recv()) is not None:
            pipe.send({"seconds": [training.step()[:2] for _ in range(steps)]})
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})
