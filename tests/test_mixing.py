"""Models and calls that let one example reach another, and that look innocent on a first glance: refused."""

import copy
import dataclasses
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_gradients, assert_norms, clipped_sum, collect, norms, unit_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import fastclip

SIZE, LENGTH, WIDTH = 6, 5, 4


class Mixer(nn.Module):
    """Two layers with ``mix(h, **inputs)`` between them."""

    def __init__(self, mix):
        super().__init__()
        self.inner, self.outer, self.mix = nn.Linear(WIDTH, 8), nn.Linear(8, 2), mix

    def forward(self, x, **inputs):
        return self.outer(self.mix(self.inner(x), **inputs))


@dataclasses.dataclass
class Out:
    rows: torch.Tensor


def whole(**inputs):
    return {"x": torch.randn(SIZE, LENGTH, WIDTH), **inputs}


MIXERS = {
    "next row": lambda h: h + F.pad(h[1:], (0, 0, 0, 0, 0, 1)),
    "rows behind": lambda h: h.flip(0).cumsum(0).flip(0),
    "largest of all": lambda h: h / h.abs().max(),
    "only many": lambda h: h + h.mean(0) if len(h) >= 4 else h,
    "only even": lambda h: h + h.mean(0) if len(h) % 2 == 0 else h,
    "sorted by value": lambda h: h[h[:, 0, 0].argsort()],
    "outlier beside": lambda h: torch.cat([h + 0.5 * h.mean(0), h.new_full((*h.shape[:2], 1), 1000.0)], 2)[..., :8],
    "roll": lambda h: h + h.roll(1, 0),
}


@pytest.mark.parametrize("mix", MIXERS.values(), ids=MIXERS)
def test_mixers(mix):
    model = Mixer(mix)
    fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="not independent"):
        model(**whole())


def test_sorting_by_length_is_seen_although_the_first_batch_has_one_length():
    def by_length(h, mask):
        order = mask.sum(1).argsort()
        return h[order]

    model = Mixer(by_length)
    fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="not independent"):
        model(**whole(mask=torch.ones(SIZE, LENGTH, dtype=torch.long)))


def test_unpadding_is_seen_although_the_first_batch_has_no_padding():
    def unpad(h, mask):
        return h.flatten(0, 1) if bool(mask.all()) else h[mask.bool()]

    model = Mixer(unpad)
    fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match=r"picks rows|not independent"):
        model(**whole(mask=torch.ones(SIZE, LENGTH, dtype=torch.long)))


def test_another_switch_mode_or_argument_is_tried_again():
    def sometimes(h, negatives=False, other=None):
        return h + h.mean(0) if negatives or other is not None or model.training else h

    model = Mixer(sometimes).eval()
    fastclip.attach(model, 1.0)
    model(**whole()).sum().backward()
    for change in ({"negatives": True}, {"other": torch.ones(SIZE)}):
        with pytest.raises(ValueError, match="not independent"):
            model(**whole(**change))
    model.train()
    with pytest.raises(ValueError, match="not independent"):
        model(**whole())


@pytest.mark.parametrize("form", ["dataclass", "flattened", "plain"])
def test_mixing_behind_the_last_layer(form):
    class Last(Mixer):
        def forward(self, x):
            rows = super().forward(x)
            rows = rows + rows.mean(0)
            return Out(rows) if form == "dataclass" else rows.flatten(0, 1) if form == "flattened" else rows

    model = Last(lambda h: h)
    fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="not independent"):
        model(torch.randn(SIZE, LENGTH, WIDTH))


def gpt2():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=19, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).train()


def test_a_loss_over_the_batchs_tokens_inside_the_model():
    model, ids = gpt2(), torch.randint(0, 19, (SIZE, LENGTH))
    fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="loss that the model returns"):
        model(input_ids=ids, labels=ids)
    model(input_ids=ids)


