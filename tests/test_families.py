"""The engine against the oracle: every family, at example and user level, some units clipped and some not."""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import layer_cases
import oracle
import pytest
import torch
from families import FAMILIES, Family
from oracle import Batch, Gradients
from torch import nn

import fastclip
from fastclip import ops, tape
from fastclip.layers import normalization

LEVELS = ("example", "user_sum", "user_mean")
FREE = 1e6  # a C that clips nobody
every_family = pytest.mark.parametrize("case", FAMILIES.values(), ids=lambda case: case.name)


def families(*names: str) -> Any:
    """Parametrize `case` over these families."""
    return pytest.mark.parametrize("case", [FAMILIES[name] for name in names], ids=names)


@functools.lru_cache(maxsize=8)
def exact_units(case: Family, level: str = "example") -> list[Gradients]:
    model, batch, loss_fn = case.build()
    if level == "example":
        return oracle.unit_gradients(model, loss_fn, batch)
    return oracle.unit_gradients(model, loss_fn, batch, case.users, level.removeprefix("user_"))


@pytest.fixture(autouse=True)
def announced_loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """A case tagged "loop" may say that it runs example by example; from any other that warning is an error."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with warnings.catch_warnings():
        if "case" in params and "loop" in params["case"].tags:
            warnings.filterwarnings("ignore", "fastclip runs .* example by example", UserWarning)
        yield


def backward(
    clipper: fastclip.Clipper,
    model: nn.Module,
    loss_fn: oracle.LossFn,
    batch: Batch,
    reduce: Callable[[torch.Tensor], torch.Tensor] = torch.sum,
    users: Sequence[int] | None = None,
    reduction: str = "sum",
) -> None:
    """One forward and one plain backward; without users each example is a unit and nothing is said."""
    units = nullcontext() if users is None else clipper.units(ids=torch.tensor(users), reduction=reduction)
    with units:
        reduce(loss_fn(model, batch)).backward()


def at_level(case: Family, level: str) -> dict[str, Any]:
    return {} if level == "example" else {"users": case.users, "reduction": level.removeprefix("user_")}


@pytest.mark.parametrize("level", LEVELS)
@every_family
def test_norms_and_clipped_gradients(case: Family, level: str) -> None:
    units = exact_units(case, level)
    sizes = oracle.norms(units)
    clipping_norm = oracle.pick_clipping_norm(sizes)
    model, batch, loss_fn = case.build()
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm)
    backward(clipper, model, loss_fn, batch, **at_level(case, level))
    oracle.assert_norms(clipper.unit_norms, sizes)
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, clipping_norm))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@families("llama", "bert_mlm")
def test_layers_of_one_input_share_its_products(case: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v, and gate and up: fewer products of rows with themselves than layers."""
    calls: list[int] = []
    norms = tape.ops.linear_norms

    def counting(a: torch.Tensor, g: Sequence[torch.Tensor], *rest: Any, **named: Any) -> torch.Tensor:
        calls.append(len(g))
        return norms(a, g, *rest, **named)

    model, batch, loss_fn = case.build()
    fastclip.attach(model, max_grad_norm=FREE)
    monkeypatch.setattr(tape.ops, "linear_norms", counting)
    loss_fn(model, batch).sum().backward()
    assert 3 in calls and sum(calls) >= len(calls) + 4


