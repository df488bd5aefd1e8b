"""csrc/cuda without a GPU: what nvcc makes of the kernels, and their values, where g++ compiles the same source to loops."""

import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from fastclip.random import Key, nonce
from kernels import needs_kernels

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
TABLE = Path(__file__).with_name("cuda_resources.json")
KEY = Key(bytes(range(32)))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MIDDLES = {torch.bfloat16: 1 + 2**-8, torch.float16: 1 + 2**-11}  # between 1 and the next number

# The binding and the kernels' loops under another namespace, for CPU tensors, with no stream and no device to choose.
ON_HOST = """
#define USE_CUDA
#include <torch/csrc/stable/library.h>
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(fastclip_on_host, CPU, m, C10_UID)
#include "binding.cpp"
#include "kernels.cu"
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
"""


def run(*command):
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)]
    if not any(found):
        pytest.skip("no nvcc on this machine")
    return next(x for x in found if x)


def by_kernel(text, marker):
    """{"NoiseStep<AdamW>": text from there to the next} of what is said after each marker and a mangled name."""
    parts = re.split(rf"{marker}(_Z\w+)", text)[1:]
    names = run("c++filt", *parts[::2]).splitlines()
    jobs = [name.replace("fastclip::cuda::", "").split("list_kernel<")[1].split(" >(")[0] for name in names]
    return dict(zip(jobs, parts[1::2], strict=True))


