"""Losses of several methods: arrays -> a float32 scalar to minimise.

A loss is written on the global batch: under jit on a sharded batch its statistics
are those of all devices, with no collective in the code.
"""
