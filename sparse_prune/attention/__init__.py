"""Attention access: how the layers of a model are reached."""