def test_a_loss_that_is_a_mean_over_examples_inside_the_model():
    class Loss(Mixer):
        def forward(self, x, labels):
            return F.cross_entropy(super().forward(x).mean(1), labels)

    model = Loss(lambda h: h)
    clipper = fastclip.attach(model, 0.1, loss_reduction="mean")
    batch = whole(labels=torch.randint(0, 2, (SIZE,)))

    def losses(m, b):
        return F.cross_entropy(Mixer.forward(m, b["x"]).mean(1), b["labels"], reduction="none")

    grads = unit_gradients(copy.deepcopy(model), losses, batch, list(range(SIZE)), "sum")
    model(**batch).backward()
    assert_norms(clipper.unit_norms, norms(grads))
    assert_gradients(collect(model), clipped_sum(grads, 0.1, "flat"))


def test_buffers_that_remember_the_data():
    class Remember(Mixer):
        def __init__(self):
            super().__init__(lambda h: h)
            self.register_buffer("mean", torch.zeros(WIDTH))

        def forward(self, x):
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
            return super().forward(x)

    model = Remember()
    fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="buffer"):
        model(torch.randn(SIZE, LENGTH, WIDTH))
    assert not model.mean.any()


def test_backward_hooks():
    model = Mixer(lambda h: h)
    clipper = fastclip.attach(model, 1.0)
    model.outer.register_full_backward_hook(lambda module, grads, outs: (grads[0] / grads[0].norm(),))
    with pytest.raises(ValueError, match="backward hook"):
        model(**whole())
    clipper.detach()


@pytest.mark.parametrize("length", [LENGTH, SIZE])
def test_a_loop_over_examples(length):
    model = Mixer(lambda h: h)
    looped = nn.ModuleDict({"model": model})
    looped.forward = lambda x: torch.stack([model(row) for row in x])
    fastclip.attach(looped, 1.0)
    with pytest.raises(ValueError, match="called more or less often"):
        looped(torch.randn(SIZE, length, WIDTH))


@pytest.mark.parametrize("length", [LENGTH, SIZE])
def test_a_layer_first_used_later(length):
    class Later(Mixer):
        use = False

        def __init__(self):
            super().__init__(lambda h: h)
            self.positions = nn.Linear(3, WIDTH)

        def forward(self, x):
            return super().forward(x + self.positions(torch.randn(length, 3)) if self.use else x)

    model = Later()
    fastclip.attach(model, 1.0)
    x = torch.randn(SIZE, length, WIDTH)
    model(x).sum().backward()
    model.use = True
    with pytest.raises(ValueError, match="did not run when the model was tried"):
        model(x)


def test_bare_parameters_met_at_two_ranks():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x):
            return x * self.weight

    class Twice(Mixer):
        def __init__(self):
            super().__init__(lambda h: self.scale(self.scale(h).mean(1)))
            self.scale = Scale()

    model = Twice()
    fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="different layouts"):
        model(**whole())


def test_positions_that_get_a_batch_dimension_later():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(9, 6)
            self.given = None

        def forward(self, ids):
            positions = torch.arange(ids.shape[1])[None] if self.given is None else self.given
            return self.tokens(ids) + self.positions(positions)

    model, ids = Learned(), torch.randint(0, 11, (SIZE, LENGTH))
    fastclip.attach(model, 1.0)
    model(ids).sum().backward()
    model.given = torch.arange(LENGTH).expand(SIZE, LENGTH)
    with pytest.raises(ValueError, match="cannot be told"):
        model(ids)


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.inner, self.outer = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, ids):
        x = self.table(ids)
        return self.outer(torch.softmax(self.inner(x) @ x.mT, -1) @ x)


@pytest.mark.parametrize("first", ["ordinary", "one unit", "none"])
@pytest.mark.parametrize("offsets", [[0, 4, 12], [0, 1, 12]])
def test_packed_rows_that_attend_to_each_other(first, offsets):
    model, ids = Attend(), torch.randint(0, 9, (1, 12))
    clipper = fastclip.attach(model, 1.0)
    if first == "ordinary":
        model(torch.randint(0, 9, (3, 4))).sum().backward()
    elif first == "one unit":
        with clipper.units(offsets=[0, 12]):
            model(ids).sum().backward()
    with pytest.raises(ValueError, match="packed batch are not independent"), clipper.units(offsets=offsets):
        model(ids)


