"""Masking strategies of multi-sensor samples."""

import math
import typing

import numpy as np
import pytest

from vitssl.data import modalities, states
from vitssl.data.states import DECODER, MISSING, ONLINE, TARGET_ONLY
from vitssl.methods.latent_mim import bandsets, shapes
from vitssl.methods.latent_mim import masks as field_masks

NAMES = ("sentinel2_l2a", "sentinel1", "era5_10", "latlon", "worldcover", "srtm")
KINDS = [modalities.find(n) for n in NAMES]
MAPS = ("worldcover", "srtm")
SHAPE = shapes.Shape(4, 1, 4, 5)
TYPES = typing.get_args(field_masks.Type)


def nothing_gone():
    return {k.name: np.zeros(k.tokens(SHAPE.side, SHAPE.times), bool) for k in KINDS}


def strategy(kind, **options):
    options = dict(decode_only=MAPS) | options
    if kind.startswith("selectable"):
        options |= dict(decodable=("sentinel1",), hidden=("era5_10",), max_chosen=2)
    if kind == "random_fixed_modality":
        options |= dict(decodable=("srtm",), hidden=("sentinel1", "sentinel2_l2a"))
    return field_masks.Strategy(type=kind, **options)


def draws(kind, gone=None, count=40, **options):
    made = strategy(kind, **options)
    gone = gone or nothing_gone()
    for i in range(count):
        rng = np.random.default_rng(i)
        yield field_masks.draw(made, KINDS, gone, rng, coin=(i % 10) / 10, step=i)


@pytest.mark.parametrize("kind", TYPES)
def test_every_strategy_gives_each_token_one_state_and_missing_stays(kind):
    gone = nothing_gone()
    gone["sentinel2_l2a"][0, 1, 2] = True
    gone["sentinel1"][:] = True
    for masks in draws(kind, gone):
        assert set(masks) == set(NAMES)
        for k in KINDS:
            mask = masks[k.name]
            assert mask.shape == k.tokens(4, 5) and mask.dtype == np.int8
            assert (mask[gone[k.name]] == MISSING).all()
            assert set(np.unique(mask)) <= {ONLINE, TARGET_ONLY, DECODER, MISSING}


@pytest.mark.parametrize("kind", [t for t in TYPES if "cross" in t])
def test_something_is_read_something_predicted_and_maps_are_never_read(kind):
    for masks in draws(kind, count=60):
        whole = np.concatenate([m.ravel() for m in masks.values()])
        assert (whole == ONLINE).any() and (whole == DECODER).any()
        assert all((masks[name] != ONLINE).all() for name in MAPS)


def test_time_masks_whole_steps_and_cross_time_is_not_cross_space():
    for masks in draws("time"):
        line = masks["sentinel2_l2a"][0, 0, :, 0]
        for name in ("sentinel2_l2a", "sentinel1", "era5_10"):
            mask = np.moveaxis(masks[name], -2, 0)  # [T, ...]
            assert (mask == line.reshape(-1, *[1] * (mask.ndim - 1))).all()
        assert (line == ONLINE).sum() == 2 and (line == DECODER).sum() == 2
    for masks in draws("modality_cross_time"):
        for i in range(3):
            one = masks["sentinel2_l2a"][..., i]  # [h, w, T]
            assert (one == one[:1, :1]).all()


def test_space_masks_are_one_map_for_all_that_has_space():
    for masks in draws("space"):
        one = masks["srtm"][..., 0, 0]
        for name in ("sentinel2_l2a", "sentinel1", "worldcover"):
            assert (masks[name] == one[..., None, None]).all()
        assert (one == ONLINE).sum() == 8


def test_a_batch_shares_its_coin():
    seen = {"space_time": set(), "random_space": set()}
    for kind, found in seen.items():
        made = strategy(kind)
        for coin in (0.2, 0.8):
            for i in range(8):
                rng = np.random.default_rng(i)
                masks = field_masks.draw(made, KINDS, nothing_gone(), rng, coin=coin)
                same = (masks["srtm"] == masks["worldcover"]).all()
                found.add((coin, bool(same)))
        # With the low coin it is always the spatial one, else (almost) never.
        assert (0.2, False) not in found and (0.8, False) in found


