"""Text classification: an encoder (BERT, MiniLM, any of the hub) that classifies documents."""
