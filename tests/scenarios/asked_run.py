"""One rank of a two-process run that asks questions before it prunes, with DDP or FSDP2: least scores and patterns.

With FSDP2 it then asks for whole heads, which are refused.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fsdp_run import Sharded
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from sparse_prune.callbacks import Retrieval
from support.tiny import TinyModule, pruning, trainer


def fit(target, sharded, retrieval):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp"
    callback = pruning(retrieval=retrieval)
    tokens = torch.randint(0, 32, (8, 128), generator=torch.Generator().manual_seed(1))
    run = trainer(target, [callback], steps=2, strategy=strategy, devices=2)
    run.fit(Sharded() if sharded else TinyModule(), DataLoader(tokens, batch_size=2))
    return run, callback


if __name__ == "__main__":
    target, sharded = Path(sys.argv[1]), sys.argv[2] == "fsdp"
    run, callback = fit(target, sharded, Retrieval(probes=2))
    found = {
        "asked": {
            f"{name} {topic}": average.value()
            for name, state in callback.pruner.layers.items()
            for topic, average in state.asked.items()
        },
        "patterns": {name: pattern.keep for name, pattern in callback.pruner.patterns.items()},
    }
    if sharded:
        try:
            fit(target, sharded, Retrieval(heads=0.5))
        except ValueError as error:
            found["refused"] = str(error)
    torch.save(found, target / f"rank{run.global_rank}.pt")
