"""Three small nets under the names of large ones: convolutions with BatchNorm, and the last layer's attribute name.

Opacus' tests use them for one thing, that BatchNorm is found and can be replaced; none of them is trained. Channels are
32, which divides into the groups of Opacus' replacement.
"""

from typing import Any

import torch
from torch import nn

CHANNELS = 32


class _Block(nn.Module):
    """A convolution, its BatchNorm, and the way around both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn1(self.conv1(x)) + x)


class _Features(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, CHANNELS, 3, stride=2, bias=False), nn.BatchNorm2d(CHANNELS), _Block(), _Block())


def _pooled(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


class ResNet(nn.Module):
    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.layer1 = _Features()
        self.fc = nn.Linear(CHANNELS, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(_pooled(self.layer1(x)))


class DenseNet(nn.Module):
    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = _Features()
        self.classifier = nn.Linear(CHANNELS, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(_pooled(self.features(x)))


class MobileNetV3(nn.Module):
    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = _Features()
        self.classifier = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.Hardswish(), nn.Linear(CHANNELS, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(_pooled(self.features(x)))


def _untrained(weights: Any) -> None:
    if weights is not None:
        raise ValueError("the stand-in for torchvision has no trained weights")


def resnet18(*, weights: Any = None, **kwargs: Any) -> ResNet:
    _untrained(weights)
    return ResNet(**kwargs)


def densenet121(*, weights: Any = None, **kwargs: Any) -> DenseNet:
    _untrained(weights)
    return DenseNet(**kwargs)


def mobilenet_v3_small(*, weights: Any = None, **kwargs: Any) -> MobileNetV3:
    _untrained(weights)
    return MobileNetV3(**kwargs)
