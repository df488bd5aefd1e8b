"""check_units finds what mixes units, and leaves everything as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import fastclip


def gpt2():
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=19, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).train()  # dropout on


def token_losses(model, batch):
    logits = model(**batch).logits[:, :-1]
    return F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")


@pytest.mark.parametrize("attached", [False, True])
def test_independent_units_pass_and_nothing_changes(attached):
    model, batch = gpt2(), {"input_ids": torch.randint(0, 19, (4, 6))}
    clipper = fastclip.attach(model, 1.0) if attached else None
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fastclip.check_units(model, lambda m, b: token_losses(m, b).mean(1), batch)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if clipper is not None:
        assert clipper.attached
        token_losses(model, batch).sum().backward()
        assert clipper.unit_norms.shape == (4,)


@pytest.mark.parametrize(
    ("loss", "word"),
    [
        (lambda m, b: token_losses(m, b).sum(1) / b["input_ids"].numel(), "in the batch"),
        (lambda m, b: token_losses(m, b).mean(1) * token_losses(m, b).mean(), "in the batch"),
        (lambda m, b: token_losses(m, b).flatten(), "one loss per unit"),
        (lambda m, b: token_losses(m, b).mean(), "one loss per unit"),
        (lambda m, b: token_losses(m, b).mean(1).softmax(0), "in the batch"),
    ],
)
def test_losses_that_mix_units(loss, word):
    with pytest.raises(ValueError, match=word):
        fastclip.check_units(gpt2(), loss, {"input_ids": torch.randint(0, 19, (4, 6))})


def test_batch_statistics_and_in_batch_negatives():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError):
        fastclip.check_units(model, lambda m, b: m(b).square().sum(1), torch.randn(5, 3))
    contrastive = nn.Linear(3, 4)

    def negatives(m, b):
        z = m(b)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")

    with pytest.raises(ValueError, match="unit 0's loss"):
        fastclip.check_units(contrastive, negatives, torch.randn(5, 3))


def test_gradients_that_mix_although_losses_do_not():
    model = nn.Linear(3, 4)

    def hidden(m, b):
        z = m(b)
        return z.square().sum(1) + (z.sum() - z.sum().detach())

    with pytest.raises(ValueError, match="gradient in the batch differs"):
        fastclip.check_units(model, hidden, torch.randn(5, 3))


@pytest.mark.parametrize("inputs", ["float", "ids"])
def test_nan_through_a_multiplied_mask(inputs):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(7, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = self.table(x) if inputs == "ids" else x
            mask = torch.eye(len(x))
            return self.out(torch.einsum("bc,ctd->btd", mask, x))

    batch = torch.randint(0, 7, (4, 5)) if inputs == "ids" else torch.randn(4, 5, 3)
    with pytest.raises(ValueError, match="in unit 0 reached"):
        fastclip.check_units(Packed(), lambda m, b: m(b).square().sum((1, 2)), batch)


def test_one_unit_alone():
    fastclip.check_units(nn.Linear(3, 2), lambda m, b: m(b).square().sum(1), torch.randn(1, 3))
