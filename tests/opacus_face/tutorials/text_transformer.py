"""The same reviews through a small transformer encoder whose attention ModuleValidator replaces."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import nn

from opacus_face.tutorials.text_lstm import LONGEST, PAD, VOCAB, make_loader

WIDTH, DELTA, MAX_GRAD_NORM = 12, 1e-3, 0.8


class Block(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, heads, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.expand, self.contract = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:  # [B, T, WIDTH], [B, T]
        y = self.norm1(x)
        x = x + self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]
        return x + self.contract(nn.functional.gelu(self.expand(self.norm2(x))))


class Encoder(nn.Module):
    """`positions`: "expanded" ids [B, T], or "broadcast", one row [1, T] for all examples, as models often have it."""

    def __init__(self, heads: int, depth: int, positions: str) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(Block(heads) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 2)
        self.positions = positions

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [B, T] -> [B, 2]
        padding = ids == PAD
        places = torch.arange(ids.shape[1]).unsqueeze(0)  # [1, T]
        x = self.words(ids) + self.places(places.expand_as(ids) if self.positions == "expanded" else places)
        for block in self.blocks:
            x = block(x, padding)
        return self.head(x.masked_fill(padding.unsqueeze(-1), 0.0).sum(1) / (~padding).sum(1, keepdim=True))


def make_model(opacus: Any, seed: int, heads: int = 1, depth: int = 2, positions: str = "expanded") -> nn.Module:
    validators = import_module(f"{opacus.__name__}.validators")
    torch.manual_seed(seed)
    model = Encoder(heads, depth, positions)
    assert validators.ModuleValidator.validate(model, strict=False)  # it has attention as torch makes it
    model = validators.ModuleValidator.fix(model)
    assert not validators.ModuleValidator.validate(model, strict=True)
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3)


def run(
    opacus: Any,
    *,
    noise_multiplier: float,
    seed: int,
    epochs: int = 1,
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
