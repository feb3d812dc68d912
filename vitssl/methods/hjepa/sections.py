"""Config sections of H-JEPA: `masking`, `predictor`, `levels`, `ema`.

`model` is `models.vit.ViT`, `multicrop` is `data.crops.MultiCrop`, `objective` is in
`hjepa_losses`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from vitssl.methods.hjepa import levels, masks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking(masks.Masks):
    """Config section `masking`: how masks are drawn, and how the step uses them.

    Attributes:
        levels: per_level: every level has its own context and targets. finest: those
            of level 0 serve all levels (the original's trainer).
        mode: drop: hidden patches do not exist for the encoder. zero: their tokens are
            set to 0 and stay, also as context of the predictor (the original).
        context: block: a context block minus the targets. complement: all that is no
            target (the original's trainer).
        packed: compute visible tokens only. False: all slots of the grid, hidden ones
            masked as attention keys (same loss; to measure what packing saves).
        slots: quantile of the numbers of visible patches that gets room; 1.0 = room
            for all. See `hjepa_slots`.
        accumulate_crops: predict crop by crop, recomputing activations in the backward
            pass: memory of one crop's predictor.
    """

    levels: Literal["per_level", "finest"]
    mode: Literal["drop", "zero"]
    context: Literal["block", "complement"] = "block"
    packed: bool = True
    slots: float = 0.7
    accumulate_crops: bool = False

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        yield from super().check()
        if not 0.0 < self.slots <= 1.0:
            yield f"slots={self.slots}: a quantile, above 0 and at most 1"

    @property
    def passes(self) -> int:
        """Encoder passes per crop: levels that have masks of their own."""
        return self.num_hierarchies if self.levels == "per_level" else 1

    @property
    def blocks_only(self) -> masks.Masks:
        """The part that the data pipeline needs."""
        fields = dataclasses.fields(masks.Masks)
        return masks.Masks(**{f.name: getattr(self, f.name) for f in fields})


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Config section `predictor`; see `methods.hjepa.predictor.Predictor`.

    Attributes:
        depth, heads: of its blocks.
        width: of its blocks; 0 = the encoder's.
        mlp_ratio, drop_path, remat: as in the encoder.
    """

    depth: int
    heads: int
    width: int = 0
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    remat: bool = False

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        for key in ("depth", "heads"):
            if getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}: must be at least 1"
        if self.width < 0:
            yield f"width={self.width}: 0 (the encoder's) or more"
        if not self.mlp_ratio > 0:
            yield f"mlp_ratio={self.mlp_ratio}: must be positive"
        if not 0.0 <= self.drop_path < 1.0:
            yield f"drop_path={self.drop_path}: must be in [0, 1)"


@dataclasses.dataclass(frozen=True)
class Levels:
    """Config section `levels`; see `methods.hjepa.levels.Levels`.

    Their number is `masking.num_hierarchies`.

    Attributes:
        pooling: spatial: means over 2^k x 2^k cells. sequence: over 2^k consecutive
            entries of the list of targets (the original).
        norm: of the projections.
        fpn: "" for none; feature pyramid by "add" or "concat".
        fpn_width: of the pyramid; 0 = the encoder's width.
        target: shared: targets pass the layers that are being trained (the original).
            ema: they pass an averaged copy, like the encoder's.
    """

    pooling: levels.Pooling
    norm: levels.Norm = "layernorm"
    fpn: Literal["", "add", "concat"] = ""
    fpn_width: int = 0
    target: Literal["shared", "ema"] = "shared"

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.fpn_width < 0:
            yield f"fpn_width={self.fpn_width}: 0 (the encoder's) or more"


@dataclasses.dataclass(frozen=True)
class Ema:
    """Config section `ema`: the target encoder.

    Attributes:
        start, end: momentum at the first and the last step, linear in between.
        warmup_steps: so long it stays at `start`.
        target_encoder: False: end-to-end training, targets come from the encoder
            itself, with gradients (needs SIGReg).
    """

    start: float
    end: float
    warmup_steps: int = 0
    target_encoder: bool = True

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        for key in ("start", "end"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                yield f"{key}={getattr(self, key)}: must be in [0, 1]"
        if self.warmup_steps < 0:
            yield f"warmup_steps={self.warmup_steps}: must not be negative"
