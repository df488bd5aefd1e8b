"""linear_cross_entropy: a head and its loss as one layer, in code of one's own and behind transformers' models."""

import copy

import pytest
import torch
from families import DECODER, GPT2, IGNORED, ROBERTA, USERS, VOCAB, B, T, from_config, randomize, tokens
from oracle import assert_gradients, assert_norms, clipped_sum, collect, norms, pick_clipping_norm, unit_gradients
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastclip
from fastclip import head, ops, ops_head, reference, tape
from fastclip.head_rows import HeadRows
from fastclip.huggingface import causal_lm_losses, masked_lm_losses
from fastclip.layers.site import Site
from fastclip.units import Segments
from kernels import needs_kernels


@pytest.fixture(params=["held", "some words at a time"])
def logits(request, monkeypatch):
    """Both ways to a head's losses; chunks end within the vocabulary."""
    lean = request.param != "held"
    monkeypatch.setattr("fastclip.layers.head._SHARE", 0 if lean else 1)
    monkeypatch.setattr("fastclip.head_rows.CHUNK", 19)
    monkeypatch.setattr("fastclip.reference_head.CHUNK", 23)
    entered = []
    enter = Site.enter_head
    monkeypatch.setattr(Site, "enter_head", lambda self, *args: entered.append(args) or enter(self, *args))
    yield request.param
    assert bool(entered) == lean, "the other way was taken"


def labelled(dtype=torch.int64):
    labels = tokens(B, T, seed=3).to(dtype)
    labels[1, 3:] = IGNORED
    labels[3] = IGNORED
    labels[4, 1:] = IGNORED
    return labels


class Own(nn.Module):
    """A language model that computes its losses itself."""

    def __init__(self, tied: bool, bias: bool, time_major: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 24)
        self.mix = nn.Linear(24, 24)
        self.head = nn.Linear(24, VOCAB, bias=bias)
        if tied:
            self.head.weight = self.table.weight
        self.time_major = time_major

    def forward(self, ids, labels):
        h = torch.tanh(self.mix(self.table(ids)))
        if self.time_major:
            return fastclip.linear_cross_entropy(h.transpose(0, 1), self.head, labels.T).sum(0)
        return fastclip.linear_cross_entropy(h, self.head, labels).sum(1)


def own_losses(model, batch):
    return model(batch["ids"], batch["labels"])


@pytest.mark.parametrize("users", [None, USERS], ids=["examples", "users"])
@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_models_own_code(logits, tied, bias, time_major, users):
    torch.manual_seed(0)
    model = randomize(Own(tied, bias, time_major))
    batch = {"ids": tokens(B, T), "labels": labelled()}
    units = unit_gradients(model, own_losses, batch, users)
    limit = pick_clipping_norm(norms(units))
    clipper = fastclip.attach(model, max_grad_norm=limit)
    with clipper.units(ids=USERS if users else list(range(B))):
        losses = own_losses(model, batch)
    losses.sum().backward()
    assert losses[3] == 0
    assert_norms(clipper.unit_norms, norms(units))
    assert_gradients(collect(model), clipped_sum(units, limit))


def test_packed_rows(logits):
    torch.manual_seed(0)
    model = randomize(Own(tied=True, bias=True))
    ids, labels = tokens(1, 11), tokens(1, 11, seed=3)
    labels[0, 4:6] = IGNORED
    exact = [
        unit_gradients(model, own_losses, {"ids": ids[:, i:j], "labels": labels[:, i:j]})[0]
        for i, j in ((0, 5), (5, 11))
    ]
    limit = pick_clipping_norm(norms(exact))
    clipper = fastclip.attach(model, max_grad_norm=limit)
    with clipper.units(offsets=[0, 5, 11]):
        losses = model(ids, labels)
    losses.sum().backward()
    assert_norms(clipper.unit_norms, norms(exact))
    assert_gradients(collect(model), clipped_sum(exact, limit))


def fused(model):
    return model not in head._ENDING_OTHERWISE


GEMMA = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 6}
GEMMA |= {"num_key_value_heads": 2, "intermediate_size": 37, "final_logit_softcapping": 3.0, "use_cache": False}
MODELS = {
    "gpt2": (lambda: from_config("CausalLM", "gpt2", **GPT2), causal_lm_losses, True),
    "llama": (
        lambda: from_config("CausalLM", "llama", **(DECODER | {"tie_word_embeddings": True})),
        causal_lm_losses,
        True,
    ),
    "roberta": (lambda: from_config("MaskedLM", "roberta", **ROBERTA), masked_lm_losses, True),
    # Its logits are not the head's: capped.
    "gemma2": (lambda: from_config("CausalLM", "gemma2", **GEMMA), causal_lm_losses, False),
}


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta"])
def test_behind_transformers_models(logits, name):
    check_behind(name)


