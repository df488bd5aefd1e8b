"""Every model family through Opacus' names: per-example gradients, ghost clipping and a step, against the oracle."""

import functools
import warnings
from typing import Any

import oracle
import pytest
import torch
from families import FAMILIES, Family

opacus = pytest.importorskip("fastclip.opacus", reason="opacus is not installed: pip install fastclip-dp[opacus]")

every_family = pytest.mark.parametrize("case", FAMILIES.values(), ids=lambda case: case.name)
pytestmark = [
    pytest.mark.filterwarnings("ignore:fastclip runs .* example by example:UserWarning"),
    # The families were made without a seed to be kept secret.
    pytest.mark.filterwarnings("ignore:torch.manual_seed:UserWarning"),
]


@functools.lru_cache(maxsize=4)
def exact_units(case: Family) -> list[oracle.Gradients]:
    model, batch, loss_fn = case.build()
    return oracle.unit_gradients(model, loss_fn, batch)


def collected(model: torch.nn.Module, of: Any) -> oracle.Gradients:
    found = {name: of(p) for name, p in model.named_parameters() if p.requires_grad}
    return {
        name.removeprefix("_module."): value.detach().double().clone()
        for name, value in found.items()
        if value is not None
    }


@every_family
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_per_example_gradients(case: Family, reduction: str) -> None:
    units = exact_units(case)
    model, batch, loss_fn = case.build()
    wrapped = opacus.GradSampleModule(model, loss_reduction=reduction)
    losses = loss_fn(wrapped, batch)
    (losses.sum() if reduction == "sum" else losses.mean()).backward()
    samples = collected(wrapped, lambda p: p.grad_sample)
    for i, unit in enumerate(units):
        own = {name: samples[name][i] if name in samples else torch.zeros_like(unit[name]) for name in unit}
        oracle.assert_gradients(own, unit)
    plain = {name: sum(unit[name] for unit in units) / (1 if reduction == "sum" else len(units)) for name in units[0]}
    oracle.assert_gradients(oracle.collect(model), plain)


IN_PLACE = (
    "roberta_classifier",
    "lora_gpt2",
    "gpt2_padded",
    "t5",
    "llama_checkpoint_reentrant",
)  # the others are slow tests


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize(
    ("case", "wrap_model"),
    [pytest.param(case, True, id=f"wrapped-{name}") for name, case in FAMILIES.items()]
    + [
        pytest.param(case, False, id=f"in place-{name}", marks=[] if name in IN_PLACE else [pytest.mark.slow])
        for name, case in FAMILIES.items()
    ],
)
def test_a_step_releases_the_clipped_mean(case: Family, mode: str, wrap_model: bool) -> None:
    units = exact_units(case)
    norm = oracle.pick_clipping_norm(oracle.norms(units))
    model, batch, loss_fn = case.build()
    own = {"max_grad_norm": norm} if mode == "ghost" else {}
    wrapped = opacus.grad_sample.wrap_model(model, mode, wrap_model, loss_reduction="mean", **own)
    cls = opacus.optimizers.get_optimizer_class("flat", False, mode)
    optimizer = cls(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=norm,
        expected_batch_size=len(units),
    )
    for _ in range(2):  # the second time nothing of the first is left
        optimizer.zero_grad()
        loss_fn(wrapped if wrap_model else model, batch).mean().backward()
        assert optimizer.pre_step()
    expected = {name: g / len(units) for name, g in oracle.clipped_sum(units, norm).items()}
    oracle.assert_gradients(oracle.collect(model), expected)
    if mode == "ghost":
        oracle.assert_norms(wrapped.get_norm_sample(), oracle.norms(units))


def test_per_example_gradients_that_were_read_are_what_is_clipped() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=1e3,
        expected_batch_size=None,
        loss_reduction="sum",
    )
    wrapped(torch.randn(5, 3)).sum().backward()
    samples = model[0].weight.grad_sample
    samples[1:] = 0
    optimizer.pre_step()
    torch.testing.assert_close(model[0].weight.grad, samples[0])
