"""Networks; `MODELS` names the backbones a config may ask for.

To add one: write `models/x.py` and its line here.
"""

from vitssl.models import vit

MODELS = {"vit": vit.ViT}
