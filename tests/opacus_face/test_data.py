"""Poisson batches of any data set, empty ones among them: what Opacus 1.6.0 gets wrong fails on it and passes here."""

from __future__ import annotations

import collections
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
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


class Words(Dataset[dict[str, Any]]):
    """Dictionaries with a text: what a Hugging Face data set gives."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"ids": torch.full((3,), index), "label": index % 2, "text": f"number {index}"}


@scenario
def dictionaries_with_text_come_empty_too(opacus: ModuleType) -> None:
    loader_module = importlib.import_module(f"{opacus.__name__}.data_loader")
    for workers in (0, 2):
        loader = loader_module.DPDataLoader(Words(), sample_rate=0.1, num_workers=workers)
        batches = list(loader)
        sizes = [len(batch["text"]) for batch in batches]
        assert len(batches) == 10 and 0 in sizes and max(sizes) > 0
        for batch, size in zip(batches, sizes, strict=True):
            assert batch["ids"].shape == (size, 3) and batch["label"].shape == (size,)
            assert batch["ids"].dtype == batch["label"].dtype == torch.int64


# Samplers


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def of(rank: int, world: int) -> None:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: world)

    return of


def test_every_rank_makes_every_step(ranks: Callable[[int, int], None]) -> None:
    counts = {}
    for opacus in ("opacus", "fastclip.opacus"):
        module = importlib.import_module(f"{opacus}.utils.uniform_sampler")
        for rank in range(3):
            ranks(rank, 3)
            sampler = module.DistributedUniformWithReplacementSampler(total_size=50, sample_rate=0.01)
            counts[opacus, rank] = len(list(sampler))
            assert len(sampler) == 100
    assert all(counts["fastclip.opacus", rank] == 100 for rank in range(3))
    assert all(counts["opacus", rank] < 100 for rank in range(3)), "Opacus does it too: nothing is shown"


def test_a_rank_without_a_batch_hands_out_an_empty_one(ranks: Callable[[int, int], None]) -> None:
    data_loader = importlib.import_module("fastclip.opacus.data_loader")
    seen: list[int] = []
    for rank in range(2):
        ranks(rank, 2)
        loader = data_loader.DPDataLoader.from_data_loader(DataLoader(Numbers(10), batch_size=1), distributed=True)
        batches = list(loader)
        assert len(batches) == 10
        assert 0 in {len(batch) for batch in batches} and all(batch.shape[1:] == (10,) for batch in batches)
        seen.extend({int(row.argmax()) for batch in batches for row in batch})
    assert len(seen) == len(set(seen)), "an example belongs to one rank"


def test_a_rank_may_have_no_examples_at_all(ranks: Callable[[int, int], None]) -> None:
    ranks(2, 3)
    module = importlib.import_module("fastclip.opacus.utils.uniform_sampler")
    sampler = module.DistributedUniformWithReplacementSampler(total_size=2, sample_rate=0.25)
    assert [len(batch) for batch in sampler] == [0, 0, 0, 0]


@scenario
def an_epoch_has_as_many_steps_as_the_loader_had(opacus: ModuleType) -> None:
    module = importlib.import_module(f"{opacus.__name__}.utils.uniform_sampler")
    for n in range(1, 2000):
        assert len(module.UniformWithReplacementSampler(num_samples=1, sample_rate=1 / n)) == n
    data_loader = importlib.import_module(f"{opacus.__name__}.data_loader")
    for n in (93, 99, 105):
        loader = DataLoader(Numbers(n), batch_size=1)
        assert len(list(data_loader.DPDataLoader.from_data_loader(loader))) == n


def test_rates_between_take_the_steps_that_fit() -> None:
    module = importlib.import_module("fastclip.opacus.utils.uniform_sampler")
    for rate, steps in ((1.0, 1), (0.4, 2), (0.3, 3), (0.7, 1), (1 / 2.9999, 2)):
        assert len(module.UniformWithReplacementSampler(num_samples=1, sample_rate=rate)) == steps
    for rate in (0.0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="sample_rate"):
            module.UniformWithReplacementSampler(num_samples=1, sample_rate=rate)
    with pytest.raises(ValueError, match="num_samples"):
        module.UniformWithReplacementSampler(num_samples=0, sample_rate=0.5)


@scenario
def small_rates_are_kept(opacus: ModuleType) -> None:
    """torch.rand has 2^24 values. At a rate of 2^-25 an example whose number is the smallest of them is in every other time."""
    module = importlib.import_module(f"{opacus.__name__}.utils.uniform_sampler")
    sampler = module.UniformWithReplacementSampler(num_samples=1000, sample_rate=2.0**-25, steps=1)
    real = torch.rand
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **kw: real(*size, **kw) * (kw.get("dtype") is torch.float64))
        (batch,) = sampler
    assert 400 < len(batch) < 600


def test_the_numbers_are_opacus_numbers() -> None:
    """Same seed, same batches: only draws that fall on the edge, one in 2^24, may differ."""
    drawn = []
    for opacus in ("opacus", "fastclip.opacus"):
        module = importlib.import_module(f"{opacus}.utils.uniform_sampler")
        for generator in (None, torch.Generator()):
            torch.manual_seed(5) if generator is None else generator.manual_seed(5)
            drawn.append(
                list(module.UniformWithReplacementSampler(num_samples=300, sample_rate=0.1, generator=generator))
            )
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]


# Loaders


def test_what_has_no_batches_is_refused_by_name() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield 1

    data_loader = importlib.import_module("fastclip.opacus.data_loader")
    manager = importlib.import_module("fastclip.opacus.utils.batch_memory_manager")
    model = nn.Linear(1, 1)
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 1}
    optimizer = face.optimizers.DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), **settings)
    stream, single = DataLoader(Stream()), DataLoader(Numbers(), batch_size=None)
    short = DataLoader(Numbers(4), batch_size=8, drop_last=True)
    for call, match in (
        (lambda: data_loader.DPDataLoader.from_data_loader(stream), "not supported for IterableDataset"),
        (lambda: data_loader.DPDataLoader(Stream(), sample_rate=0.5), "not supported for IterableDataset"),
        (lambda: data_loader.DPDataLoader.from_data_loader(single), "batch_size=None"),
        (lambda: data_loader.DPDataLoader.from_data_loader(short), "no batch"),
        (lambda: data_loader.DPDataLoader(Numbers(), sample_rate=2.0), "sample_rate"),
        (lambda: data_loader.switch_generator(data_loader=single, generator=None), "Non-batch processing"),
        (lambda: data_loader.switch_generator(data_loader=DataLoader(Numbers()), generator=None), "generator"),
        (lambda: manager.wrap_data_loader(data_loader=stream, max_batch_size=1, optimizer=optimizer), "Iterable"),
        (
            lambda: manager.wrap_data_loader(data_loader=single, max_batch_size=1, optimizer=optimizer),
            "batch_size=None",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@scenario
def drop_last_stays_where_it_was(opacus: ModuleType) -> None:
    data_loader = importlib.import_module(f"{opacus.__name__}.data_loader")
    loader = DataLoader(Numbers(10), batch_size=4, shuffle=True, drop_last=True)
    switched = data_loader.switch_generator(data_loader=loader, generator=torch.Generator().manual_seed(1))
    assert [len(batch) for batch in switched] == [4, 4]


def test_a_sampler_that_would_be_ignored_is_named() -> None:
    data_loader = importlib.import_module("fastclip.opacus.data_loader")
    loader = DataLoader(Numbers(), batch_size=2, sampler=SubsetRandomSampler(range(4)))
    with pytest.warns(UserWarning, match="SubsetRandomSampler has no effect"):
        data_loader.DPDataLoader.from_data_loader(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data_loader.DPDataLoader.from_data_loader(DataLoader(Subset(Numbers(), range(4)), batch_size=2, shuffle=True))


Pair = collections.namedtuple("Pair", "x y")


def test_empty_batches_are_like_the_others() -> None:
    data_loader = importlib.import_module("fastclip.opacus.data_loader")
    full = {
        "pair": Pair(torch.ones(4, 2), torch.zeros(4, dtype=torch.bool)),
        "ordered": collections.OrderedDict(a=torch.ones(4, 1, 3)),
        "texts": ["a", "b", "c", "d"],
        "nothing": None,
        "none": [],
    }
    collate = data_loader.CollateFnWithEmpty(lambda examples: full)
    assert collate([0] * 4) is full
    empty = collate([])
    assert type(empty["pair"]) is Pair and empty["pair"].x.shape == (0, 2) and empty["pair"].y.dtype == torch.bool
    assert type(empty["ordered"]) is collections.OrderedDict and empty["ordered"]["a"].shape == (0, 1, 3)
    assert empty["texts"] == empty["none"] == [] and empty["nothing"] is None
    assert full["pair"].x.shape == (4, 2) and full["ordered"]["a"].shape == (4, 1, 3)
    assert collate([])["pair"].x is not empty["pair"].x

    for bad in (torch.tensor(1.0), 3, ("a", "b")):
        collate = data_loader.CollateFnWithEmpty(lambda examples, bad=bad: {"bad": bad})
        collate([0] * 4)
        with pytest.raises(TypeError, match=r"Unsupported batch type: (Tensor without|int|str)"):
            collate([])


def test_labels_beside_inputs_with_examples_second() -> None:
    data_loader = importlib.import_module("fastclip.opacus.data_loader")
    collate = data_loader.CollateFnWithEmpty(lambda examples: (torch.ones(5, 4, 2), torch.ones(4)), batch_first=False)
    collate([0] * 4)
    x, y = collate([])
    assert x.shape == (5, 0, 2) and y.shape == (0,)


def test_a_first_batch_without_examples_has_the_collate_functions_form(caplog: pytest.LogCaptureFixture) -> None:
    data_loader = importlib.import_module("fastclip.opacus.data_loader")
    loader = data_loader.DPDataLoader(
        TensorDataset(torch.ones(3, 2)),
        sample_rate=1e-9,
        collate_fn=lambda rows: {"x": torch.stack([x for (x,) in rows])},
    )
    loader.batch_sampler.steps = 2
    logger = importlib.import_module("logging").getLogger("opacus.data_loader")
    logger.disabled = False
    for batch in loader:
        assert batch["x"].shape == (0, 2)
    assert caplog.text.count("First batch is empty") == 1


def test_a_private_loader_is_made_private_again_without_layers() -> None:
    data_loader = importlib.import_module("fastclip.opacus.data_loader")
    once = data_loader.DPDataLoader.from_data_loader(DataLoader(Numbers(99), batch_size=1))
    twice = data_loader.DPDataLoader.from_data_loader(once)
    assert len(twice) == 99
    assert not isinstance(twice.collate_fn.wrapped_collator_fn, data_loader.CollateFnWithEmpty)


def test_a_made_up_example_is_announced() -> None:
    data_loader = importlib.import_module("fastclip.opacus.data_loader")
    with pytest.warns(UserWarning, match=r"made-up example is released.* 2 \* max_grad_norm"):
        loader = data_loader.DPDataLoader(Numbers(), sample_rate=1e-9, rand_on_empty=True)
    assert loader.collate_fn([]).shape == (1, 16)


@pytest.mark.parametrize("name", scenario)
def test_the_face_does_it(name: str) -> None:
    scenario.passes_on_the_face(name)


@pytest.mark.parametrize("name", scenario)
def test_opacus_does_not(name: str) -> None:
    scenario.fails_on_opacus(name)
