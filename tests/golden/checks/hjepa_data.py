"""H-JEPA's crops, colours and masks against the original's.

Pixels are compared in grey levels, as the notes of the case allow: two of them for
operations that PIL rounds, four for its quantised hue.
"""

import dataclasses

import numpy as np

from vitssl.data import colour, crops, geometry, resample
from vitssl.data import views as plain
from vitssl.methods.hjepa import masks, views

GREY = 1 / 255
# DINOv2's crops (arXiv:2304.07193), with its declared probabilities of blur. The
# original's code blurs global crop 0 never and the other global crops nine times in
# ten, because a wrapper inverts them.
DINOV2 = dict(
    global_crop_scale=(0.32, 1.0),
    local_crop_scale=(0.05, 0.32),
    global_color_jitter=1.0,
    local_color_jitter=1.0,
    color_jitter_prob=0.8,
    horizontal_flip_prob=0.5,
    interpolation="bicubic",
    colour="host",
    grayscale_prob=0.2,
    blur_prob=(1.0, 0.1, 0.5),
    solarize_prob=0.2,
)
# A pixel whose hue lies exactly between two of PIL's 255 steps may fall on the other
# side, one step away. Few do.
HUE_STEP, FEW = 12, 0.01


def transforms(case):
    """The evaluation view, one fixed crop, each colour operation, the whole chain."""
    c, image = case.config, case.inputs["image"].astype(np.uint8)
    side, box = c["crop_size"], tuple(c["box_top_left_height_width"])
    view = plain.Evaluate(side, ratio=(c["eval_resize"] + 0.5) / side)
    case.close("eval", _normalise(view({"image": image})["image"], c))
    crop = resample.resize(image, (side, side), box)
    _grey(case, "crop_uint8", crop)
    small = resample.resize(image, (c["small"],) * 2, box)
    _grey(case, "crop_small_uint8", small)

    names = ("brightness", "contrast", "saturation", "hue")
    factors = [c["factors"][name] for name in names]
    for name, operation, factor in zip(names, colour.OPERATIONS, factors, strict=True):
        if f"{name[0]}_uint8" in case.out:
            _grey(case, f"{name[0]}_uint8", operation(crop, factor), name == "hue")
    order = [names.index(name) for name in c["order"]]
    jittered = colour.jitter(crop, factors, order)
    hue = "hue" in c["order"]
    _grey(case, "jitter_uint8", jittered, hue)
    std = np.array(c["std"])[:, None, None]
    mean = np.array(c["mean"])[:, None, None]
    final = (case.out["final"] * std + mean) / GREY
    _close_grey(np.moveaxis(jittered[:, ::-1], -1, 0), final, hue)
    worst = (HUE_STEP if hue else 2) * GREY / min(c["std"])
    case.close("final", _normalise(jittered[:, ::-1], c), tolerance=worst)


def _normalise(image, c):
    """Return [C, H, W] float, standardised."""
    return np.moveaxis((image * GREY - c["mean"]) / c["std"], -1, 0)


def _grey(case, name, got, hue=False):
    _close_grey(got, case.out[name], hue)
    # The tolerance of `close` is relative as well; the bound that counts is above.
    case.close(name, got, tolerance=HUE_STEP if hue else 2)


def _close_grey(got, want, hue):
    """Assert grey levels to be within two, or four of nearly all where hue turned."""
    assert got.shape == want.shape
    gap = np.abs(got.astype(float) - want)
    if not hue:
        assert gap.max() <= 2.01, f"{gap.max()} grey levels"
        return
    assert (gap > 4.01).mean() <= FEW, f"{(gap > 4.01).mean()} are off by more than 4"
    assert gap.max() <= HUE_STEP, f"{gap.max()} grey levels"


def crop_boxes(case):
    """Means and spreads of area, shape and place of random boxes."""
    c, rng = case.config, np.random.default_rng(0)
    size = c["height"], c["width"]
    for name in case.out:
        draws = [
            geometry.draw_box(rng, size, c[f"{name}_scale"], c["ratio"], c["attempts"])
            for _ in range(20_000)
        ]
        top, left, height, width = np.array(draws, float).T
        area, shape = height * width / (size[0] * size[1]), np.log(width / height)
        got = [f(x) for x in (area, shape) for f in (np.mean, np.std, np.min, np.max)]
        # Of the room the box leaves; no room counts as the very top or left.
        got += [(top / np.maximum(1, size[0] - height)).mean()]
        got += [(left / np.maximum(1, size[1] - width)).mean()]
        case.close(name, got)


def hierarchical(case):
    """Scales, block sizes, rasterised blocks exactly; statistics of many draws."""
    for i, g in enumerate(case.config["generators"]):
        section = _section(g)
        side = g["input_size"] // g["patch_size"]
        levels, grid = range(g["num_hierarchies"]), (side, side)
        for name, of in (
            ("target_scale", section.target_scale),
            ("context_scale", section.context_range),
        ):
            case.close(f"{i}_{name}", [of(k) for k in levels])
        if "fallback_block" in g:
            got = [list(section.fallback(k, grid)) for k in levels]
            assert got == g["fallback_block"]
        scale, aspect = (case.inputs[f"{i}_{x}"] for x in ("scale", "aspect"))
        height, width = masks.block_size(scale, aspect, grid)
        case.close(f"{i}_height", height)
        case.close(f"{i}_width", width)
        blocks = case.inputs[f"{i}_blocks"].astype(int)
        case.close(f"{i}_block_masks", _rasterise(blocks, grid))
        got = _statistics(section, grid)
        case.close(f"{i}_statistics", got, tolerance=0.02)


