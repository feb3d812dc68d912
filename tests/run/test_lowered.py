"""Every published recipe, lowered for an NVIDIA GPU that need not be here.

With its widths, images and numbers of tokens, but two blocks and a few images, which
change neither the kernel of an attention nor the precision of a product. Programs that
differ in nothing but rates are lowered once.
"""

import pathlib
import re

import jax
import pytest

from vitssl import config
from vitssl.bench import hlo
from vitssl.methods.latent_mim import network
from vitssl.run import build, experiment

ROOT = pathlib.Path(__file__).parents[2]
FILES = {path.stem: path for path in config.files(ROOT / "configs")}
FLOAT32 = 0.005  # Share of the products.
LITERAL = 10**6  # Bytes.


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def _small(c) -> dict:
    """Return the overrides that leave two blocks and a few images of a recipe."""
    found = {"batch_size": 4, "data.threads": 1, "data.workers": 0}
    found |= {"accumulate": 1, "per_device": 0}
    if "depths" in c.get("model", {}):
        found["model.depths"] = (1,) * len(c.model.depths)
    elif "model" in c:
        found["model.depth"] = 2
    if c.method == "localmim":
        scales = c.stages.scales[:4]
        found |= {"stages.scales": scales, "stages.blocks": tuple(range(len(scales)))}
        found["model.depth"] = len(scales)
    if c.method == "hjepa":
        found["predictor.depth"] = 1
    if c.method == "latent_mim":
        width, heads, *_ = network.SIZES[c.network.size]
        found |= {"network.width": width, "network.heads": heads, "network.size": ""}
        found |= {"network.depth": 1, "network.decoder_depth": 1}
    return found


def _published(path):
    """Yield (name, checked config in small) of the recipes in bfloat16 of a file."""
    for name in config.module(str(path)).RECIPES:
        c = config.recipe(f"{path}:{name}")
        needs = ["teacher.from=untrained"] if c.method == "distill" else []
        experiment.apply(c, ["init.from=DIR", *needs])
        if c.precision == "bfloat16":
            c = experiment.read(c).config
            small = _small(c)
            for key, value in small.items():
                section, _, field = key.rpartition(".")
                with c.unlocked():
                    (c[section] if section else c)[field] = value
            yield name, c


def _program(e) -> str:
    """Return what programs of the same text have in common: no rates, only whether."""
    text = repr(sorted(e.sections.items(), key=lambda item: item[0]))
    return re.sub(r"\d+\.\d*(e-?\d+)?", lambda m: str(float(m[0]) > 0), text)


def _counts(e) -> hlo.Counts:
    if getattr(e.sections.get("parts"), "masked", False):
        c = e.config  # Noise has no masks, drawn birds do.
        c.data.update(source="birds", root="", split="train")
        c.data.options = type(c.data)()
        e = experiment.read(c)
    else:
        e = experiment.with_noise(e)
    parts = build.build(e)
    phase = parts.phase(0)
    program = parts.compiled.program(phase)
    return hlo.count(
        hlo.lowered(program, parts.compiled.abstract(phase), parts.shapes(0))
    )


def _faults(counts: hlo.Counts):
    """Yield what must not be in a step on a GPU."""
    if not counts.forward:
        yield "no attention is fused"
    if counts.maps:
        yield f"{counts.maps} products of attention are not fused"
    if counts.float32 > FLOAT32:
        yield f"{100 * counts.float32:.2f} % of the products are in float32"
    if counts.literal > LITERAL:
        yield f"a literal of {counts.literal / 1e6:.1f} MB"


@pytest.mark.parametrize("file", FILES)
def test_published_recipes_are_fused_on_a_gpu_with_and_without_remat(file):
    seen, faults = set(), []
    for name, c in _published(FILES[file]):
        section = c.network if "network" in c else c.model
        program = _program(experiment.read(c))
        if program in seen:
            continue
        # What is recomputed is traced once more; without, the first of a file will do.
        for remat in (True,) if seen else (True, False):
            section.remat = remat
            try:
                counts = _counts(experiment.read(c))
            except Exception as e:  # noqa: BLE001 - all of them, by name.
                faults.append(f"{name}, remat={remat}: {type(e).__name__}: {e}")
                continue
            print(f"{file}:{name} remat={remat} {counts}")
            faults += [f"{name}, remat={remat}: {x}" for x in _faults(counts)]
        seen.add(program)
    assert not faults, "\n".join(faults)
