"""Stage c: a Llama is pruned, swapped, checkpointed, resumed, exported and decodes; run by `campaign.py`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu.session import DEVICE, about
from gpu.training import Module, Steps, fit, llama, pruning, text
from rows import Rows

from sparse_prune.cache import PatternCache
from sparse_prune.callbacks import AttentionPruning
from sparse_prune.export import load, save_pretrained

STEPS, CUT = 12, 9
"""Of the whole run, and of the one that is broken off, which is after the swap."""


class Run:
    """One model through everything; each method is a check that needs those before it."""

    def __init__(self, size: str, length: int, block: int, folder: Path) -> None:
        self.size, self.length, self.block, self.folder = size, length, block, folder
        self.tokens = text(length, STEPS)
        self.module: Module
        self.pruning: AttentionPruning

    def _fit(self, steps: int, resume: Path | None = None) -> tuple[Module, AttentionPruning, Any]:
        callback = pruning(0.4, 4, 1, self.block, "triton")
        module = Module(llama(self.size, self.length))
        return module, callback, fit(module, self.tokens, [callback, Steps(callback)], steps, self.folder, resume)

    def train(self) -> dict[str, Any]:
        """Every layer is swapped to the kernels, and the loss falls."""
        self.module, self.pruning, _ = self._fit(STEPS)
        swapped = [event.backend for event in self.pruning.swap.events]
        losses = [float(loss) for loss in self.module.losses]
        if set(swapped) != {"triton"} or len(swapped) != len(self.pruning.pruner.layers):
            raise ArithmeticError(f"layers were swapped to {swapped}")
        if not losses[-1] < losses[0]:
            raise ArithmeticError(f"the loss went from {losses[0]} to {losses[-1]}")
        return {"losses": losses, "sparsity": self.pruning.pruner.total_sparsity}

    def resume(self) -> dict[str, Any]:
        """A run that is broken off after the swap and goes on has the losses of the unbroken one."""
        _, _, trainer = self._fit(CUT)
        path = self.folder / "cut.ckpt"
        trainer.save_checkpoint(path)
        again, _, _ = self._fit(STEPS, path)
        found = torch.stack(again.losses).float()
        wanted = torch.stack(self.module.losses[CUT:]).float()
        difference = float((found - wanted).abs().max())
        if not difference <= (1e-2 if DEVICE == "cuda" else 1e-6):
            raise ArithmeticError(f"the resumed run's losses are off by {difference:.3g}")
        return {"difference": difference}

    @torch.no_grad()
    def export(self) -> dict[str, Any]:
        """What was saved and loaded again gives the logits of the model that was saved."""
        save_pretrained(self.module.model, self.folder / "exported", pruner=self.pruning.pruner)
        self.module.model.to(DEVICE).eval()
        loaded = load(self.folder / "exported").to(DEVICE)
        tokens = self.tokens[:1].to(DEVICE)
        wanted, found = (model(tokens, use_cache=False).logits for model in (self.module.model, loaded))
        difference = float((found - wanted).abs().max())
        if not difference <= 1e-2:
            raise ArithmeticError(f"the loaded model's logits are off by {difference:.3g}")
        return {"difference": difference}

    @torch.no_grad()
    def decode(self) -> dict[str, Any]:
        """Prefill and single tokens through `PatternCache` give the logits of one pass."""
        model, tokens = load(self.folder / "exported").to(DEVICE), self.tokens[:1].to(DEVICE)
        wanted, cache, prompt = model(tokens, use_cache=False).logits, PatternCache(model), self.length - 3
        parts = [tokens[:, :prompt], *tokens[:, prompt:].split(1, 1)]
        found = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
        difference = float((found - wanted).abs().max())
        if not difference <= 1e-2:
            raise ArithmeticError(f"the cache's logits are off by {difference:.3g}")
        return {"difference": difference, "cache_bytes": cache.nbytes()}


def main() -> None:
    """All checks, unless the output has them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    size, length, block = ("tiny", 64, 16) if arguments.rehearse else ("small", 1024, 64)
    kept = Rows(arguments.output, {"size": size, "length": length, "block": block}, about())
    with tempfile.TemporaryDirectory() as folder:
        run = Run(size, length, block, Path(folder))
        for name in ("train", "resume", "export", "decode"):
            found = kept.attempt(name, getattr(run, name))
            if found is not None and name not in {row["name"] for row in kept.rows}:
                kept.add({"name": name, **found})
    kept.finish()


if __name__ == "__main__":
    main()
