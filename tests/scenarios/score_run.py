"""One rank of a two-process run that prunes by influence, with DDP or FSDP2: its averages after the first decision."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fsdp_run import Sharded
from pytorch_lightning.strategies import ModelParallelStrategy

from sparse_prune import Influence
from support.tiny import TinyModule, batches, pruning, trainer


class Half:
    """Every rank takes its half of the same batch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch.chunk(2)[self.global_rank], batch_idx)


class Copied(Half, TinyModule):
    """On all ranks whole."""


class Split(Half, Sharded):
    """A part on each rank."""


if __name__ == "__main__":
    target, kind = Path(sys.argv[1]), sys.argv[2]
    sharded = kind == "fsdp"
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp"
    callback, module = pruning(score=Influence()), Split() if sharded else Copied()
    run = trainer(target, [callback], steps=1, strategy=strategy, devices=2, use_distributed_sampler=False)
    run.fit(module, batches(batch_size=4))
    found = {name: state.scores.value() for name, state in callback.pruner.layers.items()}
    torch.save(found, target / f"{kind}{run.global_rank}.pt")
