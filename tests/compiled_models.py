"""A small model under torch.compile, and one compiled step beside the oracle."""

from collections.abc import Callable

import oracle
import torch
from families import Family
from poison import poisoning
from torch import nn

import fastclip


def compiled_family(case: Family, level: str, compile: Callable[[nn.Module], nn.Module]) -> None:
    """One compiled step beside the oracle, some units clipped and some not."""
    model, batch, loss_fn = case.build()
    users = case.users if level == "user" else None
    units = oracle.unit_gradients(model, loss_fn, batch, users)
    c = oracle.pick_clipping_norm(oracle.norms(units))
    clipper = fastclip.attach(model, max_grad_norm=c)
    compiled = compile(model)
    if users is None:
        loss_fn(compiled, batch).sum().backward()
    else:
        with clipper.units(ids=torch.tensor(users)):
            loss_fn(compiled, batch).sum().backward()
    torch.testing.assert_close(clipper.unit_norms.double(), oracle.norms(units), rtol=2e-6, atol=0)
    check(oracle.collect(model), oracle.clipped_sum(units, c))


def check(found: oracle.Gradients, expected: oracle.Gradients) -> None:
    size = oracle.norm(expected)
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= oracle.TOLERANCE * size, name


def with_poison(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend=poisoning(list(model.parameters()), []))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [B, T] -> [B]
        return (self.head(torch.tanh(self.norm(self.embed(ids)))) ** 2).sum((1, 2))


def small_losses(model: nn.Module, batch: oracle.Batch) -> torch.Tensor:
    return model(batch["ids"])


def ids(examples: int, seed: int = 0, length: int = 5) -> torch.Tensor:
    return torch.randint(11, (examples, length), generator=torch.Generator().manual_seed(seed))


def step(clipper: fastclip.Clipper, compiled: nn.Module, x: torch.Tensor, c: float) -> None:
    """A backward of one more batch, beside the oracle."""
    model = clipper.model
    units = oracle.unit_gradients(clean(model), small_losses, {"ids": x})
    model.zero_grad()
    compiled(x).sum().backward()
    check(oracle.collect(model), oracle.clipped_sum(units, c))


def clean(model: nn.Module) -> nn.Module:
    twin = Small()
    twin.load_state_dict(model.state_dict())
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    return twin
