"""ListOps of Long Range Arena: nested list operations of up to 2000 tokens, an encoder trained from scratch."""
