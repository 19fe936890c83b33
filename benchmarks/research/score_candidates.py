"""Which score to prune by, beyond row mass: what the loss and the output of a head say about each block.

    python benchmarks/research/score_candidates.py --output benchmarks/results/score_candidates.json

Every candidate is taken from the same forward and backward passes over training documents, pruned by once without any
fine-tuning, and judged by loss on validation documents and by passkeys. One forward pass suffices for "mass" and
"output"; "gradient" needs a backward pass with all attention weights in memory, which no kernel here can do.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from one_shot import evaluate, load, parser, save
from torch import Tensor

from sparse_prune import BlockPattern, Constraints
from sparse_prune.attention import PrunableAttention, attach
from sparse_prune.kernels import AttentionOptions
from sparse_prune.precision import fast_autocast
from sparse_prune.selection import LayerScores, select


class Recorder:
    """Dense attention of one layer that adds up the scores of every block.

    mass: the attention probability that a query gives to a key block. output: how far a head's output moves if the
    block is dropped, to first order in its mass. gradient: how the loss answers to a common change of the block's
    logits, the Taylor estimate of what dropping it costs (arXiv:1611.06440 does so for channels).

    Args:
        layer: A causal layer; the recorder takes the place of its `attend`.
        block_size: Tokens per block side.
    """

    def __init__(self, layer: PrunableAttention, block_size: int) -> None:
        self.layer, self.block_size = layer, block_size
        self.scores: dict[str, Tensor] = {}
        layer.attend = self.attend  # type: ignore[method-assign, assignment]

    def remove(self) -> None:
        """Give the layer its own attention back."""
        vars(self.layer).pop("attend")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, **dense: object) -> Tensor:
        """As `PrunableAttention.attend`, for one sequence without masks."""
        group = self.layer.num_heads // self.layer.num_kv_heads
        with torch.autocast(query.device.type, enabled=False):
            keys, values = (x.float().repeat_interleave(group, 1) for x in (key, value))
            scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale
            logits = query.float() @ keys.mT * scale
            logits.register_hook(self._record_gradient)
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            output = weights @ values
        self._record_forward(weights[0].detach(), values[0].detach(), output[0].detach())
        return output.to(query.dtype)

    def _record_forward(self, weights: Tensor, values: Tensor, output: Tensor) -> None:
        mass = self._per_block(weights)
        for power, name in ((1, "mean"), (2, "mean square"), (4, "mean fourth power")):
            self._add(f"mass, {name}", self._rows(mass**power).sum(2))
        self._add("mass, max", self._rows(mass).amax(2))
        parts = weights.unflatten(-1, (-1, self.block_size)).transpose(1, 2)  # (num_heads, kv_blocks, length, keys)
        held = parts @ values.unflatten(1, (-1, self.block_size))  # (num_heads, kv_blocks, length, head_dim)
        moved = (mass.mT[..., None] * output[:, None] - held).norm(dim=-1).mT
        self._add("output, mean square", self._rows(moved.square()).sum(2))
        self._add("output, max", self._rows(moved).amax(2))

    def _record_gradient(self, gradient: Tensor) -> None:
        # The loss is a mean over tokens: times their number, so that small numbers keep their digits.
        effect = self._per_block(gradient[0]).abs() * gradient.shape[-1]
        self._add("gradient, mean", self._rows(effect).sum(2))
        self._add("gradient, mean square", self._rows(effect.square()).sum(2))
        self._add("gradient, max", self._rows(effect).amax(2))

    def _per_block(self, values: Tensor) -> Tensor:
        """Sums over key blocks: (num_heads, length, kv_len) to (num_heads, length, kv_blocks)."""
        return values.unflatten(-1, (-1, self.block_size)).sum(-1)

    def _rows(self, values: Tensor) -> Tensor:
        """(num_heads, length, n) as (num_heads, q_blocks, block_size, n)."""
        return values.unflatten(1, (-1, self.block_size))

    def _add(self, name: str, scores: Tensor) -> None:
        self.scores[name] = self.scores[name] + scores if name in self.scores else scores


def record(model: Any, sequences: Tensor, block_size: int) -> dict[str, dict[str, Tensor]]:
    """Candidate -> layer -> scores, (num_heads, blocks, blocks)."""
    recorders = {layer.name: Recorder(layer, block_size) for layer in attach(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    for sequence in sequences:
        model(input_ids=sequence[None], labels=sequence[None], use_cache=False).loss.backward()
        model.zero_grad()
    for recorder in recorders.values():
        recorder.remove()
    first = next(iter(recorders.values()))
    found = {name: {layer: r.scores[name] for layer, r in recorders.items()} for name in first.scores}
    found["mass x gradient, max"] = {
        layer: (found["mass, max"][layer] * found["gradient, max"][layer]).sqrt() for layer in recorders
    }
    return found


def prune(model: Any, scores: dict[str, Tensor], length: int, block_size: int, sparsity: float) -> float:
    """Put the patterns of the scores in force; the share of blocks that went."""
    layers = attach(model)
    dense = [BlockPattern.dense(x.num_heads, length, length, (block_size,) * 2, x.causal) for x in layers]
    parts = [
        LayerScores(layer.name, scores[layer.name].float(), pattern, layer.num_kv_heads)
        for layer, pattern in zip(layers, dense, strict=True)
    ]
    patterns, _ = select(parts, Constraints(share_diagonals=0.0), sparsity=sparsity)
    for layer, pattern in zip(layers, patterns, strict=True):
        layer.pattern, layer.mode = pattern, "masked"
    return 1.0 - sum(p.kept_blocks for p in patterns) / sum(p.possible_count for p in patterns)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for the dense model, then one per candidate and sparsity."""
    model, tokenizer, sequences = load(arguments)
    candidates = record(model, sequences["train"], arguments.block_size)
    found = evaluate(model, tokenizer, sequences["val"], arguments.prompts)
    rows = [{"score": "dense", "sparsity": 0.0, **found}]
    print(rows[-1], flush=True)
    for name, scores in candidates.items():
        for sparsity in arguments.sparsities:
            achieved = prune(model, scores, arguments.length, arguments.block_size, sparsity)
            found = evaluate(model, tokenizer, sequences["val"], arguments.prompts)
            rows.append({"score": name, "sparsity": achieved, **found})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Parse arguments, measure, write JSON."""
    options = parser(__doc__, probes=3, sequences=2, prompts=4)
    arguments = options.parse_args()
    with fast_autocast("cpu"):
        save(arguments, measure(arguments))


if __name__ == "__main__":
    main()
