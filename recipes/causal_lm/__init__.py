"""Causal language models: fine-tune while pruning attention, then report."""
