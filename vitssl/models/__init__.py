"""Networks; `MODELS` names the backbones a config may ask for.

To add one: write `models/x.py` and its line here.
"""

from vitssl.models import convnext, resnet, vit

MODELS = {
    "vit": vit.ViT,
    "resnet": resnet.ResNet,
    "convnext": convnext.ConvNeXt,
}
