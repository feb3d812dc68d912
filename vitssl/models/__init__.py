"""Networks; `MODELS` names the backbones a config may ask for.

To add one: write `models/x.py` and its line here. What a method asks of a backbone,
whichever it is:

    pooled(image, how, train) -> [B, D]; how is one of its poolings
    features(image) -> {"tokens": [B, N, D], and [B, D] for each of its poolings}
    attention_maps(image) -> ([B, layers, heads, T, T], grid of the tokens)
    poolings, freeze_layers(prefix), check_image(size), check_channels(channels)
    width, depth, patch, image_size, remat, check(): fields and properties

"""

from vitssl.models import convnext, hvit, resnet, vit

MODELS = {
    "vit": vit.ViT,
    "hvit": hvit.HViT,
    "resnet": resnet.ResNet,
    "convnext": convnext.ConvNeXt,
}
