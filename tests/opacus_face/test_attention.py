"""DPMultiheadAttention against nn.MultiheadAttention: values, gradients, masks, names, and what per-example gradients see."""

from __future__ import annotations

import importlib
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

face = pytest.importorskip("fastclip.opacus", reason="opacus is not installed: pip install fastclip-dp[opacus]")
layers = importlib.import_module("fastclip.opacus.layers")
validators = importlib.import_module("fastclip.opacus.validators")
plain = importlib.import_module("opacus.layers")

N, T, S, E = 3, 4, 5, 12  # examples, targets, sources, width
# In float64, so that only a wrong formula can be told apart.
EXACT = {"dtype": torch.float64}


def pair(cls: type = layers.DPMultiheadAttention, **settings: Any) -> tuple[nn.MultiheadAttention, Any]:
    """torch's attention and the other one with its parameters."""
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(E, **EXACT, **settings)
    for p in reference.parameters():
        nn.init.normal_(p, std=0.3)  # biases are zero otherwise
    attention = cls(E, **settings).double()
    attention.load_state_dict(reference.state_dict())
    return reference, attention


def inputs(batch_first: bool, kdim: int | None = None, vdim: int | None = None) -> list[Tensor]:
    torch.manual_seed(1)
    made = [torch.randn(N, length, width or E, **EXACT) for length, width in ((T, E), (S, kdim), (S, vdim))]
    return [x if batch_first else x.transpose(0, 1) for x in made]


def masks(heads: int) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(2)
    flat, deep = torch.rand(T, S) < 0.4, torch.rand(N * heads, T, S) < 0.4
    flat[:, 0] = deep[..., 0] = False  # every target sees something
    padding = torch.arange(S) >= torch.tensor([[2], [5], [4]])
    return {
        "none": {},
        "bool 2-D": {"attn_mask": flat},
        "float 2-D": {"attn_mask": torch.randn(T, S, **EXACT)},
        "bool 3-D": {"attn_mask": deep},
        "float 3-D": {"attn_mask": torch.randn(N * heads, T, S, **EXACT)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(N, S, **EXACT)},
        "bool 2-D and padding": {"attn_mask": flat, "key_padding_mask": padding},
    }


def assert_same(reference: nn.Module, attention: nn.Module, x: list[Tensor], **call: Any) -> None:
    results = []
    for module in (reference, attention):
        leaves = [one.detach().clone().requires_grad_() for one in x]
        out, weights = module(*leaves, **call)
        torch.manual_seed(3)
        grads = torch.autograd.grad(out, leaves, torch.randn(out.shape, **EXACT))
        results.append((out, weights, *grads))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("mask", masks(1))
@pytest.mark.parametrize("need_weights", [True, False])
def test_values_and_input_gradients_are_torchs(batch_first: bool, heads: int, mask: str, need_weights: bool) -> None:
    for appended, widths in itertools.product(
        ({}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}),
        ({}, {"kdim": 7, "vdim": 2}),
    ):
        reference, attention = pair(num_heads=heads, batch_first=batch_first, **appended, **widths)
        assert_same(
            reference, attention, inputs(batch_first, **widths), need_weights=need_weights, **masks(heads)[mask]
        )


def test_weights_of_every_head() -> None:
    reference, attention = pair(num_heads=3, bias=False)
    assert_same(reference, attention, inputs(False), average_attn_weights=False)


def test_opacus_itself_is_wrong_where_batches_come_first() -> None:
    reference, attention = pair(plain.DPMultiheadAttention, num_heads=3, batch_first=True)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(reference, attention, inputs(True))
    with pytest.raises(ValueError, match="size of the 2D attn_mask"):
        attention(*inputs(True), attn_mask=masks(3)["bool 2-D"]["attn_mask"])
    with pytest.raises(AssertionError, match="causal"):
        attention(*inputs(True), is_causal=True)
    half = attention.bfloat16()
    x = [one.bfloat16() for one in inputs(True)]
    with pytest.raises(ValueError, match="bfloat16"):
        half(*x, attn_mask=torch.zeros(T, S, dtype=torch.bfloat16))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
