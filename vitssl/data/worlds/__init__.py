"""Procedural worlds: pictures generated from a seed, with everything in them known."""