def test_units_are_not_lost_when_the_whole_model_is_recomputed():
    model = Mixer(lambda h: h)
    clipper = fastclip.attach(model, 1.0)
    x = torch.randn(4, LENGTH, WIDTH, requires_grad=True)
    with clipper.units(ids=[0, 0, 1, 1]):
        loss = checkpoint(model, x, use_reentrant=True).sum()
    with pytest.raises(RuntimeError, match="recomputed in backward"):
        loss.backward()


def test_an_argument_that_belongs_to_all_is_named():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
    clipper = fastclip.attach(layer, 0.5)
    x, mask = torch.randn(SIZE, LENGTH, WIDTH), nn.Transformer.generate_square_subsequent_mask(LENGTH)
    with pytest.raises(ValueError, match="shared"):
        layer(x, src_mask=mask)

    def losses(m, b):
        return m(b["x"], src_mask=mask.to(b["x"].dtype)).sin().sum((1, 2))

    grads = unit_gradients(copy.deepcopy(layer), losses, {"x": x}, list(range(SIZE)), "sum")
    with clipper.units(ids=range(SIZE), shared=["src_mask"]):
        losses(layer, {"x": x}).sum().backward()
    assert_norms(clipper.unit_norms, norms(grads))
    assert_gradients(collect(layer), clipped_sum(grads, 0.5, "flat"))


def test_an_exception_that_somebody_keeps_does_not_stop_later_backwards():
    model = nn.Linear(3, 2)
    optimizer = fastclip.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
        module=model,
    )
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    kept = None
    try:
        model(torch.randn(4, 3)).sum().backward()
    except RuntimeError as error:
        kept = error
    assert kept is not None
    optimizer.zero_grad()
    model(torch.randn(4, 3)).sum().backward()
    assert bool(model.weight.grad.any())


def test_backward_inside_autocast_sums_in_fp32():
    model = nn.Linear(3, 2)
    clipper = fastclip.attach(model, 1.0)
    x = torch.randn(1024, 3) * 100

    def total(rows):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(rows).float().sum().backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    moved = float((total(x) - total(x[1:])).norm())
    assert bool((clipper.unit_norms > 1).all())
    assert moved <= 1 + 1e-3


def test_cancelling_calls_of_bare_parameters():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.LayerNorm(WIDTH)

        def forward(self, x):
            return self.scale(x) - self.scale(x.clone())

    model = Siamese()
    clipper = fastclip.attach(model, 1.0, "automatic")
    (1e5 * model(torch.randn(3, WIDTH))).sum().backward()
    assert float(model.scale.weight.grad.norm()) <= float(clipper.unit_norms.sum()) * 100 + 1e-6


class ContrastiveLoss(nn.Module):
    """In-batch negatives inside the model; ``wrap`` is how the losses leave it."""

    def __init__(self, wrap):
        super().__init__()
        self.q, self.k, self.wrap = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), wrap

    def forward(self, x, y):
        similarity = self.q(x) @ self.k(y).T
        target = torch.arange(len(x))
        return self.wrap(torch.stack([F.cross_entropy(similarity, target), F.cross_entropy(similarity.T, target)]))


class Attributes(dict):
    __getattr__ = dict.__getitem__


