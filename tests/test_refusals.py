"""Models, inputs and units that cannot be private, and layouts that cannot be told: refused, with the remedy."""

import copy

import pytest
import torch
from oracle import assert_gradients, assert_norms, clipped_sum, collect, norms, pick_clipping_norm, unit_gradients
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import fastclip


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=17,
            num_local_experts=2,
        )
    )


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "batch statistics"),
        (lambda: nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 3)), "recurrent"),
        (
            lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, track_running_stats=True)),
            "running statistics",
        ),
        (lambda: nn.Embedding(5, 3, max_norm=1.0), "max_norm"),
        (lambda: nn.Embedding(5, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: nn.Embedding(5, 3, sparse=True), "sparse"),
        (lambda: nn.EmbeddingBag(5, 3, mode="max"), "mode"),
        (lambda: nn.Linear(2, 3).half(), "fp16"),
        (lambda: nn.LazyLinear(3), "lazy"),
        (lambda: nn.Linear(2, 3).requires_grad_(False), "no trainable parameter"),
        (lambda: nn.DataParallel(nn.Linear(2, 3)), "before wrapping"),
        (mixtral, "mixture-of-experts"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_models(build, word):
    model = build()
    with pytest.raises(ValueError, match=word):
        fastclip.attach(model, 1.0)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_batch_norm_set_to_train_later():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3).eval().requires_grad_(False))
    fastclip.attach(model, 1.0)
    model(torch.randn(4, 2)).sum().backward()
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(torch.randn(4, 2))


