"""Small modules in the registry of families: one layer kind or one way of using it each.

Shapes are [B, T, D] with B = 5, T = 7 (B = 5 in the "square" cases), D = 6. The loss is a fixed weighted sum over each
example's outputs and their squares, so that no row, position or channel counts like another.
"""

import torch
from families import VOCAB, B, Case, T, family, mask, randomize, tokens
from oracle import Batch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import weight_norm

D = 6


def floats(*shape: int, seed: int = 1) -> Tensor:
    """Standard normals, the examples at different scales: their gradients differ in norm."""
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return draw * torch.linspace(0.5, 1.6, shape[0]).view(-1, *[1] * (len(shape) - 1))


def output_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B]: the model takes the batch's tensors in order."""
    y = model(*batch.values()).flatten(1)
    weights = torch.arange(1, y.shape[1] + 1, dtype=y.dtype).cos()
    return ((y + 0.3 * y * y) * weights).sum(1)


def keyword_loss(model: nn.Module, batch: Batch) -> Tensor:
    """As `output_loss`, the model called by keyword."""
    return output_loss(lambda *_: model(**batch), batch)


def case(model: nn.Module, **batch: Tensor) -> Case:
    return randomize(model), batch, output_loss


def between(layer: nn.Module) -> nn.Module:
    """The layer on [.., D], with trainable layers on both sides, so that its input gradient is tested as well."""
    return nn.Sequential(nn.Linear(D, D), layer, nn.Tanh(), nn.Linear(D, 3))


class Wrap(nn.Module):
    """`run(self, *inputs)` as forward, over the given children and parameters."""

    def __init__(self, **parts: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def two_layers(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 9, bias=bias), nn.Tanh(), nn.Linear(9, 5, bias=bias))


# Linear: shapes, strides, sharing.

family("linear_2d", "output", "float")(lambda: case(two_layers(), x=floats(B, D)))
family("linear_3d", "output", "float")(lambda: case(two_layers(), x=floats(B, T, D)))
family("linear_4d", "output", "float")(lambda: case(two_layers(bias=False), x=floats(B, 3, 2, D)))


class Transposed(Wrap):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.transpose(1, 2)).transpose(1, 2).tanh())


class Expanded(Wrap):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.expand(-1, T, -1)).tanh())


class ExpandedBatch(Wrap):
    """The first layer's input is one tensor expanded over the batch: stride 0 along the units."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.base.expand(len(x), -1, -1)).tanh() * x)


class Broadcast(Wrap):
    """The first layer's rows have no unit dimension: what it gives is added to every example."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(self.base).tanh() + x).tanh())


class TimeMajor(Wrap):
    """Layers of one row a token that see [T, B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x.transpose(0, 1))).tanh()).transpose(0, 1)


class Flattened(Wrap):
    """A layer that sees [B T, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.reshape(-1, D)).tanh()).view(len(x), -1)


class Repeated(Wrap):
    """One layer called three times, on what it gave before."""

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for _ in range(3):
            h = self.layer(input=h).tanh() + x
        return h


class Keywords(Wrap):
    def forward(self, *, ids: Tensor, scale: Tensor) -> Tensor:
        return self.layer(input=self.norm(input=self.table(input=ids))) * scale


class SharedWeight(Wrap):
    """Two modules, two biases, one weight."""

    def __init__(self) -> None:
        super().__init__(first=nn.Linear(D, D), second=nn.Linear(D, D))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@family("linear_transposed", "output", "float")
def linear_transposed() -> Case:
    return case(Transposed(first=nn.Linear(D, D), second=nn.Linear(T, 3)), x=floats(B, D, T))


@family("linear_expanded", "output", "float")
def linear_expanded() -> Case:
    return case(Expanded(first=nn.Linear(D, 4), second=nn.Linear(4, 3)), x=floats(B, 1, D))


@family("linear_expanded_batch", "output", "float")
def linear_expanded_batch() -> Case:
    model = ExpandedBatch(first=nn.Linear(4, D), second=nn.Linear(D, 3), base=floats(1, T, 4, seed=2))
    return case(model, x=floats(B, T, D))


