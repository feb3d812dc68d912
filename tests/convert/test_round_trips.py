"""Every family: in, out and in again gives the same bits, and nothing goes unsaid."""

import functools
import re

import numpy as np
import pytest

from tests import runs
from tests.convert import checkpoints, pth, published, test_cnn
from vitssl import errors, tree
from vitssl.convert import __main__ as command
from vitssl.convert import (
    backbone,
    exporter,
    families,
    family,
    importer,
    reader,
)
from vitssl.run import warmstart

HEADS = family.Options(heads=2)
NETWORKS = {  # Family: (fields of a ViT, the layout that is its own).
    "hf_vit": (dict(norm_eps=1e-12), "hf"),
    "hf_dinov2": (dict(layerscale=1e-5, registers=2), "hf"),
    "bigvision": (dict(), "bigvision"),
}
TREES = checkpoints.TREES | {
    "hvit": checkpoints.hvit,
    "hjepa": checkpoints.h_jepa,
    "parts": checkpoints.parts,
    "parts of Hugging Face": lambda: checkpoints.parts(hf=True),
    "parts of PDiscoFormer": checkpoints.p_disco_former,
    **{kind: functools.partial(test_cnn.file, kind) for kind in test_cnn.FILES},
    "olmoearth": checkpoints.olmo_earth,
    "olmoearth encoder": lambda: checkpoints.olmo_earth(encoder_alone=True),
}
LAYOUTS = {  # Where the names of an export are others than those of timm.
    "dinov2": "hf",  # timm's registers have no row of a class token beside them.
    "dinov3": "hf",
    "hvit": "hvit",
    "parts": "parts",
    "parts of Hugging Face": "parts_hf",
    "parts of PDiscoFormer": "parts",
    "olmoearth": "olmoearth",
    "olmoearth encoder": "olmoearth",
}


def _file(kind, tmp_path):
    """Return a file of the family."""
    if kind in NETWORKS:
        fields, layout = NETWORKS[kind]
        ending = "npz" if kind == "bigvision" else "safetensors"
        net = published.network(**fields)
        return exporter.write(net, tmp_path / f"first.{ending}", layout)
    tree = TREES[kind]()
    pth.write(tmp_path / "first.pth", tree[0] if isinstance(tree, tuple) else tree)
    return tmp_path / "first.pth"


def _same(got, want):
    assert sorted(got.leaves) == sorted(want.leaves)
    for name, leaf in want.leaves.items():
        np.testing.assert_array_equal(got.leaves[name], leaf, err_msg=name)


@pytest.mark.parametrize("kind", [*TREES, *NETWORKS])
def test_in_out_and_in_again_gives_the_same_bits(kind, tmp_path):
    first = importer.read(_file(kind, tmp_path), options=HEADS)
    assert first.about.family == kind.split(" ")[0]
    own = LAYOUTS.get(kind) or NETWORKS.get(kind, ("", "timm"))[1]
    ending = "npz" if own == "bigvision" else "safetensors"
    for layout in (own, "vitssl"):
        end = ending if layout == own else "safetensors"
        file = exporter.write(first, tmp_path / f"{layout}.{end}", layout)
        options = HEADS if layout != "vitssl" else None
        again = importer.read(file, options=options)
        _same(again, first)
        assert again.about.model == first.about.model or layout != "vitssl"


@pytest.mark.parametrize("kind", [*TREES, *NETWORKS])
def test_every_key_is_used_or_named(kind, tmp_path):
    """Numbers in = numbers out + numbers that the report says are left aside."""
    file = _file(kind, tmp_path)
    found = importer.read(file, options=HEADS)
    one, raw, place = families.find(reader.read(file).tree)
    state = one.prepare(raw, [])
    notes = found.about.notes
    told = [re.fullmatch(r"left aside: (.*) \((\d+) keys\)", n) for n in notes]
    told = {m[1]: int(m[2]) for m in told if m}
    aside = tuple(f"{name}." for name in told)
    lost = {k for k in state if f"{k}.".replace("/", ".").startswith(aside)}
    assert len(lost) == sum(told.values())
    kept = sum(x.size for key, x in state.items() if key not in lost)
    assert found.size == kept
    assert bool(place) == any(n.startswith("read from") for n in notes)


