"""DINOv2's vision transformers: published sizes as configurations of `vit.ViT`.

Sources: Oquab et al. 2023, arXiv:2304.07193; registers: Darcet et al. 2023,
arXiv:2309.16588; Rad-DINO: Perez-Garcia et al. 2024, arXiv:2401.10815.
"""

from vitssl.models import vit

_SIZES = {  # Width, depth, heads.
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def reg4(size, image_size=518):
    """With four registers without position (timm's vit_*_patch14_reg4_dinov2)."""
    return _sized(size, image_size, registers=4, class_position=False)


def plain(size, image_size=518):
    """Without registers (transformers' Dinov2Model, microsoft/rad-dino)."""
    return _sized(size, image_size, resampling="plain")


def _sized(size, image_size, **fields):
    width, depth, heads = _SIZES[size]
    return vit.ViT(width, depth, heads, 14, image_size, layerscale=1e-5, **fields)
