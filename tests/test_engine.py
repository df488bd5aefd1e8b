"""What plausible engines get silently wrong: each of these once trained on and was not private."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from oracle import assert_gradients, assert_norms, clipped_sum, collect, norms, pick_clipping_norm, unit_gradients
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fastclip


class Block(nn.Module):
    def __init__(self, size=6):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks under an optional way to run each."""

    def __init__(self, run=None, blocks=3):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(6, 1)
        self.run = run or (lambda block, x: block(x))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = self.run(block, x)
        return self.last(x).squeeze(-1)


def loss_fn(model, batch):
    return model(batch["x"]).square().sum(1)


def batch_of(size=5, length=3, features=4):
    return {"x": torch.randn(size, length, features)}


def expected(model, batch, ids=None, loss=loss_fn):
    size = batch["x"].shape[0]
    grads = unit_gradients(copy.deepcopy(model), loss, batch, ids or list(range(size)), "sum")
    c = pick_clipping_norm(norms(grads))
    return grads, c, clipped_sum(grads, c, "flat")


def test_threads_do_not_mix():
    model, batches = Net(), [batch_of(3), batch_of(4)]
    models = [model, copy.deepcopy(model)]
    wanted = [expected(m, b) for m, b in zip(models, batches, strict=True)]
    clippers = [fastclip.attach(m, w[1]) for m, w in zip(models, wanted, strict=True)]
    barrier, errors = threading.Barrier(2), []

    def work(i):
        try:
            losses = loss_fn(models[i], batches[i])
            barrier.wait()
            losses.sum().backward()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for m, c, (grads, _, total) in zip(models, clippers, wanted, strict=True):
        assert_norms(c.unit_norms, norms(grads))
        assert_gradients(collect(m), total)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nested_checkpointing(reentrant, depth):
    def nested(block, x, left=depth):
        if left == 0:
            return block(x)
        return checkpoint(lambda y: nested(block, y, left - 1), x, use_reentrant=reentrant)

    plain, model = Net(), Net(nested)
    model.load_state_dict(plain.state_dict())
    batch = batch_of()
    grads, c, total = expected(plain, batch)
    clipper = fastclip.attach(model, c)
    loss_fn(model, batch).sum().backward()
    assert_norms(clipper.unit_norms, norms(grads))
    assert_gradients(collect(model), total)


def test_all_layers_under_one_reentrant_checkpoint():
    model, batch = Net(), batch_of()
    grads, c, total = expected(model, batch)
    whole = nn.Sequential(nn.Identity(), model)
    whole.forward = lambda x: checkpoint(model, x, use_reentrant=True)
    clipper = fastclip.attach(whole, c)
    batch["x"].requires_grad_()
    loss_fn(whole, batch).sum().backward()
    assert_norms(clipper.unit_norms, norms(grads))
    assert_gradients(collect(model), total)


class Explode(torch.autograd.Function):
    armed = True

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if Explode.armed:
            raise ArithmeticError("boom")
        return g


def test_an_exception_in_backward_leaves_nothing_behind():
    model, batch = Net(run=lambda block, x: block(Explode.apply(x))), batch_of()
    Explode.armed = False
    grads, c, total = expected(model, batch)
    clipper = fastclip.attach(model, c)
    Explode.armed = True
    with pytest.raises(ArithmeticError):
        loss_fn(model, batch).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    Explode.armed = False
    loss_fn(model, batch).sum().backward()
    assert_norms(clipper.unit_norms, norms(grads))
    assert_gradients(collect(model), total)


def test_gradients_of_inputs_alone_fill_nothing():
    model, batch = Net(), batch_of()
    batch["x"].requires_grad_()
    want = torch.autograd.grad(loss_fn(model, batch).sum(), batch["x"])[0]
    clipper = fastclip.attach(model, 1.0)
    got = torch.autograd.grad(loss_fn(model, batch).sum(), batch["x"])[0]
    torch.testing.assert_close(got, want)
    loss_fn(model, batch).sum().backward(inputs=[batch["x"]])
    torch.testing.assert_close(batch["x"].grad, want)
    assert all(p.grad is None for p in model.parameters())
    assert clipper.unit_norms.numel() == 0


def test_gradients_that_nobody_would_clip_are_refused():
    model, batch = Net(), batch_of()
    fastclip.attach(model, 1.0)
    with pytest.raises(RuntimeError, match="unclipped"):
        torch.autograd.grad(loss_fn(model, batch).sum(), [model.last.weight])
    with pytest.raises(RuntimeError, match="create_graph"), pytest.warns(UserWarning, match="reference cycle"):
        loss_fn(model, batch).sum().backward(create_graph=True)
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_used_elsewhere_is_refused():
    class Elsewhere(Net):
        def forward(self, x):
            return super().forward(x) + self.last.weight.sum()

    model = Elsewhere()
    fastclip.attach(model, 1.0)
    with pytest.raises(RuntimeError, match=r"last\.weight is used in a way"):
        loss_fn(model, batch_of()).sum().backward()
    assert model.last.weight.grad is None


