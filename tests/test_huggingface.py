"""Per-example losses: right values, and nothing that one example decides for another."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from fastclip.huggingface import causal_lm_losses, classification_losses, masked_lm_losses

VOCAB = 31


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=VOCAB, n_positions=16)).eval()


def bert(kind, **settings):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=VOCAB, **settings
    )
    return kind(config).eval()


def padded_batch():
    lengths = torch.tensor([7, 4, 2])
    mask = (torch.arange(7) < lengths[:, None]).long()
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask}


class Fixed(nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, **inputs):
        assert "labels" not in inputs
        return SimpleNamespace(logits=self.logits)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_causal_losses_are_what_transformers_computes_for_each_example_alone(reduction):
    model, batch = gpt2(), padded_batch()
    losses = causal_lm_losses(model, batch, reduction=reduction)
    for row, length in enumerate([7, 4, 2]):
        alone = batch["input_ids"][row : row + 1, :length]
        expected = model(input_ids=alone, labels=alone).loss * (1 if reduction == "mean" else length - 1)
        torch.testing.assert_close(losses[row], expected)


def test_causal_losses_do_not_depend_on_the_neighbours():
    model, batch = gpt2(), padded_batch()
    other = {"input_ids": batch["input_ids"].clone(), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    other["input_ids"][1:] = 5
    assert causal_lm_losses(model, batch)[0] == causal_lm_losses(model, other)[0]


def test_labels_decide_which_positions_count():
    logits = torch.randn(2, 4, VOCAB)
    labels = torch.tensor([[1, 2, -100, 3], [-100, -100, -100, -100]])
    losses = causal_lm_losses(Fixed(logits), {"input_ids": torch.zeros(2, 4).long(), "labels": labels})
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 2] + log_p[0, 2, 3]) / 2
    torch.testing.assert_close(losses, torch.stack([expected, torch.tensor(0.0)]))


def test_an_example_with_nothing_to_predict_has_gradient_zero():
    logits = torch.randn(2, 3, VOCAB, requires_grad=True)
    labels = torch.tensor([[4, 5, 6], [7, -100, -100]])
    causal_lm_losses(Fixed(logits), {"labels": labels}).sum().backward()
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[1].abs().sum() == 0


def test_masked_losses_are_what_transformers_computes_for_each_example_alone():
    model, batch = bert(BertForMaskedLM), padded_batch()
    labels = torch.full((3, 7), -100)
    labels[0, [1, 4]], labels[1, 2] = 9, 11
    losses = masked_lm_losses(model, {**batch, "labels": labels})
    for row in (0, 1):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        torch.testing.assert_close(losses[row], model(**alone, labels=labels[row : row + 1]).loss)
    assert losses[2] == 0


def test_classification_losses_of_classes():
    model, batch = bert(BertForSequenceClassification, num_labels=3), padded_batch()
    labels = torch.tensor([2, 0, 1])
    losses = classification_losses(model, {**batch, "labels": labels})
    assert losses.shape == (3,)
    torch.testing.assert_close(losses.mean(), model(**batch, labels=labels).loss)


def test_classification_losses_of_numbers_and_of_several_answers():
    one = torch.tensor([[0.5], [2.0]])
    torch.testing.assert_close(
        classification_losses(Fixed(one), {"labels": torch.tensor([1.0, 0.0])}), torch.tensor([0.25, 4.0])
    )
    two = torch.zeros(2, 3)
    answers = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(classification_losses(Fixed(two), {"labels": answers}), torch.full((2,), math.log(2)))


def test_half_precision_logits_give_single_precision_losses():
    losses = classification_losses(Fixed(torch.zeros(2, 3, dtype=torch.bfloat16)), {"labels": torch.tensor([0, 1])})
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.full((2,), math.log(3)))


@pytest.mark.parametrize(
    ("loss", "batch", "message"),
    [
        (masked_lm_losses, {"input_ids": torch.zeros(2, 4).long()}, "batch has no labels"),
        (causal_lm_losses, {"pixel_values": torch.zeros(2, 4)}, "neither labels nor input_ids"),
        (causal_lm_losses, {"labels": torch.zeros(2, 5).long()}, "do not fit logits"),
        (classification_losses, {"labels": torch.zeros(2).long()}, "do not fit logits"),
    ],
)
def test_what_does_not_fit_is_refused(loss, batch, message):
    with pytest.raises(ValueError, match=message):
        loss(Fixed(torch.zeros(2, 4, VOCAB)), batch)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction is 'none'"):
        causal_lm_losses(Fixed(torch.zeros(1, 2, VOCAB)), {"labels": torch.zeros(1, 2).long()}, reduction="none")


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="without logits"):
        causal_lm_losses(Fixed(None), {"labels": torch.zeros(1, 2).long()})
