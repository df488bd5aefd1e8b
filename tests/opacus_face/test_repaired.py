"""What Opacus 1.6.0 refuses or gets wrong, and the face does right: each scenario fails on Opacus and passes here."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import oracle
import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from opacus_face.scenarios import Scenarios

pytest.importorskip("fastclip.opacus", reason="opacus is not installed: pip install fastclip-dp[opacus]")

scenario = Scenarios()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def engine(opacus: ModuleType, model: nn.Module, mode: str = "hooks", **settings: Any) -> tuple[Any, ...]:
    """make_private without noise on 8 examples that nobody reads; the model's parameters are trained by SGD."""
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "poisson_sampling": False} | settings
    loader = DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    cls = settings.pop("engine", opacus.PrivacyEngine)
    return cls().make_private(module=model, optimizer=optimizer, data_loader=loader, grad_sample_mode=mode, **settings)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def whole(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def clipped(model: nn.Module, loss: Callable[[int], torch.Tensor], count: int, norm: float = 1.0) -> torch.Tensor:
    """The sum of clipped gradients, one example at a time through the model as it is."""
    total = torch.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad))
    for i in range(count):
        params = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss(i), params, allow_unused=True)
        own = torch.cat(
            [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(params, grads, strict=True)]
        )
        total += own * min(1.0, norm / float(own.norm()))
    return total


def _family_in_ghost_mode(opacus: ModuleType, name: str) -> None:
    case = FAMILIES[name]
    units = oracle.unit_gradients(*(case.build()[i] for i in (0, 2, 1)))
    norm = oracle.pick_clipping_norm(oracle.norms(units))
    model, batch, loss_fn = case.build()
    private, optimizer, criterion, _ = engine(opacus, model, "ghost", max_grad_norm=norm)

    class Losses(nn.Module):
        reduction = "mean"

        def forward(self, losses: torch.Tensor) -> torch.Tensor:
            return losses

    criterion.criterion = Losses()
    criterion(loss_fn(private, batch)).backward()
    optimizer.pre_step()
    expected = oracle.clipped_sum(units, norm)
    oracle.assert_gradients(oracle.collect(model), {key: g / 8 for key, g in expected.items()})


for _name in ("gpt2", "bert_classifier", "opt", "t5", "modernbert_mlm", "gemma2", "llama_tied"):
    scenario[f"{_name}_in_ghost_mode"] = partial(_family_in_ghost_mode, name=_name)


@scenario
def losses_with_a_trailing_dimension(opacus: ModuleType) -> None:
    model = nn.Linear(4, 1)
    x, y = torch.randn(8, 4) * 10, torch.randn(8, 1)
    expected = clipped(model, lambda i: (model(x[i : i + 1]) - y[i : i + 1]).square().mean(), 8)
    private, optimizer, criterion, _ = engine(opacus, model, "ghost", criterion=nn.MSELoss())
    criterion(private(x), y).backward()
    optimizer.pre_step()
    torch.testing.assert_close(whole(model) * 8, expected)


@scenario
def clip_schedulers_change_clip_and_noise(opacus: ModuleType) -> None:
    model = mlp()
    x = torch.randn(8, 4)
    expected = clipped(model, lambda i: nn.functional.cross_entropy(model(x[i : i + 1]), torch.tensor([1])), 8, 0.01)
    private, optimizer, criterion, _ = engine(opacus, model, "ghost", max_grad_norm=0.1)
    schedulers = importlib.import_module(f"{opacus.__name__}.schedulers")
    scheduler = schedulers.ExponentialGradClip(optimizer, gamma=0.1)
    scheduler.step()
    assert optimizer.max_grad_norm == pytest.approx(0.01)
    criterion(private(x), torch.ones(8, dtype=torch.long)).backward()
    optimizer.pre_step()
    torch.testing.assert_close(whole(model) * 8, expected)