@family("linear_broadcast", "output", "float")
def linear_broadcast() -> Case:
    model = Broadcast(first=nn.Linear(4, D), second=nn.Linear(D, 3), base=floats(1, T, 4, seed=2))
    return case(model, x=floats(B, T, D))


@family("linear_keywords", "output", "float")
def linear_keywords() -> Case:
    model = Keywords(layer=nn.Linear(D, 4), norm=nn.LayerNorm(D), table=nn.Embedding(VOCAB, D))
    return randomize(model), {"ids": tokens(B, T), "scale": floats(B, T, 1)}, keyword_loss


@family("linear_time_major", "output", "float")
def linear_time_major() -> Case:
    return case(TimeMajor(first=nn.Linear(D, 4), second=nn.Linear(4, 3), norm=nn.LayerNorm(4)), x=floats(B, T, D))


@family("linear_flattened", "output", "float")
def linear_flattened() -> Case:
    return case(Flattened(first=nn.Linear(D, 4), second=nn.Linear(4, 3)), x=floats(B, T, D))


family("linear_repeated", "output", "float", "shared")(lambda: case(Repeated(layer=nn.Linear(D, D)), x=floats(B, T, D)))
family("linear_shared_weight", "output", "float", "shared")(lambda: case(SharedWeight(), x=floats(B, T, D)))
family("linear_weight_norm", "output", "float", "loop")(
    lambda: case(between(weight_norm(nn.Linear(D, D))), x=floats(B, T, D))
)

# Norms and activations.

for _name, _layer in {
    "layer_norm": lambda: nn.LayerNorm(D),
    "layer_norm_no_bias": lambda: nn.LayerNorm(D, bias=False),
    "layer_norm_two_dims": lambda: nn.LayerNorm((T, D)),
    "rms_norm": lambda: nn.RMSNorm(D),
    "prelu": lambda: nn.PReLU(T),
}.items():
    family(_name, "output", "float", *(["loop"] if _name == "prelu" else []))(
        lambda layer=_layer: case(between(layer()), x=floats(B, T, D))
    )

# Convolutions, and the norms over channels.


def convolutions(first: nn.Module, *middle: nn.Module, last: nn.Module, shape: tuple[int, ...]) -> Case:
    return case(nn.Sequential(first, *middle, nn.Tanh(), last), x=floats(B, *shape))


family("conv1d", "output", "float")(
    lambda: convolutions(nn.Conv1d(4, 6, 3, stride=2, padding=1), last=nn.Conv1d(6, 3, 2, bias=False), shape=(4, 9))
)
family("conv1d_replicate", "output", "float")(
    lambda: convolutions(nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), last=nn.Conv1d(6, 3, 1), shape=(4, 9))
)
family("conv2d", "output", "float")(
    lambda: convolutions(nn.Conv2d(4, 6, 3, groups=2, dilation=2), last=nn.Conv2d(6, 3, (2, 1)), shape=(4, 9, 8))
)
family("conv2d_same", "output", "float")(
    lambda: convolutions(nn.Conv2d(3, 4, (3, 1), padding="same"), last=nn.Conv2d(4, 2, 3, stride=2), shape=(3, 7, 6))
)
family("conv2d_circular", "output", "float")(
    lambda: convolutions(
        nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), last=nn.Conv2d(4, 2, 3), shape=(3, 7, 6)
    )
)
family("group_norm", "output", "float")(
    lambda: convolutions(nn.Conv1d(4, 6, 3), nn.GroupNorm(3, 6), last=nn.Conv1d(6, 3, 2), shape=(4, 9))
)
family("instance_norm", "output", "float")(
    lambda: convolutions(nn.Conv1d(4, 6, 3), nn.InstanceNorm1d(6, affine=True), last=nn.Conv1d(6, 3, 2), shape=(4, 9))
)
family("instance_norm_2d", "output", "float")(
    lambda: convolutions(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), last=nn.Conv2d(4, 2, 2), shape=(3, 7, 6)
    )
)

# Embeddings. Ids repeat within an example; position ids have no batch dimension of their own.


class Positions(Wrap):
    """Position ids made in forward: [1, T], or [T] with `flat`."""

    flat = False

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1])
        h = self.table(ids) + self.positions(positions if self.flat else positions[None])
        return self.head(h.tanh())


