"""Splits, pixels and a checkpoint are compared before the first step."""

import json
import types
import unicodedata

import numpy as np
import pytest
from PIL import Image

from tests import runs
from vitssl import errors
from vitssl.run import (
    agreement,
    beginning,
    build,
    evaluation,
    experiment,
    loop,
    opened,
    warmstart,
)


def _paint(root, *paths, value=200):
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(file)


def _read(config, root, *overrides):
    more = "data.source=folder", f"data.root={root}", "data.test_split=val"
    c = experiment.load(str(runs.ROOT / "configs" / config), [*more, *overrides])
    return experiment.read(c)


def _check(checked):
    s = checked.settings
    source = s.data.open(s.data.split)
    evaluation.check(s, checked.method(checked.run()), source)


def _splits(root, train, val):
    _paint(root, *(f"train/{c}/{i}.png" for c in train for i in range(2)))
    _paint(root, *(f"val/{c}/{i}.png" for c in val for i in range(2)))


@pytest.mark.parametrize("config", ["finetune_vit.py:smoke", "hjepa.py:smoke"])
def test_splits_without_a_common_class_do_not_start(tmp_path, config, monkeypatch):
    monkeypatch.setattr(
        beginning, "first_state", lambda *a: pytest.fail("it would train")
    )
    # As tiny-imagenet is unpacked.
    data = tmp_path / "data"
    _splits(data, ("n01", "n02", "n03", "n04", "n05", "n06", "n07"), ("images",))
    key = "split" if "finetune" in config else "bank_split"
    with pytest.raises(errors.DataError) as caught:
        loop.run(_read(config, data, "batch_size=4"), tmp_path / "run", name="test")
    assert str(caught.value) == (
        "data.test_split='val' has no class of data.bank_split='train': images against "
        "n01, n02, n03, n04, n05, n06, ... (7 classes)"
    ).replace("bank_split", key)
    assert caught.value.code == 3


def test_names_that_differ_in_case_or_accents_alone_are_told(tmp_path):
    _splits(tmp_path, ("cat", "dog"), ("Cat", "DOG"))
    with pytest.raises(errors.DataError) as caught:
        _check(_read("finetune_vit.py:smoke", tmp_path))
    assert str(caught.value).endswith(
        "Cat, DOG against cat, dog; 2 differ in case or in how accents are stored "
        "alone, as 'Cat' and 'cat': give their folders one name"
    )
    composed = unicodedata.normalize("NFC", "müll")
    apart = unicodedata.normalize("NFD", "müll")
    assert composed != apart
    with pytest.raises(errors.DataError, match=r"as 'mu\\u0308ll' and 'm\\xfcll'"):
        agreement.same_classes(("a", {composed: 1}), ("b", {apart: 1}))


def test_classes_that_one_split_lacks_are_counted(tmp_path, caplog):
    _splits(tmp_path, ("ant", "bee", "cow"), ("ant", "bee", "Cow"))
    _check(_read("finetune_vit.py:smoke", tmp_path))
    spelling = "differ in case or in how accents are stored alone, as 'Cow' and 'cow'"
    assert [m for m in caplog.messages if "left out" not in m] == [
        "data.test_split='val' has 1 of 3 classes that data.split='train' has no image "
        f"of: Cow (2); 1 {spelling}: give their folders one name",
        "data.split='train' has 1 of 3 classes that data.test_split='val' has no image "
        "of: cow (2)",
    ]
    caplog.clear()
    agreement.same_classes(("a", {"x": 3, "y": 1}), ("b", {"y": 2, "x": 9}))
    agreement.same_classes(("a", {}), ("b", {"y": 2}))  # Nothing is labelled.
    assert not caplog.messages


def test_images_without_label_teach_no_classifier(monkeypatch):
    spec = str(runs.ROOT / "configs/finetune_vit.py:smoke")
    checked = experiment.read(experiment.load(spec, ["batch_size=16"]))
    source = checked.settings.data.open("train")
    source.labels[:7] = -1
    monkeypatch.setattr(type(checked.settings.data), "open", lambda *a: source)
    with pytest.raises(errors.DataError) as caught:
        build.build(checked)
    assert str(caught.value) == (
        f"data.split='train': 7 of {len(source)} images of digits have no label (-1); "
        "method=classify learns from labels"
    )


def test_a_set_that_is_nearly_black_is_said_once(tmp_path, caplog):
    _paint(tmp_path, *(f"a/{i}.png" for i in range(20)), "b/0.png", value=16)
    data = _read("hjepa.py:smoke", tmp_path).settings.data
    source = data.open("all")
    caplog.clear()
    agreement.bright(data, source)
    assert caplog.messages == [
        "data.split='train': no value of 16 images passes 16 of 255: nearly black; "
        "data.options.value_range=(0, 4095) is right for 12 bits"
    ]
    caplog.clear()
    _paint(tmp_path, "a/0.png", value=32)
    agreement.bright(data, source)
    assert not caplog.messages


def _past(tmp_path, *overrides):
    """Return a past run of which there is no more than its config."""
    c = experiment.load(str(runs.ROOT / "configs/hjepa.py:smoke"), overrides)
    (tmp_path / "checkpoints").mkdir()
    text = json.dumps(c.to_dict(), default=list)
    (tmp_path / "config.json").write_text(text)
    return opened.Past(str(tmp_path), tmp_path / "checkpoints", 1)


def test_other_pixels_than_a_checkpoint_saw_are_one_line_each(tmp_path, caplog):
    past = _past(tmp_path, "data.mean=(0.25,)")
    data = types.SimpleNamespace(channels=1, mean=(0.5,), std=(0.5,))
    params = {"encoder": {"patch_embed": {"kernel": np.zeros((4, 4, 1, 8))}}}
    before = past.experiment
    there = before.settings.data.std, before.training_size
    spec = warmstart.Init(from_="runs/x")
    data.std = there[0]
    agreement.with_checkpoint(spec, past, data, there[1] + 8, params)
    assert caplog.messages == [
        f"init.from=runs/x: image size in pixels was {there[1]} there, is "
        f"{there[1] + 8} here",
        "init.from=runs/x: data.mean was (0.25,) there, is (0.5,) here",
    ]
    caplog.clear()
    data.mean = (0.25,)
    agreement.with_checkpoint(spec, past, data, there[1], params)
    skips = warmstart.Init(from_="runs/x", skip=(".*patch_embed.*",))
    data.mean = (0.5,)
    agreement.with_checkpoint(skips, past, data, there[1], params)
    assert not caplog.messages


def test_a_checkpoint_of_other_channels_is_refused_in_words():
    stored = {"encoder/patch_embed/kernel": np.zeros((4, 4, 1, 8), np.float32)}
    past = types.SimpleNamespace(params=lambda part: dict(stored), imported=False)
    params = {"encoder": {"patch_embed": {"kernel": np.zeros((4, 4, 3, 8))}}}
    with pytest.raises(errors.CheckpointError) as caught:
        warmstart.load(warmstart.Init(from_="runs/x"), past, params)
    assert (
        "encoder/patch_embed/kernel: it was trained on 1 channel(s), data.channels "
        "gives it 3; set data.channels, data.mean and data.std to its own"
    ) in str(caught.value)
    assert caught.value.code == 4
