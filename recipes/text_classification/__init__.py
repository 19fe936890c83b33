"""Text classification: an encoder (BERT, MiniLM, any of the hub) that tells classes of documents apart."""
