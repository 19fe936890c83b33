"""The Lightning module: an encoder with a classification head."""

from __future__ import annotations

import torch
from sparse_prune.recipes.finetune.classification import ClassificationModule
from sparse_prune.recipes.finetune.pretrained import locate


class TextClassificationModule(ClassificationModule):
    """Fine-tunes `AutoModelForSequenceClassification`; the head is new where the weights have none that fits.

    Args:
        model: As `locate` takes it (sparse_prune.recipes.finetune.pretrained).
        num_classes: Classes; the data's.
        learning_rate: Peak of AdamW's rate; warmed up linearly, then constant.
        warmup_steps: Optimizer steps of warm-up.
        weight_decay: AdamW's decay.
        train_only: Regular expression; parameters whose name it does not match are frozen. None trains all.
    """

    def __init__(
        self,
        model: str,
        num_classes: int,
        learning_rate: float = 5e-5,
        warmup_steps: int = 0,
        weight_decay: float = 0.01,
        train_only: str | None = None,
    ) -> None:
        from transformers import AutoModelForSequenceClassification

        where, options = locate(model)
        encoder = AutoModelForSequenceClassification.from_pretrained(
            where, dtype=torch.float32, num_labels=num_classes, ignore_mismatched_sizes=True, **options
        )
        super().__init__(encoder.train(), num_classes, learning_rate, warmup_steps, weight_decay, train_only)
        self.save_hyperparameters()