class TimeMajor(nn.Module):
    """[T, B, D] inside: dim 0 of a layer's input is not the batch."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.outer = nn.Linear(4, 1)

    def forward(self, x):
        return self.outer((self.inner(x.transpose(0, 1))).transpose(0, 1) * self.scale).squeeze(-1)


@pytest.mark.parametrize("length", [2, 4, 5])  # T = B = 4 too
def test_time_major_inside_is_followed(length):
    model, batch = TimeMajor(), {"x": torch.randn(4, length, 3)}

    def loss(m, b):
        return m(b["x"]).square().sum(1)

    grads = unit_gradients(copy.deepcopy(model), loss, batch, [0, 1, 2, 3], "sum")
    c = pick_clipping_norm(norms(grads))
    clipper = fastclip.attach(model, c)
    loss(model, batch).sum().backward()
    assert_norms(clipper.unit_norms, norms(grads))
    assert_gradients(collect(model), clipped_sum(grads, c, "flat"))


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 4, 3)])
def test_time_major_input_is_refused(shape):
    """The model thinks that dim 1 is the batch; attention over dim 0 mixes what fastclip would take for units."""
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=False)
    fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="not independent"):
        model(torch.randn(*shape[:2], 4))


class InBatch(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.inner, self.outer, self.how = nn.Linear(3, 4), nn.Linear(4, 4), how

    def forward(self, x):
        x = self.inner(x)
        return self.outer(x - x.mean(0) if self.how == "mean" else (x @ x.T) @ x)


@pytest.mark.parametrize("how", ["mean", "product"])
@pytest.mark.parametrize("size", [2, 4])
def test_mixing_examples_is_refused(how, size):
    model = InBatch(how)
    fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="not independent"):
        model(torch.randn(size, 3))


def tiny_gpt2():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=19, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("length", [3, 4])  # 4: as long as the batch is large
@pytest.mark.parametrize("extra", ["position_ids", "mask4d", "scalar"])
def test_other_inputs_first_do_not_decide(length, extra):
    """Positions ``[1, T]``, a mask ``[1, 1, T, T]`` or a scalar before the ids once made the batch one unit."""
    inner = tiny_gpt2()

    class Wrapper(nn.Module):
        main_input_name = "input_ids"

        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, other, input_ids):
            options = {}
            if extra == "position_ids":
                options = {"position_ids": other}
            elif extra == "mask4d":
                options = {"attention_mask": other}
            logits = self.inner(input_ids=input_ids, **options).logits
            return logits * other if extra == "scalar" else logits

    other = {
        "position_ids": torch.arange(length)[None],
        "mask4d": torch.ones(length, length).tril()[None, None].bool(),
        "scalar": torch.tensor(1.5),
    }[extra]
    model, ids = Wrapper(), torch.randint(0, 19, (4, length))

    def loss(m, b):
        return m(other, b["ids"]).square().sum((1, 2))

    def double_loss(m, b):
        moved = other.double() if other.is_floating_point() else other
        return m(moved, b["ids"]).square().sum((1, 2))

    grads = unit_gradients(copy.deepcopy(model), double_loss, {"ids": ids}, [0, 1, 2, 3], "sum")
    clipper = fastclip.attach(model, 1.0)
    loss(model, {"ids": ids}).sum().backward()
    assert_norms(clipper.unit_norms, norms(grads))


@pytest.mark.parametrize("size", [4, 8])  # 8: as many examples as positions
def test_positions_without_a_batch_dimension_are_refused_where_units_cannot_be_told(size):
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(8, 6)

        def forward(self, positions, ids):
            return self.tokens(ids) + self.positions(positions)

    model = Learned()
    fastclip.attach(model, 1.0)
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.arange(8), torch.randint(0, 11, (size, 8)))


@pytest.mark.parametrize("size", [4, 7])  # 7: as many examples as positions
def test_positions_made_inside_are_followed(size):
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(11, 6), nn.Embedding(9, 6), nn.Linear(6, 2)

        def forward(self, ids):
            return self.head(torch.tanh(self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))))

    model, batch = Learned(), {"ids": torch.randint(0, 11, (size, 7))}

    def loss(m, b):
        return m(b["ids"]).square().sum((1, 2))

    grads = unit_gradients(copy.deepcopy(model), loss, batch, list(range(size)), "sum")
    c = pick_clipping_norm(norms(grads))
    clipper = fastclip.attach(model, c)
    loss(model, batch).sum().backward()
    assert_norms(clipper.unit_norms, norms(grads))
    assert_gradients(collect(model), clipped_sum(grads, c, "flat"))


def test_sizes_that_coincide_later_do_not_change_the_units():
    class Pairs(nn.Module):
        """Rows in dim 0 are picked by an index that has as many entries as the second batch has examples."""

        def __init__(self):
            super().__init__()
            self.scale, self.out = nn.Parameter(torch.rand(3) + 0.5), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(x[:, torch.tensor([0, 1, 1, 0])] * self.scale).sum(1)

    model = Pairs()
    clipper = fastclip.attach(model, 0.1)
    for size in (3, 4, 1):
        batch = {"x": torch.randn(size, 2, 3)}

        def loss(m, b):
            return m(b["x"]).square().sum(1)

        grads = unit_gradients(copy.deepcopy(model), loss, batch, list(range(size)), "sum")
        model.zero_grad()
        loss(model, batch).sum().backward()
        assert_norms(clipper.unit_norms, norms(grads))
        assert_gradients(collect(model), clipped_sum(grads, 0.1, "flat"))


@pytest.mark.parametrize(
    ("units", "word"),
    [
        ({}, "exactly one"),
        ({"ids": [1, 2], "offsets": [0, 2]}, "exactly one"),
        ({"ids": [0.5, 1.5]}, "ids must be integers"),
        ({"ids": [[1], [2]]}, "ids must be integers"),
        ({"ids": [1, 2], "reduction": "max"}, "reduction"),
        ({"offsets": [1, 3]}, "start at 0"),
        ({"offsets": [0, 3, 2]}, "never decrease"),
        ({"offsets": [0, 3], "reduction": "mean"}, "needs ids"),
        ({"offsets": [0.0, 3.0]}, "offsets must be integers"),
    ],
)
def test_bad_units(units, word):
    clipper = fastclip.attach(nn.Linear(3, 2), 1.0)
    with pytest.raises(ValueError, match=word), clipper.units(**units):
        pass


def test_ids_and_offsets_of_the_wrong_length():
    model = nn.Linear(3, 2)
    clipper = fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="4 rows for 3 ids"), clipper.units(ids=[1, 2, 3]):
        model(torch.randn(4, 3))
    with pytest.raises(ValueError, match="offsets end at 5"), clipper.units(offsets=[0, 2, 5]):
        model(torch.randn(4, 3))


def test_packed_mean_needs_the_number_of_examples():
    model = nn.Linear(3, 2)
    clipper = fastclip.attach(model, 1.0, loss_reduction="mean")
    with pytest.raises(ValueError, match="num_examples"), clipper.units(offsets=[0, 2, 4]):
        pass
    with clipper.units(offsets=[0, 2, 4], num_examples=2):
        x = torch.randn(4, 3)
        (model(x).square().sum() / 2).backward()
    assert clipper.unit_norms.shape == (2,)


def test_packed_segments_that_see_each_other_are_refused():
    class Smooth(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.outer(self.inner(x).cumsum(0))

    model = Smooth()
    clipper = fastclip.attach(model, 1.0)
    with pytest.raises(ValueError, match="not independent"), clipper.units(offsets=[0, 2, 5]):
        model(torch.randn(5, 3))


class Remembers(nn.Module):
    """Writes what it sees into its own state, which is published with the model."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer, self.forwards = kind, nn.Linear(4, 2), 0
        self.shift = nn.Parameter(torch.zeros(4))
        self.store = nn.ParameterList([nn.Parameter(torch.zeros(4), requires_grad=False)])
        self.register_buffer("counts", torch.zeros(4, dtype=torch.int64))

    def forward(self, x):
        self.forwards += 1
        with torch.no_grad():
            if self.kind == "first batch" and self.forwards == 1:
                self.shift.copy_(-x.mean(0))
            if self.kind == "frozen average":
                self.store[0].mul_(0.9).add_(0.1 * x.mean(0))
            if self.kind == "late" and self.forwards > 30:
                self.layer.bias.copy_(x.mean(0)[:2])
            if self.kind == "counts":
                self.counts += torch.bincount(x.argmax(1), minlength=4)
        return self.layer(x + self.shift)


@pytest.mark.parametrize("kind", ["first batch", "frozen average", "late", "counts"])
def test_models_that_write_data_into_their_state_are_refused(kind):
    model = Remembers(kind)
    fastclip.attach(model, max_grad_norm=1.0)
    with pytest.raises((RuntimeError, ValueError), match=r"published without noise"):
        for _ in range(40):
            model(torch.randn(4, 4) + 5).sum().backward()
            model.zero_grad()


def test_a_model_that_cannot_run_on_an_empty_batch_says_what_to_do():
    class Halves(nn.Linear):
        def forward(self, x):
            return super().forward(x.view(x.shape[0], -1, 2))

    model = Halves(2, 3)
    fastclip.attach(model, 1.0)
    with pytest.raises(RuntimeError, match=r"leave out its forward .* step\(\)"):
        model(torch.zeros(0, 4))
    model(torch.randn(3, 4)).sum().backward()  # and is as it was


def test_a_models_own_loss_is_named():
    from families import FAMILIES

    model, batch, _ = FAMILIES["gpt2"].build()
    fastclip.attach(model, 1.0)
    ids = batch["input_ids"]
    with pytest.raises(ValueError, match=r"fastclip\.huggingface"):
        model(input_ids=ids, labels=ids).loss.backward()
