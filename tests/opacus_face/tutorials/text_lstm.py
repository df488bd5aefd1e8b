"""Sentiment of short reviews: an embedding, an LSTM that Opacus can follow, and padded ids."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

VOCAB, PAD, LONGEST, DELTA, MAX_GRAD_NORM = 40, 0, 10, 1e-3, 0.85
Review = tuple[torch.Tensor, int]


class SentimentLSTM(nn.Module):
    def __init__(self, opacus: Any, recurrent: str, padding_idx: int | None) -> None:
        super().__init__()
        layers = import_module(f"{opacus.__name__}.layers")
        self.embedding = nn.Embedding(VOCAB, 8, padding_idx=padding_idx)
        self.lstm = getattr(layers, recurrent)(8, 10, batch_first=True)
        self.head = nn.Linear(10, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [B, T] -> [B, 2]
        states, _ = self.lstm(self.embedding(ids))  # [B, T, 10]
        return self.head(states[:, -1])


def reviews(count: int, seed: int) -> list[Review]:
    """Ids of words: the lower half of the vocabulary is heard more often in bad reviews."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        label, length = i % 2, int(torch.randint(2, LONGEST + 1, (), generator=rng))
        weights = torch.ones(VOCAB)
        weights[: VOCAB // 2] = 4.0 if label else 1.0
        weights[PAD] = 0
        found.append((torch.multinomial(weights, length, replacement=True, generator=rng), label))
    return found


def padded(batch: list[Review]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, LONGEST] and labels [B]."""
    ids = torch.full((len(batch), LONGEST), PAD)
    for row, (words, _) in zip(ids, batch, strict=True):
        row[: len(words)] = words
    return ids, torch.tensor([label for _, label in batch])


def make_model(opacus: Any, seed: int, recurrent: str = "DPLSTM", padding_idx: int | None = None) -> nn.Module:
    torch.manual_seed(seed)
    return SentimentLSTM(opacus, recurrent, padding_idx)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.02)


def make_loader(seed: int) -> DataLoader[Any]:
    rng = torch.Generator().manual_seed(seed)
    return DataLoader(reviews(48, seed), batch_size=8, collate_fn=padded, generator=rng)


def run(
    opacus: Any,
    *,
    noise_multiplier: float,
    seed: int,
    epochs: int = 2,
    grad_sample_mode: str = "hooks",
    accountant: str = "rdp",
    **architecture: Any,
) -> dict[str, Any]:
    model: Any = make_model(opacus, seed, **architecture)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer: Any = make_optimizer(model)
    criterion: Any = nn.CrossEntropyLoss()
    engine = opacus.PrivacyEngine(accountant=accountant)
    made = engine.make_private(
        module=model,
        optimizer=optimizer,
        criterion=criterion,
        data_loader=make_loader(seed),
        noise_multiplier=noise_multiplier,
        max_grad_norm=MAX_GRAD_NORM,
        grad_sample_mode=grad_sample_mode,
    )
    model, optimizer, loader = made[0], made[1], made[-1]
    if grad_sample_mode == "ghost":
        criterion = made[2]

    losses = []
    for _ in range(epochs):
        for ids, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(ids), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {
        "losses": losses,
        "epsilon": engine.get_epsilon(DELTA) if noise_multiplier else math.inf,
        "initial": initial,
        "parameters": {name: p.detach().clone() for name, p in parameters.items()},
    }