class FlatPositions(Positions):
    flat = True


class GivenPositions(Wrap):
    def forward(self, position_ids: Tensor, input_ids: Tensor) -> Tensor:
        return self.head((self.table(input_ids) + self.positions(position_ids)).tanh())


def embedded(**options: object) -> dict[str, nn.Module]:
    return {"table": nn.Embedding(VOCAB, D, **options), "positions": nn.Embedding(9, D), "head": nn.Linear(D, 3)}


family("embedding_padding", "output")(
    lambda: case(Positions(**embedded(padding_idx=0)), ids=(tokens(B, T) % 4).masked_fill(mask() == 0, 0))
)
family("embedding_positions", "output")(lambda: case(Positions(**embedded()), ids=tokens(B, T)))
family("embedding_flat_positions", "output")(lambda: case(FlatPositions(**embedded()), ids=tokens(B, T)))
family("embedding_flat_positions_square", "output", "square")(
    lambda: case(FlatPositions(**embedded()), ids=tokens(B, B))
)


@family("embedding_given_positions", "output")
def embedding_given_positions() -> Case:
    """The model's first tensor is [1, T], broadcast over the batch."""
    model, _, loss = case(GivenPositions(**embedded()))
    positions = torch.tensor([[0, 1, 2, 3, 4, 2, 1]])
    return model, {"position_ids": positions, "input_ids": tokens(B, T)}, loss


for _mode in ("sum", "mean"):
    family(f"embedding_bag_{_mode}", "output")(
        lambda mode=_mode: case(
            nn.Sequential(nn.EmbeddingBag(VOCAB, D, mode=mode), nn.Linear(D, 3)), ids=tokens(B, T) % 5
        )
    )


class WeightedBag(Wrap):
    """Sums with a weight an id, means without padding."""

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.head(self.weighted(ids, per_sample_weights=weights) + self.mean(ids))


@family("embedding_bag_weighted", "output", "float")
def embedding_bag_weighted() -> Case:
    weighted = nn.EmbeddingBag(VOCAB, D, mode="sum", padding_idx=1)
    mean = nn.EmbeddingBag(VOCAB, D, mode="mean", padding_idx=2)
    model = WeightedBag(weighted=weighted, mean=mean, head=nn.Linear(D, 3))
    return case(model, ids=tokens(B, T) % 5, weights=floats(B, T))


class SharedTable(Wrap):
    """One table in an embedding that leaves out row 0, in one that does not, and in the head."""

    def __init__(self) -> None:
        super().__init__(padded=nn.Embedding(VOCAB, D, padding_idx=0), table=nn.Embedding(VOCAB, D))
        self.head = nn.Linear(D, VOCAB)
        self.table.weight = self.head.weight = self.padded.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.padded(ids) + self.table(ids.flip(1))).tanh())


family("embedding_shared_table", "output", "shared")(lambda: case(SharedTable(), ids=tokens(B, T) % 4))

# Attention as torch has it.


class Attention(Wrap):
    """[B, T, D] outside; [T, B, D] inside unless the layer is batch_first."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        h = h if self.attention.batch_first else h.transpose(0, 1)
        h = self.attention(h, h, h, need_weights=False)[0]
        return self.after(h if self.attention.batch_first else h.transpose(0, 1))


class CrossAttention(Wrap):
    """Keys and values of another width and length, some of them masked."""

    def forward(self, x: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        h = self.attention(query=self.before(x), key=memory, value=memory, key_padding_mask=hidden > 0)[0]
        return self.after(h)


class MixedAttention(Wrap):
    """One layer that attends to its own input, then to other rows, under a mask; its weights count as well."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        h, own = self.attention(x, x, x, attn_mask=self.mask, is_causal=True)
        h, other = self.attention(h, memory, memory + 0.5, average_attn_weights=False)
        return torch.cat([h, own, other.mean(1)], 2)


def attention(batch_first: bool, length: int = T) -> Case:
    layers = {"before": nn.Linear(D, 8), "after": nn.Linear(8, 3)}
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    return case(Attention(attention=layer, **layers), x=floats(B, length, D))


