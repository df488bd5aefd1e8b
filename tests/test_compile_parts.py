"""torch.compile for layers whose own code is traced, with operators for the linear layers in it."""

import copy

import oracle
import pytest
import test_dora as dora
import torch
from compiled_models import compiled_family, with_poison
from families import Family
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastclip
from fastclip.opacus.layers import DPGRU, DPLSTM, DPRNN

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:fastclip"),
]


def parts() -> dict[str, nn.Module]:
    """By name, layers from [B, T, 4] or [T, B, 4] to 6 or 12 columns."""
    shared = DPRNN(4, 6, num_layers=2, bidirectional=True, batch_first=True)
    shared.l0_reverse.ih.weight = shared.l0.ih.weight  # one weight, two biases
    half = DPLSTM(4, 6, num_layers=2, batch_first=True)
    half.l1.hh.requires_grad_(False)
    return {
        "lstm": DPLSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True),
        "gru_time_major": DPGRU(4, 6, num_layers=2),
        "rnn_without_bias": DPRNN(4, 6, bias=False, nonlinearity="relu", batch_first=True),
        "rnn_of_one_weight": shared,
        "lstm_half_frozen": half,
        "other_sizes": nn.MultiheadAttention(6, 2, kdim=4, vdim=4, batch_first=True),
        "other_sizes_without_bias": nn.MultiheadAttention(6, 3, kdim=4, vdim=4, bias=False, batch_first=True),
        "keys_and_values": nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True),
        "all": nn.MultiheadAttention(6, 2, kdim=4, vdim=4, add_bias_kv=True, batch_first=True),
    }


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.query = layer, nn.Linear(4, 6)
        self.head = nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, 4] -> [B]
        layer = self.layer
        x = x if layer.batch_first else x.transpose(0, 1)
        if isinstance(layer, nn.MultiheadAttention):
            query = self.query(x)
            memory = x if layer.kdim == 4 else query * 2
            y = layer(query, memory, memory, need_weights=False)[0]
        else:
            y = layer(x)[0]
        y = y if layer.batch_first else y.transpose(0, 1)
        return (self.head(y) ** 2).sum((1, 2))


def losses(model: nn.Module, batch: oracle.Batch) -> torch.Tensor:
    return model(batch["x"])


def built(name: str) -> tuple[nn.Module, oracle.Batch, object]:
    torch.manual_seed(0)
    model, x = Around(parts()[name]), torch.randn(5, 3, 4)
    model(x)
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    if not isinstance(model.layer, nn.MultiheadAttention):
        model.query.requires_grad_(False)
    return model, {"x": x}, losses


@pytest.mark.parametrize(
    ("name", "level"),
    [(name, "example") for name in parts()]
    + [pytest.param(name, "user", marks=[] if name == "lstm" else [pytest.mark.slow]) for name in parts()],
)
def test_recurrent_layers_and_attention(name: str, level: str) -> None:
    compiled_family(Family(name, lambda: built(name), frozenset()), level, with_poison)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_inductor() -> None:
    compiled_family(Family("all", lambda: built("all"), frozenset()), "example", torch.compile)
    assert counters["stats"]["unique_graphs"] == 1


SLOW_DORA = {
    "roberta",
    "llama_dropout_base_trains",
    "gpt2_dropout_base_trains",
    "gpt2_dropout",
    "llama_dropout",
    "llama",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_DORA else [])
        for name in dora.CASES
        if name != "images"
    ],
)
def test_dora(name: str) -> None:
    """In one graph where the base layer is frozen, or another adapter's layer breaks it; exact anyway."""
    compiled_family(Family(name, dora.CASES[name], frozenset()), "example", with_poison)
    if "base" not in name and name not in ("roberta", "beside_lora"):
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = DPLSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y = pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]
        held = torch.arange(y.shape[1]) < lengths[:, None]  # [B, T]
        return ((self.head(y) ** 2).sum(2) * held).sum(1)


def test_packed_sequences_break_the_graph_and_are_exact() -> None:
    torch.manual_seed(0)
    model = Packed()
    batch = {"x": torch.randn(4, 5, 4), "lengths": torch.tensor([2, 5, 1, 4])}

    def build() -> object:
        return copy.deepcopy(model), batch, lambda m, b: m(b["x"], b["lengths"])

    compiled_family(Family("packed", build, frozenset()), "example", with_poison)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Cells(nn.Module):
    """Rows of several for each example, in a cell whose parts have forwards of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = DPLSTM(4, 6, batch_first=True), nn.Linear(6, 3)
        self.layer.l0.ih = Doubled(4, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, 2, T, 4]
        y = self.layer(x.flatten(0, 1))[0].reshape(x.shape[0], -1, 6)
        return (self.head(y) ** 2).sum((1, 2))


@pytest.mark.parametrize("compile", [lambda model: model, with_poison])
def test_parts_of_cells_with_forwards_of_their_own(compile: object) -> None:
    x = torch.randn(4, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    compiled_family(Family("cells", lambda: (Cells(), {"x": x}, losses), frozenset()), "example", compile)


def test_a_patched_part_of_a_cell_stays_patched() -> None:
    model = Cells()
    part, x = model.layer.l0.hh, torch.randn(4, 2, 3, 4)
    plain = part.forward
    patch = part.forward = lambda x: 3 * plain(x)
    before = model(x)
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    torch.testing.assert_close(model(x), before)
    clipper.detach()
    assert part.forward is patch


def test_is_causal_beside_appended_keys_is_refused() -> None:
    layer = nn.MultiheadAttention(6, 2, add_bias_kv=True, batch_first=True)
    clipper = fastclip.attach(layer, max_grad_norm=1.0)
    x, mask = torch.randn(4, 3, 6), nn.Transformer.generate_square_subsequent_mask(3)
    with clipper.units(ids=range(4), shared=["attn_mask"]), pytest.raises(ValueError, match="pass attn_mask"):
        layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)


def test_hooks_on_parts_of_dora_are_not_lost() -> None:
    """Nobody calls the parts of a followed adapter: one whose parts have hooks is not followed, and then refused."""
    model, batch, loss = dora.small("vectors")
    layer = next(m for m in model.modules() if getattr(m, "lora_magnitude_vector", None))
    layer.lora_A["default"].register_forward_hook(lambda module, args, out: 2 * out)
    units = oracle.unit_gradients(model, loss, batch)
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    try:
        loss(model, batch).sum().backward()
    except (RuntimeError, ValueError):
        return
    oracle.assert_norms(clipper.unit_norms, oracle.norms(units))
