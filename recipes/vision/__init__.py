"""Image classification: a vision transformer, pretrained or from scratch."""