def test_is_causal_with_and_without_its_mask(batch_first: bool, need_weights: bool) -> None:
    reference, attention = pair(num_heads=2, batch_first=batch_first)
    x = [inputs(batch_first)[0]] * 3
    causal = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert_same(reference, attention, x, attn_mask=causal, is_causal=True, need_weights=need_weights)
    given, _ = attention(*x, attn_mask=causal)
    made, _ = attention(*x, is_causal=True, need_weights=need_weights)
    torch.testing.assert_close(made, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_in_half_precision(dtype: torch.dtype) -> None:
    reference, attention = pair(num_heads=3, batch_first=True)
    x = inputs(True)
    added = torch.randn(T, S).masked_fill(torch.arange(S) == 4, float("-inf")).to(dtype)
    want, _ = reference(*x, attn_mask=added.double())
    for need_weights in (True, False):
        got, _ = attention(*x, attn_mask=added, need_weights=need_weights)
        torch.testing.assert_close(got, want)
    half = attention.to(dtype)
    for need_weights in (True, False):
        out, _ = half(*(one.to(dtype) for one in x), attn_mask=added, need_weights=need_weights)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, atol=0.03, rtol=0.03)


def test_byte_masks_are_taken_with_a_warning_and_integers_refused() -> None:
    _, attention = pair(num_heads=3)
    flat = masks(3)["bool 2-D"]["attn_mask"]
    want, _ = attention(*inputs(False), attn_mask=flat)
    with pytest.warns(UserWarning, match="attn_mask as uint8"):
        got, _ = attention(*inputs(False), attn_mask=flat.byte())
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"float, byte, and bool types .* attn_mask, not torch.int64"):
        attention(*inputs(False), attn_mask=flat.long())


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    _, attention = pair(num_heads=3, batch_first=True)
    q, k, v = inputs(True)
    for call, match in (
        ({"query": q[0], "key": k, "value": v}, "query must be"),
        ({"query": q, "key": k[..., :3], "value": v}, "key must be"),
        ({"query": q, "key": k, "value": v[:, :2]}, "key and value differ"),
        ({"query": q[:2], "key": k, "value": v}, "2 and 3 examples"),
        ({"query": q, "key": k, "value": v, "attn_mask": torch.zeros(S, T)}, r"\[T, S\] = \[4, 5\]"),
        ({"query": q, "key": k, "value": v, "attn_mask": torch.zeros(N, T, S)}, r"= \[9, 4, 5\]"),
        ({"query": q, "key": k, "value": v, "key_padding_mask": torch.zeros(S, N)}, r"\[N, S\] = \[3, 5\]"),
    ):
        with pytest.raises(ValueError, match=match):
            attention(**call)
    for heads in (5, 0):
        with pytest.raises(ValueError, match=f"embed_dim=12 must be a multiple of num_heads={heads}"):
            layers.DPMultiheadAttention(E, heads)


@pytest.mark.parametrize("need_weights", [True, False])
def test_an_empty_batch(need_weights: bool) -> None:
    _, attention = pair(num_heads=3, batch_first=True, add_bias_kv=True)
    x = [one[:0] for one in inputs(True)]
    out, _ = attention(*x, attn_mask=torch.zeros(0, T, S), is_causal=True, need_weights=need_weights)
    assert out.shape == (0, T, E)
    out.sum().backward()


def test_dropout_acts_in_training_alone() -> None:
    attention = layers.DPMultiheadAttention(E, 3, dropout=0.5, **EXACT)
    x = inputs(False)
    for need_weights in (True, False):
        attention.train()
        assert not torch.equal(attention(*x, need_weights=need_weights)[0], attention(*x, need_weights=need_weights)[0])
        attention.eval()
        assert torch.equal(attention(*x, need_weights=need_weights)[0], attention(*x, need_weights=need_weights)[0])


@pytest.mark.parametrize("widths", [{}, {"kdim": 7, "vdim": 2}])
def test_states_go_between_torch_opacus_and_the_face(widths: dict[str, int]) -> None:
    settings = {"num_heads": 3, "add_bias_kv": True, **widths}
    reference, ours = pair(**settings)
    theirs = plain.DPMultiheadAttention(E, **settings).double()
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict()) and set(ours.state_dict()) == set(
        reference.state_dict()
    )
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    back = layers.DPMultiheadAttention(E, **settings, **EXACT)
    state = theirs.state_dict()
    back.load_state_dict(state)
    assert list(state) == list(theirs.state_dict()), "the caller's dictionary was changed"
    for name, value in reference.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    # Below another module Opacus' own names are saved; both are loaded.
    holder, opacus_holder = nn.ModuleDict({"attn": back}), nn.ModuleDict({"attn": theirs})
    assert list(holder.state_dict()) == list(opacus_holder.state_dict())
    for source in (holder, nn.ModuleDict({"attn": reference})):
        fresh = nn.ModuleDict({"attn": layers.DPMultiheadAttention(E, **settings, **EXACT)})
        assert not any(fresh.load_state_dict(source.state_dict()))
        assert torch.equal(fresh["attn"].state_dict()["bias_k"], reference.bias_k)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        back.load_state_dict({**state, "other": torch.zeros(1)})


