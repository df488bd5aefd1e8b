"""What an attack on the face found: each released more than C, or without noise, or other numbers."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

opacus = pytest.importorskip("fastclip.opacus", reason="opacus is not installed: pip install fastclip-dp[opacus]")
GHOST = "DPOptimizerFastGradientClipping"


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def optimizer_over(params: Any, cls: str = "DPOptimizer", sigma: float = 0.0, norm: Any = 1.0) -> Any:
    sgd = torch.optim.SGD(params, lr=1.0)
    return getattr(opacus.optimizers, cls)(
        sgd, noise_multiplier=sigma, max_grad_norm=norm, expected_batch_size=1, loss_reduction="sum"
    )


def ghost(module: nn.Module, norm: float = 1.0) -> Any:
    return opacus.GradSampleModuleFastGradientClipping(module, loss_reduction="sum", max_grad_norm=norm)


def released(params: Any) -> float:
    return float(torch.cat([p.grad.flatten() for p in params]).norm())


def test_a_batch_that_is_overwritten_after_its_backward_is_released_as_it_was() -> None:
    model = opacus.GradSampleModule(nn.Linear(3, 1, bias=False), loss_reduction="sum")
    optimizer, x = optimizer_over(model.parameters(), norm=1e3), torch.tensor([[1.0, 2.0, 3.0]])
    model(x).sum().backward()
    x.fill_(100.0)
    optimizer.step()
    torch.testing.assert_close(model._module.weight.grad, torch.tensor([[1.0, 2.0, 3.0]]))


def test_a_gradient_that_is_overwritten_before_the_step_is_refused() -> None:
    model = opacus.GradSampleModule(nn.Linear(8, 8, bias=False), loss_reduction="sum")
    optimizer, g = optimizer_over(model.parameters()), torch.ones(2, 8)
    model(torch.ones(2, 8)).backward(g)
    g.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        optimizer.step()


class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        return -(self.encoder(x)[:, None] - prototypes[None]).square().sum(-1)  # [B, K]


def test_one_example_beside_several_prototypes_is_one_unit() -> None:
    model = opacus.GradSampleModule(Prototypes(), loss_reduction="sum")
    optimizer = optimizer_over(model.parameters())
    out = model(torch.ones(1, 3), torch.randn(5, 4) * 50)
    assert out.shape == (1, 5)
    out.sum().backward()
    optimizer.step()
    assert released(model.parameters()) <= 1.0001


def adaptive(sigma: float) -> tuple[Any, ...]:
    from fastclip.opacus.utils.adaptive_clipping.adaptive_clipping_utils import PrivacyEngineAdaptiveClipping

    model = nn.Linear(100, 100)
    data = TensorDataset(torch.zeros(200, 100), torch.zeros(200, dtype=torch.long))
    engine = PrivacyEngineAdaptiveClipping()
    private, optimizer, criterion, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data, batch_size=200),
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        min_clipbound=0.1,
        grad_sample_mode="ghost",
        poisson_sampling=False,
    )
    return engine, private, optimizer, criterion, data.tensors


def test_adaptive_noise_is_that_of_the_multiplier_that_is_accounted_for() -> None:
    _, model, optimizer, criterion, (x, y) = adaptive(1.0)
    for sigma in (1.0, 4.0):
        optimizer.noise_multiplier = sigma
        norm = optimizer.max_grad_norm
        criterion(model(x), y).backward()
        assert optimizer.pre_step()
        std = float(model._module.weight.grad.std()) * 200 / norm
        optimizer.zero_grad()
        assert std == pytest.approx((sigma**-2 - 20.0**-2) ** -0.5, rel=0.05)


def test_a_dropped_batch_moves_no_adaptive_norm() -> None:
    engine, model, optimizer, criterion, (x, y) = adaptive(1.0)
    for _ in range(3):
        criterion(model(x), y).backward()
        optimizer.zero_grad()
        assert optimizer.max_grad_norm == 1.0 and not engine.accountant.history


def test_parameters_that_no_model_clips_are_not_released() -> None:
    model, head = ghost(nn.Linear(3, 3)), nn.Linear(3, 1)
    optimizer = optimizer_over([*model.parameters(), *head.parameters()], GHOST)
    head(model(torch.ones(1, 3) * 1000)).sum().backward()
    with pytest.raises(ValueError, match="would not be clipped"):
        optimizer.step()


def test_two_models_that_clip_apart_are_refused() -> None:
    models = [ghost(nn.Linear(3, 3)) for _ in range(2)]
    optimizer = optimizer_over([p for m in models for p in m.parameters()], GHOST)
    models[1](models[0](torch.ones(1, 3) * 1000)).sum().backward()
    with pytest.raises(ValueError, match="clip apart"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_parameter_frozen_before_the_step_neither_moves_nor_shows_its_gradient(mode: str) -> None:
    inner = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model = ghost(inner) if mode == "ghost" else opacus.GradSampleModule(inner, loss_reduction="sum")
    optimizer = getattr(opacus.optimizers, GHOST if mode == "ghost" else "DPOptimizer")(
        torch.optim.RMSprop(model.parameters()),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=1,
        loss_reduction="sum",
    )
    model(torch.ones(2, 3)).sum().backward()
    inner[0].weight.requires_grad_(False)
    before = inner[0].weight.clone()
    optimizer.step()
    assert torch.equal(before, inner[0].weight) and inner[0].weight.grad is None


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_sum_of_a_frozen_parameter_waits_for_no_later_batch(mode: str) -> None:
    inner = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model = ghost(inner) if mode == "ghost" else opacus.GradSampleModule(inner, loss_reduction="sum")
    optimizer = optimizer_over(list(model.parameters()), GHOST if mode == "ghost" else "DPOptimizer")
    for k in range(4):
        optimizer.signal_skip_step(k % 2 == 0)
        if k == 1:
            inner[0].requires_grad_(False)
        (model(torch.ones(2, 3)) * (k < 2)).sum().backward()
        optimizer.step()
        if k == 3:
            assert released(inner.parameters()) == 0
        optimizer.zero_grad()
        if k == 1:
            inner[0].requires_grad_(True)


def test_a_sum_that_failed_half_way_starts_again_from_zero() -> None:
    model = opacus.GradSampleModule(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), loss_reduction="sum")
    optimizer, x = optimizer_over(model.parameters()), torch.ones(1, 3) * 10
    optimizer.signal_skip_step(True)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(x).sum().backward()
    list(model.parameters())[-1].grad_sample = torch.ones(1, 7)
    with pytest.raises(ValueError, match="out must have shape"):
        optimizer.step()
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    assert released(model.parameters()) <= 1.0001


def test_a_sampler_that_answers_with_other_rows_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    def twice(layer: Scale, activations: list[torch.Tensor], g: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
        return {layer.weight: torch.cat([activations[0] * g] * 2)}

    opacus.grad_sample.register_grad_sampler(Scale)(twice)
    model = opacus.GradSampleModule(Scale(), loss_reduction="sum")
    with pytest.raises(ValueError, match="grad sampler returned"):
        model(torch.ones(4, 3)).sum().backward()


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.forwards = nn.Parameter(torch.ones(3)), 0
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        if self.forwards > 30:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.5)
        return (x - self.mean) * self.weight


def test_buffers_written_after_the_first_batch_are_refused() -> None:
    model = opacus.GradSampleModule(Late(), loss_reduction="sum")
    optimizer = optimizer_over(model.parameters())
    with pytest.raises(RuntimeError, match="buffer mean"):
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(4, 3) + 7).sum().backward()
            optimizer.step()


def test_backwards_of_the_same_examples_through_other_layers_are_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: torch.Tensor, first: bool) -> torch.Tensor:
            return self.a(x) if first else self.b(x)

    model = opacus.GradSampleModule(Two(), loss_reduction="sum")
    optimizer, x = optimizer_over(model.parameters()), torch.ones(1, 3) * 1000
    for first in (True, False):
        model(x, first).sum().backward()
    assert optimizer.accumulated_iterations == 1
    optimizer.step()
    assert released(model.parameters()) <= 1.0001


def test_backwards_of_other_examples_through_other_layers_are_refused_under_poisson_sampling() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: torch.Tensor, first: bool) -> torch.Tensor:
            return self.a(x) if first else self.b(x)

    model = opacus.GradSampleModule(Two(), loss_reduction="sum")
    model.forbid_grad_accumulation()
    x = torch.ones(2, 3)
    model(x, True).sum().backward()
    x.add_(1)  # the next draw in the same memory
    with pytest.raises(ValueError, match="Poisson"):
        model(x, False).sum().backward()


def test_a_model_that_is_followed_no_more_is_not_released() -> None:
    model = ghost(nn.Linear(3, 1))
    optimizer = optimizer_over(list(model.parameters()), GHOST)
    inner = model.to_standard_module()
    (inner(torch.ones(2, 3)) * 1000).sum().backward()
    with pytest.raises(ValueError, match="not found"):
        optimizer.step()


def test_bounds_of_layers_change_clip_and_noise() -> None:
    model = opacus.GradSampleModule(nn.Linear(3, 1), loss_reduction="sum")
    optimizer = optimizer_over(model.parameters(), "DPPerLayerOptimizer", norm=[1.0, 1.0])
    optimizer.max_grad_norms = [3.0, 4.0]
    assert optimizer.max_grad_norm == 5.0


def test_dropping_a_ghost_batch_by_the_model_starts_again() -> None:
    model = ghost(nn.Linear(3, 1))
    model.forbid_grad_accumulation()
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
        model.zero_grad()


def test_a_wrapper_can_be_saved_whole() -> None:
    for model in (ghost(nn.Linear(3, 1)), opacus.GradSampleModule(nn.Linear(3, 1))):
        model(torch.ones(2, 3)).sum().backward()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert type(loaded) is type(model) and torch.equal(loaded._module.weight, model._module.weight)
        loaded(torch.ones(2, 3)).sum().backward()


def test_group_norm_of_vectors_and_weights_in_another_order() -> None:
    model = opacus.GradSampleModule(nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)), loss_reduction="sum")
    model(torch.randn(5, 3)).square().sum().backward()
    assert model._module[1].weight.grad_sample.shape == (5, 4)
    images = opacus.GradSampleModule(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), loss_reduction="sum")
    images(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert images._module.weight.grad is not None
