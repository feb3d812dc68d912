"""The files beside the weights of a folder of a hub: what the loaders there read."""

from vitssl import sizes
from vitssl.convert import backbone


def processor(source: backbone.Backbone) -> dict:
    """Return the preprocessor_config.json of transformers."""
    height, width = sizes.pair(source.module().image_size)
    return dict(
        image_processor_type="ViTImageProcessor",
        do_normalize=True,
        do_rescale=True,
        do_resize=True,
        image_mean=list(source.about.mean),
        image_std=list(source.about.std),
        rescale_factor=1 / 255,
        size=dict(height=height, width=width),
    )


def of_timm(source: backbone.Backbone, recipe: dict, eps: float) -> dict:
    """Return timm's config.json, {} where a LayerNorm's eps is not the one of timm."""
    if eps != 1e-6:
        return {}
    kept = ("num_classes", "global_pool")
    size = [recipe["in_chans"], *sizes.pair(recipe["img_size"])]
    pixels = dict(mean=list(source.about.mean), std=list(source.about.std))
    return dict(
        architecture="vit_base_patch16_224",  # Any ViT of timm; model_args say which.
        num_features=recipe["embed_dim"],
        **{key: recipe[key] for key in kept},
        model_args={k: v for k, v in recipe.items() if k not in kept},
        pretrained_cfg=dict(
            tag="vitssl",
            input_size=size,
            fixed_input_size=True,
            interpolation="bicubic",
            crop_pct=1.0,
            num_classes=recipe["num_classes"],
            first_conv="patch_embed.proj",
            classifier="head",
            **pixels,
        ),
    )
