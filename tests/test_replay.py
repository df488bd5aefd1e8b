"""Checkpointed parts whose rows do not wait: measured, dropped, and formed again for the clipped sum, or a refusal."""

import copy
import gc
import weakref
from contextlib import nullcontext

import families
import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastclip
from fastclip import replay
from fastclip.forward import Replay
from fastclip.tape import PerUnit

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


@pytest.fixture
def short(monkeypatch):
    """As where no memory is left; the numbers of parts that were replayed."""
    found = []
    original = replay.Part.again

    def again(part):
        found.append(part.number)
        return original(part)

    monkeypatch.setattr(replay, "_SHARE", 0.0)
    monkeypatch.setattr(replay.Part, "again", again)
    return found


@pytest.fixture
def trusted(monkeypatch):
    """As if each part had been tried and found alike."""
    monkeypatch.setattr(replay.Part, "_tried", lambda part, slots: True)


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

    for place in (replay, fastclip.module):
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


def test_an_entry_that_comes_later_is_refused(short, trusted, monkeypatch):
    """As it would be if the forward had not shown a use."""
    model = Model()
    model.blocks[2].wide = model.blocks[0].wide
    monkeypatch.setattr(replay.Part, "own", lambda part: set(part.forward.trained))
    refused(model, rows(), "used outside of that part")


class Box:
    def __init__(self, x):
        self.x = x


def two_out(block, x):
    out, other = checkpoint(lambda y: (block(y), y * 2), x, use_reentrant=False)
    return out + other


def half_in_a_box(block, x):
    out, box = checkpoint(lambda y: (block(y), Box(block.narrow.bias * 2)), x, use_reentrant=False)
    return out + box.x


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
        assert p.grad is None or torch.equal(p.grad, q.grad)


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


def test_the_inputs_gradient_alone_replays_nothing(short):
    model, x = Model(), rows().requires_grad_()
    wanted, _ = expected(model, x.detach())
    fastclip.attach(model, C)
    loss = model(x).sum()
    (g,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert not short and all(p.grad is None for p in model.parameters())
    loss.backward()
    assert len(short) == 3 and torch.allclose(g, x.grad, rtol=1e-6)
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
