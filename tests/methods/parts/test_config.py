"""The recipes of configs/parts.py: published numbers, options, one-line mistakes."""

import pathlib

import jax
import pytest

from configs import parts as config
from vitssl import main, tree
from vitssl.optim import optimizer
from vitssl.run import experiment

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
        ("parts.count=0", "parts.count=0: at least 1 part"),
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
