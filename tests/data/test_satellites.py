"""Labelled satellite sets in their published layouts: bands, units, masks, splits."""

import importlib.util
import json

import numpy as np
import pytest

import vitssl
from tests import layouts
from tests.layouts import satellites
from vitssl import errors
from vitssl.data import modalities, sources, tiff
from vitssl.data.sources import geotiff, mados, pastis
from vitssl.data.sources.wrappers import Tolerant
from vitssl.methods.latent_mim import readout, views

S2 = modalities.find("sentinel2_l2a")
GONE = modalities.MISSING


def _bands(sample, at=(20, 20, 0)):
    """Return {band: value} of Sentinel-2 at a pixel and time step."""
    return dict(zip(S2.bands, sample["sentinel2_l2a"][at].tolist(), strict=True))


@pytest.fixture(scope="module")
def root_of(tmp_path_factory):
    base, made = tmp_path_factory.mktemp("satellites"), {}

    def root(kind):
        made.setdefault(kind, None)
        made[kind] = made[kind] or str(layouts.make(kind, base / kind))
        return made[kind]

    return root


# --- TIFF


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((5, 6, 7), dict(planarconfig="separate")),
        ((6, 7, 5), dict(planarconfig="contig")),
        ((5, 6, 7), dict(planarconfig=None)),  # A page for each band.
        ((6, 7, 5), dict(planarconfig="contig", compression="zlib", predictor=True)),
        ((5, 64, 48), dict(planarconfig="separate", tile=(16, 16))),
        ((5, 6, 7), dict(planarconfig="separate", bigtiff=True, byteorder=">")),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_bands_of_any_layout_come_last_with_their_values(
    tmp_path, shape, options, dtype
):
    if dtype == np.float32:  # Differences of floats need imagecodecs.
        options = {k: v for k, v in options.items() if k != "predictor"}
    x = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    satellites.tiff(tmp_path / "x.tif", x, **options)
    found = tiff.read(tmp_path / "x.tif")
    want = x if options["planarconfig"] == "contig" else np.moveaxis(x, 0, -1)
    np.testing.assert_array_equal(found.values, want)
    assert found.values.dtype == dtype and found.nodata is None
    assert found.names == ("",) * 5


def test_names_and_nodata_are_those_of_gdal(tmp_path):
    x = satellites.level(0, 2, 4, np.float32)
    satellites.tiff(tmp_path / "x.tif", x, names=("B8A", "a & b"), nodata=-9999.0)
    found = tiff.read(tmp_path / "x.tif")
    assert found.names[0] == "B8A" and found.nodata == -9999


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    path = tmp_path / "x.tif"
    satellites.tiff(path, satellites.level(0, 3, 16))
    whole = path.read_bytes()
    for broken in (b"", b"no TIFF at all", whole[:-100], whole[:40]):
        path.write_bytes(broken)
        with pytest.raises(errors.DataError, match="x.tif: cannot be decoded: ") as e:
            tiff.read(path)
        assert "\n" not in str(e.value)
    with pytest.raises(errors.DataError, match="y.tif: cannot be read: "):
        tiff.read(tmp_path / "y.tif")


def test_a_compression_that_is_not_there_names_its_extra(tmp_path):
    path = tmp_path / "x.tif"
    satellites.tiff(path, satellites.level(0, 3, 16), compression="zlib")
    import tifffile

    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["Compression"].overwrite(5)  # LZW
    there = importlib.util.find_spec("imagecodecs")
    match = "cannot be decoded: " if there else r"LZW.*\(extra 'geo'\)"
    with pytest.raises(errors.DataError, match=match):
        tiff.read(path)


# --- Bands by name


