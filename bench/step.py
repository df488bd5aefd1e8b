"""Whole training steps of GPT-2 124M: fastclip, the same step without privacy, and Opacus, each in its own process.

    python bench/step.py [--rounds 7] [--modes plain fastclip ghost hooks]

Random weights, no dropout, 4 x 256 tokens, fp32, all parameters trained, torch.optim.AdamW as people construct it. The
processes take turns, one step at a time, so that all see the same machine; times are medians of their steps. Memory is the
peak resident size of another process a mode, three steps long, whose allocator gives back what is freed: glibc's heap
otherwise keeps holes that make one and the same program come out up to a tenth apart. That of the timed processes is
recorded too. Opacus refuses this model as it is: there the head is untied and the position
embedding frozen, which makes its work smaller, and its loss is the one that its ghost mode needs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
BATCH, LENGTH, VOCAB = 4, 256, 50257


def worker(mode: str) -> None:
    """Answer each line on stdin with the seconds of one step; at the end with the peak memory."""
    import torch
    import torch.nn.functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    opacus = mode in ("ghost", "hooks")
    config = GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, tie_word_embeddings=not opacus)
    model = GPT2LMHeadModel(config).train()
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
    if opacus:
        model.transformer.wpe.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    run = model
    criterion = None
    losses_of = None
    if mode == "fastclip":
        import fastclip
        from fastclip.huggingface import causal_lm_losses as losses_of

        optimizer = fastclip.DPOptimizer(
            optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=BATCH, module=model
        )
    elif opacus:
        import opacus as library

        engine = library.PrivacyEngine()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=BATCH)
        made = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
            criterion=torch.nn.CrossEntropyLoss(reduction="mean"),
        )
        run, optimizer = made[0], made[1]
        criterion = made[2] if mode == "ghost" else None

    def step() -> None:
        if losses_of is not None:
            losses_of(model, {"input_ids": tokens}).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            return
        logits = run(input_ids=tokens).logits[:, :-1]
        targets = tokens[:, 1:]
        if criterion is not None:
            loss = criterion(logits.reshape(-1, VOCAB), targets.reshape(-1), shape=(BATCH, LENGTH - 1, VOCAB))
        else:
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(BATCH, -1)
            loss = losses.mean(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # allocators, thread pools, optimizer state, fastclip's trial of the layout
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
            return
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def machine() -> dict[str, object]:
    import torch

    with open("/proc/cpuinfo") as lines:
        names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(names)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def measure(modes: list[str], rounds: int) -> dict[str, object]:
    # Idle processes must not spin while another one works.
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}

    def start(mode: str, **more: str) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, "--worker", mode]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env | more)

    workers = {m: start(m) for m in modes}

    def ask(mode: str, question: str) -> str:
        process = workers[mode]
        assert process.stdin is not None and process.stdout is not None
        if question:
            process.stdin.write(question + "\n")
            process.stdin.flush()
        return process.stdout.readline().strip()

    times: dict[str, list[float]] = {m: [] for m in modes}
    for mode in modes:
        if ask(mode, "") != "ready":
            raise RuntimeError(f"{mode} did not start")
    for _ in range(rounds):
        for mode in modes:
            times[mode].append(float(ask(mode, "step")))
    timed_memory = {m: int(ask(m, "memory")) for m in modes}
    memory = {}
    for mode in modes:
        workers[mode].wait()
        workers[mode] = start(mode, MALLOC_MMAP_THRESHOLD_=str(1 << 20))
        answers = [ask(mode, question) for question in ("", "step", "step", "memory")]
        memory[mode] = int(answers[-1])
    seconds = {m: statistics.median(t) for m, t in times.items()}
    return {
        "what": "GPT-2 124M, 4 x 256 tokens, fp32, one step",
        "command": "python bench/step.py " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "rounds": rounds,
        "seconds": times,
        "median_seconds": seconds,
        "peak_bytes": memory,
        "peak_bytes_of_timed_processes": timed_memory,
        "time_ratio": {m: seconds[m] / seconds["plain"] for m in modes},
        "memory_ratio": {m: memory[m] / memory["plain"] for m in modes},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["plain", "fastclip", "ghost", "hooks"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "step_gpt2_cpu.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    result = measure(options.modes, options.rounds)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for mode in options.modes:
        ratio, memory = result["time_ratio"][mode], result["memory_ratio"][mode]  # type: ignore[index]
        print(f"{mode:10} time {ratio:5.2f}x  memory {memory:5.2f}x")


if __name__ == "__main__":
    main()
