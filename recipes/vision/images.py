"""Labelled images: the labels are known, an image is read when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_prune.recipes.base.classification import in_order
from sparse_prune.recipes.base.hub import PREFIX, hub_classes, hub_rows

_NAMED = 3  # broken files that an error names
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes. Copies and pickles with its references, not with pictures."""

    classes: list[str]
    """Names, in the order of their numbers."""
    numbers: list[int]
    """The class of every image."""
    images: Sequence[Any]
    """Arrays (height, width) in [0, 1], paths, or a data set's column, which reads an image when it is asked for."""

    def places(self) -> list[list[int]]:
        """Class -> where its images stand, in their order."""
        found: list[list[int]] = [[] for _ in self.classes]
        for place, number in enumerate(self.numbers):
            found[number].append(place)
        return found

    def read(self, place: int) -> np.ndarray[Any, Any]:
        """An image, (height, width) or (height, width, 3), in [0, 1]."""
        image = self.images[place]
        if isinstance(image, np.ndarray):
            return image
        from PIL import Image

        if isinstance(image, Path):
            with Image.open(image) as opened:
                return _values(opened)
        return _values(image)

    def check(self, places: Sequence[int]) -> None:
        """Refuse files that are no images or are cut; every file is read once. Images of a data set are not looked at.

        Args:
            places: Which images.

        Raises:
            ValueError: If some cannot be read; the message names the first few.
        """
        broken = []
        for place in places if isinstance(self.images, list) else ():  # a data set's column reads what it is asked for
            if isinstance(image := self.images[place], Path):
                try:
                    self.read(place)
                except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for what is not as it should be
                    broken.append(f"{str(image)!r} ({error})")
        if broken:
            more = f", and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
            raise ValueError(
                f"`data` must hold images that can be read, got {'; '.join(broken[:_NAMED])}{more}. Copy them again, "
                "or remove them."
            )


def _values(image: Any) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0


def load_images(data: str) -> LabelledImages:
    """Images as `ImageDataModule` takes them.

    Raises:
        FileNotFoundError: If the folder is not there.
        ValueError: If there are fewer than two classes. See `hub_rows` and `hub_classes` for data sets of the hub.
    """
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        found = _named([str(label) for label in digits.target], list(digits.images / 16.0))
    elif data.startswith(PREFIX):
        rows, (image, label) = hub_rows(data, ["image", "label"], "data")
        found = LabelledImages(*hub_classes(rows, label, "data"), rows[image])
    else:
        root = Path(data).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"`data` must be 'digits', hub:NAME, or an existing folder, got {data!r}.")
        paths = sorted(path for path in root.glob("*/*") if path.suffix.lower() in _SUFFIXES)
        found = _named([path.parent.name for path in paths], paths)
    if len(found.classes) < 2:
        raise ValueError(f"`data` must hold images of at least two classes, got {found.classes} in {data!r}.")
    return found


def _named(labels: list[str], images: Sequence[Any]) -> LabelledImages:
    classes = in_order(set(labels))
    numbers = {label: number for number, label in enumerate(classes)}
    return LabelledImages(classes, [numbers[label] for label in labels], images)
