"""DPOptimizer: what is released, how often, with how much noise."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastclip
from fastclip.tape import ROUNDING_SLACK


class Draws:
    """A sampler that hands out what the test tells it to."""

    expected_batch_size = 4.0
    current_draw = None


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def wrap(model, base=torch.optim.SGD, **kwargs):
    defaults = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 4, "module": model}
    return fastclip.DPOptimizer(base(model.parameters(), lr=0.1), **(defaults | kwargs))


def backward(model, size=4, reduction="mean"):
    losses = model(torch.randn(size, 3)).square().sum(1)
    (losses.mean() if reduction == "mean" and size else losses.sum()).backward()


def clear_and_step(optimizer):
    optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_noise_it_is_the_base_optimizer_on_the_clipped_sum(reduction):
    model = net()
    twin = copy.deepcopy(model)
    optimizer = wrap(model, loss_reduction=reduction, expected_batch_size=8)
    x = torch.randn(4, 3)
    losses = model(x).square().sum(1)
    (losses.mean() if reduction == "mean" else losses.sum()).backward()
    total = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    base = torch.optim.SGD(twin.parameters(), lr=0.1)
    for p, g in zip(twin.parameters(), total, strict=True):
        p.grad = g / 8 if reduction == "mean" else g
    base.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("gradient", ["none", "some", "frozen half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_is_sigma_times_c_on_every_coordinate(gradient, dtype):
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)).to(dtype)
    if gradient == "frozen half":
        model[0].requires_grad_(False)
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    optimizer = fastclip.DPOptimizer(
        base, noise_multiplier=2.0, max_grad_norm=3.0, expected_batch_size=5, loss_reduction="mean", module=model
    )
    if gradient == "some":
        model(torch.randn(2, 300, dtype=dtype)).square().mean().backward()
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    noise = torch.cat([p.grad.flatten().double() for p in trained]) * 5
    # 90,300 draws or more: the standard error of the deviation is 0.24 %, of the mean 0.33 % of it.
    assert float(noise.std()) == pytest.approx(6.0 * (1 + ROUNDING_SLACK), rel=0.011)
    assert abs(float(noise.mean())) < 6.0 * 0.016
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_c_has_one_source():
    model = net()
    optimizer = wrap(model, noise_multiplier=1.0)
    optimizer.max_grad_norm = 0.5
    assert optimizer.clipper.max_grad_norm == optimizer.clipper.rule.max_grad_norm == 0.5
    assert optimizer.noise_std == pytest.approx(0.5 * (1 + ROUNDING_SLACK))
    backward(model)
    with pytest.raises(ValueError, match="within a logical batch"):
        optimizer.max_grad_norm = 2.0
    optimizer.step()
    optimizer.zero_grad()
    optimizer.max_grad_norm = 2.0
    with pytest.raises(ValueError, match="noise_multiplier"):
        optimizer.noise_multiplier = -1.0


def test_one_sum_is_released_once():
    model = net()
    optimizer = wrap(model)
    backward(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="zero_grad"):
        backward(model)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def test_no_gradient_is_ever_left_clean():
    model = net()
    optimizer = wrap(model, noise_multiplier=1.0)
    backward(model)
    clean = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(not torch.isclose(p.grad * 4, g).any() for p, g in zip(model.parameters(), clean, strict=True))


@pytest.mark.parametrize("how", ["scale", "clip", "replace"])
def test_changed_gradients_are_refused_and_nothing_happens(how):
    model = net()
    optimizer = wrap(model, noise_multiplier=1.0)
    backward(model)
    before = [p.detach().clone() for p in model.parameters()]
    if how == "scale":
        model[0].weight.grad.mul_(2)
    elif how == "clip":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    else:
        model[0].weight.grad = torch.ones_like(model[0].weight)
    step = optimizer.noise.step
    with pytest.raises(RuntimeError, match="was changed since it was clipped"):
        optimizer.step()
    assert optimizer.noise.step == step
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_loss_scaler_is_refused():
    model = net()
    optimizer, scaler = wrap(model), torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(4, 3)).square().sum(1).mean()).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)


def test_an_empty_draw_is_a_noise_only_step():
    model = net()
    optimizer = wrap(model, noise_multiplier=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0, "sum")
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_every_step_has_noise_of_its_own():
    model = net()
    optimizer = wrap(model, noise_multiplier=1.0, seed=5)
    other = wrap(net(), noise_multiplier=1.0, seed=5)
    seen = []
    for _ in range(3):
        clear_and_step(optimizer)
        seen.append(model[0].weight.grad.clone())
    optimizer.load_state_dict(optimizer.state_dict())
    clear_and_step(optimizer)
    seen.append(model[0].weight.grad.clone())
    for i, one in enumerate(seen):
        assert not any(torch.isclose(one, two).any() for two in seen[:i])
    other.step()
    torch.testing.assert_close(next(iter(other._parameters())).grad, seen[0])
    assert "noise" not in str(optimizer.state_dict().keys())
    with pytest.raises(TypeError, match="noise key"):
        pickle.dumps(optimizer)
    with pytest.raises(TypeError, match="noise key"):
        copy.deepcopy(optimizer)


def test_several_backwards_of_one_draw_are_one_release():
    model = net()
    x = torch.randn(7, 3)
    optimizer = wrap(model, max_grad_norm=0.5)
    model(x).square().sum(1).mean().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    for part in x.split([2, 4, 1]):
        model(part).square().sum(1).mean().backward()
    for p, g in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_a_unit_is_in_one_backward_of_a_release():
    model = net()
    optimizer = wrap(model)
    for ids in ([7, 3, 7], [9]):
        with optimizer.clipper.units(ids=ids):
            backward(model, len(ids))
    before = model[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match="unit 3 is in two backwards"), optimizer.clipper.units(ids=[3]):
        backward(model, 1)
    assert torch.equal(model[0].weight.grad, before)
    optimizer.step()
    optimizer.zero_grad()
    with optimizer.clipper.units(ids=[3]):
        backward(model, 1)


def test_one_release_is_one_draw():
    model, draws = net(), Draws()
    optimizer = wrap(model, sampler=draws, expected_batch_size=None)
    with pytest.raises(RuntimeError, match="no draw was handed out"):
        optimizer.step()
    draws.current_draw = 0
    backward(model)
    backward(model)
    draws.current_draw = 1
    with pytest.raises(RuntimeError, match="before draw 0 was released"):
        backward(model)
    draws.current_draw = 0
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="released already"):
        backward(model)
    with pytest.raises(RuntimeError, match="released already"):
        optimizer.step()
    draws.current_draw = 1  # an empty draw
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="released already"):
        optimizer.step()


def test_two_optimizers_do_not_release_one_draw_between_them():
    model = nn.Sequential(net(), nn.Linear(2, 2))
    sampler = fastclip.PoissonSampler(20, steps=2, sample_rate=1.0)
    loader = fastclip.PoissonLoader(torch.randn(20, 3), sampler)
    kwargs = {"expected_batch_size": None, "noise_multiplier": 1.0}
    first = wrap(model[0], sampler=loader, **kwargs)
    second = wrap(model[1], sampler=sampler, **kwargs)
    for _ in loader:
        clear_and_step(first)
        with pytest.raises(RuntimeError, match="released already"):
            second.step()
    model[0].zero_grad()
    again = wrap(model[0], sampler=sampler, **kwargs)
    with pytest.raises(RuntimeError, match="released already"):
        again.step()


def test_no_draw_of_a_loop_is_skipped():
    model = net()
    sampler = fastclip.PoissonSampler(20, steps=9, sample_rate=0.2)
    loader = fastclip.PoissonLoader(torch.randn(20, 3), sampler)
    optimizer = wrap(model, sampler=loader, expected_batch_size=None, noise_multiplier=1.0)
    for _ in loader:  # a look at the first batch, then the loop
        break
    batches = iter(loader)
    next(batches)
    clear_and_step(optimizer)
    next(batches)  # "nothing in it, so nothing to do"
    x = next(batches)
    with pytest.raises(RuntimeError, match="draw 2 was handed out and never released"):
        clear_and_step(optimizer)
    assert x.shape[1] == 3
    next(iter(loader))
    clear_and_step(optimizer)  # a new loop goes on


def test_a_sampler_that_runs_ahead_of_the_loop_is_refused():
    model = net()
    sampler = fastclip.PoissonSampler(20, steps=9, sample_rate=1.0)
    optimizer = wrap(model, sampler=sampler, expected_batch_size=None)
    for _ in torch.utils.data.DataLoader(torch.randn(20, 3), batch_sampler=sampler):
        clear_and_step(optimizer)
        if sampler.released == 2:
            break
    for _ in torch.utils.data.DataLoader(torch.randn(20, 3), batch_sampler=sampler, num_workers=1):
        with pytest.raises(RuntimeError, match="only PoissonLoader follows"):
            clear_and_step(optimizer)
        break


def test_release_hooks_come_first_and_may_stop_it():
    model = net()
    optimizer = wrap(model, noise_multiplier=1.0)
    backward(model)
    clean = model[0].weight.grad.clone()

    def stop(released):
        assert released is optimizer and torch.equal(model[0].weight.grad, clean)
        raise KeyError("budget")

    optimizer.attach_release_hook(stop)
    with pytest.raises(KeyError):
        optimizer.step()
    assert torch.equal(model[0].weight.grad, clean)


def test_a_failure_in_the_noise_leaves_nothing_clean(monkeypatch):
    model = net()
    optimizer = wrap(model, base=torch.optim.Adagrad, noise_multiplier=1.0)
    backward(model)
    calls = []

    def fail(total, std, *, offset, out, scale):
        calls.append(offset)
        if len(calls) == 2:
            raise MemoryError
        return original(total, std, offset=offset, out=out, scale=scale)

    original = optimizer.noise.add_
    monkeypatch.setattr(optimizer.noise, "add_", fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())


def test_optimizer_and_model_hold_the_same_parameters():
    model = net()
    with pytest.raises(ValueError, match=r"the optimizer lacks 2\.weight"):
        fastclip.DPOptimizer(
            torch.optim.SGD(model[0].parameters(), lr=0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=4,
            module=model,
        )
    assert "forward" not in model.__dict__
    with pytest.raises(ValueError, match="holds others"):
        fastclip.DPOptimizer(
            torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], lr=0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=4,
            module=model,
        )
    model[2].requires_grad_(False)
    optimizer = wrap(model)
    model[2].requires_grad_(True)
    backward(model)
    optimizer.step()  # it was in the optimizer all along
    optimizer.zero_grad()
    model[2].bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"lacks 2\.bias"):
        optimizer.step()
    optimizer.add_param_group({"params": [model[2].bias]})
    with pytest.raises(RuntimeError, match="holds others"):
        optimizer.step()


def test_frozen_between_backward_and_step():
    model = net()
    optimizer = wrap(model, noise_multiplier=1.0)
    backward(model)
    model[2].requires_grad_(False)
    optimizer.step()
    assert model[2].weight.grad is None and model[0].weight.grad is not None


@pytest.mark.parametrize(
    ("argument", "value"),
    [("noise_multiplier", v) for v in (-0.1, float("nan"), float("inf"), "1")]
    + [("max_grad_norm", v) for v in (0, -1.0, float("nan"), float("inf"))]
    + [("expected_batch_size", v) for v in (0, -4, float("nan"), None)]
    + [("loss_reduction", "none"), ("clipping", "fast")],
)
def test_bad_arguments(argument, value):
    model = net()
    with pytest.raises(ValueError, match=argument):
        wrap(model, **{argument: value})
    assert "forward" not in model.__dict__


def test_only_the_wrapper_may_step():
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = wrap(model, base=lambda p, lr: base, noise_multiplier=1.0)
    backward(model)
    with pytest.raises(RuntimeError, match="without noise"):
        base.step()
    optimizer.zero_grad()
    newer = wrap(model, noise_multiplier=1.0)
    backward(model)
    with pytest.raises(RuntimeError, match="another DPOptimizer"):
        optimizer.step()
    newer.step()


def test_a_bound_changed_behind_the_clippers_back():
    model = net()
    optimizer = wrap(model, noise_multiplier=1.0)
    backward(model)
    optimizer.clipper.rule.max_grad_norm = 1e-6
    with pytest.raises(RuntimeError, match="was clipped to 1"):
        optimizer.step()


def test_a_parameter_twice():
    model = net()
    with pytest.warns(UserWarning, match="duplicate"):
        base = torch.optim.SGD([*model.parameters(), model[0].weight], lr=0.1)
    with pytest.raises(ValueError, match="twice"):
        wrap(model, base=lambda p, lr: base)


def test_wrong_optimizers_and_second_sources():
    model = net()
    with pytest.raises(ValueError, match="first-order"):
        wrap(model, base=lambda p, lr: torch.optim.LBFGS(p, lr=lr))
    with pytest.raises(ValueError, match="first-order"):
        wrap(model, base=lambda p, lr: "adam")
    with pytest.raises(ValueError, match="the sampler's is"):
        wrap(model, sampler=Draws(), expected_batch_size=5)
    fastclip.attach(model, 2.0, loss_reduction="mean")
    with pytest.raises(ValueError, match="attached with max_grad_norm=2"):
        wrap(model)
    assert wrap(model, max_grad_norm=2.0).clipper is not None


@pytest.mark.parametrize(
    "base",
    [
        torch.optim.SGD,
        torch.optim.AdamW,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    ],
)
def test_it_is_an_optimizer_to_schedulers_and_hooks(base):
    model = net()
    optimizer = wrap(model, base=base, noise_multiplier=1.0)
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=5, cycle_momentum=False)
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *args: seen.append("post"))
    for _ in range(3):
        backward(model)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert seen == ["pre", "post"] * 3
    state = optimizer.state_dict()
    fresh = wrap(net(), base=base)
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert fresh.param_groups is fresh.original_optimizer.param_groups

    def closure():
        optimizer.zero_grad()
        losses = model(torch.randn(4, 3)).square().sum(1)
        losses.mean().backward()
        return losses.mean()

    assert optimizer.step(closure).item() > 0


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_both_ways(to_none):
    model = net()
    optimizer = wrap(model)
    for _ in range(3):
        backward(model)
        backward(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        assert all((p.grad is None) == to_none for p in model.parameters())


def test_no_more_units_enter_than_were_drawn():
    model = net()
    users = [i // 10 for i in range(40)]
    sampler = fastclip.UserPoissonSampler(users, sample_rate=1.0, steps=2)
    optimizer = wrap(model, sampler=sampler, expected_batch_size=None)
    indices = next(iter(sampler))
    assert sampler.current_units == 4
    with pytest.raises(RuntimeError, match="40 units were clipped for draw 0, which has 4"):
        backward(model, len(indices))  # a user's examples as units of their own
    assert model[0].weight.grad is None
    optimizer.zero_grad()
    with optimizer.clipper.units(ids=[users[i] for i in indices]):
        backward(model, len(indices))
    with pytest.raises(RuntimeError, match="5 units were clipped for draw 0"):
        backward(model, 1)  # the same batch again
    optimizer.step()


def test_the_count_of_a_draw_is_no_part_of_a_copy():
    sampler = fastclip.PoissonSampler(40, sample_rate=1.0, steps=2)
    next(iter(sampler))
    assert sampler.current_units == 40
    assert sampler.__getstate__()["current_units"] is None
