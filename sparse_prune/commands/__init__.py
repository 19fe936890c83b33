"""The commands: `sparse-prune NAME`."""

COMMANDS = {
    "dashboard": ("sparse_prune.commands.dashboard.cli", "a W&B workspace and a report, charts laid out"),
    "evaluate": (
        "sparse_prune.commands.evaluate.cli",
        "perplexity, retrieval, KV bytes and speed, dense against pruned",
    ),
    "layers": ("sparse_prune.commands.layers", "which attention layers of a model can be pruned, and why not"),
    "recipes": ("sparse_prune.commands.recipes", "list the shipped fine-tuning runs, copy one, run one"),
    "report": ("sparse_prune.commands.report.cli", "one HTML page of a run, from its logs"),
}
"""Name -> module whose `main(args)` runs it, and what it does."""
