"""Checkpointed parts whose rows do not wait: measured, dropped, and formed again for the clipped sum."""

import copy

import families
import oracle
import pytest
import torch
from checkpointed import C, Model, expected, rows, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastclip
from fastclip import replay


class Box:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize("ids", [None, [4, 1, 4, 7, 1]])
def test_it_is_the_oracles_sum_and_that_of_kept_rows(short, monkeypatch, ids):
    model, x = Model(), rows()
    wanted, norms = expected(model, x, ids)
    assert (norms > C).any() and (norms < C).any()
    clipper = step(model, x, ids)
    assert len(short) == 3
    oracle.assert_gradients(oracle.collect(model), wanted)
    oracle.assert_norms(clipper.unit_norms, norms)
    twin = Model()
    monkeypatch.setattr(replay, "_SHARE", 1.0)
    step(twin, x, ids)
    assert len(short) == 3
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=2 * replay.SLACK, atol=1e-7)


def test_no_more_than_one_part_is_held_at_a_time(short, monkeypatch):
    held = []
    original = replay.settle

    def settle(done):
        original(done)
        held.append({slot[0] for slot in done.entries})
        assert not done.pending

    for place in (replay, fastclip.clipped_sums):
        monkeypatch.setattr(place, "settle", settle)
    model = Model(4)
    model.blocks[2].requires_grad_(False)
    step(model, rows())
    inside = {p for block in model.blocks for p in block.parameters()}
    assert len(held) > 3 and all(not (entries & inside) for entries in held)


@pytest.mark.parametrize("name", ["gpt2_padded", "roberta_classifier", "llama_padded", "lora_gpt2", "t5", "vit"])
@pytest.mark.filterwarnings("ignore:fastclip runs .* example by example")
def test_families(short, name):
    """T5's layers share the first one's position bias, which is given back with a gradient of its own."""
    family = families.FAMILIES[name]
    model, batch, loss = family.build()
    units = oracle.unit_gradients(model, loss, batch, family.users)
    limit = oracle.pick_clipping_norm(oracle.norms(units))
    families.checkpoint(model, reentrant=False)
    clipper = fastclip.attach(model, limit)
    with clipper.units(ids=list(family.users)):
        losses = loss(model, batch)
    losses.sum().backward()
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, limit))
    assert short or name == "t5"


def test_sums_of_several_backwards_add_up(short):
    model, x, y = Model(), rows(), rows(3, 1)
    total = {name: g + expected(model, y)[0][name] for name, g in expected(model, x)[0].items()}
    clipper = fastclip.attach(model, C)
    for first, part in ((0, x), (5, y)):
        with clipper.units(ids=range(first, first + len(part))):
            losses = model(part)
        losses.sum().backward()
    assert len(short) == 6
    oracle.assert_gradients(oracle.collect(model), total)


