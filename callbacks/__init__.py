"""Lightning callbacks: gradual pruning, the swap to sparse kernels, and logging."""

if __name__ != "sparse_prune.callbacks":
    raise ImportError("Import this package as `sparse_prune.callbacks`, after `pip install -e .`.")