@pytest.mark.parametrize("level", ["example", "user_mean"])
@families("gpt2_padded", "gpt2_half_frozen", "bert_mlm", "vit", "gpt_neox")
def test_layer_norms_by_one_kernel(case: Family, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the op in plain torch."""
    called = []
    run = ops.layer_norm_backward
    monkeypatch.setattr(normalization, "_is_fused", lambda x, shape: True)
    monkeypatch.setattr(ops, "layer_norm_backward", lambda *args: called.append(1) or run(*args))
    model, batch, loss_fn = case.build()
    units = exact_units(case, level)
    clipping_norm = oracle.pick_clipping_norm(oracle.norms(units))
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm)
    users = None if level == "example" else case.users
    backward(clipper, model, loss_fn, batch, users=users, reduction="mean")
    oracle.assert_norms(clipper.unit_norms, oracle.norms(units))
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, clipping_norm))
    assert called


@every_family
def test_a_large_clipping_norm_gives_the_plain_backward(case: Family) -> None:
    model, batch, loss_fn = case.build()
    plain = oracle.plain_gradients(model, loss_fn, batch)
    clipper = fastclip.attach(model, max_grad_norm=FREE)
    backward(clipper, model, loss_fn, batch)
    oracle.assert_gradients(oracle.collect(model), plain)


@pytest.mark.parametrize("level", LEVELS)
@families("gpt2", "llama_padded", "roberta_classifier", "conv1d", "parameter_token")
def test_a_mean_over_the_examples_is_undone(case: Family, level: str) -> None:
    units = exact_units(case, level)
    clipping_norm = oracle.pick_clipping_norm(oracle.norms(units))
    model, batch, loss_fn = case.build()
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm, loss_reduction="mean")
    backward(clipper, model, loss_fn, batch, torch.mean, **at_level(case, level))
    oracle.assert_norms(clipper.unit_norms, oracle.norms(units))
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, clipping_norm))


@pytest.mark.parametrize("level", ["example", "user_sum"])
@pytest.mark.parametrize("rule", ["automatic", "per_layer"])
@families(
    "gpt2", "gpt2_half_frozen", "llama_grouped_query", "t5", "lora_gpt2", "linear_shared_weight", "attention_cross"
)
def test_other_clipping_rules(case: Family, rule: str, level: str) -> None:
    units = exact_units(case, level)
    clipping_norm = oracle.pick_clipping_norm(oracle.norms(units))
    model, batch, loss_fn = case.build()
    groups = oracle.module_groups(model)
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm, clipping=rule)
    backward(clipper, model, loss_fn, batch, **at_level(case, level))
    oracle.assert_norms(clipper.unit_norms, oracle.norms(units))
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, clipping_norm, rule, groups))


@families("gpt2", "bert_mlm", "gpt2_checkpoint_reentrant", "t5", "vit", "linear_repeated", "parameter_positions")
def test_two_backward_calls_add_up(case: Family) -> None:
    units = exact_units(case)
    sizes = oracle.norms(units)
    clipping_norm = oracle.pick_clipping_norm(sizes)
    model, batch, loss_fn = case.build()
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm)
    for examples in ([0, 1], [2, 3, 4]):
        backward(clipper, model, loss_fn, oracle.take(batch, examples))
        oracle.assert_norms(clipper.unit_norms, sizes[examples])
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, clipping_norm))


CHANGING = families(
    *("gpt2", "llama_given_positions", "bert_mlm", "t5", "vit", "lora_gpt2", "linear_repeated", "linear_broadcast"),
    *("embedding_flat_positions", "embedding_given_positions", "embedding_bag_mean", "conv1d", "attention_time_first"),
    *("linear_flattened", "parameter_scale", "parameter_positions_flat", "parameter_token", "parameter_products"),
)


@pytest.mark.parametrize("first", [[2], [2, 0]], ids=["one", "two"])
@CHANGING
def test_batches_of_other_sizes(case: Family, first: list[int]) -> None:
    """The first batch, from which the engine learns the layout, is small; the next has every example, in another order."""
    units = exact_units(case)
    sizes = oracle.norms(units)
    clipping_norm = oracle.pick_clipping_norm(sizes)
    model, batch, loss_fn = case.build()
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm)
    for examples in (first, [4, 3, 2, 1, 0]):
        model.zero_grad()
        backward(clipper, model, loss_fn, oracle.take(batch, examples))
        oracle.assert_norms(clipper.unit_norms, sizes[examples])
        clipped = oracle.clipped_sum([units[u] for u in examples], clipping_norm)
        oracle.assert_gradients(oracle.collect(model), clipped)


@families(
    "gpt2", "llama_padded", "bert_mlm", "embedding_flat_positions", "linear_3d", "rms_norm", "attention_time_first"
)
def test_a_later_batch_as_long_as_it_is_wide(case: Family) -> None:
    """T = 7 at first, then T = B = 5, then T = 2."""
    model, batch, loss_fn = case.build()
    cut = [{name: value[:, :length] for name, value in batch.items()} for length in (7, 5, 2)]
    exact = [oracle.unit_gradients(model, loss_fn, part) for part in cut]
    clipper = fastclip.attach(model, max_grad_norm=FREE)
    for part, units in zip(cut, exact, strict=True):
        model.zero_grad()
        backward(clipper, model, loss_fn, part)
        oracle.assert_norms(clipper.unit_norms, oracle.norms(units))
        oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, FREE))


# Rows that are not the batch's: an error, however well their number fits.


class Rearranged(nn.Module):
    """A head on rows that are not those of the examples in order: flattened time-major, or picked by the data."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.table(ids)
        if self.how == "time_major":
            return self.head(h.transpose(0, 1).reshape(-1, 6)).view(ids.shape[1], -1).t()
        picked = ids == 1
        values = self.head(h[picked])[:, 0]
        return h.new_zeros(ids.shape).masked_scatter(picked, values) * torch.arange(1, 1 + ids.shape[1])


@pytest.mark.parametrize("counts", [[1, 1, 1, 2, 0], [1, 1, 1, 1, 1], [2, 2, 2, 3, 1], [1, 2, 0, 1, 1]], ids=str)
def test_rows_picked_by_the_data_are_refused_or_right(counts: list[int]) -> None:
    """B rows in all (or 2 B), as if each example had one (or two)."""
    ids = torch.full((5, 7), 2)
    for example, count in enumerate(counts):
        ids[example, 1 : 1 + count] = 1
    refused_or_right(Rearranged("picked"), {"ids": ids})


@pytest.mark.parametrize("ids", [[[1], [2], [3], [4], [5]], [[1, 1], [2, 3], [4, 5], [6, 7], [8, 9]]], ids=str)
def test_examples_that_mix_are_refused(ids: list[list[int]]) -> None:
    """The first example reads the same backwards: the trial batch that shows mixing has to differ in another way."""

    class Centred(Rearranged):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.table(ids)
            return self.head(h - h.mean(0))[:, :, 0]

    model = layer_cases.randomize(Centred(""))
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="not independent"):
        backward(clipper, model, lambda model, batch: model(batch["ids"]).sum(1), {"ids": torch.tensor(ids)})
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("length", [5, 7])
def test_rows_flattened_time_major_are_refused_or_right(length: int) -> None:
    refused_or_right(Rearranged("time_major"), {"ids": torch.arange(5 * length).view(5, length) % 11})


