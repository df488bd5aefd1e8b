"""RMSNorm that nobody lists by name: recognised by what it computes, and by nothing less."""

import copy

import pytest
import torch
from oracle import assert_gradients, assert_norms, clipped_sum, collect, norms, pick_clipping_norm, unit_gradients
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import fastclip
from fastclip.layers import find_rule
from fastclip.layers.rms_norm import gemma_norm, llama_norm, rms_norm


class OwnNorm(nn.Module):
    """The formula, as a class that might stand in transformers."""

    __module__ = "transformers.models.own"

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(size)), 1e-5

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide / (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()).to(x.dtype)


class CentredNorm(OwnNorm):
    __module__ = OwnNorm.__module__

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class TwiceNorm(OwnNorm):
    __module__ = OwnNorm.__module__

    def forward(self, x):
        return super().forward(x) * self.weight


class GatedNorm(OwnNorm):
    __module__ = OwnNorm.__module__

    def forward(self, x, gate=None):
        return super().forward(x) if gate is None else super().forward(x) * gate


class OtherEpsNorm(OwnNorm):
    __module__ = OwnNorm.__module__

    def forward(self, x):
        self.eps, eps = 1e-3, self.eps
        try:
            return super().forward(x)
        finally:
            self.eps = eps


class BetweenNorm(OwnNorm):
    """Of examples: another sum than the one over a row."""

    __module__ = OwnNorm.__module__

    def forward(self, x):
        return super().forward(x) + 0.0 * self.weight.sum() + x.sum(0) * 1e-3


class BufferedNorm(OwnNorm):
    __module__ = OwnNorm.__module__

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))


class DetachedNorm(OwnNorm):
    """The same forward, and other gradients."""

    __module__ = OwnNorm.__module__

    def forward(self, x):
        wide = x.float()
        rms = (wide.square().mean(-1, keepdim=True) + self.eps).sqrt().detach()
        return self.weight * (wide / rms).to(x.dtype)


class TrainedNorm(OwnNorm):
    """In training alone it is something else."""

    __module__ = OwnNorm.__module__

    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class ElsewhereNorm(OwnNorm):
    """From a library that nobody knows, which may do anything on other numbers."""

    __module__ = "elsewhere"


@pytest.mark.parametrize(
    ("module", "rule"),
    [
        (LlamaRMSNorm(6), llama_norm),
        (MistralRMSNorm(6), llama_norm),
        (GemmaRMSNorm(6), gemma_norm),
        (OwnNorm(), llama_norm),
        (nn.RMSNorm(6), rms_norm),
        (T5LayerNorm(6), None),  # multiplies before it rounds
        *(
            (kind(), None)
            for kind in (
                CentredNorm,
                TwiceNorm,
                GatedNorm,
                OtherEpsNorm,
                BetweenNorm,
                BufferedNorm,
                DetachedNorm,
                TrainedNorm,
                ElsewhereNorm,
            )
        ),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
def test_what_computes_as_rms_norm_is_one(module, rule):
    state = copy.deepcopy(module.state_dict())
    assert find_rule(module) is rule
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())


def test_a_forward_put_in_its_place_is_not_one():
    module = LlamaRMSNorm(6)
    assert find_rule(module) is llama_norm
    module.forward = lambda x: 2 * LlamaRMSNorm.forward(module, x)
    assert find_rule(module) is None


def test_what_changes_is_tried_again():
    module = GemmaRMSNorm(6)
    assert find_rule(module) is gemma_norm
    module._norm = lambda x: x
    assert find_rule(module) is None
    module = TrainedNorm().eval()
    assert find_rule(module) is llama_norm
    assert find_rule(module.train()) is None
    module = OwnNorm()
    assert find_rule(module) is llama_norm
    module.eps = 1e-3
    assert find_rule(module) is llama_norm
    assert find_rule(OwnNorm(1)) is None


def test_the_argument_may_be_given_by_name():
    class Named(nn.Sequential):
        def forward(self, x):
            return self[1](x=self[0](x))

    model = Named(nn.Linear(4, 6), OwnNorm())
    fastclip.attach(model, 1.0)
    model(torch.randn(5, 4)).square().sum().backward()


@pytest.mark.parametrize("users", [None, [0, 1, 0, 2, 1]])
@pytest.mark.parametrize(
    "kind", [LlamaRMSNorm, GemmaRMSNorm, nn.RMSNorm, OwnNorm, CentredNorm, TwiceNorm, DetachedNorm, T5LayerNorm]
)
def test_norms_and_sums(kind, users):
    model = nn.Sequential(nn.Linear(4, 6), kind(6), nn.Tanh(), nn.Linear(6, 2))
    nn.init.normal_(model[1].weight)
    batch = {"x": torch.randn(5, 3, 4)}

    def losses(model, batch):
        return model(batch["x"]).square().sum((1, 2))

    units = unit_gradients(copy.deepcopy(model), losses, batch, users)
    clip = pick_clipping_norm(norms(units))
    clipper = fastclip.attach(model, clip)
    with clipper.units(ids=range(5) if users is None else users):
        losses(model, batch).sum().backward()
    assert_norms(clipper.unit_norms, norms(units))
    assert_gradients(collect(model), clipped_sum(units, clip))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, nn.RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_outputs_are_the_modules_own(kind, dtype):
    model = nn.Sequential(nn.Embedding(7, 6), kind(6)).to(dtype)
    nn.init.normal_(model[1].weight)
    ids = torch.randint(7, (5, 3))
    plain = model(ids)
    fastclip.attach(model, 1.0)
    out = model(ids)
    assert out.dtype == plain.dtype
    torch.testing.assert_close(out, plain, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_frozen_norm_enters_nothing():
    model = nn.Sequential(nn.Linear(4, 6), LlamaRMSNorm(6), nn.Linear(6, 2))
    model[1].requires_grad_(False)
    clipper = fastclip.attach(model, 1.0)
    model(torch.randn(5, 4)).square().sum().backward()
    assert model[1].weight.grad is None
    assert len(clipper.unit_norms) == 5
