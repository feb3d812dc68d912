"""Drawn farmland: what its sensors see is what is there."""

import numpy as np
import pytest

from tests.layouts import earth
from vitssl import errors
from vitssl.data import modalities, sources
from vitssl.data.sources import fields, olmoearth


@pytest.fixture(scope="module")
def samples():
    world = fields.Fields(size=32, seed=3)
    return [world.sample(i) for i in range(12)]


def test_a_scene_is_a_function_of_its_number(samples):
    again = fields.Fields(size=32, seed=3).sample(5)
    for name in (*fields.SENSORS, *fields.MAPS, "timestamps", "cover"):
        np.testing.assert_array_equal(samples[5][name], again[name])
    other = fields.Fields(split="test", size=32, seed=3).sample(5)
    assert not np.array_equal(other["cover"], again["cover"])


def test_samples_have_the_layout_of_the_real_set(samples):
    for name in (*fields.SENSORS, *fields.MAPS):
        kind = modalities.find(name)
        assert all(s[name].shape == kind.shape(32, 12) for s in samples), name
    for s in samples:
        for name, there in s["present"].items():
            gone = (s[name] == modalities.MISSING).all((0, 1, 3))
            np.testing.assert_array_equal(~gone, there)
            assert there.sum() >= 3


def test_the_seasons_tell_the_crops_apart_and_one_month_does_not():
    seen = ("sentinel2_l2a",)
    world = fields.Fields(size=32, seed=1, clouds=0.0, gaps=0.0, modalities=seen)
    index = {fields.WINTER: [], fields.SUMMER: []}
    for i in range(8):
        s = world.sample(i)
        x = s["sentinel2_l2a"]
        ndvi = (x[..., 3] - x[..., 2]) / (x[..., 3] + x[..., 2])
        for kind, found in index.items():
            found.append(ndvi[s["cover"] == kind].reshape(-1, 12))
    winter, summer = (np.concatenate(v).mean(0) for v in index.values())
    assert abs(winter.argmax() - 4) <= 1 and abs(summer.argmax() - 7) <= 1
    assert winter[4] > summer[4] + 0.2 and summer[7] > winter[7] + 0.2
    assert abs(winter[0] - summer[0]) < 0.05


def test_maps_agree_with_the_ground(samples):
    for s in samples:
        cover = s["cover"]
        assert ((s["cdl"][..., 0, 0] == 1) == (cover == fields.SUMMER)).all()
        assert ((s["worldcover"][..., 0, 0] == 80) == (cover == fields.WATER)).all()
        tall = s["wri_canopy_height_map"][..., 0, 0] > 0
        assert (tall == (cover == fields.FOREST)).all()
        crops = s["worldcereal"][..., 0, 0] == 100
        assert (crops == np.isin(cover, (fields.WINTER, fields.SUMMER))).all()


def test_there_is_detail_below_a_patch(samples):
    mixed = 0
    for s in samples:
        cells = s["cover"].reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 64)
        mixed += np.mean([len(np.unique(c)) > 1 for c in cells])
    assert mixed / len(samples) > 0.8


def test_what_surrounds_a_pixel_tells_textures_and_its_matter_does_not():
    world = fields.Fields(size=64, told_by="texture", count=24)
    trees, alike = ({k: [] for k in fields.PLANTINGS} for _ in range(2))
    for i in range(24):
        cover, matter, *_ = scene = world.scene(i)
        water, built = np.isin(cover, (0, 1)), np.isin(cover, (2, 3))
        np.testing.assert_array_equal(matter == fields.WATER, water)
        np.testing.assert_array_equal(matter == fields.BUILT, built)
        for kind in fields.PLANTINGS:
            own = cover == fields.TEXTURES.index(kind)
            x = matter == fields.FOREST
            trees[kind].append(x[own])
            alike[kind].append((x[:, 1:] == x[:, :-1])[own[:, 1:] & own[:, :-1]])
    truth = world.sample(23)["worldcereal"][:, :, 0]
    np.testing.assert_array_equal(truth.argmax(-1), scene.cover)
    assert (truth.sum(-1) == 100).all()
    trees, alike = (
        {k: np.concatenate(v).mean() for k, v in found.items()}
        for found in (trees, alike)
    )
    want = list(fields.PLANTINGS.values())
    np.testing.assert_allclose(list(trees.values()), want, atol=0.04)
    # What is drawn pixel by pixel is like its neighbour by chance alone.
    by_chance = {k: p * p + (1 - p) ** 2 for k, p in fields.PLANTINGS.items()}
    assert abs(alike["anyhow"] - by_chance["anyhow"]) < 0.02
    assert alike["clumps"] > by_chance["clumps"] + 0.05


def packed(sample):
    """Return a sample as `earth.write` takes it: without what is missing."""
    out = {"timestamps": sample["timestamps"], "masks": sample["present"]}
    for name, x in sample.items():
        if name in fields.SENSORS:
            x = x[:, :, sample["present"][name]]
            out[name] = x if name == "sentinel1" else x.astype(np.uint16)
        elif name in fields.MAPS:
            out[name] = x
    return out


def test_scenes_survive_the_file_format(tmp_path, samples):
    folder = earth.write(tmp_path, [packed(s) for s in samples[:2]])
    names = (*fields.SENSORS, *fields.MAPS)
    for i, want in enumerate(samples[:2]):
        got = olmoearth.read(folder / f"sample_{i}.h5", names)
        steps = np.flatnonzero(np.any(list(want["present"].values()), axis=0))
        first, length = steps[0], steps[-1] + 1 - steps[0]
        assert got["length"] == length
        for name in names:
            a, b = got[name], want[name]
            if modalities.find(name).time:
                a, b = a[:, :, :length], b[:, :, first : first + length]
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_options_are_checked():
    with pytest.raises(errors.UsageError, match="size=8: 16 or more"):
        sources.open("fields", "", "train", size=8)
    with pytest.raises(
        errors.UsageError, match="modalities=.'naip_10',.: want a tuple of one of"
    ):
        sources.open("fields", "", "train", modalities=("naip_10",))
    held = sources.open("fields", "", "train", size=16, count=3, held=1)
    assert held[0]["sentinel1"] is held[0]["sentinel1"]
    assert held[1]["sentinel1"] is not held[1]["sentinel1"]
    assert held.labels.tolist() == [0, 1, 2]
