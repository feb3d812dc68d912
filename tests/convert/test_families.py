"""Every family: found by itself, every key used once, every number kept."""

import json
import pathlib

import numpy as np
import pytest

from tests.convert import checkpoints, pth, published
from tests.convert.checkpoints import noise
from vitssl import errors
from vitssl.convert import (
    dinov3,
    exporter,
    families,
    family,
    importer,
    positions,
    safetensors,
)
from vitssl.models import posemb

HEADS = family.Options(heads=2)
CASES = pathlib.Path(__file__).parents[1] / "golden" / "cases"


def _same(found, want, but=()):
    """Assert that leaves agree bit by bit, except those named."""
    assert sorted(found.leaves) == sorted(want.leaves)
    for name, leaf in want.leaves.items():
        if name not in but:
            np.testing.assert_array_equal(found.leaves[name], leaf, err_msg=name)


@pytest.mark.parametrize("kind", checkpoints.TREES)
def test_a_checkpoint_of_the_family_is_found_and_read_bit_by_bit(kind, tmp_path):
    tree, want, pool = checkpoints.TREES[kind]()
    pth.write(tmp_path / "a.pth", tree)
    found = importer.read(tmp_path / "a.pth", options=HEADS)
    assert found.about.family == kind.split(" ")[0]
    assert found.about.pool == pool
    assert found.module().depth == 2 and found.module().patch == 8
    _same(found, want)


def test_what_is_left_aside_is_told(tmp_path):
    tree, _, _ = checkpoints.mae()
    pth.write(tmp_path / "a.pth", tree)
    notes = importer.read(tmp_path / "a.pth", options=HEADS).about.notes
    for group in ("decoder_embed", "decoder_blocks", "mask_token"):
        assert f"left aside: {group} (1 keys)" in notes


