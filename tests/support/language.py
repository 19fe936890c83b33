"""A language model written by hand."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS = 32, 4


class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class NanoGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attentions = nn.ModuleList(CausalSelfAttention() for _ in range(2))

    def forward(self, tokens):
        x = self.embed(tokens)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return self.head(x)


class LanguageModule(pl.LightningModule):
    def __init__(self, compiled=False):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.compile(NanoGPT(), backend="aot_eager") if compiled else NanoGPT()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
