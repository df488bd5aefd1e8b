"""Layers that compute something else than their class: a rule must not stand in for them."""

import copy

import pytest
import torch
from oracle import assert_gradients, clipped_sum, collect, norms, pick_clipping_norm, unit_gradients
from torch import nn

import fastclip


class Adapted(nn.Module):
    """A low-rank path beside one layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 2)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x) + self.up(self.down(x))))


class Patched(Adapted):
    """The same, put there by patching the layer's forward, as some adapter libraries do."""

    def patch(self):
        plain = self.inner.forward
        self.inner.forward = lambda x: plain(x) + self.up(self.down(x))

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


class CenteredConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def loss(net, batch):
    return net(batch["x"]).square().flatten(1).sum(1)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_patched_forward(when):
    model, twin = Patched(), Adapted()
    twin.load_state_dict(model.state_dict())
    batch = {"x": torch.randn(5, 4)}
    expected = unit_gradients(twin, loss, batch, range(5))
    clip = pick_clipping_norm(norms(expected))
    if when == "before":
        model.patch()
    fastclip.attach(model, clip)
    if when == "after":
        model.patch()
    torch.testing.assert_close(loss(model, batch), loss(twin, batch))
    loss(model, batch).sum().backward()
    assert_gradients(collect(model), clipped_sum(expected, clip))


def test_an_overridden_helper_of_a_convolution():
    model = nn.Sequential(CenteredConv(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    batch = {"x": torch.randn(5, 3, 6, 6)}
    expected = unit_gradients(copy.deepcopy(model), loss, batch, range(5))
    clip = pick_clipping_norm(norms(expected))
    fastclip.attach(model, clip)
    with pytest.warns(UserWarning, match="CenteredConv example by example"):
        loss(model, batch).sum().backward()
    assert_gradients(collect(model), clipped_sum(expected, clip))


class ShownBias(nn.Module):
    """A head that shows its inner layer's bias as its own; ``late`` uses it by another name than its own."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(4, 3)
        self.bias = self.decoder.bias
        self.late = False
        self.kept = [self.bias]

    def forward(self, x):
        out = self.decoder(x)
        return out + self.kept[0] if self.late else out


def test_a_module_that_only_shows_a_parameter_has_no_copies_of_it(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), ShownBias())
    batch = {"x": torch.randn(5, 4)}
    expected = unit_gradients(copy.deepcopy(model), loss, batch, range(5))
    clip = pick_clipping_norm(norms(expected))
    fastclip.attach(model, clip)
    monkeypatch.setattr("fastclip.routing.run_copies", lambda *_: pytest.fail("copies"))
    loss(model, batch).sum().backward()
    assert_gradients(collect(model), clipped_sum(expected, clip))


@pytest.mark.parametrize("first", [False, True])
def test_a_parameter_that_is_used_unseen_is_refused(first):
    model = nn.Sequential(nn.Linear(4, 4), ShownBias())
    batch = {"x": torch.randn(5, 4)}
    fastclip.attach(model, 1.0)
    if not first:
        loss(model, batch).sum().backward()
    model[1].late = True
    with pytest.raises(RuntimeError, match="does not follow"):
        loss(model, batch).sum().backward()
