"""Checkpointed parts that cannot run again as they did: their rows are kept, or the backward is refused; and what is freed."""

import gc
import weakref
from contextlib import nullcontext

import oracle
import pytest
import torch
from checkpointed import KEPT, UNEVEN, C, Model, expected, refused, rows, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastclip
from fastclip import replay
from fastclip.forward import Replay
from fastclip.tape import PerUnit


def test_generators_that_are_not_kept_are_refused(short, trusted):
    refused(Model(dropout=0.5, preserve=False), rows(), "did not do the same")


@pytest.mark.parametrize("how", ["value", "shape", "history", "layers"])
def test_what_differs_when_it_runs_again_is_refused(short, trusted, how):
    runs = dict.fromkeys(range(3), -100)  # not in the trial

    def call(block, i, x):
        runs[i] += 1
        if runs[i] < 3:
            return block(x)
        if how == "value":
            return block(x * UNEVEN)
        if how == "shape":
            return block(x)[:, :2]
        return block(x).detach() if how == "history" else x + 0 * x

    model = Model()
    model.run = lambda block, x: checkpoint(call, block, list(model.blocks).index(block), x, use_reentrant=False)
    refused(model, rows(), "did not do the same", begin=lambda: runs.update(dict.fromkeys(runs, 0)))
    wanted, _ = expected(Model(), rows())
    runs.update(dict.fromkeys(runs, -1))
    model(rows()).sum().backward()
    oracle.assert_gradients(oracle.collect(model), wanted)


@pytest.mark.parametrize("by, refuses", [(1.5e-6, False), (-1.5e-6, False), (1e-4, True), (-1e-4, True)])
def test_where_sums_have_no_order_the_bound_has_room(short, trusted, monkeypatch, by, refuses):
    """What lies within SLACK is no more than C, and what does not is refused."""
    original = replay.Part.again

    def again(part):
        slots = original(part)
        return {slot: [PerUnit((1 + by) * e.per_unit(slot[0].shape)) for e in of] for slot, of in slots.items()}

    monkeypatch.setattr(replay.Part, "again", again)
    model = Model(1)
    for layer in (model.first, model.head):
        layer.requires_grad_(False)
    if refuses:
        refused(model, rows(1), "did not do the same")
    else:
        step(model, rows(1))
        size = oracle.norm(oracle.collect(model))
        assert C * (1 - 2e-5) <= size <= C * (1 + 1e-6)


