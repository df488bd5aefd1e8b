"""torch.compile after attach: the same norms and clipped sums, in one graph, whatever the compiler does with its memory."""

import threading
from typing import Any

import oracle
import pytest
import torch
import torch.utils.checkpoint
from compiled_models import Small, check, clean, compiled_family, ids, small_losses, step, with_poison
from families import FAMILIES, Family
from poison import poisoning
from torch import nn
from torch._dynamo.utils import counters

import fastclip
from fastclip.compiled import eagerly
from fastclip.huggingface import causal_lm_losses

# torch's own: what a compiler warns of while it imports, traces and compiles.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:fastclip"),
]

WHOLE = (
    "gpt2",
    "gpt2_padded",
    "gpt2_half_frozen",
    "llama_tied",
    "llama_checkpoint",
    "gpt2_checkpoint_reentrant",
    "roberta_classifier",
    "distilbert_mlm",
    "lora_gpt2",
    "gemma2",
    "opt",
    "bert_mlm",
)
# A class token has no operator.
BROKEN = ("vit",)
REST = tuple(name for name in FAMILIES if name not in WHOLE + BROKEN)


# With users in a fast run two of them: what the graph is made of does not depend on whose examples are whose.
LEVELS = [
    pytest.param(name, level, marks=[pytest.mark.slow] if level == "user" and name not in ("gpt2", "lora_gpt2") else [])
    for name in WHOLE
    for level in ("example", "user")
]


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_a_family_in_one_graph(name, level):
    compiled_family(FAMILIES[name], level, with_poison)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_family_in_several_graphs(name):
    compiled_family(FAMILIES[name], "example", with_poison)
    assert counters["stats"]["unique_graphs"] >= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fastclip runs .* example by example")
@pytest.mark.parametrize("name", REST)
def test_every_other_family(name):
    compiled_family(FAMILIES[name], "example", with_poison)


@pytest.mark.parametrize("name", ["gpt2", "llama_tied"])
def test_inductor(name):
    compiled_family(FAMILIES[name], "example", torch.compile)
    assert counters["stats"]["unique_graphs"] == 1


def test_the_poison_reaches_what_the_tape_holds(monkeypatch):
    """The test of the tests: without its copies the tape is wrong under this backend."""
    monkeypatch.setattr("fastclip.forward.Forward.lending", lambda self, *lent: self)
    with pytest.raises(AssertionError):
        compiled_family(FAMILIES["gpt2"], "example", with_poison)