def test_behind_a_model_that_caps_its_logits():
    check_behind("gemma2")


def check_behind(name):
    build, losses_of, ends_with_its_head = MODELS[name]
    model = build().train()
    batch = {"input_ids": tokens(B, T, low=5), "labels": labelled()}
    units = unit_gradients(model, losses_of, batch)
    limit = pick_clipping_norm(norms(units))
    clipper = fastclip.attach(model, max_grad_norm=limit)
    for _ in range(2):
        model.zero_grad()
        losses_of(model, batch).sum().backward()
        assert_norms(clipper.unit_norms, norms(units))
        assert_gradients(collect(model), clipped_sum(units, limit))
    assert fused(model) == ends_with_its_head


def saved_logits(model, batch):
    """Rows of every buffer of VOCAB columns that the losses keep for their backward."""
    kept = {}

    def pack(x):
        if x.shape[-1:] == (VOCAB,):
            kept[x.untyped_storage().data_ptr()] = x.numel() // VOCAB
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        causal_lm_losses(model, batch)
    return list(kept.values())


def test_the_logits_are_held_once_and_only_where_there_are_labels():
    model = MODELS["llama"][0]().train()
    fastclip.attach(model, max_grad_norm=1.0)
    batch = {"input_ids": tokens(B, T)}
    causal_lm_losses(model, batch)  # the trial
    assert saved_logits(model, batch) == [B * (T - 1)]
    labels = labelled()
    assert saved_logits(model, batch | {"labels": labels}) == [int((labels[:, 1:] != IGNORED).sum())]


def test_a_second_backward_is_refused():
    model = Own(tied=False, bias=False)
    fastclip.attach(model, max_grad_norm=1.0)
    losses = model(tokens(B, T), labelled())
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        losses.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_backward_after_that_of_an_input_alone_is_refused(frozen):
    """It reaches no parameter, and leaves the logits' gradient where the logits were."""
    model = Own(tied=False, bias=False)
    model.head.requires_grad_(not frozen)
    fastclip.attach(model, max_grad_norm=1.0)
    kept = []
    model.mix.register_forward_hook(lambda module, args, out: kept.append(out))
    losses = model(tokens(B, T), labelled())
    torch.autograd.grad(losses.sum(), kept[-1], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_a_frozen_head_and_a_model_on_its_own_are_as_torch_has_them():
    model = randomize(Own(tied=False, bias=True))
    batch = {"ids": tokens(B, T), "labels": labelled()}
    model.head.requires_grad_(False)
    h = torch.tanh(model.mix(model.table(batch["ids"])))
    flat = F.cross_entropy(model.head(h).flatten(0, 1), batch["labels"].flatten(), reduction="none")
    losses = own_losses(model, batch)
    torch.testing.assert_close(losses, flat.view(B, T).sum(1))
    losses.sum().backward()
    alone = collect(model)
    model.zero_grad()
    flat.sum().backward()
    assert_gradients(alone, collect(model))
    model.zero_grad()
    fastclip.attach(model, max_grad_norm=1e6)
    own_losses(model, batch).sum().backward()
    assert_gradients(alone, collect(model))


def test_a_head_with_hooks_runs_as_it_is():
    model, seen = Own(tied=False, bias=False), []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    fastclip.attach(model, max_grad_norm=1.0)
    model(tokens(B, T), labelled())
    seen.clear()
    model(tokens(B, T), labelled()).sum().backward()
    assert seen == [1]


def test_a_hook_on_the_model_sees_its_logits():
    model, seen = MODELS["llama"][0]().train(), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape))
    fastclip.attach(model, max_grad_norm=1.0)
    causal_lm_losses(model, {"input_ids": tokens(B, T)}).sum().backward()
    assert set(seen) == {(B, T, VOCAB)}


