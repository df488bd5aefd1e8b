"""How time and memory of a step grow with one size at a time, beside the plain step and the law that is expected.

    python bench/growth.py [--only length batch ...] [--rounds 5]

A small GPT-2 (2 layers, 128 wide, 2048 words, batch 8 x 64 tokens), one thread, every point in a process of its own, where
plain and private steps take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from step import machine

RESULTS = Path(__file__).parent / "results" / "growth_cpu.json"
BASE = {"length": 64, "batch": 8, "width": 128, "vocabulary": 2048, "layers": 2, "units": 8}
# axis: what it is, its values, how a step's work is expected to grow with it
AXES: dict[str, tuple[str, list[int], str, Any]] = {
    "length": ("tokens of an example", [32, 64, 128, 256, 512, 1024], "linear", lambda x: x),
    "batch": ("examples", [2, 4, 8, 16, 32, 64], "linear", lambda x: x),
    "width": ("width", [64, 128, 256, 512], "quadratic", lambda x: x * x),
    "vocabulary": ("words", [512, 2048, 8192, 32768], "linear", lambda x: x),
    "layers": ("layers", [1, 2, 4, 8, 16], "linear", lambda x: x),
    "units": ("users of 64 examples", [1, 4, 16, 64], "constant", lambda x: 1),
}


def worker(sizes: dict[str, int], rounds: int) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import fastclip
    from fastclip.huggingface import causal_lm_losses

    torch.set_num_threads(1)
    batch, length = sizes["batch"], sizes["length"]
    ids = [i * sizes["units"] // batch for i in range(batch)]

    def build() -> Any:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=sizes["vocabulary"],
            n_embd=sizes["width"],
            n_layer=sizes["layers"],
            n_head=4,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(config).train()

    tokens = torch.randint(0, sizes["vocabulary"], (batch, length))

    def plain_step(model: Any, optimizer: Any) -> None:
        logits = model(input_ids=tokens).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def private_step(model: Any, optimizer: Any) -> None:
        with optimizer.clipper.units(ids=ids):
            losses = causal_lm_losses(model, {"input_ids": tokens})
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = {}
    for name, run in (("plain", plain_step), ("fastclip", private_step)):
        model = build()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if name == "fastclip":
            optimizer = fastclip.DPOptimizer(
                optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=sizes["units"], module=model
            )
        steps[name] = (run, model, optimizer)
        run(model, optimizer)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (run, model, optimizer) in steps.items():
            start = time.perf_counter()
            run(model, optimizer)
            times[name].append(time.perf_counter() - start)
    found = {}
    for name, (run, model, optimizer) in steps.items():
        held = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        run(model, optimizer)
        found[name] = {"seconds": statistics.median(times[name]), "bytes": max(resident("VmHWM") - held, 4096)}
    print(json.dumps(found))


def resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.path.pop(0)  # this folder, whose opacus.py is not Opacus
        worker(options.worker, options.rounds)
        return
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for axis in options.only:
        title, values, law_name, law = AXES[axis]
        points = []
        for value in values:
            sizes = BASE | {axis: value} | ({"batch": 64} if axis == "units" else {})
            if axis != "units":
                sizes["units"] = sizes["batch"]
            command = [sys.executable, __file__, "--rounds", str(options.rounds), "--worker", json.dumps(sizes)]
            env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"}
            answer = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
            points.append(json.loads(answer.splitlines()[-1]))
            print(axis, value, points[-1], flush=True)
        modes = {m: {k: [p[m][k] for p in points] for k in ("seconds", "bytes")} for m in ("plain", "fastclip")}
        results[axis] = {
            "title": title,
            "values": values,
            "law_name": law_name,
            "law": [law(x) for x in values],
            "base": BASE,
            "machine": machine() | {"threads": 1},
            **modes,
        }
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