HUGGING_FACE = {
    "hf_vit": dict(norm_eps=1e-12),
    "hf_dinov2": dict(layerscale=1e-5, norm_eps=1e-6),
    "hf_dinov2 registers": dict(layerscale=1e-5, registers=2),
    "hf_vit without class token": dict(cls=False, norm_eps=1e-6),
    "dinov3": dict(
        layerscale=1e-5, rope=True, rope_unit=True, positions="none", registers=1
    ),
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face_there_and_back(kind, tmp_path):
    net = published.network(**HUGGING_FACE[kind])
    if kind == "dinov3":
        net = checkpoints.dino_v3()[1]
    file = exporter.write(net, tmp_path / "hf", "hf")
    found = importer.read(file)
    assert found.about.family == kind.split(" ")[0]
    assert found.module().norm_eps == net.module().norm_eps
    _same(found, net)
    again = exporter.hf(found).arrays
    assert sorted(again) == sorted(safetensors.read(file)[0])
    for name, x in safetensors.read(file)[0].items():
        np.testing.assert_array_equal(again[name], x)


def test_the_files_beside_tell_heads_epsilon_and_pixels(tmp_path):
    net = published.network(layerscale=1e-5, norm_eps=1e-4, heads=4)
    file = exporter.write(net, tmp_path, "hf")
    pixels = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    found = importer.read(file)
    assert found.module().heads == 4 and found.module().norm_eps == 1e-4
    assert found.about.mean == (0.1, 0.2, 0.3) and found.about.std == (0.4, 0.5, 0.6)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(errors.CheckpointError, match="hidden_act=relu"):
        importer.read(file)


def test_hugging_face_names_of_the_running_model(tmp_path):
    """transformers 5 may write the names its modules have in memory."""
    net = published.network(norm_eps=1e-12)
    state = exporter.hf(net).arrays
    for old, new in {
        "encoder.layer.": "layers.",
        ".attention.attention.query.": ".attention.q_proj.",
        ".attention.attention.key.": ".attention.k_proj.",
        ".attention.attention.value.": ".attention.v_proj.",
        ".attention.output.dense.": ".attention.o_proj.",
        ".intermediate.dense.": ".mlp.fc1.",
        ".output.dense.": ".mlp.fc2.",
    }.items():
        state = {key.replace(old, new): x for key, x in state.items()}
    pth.write(tmp_path / "a.bin", published.prefixed(state, "vit."))
    _same(importer.read(tmp_path / "a.bin", options=HEADS), net)


@pytest.mark.parametrize("layout", ["blocks", "scan", "first release"])
def test_big_vision_there_and_back(layout, tmp_path):
    net = published.network(classes=3)
    file = exporter.write(net, tmp_path / "a.npz", "bigvision")
    arrays = dict(np.load(file))
    assert arrays[
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    ].shape == (32, 2, 16)
    if layout == "scan":
        head, block = "Transformer/encoderblock", "Transformer/encoderblock_0/"
        names = [k.removeprefix(block) for k in arrays if k.startswith(block)]
        for name in names:
            pair = [arrays.pop(f"{head}_{i}/{name}") for i in range(2)]
            arrays[f"{head}/{name}"] = np.stack(pair)
        arrays = published.prefixed(arrays, "params/")
    elif layout == "first release":
        for new, old in {
            "/MultiHeadDotProductAttention_0/": "/MultiHeadDotProductAttention_1/",
            "/LayerNorm_1/": "/LayerNorm_2/",
            "/MlpBlock_0/": "/MlpBlock_3/",
        }.items():
            arrays = {key.replace(new, old): x for key, x in arrays.items()}
        moved = arrays.pop("pos_embedding")
        arrays["Transformer/posembed_input/pos_embedding"] = moved
    np.savez(file, **arrays)
    found = importer.read(file)
    assert found.about.family == "bigvision" and found.module().heads == 2
    _same(found, net)


@pytest.mark.parametrize(
    "name, out",
    [("hjepa_plain", "target_features"), ("encoder_layerscale", "tokens")],
)
def test_h_jepa_gives_the_original_features(name, out, tmp_path):
    """Through a file, against what the PyTorch module computed."""
    case = json.loads((CASES / "hjepa" / f"{name}.json").read_text())
    arrays = dict(np.load(CASES / "hjepa" / f"{name}.npz"))
    state = {k[6:]: x for k, x in arrays.items() if k.startswith("param/")}
    if name == "encoder_layerscale":
        old, new = "context_encoder", "target_encoder"
        state = {key.replace(old, new): x for key, x in state.items()}
    pth.write(tmp_path / "a.pth", {"model_state_dict": state, "epoch": 1})
    options = family.Options(heads=case["config"]["encoder"]["num_heads"])
    found = importer.read(tmp_path / "a.pth", options=options)
    assert found.about.family == "hjepa"
    image, want = arrays["in/images"].transpose(0, 2, 3, 1), arrays[f"out/{out}"]
    got = published.tokens(found, image)[:, -want.shape[1] :]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case, kind, count",
    [
        ("hvit/hvt_rgb_4stage", "hvit", 80),
        ("hvit/hvt_spectral_concat", "hvit", 98),
        ("vitfreeze/localmim_forward", "localmim", 89),
        ("vitfreeze/localmim_frozen", "localmim", 89),
        ("ifam/twostage_hard_gumbel_eval", "parts", 77),
        ("ifam/hf_twostage_soft", "parts", 75),
        ("ifam/pdiscoformer_vit_original", "parts", 38),
        ("hybrid/encoder_registers_p8", "olmoearth", 43),
        ("hybrid/hybrid_step_mixed", "olmoearth", 89),
    ],
)
def test_state_dicts_of_the_originals_are_found(case, kind, count, tmp_path):
    """Those that the golden cases compare outputs of, with the same tables."""
    arrays = dict(np.load(CASES / f"{case}.npz"))
    state = {k[6:]: x for k, x in arrays.items() if k.startswith("param/")}
    pth.write(tmp_path / "a.pth", {"model": state})
    found = importer.read(tmp_path / "a.pth", options=HEADS)
    assert found.about.family == kind and len(found.leaves) == count
    again = exporter.write(found, tmp_path / "w", "vitssl")
    for name, leaf in importer.read(again).leaves.items():
        np.testing.assert_array_equal(leaf, found.leaves[name])
    if kind == "localmim":  # The original adds a table that is not trained.
        assert found.module().positions == "sincos"


