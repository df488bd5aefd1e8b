"""How much of a model is tried on its first batch, and what a trial may not pass over."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastclip


@pytest.mark.parametrize("at", [5, 200])
def test_long_sequences_are_compared_in_full_forward_and_at_their_beginning_backward(at):
    """Token ids of 300: what mixes behind the 128th is seen; a backward is run on the first 128."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(11, 4), nn.Linear(4, 2)
            self.lengths = []

        def forward(self, ids):
            h = self.table(ids)
            self.lengths.append(ids.shape[1])
            if ids.shape[1] > at and self.mixes:
                h = torch.cat([h[:, :at], h[:, at:] + h[:, at:].mean(0, keepdim=True)], 1)
            return self.out(h).sum((1, 2))

    ids = torch.randint(11, (5, 300), generator=torch.Generator().manual_seed(0))
    model = Late()
    model.mixes = True
    fastclip.attach(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="not independent"):
        model(ids)
    model = Late()
    model.mixes = False
    fastclip.attach(model, max_grad_norm=1.0)
    model(ids).sum().backward()
    assert set(model.lengths) == {300, 128}


def test_a_layer_that_answers_for_some_numbers_of_examples_alone_is_refused():
    """Its gradients at three examples have none at two to be compared with."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.extra = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.layer(x)
            if torch.is_grad_enabled() and len(x) == 3:
                h = h + self.extra(x)
            return h

    model = Sometimes()
    fastclip.attach(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"extra.*how often"):
        model(torch.randn(5, 3))


def test_a_mask_that_hides_nothing_under_autocast():
    """Attention takes another kernel for a mask that hides nothing, and its bf16 differs by more than the trial's tolerance."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        vocab_size=46,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).train()
    fastclip.attach(model, max_grad_norm=1.0)
    ids = torch.randint(1, 46, (6, 32), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert logits.dtype == torch.bfloat16  # the forward itself runs under autocast, the trial alone does not
    logits.float().square().sum().backward()


def test_narrow_inputs_are_tried_under_their_autocast():
    """Without it fp32 layers could not take them."""
    model = nn.Linear(4, 3)
    fastclip.attach(model, max_grad_norm=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(5, 4).bfloat16()).float().square().sum().backward()
    assert model.weight.grad.isfinite().all()
