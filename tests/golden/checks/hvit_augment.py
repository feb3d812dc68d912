"""HViT's augmentation primitives and the statistics of its crops."""

import numpy as np

from vitssl.data import geometry, resample
from vitssl.data.sources import spectral
from vitssl.methods.classify import views
from vitssl.methods.simclr import views as simclr
from vitssl.models import patches

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _primitives(case):
    c = case.config
    image = np.ascontiguousarray(np.moveaxis(case.inputs["img"], 0, -1))

    def close(name, got):
        case.close(name, np.moveaxis(np.asarray(got), -1, 0))

    for operation in views.OPERATIONS:
        name = operation.__name__
        close(name, operation(image, c[name]))
    close("grayscale", np.repeat(views.gray(image), 3, -1))
    close("blur", views.blur(image, (c["blur_k"],) * 2, c["sigma"]))
    close("blur_3x9", views.blur(image, (3, 9), c["sigma"]))
    close("hflip", image[:, ::-1])
    close("vflip", image[::-1])
    for kind in ("bilinear", "bicubic"):
        close(f"crop_{kind}_aa", resample.resize(image, c["size"], c["crop"], kind))
    scale = np.round(255 * image)
    close("normalize", (image - MEAN) / np.array(STD))
    # What the device does to whole grey levels is the same map.
    ours = patches.normalise(scale.astype(np.uint8), MEAN, STD)
    np.testing.assert_allclose(ours, (scale / 255 - MEAN) / np.array(STD), atol=1e-5)
    close("chlorosis", views.chlorosis(image, *c["chlorosis"]))
    close("necrosis", views.necrosis(image, *c["necrosis"]))
    for name, kind in (
        ("overexposure", "over"),
        ("underexposure", "under"),
        ("uneven_h", "across"),
        ("uneven_v", "down"),
    ):
        close(f"light_{name}", views.lighting(image, kind, c["lighting"][name]))
    noise = views.NOISE * np.moveaxis(case.inputs["noise"], 0, -1)
    close("noise", np.clip(image + noise, 0.0, 1.0))
    close("ndvi_proxy", spectral.ndvi(image))
    _crops(case.meta["statistics"])


def _crops(statistics):
    """The distribution of our boxes against theirs, to what 8000 draws allow."""
    rng, count = np.random.default_rng(0), 4000
    scales = {
        "simclr": (0.08, 1.0),
        "seed_simclr": simclr.Views(32).scale,
        **{k: views.SEVERITIES[k].scale for k in ("mild", "moderate", "strong")},
    }
    for name, want in statistics.items():
        scale = scales[name]
        boxes = [geometry.draw_box(rng, (256, 256), scale) for _ in range(count)]
        h, w = np.array(boxes)[:, 2:].T.astype(float)
        ratio = np.log(w / h)
        assert abs(ratio.mean() - want["mean_log_ratio"]) < 0.02, name
        assert abs(ratio.std() - want["std_log_ratio"]) < 0.03, name
        area = h * w / 256**2
        # Shares above 1 are cut here: they only end at the whole image there.
        slack = 0.02 if name.endswith("simclr") else 0.12
        assert abs(area.mean() - want["mean_area"]) < slack, name


CHECKS = {"augmentation primitives": _primitives}
