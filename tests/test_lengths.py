"""Models that pad to the longest example: its length must not reach the others, and masked padding does not."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastclip
from fastclip.opacus.layers import DPLSTM


class Padded(nn.Module):
    """Losses over what is padded to the longest example of the batch, masked or not."""

    def __init__(self, masked: bool, in_order: bool) -> None:
        super().__init__()
        self.masked, self.in_order = masked, in_order
        self.layer, self.head = DPLSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.in_order)
        y, lengths = pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        held = (torch.arange(y.shape[1]) < lengths[:, None]) | torch.tensor(not self.masked)  # [B, T]
        return ((self.head(y) ** 2).sum(2) * held).sum(1)


class Longest(nn.Module):
    """A mean over as many tokens as the longest example of the batch has."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.layer = name, nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        lengths = given[self.name].sum(1) if self.name == "attention_mask" else given[self.name]
        return self.layer(x)[:, : int(lengths.max())].square().mean((1, 2))


@pytest.mark.parametrize("lengths", [[2, 8, 3, 2], [8, 8, 8, 8], [8, 8, 3, 2], [8, 3], [8]])
@pytest.mark.parametrize("name", ["attention_mask", "lengths", "lens"])
def test_whoever_is_longest(name: str, lengths: list[int]) -> None:
    """Ties, the middle one, two examples: 10 C had come through."""
    model = Longest(name)
    fastclip.attach(model, max_grad_norm=1.0)
    given = torch.tensor(lengths)
    mask = (torch.arange(8) < given[:, None]).long()
    with pytest.raises(ValueError, match="not independent"):
        model(torch.randn(len(lengths), 8, 4), **{name: mask if name == "attention_mask" else given})


# The longest among the first three, behind them, in the order that packing may ask for.
LENGTHS = {"first_three": [2, 5, 1, 4], "behind": [2, 2, 2, 5], "in_order": [5, 4, 2, 1], "three": [3, 3, 5]}


@pytest.mark.parametrize("name", LENGTHS)
def test_unmasked_padding_is_refused(name: str) -> None:
    model = Padded(False, name == "in_order")
    fastclip.attach(model, max_grad_norm=1.0)
    x, lengths = torch.randn(len(LENGTHS[name]), 5, 4), torch.tensor(LENGTHS[name])
    with pytest.raises(ValueError, match="how long another one is"):
        model(x, lengths)


@pytest.mark.parametrize("name", LENGTHS)
def test_masked_padding_is_not(name: str) -> None:
    model = Padded(True, name == "in_order")
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    x, lengths = torch.randn(len(LENGTHS[name]), 5, 4), torch.tensor(LENGTHS[name])
    model(x, lengths).sum().backward()
    assert (clipper.unit_norms > 0).all()


class Outputs(nn.Module):
    """Answers of the longest example's length, for a loss outside."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.layer, self.left = DPLSTM(4, 6, batch_first=True), left

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y = pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]
        if not self.left:
            return y
        held = torch.arange(y.shape[1]) - (int(lengths.max()) - lengths[:, None])  # [B, T]
        return y.gather(1, held.clamp(min=0)[:, :, None].expand_as(y)) * (held >= 0)[:, :, None]


@pytest.mark.parametrize("left", [False, True])
def test_longer_outputs_are_no_mixing(left: bool) -> None:
    model = Outputs(left)
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    lengths = torch.tensor([2, 3, 1, 5])
    out = model(torch.randn(4, 5, 4), lengths)
    (out**2).sum((1, 2)).sum().backward()
    assert (clipper.unit_norms > 0).all()
