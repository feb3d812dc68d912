"""The recipes of configs/parts.py: published numbers, options, one-line mistakes."""

import pathlib

import jax
import pytest

from configs import parts as config
from vitssl import errors, main, tree
from vitssl.optim import optimizer
from vitssl.run import build, experiment, memory

PATH = str(pathlib.Path(__file__).parents[3] / "configs" / "parts.py")


def _method(name, classes, **run):
    e = experiment.read(experiment.load(f"{PATH}:{name}"))
    return e, e.method(e.run(classes=classes, **run))


@pytest.mark.parametrize(
    "name, classes, count",
    [
        ("cub_k8", 200, 173_493_504),
        ("waterbirds_k4", 2, 173_180_160),
        ("waterbirds", 2, 173_189_376),
        ("siim_acr_rad_dino", 2, 173_184_768),
        ("metashift", 2, 171_465_984),
        ("metashift_k1", 2, 171_463_680),
    ],
)
def test_published_recipes_build_the_published_models(name, classes, count):
    e, m = _method(name, classes)
    size = e.config.augment.size
    batch = {"image": jax.ShapeDtypeStruct((1, size, size, 3), "uint8")}
    params, _ = jax.eval_shape(m.init, jax.random.key(0), batch)
    assert tree.size(params) == count
    made = optimizer.make(
        e.settings.optim,
        params,
        total_steps=46 * 90,
        steps_per_epoch=46,
        batch_size=e.settings.batch_size,
    )
    assert abs(made.peak - 2.828427e-6) < 1e-11
    assert abs(float(made.wd(0)) - 7.7709e-4) < 1e-7
    frozen = made.frozen(0)
    assert frozen and all(k.startswith("stage_1/backbone/") for k in frozen)
    assert "stage_1/backbone/pos_embed" not in frozen
    assert made.lr_factor["stage_2/head/kernel"] == 1e4
    assert made.lr_factor["stage_1/head/prototypes"] == 1e3


def test_options_compose():
    c = config.get_config("waterbirds_k4,soft_masks,no_gumbel,scratch=100,as_coded")
    assert c.parts.masks == "soft" and not c.parts.gumbel and c.parts.count == 4
    assert c.parts.eval_noise and c.objective.orthogonality_axis == "channels"
    assert dict(c.optim.lr_rules)["stage_2/(head|fc_norm|pool)/.*"] == 100
    c = config.get_config("cub_k8,train_backbone,freeze_second_stage")
    assert [p for p, _ in c.optim.freeze] == [f"stage_2/{config._BODY}"]


@pytest.mark.parametrize(
    "argument, says",
    [
        ("cub_k9", "no recipe 'cub_k9'; there is:"),
        ("cub_k8,soft", "no option 'soft'; there is: soft_masks"),
        ("cub_k8,scratch", "no option 'scratch'"),
    ],
)
def test_unknown_recipes_and_options(argument, says, capsys):
    assert main.main([f"--config={PATH}:{argument}"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, says",
    [
        ("parts.count=0", "parts.count=0: 1 or more"),
        ("parts.masks=medium", "hard, straight_through, soft"),
        ("model.patch=5", "must be a multiple of"),
        ("augment.size=50", "augment.size=50: must be a multiple of model.patch=4"),
        ("objective.presence_type=max", "original, soft_constraint, tanh, soft_tanh"),
        ("affine.degrees=270.0", "affine.degrees=270.0: in [0, 180]"),
        ("parts.modulation=layernorm", "one of layer_norm, original, parallel_mlp"),
    ],
)
def test_mistakes_are_one_message(override, says, capsys, tmp_path):
    argv = [f"--config={PATH}", f"--workdir={tmp_path}", f"--config.{override}"]
    assert main.main(argv) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said


def test_the_group_of_presence_is_checked_against_what_a_device_takes():
    small = ["batch_size=48", "objective.presence_group=16"]
    says = r"presence_group=16: does not divide a micro-batch of 24 .*; 8 does"
    with pytest.raises(errors.UsageError, match=says):
        experiment.read(experiment.load(PATH, [*small, "accumulate=2"]))
    e = experiment.read(experiment.load(PATH, [*small, "per_device=24"]))
    assert e.on(2).settings.accumulate == 1
    with pytest.raises(errors.UsageError, match=says):
        e.on(1)


def test_memory_is_not_saved_by_parts_that_would_be_refused(monkeypatch):
    small = ["batch_size=48", "objective.presence_group=12", "data.options.count=48"]
    monkeypatch.setattr("jax.device_count", lambda: 1)
    made = build.build(experiment.read(experiment.load(f"{PATH}:smoke", small)))
    # Not in 3 parts of 16, nor in any of fewer than 12.
    assert "--config.accumulate=4: " in "".join(memory._fewer(made, 16))
    assert "--config.accumulate=4: " in "".join(memory._fewer(made, 2))
