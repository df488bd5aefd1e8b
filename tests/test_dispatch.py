"""What runs an op: the choice of a backend, and what importing fastclip must not do."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import CASES, Maker, joined
from torch.utils._pytree import tree_leaves

from fastclip import dispatch, ops
from kernels import needs_kernels

triton = pytest.importorskip("triton", reason="no triton on this machine")
ROWS = torch.ones(3, 2), [torch.ones(3, 2)], torch.tensor([0, 3])


def in_a_fresh_process(script, **environment):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_fastclip_imports_no_triton_and_touches_no_device():
    script = (
        "import sys, torch, fastclip; fastclip.backends; print('triton' in sys.modules, torch.cuda.is_initialized())"
    )
    assert in_a_fresh_process(script) == "False False"


def test_triton_by_name_on_cpu_needs_the_interpreter():
    script = """
import torch, fastclip
try:
    fastclip.ops.linear_norm(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0, 3]), backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert "set TRITON_INTERPRET=1 before anything imports triton" in in_a_fresh_process(script)
    assert in_a_fresh_process(script, TRITON_INTERPRET="1") == ""


def test_without_triton_everything_else_runs():
    script = """
import sys
sys.modules["triton"] = None
import torch, fastclip
print(fastclip.backends()["triton"]["state"], fastclip.backends()["triton"]["why"])
print(fastclip.ops.linear_norm(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0, 3])).item())
try:
    fastclip.ops.linear_norm(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0, 3]), backend="triton")
except RuntimeError as error:
    print(error)
"""
    said = in_a_fresh_process(script).splitlines()
    assert said[0].startswith("absent triton is not installed") and float(said[1]) == pytest.approx(36)
    assert said[2].startswith("backend='triton' cannot run: triton is not installed")


def test_every_launcher_that_is_there_serves_cuda():
    for name, (module, function) in dispatch.LAUNCHERS.items():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastclip::{name}", "CUDA")
        assert callable(getattr(importlib.import_module(module), function))


def test_a_triton_that_does_not_load_leaves_cuda_to_plain_torch(monkeypatch):
    def fails(name, *args):
        raise ImportError("no libcuda")

    monkeypatch.setattr(dispatch, "_launch", fails)
    monkeypatch.setattr(dispatch, "_triton_missing", None)
    norms = dispatch._on_cuda("linear_norms", *ROWS, "auto")
    assert torch.equal(norms, ops.linear_norms(*ROWS, backend="torch"))
    assert "no libcuda" in dispatch.backends()["triton"]["why"]
    with pytest.raises(RuntimeError, match="noise_sgd cannot run on CUDA: triton does not load"):
        dispatch._on_cuda("noise_sgd", *ROWS)


def test_a_backend_asked_for_by_name_runs_or_raises():
    meta = torch.ones(5, 3, device="meta")
    with pytest.raises(RuntimeError, match='affine_norm: backend="triton" cannot run on meta'):
        ops.affine_norm(meta, None, torch.tensor([0, 5]), backend="triton")
    with pytest.raises(RuntimeError, match='cross_entropy: backend="triton" cannot run, no kernel'):
        ops.cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), backend="triton")
    with pytest.raises(ValueError, match="backend must be one of triton, cpp, torch or None, got 'cuda'"):
        ops.linear_norms(*ROWS, backend="cuda")


@needs_kernels
def test_noise_runs_where_it_is_asked_to():
    from kernel_cases import noise_calls

    for name, args in noise_calls().items():
        assert dispatch.compiled(name, None, *args) is getattr(torch.ops.fastclip, name)


class Launches:
    """A kernel that is not run."""

    def __getitem__(self, grid):
        assert all(isinstance(n, int) and n > 0 for n in grid), grid
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("case", {case.op: case for case in reversed(CASES)}.values(), ids=lambda case: case.op)
def test_no_launcher_waits_for_the_device(case, monkeypatch):
    """Tensors without numbers raise where the host would read one."""
    from triton.runtime.jit import KernelInterface

    monkeypatch.setattr(KernelInterface, "__getitem__", Launches.__getitem__)
    module, function = dispatch.LAUNCHERS[case.op]

    def to_meta(x):
        return [to_meta(y) for y in x] if isinstance(x, list) else x.to("meta") if isinstance(x, torch.Tensor) else x

    args = case.make(torch.float32, torch.device("cpu"))
    getattr(importlib.import_module(module), function)(*(to_meta(x) for x in args))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_on_cpu(case):
    """The op as its device runs it: schema and fake tell the truth, and values are those of fp64, or not below."""
    device, op = torch.device("cpu"), getattr(torch.ops.fastclip, case.op).default
    args = case.make(torch.float32, device)
    # torch's opcheck cannot copy strided tensors without elements.
    if all(x.numel() for x in tree_leaves(args) if isinstance(x, torch.Tensor)):
        torch.library.opcheck(op, case.make(torch.float32, device), test_utils=("test_schema", "test_faketensor"))
    exact = case.exact(args)
    found = op(*args)
    if found is None:
        found = next(x for x, argument in zip(args, op._schema.arguments, strict=False) if argument.name == "out")
    if case.op == "linear_norms":
        found, exact = found[:, 0], exact[:, 0]  # what is behind it are bounds, and other routes have others
    found = joined(found).double()
    if case.op in ("linear_norms", "row_norm_products"):
        assert bool((found >= exact * (1 - 1e-6)).all())
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 * scale + 1e-7)


def test_empty_offsets_have_an_answer():
    m = Maker(torch.float32, torch.device("cpu"))
    found = dispatch.run("linear_norms", "triton", m.rows(0, 3), [m.rows(0, 2)], m.offsets([]), "auto")
    assert found.shape == (1, 2, 0)
