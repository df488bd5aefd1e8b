"""FakeData: random pictures with random labels, the same ones on every visit."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset


class FakeData(Dataset):
    """`size` pictures; picture `i` depends on `i` alone, and is a tensor in [0, 1] where torchvision's is a PIL image."""

    def __init__(
        self,
        size: int = 1000,
        image_size: tuple[int, int, int] = (3, 224, 224),
        num_classes: int = 10,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        random_offset: int = 0,
    ) -> None:
        self.size = size
        self.image_size = image_size
        self.num_classes = num_classes
        self.transform = transform
        self.target_transform = target_transform
        self.random_offset = random_offset

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        # A generator of its own: looking at a picture must not move the global state that the tests seed.
        generator = torch.Generator().manual_seed(index + self.random_offset)
        picture: Any = torch.rand(self.image_size, generator=generator)
        target: Any = int(torch.randint(0, self.num_classes, (), generator=generator))
        if self.transform is not None:
            picture = self.transform(picture)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return picture, target
