"""The compiled kernels beside the plain ones: same stream on every instruction set, bad input refused, opcheck."""

import os
import subprocess
import sys

import pytest
import torch

from fastclip import ops
from fastclip.random import Key, nonce

pytestmark = pytest.mark.skipif(
    ops.backends()["cpp"]["state"] == "absent", reason="no compiled kernels on this machine: no compiler at install"
)
KEY = Key(bytes(range(32)))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_draws_the_same_bits(capability):
    script = """
import hashlib, torch
from fastclip import ops, random
values = torch.arange(100_003, dtype=torch.float32)
words = torch.arange(-800, 800).mul(2**54 + 12345).view(-1, 8)
ops.add_noise(values, values, 3.0, random.Key(bytes(range(32))), 2**63 + 5, 2**40 + 5, backend="cpp")
normals = torch.ops.fastclip.box_muller(words)
print(hashlib.sha256(values.numpy().tobytes() + normals.numpy().tobytes()).hexdigest())
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=dict(os.environ, ATEN_CPU_CAPABILITY=chosen),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for chosen in ("default", capability)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 3, 8 * 2**32 - 500, 2**67 - 10_000])
def test_same_noise_as_numpy(in_dtype, out_dtype, offset):
    grad_sum = torch.randn(9_993, dtype=in_dtype)
    word = nonce(2**47 + 3, 1, seeded=True)
    drawn = [
        ops.add_noise(grad_sum, torch.empty(9_993, dtype=out_dtype), 1.5, KEY, word, offset, 1 / 3, backend=backend)
        for backend in ("cpp", "torch")
    ]
    # Their fp64 normals differ in the last bits, which move about one fp32 result in 10^8.
    assert (drawn[0] != drawn[1]).sum() <= 1
    torch.testing.assert_close(*drawn)


def test_opcheck():
    key, out = KEY.tensor(), torch.zeros(100)
    torch.library.opcheck(torch.ops.fastclip.add_noise.default, (torch.ones(100), out, 1.0, 0.5, key, 1, 2, 3))
    torch.library.opcheck(torch.ops.fastclip.box_muller.default, (torch.arange(80).view(-1, 8),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_sum": torch.ones(8, dtype=torch.bfloat16)}, "grad_sum must be fp32 or fp64"),
        ({"out": torch.zeros(8, dtype=torch.float64)}, "out must be fp32, bf16 or fp16"),
        ({"out": torch.zeros(7)}, "of one size"),
        ({"out": torch.zeros(16)[::2]}, "contiguous"),
        ({"key": torch.zeros(31, dtype=torch.uint8)}, "key must be 32"),
        ({"skip": 8}, r"skip must be in \[0, 8\)"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, message):
    arguments = {"grad_sum": torch.ones(8), "out": torch.zeros(8), "std": 1.0, "scale": 1.0, "key": KEY.tensor()}
    arguments |= {"nonce": 0, "block": 0, "skip": 0} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastclip.add_noise(*arguments.values())
    assert not arguments["out"].any()
    with pytest.raises(RuntimeError, match="words must be contiguous int64"):
        torch.ops.fastclip.box_muller(torch.zeros(8, 4, dtype=torch.int64))
