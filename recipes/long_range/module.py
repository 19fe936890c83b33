"""The Lightning module: a Transformer encoder trained from scratch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from sparse_prune.recipes.base.classification import ClassificationModule
from sparse_prune.recipes.long_range.data import CLS, PAD, VOCABULARY


class ListOpsEncoder(nn.Module):
    """Embeddings of tokens and positions, `nn.TransformerEncoder`, and a classifier on the first position.

    Args:
        length: Most tokens.
        num_classes: Number of classes.
        width: Size of the hidden state.
        layers: Number of layers.
        heads: Attention heads per layer.
        mlp: Size of the feed-forward layers.
        dropout: In [0, 1).
    """

    def __init__(
        self, length: int, num_classes: int, width: int, layers: int, heads: int, mlp: int, dropout: float
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(VOCABULARY), width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, heads, mlp, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.classes = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute logits, (batch, num_classes), of tokens, (batch, length)."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.tokens(input_ids) + self.positions(places)
        hidden = self.encoder(hidden, src_key_padding_mask=input_ids == PAD)
        return torch.as_tensor(self.classes(hidden[:, 0]))


class ListOpsModule(ClassificationModule):
    """Trains a `ListOpsEncoder`; sizes default to those of the benchmark.

    Args:
        length: Tokens of the data's examples.
        width: Size of the hidden state.
        layers: Number of layers.
        heads: Attention heads per layer.
        mlp: Size of the feed-forward layers.
        dropout: In [0, 1).
        learning_rate: Peak of AdamW's rate; warmed up linearly, then constant.
        warmup_steps: Optimizer steps of warm-up.
        weight_decay: AdamW's decay.
        train_only: Regular expression; parameters whose name it does not match are frozen. None trains all.
    """

    def __init__(
        self,
        length: int,
        width: int = 512,
        layers: int = 6,
        heads: int = 8,
        mlp: int = 2048,
        dropout: float = 0.1,
        learning_rate: float = 1e-4,
        warmup_steps: int = 1000,
        weight_decay: float = 0.1,
        train_only: str | None = None,
    ) -> None:
        classes = 10
        encoder = ListOpsEncoder(length, classes, width, layers, heads, mlp, dropout)
        super().__init__(
            encoder,
            classes,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            train_only=train_only,
        )
        self.save_hyperparameters()
        # Shows AttentionPruning the layers' masks: padded keys, no causality.
        self.example_input_array = torch.tensor([[CLS, *range(2, 10), PAD, PAD, PAD]])

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.as_tensor(self.model(input_ids))

    @override
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.forward(batch["input_ids"])
