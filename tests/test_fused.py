"""Release and update in one pass: the same release, torch's own update, and whatever is not plain left to its own step."""

import copy

import pytest
import torch
from test_optimizer import backward, net, wrap
from torch import nn
from torch.optim import SGD, Adam, AdamW

import fastclip
from fastclip import fused, ops
from kernels import needs_kernels

pytestmark = needs_kernels
FUSED = {
    "AdamW": (AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "AdamW, a tensor rate": (AdamW, {"lr": torch.tensor(0.1)}),
    "Adam": (Adam, {}),
    "SGD": (SGD, {"weight_decay": 0.1}),
    "momentum": (SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
}
OWN = {
    "amsgrad": (AdamW, {"amsgrad": True}),
    "maximize": (AdamW, {"maximize": True}),
    "coupled decay": (Adam, {"weight_decay": 0.1}),
    "a subclass": (type("Mine", (SGD,), {}), {}),
    "another": (torch.optim.Adagrad, {}),
}


def private(model, base, arguments):
    optimizer = base(model.parameters(), **({"lr": 0.1} | arguments))
    return fastclip.DPOptimizer(
        optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4, module=model, seed=1
    )


@pytest.mark.parametrize(("base", "arguments"), FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("frozen", [False, True])
def test_as_the_optimizers_own_step(base, arguments, frozen, monkeypatch):
    models, optimizers = [net(), net()], []
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model[0].bias.requires_grad_(not frozen)
        optimizers.append(private(model, base, arguments))
    assert fused.update_of(optimizers[0].original_optimizer) is not None
    for step in range(4):
        x = torch.randn(4, 3)
        for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            with monkeypatch.context() as patched:
                if k:
                    patched.setattr(fused, "update_of", lambda optimizer: None)
                if step != 2:  # an empty draw between
                    model(x).square().sum(1).mean().backward()
                before = model[0].weight._version
                optimizer.step()
                assert model[0].weight._version > before
        pairs = list(zip(models[0].parameters(), models[1].parameters(), strict=True))
        if step == 0:  # from the same parameters, what is released has the same bits
            assert all((p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad) for p, q in pairs)
        for p, q in pairs:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for optimizer in optimizers:
            optimizer.zero_grad()
        states = [optimizer.state_dict()["state"] for optimizer in optimizers]
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    backward(models[0])
    optimizers[0].step()


@pytest.mark.parametrize(("base", "arguments"), OWN.values(), ids=OWN)
def test_what_is_not_plain_makes_its_own_step(base, arguments):
    optimizer = private(net(), base, arguments)
    assert fused.update_of(optimizer.original_optimizer) is None
    backward(optimizer.clipper.model)
    optimizer.step()


def test_hooks_wrapped_steps_and_other_parameters_make_their_own_step():
    optimizer = private(net(), AdamW, {})
    seen = []
    handle = optimizer.original_optimizer.register_step_post_hook(lambda *_: seen.append(1))
    optimizer.step()
    handle.remove()
    handle = optimizer.original_optimizer.register_step_pre_hook(lambda *_: seen.append(2))
    optimizer.zero_grad()
    optimizer.step()
    assert seen == [1, 2]
    handle.remove()
    assert fused.update_of(optimizer.original_optimizer) is not None
    torch.optim.lr_scheduler.StepLR(optimizer.original_optimizer, 1)  # wraps step() to count
    assert fused.update_of(optimizer.original_optimizer) is None
    for model in (net().to(torch.bfloat16), net().double()):
        assert fused.update_of(AdamW(model.parameters())) is None
    assert fused.update_of(SGD(net().parameters(), lr=0.1, differentiable=True)) is None
    model = net()
    model[0].weight.data = torch.randn(3, 4).T
    assert fused.update_of(AdamW(model.parameters())) is None


def test_a_step_that_fails_leaves_no_clean_sum(monkeypatch):
    model = net()
    optimizer = wrap(model, base=AdamW, noise_multiplier=1.0)
    backward(model)
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        raise MemoryError

    monkeypatch.setattr(ops, "noise_adamw", fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.undo()
    step = optimizer.noise.step
    backward(model)
    optimizer.step()
    assert optimizer.noise.step == step + 1


def test_bad_input_changes_nothing():
    draw = ops.Draw(1.0, 1.0, fastclip.random.Key(bytes(32)), 0, 0)
    x, adam = [torch.ones(64) for _ in range(4)], {"lr": 1.0, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0}
    cases = [
        ([x[0], x[1], x[2], x[2]], 1, "share memory"),
        ([x[0], x[1], x[2], x[3][:63]], 1, "of one size"),
        ([x[0], x[1], x[2], x[3].double()], 1, "fp32"),
        ([torch.ones(128)[::2], x[1], x[2], x[3]], 1, "contiguous"),
        (x, 0, "step counts from 1"),
    ]
    for tensors, step, word in cases:
        with pytest.raises(RuntimeError, match=word):
            ops.noise_adamw(*([t] for t in tensors), [draw], steps=[step], backend="cpp", **adam)
    with pytest.raises(RuntimeError, match="share memory"):  # of different parameters
        lists = [[x[0][:32], x[0][16:48]], *([t[:32], t[32:]] for t in x[1:])]
        ops.noise_adamw(*lists, [draw, draw], steps=[1, 1], backend="cpp", **adam)
    with pytest.raises(RuntimeError, match="momentum needs a buffer"):
        ops.noise_sgd([x[0]], [x[1]], [], [draw], lr=1.0, momentum=0.5, backend="cpp")
    for other in (
        ops.Draw(2.0, 1.0, draw.key, 0, 64),
        ops.Draw(1.0, 0.5, draw.key, 0, 64),
        ops.Draw(1.0, 1.0, draw.key, 1, 64),
        ops.Draw(1.0, 1.0, fastclip.random.Key(bytes(32)), 0, 64),
    ):
        for backend in ("cpp", "torch"):
            with pytest.raises(ValueError, match="draws must differ in nothing but their offset"):
                ops.noise_sgd(x[:2], x[2:], [], [draw, other], lr=1.0, backend=backend)
    with pytest.raises(ValueError, match="must be as many"):
        ops.noise_sgd(x[:2], x[2:3], [], [draw], lr=1.0)
    assert all(bool((t == 1).all()) for t in x)


@pytest.mark.parametrize(("nonce", "end"), [(1, 2**67), (1 | 1 << 63, 2**65)])
def test_a_stream_does_not_begin_again_behind_its_end(nonce, end):
    key = fastclip.random.Key(bytes(32))
    x = [torch.ones(16) for _ in range(3)]

    def all_ops(offset):
        draw = ops.Draw(1.0, 1.0, key, nonce, offset)
        yield lambda: ops.add_noise(x[0], x[0], draw, backend="cpp")
        yield lambda: ops.noise_sgd([x[0]], [x[1]], [], [draw], lr=1.0, backend="cpp")
        yield lambda: ops.clip_accumulate_noise(
            x[0][None], torch.ones(1), x[2], 1.0, key, (nonce, offset), backend="cpp"
        )

    for offset in (end - 15, end - 8):
        for run in all_ops(offset):
            with pytest.raises(RuntimeError, match="stream ends"):
                run()
    assert all(bool((t == 1).all()) for t in x)
    for run in all_ops(end - 16):
        run()


def test_noise_is_added_in_place_or_elsewhere():
    draw = ops.Draw(1.0, 1.0, fastclip.random.Key(bytes(32)), 0, 0)
    x = torch.ones(1000)
    for total, out in ((x[:700], x[8:708]), (x[8:708], x[:700]), (x.double()[:250], None)):
        out = total.view(torch.float32)[:250] if out is None else out
        before = total.clone()
        with pytest.raises(RuntimeError, match="share no memory"):
            ops.add_noise(total, out, draw, backend="cpp")
        assert torch.equal(total, before)
    apart = ops.add_noise(x[:500].clone(), x[500:], draw, backend="cpp")
    assert torch.equal(apart, ops.add_noise(x[:500], x[:500], draw, backend="cpp"))


@pytest.mark.parametrize("offset", [0, 3, 1000])
def test_the_plain_formulation_is_the_same(offset):
    key = fastclip.random.Key(bytes(32))
    draws = [ops.Draw(1.0, 0.5, key, 7, offset), ops.Draw(1.0, 0.5, key, 7, offset + 5000)]
    ours = [[torch.randn(n) for n in (1003, 17)] for _ in range(4)]
    for x in ours[3]:
        x.abs_()
    theirs = [[x.clone() for x in list_] for list_ in ours]
    for lists, backend in ((ours, "cpp"), (theirs, "torch")):
        adam = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        ops.noise_adamw(*lists, draws, steps=[3, 1], backend=backend, **adam)
    assert all(map(torch.equal, ours[1], theirs[1]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", [AdamW, SGD])
def test_a_number_of_another_precision_is_left_to_its_own_step(base):
    model = nn.ParameterDict({"one": nn.Parameter(torch.zeros(3)), "number": nn.Parameter(torch.tensor(0.0))})
    assert fused.update_of(base(model.parameters(), lr=0.1)) is not None
    model.double()
    assert fused.update_of(base(model.parameters(), lr=0.1)) is None
    model["one"].data = model["one"].data.float()
    assert fused.update_of(base(model.parameters(), lr=0.1)) is None
