"""The Lightning module: an encoder with a classification head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from sparse_prune.recipes.base.classification import ClassificationModule, class_settings
from sparse_prune.recipes.base.pretrained import check_length, load_pretrained, load_tokenizer


class TextClassificationModule(ClassificationModule):
    """Fine-tunes `AutoModelForSequenceClassification`; the head is new if the weights have none that fits.

    Args:
        model: As `locate` takes it (sparse_prune.recipes.base.pretrained).
        classes: Names of the data's classes, in the order of their numbers.
        learning_rate: Peak of AdamW's rate; warmed up linearly, then constant.
        warmup_steps: Optimizer steps of warm-up.
        weight_decay: AdamW's decay.
        train_only: Regular expression; parameters whose name it does not match are frozen. None trains all.
    """

    def __init__(
        self,
        model: str,
        classes: list[str],
        learning_rate: float = 5e-5,
        warmup_steps: int = 0,
        weight_decay: float = 0.01,
        train_only: str | None = None,
    ) -> None:
        from transformers import AutoModelForSequenceClassification

        settings = {"dtype": torch.float32, "ignore_mismatched_sizes": True, **class_settings(classes)}
        encoder = load_pretrained(AutoModelForSequenceClassification, model, **settings)
        if encoder.config.pad_token_id is None:  # decoders need it to find the last real token
            encoder.config.pad_token_id = load_tokenizer(model, padding=True).pad_token_id
        super().__init__(encoder.train(), len(classes), learning_rate, warmup_steps, weight_decay, train_only)
        self.save_hyperparameters()

    @override
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        check_length(self.model, batch["input_ids"].shape[1], "data.max_length")
        return super().logits(batch)
