"""The noise stream in Triton, in its interpreter or on a GPU: the same words, and the same bits as the CPU's kernels.

What has no bits to be compared with, because the package was installed without a compiler, is held against numpy's.
"""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from guards import DEVICE, Guard

from fastclip import ops, random, reference
from fastclip.random import Key, nonce
from kernels import needs_kernels

pytest.importorskip("triton", reason="triton is not installed")
import triton
import triton.language as tl
from fastclip.kernels import stream
from fastclip.kernels.add_noise import add_noise
from fastclip.kernels.clip_accumulate_noise import clip_accumulate_noise
from fastclip.kernels.noise_adamw import noise_adamw
from fastclip.kernels.noise_sgd import noise_sgd
from fastclip.kernels.normals import normal_pair

KEY = Key(bytes(range(32)))
PLAIN, SEEDED = nonce(5, 1, seeded=False), nonce(5, 1, seeded=True)
SIZES = (1, 7, 130)
CPP = torch.ops.fastclip
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter runs only where no GPU is")


@pytest.fixture
def guard():
    made = Guard()
    yield made
    made.check()


def draw_at(offset, mode=PLAIN, std=2.0, scale=0.5):
    return ops.Draw(std, scale, KEY, mode, offset)


def draws(mode=PLAIN):
    return [draw_at(3 + 1000 * k, mode) for k in range(len(SIZES))]


