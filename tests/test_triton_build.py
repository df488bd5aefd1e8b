"""What Triton makes of the kernels for sm_80 and sm_90, without a GPU: as committed, no spills, no more than a block may have.

bench/triton_resources.py makes the table, after every edit of a kernel; another Triton may need another one.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="no triton on this machine")
ROOT = Path(__file__).parents[1]
TABLE = json.loads((ROOT / "tests" / "triton_resources.json").read_text())
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
needs_this_triton = pytest.mark.skipif(
    triton.__version__ != TABLE["triton"], reason=f"the table is Triton {TABLE['triton']}'s"
)


def kernel_modules():
    import fastclip.kernels

    return [
        importlib.import_module(f"fastclip.kernels.{m.name}") for m in pkgutil.iter_modules(fastclip.kernels.__path__)
    ]


def test_the_table_is_of_these_kernels():
    sys.path.append(str(ROOT / "bench"))
    try:
        found = importlib.import_module("triton_resources").digest()
    finally:
        sys.path.remove(str(ROOT / "bench"))
    assert found == TABLE["kernels"], "run python bench/triton_resources.py"


@needs_this_triton
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_resources_are_those_of_the_table(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    script = [sys.executable, ROOT / "bench" / "triton_resources.py", "--out", tmp_path / "table.json"]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "table.json").read_text())
    for capability, limit in SHARED.items():
        assert found[capability] == TABLE[capability]
        for name, used in found[capability].items():
            assert used["stack"] == 0, f"{name} spills on {capability}"
            assert used["shared"] <= limit


@pytest.mark.parametrize("capability", SHARED)
def test_products_are_those_of_tensor_cores_and_added_apart(capability):
    table = TABLE[capability]
    norms = {name: used for name, used in table.items() if re.match("gram_norm|direct_norm|clipped_gemm", name)}
    assert len(norms) > 15
    for name, used in norms.items():
        half = "16" in name.split(",")[0].split(" to ")[0]
        if "again" in name or "fp64" in name:
            assert used["products"] == "mma.sync", name  # in fp64
        elif half:
            # Two rows of tiles are too few for wgmma.
            wgmma = capability == "sm_90" and "narrow" not in name
            assert used["products"] == ("wgmma" if wgmma else "mma.sync"), name
        else:
            assert used["products"] is None, f"{name}: fp32 rows must not be rounded to tf32"
        assert used["flushes"] == 0, (
            f"{name}: what underflows in a product of subnormal rows is more than the bounds say"
        )
        if half:
            assert used["wide loads"] > 0 or "again" in name, name
        if "again" not in name and not name.startswith("clipped_gemm"):
            assert used["added apart"] == (1 + int(name.split()[2]) if name.startswith("gram") else 1), name


@pytest.mark.parametrize("capability", SHARED)
def test_a_heads_logits_are_products_of_tensor_cores_and_fp32_stays_fp32(capability):
    heads = {name: used["products"] for name, used in TABLE[capability].items() if name.startswith("head_")}
    assert len(heads) == 10
    half = "wgmma" if capability == "sm_90" else "mma.sync"
    for name, products in heads.items():
        assert products == (half if "16" in name else "mma.sync" if "fp64" in name else None), name


def test_no_kernel_chooses_its_configuration_at_run_time():
    from triton.runtime.autotuner import Autotuner, Heuristics

    for module in kernel_modules():
        assert not [name for name, x in vars(module).items() if isinstance(x, Autotuner | Heuristics)], module.__name__


def test_every_configuration_is_in_the_table():
    from fastclip.kernels import configs, linear_norms, products

    names = " ".join(TABLE["sm_90"])
    for size in {size for _, size in configs.GEMM} | {size for _, size in configs.DIRECT}:
        assert size in names
    # One bound serves all sizes of the direct route, and partial sums of both passes have the same places.
    assert len({(kind, c.blocks["BLOCK_T"]) for (kind, _), c in configs.DIRECT.items()}) == 2
    assert {c.blocks["BLOCK"] for c in (*configs.GRAM.values(), configs.GRAM_AGAIN)} == {configs.GRAM_BLOCK}
    assert linear_norms.MOST_LAYERS == 3 and products.UNDERFLOW == 2.0**-125
