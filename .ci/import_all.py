"""Import every module of vitssl by its own name; a failure names the module."""

import importlib
import pathlib

root = pathlib.Path(__file__).resolve().parents[1]
files = sorted((root / "vitssl").rglob("*.py"))
for file in files:
    parts = file.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    print(name, flush=True)
    importlib.import_module(name)
print(f"imported {len(files)} modules")