def test_biases_a_model_does_without_are_zeros(tmp_path):
    net = published.network()
    state = published.timm(net)
    for i in range(2):
        del state[f"blocks.{i}.attn.qkv.bias"]
    pth.write(tmp_path / "a.pth", state)
    found = importer.read(tmp_path / "a.pth", options=HEADS)
    biases = [n for n in net.leaves if n.endswith("qkv/bias")]
    _same(found, net, but=biases)
    assert not any(np.any(found.leaves[name]) for name in biases)
    assert any("2 biases" in note for note in found.about.notes)


def _faulty(change):
    state = published.timm(published.network())
    change(state)
    return state


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "blocks.1.mlp.fc2.bias"),
        (lambda s: s.update({"extra.weight": noise(2)}), "extra.weight"),
        (
            lambda s: s.update({"blocks.0.norm1.bias": noise(7)}),
            r"encoder/block_0/norm1/bias \(32,\): blocks.0.norm1.bias \(7,\)",
        ),
        (
            lambda s: s.update({"pos_embed": noise(1, 14, 32)}),
            "no square grid",
        ),
        (lambda s: s.update({"fc_norm.weight": noise(32)}), "fc_norm"),
    ],
)
def test_what_does_not_fit_is_named(change, told, tmp_path):
    pth.write(tmp_path / "a.pth", _faulty(change))
    with pytest.raises(errors.CheckpointError, match=told):
        importer.read(tmp_path / "a.pth", options=HEADS)


def test_options_that_cannot_be_are_usage_errors(tmp_path):
    pth.write(tmp_path / "a.pth", published.timm(published.network()))

    def read(name="auto", part="", **options):
        given = family.Options(**{"heads": 2} | options)
        return importer.read(tmp_path / "a.pth", name=name, part=part, options=given)

    for told, options in {
        "say --heads": dict(heads=0),
        "must divide": dict(heads=5),
        "multiple of the patch": dict(image_size=33),
        "one of auto": dict(name="bert"),
        "the file has": dict(part="teacher"),
    }.items():
        with pytest.raises(errors.UsageError, match=told):
            read(**options)
    with pytest.raises(errors.CheckpointError, match="no weights of hf_vit"):
        read(name="hf_vit")


def test_a_family_named_by_hand_decides_the_rule(tmp_path):
    pth.write(tmp_path / "a.pth", published.timm(published.network()))
    found = importer.read(tmp_path / "a.pth", name="dino", options=HEADS)
    assert found.about.rule == "offset" and found.module().resampling == "plain"


def test_channels_are_converted_and_said(tmp_path):
    net = published.network()
    pth.write(tmp_path / "a.pth", published.timm(net))
    kernel = net.leaves["encoder/patch_embed/kernel"]
    one = importer.read(tmp_path / "a.pth", options=family.Options(2, channels=1))
    got = one.leaves["encoder/patch_embed/kernel"]
    np.testing.assert_allclose(got, kernel.sum(2, keepdims=True), rtol=1e-6)
    assert len(one.about.mean) == 1
    assert any("converted to 1" in note for note in one.about.notes)
    six = importer.read(tmp_path / "a.pth", options=family.Options(2, channels=6))
    got = six.leaves["encoder/patch_embed/kernel"]
    np.testing.assert_allclose(got, np.tile(kernel, (1, 1, 2, 1)) / 2, rtol=1e-6)


@pytest.mark.parametrize("rule", ["antialias", "plain", "offset", "corners"])
def test_resampling_keeps_constants_prefix_and_equal_grids(rule):
    table = np.concatenate([noise(1, 1, 4), np.full((1, 16, 4), 3.0)], axis=1)
    same = positions.resample(table, 1, 4, rule)
    np.testing.assert_array_equal(same, table.astype(np.float32))
    for size in (3, 7):
        got = positions.resample(table, 1, size, rule)
        assert got.shape == (1, 1 + size * size, 4)
        np.testing.assert_array_equal(got[:, :1], table[:, :1].astype(np.float32))
        np.testing.assert_allclose(got[:, 1:], 3.0, rtol=1e-6)


