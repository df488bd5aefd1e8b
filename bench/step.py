"""Whole training steps of language models: fastclip, the same step without privacy, and Opacus, each in its own process.

    python bench/step.py                                   # GPT-2 124M, 4 x 256 tokens, fp32
    python bench/step.py --row gpt2:2x1024:bf16 --rounds 5
    python bench/step.py --all                             # every row of docs/benchmarks.md that is not there yet

Random weights, no dropout, torch.optim.AdamW as people construct it. Modes: plain, without privacy as people have it; best,
the same with a fused AdamW and under torch.compile where that works; fastclip, by the losses of fastclip.huggingface;
compiled, fastclip with everything below the head under torch.compile; lean, fastclip without the head's logits; logits,
fastclip with losses from the model's own logits; checkpointed, without privacy and with each block of the model checkpointed;
kept and replayed, fastclip with the same checkpoints, its rows kept as where memory is plenty, and formed again as where there
is none; ghost and hooks, Opacus. The processes take turns, one step at a time and another one first in each round, so that all
see the same machine; a time is the median over rounds of a mode's step beside the plain step of the same round, which a machine
that changes its speed disturbs less than two medians. Memory is of another
process a mode, whose allocator gives back what is freed (glibc's heap otherwise keeps holes that make one and the same program
come out up to a tenth apart): the peak resident size of all, the first step with fastclip's trial included, and of the last
step alone. Opacus refuses GPT-2 and tied heads: there the head is untied and GPT-2's position embedding frozen, which makes
its work smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import step_models
from turns import in_turn

HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]  # opacus.py of this folder is not Opacus

RESULTS = HERE / "results" / "steps_cpu.json"
MODES = (
    "plain",
    "best",
    "fastclip",
    "compiled",
    "lean",
    "logits",
    "checkpointed",
    "kept",
    "replayed",
    "ghost",
    "hooks",
)
CHECKPOINTED = ("checkpointed", "kept", "replayed")
DEFAULT = "gpt2:4x256:fp32"
# Rows of docs/benchmarks.md, the most telling first: model:batch x length:precision, and the modes that are compared.
ROWS = {
    DEFAULT: ("plain", "best", "fastclip", "compiled", "lean", "ghost"),
    "gpt2:2x1024:fp32": ("plain", "best", "fastclip", "compiled", "lean"),
    "gpt2:8x128:fp32": ("plain", "best", "fastclip", "compiled"),
    "gpt2:4x512:fp32": ("plain", "fastclip"),
    "gpt2:4x256:bf16": ("plain", "fastclip"),
    "gpt2:2x1024:bf16": ("plain", "fastclip"),
    "roberta:8x128:fp32": ("plain", "best", "fastclip", "ghost", "hooks"),
    "roberta:8x128:bf16": ("plain", "fastclip"),
    "roberta:16x128:fp32": ("plain", "fastclip", *CHECKPOINTED),
    "roberta_large:4x128:fp32": ("plain", "fastclip"),
    "roberta_large:4x128:bf16": ("plain", "fastclip"),
    "llama:4x256:fp32": ("plain", "fastclip"),
    "llama:4x256:bf16": ("plain", "fastclip"),
    "lora:4x256:fp32": ("plain", "fastclip"),
    "lora:4x256:bf16": ("plain", "fastclip"),
}


def parse(row: str) -> tuple[str, int, int, str]:
    found = re.fullmatch(r"(\w+):(\d+)x(\d+):(fp32|bf16)", row)
    if not found:
        raise SystemExit(f"row {row!r} is not of the form model:BATCHxLENGTH:fp32 or :bf16")
    return found[1], int(found[2]), int(found[3]), found[4]


def worker(mode: str, row: str, small: bool) -> None:
    """Answer each line on stdin with the seconds of one step; at the end with the peak memory."""
    import torch

    torch.manual_seed(0)
    name, batch, length, precision = parse(row)
    opacus = mode in ("ghost", "hooks")
    job = step_models.MODELS[name][1](batch, length, opacus, small)
    model: Any = job.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-4, **({"fused": True} if mode == "best" else {}))
    inputs = {k: v for k, v in job.batch.items() if k != "labels"}
    criterion: Any = None
    losses_of: Any = None
    if mode in CHECKPOINTED:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if mode == "best":
        model = torch.compile(model)
    elif mode in ("fastclip", "compiled", "lean", "logits", "kept", "replayed"):
        import fastclip
        from fastclip import huggingface

        optimizer = fastclip.DPOptimizer(
            optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=batch, module=model
        )
        losses_of = getattr(huggingface, job.private_losses)
        if mode == "compiled":
            model.base_model.compile()
        if mode == "lean":
            fastclip.layers.head._SHARE = 0  # as where no memory is left
        if mode == "replayed":
            fastclip.replay._SHARE = 0
    elif opacus:
        import opacus as library

        data = torch.utils.data.TensorDataset(job.batch["input_ids"])
        made = library.PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=torch.utils.data.DataLoader(data, batch_size=batch),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
            criterion=torch.nn.CrossEntropyLoss(reduction="mean"),
        )
        model, optimizer = made[0], made[1]
        criterion = made[2] if mode == "ghost" else None

    def loss() -> Any:
        if losses_of is not None and mode != "logits":
            return losses_of(model, job.batch).mean()
        output = model(**inputs)
        if mode == "logits" and not name.startswith("roberta"):
            flat = torch.nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1).float(), inputs["input_ids"][:, 1:].flatten(), reduction="none"
            )
            return flat.view(batch, -1).mean()
        if criterion is None:
            return job.loss(output)
        if name.startswith("roberta"):
            return criterion(output.logits, job.batch["labels"])
        logits, targets = output.logits[:, :-1], inputs["input_ids"][:, 1:]
        return criterion(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), shape=logits.shape)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    started = time.perf_counter()
    step()  # allocators, thread pools, optimizer state, compilation, fastclip's trial of the layout
    print(time.perf_counter() - started, flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            everything = peak()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            step()
            print(max(everything, peak()), peak(), flush=True)
            return
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def peak() -> int:
    """Bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def machine() -> dict[str, object]:
    import torch
    import transformers

    with open("/proc/cpuinfo") as lines:
        names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(names)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def keep(path: Path, result: dict[str, Any]) -> None:
    """In a file of one result a processor."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results[result["machine"]["cpu"]] = result
    path.write_text(json.dumps(results, indent=1) + "\n")


class Worker:
    def __init__(self, mode: str, row: str, small: bool, **env: str) -> None:
        # Idle processes must not spin while another one works.
        more = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "PYTHONWARNINGS": "ignore"} | env
        command = [sys.executable, __file__, "--worker", mode, "--row", row, *(["--small"] if small else [])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | more
        )
        self.first = self.answer()

    def ask(self, question: str) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().split()
        if not line:
            raise RuntimeError("a worker ended before its answer; its error is above")
        return [float(x) for x in line]

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()


def measure(row: str, modes: list[str], rounds: int, small: bool) -> dict[str, Any]:
    step_models.check(parse(row)[0])
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    for mode in modes:
        try:
            workers[mode] = Worker(mode, row, small)
        except RuntimeError as error:
            failed[mode] = str(error)
    times: dict[str, list[float]] = {m: [] for m in workers}
    for number in range(rounds):
        for mode in in_turn(list(workers), number):
            times[mode].append(workers[mode].ask("step")[0])
    for running in workers.values():
        running.end()
    memory = {}
    for mode in workers:
        alone = Worker(mode, row, small, MALLOC_MMAP_THRESHOLD_=str(1 << 16))
        alone.ask("step")
        everything, last = alone.ask("memory")
        alone.end()
        memory[mode] = {"all": int(everything), "last_step": int(last)}
    return {
        "row": row,
        "command": f"python bench/step.py --row {row} --rounds {rounds}",
        "machine": machine(),
        "seconds": times,
        "first_step_seconds": {m: w.first[0] for m, w in workers.items()},
        "peak_bytes": memory,
        "failed": failed,
    }


def by_round(result: dict[str, Any], mode: str) -> list[float]:
    """Of each round, the time of this mode's step beside the plain one's."""
    seconds = result["seconds"]
    return [own / plain for own, plain in zip(seconds[mode], seconds["plain"], strict=True)]


def ratios(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each mode beside plain: time, peak of all steps, peak of the last."""
    memory = result["peak_bytes"]
    return {
        m: {
            "time": statistics.median(by_round(result, m)),
            "memory": memory[m]["last_step"] / memory["plain"]["last_step"],
            "memory_with_first_step": memory[m]["all"] / memory["plain"]["all"],
        }
        for m in result["seconds"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", default=DEFAULT, help="model:BATCHxLENGTH:PRECISION")
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--again", action="store_true", help="with --all: measure what is there already too")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the program")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.row, options.small)
        return
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for row in ROWS if options.all else [options.row]:
        key = f"{row}, {machine()['cpu']}"  # another machine's stay
        if options.all and key in results and not options.again:
            continue
        modes = options.modes or list(ROWS.get(row, ("plain", "fastclip")))
        result = measure(row, modes, options.rounds, options.small)
        results[key] = result
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        for mode, found in ratios(result).items():
            print(f"{row:22} {mode:10}", "  ".join(f"{k} {v:5.2f}x" for k, v in found.items()), flush=True)
        for mode, why in result["failed"].items():
            print(f"{row:22} {mode:10} failed: {why}", flush=True)


if __name__ == "__main__":
    main()