def test_a_later_sum_is_forgotten_with_the_rest(short, monkeypatch):
    """Half a sum is no sum: what waited from an earlier backward goes too."""
    model, x = Model(), rows()
    clipper = fastclip.attach(model, C)
    model(x).sum().backward()
    with clipper.units(ids=range(10, 15)):
        loss = model(x).sum()
    monkeypatch.setattr(replay, "SLACK", -1.0)
    with pytest.raises(RuntimeError, match="did not do the same"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_changed_inputs_are_refused(short, trusted):
    kept = {}

    def run(block, x):
        kept["bias"] = torch.zeros(6)
        return checkpoint(lambda y, b: block(y + b), x, b=kept["bias"], use_reentrant=False)

    refused(Model(1, run), rows(), "changed in place", before=lambda: kept["bias"].add_(1))


def test_an_entry_that_comes_later_is_refused(short, trusted, monkeypatch):
    """As it would be if the forward had not shown a use."""
    model = Model()
    model.blocks[2].wide = model.blocks[0].wide
    monkeypatch.setattr(replay.Part, "own", lambda part: set(part.forward.trained))
    refused(model, rows(), "used outside of that part")


def two_out(block, x):
    out, other = checkpoint(lambda y: (block(y), y * 2), x, use_reentrant=False)
    return out + other


def stashed(block, x):
    """A part of the loss that leaves the part by another way."""

    def run(y):
        block.stash = block.wide(block.norm(y))
        return y + block.narrow(torch.tanh(block.stash))

    out = checkpoint(run, x, use_reentrant=False)
    return out + block.stash.sum(-1, keepdim=True)


def reversed_inside(block, x):
    def run(y):
        out = block(y)
        if out.requires_grad:
            out.register_hook(lambda g: -g)
        return out

    return checkpoint(run, x, use_reentrant=False)


def saved_in_bf16(block, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda y: (y.bfloat16(), y.dtype), lambda y: y[0].to(y[1])):
        return checkpoint(block, x, use_reentrant=False)


KEEPS = {
    "two out": two_out,
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "stashed": stashed,
    "reversed inside": reversed_inside,
    "saved in bf16": saved_in_bf16,
    "nested reentrant": lambda block, x: checkpoint(
        lambda y: checkpoint(block, y, use_reentrant=True), x, use_reentrant=False
    ),
}
WARNS = ("stashed", "reversed inside", "nested reentrant")


@pytest.mark.parametrize("how", KEEPS)
def test_what_cannot_run_again_alone_keeps_its_rows(short, how):
    twin, model = Model(run=KEEPS[how]), Model(run=KEEPS[how])
    short_share, replay._SHARE = replay._SHARE, 1.0
    step(twin, rows())
    replay._SHARE = short_share
    with KEPT if how in WARNS else nullcontext():
        step(model, rows())
    assert not short
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_what_differs_in_the_trial_keeps_its_rows(short):
    runs = dict.fromkeys(range(3), -100)

    def call(block, i, x):
        runs[i] += 1
        return block(x) if runs[i] != 3 else block(x * UNEVEN)

    model = Model()
    model.run = lambda block, x: checkpoint(call, block, list(model.blocks).index(block), x, use_reentrant=False)
    wanted, _ = expected(Model(), rows())
    fastclip.attach(model, C)
    model(rows())
    runs.update(dict.fromkeys(runs, 0))
    with KEPT:
        model(rows()).sum().backward()
    oracle.assert_gradients(oracle.collect(model), wanted)
    assert not short
    model.zero_grad()
    model(rows()).sum().backward()
    assert not short  # for good


class Reversing(Model):
    """Turns a block's gradient round from inside once it is told to, which a second run does twice."""

    turned = True

    def forward(self, x):
        def run(y):
            out = self.blocks[0](y)
            if self.turned and out.requires_grad:
                out.register_hook(lambda g: -g)
            return out

        return self.head(checkpoint(run, self.first(x), use_reentrant=False)).square().sum((1, 2))


@pytest.mark.parametrize("first", ["zero", "nan", "inf", "not yet"])
def test_a_trial_that_says_nothing_is_no_trial(short, first):
    model, twin = Reversing(1), Reversing(1)
    fastclip.attach(model, C)
    if first == "not yet":
        model.turned = False
        model(rows()).sum().backward()
        assert len(short) == 1
        model.turned = True
        model.zero_grad()
        with pytest.raises(RuntimeError, match="kept from now on"):
            model(rows()).sum().backward()
        assert all(p.grad is None for p in model.parameters())
    elif first == "nan":
        model(rows() * float("nan")).sum().backward()
    else:
        (model(rows()).sum() * {"zero": 0.0, "inf": float("inf")}[first]).backward()
    model.zero_grad()
    with nullcontext() if first == "not yet" else KEPT:
        model(rows()).sum().backward()
    replay._SHARE = 1.0
    fastclip.attach(twin, C)
    twin(rows()).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("by, keeps", [(1e-7, False), (1e-4, True)])
def test_a_trial_refuses_what_the_replay_would(short, by, keeps):
    """Noise in all gradients of a part: what is beyond the slack keeps its rows instead of being refused each time."""
    generator, noise = torch.Generator().manual_seed(0), [0.0]  # none in the trial of the model

    def run(block, x):
        def noisy(y):
            h = block.norm(y)
            if h.requires_grad:
                h.register_hook(lambda g: g * (1 + noise[0] * torch.randn(g.shape, generator=generator)))
            h = block.wide(h)
            if h.requires_grad:
                h.register_hook(lambda g: g * (1 + noise[0] * torch.randn(g.shape, generator=generator)))
            return y + block.narrow(torch.tanh(h))

        return checkpoint(noisy, x, use_reentrant=False)

    model = Model(run=run)
    fastclip.attach(model, C)
    model(rows())
    noise[0] = by
    with KEPT if keeps else nullcontext():
        for _ in range(3):
            model.zero_grad()
            model(rows()).sum().backward()
    assert len(short) == (0 if keeps else 9)


def test_memory_that_ends_in_the_trial_says_nothing(short, monkeypatch):
    original, failures = replay.Part._run_again, [torch.OutOfMemoryError("once")]

    def run_again(part, slots):
        if failures:
            raise failures.pop()
        return original(part, slots)

    monkeypatch.setattr(replay.Part, "_run_again", run_again)
    model = Model()
    clipper = step(model, rows())
    assert len(short) == 2 and clipper.replayable == {1: True, 2: True}
    model.zero_grad()
    model(rows()).sum().backward()
    assert len(short) == 5


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_stays_in_memory(short, monkeypatch, backward):
    model, alive = Model(), []
    fastclip.attach(model, C)
    for kind in (replay.Part, Replay):
        original = kind.__init__

        def init(made, *args, original=original):
            original(made, *args)
            alive.append(weakref.ref(made))

        monkeypatch.setattr(kind, "__init__", init)
    loss = model(rows()[:, :2]).sum()  # short, so that entries are rows with a history
    if backward:
        loss.backward()
    del loss
    gc.collect()
    assert len(alive) == (9 if backward else 3) and not [x for x in alive if x() is not None]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_inputs_are_given_back_while_the_graph_lives(monkeypatch, share):
    inputs = []

    def run(block, x):
        y = x.clone()
        inputs.append(weakref.ref(y.untyped_storage()))
        return checkpoint(block, y, use_reentrant=False)

    model = Model()
    fastclip.attach(model, C)
    model(rows())
    model.run = run
    monkeypatch.setattr(replay, "_SHARE", share)
    loss = model(rows()).sum()
    loss.backward()
    gc.collect()
    assert len(inputs) == 3 and not [x for x in inputs if x() is not None] and loss.grad_fn is not None


@pytest.mark.parametrize("kind", ["frozen", "one block", "plain", "not wanted"])
def test_functions_that_know_their_result_are_freed(short, kind):
    """The graph may not keep a part that keeps the function that knows the graph."""
    alive = []

    class Loops(Model):
        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = checkpoint(lambda y, block=block: block(y).to(x.dtype), x, use_reentrant=False)  # noqa: B023
                alive.append(weakref.ref(x.untyped_storage()))
            return self.head(x).square().sum((1, 2))

    model = Loops()
    if kind == "frozen":
        model.blocks.requires_grad_(False)
    if kind == "one block":
        model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    fastclip.attach(model, C)
    model(rows()).sum().backward()
    alive.clear()
    for _ in range(2):
        loss = model(rows(seed=1)).sum()
        model.zero_grad()
        loss.backward(inputs=[model.first.weight] if kind == "not wanted" else None)
    del loss
    gc.collect()
    assert len(alive) == 6 and not [x for x in alive if x() is not None]


def test_opacus_face_keeps_its_entries(short):
    from fastclip.opacus import GradSampleModule

    model = GradSampleModule(Model())
    model(rows()).sum().backward()
    assert not short and model._module.head.weight.grad_sample.shape == (5, 1, 6)
