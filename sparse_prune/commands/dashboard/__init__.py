"""A W&B workspace and a report for pruning runs."""