@scenario
def clip_schedulers_change_every_layers_clip(opacus: ModuleType) -> None:
    model = mlp()
    private, optimizer, _ = engine(opacus, model, clipping="per_layer", max_grad_norm=[0.1] * 4)
    importlib.import_module(f"{opacus.__name__}.schedulers").ExponentialGradClip(optimizer, gamma=0.1).step()
    nn.functional.cross_entropy(private(torch.randn(8, 4)), torch.ones(8, dtype=torch.long)).backward()
    optimizer.pre_step()
    assert float(whole(model).norm()) <= optimizer.max_grad_norm * (1 + 1e-5)


@scenario
def adaptive_clipping_clips(opacus: ModuleType) -> None:
    model = nn.Linear(4, 3)
    x = torch.randn(8, 4)
    x[0] *= 1e4
    adaptive = importlib.import_module(f"{opacus.__name__}.utils.adaptive_clipping.adaptive_clipping_utils")
    private, optimizer, criterion, _ = engine(
        opacus, model, "ghost", engine=adaptive.PrivacyEngineAdaptiveClipping, max_clipbound=1.0
    )
    criterion(private(x), torch.ones(8, dtype=torch.long)).backward()
    optimizer.pre_step()
    assert float(whole(model).norm()) * 8 <= 8 * 1.0001


@scenario
def parameters_unfrozen_later_are_clipped(opacus: ModuleType) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    private, optimizer, criterion, _ = engine(opacus, model, "ghost", criterion=nn.MSELoss())
    model[0].requires_grad_(True)
    criterion(private(torch.randn(8, 4) * 1e3), torch.ones(8, 3)).backward()
    optimizer.pre_step()
    assert float(whole(model).norm()) * 8 <= 8 * 1.0001


@scenario
def parameters_can_be_frozen_later(opacus: ModuleType) -> None:
    model = mlp()
    private, optimizer, criterion, _ = engine(opacus, model, "ghost", max_grad_norm=0.2)
    x, y = torch.randn(8, 4), torch.ones(8, dtype=torch.long)
    criterion(private(x), y).backward()
    optimizer.pre_step()
    optimizer.zero_grad()
    model[0].requires_grad_(False)
    twin = copy.deepcopy(model)
    expected = clipped(twin, lambda i: nn.functional.cross_entropy(twin(x[i : i + 1]), y[:1]), 8, 0.2)
    criterion(private(x), y).backward()
    optimizer.pre_step()
    torch.testing.assert_close(whole(model) * 8, expected)


@scenario
def several_backwards_add_up(opacus: ModuleType) -> None:
    model = mlp()
    x, y = torch.randn(8, 4), torch.ones(8, dtype=torch.long)
    expected = clipped(model, lambda i: nn.functional.cross_entropy(model(x[i : i + 1]), y[:1]), 8)
    private, optimizer, criterion, _ = engine(opacus, model, "ghost")
    for half in (slice(0, 4), slice(4, 8)):
        criterion(private(x[half]), y[half]).backward()
    optimizer.pre_step()
    torch.testing.assert_close(whole(model) * 16, expected)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.body, self.first(x), use_reentrant=False))


@scenario
def checkpoints_that_are_not_reentrant(opacus: ModuleType) -> None:
    model = Checkpointed()
    x, y = torch.randn(8, 4), torch.ones(8, dtype=torch.long)
    expected = clipped(model, lambda i: nn.functional.cross_entropy(model(x[i : i + 1]), y[:1]), 8)
    private, optimizer, criterion, _ = engine(opacus, model, "ghost")
    criterion(private(x), y).backward()
    optimizer.pre_step()
    torch.testing.assert_close(whole(model) * 8, expected)


@scenario
def an_id_twice_in_a_bag_counts_twice(opacus: ModuleType) -> None:
    model = nn.EmbeddingBag(5, 3, mode="sum")
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    ids, offsets = torch.tensor([1, 1, 1, 2, 3]), torch.tensor([0, 3])
    wrapped(ids, offsets).sum().backward()
    assert float(model.weight.grad_sample[0, 1, 0]) == 3.0


@scenario
def padding_has_no_gradient(opacus: ModuleType) -> None:
    model = nn.Embedding(5, 3, padding_idx=0)
    opacus.GradSampleModule(model, loss_reduction="sum")(torch.tensor([[0, 1], [0, 0]])).sum().backward()
    assert not model.weight.grad_sample[:, 0].any()