def test_bands_find_their_channels_however_they_are_written():
    x = np.array([[4.0, 2.0, 9.0, np.nan]])
    found = modalities.arrange("sentinel2_l2a", x, ("b4", "B02", "", "B8a"))
    want = dict.fromkeys(S2.bands, GONE) | {"B04": 4.0, "B02": 2.0}
    assert dict(zip(S2.bands, found[0].tolist(), strict=True)) == want
    with pytest.raises(errors.UsageError, match="'sentinel2_l2a' has no band 'B10'"):
        modalities.arrange("sentinel2_l2a", x, ("B10", "", "", ""))
    with pytest.raises(errors.UsageError, match="band 'B2' twice"):
        modalities.arrange("sentinel2_l2a", x, ("B02", "B2", "", ""))
    with pytest.raises(errors.UsageError, match="3 names for 4 bands"):
        modalities.arrange("sentinel2_l2a", x, ("B02", "B03", "B04"))
    assert modalities.channel(modalities.find("landsat"), "B10") == 9
    assert modalities.channel(modalities.find("landsat"), "b1") == 1


def test_raw_values_are_normalised_by_the_published_statistics():
    """OlmoEarth's own numbers: x' = (x - (mean - 2 std)) / (4 std)."""
    mean, std = 1188.94126, 1859.19240  # Of B02.
    raw = {
        "sentinel2_l2a": np.array([[[[[mean], [mean + 2 * std], [0.0]]]]]),
        "sentinel1": np.array([[[[[-11.64899, -17.74544 - 2 * 10.21627]]]]]),
        "timestamps": np.array([[[1, 6, 2020]]]),
    }
    bands = {"sentinel2_l2a": ("B2",)}
    found = vitssl.normalise_sensors(raw, bands=bands, nodata=0)
    seen = found["sentinel2_l2a"]
    assert seen.shape == (1, 1, 1, 3, 12) and seen.dtype == np.float32
    np.testing.assert_allclose(seen[0, 0, 0, :, 0], [0.5, 1.0, GONE], rtol=1e-6)
    assert (seen[..., 1:] == GONE).all()
    np.testing.assert_allclose(found["sentinel1"].ravel(), [0.5, 0.0], atol=1e-6)
    assert found["timestamps"] is raw["timestamps"]
    with pytest.raises(errors.UsageError, match="bands: landsat not among"):
        vitssl.normalise_sensors(raw, bands=bands | {"landsat": ("B1",)})
    with pytest.raises(errors.UsageError, match="did you mean 'sentinel1'"):
        vitssl.normalise_sensors({"sentinel-1": np.zeros((1, 2))})


# --- EuroSAT


def test_eurosat_has_b8a_last_and_no_cirrus(root_of):
    train, test = (sources.open("eurosat", root_of("eurosat"), s) for s in _BOTH)
    assert train.classes == geotiff.CLASSES
    assert (len(train), len(test)) == (60, 20) and set(test.labels) == set(range(10))
    where = train.whole.relative(0)
    assert where.startswith("AnnualCrop/")
    i = int(where.split("_")[1].removesuffix(".tif"))
    order = "B01 B02 B03 B04 B05 B06 B07 B08 B09 B10 B11 B12 B8A".split()
    stored = {b: 100.0 * (k + 1) + i for k, b in enumerate(order)}
    assert _bands(train[0]) == {b: stored[b] for b in S2.bands}
    assert train[0]["timestamps"][0].tolist() == [1, 6, 2020]
    assert train[0]["length"] == 1


_BOTH = ("train", "test")


def test_eurosat_by_published_lists_and_from_either_archive(tmp_path):
    inner = tmp_path / "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"
    for name in ("Forest", "River"):
        for i in (1, 2, 3):
            satellites.tiff(
                inner / name / f"{name}_{i}.tif", satellites.level(i, 13, 64)
            )
    (tmp_path / "eurosat-val.txt").write_text("Forest_2.jpg\nRiver_3.jpg\n")
    held = sources.open("eurosat", str(tmp_path), "val")
    paths = [held.whole.relative(i) for i in range(len(held))]
    assert paths == ["Forest/Forest_2.tif", "River/River_3.tif"]
    with pytest.raises(errors.DataError, match="no folder of a class"):
        sources.open("eurosat", str(tmp_path / "ds/images"), "train")


