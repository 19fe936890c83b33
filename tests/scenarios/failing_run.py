"""The causal_lm recipe, in which rank 0 cannot measure the KV cache and rank 1 cannot train the dense twin."""

from sparse_prune.callbacks import AttentionPruning
from sparse_prune.recipes.causal_lm.cli import CausalLMCLI, main
from sparse_prune.recipes.causal_lm.module import CausalLMModule


def no_cache(cli):
    raise RuntimeError(f"no room on rank {cli.trainer.global_rank}")


def no_training(module):
    pruned = any(isinstance(callback, AttentionPruning) for callback in module.trainer.callbacks)
    if module.global_rank == 1 and not pruned:
        raise RuntimeError("no room on rank 1")


CausalLMCLI.cache = no_cache
CausalLMModule.on_train_start = no_training

if __name__ == "__main__":
    main()
