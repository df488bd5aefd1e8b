"""What is trained: full, LoRA, prefix, biases, last layers. Clipped sums against the oracle, and what is saved."""

import pytest
import torch
from families import DECODER, ENCODER, GPT2, from_config, next_token_loss, randomize, same_token_loss, tokens
from oracle import assert_gradients, clipped_sum, collect, norms, pick_clipping_norm, unit_gradients

import fastclip
from fastclip.finetune.tuning import TUNINGS, merge, tune

KINDS = {
    "gpt2": ("CausalLM", GPT2 | {"n_positions": 24}, next_token_loss),
    "llama": ("CausalLM", DECODER, next_token_loss),
    "roberta": ("MaskedLM", ENCODER | {"pad_token_id": 1}, same_token_loss),
}


def built(kind, tuning):
    task, settings, loss = KINDS[kind]
    model = tune(from_config(task, kind, **settings), tuning)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    ids = tokens(5, 7)
    return randomize(model), {"input_ids": ids, "labels": ids.clone()}, loss, trained


CASES = [(kind, tuning) for kind in KINDS for tuning in TUNINGS]
CASES = [
    case
    for case in CASES
    if case not in {("roberta", "prefix"), ("llama", "bitfit")}  # no causal model; no biases
]


@pytest.mark.parametrize(("kind", "tuning"), CASES)
def test_every_tuning_clips_exactly(kind, tuning):
    model, batch, loss, trained = built(kind, tuning)
    units = unit_gradients(model, loss, batch)
    assert set(units[0]) == trained and all(float(n) > 0 for n in norms(units))
    C = pick_clipping_norm(norms(units))
    clipper = fastclip.attach(model, max_grad_norm=C)
    loss(model, batch).sum().backward()
    assert_gradients(collect(model), clipped_sum(units, C), 1e-5)
    torch.testing.assert_close(clipper.unit_norms.double(), norms(units), rtol=1e-5, atol=0)


def trained(kind, tuning):
    return built(kind, tuning)[3]


def test_each_trains_what_it_says():
    assert all("lora_" in name for name in trained("gpt2", "lora") | trained("llama", "lora"))
    assert all(name.endswith("bias") for name in trained("gpt2", "bitfit") | trained("roberta", "bitfit"))
    assert all("prompt_encoder" in name for name in trained("gpt2", "prefix"))
    last = trained("gpt2", "last")
    assert "transformer.ln_f.weight" in last and "transformer.wte.weight" not in last
    # The toy models have two blocks; of three the first one stays.
    model = tune(from_config("CausalLM", "gpt2", **(GPT2 | {"n_layer": 3})), "last")
    blocks = {name.split(".")[2] for name, p in model.named_parameters() if ".h." in name and p.requires_grad}
    assert blocks == {"1", "2"}


@pytest.mark.parametrize("tuning", ["lora", "bitfit", "last"])
def test_a_classifiers_new_head_is_always_trained(tuning):
    model = tune(from_config("SequenceClassification", "bert", num_labels=3, **ENCODER), tuning)
    assert model.classifier.weight.requires_grad and model.classifier.bias.requires_grad
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_the_plain_model_again(kind):
    task, settings, _ = KINDS[kind]
    names = list(from_config(task, kind, **settings).state_dict())
    model = built(kind, "lora")[0].eval()
    ids = tokens(2, 6)
    with torch.no_grad():
        before = model(ids).logits
        plain = merge(model)
        torch.testing.assert_close(plain(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert sorted(plain.state_dict()) == sorted(names)


def test_what_cannot_be_tuned_is_refused():
    with pytest.raises(ValueError, match="does not exist: choose one of full, lora"):
        tune(from_config("CausalLM", "gpt2", **GPT2), "magic")
    with pytest.raises(ValueError, match="causal language models, and this is RobertaForMaskedLM"):
        tune(from_config("MaskedLM", "roberta", **ENCODER), "prefix")
    with pytest.raises(ValueError, match="nothing to train in LlamaForCausalLM"):
        tune(from_config("CausalLM", "llama", **DECODER), "bitfit")
    with pytest.raises(ValueError, match="finds none of"):
        tune(torch.nn.Sequential(torch.nn.Linear(2, 2)), "lora")