def test_a_broken_file_is_skipped_and_counted(tmp_path, caplog):
    root = layouts.make("geotiff", tmp_path)
    path = sorted(root.glob("train/field/*.tif"))[0]
    path.write_bytes(path.read_bytes()[:300])
    tolerant = Tolerant(sources.open("geotiff", str(root), "train"), "skip")
    assert tolerant[0]["index"] == 1 and list(tolerant.bad) == [0]
    assert "s0.tif: cannot be decoded" in caplog.text


# --- PASTIS-R


def test_pastis_is_monthly_means_of_both_sensors(root_of):
    source = sources.open("pastis", root_of("pastis"), "test")
    assert len(source) == 12  # Fold 5: three patches of four tiles.
    sample = source[5]  # Of the second of them, number 8, at the top right.
    months = [(s[1], s[2]) for s in sample["timestamps"][:5].tolist()]
    assert months[:4] == [(8, 2018), (9, 2018), (1, 2019), (2, 2019)]
    # Two dates in October, numbers 1 and 2: 10 and 20 more than the first.
    stored = "B02 B03 B04 B05 B06 B07 B08 B8A B11 B12".split()
    for step, more in ((0, 0), (1, 15), (2, 30)):
        want = {b: 100.0 * (k + 1) + 8 + more for k, b in enumerate(stored)}
        assert _bands(sample, (3, 3, step)) == want | {"B01": GONE, "B09": GONE}
    assert (sample["sentinel2_l2a"][:, :, 3:] == GONE).all()
    assert sample["sentinel1"][0, 0, :4].tolist() == [
        [-19.5, -17.25],
        [GONE, GONE],
        [GONE, GONE],
        [-19.5, -17.25],
    ]
    present = {k: v[:4].tolist() for k, v in sample["present"].items()}
    assert present["sentinel2_l2a"] == [True, True, True, False]
    assert present["sentinel1"] == [True, False, False, True]