def test_a_penalty_on_the_weights_is_refused():
    model, batch = Net(), batch_of()
    fastclip.attach(model, 1.0)
    with pytest.raises(RuntimeError, match="is used in a way"):
        (loss_fn(model, batch).sum() + model.first.weight.square().sum()).backward()


def test_two_backwards_through_one_forward_are_refused():
    class Heads(Net):
        def forward(self, x):
            x = self.blocks[0](self.first(x))
            return self.last(x).squeeze(-1), self.blocks[1](x)

    model, batch = Heads(), batch_of()
    fastclip.attach(model, 1.0)
    one, two = model(batch["x"])
    one.sum().backward(retain_graph=True)
    before = collect(model)
    with pytest.raises(RuntimeError, match="second backward through one forward"):
        two.sum().backward()
    assert_gradients(collect(model), before, 0.0)


def test_memory_that_is_given_back_before_it_was_used_is_refused():
    def freed(x):
        x.untyped_storage().resize_(0)

    class Freeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            h = self.first(x) * 1.0
            out = self.second(h)
            if h.requires_grad:
                h.register_hook(lambda g: freed(h))
            return out.sum(1)

    model = Freeing()
    fastclip.attach(model, 1.0, strict=False)
    with pytest.raises(RuntimeError, match="was given back during the backward"):
        model(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_two_forwards_in_one_backward_are_one_unit_each():
    model, batch = Net(), batch_of()

    def twice(m, b):
        return loss_fn(m, b) + loss_fn(m, {"x": 2 * b["x"]})

    grads, c, total = expected(model, batch, loss=twice)
    clipper = fastclip.attach(model, c)
    with clipper.units(ids=range(5)):
        twice(model, batch).sum().backward()
    assert_norms(clipper.unit_norms, norms(grads))
    assert_gradients(collect(model), total)
    with pytest.raises(RuntimeError, match="several forwards"):
        twice(model, batch).sum().backward()
    with pytest.raises(RuntimeError, match="different units"):
        (loss_fn(model, batch).sum() + loss_fn(model, batch_of(4)).sum()).backward()


def test_parameters_unfrozen_replaced_and_added_later_are_followed():
    model, batch = Net(), batch_of()
    model.blocks[1].requires_grad_(False)
    reference = copy.deepcopy(model)
    clipper = fastclip.attach(model, 1.0)
    loss_fn(model, batch).sum().backward()
    for m in (reference, model):
        m.zero_grad()
        m.blocks[1].requires_grad_(True)
        torch.manual_seed(3)
        m.last.weight = nn.Parameter(torch.randn_like(m.last.weight))
        m.blocks.append(Block())
        parametrizations.weight_norm(m.blocks[0].up)
    grads, c, total = expected(reference, batch)
    clipper.max_grad_norm = c
    with pytest.warns(UserWarning, match="example by example"):
        loss_fn(model, batch).sum().backward()
    assert_norms(clipper.unit_norms, norms(grads))
    assert_gradients(collect(model), total)


def test_a_layer_skipped_in_one_step_counts_as_zero():
    class Sometimes(Net):
        skip = False

        def forward(self, x):
            x = self.first(x)
            return self.last(x if self.skip else self.blocks[0](x)).squeeze(-1)

    model, batch = Sometimes(blocks=1), batch_of()
    clipper = fastclip.attach(model, 1e-3)
    loss_fn(model, batch).sum().backward()
    model.zero_grad()
    model.skip = True
    model_alone = copy.deepcopy(model)
    grads = unit_gradients(model_alone, loss_fn, batch, list(range(5)), "sum")
    loss_fn(model, batch).sum().backward()
    assert_norms(clipper.unit_norms, norms(grads))
    assert all(p.grad is None for p in model.blocks.parameters())


def test_half_a_sum_is_no_sum(monkeypatch):
    model, batch = Net(), batch_of()
    fastclip.attach(model, 1.0)
    loss_fn(model, batch).sum().backward()
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError
        return original(*args, **kwargs)

    original = fastclip.ops.clipped_gemm
    monkeypatch.setattr(fastclip.ops, "clipped_gemm", fail)
    with pytest.raises(MemoryError):
        loss_fn(model, batch).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_sums_of_bf16_parameters_are_kept_in_fp32():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).bfloat16()
    clipper = fastclip.attach(model, 1e-2)
    one = torch.randn(1, 3).bfloat16()
    for _ in range(600):
        model(one).square().sum().backward()
    wide = clipper.sums.pending(model[0].weight)
    assert wide.dtype == torch.float32
    assert model[0].weight.grad.dtype == torch.bfloat16
    total = sum(float(clipper.sums.pending(p).double().square().sum()) for p in model.parameters()) ** 0.5
    assert total == pytest.approx(600 * 1e-2, rel=1e-3)


def test_what_hooks_on_parameters_would_see_is_refused():
    for register in ("register_post_accumulate_grad_hook", "register_hook"):
        model = Net()
        getattr(model.last.weight, register)(lambda *args: None)
        with pytest.raises(ValueError, match=r"last\.weight has a"):
            fastclip.attach(model, 1.0)
        assert "forward" not in model.first.__dict__
        model = Net()
        clipper = fastclip.attach(model, 1.0)
        if register == "register_post_accumulate_grad_hook":
            model.last.weight.register_post_accumulate_grad_hook(lambda p: None)
            with pytest.raises(ValueError, match=r"last\.weight has a"):
                loss_fn(model, batch_of())
        clipper.detach()


