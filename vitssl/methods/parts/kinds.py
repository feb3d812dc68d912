"""The networks of the kinds of `parts.kind`, all with the same parameter names.

stage_1/{backbone, head} finds parts, stage_2/{backbone, fc_norm, head, pool} classifies
under a mask; a kind has one of them or both, so that the same optimizer rules, weight
tables and `init` patterns serve all.
"""

from flax import linen as nn

from vitssl.methods.parts import baselines, networks, sections


class OneStage(nn.Module):
    """Part discovery alone: its mean part scores are the prediction."""

    stage_1: networks.PartNet

    def __call__(
        self, image, draws=None, *, train=False, **options
    ) -> networks.Outputs:
        """See `methods.parts.networks.TwoStage`."""
        found = self.stage_1(image, draws, train=train, **options)
        return networks.Outputs(found.class_logits, found, found.hard[..., 0])

    def discover(self, image, draws=None, *, train=False):
        """Return `partheads.Found` of images."""
        return self.stage_1(image, draws, train=train)


class NoParts(nn.Module):
    """A classifier that finds no parts, on all patches or on those of a given mask."""

    stage_2: nn.Module

    def __call__(self, image, mask=None, *, train=False) -> networks.Outputs:
        """Return `parts.Outputs` with logits alone.

        Args:
            image: [B, H, W, Ch], normalised.
            mask: [B, h, w], where the kind needs one.
            train: drop paths.
        """
        args = () if mask is None else (mask,)
        return networks.Outputs(self.stage_2(image, *args, train=train), None, mask)


def build(backbone, spec: sections.Parts, classes: int, *, rooms=None):
    """Return the network of `spec.kind`.

    Args:
        backbone: from `models.MODELS`; both stages have one of their own like it.
        spec: the section `parts`.
        classes: C.
        rooms: of the second stage, None = (1.0,).
    """
    classes = max(1, classes)
    if spec.kind == "baseline":
        return NoParts(baselines.Baseline(backbone, classes, spec.pooling))
    second = dict(classes=classes, rooms=rooms or (1.0,))
    if spec.kind == "given_mask":
        return NoParts(networks.MaskedClassifier(backbone, norm=False, **second))
    first = networks.PartNet(backbone.clone(), spec.head(classes))
    if spec.kind == "single_stage":
        return OneStage(first)
    other = backbone.clone(drop_path=spec.drop_path_stage_2)
    return networks.TwoStage(
        first, networks.MaskedClassifier(other, **second), spec.masks
    )