@triton.jit(do_not_specialize=stream.UNSPECIALIZED)
def words_kernel(
    out_ptr,
    block_ptr,
    key0: tl.uint32,
    key1: tl.uint32,
    key2: tl.uint32,
    key3: tl.uint32,
    key4: tl.uint32,
    key5: tl.uint32,
    key6: tl.uint32,
    key7: tl.uint32,
    nonce_low: tl.uint32,
    nonce_high: tl.uint32,
    SEEDED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    lane = tl.arange(0, BLOCKS)
    block = tl.load(block_ptr + lane).to(tl.uint64)
    words = stream.words(
        key0.to(tl.uint32),
        key1.to(tl.uint32),
        key2.to(tl.uint32),
        key3.to(tl.uint32),
        key4.to(tl.uint32),
        key5.to(tl.uint32),
        key6.to(tl.uint32),
        key7.to(tl.uint32),
        nonce_low.to(tl.uint32),
        nonce_high.to(tl.uint32),
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        SEEDED,
    )
    for i in tl.static_range(16):
        tl.store(out_ptr + lane * 16 + i, words[i].to(tl.int64))


def words(key, mode, blocks):
    """uint32 ``[len(blocks), 16]`` from the kernel; as many blocks as a power of 2."""
    out = torch.empty(len(blocks), 16, dtype=torch.int64, device=DEVICE)
    numbers = torch.from_numpy(np.array(blocks, dtype=np.uint64).view(np.int64)).to(DEVICE)
    arguments = stream.stream_arguments(key.tensor(), mode, 0, 0)
    del arguments["block"], arguments["skip"]
    words_kernel[(1,)](out, numbers, **arguments | {"BLOCKS": len(blocks)})
    return out.cpu().numpy().astype(np.uint32)


def test_rfc_8439_block_function():
    # RFC 8439, section 2.3.2: key 00..1f, counter 1, nonce 000000090000004a00000000.
    block, tail = (int.from_bytes(bytes.fromhex(part), "little") for part in ("0100000000000009", "0000004a00000000"))
    expected = bytes.fromhex(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    assert words(KEY, tail, [block]).tobytes() == expected


@pytest.mark.parametrize("mode", [PLAIN, SEEDED, nonce(2**48 - 1, 2**15 - 1, seeded=True)])
def test_words_are_the_streams(mode):
    blocks = [0, 1, 2**30 - 1, 2**30, 2**32 - 1, 2**32, 2**62 - 1, 2**61 + 5]
    if mode == PLAIN:
        blocks[-2:] = [2**64 - 1, 2**63]
    expected = np.empty((len(blocks), 8), dtype=np.int64)
    for row, block in zip(expected, blocks, strict=True):
        KEY.words(mode, block, row[None])
    np.testing.assert_array_equal(words(KEY, mode, blocks), expected.view(np.uint32))


@triton.jit
def normals_kernel(out_ptr, words_ptr, PAIRS: tl.constexpr):
    lane = tl.arange(0, PAIRS)
    at = words_ptr + 4 * lane
    w_low, w_high = tl.load(at).to(tl.uint32), tl.load(at + 1).to(tl.uint32)
    a_low, a_high = tl.load(at + 2).to(tl.uint32), tl.load(at + 3).to(tl.uint32)
    first, second = normal_pair(w_low, w_high, a_low, a_high)
    tl.store(out_ptr + 2 * lane, first)
    tl.store(out_ptr + 2 * lane + 1, second)


EXTREME = [0, 1, 2, 3, 2**53 - 1, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2**53, 2**64 - 2, 2**64 - 1]


def test_normals_of_extreme_and_usual_words():
    pairs = np.random.default_rng(0).integers(0, 2**64, (512, 2), dtype=np.uint64, endpoint=False)
    pairs[: len(EXTREME) ** 2] = [(w, a) for w in EXTREME for a in EXTREME]
    halves = torch.from_numpy(pairs.view(np.uint32).astype(np.int64)).to(DEVICE)
    out = torch.empty(1024, dtype=torch.float64, device=DEVICE)
    normals_kernel[(1,)](out, halves, PAIRS=512, enable_fp_fusion=False)
    found, expected = out.cpu().numpy(), np.empty((128, 8))
    random.normals(pairs.view(np.int64).reshape(-1, 8), expected, np.empty((4, 512)))
    radius = np.hypot(*found.reshape(-1, 2).T).repeat(2)
    assert (np.abs(found - expected.reshape(-1)) <= 2.0**-49 * radius).all()
    assert np.abs(found).max() > 8 and found.min() < -8
    if importlib.util.find_spec("fastclip._host"):
        from fastclip import _host

        np.testing.assert_array_equal(found, _host.normals(pairs.view(np.int64).reshape(-1, 8)).reshape(-1))


def noisy(guard, grad_sum, draw, dtype=torch.float32):
    out = guard(torch.zeros(grad_sum.shape, dtype=dtype))
    add_noise(guard(grad_sum), out, *draw.stream(), *draw.place())
    return out.cpu()


@pytest.mark.parametrize(
    ("mode", "offset", "n", "in_dtype", "dtype"),
    [
        (PLAIN, 0, 130, torch.float32, torch.float32),
        (PLAIN, 5, 1, torch.float64, torch.float16),
        (PLAIN, 2**35 - 11, 1100, torch.float64, torch.float32),  # over block 2^32, and more than a program's elements
        (PLAIN, 2**65 - 63, 63, torch.float32, torch.float16),  # the stream's end
        (SEEDED, 2**64 + 3, 65, torch.float32, torch.float32),
        (SEEDED, 3, 300, torch.float64, torch.float16),
    ],
)
def test_add_noise(guard, mode, offset, n, in_dtype, dtype):
    grad_sum, draw = torch.randn(n, dtype=in_dtype), draw_at(offset, mode)
    found, expected = noisy(guard, grad_sum, draw, dtype), torch.empty(n, dtype=dtype)
    random.add_noise(grad_sum, expected, draw.std, draw.scale, KEY, mode, offset)
    ulp = torch.nextafter(expected.abs().float(), torch.tensor(torch.inf)) - expected.abs().float()
    if dtype == torch.float16:
        ulp = expected.abs().float() * 2.0**-10 + 2.0**-24
    assert bool(((found.double() - expected.double()).abs() <= ulp).all())
    if ops.backends()["cpp"]["state"] == "used":
        CPP.add_noise(grad_sum, expected, *draw.stream(), *draw.place())
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # numpy's, in the interpreter
def test_16_bits_are_rounded_once(guard):
    # Halfway between two fp16 numbers but for a bit that fp32 does not hold; halfway; below fp16's range, and above it.
    values = [1 + 2.0**-11 + 2.0**-40, 1 + 3 * 2.0**-11 - 2.0**-40, -1 - 2.0**-11, 2.0**-26, 65520.0]
    found = noisy(guard, torch.tensor(values, dtype=torch.float64), draw_at(0, SEEDED, 0.0, 1.0), torch.float16)
    assert found.tolist() == [1 + 2.0**-10, 1 + 2.0**-10, -1.0, 0.0, float("inf")]


def test_in_place(guard):
    grad_sum = torch.randn(20)
    out = guard(grad_sum)
    add_noise(out, out, *draw_at(9).stream(), *draw_at(9).place())
    assert torch.equal(out.cpu(), noisy(guard, grad_sum, draw_at(9)))


def test_the_noise_does_not_depend_on_blocks_or_grouping(guard, monkeypatch):
    grad_sum = torch.randn(1030)
    whole = noisy(guard, grad_sum, draw_at(3, SEEDED))
    monkeypatch.setattr(stream, "BLOCKS", 32)
    assert torch.equal(noisy(guard, grad_sum, draw_at(3, SEEDED)), whole)
    pieces, start = [], 0
    for piece in grad_sum.split([7, 1, 500, 522]):
        pieces.append(noisy(guard, piece, draw_at(3 + start, SEEDED)))
        start += piece.numel()
    assert torch.equal(torch.cat(pieces), whole)


def step(kernel, mode, guard=lambda x: x.clone(), **options):
    """[params, grads, first state, second state] after a step of kernel; options: its rates, in the schema's order."""
    generator = torch.Generator().manual_seed(1)
    columns = [[guard(torch.rand(n, generator=generator)) for n in SIZES] for _ in range(4)]
    used = columns if "steps" in options else [*columns[:2], columns[2] if options["momentum"] else []]
    kernel(*used, *draws(mode)[0].stream(), *ops._places(draws(mode)), *options.values())
    return [[x.cpu() for x in column] for column in columns]


ADAMW = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "steps": [1, 2, 400]}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "nesterov": False, "first": False}
STEPS = {
    "adamw": (noise_adamw, ADAMW),
    "plain sgd": (noise_sgd, SGD | {"momentum": 0.0}),
    "sgd": (noise_sgd, SGD),
    "first sgd": (noise_sgd, SGD | {"first": True}),
    "nesterov": (noise_sgd, SGD | {"nesterov": True, "dampening": 0.0}),
}


