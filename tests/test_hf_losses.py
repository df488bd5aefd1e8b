"""Losses of encoder-decoders and of infilling, and which model takes which."""

from functools import partial

import pytest
import torch
from families import BERT, DECODER, DISTILBERT, FAMILIES, GPT2, IGNORED, ROBERTA, VOCAB, from_config, lora, tokens
from oracle import assert_gradients, clipped_sum, collect, norms, pick_clipping_norm, unit_gradients
from torch import nn

import fastclip
from fastclip import head
from fastclip.huggingface import (
    causal_lm_losses,
    classification_losses,
    default_losses,
    infilling_losses,
    masked_lm_losses,
    seq2seq_losses,
)

T5 = {"vocab_size": VOCAB, "d_model": 24, "d_kv": 6, "d_ff": 37, "num_layers": 2, "num_heads": 4, "use_cache": False}
T5 |= {"relative_attention_num_buckets": 8, "pad_token_id": 0, "decoder_start_token_id": 0}
BART = {"vocab_size": VOCAB, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 16}
BART |= {"pad_token_id": 1, "decoder_start_token_id": 2, "use_cache": False}
MASK, WORDS = 4, (7, 9, 11)


def pairs():
    labels = tokens(3, 5, seed=2)
    labels[1, 3:] = IGNORED
    labels[2, 1:] = IGNORED
    return {"input_ids": tokens(3, 7), "labels": labels}


def template():
    ids = tokens(5, 7, low=5)
    ids[torch.arange(5), torch.tensor([1, 3, 0, 6, 2])] = MASK
    return {"input_ids": ids, "labels": torch.tensor([0, 2, 1, 1, 0])}


infilling = partial(infilling_losses, mask_token_id=MASK, label_words=WORDS)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("kind", "settings"), [("t5", T5), ("bart", BART)])
def test_seq2seq_losses_are_what_transformers_computes_for_each_pair_alone(kind, settings, reduction):
    model, batch = from_config("Seq2SeqLM", kind, **settings).eval(), pairs()
    losses = seq2seq_losses(model, batch, reduction=reduction)
    assert losses.shape == (3,) and losses.dtype == torch.float32
    for row, length in enumerate([5, 3, 1]):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        expected = model(**alone).loss * (1 if reduction == "mean" else length)
        torch.testing.assert_close(losses[row], expected)


def test_seq2seq_takes_the_decoder_inputs_that_are_given():
    model, batch = from_config("Seq2SeqLM", "t5", **T5).eval(), pairs()
    shifted = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    torch.testing.assert_close(
        seq2seq_losses(model, batch | {"decoder_input_ids": shifted}), seq2seq_losses(model, batch)
    )
    other = seq2seq_losses(model, batch | {"decoder_input_ids": shifted.flip(0)})
    assert not torch.allclose(other, seq2seq_losses(model, batch))


def test_seq2seq_needs_labels_and_a_decoder():
    with pytest.raises(ValueError, match="no labels"):
        seq2seq_losses(nn.Linear(1, 1), {"input_ids": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="decoder_input_ids"):
        seq2seq_losses(nn.Linear(1, 1), pairs())


def test_infilling_is_cross_entropy_over_the_label_words_at_the_mask():
    model, batch = from_config("MaskedLM", "roberta", **ROBERTA).eval(), template()
    losses = infilling(model, batch)
    logits = model(input_ids=batch["input_ids"]).logits
    for row, place in enumerate([1, 3, 0, 6, 2]):
        log_p = logits[row, place, list(WORDS)].log_softmax(0)
        torch.testing.assert_close(losses[row], -log_p[batch["labels"][row]])


@pytest.mark.parametrize("task", ["infilling", "seq2seq"])
def test_clipped_gradients_of_these_losses_match_the_oracle(task):
    if task == "infilling":
        model, batch, losses = from_config("MaskedLM", "bert", **BERT), template(), infilling
    else:
        model, batch, losses = from_config("Seq2SeqLM", "t5", **T5), pairs(), seq2seq_losses
    units = unit_gradients(model, losses, batch)
    C = pick_clipping_norm(norms(units))
    fastclip.check_units(model, losses, batch)
    clipper = fastclip.attach(model, max_grad_norm=C)
    losses(model, batch).sum().backward()
    assert_gradients(collect(model), clipped_sum(units, C))
    clipper.detach()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_infilling_takes_the_heads_logits_at_the_masks_alone(kind, monkeypatch):
    settings = {"bert": BERT, "roberta": ROBERTA, "distilbert": DISTILBERT}[kind]
    model, batch, users = from_config("MaskedLM", kind, **settings), template(), [4, 2, 4, 1, 2]
    units = unit_gradients(model, infilling, batch, users)
    C = pick_clipping_norm(norms(units))
    clipper = fastclip.attach(model, max_grad_norm=C)
    rows = []
    linear = head.linear
    monkeypatch.setattr(head, "linear", lambda site, x, *rest: rows.append(x.shape) or linear(site, x, *rest))
    for _ in range(2):
        model.zero_grad()
        with clipper.units(ids=users):
            infilling(model, batch).sum().backward()
        assert_gradients(collect(model), clipped_sum(units, C))
    assert [shape[0] for shape in rows] == [5, 5]


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        ({"input_ids": tokens(5, 7, low=5)}, {}, "exactly one mask"),
        ({"input_ids": torch.full((5, 7), MASK)}, {}, "exactly one mask"),
        ({"labels": torch.zeros(5, 7, dtype=torch.long)}, {}, "the class of each row"),
        ({"labels": torch.zeros(5)}, {}, "the class of each row"),
        ({}, {"label_words": (7,)}, "label_words"),
        ({}, {"label_words": (7, 7)}, "label_words"),
    ],
)
def test_infilling_refuses_other_forms(change, options, named):
    model = from_config("MaskedLM", "bert", **BERT)
    with pytest.raises(ValueError, match=named):
        infilling(model, template() | change, **options)


@pytest.mark.parametrize(
    ("task", "kind", "settings", "losses"),
    [
        ("CausalLM", "gpt2", GPT2, causal_lm_losses),
        ("CausalLM", "llama", DECODER, causal_lm_losses),
        ("MaskedLM", "roberta", ROBERTA, masked_lm_losses),
        ("SequenceClassification", "bert", BERT, classification_losses),
        ("SequenceClassification", "gpt2", GPT2, classification_losses),
        ("Seq2SeqLM", "t5", T5, seq2seq_losses),
        ("Seq2SeqLM", "bart", BART, seq2seq_losses),
    ],
)
def test_the_class_of_the_model_decides(task, kind, settings, losses):
    assert default_losses(from_config(task, kind, **settings)) is losses


def test_adapters_and_subclasses_count_as_what_they_are():
    assert default_losses(lora("llama", DECODER, ["q_proj"])[0]) is causal_lm_losses
    model = from_config("CausalLM", "gpt2", **GPT2)
    model.__class__ = type("Own", (type(model),), {})
    assert default_losses(model) is causal_lm_losses


def test_models_without_a_known_head_are_refused():
    with pytest.raises(ValueError, match="pass loss_fn="):
        default_losses(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ViTForImageClassification"):
        default_losses(FAMILIES["vit"].build()[0])
