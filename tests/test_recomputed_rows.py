"""Rows that run one by one, taps, passes and interrupts: whose a layer is that runs again."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import oracle
import pytest
import torch
from test_recomputation import Again
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastclip
from fastclip import recomputation

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.filterwarnings("ignore:fastclip runs .* example by example"),
]
C = 0.1
CHILDREN = {
    "linear": lambda: nn.Linear(6, 6),
    "layer_norm": lambda: nn.LayerNorm(6),
    "rms_norm": lambda: nn.RMSNorm(6),
    "two": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)),
}


class Block(nn.Module):
    """A matrix on flattened rows, so that it runs row by row, and a child on them that runs again in backward."""

    def __init__(self, child: nn.Module, how: str) -> None:
        super().__init__()
        self.matrix, self.child, self.how = nn.Parameter(torch.randn(6, 6) / 3), child, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, 6]
        h = x.reshape(-1, 6) @ self.matrix
        again = partial(checkpoint, self.child, use_reentrant=self.how == "reentrant")
        h = again(h) if self.how in ("reentrant", "other") else self.child(h)
        return x + torch.tanh(h).view_as(x)


class ByRow(nn.Module):
    def __init__(self, child: str, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.head = nn.Linear(6, 6), Block(CHILDREN[child](), how), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.first(x))).square().sum((1, 2))


def rows(examples: int, seed: int = 0, width: int = 4) -> torch.Tensor:
    x = torch.randn(examples, 4, width, generator=torch.Generator().manual_seed(seed))
    x[0] *= 20
    return x.requires_grad_()


def losses(model: nn.Module, batch: oracle.Batch) -> torch.Tensor:
    return model(batch["x"])


@pytest.mark.parametrize("how", ["plain", "reentrant", "other", "compiled", "both"])
@pytest.mark.parametrize("child", CHILDREN)
@pytest.mark.filterwarnings("ignore")
def test_rows_one_by_one(child: str, how: str) -> None:
    """Four examples of four rows: a row's rows were once shared out among all examples, 9 C for one of them."""
    torch._dynamo.reset()
    x = rows(4, width=6)
    units = oracle.unit_gradients(ByRow(child, "plain"), losses, {"x": x})
    model = ByRow(child, {"both": "reentrant"}.get(how, how))
    clipper = fastclip.attach(model, C)
    if how in ("compiled", "both"):
        model.block.child.compile(backend="aot_eager")
    model(x).sum().backward()
    oracle.assert_norms(clipper.unit_norms, oracle.norms(units))
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, C))


class Deep(nn.Module):
    """Checkpoints in each other around one layer that trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.block = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
        nn.init.zeros_(self.frozen.weight)

    def run(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        if not depth:
            return self.block(x)
        return checkpoint(lambda y: self.run(torch.tanh(self.frozen(y)) + y, depth - 1), x, use_reentrant=True)

    def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        return self.run(x, depth).square().sum((1, 2))


@pytest.mark.parametrize("depths", [(1, 70), (70, 1), (70, 70), (10, 1)])
def test_one_backward_in_two_threads(depths: tuple[int, int]) -> None:
    """60 deep autograd takes a thread of its own, and a user of both forwards was clipped twice."""
    model = Deep()
    clipper = fastclip.attach(model, C)
    with clipper.units(ids=[7]):
        total = sum(model(rows(1), depth).sum() for depth in depths)
    total.backward()
    assert oracle.norm(oracle.collect(model)) <= C * (1 + 1e-5)


class Stored(torch.autograd.Function):
    """Backward of a graph that forward kept."""

    @staticmethod
    def forward(ctx, x, run):
        ctx.x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.out = run(ctx.x)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, g):
        ctx.out.backward(g)
        return ctx.x.grad, None


def test_a_thread_that_nobody_noted() -> None:
    class Model(Deep):
        def run(self, x, depth):
            return Stored.apply(x, lambda y: self.run(y * 1.0, depth - 1)) if depth else self.block(x)

    model = Model()
    clipper = fastclip.attach(model, C, strict=False)
    with clipper.units(ids=[7]):
        total = model(rows(1), 1).sum() + model(rows(1), 70).sum()
    with pytest.raises(RuntimeError, match="a thread that Python did not start"):
        total.backward()


class Between(nn.Module):
    """A forward whose code calls backward for an earlier loss, and layers that a library runs again."""

    between: torch.Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.between is not None:
            loss, self.between = self.between, None
            loss.backward()
        return Again.apply(x, lambda y: checkpoint(self.layer, y, use_reentrant=True)).square().sum((1, 2))


def test_a_checkpoint_inside_what_nobody_noted() -> None:
    """It belonged to the forward that ran: one user's four examples were four units, 3.3 C."""
    model = Between()
    clipper = fastclip.attach(model, C, strict=False)
    with clipper.units(ids=[0] * 4):
        first = model(rows(4)).sum()
    model(rows(4, 2))
    model.between = first
    with clipper.units(ids=[1, 2, 3, 4]), pytest.raises(RuntimeError, match="whose forward it was"):
        model(rows(4, 1))


