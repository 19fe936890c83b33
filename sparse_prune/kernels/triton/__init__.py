"""Triton kernels: block-sparse attention forward and backward, and the probe."""
