"""kill -9 at any moment: a run goes on from its last checkpoint, and what it spent is never forgotten."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments
from datasets import Dataset
from fastclip.huggingface import DPTrainer, PrivacyArguments

class Say(TrainerCallback):
    def on_train_begin(self, args, state, control, **others):
        print("begin", state.global_step, flush=True)
    def on_step_end(self, args, state, control, **others):
        print("step", state.global_step, flush=True)
    def on_save(self, args, state, control, **others):
        print("saved", state.global_step, flush=True)

torch.manual_seed(0)
ids = torch.randint(3, 64, (120, 8)).tolist()
config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
trainer = DPTrainer(
    model,
    TrainingArguments(sys.argv[1], per_device_train_batch_size=8, max_steps=40, save_steps=3, save_total_limit=2,
                      learning_rate=1e-3, report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no"),
    train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
    privacy_args=PrivacyArguments(target_delta=1e-3, noise_multiplier=1.0),
    callbacks=[Say()],
)
trainer.train(resume_from_checkpoint=sys.argv[2] == "resume")
print("epsilon", trainer.ledger.epsilon(), trainer.ledger.steps, flush=True)
"""


def start(folder: Path, how: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def spent(folder: Path) -> list[dict]:
    """The ledger's lines as they are on the disk; the last one may be torn."""
    lines = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path):
    folder, chance = tmp_path / "run", random.Random(0)
    saved, lines = 0, 0
    for _ in range(4):
        process = start(folder, "resume" if saved else "new")
        deadline, seen = chance.randint(4, 12), 0
        assert process.stdout is not None
        for line in process.stdout:
            what, number = line.split()[:2]
            if what == "begin":
                assert int(number) in (saved, saved + 3), "no more is lost than what came after the last checkpoint"
            saved = int(number) if what == "saved" else saved
            seen += what == "step"
            if seen >= deadline:
                time.sleep(chance.random() * 0.02)
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = len(spent(folder))
        assert now >= lines + seen, "every step that was taken is in the ledger, whatever became of it"
        lines = now
    done = start(folder, "resume")
    out, err = done.communicate(timeout=200)
    assert done.returncode == 0, err
    _, epsilon, steps = out.splitlines()[-1].split()
    assert int(steps) > 40 and float(epsilon) > 0, "the lost steps are counted"
