"""The largest batch whose step stays within a fixed memory, by mode: GPT-2 124M at 256 tokens, RoBERTa-base at 128, in 6 GiB.

    python bench/largest_batch.py [--models gpt2 roberta] [--gib 6]

Memory is bench/step.py's peak resident size, all steps included, the first with fastclip's trial; measured until a batch fits
and one example more does not. JSON to bench/results/largest_batch_cpu.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import step_models
from step import Worker, machine

RESULTS = Path(__file__).parent / "results" / "largest_batch_cpu.json"
LENGTHS = {"gpt2": 256, "roberta": 128}
MODES = ("plain", "fastclip", "checkpointed", "replayed", "ghost", "hooks")


def largest(peak: Callable[[int], int], limit: int) -> int:
    """The largest batch b with ``peak(b) <= limit``, 0 if there is none; ``peak`` must rise with b.

    Small batches are below what parameters and the optimizer take and say little: the batch is doubled until it does not
    fit, and what lies between is cut where the line between its ends meets the limit.
    """
    fits, above = 0, 1
    while peak(above) <= limit:
        fits, above = above, 2 * above
    while above - fits > 1:
        share = (limit - peak(fits)) / (peak(above) - peak(fits)) if fits else 0.5
        middle = fits + round(share * (above - fits))
        middle = min(max(middle, fits + 1), above - 1)
        if peak(middle) <= limit:
            fits = middle
        else:
            above = middle
    return fits


def measure(model: str, mode: str, limit: int, small: bool) -> dict[str, object]:
    peaks: dict[int, int] = {}

    def peak(batch: int) -> int:
        if batch not in peaks:
            row = f"{model}:{batch}x{LENGTHS[model]}:fp32"
            running = Worker(mode, row, small, MALLOC_MMAP_THRESHOLD_=str(1 << 16))
            running.ask("step")
            peaks[batch] = int(running.ask("memory")[0])
            running.end()
            print(model, mode, batch, f"{peaks[batch] / 2**30:.2f} GiB", flush=True)
        return peaks[batch]

    found = largest(peak, limit)
    return {"largest_batch": found, "peak_bytes": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--gib", type=float, default=6.0)
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the program")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for model in options.models:
        step_models.check(model)
        chosen = f"--models {model} --modes {' '.join(options.modes)} --gib {options.gib:g}"
        modes: dict[str, object] = {}
        results[model] = {
            "command": f"python bench/largest_batch.py {chosen}",
            "machine": machine(),
            "length": LENGTHS[model],
            "gib": options.gib,
            "modes": modes,
        }
        for mode in options.modes:
            modes[mode] = measure(model, mode, int(options.gib * 2**30), options.small)
            options.output.parent.mkdir(exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n")  # the next mode may take an hour


if __name__ == "__main__":
    main()
