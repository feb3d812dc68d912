"""The original's state dict into our trees and back."""

import jax
import numpy as np
import pytest

from tests.methods.hjepa import tiny
from vitssl import errors, tree
from vitssl.methods.hjepa import names


def _fresh(m):
    """Return (params, extra) as numpy arrays that are all different."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: m.init(jax.random.key(0), tiny.batch(m)))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm", "none"])
@pytest.mark.parametrize("fpn", ["", "add", "concat"])
def test_there_and_back_gives_every_leaf(norm, fpn):
    m = tiny.method(levels=dict(norm=norm, fpn=fpn), model=dict(layerscale=0.1))
    params, extra = _fresh(m)
    state = names.export(params, extra)
    again = names.load(state, *jax.tree.map(np.zeros_like, (params, extra)))
    extra["momentum"] = np.zeros_like(extra["momentum"])  # Not in a state dict.
    jax.tree.map(np.testing.assert_array_equal, again, (params, extra))


def test_names_and_layouts_are_the_originals():
    m = tiny.method(
        masking=dict(strategy="global_only", num_hierarchies=3),
        levels=dict(norm="batchnorm", fpn="add"),
        objective=dict(weights=(1.0, 0.5, 0.25)),
    )
    params, extra = _fresh(m)
    state = names.export(params, extra)
    attn = params["predictor"]["block_0"]["attn"]
    for key, want in {
        "context_encoder.vit.cls_token": params["encoder"]["cls"],
        "target_encoder.vit.cls_token": extra["target"]["cls"],
        "predictor.blocks.0.attn.in_proj_weight": attn["qkv"]["kernel"].T,
        "predictor.blocks.0.attn.in_proj_bias": attn["qkv"]["bias"],
        "predictor.blocks.0.attn.out_proj.weight": attn["proj"]["kernel"].T,
        "predictor.pos_embed_predictor": params["predictor"]["pooled_query"],
        "hierarchy_projections.2.0.weight": params["levels"]["proj_2"]["dense"][
            "kernel"
        ].T,
        "hierarchy_projections.1.1.bn.running_var": extra["stats"]["proj_1"]["norm"][
            "var"
        ],
        "fpn_lateral_convs.2.1.weight": params["levels"]["lateral_2"]["norm"]["scale"],
        "fpn_top_down_convs.1.0.bias": params["levels"]["top_down_1"]["dense"]["bias"],
    }.items():
        np.testing.assert_array_equal(state[key], want)


def test_a_checkpoint_of_the_original_fits_any_strategy():
    """It has a query without position and no roles, used or not."""
    views = tiny.method(masking=dict(strategy="global_only"))
    state = names.export(*_fresh(views))
    state["hierarchy_projections.0.1.bn.num_batches_tracked"] = np.array(3)
    m = tiny.method(levels=dict(target="ema"))
    params, extra = _fresh(m)
    got_params, got_extra = names.load(state, params, extra)
    roles = got_params["predictor"]["roles"]
    np.testing.assert_array_equal(roles, params["predictor"]["roles"])
    for name, leaf in tree.flat(got_extra["target_levels"]).items():
        np.testing.assert_array_equal(leaf, tree.flat(got_params["levels"])[name])
    cls = state["target_encoder.vit.cls_token"]
    np.testing.assert_array_equal(got_extra["target"]["cls"], cls)


def test_what_does_not_fit_is_named():
    m = tiny.method(masking=dict(strategy="global_only"))
    params, extra = _fresh(m)
    state = names.export(params, extra)
    del state["predictor.head.bias"]
    state["fpn_lateral_convs.0.0.bias"] = np.zeros(16, np.float32)
    with pytest.raises(errors.CheckpointError) as told:
        names.load(state, params, extra)
    assert "predictor.head.bias" in str(told.value)
    assert "fpn_lateral_convs.0.0.bias" in str(told.value)
