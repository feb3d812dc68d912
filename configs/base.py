"""What the recipes of this folder share: sections, at the size of two cores.

A recipe states what is its own: `base.evals(every_epochs=5.0)`. Keys that nobody states
have the defaults of their section's class; `--dry_run` prints all of them.
"""

import ml_collections

RGB = dict(channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
LEAVES = dict(channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
# Of AdamW, in searches around the demos' rate.
RATES = (("half", 5e-4), ("demos", 1e-3), ("double", 2e-3))
LEAF_CROPS = dict(size=48, scale=(0.3, 1.0), flip=0.5)
VIT = {
    "ti": dict(width=192, depth=12, heads=3),
    "s": dict(width=384, depth=12, heads=6),
    "b": dict(width=768, depth=12, heads=12),
    "l": dict(width=1024, depth=24, heads=16),
    "h": dict(width=1280, depth=32, heads=16),
}
HVIT = {
    "small": dict(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), patch=16),
    "xl": dict(width=192, depths=(3, 6, 24, 3), heads=(6, 12, 24, 48), patch=14),
}
HVIT_SIDE = {"small": 256, "xl": 448}  # Of the images.


def run(method, *, batch_size, epochs, **keys):
    """Return a config with what is no section."""
    own = dict(method=method, seed=0, batch_size=batch_size, epochs=epochs)
    return ml_collections.ConfigDict(own | keys)


def data(source, **keys):
    """Return a section `data`, of grey pictures unless `keys` say otherwise."""
    splits = dict(split="train", bank_split="train", test_split="test")
    grey = dict(channels=1, mean=(0.5,), std=(0.5,))
    return dict(source=source, root="", options={}) | splits | grey | keys


def vit(*, width, depth, heads, patch, **keys):
    """Return a section `model`: a ViT with the size of the training images."""
    own = dict(width=width, depth=depth, heads=heads, patch=patch, image_size=0)
    return dict(name="vit") | own | keys


def tested_leaves():
    """Return a section `data`: leaves, more of them to test than the world has.

    Differences of 3 points are to show.
    """
    return data("leaves", options=dict(test_count=1750), **LEAVES)


def leaf_arm(c):
    """Make a demo an arm of a study on leaves: quiet, and with one table at the end."""
    c.data = tested_leaves()
    c.evals.update(
        every_epochs=0.0, batch_size=250, in_place=True, final=("knn", "linear")
    )
    c.evals.update(baselines=("pixels", "averaged"), probe="lbfgs")
    c.log.update(every_steps=100, pictures=False)
    c.checkpoint.update(every_epochs=2.0, keep_best=0, best="loss")
    return c


def bird_vit():
    """Return the ViT for drawn birds, of pre-training and of part discovery."""
    own = dict(mlp_ratio=2.0, registers=1, class_position=False)
    return vit(width=64, depth=3, heads=4, patch=4, **own)


def hvit(**keys):
    """Return a section `model`: a small hierarchical ViT of three stages."""
    own = dict(width=32, depths=(1, 2, 1), heads=(1, 2, 4), patch=6, image_size=0)
    return dict(name="hvit") | own | keys


def crops(size, local_size, **keys):
    """Return a section `multicrop`: two large crops, no small ones, all coloured."""
    own = dict(
        num_global_crops=2,
        num_local_crops=0,
        global_crop_size=size,
        local_crop_size=local_size,
        global_crop_scale=(0.4, 1.0),
        local_crop_scale=(0.05, 0.4),
        global_color_jitter=1.0,
        local_color_jitter=1.0,
        color_jitter_prob=0.8,
        horizontal_flip_prob=0.5,
        interpolation="fast",
        colour="host",
        adaptive_warmup_epochs=10,  # Of adaptive=True.
    )
    return own | keys


def adamw(lr, warmup_epochs, **keys):
    """Return a section `optim`: AdamW, a warm-up and a cosine to nothing."""
    rate = dict(lr=lr, schedule="cosine", warmup_epochs=warmup_epochs, min_lr=0.0)
    return dict(name="adamw", wd=0.05, clip_norm=0.0) | rate | keys


def decaying_but(pattern):
    """Return `optim.wd_rules` of all leaves except those that match."""
    return ((pattern, 0.0), (".*", 1.0))


def evals(every_epochs, **keys):
    """Return a section `evals`; 0 online samples are all of them."""
    knn = dict(knn_k=(20,), knn_temperature=(0.07,))
    probe = dict(probe="lbfgs", probe_epochs=90)
    online = dict(online_samples_train=0, online_samples_test=0)
    every_epochs = float(every_epochs)  # A recipe of another length has a part of one.
    own = dict(batch_size=256, every_epochs=every_epochs, final=("knn", "linear"))
    return own | online | knn | probe | keys


def folder(c, epochs):
    """Make a recipe one for a folder of colour images (data.root), labels or none."""
    c.epochs = epochs
    c.data.update(source="folder", **RGB)
    c.data.options = {}  # update() would merge the options.
    c.evals.update(every_epochs=epochs / 10, batch_size=64)
    c.log.every_steps = 10
    c.checkpoint.every_epochs = epochs / 10
    return c


def continued(c, lr):
    """Make a recipe one that goes on from trained weights (init.from), gently.

    Released weights are of an encoder alone. What is new beside it learns for an epoch
    before the encoder moves, and then ten times as fast: a high rate would undo within
    an epoch what the weights are worth.
    """
    c.init = {"from": "", "absent": ("(?!encoder/).*", "encoder/pos_embed")}
    c.optim.update(lr=lr, warmup_epochs=2.0, thaw=(("encoder/.*", 1.0),))
    c.optim.lr_rules = (("encoder/.*", 0.1), (".*", 1.0))
    return c


def smoke(c, batch_size):
    """Return a config whose run is two steps."""
    c.steps, c.batch_size, c.optim.warmup_epochs = 2, batch_size, 0.0
    c.log.update(every_steps=1, pictures=False)
    c.optim.thaw = ()  # Within two steps nothing begins to train.
    return c


def recipes(table, options=None):
    """Return the `get_config` of a file, for NAME or "NAME,OPTION,OPTION".

    Args:
        table: {name: function that returns a config}.
        options: changes a config by a list of options; None allows no options.
    """

    def get_config(argument=""):
        name, *rest = argument.split(",") if options else [argument]
        if name not in table:
            known = ", ".join(k for k in table if k)
            raise ValueError(f"no recipe {name!r}; there is: (none), {known}")
        c = table[name]()
        if rest:
            options(c, rest)
        return c

    return get_config