@needs_kernels
@pytest.mark.parametrize(("kernel", "options"), STEPS.values(), ids=STEPS)
def test_steps_have_the_bits_of_the_cpu(guard, kernel, options):
    for mode in (SEEDED, PLAIN)[: 2 if kernel is noise_adamw else 1]:
        found, wanted = step(kernel, mode, guard, **options), step(getattr(CPP, kernel.__name__), mode, **options)
        for some, others in zip(found, wanted, strict=True):
            assert all(map(torch.equal, some, others))


@pytest.mark.parametrize(("kernel", "options"), [STEPS["adamw"], STEPS["nesterov"]], ids=["adamw", "nesterov"])
def test_steps_are_the_references_with_the_noisy_gradient(kernel, options):
    found, wanted = step(kernel, SEEDED, lambda x: x.to(DEVICE), **options), step(lambda *_: None, SEEDED, **options)
    for k, (noisy_grad, param, first, second) in enumerate(zip(found[1], wanted[0], *wanted[2:], strict=True)):
        if kernel is noise_adamw:
            by = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": ADAMW["steps"][k]}
            reference.adamw_(param, noisy_grad, first, second, **by)
        else:
            reference.sgd_(param, noisy_grad, first, **options)
    for column in (0, 2, 3):
        for x, y in zip(found[column], wanted[column], strict=True):
            torch.testing.assert_close(x, y, rtol=3e-6, atol=1e-6)