def refused_or_right(model: nn.Module, batch: Batch) -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        return (model(batch["ids"]) - 1).square().sum(1)

    units = oracle.unit_gradients(layer_cases.randomize(model), loss_fn, batch)
    clipping_norm = oracle.pick_clipping_norm(oracle.norms(units))
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm)
    try:
        backward(clipper, model, loss_fn, batch)
    except (ValueError, RuntimeError) as refusal:
        assert "head" in str(refusal), refusal
        assert all(p.grad is None for p in model.parameters())
        return
    oracle.assert_norms(clipper.unit_norms, oracle.norms(units))
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, clipping_norm))


# One unit with inf or NaN.


def weighted(loss_fn: oracle.LossFn, weights: torch.Tensor) -> oracle.LossFn:
    return lambda model, batch: loss_fn(model, batch) * weights


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@families("gpt2", "llama", "bert_mlm", "t5", "albert_mlm", "embedding_bag_mean", "attention_time_first", "group_norm")
def test_a_nonfinite_loss_is_left_out(case: Family, value: float, level: str) -> None:
    check_without(case, 2, level, lambda batch: batch, torch.ones(5).index_fill(0, torch.tensor(2), value))


# Layers whose first step is tanh of the input are not among them: at inf it is flat and the gradient is finite.
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@families(
    *("gpt2_inputs_embeds", "vit", "linear_3d", "linear_repeated", "rms_norm", "conv1d", "conv2d", "group_norm"),
    *("instance_norm", "attention_batch_first", "transformer_encoder_layer", "parameter_scale", "parameter_token"),
    "parameter_products",
)
def test_a_nonfinite_input_is_left_out(case: Family, value: float) -> None:
    def spoil(batch: Batch) -> Batch:
        name = next(name for name, tensor in batch.items() if tensor.is_floating_point())
        spoiled = batch[name].clone()
        spoiled[1].view(-1)[4] = value
        return batch | {name: spoiled}

    check_without(case, 1, "example", spoil, torch.ones(5))