def test_biases_that_dino_v3_does_without_are_told(tmp_path):
    notes = importer.read(_file("dinov3", tmp_path), options=HEADS).about.notes
    assert any("2 biases the model does without" in n for n in notes)
    assert "left aside: mask_token (1 keys)" in notes


def test_every_family_is_here():
    kinds = {kind.split(" ")[0] for kind in [*TREES, *NETWORKS]}
    assert kinds == set(families.FAMILIES)


@pytest.mark.parametrize("part", ["encoder", "target_encoder"])
def test_both_encoders_of_i_jepa_can_be_had(part, tmp_path):
    saved, target, _ = checkpoints.ijepa()
    pth.write(tmp_path / "a.pth", saved)
    found = importer.read(tmp_path / "a.pth", part=part, options=HEADS)
    other = published.network(9, cls=False)
    assert found.about.family == "ijepa"
    _same(found, target if part == "target_encoder" else other)


def test_an_unknown_key_of_a_new_family_is_named(tmp_path):
    for make, key in (
        (checkpoints.olmo_earth, "decoder.reconstructor.weight"),
        (lambda: checkpoints.hvit()["ema_state_dict"], "rgb_extra.weight"),
        (lambda: checkpoints.parts()["MODEL_STATE"], "stage_1.extra"),
    ):
        pth.write(tmp_path / "a.pth", make() | {key: checkpoints.noise(2)})
        with pytest.raises(errors.CheckpointError, match=key):
            importer.read(tmp_path / "a.pth", options=HEADS)


def test_olmoearth_says_what_is_left_aside(tmp_path):
    pth.write(tmp_path / "a.pth", checkpoints.olmo_earth())
    notes = importer.read(tmp_path / "a.pth").about.notes
    assert "left aside: encoder.composite_encodings.pos_embed (1 keys)" in notes
    assert "left aside: target_encoder.norm (1 keys)" in notes
    pth.write(tmp_path / "a.pth", checkpoints.olmo_earth(encoder_alone=True))
    assert any("alone" in n for n in importer.read(tmp_path / "a.pth").about.notes)


@pytest.mark.parametrize("kind", ["parts", "parts of PDiscoFormer", "olmoearth"])
def test_whole_methods_start_from_an_import(kind, tmp_path):
    """What a run is filled with is what the file holds, by the method's own names."""
    found = importer.read(_file(kind, tmp_path))
    backbone.write(tmp_path / "w", found)
    mine = {k: np.zeros_like(x) for k, x in found.leaves.items() if "target/" not in k}
    got = tree.flat(runs.start(warmstart.Init(str(tmp_path / "w")), tree.nest(mine)))
    for name in mine:
        np.testing.assert_array_equal(got[name], found.leaves[name])
    roots = {name.split("/")[0] for name in mine}
    want = {"olmoearth": {"encoder", "predictor"}, "parts": {"stage_1", "stage_2"}}
    assert roots == want.get(kind, {"stage_1"})


def test_layouts_of_other_methods_are_refused(tmp_path):
    pth.write(tmp_path / "a.pth", checkpoints.olmo_earth())
    whole = importer.read(tmp_path / "a.pth")
    for net, layout, told in (
        (whole, "timm", "a whole method; use parts"),
        (whole, "parts", "no weights of that method"),
        (published.network(), "olmoearth", "a model 'vit'; use timm"),
    ):
        with pytest.raises(errors.UsageError, match=told):
            exporter.write(net, tmp_path / "x.safetensors", layout)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_file_of_ours_comes_in_again_by_the_command_line(tmp_path, capsys):
    net = published.network(classes=3)
    file = exporter.write(net, tmp_path / "x.safetensors", "vitssl")
    to = tmp_path / "w"
    assert command.main(["import", str(file), f"--to={to}", "--image_size=48"]) == 0
    found = backbone.read(to)
    assert found.module().image_size == 48
    assert found.leaves["encoder/pos_embed"].shape == (1, 37, 32)
    assert command.main(["import", str(file), f"--to={to}", "--heads=4"]) == 2
    assert "layout vitssl, which says it itself" in capsys.readouterr().err