@scenario
def an_example_that_is_not_finite_adds_nothing(opacus: ModuleType) -> None:
    model = mlp()
    x = torch.randn(8, 4)
    x[2] = float("inf")
    private, optimizer, _ = engine(opacus, model)
    nn.functional.cross_entropy(private(x), torch.ones(8, dtype=torch.long)).backward()
    optimizer.pre_step()
    assert bool(whole(model).isfinite().all()) and float(whole(model).norm()) > 0


class PackedText(nn.Module):
    def __init__(self, rnn: type[nn.Module]) -> None:
        super().__init__()
        self.words, self.rnn, self.head = nn.Embedding(20, 4), rnn(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(self.words(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(1))


@scenario
def packed_sequences_that_are_not_sorted(opacus: ModuleType) -> None:
    model = PackedText(importlib.import_module(f"{opacus.__name__}.layers").DPLSTM)
    ids, lengths = torch.randint(0, 20, (5, 6)), torch.tensor([2, 6, 1, 5, 3])
    y = torch.tensor([0, 1, 2, 1, 0])
    expected = clipped(
        model, lambda i: nn.functional.cross_entropy(model(ids[i : i + 1], lengths[i : i + 1]), y[i : i + 1]), 5, 0.5
    )
    private, optimizer, _ = engine(opacus, model, max_grad_norm=0.5, loss_reduction="sum")
    nn.functional.cross_entropy(private(ids, lengths), y, reduction="sum").backward()
    optimizer.pre_step()
    torch.testing.assert_close(whole(model), expected)


@scenario
def tokens_as_examples_are_refused(opacus: ModuleType) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(20, 4), nn.Linear(4, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(ids).flatten(0, 1)).view(*ids.shape, 3).sum(1)

    model = Flat()
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    wrapped(torch.randint(0, 20, (4, 6))).sum().backward()
    assert model.head.weight.grad_sample.shape[0] == 4


@scenario
def clipping_norms_that_bound_nothing_are_refused(opacus: ModuleType) -> None:
    for norm in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_grad_norm"):
            engine(opacus, mlp(), max_grad_norm=norm)


@scenario
def checkpoints_load_without_running_a_pickle(opacus: ModuleType) -> None:
    import io

    model = mlp()
    private, optimizer, _ = engine(opacus, model)
    privacy, file = opacus.PrivacyEngine(), io.BytesIO()
    privacy.save_checkpoint(path=file, module=private, optimizer=optimizer)
    file.seek(0)
    privacy.load_checkpoint(path=file, module=private, optimizer=optimizer, torch_load_kwargs={"weights_only": True})


@scenario
def step_hooks_of_torch_can_be_registered(opacus: ModuleType) -> None:
    _, optimizer, _ = engine(opacus, mlp())
    optimizer.register_step_pre_hook(lambda *args: None)


@scenario
def a_loss_scaler_is_refused(opacus: ModuleType) -> None:
    model = mlp()
    private, optimizer, _ = engine(opacus, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(nn.functional.cross_entropy(private(torch.randn(8, 4)), torch.ones(8, dtype=torch.long))).backward()
    with pytest.raises(RuntimeError, match="loss scaler"):
        scaler.step(optimizer)


@scenario
def raw_optimizers_cannot_publish_a_clipped_sum(opacus: ModuleType) -> None:
    model = mlp()
    private, optimizer, criterion, _ = engine(opacus, model, "ghost")
    criterion(private(torch.randn(8, 4)), torch.ones(8, dtype=torch.long)).backward()
    with pytest.raises(RuntimeError, match="without noise"):
        optimizer.original_optimizer.step()


@pytest.mark.parametrize("name", scenario)
def test_the_face_does_it(name: str) -> None:
    scenario.passes_on_the_face(name)


@pytest.mark.parametrize("name", scenario)
def test_opacus_does_not(name: str) -> None:
    scenario.fails_on_opacus(name)
