"""vitssl: self-supervised vision transformers in JAX; five systems, one trainer."""

__version__ = "0.1.0"


def load(path, **options):
    """Return a callable from images to features; see `vitssl.run.opened.load`."""
    from vitssl.run import opened  # Not on import: the command line starts in no time.

    return opened.load(path, **options)
