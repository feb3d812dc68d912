"""Blocks as a loop: the numbers of blocks written out, in fewer words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vitssl import tree
from vitssl.models import decoder, hvit, layers, stack, vit

IMAGE = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
VIT = vit.ViT(16, 4, 2, 4, 16, drop_path=0.5)
RICH = VIT.clone(layerscale=0.5, rope=True, registers=2, qk_norm=True)
KEYS = {name: jax.random.key(i) for i, name in enumerate(("drop_path", "dropout"))}
HALF = ("patch_embed/", "pos_embed", "cls", "registers", "block_0/", "block_1/")


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """Compile without optimizing: compilation is most of the time here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _of_vit(net, params, **given):
    y, out = net.apply({"params": params}, IMAGE, train=True, rngs=KEYS, **given)
    return y, *out["blocks"]


def _of_pyramid(net, params):
    out = net.apply({"params": params}, IMAGE, train=True, rngs=KEYS)
    return out["tokens"], *out["stages"]


def _of_decoder(net, params):
    restore = np.tile(np.arange(16)[::-1], (2, 1))
    x = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
    return (net.apply({"params": params}, x, restore, (4, 4)),)


def _init(net):
    """Return random parameters as {name: leaf}."""
    rng = np.random.default_rng(2)
    if isinstance(net, decoder.StageDecoder):
        like = np.zeros((1, 5, 8)), np.zeros((1, 16), int), (4, 4)
        made = jax.eval_shape(lambda k: net.init(k, *like), jax.random.key(0))
    else:
        made = jax.eval_shape(net.init, jax.random.key(0), IMAGE)
    flat = tree.flat(made["params"])
    return {
        name: (0.3 * rng.normal(size=x.shape) + ("scale" in name)).astype(np.float32)
        for name, x in flat.items()
    }


def _lowered(net, run, frozen=(), **given):
    """Return (loss and gradients, not compiled; what they are of)."""
    params = _init(net)
    still = {k: x for k, x in params.items() if frozen and k.startswith(frozen)}
    live = {k: x for k, x in params.items() if k not in still}

    def loss(live):
        outputs = run(net, tree.nest(live | still), **given)
        return sum(jnp.square(y).mean() for y in outputs)

    return jax.jit(jax.value_and_grad(loss)).lower(live), live


def _loops(lowered):
    return lowered.as_text().count("stablehlo.while")


def _pyramid(**fields):
    return hvit.HViT(8, (1, 3), (1, 2), 4, 16, drop_path=0.4, **fields)


def _same(found, want):
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    assert found[1].keys() == want[1].keys()
    for name, x in want[1].items():
        far = np.abs(found[1][name] - x).max()
        assert far <= 1e-4 * np.abs(x).max() + 1e-6, name


KEEP = np.tile(np.arange(6), (3, 1))
WEIGHT = np.random.default_rng(3).random((3, 16)).astype(np.float32)


@pytest.mark.parametrize(
    "net, run, given",
    [
        (RICH.clone(remat=True), _of_vit, {}),
        (RICH, _of_vit, dict(keep=KEEP, count=np.array([6, 4, 1]))),
        (VIT, _of_vit, dict(weight=WEIGHT)),
        (VIT, _of_vit, dict(frozen=HALF)),
        (_pyramid(), _of_pyramid, {}),
        (
            decoder.StageDecoder(decoder.Decoder(8, 3, 2), 1.0, 4),
            _of_decoder,
            {},
        ),
    ],
    ids="remat packed weighted frozen pyramid decoder".split(),
)
def test_a_loop_has_the_values_and_gradients_of_blocks_written_out(net, run, given):
    plain, live = _lowered(net, run, **given)
    loop, _ = _lowered(net.clone(scan=True), run, **given)
    _same(loop.compile()(live), plain.compile()(live))
    assert _loops(loop) > _loops(plain)


def test_frozen_blocks_have_a_loop_without_a_backward_pass():
    loop = VIT.clone(scan=True)
    whole, half = (_lowered(loop, _of_vit, frozen)[0] for frozen in ((), HALF))
    plain = _loops(_lowered(VIT, _of_vit)[0])
    # Forward and backward of one loop; forward of two, backward of the second.
    assert (_loops(whole) - plain, _loops(half) - plain) == (2, 3)


def test_a_loop_over_twelve_blocks_is_a_shorter_program():
    loop, plain = (
        _lowered(VIT.clone(depth=12, scan=scan), _of_vit)[0] for scan in (True, False)
    )
    assert len(loop.as_text()) < 0.6 * len(plain.as_text())


def test_dropout_in_a_loop_is_another_draw_for_every_block():
    class Two(nn.Module):
        def setup(self):
            self.block = [layers.Block(2, 8, dropout=0.5) for _ in range(2)]

        def __call__(self, x):
            return stack.run(self.block, x, None, None, True, train=True, scan=True)

    x = np.zeros((4, 5, 8), np.float32)
    like = jax.eval_shape(Two().init, KEYS | {"params": KEYS["dropout"]}, x)["params"]
    # Both branches are all ones, of which half are dropped and the others doubled.
    params = tree.nest(
        {
            name: np.full(leaf.shape, name.endswith(("proj/bias", "fc2/bias")), float)
            for name, leaf in tree.flat(like).items()
        }
    )
    first, second = Two().apply({"params": params}, x, rngs=KEYS)
    added = np.stack([first, second - first])
    assert set(np.unique(added)) == {0.0, 2.0, 4.0} and abs(added.mean() - 2) < 0.3
    assert 0.25 < np.mean(added[0] == added[1]) < 0.5


def test_attention_maps_come_out_of_a_model_with_a_loop():
    params = tree.nest(_init(RICH))
    found, want = (
        net.apply(
            {"params": params}, IMAGE, method="attention_maps", mutable="intermediates"
        )[0][0]
        for net in (RICH.clone(scan=True), RICH)
    )
    assert found.shape == (3, 4, 2, 19, 19)
    np.testing.assert_array_equal(found, want)


def test_half_precision_tokens_widen_to_what_a_block_returns():
    net, params = RICH.clone(rope=False, dtype="bfloat16"), tree.nest(_init(RICH))
    x = jnp.ones((2, 4, 16), np.float16)
    for scan in (False, True):
        own = net.clone(scan=scan)
        y = own.apply({"params": params}, x, 1, 4, method="through")
        assert len(y) == 3 and {z.dtype for z in y} == {np.dtype("float32")}


def test_what_is_differentiated_is_known_while_it_is_traced():
    seen = []

    def loss(a, b):
        seen.append(stack.differentiated([[a], [b, 1.0]]))
        return (a * b).sum()

    one = np.ones(2, np.float32)
    jax.grad(loss)(one, one)
    jax.jit(jax.grad(loss, 1))(one, one)
    jax.jit(loss)(one, one)
    none = [[False], [False, False]]
    assert seen == [[[True], [False, False]], [[False], [True, False]], none]