def test_random_increasing_moves_with_the_step():
    made = strategy("random_increasing", steps=10)
    shares = []
    for step in (0, 4, 9, 50):
        rng = np.random.default_rng(0)
        masks = field_masks.draw(made, KINDS, nothing_gone(), rng, step=step)
        shares.append((masks["sentinel2_l2a"] == ONLINE).sum())
    n = 4 * 4 * 5 * 3
    assert shares == [int(n * r) for r in (0.46, 0.3, 0.1, 0.1)] == [110, 72, 24, 24]


def test_with_decode_a_bandset_is_read_or_predicted_never_both():
    for kind in ("random_with_decode", "random_time_with_decode"):
        for masks in draws(kind):
            assert all((masks[name] == DECODER).all() for name in MAPS)
            read = 0
            for name in NAMES[:3]:
                for i in range(masks[name].shape[-1]):
                    one = masks[name][..., i]
                    assert not ((one == ONLINE).any() and (one == DECODER).any())
                    read += (one == ONLINE).any()
            assert 2 <= read <= math.ceil(0.5 * 6)


def test_rules_leave_predicted_tokens_of_unchosen_sets_unless_strict():
    mask = np.array([[ONLINE, ONLINE], [DECODER, DECODER]])  # [N, S]
    there = [("a", 0), ("a", 1)]
    faithful = bandsets.apply_rules("a", mask, there, {("a", 0)}, set())
    assert faithful.T.tolist() == [[ONLINE, TARGET_ONLY], [TARGET_ONLY, DECODER]]
    strict = bandsets.apply_rules("a", mask, there, {("a", 0)}, set(), strict=True)
    assert strict.T.tolist() == [[ONLINE, TARGET_ONLY], [TARGET_ONLY, TARGET_ONLY]]
    assert mask[0, 0] == ONLINE  # Not changed in place.


def test_of_two_sets_the_one_that_may_be_read_is_read():
    there = [("worldcover", 0), ("sentinel1", 0)]
    rng = np.random.default_rng(0)
    read, predicted = bandsets.choose(there, rng, decode_only=MAPS)
    assert read == {("sentinel1", 0)} and predicted == {("worldcover", 0)}


def test_a_sample_with_nothing_to_read_is_filled_again():
    gone = {name: np.ones_like(g) for name, g in nothing_gone().items()}
    gone["sentinel1"][0, 0, 0] = False  # A single token.
    for masks in draws("modality_cross_random", gone, count=5):
        assert masks["sentinel1"][0, 0, 0, 0] == ONLINE


def test_a_patch_is_missing_with_any_of_its_pixels():
    kind = modalities.find("sentinel1")
    x = np.zeros((8, 8, 2, 2), np.float32)
    x[1, 6, 1, 0] = modalities.MISSING  # One band of one pixel.
    gone = states.missing(kind, x)
    assert gone.sum() == 1
    whole = states.per_patch(kind, gone, 4)
    assert np.argwhere(whole).tolist() == [[0, 1, 1, 0]]
    assert not states.per_patch(kind, gone, 4, whole=False).any()


def test_counts_stay_within_the_bounds_of_a_compiled_step():
    made = strategy("modality_cross_random")
    read, predicted = field_masks.bounds(made, KINDS, SHAPE)
    seen = 0
    for masks in draws("modality_cross_random", count=300):
        seen = max(seen, sum((m == ONLINE).sum() for m in masks.values()))
        for name, most in predicted.items():
            assert (masks[name] == DECODER).sum() <= most
    assert read - 5 <= seen <= read  # The bound is tight.
    assert field_masks.bounds(strategy("space"), KINDS, SHAPE) == (0, None)
