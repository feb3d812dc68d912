"""FLOPs of a step with hybrid patch size, by formula, as `bench.flops` counts them.

Per sample and view. Slots are counted, filled or not: that is what a machine does.
"""

import dataclasses
import math

from vitssl.bench import flops
from vitssl.methods.latent_mim import hybrid, tokens
from vitssl.ops import resize


@dataclasses.dataclass(frozen=True)
class Cost:
    """Forward FLOPs of the parts of a view.

    Attributes:
        embed: patch embedding of all tokens at p.
        inputs: resizing of images, for embedding and targets.
        encoder: blocks and the projection of the pooled vector.
        upsample: of the tokens themselves, and of their mask.
        predictor: context, blocks, answers.
        target: the frozen projection.
        loss: similarities.
    """

    embed: float
    inputs: float
    encoder: float
    upsample: tuple[float, float]
    predictor: float
    target: float
    loss: float

    @property
    def forward(self) -> float:
        """Everything once."""
        return (
            self.embed
            + self.inputs
            + self.encoder
            + sum(self.upsample)
            + self.predictor
            + self.target
            + self.loss
        )

    @property
    def training(self) -> float:
        """Forward and backward.

        Two products more for what is trained; one for what has constant factors on one
        side: pixels, the weights of interpolation, targets.
        """
        return (
            2 * self.embed
            + self.inputs
            + 3 * self.encoder
            + 2 * self.upsample[0]
            + self.upsample[1]
            + 3 * self.predictor
            + self.target
            + 2 * self.loss
        )


def of(module: hybrid.HybridMIM, fields, slots: int, bounds) -> Cost:
    """Return the cost of one view of one sample.

    Args:
        module: the system; upsamplers with parameters, sampled keys and the visible
            loss are not in the model.
        fields: {name: array or shape} of the batch.
        slots, bounds: of `HybridMIM.__call__`, both given.
    """
    e, d, mods = module.encoder, module.predictor, module.modalities
    p, q, r = module.p, module.target_patch, module.factor
    fine = module.decoder == "output" and r > 1
    keys = slots * r * r if fine else slots
    shapes = {x: tokens.shapes(fields, mods, x) for x in (p, q)}
    counts = {x: _counts(shapes[x]) for x in (p, q)}
    grown = (p // q) ** 2
    asked = {}
    for m in mods:
        most = bounds[m.name] * (grown if m.space else 1)
        asked[m.name] = min(most, counts[q][m.name], module.loss_tokens or most)
    total = sum(asked.values())
    predictor = 2 * (keys + total) * e.width * d.inner
    predictor += d.depth * flops.cross_block(total, keys, d.inner, d.mlp_ratio)
    target, inputs = 0.0, 0.0
    for m in mods:
        size = fields[m.name].shape
        inputs += _resizing(m, size, p, e.base)
        if asked[m.name] < counts[q][m.name]:
            add, more = _some_targets(m, size, q, e, asked[m.name])
        else:
            add = _embedding(m, shapes[q][m.name], e)
            more = _resizing(m, size, q, e.base)
        target, inputs = target + add, inputs + more
    return Cost(
        embed=sum(_embedding(m, shapes[p][m.name], e) for m in mods),
        inputs=inputs,
        encoder=e.depth * flops.block(slots + e.registers, e.width, e.mlp_ratio)
        + 2 * e.width**2 * e.projections,
        upsample=_upsampling(shapes[p], mods, e.width, r) if fine else (0.0, 0.0),
        predictor=predictor,
        target=target,
        loss=sum(2 * n**2 * e.width for n in asked.values()),
    )


def predictor(
    queries: int, keys: int, embedded: int, answered: int, *, width: int, depth: int
) -> float:
    """Return the forward FLOPs of a predictor as wide as its encoder, one sample.

    Args:
        queries, keys: tokens that ask and that are asked.
        embedded: tokens that the first linear layer takes; ours takes the keys, the
            original all tokens of the grid.
        answered: tokens that the last linear layer gives.
        width, depth: of the blocks.
    """
    outside = 2 * width**2 * (embedded + answered)
    return depth * flops.cross_block(queries, keys, width) + outside


def _counts(shapes):
    return {k: math.prod(v) for k, v in shapes.items()}


def _embedding(m, shape, encoder):
    """Patch embedding: 2 P^2 C D for every cell and time, whatever the patch."""
    side = encoder.base * m.factor if m.space else 1
    channels = sum(len(c) for c in m.channels)
    return 2 * side**2 * channels * encoder.width * math.prod(shape[:-1])


def _resizing(m, size, patch, base):
    """Two products with dense matrices of weights, one per side of the image."""
    if not m.space or patch == base:
        return 0.0
    side = patch * m.factor
    h, w = (n // side * base * m.factor for n in size[1:3])
    channels = sum(len(c) for c in m.channels) * size[3]
    return 2 * h * size[2] * (size[1] + w) * channels


def _some_targets(m, size, patch, encoder, count):
    """Targets of some tokens: every bandset is computed, one is kept."""
    channels = sum(len(c) for c in m.channels)
    if not m.space:
        return _embedding(m, (size[1], 1), encoder), 0.0
    p, side = encoder.base * m.factor, patch * m.factor
    embedding = 2 * p**2 * channels * encoder.width * count
    if patch == encoder.base:
        return embedding, 0.0
    u, v = (resize.windows(n, n // side, p)[1].shape[-1] for n in size[1:3])
    return embedding, 2 * p * v * (u + p) * channels * count


def _upsampling(shapes, mods, width, r):
    """Return the FLOPs of interpolating tokens and of interpolating their mask."""
    pixels = 0.0
    for m in mods:
        if m.space:
            h, w, t, s = shapes[m.name]
            pixels += 2 * h * r * w * (h + w * r) * t * s
    return pixels * width, pixels
