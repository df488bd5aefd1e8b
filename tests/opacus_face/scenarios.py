"""Scenarios that run on both libraries: each passes with fastclip.opacus and fails with Opacus 1.6.0."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch.utils.data import Dataset

Scenario = Callable[[ModuleType], None]


class Scenarios(dict[str, Scenario]):
    """By name; an instance registers the function that it decorates."""

    def __call__(self, run: Scenario) -> Scenario:
        self[run.__name__] = run
        return run

    def passes_on_the_face(self, name: str) -> None:
        self[name](importlib.import_module("fastclip.opacus"))

    def fails_on_opacus(self, name: str) -> None:
        """Otherwise the scenario shows nothing. Whatever it is: a refusal, a crash or a wrong number."""
        with pytest.raises((Exception, pytest.fail.Exception)):
            self[name](importlib.import_module("opacus"))


class Numbers(Dataset[torch.Tensor]):
    """Example i is the one-hot row i: the summed gradient of a linear model then says who is in it."""

    def __init__(self, size: int = 16) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.eye(self.size)[index]
