import dataclasses
import pickle

import numpy as np
import pytest

from vitssl import config
from vitssl.methods.hjepa import masks, slots

HJEPA = masks.Masking(
    strategy="global_only",
    sampler="original",
    num_hierarchies=3,
    num_target_masks=4,
    scale_progression="geometric",
    base_scale=(0.05, 0.15),
    aspect_ratio_range=(0.75, 1.5),
    max_attempts=10,
    min_keep=0,
    targets_per_level="constant",
    levels="per_level",
    mode="drop",
)


def change(**values):
    return dataclasses.replace(HJEPA, **values)


def draw(section, grid, crops, seed=0):
    return masks.hierarchical(np.random.default_rng(seed), section, grid, crops)


# Measured on the original with 600 samples.
@pytest.mark.parametrize(
    "side, scale, seen, union, overlap, empty",
    [
        (14, (0.05, 0.15), (0.372, 0.365, 0.412), (0.377, 0.496, 0.499),
         (0.15, 0.87, 0.97), (0, 0, 0)),
        (14, (0.15, 0.2), (0.205, 0.374, 0.213), (0.585, 0.481, 0.722),
         (0.90, 0.995, 0.998), (0, 0, 0.003)),
        (6, (0.05, 0.15), (0.385, 0.293, 0.373), (0.389, 0.597, 0.556),
         (0.02, 0.58, 0.80), (0, 0.002, 0)),
        (4, (0.05, 0.15), (0.424, 0.290, 0.283), (0.307, 0.611, 0.661),
         (0, 0.18, 0.85), (0, 0.03, 0.03)),
    ],
)  # fmt: skip
def test_statistics_are_those_of_the_original(side, scale, seen, union, overlap, empty):
    context, targets = draw(change(base_scale=scale), (side, side), 4000)
    np.testing.assert_allclose(context.mean((0, 2)), seen, atol=0.02)
    np.testing.assert_allclose(targets.any(2).mean((0, 2)), union, atol=0.02)
    np.testing.assert_allclose((targets.sum(2) > 1).any(-1).mean(0), overlap, atol=0.05)
    np.testing.assert_allclose((~context.any(-1)).mean(0), empty, atol=0.02)


def test_block_sides_round_half_to_even_and_stay_in_the_grid():
    # sqrt(0.25 * 25) = 2.5 -> 2.
    assert [int(x) for x in masks.block_size(0.25, 1.0, (5, 5))] == [2, 2]
    # sqrt(0.25 * 25 / 1.25) = 2.24 -> 2, and 2 * 1.25 = 2.5 -> 2.
    assert [int(x) for x in masks.block_size(0.25, 1.25, (5, 5))] == [2, 2]
    assert [int(x) for x in masks.block_size(0.1, 1.0, (14, 14))] == [4, 4]
    height, width = masks.block_size(np.array([1.0, 0.001]), np.array([2.0, 1]), (4, 9))
    assert height.tolist() == [4, 1] and width.tolist() == [8, 1]
    height, width = masks.block_size(np.array([1.0]), np.array([0.25]), (4, 9))
    assert height.tolist() == [4] and width.tolist() == [
        3
    ]  # Clipped after, not before.