family("attention_batch_first", "output", "float")(lambda: attention(True))
family("attention_time_first", "output", "float")(lambda: attention(False))
family("attention_time_first_square", "output", "float", "square")(lambda: attention(False, length=B))


@family("attention_cross", "output", "float")
def attention_cross() -> Case:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, kdim=3, vdim=3, bias=False)
    model = CrossAttention(attention=layer, before=nn.Linear(D, 8), after=nn.Linear(8, 3))
    return case(model, x=floats(B, 4, D), memory=floats(B, T, 3, seed=2), hidden=1 - mask())


@family("attention_mixed", "output", "float", "shared")
def attention_mixed() -> Case:
    layer = nn.MultiheadAttention(D, 2, batch_first=True)
    model = MixedAttention(attention=layer, mask=torch.ones(4, 4).triu(1).bool())
    return case(model, x=floats(B, 4, D), memory=floats(B, T, D, seed=2))


for _first in (False, True):
    family(f"transformer_encoder_layer{'_pre_norm' if _first else ''}", "output", "float")(
        lambda first=_first: case(
            nn.Sequential(
                nn.Linear(D, 8),
                nn.TransformerEncoderLayer(8, 2, 13, dropout=0.0, batch_first=True, norm_first=first),
                nn.Linear(8, 3),
            ),
            x=floats(B, T, D),
        )
    )

# Parameters that belong to no layer: used by the forward that owns them.


class Scale(Wrap):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.gain) * self.temperature


class AddedPositions(Wrap):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x + self.positions).tanh())


class Token(Wrap):
    """A learned token in front of the sequence, and learned rows behind it."""

    def forward(self, x: Tensor) -> Tensor:
        prompt = self.prompt.unsqueeze(0).expand(len(x), -1, -1)
        return self.layer(torch.cat([self.token.expand(len(x), -1, -1), x, prompt], 1)).cumsum(1).tanh()


class Products(Wrap):
    """Matrices multiplied in four ways, one of them transposed."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.matmul(x, self.first).tanh()
        h = torch.einsum("btd,de->bte", h, self.second).tanh()
        h = (h @ self.third.t() + self.shift).tanh()
        return linear(h, self.fourth)


class Indexed(Wrap):
    """A bare table looked up by the ids, and its row 0 for everyone."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer((self.table[ids] + self.table[0]).tanh())


class TiedBare(Wrap):
    """A table looked up by this module itself and used by a head."""

    def __init__(self) -> None:
        super().__init__(table=parameter(VOCAB, D), head=nn.Linear(D, VOCAB))
        self.head.weight = self.table

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table[ids].tanh())


def positions(*shape: int, length: int = T) -> Case:
    return case(AddedPositions(positions=parameter(*shape), layer=nn.Linear(D, 3)), x=floats(B, length, D))


@family("parameter_scale", "output", "float")
def parameter_scale() -> Case:
    return case(Scale(gain=parameter(D), temperature=parameter(), layer=nn.Linear(D, 3)), x=floats(B, T, D))


family("parameter_positions", "output", "float")(lambda: positions(1, T, D))
family("parameter_positions_flat", "output", "float")(lambda: positions(T, D))
family("parameter_positions_square", "output", "float", "square")(lambda: positions(B, D, length=B))


@family("parameter_token", "output", "float", "loop")
def parameter_token() -> Case:
    return case(Token(token=parameter(1, 1, D), prompt=parameter(2, D), layer=nn.Linear(D, 3)), x=floats(B, T, D))


@family("parameter_products", "output", "float", "loop")
def parameter_products() -> Case:
    model = Products(
        first=parameter(D, 4), second=parameter(4, 5), third=parameter(6, 5), shift=parameter(6), fourth=parameter(3, 6)
    )
    return case(nn.Sequential(nn.Linear(D, D), model), x=floats(B, T, D))


@family("parameter_indexed", "output", "shared", "loop")
def parameter_indexed() -> Case:
    return case(Indexed(table=parameter(VOCAB, D), layer=nn.Linear(D, 3)), ids=tokens(B, T) % 5)


family("parameter_tied", "output", "shared", "loop")(lambda: case(TiedBare(), ids=tokens(B, T) % 5))
