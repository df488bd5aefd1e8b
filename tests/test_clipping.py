"""Clipping rules keep every unit within max_grad_norm, and say the sensitivity that they have."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastclip
from fastclip.clipping import RULES, PerGroup, make_rule

LAYERS = [("a.weight", "a.bias"), ("b.weight",), ("c.weight", "c.bias")]
NORMS = st.lists(st.floats(0, 1e30, allow_nan=False), min_size=3, max_size=3)


def rules():
    return [*RULES, PerGroup({"a": 0.5, "": 1.5})]


@settings(deadline=None, max_examples=80)
@given(st.lists(NORMS, min_size=1, max_size=5), st.floats(1e-6, 1e6), st.integers(0, 3))
def test_no_unit_exceeds_the_bound(norms, bound, which):
    rule = make_rule(list(RULES)[which], bound) if which < len(RULES) else PerGroup({"a": bound, "": 2 * bound})
    groups = rule.groups(LAYERS)
    squares = torch.zeros(max(groups) + 1, len(norms), dtype=torch.float64)
    for k, column in zip(groups, torch.tensor(norms, dtype=torch.float64).T, strict=True):
        squares[k] += column.square()
    factors = rule.factors(squares.sqrt())
    clipped = (factors * squares.sqrt()).square().sum(0).sqrt()
    assert bool((clipped <= rule.max_grad_norm * (1 + 1e-12)).all())
    assert bool((factors >= 0).all())


def test_sensitivities_and_groups():
    assert RULES["per_layer"](3.0).groups(LAYERS) == [0, 1, 2]
    rule = PerGroup({"a": 3.0, "": 4.0})
    assert rule.max_grad_norm == pytest.approx(5.0)
    assert rule.groups(LAYERS) == [0, 1, 1]
    rule.max_grad_norm = 10.0
    assert list(rule.bounds.values()) == pytest.approx([6.0, 8.0])
    with pytest.raises(ValueError, match="each layer into one group"):
        PerGroup({"a": 1.0}).groups(LAYERS)
    with pytest.raises(ValueError, match="at least one group"):
        PerGroup({})
    with pytest.raises(ValueError, match="pass the rule's"):
        make_rule(rule, 1.0)
    with pytest.raises(ValueError, match="must have max_grad_norm"):
        make_rule(object(), 1.0)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule if isinstance(rule, str) else "per group")
def test_one_unit_moves_the_sum_by_at_most_the_bound(rule):
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    if not isinstance(rule, str):
        rule = PerGroup({"0": 0.5, "": 1.2})
    bound = rule.max_grad_norm if not isinstance(rule, str) else 0.7
    clipper = fastclip.attach(model, bound, rule)
    x = 30 * torch.randn(6, 3)

    def total(rows):
        model.zero_grad()
        model(rows).square().sum().backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    both = total(x)
    assert bool((clipper.unit_norms > bound).any())
    assert float((both - total(x[1:])).norm()) <= bound * (1 + 1e-5)


def test_a_rule_of_ones_own():
    class Half:
        max_grad_norm = 2.0

        def groups(self, layers):
            return [0] * len(layers)

        def factors(self, norms):
            return torch.where(norms > 2.0, 1.0 / norms, 0.5 * torch.ones_like(norms))

    model = nn.Linear(2, 1, bias=False)
    fastclip.attach(model, 2.0, Half())
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))
    assert math.isclose(float(model.weight.grad.norm()), 1.0, rel_tol=1e-6)