def check_without(case: Family, bad: int, level: str, spoil: Callable[[Batch], Batch], weights: torch.Tensor) -> None:
    """The unit of example `bad` has factor 0 and is counted; the others are as if it were not there."""
    names = range(5) if level == "example" else case.users
    keep = [u for u, examples in enumerate(oracle.units_of(names)) if bad not in examples]
    units = [exact_units(case, level)[u] for u in keep]
    sizes = oracle.norms(units)
    clipping_norm = oracle.pick_clipping_norm(sizes)
    model, batch, loss_fn = case.build()
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm)
    backward(clipper, model, weighted(loss_fn, weights), spoil(batch), **at_level(case, level))
    assert int(clipper.nonfinite_units) == 1
    oracle.assert_norms(clipper.unit_norms[keep], sizes)
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, clipping_norm))


# bf16 autocast.


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def under_autocast(loss_fn: oracle.LossFn) -> oracle.LossFn:
    def run(model: nn.Module, batch: Batch) -> torch.Tensor:
        with autocast():
            return loss_fn(model, batch)

    return run


AUTOCAST = families("gpt2", "llama", "roberta_classifier", "t5", "lora_gpt2", "linear_3d", "conv1d", "attention_cross")


@AUTOCAST
def test_bf16_norms_are_those_of_the_gradients_that_are_summed(case: Family) -> None:
    """Each unit's loss alone, nothing clipped: p.grad is the unit's gradient, with the norm reported for the batch."""
    model, batch, loss_fn = case.build()
    clipper = fastclip.attach(model, max_grad_norm=FREE)
    backward(clipper, model, under_autocast(loss_fn), batch)
    reported = clipper.unit_norms.clone()
    sums = []
    for u in range(len(reported)):
        model.zero_grad()
        backward(clipper, model, under_autocast(loss_fn), batch, lambda losses, u=u: losses[u])
        sums.append(oracle.collect(model))
    oracle.assert_norms(reported, oracle.norms(sums))


@AUTOCAST
def test_bf16_errors_are_at_most_twice_those_of_torch(case: Family) -> None:
    """Against fp64; torch runs each unit alone under the same autocast, the engine all of them at once."""
    model, batch, loss_fn = case.build()
    exact = exact_units(case)
    torchs = oracle.unit_gradients(model, under_autocast(loss_fn), batch, dtype=torch.float32)
    off = [oracle.norm({name: t[name] - e[name] for name in e}) for t, e in zip(torchs, exact, strict=True)]
    clipping_norm = oracle.pick_clipping_norm(oracle.norms(exact))
    expected = oracle.clipped_sum(exact, clipping_norm)
    allowed = 2 * oracle.errors(oracle.clipped_sum(torchs, clipping_norm), expected)[""]
    assert 1e-4 < allowed < 0.2, "the comparison is void unless bf16 rounds and still resembles the gradient"

    clipper = fastclip.attach(model, max_grad_norm=clipping_norm)
    backward(clipper, model, under_autocast(loss_fn), batch)
    assert oracle.errors(oracle.collect(model), expected)[""] <= allowed
    assert bool(((clipper.unit_norms - oracle.norms(exact)).abs() <= 2 * torch.tensor(off)).all())


# Packed rows.


