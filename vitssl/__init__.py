"""vitssl: self-supervised vision transformers in JAX; five systems, one trainer."""

__version__ = "0.1.0"


def load(path, **options):
    """Return a callable from images to features; see `vitssl.run.inference.load`."""
    from vitssl.run import (
        inference,  # Not on import: the command line starts in no time.
    )

    return inference.load(path, **options)
