"""Gated MLPs: found by what they compute, and kept in two tensors instead of three."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

import fastclip
from fastclip.layers.gated import gated_of

SIZES = {"hidden_size": 6, "intermediate_size": 10, "num_attention_heads": 2}
LLAMA, GEMMA = LlamaConfig(**SIZES), GemmaConfig(**SIZES)


class Dropped(LlamaMLP):
    """In training alone it is something else."""

    __module__ = LlamaMLP.__module__

    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


class Doubled(LlamaMLP):
    __module__ = LlamaMLP.__module__

    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(LlamaMLP):
    __module__ = LlamaMLP.__module__

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(()))


def test_only_what_computes_as_one_is_one():
    for kind, config in ((LlamaMLP, LLAMA), (GemmaMLP, GEMMA)):
        assert gated_of(kind(config)) is not None
        assert gated_of(kind(config).eval()) is not None
    for kind in (Dropped, Doubled, Scaled):
        for mode in (True, False):
            module = kind(LLAMA).train(mode)
            assert gated_of(module) is None
            assert module.training is mode
    noisy = LlamaMLP(LLAMA)
    noisy.act_fn = nn.Dropout(0.0)
    assert gated_of(noisy) is None


class Model(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.into, self.mlp = nn.Linear(4, 6), mlp

    def forward(self, x):
        return self.mlp(self.into(x)).square().sum((1, 2))


@pytest.mark.parametrize("mlp", [LlamaMLP(LLAMA), GemmaMLP(GEMMA)], ids=["llama", "gemma"])
def test_gradients_and_what_is_kept(mlp):
    model, x = Model(mlp), torch.randn(5, 3, 4)
    plain = copy.deepcopy(model)
    sizes = []
    for net in (plain, model):
        if net is model:
            fastclip.attach(model, max_grad_norm=1e9)
            net(x)  # the trial
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.setdefault(t.data_ptr(), t), lambda t: t
        ):
            net(x).sum().backward()
        sizes.append(sum(t.numel() == 5 * 3 * 10 for t in kept.values()))
    assert sizes[1] == sizes[0] - 1
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_a_frozen_half():
    model, x = Model(LlamaMLP(LLAMA)), torch.randn(5, 3, 4)
    model.into.requires_grad_(False)
    model.mlp.gate_proj.requires_grad_(False)
    plain = copy.deepcopy(model)
    plain(x).sum().backward()
    fastclip.attach(model, max_grad_norm=1e9)
    model(x).sum().backward()
    assert model.mlp.gate_proj.weight.grad is None
    torch.testing.assert_close(model.mlp.up_proj.weight.grad, plain.mlp.up_proj.weight.grad, rtol=1e-5, atol=1e-6)
