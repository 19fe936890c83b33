"""Which attention layers of a model can be pruned: `sparse-prune layers MODEL`."""