def test_losses_may_be_changed_in_place():
    model = Own(tied=False, bias=False)
    fastclip.attach(model, max_grad_norm=1.0)
    h, labels = torch.randn(B, T, 24, requires_grad=True), tokens(B, T)
    model.head.requires_grad_(False)
    losses = fastclip.linear_cross_entropy(h, model.head, labels)
    losses *= 2
    losses.sum().backward()
    doubled = h.grad.clone()
    h.grad = None
    F.cross_entropy(model.head(h).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    torch.testing.assert_close(doubled, 2 * h.grad)


def test_nothing_labelled_is_nothing_lost():
    model = Own(tied=True, bias=True)
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    model(tokens(B, T), labelled())
    losses = model(tokens(B, T), torch.full((B, T), IGNORED))
    losses.sum().backward()
    assert not losses.any() and not clipper.unit_norms.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_example_reaches_nobody(logits, value):
    """The others have the bits that they have beside a healthy example."""
    model = randomize(Own(tied=True, bias=True))
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    ids, labels = tokens(B, T), tokens(B, T, seed=3)
    ids[2] = VOCAB - 1
    ids[torch.arange(B) != 2] %= VOCAB - 1
    labels %= VOCAB - 1
    model(ids, labels)
    with torch.no_grad():
        model.table.weight[VOCAB - 1] = value
        model.head.weight = nn.Parameter(torch.where(torch.isfinite(model.table.weight), model.table.weight, 0.0))
    model(ids, labels).sum().backward()
    assert clipper.nonfinite_units == 1 and not torch.isfinite(clipper.unit_norms[2])
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_under_autocast_losses_are_fp32_and_the_buffer_is_not(logits):
    model = randomize(Own(tied=False, bias=False))
    batch = {"ids": tokens(B, T), "labels": labelled()}
    fastclip.attach(model, max_grad_norm=1e6)
    own_losses(model, batch)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        losses = own_losses(model, batch)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    exact = unit_gradients(copy.deepcopy(model), lambda m, b: plain_losses(m, b), batch)
    assert_gradients(collect(model), clipped_sum(exact, 1e6), tolerance=0.03)


def plain_losses(model, batch):
    logits = model.head(torch.tanh(model.mix(model.table(batch["ids"]))))
    flat = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(batch["labels"].shape).sum(1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(torch.zeros(B, T + 1).long(), "do not fit logits"), (torch.zeros(B, T), "do not fit logits")],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    model = Own(tied=False, bias=False)
    fastclip.attach(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=message):
        model(tokens(B, T), labels)


@pytest.mark.parametrize("share", [0, 1])
def test_a_label_outside_the_vocabulary_is_an_error(share, monkeypatch):
    monkeypatch.setattr("fastclip.layers.head._SHARE", share)
    model = Own(tied=False, bias=False)
    fastclip.attach(model, max_grad_norm=1.0)
    labels = labelled()
    model(tokens(B, T), labels)
    labels[0, 0] = VOCAB
    with pytest.raises((RuntimeError, IndexError, ValueError), match=r"label|bounds"):
        model(tokens(B, T), labels)


def entries(h, weight, labels, scale, offsets):
    """A head on the tape, its logits' gradients held and not."""
    lse = ops_head.head_losses(h, weight, None, labels)[1]
    lean = HeadRows(h, weight, None, labels, lse, scale, Segments(None, offsets))
    return lean, tape.LinearRows(h, lean.whole(), lean.segments)


@pytest.mark.parametrize("chunk", [1, 5, 83])
def test_rows_without_logits_measure_as_rows_with_them(monkeypatch, chunk):
    monkeypatch.setattr("fastclip.head_rows.CHUNK", chunk)
    torch.manual_seed(0)
    offsets = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    lean, held = entries(torch.randn(11, 7), torch.randn(83, 7), torch.randint(83, (11,)), torch.rand(11), offsets)
    tail = tape.EmbeddingRows(torch.randint(83, (11,)), torch.randn(11, 7), Segments(None, offsets), 3)
    for more in ([], [tail]):
        found, expected = (tape.measure([head, *more], torch.float32) for head in (lean, held))
        for name in ("square", "bound", "spread"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=0)
    outs = torch.zeros(2, 83, 7)
    for entry, out in zip((lean, held), outs, strict=True):
        entry.add_clipped(torch.tensor([0.3, 1.0, 0.7]), out, True)
    torch.testing.assert_close(outs[0], outs[1])
    # Cut at a border and beside materialised gradients they take the held form.
    slots = {(held.a, 0, 83): [lean], (held.a, 10, 20): [held.part(10, 20)]}
    assert all(not isinstance(e, HeadRows) for own in tape.separate(slots).values() for e in own)


def test_a_head_in_chunks_is_judged_by_what_a_chunk_may_be_off(monkeypatch):
    """Few words are multiplied at once without blocks, and may be off by more than a whole vocabulary."""
    monkeypatch.setattr("fastclip.head_rows.CHUNK", 19)
    torch.manual_seed(0)
    offsets, seen = torch.tensor([0, 11], dtype=torch.int32), []
    lean = entries(torch.randn(11, 7), torch.randn(83, 7), torch.randint(83, (11,)), torch.rand(11), offsets)[0]
    tail = tape.EmbeddingRows(torch.randint(83, (11,)), torch.randn(11, 7), Segments(None, offsets), None)
    monkeypatch.setattr(tape, "gram_error", lambda d, p, n: seen.append((d, p, n)) or 0.0)
    tape.measure([lean, tail], torch.float32)
    assert set(seen) == {(7, 19, 11), (7, 83 % 19, 11)}


@pytest.mark.parametrize("chunk", [3, 40])
def test_a_head_that_cancels_its_embedding_is_not_under_estimated(monkeypatch, chunk):
    """The embedding's gradient is minus the head's, but for a little: what is left is measured, not lost."""
    monkeypatch.setattr("fastclip.head_rows.CHUNK", chunk)
    torch.manual_seed(0)
    offsets = torch.tensor([0, 6], dtype=torch.int32)
    lean, held = entries(torch.randn(6, 7), torch.randn(40, 7), torch.randint(40, (6,)), torch.rand(6), offsets)
    exact = held.g.double().mT @ held.a.double()  # [V, d]
    ids, rows = torch.arange(40), (-exact).float()
    rows[0] += 1e-6
    tail = tape.EmbeddingRows(ids, rows, Segments(None, torch.tensor([0, 40], dtype=torch.int32)), None)
    left = (exact + rows.double()).norm()
    found = tape.measure([lean, tail], torch.float32)
    assert found.square.sqrt()[0] >= left * (1 - 1e-6)
    assert found.square.sqrt()[0] + found.bound[0] <= left + 1e-4 * exact.norm()


# The rows' kernels


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (1, 1), (3, 7), (5, 1029), (9, 16)])
def test_rows_against_fp64(dtype, rows, classes):
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(rows, classes + 3, generator=generator)).to(dtype)[:, :classes]
    labels = torch.randint(classes, (rows,), generator=generator, dtype=torch.int32)
    g = torch.randn(rows, generator=generator, dtype=torch.float64)
    exact = reference.cross_entropy(logits.double().clone(), labels)
    own = ops.cross_entropy(logits, labels)
    plain = reference.cross_entropy(logits, labels)
    floor = 1e-12 if dtype == torch.float64 else 4e-6
    assert bool(((own - exact).abs() <= 2 * (plain - exact).abs() + floor).all())
    z = reference.cross_entropy_backward(logits.double().clone(), labels, exact[1], g)
    torch.testing.assert_close(
        ops.cross_entropy_backward(logits.clone(), labels, own[1], g.to(own.dtype)).double(),
        z,
        atol=1e-12 if dtype == torch.float64 else 1e-6,
        rtol={torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 4e-6 if dtype == torch.float32 else 1e-12),
    )