def test_dropout_is_the_same_again(short):
    model, x = Model(dropout=0.5), rows()
    torch.manual_seed(3)
    step(model, x)
    found = oracle.collect(model)
    assert len(short) == 3
    twin = Model(dropout=0.5, run=lambda block, x: block(x))
    torch.manual_seed(3)
    step(twin, x)
    for name, g in oracle.collect(twin).items():
        assert torch.allclose(found[name], g, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("kind", ["two layers", "in and out", "twice a part", "frozen"])
def test_parameters_of_several_parts(short, kind):
    """Those that another part uses too, or what lies outside, keep their rows."""
    model = Model()
    if kind == "two layers":
        model.blocks[2].wide = model.blocks[0].wide
    elif kind == "in and out":
        model.first = model.blocks[1].square = nn.Linear(6, 6)
        model.run = lambda block, x: checkpoint(
            lambda y: block(block.square(y) if hasattr(block, "square") else y), x, use_reentrant=False
        )
    elif kind == "twice a part":
        model.run = lambda block, x: checkpoint(lambda y: block(block(y)), x, use_reentrant=False)
    else:
        model.blocks[1].requires_grad_(False)
    wanted, norms = expected(model, rows())
    clipper = step(model, rows())
    oracle.assert_gradients(oracle.collect(model), wanted)
    oracle.assert_norms(clipper.unit_norms, norms)
    assert len(short) == (2 if kind == "frozen" else 3)


def nested(block, x):
    return checkpoint(lambda y: checkpoint(block, y, use_reentrant=False) + y, x, use_reentrant=False)


LEAF = torch.ones(6, requires_grad=True)


def beside(block, x):
    return checkpoint(lambda y: block(y) * LEAF, x, use_reentrant=False)


def by_closure(block, x):
    return checkpoint(lambda y: block(y) + x, x, use_reentrant=False)


def of_one_node(block, x):
    one, other = torch.cat([x, x * 2], -1).chunk(2, -1)
    return checkpoint(lambda y: block(y) * torch.tanh(other), one, use_reentrant=False)


def reversed_behind(block, x):
    out = checkpoint(block, x, use_reentrant=False)
    if out.requires_grad:
        out.register_hook(lambda g: -0.5 * g)
    return out


SEEN = {
    "beside": beside,
    "by closure": by_closure,
    "of one node": of_one_node,
    "reversed behind": reversed_behind,
    "in a box": lambda block, x: checkpoint(lambda box: block(box.x), Box(x), use_reentrant=False),
    "out of a box": lambda block, x: checkpoint(lambda y: Box(block(y)), x, use_reentrant=False).x,
    "nested": nested,
    "tuple": lambda block, x: checkpoint(
        lambda pair, scale=1: block(pair[0]) * scale, (x, None), use_reentrant=False, scale=2
    ),
    "changed behind it": lambda block, x: checkpoint(block, x, use_reentrant=False).mul_(2),
    "a view": lambda block, x: checkpoint(lambda y: block(y)[:, :2], x, use_reentrant=False),
}


@pytest.mark.parametrize("how", SEEN)
def test_what_is_seen_is_replayed(short, how):
    model = Model(run=SEEN[how])
    wanted, norms = expected(model, rows())
    x = rows().requires_grad_()
    clipper = step(model, x)
    oracle.assert_gradients(oracle.collect(model), wanted)
    oracle.assert_norms(clipper.unit_norms, norms)
    assert len(short) == (0 if how == "out of a box" else 3)
    y = rows().requires_grad_()
    clipper.detach()
    model(y).sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-5, atol=1e-5)  # once, not twice


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


def test_another_models_gradients_are_its_own(short):
    """A part may know what that model gave by another way than its argument."""
    model, before = Model(run=by_closure), Shift()
    both = nn.Sequential(copy.deepcopy(before), copy.deepcopy(model))
    both[1].run = by_closure
    fastclip.attach(both, 1e6)
    both(rows()).sum().backward()
    short.clear()
    fastclip.attach(before, 1e6), fastclip.attach(model, 1e6)
    model(before(rows())).sum().backward()
    assert len(short) == 3
    assert torch.allclose(before.shift.grad, both[0].shift.grad, rtol=1e-4)


