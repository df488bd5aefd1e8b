"""Names and the languages they come from: characters, a hidden state handed to the model, padded or packed sequences."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader

LETTERS, LANGUAGES, DELTA, MAX_GRAD_NORM = 27, 3, 1e-3, 1.0
Name = tuple[torch.Tensor, int]
State = tuple[torch.Tensor, torch.Tensor]


class CharClassifier(nn.Module):
    """`layout`: "padded", or packed as "sorted" (batches come longest first) or "unsorted" (in any order)."""

    def __init__(self, opacus: Any, layout: str, layers: int, bidirectional: bool) -> None:
        super().__init__()
        made = import_module(f"{opacus.__name__}.layers")
        self.embedding = nn.Embedding(LETTERS, 6)
        self.lstm = made.DPLSTM(6, 8, num_layers=layers, bidirectional=bidirectional, batch_first=True)
        self.directions = 2 if bidirectional else 1
        self.head = nn.Linear(8 * self.directions, LANGUAGES)
        self.layout = layout

    def init_hidden(self, names: int) -> State:
        shape = (self.lstm.num_layers * self.directions, names, 8)
        return torch.zeros(shape), torch.zeros(shape)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor, hidden: State) -> torch.Tensor:
        x = self.embedding(ids)  # [B, T, 6]
        if self.layout == "padded":
            states, _ = self.lstm(x, hidden)  # [B, T, 8 * directions]
            return self.head(states[torch.arange(len(ids)), lengths - 1])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.layout == "sorted")
        _, (last, _) = self.lstm(packed, hidden)  # [layers * directions, B, 8]
        return self.head(torch.cat(tuple(last[-self.directions :]), dim=1))


def names(count: int, seed: int) -> list[Name]:
    """A language prefers a third of the letters; names have 1 to 9 of them."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        language, length = (int(torch.randint(n, (), generator=rng)) for n in (LANGUAGES, 9))
        weights = torch.ones(LETTERS)
        weights[9 * language : 9 * language + 9] = 5.0
        found.append((torch.multinomial(weights, length + 1, replacement=True, generator=rng), language))
    return found


def longest_first(batch: list[Name]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return as_drawn(sorted(batch, key=lambda name: -len(name[0])))


def as_drawn(batch: list[Name]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(name) for name, _ in batch])
    labels = torch.tensor([language for _, language in batch])
    return pad_sequence([name for name, _ in batch], batch_first=True), lengths, labels


def make_model(
    opacus: Any, seed: int, layout: str = "padded", layers: int = 1, bidirectional: bool = False
) -> CharClassifier:
    torch.manual_seed(seed)
    return CharClassifier(opacus, layout, layers, bidirectional)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=2.0)


def make_loader(seed: int, layout: str = "padded") -> DataLoader[Any]:
    collate: Any = longest_first if layout == "sorted" else as_drawn
    rng = torch.Generator().manual_seed(seed)
    return DataLoader(names(48, seed), batch_size=8, collate_fn=collate, generator=rng)


def run(
    opacus: Any, *, noise_multiplier: float, seed: int, epochs: int = 1, layout: str = "padded", **options: Any
) -> dict[str, Any]:
    mode, accountant = options.pop("grad_sample_mode", "hooks"), options.pop("accountant", "rdp")
    model: Any = make_model(opacus, seed, layout, **options)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    engine = opacus.PrivacyEngine(accountant=accountant)
    made = engine.make_private(
        module=model,
        optimizer=make_optimizer(model),
        criterion=nn.CrossEntropyLoss(),
        data_loader=make_loader(seed, layout),
        noise_multiplier=noise_multiplier,
        max_grad_norm=MAX_GRAD_NORM,
        grad_sample_mode=mode,
    )
    model, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()

    losses = []
    for _ in range(epochs):
        for ids, lengths, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(ids, lengths, model._module.init_hidden(len(ids))), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {
        "losses": losses,
        "epsilon": engine.get_epsilon(DELTA) if noise_multiplier else math.inf,
        "initial": initial,
        "parameters": {name: p.detach().clone() for name, p in parameters.items()},
    }
