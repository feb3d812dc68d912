"""Starting from stored parameters under other names."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import config, errors
from vitssl.data import orders
from vitssl.run import beginning, checkpoint, experiment, opened, step, warmstart


def test_one_stored_network_fills_two():
    stored = {"encoder/cls": np.ones(2), "encoder/norm/scale": np.zeros(2)}
    names = ["stage_1/backbone/cls", "stage_2/backbone/cls", "stage_1/head/w"]
    rules = ((r"stage_[12]/backbone/(.*)", r"encoder/\1"),)
    got = warmstart.renamed(stored, names, rules)
    assert set(got) == {*stored, "stage_1/backbone/cls", "stage_2/backbone/cls"}
    assert got["stage_2/backbone/cls"] is stored["encoder/cls"]


def test_the_first_rule_wins_and_what_is_not_stored_stays_unknown():
    stored = {"a": np.ones(1), "b": np.zeros(1)}
    got = warmstart.renamed(stored, ["x", "y"], (("x", "b"), (".*", "c"), ("x", "a")))
    assert got["x"] is stored["b"] and "y" not in got


def test_a_broken_pattern_is_named():
    lines = list(warmstart.Init(rename=(("(", "a"),)).check())
    assert lines and lines[0].startswith("rename: '('")


def test_a_classifier_of_other_classes_is_refused_by_name():
    warmstart.same_classes("x", ["a", "b"], ("a", "b"), "-")
    warmstart.same_classes("x", None, ("a", "b"), "-")  # Of an older run.
    with pytest.raises(errors.CheckpointError, match="class 1 is 'b' there and 'c' he"):
        warmstart.same_classes("x", ["a", "b"], ("a", "c"), "-")
    with pytest.raises(errors.CheckpointError, match=r"3 classes.*'c'.*'\(none\)'"):
        warmstart.same_classes("x", ["a", "b", "c"], ("a", "b"), "-")


def test_a_run_is_not_resumed_in_another_order_of_its_images():
    many, few = orders.LISTED + 1, orders.LISTED
    for meta, images in (({}, few), ({"order": "bijection"}, many)):
        warmstart.same_order("x", meta, images, "shuffle")
    warmstart.same_order("x", {}, many, "balanced")
    with pytest.raises(errors.CheckpointError, match="x: .*'listed'.*'bijection'"):
        warmstart.same_order("x", {}, many, "shuffle")
    with pytest.raises(errors.CheckpointError, match="'bijection'.*'listed'"):
        warmstart.same_order("x", {"order": "bijection"}, few, "shuffle")


def test_patience_wants_more_than_a_trifle_and_losses_to_fall():
    spec = checkpoint.Checkpoint(every_epochs=1.0, best="f1", patience=2, min_delta=0.1)
    patience, over = checkpoint.Best(spec, {}), []
    for value in (0.5, 0.55, 0.7, 0.75, 0.79):
        patience.look(1, {"f1": value})
        over.append(patience.over)
    assert over == [False, False, False, False, True]
    assert patience.state()["best"] == 0.7
    falling = checkpoint.Checkpoint(every_epochs=1.0, best="test/loss", patience=2)
    patience = checkpoint.Best(falling, {})
    for at, value in enumerate((2.0, 1.0, 1.5), 1):
        patience.look(at, {"test/loss": value})
    assert patience.state() == {
        "best": 1.0,
        "since": 1,
        "value": 1.0,
        "step": 2,
    }


def test_a_head_is_compared_with_the_classes_of_its_checkpoint(tmp_path):
    params = {"backbone": {"w": np.ones(2)}, "head": {"kernel": np.ones((2, 2))}}
    spec = checkpoint.Checkpoint(every_epochs=1.0)
    with checkpoint.Checkpoints(tmp_path, spec, 1) as saves:
        saves.save(1, {"params": params}, {"classes": ["a", "b"]}, {})
    start = warmstart.Init(from_=str(tmp_path))
    warmstart.check_classes(start, opened.past(tmp_path), ("a", "b"), params)
    with pytest.raises(errors.CheckpointError, match="class 0 is 'a' there and 'b'"):
        warmstart.check_classes(start, opened.past(tmp_path), ("b", "a"), params)
    # A head that starts anew has no classes yet.
    fresh = warmstart.Init(from_=str(tmp_path), skip=("head/.*",))
    warmstart.check_classes(fresh, opened.past(tmp_path), ("b", "a"), params)


def test_a_run_of_the_version_before_resumes_without_its_step(tmp_path):
    # Methods kept the step in `extra` before the trainer told them.
    def state(**extra):
        zero = {"w": jnp.zeros(2)}
        return step.State(jnp.int32(3), zero, extra, {}, jax.random.key(0))

    spec = checkpoint.Checkpoint(every_epochs=1.0)
    old = state(step=jnp.int32(3), target=jnp.ones(2))
    with checkpoint.Checkpoints(tmp_path, spec, 1) as saves:
        saves.save(3, old, {}, {})
        saves.wait()
        target = jax.eval_shape(lambda: state(target=jnp.ones(2)))
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), target
        )
        found, _ = saves.restore(lambda at: target)
    assert set(found.extra) == {"target"} and int(found.step) == 3
    np.testing.assert_array_equal(found.extra["target"], np.ones(2))
    other = jax.tree.map(lambda s: s, target).replace(extra={})
    with pytest.raises(errors.CheckpointError, match="extra/target"):
        checkpoint.read(tmp_path / "checkpoints", 3, other)


def _recipes():
    """Yield (file, recipe, what its `init.weights` says) of all that can start so."""
    folder = pathlib.Path(__file__).parents[2] / "configs"
    for path in config.files(folder):
        file = config.module(str(path))
        for name in file.RECIPES:
            c = file.get_config(name)
            if "init" in c and path.stem != "distill":  # It has a teacher instead.
                yield path, name, c, file


def test_every_recipe_that_starts_from_weights_names_them():
    seen = set()
    from_nothing = {"scratch", "digits_scratch", "smoke", "infrared", "rival_labels"}
    for path, name, c, file in _recipes():
        seen.add(path.stem)
        wanted = c.init.weights
        # Its studies make what they start from, or start from nothing.
        study = path.stem.startswith("finetune") and name.startswith("evidence")
        assert bool(wanted) != (study or name in from_nothing), (path.stem, name)
        if not wanted:
            continue
        assert wanted in file.__doc__, (path.stem, name, wanted)
        spec = warmstart.Init(weights=wanted)
        assert wanted in spec.wanted
        if wanted.startswith("configs/"):  # It is there.
            assert config.recipe(f"{path.parents[1]}/{wanted}")
        else:
            assert "vitssl convert import" in spec.wanted
            assert len(wanted.split("/")) == 2
    started = {"hjepa", "localmim", "finetune_vit", "finetune_hvit", "linprobe_vit"}
    assert seen == {"parts", "knn", *started}


@pytest.mark.parametrize("path", ["none", "none.safetensors"])
def test_weights_that_are_not_there_are_an_error_that_names_them(path, tmp_path):
    spec = warmstart.Init(str(tmp_path / path), weights="microsoft/rad-dino")
    with pytest.raises(errors.CheckpointError) as told:
        beginning.past_of(spec)
    for part in (
        f"init.from={tmp_path / path}",
        "microsoft/rad-dino",
        "convert import",
    ):
        assert part in str(told.value)
    assert "\n" not in str(told.value)
    with pytest.raises(errors.CheckpointError) as told:
        beginning.past_of(warmstart.Init(str(tmp_path / path)))
    assert "starts from" not in str(told.value)


def test_an_evaluation_of_nothing_says_what_it_evaluates():
    c = experiment.load("configs/knn.py:knn_vitb")
    with pytest.raises(errors.UsageError, match="localmim_vitb_100_8gpu"):
        experiment.read(c)
