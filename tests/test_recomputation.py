"""Layers that run again in backward: whose they are, or a refusal."""

import gc
import threading
import weakref

import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastclip

# torch's own, of a checkpoint inside another's first run.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Again(torch.autograd.Function):
    """Checkpointing as another library might write it."""

    @staticmethod
    def forward(ctx, x, run):
        ctx.save_for_backward(x)
        ctx.run = run
        return run(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x)
        torch.autograd.backward(out, g)
        return x.grad, None


class Nested(nn.Module):
    """Blocks of which each one's checkpoint holds all that follow; only the last one trains."""

    def __init__(self, depth, how="reentrant"):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.head, self.how = nn.Linear(4, 1), how
        self.blocks[:-1].requires_grad_(False)

    def run(self, x, i):
        if i == len(self.blocks):
            return x

        def block(y):
            return self.run(torch.tanh(self.blocks[i](y)) + y, i + 1)

        if self.how == "foreign":
            return Again.apply(x, block)
        return checkpoint(block, x, use_reentrant=self.how == "reentrant")

    def forward(self, x):
        return self.head(self.run(x, 0)).square().sum((1, 2))


def inputs(examples, seed=0):
    return torch.randn(examples, 3, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def size(model):
    return oracle.norm(oracle.collect(model))


@pytest.mark.parametrize("strict", [False, True])
def test_recomputation_that_nobody_noted_enters_nothing(strict):
    """Whose it was could only be guessed: of two forwards, or of one whose backward is done."""
    model = Nested(1, "foreign")
    model.head.requires_grad_(False)
    clipper = fastclip.attach(model, 0.5, strict=strict)
    with clipper.units(ids=[0] * 4):
        first = model(inputs(4)).sum()
    with clipper.units(ids=[1, 2, 3, 4]):
        model(inputs(4, 1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="checkpoint with torch"):
            first.backward(retain_graph=True)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("how", ["reentrant", "other"])
def test_a_second_backward_is_refused_whatever_else_is_under_way(how):
    model = Nested(1, how)
    model.head.requires_grad_(False)
    clipper = fastclip.attach(model, 0.5)
    with clipper.units(ids=[0] * 4):
        losses = model(inputs(4))
    with clipper.units(ids=[1, 2, 3, 4]):
        other = model(inputs(4, 1)).sum()
    losses[:2].sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        losses[2:].sum().backward()
    assert size(model) <= 0.5 * (1 + 1e-5)
    model.zero_grad()
    other.backward()
    assert len(clipper.unit_norms) == 4


@pytest.mark.parametrize("depth", [10, 75])
def test_deep_nests_are_one_backward(depth):
    """Autograd recurses 60 deep in a thread and goes on in another: a second pass would clip what is left of each unit."""
    model, x = Nested(depth), inputs(1)
    clipper = fastclip.attach(model, 0.5)
    model(x).sum().backward()
    assert float(clipper.unit_norms[0]) > 0.5
    assert size(model) == pytest.approx(0.5, rel=1e-5)


class Inner(nn.Module):
    """Calls what it is given, a layer of another model, behind its own layer, checkpointed."""

    def __init__(self, reentrant):
        super().__init__()
        self.layer, self.reentrant = nn.Linear(4, 4), reentrant

    def forward(self, x, call):
        return checkpoint(lambda y: call(torch.tanh(self.layer(y))), x, use_reentrant=self.reentrant)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.layer, self.inner = nn.Linear(4, 4), [inner]

    def forward(self, x):
        return self.inner[0](x, self.layer).square().sum((1, 2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_in_what_another_model_checkpoints(reentrant):
    torch.manual_seed(0)
    inner = Inner(reentrant)
    model = Outer(inner)
    fastclip.attach(inner, 0.5, strict=False)
    clipper = fastclip.attach(model, 0.5)
    with clipper.units(ids=[0] * 4):
        first = model(inputs(4)).sum()
    with clipper.units(ids=[1, 2, 3, 4]):
        model(inputs(4, 1))
    first.backward()
    assert len(clipper.unit_norms) == 1
    assert size(model) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("how", ["reentrant", "other", "foreign"])
def test_a_backward_inside_another_forward(how):
    """What runs again there is the earlier forward's, not that of the forward that runs."""

    class Stops(Nested):
        between = None

        def forward(self, x):
            if self.between is not None:
                between, self.between = self.between, None
                between.backward()
            return super().forward(x)

    model = Stops(1, how)
    model.head.requires_grad_(False)
    clipper = fastclip.attach(model, 0.5, strict=False)
    with clipper.units(ids=[0] * 4):
        first = model(inputs(4)).sum()
    model(inputs(4, 2))  # tried, so that the next forward is no trial
    model.between = first
    with clipper.units(ids=[1, 2, 3, 4]):
        if how == "foreign":
            with pytest.raises(RuntimeError, match="checkpoint with torch"):
                model(inputs(4, 1))
            return
        model(inputs(4, 1))
    assert len(clipper.unit_norms) == 1
    assert size(model) <= 0.5 * (1 + 1e-5)


def test_two_threads_in_backwards_through_one_forward():
    """Each would clip its half of a unit's gradient."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.a(x).square().sum((1, 2)), self.b(x).square().sum((1, 2))

    model, both, errors = Halves(), threading.Barrier(2), []
    fastclip.attach(model, 0.1)
    losses = model(inputs(4).detach())
    for loss in losses:
        loss.register_hook(lambda g: (both.wait(30), g)[1])

    def work(loss):
        try:
            loss.sum().backward()
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work, args=(loss,)) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert "second backward" in errors[0]


def test_forwards_are_kept_no_longer_than_their_graphs():
    model = Nested(2)
    clipper = fastclip.attach(model, 0.5)
    seen = []
    for i in range(5):
        loss = model(inputs(4, i)).sum()
        seen.append(weakref.ref(clipper.forwards.last))
        if i % 2:
            loss.backward()
    del loss
    gc.collect()
    assert [ref() is None for ref in seen] == [True] * 4 + [False]
