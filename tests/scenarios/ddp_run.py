"""One rank of a two-process run; Lightning starts the other."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny import TinyModule, batches, pruning, trainer

if __name__ == "__main__":
    target = Path(sys.argv[1])
    callback, module = pruning(), TinyModule()
    fit = trainer(target, [callback], strategy="ddp", devices=2)
    fit.fit(module, batches())
    found = {name: pattern.keep for name, pattern in callback.pruner.patterns.items()}
    modes = [state.layer.mode for state in callback.pruner.layers.values()]
    torch.save({"patterns": found, "losses": module.losses, "modes": modes}, target / f"rank{fit.global_rank}.pt")
