"""Models whose blocks are checkpointed, and what the tests of replayed parts share."""

import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastclip

C = 8.0
UNEVEN = torch.linspace(0.9, 1.1, 6)


class Block(nn.Module):
    def __init__(self, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, width]
        return x + self.narrow(self.drop(torch.tanh(self.wide(self.norm(x)))))


class Model(nn.Module):
    """Blocks, each of them checkpointed. run: how a block is called, checkpointed plainly if None."""

    def __init__(self, depth: int = 3, run=None, dropout: float = 0.0, preserve: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 1)
        self.blocks = nn.ModuleList(Block(dropout=dropout) for _ in range(depth))
        self.run = run or (lambda block, x: checkpoint(block, x, use_reentrant=False, preserve_rng_state=preserve))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = self.run(block, h)
        return self.head(h).square().sum((1, 2))


def rows(examples: int = 5, seed: int = 0) -> torch.Tensor:
    x = torch.randn(examples, 4, 6, generator=torch.Generator().manual_seed(seed))
    x[0] *= 5
    return x


KEPT = pytest.warns(UserWarning, match="its rows are kept")


def expected(model, x, ids=None):
    units = oracle.unit_gradients(model, lambda m, batch: m(batch["x"]), {"x": x}, ids)
    return oracle.clipped_sum(units, C), oracle.norms(units)


def step(model, x, ids=None, **settings):
    clipper = fastclip.attach(model, C, **settings)
    with clipper.units(ids=ids or list(range(len(x)))):
        losses = model(x)
    losses.sum().backward()
    return clipper


def refused(model, x, match, begin=lambda: None, before=lambda: None):
    clipper = fastclip.attach(model, C)
    model(x)  # the trial runs it too
    begin()
    loss = model(x).sum()
    before()
    with pytest.raises(RuntimeError, match=match):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert not clipper.sums._records
    return clipper
