"""What a step costs: XLA's count of the lowered step against the cost table."""

import jax
import jax.numpy as jnp
import pytest

from tests.methods.hjepa import tiny

# Forward and backward of the original single-crop step, ViT-B/16 at 224 px.
SINGLE_CROP = 106e9  # Multiply-adds per image.
# 2 global and 6 local crops, visible tokens only, in units of it.
TABLE = {
    ("finest", "global_only", 0.0): 1.05,
    ("finest", "global_only", 0.25): 1.86,
    ("finest", "global_with_local_context", 0.0): 2.17,
    ("finest", "cross_crop_prediction", 0.0): 2.99,
    ("per_level", "global_only", 0.0): 2.67,
    ("per_level", "global_only", 0.25): 3.48,
    ("per_level", "global_with_local_context", 0.0): 4.95,
    ("per_level", "cross_crop_prediction", 0.0): 7.80,
}


def _flops(m, *, patches, local_crops, batch=1):
    """XLA's count for loss and gradient of one batch; nothing is compiled or run."""
    made = m.multicrop
    shapes = {}
    for kind, count in (("global", made.num_global_crops), ("local", local_crops)):
        side = getattr(made, f"{kind}_crop_size")
        if count:
            image = (batch, count, side, side, 3)
            shapes[kind] = jax.ShapeDtypeStruct(image, jnp.uint8)
        mask = (batch, count, m.masking.num_hierarchies, patches[kind])
        for name in ("context", "targets"):
            shapes[f"{kind}_{name}"] = jax.ShapeDtypeStruct(mask, bool)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, extra = jax.eval_shape(m.init, key, shapes)

    def step(params, extra, batch, key):
        return jax.value_and_grad(m.loss, has_aux=True)(params, extra, batch, key)

    lowered = jax.jit(step).lower(params, extra, shapes, key)
    return lowered.cost_analysis()["flops"] / batch


@pytest.mark.parametrize("levels, strategy, view_weight", TABLE)
def test_a_packed_step_costs_what_the_table_says(levels, strategy, view_weight):
    m = tiny.method(
        model=dict(width=768, depth=12, heads=12, patch=16, image_size=224),
        predictor=dict(depth=6, heads=12, mlp_ratio=4.0),
        multicrop=dict(num_local_crops=6, global_crop_size=224, local_crop_size=96),
        masking=dict(
            strategy=strategy, levels=levels, num_hierarchies=3, min_keep=4, slots=0.7
        ),
        objective=dict(view_weight=view_weight, weights=(1.0, 0.5, 0.25)),
    )
    flops = _flops(m, patches={"global": 196, "local": 36}, local_crops=6)
    ratio = flops / 2 / SINGLE_CROP
    want = TABLE[levels, strategy, view_weight]
    assert abs(ratio / want - 1) < 0.1, f"{ratio:.2f} times, not {want}"


def test_local_crops_cost_nothing_where_nothing_uses_them():
    m = tiny.method(
        masking=dict(strategy="global_only"), objective=dict(view_weight=0.0)
    )
    used = tiny.method(masking=dict(strategy="global_only"))
    cost = {
        n: _flops(m, patches={"global": 36, "local": 9}, local_crops=n) for n in (0, 4)
    }
    assert cost[0] == cost[4]
    assert _flops(used, patches={"global": 36, "local": 9}, local_crops=4) > cost[0]


def test_packing_halves_the_work():
    given = dict(masking=dict(strategy="global_only", slots=0.7))
    m = tiny.method(**given)
    given["masking"] |= dict(packed=False)
    padded = tiny.method(**given)
    packed, padded = (
        _flops(x, patches={"global": 36, "local": 9}, local_crops=0)
        for x in (m, padded)
    )
    assert padded > 1.8 * packed
