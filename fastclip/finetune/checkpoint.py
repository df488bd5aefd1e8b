"""Stopping and going on: what is written on Ctrl-C, and what never is.

A checkpoint holds the model's trained parameters, their running average, the base optimizer and the learning-rate
schedule: all of it follows from what was released, so it needs no protection beyond the model's own. Keys of the
noise and the state of the sampler are not in it: a resumed run draws both afresh. How much privacy is spent stands in
the ledger, not here, so a checkpoint that is older than the ledger costs useful steps, never privacy.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from fastclip.finetune.loop import Average

FILE = "checkpoint.pt"


def save(folder: Path, model: nn.Module, average: Average | None, optimizer: Any, scheduler: Any, steps: int) -> None:
    """Writes `folder`/checkpoint.pt, whole or not at all. `optimizer` is the base optimizer, without noise."""
    state = {
        "parameters": {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad},
        "average": None if average is None else {"values": [v.cpu() for v in average.values], "steps": average.steps},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "steps": steps,
    }
    torch.save(state, folder / (FILE + ".new"))
    os.replace(folder / (FILE + ".new"), folder / FILE)


def load(folder: Path, model: nn.Module, average: Average | None, optimizer: Any, scheduler: Any) -> int:
    """Puts the checkpoint into the given objects and returns its number of steps. ValueError if there is none or it
    does not fit."""
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the run left no checkpoint; start a new one with another --output")
    state = torch.load(path, map_location="cpu", weights_only=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(trained) != set(state["parameters"]) or (average is None) != (state["average"] is None):
        raise ValueError(f"{path} belongs to another model or recipe: resume with the model that the run began with")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["parameters"][name])
        if average is not None:
            average.steps = state["average"]["steps"]
            for value, saved in zip(average.values, state["average"]["values"], strict=True):
                value.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return int(state["steps"])


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C (or SIGTERM) sets the event and the second one interrupts as usual.

    The step that is under way is finished: whether a step counts must not depend on its draw. Outside the main
    thread, where Python has no signals, the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        for kind, handler in before.items():
            signal.signal(kind, handler)

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in before:
        signal.signal(kind, ask)
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
