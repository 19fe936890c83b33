"""Lightning callbacks: gradual pruning, the swap to sparse kernels, and logging."""

if __name__ != "sparse_prune.callbacks":
    raise ImportError("Import this package as `sparse_prune.callbacks`, after `pip install -e .`.")

from sparse_prune.callbacks.attention_pruning import AttentionPruning
from sparse_prune.callbacks.checkpoints import newest_checkpoint
from sparse_prune.callbacks.kernel_swap import KernelSwap
from sparse_prune.callbacks.restore import restore_patterns
from sparse_prune.callbacks.sparsity_logger import SparsityLogger
from sparse_prune.callbacks.wandb_logger import FallbackWandbLogger
from sparse_prune.retrieval import Retrieval, RetrievalHeads
from sparse_prune.swap_event import SwapEvent

__all__ = [
    "AttentionPruning",
    "FallbackWandbLogger",
    "KernelSwap",
    "Retrieval",
    "RetrievalHeads",
    "SparsityLogger",
    "SwapEvent",
    "newest_checkpoint",
    "restore_patterns",
]
