"""vitssl predict: a user's folder from pre-training to a table of its classes."""

import csv
import json
import shutil

import cv2
import jax
import matplotlib
import numpy as np
import pytest

import vitssl
from tests import runs
from vitssl import cli, errors
from vitssl.data import decode
from vitssl.pictures import attention
from vitssl.tools import predict

COLOURS = {"blue": (70, 90, 190), "green": (80, 180, 70), "red": (190, 80, 80)}
SMALL = {
    "batch_size": 8,
    "optim.warmup_epochs": 0.0,
    "model.width": 8,
    "model.depths": "(1, 1)",
    "model.heads": "(1, 2)",
    "augment.size": 24,
    "data.threads": 1,
    "evals.batch_size": 8,
    "evals.final": "()",
    "evals.every_epochs": 0.0,
    "log.tensorboard": False,
    "log.pictures": False,
}


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder {train,test}/<colour>/*.jpg: noisy, of several sizes."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 5)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = 30 + 5 * i, 48
                tint = rng.normal(colour, 50)  # Some look like another class.
                pixels = rng.normal(tint, 20, (*size, 3)).clip(0, 255)
                file = root / split / name / f"{i}.jpg"
                cv2.imwrite(str(file), pixels.astype(np.uint8)[..., ::-1])
    return root


def _train(recipe, workdir, **changes):
    """Train a recipe in small by the command."""
    words = [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()]
    spec = f"{runs.ROOT}/configs/{recipe}"
    return cli.main(["train", f"--config={spec}", f"--workdir={workdir}", *words])


@pytest.fixture(scope="module")
def tuned(photographs, tmp_path_factory):
    """A run fine-tuned from a pre-trained one, on the photographs."""
    base = tmp_path_factory.mktemp("runs")
    given = SMALL | {"data.root": photographs}
    own = {"steps": 2, "projector.hidden": 8, "projector.width": 8}
    assert _train("simclr_hvit.py:folder", base / "first", **given, **own) == 0
    given |= {"init.from": base / "first", "epochs": 3.0, "evals.every_epochs": 1.0}
    given |= {"objective.ema": 0.9, "objective.ema_warmup": False}
    assert _train("finetune_hvit.py:folder", base / "tuned", **given) == 0
    return base / "tuned"


def _predict(*given):
    return cli.main(["predict", *map(str, given)])


def _rows(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_the_table_has_the_accuracy_of_the_runs_headline(
    tuned, photographs, tmp_path, capsys
):
    images, to = photographs / "test", tmp_path / "new" / "p.csv"
    assert _predict(tuned, f"--images={images}", f"--to={to}", "--batch_size=4") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"{to}: 15 images, 0 of them broken; by ema_tta of {tuned}"
    rows = _rows(to)
    right = [row["file"].split("/")[0] == row["class"] for row in rows]
    final = {k: v for line in runs.metrics(tuned) for k, v in line.items()}
    assert np.mean(right) == pytest.approx(final["final/test/ema_tta_top1"])
    assert np.mean(right) != final["final/test/top1"]  # So that it tells them apart.
    log = [np.log(float(_of(row, row["file"].split("/")[0]))) for row in rows]
    assert -np.mean(log) == pytest.approx(final["final/test/ema_tta_loss"], rel=1e-4)


def _of(row, name):
    """Return the probability of a class in a row."""
    end = next(k[len("class") :] for k in row if k[:5] == "class" and row[k] == name)
    return row[f"probability{end}"]


def test_python_predicts_what_the_command_does(tuned, photographs, tmp_path):
    images = photographs / "test"
    rows = predict.run(tuned, images, tmp_path / "p.json", top=2, show=lambda line: 0)
    assert json.loads((tmp_path / "p.json").read_text()) == rows
    assert list(rows[0]) == [
        *("file", "class", "probability", "class_2", "probability_2", "error")
    ]
    pixels = [decode.read(images / row["file"], channels=3) for row in rows]
    made = vitssl.load(tuned)
    found = made.predict(pixels, batch_size=4)
    assert found["weights"] == "ema_tta" and made.classes == tuple(COLOURS)
    assert found["class"] == [row["class"] for row in rows]
    assert [list(COLOURS)[i] for i in found["label"]] == found["class"]
    np.testing.assert_allclose(found["probability"].sum(1), 1.0, rtol=1e-5)
    best = np.sort(found["probability"], 1)[:, ::-1]
    for k, key in enumerate(("probability", "probability_2")):
        want = [row[key] for row in rows]
        np.testing.assert_allclose(best[:, k], want, atol=1e-5)
    whole = made.predict(np.stack([x[:30, :40] for x in pixels]))["probability"]
    few = made.predict([x[:30, :40] for x in pixels[:2]])["probability"]
    np.testing.assert_allclose(whole[:2], few, rtol=1e-4)


def test_broken_and_loose_files_are_rows_too(tuned, photographs, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(photographs / "test" / "red", folder / "in" / "deep")
    shutil.copy(photographs / "test" / "red" / "0.jpg", folder / "loose.jpg")
    (folder / "in" / "zero.png").write_bytes(b"")
    given = (tuned, f"--images={folder}", "--batch_size=3")
    assert _predict(*given, f"--to={tmp_path}/p.csv") == 0
    assert "7 images, 1 of them broken" in capsys.readouterr().out
    rows = {row["file"]: row for row in _rows(tmp_path / "p.csv")}
    assert list(rows) == [
        *(f"in/deep/{i}.jpg" for i in range(5)),
        "in/zero.png",
        "loose.jpg",
    ]
    broken = rows.pop("in/zero.png")
    assert "zero bytes" in broken.pop("error") and not any(
        broken[k] for k in broken if k != "file"
    )
    assert not any(row["error"] for row in rows.values())
    same = rows["loose.jpg"], rows["in/deep/0.jpg"]
    assert float(same[0]["probability"]) == pytest.approx(float(same[1]["probability"]))
    parquet = pytest.importorskip("pyarrow.parquet")  # The extra [parquet].
    assert _predict(*given, f"--to={tmp_path}/p.parquet") == 0
    table = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    want = [row["class"] or None for row in _rows(tmp_path / "p.csv")]
    assert [row["class"] for row in table] == want
    shutil.rmtree(folder / "in" / "deep")
    (folder / "loose.jpg").write_bytes(b"no")
    assert _predict(*given, f"--to={tmp_path}/q.csv") == 3
    assert "none of 2 images can be decoded" in capsys.readouterr().err
    assert len(_rows(tmp_path / "q.csv")) == 2


def test_an_overlay_has_the_colours_of_attention(tuned, photographs, tmp_path):
    over, images = tmp_path / "over", photographs / "test"
    given = (tuned, f"--images={images}", f"--to={tmp_path}/p.csv")
    assert _predict(*given, f"--overlay={over}") == 0
    found = sorted(str(p.relative_to(over)) for p in over.rglob("*.png"))
    assert found == sorted(f"{row['file']}.png" for row in _rows(tmp_path / "p.csv"))
    made = vitssl.load(tuned)
    image = predict._files(images)
    view = made._view(0, decode.read(image.path(0), channels=3))
    drawn = cv2.imread(str(over / f"{image.relative(0)}.png"))[..., ::-1] / 255
    drawn = drawn.reshape(24, 10, 24, 10, 3).mean((1, 3))
    heat = (drawn - 0.4 * view / 255) / 0.6
    scale = matplotlib.colormaps[attention.HEAT](np.linspace(0, 1, 256))[:, :3]
    far = np.linalg.norm(heat[:, :, None] - scale, axis=-1)  # [24, 24, 256]
    assert far.min(-1).max() < 0.02
    assert far.argmin(-1).max() > 240 and far.argmin(-1).min() < 128


@pytest.mark.parametrize(
    "given, code, says",
    [
        (("--images=IMAGES", "--to=TMP/p.txt"), 2, "must end in .csv or .parquet"),
        (("--images=IMAGES", "--to=/proc/no/p.csv"), 2, "--to=/proc/no/p.csv: No such"),
        (("--images=IMAGES", "--to=TMP/p.csv", "--top=0"), 2, "--top=0: 1 or more"),
        (("--images=IMAGES", "--to=TMP/p.csv", "--overlay=/proc/x"), 2, "--overlay=/p"),
        (("--images=TMP/none", "--to=TMP/p.csv"), 3, "none: no such folder"),
        (("--images=TMP", "--to=TMP/p.csv"), 3, "no image in it (.avif"),
        (("--images=IMAGES",), 2, "required: --to"),
        (("--images=IMAGES", "--to=TMP/p.csv"), 4, "no complete checkpoint"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    given, code, says, photographs, tmp_path, capsys
):
    places = {"IMAGES": str(photographs), "TMP": str(tmp_path)}
    for key, place in places.items():
        given = [word.replace(key, place) for word in given]
    assert _predict("nowhere", *given) == code
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_without_classes_says_so_before_it_reads_images(
    tuned, photographs, tmp_path, capsys
):
    given = (f"--images={photographs}", f"--to={tmp_path}/p.csv")
    assert _predict(tuned.parent / "first", *given) == 2
    said = capsys.readouterr().err
    assert "this method names no classes; fine-tune it" in said
    assert len(said.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_predict_refuses_images_that_the_run_cannot_have(tuned):
    made = vitssl.load(tuned)
    good = np.zeros((9, 9, 3), np.uint8)
    for bad in (good[..., :1], good.astype(np.float32), good[:0]):
        with pytest.raises(errors.UsageError, match=r"images\[1\] is .*want uint8"):
            made.predict([good, bad])
    with pytest.raises(errors.UsageError, match="there is none"):
        made.predict([])
    with pytest.raises(errors.UsageError, match="an encoder names no classes"):
        vitssl.load(tuned, part="ema").predict([good])


def test_parts_are_named_and_drawn_by_their_average(photographs, tmp_path):
    given = {"average.decay": 0.5, "steps": 1, "batch_size": 8, "parts.rooms": "(1.0,)"}
    given |= {"evals.batch_size": 8, "log.tensorboard": False, "data.threads": 1}
    given |= {"evals.every_epochs": 0.0, "measures.leave_one_out": False}
    given |= {"augment.size": 24, "model.width": 16, "model.heads": 2}
    given |= {"evals.online_samples_train": 8, "data.options.count": 32}
    given |= {"data.options.purity": 0.5}
    assert _train("parts.py:smoke", tmp_path / "run", **given) == 0
    images, over = photographs / "test" / "red", tmp_path / "over"
    rows = predict.run(
        tmp_path / "run", images, tmp_path / "p.csv", overlay=over, show=lambda line: 0
    )
    pixels = [decode.read(images / row["file"], channels=3) for row in rows]
    made = vitssl.load(tmp_path / "run")
    found = made.predict(pixels)
    assert found["weights"] == "average" and set(found["class"]) <= set(made.classes)
    near = [row["probability"] for row in rows]
    np.testing.assert_allclose(found["probability"].max(1), near, atol=1e-5)
    drawn = cv2.imread(str(over / "0.jpg.png"))
    assert len(list(over.iterdir())) == 5 and drawn.shape == (256, 256, 3)
    pooled = made(np.zeros((2, 24, 24, 3), np.uint8))["pooled"]
    assert pooled.shape[0] == 2 and np.isfinite(pooled).all()
