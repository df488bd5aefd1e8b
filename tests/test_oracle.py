"""The oracle against hand-worked numbers, and every case of the registry against what it is meant to be."""

import layer_cases  # noqa: F401 - registers its cases
import oracle
import pytest
import torch
from families import FAMILIES, USERS, Family, family
from torch import nn

# By symmetry the loss does not depend on these: softmax over keys ignores what is added to all of them.
VANISHING = (".key.bias", ".k_lin.bias", ".k_proj.bias")


def squared(model: nn.Module, batch: oracle.Batch) -> torch.Tensor:
    """Loss y^2 / 2 of y = w x, whose gradient is x^2 w."""
    return model(batch["x"])[:, 0].square() / 2


def scalar_model() -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    return model


@pytest.mark.parametrize(("reduction", "expected"), [("sum", [2.0 + 18.0, 8.0]), ("mean", [10.0, 8.0])])
def test_a_units_gradient_is_the_sum_or_mean_of_its_examples(reduction: str, expected: list[float]) -> None:
    batch = {"x": torch.tensor([[1.0], [2.0], [3.0]])}
    units = oracle.unit_gradients(scalar_model(), squared, batch, [8, 4, 8], reduction)
    assert oracle.norms(units).tolist() == expected
    assert units[0]["weight"].dtype is torch.float64


def test_segments_are_run_alone_and_an_empty_one_is_zero() -> None:
    batch = {"x": torch.tensor([[1.0], [2.0], [3.0]])}
    units = oracle.segment_gradients(scalar_model(), squared, batch, [0, 2, 2, 3])
    assert oracle.norms(units).tolist() == [10.0, 0.0, 18.0]


def test_taking_examples_keeps_what_is_broadcast() -> None:
    batch = {"ids": torch.arange(10).view(5, 2), "position_ids": torch.arange(2)[None]}
    taken = oracle.take(batch, [3, 0])
    assert taken["ids"].tolist() == [[6, 7], [0, 1]]
    assert taken["position_ids"].shape == (1, 2)


UNITS = [{"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, {"a": torch.tensor([0.3]), "b": torch.tensor([0.0])}]


@pytest.mark.parametrize(
    ("rule", "a", "b"),
    [
        ("flat", 3 / 5 * 2 + 0.3, 4 / 5 * 2),
        ("automatic", 2 * 3 / 5.01 + 2 * 0.3 / 0.31, 2 * 4 / 5.01),
        ("per_layer", 2**0.5 + 0.3, 2**0.5),
    ],
)
def test_clipping_rules(rule: str, a: float, b: float) -> None:
    total = oracle.clipped_sum(UNITS, 2.0, rule, groups=[["a"], ["b"]])
    torch.testing.assert_close(torch.stack([total["a"], total["b"]]).view(2), torch.tensor([a, b]))


def test_modules_that_share_a_parameter_are_one_group() -> None:
    model = nn.ModuleDict({"x": nn.Linear(2, 2), "frozen": nn.Linear(2, 2), "y": nn.Linear(2, 2), "z": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    model["z"].weight = model["x"].weight
    assert sorted(map(sorted, oracle.module_groups(model))) == [
        ["x.bias", "x.weight", "z.bias"],
        ["y.bias", "y.weight"],
    ]


def test_the_clipping_norm_lies_between_units() -> None:
    assert oracle.pick_clipping_norm(torch.tensor([9.0, 1.0, 4.0, 3.5])) == pytest.approx(3.5**0.5)
    assert 0 < oracle.pick_clipping_norm(torch.tensor([0.0, 2.0])) < 2


def test_an_error_names_the_parameter_and_how_far_off_it_is() -> None:
    expected = {"layer.weight": torch.ones(4, dtype=torch.float64), "layer.bias": torch.ones(1, dtype=torch.float64)}
    actual = expected | {"layer.bias": torch.tensor([1.0 + 4e-5], dtype=torch.float64)}
    with pytest.raises(AssertionError, match=r"layer.bias: relative error 4e-05"):
        oracle.assert_gradients(actual, expected)
    with pytest.raises(AssertionError, match=r"layer.bias: relative error nan"):
        oracle.assert_gradients(expected | {"layer.bias": torch.tensor([float("nan")])}, expected)
    with pytest.raises(AssertionError, match=r"parameters differ: \['layer.bias'\]"):
        oracle.assert_gradients({"layer.weight": expected["layer.weight"]}, expected)
    with pytest.raises(AssertionError, match="unit norms"):
        oracle.assert_norms(torch.tensor([1.0, 2.0001]), torch.tensor([1.0, 2.0], dtype=torch.float64))
    oracle.assert_gradients({name: g * (1 + 5e-6) for name, g in expected.items()}, expected)


def test_a_loss_across_the_batch_is_seen() -> None:
    """What the check below rests on: where units influence each other, their gradients alone do not add up."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    batch = {"x": torch.randn(6, 3)}
    with pytest.raises(AssertionError, match="relative error"):
        pairs = oracle.unit_gradients(model, squared, batch, [0, 0, 1, 1, 2, 2])
        oracle.assert_gradients(oracle.clipped_sum(pairs, 1e9), oracle.plain_gradients(model, squared, batch))


@pytest.mark.parametrize("case", FAMILIES.values(), ids=lambda case: case.name)
def test_every_case_is_what_it_is_meant_to_be(case: Family) -> None:
    model, batch, loss_fn = case.build()
    plain = oracle.plain_gradients(model, loss_fn, batch)
    examples = oracle.unit_gradients(model, loss_fn, batch)
    users = oracle.unit_gradients(model, loss_fn, batch, case.users)

    assert loss_fn(model, batch).shape == (oracle.batch_size(batch),) == (len(case.users),)
    again = case.build()[0].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items()), "build() is not fixed"

    # No example or user touches another's loss.
    oracle.assert_gradients(oracle.clipped_sum(examples, 1e9), plain, 1e-6)
    oracle.assert_gradients(oracle.clipped_sum(users, 1e9), plain, 1e-6)

    # Every trainable parameter matters, and a C between the norms clips some units and spares others.
    idle = [name for name in plain if oracle.norm(plain, [name]) < 1e-4 * oracle.norm(plain)]
    assert all(name.endswith((*VANISHING, "0.bias")) for name in idle), idle
    for units in (examples, users):
        sizes = oracle.norms(units)
        clipped = sizes > oracle.pick_clipping_norm(sizes)
        assert clipped.any() and not clipped.all()

    # fp32 can meet the tolerance: torch itself, one example at a time, is within half of it.
    single = oracle.unit_gradients(model, loss_fn, batch, dtype=torch.float32)
    clipping_norm = oracle.pick_clipping_norm(oracle.norms(examples))
    exact = oracle.clipped_sum(examples, clipping_norm)
    oracle.assert_gradients(oracle.clipped_sum(single, clipping_norm), exact, oracle.TOLERANCE / 2)


def test_the_cases_cover_what_their_tags_say() -> None:
    for case in FAMILIES.values():
        model, batch, _ = case.build()
        size = oracle.batch_size(batch)
        widths = {value.shape[1] for value in batch.values() if value.dim() > 1}
        assert (size in widths) == ("square" in case.tags), case.name
        assert any(value.is_floating_point() for value in batch.values()) == ("float" in case.tags), case.name
        assert case.tags & {"tokens", "label", "output"}, case.name
        assert model.training, case.name
    assert list(FAMILIES["gpt2"].users) == USERS
    with pytest.raises(AssertionError, match="gpt2"):
        family("gpt2")(lambda: FAMILIES["gpt2"].build())