@needs_kernels
def test_logits_beyond_every_exponential():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4], [88.0, -88.0, 0.0], [float("-inf"), 1.0, 2.0]])
    labels = torch.tensor([2, 1, 1, 1])
    torch.testing.assert_close(
        ops.cross_entropy(logits, labels)[0], F.cross_entropy(logits, labels, reduction="none"), rtol=1e-6, atol=1e-6
    )
    for broken in (float("nan"), float("inf")):
        rows = torch.zeros(2, 40)
        rows[0, 33] = broken
        losses = ops.cross_entropy(rows, torch.tensor([1, 1]))[0]
        assert not torch.isfinite(losses[0]) and torch.isfinite(losses[1])


@pytest.mark.parametrize("backend", [None, "torch"])
def test_rows_refuse_what_does_not_fit(backend):
    logits = torch.zeros(2, 3)
    for labels in (torch.zeros(3).long(), torch.zeros(2), torch.zeros(2, 1).long()):
        with pytest.raises(ValueError, match="labels integers"):
            ops.cross_entropy(logits, labels, backend=backend)
    with pytest.raises(ValueError, match="lse and g"):
        ops.cross_entropy_backward(logits, torch.zeros(2).long(), torch.zeros(3), torch.zeros(2), backend=backend)
    assert not logits.any()


@needs_kernels
def test_opcheck():
    logits, labels = torch.randn(3, 5), torch.tensor([0, 4, 2])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastclip.cross_entropy, (logits, labels), test_utils=checks)
    torch.library.opcheck(
        torch.ops.fastclip.cross_entropy_backward, (logits, labels, torch.zeros(3), torch.ones(3)), test_utils=checks
    )