def test_copies_and_pickles_are_plain_and_their_own():
    model, batch = Net(), batch_of()
    fastclip.attach(model, 1e-3)
    stored = io.BytesIO()
    model.run = None
    torch.save(model, stored)
    pickled = pickle.loads(pickle.dumps(model))
    loaded = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
    for other in (copy.deepcopy(model), pickled, loaded):
        other.run = model.run = lambda block, x: block(x)
        with torch.no_grad():
            before = loss_fn(model, batch)
            other.first.weight.mul_(2)
            assert not torch.equal(loss_fn(other, batch), before)
            torch.testing.assert_close(loss_fn(model, batch), before)
        loss_fn(other, batch).sum().backward()
        assert float(other.first.weight.grad.norm()) > 1e-2  # plain, not clipped
        assert model.first.weight.grad is None
        model.run = None


def test_attach_and_detach_leave_the_model_as_it_was():
    model = Net()
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    keys, kind = list(model.state_dict()), type(model.first)
    clipper = fastclip.attach(model, 1.0)
    assert list(model.state_dict()) == keys and type(model.first) is kind
    loss_fn(model, batch_of()).sum().backward()
    clipper.detach()
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before
    assert not any(p._backward_hooks for p in model.parameters())
    model.zero_grad()
    batch = batch_of()
    loss_fn(model, batch).sum().backward()
    want = torch.autograd.grad(loss_fn(model, batch).sum(), model.last.weight)[0]
    torch.testing.assert_close(model.last.weight.grad, want)


def test_the_model_dies_with_its_last_reference():
    import weakref

    model = Net()
    fastclip.attach(model, 1.0)
    loss_fn(model, batch_of()).sum().backward()
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_attached_twice_is_refused():
    model = Net()
    clipper = fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="attached already"):
        fastclip.attach(nn.Sequential(model), 1.0)
    clipper.detach()
    fastclip.attach(model, 1.0)


def test_a_layer_called_outside_the_model_is_refused():
    model = Net()
    fastclip.attach(model, 1.0)
    with pytest.raises(RuntimeError, match="outside the attached model's forward"):
        model.first(torch.randn(2, 4))
    with torch.no_grad():
        model.first(torch.randn(2, 4))


def test_in_place_on_a_layers_output():
    class InPlace(Net):
        def forward(self, x):
            x = self.first(x)
            x.mul_(2)
            x += 1
            return self.last(x).squeeze(-1)

    model, batch = InPlace(), batch_of()
    grads, c, total = expected(model, batch)
    clipper = fastclip.attach(model, c)
    loss_fn(model, batch).sum().backward()
    assert_norms(clipper.unit_norms, norms(grads))
    assert_gradients(collect(model), total)


def test_changed_gradients_are_not_added_to():
    model, batch = Net(), batch_of()
    fastclip.attach(model, 1.0)
    loss_fn(model, batch).sum().backward()
    model.last.weight.grad.mul_(2)
    with pytest.raises(RuntimeError, match=r"last\.weight was changed"):
        loss_fn(model, batch).sum().backward()
    model.zero_grad(set_to_none=False)
    loss_fn(model, batch).sum().backward()


def test_an_empty_batch_is_fine():
    model = Net()
    clipper = fastclip.attach(model, 1.0)
    loss_fn(model, batch_of(0)).sum().backward()
    assert clipper.unit_norms.shape == (0,)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    loss_fn(model, batch_of(3)).sum().backward()
    assert clipper.unit_norms.shape == (3,)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("max_grad_norm", v) for v in (0.0, -1.0, float("inf"), float("nan"), None, "x")]
    + [("clipping", "fast"), ("clipping", 3), ("loss_reduction", "none")],
)
def test_bad_arguments(argument, value):
    model = Net()
    with pytest.raises(ValueError, match=argument):
        fastclip.attach(model, **({"max_grad_norm": 1.0} | {argument: value}))
    assert not any("forward" in m.__dict__ for m in model.modules())


PRECISION = [
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
]


def test_sums_are_fp32_whatever_precision_the_model_runs_in():
    """In a process for each: the settings are global. Large enough products for torch to take the narrow path."""
    script = f"""
import os, torch, fastclip
def check(setting):
    torch.manual_seed(0)
    exec(setting)
    kinds = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [kind.fp32_precision for kind in kinds]
    model = torch.nn.Linear(512, 512)
    fastclip.attach(model, max_grad_norm=1e6)
    x, weight = torch.randn(1024, 512), torch.randn(1024, 512)
    (model(x) * weight).sum(1).sum().backward()
    exact = weight.double().T @ x.double()
    assert ((model.weight.grad - exact).norm() / exact.norm()) < 1e-6, setting
    assert [kind.fp32_precision for kind in kinds] == before, setting
for setting in {PRECISION}:
    child = os.fork()
    if not child:
        check(setting)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