def test_rules_differ_where_they_should():
    """On a ramp: corners keeps its ends, offset lies between its shifted samples."""
    ramp = np.repeat(np.arange(4.0), 4).reshape(1, 16, 1)
    corners = positions.resample(ramp, 0, 7, "corners").reshape(7, 7)
    np.testing.assert_allclose(corners[:, 0], np.arange(7) / 2, rtol=1e-6)
    plain = positions.resample(ramp, 0, 8, "plain").reshape(8, 8)[:, 0]
    # Sample 3 lies at 1.25, where cubic interpolation of a ramp is exact to a = -0.75.
    offset = positions.resample(ramp, 0, 8, "offset").reshape(8, 8)[:, 0]
    assert np.all(np.diff(plain) > 0) and np.all(offset[2:] < plain[2:])
    np.testing.assert_allclose(plain + plain[::-1], 3.0, rtol=1e-6)


def test_every_family_has_a_name_of_its_own():
    assert len(families.FAMILIES) == len(families.ORDER)


def test_a_whole_method_comes_with_every_parameter(tmp_path):
    net = published.timm(published.network(layerscale=1e-5))
    head = {
        "fc_landmarks.weight": noise(3, 32, 1, 1),
        "modulation": noise(1, 32, 3),
    }
    head["fc_class_landmarks.weight"] = noise(5, 32)
    state = published.prefixed(net | head, "stage_1.")
    second = published.prefixed(net | {"head.weight": noise(5, 32)}, "stage_2.")
    pth.write(tmp_path / "a.pth", {"MODEL_STATE": state | second, "EPOCHS_RUN": 3})
    found = importer.read(tmp_path / "a.pth")
    assert found.about.family == "parts"
    leaves = found.leaves
    assert len(leaves) == len(state) + len(second)
    want = head["fc_landmarks.weight"][..., 0, 0]
    np.testing.assert_array_equal(leaves["stage_1/head/prototypes"], want)
    want = second["stage_2.head.weight"].T
    np.testing.assert_array_equal(leaves["stage_2/head/kernel"], want)
    with pytest.raises(errors.CheckpointError, match="init.from"):
        found.module()
    state["stage_1.new"] = noise(1)
    pth.write(tmp_path / "a.pth", {"MODEL_STATE": state | second})
    with pytest.raises(errors.CheckpointError, match="stage_1.new"):
        importer.read(tmp_path / "a.pth")


def test_reordered_channels_attend_as_rotated_halves_do():
    """DINOv3 turns channel c with c + half; ours turns neighbours, channels moved."""
    heads, head_dim, grid = 2, 8, (3, 2)
    rule = next(r for r in dinov3.table(heads).rules if r.torch.endswith("qkv.bias"))
    theirs = noise(3 * heads * head_dim)
    ours = rule.to_flax(theirs).reshape(3, heads, head_dim)
    theirs = theirs.reshape(3, heads, head_dim)
    periods = 100.0 ** (np.arange(2) / 2)  # head_dim / 4 of them.
    y, x = np.divmod(np.arange(6), 2)
    places = np.stack([2 * (y + 0.5) / 3 - 1, 2 * (x + 0.5) / 2 - 1], axis=-1)
    angles = np.tile((2 * np.pi * places[..., None] / periods).reshape(6, 4), 2)

    def turn(v):  # [heads, c] -> [6, heads, c]
        half = np.concatenate([-v[:, head_dim // 2 :], v[:, : head_dim // 2]], axis=-1)
        return np.cos(angles)[:, None] * v + np.sin(angles)[:, None] * half

    want = np.einsum("ihc,jhc->hij", turn(theirs[0]), turn(theirs[1]))
    rotation = posemb.rotation(posemb.rope_angles(grid, head_dim, 100.0, True)[None])
    q, k = (
        np.asarray(posemb.rotate(np.broadcast_to(v, (1, 6, *v.shape)), *rotation))[0]
        for v in ours[:2]
    )
    got = np.einsum("ihc,jhc->hij", q, k)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    out = next(
        r for r in dinov3.table(heads).rules if r.torch == "blocks.{i}.attn.proj.weight"
    )
    weight = noise(5, heads * head_dim)
    value = theirs[2].reshape(-1)
    np.testing.assert_allclose(
        ours[2].reshape(-1) @ out.to_flax(weight), weight @ value, rtol=1e-4, atol=1e-5
    )