def test_pastis_folds_tiles_and_void(root_of):
    root = root_of("pastis")
    counts = [len(sources.open("pastis", root, s)) for s in ("train", "val", "test")]
    assert counts == [24, 4, 12]
    top, bottom = (sources.open("pastis", root, "val")[i]["cover"] for i in (0, 2))
    assert top.shape == (64, 64) and top[:, 0].tolist() == [r // 6 for r in range(64)]
    want = np.array([r // 6 % 20 for r in range(64, 128)])
    np.testing.assert_array_equal(bottom[:, 9], np.where(want == 19, -1, want))
    assert len(pastis.COVER) == 19
    whole = sources.open("pastis", root, "val", tile=128, modalities=S2.name.split())
    assert len(whole) == 1 and "sentinel1" not in whole[0]


def test_pastis_made_up_bands_are_copies_where_asked(root_of):
    sample = sources.open("pastis", root_of("pastis"), "val", impute=True)[0]
    found = _bands(sample)
    assert found["B01"] == found["B02"] and found["B09"] == found["B8A"]
    assert (sample["sentinel2_l2a"][:, :, 3:] == GONE).all()


def test_pastis_files_that_are_missing_or_of_another_shape_are_named(tmp_path):
    root = satellites.parcels(tmp_path / "a", folds=(1, 5))
    np.save(root / "DATA_S2/S2_10000.npy", np.zeros((2, 10, 128, 128), np.int16))
    with pytest.raises(errors.DataError, match=r"S2_10000.npy: shape \(2, 10"):
        sources.open("pastis", str(root), "train")[0]
    path = root / "DATA_S2/S2_10001.npy"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(errors.DataError, match="S2_10001.npy: cannot be read"):
        sources.open("pastis", str(root), "test")[0]
    path.unlink()
    with pytest.raises(errors.DataError, match="S2_10001.npy: cannot be read"):
        sources.open("pastis", str(root), "test")[0]
    (tmp_path / "b").mkdir()
    about = {"features": [{"properties": {"Fold": 1}}]}
    (tmp_path / "b/metadata.geojson").write_text(json.dumps(about))
    with pytest.raises(errors.DataError, match="want features with ID_PATCH"):
        sources.open("pastis", str(tmp_path / "b"), "train")


def test_pastis_dates_written_as_text_are_the_same(tmp_path):
    root = satellites.parcels(tmp_path, folds=(5,))
    one = sources.open("pastis", str(root), "test")[0]["timestamps"]
    listed = json.loads((root / "metadata.geojson").read_text())
    for feature in listed["features"]:
        about = feature["properties"]
        own = {k: json.dumps(v) for k, v in about.items() if k.startswith("dates")}
        about.update(own)
    (root / "metadata.geojson").write_text(json.dumps(listed))
    pastis._listed.cache_clear()
    two = sources.open("pastis", str(root), "test")[0]["timestamps"]
    np.testing.assert_array_equal(one, two)


# --- MADOS


@pytest.mark.parametrize(("i", "sensor"), [(0, 0), (9, 1)])
def test_mados_bands_of_either_satellite_in_digital_numbers(root_of, i, sensor):
    del sensor  # Crops of Sentinel-2A and 2B in turn, which name wavelengths otherwise.
    root = root_of("mados")
    sample = sources.open("mados", root, "train", statistics="sensor")[i]
    stored = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B11 B12".split()
    want = {b: 100.0 * (k + 1) + 10 * (i // 9) for k, b in enumerate(stored)}
    found = _bands(sample)
    assert found.pop("B09") == GONE
    assert found == pytest.approx(want, rel=1e-5)


def test_mados_own_statistics_are_what_the_network_sees():
    """As standardised by OlmoEarth's evaluation: (x - (mean - 2 std)) / (4 std)."""
    mean, std = np.array(list(mados.STATISTICS.values())).T
    for z, want in ((0.0, 0.5), (2.0, 1.0)):
        x = modalities.arrange(
            "sentinel2_l2a", mados.units(mean + z * std, own=True), mados.BANDS
        )
        seen = modalities.normalise("sentinel2_l2a", x)
        assert seen[S2.bands.index("B09")] == GONE
        np.testing.assert_allclose(np.delete(seen, 11), want, atol=1e-5)


def test_mados_classes_are_counted_from_zero_and_empty_tiles_left_out(tmp_path):
    root = satellites.water(tmp_path, splits=(("train", 1), ("test", 1)))
    cover = sources.open("mados", str(root), "test")[0]["cover"]
    assert cover[0, :3].tolist() == [0, 1, 2] and (cover[1] == -1).all()
    assert cover.max() == len(mados.COVER) - 1
    classes = np.zeros((1, 240, 240), np.uint8)
    classes[0, 100, 200] = 7
    satellites.tiff(root / "Scene_0/10/Scene_0_L2R_cl_0.tif", classes)
    mados._labelled.cache_clear()
    left = sources.open("mados", str(root), "train")
    assert left.tiles == (("Scene_0", "0", 80, 160),)
    assert left[0]["cover"][20, 40] == 6
    (root / "Scene_0/20/Scene_0_L2R_rhorc_704_0.tif").unlink()
    with pytest.raises(errors.DataError, match="Scene_0_0: no band B05: want"):
        left[0]
    with pytest.raises(errors.DataError, match="no file splits/val_X.txt"):
        sources.open("mados", str(root), "val")


# --- A folder


def test_geotiff_reads_names_nodata_and_labels(root_of):
    source = sources.open("geotiff", root_of("geotiff"), "val", date="2019-03-04")
    assert source.classes == ("field", "town", "wood")
    sample = source[4]  # The first of "town" by the alphabet, number 10.
    assert sample["label"] == 1
    assert sample["timestamps"][0].tolist() == [4, 2, 2019]
    want = dict(B04=1110, B03=1210, B02=1310, B08=1510, B11=1610)
    assert _bands(sample) == dict.fromkeys(S2.bands, GONE) | want
    assert (sample["sentinel2_l2a"][:4, :4] == GONE).all()


def test_geotiff_by_given_bands_units_and_masks(tmp_path):
    x = np.full((3, 20, 30), 0.25, np.float32)
    x[1], x[2, :, 20:] = 0.5, -1.0
    satellites.tiff(tmp_path / "images/a.tif", x)
    mask = np.zeros((1, 20, 30), np.uint8)
    mask[0, :, 15:], mask[0, :, 24:] = 3, 255
    satellites.tiff(tmp_path / "masks/a.tif", mask)
    options = dict(bands=("B03", "", "B8A"), scale=10000.0, offset=-1000.0)
    options |= dict(nodata=(-1.0,), labels="none", masks=str(tmp_path / "masks"))
    root = str(tmp_path / "images")
    found = sources.open("geotiff", root, "all", **options)[0]
    seen = _bands(found, (0, 0, 0))  # The central square begins at column 5.
    assert seen["B03"] == 1500 and seen["B8A"] == 1500 and seen["B02"] == GONE
    assert (found["sentinel2_l2a"][:, 15:, 0, 8] == GONE).all()
    cover = found["cover"][0].tolist()
    assert cover == [0] * 10 + [3] * 9 + [-1] and found["label"] == -1
    for bad, match in (
        (dict(bands=("B10", "", "")), "no band 'B10'"),
        (dict(date="June"), "data.options.date='June'"),
        (dict(masks=str(tmp_path)), "1 of 1 images have no mask"),
    ):
        with pytest.raises(ValueError, match=match):
            sources.open("geotiff", root, "all", **options | bad)
    with pytest.raises(errors.DataError, match="a.tif: .*no band is named; set data"):
        sources.open("geotiff", root, "all", labels="none")[0]


def test_a_sensor_with_one_band_needs_no_name(tmp_path):
    satellites.tiff(tmp_path / "a.tif", np.full((1, 8, 8), 431, np.int16))
    options = dict(modality="srtm", labels="none")
    found = sources.open("geotiff", str(tmp_path), "all", **options)[0]
    assert found["srtm"].shape == (8, 8, 1, 1) and (found["srtm"] == 431).all()


# --- What a method gets of them


def test_a_row_has_missing_bandsets_masked_and_the_truth(root_of):
    names = ("sentinel2_l2a", "sentinel1")
    kinds = tuple(map(modalities.find, names))
    sample = sources.open("pastis", root_of("pastis"), "val")[0]
    row = views.Evaluation(kinds, 32, 12)(sample)
    assert row["truth"][:, 0].tolist() == [(16 + r) // 6 for r in range(32)]
    states = readout.online(kinds[0], row["image/sentinel2_l2a"][None], 4)
    # Sets of 10 m and 20 m bands in the three months; B01 and B09 never.
    assert (np.asarray(states)[0, 0, 0, :4] == 0).tolist() == [
        *([[True, True, False]] * 3),
        [False] * 3,
    ]


def test_a_sample_of_which_nothing_would_be_read_is_refused():
    x = modalities.arrange("sentinel2_l2a", np.ones((8, 8, 1, 3)), ("B2", "B3", "B4"))
    with pytest.raises(errors.DataError, match="lacks B08, .*every bandset misses"):
        views.check_whole({"sentinel2_l2a": x}, [S2])
    rgb = {"sentinel2_l2a": (("B04", "B03", "B02"),)}
    views.check_whole({"sentinel2_l2a": x}, [modalities.find("sentinel2_l2a", rgb)])


def test_a_probe_that_the_bank_taught_is_scored_on_the_test_rows():
    rng = np.random.default_rng(0)

    def rows(count):
        truth = rng.integers(0, 2, (count, 8, 8)).repeat(2, 1).repeat(2, 2)
        tokens = truth[:, ::2, ::2, None] + rng.normal(0, 0.01, (count, 8, 8, 1))
        truth[:, :2] = -1
        return {"tokens": tokens.astype(np.float32), "truth": truth}

    measures = readout.Measures(classes=2, taught="bank", epochs=30)
    found = readout.scores(rows(8), rows(3), measures)
    assert found["miou"] > 0.99 and found["miou_guess"] < 0.5
    few = readout.Measures(classes=1 + 1, taught="bank")
    wrong = rows(2)
    wrong["truth"][0, 5, 5] = 4
    with pytest.raises(errors.UsageError, match="a pixel is of class 4.*set 5 or more"):
        readout.scores(wrong, wrong, few)
    nothing = rows(2)
    nothing["truth"][:] = -1
    assert readout.scores(nothing, nothing, few) == {}