def resources(report, ptx):
    """Of every kernel: registers, bytes of stack, spills and shared memory, and accesses of 16 bytes."""
    code = by_kernel(ptx, r"\.entry ")
    found = {}
    for kernel, text in by_kernel(report, "Compiling entry function '").items():
        stack, *spills = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .*? stores, (\d+)", text).groups())
        shared = re.search(r"(\d+) bytes smem", text)
        found[kernel] = {
            "registers": int(re.search(r"Used (\d+) registers", text)[1]),
            "stack": stack,
            "spills": sum(spills),
            "shared": int(shared[1]) if shared else 0,
            "wide loads": len(re.findall(r"ld\.global\S*\.v4\.[a-z]32", code[kernel])),
            "wide stores": len(re.findall(r"st\.global\S*\.v4\.[a-z]32", code[kernel])),
        }
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_registers_and_code_are_those_of_the_table(arch, tmp_path):
    nvcc, table = find_nvcc(), json.loads(TABLE.read_text())
    flags = ["-std=c++20", "-fmad=false", f"-arch={arch}", "-cubin", "-Xptxas", "-v", "--keep", "--keep-dir", tmp_path]
    report = run(nvcc, *flags, SOURCES / "kernels.cu", "-o", tmp_path / "kernels.cubin")
    ptx = (tmp_path / "kernels.ptx").read_text()
    found = resources(report, ptx)

    # Bits are the CPU's only if nothing is contracted, approximated or flushed to zero.
    assert not re.findall(r"\b(?:fma|mad)\S*\.f\d\d|\S+\.approx\S*|\S+\.ftz\S*", ptx)
    assert {kernel: x["spills"] + x["stack"] for kernel, x in found.items()} == dict.fromkeys(table[arch], 0)
    if re.search(r"V([\d.]+)", run(nvcc, "--version"))[1] == table["nvcc"]:
        assert found == table[arch], json.dumps(found, indent=1)
    else:
        assert all(x["registers"] <= 255 for x in found.values())


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++ on this machine")
    for op in ("noise_adamw", "noise_sgd", "clip_accumulate_noise"):
        schema = str(getattr(torch.ops.fastclip, op).default._schema)
        torch.library.define(f"fastclip_on_host::{op}", schema.removeprefix(f"fastclip::{op}"))
    folder, libraries = tmp_path_factory.mktemp("on_host"), Path(torch.__file__).parent / "lib"
    (folder / "on_host.cpp").write_text(ON_HOST)
    includes = itertools.chain.from_iterable(("-isystem", x) for x in include_paths())
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    flags += ["-shared", "-fPIC", "-Wl,-Bsymbolic", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{SOURCES}"]
    built = folder / "on_host.so"
    run("g++", *flags, *includes, folder / "on_host.cpp", f"-L{libraries}", "-ltorch_cpu", "-lc10", "-o", built)
    torch.ops.load_library(built)
    return torch.ops.fastclip_on_host


def draw(count, seeded):
    """std, scale, key, nonce, blocks and skips of `count` tensors: aligned ones, any others, blocks that carry, the last."""
    blocks = torch.randint(0, 2**40, (count,)).tolist()
    blocks[:3] = [2**32 - 3, 7, 2**61 if seeded else -400]
    skips = [(0, 4, 0, k % 8)[k % 4] for k in range(count)]
    return [1.5, 1 / 3, KEY.tensor(), nonce(2**47 + 3, 1, seeded) - (2**64 if seeded else 0), blocks, skips]


SIZES = [1100, 1, 7, 8, 9, 0, 23, 1016, 1024, 1025, 2500, *[5, 64] * 60]


def cut(flat, sizes=SIZES):
    """Tensors of these sizes out of one, with gaps between them; every other one starts at 16 bytes, others where they may."""
    out, start = [], 3
    for k, size in enumerate(sizes):
        start = -(-start // 16) * 16 if k % 2 == 0 else start + k % 3
        out.append(flat[start : start + size])
        start += size
    return out


def bits(x):
    return x.view({4: torch.int32, 2: torch.int16}[x.element_size()])


@needs_kernels
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize(
    ("op", "arrays", "rest"),
    [
        ("noise_adamw", 4, (1e-3, 0.9, 0.999, 1e-8, 0.01)),
        ("noise_sgd", 2, (0.1, 0.0, 0.0, 0.01, False, False)),
        ("noise_sgd", 3, (0.1, 0.9, 0.1, 0.01, False, False)),
        ("noise_sgd", 3, (0.1, 0.9, 0.0, 0.0, True, False)),
        ("noise_sgd", 3, (0.1, 0.9, 0.1, 0.01, False, True)),
    ],
)
def test_steps_have_the_bits_of_the_cpu_kernels(on_host, op, arrays, rest, seeded):
    before = torch.randn(4, 20_000) * torch.tensor([1.0, 10.0, 1.0, 1.0])[:, None]
    before[3].square_()
    results, place = [], draw(len(SIZES), seeded)
    for ops in (torch.ops.fastclip, on_host):
        flat = before.clone()
        lists = [cut(x) for x in flat[:arrays]] + [[] for _ in range(3 - arrays)]
        steps = [[1 + 7 * k for k in range(len(SIZES))]] if op == "noise_adamw" else []
        getattr(ops, op)(*lists, *place, *rest, *steps)
        results.append(flat)
    assert torch.equal(*map(bits, results))  # the gaps too: nothing is written beside the tensors
    assert all((x != y).any() for x, y in zip(cut(results[1][0]), cut(before[0]), strict=True) if len(x))


@needs_kernels
@pytest.mark.parametrize("units", [0, 1, 6])
@pytest.mark.parametrize("seeded", [False, True])
def test_clipped_sums_have_the_bits_of_the_cpu_kernels(on_host, units, seeded):
    pairs = list(itertools.product(FLOATS, FLOATS))
    sizes = [size for size in SIZES for _ in pairs]  # more of each pair of dtypes than one launch takes
    factors = torch.rand(units, dtype=torch.float32)
    place = draw(len(sizes), seeded)
    place[1] = 1.0
    samples = []
    for k, size in enumerate(sizes):
        into = torch.randn(units * size + 16).to(pairs[k % 9][0])
        x = into[k % 5 : k % 5 + units * size].view(units, size)
        samples.append(x.t().contiguous().t() if k % 7 == 6 else x)
    if units > 1:
        factors[2] = 0
        for x in samples:
            x[2] = torch.tensor([float("inf"), float("nan")]).repeat(x.shape[1])[: x.shape[1]]
    results = []
    for ops in (torch.ops.fastclip, on_host):
        flats = {dtype: torch.full((150_000,), 7.0, dtype=dtype) for dtype in FLOATS}
        cuts = {dtype: cut(flats[dtype], sizes) for dtype in FLOATS}
        outs = [cuts[pairs[k % 9][1]][k] for k in range(len(sizes))]
        ops.clip_accumulate_noise(samples, factors, outs, *place)
        results.append(flats)
        assert all(x.isfinite().all() and (x != 7).any() for x in outs if len(x) > 4)
    assert all(torch.equal(bits(results[0][dtype]), bits(results[1][dtype])) for dtype in FLOATS)


def every(dtype):
    """All numbers of 16 bits, or fp32 ones at and beside where their 16-bit roundings change."""
    if dtype != torch.float32:
        return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    beside = torch.tensor([-1, 0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001], dtype=torch.int32)
    return (every(torch.bfloat16).float().view(torch.int32)[:, None] + beside).view(torch.float32).flatten()


@needs_kernels
@pytest.mark.parametrize(("source", "target"), list(itertools.product(FLOATS, FLOATS)))
def test_every_number_is_widened_and_rounded_as_on_the_cpu(on_host, source, target):
    samples, results = every(source)[None], []
    for ops in (torch.ops.fastclip, on_host):
        out = torch.zeros(samples.shape[1], dtype=target)
        factors = torch.ones(1, dtype=torch.float64)
        ops.clip_accumulate_noise([samples], factors, [out], 0.0, 1.0, KEY.tensor(), 0, [0], [0])
        results.append(out)
    compared = [bits(x) for x in results] if target != torch.float32 else [bits(x.nan_to_num(7)) for x in results]
    assert torch.equal(*compared)  # fp32 NaN may differ in their bits


@pytest.mark.parametrize("dtype", list(MIDDLES))
def test_rounded_once(on_host, dtype):
    """A little above the middle between two numbers goes up, though fp32 takes it for the middle, which would go down."""
    samples, out = torch.tensor([[MIDDLES[dtype]] * 9, [1.0] * 9]), torch.zeros(9, dtype=dtype)
    factors = torch.tensor([1, 2**-40], dtype=torch.float64)
    on_host.clip_accumulate_noise([samples], factors, [out], 0.0, 1.0, KEY.tensor(), 0, [0], [0])
    assert (out == 1 + torch.finfo(dtype).eps).all()


class Call:
    """Good arguments of an op on two parameters; `change` makes them bad ones."""

    def __init__(self, op, **change):
        self.op, fp32 = op, lambda: [torch.ones(8), torch.ones(3)]
        lists = {"noise_adamw": ("params", "grads", "m", "v"), "noise_sgd": ("params", "grads", "buffers")}
        self.arguments = {name: fp32() for name in lists.get(op, ())}
        if op == "clip_accumulate_noise":
            samples = [torch.ones(4, 8), torch.ones(4, 3)]
            self.arguments |= {"samples": samples, "factors": torch.ones(4, dtype=torch.float64), "outs": fp32()}
        self.arguments |= {"std": 1.0, "scale": 1.0, "key": KEY.tensor(), "nonce": 0, "blocks": [0, 1], "skips": [0, 0]}
        if op == "noise_adamw":
            self.arguments |= dict(zip("abcde", (1e-3, 0.9, 0.999, 1e-8, 0.0), strict=True)) | {"steps": [1, 1]}
        if op == "noise_sgd":
            self.arguments |= {"lr": 1e-3, "momentum": 0.9} | dict.fromkeys("de", 0.0) | dict.fromkeys("fg", False)
        self.arguments |= {name: x(self.arguments) if callable(x) else x for name, x in change.items()}

    def __call__(self, ops):
        getattr(ops, self.op)(*self.arguments.values())

    def tensors(self):
        return [x for argument in self.arguments.values() if isinstance(argument, list) for x in argument]


@pytest.mark.parametrize("op", ["noise_adamw", "noise_sgd", "clip_accumulate_noise"])
def test_good_arguments_and_empty_lists_are_taken(on_host, op):
    Call(op)(on_host)
    empty = {name: [] for name, x in Call(op).arguments.items() if isinstance(x, list)}
    Call(op, **empty)(on_host)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("noise_adamw", {"params": [torch.ones(8), torch.ones(3).double()]}, "contiguous fp32 of one size"),
        ("noise_adamw", {"grads": [torch.ones(8), torch.ones(4)]}, "contiguous fp32 of one size"),
        ("noise_adamw", {"v": [torch.ones(16)[::2], torch.ones(3)]}, "contiguous fp32 of one size"),
        ("noise_adamw", {"m": [torch.ones(8)]}, "lists of one length"),
        ("noise_adamw", {"steps": [1]}, "one step for each"),
        ("noise_adamw", {"steps": [1, 0]}, "counts from 1, got 0"),
        ("noise_adamw", {"m": lambda a: a["v"]}, "share memory"),
        ("noise_adamw", {"grads": lambda a: [a["params"][0], torch.ones(3)]}, "share memory"),
        ("noise_adamw", {"params": lambda a: [a["grads"][0], torch.ones(3)]}, "share memory"),
        ("noise_sgd", {"grads": lambda a: [torch.ones(8), a["buffers"][0][5:]]}, "share memory"),
        ("noise_sgd", {"buffers": []}, "only momentum does"),
        ("noise_sgd", {"momentum": 0.0}, "only momentum does"),
        ("noise_sgd", {"blocks": [0]}, "one block and one skip"),
        ("noise_sgd", {"skips": [0, 0, 0]}, "one block and one skip"),
        ("noise_sgd", {"skips": [0, 8]}, r"skip must be in \[0, 8\), got 8"),
        ("noise_sgd", {"skips": [-1, 0]}, r"skip must be in \[0, 8\), got -1"),
        ("noise_sgd", {"key": torch.ones(31, dtype=torch.uint8)}, "key must be 32"),
        ("noise_sgd", {"key": torch.ones(32)}, "key must be 32"),
        ("clip_accumulate_noise", {"scale": 0.5}, "scale must be 1, got 0.5"),
        ("clip_accumulate_noise", {"factors": torch.ones(3)}, "with U = 3"),
        ("clip_accumulate_noise", {"factors": torch.ones(2, 2)}, r"factors must be \[U\]"),
        ("clip_accumulate_noise", {"outs": [torch.ones(8), torch.ones(4)]}, "with U = 4"),
        ("clip_accumulate_noise", {"outs": [torch.ones(8)]}, "one out for each"),
        ("clip_accumulate_noise", {"outs": [torch.ones(16)[::2], torch.ones(3)]}, "outs must be contiguous"),
        ("clip_accumulate_noise", {"outs": [torch.ones(8), torch.ones(3).double()]}, "fp32, bf16 or fp16"),
        ("clip_accumulate_noise", {"samples": [torch.ones(4, 8), torch.ones(4, 3).int()]}, "fp32, bf16 or fp16"),
        ("clip_accumulate_noise", {"outs": lambda a: [a["samples"][0][3], torch.ones(3)]}, "share memory"),
        ("clip_accumulate_noise", {"outs": lambda a: [a["outs"][0], a["outs"][0][5:]]}, "share memory"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(on_host, op, change, message):
    call = Call(op, **change)
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
        call(on_host)
    assert all((x == 1).all() for x in call.tensors() if isinstance(x, torch.Tensor))


def test_samples_may_share_memory(on_host):
    shared = torch.ones(4, 8)
    Call("clip_accumulate_noise", samples=[shared, shared[:, :3]])(on_host)
