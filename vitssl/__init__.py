"""vitssl: self-supervised vision transformers in JAX; five systems, one trainer."""

import importlib

__version__ = "0.1.0"

# Not on import: the command line starts in no time. `__init__.pyi` says the same to
# who reads types.
_PUBLIC = {
    "Features": "vitssl.run.inference",
    "load": "vitssl.run.inference",
    "normalise_sensors": "vitssl.data.modalities",
    "train": "vitssl.tools.own",
}
__all__ = [*_PUBLIC]


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitssl' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
