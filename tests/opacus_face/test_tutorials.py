"""Opacus' tutorials, run with Opacus and with fastclip.opacus: under one seed the same training and the same epsilon.

Losses and parameters are compared without noise. What plain Opacus cannot run, or runs wrongly, is compared with gradients
taken one example at a time and clipped instead.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch.nn.functional import cross_entropy

opacus = pytest.importorskip("opacus", reason="opacus is not installed: pip install fastclip-dp[opacus]")
for name in ("peft", "transformers"):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install fastclip-dp[test]")
face = importlib.import_module("fastclip.opacus")

from opacus_face.tutorials import bert_snli, char_lstm, cnn, lora, text_lstm, text_transformer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha:UserWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:GDP accounting is experimental:UserWarning"),
    # The scripts are seeded so that they can be compared.
    pytest.mark.filterwarnings("ignore:torch.manual_seed:UserWarning"),
]

SEED = 3
EMPTY_BATCHES = {"size": 24, "batch_size": 2}
# Exactly zero by symmetry: what rounding leaves there, Adam makes as large as anything else.
VANISHING = ("key.bias", "klinear.bias")

# The hidden state [layers * directions, B, H] has its examples in another dimension than the ids: batch_first is believed.
untried = pytest.mark.filterwarnings("ignore:whether examples are independent in this model was not tried:UserWarning")

Case = tuple[Any, dict[str, Any]]


def cases(*listed: Case) -> list[Any]:
    return [pytest.param(*case, marks=untried if case[0] is char_lstm else ()) for case in listed]


def described(case: Any) -> str:
    if isinstance(case, dict):
        return " ".join(f"{key}={value}" for key, value in case.items()) or "as it is"
    return "face" if case is face else case.__name__.rpartition(".")[2]


def updates(result: dict[str, Any]) -> oracle.Gradients:
    """What training changed, by parameter, in fp64."""
    return {
        name: p.double() - result["initial"][name].double()
        for name, p in result["parameters"].items()
        if not name.endswith(VANISHING)
    }


def assert_same_training(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("losses", "test_losses", "accuracies"):
        if key in expected:
            values = [torch.tensor(result[key], dtype=torch.float64) for result in (ours, expected)]
            torch.testing.assert_close(*values, rtol=1e-4, atol=0.0, equal_nan=True)
    oracle.assert_gradients(updates(ours), updates(expected), tolerance=1e-4)


# Mode "ew" with empty batches is in neither: torch's expanded weights refuse them.
BOTH = cases(
    *((cnn, {"grad_sample_mode": mode}) for mode in ("hooks", "functorch", "ew", "ghost")),
    *((cnn, {"grad_sample_mode": mode, "wrap_model": False}) for mode in ("hooks", "ghost")),
    *((cnn, {"grad_sample_mode": mode, "clipping": "per_layer"}) for mode in ("hooks", "ew")),
    *((cnn, {"grad_sample_mode": mode, **EMPTY_BATCHES}) for mode in ("hooks", "ghost")),
    *((text_lstm, {"grad_sample_mode": mode}) for mode in ("hooks", "functorch", "ghost")),
    (text_lstm, {"recurrent": "DPGRU"}),
    (text_transformer, {}),
    *(
        (char_lstm, {"layout": layout, **options})
        for layout in ("padded", "sorted")
        for options in ({}, {"layers": 2, "bidirectional": True}, {"grad_sample_mode": "ghost"})
    ),
    (bert_snli, {}),
    (bert_snli, {"dropout": 0.1}),
    *((lora, {"base": base, "grad_sample_mode": mode}) for base in ("roberta", "gpt2") for mode in ("hooks", "ghost")),
    (lora, {"dropout": 0.1}),
)


@pytest.mark.parametrize(("tutorial", "options"), BOTH, ids=described)
def test_both_train_alike(tutorial: Any, options: dict[str, Any]) -> None:
    theirs, ours = (tutorial.run(library, noise_multiplier=0.0, seed=SEED, **options) for library in (opacus, face))
    assert_same_training(ours, theirs)


TUTORIALS = [cnn, text_lstm, text_transformer, pytest.param(char_lstm, marks=untried), lora]


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=described)
def test_both_spend_alike(tutorial: Any, accountant: str) -> None:
    theirs, ours = (
        tutorial.run(library, noise_multiplier=1.1, seed=SEED, accountant=accountant) for library in (opacus, face)
    )
    assert 0 < theirs["epsilon"] < math.inf
    assert ours["epsilon"] == pytest.approx(theirs["epsilon"], rel=1e-6)


@pytest.mark.parametrize("accountant", ["rdp", pytest.param("prv", marks=pytest.mark.slow)])
def test_both_find_the_noise_for_an_epsilon(accountant: str) -> None:
    theirs, ours = (
        bert_snli.run(library, noise_multiplier=None, seed=SEED, accountant=accountant) for library in (opacus, face)
    )
    assert ours["sigma"] == pytest.approx(theirs["sigma"], rel=1e-6)
    assert ours["epsilon"] == pytest.approx(theirs["epsilon"], rel=1e-6)
    assert ours["epsilon"] <= 6.0


# --- one example at a time -------------------------------------------------------------------------------------------


def cnn_losses(model: Any, batch: oracle.Batch) -> torch.Tensor:
    return cross_entropy(model(batch["0"]), batch["1"], reduction="none")


def char_losses(model: Any, batch: oracle.Batch) -> torch.Tensor:
    logits = model(batch["0"], batch["1"], model.init_hidden(len(batch["0"])))
    return cross_entropy(logits, batch["2"], reduction="none")


def labelled_losses(model: Any, batch: oracle.Batch) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


LOSSES = {
    cnn: cnn_losses,
    text_lstm: cnn_losses,
    text_transformer: cnn_losses,
    char_lstm: char_losses,
    bert_snli: labelled_losses,
    lora: labelled_losses,
}


def one_by_one(tutorial: Any, loader_options: dict[str, Any], architecture: dict[str, Any]) -> dict[str, Any]:
    """One epoch of the tutorial on its own batches, with gradients of one example after the other, clipped and added up."""
    model, loader = tutorial.make_model(face, SEED, **architecture), tutorial.make_loader(SEED, **loader_options)
    optimizer = tutorial.make_optimizer(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    expected_size = int(len(loader.dataset) / len(loader))
    # Opacus' recurrent layers hold the last states of packed sequences in fp32 whatever the model's dtype.
    dtype = torch.float32 if tutorial is char_lstm else torch.float64
    losses, sizes = [], []
    for drawn in opacus.data_loader.DPDataLoader.from_data_loader(loader):
        batch = drawn if isinstance(drawn, dict) else {str(i): value for i, value in enumerate(drawn)}
        optimizer.zero_grad()
        with torch.no_grad():
            losses.append(LOSSES[tutorial](model, batch).mean().item())
        units = oracle.unit_gradients(model, LOSSES[tutorial], batch, dtype=dtype)
        sizes += [oracle.norm(unit) for unit in units]
        total = oracle.clipped_sum(units, tutorial.MAX_GRAD_NORM) if units else {}
        for name, p in parameters.items():
            p.grad = (total[name] / expected_size).to(p.dtype) if units else torch.zeros_like(p)
        optimizer.step()
    # Else a norm that is wrong would not show.
    assert min(sizes) < tutorial.MAX_GRAD_NORM < max(sizes), (min(sizes), max(sizes))
    return {"losses": losses, "initial": initial, "parameters": {name: p.detach() for name, p in parameters.items()}}


def assert_trains_as_one_by_one(tutorial: Any, options: dict[str, Any]) -> None:
    loader_options = {key: value for key, value in options.items() if key in ("size", "batch_size", "layout")}
    architecture = {key: options[key] for key in options if key not in ("size", "batch_size", "grad_sample_mode")}
    expected = one_by_one(tutorial, loader_options, architecture)
    if tutorial in (cnn, bert_snli):
        options = {**options, "max_physical_batch_size": 1000}  # one loss for each logical batch
    epochs = range(1) if tutorial is cnn else 1
    assert_same_training(tutorial.run(face, noise_multiplier=0.0, seed=SEED, epochs=epochs, **options), expected)


# Where Opacus' gradients are right too.
RIGHT = cases(
    (cnn, {}),
    (cnn, {"grad_sample_mode": "ghost", **EMPTY_BATCHES}),
    (text_lstm, {}),
    (text_transformer, {}),
    # Opacus' attention with batch_first and several heads is not torch's; trained it must be as it is.
    (text_transformer, {"heads": 2}),
    (char_lstm, {"layout": "sorted"}),
    (bert_snli, {}),
    (lora, {"grad_sample_mode": "ghost"}),
)


@pytest.mark.parametrize(("tutorial", "options"), RIGHT, ids=described)
def test_trains_as_one_example_at_a_time(tutorial: Any, options: dict[str, Any]) -> None:
    assert_trains_as_one_by_one(tutorial, options)


# What Opacus refuses, or gets wrong.
BEYOND = cases(
    # "expected groups to be greater than 0": its functional form of a convolution takes no empty batch.
    (cnn, {"grad_sample_mode": "functorch", **EMPTY_BATCHES}),
    # The padding row receives gradient and counts in the norm.
    *((text_lstm, {"padding_idx": 0, "grad_sample_mode": mode}) for mode in ("hooks", "ghost")),
    # "view size is not compatible": its norm of an embedding takes no expanded ids.
    (text_transformer, {"grad_sample_mode": "ghost"}),
    # "stack expects each tensor to be equal size": one row of ids for the whole batch.
    *((text_transformer, {"positions": "broadcast", "grad_sample_mode": mode}) for mode in ("hooks", "ghost")),
    (bert_snli, {"trainable": "all"}),
    # The recurrent layer's gradients come in the order of lengths, the embedding's in the batch's: norms mix examples.
    *(
        (char_lstm, {"layout": "unsorted", **options})
        for options in ({}, {"layers": 2, "bidirectional": True}, {"grad_sample_mode": "ghost"})
    ),
)


@pytest.mark.parametrize(("tutorial", "options"), BEYOND, ids=described)
def test_trains_as_one_example_at_a_time_where_opacus_does_not(tutorial: Any, options: dict[str, Any]) -> None:
    assert_trains_as_one_by_one(tutorial, options)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize(("first", "then"), [(face, face), (opacus, face), (face, opacus)], ids=described)
def test_a_run_goes_on_from_a_checkpoint_of_either(first: Any, then: Any, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    options = {"noise_multiplier": 0.0, "seed": SEED, "grad_sample_mode": mode}
    whole = cnn.run(opacus, **options)
    begun = cnn.run(first, **options, epochs=range(1), save_to=path)
    resumed = cnn.run(then, **options, epochs=range(1, 2), resume_from=path)
    together = {key: begun[key] + resumed[key] for key in ("losses", "test_losses", "accuracies")}
    assert_same_training({**resumed, **together}, whole)


@pytest.mark.parametrize(("first", "then"), [(face, face), (opacus, face), (face, opacus)], ids=described)
def test_a_checkpoint_carries_what_was_spent(first: Any, then: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    options = {"noise_multiplier": 0.9, "seed": SEED}
    whole = cnn.run(opacus, **options)
    cnn.run(first, **options, epochs=range(1), save_to=path)
    resumed = cnn.run(then, **options, epochs=range(1, 2), resume_from=path)
    assert resumed["epsilon"] == pytest.approx(whole["epsilon"], rel=1e-6)
