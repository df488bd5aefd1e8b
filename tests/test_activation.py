"""Activations that stand in for a library's own while a clipper is attached."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation

import fastclip
from fastclip.routing import ActivationRoute


class Block(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.into, self.act, self.out = nn.Linear(5, 40), activation, nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.act(self.into(x)))


@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
def test_it_computes_the_same_and_keeps_its_input_alone(kind):
    torch.manual_seed(0)
    model, x = Block(kind()), 3 * torch.randn(4, 6, 5)
    expected = model(x)
    wide = model.act(torch.linspace(-30, 30, 4001, dtype=torch.float64))
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.act(torch.linspace(-30, 30, 4001, dtype=torch.float64)), wide)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model.act(torch.randn(7, 40, requires_grad=True))
    assert len(kept) == 1
    clipper.detach()
    assert "forward" not in model.act.__dict__
    assert torch.equal(model(x), expected)


def test_a_subclass_or_a_patch_keeps_its_own():
    class Shifted(NewGELUActivation):
        def forward(self, input):
            return super().forward(input) + 1

    patched = Block(NewGELUActivation())
    patched.act.forward = lambda input: input
    for model in (Block(Shifted()), patched):
        x = torch.randn(4, 5)
        expected = model(x)
        fastclip.attach(model, max_grad_norm=1.0)
        assert torch.equal(model(x), expected)


def test_copies_are_plain():
    model = Block(NewGELUActivation())
    fastclip.attach(model, max_grad_norm=1.0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not isinstance(twin.act.__dict__.get("forward"), ActivationRoute)
        assert isinstance(twin.act, NewGELUActivation)