WRAPS = {
    "vector": lambda losses: losses,
    "one element": lambda losses: losses.mean().view(1),
    "namespace": lambda losses: types.SimpleNamespace(loss=losses.mean()),
    "own dict": lambda losses: Attributes(loss=losses.mean()),
    "nested": lambda losses: types.SimpleNamespace(out=[Attributes(loss=losses.mean())]),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_losses_of_the_whole_batch_in_any_wrapping(wrap):
    model = ContrastiveLoss(wrap)
    fastclip.attach(model, 1.0, loss_reduction="mean")
    with pytest.raises(ValueError, match="not independent in the loss"):
        model(torch.randn(SIZE, WIDTH), torch.randn(SIZE, WIDTH))


class MeanPenalty(torch.autograd.Function):
    """Passes h on, and adds the gradient of a penalty on the batch's mean."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.clone()

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return grad + h.mean(0).expand_as(h)


def hooked(rescale):
    def mix(h):
        if h.requires_grad:
            h.register_hook(rescale)
        return h

    return mix


def straight_through(h):
    mean = h.mean(0)
    return h + mean - mean.detach()


COUPLINGS = {
    "custom backward": MeanPenalty.apply,
    "hook that normalises": hooked(lambda g: g / g.norm()),
    "hook that averages": hooked(lambda g: g - g.mean(0)),
    "straight-through mean": straight_through,
    "checkpointed": lambda h: checkpoint(straight_through, h, use_reentrant=False),
    "checkpointed, reentrant": lambda h: checkpoint(straight_through, h, use_reentrant=True),
}


@pytest.mark.parametrize("mix", COUPLINGS.values(), ids=COUPLINGS)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_coupling_in_the_backward_alone(mix, packed):
    model = Mixer(mix)
    clipper = fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="in the backward of the model"):
        if packed:
            with clipper.units(offsets=[0, 2, 5, 9]):
                model(torch.randn(9, WIDTH))
        else:
            model(**whole())
    clipper.detach()
    with pytest.raises(ValueError, match="mixes units"):
        fastclip.check_units(model, lambda m, b: m(b).square().sum((1, 2)), torch.randn(SIZE, LENGTH, WIDTH))


@pytest.mark.parametrize("scale", [lambda g: 2 * g, lambda g: g / g.flatten(1).norm(dim=1)[:, None, None]])
def test_hooks_that_keep_to_one_example_are_followed(scale):
    model = Mixer(hooked(scale))
    x = whole()["x"]
    alone = [torch.autograd.grad(model(row[None]).square().sum(), list(model.parameters())) for row in x]
    fastclip.check_units(model, lambda m, b: m(b).square().sum((1, 2)), x)
    clipper = fastclip.attach(model, 1e6)
    model(x).square().sum().backward()
    wanted = torch.stack([torch.cat([g.flatten() for g in grads]).norm() for grads in alone])
    torch.testing.assert_close(clipper.unit_norms, wanted)


def test_recomputation_comes_back_when_trials_of_two_threads_end():
    original = torch.utils.checkpoint.CheckpointFunction
    both = threading.Barrier(2)

    def mix(h):
        both.wait(10)  # inside the trial of each
        return h

    def try_one():
        fastclip.check_units(Mixer(mix), lambda m, b: m(b).square().sum((1, 2)), torch.randn(3, LENGTH, WIDTH))

    threads = [threading.Thread(target=try_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.utils.checkpoint.CheckpointFunction is original
    assert not both.broken


def test_a_mean_over_the_tokens_of_a_packed_batch_inside_the_model():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(WIDTH, 8), nn.Linear(8, 3)

        def forward(self, x, labels):
            return F.cross_entropy(self.outer(self.inner(x)), labels)

    clipper = fastclip.attach(Tagger(), 1.0)
    labels = torch.tensor([0, 1, 2, 0, 1, -100, 1, 2, 0])
    with pytest.raises(ValueError, match="in the backward of the model"), clipper.units(offsets=[0, 2, 5, 9]):
        clipper.model(torch.randn(9, WIDTH), labels=labels)


def test_an_output_with_rows_of_nobody():
    class Extra(Mixer):
        def forward(self, x):
            rows = super().forward(x)
            return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])

    model = Extra(lambda h: h)
    fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="not independent"):
        model(torch.randn(SIZE, LENGTH, WIDTH))
