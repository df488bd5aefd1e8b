"""Training on 10,000, 100,000 and 1,000,000 examples on the disk: does a step's time, or memory, know how many there are?

    python bench/scale.py [--sizes 10000 100000 1000000] [--steps 20]

Made-up token ids of 10 examples a user, written as Arrow files in pieces and memory-mapped by `datasets`; a small Llama,
DPTrainer, 64 users a draw expected. Every size in a process of its own: seconds of a step (median, the first left out), seconds
before the second step, and peak resident memory, of which mapped pages of the file that were read are a part.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "scale_cpu.json"
PER_USER, LENGTH, WORDS = 10, 32, 512


def write(folder: Path, size: int) -> None:
    """Examples of shuffled users: a user's rows do not lie together."""
    import numpy as np
    from datasets import Dataset, Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        {"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32")), "author": Value("int64")}
    )
    draws = np.random.default_rng(0)
    authors = draws.permutation(np.arange(size) // PER_USER)
    folder.mkdir()
    with ArrowWriter(features=features, path=str(folder / "data.arrow"), writer_batch_size=10_000) as writer:
        for start in range(0, size, 10_000):
            own = authors[start : start + 10_000]
            ids = draws.integers(3, WORDS, (len(own), LENGTH), dtype=np.int32)
            writer.write_batch({"input_ids": list(ids), "labels": list(ids), "author": own})
        writer.finalize()
    assert len(Dataset.from_file(str(folder / "data.arrow"))) == size


def worker(folder: Path, size: int, steps: int) -> None:
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

    from fastclip.huggingface import DPTrainer, PrivacyArguments

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    stamps: list[float] = []

    class Stamp(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

    start = time.perf_counter()
    trainer = DPTrainer(
        LlamaForCausalLM(config),
        TrainingArguments(
            str(folder / "run"),
            per_device_train_batch_size=64,
            max_steps=steps,
            learning_rate=1e-3,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_file(str(folder / "data.arrow")),
        privacy_args=PrivacyArguments(target_delta=0.5 / size, noise_multiplier=1.0, user_column="author"),
        callbacks=[Stamp()],
    )
    trainer.train()
    gaps = [b - a for a, b in pairwise(stamps)]
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    answer = {
        "examples": size,
        "users": size // PER_USER,
        "seconds_before_the_second_step": stamps[0] - start,
        "seconds_a_step": statistics.median(gaps),
        "spread": [min(gaps), max(gaps)],
        "peak_bytes": int(found[1]) * 1024,
        "file_bytes": (folder / "data.arrow").stat().st_size,
    }
    print(json.dumps(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.sizes[0], options.steps)
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for size in options.sizes:
            folder = Path(place) / str(size)
            write(folder, size)
            command = [sys.executable, "-P", __file__, "--worker", str(folder), "--sizes", str(size)]
            done = subprocess.run(
                [*command, "--steps", str(options.steps)],
                env=os.environ | {"PYTHONWARNINGS": "ignore"},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    options.output.write_text(json.dumps({"steps": options.steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
