"""DINOv2's vision transformers: the published sizes as configurations of `vit.ViT`.

Patches of 14 pixels, LayerScale, a class token and (reg4) four registers, of which
only patches have a position. Their position tables are for 518 px.

Sources: Oquab et al. 2023, arXiv:2304.07193; registers: Darcet et al. 2023,
arXiv:2309.16588; Rad-DINO: Perez-Garcia et al. 2024, arXiv:2401.10815.
"""

from vitssl import errors
from vitssl.models import vit

SIZES = {  # name: width, depth, heads
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
_SHARED = dict(patch=14, mlp_ratio=4.0, layerscale=1e-5, norm_eps=1e-6)


def reg4(size: str, image_size: int = 518, **options) -> vit.ViT:
    """Return DINOv2 with four registers (timm's vit_*_patch14_reg4_dinov2).

    Args:
        size: "small", "base" or "large".
        image_size: side in pixels of the images that the position table is for.
        **options: further fields of `vit.ViT`.

    Raises:
        UsageError: unknown size.
    """
    fields = _SHARED | dict(registers=4, class_position=False) | options
    return _sized(size, image_size, fields)


def plain(size: str, image_size: int = 518, **options) -> vit.ViT:
    """Return DINOv2 without registers (transformers' Dinov2Model, microsoft/rad-dino).

    The class token has a position, and the table is resampled without antialiasing.

    Raises:
        UsageError: unknown size.
    """
    fields = _SHARED | dict(class_position=True, resampling="plain") | options
    return _sized(size, image_size, fields)


def _sized(size, image_size, fields):
    if size not in SIZES:
        raise errors.UsageError(f"DINOv2 size={size!r}: one of {', '.join(SIZES)}")
    width, depth, heads = SIZES[size]
    return vit.ViT(
        width=width, depth=depth, heads=heads, image_size=image_size, **fields
    )