class RowWise(nn.Module):
    """Rows [N] or [1, N] of ids to logits, each row by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 9)
        self.head = nn.Linear(9, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.norm(self.table(ids))).tanh())


def row_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(batch["ids"])
    return nn.functional.cross_entropy(logits.reshape(-1, 5), batch["labels"].reshape(-1), reduction="none")


@pytest.mark.parametrize("offsets", [[0, 3, 9], [0, 4, 4, 5, 9], [0, 0, 7, 8, 9, 9]], ids=str)
@pytest.mark.parametrize("leading", [False, True], ids=["N", "1N"])
def test_packed_segments(leading: bool, offsets: list[int]) -> None:
    model = layer_cases.randomize(RowWise())
    generator = torch.Generator().manual_seed(5)
    shape = (1, 9) if leading else (9,)
    batch = {name: torch.randint(5, shape, generator=generator) for name in ("ids", "labels")}
    units = oracle.segment_gradients(model, row_losses, batch, offsets, dim=int(leading))
    clipping_norm = oracle.pick_clipping_norm(oracle.norms(units))
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm)
    with clipper.units(offsets=torch.tensor(offsets, dtype=torch.int32)):
        row_losses(model, batch).sum().backward()
    oracle.assert_norms(clipper.unit_norms, oracle.norms(units))
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, clipping_norm))


# Units whose rows cancel: the plain Gram of such a unit in fp32 comes out far too small, even negative.


def inner(y: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """[B]: a loss with gradient g at y."""
    return (y * g).flatten(1).sum(1)


class Once(nn.Module):
    def __init__(self, d: int, p: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d, p, bias=False)

    def forward(self, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return inner(self.layer(a), g)


class Twice(Once):
    """Rows that cancel lie in two calls of one layer."""

    def forward(self, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        half = a.shape[1] // 2
        return inner(self.layer(a[:, :half]), g[:, :half]) + inner(self.layer(a[:, half:]), g[:, half:])


class Tied(nn.Module):
    """Rows that cancel lie in an embedding and in the head that shares its table."""

    def __init__(self, d: int, p: int) -> None:
        super().__init__()
        self.table = nn.Embedding(p, d)
        self.head = nn.Linear(d, p, bias=False)
        self.head.weight = self.table.weight

    def forward(self, a: torch.Tensor, ids: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        half = a.shape[1] // 2
        return inner(self.table(ids), a[:, :half]) + inner(self.head(a[:, half:]), z)


BITS = [0, 3, 8, 13, 18, 22]


def cancelling(kind: type[nn.Module], d: int, p: int) -> Batch:
    """Example u's rows come in pairs whose products sum to 2^-BITS[u] of one of them; in example 0 none cancels."""
    generator = torch.Generator().manual_seed(6)
    shape = (len(BITS), 8)
    rest = (1 - torch.tensor([2.0**-bits for bits in BITS])).view(-1, 1, 1)
    a, g = torch.randn(*shape, d, generator=generator), torch.randn(*shape, p, generator=generator)
    if kind is not Tied:
        return {"a": torch.cat([a, a], 1), "g": torch.cat([g, -g * rest], 1)}
    ids = torch.randint(p, shape, generator=generator)
    return {"a": torch.cat([a, -a * rest], 1), "ids": ids, "z": nn.functional.one_hot(ids, p).float()}


def rounding(bits: int) -> float:
    """What rounding to fp32 may add to such a clipped sum, relative to C: about 2^-20 of what is summed.

    Never more than 2^-8, which the optimizer charges to the noise: beyond that the unit's norm has to be raised.
    """
    return min(2.0 ** (bits - 20), 2.0**-8)


def direct(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch)


@pytest.mark.parametrize(("d", "p"), [(40, 48), (5, 7)], ids=["wide", "narrow"])
@pytest.mark.parametrize("kind", [Once, Twice, Tied])
def test_cancelling_rows_are_neither_underestimated_nor_let_through(kind: type[nn.Module], d: int, p: int) -> None:
    """Wide layers take the Gram route here; narrow ones are materialised, and their norm is of the rounded gradient applied."""
    batch = cancelling(kind, d, p)
    model = kind(d, p)
    exact = oracle.norms(oracle.unit_gradients(model, direct, batch))
    clipping_norm = float(exact.min()) / 2
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm)
    backward(clipper, model, direct, batch)
    norms = clipper.unit_norms.double()
    magnitude = exact[0]
    assert exact[-1] < 1e-5 * magnitude, "the last unit does not cancel"
    rounded = 16 * 2.0**-24 * magnitude if d < 8 else 0.0
    assert bool((norms >= exact * (1 - 1e-6) - rounded).all()), (norms, exact)
    assert bool((norms <= exact * (1 + 1e-5) + 1e-5 * magnitude).all()), (norms, exact)
    for u in range(len(BITS)):
        model.zero_grad()
        backward(clipper, model, direct, batch, lambda losses, u=u: losses[u])
        contribution = oracle.norm(oracle.collect(model)) / clipping_norm
        assert contribution <= 1 + 1e-5 + (0.0 if d < 8 else rounding(BITS[u])), (BITS[u], contribution)
