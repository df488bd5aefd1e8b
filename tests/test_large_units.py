"""A unit over several backwards is clipped like the same unit in one."""

import copy

import pytest
import torch
from test_optimizer import net, wrap

import fastclip

SIZES = [7, 1, 3]  # examples of units 0, 1 and 2


def batch():
    x = torch.randn(sum(SIZES), 3) * 2
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
    return x, ids


def losses(model, x):
    return model(x).square().sum(1)


@pytest.mark.parametrize("rule", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss_reduction", ["sum", "mean"])
def test_as_in_one_backward(rule, reduction, loss_reduction):
    x, ids = batch()
    models = [net(), net()]
    models[1].load_state_dict(models[0].state_dict())
    whole, parts = (fastclip.attach(m, 1.5, rule, loss_reduction=loss_reduction) for m in models)
    reduce = torch.sum if loss_reduction == "sum" else torch.mean
    with whole.units(ids=ids, reduction=reduction):
        reduce(losses(models[0], x)).backward()
    # The others first, so that a sum waits in p.grad; the large one's three parts after them.
    with parts.units(ids=ids[7:], reduction=reduction):
        reduce(losses(models[1], x[7:])).backward()
    with parts.accumulate_unit(0, reduction=reduction, num_examples=7):
        for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
            losses(models[1], x[rows]).sum().backward()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    torch.testing.assert_close(parts.unit_norms[0], whole.unit_norms[0])


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_released_like_any_other_and_enters_once(secure, dtype):
    if secure:
        pytest.importorskip("fastclip._host", reason="no compiler at install")
    model = net().to(dtype)
    optimizer = wrap(model, noise_multiplier=1.0, loss_reduction="sum", secure=secure)
    x = torch.randn(6, 3, dtype=dtype) * 100
    with optimizer.clipper.accumulate_unit(5):
        losses(model, x[:3]).sum().backward()
        losses(model, x[3:]).sum().backward()
    total = [optimizer.clipper.sums.pending(p) for p in model.parameters()]
    assert float(torch.stack([t.double().norm() for t in total]).norm()) == pytest.approx(1.0, abs=1e-5)
    assert {t.dtype for t in total} == {torch.float64 if secure else torch.float32}
    with pytest.raises(RuntimeError, match="unit 5 is in two backwards"), optimizer.clipper.accumulate_unit(5):
        raise AssertionError("its code must not run")
    with pytest.raises(RuntimeError, match="unit 5 is in two backwards"), optimizer.clipper.units(ids=[5]):
        losses(model, x[:1]).sum().backward()
    optimizer.step()


def test_a_failure_inside_leaves_the_others_sum():
    model = net()
    clipper = fastclip.attach(model, 1.0)
    with clipper.units(ids=[1, 2]):
        losses(model, torch.randn(2, 3)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(MemoryError), clipper.accumulate_unit(3):
        losses(model, torch.randn(2, 3)).sum().backward()
        raise MemoryError
    assert all(map(torch.equal, before, (p.grad for p in model.parameters())))
    with clipper.units(ids=[4]):
        losses(model, torch.randn(1, 3)).sum().backward()
    with clipper.accumulate_unit(6):
        pass  # no examples, nothing added
    assert not all(map(torch.equal, before, (p.grad for p in model.parameters())))


def test_a_nonfinite_unit_contributes_nothing():
    model = net()
    clipper = fastclip.attach(model, 1.0)
    with clipper.units(ids=[1]):
        losses(model, torch.randn(1, 3)).sum().backward()
    before = copy.deepcopy([p.grad for p in model.parameters()])
    with clipper.accumulate_unit(2):
        losses(model, torch.full((1, 3), torch.inf)).sum().backward()
    assert all(map(torch.equal, before, (p.grad for p in model.parameters())))


def test_bad_input():
    clipper = fastclip.attach(net(), 1.0)
    for arguments, message in [
        ({"unit_id": "a"}, "unit_id must be an int"),
        ({"unit_id": 1, "reduction": "max"}, "reduction must be"),
        ({"unit_id": 1, "reduction": "mean"}, "num_examples must be"),
        ({"unit_id": 1, "reduction": "mean", "num_examples": 0}, "num_examples must be"),
    ]:
        with pytest.raises(ValueError, match=message), clipper.accumulate_unit(**arguments):
            pass
    with (
        clipper.accumulate_unit(1),
        pytest.raises(RuntimeError, match="accumulated already"),
        clipper.accumulate_unit(2),
    ):
        pass


class Writes(torch.nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.bias.copy_(x.mean(0)[: self.bias.numel()])
        return super().forward(x)


def test_a_model_that_writes_into_itself_is_refused_here_too():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), Writes(3, 2))
    clipper = fastclip.attach(model, 1.0)
    with pytest.raises(RuntimeError, match="published without noise"), clipper.accumulate_unit(1):
        losses(model, torch.randn(2, 3)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