class Mixed(nn.Module):
    """A layer of each kind that is an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.groups = nn.GroupNorm(2, 8)
        self.instances = nn.InstanceNorm1d(8, affine=True)
        self.rms, self.layer = nn.RMSNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.later = nn.MultiheadAttention(8, 4)  # [T, B, 8]
        self.bag, self.mean = nn.EmbeddingBag(5, 8, mode="sum"), nn.EmbeddingBag(5, 8, padding_idx=1)
        self.flat = nn.EmbeddingBag(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 6, T] -> [B, 3]
        words = (x[:, :, :3].reshape(-1, 18).abs() * 3).long() % 5
        memory = x.mean(2, keepdim=True) * torch.ones(8)  # [B, 6, 8]
        x = self.instances(self.groups(self.conv(x))).mT  # [B, T, 8]
        x = self.layer(self.rms(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        behind = torch.arange(9) > words[:, :1] + 3  # [B, 9]
        last = torch.arange(81).view(9, 9) == 8
        x = x + self.attention(x, x, x, key_padding_mask=behind, attn_mask=last)[0]
        y, weights = self.later(x.transpose(0, 1), *[memory.transpose(0, 1)] * 2)
        z, none = self.later(x.transpose(0, 1), memory.transpose(0, 1), memory.transpose(0, 1) * 2, need_weights=False)
        assert none is None
        bags = self.bag(words, per_sample_weights=words.to(x.dtype)) + self.mean(input=words)
        rest = self.flat(words.flatten(), offsets=torch.arange(len(words)) * 18)
        return self.head(y.mean(0) + z.mean(0) + bags + rest) + weights.max(2).values.sum(1, keepdim=True)


def mixed_losses(model: nn.Module, batch: oracle.Batch) -> torch.Tensor:
    return (model(batch["x"]) * torch.tensor([1.0, -2.0, 3.0])).sum(1)


def mixed_batch(examples: int) -> oracle.Batch:
    return {"x": torch.randn(examples, 6, 9, generator=torch.Generator().manual_seed(examples))}


def test_layers_of_all_kinds():
    torch.manual_seed(0)
    compiled_family(Family("mixed", lambda: (Mixed(), mixed_batch(5), mixed_losses), frozenset()), "user", with_poison)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_batches_of_other_sizes_and_parameters_that_freeze():
    model = Small()
    compiled = torch.compile(model, backend="aot_eager")  # before it is attached
    clipper = fastclip.attach(model, max_grad_norm=0.5)
    for x in (ids(4), ids(7, 1), ids(5, 2, 3), ids(1, 3)):
        step(clipper, compiled, x, 0.5)
    model.embed.requires_grad_(False)
    step(clipper, compiled, ids(4), 0.5)
    model.embed.requires_grad_(True)
    model.head.weight.requires_grad_(False)
    step(clipper, compiled, ids(4), 0.5)
    model.zero_grad()
    clipper.max_grad_norm = 0.25
    step(clipper, compiled, ids(6), 0.25)


def test_an_empty_batch_and_no_gradients():
    model = Small()
    fastclip.attach(model, max_grad_norm=0.5)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(ids(4)).sum().backward()
    model.zero_grad()
    compiled(ids(4)[:0]).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids(4)), clean(model)(ids(4)))


def test_packed_rows():
    model = Small()
    clipper = fastclip.attach(model, max_grad_norm=0.5)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # [1, N] -> [N]
            return (self.rows.head(torch.tanh(self.rows.norm(self.rows.embed(x)))) ** 2).sum((0, 2))

    clipper.detach()
    packed = Packed()
    clipper = fastclip.attach(packed, max_grad_norm=0.5)
    compiled = torch.compile(packed, backend="aot_eager")
    x = ids(1, length=7)
    with clipper.units(offsets=[0, 3, 3, 7]):
        compiled(x).sum().backward()
    found, norms = oracle.collect(packed), clipper.unit_norms
    packed.zero_grad()
    with clipper.units(offsets=[0, 3, 3, 7]):
        packed(x).sum().backward()
    check(found, oracle.collect(packed))
    torch.testing.assert_close(norms, clipper.unit_norms)


def test_gradients_of_inputs_alone_leave_the_tape_empty():
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(x)).square().sum((1, 2))

    model = Rows()
    x = torch.randn(4, 5, 6, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    fastclip.attach(model, max_grad_norm=0.5)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], expected)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError):
        torch.autograd.grad(compiled(x).sum(), model.head.weight)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_second_backward_is_refused():
    model = Small()
    fastclip.attach(model, max_grad_norm=0.5)
    loss = torch.compile(model, backend="aot_eager")(ids(4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_two_forwards_in_one_backward():
    """Each forward's layers are followed by its own tap."""
    model = Small()
    clipper = fastclip.attach(model, max_grad_norm=0.5)
    compiled = torch.compile(model, backend="aot_eager")
    users = torch.tensor([1, 2, 1, 3])
    with clipper.units(ids=users):
        first, second = compiled(ids(4)), compiled(ids(4, 1))
    (first.sum() + second.sum()).backward()
    found = oracle.collect(model)
    both = {"ids": torch.cat([ids(4), ids(4, 1)])}
    units = oracle.unit_gradients(clean(model), small_losses, both, users.repeat(2).tolist())
    check(found, oracle.clipped_sum(units, 0.5))


def test_blocks_that_are_compiled_by_themselves():
    model, batch, loss_fn = FAMILIES["gpt2"].build()
    units = oracle.unit_gradients(model, loss_fn, batch)
    c = oracle.pick_clipping_norm(oracle.norms(units))
    fastclip.attach(model, max_grad_norm=c)
    for block in model.transformer.h:
        block.compile(backend=poisoning(list(model.parameters()), []), fullgraph=True)
    loss_fn(model, batch).sum().backward()
    check(oracle.collect(model), oracle.clipped_sum(units, c))
    assert counters["stats"]["unique_graphs"] >= 1


def test_detaching_gives_the_model_back():
    model = Small()
    clipper = fastclip.attach(model, max_grad_norm=0.5)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(ids(4)).sum().backward()
    clipper.detach()
    model.zero_grad()
    compiled(ids(4)).sum().backward()
    twin = clean(model)
    twin(ids(4)).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_attached_again_the_new_clipper_is_the_one_that_counts():
    model = Small()
    compiled = torch.compile(model, backend="aot_eager")
    for c in (0.5, 0.25, 1e6):
        clipper = fastclip.attach(model, max_grad_norm=c)
        step(clipper, compiled, ids(4), c)
        step(clipper, compiled, ids(5), c)
        clipper.detach()
        model.zero_grad()


