"""Every launcher's own calls, compiled for a GPU that is not there: what it passes fits its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

LAUNCHES = """
import importlib

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastclip.dispatch import LAUNCHERS
from kernel_cases import cases_of, noise_calls


class NoDevice:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


run = JITFunction.run
launched = []


def compile_only(self, *args, grid, warmup, **options):
    assert all(type(size) is int and size > 0 for size in grid), grid
    launched.append(run(self, *args, grid=grid, warmup=True, **options))


driver.set_active(NoDevice())
JITFunction.run = compile_only
calls = noise_calls()
for op, (module, function) in LAUNCHERS.items():
    for case in cases_of(op):
        if case.name.startswith(("ragged", "[1000]")):
            calls[op] = case.make(torch.bfloat16, torch.device("cpu"))
    before = len(launched)
    getattr(importlib.import_module(module), function)(*calls[op])
    assert len(launched) > before, op
assert all(kernel.asm["cubin"] for kernel in launched)
"""


def test_launchers_calls_compile(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", LAUNCHES]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
