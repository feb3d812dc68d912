"""`freeze.store`: what it keeps changes no bit of a run, nor does a kill anywhere."""

import contextlib
import dataclasses
import errno
import signal

import jax
import numpy as np
import pytest

from tests import runs
from vitssl import config, errors
from vitssl.data import loader, tokenstore
from vitssl.run import build, devices, experiment, feed, loop

# 80 digits, one view of each, 16 a step. Blocks freeze before steps 5 and 9; from the
# latter on a step has 20. Epoch 2, from step 9 on, finds 64 images stored behind one
# block, and 16 not at all; epoch 3, from step 13 on, all behind two. A view has 5 x 16
# floats.
TINY = runs.TINY_FREEZING | {
    "steps": 17,
    "data.per_class": 8,
    "model.depth": 3,
    "stages.blocks": "(2,)",
    "stages.scales": "(1.0,)",
    "optim.thaw": "()",
    "freeze.schedule": "none",
    "freeze.layers": "()",
    "optim.freeze": f"(('encoder/(cls|patch_embed|block_0).*', {5 / 17}), "
    f"('encoder/block_1/.*', {9 / 17}))",
    "freeze.store.views": 1,
    "freeze.grow_batch": "(16, 20)",
    "checkpoint.every_epochs": 0.6,
}
LAST = TINY["steps"]


def _read(workdir, base=TINY, name="localmim", **changes):
    spec, *words = runs.arguments(workdir, name=name, base=base, **changes)
    overrides = [w.removeprefix("--config.") for w in words if "--config." in w]
    c = config.recipe(spec.removeprefix("--config="))
    if name == "simclr_hvit" and "model.depth" in base:  # SimCLR of a plain ViT.
        c.model = dict(image_size=0, patch=c.model.patch, width=1, depth=1, heads=1)
    experiment.apply(c, overrides)
    return experiment.read(c)


def _train(workdir, **changes):
    loop.run(_read(workdir, **changes), workdir, name="test")
    return workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, with a store that is filled by the way."""
    return _train(tmp_path_factory.mktemp("whole") / "run")


def _same(workdir, whole):
    assert runs.digest(workdir, LAST) == runs.digest(whole, LAST)
    assert runs.metrics(workdir) == runs.metrics(whole)


def test_tokens_that_are_stored_train_to_the_bit_as_those_that_are_computed(
    whole, tmp_path
):
    _same(_train(tmp_path / "off", freeze__store__tokens="computed"), whole)


def test_a_store_has_a_place_for_every_view_and_no_more(whole):
    (file,) = (whole / "store").rglob("*.*")
    assert (file.parent.name.split("-")[1], file.name) == ("5x16", "00000.tokens")
    assert file.stat().st_size == 80 * (5 * 16 * 4 + 8)


def test_kill_9_anywhere_around_a_store_changes_nothing(whole, tmp_path):
    own = dict(name="localmim", base=TINY, devices=4)  # As in this process.
    for fault, fill in (
        ("kill_in_fill=2", "background"),  # Behind the first event, from pixels.
        ("kill_in_save=1", "pass"),  # The state that an event seals before it fills.
        ("kill_in_fill=7", "pass"),  # At the second event, from the store.
        ("kill_in_read=5", "background"),
    ):
        killed = runs.run(tmp_path, fault, freeze__store__fill=fill, **own)
        assert killed.returncode == -signal.SIGKILL, killed.said
    _same(_train(tmp_path), whole)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What runs are made of, and parameters."""
    made = build.build(_read(tmp_path_factory.mktemp("parts")))
    return made, made.fresh().params


def _taken(parts, workdir, at, count=1, fill="background"):
    """Return ([batch of step at, ...], [FLOPs beside each], batches waited for)."""
    parts, params = parts
    store = dataclasses.replace(parts.optimizer.store, fill=fill)
    optimizer = dataclasses.replace(parts.optimizer, store=store)
    parts, beats = dataclasses.replace(parts, optimizer=optimizer), []
    with contextlib.closing(feed.Feed(parts, workdir)) as stream:
        stream.open(at, params, beats.append)
        found = [(stream.take(params), stream.made) for _ in range(count)]
    batches, made = zip(*found, strict=True)
    return [jax.device_get(b["tokens"]) for b in batches], made, len(beats)


