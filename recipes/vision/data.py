"""The data module of labelled images, which are read on request."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from typing_extensions import override

from sparse_prune.ranges import check_range
from sparse_prune.recipes.base.classification import (
    ClassificationDataModule,
    Example,
    split_by_name,
    warn_of_rare_classes,
)
from sparse_prune.recipes.vision.images import LabelledImages, load_images


class ImageDataModule(ClassificationDataModule):
    """Images, resized to squares; classes take turns, so that splits are balanced.

    An image is read and resized when a loader asks for it, once per epoch. Files of a folder are also read once before
    the training, so that no broken one stops the run later.

    Args:
        data: "digits" (1797 handwritten digits of 8 x 8 pixels that scikit-learn ships), a folder with one folder of
            images per class, or `hub:NAME[:CONFIG[:IMAGE[:LABEL]]]` for the training split of a data set of the hub or
            in a folder (`data_rows`).
        image_size: Pixels per side after bilinear resizing.
        mean: Mean of the pretrained model's values in [0, 1]; it is subtracted.
        std: Standard deviation of the pretrained model's values; they are divided by it.
        batch_size: Images per batch.
        train_examples: Most images to train on.
        val_examples: Most images of validation.
        test_examples: Most images of the test.
        held_out_share: Share of a class's images in validation and in test, each, in (0, 0.5); a class of fewer than
            three images is only trained on.
        seed: Seed of the order of the training images.
        num_workers: Worker processes per loader that read images; 0: the training process reads them.

    Raises:
        FileNotFoundError: If the folder or the data set does not exist.
        ValueError: If a number is out of range, there are fewer than two classes, or an image has no label.
    """

    def __init__(
        self,
        data: str = "digits",
        image_size: int = 32,
        mean: float = 0.5,
        std: float = 0.5,
        batch_size: int = 32,
        train_examples: int = 100_000,
        val_examples: int = 1000,
        test_examples: int = 2000,
        held_out_share: float = 0.15,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        counts = {"train": train_examples, "val": val_examples, "test": test_examples}
        super().__init__(batch_size, counts, seed, num_workers)
        check_range("[1, inf)", image_size=image_size)
        check_range("(0, inf)", std=std)
        self.data, self.image_size, self.mean, self.std = data, image_size, mean, std
        self.held_out_share = held_out_share

    @cached_property
    def images(self) -> LabelledImages:
        """The images of all splits."""
        found = load_images(self.data)
        warn_of_rare_classes(dict(zip(found.classes, map(len, found.places()), strict=True)))
        return found

    @property
    @override
    def classes(self) -> list[str]:
        return self.images.classes

    @override
    def make(self, split: str, count: int) -> SquareImages:
        found: list[tuple[int, int]] = []
        for places in self.images.places():
            names = split_by_name([str(index) for index in range(len(places))], self.held_out_share)[split]
            found += [(turn, places[int(name)]) for turn, name in enumerate(names)]
        found.sort(key=lambda entry: entry[0])
        chosen = [place for _, place in found[:count]]
        self.images.check(chosen)
        return SquareImages(self.images, chosen, self.image_size, self.mean, self.std)


@dataclass(frozen=True)
class SquareImages(Dataset[Example]):
    """Some of the images, read and resized on request. Pickles, for workers that are spawned."""

    images: LabelledImages
    chosen: list[int]
    """Indices of the images."""
    size: int
    """Pixels per side."""
    mean: float
    std: float

    def __len__(self) -> int:
        return len(self.chosen)

    @override
    def __getitem__(self, index: int) -> Example:
        place = self.chosen[index]
        return {
            "pixel_values": self._pixels(self.images.read(place)),
            "labels": torch.tensor(self.images.numbers[place]),
        }

    def _pixels(self, image: np.ndarray[Any, Any]) -> Tensor:
        """Resize and normalise an image to (3, size, size)."""
        values = torch.from_numpy(image).float()
        values = values.expand(3, *values.shape) if values.dim() == 2 else values.movedim(-1, 0)
        size = (self.size, self.size)
        resized = F.interpolate(values[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        return (resized - self.mean) / self.std
