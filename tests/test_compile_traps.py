"""What would be silently wrong under torch.compile: another forward's units, code that runs twice, what is shared or frozen."""

import oracle
import pytest
import torch
import torch.utils.checkpoint
from compiled_models import Small, check, clean, compiled_family, ids, small_losses, step
from families import FAMILIES, Family
from torch import nn
from torch._dynamo.utils import counters

import fastclip

# torch's own: what a compiler warns of while it imports, traces and compiles.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:fastclip"),
]


def aot_eager(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


class Blocks(nn.Module):
    """Two blocks, of which one is checkpointed and may be compiled by itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 1)
        self.block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, 6] -> [B]
        x = torch.utils.checkpoint.checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        return self.last(x).square().sum((1, 2))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trained", ["all", "block"])
def test_what_is_checkpointed_has_its_own_forwards_units(compiled, reentrant, trained):
    """The first of two forwards, whose examples are all one user's: taken for the second's, that user would count fourfold."""
    model = Blocks(reentrant)
    model.requires_grad_(trained == "all")
    model.block.requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    xs = [torch.randn(4, 3, 6, generator=generator).requires_grad_() for _ in range(2)]
    twin = Blocks(reentrant).double()
    twin.load_state_dict(model.state_dict())
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    twin(xs[0].double()).sum().backward()
    one = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    clipper = fastclip.attach(model, max_grad_norm=0.5)
    if compiled:
        model.block.compile(backend="aot_eager")
    with clipper.units(ids=[0] * 4):
        first = model(xs[0]).sum()
    with clipper.units(ids=[1, 2, 3, 4]):
        second = model(xs[1]).sum()
    first.backward()
    torch.testing.assert_close(clipper.unit_norms.double(), oracle.norms([one]), rtol=1e-5, atol=0)
    check(oracle.collect(model), oracle.clipped_sum([one], 0.5))
    second.backward()
    assert len(clipper.unit_norms) == 4


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(compiled, reentrant):
    model, x = Blocks(reentrant), torch.randn(4, 3, 6)
    users = [0, 1, 0, 2]
    units = oracle.unit_gradients(model, lambda m, batch: m(batch["x"]), {"x": x}, users)
    c = oracle.pick_clipping_norm(oracle.norms(units))
    clipper = fastclip.attach(model, max_grad_norm=c)
    if compiled:
        model.block.compile(backend="aot_eager")
    for _ in range(2):
        with clipper.units(ids=users):
            model(x).sum().backward()
        check(oracle.collect(model), oracle.clipped_sum(units, c))
        model.zero_grad()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_for_given_parameters(compiled):
    model = Small()
    units = oracle.unit_gradients(clean(model), small_losses, {"ids": ids(4)})
    c = oracle.pick_clipping_norm(oracle.norms(units))
    clipper = fastclip.attach(model, max_grad_norm=c)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    run(ids(4)).sum().backward(inputs=list(model.parameters()))
    check(oracle.collect(model), oracle.clipped_sum(units, c))
    model.zero_grad()
    run(ids(4)).sum().backward(inputs=[model.head.weight])
    some = [{"head.weight": unit["head.weight"]} for unit in units]
    torch.testing.assert_close(clipper.unit_norms.double(), oracle.norms(some), rtol=1e-5, atol=0)
    assert model.embed.weight.grad is None


@pytest.mark.parametrize("compiled", [False, True])
def test_parameters_that_freeze_between_forward_and_backward(compiled):
    model = Small()
    fastclip.attach(model, max_grad_norm=0.5)
    loss = (torch.compile(model, backend="aot_eager") if compiled else model)(ids(4)).sum()
    model.head.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()


class Own(nn.Module):
    """What runs its own code, once forward: random numbers, state, writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.factor = nn.Parameter(torch.ones(6)), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x * self.scale * self.factor, 0.5, self.training)


class Shifted(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ids += 2
        return nn.functional.dropout(super().forward(ids), 0.5, self.training)


class Owning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.own, self.head = Shifted(13, 6), Own(), nn.Linear(6, 1, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [B, T] -> [B]
        h = self.embed(ids)
        for i in range(3):
            self.own.factor = float(i + 1)
            h = self.own(h)
        return self.head(h).sum((1, 2))


@pytest.mark.parametrize("compiled", [False, True])
def test_code_of_a_layers_own_runs_once(compiled):
    """The output is linear in each table and scale: its derivative along them, as the forward drew it, is the output."""
    torch.manual_seed(0)
    model = Owning()
    fastclip.attach(model, max_grad_norm=1e9)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    for _ in range(2):
        x = ids(4)
        losses = run(x)
        losses.sum().backward()
        assert torch.equal(x, ids(4) + 2)
        total = losses.sum().double()
        for p, times in ((model.embed.weight, 1), (model.own.scale, 3), (model.head.weight, 1)):
            torch.testing.assert_close((p.double() * p.grad).sum(), times * total, rtol=1e-4, atol=1e-4)
        model.zero_grad()


def test_one_graph_serves_batches_of_every_size():
    model, batch, loss_fn = FAMILIES["gpt2"].build()
    fastclip.attach(model, max_grad_norm=0.5)
    run = torch.compile(model, backend="aot_eager")
    for size in (5, 3, 4, 2, 5, 4):
        loss_fn(run, {name: x[:size] for name, x in batch.items()}).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 2


def test_a_region_that_is_compiled_once_for_several_calls_is_refused():
    class Region(Small):
        @torch.compiler.nested_compile_region
        def block(self, h: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.norm(h))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return (self.head(self.block(self.block(self.embed(ids)))) ** 2).sum((1, 2))

    model = Region()
    fastclip.attach(model, max_grad_norm=0.5)
    with pytest.raises(Exception, match="nested_compile_region"):
        torch.compile(model, backend="aot_eager")(ids(4))


def test_what_torch_compile_made_of_a_model_is_the_model():
    model = Small()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = fastclip.DPOptimizer(
        torch.optim.SGD(compiled.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        expected_batch_size=4,
        module=compiled,
        loss_reduction="sum",
    )
    assert optimizer.clipper.model is model
    step(optimizer.clipper, compiled, ids(4), 0.5)
    optimizer.clipper.detach()
    clipper = fastclip.attach(compiled, max_grad_norm=0.5)
    assert clipper.model is model
    with pytest.raises(ValueError, match="attached already"):
        fastclip.attach(compiled, max_grad_norm=0.5)


class NoBias(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_linear_layer_that_leaves_out_its_bias(compiled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), NoBias(6, 2))
    x = torch.randn(4, 6)
    plain = model(x)
    fastclip.attach(model, 0.5)
    out = (torch.compile(model, backend="aot_eager") if compiled else model)(x)
    torch.testing.assert_close(out, plain)
    out.square().sum().backward()
    assert model[1].bias.grad is None or not model[1].bias.grad.any()


def test_layers_that_are_called_from_code_that_is_not_compiled():
    """Each layer is then a frame of its own, and one frame's code serves several layers."""

    class Loop(Small):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.norm(self.embed(ids))
            for layer in self.more:
                torch._dynamo.graph_break()
                h = torch.tanh(layer(h))
            return (self.head(h) ** 2).sum((1, 2))

    torch.manual_seed(0)
    compiled_family(Family("loop", lambda: (Loop(), {"ids": ids(5)}, small_losses), frozenset()), "user", aot_eager)
