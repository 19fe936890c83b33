"""`sparse-prune dashboard`: a W&B workspace and a W&B report for pruning runs."""
