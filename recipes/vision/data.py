"""Labelled images of one size."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sparse_prune.recipes.finetune.classification import ClassificationDataModule, Example, in_order, split_by_name
from sparse_prune.recipes.finetune.sources import hub_rows
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
Images = dict[str, list[Any]]
"""Label -> images: arrays (height, width), PIL images or paths."""


class ImageDataModule(ClassificationDataModule):
    """Images, resized to squares; classes take turns, so that splits are balanced.

    Args:
        data: "digits" (1797 handwritten digits of 8 x 8 pixels that scikit-learn ships), a folder with one folder of
            images per class, or `hub:NAME[:CONFIG[:IMAGE[:LABEL]]]` for the training split of a hub data set.
        image_size: Pixels per side that images are resized to, bilinearly.
        mean: Subtracted from values in [0, 1]; the pretrained model's.
        std: Divides them; the pretrained model's.
        batch_size: Images per batch.
        train_examples: Most images to train on.
        val_examples: Most images of validation.
        test_examples: Most images of the test.
        held_out_share: Share of a class's images in validation and in test, each, in (0, 0.5).
        seed: Order of the training images.

    Raises:
        FileNotFoundError: If the folder is not there.
        ValueError: If a number is out of range or a class has fewer than three images.
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
    ) -> None:
        super().__init__(batch_size, {"train": train_examples, "val": val_examples, "test": test_examples}, seed)
        if image_size < 1:
            raise ValueError(f"`image_size` must be at least 1, got {image_size}.")
        if std <= 0:
            raise ValueError(f"`std` must be positive, got {std}.")
        self.data, self.image_size, self.mean, self.std = data, image_size, mean, std
        self.held_out_share = held_out_share

    @cached_property
    def images(self) -> Images:
        """Label -> images."""
        return load_images(self.data)

    @property
    @override
    def classes(self) -> list[str]:
        return list(self.images)

    @override
    def make(self, split: str, count: int) -> list[Example]:
        found: list[tuple[int, Any, int]] = []
        for label, images in enumerate(self.images.values()):
            names = split_by_name([str(index) for index in range(len(images))], self.held_out_share)[split]
            found += [(turn, images[int(name)], label) for turn, name in enumerate(names)]
        found.sort(key=lambda entry: entry[0])
        return [
            {"pixel_values": self._pixels(image), "labels": torch.tensor(label)} for _, image, label in found[:count]
        ]

    def _pixels(self, image: Any) -> Tensor:
        """(3, image_size, image_size)."""
        values = torch.from_numpy(_values(image)).float()
        values = values.expand(3, *values.shape) if values.dim() == 2 else values.movedim(-1, 0)
        size = (self.image_size, self.image_size)
        resized = F.interpolate(values[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        return (resized - self.mean) / self.std


def _values(image: Any) -> np.ndarray[Any, Any]:
    """(height, width) or (height, width, 3), in [0, 1]."""
    if isinstance(image, np.ndarray):
        return image
    from PIL import Image

    opened = Image.open(image) if isinstance(image, Path) else image
    return np.asarray(opened.convert("RGB"), dtype=np.float32) / 255.0


def load_images(data: str) -> Images:
    """Label -> images; see `ImageDataModule` for what `data` may be. They are in the order of the classes."""
    found: Images = {}
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        for image, label in zip(digits.images, digits.target, strict=True):
            found.setdefault(str(label), []).append(image / 16.0)
    elif data.startswith("hub:"):
        rows, (image, label) = hub_rows(data.removeprefix("hub:"), ["image", "label"], "data")
        for row in rows:
            found.setdefault(str(row[label]), []).append(row[image])
    else:
        root = Path(data).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"`data` must be 'digits', hub:NAME, or an existing folder, got {data!r}.")
        for path in sorted(path for path in root.glob("*/*") if path.suffix.lower() in _SUFFIXES):
            found.setdefault(path.parent.name, []).append(path)
    if len(found) < 2:
        raise ValueError(f"`data` must hold images of at least two classes, got {sorted(found)} in {data!r}.")
    return {label: found[label] for label in in_order(found)}