def test_an_earlier_forward_gets_nothing(short):
    """`inputs=` leaves its parameters out, and the replay may not bring them in."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc, self.dec = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, second=False):
            if not second:
                return self.enc(x)
            return checkpoint(lambda y: torch.tanh(self.dec(y)) + x, x, use_reentrant=False)

    model = Two()
    clipper = fastclip.attach(model, 1.0)
    with clipper.units(ids=[0]):
        h = model(10 * rows(1))
        loss = model(h, second=True).square().sum()
    loss.backward(inputs=list(model.dec.parameters()))
    assert model.enc.weight.grad is None
    assert oracle.norm(oracle.collect(model)) <= 1 + 1e-5


def test_two_forwards_in_one_backward_keep_their_rows(short):
    model, x = Model(), rows()
    clipper = fastclip.attach(model, C)
    with clipper.units(ids=range(5)):
        (model(x) - 0.5 * model(x.flip(1) * 0.9)).sum().backward()
    found = oracle.collect(model)
    units = oracle.unit_gradients(Model(), lambda m, b: m(b["x"]) - 0.5 * m(b["x"].flip(1) * 0.9), {"x": x})
    oracle.assert_gradients(found, oracle.clipped_sum(units, C))
    assert not short


def test_one_tensor_given_three_times(short):
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mha, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 1)

        def forward(self, x):
            h = checkpoint(self.mha, x, x, x, need_weights=False, use_reentrant=False)[0]
            return self.head(h).square().sum((1, 2))

    model = Attends()
    wanted, _ = expected(model, rows())
    step(model, rows())
    oracle.assert_gradients(oracle.collect(model), wanted)
    assert len(short) == 1


def test_gradients_inside_the_forward(short):
    """They come before all uses are known."""

    class Looks(Model):
        def forward(self, x):
            first = super().forward(x)
            if torch.is_grad_enabled() and x.requires_grad:
                torch.autograd.grad(first.sum(), x, retain_graph=True)
            return first + super().forward(0.5 * x)

    model = Looks()
    wanted, _ = expected(model, rows())
    step(model, rows().requires_grad_())
    oracle.assert_gradients(oracle.collect(model), wanted)


def test_some_parameters_alone(short):
    model = Model()
    fastclip.attach(model, 1e6)
    bias = model.blocks[0].norm.bias
    model(rows()).sum().backward(inputs=[bias])
    twin = Model()
    twin(rows()).sum().backward()
    assert torch.allclose(bias.grad, twin.blocks[0].norm.bias.grad, rtol=1e-4)
    assert [p.grad is None for p in model.parameters()].count(False) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_used_in_compiled_code_too(short):
    model = Model()
    compiled = torch.compile(model.blocks[1], backend="eager")
    model.run = lambda block, x: checkpoint(block, compiled(x) if block is model.blocks[1] else x, use_reentrant=False)
    step(model, rows())
    found = oracle.collect(model)
    plain = Model()
    plain.run = lambda block, x: block(block(x)) if block is plain.blocks[1] else block(x)
    units = [
        oracle.plain_gradients(plain, lambda m, b: run_plain(m, b["x"]), {"x": rows()[i : i + 1]}) for i in range(5)
    ]
    oracle.assert_gradients(found, oracle.clipped_sum(units, C))
    assert len(short) == 2


def run_plain(model, x):
    h = model.first(x)
    for i, block in enumerate(model.blocks):
        h = block(block(h)) if i == 1 else block(h)
    return model.head(h).square().sum((1, 2))


def test_autocast(short, monkeypatch):
    model, x = Model(), rows()
    twin = copy.deepcopy(model)
    for copied, share in ((model, 0.0), (twin, 1.0)):
        monkeypatch.setattr(replay, "_SHARE", share)
        fastclip.attach(copied, C)
        with torch.autocast("cpu", torch.bfloat16):
            losses = copied(x)
        losses.sum().backward()
        assert len(short) == 3
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=2 * replay.SLACK, atol=1e-6)


def test_not_finite(short):
    """The unit's rows reach nobody, and being NaN twice is being the same."""
    model, x = Model(), rows()
    x[1, 2, 3] = float("nan")
    keep = [0, 2, 3, 4]
    wanted, _ = expected(model, x[keep])
    clipper = step(model, rows())
    model.zero_grad()
    short.clear()
    with clipper.units(ids=range(5)):
        losses = model(x)
    losses.sum().backward()
    assert clipper.nonfinite_units == 1 and len(short) == 3
    oracle.assert_gradients(oracle.collect(model), wanted)


@pytest.mark.parametrize("first", [True, False])
def test_an_empty_batch(short, monkeypatch, first):
    """Also where the gradients to come are more than all that is free."""
    monkeypatch.setattr(replay, "free_memory", lambda device: 0.0)
    monkeypatch.setattr(replay, "_SHARE", 1.0)
    model = Model()
    clipper = fastclip.attach(model, C)
    model(rows()).sum().backward()
    assert len(short) == 3
    if first:
        clipper.replayable.clear()
    model.zero_grad()
    model(rows()[:0]).sum().backward()
    assert not oracle.norm(oracle.collect(model))


def test_the_inputs_gradient_alone_replays_nothing(short):
    model, x = Model(), rows().requires_grad_()
    wanted, _ = expected(model, x.detach())
    fastclip.attach(model, C)
    loss = model(x).sum()
    (g,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert not short and all(p.grad is None for p in model.parameters())
    loss.backward()
    assert len(short) == 3
    # Elements that cancel are off by as much as others.
    assert float((g - x.grad).abs().max()) <= 2e-7 * float(g.abs().max())
    oracle.assert_gradients(oracle.collect(model), wanted)


def test_a_second_backward_is_refused(short):
    model, x = Model(), rows()
    fastclip.attach(model, C)
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    before = oracle.collect(model)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    oracle.assert_gradients(oracle.collect(model), before)