@pytest.mark.parametrize("sampler", ["original", "multiblock", "ijepa"])
@pytest.mark.parametrize("grid", [(14, 14), (2, 2), (3, 7)])
@pytest.mark.parametrize("scale", [(0.05, 0.15), (0.3, 0.95), (1.0, 1.0)])
@pytest.mark.parametrize("shrink", ["constant", "shrink"])
def test_no_draw_breaks_the_promises(sampler, grid, scale, shrink):
    for keep in (0, 4):
        section = change(
            sampler=sampler, base_scale=scale, targets_per_level=shrink, min_keep=keep
        )
        context, targets = draw(section, grid, 150)
        union = targets.any(2)  # [S, H, N]
        assert not (context & union).any()
        for k in range(3):
            seen, asked = context[:, k].sum(-1), union[:, k].sum(-1)
            assert seen.max() <= slots.bounds(section, k, grid)[0]
            assert asked.max() <= slots.bounds(section, k, grid)[1]
            assert asked.min() >= 1
            if keep:
                assert seen.min() >= min(keep, grid[0] * grid[1] // 4)


def test_bounds_are_not_just_the_whole_grid():
    assert slots.bounds(HJEPA, 0, (14, 14))[0] < 160
    one = change(num_target_masks=1)
    # A single block at level 0: at most 0.15 of 196 and rounding.
    most = slots.bounds(one, 0, (14, 14))[1]
    assert 30 <= most <= 36
    _, targets = draw(one, (14, 14), 4000)
    assert targets[:, 0].any(1).sum(-1).max() == most


def test_same_generator_same_masks_other_generator_others():
    for section in (HJEPA, change(sampler="ijepa"), change(sampler="multiblock")):
        a, b, c = (draw(section, (8, 8), 5, seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
        assert (a[1] != c[1]).any()


@pytest.mark.parametrize("sampler", ["original", "ijepa"])
def test_the_first_crops_do_not_depend_on_how_many_follow(sampler):
    few, many = (draw(change(sampler=sampler), (8, 8), n) for n in (2, 7))
    for a, b in zip(few, many, strict=True):
        np.testing.assert_array_equal(a, b[:2])


def test_blocks_that_do_not_fit_become_small_and_may_overlap():
    section = change(base_scale=(0.6, 0.6), num_hierarchies=1)
    _, targets = draw(section, (12, 12), 50)
    assert (targets[:, 0, 0].sum(-1) > 70).all()  # Rounded sides of 0.6 * 144.
    assert (targets[:, 0, 1:].sum(-1) == 6 * 6).all()  # A half of each side.
    multi = dataclasses.replace(section, sampler="multiblock")
    _, targets = draw(multi, (12, 12), 50)
    assert (targets[:, 0, 1:].sum(-1) == 3 * 3).all()  # A quarter of each side.


def test_level_zero_is_nearly_square_and_others_are_not():
    section = change(aspect_ratio_range=(0.5, 2.0), num_target_masks=1)
    _, targets = draw(section, (40, 40), 400)
    block = targets[:, :, 0].reshape(400, 3, 40, 40)
    height, width = block.any(-1).sum(-1), block.any(-2).sum(-1)  # [S, H]
    ratio = width / height
    assert 0.8 < ratio[:, 0].min() and ratio[:, 0].max() < 1.2
    assert ratio[:, 1].min() < 0.6 and ratio[:, 1].max() > 1.7


def test_scales_grow_with_the_level():
    np.testing.assert_allclose(HJEPA.target_scale(2), (0.2, 0.6))
    linear = change(scale_progression="linear")
    np.testing.assert_allclose(linear.target_scale(2), (0.15, 0.45))
    assert change(base_scale=(0.5, 0.9)).target_scale(1) == (0.95, 0.95)
    np.testing.assert_allclose(HJEPA.context_range(0), (0.6, 0.75))
    np.testing.assert_allclose(HJEPA.context_range(2), (0.9, 1.0))
    np.testing.assert_allclose(change(num_hierarchies=1).context_range(0), (0.6, 0.75))
    assert change(context_scale=(0.3, 0.4)).context_range(1) == (0.3, 0.4)
    assert change(sampler="multiblock").context_range(0) == (0.85, 1.0)


def test_shrinking_halves_the_blocks_per_level():
    section = change(targets_per_level="shrink")
    assert [section.blocks(k) for k in range(4)] == [4, 2, 1, 1]
    _, targets = draw(section, (14, 14), 500)
    assert (targets.any(-1).sum(-1) == [4, 2, 1]).all()
    few, many = (
        x.any(2)[:, 2].sum(-1).mean() for x in (targets, draw(HJEPA, (14, 14), 500)[1])
    )
    # One block of 0.2 to 0.6 that is never a fallback.
    assert abs(few / 196 - 0.4) < 0.03 < many / few - 1


def test_context_is_the_complement_when_too_little_of_it_is_left():
    section = change(context_scale=(0.05, 0.1), min_keep=4)
    context, targets = draw(section, (8, 8), 300)
    free = draw(dataclasses.replace(section, min_keep=0), (8, 8), 300)[0]
    poor = free.sum(-1) < 4  # [S, H]
    assert 0.2 < poor.mean() < 1
    np.testing.assert_array_equal(context[poor], ~targets.any(2)[poor])
    np.testing.assert_array_equal(context[~poor], free[~poor])


def test_last_blocks_are_dropped_when_the_targets_cover_too_much():
    section = change(base_scale=(0.4, 0.5), num_hierarchies=1, min_keep=4)
    context, targets = draw(section, (4, 4), 400)
    free = draw(dataclasses.replace(section, min_keep=0), (4, 4), 400)[1]
    crowded = (~free.any(2)).sum(-1)[:, 0] < 4
    assert 0.1 < crowded.mean() < 1
    for got, want in zip(targets[crowded, 0], free[crowded, 0], strict=True):
        left = int(got.any(-1).sum())
        assert 1 <= left < 4
        np.testing.assert_array_equal(got[:left], want[:left])
        assert not got[left:].any()
        # One block more would be too many.
        assert 16 - want[: left + 1].any(0).sum() < 4 <= 16 - got.any(0).sum()
    np.testing.assert_array_equal(context[crowded], ~targets.any(2)[crowded])


def test_context_block_of_ijepa_is_square():
    section = change(
        sampler="ijepa", num_target_masks=1, base_scale=(0.01, 0.01),
        aspect_ratio_range=(0.5, 0.6), context_scale=(0.3, 0.6),
    )  # fmt: skip
    context, _ = draw(section, (20, 20), 100)
    block = context.reshape(100, 3, 20, 20)
    np.testing.assert_array_equal(block.any(-1).sum(-1), block.any(-2).sum(-1))


def test_blocks_of_ijepa_share_one_size():
    section = change(sampler="ijepa", base_scale=(0.15, 0.2))
    size = np.random.default_rng(7)
    draws = [
        masks.hierarchical(
            np.random.default_rng(i), section, (14, 14), 2,
            size_rng=np.random.default_rng(7),
        )[1].sum(-1)
        for i in range(3)
    ]  # fmt: skip
    for level in range(3):
        areas = {int(a) for one in draws for a in one[:, level].ravel()}
        assert len(areas) == 1
        u = size.random(2)[0]
        area, ratio = int((0.15 + 0.05 * u) * 196), 0.75 + 0.75 * u
        want = round((area * ratio) ** 0.5) * round((area / ratio) ** 0.5)
        assert areas == {want}
    own = masks.hierarchical(np.random.default_rng(0), section, (14, 14), 40)[1]
    assert len(np.unique(own.sum(-1))) > 3


def multicrop(strategy, crops, seed=0):
    section = change(strategy=strategy, min_keep=4)
    rng = np.random.default_rng(seed)
    return masks.multicrop(rng, section, (8, 8), (4, 4), crops)


@pytest.mark.parametrize("strategy", masks.STRATEGIES)
def test_global_masks_are_the_same_in_every_strategy_and_for_any_local_crops(strategy):
    got = multicrop(strategy, (2, 5))
    context, targets = masks.hierarchical(
        np.random.default_rng(0), change(min_keep=4), (8, 8), 2
    )
    np.testing.assert_array_equal(got["global_context"], context)
    np.testing.assert_array_equal(got["global_targets"], targets.any(2))
    fewer = multicrop(strategy, (2, 3))
    np.testing.assert_array_equal(got["global_targets"], fewer["global_targets"])


def test_strategies_differ_in_what_local_crops_see():
    assert "local_context" not in multicrop("global_only", (2, 5))
    seen = multicrop("global_with_local_context", (2, 5))
    assert seen["local_context"].shape == (5, 3, 16) and seen["local_context"].all()
    assert not seen["local_targets"].any()
    cross = multicrop("cross_crop_prediction", (2, 5))
    # The first half, rounded down, is masked.
    assert cross["local_targets"].any((1, 2)).tolist() == [True, True] + [False] * 3
    assert cross["local_context"].all((1, 2)).tolist() == [False, False] + [True] * 3
    assert not (cross["local_targets"] & cross["local_context"]).any()


def test_no_crops_of_a_kind_no_masks_of_it():
    assert set(multicrop("cross_crop_prediction", (0, 3))) == {
        "local_context",
        "local_targets",
    }
    assert set(multicrop("cross_crop_prediction", (2, 0))) == {
        "global_context",
        "global_targets",
    }
    alone = multicrop("cross_crop_prediction", (1, 1))
    assert alone["local_context"].all() and not alone["local_targets"].any()


def test_section_reports_every_bad_value():
    given, found = dataclasses.asdict(HJEPA), config.Problems()
    assert config.section(masks.Masking, given, "m", found) == HJEPA and not found
    bad = dict(
        num_hierarchies=5,
        num_target_masks=0,
        base_scale=(0.0, 0.1),
        aspect_ratio_range=(0.0, 1.0),
        max_attempts=0,
        min_keep=-1,
        context_scale=(0.9, 1.2),
        slots=0.0,
    )
    config.section(masks.Masking, given | bad, "m", found)
    assert {line.split("=")[0] for line in found} == {f"m.{key}" for key in bad}
    assert "m.num_hierarchies=5: in [1, 4]" in found
    turned = change(
        base_scale=(0.2, 0.1), aspect_ratio_range=(2.0, 1.0), context_scale=(0.0, 0.5)
    )
    keys = [line.split("=")[0] for line in turned.check()]
    assert keys == ["base_scale", "aspect_ratio_range", "context_scale"]


def test_section_can_be_pickled_and_hashed():
    assert pickle.loads(pickle.dumps(HJEPA)) == HJEPA
    assert hash(HJEPA) == hash(change())
