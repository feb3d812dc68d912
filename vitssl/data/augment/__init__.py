"""Augmentations of supervised training, on the host."""
