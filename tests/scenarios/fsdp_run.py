"""One process of a run with FSDP2 through Lightning, or of the same run alone; resumes if asked to."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from sparse_prune.callbacks import KernelSwap
from support.tiny import TinyModule, batches, pruning, tiny_llama, trainer


class Sharded(TinyModule):
    """Built and sharded in `configure_model`, which runs after the callbacks' `setup`."""

    def __init__(self):
        super().__init__(torch.nn.Identity())

    def configure_model(self):
        self.model = tiny_llama()
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer.self_attn, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def fit(target, steps, ckpt_path=None):
    callback, module, swap = pruning(), Sharded(), KernelSwap("gather")
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    saver = ModelCheckpoint(target, filename="step{step}", auto_insert_metric_name=False, every_n_train_steps=8)
    run = trainer(target, [callback, swap, saver], steps, strategy=strategy, devices=2, enable_checkpointing=True)
    run.fit(module, batches(), ckpt_path=ckpt_path)
    return run, callback, module, swap


if __name__ == "__main__":
    target = Path(sys.argv[1])
    run, callback, module, swap = fit(target, 12)
    run.strategy.barrier()
    again, resumed, rest, later = fit(target / "again", 12, str(target / "step8.ckpt"))
    found = {
        "patterns": {name: pattern.keep for name, pattern in callback.pruner.patterns.items()},
        "resumed": {name: pattern.keep for name, pattern in resumed.pruner.patterns.items()},
        "losses": module.losses,
        "rest": rest.losses,
        "same_swaps": swap.events == later.events,
        "modes": [state.layer.mode for state in resumed.pruner.layers.values()],
    }
    torch.save(found, target / f"rank{run.global_rank}.pt")