class Inner(nn.Module):
    """A checkpoint inside another one, in front of a layer."""

    def __init__(self, outer: bool, inner: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.outer, self.inner = outer, inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def both(y: torch.Tensor) -> torch.Tensor:
            return self.b(checkpoint(self.a, y, use_reentrant=self.inner))

        return checkpoint(both, x, use_reentrant=self.outer).square().sum((1, 2))


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_behind_an_inner_checkpoint(outer: bool, inner: bool) -> None:
    torch._dynamo.reset()
    model = Inner(outer, inner)
    units = [oracle.unit_gradients(Inner(True, True), losses, {"x": rows(4, i)}) for i in range(2)]
    clipper = fastclip.attach(model, C)
    model.a.compile(backend="aot_eager")
    model.b.compile(backend="aot_eager")
    totals = [model(rows(4, i)).sum() for i in range(2)]
    for total, own in zip(totals, units, strict=True):
        total.backward()
        oracle.assert_norms(clipper.unit_norms, oracle.norms(own))


class Fills(nn.Module):
    """Makes constants behind what selective checkpointing keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.b(torch.tanh(self.a(x * torch.full((4,), 0.5))) * 2.0))
        return torch.sin(y * torch.full((4,), 3.0)) + torch.full((4,), 1.0) + torch.full((4,), 2.0)


class Selective(nn.Module):
    def __init__(self, kept: list[object] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.head, self.kept = nn.Linear(4, 4), Fills(), nn.Linear(4, 1), kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        contexts = partial(create_selective_checkpoint_contexts, self._policy)
        y = self.block(x) if self.kept is None else checkpoint(self.block, x, use_reentrant=False, context_fn=contexts)
        return self.head(y).square().sum((1, 2))

    def _policy(self, ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in (self.kept or []) else CheckpointPolicy.PREFER_RECOMPUTE


ATEN = torch.ops.aten


@pytest.mark.parametrize("kept", [[ATEN.mm.default, ATEN.addmm.default], [ATEN.full.default], [ATEN.tanh.default]])
def test_selective_checkpointing(kept: list[object]) -> None:
    """The taps counted among the operations whose results it keeps: sums were off by 13 %."""
    x = rows(4)
    units = oracle.unit_gradients(Selective(None), losses, {"x": x})
    model = Selective(kept)
    fastclip.attach(model, C)
    model(x).sum().backward()
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, C))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.filterwarnings("ignore")
def test_compressed_taps(dtype: torch.dtype) -> None:
    """Rounded, the number of a forward became another's, whose units were taken: 2.2 C for one user."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    clipper = fastclip.attach(model, C)
    run = torch.compile(model, backend="aot_eager")
    params = {p.data_ptr() for p in model.parameters()}

    def pack(x: torch.Tensor) -> object:
        kept = x.data_ptr() in params or not x.is_floating_point()
        return x if kept else (x.dtype, x.to(dtype))

    def unpack(y: object) -> torch.Tensor:
        return y if isinstance(y, torch.Tensor) else y[1].to(y[0])

    for _ in range(300):
        run(rows(4)).sum().backward()
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        with clipper.units(ids=[1, 2, 3, 4]):
            others = run(rows(4)).sum()
        with clipper.units(ids=[9] * 4):
            one = run(rows(4)).sum()
    with pytest.raises(RuntimeError, match="saved_tensors_hooks that compress"):
        one.backward()
    with pytest.raises(RuntimeError, match="saved_tensors_hooks that compress"):
        others.backward()


FILES = {
    str(Path(fastclip.__file__).parent / f"{name}.py") for name in ("routing", "forwards", "backward", "module", "taps")
}
FUNCTIONS = {"_with", "_run", "running", "_keep_together", "_adopt"}  # the rest of recomputation.py holds a lock


@contextmanager
def interrupted(line: int) -> Iterator[Callable[[], int]]:
    """Ctrl-C at the line-th line of fastclip's code inside."""
    seen = 0

    def own(frame) -> bool:
        code = frame.f_code
        if code.co_name == "_finish":  # holds a lock, which tracing can interrupt where signals cannot
            return False
        return code.co_filename in FILES or (code.co_filename == recomputation.__file__ and code.co_name in FUNCTIONS)

    def trace(frame, event, _arg):
        nonlocal seen
        if not own(frame):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: seen
    finally:
        sys.settrace(before)


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layer, x, use_reentrant=True).square().sum((1, 2))


def test_an_interrupt_at_any_line() -> None:
    """What it leaves behind belongs to nobody: the next user's examples are one user's, and their gradient is there."""
    model, x, line = Once(), rows(4), 0
    clipper = fastclip.attach(model, C)
    model(x).sum().backward()
    while True:
        line += 1
        kept = None
        model.zero_grad()
        with interrupted(line) as seen:
            try:
                with clipper.units(ids=[0, 1, 2, 3]):
                    model(x).sum().backward()
            except KeyboardInterrupt as error:
                kept = error  # as notebooks do
            except RuntimeError as error:  # from C++, around the interrupt
                kept = error
        if seen() < line:
            break
        model.zero_grad()
        with nullcontext(kept), clipper.units(ids=[9] * 4):
            model(x).sum().backward()
        assert len(clipper.unit_norms) == 1, line
        assert abs(oracle.norm(oracle.collect(model)) / C - 1) < 1e-5, line
    assert line > 100
