"""Recipes: complete fine-tuning runs with pruning, as Lightning command lines."""

if __name__ != "sparse_prune.recipes":
    raise ImportError("Import this package as `sparse_prune.recipes`, after `pip install -e .`.")
