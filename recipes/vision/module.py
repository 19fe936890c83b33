"""The Lightning module: a vision transformer with a classification head."""

from __future__ import annotations

from typing import Any

import torch

from sparse_prune.ranges import check_range
from sparse_prune.recipes.base.classification import ClassificationModule, class_settings
from sparse_prune.recipes.base.pretrained import load_pretrained


class VisionModule(ClassificationModule):
    """Fine-tunes `AutoModelForImageClassification`, or trains a ViT from scratch.

    Args:
        classes: Names of the data's classes, in the order of their numbers.
        image_size: Pixels per side of the data's images.
        model: As `locate` takes it (sparse_prune.recipes.base.pretrained); the head is new if it does not fit. None
            trains a ViT of the next four sizes from scratch.
        patch_size: Pixels per side of a patch.
        width: Size of the hidden state.
        layers: Number of layers.
        heads: Attention heads per layer.
        learning_rate: Peak of AdamW's rate; warmed up linearly, then constant.
        weight_decay: AdamW's decay.
        **training: As for `FineTuneModule`.

    Raises:
        ValueError: If a number is out of range, `width` is not a multiple of `heads`, `image_size` is not that of the
            model or not a multiple of `patch_size`, or the model does not take images of 3 channels.
    """

    def __init__(
        self,
        classes: list[str],
        image_size: int,
        model: str | None = None,
        patch_size: int = 4,
        width: int = 64,
        layers: int = 4,
        heads: int = 4,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        **training: Any,
    ) -> None:
        from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

        if model is None:
            check_range("[1, inf)", patch_size=patch_size, width=width, layers=layers, heads=heads)
            if width % heads:
                raise ValueError(f"`width` must be a multiple of `heads`, got {width} and {heads}. Change one of them.")
            if image_size % patch_size:
                raise ValueError(
                    f"`image_size` must be a multiple of `patch_size`, got {image_size} and {patch_size}. Change "
                    "one of them."
                )
            config = ViTConfig(
                image_size=image_size,
                patch_size=patch_size,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                **class_settings(classes),
            )
            vit = ViTForImageClassification(config)
        else:
            settings = {"dtype": torch.float32, "ignore_mismatched_sizes": True, **class_settings(classes)}
            vit = load_pretrained(AutoModelForImageClassification, model, **settings)
            if getattr(vit.config, "image_size", image_size) != image_size:
                raise ValueError(f"`data.image_size` must be {vit.config.image_size} for {model}, got {image_size}.")
            channels = getattr(vit.config, "num_channels", 3)
            if channels != 3:
                raise ValueError(
                    f"`model` must take images of 3 channels (red, green, blue), got {model!r} with {channels}. Name "
                    "another."
                )
        super().__init__(vit.train(), len(classes), learning_rate=learning_rate, weight_decay=weight_decay, **training)
        self.save_hyperparameters()