def test_what_is_lost_or_damaged_is_made_again_to_the_bit(parts, tmp_path):
    first, made, waited = _taken(parts, tmp_path, 9, 8)
    assert waited == 0 and min(made[:4]) > 0 and made[4:] == (0.0,) * 4
    (file,) = (tmp_path / "store").rglob("*.tokens")
    data = bytearray(file.read_bytes())
    data[100] ^= 1  # A bit of image 0, which one of steps 13 to 16 shows.
    file.write_bytes(data)
    again, made, _ = _taken(parts, tmp_path, 13, 4)
    np.testing.assert_array_equal(again, first[4:])
    assert np.count_nonzero(made) == 1
    file.unlink()
    again, made, _ = _taken(parts, tmp_path, 13, 2)
    np.testing.assert_array_equal(again, first[4:6])
    assert min(made) > 0


def test_an_event_goes_on_from_what_is_stored_behind_fewer_blocks(parts, tmp_path):
    _, made, waited = _taken(parts, tmp_path, 5, 1, "pass")
    assert (made, waited) == ((0.0,), 5)
    deeper, flops, _ = _taken(parts, tmp_path, 9, 4)
    fresh, more, _ = _taken(parts, tmp_path / "fresh", 9, 4)
    np.testing.assert_array_equal(deeper, fresh)
    assert 0 < max(flops) < min(more)
    # At once, with one view damaged: four batches of tokens, and one of pixels.
    _taken(parts, tmp_path / "at once", 5, 1, "pass")
    (file,) = (tmp_path / "at once" / "store").rglob("*.tokens")
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    waited, made, batches = _taken(parts, tmp_path / "at once", 9, 4, "pass")
    np.testing.assert_array_equal(waited, fresh)
    assert (max(made), batches) == (0.0, 5)


def test_an_event_waits_for_no_compilation_and_no_batch(parts, tmp_path, monkeypatch):
    parts, params = parts
    with contextlib.closing(feed.Feed(parts, tmp_path)) as stream:
        stream.open(0, params, None)
        stream.take(params)
        stream.prepare(1, 5)
        stream.settled()
        monkeypatch.setattr(feed, "_Ahead", None)  # Nothing is opened any more.
        counted = []
        monkeypatch.setattr(jax.stages.Lowered, "compile", counted.append)
        monkeypatch.setattr(loader.Loader, "__next__", counted.append)
        stream.open(5, params, None)
        assert stream.take(params)["tokens"].shape == (16, 5, 16)
    assert not counted


def test_tokens_are_there_if_their_mark_and_their_checksum_fit(tmp_path):
    store = tokenstore.Store(str(tmp_path), 3, (2, 8), np.dtype("float32"), 7)
    rows = np.arange(48, dtype=np.float32).reshape(3, 2, 8)
    store.write(np.array([0, 4, 5]), rows)
    found, there = store.read(np.arange(6))
    assert there.tolist() == [True, False, False, False, True, True]
    np.testing.assert_array_equal(found[there], rows)
    other = dataclasses.replace(store, mark=8)
    assert not other.read(np.arange(6))[1].any()
    assert store.marked(np.arange(6)).tolist() == there.tolist()
    with open(store.path(1), "r+b") as file:
        file.seek(1 * (2 * 8 * 4 + 8) + 3)
        file.write(b"\1")
    assert store.read(np.array([4, 5]))[1].tolist() == [False, True]
    store.close()