def test_writes_in_place_between_layers():
    class Writes(Small):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.embed(ids)
            h *= 2.0
            out = self.head(self.norm(h))
            out += 0.5
            return (out.relu_() ** 2).sum((1, 2))

    torch.manual_seed(0)
    model = Writes()
    units = []
    for x in ids(4):
        twin = Writes().double()
        twin.load_state_dict(model.state_dict())
        ((twin.head(twin.norm(2 * twin.embed(x[None]))) + 0.5).relu() ** 2).sum().backward()
        units.append(oracle.collect(twin))
    c = oracle.pick_clipping_norm(oracle.norms(units))
    fastclip.attach(model, max_grad_norm=c)
    with_poison(model)(ids(4)).sum().backward()
    check(oracle.collect(model), oracle.clipped_sum(units, c))


def test_a_layer_that_is_called_twice_and_dropout():
    class Twice(Small):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.drop = nn.Linear(6, 6), nn.Dropout(0.0)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.embed(ids)
            for _ in range(3):
                h = self.drop(torch.tanh(self.mix(self.norm(h))))
            return (self.head(h) ** 2).sum((1, 2))

    torch.manual_seed(0)
    compiled_family(Family("twice", lambda: (Twice(), {"ids": ids(5)}, small_losses), frozenset()), "user", with_poison)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_calls_on_one_input_are_two(backend):
    """A compiler that takes equal calls for one would leave out the second one's gradient."""

    class Again(Small):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.norm(self.embed(ids)) + self.norm(self.embed(ids))
            h = h + self.attention(h, h, h)[0] + self.attention(h, h, h)[0]
            return (self.head(h) * self.head(h)).sum((1, 2))

    torch.manual_seed(0)
    again = Family("again", lambda: (Again(), {"ids": ids(5)}, small_losses), frozenset())
    compiled_family(again, "example", lambda model: torch.compile(model, backend=backend))
    assert counters["stats"]["unique_graphs"] == 1


def test_other_parameters_than_the_layers_are_refused():
    model = Small()
    fastclip.attach(model, max_grad_norm=0.5)
    model(ids(4)).sum().backward()
    others = {name: p.detach() + 1 for name, p in model.named_parameters()}
    run = torch.compile(lambda x: torch.func.functional_call(model, others, (x,)), backend="aot_eager")
    with pytest.raises(RuntimeError, match="functional_call"):
        run(ids(4)).sum().backward()


def test_compiled_code_outside_its_forward_is_refused():
    model = Small()
    fastclip.attach(model, max_grad_norm=0.5)
    model(ids(4)).sum().backward()
    head = torch.compile(model.head, backend="aot_eager")
    with pytest.raises(RuntimeError, match="outside"):
        head(torch.randn(4, 5, 6)).sum().backward()


def test_another_threads_forward_is_not_taken():
    """The tap of the forward that began last is not this thread's: nothing may be attributed by it."""
    model = Small()
    clipper = fastclip.attach(model, max_grad_norm=0.5)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(ids(4)).sum().backward()
    taps = []
    begin = clipper.forwards.begin

    def begin_and_be_overtaken(forward: Any) -> None:
        begin(forward)
        if not taps:
            taps.append(begin)
            other = threading.Thread(target=lambda: model(ids(4, 1)))
            other.start()
            other.join()

    clipper.forwards.begin = begin_and_be_overtaken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="two threads"):
        compiled(ids(4))


def test_trials_of_two_threads_leave_the_compiler_on():
    """The first to begin is the first to end: what stood before the second is not what to go back to."""
    begun, both, ended = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with eagerly:
            begun.set()
            both.wait(60)
        ended.set()

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait(60)
    with eagerly:
        both.set()
        ended.wait(60)
    thread.join()
    compiled = torch.compile(Small(), backend="aot_eager")
    compiled(ids(4))
    assert counters["stats"]["unique_graphs"] == 1


def test_training_is_the_same():
    """Draws, noise and steps of an optimizer around a compiled model, beside the same without a compiler."""
    found = []
    for compile in (False, True):
        model, batch, _ = FAMILIES["gpt2"].build()
        optimizer = fastclip.DPOptimizer(
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            noise_multiplier=0.5,
            max_grad_norm=0.3,
            expected_batch_size=5,
            module=model,
            seed=3,
        )
        run = torch.compile(model, backend="aot_eager") if compile else model
        for _ in range(2):
            causal_lm_losses(run, {"input_ids": batch["input_ids"]}).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_autocast(backend):
    """bf16 in the graph as without it: layers are traced under the autocast of the forward, and run without."""
    found = []
    for compile in (False, True):
        model, batch, loss_fn = FAMILIES["gpt2"].build()
        clipper = fastclip.attach(model, max_grad_norm=0.3)
        run = torch.compile(model, backend=backend) if compile else model
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = loss_fn(run, batch)
        losses.sum().backward()
        found.append((clipper.unit_norms, oracle.collect(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-2, atol=0)
    size = oracle.norm(found[0][1])
    assert all((found[1][1][name] - grad).norm() <= 1e-2 * size for name, grad in found[0][1].items())