def accumulated(kernel, grads, factors, dtype, guard=lambda x: x.clone()):
    outs = [guard(torch.zeros(n, dtype=dtype)) for n in SIZES]
    stream_and_places = *draw_at(0, SEEDED, scale=1.0).stream(), *ops._places(draws(SEEDED))
    kernel([guard(x) for x in grads], guard(factors), outs, *stream_and_places)
    return [x.cpu() for x in outs]


@pytest.mark.parametrize(("units", "dtype"), [(0, torch.float32), (5, torch.float16), (6, torch.float32)])
def test_clip_accumulate_noise(guard, units, dtype):
    grads, factors = [torch.randn(units, n).to(dtype) for n in SIZES], torch.rand(units, dtype=torch.float64)
    if units:
        factors[2] = 0.0
        for x in grads:
            x[2] = torch.nan
    found = accumulated(clip_accumulate_noise, grads, factors, dtype, guard)
    for x, to, draw in zip(grads, found, draws(SEEDED), strict=True):
        total, wanted = torch.zeros(len(to), dtype=torch.float64), torch.empty(len(to), dtype=dtype)
        random.add_noise(reference.clipped_sum(x.double(), factors, total), wanted, 2.0, 1.0, KEY, SEEDED, draw.offset)
        torch.testing.assert_close(to, wanted, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
    if ops.backends()["cpp"]["state"] == "used":
        assert all(map(torch.equal, found, accumulated(CPP.clip_accumulate_noise, grads, factors, dtype)))


COMPILE_KEYS = """
import torch
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from fastclip.kernels import add_noise, clip_accumulate_noise, noise_adamw, noise_sgd, stream

RATES = dict.fromkeys(("keep", "beta1_rest", "beta2", "beta2_rest", "root_correction", "eps", "rate", "decay"), 0.5)
RATES |= {"momentum": 0.9, "momentum_rest": 0.1}
STREAMS = [(bytes(32), 0, 0), (bytes([1]) + bytes(31), 1, 1), (bytes([16]) * 32, 16, 16)]
STREAMS += [(bytes([127]) * 32, 2**31, 2**31), (bytes([255]) * 32, 2**63 - 1, 2**64 - 1)]

for kernel in (
    add_noise._add_noise_kernel,
    clip_accumulate_noise._clip_accumulate_noise_kernel,
    noise_adamw._noise_adamw_kernel,
    noise_sgd._noise_sgd_kernel,
):
    assert isinstance(kernel, JITFunction)
    bind = create_function_from_signature(kernel.signature, kernel.params, BaseBackend)
    keys = set()
    for i, (key, nonce, block) in enumerate(STREAMS):
        given = stream.stream_arguments(torch.frombuffer(bytearray(key), dtype=torch.uint8), nonce, block, 0)
        given |= {"std": float(i), "scale": 1.0 / (i + 1), "n": 64, "num_units": i + 1}
        given |= {name: value + i for name, value in RATES.items()}
        arguments = {}
        for p in kernel.params:
            pointer = torch.zeros(16) if p.name.endswith("_ptr") else True
            arguments[p.name] = given.get(p.name, pointer)
        _, specialization, options = bind(**arguments)
        keys.add(compute_cache_key({}, specialization, options))
    assert len(keys) == 1, (kernel, keys)
"""


def test_no_compiled_variant_depends_on_the_key(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE_KEYS]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_tracebacks_show_no_word_of_a_key():
    arguments = stream.stream_arguments(Key(bytes([77]) * 32).tensor(), PLAIN, 0, 0)
    shown = f"{arguments!r} {arguments['key3']}"
    assert "hidden" in shown and str(int.from_bytes(bytes([77]) * 4, "little")) not in shown


def test_a_graph_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_cuda, refuse = SimpleNamespace(device=SimpleNamespace(type="cuda")), stream.refuse_capture
    for module in ("add_noise", "clip_accumulate_noise", "steps"):
        monkeypatch.setattr(f"fastclip.kernels.{module}.refuse_capture", lambda _: refuse(on_cuda))
    for call in (
        lambda: add_noise(X, X, 1.0, 1.0, *STREAM, 0, 0),
        lambda: clip_accumulate_noise([X[None].clone()], X[:1].clone(), [X], 1.0, 1.0, *STREAM, [0], [0]),
        lambda: adamw([X], [X.clone()], [X.clone()], [X.clone()]),
    ):
        with pytest.raises(RuntimeError, match="cannot be captured"):
            call()
    assert bool((X == 1).all())


X = torch.ones(8)
STREAM = draw_at(0).stream()[2:]
ONE_STEP = [0.1, 0.9, 0.99, 1e-8, 0.0]


def adamw(params, grads, first, second, steps=(1,), skips=(0,)):
    noise_adamw(params, grads, first, second, 1.0, 1.0, *STREAM, [0] * len(skips), list(skips), *ONE_STEP, list(steps))


BAD = {
    "half sum": (lambda: add_noise(X.half(), X, 1.0, 1.0, *STREAM, 0, 0), "fp32 or fp64"),
    "fp64 out": (lambda: add_noise(X, X.double(), 1.0, 1.0, *STREAM, 0, 0), "fp32, bf16 or fp16"),
    "another size": (lambda: add_noise(X, X[:4], 1.0, 1.0, *STREAM, 0, 0), "of one size"),
    "strided": (lambda: add_noise(X[::2], X[:4], 1.0, 1.0, *STREAM, 0, 0), "contiguous"),
    "skip": (lambda: add_noise(X, X, 1.0, 1.0, *STREAM, 0, 8), "skip must be in"),
    "short key": (lambda: add_noise(X, X, 1.0, 1.0, STREAM[0][:31], 0, 0, 0), "32 bytes"),
    "scale": (lambda: clip_accumulate_noise([], X, [], 1.0, 2.0, *STREAM, [], []), "scale must be 1"),
    "factors": (lambda: clip_accumulate_noise([X[None]], X, [X], 1.0, 1.0, *STREAM, [0], [0]), r"factors \[U\]"),
    "read and written": (
        lambda: clip_accumulate_noise([X[None]], X[:1], [X], 1.0, 1.0, *STREAM, [0], [0]),
        "share memory",
    ),
    "fp64 outs": (
        lambda: clip_accumulate_noise([X[None]], X[:1], [X.double()], 1.0, 1.0, *STREAM, [0], [0]),
        "fp32, bf16 or fp16",
    ),
    "shared state": (lambda: adamw([X], [X], [X.clone()], [X.clone()]), "share memory"),
    "fp64 state": (lambda: adamw([X], [X.clone()], [X.double()], [X.clone()]), "contiguous fp32"),
    "lists": (lambda: adamw([X], [X.clone()], [], [X.clone()]), "as many"),
    "a step of 0": (lambda: adamw([X], [X.clone()], [X.clone()], [X.clone()], steps=(0,)), "count from 1"),
    "no buffer": (
        lambda: noise_sgd([X], [X.clone()], [], 1.0, 1.0, *STREAM, [0], [0], 0.1, 0.9, 0.0, 0.0, False, False),
        "momentum needs a buffer",
    ),
}


@pytest.mark.parametrize(("call", "word"), BAD.values(), ids=BAD)
def test_bad_input_writes_nothing(call, word):
    with pytest.raises(ValueError, match=word):
        call()
    assert bool((X == 1).all())


@interpreted
def test_bf16_is_refused_in_the_interpreter():
    half = torch.ones(8).bfloat16()
    with pytest.raises(ValueError, match="bf16 cannot run"):
        add_noise(X, half, 1.0, 1.0, *STREAM, 0, 0)
    with pytest.raises(ValueError, match="bf16 cannot run"):
        clip_accumulate_noise([X[None], X[None]], X[:1], [torch.zeros(8), half], 1.0, 1.0, *STREAM, [0, 1], [0, 0])
    assert bool((half == 1).all())
