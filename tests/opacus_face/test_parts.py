"""Logical batches in parts: one release each, however the loop goes. What Opacus 1.6.0 gets wrong fails on it here."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SequentialSampler,
)

from opacus_face.scenarios import Numbers, Scenarios

face = pytest.importorskip("fastclip.opacus", reason="opacus is not installed: pip install fastclip-dp[opacus]")

scenario = Scenarios()


@pytest.fixture(autouse=True)
def quiet_and_seeded() -> Iterator[None]:
    with warnings.catch_warnings():
        # Of the engine: that sampling follows torch's seed, that this model was not tried for independence.
        warnings.filterwarnings("ignore", category=UserWarning, module="fastclip|opacus|opacus_face|test_data|torch")
        torch.manual_seed(0)
        yield


class Training:
    """Linear model, learning rate 1, no noise: each release is the set of examples that were summed, with their counts."""

    def __init__(self, opacus: ModuleType, size: int = 16, mode: str = "hooks", **loader: Any) -> None:
        self.size = size
        model = nn.Linear(size, 1, bias=False)
        nn.init.zeros_(model.weight)
        self.weight = model.weight
        loader = {"batch_size": 8, **loader}
        made = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            criterion=nn.L1Loss(reduction="sum"),
            data_loader=DataLoader(Numbers(size), **loader),
            noise_multiplier=0.0,
            max_grad_norm=10.0,
            poisson_sampling=False,
            loss_reduction="sum",
            grad_sample_mode=mode,
        )
        self.model, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.criterion = made[2] if mode == "ghost" else None
        self.opacus = opacus

    def in_parts(self, most: int = 2) -> Any:
        module = importlib.import_module(f"{self.opacus.__name__}.utils.batch_memory_manager")
        return module.BatchMemoryManager(
            data_loader=self.loader, max_physical_batch_size=most, optimizer=self.optimizer
        )

    def backward(self, batch: torch.Tensor) -> None:
        out = self.model(batch)[:, 0]
        # Far off, so that each gradient is the example itself.
        (out.sum() if self.criterion is None else self.criterion(out, torch.full_like(out, -100.0))).backward()

    def step(self, batch: torch.Tensor) -> list[int]:
        """What was released: example i as many times as it was summed."""
        self.optimizer.zero_grad()
        self.backward(batch)
        before = self.weight.detach().clone()
        self.optimizer.step()
        counts = (before - self.weight.detach()).flatten().round().int().tolist()
        return [i for i, count in enumerate(counts) for _ in range(count)]

    def epoch(self, loader: Any, steps: int | None = None) -> list[list[int]]:
        released = []
        for done, batch in enumerate(loader, 1):
            released.append(self.step(batch))
            if done == steps:
                break
        return [release for release in released if release]


FIRST, SECOND = list(range(8)), list(range(8, 16))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("workers", [0, 2])
def test_one_release_a_logical_batch(mode: str, workers: int) -> None:
    training = Training(face, mode=mode, num_workers=workers)
    with training.in_parts(3) as loader:
        assert len(loader) == 6
        assert training.epoch(loader) == [FIRST, SECOND]
        assert training.epoch(loader) == [FIRST, SECOND]


@scenario
def a_loop_that_is_left_leaves_nothing_behind(opacus: ModuleType) -> None:
    for workers in (0, 2):
        for steps in range(1, 8):
            training = Training(opacus, num_workers=workers)
            with training.in_parts() as loader:
                training.epoch(loader, steps)
                assert training.epoch(loader) == [FIRST, SECOND], (workers, steps)


@scenario
def workers_that_live_on_have_no_old_signals(opacus: ModuleType) -> None:
    training = Training(opacus, num_workers=1, persistent_workers=True)
    with training.in_parts() as loader:
        training.epoch(loader, 3)
        assert training.epoch(loader, 6) == [FIRST]
        assert training.epoch(loader) == [FIRST, SECOND]


@scenario
def an_abandoned_sum_is_not_released_by_the_plain_loader(opacus: ModuleType) -> None:
    training = Training(opacus)
    with training.in_parts() as loader:
        training.epoch(loader, 3)
    assert training.epoch(training.loader) == [FIRST, SECOND]


@scenario
def an_abandoned_sum_is_not_released_in_ghost_mode(opacus: ModuleType) -> None:
    training = Training(opacus, mode="ghost")
    with training.in_parts() as loader:
        training.epoch(loader, 1)
    assert training.epoch(training.loader) == [FIRST, SECOND]


@scenario
def an_exception_in_the_loop_leaves_nothing_behind(opacus: ModuleType) -> None:
    training = Training(opacus)
    with pytest.raises(ZeroDivisionError) as held, training.in_parts() as loader:
        for batch in loader:
            training.step(batch)
            _ = 1 / 0
    assert held.traceback  # holds the loop's frame, and with it the iterator
    assert training.epoch(training.loader) == [FIRST, SECOND]


@scenario
def an_iterator_that_is_kept_leaves_nothing_behind(opacus: ModuleType) -> None:
    training = Training(opacus)
    with training.in_parts() as loader:
        kept = iter(loader)
        for _ in range(3):
            training.step(next(kept))
    assert training.epoch(training.loader) == [FIRST, SECOND]
    assert training.step(next(kept)) == [6, 7]  # goes on where it was; what it had summed is gone
    assert training.step(next(kept)) == []


@scenario
def nested_and_second_managers_do_not_mix(opacus: ModuleType) -> None:
    training = Training(opacus, num_workers=1)
    with training.in_parts() as outer:
        for place, batch in enumerate(outer):
            released = training.step(batch)
            assert not set(released) & set(FIRST if place >= 4 else SECOND)
            if place == 1:
                with training.in_parts(4) as inner:
                    assert training.epoch(inner, 3) == [FIRST]
    with training.in_parts(4) as loader:
        assert training.epoch(loader) == [FIRST, SECOND]


@scenario
def a_loop_that_goes_on_after_another_can_be_left_too(opacus: ModuleType) -> None:
    training = Training(opacus)
    with training.in_parts() as outer:
        for place, batch in enumerate(outer):
            training.step(batch)
            if place == 1:
                with training.in_parts(4) as inner:
                    training.epoch(inner)
            if place == 5:
                break
    assert training.epoch(training.loader) == [FIRST, SECOND]


def test_a_manager_that_was_not_used_changes_nothing() -> None:
    training = Training(face)
    released = []
    with training.in_parts() as loader:
        for batch in loader:
            released.append(training.step(batch))
            with training.in_parts():
                pass
    assert [release for release in released if release] == [FIRST, SECOND]


@scenario
def reading_a_batch_before_training_does_not_shift_the_signals(opacus: ModuleType) -> None:
    training = Training(opacus)
    with training.in_parts() as loader:
        next(iter(loader))
        assert sum(1 for _ in loader) == 8
        assert training.epoch(loader) == [FIRST, SECOND]


@scenario
def a_batch_without_its_step_is_refused(opacus: ModuleType) -> None:
    training = Training(opacus)
    with training.in_parts() as loader, pytest.raises(RuntimeError, match="2 batches were taken"):
        for place, batch in enumerate(loader):
            if place != 1:
                training.step(batch)
    assert training.epoch(training.loader) == [FIRST, SECOND]


@scenario
def a_second_step_on_one_part_is_refused(opacus: ModuleType) -> None:
    training = Training(opacus)
    with training.in_parts() as loader, pytest.raises(RuntimeError, match="summed twice"):
        for batch in loader:
            training.step(batch)
            training.step(batch)
    assert training.epoch(training.loader) == [FIRST, SECOND]


def test_several_steps_on_a_logical_batch_that_is_whole() -> None:
    training = Training(face)
    with training.in_parts(8) as loader:
        for batch in loader:
            assert training.step(batch) == training.step(batch) != []


def test_a_loader_of_the_users_own_around_the_parts_gets_the_signals_in_order() -> None:
    """accelerate, for one, builds another loader from batch_sampler, and that reads ahead."""
    training = Training(face)
    with training.in_parts() as loader:
        for _ in range(2):
            rebuilt = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler)
            ahead = list(rebuilt)
            assert [r for r in map(training.step, ahead) if r] == [FIRST, SECOND]
            next(iter(rebuilt))  # left


def test_batches_that_are_empty_are_steps_of_noise_alone() -> None:
    model = nn.Linear(16, 1)
    engine = face.PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(Numbers(), batch_size=1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    module = importlib.import_module("fastclip.opacus.utils.batch_memory_manager")
    empty = parts = 0
    with module.BatchMemoryManager(data_loader=loader, max_physical_batch_size=1, optimizer=optimizer) as in_parts:
        for batch in in_parts:
            before = model._module.weight.detach().clone()
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
            parts += 1
            if len(batch) == 0:
                empty += 1
                assert not torch.equal(before, model._module.weight)
    assert empty and parts > 16
    assert sum(steps for _, _, steps in engine.accountant.history) == 16


@pytest.mark.parametrize("torch_format", [False, True])
def test_hugging_face_data_sets_in_parts(torch_format: bool) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": [[float(i)] * 2 for i in range(10)], "y": list(range(10))})
    data = data.with_format("torch") if torch_format else data
    data_loader = importlib.import_module("fastclip.opacus.data_loader")
    manager = importlib.import_module("fastclip.opacus.utils.batch_memory_manager")
    optimizer = Training(face).optimizer
    loader = data_loader.DPDataLoader(data, sample_rate=0.125)
    with manager.BatchMemoryManager(data_loader=loader, max_physical_batch_size=1, optimizer=optimizer) as parts:
        batches = list(parts)
    assert {len(batch["y"]) for batch in batches} == {0, 1}
    assert all(set(batch) == {"x", "y"} for batch in batches)


def test_the_length_of_a_loader_in_parts() -> None:
    module = importlib.import_module("fastclip.opacus.utils.batch_memory_manager")
    samplers = importlib.import_module("fastclip.opacus.utils.uniform_sampler")
    optimizer = Training(face).optimizer
    for size, drop_last, most in ((7, False, 3), (7, True, 3), (4, False, 9), (30, True, 2), (30, False, 7)):
        batches = BatchSampler(SequentialSampler(range(25)), size, drop_last)
        split = module.BatchSplittingSampler(sampler=batches, max_batch_size=most, optimizer=optimizer)
        assert len(split) == len(list(split)), (size, drop_last, most)
        assert sorted(i for part in split for i in part) == sorted(i for batch in batches for i in batch)
    for rate, most in ((0.01, 8), (0.1, 8), (0.1, 1000), (0.5, 3)):
        poisson = samplers.UniformWithReplacementSampler(num_samples=100, sample_rate=rate, steps=400)
        split = module.BatchSplittingSampler(sampler=poisson, max_batch_size=most, optimizer=optimizer)
        assert len(list(split)) == pytest.approx(len(split), rel=0.05)
    with pytest.raises(ValueError, match="at least 1 example, got 0"):
        module.BatchSplittingSampler(sampler=batches, max_batch_size=0, optimizer=optimizer)


@pytest.mark.parametrize("name", scenario)
def test_the_face_does_it(name: str) -> None:
    scenario.passes_on_the_face(name)


@pytest.mark.parametrize("name", scenario)
def test_opacus_does_not(name: str) -> None:
    scenario.fails_on_opacus(name)
