"""vitssl: self-supervised vision transformers in JAX; five systems, one trainer."""

__version__ = "0.1.0"
