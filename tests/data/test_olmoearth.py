"""OlmoEarth's HDF5 samples: what is on disk, and what a run gets of it."""

import os

import h5py
import numpy as np
import pytest

from tests.layouts import earth
from tests.layouts.earth import SIDE, sample
from vitssl import errors
from vitssl.data import modalities, sources
from vitssl.data.sources import olmoearth
from vitssl.methods.latent_mim import shapes, views

NAMES = ("sentinel2_l2a", "sentinel1", "worldcover", "era5_10", "latlon")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("earth")
    samples = [sample(0), sample(1, earth.GAPS), sample(2)]
    del samples[2]["worldcover"]
    earth.write(root, samples)
    return root


def test_time_steps_come_back_where_they_were(root):
    source = sources.open("olmoearth", str(root), "train", modalities=NAMES)
    assert len(source) == 3 and source.labels.tolist() == [-1] * 3
    raw, found = sample(1, earth.GAPS), source[1]
    # Sentinel-1 is there at 1, 4, 7, 10: the time line begins at 1 and ends at 10.
    assert found["length"] == 10
    assert found["timestamps"][:, 1].tolist() == [*range(1, 11), 10, 10]
    assert np.flatnonzero(found["present"]["sentinel2_l2a"]).tolist() == [1, 2, 6]
    for packed, at in enumerate((1, 2, 6)):
        np.testing.assert_array_equal(
            found["sentinel2_l2a"][:, :, at], raw["sentinel2_l2a"][:, :, packed]
        )
    others = np.setdiff1d(np.arange(12), (1, 2, 6))
    assert (found["sentinel2_l2a"][:, :, others] == modalities.MISSING).all()
    assert found["era5_10"].shape == (12, 6)
    assert (found["era5_10"] == modalities.MISSING).all()
    np.testing.assert_array_equal(found["latlon"], raw["latlon"])


def test_the_compression_of_the_published_files_is_read(tmp_path):
    raw = sample(3)
    folder = earth.write(tmp_path, [raw], compression="zstd")
    with h5py.File(folder / "sample_0.h5") as file:
        filters = file["sentinel2_l2a"].id.get_create_plist()
        assert filters.get_filter(0)[0] == 32015  # The registered number of zstd.
    found = sources.open("olmoearth", str(tmp_path), "train", modalities=NAMES)[0]
    np.testing.assert_array_equal(found["sentinel2_l2a"], raw["sentinel2_l2a"])


def test_an_absent_map_is_missing_everywhere(root):
    source = sources.open("olmoearth", str(root), "train", modalities=NAMES)
    gone = source[2]["worldcover"]
    assert gone.shape == (SIDE, SIDE, 1, 1) and (gone == modalities.MISSING).all()


def test_what_is_drawn_and_held_out(root, tmp_path):
    kept = tmp_path / "keep.npy"
    np.save(kept, [0, 2])
    options = dict(modalities=NAMES)
    known = sources.open("olmoearth", str(root), "train", filter_file=str(kept))
    assert known.indices.tolist() == [0, 2]
    held = [
        sources.open("olmoearth", str(root), split, holdout=1, **options).indices
        for split in ("train", "test")
    ]
    assert [h.tolist() for h in held] == [[0, 1], [2]]
    two = sources.open("olmoearth", str(root), "train", max_samples=2, **options)
    assert len(two) == 2 and len(set(two.indices)) == 2


def test_a_sample_without_timestamps_is_named(tmp_path):
    folder = earth.write(tmp_path, [sample()])
    with h5py.File(folder / "sample_0.h5", "a") as file:
        del file["timestamps"]
    source = sources.open("olmoearth", str(tmp_path), "train")
    with pytest.raises(errors.DataError, match=r"sample_0.h5 has no 'timestamps'"):
        source[0]


