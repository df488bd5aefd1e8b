"""Every test: fixed seed, one thread, and fresh allocations full of NaN, so that memory nobody wrote shows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
# Triton reads this when it is imported, which importing torch and fastclip does not do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _poisoned(allocate: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        if out.device.type == "cpu" and out.is_floating_point() and not out.requires_grad:
            out.fill_(float("nan"))
        return out

    return run


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    torch.manual_seed(20260101)
    yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled and nothing counted yet."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def trainers_of_their_own() -> Iterator[None]:
    """transformers 4 writes a Trainer's precision and compiler into the environment, for all that come later."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    after = {name for name in os.environ if name.startswith("ACCELERATE_")}
    if {name: os.environ[name] for name in after} == before:
        return
    for name in after - set(before):
        del os.environ[name]
    os.environ.update(before)
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As where no memory is left for rows; the numbers of checkpointed parts that were replayed."""
    from fastclip import replay

    found: list[int] = []
    original = replay.Part.again

    def again(part: Any) -> Any:
        found.append(part.number)
        return original(part)

    monkeypatch.setattr(replay, "_SHARE", 0.0)
    monkeypatch.setattr(replay.Part, "again", again)
    return found


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each checkpointed part had been tried and found alike."""
    from fastclip import replay

    monkeypatch.setattr(replay.Part, "_tried", lambda part, slots: True)