def _rasterise(blocks, grid):
    """Return bool masks [..., N] of blocks [..., 4] = (top, left, height, width)."""
    top, left, height, width = np.moveaxis(blocks, -1, 0)[..., None, None]
    y, x = np.indices(grid)
    mask = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return mask.reshape(*blocks.shape[:-1], -1)


def multiblock(case):
    """Statistics of the single-level generator."""
    c = case.config
    side = c["input_size"] // c["patch_size"]
    section = _section(c, sampler="multiblock")
    case.close("statistics", _statistics(section, (side, side))[0], tolerance=0.02)


def _section(c, **changes):
    """Return the section a case describes, without the `min_keep` rule."""
    section = masks.Masking(
        strategy=c.get("masking_strategy", "global_only"),
        sampler="original",
        num_hierarchies=c.get("num_hierarchies", 1),
        num_target_masks=c["num_target_masks"],
        scale_progression=c.get("scale_progression", "geometric"),
        base_scale=tuple(c.get("base_scale", c.get("target_scale"))),
        aspect_ratio_range=tuple(c["aspect_ratio_range"]),
        max_attempts=c["max_attempts"],
        min_keep=0,
        targets_per_level="constant",
        levels="per_level",
        mode="drop",
        context_scale=tuple(c.get("context_scale", (0.0, 0.0))),
    )
    return dataclasses.replace(section, **changes)


def _statistics(section, grid, rounds=10):
    """Return the nine numbers per level that the case's layout lists, [H, 9]."""
    rng = np.random.default_rng(1)
    draws = [masks.hierarchical(rng, section, grid, 1000) for _ in range(rounds)]
    context, targets = (np.concatenate(x) for x in zip(*draws, strict=True))
    seen, block = context.mean(-1), targets.mean(-1)  # [S, H], [S, H, T]
    union = targets.any(2)  # [S, H, N]
    columns = [
        *(seen.mean(0), seen.std(0)),
        *(block.mean((0, 2)), block.std((0, 2))),
        *(union.mean((0, 2)), union.mean(-1).std(0)),
        (context & union).sum((0, 2)),
        (targets.sum(2) > 1).any(-1).mean(0),
        (~context.any(-1)).mean(0),
    ]
    return np.stack(columns, -1)


def structure(case):
    """Which crops have masks, and of what shape, in every strategy."""
    batch = case.config["batch_size"]
    for strategy, want in case.meta["structure"].items():
        info = want["crop_info"]
        got, section = _batch(strategy, want, batch)
        counts = info["num_global_crops"], info["num_local_crops"]
        n, m = info["global_num_patches"], info["local_num_patches"]
        levels = section.num_hierarchies
        assert got["global_context"].shape == (batch, counts[0], levels, n)
        assert got["global_targets"].any((-1, -2)).all()
        for c in range(counts[0]):
            level = want["globals"][f"crop_{c}"]["level_0"]
            assert level["context"] == [batch, n]
            assert level["targets"] == [batch, section.num_target_masks, n]
        if want["local"] is None:
            assert "local_context" not in got
            continue
        assert got["local_context"].shape == (batch, counts[1], levels, m)
        for c in range(counts[1]):
            local = want["local"][f"crop_{c}"]
            hidden = len(local) == levels and "level_0" in local
            assert got["local_targets"][:, c].any((1, 2)).all() == hidden
            if not hidden:
                assert not got["local_targets"][:, c].any()
                assert got["local_context"][:, c].all()


def _batch(strategy, want, batch):
    """Return masks of a batch with the numbers of `want`, and their section."""
    info = want["crop_info"]
    first = want["globals"]["crop_0"]
    section = masks.Masking(
        strategy=strategy,
        sampler="original",
        num_hierarchies=len(first),
        num_target_masks=first["level_0"]["targets"][1],
        scale_progression="geometric",
        base_scale=(0.05, 0.15),
        aspect_ratio_range=(0.75, 1.5),
        max_attempts=10,
        min_keep=4,
        targets_per_level="constant",
        levels="per_level",
        mode="drop",
    )
    keys = ("num_global_crops", "num_local_crops", "global_crop_size")
    crop = crops.MultiCrop(
        **DINOV2 | {key: info[key] for key in (*keys, "local_crop_size")}
    )
    patch = round(info["global_crop_size"] / info["global_num_patches"] ** 0.5)
    assert [crop.grid(kind, patch) for kind in ("global", "local")] == [
        (round(info[f"{kind}_num_patches"] ** 0.5),) * 2 for kind in ("global", "local")
    ]
    transform = views.MultiCropTransform(crop, section, patch)
    image = np.zeros((32, 40, 3), np.uint8)
    rows = [transform({"image": image}, np.random.default_rng(i)) for i in range(batch)]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}, section


CHECKS = {
    "crop augmentation": transforms,
    "random resized crop": crop_boxes,
    "hierarchical mask generator": hierarchical,
    "multi-block mask generator": multiblock,
    "multi-crop mask generator structure": structure,
}