def test_device_and_dtype_are_those_asked_for() -> None:
    made = layers.DPMultiheadAttention(E, 3, add_bias_kv=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.bfloat16)}
    assert isinstance(made, plain.DPMultiheadAttention)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_per_example_gradients_are_those_of_one_example_alone(batch_first: bool, mode: str) -> None:
    """With bias_kv in either layout; Opacus takes the sequence for the batch there."""

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = layers.DPMultiheadAttention(E, 3, add_bias_kv=True, batch_first=batch_first, **EXACT)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    torch.manual_seed(4)
    model, x = SelfAttention(), torch.randn(N, T, E, **EXACT)
    alone = []
    for i in range(N):
        one = x[i : i + 1] if batch_first else x[i : i + 1].transpose(0, 1)
        grads = torch.autograd.grad(model(one).square().sum(), list(model.parameters()))
        alone.append(torch.cat([g.flatten() for g in grads]))
    norms = torch.stack(alone).norm(dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that sampling follows a seed, or is tried
        own = {"max_grad_norm": 1.0} if mode == "ghost" else {}
        wrapped = face.grad_sample.wrap_model(model, mode, batch_first=batch_first, loss_reduction="sum", **own)
        wrapped(x if batch_first else x.transpose(0, 1)).square().sum().backward()
    if mode == "ghost":
        torch.testing.assert_close(wrapped.get_norm_sample().double(), norms, rtol=1e-5, atol=1e-5)
        return
    got = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], 1)
    torch.testing.assert_close(got, torch.stack(alone))


def test_the_fixer_makes_this_attention_with_all_that_it_was() -> None:
    torch.manual_seed(5)
    model = nn.TransformerEncoderLayer(E, 3, 8, dropout=0.0, batch_first=True).to(torch.bfloat16).eval()
    model.self_attn.out_proj.bias.requires_grad_(False)
    fixed = validators.ModuleValidator.fix(model)
    attention = fixed.self_attn
    assert type(attention) is layers.DPMultiheadAttention and not attention.training
    assert isinstance(model.self_attn, nn.MultiheadAttention), "the model that was given stays as it is"
    assert {p.dtype for p in fixed.parameters()} == {torch.bfloat16}
    assert [n for n, p in fixed.named_parameters() if not p.requires_grad] == ["self_attn.out_proj.bias"]
    assert validators.ModuleValidator.is_valid(fixed.train())
    fixed.eval()
    x = torch.randn(N, T, E, dtype=torch.bfloat16)
    torch.testing.assert_close(fixed(x), model(x), atol=0.05, rtol=0.05)
    root = validators.ModuleValidator.fix(nn.MultiheadAttention(E, 3))
    assert type(root) is layers.DPMultiheadAttention


def test_the_registry_is_opacus_own_and_a_fixer_of_the_users_counts() -> None:
    theirs = importlib.import_module("opacus.validators")
    assert set(validators.ModuleValidator.FIXERS) == set(theirs.ModuleValidator.FIXERS)
    assert type(theirs.ModuleValidator.fix(nn.MultiheadAttention(E, 3))) is plain.DPMultiheadAttention
    before = theirs.ModuleValidator.FIXERS[nn.MultiheadAttention]
    assert (
        type(validators.ModuleValidator.FIXERS[nn.MultiheadAttention](nn.MultiheadAttention(E, 3)))
        is layers.DPMultiheadAttention
    )
    try:
        validators.register_module_fixer(nn.MultiheadAttention)(lambda module: nn.Linear(1, 1))
        assert isinstance(validators.ModuleValidator.fix(nn.MultiheadAttention(E, 3)), nn.Linear)
    finally:
        theirs.ModuleValidator.FIXERS[nn.MultiheadAttention] = before
