"""Digits and a small convolutional net: Poisson sampling, physical batches, every mode of computing gradients, checkpoints."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES, DELTA, MAX_GRAD_NORM = 10, 1e-3, 5.0


class SampleConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 8, 2, padding=3)
        self.norm1 = nn.GroupNorm(4, 8)
        self.conv2 = nn.Conv2d(8, 12, 4, 2)
        self.norm2 = nn.GroupNorm(3, 12)
        self.fc1 = nn.Linear(12 * 4, 16)
        self.fc2 = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 1, 28, 28] -> [B, CLASSES]
        x = torch.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 2, 1)  # [B, 8, 13, 13]
        x = torch.max_pool2d(torch.relu(self.norm2(self.conv2(x))), 2)  # [B, 12, 2, 2]
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def digits(count: int, seed: int) -> TensorDataset:
    """The template of its class, with noise of an example's own strength."""
    rng = torch.Generator().manual_seed(seed)
    templates = torch.randn(CLASSES, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (count,), generator=rng)
    strength = torch.rand(count, 1, 1, 1, generator=rng)
    images = templates[labels] + 2 * strength * torch.randn(count, 1, 28, 28, generator=rng)
    return TensorDataset(images, labels)


def evaluate(model: nn.Module, loader: DataLoader[Any]) -> tuple[float, float]:
    model.eval()
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for images, labels in loader:
            logits = model(images)
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
    model.train()
    return total / count, right / count


def make_model(opacus: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return SampleConvNet()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def make_loader(seed: int, size: int = 60, batch_size: int = 12) -> DataLoader[Any]:
    rng = torch.Generator().manual_seed(seed)
    return DataLoader(digits(size, seed), batch_size=batch_size, generator=rng)


def run(
    opacus: Any,
    *,
    noise_multiplier: float,
    seed: int,
    grad_sample_mode: str = "hooks",
    clipping: str = "flat",
    wrap_model: bool = True,
    size: int = 60,
    batch_size: int = 12,
    max_physical_batch_size: int = 5,
    epochs: range = range(2),
    accountant: str = "prv",
    save_to: Path | None = None,
    resume_from: Path | None = None,
) -> dict[str, Any]:
    memory = import_module(f"{opacus.__name__}.utils.batch_memory_manager")
    model: Any = make_model(opacus, seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    layers = len(parameters)
    optimizer: Any = make_optimizer(model)
    criterion: Any = nn.CrossEntropyLoss()
    loader: Any = make_loader(seed, size, batch_size)
    sampling = loader.generator
    engine = opacus.PrivacyEngine(accountant=accountant)
    made = engine.make_private(
        module=model,
        optimizer=optimizer,
        criterion=criterion,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=[MAX_GRAD_NORM / layers**0.5] * layers if clipping == "per_layer" else MAX_GRAD_NORM,
        clipping=clipping,
        grad_sample_mode=grad_sample_mode,
        wrap_model=wrap_model,
    )
    wrapped, optimizer, loader = made[0], made[1], made[-1]
    if grad_sample_mode == "ghost":
        criterion = made[2]
    if wrap_model:
        model = wrapped
    if resume_from is not None:
        engine.load_checkpoint(path=resume_from, module=model, optimizer=optimizer)

    losses, test_losses, accuracies = [], [], []
    test_loader = DataLoader(digits(40, seed + 1), batch_size=20)
    for epoch in epochs:
        sampling.manual_seed(seed + epoch)  # an epoch's batches are the same in a run that was interrupted
        with memory.BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=max_physical_batch_size, optimizer=optimizer
        ) as batches:
            for images, labels in batches:
                optimizer.zero_grad()
                loss = criterion(model(images), labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        optimizer.zero_grad()  # mode "ew" runs no forward while gradients are held
        test_loss, accuracy = evaluate(model, test_loader)
        test_losses.append(test_loss)
        accuracies.append(accuracy)
    if save_to is not None:
        engine.save_checkpoint(path=save_to, module=model, optimizer=optimizer)
    return {
        "losses": losses,
        "test_losses": test_losses,
        "accuracies": accuracies,
        "epsilon": engine.get_epsilon(DELTA) if noise_multiplier else math.inf,
        "initial": initial,
        "parameters": {name: p.detach().clone() for name, p in parameters.items()},
    }
