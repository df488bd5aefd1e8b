"""The noise ops on a GPU, where there is one: the same words, the same normals and the same bits as on CPU."""

import pytest
import torch

from fastclip import ops
from fastclip.random import Key, nonce

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.skipif(
        not torch._C._dispatch_has_kernel_for_dispatch_key("fastclip::noise_adamw", "CUDA"),
        reason="fastclip was installed without its CUDA kernels: no CUDA toolkit at install",
    ),
]
SIZES = (1, 7, 8, 1000, 100_003)
KEY = Key(bytes(range(32)))
ADAMW = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}


def draws(seeded):
    offsets = [3 + 200_000 * k for k in range(len(SIZES))]
    return [ops.Draw(2.0, 0.5, KEY, nonce(5, 0, seeded), offset) for offset in offsets]


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_steps_have_the_bits_of_the_cpu(seeded, kind):
    state = [[torch.rand(n) for n in SIZES] for _ in range(4)]
    found = []
    for device in ("cpu", "cuda"):
        params, grads, first, second = ([x.to(device, copy=True) for x in column] for column in state)
        if kind == "adamw":
            ops.noise_adamw(params, grads, first, second, draws(seeded), steps=[1, 2, 3, 4, 5], **ADAMW)
        else:
            ops.noise_sgd(params, grads, first, draws(seeded), **SGD)
        found.append([x.cpu() for column in (params, grads, first, second) for x in column])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_have_the_bits_of_the_cpu(dtype):
    grads, factors = [torch.randn(5, n).to(dtype) for n in SIZES], torch.rand(5, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        out = [torch.empty(n, dtype=dtype, device=device) for n in SIZES]
        on_device = [x.to(device) for x in grads]
        ops.clip_accumulate_noise(on_device, factors.to(device), out, 2.0, KEY, (nonce(1, 0, False), 5))
        found.append([x.cpu() for x in out])
    assert all(map(torch.equal, *found))


def test_on_a_stream_of_ones_own():
    grads = torch.zeros(1_000_000, device="cuda")
    param, stream = torch.zeros_like(grads), torch.cuda.Stream()
    draw = ops.Draw(1.0, 1.0, KEY, nonce(0, 0, False), 0)
    with torch.cuda.stream(stream):
        grads.fill_(1.0)
        ops.noise_sgd([param], [grads], [], [draw], lr=1.0)
    stream.synchronize()
    assert abs(float(grads.mean()) - 1.0) < 0.01 and torch.equal(param, -grads)