def test_a_full_disk_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    store = tokenstore.Store(str(tmp_path), 3, (2, 8), np.dtype("float32"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenstore.Store, "_put", full)
    with pytest.raises(errors.DataError, match="00000.tokens .*No space.* free space"):
        store.write(np.array([0]), np.zeros((1, 2, 8)))


def test_views_are_drawn_once_and_visited_in_turn(parts):
    optimizer = parts[0].optimizer
    store = dataclasses.replace(optimizer.store, views=2)
    optimizer = dataclasses.replace(optimizer, store=store, grow_batch=())
    with dataclasses.replace(parts[0], optimizer=optimizer).stream(5) as stream:
        epochs = [[stream.load(5 * e + t) for t in range(5)] for e in range(4)]
    seen = [
        {
            int(i): (image.tobytes(), seed.tobytes())
            for batch in epoch
            for i, image, seed in zip(
                batch["index"], batch["global"], batch["view_seed"], strict=True
            )
        }
        for epoch in epochs
    ]
    assert len(seen[0]) == 80
    assert seen[0] == seen[2] and seen[1] == seen[3]
    assert all(seen[0][i] != seen[1][i] for i in seen[0])


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"freeze__store__disk_gb": 1e-5},
            "disk_gb=1e-05 is 1e-05 GB, the store needs 2.62e-05 GB",
        ),
        (
            {"optim__freeze": "()", "freeze__grow_batch": "()"},
            "freeze.store.views=1: no 1 block",
        ),
        ({"freeze__store__every": 3}, "freeze.store.views=1: no 3 block"),
        ({"freeze__grow_batch": "(18,)"}, "18 does not split .* do: 16, 20"),
        ({"freeze__grow_batch": "(84,)"}, "84 is more than the 80 training images"),
    ],
)
def test_what_cannot_be_is_refused_before_training(changes, said, tmp_path):
    with pytest.raises(errors.UsageError, match=said):
        feed.check(build.build(_read(tmp_path, **changes)), tmp_path)


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("hjepa", {}, "keeps no tokens: its targets are whole views"),
        ("dino", {}, "keeps no tokens: its teacher"),
        ("distill", {"teacher.from": "untrained"}, "keeps no tokens: crops have two"),
        ("latent_mim", {}, "keeps no tokens: a sample has patches of several"),
        ("parts", {}, "keeps no tokens: the second network"),
        (
            "simclr_hvit",
            {"model.spectral_channels": 1, "model.fusion": "none"},
            "tokens of one stream",
        ),
        ("simclr_hvit", {"resolution.start": 16}, "views have one size"),
        ("mae", {"objective.hidden": "token"}, "objective.hidden=token puts"),
        ("mae", {"model.rope": True}, "model.rope turns tokens by the whole grid"),
        ("localmim", {"prefix.boundary": 1}, "whole images .* another task"),
        ("finetune_vit", {"mix.prob": 1.0, "mix.mixup": 0.8}, "mixes no images"),
    ],
)
def test_where_no_tokens_can_be_kept_the_config_says_so(name, changes, said, tmp_path):
    with pytest.raises(errors.UsageError, match=said):
        _read(tmp_path, name=name, base={"freeze.store.views": 1} | changes)


def _vit(net):
    first = rf"{net}/(cls|pos_embed|patch_embed/.*|block_0/.*)"
    own = {"width": 16, "depth": 2, "heads": 2}
    return {f"model.{k}": v for k, v in own.items()} | {
        "optim.freeze": f"(('{first}', 0.5),)"
    }


def _hvit(net):
    """Two stages; the merging between them and a block of the second freeze too."""
    first = rf"{net}/(pos_embed|patch_(embed|norm)/.*|block_[01]/.*|merge_0/.*)"
    own = {"width": 8, "depths": (1, 2), "heads": (1, 2), "fusion": "none"}
    return {f"model.{k}": v for k, v in own.items()} | {
        "optim.freeze": f"(('{first}', 0.5),)"
    }


DECODER = {"decoder.width": 16, "decoder.depth": 1, "decoder.heads": 2}
CLASSIFY = {"mix.prob": 0.0, "augment.erase": 0.5}
METHODS = {
    "mae": ("mae", _vit("encoder") | DECODER),
    "finetune_vit": ("finetune_vit", _vit("backbone") | CLASSIFY),
    "finetune_hvit": ("finetune_hvit", _hvit("backbone") | {"mix.prob": 0.0}),
    "simclr_vit": (
        "simclr_hvit",
        {"augment.colour": "device"} | _vit("encoder"),
    ),
    "simclr_hvit": ("simclr_hvit", _hvit("encoder")),
}


@pytest.mark.parametrize("case", METHODS)
def test_other_methods_train_on_from_stored_tokens_to_the_bit(case, tmp_path):
    name, base = METHODS[case]
    own = {"steps": 4, "batch_size": 16, "data.per_class": 4, "freeze.store.views": 1}
    parts = build.build(_read(tmp_path, base=base | own, name=name))
    assert parts.phase(1).boundary == 0
    assert parts.phase(2).boundary == (2 if case.endswith("_hvit") else 1)
    rng, key = np.random.default_rng(0), jax.random.key(1)
    state = jax.tree.map(
        lambda s: rng.uniform(0.01, 0.1, s.shape).astype(s.dtype),
        {
            k: getattr(parts.compiled.abstract(parts.phase(2)), k)
            for k in ("params", "extra")
        },
    )
    params = jax.device_put(state["params"], devices.replicated(parts.mesh))
    with contextlib.closing(feed.Feed(parts, tmp_path)) as stream:
        stream.open(2, params, None)
        batch = stream.take(params)

    @jax.jit
    def loss(params, batch):
        own = dict(step=2, phase=parts.phase(2))
        return parts.method.loss(params, state["extra"], batch, key, **own)[0]

    stored = loss(params, batch)
    del batch["tokens"]
    assert stored == loss(params, batch)
    moved = jax.tree.map(lambda x: x * rng.uniform(0.5, 2.0, x.shape), params)
    assert stored != loss(moved, batch)
