"""`freeze.store`: what it keeps changes no bit of a run, nor does a kill anywhere."""

import signal

import jax
import numpy as np
import pytest

from tests import runs
from vitssl import errors
from vitssl.data import tokenstore
from vitssl.run import build, experiment, feed, loop

# 80 digits, two views of each, five steps an epoch. Blocks freeze before steps 5 and 9,
# in the middle of an epoch. A row is 5 x 16 floats, a file 16 rows.
TINY = runs.TINY_FREEZING | {
    "steps": 14,
    "data.per_class": 8,
    "model.depth": 3,
    "stages.blocks": "(0, 1, 2)",
    "stages.scales": "(2.0, 1.0, 1.0)",
    "optim.thaw": "()",
    "freeze.schedule": "none",
    "freeze.layers": "()",
    "optim.freeze": "(('(encoder/(cls|patch_embed|block_0).*|(norm|decoder)_0/.*)', "
    f"{5 / 14}), ('(encoder/block_1|norm_1|decoder_1)/.*', {9 / 14}))",
    "freeze.store.views": 2,
    "freeze.store.shard_mb": 16 * 5 * 16 * 4 / 1e6,
    "checkpoint.every_epochs": 0.6,
}
LAST = TINY["steps"]


def _read(workdir, base=TINY, name="localmim", **changes):
    spec, *words = runs.arguments(workdir, name=name, base=base, **changes)
    overrides = [w.removeprefix("--config.") for w in words if "--config." in w]
    spec = spec.removeprefix("--config=")
    return experiment.read(experiment.load(spec, overrides))


def _train(workdir, **changes):
    loop.run(_read(workdir, **changes), workdir, name="test")
    return workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, with a store."""
    return _train(tmp_path_factory.mktemp("whole") / "run")


def _same(workdir, whole):
    assert runs.digest(workdir, LAST) == runs.digest(whole, LAST)
    assert runs.metrics(workdir) == runs.metrics(whole)


def test_tokens_that_are_stored_train_to_the_bit_as_those_that_are_computed(
    whole, tmp_path
):
    _same(_train(tmp_path / "off", freeze__store__tokens="computed"), whole)


def test_the_store_of_an_event_takes_the_place_of_the_one_before(whole):
    (folder,) = (whole / "store").iterdir()
    assert folder.name.startswith("b2-")
    # From step 9 on: epochs 1 and 2, so both views of 80 images, 16 rows a file.
    assert len(list(folder.glob("*.tokens"))) == 10
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    "fault",
    [
        "kill_in_fill=4",  # The first event, from pixels.
        "kill_in_fill=14",  # The second, from the store: three old files are gone.
        "kill_in_read=40",
        "kill_in_save=3",  # The state that an event seals before it fills.
    ],
)
def test_kill_9_around_a_store_changes_nothing(fault, whole, tmp_path):
    own = dict(name="localmim", base=TINY, devices=4)  # As in this process.
    killed = runs.run(tmp_path, fault, **own)
    assert killed.returncode == -signal.SIGKILL, killed.said
    _same(_train(tmp_path), whole)


def test_a_store_that_is_lost_is_made_again_from_pixels(whole, tmp_path):
    parts = build.build(_read(tmp_path))
    state = parts.fresh()

    def made(at):
        beats = []
        stream = feed.Feed(parts, tmp_path)
        stream.open(at, state.params, beats.append)
        batch = next(stream)
        stream.close()
        return batch["tokens"], len(beats)

    _, first = made(5)
    extended, second = made(9)
    (folder,) = (tmp_path / "store").iterdir()
    (folder / "00003.tokens").unlink()
    again, one = made(9)
    np.testing.assert_array_equal(again, extended)
    assert (first, second, one) == (10, 10, 1)


def test_a_damaged_file_is_one_line_that_says_what_to_do(tmp_path):
    store = tokenstore.Store(str(tmp_path), 3, 2, 4, (2, 8), np.dtype("float32"))
    rows = np.arange(64, dtype=np.float32).reshape(4, 2, 8)
    store.write(0, rows)
    np.testing.assert_array_equal(store.row(1, 0), rows[3])
    assert store.shards([0]) == [0] and store.shards([1]) == [0, 1]
    assert not store.has(1)
    store.write(1, rows[:2])
    data = bytearray(store.path(1).read_bytes())
    data[5] ^= 1
    store.path(1).write_bytes(data)
    with pytest.raises(errors.DataError, match="00001.tokens is damaged .* delete it"):
        store.row(1, 2)


def test_views_are_drawn_once_and_visited_in_turn(tmp_path):
    parts = build.build(_read(tmp_path, freeze__store__tokens="computed"))
    with parts.stream(5) as stream:
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
            "disk_gb=1e-05 is 1e-05 GB, the store needs",
        ),
        ({"optim__freeze": "()"}, "freeze.store.views=2: no 1 block"),
        ({"freeze__store__every": 3}, "freeze.store.views=2: no 3 block"),
    ],
)
def test_a_store_that_cannot_be_is_refused_before_training(changes, said, tmp_path):
    with pytest.raises(errors.UsageError, match=said):
        feed.check(build.build(_read(tmp_path, **changes)), tmp_path)


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("simclr_hvit", {}, "this method keeps no tokens"),
        ("mae", {"objective.hidden": "token"}, "objective.hidden=token puts"),
        ("localmim", {"prefix.boundary": 1}, "whole images .* another task"),
        ("finetune_vit", {"mix.prob": 1.0, "mix.mixup": 0.8}, "mixes no images"),
    ],
)
def test_where_no_tokens_can_be_kept_the_config_says_so(name, changes, said, tmp_path):
    with pytest.raises(errors.UsageError, match=said):
        _read(tmp_path, name=name, base={"freeze.store.views": 1} | changes)


MAE = {
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "decoder.width": 16,
    "decoder.depth": 1,
    "decoder.heads": 2,
    "optim.freeze": "(('encoder/(cls|patch_embed/.*|block_0/.*)', 0.5),)",
}
CLASSIFY = {
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "mix.prob": 0.0,
    "augment.erase": 0.5,
    "optim.freeze": "(('backbone/(cls|pos_embed|patch_embed/.*|block_0/.*)', 0.5),)",
}


@pytest.mark.parametrize("name, base", [("mae", MAE), ("finetune_vit", CLASSIFY)])
def test_other_methods_train_on_from_stored_tokens_to_the_bit(name, base, tmp_path):
    base = base | {"steps": 4, "data.per_class": 4, "freeze.store.views": 1}
    parts = build.build(_read(tmp_path, base=base, name=name))
    state, rng = parts.fresh(), jax.random.key(1)
    assert parts.phase(1).boundary == 0 and parts.phase(2).boundary == 1
    stream = feed.Feed(parts, tmp_path)
    stream.open(2, state.params, lambda cost: None)
    batch = next(stream)
    stream.close()

    @jax.jit
    def loss(params, batch):
        own = dict(step=2, phase=parts.phase(2))
        return parts.method.loss(params, state.extra, batch, rng, **own)[0]

    stored = loss(state.params, batch)
    del batch["tokens"]
    assert stored == loss(state.params, batch)
    moved = jax.tree.map(lambda x: x + 0.1, state.params)
    assert stored != loss(moved, batch)