def test_an_array_that_does_not_fit_its_mask_is_named(tmp_path):
    broken = sample()
    broken["masks"]["sentinel1"] = np.arange(12) < 3
    folder = earth.write(tmp_path, [broken])
    match = "sentinel1 holds 4 time steps, its mask 3"
    with pytest.raises(errors.DataError, match=match):
        olmoearth.read(folder / "sample_0.h5", NAMES)


def test_a_folder_of_something_else_is_described(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(errors.DataError, match="no sample_metadata.csv"):
        sources.open("olmoearth", str(tmp_path), "train")


def test_unknown_modalities_and_bands_are_one_line(root):
    with pytest.raises(errors.UsageError, match="did you mean 'sentinel1'"):
        sources.open("olmoearth", str(root), "train", modalities=("sentinel-1",))
    with pytest.raises(errors.UsageError, match="'sentinel1' has no band 'hh'"):
        modalities.find("sentinel1", {"sentinel1": (("vv", "hh"),)})
    with pytest.raises(errors.UsageError, match="a band is in two sets"):
        modalities.find("sentinel1", {"sentinel1": (("vv",), ("vv", "vh"))})


def test_regrouped_bands_keep_their_channels():
    one = modalities.find("landsat", {"landsat": (("B1", "B8"),)})
    assert one.channels == ((1, 0),) and len(one.bands) == 11
    assert one.tokens(3, 2) == (3, 3, 2, 1)


@pytest.mark.parametrize("name", sorted(modalities.MODALITIES))
def test_normalisation_is_affine_and_keeps_missing(name):
    if name == "rgb":
        return
    kind = modalities.find(name)
    offset, divisor = modalities.scale(name)
    x = np.stack([offset, offset + divisor, np.full(len(kind.bands), -99999.0)])
    want = np.array([0.0, 1.0, -99999.0])[:, None].repeat(len(kind.bands), 1)
    np.testing.assert_allclose(modalities.normalise(name, x), want, atol=1e-5)


def test_the_budget_is_the_largest_that_fits():
    kinds = [modalities.find(n) for n in modalities.TRAINED]
    times = [shapes.max_times(kinds, 2250, side) for side in range(1, 13)]
    assert times == [12, 12, 12, 12, 12, 9, 6, 4, 3, 2, 2, 1]
    for side, t in enumerate(times, 1):
        count = sum(np.prod(k.tokens(side, t)) for k in kinds)
        more = sum(np.prod(k.tokens(side, t + 1)) for k in kinds)
        assert count <= 2250 and (more > 2250 or t == 12)


def test_a_budget_that_fits_no_time_step_is_refused():
    kinds = [modalities.find(n) for n in modalities.TRAINED]
    with pytest.raises(errors.UsageError, match=r"token_budget=1500.*12 x 12"):
        shapes.max_times(kinds, 1500, 12)


def test_shapes_are_a_function_of_the_step_alone():
    kinds = [modalities.find(n) for n in modalities.TRAINED]
    spec = shapes.Sampling(hold=5)
    drawn = [shapes.draw(spec, kinds, step) for step in range(400)]
    assert drawn == [shapes.draw(spec, kinds, step) for step in range(400)]
    assert all(len(set(drawn[i : i + 5])) == 1 for i in range(0, 400, 5))
    assert all(s.side * s.p <= 128 and s.q == s.p for s in drawn)
    assert {s.p for s in drawn} == set(range(1, 9))
    fixed = [shapes.draw(spec, kinds, i, (8,), 1) for i in range(400)]
    assert {(s.p, s.q) for s in fixed} == {(8, 1)}
    assert {s.side for s in fixed} == set(range(1, 13))


def test_turns_are_the_eight_symmetries_of_a_square():
    x = np.arange(9).reshape(3, 3, 1)
    seen = {views.turn(x, k).tobytes() for k in range(8)}
    assert len(seen) == 8
    # Every one of them undoes some other.
    for k in range(8):
        undone = [np.array_equal(views.turn(views.turn(x, k), j), x) for j in range(8)]
        assert sum(undone) == 1


def test_cutmix_keeps_whole_patches():
    shape = shapes.Shape(4, 1, 3, 1)
    rows, columns = views.spatial(np.random.default_rng(3), shape, 32, True)
    for pixels in (rows, columns):
        cells = pixels.reshape(3, 4)
        assert (cells[:, 0] % 4 == 0).all() and (np.diff(cells, axis=1) == 1).all()
        assert len(set(cells[:, 0])) == 3
    with pytest.raises(errors.DataError, match="holds no crop of 12"):
        views.spatial(np.random.default_rng(0), shape, 8, False)


def _changed(tmp_path, change):
    """Return the path of a sample, changed by a function of the open file."""
    path = earth.write(tmp_path, [sample()]) / "sample_0.h5"
    with h5py.File(path, "a") as file:
        change(file)
    return path


def _put(name, **options):
    def change(file):
        del file[name]
        file.create_dataset(name, **options)

    return change


def _link(name, to):
    def change(file):
        del file[name]
        file[name] = to

    return change


def _virtual(file):
    layout = h5py.VirtualLayout((SIDE, SIDE, 1, 1), np.uint8)
    layout[...] = h5py.VirtualSource("other.h5", "x", (SIDE, SIDE, 1, 1))
    del file["worldcover"]
    file.create_virtual_dataset("worldcover", layout)


SQUARE = (SIDE, SIDE, 1, 1)
ELSEWHERE = dict(shape=SQUARE, dtype="u1", external=[("/etc/hostname", 0, 256)])
CHANGES = {
    "an external link": (_link("worldcover", h5py.ExternalLink("o.h5", "x")), "a link"),
    "a soft link": (_link("worldcover", h5py.SoftLink("/latlon")), "a link"),
    "masks of another file": (
        _link(olmoearth.MASKS, h5py.ExternalLink("o.h5", "x")),
        "link|no 'missing",
    ),
    "bytes of another file": (_put("worldcover", **ELSEWHERE), "lies in other files"),
    "a virtual array": (_virtual, "lies in other files"),
    "an array of terabytes": (
        _put("worldcover", shape=(10**6, 10**6, 1, 1), dtype="u1"),
        "claims more than",
    ),
    "a chunk of gigabytes": (
        _put(
            "worldcover",
            shape=SQUARE,
            maxshape=(None,) * 4,
            chunks=(2**16, 2**15, 1, 1),
            dtype="u1",
        ),
        "claims more than",
    ),
    "texts": (_put("worldcover", data=["a"]), "no numbers"),
    "nothing": (_put("worldcover", data=h5py.Empty("u1")), "no numbers"),
    "one number": (_put("sentinel2_l2a", data=3), "sentinel2_l2a"),
    "another size": (_put("worldcover", data=np.zeros((4, 4, 1, 1))), "want"),
    "a group": (lambda f: (f.pop("worldcover"), f.create_group("worldcover")), "Group"),
    "no timestamps": (_put("timestamps", data=np.zeros((0, 3))), "timestamps"),
    "too many timestamps": (_put("timestamps", data=np.zeros((13, 3))), "timestamps"),
    "timestamps of one axis": (_put("timestamps", data=np.zeros(3)), "timestamps"),
    "a mask of other steps": (
        _put(f"{olmoearth.MASKS}/sentinel1", data=np.ones(5, bool)),
        "the mask of sentinel1",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_sample_is_of_numbers_in_its_own_file_and_of_its_shape(what, tmp_path):
    change, told = CHANGES[what]
    path = _changed(tmp_path, change)
    with h5py.File(tmp_path / "o.h5", "w") as other:
        other["x"] = np.zeros(SQUARE, np.uint8)
    with pytest.raises(errors.DataError, match=told) as error:
        olmoearth.read(path, NAMES)
    assert "sample_0.h5" in str(error.value) and "\n" not in str(error.value)


def test_a_pipe_among_samples_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "sample_0.h5")
    with pytest.raises(errors.DataError, match="no regular file"):
        olmoearth.read(tmp_path / "sample_0.h5", NAMES)
